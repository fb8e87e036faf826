"""What a plan saves, in words, and what defeats the saving.

Backward stops at the shallowest tensor that requires grad. One early bias, an input that requires
grad, or embeddings whose output is made to require grad are enough to send it through every
frozen group. Nothing fails then; it only costs, so it is said, with the number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.tracing import leave_untouched, tensors_in
from frostline.groups import LayerGroup, LayerGroups
from frostline.plan import FreezePlan

__all__ = ["explain_plan", "recorded_groups"]


def explain_plan(
    groups: LayerGroups, plan: FreezePlan, *, fixed: Collection[str] = frozenset()
) -> str:
    """One sentence: how far backward runs under a plan, and which parameter makes it so.

    Args:
        groups: the layer groups.
        plan: the plan.
        fixed: names of parameters that never train.

    Example:
        >>> from frostline.groups import TensorInfo
        >>> stem = LayerGroup("stem", 0, (TensorInfo("stem.bias", (8,), kind="bias"),))
        >>> head = LayerGroup("head", 1, (TensorInfo("head.weight", (8, 2)),))
        >>> groups = LayerGroups((stem, head))
        >>> explain_plan(groups, FreezePlan(frozen=frozenset({"stem"})))
        'backward runs through 1 of 2 groups; the 1 before head record no graph'
        >>> bitfit = FreezePlan.training_only(groups, "kind:bias")
        >>> explain_plan(groups, bitfit)
        'stem.bias trains (8 values): backward runs through all 2 groups, 1 of them frozen'
    """
    frozen = plan.frozen_parameters(groups) | set(fixed)
    training = [(g, [p for p in g.parameters if p.name not in frozen]) for g in groups]
    first = next(((g, live) for g, live in training if live), None)
    if first is None:
        return "no parameter trains: there is no backward pass"
    group, live = first
    count = len(groups) - group.depth
    reach = f"{count} of {len(groups)}" if group.depth else f"all {count}"
    behind = [g for g in groups[group.depth :] if g.name in plan.frozen]
    if not behind:
        before = f"; the {group.depth} before {group.name} record no graph" if group.depth else ""
        return f"backward runs through {reach} groups{before}"
    names = ", ".join(p.name for p in live[:3]) + (" ..." if len(live) > 3 else "")
    verb = "trains" if len(live) == 1 else "train"
    values = sum(p.count for p in live)
    return (
        f"{names} {verb} ({values:,} values): backward runs through {reach} groups, "
        f"{len(behind)} of them frozen"
    )


def recorded_groups(model: nn.Module, groups: LayerGroups, example: Example) -> tuple[str, ...]:
    """Names of the groups whose forward pass records a graph, in order of depth.

    The model runs once in evaluation mode, with its parameters' flags as they are, and is left
    exactly as it was. A frozen group before the frontier that appears here pays for a backward
    pass that nobody needs: an input requires grad, or a hook makes an activation do so.
    """
    found: set[str] = set()
    with leave_untouched(model), torch.enable_grad():
        for module in model.modules():
            module.training = False
        handles = [
            model.get_submodule(info.name).register_forward_hook(_noter(group, found))
            for group in groups
            for info in group.modules
            if info.name
        ]
        try:
            model(*example.args, **example.kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return tuple(name for name in groups.names if name in found)


def _noter(group: LayerGroup, found: set[str]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        # Inputs too: reentrant checkpointing runs its blocks without grad and re-runs them later.
        del module
        if any(t.requires_grad for t in tensors_in((args, output))):
            found.add(group.name)

    return note
