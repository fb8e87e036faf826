"""What the record of a run tells of how it learned: its curves on one scale, and measures of them.

Losses are shares of the chance loss, the entropy of the classes in training, so that tasks of
different numbers of classes compare. What a run records as its training loss is no match for its
validation loss: it is a mean over an epoch in which the weights move, with augmentation and
dropout at work. So it is held against the mean of the validation losses before and after that
epoch (`gap`), and else each curve is held against itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from frostline import _io
from frostline.clock import Progress
from frostline.errors import DataError
from frostline.records import RunRecord
from frostline.tasks.config import RunConfig
from frostline.tasks.setup import learning_rate_factor

__all__ = ["MEASURES", "Measure", "RunFacts", "differing_settings", "read_facts"]

#: What is usual for pretrained weights: root mean square over a layer.
_USUAL_WEIGHT = 0.05
#: The largest loss, in chance losses, that means are taken of.
_MOST = 1e3
#: Settings that change nothing about what a run learns.
_IRRELEVANT = frozenset(
    {
        "seed", "output", "workers", "checkpoint_every", "keep_checkpoints", "cache", "cache_dir",
        "cache_limit_gib", "cache_dtype", "device", "threads", "optimizer_state",
    }
)  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """One run as its record tells it.

    Attributes:
        path: its folder.
        config: its settings, resolved.
        header: of its record.
        summary: of its record; empty if it is not finished.
        train: training loss per epoch, as a share of the chance loss.
        val: validation loss per epoch, as a share of the chance loss.
        accuracy: validation accuracy per epoch, in [0, 1].
        seconds: of training, at the end of each epoch.
        steps: updates at the end of each epoch.
        frozen: groups that were frozen at the end.
        share: parameters of the backbone that trained, mean over updates, in [0, 1].
        failure: why the run failed, or "".
    """

    path: Path
    config: RunConfig
    header: Mapping[str, Any]
    summary: Mapping[str, Any]
    train: tuple[float, ...]
    val: tuple[float, ...]
    accuracy: tuple[float, ...]
    seconds: tuple[float, ...]
    steps: tuple[int, ...]
    frozen: frozenset[str]
    share: float
    failure: str

    @property
    def epochs(self) -> int:
        """Epochs evaluated."""
        return len(self.val)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.header["labels"])

    @property
    def train_samples(self) -> int:
        """Training samples."""
        return int(self.header["data"]["train"]["samples"])

    @property
    def val_samples(self) -> int:
        """Validation samples."""
        return int(self.header["data"]["val"]["samples"])

    @property
    def commonest(self) -> float:
        """Share of the commonest class in training, (0, 1]."""
        counts = list(self.header["notes"]["classes"].values())
        return max(counts) / sum(counts)

    @property
    def backbone(self) -> tuple[str, ...]:
        """Layer groups that are not of the head, in execution order."""
        head = set(self.header["head"])
        return tuple(name for name in self.header["groups"] if name not in head)

    @property
    def frozen_prefix(self) -> int:
        """Groups of the backbone, from the input on, that were frozen at the end."""
        trains = (i for i, name in enumerate(self.backbone) if name not in self.frozen)
        return next(trains, len(self.backbone))

    @property
    def best(self) -> int:
        """The best epoch, from 0: by accuracy, then by loss."""
        return max(range(self.epochs), key=lambda e: (self.accuracy[e], -self.val[e]))

    @property
    def last(self) -> slice:
        """The last fifth of the epochs, one at least."""
        return slice(-max(1, self.epochs // 5), None)

    @property
    def planned_steps(self) -> int:
        """Updates of the whole run, as far as they were known beforehand."""
        steps, budget = self.config.epochs * self.steps[0], self.config.budget
        if budget is not None and budget.endswith("st"):
            steps = min(steps, int(float(budget.removesuffix("st"))))
        elif budget is not None and self.summary.get("budget_spent"):
            steps = self.steps[-1]
        return max(steps, self.steps[-1])

    @cached_property
    def factors(self) -> tuple[float, ...]:
        """Mean factor of the schedule on the learning rates, per epoch."""
        factor = learning_rate_factor(self.config, Progress(total_steps=self.planned_steps))
        spans = zip((0, *self.steps), self.steps, strict=False)
        return tuple(
            statistics.fmean(map(factor, range(start, end))) if end > start else 0.0
            for start, end in spans
        )

    @cached_property
    def travelled(self) -> tuple[float, ...]:
        """Updates at each epoch's end, each weighed by its factor on the learning rates."""
        sizes = np.diff([0, *self.steps])
        return tuple(np.cumsum(np.array(self.factors) * sizes).tolist())

    @property
    def fast(self) -> tuple[int, ...]:
        """Epochs with at least half the peak learning rate, without the first one."""
        return tuple(e for e in range(1, self.epochs) if self.factors[e] >= 0.5)


