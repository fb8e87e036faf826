from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.clock import Duration, Progress
from frostline.driver import Driver
from frostline.errors import DurationError, PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.gradients import AutoFreeze, GradES, PipeTransformer
from frostline.policy import Event, EventKind, Policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

EVERY = Duration.parse
Readings = Sequence[Mapping[str, float]]


def plans(policy: Policy, readings: Readings, groups: LayerGroups) -> list[FreezePlan]:
    """The plan after each reading; reading i is taken at the end of step i of as many."""
    (need,) = policy.needs()
    event = Event(EventKind.START, Progress(0, len(readings), 1))
    plan, state = policy.decide(groups, policy.init(groups), event)
    assert not plan.frozen
    found = []
    for i, values in enumerate(readings, 1):
        progress = Progress(i, len(readings), 1)
        seen = {"signals": {need.signal: values}, "sampled": {need.signal: i}}
        plan, state = policy.decide(groups, state, Event(EventKind.STEP, progress, **seen))
        again, same = policy.decide(groups, state, Event(EventKind.STEP, progress, **seen))
        assert (again, same) == (plan, state), "one reading counts once"
        json.dumps(state, allow_nan=False)
        found.append(plan)
    return found


def depths(policy: Policy, readings: Readings, count: int) -> list[int]:
    """How many groups are frozen after each reading; always a prefix."""
    groups = example_groups(count)
    found = []
    for plan in plans(policy, readings, groups):
        depth = len(plan.frozen)
        assert plan.frozen == frozenset(groups.names[:depth])
        found.append(depth)
    return found


def blocks(*values: float, first: int = 0) -> dict[str, float]:
    return {f"block{i}": v for i, v in enumerate(values, first)}


# -- AutoFreeze -------------------------------------------------------------------------------


def test_autofreeze_by_hand() -> None:
    """Changes .1 .2 .5 .8: the median is .35, block2 is the first above it. Then .1 .5: .3."""
    readings = [
        blocks(10, 10, 10, 10),
        blocks(9, 8, 5, 2),
        blocks(4.5, 1, first=2),
        blocks(0.9999, first=3),
    ]
    assert depths(AutoFreeze(), readings, 5) == [0, 2, 3, 3]


@pytest.mark.parametrize(("percentile", "depth"), [(0, 0), (25, 1), (50, 2), (75, 3), (100, 3)])
def test_autofreeze_with_other_percentiles(percentile: float, depth: int) -> None:
    """Of .1 .2 .5 .8: quarter .175, median .35, three quarters .575, largest .8."""
    readings = [blocks(10, 10, 10, 10), blocks(9, 8, 5, 2)]
    assert depths(AutoFreeze(percentile=percentile), readings, 5)[-1] == depth


def test_autofreeze_takes_a_change_at_the_percentile_as_change() -> None:
    readings = [blocks(8, 8, 8), blocks(7, 6, 4)]  # 1/8, 1/4, 1/2: the median is block1's own
    assert depths(AutoFreeze(), readings, 4) == [0, 1]


def test_autofreeze_sees_growth_as_change() -> None:
    readings = [blocks(8, 8, 8), blocks(7, 16, 7.5)]
    assert depths(AutoFreeze(), readings, 4) == [0, 0]  # 1/8, 1, 1/16: block0 is the median
    readings = [blocks(8, 8, 8), blocks(8, 16, 7)]
    assert depths(AutoFreeze(), readings, 4) == [0, 1]


def reference_autofreeze(readings: Readings, names: list[str], percentile: float) -> list[int]:
    start, found = 0, [0]
    for before, now in itertools.pairwise(readings):
        active = names[start:]
        eta = [abs(before[n] - now[n]) / before[n] for n in active]
        limit = np.percentile(eta, percentile)
        # one part in 10^12 below: the percentile of equal changes may be off in the last bit
        start += next(i for i, e in enumerate(eta) if e >= limit * (1 - 1e-12))
        found.append(start)
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 200))
def test_autofreeze_agrees_with_numpy(seed: int, halves: int) -> None:
    percentile = halves / 2  # a percentile of 1e-13 is decided by rounding
    source = np.random.default_rng(seed)
    readings = [blocks(*source.uniform(1, 10, 6).tolist()) for _ in range(6)]
    wanted = reference_autofreeze(readings, [f"block{i}" for i in range(6)], percentile)
    assert depths(AutoFreeze(percentile=percentile), readings, 7) == wanted


