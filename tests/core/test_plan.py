from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_strategies import GROUPS, plans
from frostline.errors import PlanError, SelectorMatchedNothing
from frostline.plan import FreezePlan


@given(plans(), plans(), plans())
def test_union_is_a_lattice(a: FreezePlan, b: FreezePlan, c: FreezePlan) -> None:
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert a | a == a
    assert a | FreezePlan() == a


@given(plans(), plans())
def test_union_freezes_what_either_freezes(a: FreezePlan, b: FreezePlan) -> None:
    both = (a | b).frozen_parameters(GROUPS)
    assert both == a.frozen_parameters(GROUPS) | b.frozen_parameters(GROUPS)
    assert (a | b).held_tensors(GROUPS) == a.held_tensors(GROUPS) | b.held_tensors(GROUPS)


@given(plans())
def test_json_is_lossless(plan: FreezePlan) -> None:
    again = FreezePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.reason == plan.reason


@given(plans())
def test_the_frontier_is_the_shallowest_group_that_trains(plan: FreezePlan) -> None:
    frontier = plan.frontier(GROUPS)
    frozen = plan.frozen_parameters(GROUPS)
    for group in GROUPS:
        if group.depth < frontier:
            assert group.parameter_names <= frozen
    if frontier < len(GROUPS):
        assert not GROUPS[frontier].parameter_names <= frozen


@given(plans(), st.frozensets(st.sampled_from(GROUPS.names)))
def test_without(plan: FreezePlan, names: frozenset[str]) -> None:
    left = plan.without(names)
    assert left.frozen == plan.frozen - names
    assert left.lr_scale == plan.lr_scale
    assert left.live_norm <= left.frozen


@given(plans())
def test_check_refuses_only_what_trains_nothing(plan: FreezePlan) -> None:
    if plan.frozen_count(GROUPS) == GROUPS.parameter_count:
        with pytest.raises(PlanError, match="freezes everything"):
            plan.check(GROUPS)
    else:
        plan.check(GROUPS)


def test_freezing_by_selector() -> None:
    plan = FreezePlan.freezing(GROUPS, "backbone & !kind:norm")
    assert plan.frozen == GROUPS.backbone
    assert plan.exempt["block0"] == {"block0.norm.weight"}
    assert plan.frozen_parameters(GROUPS) == {
        f"block{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    }
    assert plan.frontier(GROUPS) == 0  # a norm in the stem still trains


def test_training_only_by_selector() -> None:
    """BitFit: everything frozen but biases and the head."""
    plan = FreezePlan.training_only(GROUPS, "kind:bias | head")
    trained = {p for g in GROUPS for p in g.parameter_names} - plan.frozen_parameters(GROUPS)
    assert trained == {f"block{i}.bias" for i in range(4)} | {"head.weight", "head.bias"}
    assert "head" not in plan.frozen


def test_a_selector_that_matches_nothing_raises() -> None:
    with pytest.raises(SelectorMatchedNothing):
        FreezePlan.freezing(GROUPS, "nope")


@pytest.mark.parametrize(
    "plan",
    [
        FreezePlan(frozen=frozenset({"nope"})),
        FreezePlan(lr_scale={"nope": 0.5}),
        FreezePlan(frozen=frozenset({"block0"}), exempt={"block0": frozenset({"block1.weight"})}),
        FreezePlan(frozen=frozenset(GROUPS.names)),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: FreezePlan) -> None:
    with pytest.raises(PlanError):
        plan.check(GROUPS)


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan")])
def test_impossible_rates_are_refused(scale: float) -> None:
    with pytest.raises(PlanError):
        FreezePlan(lr_scale={"block0": scale})


@pytest.mark.parametrize("data", [{}, {"frozen": 3}, [], {"frozen": [], "exempt": 1}])
def test_foreign_json_is_refused(data: object) -> None:
    with pytest.raises(PlanError):
        FreezePlan.from_json(data)  # type: ignore[arg-type]


def test_held_tensors_follow_the_norm_switch() -> None:
    frozen = frozenset({"block0"})
    held = FreezePlan(frozen).held_tensors(GROUPS)
    live = FreezePlan(frozen, live_norm=frozen).held_tensors(GROUPS)
    assert held - live == {"block0.norm.running_mean"}


def test_normal_form_makes_equal_plans_equal() -> None:
    loud = FreezePlan(
        frozenset({"block0"}),
        exempt={"block0": frozenset(), "block1": frozenset({"block1.bias"})},
        lr_scale={"block1": 1.0},
        live_norm=frozenset({"block3"}),
    )
    assert loud == FreezePlan(frozenset({"block0"}))
    assert hash(loud) == hash(FreezePlan(frozenset({"block0"})))


def test_summary_says_what_is_frozen() -> None:
    text = FreezePlan(frozenset({"block0", "block1"})).summary(GROUPS)
    assert text == (
        "frozen 2 of 5 groups, 160 of 392 parameters (40.8%), norm statistics held, "
        "backward stops at depth 2"
    )
    assert FreezePlan().summary(GROUPS) == "frozen 0 of 5 groups: all 392 parameters train"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"frozen": "stem"}, "text where a set"),
        ({"phase": -1}, "0 or more"),
        ({"phase": 1.5}, "0 or more"),
        ({"keep_best": "val_loss"}, "min METRIC"),
    ],
)
def test_slips_in_a_plan_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        FreezePlan(**fields)
