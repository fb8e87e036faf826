"""What limits a run, and what to do next: findings, each with its evidence for and against.

No finding rests on one number. A piece of evidence has a weight, in natural logarithms of odds:
how much more likely what was seen is where the finding is true than where it is not (Good 1950,
"Probability and the Weighing of Evidence"; weights of independent pieces add up). The weights are
ours, graded and bounded, and no more than a way to add unlike things; how often the findings are
right was measured on planted faults (`benchmarks/results/diagnosis.md`). A finding is made where
its evidence outweighs a doubt that stands against all of them, and two pieces speak for it or one
that was measured for the purpose: runs with another setting, a probe, a learning curve. What
curves and settings say against a finding is bounded, as they are all of one run.

Training and validation loss are compared with care: see `frostline.study.run_facts`. Augmentation
and dropout only raise the training loss, so a gap between the two counts as a lower bound, and the
absence of one for little.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from frostline import _io
from frostline.errors import UsageError, few
from frostline.records import RunRecord, read_run
from frostline.study.run_facts import MEASURES, RunFacts, differing_settings, read_facts
from frostline.tasks.config import RunConfig
from frostline.tasks.run import Run

if TYPE_CHECKING:
    from frostline.study.learning_curve import LearningCurve
    from frostline.study.probes import ProbeCurve, ProbePoint
    from frostline.study.statistics import Paired

__all__ = ["Action", "Diagnosis", "Evidence", "Finding", "Gain", "Kind", "Source", "diagnose"]

#: What can be found.
Kind = Literal[
    "too much frozen",
    "too little frozen",
    "learning rate too high",
    "learning rate too low",
    "stopped too early",
    "trained longer than needed",
    "head not converged",
    "wrong layer depth",
    "too little data",
    "nothing wrong",
]
#: Where a piece of evidence comes from. The last four were measured for the purpose, or leave no
#: doubt (a run that failed).
Source = Literal["curves", "settings", "failure", "reference", "probe", "learning curve"]
Runs = Run | RunRecord | str | Path | Sequence[Run | RunRecord | str | Path]

_MEASURED = ("failure", "reference", "probe", "learning curve")
_FORMAT = 1
#: What stands against any finding before evidence is seen: odds of about one to four.
_DOUBT = 1.5
#: The most that curves and settings can say against a finding, all together.
_LEAST = -1.5
#: Differences in accuracy below this matter to nobody.
_MATTERS = 0.015
#: Shares of trained parameters of the backbone that differ by less are the same.
_SAME_SHARE = 0.02
#: A piece of evidence below this weight is neutral.
_NEUTRAL = 0.15
_POLICY = frozenset({"policy", "live_norm", "live_dropout"})
_RATE = frozenset({"lr", "head_lr", "lr_decay"})
_LENGTH = frozenset({"epochs", "budget", "patience"})


# -- what is said ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that speaks for or against a finding.

    Attributes:
        source: where it comes from.
        says: what was seen, with its numbers.
        values: these numbers by name; units in the name, losses as shares of the chance loss.
        weight: natural logarithm of odds; above 0 for the finding, below 0 against it.

    Example:
        >>> Evidence("curves", "the loss rose by 0.3", {"rise": 0.3}, 1.2).strength
        'strongly for'
    """

    source: Source
    says: str
    values: Mapping[str, float]
    weight: float

    @property
    def strength(self) -> str:
        """The weight in words: strongly, clearly or weakly for or against, or neutral."""
        size = abs(self.weight)
        if size < _NEUTRAL:
            return "neutral"
        word = "strongly" if size >= 1.2 else "clearly" if size >= 0.6 else "weakly"
        return f"{word} {'for' if self.weight > 0 else 'against'}"


@dataclass(frozen=True, slots=True)
class Action:
    """What to do next.

    Attributes:
        settings: of `RunConfig`, to be changed; empty where no setting is the answer.
        text: the same for people.

    Example:
        >>> Action({"policy": "first:groups=6"}, "policy=first:groups=6").text
        'policy=first:groups=6'
    """

    settings: Mapping[str, Any]
    text: str


