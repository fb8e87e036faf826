"""Memory of this process: the most it used, what becomes of what it frees, and its collector."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["ResidentPeak", "give_back_freed", "keeping_freed", "leaving_old_objects"]

#: Of the GNU C library's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
#: Its default, and the thresholds that it comes to by itself with large blocks: these cannot be
#: asked for, so they are what is set when nothing is to be kept any more.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
#: Single blocks of more than this many bytes are returned at once in any case.
_LARGEST_KEPT_BYTES = 1 << 30
_CHOSEN_BY_USER = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
_lock = threading.Lock()
_keepers = 0


class ResidentPeak:
    """The most resident memory of the process since this was made.

    On Linux since then (the kernel's high-water mark is reset), on other systems since the start
    of the process.

    Example:
        >>> ResidentPeak().read() > 2**20
        True
    """

    def __init__(self) -> None:
        give_back_freed()
        with contextlib.suppress(OSError):  # absent outside Linux, forbidden in some sandboxes
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes."""
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))
        import resource  # noqa: PLC0415  absent on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def give_back_freed() -> None:
    """Ask the C library to return freed memory to the system; without effect where it cannot.

    Example:
        >>> give_back_freed()
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def keeping_freed() -> Iterator[bool]:
    """Inside, memory that this process frees stays with it, for what it needs next.

    Each training step frees its activations and needs as much again. By default the GNU C library
    returns blocks of this size to the system, or does not, depending on what happens to lie behind
    them, and the system has to clear every page before it gives it out again: on a processor a step
    of the same network takes up to twice as long in one process as in another. The peak of
    memory stays about the same. When the last of these blocks ends, what was kept is given back.

    Yields:
        whether anything was changed: not on other systems, and not where the environment already
        says what the allocator should do.

    Example:
        >>> with keeping_freed() as kept:
        ...     isinstance(kept, bool)
        True
    """
    global _keepers  # noqa: PLW0603 - the allocator is the process's, too
    mallopt = _mallopt()
    if mallopt is None:
        yield False
        return
    with _lock:
        _keepers += 1
        mallopt(_TRIM_THRESHOLD, -1)
        if not mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES):  # before glibc 2.35
            mallopt(_MMAP_MAX, 0)
    try:
        yield True
    finally:
        with _lock:
            _keepers -= 1
            if not _keepers:
                for setting, value in _USUAL.items():
                    mallopt(setting, value)
                give_back_freed()


def _mallopt() -> Callable[[int, int], int] | None:
    if any(name.startswith(_CHOSEN_BY_USER) for name in os.environ):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc.mallopt if hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # Windows
        return None


@contextlib.contextmanager
def leaving_old_objects() -> Iterator[None]:
    """Inside, Python's collector of cycles looks only at objects that are made inside.

    With a framework imported there are some millions of others, and going through them takes a
    third of a second, at moments that nobody chose: often enough while something is measured. At
    the end what was made inside is collected, so that nothing waits there for the next run.

    Nothing is changed where the collector is off, or was told already which objects to leave.

    Example:
        >>> with leaving_old_objects():
        ...     gc.get_freeze_count() > 0
        True
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
