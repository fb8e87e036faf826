"""The Keras backend: makes a compiled model and its optimizer equal to a plan.

Frozen means: the variable's own `trainable` is off (no gradient is computed, the backward pass ends
where nothing before it trains), the optimizer's guard updates it in no case, layers with statistics
or dropout run in inference, and the bits are watched.

A switch of plan needs another compiled function; those of plans seen before are kept. All variables
stay in the optimizer, so that what is unfrozen trains at once, within one `fit`.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

import keras
import numpy as np
from keras import ops

from frostline.backends.grouping import known_parameters
from frostline.backends.keras.activations import ProbeBatch
from frostline.backends.keras.arrays import Array, array_of
from frostline.backends.keras.digest import sha256_of_variables
from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.modes import Flags, HeldModes
from frostline.backends.keras.names import can_train, owners, tensors
from frostline.backends.keras.optimizer import OptimizerGuard
from frostline.backends.keras.probe import KerasProbe
from frostline.backends.keras.steps import Form, Steps
from frostline.errors import BackendError, PlanError, few
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

__all__ = ["KerasBackend", "OptimizerState", "Sample", "as_found"]

_log = logging.getLogger("frostline")

#: What becomes of the optimizer's memory of a variable that is frozen: kept, so that it goes on
#: where it stopped, or released, so that it starts afresh. Keras keeps the bytes either way.
#: Updates are counted for all variables together: the first updates of Adam after a release are up
#: to three times as large as those of a new optimizer, whose bias correction starts at one.
OptimizerState = Literal["keep", "release"]
#: How much of a tensor is checked in passing.
_HEAD_ELEMENTS = 8 << 10
#: On JAX a look inside a running `fit` brings all variables up to date: not at every step.
_JAX_LOOKS_EVERY = 16


class Sample(Protocol):
    """What is called between gradients and update."""

    def __call__(self, loss: Any, *, overflow: bool) -> None:
        """Sample signals.

        Args:
            loss: the loss of the batch; None where the model's `train_step` told none.
            overflow: the gradients are not finite and there will be no update.
        """
        ...


class KerasBackend:
    """Satisfies `frostline.backend.Backend` for one compiled `keras.Model`.

    Args:
        model: built and compiled.
        optimizer: the one that updates it in a loop of your own, if not `model.optimizer`. On JAX
            `stateless_apply` then takes the values of `model.trainable_variables`.
        groups: the layer groups; found by tracing the model if not given.
        optimizer_state: "keep" or "release" what the optimizer remembers of frozen variables.
        fixed: names of variables that never train, whatever the plan; see `as_found`.

    Attributes:
        steps: the training steps under the plan in force.
        switches: changes of plan so far that needed another train function.
        on_switch: called after each of them.

    Raises:
        BackendError: groups and model do not fit, there is no optimizer, or it lacks variables.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="body"),
        ...                           keras.layers.Dense(2, name="head")])
        >>> model.compile("sgd", "mse")
        >>> backend = KerasBackend(model)
        >>> backend.apply(FreezePlan(frozen=frozenset({"body"})))
        >>> [v.path.partition("/")[2] for v in model.trainable_variables]
        ['head/kernel', 'head/bias']
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        optimizer: Any = None,
        groups: LayerGroups | None = None,
        optimizer_state: OptimizerState = "keep",
        fixed: Collection[str] = (),
    ) -> None:
        self._model: Any = model  # Keras leaves its functions untyped
        self._optimizer = _found_optimizer(model, optimizer)
        self._fits = getattr(model, "optimizer", None) is self._optimizer
        self._tensors = tensors(model)
        found = groups if groups is not None else layer_groups(model)
        self._groups = _without_streams(found, self._tensors)
        _check_fit(self._groups, self._tensors, can_train(model))
        self._optimizer_state: OptimizerState = optimizer_state
        self._fixed = known_parameters(
            fixed, self._groups, names="names as layer_groups(model) gives them, or as_found(model)"
        )
        self._flags = Flags(model, self._groups)
        self._owners = owners(model)
        self._variables = self._flags.variables
        if not OptimizerGuard.stands_around(self._optimizer):  # else an earlier plan froze them
            self._report_found()
        able = [v for n, v in self._variables.items() if n not in self._fixed]
        self._guard = OptimizerGuard.of(self._optimizer, model, able)
        self._guard.place(self._places())
        self._modes = HeldModes(model, self._groups)
        self._batch = ProbeBatch(model, self._groups)
        self._factors = keras.Variable(
            np.ones(len(self._groups), np.float32), trainable=False, name="frostline_factors"
        )
        names = {id(v): n for n, v in self._variables.items()}
        self.steps = Steps(model, self._guard, names, self._factors, self._narrowed)
        self.steps.on_batch = self._batch.take
        self.steps.form = Form(trained=frozenset(self._variables) - self._fixed)
        self._sample: Sample | None = None
        self._plan: FreezePlan | None = None
        self._frozen: frozenset[str] = frozenset()
        self._released: frozenset[str] = frozenset()
        self._wide = False
        self._installed: Any = None
        self._watch = _Patrol({})
        self.switches = 0
        self.on_switch: Callable[[], None] | None = None

    @property
    def groups(self) -> LayerGroups:
        """The layer groups of the model."""
        return self._groups

    def apply(self, plan: FreezePlan) -> None:
        """Make the model and the optimizer equal to `plan`.

        Raises:
            PlanError: the plan does not fit the groups, or nothing would train.
            BackendError: the optimizer cannot start afresh where the plan wants it to, or (JAX, a
                loop of your own) cannot follow the plan's learning rates.
        """
        plan.check(self._groups)
        if plan.lr_scale and not self._fits and keras.backend.backend() == "jax":
            raise BackendError(
                f"scale the learning rate of {few(sorted(plan.lr_scale))}",
                found="a loop of your own on JAX, whose compiled step would keep today's factors",
                fix="compile the model with the optimizer and train by fit, or by "
                "backend.backward(data) and backend.update()",
            )
        frozen = plan.frozen_parameters(self._groups) | self._fixed
        if not self._variables.keys() - frozen:
            raise PlanError(
                "train under this plan",
                found="no variable left that is neither frozen nor fixed",
                fix="freeze less, or fix less",
            )
        released = self._to_release(plan, frozen)
        if released or plan.keep_best:
            self._guard.check_forget()
        if self._plan is None or not self._plan.differs_only_in_rates(plan):
            self._settle()
            self._freeze(plan, frozen, released)
        self.narrow()
        self._factors.assign([plan.lr_scale.get(g.name, 1.0) for g in self._groups])
        self._plan = plan
        self._use(
            Form(
                trained=frozenset(self._variables.keys() - frozen),
                held=self._modes.held,
                statistics=self._flags.statistics,
                scaled=bool(plan.lr_scale),
            )
        )

    def hold(self) -> tuple[str, ...]:
        """Restore what outsiders changed of the plan; names of what had moved.

        Raises:
            BackendError: the model was compiled again, with another optimizer.
        """
        self.narrow()
        if self._plan is None:
            return ()
        if self._fits and self._model.optimizer is not self._optimizer:
            raise BackendError(
                "go on under the plan",
                found="another optimizer: the model was compiled again",
                fix="make a new backend (driver, callback) after compile()",
            )
        moved = [*self._flags.restore(), *self._modes.restore()]
        if self._fits and self._model.train_function is not self._installed:
            self._install()
            moved.append("train_function")
        return tuple(moved)

    def written(self) -> tuple[str, ...]:
        """Held tensors that may have been written to since the last call."""
        return tuple(self._watch.look(self.steps.sync))

    def fingerprint(self, names: Iterable[str]) -> Mapping[str, str]:
        """SHA-256 (hex) of the bytes of the named parameters and buffers.

        Raises:
            BackendError: an unknown name, or a tensor whose bytes are not here.
        """
        wanted = list(names)
        if unknown := [n for n in wanted if n not in self._tensors]:
            raise BackendError(
                f"find the tensor {unknown[0]!r}",
                found="no variable of that name in the model",
                fix="find the layer groups again after changing the model's layers",
            )
        self.steps.sync()
        return sha256_of_variables({n: self._tensors[n] for n in wanted})

    def probe(self, loss: Any = None) -> KerasProbe:
        """A side-effect-free view for signals; `loss` is what `KerasProbe.loss` answers."""
        self.steps.sync()
        return KerasProbe(
            self._variables,
            self._owners,
            self._frozen,
            self._batch,
            self.steps,
            self._guard,
            loss,
        )

    def sample_by(self, sample: Sample | None) -> None:
        """Call this before each update from now on, when its gradients are there; None: nothing.

        Steps are then split in two, all of them, so that reading signals changes no bits.
        """
        self._sample = sample
        if self._plan is not None:
            self._install()

    def widen(self) -> None:
        """For one step, compute gradients of frozen variables, too; modes stay as they are."""
        self.steps.sync()
        self._wide = True
        self._flags.widen(self._frozen - self._fixed)

    def narrow(self) -> None:
        """Drop the gradients of frozen variables and compute no more."""
        if not self._wide:
            return
        self.steps.sync()
        self._wide = False
        self._flags.narrow()
        self.steps.drop(tuple(self._frozen))

    def backward(self, data: Any) -> Mapping[str, Any]:
        """Forward and backward on a batch outside `fit`; gradients stay, nothing is updated.

        Args:
            data: (x, y) or (x, y, sample_weight). Metrics must be built: call
                `model.test_on_batch(x, y)` once before.

        Returns:
            What `train_step` returns: the metrics.
        """
        return self.steps.backward(data, wide=self._wide)

    def update(self) -> None:
        """One update from the gradients of `backward`; clears them."""
        self.steps.update()

    def keep_batch(self) -> None:
        """Keep the inputs of the next training step as the probe batch."""
        self._batch.keep_next()

    def kept(self) -> Any:
        """The probe batch as arrays; None if there is none."""
        return self._batch.to_tree()

    def restore_kept(self, kept: Any) -> None:
        """Take the probe batch of a checkpoint back."""
        self._batch.from_tree(kept)

    def weights(self) -> Mapping[str, Array]:
        """Copies of all parameters and buffers in main memory, tied ones under their first name."""
        self.steps.sync()
        return {n: np.array(array_of(v)) for n, v in self._named()}

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Write all parameters and buffers back; the optimizer forgets what it remembered.

        Raises:
            BackendError: other names or shapes than those of the model, or an optimizer that
                cannot start afresh; nothing was written.
        """
        self._guard.check_forget()
        if odd := [
            n
            for n, v in self._named()
            if n not in weights or tuple(np.shape(weights[n])) != tuple(v.shape)
        ]:
            raise BackendError(
                "load weights",
                found=f"none of the right shape for {few(odd)}",
                fix="weights that `weights()` of this model gave",
            )
        self.steps.sync()
        for name, variable in self._named():
            variable.assign(weights[name])
        self._guard.forget(self._variables.values())

    def remove(self) -> None:
        """Take everything off the model and the optimizer but the trainable flags.

        The model trains on as its flags say, compiled anew at the next `fit`.
        """
        self._settle()
        self._modes.release()
        self._guard.remove()
        self._model.train_function = self._model.test_function = None
        self._model.predict_function = None
        self._plan = None

    # -- inside ------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Flags as the plan has them, and variables up to date: before any flag changes."""
        self.narrow()
        if self._plan is not None:
            self._flags.restore()
        self.steps.sync()

    def _freeze(self, plan: FreezePlan, frozen: frozenset[str], released: frozenset[str]) -> None:
        self.steps.drop(tuple(frozen))
        self._flags.apply(plan, frozen)
        self._modes.apply(plan)
        self._guard.train(v for n, v in self._variables.items() if n not in frozen)
        self._guard.forget(self._variables[n] for n in released)
        self._guard.rest(self._variables[n] for n in frozen - self._frozen)
        self._released = frozenset(released | (self._released & frozen))
        self._frozen = frozen
        held = plan.held_tensors(self._groups)
        self._watch = _Patrol({n: self._tensors[n] for n in sorted(held)})

    def _to_release(self, plan: FreezePlan, frozen: frozenset[str]) -> frozenset[str]:
        """Names of frozen variables that the optimizer is to forget and has not forgotten yet."""
        dropped = plan.released if self._optimizer_state == "keep" else set(self._groups.names)
        names = {n for n in frozen if self._groups.of_parameter(n).name in dropped}
        return frozenset(names - self._released - self._fixed)

    def _use(self, form: Form) -> None:
        first = self._installed is None
        if form == self.steps.form and not first:
            return
        self.switches += not first
        self.steps.form = form
        self._guard.standing = self._factors if form.scaled else None
        self._install()
        if self.on_switch is not None:
            self.on_switch()

    def _install(self) -> None:
        if not self._fits:
            self._installed = "a loop of one's own"
            return
        self.steps.renew()
        if self._sample is None:
            function = self.steps.fused()
        else:
            function = self.steps.split(self._between, wide=lambda: self._wide, failed=self.narrow)
        self._model.train_function = self._installed = function

    def _between(self) -> None:
        if self._sample is not None:
            self._sample(self.steps.loss, overflow=self.steps.overflows())

    @contextmanager
    def _narrowed(self) -> Iterator[None]:
        if not self._wide:
            yield
            return
        self._flags.narrow()
        try:
            yield
        finally:
            self._flags.widen(self._frozen - self._fixed)

    def _places(self) -> dict[int, int]:
        return {id(self._variables[p.name]): g.depth for g in self._groups for p in g.parameters}

    def _named(self) -> Iterator[tuple[str, keras.Variable]]:
        for group in self._groups:
            for tensor in (*group.parameters, *group.buffers):
                yield tensor.name, self._tensors[tensor.name]

    def _report_found(self) -> None:
        found = [n for n, v in self._variables.items() if n not in self._fixed and not v.trainable]
        if found:
            _log.warning(
                "%d variables were frozen before (%s); from now on the plan decides. Name those "
                "that must never train in KerasBackend(fixed=...)",
                len(found),
                few(found),
            )


