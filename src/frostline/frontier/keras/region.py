"""Which calls of a Keras model are frozen: known from its flags, then tried on real samples.

A call is frozen when all it reads is frozen and it has nothing that trains. What the flags cannot
tell is tried: the candidates run on a few real samples, twice, in training and in inference, alone
and in another batch. Whatever writes state, draws random numbers, answers differently or mixes
the samples of a batch counts as live, with the reason, and so does all that follows from it.

Layers that augment at random in front of everything with weights may be let in on request: what
they draw then comes from seeds that are set, and a sample is stored in several versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError, few
from frostline.frontier.keras.graph import (
    Call,
    Graph,
    Value,
    build,
    ends,
    flatten,
    needed,
    replica,
    walk,
)

__all__ = ["KerasRegion", "as_numpy", "close", "find_region", "frozen_model", "rest_model"]

#: Most that two computations of one value may differ, as a share of its largest element.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
#: Samples of the trial, and of the same samples in another batch; the first in other company.
_TRIED, _MIXED, _COMPANY = (0, 1, 2), (2, 0, 1, 1, 0), (0, 0, 1)
_RANDOM = "draws random numbers in training"


@dataclass(frozen=True, eq=False)
class KerasRegion:
    """The frozen region of a model in its present state.

    Attributes:
        graph: the whole model.
        frozen: names of the frozen calls, in order.
        frontier: values to store: computed by frozen calls, read by live ones or given out.
        passed: inputs of the model that live calls read themselves.
        shared: frontier values that are the same for all samples.
        reasons: why calls are live that read nothing live; by name of the call.
        draws: names of frozen calls that draw random numbers in training: only where asked for.
        built: models made from it so far.
    """

    graph: Graph
    frozen: tuple[str, ...]
    frontier: tuple[Value, ...]
    passed: tuple[Value, ...]
    shared: Mapping[Value, NDArray[Any]]
    reasons: Mapping[str, str]
    draws: tuple[str, ...] = ()
    built: dict[str, keras.Model] = field(default_factory=dict, repr=False)

    @property
    def variables(self) -> list[tuple[str, keras.Variable]]:
        """What the frozen calls read, each once, with a name."""
        return variables_of(self.frozen_calls)

    @property
    def frozen_calls(self) -> list[Call]:
        """The frozen calls that the frontier needs."""
        return needed(self.graph, (*self.frontier, *self.shared), self.graph.inputs)

    @property
    def seeds(self) -> list[keras.Variable]:
        """States of the random seeds that the frozen calls draw from, each once, in order."""
        drawing = [call for call in self.frozen_calls if call.name in self.draws]
        found = {id(v): v for call in drawing for v in seed_states(call)}
        return list(found.values())

    @property
    def live(self) -> tuple[str, ...]:
        """Names of the calls that run at each step."""
        return tuple(call.name for call in self.graph.calls if call.name not in set(self.frozen))

    @property
    def why_not(self) -> str:
        """Why storing the frontier would save nothing; empty when it may."""
        if not any(getattr(call.operation, "weights", ()) for call in self.frozen_calls):
            why = few([f"{name} {why}" for name, why in self.reasons.items()])
            hint = "; views=4 stores that many versions of each sample" if self.could_draw else ""
            return f"no layer with weights is frozen from the inputs on ({why}){hint}"
        if all(isinstance(v, Value) and v in self.frontier for v in self._outputs):
            return "nothing is live: there is nothing to train"
        return ""

    @property
    def could_draw(self) -> bool:
        """Whether letting random augmentation in would let in calls that are live now."""
        random = {name for name, why in self.reasons.items() if why == _RANDOM}
        return any(call.name in random for call in _in_front(self.graph))

    @property
    def _outputs(self) -> list[Any]:
        return keras.tree.flatten(self.graph.outputs)

    def describe(self) -> str:
        """One sentence for people."""
        if self.why_not:
            return f"not cached: {self.why_not}"
        handed = few([value.name for value in self.frontier])
        return f"{len(self.frozen)} of {len(self.graph.calls)} calls are frozen; kept: {handed}"


def find_region(
    model: keras.Model, x: Any, *, wrapped: bool = False, draws: bool = False
) -> KerasRegion:
    """The frozen region under the model's present `trainable` flags and modes.

    Args:
        model: functional or Sequential, built.
        x: real samples as arrays, in the structure that the model takes, samples first; a few
            are tried (and the model's state is put back afterwards).
        wrapped: the model's `call` is replaced, and runs the recorded graph all the same.
        draws: let in calls that draw random numbers in training, before any weights are used.

    Raises:
        FrontierError: a model without a graph, or samples that do not fit its inputs.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="body"),
        ...                           keras.layers.Dense(1, name="head")])
        >>> model.layers[0].trainable = False
        >>> find_region(model, np.eye(3)).frozen
        ('body',)
    """
    graph = flatten(model, wrapped=wrapped)
    samples = flat_inputs(model, x)
    reasons: dict[str, str] = {}
    candidates = _grown(graph, lambda call: _trains(call, reasons))
    if not candidates:
        return _region(graph, candidates, {}, reasons)
    if not draws and (region := _at_once(graph, candidates, samples, reasons)) is not None:
        return region
    trial = _Trial(graph, candidates, samples, draws=draws)
    candidates = _grown(graph, lambda call: trial.verdict(call, candidates, reasons))
    region = _region(graph, candidates, trial.shared, reasons, draws=trial.drawing)
    if region.frontier:
        # The layers were called for the trial; the part of it that is frozen needs no more calls.
        region.built["frozen"] = trial.model_to(region.frontier)
    return region


def frozen_model(region: KerasRegion) -> keras.Model:
    """From the model's inputs to the list of frontier values (alone: no list); shares layers.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
        >>> model.layers[0].trainable = False
        >>> frozen_model(find_region(model, np.eye(3))).output_shape
        (None, 2)
    """  # noqa: E501
    if "frozen" not in region.built:
        region.built["frozen"] = build(
            region.graph, region.graph.inputs, list(region.frontier), name="frostline_frozen"
        )
    return region.built["frozen"]


def rest_model(region: KerasRegion) -> keras.Model:
    """From `[*frontier, *passed]` to the model's outputs; shares the user's layers.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
        >>> model.layers[0].trainable = False
        >>> [v.path for v in rest_model(find_region(model, np.eye(3))).trainable_variables] == [
        ...     v.path for v in model.trainable_variables]
        True
    """  # noqa: E501
    if "rest" not in region.built:
        region.built["rest"] = build(
            region.graph,
            [*region.frontier, *region.passed],
            region.graph.outputs,
            shared=region.shared,
            name="frostline_rest",
        )
    return region.built["rest"]


def variables_of(calls: Iterable[Call]) -> list[tuple[str, keras.Variable]]:
    """The variables of some calls, each once, named by call and own path."""
    found: dict[int, tuple[str, keras.Variable]] = {}
    for call in calls:
        for number, variable in enumerate(call.variables):
            found.setdefault(id(variable), (f"{call.name}/{variable.name}~{number}", variable))
    return list(found.values())


# -- by flags ------------------------------------------------------------------------------------


def _grown(graph: Graph, check: Callable[[Call], bool]) -> list[Call]:
    """The calls that pass a check and read only inputs and outputs of such calls."""
    known, found = set(graph.inputs), []
    for call in graph.calls:
        if known.issuperset(call.inputs) and check(call):
            known.update(call.outputs)
            found.append(call)
    return found


def _trains(call: Call, reasons: dict[str, str]) -> bool:
    layer = call.operation
    if isinstance(layer, keras.Layer) and layer.trainable_variables:
        reasons[call.name] = "trains"
        return False
    if getattr(layer, "activity_regularizer", None) is not None:
        reasons[call.name] = "adds to the loss"
        return False
    return True


def _region(
    graph: Graph,
    frozen: Sequence[Call],
    shared: Mapping[Value, NDArray[Any]],
    reasons: Mapping[str, str],
    draws: Collection[str] = (),
) -> KerasRegion:
    inside = {id(call) for call in frozen}
    outputs = [v for v in keras.tree.flatten(graph.outputs) if isinstance(v, Value)]
    live = [call for call in graph.calls if id(call) not in inside]
    # Only what leads to the outputs counts; masks travel with the values that they belong to.
    read = dict.fromkeys(value for call in live for value in call.inputs)
    read.update(dict.fromkeys(outputs))
    read.update(dict.fromkeys(v.mask for v in list(read) if v.mask is not None))
    given = {value for call in frozen for value in call.outputs}
    return KerasRegion(
        graph,
        tuple(call.name for call in frozen),
        tuple(value for value in read if value in given and value not in shared),
        tuple(value for value in read if value in set(graph.inputs)),
        {value: shared[value] for value in read if value in shared},
        dict(reasons),
        tuple(call.name for call in frozen if call.name in draws),
    )


def _in_front(graph: Graph) -> list[Call]:
    """The calls that nothing with weights leads to."""
    return _grown(graph, lambda call: not getattr(call.operation, "weights", ()))


def seed_states(call: Call) -> list[keras.Variable]:
    """The states of random seeds among a call's variables."""
    weights = {id(v) for v in getattr(call.operation, "weights", ())}
    return [v for v in call.variables if id(v) not in weights]


