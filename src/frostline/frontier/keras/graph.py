"""The graph of a Keras model as plain calls, and new models over parts of it.

Functional and Sequential models record every call of a layer. Here that record becomes one flat
list: calls of nested models are opened where that changes nothing, so that a boundary may run
through a backbone that was called as one layer. `build` makes a functional model from any set of
values to any other, with the user's own layers: their variables are shared, nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError

__all__ = ["Call", "Graph", "Value", "build", "flatten", "replica"]

Structure = Any
#: Names of all inputs that `build` makes differ, also between models: Keras warns otherwise.
_numbers = itertools.count()


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of the graph.

    Attributes:
        name: of the call that gives it; ":1" and so on for its further outputs.
        shape: (None, ...) as far as known before any data was seen.
        dtype: e.g. "float32".
        mask: the Keras mask that travels with it; None: none does.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    mask: Value | None = None

    def __repr__(self) -> str:
        return f"Value({self.name})"


@dataclass(eq=False, slots=True)
class Call:
    """One call of a layer or another operation.

    Attributes:
        name: route of layer names, "backbone/conv1"; "#2" and so on for a later call of it.
        operation: what is called.
        args, kwargs: as recorded, with a `Value` in place of each symbolic tensor.
        outputs: in Keras's flat order.
    """

    name: str
    operation: keras.Operation
    args: tuple[Structure, ...]
    kwargs: dict[str, Structure]
    outputs: list[Value] = field(default_factory=list)

    @property
    def inputs(self) -> list[Value]:
        """The values that it reads, with the masks that travel with them."""
        found = [v for v in keras.tree.flatten((self.args, self.kwargs)) if isinstance(v, Value)]
        return found + [v.mask for v in found if v.mask is not None]

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables it may read or write, seeds of random numbers included."""
        return list(self.operation.variables) if isinstance(self.operation, keras.Layer) else []


@dataclass(eq=False, slots=True)
class Graph:
    """A model as calls.

    Attributes:
        inputs: in the order of `model.inputs`.
        outputs: in the structure of the model's own outputs.
        calls: each after those whose outputs it reads.
    """

    inputs: list[Value]
    outputs: Structure
    calls: list[Call]


# -- reading -------------------------------------------------------------------------------------


def flatten(model: keras.Model, *, wrapped: bool = False) -> Graph:
    """The calls that a functional or Sequential model consists of.

    Args:
        model: which one.
        wrapped: its `call` is replaced, and runs the recorded graph all the same.

    Raises:
        FrontierError: a subclassed model, whose graph only its own Python code knows; one that is
            not built; sparse or ragged tensors.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")])
        >>> [call.name for call in flatten(model).calls]
        ['head']
    """
    if not is_graph(model) or ("call" in vars(model) and not wrapped):
        kind = type(model).__qualname__
        raise FrontierError(
            "cut the model at its frozen layers",
            found=f"{kind} computes by its own Python code, which records no graph of layers",
            fix="build it from keras.Input with the functional API; it trains uncached as it is",
        )
    inputs, outputs = ends(model)
    if not keras.tree.flatten(inputs):
        raise FrontierError(
            "cut the model at its frozen layers",
            found=f"{model.name} is not built, so its graph is not known yet",
            fix="begin it with keras.Input(shape), or call it once",
        )
    for tensor in model.inputs:
        if tensor.sparse or getattr(tensor, "ragged", False):
            raise FrontierError(
                "cut the model at its frozen layers",
                found=f"{tensor.name} is a sparse or ragged input",
                fix="train this model uncached",
            )
    values = [_value(tensor, producer(tensor)[0].operation.name) for tensor in model.inputs]
    reader = _Reader()
    known = dict(zip(map(id, keras.tree.flatten(inputs)), values, strict=True))
    found = reader.read(known, keras.tree.flatten(outputs), "")
    return Graph(values, keras.tree.pack_sequence_as(outputs, found), reader.calls)


def is_graph(layer: Any) -> bool:
    """Whether Keras's own code runs this model from its recorded graph.

    Example:
        >>> is_graph(keras.Sequential([])), is_graph(keras.layers.Dense(1))
        (True, False)
    """
    if not isinstance(layer, keras.Model):
        return False
    run = type(layer).call
    ours = run.__module__.startswith("keras.")
    plain = "__call__" not in vars(type(layer)) or type(layer).__module__.startswith("keras.")
    return ours and plain and run.__qualname__ in ("Functional.call", "Sequential.call")


