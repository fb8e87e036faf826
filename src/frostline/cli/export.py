"""`frostline export`: the tuned model of a run as a file of its own library."""

# ruff: noqa: PLC0415  torch is imported when it is needed

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from frostline.cli.terminal import console, escape, print_json

__all__ = ["export"]


def export(
    run: Annotated[Path, Parameter(help="Folder of a finished run, or its model folder.")],
    file: Annotated[Path, Parameter(help="File to write, ending in .keras.")],
    overwrite: Annotated[
        bool, Parameter(negative="", help="Replace the file if it exists.")
    ] = False,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """Write the tuned Keras model of a run as a .keras file."""
    from frostline.tasks.keras_export import export_keras
    from frostline.tasks.run import load

    loaded = load(run)
    written = export_keras(loaded.model, file, overwrite=overwrite)
    if json:
        print_json(written | {"labels": list(loaded.labels)})
        return
    out = console(sys.stdout)
    out.print(escape(f"{written['path']}, {written['bytes']:,} bytes"), soft_wrap=True)
    out.print(escape(f"outputs, in order: {', '.join(loaded.labels)}"), soft_wrap=True)