def test_autofreeze_never_freezes_the_last_group_of_the_backbone() -> None:
    source = np.random.default_rng(0)
    readings = [blocks(*source.uniform(1, 10, 12).tolist()) for _ in range(60)]
    assert max(depths(AutoFreeze(percentile=100), readings, 13)) == 11


def test_autofreeze_on_noise_freezes_most_groups() -> None:
    """A relative rule always freezes: of 12 groups without any signal, 10 in 20 intervals."""
    ends = []
    for seed in range(200):
        source = np.random.default_rng(seed)
        readings = [blocks(*source.lognormal(0, 1, 12).tolist()) for _ in range(20)]
        ends.append(depths(AutoFreeze(), readings, 13)[-1])
    assert 9.3 < np.mean(ends) < 10.9


def test_autofreeze_with_nothing_before() -> None:
    readings = [blocks(0, 10, 0), blocks(0, 5, 3)]  # none, half, beyond all bounds
    assert depths(AutoFreeze(), readings, 4) == [0, 1]
    assert depths(AutoFreeze(), [blocks(0, 0, 0), blocks(3, 3, 3)], 4) == [0, 0]
    assert depths(AutoFreeze(), [blocks(0, 0, 0), blocks(0, 0, 0)], 4) == [0, 0]
    assert depths(AutoFreeze(percentile=75), [blocks(0, 1e-300), blocks(1, 1)], 3) == [0, 0]


def test_autofreeze_does_not_pass_over_a_group_without_a_reading() -> None:
    readings = [blocks(10, 10, 10, 10), {"block0": 9.9, "block2": 9, "block3": 1}]
    assert depths(AutoFreeze(percentile=100), readings, 5) == [0, 1]
    assert depths(AutoFreeze(), [blocks(10, 10), {}, blocks(9, 5)], 3) == [0, 0, 0]


def test_autofreeze_ignores_what_is_not_finite() -> None:
    readings = [blocks(10, 10, 10), blocks(math.nan, 5, 1), blocks(math.inf, 5, 1)]
    assert depths(AutoFreeze(percentile=100), readings, 4) == [0, 0, 0]


def test_autofreeze_compares_sums_so_that_noise_cancels() -> None:
    """Some public versions take the gradient of one step, or sums that do not add up.

    layer0's gradient is steady under noise that grows from interval to interval and cancels
    within each; its sum does not change. That of the others doubles.
    """
    case = NumpyCase()
    driver = Driver(AutoFreeze(every=EVERY("4st")), case.backend, 12, 6)
    for step in range(9):
        interval, noise = step // 4, (-1) ** step * 10 * (1 + step // 4)
        with driver.step() as plan:
            for name, weight in case.net.parameters.items():
                steady = 0.5 + noise if name.startswith("layer0") else 0.5 * 2**interval
                if plan.trains(driver.backend.groups.of_parameter(name)):
                    case.net.gradients[name] = np.full_like(weight, steady)
            driver.sample()
    sums = driver.decisions[-1].signals["summed_gradient_l1"]
    elements = {g.name: g.parameter_count for g in driver.backend.groups}
    assert sums == {n: 4 * 0.5 * (1 if n == "layer0" else 2) * c for n, c in elements.items()}
    assert driver.plan.frozen == {"layer0"}
    assert driver.decisions[-1].step == 8


def test_autofreeze_says_what_it_costs_and_why() -> None:
    assert "every step" in AutoFreeze().notice()
    assert AutoFreeze().needs()[0].steps is None
    reason = plans(AutoFreeze(), [blocks(10, 10, 10), blocks(9, 5, 1)], example_groups(4))[
        -1
    ].reason
    assert reason == (
        "autofreeze: 1 of 3 groups frozen; block1 still changes, percentile 50 of the changes is "
        "0.5"
    )


