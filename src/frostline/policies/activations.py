"""Policies that decide by activations: a group whose outputs have settled is frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import (
    backbone,
    check_options,
    freeze_first,
    freeze_only,
    new_reading,
    often,
)
from frostline.policy import Event, Policy, State
from frostline.signals import Need

__all__ = ["ETuner", "Egeria"]

_EGERIA_INTERVAL = Duration.parse("0.4%")
_TWENTIETH = Duration.parse("5%")
_CKA = "cka_pretrained"
#: Readings whose slopes set a group's tolerance.
_FIRST = 3
#: No unfreezing by the learning rate after this share of the run: every schedule ends low.
_LATE = 0.9
#: A rate of 0.1 * 0.1 is no tenth of 0.1 in floats, and the mean of equal values is not quite one.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Egeria(Policy):
    """Freeze the shallowest training group once its outputs drift no more (Egeria).

    Plasticity is the similarity-preserving loss between what a group puts out for a fixed batch
    and what a reference model puts out. Only the shallowest group that trains is judged, on
    readings since it became that: m is the mean of the last W readings, s the least-squares slope
    of the last W values of m, T = `tolerance` times the largest |s| of its first three. After W
    readings in a row with |s| <= T it is frozen and the next group's turn begins. All groups
    unfreeze when the learning rate falls, and W halves.

    Attributes:
        every: interval between readings; "0.4%", the paper's 300 of 78,000 iterations.
        window: W, in readings, >= 2; 10, the paper's.
        tolerance: share of the first slopes, > 0; 0.2, the paper's.
        bootstrap: nothing is judged until the mean training loss of an interval differs from
            that of the interval before by less than this share; 0.1, the paper's. None judges
            from the start, and needs no loss. A loop of your own hands it over with
            `driver.sample(loss=...)`.
        reference: "int8", the model of an earlier moment in 8-bit weights, the paper's; "snapshot",
            the same in full; "pretrained", the very first. Here the reference runs only when it is
            taken, so 8 bits save nothing.
        refresh: how often the reference is taken anew, at the next reading; readings go on from
            the value before, so that a new reference is no drift. None keeps the first, that of
            the policy's first step; ours (the paper refreshes, at a period we do not know).
        unfreeze: "step", when the rate falls by `drop` or more from one reading to the next, which
            only step schedules do; "decay", when it has fallen by `drop` since the last freeze,
            however slowly; "never". The paper's rule is "decay" without a limit, made for steps.
            None of them acts in the last tenth of a run, where every schedule is low; ours.
        drop: factor of that fall, > 1; 10, the paper's.
        max_unfreezes: how often "decay" acts in a run, >= 0; 1, ours.

    References:
        Wang et al. 2023, "Egeria: Efficient DNN Training with
        Knowledge-Guided Layer Freezing", EuroSys, algorithm 1 and equation 2. The algorithm
        compares the signed slope, so that plasticity that keeps falling counts as settled; here
        its size counts. The first slopes, before the window is full, are over what there is.

    Example:
        >>> [need.signal for need in Egeria().needs()]
        ['sp_loss_int8', 'loss', 'learning_rate']
    """

    every: Duration = _EGERIA_INTERVAL
    window: int = 10
    tolerance: float = 0.2
    bootstrap: float | None = 0.1
    reference: Literal["int8", "snapshot", "pretrained"] = "int8"
    refresh: Duration | None = None
    unfreeze: Literal["step", "never", "decay"] = "step"
    drop: float = 10.0
    max_unfreezes: int = 1

    def __post_init__(self) -> None:
        bounds = {
            "every": bool(self.every.value),
            "window": self.window >= 2,
            "tolerance": self.tolerance > 0,
            "bootstrap": self.bootstrap is None or self.bootstrap > 0,
            "refresh": self.refresh is None or bool(self.refresh.value),
            "drop": self.drop > 1,
            "max_unfreezes": self.max_unfreezes >= 0,
        }
        check_options(self, bounds)
        if self.refresh is not None and self.reference == "pretrained":
            raise PolicyError(
                f"refresh the reference every {self.refresh}",
                found="reference=pretrained, which is that of the start",
                fix="reference=snapshot",
            )

    def needs(self) -> tuple[Need, ...]:
        """Similarity to the reference; loss and rate where a rule looks at them."""
        needs = [Need(self._signal, self.every, refresh=self.refresh)]
        if self.bootstrap is not None:
            needs.append(Need("loss", self.every, steps=None))
        if self.unfreeze != "never":
            needs.append(Need("learning_rate", self.every))
        return tuple(needs)

    def notice(self) -> str:
        """That readings are dear."""
        return _readings_are_dear("egeria", self.every)

    def init(self, groups: LayerGroups) -> State:
        """Nothing frozen, before or after the bootstrap."""
        del groups
        return {
            "seen": None,
            "loss": None,
            "judging": self.bootstrap is None,
            "frozen": 0,
            "rate": None,
            "frozen_rate": None,
            "unfreezes": 0,
            "window": self.window,
            "why": "egeria: nothing frozen yet",
            **_FRESH,
        }

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The prefix so far; longer, or none, after a reading that says so."""
        if (losses := new_reading(state, event, self._signal)) is not None:
            state = {**state, "seen": event.sampled[self._signal]}
            state |= self._rate(state, event) or self._turn(groups, state, event, losses)
        return freeze_first(groups, state["frozen"], state["why"]), state

    @property
    def _signal(self) -> str:
        return f"sp_loss_{self.reference}"

    def _rate(self, state: State, event: Event) -> State:
        """What changes when the learning rate fell far enough; empty if it did not."""
        rate, before = _of_all(event, "learning_rate"), state["rate"]
        if rate is None or self.unfreeze == "never":
            return {}
        state["rate"] = rate
        limited = self.unfreeze == "decay"
        high = state["frozen_rate"] if limited else before
        if not state["frozen"] or not high or rate * self.drop > high * (1 + _ROUNDING):
            return {}
        if limited and state["unfreezes"] >= self.max_unfreezes:
            return {}
        if (event.progress.fraction or 0) >= _LATE:
            return {}
        why = f"egeria: all unfrozen, the learning rate fell from {high:.3g} to {rate:.3g}"
        return {
            "frozen": 0,
            "unfreezes": state["unfreezes"] + 1,
            "window": max(2, state["window"] // 2),
            "why": why,
            **_FRESH,
        }

    def _turn(
        self, groups: LayerGroups, state: State, event: Event, losses: Mapping[str, float]
    ) -> State:
        """What changes by a reading: the bootstrap ends, a series grows, or a group freezes."""
        if not state["judging"]:
            now, before = _of_all(event, "loss"), state["loss"]
            if now is None:
                return {}
            calm = before is not None and abs(now - before) < (self.bootstrap or 0) * abs(before)
            return {"loss": now, "judging": calm}
        names = backbone(groups)
        # What never runs puts out nothing to judge: it is frozen along with the next that does.
        left = (i for i in range(state["frozen"], len(names)) if groups[names[i]].calls)
        place = next(left, None)
        if place is None or not math.isfinite(value := losses.get(names[place], math.nan)):
            return {}
        series = self._grown(state, value, self._reference_at(event))
        if series["stale"] < state["window"]:
            return series
        slope, limit = series["slope"], self.tolerance * max(series["first"])
        return {
            "frozen": place + 1,
            "frozen_rate": state["rate"],
            "why": (
                f"egeria: {place + 1} of {len(names)} groups frozen; the slope of {names[place]}"
                f" was within {limit:.3g} for {state['window']} readings, at last {slope:.3g}"
            ),
            **_FRESH,
        }

    def _grown(self, state: State, value: float, reference: int) -> State:
        """The series of the group in turn, with one more reading."""
        window, readings, offset = state["window"], state["readings"], state["offset"]
        if readings and reference != state["reference"]:
            offset = readings[-1]  # to a new reference all is similar: go on from where we were
        readings = [*readings, value + offset][-window:]
        means = [*state["means"], sum(readings) / len(readings)][-window:]
        slope, first, stale = _slope(means), state["first"], state["stale"]
        if len(first) < _FIRST:
            first = [*first, abs(slope)] if len(means) > 1 else first
        else:
            # What stands still has a slope in the last bits of its mean.
            limit = max(self.tolerance * max(first), _ROUNDING * abs(means[-1]))
            stale = stale + 1 if abs(slope) <= limit else 0
        return {
            "readings": readings,
            "means": means,
            "first": first,
            "stale": stale,
            "offset": offset,
            "reference": reference,
            "slope": slope,
        }

    def _reference_at(self, event: Event) -> int:
        """A number that differs between readings against different references."""
        if self.refresh is None:
            return 0
        every = max(1, self.every.steps(event.progress))
        before = event.progress.step // every * every - every
        return before // max(1, self.refresh.steps(event.progress))


@dataclass(frozen=True, slots=True)
class ETuner(Policy):
    """Freeze each group once its similarity to the initial model stopped changing (SimFreeze).

    Similarity is linear CKA between what a group puts out for a fixed batch and what it put out
    before training. A group is frozen after `patience` changes in a row, from one reading to the
    next, of less than `threshold`, relatively; each group by itself, in no order. A frozen group
    is read on, and trains again when its similarity has moved by `unfreeze` since it was frozen,
    as it can when shallower groups train.

    Attributes:
        threshold: relative change that counts as none, > 0; 0.01. We know the paper's value, about
            one percent, from secondary sources only.
        patience: changes in a row, >= 1; 3, ours.
        unfreeze: relative change since the freeze that unfreezes, > 0; 0.05, ours. None freezes
            for good.
        every: interval between readings; "5%", ours.

    References:
        ETuner 2024, arXiv:2401.16694, of which this is the freezing part, SimFreeze. The paper
        tests frozen layers again when the data change; here the probe batch is the first one of
        training, so a change of data shows only in what it does to the weights.

    Example:
        >>> ETuner(threshold=0.02).patience
        3
    """

    threshold: float = 0.01
    patience: int = 3
    unfreeze: float | None = 0.05
    every: Duration = _TWENTIETH

    def __post_init__(self) -> None:
        bounds = {
            "threshold": self.threshold > 0,
            "patience": self.patience >= 1,
            "unfreeze": self.unfreeze is None or self.unfreeze > 0,
            "every": bool(self.every.value),
        }
        check_options(self, bounds)

    def needs(self) -> tuple[Need, ...]:
        """Similarity to the initial model, of frozen groups, too: it needs no gradients."""
        return (Need(_CKA, self.every),)

    def notice(self) -> str:
        """That readings are dear."""
        return _readings_are_dear("etuner", self.every)

    def init(self, groups: LayerGroups) -> State:
        """Nothing frozen, no similarity known."""
        del groups
        why = "etuner: nothing frozen yet"
        return {"seen": None, "last": {}, "calm": {}, "frozen": {}, "why": why}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The groups whose similarity rests."""
        if (values := new_reading(state, event, _CKA)) is not None:
            state = self._judged(backbone(groups), state, values)
            state["seen"] = event.sampled[_CKA]
        return freeze_only(groups, state["frozen"], state["why"]), state

    def _judged(self, names: list[str], state: State, values: Mapping[str, float]) -> State:
        last, calm, frozen = dict(state["last"]), dict(state["calm"]), dict(state["frozen"])
        for name in names:
            value = values.get(name, math.nan)
            if not math.isfinite(value):
                continue
            if name in frozen:
                if self.unfreeze is not None and _moved(frozen[name], value, self.unfreeze):
                    del frozen[name]
                    calm[name] = 0
            elif name in last:
                rests = not _moved(last[name], value, self.threshold)
                calm[name] = calm.get(name, 0) + 1 if rests else 0
                if calm[name] >= self.patience:
                    frozen[name] = value
            last[name] = value
        why = (
            f"etuner: {len(frozen)} of {len(names)} groups frozen, the similarity of each changed "
            f"by less than {self.threshold:.2%} {self.patience} times in a row"
        )
        return {"last": last, "calm": calm, "frozen": frozen, "why": why}


_FRESH: State = {
    "readings": [],
    "means": [],
    "first": [],
    "stale": 0,
    "offset": 0.0,
    "reference": 0,
    "slope": 0.0,
}


def _slope(values: Sequence[float]) -> float:
    """Of the least-squares line through values at 0, 1, 2, ...; 0 for a single one."""
    middle = (len(values) - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * v for i, v in enumerate(values)) / spread if spread else 0.0


def _moved(before: float, now: float, share: float) -> bool:
    return now != before and abs(now - before) >= share * abs(before)


def _of_all(event: Event, signal: str) -> float | None:
    """The largest value over the groups, None where there is none."""
    values = [v for v in event.signals.get(signal, {}).values() if math.isfinite(v)]
    return max(values, default=None)


def _readings_are_dear(name: str, every: Duration) -> str:
    return (
        f"{name} runs the model forward over a probe batch {often(every)}, which shows in short "
        "runs: every= sets how often."
    )
