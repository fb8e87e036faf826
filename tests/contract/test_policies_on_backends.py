"""Every registered policy drives real training, and an interrupted run equals a whole one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from backends.torch.helpers import batch, bits, groups_of, model_bits
from contract.test_policies import ALL, COMBINED
from frostline.backends.numpy import NumpyBackend
from frostline.backends.torch.checkpoint import load_checkpoint, save_checkpoint
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.optimizer import parameter_groups
from frostline.backends.torch.trees import pack, unpack
from frostline.driver import Driver
from frostline.errors import PolicyError, SelectorMatchedNothing
from frostline.groups import GroupCost, LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State
from frostline.registry import make_policy
from frostline.signals import Need
from numpy_case import NumpyCase

STEPS, PER_EPOCH = 18, 6
COST = GroupCost(0.01, 0.01, 0.01, 0.001, 1024)

POLICIES = [
    *(pytest.param(spec, id=spec.rpartition("/")[2]) for spec in ALL),
    *(pytest.param(policy, id=repr(policy)) for policy in COMBINED),
]


class Run(Protocol):
    """One training run that can be stopped and taken up again in new objects."""

    driver: Driver

    def update(self) -> None:
        """One step under the driver."""
        ...

    def validate(self) -> float:
        """A validation loss: a function of the weights alone."""
        ...

    def evidence(self) -> dict[str, str]:
        """Digests of everything that training moves."""
        ...


def train(run: Run, until: int) -> None:
    while run.driver.progress.step < until:
        run.update()
        if run.driver.progress.step % PER_EPOCH == 0:
            loss = run.validate()
            metrics = {"loss": loss, "accuracy": 1 / (1 + loss), "train_loss": loss / 2}
            metrics |= {"val_loss": loss, "val_accuracy": 1 / (1 + loss)}
            run.driver.evaluated(metrics)


def outcome(run: Run) -> list[Any]:
    """What must be the same: the proof, every decision, all bits."""
    proof = run.driver.finish().to_json()
    return [proof, [d.to_json() for d in run.driver.decisions], run.evidence()]


def check_interrupted(make: Callable[[], Run], resume: Callable[[Any], Run]) -> None:
    """Stop in mid-interval: between the two widened steps of intervals of 5 and of 3."""
    whole = make()
    train(whole, STEPS)
    expected, run = outcome(whole), make()
    for stop in (4, 8):
        train(run, stop)
        run = resume(run)
    train(run, STEPS)
    assert outcome(run) == expected


# -- PyTorch ---------------------------------------------------------------------------------


class Block(nn.Linear):
    """Linear, batch norm, dropout."""

    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__(wide_in, wide_out)
        self.norm = nn.BatchNorm1d(wide_out)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(nn.functional.gelu(self.norm(super().forward(x))))


class Blocks(nn.Module):
    """Four blocks and a head, named like the groups of `example_groups`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.block0, self.block1 = Block(6, 8), Block(8, 8)
            self.block2, self.block3 = Block(8, 8), Block(8, 8)
            self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block0, self.block1, self.block2, self.block3):
            x = block(x)
        return self.head(x)


GROUPS = ("block0", "block1", "block2", "block3", "head")


def costed(groups: LayerGroups) -> LayerGroups:
    """Costs as if measured: two runs must read the same."""
    return groups.with_costs(dict.fromkeys(groups.names, COST))