@dataclass(frozen=True, slots=True)
class Gain:
    """What the action can be expected to bring.

    Attributes:
        accuracy: validation accuracy, as a share of samples; None where nothing says it.
        time_share: share of the training time saved, [0, 1); None where nothing says it.
        basis: what says it, or why nothing does.
    """

    accuracy: float | None
    time_share: float | None
    basis: str

    def sentence(self) -> str:
        """The same for people.

        Example:
            >>> Gain(0.034, None, "a run with it").sentence()
            '+3.4 points of accuracy (a run with it)'
        """
        parts = []
        if self.accuracy is not None:
            parts.append(f"{100 * self.accuracy:+.1f} points of accuracy")
        if self.time_share is not None:
            parts.append(f"{100 * self.time_share:.0f} % of the training time saved")
        return f"{' and '.join(parts) or 'not known'} ({self.basis})"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that limits the run, as far as it is shown.

    Attributes:
        kind: what.
        evidence: for and against, the weightiest first.
        missing: what would settle it, the most telling first.
        action: what to do next; None where nothing is wrong.
        gain: what that can be expected to bring; None where nothing is wrong.
    """

    kind: Kind
    evidence: tuple[Evidence, ...]
    missing: tuple[str, ...]
    action: Action | None
    gain: Gain | None

    @property
    def weight(self) -> float:
        """All evidence together, less the doubt; above 0 where it is more likely true.

        What curves and settings say against it is bounded: they are of one run, and what does not
        show in them may be there all the same.
        """
        against = [e.weight for e in self.evidence if e.weight < 0 and e.source not in _MEASURED]
        rest = sum(e.weight for e in self.evidence) - sum(against)
        return rest + max(_LEAST, sum(against)) - _DOUBT

    @property
    def made(self) -> bool:
        """Whether the evidence suffices: it outweighs the doubt, and is more than one number."""
        speaking = [e for e in self.evidence if e.weight >= _NEUTRAL]
        measured = any(e.source in _MEASURED for e in speaking)
        return self.weight > 0 and (measured or len(speaking) > 1)

    @property
    def strength(self) -> str:
        """The weight in words: "strong", "fair" or "weak" evidence; "none" if it is not made."""
        if not self.made:
            return "none"
        return "strong" if self.weight >= 2 else "fair" if self.weight >= 0.75 else "weak"

    def sentence(self) -> str:
        """The finding, its weightiest evidence and the next action."""
        if self.kind == "nothing wrong":
            seen = "; ".join(e.says for e in self.evidence[:3])
            return f"Nothing wrong is shown: {seen}."
        seen = "; ".join(e.says for e in self.evidence if e.weight > 0)
        text = f"{self.kind.capitalize()} ({self.strength} evidence): {seen}."
        if self.action is not None and self.gain is not None:
            text += f" Next: {self.action.text}. Expected: {self.gain.sentence()}."
        return text

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        words = [asdict(e) | {"strength": e.strength} for e in self.evidence]
        derived = {"weight": self.weight, "made": self.made, "strength": self.strength}
        return asdict(self) | derived | {"evidence": words}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What limits a run, or several of one strategy.

    Attributes:
        runs: folders of the runs.
        policy: what they froze.
        val_accuracy: mean over the runs of the best epoch's; None where none was evaluated.
        findings: what is found, by weight; "nothing wrong" alone where that is so.
        considered: what is not found, with its evidence, by weight.
        notes: what was left aside, and why.
    """

    runs: tuple[str, ...]
    policy: str
    val_accuracy: float | None
    findings: tuple[Finding, ...]
    considered: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The findings in words, the weightiest first."""
        return " ".join(finding.sentence() for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        own = {
            "format": _FORMAT,
            "runs": list(self.runs),
            "policy": self.policy,
            "val_accuracy": self.val_accuracy,
            "sentence": self.sentence(),
            "notes": list(self.notes),
        }
        parts = {"findings": self.findings, "considered": self.considered}
        found = own | {name: [f.to_json() for f in part] for name, part in parts.items()}
        return _io.finite_json(found)


def diagnose(
    run_or_runs: Runs,
    *,
    reference: Runs | None = None,
    probe: ProbeCurve | None = None,
    curve: LearningCurve | None = None,
) -> Diagnosis:
    """Find what limits a run, from its record and whatever was measured besides.

    The record alone tells least. Most telling are other runs on the same data that differ in one
    respect (policy, learning rate or length), a probe of the pretrained network, and a learning
    curve that has the policy in it. A diagnosis without them says what they would settle.

    Args:
        run_or_runs: one run, or several of the same settings with other seeds; a folder, a `Run` or
            a record. It need not be finished.
        reference: runs to hold it against, of any strategies: a short full fine-tuning, say. They
            may differ from it in the policy (and be shorter), in the learning rates, or in
            length; others are left aside with a note.
        probe: of the pretrained network on this data, from `frostline.study.probes.probe_curve`.
        curve: from `frostline.study.learning_curve.learning_curve`, on this data.

    Raises:
        DataError: no record there, or runs without an epoch and without a reason for it.
        UsageError: runs of several strategies, or a probe or reference of another task.
        DamagedFile: a record cannot be read.

    Example:
        ::

            found = diagnose("runs/resnet18-linear-probe-001", reference="runs/resnet18-full-001")
            print(found.sentence())
    """
    facts = tuple(read_facts(record) for record in _records(run_or_runs))
    if not facts:
        raise UsageError("diagnose a run", found="no run", fix="one at least")
    _check_one_strategy(facts)
    notes: list[str] = []
    references = _references(facts, () if reference is None else _records(reference), notes)
    _check_probe(facts[0], probe)
    case = _Case(facts, references, probe, curve, tuple(notes))
    found = [f for rule in _RULES if (f := rule(case)) is not None]
    found = sorted((_complete(f, case) for f in found), key=lambda f: -f.weight)
    made = tuple(f for f in found if f.made)
    rest = tuple(f for f in found if not f.made)
    return Diagnosis(
        runs=tuple(str(f.path) for f in facts),
        policy=facts[0].config.policy,
        val_accuracy=case.accuracy if case.accuracies else None,
        findings=made or (_nothing_wrong(case, rest),),
        considered=rest,
        notes=case.notes,
    )


def _records(runs: Runs) -> tuple[RunRecord, ...]:
    given = [runs] if isinstance(runs, Run | RunRecord | str | Path) else list(runs)
    records = []
    for run in given:
        place = run.path if isinstance(run, Run) else run
        records.append(place if isinstance(place, RunRecord) else read_run(place))
    return tuple(records)


def _check_one_strategy(facts: Sequence[RunFacts]) -> None:
    for other in facts[1:]:
        if differing := sorted(differing_settings(facts[0], other)):
            raise UsageError(
                "diagnose runs together",
                found=f"runs of several strategies: {few(differing)} differ in {other.path}",
                fix="runs that differ in their seeds alone; others may be a reference",
            )


def _check_probe(facts: RunFacts, probe: ProbeCurve | None) -> None:
    if probe is not None and probe.classes != facts.classes:
        raise UsageError(
            "diagnose a run by a probe",
            found=f"a probe of {probe.classes} classes and a run of {facts.classes}",
            fix="a probe of the same network on the same data",
        )


# -- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reference:
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
        names = self.differing - _LENGTH if self.differing & _POLICY else self.differing
        return {name: getattr(self.config, name) for name in sorted(names)}

    @property
    def change(self) -> str:
        """The same for people."""
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.changed.items())

    @property
    def weight(self) -> float:
        """How much it speaks for what was changed; being shorter excuses being worse."""
        weight = _measured(self.gain, self.error, 4.0)
        shorter = bool(self.differing & _POLICY and self.differing & _LENGTH)
        return weight / 2 if weight < 0 and shorter else weight


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _references(
    facts: tuple[RunFacts, ...], records: Iterable[RunRecord], notes: list[str]
) -> tuple[_Reference, ...]:
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
        found.append(_Reference(tuple(of), differing, *_difference(of, facts)))
    return tuple(found)


def _unclear(one: RunFacts, other: RunFacts, differing: frozenset[str]) -> str | None:
    """Why what another run shows is not clear, or None."""
    if not one.epochs:
        return "as the run itself failed"
    if not differing:
        return "as it is of the same settings"
    if not (differing <= _POLICY | _LENGTH or differing <= _RATE):
        return f"as it differs in more than one respect ({few(sorted(differing))})"
    if differing & _POLICY and differing & _LENGTH and other.planned_steps > one.planned_steps:
        return "as it differs in its policy and is longer"
    return None


def _difference(of: Sequence[RunFacts], facts: Sequence[RunFacts]) -> tuple[float, float]:
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
class _Case:
    """All that a diagnosis has to go on.

    Attributes:
        facts: the runs.
        references: other strategies.
        probe: of the pretrained network, or None.
        curve: of the data, or None.
        notes: what was left aside.
    """

    facts: tuple[RunFacts, ...]
    references: tuple[_Reference, ...]
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

    def freer(self) -> list[_Reference]:
        """References that train more of the backbone."""
        return [r for r in self._by_policy() if r.share > self.share + _SAME_SHARE]

    def tighter(self) -> list[_Reference]:
        """References that freeze more of it."""
        return [r for r in self._by_policy() if r.share < self.share - _SAME_SHARE]

    def _by_policy(self) -> list[_Reference]:
        return [r for r in self.references if r.differing & _POLICY]

    def by_rate(self, *, higher: bool) -> list[_Reference]:
        """References with a higher, or a lower, learning rate and nothing else."""
        return [
            r
            for r in self.references
            if r.differing <= _RATE and (_peak(r.config) > _peak(self.first.config)) == higher
        ]

    def by_length(self, *, longer: bool) -> list[_Reference]:
        """References that trained longer, or shorter, and differ in nothing else."""
        mine = self.mean("updates") or 0.0
        return [
            r
            for r in self.references
            if r.differing <= _LENGTH and (r.updates > mine if longer else r.updates < mine)
        ]


def _peak(config: RunConfig) -> float:
    """Geometric mean of the peak learning rates."""
    return math.sqrt((config.lr or 1e-9) * (config.head_lr or 1e-9))


# -- weights ---------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    """How a measure speaks for a finding.

    Attributes:
        measure: its name.
        most: the largest weight that it can have, either way.
        against: the value from which on it speaks against with all of that.
        neutral: the value at which it says nothing.
        favour: the value from which on it speaks for it with all of that.
        log: whether values in between are weighed by their logarithm.
    """

    measure: str
    most: float
    against: float
    neutral: float
    favour: float
    log: bool = False

    def weight(self, value: float) -> float:
        """Of a value."""
        graded = _graded_log if self.log else _graded
        return self.most * graded(value, self.against, self.neutral, self.favour)


_SCALES: Mapping[Kind, tuple[_Scale, ...]] = {
    "too much frozen": (
        _Scale("frozen_share", 0.5, 0.0, 0.4, 1.0),
        _Scale("gap", 0.6, 0.35, 0.12, 0.0),
    ),
    "too little frozen": (
        _Scale("rise", 1.5, -0.03, 0.03, 0.2),
        _Scale("drop", 0.8, 0.0, 0.02, 0.07),
        _Scale("gap", 0.8, 0.05, 0.2, 0.5),
        _Scale("samples_per_class", 0.8, 1000.0, 100.0, 10.0, log=True),
    ),
    "learning rate too high": (
        _Scale("high_rate_loss", 2.0, 0.8, 1.1, 2.5, log=True),
        _Scale("high_rate_train_loss", 1.0, 0.3, 0.8, 1.1),
        _Scale("jitter", 0.8, 0.01, 0.1, 0.6, log=True),
        _Scale("stride", 1.2, 0.02, 0.3, 5.0, log=True),
    ),
    "learning rate too low": (
        _Scale("jitter", 0.8, 0.15, 0.05, 0.01, log=True),
        _Scale("loss_left", 0.8, 0.1, 0.4, 0.9),
        _Scale("gap", 0.4, 0.35, 0.12, 0.0),
    ),
    "stopped too early": (
        _Scale("late", 1.2, -0.02, 0.012, 0.08),
        _Scale("best_at", 1.0, 0.4, 0.85, 1.6),
        _Scale("updates", 0.9, 1000.0, 150.0, 20.0, log=True),
    ),
    "trained longer than needed": (
        _Scale("best_at", 1.2, 0.9, 0.55, 0.2),
        _Scale("lowest_at", 1.0, 0.9, 0.55, 0.2),
        _Scale("time_after_best", 0.6, 0.1, 0.4, 0.8),
        # A loss that rises after the best epoch is no idling, but overfitting.
        _Scale("rise", 1.0, 0.25, 0.05, -0.15),
    ),
    "head not converged": (
        _Scale("head_reach", 1.4, 10.0, 1.5, 0.2, log=True),
        _Scale("loss_left", 0.5, 0.1, 0.4, 0.9),
    ),
    "too little data": (
        _Scale("gap", 0.7, 0.03, 0.15, 0.5),
        _Scale("samples_per_class", 0.5, 2000.0, 200.0, 10.0, log=True),
        _Scale("accuracy_error", 0.6, 0.0, 0.05, 0.4),
    ),
}


def _clipped(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _graded(value: float, against: float, neutral: float, favour: float) -> float:
    """From -1 at `against` over 0 at `neutral` to 1 at `favour`, linear between them.

    Example:
        >>> _graded(0.5, 0.0, 1.0, 2.0), _graded(9.0, 0.0, 1.0, 2.0), _graded(3.0, 8.0, 4.0, 2.0)
        (-0.5, 1.0, 0.5)
    """
    points = sorted(((against, -1.0), (neutral, 0.0), (favour, 1.0)))
    return float(np.interp(value, [x for x, _ in points], [y for _, y in points]))


def _graded_log(value: float, against: float, neutral: float, favour: float) -> float:
    """The same on a logarithmic scale; all above 0."""
    logs = (math.log(max(x, 1e-12)) for x in (value, against, neutral, favour))
    return _graded(*logs)


def _measured(gain: float, error: float, most: float) -> float:
    """The weight of a measured gain: all of it from three standard errors on.

    Example:
        >>> round(_measured(0.1, 0.02, 3.0), 2), round(_measured(0.0, 0.02, 3.0), 2)
        (3.0, -0.75)
    """
    return most * _clipped((gain - _MATTERS) / (3 * max(error, 1e-9)))


@dataclass(slots=True)
class _Pieces:
    """Evidence of one finding as it is gathered.

    Attributes:
        case: what there is to go on.
        kind: of the finding.
        items: so far.
    """

    case: _Case
    kind: Kind
    items: list[Evidence] = field(default_factory=list)

    def add(self, source: Source, says: str, weight: float, **values: float) -> None:
        """Keep a piece."""
        self.items.append(Evidence(source, says, values, weight))

    def measure(self, scale: _Scale, trust: float = 1.0) -> None:
        """Keep what a measure says, if the runs have it."""
        if (value := self.case.mean(scale.measure)) is not None:
            what = MEASURES[scale.measure]
            weight = trust * scale.weight(value)
            self.add(what.source, what.told(value), weight, **{scale.measure: value})

    def scales(self) -> None:
        """Keep what the measures of this finding say."""
        for scale in _SCALES.get(self.kind, ()):
            self.measure(scale)

    def references(self, found: Iterable[_Reference]) -> None:
        """The most favourable of these references."""
        chosen = max(found, key=lambda r: r.weight, default=None)
        if chosen is not None:
            says = f"a run with {chosen.change} is {chosen.told}"
            self.add("reference", says, chosen.weight, gain=chosen.gain, error=chosen.error)

    def curve_lead(self, *, freer: bool) -> None:
        """The lead of another policy on the learning curve, at about this many samples."""
        if (found := _curve_lead(self.case, freer=freer)) is not None:
            policy, lead, error = found
            says = f"{policy} is {_signed(lead)} ahead at about this many samples"
            weight = _measured(lead, error, 2.5)
            self.add("learning curve", says, weight, lead=lead, error=error)

    def probe_lead(self, most: float) -> None:
        """What a linear probe of the frozen backbone reads more than the run."""
        probe = self.case.probe
        if probe is not None and self.case.trained:
            point = probe.head_input or probe.points[-1]
            gain, error = _probe_gain(self.case, probe, point)
            says = (
                f"a linear probe of frozen features reads {_percent(point.val_accuracy)}, "
                f"the run {_percent(self.case.accuracy)}"
            )
            self.add("probe", says, _measured(gain, error, most), gain=gain, error=error)

    def unsettled(self, most: float) -> None:
        """Whether the training loss still falls as it did, or never moved at all."""
        if self.case.mean("settling") is not None:
            self.measure(_Scale("settling", most, 0.0, 0.3, 0.8))
        elif (moved := self.case.mean("moved")) is not None and moved < 0.05:
            self.measure(_Scale("moved", most, 0.2, 0.08, 0.0))

    def finding(self, action: Action, gain: Gain) -> Finding:
        """What has been gathered, the weightiest first."""
        evidence = tuple(sorted(self.items, key=lambda e: -abs(e.weight)))
        return Finding(self.kind, evidence, (), action, gain)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(gain: float) -> str:
    return f"{100 * gain:+.1f} points"


def _probe_gain(case: _Case, probe: ProbeCurve, point: ProbePoint) -> tuple[float, float]:
    """A probe's accuracy less that of the runs, and its standard error."""
    p, count = point.val_accuracy, probe.val_samples
    variance = max(p * (1 - p), 1 / count) / count + case.error**2
    return p - case.accuracy, math.sqrt(variance)