# -- PipeTransformer --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "wanted"),
    [
        (1 / 3, [4, 7, 9, 10, 11, 11, 12, 12, 12]),
        (1 / 5, [3, 5, 6, 8, 9, 9, 10, 10, 11]),
    ],
)
def test_pipetransformer_cap_is_the_released_schedule(alpha: float, wanted: list[int]) -> None:
    """Twelve blocks and a head of its own: all twelve may freeze, the head goes on."""
    groups, policy = example_groups(13), PipeTransformer(alpha, rule="cap")
    found = []
    for epoch in range(10):
        for step in (0, 4):
            event = Event(EventKind.STEP, Progress(epoch * 5 + step, 50, 5))
            plan, _ = policy.decide(groups, policy.init(groups), event)
            assert plan.frozen == frozenset(groups.names[: len(plan.frozen)])
        plan.check(groups)
        found.append(len(plan.frozen))
    assert found == [0, *wanted]


def test_pipetransformer_freezes_up_to_the_smallest_gradient_below_the_cap() -> None:
    """L = 12: caps 4; 4 + 8/3, so 7; 5 + 7/3, so 8; 8 + 4/3, so 10."""
    high = [9.0] * 12

    def smallest(at: int) -> dict[str, float]:
        return blocks(*high[:at], 1, *high[at + 1 :])

    readings = [smallest(at) for at in (9, 4, 11, 8)]
    assert depths(PipeTransformer(), readings, 13) == [4, 5, 8, 9]


def test_pipetransformer_looks_only_at_groups_that_train() -> None:
    readings = [blocks(1, 2, 3, 4, 5, 6), blocks(0, 2, 3, 4, 1, 6)]
    assert depths(PipeTransformer(alpha=0.9), readings, 7) == [1, 5]


def test_pipetransformer_stops_at_the_head() -> None:
    readings = [blocks(3, 2, 1), {"head": 0.1}, {"head": 0.1}]
    assert depths(PipeTransformer(alpha=0.99), readings, 4) == [3, 3, 3]
    assert depths(PipeTransformer(), [{}, {"head": 1}, {"block1": math.nan}], 4) == [0, 0, 0]


def test_pipetransformer_gradient_rule_is_reachable_and_adds_up() -> None:
    """The released code never reaches its rule, and its accumulator never accumulates."""
    assert PipeTransformer().rule == "gradient"
    case = NumpyCase()
    driver = Driver(PipeTransformer(alpha=0.9), case.backend, 12, 3)
    for _ in range(4):
        with driver.step():
            for name, weight in case.net.parameters.items():
                case.net.gradients[name] = np.full_like(weight, 0.1 if "layer1" in name else 2.0)
            driver.sample()
    size = driver.backend.groups["layer1"].parameter_count
    norms = driver.decisions[-1].signals["summed_gradient_norm"]
    assert norms["layer1"] == pytest.approx(3 * 0.1 * size**0.5)
    assert driver.plan.frozen == {"layer0", "layer1"}


def test_pipetransformer_says_what_it_costs() -> None:
    assert "every step" in PipeTransformer().notice()
    assert PipeTransformer(rule="cap").notice() == ""


# -- GradES -----------------------------------------------------------------------------------


def matrices(*values: float) -> dict[str, float]:
    """One value per matrix; biases and norms have some, too, that must not matter."""
    found = {f"block{i}.weight": v for i, v in enumerate(values)}
    return found | {"block0.bias": 0.0, "block0.norm.weight": 0.0, "head.weight": 0.0}


def held(found: Sequence[FreezePlan], count: int) -> list[list[str]]:
    return [sorted(p.frozen_parameters(example_groups(count))) for p in found]


def test_grades_by_hand() -> None:
    """Means before 50 %: 2 and 8; half of them: 1 and 4."""
    policy = GradES(start=EVERY("50%"), every=EVERY("1st"))
    readings = [
        matrices(1, 10),
        matrices(3, 6),
        matrices(1, 4.1),  # at 3 of 6: judged, and 1 is not below 1
        matrices(0.9, 4.1),
        matrices(50, 4.1),  # for good
        matrices(50, 3.9),
    ]
    found = plans(policy, readings, example_groups(3))
    one = ["block0.weight"]
    assert held(found, 3) == [[], [], [], one, one, [*one, "block1.weight"]]
    assert [p.done for p in found] == [False] * 5 + [True]


def test_grades_starts_exactly_at_its_share_of_the_run() -> None:
    policy = GradES(tau=1, relative=False, start=EVERY("30%"))
    found = plans(policy, [matrices(0.5, 9)] * 10, example_groups(3))
    assert [len(p.frozen) for p in found] == [0, 0, *[1] * 8]


