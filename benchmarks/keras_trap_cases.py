"""The cases of `keras_traps.py`: freezing with Keras alone, and with `FreezeCallback`.

A case is a function of "with Frostline?" that trains a small network for a few batches, in the
Keras backend of its process, and looks at the bits of what should be frozen and should train.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import keras
import numpy as np

from frostline.backends.keras.backend import KerasBackend
from frostline.groups import LayerGroups
from frostline.integrations.keras import FreezeCallback
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State

BATCH, BATCHES = 8, 4
#: Updates before the change in the middle of a run: one epoch.
CHANGE = BATCHES
#: Updates after which a layer is unfrozen late.
LATE = 5000


@dataclass
class Outcome:
    """What was seen in one case.

    Attributes:
        moved: frozen tensors whose bits changed, by short name.
        stuck: tensors that should train and did not.
        raised: class of the error that ended the run, and the start of its text.
        warned: whether anything was warned or logged that a user would see.
        note: a figure of the case, if it has one.
    """

    moved: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    raised: str = ""
    warned: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """One word or two for a table."""
        wrong = [name for name, found in (("moves", self.moved), ("stuck", self.stuck)) if found]
        if self.raised:
            return ", ".join([*wrong, "raises"])
        if not wrong:
            return "right"
        return f"{' and '.join(wrong)}, {'warns' if self.warned else 'silent'}"


def network(*, dropout: float = 0.0, norm: bool = True, seed: int = 0) -> Any:
    """Two blocks and a head; layers "body", "norm", "drop", "middle", "head"."""
    keras.utils.set_random_seed(seed)
    layers: list[Any] = [keras.Input((6,)), keras.layers.Dense(8, activation="tanh", name="body")]
    if norm:
        layers.append(keras.layers.BatchNormalization(name="norm"))
    if dropout:
        layers.append(keras.layers.Dropout(dropout, name="drop", seed=1))
    layers += [
        keras.layers.Dense(8, activation="tanh", name="middle"),
        keras.layers.Dense(3, name="head"),
    ]
    return keras.Sequential(layers)


def compiled(model: Any, optimizer: Any = None, **options: Any) -> Any:
    """The model with a loss and, by default, SGD with momentum."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), loss, **options)
    return model


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float32 (32, 6) and int32 (32,)."""
    source = np.random.default_rng(seed)
    x = source.normal(size=(BATCH * BATCHES, 6)).astype("float32")
    return x, source.integers(0, 3, BATCH * BATCHES).astype("int32")


def fit(model: Any, *callbacks: Any, epochs: int = 1, **options: Any) -> None:
    """Train in the order of the data."""
    x, y = data()
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options)


def numbers(value: Any) -> np.ndarray:
    """A variable or tensor as an array."""
    return np.array(keras.ops.convert_to_numpy(value))


def bits(layer: Any) -> dict[str, bytes]:
    """The bytes of a layer's weights, by short name."""
    return {f"{layer.name}/{v.name}": numbers(v).tobytes() for v in layer.weights}


