"""From the log of `evidence.py` to tables, the cards in docs/policies and `evidence.json`.

Nothing here is typed by hand: every figure and every verdict follows from the logs by the rules
below, so that negative results stand. Pure Python.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specs import EXCUSED, SPECS

EPOCHS = 10
RESULTS = Path(__file__).resolve().parent / "results"
EVIDENCE = RESULTS / "evidence.jsonl"
OVERHEAD = RESULTS / "policy_overhead.json"
ROOT = RESULTS.parents[1]
CARDS = ROOT / "docs" / "policies"
PACKAGED = ROOT / "src" / "frostline" / "policies" / "evidence.json"

Row = Mapping[str, Any]
#: Mean, low and high end of an interval; ends are None where one seed gives none.
Interval = tuple[float, float | None, float | None]

#: 97.5 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


# -- the log ----------------------------------------------------------------------------------


def key(row: Row) -> str:
    """What a run is of: equal for equal jobs."""
    return "|".join(str(row[name]) for name in ("arm", "spec", "seed", "epochs", "budget"))


def prefix_spec(count: int) -> str:
    """The policy that freezes the shallowest groups throughout."""
    return f"first:groups={count}"


class Log:
    """Finished runs, one per line; a line that was cut off by a crash counts as not run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.costs: Row | None = None
        text = path.read_text("utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, "utf-8")
        for line in text.splitlines():
            self._take(json.loads(line))

    def append(self, row: Row) -> None:
        """Add a run, at once."""
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._take(row)

    def keys(self) -> set[str]:
        """Of all runs."""
        return {key(row) for row in self.rows}

    def _take(self, row: Row) -> None:
        if row["arm"] == "costs":
            self.costs = row
        else:
            self.rows.append(row)


# -- arithmetic -------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of the mean: mean -+ t s / sqrt(n)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def at_budget(points: Mapping[float, float], share: float) -> float:
    """Accuracy at a share of compute, linear between the measured shares, constant outside."""
    known = sorted(points)
    if share <= known[0]:
        return points[known[0]]
    for low, high in itertools.pairwise(known):
        if share <= high:
            weight = (share - low) / (high - low)
            return points[low] * (1 - weight) + points[high] * weight
    return points[known[-1]]


def nearest(points: Iterable[float], share: float) -> float:
    """The measured share nearest to another; of two, the larger."""
    return min(points, key=lambda p: (abs(p - share), -p))


def share_of(row: Row) -> float:
    """Compute of a run over full fine-tuning's: its steps and what its policy took."""
    return row["step_share"] + row["overhead_share"]


@dataclass(slots=True)
class Comparison:
    """One policy against everything, by seed.

    Attributes:
        name: of the policy.
        spec: with its options.
        seeds: which of them all arms were run with.
        accuracy: on the test split, by seed, in [0, 1].
        share: compute over full fine-tuning's, by seed.
        steps_s: processor seconds of the steps over full fine-tuning's, as measured, by seed.
        frozen: mean share of groups of which nothing trained, by seed.
        controls: accuracy by seed of "full", "time_matched", "prefix" and perhaps "placebo".
        control_share: compute of those.
        prefixes: groups frozen in the prefix of equal compute, by seed.
        same_as_placebo: whether every run of the placebo went exactly like the policy's.
    """

    name: str
    spec: str
    seeds: list[int]
    accuracy: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)
    controls: dict[str, list[float]] = field(default_factory=dict)
    control_share: dict[str, list[float]] = field(default_factory=dict)
    prefixes: list[int] = field(default_factory=list)
    same_as_placebo: bool = False

    def against(self, control: str) -> Interval | None:
        """Difference in test accuracy, paired by seed."""
        if control not in self.controls:
            return None
        pairs = zip(self.accuracy, self.controls[control], strict=True)
        return interval([mine - other for mine, other in pairs])


