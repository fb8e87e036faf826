"""The rules: what speaks for and against each finding, and what would settle it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from frostline.study.diagnosis.actions import (
    change_rate,
    free_more,
    freeze_more,
    freeze_prefix,
    move_head,
    train_longer,
    train_shorter,
)
from frostline.study.diagnosis.case import SAME_SHARE, Case, place
from frostline.study.diagnosis.evidence import Pieces, curve_error, percent, probe_gain, signed
from frostline.study.diagnosis.findings import (
    NEUTRAL,
    Action,
    Evidence,
    Finding,
    Gain,
    Kind,
    Source,
)
from frostline.study.diagnosis.weights import MATTERS, Scale, clipped, graded, measured_weight

__all__ = ["RULES", "nothing_wrong", "with_missing"]


def _too_much_frozen(case: Case) -> Finding | None:
    if case.share > 1 - SAME_SHARE:
        return None
    pieces, settling = Pieces(case, "too much frozen"), case.mean("settling")
    pieces.scales()
    # A curve that still falls does not say what the trained part can fit, unless all that trains
    # is a head that could go wherever it wanted.
    free = case.share < SAME_SHARE and (case.mean("head_reach") or 0.0) >= 3
    settled = 0.5 if settling is None else 1 - max(0.0, min(1.0, settling))
    pieces.measure(Scale("loss_left", 1.2, 0.1, 0.35, 0.8), max(settled, 0.8 if free else 0.0))
    _add_chance(pieces)
    pieces.references(case.freer())
    _add_probe_limits(pieces)
    pieces.curve_lead(freer=True)
    return pieces.finding(*free_more(case))


def _add_chance(pieces: Pieces) -> None:
    """No better than the commonest class although the head could move: features say nothing."""
    case, reach = pieces.case, pieces.case.mean("head_reach")
    if not case.trained or (reach is not None and reach < 1):
        return
    accuracy, commonest = case.accuracy, case.first.commonest
    lead = (accuracy - commonest) / case.error
    if lead < 3:
        pieces.add(
            "curves",
            f"its accuracy, {percent(accuracy)}, is hardly above the share of the commonest "
            f"class, {percent(commonest)}",
            1.2 * graded(lead, 6.0, 3.0, 1.0),
            accuracy=accuracy,
            commonest=commonest,
        )


def _add_probe_limits(pieces: Pieces) -> None:
    """Whether the head took what there is to be read, and whether frozen groups hold more."""
    case, probe = pieces.case, pieces.case.probe
    if probe is None or not case.trained or (head := probe.head_input) is None:
        return
    if case.share < SAME_SHARE:
        gain, error = probe_gain(case, probe, head)
        taken = "took what there is" if gain < 1.5 * error else "lags behind"
        pieces.add(
            "probe",
            f"a probe of what enters the head reads {percent(head.val_accuracy)}: the head, with "
            f"{percent(case.accuracy)}, {taken}",
            # Both a head on poor features and one on good ones take what there is.
            min(0.3, graded(gain / error, 4.0, 1.5, -0.5)),
            gain=gain,
            error=error,
        )
    best = probe.best
    if place(case, best) < case.first.frozen_prefix - 1:
        gain, error = probe_gain(case, probe, best)
        pieces.add(
            "probe",
            f"a probe of the frozen group {best.group}, with frozen ones behind it, reads "
            f"{percent(best.val_accuracy)}",
            1.5 * graded(gain / error, -3.0, 1.0, 4.0),
            gain=gain,
            error=error,
        )


def _too_little_frozen(case: Case) -> Finding | None:
    if case.share < SAME_SHARE or not case.trained:
        return None
    pieces = Pieces(case, "too little frozen")
    pieces.scales()
    # Features that had to be learned first are none to be frozen; ones that served at once may be.
    if (early := case.mean("early")) is not None:
        scale = Scale("early", 2.0, 0.3, 0.7, 1.0)
        pieces.measure(scale, 0.25 if scale.weight(early) > 0 else 1.0)
    pieces.references(case.tighter())
    if case.probe is not None and case.probe.train_samples <= 1.2 * case.first.train_samples:
        pieces.probe_lead(2.0)
    pieces.curve_lead(freer=False)
    return pieces.finding(*freeze_more(case))


def _rate_too_high(case: Case) -> Finding | None:
    pieces = Pieces(case, "learning rate too high")
    failures = [f.failure for f in case.facts if "finite" in f.failure or "a loss of" in f.failure]
    if failures:
        share = len(failures) / len(case.facts)
        says = f"{len(failures)} of {len(case.facts)} runs diverged: {_reason(failures[0])}"
        pieces.add("failure", says, 5.0 * share, diverged_share=share)
    pieces.scales()
    if (high := case.mean("high_rate_loss")) is not None and high > 0.9:
        pieces.measure(Scale("recovered", 0.8, -0.2, 0.1, 0.7))
    pieces.references(case.by_rate(higher=False))
    pieces.probe_lead(1.0)
    return pieces.finding(*change_rate(case, lower=True))


def _rate_too_low(case: Case) -> Finding | None:
    if case.share < SAME_SHARE or not case.trained:
        return None
    pieces = Pieces(case, "learning rate too low")
    pieces.scales()
    # One of the two being too low is enough.
    scales = (
        Scale("head_reach", 1.6, 10.0, 1.0, 0.1, log=True),
        Scale("backbone_reach", 1.6, 1.0, 0.1, 0.005, log=True),
    )
    known = [(s.weight(v), s) for s in scales if (v := case.mean(s.measure)) is not None]
    if known:
        pieces.measure(max(known)[1])
    pieces.unsettled(0.9)
    pieces.references(case.by_rate(higher=True))
    pieces.probe_lead(1.0)
    return pieces.finding(*change_rate(case, lower=False))


def _stopped_too_early(case: Case) -> Finding | None:
    if not case.trained:
        return None
    pieces = Pieces(case, "stopped too early")
    pieces.scales()
    pieces.unsettled(0.8)
    if any(f.summary.get("stopped_early") for f in case.trained):
        rate = statistics.fmean(f.factors[-1] for f in case.trained)
        says = f"patience ended it while the rate was at {100 * rate:.0f} % of its peak"
        pieces.add("curves", says, 1.2 * graded(rate, -0.5, 0.2, 0.9), rate_share=rate)
    if open_ := [f for f in case.trained if not f.summary]:
        says = f"it is not finished: {open_[0].epochs} of {open_[0].config.epochs} epochs"
        pieces.add("curves", says, 1.0, epochs=float(open_[0].epochs))
    pieces.references(case.by_length(longer=True))
    return pieces.finding(*train_longer(case))


def _trained_longer(case: Case) -> Finding | None:
    if not case.trained or min(f.epochs for f in case.trained) < 6:
        return None
    pieces = Pieces(case, "trained longer than needed")
    pieces.scales()
    shorter = case.by_length(longer=False)
    if shorter:
        best = max(shorter, key=lambda r: r.gain / r.error)
        weight = 2.0 * clipped((best.gain + MATTERS) / (2 * best.error))
        says = f"a run of {best.updates:.0f} updates is {best.told}"
        pieces.add("reference", says, weight, gain=best.gain, error=best.error)
    return pieces.finding(*train_shorter(case))


def _head_not_converged(case: Case) -> Finding | None:
    if case.share >= SAME_SHARE or not case.trained:
        return None
    pieces = Pieces(case, "head not converged")
    pieces.scales()
    pieces.unsettled(1.0)
    if case.probe is not None and case.probe.head_input is not None:
        pieces.probe_lead(4.0)
    pieces.references([*case.by_rate(higher=True), *case.by_length(longer=True)])
    return pieces.finding(*move_head(case))


def _wrong_depth(case: Case) -> Finding | None:
    probe = case.probe
    if probe is None or not case.trained or (head := probe.head_input) is None:
        return None
    best, at = probe.best, place(case, probe.best)
    behind = case.first.backbone[at + 1 :]
    if not behind:
        return None
    frozen = sum(name in case.first.frozen for name in behind) / len(behind)
    if not frozen:
        return None
    pieces = Pieces(case, "wrong layer depth")
    low, high = head.behind
    pieces.add(
        "probe",
        f"a probe of {best.group} reads {percent(best.val_accuracy)}, one of what enters the head "
        f"{percent(head.val_accuracy)}",
        measured_weight((low + high) / 2, (high - low) / 4, 2.5),
        best_accuracy=best.val_accuracy,
        head_input_accuracy=head.val_accuracy,
    )
    pieces.add(
        "settings",
        f"of the groups behind {best.group} {100 * frozen:.0f} % were frozen",
        1.5 * graded(frozen, 0.0, 0.6, 1.4),
        frozen_share=frozen,
    )
    gain, error = probe_gain(case, probe, best)
    says = f"with {percent(case.accuracy)} the run is {signed(-gain)} against that probe"
    pieces.add("probe", says, measured_weight(gain, error, 1.2), gain=gain, error=error)
    basis = f"a linear probe of {best.group} reads so much more; trained groups behind it add to it"
    kept = at + 1 if at else 0  # see free_more
    return pieces.finding(freeze_prefix(case, kept), Gain(max(0.0, gain), None, basis))


def _too_little_data(case: Case) -> Finding | None:
    pieces, curve, own = Pieces(case, "too little data"), case.curve, case.first.config.policy
    samples = case.first.train_samples
    gain = Gain(None, None, "no learning curve says what more data would bring")
    known = curve is not None and own in curve.policies.values()
    rise = curve.rise(own) if curve is not None and known else None
    if curve is not None and rise is not None:
        error = curve_error(case, curve, rise)
        says = f"the last doubling of the data brought {signed(rise.difference)}"
        weight = measured_weight(rise.difference, error, 3.0)
        pieces.add("learning curve", says, weight, rise=rise.difference, error=error)
        basis = "what the last doubling brought; curves flatten, so this is the most"
        gain = Gain(max(0.0, rise.difference), None, basis)
    pieces.scales()
    more = Action({}, f"label about {samples} more samples, twice as many in all")
    return pieces.finding(more, gain)


RULES: tuple[Callable[[Case], Finding | None], ...] = (
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


def nothing_wrong(case: Case, considered: Sequence[Finding]) -> Finding:
    """What speaks most against each of the findings, turned round."""
    accuracy = {"accuracy": case.accuracy} if case.trained else {}
    says = f"validation accuracy is {percent(case.accuracy)}" if accuracy else "no epoch ended"
    found: dict[str, Evidence] = {}
    for finding in considered:
        against = min(finding.evidence, key=lambda e: e.weight, default=None)
        if against is not None and against.weight < -NEUTRAL:
            weight = max(
                -against.weight, found[against.says].weight if against.says in found else 0
            )
            found[against.says] = replace(against, weight=weight)
    evidence = sorted(found.values(), key=lambda e: -e.weight)
    first = Evidence("curves", says, accuracy, 0.0)
    return with_missing(Finding("nothing wrong", (first, *evidence), (), None, None), case)


def _reason(failure: str) -> str:
    """What was found, of an error's message."""
    lines = [line.strip() for line in failure.splitlines()]
    found = [line.removeprefix("found:").strip() for line in lines if line.startswith("found:")]
    return (found or lines or [""])[0]


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


def with_missing(finding: Finding, case: Case) -> Finding:
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
