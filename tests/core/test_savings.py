"""Time saved: none where nothing is frozen, by the ratio elsewhere, unknown until it is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.cost import predicted_forward_s, predicted_step_s
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.savings import Savings, Update

COST = GroupCost(forward_s=1, input_grad_s=1, weight_grad_s=1, frozen_forward_s=0.5)
GROUPS = LayerGroups(
    tuple(LayerGroup(n, i, (TensorInfo(f"{n}.w", (4,)),), cost=COST) for i, n in enumerate("abc"))
)
FULL = FreezePlan()
HALF = FreezePlan(frozen=frozenset("ab"))
seconds = st.floats(0.001, 100)


def _whole(compute_s: float, *, samples: int = 8, wait_s: float = 0.0, more_s: float = 0.0):
    total = compute_s + wait_s + more_s
    return Update(samples, total, compute_s, wait_s, whole=True)


def _served(total_s: float, *, samples: int = 8) -> Update:
    return Update(samples, total_s, total_s, 0.0, whole=False)


@given(st.lists(seconds, min_size=2, max_size=8))
def test_where_nothing_is_frozen_nothing_is_saved_however_the_pace_changes(times):
    savings = Savings(GROUPS, measured_samples=2, measure_s=0.5)
    savings.add(FULL, _whole(times[0]))
    first = savings.updates_s
    for time in times[1:]:
        savings.add(FULL, _whole(time, wait_s=0.25))
    known = savings.full_s
    assert known is not None
    # The first update sets things up: what it took is charged, not predicted from.
    rest = savings.updates_s - first
    assert savings.whole_full_s == pytest.approx(rest)
    assert savings.saved_s == pytest.approx(known - savings.updates_s - 0.5)


@given(st.lists(seconds, min_size=1, max_size=8), seconds)
def test_an_update_that_ran_whole_is_predicted_by_the_ratio_of_predicted_steps(times, overhead_s):
    savings = Savings(GROUPS, measured_samples=2)
    savings.add(HALF, _served(0.0, samples=0))
    for time in times:
        savings.add(HALF, _whole(time, more_s=overhead_s))
    ratio = predicted_step_s(GROUPS, FULL) / predicted_step_s(GROUPS, HALF)
    assert savings.full_s == pytest.approx(ratio * sum(times))
    charged = overhead_s * len(times)
    assert savings.saved_s == pytest.approx((ratio - 1) * sum(times) - charged)


def test_nothing_is_claimed_while_all_comes_from_an_earlier_run():
    savings = Savings(GROUPS, measured_samples=2)
    for _ in range(3):
        savings.add(HALF, _served(0.1))
    assert savings.full_s is None
    assert savings.saved_s is None


def test_filling_the_cache_tells_the_pace_of_what_it_then_serves():
    savings = Savings(GROUPS, measured_samples=2)
    frozen_s = predicted_forward_s(GROUPS, HALF, below=2) / 2  # of one sample, as measured
    savings.filled(HALF, samples=32, compute_s=32 * frozen_s / 4)  # a batch is four times as fast
    savings.add(HALF, _served(0.1, samples=16))
    savings.add(HALF, _served(0.1, samples=16))
    expected = 32 * predicted_step_s(GROUPS, FULL) / 2 / 4
    assert savings.full_s == pytest.approx(expected)
    assert savings.saved_s == pytest.approx(expected - 0.2)


def test_costs_of_freezing_are_charged_and_may_outweigh_what_it_saves():
    savings = Savings(GROUPS, measured_samples=2, measure_s=3.0)
    savings.add(HALF, _whole(0.1))
    savings.add(HALF, _whole(0.1, more_s=0.5))
    assert savings.saved_s is not None
    assert savings.saved_s < -3.0


@given(st.lists(st.tuples(st.sampled_from([FULL, HALF]), seconds, st.booleans()), max_size=8))
def test_a_session_goes_on_where_the_last_one_was(updates):
    savings = Savings(GROUPS, measured_samples=2, measure_s=1.0)
    for plan, time, whole in updates:
        savings.add(plan, replace(_whole(time, wait_s=time / 2), whole=whole))
    later = Savings(GROUPS, measured_samples=2)
    later.restore(savings.to_json())
    assert later.to_json() == savings.to_json()
    later.restore({})  # a checkpoint of an older version says nothing of it
    assert later.to_json() == savings.to_json()
