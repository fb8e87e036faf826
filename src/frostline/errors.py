"""Every error Frostline raises on purpose, in one tree.

::

    FrostlineError
    ├── UsageError                   what was asked for cannot be (exit code 2)
    │   ├── DurationError            a duration that cannot be read or resolved
    │   ├── SelectorError            a selector that cannot be read
    │   │   └── SelectorMatchedNothing
    │   ├── PolicyError              unknown policy, bad option, missing need
    │   ├── PlanError                unknown group, or nothing left to train
    │   ├── ConfigError              unknown key, wrong type, contradiction
    │   └── MissingExtra             an optional dependency is absent
    ├── ModelError                   a model or weight file cannot be used (exit code 1)
    ├── DataError                    a data set or a sample cannot be used
    ├── BackendError                 the framework refused, or a contract was broken
    ├── FrontierError                a frozen region cannot be found, stored or replayed
    ├── TrainingError                training cannot go on
    │   ├── NonFiniteLoss
    │   └── FrozenTensorChanged      a frozen tensor is no longer what it was
    └── StorageError                 disk full, damaged or foreign file
        └── DamagedFile

Each message has three parts: what was asked, what was found, what would work.

Example:
    >>> from frostline.errors import DurationError
    >>> print(DurationError("read the duration '3'", found="no unit", fix="write '3ep'"))
    cannot read the duration '3'
      found: no unit
      try:   write '3ep'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "BackendError",
    "ConfigError",
    "DamagedFile",
    "DataError",
    "DurationError",
    "FrontierError",
    "FrostlineError",
    "FrozenTensorChanged",
    "MissingExtra",
    "ModelError",
    "NonFiniteLoss",
    "PlanError",
    "PolicyError",
    "SelectorError",
    "SelectorMatchedNothing",
    "StorageError",
    "TrainingError",
    "UsageError",
]


class FrostlineError(Exception):
    """Root of the tree: what was asked, what was found, what would work.

    Args:
        asked: a verb phrase that completes "cannot ...".
        found: what was there instead.
        fix: what the reader can do next; omitted only when nothing can be done.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, asked: str, *, found: str, fix: str = "") -> None:
        self.asked = asked
        self.found = found
        self.fix = fix
        super().__init__(asked, found, fix)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # Exceptions are rebuilt from `args`; ours take keywords (worker processes send them back).
        return (_rebuild, (type(self), self.asked, self.found, self.fix))

    def __str__(self) -> str:
        lines = [f"cannot {self.asked}", f"  found: {self.found}"]
        if self.fix:
            lines.append(f"  try:   {self.fix}")
        return "\n".join(lines)


def _rebuild(kind: type[FrostlineError], asked: str, found: str, fix: str) -> FrostlineError:
    return kind(asked, found=found, fix=fix)


def few(names: Sequence[str], *, most: int = 3) -> str:
    """Names for a message: the first ones, and how many more there are.

    Example:
        >>> few(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class UsageError(FrostlineError):
    """What was asked for cannot be."""

    exit_code = 2


class DurationError(UsageError):
    """A duration that cannot be read, or not resolved against this run's totals."""


class SelectorError(UsageError):
    """A selector that cannot be read."""


class SelectorMatchedNothing(SelectorError):
    """A selector that reads well and matches no parameter of this model."""


class PolicyError(UsageError):
    """An unknown policy, a bad option, or a need of the policy that is not met."""


class PlanError(UsageError):
    """A plan that names unknown groups or leaves nothing to train."""


class ConfigError(UsageError):
    """An unknown key, a wrong type or a contradiction in a configuration."""


class MissingExtra(UsageError):
    """An optional dependency is absent; the message holds the line that installs it."""


class ModelError(FrostlineError):
    """A model or weight file cannot be found, read or fitted to the task."""


class DataError(FrostlineError):
    """A data set, split or sample cannot be used."""


class BackendError(FrostlineError):
    """The framework refused a request, or a backend broke its contract."""


class FrontierError(FrostlineError):
    """The frozen region of a model cannot be found, stored or replayed."""


class TrainingError(FrostlineError):
    """Training cannot go on."""


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite."""


class FrozenTensorChanged(TrainingError):
    """A tensor that the plan froze no longer holds the bits it was frozen with."""


class StorageError(FrostlineError):
    """A file cannot be written or read: no space, no permission, wrong kind."""


class DamagedFile(StorageError):
    """A file of ours does not match its recorded size or digest."""
