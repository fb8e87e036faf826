"""Policies that weigh what a group would learn against what training it costs, in measured time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from frostline.clock import Duration
from frostline.cost import check_measured
from frostline.errors import PolicyError
from frostline.groups import GroupCost, LayerGroup, LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import (
    backbone,
    check_interval,
    choice,
    finite,
    freeze_first,
    freeze_only,
    new_reading,
    often,
    readings_from_start,
)
from frostline.policy import Event, Policy, State
from frostline.signals import Need

__all__ = ["ALSAR", "Elastic", "most_important", "prefix_seconds"]

_THIRD = Duration.parse("34%")
_ONE_PERCENT = Duration.parse("1%")
_IMPORTANCE, _PAIR = "update_importance", 2
_FISHER, _NORM = "fisher_ema", "gradient_norm"
#: Of the moving average of the head's squared gradient, by reading.
_DECAY = 0.9
#: Sums of seconds are rounded in floats; a time that just fits must fit.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Elastic(Policy):
    """Train the groups whose updates save the most loss within a time budget (ElasticTrainer).

    The importance of a group is I = -sum g dw: dw the update the optimizer would make on one
    batch, g the gradient of the next. After each reading those groups train that maximise the
    sum of I while the predicted step, sum F + sum over depth > m of X + sum over trained of
    (W + O), m being the shallowest that trains, takes at most `rho` times a step of full
    fine-tuning. The best set is found by dynamic programming over times in 1000 units, rounded up,
    so that the budget is kept. Groups of negative importance are frozen; the head always trains.

    Attributes:
        rho: budget as a share of the measured time of a full step, forward pass included, in
            (0, 1]; 0.533, ElasticTrainer's. It turns this into a share of the backward pass by
            assuming that it takes twice the forward pass; here both are measured. GreenTrainer's
            is 0.5.
        every: time between readings after the first, which is taken in the first two steps, in
            which everything trains. "34%": the paper chooses at epochs 0, 4 and 8 of 12, and
            with exactly a third there would be a choice in vain at the end. GreenTrainer's is
            "2ep" of five epochs.

    References:
        Huang, Yang & Gao 2023, "ElasticTrainer: Speeding Up On-Device Training with Runtime
        Elastic Tensor Selection", MobiSys; GreenTrainer 2024, ICLR, the same choice by FLOPs. They
        choose single tensors. Their probe really updates and restores only the weights, so that
        the optimizer's momentum moves; here the update is computed and never made. Their
        importances are divided by the largest magnitude, which does not change the choice.

    Example:
        >>> Elastic(rho=0.5).needs()[1].every
        Duration(value=Fraction(34, 1), unit='%')
    """

    rho: float = 0.533
    every: Duration = _THIRD

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise PolicyError(
                f"train in {self.rho} of the time of full fine-tuning",
                found="a share outside (0, 1]",
                fix="for example rho=0.5",
            )
        check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """The importance of every group, frozen or not: at once, and then in intervals."""
        return readings_from_start(_IMPORTANCE, _PAIR, self.every)

    def notice(self) -> str:
        """That readings are dear."""
        return (
            f"elastic runs backward through everything in the two steps of a reading, "
            f"{often(self.every)}, and works out an update in each: this shows in short runs."
        )

    def init(self, groups: LayerGroups) -> State:
        """Everything trains; raises where costs were never measured."""
        check_measured(groups, "train within a time budget")
        why = "elastic: everything trains until the first reading"
        return {"seen": None, "frozen": [], "why": why}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """All but the chosen groups frozen."""
        if (values := new_reading(state, event, _IMPORTANCE)) is not None:
            state = {**state, **self._chosen(groups, values), "seen": event.sampled[_IMPORTANCE]}
        return freeze_only(groups, state["frozen"], state["why"]), state

    def _chosen(self, groups: LayerGroups, values: Mapping[str, float]) -> State:
        names = backbone(groups)
        body = [groups[name] for name in names]
        gains = [_gain(group, values) for group in body]
        if not any(gains):  # a learning rate of 0, as in warm-up, says nothing
            return {}
        times, carried = prefix_seconds(groups), _carried_s(groups, body)
        full, base, through = times[0], times[-1], [s - carried[-1] for s in carried[:-1]]
        update, budget = [_update_s(group) for group in body], self.rho * times[0] - times[-1]
        train = most_important(gains, update, through, budget)
        step = base + sum(update[i] for i in train) + (through[min(train)] if train else 0.0)
        held = sum(gains[i] for i in train) / (sum(g for g in gains if g > 0) or 1.0)
        why = (
            f"elastic: {len(train)} of {len(names)} groups train, {held:.0%} of the importance, "
            f"step predicted {step / full:.3f} of full, budget {self.rho:g}"
        )
        if budget < 0:
            why += ", which the head alone exceeds"
        return {"frozen": [n for i, n in enumerate(names) if i not in train], "why": why}


@dataclass(frozen=True, slots=True)
class ALSAR(Policy):
    """Freeze the prefix that leaves the most Fisher information per unit of time (aL-SAR).

    F_i is a moving average of the squared, clipped gradient of group i of the backbone, C the
    measured time of a full step, S(n) what freezing the first n groups saves of it. With
    score(n) = C / (C - S(n)) * (sum F - sum of the first n F) / sum F, the n that maximises it is
    frozen. By batch, it is the n that maximises
    z (sum F - sum of the first n F) / sum F + S(n) / C * max score, z being the head's squared
    gradient over its moving average: a batch that teaches more freezes less. With z = 1 both
    choose the same. There is no threshold, and what is frozen may train again at any decision.

    Attributes:
        every: interval between decisions. "1%", ours; the paper decides at each batch, "1st", but
            a change of plan and its proof take time.
        by_batch: weigh the last batch's gradient, the paper's full rule. Off, ours: here the plan
            is made before the batch it is for is seen, so that z is that of the batch before.
        unfreeze_rate: probability that everything trains for an interval, which keeps the Fisher
            information of frozen groups fresh, in [0, 1]; 0.25, the public code's. With 0 the
            readings run backward through frozen groups instead.
        seed: of these intervals.

    References:
        Seo et al. 2025, "Budgeted Online Continual Learning by Adaptive Layer Freezing and
        Frequency-based Sampling", ICLR, arXiv:2410.15143. It counts FLOPs; here measured seconds
        count. It takes z from the gradient at the last layer's input; here the gradient of the
        head's own parameters stands in. Everything trains until the first reading.

    Example:
        >>> [need.signal for need in ALSAR(by_batch=True).needs()]
        ['fisher_ema', 'gradient_norm']
    """

    every: Duration = _ONE_PERCENT
    by_batch: bool = False
    unfreeze_rate: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.unfreeze_rate <= 1:
            raise PolicyError(
                f"unfreeze everything with probability {self.unfreeze_rate}",
                found="a number outside [0, 1]",
                fix="for example unfreeze_rate=0.25",
            )
        check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """Fisher information, and the gradient where it is weighed."""
        fisher = Need(_FISHER, self.every, frozen_too=not self.unfreeze_rate)
        return (fisher, Need(_NORM, self.every)) if self.by_batch else (fisher,)

    def notice(self) -> str:
        """That frequent decisions are dear."""
        return (
            f"al-sar reads gradients and may change what is frozen {often(self.every)}: each "
            "reading and each change takes time, and proving it more; every= sets how often."
        )

    def init(self, groups: LayerGroups) -> State:
        """Nothing frozen; raises where costs were never measured."""
        check_measured(groups, "freeze by information per unit of time")
        return {
            "seen": None,
            "turn": 0,
            "fisher": {},
            "usual": None,
            "frozen": 0,
            "why": "al-sar: everything trains until the first reading",
        }

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The prefix of the last decision."""
        if (values := new_reading(state, event, _FISHER)) is not None:
            state = {**state, **self._judged(groups, state, event, values)}
            state["seen"] = event.sampled[_FISHER]
        return freeze_first(groups, state["frozen"], state["why"]), state

    def _judged(
        self, groups: LayerGroups, state: State, event: Event, values: Mapping[str, float]
    ) -> State:
        names, turn = backbone(groups), state["turn"] + 1
        fisher = state["fisher"] | finite(names, values)
        weight, usual = self._weight(groups, state, event)
        known: State = {"turn": turn, "fisher": fisher, "usual": usual}
        if choice(self.seed, turn).random() < self.unfreeze_rate:
            why = "al-sar: everything trains, to read what frozen groups would learn"
            return known | {"frozen": 0, "why": why}
        kept = _kept([fisher.get(n, 0.0) for n in names])
        times = prefix_seconds(groups)
        scores = [
            share * times[0] / t if t else share for share, t in zip(kept, times, strict=True)
        ]
        best = max(scores)
        gains = [
            weight * share + (1 - t / times[0] if times[0] else 0.0) * best
            for share, t in zip(kept, times, strict=True)
        ]
        frozen = max(range(len(gains)), key=lambda n: gains[n] if self.by_batch else scores[n])
        why = (
            f"al-sar: the first {frozen} of {len(names)} groups hold {1 - kept[frozen]:.1%} of the "
            f"Fisher information and take {1 - times[frozen] / (times[0] or 1.0):.1%} of the time"
        )
        if self.by_batch:
            why += f"; the batch weighs {weight:.2f}"
        return known | {"frozen": frozen, "why": why}

    def _weight(
        self, groups: LayerGroups, state: State, event: Event
    ) -> tuple[float, float | None]:
        """z, and the moving average of the head's squared gradient."""
        usual = state["usual"]
        if not self.by_batch:
            return 1.0, usual
        norms = event.signals.get(_NORM, {})
        found = [norms.get(name, 0.0) for name in sorted(groups.head)]
        now = sum(n * n for n in found)  # a power would raise where this is infinite
        if not math.isfinite(now):
            return 1.0, usual
        weight = now / usual if usual else 1.0
        return weight, now if usual is None else _DECAY * usual + (1 - _DECAY) * now