def test_grades_as_published_is_absolute() -> None:
    policy = GradES(tau=2, relative=False, start=EVERY("0%"))
    found = plans(policy, [matrices(1000, 1.9), matrices(2, 5), matrices(1, 5)], example_groups(3))
    assert [len(p.frozen) for p in found] == [1, 1, 2]
    assert [p.done for p in found] == [False, False, True]


def test_grades_is_free_of_scale_when_relative() -> None:
    readings = [matrices(4, 8), matrices(4, 8), matrices(1, 8), matrices(1, 3)]
    large = [{n: v * 1e6 for n, v in r.items()} for r in readings]
    policy = GradES(start=EVERY("50%"))
    groups = example_groups(3)
    assert plans(policy, readings, groups) == plans(policy, large, groups)


def test_grades_without_a_warm_up_compares_with_the_first_reading() -> None:
    policy = GradES(start=EVERY("0%"))
    found = plans(policy, [matrices(4, 4), matrices(2.1, 1.9)], example_groups(3))
    assert held(found, 3) == [[], ["block1.weight"]]


def test_grades_leaves_the_rest_of_a_group_training() -> None:
    groups, policy = example_groups(3), GradES(tau=1, relative=False, start=EVERY("0%"))
    plan = plans(policy, [matrices(0.5, 9)], groups)[0]
    assert plan.frozen_parameters(groups) == {"block0.weight"}
    assert plan.live_norm == plan.live_dropout == {"block0"}
    assert plan.frontier(groups) == 0


def test_grades_by_group_shortens_the_backward_pass() -> None:
    groups = example_groups(3)
    policy = GradES(tau=1, relative=False, start=EVERY("0%"), per="group")
    found = plans(policy, [blocks(0.5, 9), blocks(0.5, 0.5)], groups)
    assert [p.frontier(groups) for p in found] == [1, 2]
    assert [p.done for p in found] == [False, True]
    assert not found[0].exempt


def test_grades_ignores_absent_and_not_finite_readings() -> None:
    policy = GradES(tau=1, relative=False, start=EVERY("0%"))
    readings = [{}, matrices(math.nan, math.inf), {"block1.weight": 0.5}]
    assert held(plans(policy, readings, example_groups(3)), 3) == [[], [], ["block1.weight"]]


def test_grades_monitors_weights_only() -> None:
    tensors = (
        TensorInfo("e.table", (9, 4), kind="embedding"),
        TensorInfo("e.conv", (4, 4, 3, 3)),
        TensorInfo("e.scale", (4, 1), kind="norm"),
        TensorInfo("e.vector", (4,)),
    )
    head = LayerGroup("head", 1, (TensorInfo("head.weight", (2, 4)),))
    groups = LayerGroups((LayerGroup("e", 0, tensors), head))
    policy = GradES(tau=1, relative=False, start=EVERY("0%"))
    plan = plans(policy, [{t.name: 0.0 for t in (*tensors, *head.parameters)}], groups)[0]
    assert plan.frozen_parameters(groups) == {"e.conv"}
    assert plan.done
    without = LayerGroups((LayerGroup("e", 0, tensors[-1:]), head))
    with pytest.raises(PolicyError, match="two or more dimensions"):
        policy.init(without)


@pytest.mark.parametrize(
    ("measure", "sign"), [("gradient", lambda _: 1), ("gradient_change", lambda step: (-1) ** step)]
)
def test_grades_does_not_take_a_decaying_rate_for_convergence(measure: Any, sign: Any) -> None:
    """The released package thresholds the change of weights, which a decaying rate brings to 0."""
    case = NumpyCase()
    case.optimizer.momentum = case.optimizer.weight_decay = 0.0
    policy = GradES(measure=measure, start=EVERY("20%"), every=EVERY("1st"))
    driver, moves = Driver(policy, case.backend, 20, 5), list[float]()
    for step in range(20):
        case.optimizer.lr = 0.1 * 0.7**step
        before = case.net.parameters["layer0.weight"].copy()
        with driver.step():
            for name, weight in case.net.parameters.items():
                case.net.gradients[name] = np.full_like(weight, 0.3 * sign(step))
            driver.sample()
            case.update()
        moves.append(float(abs(case.net.parameters["layer0.weight"] - before).sum()))
    assert moves[-1] < 0.01 * moves[4]  # what the package looks at
    assert not driver.plan.frozen


