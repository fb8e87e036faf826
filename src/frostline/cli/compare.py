"""`frostline compare`: several policies, several seeds, one budget; and what the records say."""

# ruff: noqa: PLC0415  what trains is imported when training starts

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.progress import BarColumn, Progress, TextColumn

from frostline.cli.comparison import print_comparison
from frostline.cli.flags import CONFIG, config_flags, merged
from frostline.cli.results import seconds_text
from frostline.cli.terminal import console, escape
from frostline.errors import ConfigError

__all__ = ["compare", "follow_runs", "required", "seeds_of"]

_List = Parameter(consume_multiple=True, negative="")
#: Settings that this command says by itself.
_OWN = ("policy", "seed", "output")


@functools.partial(config_flags, without=_OWN)
def compare(  # noqa: PLR0913 - all by name, all with defaults
    given: Mapping[str, Any],
    *,
    policies: Annotated[
        list[str],
        Parameter(
            help="Policies to compare, e.g. full linear-probe gradual:until=50%.", negative=""
        ),
        _List,
    ] = [  # noqa: B006  never changed
        "full",
        "linear-probe",
        "gradual",
        "auto",
    ],
    seeds: Annotated[str, Parameter(help="How many seeds, from 0 (3); or which (4,5,6).")] = "3",
    controls: Annotated[
        list[str] | None,
        Parameter(
            help="Controls of each policy: time (full fine-tuning in its seconds), compute (a "
            "static prefix of equal backward work), placebo (its signals shuffled).",
            negative="",
        ),
        _List,
    ] = None,
    reference: Annotated[
        str | None, Parameter(help="Policy that the others are compared with. [default: full]")
    ] = None,
    margin: Annotated[
        float,
        Parameter(help="How much worse in accuracy still counts as not worse; 0.01: a point."),
    ] = 0.01,
    level: Annotated[float, Parameter(help="Level at which all intervals hold together.")] = 0.95,
    target: Annotated[
        float | None,
        Parameter(
            help="Validation accuracy that times are taken to, e.g. 0.9. [default: the reference's "
            "mean less the margin]"
        ),
    ] = None,
    output: Annotated[
        Path | None, Parameter(help="Folder of the study. [default: under studies]")
    ] = None,
    together: Annotated[
        bool,
        Parameter(
            negative="",
            help="All runs in this process: quicker to start, memory is not told apart.",
        ),
    ] = False,
    config: Annotated[Path | None, CONFIG] = None,
    json: Annotated[bool, Parameter(negative="", help="Print the comparison as JSON.")] = False,
    quiet: Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="No progress.")] = False,
) -> None:
    """Fine-tune under several policies with several seeds, and compare them fairly.

    The same command again goes on where it was; with more policies or seeds it does the rest.
    """
    settings = required(merged(given, config, without=_OWN))
    from frostline.study.compare import compare as run

    with follow_runs(quiet=quiet) as on_event:
        done = run(
            settings.pop("model"),
            settings.pop("data"),
            policies,
            seeds=seeds_of(seeds),
            controls=controls or (),
            reference=reference,
            margin=margin,
            level=level,
            target=target,
            output=output,
            isolate=not together,
            on_event=on_event,
            **settings,
        )
    print_comparison(done.analyse(), done.path, as_json=json)


def required(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, which name a model and data.

    Raises:
        ConfigError: they do not.
    """
    for name in ("model", "data"):
        if name not in settings:
            raise ConfigError("compare policies", found=f"no {name}", fix="MODEL DATA --policies …")
    return settings


def seeds_of(text: str) -> int | list[int]:
    """How many seeds, or which.

    Raises:
        ConfigError: neither.

    Example:
        >>> seeds_of("3"), seeds_of("4,5")
        (3, [4, 5])
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < (1 if len(numbers) == 1 else 0):
        raise ConfigError(f"use the seeds {text!r}", found="no numbers", fix="3, or 4,5,6")
    return numbers[0] if "," not in text else numbers


# -- what is shown -------------------------------------------------------------------------------


@contextmanager
def follow_runs(*, quiet: bool) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """A line per run, and on a terminal a bar for the run in progress."""
    out = console(sys.stderr)
    if quiet:
        yield None
    elif not out.is_terminal or out.is_dumb_terminal:
        yield functools.partial(_line, lambda text: out.print(text, soft_wrap=True))
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[now]}", markup=False),
        )
        with Progress(*columns, console=out, transient=True) as bar:
            task = bar.add_task("preparing", total=None, now="")

            def show(event: Mapping[str, Any]) -> None:
                _line(lambda text: bar.console.print(text, soft_wrap=True), event)
                if event["kind"] in ("start", "step"):
                    bar.update(
                        task,
                        description=escape(_title(event)),
                        total=event["total_steps"],
                        completed=event["step"],
                        now=f"update {event['step']}/{event['total_steps']}",
                    )

            yield show


def _title(event: Mapping[str, Any]) -> str:
    return f"run {event['place']}/{event['of']}: {event['arm']}, seed {event['seed']}"


def _line(say: Callable[[str], Any], event: Mapping[str, Any]) -> None:
    if event["kind"] != "end":
        return
    summary = event["summary"]
    say(
        escape(
            f"{_title(event)}: val accuracy {100 * summary['val_accuracy']:.1f} %, "
            f"{seconds_text(summary['training_s'])} of training"
        )
    )
