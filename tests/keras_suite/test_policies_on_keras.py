"""Every registered policy drives a Keras model, and an interrupted run equals a whole one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from contract.test_policies import ALL, COMBINED
from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.backend import KerasBackend
from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.names import tensors
from frostline.driver import Driver
from frostline.errors import PolicyError, SelectorMatchedNothing
from frostline.groups import GroupCost
from frostline.policy import Policy
from frostline.registry import make_policy
from keras_suite.keras_case import adamw, batch, digest, small_model

STEPS, PER_EPOCH = 18, 6
COST = GroupCost(0.01, 0.01, 0.01, 0.001, 1024)

#: One of each kind; the others take minutes on the slow backends.
QUICK = (
    "full",
    "first:groups=2",
    "bitfit",
    "ulmfit",
    "freezeout:t0=0.5,scale=linear,scale_lr=false",
    "gradual:every=3st,groups_per_step=2",
    "autofreeze:every=5st,percentile=75",
    "egeria:every=2st,bootstrap=none,window=3,tolerance=0.9,refresh=5st,reference=snapshot",
    "apf:threshold=0.9,crowded=0,every=2st",
    "elastic:every=5st",
    "lisa:every=4st,layers=9,importance=weight_norm,states=release",
    "lp-ft:patience=1,restore_best=false,lr=0.1",
    "chain-thaw:length=4st",
)


def each(policy: str | Policy) -> Any:
    name = policy.rpartition("/")[2] if isinstance(policy, str) else repr(policy)
    return pytest.param(policy, id=name, marks=() if policy in QUICK else pytest.mark.slow)


class Run:
    """`small_model` under AdamW, split steps, outside `fit`."""

    def __init__(self, policy: str | Policy) -> None:
        self.model = small_model(dropout=0.2)
        self.model.compile(adamw(), "mse", run_eagerly=True)
        self.model.test_on_batch(*batch(0))
        groups = layer_groups(self.model)
        costed = groups.with_costs(dict.fromkeys(groups.names, COST))
        self.backend = KerasBackend(self.model, groups=costed)
        self.driver = Driver(
            make_policy(policy), self.backend, total_steps=STEPS, steps_per_epoch=PER_EPOCH
        )

    def train(self, until: int) -> None:
        while (step := self.driver.progress.step) < until:
            with self.driver.step():
                self.backend.backward(batch(step))
                self.driver.sample(loss=self.backend.steps.loss)
                self.backend.update()
            if self.driver.progress.step % PER_EPOCH == 0:
                loss = float(self.model.test_on_batch(*batch(-1)))
                metrics = {"loss": loss, "accuracy": 1 / (1 + loss), "train_loss": loss / 2}
                metrics |= {"val_loss": loss, "val_accuracy": 1 / (1 + loss)}
                self.driver.evaluated(metrics)

    def outcome(self) -> list[Any]:
        """What must be the same: the proof, every decision, all bits."""
        proof = self.driver.finish().to_json()
        return [proof, [d.to_json() for d in self.driver.decisions], self.bits()]

    def bits(self) -> dict[str, str]:
        found = {n: digest(v) for n, v in tensors(self.model).items()}
        return found | {f"o{i}": digest(v) for i, v in enumerate(self.model.optimizer.variables)}

    def carried_to(self, new: Run) -> Run:
        """What a checkpoint carries: variables, seeds, optimizer, and the driver's state."""
        for mine, theirs in zip(
            (*tensors(new.model).values(), *new.model.optimizer.variables),
            (*tensors(self.model).values(), *self.model.optimizer.variables),
            strict=True,
        ):
            mine.assign(array_of(theirs).copy())
        new.driver.restore(copy.deepcopy(self.driver.state()))
        return new


def check_interrupted(make: Callable[[], Run]) -> None:
    """Stop in mid-interval: between the two widened steps of intervals of 5 and of 3."""
    whole = make()
    whole.train(STEPS)
    expected, run = whole.outcome(), make()
    for stop in (4, 8):
        run.train(stop)
        run = run.carried_to(make())
    run.train(STEPS)
    assert run.outcome() == expected


@pytest.mark.parametrize("policy", [*map(each, ALL), *map(each, COMBINED)])
def test_a_policy_on_keras_interrupted_equals_uninterrupted(policy: str | Policy) -> None:
    named = policy.replace("block1.bias", "block1/bias") if isinstance(policy, str) else policy
    try:
        Run(named).driver.start()
    except (SelectorMatchedNothing, PolicyError) as error:
        pytest.skip(f"the model lacks what it selects: {error.asked}")
    check_interrupted(lambda: Run(named))


def test_the_quick_ones_are_registered() -> None:
    assert set(QUICK) <= set(ALL)
