"""Frozen bits stay the same on the device, under each optimizer and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

from backends.torch.helpers import groups_of, model_bits, moved
from frostline.backends.torch.backend import TorchBackend
from frostline.backends.torch.optimizer import parameter_groups
from frostline.driver import Driver
from frostline.errors import FrozenTensorChanged
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw-foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-capturable": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, capturable=True),
    "adagrad": lambda p: Adagrad(p, lr=0.05, weight_decay=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.001, momentum=0.9, weight_decay=0.01),
}
CONV, TEXT = ("0", "1", "2"), ("embed", "first", "second", "head")


def conv_net() -> nn.Module:
    """Two blocks with batch norm and a head with dropout: (N, 3, 8, 8) -> (N, 3)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 3)),
    )


class Transformer(nn.Module):
    """Two encoder layers: (N, 6) of tokens -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.first = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.second = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(x))).mean(1))


class Halfway(Policy):
    """Freezes all but the last two groups in updates 4 to 11."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        held = frozenset(groups.names[:-2]) if 4 <= event.progress.step < 12 else frozenset()
        return FreezePlan(frozen=held), state


class Trainer:
    """A training loop on the device."""

    def __init__(
        self, kind: str, make: Callable[[Any], Optimizer], precision: str, device: torch.device
    ) -> None:
        self.kind, self.device, self.precision = kind, device, precision
        self.model = (conv_net() if kind == "conv" else Transformer()).to(device)
        groups = groups_of(self.model, CONV if kind == "conv" else TEXT)
        self.optimizer = make(parameter_groups(self.model, groups, lr=0.01, weight_decay=0.01))
        backend = TorchBackend(self.model, self.optimizer, groups=groups)
        self.driver = Driver(Halfway(), backend, total_steps=16)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=precision == "fp16", init_scale=256.0
        )
        self.first = groups.names[0]

    def updates(self, count: int) -> None:
        for _ in range(count):
            source = torch.Generator().manual_seed(self.driver.progress.step)
            x = torch.randn(16, 3, 8, 8, generator=source)
            if self.kind == "text":
                x = torch.randint(11, (16, 6), generator=source)
            y = torch.randint(3, (16,), generator=source).to(self.device)
            with self.driver.step():
                self.model.train()
                kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
                with torch.autocast(self.device.type, kind, enabled=kind is not None):
                    loss = nn.functional.cross_entropy(self.model(x.to(self.device)), y)
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()

    def bits(self) -> dict[str, str]:
        return model_bits(self.model)

    def shallow(self) -> dict[str, str]:
        return {n: d for n, d in self.bits().items() if n.startswith(f"{self.first}.")}


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["conv", "text"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_bits_are_identical(
    name: str, kind: str, precision: str, gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    if name == "adamw-capturable":
        request.getfixturevalue("cuda")
    torch.manual_seed(0)
    trainer = Trainer(kind, OPTIMIZERS[name], precision, gpu)
    trainer.updates(4)
    before, all_before = trainer.shallow(), trainer.bits()
    trainer.updates(8)
    assert trainer.shallow() == before
    deep = {n for n, _ in trainer.model.named_parameters() if n not in before}
    head = {n for n in deep if n.startswith(("2.", "head."))}
    assert head <= moved(all_before, trainer.bits())
    trainer.updates(4)
    shallow = {n for n, _ in trainer.model.named_parameters() if n in before}
    # What batch norm subtracts again has no gradient but rounding, which may be nothing at all.
    assert shallow - {"0.0.bias"} <= moved(before, trainer.shallow())
    holds = trainer.driver.finish().holds
    assert (
        before.items()
        <= {h.tensor: h.sha256 for h in holds if (h.from_step, h.to_step) == (4, 12)}.items()
    )
    assert all(p.device.type == gpu.type for p in trainer.model.parameters())


@pytest.mark.parametrize("counted", [True, False])
def test_a_write_to_a_frozen_tensor_is_caught(counted: bool, gpu: torch.device) -> None:
    trainer = Trainer("conv", OPTIMIZERS["sgd"], "fp32", gpu)
    trainer.updates(6)
    weight = trainer.model.get_parameter("0.0.weight")
    with torch.no_grad():
        (weight if counted else weight.data).add_(1)
    with pytest.raises(FrozenTensorChanged, match=r"0\.0\.weight"):
        trainer.updates(10)
