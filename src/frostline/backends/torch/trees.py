"""Trees of plain values and tensors as JSON beside a table of tensors, and back, without code.

Optimizer, scheduler and generator states are such trees. What JSON cannot say (tuples, keys that
are no text, NaN, tensors) is tagged; what is code or memory rather than data is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostline.errors import StorageError

__all__ = ["pack", "unpack"]


def pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of plain values and tensors as JSON; tensors go to `tensors` by their place.

    What JSON cannot say is tagged: {"!": tag, ...}.

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
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"!": "float", "value": repr(float(value))}
    if isinstance(value, np.generic):
        return pack(value.item(), place, tensors)
    if isinstance(value, np.ndarray):
        tensors[place] = torch.from_numpy(value)
        return {"!": "array", "name": place}
    if isinstance(value, Tensor):
        tensors[place] = value.detach()
        device = {} if value.device.type == "cpu" else {"device": str(value.device)}
        return {"!": "tensor", "name": place, **device}
    if isinstance(value, Mapping):
        return _pack_mapping(value, place, tensors)
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"!": "tuple", "items": items}
    raise StorageError(
        f"save {place}",
        found=f"a {type(value).__qualname__}, which is code or memory rather than data",
        fix="keep numbers, strings, lists, mappings and tensors in its state",
    )


def _pack_mapping(value: Mapping[Any, Any], place: str, tensors: dict[str, Tensor]) -> Any:
    if (
        all(isinstance(key, str) for key in value)
        and "!" not in value
        and type(value) is not Counter
    ):
        return {key: pack(item, f"{place}/{key}", tensors) for key, item in value.items()}
    tag = "counter" if isinstance(value, Counter) else "mapping"
    pairs = [
        [pack(key, f"{place}/key", tensors), pack(item, f"{place}/{key}", tensors)]
        for key, item in value.items()
    ]
    return {"!": tag, "items": pairs}


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`; tensors are copies.

    Example:
        >>> unpack(pack((1, float("inf")), "x", {}), {})
        (1, inf)
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "!" not in value:
        return {key: unpack(item, tensors) for key, item in value.items()}
    return _UNTAG[value["!"]](value, tensors)


def _placed(tensor: Tensor, device: str | None) -> Tensor:
    """A copy (the file may be a map) on that device, or in main memory if it is not here."""
    own = tensor.clone()
    if device is None:
        return own
    try:
        return own.to(device)
    except (RuntimeError, AssertionError):  # what torch raises for a device that is not here
        return own


def _pairs(value: Any, tensors: Mapping[str, Tensor]) -> Iterable[tuple[Any, Any]]:
    return ((unpack(key, tensors), unpack(item, tensors)) for key, item in value["items"])


_UNTAG: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "float": lambda value, _: float(value["value"]),
    "array": lambda value, tensors: tensors[value["name"]].clone().numpy(),
    "tensor": lambda value, tensors: _placed(tensors[value["name"]], value.get("device")),
    "tuple": lambda value, tensors: tuple(unpack(item, tensors) for item in value["items"]),
    "mapping": lambda value, tensors: dict(_pairs(value, tensors)),
    "counter": lambda value, tensors: Counter(dict(_pairs(value, tensors))),
}
