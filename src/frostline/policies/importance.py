"""Policies that read how much each group would learn, and train or quicken the ones that matter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import (
    backbone,
    check_interval,
    check_options,
    finite,
    freeze_only,
    freeze_parameters,
    new_reading,
    often,
    readings_from_start,
)
from frostline.policy import Event, Policy, State
from frostline.signals import Need

__all__ = ["FIM", "AutoRGN", "AutoSNR"]

_ONE_EPOCH = Duration.parse("1ep")
_RGN, _SNR, _FISHER = "relative_gradient_norm", "gradient_snr", "fisher"
Unit = Literal["group", "parameter"]


@dataclass(frozen=True, slots=True)
class AutoRGN(Policy):
    """Scale each group's rate by its relative gradient norm, or freeze by it (Auto-RGN).

    RGN = |g| / |w| of a group, L2 norms, averaged over the first batches of each epoch. "rates"
    multiplies the group's learning rate by RGN / max RGN over all groups, head included, until
    the next reading. "selection" freezes the groups of the backbone whose RGN is below
    `threshold` times the largest of the backbone.

    Attributes:
        mode: "rates", the paper's; or "selection", ours, which saves time.
        threshold: for "selection", in (0, 1]; 0.5, ours.
        steps: batches of a reading, >= 1; 5, the public code's.
        every: time between readings; "1ep", the paper's. The first is taken in the first `steps`
            steps, in which the head alone trains; later ones go on training while they read.
        per: "group", ours; with "selection" also "parameter", as the paper, which judges each
            tensor; a group of which a part trains keeps its norm and dropout live.

    References:
        Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        ICLR, arXiv:2210.11466. The public code takes extra batches to read, makes a new optimizer
        every epoch, leaves norms out, and saves no time; here the readings are of batches that
        train, and the optimizer goes on.

    Example:
        >>> AutoRGN(mode="selection").needs()[1].frozen_too
        True
    """

    mode: Literal["rates", "selection"] = "rates"
    threshold: float = 0.5
    steps: int = 5
    every: Duration = _ONE_EPOCH
    per: Unit = "group"

    def __post_init__(self) -> None:
        check_options(self, {"threshold": 0 < self.threshold <= 1, "steps": self.steps >= 1})
        check_interval(self.every)
        if self.mode == "rates" and self.per == "parameter":
            raise PolicyError(
                "scale the learning rate of each parameter",
                found="rates, which are per layer group",
                fix="per=group, or mode=selection",
            )

    def needs(self) -> tuple[Need, ...]:
        """Relative gradient norms; of frozen groups, too, where some are frozen."""
        first, rest = readings_from_start(_RGN, self.steps, self.every, self.per)
        return first, replace(rest, frozen_too=self.mode == "selection")

    def notice(self) -> str:
        """That readings of frozen groups are dear."""
        return (
            f"auto-rgn runs backward through frozen groups, too, in {self.steps} steps of a "
            f"reading, {often(self.every)}: this shows where an interval has few steps."
        )

    def init(self, groups: LayerGroups) -> State:
        """The head alone trains until the first reading."""
        return _waiting("auto-rgn", _units(groups, self.per)) | {"rates": {}}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """Rates or frozen groups of the last reading."""
        if (values := new_reading(state, event, _RGN)) is not None:
            judged = self._rates if self.mode == "rates" else self._selection
            state = {**state, **judged(groups, values), "seen": event.sampled[_RGN]}
        if state["rates"]:
            return FreezePlan(lr_scale=state["rates"], reason=state["why"]), state
        return _frozen_plan(groups, state, self.per), state

    def _rates(self, groups: LayerGroups, values: Mapping[str, float]) -> State:
        found = finite(groups.names, values)
        largest = max(found.values(), default=0.0)
        if not largest:
            return {}
        rates = {name: value / largest for name, value in found.items()}
        first = max(rates, key=lambda name: rates[name])
        least = min(rates, key=lambda name: rates[name])
        why = (
            f"auto-rgn: the largest relative gradient is that of {first}, {largest:.3g}; the rate "
            f"of {least} is scaled by {rates[least]:.3g}"
        )
        return {"frozen": [], "rates": rates, "why": why}

    def _selection(self, groups: LayerGroups, values: Mapping[str, float]) -> State:
        units = _units(groups, self.per)
        what = "relative gradient norm"
        return _below("auto-rgn", what, units, finite(units, values), self.threshold)


@dataclass(frozen=True, slots=True)
class AutoSNR(Policy):
    """Freeze the groups whose gradient is mostly noise from batch to batch (Auto-SNR).

    SNR is the mean over a group's weights of mean^2 / variance of their gradients over the first
    batches of each epoch. Divided by the largest of the backbone it is in [0, 1], and groups below
    `threshold` are frozen until the next reading.

    Attributes:
        threshold: in (0, 1]; 0.5, ours. The public code's 0.95 is for values that were never
            brought to [0, 1].
        steps: batches of a reading, >= 2; 5, the public code's.
        every: time between readings; "1ep", the paper's. The first is taken in the first `steps`
            steps, in which the head alone trains.
        per: "group", ours, or "parameter", as the paper, which judges each tensor; a group of
            which a part trains keeps its norm and dropout live.

    References:
        Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        ICLR, arXiv:2210.11466. The paper takes the variance over examples, its public code over
        the weight's first axis; here it is over batches, whose smaller variance raises all ratios
        alike and drops out by the division.

    Example:
        >>> AutoSNR(steps=8).needs()[0].steps
        8
    """

    threshold: float = 0.5
    steps: int = 5
    every: Duration = _ONE_EPOCH
    per: Unit = "group"

    def __post_init__(self) -> None:
        check_options(self, {"threshold": 0 < self.threshold <= 1, "steps": self.steps >= 2})
        check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """The signal-to-noise ratio, of frozen groups, too."""
        return readings_from_start(_SNR, self.steps, self.every, self.per)

    def notice(self) -> str:
        """That readings of frozen groups are dear."""
        return (
            f"auto-snr runs backward through frozen groups, too, in {self.steps} steps of a "
            f"reading, {often(self.every)}, and goes through all gradients in them: this shows "
            "where an interval has few steps."
        )

    def init(self, groups: LayerGroups) -> State:
        """The head alone trains until the first reading."""
        return _waiting("auto-snr", _units(groups, self.per))

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The noisy groups of the last reading frozen."""
        if (values := new_reading(state, event, _SNR)) is not None:
            units = _units(groups, self.per)
            what = "signal-to-noise ratio"
            found = _below("auto-snr", what, units, finite(units, values), self.threshold)
            state = {**state, **found, "seen": event.sampled[_SNR]}
        return _frozen_plan(groups, state, self.per), state


