"""YAML without its surprises: one plain document of mappings, lists and scalars.

Refused, each with its line: repeated keys (plain YAML keeps the last silently), aliases (ten
lines can unfold to gigabytes), tags (they name types to build), more than 64 levels, more than
1 MB. Scalars follow YAML 1.2's core rules, so ``no`` is a word, ``010`` is ten, ``1:30`` is text
and ``1e-3`` is a number; `dump` quotes by the same rules, so what it writes reads back equal.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from frostline.errors import ConfigError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "Document", "dump", "parse"]

MAX_BYTES = 1_000_000
MAX_DEPTH = 64

_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Words, then the characters each may start with: PyYAML looks resolvers up by first character.
_RULES: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        _FLOAT,
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN"),
)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed mapping.

    Attributes:
        values: keys (strings) and values.
        lines: line number of each key, counted from 1.
    """

    values: dict[str, Any]
    lines: dict[str, int]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter; `parse` is the way in."""

    # PyYAML keeps its registries on the class: fresh ones, so that nobody else's loader changes.
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    yaml_constructors = dict(yaml.SafeLoader.yaml_constructors)  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refuse(event.start_mark, f"the alias *{event.anchor}", "write the value out")
        if getattr(event, "tag", None) is not None:
            raise _refuse(event.start_mark, f"the tag {event.tag}", "write plain values")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _refuse(event.start_mark, f"more than {MAX_DEPTH} levels", "flatten it")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, quoting by the same rules as `_Loader` reads."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def _string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Line breaks of Unicode's own get lost outside double quotes.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > 40:
        raise _refuse(node.start_mark, f"a number of {len(text)} digits", "a smaller number")
    return int(text)


for _tag, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):
        starts = [*_first, ""] if _tag.endswith("null") else list(_first)
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), starts)
_Dumper.add_representer(str, _string)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, *, source: str) -> Document:
    r"""Read one mapping.

    Args:
        text: at most 1 MB of YAML.
        source: what messages call it: a file name.

    Raises:
        ConfigError: not YAML, not a mapping, or a refused construct; names the line.

    Example:
        >>> parse("lr: 1e-3\nflip: no", source="run.yaml").values
        {'lr': 0.001, 'flip': 'no'}
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise ConfigError(
            f"read {source}",
            found=f"more than {MAX_BYTES:,} bytes",
            fix="a file of settings; is it the right file?",
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document({}, {})
        if not isinstance(node, yaml.MappingNode):
            raise _refuse(node.start_mark, "no 'key: value' lines", "e.g. 'epochs: 10'")
        values: dict[str, Any] = loader.construct_document(node)
    except _Refused as error:
        raise _config_error(source, error.line, error.found, error.fix) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise _config_error(source, line, str(error.problem), "'key: value' lines") from error
    except (yaml.YAMLError, ValueError) as error:
        found = " ".join(str(error).split())
        raise _config_error(source, None, found, "a YAML text file in UTF-8") from error
    return Document(values, {key.value: key.start_mark.line + 1 for key, _ in node.value})


def dump(values: dict[str, Any]) -> str:
    """Write a mapping as YAML that `parse` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=99)


class _Refused(Exception):
    def __init__(self, line: int, found: str, fix: str) -> None:
        super().__init__(found)
        self.line, self.found, self.fix = line, found, fix


def _refuse(mark: yaml.Mark, found: str, fix: str) -> _Refused:
    return _Refused(mark.line + 1, found, fix)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[Hashable, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise _refuse(key.start_mark, "a key that is no word", "a word, or put it in quotes")
        if key.value in seen:
            found = f"the key {key.value!r} twice, first on line {seen[key.value]}"
            raise _refuse(key.start_mark, found, "keep one of them")
        seen[key.value] = key.start_mark.line + 1


def _config_error(source: str, line: int | None, found: str, fix: str) -> ConfigError:
    where = f"{source}, line {line}" if line else source
    return ConfigError(f"read {where}", found=found, fix=fix)
