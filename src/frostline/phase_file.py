"""Phases of training as data, and the YAML files that people write them in.

Two forms are read. Ours is a list under `phases:`; the other maps 0, 1, 2, ... to parameter names,
as schedules for finetuning-scheduler do. The words of a file have known types, so YAML's own
guesses (`no` is false, `1e-3` is text) never come in: every scalar is read as text first.

PyYAML is the one package used here. It is a plain parser, no framework, and imported on demand.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from frostline.clock import Duration, Progress
from frostline.errors import DurationError, PolicyError, SelectorError
from frostline.groups import LayerGroups
from frostline.select import Selector, select

__all__ = ["Phase", "PhaseList", "read_phases"]

Mode = Literal["min", "max"]

MAX_BYTES = 500_000
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of training: what trains, at which rates, and when it ends.

    Attributes:
        train: selector of the parameters that train.
        add: whether they train *besides* those of the phase before, which keep their rates.
        length: longest duration, from the beginning of the phase; "30%" is a share of the run.
        until: when the phase ends at the latest, on the clock of the run. A phase that begins
            after that lasts one epoch.
        patience: evaluations without improvement that end the phase, >= 1; None never do.
        metric: what is to improve.
        mode: "min" if smaller is better, "max" if larger is.
        min_delta: what counts as improvement must be more than this, >= 0.
        restore_best: when the phase ends, go on from its best weights with a fresh optimizer.
        lr: factor on the learning rate of what trains (with `add`: of the groups that join), > 0.
        spread: the shallowest group of the model has this many times smaller a rate than the
            deepest, the others geometrically in between, > 0; 1 spreads nothing.
        place: where it was written, for messages.

    Example:
        >>> Phase("head", length=Duration.parse("2ep")).ends
        True
    """

    train: str | Selector = "all"
    add: bool = False
    length: Duration | None = None
    until: Duration | None = None
    patience: int | None = None
    metric: str = "val_loss"
    mode: Mode = "min"
    min_delta: float = 0.0
    restore_best: bool = False
    lr: float = 1.0
    spread: float = 1.0
    place: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            select(self.train)
        except SelectorError as error:
            raise self._wrong(f"train {self.train}", error.found, error.fix) from error
        if self.length is not None and not self.length.value:
            raise self._wrong("train for no time", f"a length of {self.length}", "'1ep'")
        if self.patience is not None and self.patience < 1:
            raise self._wrong(f"wait for {self.patience} evaluations", "a patience below 1", "3")
        if not 0 <= self.min_delta < math.inf:
            raise self._wrong(f"improve by {self.min_delta}", "no number of 0 or more", "0.001")
        for name, value in (("lr", self.lr), ("spread", self.spread)):
            if not 0 < value < math.inf:
                raise self._wrong(f"use {name} {value}", "no number above 0", f"{name}: 1")
        if self.mode not in ("min", "max") or not self.metric.strip():
            raise self._wrong(f"judge by {self.mode} {self.metric}", "no such mode", "min or max")

    @property
    def ends(self) -> bool:
        """Whether the phase has an end of its own."""
        return (self.length, self.until, self.patience) != (None, None, None)

    @property
    def keep_best(self) -> str:
        """As a plan has it."""
        return f"{self.mode} {self.metric}" if self.restore_best else ""

    def end(self, since: int, progress: Progress) -> int | None:
        """The step at which the clock ends the phase if it began at step `since`."""
        ends = []
        if self.length is not None:
            ends.append(since + max(1, self.length.steps(progress)))
        if self.until is not None:
            ends.append(max(self.until.steps(progress), since + (progress.steps_per_epoch or 1)))
        return min(ends, default=None)

    def parameters(self, groups: LayerGroups) -> frozenset[str]:
        """Names of the parameters it names.

        Raises:
            PolicyError: some part of its selector matches nothing.
        """
        try:
            return select(self.train).parameters(groups)
        except SelectorError as error:
            raise self._wrong(f"train {self.train}", error.found, error.fix) from error

    def rate(self, groups: LayerGroups, depth: int) -> float:
        """Factor on the learning rate of the group at this depth."""
        share = depth / (len(groups) - 1) if len(groups) > 1 else 1.0
        return self.lr * self.spread ** (share - 1)

    def _wrong(self, asked: str, found: str, fix: str) -> PolicyError:
        return PolicyError(asked + (f" ({self.place})" if self.place else ""), found=found, fix=fix)