def ends(model: keras.Model) -> tuple[Structure, Structure]:
    """The symbolic inputs and outputs in the model's own structure; empty while it is not built."""
    if isinstance(model, keras.Function):
        return model.input, model.output
    try:
        inputs, outputs = list(model.inputs), list(model.outputs)  # a Sequential's
    except AttributeError:
        return [], []
    return inputs, outputs[0] if len(outputs) == 1 else outputs


def producer(tensor: Any) -> tuple[Any, Any]:
    """The recorded call that gave a symbolic tensor, and the mask that travels with it.

    The one place that reads private attributes of Keras: it has no public way from a tensor to
    the one call that made it (`layer.output` knows the first call only), nor to its mask.
    """
    history = getattr(tensor, "_keras_history", None)
    if history is None or history.operation is None:
        return None, None
    node = history.operation._inbound_nodes[history.node_index]  # noqa: SLF001
    return node, getattr(tensor, "_keras_mask", None)


class _Reader:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._times: dict[str, int] = {}

    def read(self, known: dict[int, Value], outputs: Sequence[Any], route: str) -> list[Value]:
        """Add the calls that lead from known tensors to outputs; the outputs as values."""
        self._add(_ordered(outputs, known), known, route)
        return [known[id(tensor)] for tensor in outputs]

    def _add(self, nodes: Iterable[Any], known: dict[int, Value], route: str) -> None:
        for node in nodes:
            if not node.arguments.keras_tensors:
                raise FrontierError(
                    "cut the model at its frozen layers",
                    found=f"{route}{node.operation.name} feeds it, and is none of its inputs",
                    fix="list all keras.Input tensors when the model is made",
                )
            args, kwargs = mapped(
                lambda leaf: known[id(leaf)] if isinstance(leaf, keras.KerasTensor) else leaf,
                (node.arguments.args, node.arguments.kwargs),
            )
            if not self._opened(node, args, known, route):
                self._closed(node, args, kwargs, known, route)

    def _closed(
        self, node: Any, args: Any, kwargs: Any, known: dict[int, Value], route: str
    ) -> None:
        name = self._numbered(route + node.operation.name)
        call = Call(name, node.operation, tuple(args), dict(kwargs))
        self.calls.append(call)
        for number, tensor in enumerate(node.outputs):
            value = _value(tensor, f"{name}:{number}" if number else name)
            known[id(tensor)] = value
            call.outputs.append(value)
        for tensor in node.outputs:
            mask = producer(tensor)[1]
            if mask is not None:
                known[id(tensor)].mask = self.read(known, [mask], route)[0]

    def _opened(self, node: Any, args: Any, known: dict[int, Value], route: str) -> bool:
        """Take the calls inside a nested model for its own call, where they are the same."""
        model = node.operation
        if not is_graph(model) or "call" in vars(model) or model.activity_regularizer is not None:
            return False
        inputs, outputs = ends(model)
        inner, given = keras.tree.flatten(inputs), keras.tree.flatten(args[0]) if args else []
        plain = len(inner) == 1 or (len(args) == 1 and _same_structure(inputs, args[0]))
        same = len(args) == 1 and plain and 0 < len(given) == len(inner) and all(
            isinstance(value, Value)
            and value.mask is None
            and value.dtype == tensor.dtype
            and len(value.shape) == len(tensor.shape)
            for value, tensor in zip(given, inner, strict=True)
        )  # fmt: skip
        if not same or model.dtype_policy.quantization_mode is not None:
            return False
        values = dict(zip(map(id, inner), given, strict=True))
        found = self.read(
            values, keras.tree.flatten(outputs), f"{self._numbered(route + model.name)}/"
        )
        known.update(zip(map(id, node.outputs), found, strict=True))
        return True

    def _numbered(self, name: str) -> str:
        times = self._times[name] = self._times.get(name, 0) + 1
        return name if times == 1 else f"{name}#{times}"


def _ordered(outputs: Sequence[Any], known: Mapping[int, Value]) -> list[Any]:
    """Recorded calls that lead to outputs, each after those it reads; deep graphs included."""
    order: list[Any] = []
    entered, left = set(), set()
    waiting = [t for t in reversed(outputs) if id(t) not in known]
    while waiting:
        tensor = waiting[-1]
        node = producer(tensor)[0]
        if node is None:
            raise FrontierError(
                "cut the model at its frozen layers",
                found=f"the tensor {tensor.name}, which no recorded call gives",
                fix="list all keras.Input tensors when the model is made",
            )
        if node in left:
            waiting.pop()
        elif node in entered:
            waiting.pop()
            left.add(node)
            order.append(node)
        else:
            entered.add(node)
            waiting += [
                t for t in reversed(node.arguments.keras_tensors)
                if id(t) not in known and producer(t)[0] not in entered
            ]  # fmt: skip
    return order