# -- by trial ------------------------------------------------------------------------------------


def _at_once(
    graph: Graph,
    candidates: Sequence[Call],
    samples: Sequence[NDArray[Any]],
    reasons: Mapping[str, str],
) -> KerasRegion | None:
    """The region if all candidates are frozen indeed; None: they have to be told apart.

    Only what they hand over is looked at: in training and in other company, against inference.
    """
    region = _region(graph, candidates, {}, reasons)
    if not region.frontier:
        return None
    model = frozen_model(region)
    variables = [variable for _, variable in region.variables]
    with put_back(variables) as before:
        calm = run(model, _batch(samples, _TRIED), training=False)
        mixed = run(model, _batch(samples, _MIXED), training=True)
        silent = all(same_bits(before[id(v)], as_numpy(v)) for v in variables)
        silent = silent and not any(layer.losses for layer in walk(candidates))
    alone = all(
        one.shape[:1] == (len(_TRIED),)
        and other.shape[:1] == (len(_MIXED),)
        and close(other, one[list(_MIXED)])
        for one, other in zip(calm, mixed, strict=True)
    )
    return region if silent and alone else None


def _batch(samples: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[NDArray[Any]]:
    count = len(samples[0])
    return [array[[row % count for row in rows]] for array in samples]


class _Trial:
    """What candidates do with real samples.

    Args:
        graph, candidates, samples: whose calls, which of them, on what.
        draws: let in what draws random numbers before any weights are used.
    """

    def __init__(
        self,
        graph: Graph,
        candidates: Sequence[Call],
        samples: Sequence[NDArray[Any]],
        *,
        draws: bool = False,
    ) -> None:
        self.shared: dict[Value, NDArray[Any]] = {}
        self.drawing: set[str] = set()
        self._candidates = {id(call) for call in candidates}
        self._draws = draws
        self._front = {id(call) for call in _in_front(graph)} if draws else set()
        self._values = [value for call in candidates for value in call.outputs]
        self._inputs, self._known = replica(graph, graph.inputs, self._values, shared={})
        self._model = self.model_to(self._values)
        variables = [variable for _, variable in variables_of(candidates)]
        seeds = [v for call in candidates for v in seed_states(call)] if draws else []
        with put_back(variables) as before:

            def again(rows: Sequence[int], *, training: bool) -> dict[Value, NDArray[Any]]:
                for variable in seeds:
                    variable.assign(before[id(variable)])
                return self._run(samples, rows, training=training)

            self._first = again(_TRIED, training=True)
            self._changed = {
                id(v) for v in variables if not same_bits(before[id(v)], as_numpy(v))
            }  # fmt: skip
            self._losses = {id(layer) for layer in walk(candidates) if layer.losses}
            self._again = again(_TRIED, training=True)
            self._calm = again(_TRIED, training=False)
            # What is drawn depends on the place in the batch: then only the company changes.
            self._others = again(_COMPANY if draws else _MIXED, training=True)
        self._random = self._drawn(graph) if draws else set()

    def model_to(self, values: Iterable[Value]) -> keras.Model:
        """From the inputs to some of the candidates' outputs, through the calls of this trial."""
        outputs = [self._known[value] for value in values]
        return keras.Model(self._inputs, outputs, name="frostline_frozen")

    def _run(
        self, samples: Sequence[NDArray[Any]], rows: Sequence[int], *, training: bool
    ) -> dict[Value, NDArray[Any]]:
        found = run(self._model, _batch(samples, rows), training=training)
        return dict(zip(self._values, found, strict=True))

    def verdict(self, call: Call, candidates: Sequence[Call], reasons: dict[str, str]) -> bool:
        """Whether a candidate, all of whose inputs are frozen, is frozen itself."""
        if call not in candidates:
            return False
        why = self._why(call)
        if why:
            reasons[call.name] = why
        return not why

    def _why(self, call: Call) -> str:
        layer = call.operation
        if changed := [v for v in call.variables if id(v) in self._changed]:
            seeds = {id(v) for v in seed_states(call)}
            if any(id(v) not in seeds for v in changed):
                return f"changes its {few([v.name for v in changed])} in training"
            if id(call) not in self._front:
                return _RANDOM
            self.drawing.add(call.name)
        if id(layer) in self._losses:
            return "adds to the loss"
        for value in call.outputs:
            if why := self._doubt(value):
                return why
        return ""

    def _drawn(self, graph: Graph) -> set[Value]:
        """The values that follow from random draws: training and inference differ there."""
        found: set[Value] = set()
        for call in graph.calls:
            draws = any(id(v) in self._changed for v in seed_states(call))
            if id(call) in self._candidates and (draws or not found.isdisjoint(call.inputs)):
                found.update(call.outputs)
        return found

    def _doubt(self, value: Value) -> str:
        first, again = self._first[value], self._again[value]
        if not same_bits(first, again):
            return "gives another result when it runs again"
        if value not in self._random and not same_bits(first, self._calm[value]):
            return "computes something else in inference"
        if len(first.shape) and len(first) == len(_TRIED) and self._has_rows(value):
            return "" if self._is_alone(value) else "mixes the samples of a batch"
        if value not in self._random and same_bits(first, self._others[value]):
            self.shared[value] = first
            return ""
        return "gives no row for each sample"

    def _has_rows(self, value: Value) -> bool:
        """Whether the number of rows follows that of the samples, as far as it was tried."""
        others = self._others[value]
        return len(others) == len(_COMPANY if self._draws else _MIXED)

    def _is_alone(self, value: Value) -> bool:
        """Whether a sample gives the same in the company of others."""
        first, others = self._first[value], self._others[value]
        if self._draws:
            return close(others[:1], first[:1])
        return close(others, first[list(_MIXED)])


@contextmanager
def put_back(variables: Sequence[keras.Variable]) -> Iterator[dict[int, NDArray[Any]]]:
    """Values as they are now, by id; whatever is changed inside has them again afterwards."""
    kept = {id(v): np.array(as_numpy(v)) for v in variables}
    try:
        yield kept
    finally:
        for variable in variables:
            if not same_bits(kept[id(variable)], as_numpy(variable)):
                variable.assign(kept[id(variable)])


def flat_inputs(model: keras.Model, x: Any) -> list[NDArray[Any]]:
    """The samples as arrays in the order and of the types of `model.inputs`.

    Raises:
        FrontierError: another number of arrays, names, ranks or samples than the model takes.
    """
    wanted = list(model.inputs)
    names = [tensor.name for tensor in wanted]
    if isinstance(x, Mapping):
        inputs = ends(model)[0]
        keys = sorted(inputs) if isinstance(inputs, dict) else names
        arrays = [x[key] for key in keys if key in x]
    else:
        arrays = list(keras.tree.flatten(x))
    found = [np.asarray(as_numpy(array)) for array in arrays]
    fits = len(found) == len(wanted) and all(
        array.ndim == len(tensor.shape) and len(array) == len(found[0]) and len(array)
        for array, tensor in zip(found, wanted, strict=True)
    )
    if not fits:
        raise FrontierError(
            f"run {model.name} on these samples",
            found="arrays of shapes " + str([array.shape for array in found]),
            fix="one array per input, samples first: "
            + ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(names, wanted, strict=True)),
        )
    return [a.astype(t.dtype, copy=False) for a, t in zip(found, wanted, strict=True)]


