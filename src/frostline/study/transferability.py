"""Scores that rank pretrained models for a data set before any training.

All read what enters a model's head, computed once for samples with known classes. A higher score
says that the classes are told apart more easily. In the table K is the number of classes, Y the
class of a sample, H(Y) its entropy in nats:

==================  ==================  =========================  ==============================
score               reads               range                      source
==================  ==================  =========================  ==============================
`linear_probe`      features            accuracy in [0, 1]         cross-validation
`logme`             features            nats, no bound below       You et al. 2021
`h_score`           features            [0, min(K - 1, D)]         Bao et al. 2019
`shrunk_h_score`    features            [0, min(K - 1, D)]         Ibrahim et al. 2021
`gbc`               features            [-K (K - 1), 0]            Pándy et al. 2022
`leep`              source classes      nats, [-H(Y), 0]           Nguyen et al. 2020
`nce`               source classes      nats, [-H(Y), 0]           Tran et al. 2019
==================  ==================  =========================  ==============================

Features are (N, D) arrays, labels (N,) arrays of whole numbers, which need not be 0 to K - 1. No
score changes when the samples are put in another order, nor, but for the folds of the probe, when
the classes are numbered otherwise.

References:
    You, Liu, Wang, Long 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer
    Learning", ICML, arXiv:2102.11005.
    Bao, Li, Huang, Zhang, Zheng, Zamir, Guibas 2019, "An Information-Theoretic Approach to
    Transferability in Task Transfer Learning", ICIP.
    Ibrahim, Ponomareva, Mazumder 2021, "Newer is not always better: Rethinking transferability
    metrics, their peculiarities, stability and performance", arXiv:2110.06893.
    Pándy, Agostinelli, Uijlings, Ferrari, Mensink 2022, "Transferability Estimation using
    Bhattacharyya Class Separability", CVPR, arXiv:2111.12780.
    Nguyen, Hassner, Seeger, Archambeau 2020, "LEEP: A New Measure to Evaluate Transferability of
    Learned Representations", ICML, arXiv:2002.12462.
    Tran, Nguyen, Hassner 2019, "Transferability and Hardness of Supervised Classification Tasks",
    ICCV, arXiv:1908.08142.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from frostline.errors import DataError, UsageError

__all__ = ["Probe", "gbc", "h_score", "leep", "linear_probe", "logme", "nce", "shrunk_h_score"]

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]

#: The least variance of the noise in `logme`: a perfect fit would have infinite evidence.
_LEAST_NOISE = 1e-8
#: Bounds of the ratio of its precisions, relative to the largest squared singular value.
_RATIO_BOUND = 1e12
_ITERATIONS = 500
_SETTLED = 1e-9
_SOLVER_ITERATIONS = 1000


# -- a probe ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """What a cross-validated linear classifier got right.

    Attributes:
        correct: bool (N,), whether each sample was classified rightly by the classifier that had
            not seen it.
        folds: parts that the samples were cut into.
        settled: whether every classifier was trained until its loss no longer fell.
    """

    correct: NDArray[np.bool_]
    folds: int
    settled: bool = True

    @property
    def accuracy(self) -> float:
        """Share of samples classified rightly, in [0, 1]."""
        return float(self.correct.mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy, for the classifier as it is.

        It covers which samples came, not which were trained on.

        Args:
            confidence: in (0, 1).

        Example:
            >>> low, high = Probe(np.array([True] * 8 + [False] * 2), folds=5).interval()
            >>> print(f"{low:.2f} to {high:.2f}")
            0.49 to 0.94
        """
        result = binomtest(int(self.correct.sum()), len(self.correct))
        found = result.proportion_ci(confidence_level=confidence, method="wilson")
        return float(found.low), float(found.high)


