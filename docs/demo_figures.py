"""Puts the output of a real `make demo` into the README and docs/demo.svg.

The progress is the captured log; the table is made from the records of the runs it names.

Usage::

    make demo 2>&1 | tee demo.log
    python docs/demo_figures.py demo.log "2 CPU cores, Linux x86-64"
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

from rich.console import Console

from frostline.cli.results import print_runs

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
_PROGRESS = ("run folder ", "frozen ", "step ", "epoch ")
_BLOCK = re.compile(r"<!-- figures -->.*?<!-- /figures -->", re.DOTALL)


def main(log: Path, machine: str) -> None:
    """Write both from a captured log, in the folder where the demo ran."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8").splitlines()]
    shown = [line for line in lines if line.startswith(_PROGRESS)]
    runs = [line.removeprefix("run folder ") for line in shown if line.startswith("run folder ")]
    made = table(runs)
    (DOCS / "demo.svg").write_text(picture([*shown, "", *made]), encoding="utf-8")
    block = ["<!-- figures -->", "```text", *made, "```", machine, "<!-- /figures -->"]
    text = README.read_text(encoding="utf-8")
    README.write_text(_BLOCK.sub(lambda _: "\n".join(block), text), encoding="utf-8")


def table(runs: list[str]) -> list[str]:
    """The comparison as the demo prints it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_runs(runs)
    return [
        line[1:].rstrip() if line.startswith(" ") else line
        for line in out.getvalue().splitlines()
        if line.strip()
    ]


def picture(lines: list[str]) -> str:
    """The lines as an SVG of a terminal."""
    width = max(map(len, lines)) + 1
    screen = Console(
        record=True, file=io.StringIO(), width=width, markup=False, highlight=False, emoji=False
    )
    for line in lines:
        screen.print(line)
    return screen.export_svg(title="make demo")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
