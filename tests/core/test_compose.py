"""What each combinator does; that each is a lawful policy is in tests/contract."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.clock import Duration, Progress
from frostline.compose import (
    Bootstrap,
    CostVeto,
    Discriminative,
    Every,
    Guard,
    KeepTrainable,
    MaxFrozen,
    Placebo,
    PrefixOnly,
    Slanted,
    Then,
    Union,
    kept_plan,
    kept_text,
    slanted_rate,
)
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.scheduled import Gradual
from frostline.policies.static import Freeze, Full, LinearProbe
from frostline.policy import Event, EventKind, Policy, State
from frostline.signals import Need
from frostline.testing import example_groups

GROUPS = example_groups(5)
D = Duration.parse


def at(step: int, **event: object) -> Event:
    kind = EventKind.EVALUATED if "metrics" in event else EventKind.STEP
    return Event(kind, Progress(step, 100, 10), **event)  # type: ignore[arg-type]


def run(policy: Policy, events: list[Event], groups: LayerGroups = GROUPS) -> list[FreezePlan]:
    state, plans = policy.init(groups), []
    for event in events:
        plan, state = policy.decide(groups, state, event)
        plans.append(plan)
    return plans


def frozen(policy: Policy, *steps: int) -> list[int]:
    return [len(p.frozen) for p in run(policy, [at(s) for s in steps])]


@dataclass(frozen=True, slots=True)
class Counting(Policy):
    """Freezes as many groups as questions it was asked."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        asked = state.get("asked", 0) + 1
        return FreezePlan(frozen=frozenset(groups.names[:asked])), {"asked": asked}


@dataclass(frozen=True, slots=True)
class Loudest(Policy):
    """Freezes the group with the largest signal."""

    seen: list[str] = field(default_factory=list, compare=False)

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", D("1st")),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        values = event.signals["gradient_norm"]
        return FreezePlan(frozen=frozenset({max(values, key=lambda g: values[g])})), state


def test_gradual_unfreezes_from_deep_to_shallow() -> None:
    plans = run(Gradual(D("1ep")), [at(0), at(9), at(10), at(20), at(40), at(99)])
    assert [len(p.frozen) for p in plans] == [4, 4, 3, 2, 0, 0]
    assert plans[2].frozen == {"block0", "block1", "block2"}


def test_gradual_until_spreads_the_groups() -> None:
    assert frozen(Gradual(until=D("50%")), 0, 12, 13, 25, 38, 49, 50, 99) == [
        4,
        4,
        3,
        2,
        1,
        1,
        0,
        0,
    ]


def test_gradual_refuses_no_interval() -> None:
    with pytest.raises(PolicyError):
        Gradual(D("0ep"))
    with pytest.raises(PolicyError):
        Gradual(groups_per_step=0)


def test_linear_probe_trains_the_head_only() -> None:
    (plan,) = run(LinearProbe(live_norm=True), [at(0)])
    assert plan.frozen == plan.live_norm == GROUPS.backbone


def test_union() -> None:
    (plan,) = run(Union((Freeze("block0"), Freeze("block1"))), [at(0)])
    assert plan.frozen == {"block0", "block1"}
    with pytest.raises(PolicyError):
        Union(())


def test_then_rebases_the_clock_at_the_boundary() -> None:
    policy = Then(Full(), D("2ep"), Gradual(D("1ep")))
    assert frozen(policy, 0, 19, 20, 29, 30) == [0, 0, 4, 4, 3]


def test_then_rebases_at_the_boundary_even_when_asked_late() -> None:
    policy = Then(Full(), D("2ep"), Gradual(D("1ep")))
    assert frozen(policy, 0, 35) == [0, 3]


def test_keep_trainable() -> None:
    (plan,) = run(KeepTrainable(LinearProbe(), "kind:norm | block3"), [at(0)])
    assert plan.frozen == {"block0", "block1", "block2"}
    assert plan.exempt["block1"] == {"block1.norm.weight"}


def test_bootstrap_keeps_everything_trainable_first() -> None:
    assert frozen(Bootstrap(LinearProbe(), D("1ep")), 0, 9, 10) == [0, 0, 4]


