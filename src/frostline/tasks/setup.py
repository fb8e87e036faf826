"""From settings to training parts: optimizer, learning-rate schedule, policy, mixed precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from frostline.backends.torch.optimizer import parameter_groups
from frostline.clock import Duration, Progress
from frostline.compose import Live
from frostline.errors import ConfigError
from frostline.groups import LayerGroups
from frostline.policies.auto import Auto
from frostline.policies.within import Within
from frostline.policy import Policy
from frostline.registry import make_policy
from frostline.tasks.allowance import Allowance, Budget
from frostline.tasks.config import RunConfig, budget_bytes

__all__ = [
    "build_optimizer",
    "build_policy",
    "build_schedule",
    "learning_rate_factor",
    "learning_rate_scales",
    "mixed_precision",
]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate_scales(config: RunConfig, groups: LayerGroups) -> dict[str, float]:
    """Lasting factor on `config.lr` per layer group: `lr_decay` towards the input, `head_lr`.

    The deepest group of the backbone has factor 1, the one before it `lr_decay`, and so on.
    """
    rate = config.lr or 1.0
    head = 1.0 if config.head_lr is None else config.head_lr / rate
    deepest = max((g.depth for g in groups if g.name not in groups.head), default=0)
    return {
        g.name: head if g.name in groups.head else config.lr_decay ** max(0, deepest - g.depth)
        for g in groups
    }


def build_optimizer(
    config: RunConfig, model: nn.Module, groups: LayerGroups
) -> torch.optim.Optimizer:
    """The optimizer over every parameter, frozen or not, with one rate per layer group.

    Raises:
        ConfigError: the settings have no learning rate yet.
    """
    if config.lr is None:
        raise ConfigError("build an optimizer", found="no learning rate", fix="set lr")
    grouped = parameter_groups(
        model,
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        lr_scale=learning_rate_scales(config, groups),
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(grouped)
    if config.optimizer == "adam":
        return torch.optim.Adam(grouped)
    return torch.optim.SGD(grouped, momentum=0.9)


def learning_rate_factor(config: RunConfig, progress: Progress) -> Callable[[float], float]:
    """Factor on every learning rate by updates completed: linear warm-up, then the schedule.

    Args:
        config: `warmup` and `schedule` are read.
        progress: with the totals of the run.

    Example:
        >>> config = RunConfig(model="m", data="d", warmup="4st", schedule="constant")
        >>> factor = learning_rate_factor(config, Progress(total_steps=10))
        >>> [factor(step) for step in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    total = progress.total_steps or 1
    warm = min(total - 1, Duration.parse(config.warmup).steps(progress))

    def factor(step: float) -> float:
        if step < warm:
            return min(1.0, (step + 1) / warm)
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / (total - warm))))

    return factor


def build_schedule(
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    allowance: Allowance | None = None,
) -> LambdaLR:
    """Warm-up and schedule on every group of the optimizer, stepped once per update.

    Under a budget that is counted as the run goes, the schedule follows the share that is spent.
    """
    factor = learning_rate_factor(config, progress)
    if allowance is None or not allowance.counted:
        return LambdaLR(optimizer, factor)
    return LambdaLR(optimizer, lambda step: factor(allowance.share(step) * allowance.steps))


def build_policy(config: RunConfig) -> Policy:
    """The policy of the settings, with their limits and their switches for frozen groups.

    Raises:
        ConfigError: a memory budget, and a policy that does not choose by cost.
        PolicyError: unknown policy or option.
    """
    policy = _limited(make_policy(config.policy), config)
    if config.live_norm or config.live_dropout:
        return Live(policy, norm=config.live_norm, dropout=config.live_dropout)
    return policy


def _limited(policy: Policy, config: RunConfig) -> Policy:
    """The policy with the limits of the settings, where it is one that keeps to some."""
    most_bytes = budget_bytes(config)
    budget = None if config.budget is None else Budget.parse(config.budget)
    run_s = None if budget is None else budget.seconds
    if isinstance(policy, (Auto, Within)):
        # What is said of the policy itself counts.
        run_s = policy.run_s if policy.run_s is not None else run_s
        most_bytes = policy.peak_bytes if policy.peak_bytes is not None else most_bytes
        return replace(policy, run_s=run_s, peak_bytes=most_bytes)
    if most_bytes is not None:
        raise ConfigError(
            f"keep the memory of {config.policy!r} within {config.memory_budget}",
            found="a policy that freezes the same whatever it costs",
            fix=f"policy: auto, or within:policy=({config.policy})",
        )
    return policy


def mixed_precision(
    config: RunConfig, device: torch.device
) -> tuple[Callable[[], AbstractContextManager[object]], torch.amp.GradScaler | None]:
    """The context of a forward pass, and the gradient scaler where one is needed.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    if config.precision == "fp32":
        return nullcontext, None
    if config.precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"train in fp16 on {device.type}",
            found="no CUDA device, which its loss scaling needs",
            fix="precision: bf16, or fp32",
        )
    dtype = _AUTOCAST[config.precision]
    scaler = torch.amp.GradScaler("cuda") if config.precision == "fp16" else None
    return lambda: torch.autocast(device.type, dtype=dtype), scaler
