"""Training steps of a Keras model under a plan, compiled once per plan.

Keras looks `model.train_function` up at each step of a running `fit`, so a switch of plan is
another function there. Two kinds are made here:

- *fused*: Keras's own step, for policies that read nothing.
- *split*: `model.train_step` runs with its update put off and hands out the gradients; the host
  reads what it wants; a second function applies them. Reading between the two changes no bits.

Functions are kept by what they depend on (which variables train, which layers are held), so that
going back to a plan seen before traces nothing.

On JAX every function is made from a fresh closure. `jax.jit` finds compiled code by equality of the
function, and two bound methods of one model are equal: Keras's `make_train_function(force=True)`
and its `test_function` reuse the program of an earlier plan whenever the numbers and shapes of what
trains happen to match, and then train, or evaluate, the wrong variables without a word.

A widened step (gradients of frozen variables, too) runs the compiled gradient function of the plan
as always, and besides it a second one for the frozen variables only, from the same state and
without leaving a trace: compilers round differently in different programs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
from keras import ops

from frostline.backends.keras.optimizer import OptimizerGuard
from frostline.errors import BackendError

__all__ = ["Form", "Steps"]

#: So many compiled functions of a kind are kept; policies that wander would fill the memory.
_KEPT = 32

Logs = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """What a compiled step depends on.

    Attributes:
        trained: names of the variables that train.
        held: paths of the layers held in inference.
        statistics: paths of the layers whose statistics follow the data.
        scaled: whether steps are scaled by factors.
    """

    trained: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    statistics: tuple[str, ...] = ()
    scaled: bool = False


@dataclass(slots=True)
class _Gradients:
    """What one gradient computation gave: by position of the variable, None where there is none."""

    logs: Logs
    gradients: Sequence[Any]
    loss: Any


class _Engine(Protocol):
    """The steps of one Keras backend."""

    @property
    def built(self) -> int:
        """How many functions were made so far."""
        ...

    def gradients(self, key: Any, data: Any) -> _Gradients:
        """Forward and backward for `model.trainable_variables`; metrics and statistics move."""
        ...

    def only_gradients(self, key: Any, data: Any) -> _Gradients:
        """The same, leaving everything as it was."""
        ...

    def update(
        self, key: Any, variables: Sequence[keras.Variable], grads: Sequence[Any], factors: Any
    ) -> None:
        """One update of these variables through the guard."""
        ...

    def fused(self, key: Any, factors: Any) -> Callable[..., Any]:
        """A function for `model.train_function` in one piece."""
        ...

    def split(self, step: Callable[[Any], Logs]) -> Callable[..., Any]:
        """A function for `model.train_function` that takes a batch and calls `step` on it."""
        ...

    def renew(self, key: Any) -> None:
        """After a change of plan: whatever else Keras keeps compiled must fit it."""
        ...

    def sync(self) -> None:
        """Bring variables up to date in a running `fit`."""
        ...


class Steps:
    """The steps of one model under the plan in force.

    Args:
        model: compiled, with the guarded optimizer.
        guard: stands around the optimizer.
        names: name of each variable that can train, by `id`.
        factors: factor of each layer group on the steps of its variables; read at each update.
        narrowed: a context in which the variables that the plan freezes have no gradients.

    Attributes:
        form: what the plan in force makes of a step.
        gradients: gradients present, by name; of float16 models still scaled.
        loss: the loss of the batch that they are of; None where the step told none.
        on_batch: called with the batch before each backward pass.
        built: how many functions were made so far.
    """

    def __init__(
        self,
        model: keras.Model,
        guard: OptimizerGuard,
        names: Mapping[int, str],
        factors: keras.Variable,
        narrowed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.form = Form()
        self.gradients: dict[str, Any] = {}
        self.loss: Any = None
        self.on_batch: Callable[[Any], None] | None = None
        self._model = model
        self._guard = guard
        self._names = names
        self._factors = factors
        self._narrowed = narrowed
        self._engine: _Engine = _ENGINES[keras.backend.backend()](model, guard)

    @property
    def built(self) -> int:
        """How many functions were made so far: an upper bound of the traces but for shapes."""
        return self._engine.built

    def backward(self, data: Any, *, wide: bool = False) -> Logs:
        """Forward and backward on a batch; the gradients stay in `gradients`.

        Args:
            data: what an iterator of `fit` gives: (x, y) or (x, y, sample_weight).
            wide: frozen variables that have `trainable` set now get gradients, too.

        Returns:
            What the model's `train_step` returned.
        """
        if self.on_batch is not None:
            self.on_batch(data)
        extra: dict[str, Any] = {}
        if wide:
            found = self._engine.only_gradients(("wide", self.form), data)
            extra = self._named(found)
        with self._narrowed():
            found = self._engine.gradients(("narrow", self.form), data)
            self.gradients = extra | self._named(found)
        self.loss = found.loss
        return found.logs

    def update(self) -> None:
        """One update from the gradients present; clears them."""
        names = [n for n in self.gradients if n in self.form.trained]
        if names:
            by_name = {n: v for v in self._model.trainable_variables if (n := self._names[id(v)])}
            variables = [by_name[n] for n in names]
            key = (tuple(names), self.form.scaled)
            factors = self._factors if self.form.scaled else None
            self._engine.update(key, variables, [self.gradients[n] for n in names], factors)
        self.drop()

    def overflows(self) -> bool:
        """Whether gradients are not finite, so that an optimizer that scales losses will skip."""
        if getattr(self._guard.optimizer, "dynamic_scale", None) is None:
            return False
        return not all(bool(ops.all(ops.isfinite(g))) for g in self.gradients.values())

    def drop(self, names: Sequence[str] | None = None) -> None:
        """Forget gradients; all of them, or those of these names."""
        for name in list(self.gradients) if names is None else names:
            self.gradients.pop(name, None)

    def fused(self) -> Callable[..., Any]:
        """A function for `model.train_function`: Keras's own step under the plan in force."""
        return self._engine.fused(self.form, self._factors if self.form.scaled else None)

    def split(
        self,
        between: Callable[[], None],
        *,
        wide: Callable[[], bool],
        failed: Callable[[], None] = lambda: None,
    ) -> Callable[..., Any]:
        """A function for `model.train_function` that calls `between` when gradients are there.

        Args:
            between: called after the backward pass and before the update.
            wide: whether frozen variables get gradients in this step.
            failed: called when the step ends in an exception.
        """

        def step(data: Any) -> Logs:
            try:
                logs = self.backward(data, wide=wide())
                between()
                self.update()
            except BaseException:
                failed()
                raise
            return logs

        return self._engine.split(step)

    def renew(self) -> None:
        """The plan has changed: let nothing that was compiled for another one be used."""
        self._engine.renew(self.form)

    def sync(self) -> None:
        """Bring the model's variables up to date: on JAX a running `fit` keeps them elsewhere."""
        self._engine.sync()

    def _named(self, found: _Gradients) -> dict[str, Any]:
        pairs = zip(self._model.trainable_variables, found.gradients, strict=True)
        return {self._names[id(v)]: g for v, g in pairs if g is not None}


