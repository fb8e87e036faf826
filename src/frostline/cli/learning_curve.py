"""`frostline learning-curve`: accuracy by number of training samples, policy by policy."""

# ruff: noqa: PLC0415  what trains is imported when training starts

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from frostline.cli.compare import follow_runs, required, seeds_of
from frostline.cli.flags import CONFIG, config_flags, merged
from frostline.cli.terminal import console, escape, print_json, print_table
from frostline.errors import ConfigError

if TYPE_CHECKING:
    from frostline.study.learning_curve import LearningCurve, SizePoint

__all__ = ["learning_curve", "print_curve", "show_curve"]

_List = Parameter(consume_multiple=True, negative="")
#: Settings that this command says by itself.
_OWN = ("policy", "seed", "output", "train_samples")


@functools.partial(config_flags, without=_OWN)
def learning_curve(
    given: Mapping[str, Any],
    *,
    policies: Annotated[
        list[str], Parameter(help="Policies, e.g. full first:groups=4 linear-probe."), _List
    ] = ["full", "linear-probe"],  # noqa: B006  never changed
    sizes: Annotated[
        list[str] | None,
        Parameter(
            help="Numbers of training samples, or shares of them, e.g. 100 400 or 25% 100%. "
            "[default: 1/16, 1/8, 1/4, 1/2 and all]",
        ),
        _List,
    ] = None,
    seeds: Annotated[str, Parameter(help="How many seeds, from 0 (3); or which (4,5,6).")] = "3",
    metric: Annotated[
        Literal["val", "test"], Parameter(help="Accuracy on which samples is shown.")
    ] = "val",
    output: Annotated[
        Path | None, Parameter(help="Folder of the study. [default: under studies]")
    ] = None,
    together: Annotated[
        bool, Parameter(negative="", help="All runs in this process: quicker to start.")
    ] = False,
    config: Annotated[Path | None, CONFIG] = None,
    json: Annotated[bool, Parameter(negative="", help="Print the curve as JSON.")] = False,
    quiet: Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="No progress.")] = False,
) -> None:
    """Fine-tune on nested parts of the training data: from how many samples on is freezing worse?

    Every run makes as many updates as one on the largest size. The same command again goes on
    where it was; with more policies, seeds or smaller sizes it does the rest.
    """
    settings = required(merged(given, config, without=_OWN))
    from frostline.study.learning_curve import SIZES, run_curve

    with follow_runs(quiet=quiet) as on_event:
        folder = run_curve(
            settings.pop("model"),
            settings.pop("data"),
            policies,
            sizes=SIZES if sizes is None else [_size(text) for text in sizes],
            seeds=seeds_of(seeds),
            output=output,
            isolate=not together,
            on_event=on_event,
            **settings,
        )
    show_curve(folder, metric=metric, as_json=json)


def _size(text: str) -> int | float:
    """A number of samples, or a share of them.

    Raises:
        ConfigError: neither.

    Example:
        >>> _size("200"), _size("25%"), _size("0.5"), _size("100%")
        (200, 0.25, 0.5, 1.0)
    """
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(
            f"train on {text!r} samples", found="no number", fix="200, or a share such as 25%"
        ) from None


# -- what is shown -------------------------------------------------------------------------------


def show_curve(
    folder: Path, *, metric: Literal["val", "test"] = "val", as_json: bool = False
) -> None:
    """Print the curve that a study drew, from its records alone."""
    from frostline.study.learning_curve import read_curve

    curve = read_curve(folder, metric=metric)
    if as_json:
        print_json({"path": str(folder), **curve.to_json()})
        return
    print_curve(curve)
    console(sys.stdout).print(escape(f"study folder: {folder}"), soft_wrap=True)


def print_curve(curve: LearningCurve) -> None:
    """Print a row per size, a column per policy, and what follows in sentences."""
    sizes = sorted({point.size for points in curve.points.values() for point in points})
    columns = {"samples": "right", **dict.fromkeys(map(escape, curve.policies), "right")}
    print_table(columns, [_row(size, curve.points.values()) for size in sizes])
    split = {"val": "validation", "test": "test"}[curve.metric]
    count = "" if curve.eval_samples is None else f"{curve.eval_samples} "
    lines = [f"accuracy on {count}{split} samples; [{100 * curve.level:g} % interval of the mean]"]
    lines += [curve.sentence(), *(f"note: {note}" for note in curve.notes)]
    out = console(sys.stdout)
    for line in lines:
        out.print(escape(line), soft_wrap=True)


def _row(size: int, curves: Iterable[Sequence[SizePoint]]) -> list[str | None]:
    found = ({p.size: p for p in points}.get(size) for points in curves)
    return [str(size), *(None if point is None else _cell(point) for point in found)]


def _cell(point: SizePoint) -> str | None:
    if point.mean is None:
        return None
    text = f"{100 * point.mean:.1f} %"
    if point.low is None or point.high is None:
        return text
    return f"{text} [{100 * point.low:.1f}, {100 * point.high:.1f}]"
