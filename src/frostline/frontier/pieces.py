"""How many samples of a batch the frozen part computes at a time: what takes less time.

Rows do not depend on their company, so a batch may be computed in pieces. On a processor that is
often faster: large results need memory that the system has to clear anew each time, small ones
stay in a cache. But small batches also use the arithmetic units badly. Which weighs more depends on
the model, the size of a sample and the machine, so it is measured on what is computed anyway.
"""

from __future__ import annotations

__all__ = ["Pieces"]

#: Share of the time that pieces must fall below to be used: single readings are rough.
WORTH = 0.93
#: What is tried, batch by batch. Before it one batch went whole and one piece was computed, so that
#: neither is the first of its kind.
_TRIALS = ("whole", "pieces", "whole")


class Pieces:
    """The size of pieces in which batches of one size are computed.

    Batches of other sizes, and all until `allow`, are computed whole.

    Example:
        >>> pieces = Pieces()
        >>> pieces.allow(8, whole=32)
        >>> taken = []
        >>> for _ in range(5):
        ...     taken.append(pieces.size(32))
        ...     pieces.add(32, seconds=0.5 if taken[-1] == 32 else 0.3)
        >>> taken, pieces.size(20)
        ([32, 8, 32, 8, 8], 20)
    """

    __slots__ = ("_seconds", "_size", "_whole")

    def __init__(self) -> None:
        self.forbid()

    def allow(self, size: int, *, whole: int) -> None:
        """Try pieces of this size for batches of `whole` samples: they gave the same bits."""
        self.forbid()
        if 0 < size < whole and whole % size == 0:
            self._size, self._whole = size, whole

    def forbid(self) -> None:
        """Compute batches whole."""
        self._size = self._whole = 0
        self._seconds: list[float] = []

    def size(self, samples: int) -> int:
        """How many samples of such a batch to compute at a time."""
        if samples != self._whole:
            return samples
        tried = len(self._seconds)
        if tried < len(_TRIALS):
            return self._size if _TRIALS[tried] == "pieces" else samples
        before, pieces, after = self._seconds
        return self._size if pieces < WORTH * min(before, after) else samples

    def add(self, samples: int, seconds: float) -> None:
        """Tell how long a batch took, in the size asked for."""
        if samples == self._whole and len(self._seconds) < len(_TRIALS):
            self._seconds.append(seconds)
