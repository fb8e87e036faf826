"""What a plan costs: step time predicted from measured group costs, and the bounds it obeys.

The model: a step runs every forward; carries the gradient through every group deeper than the
shallowest one that trains; computes weight gradients and updates for what trains. In symbols,
with m the frontier, T = sum F + sum over depth > m of X + sum over trained of (W + O).
"""

from __future__ import annotations

from dataclasses import dataclass

from frostline.errors import PlanError, PolicyError, UsageError
from frostline.groups import GroupCost, LayerGroup, LayerGroups
from frostline.plan import FreezePlan

__all__ = [
    "GroupReport",
    "backward_share",
    "check_measured",
    "group_reports",
    "plan_line",
    "predicted_forward_s",
    "predicted_step_s",
    "prefix_bound",
    "trained_share",
]

_FULL = FreezePlan()


def check_measured(groups: LayerGroups, asked: str) -> None:
    """Raise unless every group has a measured cost: for policies that decide by cost.

    Args:
        groups: the layer groups.
        asked: what the costs are wanted for, for the message.

    Raises:
        PolicyError: some group was never measured.
    """
    if not groups.measured:
        raise PolicyError(
            asked,
            found="layer groups without measured costs",
            fix="measure first: measure_costs(model, groups)",
        )


def predicted_step_s(
    groups: LayerGroups, plan: FreezePlan, *, frozen_prefix_cached: bool = False
) -> float:
    """Seconds one training step takes under a plan, predicted from measured costs.

    Args:
        groups: groups with measured costs.
        plan: what is frozen.
        frozen_prefix_cached: leave out the forward pass of the frozen prefix.

    Raises:
        PlanError: the groups were never measured.

    Example:
        >>> cost = GroupCost(forward_s=1, input_grad_s=1, weight_grad_s=1)
        >>> groups = LayerGroups((LayerGroup("a", 0, (), cost=cost),
        ...                       LayerGroup("b", 1, (), cost=cost)))
        >>> predicted_step_s(groups, FreezePlan(frozen=frozenset({"a"})))
        3.0
    """
    frontier = plan.frontier(groups)
    forward = sum(
        _forward_s(g, plan) for g in groups if not (frozen_prefix_cached and g.depth < frontier)
    )
    update = sum(_cost(g).optimizer_s * _trained(g, plan) for g in groups)
    return forward + _backward_s(groups, plan) + update


def predicted_forward_s(groups: LayerGroups, plan: FreezePlan, *, below: int) -> float:
    """Seconds that the forward pass of the groups below a depth takes under a plan, as predicted.

    Args:
        groups: groups with measured costs.
        plan: what is frozen.
        below: groups of this depth and deeper are left out.

    Raises:
        PlanError: the groups were never measured.
    """
    return sum(_forward_s(g, plan) for g in groups if g.depth < below)


def backward_share(groups: LayerGroups, plan: FreezePlan) -> float:
    """Backward work under a plan as a share of full fine-tuning's, in [0, 1], from measured costs.

    Raises:
        PlanError: the groups were never measured.
    """
    full = _backward_s(groups, _FULL)
    return min(1.0, _backward_s(groups, plan) / full) if full else 0.0


def trained_share(groups: LayerGroups, plan: FreezePlan) -> float:
    """Parameters that train as a share of all, in [0, 1]."""
    total = groups.parameter_count
    return 1 - plan.frozen_count(groups) / total if total else 0.0


def prefix_bound(frozen_fraction: float, *, frozen_prefix_cached: bool = False) -> float:
    """Largest possible speed-up of a step when a prefix of this share of the forward is frozen.

    Assumes forward : input gradient : weight gradient = 1 : 1 : 1, as for matrix products.
    Uncached 3 / (3 - 2f); with the prefix cached 1 / (1 - f).

    Args:
        frozen_fraction: share f of the forward cost that is frozen, in [0, 1].
        frozen_prefix_cached: whether the frozen forward is skipped, too.

    Raises:
        UsageError: the fraction is outside [0, 1].

    Example:
        >>> prefix_bound(0.75)
        2.0
    """
    f = frozen_fraction
    if not 0 <= f <= 1:
        raise UsageError(
            f"bound the speed-up of a frozen fraction of {f}", found="a number outside [0, 1]"
        )
    if frozen_prefix_cached:
        return 1 / (1 - f) if f < 1 else float("inf")
    return 3 / (3 - 2 * f)


def plan_line(groups: LayerGroups, plan: FreezePlan) -> str:
    """A plan in one line for people, with the predicted step time where costs were measured.

    Example:
        >>> groups = LayerGroups((LayerGroup("a", 0, ()), LayerGroup("b", 1, ())))
        >>> plan_line(groups, FreezePlan())
        'frozen 0 of 2 groups: all 0 parameters train'
    """
    line = plan.summary(groups)
    full = predicted_step_s(groups, _FULL) if groups.measured and plan.frozen else 0.0
    if not full:
        return line
    return f"{line}, step predicted {predicted_step_s(groups, plan) / full:.2f} of full"


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One row of `frostline inspect`.

    Attributes:
        group: the layer group.
        forward_share: its share of the forward pass, in [0, 1].
        backward_share: its share of the backward pass of full fine-tuning, in [0, 1].
        saving: share of a full step's time saved when this and all shallower groups are frozen.
        cached_saving: the same when, besides, their outputs are cached.
    """

    group: LayerGroup
    forward_share: float
    backward_share: float
    saving: float
    cached_saving: float


def group_reports(groups: LayerGroups) -> tuple[GroupReport, ...]:
    """Shares of cost and best savings, group by group.

    Raises:
        PlanError: the groups were never measured.
    """
    forward = sum(_cost(g).forward_s for g in groups) or 1.0
    full = predicted_step_s(groups, _FULL) or 1.0
    backward = _backward_s(groups, _FULL) or 1.0
    reports = []
    for g in groups:
        plan = FreezePlan(frozen=frozenset(groups.names[: g.depth + 1]))
        step = predicted_step_s(groups, plan)
        cached = predicted_step_s(groups, plan, frozen_prefix_cached=True)
        # The shallowest group never needs the gradient of its input.
        own = _cost(g).backward_s if g.depth else _cost(g).weight_grad_s
        reports.append(
            GroupReport(
                group=g,
                forward_share=_cost(g).forward_s / forward,
                backward_share=own / backward,
                saving=1 - step / full,
                cached_saving=1 - cached / full,
            )
        )
    return tuple(reports)


def _forward_s(group: LayerGroup, plan: FreezePlan) -> float:
    cost = _cost(group)
    if group.name in plan.frozen and cost.frozen_forward_s is not None:
        return cost.frozen_forward_s
    return cost.forward_s


def _backward_s(groups: LayerGroups, plan: FreezePlan) -> float:
    frontier = plan.frontier(groups)
    through = sum(_cost(g).input_grad_s for g in groups if g.depth > frontier)
    return through + sum(_cost(g).weight_grad_s * _trained(g, plan) for g in groups)


def _trained(group: LayerGroup, plan: FreezePlan) -> float:
    """Share of the group's parameters that train: 0, 1, or between when some are exempt."""
    if group.name not in plan.frozen:
        return 1.0
    exempt = plan.exempt.get(group.name)
    if not exempt:
        return 0.0
    count = sum(p.count for p in group.parameters if p.name in exempt)
    return count / max(1, group.parameter_count)


def _cost(group: LayerGroup) -> GroupCost:
    if group.cost is None:
        raise PlanError(
            "predict the cost of a plan",
            found=f"group {group.name!r} has no measured cost",
            fix="measure first: measure_costs(model, groups)",
        )
    return group.cost