def most_important(
    gains: Sequence[float],
    update_s: Sequence[float],
    through_s: Sequence[float],
    budget_s: float,
    *,
    units: int = 1000,
) -> frozenset[int]:
    """The places, by depth, of the groups to train: the largest sum of gains within a budget.

    A set costs the `update_s` of its members and the `through_s` of its shallowest. One pass from
    deep to shallow: the deeper groups fill a knapsack, and each group in turn is tried as the
    shallowest over what the knapsack holds in the time that it leaves. The work grows with the
    number of groups times `units`.

    Args:
        gains: what training a group gains; what gains nothing is left out.
        update_s: seconds to train a group, >= 0.
        through_s: seconds to carry the gradient down to a group, falling with depth.
        budget_s: the limit.
        units: times are rounded up to this part of the budget; the result is never above the
            budget, and at least as good as the best within (1 - n / units) of it.

    Example:
        >>> sorted(most_important([5, 1, 3], [1, 1, 1], [2, 1, 0], 4))
        [0, 2]
    """
    useful = [i for i, gain in enumerate(gains) if gain > 0]
    unit = budget_s / units
    if unit <= 0 or not useful:
        return frozenset()
    if sum(update_s[i] for i in useful) + through_s[useful[0]] <= budget_s * (1 + _ROUNDING):
        return frozenset(useful)  # rounding up might leave one out
    # By time used, in units: the largest gain, and the set that has it, one bit per group.
    gain, held = [0.0] * (units + 1), [0] * (units + 1)
    best, chosen = 0.0, 0
    for i in reversed(useful):
        room = math.floor((budget_s - through_s[i] - update_s[i]) / unit + _ROUNDING)
        if room < 0:
            continue  # nor does it fit beside a shallower one, which only adds to the cost
        if gains[i] + gain[room] > best:
            best, chosen = gains[i] + gain[room], held[room] | 1 << i
        size = math.ceil(update_s[i] / unit - _ROUNDING)
        for t in range(units, size - 1, -1):
            if gain[t - size] + gains[i] > gain[t]:
                gain[t] = gain[t - size] + gains[i]
                held[t] = held[t - size] | 1 << i
    return frozenset(i for i in useful if chosen >> i & 1)


