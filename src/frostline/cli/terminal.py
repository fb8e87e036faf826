"""What reaches the terminal: consoles and tables, every foreign string escaped.

Names of classes, layers, files and the texts of errors come from data and weights that others
made. An escape sequence among them could repaint or reprogram the reader's terminal, and a
bidirectional control could reorder a line, so every foreign string is escaped on its way out.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from frostline.text import bytes_text, count_text, escape

__all__ = [
    "WarningsHere",
    "bytes_text",
    "console",
    "count_text",
    "escape",
    "print_json",
    "print_table",
    "table",
]


def console(stream: TextIO, *, width: int | None = None) -> Console:
    """A console that takes strings as they are: no markup, no emoji codes, no highlighting.

    Colour follows the stream and the variable NO_COLOR. Away from a terminal lines are as long
    as they need to be, so that a table can be piped and searched.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    if width is None and not stream.isatty():
        width = 200
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


def table(
    columns: Mapping[str, str], rows: Iterable[Sequence[object]], *, title: str = ""
) -> Table:
    """A plain table of foreign strings.

    Args:
        columns: heading and alignment ("left" or "right") of each column.
        rows: one cell per column; None is shown as a dash.
        title: line above the table.
    """
    shown = Table(
        box=box.SIMPLE_HEAD,
        title=Text(escape(title)) if title else None,
        collapse_padding=True,
        pad_edge=False,
    )
    shown.title_justify = "left"
    for heading, justify in columns.items():
        right = justify == "right"
        shown.add_column(
            heading, justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in rows:
        shown.add_row(*("-" if cell is None else Text(escape(cell)) for cell in row))
    return shown


def print_table(
    columns: Mapping[str, str], rows: Iterable[Sequence[object]], *, title: str = ""
) -> None:
    """Print a table to stdout."""
    console(sys.stdout).print(table(columns, rows, title=title))


def print_json(value: Any) -> None:
    """Print JSON to stdout; ASCII only, so control characters arrive as escapes."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


class WarningsHere(logging.Handler):
    """Shows what Frostline logs as a warning on stderr, escaped, and above a live bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; through `sys.stderr` as it is now, which a live bar replaces."""
        sys.stderr.write(f"{record.levelname.lower()}: {escape(record.getMessage())}\n")
