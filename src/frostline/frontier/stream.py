"""Samples of an iterable data set, numbered by the position at which the loader delivers them.

With several workers each reads its own share and the loader takes their batches in turn; the
position is the place in what comes out, so it depends on batch size and number of workers.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from frostline.backends.torch.random_state import mix, seeded, undisturbed
from frostline.errors import FrontierError
from frostline.frontier.loading import Twin, Witnessed

__all__ = ["Stream"]

IntArray = NDArray[np.int64]
Seen = Callable[[IntArray, IntArray, NDArray[np.uint64]], None]


class Stream:
    """The samples of a loader over an iterable data set.

    Args:
        loader: the user's.
        samples: delivered in an epoch; None: `len()` of the data set if one process reads it,
            else they are counted by reading all once.

    Attributes:
        samples: in an epoch.
        sizes: of the batches of an epoch; None while unknown.
        counted: content digests of the samples, where they were counted.
        on_read: told positions, views and content digests of whatever is read.
    """

    def __init__(self, loader: DataLoader[Any], samples: int | None) -> None:
        self._loader = loader
        self._whole = Twin(loader, loader.dataset, Witnessed(loader.collate_fn), batched=False)
        self._raw = Twin(
            loader, loader.dataset, Witnessed(_as_it_is), batched=False, persistent=False
        )
        self.on_read: Seen = _ignore
        self.sizes: list[int] | None = None
        self.counted: NDArray[np.uint64] | None = None
        self._readings = 0
        self._reader: Iterator[Any] | None = None
        self._waiting: deque[Any] = deque()
        self._position = 0
        if samples is None and loader.num_workers <= 1:
            samples = _length(loader.dataset)
        self.samples = self._counted() if samples is None else samples
        if self.sizes is None and loader.num_workers <= 1:
            self.sizes = self._cut(self.samples)

    def delivered(self, seed_state: Tensor | None) -> Iterator[tuple[int, Any]]:
        """Size and content of each batch of an epoch, read by the loader's workers."""
        sizes = []
        first = 0
        for digests, batch in self._whole.load(seed_state=seed_state):
            count = self._told(first, digests)
            first += count
            sizes.append(count)
            yield count, batch
        self.sizes = sizes

    def batch(self, positions: Sequence[int]) -> Any:
        """The samples at these positions, collated; rising positions are read in one go.

        Raises:
            FrontierError: the stream ended before.
        """
        found = {position: self._sample(position) for position in sorted(set(positions))}
        with undisturbed():
            return self._loader.collate_fn([found[position] for position in positions])

    def _sample(self, position: int) -> Any:
        if self._reader is None or position < self._position:
            self._reader = self._reading(self._raw)
            self._waiting.clear()
            self._position = 0
        while self._position + len(self._waiting) <= position:
            self._read(self._reader)
        while self._position < position:
            self._waiting.popleft()
            self._position += 1
        self._position += 1
        return self._waiting.popleft()

    def close(self) -> None:
        """Stop reading."""
        self._reader = None
        self._waiting.clear()

    def _read(self, reader: Iterator[Any]) -> None:
        found = next(reader, None)
        end = self._position + len(self._waiting)
        if found is None:
            self.close()
            raise FrontierError(
                "read a stream again",
                found=f"its end after {end} samples, where {self.samples} were expected",
                fix="let it give the same samples in each epoch, or train without the cache",
            )
        digests, samples = found
        self._told(end, digests)
        self._waiting.extend(samples)

    def _told(self, first: int, digests: bytes) -> int:
        numbers = np.frombuffer(digests, np.uint64)
        if first + len(numbers) > self.samples:
            raise FrontierError(
                "number the samples of a stream",
                found=f"more than the {self.samples} samples expected",
                fix="give the number of samples of one epoch: samples=...",
            )
        positions = np.arange(first, first + len(numbers))
        self.on_read(positions, np.zeros_like(positions), numbers)
        return len(numbers)

    def _reading(self, twin: Twin) -> Iterator[Any]:
        """All that a loader gives, under other seeds each time: a shuffled stream shows itself."""
        self._readings += 1
        state = torch.Generator().manual_seed(mix(self._readings)).get_state()
        items = twin.load(seed_state=state)
        for number in itertools.count():
            with seeded(mix(self._readings, number)):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _counted(self) -> int:
        collate = Witnessed(_nothing)
        twin = Twin(self._loader, self._loader.dataset, collate, batched=False, persistent=False)
        found = [np.frombuffer(digests, np.uint64) for digests, _ in self._reading(twin)]
        self.counted = np.concatenate([np.zeros(0, np.uint64), *found])
        self.sizes = [len(digests) for digests in found]
        return len(self.counted)

    def _cut(self, samples: int) -> list[int]:
        size = self._loader.batch_size or 1
        rest = [] if self._loader.drop_last or not samples % size else [samples % size]
        return [size] * (samples // size) + rest


def _nothing(samples: Any) -> None:
    """Collated to nothing: samples that are only counted need not leave the workers."""


def _as_it_is(samples: Any) -> Any:
    return samples


def _ignore(positions: IntArray, views: IntArray, digests: NDArray[np.uint64]) -> None:
    pass


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None