def read_facts(record: RunRecord) -> RunFacts:
    """A run's record on the scale that runs are compared on.

    Args:
        record: of a run, finished or not. Why it failed is read from what a study noted beside it.

    Raises:
        DataError: it has no finished epoch, and no reason for that; settings of another version; or
            it was recorded in a loop of the user's.
    """
    if loop := record.header.get("loop"):
        raise DataError(
            f"diagnose {record.path}",
            found=f"a run recorded in {loop}, whose data and rates are not known",
            fix="a run of frostline fit; frostline show and report read this one",
        )
    failure = record.path.with_name(f"{record.path.name}.failed.json")
    why = str(_io.load_json(failure)["why"]) if failure.is_file() else ""
    if not record.epochs and not why:
        raise DataError(
            f"diagnose {record.path}",
            found="a run without a finished epoch",
            fix="go on with it: call fit with the same settings and output",
        )
    chance = _chance_loss(record.header)
    train, val, accuracy = (
        tuple(float(line["metrics"][name]) for line in record.epochs)
        for name in ("train_loss", "val_loss", "val_accuracy")
    )
    return RunFacts(
        path=record.path,
        config=_settings(record),
        header=record.header,
        summary=record.summary,
        train=tuple(_capped(loss / chance) for loss in train),
        val=tuple(_capped(loss / chance) for loss in val),
        accuracy=accuracy,
        seconds=tuple(float(line["costs"].get("training_s", 0.0)) for line in record.epochs),
        steps=tuple(int(line["step"]) for line in record.epochs),
        frozen=record.decisions[-1].plan.frozen if record.decisions else frozenset(),
        share=_trained_share(record),
        failure=why,
    )


def differing_settings(one: RunFacts, other: RunFacts) -> frozenset[str]:
    """Names of the settings that differ and bear on what a run learns; the seed does not count."""
    mine, theirs = one.header["config"], other.header["config"]
    names = (mine.keys() | theirs.keys()) - _IRRELEVANT
    return frozenset(name for name in names if mine.get(name) != theirs.get(name))


def _settings(record: RunRecord) -> RunConfig:
    """Settings as far as this version knows them; of another's, `differing_settings` tells."""
    given = record.header["config"]
    try:
        return RunConfig(**{k: v for k, v in given.items() if k in RunConfig.model_fields})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise DataError(
            f"read the settings of {record.path}",
            found=f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}",
            fix="use the version that wrote the record",
        ) from None


def _chance_loss(header: Mapping[str, Any]) -> float:
    """Cross-entropy of always answering the class frequencies, nats."""
    if header["config"]["class_weights"] == "balanced":
        return math.log(len(header["labels"]))
    counts = np.array(list(header["notes"]["classes"].values()), dtype=np.float64)
    shares = counts[counts > 0] / counts.sum()
    return max(1e-3, float(-(shares * np.log(shares)).sum()))


def _capped(loss: float) -> float:
    return _MOST if math.isnan(loss) else min(loss, _MOST)


def _trained_share(record: RunRecord) -> float:
    """Share of the backbone's parameters that trained, mean over updates."""
    groups: Mapping[str, int] = record.header["groups"]
    head = sum(size for name, size in groups.items() if name in record.header["head"])
    body = sum(groups.values()) - head
    if not body:
        return 0.0
    if (share := record.summary.get("trained_parameter_share")) is not None:
        return min(1.0, max(0.0, (float(share) * (body + head) - head) / body))
    end = record.epochs[-1]["step"] if record.epochs else 1
    steps = [*(min(d.step, end) for d in record.decisions), end]
    frozen = sum(
        (until - since) * sum(size for name, size in groups.items() if name in d.plan.frozen)
        for d, since, until in zip(record.decisions, steps, steps[1:], strict=False)
    )
    return min(1.0, max(0.0, 1 - frozen / max(1, end) / body))