@dataclass(slots=True)
class _Kept:
    """Functions by key, the newest last."""

    functions: OrderedDict[Any, Callable[..., Any]] = field(default_factory=OrderedDict)
    built: int = 0

    def get(self, key: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        if key not in self.functions:
            self.functions[key] = make()
            self.built += 1
            while len(self.functions) > _KEPT:
                self.functions.popitem(last=False)
        self.functions.move_to_end(key)
        return self.functions[key]


class _Eager:
    """Steps by the model's own methods, uncompiled: PyTorch, and what compiled ones are made of."""

    def __init__(self, model: keras.Model, guard: OptimizerGuard) -> None:
        self.model: Any = model  # Keras leaves its functions untyped
        self.guard = guard
        self.kept = _Kept()

    @property
    def built(self) -> int:
        return self.kept.built

    def run(self, data: Any) -> tuple[Logs, list[Any], Any]:
        """Logs, a gradient (or None) for each variable that trains now, and the loss."""
        with self.guard.deferring() as capture:
            logs = self.model.train_step(data)
        found = [capture.gradients.get(id(v)) for v in self.model.trainable_variables]
        return logs, found, capture.loss

    def gradients(self, key: Any, data: Any) -> _Gradients:
        return _Gradients(*self.run(data))

    def only_gradients(self, key: Any, data: Any) -> _Gradients:
        before = [(v, ops.copy(v)) for v in self.moving()]
        try:
            return self.gradients(key, data)
        finally:
            for variable, value in before:
                variable.assign(value)

    def apply(self, variables: Sequence[keras.Variable], grads: Any, factors: Any) -> None:
        with self.guard.factors(factors):
            self.guard.optimizer.apply(grads, list(variables))

    def moving(self) -> list[keras.Variable]:
        """What a gradient computation moves besides gradients."""
        return [*self.model.non_trainable_variables, *self.model.metrics_variables]

    def fused(self, key: Any, factors: Any) -> Callable[..., Any]:
        """What Keras itself makes for the plan in force; factors are those of the guard."""

        def make() -> Callable[..., Any]:
            self.model.make_train_function(force=True)
            return self.model.train_function

        return self.kept.get(("fused", key), make)

    def renew(self, key: Any) -> None:
        """Nothing: evaluation reads variables where they are."""

    def sync(self) -> None:
        """Nothing: variables are always up to date."""


class _Torch(_Eager):
    """PyTorch runs every step eagerly; `jit_compile` applies to fused steps."""

    def update(self, key: Any, variables: Any, grads: Any, factors: Any) -> None:
        import torch  # noqa: PLC0415 (only on this backend of Keras)

        with torch.no_grad():
            self.apply(variables, grads, factors)

    def split(self, step: Callable[[Any], Logs]) -> Callable[..., Any]:
        return lambda data: step(data[0])


class _TensorFlow(_Eager):
    """Graphs that read and write variables in place."""

    def gradients(self, key: Any, data: Any) -> _Gradients:
        function = self.kept.get(key, lambda: self._compiled(self.run))
        return _Gradients(*function(data))

    def update(self, key: Any, variables: Any, grads: Any, factors: Any) -> None:
        def make() -> Callable[..., Any]:
            kept = list(variables)
            return self._compiled(lambda given, scale: self.apply(kept, given, scale))

        scale = None if factors is None else ops.convert_to_tensor(factors)
        self.kept.get(("update", key), make)(list(grads), scale)

    def split(self, step: Callable[[Any], Logs]) -> Callable[..., Any]:
        import tensorflow as tf  # noqa: PLC0415 (only on this backend of Keras)

        replicas = self.model.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            raise BackendError(
                "read signals under a distribution strategy",
                found=f"{replicas} replicas, each with gradients of its own",
                fix="train on one device, or use a policy that reads no signals",
            )

        def present(item: Any) -> Any:
            return None if isinstance(item, tf.experimental.Optional) else item

        return lambda batches: step(keras.tree.map_structure(present, next(batches)))

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import tensorflow as tf  # noqa: PLC0415

        if self.model.run_eagerly:
            return function
        return tf.function(
            tf.autograph.experimental.do_not_convert(function),
            reduce_retracing=True,
            jit_compile=self.model.jit_compile,
        )


class _Jax(_Eager):
    """Pure functions of the state; the variables are written afterwards."""

    def __init__(self, model: keras.Model, guard: OptimizerGuard) -> None:
        super().__init__(model, guard)
        self._inside = False  # in a split step the variables are newer than the trainer's state

    def gradients(self, key: Any, data: Any) -> _Gradients:
        logs, found, loss, others, metrics = self._run(key, data)
        _assign(self.model.non_trainable_variables, others)
        _assign(self.model.metrics_variables, metrics)
        return _Gradients(logs, found, loss)

    def only_gradients(self, key: Any, data: Any) -> _Gradients:
        logs, found, loss, _, _ = self._run(key, data)
        return _Gradients(logs, found, loss)

    def update(self, key: Any, variables: Any, grads: Any, factors: Any) -> None:
        optimizer, own = self.guard.optimizer, self.guard.optimizer.variables

        def make() -> Callable[..., Any]:
            kept = list(variables)

            def update(values: Any, state: Any, given: Any, scale: Any) -> Any:
                with self.guard.naming(kept), self.guard.factors(scale):
                    return optimizer.stateless_apply(state, given, values)

            return self._compiled(update, donate=())

        function = self.kept.get(("update", key), make)
        scale = None if factors is None else factors.value
        values, state = function(_values(variables), _values(own), list(grads), scale)
        _assign(variables, values)
        _assign(own, state)

    def fused(self, key: Any, factors: Any) -> Callable[..., Any]:
        def make() -> Callable[..., Any]:
            def train_step(state: Any, data: Any, scale: Any) -> Any:
                with self.guard.factors(scale):
                    return self.model.train_step(state, data)

            step = self._compiled(train_step, donate=(0,))

            def train_function(state: Any, batches: Iterator[Any]) -> Any:
                scale = None if factors is None else factors.value
                data = next(batches)
                with self._saving(state):
                    logs, state = step(state, data, scale)
                for data in _further(batches, self.model.steps_per_execution - 1):
                    with self._saving(state):
                        logs, state = step(state, data, scale)
                return logs, state

            return train_function

        return self.kept.get(("fused", key), make)

    def split(self, step: Callable[[Any], Logs]) -> Callable[..., Any]:
        def train_function(state: Any, batches: Iterator[Any]) -> Any:
            data = next(batches)
            # The plan may change what trains between backward pass and update, and with it the
            # division of this state: in between the variables themselves are the state.
            for variables, values in zip(self._state(), state, strict=True):
                _assign(variables, values)
            self._inside = True
            try:
                logs = step(data)
            except BaseException:
                _forget_trainer_state(self.model)
                raise
            finally:
                self._inside = False
            return logs, tuple(_values(variables) for variables in self._state())

        return train_function

    def renew(self, key: Any) -> None:
        """Evaluation and prediction take the variables apart by what trains, too."""
        self.model.predict_function = None  # made anew, from a closure of its own

        def make() -> Callable[..., Any]:
            def test_step(state: Any, data: Any) -> Any:
                return self.model.test_step(state, data)

            step = self._compiled(test_step, donate=(0,))

            def test_function(state: Any, batches: Iterator[Any]) -> Any:
                logs, state = step(state, next(batches))
                for data in _further(batches, self.model.steps_per_execution - 1):
                    logs, state = step(state, data)
                return logs, state

            return test_function

        self.model.test_function = self.kept.get(("test", key), make)

    def sync(self) -> None:
        """In a running `fit` the trainer has the values, and takes them up again afterwards."""
        if not self._inside:
            self.model.jax_state_sync()

    @contextmanager
    def _saving(self, state: Any) -> Iterator[None]:
        """If the step fails, leave the model with the values that the step began with."""
        try:
            yield
        except BaseException:
            for variables, values in zip(self._state(), state, strict=True):
                for variable, value in zip(variables, values, strict=True):
                    if not value.is_deleted():
                        variable.assign(value)
            _forget_trainer_state(self.model)
            raise

    def _state(self) -> tuple[list[keras.Variable], ...]:
        model = self.model
        return (
            model.trainable_variables,
            model.non_trainable_variables,
            self.guard.optimizer.variables,
            model.metrics_variables,
        )

    def _run(self, key: Any, data: Any) -> Any:
        def make() -> Callable[..., Any]:
            variables = list(self.model.trainable_variables)

            def gradients(state: Any, batch: Any) -> Any:
                with self.guard.deferring() as capture:
                    logs, after = self.model.train_step(state, batch)
                found = [capture.gradients.get(id(v)) for v in variables]
                return logs, found, capture.loss, after[1], after[3]

            return self._compiled(gradients, donate=())

        state = tuple(_values(variables) for variables in self._state())
        return self.kept.get(key, make)(state, data)

    def _compiled(
        self, function: Callable[..., Any], donate: tuple[int, ...]
    ) -> Callable[..., Any]:
        import jax  # noqa: PLC0415 (only on this backend of Keras)

        if self.model.run_eagerly or not self.model.jit_compile:
            return function
        return jax.jit(function, donate_argnums=donate)


def _forget_trainer_state(model: Any) -> None:
    # Private, because a `fit` that fails writes back what the last step left, divided by what
    # trained then, to variables divided by what trains now: into the wrong ones after a switch.
    model._jax_state = None  # noqa: SLF001


def _further(batches: Iterator[Any], most: int) -> Iterator[Any]:
    for _, data in zip(range(most), batches, strict=False):
        yield data


def _values(variables: Sequence[keras.Variable]) -> list[Any]:
    return [v.value for v in variables]


def _assign(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


_ENGINES: Mapping[str, Callable[[keras.Model, OptimizerGuard], Any]] = {
    "tensorflow": _TensorFlow,
    "jax": _Jax,
    "torch": _Torch,
}
