"""The optimizer's side of freezing: membership, factors on learning rates, averages, slots.

An optimizer is built once, over every variable that can train; what it knows never changes. The
guard stands around its `apply` and works only on what the plan trains. Keras needs help in four
places: on JAX `stateless_apply` insists on all variables at once; weight averages (`use_ema`) walk
all variables and would overwrite frozen ones; `finalize_variable_values` pairs the variables it is
given with the averages of all; and accumulated gradients outlive a freeze.

Factors are applied to the step that was taken, `w + factor * (new - w)`, so that they act alike for
every optimizer: momentum included, weight decay included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from frostline.backends.keras.arrays import Array, single_array, to_number
from frostline.errors import BackendError, few

__all__ = ["Capture", "OptimizerGuard", "innermost"]

Variables = Sequence[keras.Variable]


def innermost(optimizer: Any) -> Any:
    """The optimizer that updates variables, inside one that scales the loss.

    Example:
        >>> inner = keras.optimizers.SGD()
        >>> innermost(keras.optimizers.LossScaleOptimizer(inner)) is inner
        True
    """
    while (inner := getattr(optimizer, "inner_optimizer", None)) is not None:
        optimizer = inner
    return optimizer


@dataclass(slots=True)
class Capture:
    """What one gradient computation left instead of an update.

    Attributes:
        gradients: by `id` of the variable; of float16 models still scaled.
        loss: the loss of the batch, before any scaling; None where the step told none.
    """

    gradients: dict[int, Any] = field(default_factory=dict)
    loss: Any = None


class OptimizerGuard:
    """Stands around the updates of one optimizer for one model. Make it with `of`.

    Attributes:
        optimizer: the outermost optimizer, as the model has it.
        inner: the one that updates variables.
        standing: factors of updates that name none: an array or variable; None scales nothing.
    """

    def __init__(self, optimizer: Any, model: keras.Model) -> None:
        self.optimizer = optimizer
        self.inner = innermost(optimizer)
        self._model = weakref.ref(model)
        self._trained: frozenset[int] | None = None  # ids; None: everything
        self._place: dict[int, int] = {}  # by id: which factor is the variable's
        self.standing: Any = None
        self._factors: Any = None
        self._named: Variables | None = None
        self._capture: Capture | None = None
        self._members = _books(self.inner).members
        self._original = {
            (id(each), name): getattr(each, name)
            for each in (self.optimizer, self.inner)
            for name in _PATCHED
        }
        self._patch()

    @classmethod
    def of(cls, optimizer: Any, model: keras.Model, variables: Variables) -> OptimizerGuard:
        """The one guard of this optimizer for this model; the optimizer is built if it is not.

        Args:
            optimizer: the optimizer.
            model: the model whose variables it updates.
            variables: all variables that can train.

        Raises:
            BackendError: the optimizer was built over fewer variables, or guards another model.
        """
        guard = _guard_of(optimizer)
        if guard is not None and guard.model is not model:
            raise BackendError(
                f"train {model.name!r} with this optimizer",
                found="an optimizer that trains another model under a plan",
                fix="one optimizer per model",
            )
        if not optimizer.built:
            optimizer.build(list(variables))
        _check_members(optimizer, variables)
        return cls(optimizer, model) if guard is None else guard

    @staticmethod
    def stands_around(optimizer: Any) -> bool:
        """Whether the optimizer has a guard already."""
        return _guard_of(optimizer) is not None

    @property
    def model(self) -> keras.Model | None:
        """The model; None once it is gone."""
        return self._model()

    def remove(self) -> None:
        """Take the guard off; the optimizer is as Keras made it."""
        for each in {id(o): o for o in (self.optimizer, self.inner)}.values():
            for name in _PATCHED:
                vars(each).pop(name, None)

    # -- what the plan says ------------------------------------------------------------------

    def train(self, variables: Iterable[keras.Variable]) -> None:
        """Update only these from now on."""
        self._trained = frozenset(map(id, variables))

    def place(self, places: Mapping[int, int]) -> None:
        """By `id` of a variable, the place of its factor among the `factors`."""
        self._place = dict(places)

    @contextmanager
    def factors(self, factors: Any) -> Iterator[None]:
        """Scale the steps of updates inside the block; None scales nothing.

        Args:
            factors: one number per place, as an array, a variable, or a tensor under trace.
        """
        before, self._factors = self._factors, factors
        try:
            yield
        finally:
            self._factors = before

    @contextmanager
    def naming(self, variables: Variables) -> Iterator[None]:
        """The variables that the values given to `stateless_apply` in the block belong to."""
        before, self._named = self._named, variables
        try:
            yield
        finally:
            self._named = before

    @contextmanager
    def deferring(self) -> Iterator[Capture]:
        """In the block, updates note their gradients and change nothing."""
        if self._capture is not None:
            raise BackendError("defer an update", found="an update that is deferred already")
        self._capture = capture = Capture()
        tracker = _loss_tracker(self._model())
        if tracker is not None:
            vars(tracker)["update_state"] = _noting_loss(tracker.update_state, capture)
        try:
            yield capture
        finally:
            self._capture = None
            if tracker is not None:
                del vars(tracker)["update_state"]

    # -- state -------------------------------------------------------------------------------

    def slots(self, variable: keras.Variable) -> list[keras.Variable]:
        """What the optimizer remembers of a variable: momenta, averages, summed gradients."""
        return list(_books(self.inner).slots(variable).values())

    def forget(self, variables: Iterable[keras.Variable]) -> None:
        """Write the initial values to all slots of these variables.

        Raises:
            BackendError: the optimizer cannot be built again from its config.
        """
        books = _books(self.inner)
        for variable in variables:
            slots = books.slots(variable)
            if not slots:
                continue
            fresh = _books(_twin(self.inner, variable)).slots(variable)
            for key, slot in slots.items():
                slot.assign(fresh[key])
            if (average := books.average(variable)) is not None:
                average.assign(ops.copy(variable))

    def check_forget(self) -> None:
        """Raise unless `forget` will work: asked before anything is changed.

        Raises:
            BackendError: the optimizer cannot be built again from its config.
        """
        for variable in self._members[:1]:
            _twin(self.inner, variable)

    def rest(self, variables: Iterable[keras.Variable]) -> None:
        """Prepare the slots of variables that are frozen now.

        Gradients summed so far are dropped, and the average of a weight that stays is the weight:
        averages that were never taken would otherwise overwrite it with zeros when it trains again.
        Both have bytes of their own: JAX gives the memory of each to its compiled step.
        """
        books = _books(self.inner)
        for variable in variables:
            if (gathered := books.accumulator(variable)) is not None:
                gathered.assign(ops.zeros(gathered.shape, gathered.dtype))
            if self.inner.use_ema and (average := books.average(variable)) is not None:
                average.assign(ops.copy(variable))

    # -- numbers -----------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """The rate of the next update, without factors."""
        return to_number(self.inner.learning_rate)

    @property
    def loss_scale(self) -> float:
        """What the loss, and so every captured gradient, is multiplied by."""
        dynamic = getattr(self.optimizer, "dynamic_scale", None)
        if dynamic is not None:
            return to_number(dynamic)
        return float(self.optimizer.loss_scale_factor or 1.0)

    def _update_plainly(self, gradients: Sequence[Any], variables: Variables) -> None:
        """One update of these variables, whatever the plan says: no factors, no averages."""
        use_ema, scale = self.inner.use_ema, self.inner.loss_scale_factor
        self.inner.use_ema, self.inner.loss_scale_factor = False, None
        try:
            self._inner("apply")(list(gradients), list(variables))
        finally:
            self.inner.use_ema, self.inner.loss_scale_factor = use_ema, scale

    def planned(self, gradients: Sequence[Any], variables: Variables) -> list[Array]:
        """What an update would add to each variable, in single precision or more.

        It is made and taken back: variables and slots are afterwards what they were.

        Args:
            gradients: not scaled.
            variables: one each.
        """
        moving = [*variables, *self.inner.variables]
        before = [_copy(v) for v in moving]
        try:
            self._update_plainly(gradients, variables)
            return [_moved(v, old) for v, old in zip(variables, before, strict=False)]
        finally:
            for variable, value in zip(moving, before, strict=True):
                variable.assign(value)

    # -- inside ------------------------------------------------------------------------------

    def _inner(self, name: str) -> Callable[..., Any]:
        return self._original[id(self.inner), name]

    def _patch(self) -> None:
        # Past `__setattr__`, which tracks variables: these are none.
        if self.optimizer is not self.inner:
            vars(self.optimizer)["apply"] = self._outer_apply
            vars(self.optimizer)["stateless_apply"] = self._outer_stateless_apply
        vars(self.inner)["apply"] = self._apply
        vars(self.inner)["stateless_apply"] = self._stateless_apply
        vars(self.inner)["finalize_variable_values"] = self._finalize

    def _deferred(self, gradients: Sequence[Any], variables: Variables) -> bool:
        if self._capture is None:
            return False
        if self._capture.gradients:
            raise BackendError(
                "read gradients",
                found="a train_step that makes several updates",
                fix="use a policy that reads no signals, or one update per train_step",
            )
        self._capture.gradients = {
            id(v): g for g, v in zip(gradients, variables, strict=True) if g is not None
        }
        return True

    def _outer_apply(self, grads: Any, trainable_variables: Any = None) -> None:
        grads, variables = self._pairs(grads, trainable_variables)
        if not self._deferred(grads, variables) and variables:
            self._original[id(self.optimizer), "apply"](grads, variables)

    def _outer_stateless_apply(self, optimizer_variables: Any, grads: Any, values: Any) -> Any:
        if self._deferred(grads, self._variables()):
            return values, optimizer_variables
        plain = self._original[id(self.optimizer), "stateless_apply"]
        return plain(optimizer_variables, grads, values)

    def _apply(self, grads: Any, trainable_variables: Any = None) -> None:
        grads, variables = self._pairs(grads, trainable_variables)
        if not self._deferred(grads, variables) and variables:
            self._guarded(grads, variables)

    def _stateless_apply(self, optimizer_variables: Any, grads: Any, values: Any) -> Any:
        """As Keras's own, for the variables that train now instead of all of the optimizer's."""
        variables = self._variables()
        if len(values) != len(variables):
            raise BackendError(
                f"update {len(values)} variables",
                found=f"{len(variables)} that train under the plan in force",
                fix="give the values of model.trainable_variables, in that order",
            )
        if self._deferred(grads, variables):
            return values, optimizer_variables
        own = self.inner.variables
        mapping = [
            *zip(variables, values, strict=True),
            *zip(own, optimizer_variables, strict=True),
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._apply(grads, variables)
        return (
            [scope.get_current_value(v) for v in variables],
            [scope.get_current_value(v) for v in own],
        )

    def _variables(self) -> Variables:
        model = self._model()
        if self._named is not None:
            return self._named
        return [] if model is None else model.trainable_variables

    def _pairs(self, grads: Any, variables: Any) -> tuple[list[Any], list[keras.Variable]]:
        """Gradients and variables, without those that are frozen (unless they are captured)."""
        variables = list(self._members if variables is None else variables)
        grads = list(grads)
        if self._trained is None or self._capture is not None:
            return grads, variables
        pairs = [p for p in zip(grads, variables, strict=True) if id(p[1]) in self._trained]
        return [g for g, _ in pairs], [v for _, v in pairs]

    def _guarded(self, grads: list[Any], variables: list[keras.Variable]) -> None:
        factors: Any = self.standing if self._factors is None else self._factors
        whole = len(variables) == len(self._members)
        averaging = self.inner.use_ema and not (whole and factors is None)
        if not averaging and factors is None:
            self._inner("apply")(grads, variables)
            return
        before = [_copy(v) for v in variables] if factors is not None else []
        # Read before the update counts on.
        update = ops.copy(self.inner.iterations) if averaging else None
        use_ema = self.inner.use_ema
        self.inner.use_ema = False
        try:
            self._inner("apply")(grads, variables)
        finally:
            self.inner.use_ema = use_ema
        for variable, old in zip(variables, before, strict=factors is not None):
            factor = _item(factors, self._place[id(variable)])
            variable.assign(_scaled(old, ops.convert_to_tensor(variable), factor))
        if averaging:
            self._average(variables, update)

    def _average(self, variables: list[keras.Variable], update: Any) -> None:
        """Keras's moving average, over what trains only."""
        books, every = _books(self.inner), self.inner.ema_overwrite_frequency
        for variable in variables:
            average = books.average(variable)
            if average is None:
                continue
            momentum = ops.cast(ops.not_equal(update, 0), variable.dtype) * self.inner.ema_momentum
            average.assign(momentum * average + (1 - momentum) * variable)
            if every:
                due = ops.equal((update + 1) % every, 0)
                now = ops.convert_to_tensor(average), ops.convert_to_tensor(variable)
                variable.assign(ops.where(due, *now))

    def _finalize(self, var_list: Iterable[keras.Variable]) -> None:
        if not self.inner.use_ema:
            self._inner("finalize_variable_values")(list(var_list))
            return
        books = _books(self.inner)
        for variable in var_list:
            average = books.average(variable)
            if average is not None and (self._trained is None or id(variable) in self._trained):
                variable.assign(ops.copy(average))


