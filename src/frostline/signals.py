"""Signals: named scalars per layer group, computed from a side-effect-free view of training.

A policy declares the signals it needs and how often; only those are computed, and their time is
charged to the run. A signal gathers over some steps of an interval and is read at its end: the
norm of a gradient is gathered once, the norm of a *summed* gradient at every step. What it
remembers in between is kept in checkpoints.

The arithmetic here is written once, over arrays that only need Python's operators; NumPy arrays
and torch tensors both serve. Reductions that profit from one transfer are left to the probe.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups

__all__ = [
    "SIGNALS",
    "Array",
    "Matrix",
    "Memory",
    "Need",
    "Probe",
    "Signal",
    "Values",
    "compute_signal",
    "units_of",
]

#: A NumPy array or torch tensor: anything with operators, `sum`, `mean(axis)`, `reshape` and `T`.
Array = Any
#: One entry per parameter of a unit; None where there is no gradient.
Arrays = Sequence["Array | None"]
#: What a signal remembers of one unit: floats, arrays and lists of arrays by name.
Memory = dict[str, Any]
#: Values of one signal by the name of the group (or parameter). Units without a value are absent.
Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Matrix:
    """The singular values of one weight, seen as a matrix (first dimension by all the others).

    Attributes:
        rows: size of the first dimension.
        columns: product of the other dimensions.
        singular: singular values, descending, >= 0.
    """

    rows: int
    columns: int
    singular: Sequence[float]


class Probe(Protocol):
    """A read-only view of a model between backward pass and optimizer update.

    Reading changes nothing: weights, gradients, optimizer state, buffers, modes and random
    streams are the same afterwards, bit for bit. A unit is a layer group, or a single parameter
    dressed as one. Arrays are detached, at least single precision, and never to be written to.
    """

    def trains(self, unit: LayerGroup) -> bool:
        """Whether the plan in force trains any parameter of the unit."""
        ...

    def gradients(self, unit: LayerGroup) -> Arrays:
        """The gradient of each parameter, None where there is none."""
        ...

    def weights(self, unit: LayerGroup) -> Sequence[Array]:
        """Each floating-point parameter, as it is now (a view: copy what you keep)."""
        ...

    def norm(self, arrays: Arrays, order: Literal[1, 2]) -> float:
        """L1 norm (sum of magnitudes) or L2 norm over all arrays together; None counts as 0."""
        ...

    def dot(self, first: Arrays, second: Arrays) -> float:
        """Sum of the products of all elements; pairs with a None count as 0."""
        ...

    def matrices(self, unit: LayerGroup) -> Sequence[Matrix]:
        """The singular values of each parameter of two or more dimensions."""
        ...

    def learning_rate(self, unit: LayerGroup) -> float:
        """The optimizer's rate for the unit now, without the plan's factor; the largest one."""
        ...

    def loss(self) -> float:
        """The training loss of this step, as the loop gave it to `Driver.sample`."""
        ...

    def activations(self, unit: LayerGroup, *, int8: bool = False) -> Array:
        """What the unit puts out for the probe batch: (samples, features), in evaluation mode.

        The probe batch is the first batch of training that the model saw after
        `Backend.keep_batch`. With `int8`, weights are rounded to 8 bits per output channel first.
        """
        ...

    def update(self, unit: LayerGroup) -> Arrays:
        """What the optimizer would add to each parameter now; nothing is really updated."""
        ...


@dataclass(frozen=True, slots=True)
class Need:
    """A policy's request: this signal, this often.

    Attributes:
        signal: name of a signal in `SIGNALS`.
        every: interval between readings; a reading is taken at the last step of each interval.
            None for a signal of the weights alone: read once, before the first decision.
        steps: how many of an interval's last steps are gathered, >= 1; None for all of them.
        per: whether values are per layer group or per parameter (by parameter name).
        frozen_too: gather for frozen groups, too: in the steps concerned the backward pass runs
            through the whole model, and the gradients of frozen groups are dropped before the
            update.
        refresh: how often the reference of a `*_snapshot` or `*_int8` signal is taken anew (at
            the next reading); None keeps the first.
        after: the request holds only when these lengths have passed, one after the other.
        until: the request ends when these lengths have passed; None holds to the end.
    """

    signal: str
    every: Duration | None
    steps: int | None = 1
    per: Literal["group", "parameter"] = "group"
    frozen_too: bool = False
    refresh: Duration | None = None
    after: tuple[Duration, ...] = ()
    until: tuple[Duration, ...] | None = None

    def __post_init__(self) -> None:
        signal = _known(self.signal)
        if (self.every is None) != signal.static:
            raise PolicyError(
                f"read the signal {self.signal!r} "
                + ("once" if self.every is None else f"every {self.every}"),
                found="a signal of the weights alone: it is read once"
                if signal.static
                else "a signal of training: it needs an interval",
                fix="every=None" if signal.static else "for example every=1ep",
            )
        if signal.activations and self.per == "parameter":
            raise PolicyError(
                f"read the signal {self.signal!r} per parameter",
                found="a signal of activations, which layer groups have and parameters have not",
                fix="per='group'",
            )
        if self.steps is not None and self.steps < 1:
            raise PolicyError(f"gather {self.signal} over {self.steps} steps", found="no steps")


@dataclass(frozen=True, slots=True)
class Signal:
    """A named scalar per layer group or parameter.

    Attributes:
        name: identifier used in records and policies.
        unit: what one means, for people.
        source: where the definition comes from.
        gather: takes in one step: writes to the memory it is given, and to nothing else.
        read: the value of the interval, None if nothing was gathered; clears what was gathered.
        begin: takes the reference that later steps are compared with, at the first step of the
            request; no gathering happens in that step.
        trained_only: gathered only for units that train (others have no gradient and no change).
        static: a function of the weights alone, read once before training.
        activations: reads the probe batch.
        from_start: the reference is that of the very first step, whenever the request begins.
        supplied: measured on the data by whoever builds the driver, and given to it
            (`Driver.measured`); nothing is gathered. Without it, no unit has a value.
    """

    name: str
    unit: str
    source: str
    gather: Callable[[Memory, Probe, LayerGroup], None] = field(repr=False)
    read: Callable[[Memory], float | None] = field(repr=False)
    begin: Callable[[Memory, Probe, LayerGroup], None] | None = field(default=None, repr=False)
    trained_only: bool = True
    static: bool = False
    activations: bool = False
    from_start: bool = False
    supplied: bool = False


def compute_signal(
    name: str, probe: Probe, groups: LayerGroups, *, per: Literal["group", "parameter"] = "group"
) -> Values:
    """The value of one signal gathered over this one step, where it has one.

    Signals that compare with an earlier moment have none yet.

    Raises:
        PolicyError: no such signal.
    """
    signal = _known(name)
    values: dict[str, float] = {}
    for unit in units_of(groups, per):
        if (signal.trained_only and not probe.trains(unit)) or (
            signal.activations and not unit.calls
        ):
            continue
        memory: Memory = {}
        if signal.begin is not None:
            signal.begin(memory, probe, unit)
        signal.gather(memory, probe, unit)
        if (value := signal.read(memory)) is not None:
            values[unit.name] = value
    return values


def units_of(groups: LayerGroups, per: Literal["group", "parameter"]) -> tuple[LayerGroup, ...]:
    """The groups, or one unit per parameter, named like it, with the depth of its group."""
    if per == "group":
        return groups.items
    return tuple(
        LayerGroup(p.name, g.depth, (p,), calls=g.calls) for g in groups for p in g.parameters
    )


def _known(name: str) -> Signal:
    if name not in SIGNALS:
        raise PolicyError(
            f"compute the signal {name!r}",
            found="no signal of that name",
            fix=f"one of {', '.join(sorted(SIGNALS))}",
        )
    return SIGNALS[name]


# -- momentary values, averaged over the gathered steps ---------------------------------------


def _count(memory: Memory, value: float) -> None:
    memory["sum"] = memory.get("sum", 0.0) + value
    memory["n"] = memory.get("n", 0) + 1


def _mean(memory: Memory) -> float | None:
    count = memory.pop("n", 0)
    total = memory.pop("sum", 0.0)
    return total / count if count else None


def _momentary(
    name: str,
    unit: str,
    value: Callable[[Probe, LayerGroup], float],
    source: str,
    *,
    trained_only: bool = True,
) -> Signal:
    def gather(memory: Memory, probe: Probe, group: LayerGroup) -> None:
        _count(memory, value(probe, group))

    return Signal(name, unit, source, gather, _mean, trained_only=trained_only)


def _supplied(name: str, unit: str, source: str) -> Signal:
    def nothing(memory: Memory, probe: Probe, group: LayerGroup) -> None:
        del memory, probe, group

    return Signal(name, unit, source, nothing, _mean, static=True, supplied=True)


def _relative(probe: Probe, group: LayerGroup) -> float:
    weight = probe.norm(probe.weights(group), 2)
    return probe.norm(probe.gradients(group), 2) / weight if weight else 0.0


def _squared(probe: Probe, group: LayerGroup) -> float:
    return probe.norm(probe.gradients(group), 2) ** 2


# -- sums of gradients over an interval -------------------------------------------------------


def _accumulate(memory: Memory, key: str, arrays: Arrays) -> None:
    known = memory.get(key)
    if known is None:
        memory[key] = [None if a is None else a * 1 for a in arrays]
        return
    for i, array in enumerate(arrays):
        if array is None:
            continue
        if known[i] is None:
            known[i] = array * 1
        else:
            known[i] += array


def _sum_of(memory: Memory, power: Literal[1, 2]) -> float | None:
    total = memory.pop("total", None)
    if total is None:
        return None
    return _norm(total, power)


def _norm(arrays: Arrays, order: Literal[1, 2]) -> float:
    """The norm over arrays that a signal keeps (a probe's own is faster for those of a model)."""
    present = [a for a in arrays if a is not None]
    if order == 1:
        return float(sum(float(abs(a).sum()) for a in present))
    return math.sqrt(sum(float((a * a).sum()) for a in present))


def _gather_sum(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    _accumulate(memory, "total", probe.gradients(unit))


def _gather_moments(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    gradients = probe.gradients(unit)
    _accumulate(memory, "total", gradients)
    _accumulate(memory, "squares", [None if g is None else g * g for g in gradients])
    memory["n"] = memory.get("n", 0) + 1


#: Keeps the ratio finite where the variance is 0: the constant of the public implementation.
_SNR_EPSILON = 1e-8


def _read_snr(memory: Memory) -> float | None:
    totals, squares = memory.pop("total", ()), memory.pop("squares", ())
    n = memory.pop("n", 0)
    if n < 2:  # one sample has no variance
        return None
    ratio, elements = 0.0, 0
    for total, square in zip(totals, squares, strict=True):
        if total is None:
            continue
        mean = total / n
        variance = abs(square / n - mean * mean)
        ratio += float((mean * mean / (variance + _SNR_EPSILON)).sum())
        elements += math.prod(total.shape)
    return ratio / elements if elements else None


def _gather_fisher_ema(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    clipped = [None if g is None else g.clip(-1, 1) for g in probe.gradients(unit)]
    value = probe.norm(clipped, 2) ** 2
    known = memory.get("ema")
    memory["ema"] = value if known is None else _FISHER_DECAY * known + (1 - _FISHER_DECAY) * value
    memory["fresh"] = True


_FISHER_DECAY = 0.9


def _read_ema(memory: Memory) -> float | None:
    return memory["ema"] if memory.pop("fresh", False) else None


def _gather_gradient_change(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    gradients = probe.gradients(unit)
    if (before := memory.get("gradient")) is not None:
        _count(memory, probe.norm(_minus(gradients, before), 1))
    memory["gradient"] = [None if g is None else g * 1 for g in gradients]


def _minus(first: Arrays, second: Arrays) -> list[Array | None]:
    return [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]


# -- changes of weights -----------------------------------------------------------------------


def _remember_weights(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    memory["weights"] = [w * 1 for w in probe.weights(unit)]


def _change_of_weights(
    value: Callable[[Probe, Sequence[Array], Sequence[Array]], float],
) -> Callable[[Memory, Probe, LayerGroup], None]:
    def gather(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
        if (before := memory.get("weights")) is not None:
            delta = [w - b for w, b in zip(probe.weights(unit), before, strict=True)]
            _count(memory, value(probe, delta, before))
        _remember_weights(memory, probe, unit)

    return gather


def _update_ratio(probe: Probe, delta: Sequence[Array], before: Sequence[Array]) -> float:
    weight = probe.norm(before, 2)
    return probe.norm(delta, 2) / weight if weight else 0.0


def _mean_relative(_: Probe, delta: Sequence[Array], before: Sequence[Array]) -> float:
    total, count = 0.0, 0
    for d, b in zip(delta, before, strict=True):
        moved = b + (b == 0)  # a weight of 0 has no relative change: it counts as is
        total += float(abs(d / moved).sum())
        count += math.prod(d.shape)
    return total / count if count else 0.0


_APF_DECAY = 0.99


def _gather_perturbation(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    before = memory.get("weights")
    if before is not None:
        delta = [w - b for w, b in zip(probe.weights(unit), before, strict=True)]
        _decay_into(memory, "mean", delta)
        _decay_into(memory, "size", [abs(d) for d in delta])
        memory["fresh"] = True
    _remember_weights(memory, probe, unit)


def _decay_into(memory: Memory, key: str, arrays: Sequence[Array]) -> None:
    known = memory.get(key)
    if known is None:
        memory[key] = [a * (1 - _APF_DECAY) for a in arrays]
        return
    for average, array in zip(known, arrays, strict=True):
        average *= _APF_DECAY  # noqa: PLW2901 - in place
        average += (1 - _APF_DECAY) * array  # noqa: PLW2901


def _read_perturbation(memory: Memory) -> float | None:
    if not memory.pop("fresh", False):
        return None
    size = _norm(memory["size"], 1)
    # Magnitudes before sums: opposite moves of two weights must not cancel.
    return _norm(memory["mean"], 1) / size if size else 0.0


# -- importance of updates --------------------------------------------------------------------


def _gather_importance(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    if (update := memory.get("update")) is not None:
        _count(memory, -probe.dot(probe.gradients(unit), update))
    memory["update"] = [None if u is None else u * 1 for u in probe.update(unit)]


def _read_importance(memory: Memory) -> float | None:
    memory.pop("update", None)
    return _mean(memory)


# -- similarity of activations to a reference -------------------------------------------------


def _gram(activations: Array) -> Array:
    flat = activations.reshape(activations.shape[0], -1)
    return flat @ flat.T


def _centred(activations: Array) -> Array:
    gram = _gram(activations)
    columns = gram.mean(0)
    return gram - columns.reshape(1, -1) - columns.reshape(-1, 1) + columns.mean()


def _cka(now: Array, reference: Array) -> float:
    own = float((now * now).sum()) * float((reference * reference).sum())
    return float((now * reference).sum()) / math.sqrt(own) if own > 0 else 1.0


def _by_rows(activations: Array) -> Array:
    gram = _gram(activations)
    length = ((gram * gram).sum(1) ** 0.5).reshape(-1, 1)
    return gram / (length + (length == 0))


def _sp_loss(now: Array, reference: Array) -> float:
    difference = now - reference
    return float((difference * difference).sum()) / now.shape[0] ** 2


def _directions(activations: Array) -> Array:
    flat = activations.reshape(activations.shape[0], -1)
    length = ((flat * flat).sum(1) ** 0.5).reshape(-1, 1)
    return flat / (length + (length == 0))


def _cosine(now: Array, reference: Array) -> float:
    return float((now * reference).sum()) / now.shape[0]


_SIMILARITIES: Mapping[str, tuple[Callable[[Array], Array], Callable[..., float], str, str]] = {
    "cka": (_centred, _cka, "linear CKA, in [0, 1]", "Kornblith et al. 2019, arXiv:1905.00414"),
    "sp_loss": (
        _by_rows,
        _sp_loss,
        "similarity-preserving loss, >= 0",
        "Tung & Mori 2019, arXiv:1907.09682, equations 1 to 4",
    ),
    "cosine": (_directions, _cosine, "mean cosine, in [-1, 1]", "mean over samples"),
}
_REFERENCES = {
    "pretrained": "the weights at the start",
    "snapshot": "an earlier moment",
    "int8": "an earlier moment in 8-bit weights",
}


def _similarity(kind: str, reference: str) -> Signal:
    prepare, compare, unit, source = _SIMILARITIES[kind]

    def begin(memory: Memory, probe: Probe, group: LayerGroup) -> None:
        memory["reference"] = prepare(probe.activations(group, int8=reference == "int8")) * 1

    def gather(memory: Memory, probe: Probe, group: LayerGroup) -> None:
        _count(memory, compare(prepare(probe.activations(group)), memory["reference"]))

    return Signal(
        f"{kind}_{reference}",
        f"{unit}, of activations to those of {_REFERENCES[reference]}",
        source,
        gather,
        _mean,
        begin,
        trained_only=False,
        activations=True,
        from_start=reference == "pretrained",
    )


# -- spectra of weights -----------------------------------------------------------------------

#: Interquartile range of a normal distribution in standard deviations.
_IQR_OF_NORMAL = 1.349


def _spectral_snr(matrix: Matrix) -> float:
    values = list(matrix.singular)
    if len(values) < 2 or not values[0]:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    beta = min(matrix.rows, matrix.columns) / max(matrix.rows, matrix.columns)
    threshold = (high - low) / _IQR_OF_NORMAL * (1 + math.sqrt(beta))
    signal = sum(s for s in values if s > threshold)
    noise = sum(s for s in values if s <= threshold)
    return signal / noise / values[0] if noise else 1 / values[0] * len(values)


def _gather_spectrum(memory: Memory, probe: Probe, unit: LayerGroup) -> None:
    for matrix in probe.matrices(unit):
        _count(memory, _spectral_snr(matrix))


_OWN = "definition"
_DELTA = "difference to the reading before"

#: Signals known by name.
SIGNALS: dict[str, Signal] = {
    s.name: s
    for s in (
        _momentary("gradient_l1", "sum of |g|", lambda p, g: p.norm(p.gradients(g), 1), _OWN),
        _momentary("gradient_norm", "L2 norm of g", lambda p, g: p.norm(p.gradients(g), 2), _OWN),
        _momentary(
            "relative_gradient_norm",
            "L2(g) / L2(w)",
            _relative,
            "Lee et al. 2023, arXiv:2210.11466, RGN",
        ),
        _momentary(
            "fisher",
            "sum of g^2, mean over the gathered batches: the diagonal empirical Fisher information",
            _squared,
            "Lodha et al. 2023, Findings of EMNLP, FIM score",
        ),
        Signal(
            "fisher_ema",
            "moving average (0.9) of the sum of g^2, each g clipped to [-1, 1]",
            "Seo et al. 2025, arXiv:2410.15143; the decay is ours",
            _gather_fisher_ema,
            _read_ema,
        ),
        Signal(
            "summed_gradient_l1",
            "L1 norm of the gradient summed over the gathered steps",
            "Liu et al. 2021, arXiv:2102.01386",
            _gather_sum,
            lambda memory: _sum_of(memory, 1),
        ),
        Signal(
            "summed_gradient_norm",
            "L2 norm of the gradient summed over the gathered steps",
            "He et al. 2021, arXiv:2102.03161",
            _gather_sum,
            lambda memory: _sum_of(memory, 2),
        ),
        Signal(
            "gradient_snr",
            "mean over weights of E[g]^2 / (Var[g] + 1e-8) over the gathered batches",
            "Lee et al. 2023, arXiv:2210.11466, SNR",
            _gather_moments,
            _read_snr,
        ),
        Signal(
            "gradient_change_l1",
            f"L1 norm of g's {_DELTA}",
            "GradES 2025, arXiv:2509.01842, version 3",
            _gather_gradient_change,
            _mean,
        ),
        _momentary(
            "weight_norm",
            "L2 norm of w",
            lambda p, g: p.norm(p.weights(g), 2),
            _OWN,
            trained_only=False,
        ),
        Signal(
            "weight_delta_l1",
            f"L1 norm of w's {_DELTA}",
            _OWN,
            _change_of_weights(lambda probe, delta, _: probe.norm(delta, 1)),
            _mean,
            _remember_weights,
        ),
        Signal(
            "weight_delta_norm",
            f"L2 norm of w's {_DELTA}",
            _OWN,
            _change_of_weights(lambda probe, delta, _: probe.norm(delta, 2)),
            _mean,
            _remember_weights,
        ),
        Signal(
            "update_ratio",
            f"L2 norm of w's {_DELTA}, over L2(w)",
            _OWN,
            _change_of_weights(_update_ratio),
            _mean,
            _remember_weights,
        ),
        Signal(
            "relative_weight_change",
            f"mean over weights of |w's {_DELTA}| / |w|",
            "Ardakani et al. 2024, arXiv:2305.18513",
            _change_of_weights(_mean_relative),
            _mean,
            _remember_weights,
        ),
        Signal(
            "effective_perturbation",
            "sum |E[d]| / sum E|d| of the changes d between readings, moving averages of 0.99, "
            "in [0, 1]",
            "Chen et al. 2021, ICDCS, APF, summed over a group",
            _gather_perturbation,
            _read_perturbation,
            _remember_weights,
        ),
        Signal(
            "update_importance",
            "loss saved by an update of the group to first order: -g of a batch times the update "
            "that the optimizer would have made on the batch before",
            "Huang et al. 2023, MobiSys, ElasticTrainer",
            _gather_importance,
            _read_importance,
        ),
        *(_similarity(kind, ref) for kind in _SIMILARITIES for ref in _REFERENCES),
        _momentary(
            "learning_rate",
            "the optimizer's rate",
            lambda p, g: p.learning_rate(g),
            _OWN,
            trained_only=False,
        ),
        _momentary("loss", "training loss", lambda p, _: p.loss(), _OWN, trained_only=False),
        Signal(
            "spectral_snr",
            "singular values above the noise edge over those below, by the largest one",
            "Hartford et al. 2024, arXiv:2406.06623, Spectrum",
            _gather_spectrum,
            _mean,
            trained_only=False,
            static=True,
        ),
        _supplied(
            "probe_accuracy",
            "validation accuracy of a linear probe of what the group puts out, of the head of what "
            "enters it, before training",
            "Alain & Bengio 2016, arXiv:1610.01644",
        ),
        _supplied(
            "probe_behind",
            "how far that accuracy is behind the best group's at the least (95 % interval); 0 or "
            "less: within noise of it",
            _OWN,
        ),
        _supplied(
            "first_epoch_from_s",
            "seconds that an epoch is expected to take, with its validation, where the group is "
            "the first one to train and nothing is stored yet",
            _OWN,
        ),
        _supplied(
            "epoch_from_s",
            "the same of the epochs that follow, in which stored outputs are read",
            _OWN,
        ),
        _supplied(
            "peak_from_bytes",
            "bytes that a step is expected to have in use at most where the group is the first "
            "one to train",
            _OWN,
        ),
    )
}