def _curve_lead(case: _Case, *, freer: bool) -> tuple[str, float, float] | None:
    """The policy of the learning curve that is furthest ahead at about this many samples.

    Args:
        case: the runs.
        freer: among policies that train more; else among those that freeze more.

    Returns:
        Its short form, its lead over the runs' policy, and the standard error of that.
    """
    curve, own, groups = case.curve, case.first.config.policy, len(case.first.backbone)
    mine = _freedom(own, groups)
    if curve is None or mine is None or own not in curve.policies.values():
        return None
    found = []
    for name, policy in curve.policies.items():
        theirs = _freedom(policy, groups)
        if theirs is None or theirs == mine or (theirs > mine) != freer:
            continue
        differences = curve.order(name, own).differences
        size = min(differences, key=lambda s: abs(math.log(s / case.first.train_samples)))
        error = _curve_error(case, curve, differences[size])
        found.append((policy, differences[size].difference, error))
    return max(found, key=lambda item: item[1], default=None)


def _curve_error(case: _Case, curve: LearningCurve, paired: Paired) -> float:
    """Standard error of a difference on a learning curve: over seeds, and over samples."""
    p = case.accuracy if case.trained else 0.5
    samples = max(p * (1 - p), 0.01) / (curve.eval_samples or case.first.val_samples)
    if paired.low is None or paired.high is None:
        return math.sqrt(2 * samples)
    half = (paired.high - paired.low) / 2
    seeds = half / float(stats.t.ppf((1 + paired.level) / 2, paired.n - 1))
    return math.hypot(seeds, math.sqrt(samples))