_PATCHED = ("apply", "stateless_apply", "finalize_variable_values")


def _guard_of(optimizer: Any) -> OptimizerGuard | None:
    """The guard that stands around the optimizer, if one does: its own methods tell."""
    found = getattr(vars(innermost(optimizer)).get("apply"), "__self__", None)
    return found if isinstance(found, OptimizerGuard) else None


def _item(factors: Any, place: int) -> Any:
    return factors[place]


def _copy(variable: keras.Variable) -> Any:
    """The value now, safe from updates in place."""
    value: Any = ops.copy(variable)
    return value.detach() if keras.backend.backend() == "torch" else value


def _moved(variable: keras.Variable, old: Any) -> Array:
    return single_array(variable) - single_array(old)


def _scaled(old: Any, new: Any, factor: Any) -> Any:
    """Part of the way from old to new: exactly old for 0, exactly new for 1."""
    factor = ops.cast(factor, old.dtype)
    part = ops.where(ops.equal(old, new), old, old + factor * (new - old))
    return ops.where(ops.equal(factor, 1), new, ops.where(ops.equal(factor, 0), old, part))


def _loss_tracker(model: keras.Model | None) -> Any:
    """The metric that Keras's own train steps give the loss of each batch."""
    if model is None:
        return None
    return next((m for m in model.metrics if m.name == "loss"), None)


