"""Quality, cost and curves per strategy, seeds together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from frostline.records import RunRecord
from frostline.report.costs import predicted_share
from frostline.report.read import ReportRun, Runs

__all__ = ["METRICS", "ArmResult", "CurvePoint", "RunResult", "arm_results", "curves"]

#: Metrics of an epoch that are drawn, and what they are called.
METRICS: Mapping[str, str] = {
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "train_loss": "training loss",
}


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run in figures; one that the record does not have is None.

    Attributes:
        name: of the run.
        arm: its strategy.
        seed: its seed.
        finished: whether it came to its end; else the figures are those so far.
        val_accuracy: of the best epoch, in [0, 1].
        test_accuracy: of the same weights, in [0, 1].
        training_s: seconds of training with validation; what it found stored by other runs of its
            study is charged at the price that storing it had.
        wall_s: seconds of the whole run, charged alike.
        peak_memory_bytes: the most memory in use.
        backward_share: backward work done, mean over updates, in [0, 1].
        trained_parameter_share: parameters that trained, mean over updates, in [0, 1].
        steps: updates.
        epochs: epochs.
        predicted_share: time of a step as a multiple of full fine-tuning's, predicted.
    """

    name: str
    arm: str
    seed: int
    finished: bool
    val_accuracy: float | None
    test_accuracy: float | None
    training_s: float | None
    wall_s: float | None
    peak_memory_bytes: float | None
    backward_share: float | None
    trained_parameter_share: float | None
    steps: int
    epochs: int
    predicted_share: float | None

    @property
    def step_s(self) -> float | None:
        """Seconds of training per update."""
        return self.training_s / self.steps if self.training_s and self.steps else None


