from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.clock import Duration, Progress
from frostline.cost import predicted_step_s
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.budget import ALSAR, Elastic, most_important, prefix_seconds
from frostline.policies.common import freeze_first
from frostline.policies.static import Full
from frostline.policy import Event, EventKind, Policy, State
from frostline.testing import example_groups
from numpy_case import NumpyCase

EVERY = Duration.parse


def groups_costing(costs: Sequence[GroupCost], head: Sequence[int] = ()) -> LayerGroups:
    """Groups g0, g1, ... with these costs; the last is the head, or those at `head`."""
    made = tuple(
        LayerGroup(f"g{i}", i, (TensorInfo(f"g{i}.w", (2,)),), cost=c) for i, c in enumerate(costs)
    )
    return LayerGroups(made, head=frozenset(f"g{i}" for i in head))


def random_costs(source: random.Random, count: int, *, whole: bool = False) -> list[GroupCost]:
    def one() -> float:
        return float(source.randint(0, 9)) if whole else source.uniform(0, 9)

    return [
        GroupCost(one() + 1, one(), one(), one(), 0, source.choice([None, 0.5]))
        for _ in range(count)
    ]


def read(
    policy: Policy, groups: LayerGroups, state: State, step: int, **signals: Mapping[str, float]
) -> tuple[FreezePlan, State]:
    """The plan after a reading at the end of this many steps."""
    event = Event(
        EventKind.STEP, Progress(step, 100, 10), signals, sampled=dict.fromkeys(signals, step)
    )
    return policy.decide(groups, state, event)


# -- the programme of ElasticTrainer ----------------------------------------------------------


def cost_of(chosen: Sequence[int], update: Sequence[float], through: Sequence[float]) -> float:
    return sum(update[i] for i in chosen) + (through[min(chosen)] if chosen else 0.0)


def by_brute_force(
    gains: Sequence[float], update: Sequence[float], through: Sequence[float], budget: float
) -> float:
    return max(
        sum(gains[i] for i in chosen)
        for size in range(len(gains) + 1)
        for chosen in combinations(range(len(gains)), size)
        if cost_of(chosen, update, through) <= budget * (1 + 1e-12)
    )


def problem(
    source: random.Random, count: int, *, whole: bool
) -> tuple[list[float], list[float], list[float]]:
    def one(high: int) -> float:
        return float(source.randint(0, high)) if whole else source.uniform(0, high)

    gains = [one(20) - 5 for _ in range(count)]
    update = [one(40) for _ in range(count)]
    through, total = list[float](), 0.0
    for _ in range(count):
        through.insert(0, total)
        total += one(25)
    return gains, update, through


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([10, 100, 250, 500, 1000]))
def test_the_programme_is_exact_where_times_are_whole_units(
    seed: int, count: int, budget: int
) -> None:
    gains, update, through = problem(random.Random(seed), count, whole=True)
    chosen = sorted(most_important(gains, update, through, budget))
    assert cost_of(chosen, update, through) <= budget
    assert sum(gains[i] for i in chosen) == by_brute_force(gains, update, through, budget)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 10),
    st.floats(1, 400),
    st.sampled_from([30, 1000]),
)
def test_the_programme_is_within_its_rounding_of_the_best(
    seed: int, count: int, budget: float, units: int
) -> None:
    """Never above the budget; as good as the best in n units less of time."""
    gains, update, through = problem(random.Random(seed), count, whole=False)
    chosen = sorted(most_important(gains, update, through, budget, units=units))
    assert cost_of(chosen, update, through) <= budget * (1 + 1e-9)
    found, best = (
        sum(gains[i] for i in chosen),
        by_brute_force(gains, update, through, budget),
    )
    assert found <= best + 1e-9
    assert found >= by_brute_force(gains, update, through, budget * (1 - count / units)) - 1e-9


def test_the_way_to_an_early_group_makes_it_dear() -> None:
    """Group 0 needs a time of 4 by itself; the other two together 3."""
    assert most_important([9, 4, 4], [1, 1, 1], [3, 1, 0], 4) == {0}
    assert most_important([7, 4, 4], [1, 1, 1], [3, 1, 0], 4) == {1, 2}
    assert most_important([9, 4, 4], [1, 1, 1], [3.1, 1, 0], 4) == {1, 2}
    assert most_important([7, 4, 5], [1, 1, 1], [2, 1, 0], 4) == {0, 2}


