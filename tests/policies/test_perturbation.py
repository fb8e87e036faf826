from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from frostline.clock import Duration, Progress
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.perturbation import APF, SlimFit
from frostline.policy import Event, EventKind, Policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

EVERY = Duration.parse
ONE = EVERY("1st")
Readings = Sequence[Mapping[str, float]]


def plans(policy: Policy, readings: Readings, groups: LayerGroups) -> list[FreezePlan]:
    """The first plan, and that after each reading; reading i is taken at the end of step i."""
    (need,) = policy.needs()
    event = Event(EventKind.START, Progress(0, 100, 5))
    plan, state = policy.decide(groups, policy.init(groups), event)
    found = [plan]
    for i, values in enumerate(readings, 1):
        seen = {"signals": {need.signal: values}, "sampled": {need.signal: i}}
        event = Event(EventKind.STEP, Progress(i, 100, 5), **seen)
        plan, state = policy.decide(groups, state, event)
        assert policy.decide(groups, state, event) == (plan, state), "one reading counts once"
        json.dumps(state, allow_nan=False)
        found.append(plan)
    return found


# -- APF --------------------------------------------------------------------------------------


def checks(policy: APF, values: Sequence[Mapping[str, float]], groups: LayerGroups) -> list[str]:
    """Frozen groups after each check, as a string of digits; frozen groups give no reading."""
    found, state = [], policy.init(groups)
    frozen = frozenset[str]()
    for i, reading in enumerate(values, 1):
        seen = {n: v for n, v in reading.items() if n not in frozen}
        event = Event(
            EventKind.STEP,
            Progress(i, 100, 5),
            {"effective_perturbation": seen},
            sampled={"effective_perturbation": i},
        )
        plan, state = policy.decide(groups, state, event)
        frozen = plan.frozen
        found.append("".join(sorted(n.removeprefix("block") for n in frozen)))
    return found


def test_apf_by_hand() -> None:
    """Periods 1, 2, 3, then a reading above the threshold: 3 // 2 = 1, then 2, then 3.

    Checks   1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17
    tested   1     1        1           0  1        1
    frozen   x     x  x     x  x  x        x  x     x  x  x
    A mask that compares the wrong way round, as in one public version, gives the complement.
    """
    quiet, loud = {"block0": 0.04, "block1": 1.0}, {"block0": 0.06, "block1": 1.0}
    values = [quiet] * 9 + [loud] + [quiet] * 7
    wanted = "0 - 0 0 - 0 0 0 - - 0 0 - 0 0 0 -".replace("-", "").split(" ")
    assert checks(APF(crowded=1), values, example_groups(4)) == wanted


def test_apf_lets_a_group_that_always_moves_train() -> None:
    assert checks(APF(), [{"block0": 0.05, "block1": 0.9}] * 20, example_groups(4)) == [""] * 20


def test_apf_freezing_grows_by_one_and_shrinks_by_half() -> None:
    """After five quiet tests the period is 5; a loud one makes it 2, the next 1, the next 0."""
    groups, policy = example_groups(4), APF(crowded=1)

    def answers(frozen_for: Sequence[int], tests: Sequence[bool]) -> list[str]:
        found = []
        for period, quiet in zip(frozen_for, tests, strict=True):
            found += ["0"] * period + [""] if quiet else [""]
        return found

    tests = [True] * 5 + [False, True, False, False, True, False, False, True]
    periods = [1, 2, 3, 4, 5, 2, 3, 1, 0, 1, 0, 0, 1]
    values = list[Mapping[str, float]]()
    for period, quiet in zip(periods, tests, strict=True):
        values += [{"block0": 0.0 if quiet else 0.9}] * (period + 1 if quiet else 1)
    wanted = answers(periods, tests)
    assert checks(policy, values, groups) == wanted


def test_apf_does_not_test_a_group_before_it_has_trained_again() -> None:
    """block0 wakes at check 2: a value of that check would be of the time it was frozen."""
    readings = [{"block0": 0.0}, {"block0": 0.0}, {"block0": 0.0}]
    found = plans(APF(crowded=1), readings, example_groups(4))
    assert [len(p.frozen) for p in found] == [0, 1, 0, 1]