class _Patrol:
    """Says which of a set of variables may have been written to: one head after the other.

    Every look compares the checksum of the head of one variable with that of a round ago.

    Args:
        variables: what to watch, by name.
    """

    def __init__(self, variables: Mapping[str, keras.Variable]) -> None:
        self._variables = variables
        self._round = itertools.cycle(variables)
        self._seen: dict[str, int] = {}
        self._every = _JAX_LOOKS_EVERY if keras.backend.backend() == "jax" else 1
        self._looks = 0

    def look(self, sync: Callable[[], None]) -> list[str]:
        self._looks += 1
        name = next(self._round, None) if self._looks % self._every == 0 else None
        if name is None:
            return []
        sync()
        flat: Any = ops.reshape(self._variables[name], (-1,))
        head = np.ascontiguousarray(array_of(flat[:_HEAD_ELEMENTS]))
        checksum = zlib.crc32(head.view(np.uint8).data)
        return [] if self._seen.setdefault(name, checksum) == checksum else [name]


def as_found(model: keras.Model) -> frozenset[str]:
    """Names of the variables that are frozen by hand now: for `KerasBackend(fixed=...)`.

    Use it where weights were fixed on purpose, on a model that Frostline has not frozen.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="out")])
        >>> model.get_layer("out").trainable = False
        >>> sorted(as_found(model))
        ['out/bias', 'out/kernel']
    """
    able = can_train(model)
    return frozenset(n for n, v in tensors(model).items() if n in able and not v.trainable)


