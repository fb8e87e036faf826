"""Frontier values of some samples: computed once, block by block, kept on disk, read in any order.

Rows are computed in whole blocks of `BLOCK_ROWS` consecutive samples, the last one filled up with
its last sample: a row's bits depend on the batch around it, and this way a store is a function of
its key, whoever fills it and in whatever order training asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.forward import Forward
from frostline.frontier.keras.graph import Value
from frostline.frontier.keras.parts import data_parts
from frostline.frontier.keras.region import close
from frostline.frontier.key import CacheKey
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.frontier.segments import BLOCK_ROWS
from frostline.frontier.store import Column, Store
from frostline.frontier.views import Views
from frostline.seeds import mix

__all__ = ["ROUNDING", "Compute", "Features", "Samples", "Shelf", "drawn"]

#: Arrays of one block and the number of its first sample, to arrays of the results.
Compute = Callable[[Sequence[NDArray[Any]], int], list[NDArray[Any]]]
#: Most that rounding may take from a stored value, against what exact values may differ.
ROUNDING = {"exact": 1.0, "bfloat16": 100.0, "float16": 20.0, "int8": 200.0}


@dataclass(slots=True)
class Samples:
    """Samples that a model is trained or evaluated on.

    Attributes:
        name: "train" or "validation"; for messages.
        arrays: one for each input of the model, samples first.
        data_name: what the user calls them, in place of a digest of their bytes.
    """

    name: str
    arrays: list[NDArray[Any]]
    data_name: str | None = None
    _data: dict[str, Any] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def data(self) -> dict[str, Any]:
        """Plain JSON that tells which samples these are; read once."""
        if self._data is None:
            self._data = data_parts(self.arrays, self.data_name)
        return self._data

    def rows(self, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """These samples, `(len(rows), ...)` of each input."""
        return [np.asarray(array[rows]) for array in self.arrays]

    def block(self, first: int) -> NDArray[np.int64]:
        """Numbers of the samples that are computed with sample `first`; the last one repeats."""
        return np.minimum(np.arange(first, first + BLOCK_ROWS), len(self) - 1)


class Features:
    """Stored frontier values of some samples.

    Args:
        samples: whose values these are.
        frontier: the columns.
        key: what the values depend on.
        library: where the store is.
        encoding: how floating values are kept.
        compute: from the samples' arrays, or `source`'s values, of one block to the frontier.
        source: features of a shallower frontier to compute from; None: the samples themselves.
        about: in words, for `frostline cache list`.
        most_bytes: the most that the store may take; None: no bound.

    Raises:
        FrontierError: the budget has no room for all rows.
        StorageError: the disk refuses.
    """

    def __init__(
        self,
        samples: Samples,
        frontier: Sequence[Value],
        key: CacheKey,
        library: Library,
        *,
        encoding: Encoding,
        compute: Compute,
        about: Mapping[str, Any],
        source: Features | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self.samples, self.frontier, self.encoding = samples, tuple(frontier), encoding
        self._compute, self._source = compute, source
        columns = [Column(value.name, value.dtype, encoding) for value in self.frontier]
        self.store: Store = library.open(
            key, columns, len(samples), about=about, most_bytes=most_bytes
        )
        #: Rows that were computed or found by this object, so that each is counted once.
        self._met = np.zeros(len(samples), np.bool_)
        #: Whether all rows were computed here and now, and from the samples.
        self.is_own = source is None

    def fill(self, report: CacheReport) -> None:
        """Compute the rows that are not there, block by block.

        Raises:
            FrontierError: the budget has no room for them, or they cannot be encoded.
            StorageError: the disk refuses.
        """
        for first in range(0, len(self.samples), BLOCK_ROWS):
            rows = self._real(first)
            if self.store.present(rows).all():
                self._count_found(rows, report)
                continue
            self._fill(first, report)
        self._source = None  # not needed any more; its store may be closed

    def read(self, rows: NDArray[np.int64], report: CacheReport) -> list[NDArray[Any]]:
        """The frontier values of these samples, `(len(rows), ...)` each, in the frontier's order.

        A row that is not there, or was damaged since it was written, is computed with its block.

        Raises:
            FrontierError: a row that is damaged each time it is read; the budget has no room.
            StorageError: the disk refuses.
        """
        if not self._met[rows].all():
            self._count_found(rows[self.store.present(rows)], report)
            self._fill_blocks(rows[~self.store.present(rows)], report)
        began = time.perf_counter()
        values, good = self.store.read(rows)
        report.read_s += time.perf_counter() - began
        if not good.all():
            self._fill_blocks(rows[~good], report)
            values, good = self.store.read(rows)
        if not good.all():
            raise FrontierError(
                f"read stored values from {self.store.folder}",
                found=f"{int((~good).sum())} row(s) that read back damaged each time",
                fix="check the disk, or train uncached: cache=False",
            )
        report.read_rows += len(rows)
        return [values[value.name] for value in self.frontier]

    def doubt(self, pick: int) -> str:
        """The name of a frontier value that computing one block again gives differently, or "".

        Args:
            pick: any number >= 0; chooses among the blocks that are stored.
        """
        there = np.flatnonzero(self.store.present(np.arange(0, len(self.samples), BLOCK_ROWS)))
        if not len(there):
            return ""
        first = int(there[pick % len(there)]) * BLOCK_ROWS
        rows = self._real(first)
        stored, good = self.store.read(rows)
        again = self._compute(self.samples.rows(self.samples.block(first)), first)
        for value, fresh in zip(self.frontier, again, strict=True):
            kept = stored[value.name][good]
            if not close(kept, fresh[: len(rows)][good], times=ROUNDING[self.encoding]):
                return value.name
        return ""

    def compute_from_samples(self, compute: Compute) -> None:
        """What computes blocks from now on: from the samples alone."""
        self._compute = compute

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _real(self, first: int) -> NDArray[np.int64]:
        return np.arange(first, min(first + BLOCK_ROWS, len(self.samples)))

    def _count_found(self, rows: NDArray[np.int64], report: CacheReport) -> None:
        """Rows that were there when they were first asked for."""
        fresh = np.unique(rows[~self._met[rows]])
        report.found_rows += len(fresh)
        self.is_own &= not len(fresh)
        self._met[fresh] = True

    def _fill_blocks(self, rows: NDArray[np.int64], report: CacheReport) -> None:
        for first in sorted({int(row) // BLOCK_ROWS * BLOCK_ROWS for row in rows}):
            self._fill(first, report)

    def _fill(self, first: int, report: CacheReport) -> None:
        began = time.perf_counter()
        block = self.samples.block(first)
        given = self._source.read(block, report) if self._source else self.samples.rows(block)
        computed = self._compute(given, first)
        report.compute_s += time.perf_counter() - began
        rows = self._real(first)
        values = {
            value.name: np.ascontiguousarray(array[: len(rows)])
            for value, array in zip(self.frontier, computed, strict=True)
        }
        if not self.store.write(first, values):
            raise FrontierError(
                f"keep the frontier of {len(self.samples):,} samples",
                found=f"a budget that is used up at row {first:,}",
                fix="allow more bytes, or store half as many: dtype='bfloat16'",
            )
        self._met[rows] = True
        report.filled_rows += len(rows)
        report.computed_rows += len(rows)
        report.fill_s += time.perf_counter() - began


class Shelf:
    """All that is stored of one set of samples under one region: in inference, and by view.

    Args:
        samples: which ones.
        views: which view of a sample an epoch trains on; None: training sees what inference
            sees, and there is one store.
        make: opens the features of one view; of None: as in inference.
    """

    def __init__(
        self, samples: Samples, views: Views | None, make: Callable[[int | None], Features]
    ) -> None:
        self.samples, self.views = samples, views
        self._make = make
        self._open: dict[int | None, Features] = {}

    def features(self, view: int | None) -> Features:
        """Those of one view, or of inference; opened when first asked for."""
        if view not in self._open:
            self._open[view] = self._make(view)
        return self._open[view]

    def read(
        self, rows: NDArray[np.int64], report: CacheReport, *, epoch: int | None
    ) -> list[NDArray[Any]]:
        """Frontier values of these samples, `(len(rows), ...)` each.

        Args:
            rows: their numbers.
            report: what happened is counted there.
            epoch: of training, from 0; None: as inference sees them.

        Raises:
            FrontierError, StorageError: see `Features.read`.
        """
        if epoch is None or self.views is None:
            return self.features(None).read(rows, report)
        which = self.views.of(epoch, rows)
        found: list[NDArray[Any]] = []
        for view in np.unique(which).tolist():
            mine = which == view
            part = self.features(view).read(rows[mine], report)
            if not found:
                found = [np.empty((len(rows), *a.shape[1:]), a.dtype) for a in part]
            for array, values in zip(found, part, strict=True):
                array[mine] = values
        return found

    def doubt(self, pick: int) -> str:
        """What `Features.doubt` says of one of the stores, or ""."""
        opened = list(self._open.values())
        return opened[pick % len(opened)].doubt(pick // len(opened)) if opened else ""

    @property
    def is_own(self) -> bool:
        """Whether all that was read so far was computed here and now, from the samples."""
        return all(features.is_own for features in self._open.values())

    @property
    def bytes_on_disk(self) -> int:
        """Of all its stores."""
        return sum(features.store.bytes_on_disk for features in self._open.values())

    def close(self) -> None:
        """Close the stores."""
        for features in self._open.values():
            features.close()


def drawn(forward: Forward, views: Views, view: int) -> Compute:
    """Computes blocks in one view: a function of samples, seed, block and view alone."""

    def compute(batch: Sequence[NDArray[Any]], first: int) -> list[NDArray[Any]]:
        block = first // BLOCK_ROWS
        return forward.drawn(batch, lambda number: mix(views.seed, block, view, number))

    return compute
