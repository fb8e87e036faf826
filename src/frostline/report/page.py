"""Numbers and charts to one HTML file that loads nothing from anywhere.

Names, reasons and texts come from data, weights and policies that others made. In markup Jinja
escapes them, as data they are JSON in which no character could end the script, and the script
writes them as text. A Content-Security-Policy names the page's own scripts and styles by their
digest and allows no connection at all, so that a mistake in any of this would still run nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from frostline import _io
from frostline._version import __version__
from frostline.errors import StorageError
from frostline.report.charts import (
    THEMES,
    arm_colours,
    charts_of,
    compiled,
    row_height,
    timeline_spec,
)
from frostline.report.numbers import Numbers, RunDetail
from frostline.report.timeline import Timeline
from frostline.text import bytes_text, escape, percent_text, seconds_text

__all__ = ["page", "safe_json", "write_page"]

_MARKER = "<!-- made by frostline report: written anew each time -->"
_MOST_ROWS = 400
_NO_FIGURE = "\N{EN DASH}"
_BUNDLE = "window.vegaEmbed = vegaEmbed;"
_CLOSING = re.compile(r"</(?=script)", re.IGNORECASE)
_DIGITS = 4


def write_page(numbers: Numbers, path: Path) -> None:
    """Write the page of a report.

    Args:
        numbers: what it shows.
        path: the file; an older report there is replaced, nothing else is.

    Raises:
        StorageError: another file is there, or it cannot be written.
    """
    if path.exists() and not _is_report(path):
        raise StorageError(
            f"write the report {path}",
            found="a file there that is no report" if path.is_file() else "a folder there",
            fix="give another name: --output",
        )
    _io.make_folder(path.parent)
    _io.atomic_write_text(path, page(numbers))


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARKER.encode() in file.read(1024)


def page(numbers: Numbers) -> str:
    """The page of a report as HTML."""
    charts = {chart.name: chart for chart in charts_of(numbers)}
    style, script = _style(numbers), _resource("page.js")
    bundle = _vega()
    shown = {
        "charts": {name: compiled(chart.spec) for name, chart in charts.items()},
        "timeline": compiled(timeline_spec([], (), end=1, row_px=row_height(1))),
        **_runs_data(numbers.details),
    }
    by_name = {detail.name: detail for detail in numbers.details}
    first = by_name[numbers.featured]
    return _environment().get_template("page.html").render(
        numbers=numbers,
        charts=charts,
        most_rows=_MOST_ROWS,
        judged=len(numbers.arms) > 1 and not numbers.learning,
        opened=_opened(numbers),
        holds=first.proof.holds if first.proof else (),
        notes=list(dict.fromkeys(note for d in numbers.details for note in d.cache)),
        version=__version__,
        marker=_own(_MARKER),
        policy=_policy(scripts=(bundle, script), style=style),
        style=_own(style),
        script=_own(script),
        bundle=_own(bundle),
        data=_own(safe_json(shown)),
    )  # fmt: skip


def _own(text: str) -> Markup:
    """Text of ours that is markup already, or JSON made safe for its place."""
    return Markup(text)  # noqa: S704  the one place


def _opened(numbers: Numbers) -> RunDetail:
    """The run whose timeline is shown first: the featured one, or one that froze something."""
    ordered = sorted(numbers.details, key=lambda d: d.name != numbers.featured)
    froze = (d for d in ordered if any(s.phase.kind != "training" for s in d.timeline.spans))
    return next(froze, ordered[0])


def _policy(*, scripts: Sequence[str], style: str) -> str:
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'sha256-{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def safe_json(value: Any) -> str:
    r"""JSON that can stand inside a script element: nothing in it ends the element or a line.

    Characters that could reorder or hide text are written out, as on the terminal.

    Example:
        >>> print(safe_json({"name": "</script>\u2028"}))
        {"name":"\u003c/script\u003e\\u2028"}
    """
    text = json.dumps(_escaped(value), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escape(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


# -- what the page is made of ------------------------------------------------------------------


@functools.cache
def _vega() -> str:
    """The script that draws charts. It is ours only to carry, so it must not end its element."""
    return _CLOSING.sub(r"<\\/", vl_convert.javascript_bundle(_BUNDLE))


def _resource(name: str) -> str:
    folder = importlib.resources.files("frostline.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _style(numbers: Numbers) -> str:
    def variables(theme: Mapping[str, str]) -> str:
        return " ".join(f"--{name}: {colour};" for name, colour in theme.items())

    light, dark = variables(THEMES["light"]), variables(THEMES["dark"])
    dots = "\n".join(
        f".dot.s{place} {{ background: {colour}; }}"
        for place, colour in enumerate(arm_colours(numbers.arms).values())
    )
    return (
        f":root {{ color-scheme: light; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ "
        f':root:not([data-theme="light"]) {{ color-scheme: dark; {dark} }} }}\n'
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}\n'
        # Paper is white, whatever the screen was.
        f"@media print {{ :root, :root[data-theme] {{ color-scheme: light; {light} }} }}\n"
        f"{dots}\n{_resource('page.css')}"
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("frostline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escape(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": _figure,
        "percent": lambda share: percent_text(share) or _NO_FIGURE,
        "seconds": lambda value: _NO_FIGURE if value is None else seconds_text(value),
        "bytes": lambda value: _NO_FIGURE if value is None else bytes_text(value),
        "signed": lambda value: f"{100 * value:+.1f}",
        "points": lambda value: _NO_FIGURE if value is None else f"{100 * value[0]:+.1f}",
    }
    return environment


def _figure(value: float) -> str:
    """A number with four digits, whole ones in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.{_DIGITS}g}"


