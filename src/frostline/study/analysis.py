"""What a study says, from its records alone: figures per arm, verdicts, and which arm to take."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostline import _io
from frostline.errors import DamagedFile, DataError, few
from frostline.records import RunRecord, read_run
from frostline.study.charges import charges
from frostline.study.folder import StudyFolder, TrialKey, run_order
from frostline.study.spec import Arm, StudySpec
from frostline.study.statistics import (
    Paired,
    Ratio,
    Verdict,
    Winner,
    compare_arms,
    paired_samples,
    pareto_front,
    ratio,
    time_to_target,
    winner,
)

__all__ = ["ArmFigures", "Comparison", "RunFigures", "analyse"]


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One finished run.

    Attributes:
        val_accuracy: of its best epoch, in [0, 1].
        test_accuracy: of the same weights, in [0, 1].
        training_s: seconds of training with validation, as they were.
        alone_s: the same if no other run had stored outputs of frozen layers for it: what it found
            stored is charged at the price that storing it had.
        whole_s: seconds of the whole run, from loading to saving, charged alike.
        peak_memory_bytes: the most memory in use.
        backward_share: backward work done, mean over steps, in [0, 1].
        trained_parameter_share: parameters that trained, mean over steps, in [0, 1].
        epochs: that it ran.
        curve: (seconds of training, accuracy on validation data) after each epoch.
    """

    val_accuracy: float
    test_accuracy: float
    training_s: float
    alone_s: float
    whole_s: float
    peak_memory_bytes: int
    backward_share: float
    trained_parameter_share: float
    epochs: int
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """An arm over its seeds.

    Attributes:
        arm: the arm.
        runs: figures by seed; what is not finished is absent.
        failures: reasons by seed of runs that failed.
        verdict: against the reference, on validation accuracy; None for the reference itself, and
            where a run is missing.
        test: difference to the reference in test accuracy; seeds and test samples both count as
            chance. None where the test samples are not the same in all runs, are fewer than two, or
            a run has no ``predictions.csv`` any more.
        time: `alone_s` against the reference's.
        whole: `whole_s` against the reference's.
        memory: peak memory against the reference's.
        reached: by seed, seconds of training until the target; None for a run that never got there.
        target: these against the reference's.
        pareto: whether no other arm is at least as good in validation accuracy, time of the whole
            run and memory, and better in one.
    """

    arm: Arm
    runs: Mapping[int, RunFigures]
    failures: Mapping[int, str]
    verdict: Verdict | None = None
    test: Paired | None = None
    time: Ratio | None = None
    whole: Ratio | None = None
    memory: Ratio | None = None
    reached: Mapping[int, float | None] = field(default_factory=dict)
    target: Ratio | None = None
    pareto: bool = False

    def mean(self, name: str) -> float | None:
        """Mean over seeds of a figure of the runs; None without runs."""
        values = [float(getattr(run, name)) for run in self.runs.values()]
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        """Standard deviation over seeds of a figure; None for fewer than two runs."""
        values = [float(getattr(run, name)) for run in self.runs.values()]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def reached_s(self) -> float | None:
        """Median over seeds of the seconds until the target; None if that run never got there."""
        if not self.reached:
            return None
        times = sorted(math.inf if t is None else t for t in self.reached.values())
        middle = statistics.median_high(times)  # of an even number the later: never is never
        return middle if math.isfinite(middle) else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A study as far as it has come.

    Attributes:
        spec: the study.
        arms: figures, strategies first, then controls.
        missing: runs that are not finished, as "arm, seed n".
        target: validation accuracy of `ArmFigures.target`: as it was declared, else the
            reference's mean less the margin.
        best: the arm with the best mean, and which others cannot be told from it.
        choice: name of the arm to take, or "" before anything can be said.
        because: why, in a sentence.
        spent_s: seconds of training of all runs together.
        reference_s: mean seconds of training of one run of the reference.
        notes: what the reader should know of how far the runs compare; a sentence each.
    """

    spec: StudySpec
    arms: tuple[ArmFigures, ...]
    missing: tuple[str, ...]
    target: float | None
    best: Winner | None
    choice: str
    because: str
    spent_s: float
    reference_s: float | None
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ArmFigures:
        return next(found for found in self.arms if found.arm.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, numbers that are none as strings."""
        return _io.finite_json(asdict(self))


