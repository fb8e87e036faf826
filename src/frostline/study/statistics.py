"""What a study may claim: arms run with the same seeds, compared by intervals and plain sentences.

An arm is one way to freeze, run with several seeds; the control is the arm that the others are
held against. Runs with one seed share the split, the order of samples and the head's first
weights, so the differences by seed say more than two separate means. Seeds are few, 3 to 10:
which rules keep their promise then was measured on planted truth, and the defaults were chosen
by that (`benchmarks/results/statistics_truth.md`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from frostline.errors import DataError, UsageError, few

__all__ = [
    "POINTS",
    "Goal",
    "Kind",
    "Method",
    "Paired",
    "Ratio",
    "Reference",
    "Scale",
    "Spread",
    "Verdict",
    "Winner",
    "compare_arms",
    "contrasts",
    "intervals",
    "paired",
    "paired_samples",
    "pareto_front",
    "ratio",
    "simultaneous",
    "time_to_target",
    "verdict",
    "winner",
]

Floats = NDArray[np.float64]
#: Whether more or less is better.
Goal = Literal["max", "min"]
#: How the interval of a mean is made; see `intervals`.
Method = Literal["t", "percentile", "bca", "studentized"]
#: Where the spread of a comparison among several comes from; see `contrasts`.
Spread = Literal["shared", "own"]
#: What all arms are compared with: the first of them, or the one with the largest mean.
Reference = Literal["control", "best"]
#: What a verdict can be.
Kind = Literal["better", "not worse", "worse", "undecided"]

_RESAMPLES, _DRAWS = 9999, 20_000
#: Numbers held at once while resampling: 32 MB.
_CHUNK = 4_000_000
#: Spread of a noisy arm over that of a steady one, which simultaneous bounds allow for. Of 59 arms
#: of a study of policies, two were three times as noisy as all on average.
_NOISIEST = 3.0
#: Differences that vary by less than this share of the scores are equal but for rounding.
_ROUNDING = 1e-12


# -- one arm against the control --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Paired:
    """An arm against a control, over the seeds that both were run with.

    Attributes:
        n: seeds that both have, >= 1.
        difference: mean of arm - control, in units of the score.
        low: lower end of the interval of that mean; None where there is no interval: one seed,
            the same difference with every seed, or too few seeds for the method.
        high: upper end.
        level: how often such intervals hold the truth, in (0, 1).
        p_value: of "no difference", two-sided, in (0, 1]: the interval of level 1 - p just touches
            zero. None where there is no interval.
        method: how the interval was made.
        unpaired: seeds that were left out, as not all arms have them.
        samples: test samples, where they were drawn from as well, else None.
        comparisons: how many comparisons interval and p-value hold for together.
    """

    n: int
    difference: float
    low: float | None
    high: float | None
    level: float
    p_value: float | None
    method: str
    unpaired: int = 0
    samples: int | None = None
    comparisons: int = 1


def paired(
    arm: Mapping[int, float],
    control: Mapping[int, float],
    *,
    level: float = 0.95,
    method: Method = "t",
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Paired:
    """The mean difference between two arms by seed, with an interval.

    It speaks of further seeds on this very test set; `paired_samples` speaks of further test
    samples, too.

    Args:
        arm: seed -> score; any unit, e.g. accuracies in [0, 1] or logarithms of seconds.
        control: the same of the control. Only seeds that both have count.
        level: of the interval, in (0, 1).
        method: see `intervals`, which says what was measured of each.
        resamples: of a bootstrap, >= 100; "t" needs none.
        seed: of a bootstrap.

    Raises:
        DataError: no seed is in both, or a score is not a finite number.
        UsageError: an option is out of range.

    Example:
        >>> found = paired({0: 0.73, 1: 0.75, 2: 0.74}, {0: 0.72, 1: 0.73, 2: 0.735, 3: 0.7})
        >>> found.n, found.unpaired, round(found.difference, 4)
        (3, 1, 0.0117)
        >>> round(found.low, 4), round(found.high, 4), round(found.p_value, 3)
        (-0.0073, 0.0306, 0.118)
    """
    scores, seeds = _table({"arm": arm, "control": control}, "compare two arms by seed")
    differences = _differences(scores)
    options: dict[str, Any] = {"method": method, "resamples": resamples, "seed": seed}
    low, high = (_end(e) for e in intervals(differences, level=level, **options))
    return Paired(
        n=len(seeds),
        difference=float(differences.mean()),
        low=low,
        high=high,
        level=level,
        p_value=None if low is None else _p_value(differences, options),
        method=method,
        unpaired=len(arm.keys() | control.keys()) - len(seeds),
    )


def intervals(
    differences: ArrayLike,
    *,
    level: float = 0.95,
    method: Method = "t",
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Intervals of the mean along the last axis, one for each row of differences.

    - "t": Student's. Of 95 % intervals, 94 to 97 % held the truth with 2 to 10 seeds where
      differences were normal, heavy-tailed or of accuracies of 250 samples, 88 to 90 % where they
      were exponential. The default: no other is right with 2 or 3 seeds.
    - "percentile": bootstrap quantiles of the mean. With 2 seeds 46 to 54 % held the truth, with
      3 70 to 77 %, with 5 79 to 84 %, with 10 85 to 90 %: far too narrow for few seeds.
    - "bca": the same, corrected for bias and skew; for so few seeds no better.
    - "studentized": bootstrap quantiles of the t statistic. With 5 and 10 seeds 93 to 95 % held
      the truth, also of exponential differences; with 5 it is 1.3 to 1.6 times as wide as "t",
      with 10 hardly wider. With 2 or 3 seeds it has no interval.

    Args:
        differences: shape (..., n), finite; n seeds.
        level: in (0, 1).
        method: one of the above.
        resamples: of a bootstrap, >= 100. All rows share them.
        seed: of a bootstrap.

    Returns:
        Lower and upper ends, shape (...), float64; NaN where there is no interval.

    Raises:
        DataError: a difference is not a finite number, or there is none.
        UsageError: an option is out of range.

    References:
        Student 1908, "The probable error of a mean", Biometrika 6(1). Efron 1987, "Better
        bootstrap confidence intervals", JASA 82(397). Efron & Tibshirani 1993, "An Introduction
        to the Bootstrap", chapters 12 to 14 (12.22: studentized).

    Example:
        >>> low, high = intervals([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([-0.484, nan], [4.484, nan])
    """
    _check_level(level)
    _check_choice("method", method, get_args(Method))
    if method != "t":
        _check_count("resamples", resamples, 100)
    rows = np.atleast_2d(_finite(differences, "give an interval of a mean"))
    found = np.full((2, *rows.shape[:-1]), np.nan)
    some = np.ptp(rows, axis=-1) > _ROUNDING * np.abs(rows).max(axis=-1)
    if some.any():
        found[:, some] = _bounds(rows[some], level, method, resamples, seed)
    found[:, ~np.isfinite(found).all(axis=0)] = np.nan
    shape = np.shape(differences)[:-1]
    return found[0].reshape(shape), found[1].reshape(shape)


