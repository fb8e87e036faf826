from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.clock import Duration, Progress
from frostline.compose import Then
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.activations import Egeria, ETuner
from frostline.policies.static import Full
from frostline.policy import Event, EventKind, Policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

EVERY = Duration.parse
ONE = EVERY("1st")
Readings = Sequence[Mapping[str, float]]


def plans(
    policy: Policy,
    readings: Readings,
    count: int,
    *,
    losses: Sequence[float] = (),
    rates: Sequence[float | Mapping[str, float]] = (),
    total: int | None = None,
) -> list[FreezePlan]:
    """The plan after each reading; reading i is taken at the end of step i."""
    groups, signal = example_groups(count), policy.needs()[0].signal
    start = Event(EventKind.START, Progress(0, total or len(readings), 5))
    plan, state = policy.decide(groups, policy.init(groups), start)
    assert not plan.frozen
    found = []
    for i, values in enumerate(readings, 1):
        signals = {signal: values}
        for name, series in (("loss", losses), ("learning_rate", rates)):
            if series:
                value = series[min(i, len(series)) - 1]
                same = not isinstance(value, Mapping)
                signals[name] = dict.fromkeys(groups.names, value) if same else value
        progress = Progress(i, total or len(readings), 5)
        event = Event(EventKind.STEP, progress, signals, sampled=dict.fromkeys(signals, i))
        plan, state = policy.decide(groups, state, event)
        assert policy.decide(groups, state, event) == (plan, state), "one reading counts once"
        json.dumps(state, allow_nan=False)
        found.append(plan)
    return found


def depths(policy: Policy, readings: Readings, count: int, **series: Any) -> list[int]:
    """How many groups are frozen after each reading; always a prefix."""
    names, found = example_groups(count).names, []
    for plan in plans(policy, readings, count, **series):
        found.append(len(plan.frozen))
        assert plan.frozen == frozenset(names[: found[-1]])
    return found


def alike(values: Sequence[float], count: int = 3) -> Readings:
    """The same value for every group."""
    return [dict.fromkeys(example_groups(count).names, v) for v in values]


BARE = Egeria(every=ONE, bootstrap=None, unfreeze="never")
PLATEAU = [*range(0, 200, 10), *[200.0] * 60]


# -- Egeria -----------------------------------------------------------------------------------


def reference_egeria(values: Sequence[float], window: int, tolerance: float) -> int | None:
    """After which reading the first group freezes, by numpy."""
    means = [np.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
    slopes = []
    for i in range(1, len(means)):
        tail = means[max(0, i - window + 1) : i + 1]
        slopes.append(abs(np.polyfit(np.arange(len(tail)), tail, 1)[0]))
    stale = 0
    for i, slope in enumerate(slopes[3:]):
        stale = stale + 1 if slope <= tolerance * max(slopes[:3]) else 0
        if stale == window:
            return i + 5  # slopes begin at the second reading, judging at the fifth
    return None


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    window=st.integers(2, 12),
    tolerance=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
)
def test_egeria_agrees_with_numpy(seed: int, window: int, tolerance: float) -> None:
    source = np.random.default_rng(seed)
    drift = np.cumsum(source.uniform(-0.2, 1, 60) * 0.8 ** np.arange(60))
    values = (drift + source.normal(0, 0.02, 60)).tolist()
    wanted = reference_egeria(values, window, tolerance)
    found = depths(replace(BARE, window=window, tolerance=tolerance), alike(values, 2), 2)
    assert found == [int(wanted is not None and i >= wanted) for i in range(1, 61)]


def test_egeria_by_hand() -> None:
    """W = 2. Values 0 4 8 8 8 8: means 0 2 6 8 8 8, slopes 2 4 2 0 0, limit 0.2 * 4.

    The slopes are those of two means each; the first three set the limit, two of 0 freeze.
    """
    policy = replace(BARE, window=2)
    assert depths(policy, alike([0, 4, 8, 8, 8, 8, 8], 2), 2) == [0, 0, 0, 0, 0, 1, 1]


def test_egeria_freezes_the_next_group_on_readings_of_its_own_turn() -> None:
    """block1 rested while it was not its turn: that does not count, and a new limit is set."""
    calm, moving = [8.0] * 6, [0.0, 4, 8, 8, 8, 8]
    readings = [
        {"block0": a, "block1": b}
        for a, b in zip(moving + calm + calm, calm + moving + calm, strict=True)
    ]
    assert depths(replace(BARE, window=2), readings, 3) == [*[0] * 5, *[1] * 6, *[2] * 7]


