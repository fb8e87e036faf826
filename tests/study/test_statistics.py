from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from frostline.errors import DataError, FrostlineError, UsageError
from frostline.study.statistics import (
    POINTS,
    Goal,
    Method,
    Paired,
    Reference,
    Scale,
    Spread,
    compare_arms,
    contrasts,
    intervals,
    paired,
    paired_samples,
    pareto_front,
    ratio,
    simultaneous,
    time_to_target,
    verdict,
    winner,
)

METHODS: tuple[Method, ...] = get_args(Method)
AGAINST: tuple[Reference, ...] = get_args(Reference)
SPREADS: tuple[Spread, ...] = get_args(Spread)
LOSS = Scale("nats", goal="min")
FULL = {0: 0.71, 1: 0.73, 2: 0.72, 3: 0.70, 4: 0.72}
#: Few draws, for speed; which studies are found does not hang on it.
FAST: dict[str, Any] = {"draws": 2000}

#: Scores whose spread is not lost in rounding.
scores_of = st.lists(st.integers(-500, 500).map(lambda v: v / 1000), min_size=3, max_size=8)


def by_seed(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(values))


def noise(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def made(low: float | None, high: float | None, difference: float, n: int = 5) -> Paired:
    return Paired(n, difference, low, high, 0.95, None if low is None else 0.5, "t")


# -- one arm against the control --------------------------------------------------------------


@given(scores_of, st.data())
def test_t_agrees_with_the_paired_t_test(values: list[float], data: st.DataObject) -> None:
    other = data.draw(st.permutations([v + 0.01 * i for i, v in enumerate(values)]))
    found = paired(by_seed(values), by_seed(other))
    differences = np.array(values) - other
    assert found.difference == pytest.approx(differences.mean())
    if np.ptp(differences) < 1e-9:
        assert (found.low, found.high, found.p_value) == (None, None, None)
        return
    test: Any = stats.ttest_rel(values, other)
    ends = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.p_value == pytest.approx(test.pvalue)


@pytest.mark.parametrize("method", METHODS)
def test_swapping_the_arms_mirrors_the_interval(method: Method) -> None:
    one, other = (
        by_seed([0.7, 0.75, 0.69, 0.74, 0.8, 0.71]),
        by_seed([0.7, 0.7, 0.7, 0.7, 0.7, 0.7]),
    )
    there, back = paired(one, other, method=method), paired(other, one, method=method)
    assert there.low is not None
    assert back.low is not None
    assert there.difference == -back.difference
    # Quantiles of resamples are not quite symmetric.
    assert there.low == pytest.approx(-(back.high or 0), abs=0 if method == "t" else 2e-3)
    assert (there.method, there.n, there.level) == (method, 6, 0.95)


@pytest.mark.parametrize("method", METHODS)
def test_the_interval_of_level_1_minus_p_just_touches_zero(method: Method) -> None:
    differences = noise(6, seed=3) * 0.02 + 0.012
    found = paired(by_seed(list(differences)), dict.fromkeys(range(6), 0.0), method=method)
    p = found.p_value
    assert p is not None
    assert 0.002 < p < 0.9
    for level, outside in ((1 - p * 1.05, True), (1 - p * 0.95, False)):
        low, high = intervals(differences, level=level, method=method)
        assert bool(low > 0 or high < 0) is outside


def test_only_seeds_that_both_have_count() -> None:
    arm = {7: 0.8, 1: 0.7, 3: 0.75, 9: 0.1}
    control = {3: 0.7, 1: 0.69, 7: 0.7, 2: 0.9}
    found = paired(arm, control)
    assert (found.n, found.unpaired) == (3, 2)
    assert found.difference == pytest.approx((0.05 + 0.01 + 0.1) / 3)
    same = paired(dict(sorted(arm.items())), control)
    assert found == same


def test_one_seed_gives_no_interval_and_no_verdict() -> None:
    for method in METHODS:
        found = paired({3: 0.9}, {3: 0.1, 4: 0.2}, method=method)
        assert (found.low, found.high, found.p_value) == (None, None, None)
        assert verdict(found, 0.5).kind == "undecided"
    several = compare_arms({"a": {0: 0.1}, "b": {0: 0.9}, "c": {0: 0.5}}, "a", margin=0.5)
    assert {v.kind for v in several} == {"undecided"}


@pytest.mark.parametrize("method", METHODS)
def test_equal_differences_give_no_interval(method: Method) -> None:
    """They are equal but for rounding: 0.82 - 0.80 is not quite 0.52 - 0.50."""
    arm, control = by_seed([0.82, 0.52, 0.32]), by_seed([0.80, 0.50, 0.30])
    assert len({arm[s] - control[s] for s in arm}) > 1
    found = paired(arm, control, method=method)
    assert (found.low, found.p_value) == (None, None)
    assert "0 seeds" not in verdict(found, 0.01).sentence
    assert "2.0 points better" in verdict(found, 0.01).sentence
    assert paired(FULL, FULL, method=method).low is None
    large = [1000.0, 2000.0, 3000.0]
    found = paired(by_seed([v + 0.001 for v in large]), by_seed(large), method=method)
    assert (found.low, round(found.difference, 9)) == (None, 0.001)


def test_the_percentile_bootstrap_of_two_is_the_two() -> None:
    low, high = intervals([[1.0, 4.0], [3.0, -2.0]], method="percentile")
    assert (low.tolist(), high.tolist()) == ([1.0, -2.0], [4.0, 3.0])


def test_percentiles_agree_with_all_resamples_there_are() -> None:
    values = noise(5, seed=1)
    means = [np.mean(pick) for pick in itertools.product(values, repeat=5)]
    low, high = intervals(values, level=0.8, method="percentile")
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])), abs=0.03)


