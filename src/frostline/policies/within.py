"""Limits in seconds and bytes: freeze as much as a run needs to keep within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from frostline.compose import Around, kept_plan, kept_text
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import backbone, check_options, finite
from frostline.policy import Event, EventKind, State
from frostline.signals import Need
from frostline.text import bytes_text, seconds_text

__all__ = ["Within"]

_FIRST, _LATER, _PEAK = "first_epoch_from_s", "epoch_from_s", "peak_from_bytes"

Decided = tuple[FreezePlan, State]


@dataclass(frozen=True, slots=True)
class Within(Around):
    """Freeze further groups, from the input on, until the run keeps within its limits.

    What an epoch takes and how far memory grows was foretold at every depth before the run, from
    trial steps on the run's own batches. After each evaluation the clock is looked at: the epochs
    to come are expected to be as much slower or faster than foretold as the last one was, and
    where they would not fit into the time that is left, more is frozen. What the clock has frozen
    once stays frozen. Where even linear probing is too dear, that is what is left, and the reason
    says so.

    `fit` measures and supplies what is foretold; around a loop of your own set `driver.measured`
    and `driver.clock`.

    Attributes:
        policy: the inner policy.
        run_s: most seconds of the whole run, training and validation, > 0; None: no limit.
        peak_bytes: most bytes that a step may have in use, > 0; None: no limit.

    References:
        Ours.

    Example:
        >>> from frostline.clock import Progress
        >>> from frostline.policies.static import Full
        >>> from frostline.testing import example_groups
        >>> groups = example_groups(4)  # three blocks and the head
        >>> seconds = dict(zip(groups.names, (40.0, 30.0, 20.0, 10.0)))
        >>> foretold = {"first_epoch_from_s": seconds, "epoch_from_s": seconds}
        >>> policy = Within(Full(), run_s=50)
        >>> event = Event(EventKind.START, Progress(0, 20, 10, 0.0), foretold)  # two epochs
        >>> plan, _ = policy.decide(groups, policy.init(groups), event)
        >>> sorted(plan.frozen)
        ['block0', 'block1']
    """

    run_s: float | None = None
    peak_bytes: float | None = None

    def __post_init__(self) -> None:
        check_options(
            self,
            {
                "run_s": self.run_s is None or 0 < self.run_s < float("inf"),
                "peak_bytes": self.peak_bytes is None or 0 < self.peak_bytes < float("inf"),
            },
        )

    def needs(self) -> tuple[Need, ...]:
        """What the inner policy needs, and what is foretold of each depth."""
        time = (_FIRST, _LATER) if self.run_s is not None else ()
        memory = (_PEAK,) if self.peak_bytes is not None else ()
        return *self.policy.needs(), *(Need(name, None) for name in (*time, *memory))

    def init(self, groups: LayerGroups) -> State:
        """The inner state, and nothing decided yet."""
        return {
            "inner": self.policy.init(groups),
            "wanted": None,
            "plan": None,
            "least": 0,  # groups that the clock has frozen
            "clock": None,
        }

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner plan, and as long a frozen prefix as the limits ask for."""
        plan, inner = self.policy.decide(groups, state["inner"], event)
        state = state | {"inner": inner}
        if self.run_s is None and self.peak_bytes is None:
            return plan, state
        if state["plan"] is None:
            self._check(groups, event)
        due = event.kind is EventKind.EVALUATED and self.run_s is not None
        if (wanted := kept_text(plan)) == state["wanted"] and not due:
            return kept_plan(state["plan"]), state
        if self.run_s is not None:
            state = state | {"clock": _looked_at(groups, state["clock"], event)}
        bounded, least = self._bounded(groups, plan, state, event)
        if self.run_s is not None:
            state = state | {"clock": _in_force(groups, state["clock"], bounded, event)}
        return bounded, state | {"wanted": wanted, "plan": kept_text(bounded), "least": least}

    def _check(self, groups: LayerGroups, event: Event) -> None:
        """Raise unless what the limits are held against is known."""
        foretold = {need.signal for need in self.needs()} & {_FIRST, _LATER, _PEAK}
        missing = sorted(n for n in foretold if not finite(groups.names, event.signals.get(n, {})))
        asked, progress = "keep a run within its limits", event.progress
        if missing:
            raise PolicyError(
                asked,
                found=f"nothing foretold of it: no {' and no '.join(missing)}",
                fix="train with fit, which foretells it, or set driver.measured before the run",
            )
        if self.run_s is None:
            return
        if progress.spent_s is None or not (progress.total_steps and progress.steps_per_epoch):
            raise PolicyError(
                asked,
                found="a run of unknown length, or whose seconds nobody counts",
                fix="give total_steps and steps_per_epoch, and set driver.clock before the run",
            )

    def _bounded(
        self, groups: LayerGroups, plan: FreezePlan, state: State, event: Event
    ) -> tuple[FreezePlan, int]:
        """The least frozen plan that fits, and how many groups the clock asks for from now on."""
        names, least = backbone(groups), state["least"]
        more, count, before = _prefixed(plan, names, least), least, None
        while count < len(names) and not self._fits(groups, more, state, event):
            before, count = more, count + 1
            more = _prefixed(plan, names, count)
        said = ""
        if not self._fits(groups, more, state, event):
            said = f"all {len(names)} frozen, and still too much: "
        elif more.frozen != plan.frozen:
            said = f"the first {count} frozen: "
        said += self._costs(groups, more, state, event)
        if before is not None and before.frozen != more.frozen:
            said += f"; with one less {self._costs(groups, before, state, event, short=True)}"
        late = self.run_s is not None and not self._in_time(groups, plan, state, event)
        return more.because(f"{plan.reason}; {said}"), max(least, count if late else 0)

    def _fits(self, groups: LayerGroups, plan: FreezePlan, state: State, event: Event) -> bool:
        peak = self._peak(groups, plan, event)
        small = self.peak_bytes is None or peak <= self.peak_bytes
        return small and self._in_time(groups, plan, state, event)

    def _in_time(self, groups: LayerGroups, plan: FreezePlan, state: State, event: Event) -> bool:
        if self.run_s is None:
            return True
        return self._rest_s(groups, plan, state, event) <= self._left_s(event)

    def _left_s(self, event: Event) -> float:
        return (self.run_s or 0.0) - (event.progress.spent_s or 0.0)

    def _rest_s(self, groups: LayerGroups, plan: FreezePlan, state: State, event: Event) -> float:
        """Seconds that the rest of the run is expected to take under a plan."""
        clock, progress = state["clock"], event.progress
        epochs = (clock["total"] - progress.step) / (progress.steps_per_epoch or 1)
        first, later = (
            _at(groups, plan.frontier(groups), event, name) for name in (_FIRST, _LATER)
        )
        now = clock["frontier"]
        if now is not None and not clock["fresh"] and now <= plan.frontier(groups):
            # What is stored serves on: only the groups between run to store what comes.
            stored = _at(groups, now, event, _FIRST) - _at(groups, now, event, _LATER)
            first = later + max(0.0, first - later - stored)
        return clock["scale"] * (min(epochs, 1) * first + max(epochs - 1, 0) * later)

    def _peak(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> float:
        return 0.0 if self.peak_bytes is None else _at(groups, plan.frontier(groups), event, _PEAK)

    def _costs(
        self,
        groups: LayerGroups,
        plan: FreezePlan,
        state: State,
        event: Event,
        *,
        short: bool = False,
    ) -> str:
        """What a plan is expected to take of what there is."""
        said = []
        if self.run_s is not None:
            rest, left = self._rest_s(groups, plan, state, event), max(0.0, self._left_s(event))
            limit = "" if short else f" of the {seconds_text(left)} left"
            said.append(f"{seconds_text(rest)}{limit}")
        if self.peak_bytes is not None:
            limit = "" if short else f" of {bytes_text(self.peak_bytes)}"
            said.append(f"{bytes_text(self._peak(groups, plan, event))}{limit}")
        return f"{'it' if short else 'the run'} is expected to take {' and '.join(said)}"


def _prefixed(plan: FreezePlan, names: Sequence[str], count: int) -> FreezePlan:
    """The plan with this many groups, from the input on, frozen as well."""
    if frozenset(names[:count]) <= plan.frozen:
        return plan
    return replace(plan, frozen=plan.frozen | frozenset(names[:count]), exempt={})


def _at(groups: LayerGroups, frontier: int, event: Event, name: str) -> float:
    """What was foretold where the first group to train is this one, or the next one foretold."""
    values = event.signals[name]
    depths = [g.depth for g in groups if g.name in values]
    return values[groups.names[next((d for d in depths if d >= frontier), depths[-1])]]


def _looked_at(groups: LayerGroups, clock: Any, event: Event) -> dict[str, Any]:
    """What is known of the clock: after an evaluation how the epoch was against what was foretold.

    Its `frontier` is that of the plan in force; `fresh` says that no epoch began and ended under
    it, so that nothing of it is stored yet, and `whole` that it has been in force since `step`.
    """
    progress = event.progress
    spent = progress.spent_s or 0.0
    if clock is None:
        start = {"total": progress.total_steps, "step": progress.step, "spent": spent}
        return start | {"scale": 1.0, "frontier": None, "fresh": True, "whole": True}
    if event.kind is not EventKind.EVALUATED or progress.step == clock["step"]:
        return clock
    now = {"step": progress.step, "spent": spent, "fresh": False, "whole": True}
    if clock["whole"]:
        foretold = _at(groups, clock["frontier"], event, _FIRST if clock["fresh"] else _LATER)
        foretold *= (progress.step - clock["step"]) / (progress.steps_per_epoch or 1)
        if foretold > 0:
            now["scale"] = (spent - clock["spent"]) / foretold
    return clock | now


def _in_force(
    groups: LayerGroups, clock: dict[str, Any], plan: FreezePlan, event: Event
) -> dict[str, Any]:
    """The clock once a plan is in force."""
    if (frontier := plan.frontier(groups)) == clock["frontier"]:
        return clock
    whole = event.progress.step == clock["step"]
    return clock | {"frontier": frontier, "fresh": True, "whole": whole}
