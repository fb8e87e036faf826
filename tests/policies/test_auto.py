"""Auto and its parts: where it begins, what moves it, what a step may cost, what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.clock import Progress
from frostline.cost import predicted_step_s
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.auto import Affordable, Auto, ProbeDepth, Steer
from frostline.policies.static import First, Full, LinearProbe
from frostline.policies.within import Within
from frostline.policy import Event, EventKind, Policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

GROUPS = example_groups(7)  # six blocks and the head
NAMES = GROUPS.names[:-1]


def start(policy: Policy, groups: LayerGroups = GROUPS, **signals: Mapping[str, float]):
    event = Event(EventKind.START, Progress(0, 100, 10), signals)
    return policy.decide(groups, policy.init(groups), event)


def behind(*values: float) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=False))


# -- where it begins ---------------------------------------------------------------------------


def test_the_groups_before_the_first_good_probe_are_frozen() -> None:
    plan, _ = start(ProbeDepth(), probe_behind=behind(0.3, 0.2, 0.1, -0.01, 0.0, 0.05))
    assert plan.frozen == set(NAMES[:3])


def test_nothing_is_frozen_where_the_first_group_reads_as_well_as_any() -> None:
    plan, _ = start(ProbeDepth(), probe_behind=behind(0.0, 0.1, 0.1, 0.1, 0.1, 0.1))
    assert not plan.frozen


def test_a_tolerance_begins_sooner() -> None:
    gaps = behind(0.3, 0.02, 0.01, -0.01, 0.0, 0.0)
    assert len(start(ProbeDepth(), probe_behind=gaps)[0].frozen) == 3
    assert len(start(ProbeDepth(tolerance=0.02), probe_behind=gaps)[0].frozen) == 1


def test_groups_without_a_probe_are_passed_over() -> None:
    gaps = {NAMES[1]: math.nan, NAMES[3]: 0.0, NAMES[4]: 0.2}
    assert start(ProbeDepth(), probe_behind=gaps)[0].frozen == set(NAMES[:3])


@pytest.mark.parametrize("signals", [{}, {"probe_behind": {}}, {"probe_behind": {"head": 0.0}}])
def test_without_probes_a_share_is_frozen_and_the_reason_says_so(signals) -> None:
    plan, _ = start(ProbeDepth(fallback=0.5), **signals)
    assert plan.frozen == set(NAMES[:3])
    assert plan.reason == "no probes: the first 3 of 6 groups"


def test_the_reason_has_the_numbers() -> None:
    accuracy = behind(0.4, 0.61, 0.75, 0.81, 0.84, 0.7) | {"head": 0.625}
    gaps = behind(0.3, 0.2, 0.05, -0.01, 0.0, 0.1)
    plan, _ = start(ProbeDepth(), probe_behind=gaps, probe_accuracy=accuracy)
    assert plan.reason == (
        "probes: block3 is the first of 6 groups that reads as well as any (0.810, the best 0.840 "
        "at block4, what enters the head 0.625); the 3 before it are frozen"
    )


@given(st.lists(st.floats(-0.5, 1), min_size=6, max_size=6), st.floats(0, 0.5))
def test_what_is_frozen_is_the_prefix_before_the_first_in_bounds(gaps, tolerance) -> None:
    plan, _ = start(ProbeDepth(tolerance=tolerance), probe_behind=behind(*gaps))
    count = len(plan.frozen)
    assert plan.frozen == set(NAMES[:count])
    bound = max(tolerance, min(gaps))
    assert gaps[count] <= bound
    assert all(gap > bound for gap in gaps[:count])


# -- what a step may cost ----------------------------------------------------------------------


@given(st.integers(0, 6), st.floats(0.05, 1), st.floats(0.05, 1))
def test_the_shortest_prefix_that_is_affordable(count, time, memory) -> None:
    plan, _ = start(Affordable(First(groups=count), time=time, memory=memory))
    least = next((n for n in range(count, 7) if _costs(n, time, memory)), 6)
    assert plan.frozen == set(NAMES[:least])


def _costs(count: int, time: float, memory: float) -> bool:
    """From the costs of the example: 1 : 1 : 1 : 0.1, the same for every group."""
    trained = 7 - count
    input_gradients = trained - 1
    step, full = 7 + input_gradients + 1.1 * trained, 7 + 6 + 1.1 * 7
    return step <= time * full + 1e-9 and trained <= memory * 7


def test_linear_probing_is_what_is_left_of_a_bound_that_is_too_low() -> None:
    plan, _ = start(Affordable(Full(), time=0.001))
    assert plan.frozen == set(NAMES)
    assert plan.reason.endswith(
        "all 6 frozen, and still too dear: a step is predicted to take 39.1 % of the time "
        "(at most 0.1 %) of full fine-tuning"
    )


def test_the_reason_says_what_a_step_costs_of_what_it_may() -> None:
    within, _ = start(Affordable(First(groups=4), time=0.9, memory=0.5))
    assert within.frozen == set(NAMES[:4])
    assert within.reason.endswith(
        "; a step is predicted to take 59.4 % of the time (at most 90 %) and 42.9 % of the memory "
        "for activations (at most 50 %) of full fine-tuning"
    )
    bounded, _ = start(Affordable(Full(), memory=0.5))
    assert bounded.reason.endswith(
        "; the first 4 frozen: a step is predicted to take 42.9 % of the memory for activations "
        "(at most 50 %) of full fine-tuning"
    )


def test_no_bound_changes_nothing_and_needs_no_costs() -> None:
    bare = LayerGroups(tuple(replace(group, cost=None) for group in GROUPS))
    inner, _ = start(First(groups=2), bare)
    assert start(Affordable(First(groups=2)), bare)[0] == inner


def test_other_frozen_groups_stay_frozen() -> None:
    plan, _ = start(Affordable(First(groups=1), time=0.9))
    assert plan.frozen >= {NAMES[0]}
    full, part = predicted_step_s(GROUPS, FreezePlan()), predicted_step_s(GROUPS, plan)
    assert part <= 0.9 * full + 1e-9


# -- what moves it -----------------------------------------------------------------------------


def steered(
    policy: Steer, rows: list[dict[str, float]], gradients: Mapping[str, float] | None = None
) -> tuple[list[int], list[FreezePlan]]:
    """Frozen groups at the start and after each evaluation."""
    signals = {"relative_gradient_norm": gradients} if gradients else {}
    plan, state = start(policy)
    plans = [plan]
    for step, metrics in enumerate(rows, 1):
        event = Event(EventKind.EVALUATED, Progress(step, 100, 10), signals, metrics)
        plan, state = policy.decide(GROUPS, state, event)
        state = json.loads(json.dumps(state, allow_nan=False))
        assert plan.frozen == set(NAMES[: len(plan.frozen)])
        plans.append(plan)
    return [len(p.frozen) for p in plans], plans


def rows(val: list[float], train: list[float], accuracy: list[float] | None = None):
    found: list[dict[str, float]] = [
        {"val_loss": v, "train_loss": t} for v, t in zip(val, train, strict=True)
    ]
    for row, share in zip(found, accuracy or [], strict=False):
        row["val_accuracy"] = share
    return found


HALF = First(groups=4)


def test_while_it_improves_nothing_moves() -> None:
    counts, plans = steered(Steer(HALF), rows([1, 0.9, 0.8, 0.7], [1, 0.5, 0.2, 0.1]))
    assert counts == [4] * 5
    assert {p.phase for p in plans} == {0}


def test_overfitting_freezes_half_of_what_trains() -> None:
    val, train = [1.0, 0.8, 0.85, 0.9, 0.95, 0.99], [1.0, 0.7, 0.5, 0.3, 0.2, 0.1]
    counts, plans = steered(Steer(HALF), rows(val, train))
    assert counts == [4, 4, 4, 4, 5, 5, 6]
    assert [p.phase for p in plans] == [0, 0, 0, 0, 1, 1, 2]
    assert plans[4].keep_best == "min val_loss"
    assert plans[4].reason.endswith(
        "; overfitting: val_loss not better than 0.8 in 2 evaluations, training loss 0.7, now 0.3: "
        "now 5 of 6 groups frozen, not 4"
    )


def test_underfitting_unfreezes_half_of_what_is_frozen() -> None:
    val, train = [1.0, 0.9, 0.9, 0.9, 0.9, 0.9], [1.1, 1.0, 1.0, 1.0, 1.0, 1.0]
    counts, plans = steered(Steer(HALF), rows(val, train))
    assert counts == [4, 4, 4, 4, 2, 2, 1]
    assert "; underfitting: " in plans[4].reason


def test_a_training_loss_above_the_validation_loss_is_no_overfitting() -> None:
    """Dropout and augmentation keep it there, though it falls."""
    counts, _ = steered(Steer(HALF), rows([1.0, 0.5, 0.5, 0.5], [2.0, 1.5, 1.4, 1.3]))
    assert counts[-1] == 2


def test_gradients_say_how_deep_to_unfreeze() -> None:
    norms = dict(zip(NAMES, [0.1, 0.9, 0.1, 0.2, 0.5, 0.7], strict=True))
    counts, _ = steered(Steer(HALF), rows([1, 0.9, 0.9, 0.9], [1.0] * 4), norms)
    assert counts[-1] == 1  # block1 is the shallowest with as much as the median of block4, block5


def test_quiet_frozen_groups_are_unfrozen_by_halves() -> None:
    norms = dict(zip(NAMES, [0.1, 0.1, 0.1, 0.1, 0.5, 0.7], strict=True))
    counts, _ = steered(Steer(HALF), rows([1, 0.9, 0.9, 0.9], [1.0] * 4), norms)
    assert counts[-1] == 2


def test_it_does_not_go_back_and_forth() -> None:
    val = [1.0, 0.8, 0.85, 0.9, 0.9, 0.9, 0.9, 0.9]
    train = [1.0, 0.7, 0.5, 0.3, 1.5, 1.5, 1.5, 1.5]  # overfitting, then nothing fits any more
    counts, plans = steered(Steer(HALF), rows(val, train))
    assert counts == [4, 4, 4, 4, 5, 5, 5, 5, 5]
    assert plans[-1].reason.endswith("that would undo the move before: no change")
    assert plans[-1].keep_best == ""
    assert plans[-1].phase == 1


def test_nothing_is_left_to_move_at_the_ends() -> None:
    falls, rises = [1.0, 0.5, 0.3, 0.2], [1.0, 1.1, 1.2, 1.3]
    counts, plans = steered(Steer(LinearProbe()), rows(rises, falls))
    assert counts == [6] * 5
    assert "no group is left to move" in plans[-1].reason
    counts, plans = steered(Steer(Full()), rows(rises, rises))
    assert counts == [0] * 5
    assert "no group is left to move" in plans[-1].reason


def test_a_better_accuracy_is_an_improvement_too() -> None:
    val, train = [1.0, 1.1, 1.2, 1.3, 1.4], [1.0, 0.5, 0.4, 0.3, 0.2]
    growing, flat = [0.5, 0.6, 0.7, 0.8, 0.9], [0.5] * 5
    assert steered(Steer(HALF), rows(val, train, growing))[0] == [4] * 6
    assert steered(Steer(HALF), rows(val, train, flat))[0] == [4, 4, 4, 5, 5, 6]


def test_no_number_is_no_improvement_and_no_training_loss_no_overfitting() -> None:
    counts, _ = steered(Steer(HALF), [{"val_loss": math.nan}] * 3)
    assert counts == [4, 4, 2, 2]


def test_another_metric_in_the_other_direction() -> None:
    policy = Steer(HALF, metric="f1", mode="max", patience=1)
    counts, _ = steered(policy, [{"f1": 0.5}, {"f1": 0.6}, {"f1": 0.6}])
    assert counts == [4, 4, 4, 2]


def test_a_metric_that_is_not_there_raises() -> None:
    with pytest.raises(PolicyError, match="val_loss"):
        steered(Steer(HALF), [{"loss": 1.0}])


# -- all together ------------------------------------------------------------------------------


def test_auto_is_its_parts() -> None:
    affordable = Affordable(Steer(ProbeDepth(tolerance=0.1), patience=3), time=0.5, memory=0.75)
    parts = Auto(time=0.5, memory=0.75, tolerance=0.1, patience=3, run_s=60, peak_bytes=2e9).policy
    assert parts == Within(affordable, run_s=60, peak_bytes=2e9)
    gaps = behind(0.3, 0.2, 0.1, -0.01, 0.0, 0.05)
    assert start(Auto(), probe_behind=gaps)[0].frozen == set(NAMES[:3])
    cheap, _ = start(Auto(time=0.5), probe_behind=gaps)
    assert len(cheap.frozen) > 3
    assert "reads as well as any" in cheap.reason
    assert "% of the time (at most 50 %) of full fine-tuning" in cheap.reason


@pytest.mark.parametrize(
    "options",
    [
        {"time": 0.0}, {"time": 1.1}, {"time": math.nan}, {"memory": -1.0}, {"tolerance": 1.0},
        {"tolerance": -0.1}, {"patience": 0}, {"mode": "most"},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(options))):
        Auto(**options)


def test_probes_reach_the_policy_through_the_driver() -> None:
    case = NumpyCase()
    groups = case.backend.groups
    gaps = {name: 0.1 * (1 - i) for i, name in enumerate(groups.names[:-1])}
    driver = Driver(ProbeDepth(), case.backend, measured={"probe_behind": gaps})
    plan = driver.start()
    assert plan.frozen == {groups.names[0]}
    assert driver.decisions[0].signals["probe_behind"] == gaps


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        ({"loss": {}}, "no signal that is measured before the run"),
        ({"probe_behind": {"nowhere": 0.0}}, "nowhere, which are no layer groups"),
        ({"probe_behind": {"GROUP": math.nan}}, "that are no number"),
    ],
)
def test_a_driver_refuses_measurements_of_something_else(measured, found) -> None:
    case = NumpyCase()
    name = case.backend.groups.names[0]
    measured = {
        signal: {name if group == "GROUP" else group: value for group, value in values.items()}
        for signal, values in measured.items()
    }
    driver = Driver(ProbeDepth(), case.backend, measured=measured)
    with pytest.raises(PolicyError, match=found):
        driver.start()
