"""Moves on a plateau: when, how many groups, and never for a number that is none."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from frostline.clock import Progress
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.policies.phases import ends_its_phase
from frostline.policies.plateau import Plateau
from frostline.policy import Event, EventKind
from frostline.registry import make_policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

GROUPS = example_groups(5)  # four blocks and the head
BLOCKS = 4


def frozen_after(policy: Plateau, values: list[float], name: str = "val_loss") -> list[int]:
    """How many groups are frozen at the start and after each evaluation; always a prefix."""
    state: Any = policy.init(GROUPS)
    plan, state = policy.decide(GROUPS, state, Event(EventKind.START, Progress()))
    counts = [len(plan.frozen)]
    for step, value in enumerate(values):
        event = Event(EventKind.EVALUATED, Progress(step + 1), metrics={name: value})
        plan, state = policy.decide(GROUPS, state, event)
        state = json.loads(json.dumps(state, allow_nan=False))
        assert plan.frozen == set(GROUPS.names[: len(plan.frozen)])
        counts.append(len(plan.frozen))
    return counts


def test_unfreezing_worked_by_hand() -> None:
    #          best  best  worse best equal equal nan   worse
    values = [1.00, 0.90, 0.95, 0.80, 0.80, 0.80, math.nan, 0.9]
    assert frozen_after(Plateau(), values) == [4, 4, 4, 3, 3, 2, 1, 0, 0]


def test_freezing_worked_by_hand() -> None:
    policy = Plateau(direction="freeze", patience=2, groups_per_step=3)
    values = [1.0, 1.0, 0.9, 0.9, 0.9, 0.95, 0.99, 5.0, 5.0]
    assert frozen_after(policy, values) == [0, 0, 0, 0, 0, 3, 3, 4, 4, 4]


def test_a_cooldown_is_not_counted_but_improvements_in_it_are() -> None:
    policy = Plateau(cooldown=2)
    #         best moves  (cooldown)  moves  (cooldown, a new best) counted again
    values = [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.6, 0.6]
    assert frozen_after(policy, values) == [4, 4, 3, 3, 3, 2, 2, 2, 1]


def test_improvement_must_exceed_min_delta() -> None:
    assert frozen_after(Plateau(min_delta=0.25), [1.0, 0.75, 0.25]) == [4, 4, 3, 3]


def test_larger_may_be_better() -> None:
    policy = Plateau(metric="val_accuracy", mode="max")
    assert frozen_after(policy, [0.1, 0.2, 0.1], "val_accuracy") == [4, 4, 4, 3]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_an_improvement(mode: Any, value: float) -> None:
    """Compared carelessly, NaN becomes the best value for good, and nothing improves on it."""
    policy = Plateau(mode=mode, patience=2)
    assert frozen_after(policy, [value, 1.0, value, value]) == [4, 4, 4, 4, 3]


def test_steps_in_between_change_nothing() -> None:
    policy = Plateau()
    _, state = policy.decide(GROUPS, policy.init(GROUPS), Event(EventKind.START, Progress()))
    assert policy.decide(GROUPS, state, Event(EventKind.STEP, Progress(9)))[1] == state


def test_a_missing_metric_is_named() -> None:
    policy = Plateau(metric="f1")
    with pytest.raises(PolicyError, match="f1"):
        frozen_after(policy, [1.0])


@pytest.mark.parametrize(
    "options", ["patience=0", "groups_per_step=0", "cooldown=-1", "min_delta=-1", "direction=up"]
)
def test_bad_options_are_refused(options: str) -> None:
    with pytest.raises(PolicyError):
        make_policy(f"plateau:{options}")


def test_early_stopping_waits_for_groups_to_unfreeze_and_not_for_groups_to_freeze() -> None:
    for policy, waits in ((Plateau(), True), (Plateau(direction="freeze"), False)):
        state: Any = policy.init(GROUPS)
        plan, state = policy.decide(GROUPS, state, Event(EventKind.START, Progress()))
        assert ends_its_phase(policy, GROUPS, plan) == waits
        phases = [plan.phase]
        for step in range(BLOCKS + 3):
            event = Event(EventKind.EVALUATED, Progress(step), metrics={"val_loss": 1.0})
            plan, state = policy.decide(GROUPS, state, event)
            phases.append(plan.phase)
            assert ends_its_phase(policy, GROUPS, plan) == (waits and bool(plan.frozen))
        assert phases == ([0, 0, 1, 2, 3, 4, 4, 4] if waits else [0] * 8)
        assert not ends_its_phase(policy, GROUPS, plan)


def test_groups_train_once_they_are_unfrozen() -> None:
    case = NumpyCase()
    driver = Driver(Plateau(groups_per_step=9), case.backend)
    driver.start()
    before = case.net.parameters["layer0.weight"].copy()
    for _ in range(2):
        with driver.step():
            case.backward()
            case.update()
        assert (case.net.parameters["layer0.weight"] == before).all()
        driver.evaluated({"val_loss": 1.0})
    with driver.step():
        case.backward()
        case.update()
    assert (case.net.parameters["layer0.weight"] != before).any()
    assert "val_loss not better than 1 in 1 evaluations" in driver.plan.reason
