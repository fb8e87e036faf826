"""Policies that decide by gradients: a layer group whose gradient has settled is frozen."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import (
    backbone,
    check_interval,
    finite,
    freeze_first,
    freeze_parameters,
    new_reading,
    often,
)
from frostline.policy import Event, Policy, State
from frostline.signals import Need

__all__ = ["AutoFreeze", "GradES", "PipeTransformer"]

_ONE_EPOCH = Duration.parse("1ep")
_ONE_PERCENT = Duration.parse("1%")
_TENTH = Duration.parse("10%")
_WARM_UP = Duration.parse("30%")
_SUMMED_L1 = "summed_gradient_l1"
_SUMMED_L2 = "summed_gradient_norm"
#: 12/3 is 4.000000000000001 in floats; what is whole must not be rounded up.
_ROUNDING = 1e-9
_NOTHING = "nothing frozen yet"


@dataclass(frozen=True, slots=True)
class AutoFreeze(Policy):
    """Freeze from the input up to the first group whose gradient still changes (AutoFreeze).

    G is the L1 norm of a group's gradient *summed* over an interval, so that noise cancels. At
    the end of each interval but the first, every group that trains gets the change
    eta = |G_before - G_now| / G_before; all groups before the first whose eta is at or above a
    percentile of these are frozen, for good. A percentile is relative: something is frozen in the
    end even where the signal is noise. Compare with the placebo.

    Attributes:
        every: length of an interval. "10%", the paper's ten intervals in a run.
        percentile: of the changes of the groups that train, in [0, 100], interpolated linearly;
            50, the paper's. A larger one freezes more.

    References:
        Liu, Agarwal & Venkataraman 2021, "AutoFreeze: Automatically Freezing Model Blocks to
        Accelerate Fine-tuning", arXiv:2102.01386. The released code reloads the model and makes a
        new optimizer at each decision, which loses its momentum; here the optimizer goes on. A
        group that has parameters but no reading is not passed over. Embeddings are a group of their
        own.

    Example:
        >>> AutoFreeze(percentile=75).needs()[0].signal
        'summed_gradient_l1'
    """

    every: Duration = _TENTH
    percentile: float = 50.0

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise PolicyError(
                f"freeze by the {self.percentile}th percentile of changes",
                found="a number outside [0, 100]",
                fix="for example percentile=50",
            )
        check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """The summed gradient of every interval."""
        return (Need(_SUMMED_L1, self.every, steps=None),)

    def notice(self) -> str:
        """That sums are dear."""
        return _sums_are_dear("autofreeze")

    def init(self, groups: LayerGroups) -> State:
        """Nothing frozen, no sums known."""
        del groups
        return {"seen": None, "frozen": 0, "sums": {}, "why": f"autofreeze: {_NOTHING}"}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The prefix so far, longer after a reading that says so."""
        if (sums := new_reading(state, event, _SUMMED_L1)) is not None:
            state = self._judged(groups, state, sums)
            state["seen"] = event.sampled[_SUMMED_L1]
        return freeze_first(groups, state["frozen"], state["why"]), state

    def _judged(self, groups: LayerGroups, state: State, sums: Mapping[str, float]) -> State:
        frozen, why, before = state["frozen"], state["why"], state["sums"]
        names = backbone(groups)
        active = names[frozen:]
        sums = finite(active, sums)
        changes = {n: _change(before[n], now) for n, now in sums.items() if n in before}
        if changes:
            limit = _percentile(changes.values(), self.percentile)
            stop = next(
                n for n in active if groups[n].parameters and changes.get(n, math.inf) >= limit
            )
            frozen = names.index(stop)
            why = (
                f"autofreeze: {frozen} of {len(names)} groups frozen; {stop} still changes, "
                f"percentile {self.percentile:g} of the changes is {limit:.3g}"
            )
        kept = {n: sums[n] for n in names[frozen:] if n in sums}
        return {"frozen": frozen, "sums": kept, "why": why}


