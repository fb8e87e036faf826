"""Trees of plain values and tensors as JSON beside a table of tensors, and back, without code.

Optimizer, scheduler and generator states are such trees. What JSON cannot say (tuples, keys that
are no text, NaN) is tagged, {"!": tag, ...}; tensors are tagged by the framework's own side, which
keeps them elsewhere; what is code or memory rather than data is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from frostline.errors import StorageError

__all__ = ["pack_tree", "unpack_tree"]

#: From a value and its place to its tag, or None if it is no tensor.
Keep = Callable[[Any, str], dict[str, Any] | None]
#: From such a tag back to the value.
Take = Callable[[Mapping[str, Any]], Any]


def pack_tree(value: Any, place: str, keep: Keep) -> Any:
    """A tree as JSON.

    Args:
        value: the tree.
        place: its name in messages and, with the path inside, of its tensors.
        keep: keeps a tensor and gives its tag.

    Raises:
        StorageError: something in it is no data; the message says where.

    Example:
        >>> pack_tree({"betas": (0.9, 0.99)}, "options", lambda value, place: None)
        {'betas': {'!': 'tuple', 'items': [0.9, 0.99]}}
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"!": "float", "value": repr(float(value))}
    if isinstance(value, np.generic):
        return pack_tree(value.item(), place, keep)
    if (tag := keep(value, place)) is not None:
        return tag
    if isinstance(value, Mapping):
        return _pack_mapping(value, place, keep)
    if isinstance(value, (list, tuple)):
        items = [pack_tree(item, f"{place}/{i}", keep) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"!": "tuple", "items": items}
    raise StorageError(
        f"save {place}",
        found=f"a {type(value).__qualname__}, which is code or memory rather than data",
        fix="keep numbers, strings, lists, mappings and tensors in its state",
    )


def _pack_mapping(value: Mapping[Any, Any], place: str, keep: Keep) -> Any:
    if (
        all(isinstance(key, str) for key in value)
        and "!" not in value
        and type(value) is not Counter
    ):
        return {key: pack_tree(item, f"{place}/{key}", keep) for key, item in value.items()}
    tag = "counter" if isinstance(value, Counter) else "mapping"
    pairs = [
        [pack_tree(key, f"{place}/key", keep), pack_tree(item, f"{place}/{key}", keep)]
        for key, item in value.items()
    ]
    return {"!": tag, "items": pairs}


def unpack_tree(value: Any, take: Take) -> Any:
    """The inverse of `pack_tree`.

    Example:
        >>> unpack_tree(pack_tree((1, float("inf")), "x", lambda value, place: None), dict)
        (1, inf)
    """
    if isinstance(value, list):
        return [unpack_tree(item, take) for item in value]
    if not isinstance(value, dict):
        return value
    if "!" not in value:
        return {key: unpack_tree(item, take) for key, item in value.items()}
    untag = _UNTAG.get(value["!"])
    return take(value) if untag is None else untag(value, take)


def _pairs(value: Any, take: Take) -> Iterable[tuple[Any, Any]]:
    return ((unpack_tree(key, take), unpack_tree(item, take)) for key, item in value["items"])


_UNTAG: dict[str, Callable[[Any, Take], Any]] = {
    "float": lambda value, _: float(value["value"]),
    "tuple": lambda value, take: tuple(unpack_tree(item, take) for item in value["items"]),
    "mapping": lambda value, take: dict(_pairs(value, take)),
    "counter": lambda value, take: Counter(dict(_pairs(value, take))),
}
