"""Rows on disk that are found by the content that they were computed from.

A row is one record: the digest of its content, then its columns, under one checksum. So a record
is whole or absent, and is only ever believed for its own content. Two processes that append to one
store at once may write over each other's rows; what is lost that way is computed again.

Records lie in order of arrival. A second store, of digests alone, says at the beginning what there
is: reading all records for that could take as long as computing them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostline.errors import StorageError
from frostline.frontier.encodings import Codec, Column
from frostline.frontier.key import CacheKey
from frostline.frontier.library import Library
from frostline.frontier.segments import BLOCK_ROWS

__all__ = ["CAPACITY", "DIGEST_BYTES", "Contents"]

#: Different samples that are kept at most.
CAPACITY = 1 << 20
DIGEST_BYTES = 16
#: The share of the free disk that is used where nobody said how many bytes may be.
DISK_SHARE = 0.5

Arrays = list[NDArray[Any]]


class Contents:
    """Records of some columns in a library, by digest.

    Args:
        library: where they are.
        key: what the values depend on, the samples themselves left out.
        columns: what a record holds.
        shapes: of one row of each column.
        about: in words.
        most_bytes: the most that records may take; None: half of what the disk has free.
        capacity: records at most.

    Raises:
        StorageError: the disk refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     key, columns = CacheKey({"weights": {}}), [Column("x", "float32")]
        ...     contents = Contents(Library(place), key, columns, [(2,)], about={})
        ...     records = contents.encoded([bytes(16)], [np.ones((1, 2), np.float32)])
        ...     _ = contents.add([bytes(16)], records)
        ...     (values,), good = contents.read([bytes(16), b"1" * 16])
        ...     contents.close()
        >>> values.tolist(), good.tolist()
        ([[1.0, 1.0], [0.0, 0.0]], [True, False])
    """

    def __init__(
        self,
        library: Library,
        key: CacheKey,
        columns: Sequence[Column],
        shapes: Sequence[tuple[int, ...]],
        *,
        about: Mapping[str, Any],
        most_bytes: int | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        self._codecs = [Codec(c, tuple(s)) for c, s in zip(columns, shapes, strict=True)]
        self.record_bytes = DIGEST_BYTES + sum(codec.row_bytes for codec in self._codecs)
        parts = [CacheKey({**key.parts, "part": part}) for part in ("records", "digests")]
        self._stack = contextlib.ExitStack()
        self._records, self._digests = (
            library.open(part, [Column("bytes", "uint8")], capacity, about=about) for part in parts
        )
        self._stack.callback(self._records.close)
        self._stack.callback(self._digests.close)
        free_bytes = shutil.disk_usage(self._records.folder).free
        most_bytes = int(free_bytes * DISK_SHARE) if most_bytes is None else most_bytes
        self.most_rows = min(capacity, most_bytes // self.record_bytes)
        self._rows: dict[bytes, int] = {}
        self._load(capacity)
        #: Digests of records that earlier sessions left, and nobody has asked for so far.
        self.left = set(self._rows)
        #: Whether nothing was there at the beginning.
        self.is_own = not self.left
        # Records from here on are in memory, those before on disk.
        self._start = (max(self._rows.values(), default=-1) // BLOCK_ROWS + 1) * BLOCK_ROWS
        self._waiting: list[tuple[bytes, NDArray[np.uint8]]] = []

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def encoded(self, digests: Sequence[bytes], values: Arrays) -> NDArray[np.uint8]:
        """Records `(N, record_bytes)`.

        Raises:
            FrontierError: a value that the encoding of its column cannot hold.
        """
        heads = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), DIGEST_BYTES)
        parts = [codec.encode(array) for codec, array in zip(self._codecs, values, strict=True)]
        return np.concatenate([heads, *parts], axis=1)

    def decoded(self, records: NDArray[np.uint8]) -> Arrays:
        """The columns of records, `(N, *shape)` each."""
        found, start = [], DIGEST_BYTES
        for codec in self._codecs:
            raw = np.ascontiguousarray(records[:, start : start + codec.row_bytes])
            out = np.empty((len(records), *codec.shape), codec.column.numpy)
            codec.decode(raw, out)
            found.append(out)
            start += codec.row_bytes
        return found

    def add(self, digests: Sequence[bytes], records: NDArray[np.uint8]) -> bool:
        """Keep records, those that are there already left out; whether there was room.

        Raises:
            StorageError: the disk refuses.
        """
        for digest, record in zip(digests, records, strict=True):
            if digest in self._rows:
                continue
            number = self._start + len(self._waiting)
            if number >= self.most_rows:
                return False
            self._rows[digest] = number
            self._waiting.append((digest, record.copy()))
            if len(self._waiting) == BLOCK_ROWS:
                self._write()
        return True

    def read(self, digests: Sequence[bytes]) -> tuple[Arrays, NDArray[np.bool_]]:
        """The columns of these contents, `(N, *shape)` each, and which of them are there.

        Records that do not hold what they should are forgotten.
        """
        numbers = np.array([self._rows.get(digest, -1) for digest in digests], np.int64)
        records = np.zeros((len(digests), self.record_bytes), np.uint8)
        good = numbers >= self._start
        for row in np.flatnonzero(good):
            records[row] = self._waiting[numbers[row] - self._start][1]
        stored = np.flatnonzero((numbers >= 0) & ~good)
        if len(stored):
            values, fine = self._records.read(numbers[stored])
            if values["bytes"].shape[1] == self.record_bytes:
                records[stored], good[stored] = values["bytes"], fine
        heads = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), DIGEST_BYTES)
        good &= (records[:, :DIGEST_BYTES] == heads).all(axis=1)
        for row in stored[~good[stored]]:
            self._rows.pop(digests[row], None)
        return self.decoded(records), good

    @property
    def bytes_on_disk(self) -> int:
        """Of both stores."""
        return self._records.bytes_on_disk + self._digests.bytes_on_disk

    def close(self) -> None:
        """Write what waits, and close the stores."""
        with contextlib.suppress(StorageError):  # what is not written is computed again
            if self._waiting:
                self._write()
        self._stack.close()

    def _load(self, capacity: int) -> None:
        """Find out what earlier sessions left."""
        there = np.flatnonzero(self._digests.present(np.arange(capacity)))
        if not len(there):
            return
        values, good = self._digests.read(there)
        for number, raw in zip(there[good].tolist(), values["bytes"][good], strict=True):
            self._rows[raw.tobytes()] = number

    def _write(self) -> None:
        """Put the records that wait, a block, into the store."""
        block, start = self._waiting, self._start
        self._waiting, self._start = [], start + BLOCK_ROWS
        try:
            self._records.write(start, {"bytes": np.stack([record for _, record in block])})
            heads = [np.frombuffer(digest, np.uint8) for digest, _ in block]
            self._digests.write(start, {"bytes": np.stack(heads)})
        except BaseException:
            for digest, _ in block:
                self._rows.pop(digest, None)
            raise
