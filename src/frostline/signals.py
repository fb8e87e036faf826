"""Signals: named scalars per layer group, computed from a side-effect-free view of training.

A policy declares the signals it needs and how often; only those are computed, and their time is
charged to the run. A new signal is a pure function of a `Probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups

__all__ = ["SIGNALS", "Need", "Probe", "Signal", "compute_signal"]


class Probe(Protocol):
    """A read-only view of a model between backward pass and optimizer update.

    Reading changes nothing: weights, gradients, optimizer state, buffers and random streams are
    the same afterwards, bit for bit. Parameters without a gradient contribute 0.
    """

    def gradient_l1(self, group: LayerGroup) -> float:
        """Sum of absolute gradients of the group's parameters."""
        ...

    def gradient_l2(self, group: LayerGroup) -> float:
        """Euclidean norm of the group's gradient."""
        ...

    def weight_l2(self, group: LayerGroup) -> float:
        """Euclidean norm of the group's parameters."""
        ...


@dataclass(frozen=True, slots=True)
class Signal:
    """A named scalar per layer group.

    Attributes:
        name: identifier used in records and policies.
        unit: what one means, for people.
        compute: pure function of a probe and a group.
    """

    name: str
    unit: str
    compute: Callable[[Probe, LayerGroup], float]


@dataclass(frozen=True, slots=True)
class Need:
    """A policy's request: this signal, this often.

    Attributes:
        signal: name of a signal in `SIGNALS`.
        every: interval between samples; a sample is taken at the last step of each interval.
    """

    signal: str
    every: Duration


def _relative(probe: Probe, group: LayerGroup) -> float:
    weight = probe.weight_l2(group)
    return probe.gradient_l2(group) / weight if weight else 0.0


#: Signals known by name. Relative gradient norm: Lee et al. 2023 (surgical fine-tuning), RGN.
SIGNALS: dict[str, Signal] = {
    s.name: s
    for s in (
        Signal("gradient_l1", "sum of |g|", lambda p, g: p.gradient_l1(g)),
        Signal("gradient_norm", "L2 norm of g", lambda p, g: p.gradient_l2(g)),
        Signal("weight_norm", "L2 norm of w", lambda p, g: p.weight_l2(g)),
        Signal("relative_gradient_norm", "L2(g) / L2(w)", _relative),
    )
}


def compute_signal(name: str, probe: Probe, groups: LayerGroups) -> Mapping[str, float]:
    """The value of one signal for every group.

    Raises:
        PolicyError: no such signal.
    """
    if name not in SIGNALS:
        raise PolicyError(
            f"compute the signal {name!r}",
            found="no signal of that name",
            fix=f"one of {', '.join(sorted(SIGNALS))}",
        )
    return {g.name: SIGNALS[name].compute(probe, g) for g in groups}