def test_egeria_freezes_after_the_plateau_and_not_before() -> None:
    found = depths(BARE, alike(PLATEAU, 2), 2)
    assert 20 + 10 <= found.index(1) <= 20 + 30
    assert depths(BARE, alike(list(range(80)), 2), 2)[-1] == 0


def test_egeria_does_not_take_falling_plasticity_for_a_settled_one() -> None:
    """The published algorithm compares the signed slope: every falling one is below the limit."""
    falling = [100.0 - i for i in range(80)]
    assert depths(BARE, alike(falling, 2), 2)[-1] == 0
    late = [*range(0, 100, 10), *(100.0 - 5 * i for i in range(60))]
    assert depths(BARE, alike(late, 2), 2)[-1] == 0


def test_egeria_counts_stale_readings_in_a_row() -> None:
    policy = replace(BARE, window=2, tolerance=0.5)
    # means 0 2 6 8 8 10 12 12 12; slopes 2 4 2 | 0 2 2 0 0 against a limit of 2, then of 1
    values = [0.0, 4, 8, 8, 8, 12, 12, 12, 12]
    assert depths(policy, alike(values, 2), 2).index(1) == 5
    assert depths(replace(policy, tolerance=0.25), alike(values, 2), 2).index(1) == 8


def test_a_group_that_never_moved_is_settled() -> None:
    found = depths(BARE, alike([0.0] * 40, 3), 3)
    assert found.index(1) == 13
    assert found.index(2) == 27


def test_egeria_waits_for_the_loss_to_settle() -> None:
    """Changes of 50 %, 20 %, 11 % and 4 %: only the last ends the bootstrap."""
    policy = replace(BARE, bootstrap=0.1, window=2)
    losses = [10.0, 5, 4, 3.55, 3.4]
    values = alike([5.0] * 5 + [0, 4, 8, 8, 8, 8, 8], 2)
    assert [n.signal for n in policy.needs()] == ["sp_loss_int8", "loss"]
    assert depths(policy, values, 2, losses=losses).index(1) == 5 + 5
    assert depths(policy, alike([0.0] * 12, 2), 2, losses=losses).index(1) == 5 + 5
    assert depths(policy, values, 2, losses=[2.0**i for i in range(12)])[-1] == 0
    assert depths(policy, values, 2, losses=[2.0**-i for i in range(12)])[-1] == 0


def test_egeria_reads_the_mean_loss_of_each_interval() -> None:
    (_, loss, _) = Egeria().needs()
    assert (loss.signal, loss.steps, loss.every) == ("loss", None, Egeria().every)


def unfreezing(**options: Any) -> Egeria:
    return replace(BARE, window=4, **options)


def fast(
    policy: Egeria, rates: Sequence[float | Mapping[str, float]], total: int | None = None
) -> list[int]:
    """Readings that never move: one group freezes every 4 + W readings."""
    return depths(policy, alike([0.0] * len(rates), 6), 6, rates=rates, total=total)


def test_an_abrupt_fall_of_the_rate_unfreezes_all_and_halves_the_window() -> None:
    """W = 4: a group takes 4 + 4 readings; W = 2: 4 + 2."""
    rates = [0.1] * 20 + [0.1 * 0.1] * 20
    found = fast(unfreezing(unfreeze="step"), rates, total=1000)
    assert found[7] == 1 > found[6]
    assert found[15] == 2 > found[14]
    assert found[19] == 2
    assert found[20] == 0
    assert found[26] == 1 > found[25]
    assert found[32] == 2 > found[31]
    assert fast(unfreezing(unfreeze="never"), rates, total=1000)[20] == 2


def test_a_fall_by_less_than_the_factor_or_before_any_freeze_unfreezes_nothing() -> None:
    assert fast(unfreezing(unfreeze="step"), [0.1] * 20 + [0.011] * 4, total=1000)[-1] == 3
    found = fast(unfreezing(unfreeze="step"), [0.1] * 5 + [0.001] * 4, total=1000)
    assert found[-2:] == [1, 1]
    assert found.index(1) == 7