def prefix_seconds(groups: LayerGroups) -> list[float]:
    """Predicted seconds of a step with the first 0, 1, 2, ... groups of the backbone frozen.

    The same as `frostline.cost.predicted_step_s` of each of these plans, in one pass.

    Example:
        >>> from frostline.testing import example_groups
        >>> [round(s, 3) for s in prefix_seconds(example_groups(3))]
        [0.083, 0.062, 0.041]
    """
    body = [groups[name] for name in backbone(groups)]
    head = sum(_cost(g).forward_s + _learn_s(g) for g in groups if g.name in groups.head)
    frozen = accumulate((_frozen_forward_s(g) for g in body), initial=0.0)
    trained = accumulate((_cost(g).forward_s + _learn_s(g) for g in reversed(body)), initial=0.0)
    parts = zip(frozen, reversed(list(trained)), _carried_s(groups, body), strict=True)
    return [head + sum(part) for part in parts]


def _gain(group: LayerGroup, values: Mapping[str, float]) -> float:
    """The importance of a group; 0 where there is nothing to train or no reading."""
    value = values.get(group.name, 0.0)
    return value if group.parameters and math.isfinite(value) else 0.0


def _carried_s(groups: LayerGroups, body: Sequence[LayerGroup]) -> list[float]:
    """Seconds to carry the gradient down to each of these groups, and to the head at last."""
    head = min(groups[name].depth for name in groups.head)
    deeper = [0.0, *accumulate(_cost(g).input_grad_s for g in reversed(groups.items))]
    ends = [min(g.depth, head) for g in body] + [head]
    return [deeper[len(groups) - 1 - end] for end in ends]


def _learn_s(group: LayerGroup) -> float:
    cost = _cost(group)
    return cost.weight_grad_s + cost.optimizer_s


def _frozen_forward_s(group: LayerGroup) -> float:
    cost = _cost(group)
    return cost.forward_s if cost.frozen_forward_s is None else cost.frozen_forward_s


def _update_s(group: LayerGroup) -> float:
    """What a step takes longer when the group trains, but for carrying the gradient to it."""
    return max(0.0, _learn_s(group) + _cost(group).forward_s - _frozen_forward_s(group))


def _kept(values: Sequence[float]) -> list[float]:
    """Share of the sum that is left without the first 0, 1, 2, ... values; all where it is 0."""
    left = [*accumulate(reversed(values), initial=0.0)][::-1]
    return [part / left[0] if left[0] else 1.0 for part in left]


def _cost(group: LayerGroup) -> GroupCost:
    return group.cost or GroupCost()