def changed(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Names whose bytes differ."""
    return sorted(name for name in before if before[name] != after[name])


def same(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Names whose bytes are equal."""
    return sorted(name for name in before if before[name] == after[name])


def at_epoch(number: int, action: Callable[[Any], None]) -> Any:
    """A callback that acts on the model when an epoch begins."""

    class AtEpoch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            del logs
            if epoch == number:
                action(self.model)

    return AtEpoch()


def set_trainable(*names: str, value: bool, remake: bool = False) -> Callable[[Any], None]:
    """What a user writes in a callback: flip the flags, and perhaps remake the train function."""

    def action(model: Any) -> None:
        for name in names:
            model.get_layer(name).trainable = value
        if remake:
            model.make_train_function(force=True)

    return action


@contextmanager
def watched(outcome: Outcome) -> Iterator[None]:
    """Notes errors and warnings; errors of ours count as raised, too."""

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            outcome.warned |= record.levelno >= logging.WARNING

    heard, log = Heard(), logging.getLogger("frostline")
    log.addHandler(heard)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
                outcome.raised = f"{type(error).__name__}: {str(error).strip()[:120]}"
        outcome.warned |= any(issubclass(w.category, UserWarning) for w in seen)
    finally:
        log.removeHandler(heard)


# -- Frostline's side -------------------------------------------------------------------------


@dataclass(frozen=True)
class Scripted(Policy):
    """Freezes the groups of these layers, and from the change on of others."""

    before: tuple[str, ...]
    after: tuple[str, ...]

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """By the clock alone."""
        names = self.after if event.progress.step >= CHANGE else self.before
        found = frozenset(g.name for g in groups if g.name.rpartition("/")[2] in names)
        return FreezePlan(frozen=found), state


def freezing(before: tuple[str, ...], after: tuple[str, ...] | None = None) -> FreezeCallback:
    """The callback that freezes these layers' groups, and others from the change on."""
    return FreezeCallback(Scripted(before, before if after is None else after))


# -- the cases --------------------------------------------------------------------------------


class Case(Protocol):
    """One run, with the callback or without."""

    __name__: str

    def __call__(self, frostline: bool) -> Outcome:  # noqa: D102
        ...


CASES: dict[str, tuple[str, Case]] = {}


def case(title: str) -> Callable[[Case], Case]:
    """Register a case: a function of "with Frostline?"."""

    def register(function: Case) -> Case:
        CASES[function.__name__] = (title, function)
        return function

    return register


def at_end_of_epoch(number: int, action: Callable[[Any], None]) -> Any:
    """A callback that looks at the model when an epoch ends, before what `fit` does last."""

    class AtEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            del logs
            if epoch == number:
                action(self.model)

    return AtEnd()


def bits_of(model: Any, *names: str) -> dict[str, bytes]:
    """The bytes of the weights of these layers, as far as the model has them."""
    found: dict[str, bytes] = {}
    for layer in model.layers:
        if layer.name in names:
            found |= bits(layer)
    return found


def _change_within_fit(
    model: Any, frostline: bool, plain: Callable[[Any], None], *, freeze: bool
) -> Outcome:
    """Two epochs; between them "body" and "norm" are frozen, or unfrozen."""
    found, names = Outcome(), ("body", "norm")
    seen: dict[str, dict[str, bytes]] = {}

    def remember(moment: str) -> Callable[[Any], None]:
        return lambda m: seen.update({moment: bits_of(m, *names)})

    with watched(found):
        tools = [at_epoch(1, plain)]
        if frostline:
            tools = [freezing((), names) if freeze else freezing(names, ())]
        watches = at_epoch(1, remember("before")), at_end_of_epoch(1, remember("after"))
        fit(model, watches[0], *tools, watches[1], epochs=2)
    if "after" in seen and freeze:
        found.moved = changed(seen["before"], seen["after"])
    elif "after" in seen:
        found.stuck = same(seen["before"], seen["after"])
    return found


@case("freeze in a callback: `layer.trainable = False` in the midst of `fit`")
def freeze_in_fit(frostline: bool) -> Outcome:
    return _change_within_fit(
        compiled(network()), frostline, set_trainable("body", "norm", value=False), freeze=True
    )


@case("the same, and `model.make_train_function(force=True)`")
def freeze_in_fit_remade(frostline: bool) -> Outcome:
    plain = set_trainable("body", "norm", value=False, remake=True)
    return _change_within_fit(compiled(network()), frostline, plain, freeze=True)


@case("unfreeze in a callback, train function remade, layer frozen when `fit` began")
def unfreeze_in_fit(frostline: bool) -> Outcome:
    model = network()
    if not frostline:
        set_trainable("body", "norm", value=False)(model)
    plain = set_trainable("body", "norm", value=True, remake=True)
    return _change_within_fit(compiled(model), frostline, plain, freeze=False)


@case("the same without remaking it")
def unfreeze_in_fit_unmade(frostline: bool) -> Outcome:
    model = network()
    if not frostline:
        set_trainable("body", "norm", value=False)(model)
    plain = set_trainable("body", "norm", value=True)
    return _change_within_fit(compiled(model), frostline, plain, freeze=False)


@case("`model.trainable = True` before `compile`, to unfreeze a layer frozen by its own flag")
def unfreeze_all(frostline: bool) -> Outcome:
    """TensorFlow's objects skip the setter when the model's own flag is True already."""
    model, found = network(norm=False), Outcome()
    model.get_layer("body").trainable = False
    if not frostline:
        model.trainable = True
    compiled(model)
    before = bits_of(model, "body")
    with watched(found):
        fit(model, *([freezing(())] if frostline else []))
        found.stuck = same(before, bits_of(model, "body"))
    return found


@case("freeze between two `fit`s without `compile`")
def freeze_between_fits(frostline: bool) -> Outcome:
    model, found = compiled(network()), Outcome()
    with watched(found):
        if frostline:
            fit(model, freezing(()))
        else:
            fit(model)
            set_trainable("body", "norm", value=False)(model)
        before = bits(model.get_layer("body"))
        fit(model, *([freezing(("body", "norm"))] if frostline else []))
        found.moved = changed(before, bits(model.get_layer("body")))
    return found


@case("`compile` again to unfreeze: the optimizer starts afresh")
def recompile(frostline: bool) -> Outcome:
    """Right means: momentum of the layer that trained all along is still there."""
    model, found = network(), Outcome()
    if not frostline:
        set_trainable("body", "norm", value=False)(model)
    compiled(model)
    with watched(found):
        if frostline:
            fit(model, freezing(("body", "norm"), ()), epochs=2)
        else:
            fit(model)
            set_trainable("body", "norm", value=True)(model)
            compiled(model, keras.optimizers.SGD(0.1, momentum=0.9))
            fit(model)
    count = int(numbers(model.optimizer.iterations))
    if not found.raised and count != 2 * BATCHES:
        found.stuck = ["optimizer state lost"]
    return found


@case("EMA with overwrite: a layer frozen later, train function remade")
def ema_overwrite(frostline: bool) -> Outcome:
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)
    plain = set_trainable("body", "norm", value=False, remake=True)
    return _change_within_fit(compiled(network(), optimizer), frostline, plain, freeze=True)


