"""`frostline sweep`: many policies, most of them stopped early."""

# ruff: noqa: PLC0415  what trains is imported when training starts

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from frostline.cli.compare import follow_runs, required
from frostline.cli.flags import CONFIG, config_flags, merged
from frostline.cli.terminal import console, escape, print_json, print_table
from frostline.text import percent_text, seconds_text

__all__ = ["sweep"]

_COLUMNS = {
    "policy": "left",
    "state": "left",
    "epochs": "right",
    "samples": "right",
    "val acc": "right",
    "time": "right",
}
#: Settings that this command says by itself.
_OWN = ("policy", "seed", "output")


@functools.partial(config_flags, without=_OWN)
def sweep(  # noqa: PLR0913 - all by name, all with defaults
    given: Mapping[str, Any],
    *,
    policies: Annotated[list[str], Parameter(help="Policies to try.", consume_multiple=True)],
    output: Annotated[Path, Parameter(help="Folder of the sweep.")],
    over: Annotated[
        Literal["epochs", "data"],
        Parameter(help="Stop after more and more epochs of a run, or runs on more and more data."),
    ] = "epochs",
    first: Annotated[
        int | None,
        Parameter(help="What each policy gets. [default: 1 epoch, or 100 samples]"),
    ] = None,
    factor: Annotated[int, Parameter(help="One in so many goes on past a rung.")] = 3,
    seed: Annotated[int, Parameter(help="Of all runs.")] = 0,
    storage: Annotated[
        str | None,
        Parameter(help="Where Optuna keeps the trials, a URL. [default: SQLite in the folder]"),
    ] = None,
    together: Annotated[
        bool, Parameter(negative="", help="All runs in this process: quicker to start.")
    ] = False,
    config: Annotated[Path | None, CONFIG] = None,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
    quiet: Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="No progress.")] = False,
) -> None:
    """Try many policies with one seed and stop early those that others leave behind.

    The same command again goes on where it was; with more policies it tries those, too.
    """
    settings = required(merged(given, config, without=_OWN))
    from frostline.study.search import sweep as run

    with follow_runs(quiet=quiet) as on_event:
        found = run(
            settings.pop("model"),
            settings.pop("data"),
            policies,
            output=output,
            over=over,
            first=first,
            factor=factor,
            seed=seed,
            storage=storage,
            isolate=not together,
            on_event=on_event,
            **settings,
        )
    if json:
        print_json({"path": str(found.path), "rows": [asdict(row) for row in found.rows]})
        return
    rows = [
        (
            row.policy,
            row.state,
            row.epochs,
            row.samples,
            percent_text(row.val_accuracy),
            seconds_text(row.training_s),
        )
        for row in found.rows
    ]
    print_table(_COLUMNS, rows)
    out = console(sys.stdout)
    out.print(escape(found.sentence), soft_wrap=True)
    out.print(escape(f"sweep folder: {found.path}"), soft_wrap=True)
