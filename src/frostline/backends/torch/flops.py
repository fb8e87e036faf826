"""Floating-point operations of a forward pass, by layer group."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from frostline.backends.torch.example import Example
from frostline.backends.torch.tracing import leave_untouched, run_model
from frostline.groups import LayerGroups

__all__ = ["count_flops"]


def count_flops(
    model: nn.Module, groups: LayerGroups, example: Example, *, samples: int
) -> dict[str, float]:
    """Operations of one sample's forward pass by group: multiplications and additions, each one.

    Counted by torch's own counter: matrix products, convolutions and attention. What is cheap
    beside them (activations, norms, sums) is not counted. Operations of no group (in a module
    above all of them) are shared out in proportion; a model without any counted operation gets
    its parameters as operations.

    Args:
        model: the module that `groups` were found in.
        groups: its layer groups.
        example: a batch.
        samples: in the batch.

    Example:
        >>> from frostline.backends.torch.grouping import layer_groups
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> batch = Example((torch.ones(4, 8),))
        >>> count_flops(model, layer_groups(model, batch), batch, samples=4)
        {'0': 1024.0, '2': 256.0}
    """
    counter = FlopCounterMode(display=False)
    with leave_untouched(model), torch.no_grad(), counter:
        run_model(model, example.args, example.kwargs)
    root = type(model).__name__
    counts = {
        name.removeprefix(f"{root}."): float(sum(ops.values()))
        for name, ops in counter.get_flop_counts().items()
    }
    found = {
        g.name: sum(counts.get(name, 0.0) for name in _tops([m.name for m in g.modules]))
        for g in groups
    }
    total, known = counts.get("Global", 0.0), sum(found.values())
    if not known:
        return {g.name: float(g.parameter_count) for g in groups}
    return {name: count * total / known / samples for name, count in found.items()}


def _tops(names: list[str]) -> list[str]:
    """The modules that are inside no other of the same group."""
    inside = {n for n in names if any(n.startswith(f"{o}.") for o in names if o != n and o)}
    return [name for name in names if name not in inside]