@case("EMA without overwrite: averages are written at the end of `fit`, over a shorter list")
def ema_end_of_fit(frostline: bool) -> Outcome:
    """Right: "head" ends with its own average, and frozen weights keep their bits."""
    keras.utils.set_random_seed(0)
    names = ("body", "middle", "head")  # of one shape
    model = keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(6, name=n) for n in names)])
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    compiled(model, optimizer)
    found, frozen = Outcome(), names[:2]
    seen: dict[str, bytes] = {}
    with watched(found):
        watch = at_epoch(1, lambda m: seen.update(bits_of(m, *frozen)))
        plain = at_epoch(1, set_trainable(*frozen, value=False, remake=True))
        fit(model, watch, freezing((), frozen) if frostline else plain, epochs=2)
        found.moved = changed(seen, bits_of(model, *frozen))
        averages = [v for v in optimizer.variables if v.name.endswith("head_kernel_average")]
        if not np.array_equal(numbers(averages[0]), numbers(model.layers[-1].kernel)):
            found.stuck = ["head/kernel is not its average"]
    return found


@case("EMA: `fit` a second time")
def ema_second_fit(frostline: bool) -> Outcome:
    model = compiled(network(norm=False), keras.optimizers.SGD(0.1, use_ema=True))
    found, tool = Outcome(), []
    with watched(found):
        if frostline:
            tool = [freezing(("body",))]
        fit(model, *tool)
        before = bits_of(model, "head")
        fit(model, *tool)
        found.stuck = same(before, bits_of(model, "head"))
    return found