@dataclass(frozen=True, slots=True)
class PhaseList:
    """Phases in their order.

    Attributes:
        phases: at least one; all but the last have an end.
        source: the file they are from. It is how the list reads as text.
    """

    phases: tuple[Phase, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.phases:
            raise PolicyError(
                f"train in phases{_of(self.source)}", found="no phase", fix="give at least one"
            )
        for number, phase in enumerate(self.phases[:-1]):
            if not phase.ends:
                raise PolicyError(
                    f"leave phase {number} for the next" + _of(phase.place or self.source),
                    found="no length, until or patience, so that it never ends",
                    fix="length: 2ep, or patience: 3 (phases are counted from 0)",
                )

    def __str__(self) -> str:
        return self.source or repr(self.phases)


def read_phases(
    path: str,
    *,
    metric: str = "val_loss",
    mode: Mode = "min",
    patience: int | None = 3,
    strip: str = "",
    lr: float | None = None,
) -> PhaseList:
    """Read a file of phases of either form.

    Args:
        path: the file, at most 500 kB of YAML.
        metric: metric of the phases that name none.
        mode: its direction.
        patience: of each phase of a finetuning-scheduler file, which holds none.
        strip: what is cut off the beginning of the parameter names of such a file.
        lr: the rate that its rates are relative to.

    Raises:
        PolicyError: unreadable or wrong; names the file and the line.
    """
    file = _File(path, metric, mode, patience, strip, lr)
    root = _parse(_read(path), path)
    if isinstance(root.value, Mapping) and root.value:
        keys = list(root.value)
        if all(re.fullmatch(r"\d+", key.text) for key in keys):
            return PhaseList(tuple(file.scheduled(keys, root.value)), path)
        if any(key.text == "phases" for key in keys):
            return PhaseList(tuple(file.listed(root.value)), path)
    found = _kind(root)
    if isinstance(root.value, Mapping) and root.value:
        found = f"the keys {', '.join(key.text for key in root.value)}"[:200]
    raise _bad(
        path, root.line, found, "a list under 'phases:', or phases 0, 1, 2 of finetuning-scheduler"
    )


# -- the two forms -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """A piece of YAML: text, a list of nodes, or a mapping of nodes, and its line."""

    value: str | list[_Node] | dict[_Key, _Node]
    line: int


@dataclass(frozen=True, slots=True)
class _Key:
    text: str
    line: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class _File:
    """One file while it is read, with what it does not say."""

    path: str
    metric: str
    mode: Mode
    patience: int | None
    strip: str
    lr: float | None

    # -- our own form --

    def listed(self, root: Mapping[_Key, _Node]) -> Iterator[Phase]:
        """The phases of our own form."""
        for key, node in root.items():
            if key.text != "phases":
                raise self._unknown(key, ("phases",))
            for entry in self._list(node, "phases"):
                yield self._listed(entry)

    def _listed(self, entry: _Node) -> Phase:
        given = self._entries(entry, "a phase", _KEYS)
        read = {key.text: self._typed(key, node) for key, node in given.items()}
        lines = {key.text: key.line for key in given}
        if ("train" in read) == ("add" in read):
            raise _bad(
                self.path, entry.line, "a phase with neither or both of 'train' and 'add'",
                "train: head   # or add: last 2 groups",
            )  # fmt: skip
        if "metric" in read and "mode" not in read and "loss" not in str(read["metric"]):
            raise _bad(
                self.path, lines["metric"], f"the metric {read['metric']} without a 'mode'",
                "mode: max if larger is better, mode: min if smaller is",
            )  # fmt: skip
        default: dict[str, Any] = {
            "metric": self.metric,
            "mode": "min" if "metric" in read else self.mode,
            "restore_best": "patience" in read,
        }
        read["train"], read["add"] = read.get("train") or read.get("add"), "add" in read
        return self._phase(entry.line, default | read)

    def _typed(self, key: _Key, node: _Node) -> Any:
        if key.text in ("train", "add"):
            return self._selector(node, key.text)
        return self._scalar(node, key.text, _KEYS[key.text])

    def _selector(self, node: _Node, key: str) -> str:
        if isinstance(node.value, str):
            return self._scalar(node, key, str)
        parts = [self._scalar(part, key, str) for part in self._list(node, key)]
        for part in parts[:-1]:
            if "re:" in part:  # it takes the rest of a selector, so that nothing may follow it
                found = f"{part!r} before other selectors"
                raise _bad(self.path, node.line, found, "put the expression at the end")
        return " | ".join(parts)

    # -- the form of finetuning-scheduler --

    def scheduled(self, keys: Sequence[_Key], root: Mapping[_Key, _Node]) -> Iterator[Phase]:
        """The phases of a finetuning-scheduler file: each adds its parameters."""
        numbers = [int(key.text) if len(key.text) < 7 else -1 for key in keys]
        if sorted(numbers) != list(range(len(keys))):
            raise _bad(
                self.path, keys[0].line, f"phases {', '.join(k.text for k in keys)}"[:200],
                "each of 0, 1, 2, ... once",
            )  # fmt: skip
        for number, key in sorted(zip(numbers, keys, strict=True), key=lambda pair: pair[0]):
            yield self._scheduled(number, key, root[key])

    def _scheduled(self, number: int, key: _Key, node: _Node) -> Phase:
        given = self._entries(node, f"phase {number}", _FTS_KEYS, elsewhere=_FTS_REFUSED)
        entries = {k.text: (k, v) for k, v in given.items()}
        if "params" not in entries:
            raise _bad(self.path, key.line, f"phase {number} without 'params'", "params: [...]")
        values: dict[str, Any] = {
            "train": self._named(self._list(entries["params"][1], "params")),
            "add": number > 0,
            "patience": self.patience,
            "metric": self.metric,
            "mode": self.mode,
            "restore_best": True,
        }
        if "max_transition_epoch" in entries:
            last = self._scalar(entries["max_transition_epoch"][1], "max_transition_epoch", _whole)
            if last < -1:
                line = entries["max_transition_epoch"][0].line
                raise _bad(self.path, line, f"a max_transition_epoch of {last}", "-1 for no limit")
            values["until"] = None if last == -1 else Duration.parse(f"{last}ep")
        if "lr" in entries:
            values["lr"] = self._factor(number, *entries["lr"])
        return self._phase(key.line, values)

    def _factor(self, number: int, key: _Key, node: _Node) -> float:
        rate = self._scalar(node, "lr", float)
        if number == 0:
            raise _bad(
                self.path, key.line, "an lr in phase 0, which finetuning-scheduler ignores",
                "remove it: the first phase trains at the rates of the run",
            )  # fmt: skip
        if self.lr is None:
            raise _bad(
                self.path, key.line, f"the learning rate {rate:g}; rates are factors here",
                "say what it is relative to, the run's own lr: phases:file=...,lr=3e-4",
            )  # fmt: skip
        return rate / self.lr

    def _named(self, nodes: Sequence[_Node]) -> Selector:
        """Parameters by name, or by an expression that matches the beginning of their names."""
        wanted: list[tuple[str, int, re.Pattern[str]]] = []
        for node in nodes:
            name = self._scalar(node, "params", str).removeprefix(self.strip)
            try:
                wanted.append((name, node.line, re.compile(name)))
            except (re.error, OverflowError, RecursionError) as error:
                raise _bad(
                    self.path, node.line, f"{name!r}, a bad regular expression: {error}",
                    "a parameter's name, or an expression such as 'layer4\\..*'",
                ) from error  # fmt: skip

        def resolve(groups: LayerGroups) -> frozenset[str]:
            first = {n: p.name for g in groups for p in g.parameters for n in p.names}
            found: set[str] = set()
            for name, line, pattern in wanted:
                here = {first[name]} if name in first else {
                    own for alias, own in first.items() if pattern.match(alias)
                }  # fmt: skip
                if not here:
                    raise self._no_parameter(name, line, first)
                found |= here
            return frozenset(found)

        return Selector(" | ".join(name for name, _, _ in wanted), resolve)

    def _no_parameter(self, name: str, line: int, known: Mapping[str, str]) -> PolicyError:
        fix = f"nearest names: {', '.join(difflib.get_close_matches(name, known, n=3, cutoff=0.4))}"
        head, dot, rest = name.partition(".")
        if dot and rest and any(other.startswith(rest.partition(".")[0]) for other in known):
            fix = f"names without the wrapper's prefix: phases:file=...,strip={head}."
        return _bad(self.path, line, f"{name!r}, which matches no parameter", fix)

    # -- both --

    def _phase(self, line: int, values: Mapping[str, Any]) -> Phase:
        return Phase(**values, place=_place(self.path, line))

    def _entries(
        self, node: _Node, what: str, known: Mapping[str, Any], elsewhere: Mapping[str, str] = {}
    ) -> dict[_Key, _Node]:
        if not isinstance(node.value, dict):
            raise _bad(self.path, node.line, f"{_kind(node)} where {what} belongs", "'key: value'")
        for key in node.value:
            if key.text in elsewhere:
                raise _bad(
                    self.path, key.line, f"{key.text!r}, which has no meaning here",
                    elsewhere[key.text],
                )  # fmt: skip
            if key.text not in known:
                raise self._unknown(key, known)
        return node.value

    def _list(self, node: _Node, key: str) -> list[_Node]:
        if not isinstance(node.value, list) or not node.value:
            raise _bad(self.path, node.line, f"{_kind(node)} where {key!r} needs a list", "- ...")
        return node.value

    def _scalar(self, node: _Node, key: str, read: Callable[[str], Any]) -> Any:
        if not isinstance(node.value, str) or not node.value.strip():
            raise _bad(self.path, node.line, f"{_kind(node)} for {key!r}", _MEANT[read])
        try:
            return read(node.value.strip())
        except (ValueError, DurationError) as error:
            shown = node.value if len(node.value) <= 80 else f"{node.value[:80]}..."
            raise _bad(self.path, node.line, f"{shown!r} for {key!r}", _MEANT[read]) from error

    def _unknown(self, key: _Key, known: Mapping[str, Any] | Sequence[str]) -> PolicyError:
        near = difflib.get_close_matches(key.text, known, n=1)
        return _bad(
            self.path, key.line,
            f"the unknown key {key.text!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            f"one of {', '.join(known)}",
        )  # fmt: skip


def _mode(text: str) -> str:
    if text not in ("min", "max"):
        raise ValueError(text)
    return text


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _whole(text: str) -> int:
    if len(text) > 9:
        raise ValueError(text)
    return int(text)


_KEYS: dict[str, Callable[[str], Any]] = {
    "train": str,
    "add": str,
    "length": Duration.parse,
    "until": Duration.parse,
    "patience": _whole,
    "metric": str,
    "mode": _mode,
    "min_delta": float,
    "restore_best": _flag,
    "lr": float,
    "spread": float,
}
_MEANT: dict[Any, str] = {
    str: "a word",
    _whole: "a whole number",
    float: "a number",
    _flag: "true or false",
    _mode: "min or max",
    Duration.parse: "a length with its unit: 500st, 2ep, 30%",
}
_FTS_KEYS = {"params": None, "max_transition_epoch": None, "lr": None}
_SCHEDULER = "the learning-rate schedule belongs to the run: --schedule, --warmup; remove the key"
_OPTIMIZER = "one optimizer serves the whole run: --optimizer; remove the key"
_FTS_REFUSED = {
    "new_lr_scheduler": _SCHEDULER,
    "new_incoming_lr_scheduler": _SCHEDULER,
    "new_optimizer": _OPTIMIZER,
    "new_incoming_optimizer": _OPTIMIZER,
}


# -- reading -------------------------------------------------------------------------------------


def _read(path: str) -> str:
    fix = "a YAML text file in UTF-8; docs/schedules.md shows one"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise PolicyError(f"read {path}", found=f"more than {MAX_BYTES:,} bytes", fix=fix)
        return raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or NUL in the name
        raise PolicyError(f"read {path}", found=str(error), fix=fix) from error


def _parse(text: str, path: str) -> _Node:
    import yaml  # noqa: PLC0415

    events = yaml.parse(text, Loader=yaml.BaseLoader)
    try:
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                break
        else:
            return _Node("", 1)
        root = _tree(next(events), events, path, 0)
        if any(isinstance(event, yaml.DocumentStartEvent) for event in events):
            raise _bad(path, root.line, "more than one document", "one: remove the '---' lines")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = str(error.problem or error.context)
        if error.problem and error.context and error.context_mark:
            found += f" ({error.context} that begins on line {error.context_mark.line + 1})"
        raise _bad(path, mark.line + 1 if mark else 1, found, "plain YAML") from error
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
        raise PolicyError(f"read {path}", found=found, fix="a YAML text file in UTF-8") from error
    return root


def _tree(event: Any, events: Iterator[Any], path: str, depth: int) -> _Node:
    """The node that begins with this event. Aliases and tags are refused: nobody needs them."""
    import yaml  # noqa: PLC0415

    line = event.start_mark.line + 1
    if depth > MAX_DEPTH:
        raise _bad(path, line, f"more than {MAX_DEPTH} levels", "phases need three")
    if isinstance(event, yaml.AliasEvent):
        raise _bad(path, line, f"the alias *{event.anchor}", "write the value out")
    if getattr(event, "tag", None) is not None:
        raise _bad(path, line, f"the tag {event.tag}", "write plain values")
    if isinstance(event, yaml.ScalarEvent):
        return _Node(event.value, line)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[_Node] = []
        while not isinstance(inner := next(events), yaml.SequenceEndEvent):
            items.append(_tree(inner, events, path, depth + 1))
        return _Node(items, line)
    found: dict[_Key, _Node] = {}
    while not isinstance(inner := next(events), yaml.MappingEndEvent):
        key = _tree(inner, events, path, depth + 1)
        if not isinstance(key.value, str):
            raise _bad(path, key.line, "a key that is no word", "'key: value'")
        if (name := _Key(key.value, key.line)) in found:
            first = next(other.line for other in found if other == name)
            found_text = f"the key {key.value!r} twice, first on line {first}"
            raise _bad(path, key.line, found_text, "keep one of them")
        found[name] = _tree(next(events), events, path, depth + 1)
    return _Node(found, line)


def _kind(node: _Node) -> str:
    if isinstance(node.value, str):
        return f"the word {node.value[:40]!r}" if node.value.strip() else "nothing"
    if not node.value:
        return "nothing"
    return "a list" if isinstance(node.value, list) else "a mapping"


def _of(source: str) -> str:
    return f" ({source})" if source else ""


def _place(path: str, line: int) -> str:
    return f"{path}, line {line}"


def _bad(path: str, line: int, found: str, fix: str) -> PolicyError:
    return PolicyError(f"read {_place(path, line)}", found=found, fix=fix)
