"""What the layers of a pretrained model say about new labels, depth by depth, before any training.

A linear probe is a linear classifier on the frozen, pooled output of one layer group (Alain and
Bengio 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644).
Where the probes stop getting better, deeper groups add nothing that can be read linearly.

Probe: ridge regression on standardised features, targets 1 for the class of a sample and -1 for
the others, its penalty chosen by the squared error of exact leave-one-out predictions on the
training samples (Golub, Heath and Wahba 1979, Technometrics 21(2)). Its scores become
probabilities by softmax(t * score), with the temperature t that suits those same leave-one-out
predictions best (Guo et al. 2017, "On Calibration of Modern Neural Networks", ICML, section 4.2).
Against multinomial logistic regression with its penalty chosen on a fifth of the training samples,
over all layer groups, mean-pooled: ridge takes a fifth of the time, loses up to 3.9 points of
accuracy where features are few, and wins where they are many.

==========================  ========  ========  ==============  ==============
validation accuracy (loss)  ridge     logistic  ridge, seconds  logistic
==========================  ========  ========  ==============  ==============
ResNet-20, mean             0.481     0.520     0.30            1.82
ResNet-20, 2 x 2            0.660     0.677     0.39            2.64
EfficientNet-lite0          0.731     0.725     0.57            2.51
MiniLM, trec6               0.864     0.858     1.92            11.63
==========================  ========  ========  ==============  ==============
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from frostline.errors import DataError, TrainingError, UsageError, few
from frostline.tasks.features import Features

__all__ = ["ProbeCurve", "ProbePoint", "probe_curve", "solved_head"]

Floats = NDArray[np.float64]
Interval = tuple[float, float]

#: Penalties that are tried, per training sample.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
_TEMPERATURES = (1e-2, 1e3)
#: Features that vary by less, as a share of their size and of how others vary, are constant.
_ROUNDING = 1e-6
#: Inverse penalties of the logistic regression, from strong to weak.
_INVERSE_STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
_SOLVER_ITERATIONS = 2000
_HELD_OUT = 0.2
_RESAMPLES = 2000
_LEVEL = 0.95
_FORMAT = 1
#: Numbers drawn at once.
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class ProbePoint:
    """One probe and how well it reads.

    Intervals hold 95 % of bootstrap means over the validation samples, for the probe as it is.

    Attributes:
        group: name of the layer group; "" for what enters the head.
        depth: of the group; for what enters the head one more than the deepest probed group.
        width: features, D.
        strength: penalty per training sample that leave-one-out predictions chose.
        train_accuracy: on the samples it was fitted to, in [0, 1].
        val_accuracy: in [0, 1].
        val_loss: mean cross-entropy, nats.
        accuracy_interval: of the validation accuracy.
        loss_interval: of the validation loss.
        behind: interval of how much more accurate the best probe of a layer group is than this
            one, from differences sample by sample; below 0 where this one is better.
        seconds_s: wall time of fitting and asking it.
    """

    group: str
    depth: int
    width: int
    strength: float
    train_accuracy: float
    val_accuracy: float
    val_loss: float
    accuracy_interval: Interval
    loss_interval: Interval
    behind: Interval
    seconds_s: float


@dataclass(frozen=True, slots=True)
class ProbeCurve:
    """The probes of one model on one data set.

    Attributes:
        points: one per layer group, from shallow to deep, at least one.
        head_input: the probe of what enters the head, or None where that was not seen.
        classes: classes that were told apart.
        train_samples: samples that the probes were fitted to.
        val_samples: samples that they were asked about.
        commonest: validation accuracy of always answering the commonest training class.
        seconds_s: wall time of all probes, without the passes that gave the features.
        seed: of the bootstrap.
    """

    points: tuple[ProbePoint, ...]
    head_input: ProbePoint | None
    classes: int
    train_samples: int
    val_samples: int
    commonest: float
    seconds_s: float
    seed: int = 0

    @property
    def best(self) -> ProbePoint:
        """The layer group whose probe reads best: by accuracy, then by loss, then the shallower."""
        return min(self.points, key=lambda p: (-p.val_accuracy, p.val_loss, p.depth))

    def knee(self, tolerance: float = 0.0) -> ProbePoint:
        """The shallowest layer group whose probe is within the noise of the best one.

        It is, unless the interval of their difference lies above `tolerance` as a whole. The best
        is the best of these very samples, so the knee errs towards deep groups.

        Args:
            tolerance: accuracy that may be lost, in [0, 1].

        Raises:
            UsageError: a tolerance outside [0, 1].
        """
        if not 0 <= tolerance <= 1:
            raise UsageError(
                f"find the knee of a probe curve with a tolerance of {tolerance:g}",
                found="a number outside [0, 1]",
                fix="a share of accuracy, such as 0.02",
            )
        return next((p for p in self.points if p.behind[0] <= tolerance), self.best)

    def sentence(self, tolerance: float = 0.0) -> str:
        """The curve in words and numbers.

        Args:
            tolerance: as in `knee`.

        Raises:
            UsageError: a tolerance outside [0, 1].
        """
        best, knee = self.best, self.knee(tolerance)
        parts = [f"the best of {len(self.points)} probes reads {_figure(best)}"]
        if len(self.points) == 1:
            parts = [f"the only probe reads {_figure(best)}"]
        elif knee.depth < best.depth:
            parts.append(self._shallower(tolerance))
        elif best.depth > self.points[0].depth:
            more = f" by more than {tolerance:g}" if tolerance else ""
            parts.append(f"all shallower ones are worse{more}, beyond noise")
        parts += self._deeper(tolerance)
        told = "; ".join(parts)
        told = f"{told[0].upper()}{told[1:]} ({self.val_samples} validation samples)."
        if best.accuracy_interval[0] <= self.commonest:
            told += f" No probe is shown to beat the commonest class ({self.commonest:.2f})."
        return told

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProbeCurve:
        """The inverse of `to_json`, also after the JSON was written and read.

        Raises:
            DataError: not what `to_json` gives.
        """
        try:
            _check_format(data["format"])
            values = {f.name: data[f.name] for f in fields(cls)}
            head = values["head_input"]
            values["points"] = tuple(map(_point, values["points"]))
            values["head_input"] = None if head is None else _point(head)
            curve = cls(**values)
            _ = curve.best
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "read a probe curve",
                found=f"{type(error).__name__}: {error}",
                fix="an object as ProbeCurve.to_json writes it",
            ) from error
        return curve

    def _shallower(self, tolerance: float) -> str:
        """What is said of the groups before the best one."""
        best, knee = self.best, self.knee(tolerance)
        noise = f"not shown to exceed {tolerance:g}" if tolerance else "within noise"
        if any(p.behind[0] > tolerance for p in self.points if knee.depth < p.depth < best.depth):
            return f"{_figure(knee)} is the shallowest whose difference is {noise}"
        until = "up to it" if self._worse(tolerance) else "on"
        return f"from {_figure(knee)} {until} the difference is {noise}"

    def _worse(self, tolerance: float) -> list[ProbePoint]:
        """Groups after the best one that are worse."""
        return [p for p in self.points if p.depth > self.best.depth and p.behind[0] > tolerance]

    def _deeper(self, tolerance: float) -> list[str]:
        """What is said of what comes after the best group and is worse."""
        parts = []
        if worse := self._worse(tolerance):
            least = min(worse, key=lambda p: p.val_accuracy)
            count = f"{len(worse)} deeper {'one falls' if len(worse) == 1 else 'ones fall'} back"
            parts.append(f"{count}, {_figure(least)} the most")
        head = self.head_input
        if head is not None and head.behind[0] > tolerance:
            parts.append(f"what enters the head reads less, {head.val_accuracy:.2f}")
        return parts


def _figure(point: ProbePoint) -> str:
    return f"{point.group} ({point.val_accuracy:.2f})"


def _check_format(found: Any) -> None:
    if found != _FORMAT:
        raise ValueError(f"format {found!r}, not {_FORMAT}")


def _point(data: Mapping[str, Any]) -> ProbePoint:
    values = {f.name: data[f.name] for f in fields(ProbePoint)}
    for name in ("strength", "train_accuracy", "val_accuracy", "val_loss", "seconds_s"):
        values[name] = float(values[name])
    for name in ("accuracy_interval", "loss_interval", "behind"):
        low, high = values[name]
        values[name] = (float(low), float(high))
    return ProbePoint(**values)


# -- the curve ---------------------------------------------------------------------------------


def probe_curve(train: Features, val: Features, *, seed: int = 0) -> ProbeCurve:
    """Fit a probe to every layer group and to what enters the head, and ask it about new samples.

    Nothing but the training features chooses anything; the validation features only judge.

    Args:
        train: features that the probes are fitted to.
        val: features of the same model for other samples.
        seed: of the bootstrap, >= 0.

    Raises:
        DataError: features that do not belong together, are not finite, of one class, or of no
            layer group at all.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> def made(count):
        ...     labels = np.arange(count) % 3
        ...     noise = rng.standard_normal((2, count, 3)).astype(np.float32)
        ...     signal = np.eye(3, dtype=np.float32)[labels]
        ...     values = {"stem": noise[0], "block": signal + 0.2 * noise[1]}
        ...     return Features(("stem", "block"), values, None, labels, 0.0)
        >>> curve = probe_curve(made(90), made(60))
        >>> curve.best.group, curve.knee().group
        ('block', 'block')
        >>> curve.sentence().partition(";")[0]
        'The best of 2 probes reads block (1.00)'
    """
    start = time.perf_counter()
    _check_together(train, val)
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    readings = [_read(train.values[g], val.values[g], train, val, classes) for g in train.groups]
    depths = list(train.depths) or list(range(len(train.groups)))
    names = list(train.groups)
    if train.head_input is not None and val.head_input is not None:
        readings.append(_read(train.head_input, val.head_input, train, val, classes))
        depths.append(max(depths) + 1)
        names.append("")
    made = _points(names, depths, readings, len(train.groups), seed)
    commonest = int(np.bincount(train.labels).argmax())
    return ProbeCurve(
        points=tuple(made[: len(train.groups)]),
        head_input=made[-1] if len(made) > len(train.groups) else None,
        classes=classes,
        train_samples=len(train.labels),
        val_samples=len(val.labels),
        commonest=float((val.labels == commonest).mean()),
        seconds_s=time.perf_counter() - start,
        seed=seed,
    )


class _Reading(NamedTuple):
    """What one probe answered: right or wrong and cross-entropy for each validation sample."""

    width: int
    strength: float
    train_accuracy: float
    correct: Floats
    losses: Floats
    seconds_s: float


def _read(
    x: NDArray[np.float32], new: NDArray[np.float32], train: Features, val: Features, classes: int
) -> _Reading:
    """Fit a probe to x (N, D) and ask it about `new` (M, D)."""
    start = time.perf_counter()
    scaler = _scaler(x)
    known, asked = _standardised(scaler, x), _standardised(scaler, new)
    # A class without training samples scores -1 throughout.
    targets = np.where(train.labels[:, None] == np.arange(classes), 1.0, -1.0)
    penalties = [s * len(known) for s in _STRENGTHS]
    # With a scorer the leave-one-out predictions themselves are kept.
    ridge: Any = RidgeCV(penalties, scoring="neg_mean_squared_error", store_cv_results=True)
    ridge.fit(known, targets)
    place = penalties.index(float(ridge.alpha_))
    held_out = ridge.cv_results_[:, :, place]
    temperature = _temperature(held_out, train.labels)
    scores = ridge.predict(asked)
    chances = log_softmax(temperature * scores, axis=1)
    return _Reading(
        width=x.shape[1],
        strength=_STRENGTHS[place],
        train_accuracy=float((ridge.predict(known).argmax(1) == train.labels).mean()),
        correct=(scores.argmax(1) == val.labels).astype(np.float64),
        losses=-chances[np.arange(len(new)), val.labels],
        seconds_s=time.perf_counter() - start,
    )


def _scaler(x: NDArray[np.float32]) -> Any:
    """A fitted scaler that gives 0 for features that do not vary but for rounding.

    Standardised like the others they would be noise of unit size, and the weight that a solved head
    puts on them would blow up the gradient.
    """
    scaler: Any = StandardScaler().fit(x.astype(np.float64))
    size = np.maximum(np.abs(scaler.mean_), scaler.scale_.max())
    scaler.scale_[scaler.scale_ <= _ROUNDING * size] = np.inf
    return scaler


def _standardised(scaler: Any, x: NDArray[np.float32]) -> Floats:
    return np.asarray(scaler.transform(x.astype(np.float64)))


def _temperature(scores: Floats, labels: NDArray[np.int64]) -> float:
    """The factor on the scores (N, C) with the least cross-entropy."""
    rows = np.arange(len(labels))

    def loss(log_factor: float) -> float:
        return -float(log_softmax(math.exp(log_factor) * scores, axis=1)[rows, labels].mean())

    bounds = tuple(math.log(t) for t in _TEMPERATURES)
    found: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 0.02})
    return math.exp(found.x)


def _points(
    names: Sequence[str],
    depths: Sequence[int],
    readings: Sequence[_Reading],
    groups: int,
    seed: int,
) -> list[ProbePoint]:
    """Readings with their intervals; the first `groups` of them are of layer groups."""
    correct, losses = (np.stack([getattr(r, n) for r in readings]) for n in ("correct", "losses"))
    means = list(zip(-correct.mean(1)[:groups], losses.mean(1)[:groups], strict=True))
    best = means.index(min(means))
    table = np.concatenate([correct, losses, correct[best] - correct])
    low, high = _intervals(table, seed)
    bounds = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    count = len(readings)
    return [
        ProbePoint(
            group=names[i],
            depth=depths[i],
            width=r.width,
            strength=r.strength,
            train_accuracy=r.train_accuracy,
            val_accuracy=float(r.correct.mean()),
            val_loss=float(r.losses.mean()),
            accuracy_interval=bounds[i],
            loss_interval=bounds[count + i],
            behind=bounds[2 * count + i],
            seconds_s=r.seconds_s,
        )
        for i, r in enumerate(readings)
    ]


def _intervals(table: Floats, seed: int) -> tuple[Floats, Floats]:
    """Percentile bootstrap of the mean of each row (R, M), the same samples drawn for all rows.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    samples = table.shape[1]
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // samples)
    means = []
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        drawn = rng.multinomial(samples, np.full(samples, 1 / samples), size=count)
        means.append(table @ drawn.T / samples)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(np.concatenate(means, axis=1), (tail, 1 - tail), axis=1)
    return low, high