def analyse(
    path: str | Path,
    *,
    reference: str | None = None,
    margin: float | None = None,
    level: float | None = None,
    target: float | None = None,
) -> Comparison:
    """Read a study's records and compare its arms; nothing is run.

    Decisions rest on validation accuracy; test accuracy is shown beside. Intervals and verdicts
    are those of `frostline.study.statistics.compare_arms`: they hold for all arms together. Arms
    with a run that failed or is not finished get no verdict, for leaving such runs out would
    flatter them.

    Args:
        path: the study's folder.
        reference: compare with this arm instead of the declared one.
        margin: instead of the declared one. A margin chosen after looking proves nothing.
        level: instead of the declared one.
        target: validation accuracy to take times to, (0, 1], instead of the declared one.

    Raises:
        DataError: no study there.
        ConfigError: no such arm, or a number out of range.
        DamagedFile: a record is damaged.
    """
    folder = StudyFolder(Path(path))
    declared = folder.spec()
    given = {"reference": reference, "margin": margin, "level": level, "target": target}
    spec = replace(declared, **{key: value for key, value in given.items() if value is not None})
    read = {key: _read(folder, key) for key in run_order(spec) if folder.done(key)}
    charged = charges({key: of.cache for key, of in read.items()})
    arms = tuple(_figures(folder, spec, arm, read, charged) for arm in spec.arms)
    whole = {found.arm.name: found for found in arms if len(found.runs) == len(spec.seeds)}
    missing = tuple(
        f"{key.arm}, seed {key.seed}" for key in run_order(spec) if not folder.finished(key)
    )
    notes = (*_changed(declared, spec), *_unlike(spec, read))
    spent = sum(run.training_s for found in arms for run in found.runs.values())
    if (base := whole.get(spec.reference)) is None:
        because = f"{spec.reference}, with which all are compared, is not finished"
        return Comparison(spec, arms, missing, None, None, "", because, spent, None, notes)
    goal = (base.mean("val_accuracy") or 0.0) - spec.margin if spec.target is None else spec.target
    arms = _compared(arms, whole, folder, spec, goal)
    interest = {f.arm.name: _scores(f) for f in whole.values() if f.arm.control is None}
    best = winner(interest, level=spec.level) if len(interest) > 1 else None
    done = {name: found for name, found in ((f.arm.name, f) for f in arms) if name in whole}
    choice, because = _choose(done, spec)
    seconds = base.mean("training_s")
    return Comparison(spec, arms, missing, goal, best, choice, because, spent, seconds, notes)


# -- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Read:
    """What is kept of the record of a finished run.

    Attributes:
        figures: not charged yet.
        cache: what it stored and found stored.
        val: validation samples: how many, and digests of them.
        made_with: versions, device, threads.
    """

    figures: RunFigures
    cache: Mapping[str, Any] | None
    val: Mapping[str, Any]
    made_with: Mapping[str, str]


def _read(folder: StudyFolder, key: TrialKey) -> _Read:
    record = read_run(folder.run(key))
    header = record.header
    made_with = {name: str(header["costs"].get(name)) for name in _ENVIRONMENT}
    return _Read(
        figures=_run_figures(record),
        cache=record.summary.get("cache"),
        val=header.get("data", {}).get("val", {}),
        made_with=made_with | {"frostline": str(header.get("frostline"))},
    )


#: What times depend on, as records have it.
_ENVIRONMENT = ("machine", "device", "threads", "torch", "python")


def _figures(
    folder: StudyFolder,
    spec: StudySpec,
    arm: Arm,
    read: Mapping[TrialKey, _Read],
    charged: Mapping[TrialKey, float],
) -> ArmFigures:
    runs, failures = {}, {}
    for seed in spec.seeds:
        key = TrialKey(arm.name, seed)
        if folder.failure(key).is_file():
            failures[seed] = str(_io.load_json(folder.failure(key))["why"])
        elif key in read:
            run = read[key].figures
            more = {n: getattr(run, n) + charged[key] for n in ("alone_s", "whole_s")}
            runs[seed] = replace(run, **more)
    return ArmFigures(arm, runs, failures)


