"""Policies that freeze more and more of the network from the input on, by the clock alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from frostline.clock import Duration
from frostline.compose import whole_run
from frostline.cost import backward_share, trained_share
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import backbone, freeze_first
from frostline.policy import Event, Policy, State

__all__ = ["ComposerLinear", "FreezeOut", "FreezeTraining", "SpFDE", "freezeout_ratios"]

_POWERS = {"linear": 1, "square": 2, "cubic": 3}
_START, _END = Duration.parse("0%"), Duration.parse("100%")
_FORTY_PERCENT, _FIVE_PERCENT = Duration.parse("40%"), Duration.parse("5%")
_ONE_EPOCH = Duration.parse("1ep")


@dataclass(frozen=True, slots=True)
class FreezeOut(Policy):
    """FreezeOut: each group's rate falls to 0 by its own time, the shallowest first.

    With N steps, L groups in the backbone and the head as number L, group i is frozen from step
    N r_i on, r_i = s(t0 + (1 - t0) i / L), where s is the identity, the square or the cube. Until
    then the factor on its rate at step j is (1 + cos(pi j / (N r_i))) / 2, divided by r_i with
    `scale_lr`. The head has r = 1: it trains to the end, and its rate falls to 0 there.

    The schedule of the optimizer itself should be constant: any other one is multiplied. The times
    hang on the number of steps, so a run that is stopped early freezes less than it should.

    Attributes:
        t0: when the first group is frozen, before `scale` is applied, in (0, 1]. 0.8, that of
            the public implementation.
        scale: s, "linear", "square" or "cubic". "cubic", that of the public implementation.
        scale_lr: divide by r_i, so that every group trains with the same sum of rates. On, as in
            the public implementation.

    References:
        Brock, Lim, Ritchie & Weston 2017, "FreezeOut: Accelerate Training by Progressively
        Freezing Layers", arXiv:1706.04983. The formula of the paper lacks the 1/2, as its authors
        say beside their code; it is here. Groups stand for the paper's layers.

    Example:
        >>> FreezeOut(t0=0.5).scale
        'cubic'
    """

    t0: float = 0.8
    scale: Literal["linear", "square", "cubic"] = "cubic"
    scale_lr: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.t0 <= 1:
            raise PolicyError(
                f"freeze the first group at t0={self.t0}",
                found="a number that is not above 0 and at most 1",
                fix="for example t0=0.8",
            )

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """Groups whose time is over are frozen; the rates of the others have fallen."""
        total = whole_run(event.progress, "freeze each group at its share of the run")
        step, names = event.progress.step, backbone(groups)
        ratios = freezeout_ratios(len(names), self.t0, self.scale)
        rates, frozen = dict.fromkeys(groups.head, self._rate(step, total, 1.0)), 0
        for name, ratio in zip(names, ratios, strict=False):
            # In whole numbers, so that 51.2 % of 1000 steps are 512.
            frozen += step * ratio.denominator >= total * ratio.numerator
            rates[name] = self._rate(step, total, float(ratio))
        reason = f"FreezeOut: {frozen} of {len(names)} groups have reached their time"
        return replace(freeze_first(groups, frozen, reason), lr_scale=rates), state

    def _rate(self, step: int, total: int, ratio: float) -> float:
        return _half_cosine(step, total * ratio) / (ratio if self.scale_lr else 1)


@functools.lru_cache(maxsize=64)
def freezeout_ratios(count: int, t0: float, scale: str) -> tuple[Fraction, ...]:
    """When each of `count` groups is frozen, as a share of the run; then the head's, 1.

    Example:
        >>> [float(r) for r in freezeout_ratios(2, 0.8, "cubic")]
        [0.512, 0.729, 1.0]
    """
    first = Fraction(str(t0))
    shares = (Fraction(i, count) if count else 1 for i in range(count + 1))
    return tuple((first + (1 - first) * share) ** _POWERS[scale] for share in shares)


@dataclass(frozen=True, slots=True)
class FreezeTraining(Policy):
    """Freeze Training: one more group from the input on at evenly spaced times.

    With n groups in the backbone, group i (from 0) is frozen at
    start + (i + 1) (end - start) / n.

    Attributes:
        start: until when nothing is frozen. "0%", the paper's: its times span the run.
        end: when the last group of the backbone is frozen. "100%", as said.

    References:
        Raghu, Gilmer, Yosinski & Sohl-Dickstein 2017, "SVCCA: Singular Vector Canonical
        Correlation Analysis for Deep Learning Dynamics and Interpretability", arXiv:1706.05806,
        where the times are fixed in advance: SVCCA motivates the order and takes no part.

    Example:
        >>> str(FreezeTraining().end)
        '100%'
    """

    start: Duration = _START
    end: Duration = _END

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The groups whose time has come are frozen."""
        progress, count = event.progress, len(groups.backbone)
        start, end = self.start.steps(progress), self.end.steps(progress)
        if end <= start:
            raise PolicyError(
                f"freeze from {self.start} to {self.end}",
                found=f"a first step {start} that is not before the last, {end}",
                fix="an end after the start",
            )
        passed = max(0, progress.step - start)
        frozen = min(count, passed * count // (end - start))
        reason = f"Freeze Training: {frozen} of {count} groups have reached their time"
        return freeze_first(groups, frozen, reason), state


@dataclass(frozen=True, slots=True)
class SpFDE(Policy):
    """SpFDE: freeze groups for good from the input on until enough of the work is saved.

    The first group is frozen at T = `start`, the next ones at T + d, T + 2d, ... with d = `every`,
    until the sum over frozen groups of (their share of the backward work) * (share of the run that
    is left) is at least `saving`, or the share `layers` of the backbone is frozen. A group's share
    is how much its joining shortens the backward pass by measured costs; its share of the
    parameters where costs were not measured. With `anneal`, the factor on the rate of a group at
    step j is (1 + cos(pi j / e)) / 2, where e is when it is frozen, or the end of the run.

    Attributes:
        start: when the first group is frozen. "40%", ours: the paper derives it from the target.
        every: time between two groups, > 0. "5%", ours: the paper freezes when it changes its
            sparse mask, which there is none of here.
        saving: share of the backward work of the run to save, in [0, 1]. 0.225: the 15 % of all
            work that the paper finds free, where the backward pass is two thirds of it.
        layers: largest share of the backbone to freeze, in [0, 1]; rounded down. 2/3, the paper's.
        anneal: lower each group's rate by a cosine to its own time. On, the paper's. The schedule
            of the optimizer should then be constant: any other one is multiplied.

    References:
        Yuan et al. 2022, "Layer Freezing & Data Sieving: Missing Pieces of a Generic Framework for
        Sparse Training", arXiv:2209.11204; appendix B finds that freezing once and for good beats
        freezing in turns. Its sparse training and its data sieving are no part of this policy.

    Example:
        >>> SpFDE(saving=0.1).saving
        0.1
    """

    start: Duration = _FORTY_PERCENT
    every: Duration = _FIVE_PERCENT
    saving: float = 0.225
    layers: float = 2 / 3
    anneal: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.saving <= 1 and 0 <= self.layers <= 1 and self.every.value):
            raise PolicyError(
                f"save {self.saving} of the work with {self.layers} of the layers, "
                f"one every {self.every}",
                found="a share outside [0, 1], or no time between two groups",
                fix="for example saving=0.2,every=5%",
            )

    def init(self, groups: LayerGroups) -> State:
        """No times yet: they depend on the length of the run."""
        return {"times": None}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The groups whose time has come are frozen."""
        step, names = event.progress.step, backbone(groups)
        total = whole_run(event.progress, "save a share of the work of the run")
        if state["times"] is None:
            state = {"times": self._times(groups, event, total)}
        times: list[int] = state["times"]
        frozen = sum(step >= time for time in times)
        reason = (
            f"SpFDE: {frozen} of the {len(times)} groups to freeze (of {len(names)}) are frozen"
        )
        plan = freeze_first(groups, frozen, reason)
        if self.anneal:
            ends = dict.fromkeys(groups.names, total) | dict(zip(names, times, strict=False))
            plan = replace(plan, lr_scale={n: _half_cosine(step, e) for n, e in ends.items()})
        return plan, state

    def _times(self, groups: LayerGroups, event: Event, total: int) -> list[int]:
        start = self.start.steps(event.progress)
        every = max(1, self.every.steps(event.progress))
        times, saved = list[int](), 0.0
        for share in _shares(groups)[: int(len(groups.backbone) * self.layers + 1e-9)]:
            time = start + len(times) * every
            if saved >= self.saving - 1e-9 or time >= total:
                break
            times.append(time)
            saved += share * (total - time) / total
        return times


@dataclass(frozen=True, slots=True)
class ComposerLinear(Policy):
    """Composer's layer freezing: from half-time on, linearly more groups from the input on.

    With f the share of the run completed, floor(n * freeze_level * (f - freeze_start) /
    (1 - freeze_start)) of the n groups of the backbone are frozen, and none before `freeze_start`.

    Attributes:
        freeze_start: share of the run before any freezing, in [0, 1). 0.5, Composer's.
        freeze_level: share of the backbone frozen at the end, in [0, 1]. 1.0, Composer's.
        every: how often the share is looked at. "1ep", Composer's.

    References:
        MosaicML Composer, LayerFreezing: https://docs.mosaicml.com/projects/composer. There the
        order is that of the module tree, and its checkpoints cannot reliably resume; here it is
        the order of execution, the only one in which the frozen part can be skipped.

    Example:
        >>> ComposerLinear(freeze_start=0.25).freeze_level
        1.0
    """

    freeze_start: float = 0.5
    freeze_level: float = 1.0
    every: Duration = _ONE_EPOCH

    def __post_init__(self) -> None:
        if not (0 <= self.freeze_start < 1 and 0 <= self.freeze_level <= 1):
            raise PolicyError(
                f"freeze from {self.freeze_start} of the run on up to {self.freeze_level}",
                found="a start outside [0, 1) or a level outside [0, 1]",
                fix="for example freeze_start=0.5,freeze_level=1",
            )

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The groups whose share has come are frozen."""
        progress, count = event.progress, len(groups.backbone)
        total = whole_run(progress, "freeze a share of the groups that grows over the run")
        looked = progress.step - progress.step % max(1, self.every.steps(progress))
        # Exact: in floats the last group would now and then miss its time.
        start, level = Fraction(str(self.freeze_start)), Fraction(str(self.freeze_level))
        share = level * max(0, Fraction(looked, total) - start) / (1 - start)
        frozen = min(count, math.floor(count * share))
        reason = f"Composer's schedule: {frozen} of {count} groups at {looked} of {total} steps"
        return freeze_first(groups, frozen, reason), state


def _half_cosine(step: int, end: float) -> float:
    """Factor that falls from 1 at step 0 to 0 at `end` and stays there."""
    return (1 + math.cos(math.pi * step / end)) / 2 if step < end else 0.0


def _shares(groups: LayerGroups) -> Sequence[float]:
    """By how much each group of the backbone, freezing in turn, shortens the backward pass."""
    work = backward_share if groups.measured else trained_share
    left = [work(groups, freeze_first(groups, n)) for n in range(len(groups.backbone) + 1)]
    return [before - after for before, after in itertools.pairwise(left)]
