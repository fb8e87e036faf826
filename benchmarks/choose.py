"""Do scores of frozen features foretell which pretrained model fine-tunes best?

On a part of each data set every candidate is scored by `frostline choose`, and then fine-tuned by
`frostline.fit`: in full for a few epochs, and by linear probing for many. How a score agrees with
the accuracy on validation samples is told by Kendall's tau over the candidates of a data set: the
share of pairs in the same order, minus the share of pairs in the other.

    python benchmarks/choose.py [--only DATA ...] [--seeds 1] [--threads 1]   # resumable
    python benchmarks/choose.py --quick [--only DATA ...]      # minutes, into a temporary folder
    python benchmarks/choose.py --report                       # the tables from the log

Each finished scoring and each finished fine-tuning is one line of `results/choose.jsonl`. Needs
`data` and `models` of the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from bench import RESULTS, processor
from frontier_models import SHARED, caffe_picture, convert_lite0, minilm_path
from frontier_models import squeezenet as pretrained_squeezenet
from PIL import Image
from scipy.stats import kendalltau
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import frostline
from frostline.study.choose import choose as choose_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from models_for_tests import CifarResNet

LOG = RESULTS / "choose.jsonl"
SIDE = 96
POLICIES = ("full", "linear-probe")
#: Factors on all learning rates, of which each candidate's better one counts: networks without
#: normalisation learn nothing at the rates that suit the others.
RATES = (1.0, 0.1)
HEAD_RATE = 1e-2
TITLES: Mapping[str, str] = {
    "probe": "cross-validated probe",
    "logme": "LogME",
    "h_score": "H-score",
    "shrunk_h_score": "H-score, shrunk",
    "gbc": "GBC",
    "leep": "LEEP",
    "nce": "NCE",
    "parameters": "number of parameters",
}
_INTRODUCTION = (
    "Kendall's tau of a score with validation accuracy after fine-tuning, mean over data sets "
    "(1: every pair in the same order, 0: as many as not), the pairs it rests on, and the points "
    "of accuracy lost by taking the first of the ranking. Of two learning rates the better one "
    "counts. LEEP and NCE exist only for weights with a linear classifier."
)
Row = Mapping[str, Any]


# -- data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """A data set, and how much of it is used.

    Attributes:
        kind: "image" or "text".
        train: samples to learn from: few, so that a run takes less than a minute.
        val: samples to measure on: as many as there are, up to this.
        lr: of the backbone in full fine-tuning, before `RATES`.
    """

    kind: str
    train: int
    val: int = 400
    lr: float = 1e-3


DATA: Mapping[str, DataSet] = {
    "flowers5": DataSet("image", 300),
    "caltech20_32": DataSet("image", 400),
    "digits": DataSet("image", 300),
    "trec6": DataSet("text", 300, lr=1e-4),
    "sst2": DataSet("text", 300, lr=1e-4),
    "banking77": DataSet("text", 385, lr=1e-4),
}
Pairs = list[tuple[Any, str]]


def prepared(name: str, folder: Path, *, quick: bool) -> Path:
    """A part of a data set as `frostline fit` reads it; test samples are a token.

    What is not trained on goes to validation: accuracies of a hundred samples say little.
    """
    target = folder / name
    if target.exists():
        return target
    about = DATA[name]
    pairs, spare = _read(name)
    wanted = min(about.train, 8 * len({label for _, label in pairs})) if quick else about.train
    train, rest = _split(pairs, wanted)
    spare = [*spare, *rest]
    held = min(100 if quick else about.val, len(spare) - len({label for _, label in spare}))
    val, rest = _split(spare, held)
    splits = {"train": train, "val": val, "test": _token(rest)}
    for split, some in splits.items():
        _write(target, split, some, about.kind)
    return target


def _read(name: str) -> tuple[Pairs, Pairs]:
    """Training samples, and further ones to validate on; the shared test splits stay unread."""
    if name == "digits":
        data: Any = load_digits()
        pixels = (data.images * (255 / 16)).astype(np.uint8)
        return list(zip(pixels, map(str, data.target), strict=True)), []
    folder = SHARED / "data" / name
    return _samples(folder, "train"), _samples(folder, "val")


def _samples(folder: Path, split: str) -> Pairs:
    table = folder / f"{split}.csv"
    if table.exists():
        with table.open(encoding="utf-8", newline="") as file:
            return [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return [(path, path.parent.name) for path in sorted((folder / split).glob("*/*"))]


def _split(pairs: Pairs, count: int) -> tuple[Pairs, Pairs]:
    """The first `count` samples of a stratified draw, and the others."""
    labels = [label for _, label in pairs]
    cut: Any = train_test_split(pairs, train_size=count, stratify=labels, random_state=0)
    some, rest = cut
    return some, rest


def _token(pairs: Pairs) -> Pairs:
    """One sample of each class: `fit` tests once, and nobody looks at it here."""
    return list({label: (sample, label) for sample, label in pairs}.values())


def _write(target: Path, split: str, pairs: Pairs, kind: str) -> None:
    if kind == "text":
        target.mkdir(parents=True, exist_ok=True)
        with (target / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *pairs])
        return
    for number, (picture, label) in enumerate(pairs):
        folder = target / split / label
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Path):
            (folder / f"{number}{picture.suffix}").symlink_to(picture)
        else:
            Image.fromarray(picture).save(folder / f"{number}.png")


# -- candidates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A candidate: its name, and its settings for `fit`."""

    name: str
    settings: Mapping[str, Any]

    @property
    def pretrained(self) -> bool:
        """Whether its weights are not random."""
        return not self.name.endswith("-random")