def test_grades_freezes_when_gradients_shrink_whatever_the_rate() -> None:
    case = NumpyCase()
    driver = Driver(GradES(start=EVERY("20%"), every=EVERY("1st")), case.backend, 20, 5)
    for step in range(20):
        case.optimizer.lr = 0.1 * 2**step
        with driver.step() as plan:
            frozen = plan.frozen_parameters(driver.backend.groups)
            for name, weight in case.net.parameters.items():
                size = 0.9 ** (step if "layer1" in name else 0) * (-1) ** step
                if name not in frozen:
                    case.net.gradients[name] = np.full_like(weight, size * 1e-9)
            driver.sample()
            case.update()
    assert driver.plan.frozen_parameters(driver.backend.groups) == {"layer1.weight"}
    assert not driver.plan.done
    driver.finish()


# -- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        AutoFreeze(),
        PipeTransformer(),
        GradES(per="group", start=EVERY("20%")),
        GradES(start=EVERY("20%"), tau=0.9),
    ],
    ids=repr,
)
def test_the_order_of_readings_does_not_matter(policy: Policy) -> None:
    source = np.random.default_rng(1)
    per_group = policy.needs()[0].per == "group"
    made = [source.uniform(0, 10, 5).tolist() for _ in range(10)]
    readings = [blocks(*values) if per_group else matrices(*values) for values in made]
    turned = [dict(reversed(r.items())) for r in readings]
    groups = example_groups(6)
    assert plans(policy, readings, groups) == plans(policy, turned, groups)
    assert plans(policy, readings, groups)[-1].frozen


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AutoFreeze, {"percentile": -1}),
        (AutoFreeze, {"percentile": 101}),
        (AutoFreeze, {"percentile": math.nan}),
        (AutoFreeze, {"every": EVERY("0st")}),
        (PipeTransformer, {"alpha": 0}),
        (PipeTransformer, {"alpha": 1}),
        (PipeTransformer, {"every": EVERY("0ep")}),
        (GradES, {"tau": 0}),
        (GradES, {"tau": math.inf}),
        (GradES, {"every": EVERY("0%")}),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="cannot"):
        kind(**options)


# -- groups out of the ordinary ---------------------------------------------------------------


def changed(place: int, **changes: Any) -> LayerGroups:
    """Four groups and a head, of which the one at `place` is changed."""
    groups = example_groups(5)
    return LayerGroups(tuple(replace(g, **changes) if g.depth == place else g for g in groups))


def test_autofreeze_passes_over_a_group_without_parameters() -> None:
    """It never has a reading, and would hold up all deeper groups."""
    groups = changed(0, parameters=())
    before = {"block1": 10.0, "block2": 10.0, "block3": 10.0}
    now = {"block1": 10.0, "block2": 5.0, "block3": 5.0}
    last = plans(AutoFreeze(every=EVERY("1st")), [before, now], groups)[-1]
    assert last.frozen == {"block0", "block1"}


@pytest.mark.parametrize("per", ["group", "parameter"])
def test_grades_ends_although_a_group_never_runs(per: Any) -> None:
    groups = changed(2, calls=0)
    policy = GradES(per=per, start=EVERY("50%"), every=EVERY("1st"))
    units = [f"block{i}{'.weight' if per == 'parameter' else ''}" for i in range(4)]
    quiet = [{u: 0.0 if "2" in u else value for u in units} for value in (1.0, 0.1)]
    last = plans(policy, quiet, groups)[-1]
    assert last.done
    assert "block2" not in last.frozen


def test_grades_says_at_the_start_that_it_needs_the_length_of_the_run() -> None:
    """Its readings may be counted in steps, and then nothing else would ask before."""
    policy, groups = GradES(every=EVERY("2st")), example_groups()
    event = Event(EventKind.START, Progress(0, None, 10))
    with pytest.raises(DurationError, match="total_steps is unknown"):
        policy.decide(groups, policy.init(groups), event)


def test_grades_says_what_its_readings_cost() -> None:
    assert "every 1% and keeps a copy" in GradES().notice()
    assert "copy" not in GradES(measure="gradient").notice()