def _freedom(policy: str, groups: int) -> float | None:
    """Share of the backbone's groups that a policy trains, where its short form says so.

    Example:
        >>> _freedom("first:groups=3", 12), _freedom("full", 12), _freedom("autofreeze", 12)
        (0.75, 1.0, None)
    """
    name, _, options = policy.partition(":")
    if name in ("full", "linear-probe"):
        return 1.0 if name == "full" else 0.0
    pairs = (part.partition("=") for part in options.split(","))
    given = {key: value for key, _, value in pairs}
    if name != "first" or given.get("of", "groups") != "groups":
        return None
    if "groups" in given:
        return 1 - float(given["groups"]) / max(1, groups)
    return 1 - float(given["fraction"]) if "fraction" in given else None


# -- findings --------------------------------------------------------------------------------------


def _too_much_frozen(case: _Case) -> Finding | None:
    if case.share > 1 - _SAME_SHARE:
        return None
    pieces, settling = _Pieces(case, "too much frozen"), case.mean("settling")
    pieces.scales()
    # A curve that still falls does not say what the trained part can fit, unless all that trains
    # is a head that could go wherever it wanted.
    free = case.share < _SAME_SHARE and (case.mean("head_reach") or 0.0) >= 3
    settled = 0.5 if settling is None else 1 - max(0.0, min(1.0, settling))
    pieces.measure(_Scale("loss_left", 1.2, 0.1, 0.35, 0.8), max(settled, 0.8 if free else 0.0))
    _add_chance(pieces)
    pieces.references(case.freer())
    _add_probe_limits(pieces)
    pieces.curve_lead(freer=True)
    return pieces.finding(*_free_more(case))


