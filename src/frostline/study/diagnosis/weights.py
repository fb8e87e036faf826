"""Weights of evidence: what a measure, or a measured gain, says for or against a finding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from frostline.study.diagnosis.findings import Kind

__all__ = ["MATTERS", "SCALES", "Scale", "clipped", "graded", "measured_weight"]

#: Differences in accuracy below this matter to nobody.
MATTERS = 0.015


class Scale(NamedTuple):
    """How a measure speaks for a finding.

    Attributes:
        measure: its name.
        most: the largest weight that it can have, either way.
        against: the value from which on it speaks against with all of that.
        neutral: the value at which it says nothing.
        favour: the value from which on it speaks for it with all of that.
        log: whether values in between are weighed by their logarithm.
    """

    measure: str
    most: float
    against: float
    neutral: float
    favour: float
    log: bool = False

    def weight(self, value: float) -> float:
        """Of a value."""
        grade = _graded_log if self.log else graded
        return self.most * grade(value, self.against, self.neutral, self.favour)


#: Of each finding, the measures that speak for or against it.
SCALES: Mapping[Kind, tuple[Scale, ...]] = {
    "too much frozen": (
        Scale("frozen_share", 0.5, 0.0, 0.4, 1.0),
        Scale("gap", 0.6, 0.35, 0.12, 0.0),
    ),
    "too little frozen": (
        Scale("rise", 1.5, -0.03, 0.03, 0.2),
        Scale("drop", 0.8, 0.0, 0.02, 0.07),
        Scale("gap", 0.8, 0.05, 0.2, 0.5),
        Scale("samples_per_class", 0.8, 1000.0, 100.0, 10.0, log=True),
    ),
    "learning rate too high": (
        Scale("high_rate_loss", 2.0, 0.8, 1.1, 2.5, log=True),
        Scale("high_rate_train_loss", 1.0, 0.3, 0.8, 1.1),
        Scale("jitter", 0.8, 0.01, 0.1, 0.6, log=True),
        Scale("stride", 1.2, 0.02, 0.3, 5.0, log=True),
    ),
    "learning rate too low": (
        Scale("jitter", 0.8, 0.15, 0.05, 0.01, log=True),
        Scale("loss_left", 0.8, 0.1, 0.4, 0.9),
        Scale("gap", 0.4, 0.35, 0.12, 0.0),
    ),
    "stopped too early": (
        Scale("late", 1.2, -0.02, 0.012, 0.08),
        Scale("best_at", 1.0, 0.4, 0.85, 1.6),
        Scale("updates", 0.9, 1000.0, 150.0, 20.0, log=True),
    ),
    "trained longer than needed": (
        Scale("best_at", 1.2, 0.9, 0.55, 0.2),
        Scale("lowest_at", 1.0, 0.9, 0.55, 0.2),
        Scale("time_after_best", 0.6, 0.1, 0.4, 0.8),
        # A loss that rises after the best epoch is no idling, but overfitting.
        Scale("rise", 1.0, 0.25, 0.05, -0.15),
    ),
    "head not converged": (
        Scale("head_reach", 1.4, 10.0, 1.5, 0.2, log=True),
        Scale("loss_left", 0.5, 0.1, 0.4, 0.9),
    ),
    "too little data": (
        Scale("gap", 0.7, 0.03, 0.15, 0.5),
        Scale("samples_per_class", 0.5, 2000.0, 200.0, 10.0, log=True),
        Scale("accuracy_error", 0.6, 0.0, 0.05, 0.4),
    ),
}


def clipped(value: float) -> float:
    """Within -1 and 1."""
    return max(-1.0, min(1.0, value))


def graded(value: float, against: float, neutral: float, favour: float) -> float:
    """From -1 at `against` over 0 at `neutral` to 1 at `favour`, linear between them.

    Example:
        >>> graded(0.5, 0.0, 1.0, 2.0), graded(9.0, 0.0, 1.0, 2.0), graded(3.0, 8.0, 4.0, 2.0)
        (-0.5, 1.0, 0.5)
    """
    points = sorted(((against, -1.0), (neutral, 0.0), (favour, 1.0)))
    return float(np.interp(value, [x for x, _ in points], [y for _, y in points]))


def _graded_log(value: float, against: float, neutral: float, favour: float) -> float:
    """The same on a logarithmic scale; all above 0."""
    logs = (math.log(max(x, 1e-12)) for x in (value, against, neutral, favour))
    return graded(*logs)


def measured_weight(gain: float, error: float, most: float) -> float:
    """The weight of a measured gain: all of it from three standard errors on.

    Example:
        >>> round(measured_weight(0.1, 0.02, 3.0), 2), round(measured_weight(0.0, 0.02, 3.0), 2)
        (3.0, -0.75)
    """
    return most * clipped((gain - MATTERS) / (3 * max(error, 1e-9)))
