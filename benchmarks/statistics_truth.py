"""Do the statistics of a study keep their promise with few seeds? Checked on planted truth.

Pretend scores of arms whose true difference is known: how often the 95 % intervals hold it, how
often one of several equal arms is called better or worse, how often true gaps are found, and how
often "not worse" is said at a true loss of just the margin. No training; two minutes on one core.

    python benchmarks/statistics_truth.py [--studies 2000]
    python benchmarks/statistics_truth.py --report      # the page again from the log

Writes `results/statistics_truth.json` and `results/statistics_truth.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, get_args

import numpy as np
from evidence_report import RESULTS
from numpy.typing import NDArray
from scipy import special, stats

from frostline.study.statistics import (
    Method,
    Reference,
    contrasts,
    intervals,
    paired_samples,
    simultaneous,
)

Floats = NDArray[np.float64]
Row = dict[str, Any]
LEVEL, SAMPLES = 0.95, 250
SEEDS = (2, 3, 5, 10)
SEVERAL = (3, 5, 10)
ARMS = (2, 4, 8, 24)
GAPS = (1.0, 2.0, 3.0)
PATH = RESULTS / "statistics_truth.json"
METHODS: tuple[Method, ...] = get_args(Method)


# -- planted truth ----------------------------------------------------------------------------


def accuracies(source: np.random.Generator, shape: tuple[int, ...], loss: float = 0.0) -> Floats:
    """Shares of 250 samples that are right, shape (studies, arms, seeds).

    About 75 %; a good or bad seed is so for all arms. All arms but the first lose `loss`.
    """
    studies, _, seeds = shape
    common = 0.3 * source.standard_normal((studies, 1, seeds))
    right = special.expit(1.1 + common + 0.1 * source.standard_normal(shape))
    right[:, 1:] = np.maximum(right[:, 1:] - loss, 0)
    return source.binomial(SAMPLES, right) / SAMPLES


def skewed(source: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Exponential, long to the right in the first arm and to the left in all others; mean 0."""
    found = source.exponential(1, shape) - 1
    found[:, 1:] *= -1
    return found


