"""What a run costs, added up over all its sessions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from frostline.driver import Driver
from frostline.tasks.resources import PeakMemory

__all__ = ["CostMeter"]

_DRIVER = ("policy_s", "signals_s", "apply_s", "digest_s")


@dataclass(slots=True)
class CostMeter:
    """Seconds and bytes from the moment it is made, on top of what earlier sessions cost.

    Work that was lost with a killed session (after its last checkpoint) is not in it.

    Args:
        device: what the run trains on.

    Attributes:
        carried: costs of earlier sessions, as `read` gave them.
    """

    device: torch.device
    carried: Mapping[str, Any] = field(default_factory=dict)
    _started: float = field(init=False, default_factory=time.perf_counter)
    _peak: PeakMemory = field(init=False)

    def __post_init__(self) -> None:
        self._peak = PeakMemory(self.device)

    @property
    def wall_s(self) -> float:
        """Seconds, everything charged."""
        return self.carried.get("wall_s", 0.0) + time.perf_counter() - self._started

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that any session used."""
        return max(int(self.carried.get("peak_memory_bytes", 0)), self._peak.read())

    def keep(self, peak_bytes: int = 0) -> None:
        """Remember the peak of memory so far, where something is about to start it afresh.

        Args:
            peak_bytes: another one, to be remembered if it is larger.
        """
        peak = max(self.peak_memory_bytes, peak_bytes)
        self.carried = {**self.carried, "peak_memory_bytes": peak}

    def read(
        self, driver: Driver, *, measure_s: float, first_look_s: float = 0.0
    ) -> dict[str, Any]:
        """All costs so far, by name; `signal_s` holds the seconds of each signal by its name.

        Args:
            driver: of this session; its own costs are listed by purpose.
            measure_s: seconds this session spent on measuring the layer groups.
            first_look_s: seconds it spent on probing the data, solving the head and foretelling
                costs.
        """
        session = {name: getattr(driver.costs, name) for name in _DRIVER}
        session |= {"measure_s": measure_s, "first_look_s": first_look_s}
        summed = {name: self.carried.get(name, 0.0) + s for name, s in session.items()}
        before, now = self.carried.get("signal_s", {}), driver.costs.signal_s
        return summed | {
            "signal_s": {n: before.get(n, 0.0) + now.get(n, 0.0) for n in sorted({*before, *now})},
            "widened_steps": driver.costs.widened_steps,  # the driver counts through all sessions
            "wall_s": self.wall_s,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