def test_the_way_is_paid_once() -> None:
    assert most_important([1, 1, 1], [1, 1, 1], [7, 5, 0], 10) == {0, 1, 2}
    assert len(most_important([1, 1, 1], [1, 1, 1], [7, 5, 0], 9.9)) == 2


@pytest.mark.parametrize("budget", [0.0, -1.0, 0.5])
def test_nothing_fits_in_no_time(budget: float) -> None:
    assert most_important([1, 1], [1, 1], [1, 0], budget) == frozenset()


# -- seconds of a prefix ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_prefix_seconds_are_the_predicted_ones(seed: int, count: int, two: bool) -> None:
    """Also with a head of two groups of which one is not the deepest."""
    source = random.Random(seed)
    head = sorted({source.randrange(count), count - 1}) if two else [count - 1]
    groups = groups_costing(random_costs(source, count), head)
    bodies = count - len(head)
    wanted = [predicted_step_s(groups, freeze_first(groups, n)) for n in range(bodies + 1)]
    assert prefix_seconds(groups) == pytest.approx(wanted)


# -- elastic ----------------------------------------------------------------------------------


def chosen(policy: Elastic, groups: LayerGroups, values: Mapping[str, float]) -> FreezePlan:
    return read(policy, groups, policy.init(groups), 2, update_importance=values)[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.2, 1), st.booleans())
def test_elastic_keeps_the_budget_and_gains_the_most(
    seed: int, count: int, rho: float, two: bool
) -> None:
    """Against all plans there are, by the cost model of the reports."""
    source = random.Random(seed)
    head = sorted({source.randrange(1, count), count - 1}) if two else [count - 1]
    costs = random_costs(source, count)
    # forward passes of frozen groups are never slower: the policy takes that for granted
    costs = [replace(c, frozen_forward_s=c.frozen_forward_s and c.forward_s / 2) for c in costs]
    groups = groups_costing(costs, head)
    values = {g.name: source.uniform(-1, 5) for g in groups}
    plan = chosen(Elastic(rho=rho), groups, values)
    full = predicted_step_s(groups, FreezePlan())

    def gain(plan: FreezePlan) -> float:
        return sum(values[n] for n in groups.backbone - plan.frozen)

    body = sorted(groups.backbone)
    every = [
        FreezePlan(frozen=frozenset(c)) for n in range(len(body) + 1) for c in combinations(body, n)
    ]

    def best(share: float) -> float:
        within = [p for p in every if predicted_step_s(groups, p) <= share * full * (1 + 1e-12)]
        return max(map(gain, within), default=0.0)

    only_head = predicted_step_s(groups, FreezePlan(frozen=groups.backbone))
    if only_head > rho * full:
        assert plan.frozen == groups.backbone
        assert "the head alone exceeds" in plan.reason
        return
    assert predicted_step_s(groups, plan) <= rho * full * (1 + 1e-9)
    slack = (rho * full - only_head) / full * len(body) / 1000
    assert best(rho - slack) - 1e-9 <= gain(plan) <= best(rho) + 1e-9


def test_elastic_by_hand() -> None:
    """Full: 12 forward, 3 to carry (not to g0), 4 to train. The head alone: 12 and 1."""
    cost = GroupCost(forward_s=3, input_grad_s=1, weight_grad_s=1)
    groups = groups_costing([cost] * 4)
    assert prefix_seconds(groups) == [19, 17, 15, 13]
    values = {"g0": 3.0, "g1": 2.5, "g2": 0.4, "g3": -9.0}
    trained = [
        (0.69, "g3"),  # 13.11: the head alone
        (0.80, "g2 g3"),  # 15.2
        (0.85, "g1 g3"),  # 16.15: past g2, and leaves it frozen
        (0.90, "g0 g3"),  # 17.1
        (0.95, "g0 g1 g3"),  # 18.05
        (1.00, "g0 g1 g2 g3"),
    ]
    for rho, names in trained:
        plan = chosen(Elastic(rho=rho), groups, values)
        assert " ".join(n for n in groups.names if n not in plan.frozen) == names
    assert (
        "2 of 3 groups train, 93% of the importance"
        in chosen(Elastic(rho=0.95), groups, values).reason
    )
    assert (
        "step predicted 0.947 of full, budget 0.95"
        in chosen(Elastic(rho=0.95), groups, values).reason
    )


