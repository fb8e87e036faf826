"""How much faster are whole runs with the frozen region cached, and do they learn the same?

Pictures and texts by `frostline.fit(..., cache="on" or "off")`, sound by a loop of this script
over `Region` and `Store`. Every pair of runs has the same seed and settings; runs with and without
the cache alternate in one process. A cached run starts with an empty store.

    python benchmarks/frontier_runs.py [--quick] [--rounds 2] [--threads 2] [--clock wall]
    python benchmarks/frontier_runs.py --device cuda --threads 8
    python benchmarks/frontier_runs.py --report        # the table from the log

Needs `data` and `models` of the shared folder beside the checkout.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import made_by, seconds
from frontier_bench import arguments, describe, gather, machine_of, ratio_text, rows_of, size_text
from frontier_models import SHARED, convert_lite0, minilm_path
from frontier_sound import SoundRun

import frostline
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.cost import predicted_step_s
from frostline.frontier.cache import moved
from frostline.groups import LayerGroups
from frostline.memory import keeping_freed, leaving_old_objects
from frostline.plan import FreezePlan
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.task import load_task

TARGET = 8.0
FIRST_EPOCH_LIMIT = 1.05
TOLERANCE = 1.05
#: Samples of a batch whose costs bound the runs.
BATCH = 32
MODES = ("off", "on")
#: What a GPU is lent for, and in what batches; fewer epochs, for it is lent by the minute.
CUDA_JOBS = {
    "flowers5-lite0-probe": 128,
    "trec6-minilm-probe": 64,
    "flowers5-lite0-half": 128,
    "trec6-minilm-half": 64,
}
CUDA_EPOCHS, CUDA_WORKERS = 4, 4
DATA = ("flowers5", "trec6", "fsdd")


@dataclass(frozen=True)
class Job:
    """A run that is done with and without the cache.

    Attributes:
        title: for people.
        model: as `frostline fit` takes it; "kwt1" is the loop of this script.
        data: folder of the data set.
        frozen: selector of what is frozen.
        epochs: of the run.
        settings: of the run, besides.
        target: how much faster the cached run must be; 0: as the bound allows.
        most: pairs of runs, at most: some take minutes.
    """

    title: str
    model: str
    data: Path
    frozen: str
    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: float = 0.0
    most: int = 10

    @property
    def by_fit(self) -> bool:
        """Whether `frostline.fit` does it."""
        return self.model != "kwt1"

    @property
    def device(self) -> str:
        """Where it trains."""
        return self.settings.get("device", "cpu")

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.settings.get("batch_size", BATCH)


def jobs(scratch: Path, *, quick: bool) -> dict[str, Job]:
    """What is run; on a few samples when quick."""
    data = shrunk(scratch / "data") if quick else SHARED / "data"
    flowers5, trec6, fsdd = (data / name for name in DATA)
    epochs, few = (2, 2) if quick else (10, 4)
    side = 64 if quick else 160
    colours = {"image_mean": (127 / 255,) * 3, "image_std": (128 / 255,) * 3}
    lite0 = {"weights": scratch / "lite0.safetensors", "image_size": side, **colours}
    pictures = {"augment": "none", "head_lr": 1e-2}
    texts = {"max_length": 64, "head_lr": 1e-2}
    timm, text = "timm:tf_efficientnet_lite0", f"hf:{minilm_path()}"
    squeezenet = "frontier_models:squeezenet"
    probe, half = "backbone", "first 50%"
    return {
        "flowers5-lite0-probe": Job(
            f"flowers5, EfficientNet-lite0 at {side} px, linear probing",
            timm, flowers5, probe, epochs, {**lite0, **pictures}, TARGET,
        ),
        "flowers5-squeezenet-probe": Job(
            "flowers5, SqueezeNet at 224 px, linear probing",
            squeezenet, flowers5, probe, epochs, {**pictures, "head_lr": 1e-3}, TARGET, 1,
        ),
        "trec6-minilm-probe": Job(
            "trec6, MiniLM, linear probing", text, trec6, probe, epochs, texts, TARGET
        ),
        "trec6-minilm-shipped": Job(
            "trec6, MiniLM, linear probing, a checkpoint after every epoch",
            text, trec6, probe, epochs, {**texts, "checkpoint_every": "1ep"}, most=1,
        ),
        "fsdd-kwt1-probe": Job(
            "fsdd, KWT-1, linear probing", "kwt1", fsdd, "13", epochs, {"lr": 1e-2}, TARGET
        ),
        "flowers5-lite0-half": Job(
            f"flowers5, EfficientNet-lite0 at {side} px, half frozen",
            timm, flowers5, half, few, {**lite0, **pictures}, most=1,
        ),
        "trec6-minilm-half": Job(
            "trec6, MiniLM, half frozen", text, trec6, half, few, texts, most=1
        ),
        "fsdd-kwt1-half": Job(
            "fsdd, KWT-1, six of twelve blocks frozen", "kwt1", fsdd, "7", few, {"lr": 1e-3}
        ),
    }  # fmt: skip


def cuda_jobs(scratch: Path, *, quick: bool) -> dict[str, Job]:
    """The jobs of a GPU: larger batches, few epochs, pictures prepared by workers."""
    made, most = jobs(scratch, quick=quick), 2
    found: dict[str, Job] = {}
    for name, batch in CUDA_JOBS.items():
        job = made[name]
        workers = CUDA_WORKERS if name.startswith("flowers5") else 0
        settings = {**job.settings, "device": "cuda", "batch_size": batch, "workers": workers}
        title = f"{job.title}, batch {batch}" + (f", {workers} workers" if workers else "")
        epochs = min(job.epochs, CUDA_EPOCHS)
        found[name] = replace(
            job, title=title, settings=settings, epochs=epochs, target=0.0, most=most
        )
    return found


def jobs_of(device: str, scratch: Path, *, quick: bool) -> dict[str, Job]:
    """The jobs of a device."""
    return (cuda_jobs if device == "cuda" else jobs)(scratch, quick=quick)


def shrunk(folder: Path, *, each: int = 8) -> Path:
    """The data sets with a few samples of every class, as links and short tables."""
    for name in DATA:
        for split in ("train", "val", "test"):
            source, target = SHARED / "data" / name / split, folder / name / split
            if table := next(source.parent.glob(f"{split}.csv"), None):
                lines = table.read_text("utf-8").splitlines()
                target.parent.mkdir(parents=True, exist_ok=True)
                short = "\n".join([lines[0], *lines[1 : 1 + 12 * each]]) + "\n"
                target.with_suffix(".csv").write_text(short, "utf-8")
            for kind in source.iterdir() if source.is_dir() else ():
                (target / kind.name).mkdir(parents=True, exist_ok=True)
                for file in sorted(kind.iterdir())[:each]:
                    link = target / kind.name / file.name
                    if not link.exists():
                        link.symlink_to(file)
    return folder


# -- one run ----------------------------------------------------------------------------------


class Stamps:
    """Wall and processor seconds at what happens in a run."""

    def __init__(self) -> None:
        self.start = self._now()
        self.seen: list[tuple[str, float, float]] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Note a start, an epoch or an end."""
        if event["kind"] in ("start", "epoch", "end"):
            self.note(event["kind"])

    def note(self, kind: str) -> None:
        """Note that it happened now."""
        wall, cpu = self._now()
        self.seen.append((kind, wall - self.start[0], cpu - self.start[1]))

    def times(self, clock: str) -> dict[str, Any]:
        """Seconds of the whole run, of training with validation, and of each epoch."""
        at = [(kind, wall if clock == "wall" else cpu) for kind, wall, cpu in self.seen]
        begin = next(t for kind, t in at if kind == "start")
        ends = [t for kind, t in at if kind == "epoch"]
        epochs = [b - a for a, b in zip([begin, *ends], ends, strict=False)]
        return {"whole_s": at[-1][1], "training_s": ends[-1] - begin, "epochs_s": epochs}

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.monotonic(), time.process_time()


