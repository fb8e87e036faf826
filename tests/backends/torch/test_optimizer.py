"""Membership never changes, rates compose with any scheduler, state is kept or released exactly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

from backends.torch.helpers import NET_GROUPS, Net, batch, groups_of, model_bits, moved, train_step
from frostline.backends.torch.backend import TorchBackend
from frostline.backends.torch.optimizer import parameter_groups
from frostline.errors import BackendError, PlanError
from frostline.plan import FreezePlan

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.001, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "lion": lambda p: Lion(p, lr=0.001, weight_decay=0.1),
}
FREEZE_SHALLOW = FreezePlan(frozen=frozenset(NET_GROUPS[:2]))
PREFIXES = tuple(f"{name}." for name in NET_GROUPS[:2])


def built(make: Callable[[Any], Optimizer], **options: Any) -> tuple[Net, Optimizer, TorchBackend]:
    model = Net(dropout=0.0)
    groups = groups_of(model)
    optimizer = make(parameter_groups(model, groups, lr=0.01))
    return model, optimizer, TorchBackend(model, optimizer, groups=groups, **options)


# -- parameter groups ------------------------------------------------------------------------


def test_parameter_groups_hold_every_parameter_once_in_depth_order() -> None:
    model = Net()
    made = parameter_groups(model, groups_of(model), lr=0.1, weight_decay=0.01)
    ids = [id(p) for group in made for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [g["frostline_group"] for g in made] == [n for n in NET_GROUPS for _ in range(2)]


def test_norms_and_biases_do_not_decay() -> None:
    model = Net()
    made = parameter_groups(model, groups_of(model), lr=0.1, weight_decay=0.01)
    decays = {id(p): g["weight_decay"] for g in made for p in g["params"]}
    assert {n for n, p in model.named_parameters() if decays[id(p)]} == {
        "blocks.0.fc.weight", "blocks.1.fc.weight", "blocks.2.fc.weight", "head.weight"
    }  # fmt: skip


def test_what_does_not_decay_is_a_choice() -> None:
    model = Net()
    made = parameter_groups(model, groups_of(model), lr=0.1, weight_decay=0.01, no_decay=())
    assert {g["weight_decay"] for g in made} == {0.01}
    assert len(made) == len(NET_GROUPS)


def test_lasting_rates_are_baked_in() -> None:
    model = Net()
    made = parameter_groups(model, groups_of(model), lr=0.1, lr_scale={"head": 2.0})
    assert {g["frostline_group"]: g["lr"] for g in made} == {
        "blocks.0": 0.1, "blocks.1": 0.1, "blocks.2": 0.1, "head": 0.2
    }  # fmt: skip


def test_parameter_groups_of_a_compiled_model_are_those_of_the_model_inside() -> None:
    model = Net()
    made = parameter_groups(torch.compile(model), groups_of(model), lr=0.1)
    assert {id(p) for g in made for p in g["params"]} == {id(p) for p in model.parameters()}


def test_a_rate_for_an_unknown_group_is_an_error() -> None:
    model = Net()
    with pytest.raises(PlanError, match="neck"):
        parameter_groups(model, groups_of(model), lr=0.1, lr_scale={"neck": 2.0})


def test_frozen_and_integer_parameters_are_sorted_out_by_kind_not_by_flag() -> None:
    model = Net().requires_grad_(requires_grad=False)
    model.head.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    made = parameter_groups(model, groups_of(model), lr=0.1)
    ids = {id(p) for group in made for p in group["params"]}
    assert ids == {id(p) for p in model.parameters() if p.dtype.is_floating_point}


# -- membership ------------------------------------------------------------------------------


def test_an_optimizer_of_the_head_alone_is_refused_with_the_missing_names() -> None:
    model = Net()
    with pytest.raises(BackendError, match=r"12 of 14 .* never\s+train: blocks\.0\.fc\.weight"):
        TorchBackend(model, SGD(model.head.parameters(), lr=0.1), groups=groups_of(model))


def test_equal_values_are_not_the_same_parameter() -> None:
    model = Net()
    nn.init.zeros_(model.blocks[1].fc.bias)
    nn.init.zeros_(model.blocks[2].fc.bias)
    others = [p for n, p in model.named_parameters() if n != "blocks.2.fc.bias"]
    with pytest.raises(BackendError, match=r"1 of 14 .*blocks\.2\.fc\.bias"):
        TorchBackend(model, SGD(others, lr=0.1), groups=groups_of(model))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice_is_refused() -> None:
    model = Net()
    twice = [*model.parameters(), model.head.bias]
    with pytest.raises(BackendError, match=r"more than once: head\.bias"):
        TorchBackend(model, SGD(twice, lr=0.1), groups=groups_of(model))


def test_foreign_parameters_in_the_optimizer_are_nobodys_business() -> None:
    model = Net()
    centres = nn.Parameter(torch.zeros(3))
    TorchBackend(model, SGD([*model.parameters(), centres], lr=0.1), groups=groups_of(model))


def test_fixed_parameters_may_be_missing() -> None:
    model = Net()
    body = {n for n, _ in model.named_parameters() if not n.startswith("head")}
    optimizer = SGD(model.head.parameters(), lr=0.1)
    backend = TorchBackend(model, optimizer, groups=groups_of(model), fixed=body)
    backend.apply(FreezePlan())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight", "head.bias"
    }  # fmt: skip


def test_freezing_never_edits_the_optimizer_groups() -> None:
    model, optimizer, backend = built(OPTIMIZERS["adamw"], optimizer_state="release")
    before = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    for plan in (FREEZE_SHALLOW, FreezePlan(), FreezePlan(frozen=frozenset({"head"}))):
        backend.apply(plan)
        train_step(model, optimizer, 0)
        assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == before


# -- learning rates --------------------------------------------------------------------------

SCALES = {"blocks.0": 0.1, "blocks.2": 0.5}
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=8),
    "one-cycle": lambda o: OneCycleLR(
        o, max_lr=0.02, total_steps=10, cycle_momentum=not isinstance(o, Adagrad)
    ),
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
}


def scaled_by_hand(scheduler: Callable[[Optimizer], LRScheduler] | None, steps: int) -> Net:
    """The same training, with the scale multiplied into the rate around each update by hand."""
    model = Net(dropout=0.0)
    optimizer = SGD(parameter_groups(model, groups_of(model), lr=0.01), lr=0.01)
    plan = scheduler(optimizer) if scheduler else None
    for step in range(steps):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        rates = [g["lr"] for g in optimizer.param_groups]
        for g in optimizer.param_groups:
            g["lr"] = g["lr"] * SCALES.get(g["frostline_group"], 1.0)
        optimizer.step()
        for g, rate in zip(optimizer.param_groups, rates, strict=True):
            g["lr"] = rate
        optimizer.zero_grad()
        if plan:
            plan.step()
    return model


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_compose_with_schedulers(name: str) -> None:
    model, optimizer, backend = built(lambda p: SGD(p, lr=0.01))
    _, unscaled, _ = built(lambda p: SGD(p, lr=0.01))
    scheduler, expected = SCHEDULERS[name](optimizer), SCHEDULERS[name](unscaled)
    backend.apply(FreezePlan(lr_scale=SCALES))
    for step in range(6):
        train_step(model, optimizer, step)
        scheduler.step()
        unscaled.step()
        expected.step()
        assert scheduler.get_last_lr() == expected.get_last_lr()
        assert [g["lr"] for g in optimizer.param_groups] == scheduler.get_last_lr()
    assert model_bits(model) == model_bits(scaled_by_hand(SCHEDULERS[name], 6))


def test_rates_compose_with_a_scheduler_that_reads_metrics() -> None:
    model, optimizer, backend = built(lambda p: SGD(p, lr=0.01))
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    backend.apply(FreezePlan(lr_scale=SCALES))
    for step, loss in enumerate([1.0, 1.0, 1.0]):
        train_step(model, optimizer, step)
        scheduler.step(loss)
    assert scheduler.get_last_lr() == [0.0025] * 4


def test_a_tensor_rate_comes_back_as_the_very_object() -> None:
    model = Net()
    rate = torch.tensor(0.01)
    optimizer = AdamW([{"params": [p], "lr": rate} for p in model.parameters()], foreach=False)
    backend = TorchBackend(model, optimizer, groups=groups_of(model))
    backend.apply(FreezePlan(lr_scale=SCALES))
    train_step(model, optimizer, 0)
    assert all(g["lr"] is rate for g in optimizer.param_groups)
    assert rate == 0.01


class Fails(SGD):
    """Fails in the middle of an update when told to."""

    fail = False

    def step(self, closure: Any = None) -> Any:
        if self.fail:
            raise RuntimeError("half-way")
        return super().step(closure)


def failed_update() -> tuple[Net, Fails, TorchBackend]:
    model, optimizer, backend = built(lambda p: Fails(p, lr=0.01))
    backend.apply(FreezePlan(lr_scale=SCALES))
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="half-way"):
        train_step(model, optimizer, 0)
    optimizer.fail = False
    return model, optimizer, backend


def test_a_failed_update_leaves_no_scaled_rate_in_saved_state() -> None:
    _, optimizer, _ = failed_update()
    assert {g["lr"] for g in optimizer.state_dict()["param_groups"]} == {0.01}


def test_a_failed_update_leaves_no_scaled_rate_after_hold() -> None:
    _, optimizer, backend = failed_update()
    assert backend.hold() == ()
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_a_failed_update_is_not_scaled_twice() -> None:
    model, optimizer, _ = failed_update()
    seen: list[set[float]] = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append({g["lr"] for g in o.param_groups}))
    train_step(model, optimizer, 1)
    assert seen[0] == {0.001, 0.01, 0.005}
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_a_rate_set_after_a_failed_update_is_respected() -> None:
    _, optimizer, backend = failed_update()
    optimizer.param_groups[0]["lr"] = 0.3
    backend.hold()
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.01, 0.01, 0.01]


def test_one_group_for_everything_cannot_be_scaled_apart() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    backend = TorchBackend(model, optimizer, groups=groups_of(model))
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(BackendError, match="optimizer group 0 mixes") as caught:
        backend.apply(FreezePlan(frozen=frozenset({"blocks.0"}), lr_scale={"head": 0.5}))
    assert "parameter_groups" in caught.value.fix
    assert [p.requires_grad for p in model.parameters()] == before


def test_one_group_for_everything_serves_plans_that_scale_all_that_trains_alike() -> None:
    model = Net(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    backend = TorchBackend(model, optimizer, groups=groups_of(model))
    backend.apply(FreezePlan(frozen=frozenset(NET_GROUPS[:3]), lr_scale={"head": 0.0}))
    before = model_bits(model)
    train_step(model, optimizer, 0)
    assert not any(name.startswith("head") for name in moved(before, model_bits(model)))
    backend.apply(FreezePlan(lr_scale=dict.fromkeys(NET_GROUPS, 0.5)))
    train_step(model, optimizer, 0)
    assert "head.weight" in moved(before, model_bits(model))


def test_scaling_without_an_optimizer_is_refused() -> None:
    model = Net()
    backend = TorchBackend(model, groups=groups_of(model))
    with pytest.raises(BackendError, match="no optimizer"):
        backend.apply(FreezePlan(lr_scale={"head": 0.5}))


def test_a_new_backend_takes_over_the_rates_of_an_old_one() -> None:
    model, optimizer, first = built(lambda p: SGD(p, lr=0.01))
    first.apply(FreezePlan(lr_scale={"head": 0.0}))
    TorchBackend(model, optimizer, groups=groups_of(model)).apply(FreezePlan(lr_scale=SCALES))
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append([g["lr"] for g in o.param_groups]))
    train_step(model, optimizer, 0)
    assert seen == [[0.001, 0.01, 0.005, 0.01]]


# -- state -----------------------------------------------------------------------------------


def state_bytes(optimizer: Optimizer, model: nn.Module, prefixes: tuple[str, ...]) -> int:
    tensors = [
        value
        for name, p in model.named_parameters()
        if name.startswith(prefixes)
        for value in optimizer.state.get(p, {}).values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_state_is_there_and_released_state_is_gone(name: str) -> None:
    for choice, expected in (("keep", True), ("release", False)):
        model, optimizer, backend = built(OPTIMIZERS[name], optimizer_state=choice)
        backend.apply(FreezePlan())
        train_step(model, optimizer, 0)
        backend.apply(FREEZE_SHALLOW)
        assert bool(state_bytes(optimizer, model, PREFIXES)) is expected
        train_step(model, optimizer, 1)
        assert bool(state_bytes(optimizer, model, PREFIXES)) is expected
        assert state_bytes(optimizer, model, ("head.",)) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_state_is_not_touched_while_frozen(name: str) -> None:
    model, optimizer, backend = built(OPTIMIZERS[name])
    backend.apply(FreezePlan())
    train_step(model, optimizer, 0)
    backend.apply(FREEZE_SHALLOW)
    kept = copy.deepcopy(optimizer.state[model.blocks[0].fc.weight])
    for step in range(3):
        train_step(model, optimizer, step)
    now = optimizer.state[model.blocks[0].fc.weight]
    assert now.keys() == kept.keys()
    assert all(torch.equal(torch.as_tensor(now[k]), torch.as_tensor(kept[k])) for k in kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_released_state_starts_as_that_of_a_new_optimizer(name: str) -> None:
    model, optimizer, backend = built(OPTIMIZERS[name], optimizer_state="release")
    backend.apply(FreezePlan())
    for step in range(3):
        train_step(model, optimizer, step)
    backend.apply(FREEZE_SHALLOW)
    backend.apply(FreezePlan())
    weight = model.blocks[0].fc.weight
    twin = nn.Parameter(weight.detach().clone())
    fresh = OPTIMIZERS[name]([twin])
    fresh.param_groups[0].update(lr=0.01, weight_decay=0.0)
    x, y = batch(9)
    nn.functional.cross_entropy(model(x), y).backward()
    twin.grad = weight.grad.clone()
    optimizer.step()
    fresh.step()
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("choice", ["keep", "release"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact(name: str, choice: str) -> None:
    """Saved while frozen, loaded into new objects: freezing and unfreezing go on identically."""
    plans = [FreezePlan(), FREEZE_SHALLOW, FreezePlan(frozen=frozenset({"blocks.0"})), FreezePlan()]

    def run(model: Net, optimizer: Optimizer, backend: TorchBackend, steps: range) -> None:
        for step in steps:
            backend.apply(plans[step // 2])
            train_step(model, optimizer, step)

    model, optimizer, backend = built(OPTIMIZERS[name], optimizer_state=choice)
    run(model, optimizer, backend, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, backend, range(3, 8))

    resumed, again, other = built(OPTIMIZERS[name], optimizer_state=choice)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(resumed, again, other, range(3, 8))
    assert model_bits(resumed) == model_bits(model)


class Eager(SGD):
    """Makes its state when built and never again, as Adagrad did until lately."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["count"] += 1
        return super().step(closure)


