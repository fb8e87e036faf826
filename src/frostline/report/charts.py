"""Numbers to charts: Vega-Lite by Altair, compiled to Vega.

Colours are names of CSS variables (``var(--ink)``), so one chart follows the theme of its page
without being drawn again; `concrete` puts the colours of a theme in their place for files. The
colours of strategies are those of Okabe and Ito 2008, "Color Universal Design", which the colour
blind can tell apart; the dark theme has lighter tints of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import altair as alt
import vl_convert

from frostline.report.costs import PARTS
from frostline.report.mistakes import Mistakes
from frostline.report.numbers import Numbers, ProbeReading
from frostline.report.results import METRICS, ArmResult, CurvePoint
from frostline.report.timeline import Phase, Timeline, coarser
from frostline.text import percent_text

if TYPE_CHECKING:
    from frostline.study.learning_curve import LearningCurve, SizePoint

__all__ = [
    "THEMES",
    "Chart",
    "arm_colours",
    "charts_of",
    "compiled",
    "concrete",
    "row_height",
    "shade",
    "span_rows",
    "timeline_chart",
    "timeline_spec",
]

Theme = Literal["light", "dark"]
Spec = dict[str, Any]

#: The colours of each theme, by variable.
THEMES: Mapping[Theme, Mapping[str, str]] = {
    "light": {
        "paper": "#ffffff", "panel": "#f6f8fa", "ink": "#14202b", "soft": "#5a6875",
        "line": "#dce2e8", "accent": "#0a66b7", "accent-soft": "#e3f0fb", "good": "#04724d",
        "bad": "#b3400a", "frozen": "#2f86cf", "partly": "#9ac6ea", "training": "#f3b94f",
        "reference": "#68747f", "c1": "#d55e00", "c2": "#009e73", "c3": "#cc79a7",
        "c4": "#e69f00", "c5": "#56b4e9", "c6": "#7d6b00", "c7": "#8a4fbf",
    },
    "dark": {
        "paper": "#0f161d", "panel": "#17212b", "ink": "#e8eef4", "soft": "#9fb0be",
        "line": "#2b3946", "accent": "#6cb6f5", "accent-soft": "#14304a", "good": "#4cc79b",
        "bad": "#ff9a66", "frozen": "#4a9fe0", "partly": "#2c5c86", "training": "#c98f2a",
        "reference": "#9aa7b3", "c1": "#ff8b45", "c2": "#3ecfa0", "c3": "#e9a3c9",
        "c4": "#f6c453", "c5": "#93d3f7", "c6": "#cdbb4a", "c7": "#bd93ea",
    },
}  # fmt: skip
_CYCLE = ("c1", "c2", "c3", "c4", "c5", "c6", "c7")
_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])
#: One colour for each part of the time of a run; training is the quiet one.
_PART_COLOURS = ("reference", "frozen", "c3", "c7", "c5", "c2", "c4", "line")
_VARIABLE = re.compile(r"var\(--([a-z0-9-]+)\)")
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_GIB = 2**30
_MOST_OVERVIEW = 3000  # spans of all strategies together
_POINTS, _LABELS, _END_LABELS = "points", "labels", "end_labels"
#: Where a label may stand beside its point, and beside the last point of a line.
_AROUND = ("top", "right", "left", "bottom", "top-right", "bottom-right")
_BEHIND = ("right", "top-right", "bottom-right", "top", "bottom", "top-left", "bottom-left")
_LABEL_PX, _LABEL_LIMIT_PX = 12, 150
#: Names beside an axis leave most of a narrow screen to the chart.
_NAMES_PX = alt.ExprRef(
    "isFinite(containerSize()[0]) ? clamp(0.28 * containerSize()[0], 70, 180) : 180"
)
#: Thousands of spans would take their time to make their words; the page makes those of one.
_WHOLE_ROW = alt.TooltipContent("data")
_LEGEND_COLUMNS = alt.ExprRef("containerSize()[0] < 560 ? 2 : 4")


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with the words and the table that stand for it.

    Attributes:
        name: of its files, and of its place in the page.
        title: what it shows.
        summary: what there is to see, in a sentence or two.
        spec: Vega-Lite.
        columns: headings of the table.
        rows: cells of the table: the numbers that are drawn.
    """

    name: str
    title: str
    summary: str
    spec: Spec
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def charts_of(numbers: Numbers) -> tuple[Chart, ...]:
    """All charts but the timelines, in the order of the page; those without numbers are absent."""
    made = [
        *(_by_size(curve) for curve in numbers.learning),
        # Strategies at several sizes do not compete in quality and cost.
        None if numbers.learning else _pareto(numbers.arms, "wall_s"),
        None if numbers.learning else _pareto(numbers.arms, "peak_memory_bytes"),
        _overview(numbers),
        *(_curve(numbers, metric) for metric in METRICS),
        _probes(numbers),
        _time(numbers),
        _saving(numbers.arms),
        _confusion(numbers.mistakes),
    ]
    return tuple(chart for chart in made if chart is not None)