@case("freezing by zeroed gradients, with momentum and weight decay")
def zero_gradients(frostline: bool) -> Outcome:
    """The recipe of gradient masks: the optimizer gets zeros for what should stay."""

    class Masked(keras.optimizers.SGD):
        masked = False

        def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
            if self.masked:
                named = trainable_variables or self._trainable_variables
                grads = [
                    keras.ops.zeros_like(g) if "head" not in v.path else g
                    for g, v in zip(grads, named, strict=True)
                ]
            return super().apply(grads, trainable_variables)

    def mask(m: Any) -> None:
        m.optimizer.masked = True
        m.make_train_function(force=True)

    kind = keras.optimizers.SGD if frostline else Masked
    model = compiled(network(norm=False), kind(0.1, momentum=0.9, weight_decay=0.01))
    return _change_within_fit(model, frostline, mask, freeze=True)


@case("gradient accumulation: a layer frozen in mid-accumulation and unfrozen later")
def accumulation(frostline: bool) -> Outcome:
    """Right: gradients from before the freeze are not applied after it.

    The loss is turned off (weight 0) before the layer trains again, so that only what was
    accumulated before could move it.
    """
    model = network(norm=False)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer.build(model.trainable_variables)
    body, head = model.get_layer("body").kernel, model.get_layer("head").kernel
    one = keras.ops.ones_like
    found = Outcome()
    with watched(found):
        if frostline:
            backend = KerasBackend(model, optimizer=optimizer)
            group = next(g.name for g in backend.groups if g.name.rpartition("/")[2] == "body")
            _gradients(optimizer, [(body, one), (head, one)])
            backend.apply(FreezePlan(frozen=frozenset({group})))
            _gradients(optimizer, [(head, one)])
            backend.apply(FreezePlan())
        else:
            _gradients(optimizer, [(body, one), (head, one)])
            _gradients(optimizer, [(head, one)])
        before = numbers(body).tobytes()
        for _ in range(2):
            _gradients(optimizer, [(body, keras.ops.zeros_like), (head, one)])
        if numbers(body).tobytes() != before:
            found.moved = ["body/kernel by a gradient from before the freeze"]
    return found


@case("mixed precision with a loss scale: freeze in the midst of `fit`, train function remade")
def loss_scale(frostline: bool) -> Outcome:
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    plain = set_trainable("body", "norm", value=False, remake=True)
    return _change_within_fit(compiled(network(), optimizer), frostline, plain, freeze=True)


@case("BatchNorm: gamma and beta frozen by `variable.trainable = False`")
def norm_by_variable(frostline: bool) -> Outcome:
    model, found = network(), Outcome()
    if not frostline:
        for variable in model.get_layer("norm").trainable_variables:
            variable.trainable = False
    compiled(model)
    before = bits(model.get_layer("norm"))
    with watched(found):
        fit(model, *([freezing(("body", "norm"))] if frostline else []))
        found.moved = changed(before, bits(model.get_layer("norm")))
    return found


@case("dropout inside what is frozen goes on")
def dropout(frostline: bool) -> Outcome:
    """Right: what a frozen block gives in training is what it gives always."""
    model, found = network(dropout=0.5), Outcome()
    compiled(model)
    names = ("body", "norm", "drop")
    with watched(found):
        if frostline:
            fit(model, freezing(names))
        else:
            set_trainable(*names, value=False)(model)
            fit(model)
        layer = model.get_layer("drop")
        block = np.ones((4, 8), "float32")
        out = numbers(layer(block, training=True))
        if not np.array_equal(out, block):
            found.moved = ["output of the frozen block, at every batch"]
    return found


@case("one layer of a frozen nested backbone set trainable")
def nested(frostline: bool) -> Outcome:
    """Right without help, too: in `fit` the flag of each layer counts, not that of its model."""
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")],
        name="backbone",
    )
    model = keras.Sequential([keras.Input((6,)), inner, keras.layers.Dense(3, name="head")])
    found = Outcome()
    if not frostline:
        inner.trainable = False
        inner.get_layer("b").trainable = True
    compiled(model)
    before = bits(inner.get_layer("b"))
    frozen = bits(inner.get_layer("a"))
    with watched(found):
        fit(model, *([freezing(("a",))] if frostline else []))
    found.stuck = same(before, bits(inner.get_layer("b"))) if not found.raised else []
    found.moved = changed(frozen, bits(inner.get_layer("a")))
    return found