def subjects(kind: str, scratch: Path) -> tuple[Subject, ...]:
    """Every candidate that fits the data, each with its own and with random weights."""
    return tuple(_texts() if kind == "text" else _pictures(scratch))


def _pictures(scratch: Path) -> Iterator[Subject]:
    colours = {"image_mean": (127 / 255,) * 3, "image_std": (128 / 255,) * 3}
    lite0 = {"model": "timm:tf_efficientnet_lite0", "image_size": 64, **colours}
    yield Subject("lite0", {**lite0, "weights": convert_lite0(scratch / "lite0.safetensors")})
    yield Subject("lite0-random", {**lite0, "weights": "random"})
    yield Subject("squeezenet", {"model": "choose:squeezenet"})
    yield Subject("squeezenet-random", {"model": "choose:squeezenet_random"})
    for depth in (20, 32, 56):
        own = {"model": f"choose:resnet{depth}", "image_size": 32}
        weights = SHARED / f"models/resnet_cifar10/resnet{depth}.safetensors"
        yield Subject(f"resnet{depth}", {**own, "weights": weights})
        yield Subject(f"resnet{depth}-random", {**own, "weights": "random"})


def _texts() -> Iterator[Subject]:
    for pooling in ("mean", "model"):
        own = {"model": f"hf:{minilm_path()}", "max_length": 32, "pooling": pooling}
        yield Subject(f"minilm-{pooling}", {**own, "weights": "pretrained"})
        yield Subject(f"minilm-{pooling}-random", {**own, "weights": "random"})