def test_apf_halves_its_threshold_while_most_is_frozen() -> None:
    """Two of three blocks are 2/3; with the third, 1: the threshold goes from .08 to .04."""
    groups, policy = example_groups(4), APF(threshold=0.08)
    two = {"block0": 0.05, "block1": 0.05, "block2": 0.5}
    assert checks(policy, [two, two, two], groups) == ["01", "", "01"]
    three = dict.fromkeys(two, 0.05)
    assert checks(policy, [three, three, three], groups) == ["012", "", ""]
    three = dict.fromkeys(two, 0.03)
    assert checks(policy, [three, three, three], groups) == ["012", "", "012"]
    three = dict.fromkeys(two, 0.05)
    assert checks(replace(policy, crowded=0.6), [two, two, two], groups) == ["01", "", ""]
    assert checks(replace(policy, crowded=1), [three, three, three], groups) == ["012", "", "012"]


def test_apf_counts_weights_not_groups() -> None:
    small, large = (
        LayerGroup(n, i, (TensorInfo(n, (s,)),))
        for i, (n, s) in enumerate((("block0", 1), ("block1", 9)))
    )
    groups = LayerGroups((small, large, LayerGroup("head", 2, (TensorInfo("head", (99,)),))))
    policy = APF(threshold=0.08)
    values = {"block0": 0.9, "block1": 0.05}
    assert checks(policy, [values] * 3, groups) == ["1", "", ""]
    values = {"block0": 0.05, "block1": 0.9}
    assert checks(policy, [values] * 3, groups) == ["0", "", "0"]


def test_apf_ignores_absent_and_not_finite_readings() -> None:
    readings = [{}, {"block0": math.nan, "head": 0.0}, {"block0": math.inf}, {"block0": 0.0}]
    assert checks(APF(), readings, example_groups(4)) == ["", "", "", "0"]


def drive(case: NumpyCase, driver: Driver, steps: int, gradient: Any) -> None:
    """Train on made-up gradients, by parameter and step."""
    case.optimizer.momentum = case.optimizer.weight_decay = 0.0
    for step in range(steps):
        with driver.step() as plan:
            frozen = plan.frozen_parameters(driver.backend.groups)
            for name, weight in case.net.parameters.items():
                if name not in frozen:
                    case.net.gradients[name] = gradient(name, step, weight)
            driver.sample()
            case.update()


def test_apf_does_not_take_opposite_moves_of_two_weights_for_rest() -> None:
    """One public version averages the changes of a tensor before it takes their magnitude.

    Half of layer0 moves up, half moves down, steadily; layer1 goes to and fro.
    """
    case = NumpyCase()
    before = case.net.parameters["layer0.weight"].copy()
    frozen = set[str]()

    def gradient(name: str, step: int, weight: Any) -> Any:
        halves = np.where(np.arange(weight.size) % 2, 1.0, -1.0).reshape(weight.shape)
        return halves * ((-1.0) ** step if name.startswith("layer1") else 1.0)

    policy = APF(every=ONE)
    driver = Driver(
        policy, case.backend, 60, 10, on_decision=lambda d: frozen.update(d.plan.frozen)
    )
    drive(case, driver, 30, gradient)
    moved = case.net.parameters["layer0.weight"] - before
    assert moved.mean() == pytest.approx(0, abs=1e-12)
    assert abs(moved).min() > 1
    assert frozen == {"layer1"}


def test_apf_freezes_weights_that_jitter_and_wakes_them_when_they_travel() -> None:
    """layer0 bounces between two points for 300 steps, then goes one way."""
    case, frozen_at = NumpyCase(), list[bool]()
    middle = {n: w + 0.1 for n, w in case.net.parameters.items()}

    def gradient(name: str, step: int, weight: Any) -> Any:
        if name.startswith("layer0") and step < 300:
            return (weight - middle[name]) * 2 / case.optimizer.lr
        return np.ones_like(weight)

    driver = Driver(APF(every=ONE), case.backend, 800, 10)
    for step in range(600):
        frozen_at.append("layer0" in driver.plan.frozen)
        drive(case, driver, 1, lambda n, _, w, s=step: gradient(n, s, w))
    early, late = frozen_at[100:300], frozen_at[540:]
    assert sum(early) > 0.5 * len(early)
    assert not any(late)
    driver.finish()


# -- SlimFit ----------------------------------------------------------------------------------


