from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.clock import Duration
from frostline.compose import Guard, Then, Union
from frostline.driver import Driver
from frostline.errors import (
    BackendError,
    FrozenTensorChanged,
    PlanError,
    PolicyError,
    StorageError,
    TrainingError,
)
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.perturbation import APF
from frostline.policies.scheduled import Gradual
from frostline.policies.static import Freeze, Full, LinearProbe
from frostline.policy import Decision, Event, Policy, State
from frostline.signals import Need
from numpy_case import NumpyCase, copy_into

EVERY_TWO = Duration.parse("2st")


@dataclass(frozen=True, slots=True)
class Quiet(Policy):
    """Freezes what has the smaller gradients; tests of signals."""

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", Duration.parse("3st")),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        values = event.signals.get("gradient_norm", {})
        small = sorted(groups.backbone, key=lambda g: values.get(g, 0))[:1] if values else []
        return FreezePlan(frozen=frozenset(small)), state


POLICIES = [
    Full(),
    LinearProbe(),
    Gradual(EVERY_TWO),
    Quiet(),
    Guard(LinearProbe(), metric="loss", tolerance=0.01),
    Union((Gradual(EVERY_TWO), Freeze("kind:bias & backbone", live_norm=True))),
]


def driver_for(case: NumpyCase, policy: Policy, **options: Any) -> Driver:
    return Driver(policy, case.backend, total_steps=12, steps_per_epoch=4, **options)


def train(case: NumpyCase, driver: Driver, until: int) -> None:
    while driver.progress.step < until:
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
        if driver.progress.step % 4 == 0:
            value = sum(float(a.sum()) for a in case.net.parameters.values())
            driver.evaluated({"loss": value})


def state_of(case: NumpyCase) -> dict[str, str]:
    return dict(case.evidence())


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@settings(max_examples=8, deadline=None)
@given(stops=st.lists(st.integers(1, 11), min_size=1, max_size=3, unique=True))
def test_interrupted_equals_uninterrupted(policy: Policy, stops: list[int]) -> None:
    whole = NumpyCase()
    driver = driver_for(whole, policy)
    train(whole, driver, 12)

    case, saved = NumpyCase(), None
    for stop in [*sorted(stops), 12]:
        again = NumpyCase()
        copy_into(again, case)
        resumed = driver_for(again, replace(policy))
        if saved is not None:
            resumed.restore(json.loads(json.dumps(saved)))
        train(again, resumed, stop)
        case, saved = again, resumed.state()

    assert state_of(case) == state_of(whole)
    assert [d.to_json() for d in resumed.decisions] == [d.to_json() for d in driver.decisions]
    assert resumed.finish().to_json() == driver.finish().to_json()


def test_decisions_are_recorded_once_per_change() -> None:
    case, seen = NumpyCase(), list[Decision]()
    driver = driver_for(case, Gradual(EVERY_TWO), on_decision=seen.append)
    train(case, driver, 12)
    assert [(d.step, len(d.plan.frozen)) for d in seen] == [(0, 3), (2, 2), (4, 1), (6, 0)]
    assert driver.decisions == seen


def test_the_first_decision_is_always_recorded() -> None:
    case = NumpyCase()
    driver = driver_for(case, Full())
    train(case, driver, 2)
    assert [d.step for d in driver.decisions] == [0]


@pytest.mark.parametrize("tensor", ["layer0.weight", "layer1.running_mean"])
def test_a_write_to_a_frozen_tensor_names_tensor_and_step(tensor: str) -> None:
    case = NumpyCase()
    driver = driver_for(case, LinearProbe())
    train(case, driver, 3)
    driver.begin_step()
    case.backward()
    case.tamper(tensor)
    with pytest.raises(FrozenTensorChanged, match=rf"by step 4[\s\S]*{tensor}"):
        driver.end_step()


def test_a_write_between_steps_is_found_at_the_end() -> None:
    case = NumpyCase()
    driver = driver_for(case, LinearProbe())
    train(case, driver, 3)
    case.tamper("layer0.bias")
    with pytest.raises(FrozenTensorChanged, match=r"layer0\.bias"):
        driver.finish()


def test_a_write_before_unfreezing_is_found_at_the_unfreeze() -> None:
    case = NumpyCase()
    driver = driver_for(case, Gradual(EVERY_TWO))
    train(case, driver, 2)
    case.tamper("layer2.weight")
    with pytest.raises(FrozenTensorChanged, match=r"layer2\.weight"):
        driver.begin_step()


def test_without_proof_nothing_is_digested() -> None:
    case = NumpyCase()
    driver = driver_for(case, LinearProbe(), prove=False)
    train(case, driver, 3)
    case.tamper("layer0.bias")
    assert driver.finish().holds == ()


