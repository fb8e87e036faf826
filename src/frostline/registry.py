"""Policies by name: the short strings of the command line, and discovery of third-party ones.

``gradual:every=2ep,live_norm=true`` is the policy class registered as ``gradual`` with these
fields; `frostline.shortform` has the whole grammar. Packages add policies through the entry-point
group ``frostline.policies``, and policies made of policies through ``frostline.combinators``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Literal

from frostline.errors import FrostlineError, PolicyError
from frostline.policy import Policy
from frostline.shortform import default_of, options_of, read_policy, write_policy

__all__ = [
    "FAMILIES",
    "Family",
    "available_combinators",
    "available_policies",
    "default_policy",
    "make_policy",
    "policy_class",
    "policy_family",
    "policy_text",
    "short_form",
]

Family = Literal["static", "scheduled", "dynamic", "combinator"]
#: What the policies of a family decide by.
FAMILIES: Mapping[Family, str] = {
    "static": "the same plan from start to end",
    "scheduled": "by the clock",
    "dynamic": "by what is measured during the run",
    "combinator": "policies made of policies",
}

ENTRY_POINT_GROUP = "frostline.policies"
COMBINATOR_GROUP = "frostline.combinators"


@functools.cache
def available_policies() -> Mapping[str, str]:
    """Names of all registered policies and where each is defined ("package.module:Class").

    Raises:
        PolicyError: two packages registered the same name.

    Example:
        >>> "gradual" in available_policies()
        True
    """
    return _registered(ENTRY_POINT_GROUP)


@functools.cache
def available_combinators() -> Mapping[str, str]:
    """Names of all registered policies that are made of policies, and where each is defined.

    Raises:
        PolicyError: two packages registered the same name.

    Example:
        >>> "placebo" in available_combinators()
        True
    """
    return _registered(COMBINATOR_GROUP)


def _registered(group: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for point in importlib.metadata.entry_points(group=group):
        _add(found, point.name, point.value)
    return dict(sorted(found.items()))


def _add(found: dict[str, str], name: str, place: str) -> None:
    if found.setdefault(name, place) != place:
        raise PolicyError(
            f"register the policy {name!r}",
            found=f"two definitions: {found[name]} and {place}",
            fix="uninstall one of the packages",
        )


def _all() -> Mapping[str, str]:
    found = dict(available_policies())
    for name, place in available_combinators().items():
        _add(found, name, place)
    return found


def policy_class(name: str) -> type[Policy]:
    """The policy or combinator class registered under `name`.

    Raises:
        PolicyError: unknown name, or what it points to is not a policy.
    """
    known = _all()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        shown = name if len(name) <= 200 else f"{name[:200]}..."
        raise PolicyError(
            f"use the policy {shown!r}",
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

    Options are ``field=value`` pairs after a colon, separated by commas. An option that is a
    policy takes a short form in parentheses; a value that holds a comma may be quoted with single
    quotes. See `frostline.shortform`.

    Raises:
        PolicyError: unknown policy or option, or a value of the wrong type.

    Example:
        >>> make_policy("gradual:every=2ep").every
        Duration(value=Fraction(2, 1), unit='ep')
        >>> make_policy("max-frozen:policy=(freeze:select=depth<3),fraction=0.5").fraction
        0.5
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str):
        raise PolicyError(
            f"read the policy {spec!r}",
            found=f"a {type(spec).__name__}",
            fix="a string such as 'gradual:every=2ep', or a Policy object",
        )
    return read_policy(spec, policy_class)


def policy_text(policy: Policy) -> str:
    """The short form of a policy, or its repr where no short form would give it back.

    Policies of unregistered classes have none, nor have those whose selector is an object made in
    code, or that are nested deeper than short forms may be.

    Example:
        >>> policy_text(make_policy("gradual:every=2ep"))
        'gradual:every=2ep'
    """
    text = write_policy(policy, _name_of)
    try:
        if text is not None and make_policy(text) == policy:
            return text
    except FrostlineError:
        pass
    return repr(policy)


def short_form(policy: str | Policy) -> str:
    """The short form of a policy, by which another process can make it; a text stays as it is.

    Raises:
        PolicyError: it has none.

    Example:
        >>> short_form(make_policy("gradual:every=2ep")), short_form("full")
        ('gradual:every=2ep', 'full')
    """
    if isinstance(policy, str):
        return policy
    text = policy_text(policy)
    if text == repr(policy):
        raise PolicyError(
            f"record the policy {text[:200]}",
            found="no short form that gives it back, so the run could not be gone on with",
            fix="register its class as an entry point of 'frostline.policies', and write "
            "selectors as strings",
        )
    return text


def _name_of(kind: type[Policy]) -> str | None:
    place = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, value in _all().items() if value == place), None)


def policy_family(name: str) -> Family:
    """What the policy of this name decides by, at its default settings.

    Raises:
        PolicyError: unknown name.

    Example:
        >>> policy_family("linear-probe"), policy_family("gradual"), policy_family("placebo")
        ('static', 'scheduled', 'combinator')
    """
    kind = policy_class(name)
    if name in available_combinators():
        return "combinator"
    needs = () if (policy := default_policy(name)) is None else policy.needs()
    patience = [default_of(f) for f in options_of(kind) if f.name == "patience"]
    # Patience is counted in evaluations, so a policy with a default for it waits on a metric.
    if any(need.every is not None for need in needs) or any(patience):
        return "dynamic"
    return "static" if needs or kind.__module__.endswith(".static") else "scheduled"


def default_policy(name: str) -> Policy | None:
    """The policy of this name at its default settings; None if it has an option without one.

    Raises:
        PolicyError: unknown name.

    Example:
        >>> default_policy("linear-probe"), default_policy("freeze")
        (LinearProbe(live_norm=False), None)
    """
    kind = policy_class(name)
    if any(default_of(f) is dataclasses.MISSING for f in options_of(kind)):
        return None
    try:
        return kind()
    except PolicyError:  # one of several options must be given
        return None