def _run_figures(record: RunRecord) -> RunFigures:
    summary = record.summary
    if not record.finished:
        raise DataError(
            f"analyse {record.path}",
            found="a run whose record does not reach its end",
            fix="go on with the study: the same frostline compare command",
        )
    return RunFigures(
        val_accuracy=float(summary["val_accuracy"]),
        test_accuracy=float(summary["test_accuracy"]),
        training_s=float(summary["training_s"]),
        alone_s=float(summary["training_s"]),
        whole_s=float(summary["wall_s"]),
        peak_memory_bytes=int(summary["peak_memory_bytes"]),
        backward_share=float(summary["backward_share"]),
        trained_parameter_share=float(summary["trained_parameter_share"]),
        epochs=len(record.epochs),
        curve=tuple(
            (float(line["costs"]["training_s"]), float(line["metrics"]["val_accuracy"]))
            for line in record.epochs
        ),
    )


# -- how far the runs compare --------------------------------------------------------------------


def _changed(declared: StudySpec, spec: StudySpec) -> Iterator[str]:
    """What was chosen after the runs."""
    if spec.margin != declared.margin:
        yield (
            f"a margin of {declared.margin:g} was declared; one of {spec.margin:g}, chosen after "
            "the runs, proves nothing"
        )
    for name in ("reference", "level", "target"):
        mine, theirs = getattr(spec, name), getattr(declared, name)
        if mine != theirs:
            was = "none was" if theirs is None else f"{theirs} was"
            yield f"the {name} {mine} was chosen after the runs; {was} declared"


def _unlike(spec: StudySpec, read: Mapping[TrialKey, _Read]) -> Iterator[str]:
    """Where runs are not alike, or too few samples stand behind an accuracy."""
    for seed in spec.seeds:
        of = {key.arm: found.val for key, found in read.items() if key.seed == seed}
        first = spec.reference if spec.reference in of else next(iter(of), "")
        if others := [name for name, val in of.items() if val != of[first]]:
            yield (
                f"validation samples of {few(others)} are not those of {first} with seed {seed}: "
                "their difference is of data, too"
            )
    counts = [int(found.val["samples"]) for found in read.values() if "samples" in found.val]
    if counts and len(spec.arms) > 1 and spec.margin < 1 / min(counts):
        yield (
            f"a run is judged by {min(counts)} validation samples, so that one of them is "
            f"{1 / min(counts):.2g} of accuracy, more than the margin of {spec.margin:g}"
        )
    for name in (*_ENVIRONMENT, "frostline"):
        values = sorted({found.made_with[name] for found in read.values()})
        if len(values) > 1:
            yield f"runs differ in {name} ({few(values)}): their times and memory do not compare"
    late = [name for name in spec.added if any(key.arm == name for key in read)]
    if late:
        yield (
            f"{few(late)} joined when others had run, and did not take turns with them: times may "
            "differ by what else the machine did"
        )


# -- comparing -----------------------------------------------------------------------------------


def _scores(figures: ArmFigures, name: str = "val_accuracy") -> dict[int, float]:
    return {seed: float(getattr(run, name)) for seed, run in figures.runs.items()}