def _add_chance(pieces: _Pieces) -> None:
    """No better than the commonest class although the head could move: features say nothing."""
    case, reach = pieces.case, pieces.case.mean("head_reach")
    if not case.trained or (reach is not None and reach < 1):
        return
    accuracy, commonest = case.accuracy, case.first.commonest
    lead = (accuracy - commonest) / case.error
    if lead < 3:
        pieces.add(
            "curves",
            f"its accuracy, {_percent(accuracy)}, is hardly above the share of the commonest "
            f"class, {_percent(commonest)}",
            1.2 * _graded(lead, 6.0, 3.0, 1.0),
            accuracy=accuracy,
            commonest=commonest,
        )


def _add_probe_limits(pieces: _Pieces) -> None:
    """Whether the head took what there is to be read, and whether frozen groups hold more."""
    case, probe = pieces.case, pieces.case.probe
    if probe is None or not case.trained or (head := probe.head_input) is None:
        return
    if case.share < _SAME_SHARE:
        gain, error = _probe_gain(case, probe, head)
        taken = "took what there is" if gain < 1.5 * error else "lags behind"
        pieces.add(
            "probe",
            f"a probe of what enters the head reads {_percent(head.val_accuracy)}: the head, with "
            f"{_percent(case.accuracy)}, {taken}",
            # Both a head on poor features and one on good ones take what there is.
            min(0.3, _graded(gain / error, 4.0, 1.5, -0.5)),
            gain=gain,
            error=error,
        )
    best = probe.best
    if _place(case, best) < case.first.frozen_prefix - 1:
        gain, error = _probe_gain(case, probe, best)
        pieces.add(
            "probe",
            f"a probe of the frozen group {best.group}, with frozen ones behind it, reads "
            f"{_percent(best.val_accuracy)}",
            1.5 * _graded(gain / error, -3.0, 1.0, 4.0),
            gain=gain,
            error=error,
        )


def _too_little_frozen(case: _Case) -> Finding | None:
    if case.share < _SAME_SHARE or not case.trained:
        return None
    pieces = _Pieces(case, "too little frozen")
    pieces.scales()
    # Features that had to be learned first are none to be frozen; ones that served at once may be.
    if (early := case.mean("early")) is not None:
        scale = _Scale("early", 2.0, 0.3, 0.7, 1.0)
        pieces.measure(scale, 0.25 if scale.weight(early) > 0 else 1.0)
    pieces.references(case.tighter())
    if case.probe is not None and case.probe.train_samples <= 1.2 * case.first.train_samples:
        pieces.probe_lead(2.0)
    pieces.curve_lead(freer=False)
    return pieces.finding(*_freeze_more(case))


def _rate_too_high(case: _Case) -> Finding | None:
    pieces = _Pieces(case, "learning rate too high")
    failures = [f.failure for f in case.facts if "finite" in f.failure or "a loss of" in f.failure]
    if failures:
        share = len(failures) / len(case.facts)
        says = f"{len(failures)} of {len(case.facts)} runs diverged: {_reason(failures[0])}"
        pieces.add("failure", says, 5.0 * share, diverged_share=share)
    pieces.scales()
    if (high := case.mean("high_rate_loss")) is not None and high > 0.9:
        pieces.measure(_Scale("recovered", 0.8, -0.2, 0.1, 0.7))
    pieces.references(case.by_rate(higher=False))
    pieces.probe_lead(1.0)
    return pieces.finding(*_change_rate(case, lower=True))


