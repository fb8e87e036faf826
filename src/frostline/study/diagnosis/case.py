"""All that a diagnosis has to go on: the runs, what they are held against, probe and curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frostline.errors import UsageError, few
from frostline.records import RunRecord
from frostline.study.diagnosis.weights import measured_weight
from frostline.study.run_facts import MEASURES, RunFacts, differing_settings, read_facts
from frostline.tasks.config import RunConfig

if TYPE_CHECKING:
    from frostline.study.diagnosis.probing import ProbeCurve, ProbePoint
    from frostline.study.learning_curve import LearningCurve

__all__ = [
    "LENGTH",
    "POLICY",
    "RATE",
    "SAME_SHARE",
    "Case",
    "Reference",
    "difference",
    "place",
    "references_of",
]

#: Shares of trained parameters of the backbone that differ by less are the same.
SAME_SHARE = 0.02
POLICY = frozenset({"policy", "live_norm", "live_dropout"})
RATE = frozenset({"lr", "head_lr", "lr_decay"})
LENGTH = frozenset({"epochs", "budget", "patience"})


@dataclass(frozen=True, slots=True)
class Reference:
    """Runs of another strategy, against the runs in question.

    Attributes:
        facts: the runs.
        differing: settings in which they differ.
        gain: their validation accuracy less that of the runs in question.
        error: its standard error: over seeds, and over validation samples as if the two had
            nothing in common, which is the most it can be.
    """

    facts: tuple[RunFacts, ...]
    differing: frozenset[str]
    gain: float
    error: float

    @property
    def config(self) -> RunConfig:
        """Settings of the first of them."""
        return self.facts[0].config

    @property
    def share(self) -> float:
        """Share of the backbone that trained."""
        return statistics.fmean(f.share for f in self.facts)

    @property
    def updates(self) -> float:
        """Updates made."""
        return statistics.fmean(f.steps[-1] for f in self.facts)

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return statistics.fmean(f.seconds[-1] for f in self.facts)

    @property
    def told(self) -> str:
        """The difference for people."""
        runs = len(self.facts)
        return (
            f"{100 * abs(self.gain):.1f} points {'better' if self.gain >= 0 else 'worse'} "
            f"(standard error {100 * self.error:.1f}, {runs} run{'s' if runs > 1 else ''})"
        )

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that it has and the runs in question have not; of a policy, that alone."""
        names = self.differing - LENGTH if self.differing & POLICY else self.differing
        return {name: getattr(self.config, name) for name in sorted(names)}

    @property
    def change(self) -> str:
        """The same for people."""
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.changed.items())

    @property
    def weight(self) -> float:
        """How much it speaks for what was changed; being shorter excuses being worse."""
        weight = measured_weight(self.gain, self.error, 4.0)
        shorter = bool(self.differing & POLICY and self.differing & LENGTH)
        return weight / 2 if weight < 0 and shorter else weight


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def references_of(
    facts: tuple[RunFacts, ...], records: Iterable[RunRecord], notes: list[str]
) -> tuple[Reference, ...]:
    """Other runs by strategy; what cannot be used is noted."""
    own = {f.path.resolve() for f in facts}
    groups: list[list[RunFacts]] = []
    for record in records:
        if record.path.resolve() in own:
            continue
        other = read_facts(record)
        if other.header["labels"] != facts[0].header["labels"]:
            raise UsageError(
                f"hold a run against {other.path}",
                found="a run of another task: its classes differ",
                fix="a reference on the same data",
            )
        if other.failure or not other.epochs:
            notes.append(f"left aside, as it failed: {other.path}")
            continue
        same = next((g for g in groups if not differing_settings(g[0], other)), None)
        if same is None:
            groups.append([other])
        else:
            same.append(other)
    found = []
    for of in groups:
        differing = differing_settings(facts[0], of[0])
        if (why := _unclear(facts[0], of[0], differing)) is not None:
            notes.append(f"left aside, {why}: {of[0].path}")
            continue
        found.append(Reference(tuple(of), differing, *difference(of, facts)))
    return tuple(found)


