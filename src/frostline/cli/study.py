"""`frostline study`: what the records of a study say; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from frostline.cli.comparison import print_comparison
from frostline.study.analysis import analyse

__all__ = ["study"]


def study(
    folder: Annotated[Path, Parameter(help="Folder of a study.")],
    *,
    reference: Annotated[
        str | None, Parameter(help="Compare with this arm instead of the declared one.")
    ] = None,
    margin: Annotated[
        float | None,
        Parameter(help="Another margin; one chosen after looking proves nothing."),
    ] = None,
    level: Annotated[
        float | None, Parameter(help="Level of the intervals. [default: 0.95]")
    ] = None,
    json: Annotated[bool, Parameter(negative="", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare the arms of a study from its records alone; nothing is run."""
    found = analyse(folder, reference=reference, margin=margin, level=level)
    print_comparison(found, folder, as_json=json)
