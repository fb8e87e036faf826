"""Reaching code by name: optional libraries, and the user's own functions."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from frostline.errors import FrostlineError, MissingExtra

__all__ = ["is_callable_spec", "need", "resolve_callable"]

_SPEC = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.ASCII)


def need(module: str, *, extra: str) -> ModuleType:
    """Import an optional library.

    Args:
        module: dotted name.
        extra: the extra of Frostline that brings it.

    Raises:
        MissingExtra: it is not installed; the message holds the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtra(
            f"use {package}",
            found=f"no package {package!r} in this Python",
            fix=f"pip install 'frostline[{extra}]'",
        ) from error


def is_callable_spec(text: str) -> bool:
    """Whether `text` reads as 'package.module:callable'.

    Example:
        >>> is_callable_spec("mine.data:flowers"), is_callable_spec("data/flowers")
        (True, False)
    """
    return _SPEC.fullmatch(text) is not None


def resolve_callable(spec: str, *, error: type[FrostlineError]) -> Callable[..., Any]:
    """The function named 'package.module:callable'; the current directory is searched last.

    Args:
        spec: where it is.
        error: the class of error to raise.

    Raises:
        FrostlineError: of class `error`: no such module or name, or not callable.
    """
    module, _, name = spec.partition(":")
    try:
        found: Any = _import(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as cause:  # importing runs the user's code
        raise error(
            f"use {spec!r}",
            found=f"{type(cause).__name__}: {cause}",
            fix="'package.module:callable', importable here or from the current directory",
        ) from cause
    if not callable(found):
        raise error(
            f"call {spec!r}", found=f"a {type(found).__name__}", fix="name a function or class"
        )
    return found


def _import(module: str) -> ModuleType:
    here = str(Path.cwd())
    package = module.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        # Appended, not prepended: a file here must not shadow an installed package.
        if here not in sys.path:
            sys.path.append(here)
        importlib.invalidate_caches()
    return importlib.import_module(module)