def test_the_studentized_bootstrap_agrees_with_all_resamples_there_are() -> None:
    values = noise(5, seed=2)
    error, t = np.std(values, ddof=1) / math.sqrt(5), []
    for pick in itertools.product(values, repeat=5):
        spread = np.std(pick, ddof=1) / math.sqrt(5) if len(set(pick)) > 1 else 0.0
        shift = np.mean(pick) - values.mean()
        t.append(shift / spread if spread else math.copysign(math.inf, shift))
    quantiles = np.quantile(t, [0.9, 0.1], method="nearest")
    low, high = intervals(values, level=0.8, method="studentized")
    assert (low, high) == pytest.approx(tuple(values.mean() - quantiles * error), abs=0.06)


def test_the_studentized_bootstrap_has_no_interval_of_two_or_three() -> None:
    for n, none in ((2, True), (3, True), (5, False), (10, False)):
        low, high = intervals(noise(4, n), method="studentized")
        assert np.isnan(low).all() == none
        assert np.isnan(high).all() == none


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_judged_one_by_one(method: Method) -> None:
    rows = noise(2, 3, 6)
    rows[1, 2] = 0.25
    low, high = intervals(rows, method=method, resamples=400)
    assert low.shape == (2, 3)
    assert np.isnan(low[1, 2])
    for place in ((0, 0), (1, 1)):
        alone = intervals(rows[place], method=method, resamples=400)
        assert alone[0].shape == ()
        assert (low[place], high[place]) == pytest.approx(tuple(map(float, alone)))


@pytest.mark.parametrize(("n", "least"), [(2, 0.94), (3, 0.94), (10, 0.94)])
def test_t_holds_the_truth_as_often_as_it_says(n: int, least: float) -> None:
    low, high = intervals(noise(20_000, n, seed=n))
    assert least < np.mean((low <= 0) & (high >= 0)) < 0.96


def test_quantiles_of_resamples_do_not() -> None:
    for method in ("percentile", "bca"):
        low, high = intervals(noise(500, 3), method=method, resamples=300)
        assert np.mean((low <= 0) & (high >= 0)) < 0.85


# -- seeds and samples ------------------------------------------------------------------------


def outcomes(seeds: int, samples: int, *, seed: int = 0) -> tuple[Any, Any]:
    source = np.random.default_rng(seed)
    hard = source.standard_normal(samples)
    draw = lambda: hard + 0.5 * source.standard_normal((seeds, samples)) + 0.5 > 0  # noqa: E731
    return draw(), draw()


@pytest.mark.parametrize(("seed", "whole"), [(18, True), (0, False)])
def test_components_agree_with_sums_written_out(seed: int, whole: bool) -> None:
    arm, control = outcomes(4, 30, seed=seed)
    table = arm.astype(int) - control.astype(int)
    seeds, samples, mean = 4, 30, table.mean()
    ms_seeds = samples * sum((table[i].mean() - mean) ** 2 for i in range(seeds)) / 3
    ms_samples = seeds * sum((table[:, j].mean() - mean) ** 2 for j in range(samples)) / 29
    ms_rest = sum(
        (table[i, j] - table[i].mean() - table[:, j].mean() + mean) ** 2
        for i in range(seeds)
        for j in range(samples)
    ) / (3 * 29)
    variance = (ms_seeds + ms_samples - ms_rest) / 120
    freedom = (ms_seeds + ms_samples - ms_rest) ** 2 / (
        ms_seeds**2 / 3 + ms_samples**2 / 29 + ms_rest**2 / (3 * 29)
    )
    assert bool(variance > max(ms_seeds, ms_samples) / 120) is whole
    variance = max(variance, ms_seeds / 120, ms_samples / 120)
    half = stats.t.ppf(0.975, max(freedom, 3)) * math.sqrt(variance)
    found = paired_samples(arm, control)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert (found.n, found.samples) == (4, 30)