# -- measures: None where a run has too few epochs, or the setting has no meaning ------------------


def _left(f: RunFacts) -> float | None:
    return min(statistics.fmean(f.train[f.last]), *f.val) if f.epochs else None


def _gap(f: RunFacts) -> float | None:
    # Balanced weights are in the training loss, not in the validation loss.
    if f.epochs < 3 or f.config.class_weights != "none":
        return None
    gaps = [(a + b) / 2 - t for a, b, t in zip(f.val, f.val[1:], f.train[1:], strict=False)]
    return statistics.fmean(gaps[f.last])


def _rise(f: RunFacts) -> float | None:
    return statistics.fmean(f.val[f.last]) - min(f.val) if f.epochs >= 3 else None


def _drop(f: RunFacts) -> float | None:
    return max(f.accuracy) - statistics.fmean(f.accuracy[f.last]) if f.epochs >= 3 else None


def _moved(f: RunFacts) -> float | None:
    return f.train[0] - statistics.fmean(f.train[f.last]) if f.epochs >= 3 else None


def _settling(f: RunFacts) -> float | None:
    # Updates are weighed by the schedule: where the rate falls to 0, any curve ends flat.
    if f.epochs < 5 or f.travelled[-1] <= 0:
        return None
    ends = np.array(f.travelled)
    middle = (ends - np.diff([0.0, *ends]) / 2) / ends[-1]
    cut = int(np.argmin(np.abs(middle - 0.6)))
    if not 0 < cut < f.epochs - 1:
        return None
    early = (f.train[0] - f.train[cut]) / (middle[cut] - middle[0])
    late = (f.train[cut] - statistics.fmean(f.train[f.last])) / (middle[-1] - middle[cut])
    if early + late < 0.05:  # nothing moved, and noise over noise says nothing
        return None
    return float(np.clip(late / max(early, 0.02), -1.0, 2.0))


