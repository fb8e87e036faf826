"""Whether the cache saves time, by the clock: what computing a sample took, what reading it takes.

Before a region is used its gain is counted in arithmetic, which is the same on each run. The clock
has the last word: disks, checksums and Python are not in the count.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Balance"]

#: Readings before the clock is believed: single ones wait for disks and other processes.
ENOUGH_READINGS = 50


@dataclass(slots=True)
class Balance:
    """Seconds and samples of both ways to one frontier.

    Attributes:
        computed: samples computed, in whole blocks.
        computed_s: seconds that took; with loading them, where a stored sample is not loaded.
        read: samples read.
        read_s: seconds that the model waited for them.
        readings: batches in which they were read.

    Example:
        >>> balance = Balance(computed=100, computed_s=0.1)
        >>> for _ in range(50):
        ...     balance.add_read(8, 0.004)
        >>> round(balance.saved_s, 6), balance.loss
        (0.0005, None)
        >>> balance.add_read(8, 0.4)
        >>> balance.loss
        'reading a stored sample takes 1.47 ms, computing it takes 1 ms'
    """

    computed: int = 0
    computed_s: float = 0.0
    read: int = 0
    read_s: float = 0.0
    readings: int = 0

    def add_computed(self, samples: int, seconds: float) -> None:
        """Count samples that were computed."""
        self.computed += samples
        self.computed_s += seconds

    def add_read(self, samples: int, seconds: float) -> None:
        """Count a batch that was read."""
        self.read += samples
        self.read_s += seconds
        self.readings += 1

    @property
    def saved_s(self) -> float | None:
        """Seconds saved by each sample that is read; None while one of the two is not known."""
        if not self.computed or not self.read:
            return None
        return self.computed_s / self.computed - self.read_s / self.read

    @property
    def loss(self) -> str | None:
        """Why not to read, in words; None where reading saves time, or too little is known."""
        if self.readings < ENOUGH_READINGS or (saved := self.saved_s) is None or saved > 0:
            return None
        computing, reading = self.computed_s / self.computed, self.read_s / self.read
        return (
            f"reading a stored sample takes {1000 * reading:.3g} ms, "
            f"computing it takes {1000 * computing:.3g} ms"
        )