def compare(name: str, spec: str, rows: Iterable[Row], epochs: int) -> Comparison | None:
    """Put one policy beside its controls; None if it or they were not run."""
    by_seed: dict[int, dict[str, list[Row]]] = {}
    for row in rows:
        if row["epochs"] == epochs and (
            row["arm"] not in ("policy", "placebo") or row["spec"] == spec
        ):
            by_seed.setdefault(row["seed"], {}).setdefault(row["arm"], []).append(row)
    mine = "full" if spec == "full" else "policy"
    complete = {
        seed: arms
        for seed, arms in sorted(by_seed.items())
        if {mine, "full", "prefix", "budget"} <= arms.keys()
    }
    if not complete:
        return None
    found = Comparison(name, spec, list(complete))
    with_placebo = all("placebo" in arms for arms in complete.values())
    alike = []
    for arms in complete.values():
        own, full = arms[mine][0], arms["full"][0]
        share = share_of(own)
        found.accuracy.append(own["test_accuracy"])
        found.share.append(share)
        found.steps_s.append(own["steps_s"] / full["steps_s"])
        found.frozen.append(own["frozen_share"])
        budgets = {share_of(r): r["test_accuracy"] for r in (*arms["budget"], full)}
        prefixes = {share_of(r): r for r in (*arms["prefix"], full)}
        prefix = prefixes[nearest(prefixes, share)]
        found.prefixes.append(_groups_frozen(prefix["spec"]))
        _put(found, "prefix", prefix["test_accuracy"], share_of(prefix))
        held = min(max(share, min(budgets)), max(budgets))
        _put(found, "time_matched", at_budget(budgets, share), held)
        _put(found, "full", full["test_accuracy"], share_of(full))
        if with_placebo:
            placebo = arms["placebo"][0]
            _put(found, "placebo", placebo["test_accuracy"], share_of(placebo))
            alike.append(all(own[n] == placebo[n] for n in ("val_accuracy", "step_share")))
    found.same_as_placebo = with_placebo and all(alike)
    return found


def _put(found: Comparison, control: str, accuracy: float, share: float) -> None:
    found.controls.setdefault(control, []).append(accuracy)
    found.control_share.setdefault(control, []).append(share)


def _groups_frozen(spec: str) -> int:
    match = re.fullmatch(r"first:groups=(\d+)", spec)
    return int(match[1]) if match else 0


# -- verdicts ---------------------------------------------------------------------------------

_NAMES = {
    "prefix": "a static prefix of equal compute",
    "time_matched": "full fine-tuning cut to its compute",
    "placebo": "its placebo",
}


def judged(found: Interval) -> str:
    """Whether an interval lies above 0, below it, or across it."""
    _, low, high = found
    if low is not None and low > 0:
        return "above"
    if high is not None and high < 0:
        return "below"
    return "open"


def verdict(of: Comparison) -> str:
    """One sentence, by rule: what the intervals exclude is claimed, nothing else."""
    if of.spec == "full":
        return "The baseline of these comparisons."
    if len(of.seeds) < 2:
        return "One seed only: no verdict."
    full = of.against("full")
    assert full is not None
    against_full = {
        "above": f"{_points(full[0])} points above full fine-tuning",
        "below": f"{_points(-full[0])} points below full fine-tuning",
        "open": f"Within seed noise of full fine-tuning ({100 * full[0]:+.1f} points)",
    }[judged(full)]
    parts = [f"{against_full} at {statistics.fmean(of.share):.0%} of its compute"]
    words = {"above": "better than", "open": "not shown better than", "below": "worse than"}
    judgements = {name: judged(d) for name, d in _told(of).items()}
    for kind, word in words.items():
        if same := [name for name, found in judgements.items() if found == kind]:
            parts.append(f"{word} {_listed(same)}")
    if of.same_as_placebo:
        parts.append("its placebo trains exactly alike, so its signals decided nothing")
    return "; ".join(parts) + "."


def _told(of: Comparison) -> dict[str, Interval]:
    """The differences that a verdict speaks of, by what they are to."""
    saves = any(of.prefixes)  # else the controls of equal compute are full fine-tuning itself
    told = {"prefix": saves, "time_matched": saves, "placebo": not of.same_as_placebo}
    found = {name: of.against(control) for control, name in _NAMES.items() if told[control]}
    return {name: difference for name, difference in found.items() if difference is not None}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f}"


# -- output -----------------------------------------------------------------------------------


def setting(seeds: Sequence[int], epochs: int) -> str:
    """The experiment in one sentence."""
    return (
        "ResNet-20 pretrained on CIFAR-10, fine-tuned on caltech20 (20 classes, 800 pictures of "
        f"32 pixels) for {epochs} epochs with the defaults of `frostline fit`, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, tested on 560 pictures; "
        "no learning rate was searched for any arm"
    )


