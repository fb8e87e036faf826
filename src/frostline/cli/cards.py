"""What there is to say about one policy: read off its class, its docstring and the evidence."""

from __future__ import annotations

import functools
import importlib.resources
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from frostline.policy import Policy
from frostline.registry import Family, default_policy, policy_class, policy_family
from frostline.shortform import default_of, hints_of, options_of, readable_type, write_value
from frostline.signals import Need

__all__ = ["Card", "Option", "card"]

_SECTION = re.compile(r"(\w+):")
_ENTRY = re.compile(r"(\w+): (.*)")


@dataclass(frozen=True, slots=True)
class Option:
    """One field of a policy, as its user writes it."""

    option: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Card:
    """One policy.

    Attributes:
        name: as it is registered.
        family: what it decides by.
        summary: the first line of its description.
        description: what it does.
        options: its fields.
        reads: the signals it reads by default, and how often.
        notice: what it says of its price at the start of a run.
        references: where it is from.
        evidence: what it was worth when measured; None if it was not.
    """

    name: str
    family: Family
    summary: str
    description: str
    options: tuple[Option, ...]
    reads: tuple[str, ...]
    notice: str
    references: str
    evidence: Mapping[str, Any] | None


def card(name: str) -> Card:
    """The card of a registered policy or combinator.

    Raises:
        PolicyError: unknown name.

    Example:
        >>> [option.default for option in card("gradual").options]
        ['1ep', '1', 'none', 'false']
    """
    kind, default = policy_class(name), default_policy(name)
    sections = _sections(inspect.getdoc(kind) or "")
    return Card(
        name=name,
        family=policy_family(name),
        summary=sections[""].partition("\n")[0],
        description=sections[""],
        options=tuple(_options(kind)),
        reads=() if default is None else tuple(_reading(need) for need in default.needs()),
        notice="" if default is None else default.notice(),
        references=sections.get("References", ""),
        evidence=_measured().get(name),
    )


def _options(kind: type[Policy]) -> list[Option]:
    meanings = _entries(_sections(inspect.getdoc(kind) or "").get("Attributes", ""))
    hints = hints_of(kind)
    return [
        Option(f.name, readable_type(hints[f.name]), _default(f), meanings.get(f.name, ""))
        for f in options_of(kind)
    ]


def _default(field: Any) -> str:
    value = default_of(field)
    return "required" if value is MISSING else write_value(value) or str(value)


def _reading(need: Need) -> str:
    often = "once, at the start" if need.every is None else f"every {need.every}"
    return f"{need.signal} of each {'parameter' if need.per == 'parameter' else 'group'}, {often}"


def _sections(text: str) -> dict[str, str]:
    """A docstring by heading, "" for what stands under none."""
    found: dict[str, list[str]] = {"": []}
    heading = ""
    for line in text.splitlines():
        if match := _SECTION.fullmatch(line):
            heading = match[1]
        elif heading and line and not line.startswith(" "):
            heading = ""
            found[""].append("")
        if match is None:
            found.setdefault(heading, []).append(line)
    return {name: inspect.cleandoc("\n".join(lines)) for name, lines in found.items()}


def _entries(section: str) -> dict[str, str]:
    """The meaning of each attribute, on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := _ENTRY.fullmatch(line):
            name, found[match[1]] = match[1], match[2]
        elif name and line:
            found[name] += f" {line.strip()}"
    return found


@functools.cache
def _measured() -> Mapping[str, Mapping[str, Any]]:
    """What benchmarks/evidence.py found, by policy."""
    file = importlib.resources.files("frostline.policies") / "evidence.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {n: {"setting": found["setting"], **entry} for n, entry in found["policies"].items()}
