"""A study on the terminal: a table of its arms, and what follows in sentences."""

from __future__ import annotations

import sys
from pathlib import Path

from frostline.cli.results import seconds_text
from frostline.cli.terminal import bytes_text, console, escape, print_json, print_table
from frostline.study.analysis import ArmFigures, Comparison
from frostline.study.statistics import Ratio

__all__ = ["print_comparison"]

_COLUMNS = {
    "arm": "left",
    "val acc": "right",
    "against {}": "right",
    "": "left",
    "test acc": "right",
    "time": "right",
    "time ratio": "right",
    "memory": "right",
    "backward": "right",
    "front": "left",
}
_BESIDE = {
    "arm": "left",
    "test acc against {}": "right",
    "whole run": "right",
    "run ratio": "right",
    "memory ratio": "right",
    "to {}": "right",
    "target ratio": "right",
    "reached": "right",
}
_LEGEND = """\
val, test acc:   means over seeds of the epoch that was best on validation data
against, verdict: difference in validation accuracy in points, with an interval that holds for all arms together
time, ratio:     seconds of training as if the run were alone, and as a multiple of the reference's
front:           * where no other arm is at least as good in validation accuracy, time of the whole run and memory, and better in one"""  # noqa: E501
_LEGEND_BESIDE = """\
test acc against: difference in points; its interval is of this arm alone, and counts seeds and test samples as chance
whole run:        from loading to saving as if the run were alone
to ...:           seconds of training to that validation accuracy, median over seeds; never is later than all
ratio:            a multiple of the reference's, geometric mean over seeds, with its interval
reached:          runs that got there"""  # noqa: E501


def print_comparison(found: Comparison, folder: Path, *, as_json: bool = False) -> None:
    """Print a study on stdout."""
    if as_json:
        print_json({"path": str(folder), **found.to_json()})
        return
    columns = {name.format(found.spec.reference): side for name, side in _COLUMNS.items()}
    print_table(columns, [_cells(figures) for figures in found.arms])
    out = console(sys.stdout)

    def say(text: str) -> None:
        out.print(escape(text), soft_wrap=True)

    for line in _LEGEND.splitlines():
        say(line)
    if found.target is not None and len(found.arms) > 1:
        names = (name.format(end) for name, end in zip(_BESIDE, _ends(found), strict=True))
        rows = [_beside(figures) for figures in found.arms]
        print_table(dict(zip(names, _BESIDE.values(), strict=True)), rows)
        for line in _LEGEND_BESIDE.splitlines():
            say(line)
    for figures in found.arms:
        for seed, why in figures.failures.items():
            say(f"failed: {figures.arm.name}, seed {seed}: {' '.join(why.split())}")
    for figures in found.arms:
        if figures.verdict is not None:
            say(f"{figures.arm.name}: {figures.verdict.sentence}")
    for note in found.notes:
        say(f"note: {note}")
    if found.missing:
        say(f"not finished: {'; '.join(found.missing)}")
    if found.best is not None:
        say(found.best.sentence)
    say(f"take: {found.because}" if found.choice else found.because)
    say(f"margin {found.spec.margin:g} of accuracy, level {found.spec.level:g}")
    if found.reference_s:
        runs = found.spent_s / found.reference_s
        say(f"all runs took {runs:.1f} times as long as one of {found.spec.reference}")
    say(f"study folder: {folder}")


def _ends(found: Comparison) -> tuple[str, ...]:
    """What stands in for {} in each heading of the second table."""
    target = _percent(found.target) or ""
    return tuple(
        {"test acc against {}": found.spec.reference, "to {}": target}.get(name, "")
        for name in _BESIDE
    )


def _beside(figures: ArmFigures) -> list[str | None]:
    test, reached = figures.test, figures.reached
    whole, until = figures.mean("whole_s"), figures.reached_s
    got = sum(seconds is not None for seconds in reached.values())
    return [
        figures.arm.name,
        None if test is None else _difference(test.difference, test.low, test.high),
        None if whole is None else seconds_text(whole),
        _ratio(figures.whole),
        _ratio(figures.memory),
        None if until is None else seconds_text(until),
        _ratio(figures.target),
        f"{got} of {len(reached)}" if reached else None,
    ]


def _ratio(of: Ratio | None) -> str | None:
    """A ratio with its interval; without one for one seed, or where a run has no time."""
    if of is None or of.ratio is None:
        return None
    text = f"{of.ratio:.2f}"
    return text if of.low is None or of.high is None else f"{text} [{of.low:.2f}, {of.high:.2f}]"


def _cells(figures: ArmFigures) -> list[str | None]:
    verdict, paired = figures.verdict, figures.verdict and figures.verdict.paired
    memory = figures.mean("peak_memory_bytes")
    seconds = figures.mean("alone_s")
    return [
        figures.arm.name,
        _percent(figures.mean("val_accuracy")),
        None if paired is None else _difference(paired.difference, paired.low, paired.high),
        verdict.kind if verdict else "",
        _percent(figures.mean("test_accuracy")),
        None if seconds is None else seconds_text(seconds),
        None if figures.time is None or figures.time.ratio is None else f"{figures.time.ratio:.2f}",
        None if memory is None else bytes_text(memory),
        _percent(figures.mean("backward_share")),
        "*" if figures.pareto else "",
    ]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _difference(mean: float, low: float | None, high: float | None) -> str:
    text = f"{100 * mean:+.1f}"
    return text if low is None or high is None else f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"