def _compared(
    arms: tuple[ArmFigures, ...],
    whole: Mapping[str, ArmFigures],
    folder: StudyFolder,
    spec: StudySpec,
    target: float,
) -> tuple[ArmFigures, ...]:
    base = whole[spec.reference]
    verdicts: dict[str, Verdict] = {}
    if len(whole) > 1:
        scores = {name: _scores(found) for name, found in whole.items()}
        found = compare_arms(scores, spec.reference, margin=spec.margin, level=spec.level)
        verdicts = {verdict.arm: verdict for verdict in found}
    points = {
        name: [f.mean("val_accuracy"), f.mean("whole_s"), f.mean("peak_memory_bytes")]
        for name, f in whole.items()
    }
    front = pareto_front(points, ["max", "min", "min"])

    def against(figures: ArmFigures, of: Callable[[RunFigures], float | None]) -> Ratio:
        return ratio(
            {seed: of(run) for seed, run in figures.runs.items()},
            {seed: of(run) for seed, run in base.runs.items()},
            level=spec.level,
        )

    def complete(figures: ArmFigures) -> ArmFigures:
        name = figures.arm.name
        if name not in whole:
            return figures
        reached = {seed: _reached(run, target) for seed, run in figures.runs.items()}
        figures = replace(figures, pareto=name in front, reached=reached)
        if name == spec.reference:
            return figures
        return replace(
            figures,
            verdict=verdicts.get(name),
            test=_test_difference(folder, figures, base, spec),
            time=against(figures, lambda run: run.alone_s),
            whole=against(figures, lambda run: run.whole_s),
            memory=against(figures, lambda run: float(run.peak_memory_bytes)),
            target=against(figures, lambda run: _reached(run, target)),
        )

    return tuple(complete(figures) for figures in arms)


def _reached(run: RunFigures, target: float) -> float | None:
    """Seconds until the target, with what was found stored charged before the first epoch."""
    seconds = time_to_target(run.curve, target)
    return None if seconds is None else seconds + run.alone_s - run.training_s


def _test_difference(
    folder: StudyFolder, arm: ArmFigures, base: ArmFigures, spec: StudySpec
) -> Paired | None:
    places = [
        [folder.run(TrialKey(f.arm.name, seed)) / "predictions.csv" for seed in spec.seeds]
        for f in (arm, base)
    ]
    if not all(path.is_file() for paths in places for path in paths):
        return None
    tables = [[_outcomes(path) for path in paths] for paths in places]
    labels = {row[0] for rows in tables for row in rows}
    # With several labels each seed drew a test split of its own.
    if len(labels) > 1 or len(next(iter(labels))) < 2:
        return None
    mine, theirs = (np.array([right for _, right in rows]) for rows in tables)
    return paired_samples(mine, theirs, level=spec.level)


def _outcomes(path: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Labels of the test samples, and which were predicted (1) or not (0)."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            pairs = [(line["label"], line["predicted"]) for line in csv.DictReader(file)]
    except (KeyError, ValueError) as error:  # ValueError: not UTF-8
        raise DamagedFile(
            f"read {path}",
            found=f"no table with the columns label and predicted ({error})",
            fix="remove the file to do without it",
        ) from error
    right = [int(label == predicted) for label, predicted in pairs]
    return tuple(label for label, _ in pairs), np.array(right, np.int64)


def _choose(arms: Mapping[str, ArmFigures], spec: StudySpec) -> tuple[str, str]:
    """The arm to take: the fastest of those within the margin of the best that is good enough.

    Good enough are the reference and the arms that were shown to be better, or not worse.
    """
    enough = [
        name
        for name, found in arms.items()
        if found.arm.control is None
        and (
            name == spec.reference
            or (found.verdict is not None and found.verdict.kind in ("better", "not worse"))
        )
    ]
    if spec.reference not in enough:
        enough.append(spec.reference)
    means = {name: arms[name].mean("val_accuracy") or 0.0 for name in enough}
    best = max(means.values())
    near = [name for name in enough if means[name] >= best - spec.margin]
    choice = min(near, key=lambda name: (arms[name].mean("alone_s") or 0.0, name))
    return choice, _why(choice, arms, spec)


def _why(choice: str, arms: Mapping[str, ArmFigures], spec: StudySpec) -> str:
    found = arms[choice]
    if choice == spec.reference:
        others = len([f for f in arms.values() if f.arm.control is None]) - 1
        if not others:
            return f"{choice} is the only strategy"
        if len(spec.seeds) < 2:
            return f"{choice}: one seed shows no other strategy to be as good"
        return f"{choice}: no other strategy was shown to be as good and is faster"
    verdict = "" if found.verdict is None else found.verdict.sentence
    cost = "" if found.time is None else f"; {found.time.sentence}"
    return f"{choice}, against {spec.reference}: {verdict}{cost}"
