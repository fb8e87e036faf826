"""How often is the diagnosis of a run right, and does its advice help? On planted faults.

Small networks are pretrained here and fine-tuned on samples made for the purpose, so that the
fault of each run is known. Every run is diagnosed from its record alone, and with what may be
measured besides (a probe, reference runs, a learning curve). Then the advice is followed and both
runs are compared on test samples. Seeds draw samples, split, head and order. `--real` does the same
with ResNet-20 of CIFAR-10 on handwritten and spoken digits as pictures.

    python benchmarks/diagnosis.py [--seeds 4] [--jobs 2]      # ten minutes on two cores
    python benchmarks/diagnosis.py --real --seeds 1            # adds to the log; minutes
    python benchmarks/diagnosis.py --report                    # the page again from the log

Writes `results/diagnosis.json`, `results/diagnosis.md` and the figures in `docs/diagnosis.md`.
`--real` needs `data` and `models` of the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from bench import RESULTS, processor
from frontier_models import SHARED

import frostline
from frostline import _io
from frostline.study.diagnosis import Diagnosis, Kind, diagnose
from frostline.study.diagnosis.probing import probe_run
from frostline.study.learning_curve import LearningCurve, learning_curve
from frostline.tasks.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from faulty_disk import QuickDisk
from planted_task import Source, data_folder, pretrained

PATH = RESULTS / "diagnosis.json"
GUIDE = RESULTS.parents[1] / "docs" / "diagnosis.md"
BASE: Mapping[str, Any] = {
    "model": "planted_task:model", "epochs": 12, "batch_size": 32, "lr": 3e-3, "head_lr": 3e-2,
    "patience": None, "threads": 1, "device": "cpu", "cache": "off", "checkpoint_every": None,
}  # fmt: skip
Row = dict[str, Any]
#: Where nothing was measured besides.
ALONE = "the record alone"


@dataclass(frozen=True)
class Planted:
    """Runs of one known fault.

    Attributes:
        name: for the table.
        right: findings that are right; empty for a healthy run.
        source: what the network was pretrained on; None for a real one, which `settings` name.
        settings: of the run, where they differ from `BASE`.
        noise: of the samples, in hundredths.
        samples: for training.
        beside: what is measured besides, by name: a policy or settings of reference runs, "probe",
            or "curve".
        held_out: added after the weights of evidence were set, which saw the others.
    """

    name: str
    right: tuple[str, ...]
    source: Source | None
    settings: Mapping[str, Any]
    noise: int = 50
    samples: int = 240
    beside: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool = False


FULL, PROBE = {"policy": "full"}, {"policy": "linear-probe"}
FEW = {"train_samples": 50, "epochs": 20, "batch_size": 16, "lr": 1e-2}
CASES = (
    Planted("linear probing, features of another task",
            ("too much frozen", "wrong layer depth"), "far", PROBE,
            beside={"full": FULL, "probe": "probe"}),
    Planted("linear probing, the deep half of another task",
            ("too much frozen", "wrong layer depth"), "both, then far", PROBE,
            beside={"full": FULL, "probe": "probe"}),
    Planted("full fine-tuning on 50 samples", ("too little frozen",), "near", FULL | FEW, 90, 480,
            beside={"linear probing": PROBE, "probe": "probe"}),
    Planted("learning rates 300 times too high", ("learning rate too high",), "near",
            FULL | {"lr": 1.0, "head_lr": 10.0}, beside={"a tenth": {"lr": 0.1, "head_lr": 1.0}}),
    Planted("learning rates 3000 times too low", ("learning rate too low",), "near",
            FULL | {"lr": 1e-6, "head_lr": 1e-5}, beside={"probe": "probe"}),
    Planted("learning rates 100 times too low", ("learning rate too low",), "near",
            FULL | {"lr": 3e-5, "head_lr": 3e-4}, beside={"probe": "probe"}),
    Planted("3 epochs where 12 are needed", ("stopped too early",), "both, then far",
            FULL | {"epochs": 3}, beside={"12 epochs": {"epochs": 12}}),
    Planted("30 epochs where 10 are plenty", ("trained longer than needed",), "near",
            {"policy": "first:groups=2", "epochs": 30}, 90),
    Planted("linear probing at a low rate", ("head not converged",), "near",
            PROBE | {"head_lr": 3e-4}, beside={"probe": "probe"}),
    Planted("full fine-tuning, 60 samples of another task", ("too little data",), "far",
            FULL | {"train_samples": 60, "epochs": 24, "batch_size": 16, "lr": 1e-2},
            beside={"curve": "curve"}),
    Planted("healthy: half frozen, clear samples", (), "near",
            {"policy": "first:groups=2", "patience": 3}, beside={"full": FULL, "probe": "probe"}),
    Planted("healthy: full, clear samples", (), "both, then far", FULL | {"patience": 3},
            beside={"linear probing": PROBE, "probe": "probe"}),
    Planted("healthy: linear probing, noisy samples", (), "near", PROBE | {"patience": 3}, 90, 480,
            beside={"full": FULL, "probe": "probe"}),
    Planted("linear probing, noisy samples of another task",
            ("too much frozen", "wrong layer depth"), "far", PROBE, 70, 480,
            beside={"full": FULL}, held_out=True),
    Planted("three of four groups frozen, features of another task",
            ("too much frozen", "wrong layer depth"), "far", {"policy": "first:groups=3"},
            beside={"full": FULL}, held_out=True),
    Planted("full fine-tuning on 40 samples", ("too little frozen",), "near",
            FULL | FEW | {"train_samples": 40, "epochs": 25}, 100, 480,
            beside={"linear probing": PROBE}, held_out=True),
    Planted("learning rates 100 times too high", ("learning rate too high",), "near",
            FULL | {"lr": 0.3, "head_lr": 3.0}, 70, 320, held_out=True),
    Planted("linear probing, learning rate 30 times too low", ("head not converged",), "near",
            PROBE | {"head_lr": 1e-3}, 70, 320, beside={"probe": "probe"}, held_out=True),
    Planted("4 epochs where 16 are needed", ("stopped too early",), "far",
            FULL | {"epochs": 4}, beside={"16 epochs": {"epochs": 16}}, held_out=True),
    Planted("24 epochs where 8 are plenty", ("trained longer than needed",), "near",
            FULL | {"epochs": 24}, 40, held_out=True),
    Planted("healthy: one group frozen, noisy samples", (), "near",
            {"policy": "first:groups=1", "patience": 3}, 70, 480,
            beside={"full": FULL, "linear probing": PROBE}, held_out=True),
)  # fmt: skip

RESNET: Mapping[str, Any] = {
    "model": "models_for_tests:resnet20", "image_size": 32, "epochs": 6, "lr": 1e-3,
    "head_lr": 1e-2, "augment": "none", "cache": "auto",
    "weights": str(SHARED / "models/resnet_cifar10/resnet20.safetensors"),
}  # fmt: skip
REAL = (
    Planted("handwritten digits, linear probing of ResNet-20",
            ("too much frozen", "wrong layer depth"), None,
            RESNET | PROBE | {"data": "far_data:digits"},
            beside={"full": FULL, "probe": "probe"}, held_out=True),
    Planted("spoken digits as pictures, linear probing of ResNet-20",
            ("too much frozen", "wrong layer depth"), None,
            RESNET | PROBE | {"data": "far_data:spoken_digits"},
            beside={"full": FULL, "probe": "probe"}, held_out=True),
    Planted("handwritten digits, full fine-tuning of ResNet-20", (), None,
            RESNET | FULL | {"data": "far_data:digits", "patience": 3},
            beside={"linear probing": PROBE}, held_out=True),
)  # fmt: skip


# -- runs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where the runs of one seed are.

    Attributes:
        folder: of everything.
        seed: of samples, split, head and order.
    """

    folder: Path
    seed: int

    def settings(self, case: Planted) -> dict[str, Any]:
        """Settings of a case's run."""
        if case.source is None:
            place = {"cache_dir": str(self.folder / "stores"), "seed": self.seed}
            return {**BASE, **case.settings, **place}
        data = data_folder(
            self.folder / f"data-{case.noise}-{case.samples}-{self.seed}",
            noise=case.noise,
            train=case.samples,
            seed=self.seed,
        )
        weights = pretrained(case.source, self.folder)
        return {**BASE, **case.settings, "data": str(data), "weights": weights, "seed": self.seed}

    def fit(self, name: str, settings: Mapping[str, Any]) -> Run | None:
        """A run, or None if it diverged; the reason is where a study would note it."""
        output = self.folder / "runs" / name / f"seed-{self.seed}"
        try:
            return frostline.fit(**settings, output=output)
        except frostline.errors.TrainingError as error:
            output.with_name(f"{output.name}.failed.json").write_text(
                json.dumps({"why": str(error)})
            )
            return None

    def curve(self, case: Planted) -> LearningCurve:
        """A learning curve up to the case's samples."""
        settings = self.settings(case)
        most = settings.pop("train_samples")
        del settings["seed"]
        return learning_curve(
            settings.pop("model"), settings.pop("data"), [settings.pop("policy")],
            sizes=[most // 2, most], seeds=[self.seed + i for i in range(3)],
            output=self.folder / f"curve-{self.seed}", isolate=False, **settings,
        )  # fmt: skip


def examined(bench: Bench, case: Planted) -> Iterator[Row]:
    """A case with one seed: a row per diagnosis, with what following it brought."""
    settings, name = bench.settings(case), case.name.replace(" ", "-").replace(":", "")
    run = bench.fit(name, settings)
    folder = bench.folder / "runs" / name / f"seed-{bench.seed}"
    besides: dict[str, dict[str, Any]] = {ALONE: {}}
    for what, given in case.beside.items():
        if given == "probe":
            besides["a probe"] = {"probe": probe_run(folder)}
        elif given == "curve":
            besides["a learning curve"] = {"curve": bench.curve(case)}
        else:
            other = bench.fit(f"{name}-{what}", settings | given)
            besides[f"a run: {what}"] = {"reference": [] if other is None else [other]}
    for beside, measured in besides.items():
        found = diagnose(folder, **measured)
        yield row(bench, case, beside, found, run) | {"advice": advised(bench, case, found, run)}


def of_case(place: str, seed: int, name: str) -> list[Row]:
    """A case with one seed."""
    torch.set_num_threads(1)
    _io.disk = QuickDisk()  # nobody cuts the power
    case = next(case for case in (*CASES, *REAL) if case.name == name)
    return list(examined(Bench(Path(place), seed), case))


def row(bench: Bench, case: Planted, beside: str, found: Diagnosis, run: Run | None) -> Row:
    kinds = [f.kind for f in found.findings]
    return {
        "case": case.name,
        "right": list(case.right),
        "held_out": case.held_out,
        "real": case.source is None,
        "seed": bench.seed,
        "beside": beside,
        "found": kinds,
        "strength": found.findings[0].strength,
        "weights": {f.kind: f.weight for f in (*found.findings, *found.considered)},
        "accuracy": None if run is None else run.summary["test_accuracy"],
    }


def advised(bench: Bench, case: Planted, found: Diagnosis, run: Run | None) -> Row | None:
    """What the first finding's advice brings, on test samples and in time."""
    action = found.findings[0].action
    if action is None or not action.settings:
        return None
    name = "advised-" + action.text.replace(" ", "").replace(":", "-")
    settings = bench.settings(case) | dict(action.settings)
    better = bench.fit(f"{case.name.replace(' ', '-').replace(':', '')}-{name}", settings)
    if better is None:
        return {"text": action.text, "diverged": True}
    gain = found.findings[0].gain
    before = {} if run is None else run.summary
    return {
        "text": action.text,
        "accuracy": better.summary["test_accuracy"],
        "gain": None if run is None else better.summary["test_accuracy"] - before["test_accuracy"],
        "expected": None if gain is None else gain.accuracy,
        "work": [_work(run), _work(better)],
    }


def _work(run: Run | None) -> float:
    """Backward work of a run, in full steps."""
    return 0.0 if run is None else run.summary["backward_share"] * run.summary["steps"]


# -- the page --------------------------------------------------------------------------------------


NOTHING = "nothing wrong"


def page(log: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    rows: Sequence[Row] = log["rows"]
    parts = _parts(rows)
    lines = [
        "# How often the diagnosis is right",
        "",
        "Made by `python benchmarks/diagnosis.py`: runs with planted faults, by the record alone",
        "and with what was measured besides. The weights of evidence were set by other seeds of",
        f"the first cases. All runs took {log['seconds'] / 60:.0f} minutes on a busy machine",
        f"({log['processor']}).",
        "",
        *_summary(parts),
        "",
        "Right first: the weightiest finding is the planted fault, or nothing is found in a",
        "healthy run. Where too much is frozen, `wrong layer depth` is right, too.",
        "",
        "## What is taken for what",
        "",
        *_confusion(rows),
    ]
    for title, of in parts.items():
        lines += _part(title, of)
    return "\n".join(lines) + "\n"


def _parts(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by how far the weights of evidence knew them."""
    parts = {
        "Cases that the weights of evidence were set by, other seeds": [
            r for r in rows if not r["held_out"]
        ],
        "Cases added afterwards": [r for r in rows if r["held_out"] and not r["real"]],
        "A real network, digits as pictures": [r for r in rows if r["real"]],
    }
    return {title: of for title, of in parts.items() if of}


def _summary(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = [
        "| | diagnoses | right first | by the record alone | with more |",
        "|---|---|---|---|---|",
    ]
    for title, of in parts.items():
        alone = [_right(r) for r in of if r["beside"] == ALONE]
        more = [_right(r) for r in of if r["beside"] != ALONE]
        whole = _share(alone + more)
        lines.append(f"| {title} | {len(of)} | {whole} | {_share(alone)} | {_share(more)} |")
    return lines


def put_figures(log: Mapping[str, Any]) -> None:
    """The summary into the page of the documentation."""
    first, last = "<!-- figures -->", "<!-- /figures -->"
    before, _, rest = GUIDE.read_text("utf-8").partition(first)
    after = rest.partition(last)[2]
    lines = "\n".join(_summary(_parts(log["rows"])))
    GUIDE.write_text(f"{before}{first}\n{lines}\n{last}{after}", "utf-8")


def _confusion(rows: Sequence[Row]) -> list[str]:
    """Diagnoses by planted fault and first finding, by the record alone and with more."""
    planted = list(dict.fromkeys(" or ".join(r["right"]) or "none (healthy)" for r in rows))
    found = [kind for kind in get_args(Kind) if any(r["found"][0] == kind for r in rows)]
    lines = [f"| planted | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for fault in planted:
        of = [r for r in rows if (" or ".join(r["right"]) or "none (healthy)") == fault]
        cells = []
        for kind in found:
            hit = [r["beside"] == ALONE for r in of if r["found"][0] == kind]
            cells.append(f"{sum(hit)} + {len(hit) - sum(hit)}" if hit else "")
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return [*lines, "", "Numbers of diagnoses: by the record alone + with more."]


def _part(title: str, rows: Sequence[Row]) -> list[str]:
    """The tables of some cases."""
    seeds = sorted({r["seed"] for r in rows})
    lines = [
        "",
        f"## {title}",
        "",
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} from {seeds[0]} on.",
        "",
        "| planted | with | right first | right among them | found first |",
        "|---|---|---|---|---|",
    ]
    lines += [_line(name, beside, of) for (name, beside), of in _grouped(rows).items()]
    lines += [
        "",
        "What following the first advice brought (means over seeds, on test samples; backward work",
        "before and after, in updates of full fine-tuning):",
        "",
        "| planted | with | advice | before | after | gain, points | expected | full updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    advice = (_advice(name, beside, of) for (name, beside), of in _grouped(rows).items())
    return [*lines, *(line for line in advice if line is not None)]


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        found.setdefault((r["case"], r["beside"]), []).append(r)
    return found


def _right(r: Row) -> bool:
    return r["found"][0] in (r["right"] or [NOTHING])


def _share(values: Sequence[bool]) -> str:
    return f"{sum(values)} of {len(values)}"


def _line(name: str, beside: str, of: Sequence[Row]) -> str:
    among = [bool(set(r["found"]) & set(r["right"] or [NOTHING])) for r in of]
    kinds = [r["found"][0] for r in of]
    counts = ", ".join(f"{k} ({kinds.count(k)})" for k in sorted(set(kinds), key=kinds.count)[::-1])
    return f"| {name} | {beside} | {_share([_right(r) for r in of])} | {_share(among)} | {counts} |"


def _advice(name: str, beside: str, of: Sequence[Row]) -> str | None:
    taken = [r for r in of if r["advice"] is not None and r["advice"].get("gain") is not None]
    if not taken:
        return None
    advice = [r["advice"] for r in taken]
    texts = [a["text"] for a in advice]
    text = ", ".join(sorted(set(texts), key=texts.count)[::-1][:3])
    expected = [a["expected"] for a in advice if a["expected"] is not None]
    gains = [a["gain"] for a in advice]
    worst = min(gains)
    work = [f"{statistics.fmean(a['work'][i] for a in advice):.0f}" for i in (0, 1)]
    return (
        f"| {name} | {beside} | {text} | {_percent(r['accuracy'] for r in taken)} | "
        f"{_percent(a['accuracy'] for a in advice)} | {100 * statistics.fmean(gains):+.1f} "
        f"(worst {100 * worst:+.1f}) | "
        f"{f'{100 * statistics.fmean(expected):+.1f}' if expected else '-'} | "
        f"{' to '.join(work)} |"
    )


def _percent(values: Any) -> str:
    return f"{100 * statistics.fmean(values):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first", type=int, default=100, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=None, help="words in names of cases")
    parser.add_argument("--real", action="store_true", help="the cases of ResNet-20 instead")
    parser.add_argument("--report", action="store_true", help="no runs: the page from the log")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    if not options.report:
        for now in measure(options):
            before = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
            options.out.write_text(json.dumps(merged(before, now), indent=1) + "\n", "utf-8")
    log = json.loads(options.out.read_text("utf-8"))
    options.out.with_suffix(".md").write_text(page(log), "utf-8")
    if options.out == PATH:
        put_figures(log)


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The log with what was run now; a diagnosis that was there is replaced."""

    def key(r: Row) -> tuple[str, str, int]:
        return r["case"], r["beside"], r["seed"]

    rows = {key(r): r for r in (*before.get("rows", ()), *now["rows"])}
    order = {case.name: place for place, case in enumerate((*CASES, *REAL))}
    found = sorted(rows.values(), key=lambda r: (order.get(r["case"], -1), r["seed"]))
    seconds = before.get("seconds", 0.0) + now["seconds"]
    return {"seconds": seconds, "processor": now["processor"], "rows": found}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cases with all seeds, as they are done."""
    cases = [c for c in (REAL if options.real else CASES) if chosen(c, options.only)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="frostline-diagnosis-") as place:
        for source in get_args(Source):
            pretrained(source, Path(place))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            jobs = [
                (pool.submit(of_case, place, seed, case.name), case.name, seed)
                for seed in range(options.first, options.first + options.seeds)
                for case in cases
            ]
            for job, name, seed in jobs:
                rows, now = job.result(), time.perf_counter()
                print(f"{name}, seed {seed}: {now - start:.0f} s", flush=True)
                yield {"seconds": now - start, "processor": processor(), "rows": rows}
                start = now


def chosen(case: Planted, words: Sequence[str] | None) -> bool:
    """Whether a case is to be run."""
    return not words or any(word in case.name for word in words)


if __name__ == "__main__":
    main()