def squeezenet(num_classes: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """SqueezeNet 1.0 pretrained on ImageNet, for smaller pictures."""
    return pretrained_squeezenet(num_classes)[0], partial(caffe_picture, side=SIDE)


def squeezenet_random(num_classes: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """The same with random weights."""
    import torchvision  # noqa: PLC0415  seconds

    model = torchvision.models.squeezenet1_0(num_classes=num_classes)
    return model, partial(caffe_picture, side=SIDE)


def resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 of CIFAR-10."""
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int) -> nn.Module:
    """ResNet-32 of CIFAR-10."""
    return CifarResNet(5, num_classes)


def resnet56(num_classes: int) -> nn.Module:
    """ResNet-56 of CIFAR-10."""
    return CifarResNet(9, num_classes)


# -- measuring --------------------------------------------------------------------------------


def read_log(path: Path) -> list[Row]:
    """Finished work; a line that was cut off counts as not done, and is cut away."""
    text = path.read_text("utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, "utf-8")
    return [json.loads(line) for line in text.splitlines()]


def append(path: Path, row: Row) -> None:
    """One line more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def key(row: Row) -> tuple[Any, ...]:
    """What a line is of: equal for equal work."""
    return tuple(row.get(name) for name in ("kind", "data", "candidate", "policy", "seed", "rate"))


def measure(chosen: argparse.Namespace, log: Path, scratch: Path) -> None:
    """Do what is missing in the log."""
    done = {key(row) for row in read_log(log)}
    machine = {
        "processor": processor(),
        "torch": torch.__version__,
        "threads": chosen.threads,
    }
    for name in chosen.only or DATA:
        folder = prepared(name, scratch / "data", quick=chosen.quick)
        listed = subjects(DATA[name].kind, scratch)
        for subject in listed:
            row = {"kind": "scores", "data": name, "candidate": subject.name, "seed": 0}
            if key(row) not in done:
                say(f"{name}: {subject.name}: scores")
                append(log, {**row, **scored(folder, subject, chosen.threads), **machine})
        for seed, rate, policy in itertools.product(range(chosen.seeds), RATES, POLICIES):
            for subject in listed:
                row = {"kind": "run", "data": name, "candidate": subject.name}
                row |= {"policy": policy, "seed": seed, "rate": rate}
                if key(row) not in done:
                    say(f"{name}: {subject.name}: {policy}, seed {seed}, rates times {rate:g}")
                    append(log, {**row, **tuned(folder, name, subject, row, chosen), **machine})


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def scored(folder: Path, subject: Subject, threads: int) -> dict[str, Any]:
    """The scores of one candidate, from all training samples of the part."""
    choice = choose_model(folder, [subject.settings], costs=False, threads=threads)
    best = choice.best
    return {
        "pretrained": subject.pretrained,
        "scores": {**best.scores, "parameters": best.parameters},
        "samples": choice.samples,
        "spent_s": best.spent_s,
    }


def tuned(
    folder: Path, name: str, subject: Subject, row: Row, chosen: argparse.Namespace
) -> dict[str, Any]:
    """Validation accuracy of the best epoch of one fine-tuning."""
    epochs = {"full": 4, "linear-probe": 40}[row["policy"]]
    with tempfile.TemporaryDirectory() as place:
        run = frostline.fit(
            data=folder,
            policy=row["policy"],
            seed=row["seed"],
            epochs=min(epochs, 2) if chosen.quick else epochs,
            batch_size=16,
            lr=row["rate"] * DATA[name].lr,
            head_lr=row["rate"] * HEAD_RATE,
            augment="none",
            patience=None,
            checkpoint_every=None,
            threads=chosen.threads,
            cache_dir=Path(place) / "cache",
            output=Path(place) / "run",
            **subject.settings,
        )
        summary = run.summary
    assert summary["certificate_ok"], "frozen weights moved"
    return {
        "pretrained": subject.pretrained,
        "val_accuracy": summary["val_accuracy"],
        "epochs": summary["epochs_run"],
        "wall_s": summary["wall_s"],
    }


# -- reporting --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How a score agrees with accuracies on one data set.

    Attributes:
        tau: Kendall's, in [-1, 1]; None where all are equal or there are fewer than two.
        pairs: pairs of candidates that both have the score.
        lost: accuracy lost by taking the candidate with the highest score, in [0, 1].
    """

    tau: float | None
    pairs: int
    lost: float


def agreement(scores: Sequence[float], accuracies: Sequence[float]) -> Agreement:
    """Kendall's tau-b of scores and accuracies, and what the first of the ranking loses.

    Example:
        >>> agreement([1.0, 3.0, 2.0], [0.5, 0.9, 0.7])
        Agreement(tau=1.0, pairs=3, lost=0.0)
    """
    count = len(scores)
    pairs = count * (count - 1) // 2
    best = max(range(count), key=lambda i: scores[i])
    lost = max(accuracies) - accuracies[best]
    if count < 2 or len(set(scores)) == 1 or len(set(accuracies)) == 1:
        return Agreement(None, pairs, lost)
    result: Any = kendalltau(scores, accuracies)
    return Agreement(float(result.statistic), pairs, lost)


def tables(rows: Sequence[Row]) -> tuple[dict[str, dict[str, Row]], dict[Any, dict[str, float]]]:
    """Lines of scores by data set and candidate; accuracies by (data set, policy) and candidate.

    Of two learning rates the better one counts, then seeds are averaged.
    """
    scores: dict[str, dict[str, Row]] = {}
    runs: dict[Any, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["kind"] == "scores":
            scores.setdefault(row["data"], {})[row["candidate"]] = row
            continue
        of = runs.setdefault((row["data"], row["policy"]), {}).setdefault(row["candidate"], {})
        of[row["seed"]] = max(row["val_accuracy"], of.get(row["seed"], 0.0))
    return scores, {k: {c: mean(a.values()) for c, a in of.items()} for k, of in runs.items()}


def agreements(
    rows: Sequence[Row], score: str, policy: str, *, pretrained: bool, kind: str
) -> list[Agreement]:
    """One entry per data set of a kind on which at least two candidates have the score.

    Args:
        rows: the log.
        score: its name.
        policy: how was fine-tuned.
        pretrained: leave out random weights.
        kind: "image" or "text".
    """
    scores, runs = tables(rows)
    found = []
    for name in (n for n in scores if DATA[n].kind == kind):
        accuracies = runs.get((name, policy), {})
        both = [
            (row["scores"][score], accuracies[candidate])
            for candidate, row in scores[name].items()
            if candidate in accuracies
            and row["scores"][score] is not None
            and (row["pretrained"] or not pretrained)
        ]
        if len(both) > 1:
            found.append(agreement(*zip(*both, strict=True)))
    return found


def report(rows: Sequence[Row]) -> str:
    """The tables, as Markdown."""
    parts = [
        "# Do scores of frozen features foretell which model fine-tunes best?",
        "",
        _INTRODUCTION,
        "",
    ]
    for kind in ("image", "text"):
        if any(DATA[row["data"]].kind == kind for row in rows):
            parts += [f"## {kind.capitalize()}s", "", *_ranking(rows, kind), ""]
    parts += ["## Accuracies and scores", "", *_details(rows), "", _about(rows), ""]
    return "\n".join(parts)


def _ranking(rows: Sequence[Row], kind: str) -> Iterator[str]:
    cases = [(policy, pretrained) for pretrained in (False, True) for policy in POLICIES]
    titles = [f"{p}{', pretrained only' if only else ', all'}" for p, only in cases]
    yield "| score | " + " | ".join(titles) + " |"
    yield "|---|" + "---|" * len(cases)
    for score, title in TITLES.items():
        cells = [
            _cell(agreements(rows, score, policy, pretrained=only, kind=kind))
            for policy, only in cases
        ]
        yield f"| {title} | " + " | ".join(cells) + " |"


def _cell(found: Sequence[Agreement]) -> str:
    taus = [a.tau for a in found if a.tau is not None]
    if not taus:
        return "-"
    pairs = sum(a.pairs for a in found)
    return f"{mean(taus):+.2f} ({pairs} pairs; loses {100 * mean(a.lost for a in found):.1f})"


def _details(rows: Sequence[Row]) -> Iterator[str]:
    scores, runs = tables(rows)
    names = [name for name in TITLES if name != "parameters"]
    shown = " | ".join(TITLES[name] for name in names)
    yield f"| data | candidate | full | linear-probe | {shown} |"
    yield "|---|---|---|---|" + "---|" * len(names)
    for data, candidates in scores.items():
        for candidate, row in candidates.items():
            found = [runs.get((data, policy), {}).get(candidate) for policy in POLICIES]
            cells = ["-" if a is None else f"{100 * a:.1f} %" for a in found]
            values = [row["scores"][name] for name in names]
            cells += ["-" if v is None else f"{v:.3f}" for v in values]
            yield f"| {data} | {candidate} | " + " | ".join(cells) + " |"


def _about(rows: Sequence[Row]) -> str:
    runs = [row for row in rows if row["kind"] == "run"]
    machines = sorted(
        {f"{r['processor']}, torch {r['torch']}, {r['threads']} threads" for r in rows}
    )
    seeds = len({row["seed"] for row in runs})
    wall = sum(row["wall_s"] for row in runs)
    return (
        f"{len(runs)} fine-tunings, {seeds} seed(s), {wall / 60:.0f} minutes in all; "
        f"{'; '.join(machines)}. Made by `python benchmarks/choose.py --report`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(DATA), metavar="DATA")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--log", type=Path, help="another log than results/choose.jsonl")
    chosen = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quick = Path(tempfile.gettempdir()) / "frostline-choose-quick"
    log = chosen.log or (quick / "choose.jsonl" if chosen.quick else LOG)
    if not chosen.report:
        with tempfile.TemporaryDirectory(prefix="frostline-choose-") as scratch:
            measure(chosen, log, Path(scratch))
    text = report(read_log(log))
    log.with_suffix(".md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
