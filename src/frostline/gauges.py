"""Gauges: when each signal a policy needs is gathered and read, and what it remembers meanwhile.

The driver owns one `Gauges` per run. All that it remembers goes into checkpoints, so that an
interrupted run reads the same values as an uninterrupted one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from frostline.clock import Duration, Progress
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.signals import SIGNALS, Memory, Need, Probe, Signal, Values, units_of

__all__ = ["Gauges", "window"]


@dataclass(slots=True)
class _Gauge:
    """One request, with its window in steps of this run."""

    need: Need
    signal: Signal
    start: int
    end: int | None
    interval: int
    refresh: int | None
    memory: dict[str, Memory] = field(default_factory=dict)

    def active(self, step: int) -> bool:
        return step >= self.start and (self.end is None or step < self.end)

    def begins(self, step: int) -> bool:
        origin = 0 if self.signal.from_start else self.start
        return self.signal.begin is not None and step == origin

    def gathers(self, step: int) -> bool:
        if not self.active(step) or self.begins(step):
            return False
        left = self.interval - 1 - (step - self.start) % self.interval
        return self.need.steps is None or left < self.need.steps

    def reads(self, step: int) -> bool:
        return self.active(step) and (step - self.start + 1) % self.interval == 0

    def refreshes(self, step: int) -> bool:
        if self.refresh is None or not self.reads(step):
            return False
        done = step - self.start + 1
        return done // self.refresh != (done - self.interval) // self.refresh

    def overlaps(self, other: _Gauge) -> bool:
        first, last = sorted((self, other), key=lambda g: g.start)
        return first.end is None or last.start < first.end


@dataclass(slots=True)
class Gauges:
    """The signals of one run.

    Args:
        needs: what the policy asks for; equal requests are served once.
        progress: with the totals of the run.

    Attributes:
        values: newest reading by signal, then by group or parameter.
        sampled: steps complete when each was read.
        static: the requests that are read once, before the first decision.
        seconds: time spent on each signal, by name.

    Raises:
        PolicyError: one signal is asked for in two ways at the same time.
        DurationError: an interval needs totals that are unknown.
    """

    needs: Iterable[Need]
    progress: Progress
    values: dict[str, Values] = field(init=False, default_factory=dict)
    sampled: dict[str, int] = field(init=False, default_factory=dict)
    seconds: dict[str, float] = field(init=False, default_factory=dict)
    static: list[Need] = field(init=False, default_factory=list)
    _gauges: list[_Gauge] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for need in dict.fromkeys(self.needs):
            if need.every is None:
                self.static.append(need)
            else:
                self._gauges.append(self._made(need, need.every))
        for i, need in enumerate(self.static):
            for other in self.static[:i]:
                if need.signal == other.signal and need.per != other.per:
                    raise _torn(need, other, "read it per group or per parameter in both policies")
        for i, one in enumerate(self._gauges):
            for other in self._gauges[:i]:
                if one.need.signal == other.need.signal and one.overlaps(other):
                    raise _torn(one.need, other.need, "give both policies the same interval")

    @property
    def keeps_batch(self) -> bool:
        """Whether any signal reads the probe batch."""
        return any(g.signal.activations for g in self._gauges)

    def due(self, step: int) -> list[str]:
        """Signals for which this step must be sampled."""
        return [g.need.signal for g in self._gauges if g.begins(step) or g.gathers(step)]

    def wants_frozen(self, step: int) -> bool:
        """Whether the backward pass of this step must run through frozen groups, too."""
        return any(g.need.frozen_too and g.gathers(step) for g in self._gauges)

    def read_static(
        self,
        probe: Probe,
        groups: LayerGroups,
        measured: Mapping[str, Values] | None = None,
    ) -> None:
        """Read the signals of the weights alone, before any step.

        Args:
            probe: a view of the model.
            groups: its layer groups.
            measured: values of the signals that are supplied, by name and group.
        """
        for need in self.static:
            start = time.perf_counter()
            signal = SIGNALS[need.signal]
            given = (measured or {}).get(need.signal, {}) if signal.supplied else {}
            found = {group.name: given[group.name] for group in groups if group.name in given}
            for unit in units_of(groups, need.per):
                memory: Memory = {}
                signal.gather(memory, probe, unit)
                if (value := signal.read(memory)) is not None:
                    found[unit.name] = value
            self._put(signal, found, 0, start)

    def sample(self, step: int, probe: Probe, groups: LayerGroups, *, gather: bool = True) -> None:
        """Take in one step, between its backward pass and its update.

        Args:
            step: updates complete.
            probe: the view of this step.
            groups: the layer groups.
            gather: False where the step makes no update (its gradients are not finite): references
                are taken and intervals end, but nothing of the step counts.
        """
        for gauge in self._gauges:
            if gauge.begins(step) or gauge.gathers(step):
                self._sample(gauge, step, probe, groups, gather=gather)

    def forget(self, step: int) -> None:
        """Drop what requests remember whose time is over: it may be copies of all weights."""
        for gauge in self._gauges:
            if gauge.end is not None and step >= gauge.end:
                gauge.memory.clear()

    def _sample(
        self, gauge: _Gauge, step: int, probe: Probe, groups: LayerGroups, *, gather: bool
    ) -> None:
        start, signal = time.perf_counter(), gauge.signal
        beginning, reading = gauge.begins(step), gauge.reads(step)
        found: dict[str, float] = {}
        for unit in units_of(groups, gauge.need.per):
            if signal.activations and not unit.calls:
                continue  # it never runs, so it puts out nothing
            memory = gauge.memory.setdefault(unit.name, {})
            if beginning and signal.begin is not None:
                signal.begin(memory, probe, unit)
            elif gather and (
                not signal.trained_only or gauge.need.frozen_too or probe.trains(unit)
            ):
                signal.gather(memory, probe, unit)
            if reading and (value := signal.read(memory)) is not None:
                found[unit.name] = value
            if gauge.refreshes(step) and signal.begin is not None:
                signal.begin(memory, probe, unit)
        name = signal.name
        if reading and not beginning and (found or gather):
            self._put(signal, found, step + 1, start)
        else:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _put(self, signal: Signal, found: Values, step: int, start: float) -> None:
        name = signal.name
        self.values[name] = found
        self.sampled[name] = step
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _made(self, need: Need, every: Duration) -> _Gauge:
        start, clock = window(need.after, self.progress)
        end = None if need.until is None else window(need.until, self.progress)[0]
        refresh = None if need.refresh is None else max(1, need.refresh.steps(clock))
        interval = max(1, every.steps(clock))
        return _Gauge(need, SIGNALS[need.signal], start, end, interval, refresh)

    # -- resume ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that is remembered: plain values, and arrays (copies) as leaves."""
        return {
            "values": {name: dict(values) for name, values in self.values.items()},
            "sampled": dict(self.sampled),
            "memory": [copy.deepcopy(g.memory) for g in self._gauges],
        }

    def restore(self, state: Mapping[str, Any], groups: LayerGroups) -> None:
        """Go on from `state()`, whose keys a file may have put in another order."""
        order = [*groups.names, *(p.name for g in groups for p in g.parameters)]
        self.values = {
            signal: {name: values[name] for name in order if name in values}
            for signal, values in state["values"].items()
        }
        self.sampled = dict(state["sampled"])
        for gauge, memory in zip(self._gauges, state["memory"], strict=True):
            gauge.memory = copy.deepcopy(memory)


def window(lengths: tuple[Duration, ...], progress: Progress) -> tuple[int, Progress]:
    """The step at which these lengths have passed, one after the other, and a clock from there.

    Example:
        >>> window((Duration.parse("2ep"),), Progress(total_steps=50, steps_per_epoch=10))
        (20, Progress(step=0, total_steps=30, steps_per_epoch=10))
    """
    start, clock = 0, replace(progress, step=0)
    for length in lengths:
        steps = length.steps(clock)
        total = None if clock.total_steps is None else max(1, clock.total_steps - steps)
        start, clock = start + steps, replace(clock, total_steps=total)
    return start, clock


def _torn(one: Need, other: Need, fix: str) -> PolicyError:
    return PolicyError(
        f"read the signal {one.signal!r} for two policies at once",
        found=f"two ways to read it: {_way(one)} and {_way(other)}",
        fix=fix,
    )


def _way(need: Need) -> str:
    if need.every is None:
        return f"once per {need.per}"
    steps = "all steps" if need.steps is None else f"{need.steps} step(s)"
    return f"every {need.every} over {steps} per {need.per}"
