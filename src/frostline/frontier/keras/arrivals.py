"""Frontier values of samples that arrive in batches, without numbers: known again by content.

A `tf.data.Dataset`, a `PyDataset` or a generator hands out batches and does not say which samples
they hold; it may shuffle, cut and repeat them as it likes. So a sample is what its inputs are: 128
bits of xxh3 over its row of every input. Whatever order the rows come in, a value is only ever
used for the very content that it was computed from.

Rows are computed in the batches that they first arrive in, filled up to the size of the largest
one so far. A pipeline that augments at random never gives a row twice: nothing more is kept once
that shows, and after another epoch the values are given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from frostline.errors import FrontierError
from frostline.frontier.encodings import Column
from frostline.frontier.keras.contents import Contents
from frostline.frontier.keras.features import ROUNDING
from frostline.frontier.keras.region import close
from frostline.frontier.report import CacheReport

__all__ = ["Arrivals", "row_digests"]

#: The share of rows that must be known again from the second epoch on.
_LEAST_KNOWN = 0.1

Arrays = list[NDArray[Any]]
Shapes = list[tuple[int, ...]]


def row_digests(batch: Sequence[NDArray[Any]]) -> list[bytes]:
    """What each sample is: 16 bytes for its row of every input.

    Example:
        >>> one, other = row_digests([np.array([[1.0, 2.0], [1.0, 2.0]])])
        >>> one == other, len(one)
        (True, 16)
    """
    count = len(batch[0])
    rows = [np.ascontiguousarray(array).reshape(count, -1).view(np.uint8) for array in batch]
    if len(rows) == 1:
        return [xxhash.xxh3_128_digest(row.data) for row in rows[0]]
    found = []
    for number in range(count):
        hasher = xxhash.xxh3_128()
        for array in rows:
            hasher.update(array[number].data)
        found.append(hasher.digest())
    return found


class Arrivals:
    """Stored frontier values of samples that are told apart by their content.

    Args:
        columns: what is stored of a sample.
        compute: from the arrays of a batch to the columns.
        make: from the shapes of one row of each input, and of each column, to where they are kept.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        compute: Callable[[Sequence[NDArray[Any]]], Arrays],
        make: Callable[[Shapes, Shapes], Contents],
    ) -> None:
        self.columns = tuple(columns)
        self._compute, self._make = compute, make
        self._contents: Contents | None = None
        self._shapes: Shapes = []
        self._width = 0
        self._epochs, self._asked, self._known = 0, 0, 0

    # -- reading ---------------------------------------------------------------------------------

    def read(
        self, batch: Sequence[NDArray[Any]], report: CacheReport, *, counted: bool = False
    ) -> tuple[Arrays, bool]:
        """The columns of these samples, `(N, ...)` each, and whether nothing had to be computed.

        The very first batch is always computed: it tells the shapes.

        Args:
            batch: one array per input of the model, `(N, ...)` each, N >= 1.
            report: what happened is counted there; telling samples apart counts as reading.
            counted: they are of a training epoch, and tell whether its samples come again.

        Raises:
            FrontierError: samples of another shape than the first; values that cannot be kept.
            StorageError: the disk refuses.
        """
        return self._values(batch, self._digests(batch, report), report, counted=counted)

    def _values(
        self,
        batch: Sequence[NDArray[Any]],
        digests: list[bytes],
        report: CacheReport,
        *,
        counted: bool = False,
    ) -> tuple[Arrays, bool]:
        """What `read` gives of samples whose digests are known."""
        began = time.perf_counter()
        values, good = self._stored(digests, report)
        report.read_s += time.perf_counter() - began
        if counted:
            self._asked += len(good)
            self._known += int(good.sum())
        missing = np.flatnonzero(~good)
        if not len(missing):
            return values, True
        fresh = self._filled(
            [array[missing] for array in batch], [digests[row] for row in missing], report,
            # Until the first sample of a later epoch comes again, nothing says that any will.
            keep=not (counted and self._epochs and not self._known),
        )  # fmt: skip
        if len(missing) == len(good):
            return fresh, False
        for array, part in zip(values, fresh, strict=True):
            array[missing] = part
        return values, False

    def digests(self, batch: Sequence[NDArray[Any]], report: CacheReport) -> list[bytes]:
        """Store these samples and say what they are called.

        Raises:
            FrontierError: there is no room for them.
        """
        found = self._digests(batch, report)
        self._values(batch, found, report)
        if self._contents is None or not all(digest in self._contents for digest in found):
            raise FrontierError(
                f"keep the frontier of more than {len(self._contents or ()):,} samples",
                found="that the room is used up",
                fix="allow more bytes, or store half as many: dtype='bfloat16'",
            )
        return found

    def stored(self, digests: Sequence[bytes], report: CacheReport) -> Arrays:
        """The columns of samples that were stored.

        Raises:
            FrontierError: some were damaged since.
        """
        began = time.perf_counter()
        values, good = self._stored(digests, report)
        report.read_s += time.perf_counter() - began
        if not good.all():
            raise FrontierError(
                "read stored values",
                found=f"{int((~good).sum())} row(s) that are damaged",
                fix="check the disk, and begin again",
            )
        return values

    def doubt(self, batch: Sequence[NDArray[Any]], report: CacheReport) -> str:
        """The name of a column that computing a batch again gives differently, or ""."""
        stored, good = self._stored(row_digests(batch), report)
        if not good.any():
            return ""
        again = self._run(batch)
        for column, kept, fresh in zip(self.columns, stored, again, strict=True):
            if not close(kept[good], fresh[good], times=ROUNDING[column.encoding]):
                return column.name
        return ""

    # -- epochs ----------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Another training epoch begins than the one in which this was made.

        Raises:
            FrontierError: next to none of the samples of the last epoch had come before.
        """
        self._epochs += 1
        asked, known = self._asked, self._known
        self._asked = self._known = 0
        if self._epochs > 1 and asked and known < _LEAST_KNOWN * asked:
            raise FrontierError(
                "use stored values again",
                found=f"{known:,} of {asked:,} samples of an epoch had come before: the data "
                "differ from epoch to epoch",
                fix="augment by random layers at the front of the model, with views=4, "
                "or train uncached: cache=False",
            )

    @property
    def is_own(self) -> bool:
        """Whether all that is stored was computed here and now."""
        return self._contents is None or self._contents.is_own

    @property
    def bytes_on_disk(self) -> int:
        """Of its stores."""
        return 0 if self._contents is None else self._contents.bytes_on_disk

    def close(self) -> None:
        """Write what waits, and close the stores."""
        if self._contents is not None:
            self._contents.close()

    # -- storing ---------------------------------------------------------------------------------

    def _digests(self, batch: Sequence[NDArray[Any]], report: CacheReport) -> list[bytes]:
        """What each sample is; raises `FrontierError` for samples of another shape."""
        began = time.perf_counter()
        shapes = [array.shape[1:] for array in batch]
        if not self._shapes:
            self._shapes = shapes
        self._width = max(self._width, len(batch[0]))
        if shapes != self._shapes:
            raise FrontierError(
                "store samples that differ in shape",
                found=f"samples of shape {shapes} where {self._shapes} began",
                fix="bring all samples to one shape, or train uncached: cache=False",
            )
        found = row_digests(batch)
        report.read_s += time.perf_counter() - began
        return found

    def _stored(
        self, digests: Sequence[bytes], report: CacheReport
    ) -> tuple[Arrays, NDArray[np.bool_]]:
        if self._contents is None:
            return [], np.zeros(len(digests), np.bool_)
        values, good = self._contents.read(digests)
        report.read_rows += int(good.sum())
        if self._contents.left:
            met = self._contents.left.intersection(
                d for d, g in zip(digests, good, strict=True) if g
            )
            report.found_rows += len(met)
            self._contents.left -= met
        return values, good

    def _filled(
        self, batch: Arrays, digests: list[bytes], report: CacheReport, *, keep: bool
    ) -> Arrays:
        """The columns of samples that are not there, as they will be read, and stored."""
        began = time.perf_counter()
        values = self._run(batch)
        report.computed_rows += len(digests)
        report.compute_s += time.perf_counter() - began
        if self._contents is None:
            self._contents = self._make(self._shapes, [array.shape[1:] for array in values])
        records = self._contents.encoded(digests, values)
        before = len(self._contents)
        if keep and not self._contents.add(digests, records):
            report.note(f"{len(self._contents):,} samples are kept; there is no room for more")
        report.filled_rows += len(self._contents) - before
        if any(column.kept != "exact" for column in self.columns):
            values = self._contents.decoded(records)
        report.fill_s += time.perf_counter() - began
        return values

    def _run(self, batch: Sequence[NDArray[Any]]) -> Arrays:
        """Run on as many samples as the largest batch had, the last one repeated: compiled once."""
        count, parts = len(batch[0]), []
        for first in range(0, count, self._width):
            rows = np.minimum(np.arange(first, first + self._width), count - 1)
            parts.append(self._compute([array[rows] for array in batch]))
        return [np.concatenate(columns)[:count] for columns in zip(*parts, strict=True)]
