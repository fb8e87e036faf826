"""Frontier values on disk: fast to read in any order, never wrong, gone at worst.

A store is a folder that holds the rows of one key. What it promises:

- a row is read as it was written, or reported absent: every read compares a checksum that is
  seeded with the store's seed, the column and the row number;
- a process may be killed, and the disk may be full, at any moment: what was written stays;
- any number of processes may read and write at once without waiting for each other, as long as
  all write the same values for the same rows (a store is a pure function of its key);
- nothing is flushed: after a power cut, rows may be gone, and are reported absent.

The format is described in `docs/cache_store.md`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from frostline import _io
from frostline.errors import DamagedFile, FrontierError, StorageError, few
from frostline.frontier.encodings import Codec, Column, Encoding
from frostline.frontier.notes import read_checked, write_once
from frostline.frontier.segments import BLOCK_ROWS, BoolArray, IntArray, Table

__all__ = ["BLOCK_ROWS", "Column", "Damage", "Encoding", "Store", "bytes_of_rows"]

_log = logging.getLogger("frostline")
_FORMAT = 1
_HEADER, _SHAPES = "store.json", "shapes.json"
#: What a budget sets aside: two small files, and the file system's own notes.
_OVERHEAD_BYTES, _OVERHEAD_SHARE = 16_384, 0.002
_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Damage:
    """What a look at every row found.

    Attributes:
        checked: rows that claimed to be there.
        damaged: numbers of those that are not what was written; they count as absent.
    """

    checked: int
    damaged: tuple[int, ...]


def bytes_of_rows(columns: Mapping[Column, Sequence[int]], rows: int) -> int:
    """The least budget that keeps so many rows.

    Args:
        columns: with the shape of one row of each; ragged ones at a length that is usual.
        rows: how many, rounded up to whole blocks.

    Example:
        >>> bytes_of_rows({Column("x", "float32"): (16,)}, 1000)
        106710
    """
    each = sum(
        Codec(column, tuple(shape)).row_bytes + (16 if column.ragged else 8)
        for column, shape in columns.items()
    )
    blocks = -(-rows // BLOCK_ROWS)
    aside = _OVERHEAD_BYTES * (1 + len(columns))
    return math.ceil((each * blocks * BLOCK_ROWS + aside) / (1 - _OVERHEAD_SHARE))


class Store:
    """Rows of fixed columns in one folder, written in blocks and read in any order.

    Args:
        folder: made if it is not there.
        columns: what a row holds.
        rows: how many there can be, >= 1.
        seed: digest of the key; rows written under another one are never believed.
        budget_bytes: the most to put on disk; None: no bound. Without ragged columns the rows
            below a limit are kept, whatever the order of writing; with them, whichever come
            first.

    Raises:
        FrontierError: the folder holds a store of other columns, rows, seed or format.
        DamagedFile: its header is not what was written: discard the folder.
        StorageError: the folder cannot be made or read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     store = Store(Path(place), [Column("x", "float32")], rows=64, seed=b"key")
        ...     _ = store.write(32, {"x": np.ones((2, 3), np.float32)})
        ...     values, ok = store.read(np.array([33, 5]))
        ...     store.close()
        >>> ok.tolist(), values["x"].tolist()
        ([True, False], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[Column],
        *,
        rows: int,
        seed: bytes,
        budget_bytes: int | None = None,
    ) -> None:
        self.folder, self.columns, self.rows = Path(folder), tuple(columns), rows
        self._check_request()
        self._header = {
            "format": _FORMAT,
            "byte_order": sys.byteorder,
            "columns": [asdict(column) for column in self.columns],
            "rows": rows,
            "block_rows": BLOCK_ROWS,
            "seed": hashlib.sha256(seed).hexdigest(),
        }
        self._budget_bytes = budget_bytes
        self._damaged = np.zeros(rows, np.bool_)
        self._tables: tuple[Table, ...] = ()
        self._closed = False
        self._open()

    def _check_request(self) -> None:
        names = [column.name for column in self.columns]
        if not names or len(set(names)) != len(names) or self.rows < 1:
            raise FrontierError(
                f"make a store of {self.rows} rows with the columns {names}",
                found="no row, no column, or a column twice",
                fix="at least one row, and columns of different names",
            )

    # -- opening ---------------------------------------------------------------------------------

    def _open(self) -> None:
        _io.make_folder(self.folder)
        with contextlib.suppress(StorageError):  # what a killed process left; not needed to go on
            _io.sweep(self.folder)
        path = self.folder / _HEADER
        if not path.exists():
            write_once(path, self._header)
        found = read_checked(path)
        if found != self._header:
            wrong = [key for key, value in self._header.items() if found.get(key) != value]
            raise FrontierError(
                f"use the store in {self.folder}",
                found=f"one of another kind: it differs in {few(sorted(wrong))}",
                fix="use another folder, or remove this one",
            )
        self._find_shapes()

    def _find_shapes(self) -> bool:
        """Take the row shapes from disk if a process has recorded them."""
        if self._tables:
            return True
        path = self.folder / _SHAPES
        if not path.exists():
            return False
        try:
            shapes = read_checked(path)["shapes"]
        except DamagedFile as error:
            # Shapes are part of every checksum: recording wrong ones loses rows, never mixes them.
            _log.warning("starting %s afresh: %s", self.folder, error.found)
            return False
        with _io.storage_errors(f"open {self.folder}"):
            self._make_tables([tuple(shape) for shape in shapes])
        return True

    def _make_tables(self, shapes: Sequence[tuple[int, ...]]) -> None:
        def seed(column: Column, shape: tuple[int, ...]) -> int:
            identity = {**self._header, "column": asdict(column), "shape": shape}
            return xxhash.xxh3_64_intdigest(_io.canonical_json(identity))

        self._tables = tuple(
            Table(self.folder, i, column, shape, self.rows, seed(column, shape))
            for i, (column, shape) in enumerate(zip(self.columns, shapes, strict=True))
        )

    # -- what is there ---------------------------------------------------------------------------

    def present(self, rows: IntArray) -> BoolArray:
        """Which rows are there, as far as known without reading them.

        Raises:
            FrontierError: a row number outside of the store.
        """
        rows = self._checked_rows(rows)
        if not self._find_shapes():
            return np.zeros(len(rows), np.bool_)
        there = ~self._damaged[rows]
        with _io.storage_errors(f"look into {self.folder}"):
            for table in self._tables:
                there &= table.present(rows)
        return there

    @property
    def damaged_rows(self) -> int:
        """Rows that were found damaged and not written again since."""
        return int(self._damaged.sum())

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that the files of this store take from the disk."""
        total = 0
        with _io.storage_errors(f"measure {self.folder}"), os.scandir(self.folder) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    total += file.stat(follow_symlinks=False).st_blocks * 512
        return total

    @property
    def budget_bytes(self) -> int | None:
        """The most that it puts on disk; None: no bound."""
        return self._budget_bytes

    @property
    def admitted_rows(self) -> int:
        """Rows below this number are kept; all of them without a budget or with ragged columns."""
        if self._budget_bytes is None or not self._tables or self._is_ragged:
            return self.rows
        row_bytes = sum(t.codec(0).row_bytes + t.entry_bytes for t in self._tables)
        blocks = int(self._usable_bytes) // (row_bytes * BLOCK_ROWS)
        return min(self.rows, blocks * BLOCK_ROWS)

    @property
    def _is_ragged(self) -> bool:
        return any(column.ragged for column in self.columns)

    @property
    def _usable_bytes(self) -> float:
        aside = _OVERHEAD_BYTES * (1 + len(self.columns))
        return max(0.0, (self._budget_bytes or 0) * (1 - _OVERHEAD_SHARE) - aside)

    # -- writing ---------------------------------------------------------------------------------

    def write(self, first: int, values: Mapping[str, NDArray[Any]]) -> bool:
        """Write one block, or write it again; whether the budget had room for it.

        Args:
            first: number of its first row, a multiple of `BLOCK_ROWS`.
            values: rows of every column, `BLOCK_ROWS` of them or fewer. The first block decides
                the shapes of all; ragged columns may differ in their second dimension.

        Raises:
            FrontierError: values that do not fit the columns or cannot be encoded.
            StorageError: the disk is full or refuses; what was there stays.
        """
        count = self._check_block(first, values)
        shapes = [values[c.name].shape[2 if c.ragged else 1 :] for c in self.columns]
        if not self._find_shapes():
            self._learn(shapes)
        for table, shape in zip(self._tables, shapes, strict=True):
            if table.shape != shape:
                raise _misfit(table.column, f"rows of shape {shape} where {table.shape} began")
        lengths = [values[c.name].shape[1] if c.ragged else 0 for c in self.columns]
        if not self._admits(first, count, lengths):
            return False
        encoded = [
            table.codec(length).encode(values[table.column.name])
            for table, length in zip(self._tables, lengths, strict=True)
        ]
        with _io.storage_errors(f"write rows {first:,} and on in {self.folder}"):
            for table, raw, length in zip(self._tables, encoded, lengths, strict=True):
                table.write(first, raw, length)
        self._damaged[first : first + count] = False
        return True

    def _check_block(self, first: int, values: Mapping[str, NDArray[Any]]) -> int:
        self._check_open()
        if set(values) != {c.name for c in self.columns}:
            raise FrontierError(
                f"write a block into {self.folder}",
                found=f"the columns {sorted(values)}",
                fix=f"exactly {sorted(c.name for c in self.columns)}",
            )
        counts = {len(values[c.name]) if values[c.name].ndim else 0 for c in self.columns}
        count = counts.pop()
        last = first + count
        if counts or first % BLOCK_ROWS or not 0 <= first < last <= self.rows or count > BLOCK_ROWS:
            raise FrontierError(
                f"write {count} rows from row {first} on into {self.folder}",
                found=f"no block of its {self.rows:,} rows, or columns of different lengths",
                fix=f"1 to {BLOCK_ROWS} rows, starting at a multiple of {BLOCK_ROWS}",
            )
        for column in self.columns:
            value = values[column.name]
            if value.dtype != column.numpy:
                raise _misfit(column, f"values of type {value.dtype}")
            if column.ragged and value.ndim < 2:
                raise _misfit(column, "single values, which have no first dimension")
        return count

    def _learn(self, shapes: Sequence[tuple[int, ...]]) -> None:
        body = {"shapes": [list(shape) for shape in shapes]}
        write_once(self.folder / _SHAPES, body)
        if not self._find_shapes():  # damaged while we looked, or for good
            raise DamagedFile(
                f"record the row shapes in {self.folder}",
                found="what was written reads back differently",
                fix="check the disk, or use another one",
            )

    def _admits(self, first: int, count: int, lengths: Sequence[int]) -> bool:
        if self._budget_bytes is None:
            return True
        if not self._is_ragged:
            return first + count <= self.admitted_rows
        if self.present(np.arange(first, first + count)).all():
            return True
        more = sum(
            count * (table.codec(length).row_bytes + table.entry_bytes)
            for table, length in zip(self._tables, lengths, strict=True)
        )
        return self.bytes_on_disk + more <= self._usable_bytes

    # -- reading ---------------------------------------------------------------------------------

    def read(
        self, rows: IntArray, *, lengths: Mapping[str, int] | None = None
    ) -> tuple[dict[str, NDArray[Any]], BoolArray]:
        """Rows in any order, repeated or not, as private copies.

        Args:
            rows: their numbers.
            lengths: by ragged column, the first dimension that every row is cut or padded with
                zeros to; a column that it does not name gets that of its longest row here.

        Returns:
            Every column as `(len(rows), ...)`, and which rows can be believed. The others are
            zero; a row that was there and is damaged is counted and absent from now on. Before
            anything was written the shapes are unknown, and all arrays are `(len(rows), 0)`.

        Raises:
            FrontierError: a row number outside of the store.
            StorageError: the files cannot be opened.
        """
        rows = self._checked_rows(rows)
        good = self.present(rows)
        if not self._tables:
            return {c.name: np.zeros((len(rows), 0), c.numpy) for c in self.columns}, good
        with _io.storage_errors(f"read {self.folder}"):
            values, fine = self._gather(rows, good, lengths or {})
            if not (fine == good).all():
                values, fine = self._look_again(rows, good & ~fine, lengths or {})
        return values, fine

    def _gather(
        self, rows: IntArray, good: BoolArray, lengths: Mapping[str, int]
    ) -> tuple[dict[str, NDArray[Any]], BoolArray]:
        values, fine = {}, good
        for table in self._tables:
            length = lengths.get(table.column.name)
            if length is None:
                length = int(table.lengths(rows)[good].max(initial=0))
            values[table.column.name], fine = table.read(rows, fine, length)
        for value in values.values() if len(values) > 1 else ():
            value[~fine] = 0  # a later column failed
        return values, fine

    def _look_again(
        self, rows: IntArray, doubtful: BoolArray, lengths: Mapping[str, int]
    ) -> tuple[dict[str, NDArray[Any]], BoolArray]:
        """Read once more with checksums fresh from disk: another process may have healed rows."""
        for table in self._tables:
            table.forget(rows[doubtful])
        good = self.present(rows)
        values, fine = self._gather(rows, good, lengths)
        lost = np.unique(rows[doubtful & ~fine])
        self._damaged[lost] = True
        if len(lost):
            _log.warning("%d damaged row(s) in %s will be computed again", len(lost), self.folder)
        return values, fine

    def verify(self) -> Damage:
        """Read every row there is, with checksums fresh from disk."""
        if not self._find_shapes():
            return Damage(0, ())
        every = np.arange(self.rows)
        for table in self._tables:
            table.forget(every)
        self._damaged[:] = False
        row_bytes = sum(t.codec(64).row_bytes for t in self._tables)
        step = max(BLOCK_ROWS, _CHUNK_BYTES // max(1, row_bytes))
        checked = 0
        for first in range(0, self.rows, step):
            rows = every[first : first + step]
            rows = rows[self.present(rows)]
            checked += len(rows)
            self.read(rows)
        return Damage(checked, tuple(np.flatnonzero(self._damaged).tolist()))

    # -- the rest --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files; no other call works after that. Stop prefetchers first."""
        if not self._closed:
            self._closed = True
            with _io.storage_errors(f"close {self.folder}"):
                for table in self._tables:
                    table.close()

    def _check_open(self) -> None:
        if self._closed:
            raise FrontierError(
                f"use the store in {self.folder}", found="it was closed", fix="open it again"
            )

    def _checked_rows(self, rows: IntArray) -> IntArray:
        self._check_open()
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 1 or (rows.size and not (rows.min() >= 0 and rows.max() < self.rows)):
            raise FrontierError(
                f"find rows in {self.folder}",
                found="a row number outside of it, or no flat list of numbers",
                fix=f"numbers from 0 to {self.rows - 1:,}",
            )
        return rows


def _misfit(column: Column, found: str) -> FrontierError:
    return FrontierError(
        f"store the column {column.name!r} ({column.dtype}{', ragged' * column.ragged})",
        found=found,
        fix="values of the type and row shape that the store was made for, samples first",
    )