def run(job: Job, cache: str, seed: int, *, clock: str, threads: int) -> dict[str, Any]:
    """One run: its seconds, its accuracies and the peak of this process's memory.

    Args:
        job: what to run.
        cache: "on" or "off".
        seed: of the run.
        clock: "wall" or "cpu".
        threads: for arithmetic.
    """
    stamps = Stamps()
    on_gpu = job.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as place:
        if job.by_fit:
            found = _fit(job, cache, seed, threads, Path(place), stamps)
        else:
            sound = SoundRun(
                job.data,
                trains=int(job.frozen),
                epochs=job.epochs,
                lr=job.settings["lr"],
                seed=seed,
                store=Path(place) / "store" if cache == "on" else None,
            )
            with leaving_old_objects():  # as `fit` does
                found = sound.result(stamps.note)
    return {
        "cache": cache,
        "seed": seed,
        **found,
        **stamps.times(clock),
        "peak_bytes": _memory_bytes("VmHWM"),
    } | ({"cuda_peak_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {})


def _fit(
    job: Job, cache: str, seed: int, threads: int, place: Path, stamps: Stamps
) -> dict[str, Any]:
    settings = _settings(job) | {"threads": threads, "output": place / "run", "seed": seed}
    if "cache" in RunConfig.model_fields:
        settings["cache"] = cache
        if "cache_dir" in RunConfig.model_fields:
            settings["cache_dir"] = place / "cache"
    elif cache == "on":
        raise SystemExit("this version of `frostline.fit` has no setting `cache`")
    done = frostline.fit(job.model, job.data, **settings, on_event=stamps)
    summary = done.summary
    assert summary["certificate_ok"], "frozen weights moved"
    return {
        "test_accuracy": summary["test_accuracy"],
        "test_loss": summary["test_loss"],
        "losses": [m["train_loss"] for m in done.metrics],
        "cache_summary": summary.get("cache"),
    }


def _settings(job: Job) -> dict[str, Any]:
    policy = "linear-probe" if job.frozen == "backbone" else f"freeze:select='{job.frozen}'"
    fixed = {"epochs": job.epochs, "patience": None, "checkpoint_every": None, "policy": policy}
    return fixed | dict(job.settings)


# -- the bound --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds per sample of the parts of a run.

    Attributes:
        load: reading and preparing it.
        front: forward through the frozen region, recording nothing.
        rest: forward, backward and update of what is left of a training step.
        rest_forward: forward of the rest alone, for evaluation.
        share: of the forward pass that is frozen, [0, 1].
    """

    load: float
    front: float
    rest: float
    rest_forward: float
    share: float


def bound(costs: Costs, *, epochs: int, train: int, val: int) -> float:
    """How much faster training with validation can be when the frozen region runs once.

    Reading a stored row is taken to be free, and stored samples are not loaded any more.

    Example:
        >>> bound(Costs(0, 1, 0, 0, 1), epochs=10, train=5, val=1)
        10.0
    """
    once = (train + val) * (costs.load + costs.front)
    every = train * costs.rest + val * costs.rest_forward
    return epochs * (once + every) / (once + epochs * every)


def formula(share: float, epochs: int) -> float:
    """The same for training alone with forward : backward = 1 : 2 and loading for nothing.

    Example:
        >>> formula(1.0, 10)
        10.0
    """
    rest = 3 * (1 - share) * epochs
    return (3 - 2 * share) * epochs / (rest + share)


def measured_costs(job: Job) -> tuple[Costs, int, int]:
    """The parts of a job, and how many samples it trains and validates on."""
    if not job.by_fit:
        sound = SoundRun(job.data, trains=int(job.frozen), epochs=1, lr=1e-3)
        groups, frozen = sound.groups(BATCH)
        sizes = len(sound.train[1]), len(sound.val[1])
        return _costs(groups, FreezePlan(frozen=frozenset(frozen)), BATCH, 0.0), *sizes
    given = {"model": job.model, "data": str(job.data), **_settings(job)}
    task = load_task(load_config(None, given))
    task.model.to(job.device)
    example = moved(task.example(job.batch), torch.device(job.device))
    groups = layer_groups(task.model, example, head=task.head)
    groups = measure_costs(task.model, groups, example, repeats=5)
    plan = FreezePlan.freezing(groups, job.frozen)
    picked = range(0, len(task.train), max(1, len(task.train) // job.batch))
    batch: list[Any] = []
    load = seconds(lambda: batch.extend(task.train[i, None] for i in picked)) / len(picked)
    load /= max(1, job.settings.get("workers", 0))  # side by side, at best
    return _costs(groups, plan, job.batch, load), len(task.train), len(task.val)


def _costs(groups: LayerGroups, plan: FreezePlan, batch: int, load: float) -> Costs:
    naive = predicted_step_s(groups, plan)
    rest = predicted_step_s(groups, plan, frozen_prefix_cached=True)
    forward = {g.name: g.cost.forward_s for g in groups if g.cost}
    deep = sum(seconds for name, seconds in forward.items() if name not in plan.frozen)
    return Costs(
        load=load,
        front=(naive - rest) / batch,
        rest=rest / batch,
        rest_forward=deep / batch,
        share=1 - deep / sum(forward.values()),
    )


# -- measuring --------------------------------------------------------------------------------


def measure(job: Job, rounds: int, *, clock: str, threads: int) -> dict[str, Any]:
    """Runs with and without the cache in turn, one pair per seed, and what bounds them."""
    costs, train, val = measured_costs(job)
    runs = []
    for seed in range(min(rounds, job.most)):
        runs += [
            run(job, cache, seed, clock=clock, threads=threads)
            for cache in (MODES if seed % 2 == 0 else reversed(MODES))
        ]
    return {
        "title": job.title,
        "epochs": job.epochs,
        "target": job.target,
        "costs": asdict(costs),
        "train": train,
        "val": val,
        "runs": runs,
    }


def pairs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(uncached, cached) of each seed."""
    by = {(r["seed"], r["cache"]): r for r in runs}
    return [(by[s, "off"], by[s, "on"]) for s in dict.fromkeys(r["seed"] for r in runs)]


def summary(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a job; ratios are medians over pairs."""
    both = pairs(result["runs"])

    def median(ratio: Callable[[Mapping[str, Any], Mapping[str, Any]], float]) -> float:
        return statistics.median(ratio(a, b) for a, b in both)

    costs = Costs(**result["costs"])
    sizes = {"epochs": result["epochs"], "train": result["train"], "val": result["val"]}
    return {
        "whole": median(lambda a, b: a["whole_s"] / b["whole_s"]),
        "training": median(lambda a, b: a["training_s"] / b["training_s"]),
        "later": median(
            lambda a, b: statistics.median(a["epochs_s"][1:]) / statistics.median(b["epochs_s"][1:])
        ),
        # Against the median uncached epoch: the first one also warms caches of the machine.
        "first": median(lambda a, b: b["epochs_s"][0] / a["epochs_s"][0]),
        "bound": bound(costs, **sizes),
        "formula": formula(min(1.0, costs.share), result["epochs"]),
        "accuracy_off": statistics.mean(a["test_accuracy"] for a, _ in both),
        "accuracy_on": statistics.mean(b["test_accuracy"] for _, b in both),
        "loss_gap": max(
            abs(x - y) / abs(x)
            for a, b in both
            for x, y in zip(a["losses"], b["losses"], strict=True)
        ),
    }


def notes(result: Mapping[str, Any], found: Mapping[str, float]) -> str:
    """Targets missed, and figures above their bound."""
    said = []
    if result["target"] and found["training"] < result["target"]:
        said.append(f"MISSES {result['target']:g}")
    if found["first"] > FIRST_EPOCH_LIMIT:
        said.append(f"first epoch MISSES {FIRST_EPOCH_LIMIT}")
    if found["training"] > TOLERANCE * max(found["bound"], found["formula"]):
        said.append("SUSPICIOUS: above the bound")
    if found["loss_gap"] > 1e-3:
        said.append(f"losses differ by up to {found['loss_gap']:.1%}")
    return "; ".join(said)


HEAD = (
    "run",
    "epochs",
    "training and validation, times faster",
    "bound by parts, by share",
    "whole call",
    "epochs after the first",
    "first epoch, cached / uncached",
    "test accuracy uncached, cached",
    "largest difference of an epoch's loss",
    "",
)
ABOUT = (
    "Uncached seconds over cached seconds of pairs of runs with equal seeds, median over pairs; "
    "the cached run starts with an empty store. 'Training and validation' is from the first "
    "update to the last evaluation; 'whole call' also imports, builds, measures groups, tests and "
    "saves the model, which the cache does not change. The bound by parts comes from measured "
    "seconds of loading, of the frozen forward pass and of the rest; by share it is "
    "(3-2f)E / (3(1-f)E + f) with f the frozen share of the forward pass."
)


def table(log: Mapping[str, Any]) -> str:
    """Markdown, from the log alone."""
    rows = []
    for result in log["results"]:
        found = summary(result)
        rows.append(
            [
                result["title"],
                str(result["epochs"]),
                f"{ratio_text(found['training'])} ({len(pairs(result['runs']))} pairs)",
                f"{ratio_text(found['bound'])}, {ratio_text(found['formula'])}",
                ratio_text(found["whole"]),
                ratio_text(found["later"]),
                f"{found['first']:.3f}",
                f"{found['accuracy_off']:.3f}, {found['accuracy_on']:.3f}",
                f"{found['loss_gap']:.0e}",
                notes(result, found),
            ]
        )
    lines = ["# Whole runs with the frozen region cached", "", f"{describe(log)} {ABOUT}", ""]
    lines += rows_of(HEAD, rows)
    lines += cuda_lines(log)
    lines += ["", made_by("frontier_runs", machine_of(log))]
    return "\n".join(lines) + "\n"


def cuda_lines(log: Mapping[str, Any]) -> list[str]:
    """Seconds of an epoch and memory of the device, where one was used."""
    rows = []
    for result in log["results"]:
        both = pairs(result["runs"])
        if not all("cuda_peak_bytes" in run for pair in both for run in pair):
            continue
        later = [
            statistics.median(statistics.median(pair[i]["epochs_s"][1:]) for pair in both)
            for i in range(2)
        ]
        peaks = [max(pair[i]["cuda_peak_bytes"] for pair in both) for i in range(2)]
        texts = [f"{s:.3g}" for s in later] + [size_text(peak) for peak in peaks]
        rows.append([result["title"], *texts, f"{peaks[1] / peaks[0]:.2f}"])
    if not rows:
        return []
    head = (
        "run", "later epochs uncached s", "cached s", "peak on the device uncached", "cached",
        "cached / uncached",
    )  # fmt: skip
    said = "'Peak on the device' is the most that torch had allocated since training began."
    return ["", said, "", *rows_of(head, rows)]


def one(arguments_of_one: Sequence[str]) -> None:
    """A single run in this process, for its peak of memory: prints JSON on the last line.

    Args:
        arguments_of_one: job, "on" or "off", threads, "quick" or "full", and the device.
    """
    name, cache, threads, size, device = arguments_of_one
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as place:
        convert_lite0(Path(place) / "lite0.safetensors")
        job = jobs_of(device, Path(place), quick=size == "quick")[name]
        if device == "cuda":  # two epochs, one that fills and one that reads, reach the peak
            job = replace(job, epochs=2)
        before = _memory_bytes("VmRSS")
        found = run(job, cache, 0, clock="wall", threads=int(threads))
    print(json.dumps(found | {"before_bytes": before}))


def _memory_bytes(what: str) -> int:
    """VmHWM (peak) or VmRSS of this process. Not `getrusage`: its peak is also the parent's."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    found = next((line.split()[1] for line in lines if line.startswith(f"{what}:")), "0")
    return 1024 * int(found)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return
    scratch = Path(tempfile.mkdtemp())
    try:
        convert_lite0(scratch / "lite0.safetensors")
        names = tuple(jobs(scratch, quick=True))
        chosen = arguments(__doc__, rounds=2, quick=1, only=names, devices=("cpu", "cuda"))
        np.seterr(all="raise", under="ignore")
        more = {"clock": chosen.clock, "threads": chosen.threads}
        made = jobs_of(chosen.device, scratch, quick=chosen.quick)
        with keeping_freed():  # as `fit` does, for what is measured around it and for sound
            gather(
                "frontier_runs",
                chosen,
                {n: (lambda j=j: measure(j, chosen.rounds, **more)) for n, j in made.items()},
                table,
            )
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