def test_seeds_that_do_not_matter_leave_the_samples_to_decide() -> None:
    """The same outcomes with every seed: the interval is that of the samples alone."""
    source = np.random.default_rng(4)
    arm, control = (np.tile(source.integers(0, 2, 40), (3, 1)) for _ in range(2))
    found = paired_samples(arm, control)
    # No variance by seed: seeds - 1 = 2 degrees of freedom are the fewest that are used.
    values = arm[0] - control[0]
    half = stats.sem(values) * stats.t.ppf(0.975, 39)
    assert found.low == pytest.approx(values.mean() - half)


def test_crossed_resampling_agrees_with_a_loop() -> None:
    arm, control = outcomes(4, 25, seed=1)
    table, source, means = arm.astype(int) - control.astype(int), np.random.default_rng(9), []
    for _ in range(4000):
        rows, columns = source.integers(4, size=4), source.integers(25, size=25)
        means.append(table[rows][:, columns].mean())
    expected = np.quantile(means, [0.1, 0.9])
    found = paired_samples(arm, control, level=0.8, method="crossed", resamples=4000)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.012)


@pytest.mark.parametrize("method", ["components", "crossed"])
def test_outcomes_mirror_and_repeat(method: Any) -> None:
    arm, control = outcomes(5, 60, seed=2)
    there, back = (paired_samples(a, b, method=method) for a, b in ((arm, control), (control, arm)))
    assert there.difference == -back.difference
    assert there.low == pytest.approx(-(back.high or 0), abs=1e-9)
    assert there.p_value == pytest.approx(back.p_value)
    assert there == paired_samples(arm, control, method=method)
    assert paired_samples(arm[:1], control[:1], method=method).low is None
    assert paired_samples(arm, arm, method=method).low is None
    said = verdict(there, 0.5).sentence
    assert said.endswith("5 seeds and 60 test samples")


def test_more_seeds_do_not_make_up_for_few_samples() -> None:
    """What seeds alone cannot say: with 20 test samples an interval of the task stays wide."""
    source = np.random.default_rng(5)
    base = source.random(20) < 0.5
    arm = np.tile(base, (10, 1)) ^ (source.random((10, 20)) < 0.05)
    control = np.tile(~base, (10, 1)) ^ (source.random((10, 20)) < 0.05)
    wide, narrow = paired_samples(arm, control), paired(
        by_seed(list(arm.mean(axis=1))), by_seed(list(control.mean(axis=1)))
    )  # fmt: skip
    assert (wide.high or 0) - (wide.low or 0) > 5 * ((narrow.high or 0) - (narrow.low or 0))


# -- verdicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "margin", "kind"),
    [
        (0.001, 0.02, 0.0, "better"),
        (0.0, 0.02, 0.01, "not worse"),
        (-0.009, 0.02, 0.01, "not worse"),
        (-0.008, -0.002, 0.01, "not worse"),
        (-0.01, 0.02, 0.01, "undecided"),
        (-0.03, -0.001, 0.01, "worse"),
        (-0.03, 0.0, 0.01, "undecided"),
        (-0.03, 0.03, 0.0, "undecided"),
        (None, None, 0.01, "undecided"),
    ],
)
def test_verdicts_by_hand(low: float | None, high: float | None, margin: float, kind: str) -> None:
    mean = 0.0 if low is None or high is None else (low + high) / 2
    assert verdict(made(low, high, mean), margin).kind == kind
    swapped = (None, None) if low is None or high is None else (-high, -low)
    assert verdict(made(*swapped, -mean), margin, scale=LOSS).kind == kind


@given(st.floats(-0.1, 0.1), st.floats(1e-4, 0.1), st.floats(0, 0.2), st.floats(0, 0.2))
def test_a_larger_margin_never_makes_it_worse(
    mean: float, half: float, one: float, other: float
) -> None:
    ranks = ["worse", "undecided", "not worse", "better"]
    found = made(mean - half, mean + half, mean)
    small, large = (ranks.index(verdict(found, m).kind) for m in sorted((one, other)))
    assert small <= large


