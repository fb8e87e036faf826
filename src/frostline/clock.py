"""Time in training: how far a run is (`Progress`) and how long something lasts (`Duration`).

A step is one optimizer update, however many micro-batches it accumulates. All arithmetic is
exact (integers and fractions), so a boundary falls on the same step in every process and after
every resume.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction

from frostline.errors import DurationError

__all__ = ["Duration", "Progress"]

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(st|ep|%)\s*", re.ASCII)
_UNITS = "'st' (optimizer steps), 'ep' (epochs) or '%' (of the whole run)"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer updates completed so far, >= 0.
        total_steps: updates the whole run will make, or None when unknown.
        steps_per_epoch: updates in one pass over the training data, or None when unknown.
        spent_s: seconds of training and validation so far, or None where nobody counts them.

    Example:
        >>> Progress(step=25, total_steps=100, steps_per_epoch=10).epoch
        2
    """

    step: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    spent_s: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("total_steps", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DurationError(
                    f"count progress with {name}={value}",
                    found="fewer than one step",
                    fix="give a positive number, or None when it is unknown",
                )
        if self.step < 0:
            raise DurationError(
                f"count progress from step {self.step}",
                found="a negative step",
                fix="steps count from 0",
            )

    @property
    def epoch(self) -> int:
        """Whole epochs completed (0 while `steps_per_epoch` is unknown)."""
        return self.step // self.steps_per_epoch if self.steps_per_epoch else 0

    @property
    def fraction(self) -> float | None:
        """Share of the run completed, in [0, 1], or None when the total is unknown."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else None

    @property
    def remaining_steps(self) -> int | None:
        """Updates still to make, or None when the total is unknown."""
        return None if self.total_steps is None else max(0, self.total_steps - self.step)

    def reached(self, duration: Duration) -> bool:
        """Whether at least `duration` has passed since the start.

        Example:
            >>> Progress(step=20, steps_per_epoch=10).reached(Duration.parse("2ep"))
            True
        """
        return self.step >= duration.steps(self)

    def since(self, step: int) -> Progress:
        """The same moment on a clock that started at `step`: how `then` rebases a policy.

        Example:
            >>> Progress(step=30, total_steps=100).since(20)
            Progress(step=10, total_steps=80, steps_per_epoch=None)
        """
        total = None if self.total_steps is None else max(1, self.total_steps - step)
        return replace(self, step=self.step - step, total_steps=total)


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training with its unit: "500st", "2ep", "0.5ep", "30%".

    Attributes:
        value: exact amount, >= 0.
        unit: "st" optimizer steps, "ep" epochs, "%" percent of the whole run.
    """

    value: Fraction
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in ("st", "ep", "%"):
            raise DurationError(f"use the unit {self.unit!r}", found="no such unit", fix=_UNITS)
        if self.value < 0:
            raise DurationError(f"use {self.value} {self.unit}", found="a negative length")
        if self.unit == "st" and self.value.denominator != 1:
            raise DurationError(f"use {self}", found="part of a step", fix="whole steps: '3st'")

    @classmethod
    def parse(cls, text: str | Duration) -> Duration:
        """Read "500st", "2ep" or "30%"; a `Duration` is returned as it is.

        Raises:
            DurationError: no unit (bare numbers are refused: steps or epochs?), or unreadable.

        Example:
            >>> str(Duration.parse("2 ep"))
            '2ep'
        """
        if isinstance(text, Duration):
            return text
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise DurationError(
                f"read the duration {text!r}",
                found="a bare number" if str(text).strip().isdigit() else "an unknown form",
                fix=f"a number with a unit, {_UNITS}: '500st', '2ep', '30%'",
            )
        return cls(Fraction(match[1]), match[2])

    def steps(self, progress: Progress) -> int:
        """Length in optimizer steps for a run with these totals, rounded up.

        Raises:
            DurationError: the total that this unit needs is unknown.

        Example:
            >>> Duration.parse("30%").steps(Progress(total_steps=10))
            3
        """
        if self.unit == "st":
            return int(self.value)
        scale = progress.steps_per_epoch if self.unit == "ep" else progress.total_steps
        if scale is None:
            need = "steps_per_epoch" if self.unit == "ep" else "total_steps"
            raise DurationError(
                f"turn {self} into steps",
                found=f"{need} is unknown for this run",
                fix=f"pass {need}= where the run starts, or give the duration in steps ('500st')",
            )
        return math.ceil(self.value * scale / (100 if self.unit == "%" else 1))

    def __str__(self) -> str:
        exact = self.value.denominator == 1
        return f"{self.value.numerator if exact else float(self.value)}{self.unit}"