def test_state_that_an_optimizer_makes_when_built_is_made_again() -> None:
    model, optimizer, backend = built(Eager, optimizer_state="release")
    for step, plan in enumerate([FreezePlan(), FREEZE_SHALLOW, FreezePlan()]):
        backend.apply(plan)
        train_step(model, optimizer, step)
    assert optimizer.state[model.blocks[0].fc.weight]["count"] == 1
    assert optimizer.state[model.head.weight]["count"] == 3


class Odd(SGD):
    """An optimizer that cannot be built from its defaults."""

    def __init__(self, params: Any, secret: str) -> None:
        super().__init__(params, lr=0.1)


def test_an_optimizer_that_cannot_be_rebuilt_is_refused_before_anything_is_lost() -> None:
    model = Net()
    optimizer = Odd(model.parameters(), "s")
    TorchBackend(model, optimizer, groups=groups_of(model))
    with pytest.raises(BackendError, match="restart the state of a Odd") as caught:
        TorchBackend(model, optimizer, groups=groups_of(model), optimizer_state="release")
    assert "keep" in caught.value.fix


# -- unfreezing ------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["keep", "release"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unfreezing_trains_within_one_step(name: str, scheduler: str, choice: str) -> None:
    model, optimizer, backend = built(OPTIMIZERS[name], optimizer_state=choice)
    schedule = SCHEDULERS[scheduler](optimizer)
    backend.apply(FREEZE_SHALLOW)
    for step in range(3):
        train_step(model, optimizer, step)
        schedule.step()
    backend.apply(FreezePlan())
    before = model_bits(model)
    train_step(model, optimizer, 3)
    changed = moved(before, model_bits(model))
    assert {n for n, _ in model.named_parameters()} <= changed