NOT_WORSE, FROM = "not worse by 1.0 points or more", "95 % interval from"
SENTENCES: list[tuple[Paired, Scale, str]] = [
    (
        made(0.001, 0.015, 0.008),
        POINTS,
        "0.8 points better, 95 % interval 0.1 to 1.5, 5 seeds",
    ),
    (
        made(-0.021, -0.013, -0.017),
        POINTS,
        "1.70 points worse, 95 % interval 1.30 to 2.10, 5 seeds",
    ),
    (
        made(-0.006, 0.01, 0.002),
        POINTS,
        f"{NOT_WORSE}: 0.2 points better on average, {FROM} 0.6 worse to 1.0 better, 5 seeds",
    ),
    (
        made(-0.03, 0.03, 0.0),
        POINTS,
        f"undecided: no difference on average, {FROM} 3.0 worse to 3.0 better, 5 seeds",
    ),
    (
        made(-0.00004, 0.016, 0.008),
        POINTS,
        f"{NOT_WORSE}: 0.800 points better on average, {FROM} 0.004 worse to 1.600 better, 5 seeds",
    ),
    (
        made(None, None, -0.01, n=1),
        POINTS,
        "undecided: 1.0 points worse; one seed says nothing of chance",
    ),
    (
        made(None, None, 0.0, n=3),
        POINTS,
        "undecided: no difference; the same with each of 3 seeds, which says nothing of chance",
    ),
    (made(-0.9, -0.2, -0.55), LOSS, "0.55 nats better, 95 % interval 0.20 to 0.90, 5 seeds"),
    (made(0.4, 0.6, 0.5), LOSS, "0.50 nats worse, 95 % interval 0.40 to 0.60, 5 seeds"),
]


@pytest.mark.parametrize(("found", "scale", "sentence"), SENTENCES)
def test_sentences(found: Paired, scale: Scale, sentence: str) -> None:
    assert verdict(found, 0.01, scale=scale).sentence == sentence


def test_sentences_say_what_was_left_out_and_what_holds_together() -> None:
    scores = {"full": FULL, "a": FULL | {7: 0.5}, "b": {0: 0.5, 1: 0.54, 2: 0.51}}
    one, other = compare_arms(scores, "full", margin=0.02, **FAST)
    assert other.sentence.endswith("3 seeds, 3 seeds not common to all")
    assert "95 % interval (for 2 comparisons together)" in other.sentence
    assert (one.arm, other.arm) == ("a", "b")
    assert (other.paired.comparisons, other.paired.unpaired) == (2, 3)
    few = paired(by_seed([0.1, 0.2, 0.4]), by_seed([0.1, 0.1, 0.1]), method="studentized")
    assert verdict(few, 0.01).sentence.endswith("3 seeds give no interval by this method")


# -- several arms -----------------------------------------------------------------------------


def variance_of(values: NDArray[np.float64]) -> float:
    return float(sum((v - sum(values) / len(values)) ** 2 for v in values)) / (len(values) - 1)


@pytest.mark.parametrize("against", AGAINST)
def test_contrasts_agree_with_sums_written_out(against: Reference) -> None:
    scores = noise(5, 4)
    base = 0 if against == "control" else max(range(5), key=lambda i: sum(scores[i]))
    if against == "control":
        pairs = [(i, 0) for i in range(1, 5)]
    else:
        pairs = list(itertools.combinations(range(5), 2))
    average = sum(variance_of(scores[i] - scores[j]) for i, j in pairs) / len(pairs)
    for spread in SPREADS:
        difference, error = contrasts(scores, against=against, spread=spread)
        for i in range(5):
            own = variance_of(scores[i] - scores[base])
            variance = own if spread == "own" else max(own, average)
            assert difference[i] == pytest.approx(sum(scores[i] - scores[base]) / 4)
            assert error[i] == pytest.approx(math.sqrt(variance / 4))


@given(st.integers(0, 1000), st.sampled_from(AGAINST), st.sampled_from(SPREADS))
def test_good_and_bad_seeds_cancel(seed: int, against: Reference, spread: Spread) -> None:
    scores, shift = noise(4, 3, seed=seed), 5 * noise(3, seed=seed + 1)
    plain = contrasts(scores, against=against, spread=spread)
    moved = contrasts(scores + shift, against=against, spread=spread)
    assert moved[0] == pytest.approx(plain[0], abs=1e-9)
    assert moved[1] == pytest.approx(plain[1], abs=1e-9)


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("spread", SPREADS)
def test_an_interval_excludes_zero_just_where_p_is_small(
    against: Reference, spread: Spread
) -> None:
    scores = noise(300, 4, 3) + np.array([0, 1, 2, 6])[:, None]
    for level in (0.9, 0.95):
        _, low, high, p = simultaneous(scores, against=against, spread=spread, level=level, **FAST)
        outside = (low > 0) | (high < 0)
        assert outside.any()
        assert not outside.all()
        assert np.array_equal(outside, p <= 1 - level)