def trained(plan: FreezePlan, groups: LayerGroups) -> set[str]:
    frozen = plan.frozen_parameters(groups)
    return {p.name for g in groups if g.name not in groups.head for p in g.parameters} - frozen


def weights(groups: LayerGroups) -> set[str]:
    names = {p.name for g in groups for p in g.parameters if not p.name.endswith("bias")}
    return names - {"head.weight"}


def visits(policy: SlimFit, distances: Mapping[str, float], turns: int, count: int) -> list[set]:
    """Which weights train in each interval, if the distance of each never changes."""
    groups, state = example_groups(count), policy.init(example_groups(count))
    found = list[set[str]]()
    event = Event(EventKind.START, Progress(0, 100, 5))
    for i in range(turns):
        plan, state = policy.decide(groups, state, event)
        now = trained(plan, groups)
        assert {f"block{b}.bias" for b in range(count - 1)} <= now, "biases always train"
        found.append(now & weights(groups))
        values = {n: distances.get(n, 0.0) for n in now}
        event = Event(
            EventKind.STEP,
            Progress(i + 1, 100, 5),
            {"relative_weight_change": values},
            sampled={"relative_weight_change": i + 1},
        )
    return found


SLIM = SlimFit(frozen=0.5, every=EVERY("4st"))


def test_slimfit_visits_all_then_trains_what_changes_most() -> None:
    """Four weights, two at a time: two visits see all; then the two largest, always."""
    distances = {"block0.weight": 3, "block0.norm.weight": 1, "block1.weight": 2}
    found = visits(SLIM, distances | {"block1.norm.weight": 4}, 6, 3)
    assert all(len(v) == 2 for v in found)
    assert found[0] | found[1] == weights(example_groups(3))
    assert found[2:] == [{"block0.weight", "block1.norm.weight"}] * 4


def test_slimfit_takes_turns_when_distances_fall() -> None:
    """A weight that was largest and now moves less makes room for the next."""
    groups, policy = example_groups(3), replace(SLIM, frozen=0.75)
    state = policy.init(groups)
    order = visits(policy, {}, 4, 3)
    names = [next(iter(v)) for v in order]
    assert sorted(names) == sorted(weights(groups))
    script = [(names[0], 5.0), (names[1], 6.0), (names[2], 4.0), (names[3], 1.0), (names[1], 2.0)]
    wanted = [names[0], names[1], names[2], names[3], names[1], names[0]]
    event, found = Event(EventKind.START, Progress(0, 100, 5)), []
    for i in range(6):
        plan, state = policy.decide(groups, state, event)
        found += trained(plan, groups) & weights(groups)
        if i < 5:
            name, value = script[i]
            signals = {"relative_weight_change": {name: value}}
            sampled = {"relative_weight_change": i}
            event = Event(EventKind.STEP, Progress(i + 1, 100, 5), signals, sampled=sampled)
    assert found == wanted


def test_slimfit_first_visits_depend_on_the_seed_alone() -> None:
    def order(seed: int) -> list[set[str]]:
        return visits(replace(SLIM, seed=seed, frozen=0.9), {}, 9, 6)

    assert order(0) == order(0)
    assert len({str(sorted(map(sorted, order(seed)[:1]))) for seed in range(8)}) > 3


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (0.09, 10), (0.1, 9), (0.9, 1), (0.99, 1)])
def test_slimfit_freezes_the_share_rounded_down(share: float, count: int) -> None:
    found = visits(replace(SLIM, frozen=share), {}, 3, 6)
    assert [len(v) for v in found] == [count] * 3


def test_slimfit_counts_weights_norms_and_embeddings_but_neither_biases_nor_head() -> None:
    tensors = (
        TensorInfo("e.table", (9, 4), kind="embedding"),
        TensorInfo("e.norm.weight", (4,), kind="norm"),
        TensorInfo("e.norm.bias", (4,), kind="norm"),
        TensorInfo("e.norm.beta", (4,), kind="norm"),
        TensorInfo("e.token", (4,)),
    )
    head = LayerGroup("head", 1, (TensorInfo("head.weight", (2, 4)),))
    groups = LayerGroups((LayerGroup("e", 0, tensors), head))
    assert sorted(SlimFit().init(groups)["order"]) == ["e.norm.weight", "e.table"]


