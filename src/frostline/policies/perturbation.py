"""Policies that decide by changes of weights: what moves in circles, or hardly, is frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import (
    NORM_SHIFTS,
    backbone,
    choice,
    freeze_only,
    freeze_parameters,
    new_reading,
    often,
)
from frostline.policy import Event, Policy, State
from frostline.signals import Need

__all__ = ["APF", "SlimFit"]

_ONE_STEP = Duration.parse("1st")
_ONE_PERCENT = Duration.parse("1%")
_PERTURBATION = "effective_perturbation"
_RELATIVE = "relative_weight_change"


@dataclass(frozen=True, slots=True)
class APF(Policy):
    """Freeze groups whose weights move in circles, longer each time, and test them again (APF).

    P = sum |E[d]| / sum E|d| over a group's changes of weights d from check to check, with moving
    averages of 0.99: 1 for a steady course, near 0 for oscillation. At a check, a training group
    with P < `threshold` gets a freezing period one check longer than before and is frozen for that
    long; one with P >= `threshold` has its period halved. After its period a group trains until
    the next check, which tests it.

    Attributes:
        threshold: on P, in (0, 1]; 0.05, the paper's.
        crowded: while more than this share of the backbone's weights is frozen, each check
            halves the threshold, in [0, 1]; 0.8, the paper's.
        every: interval between checks; "1%", ours. P is 1 at the first check, and of weights that
            jitter about a point it falls roughly as one over the number of checks.

    References:
        Chen et al. 2021, "Communication-Efficient Federated Learning with Adaptive Parameter
        Freezing", ICDCS. The paper freezes single weights, by rolling them back, to save
        communication; here whole groups freeze, which saves computation. Its random extra
        freezing is not included.

    Example:
        >>> APF().needs()[0].signal
        'effective_perturbation'
    """

    threshold: float = 0.05
    crowded: float = 0.8
    every: Duration = _ONE_PERCENT

    def __post_init__(self) -> None:
        if not (0 < self.threshold <= 1 and 0 <= self.crowded <= 1 and self.every.value):
            raise PolicyError(
                f"freeze below a perturbation of {self.threshold}, crowded from {self.crowded}, "
                f"every {self.every}",
                found="a value out of its range",
                fix="for example threshold=0.05,crowded=0.8,every=1%",
            )

    def needs(self) -> tuple[Need, ...]:
        """The effective perturbation at every check."""
        return (Need(_PERTURBATION, self.every),)

    def notice(self) -> str:
        """That readings are dear."""
        return (
            f"apf goes through all weights {often(self.every)} and keeps three more copies of "
            "them: this shows in short runs, and every= sets how often."
        )

    def init(self, groups: LayerGroups) -> State:
        """Nothing frozen, all periods 0."""
        del groups
        return {
            "seen": None,
            "check": 0,
            "threshold": self.threshold,
            "periods": {},
            "wakes": {},
            "why": "apf: nothing frozen yet",
        }

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The groups whose freezing period lasts."""
        if (values := new_reading(state, event, _PERTURBATION)) is not None:
            state = self._checked(groups, state, values)
            state["seen"] = event.sampled[_PERTURBATION]
        return freeze_only(groups, state["wakes"], state["why"]), state

    def _checked(self, groups: LayerGroups, state: State, values: Mapping[str, float]) -> State:
        check, threshold = state["check"] + 1, state["threshold"]
        names, periods = backbone(groups), dict(state["periods"])
        wakes = {name: at for name, at in state["wakes"].items() if at > check}
        for name in names:
            value = values.get(name, math.nan)
            if name in state["wakes"] or not math.isfinite(value):
                continue  # frozen since the last check, or just awake: nothing to test
            quiet = value < threshold
            periods[name] = periods.get(name, 0) + 1 if quiet else periods.get(name, 0) // 2
            if quiet:
                wakes[name] = check + periods[name]
        if self._share(groups, wakes) > self.crowded:
            threshold /= 2
        why = (
            f"apf: {len(wakes)} of {len(names)} groups frozen at check {check}, "
            f"threshold {threshold:.3g}"
        )
        return {
            "check": check,
            "threshold": threshold,
            "periods": periods,
            "wakes": wakes,
            "why": why,
        }

    def _share(self, groups: LayerGroups, frozen: Mapping[str, int]) -> float:
        total = sum(groups[name].parameter_count for name in groups.backbone)
        return sum(groups[name].parameter_count for name in frozen) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class SlimFit(Policy):
    """Train only the weights that changed most when they last trained, step by step (SlimFit).

    Each weight of two or more dimensions and each norm's weight, outside the head, has as distance
    the mean of |change| / |weight| over its last interval of training. After every reading the
    share `frozen` of them with the smallest distances is frozen; those that never trained come
    first, in random order. Biases always train.

    Attributes:
        frozen: share of these weights that is frozen, rounded down, in [0, 1); 0.9, the paper's.
        every: interval between choices; "1st", the paper's. Longer ones spare the changes of plan.
        seed: of the order of the first visits.

    References:
        Ardakani et al. 2024, "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models
        Using Training Dynamics", NAACL, arXiv:2305.18513. It also compresses activations, which
        is not done here. A frozen weight keeps its distance and its optimizer state, however
        stale. The change of a step shows only at the next, so with every=1st a weight trains for
        two steps before it is judged.

    Example:
        >>> SlimFit(frozen=0.5, every=Duration.parse("10st")).seed
        0
    """

    frozen: float = 0.9
    every: Duration = _ONE_STEP
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.frozen < 1 and self.every.value):
            raise PolicyError(
                f"freeze a share of {self.frozen} every {self.every}",
                found="a value out of its range",
                fix="a share in [0, 1), for example frozen=0.9,every=1st",
            )

    def needs(self) -> tuple[Need, ...]:
        """The relative change of every parameter that trains."""
        return (Need(_RELATIVE, self.every, per="parameter"),)

    def notice(self) -> str:
        """That changes of plan are dear."""
        return (
            f"slimfit changes what is frozen {often(self.every)}: each change and each reading "
            "takes time, and proving it more; it saves memory rather than time."
        )

    def init(self, groups: LayerGroups) -> State:
        """No distance known; the order of the first visits."""
        order = [
            p.name
            for name in backbone(groups)
            for p in groups[name].parameters
            if len(p.shape) > 1 or (p.kind == "norm" and p.own_name not in NORM_SHIFTS)
        ]
        choice(self.seed).shuffle(order)
        first = self._chosen(order, {})
        return {"seen": None, "order": order, "distance": {}, "before": first, "trained": first}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """All but the chosen weights and the biases frozen."""
        if (changes := new_reading(state, event, _RELATIVE)) is not None:
            state = self._judged(state, event, changes)
            state["seen"] = event.sampled[_RELATIVE]
        trained, order = set(state["trained"]), state["order"]
        held = [name for name in order if name not in trained]
        why = f"slimfit: {len(trained)} of {len(order)} weights train, those that changed most"
        return freeze_parameters(groups, held, reason=why), state

    def _judged(self, state: State, event: Event, changes: Mapping[str, float]) -> State:
        # A reading is taken before the update of its step. In an interval of one step it shows
        # the step before, which says nothing of a weight that was frozen then.
        current = state["trained"]
        if self.every.steps(event.progress) <= 1:
            before = set(state["before"])
            valid = [name for name in current if name in before]
        else:
            valid = current
        distance = dict(state["distance"])
        for name in valid:
            if math.isfinite(changes.get(name, math.nan)):
                distance[name] = changes[name]
        return {
            "order": state["order"],
            "distance": distance,
            "before": current,
            "trained": self._chosen(state["order"], distance),
        }

    def _chosen(self, order: list[str], distance: Mapping[str, float]) -> list[str]:
        """The weights with the largest distances, those without one first."""
        # Exact: 29 % of 100 weights are 29, whatever the rounding of 0.29.
        count = len(order) - math.floor(Fraction(str(self.frozen)) * len(order))
        return sorted(order, key=lambda name: -distance.get(name, math.inf))[:count]