def test_elastic_freezes_what_harms() -> None:
    groups = example_groups(4)
    values = {"block0": -1.0, "block1": 2.0, "block2": -3.0, "head": 1.0}
    assert chosen(Elastic(rho=1), groups, values).frozen == {"block0", "block2"}
    values["block1"] = -2.0
    assert chosen(Elastic(rho=1), groups, values).frozen == groups.backbone


def test_elastic_does_not_depend_on_the_scale_of_importance() -> None:
    """Why the published division by the largest magnitude may be left out."""
    groups, source = example_groups(8), random.Random(4)
    values = {g.name: source.uniform(-1, 5) for g in groups}
    one = chosen(Elastic(rho=0.6), groups, values)
    many = chosen(Elastic(rho=0.6), groups, {n: v * 1e-6 for n, v in values.items()})
    assert one == many
    assert one.frozen


def test_elastic_keeps_its_choice_where_a_reading_says_nothing() -> None:
    """In a warm-up from a rate of 0 the first updates are 0."""
    groups, policy = example_groups(4), Elastic(rho=1)
    plan, state = read(
        policy, groups, policy.init(groups), 2, update_importance=dict.fromkeys(groups.names, 0.0)
    )
    assert not plan.frozen
    values = {"block0": -1.0, "block1": math.nan, "block2": 2.0}
    plan, state = read(policy, groups, state, 36, update_importance=values)
    assert plan.frozen == {"block0", "block1"}
    plan, state = read(policy, groups, state, 70, update_importance={})
    assert plan.frozen == {"block0", "block1"}


def test_elastic_freezes_groups_without_parameters() -> None:
    bare = LayerGroup("pool", 1, (), cost=GroupCost(1, 1))
    items = (example_groups(3)[0], bare, replace(example_groups(3)[2], depth=2))
    groups = LayerGroups(items)
    plan = chosen(Elastic(rho=1), groups, {"block0": 1.0, "pool": 9.0})
    assert plan.frozen == {"pool"}


def test_elastic_chooses_as_often_as_the_paper() -> None:
    """At epochs 0, 4 and 8 of 12: here after 2 steps and then at each third."""
    case, seen = NumpyCase(), list[int]()
    driver = Driver(Elastic(), case.backend, total_steps=120, steps_per_epoch=10)
    for _ in range(120):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
        at = driver._gauges.sampled.get("update_importance")
        if at is not None and at not in seen:
            seen.append(at)
            assert set(driver._gauges.values["update_importance"]) == set(
                driver.backend.groups.names
            )
    assert seen == [2, 43, 84]
    assert driver.costs.widened_steps in (2, 4)  # two a reading, if anything was frozen
    full = predicted_step_s(driver.backend.groups, FreezePlan())
    for decision in driver.decisions[1:]:
        assert predicted_step_s(driver.backend.groups, decision.plan) <= 0.533 * full


def test_sampling_importance_leaves_weights_and_optimizer_alone() -> None:
    """The published probes step the optimizer and restore the weights, not its momentum."""
    policy = Elastic(rho=1, every=EVERY("2st"))
    case = NumpyCase()
    driver = Driver(policy, case.backend, 6, 2)
    for _ in range(6):
        with driver.step() as plan:
            case.backward()
            before = dict(case.evidence())
            frozen = plan.frozen_parameters(driver.backend.groups)
            driver.sample()
            after = dict(case.evidence())
            assert all(after[k] == v for k, v in before.items() if k[2:] not in frozen)
            assert {k for k in after if k[0] != "g"} == {k for k in before if k[0] != "g"}
            assert not any(f"g:{name}" in after for name in frozen)
            case.update()
    assert driver._gauges.sampled


def test_elastic_that_freezes_nothing_trains_as_full_does() -> None:
    one, two = NumpyCase(), NumpyCase()
    for case, policy in ((one, Full()), (two, AllImportant())):
        driver = Driver(policy, case.backend, 8, 4)
        for _ in range(8):
            with driver.step():
                case.backward()
                driver.sample()
                case.update()
    assert one.evidence() == two.evidence()


