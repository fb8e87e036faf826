"""The frozen part alone, run on arrays: compiled once, as the user's own model is.

In inference it is a function of samples and weights. Where random layers in front of the frozen
ones augment the samples, it also runs as in training, with the random seeds set for each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.frontier.keras.region import as_numpy, put_back

__all__ = ["Forward"]

_Run = Callable[[list[Any], list[Any]], Any]


class Forward:
    """Runs a functional model on whole batches, with no trace left.

    On JAX it keeps its own copies of the variables' values: those of the model are given away
    while `fit` runs.

    Args:
        model: with a list of outputs; shares the user's layers.
        like: the user's model, compiled: whether it runs eagerly, and whether by XLA.
        seeds: states of the random seeds that it draws from in training.

    Example:
        >>> inputs = keras.Input((3,))
        >>> part = keras.Model(inputs, [keras.layers.Rescaling(2.0)(inputs)])
        >>> whole = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> whole.compile("sgd", "mse")
        >>> Forward(part, whole)([np.ones((2, 3), np.float32)])[0].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """

    def __init__(
        self, model: keras.Model, like: keras.Model, seeds: Sequence[keras.Variable] = ()
    ) -> None:
        self._model, self._seeds = model, list(seeds)
        self._make = _MAKERS[keras.backend.backend()](model, like, self._seeds)
        self._runs: dict[bool, _Run] = {}

    def __call__(self, batch: Sequence[NDArray[Any]], first: int = 0) -> list[NDArray[Any]]:
        """What the model gives in inference, `(N, ...)` each.

        Args:
            batch: one array per input, `(N, ...)` each.
            first: of no account; here so that this can compute blocks.
        """
        del first
        return self._run(batch, [], training=False)

    def drawn(
        self, batch: Sequence[NDArray[Any]], seed_of: Callable[[int], int]
    ) -> list[NDArray[Any]]:
        """What it gives in training, drawing from seeds that are set for this call alone.

        Args:
            batch: as above.
            seed_of: from the number of a random seed of the model to its value.
        """
        values = [
            np.array([seed_of(number) & 0x7FFFFFFF, 0], variable.dtype)
            for number, variable in enumerate(self._seeds)
        ]
        return self._run(batch, values, training=True)

    def _run(
        self, batch: Sequence[NDArray[Any]], seeds: list[Any], *, training: bool
    ) -> list[NDArray[Any]]:
        if training not in self._runs:
            self._runs[training] = self._make(training)
        tensors = [keras.ops.convert_to_tensor(array) for array in batch]
        return [
            as_numpy(value) for value in keras.tree.flatten(self._runs[training](tensors, seeds))
        ]


def _call(model: keras.Model, tensors: Sequence[Any], *, training: bool) -> Any:
    return model(list(tensors) if len(tensors) > 1 else tensors[0], training=training)


def _in_place(seeds: Sequence[keras.Variable], run: Callable[[list[Any]], Any]) -> _Run:
    """Where variables are read in place: they hold the seeds for the length of the call."""

    def seeded(tensors: list[Any], values: list[Any]) -> Any:
        if not values:
            return run(tensors)
        with put_back(seeds):
            for variable, value in zip(seeds, values, strict=True):
                variable.assign(value)
            return run(tensors)

    return seeded


def _tensorflow(
    model: keras.Model, like: keras.Model, seeds: Sequence[keras.Variable]
) -> Callable[[bool], _Run]:
    import tensorflow as tf  # noqa: PLC0415  only where Keras runs on it

    def make(training: bool) -> _Run:
        def forward(*tensors: Any) -> Any:
            return _call(model, tensors, training=training)

        if not like.run_eagerly:
            # One signature for all sizes of batches: traced once.
            signature = [tf.TensorSpec((None, *t.shape[1:]), t.dtype) for t in model.inputs]
            forward = tf.function(
                forward, input_signature=signature, autograph=False,
                jit_compile=bool(like.jit_compile),
            )  # fmt: skip
        return _in_place(seeds, lambda tensors: forward(*tensors))

    return make


def _torch(
    model: keras.Model, like: keras.Model, seeds: Sequence[keras.Variable]
) -> Callable[[bool], _Run]:
    import torch  # noqa: PLC0415

    def make(training: bool) -> _Run:
        def forward(tensors: list[Any]) -> Any:
            with torch.no_grad():
                return _call(model, tensors, training=training)

        compiled = like.jit_compile and not like.run_eagerly
        return _in_place(seeds, torch.compile(forward) if compiled else forward)

    return make


def _jax(
    model: keras.Model, like: keras.Model, seeds: Sequence[keras.Variable]
) -> Callable[[bool], _Run]:
    import jax  # noqa: PLC0415

    def values(variables: Sequence[keras.Variable]) -> list[Any]:
        return [jax.numpy.array(variable.value, copy=True) for variable in variables]

    trainable, others = values(model.trainable_variables), values(model.non_trainable_variables)
    order = {id(v): number for number, v in enumerate(model.non_trainable_variables)}
    places = [order[id(variable)] for variable in seeds]

    def make(training: bool) -> _Run:
        def forward(trainable: list[Any], others: list[Any], tensors: list[Any]) -> Any:
            given = tensors if len(tensors) > 1 else tensors[0]
            return model.stateless_call(trainable, others, given, training=training)[0]

        step = jax.jit(forward) if like.jit_compile and not like.run_eagerly else forward

        def run(tensors: list[Any], seeds: list[Any]) -> Any:
            state = list(others)
            for place, value in zip(places if seeds else [], seeds, strict=True):
                state[place] = jax.numpy.asarray(value)
            return step(trainable, state, tensors)

        return run

    return make


_MAKERS: dict[str, Callable[..., Callable[[bool], _Run]]] = {
    "tensorflow": _tensorflow,
    "torch": _torch,
    "jax": _jax,
}
