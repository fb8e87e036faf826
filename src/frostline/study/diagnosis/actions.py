"""What to do next about each finding, and what it can be expected to bring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from frostline.study.diagnosis.case import LENGTH, SAME_SHARE, Case, Reference, place
from frostline.study.diagnosis.evidence import curve_lead, probe_gain
from frostline.study.diagnosis.findings import Action, Gain
from frostline.study.diagnosis.weights import MATTERS
from frostline.tasks.config import RunConfig

__all__ = [
    "change_rate",
    "free_more",
    "freeze_more",
    "freeze_prefix",
    "move_head",
    "train_longer",
    "train_shorter",
]


def _policy(text: str) -> Action:
    return Action({"policy": text}, f"policy={text}")


def freeze_prefix(case: Case, count: int) -> Action:
    """The policy that freezes the first groups of the backbone."""
    total = len(case.first.backbone)
    if count <= 0:
        return _policy("full")
    return _policy("linear-probe" if count >= total else f"first:groups={count}")


def _from_reference(
    case: Case, found: Sequence[Reference], *, least: float | None = None
) -> tuple[Action, Gain] | None:
    """The best of some references, and what it brought.

    Args:
        case: the runs.
        found: the references.
        least: what it must bring; by default more than its error.
    """
    best = max(found, key=lambda r: r.gain, default=None)
    if best is None or best.gain < (max(MATTERS, best.error) if least is None else least):
        return None
    own = statistics.fmean(f.seconds[-1] for f in case.trained)
    saved = 1 - best.seconds / own if own > 0 and not best.differing & LENGTH else 0.0
    count = len(best.facts)
    basis = f"what {count} run{'s' if count > 1 else ''} with it brought"
    return Action(best.changed, best.change), Gain(
        best.gain, saved if saved > 0.05 else None, basis
    )


def _from_curve(case: Case, *, freer: bool) -> tuple[Action, Gain] | None:
    """The policy that leads on the learning curve, if it does by more than its error."""
    found = curve_lead(case, freer=freer)
    if found is None or found[1] < max(MATTERS, found[2]):
        return None
    return _policy(found[0]), Gain(found[1], None, "its lead on the learning curve")


def free_more(case: Case) -> tuple[Action, Gain]:
    """A policy that trains more: what was measured, else as far as a probe or nothing says."""
    measured = _from_reference(case, case.freer()) or _from_curve(case, freer=True)
    if measured is not None:
        return measured
    unknown = Gain(None, None, "nothing was run that trains more; a short run of it would say")
    frozen, probe = case.first.frozen_prefix, case.probe
    if probe is None or not case.trained:
        # Where frozen features say nothing at all, half of them say nothing either.
        chance = not case.trained or case.accuracy - case.first.commonest < 3 * case.error
        return freeze_prefix(case, 0 if chance else frozen // 2), unknown
    if probe.best.accuracy_interval[0] <= probe.commonest:
        return _policy("full"), Gain(None, None, "no frozen layer holds what a probe could read")
    gain, _ = probe_gain(case, probe, probe.best)
    # Where the first layer reads as well as any, none of the others is of use as it is.
    kept = place(case, probe.knee()) + 1 if place(case, probe.knee()) else 0
    if kept >= frozen:
        return freeze_prefix(case, frozen // 2), unknown
    basis = f"a linear probe of {probe.best.group} reads so much more"
    return freeze_prefix(case, kept), Gain(gain, None, basis) if gain > 0 else unknown


def freeze_more(case: Case) -> tuple[Action, Gain]:
    """A policy that freezes more: what was measured, else as far as a probe or nothing says."""
    measured = _from_reference(case, case.tighter(), least=-MATTERS) or _from_curve(
        case, freer=False
    )
    if measured is not None:
        return measured
    total, probe, frozen = len(case.first.backbone), case.probe, case.first.frozen_prefix
    if probe is not None and probe.best.accuracy_interval[0] > probe.commonest:
        count = max(place(case, probe.knee()) + 1, frozen + 1)
        gain, _ = probe_gain(case, probe, probe.head_input or probe.points[-1])
        more = "a linear probe of frozen features reads so much more"
        less = "a linear probe reads no more than the run: what is saved is time"
        return freeze_prefix(case, count), Gain(max(0.0, gain), None, more if gain > 0 else less)
    # With few samples of a class hardly anything can be learned but a head.
    few_samples = case.first.train_samples < 20 * case.first.classes
    whole = few_samples and (case.mean("early") or 0.0) >= 0.7
    count = total if whole else -(-(frozen + total) // 2)
    unknown = Gain(None, None, "nothing was run that freezes more; a short run of it would say")
    return freeze_prefix(case, count), unknown


def change_rate(case: Case, *, lower: bool) -> tuple[Action, Gain]:
    """Other learning rates: what was measured, else a factor of ten, towards what is usual."""
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


def _rates(case: Case, factor: float) -> Action:
    """Both learning rates by a factor; the head's is left to follow where it did."""
    config, asked = case.first.config, case.first.header.get("asked", {})
    rates = {"lr": _rounded((config.lr or 1e-4) * factor)}
    if asked.get("head_lr") is not None or case.share < SAME_SHARE:
        rates["head_lr"] = _rounded((config.head_lr or 1e-3) * factor)
    if case.share < SAME_SHARE:
        del rates["lr"]
    return Action(dict(rates), ", ".join(f"{k}={v:g}" for k, v in rates.items()))


def _rounded(rate: float) -> float:
    """One figure, at most 10, as a setting may be.

    Example:
        >>> _rounded(0.00123), _rounded(25.0)
        (0.001, 10.0)
    """
    return min(10.0, float(f"{rate:.0e}"))


def move_head(case: Case) -> tuple[Action, Gain]:
    """A rate at which the head can get where it must: what was measured, else by its reach."""
    found = [*case.by_rate(higher=True), *case.by_length(longer=True)]
    if (measured := _from_reference(case, found)) is not None:
        return measured
    reach = case.mean("head_reach")
    factor = 10.0 if reach is None else max(3.0, min(1000.0, 10 / max(reach, 1e-6)))
    gain = Gain(None, None, "no probe says what the head could read")
    if case.probe is not None and case.probe.head_input is not None:
        lead, _ = probe_gain(case, case.probe, case.probe.head_input)
        gain = Gain(max(0.0, lead), None, "a probe of what enters the head reads so much more")
    return _rates(case, factor), gain


def train_longer(case: Case) -> tuple[Action, Gain]:
    """More updates: what was measured, else twice as many, or what ended the run taken away."""
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


def train_shorter(case: Case) -> tuple[Action, Gain]:
    """Fewer epochs after the best one, and the time that it saves."""
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
