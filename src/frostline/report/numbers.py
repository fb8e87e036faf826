"""Everything that a report shows, as numbers and words: records in, no chart and no page yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from frostline import _io
from frostline.errors import DamagedFile
from frostline.report.costs import time_parts
from frostline.report.headline import Headline, featured, headline
from frostline.report.mistakes import Mistakes, mistakes
from frostline.report.read import Proof, ReportRun, Runs
from frostline.report.repeat import Repeat, repeat
from frostline.report.results import ArmResult, CurvePoint, arm_results, curves
from frostline.report.timeline import Timeline, timeline

if TYPE_CHECKING:
    from frostline.study.learning_curve import LearningCurve

__all__ = ["Diagnosis", "Finding", "Numbers", "ProbeReading", "RunDetail", "numbers_of"]

#: Spans of all timelines together that a page can hold and draw at once.
_MOST_SPANS = 40_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a diagnosis found.

    Attributes:
        kind: what it is about.
        strength: how sure it is.
        evidence: what it rests on, in sentences.
        action: what to do, or "".
        gain: what that would bring, or "".
    """

    kind: str
    strength: str
    evidence: tuple[str, ...]
    action: str = ""
    gain: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `diagnosis.json` says.

    Attributes:
        of: the run, or "the study".
        sentence: in short.
        findings: one by one.
    """

    of: str
    sentence: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class ProbeReading:
    """How well a linear classifier reads the classes from the frozen output of a layer group.

    Attributes:
        run: whose model.
        group: the layer group; "what enters the head" for the last.
        depth: its place, 0 nearest the input.
        accuracy: on validation data, in [0, 1].
        low: lower end of its 95 % interval.
        high: upper end.
        commonest: accuracy of always answering the commonest class.
    """

    run: str
    group: str
    depth: int
    accuracy: float
    low: float
    high: float
    commonest: float


@dataclass(frozen=True, slots=True)
class RunDetail:
    """What a report shows of a run by itself.

    Attributes:
        name: of the run.
        arm: its strategy.
        seed: its seed.
        timeline: what was frozen when.
        time_s: seconds by the names of `frostline.report.costs.PARTS`; None before the end.
        signal_s: seconds of each signal.
        proof: of freezing; None before the end.
        cache: notes of the cache, in words.
        torn: whether its record was cut off in the middle of a line.
    """

    name: str
    arm: str
    seed: int
    timeline: Timeline
    time_s: Mapping[str, float] | None
    signal_s: Mapping[str, float]
    proof: Proof | None
    cache: tuple[str, ...]
    torn: bool


@dataclass(frozen=True, slots=True)
class Numbers:
    """Everything that a report shows.

    Attributes:
        model: what was fine-tuned.
        data: what on; of a path the last part.
        headline: the result in words.
        arms: results per strategy.
        curves: metrics by epoch.
        details: run by run.
        featured: name of the run that the page opens with.
        probes: readings by depth, run by run; none where no run was probed.
        mistakes: of the featured run; None where it left no predictions.
        diagnoses: what was diagnosed.
        repeat: how to do it again.
        level: of the intervals of differences, in (0, 1).
        learning: accuracy by number of training samples on validation and on test data, for a study
            of that; none for others.
    """

    model: str
    data: str
    headline: Headline
    arms: tuple[ArmResult, ...]
    curves: tuple[CurvePoint, ...]
    details: tuple[RunDetail, ...]
    featured: str
    probes: tuple[ProbeReading, ...]
    mistakes: Mistakes | None
    diagnoses: tuple[Diagnosis, ...]
    repeat: Repeat
    level: float = 0.95
    learning: tuple[LearningCurve, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, numbers that are none as strings."""
        plain = asdict(replace(self, details=(), learning=()))
        details = [
            {**asdict(replace(d, timeline=_EMPTY)), "timeline": _timeline_json(d.timeline)}
            for d in self.details
        ]
        learning = [curve.to_json() for curve in self.learning]
        return _io.finite_json({**plain, "details": details, "learning": learning})


_EMPTY = Timeline((), frozenset(), 1, (), ())


def _timeline_json(found: Timeline) -> dict[str, Any]:
    return {**asdict(replace(found, head=frozenset())), "head": sorted(found.head)}


