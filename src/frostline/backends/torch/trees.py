"""Trees with PyTorch tensors in them, by `frostline.backends.trees`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostline.backends.trees import pack_tree, unpack_tree

__all__ = ["pack", "unpack"]


def pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of plain values and tensors as JSON; tensors go to `tensors` by their place.

    Args:
        value: the tree.
        place: its name in messages and, with the path inside, of its tensors.
        tensors: receives the tensors.

    Raises:
        StorageError: something in it is no data; the message says where.

    Example:
        >>> pack({"betas": (0.9, 0.99)}, "options", {})
        {'betas': {'!': 'tuple', 'items': [0.9, 0.99]}}
    """

    def keep(leaf: Any, where: str) -> dict[str, Any] | None:
        if isinstance(leaf, np.ndarray):
            tensors[where] = torch.from_numpy(leaf)
            return {"!": "array", "name": where}
        if isinstance(leaf, Tensor):
            tensors[where] = leaf.detach()
            device = {} if leaf.device.type == "cpu" else {"device": str(leaf.device)}
            return {"!": "tensor", "name": where, **device}
        return None

    return pack_tree(value, place, keep)


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`; tensors are copies.

    Example:
        >>> unpack(pack((1, float("inf")), "x", {}), {})
        (1, inf)
    """
    return unpack_tree(value, lambda tag: _TAKE[tag["!"]](tag, tensors))


def _placed(tensor: Tensor, device: str | None) -> Tensor:
    """A copy (the file may be a map) on that device, or in main memory if it is not here."""
    own = tensor.clone()
    if device is None:
        return own
    try:
        return own.to(device)
    except (RuntimeError, AssertionError):  # what torch raises for a device that is not here
        return own


_TAKE: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]] = {
    "array": lambda tag, tensors: tensors[tag["name"]].clone().numpy(),
    "tensor": lambda tag, tensors: _placed(tensors[tag["name"]], tag.get("device")),
}