# -- the guard -------------------------------------------------------------------------------


def test_a_gradient_put_on_a_frozen_parameter_is_dropped_before_the_update() -> None:
    model, optimizer, backend = built(OPTIMIZERS["adamw"])
    backend.apply(FREEZE_SHALLOW)
    before = model_bits(model)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    model.blocks[0].fc.weight.grad = torch.zeros(8, 6)
    optimizer.step()
    assert not any(n.startswith("blocks.0") for n in moved(before, model_bits(model)))
    assert backend.hold() == ("blocks.0.fc.weight",)
    assert backend.hold() == ()


def test_a_group_that_should_train_and_gets_no_gradient_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, optimizer, backend = built(OPTIMIZERS["adamw"])
    backend.apply(FREEZE_SHALLOW)
    x, y = batch(0)
    with torch.no_grad():
        features = model.blocks[2](model.blocks[1](model.blocks[0](x)))
    nn.functional.cross_entropy(model.head(features), y).backward()
    with caplog.at_level(logging.WARNING, "frostline"):
        optimizer.step()
        optimizer.step()
    assert [r.getMessage().count("blocks.2") for r in caplog.records] == [1]


def test_a_model_is_not_kept_alive_by_its_guard() -> None:
    import gc
    import weakref

    model, optimizer, backend = built(OPTIMIZERS["adamw"])
    backend.apply(FREEZE_SHALLOW)
    train_step(model, optimizer, 0)
    seen = weakref.ref(model)
    del model, backend
    gc.collect()
    assert seen() is None
    del optimizer
