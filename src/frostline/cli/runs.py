"""`frostline runs`: the runs in a folder, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from frostline.cli.results import print_runs
from frostline.errors import DataError
from frostline.records import RECORD_NAME

__all__ = ["runs"]


def runs(
    folder: Annotated[Path, Parameter(help="Folder that holds run folders.")] = Path("runs"),
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """List the runs in a folder: policy, accuracies, time, memory, what was trained."""
    found = sorted(record.parent for record in folder.glob(f"*/{RECORD_NAME}"))
    if not found:
        raise DataError(
            f"list the runs in {folder}",
            found="no run there" if folder.is_dir() else "no such folder",
            fix="give the folder that holds run folders, or start one with: frostline fit",
        )
    print_runs(found, as_json=json)
