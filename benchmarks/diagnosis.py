"""How often is the diagnosis of a run right, and does its advice help? On planted faults.

Small networks are pretrained here and fine-tuned on samples made for the purpose, so that the
fault of each run is known. Every run is diagnosed from its record alone, and with what may be
measured besides (a probe, reference runs, a learning curve). Then the advice is followed and both
runs are compared on 400 test samples. Seeds draw samples, split, head and order. Minutes on two
cores.

    python benchmarks/diagnosis.py [--seeds 4] [--jobs 2]
    python benchmarks/diagnosis.py --report      # the page again from the log

Writes `results/diagnosis.json` and `results/diagnosis.md`.
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
from bench import RESULTS

import frostline
from frostline import _io
from frostline.backends.torch.grouping import layer_groups
from frostline.study.diagnosis import Diagnosis, diagnose
from frostline.study.learning_curve import LearningCurve, learning_curve
from frostline.study.probes import ProbeCurve, probe_curve
from frostline.tasks.config import load_config
from frostline.tasks.features import collect_features
from frostline.tasks.run import Run
from frostline.tasks.task import load_task

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from faulty_disk import QuickDisk
from planted_task import Source, data_folder, pretrained

PATH = RESULTS / "diagnosis.json"
BASE: Mapping[str, Any] = {
    "model": "planted_task:model", "epochs": 12, "batch_size": 32, "lr": 3e-3, "head_lr": 3e-2,
    "patience": None, "threads": 1, "device": "cpu", "cache": "off", "checkpoint_every": None,
}  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Planted:
    """Runs of one known fault.

    Attributes:
        name: for the table.
        right: findings that are right; empty for a healthy run.
        source: what the network was pretrained on.
        settings: of the run, where they differ from `BASE`.
        noise: of the samples, in hundredths.
        samples: for training.
        beside: what is measured besides, by name: a policy or settings of reference runs, "probe",
            or "curve".
    """

    name: str
    right: tuple[str, ...]
    source: Source
    settings: Mapping[str, Any]
    noise: int = 50
    samples: int = 240
    beside: Mapping[str, Any] = field(default_factory=dict)


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

    def probe(self, case: Planted) -> ProbeCurve:
        """A probe of the pretrained network on the case's samples."""
        settings = {k: v for k, v in self.settings(case).items() if k != "policy"}
        task = load_task(load_config(None, settings))
        groups = layer_groups(task.model, task.example(), head=task.head)
        train, val = (
            collect_features(task, task.model, split, groups, device="cpu")
            for split in (task.train, task.val)
        )
        return probe_curve(train, val)

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
    besides: dict[str, dict[str, Any]] = {"the record alone": {}}
    for what, given in case.beside.items():
        if given == "probe":
            besides["a probe"] = {"probe": bench.probe(case)}
        elif given == "curve":
            besides["a learning curve"] = {"curve": bench.curve(case)}
        else:
            other = bench.fit(f"{name}-{what}", settings | given)
            besides[f"a run: {what}"] = {"reference": [] if other is None else [other]}
    for beside, measured in besides.items():
        found = diagnose(folder, **measured)
        yield row(bench, case, beside, found, run) | {"advice": advised(bench, case, found, run)}


def of_seed(place: str, seed: int, names: Sequence[str] | None) -> list[Row]:
    """All cases with one seed."""
    torch.set_num_threads(1)
    _io.disk = QuickDisk()  # nobody cuts the power
    cases = [c for c in CASES if not names or any(word in c.name for word in names)]
    return [found for case in cases for found in examined(Bench(Path(place), seed), case)]


def row(bench: Bench, case: Planted, beside: str, found: Diagnosis, run: Run | None) -> Row:
    kinds = [f.kind for f in found.findings]
    return {
        "case": case.name,
        "right": list(case.right),
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


def page(log: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    rows: Sequence[Row] = log["rows"]
    seeds = sorted({r["seed"] for r in rows})
    lines = [
        "# How often the diagnosis is right",
        "",
        "Made by `python benchmarks/diagnosis.py`; planted faults, a network of four layer groups,",
        f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}) that were not looked at when the weights",
        f"of evidence were set. All runs took {log['seconds']:.0f} s.",
        "",
        "| planted | with | right first | right among them | found first |",
        "|---|---|---|---|---|",
    ]
    lines += [_line(name, beside, of) for (name, beside), of in _grouped(rows).items()]
    first = [_right(r) for r in rows]
    alone = [_right(r) for r in rows if r["beside"] == "the record alone"]
    more = [_right(r) for r in rows if r["beside"] != "the record alone"]
    lines += [
        "",
        f"Right first: {_share(first)}, by the record alone {_share(alone)}, else {_share(more)}.",
        "",
        "What following the first advice brought (means over seeds, on test samples; backward work",
        "before and after, in updates of full fine-tuning):",
        "",
        "| planted | with | advice | before | after | gain, points | expected | full updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        line
        for (name, beside), of in _grouped(rows).items()
        if (line := _advice(name, beside, of)) is not None
    ]
    return "\n".join(lines) + "\n"


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        found.setdefault((r["case"], r["beside"]), []).append(r)
    return found


def _right(r: Row) -> bool:
    return r["found"][0] in (r["right"] or ["nothing wrong"])


def _share(values: Sequence[bool]) -> str:
    return f"{sum(values)} of {len(values)}"


def _line(name: str, beside: str, of: Sequence[Row]) -> str:
    among = [bool(set(r["found"]) & set(r["right"] or ["nothing wrong"])) for r in of]
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
    parser.add_argument("--report", action="store_true", help="no runs: the page from the log")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    if not options.report:
        options.out.write_text(json.dumps(measure(options), indent=1) + "\n", "utf-8")
    log = json.loads(options.out.read_text("utf-8"))
    options.out.with_suffix(".md").write_text(page(log), "utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases with all seeds."""
    seeds = range(options.first, options.first + options.seeds)
    rows: list[Row] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="frostline-diagnosis-") as place:
        for source in get_args(Source):
            pretrained(source, Path(place))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            jobs = [pool.submit(of_seed, place, seed, options.only) for seed in seeds]
            for seed, job in zip(seeds, jobs, strict=True):
                rows += job.result()
                print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return {"seconds": time.perf_counter() - start, "rows": rows}


if __name__ == "__main__":
    main()
