"""Scores of frozen features against slow textbook versions, their ranges and what they ignore."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, norm
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from frostline.errors import DataError, UsageError
from frostline.study.transferability import (
    Probe,
    gbc,
    h_score,
    leep,
    linear_probe,
    logme,
    nce,
    shrunk_h_score,
)

Array = NDArray[Any]
OF_FEATURES: tuple[Callable[..., float], ...] = (logme, h_score, shrunk_h_score, gbc)
# Entry by entry: samples, features, classes, distance between class means.
SHAPES = ((60, 5, 3, 1.0), (40, 12, 2, 0.5), (90, 4, 6, 3.0), (30, 50, 3, 1.0))


def made(
    samples: int = 60, width: int = 5, classes: int = 3, apart: float = 1.0, seed: int = 0
) -> tuple[Array, Array]:
    """Features of Gaussian classes, mixed so that they depend on each other; every class is in."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(samples) % classes)
    means = rng.normal(size=(classes, width)) * apart
    mixed = (means[labels] + rng.normal(size=(samples, width))) @ rng.normal(size=(width, width))
    return mixed + rng.normal(size=width), labels


# -- parity -----------------------------------------------------------------------------------


def textbook_logme(features: Array, labels: Array) -> float:
    """Algorithm 1 with whole matrices; the evidence as the density of a multivariate Gaussian."""
    n, d = features.shape
    total = []
    for kind in np.unique(labels):
        y = (labels == kind).astype(float)
        alpha = beta = 1.0
        for _ in range(300):
            inverse = np.linalg.inv(alpha * np.eye(d) + beta * features.T @ features)
            m = beta * inverse @ features.T @ y
            gamma = float(np.trace(inverse @ (beta * features.T @ features)))
            alpha = gamma / float(m @ m)
            beta = (n - gamma) / float(np.sum((features @ m - y) ** 2))
        total.append(evidence(features, y, alpha, beta))
    return float(np.mean(total)) / n


def evidence(features: Array, y: Array, alpha: float, beta: float) -> float:
    covariance: Any = np.eye(len(y)) / beta + features @ features.T / alpha
    return float(multivariate_normal(np.zeros(len(y)), covariance).logpdf(y))


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_logme_is_that_of_the_textbook(shape: tuple[int, int, int, float]) -> None:
    features, labels = made(*shape)
    assert logme(features, labels) == pytest.approx(textbook_logme(features, labels), abs=1e-7)


