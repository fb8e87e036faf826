"""A look at the data before training: probes of every layer group, and the head solved.

Both come from one pass of the training samples through the pretrained network (and one of the
validation samples for the probes). The seconds it takes are charged to the run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from frostline.cost import predicted_forward_s
from frostline.errors import DataError, ModelError, TrainingError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Policy
from frostline.tasks.config import RunConfig
from frostline.tasks.features import Features, collect_features
from frostline.tasks.imports import need
from frostline.tasks.task import Split, Task

if TYPE_CHECKING:
    from frostline.tasks.probes import ProbeCurve

__all__ = ["FirstLook", "first_look", "foretold", "measured_signals", "samples_within", "wanted"]

_PROBES = ("probe_accuracy", "probe_behind")
#: Most training samples that are looked at; with more, probes and heads hardly change any more.
_MOST_SAMPLES = 5000
#: Samples of each class that are looked at however short the time is.
_LEAST_PER_CLASS = 4
#: Standard errors of accuracy given up for a head less sure of itself. With one, the penalty
#: was too weak in one of four cases: trec6 lost four points with that seed.
_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class FirstLook:
    """What was found before training.

    Attributes:
        curve: the probes, or None where none were wanted or possible.
        head: what became of the head: "solved", or why it starts from random weights.
        notes: what could not be done, and why.
        seconds_s: wall time of all of it.
    """

    curve: ProbeCurve | None
    head: str
    notes: tuple[str, ...]
    seconds_s: float


def wanted(config: RunConfig, policy: Policy) -> tuple[bool, bool]:
    """Whether probes are wanted, and whether the head is to be solved.

    Example:
        >>> from frostline.registry import make_policy
        >>> wanted(RunConfig(model="m", data="d", head_start="solved"), make_policy("full"))
        (False, True)
    """
    probes = any(need.signal in _PROBES for need in policy.needs())
    return probes, (probes if config.head_start is None else config.head_start == "solved")


def foretold(policy: Policy) -> tuple[bool, bool]:
    """Whether a policy keeps to a time, and whether to a memory.

    Example:
        >>> from frostline.registry import make_policy
        >>> foretold(make_policy("auto:run_s=60")), foretold(make_policy("auto"))
        ((True, False), (False, False))
    """
    needs = {need.signal for need in policy.needs()}
    return "epoch_from_s" in needs, "peak_from_bytes" in needs


def first_look(
    task: Task,
    model: nn.Module,
    groups: LayerGroups,
    device: torch.device,
    *,
    probes: bool,
    solve: bool,
    most_samples: int | None = None,
) -> FirstLook:
    """Probe every layer group and put a solved head into the model, as far as either is wanted.

    Nothing of the model but weight and bias of its head changes.

    Args:
        task: whose training (and validation) samples are looked at.
        model: on `device`.
        groups: its layer groups.
        device: where the model is.
        probes: whether every layer group is probed.
        solve: whether the head is solved.
        most_samples: of training and validation together, where time is short; a few of each class
            are looked at in any case. None: no bound but our own.

    Raises:
        MissingExtra: no scikit-learn.
    """
    start = time.perf_counter()
    need("sklearn", extra="study")
    notes: list[str] = []
    curve, head = None, "random, as asked"
    share = 1.0 if most_samples is None else most_samples / (len(task.train) + len(task.val))
    least = _LEAST_PER_CLASS * len(task.labels)

    def limit(split: Split) -> int:
        return min(_MOST_SAMPLES, max(least, int(share * len(split))))

    if least < len(task.train) > limit(task.train) < _MOST_SAMPLES:
        seen = f"{limit(task.train):,} of {len(task.train):,} training samples"
        notes.append(f"a look at {seen}: the time budget has no room for more")
    try:
        train = collect_features(
            task, model, task.train, groups, device=device, limit=limit(task.train)
        )
    except (DataError, ModelError) as error:
        notes.append(f"no look at the data: {error.found}")
        return FirstLook(None, "random: no features", tuple(notes), time.perf_counter() - start)
    notes += train.notes
    if probes:
        from frostline.tasks.probes import probe_curve  # noqa: PLC0415 - scikit-learn is optional

        try:
            val = collect_features(
                task, model, task.val, groups, device=device, limit=limit(task.val)
            )
            curve = probe_curve(train, val, seed=task.config.seed)
        except (DataError, ModelError) as error:
            notes.append(f"no probes: {error.found}")
    if solve:
        head = _solve(train, model, len(task.labels), task.config.seed)
    return FirstLook(curve, head, tuple(notes), time.perf_counter() - start)


def _solve(train: Features, model: nn.Module, classes: int, seed: int) -> str:
    from frostline.tasks.probes import solved_head  # noqa: PLC0415 - scikit-learn is optional

    try:
        # What follows is fine-tuning: a head that leaves it something to do.
        found = solved_head(train, classes=classes, seed=seed, errors=_ERRORS)
    except (DataError, TrainingError) as error:
        return f"random: {error.found}"
    if found is None:
        return "random: it is no single linear layer"
    tensors = dict(model.get_submodule(train.head_layer or "").named_parameters())
    for name, values in zip(("weight", "bias"), found, strict=True):
        if name not in tensors or tensors[name].shape != values.shape:
            return f"random: its linear layer has no {name} for {classes} classes"
    with torch.no_grad():
        for name, values in zip(("weight", "bias"), found, strict=True):
            tensors[name].copy_(torch.from_numpy(values))
    return "solved"


def samples_within(groups: LayerGroups, seconds: float, *, measured_samples: int) -> int:
    """How many samples a forward pass takes so many seconds for, from measured costs.

    Args:
        groups: with measured costs.
        seconds: of the forward pass alone; samples are prepared besides.
        measured_samples: how many samples the costs were measured on.

    Example:
        >>> from frostline.testing import example_groups
        >>> groups = example_groups(4)  # 10 ms for each in the forward pass
        >>> samples_within(groups, 0.1, measured_samples=2)
        5
    """
    each = predicted_forward_s(groups, FreezePlan(), below=len(groups)) / measured_samples
    return int(seconds / each) if each else _MOST_SAMPLES


def measured_signals(curve: ProbeCurve | None, groups: LayerGroups) -> dict[str, dict[str, float]]:
    """The probe curve as signals by layer group, for `Driver.measured`.

    What enters the head is the value of the shallowest group of the head.
    """
    if curve is None:
        return {}
    points = {point.group: point for point in curve.points}
    head = [g.name for g in groups if g.name in groups.head]
    if curve.head_input is not None and head:
        points[head[0]] = curve.head_input
    return {
        "probe_accuracy": {name: p.val_accuracy for name, p in points.items()},
        "probe_behind": {name: p.behind[0] for name, p in points.items()},
    }
