"""What a run may take at most: updates, seconds of training, or floating-point operations.

Fewer updates are known before the run starts. Seconds and operations are counted as it goes: the
learning rate then follows the share that is spent, and percentages of the run ("30%") refer to the
updates that the rest is expected to allow.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from frostline.errors import ConfigError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

__all__ = ["Allowance", "Budget", "step_flops"]

_PATTERN = re.compile(
    r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,3})?)\s*(st|s|min|h|flop)\s*", re.ASCII | re.IGNORECASE
)
_SECONDS = {"min": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that training may take.

    Attributes:
        amount: > 0.
        unit: "st" optimizer updates, "s" seconds of training with validation, "flop"
            floating-point operations of forward and backward passes.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "500st", "600s", "10min", "1.5h" or "2e15flop".

        Raises:
            ConfigError: another form, or nothing at all.

        Example:
            >>> Budget.parse("1.5 min"), str(Budget.parse("2e12flop"))
            (Budget(amount=90.0, unit='s'), '2e+12flop')
        """
        match = _PATTERN.fullmatch(text)
        amount = float(match[1]) if match else 0.0
        unit = match[2].lower() if match else ""
        if unit in _SECONDS:
            amount, unit = amount * _SECONDS[unit], "s"
        if match is None or not 0 < amount < float("inf") or (unit == "st" and amount % 1):
            raise ConfigError(
                f"limit a run to {text!r}",
                found="a limit of no known form" if match is None else "no usable amount",
                fix="updates ('500st'), time ('600s', '10min', '1.5h') or operations ('2e15flop')",
            )
        return cls(amount, unit)

    @property
    def seconds(self) -> float | None:
        """The most seconds, where it is a time."""
        return self.amount if self.unit == "s" else None

    def __str__(self) -> str:
        return f"{self.amount:.9g}{self.unit}"


def step_flops(groups: LayerGroups, flops: dict[str, float], plan: FreezePlan) -> float:
    """Floating-point operations of one sample's training step under a plan.

    Forward through every group; the gradient carried through every group deeper than the frontier;
    weight gradients of the groups that train. Each of the three takes as many operations as the
    forward pass, as matrix products do. Frozen outputs that come from a cache are not credited:
    the budget is the same with and without one.

    Args:
        groups: the layer groups.
        flops: of the forward pass of one sample, by group.
        plan: what is frozen.

    Example:
        >>> from frostline.testing import example_groups
        >>> groups = example_groups(3)
        >>> forward = {g.name: 10.0 for g in groups}
        >>> step_flops(groups, forward, FreezePlan()), len(groups)
        (90.0, 3)
    """
    frontier = plan.frontier(groups)
    forward = sum(flops.values())
    carried = sum(flops.get(g.name, 0.0) for g in groups if g.depth >= frontier)
    weights = sum(flops.get(g.name, 0.0) for g in groups if plan.trains(g))
    return forward + carried + weights


@dataclass(slots=True)
class Allowance:
    """How much of a budget is spent.

    Args:
        budget: what the run may take; None: nothing but its epochs limits it.
        epochs: of the settings.
        steps_per_epoch: updates per epoch.
        seconds: seconds of training so far.
        operations: floating-point operations so far.
    """

    budget: Budget | None
    epochs: int
    steps_per_epoch: int
    seconds: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    operations: Callable[[], float] = field(default=lambda: 0.0, repr=False)

    @property
    def steps(self) -> int:
        """Updates if nothing but epochs and updates are limited."""
        most = self.epochs * self.steps_per_epoch
        if self.budget is not None and self.budget.unit == "st":
            return min(most, int(self.budget.amount))
        return most

    @property
    def counted(self) -> bool:
        """Whether the budget is one that is counted as the run goes."""
        return self.budget is not None and self.budget.unit != "st"

    def share(self, step: int) -> float:
        """Share of the budget that is spent after so many updates, in [0, 1]; monotone."""
        spent = step / self.steps
        if self.budget is not None and self.counted:
            used = self.seconds() if self.budget.unit == "s" else self.operations()
            spent = max(spent, used / self.budget.amount)
        return min(1.0, spent)

    def spent(self, step: int) -> bool:
        """Whether no further update is allowed."""
        return self.share(step) >= 1

    def expected_steps(self, step: int) -> int:
        """Updates of the whole run, as far as can be told after `step` of them.

        Example:
            >>> half = Allowance(Budget.parse("10s"), 4, 100, seconds=lambda: 5.0)
            >>> half.expected_steps(50), half.expected_steps(0)
            (100, 400)
        """
        if not self.counted or not step:
            return self.steps
        return min(self.steps, max(step + 1, round(step / self.share(step))))
