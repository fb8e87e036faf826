"""`frostline show`: one run on the terminal: what came out, what was frozen when, and why."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from frostline.cli.terminal import console, escape, print_json, print_table
from frostline.report.costs import PARTS
from frostline.report.numbers import Numbers, RunDetail, numbers_of
from frostline.report.read import read_runs
from frostline.report.timeline import Timeline
from frostline.text import percent_text, seconds_text

__all__ = ["show", "strips"]

#: How a layer group is drawn, by what it does.
_MARKS = {"frozen": "█", "partly": "▓", "training": "·"}
_MOST_COLUMNS = 100
_LEGEND = "█ frozen   ▓ frozen in part   · training; the head is on top"


def show(
    run: Annotated[Path, Parameter(help="Folder of a run.")],
    *,
    decisions: Annotated[
        int, Parameter(help="How many decisions to list, the first ones; 0: all.")
    ] = 10,
    json: Annotated[bool, Parameter(negative="", help="Print all numbers as JSON.")] = False,
) -> None:
    """Show a run: its result, what was frozen when and why, and where the time went."""
    numbers = numbers_of(read_runs([run]))
    if json:
        print_json(numbers.to_json())
        return
    _say([numbers.headline.title, *numbers.headline.sentences, ""])
    _say(_tiles(numbers))
    for detail in numbers.details:
        _show_detail(detail, decisions)
    again = [*numbers.repeat.commands, *numbers.repeat.notes]
    _say(["", "to do it again:", *(f"  {line}" for line in again)])


def _show_detail(detail: RunDetail, decisions: int) -> None:
    line = detail.timeline
    out = console(sys.stdout)
    width = max(20, min(_MOST_COLUMNS, out.width - max(map(len, line.groups), default=0) - 4))
    _say(["", f"{detail.name}: {line.sentence()}", ""])
    _say([*strips(line, width=width), _LEGEND])
    changes = line.changes[: decisions or None]
    print_table(
        {"update": "right", "frozen": "right", "train": "right", "why": "left"},
        [
            (c.step, f"{c.frozen_count} of {len(line.groups)}", percent_text(c.trained_share),
             c.reason)
            for c in changes
        ],
    )  # fmt: skip
    if len(changes) < len(line.changes):
        _say([f"and {len(line.changes) - len(changes)} more decisions: --decisions 0"])
    if detail.time_s is not None:
        spent = [(name, s) for name, s in detail.time_s.items() if s >= 0.05]
        print_table(
            {"where the time went": "left", "": "right"},
            [(f"{name}: {PARTS[name]}", seconds_text(s)) for name, s in spent],
        )


def _tiles(numbers: Numbers) -> Iterable[str]:
    for tile in numbers.headline.tiles:
        note = f"  ({tile.note})" if tile.note else ""
        yield f"{tile.label:<21}{tile.value}{note}"


def strips(found: Timeline, *, width: int) -> list[str]:
    r"""A timeline as text: a line for each layer group, the head on top.

    A column stands for an equal share of the updates and shows what the group did at its middle.

    Args:
        found: the timeline.
        width: columns of the strip, at least 1.

    Example:
        >>> from frostline.report.timeline import Phase, Span
        >>> spans = (Span("body", Phase("frozen", 0.0), 0, 6, 0),
        ...          Span("body", Phase("training"), 6, 12, 1),
        ...          Span("head", Phase("training"), 0, 12, 0))
        >>> line = Timeline(("body", "head"), frozenset({"head"}), 12, (), spans)
        >>> print("\n".join(strips(line, width=6)))
        head  ······
        body  ███···
    """
    longest = max(map(len, map(escape, found.groups)), default=0)
    middles = [(2 * column + 1) * found.end_step / (2 * width) for column in range(width)]
    lines = []
    for group in reversed(found.groups):
        own = [span for span in found.spans if span.group == group]
        kinds = [
            next(span.phase.kind for span in own if span.from_step <= at < span.to_step)
            for at in middles
        ]
        lines.append(f"{escape(group):<{longest}}  {''.join(_MARKS[kind] for kind in kinds)}")
    return lines


def _say(lines: Iterable[str]) -> None:
    out = console(sys.stdout)
    for line in lines:
        out.print(escape(line), soft_wrap=True)