@pytest.mark.parametrize("times", [1, 2])
def test_every_abrupt_fall_unfreezes(times: int) -> None:
    rates = [0.1**i for i in range(times + 1) for _ in range(20)]
    found = fast(unfreezing(unfreeze="step"), rates, total=1000)
    assert sum(b < a for a, b in itertools.pairwise(found)) == times


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "warm-up": lambda x: min(x / 0.1, (1 - x) / 0.9),
    "constant": lambda _: 1.0,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_smooth_schedule_never_unfreezes_by_step(schedule: str) -> None:
    """The published rule fires somewhere in every schedule that ends at 0."""
    rates = [0.01 * SCHEDULES[schedule](i / 200) for i in range(1, 201)]
    found = fast(unfreezing(unfreeze="step"), rates)
    assert sorted(found) == found
    assert found[-1] == 5


def test_decay_unfreezes_at_most_so_often_and_never_late() -> None:
    falling = [0.5**i for i in range(100)]  # a tenth every 3.3 readings
    for times in (0, 1, 3):
        found = fast(unfreezing(unfreeze="decay", max_unfreezes=times), falling, total=1000)
        assert sum(b < a for a, b in itertools.pairwise(found)) == times
    cosine = [SCHEDULES["cosine"](i / 200) for i in range(1, 201)]
    for drop, times in ((10, 1), (50, 0)):  # at 80 % and at 91 % of the run
        found = fast(unfreezing(unfreeze="decay", drop=drop), cosine)
        assert sum(b < a for a, b in itertools.pairwise(found)) == times


def test_decay_measures_from_the_last_freeze() -> None:
    """Frozen at reading 8 at a rate of 1; the tenth is reached at reading 12."""
    rates = [1.0] * 8 + [0.5, 0.3, 0.11, 0.1, 0.1]
    assert fast(unfreezing(unfreeze="decay"), rates, total=1000)[7:] == [1, 1, 1, 1, 0, 0]
    assert fast(unfreezing(unfreeze="step"), rates, total=1000)[7:] == [1, 1, 1, 1, 1, 1]


def test_decay_measures_from_the_last_of_several_freezes() -> None:
    rates = [1.0] * 8 + [0.5] * 8 + [0.06, 0.05]
    assert fast(unfreezing(unfreeze="decay"), rates, total=1000)[15:] == [2, 2, 0]


def test_of_several_rates_the_largest_counts() -> None:
    """Whatever group has it: a placebo shuffles them."""
    names = example_groups(6).names
    for last, wanted in ((0.1, 1), (0.01, 0)):
        rates = [dict.fromkeys(names, 0.1)] * 8 + [dict.fromkeys(names, 0.01) | {names[2]: last}]
        assert fast(unfreezing(unfreeze="step"), rates, total=1000)[-1] == wanted


def test_nothing_unfreezes_by_rate_in_the_last_tenth() -> None:
    rates = [0.1] * 8 + [0.01] * 2
    assert fast(unfreezing(unfreeze="step"), rates, total=11)[-1] == 0
    assert fast(unfreezing(unfreeze="step"), rates, total=10)[-1] == 1


def saw(length: int, period: int) -> list[float]:
    """A steady drift of 1 a reading, seen against references that are taken anew."""
    return [1.0 + i % period for i in range(length)]


def test_a_new_reference_is_no_plateau() -> None:
    """With a period as long as the window the mean of the saw-tooth is constant: it looks settled.

    Readings 1 to 5 compare with the first reference, 6 to 10 with that of reading 5.
    """
    policy = replace(BARE, window=5, reference="snapshot")
    values = alike(saw(60, 5), 2)
    assert depths(policy, values, 2)[-1] == 1  # without knowing of the refresh
    assert depths(replace(policy, refresh=EVERY("5st")), values, 2)[-1] == 0


def test_a_new_reference_of_a_settled_group_is_no_drift() -> None:
    policy = replace(BARE, window=5, reference="snapshot", refresh=EVERY("20st"))
    values = [*range(0, 200, 10), *[0.0] * 20]  # settled at the reference of reading 20
    assert depths(policy, alike(values, 2), 2)[-1] == 1