def run(
    model: keras.Model, batch: Sequence[NDArray[Any]], *, training: bool = False
) -> list[NDArray[Any]]:
    """What a functional model gives for a few samples, layer by layer, without compiling it."""
    tensors = [keras.ops.convert_to_tensor(array) for array in batch]
    results = keras.tree.flatten(
        model(tensors if len(tensors) > 1 else tensors[0], training=training)
    )
    # What Keras says of symbolic tensors is no help: a product with a number counts as sparse.
    odd = [type(r).__name__ for r in results if re.search("Sparse|Ragged|BCOO", type(r).__name__)]
    if odd:
        raise FrontierError(
            "cut the model at its frozen layers",
            found=f"that they compute a {odd[0]}",
            fix="train this model uncached",
        )
    return [as_numpy(result) for result in results]


def as_numpy(value: Any) -> NDArray[Any]:
    """The values of a tensor or variable, or the array itself; perhaps a view: do not write."""
    if isinstance(value, np.ndarray):
        return value
    moves = isinstance(value, keras.Variable)
    if moves:
        value = keras.ops.convert_to_tensor(value)
    if keras.backend.backend() == "tensorflow" and hasattr(value, "numpy"):
        # Keras's own way asks for a copy in words that TensorFlow's tensors do not know; and of
        # what stays as it is, batches of pictures among it, no copy is needed.
        return np.asarray(value.numpy() if moves else value)
    return np.asarray(keras.ops.convert_to_numpy(value))


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are of one type and shape, and equal bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def close(one: NDArray[Any], other: NDArray[Any], *, times: float = 1.0) -> bool:
    """Whether two arrays are equal but for rounding; of other than floating types, exactly.

    Example:
        >>> one = np.ones(3, np.float32)
        >>> close(one, one * np.float32(1 + 1e-6)), close(one, one * 2)
        (True, False)
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    tolerance = _TOLERANCE.get(str(one.dtype))
    if tolerance is None:
        return bool((one == other).all())
    wide, wider = one.astype(np.float64), other.astype(np.float64)
    odd = ~(np.isfinite(wide) & np.isfinite(wider))
    if not np.array_equal(wide[odd], wider[odd], equal_nan=True):
        return False
    wide, wider = wide[~odd], wider[~odd]
    largest = max(np.abs(wide).max(initial=0), np.abs(wider).max(initial=0))
    return bool(np.abs(wide - wider).max(initial=0) <= times * tolerance * largest)
