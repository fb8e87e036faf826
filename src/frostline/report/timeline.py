"""The freezing timeline: what each layer group did when, and the decision that made it so."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from frostline.plan import FreezePlan
from frostline.policy import Decision
from frostline.records import RunRecord

__all__ = ["Change", "Phase", "Span", "Timeline", "coarser", "timeline"]


@dataclass(frozen=True, slots=True)
class Phase:
    """What a layer group does at a time.

    Attributes:
        kind: "frozen", "partly" (frozen but for some of its parameters) or "training".
        lr_scale: factor on its learning rate, >= 0; 0 where it is frozen as a whole.
        live_norm: whether its normalisation statistics follow the data though it is frozen.
    """

    kind: str
    lr_scale: float = 1.0
    live_norm: bool = False

    @classmethod
    def of(cls, group: str, plan: FreezePlan) -> Phase:
        """What a group does under a plan.

        Example:
            >>> Phase.of("stem", FreezePlan(frozen=frozenset({"stem"})))
            Phase(kind='frozen', lr_scale=0.0, live_norm=False)
        """
        if group not in plan.frozen:
            return _phase("training", float(plan.lr_scale.get(group, 1.0)), live_norm=False)
        live = group in plan.live_norm
        if not plan.exempt.get(group):
            return _phase("frozen", 0.0, live_norm=live)
        return _phase("partly", float(plan.lr_scale.get(group, 1.0)), live_norm=live)


@functools.lru_cache(maxsize=1024)
def _phase(kind: str, rate: float, *, live_norm: bool) -> Phase:
    """Phases are few and asked for often: a thousand decisions over a hundred groups."""
    return Phase(kind, rate, live_norm)


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which a layer group did the same.

    Attributes:
        group: the layer group.
        phase: what it did.
        from_step: updates complete when it began.
        to_step: updates complete when it ended, > from_step.
        change: place in `Timeline.changes` of the decision that began it.
        signals: what the policy had seen of this group then, by signal.
    """

    group: str
    phase: Phase
    from_step: int
    to_step: int
    change: int
    signals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """A decision, for people.

    Attributes:
        step: updates complete when it was taken.
        epoch: the same in epochs; None where their length is not known.
        seconds: seconds of training until then, between the epochs' ends by rule of three; None
            where no epoch has ended.
        reason: why.
        frozen: groups that it froze, from shallow to deep.
        unfrozen: groups that it unfroze.
        frozen_count: groups that are frozen from then on, in part or as a whole.
        trained_share: parameters in groups that are not frozen, as a share of all, in [0, 1].
        metrics: that the policy had seen.
        signals: that it had seen, by signal the smallest, median and largest over groups.
    """

    step: int
    epoch: float | None
    seconds: float | None
    reason: str
    frozen: tuple[str, ...]
    unfrozen: tuple[str, ...]
    frozen_count: int
    trained_share: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    signals: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What was frozen when, and why.

    Attributes:
        groups: the layer groups, from shallow to deep.
        head: those of them that are the task head.
        end_step: updates of the run, as far as it has come, >= 1.
        changes: every decision, in order.
        spans: group by group, in order; together they cover all groups from 0 to `end_step`.
        epochs: updates complete at the end of each epoch.
        coarse: updates within which decisions are drawn as one; 1 where each is drawn by itself.
    """

    groups: tuple[str, ...]
    head: frozenset[str]
    end_step: int
    changes: tuple[Change, ...]
    spans: tuple[Span, ...]
    epochs: tuple[int, ...] = ()
    coarse: int = 1

    def frozen_share(self, group: str) -> float:
        """Share of the run in which a group was frozen as a whole, in [0, 1]."""
        held = [s for s in self.spans if s.group == group and s.phase.kind == "frozen"]
        return sum(s.to_step - s.from_step for s in held) / self.end_step

    def sentence(self) -> str:
        """The whole of it in words, for those who cannot see it."""
        shares = {group: self.frozen_share(group) for group in self.groups}
        whole = sum(share == 1 for share in shares.values())
        never = sum(share == 0 for share in shares.values())
        between = len(shares) - whole - never
        return (
            f"{_counted(len(shares), 'layer group')} over {_counted(self.end_step, 'update')}, "
            f"{_counted(len(self.changes), 'decision')}; frozen throughout: {whole}, part of the "
            f"time: {between}, never: {never}"
        )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def timeline(record: RunRecord, *, most_spans: int | None = None) -> Timeline:
    """The timeline of a run.

    Args:
        record: of the run, finished or not.
        most_spans: draw close decisions as one where there would be more spans than this. All
            remain in `Timeline.changes`. None draws every one by itself.

    Example:
        >>> from pathlib import Path
        >>> plans = [FreezePlan(frozen=frozenset({"body"}), reason="head first"), FreezePlan()]
        >>> found = timeline(RunRecord(
        ...     Path("run"), {"groups": {"body": 90, "head": 10}, "head": ["head"]}, (),
        ...     (Decision(0, plans[0]), Decision(6, plans[1])), None, {"steps": 8}, False))
        >>> [(s.group, s.phase.kind, s.from_step, s.to_step) for s in found.spans]
        [('body', 'frozen', 0, 6), ('body', 'training', 6, 8), ('head', 'training', 0, 8)]
        >>> found.changes[0].trained_share
        0.1
    """
    sizes: Mapping[str, int] = record.header.get("groups", {})
    groups = tuple(sizes)
    ends = [int(line["step"]) for line in record.epochs]
    decided = [decision.step for decision in record.decisions]
    end = max(1, int(record.summary.get("steps", 0)), *ends[-1:], *decided[-1:])
    spans, coarse = _spans(groups, record.decisions, end), 1
    if most_spans is not None:
        spans, coarse = _coarser(spans, most_spans, coarse, end)
    return Timeline(
        groups=groups,
        head=frozenset(record.header.get("head", ())),
        end_step=end,
        changes=tuple(_changes(record, sizes)),
        # What was seen is looked up for the spans that are left: they are far fewer.
        spans=tuple(replace(s, signals=_seen(record.decisions, s)) for s in spans),
        epochs=tuple(ends),
        coarse=coarse,
    )


def coarser(found: Timeline, most_spans: int) -> Timeline:
    """The same with close decisions drawn as one, so that there are no more spans than this.

    Of all decisions within `Timeline.coarse` updates the last one counts. There are never fewer
    spans than groups.

    Args:
        found: a timeline.
        most_spans: the most that can be drawn.
    """
    spans, coarse = _coarser(found.spans, most_spans, found.coarse, found.end_step)
    return replace(found, spans=tuple(spans), coarse=coarse)


def _coarser(spans: Sequence[Span], most: int, coarse: int, end: int) -> tuple[Sequence[Span], int]:
    """The spans and within how many updates decisions are drawn as one."""
    if len(spans) <= most:
        return spans, coarse
    cuts = [(span, span.from_step, span.to_step) for span in spans]
    # Nothing falls away before the shortest span is shorter than a step of the grid.
    shortest = min(until - begin for _, begin, until in cuts)
    while coarse * 2 <= shortest:
        coarse *= 2
    while len(cuts) > most and coarse < end:
        coarse *= 2
        cuts = _merged(cuts, coarse, end)
    return [
        span
        if (begin, until) == (span.from_step, span.to_step)
        else replace(span, from_step=begin, to_step=until)
        for span, begin, until in cuts
    ], coarse


#: A span and where it begins and ends instead.
_Cut = tuple[Span, int, int]


def _merged(cuts: Sequence[_Cut], coarse: int, end: int) -> list[_Cut]:
    """Spans that begin and end at multiples of `coarse`; those in between are left out."""
    kept: list[_Cut] = []
    for span, begin, until in cuts:
        begin = begin // coarse * coarse  # noqa: PLW2901
        until = end if until == end else until // coarse * coarse  # noqa: PLW2901
        if begin == until:
            continue
        if kept and kept[-1][0].group == span.group and kept[-1][0].phase == span.phase:
            kept[-1] = *kept[-1][:2], until
        else:
            kept.append((span, begin, until))
    return kept


def _spans(groups: Sequence[str], decisions: Sequence[Decision], end: int) -> list[Span]:
    """Spans group by group; of decisions at the same update the last one counts."""
    last = {d.step: place for place, d in enumerate(decisions) if d.step < end}
    begun = [(step if i else 0, place, decisions[place].plan) for i, (step, place) in
             enumerate(last.items())] or [(0, 0, FreezePlan())]  # fmt: skip
    (_, place, plan), *later = begun
    opened = {group: (Phase.of(group, plan), 0, place) for group in groups}
    found: dict[str, list[Span]] = {group: [] for group in groups}
    for step, place, now in later:
        for group in _touched(groups, plan, now):
            phase, begin, first = opened[group]
            if (new := Phase.of(group, now)) is not phase and new != phase:
                found[group].append(Span(group, phase, begin, step, first))
                opened[group] = new, step, place
        plan = now
    for group, (phase, begin, first) in opened.items():
        found[group].append(Span(group, phase, begin, end, first))
    return [span for spans in found.values() for span in spans]


def _touched(groups: Sequence[str], before: FreezePlan, now: FreezePlan) -> Iterable[str]:
    """Groups that may do something else under the later plan."""
    if (before.exempt, before.lr_scale, before.live_norm) == (
        now.exempt,
        now.lr_scale,
        now.live_norm,
    ):
        return (before.frozen ^ now.frozen).intersection(groups)
    return groups


def _seen(decisions: Sequence[Decision], span: Span) -> dict[str, float]:
    signals = decisions[span.change].signals if decisions else {}
    return {
        name: float(values[span.group]) for name, values in signals.items() if span.group in values
    }


def _changes(record: RunRecord, sizes: Mapping[str, int]) -> Iterable[Change]:
    total = sum(sizes.values()) or 1
    length = record.epochs[0]["step"] / record.epochs[0]["epoch"] if record.epochs else None
    clock = _clock(record)
    before: frozenset[str] = frozenset()
    for decision in record.decisions:
        frozen = decision.plan.frozen
        trained = sum(size for name, size in sizes.items() if name not in frozen)
        yield Change(
            step=decision.step,
            epoch=decision.step / length if length else None,
            seconds=_at(clock, decision.step),
            reason=decision.plan.reason,
            frozen=tuple(name for name in sizes if name in frozen - before),
            unfrozen=tuple(name for name in sizes if name in before - frozen),
            frozen_count=len(frozen),
            trained_share=trained / total,
            metrics={name: float(value) for name, value in decision.metrics.items()},
            signals={
                name: _summary([float(v) for v in values.values()])
                for name, values in decision.signals.items()
                if values
            },
        )
        before = frozen


def _summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Smallest, median and largest."""
    ordered = sorted(values, key=lambda value: math.inf if math.isnan(value) else value)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _clock(record: RunRecord) -> list[tuple[int, float]]:
    """(updates, seconds of training) at the start and after each epoch."""
    known = [
        (int(line["step"]), float(line["costs"]["training_s"]))
        for line in record.epochs
        if "training_s" in line["costs"]
    ]
    return [(0, 0.0), *known] if known else []


def _at(clock: Sequence[tuple[int, float]], step: int) -> float | None:
    for (begin, before), (end, after) in pairwise(clock):
        if begin <= step <= end:
            return before + (after - before) * (step - begin) / max(1, end - begin)
    return clock[-1][1] if clock else None
