"""The most memory that this process used."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

__all__ = ["ResidentPeak"]


class ResidentPeak:
    """The most resident memory of the process since this was made.

    On Linux since then (the kernel's high-water mark is reset), on other systems since the start
    of the process.

    Example:
        >>> ResidentPeak().read() > 2**20
        True
    """

    def __init__(self) -> None:
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
