"""Limits in seconds and bytes: how much is frozen for their sake, when, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.clock import Progress
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.plan import FreezePlan
from frostline.policies.auto import Auto
from frostline.policies.static import First, Full, LinearProbe
from frostline.policies.within import Within
from frostline.policy import Event, EventKind, Policy
from frostline.testing import check_policy, example_groups
from numpy_case import NumpyCase

GROUPS = example_groups(7)  # six blocks and the head
NAMES = GROUPS.names[:-1]
PER_EPOCH, EPOCHS = 10, 4
TOTAL = PER_EPOCH * EPOCHS

Costs = st.lists(st.floats(0.01, 100), min_size=7, max_size=7).map(lambda v: sorted(v)[::-1])


def by_group(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(GROUPS.names, values, strict=True))


def foretold(
    first: Sequence[float], later: Sequence[float], peak: Sequence[float] = (7, 6, 5, 4, 3, 2, 1)
) -> dict[str, Mapping[str, float]]:
    return {
        "first_epoch_from_s": by_group(first),
        "epoch_from_s": by_group(later),
        "peak_from_bytes": by_group(peak),
    }


def counts(
    policy: Policy, signals: Mapping[str, Mapping[str, float]], spent: Sequence[float] = (0,)
) -> tuple[list[int], list[FreezePlan]]:
    """Frozen groups from the start and after each epoch, where so many seconds were spent."""
    state, plans = policy.init(GROUPS), []
    for epoch, spent_s in enumerate(spent):
        kind = EventKind.EVALUATED if epoch else EventKind.START
        progress = Progress(epoch * PER_EPOCH, TOTAL, PER_EPOCH, spent_s)
        metrics = {"val_loss": 1.0} if epoch else {}
        plan, state = policy.decide(GROUPS, state, Event(kind, progress, signals, metrics))
        state = json.loads(json.dumps(state))
        plans.append(plan)
    return [len(plan.frozen) for plan in plans], plans


EVEN = (7, 6, 5, 4, 3, 2, 1)  # seconds of an epoch, nothing cached


def test_the_least_frozen_plan_that_fits_the_time() -> None:
    assert counts(Within(Full(), run_s=28), foretold(EVEN, EVEN))[0] == [0]
    assert counts(Within(Full(), run_s=27.9), foretold(EVEN, EVEN))[0] == [1]
    assert counts(Within(Full(), run_s=27.9), foretold(EVEN, EVEN), (4,))[0] == [2]
    assert counts(Within(First(groups=3), run_s=28), foretold(EVEN, EVEN))[0] == [3]


def test_the_first_epoch_fills_what_later_ones_read() -> None:
    signals = foretold([10] * 7, EVEN)  # 10 + 3 epochs of what follows
    assert counts(Within(Full(), run_s=31), signals)[0] == [0]
    assert counts(Within(Full(), run_s=25), signals)[0] == [2]


def test_the_least_frozen_plan_that_fits_the_memory() -> None:
    assert counts(Within(Full(), peak_bytes=7), foretold(EVEN, EVEN))[0] == [0]
    assert counts(Within(Full(), peak_bytes=4.5), foretold(EVEN, EVEN))[0] == [3]
    _, [plan] = counts(Within(Full(), peak_bytes=4.5 * 2**30), memory_in_gib())
    assert plan.reason.endswith(
        "the first 3 frozen: the run is expected to take 4.00 GiB of 4.50 GiB; with one less it is "
        "expected to take 5.00 GiB"
    )


def memory_in_gib() -> dict[str, Mapping[str, float]]:
    return foretold(EVEN, EVEN, [n * 2**30 for n in EVEN])


@given(Costs, Costs, st.integers(0, 6), st.floats(1, 500), st.floats(0.01, 100))
def test_no_deeper_plan_is_taken_than_fits_and_none_that_does_not(
    seconds, peaks, count, run_s, most
) -> None:
    policy = Within(First(groups=count), run_s=run_s, peak_bytes=most)
    [found], _ = counts(policy, foretold(seconds, seconds, peaks))
    fits = [
        EPOCHS * s <= run_s * (1 + 1e-12) and p <= most for s, p in zip(seconds, peaks, strict=True)
    ]
    assert found == next((n for n in range(count, 7) if fits[n]), 6)


@given(Costs, st.lists(st.floats(0.1, 50), min_size=3, max_size=3), st.floats(1, 500))
def test_a_looser_limit_freezes_no_more_and_the_clock_takes_nothing_back(
    seconds, took, run_s
) -> None:
    spent = [0.0, took[0], took[0] + took[1], sum(took)]
    signals = foretold(seconds, seconds)
    tight, _ = counts(Within(Full(), run_s=run_s), signals, spent)
    assert all(a <= b for a, b in pairwise(tight))
    assert counts(Within(Full(), run_s=2 * run_s), signals, spent[:1])[0][0] <= tight[0]


def test_epochs_that_take_longer_than_foretold_freeze_more() -> None:
    # Seven seconds are foretold of an epoch, and the first takes fourteen: 21 of 35 are left, in
    # which three epochs of 14 do not fit, but three of 2 x 3.
    frozen, plans = counts(Within(Full(), run_s=35), foretold(EVEN, EVEN), (0, 14))
    assert frozen == [0, 4]
    assert plans[1].reason.endswith(
        "the first 4 frozen: the run is expected to take 18.0 s of the 21.0 s left; with one less "
        "it is expected to take 24.0 s"
    )


def test_epochs_that_take_as_long_as_foretold_change_nothing() -> None:
    first, later = [9, 9, 9, 9, 9, 9, 9], EVEN
    policy = Within(Full(), run_s=25)
    assert counts(policy, foretold(first, later), (0, 9, 13, 17))[0] == [2, 2, 2, 2]


def test_what_is_stored_already_need_not_be_stored_again() -> None:
    # Filling takes what is not later: 2 at depth 2, 3 at depth 3: one second more when it moves.
    first, later = [7, 7, 7, 7, 7, 7, 7], (7, 6, 5, 4, 3, 2, 1)
    frozen, plans = counts(Within(Full(), run_s=22), foretold(first, later), (0, 8.4))
    assert frozen == [2, 4]
    # Twenty per cent slower; 13.6 left: 1.2 x (3 x 3 + 2), with one less 1.2 x (3 x 4 + 1).
    assert "take 13.2 s of the 13.6 s left; with one less it is expected to take 15.6 s" in (
        plans[1].reason
    )


def test_what_is_left_of_a_limit_that_is_too_low_is_linear_probing() -> None:
    frozen, [plan] = counts(Within(Full(), run_s=3), foretold(EVEN, EVEN))
    assert frozen == [6]
    assert (
        "all 6 frozen, and still too much: the run is expected to take 4.0 s of the 3.0 s left"
        in (plan.reason)
    )


def test_groups_that_nothing_was_foretold_of_take_the_next_deeper_figure() -> None:
    signals = {"peak_from_bytes": {NAMES[0]: 9.0, NAMES[3]: 4.0}}
    assert counts(Within(Full(), peak_bytes=5), signals)[0] == [1]
    assert counts(Within(LinearProbe(), peak_bytes=3), signals)[0] == [6]


def test_no_limit_changes_nothing_and_needs_nothing() -> None:
    assert Within(First(groups=2)).needs() == ()
    assert counts(Within(First(groups=2)), {})[0] == [2]


@pytest.mark.parametrize(
    ("policy", "progress", "signals", "found"),
    [
        (Within(Full(), run_s=9), Progress(0, 40, 10, 0.0), {}, "no epoch_from_s and no first"),
        (Within(Full(), peak_bytes=9), Progress(), {}, "no peak_from_bytes"),
        (Within(Full(), run_s=9), Progress(0, 40, 10), foretold(EVEN, EVEN), "nobody counts"),
        (Within(Full(), run_s=9), Progress(0, None, 9, 0.0), foretold(EVEN, EVEN), "of unknown"),
    ],
)  # fmt: skip
def test_limits_that_nothing_is_known_of_are_refused(policy, progress, signals, found) -> None:
    event = Event(EventKind.START, progress, signals)
    with pytest.raises(PolicyError, match=found):
        policy.decide(GROUPS, policy.init(GROUPS), event)


@pytest.mark.parametrize("options", [{"run_s": 0.0}, {"peak_bytes": -1}, {"run_s": float("nan")}])
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(PolicyError, match=next(iter(options))):
        Within(Full(), **options)


def test_auto_keeps_within_limits() -> None:
    behind = dict(zip(NAMES, (0.3, 0.0, 0.0, 0.0, 0.0, 0.0), strict=True))
    signals = foretold(EVEN, EVEN) | {"probe_behind": behind}
    assert counts(Auto(), signals)[0] == [1]
    assert counts(Auto(run_s=20, peak_bytes=6), signals)[0] == [2]
    assert counts(Auto(run_s=200, peak_bytes=2), signals)[0] == [5]


@pytest.mark.parametrize(
    "policy", [Within(LinearProbe(), peak_bytes=0.5), Within(Full())], ids=repr
)
def test_the_contract_holds(policy: Policy) -> None:
    check_policy(policy, GROUPS)


def test_the_driver_hands_on_what_was_foretold_and_the_clock() -> None:
    case = NumpyCase()
    names = case.backend.groups.names
    seconds = {name: float(len(names) - i) for i, name in enumerate(names)}
    driver = Driver(
        Within(Full(), run_s=9.5),
        case.backend,
        total_steps=4,
        steps_per_epoch=2,
        measured={"first_epoch_from_s": seconds, "epoch_from_s": seconds},
        clock=lambda: 2.0,
    )
    # Four layers: two epochs of 4 s do not fit into 7.5 s, two of 3 s do.
    assert driver.start().frozen == {names[0]}
