"""`frostline policies`: what can decide what is frozen, and its options."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from dataclasses import dataclass
from typing import Annotated, Any, cast

from cyclopts import Parameter

from frostline.cli.terminal import console, escape, print_json, print_table
from frostline.policy import Policy
from frostline.registry import available_policies, policy_class

__all__ = ["policies"]


def policies(
    name: Annotated[str | None, Parameter(help="Show this policy with its options.")] = None,
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """List the freezing policies, or show one with its options.

    A policy is written NAME or NAME:OPTION=VALUE,OPTION=VALUE, for example gradual:every=2ep.
    """
    if name is not None:
        _show(name, as_json=json)
    elif json:
        print_json({known: _first_line(known) for known in available_policies()})
    else:
        rows = [(known, _first_line(known)) for known in available_policies()]
        print_table({"policy": "left", "what it does": "left"}, rows)
        console(sys.stdout).print("Options and source of one: frostline policies NAME")


@dataclass(frozen=True, slots=True)
class _Option:
    """One field of a policy, as its user writes it."""

    option: str
    type: str
    default: str


def _options(kind: type[Policy]) -> list[_Option]:
    return [
        _Option(f.name, str(f.type), "required" if _required(f) else _written(f.default))
        for f in dataclasses.fields(cast("Any", kind))
        if f.init
    ]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _written(default: object) -> str:
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _show(name: str, *, as_json: bool) -> None:
    kind = policy_class(name)
    options = _options(kind)
    about = inspect.getdoc(kind) or ""
    if as_json:
        print_json(
            {"name": name, "options": [dataclasses.asdict(o) for o in options], "about": about}
        )
        return
    out = console(sys.stdout)
    for line in about.splitlines():
        out.print(escape(line), soft_wrap=True)
    if options:
        print_table(
            {"option": "left", "type": "left", "default": "left"},
            [dataclasses.astuple(o) for o in options],
        )
    given = ",".join(f"{o.option}={_value(o)}" for o in options)
    out.print(f"--policy {escape(name)}" + (f":{given}" if given else ""), soft_wrap=True)


def _value(option: _Option) -> str:
    return "..." if option.default == "required" else option.default


def _first_line(name: str) -> str:
    return (inspect.getdoc(policy_class(name)) or "").partition("\n")[0]
