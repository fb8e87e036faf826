"""Measure what each layer group of a Keras model costs in one training step.

Keras compiles a step as a whole, so what a group costs inside it cannot be timed. Measured are
wholes, compiled as Keras compiles: the forward pass in training and in inference, a full gradient,
and a gradient for the shallowest group alone, which is carried through all others. The wholes are
shared out among the groups by what each took in a forward pass that runs layer by layer: carrying
a gradient through a group, and making its weight gradients, are taken to be in proportion to its
forward pass, as they are for matrix products. Updates are shared out by parameters.

So the sums over all groups are measured; a single group's share is an estimate. A model with
several inputs is measured as if gradients were carried through the branch of the first group only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from frostline.backends.keras.names import can_train, layers, tensors
from frostline.backends.keras.tracing import batch_values, made_up_batches, on_every_call
from frostline.errors import ModelError
from frostline.groups import GroupCost, LayerGroups

__all__ = ["measure_costs"]

BATCH_SIZE = 8

Seconds = dict[str, float]


def measure_costs(
    model: keras.Model, groups: LayerGroups, example: Any = None, *, repeats: int = 3
) -> LayerGroups:
    """The same groups with the measured cost of one training step in each.

    The model runs in training mode, in its own precision, compiled with XLA if `model.compile`
    asked for that. The optimizer measured is AdamW. Variables and flags are put back afterwards.

    Args:
        model: the model that `groups` were found in.
        groups: its layer groups.
        example: the batch to run, as `model(...)` takes it; costs hold for its shape. None makes
            one up with 8 samples.
        repeats: how often each pass is timed, >= 1; the least time counts.

    Raises:
        ModelError: the model cannot run on the batch in training, or its output carries no
            gradient.

    Example:
        >>> from frostline.backends.keras.grouping import layer_groups
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(64),
        ...                           keras.layers.Dense(2)])
        >>> measure_costs(model, layer_groups(model)).measured
        True
    """
    if example is None:
        example = next(made_up_batches(model, batch_size=BATCH_SIZE), None)
    if example is None:
        raise _no_run(model, "nothing in the model tells its input")
    repeats = max(1, repeats)
    with _all_training(model):
        bench = _Bench(model, groups, batch_values(example))
        try:
            shares, frozen_shares, sizes = bench.layer_by_layer(repeats)
            wholes = bench.wholes(repeats)
        except ModelError:
            raise
        except Exception as error:  # anything a user's layer raises
            raise _no_run(model, f"{type(error).__name__}: {error}") from error
    return groups.with_costs(_shared_out(groups, wholes, shares, frozen_shares, sizes))


def _no_run(model: keras.Model, found: str) -> ModelError:
    return ModelError(
        f"run a training step of {model.name}",
        found=found,
        fix="pass a batch that the model can train on: measure_costs(model, groups, x)",
    )


def _shared_out(
    groups: LayerGroups,
    wholes: Seconds,
    shares: Seconds,
    frozen_shares: Seconds,
    sizes: Mapping[str, int],
) -> dict[str, GroupCost]:
    first = groups.names[0]
    forward = wholes["forward"]
    own = shares[first]
    deeper = max(0.0, wholes["full"] - wholes["through"])
    through = max(0.0, wholes["through"] - forward)
    # The gradient for the first group alone includes making it, besides carrying it there.
    first_s = min(through, deeper * own / (1 - own) if own < 1 else through)
    costs = {}
    for g in groups:
        share = shares[g.name] / (1 - own) if own < 1 else 0.0
        costs[g.name] = GroupCost(
            forward_s=forward * shares[g.name],
            input_grad_s=0.0 if g.name == first else (through - first_s) * share,
            weight_grad_s=first_s if g.name == first else deeper * share,
            optimizer_s=wholes["update"] * g.parameter_count / max(1, groups.parameter_count),
            activation_bytes=sizes.get(g.name, 0),
            frozen_forward_s=wholes["inference"] * frozen_shares[g.name],
        )
    return costs


class _Bench:
    """Runs the timed passes of one model on one batch."""

    def __init__(self, model: keras.Model, groups: LayerGroups, batch: Any) -> None:
        self._model = model
        self._groups = groups
        self._batch = batch
        self._owner = {m.name: g.name for g in groups for m in g.modules}
        by_name = tensors(model)
        self._parameters = [by_name[p.name] for g in groups for p in g.parameters]
        self._first = [by_name[p.name] for p in groups[0].parameters]

    def wholes(self, repeats: int) -> Seconds:
        """Seconds of whole passes, the least of several rounds."""
        make = _MAKERS[keras.backend.backend()](self._model, self._batch)
        passes = {
            "inference": make.forward(training=False),
            "forward": make.forward(training=True),
            "through": make.gradient(self._first),
            "full": make.gradient(self._parameters),
            "update": make.update(self._parameters),
        }
        for run in passes.values():
            run()  # compiles
        found = dict.fromkeys(passes, float("inf"))
        for _ in range(repeats):  # in turns, so that a busy moment hits all alike
            for name, run in passes.items():
                start = time.perf_counter()
                run()
                found[name] = min(found[name], time.perf_counter() - start)
        return found

    def layer_by_layer(self, repeats: int) -> tuple[Seconds, Seconds, dict[str, int]]:
        """Shares of the forward pass by group in training and inference; bytes of the outputs."""
        sizes: dict[str, int] = {}
        found = []
        for training in (True, False):
            self._timed(training, {})  # warm
            runs = []
            for _ in range(repeats):
                sizes = {}
                runs.append(self._timed(training, sizes))
            least = {g.name: min(r.get(g.name, 0.0) for r in runs) for g in self._groups}
            whole = sum(least.values())
            found.append({n: s / whole if whole else 1 / len(least) for n, s in least.items()})
        return found[0], found[1], sizes

    def _timed(self, training: bool, sizes: dict[str, int]) -> Seconds:
        """Seconds by group; what runs between two groups belongs to the earlier one."""
        spent: Seconds = {}
        current = next((g.name for g in self._groups if g.calls), self._groups.names[0])
        running: list[str] = []
        since = time.perf_counter()

        def switch(group: str) -> None:
            nonlocal current, since
            if group != current:
                now = time.perf_counter()
                spent[current] = spent.get(current, 0.0) + now - since
                current, since = group, now

        def around(path: str, call: Callable[[], Any]) -> Any:
            owner = self._owner.get(path)
            if owner is None:
                return call()
            running.append(owner)
            switch(owner)
            outputs = call()
            _wait(outputs)
            sizes[owner] = sizes.get(owner, 0) + _outputs_bytes(self._model, path, outputs)
            running.pop()
            switch(running[-1] if running else owner)
            return outputs

        with on_every_call(self._model, around), _unrecorded():
            self._model(self._batch, training=training)
        switch("")
        return spent


def _outputs_bytes(model: keras.Model, path: str, outputs: Any) -> int:
    """Bytes of what a layer hands on; layers of layers hand on what an inner one made."""
    if any(p.startswith(path + "/") for p, _ in layers(model)):
        return 0
    found = 0
    for x in keras.tree.flatten(outputs):
        if keras.ops.is_tensor(x):
            size = np.dtype(_host_dtype(x)).itemsize
            found += int(np.prod(x.shape, dtype=np.int64)) * size
    return found


def _host_dtype(x: Any) -> str:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return "uint16" if dtype == "bfloat16" else dtype


@contextmanager
def _all_training(model: keras.Model) -> Iterator[None]:
    """Everything trainable inside; flags, statistics and states of seeds put back afterwards."""
    variables = tensors(model)
    trained = can_train(model)
    flags = [(layer, layer.trainable) for _, layer in layers(model)]
    own = [(variables[n], variables[n].trainable) for n in trained]
    kept = [(v, keras.ops.copy(v.value)) for n, v in variables.items() if n not in trained]
    model.trainable = True
    try:
        yield
    finally:
        # The flag of a layer writes those of all in it, so from the outside in, variables last.
        for layer, flag in flags:
            layer.trainable = flag
        for variable, flag in own:
            variable.trainable = flag
        for variable, value in kept:
            variable.assign(value)


def _loss(outputs: Any) -> Any:
    """One number that depends on all that the model predicts."""
    flat: list[Any] = [
        keras.ops.mean(keras.ops.cast(x, "float32"))
        for x in keras.tree.flatten(outputs)
        if keras.ops.is_tensor(x) and "float" in keras.backend.standardize_dtype(x.dtype)
    ]
    if not flat:
        raise ModelError(
            "run a training step",
            found="an output that carries no gradient",
            fix="measure a model whose output depends on its parameters",
        )
    return sum(flat[1:], flat[0])


def _adamw(values: Sequence[Any]) -> list[Any]:
    """AdamW's arithmetic on values that stand for weights, gradients and slots alike."""
    ops: Any = keras.ops
    results = []
    for value in values:
        mean = value * 0.9 + value * 0.1
        square = value * 0.999 + value * value * 0.001
        results.append(value * 0.99 - mean / (ops.sqrt(square) + 1e-7) * 1e-3)
    return results