def test_logme_is_the_largest_evidence() -> None:
    features, labels = made(50, 4, 2)
    best = []
    for kind in (0, 1):
        y = (labels == kind).astype(float)
        found = minimize(
            lambda logs, y=y: -evidence(features, y, *np.exp(logs)), (0, 0), method="Nelder-Mead"
        )
        best.append(-found.fun / len(y))
    assert logme(features, labels) == pytest.approx(np.mean(best), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_h_scores_are_those_of_the_textbook(shape: tuple[int, int, int, float]) -> None:
    features, labels = made(*shape)
    means = np.stack([features[labels == kind].mean(0) for kind in labels])
    between = np.cov(means, rowvar=False, bias=True)
    plain = np.trace(np.linalg.inv(np.cov(features, rowvar=False, bias=True)) @ between)
    assert h_score(features, labels) == pytest.approx(plain)
    covariance, shrinkage = ledoit_wolf(features)
    shrunk = np.trace(np.linalg.inv(covariance) @ between) * (1 - shrinkage)
    assert shrunk_h_score(features, labels) == pytest.approx(shrunk)


def test_the_shrunk_h_score_is_that_of_the_textbook_with_more_features_than_samples() -> None:
    features, labels = made(*SHAPES[3])
    means = np.stack([features[labels == kind].mean(0) for kind in labels])
    between = np.cov(means, rowvar=False, bias=True)
    covariance, shrinkage = ledoit_wolf(features)
    wanted = np.trace(np.linalg.solve(covariance, between)) * (1 - shrinkage)
    assert shrunk_h_score(features, labels) == pytest.approx(wanted)


@pytest.mark.parametrize("covariance", ["diagonal", "spherical"])
def test_gbc_is_minus_the_integrals_of_overlapping_densities(covariance: Any) -> None:
    features, labels = made(45, 4, 3, 0.7)
    x = PCA(2).fit_transform(features)
    stats = [(x[labels == k].mean(0), x[labels == k].var(0, ddof=1)) for k in range(3)]
    if covariance == "spherical":
        stats = [(m, np.full(2, v.mean())) for m, v in stats]
    wanted = 0.0
    for (m, v), (n, w) in itertools.permutations(stats, 2):
        wanted += math.prod(overlap(*each) for each in zip(m, v, n, w, strict=True))
    found = gbc(features, labels, covariance=covariance, dimensions=2)
    assert found == pytest.approx(-wanted, rel=1e-6)


def overlap(m: float, v: float, n: float, w: float) -> float:
    """Integral of the root of the product of two normal densities."""
    middle, wide = (m + n) / 2, abs(m - n) + 12 * math.sqrt(max(v, w))

    def both(t: float) -> float:
        return math.sqrt(norm.pdf(t, m, math.sqrt(v)) * norm.pdf(t, n, math.sqrt(w)))

    return quad(both, middle - wide, middle + wide, limit=200)[0]


def test_leep_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(3)
    theta, labels = rng.dirichlet(np.ones(4), 30), rng.integers(0, 3, 30)
    joint: Counter[tuple[int, int]] = Counter()
    for row, label in zip(theta, labels, strict=True):
        for z, probability in enumerate(row):
            joint[int(label), z] += probability / len(theta)
    total = {z: sum(joint[y, z] for y in range(3)) for z in range(4)}
    wanted = [
        math.log(sum(joint[int(y), z] / total[z] * p for z, p in enumerate(row)))
        for row, y in zip(theta, labels, strict=True)
    ]
    assert leep(theta, labels) == pytest.approx(sum(wanted) / len(wanted))


def entropy(labels: Array) -> float:
    shares = np.bincount(labels) / len(labels)
    return -float(sum(p * math.log(p) for p in shares if p))


def test_nce_is_mutual_information_minus_entropy() -> None:
    rng = np.random.default_rng(4)
    source, labels = rng.integers(0, 5, 40) * 7, rng.integers(0, 3, 40)
    assert nce(source, labels) == pytest.approx(mutual_info_score(source, labels) - entropy(labels))


def test_the_probe_is_that_of_the_library() -> None:
    features, labels = made(80, 6, 4, 0.5)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    cut = StratifiedKFold(4, shuffle=True, random_state=9)
    predicted: Any = cross_val_predict(pipeline, features, labels, cv=cut)
    wanted = predicted == labels
    found = linear_probe(features, labels, folds=4, strength=0.3, seed=9)
    assert found.correct.tolist() == wanted.tolist()
    assert 0 < found.accuracy < 1
    assert found.settled


def test_wilsons_interval() -> None:
    probe = Probe(np.array([True] * 30 + [False] * 10), folds=5)
    z, n, p = norm.ppf(0.975), 40, 0.75
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wanted = [(middle + side * half) / (1 + z * z / n) for side in (-1, 1)]
    assert probe.interval() == pytest.approx(wanted)


# -- properties -------------------------------------------------------------------------------

cases = st.builds(
    made,
    samples=st.integers(12, 60),
    width=st.integers(1, 20),
    classes=st.integers(2, 5),
    apart=st.floats(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
some = settings(max_examples=20)


@given(cases, st.integers(0, 1000))
@some
def test_order_and_numbers_of_classes_do_not_matter(case: tuple[Array, Array], seed: int) -> None:
    features, labels = case
    rng = np.random.default_rng(seed)
    order, numbers = rng.permutation(len(labels)), rng.permutation(int(labels.max()) + 1) * 3 - 4
    for score in OF_FEATURES:
        again = score(features[order], numbers[labels[order]])
        assert again == pytest.approx(score(features, labels), rel=1e-6, abs=1e-6)


@given(cases)
@some
def test_scores_stay_in_their_ranges(case: tuple[Array, Array]) -> None:
    features, labels = case
    classes = int(labels.max()) + 1
    most = min(classes - 1, features.shape[1])
    plain, shrunk = h_score(features, labels), shrunk_h_score(features, labels)
    assert -1e-9 <= shrunk <= plain + 1e-9
    assert plain <= most + 1e-9
    assert -classes * (classes - 1) - 1e-9 <= gbc(features, labels) <= 0
    assert math.isfinite(logme(features, labels))


@given(cases, st.integers(0, 1000))
@some
def test_turning_the_features_does_not_matter(case: tuple[Array, Array], seed: int) -> None:
    features, labels = case
    width = features.shape[1]
    turned = features @ np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    for score in OF_FEATURES:
        assert score(turned, labels) == pytest.approx(score(features, labels), rel=1e-6, abs=1e-6)


@given(cases, st.floats(1e-3, 1e3))
@some
def test_the_unit_of_features_matters_to_no_score_of_spread(
    case: tuple[Array, Array], unit: float
) -> None:
    features, labels = case
    for score in OF_FEATURES[1:]:
        again = score(unit * features + 3 * unit, labels)
        assert again == pytest.approx(score(features, labels), rel=1e-6, abs=1e-6)


heads = st.tuples(st.integers(6, 40), st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**31))


@given(heads, st.floats(0.05, 20))
@some
def test_leep_and_nce_lie_between_the_entropy_and_nothing(
    head: tuple[int, int, int, int], even: float
) -> None:
    samples, sources, classes, seed = head
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    theta = rng.dirichlet(np.full(sources, even), samples)
    # One step of expectation and maximisation from P(y | z) = P(y), whose likelihood is -H(Y).
    assert -entropy(labels) - 1e-9 <= leep(theta, labels) <= 0
    hard = theta.argmax(1)
    assert -entropy(labels) - 1e-9 <= nce(hard, labels) <= 0
    assert nce(hard, labels) == pytest.approx(leep(np.eye(sources)[hard], labels), abs=1e-12)


@given(st.integers(0, 1000))
@settings(max_examples=3)
def test_every_score_prefers_true_labels_to_shuffled_ones(seed: int) -> None:
    features, labels = made(60, 5, 3, 4.0, seed)
    shuffled = np.random.default_rng(seed).permutation(labels)
    for score in OF_FEATURES:
        assert score(features, labels) > score(features, shuffled)
    assert linear_probe(features, labels).accuracy > linear_probe(features, shuffled).accuracy


# -- edges ------------------------------------------------------------------------------------


def test_a_class_of_one_sample_is_scored_and_counts_as_wrong() -> None:
    features, labels = made(40, 3, 2, 5.0)
    features, labels = np.vstack([features, [[30.0, 0, 0]]]), np.append(labels, 9)
    for score in OF_FEATURES:
        assert math.isfinite(score(features, labels))
    probe = linear_probe(features, labels)
    assert not probe.correct[-1]
    assert probe.accuracy > 0.9


def test_gbc_gives_a_class_of_one_sample_the_common_variance() -> None:
    features = np.array([[-1.0], [1.0], [3.0], [5.0], [2.0]])
    labels = np.array([0, 0, 1, 1, 2])
    # Two classes of variance 2 around 0 and 4, one around 2 that is given 2.
    wanted = sum(math.exp(-(d**2) / 16) for d in (4, 4, 2, 2, 2, 2))
    assert gbc(features, labels) == pytest.approx(-wanted)


def test_fewer_folds_where_classes_are_small() -> None:
    features, labels = made(9, 2, 3)
    assert linear_probe(features, labels, folds=5).folds == 3


def test_with_as_many_features_as_samples_the_plain_h_score_says_nothing() -> None:
    features, labels = made(20, 40, 4, 0.0)
    assert h_score(features, labels) == pytest.approx(3)
    assert shrunk_h_score(features, labels) < 3
    assert math.isfinite(logme(features, labels))
    assert math.isfinite(gbc(features, labels))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_constant_features_are_worth_nothing(value: float) -> None:
    labels = np.array([0, 1, 2] * 7)
    features = np.full((21, 4), value)
    assert h_score(features, labels) == 0
    assert shrunk_h_score(features, labels) == 0
    assert gbc(features, labels) == -6
    assert linear_probe(features, labels).accuracy == pytest.approx(1 / 3, abs=0.1)


def test_logme_of_no_features_is_the_evidence_of_noise() -> None:
    labels = np.array([0, 1] * 8)
    # Half of each indicator is 1: variance 1/2 around zero.
    wanted = norm.logpdf(labels, 0, math.sqrt(0.5)).mean()
    assert logme(np.zeros((16, 3)), labels) == pytest.approx(wanted)


def test_a_constant_column_changes_nothing_but_the_evidence() -> None:
    features, labels = made(40, 3, 3)
    wide = np.hstack([features, np.full((40, 1), 0.1)])
    assert h_score(wide, labels) == pytest.approx(h_score(features, labels))
    assert gbc(wide, labels) == pytest.approx(gbc(features, labels))
    assert logme(wide, labels) != pytest.approx(logme(features, labels))


def test_a_perfect_fit_has_a_bound() -> None:
    labels = np.array([0, 1, 2] * 5)
    score = logme(np.eye(3)[labels], labels)
    assert 5 < score < 8.5
    assert logme(np.eye(3)[labels] + made(15, 3, 3)[0] * 0.01, labels) < score


@pytest.mark.parametrize("score", [*OF_FEATURES, linear_probe])
@pytest.mark.parametrize(
    ("features", "labels", "found"),
    [
        (np.ones((4, 2)), [1, 1, 1, 1], "one class"),
        (np.ones((4, 2)), [0, 1, 0], "for 3 labels"),
        (np.ones(4), [0, 1, 0, 1], "shape (4,)"),
        (np.ones((4, 0)), [0, 1, 0, 1], "shape (4, 0)"),
        (np.array([[1.0], [np.nan], [np.inf], [2.0]]), [0, 1, 0, 1], "in 2 of 4 samples"),
        (np.ones((4, 2)), ["a", "b", "a", "b"], "type <U1"),
        (np.ones((4, 2)), [0.0, 1.0, 0.5, 1.0], "type float64"),
        (np.ones((0, 2)), np.zeros(0, int), "classes of shape (0,)"),
    ],
)
def test_what_cannot_be_scored_gets_one_message(
    score: Callable[..., Any], features: Array, labels: Any, found: str
) -> None:
    with pytest.raises(DataError) as error:
        score(features, labels)
    assert found in error.value.found
    assert error.value.fix


@pytest.mark.parametrize("score", [gbc, linear_probe])
def test_classes_of_one_sample_each_have_no_spread(score: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="no class with two samples"):
        score(np.arange(6.0).reshape(3, 2), [0, 1, 2])


@pytest.mark.parametrize(
    "theta", [np.full((4, 2), 0.4), np.array([[1.5, -0.5]] * 4), np.full((4, 2), 1.0)]
)
def test_rows_that_are_no_probabilities_are_refused(theta: Array) -> None:
    with pytest.raises(DataError, match="no probabilities"):
        leep(theta, [0, 1, 0, 1])


def test_one_class_is_refused_of_a_head_too() -> None:
    with pytest.raises(DataError, match="one class"):
        leep(np.full((3, 2), 0.5), [1, 1, 1])
    with pytest.raises(DataError, match="one class"):
        nce([0, 1, 2], [1, 1, 1])


@pytest.mark.parametrize("bad", [{"folds": 1}, {"strength": 0.0}, {"strength": math.nan}])
def test_settings_of_the_probe_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cross-validation"):
        linear_probe(*made(), **bad)


@pytest.mark.parametrize("bad", [{"dimensions": 0}, {"covariance": "full"}])
def test_settings_of_gbc_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="GBC"):
        gbc(*made(), **bad)
