"""Run a model once, symbolically where possible, and note which layer ran when."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from frostline.backends.keras.names import layers, tensors
from frostline.errors import ModelError

__all__ = ["Trace", "batch_values", "made_up_batches", "on_every_call", "trace_model"]

#: Sizes tried for dimensions that a model leaves open, the batch excepted.
OPEN_SIZES = (64, 224, 32, 16, 8, 128)
BATCH_SIZE = 2
REASONS_SHOWN = 3


@dataclass(slots=True)
class Trace:
    """One forward pass in inference.

    Attributes:
        entered: when each layer ran first, by path; layers that never ran are absent.
        calls: how often each layer ran, by path.
        symbolic: whether nothing was computed.
    """

    symbolic: bool = True
    entered: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def note(self, path: str) -> None:
        """A layer runs."""
        self.entered.setdefault(path, len(self.entered))
        self.calls[path] = self.calls.get(path, 0) + 1


def trace_model(model: keras.Layer, example: Any = None) -> Trace:
    """Which layers run, in which order, in one forward pass in inference mode.

    The pass is symbolic: no arithmetic, no variable moves. A model that cannot run symbolically
    (control flow that depends on values) runs the batch in earnest; its variables are put back.

    Args:
        model: a model that is built.
        example: what `model(...)` takes: an array, or a list, tuple or dictionary of arrays. None
            makes one up from the shapes that the model was built with.

    Raises:
        ModelError: the model runs on no batch that was tried.
    """
    failures: dict[str, None] = {}
    for batch in [example] if example is not None else made_up_batches(model):
        for run in (_symbolic, _eager):
            try:
                return run(model, batch)
            except Exception as error:  # noqa: BLE001 (anything a user's layer raises)
                failures[f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"] = None
    tried = "; ".join(list(failures)[:REASONS_SHOWN]) or "nothing in the model tells its input"
    raise ModelError(
        f"run {model.name} to see the order of its layers",
        found=tried,
        fix="pass a batch that the model can run on: layer_groups(model, x)",
    )


@contextmanager
def on_every_call(
    model: keras.Layer, around: Callable[[str, Callable[[], Any]], Any]
) -> Iterator[None]:
    """Inside the block every call of every layer goes through `around(path, call)`.

    Keras calls a layer's `call` (`quantized_call` where quantized) as found on the instance, so a
    wrapper there sees each call; afterwards the instances are what they were.
    """
    with ExitStack() as restored:
        for path, layer in layers(model):
            for method in ("call", "quantized_call"):
                restored.callback(_wrap(layer, method, path, around))
        yield


def _wrap(
    layer: Any, method: str, path: str, around: Callable[[str, Callable[[], Any]], Any]
) -> Callable[[], None]:
    original = getattr(layer, method)
    own = method in vars(layer)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(path, lambda: original(*args, **kwargs))

    setattr(layer, method, wrapper)
    return lambda: setattr(layer, method, original) if own else delattr(layer, method)


def _symbolic(model: keras.Layer, batch: Any) -> Trace:
    specs = keras.tree.map_structure(_spec, batch)
    runs: list[Trace] = []

    class Runner(keras.Layer):
        """Runs the model in Keras's symbolic scope: a model asked itself takes short cuts."""

        def call(self, inputs: Any) -> Any:
            # Keras may run this twice (another device, another size): the last run counts.
            runs.append(Trace())
            return model(inputs, training=False)

    def around(path: str, call: Callable[[], Any]) -> Any:
        runs[-1].note(path)
        return call()

    with on_every_call(model, around), warnings.catch_warnings():
        # Where this fails the batch is run in earnest; what is said of `Runner` helps nobody.
        warnings.simplefilter("ignore")
        Runner(dtype=model.dtype_policy).compute_output_spec(specs)
    return runs[-1]


def _eager(model: keras.Layer, batch: Any) -> Trace:
    trace = Trace(symbolic=False)

    def around(path: str, call: Callable[[], Any]) -> Any:
        trace.note(path)
        return call()

    values = batch_values(batch)
    kept = {n: keras.ops.copy(v.value) for n, v in tensors(model).items() if not v.trainable}
    try:
        with on_every_call(model, around):
            model(values, training=False)
    finally:
        for name, variable in tensors(model).items():
            if name in kept:
                variable.assign(kept[name])
    return trace


def _spec(x: Any) -> keras.KerasTensor:
    if isinstance(x, keras.KerasTensor):
        return x
    dtype = keras.backend.standardize_dtype(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype)
    return keras.KerasTensor(tuple(np.shape(x)), dtype)


def batch_values(batch: Any) -> Any:
    """A batch in numbers: specifications become random values (zeros for integers)."""
    return keras.tree.map_structure(_values, batch)


def _values(x: Any) -> Any:
    if not isinstance(x, keras.KerasTensor):
        return keras.ops.convert_to_tensor(x)
    if "int" in x.dtype:
        return keras.ops.zeros(x.shape, x.dtype)
    # A private generator: the random state of Keras does not move.
    values = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    return keras.ops.convert_to_tensor(values, x.dtype)


def made_up_batches(model: Any, *, batch_size: int = BATCH_SIZE) -> Iterator[Any]:
    """Specifications (`KerasTensor`) of batches, from what the model says of its inputs.

    Args:
        model: a built model.
        batch_size: samples in a batch, where the model leaves it open.
    """
    declared = getattr(model, "input", None)
    if declared is not None:
        yield from _filled(declared, batch_size)
        return
    config = model.get_build_config() or {}
    shapes = config.get("input_shape") or config.get("shapes_dict")
    if shapes is None:
        return
    for dtype in (model.compute_dtype, "int32"):
        specs = keras.tree.map_shape_structure(
            lambda shape, dtype=dtype: keras.KerasTensor((None, *shape[1:]), dtype), shapes
        )
        yield from _filled(specs, batch_size)


def _filled(specs: Any, batch_size: int) -> Iterator[Any]:
    done: set[str] = set()
    for size in OPEN_SIZES:
        filled = keras.tree.map_structure(lambda t, size=size: _fill(t, batch_size, size), specs)
        key = str(keras.tree.map_structure(lambda t: t.shape, filled))
        if key not in done:
            done.add(key)
            yield filled


def _fill(tensor: keras.KerasTensor, batch_size: int, size: int) -> keras.KerasTensor:
    batch, *rest = tensor.shape
    shape = (batch or batch_size, *(size if d is None else d for d in rest))
    return keras.KerasTensor(shape, tensor.dtype)
