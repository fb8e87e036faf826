"""The torch side of the parity tests: a program that writes what every run did.

Run in a process without Keras::

    python parity_torch.py OUT.json POLICY/OPTIMIZER ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parity_setting import (
    BATCH,
    BLOCKS,
    CLASSES,
    EPOCHS,
    EPSILON,
    GROUPS,
    MOMENTUM,
    PER_EPOCH,
    RATES,
    SIZES,
    STEPS,
    TRAIN,
    VAL,
    groups,
    tensors,
    weights,
)
from torch import Tensor, nn

from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.optimizer import parameter_groups


class KerasNorm(nn.BatchNorm1d):
    """Batch norm with Keras's arithmetic: the running variance is not corrected for the mean."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name in torch
        if not self.training:
            return super().forward(input)
        mean, variance = input.mean(0), input.var(0, unbiased=False)
        with torch.no_grad():
            self.running_mean.mul_(MOMENTUM).add_(mean, alpha=1 - MOMENTUM)
            self.running_var.mul_(MOMENTUM).add_(variance, alpha=1 - MOMENTUM)
        scaled = (input - mean) * torch.rsqrt(variance + self.eps)
        return scaled * self.weight + self.bias


class KerasAdam(torch.optim.Optimizer):
    """Adam with Keras's arithmetic: one step count for all, epsilon after the correction."""

    def __init__(self, params: Any, lr: float, eps: float = 1e-7) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": 0.0})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        del closure
        self.count += 1
        for group in self.param_groups:
            correction = (1 - 0.999**self.count) ** 0.5 / (1 - 0.9**self.count)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                state["m"].add_((p.grad - state["m"]) * 0.1)
                state["v"].add_((p.grad.square() - state["v"]) * (1 - 0.999))
                p.sub_(
                    state["m"] * (group["lr"] * correction) / (state["v"].sqrt() + group["eps"])
                )


class Block(nn.Module):
    """Norm, dense, tanh, dropout.

    A bias before a batch norm would have no gradient but rounding, which Adam makes large.
    """

    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(wide_in, wide_out)
        self.norm = KerasNorm(wide_in, eps=EPSILON)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.dense(self.norm(x))))


class Net(nn.Module):
    """Three blocks and a head, with the initial weights of both sides."""

    def __init__(self) -> None:
        super().__init__()
        for name, pair in zip(BLOCKS, zip(SIZES, SIZES[1:], strict=False), strict=True):
            self.add_module(name, Block(*pair))
        self.head = nn.Linear(SIZES[-1], CLASSES)
        state = self.state_dict()
        values = weights()
        with torch.no_grad():
            for each in (t for found in tensors().values() for t in found):
                value = torch.from_numpy(values[each.keras])
                state[each.torch].copy_(value.T if each.turned else value)

    def forward(self, x: Tensor) -> Tensor:
        for name in GROUPS:
            x = self.get_submodule(name)(x)
        return x


def optimizer_of(name: str, model: Net) -> torch.optim.Optimizer:
    """Over all parameters, in one group per layer group."""
    rate = RATES[name]
    given = parameter_groups(model, groups("torch"), lr=rate)
    if name == "adam":
        return KerasAdam(given, lr=rate)
    return torch.optim.SGD(given, lr=rate, momentum=0.9 if name == "momentum" else 0.0)


def run(spec: str, optimizer_name: str) -> dict[str, Any]:
    """One run: decisions, proof, losses and final weights, under Keras's names."""
    model = Net()
    optimizer = optimizer_of(optimizer_name, model)
    driver = torch_driver(
        model,
        optimizer,
        spec,
        groups=groups("torch"),
        total_steps=STEPS,
        steps_per_epoch=PER_EPOCH,
    )
    x, y = (torch.from_numpy(a) for a in TRAIN)
    losses = []
    for _ in range(EPOCHS):
        model.train()
        for i in range(PER_EPOCH):
            part = slice(i * BATCH, (i + 1) * BATCH)
            with driver.step():
                loss = nn.functional.cross_entropy(model(x[part]), y[part])
                loss.backward()
                driver.sample(loss=loss.item())
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses[-PER_EPOCH:]) / PER_EPOCH
        if driver.evaluated({"loss": mean, "train_loss": mean} | validate(model)).done:
            break
    proof = driver.finish().to_json()
    keras_name = {t.torch: t for found in tensors().values() for t in found}
    state = model.state_dict()
    final = {
        t.keras: (state[n].T if t.turned else state[n]).tolist() for n, t in keras_name.items()
    }
    return {
        "decisions": [decided(d.to_json(), {n: t.keras for n, t in keras_name.items()})
                      for d in driver.decisions],
        "held": sorted([keras_name[h["tensor"]].keras, h["from_step"], h["to_step"]]
                       for h in proof),
        "losses": losses,
        "weights": final,
    }  # fmt: skip


def validate(model: Net) -> dict[str, float]:
    """Loss and accuracy on the validation data, as Keras names them."""
    x, y = (torch.from_numpy(a) for a in VAL)
    model.eval()
    with torch.no_grad():
        logits = model(x)
    model.train()
    accuracy = (logits.argmax(1) == y).double().mean().item()
    return {
        "val_loss": nn.functional.cross_entropy(logits, y).item(),
        "val_accuracy": accuracy,
    }


def decided(decision: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The step and the plan of a decision, with Keras's names of parameters."""
    plan = decision["plan"]
    exempt = {g: sorted(names.get(n, n) for n in kept) for g, kept in plan.get("exempt", {}).items()}
    return {"step": decision["step"], "plan": plan | {"exempt": exempt, "reason": ""}}


def main() -> None:
    out, *jobs = sys.argv[1:]
    found = {job: run(*job.rsplit("/", 1)) for job in jobs}
    Path(out).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
