"""Finished runs as a table: the same columns after `fit`, in `frostline runs` and in examples."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from frostline.cli.terminal import console, print_json, print_table
from frostline.records import COLUMNS, Row, comparison_table
from frostline.text import bytes_text, escape, percent_text, seconds_text

__all__ = ["print_run", "print_runs", "seconds_text"]

_COLUMNS = {
    "run": "left",
    "policy": "left",
    "val acc": "right",
    "test acc": "right",
    "time": "right",
    "memory": "right",
    "trained": "right",
    "backward": "right",
}
_LEGEND = """\
time, memory:       of the whole run; memory at its peak
trained, backward:  shares of parameters trained and of backward work done"""


def print_runs(runs: Iterable[str | Path], *, as_json: bool = False) -> None:
    """Print runs side by side on stdout: accuracies, time, memory, what was trained."""
    rows = comparison_table(runs)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    print_table(_COLUMNS, [_cells(row) for row in rows])
    out = console(sys.stdout)
    for line in _LEGEND.splitlines():
        out.print(line, soft_wrap=True)


def print_run(run: str | Path) -> None:
    """Print one run on stdout, a line per figure."""
    (row,) = comparison_table([run])
    labels = [COLUMNS[name] for name in asdict(row)]
    out = console(sys.stdout)
    for label, cell in zip(labels, _cells(row), strict=True):
        name = label.partition(" (")[0]  # cells carry their own units
        out.print(escape(f"{name:<21}{'-' if cell is None else cell}"), soft_wrap=True)


def _cells(row: Row) -> Sequence[str | None]:
    return (
        row.run,
        row.policy,
        percent_text(row.val_accuracy),
        percent_text(row.test_accuracy),
        None if row.wall_s is None else seconds_text(row.wall_s),
        None if row.peak_memory_bytes is None else bytes_text(row.peak_memory_bytes),
        percent_text(row.trained_parameter_share),
        percent_text(row.backward_share),
    )