def test_refresh_happens_when_the_policy_believes() -> None:
    """Some public versions refresh in all steps but those due (`if n % period:`).

    Weights drift by equal steps; against a reference that is taken anew, each reading right
    after a refresh is the same, and the policy's series climbs on without a fall.
    """
    case = NumpyCase()
    case.optimizer.weight_decay = 0.0
    options: dict[str, Any] = {"reference": "snapshot", "refresh": EVERY("6st")}
    policy = replace(BARE, every=EVERY("2st"), window=9, **options)
    driver, raw = Driver(policy, case.backend, 40, 5), list[float]()
    for step in range(26):
        with driver.step():
            case.backward()
            driver.sample()
            case.net.parameters["layer0.weight"][:, 0] += 0.02
            case.net.gradients = dict.fromkeys(case.net.gradients)
        if step % 2:
            raw.append(driver.state()["gauges"]["values"]["sp_loss_snapshot"]["layer0"])
    # readings at 2, 4, 6 against step 0; 8, 10, 12 against the reading at 6; and so on
    falls = [i for i in range(1, 13) if raw[i] < raw[i - 1]]
    assert falls == [3, 6, 9, 12]
    driver.begin_step()
    series = driver.state()["policy_state"]["readings"]
    assert all(b > a for a, b in itertools.pairwise(series))
    assert series[-1] - series[-2] == pytest.approx(raw[12])


def test_a_later_phase_counts_its_refreshes_from_its_own_start() -> None:
    policy = replace(BARE, window=5, reference="snapshot", refresh=EVERY("5st"))
    later = Then(Full(), EVERY("3st"), policy)
    values = [*alike([0.0] * 3, 2), *alike(saw(60, 5), 2)]
    groups, state, frozen = example_groups(2), later.init(example_groups(2)), 0
    for i in range(len(values)):
        signals, sampled = ({"sp_loss_snapshot": values[i]}, {"sp_loss_snapshot": i + 1})
        event = Event(EventKind.STEP, Progress(i + 1, 70, 5), signals, sampled=sampled)
        if i >= 3:
            plan, state = later.decide(groups, state, event)
            frozen = len(plan.frozen)
    assert frozen == 0


@pytest.mark.parametrize("reference", ["int8", "snapshot", "pretrained"])
def test_egeria_on_a_network_that_stands_still(reference: Any) -> None:
    """Backbone groups freeze one after the other, 14 readings each; the head trains on."""
    case = NumpyCase()
    case.optimizer.lr = 0.0
    driver = Driver(Egeria(every=ONE, reference=reference, bootstrap=99), case.backend, 250, 10)
    changes = []
    for _ in range(60):
        with driver.step() as plan:
            changes.append(len(plan.frozen))
            case.backward()
            for statistics in case.net.buffers.values():
                statistics[...] = 0.0
            driver.sample(loss=1.0)
            case.update()
    assert changes[-1] == 3
    waits = [changes.index(n) for n in (1, 2, 3)]
    assert [b - a for a, b in itertools.pairwise(waits)] == [14, 14]


def test_egeria_says_what_it_costs_and_why() -> None:
    assert "every 0.4%" in Egeria().notice()
    plan = plans(replace(BARE, window=2), alike([0, 4, 8, 8, 8, 8], 2), 2)[-1]
    assert plan.reason == (
        "egeria: 1 of 1 groups frozen; the slope of block0 was within 0.8 for 2 readings, at last 0"
    )


def test_egeria_ignores_absent_and_not_finite_readings() -> None:
    values = [0, math.nan, 4, 8, math.inf, 8, 8, 8]
    readings = [*alike(values, 2), {}]
    assert depths(replace(BARE, window=2), readings, 2) == [*[0] * 7, 1, 1]


# -- ETuner -----------------------------------------------------------------------------------

STEADY = ETuner(every=ONE)


def sets(policy: Policy, readings: Readings, count: int) -> list[set[str]]:
    return [set(p.frozen) for p in plans(policy, readings, count)]


def test_etuner_by_hand() -> None:
    """Relative changes of block1: 10 %, 0.9 %, 0.9 %, 0.9 %; of block0: always 2 %."""
    values = [1.0, 0.9, 0.9 * 0.991, 0.9 * 0.991**2, 0.9 * 0.991**3]
    readings = [{"block0": 0.98**i, "block1": v} for i, v in enumerate(values)]
    assert sets(STEADY, readings, 3) == [set(), set(), set(), set(), {"block1"}]


def test_etuner_wants_small_changes_in_a_row() -> None:
    values = [1.0, 0.995, 0.99, 0.95, 0.949, 0.948, 0.947]
    assert depths(STEADY, alike(values, 2), 2) == [0, 0, 0, 0, 0, 0, 1]
    assert depths(replace(STEADY, patience=1), alike(values, 2), 2) == [0, 1, 1, 1, 1, 1, 1]