def test_two_arms_are_compared_by_t_itself() -> None:
    scores = noise(2, 5)
    one = paired(by_seed(list(scores[1])), by_seed(list(scores[0])))
    for spread in SPREADS:
        difference, low, high, p = (v[1] for v in simultaneous(scores, spread=spread))
        assert (difference, low, high, p) == pytest.approx(
            (one.difference, one.low, one.high, one.p_value)
        )


def test_the_bound_agrees_with_a_simulation_of_its_own() -> None:
    """Own spread, a steady control and noisy others: all by hand, with other random numbers."""
    source, largest = np.random.default_rng(77), []
    for scale in ([1, 1, 1, 1], [3, 1, 1, 1], [1, 1, 1, 3], [1, 1, 3, 3]):
        values = source.normal(size=(40_000, 4, 5)) * np.array(scale)[:, None]
        d = values[:, 1:] - values[:, :1]
        t = np.abs(d.mean(axis=2)) / (d.std(axis=2, ddof=1) / math.sqrt(5))
        largest.append(np.quantile(t.max(axis=1), 0.95))
    scores = noise(4, 5)
    difference, low, _, _ = simultaneous(scores, spread="own")
    error = contrasts(scores, spread="own")[1]
    assert ((difference - low) / np.where(error > 0, error, 1))[1:] == pytest.approx(
        max(largest), rel=0.03
    )


