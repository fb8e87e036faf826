"""What each combinator does; that each is a lawful policy is in tests/contract."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from frostline.clock import Duration, Progress
from frostline.compose import (
    Bootstrap,
    CostVeto,
    Every,
    Guard,
    KeepTrainable,
    MaxFrozen,
    Placebo,
    PrefixOnly,
    Then,
    Union,
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


def test_cost_veto_refuses_what_cannot_pay_back() -> None:
    late = Then(Full(), D("90st"), LinearProbe())
    # each of the 10 steps left saves 4 * 0.021 - 0.01 s: about 0.8 s in all
    assert frozen(CostVeto(late, switch_cost_s=0.5), 89, 90) == [0, 4]
    assert frozen(CostVeto(late, switch_cost_s=2.0), 89, 90) == [0, 0]


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