class _TensorFlow:
    """Compiled passes on TensorFlow."""

    def __init__(self, model: keras.Model, batch: Any) -> None:
        self._model = model
        self._batch = batch

    def forward(self, *, training: bool) -> Callable[[], None]:
        """A pass without gradients."""
        return self._compiled(lambda: _loss(self._model(self._batch, training=training)))

    def gradient(self, parameters: Sequence[Any]) -> Callable[[], None]:
        """A pass with gradients for some parameters, in training."""
        import tensorflow as tf  # noqa: PLC0415  only where Keras runs on it

        def run() -> Any:
            with tf.GradientTape() as tape:
                loss = _loss(self._model(self._batch, training=True))
            return tape.gradient(loss, [p.value for p in parameters])

        return self._compiled(run)

    def update(self, parameters: Sequence[Any]) -> Callable[[], None]:
        """The arithmetic of an update, written nowhere."""
        # Sums, so that nothing is left out and little handed over.
        return self._compiled(
            lambda: [keras.ops.sum(x) for x in _adamw([p.value * 1 for p in parameters])]
        )

    def _compiled(self, run: Callable[[], Any]) -> Callable[[], None]:
        import tensorflow as tf  # noqa: PLC0415

        compiled = tf.function(run, jit_compile=_jit(self._model), autograph=False)
        return lambda: _wait(compiled())


