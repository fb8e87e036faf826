"""A disk that counts its calls and fails, tears, lies or stops the process at the n-th."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from frostline import _io

#: What can happen at a call. "short" writes half and fails at the next call; "lying" writes half
#: and says it wrote all; "exit" ends the process as a kill does.
FAULTS = ("EIO", "ENOSPC", "short", "lying", "exit")
KILLED = 137


class QuickDisk(_io.Disk):
    """Does not wait for the hardware; for tests that never cut the power."""

    def fsync(self, fd: int) -> None:
        os.fstat(fd)


#: Calls that change the disk, or begin to.
_CHANGING = ("open", "write", "fsync", "close", "truncate", "rename", "mkdir", "unlink", "rmdir",
             "produce")  # fmt: skip


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillingDisk(QuickDisk):
    """Kills the process at the n-th call (from 0), before it is made."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in _CHANGING:
            self.left -= 1
            if self.left < 0:
                kill_now()
        return found


class FaultyDisk(QuickDisk):
    """Wraps every call; the n-th (from 0) goes wrong, and with `for_ever` all later ones."""

    def __init__(
        self, at: int | None = None, fault: str = "EIO", *, for_ever: bool = False
    ) -> None:
        self.calls: list[str] = []
        self.at, self.fault, self.for_ever = at, fault, for_ever

    def _due(self, name: str) -> bool:
        self.calls.append(name)
        now = len(self.calls) - 1
        return self.at is not None and (now == self.at or (self.for_ever and now > self.at))

    def _fail(self) -> None:
        if self.fault == "exit":
            os._exit(KILLED)
        code = errno.ENOSPC if self.fault == "ENOSPC" else errno.EIO
        raise OSError(code, os.strerror(code))

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._due(name):
            self._fail()
        return getattr(QuickDisk, name)(self, *arguments)

    def open(self, path: Path, flags: int) -> int:
        return self._call("open", path, flags)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if self._due("write"):
            half = max(1, len(data) // 2)
            if self.fault == "lying":
                os.write(fd, bytes(data)[:half])
                return len(data)
            os.write(fd, bytes(data)[:half])
            if self.fault != "short":
                self._fail()
            return half
        return super().write(fd, data)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if self._due("pwrite"):
            half = bytes(data)[: max(1, len(data) // 2)]
            os.pwrite(fd, half, offset)
            if self.fault == "lying":
                return len(data)
            if self.fault != "short":
                self._fail()
            return len(half)
        return super().pwrite(fd, data, offset)

    def allocate(self, fd: int, offset: int, size_bytes: int) -> None:
        self._call("allocate", fd, offset, size_bytes)

    def fsync(self, fd: int) -> None:
        self._call("fsync", fd)

    def close(self, fd: int) -> None:
        if self._due("close"):
            os.close(fd)  # the kernel closes the file even when it reports an error
            self._fail()
        os.close(fd)

    def truncate(self, fd: int, size_bytes: int) -> None:
        self._call("truncate", fd, size_bytes)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", source, target)

    def link(self, source: Path, target: Path) -> None:
        self._call("link", source, target)

    def mkdir(self, path: Path) -> None:
        self._call("mkdir", path)

    def unlink(self, path: Path) -> None:
        self._call("unlink", path)

    def rmdir(self, path: Path) -> None:
        self._call("rmdir", path)

    def produce(self, path: Path, write: Callable[[Path], object]) -> None:
        if self._due("produce"):
            write(path)
            target = path if path.is_file() else next(p for p in path.rglob("*") if p.is_file())
            whole = target.read_bytes()
            if self.fault == "lying":  # as long as it should be, and wrong
                target.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            else:
                target.write_bytes(whole[: len(whole) // 2])
            if self.fault not in ("short", "lying"):
                self._fail()
            return
        write(path)


@contextlib.contextmanager
def use_disk(disk: _io.Disk) -> Iterator[None]:
    """Everything Frostline writes goes through `disk` inside the block."""
    before = _io.disk
    _io.disk = disk
    try:
        yield
    finally:
        _io.disk = before


def count_calls(work: Callable[[], object]) -> int:
    """How many calls an undisturbed run of `work` makes."""
    disk = FaultyDisk()
    with use_disk(disk):
        work()
    return len(disk.calls)


def run_killed(work: Callable[[], object], at: int) -> bool:
    """Run `work` in a forked process that dies at call `at`; whether it died there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child starts no thread
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with use_disk(FaultyDisk(at, "exit")):
                work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the child failed by itself: {code}"
    return code == KILLED
