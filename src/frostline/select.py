"""Selectors: short strings that pick parameters of a model, and their composition.

==================  ========================================================================
form                picks the parameters ...
==================  ========================================================================
``layer1.*``        whose name, enclosing module or layer group matches the glob
``re:layer[12]``    the same with a regular expression (takes the rest of the string)
``depth<6``         of groups by depth; also ``<=``, ``>``, ``>=``, ``==`` and ``depth 2..5``
``first 3 groups``  of the first (or ``last``) groups in execution order
``first 60%``       of that share of the groups, rounded down but at least one
``first 60% of parameters``  of the longest run of groups that holds at most that share
``type:LayerNorm``  inside modules of that class
``kind:bias``       of one kind: weight, bias, norm, embedding
``head``            of the task head; ``backbone`` for the rest, ``all`` for everything
==================  ========================================================================

They combine with ``|`` (either), ``&`` (both), ``!`` (not) and parentheses:
``backbone & !kind:norm``. A part that matches nothing raises. Bare integers are refused, since
"10" could mean ten groups or the tenth.
"""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from frostline.errors import SelectorError, SelectorMatchedNothing
from frostline.groups import LayerGroup, LayerGroups, TensorInfo, enclosing

__all__ = ["Selector", "select"]

Names = frozenset[str]
_KINDS = ("weight", "bias", "norm", "embedding")
_FORMS = "a glob ('layer1.*'), 're:...', 'depth<6', 'first 60%', 'type:...', 'kind:...', 'head'"
_TOKEN = re.compile(r"\s*(re:.*|[|&!()]|(?:\[[^\]]*\]|[^|&!()\[])+|\[)", re.DOTALL)
_DEPTH = re.compile(r"depth\s*(<=|>=|==|<|>)\s*(\d+)")
_RANGE = re.compile(r"depth\s+(\d+)\s*\.\.\s*(\d+)")
_ENDS = re.compile(r"(first|last)\s+(\d+(?:\.\d+)?)\s*(%|groups?)(\s+of\s+parameters)?")
_COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True)
class Selector:
    """A rule that picks parameters; combine with ``|``, ``&`` and ``~``.

    Attributes:
        text: how it reads; equality and messages use it.

    Example:
        >>> str(select("backbone") & ~select("kind:norm"))
        '(backbone & !kind:norm)'
    """

    text: str
    _resolve: Callable[[LayerGroups], Names] = field(repr=False, compare=False)

    def parameters(self, groups: LayerGroups) -> Names:
        """Names of the matching parameters.

        Raises:
            SelectorMatchedNothing: none match (also when a part of a composition matches none).
        """
        found = self._resolve(groups)
        if not found:
            raise _nothing(self.text, groups)
        return found

    def groups(self, groups: LayerGroups) -> tuple[LayerGroup, ...]:
        """The groups that hold a matching parameter, in execution order: a preview."""
        found = self.parameters(groups)
        return tuple(g for g in groups if g.parameter_names & found)

    def __or__(self, other: Selector) -> Selector:
        return Selector(f"({self} | {other})", lambda g: self.parameters(g) | other.parameters(g))

    def __and__(self, other: Selector) -> Selector:
        return Selector(f"({self} & {other})", lambda g: self.parameters(g) & other.parameters(g))

    def __invert__(self) -> Selector:
        return Selector(f"!{self}", lambda g: _all(g) - self.parameters(g))

    def __str__(self) -> str:
        return self.text

    @classmethod
    def where(cls, predicate: Callable[[LayerGroup, TensorInfo], bool], *, text: str) -> Selector:
        """Pick the parameters for which `predicate(group, parameter)` holds.

        Args:
            predicate: a pure function.
            text: how messages and records name the rule.
        """
        return cls(
            text,
            lambda groups: frozenset(
                p.name for g in groups for p in g.parameters if predicate(g, p)
            ),
        )


def select(selector: str | Selector) -> Selector:
    """Read a selector; a `Selector` is returned as it is.

    Raises:
        SelectorError: unreadable.

    Example:
        >>> from frostline.groups import LayerGroup, LayerGroups, TensorInfo
        >>> groups = LayerGroups((LayerGroup("a", 0, (TensorInfo("a.w"),)),
        ...                       LayerGroup("b", 1, (TensorInfo("b.w"),))))
        >>> sorted(select("depth<1 | head").parameters(groups))
        ['a.w', 'b.w']
    """
    if isinstance(selector, Selector):
        return selector
    if not isinstance(selector, str):
        raise _unreadable(selector, f"a {type(selector).__name__}")
    tokens = [match[1].strip() for match in _TOKEN.finditer(selector)]
    tokens = [t for t in tokens if t]
    if not tokens:
        raise _unreadable(selector, "an empty string")
    result, rest = _either(tokens, selector)
    if rest:
        raise _unreadable(selector, f"an unexpected {rest[0]!r}")
    return result


def _either(tokens: list[str], source: str) -> tuple[Selector, list[str]]:
    left, rest = _both(tokens, source)
    while rest and rest[0] == "|":
        right, rest = _both(rest[1:], source)
        left = left | right
    return left, rest