class _Jax:
    """Compiled passes on JAX."""

    def __init__(self, model: keras.Model, batch: Any) -> None:
        self._model = model
        self._batch = batch

    def _states(self) -> tuple[list[Any], list[Any]]:
        trained = [v.value for v in self._model.trainable_variables]
        return trained, [v.value for v in self._model.non_trainable_variables]

    def forward(self, *, training: bool) -> Callable[[], None]:
        """A pass without gradients."""

        def run(trained: Any, others: Any, batch: Any) -> Any:
            return _loss(self._model.stateless_call(trained, others, batch, training=training)[0])

        return self._compiled(run, *self._states(), self._batch)

    def gradient(self, parameters: Sequence[Any]) -> Callable[[], None]:
        """A pass with gradients for some parameters, in training."""
        import jax  # noqa: PLC0415  only where Keras runs on it

        wanted = {id(p) for p in parameters}
        places = [i for i, v in enumerate(self._model.trainable_variables) if id(v) in wanted]

        def loss(chosen: Any, trained: Any, others: Any, batch: Any) -> Any:
            full = list(trained)
            for place, value in zip(places, chosen, strict=True):
                full[place] = value
            return _loss(self._model.stateless_call(full, others, batch, training=True)[0])

        trained, others = self._states()
        chosen = [trained[i] for i in places]
        return self._compiled(jax.value_and_grad(loss), chosen, trained, others, self._batch)

    def update(self, parameters: Sequence[Any]) -> Callable[[], None]:
        """The arithmetic of an update, written nowhere."""
        return self._compiled(
            lambda values: [keras.ops.sum(x) for x in _adamw(values)],
            [p.value for p in parameters],
        )

    def _compiled(self, run: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        import jax  # noqa: PLC0415

        compiled = jax.jit(run)
        return lambda: _wait(compiled(*arguments))


class _Torch:
    """Passes on PyTorch, which Keras runs eagerly."""

    def __init__(self, model: keras.Model, batch: Any) -> None:
        self._model = model
        self._batch = batch

    def forward(self, *, training: bool) -> Callable[[], None]:
        """A pass; in training it records what the backward pass needs, as every step does."""
        import torch  # noqa: PLC0415  only where Keras runs on it

        def run() -> None:
            with torch.set_grad_enabled(training):
                _wait(_loss(self._model(self._batch, training=training)))

        return run

    def gradient(self, parameters: Sequence[Any]) -> Callable[[], None]:
        """A pass with gradients for some parameters, in training."""
        import torch  # noqa: PLC0415

        def run() -> None:
            loss = _loss(self._model(self._batch, training=True))
            # Not `backward()`: nothing is accumulated.
            _wait(torch.autograd.grad(loss, [p.value for p in parameters], allow_unused=True))

        return run

    def update(self, parameters: Sequence[Any]) -> Callable[[], None]:
        """The arithmetic of an update, written nowhere."""

        def run() -> None:
            with _unrecorded():
                _wait(_adamw([p.value for p in parameters]))

        return run


_MAKERS: Mapping[str, Any] = {"tensorflow": _TensorFlow, "jax": _Jax, "torch": _Torch}


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Nothing recorded for a backward pass; only PyTorch records unasked."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch  # noqa: PLC0415

    with torch.no_grad():
        yield


def _wait(outputs: Any) -> None:
    """Return when the outputs are there, not only on their way."""
    if keras.backend.backend() == "jax":
        import jax  # noqa: PLC0415

        jax.block_until_ready(outputs)
    elif keras.backend.backend() == "torch":
        import torch  # noqa: PLC0415

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    else:
        import tensorflow as tf  # noqa: PLC0415

        if tf.config.list_physical_devices("GPU"):
            tf.test.experimental.sync_devices()


def _jit(model: keras.Model) -> bool:
    return bool(model.compiled and model.jit_compile)
