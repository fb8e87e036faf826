"""Which calls of a Keras model are frozen: known from its flags, then tried on real samples.

A call is frozen when all it reads is frozen and it has nothing that trains. What the flags cannot
tell is tried: the candidates run on a few real samples, twice, in training and in inference, alone
and in another batch. Whatever writes state, draws random numbers, answers differently or mixes
the samples of a batch counts as live, with the reason, and so does all that follows from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
#: Samples of the trial, and of the same samples in another batch.
_TRIED, _MIXED = (0, 1, 2), (2, 0, 1, 1, 0)


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
        built: models made from it so far.
    """

    graph: Graph
    frozen: tuple[str, ...]
    frontier: tuple[Value, ...]
    passed: tuple[Value, ...]
    shared: Mapping[Value, NDArray[Any]]
    reasons: Mapping[str, str]
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
    def live(self) -> tuple[str, ...]:
        """Names of the calls that run at each step."""
        return tuple(call.name for call in self.graph.calls if call.name not in set(self.frozen))

    @property
    def why_not(self) -> str:
        """Why storing the frontier would save nothing; empty when it may."""
        if not self.variables:
            why = few([f"{name} {why}" for name, why in self.reasons.items()])
            return f"no layer with weights is frozen from the inputs on ({why})"
        if all(isinstance(v, Value) and v in self.frontier for v in self._outputs):
            return "nothing is live: there is nothing to train"
        return ""

    @property
    def _outputs(self) -> list[Any]:
        return keras.tree.flatten(self.graph.outputs)

    def describe(self) -> str:
        """One sentence for people."""
        if self.why_not:
            return f"not cached: {self.why_not}"
        handed = few([value.name for value in self.frontier])
        return f"{len(self.frozen)} of {len(self.graph.calls)} calls are frozen; kept: {handed}"


def find_region(model: keras.Model, x: Any, *, wrapped: bool = False) -> KerasRegion:
    """The frozen region under the model's present `trainable` flags and modes.

    Args:
        model: functional or Sequential, built.
        x: real samples as arrays, in the structure that the model takes, samples first; a few
            are tried (and the model's state is put back afterwards).
        wrapped: the model's `call` is replaced, and runs the recorded graph all the same.

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
    shared: dict[Value, NDArray[Any]] = {}
    if candidates:
        trial = _Trial(graph, candidates, samples)
        candidates = _grown(graph, lambda call: trial.verdict(call, candidates, reasons))
        shared = trial.shared
    return _region(graph, candidates, shared, reasons)


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
    )


# -- by trial ------------------------------------------------------------------------------------


class _Trial:
    """What candidates do with real samples."""

    def __init__(
        self, graph: Graph, candidates: Sequence[Call], samples: Sequence[NDArray[Any]]
    ) -> None:
        self.shared: dict[Value, NDArray[Any]] = {}
        self._values = [value for call in candidates for value in call.outputs]
        inputs, known = replica(graph, graph.inputs, self._values, shared={})
        model = keras.Model(inputs, [known[value] for value in self._values])
        count = len(samples[0])
        tried = [array[[row % count for row in _TRIED]] for array in samples]
        mixed = [array[[_TRIED[row] % count for row in _MIXED]] for array in samples]
        variables = [variable for _, variable in variables_of(candidates)]
        with put_back(variables) as before:
            self._first = self._run(model, tried, training=True)
            self._changed = {
                id(v) for v in variables if not same_bits(before[id(v)], as_numpy(v))
            }  # fmt: skip
            self._losses = {id(layer) for layer in walk(candidates) if layer.losses}
            self._again = self._run(model, tried, training=True)
            self._calm = self._run(model, tried, training=False)
            self._mixed = self._run(model, mixed, training=True)

    def _run(
        self, model: keras.Model, batch: list[NDArray[Any]], *, training: bool
    ) -> dict[Value, NDArray[Any]]:
        return dict(zip(self._values, run(model, batch, training=training), strict=True))

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
            weights = {id(v) for v in getattr(layer, "weights", ())}
            if all(id(v) not in weights for v in changed):
                return "draws random numbers in training"
            return f"changes its {few([v.name for v in changed])} in training"
        if id(layer) in self._losses:
            return "adds to the loss"
        for value in call.outputs:
            if why := self._doubt(value):
                return why
        return ""

    def _doubt(self, value: Value) -> str:
        first, again = self._first[value], self._again[value]
        if not same_bits(first, again):
            return "gives another result when it runs again"
        if not same_bits(first, self._calm[value]):
            return "computes something else in inference"
        mixed = self._mixed[value]
        if len(first.shape) and (len(first), len(mixed)) == (len(_TRIED), len(_MIXED)):
            alone = first[list(_MIXED)]
            return "" if close(mixed, alone) else "mixes the samples of a batch"
        if same_bits(first, mixed):
            self.shared[value] = first
            return ""
        return "gives no row for each sample"


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
    """The values of a tensor or variable, or the array itself."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, keras.Variable):
        value = keras.ops.convert_to_tensor(value)
    if keras.backend.backend() == "tensorflow" and hasattr(value, "numpy"):
        # Keras's own way asks for a copy in words that TensorFlow's tensors do not know.
        return np.asarray(value.numpy())
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
