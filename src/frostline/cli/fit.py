"""`frostline fit`: from a model, data and a policy to a tested, saved model."""

# ruff: noqa: PLC0415  what trains is imported when training starts

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from frostline.cli.flags import config_flags, overrides
from frostline.cli.progress import follow
from frostline.cli.results import print_run
from frostline.cli.terminal import console, escape, print_json
from frostline.tasks.config import RunConfig, dump_config, load_config

__all__ = ["fit"]


@config_flags
def fit(
    given: Mapping[str, Any],
    *,
    config: Annotated[
        Path | None, Parameter(help="YAML file of settings; flags win over it.")
    ] = None,
    print_config: Annotated[
        bool, Parameter(negative="", help="Print the merged settings and stop.")
    ] = False,
    fresh: Annotated[
        bool,
        Parameter(negative="", help="Start over; an earlier run in the folder is moved aside."),
    ] = False,
    json: Annotated[bool, Parameter(negative="", help="Print the summary as JSON.")] = False,
    quiet: Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="No progress.")] = False,
) -> None:
    """Fine-tune a model on your data under a freezing policy.

    The same command again goes on with an interrupted run.
    """
    flags = overrides(given)
    settings = load_config(config, flags)
    if print_config:
        _print_settings(settings, flags, config)
        return
    from frostline.tasks.run import fit as fit_run

    happened: list[str] = []
    with follow(sys.stderr, title=settings.policy, quiet=quiet) as show:

        def on_event(event: Mapping[str, Any]) -> None:
            happened.append(event["kind"])
            show(event)

        run = fit_run(config=settings, fresh=fresh, on_event=on_event)
    if not happened and not quiet:
        sys.stderr.write("finished already; --fresh starts over\n")
    if json:
        print_json({"path": str(run.path), **run.summary})
        return
    print_run(run.path)
    out = console(sys.stdout)
    out.print(escape(f"run folder           {run.path}"), soft_wrap=True)
    out.print(escape(f"next                 frostline predict {run.path} INPUT"), soft_wrap=True)


def _print_settings(settings: RunConfig, flags: Mapping[str, Any], file: Path | None) -> None:
    """The settings as YAML that `--config` reads back, each with where it came from."""
    out = console(sys.stdout)
    for line in dump_config(settings).splitlines():
        name = line.partition(":")[0]
        out.print(escape(f"{line}{_origin(name, settings, flags, file)}"), soft_wrap=True)


def _origin(name: str, settings: RunConfig, flags: Mapping[str, Any], file: Path | None) -> str:
    if name in flags:
        return "  # flag"
    if name in settings.model_fields_set and file is not None:
        return f"  # {file.name}"
    return "  # default" if name in RunConfig.model_fields else ""
