"""How what was seen becomes evidence: the weight of each measure, and pieces as they gather."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scipy import stats

from frostline.study.diagnosis.case import Case, Reference
from frostline.study.diagnosis.findings import Action, Evidence, Finding, Gain, Kind, Source
from frostline.study.diagnosis.weights import SCALES, Scale, measured_weight
from frostline.study.run_facts import MEASURES

if TYPE_CHECKING:
    from frostline.study.diagnosis.probing import ProbeCurve, ProbePoint
    from frostline.study.learning_curve import LearningCurve
    from frostline.study.statistics import Paired

__all__ = ["Pieces", "curve_error", "curve_lead", "percent", "probe_gain", "signed"]


@dataclass(slots=True)
class Pieces:
    """Evidence of one finding as it is gathered.

    Attributes:
        case: what there is to go on.
        kind: of the finding.
        items: so far.
    """

    case: Case
    kind: Kind
    items: list[Evidence] = field(default_factory=list)

    def add(self, source: Source, says: str, weight: float, **values: float) -> None:
        """Keep a piece."""
        self.items.append(Evidence(source, says, values, weight))

    def measure(self, scale: Scale, trust: float = 1.0) -> None:
        """Keep what a measure says, if the runs have it."""
        if (value := self.case.mean(scale.measure)) is not None:
            what = MEASURES[scale.measure]
            weight = trust * scale.weight(value)
            self.add(what.source, what.told(value), weight, **{scale.measure: value})

    def scales(self) -> None:
        """Keep what the measures of this finding say."""
        for scale in SCALES.get(self.kind, ()):
            self.measure(scale)

    def references(self, found: Iterable[Reference]) -> None:
        """The most favourable of these references."""
        chosen = max(found, key=lambda r: r.weight, default=None)
        if chosen is not None:
            says = f"a run with {chosen.change} is {chosen.told}"
            self.add("reference", says, chosen.weight, gain=chosen.gain, error=chosen.error)

    def curve_lead(self, *, freer: bool) -> None:
        """The lead of another policy on the learning curve, at about this many samples."""
        if (found := curve_lead(self.case, freer=freer)) is not None:
            policy, lead, error = found
            side = "ahead" if lead >= 0 else "behind"
            says = f"{policy} is {100 * abs(lead):.1f} points {side} at about this many samples"
            weight = measured_weight(lead, error, 2.5)
            self.add("learning curve", says, weight, lead=lead, error=error)

    def probe_lead(self, most: float) -> None:
        """What a linear probe of the frozen backbone reads more than the run."""
        probe = self.case.probe
        if probe is not None and self.case.trained:
            point = probe.head_input or probe.points[-1]
            gain, error = probe_gain(self.case, probe, point)
            says = (
                f"a linear probe of frozen features reads {percent(point.val_accuracy)}, "
                f"the run {percent(self.case.accuracy)}"
            )
            self.add("probe", says, measured_weight(gain, error, most), gain=gain, error=error)

    def unsettled(self, most: float) -> None:
        """Whether the training loss still falls as it did, or never moved at all."""
        if self.case.mean("settling") is not None:
            self.measure(Scale("settling", most, 0.0, 0.3, 0.8))
        elif (moved := self.case.mean("moved")) is not None and moved < 0.05:
            self.measure(Scale("moved", most, 0.2, 0.08, 0.0))

    def finding(self, action: Action, gain: Gain) -> Finding:
        """What has been gathered, the weightiest first."""
        evidence = tuple(sorted(self.items, key=lambda e: -abs(e.weight)))
        return Finding(self.kind, evidence, (), action, gain)


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def signed(gain: float) -> str:
    """A difference of accuracies for people."""
    return f"{100 * gain:+.1f} points"


def probe_gain(case: Case, probe: ProbeCurve, point: ProbePoint) -> tuple[float, float]:
    """A probe's accuracy less that of the runs, and its standard error."""
    p, count = point.val_accuracy, probe.val_samples
    variance = max(p * (1 - p), 1 / count) / count + case.error**2
    return p - case.accuracy, math.sqrt(variance)


def curve_lead(case: Case, *, freer: bool) -> tuple[str, float, float] | None:
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
        error = curve_error(case, curve, differences[size])
        found.append((policy, differences[size].difference, error))
    return max(found, key=lambda item: item[1], default=None)


def curve_error(case: Case, curve: LearningCurve, paired: Paired) -> float:
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
