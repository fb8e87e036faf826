"""What a batch holds besides the model's inputs: labels, names, weights, kept per sample in memory.

A batch whose inputs are stored need not be loaded, but whoever trains on it wants its labels. They
are taken from batches that were loaded anyway, sample by sample, and put together again in any
order. Only what is provably one value per sample is kept: whatever comes by twice, in other
company, must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frostline.frontier.structure import attributes_of, holds_tensors, leaves_of

__all__ = ["SideTable", "Unsplittable", "folded", "is_plain", "is_whole", "skeleton", "unfolded"]

IntArray = NDArray[np.int64]
_VALUES = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, tuple)
_BLANK = torch.empty(0)


class Unsplittable(Exception):
    """Something of a batch that cannot be told apart by sample; says what, in words."""


@dataclass(frozen=True, slots=True, eq=False)
class _Column:
    """A list of Python values, one per sample: one leaf, not as many leaves as samples."""

    kind: type
    items: tuple[Any, ...]

    def list(self) -> Any:
        """The list as it was."""
        return self.kind(self.items)


def is_plain(value: Any) -> bool:
    """Whether a value cannot change under our hands.

    Example:
        >>> is_plain(("a", 1)), is_plain(["a"])
        (True, False)
    """
    return type(value) in _VALUES or (type(value) is tuple and all(map(is_plain, value)))


def is_whole(leaf: Any, size: int) -> bool:
    """Whether a tensor or array has the samples in its first dimension."""
    return isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0 and len(leaf) == size


def folded(batch: Any, size: int) -> Any:
    """The batch with lists of `size` Python values as single leaves.

    Example:
        >>> leaves_of(folded((torch.zeros(2), ["cat", "dog"]), 2)).items[1].list()
        ['cat', 'dog']
    """
    kind: Any = type(batch)
    if kind in _CONTAINERS:
        if len(batch) == size and all(is_plain(item) for item in batch):
            return _Column(kind, tuple(batch))
        return kind([folded(item, size) for item in batch])
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*[folded(item, size) for item in batch])
    if isinstance(batch, dict) and kind is dict:
        return {key: folded(item, size) for key, item in batch.items()}
    return batch


def unfolded(leaf: Any) -> Any:
    """A leaf as the user knows it."""
    return leaf.list() if type(leaf) is _Column else leaf


def skeleton(value: Any) -> Any:
    """What a value is made of, without its leaves; equal for values of equal build."""
    kind = type(value)
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return kind, tuple(value), tuple(skeleton(item) for item in value.values())
    if isinstance(value, _CONTAINERS):
        return kind, tuple(skeleton(item) for item in value)
    if holds_tensors(value):
        inside = attributes_of(value)
        return kind, tuple(inside), tuple(skeleton(item) for item in inside.values())
    return None


class SideTable:
    """Leaves of batches by sample and view, put together again on demand.

    Args:
        samples: how many there are.
        views: of each.
        budget_bytes: the most that tensors may take in memory.

    Example:
        >>> table = SideTable(3, 1, 1000)
        >>> none = np.zeros(2, np.int64)
        >>> table.learn(np.array([2, 0]), none, (torch.tensor([7, 5]), ["c", "a"]), frozenset())
        >>> table.knows(np.array([0, 2]), none)
        True
        >>> table.build(np.array([0, 2]), none, lambda place: None)
        (tensor([5, 7]), ['a', 'c'])
    """

    def __init__(self, samples: int, views: int, budget_bytes: int) -> None:
        self._samples, self._views, self._budget_bytes = samples, views, budget_bytes
        self._known = np.zeros((views, samples), np.bool_)
        self._template: Any = None
        self._skeleton: Any = None
        self._inputs: frozenset[int] = frozenset()
        self._columns: dict[int, Any] = {}
        self._constants: dict[int, Any] = {}

    def knows(self, indices: IntArray, views: IntArray) -> bool:
        """Whether all of these can be put together."""
        return self._skeleton is not None and bool(self._known[views, indices].all())

    def holds(self, place: int) -> bool:
        """Whether the leaf at a place is kept."""
        return place in self._columns or place in self._constants

    def learn(
        self, indices: IntArray, views: IntArray, batch: Any, inputs: Collection[int]
    ) -> None:
        """Take over what a loaded batch holds, and compare what is known already.

        Args:
            indices: (N,) of its samples.
            views: (N,) of each.
            batch: as it was loaded.
            inputs: places of the leaves that need not be kept.

        Raises:
            Unsplittable: something cannot be kept by sample, or differs from what it was.
        """
        size = len(indices)
        shape = folded(batch, size)
        leaves = leaves_of(shape).items
        if self._skeleton is None or self._inputs != frozenset(inputs):
            self._begin(shape, leaves, size, frozenset(inputs))
        if skeleton(shape) != self._skeleton:
            raise Unsplittable("batches of different build")
        known = self._known[views, indices]
        for place, leaf in enumerate(leaves):
            if place in self._constants:
                if not _same(self._constants[place], leaf):
                    raise Unsplittable(f"{_named(leaf)} that changes from batch to batch")
            elif place in self._columns:
                self._take(place, leaf, indices, views, known)
        self._known[views, indices] = True

    def build(self, indices: IntArray, views: IntArray, put: Callable[[int], Any]) -> Any:
        """The batch of these samples; `put(place)` gives the leaves that are not kept."""
        leaves: list[Any] = []
        for place in range(len(leaves_of(self._template).items)):
            if place in self._inputs or not self.holds(place):
                leaves.append(put(place))
            else:
                leaves.append(unfolded(self.leaf(place, indices, views)))
        return leaves_of(self._template).build(leaves)

    def leaf(self, place: int, indices: IntArray, views: IntArray) -> Any:
        """One leaf of these samples, a private copy."""
        if place in self._constants:
            constant = self._constants[place]
            return constant.clone() if isinstance(constant, Tensor) else constant
        column = self._columns[place]
        if isinstance(column, Tensor):
            return column[torch.from_numpy(views), torch.from_numpy(indices)]
        if isinstance(column, np.ndarray):
            return column[views, indices]
        kind, rows = column
        return _Column(kind, tuple(rows[v][i] for v, i in zip(views, indices, strict=True)))

    def forget(self) -> None:
        """Drop everything."""
        self.__init__(self._samples, self._views, self._budget_bytes)

    # -- inside ------------------------------------------------------------------------------

    def _begin(
        self, shape: Any, leaves: tuple[Any, ...], size: int, inputs: frozenset[int]
    ) -> None:
        self.forget()
        self._inputs = inputs
        needed = 0
        for place, leaf in enumerate(leaves):
            if place in inputs and not _is_small(leaf, size):
                continue
            if is_whole(leaf, size) and _is_storable(leaf):
                needed += leaf.nbytes // size * self._samples * self._views
                if needed > self._budget_bytes:
                    raise Unsplittable(
                        f"{_named(leaf)}, {needed:,} bytes for all samples, which is more than "
                        f"the {self._budget_bytes:,} set aside in memory"
                    )
                table = (self._views, self._samples, *leaf.shape[1:])
                self._columns[place] = (
                    torch.zeros(table, dtype=leaf.dtype, device=leaf.device)
                    if isinstance(leaf, Tensor)
                    else np.zeros(table, leaf.dtype)
                )
            elif type(leaf) is _Column:
                rows = [[None] * self._samples for _ in range(self._views)]
                self._columns[place] = leaf.kind, rows
            elif is_plain(leaf) or (isinstance(leaf, Tensor) and not is_whole(leaf, size)):
                self._constants[place] = leaf.clone() if isinstance(leaf, Tensor) else leaf
            elif place not in inputs:
                raise Unsplittable(_named(leaf))
        self._skeleton = skeleton(shape)
        self._template = leaves_of(shape).build([_BLANK] * len(leaves))

    def _take(
        self, place: int, leaf: Any, indices: IntArray, views: IntArray, known: NDArray[np.bool_]
    ) -> None:
        column = self._columns[place]
        if isinstance(column, tuple):
            kind, rows = column
            if type(leaf) is not _Column or leaf.kind is not kind:
                raise Unsplittable(f"{_named(leaf)} where a list of values came before")
            for v, i, item, before in zip(views, indices, leaf.items, known, strict=True):
                if before and not _same(rows[v][i], item):
                    raise Unsplittable("a list whose values depend on the batch")
                rows[v][i] = item
            return
        fits = (
            type(leaf) is type(column)
            and leaf.dtype == column.dtype
            and tuple(leaf.shape) == (len(indices), *column.shape[2:])
        )
        if not fits:
            raise Unsplittable(f"{_named(leaf)}, another shape than in other batches")
        if isinstance(column, Tensor):
            at = torch.from_numpy(views), torch.from_numpy(indices)
            old = torch.from_numpy(known)
            same = not known.any() or _same(column[at][old], leaf.detach()[old])
            column[at] = leaf.detach()
        else:
            same = not known.any() or _same(column[views, indices][known], leaf[known])
            column[views, indices] = leaf
        if not same:
            raise Unsplittable(f"{_named(leaf)}, whose values depend on the batch")


#: A model's input is kept, too, up to this size per sample: somebody may look at it.
SMALL_BYTES = 1024


def _is_small(leaf: Any, size: int) -> bool:
    return not is_whole(leaf, size) or leaf.nbytes <= SMALL_BYTES * size


def _is_storable(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_quantized
    return type(leaf) is np.ndarray and not leaf.dtype.hasobject


def _named(leaf: Any) -> str:
    if type(leaf) is _Column:
        return "a list of values"
    if isinstance(leaf, (Tensor, np.ndarray)):
        return f"a {type(leaf).__name__} of shape {tuple(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def _same(one: Any, other: Any) -> bool:
    """Equal to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        one, other = one.detach().cpu(), other.detach().cpu()
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one, other) or _bits(one) == _bits(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and (
            one.tobytes() == other.tobytes()
        )  # fmt: skip
    return one is other or bool(one == other)


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
