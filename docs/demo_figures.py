"""Puts the output of a real `make demo` into the README and docs/demo.svg.

Usage::

    make demo 2>&1 | tee demo.log
    python docs/demo_figures.py demo.log "2 CPU cores, Linux x86-64"
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
_BLOCK = re.compile(r"<!-- figures -->.*?<!-- /figures -->", re.DOTALL)


def main(log: Path, machine: str) -> None:
    """Write both from a captured log."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8").splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("run folder "))
    shown = lines[start:]
    (DOCS / "demo.svg").write_text(picture(shown), encoding="utf-8")
    block = "\n".join(["<!-- figures -->", *table(shown), "", f"({machine})", "<!-- /figures -->"])
    text = README.read_text(encoding="utf-8")
    README.write_text(_BLOCK.sub(lambda _: block, text), encoding="utf-8")


def table(lines: list[str]) -> list[str]:
    """The comparison at the end of the demo, as a text block."""
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["run", "policy"])
    rows = [line for line in lines[head : head + 5] if line.strip()]
    return ["```text", *(row.removeprefix("  ") for row in rows), "```"]


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