class AllImportant(Elastic):
    """Reads as Elastic does and never freezes."""

    __slots__ = ()

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(), state


# -- aL-SAR -----------------------------------------------------------------------------------

UNIT = GroupCost(forward_s=1, input_grad_s=1, weight_grad_s=1)


def prefix(policy: ALSAR, fisher: Sequence[float], costs: Sequence[GroupCost]) -> int:
    groups = groups_costing(costs)
    values = {f"g{i}": v for i, v in enumerate(fisher)}
    plan, _ = read(policy, groups, policy.init(groups), 1, fisher_ema=values)
    assert plan == freeze_first(groups, len(plan.frozen))
    return len(plan.frozen)


NEVER = ALSAR(unfreeze_rate=0)


def test_al_sar_by_hand() -> None:
    """Steps of 11, 9, 7, 5 for 0 to 3 frozen groups of 4 (3 + 1 + 3 by group but the first)."""
    assert prefix_seconds(groups_costing([UNIT] * 4)) == [11, 9, 7, 5]
    # scores 1, 11/9 * .7 = .86, 11/7 * .4 = .63, 0
    assert prefix(NEVER, [3, 3, 4], [UNIT] * 4) == 0
    # 1, 11/9 * .9 = 1.1, 11/7 * .6 = .94
    assert prefix(NEVER, [1, 3, 6], [UNIT] * 4) == 1
    # 1, 11/9 * .9 = 1.1, 11/7 * .8 = 1.26
    assert prefix(NEVER, [1, 1, 8], [UNIT] * 4) == 2
    # 1, 11/9 * 9/11 = 1: not better, so nothing freezes
    assert prefix(NEVER, [2, 9, 0], [UNIT] * 4) == 0


def test_al_sar_weighs_cost() -> None:
    """The same information; a first group that is dear to train is frozen."""
    dear = GroupCost(forward_s=1, weight_grad_s=20)
    assert prefix(NEVER, [3, 3, 4], [UNIT] * 4) == 0
    assert prefix(NEVER, [3, 3, 4], [dear, UNIT, UNIT, UNIT]) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_al_sar_agrees_with_the_formula(seed: int, count: int) -> None:
    source = random.Random(seed)
    costs = random_costs(source, count)
    fisher = [source.uniform(0, 9) for _ in range(count - 1)]
    groups = groups_costing(costs)
    full = predicted_step_s(groups, FreezePlan())
    scores = [
        full
        / predicted_step_s(groups, freeze_first(groups, n))
        * (sum(fisher) - sum(fisher[:n]))
        / sum(fisher)
        for n in range(count)
    ]
    found = prefix(NEVER, fisher, costs)
    assert scores[found] == pytest.approx(max(scores))
    by_batch = prefix(replace(NEVER, by_batch=True), fisher, costs)  # the first batch weighs 1
    assert scores[by_batch] == pytest.approx(max(scores))


def by_batches(norms: Sequence[float], **options: Any) -> list[int]:
    """Frozen groups after each reading of the head's gradient norm, the rest being equal."""
    groups = groups_costing([UNIT] * 4)
    policy = ALSAR(by_batch=True, unfreeze_rate=0, **options)
    state, found = policy.init(groups), list[int]()
    for i, norm in enumerate(norms, 1):
        values = {"fisher_ema": {"g0": 1.0, "g1": 3.0, "g2": 6.0}, "gradient_norm": {"g3": norm}}
        plan, state = read(policy, groups, state, i, **values)
        found.append(len(plan.frozen))
    return found


def test_al_sar_freezes_less_on_a_batch_that_teaches_more() -> None:
    """Gains z (1, .9, .6, 0) + (0, 2, 4, 6)/11 * 1.1; z = 1: 1, 1.1, 1, .6.

    z = 4: 4, 3.8, 2.8, .6. z = 1/4: .25, .425, .55, .6. z squares the norm's ratio. z = .64:
    .64, .776, .784, .6, where without the factor of 1.1 group 2 would train, too.
    """
    assert by_batches([2, 1.6]) == [1, 2]
    assert by_batches([2, 4]) == [1, 0]
    assert by_batches([2, 1]) == [1, 3]
    # the average moves by a tenth: after 4, 16 it is 5.2, and 5.2 weighs 1
    assert by_batches([2, 4, 5.2**0.5]) == [1, 0, 1]


