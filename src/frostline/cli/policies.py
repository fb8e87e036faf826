"""`frostline policies`: what can decide what is frozen, its options, and what it was worth."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import textwrap
from typing import Annotated, Any

from cyclopts import Parameter

from frostline.cli.cards import Card, Option, card
from frostline.cli.terminal import console, escape, print_json, print_table
from frostline.registry import (
    FAMILIES,
    available_combinators,
    available_policies,
    policy_family,
)

__all__ = ["policies"]

_LEGEND = """\
Options, price and evidence of one: frostline policies NAME
Combine: --policy "then:first=(linear-probe),after=2ep,second=(gradual:every=1ep)\""""
_READABLE = 100  # characters of a line of prose
_CONTROLS = {
    "vs_full": "full fine-tuning",
    "vs_prefix": "a static prefix of equal compute",
    "vs_time_matched": "full fine-tuning cut to its compute",
    "vs_placebo": "its placebo",
}
_MODELS = {"resnet20": "ResNet-20", "bert": "BERT 6x384"}


def policies(
    name: Annotated[
        str | None, Parameter(help="Show this policy: options, price, evidence.")
    ] = None,
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """List the freezing policies, or show one with its options, its price and its evidence.

    A policy is written NAME or NAME:OPTION=VALUE,OPTION=VALUE, for example gradual:every=2ep. A
    policy made of policies takes them in parentheses: placebo:policy=(gradual:every=2ep),seed=1.
    """
    if name is not None:
        shown = card(name)
        if json:
            print_json(_as_json(shown))
        else:
            _print(shown)
        return
    listed = [
        (policy_family(known), known, card(known).summary)
        for known in (*available_policies(), *available_combinators())
    ]
    if json:
        print_json({known: {"family": f, "about": about} for f, known, about in listed})
        return
    for family, meaning in FAMILIES.items():
        print_table(
            {"policy": "left", "what it does": "left"},
            [row for of, *row in listed if of == family],
            title=f"{family}: {meaning}",
        )
    _lines(_LEGEND)


def _as_json(shown: Card) -> dict[str, Any]:
    given = dataclasses.asdict(shown)
    return {**given, "options": [dataclasses.asdict(o) for o in shown.options]}


def _print(shown: Card) -> None:
    _prose(shown.description)
    if shown.options:
        print_table(
            {"option": "left", "type": "left", "default": "left", "meaning": "left"},
            [(o.option, o.type, o.default, o.meaning) for o in shown.options],
        )
    else:
        _lines("\nNo options.\n")
    for heading, text in (
        ("Reads", "\n\n".join(shown.reads)),
        ("Price", shown.notice),
        ("References", shown.references),
        ("Evidence", "\n\n".join(_evidence(shown))),
    ):
        if text:
            _lines(f"{heading}:")
            _prose(text, indent="  ", between="")
            _lines("\n")
    given = ",".join(f"{o.option}={_given(o)}" for o in shown.options)
    _lines(f"--policy {shlex.quote(f'{shown.name}:{given}' if given else shown.name)}")


def _evidence(shown: Card) -> list[str]:
    found = shown.evidence or {}
    if "accuracy" not in found:
        lines = [] if shown.family == "combinator" else ["not measured"]
    else:
        lines = [
            f"{found['setting']}, as {found['spec']}:",
            f"test accuracy {_mean(found['accuracy'])}, full fine-tuning {_mean(found['full'])}",
            f"{found['compute_share']:.0%} of the compute of full fine-tuning",
        ]
        for key, control in _CONTROLS.items():
            if found.get(key):
                lines.append(f"{_difference(found[key])} points against {control}")
        lines.append(found["verdict"])
    if cost := found.get("overhead"):
        models = ", ".join(f"{p:.1f} % on {_MODELS.get(m, m)}" for m, p in cost.items())
        lines.append(f"its own cost, of a training step: {models}")
    return lines


def _mean(accuracy: float | list[float]) -> str:
    values = accuracy if isinstance(accuracy, list) else [accuracy]
    return f"{100 * sum(values) / len(values):.1f} %"


def _difference(interval: list[float | None]) -> str:
    mean, low, high = (None if v is None else 100 * v for v in interval)
    ends = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"
    return f"{mean:+.1f}{ends}"


def _given(option: Option) -> str:
    if option.default != "required":
        return option.default
    return "(...)" if option.type in ("Policy", "several policies") else "..."


def _prose(text: str, *, indent: str = "", between: str = "\n") -> None:
    """Paragraphs, wrapped at the width of the terminal, yet no wider than one likes to read."""
    width = min(console(sys.stdout).width, _READABLE)
    wrapped = (
        textwrap.fill(
            escape(" ".join(paragraph.split())),
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        for paragraph in re.split(r"\n\s*\n", text.strip())
    )
    _lines(f"\n{between}".join(wrapped))


def _lines(text: str) -> None:
    out = console(sys.stdout)
    for line in text.splitlines():
        out.print(escape(line), soft_wrap=True)