def _bounds(
    rows: Floats, level: float, method: Method, resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """Ends for rows that have some spread, shape (rows, n), n >= 2."""
    n = rows.shape[-1]
    mean, error = rows.mean(axis=-1), stats.sem(rows, axis=-1)
    if method == "t":
        half = stats.t.ppf((1 + level) / 2, n - 1) * error
        return mean - half, mean + half
    source = np.random.default_rng(seed)
    if method == "studentized":
        low, high = _studentized(rows, level, source.integers(n, size=(resamples, n)))
        return mean - high * error, mean - low * error
    # scipy names the method in capitals; the type of its result is private.
    found: Any = stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _CHUNK // rows.size),
        axis=-1,
        confidence_level=level,
        method="BCa" if method == "bca" else method,
        rng=source,
    )
    return found.confidence_interval.low, found.confidence_interval.high


def _studentized(rows: Floats, level: float, chosen: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Quantiles of the t statistic of resamples, shape (rows,)."""
    n, tail = rows.shape[-1], (1 - level) / 2
    found = np.empty((2, len(rows)))
    for i, row in enumerate(rows):  # one by one: a chunk of resamples is large enough
        sample = row[chosen]
        shift = sample.mean(axis=-1) - row.mean()
        spread = sample.std(axis=-1, ddof=1) / math.sqrt(n)
        some = np.ptp(sample, axis=-1) > 0
        # A resample of one value over and over has no spread: its t is infinite, not absent.
        t = np.where(shift == 0, 0.0, np.copysign(np.inf, shift))
        t[some] = shift[some] / spread[some]
        found[0, i] = np.quantile(t, tail, method="lower")
        found[1, i] = np.quantile(t, 1 - tail, method="higher")
    return found[0], found[1]


def _p_value(differences: Floats, options: Mapping[str, Any]) -> float:
    """1 - the level at which the interval just touches zero."""
    if options["method"] == "t":
        t = abs(differences.mean()) / stats.sem(differences)
        return float(2 * stats.t.sf(t, len(differences) - 1))
    # The same resamples at every level, so that intervals are nested.
    least, most = 1 / (options["resamples"] + 1), 1.0
    for _ in range(14):  # to 1/16384
        middle = (least + most) / 2
        low, high = intervals(differences, level=1 - middle, **options)
        least, most = (least, middle) if (low > 0) | (high < 0) else (middle, most)
    return most


def paired_samples(
    arm_correct: ArrayLike,
    control_correct: ArrayLike,
    *,
    level: float = 0.95,
    method: Literal["components", "crossed"] = "components",
    resamples: int = 1999,
    seed: int = 0,
) -> Paired:
    """The difference in accuracy between two arms for further seeds and further test samples.

    `paired` takes the test set as given: its interval is of the mean over further seeds on these
    very samples. This one is of the accuracy on the population that the samples came from. Use it
    for claims about a task, the other for claims about a benchmark with its fixed test set.

    - "components": the variance of the mean is (MS_seeds + MS_samples - MS_rest) / (seeds x
      samples), from the two-way table of differences; Student's t with Satterthwaite's degrees
      of freedom, no fewer than seeds - 1. Of 95 % intervals 93 to 97 % held the truth with 3 to
      10 seeds, and nearly all where neither seeds nor samples mattered. The default.
    - "crossed": seeds and samples are both drawn again, and the ends are quantiles. Too narrow
      with 5 seeds or fewer where seeds mattered most: 88 % with 3, 90 % with 5.

    Args:
        arm_correct: shape (seeds, samples), 0 or 1 or bool: whether the run with this seed was
            right about this sample.
        control_correct: the same seeds and samples in the same order.
        level: of the interval, in (0, 1).
        method: one of the above.
        resamples: of "crossed", >= 100.
        seed: of "crossed".

    Raises:
        DataError: not two equal tables of 0 and 1, or fewer than two samples.
        UsageError: an option is out of range.

    References:
        Satterthwaite 1946, "An approximate distribution of estimates of variance components",
        Biometrics Bulletin 2(6). Owen 2007, "The pigeonhole bootstrap", Annals of Applied
        Statistics 1(2), which shows that crossed resampling overstates the variance.

    Example:
        >>> arm = [[1, 1, 1, 0, 1, 1, 1, 1]] * 4 + [[1, 1, 0, 1, 1, 1, 1, 1]]
        >>> control = [[1, 0, 1, 0, 1, 1, 0, 1]] * 4 + [[1, 0, 1, 0, 1, 1, 1, 0]]
        >>> found = paired_samples(arm, control)
        >>> found.n, found.samples, found.difference, round(found.low, 2), round(found.high, 2)
        (5, 8, 0.25, -0.13, 0.63)
    """
    _check_level(level)
    _check_choice("method", method, ("components", "crossed"))
    _check_count("resamples", resamples, 100)
    table = _outcomes(arm_correct) - _outcomes(control_correct, like=np.shape(arm_correct))
    seeds, samples = table.shape
    ends: tuple[float | None, float | None, float | None] = (None, None, None)
    if seeds > 1 and np.ptp(table) > 0:
        if method == "components":
            ends = _components(table, level)
        else:
            ends = _crossed(table, level, resamples, np.random.default_rng(seed))
    low, high, p_value = ends
    return Paired(
        n=seeds,
        difference=float(table.mean()),
        low=low,
        high=high,
        level=level,
        p_value=p_value,
        method=f"{method}, seeds and samples",
        samples=samples,
    )


def _components(table: Floats, level: float) -> tuple[float, float, float]:
    """Ends and p-value by the variance of a mean over two random factors."""
    mean, (seeds, samples) = table.mean(), table.shape
    by_seed, by_sample = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    freedom = np.array([seeds - 1, samples - 1, (seeds - 1) * (samples - 1)])
    squares = [
        samples * np.square(by_seed - mean).sum(),
        seeds * np.square(by_sample - mean).sum(),
        np.square(table - by_seed - by_sample + mean).sum(),
    ]
    parts = np.array([1, 1, -1]) * squares / freedom / table.size
    # Less than the seeds alone or the samples alone would give is an accident of the estimate.
    variance = max(parts.sum(), parts[0], parts[1])
    satterthwaite = parts.sum() ** 2 / np.sum(parts**2 / freedom)
    spread = stats.t(df=max(satterthwaite, seeds - 1), scale=math.sqrt(variance))
    half = spread.ppf((1 + level) / 2)
    return float(mean - half), float(mean + half), float(2 * spread.sf(abs(mean)))


def _crossed(
    table: Floats, level: float, resamples: int, source: np.random.Generator
) -> tuple[float, float, float]:
    """Ends and p-value by drawing seeds and samples again, both with replacement."""
    seeds, samples = table.shape
    means, size = [], max(1, _CHUNK // samples)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        times = source.multinomial(seeds, np.full(seeds, 1 / seeds), count)  # (count, seeds)
        chosen = source.integers(samples, size=(count, samples))
        means.append(np.take_along_axis(times @ table / seeds, chosen, axis=1).mean(axis=1))
    found = np.concatenate(means)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    below, above = np.sum(found <= 0), np.sum(found >= 0)
    p_value = min(1.0, 2 * (1 + min(below, above)) / (resamples + 1))
    return float(low), float(high), float(p_value)


# -- verdicts ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale:
    """How a score is read and shown.

    Attributes:
        unit: its name in sentences, in the plural.
        factor: units per one of the score, > 0.
        goal: whether more or less is better.
    """

    unit: str
    factor: float = 1.0
    goal: Goal = "max"


#: Accuracies in [0, 1], shown in percentage points.
POINTS = Scale("points", 100.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an interval says of an arm, held against a margin that was declared before.

    Attributes:
        kind: "better", "not worse", "worse" or "undecided".
        sentence: the same for people, with numbers.
        paired: what it rests on; its `p_value` is adjusted for all comparisons made together.
        margin: the loss that would not matter, in units of the score.
        arm: name of the arm, if it has one.
    """

    kind: Kind
    sentence: str
    paired: Paired
    margin: float
    arm: str = ""


def verdict(paired: Paired, margin: float, *, scale: Scale = POINTS, arm: str = "") -> Verdict:
    """What the interval says: better, not worse by more than the margin, worse, or undecided.

    "better": all of the interval is on the good side of zero. "not worse": all of it is on the
    good side of -margin (non-inferior). "worse": all of it is on the bad side of zero, and it
    reaches the margin. Without an interval, always "undecided". Where the true loss was just the
    margin, 95 % intervals by t said "not worse" or "better" in 2 to 3 % of studies, as promised
    (2.5 %); but in 9 to 12 % where most runs lose little and a few lose much (exponential). Of an
    arm whose runs now and then collapse, few seeds tell little.

    Args:
        paired: from `paired`, `paired_samples` or `compare_arms`.
        margin: the loss that would not matter, in units of the score (0.01 is one percentage
            point of accuracy), >= 0; to be fixed before the runs. With 0, "not worse" cannot be.
        scale: unit of the sentence, and whether more or less is better.
        arm: name to keep with the verdict.

    Raises:
        UsageError: the margin is negative or not finite.

    References:
        Piaggio et al. 2012, "Reporting of noninferiority and equivalence randomized trials",
        JAMA 308(24), figure 1.

    Example:
        >>> full = {0: 0.71, 1: 0.73, 2: 0.72, 3: 0.70, 4: 0.72}
        >>> arm = {0: 0.72, 1: 0.735, 2: 0.73, 3: 0.704, 4: 0.73}
        >>> print(verdict(paired(arm, full), margin=0.01).sentence)
        0.78 points better, 95 % interval 0.40 to 1.16, 5 seeds
        >>> print(verdict(paired({0: 0.72}, full), margin=0.01).sentence)
        undecided: 1.0 points better; one seed says nothing of chance, 4 seeds not common to all
    """
    if not 0 <= margin < math.inf:
        raise UsageError(
            f"judge by a margin of {margin}",
            found="a margin that is negative or not finite",
            fix="the loss that would not matter, e.g. 0.01 for one percentage point of accuracy",
        )
    kind = _kind(_gains(paired, scale.goal)[1], margin)
    return Verdict(kind, _sentence(kind, paired, margin, scale), paired, margin, arm)


def _gains(paired: Paired, goal: Goal, factor: float = 1.0) -> tuple[float, list[float]]:
    """The difference and its ends, above zero where better; no ends where there is no interval."""
    signed = factor if goal == "max" else -factor
    if paired.low is None or paired.high is None:
        return signed * paired.difference, []
    return signed * paired.difference, sorted((signed * paired.low, signed * paired.high))


def _kind(ends: Sequence[float], margin: float) -> Kind:
    if not ends:
        return "undecided"
    low, high = ends
    if low > 0:
        return "better"
    if low > -margin:
        return "not worse"
    return "worse" if high < 0 else "undecided"


def _sentence(kind: Kind, paired: Paired, margin: float, scale: Scale) -> str:
    gain, ends = _gains(paired, scale.goal, scale.factor)
    decimals = _decimals(gain, ends)
    shown = [f"{abs(value):.{decimals}f}" for value in (gain, *ends)]
    mean = f"{shown[0]} {scale.unit} {_side(gain)}" if gain else "no difference"
    if not ends:
        return f"undecided: {mean}; {_no_interval(paired)}{_left_out(paired)}"
    name = f"{_percent(paired.level)} interval{_together(paired)}"
    if kind in {"better", "worse"}:
        near, far = shown[1:] if kind == "better" else shown[:0:-1]
        return f"{mean}, {name} {near} to {far}, {_ground(paired)}"
    loss = f"{_plain(scale.factor * margin)} {scale.unit}"
    head = f"not worse by {loss} or more" if kind == "not worse" else "undecided"
    low, high = (f"{end} {_side(gain)}" for end, gain in zip(shown[1:], ends, strict=True))
    return f"{head}: {mean} on average, {name} from {low} to {high}, {_ground(paired)}"


def _decimals(gain: float, ends: list[float]) -> int:
    """Two figures of the interval's width; more where an end would else read as zero."""
    width = ends[1] - ends[0] if ends else abs(gain)
    decimals = min(6, max(1, 1 - math.floor(math.log10(width)))) if width else 1
    while decimals < 6 and any(end and not round(end, decimals) for end in ends):
        decimals += 1
    return decimals


def _side(gain: float) -> str:
    return "better" if gain > 0 else "worse"


def _percent(level: float) -> str:
    return f"{round(100 * level, 6):g} %"


def _plain(value: float) -> str:
    """A number that the reader gave, e.g. '0.25'; '1.0' for one, as a plural follows."""
    return "1.0" if (text := f"{value:.6g}") == "1" else text


def _together(paired: Paired) -> str:
    if paired.comparisons == 1:
        return ""
    return f" (for {paired.comparisons} comparisons together)"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _ground(paired: Paired) -> str:
    samples = "" if paired.samples is None else f" and {paired.samples} test samples"
    return _seeds(paired.n) + samples + _left_out(paired)


def _left_out(paired: Paired) -> str:
    return f", {_seeds(paired.unpaired)} not common to all" if paired.unpaired else ""


def _no_interval(paired: Paired) -> str:
    if paired.n == 1:
        return "one seed says nothing of chance"
    if paired.method == "studentized":
        return f"{_seeds(paired.n)} give no interval by this method"
    return f"the same with each of {_seeds(paired.n)}, which says nothing of chance"


# -- several arms -----------------------------------------------------------------------------


def contrasts(
    scores: ArrayLike, *, against: Reference = "control", spread: Spread = "shared"
) -> tuple[Floats, Floats]:
    """Mean differences by seed from the control or from the best arm, and their standard errors.

    With few seeds the spread of one arm's differences is a bad guess, and a rule that covers many
    comparisons by it alone finds next to nothing. "shared" takes the larger of that and of the
    average spread of all comparisons: the average steadies it, the arm's own keeps a noisy arm
    from passing for a steady one. It is ours. "own" takes the arm's own alone.

    Args:
        scores: shape (..., arms, seeds), finite, at least two of each; more is better.
        against: "control", the first arm; or "best", the arm of the largest mean, of equals the
            first. The average is over the comparisons with the control, or over all pairs.
        spread: one of the above.

    Returns:
        Mean of arm - reference, and its standard error, both of shape (..., arms), float64; the
        reference itself has difference 0.

    Raises:
        DataError: not a table of finite numbers of that size.
        UsageError: an option is none of its choices.

    Example:
        >>> difference, error = contrasts([[1.0, 2.0, 3.0], [2.0, 3.0, 4.3], [1.0, 5.0, 6.0]])
        >>> difference.round(2).tolist(), error.round(2).tolist()
        ([0.0, 1.1, 2.0], [0.71, 0.71, 1.0])
    """
    _check_choice("against", against, get_args(Reference))
    _check_choice("spread", spread, get_args(Spread))
    values = _finite(scores, "compare several arms")
    if values.ndim < 2 or min(values.shape[-2:]) < 2:
        raise DataError(
            "compare several arms",
            found=f"scores of shape {values.shape}",
            fix="two arms and two seeds at least: shape (..., arms, seeds)",
        )
    arms, seeds = values.shape[-2:]
    chosen = values.mean(axis=-1).argmax(axis=-1) if against == "best" else 0
    place = np.broadcast_to(chosen, values.shape[:-2])[..., None, None]
    differences = values - np.take_along_axis(values, place, axis=-2)
    variance = differences.var(axis=-1, ddof=1)
    size = np.abs(values).max(axis=(-2, -1))[..., None]
    variance[np.sqrt(variance) <= _ROUNDING * size] = 0.0
    if spread == "shared":
        total = variance.sum(axis=-1)
        if against == "best":
            # Twice the residual mean square of arms and seeds is the average over all pairs.
            rest = values - values.mean(axis=-2, keepdims=True)
            total = 2 * rest.var(axis=-1, ddof=1).sum(axis=-1)
        variance = np.maximum(variance, total[..., None] / (arms - 1))
    return differences.mean(axis=-1), np.sqrt(variance / seeds)


def simultaneous(
    scores: ArrayLike,
    *,
    against: Reference = "control",
    level: float = 0.95,
    spread: Spread = "shared",
    draws: int = _DRAWS,
    seed: int = 0,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Intervals and p-values of all arms against the control or the best that hold together.

    One bound holds for the largest |t| of all comparisons (max-t). It is found by simulating
    studies of equal arms with normal noise, of one size for all, or three times as large for the
    control, for another arm or for half of them: the largest of these four bounds counts.

    Among 2 to 24 equal arms with 3 to 10 seeds, something was found in at most 5.3 % of studies
    at 95 %, with normal noise (of sizes up to 3 : 1), heavy tails and accuracies alike; with skew
    that is opposite in control and arms in up to 9 %. Of 7 arms with 3 seeds, one that is 2
    standard deviations better is found in 14 %, with 5 seeds in 50 %. With `spread="own"` that is
    5 and 24 %, as with Holm's step-down of paired t tests; flipping signs of fewer than 6 seeds
    can find nothing at all. Studies of 3 seeds and many arms find only what is large.

    Args:
        scores: shape (..., arms, seeds), finite, at least two of each; more is better.
        against: see `contrasts`.
        level: at which all intervals hold together, in (0, 1).
        spread: see `contrasts`.
        draws: simulated studies, >= 1000. The bound of two arms is exact.
        seed: of the simulation.

    Returns:
        Mean difference, lower and upper end, adjusted p-value: shape (..., arms), float64. Ends
        and p-value are NaN where there is no spread. An interval excludes zero just where p is at
        most 1 - level.

    Raises:
        DataError: not a table of finite numbers of that size.
        UsageError: an option is out of range.

    References:
        Dunnett 1955, "A multiple comparison procedure for comparing several treatments with a
        control", JASA 50(272). Westfall & Young 1993, "Resampling-Based Multiple Testing":
        max-t. Its four kinds of noise are ours, as is the "shared" spread.

    Example:
        >>> scores = [[1.0, 2.0, 3.0], [5.0, 6.1, 7.0], [1.0, 2.5, 3.3]]
        >>> difference, low, high, p = simultaneous(scores)
        >>> low[1:].round(1).tolist(), (p[1:] < 0.05).tolist()
        ([3.6, -0.3], [True, False])
    """
    _check_level(level)
    _check_count("draws", draws, max(1000, math.ceil(1 / (1 - level))))
    values = np.asarray(scores, dtype=np.float64)
    difference, error = contrasts(values, against=against, spread=spread)
    known = error > 0
    t = np.abs(np.divide(difference, error, out=np.full(error.shape, np.nan), where=known))
    arms, seeds = values.shape[-2:]
    if arms == 2:
        half, p = stats.t.ppf((1 + level) / 2, seeds - 1), 2 * stats.t.sf(t, seeds - 1)
    else:
        largest = _largest_t(arms, seeds, against, spread, draws, seed)
        reached = draws - np.min([np.searchsorted(one, t) for one in largest], axis=0)
        p = np.where(known, (1 + reached) / (draws + 1), np.nan)
        half = largest[:, draws - math.floor((1 - level) * (draws + 1))].max()
    half = np.where(known, half * error, np.nan)
    return difference, difference - half, difference + half, p


@lru_cache(maxsize=32)
def _largest_t(
    arms: int, seeds: int, against: Reference, spread: Spread, draws: int, seed: int
) -> Floats:
    """The largest |t| in simulated studies of equal arms, ascending, shape (kinds, draws)."""
    source, kinds = np.random.default_rng(seed), _kinds_of_noise(arms)
    largest, size = np.empty((len(kinds), draws)), max(1, _CHUNK // (arms * seeds))
    for start in range(0, draws, size):
        noise = source.standard_normal((min(size, draws - start), arms, seeds))
        for i, scale in enumerate(kinds):
            difference, error = contrasts(noise * scale, against=against, spread=spread)
            t = np.divide(difference, error, out=np.zeros(error.shape), where=error > 0)
            largest[i, start : start + size] = np.abs(t).max(axis=-1)
    largest.sort(axis=-1)
    largest.flags.writeable = False  # it is shared
    return largest


def _kinds_of_noise(arms: int) -> Floats:
    """Spreads by arm, shape (kinds, arms, 1): all equal; or the control, one or half tripled."""
    kinds = np.ones((4, arms, 1))
    kinds[1, 0] = kinds[2, -1] = _NOISIEST
    kinds[3, arms // 2 :] = _NOISIEST
    return kinds


def compare_arms(
    scores: Mapping[str, Mapping[int, float]],
    control: str,
    *,
    margin: float,
    level: float = 0.95,
    spread: Spread = "shared",
    scale: Scale = POINTS,
    draws: int = _DRAWS,
    seed: int = 0,
) -> list[Verdict]:
    """Verdicts on every arm against one control that hold together, at the declared level.

    The more arms, the easier one of them looks better by luck: here all verdicts of a study are
    right together in `level` of studies. How far that was found to hold, and how little 3 seeds
    can find: see `simultaneous`.

    Args:
        scores: arm -> seed -> score. Only seeds that every arm has count: an arm that lacks some
            is better left out than let shorten all others.
        control: the arm that the others are held against.
        margin: see `verdict`; fixed before the runs.
        level: in (0, 1).
        spread: "shared" or "own", see `contrasts`.
        scale: unit of the sentences, and whether more or less is better.
        draws: simulated studies, >= 1000.
        seed: of the simulation.

    Returns:
        One verdict per arm but the control, in the order given; `verdict.paired.p_value` is
        adjusted for all of them.

    Raises:
        DataError: no seed is in all arms, or a score is not a finite number.
        UsageError: no such control, no other arm, or an option is out of range.

    Example:
        >>> scores = {
        ...     "full": {0: 0.70, 1: 0.73, 2: 0.72},
        ...     "gradual": {0: 0.71, 1: 0.73, 2: 0.72},
        ...     "linear-probe": {0: 0.60, 1: 0.62, 2: 0.62},
        ... }
        >>> for found in compare_arms(scores, "full", margin=0.02):
        ...     print(found.arm, "is", found.sentence)
        gradual is not worse by 2 points or more: 0.3 points better on average, 95 % interval \
(for 2 comparisons together) from 0.9 worse to 1.6 better, 3 seeds
        linear-probe is 10.3 points worse, 95 % interval (for 2 comparisons together) 9.1 to \
11.6, 3 seeds
    """
    _check_level(level)
    if control not in scores or len(scores) < 2:
        raise UsageError(
            f"compare arms with the control {control!r}",
            found=f"the arms {few(list(scores))}" if scores else "no arms",
            fix="the control and one other arm at least",
        )
    others = [name for name in scores if name != control]
    table, seeds = _table({n: scores[n] for n in (control, *others)}, "compare several arms")
    found = _all_of(table, level=level, spread=spread, draws=draws, seed=seed)
    lacking = _lacking(scores, seeds)
    results = []
    for i, name in enumerate(others, start=1):
        difference, low, high, p_value = (float(values[i]) for values in found)
        one = Paired(
            n=len(seeds),
            difference=difference,
            low=_end(low),
            high=_end(high),
            level=level,
            p_value=_end(p_value),
            method=f"max-t, {spread} spread",
            unpaired=lacking,
            comparisons=len(others),
        )
        results.append(verdict(one, margin, scale=scale, arm=name))
    return results


def _all_of(table: Floats, **options: Any) -> tuple[Floats, Floats, Floats, Floats]:
    """`simultaneous`, or only the differences where there is one seed."""
    if table.shape[-1] > 1:
        return simultaneous(table, **options)
    against = options.get("against", "control")
    chosen = table[:, 0].argmax() if against == "best" else 0
    none = np.full(len(table), np.nan)
    return table[:, 0] - table[chosen, 0], none, none, none


@dataclass(frozen=True, slots=True)
class Winner:
    """The arm with the best mean, and what can be said of the others.

    Attributes:
        best: its name.
        mean: its mean score.
        n: seeds that all arms have.
        level: at which all that is said holds together.
        indistinguishable: arms that cannot be told from it, the nearest first.
        behind: arms that are worse, the nearest first.
        differences: arm -> mean of arm - best, for all but the best.
        p_values: arm -> of "as good as the best", adjusted; None where nothing is known.
        sentence: the same for people.
    """

    best: str
    mean: float
    n: int
    level: float
    indistinguishable: tuple[str, ...]
    behind: tuple[str, ...]
    differences: Mapping[str, float]
    p_values: Mapping[str, float | None]
    sentence: str


def winner(
    scores: Mapping[str, Mapping[int, float]],
    *,
    level: float = 0.95,
    spread: Spread = "shared",
    scale: Scale = POINTS,
    draws: int = _DRAWS,
    seed: int = 0,
) -> Winner:
    """The arm with the best mean, and which others cannot be told from it.

    That the best was picked by its mean is allowed for: among 2 to 24 equal arms, some arm was
    said to be behind in at most 5.4 % of studies at 95 %, in up to 9 % with opposite skew. That
    is a strict rule, and with few seeds it seldom leaves one arm alone: of 8 arms with 5 seeds,
    one that is 3 standard deviations better stands alone in 44 % of studies.

    Args:
        scores: arm -> seed -> score. Only seeds that every arm has count.
        level: in (0, 1).
        spread: "shared" or "own", see `contrasts`.
        scale: unit of the sentence, and whether more or less is better.
        draws: simulated studies, >= 1000.
        seed: of the simulation.

    Raises:
        DataError: no seed is in all arms, or a score is not a finite number.
        UsageError: fewer than two arms, or an option is out of range.

    Example:
        >>> scores = {
        ...     "full": {0: 0.70, 1: 0.73, 2: 0.72},
        ...     "gradual": {0: 0.71, 1: 0.73, 2: 0.72},
        ...     "linear-probe": {0: 0.60, 1: 0.62, 2: 0.62},
        ... }
        >>> print(winner(scores).sentence)
        gradual has the best mean, 72.0 points; full cannot be told from it; linear-probe is \
behind (95 % for all together, 3 seeds)
    """
    _check_level(level)
    if len(scores) < 2:
        raise UsageError("find the best arm", found=f"{len(scores)} arms", fix="two arms at least")
    names = list(scores)
    table, seeds = _table(scores, "find the best arm")
    sign = 1 if scale.goal == "max" else -1
    options: dict[str, Any] = {"spread": spread, "draws": draws, "seed": seed}
    differences, _, high, p = _all_of(sign * table, against="best", level=level, **options)
    best = int((sign * table).mean(axis=-1).argmax())
    order = [i for i in np.argsort(-differences, kind="stable") if i != best]
    behind = tuple(names[i] for i in order if high[i] < 0)
    near = tuple(names[i] for i in order if not high[i] < 0)
    mean = float(table[best].mean())
    ground = f"({_percent(level)} for all together, {_seeds(len(seeds))}" + (
        f", {_seeds(lacking)} not common to all)" if (lacking := _lacking(scores, seeds)) else ")"
    )
    head = f"{names[best]} has the best mean, {scale.factor * mean:.1f} {scale.unit}"
    return Winner(
        best=names[best],
        mean=mean,
        n=len(seeds),
        level=level,
        indistinguishable=near,
        behind=behind,
        differences={names[i]: float(sign * differences[i]) for i in order},
        p_values={names[i]: _end(p[i]) for i in order},
        sentence=f"{head}; {_standing(near, behind, len(seeds))} {ground}",
    )


def _standing(near: Sequence[str], behind: Sequence[str], seeds: int) -> str:
    if seeds == 1:
        return "one seed says nothing of chance"
    if not near and len(behind) > 1:
        return "all others are behind"
    said = []
    if near:
        said.append(f"{_listed(near)} cannot be told from it")
    if behind:
        said.append(f"{_listed(behind)} {'is' if len(behind) == 1 else 'are'} behind")
    return "; ".join(said)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# -- times ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ratio:
    """Times of an arm over those of a control, by seed.

    Attributes:
        n: seeds with a time of both.
        seeds: seeds that both were run with, >= n.
        arm_reached: of these, with a time of the arm.
        control_reached: of these, with a time of the control.
        faster: seeds with which the arm was faster; a run without a time counts as slower.
        slower: seeds with which it was slower.
        ratio: geometric mean of arm / control over the n seeds, > 0; None without any.
        low: lower end of its interval; None for one seed, for equal ratios, and where a run has
            no time.
        high: upper end.
        level: in (0, 1).
        p_value: of "as fast", two-sided: Student's t on logarithms; where a run has no time, the
            sign test on `faster` and `slower`. None where neither says anything.
    """

    n: int
    seeds: int
    arm_reached: int
    control_reached: int
    faster: int
    slower: int
    ratio: float | None
    low: float | None
    high: float | None
    level: float
    p_value: float | None

    @property
    def censored(self) -> bool:
        """Whether a run has no time: it ended before it got where it was to get."""
        return self.n < self.seeds

    @property
    def sentence(self) -> str:
        """All of it for people.

        Example:
            >>> print(ratio({0: 50.0, 1: 66.0, 2: 58.0}, {0: 100.0, 1: 120.0, 2: 115.0}).sentence)
            0.52 of the time, 95 % interval 0.45 to 0.59, 3 seeds
        """
        return _timing(self)


def ratio(
    times_arm: Mapping[int, float | None],
    times_control: Mapping[int, float | None],
    *,
    level: float = 0.95,
) -> Ratio:
    """How long an arm takes as a multiple of the control: the geometric mean of ratios by seed.

    The interval is Student's t on the logarithms. A run that never reached its target has no time
    (`time_to_target` gives None). Leaving it out would flatter the arm that fails, so the ratio is
    then shown without an interval, with how many runs got there and who was faster: never counts
    as slower than any time, which holds where all runs had one budget.

    Args:
        times_arm: seed -> seconds, > 0; or None for a run that never got there.
        times_control: the same of the control. Only seeds that both have count.
        level: of the interval, in (0, 1).

    Raises:
        DataError: no seed is in both, or a time is not a finite number above 0.
        UsageError: the level is outside (0, 1).

    References:
        Fleming & Wallace 1986, "How not to lie with statistics: the correct way to summarize
        benchmark results", CACM 29(3): ratios are averaged geometrically.

    Example:
        >>> found = ratio({0: 50.0, 1: None, 2: 58.0}, {0: 100.0, 1: 120.0, 2: 115.0})
        >>> found.n, round(found.ratio, 3), found.low, found.faster, found.slower
        (2, 0.502, None, 2, 1)
        >>> print(found.sentence)
        reached with 2 of 3 seeds, by the control with 3; 0.50 of the time where both did; \
faster with 2 seeds, slower with 1
    """
    _check_level(level)
    pairs = _pairs(times_arm, times_control)
    logs = {
        seed: math.log(a) - math.log(b)
        for seed, (a, b) in pairs.items()
        if a is not None and b is not None
    }
    found = paired(logs, dict.fromkeys(logs, 0.0), level=level) if logs else None
    whole = found if len(logs) == len(pairs) else None
    order = [(a or math.inf, b or math.inf) for a, b in pairs.values()]
    faster, slower = sum(a < b for a, b in order), sum(a > b for a, b in order)
    p_value = whole.p_value if whole else _sign_test(faster, slower)
    return Ratio(
        n=len(logs),
        seeds=len(pairs),
        arm_reached=sum(a is not None for a, _ in pairs.values()),
        control_reached=sum(b is not None for _, b in pairs.values()),
        faster=faster,
        slower=slower,
        ratio=math.exp(found.difference) if found else None,
        low=math.exp(whole.low) if whole and whole.low is not None else None,
        high=math.exp(whole.high) if whole and whole.high is not None else None,
        level=level,
        p_value=p_value,
    )


def _pairs(
    times_arm: Mapping[int, float | None], times_control: Mapping[int, float | None]
) -> dict[int, tuple[float | None, float | None]]:
    """Both times of every seed that both have, checked."""
    asked, common = "compare times by seed", sorted(times_arm.keys() & times_control.keys())
    if not common:
        raise _nothing_in_common(asked, ("the arm", "the control"))
    pairs = {seed: (times_arm[seed], times_control[seed]) for seed in common}
    for time in (t for pair in pairs.values() for t in pair if t is not None):
        if not 0 < time < math.inf:
            raise DataError(
                asked,
                found=f"a time of {time} s",
                fix="seconds above 0, or None for a run that never got there",
            )
    return pairs


def _sign_test(faster: int, slower: int) -> float | None:
    if not faster + slower:
        return None
    found: Any = stats.binomtest(faster, faster + slower)
    return float(found.pvalue)


def _timing(of: Ratio) -> str:
    mean = "" if of.ratio is None else _multiple(of.ratio)
    if of.censored:
        head = f"reached with {of.arm_reached} of {_seeds(of.seeds)}, by the control with "
        both = f"; {mean} where both did" if mean else ""
        rest = f"; faster with {_seeds(of.faster)}, slower with {of.slower}"
        return f"{head}{of.control_reached}{both}{rest}"
    if of.low is None or of.high is None:
        return f"{mean} with {_seeds(of.seeds)}, which says nothing of chance"
    open_ = ": no difference shown" if of.low <= 1 <= of.high else ""
    ends = f"{_figure(of.low)} to {_figure(of.high)}"
    return f"{mean}, {_percent(of.level)} interval {ends}{open_}, {_seeds(of.n)}"


def _multiple(value: float) -> str:
    return f"{_figure(value)} {'of the time' if value < 1 else 'times as long'}"


def _figure(value: float) -> str:
    """Two decimals, or three figures of what is below a tenth."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def time_to_target(
    curve: Iterable[tuple[float, float]], target: float, *, goal: Goal = "max"
) -> float | None:
    """When a run first reached a score, in seconds; None if it never did.

    Args:
        curve: (seconds, score) points in order of time. A score is known only where it was
            measured: nothing is read between points. A score of NaN reaches nothing.
        target: the score to reach.
        goal: "max", to be at the target or above; "min", at it or below.

    Raises:
        DataError: seconds are not finite, or go back.
        UsageError: the target is NaN, or the goal none of the two.

    Example:
        >>> curve = [(10.0, 0.5), (20.0, 0.7), (30.0, 0.65), (40.0, 0.72)]
        >>> time_to_target(curve, 0.7), time_to_target(curve, 0.8)
        (20.0, None)
    """
    _check_choice("goal", goal, get_args(Goal))
    if math.isnan(target):
        raise UsageError("find the time to a target", found="a target of NaN", fix="give a score")
    sign, last, reached = 1 if goal == "max" else -1, -math.inf, None
    for seconds, score in curve:
        if not math.isfinite(seconds) or seconds < last:
            raise DataError(
                "find the time to a target",
                found=f"a point at {seconds} s after one at {last} s",
                fix="points in order of time",
            )
        last = seconds
        if reached is None and sign * score >= sign * target:
            reached = seconds
    return reached


# -- trade-offs -------------------------------------------------------------------------------


def pareto_front(
    points: Mapping[str, Sequence[float | None]],
    goals: Sequence[Goal],
    *,
    incomplete: Literal["refuse", "leave out"] = "refuse",
) -> tuple[str, ...]:
    """The points that no other point beats: at least as good in all objectives, better in one.

    Equal points do not beat each other: they are on the front together, or off it together.

    Args:
        points: name -> values, one per objective; infinite values are allowed.
        goals: per objective, whether more or less is better.
        incomplete: what to do about a point with a value of None or NaN, which cannot be
            compared: "refuse" raises, "leave out" keeps it off the front and lets it beat none.

    Returns:
        Names in the order given.

    Raises:
        DataError: a point has not as many values as there are goals, or lacks one.
        UsageError: no goals, or a goal or `incomplete` is none of its choices.

    Example:
        >>> runs = {"full": (0.73, 100.0), "gradual": (0.72, 80.0), "slow": (0.72, 90.0)}
        >>> pareto_front(runs, ("max", "min"))
        ('full', 'gradual')
    """
    asked = "find the Pareto front"
    _check_choice("incomplete", incomplete, ("refuse", "leave out"))
    for goal in goals or ("",):
        _check_choice("goal", goal, get_args(Goal))
    if uneven := [name for name, values in points.items() if len(values) != len(goals)]:
        raise DataError(
            asked,
            found=f"{few(uneven)} without one value for each of {len(goals)} objectives",
            fix="as many values per point as goals",
        )
    signs = np.array([1.0 if goal == "max" else -1.0 for goal in goals])
    values = {name: signs * np.array(point, dtype=np.float64) for name, point in points.items()}
    known = {name: value for name, value in values.items() if not np.isnan(value).any()}
    if incomplete == "refuse" and len(known) < len(values):
        raise DataError(
            asked,
            found=f"{few([n for n in values if n not in known])} with a value that is missing",
            fix='give all values, or incomplete="leave out"',
        )
    table = np.array(list(known.values())).reshape(len(known), len(goals))
    return tuple(name for name, value in known.items() if not _beaten(value, table))


def _beaten(value: Floats, table: Floats) -> bool:
    """Whether a row of the table is at least as large everywhere and larger somewhere."""
    return bool(np.any((table >= value).all(axis=1) & (table > value).any(axis=1)))


# -- what is given ----------------------------------------------------------------------------


def _table(scores: Mapping[str, Mapping[int, float]], asked: str) -> tuple[Floats, list[int]]:
    """Scores of the seeds that all arms have, shape (arms, seeds), and these seeds."""
    seeds = sorted(set.intersection(*(set(values) for values in scores.values())))
    if not seeds:
        raise _nothing_in_common(asked, list(scores))
    rows = [[values[s] for s in seeds] for values in scores.values()]
    for name, row in zip(scores, rows, strict=True):
        if bad := [s for s, v in zip(seeds, row, strict=True) if v is None or not math.isfinite(v)]:
            raise DataError(
                asked,
                found=f"no finite score of {name} with seed {few([str(s) for s in bad])}",
                fix="leave out what did not finish; times to a target go to ratio()",
            )
    return np.array(rows, dtype=np.float64), seeds


def _nothing_in_common(asked: str, names: Sequence[str]) -> DataError:
    return DataError(
        asked,
        found=f"no seed that all of them have: {few(names)}",
        fix="run all arms with the same seeds",
    )


def _lacking(scores: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> int:
    return len(set().union(*scores.values())) - len(seeds)


def _differences(scores: Floats) -> Floats:
    """First row - second; those that differ by rounding alone are made equal."""
    found = scores[0] - scores[1]
    equal = np.ptp(found) <= _ROUNDING * np.abs(scores).max()
    return np.full(found.shape, found[0]) if equal else found


def _outcomes(correct: ArrayLike, like: tuple[int, ...] | None = None) -> Floats:
    """A checked table of 0 and 1."""
    table = np.asarray(correct)
    wanted = table.ndim == 2 and table.shape[0] >= 1 and table.shape[1] >= 2
    if not wanted or (like is not None and table.shape != like):
        raise DataError(
            "compare two arms by seeds and samples",
            found=f"outcomes of shape {table.shape}" + (f" and {like}" if like else ""),
            fix="two tables of one shape (seeds, samples), with two samples at least",
        )
    if not np.isin(table, (0, 1)).all():
        raise DataError(
            "compare two arms by seeds and samples",
            found="outcomes other than 0 and 1",
            fix="1 where the prediction was right, else 0",
        )
    return table.astype(np.float64)


def _finite(values: ArrayLike, asked: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if not found.ndim or not found.size or not np.isfinite(found).all():
        raise DataError(
            asked,
            found="no values" if not found.size else "values that are no finite numbers",
            fix="one finite number per seed",
        )
    return found


def _end(value: Any) -> float | None:
    """A plain number, or None for NaN."""
    return None if math.isnan(value) else float(value)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(
            f"give an interval of level {level}", found="a level outside (0, 1)", fix="e.g. 0.95"
        )


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"use {name}={value}", found="too few", fix=f"{least} at least")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(
            f"use {name}={value!r}",
            found=f"none of the choices of {name}",
            fix=" or ".join(repr(choice) for choice in choices),
        )
