"""How freezing fails elsewhere, each as a case that must hold here; named for where it was met."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from backends.torch.helpers import NET_GROUPS, Net, batch, groups_of, model_bits, moved, train_step
from frostline.backends.torch.backend import TorchBackend
from frostline.backends.torch.example import Example
from frostline.backends.torch.freeze import freeze, torch_driver, unfreeze
from frostline.backends.torch.optimizer import parameter_groups
from frostline.errors import BackendError
from frostline.plan import FreezePlan

BODY = FreezePlan(frozen=frozenset(NET_GROUPS[:3]))
SHALLOW = FreezePlan(frozen=frozenset(NET_GROUPS[:2]))


def driven(policy: str, **options: Any) -> tuple[Net, AdamW, Any]:
    model = Net(dropout=0.0)
    groups = groups_of(model)
    optimizer = AdamW(parameter_groups(model, groups, lr=0.01), weight_decay=0.1)
    return model, optimizer, torch_driver(model, optimizer, policy, groups=groups, **options)


def frozen_part(digests: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if not name.startswith("head")}


# -- frozen weights that are not frozen ------------------------------------------------------


def test_pytorch_86590_batch_norm_statistics_do_not_drift() -> None:
    model, optimizer, driver = driven("linear-probe", total_steps=5)
    before = model_bits(model)
    for step in range(5):
        model.train()  # as every trainer does
        with driver.step():
            train_step(model, optimizer, step)
    driver.finish()
    assert frozen_part(model_bits(model)) == frozen_part(before)


def test_finetuning_scheduler_13_track_running_stats_is_left_alone() -> None:
    model = Net()
    freeze(model, "backbone", groups=groups_of(model))
    assert all(block.norm.track_running_stats for block in model.blocks)
    unfreeze(model)
    assert all(block.norm.track_running_stats for block in model.blocks)


def test_sparseml_965_gradients_from_before_the_freeze_move_nothing() -> None:
    model, optimizer, driver = driven("full", total_steps=5)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    driver.backend.apply(BODY)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("head"))
    before = model_bits(model)
    optimizer.step()
    assert moved(before, model_bits(model)) == {"head.weight", "head.bias"}


def test_moco_14_zeroed_gradients_leave_momentum_and_decay_nothing_to_do() -> None:
    model = Net(dropout=0.0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        train_step(model, optimizer, step)  # momentum exists now
    backend = TorchBackend(model, optimizer, groups=groups_of(model))
    optimizer.zero_grad(set_to_none=False)
    backend.apply(BODY)
    before = model_bits(model)
    for step in range(3):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert moved(before, model_bits(model)) == {"head.weight", "head.bias"}


def test_yolov5_1213_a_later_line_that_makes_everything_trainable_is_undone() -> None:
    model, optimizer, driver = driven("linear-probe", total_steps=5)
    driver.start()
    for _, p in model.named_parameters():
        p.requires_grad = True
    before = model_bits(model)
    with driver.step():
        train_step(model, optimizer, 0)
    assert frozen_part(model_bits(model)) == frozen_part(before)
    driver.finish()


def test_weight_averaging_keeps_frozen_bits_in_the_average_and_in_the_model() -> None:
    model, optimizer, driver = driven("linear-probe", total_steps=5)
    driver.start()
    before = model_bits(model)
    average = AveragedModel(model, use_buffers=True)
    for step in range(5):
        with driver.step():
            train_step(model, optimizer, step)
            average.update_parameters(model)
    average.train()
    averaged = model_bits(average.module)
    assert frozen_part(averaged) == frozen_part(before) == frozen_part(model_bits(model))
    driver.finish()


def test_dropout_of_the_frozen_part_does_not_run() -> None:
    model = Net(dropout=0.5)
    freeze(model, "backbone", groups=groups_of(model))
    model.train()
    x, _ = batch(0)
    assert torch.equal(model(x), model(x))
    freeze(unfrozen := Net(dropout=0.5), "blocks.0", groups=groups_of(unfrozen))
    assert not torch.equal(unfrozen(x), unfrozen(x))


# -- layers that were unfrozen and never train -----------------------------------------------


def test_lmflow_726_an_optimizer_of_the_head_alone_is_refused() -> None:
    model = Net()
    freeze(model, "backbone", groups=groups_of(model))
    optimizer = AdamW(filter(lambda p: p.requires_grad, model.parameters()))
    with pytest.raises(BackendError, match="12 of 14 parameters are not in it"):
        torch_driver(model, optimizer, "gradual:every=1st")


def test_lightning_21901_resume_does_not_refreeze_what_was_unfrozen() -> None:
    def steps(model: Net, optimizer: AdamW, driver: Any, span: range) -> None:
        for step in span:
            with driver.step():
                train_step(model, optimizer, step)

    policy = {"policy": "gradual:every=2st", "total_steps": 10}
    model, optimizer, driver = driven(**policy)
    steps(model, optimizer, driver, range(5))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), driver.state()))
    steps(model, optimizer, driver, range(5, 10))

    resumed, again, other = driven(**policy)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    other.restore(saved[2])
    assert other.plan.frozen == {"blocks.0"}
    before = model_bits(resumed)
    steps(resumed, again, other, range(5, 6))
    trained = {n for n, _ in resumed.named_parameters() if not n.startswith("blocks.0")}
    assert trained <= moved(before, model_bits(resumed))
    steps(resumed, again, other, range(6, 10))
    assert model_bits(resumed) == model_bits(model)
    assert other.finish().to_json() == driver.finish().to_json()


def test_lightning_6891_groups_of_the_optimizer_are_the_same_at_every_moment() -> None:
    model, optimizer, driver = driven("gradual:every=1st", total_steps=4)
    sizes = []
    for step in range(4):
        with driver.step():
            train_step(model, optimizer, step)
        sizes.append([len(g["params"]) for g in optimizer.param_groups])
    assert len({tuple(s) for s in sizes}) == 1
    fresh = AdamW(parameter_groups(Net(), groups_of(Net()), lr=0.01))
    fresh.load_state_dict(optimizer.state_dict())


def test_opacus_489_parameters_of_equal_value_are_two_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[1].bias)
    optimizer = SGD(model.parameters(), lr=0.1)
    backend = TorchBackend(model, optimizer, groups=groups_of(model, ("0", "1")))
    backend.apply(FreezePlan(frozen=frozenset({"0"})))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].bias, torch.zeros(2))
    assert not torch.equal(model[1].bias, torch.zeros(2))


class Tied(nn.Module):
    """Embedding whose weight is the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.body(self.embed(ids))))