def _found_optimizer(model: keras.Model, optimizer: Any) -> Any:
    found = optimizer if optimizer is not None else getattr(model, "optimizer", None)
    if found is None:
        raise BackendError(
            f"train {model.name!r} under a plan",
            found="no optimizer",
            fix="model.compile(optimizer=..., loss=...) first",
        )
    return found


def _without_streams(groups: LayerGroups, variables: Mapping[str, keras.Variable]) -> LayerGroups:
    """The groups without the states of random seeds: they are streams, and move by design."""
    streams = {n for n, v in variables.items() if v.name == "seed_generator_state"}
    items = tuple(
        replace(g, buffers=tuple(b for b in g.buffers if b.name not in streams)) for g in groups
    )
    return groups if items == groups.items else replace(groups, items=items)


def _check_fit(
    groups: LayerGroups, variables: Mapping[str, keras.Variable], able: Collection[str]
) -> None:
    names = {p.name for g in groups for p in g.parameters}
    if missing := [n for n in variables if n in able and n not in names]:
        raise BackendError(
            "freeze by these layer groups",
            found=f"{len(missing)} variables of the model in no group: {few(missing)}",
            fix="find the groups on this very model: layer_groups(model)",
        )
    if unknown := sorted(names - set(able)):
        raise BackendError(
            "freeze by these layer groups",
            found=f"parameters that this model does not have: {few(unknown)}",
            fix="find the groups on this very model: layer_groups(model)",
        )