def linear_probe(
    features: ArrayLike, labels: ArrayLike, *, folds: int = 5, strength: float = 0.1, seed: int = 0
) -> Probe:
    """Classify by logistic regression on standardised features, cross-validated.

    The samples are cut into folds with the same share of each class; each is classified by a
    regression trained on the others, whose means and deviations also standardise it. A class of
    one sample is never known when it is asked for, and counts as wrong.

    Args:
        features: (N, D), finite.
        labels: (N,) whole numbers.
        folds: parts, >= 2; fewer where no class has as many samples.
        strength: inverse of the L2 penalty, > 0. On 13 pairs of model and data set 0.1 lost at
            most 4 points to the best of 0.001, 0.01, 0.1 and 1; each of the others more.
        seed: of the cut.

    Raises:
        DataError: features or labels that cannot be used, one class, or no class with two samples.
        UsageError: fewer than two folds, or no strength.

    Example:
        >>> linear_probe([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]], [0, 0, 0, 1, 1, 1]).accuracy
        1.0
    """
    if folds < 2 or not strength > 0:
        raise UsageError(
            "probe features by cross-validation",
            found=f"{folds} folds and a strength of {strength:g}",
            fix="folds of at least 2, a strength above 0",
        )
    x, codes = _checked(features, labels, "probe features by cross-validation")
    sizes = np.bincount(codes)
    if sizes.max() < 2:
        raise DataError(
            "probe features by cross-validation",
            found="no class with two samples",
            fix="at least two samples of a class",
        )
    folds = min(folds, int(sizes.max()))
    correct, settled = np.zeros(len(codes), dtype=bool), True
    for train, test in _folds(codes, folds, seed):
        if len(np.unique(codes[train])) == 1:
            correct[test] = codes[test] == codes[train][0]
            continue
        predicted, done = _classified(x[train], codes[train], x[test], strength)
        correct[test], settled = predicted == codes[test], settled and done
    return Probe(correct, folds, settled)


def _folds(codes: Codes, folds: int, seed: int) -> list[tuple[Codes, Codes]]:
    cut = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Classes smaller than the number of folds are in some of them only, as documented.
        warnings.filterwarnings("ignore", message="The least populated class")
        return list(cut.split(np.zeros(len(codes)), codes))


def _classified(x: Floats, codes: Codes, new: Floats, strength: float) -> tuple[Codes, bool]:
    """Predicted classes, and whether the training settled."""
    regression = LogisticRegression(C=strength, max_iter=_SOLVER_ITERATIONS)
    steps = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # told by `settled`
        steps.fit(x, codes)
    return steps.predict(new), int(np.max(regression.n_iter_)) < _SOLVER_ITERATIONS


# -- scores of features -----------------------------------------------------------------------


def logme(features: ArrayLike, labels: ArrayLike) -> float:
    """Log of the maximum evidence of a Bayesian linear model, per sample, mean over classes.

    For the indicator y in {0, 1}^N of each class: y ~ N(F w, I / beta), w ~ N(0, I / alpha).
    With A = alpha I + beta F'F and m = beta A^-1 F'y the log evidence is

        N/2 log beta + D/2 log alpha - N/2 log 2 pi - beta/2 |F m - y|^2 - alpha/2 m'm
        - 1/2 log det A,

    and is maximised by the fixed point alpha = gamma / m'm, beta = (N - gamma) / |F m - y|^2,
    where gamma = sum of beta s^2 / (alpha + beta s^2) over the singular values s of F, from
    alpha = beta = 1 on. All of it is computed in the basis of the singular vectors, where one
    iteration takes min(N, D) steps per class; D > N needs no special care.

    The variance 1 / beta is kept at 1e-8 or above: where features fit the indicators perfectly
    the evidence has no bound, and the score is then about 8.3. Features without any use (all
    zero) give the evidence of noise alone.

    Args:
        features: (N, D), finite. They are used as they are: neither centred nor scaled.
        labels: (N,) whole numbers.

    Returns:
        Nats per sample, mean over classes. It compares models on the same samples, not data sets.

    Raises:
        DataError: features or labels that cannot be used, or one class.

    References:
        You et al. 2021, algorithm 1. The fixed point is shown to converge in You, Liu, Zhang,
        Wang, Jordan, Long 2022, "Ranking and Tuning Pre-trained Models", JMLR, arXiv:2110.10545.

    Example:
        >>> labels = np.array([0, 0, 1, 1])
        >>> logme([[1.0, 0.1], [1.1, 0.0], [0.1, 1.0], [0.0, 0.9]], labels) > logme(
        ...     [[1.0, 0.1], [0.1, 1.0], [1.1, 0.0], [0.0, 0.9]], labels
        ... )
        True
    """
    x, codes = _checked(features, labels, "score features by LogME")
    indicators = np.eye(int(codes.max()) + 1)[codes]  # (N, K)
    left, singular = _basis(x)
    along = left.T @ indicators  # (R, K)
    # What of each indicator no feature can reach; nothing where the features span everything.
    spans = len(singular) == len(x)
    beyond = 0.0 if spans else np.maximum(0.0, indicators.sum(0) - np.square(along).sum(0))
    return float(_evidence(singular[:, None], along, beyond, len(x)).mean() / len(x))


