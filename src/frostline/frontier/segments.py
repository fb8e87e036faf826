"""The files of one column: segments of fixed-size rows, and one array of checksums.

A row lies where its number (and, if ragged, its length) says; nothing is looked up and nothing
moves. Writers put the data first and the checksum after it; readers take no lock, copy the data
out and believe it only if the copy has that checksum. Files grow, are never cut and never
replaced, and are read by `pread`: a file that somebody else cut short gives a short read here,
where a map would end the process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from frostline import _io
from frostline.frontier.encodings import Codec, Column
from frostline.frontier.files import Files, announce, bytes_of, read_at, write_at

__all__ = ["BLOCK_ROWS", "BoolArray", "IntArray", "Table"]

#: Rows that are computed and written together; a block starts at a multiple of this.
BLOCK_ROWS = 32
#: The most one file holds, unless a single block is larger.
SEGMENT_BYTES = 1 << 30
#: A column of no more than this on disk is kept in memory row by row as it is read.
KEPT_BYTES = 64 << 20
#: Checksums are fetched this many at a time.
_PAGE_ROWS = 512
#: And so many when a store is opened.
_FIRST_ROWS = 1 << 16
#: Rows side by side are read in pieces of about this size, which stay in the processor's cache.
_RUN_BYTES = 1 << 18
#: Odd, so that different numbers and lengths give different seeds.
_ROW, _LENGTH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)

IntArray: TypeAlias = NDArray[np.integer[Any]]
BoolArray: TypeAlias = NDArray[np.bool_]


class Table:
    """One column of a store on disk.

    Args:
        folder: where its files are.
        number: of the column in its store; the files are named by it.
        column: what is stored.
        shape: of one row; of a ragged column without the first dimension.
        rows: how many there can be.
        seed: mixed into every checksum.
    """

    def __init__(
        self, folder: Path, number: int, column: Column, shape: Sequence[int], rows: int, seed: int
    ) -> None:
        self.column, self.shape = column, tuple(shape)
        self._folder, self._name, self._rows = folder, f"{number:03d}", rows
        self._seed = np.uint64(seed)
        self._files = Files(folder)
        # Rows of a small column that were read once, and are right: no need to read them again.
        small = not column.ragged and rows * self._codec(0).row_bytes <= KEPT_BYTES
        self._kept = np.empty((rows, self._codec(0).row_bytes if small else 0), np.uint8)
        self._is_kept = np.zeros(rows if small else 0, np.bool_)
        self._sums = np.zeros(rows, np.uint64)
        self._lengths = np.zeros(rows if column.ragged else 0, np.uint32)
        self._entry = np.dtype([("sum", "<u8")] + [("length", "<u8")] * column.ragged)
        self.codec = functools.cache(self._codec)
        # What is there by now, in a few large reads; later looks are for what others add.
        self._fetch(np.arange(0, rows, _FIRST_ROWS), _FIRST_ROWS)

    def _codec(self, length: int) -> Codec:
        return Codec(self.column, (length, *self.shape) if self.column.ragged else self.shape)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one row's checksum (and length)."""
        return self._entry.itemsize

    # -- where things are ------------------------------------------------------------------------

    def _places(self, rows: IntArray, length: int) -> _Places:
        """Where rows of this length lie.

        Blocks of a ragged column are spaced for the next power of two of their length, in files
        of their own: what lies between them is never written and takes no room.
        """
        rung = max(0, length - 1).bit_length() if self.column.ragged else 0
        size, slot = self.codec(length).row_bytes, BLOCK_ROWS * self.codec(1 << rung).row_bytes
        blocks, inner = np.divmod(rows, BLOCK_ROWS)
        segments, places = np.divmod(blocks, max(1, SEGMENT_BYTES // max(1, slot)))
        return _Places(f"{self._name}-{rung:02d}", size, segments, places * slot + inner * size)

    # -- checksums -------------------------------------------------------------------------------

    def _seeds(self, rows: IntArray, lengths: IntArray | int) -> NDArray[np.uint64]:
        """One per row: the same bytes under another number or length have another checksum."""
        numbers = rows.astype(np.uint64)
        numbers *= _ROW
        numbers += self._seed
        if self.column.ragged:
            numbers += np.asarray(lengths).astype(np.uint64) * _LENGTH
        return numbers

    def present(self, rows: IntArray) -> BoolArray:
        """Which rows have a checksum; whether it matches is known when they are read."""
        known = self._sums[rows] != 0
        if not known.all():
            self._fetch(rows[~known])
            known = self._sums[rows] != 0
        return known

    def lengths(self, rows: IntArray) -> IntArray:
        """First dimension of each row; 0 for absent ones and for columns that are not ragged."""
        if not self.column.ragged:
            return np.zeros(len(rows), np.int64)
        self.present(rows)
        return self._lengths[rows].astype(np.int64)

    def _fetch(self, rows: IntArray, page_rows: int = _PAGE_ROWS) -> None:
        """Take the checksums around these rows from disk."""
        file = self._files.readable(f"{self._name}.sums")
        if file is None:
            return
        for page in np.unique(rows // page_rows).tolist():
            first = page * page_rows
            count = min(page_rows, self._rows - first)
            raw = os.pread(file, count * self.entry_bytes, first * self.entry_bytes)
            found = np.frombuffer(raw, self._entry, len(raw) // self.entry_bytes)
            self._take(first, found)

    def _take(self, first: int, found: NDArray[Any]) -> None:
        there = found["sum"] != 0
        numbers = np.arange(first, first + len(found))
        if self.column.ragged:
            lengths = found["length"] & np.uint64(0xFFFFFFFF)
            # A damaged length must not lead anywhere; under another one the checksum fails.
            lengths[found["length"] != self._sealed(numbers, lengths)] = 0
            self._lengths[numbers[there]] = lengths[there]
        self._sums[numbers[there]] = found["sum"][there]

    def _sealed(self, rows: IntArray, lengths: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Lengths as they are stored: 32 bits, and 32 that show a changed bit."""
        high = _mix(self._seeds(rows, lengths)) >> np.uint64(32)
        return lengths | (high << np.uint64(32))

    # -- writing and reading ---------------------------------------------------------------------

    def write(self, first: int, raw: NDArray[np.uint8], length: int) -> None:
        """Put encoded rows from row `first` on, then their checksums."""
        rows = np.arange(first, first + len(raw))
        places = self._places(rows[:1], length)
        data = bytes_of(np.ascontiguousarray(raw))
        if data.nbytes:
            offset = int(places.offsets[0])
            file = self._files.writable(places.name(int(places.segments[0])))
            _io.disk.allocate(file, offset, data.nbytes)
            write_at(file, data, offset)
        entries = np.zeros(len(raw), self._entry)
        seeds = self._seeds(rows, length).tolist()
        entries["sum"] = _checksums(data, raw.shape[1], seeds)
        if self.column.ragged:
            entries["length"] = self._sealed(rows, np.full(len(rows), length, np.uint64))
        file = self._files.writable(f"{self._name}.sums")
        write_at(file, bytes_of(entries), first * self.entry_bytes)
        self._take(first, entries)

    def read(
        self, rows: IntArray, wanted: BoolArray, length: int
    ) -> tuple[NDArray[Any], BoolArray]:
        """Rows, each cut or padded with zeros to `length`, and which of them can be believed.

        Rows that are not wanted or cannot be believed are zero.
        """
        out = np.empty((len(rows), *self.codec(length).shape), self.column.numpy)
        good = wanted.copy()
        if not self.column.ragged:
            self._read_equal(rows, wanted, 0, out, good)
        else:
            lengths = self.lengths(rows)
            for size in np.unique(lengths[wanted]).tolist():
                self._read_equal(rows, wanted & (lengths == size), size, out, good)
        if not good.all():
            out[~good] = 0
        return out, good

    def _read_equal(
        self, rows: IntArray, chosen: BoolArray, length: int, out: NDArray[Any], good: BoolArray
    ) -> None:
        """Read the chosen rows, all of one length; those that fail are taken out of `good`."""
        codec = self.codec(length)
        straight = self.column.kept == "exact" and codec.shape == out.shape[1:]
        where = np.flatnonzero(chosen)
        if not len(where):
            return
        whole = straight and len(where) == len(rows)
        raw = np.empty((len(where), codec.row_bytes), np.uint8)
        if whole:
            raw = out.reshape(len(rows), -1).view(np.uint8).reshape(len(rows), -1)
        fine = self._pull(rows[where], length, raw)
        good[where[~fine]] = False
        if whole:
            return
        where, raw = (where, raw) if fine.all() else (where[fine], raw[fine])
        if codec.shape == out.shape[1:] and len(where) == len(out):
            codec.decode(raw, out)
            return
        rows_out = np.empty((len(where), *codec.shape), self.column.numpy)
        codec.decode(raw, rows_out)
        if not self.column.ragged:
            out[where] = rows_out
            return
        kept = min(length, out.shape[1])
        out[where, :kept] = rows_out[:, :kept]
        out[where, kept:] = 0

    def _pull(self, rows: IntArray, length: int, raw: NDArray[np.uint8]) -> BoolArray:
        """Fill `raw` with the bytes of these rows; whether each has its checksum."""
        if not len(self._is_kept):
            return self._load(rows, length, raw)
        if self._is_kept[rows].all():
            np.take(self._kept, rows, axis=0, out=raw)
            return np.ones(len(rows), np.bool_)
        fine = self._load(rows, length, raw)
        self._kept[rows[fine]] = raw[fine]
        self._is_kept[rows[fine]] = True
        return fine

    def _load(self, rows: IntArray, length: int, raw: NDArray[np.uint8]) -> BoolArray:
        """`_pull` from disk."""
        places = self._places(rows, length)
        seeds = self._seeds(rows, length).tolist()
        flat, size, sums = bytes_of(raw), places.size, [0] * len(rows)
        runs = [
            (self._files.readable(places.name(segment)), start, stop, offset)
            for start, stop, segment, offset in places.runs()
        ]
        if len(runs) > 1:
            announce((file, offset, (stop - start) * size) for file, start, stop, offset in runs)
        for file, start, stop, offset in runs:
            part = flat[start * size : stop * size]
            got = read_at(file, part, offset)
            whole = stop if got == len(part) else start + got // size
            # Right after the copy, while it is still near the processor.
            sums[start:whole] = _checksums(part, size, seeds[start:whole])
        found = np.array(sums, np.uint64)
        return (found == self._sums[rows]) & (found != 0)

    def forget(self, rows: IntArray) -> None:
        """Drop what is remembered of these rows: the next look goes to the disk."""
        self._sums[rows] = 0
        if len(self._is_kept):
            self._is_kept[rows] = False

    def close(self) -> None:
        """Close all files."""
        self._files.close()


@dataclass(frozen=True)
class _Places:
    """Where some rows lie: one file per segment, an offset per row, `size` bytes each."""

    stem: str
    size: int
    segments: IntArray
    offsets: IntArray

    def name(self, segment: int) -> str:
        return f"{self.stem}-{segment:06d}.rows"

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """Start, stop, segment and offset of stretches that lie side by side, in this order."""
        segments, offsets = self.segments.tolist(), self.offsets.tolist()
        most, start = max(1, _RUN_BYTES // max(1, self.size)), 0
        for i in range(1, len(offsets) + 1):
            if (
                i < len(offsets)
                and offsets[i] == offsets[i - 1] + self.size
                and segments[i] == segments[i - 1]
                and i - start < most
            ):
                continue
            yield start, i, segments[start], offsets[start]
            start = i


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread 64 bits over 64 bits, one to one (the finalizer of splitmix64)."""
    x = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _checksums(data: memoryview, size: int, seeds: Sequence[int]) -> list[int]:
    digest = xxhash.xxh3_64_intdigest
    if len(seeds) == 1:
        return [digest(data[:size], seeds[0]) or 1]
    rows = range(0, len(seeds) * size, size) if size else [0] * len(seeds)
    # 0 says absent.
    return [digest(data[i : i + size], seed) or 1 for i, seed in zip(rows, seeds, strict=True)]