def _unclear(one: RunFacts, other: RunFacts, differing: frozenset[str]) -> str | None:
    """Why what another run shows is not clear, or None."""
    if not one.epochs:
        return "as the run itself failed"
    if not differing:
        return "as it is of the same settings"
    if not (differing <= POLICY | LENGTH or differing <= RATE):
        return f"as it differs in more than one respect ({few(sorted(differing))})"
    if differing & POLICY and differing & LENGTH and other.planned_steps > one.planned_steps:
        return "as it differs in its policy and is longer"
    return None


def difference(of: Sequence[RunFacts], facts: Sequence[RunFacts]) -> tuple[float, float]:
    """Mean of the best validation accuracies of some runs less that of others, and its error."""
    best = [[f.accuracy[f.best] for f in some if f.epochs] for some in (of, facts)]
    mean = [statistics.fmean(values) for values in best]
    variance = sum(
        p * (1 - p) / some[0].val_samples for p, some in zip(mean, (of, facts), strict=True)
    )
    seeds = [
        statistics.variance(values) / len(values) if len(values) > 1 else 0.0 for values in best
    ]
    # Accuracies of 0 or 1 have no spread of their own, and are not certain for that.
    least = 1 / max(some[0].val_samples for some in (of, facts))
    return mean[0] - mean[1], math.sqrt(variance + sum(seeds) + least**2)


@dataclass(frozen=True)
class Case:
    """All that a diagnosis has to go on.

    Attributes:
        facts: the runs.
        references: other strategies.
        probe: of the pretrained network, or None.
        curve: of the data, or None.
        notes: what was left aside.
    """

    facts: tuple[RunFacts, ...]
    references: tuple[Reference, ...]
    probe: ProbeCurve | None
    curve: LearningCurve | None
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> RunFacts:
        """The first run, for what they have in common."""
        return self.facts[0]

    @property
    def trained(self) -> tuple[RunFacts, ...]:
        """Runs with at least one epoch."""
        return tuple(f for f in self.facts if f.epochs)

    @property
    def accuracies(self) -> list[float]:
        """Of the best epoch of each run."""
        return [f.accuracy[f.best] for f in self.trained]

    @property
    def accuracy(self) -> float:
        """Their mean."""
        return statistics.fmean(self.accuracies)

    @property
    def error(self) -> float:
        """Standard error of the accuracy, over validation samples."""
        p, count = self.accuracy, self.first.val_samples
        return math.sqrt(max(p * (1 - p), 1 / count) / count)

    @property
    def share(self) -> float:
        """Share of the backbone that trained, mean over updates and runs."""
        return statistics.fmean(f.share for f in self.facts)

    def mean(self, name: str) -> float | None:
        """Mean of a measure over the runs that have it; None without any."""
        return MEASURES[name].mean(self.facts)

    def freer(self) -> list[Reference]:
        """References that train more of the backbone."""
        return [r for r in self._by_policy() if r.share > self.share + SAME_SHARE]

    def tighter(self) -> list[Reference]:
        """References that freeze more of it."""
        return [r for r in self._by_policy() if r.share < self.share - SAME_SHARE]

    def _by_policy(self) -> list[Reference]:
        return [r for r in self.references if r.differing & POLICY]

    def by_rate(self, *, higher: bool) -> list[Reference]:
        """References with a higher, or a lower, learning rate and nothing else."""
        return [
            r
            for r in self.references
            if r.differing <= RATE and (_peak(r.config) > _peak(self.first.config)) == higher
        ]

    def by_length(self, *, longer: bool) -> list[Reference]:
        """References that trained longer, or shorter, and differ in nothing else."""
        mine = self.mean("updates") or 0.0
        return [
            r
            for r in self.references
            if r.differing <= LENGTH and (r.updates > mine if longer else r.updates < mine)
        ]


def _peak(config: RunConfig) -> float:
    """Geometric mean of the peak learning rates."""
    return math.sqrt((config.lr or 1e-9) * (config.head_lr or 1e-9))


def place(case: Case, point: ProbePoint) -> int:
    """Place of a probed group in the backbone, from 0."""
    backbone = case.first.backbone
    if point.group in backbone:
        return backbone.index(point.group)
    return min(point.depth, len(backbone))