KINDS: Mapping[str, Callable[[], NDArray[np.float64]]] = {
    "equal": lambda: noise(4000, 8, 3),
    "one noisy arm": lambda: noise(4000, 8, 3) * np.array([1, 3, *[1] * 6])[:, None],
    "noisy control": lambda: noise(4000, 8, 3) * np.array([3, *[1] * 7])[:, None],
    "heavy tails": lambda: np.random.default_rng(0).standard_t(3, (4000, 8, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("against", AGAINST)
def test_equal_arms_are_seldom_told_apart(kind: str, against: Reference) -> None:
    scores = KINDS[kind]()
    p = simultaneous(scores, against=against, **FAST)[3]
    assert np.mean((p <= 0.05).any(axis=1)) < 0.06
    several = [contrasts(scores[:, [0, i]], spread="own") for i in range(1, 8)]
    t = np.stack([np.abs(mean[:, 1] / error[:, 1]) for mean, error in several])
    single = 2 * stats.t.sf(t, 2)
    assert np.mean((single <= 0.05).any(axis=0)) > 0.12  # what all this is for


def test_the_shared_spread_finds_what_the_own_spread_cannot() -> None:
    scores = noise(1000, 8, 3)
    scores[:, 1] += 3
    share = {s: np.mean(simultaneous(scores, spread=s, **FAST)[1][:, 1] > 0) for s in SPREADS}
    assert share["shared"] > 0.3
    assert share["own"] < 0.15


def test_arms_are_compared_with_the_control_in_order() -> None:
    scores = {
        "good": by_seed([0.9, 0.91, 0.9]),
        "full": by_seed([0.7, 0.72, 0.71]),
        "same": by_seed([0.71, 0.72, 0.70]),
        "bad": by_seed([0.5, 0.51, 0.5]),
    }
    found = compare_arms(scores, "full", margin=0.05)
    assert [(v.arm, v.kind) for v in found] == [
        ("good", "better"), ("same", "not worse"), ("bad", "worse"),
    ]  # fmt: skip
    assert [v.paired.comparisons for v in found] == [3, 3, 3]
    assert all(v.margin == 0.05 for v in found)
    p = [v.paired.p_value or 0 for v in found]
    assert p[0] < 0.05 < p[1]
    assert [v.kind for v in compare_arms(scores, "full", margin=0.05, scale=LOSS)] == [
        "worse", "not worse", "better",
    ]  # fmt: skip


def test_one_arm_with_equal_differences_leans_on_the_others() -> None:
    scores = {
        "full": by_seed([0.7, 0.72, 0.71]),
        "same": by_seed([0.7, 0.72, 0.71]),
        "other": by_seed([0.69, 0.73, 0.70]),
    }
    assert compare_arms(scores, "full", margin=0.05)[0].kind == "not worse"
    assert compare_arms(scores, "full", margin=0.05, spread="own")[0].kind == "undecided"


def test_the_winner_and_who_cannot_be_told_from_it() -> None:
    scores = {
        "bad": by_seed([0.5, 0.51, 0.5]),
        "near": by_seed([0.705, 0.712, 0.71]),
        "best": by_seed([0.71, 0.715, 0.709]),
        "also": by_seed([0.712, 0.7, 0.708]),
        "worst": by_seed([0.3, 0.33, 0.3]),
    }
    found = winner(scores)
    assert (found.best, found.n) == ("best", 3)
    assert found.indistinguishable == ("near", "also")
    assert found.behind == ("bad", "worst")
    assert found.sentence == (
        "best has the best mean, 71.1 points; near and also cannot be told from it; "
        "bad and worst are behind (95 % for all together, 3 seeds)"
    )
    assert found.differences["bad"] == pytest.approx(-0.208, abs=1e-3)
    least = winner(scores, scale=LOSS)
    assert (least.best, least.indistinguishable) == ("worst", ())
    assert least.differences["bad"] > 0
    assert "; all others are behind (" in least.sentence


@given(st.integers(0, 10_000), st.data())
def test_the_winner_does_not_hang_on_the_order_of_arms(seed: int, data: st.DataObject) -> None:
    values = noise(4, 3, seed=seed) + np.array([0, 0, 4, 9])[:, None]
    scores = {str(i): by_seed(list(row)) for i, row in enumerate(values)}
    order = data.draw(st.permutations(list(scores)))
    one, other = winner(scores, **FAST), winner({n: scores[n] for n in order}, **FAST)
    assert one.best == other.best
    assert set(one.behind) == set(other.behind)
    assert {one.best, *one.behind, *one.indistinguishable} == set(scores)
    assert all((one.p_values[n] or 1) <= 0.05 for n in one.behind)
    assert all((one.p_values[n] or 1) > 0.05 for n in one.indistinguishable)


def test_equal_arms_and_single_seeds_have_no_winner_alone() -> None:
    same = winner({"a": FULL, "b": FULL})
    assert (same.best, same.indistinguishable, same.behind) == ("a", ("b",), ())
    assert same.p_values == {"b": None}
    one = winner({"a": {0: 0.1}, "b": {0: 0.9, 1: 0.8}, "c": {0: 0.2}})
    assert (one.best, one.behind, one.n) == ("b", (), 1)
    assert one.sentence.endswith(
        "one seed says nothing of chance (95 % for all together, 1 seed, 1 seed not common to all)"
    )


# -- times ------------------------------------------------------------------------------------

times_of = st.lists(st.floats(0.5, 500), min_size=2, max_size=8)


@given(times_of, st.data())
def test_ratios_are_geometric_and_mirror(times: list[float], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.floats(0.5, 500), min_size=len(times), max_size=len(times)))
    there, back = ratio(by_seed(times), by_seed(other)), ratio(by_seed(other), by_seed(times))
    assert there.ratio == pytest.approx(stats.gmean(np.array(times) / other))
    assert there.ratio == pytest.approx(1 / (back.ratio or 0))
    assert (there.faster, there.slower) == (back.slower, back.faster)
    if there.low is not None:
        assert there.low == pytest.approx(1 / (back.high or 0))
        assert there.p_value == pytest.approx(back.p_value)
    hours = ratio(by_seed([t / 3600 for t in times]), by_seed([t / 3600 for t in other]))
    assert hours.ratio == pytest.approx(there.ratio)


def test_runs_without_a_time_leave_no_interval_but_are_told() -> None:
    arm = {0: 10.0, 1: None, 2: 30.0, 3: 5.0, 4: None, 5: 1.0}
    control = {0: 20.0, 1: 25.0, 2: None, 3: 5.0, 4: None}
    found = ratio(arm, control)
    assert (found.seeds, found.n, found.censored) == (5, 2, True)
    assert (found.arm_reached, found.control_reached) == (3, 3)
    assert (found.faster, found.slower) == (2, 1)  # seeds 0 and 2; seed 1; ties count for nobody
    assert found.ratio == pytest.approx(math.sqrt(0.5))
    assert (found.low, found.high) == (None, None)
    assert found.p_value == 1.0
    assert found.sentence == (
        "reached with 3 of 5 seeds, by the control with 3; 0.71 of the time where both did; "
        "faster with 2 seeds, slower with 1"
    )


def test_never_against_always_is_told_by_the_sign_test() -> None:
    found = ratio(dict.fromkeys(range(8)), by_seed([9.0] * 8))
    assert (found.ratio, found.n, found.arm_reached) == (None, 0, 0)
    assert (found.faster, found.slower) == (0, 8)
    assert found.p_value == pytest.approx(2 / 2**8)
    assert found.sentence.startswith("reached with 0 of 8 seeds, by the control with 8; faster")
    neither = ratio(dict.fromkeys(range(3)), dict.fromkeys(range(3)))
    assert (neither.p_value, neither.faster, neither.slower) == (None, 0, 0)


@pytest.mark.parametrize(
    ("arm", "control", "sentence"),
    [
        ([50.0, 66.0], [100.0, 120.0], "0.52 of the time, 95 % interval 0.29 to 0.96, 2 seeds"),
        ([150.0, 166.0], [100.0, 120.0],
         "1.44 times as long, 95 % interval 0.86 to 2.41: no difference shown, 2 seeds"),
        ([150.0], [100.0], "1.50 times as long with 1 seed, which says nothing of chance"),
        ([50.0, 50.0], [100.0, 100.0],
         "0.50 of the time with 2 seeds, which says nothing of chance"),
        ([1.0, 1.1], [80.0, 90.0], "0.012 of the time, 95 % interval 0.011 to 0.014, 2 seeds"),
    ],
)  # fmt: skip
def test_times_in_words(arm: list[float], control: list[float], sentence: str) -> None:
    assert ratio(by_seed(arm), by_seed(control)).sentence == sentence


curves = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 1) | st.just(math.nan)), max_size=12
).map(lambda points: sorted(points, key=lambda p: p[0]))


