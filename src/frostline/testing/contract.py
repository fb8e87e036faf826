"""The failure of a contract."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["ContractBroken", "broken", "require"]


class ContractBroken(AssertionError):
    """A policy or backend does not hold its contract; the message names the rule."""


def require(holds: bool, rule: str, found: object = "") -> None:
    """Raise `ContractBroken` unless the rule holds."""
    if not holds:
        broken(rule, found)


def broken(rule: str, found: object = "") -> NoReturn:
    """Raise `ContractBroken` for this rule."""
    raise ContractBroken(f"{rule}: {found}" if found != "" else rule)