def test_max_frozen_unfreezes_the_deepest() -> None:
    (plan,) = run(MaxFrozen(LinearProbe(), 0.6), [at(0)])
    assert plan.frozen == {"block0", "block1", "block2"}
    with pytest.raises(PolicyError):
        MaxFrozen(Full(), 1.5)


def test_prefix_only_drops_what_cannot_be_skipped() -> None:
    (plan,) = run(PrefixOnly(Freeze("block0 | block2")), [at(0)])
    assert plan.frozen == {"block0"}


def test_every_asks_once_per_interval() -> None:
    assert frozen(Every(Counting(), D("1ep")), 0, 1, 9, 10, 11, 20) == [1, 1, 1, 2, 2, 3]


def test_every_passes_evaluations_on() -> None:
    plans = run(Every(Counting(), D("5ep")), [at(0), at(3, metrics={"loss": 1.0}), at(4)])
    assert [len(p.frozen) for p in plans] == [1, 2, 2]


def test_every_keeps_its_plan_whole() -> None:
    """A held plan is the one that was decided, also after its state went through JSON."""
    policy = Every(Discriminative(Freeze("block1.weight", live_norm=True), 2.0), D("5ep"))
    first, state = policy.decide(GROUPS, policy.init(GROUPS), at(0))
    held, _ = policy.decide(GROUPS, json.loads(json.dumps(state)), at(7))
    assert held == first
    assert held.exempt
    assert held.lr_scale


def test_a_kept_plan_is_read_once() -> None:
    plan = FreezePlan(frozen=frozenset({"block0"}), lr_scale={"head": 0.1}, reason="because")
    text = kept_text(plan)
    assert kept_plan(text) == plan
    assert kept_plan(text).reason == "because"
    assert kept_plan(text) is kept_plan(json.loads(json.dumps(text)))


# -- learning rates ---------------------------------------------------------------------------


def test_discriminative_rates_fall_from_the_head_to_the_input() -> None:
    (plan,) = run(Discriminative(Full(), 2.0), [at(0)])
    assert plan.lr_scale == {"block0": 1 / 16, "block1": 1 / 8, "block2": 1 / 4, "block3": 1 / 2}


def test_discriminative_rates_count_from_a_head_of_several_groups() -> None:
    names = ("stem", "body", "pool", "out")
    groups = LayerGroups(
        tuple(LayerGroup(n, i, (TensorInfo(n),)) for i, n in enumerate(names)),
        head=frozenset({"pool", "out"}),
    )
    (plan,) = run(Discriminative(Full(), 4.0), [at(0)], groups)
    assert plan.lr_scale == {"stem": 1 / 16, "body": 1 / 4}


def test_factors_multiply() -> None:
    twice = Discriminative(Discriminative(Full(), 2.0), 3.0)
    (plan,) = run(Slanted(twice), [at(5)])
    rate = (1 + 31 / 2) / 32
    assert plan.lr_scale["block3"] == pytest.approx(rate / 6)
    assert plan.lr_scale["head"] == pytest.approx(rate)


def test_rates_leave_the_rest_of_the_plan_alone() -> None:
    inner = Freeze("block1.weight", live_norm=True)
    (bare,), (plan,) = run(inner, [at(3)]), run(Slanted(Discriminative(inner)), [at(3)])
    assert bare.differs_only_in_rates(plan)


@pytest.mark.parametrize("factor", [0.9, 0, -2.6, math.inf, math.nan])
def test_discriminative_refuses_a_factor_below_one(factor: float) -> None:
    with pytest.raises(PolicyError):
        Discriminative(Full(), factor)


def test_slanted_rates_worked_by_hand() -> None:
    # T = 100: cut = 10; p = 0, 0.5, 1, 1 - 45/90, 1 - 89/90; rate = (1 + 31 p) / 32
    for step, p in ((0, 0), (5, 0.5), (10, 1), (55, 0.5), (99, 1 / 90)):
        assert slanted_rate(step, 100) == pytest.approx((1 + 31 * p) / 32, rel=1e-12)
    assert slanted_rate(100, 100) == slanted_rate(250, 100) == 1 / 32