@dataclass(frozen=True, slots=True)
class FIM(Policy):
    """Train the groups with the largest Fisher information on a small sample (FIM score).

    The score of a group is the mean over a few batches of the sum of its squared gradients: the
    trace of its part of the empirical Fisher information. The groups of the backbone with the
    largest scores train, with the head; all others are frozen.

    Attributes:
        fraction: share of the backbone's groups that trains, rounded down but to one at least, in
            (0, 1]; 0.4, ours: the paper finds that a few layers of the encoder are enough.
        groups: how many train instead, >= 1.
        steps: batches of a reading, >= 1; 10, ours: the paper takes a few hundred examples. In
            these steps the head alone trains.
        every: time between rankings. None, ours, ranks once at the start: the paper finds the
            order stable in training.
        normalise: divide by the number of weights, so that large groups are not preferred. Off,
            the paper's.

    References:
        Lodha et al. 2023, "On Surgical Fine-tuning for Language Encoders", Findings of EMNLP,
        arXiv:2310.17041. The paper squares the gradient of each example; here that of each batch
        is squared, in which opposite examples cancel.

    Example:
        >>> FIM(groups=3).needs()[0].signal
        'fisher'
    """

    fraction: float = 0.4
    groups: int | None = None
    steps: int = 10
    every: Duration | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "fraction": 0 < self.fraction <= 1,
            "groups": self.groups is None or self.groups >= 1,
            "steps": self.steps >= 1,
        }
        check_options(self, bounds)
        if self.every is not None:
            check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """Squared gradients of all groups: at once, and then in intervals if there are any."""
        if self.every is None:
            return readings_from_start(_FISHER, self.steps, _ONE_EPOCH, "group")[:1]
        return readings_from_start(_FISHER, self.steps, self.every, "group")

    def notice(self) -> str:
        """That readings of frozen groups are dear."""
        return (
            f"fim runs backward through frozen groups, too, in the first {self.steps} steps"
            + ("" if self.every is None else f" and again {often(self.every)}")
            + ": this shows in short runs."
        )

    def init(self, groups: LayerGroups) -> State:
        """The head alone trains until the first ranking."""
        return _waiting("fim", backbone(groups))

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """All but the first of the ranking frozen."""
        if (values := new_reading(state, event, _FISHER)) is not None:
            state = {**state, **self._ranked(groups, values), "seen": event.sampled[_FISHER]}
        return freeze_only(groups, state["frozen"], state["why"]), state

    def _ranked(self, groups: LayerGroups, values: Mapping[str, float]) -> State:
        names = backbone(groups)
        scores = finite(names, values)
        if not any(scores.values()):
            return {}
        if self.normalise:
            scores = {n: v / max(1, groups[n].parameter_count) for n, v in scores.items()}
        # Two fifths of five groups are two, whatever the rounding of 0.4.
        share = math.floor(Fraction(str(self.fraction)) * len(names))
        count = max(1, share) if self.groups is None else self.groups
        order = sorted(scores, key=lambda name: -scores[name])
        train, total = set(order[:count]), sum(scores.values())
        held = sum(scores[name] for name in order[:count]) / total
        why = (
            f"fim: {len(train)} of {len(names)} groups train, which hold {held:.0%} of the Fisher "
            f"information; most is in {order[0]}"
        )
        return {"frozen": [name for name in names if name not in train], "why": why}


def _waiting(name: str, units: Iterable[str]) -> State:
    why = f"{name}: the head alone trains until the first reading"
    return {"seen": None, "frozen": list(units), "why": why}


def _units(groups: LayerGroups, per: Unit) -> list[str]:
    """What is judged: the groups of the backbone, or their parameters."""
    names = backbone(groups)
    if per == "group":
        return names
    return [p.name for name in names for p in groups[name].parameters]


def _below(
    name: str, what: str, units: list[str], values: Mapping[str, float], threshold: float
) -> State:
    """What freezes: units below a share of the largest value. Nothing known, nothing changes."""
    largest = max(values.values(), default=0.0)
    if not largest:
        return {}
    frozen = [u for u in units if values.get(u, 0.0) < threshold * largest]
    why = (
        f"{name}: {len(frozen)} of {len(units)} frozen, their {what} is below {threshold:g} of the "
        f"largest, {largest:.3g}"
    )
    return {"frozen": frozen, "why": why}


def _frozen_plan(groups: LayerGroups, state: State, per: Unit) -> FreezePlan:
    if per == "group":
        return freeze_only(groups, state["frozen"], state["why"])
    return freeze_parameters(groups, state["frozen"], reason=state["why"])