def compiled(spec: Spec) -> Spec:
    """A Vega-Lite chart as Vega, which a browser draws without Vega-Lite.

    Labels of points are placed where they cover neither each other nor the points, which Vega can
    do and Vega-Lite cannot ask for.
    """
    vega: Spec = vl_convert.vegalite_to_vega(spec)
    for mark in vega.get("marks", ()):
        for name, sides in ((_LABELS, _AROUND), (_END_LABELS, _BEHIND)):
            if mark.get("name") == f"{name}_marks":
                _place_labels(mark, sides)
    return vega


def _place_labels(mark: Spec, sides: Sequence[str]) -> None:
    """Turn a text mark over the data into one over the points, placed by Vega's label transform."""
    update = mark["encode"]["update"]
    mark["from"] = {"data": f"{_POINTS}_marks"}
    mark["encode"] = {
        "update": {
            "text": {"field": "datum.arm"},
            "fill": update["fill"],
            "fontSize": {"value": _LABEL_PX},
            "limit": {"value": _LABEL_LIMIT_PX},
        }
    }
    mark["transform"] = [
        {
            "type": "label",
            "size": {"signal": "[width, height]"},
            "anchor": list(sides),
            "offset": [4],
            "avoidBaseMark": True,
            "padding": 30,
        }
    ]


def concrete(spec: Spec, theme: Theme = "light") -> Spec:
    """The chart with the colours of a theme in place of variables, for files.

    Example:
        >>> concrete({"fill": "var(--paper)"})
        {'fill': '#ffffff'}
    """
    colours = THEMES[theme]
    text = _VARIABLE.sub(lambda match: colours[match[1]], json.dumps(spec))
    return json.loads(text)


def arm_colours(arms: Sequence[ArmResult]) -> dict[str, str]:
    """A colour for each strategy: grey for the reference, the accent for the one to take.

    Example:
        >>> arm_colours([ArmResult("full", "full", (), reference=True), ArmResult("half", "a", ())])
        {'full': 'var(--reference)', 'half': 'var(--c1)'}
    """
    others = iter(_CYCLE * (1 + len(arms) // len(_CYCLE)))
    return {
        arm.name: _var("reference" if arm.reference else "accent" if arm.chosen else next(others))
        for arm in arms
    }


def _percent(share: float) -> str:
    return percent_text(share) or ""


def _var(name: str) -> str:
    return f"var(--{name})"


# -- the frame that all charts share -----------------------------------------------------------


def _data(rows: Iterable[Mapping[str, Any]], name: str) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows], name=name)


def _spec(chart: Any, *, height: int | Mapping[str, Any]) -> Spec:
    """The chart as plain Vega-Lite, as wide as its place and in the house style."""
    spec: Spec = chart.properties(width="container", height=height).to_dict(
        context={"pre_transform": False}
    )
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["config"] = _CONFIG
    spec["background"] = "transparent"
    return spec


_CONFIG: Spec = {
    "aria": False,  # the page describes each chart in words and as a table
    "font": _FONT,
    "view": {"stroke": None},
    "mark": {"invalid": None},  # every number that is drawn is one
    "axis": {
        "labelColor": _var("soft"),
        "titleColor": _var("soft"),
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 10,
        "labelPadding": 6,
        "gridColor": _var("line"),
        "gridWidth": 1,
        "domain": False,
        "ticks": False,
        "labelFlush": False,
    },
    "axisX": {"grid": False, "tickCount": 6},
    "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleY": -12,
              "titleX": 0},
    "legend": {"labelColor": _var("soft"), "titleColor": _var("soft"), "labelFontSize": 12,
               "orient": "top", "title": None, "symbolType": "circle", "columnPadding": 16},
    "text": {"color": _var("ink"), "fontSize": 12},
    "rule": {"color": _var("line")},
}  # fmt: skip


def _hide() -> tuple[alt.Parameter, str]:
    """A parameter that holds hidden strategies, and the filter that obeys it."""
    return alt.param(name="hidden", value=[]), "indexof(hidden, datum.arm) < 0"


def _colour(arms: Sequence[ArmResult]) -> alt.Color:
    colours = arm_colours(arms)
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color("arm:N", scale=scale, legend=None)


def _shape(arms: Sequence[ArmResult]) -> alt.Shape:
    names = [arm.name for arm in arms]
    shapes = [_SHAPES[i % len(_SHAPES)] for i in range(len(names))]
    return alt.Shape("arm:N", scale=alt.Scale(domain=names, range=shapes), legend=None)