def _evidence(
    singular: Floats, along: Floats, beyond: Floats | float, samples: int
) -> NDArray[np.float64]:
    """Largest log evidence per indicator (K,), by the fixed point in t = alpha / beta.

    Args:
        singular: (R, 1).
        along: the indicators in the left singular basis (R, K).
        beyond: squared length of the rest of each indicator (K,), or 0.
        samples: N.
    """
    squared, reach = singular**2, along**2
    scale = float(squared.max(initial=1e-300))
    ratio, before = np.ones(along.shape[1]), np.full(along.shape[1], -np.inf)
    evidence = before
    for _ in range(_ITERATIONS):
        shrunk = 1 / (ratio + squared)
        used = (squared * shrunk).sum(0)  # gamma
        free = samples - len(squared) + (ratio * shrunk).sum(0)  # N - gamma, without cancelling
        weights = (squared * reach * shrunk**2).sum(0)  # m'm
        left = (ratio**2 * reach * shrunk**2).sum(0) + beyond  # |F m - y|^2
        noise = np.maximum(left / np.maximum(free, 1e-300), _LEAST_NOISE)  # 1 / beta
        evidence = -0.5 * (
            samples * np.log(2 * np.pi * noise)
            + (left + ratio * weights) / noise
            + np.log1p(squared / ratio).sum(0)
        )
        if np.all(np.abs(evidence - before) <= _SETTLED * samples):
            break
        before = evidence
        wanted = used * noise / np.maximum(weights, 1e-300)
        ratio = np.clip(wanted, scale / _RATIO_BOUND, scale * _RATIO_BOUND)
    return evidence


def h_score(features: ArrayLike, labels: ArrayLike) -> float:
    """Variance between classes relative to all variance of the features.

    H = tr(cov(f)^-1 cov(E[f | Y])), with the pseudo-inverse where features depend on each other.
    Where D >= N - 1 the features can tell any classes apart and the score is K - 1 whatever they
    are: use `shrunk_h_score` then.

    Args:
        features: (N, D), finite.
        labels: (N,) whole numbers.

    Returns:
        A number in [0, min(K - 1, D)]; 0 where the features are constant. It does not change when
        the features are mapped by any linear map that loses nothing.

    Raises:
        DataError: features or labels that cannot be used, or one class.

    References:
        Bao et al. 2019, the definition of the H-score.

    Example:
        >>> round(h_score([[0.0], [0.0], [1.0], [1.0], [0.0], [1.0]], [0, 0, 1, 1, 1, 0]), 4)
        0.1111
    """
    x, codes = _checked(features, labels, "score features by H-score")
    left, _ = _basis(_centred(x))
    return float(_between(left, codes).sum())


def shrunk_h_score(features: ArrayLike, labels: ArrayLike) -> float:
    """The H-score with a covariance shrunk towards a sphere, which many features need.

    H = tr(S^-1 (1 - a) cov(E[f | Y])) with S = (1 - a) cov(f) + a tr(cov(f)) / D I, where a is the
    shrinkage of Ledoit and Wolf.

    Args:
        features: (N, D), finite.
        labels: (N,) whole numbers.

    Returns:
        A number in [0, min(K - 1, D)]; 0 where the features are constant. It does not change when
        the features are rotated or scaled as a whole.

    Raises:
        DataError: features or labels that cannot be used, or one class.

    References:
        Ibrahim et al. 2021. Ledoit and Wolf 2004, "A well-conditioned estimator for
        large-dimensional covariance matrices", Journal of Multivariate Analysis 88.

    Example:
        >>> x = [[0.0, 0.1], [0.1, 0.0], [1.0, 1.1], [1.1, 1.0]]
        >>> 0 < shrunk_h_score(x, [0, 0, 1, 1]) < h_score(x, [0, 0, 1, 1])
        True
    """
    x, codes = _checked(features, labels, "score features by H-score")
    centred = _centred(x)
    left, singular = _basis(centred)
    if not len(singular):
        return 0.0
    shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    variances = singular**2 / len(x)
    kept = (1 - shrinkage) * variances
    sphere = shrinkage * variances.sum() / x.shape[1]
    return float((_between(left, codes) * kept / (kept + sphere)).sum())


