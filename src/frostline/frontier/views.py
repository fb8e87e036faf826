"""Which augmented view of a sample an epoch trains on: arithmetic, so nothing has to be saved.

Random transforms and a store seem to exclude each other: a stored sample never changes again. So
each sample is stored in K *views*, each drawn once by the user's own random transforms. The first
K epochs fill the views one after the other, all samples in the same one, so that no epoch computes
more than it trains on. From then on each sample goes through its views in an order of its own:
rounds of K epochs in which it meets each view once, never the same one twice running.

With K = 2 that leaves one order only: the two views alternate.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from frostline.errors import ConfigError
from frostline.seeds import mix

__all__ = ["MAX_VIEWS", "IntArray", "Order", "Views"]

IntArray = NDArray[np.int64]
Many = Sequence[int] | NDArray[Any]
Order = Literal["fresh-then-random"]
#: More views than epochs of any training: whoever asks for more wants no store.
MAX_VIEWS = 10_000

# Constants of splitmix64 (Steele, Lea and Flood: Fast splittable pseudorandom number generators,
# OOPSLA 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Views:
    """How many stored views each sample has, and which of them an epoch uses.

    Attributes:
        count: K, views per sample, 1 to `MAX_VIEWS`.
        seed: of the views' content and of their order, 0 to 2**63 - 1.
        order: "fresh-then-random": view e in epoch e < K, then rounds in random order.
        augmented: whether the data set's random transforms run, as functions of (seed, index,
            view) alone. None: when there are several views. With False the data set must give
            the same for an index each time.

    Raises:
        ConfigError: a count, seed or order that cannot be, or several views without augmentation.

    Example:
        >>> views = Views(4, seed=1)
        >>> [views.of(epoch, 7) for epoch in range(4)]
        [0, 1, 2, 3]
        >>> views.of(2, [0, 5, 9]).tolist()
        [2, 2, 2]
        >>> sorted(views.of(epoch, 7) for epoch in range(4, 8))
        [0, 1, 2, 3]
        >>> print(views.describe())
        each sample is stored in 4 augmented views; epoch 5 on reuses them in random order
    """

    count: int = 1
    seed: int = 0
    order: Order = "fresh-then-random"
    augmented: bool | None = None

    def __post_init__(self) -> None:
        _require_int("count", self.count, 1, MAX_VIEWS)
        _require_int("seed", self.seed, 0, 2**63 - 1)
        if self.order != "fresh-then-random":
            raise ConfigError(
                f"use the order of views {self.order!r}",
                found="an unknown order",
                fix="write order='fresh-then-random', the only one",
            )
        if self.augmented is None:
            object.__setattr__(self, "augmented", self.count > 1)
        elif self.count > 1 and not self.augmented:
            raise ConfigError(
                f"store {self.count} views of each sample without augmentation",
                found="views that would all be equal",
                fix="write Views(1), or leave augmented=False out",
            )

    @overload
    def of(self, epoch: int, index: int) -> int: ...
    @overload
    def of(self, epoch: int, index: Many) -> IntArray: ...
    def of(self, epoch: int, index: int | Many) -> int | IntArray:
        """The view that each sample is trained on in this epoch, 0 to K - 1.

        Args:
            epoch: from 0.
            index: of one sample, or of many.
        """
        indices = np.asarray(index, dtype=np.int64)
        views = self._of(_epoch(epoch), indices.reshape(-1)).reshape(indices.shape)
        return views if indices.ndim else int(views)

    def seed_of(self, index: int, view: int) -> int:
        """What the global generators are seeded with while this view is made, below 2**32.

        Example:
            >>> Views(2).seed_of(3, 0) == Views(2).seed_of(3, 1)
            False
        """
        return mix(self.seed, index, view)

    @property
    def identity(self) -> dict[str, Any]:
        """What the content of a view depends on, as plain JSON; not K, so K may grow later."""
        return {"augmented": bool(self.augmented), "seed": self.seed if self.augmented else None}

    def describe(self) -> str:
        """One sentence for people; epochs count from 1 in it."""
        if not self.augmented:
            return "each sample is stored once, without augmentation"
        if self.count == 1:
            return "each sample is stored in 1 augmented view, the same in every epoch"
        how = "alternates between them" if self.count == 2 else "reuses them in random order"
        return (
            f"each sample is stored in {self.count} augmented views; "
            f"epoch {self.count + 1} on {how}"
        )

    def _of(self, epoch: int, indices: IntArray) -> IntArray:
        cycle, place = divmod(epoch, self.count)
        if cycle == 0 or self.count <= 2:
            return np.full(indices.shape, place, np.int64)
        # The swap that keeps the border of two rounds apart changes their first two views only.
        if place > 1:
            return self._drawn(cycle, place, indices)
        first = self._drawn(cycle, 0, indices)
        clash = first == self._last(cycle - 1, indices)
        other = self._drawn(cycle, 1, indices)
        return np.where(clash, other, first) if place == 0 else np.where(clash, first, other)

    def _last(self, cycle: int, indices: IntArray) -> IntArray:
        if cycle == 0:
            return np.full(indices.shape, self.count - 1, np.int64)
        return self._drawn(cycle, self.count - 1, indices)

    def _drawn(self, cycle: int, place: int, indices: IntArray) -> IntArray:
        """What stands at `place` of each sample's shuffled views (Fisher and Yates, backwards)."""
        # Two draws of 32 bits: one would let two of some 60,000 rounds share their orders.
        start = mix(self.seed, cycle, 0) << 32 | mix(self.seed, cycle, 1)
        key = _scrambled(indices.astype(np.uint64) ^ np.uint64(start))
        deck = np.tile(np.arange(self.count, dtype=np.int16), (len(indices), 1))
        rows = np.arange(len(indices))
        for last in range(self.count - 1, max(place, 1) - 1, -1):
            key += _STEP
            chosen = (_scrambled(key) % np.uint64(last + 1)).astype(np.int64)
            picked = deck[rows, chosen]
            deck[rows, chosen] = deck[:, last]
            deck[:, last] = picked
        return deck[:, place].astype(np.int64)


def _scrambled(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = (numbers ^ (numbers >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


def _epoch(epoch: int) -> int:
    number = operator.index(epoch)
    if number < 0:
        raise ConfigError(
            f"tell the views of epoch {number}", found="a negative epoch", fix="count from 0"
        )
    return number


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(
            f"set {name}={value!r} of the views",
            found=f"a {type(value).__name__}" if not isinstance(value, int) else f"{value!r}",
            fix=f"give a whole number from {low} to {high}",
        )
