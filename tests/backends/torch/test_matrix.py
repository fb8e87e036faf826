"""Frozen bits stay identical through 50 real steps: every optimizer with every habit of training.

Each cell runs freeze (50 updates), unfreeze (5), freeze again (5) under a driver, and compares
digests worked out by the test itself. Then cheats are planted: each must be caught or undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backends.torch.helpers import (
    NET_GROUPS,
    Net,
    batch,
    bits,
    groups_of,
    model_bits,
    moved,
    train_step,
)
from frostline.backends.torch.backend import TorchBackend
from frostline.backends.torch.optimizer import parameter_groups
from frostline.driver import Driver
from frostline.errors import FrozenTensorChanged
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd-foreach": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, foreach=True),
    "sgd-fused": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.001, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.05, weight_decay=0.01),
    "adagrad-fused": lambda p: Adagrad(p, lr=0.05, weight_decay=0.01, fused=True),
    "lion": lambda p: Lion(p, lr=0.001, weight_decay=0.1),
}
HABITS = ("batch-norm", "dropout", "clipping", "accumulation", "ema", "autocast")
SHALLOW = frozenset(NET_GROUPS[:2])


@dataclass(frozen=True)
class Scripted(Policy):
    """Freezes the first two groups except in updates 50 to 54."""

    thaw_from: int = 50
    thaw_to: int = 55

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        thawed = self.thaw_from <= event.progress.step < self.thaw_to
        return FreezePlan(frozen=frozenset() if thawed else SHALLOW), state


def shallow(digests: dict[str, str]) -> dict[str, str]:
    return {n: d for n, d in digests.items() if n.startswith(tuple(f"{g}." for g in SHALLOW))}


class Trainer:
    """An ordinary training loop with one habit."""

    def __init__(self, make: Callable[[Any], Optimizer], habit: str) -> None:
        self.habit = habit
        self.model = Net(dropout=0.5 if habit == "dropout" else 0.0)
        groups = groups_of(self.model)
        self.optimizer = make(parameter_groups(self.model, groups, lr=0.01, weight_decay=0.01))
        backend = TorchBackend(self.model, self.optimizer, groups=groups)
        self.driver = Driver(Scripted(), backend, total_steps=60)
        self.driver.start()
        self.ema = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
        )

    def updates(self, steps: range) -> None:
        for step in steps:
            self.model.train()
            with self.driver.step():
                self._update(step)
            self.model.eval()
            self.model(batch(step)[0])

    def _update(self, step: int) -> None:
        for part in range(4 if self.habit == "accumulation" else 1):
            x, y = batch(100 * part + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.habit == "autocast"):
                loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
        if self.habit == "clipping":
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.habit == "ema":
            self.ema.update_parameters(self.model)


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_bits_are_identical(name: str, habit: str) -> None:
    torch.manual_seed(0)
    trainer = Trainer(OPTIMIZERS[name], habit)
    model = trainer.model
    names = {n for n, _ in model.named_parameters()}

    before = model_bits(model)
    trainer.updates(range(50))
    after = model_bits(model)
    assert shallow(after) == shallow(before)
    assert names - shallow(before).keys() <= moved(before, after)
    assert {n for n in before if n.startswith("blocks.2.norm.")} <= moved(before, after)
    if habit == "ema":
        averaged = {n.removeprefix("module."): d for n, d in model_bits(trainer.ema).items()}
        assert shallow(averaged) == shallow(before)
        assert averaged["head.weight"] not in (before["head.weight"], after["head.weight"])

    trainer.updates(range(50, 55))
    thawed = model_bits(model)
    assert names <= moved(after, thawed)
    trainer.updates(range(55, 60))
    assert shallow(model_bits(model)) == shallow(thawed)

    holds = trainer.driver.finish().holds
    for span, digests in (((0, 50), before), ((55, 60), thawed)):
        proved = {h.tensor: h.sha256 for h in holds if (h.from_step, h.to_step) == span}
        assert proved == shallow(digests)


# -- planted cheats --------------------------------------------------------------------------


class Run:
    """A driven loop into which a cheat can be planted."""

    def __init__(self, optimizer: str = "sgd", *, guarded: bool = True) -> None:
        self.model = Net(dropout=0.0)
        groups = groups_of(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        backend = TorchBackend(self.model, self.optimizer if guarded else None, groups=groups)
        self.driver = Driver(Scripted(thaw_from=999, thaw_to=999), backend)
        self.step = 0

    @property
    def weight(self) -> nn.Parameter:
        return self.model.blocks[0].fc.weight

    def update(self, cheat: Callable[[Run], Any] = lambda run: None) -> None:
        with self.driver.step():
            x, y = batch(self.step)
            nn.functional.cross_entropy(self.model(x), y).backward()
            cheat(self)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step += 1

    def updates(self, count: int) -> None:
        for _ in range(count):
            self.update()


def add_in_place(run: Run) -> None:
    with torch.no_grad():
        run.weight.add_(1)


def zero_gradient(run: Run) -> None:
    run.weight.grad = torch.zeros_like(run.weight)


def normalise_a_batch(run: Run) -> None:
    run.model.blocks[0].norm.training = True
    run.model(batch(7)[0])


def train_everything(run: Run) -> None:
    run.model.requires_grad_(requires_grad=True)
    x, y = batch(7)
    nn.functional.cross_entropy(run.model(x), y).backward()


def replace_weight(run: Run) -> None:
    run.model.blocks[0].fc.weight = nn.Parameter(torch.zeros(8, 6))


@pytest.mark.parametrize(
    ("cheat", "tensor"),
    [
        (add_in_place, r"blocks\.0\.fc\.weight"),
        (zero_gradient, r"blocks\.0\.fc\.weight"),
        (normalise_a_batch, r"blocks\.0\.norm\.(num_batches_tracked|running_mean)"),
        (train_everything, r"blocks\.0\."),
        (replace_weight, r"blocks\.0\.fc\.weight"),
    ],
)
def test_a_cheat_fails_the_run_in_its_own_step(cheat: Callable[[Run], None], tensor: str) -> None:
    run = Run(guarded=False)
    for _ in range(3):
        run.update()
    with pytest.raises(FrozenTensorChanged, match=rf"by step 4\n.*{tensor}"):
        run.update(cheat)


def write_through_data(run: Run) -> None:
    run.weight.data.add_(1)


def test_a_write_that_autograd_cannot_see_fails_the_run_within_a_round() -> None:
    run = Run()
    for _ in range(20):
        run.update()
    run.update(write_through_data)
    with pytest.raises(FrozenTensorChanged, match=r"blocks\.0\.fc\.weight"):
        run.updates(20)


def test_a_write_that_autograd_cannot_see_fails_the_run_at_the_end() -> None:
    run = Run()
    run.update()
    run.update(write_through_data)
    with pytest.raises(FrozenTensorChanged, match=r"blocks\.0\.fc\.weight"):
        run.driver.finish()


def test_a_write_that_autograd_cannot_see_fails_the_run_at_unfreeze() -> None:
    run = Run()
    run.driver.policy = Scripted(thaw_from=2, thaw_to=9)
    run.update()
    run.update(write_through_data)
    with pytest.raises(FrozenTensorChanged, match=r"blocks\.0\.fc\.weight"):
        run.update()


@pytest.mark.parametrize("name", ["sgd", "adamw-fused", "lion"])
def test_a_zero_gradient_is_dropped_before_a_driven_optimizer_sees_it(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(name)
    run.driver.start()
    before = model_bits(run.model)
    with caplog.at_level(logging.WARNING, "frostline"):
        run.update(zero_gradient)
        run.update()
    assert "changed the freezing of blocks.0.fc.weight; restored" in caplog.text
    run.driver.finish()
    assert shallow(model_bits(run.model)) == shallow(before)


def test_a_later_line_that_sets_requires_grad_is_undone_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run()
    run.update()
    before = model_bits(run.model)
    with caplog.at_level(logging.WARNING, "frostline"):
        for _ in range(3):
            run.model.requires_grad_(requires_grad=True)
            run.update()
    assert caplog.text.count("changed the freezing of blocks.0.fc.weight") == 3
    assert shallow(model_bits(run.model)) == shallow(before)
    run.driver.finish()


def test_calling_train_has_no_effect_on_what_is_frozen() -> None:
    run = Run()
    run.update()
    before = model_bits(run.model)
    for _ in range(3):
        run.model.eval()
        run.model.train()
        run.update(lambda run: run.model.train())
    assert shallow(model_bits(run.model)) == shallow(before)
    run.driver.finish()


def test_the_test_itself_sees_an_unfrozen_weight_move() -> None:
    model = Net()
    before = bits(dict(model.named_parameters()))
    train_step(model, SGD(model.parameters(), lr=0.1), 0)
    assert moved(before, bits(dict(model.named_parameters()))) == set(before)