def test_al_sar_unfreezes_everything_now_and_then() -> None:
    groups, policy = groups_costing([UNIT] * 4), ALSAR()
    state, frozen = policy.init(groups), list[int]()
    for i in range(1, 1001):
        plan, state = read(policy, groups, state, i, fisher_ema={"g0": 1, "g1": 1, "g2": 8})
        frozen.append(len(plan.frozen))
    assert set(frozen) == {0, 2}
    assert 200 < frozen.count(0) < 300  # 250 wanted, standard deviation 14
    assert policy.needs()[0].frozen_too is False
    assert NEVER.needs()[0].frozen_too is True


def test_al_sar_remembers_what_frozen_groups_read_before() -> None:
    groups, policy = groups_costing([UNIT] * 4), NEVER
    plan, state = read(
        policy, groups, policy.init(groups), 1, fisher_ema={"g0": 1, "g1": 1, "g2": 8}
    )
    assert len(plan.frozen) == 2
    plan, state = read(policy, groups, state, 2, fisher_ema={"g2": 1.0})  # each a third
    assert len(plan.frozen) == 0
    assert state["fisher"] == {"g0": 1, "g1": 1, "g2": 1}


def test_al_sar_on_no_information_keeps_training() -> None:
    assert prefix(NEVER, [0, 0, 0], [UNIT] * 4) == 3  # nothing to learn: all may freeze
    assert prefix(NEVER, [math.nan, 1, 1], [UNIT] * 4) == 1


@pytest.mark.parametrize("policy", [ALSAR(every=EVERY("2st"), by_batch=True), ALSAR(EVERY("1st"))])
def test_al_sar_trains_and_proves_its_freezing(policy: ALSAR) -> None:
    case = NumpyCase()
    driver = Driver(policy, case.backend, 40, 10)
    for _ in range(40):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
    counts = {len(d.plan.frozen) for d in driver.decisions}
    assert 0 in counts
    assert len(counts) > 1
    assert driver.costs.widened_steps == 0
    assert driver.finish().holds


# -- both -------------------------------------------------------------------------------------


def test_published_defaults() -> None:
    assert Elastic().rho == 0.533
    assert ALSAR().unfreeze_rate == 0.25


@pytest.mark.parametrize("policy", [Elastic(), ALSAR()])
def test_costs_must_be_measured(policy: Policy) -> None:
    groups = example_groups(3)
    bare = LayerGroups(tuple(replace(g, cost=None) for g in groups))
    with pytest.raises(PolicyError, match="measure_costs"):
        policy.init(bare)


@pytest.mark.parametrize("policy", [Elastic(rho=0.6), ALSAR(unfreeze_rate=0.5)])
def test_a_reading_counts_once_and_survives_a_resume(policy: Policy) -> None:
    groups, source = example_groups(6), random.Random(2)
    signal = policy.needs()[0].signal
    state = policy.init(groups)
    for step in range(1, 20):
        values = {g.name: source.uniform(0, 5) for g in groups}
        plan, state = read(policy, groups, state, step, **{signal: values})
        turned = dict(reversed(values.items()))
        assert read(policy, groups, state, step, **{signal: turned}) == (plan, state)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Elastic, {"rho": 0}),
        (Elastic, {"rho": 1.1}),
        (Elastic, {"rho": math.nan}),
        (Elastic, {"every": EVERY("0st")}),
        (ALSAR, {"unfreeze_rate": -0.1}),
        (ALSAR, {"unfreeze_rate": 1.1}),
        (ALSAR, {"every": EVERY("0%")}),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="cannot"):
        kind(**options)


def test_short_intervals_are_announced() -> None:
    assert "every 1%" in ALSAR().notice()
    assert "every step" in ALSAR(every=EVERY("1st")).notice()
    assert "every 34%" in Elastic().notice()


def test_alsar_takes_a_gradient_beyond_all_bounds_for_no_weight() -> None:
    """The square of a huge norm is no number in floats, which must not end the run."""
    groups, policy = example_groups(4), ALSAR(by_batch=True, unfreeze_rate=0)
    fisher = dict.fromkeys(groups.names, 1.0)
    _, state = read(
        policy, groups, policy.init(groups), 1, fisher_ema=fisher, gradient_norm={"head": 1e200}
    )
    assert state["usual"] is None
