"""Freezing or unfreezing when a validation metric stops improving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import backbone, freeze_first, improved, metric
from frostline.policy import Event, EventKind, Policy, State

__all__ = ["Plateau"]


@dataclass(frozen=True, slots=True)
class Plateau(Policy):
    """Unfreeze deeper groups, or freeze shallow ones, each time a metric stops improving.

    After `patience` evaluations in a row in which the metric was not better than its best by more
    than `min_delta`, the next `groups_per_step` groups move: with direction "unfreeze" the head
    trains first and the deepest frozen groups join it; with "freeze" everything trains first and
    the shallowest trained groups are frozen. Counting starts again after each move; the best value
    stays. A metric that is no number counts as no improvement.

    No paper proposes exactly this rule; it is what people build by hand, and the defaults are ours.

    Attributes:
        direction: "unfreeze" (from the head towards the input), ours, or "freeze" (from the input
            towards the head).
        metric: what is to improve; ours: `val_loss`, as torch's and Keras' early stopping are
            mostly used with.
        mode: "min" if smaller is better, "max" if larger is.
        patience: evaluations without improvement before a move, >= 1. Ours: 1, since a move can be
            followed by the next, unlike the end of a run (Lightning's early stopping waits for 3,
            torch's ReduceLROnPlateau for 10).
        min_delta: improvements must be larger than this, in units of the metric, >= 0; 0, as in
            Keras' and Lightning's early stopping.
        groups_per_step: groups that move at once, >= 1; ours.
        cooldown: evaluations after a move that are not counted, >= 0; 0, as in ReduceLROnPlateau.
        live_norm: let normalisation statistics of frozen groups follow the data.

    References:
        torch.optim.lr_scheduler.ReduceLROnPlateau for the counting and `cooldown`.

    Example:
        >>> Plateau(direction="freeze", patience=2).groups_per_step
        1
    """

    direction: Literal["unfreeze", "freeze"] = "unfreeze"
    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 1
    min_delta: float = 0.0
    groups_per_step: int = 1
    cooldown: int = 0
    live_norm: bool = False

    def __post_init__(self) -> None:
        if self.direction not in ("unfreeze", "freeze") or self.mode not in ("min", "max"):
            raise PolicyError(
                f"{self.direction} by the {self.mode} of {self.metric}",
                found="no such direction or mode",
                fix="direction unfreeze or freeze, mode min or max",
            )
        if min(self.patience, self.groups_per_step) < 1 or self.cooldown < 0:
            raise PolicyError(
                f"move {self.groups_per_step} groups after {self.patience} evaluations, then wait "
                f"for {self.cooldown}",
                found="a number that is too small",
                fix="patience=1,groups_per_step=1,cooldown=0 or more",
            )
        if not 0 <= self.min_delta < math.inf:
            raise PolicyError(
                f"improve by more than {self.min_delta}",
                found="no number of 0 or more",
                fix="for example min_delta=0.001",
            )

    def ends_phase(self, groups: LayerGroups, plan: FreezePlan) -> bool:
        """Whether groups are left to unfreeze; freezing more is no reason to train on."""
        return self.direction == "unfreeze" and bool(plan.frozen)

    def init(self, groups: LayerGroups) -> State:
        """No best value yet."""
        del groups
        return {"best": None, "bad": 0, "wait": 0, "moves": 0, "why": ""}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The prefix that is frozen after the moves so far."""
        total = len(backbone(groups))
        if event.kind is EventKind.EVALUATED:
            state = self._judge(state, metric(event, self.metric), total)
        moved = min(total, state["moves"] * self.groups_per_step)
        unfreezing = self.direction == "unfreeze"
        frozen = freeze_first(groups, total - moved if unfreezing else moved).frozen
        plan = FreezePlan(
            frozen=frozen,
            live_norm=frozen if self.live_norm else frozenset(),
            phase=state["moves"] if unfreezing else 0,
            reason=f"{self.direction} on a plateau: {len(frozen)} of {total} groups frozen"
            + state["why"],
        )
        return plan, state

    def _judge(self, state: State, value: float, total: int) -> State:
        best = state["best"]
        if improved(value, best, self.mode, self.min_delta):
            return state | {"best": value, "bad": 0, "wait": max(0, state["wait"] - 1)}
        if state["wait"]:
            return state | {"wait": state["wait"] - 1}
        state = state | {"bad": state["bad"] + 1}
        if state["bad"] < self.patience or state["moves"] * self.groups_per_step >= total:
            return state
        shown = "any number" if best is None else f"{best:.4g}"
        why = f"; {self.metric} not better than {shown} in {self.patience} evaluations"
        moves = state["moves"] + 1
        return state | {"bad": 0, "wait": self.cooldown, "moves": moves, "why": why}