def _late(f: RunFacts) -> float | None:
    if f.epochs < 2:
        return None
    size = max(1, f.epochs // 4)
    return statistics.fmean(f.val[-2 * size : -size]) - statistics.fmean(f.val[-size:])


def _early(f: RunFacts) -> float | None:
    if f.epochs < 5 or f.travelled[-1] <= 0 or max(f.accuracy) - f.commonest < 0.05:
        return None
    soon = next(e for e in range(f.epochs) if f.travelled[e] >= 0.2 * f.travelled[-1])
    return (f.accuracy[soon] - f.commonest) / (max(f.accuracy) - f.commonest)


def _best_at(f: RunFacts) -> float | None:
    return (f.best + 1) / f.epochs if f.epochs >= 3 else None


def _lowest_at(f: RunFacts) -> float | None:
    return (f.val.index(min(f.val)) + 1) / f.epochs if f.epochs >= 3 else None


def _time_after_best(f: RunFacts) -> float | None:
    if f.epochs < 3 or f.seconds[-1] <= 0:
        return None
    return 1 - f.seconds[f.best] / f.seconds[-1]


def _high(f: RunFacts) -> float | None:
    return statistics.median(f.val[e] for e in f.fast) if f.fast else None


def _recovered(f: RunFacts) -> float | None:
    high = _high(f)
    if high is None or high < 1e-6 or f.factors[-1] > 0.3:  # a share of nothing says nothing
        return None
    return 1 - statistics.fmean(f.val[f.last]) / high


def _fast_train(f: RunFacts) -> float | None:
    return f.train[f.fast[-1]] if f.fast else None


def _jitter(f: RunFacts) -> float | None:
    steps = [abs(f.val[e] - f.val[e - 1]) for e in f.fast]
    return statistics.fmean(steps) if len(steps) >= 2 else None


# Kingma and Ba 2015, "Adam", arXiv:1412.6980, section 2.1: a step is about the rate at most.
def _head_reach(f: RunFacts) -> float | None:
    if f.config.optimizer == "sgd" or not f.epochs or f.config.head_lr is None:
        return None
    return f.config.head_lr * f.travelled[-1] / _first_head_weight(f)


def _backbone_reach(f: RunFacts) -> float | None:
    if f.config.optimizer == "sgd" or not f.epochs or f.config.lr is None or f.share < 0.02:
        return None
    return f.config.lr * f.travelled[-1] / _USUAL_WEIGHT


def _first_head_weight(f: RunFacts) -> float:
    """Standard deviation of a linear layer's first weights: uniform within 1 / sqrt(inputs)."""
    size = sum(f.header["groups"][name] for name in f.header["head"])
    return 1 / math.sqrt(3 * max(1.0, size / f.classes))


def _stride(f: RunFacts) -> float | None:
    if f.config.optimizer == "sgd" or f.config.lr is None or f.config.head_lr is None:
        return None
    if f.share < 0.02:
        return f.config.head_lr / _first_head_weight(f)
    return f.config.lr / _USUAL_WEIGHT


def _updates(f: RunFacts) -> float | None:
    return float(f.steps[-1]) if f.epochs else None


def _wrong(f: RunFacts) -> float | None:
    return 1 - f.accuracy[f.best] if f.epochs else None


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that is read off a run.

    Attributes:
        source: "curves" or "settings".
        of: the number; None where the run does not have it.
        says: what it means, with {} in its place.
    """

    source: Literal["curves", "settings"]
    of: Callable[[RunFacts], float | None]
    says: str

    def told(self, value: float) -> str:
        """The number in words.

        Example:
            >>> MEASURES["rise"].told(0.123)
            'the validation loss ended 12.3 % of the chance loss above its lowest'
        """
        return self.says.format(value).replace("%", " %")

    def mean(self, runs: Sequence[RunFacts]) -> float | None:
        """Mean over the runs that have it; None without any."""
        values = [value for run in runs if (value := self.of(run)) is not None]
        return statistics.fmean(values) if values else None


#: By name. Losses are shares of the chance loss.
MEASURES: Mapping[str, Measure] = {
    "loss_left": Measure("curves", _left, "{:.1%} of the chance loss is left at the end"),
    "gap": Measure(
        "curves",
        _gap,
        "the validation loss around the last epochs is {:.1%} of the chance loss above their "
        "training loss",
    ),
    "rise": Measure(
        "curves", _rise, "the validation loss ended {:.1%} of the chance loss above its lowest"
    ),
    "drop": Measure("curves", _drop, "accuracy ended {:.1%} of all samples below its best"),
    "moved": Measure(
        "curves", _moved, "the training loss fell by {:.1%} of the chance loss in all"
    ),
    "settling": Measure(
        "curves",
        _settling,
        "per learning rate the training loss ended falling at {:.0%} of its first pace",
    ),
    "late": Measure(
        "curves", _late, "in the last quarter the validation loss fell by {:.1%} of the chance loss"
    ),
    "early": Measure(
        "curves",
        _early,
        "{:.0%} of its gain over the commonest class came in the first fifth of the training",
    ),
    "best_at": Measure("curves", _best_at, "the best epoch came after {:.0%} of them"),
    "lowest_at": Measure(
        "curves", _lowest_at, "the validation loss was lowest after {:.0%} of the epochs"
    ),
    "time_after_best": Measure(
        "curves", _time_after_best, "{:.0%} of the training time came after the best epoch"
    ),
    "high_rate_loss": Measure(
        "curves", _high, "while the rate was high the validation loss was {:.0%} of the chance loss"
    ),
    "recovered": Measure("curves", _recovered, "{:.0%} of that went as the rate fell"),
    "high_rate_train_loss": Measure(
        "curves", _fast_train, "by its end the training loss was {:.0%} of the chance loss"
    ),
    "jitter": Measure(
        "curves",
        _jitter,
        "while the rate was high the validation loss changed by {:.1%} of the chance loss from "
        "epoch to epoch",
    ),
    "accuracy_error": Measure("curves", _wrong, "{:.1%} of the validation samples are wrong"),
    "frozen_share": Measure(
        "settings", lambda f: 1 - f.share, "{:.0%} of the backbone's parameters were frozen"
    ),
    "samples_per_class": Measure(
        "settings", lambda f: f.train_samples / f.classes, "{:.0f} training samples of each class"
    ),
    "updates": Measure("settings", _updates, "it made {:.0f} updates"),
    "head_reach": Measure(
        "settings",
        _head_reach,
        "no weight of the head can have moved by more than about {:.2g} of its first spread",
    ),
    "backbone_reach": Measure(
        "settings",
        _backbone_reach,
        "no weight of the backbone can have moved by more than about {:.2g} of its usual size",
    ),
    "stride": Measure(
        "settings", _stride, "an update at the peak rate changes a weight by {:.2g} of its size"
    ),
}