def _rate_too_low(case: _Case) -> Finding | None:
    if case.share < _SAME_SHARE or not case.trained:
        return None
    pieces = _Pieces(case, "learning rate too low")
    pieces.scales()
    # One of the two being too low is enough.
    scales = (
        _Scale("head_reach", 1.6, 10.0, 1.0, 0.1, log=True),
        _Scale("backbone_reach", 1.6, 1.0, 0.1, 0.005, log=True),
    )
    known = [(s.weight(v), s) for s in scales if (v := case.mean(s.measure)) is not None]
    if known:
        pieces.measure(max(known)[1])
    pieces.unsettled(0.9)
    pieces.references(case.by_rate(higher=True))
    pieces.probe_lead(1.0)
    return pieces.finding(*_change_rate(case, lower=False))


def _stopped_too_early(case: _Case) -> Finding | None:
    if not case.trained:
        return None
    pieces = _Pieces(case, "stopped too early")
    pieces.scales()
    pieces.unsettled(0.8)
    if any(f.summary.get("stopped_early") for f in case.trained):
        rate = statistics.fmean(f.factors[-1] for f in case.trained)
        says = f"patience ended it while the rate was at {100 * rate:.0f} % of its peak"
        pieces.add("curves", says, 1.2 * _graded(rate, -0.5, 0.2, 0.9), rate_share=rate)
    if open_ := [f for f in case.trained if not f.summary]:
        says = f"it is not finished: {open_[0].epochs} of {open_[0].config.epochs} epochs"
        pieces.add("curves", says, 1.0, epochs=float(open_[0].epochs))
    pieces.references(case.by_length(longer=True))
    return pieces.finding(*_train_longer(case))


def _trained_longer(case: _Case) -> Finding | None:
    if not case.trained or min(f.epochs for f in case.trained) < 6:
        return None
    pieces = _Pieces(case, "trained longer than needed")
    pieces.scales()
    shorter = case.by_length(longer=False)
    if shorter:
        best = max(shorter, key=lambda r: r.gain / r.error)
        weight = 2.0 * _clipped((best.gain + _MATTERS) / (2 * best.error))
        says = f"a run of {best.updates:.0f} updates is {best.told}"
        pieces.add("reference", says, weight, gain=best.gain, error=best.error)
    return pieces.finding(*_train_shorter(case))


def _head_not_converged(case: _Case) -> Finding | None:
    if case.share >= _SAME_SHARE or not case.trained:
        return None
    pieces = _Pieces(case, "head not converged")
    pieces.scales()
    pieces.unsettled(1.0)
    if case.probe is not None and case.probe.head_input is not None:
        pieces.probe_lead(4.0)
    pieces.references([*case.by_rate(higher=True), *case.by_length(longer=True)])
    return pieces.finding(*_move_head(case))


def _wrong_depth(case: _Case) -> Finding | None:
    probe = case.probe
    if probe is None or not case.trained or (head := probe.head_input) is None:
        return None
    best, place = probe.best, _place(case, probe.best)
    behind = case.first.backbone[place + 1 :]
    if not behind:
        return None
    frozen = sum(name in case.first.frozen for name in behind) / len(behind)
    if not frozen:
        return None
    pieces = _Pieces(case, "wrong layer depth")
    low, high = head.behind
    pieces.add(
        "probe",
        f"a probe of {best.group} reads {_percent(best.val_accuracy)}, one of what enters the head "
        f"{_percent(head.val_accuracy)}",
        _measured((low + high) / 2, (high - low) / 4, 2.5),
        best_accuracy=best.val_accuracy,
        head_input_accuracy=head.val_accuracy,
    )
    pieces.add(
        "settings",
        f"of the groups behind {best.group} {100 * frozen:.0f} % were frozen",
        1.5 * _graded(frozen, 0.0, 0.6, 1.4),
        frozen_share=frozen,
    )
    gain, error = _probe_gain(case, probe, best)
    says = f"with {_percent(case.accuracy)} the run is {_signed(-gain)} against that probe"
    pieces.add("probe", says, _measured(gain, error, 1.2), gain=gain, error=error)
    basis = f"a linear probe of {best.group} reads so much more; trained groups behind it add to it"
    kept = place + 1 if place else 0  # see _free_more
    return pieces.finding(_prefix(case, kept), Gain(max(0.0, gain), None, basis))


def _too_little_data(case: _Case) -> Finding | None:
    pieces, curve, own = _Pieces(case, "too little data"), case.curve, case.first.config.policy
    samples = case.first.train_samples
    gain = Gain(None, None, "no learning curve says what more data would bring")
    known = curve is not None and own in curve.policies.values()
    rise = curve.rise(own) if curve is not None and known else None
    if curve is not None and rise is not None:
        error = _curve_error(case, curve, rise)
        says = f"the last doubling of the data brought {_signed(rise.difference)}"
        weight = _measured(rise.difference, error, 3.0)
        pieces.add("learning curve", says, weight, rise=rise.difference, error=error)
        basis = "what the last doubling brought; curves flatten, so this is the most"
        gain = Gain(max(0.0, rise.difference), None, basis)
    pieces.scales()
    more = Action({}, f"label about {samples} more samples, twice as many in all")
    return pieces.finding(more, gain)


_RULES: tuple[Callable[[_Case], Finding | None], ...] = (
    _too_much_frozen,
    _too_little_frozen,
    _rate_too_high,
    _rate_too_low,
    _stopped_too_early,
    _trained_longer,
    _head_not_converged,
    _wrong_depth,
    _too_little_data,
)


