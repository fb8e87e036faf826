"""`frostline watch`: the live page of runs, on this machine only."""

# ruff: noqa: PLC0415  what serves is imported when it serves

from __future__ import annotations

import contextlib
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from frostline.cli.terminal import console, escape
from frostline.errors import DataError, MissingExtra
from frostline.records import RECORD_NAME
from frostline.tasks.imports import need

__all__ = ["watch"]

_RUNS = Path("runs")


def watch(
    *runs: Annotated[
        Path, Parameter(help="Folders of runs or studies. [default: the newest run in runs]")
    ],
    port: Annotated[
        int, Parameter(help="Port of 127.0.0.1; 0 takes any that is free.", negative="")
    ] = 0,
    browser: Annotated[
        bool, Parameter(["--open"], negative="", help="Open the page in a browser.")
    ] = False,
) -> None:
    """Serve a page of runs that follows them while they train; Ctrl-C stops it.

    The page is for this machine: it listens on 127.0.0.1, and the address holds a secret. Runs are
    only read, and go on when the page is closed.
    """
    from frostline.live.server import open_server

    paths = list(runs) or [_newest()]
    server = open_server(paths, _renderer(), name=", ".join(p.name for p in paths), port=port)
    _step_back()
    out = console(sys.stdout)
    out.print(server.url, soft_wrap=True)
    sys.stdout.flush()
    sys.stderr.write(escape("the address is secret and of this machine; Ctrl-C stops") + "\n")
    if browser:
        webbrowser.open(server.url)
    server.run()


def _renderer() -> Callable[[Sequence[Path]], str]:
    """What makes the page: the report, or a plain one where its libraries are absent."""
    try:
        for module in ("altair", "vl_convert", "jinja2"):
            need(module, extra="report")
    except MissingExtra as error:
        sys.stderr.write(escape(f"a page without charts; with them: {error.fix}") + "\n")
        from frostline.live.plain import render

        return render
    from frostline.report.numbers import numbers_of
    from frostline.report.page import page
    from frostline.report.read import read_runs

    return lambda paths: page(numbers_of(read_runs(paths)))


def _newest() -> Path:
    records = sorted(_RUNS.glob(f"*/{RECORD_NAME}"), key=lambda r: r.stat().st_mtime)
    if not records:
        raise DataError(
            "watch the newest run",
            found=f"no run in {_RUNS}",
            fix="name the folder: frostline watch RUN",
        )
    return records[-1].parent


def _step_back() -> None:
    """Let what trains on this machine go first."""
    with contextlib.suppress(OSError, AttributeError):  # not on Windows
        os.nice(10)