def packaged(found: Sequence[Comparison], epochs: int, overhead: Row | None) -> dict[str, Any]:
    """What the library carries along."""
    seeds = found[0].seeds if found else []
    policies: dict[str, Any] = {}
    for one in found:
        entry: dict[str, Any] = {
            "spec": one.spec,
            "accuracy": _rounded(one.accuracy),
            "full": _rounded(one.controls["full"]),
            "compute_share": round(statistics.fmean(one.share), 4),
            "frozen_share": round(statistics.fmean(one.frozen), 4),
        }
        for control in ("full", "prefix", "time_matched", "placebo"):
            difference = one.against(control)
            entry[f"vs_{control}"] = None if difference is None else _rounded(difference)
        policies[one.name] = entry | {"verdict": verdict(one)}
    for name, percent in overheads(overhead).items():
        policies.setdefault(name, {})["overhead"] = percent
    return {"setting": setting(seeds, epochs) if found else "", "date": None, "policies": policies}


def overheads(log: Row | None) -> dict[str, dict[str, float]]:
    """Percent of a full step by policy and model, from the log of `policy_overhead.py`."""
    found: dict[str, dict[str, float]] = {}
    for row in (log or {"results": ()})["results"]:
        found.setdefault(row["policy"], {})[row["model"]] = round(100 * row["overhead"], 2)
    return found


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if v is None else round(v, 4) for v in values]


def card(of: Comparison, epochs: int, overhead: Mapping[str, float] | None) -> str:
    """The evidence of one policy, for its page."""
    rows = [("policy", f"`{of.spec}`", of.accuracy, of.share)]
    frozen = _span(of.prefixes)
    labels = {
        "placebo": "its placebo",
        "prefix": f"static prefix of {frozen} groups" if frozen != "0" else "full fine-tuning",
        "time_matched": "full fine-tuning, cut to equal compute",
        "full": "full fine-tuning",
    }
    for control, label in labels.items():
        if control in of.controls and (control, frozen) != ("prefix", "0"):
            rows.append((control, label, of.controls[control], of.control_share[control]))
    lines = [
        f"{setting(of.seeds, epochs)}:",
        "",
        "| | compute | test accuracy, % (by seed) | policy minus this, points (95 % interval) |",
        "|---|---|---|---|",
    ]
    for control, label, accuracy, share in rows:
        difference = "" if control == "policy" else _shown(of.against(control))
        lines.append(
            f"| {label} | {statistics.fmean(share):.0%} | {_accuracies(accuracy)} | {difference} |"
        )
    if of.spec == "full":
        del lines[5:]
    lines += ["", verdict(of) + _CAUTION * (len(of.seeds) > 1 and of.spec != "full")]
    if overhead:
        lines += ["", _overhead_line(overhead)]
    lines += ["", "Made by `python benchmarks/evidence.py --report`."]
    return "\n".join(lines)


_CAUTION = (
    " Intervals from so few seeds are wide: what lies across zero is open, not equal; and of the "
    "many intervals over all policies about one in twenty excludes zero by chance."
)


def _overhead_line(overhead: Mapping[str, float]) -> str:
    names = {"resnet20": "200 steps of ResNet-20", "bert": "40 steps of BERT 6x384"}
    shown = ", ".join(
        f"{overhead[m]:.1f} % in {name}" for m, name in names.items() if m in overhead
    )
    return f"Its own cost at default settings, of full training: {shown}."


