"""`frostline predict`: labels and probabilities for new inputs."""

# ruff: noqa: PLC0415  torch is imported when it is needed

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from frostline.cli.terminal import print_json, print_table
from frostline.errors import DataError, UsageError

if TYPE_CHECKING:
    from frostline.tasks.saved import Prediction

__all__ = ["predict"]


def predict(
    run: Annotated[Path, Parameter(help="Folder of a finished run, or its model folder.")],
    *inputs: Annotated[
        str,
        Parameter(help="Picture files or texts; @FILE takes each line of a file, - of stdin."),
    ],
    top: Annotated[int, Parameter(help="Classes shown per input, the most probable first.")] = 1,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """Print labels and probabilities for new inputs, from a finished run."""
    if top < 1:
        raise UsageError(f"show {top} classes per input", found="fewer than one", fix="--top 1")
    given = [line for text in inputs for line in _expanded(text)]
    if not given:
        raise UsageError(
            f"predict with {run}", found="no inputs", fix=f"frostline predict {run} INPUT"
        )
    from frostline.tasks.run import load

    predictions = load(run).predict(given)
    ranked = [(text, _ranked(p, top)) for text, p in zip(given, predictions, strict=True)]
    if json:
        print_json([{"input": text, "probabilities": dict(best)} for text, best in ranked])
        return
    print_table(
        {"input": "left", "label": "left", "probability": "right"},
        [
            (text if place == 0 else "", label, f"{100 * share:.1f} %")
            for text, best in ranked
            for place, (label, share) in enumerate(best)
        ],
    )


def _ranked(prediction: Prediction, top: int) -> Sequence[tuple[str, float]]:
    pairs = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])
    return pairs[:top]


def _expanded(text: str) -> list[str]:
    if text == "@-":
        lines = sys.stdin.read().splitlines()
    elif text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(
                f"read the inputs in {text[1:]!r}",
                found=str(error),
                fix="a UTF-8 file with one input per line",
            ) from error
    else:
        return [text]
    return [line for line in lines if line.strip()]
