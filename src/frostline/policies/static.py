"""Policies that never change their plan."""

from __future__ import annotations

from dataclasses import dataclass

from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State
from frostline.select import select

__all__ = ["Freeze", "Full", "LinearProbe"]


@dataclass(frozen=True, slots=True)
class Full(Policy):
    """Full fine-tuning: nothing is frozen. The baseline of every comparison.

    Example:
        >>> Full()
        Full()
    """

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The empty plan, always."""
        del groups, event
        return _NOTHING, state


@dataclass(frozen=True, slots=True)
class Freeze(Policy):
    """Freeze what a selector picks, from start to end.

    Attributes:
        select: selector of the parameters to freeze (see `frostline.select`).
        live_norm: let normalisation statistics of frozen groups follow the data. Off: the
            statistics are part of what the backbone learned, and the cached outputs of a frozen
            region need them still.

    Example:
        >>> Freeze("first 60%")
        Freeze(select='first 60%', live_norm=False)
    """

    select: str
    live_norm: bool = False

    def __post_init__(self) -> None:
        select(self.select)

    def init(self, groups: LayerGroups) -> State:
        """Resolve the selector once; it raises here if it matches nothing."""
        plan = FreezePlan.freezing(
            groups,
            self.select,
            live_norm=self.live_norm,
            reason=f"frozen throughout: {self.select}",
        )
        return plan.to_json()

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The resolved plan, always."""
        del groups, event
        return FreezePlan.from_json(state), state


@dataclass(frozen=True, slots=True)
class LinearProbe(Policy):
    """Linear probing: the backbone is frozen throughout and only the head trains.

    Attributes:
        live_norm: let normalisation statistics of the backbone follow the data. Off by default,
            as in feature extraction, where the backbone is a fixed function.

    References:
        Alain & Bengio 2016, "Understanding intermediate layers using linear classifier probes",
        arXiv:1610.01644, for linear classifiers on frozen features.

    Example:
        >>> LinearProbe()
        LinearProbe(live_norm=False)
    """

    live_norm: bool = False

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """Everything but the head frozen, always."""
        del event
        backbone = groups.backbone
        plan = FreezePlan(
            frozen=backbone,
            live_norm=backbone if self.live_norm else frozenset(),
            reason="linear probing: only the head trains",
        )
        return plan, state


_NOTHING = FreezePlan(reason="full fine-tuning: everything trains")