def _nothing_wrong(case: _Case, considered: Sequence[Finding]) -> Finding:
    """What speaks most against each of the findings, turned round."""
    accuracy = {"accuracy": case.accuracy} if case.trained else {}
    says = f"validation accuracy is {_percent(case.accuracy)}" if accuracy else "no epoch ended"
    found: dict[str, Evidence] = {}
    for finding in considered:
        against = min(finding.evidence, key=lambda e: e.weight, default=None)
        if against is not None and against.weight < -_NEUTRAL:
            weight = max(
                -against.weight, found[against.says].weight if against.says in found else 0
            )
            found[against.says] = replace(against, weight=weight)
    evidence = sorted(found.values(), key=lambda e: -e.weight)
    first = Evidence("curves", says, accuracy, 0.0)
    return _complete(Finding("nothing wrong", (first, *evidence), (), None, None), case)


def _place(case: _Case, point: ProbePoint) -> int:
    """Place of a probed group in the backbone, from 0."""
    backbone = case.first.backbone
    if point.group in backbone:
        return backbone.index(point.group)
    return min(point.depth, len(backbone))


def _reason(failure: str) -> str:
    """What was found, of an error's message."""
    lines = [line.strip() for line in failure.splitlines()]
    found = [line.removeprefix("found:").strip() for line in lines if line.startswith("found:")]
    return (found or lines or [""])[0]


# -- what to do ------------------------------------------------------------------------------------


def _policy(text: str) -> Action:
    return Action({"policy": text}, f"policy={text}")


def _prefix(case: _Case, count: int) -> Action:
    """The policy that freezes the first groups of the backbone."""
    total = len(case.first.backbone)
    if count <= 0:
        return _policy("full")
    return _policy("linear-probe" if count >= total else f"first:groups={count}")


def _from_reference(
    case: _Case, found: Sequence[_Reference], *, least: float | None = None
) -> tuple[Action, Gain] | None:
    """The best of some references, and what it brought.

    Args:
        case: the runs.
        found: the references.
        least: what it must bring; by default more than its error.
    """
    best = max(found, key=lambda r: r.gain, default=None)
    if best is None or best.gain < (max(_MATTERS, best.error) if least is None else least):
        return None
    own = statistics.fmean(f.seconds[-1] for f in case.trained)
    saved = 1 - best.seconds / own if own > 0 and not best.differing & _LENGTH else 0.0
    count = len(best.facts)
    basis = f"what {count} run{'s' if count > 1 else ''} with it brought"
    return Action(best.changed, best.change), Gain(
        best.gain, saved if saved > 0.05 else None, basis
    )


def _from_curve(case: _Case, *, freer: bool) -> tuple[Action, Gain] | None:
    """The policy that leads on the learning curve, if it does by more than its error."""
    found = _curve_lead(case, freer=freer)
    if found is None or found[1] < max(_MATTERS, found[2]):
        return None
    return _policy(found[0]), Gain(found[1], None, "its lead on the learning curve")