@dataclass(frozen=True, slots=True)
class ArmResult:
    """A strategy over its seeds.

    Attributes:
        name: its name.
        policy: short form of its policy.
        runs: one per seed.
        control: which control of another strategy it is, or "".
        reference: whether the others are compared with it.
        chosen: whether the study says to take it.
        pareto: whether no other strategy is at least as good in validation accuracy, time of the
            run and memory, and better in one.
        verdict: "better", "not worse", "worse", "undecided", or "" where nothing was compared.
        sentence: the same for people, with numbers.
        difference: in validation accuracy to the reference, with the ends of its interval; None
            where there is none.
        time_ratio: training time as a multiple of the reference's, with the ends of its interval.
        measured_share: time of an update as a multiple of the reference's, mean over seeds, where
            the reference is full fine-tuning.
    """

    name: str
    policy: str
    runs: tuple[RunResult, ...]
    control: str = ""
    reference: bool = False
    chosen: bool = False
    pareto: bool = False
    verdict: str = ""
    sentence: str = ""
    difference: tuple[float, float | None, float | None] | None = None
    time_ratio: tuple[float, float | None, float | None] | None = None
    measured_share: float | None = None

    def values(self, name: str) -> list[float]:
        """A figure of each run that has it."""
        found = [getattr(run, name) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def mean(self, name: str) -> float | None:
        """Mean over seeds; None where no run has the figure."""
        values = self.values(name)
        return statistics.fmean(values) if values else None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A metric of a strategy after an epoch, over its seeds.

    Attributes:
        arm: the strategy.
        metric: of `METRICS`.
        epoch: epochs complete.
        seconds: seconds of training until then, mean; None where they were not recorded.
        mean: over the seeds that got so far.
        low: the smallest.
        high: the largest.
        seeds: how many got so far.
    """

    arm: str
    metric: str
    epoch: int
    seconds: float | None
    mean: float
    low: float
    high: float
    seeds: int


def curves(runs: Iterable[ReportRun]) -> tuple[CurvePoint, ...]:
    """Metrics by epoch, arm by arm; values that are no finite number are left out."""
    found: dict[tuple[str, str, int], list[tuple[float | None, float]]] = {}
    for run in runs:
        for line in run.record.epochs:
            seconds = line["costs"].get("training_s")
            for metric in METRICS:
                value = float(line["metrics"].get(metric, math.nan))
                if math.isfinite(value):
                    key = (run.arm, metric, int(line["epoch"]))
                    found.setdefault(key, []).append((seconds, value))
    points = []
    for (arm, metric, epoch), pairs in found.items():
        values = [value for _, value in pairs]
        times = [seconds for seconds, _ in pairs if seconds is not None]
        points.append(
            CurvePoint(
                arm=arm,
                metric=metric,
                epoch=epoch,
                seconds=statistics.fmean(times) if times else None,
                mean=statistics.fmean(values),
                low=min(values),
                high=max(values),
                seeds=len(values),
            )
        )
    return tuple(points)


def arm_results(runs: Runs) -> tuple[ArmResult, ...]:
    """The strategies, with verdicts where a study or at least two seeds in common allow them.

    Runs that were not declared as a study are compared by seed, each with the reference alone,
    and get a difference with an interval but no verdict: no margin was declared before them.
    """
    arms = [
        ArmResult(
            name=name,
            policy=str(runs.of(name)[0].config["policy"]),
            runs=tuple(_run_result(run) for run in runs.of(name)),
            reference=name == runs.reference,
        )
        for name in runs.arms
    ]
    if runs.learning:  # strategies at several sizes do not compete
        return tuple(replace(arm, reference=False) for arm in arms)
    judged = _judged_by_study(arms, runs) if runs.comparison else _judged_by_seed(arms)
    return tuple(_with_measured(_with_front(judged)))


def _run_result(run: ReportRun) -> RunResult:
    record, summary = run.record, run.record.summary
    last = record.epochs[-1] if record.epochs else {"step": 0, "costs": {}}
    return RunResult(
        name=run.name,
        arm=run.arm,
        seed=run.seed,
        finished=record.finished,
        val_accuracy=_number(summary.get("val_accuracy", _best(record))),
        test_accuracy=_number(summary.get("test_accuracy")),
        training_s=_number(summary.get("training_s", last["costs"].get("training_s"))),
        wall_s=_number(summary.get("wall_s", last["costs"].get("wall_s"))),
        peak_memory_bytes=_number(
            summary.get("peak_memory_bytes", last["costs"].get("peak_memory_bytes"))
        ),
        backward_share=_number(summary.get("backward_share")),
        trained_parameter_share=_number(summary.get("trained_parameter_share")),
        steps=int(summary.get("steps", last["step"])),
        epochs=len(record.epochs),
        predicted_share=predicted_share(record),
    )


def _best(record: RunRecord) -> float | None:
    seen = [_number(line["metrics"].get("val_accuracy")) for line in record.epochs]
    return max((value for value in seen if value is not None), default=None)


def _number(value: Any) -> float | None:
    """A finite number, or None; records write others as strings."""
    return None if value is None or not math.isfinite(float(value)) else float(value)


# -- what is said of an arm --------------------------------------------------------------------


def _judged_by_study(arms: Sequence[ArmResult], runs: Runs) -> list[ArmResult]:
    assert runs.comparison is not None  # noqa: S101  the caller looked
    judged = []
    for arm in arms:
        found = runs.comparison[arm.name]
        verdict, time = found.verdict, found.time
        charge = {s: run.alone_s - run.training_s for s, run in found.runs.items()}
        paired = verdict and verdict.paired
        judged.append(
            replace(
                arm,
                runs=tuple(_charged(run, charge.get(run.seed, 0.0)) for run in arm.runs),
                control=found.arm.control or "",
                # One seed shows no winner, so nothing is to be taken on its word.
                chosen=arm.name == runs.comparison.choice and len(runs.comparison.spec.seeds) > 1,
                verdict=verdict.kind if verdict else "",
                sentence=verdict.sentence if verdict else "",
                difference=paired and (paired.difference, paired.low, paired.high),
                time_ratio=None
                if time is None or time.ratio is None
                else (time.ratio, time.low, time.high),
            )
        )
    return judged


def _charged(run: RunResult, seconds: float) -> RunResult:
    def add(value: float | None) -> float | None:
        return None if value is None else value + seconds

    return replace(run, training_s=add(run.training_s), wall_s=add(run.wall_s))


def _judged_by_seed(arms: Sequence[ArmResult]) -> list[ArmResult]:
    base = next((arm for arm in arms if arm.reference), None)
    if base is None:
        return list(arms)
    return [arm if arm is base else _against(arm, base) for arm in arms]


def _against(arm: ArmResult, base: ArmResult) -> ArmResult:
    def by_seed(of: ArmResult, get: Callable[[RunResult], float | None]) -> dict[int, float]:
        found = {run.seed: get(run) for run in of.runs if run.finished}
        return {seed: value for seed, value in found.items() if value is not None}

    mine, theirs = (by_seed(a, lambda r: r.val_accuracy) for a in (arm, base))
    times, base_times = (by_seed(a, lambda r: r.training_s) for a in (arm, base))
    common = sorted(mine.keys() & theirs.keys() & times.keys() & base_times.keys())
    if not common:
        return replace(arm, sentence=f"no finished run with a seed that {base.name} has, too")
    if len(common) < 2 or find_spec("scipy") is None:
        why = (
            "one seed says nothing of chance"
            if len(common) < 2
            else "for intervals: pip install 'frostline[study]'"
        )
        difference = statistics.fmean(mine[s] - theirs[s] for s in common)
        share = math.exp(statistics.fmean(math.log(times[s] / base_times[s]) for s in common))
        return replace(
            arm,
            sentence=f"{100 * difference:+.1f} points against {base.name}; {why}",
            difference=(difference, None, None),
            time_ratio=(share, None, None),
        )
    from frostline.study.statistics import paired, ratio, verdict  # noqa: PLC0415

    found, time = paired(mine, theirs), ratio(times, base_times)
    return replace(
        arm,
        sentence=verdict(found, 0.0).sentence,
        difference=(found.difference, found.low, found.high),
        time_ratio=None if time.ratio is None else (time.ratio, time.low, time.high),
    )


def _with_front(arms: Sequence[ArmResult]) -> list[ArmResult]:
    """Marks the arms that no other one beats, among those with all three figures."""
    points: dict[str, tuple[float, ...]] = {}
    for arm in arms:
        quality, seconds, memory = (
            arm.mean(name) for name in ("val_accuracy", "wall_s", "peak_memory_bytes")
        )
        if quality is not None and seconds is not None and memory is not None:
            points[arm.name] = (-quality, seconds, memory)  # less is better in each

    def beaten(name: str) -> bool:
        mine = points[name]
        return any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in points.values()
        )

    return [
        replace(arm, pareto=len(arms) > 1 and arm.name in points and not beaten(arm.name))
        for arm in arms
    ]


def _with_measured(arms: Sequence[ArmResult]) -> list[ArmResult]:
    """Adds the measured time of an update against full fine-tuning, seed by seed."""
    base = next((arm for arm in arms if arm.policy == "full" and not arm.control), None)
    theirs = {run.seed: run.step_s for run in base.runs} if base else {}

    def share(arm: ArmResult) -> float | None:
        shares = [
            run.step_s / full
            for run in arm.runs
            if run.step_s is not None and (full := theirs.get(run.seed))
        ]
        return statistics.fmean(shares) if shares else None

    return [replace(arm, measured_share=share(arm)) for arm in arms]
