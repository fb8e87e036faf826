"""Training of a small network on any device, for tests that compare devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import contract.test_policies_on_backends as shared
from backends.torch.helpers import batch, bits, groups_of, model_bits
from frostline.backends.torch.checkpoint import load_checkpoint
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.optimizer import parameter_groups
from frostline.driver import Driver
from frostline.policy import Policy

#: A policy that freezes half of the groups throughout.
SPLIT = "first:fraction=0.5"


@dataclass(slots=True)
class DeviceRun:
    """`Blocks` in training on a device; without dropout two devices can be compared."""

    policy: Policy
    device: torch.device
    dtype: torch.dtype = torch.float32
    dropout: float = 0.2
    fused: bool = False
    model: nn.Module = field(init=False)
    optimizer: Optimizer = field(init=False)
    driver: Driver = field(init=False)

    def __post_init__(self) -> None:
        self.model = shared.Blocks()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.dropout
        self.model.to(self.device, self.dtype)
        groups = shared.costed(groups_of(self.model, shared.GROUPS))
        rates = parameter_groups(self.model, groups, lr=0.02, weight_decay=0.01)
        self.optimizer = AdamW(rates, fused=self.fused)
        self.driver = torch_driver(
            self.model,
            self.optimizer,
            self.policy,
            groups=groups,
            total_steps=shared.STEPS,
            steps_per_epoch=shared.PER_EPOCH,
        )

    def _loss(self, step: int) -> torch.Tensor:
        x, y = batch(step)
        x = x.to(self.device, self.dtype)
        return nn.functional.cross_entropy(self.model(x), y.to(self.device))

    def update(self) -> None:
        with self.driver.step():
            self.model.train()
            loss = self._loss(self.driver.progress.step)
            loss.backward()
            self.driver.sample(loss=loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def validate(self) -> float:
        self.model.eval()
        with torch.no_grad():
            return self._loss(-1).item()

    def evidence(self) -> dict[str, str]:
        state = {
            f"state:{name}:{key}": value
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        random = {"random": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["random on the device"] = torch.cuda.get_rng_state(self.device)
        return model_bits(self.model) | bits(state) | bits(random)


def load(folder: Path, run: DeviceRun, **options: Any) -> None:
    """Put the newest checkpoint of a folder into a run."""
    parts = {"model": run.model, "optimizer": run.optimizer, "driver": run.driver}
    load_checkpoint(folder, **parts, **options)
