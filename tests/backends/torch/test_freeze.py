"""The one-line forms: freeze, unfreeze, the context manager that restores exactly, the driver."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from backends.torch.helpers import NET_GROUPS, Net, batch, groups_of, model_bits, moved, train_step
from frostline.backends.torch import freeze as freezing
from frostline.backends.torch.backend import applied_plan
from frostline.backends.torch.freeze import freeze, frozen, torch_driver, unfreeze
from frostline.backends.torch.optimizer import parameter_groups
from frostline.errors import (
    BackendError,
    ConfigError,
    FrozenTensorChanged,
    PlanError,
    PolicyError,
    SelectorError,
    SelectorMatchedNothing,
)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def inside(model: nn.Module, *prefixes: str) -> set[str]:
    return {
        n for n, _ in model.named_parameters() if n.startswith(tuple(f"{p}." for p in prefixes))
    }


def test_freeze_then_more_then_back() -> None:
    model = Net()
    groups = groups_of(model)
    freeze(model, "blocks.0", groups=groups)
    plan = freeze(model, "blocks.1")
    assert plan.frozen == {"blocks.0", "blocks.1"}
    assert trainable(model) == inside(model, "blocks.2", "head")
    assert unfreeze(model, "blocks.0").frozen == {"blocks.1"}
    assert trainable(model) == inside(model, "blocks.0", "blocks.2", "head")
    unfreeze(model)
    assert trainable(model) == inside(model, *NET_GROUPS)


def test_parts_of_groups_freeze_and_unfreeze() -> None:
    model = Net()
    freeze(model, "backbone & !kind:bias", groups=groups_of(model))
    biases = {f"blocks.{i}.fc.bias" for i in range(3)}
    assert trainable(model) == biases | inside(model, "head")
    freeze(model, "kind:bias & depth==0")
    assert trainable(model) == biases - {"blocks.0.fc.bias"} | inside(model, "head")
    unfreeze(model, "kind:norm")
    norms = {n for n, _ in model.named_parameters() if ".norm." in n}
    assert trainable(model) == biases - {"blocks.0.fc.bias"} | norms | inside(model, "head")


def test_what_the_owner_froze_by_hand_stays_frozen_until_unfrozen() -> None:
    model = Net()
    model.head.bias.requires_grad = False
    freeze(model, "blocks.0", groups=groups_of(model))
    freeze(model, "blocks.1")
    unfreeze(model, "blocks.1")
    assert trainable(model) == inside(model, *NET_GROUPS[1:]) - {"head.bias"}
    assert model.blocks[1].training
    unfreeze(model, "head")
    assert trainable(model) == inside(model, *NET_GROUPS[1:])


def test_frozen_bits_stay_through_training() -> None:
    model = Net()
    freeze(model, "backbone", groups=groups_of(model))
    before = model_bits(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        model.train()
        train_step(model, optimizer, step)
    assert moved(before, model_bits(model)) == {"head.weight", "head.bias"}


def test_switches_are_passed_on_and_kept_by_unfreeze() -> None:
    model = Net()
    freeze(model, "backbone", groups=groups_of(model), live_norm=True, live_dropout=True)
    assert unfreeze(model, "blocks.2").live_norm == {"blocks.0", "blocks.1"}
    assert all(m.training for m in model.modules())


def test_other_groups_keep_what_is_frozen() -> None:
    model = Net()
    freeze(model, "blocks.0 & !kind:norm", groups=groups_of(model))
    coarse = groups_of(model, ("blocks", "head"))
    plan = freeze(model, "blocks.1.*", groups=coarse)
    assert plan.frozen == {"blocks"}
    assert trainable(model) == inside(model, "blocks.0.norm", "blocks.2", "head")


def test_groups_of_a_model_that_was_changed_since_are_not_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Net()
    freeze(model, "blocks.0", groups=groups_of(model))
    model.head = nn.Linear(8, 7)
    monkeypatch.setattr(freezing, "layer_groups", lambda root, example=None: groups_of(root))
    assert freeze(model, "blocks.1").frozen == {"blocks.0", "blocks.1"}
    applied = applied_plan(model)
    assert applied is not None
    assert applied[0] == groups_of(model)


@pytest.mark.parametrize(
    ("selector", "error"),
    [
        ("layer9", SelectorMatchedNothing),
        ("10", SelectorError),
        ("all", PlanError),
    ],
)
def test_what_cannot_be_frozen_changes_nothing(selector: str, error: type[Exception]) -> None:
    model = Net()
    with pytest.raises(error):
        freeze(model, selector, groups=groups_of(model))
    assert trainable(model) == inside(model, *NET_GROUPS)
    assert applied_plan(model) is None


def test_models_are_not_kept_alive() -> None:
    model = Net()
    freeze(model, "backbone", groups=groups_of(model))
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_a_compiled_model_freezes_as_the_one_inside() -> None:
    model = Net()
    freeze(torch.compile(model, backend="eager"), "blocks.0", groups=groups_of(model))
    assert trainable(model) == inside(model, "blocks.1", "blocks.2", "head")


# -- the context manager ---------------------------------------------------------------------


def everything(model: nn.Module) -> list[Any]:
    """All that freezing touches: flags, gradients by identity, modes, instance attributes."""
    parameters = [(n, p.requires_grad, id(p.grad)) for n, p in model.named_parameters()]
    modules = [
        (n, m.training, sorted(vars(m)), getattr(vars(m).get("train"), "__func__", None))
        for n, m in model.named_modules()
    ]
    return [parameters, modules, applied_plan(model)]


def used_net() -> Net:
    """A model with gradients, a flag off and modes set by its owner."""
    model = Net()
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    model.blocks[1].norm.weight.requires_grad = False
    model.blocks[1].eval()
    return model


def test_the_block_freezes_and_puts_everything_back() -> None:
    model = used_net()
    before = everything(model)
    with frozen(model, "blocks.0 | blocks.1", groups=groups_of(model)) as plan:
        assert plan.frozen == {"blocks.0", "blocks.1"}
        assert trainable(model) == inside(model, "blocks.2", "head")
        assert model.blocks[0].fc.weight.grad is None
        model.train()
        assert not model.blocks[0].norm.training
    assert everything(model) == before


def test_an_exception_inside_puts_everything_back() -> None:
    model = used_net()
    before = everything(model)

    def fail() -> None:
        with frozen(model, "blocks.0", groups=groups_of(model)):
            model.eval()
            unfreeze(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert everything(model) == before


def test_a_refused_selector_puts_everything_back() -> None:
    model = used_net()
    before = everything(model)
    with pytest.raises(PlanError), frozen(model, "all", groups=groups_of(model)):
        pass
    assert everything(model) == before


def test_blocks_nest() -> None:
    model = used_net()
    before = everything(model)
    with frozen(model, "blocks.0", groups=groups_of(model)):
        outer = everything(model)
        with frozen(model, "blocks.2"):
            assert trainable(model) == inside(model, "blocks.1", "head") - {"blocks.1.norm.weight"}
        assert everything(model) == outer
    assert everything(model) == before


def test_a_block_within_freeze_returns_to_it() -> None:
    model = Net()
    plan = freeze(model, "blocks.0", groups=groups_of(model))
    with frozen(model, "blocks.1"):
        pass
    assert applied_plan(model) == (groups_of(model), plan)
    model.train()
    assert not model.blocks[0].training
    assert model.blocks[1].training


def test_gradients_of_what_trains_inside_stay() -> None:
    model = Net()
    with frozen(model, "backbone", groups=groups_of(model)):
        x, y = batch(0)
        nn.functional.cross_entropy(model(x), y).backward()
    assert model.head.weight.grad is not None
    assert model.blocks[0].fc.weight.grad is None


# -- the driver ------------------------------------------------------------------------------


def driven(policy: str, **options: Any) -> tuple[Net, AdamW, Any]:
    model = Net()
    groups = groups_of(model)
    optimizer = AdamW(parameter_groups(model, groups, lr=0.01))
    return model, optimizer, torch_driver(model, optimizer, policy, groups=groups, **options)


def test_a_policy_string_drives_a_loop_of_ones_own() -> None:
    model, optimizer, driver = driven("gradual:every=1ep", total_epochs=4, steps_per_epoch=2)
    counts = []
    for step in range(8):
        with driver.step():
            train_step(model, optimizer, step)
        counts.append(len(driver.plan.frozen))
    certificate = driver.finish()
    assert counts == [3, 3, 2, 2, 1, 1, 0, 0]
    assert driver.progress.total_steps == 8
    assert {h.tensor for h in certificate.holds} >= inside(model, "blocks.0")
    assert {h.to_step for h in certificate.holds if h.tensor.startswith("blocks.2")} == {2}


def test_linear_probing_keeps_the_backbone_and_proves_it() -> None:
    model, optimizer, driver = driven("linear-probe", total_steps=4)
    before = model_bits(model)
    for step in range(4):
        with driver.step():
            model.train()
            train_step(model, optimizer, step)
    holds = driver.finish().holds
    after = model_bits(model)
    assert moved(before, after) == {"head.weight", "head.bias"}
    assert {h.tensor: h.sha256 for h in holds} == {
        name: digest for name, digest in after.items() if not name.startswith("head")
    }


def test_the_driver_fails_the_run_when_a_frozen_weight_moves() -> None:
    model, optimizer, driver = driven("linear-probe", total_steps=4)
    with driver.step():
        train_step(model, optimizer, 0)
    model.blocks[0].fc.weight.data.add_(1)
    with pytest.raises(FrozenTensorChanged, match=r"blocks\.0\.fc\.weight"):
        driver.finish()


@pytest.mark.parametrize(
    "totals",
    [
        {"total_epochs": 3},
        {"total_epochs": 3, "steps_per_epoch": 10, "total_steps": 31},
    ],
)
def test_totals_that_do_not_fit_are_refused(totals: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="3 epochs"):
        driven("full", **totals)


def test_agreeing_totals_are_fine() -> None:
    driven("full", total_epochs=3, steps_per_epoch=10, total_steps=30)


def test_fixed_parameters_stay_out_of_every_plan() -> None:
    model, optimizer, driver = driven("full", fixed=["blocks.0.fc.bias"])
    before = model_bits(model)
    with driver.step():
        train_step(model, optimizer, 0)
    parameters = {n for n, _ in model.named_parameters()}
    assert parameters - moved(before, model_bits(model)) == {"blocks.0.fc.bias"}


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(PolicyError, match="gradul"):
        driven("gradul")


def test_an_optimizer_built_after_freezing_is_refused() -> None:
    model = Net()
    groups = groups_of(model)
    freeze(model, "backbone", groups=groups)
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(BackendError, match="would never train"):
        torch_driver(model, optimizer, "gradual:every=1ep", groups=groups)
