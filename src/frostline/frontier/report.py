"""What a cache did and what it cost, counted; the same for every framework."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

__all__ = ["CacheReport"]

_log = logging.getLogger("frostline")


@dataclass(slots=True)
class CacheReport:
    """What the cache did and what it cost.

    Attributes:
        batches: batches that came to the cache.
        replayed: of these, run without the frozen part.
        found_rows: samples whose frontier earlier runs, or an earlier session, had stored.
        filled_rows: samples whose frontier was computed.
        read_rows: samples whose frontier was read from a store.
        checked: batches compared with the full forward pass.
        fill_s: seconds spent computing and writing frontiers.
        computed_rows: samples whose frontier was computed and stored, block by block.
        compute_s: of `fill_s`, seconds that the frozen part ran for them.
        find_s: seconds spent finding regions and digesting weights.
        check_s: seconds spent on comparisons.
        read_s: seconds spent reading.
        stored_bytes: bytes on disk of the stores in use.
        notes: in words: what is cached, what not, and why.
    """

    batches: int = 0
    replayed: int = 0
    found_rows: int = 0
    filled_rows: int = 0
    read_rows: int = 0
    checked: int = 0
    fill_s: float = 0.0
    computed_rows: int = 0
    compute_s: float = 0.0
    find_s: float = 0.0
    check_s: float = 0.0
    read_s: float = 0.0
    stored_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """What it brought, for people; measured, with the break-even.

        Example:
            >>> report = CacheReport(10, 10, filled_rows=32, read_rows=320, fill_s=2, read_s=0.1)
            >>> report.sentence().partition("; it ")[2]
            'paid off after 32 samples of 320'
        """
        text = f"cache: {self.replayed} of {self.batches} batches ran without the frozen part"
        if not self.filled_rows or not self.read_rows:
            return text
        each = self.fill_s / self.filled_rows
        saved = each - self.read_s / self.read_rows
        paid = "it did not pay off"
        if saved > 0 and (due := self.fill_s / saved) <= self.read_rows:
            paid = f"it paid off after {round(due):,} samples of {self.read_rows:,}"
        return (
            f"{text}; computing it once took {self.fill_s:.1f} s and reading it {self.read_s:.1f} "
            f"s, instead of {each * self.read_rows:.1f} s; {paid}"
        )

    def note(self, text: str, *, warn: bool = False) -> None:
        """Say something once; what costs the user time and can be mended is a warning."""
        if text not in self.notes:
            self.notes.append(text)
            _log.log(logging.WARNING if warn else logging.INFO, "%s", text)