def test_slimfit_leaves_partly_frozen_groups_live() -> None:
    groups = example_groups(4)
    plan = plans(SlimFit(), [], groups)[0]
    assert plan.frozen
    assert plan.live_norm == plan.live_dropout == plan.frozen
    assert plan.frontier(groups) == 0


def test_slimfit_judges_each_step_by_the_change_of_that_step() -> None:
    """A reading precedes the update: of a weight that was frozen before it shows no change.

    Taken at its word, a weight's first reading would be 0 and it would never train again.
    """
    case = NumpyCase()
    policy = SlimFit(frozen=0.4)  # one of the three weights
    seen = list[frozenset[str]]()
    driver = Driver(policy, case.backend, 60, 10)
    groups = driver.backend.groups
    first = {n: w.copy() for n, w in case.net.parameters.items() if n.endswith("weight")}
    for step in range(8):
        driver.start()
        drive(case, driver, 1, lambda n, _, w: w * (5.0 if n.startswith("layer2") else 1.0))
        seen.append(driver.plan.frozen_parameters(groups))
        assert all(len(s) == 1 for s in seen), step
    distance = driver.state()["policy_state"]["distance"]
    rate = case.optimizer.lr
    assert distance == pytest.approx(
        {"layer0.weight": rate, "layer1.weight": rate, "layer2.weight": 5 * rate}
    )
    assert all((w != first[n]).all() for n, w in case.net.parameters.items() if n in first)
    driver.finish()


def test_slimfit_stays_with_a_weight_for_two_steps_before_it_judges_it() -> None:
    policy = SlimFit(frozen=0.75)
    # In the first interval of a run there is a reading of the step before: the reference.
    found = visits(policy, dict.fromkeys(weights(example_groups(3)), 1.0), 7, 3)
    runs = [len(list(run)) for _, run in itertools.groupby(map(sorted, found))]
    assert runs[:3] == [1, 2, 2]
    assert len({str(sorted(v)) for v in found}) == 4


def test_slimfit_ignores_what_is_not_finite() -> None:
    for value in (math.nan, math.inf):
        readings = [dict.fromkeys(weights(example_groups(3)), value)] * 4
        found = plans(SLIM, readings, example_groups(3))
        assert found == [found[0]] * 5


def test_slimfit_says_what_it_costs() -> None:
    assert "every step" in SlimFit().notice()
    assert "every 1%" in APF().notice()


# -- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [APF(threshold=0.5), SLIM], ids=repr)
def test_the_order_of_readings_does_not_matter(policy: Policy) -> None:
    source, groups = np.random.default_rng(3), example_groups(5)
    names = [*groups.names, *(p.name for g in groups for p in g.parameters)]
    readings = [dict(zip(names, source.random(len(names)).tolist(), strict=True)) for _ in range(9)]
    turned = [dict(reversed(r.items())) for r in readings]
    found = plans(policy, readings, groups)
    assert found == plans(policy, turned, groups)
    assert len({p.frozen_parameters(groups) for p in found}) > 3


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (APF, {"threshold": 0}),
        (APF, {"threshold": 1.1}),
        (APF, {"crowded": -0.1}),
        (APF, {"crowded": 1.1}),
        (APF, {"every": EVERY("0st")}),
        (SlimFit, {"frozen": 1.0}),
        (SlimFit, {"frozen": -0.1}),
        (SlimFit, {"every": EVERY("0st")}),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="cannot"):
        kind(**options)


def test_slimfit_never_freezes_a_shift_of_a_norm_whatever_its_name() -> None:
    tensors = [TensorInfo(f"n.{name}", (4,), kind="norm") for name in ("scale", "shift", "beta")]
    groups = LayerGroups((LayerGroup("n", 0, tuple(tensors)), LayerGroup("head", 1, ())))
    assert SlimFit().init(groups)["order"] == ["n.scale"]


def test_slimfit_freezes_exactly_its_share() -> None:
    """29 % of 100 weights are 29, though the float product is a little less."""
    tensors = tuple(TensorInfo(f"w{i}", (2, 2)) for i in range(100))
    groups = LayerGroups((LayerGroup("body", 0, tensors), LayerGroup("head", 1, ())))
    assert len(SlimFit(frozen=0.29).init(groups)["trained"]) == 71
