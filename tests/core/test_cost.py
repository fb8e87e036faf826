from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_strategies import GROUPS as EXAMPLE
from core_strategies import plans
from frostline.cost import (
    backward_share,
    group_reports,
    plan_line,
    predicted_step_s,
    prefix_bound,
    trained_share,
)
from frostline.errors import PlanError, UsageError
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan


def uniform(count: int) -> LayerGroups:
    """Groups with forward : input gradient : weight gradient = 1 : 1 : 1 and a free optimizer."""
    cost = GroupCost(1.0, 1.0, 1.0)
    return LayerGroups(
        tuple(
            LayerGroup(f"g{i}", i, (TensorInfo(f"g{i}.w", (2,)),), cost=cost) for i in range(count)
        )
    )


def prefix(groups: LayerGroups, depth: int) -> FreezePlan:
    return FreezePlan(frozen=frozenset(groups.names[:depth]))


def test_hand_worked_step() -> None:
    groups = uniform(4)
    assert predicted_step_s(groups, FreezePlan()) == 4 + 3 + 4  # the input needs no gradient
    assert predicted_step_s(groups, prefix(groups, 2)) == 4 + 1 + 2
    assert predicted_step_s(groups, prefix(groups, 2), frozen_prefix_cached=True) == 2 + 1 + 2
    middle = FreezePlan(frozen=frozenset({"g1"}))
    assert predicted_step_s(groups, middle) == 4 + 3 + 3  # only its weight gradient is saved
    assert backward_share(groups, prefix(groups, 3)) == pytest.approx(1 / 7)


@given(st.integers(2, 400), st.data())
def test_predictions_stay_near_the_bound(count: int, data: st.DataObject) -> None:
    """3 / (3 - 2f) counts an input gradient at the frontier that is not needed: one group's."""
    groups = uniform(count)
    depth = data.draw(st.integers(0, count - 1))
    full = 3 * count
    speed_up = full / (predicted_step_s(groups, prefix(groups, depth)) + 1)
    assert speed_up == pytest.approx(prefix_bound(depth / count))


@given(plans())
def test_freezing_never_costs(plan: FreezePlan) -> None:
    full = predicted_step_s(EXAMPLE, FreezePlan())
    assert predicted_step_s(EXAMPLE, plan) <= full + 1e-12
    assert 0 <= backward_share(EXAMPLE, plan) <= 1
    assert 0 <= trained_share(EXAMPLE, plan) <= 1


@given(plans(), plans())
def test_freezing_more_never_costs_more(a: FreezePlan, b: FreezePlan) -> None:
    both = predicted_step_s(EXAMPLE, a | b)
    assert both <= predicted_step_s(EXAMPLE, a) + 1e-12


def test_bounds() -> None:
    assert [round(prefix_bound(f), 2) for f in (0, 0.25, 0.5, 0.75, 0.9, 1)] == [
        1.0, 1.2, 1.5, 2.0, 2.5, 3.0,
    ]  # fmt: skip
    assert prefix_bound(0.75, frozen_prefix_cached=True) == 4
    assert prefix_bound(1, frozen_prefix_cached=True) == float("inf")
    with pytest.raises(UsageError):
        prefix_bound(1.1)


def test_reports_sum_to_one_and_grow() -> None:
    reports = group_reports(EXAMPLE)
    assert sum(r.forward_share for r in reports) == pytest.approx(1)
    assert sum(r.backward_share for r in reports) == pytest.approx(1)
    savings = [r.saving for r in reports]
    assert savings == sorted(savings)
    assert all(r.cached_saving >= r.saving for r in reports)
    by_hand = group_reports(uniform(4))[1]  # two of four groups frozen: 7 of 11 units are left
    assert by_hand.saving == pytest.approx(1 - 7 / 11)
    assert by_hand.cached_saving == pytest.approx(1 - 5 / 11)
    assert reports[-1].cached_saving == pytest.approx(1)


def test_unmeasured_groups_are_refused() -> None:
    groups = LayerGroups((LayerGroup("a", 0, (TensorInfo("a.w"),)),))
    with pytest.raises(PlanError, match="measure"):
        predicted_step_s(groups, FreezePlan())


def test_the_line_says_what_a_step_will_take() -> None:
    groups = uniform(4)
    assert plan_line(groups, prefix(groups, 2)).endswith("depth 2, step predicted 0.64 of full")
    assert "predicted" not in plan_line(groups, FreezePlan())
    bare = LayerGroups((LayerGroup("a", 0, ()), LayerGroup("b", 1, ())))
    assert "predicted" not in plan_line(bare, FreezePlan(frozen=frozenset({"a"})))
