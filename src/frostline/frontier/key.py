"""What stored values depend on, as plain JSON, and its digest: the name of a store.

A store may be reused exactly when everything that shaped its values is the same. That everything
is written down in sections (weights, structure, modes, slots, preparation, data, versions,
compute, encoding; `frostline.frontier.parts` makes them) and digested. Keeping the parts, and not
the digest alone, lets people be told *why* a store does not fit.

What cannot be known is never guessed. `unknown` puts a random number in its place, so that the key
equals no other one, in this process or another: no reuse, no wrong value.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frostline import _io
from frostline.errors import FrontierError, few

__all__ = ["CacheKey", "unknown"]

#: Stored in files, where readers allow a depth of 64.
_MAX_DEPTH = 56
#: Digits of an integer that every JSON reader takes.
_MAX_INTEGER = 10**300
#: Differences told one by one before they are counted.
_TOLD = 6


@dataclass(frozen=True, slots=True)
class CacheKey:
    """All that stored values depend on.

    Args:
        parts: plain JSON: mappings with text keys, sequences, text, finite numbers, booleans,
            None. The order of mappings is of no account. Copied, so that later changes to the
            original change nothing here.

    Attributes:
        parts: the copy: dicts and lists.
        digest: SHA-256 of its canonical spelling, 64 hexadecimal digits. Two keys are equal when
            their digests are.

    Raises:
        FrontierError: something in it is not plain JSON.

    Example:
        >>> key = CacheKey({"compute": {"threads": 4}, "versions": {"torch": "2.13.0"}})
        >>> key.digest[:8]
        'd9647447'
        >>> now = CacheKey({"compute": {"threads": 2}, "versions": {"torch": "2.14.1"}})
        >>> key.differences(now)
        ('made with 4 threads, now 2', 'torch 2.13.0, now 2.14.1')
    """

    parts: Mapping[str, Any] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        plain = _plain(self.parts, "key", 0)
        if not isinstance(plain, dict):
            raise _refused("key", f"a {type(self.parts).__name__} where a mapping belongs")
        object.__setattr__(self, "parts", plain)
        object.__setattr__(self, "digest", hashlib.sha256(_io.canonical_json(plain)).hexdigest())

    @property
    def unknown(self) -> tuple[str, ...]:
        """Why no later run can have the same key; empty when one can.

        Example:
            >>> CacheKey({"data": unknown("a generator")}).unknown
            ('data: a generator',)
        """
        return tuple(f"{place}: {why}" for place, why in _unknowns(self.parts, ""))

    def differences(self, other: CacheKey) -> tuple[str, ...]:
        """In words, what is not the same; `self` is what was stored, `other` what is wanted now.

        Example:
            >>> CacheKey({"weights": {"conv1.weight": "ab"}}).differences(
            ...     CacheKey({"weights": {"conv1.weight": "cd"}})
            ... )
            ('weights of conv1 changed',)
        """
        if self.digest == other.digest:
            return ()
        found: list[str] = []
        for section in sorted({*self.parts, *other.parts}):
            old, new = (key.parts.get(section, _ABSENT) for key in (self, other))
            if not _same(old, new):
                say = _SECTIONS.get(section, _settings)
                found += say(section, old, new) or _settings(section, old, new)
        return tuple(found)


def unknown(why: str) -> dict[str, str]:
    """A part that equals no other one: what stands here could not be found out.

    Every call gives another part. To compare keys within one process, make it once and keep it.

    Args:
        why: what is not known, for people.

    Example:
        >>> unknown("a generator") == unknown("a generator")
        False
    """
    return {"unknown": why, "nonce": secrets.token_hex(16)}


def _is_unknown(value: Any) -> bool:
    return isinstance(value, dict) and {"unknown", "nonce"} <= value.keys()


def _unknowns(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if _is_unknown(value):
        yield place or "key", value["unknown"]
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in inner:
        yield from _unknowns(item, f"{place}.{name}" if place else str(name))


# -- plain JSON ----------------------------------------------------------------------------------


def _plain(value: Any, place: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise _refused(place[:80], f"nesting deeper than {_MAX_DEPTH}")
    match value:
        case None | bool():
            return value
        case str():
            return _plain_text(value, place)
        case int() if abs(value) < _MAX_INTEGER:
            return int(value)
        case float() if math.isfinite(value):
            return float(value)
        case Mapping():
            for odd in (k for k in value if not isinstance(k, str)):
                raise _refused(place, f"the key {odd!r}, which is no text")
            return {
                _plain_text(k, place): _plain(v, f"{place}.{k}", depth + 1)
                for k, v in value.items()
            }
        case list() | tuple():
            return [_plain(v, f"{place}.{i}", depth + 1) for i, v in enumerate(value)]
        case _:
            shown = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
            raise _refused(place, shown)


def _plain_text(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _refused(place, "text with half a surrogate pair") from None
    return str(text)


def _refused(place: str, found: str) -> FrontierError:
    return FrontierError(
        "make a cache key",
        found=f"{found} at {place}",
        fix="give plain JSON: mappings, lists, text, finite numbers, true, false, null",
    )


# -- differences in words ------------------------------------------------------------------------


def _tensors(section: str, old: Any, new: Any) -> list[str]:
    """Weights are told by the module that holds them."""
    if not (isinstance(old, dict) and isinstance(new, dict)) or _is_unknown(old | new):
        return _settings(section, old, new)
    return _by_name("weights of", old, new, home=lambda name: name.rpartition(".")[0] or name)


def _modules(section: str, old: Any, new: Any) -> list[str]:
    """Structure is told by module; for one that changed its words, what they were and are."""
    if not (isinstance(old, dict) and isinstance(new, dict)) or _is_unknown(old | new):
        return _settings(section, old, new)
    changed = [n for n in sorted(old.keys() & new.keys()) if old[n] != new[n]]
    if len(changed) == 1 and old.keys() == new.keys() and (told := _told(old, new, changed[0])):
        return [told]
    return _by_name("code or settings of", old, new, home=lambda name: name or "the model itself")


def _told(old: dict[str, Any], new: dict[str, Any], name: str) -> str:
    before, after = old[name], new[name]
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return ""
    for fact in ("class", "says"):
        if before.get(fact) != after.get(fact):
            return f"{name or 'the model itself'} was {before.get(fact)}, now {after.get(fact)}"
    return ""


def _modes(section: str, old: Any, new: Any) -> list[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return _settings(section, old, new)
    changed = [n for n in sorted(old.keys() & new.keys()) if old[n] != new[n]]
    found = []
    for mode, word in ((True, "training"), (False, "evaluation")):
        if names := [name or "the model itself" for name in changed if new[name] is mode]:
            found.append(f"{few(names)} now in {word} mode")
    return found + _by_name("modes of", *({k: v for k, v in d.items() if k not in changed}
                                          for d in (old, new)))  # fmt: skip


def _by_name(
    what: str, old: Mapping[str, Any], new: Mapping[str, Any], *, home: Any = str
) -> list[str]:
    groups = {
        "changed": [n for n in old if n in new and old[n] != new[n]],
        "not there any more": [n for n in old if n not in new],
        "new": [n for n in new if n not in old],
    }
    return [
        f"{what} {few(list(dict.fromkeys(map(home, sorted(names)))))} {word}"
        for word, names in groups.items()
        if names
    ]


def _versions(_section: str, old: Any, new: Any) -> list[str]:
    return _leaves(old, new, lambda name, a, b: f"{name} {a}, now {b}")


_COMPUTE = {
    "threads": "made with {0} threads, now {1}",
    "device": "made on {0}, now {1}",
    "default_dtype": "made with default dtype {0}, now {1}",
}


def _compute(_section: str, old: Any, new: Any) -> list[str]:
    def say(name: str, a: str, b: str) -> str:
        text = _COMPUTE.get(name, "{name} {0}, now {1}").format(a, b, name=name)
        return text.replace("with 1 threads", "with 1 thread")

    return _leaves(old, new, say)


def _settings(section: str, old: Any, new: Any) -> list[str]:
    return _leaves(
        old, new, lambda name, a, b: f"{section}{' ' * bool(name)}{name} was {a}, now {b}"
    )


def _leaves(old: Any, new: Any, say: Any) -> list[str]:
    """One sentence per differing leaf; a long list is counted at its end."""
    found = [say(name, _shown(a), _shown(b)) for name, a, b in _differing(old, new, "")]
    if len(found) > _TOLD:
        found[_TOLD - 1 :] = [f"and {len(found) - _TOLD + 1} more differences of this kind"]
    return found


_ABSENT = object()


def _differing(old: Any, new: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if _same(old, new):
        return
    inner: Sequence[tuple[str, Any, Any]] = ()
    if isinstance(old, dict) and isinstance(new, dict) and not _is_unknown(old | new):
        names = sorted({*old, *new})
        inner = [(n, old.get(n, _ABSENT), new.get(n, _ABSENT)) for n in names]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inner = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        yield place, old, new
    for name, a, b in inner:
        yield from _differing(a, b, f"{place}.{name}" if place else name)


def _same(old: Any, new: Any) -> bool:
    """Equal as JSON, which tells 1, 1.0 and true apart."""
    if old is _ABSENT or new is _ABSENT:
        return old is new
    return _io.canonical_json(old) == _io.canonical_json(new)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    if _is_unknown(value):
        return f"unknown ({value['unknown']})"
    if isinstance(value, str):
        return f"{value[:12]}…" if len(value) >= 40 else value or "''"
    text = _io.canonical_json(value).decode()
    return text if len(text) <= 60 else f"{text[:59]}…"


_SECTIONS = {
    "weights": _tensors,
    "structure": _modules,
    "modes": _modes,
    "versions": _versions,
    "compute": _compute,
}