def test_the_certificate_lists_every_span() -> None:
    case = NumpyCase()
    driver = driver_for(case, Gradual(EVERY_TWO))
    train(case, driver, 5)
    certificate = driver.finish()
    spans = {(h.tensor, h.from_step, h.to_step) for h in certificate.holds}
    assert ("layer2.weight", 0, 2) in spans
    assert ("layer1.running_mean", 0, 4) in spans
    assert ("layer0.bias", 0, 5) in spans
    assert all(len(h.sha256) == 64 for h in certificate.holds)
    assert certificate.check_s > 0
    assert driver.finish() == certificate  # finishing twice is finishing once


def test_a_finished_run_does_not_go_on() -> None:
    """What it would train then would be in no proof."""
    case = NumpyCase()
    driver = driver_for(case, LinearProbe())
    train(case, driver, 2)
    driver.finish()
    with pytest.raises(TrainingError, match="finished"):
        driver.begin_step()
    with pytest.raises(TrainingError, match="finished"):
        driver.evaluated({"loss": 1.0})


def test_what_outsiders_change_is_restored_and_said(caplog: pytest.LogCaptureFixture) -> None:
    case = NumpyCase()
    driver = driver_for(case, LinearProbe())
    train(case, driver, 1)
    case.net.trainable["layer0.weight"] = True
    with caplog.at_level(logging.WARNING, logger="frostline"):
        train(case, driver, 2)
    assert "layer0.weight" in caplog.text
    assert not case.net.trainable["layer0.weight"]


def test_an_exception_in_a_step_does_not_count_it() -> None:
    case = NumpyCase()
    driver = driver_for(case, Full())
    with pytest.raises(ZeroDivisionError), driver.step():
        raise ZeroDivisionError
    assert driver.progress.step == 0


def test_signals_are_sampled_when_due_and_only_then() -> None:
    case, asked = NumpyCase(), []
    probe = case.backend.probe
    case.backend = CountingBackend(case, asked)
    driver = driver_for(case, Quiet())
    train(case, driver, 7)
    assert probe is not None
    assert asked == [2, 5]  # at the end of each interval of three steps
    assert driver.costs.signals_s > 0


class CountingBackend:
    """Passes everything on and notes when a probe is taken."""

    def __init__(self, case: NumpyCase, asked: list[int]) -> None:
        self.inner, self.case, self.asked = case.backend, case, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def probe(self, loss: float | None = None) -> Any:
        self.asked.append(self.case.step - 1)
        return self.inner.probe(loss)


def test_signals_that_nobody_sampled_stop_the_run() -> None:
    """A policy must not decide on stale or absent values without a word."""
    case = NumpyCase()
    driver = driver_for(case, Quiet())
    train(case, driver, 2)
    driver.begin_step()
    case.backward()
    case.update()
    with pytest.raises(PolicyError, match=r"driver\.sample"):
        driver.end_step()


def test_a_policy_without_needs_pays_for_no_probe() -> None:
    case, asked = NumpyCase(), []
    case.backend = CountingBackend(case, asked)
    train(case, driver_for(case, LinearProbe()), 6)
    assert asked == []


def test_a_plan_that_freezes_everything_stops_the_run() -> None:
    case = NumpyCase()
    with pytest.raises(PlanError, match="freezes everything"):
        driver_for(case, Freeze("all")).start()


def test_resuming_under_another_policy_is_refused() -> None:
    case = NumpyCase()
    driver = driver_for(case, LinearProbe())
    train(case, driver, 2)
    with pytest.raises(StorageError, match="written under"):
        driver_for(NumpyCase(), Full()).restore(driver.state())


def test_resuming_with_other_weights_is_refused() -> None:
    case = NumpyCase()
    driver = driver_for(case, LinearProbe())
    train(case, driver, 2)
    other = NumpyCase()
    other.tamper("layer0.weight")
    with pytest.raises(FrozenTensorChanged, match=r"layer0\.weight"):
        driver_for(other, LinearProbe()).restore(driver.state())


def test_state_of_another_format_is_refused() -> None:
    case = NumpyCase()
    with pytest.raises(StorageError, match="format"):
        driver_for(case, Full()).restore({"format": 99})


def test_a_backend_that_loses_digests_is_caught() -> None:
    class Forgetful:
        def __init__(self, inner: Any) -> None:
            self.inner, self.calls = inner, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def fingerprint(self, names: Any) -> dict[str, str]:
            self.calls += 1
            return self.inner.fingerprint(names) if self.calls == 1 else {}

    case = NumpyCase()
    driver = Driver(LinearProbe(), Forgetful(case.backend))
    driver.start()
    with pytest.raises(BackendError, match="no digest"):
        driver.finish()


@dataclass(frozen=True, slots=True)
class Wide(Quiet):
    """Reads the gradients of what it freezes, too."""

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", EVERY_TWO, frozen_too=True),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(frozen=frozenset({"layer0"})), state


