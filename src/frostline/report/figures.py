"""Numbers and charts as files: JSON and CSV to compute with, SVG and PNG to publish."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from frostline import _io
from frostline.report.charts import Chart, charts_of, concrete, timeline_chart
from frostline.report.numbers import Numbers
from frostline.text import escape

__all__ = ["csv_text", "write_figures"]

_WIDTH_PX = 640
_SCALE = 2  # of PNG: pixels per pixel of the SVG
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_DECISIONS = ("run", "update", "epoch", "seconds", "froze", "unfroze", "frozen_groups",
              "trained_share", "reason")  # fmt: skip


def write_figures(numbers: Numbers, folder: Path) -> tuple[Path, ...]:
    """Write everything that a report shows as files.

    ``report.json`` holds all numbers; each chart has a ``.csv`` of its table, an ``.svg`` and a
    ``.png`` in light colours on white; each run has its timeline under ``timelines``;
    ``runs.csv`` and ``decisions.csv`` are tables without a chart. Older files of these names are
    replaced.

    Args:
        numbers: what the report shows.
        folder: made if absent.

    Returns:
        The files, in the order in which they were written.

    Raises:
        StorageError: a file cannot be written.
    """
    charts = charts_of(numbers)
    lines = [
        timeline_chart(f"timelines/{name}", detail.timeline)
        for name, detail in zip(
            _file_names([detail.name for detail in numbers.details]), numbers.details, strict=True
        )
    ]
    texts = {
        "report.json": _io.canonical_json(numbers.to_json()).decode() + "\n",
        "runs.csv": _runs_csv(numbers),
        "decisions.csv": csv_text(_DECISIONS, _decisions(numbers)),
        **{f"{chart.name}.csv": csv_text(chart.columns, chart.rows) for chart in (*charts, *lines)},
    }
    written: list[Path] = []
    for name, text in texts.items():
        written.append(_place(folder, name))
        _io.atomic_write_text(written[-1], text)
    for chart in (*charts, *lines):
        spec = _printed(chart)
        written.append(_place(folder, f"{chart.name}.svg"))
        _io.atomic_write_text(written[-1], vl_convert.vegalite_to_svg(spec))
        written.append(_place(folder, f"{chart.name}.png"))
        _io.atomic_write_bytes(written[-1], vl_convert.vegalite_to_png(spec, scale=_SCALE))
    return tuple(written)


def _place(folder: Path, name: str) -> Path:
    path = folder / name
    _io.make_folder(path.parent)
    return path


def _printed(chart: Chart) -> dict[str, Any]:
    """The chart for paper: of a fixed width, light on white."""
    spec = concrete(chart.spec)
    # A chart that fits a page finds its width from it; here there is none.
    return {**spec, "width": _WIDTH_PX, "background": "white", "autosize": {"type": "pad"}}


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    r"""A table as CSV; a text that a spreadsheet would take for a formula gets a quote before it.

    Args:
        columns: headings.
        rows: cells; None is empty.

    Example:
        >>> csv_text(("name", "share"), [("=cmd()", -0.5), ("a,b", None)])
        'name,share\n\'=cmd(),-0.5\n"a,b",\n'
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = escape(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _runs_csv(numbers: Numbers) -> str:
    runs = [run for arm in numbers.arms for run in arm.runs]
    columns = tuple(runs[0].__dataclass_fields__)
    return csv_text(columns, ([getattr(run, name) for name in columns] for run in runs))


def _decisions(numbers: Numbers) -> Iterable[Sequence[Any]]:
    for detail in numbers.details:
        for c in detail.timeline.changes:
            yield (detail.name, c.step, c.epoch, c.seconds, " ".join(c.frozen),
                   " ".join(c.unfrozen), c.frozen_count, c.trained_share, c.reason)  # fmt: skip


def _file_names(names: Sequence[str]) -> list[str]:
    """Names of files, each of its own: letters, digits and few marks, at most 80.

    Example:
        >>> _file_names(["full, seed 0", "../x", "-/x"])
        ['full-seed-0', 'x', 'x-2']
    """
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9.=@_]+", "-", name).strip("-.")[:80] or "run"
        count = 1
        while (unique := plain if count == 1 else f"{plain}-{count}") in found:
            count += 1
        found.append(unique)
    return found