def noisier(
    source: np.random.Generator, shape: tuple[int, ...], arm: int | slice, times: float = 3.0
) -> Floats:
    """Normal, of another spread in one arm or some."""
    found = source.standard_normal(shape)
    found[:, arm] *= times
    return found


Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]
#: Scores of equal arms, shape (studies, arms, seeds): true differences are 0.
EQUAL: Mapping[str, Draw] = {
    "normal": lambda source, shape: source.standard_normal(shape),
    "skewed": skewed,
    "heavy-tailed": lambda source, shape: source.standard_t(3, shape),
    "accuracies": accuracies,
    "one arm x 3": partial(noisier, arm=1),
    "control x 3": partial(noisier, arm=0),
    "control / 3": lambda source, shape: noisier(source, shape, arm=0, times=1 / 3),
    "half x 2": lambda source, shape: noisier(
        source, shape, arm=slice(shape[1] // 2, None), times=2
    ),
}


def one_sided(source: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Two arms, the second's exponential and the first's 0: differences skewed as they come."""
    found = np.zeros(shape)
    found[:, 1] = source.exponential(1, (shape[0], shape[2])) - 1
    return found


def rare_losses(source: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """The same with the long side towards losses."""
    return -one_sided(source, shape)


#: Of two arms, for single comparisons.
PAIRS: Mapping[str, Draw] = {
    "normal": EQUAL["normal"],
    "skewed": one_sided,
    "heavy-tailed": EQUAL["heavy-tailed"],
    "accuracies": accuracies,
}


def differences(draw: Draw, source: np.random.Generator, studies: int, seeds: int) -> Floats:
    """Second arm - first, shape (studies, seeds)."""
    found = draw(source, (studies, 2, seeds))
    return found[:, 1] - found[:, 0]


# -- (a) do intervals hold the truth? ---------------------------------------------------------


def holds(low: Floats, high: Floats, truth: float) -> Floats:
    """Whether the interval holds the truth, but for rounding; NaN where there is none."""
    inside = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
    return np.where(np.isnan(low), np.nan, inside)


def share(values: Floats) -> float | None:
    """Mean of what is known; None of nothing."""
    known = values[~np.isnan(values)]
    return round(float(known.mean()), 4) if len(known) else None


def coverage(studies: int) -> Iterator[Row]:
    """Every method, kind of noise and number of seeds."""
    for kind, seeds in itertools.product(PAIRS, SEEDS):
        source = np.random.default_rng([1, seeds])
        values = differences(PAIRS[kind], source, studies, seeds)
        width = 0.0
        for method in METHODS:
            low, high = intervals(values, level=LEVEL, method=method, resamples=999)
            if method == "t":
                width = float(np.nanmedian(high - low))
            some = ~np.isnan(low)
            wide = float(np.median((high - low)[some])) / width if some.any() else None
            yield {
                "part": "coverage",
                "noise": kind,
                "seeds": seeds,
                "method": method,
                "holds": share(holds(low, high, 0.0)),
                "no_interval": round(1 - float(some.mean()), 4),
                "width": wide,
            }


#: Spread of latent scores by seed, by arm and sample, and by run and sample.
WORLDS: Mapping[str, tuple[float, float, float]] = {
    "samples matter most": (0.05, 0.6, 0.3),
    "seeds matter most": (0.2, 0.2, 0.3),
    "neither": (0.0, 0.0, 0.5),
}


def outcomes(
    source: np.random.Generator, world: tuple[float, float, float], seeds: int
) -> tuple[Floats, Floats, float]:
    """Right or wrong by seed and sample of arm and control, and the true difference.

    Right where a latent normal score is above 0; samples differ in how hard they are.
    """
    by_seed, by_sample, rest = world
    hard = source.standard_normal(SAMPLES)
    tables, truth = [], []
    for mean in (1.2, 1.0):
        table = mean + hard + by_sample * source.standard_normal(SAMPLES)
        table = table + by_seed * source.standard_normal((seeds, 1))
        tables.append(table + rest * source.standard_normal((seeds, SAMPLES)) > 0)
        spread = math.sqrt(1 + by_seed**2 + by_sample**2 + rest**2)
        truth.append(float(stats.norm.cdf(mean / spread)))
    return tables[0], tables[1], truth[0] - truth[1]


def crossed(studies: int) -> Iterator[Row]:
    """Intervals for further seeds and samples, and what those for seeds alone are worth there."""
    for world, seeds in itertools.product(WORLDS, SEVERAL):
        source = np.random.default_rng([2, seeds])
        found: dict[str, list[Floats]] = {"seeds alone": [], "components": [], "crossed": []}
        for _ in range(studies):
            arm, control, truth = outcomes(source, WORLDS[world], seeds)
            by_seed = arm.mean(axis=1) - control.mean(axis=1)
            low, high = intervals(by_seed, level=LEVEL)
            found["seeds alone"].append(holds(low, high, truth))
            for method in ("components", "crossed"):
                one = paired_samples(arm, control, level=LEVEL, method=method, resamples=399)
                low, high = (np.array(np.nan if e is None else e) for e in (one.low, one.high))
                found[method].append(holds(low, high, truth))
        for method, held in found.items():
            row = {"part": "samples", "noise": world, "seeds": seeds, "method": method}
            yield row | {"holds": share(np.array(held))}


# -- (b) false winners and true gaps ----------------------------------------------------------


def holm(p: Floats) -> Floats:
    """p-values adjusted by Holm's step-down, along the last axis."""
    order, count = np.argsort(p, axis=-1), p.shape[-1]
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(count, 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(steps, axis=-1), 1)
    found = np.empty_like(p)
    np.put_along_axis(found, order, adjusted, axis=-1)
    return found


def paired_p(scores: Floats) -> Floats:
    """p-values of paired t tests with the first arm, shape (studies, arms - 1)."""
    difference, error = contrasts(scores, spread="own")
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(difference / error)[:, 1:]
    return np.where(np.isnan(t), 1.0, 2 * stats.t.sf(t, scores.shape[-1] - 1))


def flips_p(scores: Floats) -> Floats:
    """Adjusted p-values by flipping the signs of seeds in all ways: exact, max-t."""
    return np.concatenate([_flipped(part) for part in np.array_split(scores, 20)])


def _flipped(scores: Floats) -> Floats:
    seeds = scores.shape[-1]
    values = scores[:, 1:] - scores[:, :1]
    signs = np.array(list(itertools.product((1, -1), repeat=seeds - 1)))
    signs = np.insert(signs, 0, 1, axis=1)  # the other half mirrors these
    means = values @ signs.T / seeds  # (studies, arms - 1, ways)
    square = np.square(values).mean(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(means) / np.sqrt(np.maximum(square - means**2, 0))
    t = np.nan_to_num(t, nan=0.0)
    return np.mean(t.max(axis=1, keepdims=True) >= t[..., :1] - 1e-9, axis=-1)


def max_t_p(scores: Floats, spread: Any, against: Reference = "control") -> Floats:
    """Adjusted p-values as the library gives them; 1 for the reference and without spread."""
    p = simultaneous(scores, against=against, spread=spread, level=LEVEL)[3]
    return np.nan_to_num(p[:, 1:] if against == "control" else p, nan=1.0)


#: Adjusted p-values, shape (studies, arms - 1), of each arm against the first.
RULES: Mapping[str, Callable[[Floats], Floats]] = {
    "shared": partial(max_t_p, spread="shared"),
    "own": partial(max_t_p, spread="own"),
    "holm": lambda scores: holm(paired_p(scores)),
    "flips": flips_p,
    "unadjusted": paired_p,
}


def found_any(p: Floats) -> float:
    """Share of studies with a finding."""
    return round(float((p <= 1 - LEVEL).any(axis=-1).mean()), 4)


def false_findings(studies: int) -> Iterator[Row]:
    """How often something is found among equal arms."""
    # Kinds innermost: the library keeps the bound of one size of study for the next.
    for arms, seeds, kind in itertools.product(ARMS, SEVERAL, EQUAL):
        scores = EQUAL[kind](np.random.default_rng([3, arms, seeds]), (studies, arms, seeds))
        row = {"part": "false", "noise": kind, "arms": arms, "seeds": seeds}
        row |= {rule: found_any(p(scores)) for rule, p in RULES.items()}
        for spread in ("shared", "own"):
            row[f"winner_{spread}"] = found_any(max_t_p(scores, spread, "best"))
        yield row | {"winner_apart": _half_behind(scores)}


def _half_behind(scores: Floats) -> float | None:
    """Half of the arms far behind: how often an arm that is not is told from the best."""
    if (ahead := scores.shape[1] // 2) < 2:
        return None
    moved = scores.copy()
    moved[:, ahead:] -= 10 * scores.std()
    return found_any(max_t_p(moved, "shared", "best")[:, :ahead])


def power(studies: int) -> Iterator[Row]:
    """How often one arm that is better is found, among arms with normal noise of spread 1."""
    for arms, seeds, gap in itertools.product(ARMS, SEVERAL, GAPS):
        source = np.random.default_rng([4, arms, seeds])
        scores = source.standard_normal((studies, arms, seeds))
        scores[:, 1] += gap
        row = {"part": "power", "gap": gap, "arms": arms, "seeds": seeds}
        for rule, p in RULES.items():
            row[rule] = round(float((p(scores)[:, 0] <= 1 - LEVEL).mean()), 4)
        told = max_t_p(scores, "shared", "best") <= 1 - LEVEL
        others = [i for i in range(arms) if i != 1]
        row["winner"] = round(float(told[:, others].all(axis=1).mean()), 4)
        yield row


# -- (c) "not worse" at the margin ------------------------------------------------------------


def at_margin(studies: int) -> Iterator[Row]:
    """How often a loss of just the margin is called "not worse" or better."""
    draws = {**PAIRS, "skewed, rare losses": rare_losses}
    for kind, seeds in itertools.product(draws, SEVERAL):
        source = np.random.default_rng([5, seeds])
        margin = 0.05 if kind == "accuracies" else 1.0
        draw = partial(accuracies, loss=margin) if kind == "accuracies" else draws[kind]
        values = differences(draw, source, studies, seeds)
        values = values - (0 if kind == "accuracies" else margin)
        row: Row = {"part": "margin", "noise": kind, "seeds": seeds}
        for method in METHODS:
            low, high = intervals(values, level=LEVEL, method=method, resamples=999)
            row[method] = round(float((low > -margin).mean()), 4)
            if method == "t":
                row["no_loss_shown"] = round(float(((low <= 0) & (high >= 0)).mean()), 4)
        yield row | {"several": _several_at_margin(kind, source, studies, seeds)}


def _several_at_margin(kind: str, source: np.random.Generator, studies: int, seeds: int) -> float:
    """Seven arms at the margin: how often one or more are called "not worse"."""
    shape = (studies, 8, seeds)
    if kind == "accuracies":
        margin, scores = 0.05, accuracies(source, shape, loss=0.05)
    else:
        margin, rare = 1.0, kind == "skewed, rare losses"
        scores = EQUAL["skewed" if rare else kind](source, shape)
        scores *= -1 if kind == "skewed" else 1  # the arms' long side is towards gains
        scores[:, 1:] -= margin
    _, low, _, _ = simultaneous(scores, level=LEVEL)
    return round(float((low[:, 1:] > -margin).any(axis=1).mean()), 4)


def harmless(studies: int) -> Iterator[Row]:
    """How often an arm that loses nothing is called "not worse" or better, by margin."""
    for margin, seeds in itertools.product((1.0, 2.0, 3.0), SEVERAL):
        source = np.random.default_rng([6, seeds])
        low, _ = intervals(differences(PAIRS["normal"], source, studies, seeds), level=LEVEL)
        several = simultaneous(source.standard_normal((studies, 8, seeds)), level=LEVEL)[1]
        yield {
            "part": "harmless",
            "margin": margin,
            "seeds": seeds,
            "one": round(float((low > -margin).mean()), 4),
            "of_seven": round(float((several[:, 1] > -margin).mean()), 4),
        }


# -- output -----------------------------------------------------------------------------------


def page(log: Mapping[str, Any]) -> str:
    """The page from the log."""
    rows: list[Row] = log["results"]
    parts = {name: [r for r in rows if r["part"] == name] for name in {r["part"] for r in rows}}
    false, coverage_ = parts["false"], parts["coverage"]
    worst = max(false, key=lambda r: r["shared"])
    lines = [
        "# Do the statistics of a study keep their promise?",
        "",
        "Made by `benchmarks/statistics_truth.py` from `statistics_truth.json`. Each figure is of",
        f"{log['studies']:,} pretend studies ({log['crossed_studies']:,} for seeds and samples):",
        f"those near 5 % are right to about {_error(0.05, log['studies'])}. All levels are 95 %.",
        "",
        "## Intervals of one difference: how many hold the truth",
        "",
        "In brackets the median width over that of t; - where the method gives no interval. The",
        f"bootstraps draw 999 times here. Accuracies are of {SAMPLES} samples, about 75 %; skewed",
        "differences are exponential; heavy-tailed scores are t with 3 degrees of freedom.",
        "",
        *_table(
            ["noise", "method", *(f"{n} seeds" for n in SEEDS)],
            (
                [kind, method, *(_held(_row(coverage_, noise=kind, method=method, seeds=n))
                                 for n in SEEDS)]
                for kind, method in itertools.product(PAIRS, METHODS)
            ),
        ),
        "",
        *_chosen(coverage_),
        "",
        "## Seeds and test samples: how many intervals hold the truth about further samples",
        "",
        *_table(
            ["what varies", "method", *(f"{n} seeds" for n in SEVERAL)],
            (
                [world, method, *(_percent(_row(parts["samples"], noise=world, method=method,
                                                seeds=n)["holds"]) for n in SEVERAL)]
                for world, method in itertools.product(
                    WORLDS, ("seeds alone", "components", "crossed")
                )
            ),
        ),
        "",
        '"Seeds alone" is `paired`: it takes the test set as given, and does not claim this.',
        "",
        "## Equal arms: studies in which one or more are called better or worse than the control",
        "",
        "The declared rate is 5 %. Shared and own: max-t with that spread, by the largest bound of",
        "four kinds of normal noise (see `simultaneous`); skewed is long to the right in the",
        "control and to the left in all others, which no such bound covers. Holm: paired t tests,",
        "stepped down. Flips: signs of seeds flipped in all ways, max-t. Seeds in columns as",
        f"{' / '.join(map(str, SEVERAL))}.",
        "",
        *_false_table(false, ("shared", "own", "holm", "flips", "unadjusted")),
        "",
        f"Worst with shared spread: {_percent(worst['shared'])} ({worst['noise']},",
        f"{worst['arms']} arms, {worst['seeds']} seeds).",
        "",
        "## Equal arms: studies in which one or more are said to be behind the best",
        "",
        "Last column: half of all arms are far behind, and one of the others is said to be, too.",
        "",
        *_false_table(false, ("winner_shared", "winner_own", "winner_apart")),
        "",
        "## Power: studies in which the one better arm is found",
        "",
        "Gap in standard deviations of one arm's scores by seed. Winner: it is named the best and",
        f"all others are behind. Seeds in columns as {' / '.join(map(str, SEVERAL))}.",
        "",
        *_power_table(parts["power"]),
        "",
        '## "Not worse" where the true loss is just the margin',
        "",
        'At most 2.5 % may be called "not worse" or better; of seven arms together, 5 %. What is',
        'often done instead, to say "not worse" where no loss is significant, is in the last',
        "column.",
        "",
        *_table(
            ["noise", "seeds", *METHODS, "one or more of 7, shared", "no significant loss"],
            (
                [r["noise"], r["seeds"], *(_percent(r[m]) for m in METHODS),
                 _percent(r["several"]), _percent(r["no_loss_shown"])]
                for r in parts["margin"]
            ),
        ),
        "",
        '## "Not worse" where nothing is lost',
        "",
        "Margin in standard deviations of one arm's scores by seed; normal noise.",
        "",
        *_table(
            ["margin", "seeds", "one arm, t", "an arm among 7, shared"],
            (
                [f"{r['margin']:g}", r["seeds"], _percent(r["one"]), _percent(r["of_seven"])]
                for r in parts["harmless"]
            ),
        ),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _chosen(rows: list[Row]) -> list[str]:
    """What the first table says, from its figures."""
    few = [r for r in rows if r["seeds"] <= 5]
    said = []
    for method in METHODS:
        found = [r["holds"] for r in few if r["method"] == method and r["holds"] is not None]
        without = [r["seeds"] for r in few if r["method"] == method and r["no_interval"] > 0.5]
        none = f"; none with {' or '.join(str(n) for n in sorted(set(without)))}" if without else ""
        said.append(f"- {method}: {_percent(min(found))} to {_percent(max(found))}{none}")
    return ["With 5 seeds or fewer:", "", *said]


def _table(head: list[str], rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _row(rows: list[Row], **wanted: Any) -> Row:
    return next(r for r in rows if all(r[key] == value for key, value in wanted.items()))


def _held(row: Row) -> str:
    if row["holds"] is None or row["no_interval"] > 0.5:
        return "-"
    wide = "" if row["method"] == "t" else f" ({row['width']:.2f})"
    none = f", {_percent(row['no_interval'])} without" if row["no_interval"] > 0.001 else ""
    return _percent(row["holds"]) + wide + none


def _over_seeds(rows: list[Row], key: str, **wanted: Any) -> str:
    found = [_row(rows, seeds=n, **wanted)[key] for n in SEVERAL]
    return "-" if None in found else " / ".join(f"{100 * v:.1f}" for v in found)


def _false_table(rows: list[Row], rules: tuple[str, ...]) -> list[str]:
    return _table(
        ["noise", "arms", *(f"{rule.replace('_', ', ')}, %" for rule in rules)],
        (
            [kind, arms, *(_over_seeds(rows, rule, noise=kind, arms=arms) for rule in rules)]
            for kind, arms in itertools.product(EQUAL, ARMS)
        ),
    )


def _power_table(rows: list[Row]) -> list[str]:
    rules = ("shared", "own", "holm", "flips", "winner")
    return _table(
        ["gap", "arms", *(f"{rule}, %" for rule in rules)],
        (
            [f"{gap:g}", arms, *(_over_seeds(rows, rule, gap=gap, arms=arms) for rule in rules)]
            for gap, arms in itertools.product(GAPS, ARMS)
        ),
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _error(rate: float, studies: int) -> str:
    """Two standard errors of a rate."""
    return f"{200 * math.sqrt(rate * (1 - rate) / studies):.1f} points"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--report", action="store_true", help="no runs: the page from the log")
    options = parser.parse_args()
    if not options.report:
        start, few = time.perf_counter(), max(1, options.studies * 3 // 20)
        parts = [(coverage, options.studies), (crossed, few), (false_findings, options.studies),
                 (power, options.studies), (at_margin, options.studies),
                 (harmless, options.studies)]  # fmt: skip
        results: list[Row] = []
        for part, studies in parts:
            results += part(studies)
            print(f"{part.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
        head = f'"studies": {options.studies}, "crossed_studies": {few}'
        lines = ",\n".join(json.dumps(result) for result in results)
        PATH.write_text(f'{{{head}, "results": [\n{lines}\n]}}\n', "utf-8")
    PATH.with_suffix(".md").write_text(page(json.loads(PATH.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