def paper(t: int, total: int, cut_frac: float, ratio: float) -> float:
    """Equation 3 of Howard & Ruder 2018, letter by letter."""
    cut = math.floor(total * cut_frac + 1e-9)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(
    ("total", "cut", "ratio"), [(10, 0.1, 32), (350, 0.1, 32), (100, 0.29, 10), (60, 0.05, 2)]
)
def test_slanted_rates_are_the_papers_where_the_cut_is_whole(
    total: int, cut: float, ratio: float
) -> None:
    for t in range(total + 1):
        assert slanted_rate(t, total, cut, ratio) == pytest.approx(paper(t, total, cut, ratio))


def test_slanted_rates_stay_in_range_where_the_papers_do_not() -> None:
    """With 19 steps the published formula ends below 0: gradient ascent in the last updates."""
    assert paper(18, 19, 0.1, 32) < 0
    assert min(slanted_rate(t, 19) for t in range(19)) >= 1 / 32


@given(
    st.integers(1, 400),
    st.floats(0, 0.99),
    st.floats(1, 100),
)
def test_slanted_rates_rise_to_one_and_fall(total: int, cut: float, ratio: float) -> None:
    rates = [slanted_rate(t, total, cut, ratio) for t in range(total + 1)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(1)
    assert min(rates) >= 1 / ratio - 1e-12


def test_slanted_refuses_options_without_meaning() -> None:
    for options in ((1.0, 32.0), (-0.1, 32.0), (0.1, 0.5), (0.1, math.inf)):
        with pytest.raises(PolicyError):
            Slanted(Full(), *options)


def test_slanted_needs_a_known_length_and_takes_that_of_its_phase() -> None:
    with pytest.raises(PolicyError, match="total_steps="):
        run(Slanted(Full()), [Event(EventKind.START, Progress(0))])
    plans = run(Then(Full(), D("50st"), Slanted(Full())), [at(0), at(50), at(55), at(99)])
    rates = [p.lr_scale.get("head", 1.0) for p in plans]
    assert rates == pytest.approx([1, 1 / 32, 1, slanted_rate(49, 50)])


def test_cost_veto_refuses_what_cannot_pay_back() -> None:
    late = Then(Full(), D("90st"), LinearProbe())
    # each of the 10 steps left saves 4 * 0.021 - 0.01 s: about 0.8 s in all
    assert frozen(CostVeto(late, switch_cost_s=0.5), 89, 90) == [0, 4]
    assert frozen(CostVeto(late, switch_cost_s=2.0), 89, 90) == [0, 0]


def test_a_freeze_vetoed_from_the_start_says_so() -> None:
    (plan,) = run(CostVeto(LinearProbe(), switch_cost_s=1e9), [at(0)])
    assert not plan.frozen
    assert "cost-veto" in plan.reason


def test_cost_veto_never_blocks_unfreezing() -> None:
    policy = CostVeto(Then(LinearProbe(), D("10st"), Full()), switch_cost_s=1.0)
    assert frozen(policy, 0, 10) == [4, 0]


def test_cost_veto_needs_measured_costs_and_a_known_length() -> None:
    unmeasured = LayerGroups((LayerGroup("a", 0, (TensorInfo("a.w"),)),))
    with pytest.raises(PolicyError, match="measure"):
        CostVeto(Full()).init(unmeasured)
    with pytest.raises(PolicyError, match="total_steps"):
        run(CostVeto(LinearProbe()), [Event(EventKind.START, Progress(0))])


def test_guard_unfreezes_on_regression_and_lets_go() -> None:
    policy = Guard(LinearProbe(), metric="loss", tolerance=0.125, patience=2)
    losses = [1.0, 1.125, 1.25, 1.25, 1.25, 1.0]
    plans = run(policy, [at(i, metrics={"loss": loss}) for i, loss in enumerate(losses)])
    assert [len(p.frozen) for p in plans] == [4, 4, 4, 0, 0, 4]


def test_guard_with_a_metric_to_maximise_and_nan() -> None:
    policy = Guard(LinearProbe(), metric="accuracy", mode="max")
    values = [0.5, 0.6, 0.5, float("nan"), 0.7]
    plans = run(policy, [at(i, metrics={"accuracy": v}) for i, v in enumerate(values)])
    assert [len(p.frozen) for p in plans] == [4, 4, 0, 0, 4]


def test_guard_counts_nan_as_worse_one_by_one() -> None:
    policy = Guard(LinearProbe(), metric="loss", patience=2)
    values = [1.0, float("nan"), float("nan")]
    plans = run(policy, [at(i, metrics={"loss": v}) for i, v in enumerate(values)])
    assert [len(p.frozen) for p in plans] == [4, 4, 0]


def test_guard_takes_no_infinity_for_a_best() -> None:
    policy = Guard(Full(), metric="loss", mode="max")
    event = at(0, metrics={"loss": float("inf")})
    _, state = policy.decide(GROUPS, policy.init(GROUPS), event)
    assert state["best"] is None


def test_guard_names_a_missing_metric() -> None:
    with pytest.raises(PolicyError, match="accuracy"):
        run(Guard(Full(), metric="f1"), [at(0, metrics={"accuracy": 1.0})])


def test_placebo_shuffles_values_between_groups() -> None:
    values = {name: float(i) for i, name in enumerate(GROUPS.names)}
    event = at(1, signals={"gradient_norm": values})
    (real,) = run(Loudest(), [event])
    assert real.frozen == {"head"}
    picked = {next(iter(run(Placebo(Loudest(), seed), [event])[0].frozen)) for seed in range(40)}
    assert picked == set(GROUPS.names)  # every group gets the largest value under some seed


def test_placebo_keeps_one_permutation_per_sample() -> None:
    values = {name: float(i) for i, name in enumerate(GROUPS.names)}
    events = [at(step, signals={"gradient_norm": values}) for step in range(5)]
    assert len({p.frozen for p in run(Placebo(Loudest(), 3), events)}) == 1


@dataclass(frozen=True, slots=True)
class TwoPhases(Policy):
    """Test policy: linear probing, then everything, from the best weights of the first phase."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        if event.progress.step < 3:
            return FreezePlan(groups.backbone, keep_best="min val_loss"), state
        return FreezePlan(phase=1, done=True), state


def plans_of(policy: Policy, groups: LayerGroups, steps: int) -> list[FreezePlan]:
    state, plans = policy.init(groups), []
    for step in range(steps):
        kind = EventKind.STEP if step else EventKind.START
        plan, state = policy.decide(groups, state, Event(kind, Progress(step, steps, 2)))
        plans.append(plan)
    return plans


@pytest.mark.parametrize(
    "policy",
    [
        Bootstrap(TwoPhases(), Duration.parse("2st")),
        CostVeto(TwoPhases(), switch_cost_s=1e9),
    ],
)
def test_what_is_frozen_instead_stays_in_its_phase(policy: Policy) -> None:
    """Else a combinator that steps in would send the weights back to the best of the phase."""
    plans = plans_of(policy, example_groups(), 5)
    assert [p.phase for p in plans] == [0, 0, 0, 1, 1]
    assert [p.keep_best for p in plans] == ["min val_loss"] * 3 + [""] * 2
    assert not plans[0].frozen


def test_a_tripped_guard_ends_no_phase_even_without_a_best() -> None:
    groups, policy = example_groups(), Guard(TwoPhases(), metric="val_loss")
    state = policy.init(groups)
    event = Event(EventKind.EVALUATED, Progress(1, 5, 2), metrics={"val_loss": float("nan")})
    plan, _ = policy.decide(groups, state, event)
    assert (plan.frozen, plan.phase, plan.keep_best) == (frozenset(), 0, "min val_loss")
    assert "no number" in plan.reason


def test_phases_count_on_behind_a_boundary_and_the_run_does_not_end_there() -> None:
    plans = plans_of(Then(TwoPhases(), Duration.parse("5st"), TwoPhases()), example_groups(), 10)
    assert [p.phase for p in plans] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert [p.done for p in plans] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("interval", ["0st", "0%", "0ep"])
def test_every_refuses_an_interval_of_no_length(interval: str) -> None:
    with pytest.raises(PolicyError, match="an interval of no length"):
        Every(Counting(), D(interval))