def _value(tensor: Any, name: str) -> Value:
    return Value(name, tuple(tensor.shape), tensor.dtype)


def _same_structure(one: Structure, other: Structure) -> bool:
    try:
        keras.tree.assert_same_structure(
            keras.tree.lists_to_tuples(one), keras.tree.lists_to_tuples(other)
        )
    except (TypeError, ValueError):
        return False
    return True


# -- building ------------------------------------------------------------------------------------


def build(
    graph: Graph,
    sources: Sequence[Value],
    targets: Structure,
    *,
    shared: Mapping[Value, NDArray[Any]] | None = None,
    name: str | None = None,
) -> keras.Model:
    """A model from some values of a graph to others, made of the same layers.

    Args:
        graph: whose calls run.
        sources: the model's inputs, in this order; at least one.
        targets: its outputs, in any structure.
        shared: values that are the same for all samples, `(...)` without a sample dimension.
        name: of the model.

    Raises:
        FrontierError: a target that does not follow from the sources.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
        >>> graph = flatten(model)
        >>> rest = build(graph, graph.calls[0].outputs, graph.outputs)
        >>> rest.layers[-1] is model.layers[-1]
        True
    """  # noqa: E501
    inputs, known = replica(graph, sources, keras.tree.flatten(targets), shared=shared or {})
    outputs = keras.tree.map_structure(lambda value: known[value], targets)
    return keras.Model(inputs, outputs, name=name)


def replica(
    graph: Graph,
    sources: Sequence[Value],
    targets: Sequence[Value],
    *,
    shared: Mapping[Value, NDArray[Any]],
) -> tuple[list[Any], dict[Value, Any]]:
    """Symbolic inputs for the sources, and symbolic tensors for all that follows to the targets.

    Raises:
        FrontierError: a target that does not follow from the sources.
    """
    inputs = [
        keras.Input(value.shape[1:], dtype=value.dtype, name=f"frontier_{next(_numbers)}")
        for value in sources
    ]
    known: dict[Value, Any] = dict(zip(sources, inputs, strict=True))
    for value, array in shared.items():
        known[value] = _Shared(array)(inputs[0])
    for value in sources:
        if value.mask is not None and value.mask in known:
            known[value] = _Masked()([known[value], known[value.mask]])
    for call in needed(graph, targets, known):
        args, kwargs = mapped(
            lambda leaf: _found(known, leaf) if isinstance(leaf, Value) else leaf,
            (call.args, call.kwargs),
        )
        results = keras.tree.flatten(call.operation(*args, **kwargs))
        known.update((v, t) for v, t in zip(call.outputs, results, strict=True) if v not in known)
    for target in targets:
        _found(known, target)
    return inputs, known


def needed(graph: Graph, targets: Iterable[Value], known: Iterable[Value]) -> list[Call]:
    """The calls that targets need when other values are known, in order."""
    stop = set(known)
    wanted = set(targets) - stop
    found = []
    for call in reversed(graph.calls):
        if not wanted.isdisjoint(call.outputs):
            found.append(call)
            wanted.update(value for value in call.inputs if value not in stop)
    return found[::-1]


def _found(known: Mapping[Value, Any], value: Value) -> Any:
    if value not in known:
        raise FrontierError(
            f"compute {value.name} from a part of the model",
            found="that it needs values from outside of that part",
            fix="start from values that lead to it",
        )
    return known[value]


def mapped(function: Callable[[Any], Any], structure: Structure) -> Structure:
    """`keras.tree.map_structure`, whose annotations say less than it does."""
    return keras.tree.map_structure(function, structure)


def walk(calls: Iterable[Call]) -> Iterator[keras.Layer]:
    """The layers among some calls' operations, each once."""
    seen = set()
    for call in calls:
        if isinstance(call.operation, keras.Layer) and id(call.operation) not in seen:
            seen.add(id(call.operation))
            yield call.operation


class _Masked(keras.layers.Layer):
    """Lets a mask travel with a tensor again, as it did where both came from."""

    def __init__(self) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Any) -> Any:
        return inputs[0]

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        del previous_mask
        return inputs[1]


class _Shared(keras.layers.Layer):
    """A value that is the same for all samples."""

    def __init__(self, array: NDArray[Any]) -> None:
        super().__init__(autocast=False)
        self._array = np.array(array)
        self.built = True

    def call(self, x: Any) -> Any:
        del x
        return keras.ops.convert_to_tensor(self._array)