def numbers_of(
    runs: Runs, *, samples: Callable[[Mistakes, ReportRun], Mistakes] | None = None
) -> Numbers:
    """The numbers of a report.

    Args:
        runs: what it is about.
        samples: adds the test samples themselves to the mistakes, as
            `frostline.report.mistakes.with_samples` does; None leaves them out.

    Raises:
        DamagedFile: `probes.json` or `diagnosis.json` is not what it should be.
        DataError: the samples are asked for and cannot be had.
    """
    arms = arm_results(runs)
    shown = runs.of(featured(arms).name)
    first = next((run for run in shown if run.record.finished), shown[0])
    wrong = mistakes(first, shown)
    if wrong is not None and samples is not None:
        wrong = samples(wrong, first)
    return Numbers(
        model=_listed(runs.runs, "model"),
        data=", ".join(dict.fromkeys(_last(str(run.config["data"])) for run in runs.runs)),
        headline=headline(runs, arms),
        arms=arms,
        curves=curves(runs.runs),
        details=tuple(_detail(run, _MOST_SPANS // len(runs.runs)) for run in runs.runs),
        featured=first.name,
        probes=tuple(reading for run in runs.runs for reading in _probes(run)),
        mistakes=wrong,
        diagnoses=tuple(_diagnoses(runs)),
        repeat=repeat(runs),
        level=runs.comparison.spec.level if runs.comparison else 0.95,
        learning=runs.learning,
    )


def _last(path: str) -> str:
    """The last part of a path, which is what a reader knows it by.

    Example:
        >>> _last("my/photos/"), _last("mine.data:flowers")
        ('photos', 'mine.data:flowers')
    """
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or path


def _listed(runs: Sequence[ReportRun], name: str) -> str:
    return ", ".join(dict.fromkeys(str(run.config[name]) for run in runs))


def _detail(run: ReportRun, most_spans: int) -> RunDetail:
    summary = run.record.summary
    cache: Mapping[str, Any] = summary.get("cache") or {}
    return RunDetail(
        name=run.name,
        arm=run.arm,
        seed=run.seed,
        timeline=timeline(run.record, most_spans=most_spans),
        time_s=time_parts(run.record),
        signal_s={name: float(s) for name, s in summary.get("signal_s", {}).items()},
        proof=run.proof,
        cache=tuple(str(note) for note in cache.get("notes", ())),
        torn=run.record.torn,
    )


def _probes(run: ReportRun) -> list[ProbeReading]:
    if run.probes is None:
        return []
    try:
        head = run.probes.get("head_input")
        points = [*run.probes["points"], *([head] if head else [])]
        commonest = float(run.probes["commonest"])
        return [
            ProbeReading(
                run=run.name,
                group=str(point["group"]) or "what enters the head",
                depth=int(point["depth"]),
                accuracy=float(point["val_accuracy"]),
                low=float(point["accuracy_interval"][0]),
                high=float(point["accuracy_interval"][1]),
                commonest=commonest,
            )
            for point in points
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _unreadable(run, "probes.json", error) from error


def _diagnoses(runs: Runs) -> list[Diagnosis]:
    found = [(run.name, run.diagnosis, run) for run in runs.runs if run.diagnosis is not None]
    diagnoses = []
    if runs.diagnosis is not None:
        diagnoses.append(_diagnosis("the study", runs.diagnosis, runs.runs[0]))
    return diagnoses + [_diagnosis(name, said, run) for name, said, run in found]


def _diagnosis(of: str, said: Mapping[str, Any], run: ReportRun) -> Diagnosis:
    try:
        return Diagnosis(
            of=of,
            sentence=str(said["sentence"]),
            findings=tuple(
                Finding(
                    kind=str(one["kind"]).replace("_", " "),
                    strength=str(one["strength"]),
                    evidence=tuple(str(e["says"]) for e in one["evidence"]),
                    action=str((one.get("action") or {}).get("text", "")),
                    gain=_gain(one.get("gain")),
                )
                for one in said["findings"]
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(run, "diagnosis.json", error) from error


def _gain(value: Any) -> str:
    """What an action would bring: words, or a share as a figure."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _unreadable(run: ReportRun, name: str, error: Exception) -> DamagedFile:
    return DamagedFile(
        f"read {run.record.path / name}",
        found=f"{type(error).__name__}: {error}",
        fix="remove the file to report without it",
    )