def _both(tokens: list[str], source: str) -> tuple[Selector, list[str]]:
    left, rest = _single(tokens, source)
    while rest and rest[0] == "&":
        right, rest = _single(rest[1:], source)
        left = left & right
    return left, rest


def _single(tokens: list[str], source: str) -> tuple[Selector, list[str]]:
    if not tokens or tokens[0] in ("|", "&", ")"):
        raise _unreadable(source, f"{tokens[0]!r}" if tokens else "nothing after an operator")
    if tokens[0] == "!":
        inner, rest = _single(tokens[1:], source)
        return ~inner, rest
    if tokens[0] == "(":
        inner, rest = _either(tokens[1:], source)
        if not rest or rest[0] != ")":
            raise _unreadable(source, "a parenthesis that is never closed")
        return inner, rest[1:]
    return _atom(tokens[0]), tokens[1:]


def _atom(text: str) -> Selector:
    if text.isdigit():
        raise SelectorError(
            f"select by the bare number {text}",
            found="no word that says whether it counts groups or names one",
            fix=f"'first {text} groups' or 'depth=={text}'",
        )
    if text in ("all", "head", "backbone"):
        return Selector(text, lambda g: _of(g, set(getattr(g, _WORDS[text]))))
    if match := _DEPTH.fullmatch(text):
        compare, bound = _COMPARE[match[1]], int(match[2])
        return Selector.where(lambda g, _: compare(g.depth, bound), text=text)
    if match := _RANGE.fullmatch(text):
        low, high = int(match[1]), int(match[2])
        return Selector.where(lambda g, _: low <= g.depth <= high, text=text)
    if match := _ENDS.fullmatch(text):
        return _ends(text, match[1], float(match[2]), match[3] == "%", bool(match[4]))
    kind, colon, value = text.partition(":")
    if colon and kind == "kind":
        if value not in _KINDS:
            raise _unreadable(text, f"the kind {value!r}; there are {', '.join(_KINDS)}")
        return Selector.where(lambda _, p: p.kind == value, text=text)
    if colon and kind == "type":
        return Selector.where(lambda g, p: _inside(g, p, value), text=text)
    if colon and kind == "re":
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise _unreadable(text, f"a bad regular expression: {error}") from error
        return _named(text, lambda name: pattern.fullmatch(name) is not None)
    return _named(text, lambda name: fnmatch.fnmatchcase(name, text))


_WORDS = {"all": "names", "head": "head", "backbone": "backbone"}


def _ends(text: str, end: str, amount: float, percent: bool, of_parameters: bool) -> Selector:
    if of_parameters and not percent:
        raise _unreadable(text, "a number of groups 'of parameters'")
    if amount <= 0 or (percent and amount > 100) or (not percent and amount != int(amount)):
        raise _unreadable(text, f"the amount {amount:g}")

    def resolve(groups: LayerGroups) -> Names:
        ordered = list(groups) if end == "first" else list(reversed(groups.items))
        if of_parameters:
            return _of(groups, set(_within(ordered, groups.parameter_count * amount / 100)))
        count = max(1, int(len(ordered) * amount / 100)) if percent else int(amount)
        return _of(groups, {g.name for g in ordered[:count]})

    return Selector(text, resolve)


def _within(ordered: list[LayerGroup], limit: float) -> Iterator[str]:
    total = 0
    for group in ordered:
        total += group.parameter_count
        if total > limit:
            return
        yield group.name


def _named(text: str, matches: Callable[[str], bool]) -> Selector:
    return Selector.where(
        lambda g, p: matches(g.name) or any(matches(n) for name in p.names for n in _paths(name)),
        text=text,
    )


def _inside(group: LayerGroup, parameter: TensorInfo, kind: str) -> bool:
    of_type = {m.name for m in group.modules if fnmatch.fnmatchcase(m.type, kind)}
    return any(path in of_type for path in _paths(parameter.name))


def _paths(name: str) -> Iterator[str]:
    """The name and every module that encloses it: 'a.b.c' -> 'a.b.c', 'a.b', 'a'."""
    yield name
    yield from enclosing(name)


def _all(groups: LayerGroups) -> Names:
    return _of(groups, set(groups.names))


def _of(groups: LayerGroups, names: set[str]) -> Names:
    return frozenset(p for g in groups if g.name in names for p in g.parameter_names)


def _unreadable(text: object, found: str) -> SelectorError:
    return SelectorError(f"read the selector {text!r}", found=found, fix=_FORMS)


def _nothing(text: str, groups: LayerGroups) -> SelectorMatchedNothing:
    known = {
        n: None
        for g in groups
        for n in (g.name, *(path for p in g.parameters for path in _paths(p.name)))
    }
    wanted = text.removeprefix("re:").removeprefix("type:")
    types = {m.type: None for g in groups for m in g.modules}
    near = difflib.get_close_matches(wanted, [*known, *types], n=3, cutoff=0.5)
    hint = f"nearest names: {', '.join(near)}" if near else f"groups: {', '.join(groups.names)}"
    return SelectorMatchedNothing(
        f"select {text!r}",
        found=f"no parameter that matches, among {len(known)} names in {len(groups)} groups",
        fix=hint,
    )