def test_frozen_groups_are_read_in_widened_steps_and_stay() -> None:
    case = NumpyCase()
    driver = driver_for(case, Wide())
    train(case, driver, 5)
    assert driver.state()["gauges"]["values"]["gradient_norm"]["layer0"] > 0
    assert driver.costs.widened_steps == 2
    assert "layer0.weight" not in case.optimizer.velocity
    assert {h.from_step for h in driver.finish().holds} == {0}


def test_an_exception_in_a_widened_step_leaves_nothing_widened() -> None:
    case = NumpyCase()
    driver = driver_for(case, Wide())
    train(case, driver, 1)

    def fail() -> None:
        with driver.step():
            case.backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not case.net.trainable["layer0.weight"]
    assert not case.has_gradient("layer0.weight")
    assert not driver.sampling
    case.net.gradients = dict.fromkeys(case.net.gradients)
    train(case, driver, 4)
    driver.finish()


def test_outside_a_step_nothing_is_sampled() -> None:
    case = NumpyCase()
    driver = driver_for(case, Wide())
    for _ in range(4):
        assert not driver.sampling
        case.backward()
        driver.sample()
        case.optimizer.step()
        train(case, driver, driver.progress.step + 1)
    assert driver.costs.widened_steps == 2


def test_an_overflowing_step_is_not_gathered() -> None:
    case = NumpyCase()
    driver = driver_for(case, Quiet())
    for step in range(4):
        with driver.step():
            case.backward()
            if step == 2:
                case.net.gradients["head.weight"] = np.full((8, 2), np.inf)
            driver.sample(overflow=step == 2)
            case.net.gradients = dict.fromkeys(case.net.gradients)
    assert driver.state()["gauges"]["values"] == {}


def test_costs_name_each_signal() -> None:
    case = NumpyCase()
    driver = driver_for(case, Quiet())
    train(case, driver, 3)
    assert 0 < driver.costs.signal_s["gradient_norm"] <= driver.costs.signals_s


@dataclass(frozen=True, slots=True)
class Planned(Policy):
    """Plans by the step from which they hold."""

    plans: tuple[tuple[int, FreezePlan], ...]

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return [plan for step, plan in self.plans if step <= event.progress.step][-1], state


def test_best_weights_older_than_a_freeze_are_written_back() -> None:
    """A group that was frozen after the best evaluation goes back, too; its proof has two spans."""
    frozen = frozenset({"layer0"})
    plans = (
        (0, FreezePlan(keep_best="min loss")),
        (4, FreezePlan(frozen, keep_best="min loss")),
        (6, FreezePlan(frozen, phase=1)),
    )
    case = NumpyCase()
    driver = driver_for(case, Planned(plans))
    kept = {}
    for step in range(1, 8):
        with driver.step():
            case.backward()
            case.update()
        if step in (2, 6):
            kept[step] = case.net.parameters["layer0.weight"].copy()
            driver.evaluated({"loss": step})
    assert np.array_equal(case.net.parameters["layer0.weight"], kept[2])
    assert not np.array_equal(kept[6], kept[2])
    spans = [h for h in driver.finish().holds if h.tensor == "layer0.weight"]
    assert [(h.from_step, h.to_step) for h in spans] == [(4, 6), (6, 7)]
    assert spans[0].sha256 != spans[1].sha256


@dataclass(frozen=True, slots=True)
class Sums(Policy):
    """Reads what counts each sample: a sum, and a product of two steps."""

    def needs(self) -> tuple[Need, ...]:
        every = Duration.parse("3st")
        return Need("summed_gradient_norm", every, None), Need("update_importance", every, 2)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        del groups, event
        return FreezePlan(), state


@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_that_fails_after_it_was_sampled_counts_once(*, resumed: bool) -> None:
    read = []
    for fails in (False, True):
        case = NumpyCase()
        driver = driver_for(case, Sums())
        for _ in range(3):
            with pytest.raises(ArithmeticError) if fails else nullcontext(), driver.step():
                case.backward()
                driver.sample()
                if fails:
                    raise ArithmeticError
                case.update()
            if fails and resumed:
                state, driver = driver.state(), driver_for(case, Sums())
                driver.restore(state)
            if fails:  # once more, with the same gradients
                with driver.step():
                    driver.sample()
                    case.update()
        read.append(driver.state()["gauges"]["values"])
    assert read[1] == read[0]
    assert read[0]["update_importance"]


def test_signals_of_a_phase_that_is_over_are_forgotten() -> None:
    case = NumpyCase()
    driver = driver_for(case, Then(APF(every=EVERY_TWO), Duration.parse("5st"), Full()))
    train(case, driver, 4)
    assert any(driver.state()["gauges"]["memory"])
    train(case, driver, 6)
    assert not any(driver.state()["gauges"]["memory"])