def _noting_loss(update_state: Callable[..., Any], capture: Capture) -> Callable[..., Any]:
    def noting(values: Any, *args: Any, **kwargs: Any) -> Any:
        capture.loss = values
        return update_state(values, *args, **kwargs)

    return noting


@dataclass(frozen=True, slots=True)
class _Books:
    """What an optimizer knows: its variables in order, and by attribute the slots of each."""

    members: Variables
    place: Mapping[int, int]
    lists: Mapping[str, Sequence[Any]]

    def slots(self, variable: keras.Variable) -> dict[str, keras.Variable]:
        """By the name of the optimizer's attribute."""
        place = self.place.get(id(variable))
        if place is None:
            return {}
        found = {key: slots[place] for key, slots in self.lists.items()}
        return {key: slot for key, slot in found.items() if slot is not None}

    def average(self, variable: keras.Variable) -> keras.Variable | None:
        return self.slots(variable).get("_model_variables_moving_average")

    def accumulator(self, variable: keras.Variable) -> keras.Variable | None:
        return self.slots(variable).get("_accumulated_gradients")


def _books(optimizer: Any) -> _Books:
    # Private, because Keras has no public form: which variables an optimizer was built over, and
    # which of `optimizer.variables` belong to which of them (its names may repeat). All optimizers
    # keep slots in lists in the order of `_trainable_variables`, read by `_get_variable_index`.
    members = list(optimizer._trainable_variables)  # noqa: SLF001
    lists = {
        key: value
        for key, value in vars(optimizer).items()
        if key not in ("_trainable_variables", "_variables")
        and isinstance(value, list | tuple)
        and len(value) == len(members)
        and all(v is None or isinstance(v, keras.Variable) for v in value)
    }
    return _Books(members, {id(v): i for i, v in enumerate(members)}, lists)


def _twin(optimizer: Any, variable: keras.Variable) -> Any:
    """A new optimizer of the same kind over this variable alone."""
    try:
        config = optimizer.get_config()
        twin = type(optimizer).from_config({**config, "learning_rate": 0.0})
        twin.build([variable])
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BackendError(
            f"restart what a {type(optimizer).__name__} remembers",
            found=f"it cannot be built again from its config: {error}",
            fix="use optimizer_state='keep' and a policy that never starts the optimizer afresh "
            "(restore_best=false)",
        ) from error
    return twin


def _check_members(optimizer: Any, variables: Collection[keras.Variable]) -> None:
    members = {id(v) for v in _books(innermost(optimizer)).members}
    missing = [v.path for v in variables if id(v) not in members]
    if missing:
        raise BackendError(
            "drive this optimizer",
            found=f"{len(missing)} of {len(variables)} variables are not in it and would never "
            f"train: {few(missing)} (it was built while they were frozen)",
            fix="compile with a new optimizer; set layer.trainable = True on all before fit and "
            "let the plan freeze. Variables that must never train are named in "
            "KerasBackend(fixed=...)",
        )