def test_etuner_takes_changes_relative_to_the_reading_before() -> None:
    assert depths(replace(STEADY, patience=1), alike([0.1, 0.102], 2), 2) == [0, 0]
    assert depths(replace(STEADY, patience=1), alike([0.1, 0.1009], 2), 2) == [0, 1]
    exactly = replace(STEADY, patience=1, threshold=0.25)
    assert depths(exactly, alike([1.0, 0.75, 0.5625 + 0.01], 2), 2) == [0, 0, 1]


def test_etuner_unfreezes_what_has_moved_since_it_was_frozen() -> None:
    """Frozen at 1.0: steps of 3 % add up; each alone would not do."""
    policy = replace(STEADY, patience=1)
    values = [1.0, 1.0, 0.97, 0.94, 0.94, 0.94]
    assert depths(policy, alike(values, 2), 2) == [0, 1, 1, 0, 1, 1]
    assert depths(replace(policy, unfreeze=None), alike(values, 2), 2) == [0, 1, 1, 1, 1, 1]


def test_etuner_tests_a_group_anew_after_it_unfroze() -> None:
    values = [1.0] * 4 + [0.9, 0.9, 0.9, 0.9]
    assert depths(STEADY, alike(values, 2), 2) == [0, 0, 0, 1, 0, 0, 0, 1]


def test_etuner_ignores_absent_and_not_finite_readings() -> None:
    policy = replace(STEADY, patience=1)
    readings = [*alike([1.0, math.nan], 3), {"block1": 1.0, "block0": math.inf}, {"head": 1.0}]
    assert sets(policy, readings, 3) == [set(), set(), {"block1"}, {"block1"}]
    assert depths(policy, alike([0.0, 0.0], 2), 2) == [0, 1]


def test_etuner_freezes_a_network_that_stands_still() -> None:
    case = NumpyCase()
    case.optimizer.lr = 0.0
    driver = Driver(ETuner(every=EVERY("2st"), threshold=0.5), case.backend, 20, 5)
    for _ in range(12):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
    assert driver.plan.frozen == driver.backend.groups.backbone
    assert driver.decisions[-1].step == 8  # the fourth reading: three changes
    driver.finish()


def test_etuner_says_what_it_costs() -> None:
    assert "every 5%" in ETuner().notice()


# -- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [replace(BARE, window=2, tolerance=1), STEADY], ids=repr)
def test_the_order_of_readings_does_not_matter(policy: Policy) -> None:
    source = np.random.default_rng(2)
    names = example_groups(5).names
    walk = 1 + np.cumsum(source.normal(0, 0.004, (40, 5)), axis=0)
    readings = [dict(zip(names, row.tolist(), strict=True)) for row in walk]
    turned = [dict(reversed(r.items())) for r in readings]
    found = plans(policy, readings, 5)
    assert found == plans(policy, turned, 5)
    assert any(p.frozen for p in found)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Egeria, {"every": EVERY("0st")}),
        (Egeria, {"window": 1}),
        (Egeria, {"tolerance": 0}),
        (Egeria, {"bootstrap": 0}),
        (Egeria, {"refresh": EVERY("0st")}),
        (Egeria, {"refresh": EVERY("5st"), "reference": "pretrained"}),
        (Egeria, {"drop": 1}),
        (Egeria, {"max_unfreezes": -1}),
        (ETuner, {"threshold": 0}),
        (ETuner, {"patience": 0}),
        (ETuner, {"unfreeze": 0}),
        (ETuner, {"every": EVERY("0%")}),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="cannot"):
        kind(**options)


def test_egeria_passes_over_a_group_that_never_runs() -> None:
    """It puts out nothing, so it has no reading, and would hold up all deeper groups."""
    groups = LayerGroups(
        tuple(replace(g, calls=0) if g.depth == 1 else g for g in example_groups(4))
    )
    policy = Egeria(every=ONE, window=2, bootstrap=None, unfreeze="never")
    state, found = policy.init(groups), []
    for step in range(30):
        reading = {n: 1.0 for n in groups.names if n != "block1"}
        signals = {"sp_loss_int8": reading} if step else {}
        event = Event(
            EventKind.STEP, Progress(step, 30), signals, sampled=dict.fromkeys(signals, step)
        )
        plan, state = policy.decide(groups, state, event)
        if len(plan.frozen) not in found:
            found.append(len(plan.frozen))
    assert found == [0, 1, 3]
