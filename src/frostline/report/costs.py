"""Where the time of a run went, and what freezing was predicted and measured to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from frostline.cost import predicted_step_s
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.records import RunRecord

__all__ = ["PARTS", "Saving", "groups_of", "predicted_share", "time_parts"]

#: What the time of a run is broken into, and what each part is.
PARTS: Mapping[str, str] = {
    "training": "training and validation, reading data included",
    "cache": "finding, filling, reading and checking stored outputs of frozen layers",
    "signals": "signals that the policy asked for",
    "policy": "the policy's own decisions",
    "applying": "making the model equal to a plan",
    "digests": "proving that frozen tensors kept their bits",
    "measuring": "measuring what each layer group costs",
    "rest": "loading, the test at the end, saving",
}
_CACHE = ("find_s", "fill_s", "read_s", "check_s")


@dataclass(frozen=True, slots=True)
class Saving:
    """What freezing saved of the time of a training step, as a share of full fine-tuning's.

    Attributes:
        predicted: time of a step, mean over the updates, from the measured cost of each layer
            group under each plan, as a multiple of full fine-tuning's.
        measured: seconds of training per update as a multiple of those of the run of full
            fine-tuning with the same seed; None without one.
    """

    predicted: float
    measured: float | None


def time_parts(record: RunRecord) -> dict[str, float] | None:
    """Seconds of a finished run by the names of `PARTS`; their sum is the whole run.

    None for a run that is not finished, or was recorded without its costs. A part may be measured
    beside the training (a thread that reads ahead), so what is left for training is at least 0.

    Example:
        >>> from pathlib import Path
        >>> costs = {"wall_s": 10.0, "training_s": 8.0, "policy_s": 0.5, "measure_s": 1.0}
        >>> found = time_parts(RunRecord(Path("run"), {}, (), (), None, costs, False))
        >>> {name: seconds for name, seconds in found.items() if seconds}
        {'training': 7.5, 'policy': 0.5, 'measuring': 1.0, 'rest': 1.0}
    """
    costs = record.summary
    if "wall_s" not in costs or "training_s" not in costs:
        return None
    cache: Mapping[str, Any] = costs.get("cache") or {}
    inside = {
        "cache": sum(float(cache.get(name, 0.0)) for name in _CACHE),
        "signals": float(costs.get("signals_s", 0.0)),
        "policy": float(costs.get("policy_s", 0.0)),
        "applying": float(costs.get("apply_s", 0.0)),
        "digests": float(costs.get("digest_s", 0.0)),
    }
    measuring = float(costs.get("measure_s", 0.0))
    training = float(costs["training_s"])
    outside = float(costs["wall_s"]) - training - measuring
    return {
        "training": max(0.0, training - sum(inside.values())),
        **inside,
        "measuring": measuring,
        "rest": max(0.0, outside),
    }


def groups_of(record: RunRecord) -> LayerGroups | None:
    """The layer groups of a run with their measured costs; None where they were not recorded.

    A record has the size of each group, not its tensors: each group gets one that stands for all.
    """
    costs: Mapping[str, Mapping[str, Any]] = record.header.get("costs", {}).get("groups", {})
    sizes: Mapping[str, int] = record.header.get("groups", {})
    if not sizes or sizes.keys() - costs.keys():
        return None
    items = tuple(
        LayerGroup(
            name,
            depth,
            (TensorInfo(f"{name}.*", (int(size),)),) if size else (),
            cost=GroupCost(**costs[name]),
        )
        for depth, (name, size) in enumerate(sizes.items())
    )
    return LayerGroups(items, head=frozenset(record.header.get("head", ())))


def predicted_share(record: RunRecord) -> float | None:
    """Time of a training step under the plans of a run, as a multiple of full fine-tuning's.

    The mean over its updates, predicted from the measured cost of each layer group, with the
    frozen prefix left out for the share of batches that the cache served. Parameters that train
    though their group is frozen count as frozen: a record does not have their sizes.

    None where costs were not recorded, or no update was made.
    """
    groups = groups_of(record)
    steps = int(record.summary.get("steps", record.epochs[-1]["step"] if record.epochs else 0))
    if groups is None or not steps:
        return None
    full = predicted_step_s(groups, FreezePlan())
    if not full:
        return None
    cache: Mapping[str, Any] = record.summary.get("cache") or {}
    batches = int(cache.get("batches", 0))
    served = int(cache.get("replayed", 0)) / batches if batches else 0.0
    total = 0.0
    for plan, count in _plans(record, steps):
        step_s = predicted_step_s(groups, plan)
        if served:
            cached = predicted_step_s(groups, plan, frozen_prefix_cached=True)
            step_s += served * (cached - step_s)
        total += count * step_s
    return total / (steps * full)


def _plans(record: RunRecord, steps: int) -> Sequence[tuple[FreezePlan, int]]:
    """Each plan and for how many updates it held."""
    if not record.decisions:
        return [(FreezePlan(), steps)]
    starts = [min(decision.step, steps) for decision in record.decisions]
    lengths = [end - begin for begin, end in pairwise([0, *starts[1:], steps])]
    return [(d.plan, length) for d, length in zip(record.decisions, lengths, strict=True)]