def _check_together(train: Features, val: Features) -> None:
    """Raise unless the two are features of one model that probes can be fitted to."""
    asked = "probe the layers of a model"
    if not train.groups:
        left = "; ".join(train.notes) or "no notes on why"
        raise DataError(
            asked, found=f"features of no layer group: {left}", fix="a model with a backbone"
        )
    if train.groups != val.groups:
        odd = sorted(set(train.groups) ^ set(val.groups)) or list(train.groups)
        raise DataError(
            asked,
            found=f"training and validation features of different groups: {few(odd)}",
            fix="features of one model, collected with the same settings",
        )
    for name in train.groups:
        _check_rows(asked, name, train.values[name], val.values[name], train, val)
    if train.head_input is not None and val.head_input is not None:
        _check_rows(asked, "the head's input", train.head_input, val.head_input, train, val)
    _check_labels(asked, train, val)


def _check_rows(
    asked: str,
    name: str,
    x: NDArray[np.float32],
    new: NDArray[np.float32],
    train: Features,
    val: Features,
) -> None:
    shapes = (len(train.labels), len(val.labels))
    if (len(x), len(new)) != shapes or x.ndim != 2 or x.shape[1:] != new.shape[1:] or not new.size:
        raise DataError(
            asked,
            found=f"shapes {x.shape} and {new.shape} of {name} for {shapes[0]} and {shapes[1]} "
            "labels",
            fix="features of one model, collected with the same settings",
        )
    if not (np.isfinite(x).all() and np.isfinite(new).all()):
        raise DataError(
            asked,
            found=f"values of {name} that are not finite",
            fix="weights that are sound, and the preparation that the model expects",
        )