@dataclass(frozen=True, slots=True)
class PipeTransformer(Policy):
    """Freeze up to the group of the smallest gradient, capped by a geometric schedule.

    With L groups in the backbone and F of them frozen, after each interval
    F = min(F + alpha (L - F), l), where l counts the groups up to the one with the smallest
    L2 norm of the gradient summed over the interval, among those that train. Fractions are rounded
    up. Frozen groups stay frozen; the head is none of the L.

    Attributes:
        alpha: share of the remaining groups that may freeze at once, in (0, 1); 1/3, that of
            the paper's table 1.
        rule: "gradient", the paper's, or "cap": always as many as the cap allows, which is what
            the released code does, and needs no signals.
        every: length of an interval; "1ep", the paper's.

    References:
        He, Li, Soltanolkotabi & Avestimehr 2021, "PipeTransformer: Automated Elastic Pipelining
        for Distributed Training of Transformers", arXiv:2102.03161. The released code
        never reaches its gradient rule; its closed form is F = L (1 - (1 - alpha)^T) after T
        epochs. The paper's gains come from re-partitioning pipelines, which is not done here.

    Example:
        >>> PipeTransformer(rule="cap").needs()
        ()
    """

    alpha: float = 1 / 3
    rule: Literal["gradient", "cap"] = "gradient"
    every: Duration = _ONE_EPOCH

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise PolicyError(
                f"freeze a share of {self.alpha} of the remaining groups",
                found="a number outside (0, 1)",
                fix="for example alpha=0.2",
            )
        check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """The summed gradient of every interval, if the rule looks at it."""
        return () if self.rule == "cap" else (Need(_SUMMED_L2, self.every, steps=None),)

    def notice(self) -> str:
        """That sums are dear."""
        return "" if self.rule == "cap" else _sums_are_dear("pipetransformer")

    def init(self, groups: LayerGroups) -> State:
        """Nothing frozen."""
        del groups
        if self.rule == "cap":
            return {}
        return {"seen": None, "frozen": 0, "why": f"pipetransformer: {_NOTHING}"}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The prefix so far."""
        names = backbone(groups)
        if self.rule == "cap":
            return self._scheduled(groups, len(names), event), state
        if (norms := new_reading(state, event, _SUMMED_L2)) is not None:
            state = self._judged(names, state, norms)
            state["seen"] = event.sampled[_SUMMED_L2]
        return freeze_first(groups, state["frozen"], state["why"]), state

    def _scheduled(self, groups: LayerGroups, total: int, event: Event) -> FreezePlan:
        turns = event.progress.step // max(1, self.every.steps(event.progress))
        frozen = _whole(total * (1 - (1 - self.alpha) ** turns))
        why = f"pipetransformer: {frozen} of {total} groups frozen after {turns} intervals"
        return freeze_first(groups, frozen, why)

    def _judged(self, names: list[str], state: State, norms: Mapping[str, float]) -> State:
        frozen, why = state["frozen"], state["why"]
        active = finite(names[frozen:], norms)
        if active:
            quiet = min(active, key=lambda n: active[n])
            cap = _whole(frozen + self.alpha * (len(names) - frozen))
            frozen = min(cap, names.index(quiet) + 1)
            why = (
                f"pipetransformer: {frozen} of {len(names)} groups frozen; the smallest gradient "
                f"is that of {quiet}, {norms[quiet]:.3g}, the cap is {cap}"
            )
        return {"frozen": frozen, "why": why}


@dataclass(frozen=True, slots=True)
class GradES(Policy):
    """Freeze each weight matrix once its gradient has become small; end when all are (GradES).

    After `start`, a matrix of the backbone whose reading is below its limit is frozen for good.
    The reading is the L1 norm of the gradient's change since the reading before, or of the
    gradient itself. When every monitored matrix is frozen the run may end.

    Attributes:
        tau: the limit, > 0. With `relative`, a multiple of the matrix's own mean reading before
            `start`: 0.5, ours. Without, in units of gradient times size, as published; a value
            for one model means nothing on another.
        relative: compare with the matrix's own readings: free of the scale of loss and matrix.
            On; ours.
        measure: "gradient_change", version 3 of the paper, or "gradient", version 1.
        start: nothing is frozen before; "30%", the paper's alpha of 0.3.
        every: interval between readings; "1%", ours (the paper reads at every step).
        per: "parameter": weights of two or more dimensions, as published; biases, norms and
            embeddings go on training. "group": whole layer groups, which is what shortens the
            backward pass.

    References:
        "GradES: Significantly Faster Training in Transformers with Gradient-Based Early
        Stopping" 2025, arXiv:2509.01842. The released package compares the change of the
        *weights*, so a decaying learning rate alone freezes everything; here, as in the paper,
        gradients count, which know no learning rate.

    Example:
        >>> GradES(tau=2.4, relative=False, measure="gradient").needs()[0].signal
        'gradient_l1'
    """

    tau: float = 0.5
    relative: bool = True
    measure: Literal["gradient_change", "gradient"] = "gradient_change"
    start: Duration = _WARM_UP
    every: Duration = _ONE_PERCENT
    per: Literal["parameter", "group"] = "parameter"

    def __post_init__(self) -> None:
        if not 0 < self.tau < math.inf:
            raise PolicyError(
                f"freeze below a gradient of {self.tau}",
                found="a limit that is not positive and finite",
                fix="for example tau=0.5",
            )
        check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """The reading of every parameter or group."""
        return (Need(f"{self.measure}_l1", self.every, per=self.per),)

    def notice(self) -> str:
        """That readings are dear."""
        return (
            f"grades goes through all gradients {often(self.every)}"
            + (" and keeps a copy of them" if self.measure == "gradient_change" else "")
            + ": this shows in short runs, and every= sets how often."
        )

    def init(self, groups: LayerGroups) -> State:
        """Nothing frozen, no reading known; raises where there is no matrix."""
        if not self._monitored(groups):
            raise PolicyError(
                "freeze weight matrices",
                found="a backbone without a weight of two or more dimensions",
                fix="per=group",
            )
        return {"seen": None, "known": {}, "frozen": [], "why": f"grades: {_NOTHING}"}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """What is frozen so far, and more after a reading that says so."""
        signal = f"{self.measure}_l1"
        early = not event.progress.reached(self.start)  # raises at once without the total
        if (readings := new_reading(state, event, signal)) is not None:
            state = self._judged(self._monitored(groups), state, readings, early=early)
            state["seen"] = event.sampled[signal]
        return self._plan(groups, state), state

    def _monitored(self, groups: LayerGroups) -> list[str]:
        # What never runs has no gradient, and would keep the run from its end.
        names = [n for n in backbone(groups) if groups[n].parameters and groups[n].calls]
        if self.per == "group":
            return names
        return [
            p.name
            for name in names
            for p in groups[name].parameters
            if p.kind == "weight" and len(p.shape) > 1
        ]

    def _judged(
        self, monitored: list[str], state: State, readings: Mapping[str, float], *, early: bool
    ) -> State:
        known, done = dict(state["known"]), set(state["frozen"])
        for unit in monitored:
            value = readings.get(unit, math.nan)
            if unit in done or not math.isfinite(value):
                continue
            if early or unit not in known:
                total, count = known.get(unit, (0.0, 0))
                known[unit] = [total + value, count + 1]
            if not early and value < self._limit(known[unit]):
                done.add(unit)
        frozen = [unit for unit in monitored if unit in done]
        what = "times the mean reading before" if self.relative else "in its own units"
        why = f"grades: {len(frozen)} of {len(monitored)} frozen, each below {self.tau:g} {what}"
        return {"known": known, "frozen": frozen, "why": why if frozen else state["why"]}

    def _limit(self, known: list[float]) -> float:
        return self.tau * known[0] / known[1] if self.relative else self.tau

    def _plan(self, groups: LayerGroups, state: State) -> FreezePlan:
        frozen, why = state["frozen"], state["why"]
        done = bool(frozen) and len(frozen) == len(self._monitored(groups))
        if self.per == "group":
            return FreezePlan(frozen=frozenset(frozen), done=done, reason=why)
        return freeze_parameters(groups, frozen, done=done, reason=why)


def _change(before: float, now: float) -> float:
    """Relative change; without bound, but finite, where there was nothing before."""
    if before == 0:
        return 0.0 if now == 0 else sys.float_info.max
    return min(abs(before - now) / before, sys.float_info.max)


def _percentile(values: Iterable[float], percentile: float) -> float:
    """With linear interpolation, and never above the largest value, whatever the rounding."""
    ordered = sorted(values)
    place = percentile / 100 * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return min(high, low + (high - low) * (place - math.floor(place)))


def _whole(number: float) -> int:
    return math.ceil(number - _ROUNDING)


def _sums_are_dear(name: str) -> str:
    return (
        f"{name} adds up the gradients of all that trains at every step: this takes time in each "
        "step and the memory of one more copy of the gradients."
    )
