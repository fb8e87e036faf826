"""Values with tensors inside: taken apart, and put together again with other tensors.

What models pass around is more than tensors: tuples, dictionaries, Hugging Face outputs, named
tuples, data classes, classes of the user's own. Here all of them are a list of leaves and a recipe
to build an equal value from other leaves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Leaves", "leaves_of", "map_leaves", "tensors_of"]

#: What is no container and no tensor, however many attributes it has.
_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type, slice, torch.Size, torch.dtype,
     torch.device, Tensor, torch.nn.Parameter}
)  # fmt: skip


def map_leaves(value: Any, change: Callable[[Any], Any], *, objects: bool = False) -> Any:
    """The same value with `change` applied to all that is no container.

    Args:
        value: anything; containers keep their type, and are left as they are if nothing changes.
        change: called for every leaf.
        objects: also look into objects of other classes that hold tensors as attributes.

    Example:
        >>> map_leaves([1, (2, {"a": 3})], lambda x: x + 1)
        [2, (3, {'a': 4})]
    """
    kind = type(value)
    if kind in _ATOMS or isinstance(value, Tensor):
        return change(value)
    if kind in (tuple, list):
        return kind([map_leaves(item, change, objects=objects) for item in value])
    if isinstance(value, tuple):  # named tuples, and what max() and the like return
        items = [map_leaves(item, change, objects=objects) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if kind is dict:
        return {key: map_leaves(item, change, objects=objects) for key, item in value.items()}
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
        changed: Any = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_leaves(item, change, objects=objects)
        return changed
    if objects and holds_tensors(value):
        changed = copy.copy(value)
        for name, item in attributes_of(value).items():
            object.__setattr__(changed, name, map_leaves(item, change, objects=objects))
        return changed
    return change(value)


def holds_tensors(value: Any) -> bool:
    """Whether an object of the user's own class carries tensors as attributes.

    Example:
        >>> holds_tensors(object())
        False
    """
    return any(isinstance(item, Tensor) for item in attributes_of(value).values())


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of a plain object or data class by name; empty for all else."""
    if isinstance(value, type) or callable(value):
        return {}
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    return dict(getattr(value, "__dict__", {}))


@dataclasses.dataclass(frozen=True, slots=True)
class Leaves:
    """A value taken apart.

    Attributes:
        items: what is no container, in order.
        build: from as many leaves, an equal value around them.
    """

    items: tuple[Any, ...]
    build: Callable[[Any], Any]


def leaves_of(value: Any) -> Leaves:
    """Take a value apart; objects with tensors as attributes, too.

    Example:
        >>> parts = leaves_of((1, [2]))
        >>> parts.items, parts.build([3, 4])
        ((1, 2), (3, [4]))
    """
    items: list[Any] = []

    def take(leaf: Any) -> Any:
        items.append(leaf)
        return leaf

    map_leaves(value, take, objects=True)

    def build(others: Any) -> Any:
        waiting = iter(others)
        return map_leaves(value, lambda _: next(waiting), objects=True)

    return Leaves(tuple(items), build)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors inside, in order."""
    return (leaf for leaf in leaves_of(value).items if isinstance(leaf, Tensor))
