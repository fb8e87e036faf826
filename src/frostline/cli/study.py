"""`frostline study`: what the records of a study say; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from frostline.cli.comparison import print_comparison
from frostline.cli.learning_curve import show_curve
from frostline.study.analysis import analyse
from frostline.study.folder import StudyFolder

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
        float | None,
        Parameter(help="Level of the intervals. [default: as declared]"),
    ] = None,
    target: Annotated[
        float | None,
        Parameter(help="Validation accuracy to take times to, e.g. 0.9. [default: as declared]"),
    ] = None,
    json: Annotated[bool, Parameter(negative="", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare the arms of a study from its records alone; nothing is run.

    A study of `frostline learning-curve` is shown as the curve it is, unless another reference,
    margin, level or target is given.
    """
    given = (reference, margin, level, target)
    if all(value is None for value in given) and StudyFolder(folder).spec().is_curve:
        show_curve(folder, as_json=json)
        return
    found = analyse(folder, reference=reference, margin=margin, level=level, target=target)
    print_comparison(found, folder, as_json=json)
