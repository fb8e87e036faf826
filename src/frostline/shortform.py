"""The short form of policies, read and written: ``name:option=value,option=value``.

A value runs to the next comma outside parentheses and brackets, so selectors need no quotes:
``freeze:select=backbone & !(kind:norm | depth<2)``. A value in single quotes is taken as it is,
with ``''`` for a quote in it. An option that is itself a policy takes a short form in
parentheses, one that is several policies one pair of parentheses for each::

    placebo:policy=(autofreeze:every=10%),seed=1
    then:first=(linear-probe),after=2ep,second=(gradual:every=1ep)
    union:policies=(freeze:select=kind:norm)(gradual)

What is read comes from command lines and files of others: its length and its depth are bounded.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from frostline.clock import Duration
from frostline.errors import FrostlineError, PolicyError
from frostline.policy import Policy
from frostline.select import Selector, select

__all__ = [
    "MAX_DEPTH",
    "MAX_LENGTH",
    "default_of",
    "hints_of",
    "options_of",
    "read_policy",
    "readable_type",
    "write_policy",
    "write_value",
]

#: Characters of a short form, and policies within policies. Far more than anyone writes by hand.
MAX_LENGTH = 10_000
MAX_DEPTH = 20

_NAME = re.compile(r"[^:,()]*")
_KEY = re.compile(r"[^=,()]*")
_FORM = "'name:option=value,option=value'"


def read_policy(text: str, find: Callable[[str], type[Policy]]) -> Policy:
    """The policy of a short form.

    Args:
        text: the short form.
        find: the policy class of a name; raises `PolicyError` for an unknown one.

    Raises:
        PolicyError: unknown policy or option, a value of the wrong type, a form that is not one.
    """
    reader = _Reader(text, find)
    if len(text) > MAX_LENGTH:
        raise reader.unreadable(f"{len(text):,} characters", f"at most {MAX_LENGTH:,}")
    try:
        return reader.policy()
    except RecursionError:
        raise reader.unreadable("parts nested too deeply", "fewer parentheses") from None


def write_policy(policy: Policy, name_of: Callable[[type[Policy]], str | None]) -> str | None:
    """The short form of a policy without its defaults; None where it has none.

    Args:
        policy: the policy.
        name_of: the name of a policy class, None for one that has no name.
    """
    name = name_of(type(policy))
    if name is None:
        return None
    options = []
    for field in options_of(type(policy)):
        value = getattr(policy, field.name)
        if value == default_of(field):
            continue
        text = write_value(value, name_of)
        if text is None:
            return None
        options.append(f"{field.name}={text}")
    return f"{name}:{','.join(options)}" if options else name


def options_of(kind: type[Policy]) -> list[dataclasses.Field[Any]]:
    """The fields that a short form can set."""
    return [f for f in dataclasses.fields(typing.cast("Any", kind)) if f.init]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of an option; `dataclasses.MISSING` where it is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def hints_of(kind: type[Policy]) -> dict[str, Any]:
    """The types of the options.

    Raises:
        PolicyError: a type that is not there at run time.
    """
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError) as error:
        raise PolicyError(
            f"read options of {kind.__name__}",
            found=str(error),
            fix="import the types of its fields outside of TYPE_CHECKING",
        ) from error


# -- writing ----------------------------------------------------------------------------------


def _nameless(kind: type[Policy]) -> None:
    del kind


def write_value(
    value: Any, name_of: Callable[[type[Policy]], str | None] = _nameless
) -> str | None:
    """The value of an option as it stands in a short form; None where it cannot be written.

    Example:
        >>> write_value(Duration.parse("10%")), write_value(True), write_value("a, b")
        ('10%', 'true', "'a, b'")
    """
    if isinstance(value, Policy):
        inner = write_policy(value, name_of)
        return None if inner is None else f"({inner})"
    if isinstance(value, tuple):
        each = [write_value(item, name_of) for item in value if isinstance(item, Policy)]
        whole = each and len(each) == len(value) and None not in each
        return "".join(map(str, each)) if whole else None
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if _is_plain(text) else "'" + text.replace("'", "''") + "'"


def _is_plain(text: str) -> bool:
    """Whether a value reads back without quotes, wherever it stands."""
    if text != text.strip() or text.startswith("'") or text.lower() in ("", "none"):
        return False
    try:
        # What follows it is a closing parenthesis at the earliest, and may hold a bracket.
        return _end_of_value(f"{text})]", 0, nested=True) == len(text)
    except _Unclosed:
        return False


# -- reading ----------------------------------------------------------------------------------


class _Unclosed(Exception):
    """An opening parenthesis without its closing one."""


def _end_of_value(text: str, start: int, *, nested: bool) -> int:
    """Where a value without quotes ends: at a comma, or at the parenthesis around its policy."""
    depth, at = 0, start
    while at < len(text):
        character = text[at]
        if character == "[":
            at = max(at, text.find("]", at))  # one that is never closed stands for itself
        elif character == "(":
            depth += 1
        elif character == ")":
            if nested and not depth:
                return at
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            return at
        at += 1
    if depth:
        raise _Unclosed
    return at


@dataclasses.dataclass(slots=True)
class _Reader:
    """Reads one short form from left to right."""

    text: str
    find: Callable[[str], type[Policy]]
    depth: int = 0
    at: int = 0

    def policy(self, *, nested: bool = False) -> Policy:
        """The policy from here to the end, or to the closing parenthesis if it is nested."""
        if self.depth > MAX_DEPTH:
            raise self.unreadable(
                f"policies nested more than {MAX_DEPTH} deep", "fewer policies within policies"
            )
        start = self.at
        # A name at the outside runs to the colon: what is no name is shown whole.
        name = self._match(_NAME) if nested else self._match(re.compile(r"[^:]*"))
        kind, values = self.find(name), dict[str, Any]()
        if self._next() == ":":
            self.at += 1
            while not self._at_end(nested=nested):
                self._option(name, kind, values, nested=nested)
        if nested and self._next() != ")":
            raise self._unexpected("':' or ')'")
        return self._build(name, kind, values, self.text[start : self.at])

    def _option(
        self, name: str, kind: type[Policy], values: dict[str, Any], *, nested: bool
    ) -> None:
        key = self._match(_KEY)
        if self._next() != "=" or not key.isidentifier():
            raise self.unreadable(f"{key!r} where 'option=value' belongs", _FORM)
        self.at += 1
        fields = [f.name for f in options_of(kind)]
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise PolicyError(
                f"set {key!r} of the policy {name!r}",
                found="no such option" + (f"; did you mean {near[0]!r}?" if near else ""),
                fix=_options_are(kind),
            )
        if key in values:
            raise self.unreadable(f"{key!r} of the policy {name!r} twice", "give it once")
        values[key] = self._value(f"{name}:{key}", hints_of(kind)[key], nested=nested)
        if not self._at_end(nested=nested):
            if self._next() != ",":
                raise self._unexpected("','")
            self.at += 1

    def _value(self, where: str, hint: Any, *, nested: bool) -> Any:
        choices = _choices(hint)
        if self._next() == "(" and Policy in choices:
            return self._nested()
        if self._next() == "(" and _SEVERAL in choices:
            several = []
            while self._next() == "(":
                several.append(self._nested())
            return tuple(several)
        text, quoted = self._quoted() if self._next() == "'" else self._plain(nested=nested)
        if not quoted and type(None) in choices and text.lower() in ("none", ""):
            return None
        if Policy in choices or _SEVERAL in choices:
            one = _Reader(text, self.find, self.depth + 1).policy()
            return one if Policy in choices else (one,)
        return _convert(text, hint, f"{where}={text}")

    def _nested(self) -> Policy:
        self.at += 1
        self.depth += 1
        policy = self.policy(nested=True)
        self.depth -= 1
        self.at += 1  # `policy` stopped at the closing parenthesis
        return policy

    def _plain(self, *, nested: bool) -> tuple[str, bool]:
        try:
            end = _end_of_value(self.text, self.at, nested=nested)
        except _Unclosed:
            raise self._unclosed() from None
        start, self.at = self.at, end
        return self.text[start:end].strip(), False

    def _quoted(self) -> tuple[str, bool]:
        match = _QUOTED.match(self.text, self.at)
        if match is None:
            raise self.unreadable("an unclosed quote", "a second ' behind the value")
        self.at = match.end()
        return match[1].replace("''", "'"), True

    def _build(self, name: str, kind: type[Policy], values: dict[str, Any], text: str) -> Policy:
        required = [f.name for f in options_of(kind) if default_of(f) is dataclasses.MISSING]
        absent = [option for option in required if option not in values]
        if absent:
            raise PolicyError(
                f"build the policy {_clipped(text)!r}",
                found=f"no {absent[0]!r}, which has no default",
                fix=f"{name}:{','.join(f'{option}=...' for option in required)}",
            )
        try:
            return kind(**values)
        except FrostlineError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            raise PolicyError(
                f"build the policy {_clipped(text)!r}", found=str(error), fix=_options_are(kind)
            ) from error

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None  # noqa: S101 - these patterns match the empty string
        self.at = match.end()
        return match[0].strip()

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _at_end(self, *, nested: bool) -> bool:
        if not self._next():
            if nested:
                raise self._unclosed()
            return True
        return nested and self._next() == ")"

    def _unexpected(self, wanted: str) -> PolicyError:
        if not self._next():
            return self._unclosed()
        rest = _clipped(self.text[self.at :])
        return self.unreadable(f"{rest!r} where {wanted} belongs", _FORM)

    def _unclosed(self) -> PolicyError:
        return self.unreadable(
            "a parenthesis that is never closed",
            "close it, or put a value that holds a lone one into single quotes",
        )

    def unreadable(self, found: str, fix: str) -> PolicyError:
        """The error for a form that cannot be read."""
        return PolicyError(f"read the policy {_clipped(self.text)!r}", found=found, fix=fix)


_QUOTED = re.compile(r"'((?:[^']|'')*)'(?!')")
_SEVERAL = tuple[Policy, ...]


def _options_are(kind: type[Policy]) -> str:
    return f"options: {', '.join(sorted(f.name for f in options_of(kind))) or 'none'}"


def _clipped(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types of a union; `Literal[...] | None` is one of the older kind."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _convert(text: str, hint: Any, where: str) -> Any:
    refused: FrostlineError | None = None
    choices = _choices(hint)
    for kind in choices:
        if typing.get_origin(kind) is typing.Literal:
            for allowed in typing.get_args(kind):
                if text == str(allowed):
                    return allowed
    for kind in choices:
        if kind not in _READERS:
            continue
        try:
            return _READERS[kind](text)
        except ValueError:
            continue
        except FrostlineError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    raise PolicyError(
        f"read {_clipped(where)!r}",
        found=f"{_clipped(text)!r}, which is no {readable_type(hint)}",
        fix=" or ".join(_IN_WORDS.get(kind, readable_type(kind)) for kind in choices),
    )


def readable_type(hint: Any) -> str:
    """A type as its users write it.

    Example:
        >>> readable_type(Duration | None), readable_type(typing.Literal["min", "max"])
        ('Duration | none', 'min | max')
    """
    if hint is type(None):
        return "none"
    if hint == _SEVERAL:
        return "several policies"
    if len(_choices(hint)) > 1:
        return " | ".join(readable_type(kind) for kind in _choices(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def _bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):  # no rule means anything by it, and it passes every comparison
        raise ValueError(text)
    return value


#: What to write for an option of a type, where its name does not say so.
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}

_READERS: dict[Any, Callable[[str], Any]] = {
    bool: _bool,
    int: int,
    float: _number,
    Duration: Duration.parse,
    Selector: select,
    str: str,
}
