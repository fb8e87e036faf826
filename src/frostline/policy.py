"""Policies: immutable configuration and pure functions from events to plans.

A policy never changes anything. It is asked at the start of a run, before every optimizer update
and after every evaluation; it answers with the plan it wants and its next state, which is plain
JSON. The same configuration, state and event always give the same answer, so an interrupted run
decides exactly as an uninterrupted one.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frostline.clock import Progress
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.signals import Need

__all__ = ["Decision", "Event", "EventKind", "Policy", "State", "read_metric"]

#: Plain JSON: str, int, float, bool, None, lists and dicts with string keys.
State = dict[str, Any]


class EventKind(enum.StrEnum):
    """When a policy is asked."""

    START = "start"
    STEP = "step"
    EVALUATED = "evaluated"


@dataclass(frozen=True, slots=True)
class Event:
    """What a policy sees when it is asked.

    Attributes:
        kind: start of the run, before an optimizer update, or after an evaluation.
        progress: how far the run is; `progress.step` updates are complete.
        signals: newest values, by signal then group (or parameter) name; only what the policy
            declared. A unit of which there is no value (it did not train) is absent.
        sampled: by signal, when its newest values were read: a number that grows with each
            reading and means nothing else. Compare it to notice a new reading.
        metrics: validation metrics, present only on `EVALUATED` events.
    """

    kind: EventKind
    progress: Progress
    signals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    sampled: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """A change of plan: what reports and resume read.

    Attributes:
        step: updates completed when it was taken.
        plan: the plan from then on, with its reason.
        signals: the signal values the policy saw.
        metrics: the metrics the policy saw.
    """

    step: int
    plan: FreezePlan
    signals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "step": self.step,
            "plan": self.plan.to_json(),
            "signals": {name: dict(values) for name, values in self.signals.items()},
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Decision:
        """The inverse of `to_json`."""
        return cls(
            data["step"], FreezePlan.from_json(data["plan"]), data["signals"], data["metrics"]
        )


class Policy(abc.ABC):
    """Base of all policies. Subclasses are frozen dataclasses whose fields are their options.

    Only `decide` must be written. The other methods have defaults for policies that need no
    signals and no state.
    """

    __slots__ = ()

    def needs(self) -> tuple[Need, ...]:
        """Signals this policy reads, and how often. Default: none."""
        return ()

    def notice(self) -> str:
        """What a user should know before the run starts, e.g. a high price. Default: nothing."""
        return ""

    def init(self, groups: LayerGroups) -> State:
        """The state before the first event. Raises if the groups cannot serve this policy."""
        del groups
        return {}

    @abc.abstractmethod
    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The plan wanted from now on, and the next state. Pure; must not mutate `state`."""


def read_metric(metrics: Mapping[str, float], name: str, asked: str) -> float:
    """One metric of an evaluation.

    Args:
        metrics: of the evaluation.
        name: of the metric.
        asked: what it is wanted for, for the message.

    Raises:
        PolicyError: the evaluation has no metric of this name.
    """
    if name not in metrics:
        raise PolicyError(
            asked,
            found=f"an evaluation with {', '.join(sorted(metrics)) or 'no metrics'}",
            fix="name one of those",
        )
    return metrics[name]