@given(curves, st.floats(0, 1), st.floats(0, 1))
def test_times_to_a_target(curve: list[tuple[float, float]], one: float, other: float) -> None:
    low, high = sorted((one, other))
    first, later = time_to_target(curve, low), time_to_target(curve, high)
    assert first == min((s for s, score in curve if score >= low), default=None)
    assert later is None or (first is not None and first <= later)
    mirrored = [(s, -score) for s, score in curve]
    assert time_to_target(mirrored, -low, goal="min") == first


# -- trade-offs -------------------------------------------------------------------------------

values_of = st.lists(st.integers(0, 4) | st.just(math.inf), min_size=2, max_size=2)


@given(st.lists(values_of, max_size=8), st.tuples(*[st.sampled_from(get_args(Goal))] * 2))
def test_the_front_agrees_with_the_definition(points: list[Any], goals: tuple[Goal, Goal]) -> None:
    def no_worse(a: Any, b: Any) -> list[bool]:
        return [x >= y if g == "max" else x <= y for x, y, g in zip(a, b, goals, strict=True)]

    named = {str(i): p for i, p in enumerate(points)}
    expected = [
        name
        for name, p in named.items()
        if not any(all(no_worse(q, p)) and not all(no_worse(p, q)) for q in points)
    ]
    assert pareto_front(named, goals) == tuple(expected)
    assert bool(expected) == bool(points)


def test_equal_points_share_the_front_and_missing_values_are_not_hidden() -> None:
    points = {"a": (1.0, 2.0), "b": (1.0, 2.0), "c": (1.0, 3.0), "d": (9.0, math.nan)}
    with pytest.raises(DataError, match="d with a value that is missing"):
        pareto_front(points, ("max", "min"))
    assert pareto_front(points, ("max", "min"), incomplete="leave out") == ("a", "b")
    assert pareto_front({"x": (None, 1.0)}, ("max", "max"), incomplete="leave out") == ()
    assert pareto_front({"x": (3.0,), "y": (3.0,), "z": (4.0,)}, ("min",)) == ("x", "y")
    assert pareto_front({}, ("max",)) == ()


# -- bad input --------------------------------------------------------------------------------

