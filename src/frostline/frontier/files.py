"""Reading and writing at given places in many files, through descriptors that stay open."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostline import _io

__all__ = ["Files", "announce", "bytes_of", "read_at", "write_at"]


class Files:
    """Open files by name, each opened once for reading and once for writing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reading: dict[str, int] = {}
        self._writing: dict[str, int] = {}
        self._lock = threading.Lock()

    def readable(self, name: str) -> int | None:
        """A descriptor to read from, or None while there is no such file."""
        file = self._reading.get(name)
        if file is not None:
            return file
        with self._lock:
            if name not in self._reading:
                try:
                    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
                    self._reading[name] = os.open(self._folder / name, flags)
                except FileNotFoundError:
                    return None
            return self._reading[name]

    def writable(self, name: str) -> int:
        """A descriptor to write to; the file is made if there is none."""
        with self._lock:
            if name not in self._writing:
                self._writing[name] = _io.disk.open(self._folder / name, os.O_RDWR | os.O_CREAT)
            return self._writing[name]

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            for file in (*self._reading.values(), *self._writing.values()):
                _io.disk.close(file)
            self._reading.clear()
            self._writing.clear()


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array: a view, never a copy."""
    # `cast` refuses arrays without elements.
    return array.view(np.uint8).data.cast("B") if array.size else memoryview(b"")


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Put all of `data` from `offset` on."""
    while data:
        written = _io.disk.pwrite(file, data, offset)
        if written <= 0:
            raise OSError(errno.EIO, "the disk took no bytes")
        data, offset = data[written:], offset + written


def announce(ranges: Iterable[tuple[int | None, int, int]]) -> None:
    """Let the disk fetch many ranges at once rather than one after another.

    From a cold disk a batch arrives much sooner that way (benchmarks/results/store_reads.md);
    what is in memory already costs a fraction of a microsecond more.
    """
    if hasattr(os, "posix_fadvise"):
        for file, offset, size in ranges:
            if file is not None and size:
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)


def read_at(file: int | None, part: memoryview, offset: int) -> int:
    """Bytes read into `part`: fewer than asked for where the file ends or the disk fails."""
    done = 0
    if file is None:
        return done
    try:
        while done < len(part):
            got = os.preadv(file, [part[done:]], offset + done)
            if got == 0:
                break
            done += got
    except OSError as error:
        if error.errno != errno.EIO:  # a bad sector is damage like any other
            raise
    return done