def _free_more(case: _Case) -> tuple[Action, Gain]:
    measured = _from_reference(case, case.freer()) or _from_curve(case, freer=True)
    if measured is not None:
        return measured
    unknown = Gain(None, None, "nothing was run that trains more; a short run of it would say")
    frozen, probe = case.first.frozen_prefix, case.probe
    if probe is None or not case.trained:
        # Where frozen features say nothing at all, half of them say nothing either.
        chance = not case.trained or case.accuracy - case.first.commonest < 3 * case.error
        return _prefix(case, 0 if chance else frozen // 2), unknown
    if probe.best.accuracy_interval[0] <= probe.commonest:
        return _policy("full"), Gain(None, None, "no frozen layer holds what a probe could read")
    gain, _ = _probe_gain(case, probe, probe.best)
    # Where the first layer reads as well as any, none of the others is of use as it is.
    kept = _place(case, probe.knee()) + 1 if _place(case, probe.knee()) else 0
    if kept >= frozen:
        return _prefix(case, frozen // 2), unknown
    basis = f"a linear probe of {probe.best.group} reads so much more"
    return _prefix(case, kept), Gain(gain, None, basis) if gain > 0 else unknown


def _freeze_more(case: _Case) -> tuple[Action, Gain]:
    measured = _from_reference(case, case.tighter(), least=-_MATTERS) or _from_curve(
        case, freer=False
    )
    if measured is not None:
        return measured
    total, probe, frozen = len(case.first.backbone), case.probe, case.first.frozen_prefix
    if probe is not None and probe.best.accuracy_interval[0] > probe.commonest:
        count = max(_place(case, probe.knee()) + 1, frozen + 1)
        gain, _ = _probe_gain(case, probe, probe.head_input or probe.points[-1])
        more = "a linear probe of frozen features reads so much more"
        less = "a linear probe reads no more than the run: what is saved is time"
        return _prefix(case, count), Gain(max(0.0, gain), None, more if gain > 0 else less)
    # With few samples of a class hardly anything can be learned but a head.
    few_samples = case.first.train_samples < 20 * case.first.classes
    whole = few_samples and (case.mean("early") or 0.0) >= 0.7
    count = total if whole else -(-(frozen + total) // 2)
    unknown = Gain(None, None, "nothing was run that freezes more; a short run of it would say")
    return _prefix(case, count), unknown


def _change_rate(case: _Case, *, lower: bool) -> tuple[Action, Gain]:
    if (measured := _from_reference(case, case.by_rate(higher=not lower))) is not None:
        return measured
    config = case.first.config
    usual = _usual_rate(config)
    rate = config.lr or usual
    if lower:
        new = min(rate / 10, 10 * usual)
    else:
        reach = case.mean("head_reach")
        # As far as a head that was seen to converge moved: ten times its first spread.
        new = min(rate * max(10.0, 10 / reach if reach else 10.0), 10 * usual)
        new = max(new, 3 * rate)
    return _rates(case, new / rate), Gain(
        None, None, "nothing was run at another rate; a short run would say"
    )


def _usual_rate(config: RunConfig) -> float:
    """What `fit` would have taken for the backbone."""
    usual = 3e-4 if config.augment in ("flip", "basic") or config.image_size else 1e-4
    return usual * (10 if config.optimizer == "sgd" else 1)


def _rates(case: _Case, factor: float) -> Action:
    """Both learning rates by a factor; the head's is left to follow where it did."""
    config, asked = case.first.config, case.first.header.get("asked", {})
    rates = {"lr": _rounded((config.lr or 1e-4) * factor)}
    if asked.get("head_lr") is not None or case.share < _SAME_SHARE:
        rates["head_lr"] = _rounded((config.head_lr or 1e-3) * factor)
    if case.share < _SAME_SHARE:
        del rates["lr"]
    return Action(dict(rates), ", ".join(f"{k}={v:g}" for k, v in rates.items()))


def _rounded(rate: float) -> float:
    """One figure, at most 10, as a setting may be.

    Example:
        >>> _rounded(0.00123), _rounded(25.0)
        (0.001, 10.0)
    """
    return min(10.0, float(f"{rate:.0e}"))


def _move_head(case: _Case) -> tuple[Action, Gain]:
    found = [*case.by_rate(higher=True), *case.by_length(longer=True)]
    if (measured := _from_reference(case, found)) is not None:
        return measured
    reach = case.mean("head_reach")
    factor = 10.0 if reach is None else max(3.0, min(1000.0, 10 / max(reach, 1e-6)))
    gain = Gain(None, None, "no probe says what the head could read")
    if case.probe is not None and case.probe.head_input is not None:
        lead, _ = _probe_gain(case, case.probe, case.probe.head_input)
        gain = Gain(max(0.0, lead), None, "a probe of what enters the head reads so much more")
    return _rates(case, factor), gain


def _train_longer(case: _Case) -> tuple[Action, Gain]:
    if (measured := _from_reference(case, case.by_length(longer=True))) is not None:
        return measured
    unknown = Gain(None, None, "nothing was run for longer")
    config = case.first.config
    if not all(f.summary for f in case.trained):
        return Action({}, "go on with it: the same fit call"), unknown
    if any(f.summary.get("stopped_early") for f in case.trained):
        return Action({"patience": None}, "patience=null"), unknown
    settings: dict[str, Any] = {"epochs": 2 * config.epochs}
    if config.budget is not None and case.first.summary.get("budget_spent"):
        amount, unit = float(config.budget.rstrip("flopst")), config.budget.lstrip("0123456789.e+")
        settings = {"budget": f"{2 * amount:.9g}{unit}"} | settings
    return Action(settings, ", ".join(f"{k}={v}" for k, v in settings.items())), unknown


def _train_shorter(case: _Case) -> tuple[Action, Gain]:
    facts, config = case.trained, case.first.config
    best = max(f.best + 1 for f in facts)
    patience = 3
    if config.patience is None or config.patience > patience:
        end = min(best + patience, *(f.epochs for f in facts))
        settings: dict[str, Any] = {"patience": patience}
    else:
        end = min(best + 1, *(f.epochs for f in facts))
        settings = {"epochs": end}
    saved = statistics.fmean(1 - f.seconds[end - 1] / max(f.seconds[-1], 1e-9) for f in facts)
    text = ", ".join(f"{k}={v}" for k, v in settings.items())
    return Action(settings, text), Gain(0.0, saved, "the epochs after the best one, less patience")


# -- what is missing -------------------------------------------------------------------------------

_WANTED: Mapping[Kind, tuple[tuple[Source, str], ...]] = {
    "too much frozen": (
        ("reference", "a run that trains more: a short full fine-tuning"),
        ("probe", "a probe of the pretrained network, layer by layer"),
    ),
    "too little frozen": (
        ("reference", "a run that freezes more: linear probing is quick"),
        ("learning curve", "a learning curve of both policies"),
        ("probe", "a probe of the pretrained network, layer by layer"),
    ),
    "learning rate too high": (("reference", "a run at a tenth of the learning rates"),),
    "learning rate too low": (("reference", "a run at ten times the learning rates"),),
    "stopped too early": (("reference", "a run of twice the length"),),
    "trained longer than needed": (("reference", "a run of half the length"),),
    "head not converged": (
        ("probe", "a probe of what enters the head"),
        ("reference", "a run at ten times the head's learning rate"),
    ),
    "wrong layer depth": (("reference", "a run that trains the groups behind the best one"),),
    "too little data": (("learning curve", "a learning curve of the policy"),),
    "nothing wrong": (
        ("reference", "a run that trains more, and one that freezes more"),
        ("learning curve", "a learning curve of the policy"),
    ),
}
_OF_FIT: tuple[Kind, ...] = ("too much frozen", "too little frozen", "nothing wrong")


def _complete(finding: Finding, case: _Case) -> Finding:
    """The finding with what would settle it."""
    sources = {e.source for e in finding.evidence}
    missing = [what for source, what in _WANTED[finding.kind] if source not in sources]
    if finding.kind in _OF_FIT:
        missing.append("training accuracy without augmentation, which runs do not record")
    if len(case.facts) == 1:
        missing.append("runs with other seeds")
    if case.trained and min(f.epochs for f in case.trained) < 5:
        missing.append("more epochs: curves of fewer than five say little")
    return replace(finding, missing=tuple(missing))
