"""Policies by name: the short strings of the command line, and discovery of third-party ones.

``gradual:every=2ep,live_norm=true`` is the policy class registered as ``gradual`` with these
fields. Packages add policies through the entry-point group ``frostline.policies``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.policy import Policy
from frostline.select import Selector, select

__all__ = ["available_policies", "make_policy", "policy_class", "policy_text"]

ENTRY_POINT_GROUP = "frostline.policies"


@functools.cache
def available_policies() -> Mapping[str, str]:
    """Names of all registered policies and where each is defined ("package.module:Class").

    Raises:
        PolicyError: two packages registered the same name.

    Example:
        >>> "gradual" in available_policies()
        True
    """
    found: dict[str, str] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if found.setdefault(point.name, point.value) != point.value:
            raise PolicyError(
                f"register the policy {point.name!r}",
                found=f"two definitions: {found[point.name]} and {point.value}",
                fix="uninstall one of the packages",
            )
    return dict(sorted(found.items()))


def policy_class(name: str) -> type[Policy]:
    """The policy class registered under `name`.

    Raises:
        PolicyError: unknown name, or what it points to is not a policy.
    """
    known = available_policies()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise PolicyError(
            f"use the policy {name!r}",
            found="no policy of that name" + (f"; did you mean {near[0]!r}?" if near else ""),
            fix=f"one of {', '.join(known)}",
        )
    module, _, attribute = known[name].partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PolicyError(f"load the policy {name!r}", found=str(error)) from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(
            f"load the policy {name!r}",
            found=f"{known[name]} is no subclass of frostline.Policy",
            fix="point the entry point at a policy class",
        )
    return found


def make_policy(spec: str | Policy) -> Policy:
    """A policy from its short form; a `Policy` is returned as it is.

    Options are ``field=value`` pairs after a colon, separated by commas. A value that holds a
    comma or a colon may be quoted with single quotes.

    Raises:
        PolicyError: unknown policy or option, or a value of the wrong type.

    Example:
        >>> make_policy("gradual:every=2ep").every
        Duration(value=Fraction(2, 1), unit='ep')
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str):
        raise PolicyError(
            f"read the policy {spec!r}",
            found=f"a {type(spec).__name__}",
            fix="a string such as 'gradual:every=2ep', or a Policy object",
        )
    name, _, options = spec.partition(":")
    kind = policy_class(name.strip())
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(typing.cast("Any", kind)) if f.init}
    values: dict[str, Any] = {}
    for key, text in _pairs(options, spec):
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise PolicyError(
                f"set {key!r} of the policy {name!r}",
                found="no such option" + (f"; did you mean {near[0]!r}?" if near else ""),
                fix=f"options: {', '.join(sorted(fields)) or 'none'}",
            )
        values[key] = _convert(text, hints[key], f"{name}:{key}={text}")
    try:
        return kind(**values)
    except TypeError as error:
        raise PolicyError(
            f"build the policy {spec!r}",
            found=str(error),
            fix=f"options: {', '.join(sorted(fields)) or 'none'}",
        ) from error


def policy_text(policy: Policy) -> str:
    """The short form of a policy, or its repr where it has none (unregistered, nested).

    Example:
        >>> policy_text(make_policy("gradual:every=2ep"))
        'gradual:every=2ep'
    """
    kind = type(policy)
    place = f"{kind.__module__}:{kind.__qualname__}"
    name = next((n for n, value in available_policies().items() if value == place), None)
    if name is None:
        return repr(policy)
    changed = []
    for f in dataclasses.fields(typing.cast("Any", policy)):
        value = getattr(policy, f.name)
        if isinstance(value, Policy):
            return repr(policy)
        if value != f.default:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            changed.append(f"{f.name}='{text}'" if "," in text else f"{f.name}={text}")
    return f"{name}:{','.join(changed)}" if changed else name


def _pairs(options: str, spec: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    rest = options.strip()
    while rest:
        key, equals, rest = rest.partition("=")
        if not equals or not key.strip().isidentifier():
            raise PolicyError(
                f"read the policy {spec!r}",
                found=f"{key!r} where 'option=value' belongs",
                fix="'name:option=value,option=value'",
            )
        if rest.startswith("'"):
            value, quote, rest = rest[1:].partition("'")
            if not quote or (rest and not rest.startswith(",")):
                raise PolicyError(f"read the policy {spec!r}", found="an unclosed quote")
            rest = rest[1:]
        else:
            value, _, rest = rest.partition(",")
        pairs.append((key.strip(), value.strip()))
    return pairs


def _convert(text: str, hint: Any, where: str) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if type(None) in choices and text.lower() in ("none", ""):
        return None
    readers: dict[Any, Any] = {
        bool: _bool,
        int: int,
        float: float,
        Duration: Duration.parse,
        Selector: select,
        str: str,
    }
    for kind in choices:
        if typing.get_origin(kind) is typing.Literal:
            if text in typing.get_args(kind):
                return text
            continue
        if kind in readers:
            try:
                return readers[kind](text)
            except ValueError:
                continue
    raise PolicyError(
        f"read {where!r}",
        found=f"{text!r}, which is no {_readable(hint)}",
        fix=f"a value of type {_readable(hint)}",
    )


def _readable(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def _bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError(text)