def _shown(difference: Interval | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (None if v is None else 100 * v for v in difference)
    ends = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"
    return f"{mean:+.1f}{ends}"


def _accuracies(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ({', '.join(f'{100 * v:.1f}' for v in values)})"


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def table(found: Sequence[Comparison], log: Log, epochs: int) -> str:
    """All policies in one table, then the controls."""
    machine = log.costs["machine"] if log.costs else {}
    about = (
        f"{setting(found[0].seeds if found else [], epochs)}. Compute: predicted step times over "
        "full fine-tuning's, from measured group costs, plus what the policy itself took; "
        "'measured' is the processor time of the steps alone, as a check. Full fine-tuning cut to "
        "equal compute is interpolated between runs of 10, 20, ... 100 % of the steps, each with "
        "its own compressed schedule. Differences are in points of test accuracy, paired by seed, "
        "with mean -+ t s / sqrt(n): wide for so few seeds, so what lies across zero is open; of "
        "all these intervals about one in twenty excludes zero by chance. The weights of the best "
        "validation epoch are tested. "
        f"torch {machine.get('torch')}, {machine.get('threads')} thread per run, "
        f"{machine.get('processors')} processors ({machine.get('processor')}). "
        "Made by `python benchmarks/evidence.py --report` from `evidence.jsonl`."
    )
    head = (
        "| policy | compute | measured | groups frozen | test accuracy, % (by seed) "
        "| against full | against prefix (groups) | against full, equal compute "
        "| against placebo |\n|---|---|---|---|---|---|---|---|---|"
    )
    title = "# What freezing rules are worth: policies against placebos and simple controls"
    lines = [title, "", about, "", head, *map(_row, found), "", "## Verdicts", ""]
    lines += [f"- **{one.name}**: {verdict(one)}" for one in found]
    lines += [f"- **{name}**: not measured: {why}." for name, why in sorted(EXCUSED.items())]
    lines += ["", "## Controls", "", "| | compute | measured | test accuracy, % (by seed) |"]
    lines += ["|---|---|---|---|", *_controls(log.rows, epochs)]
    return "\n".join(lines) + "\n"


def _row(one: Comparison) -> str:
    return (
        f"| `{one.spec.replace('|', chr(92) + '|')}` | {statistics.fmean(one.share):.0%} "
        f"| {statistics.fmean(one.steps_s):.0%} | {statistics.fmean(one.frozen):.0%} "
        f"| {_accuracies(one.accuracy)} | {_shown(one.against('full'))} "
        f"| {_shown(one.against('prefix'))} ({_span(one.prefixes)}) "
        f"| {_shown(one.against('time_matched'))} | {_shown(one.against('placebo'))} |"
    )


def _controls(rows: Iterable[Row], epochs: int) -> list[str]:
    arms: dict[tuple[str, str, int], list[Row]] = {}
    full = {r["seed"]: r["steps_s"] for r in rows if r["arm"] == "full" and r["epochs"] == epochs}
    for row in rows:
        if row["arm"] in ("full", "prefix", "budget") and row["epochs"] == epochs:
            arms.setdefault((row["arm"], row["spec"], row["budget"]), []).append(row)
    lines = []
    ordered = sorted(arms.items(), key=lambda a: (a[0][0], -share_of(a[1][0])))
    for (arm, spec, budget), runs in ordered:
        runs.sort(key=lambda r: r["seed"])
        label = f"full, {budget} % of the steps" if arm == "budget" else f"`{spec}`"
        speed = statistics.fmean(r["steps_s"] / full[r["seed"]] for r in runs if r["seed"] in full)
        share = statistics.fmean(map(share_of, runs))
        accuracy = _accuracies([r["test_accuracy"] for r in runs])
        lines.append(f"| {label} | {share:.0%} | {speed:.0%} | {accuracy} |")
    return lines


def filled(page: str, name: str, marker: str, content: str) -> str:
    """A page with the text between its two markers replaced.

    Raises:
        SystemExit: the page lacks the markers.
    """
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{name} lacks the lines {start} and {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def write(path: Path = EVIDENCE, epochs: int = EPOCHS) -> None:
    """Tables, cards and the packaged file, from the logs."""
    log = Log(path)
    overhead = json.loads(OVERHEAD.read_text("utf-8")) if OVERHEAD.exists() else None
    compared = (compare(name, spec, log.rows, epochs) for name, spec in SPECS.items())
    found = [one for one in compared if one is not None]
    spent, by_name = overheads(overhead), {one.name: one for one in found}
    pages = {name: CARDS / f"{name}.md" for name in sorted({*SPECS, *EXCUSED})}
    if absent := [page.name for page in pages.values() if not page.exists()]:
        raise SystemExit(f"no page in docs/policies: {', '.join(absent)}")
    texts = {}
    for name, page in pages.items():
        if name in by_name:
            content = card(by_name[name], epochs, spent.get(name))
        else:
            content = f"Not measured: {EXCUSED.get(name, 'no complete run yet')}."
            if name in spent:
                content += f"\n\n{_overhead_line(spent[name])}"
        texts[page] = filled(page.read_text("utf-8"), page.name, "evidence", content)
    for page, text in texts.items():
        page.write_text(text, "utf-8")
    if found:
        (RESULTS / "evidence.md").write_text(table(found, log, epochs), "utf-8")
    PACKAGED.write_text(json.dumps(packaged(found, epochs, overhead), indent=1) + "\n", "utf-8")
    print(f"{len(found)} of {len(SPECS)} policies in {len(log.rows)} runs")
