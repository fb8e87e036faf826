"""Policies that use only the clock."""

from __future__ import annotations

from dataclasses import dataclass

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State

__all__ = ["Gradual"]

_ONE_EPOCH = Duration.parse("1ep")


@dataclass(frozen=True, slots=True)
class Gradual(Policy):
    """Gradual unfreezing: the head first, then one more group from deep to shallow per interval.

    During the first interval only the head trains; after each interval `groups_per_step` deeper
    groups join, and what has been unfrozen stays so.

    Attributes:
        every: length of an interval. "1ep", as in the paper.
        groups_per_step: groups that join at each interval, >= 1; the paper's 1. Models split into
            many groups may need more to reach the stem within the run.
        until: by when everything is unfrozen; None keeps `groups_per_step`. Given, the groups are
            spread evenly over this time instead ("50%" unfreezes the stem half-way).
        live_norm: let normalisation statistics of frozen groups follow the data.

    References:
        Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
        arXiv:1801.06146, section 3.3. The paper combines it with discriminative and slanted
        triangular learning rates, which are separate knobs here.

    Example:
        >>> Gradual(every=Duration.parse("2ep")).groups_per_step
        1
    """

    every: Duration = _ONE_EPOCH
    groups_per_step: int = 1
    until: Duration | None = None
    live_norm: bool = False

    def __post_init__(self) -> None:
        if self.groups_per_step < 1 or not self.every.value:
            raise PolicyError(
                f"unfreeze {self.groups_per_step} groups every {self.every}",
                found="an interval or a number of groups that is not positive",
                fix="for example every=1ep,groups_per_step=1",
            )

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The head and the groups whose time has come train; the rest is frozen."""
        backbone = [g.name for g in groups if g.name not in groups.head]
        joined = min(len(backbone), self._joined(len(backbone), event))
        frozen = frozenset(backbone[: len(backbone) - joined])
        plan = FreezePlan(
            frozen=frozen,
            live_norm=frozen if self.live_norm else frozenset(),
            reason=f"gradual unfreezing: head and {joined} of {len(backbone)} groups train",
        )
        return plan, state

    def _joined(self, backbone: int, event: Event) -> int:
        progress = event.progress
        if self.until is None:
            intervals = progress.step // max(1, self.every.steps(progress))
            return intervals * self.groups_per_step
        end = max(1, self.until.steps(progress))
        return backbone * progress.step // end