@case("a backbone shared by two compiled models: the second freezes it, the first trains on")
def shared(frostline: bool) -> Outcome:
    """Right: the first model, which never asked for freezing, trains the backbone."""
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, name="body")], name="bb")
    first, second = (
        compiled(keras.Sequential([keras.Input((6,)), inner, keras.layers.Dense(3)]))
        for _ in range(2)
    )
    found = Outcome()
    with watched(found):
        fit(first, *([freezing(())] if frostline else []))
        if frostline:
            fit(second, freezing(("body",)))
        else:
            inner.trainable = False
            fit(second)
        before = bits(inner.get_layer("body"))
        fit(first, *([freezing(())] if frostline else []))
        found.stuck = same(before, bits(inner.get_layer("body")))
    return found


@case("another callback sets `model.trainable = True` while a layer is to be frozen")
def flipped_back(frostline: bool) -> Outcome:
    model, found = network(), Outcome()
    names = ("body", "norm")
    if not frostline:
        set_trainable(*names, value=False)(model)
    compiled(model)

    def unfreeze_all(m: Any) -> None:
        m.trainable = True

    before = bits(model.get_layer("body"))
    tools = [freezing(names)] if frostline else []
    with watched(found):
        fit(model, *tools, at_epoch(1, unfreeze_all), epochs=3)
        found.moved = changed(before, bits(model.get_layer("body")))
    return found


@case("Adam: size of a layer's first update when it was unfrozen late, in learning rates")
def adam_jump(frostline: bool) -> Outcome:
    """Keras corrects Adam's bias by one step count for all; torch keeps one per weight."""
    model = network(norm=False)
    optimizer = keras.optimizers.Adam(0.001, epsilon=1e-12)
    optimizer.build(model.trainable_variables)
    body, head = model.get_layer("body").kernel, model.get_layer("head").kernel
    one, found = keras.ops.ones_like, Outcome()
    with watched(found):
        backend = KerasBackend(model, optimizer=optimizer) if frostline else None
        if backend is not None:
            group = next(g.name for g in backend.groups if g.name.rpartition("/")[2] == "body")
            backend.apply(FreezePlan(frozen=frozenset({group})))
        _gradients(optimizer, [(head, one)])
        optimizer.iterations.assign(LATE)
        if backend is not None:
            backend.apply(FreezePlan())
        before = numbers(body)
        _gradients(optimizer, [(body, one), (head, one)])
        jump = float(np.abs(numbers(body) - before).max() / 0.001)
        found.note = f"{jump:.1f}"
        found.moved = [f"{jump:.1f} times the learning rate"] if jump > 1.5 else []
    return found


def _gradients(optimizer: Any, pairs: list[tuple[Any, Callable[[Any], Any]]]) -> None:
    """One call of `optimizer.apply` with made-up gradients."""
    variables = [variable for variable, _ in pairs]
    grads = [make(keras.ops.convert_to_tensor(variable)) for variable, make in pairs]
    scope = contextlib.nullcontext()
    if keras.backend.backend() == "torch":
        scope = importlib.import_module("torch").no_grad()
    with scope:
        optimizer.apply(grads, variables)


def run(tools: Sequence[str]) -> dict[str, Any]:
    """Every case with Keras alone ("keras"), with the callback ("frostline"), or both."""
    found: dict[str, Any] = {}
    for name, (title, function) in CASES.items():
        found[name] = {"title": title}
        for tool in tools:
            keras.backend.clear_session()
            outcome = function(frostline=tool == "frostline")
            found[name][tool] = asdict(outcome) | {"verdict": outcome.verdict}
    return {"keras": keras.__version__, "cases": found}