def test_llama_factory_3694_a_tied_head_is_found_under_its_own_name() -> None:
    model = Tied()
    plan = freeze(model, "lm_head.weight", groups=groups_of(model, ("embed", "body")))
    assert plan.frozen == {"embed"}
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    before = model_bits(model)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert moved(before, model_bits(model)) == {"body.weight", "body.bias"}


def test_autofreeze_unfreezing_keeps_momentum_and_the_rate_on_schedule() -> None:
    model = Net(dropout=0.0)
    groups = groups_of(model)
    optimizer = SGD(parameter_groups(model, groups, lr=0.1), momentum=0.9)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    backend = TorchBackend(model, optimizer, groups=groups)
    train_step(model, optimizer, 0)
    momentum = optimizer.state[model.blocks[0].fc.weight]["momentum_buffer"].clone()
    backend.apply(SHALLOW)
    for step in range(1, 4):
        schedule.step()
        train_step(model, optimizer, step)
    backend.apply(FreezePlan())
    assert torch.equal(optimizer.state[model.blocks[0].fc.weight]["momentum_buffer"], momentum)
    assert {g["lr"] for g in optimizer.param_groups} == {0.025}


# -- freezing that saves nothing -------------------------------------------------------------


def test_composer_lisa_released_state_gives_its_memory_back() -> None:
    model = Net()
    groups = groups_of(model)
    optimizer = AdamW(parameter_groups(model, groups, lr=0.01))
    backend = TorchBackend(model, optimizer, groups=groups, optimizer_state="release")
    backend.apply(FreezePlan())
    train_step(model, optimizer, 0)
    backend.apply(BODY)
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.head.parameters()}


# -- gradient checkpointing over a frozen part -----------------------------------------------


class Checkpointed(Net):
    """`Net` whose blocks are recomputed in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), batch(0)[1]).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_transformers_16276_checkpointing_behind_a_frozen_part_gives_all_gradients(
    depth: int,
) -> None:
    plan = FreezePlan(frozen=frozenset(NET_GROUPS[:depth]))
    found = []
    for model in (Checkpointed(dropout=0.0), Net(dropout=0.0)):
        TorchBackend(model, groups=groups_of(model)).apply(plan)
        found.append(gradients(model, batch(0)[0]))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def reentrant() -> tuple[Net, AdamW, TorchBackend]:
    model = Checkpointed(dropout=0.0)
    model.reentrant = True
    optimizer = AdamW(model.parameters())
    backend = TorchBackend(model, optimizer, groups=groups_of(model))
    backend.apply(FreezePlan(frozen=frozenset({"blocks.0"})))
    return model, optimizer, backend


def test_transformers_16276_lost_gradients_of_the_reentrant_kind_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, optimizer, _ = reentrant()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        assert gradients(model, batch(0)[0]).keys() == {"head.weight", "head.bias"}
    with caplog.at_level(logging.WARNING, "frostline"):
        optimizer.step()
    assert "got no gradient" in caplog.text
    assert "blocks.1, blocks.2" in caplog.text
    assert "use_reentrant=False" in caplog.text


def test_transformers_16276_inputs_made_to_require_grad_help_at_a_price_that_is_said() -> None:
    model, _, backend = reentrant()
    x = batch(0)[0].requires_grad_()
    found = gradients(model, x)
    assert {n for n, _ in model.named_parameters() if not n.startswith("blocks.0")} == found.keys()
    plan = FreezePlan(frozen=frozenset({"blocks.0"}))
    text = backend.explain(plan, Example((batch(0)[0].requires_grad_(),)))
    assert "1 of the frozen groups, from blocks.0 on, record a graph" in text