# -- timelines, small enough to carry all of them ----------------------------------------------


class _Strings:
    """A table of strings, each kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))


def _runs_data(details: Sequence[RunDetail]) -> dict[str, Any]:
    strings = _Strings()
    runs = [
        {"name": d.name, "says": d.timeline.sentence(), **_timeline_data(d.timeline, strings)}
        for d in details
    ]
    return {"runs": runs, "strings": list(strings.places)}


def _timeline_data(found: Timeline, strings: _Strings) -> dict[str, Any]:
    """A timeline as the script of the page reads it: flat lists, names by their place."""
    number = {name: place for place, name in enumerate(found.groups)}
    signals = list(dict.fromkeys(name for span in found.spans for name in span.signals))
    phases: dict[tuple[str, float, bool], int] = {}
    spans: list[list[int]] = [[] for _ in found.groups]
    seen: list[list[list[Any]]] = [[[] for _ in signals] for _ in found.groups]
    for span in found.spans:
        group, phase = number[span.group], span.phase
        key = (phase.kind, _short(phase.lr_scale), phase.live_norm)
        spans[group] += [span.from_step, phases.setdefault(key, len(phases)), span.change]
        for place, name in enumerate(signals):
            seen[group][place].append(_short(span.signals.get(name)))
    return {
        "groups": [strings(name) for name in found.groups],
        "end": found.end_step,
        "epochs": list(found.epochs),
        "coarse": found.coarse,
        "signals": [strings(name) for name in signals],
        "phases": [list(key) for key in phases],
        "spans": spans,
        "seen": seen if signals else [],
        "changes": [
            [
                change.step,
                _short(change.epoch),
                _short(change.seconds),
                strings(change.reason),
                bits,
                change.frozen_count,
                _short(change.trained_share),
                {strings(n): [_short(v) for v in values] for n, values in change.signals.items()},
                {strings(name): _short(value) for name, value in change.metrics.items()},
            ]
            for change, bits in zip(found.changes, _frozen_bits(found), strict=True)
        ],
    }


def _frozen_bits(found: Timeline) -> Iterator[str]:
    """After each decision, what is frozen: a hexadecimal number with a bit for each group."""
    weight = {name: 1 << place for place, name in enumerate(found.groups)}
    frozen = 0
    for change in found.changes:
        frozen += sum(weight[name] for name in change.frozen)
        frozen -= sum(weight[name] for name in change.unfrozen)
        yield f"{frozen:x}"


def _short(value: float | None) -> Any:
    """Four digits are more than anyone sees; numbers that are none become words."""
    return None if value is None else _io.finite_json(float(f"{value:.{_DIGITS}g}"))