def _dash(arms: Sequence[ArmResult]) -> alt.StrokeDash:
    names = [arm.name for arm in arms]
    dashes = [_DASHES[i // (1 + len(_CYCLE)) % len(_DASHES)] for i in range(len(names))]
    return alt.StrokeDash("arm:N", scale=alt.Scale(domain=names, range=dashes), legend=None)


def _percent_axis(title: str) -> alt.Axis:
    return alt.Axis(format=".0%", title=title, tickCount=5)


# -- quality by number of samples --------------------------------------------------------------

_SPLITS = {"val": "validation", "test": "test"}


def _by_size(curve: LearningCurve) -> Chart:
    """A learning curve: a line per policy, its band, its seeds, and where two of them cross."""
    split = _SPLITS[curve.metric]
    points = [(name, point) for name, of in curve.points.items() for point in of]
    means = [
        {"arm": name, "size": p.size, "mean": p.mean, "low": p.low, "high": p.high,
         "interval": _interval(p), "seeds": len(p.scores)}
        for name, p in points if p.mean is not None
    ]  # fmt: skip
    last = {row["arm"]: row for row in means}
    bands = [row for row in means if row["low"] is not None]
    runs = [
        {"arm": name, "size": p.size, "score": score, "seed": seed}
        for name, p in points for seed, score in p.scores.items() if len(p.scores) > 1
    ]  # fmt: skip
    crossings = [
        {"at": order.at, "says": order.sentence} for order in curve.orders() if order.at is not None
    ]
    sizes = sorted({row["size"] for row in means})
    count = "" if curve.eval_samples is None else f"{curve.eval_samples:,} "
    band = f" Bands: {100 * curve.level:g} % intervals of the mean over seeds." if bands else ""
    rule = " Dashed: where means cross." if crossings else ""
    tables = (means, list(last.values()), bands, runs, crossings)
    return Chart(
        name="by_size" if curve.metric == "val" else "by_size_test",
        title=f"{split.capitalize()} accuracy by number of training samples",
        summary=f"Accuracy on {count}{split} samples. {curve.sentence()}{band}{rule}",
        spec=_spec(_by_size_chart(curve, sizes, tables), height=320),
        columns=("training samples", "strategy", "mean", "low", "high", "seeds", "missing"),
        rows=tuple(
            (p.size, name, p.mean, p.low, p.high, len(p.scores), "; ".join(p.absent))
            for name, p in sorted(points, key=lambda item: item[1].size)
        ),
    )  # fmt: skip


def _interval(point: SizePoint) -> str:
    if point.low is None or point.high is None:
        return "none"
    return f"{_percent(point.low)} to {_percent(point.high)}"


def _by_size_chart(
    curve: LearningCurve, sizes: Sequence[int], tables: Sequence[Sequence[Spec]]
) -> Any:
    means, last, bands, runs, crossings = tables
    param, shown = _hide()
    names = list(curve.policies)
    colours = [_var(name) for name in ("reference", *_CYCLE * (1 + len(names) // len(_CYCLE)))]
    colour = alt.Color(
        "arm:N", legend=None, scale=alt.Scale(domain=names, range=colours[: len(names)])
    )
    shape = alt.Shape("arm:N", legend=None, scale=alt.Scale(
        domain=names, range=[_SHAPES[i % len(_SHAPES)] for i in range(len(names))]
    ))  # fmt: skip
    room = (sizes[-1] / sizes[0]) ** 0.18  # behind the last points, for their labels
    domain = [0.95 * sizes[0], max(1.05, room) * sizes[-1]]
    scale = alt.Scale(type="log", base=2, domain=domain, nice=False)
    axis = alt.Axis(values=list(sizes), format=",d", labelOverlap="greedy")
    x = alt.X("size:Q", title="training samples", scale=scale, axis=axis)
    title = f"{_SPLITS[curve.metric]} accuracy"

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", axis=_percent_axis(title), scale=alt.Scale(zero=False))

    drawn = alt.Chart(_data(means, "means")).transform_filter(shown)
    told = [
        alt.Tooltip("arm:N", title="strategy"),
        alt.Tooltip("size:Q", format=",d", title="training samples"),
        alt.Tooltip("mean:Q", format=".1%", title=f"mean {title}"),
        alt.Tooltip("interval:N", title=f"{100 * curve.level:g} % interval"),
        alt.Tooltip("seeds:Q"),
    ]
    return alt.layer(
        alt.Chart(_data(crossings, "crossings"))
        .mark_rule(color=_var("soft"), strokeDash=[3, 4], strokeWidth=1.2)
        .encode(x=alt.X("at:Q", scale=scale, axis=axis),
                tooltip=alt.Tooltip("says:N", title="order")),
        alt.Chart(_data(bands, "bands")).transform_filter(shown).mark_area(opacity=0.1)
        .encode(x=x, y=y("low"), y2="high:Q", color=colour),
        alt.Chart(_data(runs, "runs")).transform_filter(shown)
        .mark_point(filled=True, size=22, opacity=0.45)
        .encode(x=x, y=y("score"), color=colour, shape=shape,
                tooltip=[told[0], told[1], alt.Tooltip("seed:Q"),
                         alt.Tooltip("score:Q", format=".1%", title=title)]),
        drawn.mark_line(strokeWidth=2.2).encode(x=x, y=y("mean"), color=colour),
        drawn.mark_point(filled=True, size=80, opacity=1, stroke=_var("paper"), strokeWidth=1.2)
        .encode(x=x, y=y("mean"), color=colour, shape=shape, tooltip=told),
        alt.Chart(_data(last, "last")).transform_filter(shown)
        .mark_point(filled=True, size=80, opacity=1, stroke=_var("paper"), strokeWidth=1.2)
        .encode(x=x, y=y("mean"), color=colour, shape=shape, tooltip=told)
        .properties(name=_POINTS),
        alt.Chart(_data(last, "last")).transform_filter(shown)
        .mark_text(align="left", dx=8, fontSize=_LABEL_PX, limit=_LABEL_LIMIT_PX, color=_var("ink"))
        .encode(x=x, y=y("mean"), text="arm:N").properties(name=_END_LABELS),
    ).add_params(param)  # fmt: skip


# -- quality against cost ----------------------------------------------------------------------

_COST_TITLES = {"wall_s": "seconds of the whole run", "peak_memory_bytes": "GiB at the peak"}


def _pareto(arms: Sequence[ArmResult], cost: str) -> Chart | None:
    scale = _GIB if cost == "peak_memory_bytes" else 1
    found = (_pareto_row(arm, cost, scale) for arm in arms)
    means = [row for row in found if row is not None]
    if not means:
        return None
    runs = [
        {"arm": run.arm, "cost": getattr(run, cost) / scale, "quality": run.val_accuracy,
         "run": run.name}
        for arm in arms for run in arm.runs
        if run.val_accuracy is not None and getattr(run, cost) is not None
    ]  # fmt: skip
    front = _front(means)
    for row in means:
        row["front"] = row in front
    title = _COST_TITLES[cost]
    quality = max(means, key=lambda row: row["quality"])
    cheap = min(means, key=lambda row: row["cost"])
    return Chart(
        name="quality_time" if cost == "wall_s" else "quality_memory",
        title="Quality against time" if cost == "wall_s" else "Quality against memory",
        summary=f"Best: {quality['arm']}, {_percent(quality['quality'])}. "
        f"Cheapest: {cheap['arm']}, {cheap['cost']:.3g} {title}. "
        "No other strategy is as good and costs no more "
        f"(dashed): {', '.join(row['arm'] for row in front)}.",
        spec=_spec(_pareto_chart(arms, title, means, runs, front), height=300),
        columns=("strategy", "validation accuracy", title, "on the front"),
        rows=tuple(
            (row["arm"], row["quality"], row["cost"], "yes" if row["front"] else "")
            for row in means
        ),
    )


def _pareto_chart(
    arms: Sequence[ArmResult],
    title: str,
    means: Sequence[Spec],
    runs: Sequence[Spec],
    front: Sequence[Spec],
) -> Any:
    param, shown = _hide()
    costs = [row["cost"] for row in (*means, *runs)]
    least, most = min(costs), max(costs)
    room = max(0.08 * most, 0.12 * (most - least))  # so that a thousandth does not look like much
    domain = [max(0.0, least - room), most + room]
    x = alt.X("cost:Q", title=title, scale=alt.Scale(domain=domain, nice=False))
    y = alt.Y("quality:Q", axis=_percent_axis("validation accuracy"),
              scale=alt.Scale(zero=False, padding=18))  # fmt: skip
    points = alt.Chart(_data(means, "means")).transform_filter(shown)
    percent = alt.Tooltip("quality:Q", format=".1%", title="validation accuracy")
    price = alt.Tooltip("cost:Q", format=".2f", title=title)
    return alt.layer(
        alt.Chart(_data(front, "front")).transform_filter(shown)
        .mark_line(color=_var("soft"), strokeWidth=1.5, strokeDash=[3, 4], opacity=0.7,
                   interpolate="step-after")
        .encode(x=x, y=y),
        alt.Chart(_data(runs, "runs")).transform_filter(shown)
        .mark_point(filled=True, size=24, opacity=0.4)
        .encode(x=x, y=y, color=_colour(arms), shape=_shape(arms),
                tooltip=[alt.Tooltip("run:N"), percent, price]),
        points.mark_point(filled=True, size=150, opacity=1, stroke=_var("paper"), strokeWidth=1.5)
        .encode(x=x, y=y, color=_colour(arms), shape=_shape(arms),
                tooltip=[alt.Tooltip("arm:N", title="strategy"), percent, price,
                         alt.Tooltip("verdict:N")])
        .properties(name=_POINTS),
        points.mark_text(dy=-14, fontSize=_LABEL_PX, limit=_LABEL_LIMIT_PX, color=_var("ink"))
        .encode(x=x, y=y, text="arm:N").properties(name=_LABELS),
    ).add_params(param)  # fmt: skip


def _front(means: Sequence[Spec]) -> list[Spec]:
    """Those that no other one beats in quality at no higher cost, the cheapest first."""
    ordered = sorted(means, key=lambda row: (row["cost"], -row["quality"]))
    front: list[Spec] = []
    for row in ordered:
        if not row["control"] and (not front or row["quality"] > front[-1]["quality"]):
            front.append(row)
    return front


def _pareto_row(arm: ArmResult, cost: str, scale: float) -> Spec | None:
    quality, value = arm.mean("val_accuracy"), arm.mean(cost)
    if quality is None or value is None:
        return None
    verdict = "the reference" if arm.reference else arm.verdict or arm.sentence
    return {"arm": arm.name, "quality": quality, "cost": value / scale, "verdict": verdict,
            "control": bool(arm.control)}  # fmt: skip


# -- what trains, when -------------------------------------------------------------------------


def _overview(numbers: Numbers) -> Chart | None:
    """The timelines of all strategies side by side, each of its first seed."""
    first: dict[str, Timeline] = {}
    for detail in numbers.details:
        first.setdefault(detail.arm, detail.timeline)
    if len(first) < 2:
        return None
    rows = [
        {**row, "arm": arm}
        for arm, found in first.items()
        for row in span_rows(coarser(found, _MOST_OVERVIEW // len(first)))
    ]
    param, shown = _hide()
    deepest = max(len(found.groups) for found in first.values())
    chart = (
        alt.Chart(_data(rows, "rows"))
        .transform_filter(shown)
        .mark_bar(strokeWidth=0, minBandSize=0.25, tooltip=_WHOLE_ROW)
        .encode(
            x=alt.X("from:Q", title="updates", scale=alt.Scale(nice=False)),
            x2="to:Q",
            y=alt.Y("arm:N", sort=list(first), title=None, scale=alt.Scale(paddingInner=0.22),
                    axis=alt.Axis(labelLimit=_NAMES_PX, labelFontSize=12)),
            yOffset=alt.YOffset("depth:O", sort="descending",
                                scale=alt.Scale(paddingInner=0, paddingOuter=0)),
            color=_phase_colour(),
            opacity=_shade(),
        )
        .add_params(param)
    )  # fmt: skip
    held = {arm: _held(found) for arm, found in first.items()}
    said = "; ".join(f"{arm} {_percent(share)}" for arm, share in list(held.items())[:8])
    each = max(34, min(64, 4 * deepest))
    return Chart(
        name="overview",
        title="Every strategy at a glance",
        summary=f"Each strip is one run, its first seed, head on top. Share of the layer groups "
        f"that was frozen, mean over updates: {said}.",
        spec=_spec(chart, height={"step": each, "for": "position"}),
        columns=("strategy", "layer group", "from update", "to update", "state"),
        rows=tuple((r["arm"], r["group"], r["from"], r["to"], r["kind"]) for r in rows),
    )


def _held(found: Timeline) -> float:
    """Share of the layer groups that was frozen, mean over updates."""
    return sum(map(found.frozen_share, found.groups)) / max(1, len(found.groups))


def span_rows(found: Timeline) -> list[Spec]:
    """A timeline as rows for its chart: one per span."""
    reasons = [change.reason for change in found.changes] or [""]
    return [
        {
            "group": span.group,
            "depth": found.groups.index(span.group),
            "from": span.from_step,
            "to": span.to_step,
            "kind": span.phase.kind,
            "rate": span.phase.lr_scale,
            "shade": shade(span.phase),
            "reason": reasons[span.change],
        }
        for span in found.spans
    ]


def shade(phase: Phase) -> float:
    """How strongly a span is drawn: what trains by the factor on its learning rate, in [0, 1]."""
    return 1.0 if phase.kind == "frozen" else min(1.0, phase.lr_scale)


def _phase_colour() -> alt.Color:
    kinds = ["frozen", "partly", "training"]
    scale = alt.Scale(domain=kinds, range=[_var(kind) for kind in kinds])
    return alt.Color("kind:N", legend=None, scale=scale)


def _shade() -> alt.Opacity:
    scale = alt.Scale(domain=[0, 1], range=[0.25, 1], clamp=True)
    return alt.Opacity("shade:Q", legend=None, scale=scale)


def timeline_spec(rows: Sequence[Spec], epochs: Sequence[int], *, end: int, row_px: int) -> Spec:
    """The freezing timeline: layer groups over updates, the head on top.

    Args:
        rows: as `span_rows` gives them.
        epochs: updates complete at the end of each epoch.
        end: updates of the run.
        row_px: height of a group.
    """
    cursor, last = alt.param(name="cursor", value=-1), alt.param(name="end", value=end)
    y = alt.Y(
        "group:N",
        sort=alt.EncodingSortField(field="depth", op="min", order="descending"),
        title=None,
        scale=alt.Scale(paddingInner=0.14 if row_px > 9 else 0.0),
        axis=alt.Axis(
            labelLimit=_NAMES_PX, labelOverlap="greedy", labelFontSize=min(12, max(9, row_px - 4))
        ),
    )
    # A domain of its own, so that nothing is asked of spans that are not there yet.
    domain = [0, alt.ExprRef("end")]
    x = alt.X("from:Q", title="updates", axis=alt.Axis(grid=False),
              scale=alt.Scale(domain=domain, nice=False))  # fmt: skip
    spans = (
        alt.Chart(_data(rows, "spans"))
        .mark_rect(strokeWidth=0, cornerRadius=1.5, tooltip=_WHOLE_ROW)
        .encode(
            x=x,
            x2="to:Q",
            y=y,
            color=_phase_colour(),
            opacity=_shade(),
        )
    )
    ends = [{"at": step} for step in epochs[:-1]]
    marks = (
        alt.Chart(_data(ends, "epochs"))
        .mark_rule(color=_var("paper"), strokeWidth=1.2, opacity=0.9)
        .encode(x="at:Q")
    )
    line = (
        alt.Chart(_data([{}], "one"))
        .transform_calculate(at="cursor")
        .transform_filter("cursor >= 0")
        .mark_rule(color=_var("ink"), strokeWidth=1.5)
        .encode(x="at:Q")
    )
    return _spec(alt.layer(spans, marks, line).add_params(cursor, last), height={"step": row_px})


def timeline_chart(name: str, found: Timeline) -> Chart:
    """The timeline of one run as a chart by itself, for files."""
    rows = span_rows(found)
    count = len(found.groups)
    return Chart(
        name=name,
        title="What was frozen when",
        summary=found.sentence(),
        spec=timeline_spec(
            rows, found.epochs, end=found.end_step, row_px=row_height(count)
        ),
        columns=("layer group", "from update", "to update", "state", "learning rate factor",
                 "reason"),
        rows=tuple(
            (r["group"], r["from"], r["to"], r["kind"], r["rate"], r["reason"]) for r in rows
        ),
    )  # fmt: skip


def row_height(groups: int) -> int:
    """Pixels for a layer group, so that few are easy to hit and many fit on a screen."""
    return 24 if groups <= 16 else 16 if groups <= 40 else 9 if groups <= 80 else 6


# -- curves ------------------------------------------------------------------------------------


def _curve(numbers: Numbers, metric: str) -> Chart | None:
    points = [point for point in numbers.curves if point.metric == metric]
    if not points:
        return None
    quality = metric == "val_accuracy"
    timed = quality and all(point.seconds is not None for point in points)
    rows = [_curve_row(point, timed=timed) for point in points]
    param, shown = _hide()
    base = alt.Chart(_data(rows, "rows")).transform_filter(shown)
    ticks = alt.Axis() if timed else alt.Axis(tickMinStep=1, format="d")
    x = alt.X("x:Q", title="seconds of training" if timed else "epochs", axis=ticks)
    axis = (
        _percent_axis(METRICS[metric]) if quality else alt.Axis(title=METRICS[metric], tickCount=5)
    )
    y = alt.Y("mean:Q", axis=axis, scale=alt.Scale(zero=False))
    form = ".1%" if quality else ".3f"
    chart = alt.layer(
        base.mark_area(opacity=0.14)
        .encode(x=x, y=alt.Y("low:Q", axis=axis, scale=alt.Scale(zero=False)), y2="high:Q",
                color=_colour(numbers.arms)),
        base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=26, filled=True))
        .encode(x=x, y=y, color=_colour(numbers.arms), strokeDash=_dash(numbers.arms),
                tooltip=[alt.Tooltip("arm:N", title="strategy"), alt.Tooltip("epoch:Q"),
                         alt.Tooltip("mean:Q", format=form, title=METRICS[metric]),
                         alt.Tooltip("low:Q", format=form, title="lowest seed"),
                         alt.Tooltip("high:Q", format=form, title="highest seed"),
                         alt.Tooltip("seeds:Q")]),
    ).add_params(param)  # fmt: skip
    seeds = max(point.seeds for point in points)
    last = {point.arm: point for point in points}
    shown_as = _percent if quality else "{:.3f}".format
    said = "; ".join(f"{arm} {shown_as(p.mean)}" for arm, p in list(last.items())[:8])
    band = f" Bands: the lowest to the highest of {seeds} seeds." if seeds > 1 else ""
    return Chart(
        name=metric,
        title=METRICS[metric].capitalize(),
        summary=f"After the last epoch: {said}.{band}",
        spec=_spec(chart, height=260),
        columns=("strategy", "epoch", "seconds", "mean", "lowest", "highest", "seeds"),
        rows=tuple((p.arm, p.epoch, p.seconds, p.mean, p.low, p.high, p.seeds) for p in points),
    )


def _curve_row(point: CurvePoint, *, timed: bool) -> Spec:
    return {
        "arm": point.arm,
        "epoch": point.epoch,
        "x": point.seconds if timed else point.epoch,
        "mean": point.mean,
        "low": point.low,
        "high": point.high,
        "seeds": point.seeds,
    }


# -- probes, time, savings, mistakes -----------------------------------------------------------


def _probes(numbers: Numbers) -> Chart | None:
    readings = numbers.probes
    if not readings:
        return None
    rows = [
        {"run": r.run, "group": r.group, "depth": r.depth, "accuracy": r.accuracy, "low": r.low,
         "high": r.high, "commonest": r.commonest}
        for r in readings
    ]  # fmt: skip
    x = alt.X("group:N", sort=alt.EncodingSortField(field="depth", op="min"), title="layer group",
              axis=alt.Axis(labelAngle=-40, labelLimit=120, labelOverlap="greedy"))  # fmt: skip
    y = alt.Y("accuracy:Q", axis=_percent_axis("accuracy of a linear probe"),
              scale=alt.Scale(zero=False))  # fmt: skip
    base = alt.Chart(_data(rows, "rows"))
    chart = alt.layer(
        base.mark_rule(color=_var("reference"), strokeDash=[4, 4])
        .encode(y=alt.Y("mean(commonest):Q", axis=_percent_axis("accuracy of a linear probe"))),
        base.mark_area(opacity=0.18, color=_var("accent"))
        .encode(x=x, y=alt.Y("low:Q", scale=alt.Scale(zero=False), title=""), y2="high:Q",
                detail="run:N"),
        base.mark_line(color=_var("accent"), strokeWidth=2,
                       point=alt.OverlayMarkDef(size=40, color=_var("accent"), filled=True))
        .encode(x=x, y=y, detail="run:N",
                tooltip=[alt.Tooltip("group:N", title="layer group"), alt.Tooltip("depth:Q"),
                         alt.Tooltip("accuracy:Q", format=".1%"),
                         alt.Tooltip("low:Q", format=".1%", title="interval from"),
                         alt.Tooltip("high:Q", format=".1%", title="to"), alt.Tooltip("run:N")]),
    )  # fmt: skip
    return Chart(
        name="probes",
        title="What each depth knows before any training",
        summary=_probe_sentence(readings),
        spec=_spec(chart, height=260),
        columns=("run", "layer group", "depth", "accuracy", "from", "to"),
        rows=tuple((r.run, r.group, r.depth, r.accuracy, r.low, r.high) for r in readings),
    )


def _probe_sentence(readings: Sequence[ProbeReading]) -> str:
    best = max(readings, key=lambda r: r.accuracy)
    return (
        f"A linear classifier reads the classes best from {best.group}: "
        f"{_percent(best.accuracy)} of validation samples; always answering the commonest class "
        f"gets {_percent(best.commonest)} (dashed). The band is its 95 % interval."
    )


def _time(numbers: Numbers) -> Chart | None:
    rows: list[Spec] = []
    for arm in numbers.arms:
        timed = [d.time_s for d in numbers.details if d.arm == arm.name and d.time_s]
        for order, part in enumerate(PARTS):
            if timed:
                seconds = sum(times[part] for times in timed) / len(timed)
                rows.append({"arm": arm.name, "part": part, "order": order, "seconds": seconds,
                             "about": PARTS[part]})  # fmt: skip
    if not rows:
        return None
    param, shown = _hide()
    names = [arm.name for arm in numbers.arms]
    chart = (
        alt.Chart(_data(rows, "rows"))
        .transform_filter(shown)
        .mark_bar(cornerRadius=1)
        .encode(
            x=alt.X("seconds:Q", title="seconds, mean over seeds", stack=True),
            y=alt.Y("arm:N", sort=names, title=None, axis=alt.Axis(labelLimit=_NAMES_PX),
                    scale=alt.Scale(paddingInner=0.3)),
            order="order:Q",
            color=alt.Color("part:N", sort=list(PARTS), title=None,
                            legend=alt.Legend(columns=_LEGEND_COLUMNS),
                            scale=alt.Scale(domain=list(PARTS),
                                            range=[_var(name) for name in _PART_COLOURS])),
            tooltip=[alt.Tooltip("arm:N", title="strategy"), alt.Tooltip("part:N"),
                     alt.Tooltip("seconds:Q", format=".2f"), alt.Tooltip("about:N", title="what")],
        )
        .add_params(param)
    )  # fmt: skip
    return Chart(
        name="time",
        title="Where the time went",
        summary=_time_sentence(rows),
        spec=_spec(chart, height={"step": 30}),
        columns=("strategy", "part", "seconds", "what it is"),
        rows=tuple((row["arm"], row["part"], row["seconds"], row["about"]) for row in rows),
    )


def _time_sentence(rows: Sequence[Spec]) -> str:
    total = sum(row["seconds"] for row in rows) or 1.0
    sums = {part: sum(r["seconds"] for r in rows if r["part"] == part) / total for part in PARTS}
    own = sum(sums[part] for part in ("signals", "policy", "applying", "digests"))
    return (
        f"Over all strategies {_percent(sums['training'])} of the time was training, "
        f"{_percent(sums['cache'])} the cache, {_percent(own)} deciding, signals, applying and "
        "proving."
    )


def _saving(arms: Sequence[ArmResult]) -> Chart | None:
    rows = [
        {"arm": arm.name, "predicted": arm.mean("predicted_share"), "measured": arm.measured_share}
        for arm in arms
    ]
    rows = [r for r in rows if r["predicted"] is not None and r["measured"] is not None]
    if len(rows) < 2:
        return None
    most = 1.05 * max(max(row["predicted"], row["measured"]) for row in rows)
    scale = alt.Scale(domain=[0, most], nice=False)
    param, shown = _hide()
    x = alt.X("predicted:Q", title="predicted time of an update, full fine-tuning = 1", scale=scale)
    y = alt.Y("measured:Q", title="measured", scale=scale)
    base = alt.Chart(_data(rows, "rows")).transform_filter(shown)
    ends = [{"predicted": 0, "measured": 0}, {"predicted": most, "measured": most}]
    chart = alt.layer(
        alt.Chart(_data(ends, "ends"))
        .mark_line(color=_var("line"), strokeDash=[4, 4], strokeWidth=2).encode(x=x, y=y),
        base.mark_point(filled=True, size=110, opacity=1)
        .encode(x=x, y=y, color=_colour(arms), shape=_shape(arms),
                tooltip=[alt.Tooltip("arm:N", title="strategy"),
                         alt.Tooltip("predicted:Q", format=".2f"),
                         alt.Tooltip("measured:Q", format=".2f")])
        .properties(name=_POINTS),
        base.mark_text(dy=-12, fontSize=_LABEL_PX, limit=_LABEL_LIMIT_PX, color=_var("ink"))
        .encode(x=x, y=y, text="arm:N").properties(name=_LABELS),
    ).add_params(param)  # fmt: skip
    off = max(rows, key=lambda row: abs(row["measured"] - row["predicted"]))
    return Chart(
        name="saving",
        title="Predicted against measured saving",
        summary="On the dashed line prediction and measurement agree. Furthest from it: "
        f"{off['arm']}, predicted {off['predicted']:.2f}, measured {off['measured']:.2f}. "
        "Measured times include validation and what the policy itself costs.",
        spec=_spec(chart, height=300),
        columns=("strategy", "predicted", "measured"),
        rows=tuple((r["arm"], r["predicted"], r["measured"]) for r in rows),
    )


def _confusion(found: Mistakes | None) -> Chart | None:
    if found is None or not 2 <= len(found.classes) <= 40:
        return None
    totals = {c.label: c.samples for c in found.classes}
    rows = [
        {"label": c.label, "predicted": c.predicted, "samples": c.samples,
         "share": c.samples / totals[c.label] if c.label in totals else 0.0}
        for c in found.confusions
    ]  # fmt: skip
    names = sorted({name for row in rows for name in (row["label"], row["predicted"])})
    axis = alt.Axis(labelLimit=110, labelFontSize=11 if len(names) <= 25 else 9)
    chart = (
        alt.Chart(_data(rows, "rows"))
        .mark_rect(cornerRadius=1.5)
        .encode(
            x=alt.X("predicted:N", sort=names, title="predicted",
                    axis=alt.Axis(labelAngle=-40, labelLimit=110, labelOverlap="greedy")),
            y=alt.Y("label:N", sort=names, title="class", axis=axis),
            color=alt.condition(
                "datum.label == datum.predicted",
                alt.value(_var("frozen")), alt.value(_var("bad")),
            ),
            opacity=alt.Opacity("share:Q", legend=None,
                                scale=alt.Scale(domain=[0, 1], range=[0.12, 1])),
            tooltip=[alt.Tooltip("label:N", title="class"), alt.Tooltip("predicted:N"),
                     alt.Tooltip("samples:Q"),
                     alt.Tooltip("share:Q", format=".0%", title="of the class")],
        )
    )  # fmt: skip
    wrong = [row for row in rows if row["label"] != row["predicted"]]
    worst = f" Most often: {wrong[0]['label']} taken for {wrong[0]['predicted']}." if wrong else ""
    return Chart(
        name="confusion",
        title="What is taken for what",
        summary=f"{found.right} of {found.samples} test samples right ({found.run}).{worst}",
        spec=_spec(chart, height={"step": 22 if len(names) <= 25 else 14}),
        columns=("class", "predicted", "samples"),
        rows=tuple((row["label"], row["predicted"], row["samples"]) for row in rows),
    )