def gbc(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    covariance: Literal["diagonal", "spherical"] = "diagonal",
    dimensions: int = 64,
) -> float:
    """Minus the overlap of classes, each seen as a Gaussian.

    GBC = - sum over ordered pairs i != j of exp(-B(i, j)) with the Bhattacharyya distance

        B = 1/8 d' S^-1 d + 1/2 log(det S / sqrt(det S_i det S_j)),  d = m_i - m_j,
        S = (S_i + S_j) / 2,

    in the first principal components of the features. A class of one sample, whose variance
    cannot be told, gets the one that the other classes have in common.

    Args:
        features: (N, D), finite.
        labels: (N,) whole numbers.
        covariance: "diagonal": a variance for each component; "spherical": one for all.
        dimensions: principal components, at most, >= 1; 64, the paper's.

    Returns:
        A number in [-K (K - 1), 0]; the least where the features are constant.

    Raises:
        DataError: features or labels that cannot be used, one class, or no class with two samples.
        UsageError: no dimensions, or a covariance of another kind.

    References:
        Pándy et al. 2022, section 3.

    Example:
        >>> x = [[0.0], [0.2], [1.0], [1.2]]
        >>> gbc(x, [0, 0, 1, 1]) > gbc(x, [0, 1, 0, 1])
        True
    """
    if dimensions < 1 or covariance not in ("diagonal", "spherical"):
        raise UsageError(
            "score features by GBC",
            found=f"{dimensions} dimensions and the covariance {covariance!r}",
            fix="at least 1 dimension; 'diagonal' or 'spherical'",
        )
    x, codes = _checked(features, labels, "score features by GBC")
    left, singular = _basis(_centred(x))
    classes = int(codes.max()) + 1
    if not len(singular):
        return float(-classes * (classes - 1))
    components = (left * singular)[:, :dimensions]
    means, variances = _gaussians(components, codes)
    if covariance == "spherical":
        variances = np.broadcast_to(variances.mean(1, keepdims=True), variances.shape)
    return -sum(_overlaps(means, variances, i) for i in range(classes))


def _gaussians(x: Floats, codes: Codes) -> tuple[Floats, Floats]:
    """Means and variances of classes (K, D), the latter above 0.

    Raises:
        DataError: no class has two samples.
    """
    sizes = np.bincount(codes)[:, None]
    if sizes.max() < 2:
        raise DataError(
            "score features by GBC",
            found="no class with two samples, so no variance",
            fix="more samples of each class",
        )
    means = _class_sums(x, codes) / sizes
    squares = _class_sums(np.square(x - means[codes]), codes)
    common = squares.sum(0) / (sizes - 1).sum()
    variances = np.where(sizes > 1, squares / np.maximum(sizes - 1, 1), common)
    # Two classes without variance in a component are apart if they differ in it, else alike.
    return means, np.maximum(variances, 1e-12 * float(np.square(x).mean()))


def _overlaps(means: Floats, variances: Floats, i: int) -> float:
    """Sum of the Bhattacharyya coefficients of class i with all others."""
    middle = (variances + variances[i]) / 2
    logs = np.log(variances)
    distance = (np.square(means - means[i]) / middle).sum(1) / 8
    distance += 0.5 * (np.log(middle) - 0.5 * (logs + logs[i])).sum(1)
    return float(np.exp(-np.delete(distance, i)).sum())


# -- scores of source classes -----------------------------------------------------------------


