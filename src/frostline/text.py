"""How figures and foreign names are written for people, on the terminal and in reports."""

from __future__ import annotations

import unicodedata

__all__ = ["bytes_text", "count_text", "escape", "percent_text", "seconds_text"]

# Control, format (bidirectional overrides, invisible marks), half surrogates, line separators.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # spelling in several scripts, and emoji; they reorder nothing


def escape(text: object) -> str:
    r"""The text with every character that could steer a terminal written as an escape.

    Example:
        >>> print(escape("tulip\x1b[31m\u202etxt"))
        tulip\x1b[31m\u202etxt
        >>> print(escape("Gänseblümchen 🌼"))
        Gänseblümchen 🌼
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(_escaped(c) for c in shown)


def _escaped(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _UNSAFE:
        return character
    return character.encode("unicode_escape").decode("ascii")


def bytes_text(size: float) -> str:
    """A size for people.

    Example:
        >>> bytes_text(3 * 2**20)
        '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def count_text(count: int) -> str:
    """A number of parameters for people.

    Example:
        >>> count_text(4_652_008), count_text(512)
        ('4.65 M', '512')
    """
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)


def percent_text(share: float | None) -> str | None:
    """A share in [0, 1] for people; None stays None.

    Example:
        >>> percent_text(0.9731)
        '97.3 %'
    """
    return None if share is None else f"{100 * share:.1f} %"


def seconds_text(seconds: float) -> str:
    """A time for people.

    Example:
        >>> seconds_text(4.26), seconds_text(95), seconds_text(7384)
        ('4.3 s', '1 min 35 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
