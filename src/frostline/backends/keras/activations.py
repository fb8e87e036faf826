"""The probe batch of a Keras model, and what each layer group puts out for it.

The batch is the input of one training step, kept when a split step begins. The model runs on it in
inference, in a stateless scope: what its layers assign goes nowhere.

What a layer group puts out is the output of the layer of the group that finished last (the first
floating-point tensor of it); of a layer that runs several times, the last run counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.backends.keras.arrays import Array, array_of, single_array
from frostline.backends.keras.kernels import output_axes
from frostline.backends.keras.names import SEPARATOR, can_train, owners, tensors
from frostline.backends.keras.tracing import on_every_call
from frostline.errors import BackendError
from frostline.groups import LayerGroups

__all__ = ["ProbeBatch"]

_INT8_STEPS = 127


class ProbeBatch:
    """One batch of one model, kept for signals of activations.

    Args:
        model: the model.
        groups: its layer groups.
    """

    def __init__(self, model: keras.Model, groups: LayerGroups) -> None:
        self._model = model
        self._sources = {path: g.name for g in groups for path in _outermost(g.modules)}
        self._inputs: Any = None
        self._waiting = False

    def keep_next(self) -> None:
        """Keep the inputs of the next training step, unless a batch is kept."""
        self._waiting = self._inputs is None

    def take(self, data: Any) -> None:
        """A training step begins with this batch: (x, y) or (x, y, sample_weight)."""
        if self._waiting:
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            self._inputs = keras.tree.map_structure(_copied, x)
            self._waiting = False

    def to_tree(self) -> Any:
        """The batch as arrays, nested as the model takes them; None if there is none."""
        return keras.tree.map_structure(_copied, self._inputs)

    def from_tree(self, tree: Any) -> None:
        """Take back what `to_tree` gave."""
        self._waiting = False
        self._inputs = keras.tree.map_structure(_copied, tree)

    def outputs(self, *, int8: bool = False) -> dict[str, Array]:
        """What each layer group puts out, (samples, features) in single precision, by name.

        Groups that put out nothing usable are absent.

        Args:
            int8: round all weights of two or more dimensions to 8 bits per output channel first.

        Raises:
            BackendError: no batch was kept, or the model cannot run on it in inference.
        """
        if self._inputs is None:
            raise BackendError(
                "read activations",
                found="no probe batch",
                fix="keep_batch() before a training step",
            )
        size = next(len(a) for a in keras.tree.flatten(self._inputs) if np.ndim(a))
        found: dict[str, Array] = {}

        def around(path: str, call: Callable[[], Any]) -> Any:
            output = call()
            if (group := self._sources.get(path)) is not None:
                for tensor in _usable(output, size):
                    found[group] = tensor
                    break
            return output

        mapping = list(_rounded(self._model)) if int8 else []
        try:
            with keras.StatelessScope(state_mapping=mapping), on_every_call(self._model, around):
                self._run()
        except Exception as error:
            raise BackendError(
                f"run {self._model.name} on its probe batch in inference",
                found=f"{type(error).__name__}: {error}",
                fix="use a policy that reads no activations",
            ) from error
        return found

    def _run(self) -> None:
        if keras.backend.backend() == "torch":
            import torch  # noqa: PLC0415 (only on this backend of Keras)

            with torch.no_grad():
                self._model(self._inputs, training=False)
        else:
            self._model(self._inputs, training=False)


def _rounded(model: keras.Model) -> Iterator[tuple[keras.Variable, Any]]:
    """8-bit versions of the weights, one step size per output channel; vectors stay."""
    holders, trainable = owners(model), can_train(model)
    for name, variable in tensors(model).items():
        if name not in trainable or variable.ndim < 2:
            continue
        array = single_array(variable)
        channels = output_axes(name, array.ndim, holders[name])
        others = tuple(a for a in range(array.ndim) if a not in channels)
        step = np.abs(array).max(axis=others, keepdims=True) / np.float32(_INT8_STEPS)
        whole = np.round(array / np.where(step == 0, 1, step))
        yield variable, ops.convert_to_tensor(whole * step, dtype=variable.dtype)


def _outermost(modules: Any) -> list[str]:
    paths = {m.name for m in modules if m.name}
    return [p for p in paths if not any(p.startswith(f"{o}{SEPARATOR}") for o in paths)]


def _usable(output: Any, size: int) -> Iterator[Array]:
    for tensor in keras.tree.flatten(output):
        if ops.is_tensor(tensor) and keras.backend.is_float_dtype(tensor.dtype):
            array = np.array(single_array(tensor), np.float32)
            if (flat := _by_sample(array, size)) is not None:
                yield flat


def _by_sample(array: Array, size: int) -> Array | None:
    """The array as (samples, features), wherever its samples are; None if nowhere."""
    if array.ndim and size and array.shape[0] % size == 0:
        return array.reshape(size, -1)
    for place, length in enumerate(array.shape):
        if length == size:
            return np.moveaxis(array, place, 0).reshape(size, -1)
    return None


def _copied(value: Any) -> Any:
    return None if value is None else np.array(array_of(value))
