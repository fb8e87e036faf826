"""`frostline report`: what runs froze, when, why, and what it bought, on one page."""

# ruff: noqa: PLC0415  what draws is imported when it is known that it is installed

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from frostline.cli.terminal import console, escape, print_json
from frostline.report.mistakes import with_samples
from frostline.report.numbers import Numbers, numbers_of
from frostline.report.read import read_runs
from frostline.tasks.imports import need

__all__ = ["report"]

_EXTRA = ("altair", "vl_convert", "jinja2")


def report(
    runs: Annotated[
        list[Path],
        Parameter(help="Run folders, folders that hold run folders, or one study.", negative=""),
    ],
    *,
    output: Annotated[
        Path | None,
        Parameter(help="The page. [default: report.html in the folder given, or here for several]"),
    ] = None,
    figures: Annotated[
        Path | None,
        Parameter(help="Also write all numbers and charts into this folder: JSON, CSV, SVG, PNG."),
    ] = None,
    samples: Annotated[
        bool,
        Parameter(negative="", help="Read the data again and show test samples that went wrong."),
    ] = False,
    json: Annotated[
        bool, Parameter(negative="", help="Print the numbers as JSON; write no page.")
    ] = False,
) -> None:
    """Show what runs froze, when, why, and what it bought: one HTML file that needs no network."""
    for module in () if json and figures is None else _EXTRA:
        need(module, extra="report")
    numbers = numbers_of(read_runs(runs), samples=with_samples if samples else None)
    if figures is not None:
        _write_figures(numbers, figures)
    if json:
        print_json(numbers.to_json())
        return
    from frostline.report.page import write_page

    path = output or (runs[0] if len(runs) == 1 and runs[0].is_dir() else Path()) / "report.html"
    write_page(numbers, path)
    out = console(sys.stdout)
    out.print(escape(numbers.headline.title), soft_wrap=True)
    out.print(escape(f"report: {path}"), soft_wrap=True)


def _write_figures(numbers: Numbers, folder: Path) -> None:
    from frostline.report.figures import write_figures

    written = write_figures(numbers, folder)
    console(sys.stderr).print(escape(f"{len(written)} files in {folder}"), soft_wrap=True)
