"""What a run borrows from its process and gives back: random streams, threads, Ctrl-C, memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

import torch

from frostline.backends.torch.random_state import read_random_state, write_random_state
from frostline.errors import ConfigError
from frostline.memory import ResidentPeak, keeping_freed, leaving_old_objects

__all__ = ["Interrupt", "PeakMemory", "borrowed_process", "pick_device"]


def pick_device(name: str) -> torch.device:
    """The device of a run: "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: no such device here.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run on the device {name!r}",
            found=str(error).splitlines()[0],
            fix="'auto', or a device this build of torch has, such as 'cpu'",
        ) from error


@contextlib.contextmanager
def borrowed_process(threads: int | None) -> Iterator[None]:
    """With this many threads, and no pauses of allocator and collector; then all is as before."""
    before, states = torch.get_num_threads(), read_random_state()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with keeping_freed(), leaving_old_objects():
            yield
    finally:
        torch.set_num_threads(before)
        write_random_state(states)


@dataclass(slots=True)
class Interrupt:
    """Turns Ctrl-C into a stop at the next safe place; a second one stops at once.

    A context manager. Outside the main thread it does nothing, as there is no Ctrl-C there.
    """

    asked: bool = False
    _before: Any = None
    _installed: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            # None: a handler that was not set from Python, and cannot be put back from it.
            signal.signal(signal.SIGINT, self._before or signal.default_int_handler)
            self._installed = False

    def check(self) -> None:
        """Raise `KeyboardInterrupt` when Ctrl-C came since the last call."""
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class PeakMemory:
    """The largest memory in use since it was made.

    On CUDA the most that torch had allocated on the device, elsewhere the most resident memory of
    the process.

    Args:
        device: the device the run uses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resident = None if device.type == "cuda" else ResidentPeak()
        if self._resident is None:
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> int:
        """Bytes."""
        if self._resident is None:
            return torch.cuda.max_memory_allocated(self._device)
        return self._resident.read()