def _check_labels(asked: str, train: Features, val: Features) -> None:
    if (least := min(train.labels.min(initial=0), val.labels.min(initial=0))) < 0:
        raise DataError(asked, found=f"the label {least}", fix="class numbers from 0 on")
    if len(np.unique(train.labels)) < 2:
        raise DataError(
            asked,
            found="training samples of one class",
            fix="samples of two classes or more",
        )


# -- the head ----------------------------------------------------------------------------------


def solved_head(
    train: Features, *, classes: int | None = None, seed: int = 0, errors: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Weight and bias of the linear head, by multinomial logistic regression on frozen features.

    Put into the model's linear head they are the end point of linear probing, from which full
    fine-tuning may start (LP-FT: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features
    and Underperform Out-of-Distribution", ICLR, arXiv:2202.10054). Features are standardised, the
    L2 penalty is chosen by the loss on a fifth of the training samples, and the standardisation is
    worked into weight and bias.

    A head that fits the training samples to the end leaves no gradient to fine-tune by, and is sure
    of itself where it is wrong. To start fine-tuning from, take `errors` above 0: the strongest
    penalty whose accuracy on the held-out fifth is at most so many standard errors below the best
    (after the rule of one standard error of Breiman et al. 1984, "Classification and Regression
    Trees", section 3.4.3).

    Args:
        train: features of the training samples; their `head_layer` says which layer is solved.
        classes: outputs of the head, C; by default as many as the labels have.
        seed: of the fifth.
        errors: standard errors of accuracy that may be given up for a stronger penalty, >= 0; with
            0 the loss alone chooses.

    Returns:
        Weight float32 (C, D) and bias float32 (C,), or None where the head is no single linear
        layer that reads `head_input`.

    Raises:
        DataError: features or labels that cannot be used, or a class without training samples.
        TrainingError: the regression does not settle.

    Example:
        >>> x = np.array([[0.0], [1.0], [4.0], [5.0]] * 5, np.float32)
        >>> y = np.array([0, 0, 1, 1] * 5)
        >>> weight, bias = solved_head(Features((), {}, x, y, 0.0, head_layer="fc"))
        >>> (x @ weight.T + bias).argmax(1).tolist() == y.tolist()
        True
    """
    if train.head_layer is None or train.head_input is None:
        return None
    asked, x, y = "solve the head of a model", train.head_input, train.labels
    _check_rows(asked, "the head's input", x, x, train, train)
    _check_labels(asked, train, train)
    count = int(y.max()) + 1 if classes is None else classes
    if absent := sorted(set(range(count)) - set(y.tolist())):
        raise DataError(
            asked,
            found=f"no training sample of class {few([str(c) for c in absent])}",
            fix="features of more samples: a larger limit, or none",
        )
    if int(y.max()) >= count:
        raise DataError(
            asked, found=f"class {int(y.max())} for {count} outputs", fix="classes of the task"
        )
    scaler = _scaler(x)
    known = _standardised(scaler, x)
    regression = _fitted(known, y, _inverse_strength(known, y, seed, errors))
    weight, bias = regression.coef_, regression.intercept_
    if count == 2:  # one row of log odds stands for both classes
        weight, bias = (np.concatenate([-a, a]) / 2 for a in (weight, bias))
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    return weight.astype(np.float32), bias.astype(np.float32)


def _inverse_strength(known: Floats, y: NDArray[np.int64], seed: int, errors: float) -> float:
    """The inverse penalty whose regression does best on held-out training samples.

    By their loss; with `errors`, the smallest one that is right nearly as often as any.
    """
    counts = np.bincount(y)
    rare = counts.min() < 2 or round(_HELD_OUT * len(y)) < len(counts)
    stratify = None if rare else y
    parts = train_test_split(
        np.arange(len(y)), test_size=_HELD_OUT, stratify=stratify, random_state=seed
    )
    fitted, asked = np.asarray(parts[0]), np.asarray(parts[1])
    if len(np.unique(y[fitted])) < 2:
        return _INVERSE_STRENGTHS[len(_INVERSE_STRENGTHS) // 2]
    losses, right = [], []
    for strength in _INVERSE_STRENGTHS:
        regression = _fitted(known[fitted], y[fitted], strength)
        losses.append(_loss(regression, known[asked], y[asked]))
        right.append(float(regression.score(known[asked], y[asked])))
        if losses[-1] > min(losses):  # it only gets worse: the loss is all but convex in it
            break
    if not errors:
        return _INVERSE_STRENGTHS[int(np.argmin(losses))]
    best = max(right)
    least = best - errors * math.sqrt(best * (1 - best) / len(asked))
    return next(s for s, share in zip(_INVERSE_STRENGTHS, right, strict=False) if share >= least)


def _loss(regression: LogisticRegression, x: Floats, y: NDArray[np.int64]) -> float:
    """Mean cross-entropy over samples whose class the regression knows."""
    places = np.searchsorted(regression.classes_, y).clip(max=len(regression.classes_) - 1)
    known = regression.classes_[places] == y
    if not known.any():
        return math.inf
    chances = regression.predict_log_proba(x[known])
    return -float(chances[np.arange(int(known.sum())), places[known]].mean())


def _fitted(x: Floats, y: NDArray[np.int64], inverse_strength: float) -> LogisticRegression:
    regression = LogisticRegression(C=inverse_strength, max_iter=_SOLVER_ITERATIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # raised below
        regression.fit(x, y)
    if int(np.max(regression.n_iter_)) >= _SOLVER_ITERATIONS:
        raise TrainingError(
            "solve the head of a model",
            found=f"a regression that moves on after {_SOLVER_ITERATIONS} steps",
            fix="look for features of extreme scale, or train the head by gradient descent",
        )
    return regression