def leep(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Log likelihood of the classes, told from what the pretrained head says of each sample.

    With P(y, z) = 1/N sum over the samples of class y of theta(x)_z, for source classes z:

        LEEP = 1/N sum log(sum over z of P(y_i | z) theta(x_i)_z).

    Args:
        probabilities: theta (N, Z) of the source classes; each row sums to 1.
        labels: (N,) whole numbers.

    Returns:
        Nats in [-H(Y), 0].

    Raises:
        DataError: probabilities or labels that cannot be used, or one class.

    References:
        Nguyen et al. 2020, section 3.

    Example:
        >>> leep([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0, 0, 1])
        0.0
    """
    theta, codes = _checked(probabilities, labels, "score a pretrained head by LEEP")
    if theta.min() < 0 or not np.allclose(theta.sum(1), 1.0, atol=1e-4):
        raise DataError(
            "score a pretrained head by LEEP",
            found="rows that are no probabilities",
            fix="the softmax of the scores of the source classes",
        )
    joint = _class_sums(theta, codes)  # (K, Z), times N
    total = joint.sum(0)
    given = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)  # P(y | z)
    # Never above 1 but by rounding.
    likelihood = np.minimum(1.0, (given[codes] * theta).sum(1) / theta.sum(1))
    return float(np.log(likelihood).mean())


def nce(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Minus the conditional entropy of the classes, given the source class of each sample.

    NCE = -H(Y | Z) = sum over y, z of P(y, z) log P(y | z), from counts.

    Args:
        predictions: (N,) whole numbers, the source class that the pretrained head favours.
        labels: (N,) whole numbers.

    Returns:
        Nats in [-H(Y), 0].

    Raises:
        DataError: labels that cannot be used, or one class.

    References:
        Tran et al. 2019, for two tasks that label the same inputs; here the source labels are
        predicted, as Nguyen et al. 2020 do to compare the two.

    Example:
        >>> nce([5, 5, 7, 7], [0, 0, 1, 1]), round(nce([5, 5, 5, 5], [0, 0, 1, 1]), 4)
        (0.0, -0.6931)
    """
    asked = "score a pretrained head by NCE"
    source = _whole(predictions, asked)
    _, codes = _checked(np.zeros((len(source), 1)), labels, asked)
    return leep(np.eye(int(source.max()) + 1)[source], codes)


# -- shared -----------------------------------------------------------------------------------


def _checked(features: ArrayLike, labels: ArrayLike, asked: str) -> tuple[Floats, Codes]:
    """Features in double precision (N, D) and classes as 0 to K - 1 (N,)."""
    x = np.asarray(features, dtype=np.float64)
    codes = _whole(labels, asked)
    if x.ndim != 2 or not x.size or len(x) != len(codes):
        raise DataError(
            asked,
            found=f"features of shape {x.shape} for {len(codes)} labels",
            fix="features (N, D) and labels (N,)",
        )
    if not np.isfinite(x).all():
        rows = int((~np.isfinite(x)).any(1).sum())
        raise DataError(
            asked,
            found=f"values that are not finite, in {rows} of {len(x)} samples",
            fix="weights that are sound, and the preparation that the model expects",
        )
    if int(codes.max()) == 0:
        raise DataError(asked, found="samples of one class", fix="samples of two classes or more")
    return x, codes


def _whole(labels: ArrayLike, asked: str) -> Codes:
    """Whole numbers as 0 to K - 1."""
    found: NDArray[Any] = np.asarray(labels)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise DataError(
            asked,
            found=f"classes of shape {found.shape} and type {found.dtype}",
            fix="whole numbers (N,)",
        )
    return np.unique(found, return_inverse=True)[1]


def _centred(x: Floats) -> Floats:
    """Features minus their means; what is constant becomes exactly 0, not rounding."""
    found = x - x.mean(0)
    rounding = len(x) * np.finfo(np.float64).eps * np.abs(x).max(0)
    found[:, np.abs(found).max(0) <= rounding] = 0.0
    return found


def _basis(x: Floats) -> tuple[Floats, Floats]:
    """Left singular vectors (N, R) and singular values (R,) that are more than rounding."""
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    kept = singular > max(x.shape) * np.finfo(np.float64).eps * max(singular[0], 1e-300)
    return left[:, kept], singular[kept]


def _between(left: Floats, codes: Codes) -> Floats:
    """Share of the variance along each left singular vector that lies between classes (R,)."""
    sums = _class_sums(left, codes)
    return (np.square(sums) / np.bincount(codes)[:, None]).sum(0)


def _class_sums(x: Floats, codes: Codes) -> Floats:
    """Sums over the samples of each class (K, D)."""
    sums = np.zeros((int(codes.max()) + 1, x.shape[1]))
    np.add.at(sums, codes, x)
    return sums
