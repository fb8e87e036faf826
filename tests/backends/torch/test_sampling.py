"""Signals in loops of one's own: sampled by themselves at the right moment, or asked for."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from backends.torch.helpers import Net, batch, groups_of, model_bits
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.optimizer import parameter_groups
from frostline.clock import Duration
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State
from frostline.signals import Need


@dataclass(frozen=True)
class Reads(Policy):
    """Reads one signal at every step and freezes what it is told."""

    signal: str = "gradient_norm"
    frozen: frozenset[str] = frozenset()
    frozen_too: bool = False
    every: str = "1st"

    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, Duration.parse(self.every), frozen_too=self.frozen_too),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        scale = {"head": 0.5}
        return FreezePlan(frozen=self.frozen, lr_scale=scale), {
            "seen": [*state.get("seen", []), event.signals.get(self.signal, {}).get("head")]
        }


class Loop:
    """A plain training loop that says nothing of signals."""

    def __init__(self, policy: Policy, kind: Any = SGD, **options: Any) -> None:
        self.model = Net(dropout=0.0)
        groups = groups_of(self.model)
        self.optimizer: Optimizer = kind(parameter_groups(self.model, groups, lr=0.1), **options)
        self.driver = torch_driver(self.model, self.optimizer, policy, groups=groups)
        self.norms: list[float] = []

    def backward(self, scale: float = 1.0) -> None:
        x, y = batch(self.driver.progress.step)
        (nn.functional.cross_entropy(self.model(x), y) * scale).backward()

    def norm(self) -> float:
        return float(torch.cat([p.grad.flatten() for p in self.model.head.parameters()]).norm())

    def step(self, parts: int = 1) -> None:
        with self.driver.step():
            for _ in range(parts):
                self.backward(1 / parts)
            self.norms.append(self.norm())
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def seen(self) -> list[Any]:
        return self.driver.state()["policy_state"]["seen"][1:]


@pytest.mark.parametrize("parts", [1, 3])
def test_signals_are_sampled_before_the_update(parts: int) -> None:
    loop = Loop(Reads())
    for _ in range(4):
        loop.step(parts)
    assert loop.seen == pytest.approx(loop.norms[:-1])
    loop.driver.finish()


def test_rates_are_read_without_the_factors_in_force_during_an_update() -> None:
    loop = Loop(Reads("learning_rate"))
    for _ in range(3):
        loop.step()
    assert loop.seen == pytest.approx([0.1, 0.1])


def test_a_sample_taken_by_hand_counts() -> None:
    loop = Loop(Reads())
    for _ in range(3):
        with loop.driver.step():
            loop.backward()
            loop.norms.append(loop.norm())
            loop.driver.sample()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert loop.seen == pytest.approx(loop.norms[:-1])


def test_a_closure_is_sampled_when_it_has_worked_out_the_gradients() -> None:
    loop = Loop(Reads("loss"))

    def closure() -> Any:
        loop.optimizer.zero_grad()
        x, y = batch(loop.driver.progress.step)
        loss = nn.functional.cross_entropy(loop.model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    losses: list[float] = []
    for give in (
        lambda: loop.optimizer.step(closure),
        lambda: loop.optimizer.step(closure=closure),
        lambda: loop.optimizer.step(closure),
    ):
        with loop.driver.step():
            assert give().item() == losses[-1]
    assert loop.seen == pytest.approx(losses[:-1])


def test_frozen_groups_in_a_closure_are_read_and_stay() -> None:
    frozen = frozenset({"blocks.0", "blocks.1"})
    loop = Loop(Reads(frozen=frozen, frozen_too=True), momentum=0.9, weight_decay=0.1)

    def closure() -> None:
        loop.optimizer.zero_grad()
        loop.backward()

    before = model_bits(loop.model)
    for _ in range(3):
        with loop.driver.step():
            loop.optimizer.step(closure)
    values = loop.driver.state()["gauges"]["values"]["gradient_norm"]
    assert values["blocks.0"] > 0
    after = model_bits(loop.model)
    assert {n for n in before if before[n] == after[n]} >= {"blocks.0.fc.weight"}
    assert loop.driver.costs.widened_steps == 3
    assert not any(p in loop.optimizer.state for p in loop.model.blocks[0].parameters())
    loop.driver.finish()


def test_a_loss_that_nobody_gave_is_asked_for() -> None:
    loop = Loop(Reads("loss"))
    with pytest.raises(PolicyError, match=r"driver\.sample\(loss=\.\.\.\)"):
        loop.step()


def test_a_loss_may_be_given_as_a_tensor_of_the_graph() -> None:
    loop = Loop(Reads("loss"))
    for step in range(2):
        with loop.driver.step():
            x, y = batch(step)
            loss = nn.functional.cross_entropy(loop.model(x), y)
            loss.backward()
            loop.driver.sample(loss=loss)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert loop.seen[-1] is not None
    assert isinstance(loop.seen[-1], float)


def test_updates_outside_a_step_and_after_the_end_are_left_alone() -> None:
    loop = Loop(Reads())
    loop.step()
    loop.backward()
    loop.optimizer.step()  # somebody's own
    loop.optimizer.zero_grad()
    loop.step()
    assert len(loop.seen) == 1
    loop.driver.finish()
    state = loop.driver.state()
    loop.backward()
    loop.optimizer.step()
    assert loop.driver.state() == state


def test_a_second_driver_takes_over() -> None:
    loop = Loop(Reads())
    loop.step()
    groups = loop.driver.backend.groups
    for policy in (Reads("weight_norm"), "full"):
        second = torch_driver(loop.model, loop.optimizer, policy, groups=groups)
        with second.step():
            loop.backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert ("weight_norm" in second.costs.signal_s) == (policy != "full")
    assert len(loop.seen) == 0


def test_an_optimizer_keeps_no_driver_alive() -> None:
    loop = Loop(Reads())
    loop.step()
    seen, model = weakref.ref(loop.driver), weakref.ref(loop.model)
    del loop.driver
    gc.collect()
    assert seen() is None
    loop.model(batch(0)[0]).sum().backward()
    loop.optimizer.step()
    del loop
    gc.collect()
    assert model() is None


def test_a_step_that_fails_leaves_nothing_widened() -> None:
    loop = Loop(Reads(frozen=frozenset({"blocks.0"}), frozen_too=True))
    loop.step()

    def fail() -> None:
        with loop.driver.step():
            loop.backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    weight = loop.model.blocks[0].fc.weight
    assert weight.grad is None
    assert not weight.requires_grad
    assert not loop.driver.sampling
    loop.optimizer.zero_grad()
    loop.step()
    assert loop.driver.progress.step == 2
    loop.driver.finish()


# -- mixed precision -------------------------------------------------------------------------


def scaled_step(loop: Loop, scaler: Any, *, overflow: bool = False, unscale: bool = False) -> None:
    with loop.driver.step():
        x, y = batch(loop.driver.progress.step)
        loss = nn.functional.cross_entropy(loop.model(x), y)
        scaler.scale(loss).backward()
        if overflow:
            loop.model.head.weight.grad.fill_(float("inf"))
        else:
            loop.norms.append(loop.norm() / scaler.get_scale())
        if unscale:
            scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()


KINDS = [(SGD, {}), (AdamW, {}), (AdamW, {"fused": True}), (SGD, {"fused": True})]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_gradients_under_a_scaler_are_the_true_ones(
    kind: Any, options: dict[str, Any], *, unscale: bool
) -> None:
    loop, scaler = Loop(Reads(), kind, **options), torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaled_step(loop, scaler, unscale=unscale)
    assert loop.seen == pytest.approx(loop.norms[:-1], rel=1e-4)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
@pytest.mark.parametrize("signal", ["gradient_norm", "summed_gradient_norm", "weight_delta_l1"])
def test_skipped_updates_are_gathered_by_no_signal(
    kind: Any, options: dict[str, Any], signal: str
) -> None:
    policy = Reads(signal, frozen=frozenset({"blocks.0"}), frozen_too=True, every="2st")
    loop, scaler = Loop(policy, kind, **options), torch.amp.GradScaler("cpu")
    for step in range(8):
        scaled_step(loop, scaler, overflow=step in (0, 3, 4))
    values = [v for v in loop.seen if v is not None]
    assert values
    assert all(torch.tensor(v).isfinite() for v in values)
    loop.driver.finish()


def test_a_scaled_update_is_planned_as_the_optimizer_makes_it() -> None:
    loop, scaler = Loop(Reads("update_importance"), AdamW, fused=True), torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaled_step(loop, scaler)
    loop.driver.finish()


def test_only_a_driver_that_samples_by_itself_takes_a_missing_sample_for_a_skipped_update() -> None:
    loop = Loop(Reads())
    with loop.driver.step():
        loop.backward()  # and no update
    assert loop.driver.progress.step == 1
    own = Driver(Reads(), loop.driver.backend)
    with pytest.raises(PolicyError, match=r"call driver\.sample\(\)"), own.step():
        loop.backward()


def test_updates_of_another_optimizer_are_missed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(Reads())
    other = SGD(loop.model.parameters(), lr=0.1)
    for step in range(24):
        with loop.driver.step():
            loop.backward()
            other.step()
            other.zero_grad()
        assert ("made no update" in caplog.text) == (step >= 9)
    assert caplog.text.count("made no update") == 1
    assert set(loop.seen) == {None}
