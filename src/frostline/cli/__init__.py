"""The command `frostline`: one function per sub-command, no logic of its own.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 the run failed,
2 wrong usage, 130 interrupted. Nothing heavy is imported before a sub-command needs it.
"""

# ruff: noqa: PLC0415  what a sub-command needs is imported when it runs
from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit with its code."""
    from frostline.cli.app import run

    sys.exit(run(sys.argv[1:]))