SMALL = {"a": {0: 0.1, 1: 0.2}, "b": {0: 0.2, 1: 0.4}}


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: paired({0: 0.1}, {1: 0.2}), DataError),
        (lambda: paired({}, {}), DataError),
        (lambda: paired({0: math.nan, 1: 0.1}, {0: 0.1, 1: 0.2}), DataError),
        (lambda: paired({0: None}, {0: 0.1}), DataError),  # type: ignore[dict-item]
        (lambda: paired({0: 0.1}, {0: 0.2}, level=95), UsageError),
        (lambda: paired({0: 0.1}, {0: 0.2}, method="magic"), UsageError),  # type: ignore[arg-type]
        (lambda: intervals([[1.0, math.inf]]), DataError),
        (lambda: intervals([]), DataError),
        (lambda: intervals(1.0), DataError),
        (lambda: intervals([1.0, 2.0], method="bca", resamples=10), UsageError),
        (lambda: paired_samples([[1, 0]], [[1, 0, 1]]), DataError),
        (lambda: paired_samples([1, 0], [1, 0]), DataError),
        (lambda: paired_samples([[1], [0]], [[1], [0]]), DataError),
        (lambda: paired_samples([[0.5, 1.0]], [[1, 0]]), DataError),
        (lambda: paired_samples([[1, 0]], [[1, 0]], method="t"), UsageError),  # type: ignore[arg-type]
        (lambda: verdict(made(0.1, 0.2, 0.15), -0.01), UsageError),
        (lambda: verdict(made(0.1, 0.2, 0.15), math.nan), UsageError),
        (lambda: contrasts([1.0, 2.0]), DataError),
        (lambda: contrasts([[1.0, 2.0]]), DataError),
        (lambda: contrasts([[1.0], [2.0]]), DataError),
        (lambda: contrasts([[1.0, 2.0], [3.0, math.nan]]), DataError),
        (lambda: simultaneous([[1.0, 2.0], [3.0, 5.0]], draws=10), UsageError),
        (lambda: simultaneous([[1.0, 2.0], [3.0, 5.0]], level=0.99999), UsageError),
        (lambda: simultaneous([[1.0, 2.0], [3.0, 5.0]], spread="none"), UsageError),  # type: ignore[arg-type]
        (lambda: compare_arms(SMALL, "c", margin=0.1), UsageError),
        (lambda: compare_arms({"a": SMALL["a"]}, "a", margin=0.1), UsageError),
        (lambda: compare_arms({}, "a", margin=0.1), UsageError),
        (lambda: compare_arms(SMALL | {"c": {5: 0.1}}, "a", margin=0.1), DataError),
        (lambda: winner({"a": SMALL["a"]}), UsageError),
        (lambda: winner({}), UsageError),
        (lambda: ratio({0: 1.0}, {1: 1.0}), DataError),
        (lambda: ratio({0: 0.0}, {0: 1.0}), DataError),
        (lambda: ratio({0: 1.0}, {0: math.inf}), DataError),
        (lambda: ratio({0: 1.0}, {0: 2.0}, level=1), UsageError),
        (lambda: time_to_target([(2.0, 0.1), (1.0, 0.2)], 0.1), DataError),
        (lambda: time_to_target([(math.nan, 0.1)], 0.1), DataError),
        (lambda: time_to_target([(1.0, 0.1)], math.nan), UsageError),
        (lambda: time_to_target([(1.0, 0.1)], 0.1, goal="up"), UsageError),  # type: ignore[arg-type]
        (lambda: pareto_front({"a": (1.0,)}, ("max", "min")), DataError),
        (lambda: pareto_front({"a": ()}, ()), UsageError),
        (lambda: pareto_front({"a": (1.0,)}, ("up",)), UsageError),  # type: ignore[arg-type]
        (lambda: pareto_front({"a": (1.0,)}, ("max",), incomplete="keep"), UsageError),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused_in_plain_words(
    call: Callable[[], Any], kind: type[FrostlineError]
) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.found
    assert caught.value.fix


# -- what was measured ------------------------------------------------------------------------

LOG = Path(__file__).parents[2] / "benchmarks" / "results" / "statistics_truth.json"


def test_the_defaults_are_those_that_kept_their_promise() -> None:
    """What the docstrings say of the defaults, held against the log of the benchmark."""
    rows = json.loads(LOG.read_text("utf-8"))["results"]
    cover = [r for r in rows if r["part"] == "coverage"]
    plain = [r["holds"] for r in cover if r["method"] == "t" and r["noise"] != "skewed"]
    assert min(plain) > 0.93
    assert min(r["holds"] for r in cover if r["method"] == "t") > 0.87
    few = [r for r in cover if r["seeds"] <= 5 and r["method"] in {"percentile", "bca"}]
    assert max(r["holds"] for r in few) < 0.86
    false = [r for r in rows if r["part"] == "false"]
    for rule in ("shared", "winner_shared"):
        assert max(r[rule] for r in false if r["noise"] != "skewed") < 0.056
        assert max(r[rule] for r in false) < 0.09
    power = {(r["gap"], r["arms"], r["seeds"]): r for r in rows if r["part"] == "power"}
    assert power[2, 8, 3]["shared"] > 2 * power[2, 8, 3]["own"]
    assert abs(power[2, 8, 5]["own"] - power[2, 8, 5]["holm"]) < 0.03
    samples = [r for r in rows if r["part"] == "samples" and r["method"] == "components"]
    assert min(r["holds"] for r in samples) > 0.92