@dataclass(slots=True)
class TorchRun:
    """`Blocks` under AdamW, or another optimizer."""

    policy: Policy
    kind: Callable[..., Optimizer] = AdamW
    model: Blocks = field(init=False)
    optimizer: Optimizer = field(init=False)
    driver: Driver = field(init=False)

    def __post_init__(self) -> None:
        self.model = Blocks()
        groups = costed(groups_of(self.model, GROUPS))
        rates = parameter_groups(self.model, groups, lr=0.02, weight_decay=0.01)
        self.optimizer = self.kind(rates)
        self.driver = torch_driver(
            self.model,
            self.optimizer,
            self.policy,
            groups=groups,
            total_steps=STEPS,
            steps_per_epoch=PER_EPOCH,
        )

    def update(self) -> None:
        x, y = batch(self.driver.progress.step)
        with self.driver.step():
            self.model.train()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.driver.sample(loss=loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def validate(self) -> float:
        x, y = batch(-1)
        self.model.eval()
        with torch.no_grad():
            return nn.functional.cross_entropy(self.model(x), y).item()

    def evidence(self) -> dict[str, str]:
        state = {
            f"state:{name}:{key}": value
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        return model_bits(self.model) | bits(state) | bits({"random": torch.get_rng_state()})


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_on_torch_interrupted_equals_uninterrupted(
    policy: str | Policy, tmp_path: Path
) -> None:
    def make() -> TorchRun:
        torch.manual_seed(1)
        return TorchRun(make_policy(policy))

    def resume(old: TorchRun) -> TorchRun:
        save_checkpoint(tmp_path, model=old.model, optimizer=old.optimizer, driver=old.driver)
        new = make()
        load_checkpoint(tmp_path, model=new.model, optimizer=new.optimizer, driver=new.driver)
        return new

    check_interrupted(make, resume)


@dataclass(frozen=True)
class Recorded(Policy):
    """Notes every plan of a policy."""

    policy: Policy
    plans: list[FreezePlan] = field(default_factory=list)

    def needs(self) -> tuple[Need, ...]:
        return self.policy.needs()

    def init(self, groups: LayerGroups) -> State:
        return self.policy.init(groups)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        plan, state = self.policy.decide(groups, state, event)
        self.plans.append(plan)
        return plan, state


@dataclass(frozen=True)
class Replayed(Policy):
    """Answers with these plans in turn, and reads nothing."""

    plans: Sequence[FreezePlan]

    def init(self, groups: LayerGroups) -> State:
        return {"next": 0}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return self.plans[state["next"]], {"next": state["next"] + 1}


READING = [p for p in POLICIES if make_policy(p.values[0]).needs()]


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    "kind", [AdamW, partial(SGD, momentum=0.9, nesterov=True)], ids=["adamw", "sgd"]
)
@pytest.mark.parametrize("policy", READING)
def test_a_policy_that_reads_trains_like_its_plans_alone(
    policy: str | Policy, kind: Callable[..., Optimizer]
) -> None:
    """Signals change nothing: weights, statistics, optimizer and random streams are the same."""
    torch.manual_seed(1)
    reading = Recorded(make_policy(policy))
    run = TorchRun(reading, kind)
    train(run, STEPS)
    torch.manual_seed(1)
    blind = TorchRun(Replayed(reading.plans), kind)
    train(blind, STEPS)
    assert run.evidence() == blind.evidence()
    assert run.driver.finish().to_json() == blind.driver.finish().to_json()


# -- NumPy -----------------------------------------------------------------------------------


class CostedBackend(NumpyBackend):
    """The reference backend with costs as if measured, all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.groups = costed(self.groups)


class NumpyRun:
    """The reference network."""

    def __init__(self, policy: Policy) -> None:
        self.case = NumpyCase(CostedBackend)
        self.driver = Driver(
            policy, self.case.backend, total_steps=STEPS, steps_per_epoch=PER_EPOCH
        )

    def update(self) -> None:
        with self.driver.step():
            self.case.backward()
            self.driver.sample(loss=1 / (1 + self.driver.progress.step))
            self.case.update()

    def validate(self) -> float:
        return sum(float(abs(a).sum()) for a in self.case.net.parameters.values())

    def evidence(self) -> dict[str, str]:
        return dict(self.case.evidence())


def carried(old: NumpyRun, new: NumpyRun) -> NumpyRun:
    """What a checkpoint carries; the driver's state passes through its form on disk."""
    for mine, theirs in (
        (new.case.net.parameters, old.case.net.parameters),
        (new.case.net.buffers, old.case.net.buffers),
    ):
        for name, array in theirs.items():
            mine[name][...] = array
    new.case.optimizer.velocity = {n: v.copy() for n, v in old.case.optimizer.velocity.items()}
    new.case.net.random.bit_generator.state = old.case.net.random.bit_generator.state
    new.case.step = old.case.step
    tensors: dict[str, Tensor] = {}
    tree = pack(old.driver.state(), "driver", tensors)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    new.driver.restore(unpack(json.loads(json.dumps(tree)), copies))
    return new


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_on_numpy_interrupted_equals_uninterrupted(policy: str | Policy) -> None:
    # Layers are named after what the network calls them; weights of norms it has none.
    named = policy.replace("block", "layer") if isinstance(policy, str) else policy

    def make() -> NumpyRun:
        return NumpyRun(make_policy(named))

    try:
        make().driver.start()
    except (SelectorMatchedNothing, PolicyError) as error:
        pytest.skip(f"the network lacks what it selects: {error.asked}")
    check_interrupted(make, lambda old: carried(old, make()))
