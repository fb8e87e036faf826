"""Writes docs/policies/README.md from the registry: `python docs/policies_index.py`."""

from __future__ import annotations

from pathlib import Path

from frostline.cli.cards import Card, card
from frostline.registry import FAMILIES, available_combinators, available_policies

PAGE = Path(__file__).with_name("policies") / "README.md"
_HEAD = """\
# Policies

A policy decides what is frozen when. `frostline policies` prints this list, and
`frostline policies NAME` one of it with options, price and evidence. The
[guide](../guide.md#policies) says how to choose, combine and write them. Each page says what the
authors claim and what was measured here.

- **reads**: signals taken from the running training by default, which cost time; see the
  [guide](../guide.md#signals-and-their-price).
- **price**: what the policy says of it when a run starts.

This page is written by `docs/policies_index.py`; a test checks that it is current.
"""


def page() -> str:
    """The page as it should be."""
    lines = [_HEAD]
    cards = [card(name) for name in (*available_policies(), *available_combinators())]
    for family, meaning in FAMILIES.items():
        own = [c for c in cards if c.family == family]
        lines.append(f"## {family.capitalize()}: {meaning}\n")
        if family == "combinator":
            lines += ["| policy | what it does |", "|---|---|"]
            lines += [
                f"| [`{c.name}`](combinators.md#{c.name}) | {_cell(c.summary)} |" for c in own
            ]
        else:
            lines += ["| policy | what it does | reads | price |", "|---|---|---|---|"]
            lines += [_row(c) for c in own]
        lines.append("")
    return "\n".join(lines)


def _row(of: Card) -> str:
    signals = dict.fromkeys(text.partition(" ")[0] for text in of.reads)
    reads = ", ".join(f"`{signal}`" for signal in signals) or "-"
    price = _cell(of.notice) or "-"
    return f"| [`{of.name}`]({of.name}.md) | {_cell(of.summary)} | {reads} | {price} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
