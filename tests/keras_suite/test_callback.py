"""`FreezeCallback` in every form of `fit`: inputs, compilation, other callbacks, second fits."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest

from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.names import tensors
from frostline.clock import Duration
from frostline.errors import BackendError, FrozenTensorChanged, PolicyError
from frostline.groups import LayerGroups
from frostline.integrations.keras import FreezeCallback, SwitchCosts
from frostline.plan import FreezePlan
from frostline.policy import Event, EventKind, Policy, State
from frostline.signals import Need

BACKEND = keras.backend.backend()
BATCH, BATCHES = 8, 4


def network(dropout: float = 0.0) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", name="body"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(8, activation="tanh", name="middle"),
            keras.layers.Dropout(dropout, seed=1, name="drop"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def compiled(model: keras.Model | None = None, optimizer: Any = None, **options: Any) -> Any:
    model = network() if model is None else model
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, loss, metrics=["accuracy"], **options)
    return model


def data(samples: int = BATCH * BATCHES) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(3)
    x = source.normal(size=(samples, 6)).astype("float32")
    return x, source.integers(0, 3, samples).astype("int32")


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    given = options.pop("x", None)
    x, y = (given, None) if given is not None else data()
    if given is not None:
        options.pop("batch_size")
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options).history


def bits(model: keras.Model) -> dict[str, bytes]:
    return {n: array_of(v).tobytes() for n, v in tensors(model).items()}


def moved(before: dict[str, bytes], model: keras.Model) -> set[str]:
    return {n for n, b in bits(model).items() if b != before[n]}


@dataclass(frozen=True)
class Turns(Policy):
    """Freezes by turns, a set of layers for each `every` updates."""

    turns: tuple[tuple[str, ...], ...]
    every: int = BATCHES

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        names = self.turns[event.progress.step // self.every % len(self.turns)]
        return FreezePlan(frozen=frozenset(names)), state


@dataclass(frozen=True)
class Seen(Policy):
    """Notes the metrics of every evaluation; reads gradients if asked to."""

    metrics: list[dict[str, float]]
    reads: bool = False

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", Duration.parse("1st")),) if self.reads else ()

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        if event.kind is EventKind.EVALUATED:
            self.metrics.append(dict(event.metrics))
        return FreezePlan(frozen=frozenset({groups.names[0]})), state


@dataclass(frozen=True)
class Done(Policy):
    """Says after the first evaluation that nothing more is to be gained."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(done=event.kind is EventKind.EVALUATED), state


# -- what a policy sees and does -------------------------------------------------------------


def test_plans_change_within_one_fit_and_the_proof_says_when() -> None:
    model, freezing = compiled(), FreezeCallback("gradual:every=1ep")
    fit(model, freezing, epochs=3)
    assert [(d.step, sorted(d.plan.frozen)) for d in freezing.decisions] == [
        (0, ["body", "middle"]),
        (4, ["body"]),
        (8, []),
    ]
    spans = {(h.tensor, h.from_step, h.to_step) for h in freezing.certificate.holds}
    assert ("middle/kernel", 0, 4) in spans
    assert ("norm/moving_mean", 0, 8) in spans
    assert freezing.lengths == (4, 12)


def test_metrics_come_under_the_names_of_keras_and_of_the_tasks() -> None:
    seen: list[dict[str, float]] = []
    fit(compiled(), FreezeCallback(Seen(seen)), validation_data=data(16))
    assert set(seen[0]) == {
        "loss", "accuracy", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
    }  # fmt: skip
    assert seen[0]["loss"] == seen[0]["train_loss"]


def test_epochs_without_validation_are_left_out() -> None:
    seen: list[dict[str, float]] = []
    freezing = FreezeCallback(Seen(seen), validation_freq=2)
    fit(compiled(), freezing, epochs=4, validation_data=data(16), validation_freq=2)
    assert len(seen) == 2
    assert all("val_loss" in metrics for metrics in seen)


def test_a_policy_that_is_done_ends_the_run() -> None:
    assert len(fit(compiled(), FreezeCallback(Done()), epochs=5)["loss"]) == 1


def test_it_prints_and_calls_back(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    freezing = FreezeCallback(
        "gradual:every=1ep", verbose=1, on_decision=lambda d: seen.append(d.step)
    )
    fit(compiled(), freezing)
    assert seen == [0, 4, 8]  # the last evaluation is followed by no step
    assert "frozen 2 of 3 groups" in capsys.readouterr().out


# -- forms of fit ------------------------------------------------------------------------------


def dataset(x: np.ndarray, y: np.ndarray) -> Any:
    tf = importlib.import_module("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


def py_dataset(x: np.ndarray, y: np.ndarray) -> Any:
    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(x) // BATCH

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            part = slice(index * BATCH, (index + 1) * BATCH)
            return x[part], y[part]

    return Batches()


def loader(x: np.ndarray, y: np.ndarray) -> Any:
    torch = importlib.import_module("torch")
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    return torch.utils.data.DataLoader(pairs, batch_size=BATCH)


#: One by the clock, and one that reads gradients: a step in one piece, and one in two.
POLICIES = ["gradual:every=1ep", pytest.param("autofreeze:every=2st", marks=pytest.mark.slow)]
INPUTS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "py_dataset": py_dataset, "loader": loader,
}  # fmt: skip
if BACKEND != "torch":
    INPUTS["tf.data"] = dataset


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", INPUTS)
def test_every_kind_of_input_trains_alike(form: str, policy: str) -> None:
    plain, other = compiled(), compiled()
    fit(plain, one := FreezeCallback(policy))
    fit(other, two := FreezeCallback(policy), x=INPUTS[form](*data()))
    assert [d.to_json() for d in one.decisions] == [d.to_json() for d in two.decisions]
    assert bits(plain) == bits(other)


FORMS: dict[str, dict[str, Any]] = {"eager": {"run_eagerly": True}}
if BACKEND != "torch":  # there it means TorchInductor, which needs a compiler
    FORMS |= {"jit": {"jit_compile": True}, "no jit": {"jit_compile": False}}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", FORMS)
def test_compiled_or_not_it_freezes(form: str, policy: str) -> None:
    model, freezing = compiled(**FORMS[form]), FreezeCallback(policy)
    history = fit(model, freezing, epochs=3)
    assert freezing.certificate.holds
    assert np.isfinite(history["loss"]).all()


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it on torch")
def test_several_steps_per_execution_are_stepped_through() -> None:
    x, y = data(BATCH * 5)
    model, freezing = compiled(steps_per_execution=2), FreezeCallback("gradual:every=4st")
    model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, shuffle=False, callbacks=[freezing])
    assert freezing.driver is not None
    assert freezing.driver.progress.step == 10
    assert [d.step for d in freezing.decisions] == [0, 4, 9]  # asked at 0, 2, 4 of each epoch


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it on torch")
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_several_steps_per_execution_of_an_unknown_number_are_counted() -> None:
    x, y = data(BATCH * 5)

    def batches() -> Any:
        for i in range(0, len(x), BATCH):
            yield x[i : i + BATCH], y[i : i + BATCH]

    model, freezing = compiled(steps_per_execution=2), FreezeCallback("full")
    model.fit(batches(), shuffle=False, verbose=0, callbacks=[freezing])
    assert freezing.driver is not None
    assert freezing.driver.progress.step == 5


def test_signals_with_several_steps_or_summed_gradients_are_refused() -> None:
    if BACKEND != "torch":
        with pytest.raises(PolicyError, match="steps_per_execution=2"):
            fit(compiled(steps_per_execution=2), FreezeCallback("autofreeze"))
    summed = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    with pytest.raises(PolicyError, match="accumulates gradients"):
        fit(compiled(optimizer=summed), FreezeCallback("autofreeze"))


def test_one_step_is_one_update_when_gradients_are_summed() -> None:
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model, freezing = compiled(optimizer=optimizer), FreezeCallback("gradual:every=1ep")
    fit(model, freezing, epochs=3)
    assert freezing.lengths == (2, 6)
    assert [d.step for d in freezing.decisions] == [0, 2, 4]


def test_mixed_precision() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(network())
    finally:
        keras.config.set_dtype_policy("float32")
    freezing = FreezeCallback("gradual:every=1ep")
    fit(model, freezing, epochs=3)
    assert freezing.certificate.holds
    assert freezing.decisions[-1].step == 8


def test_sample_and_class_weights_count_as_without() -> None:
    weights = np.linspace(0, 2, BATCH * BATCHES).astype("float32")
    for options in ({"sample_weight": weights}, {"class_weight": {0: 1.0, 1: 2.0, 2: 0.5}}):
        plain, ours = compiled(), compiled()
        fit(plain, **options)
        fit(ours, FreezeCallback("full"), **options)
        assert bits(plain) == bits(ours)


# -- beside others ------------------------------------------------------------------------------


def test_a_policy_that_freezes_nothing_changes_nothing() -> None:
    plain, ours = compiled(network(0.3)), compiled(network(0.3))
    one = fit(plain, validation_data=data(16))
    two = fit(ours, FreezeCallback("full"), validation_data=data(16))
    assert bits(plain) == bits(ours)
    assert one == two


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_beside_it(tmp_path: Any, first: bool) -> None:
    """Early stopping writes the best weights back: what was frozen later changes, rightly."""
    freezing = FreezeCallback(Turns(((), (), ("body",), ("body",))))
    stopping = keras.callbacks.EarlyStopping(
        "val_loss", patience=2, restore_best_weights=True, mode="max"
    )
    others = [
        stopping,
        keras.callbacks.ModelCheckpoint(tmp_path / "best.weights.h5", save_weights_only=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "model.keras"),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.ReduceLROnPlateau(patience=1),
    ]
    order = [freezing, *others] if first else [*others, freezing]
    history = fit(compiled(), *order, epochs=6, validation_data=data(16))
    assert len(history["loss"]) <= 6
    assert freezing.certificate.holds
    assert (tmp_path / "model.keras").exists()


def test_evaluation_in_between_changes_nothing() -> None:
    class Asks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.evaluate(*data(16), verbose=0)
            self.model.predict(data(16)[0], verbose=0)

    plain, ours = compiled(), compiled()
    fit(plain, FreezeCallback("gradual:every=1ep"), epochs=3)
    fit(ours, FreezeCallback("gradual:every=1ep"), Asks(), epochs=3)
    assert bits(plain) == bits(ours)


def test_flags_changed_by_hand_are_put_back_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Meddles(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                self.model.trainable = True
                self.model.make_train_function(force=True)

    model, freezing = compiled(), FreezeCallback("linear-probe")
    before = bits(model)
    with caplog.at_level(logging.WARNING, "frostline"):
        fit(model, freezing, Meddles(), epochs=3)
    assert moved(before, model) == {"head/kernel", "head/bias"}
    assert "something outside changed the freezing" in caplog.text


def test_a_write_to_a_frozen_weight_fails_the_run() -> None:
    class Writes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            kernel = self.model.get_layer("body").kernel
            kernel.assign(array_of(kernel) + 1)

    with pytest.raises(FrozenTensorChanged, match="body/kernel"):
        fit(compiled(), FreezeCallback("linear-probe"), Writes(), epochs=2)


# -- several fits -------------------------------------------------------------------------------


def test_a_second_fit_goes_on() -> None:
    policy = Turns((("body",), ("body", "middle")))
    once, twice = compiled(), compiled()
    fit(once, one := FreezeCallback(policy), epochs=4)
    two = FreezeCallback(policy)
    fit(twice, two, epochs=2)
    fit(twice, two, epochs=4, initial_epoch=2)
    assert bits(once) == bits(twice)
    assert [d.step for d in one.decisions] == [d.step for d in two.decisions]
    assert {h.to_step for h in two.certificate.holds} >= {8, 16}


def test_weights_are_the_users_between_two_fits() -> None:
    model, freezing = compiled(), FreezeCallback("linear-probe")
    fit(model, freezing)
    model.get_layer("body").kernel.assign(np.ones((6, 8), "float32"))
    fit(model, freezing)
    digests = {h.sha256 for h in freezing.certificate.holds if h.tensor == "body/kernel"}
    assert len(digests) == 2


def test_a_fit_after_an_error_goes_on() -> None:
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise RuntimeError("stop")

    model, freezing = compiled(), FreezeCallback("linear-probe")
    before = bits(model)
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, freezing, Fails())
    fit(model, freezing)
    assert moved(before, model) == {"head/kernel", "head/bias"}


def test_compiling_again_between_two_fits_is_allowed() -> None:
    model, freezing = compiled(), FreezeCallback("linear-probe")
    fit(model, freezing)
    compiled(model)
    before = bits(model)
    fit(model, freezing)
    assert moved(before, model) == {"head/kernel", "head/bias"}


def test_released_the_model_is_keras_own_again() -> None:
    model, freezing = compiled(), FreezeCallback("linear-probe")
    fit(model, freezing)
    freezing.release()
    for layer in model.layers:  # on TensorFlow `model.trainable = True` does nothing if it is
        layer.trainable = True
    compiled(model)
    before = bits(model)
    fit(model)
    assert {"body/kernel", "middle/kernel", "head/kernel"} <= moved(before, model)


def test_layers_frozen_by_hand_before_compile_are_unfrozen_in_time() -> None:
    model = network()
    model.get_layer("body").trainable = False
    before = bits(compiled(model))
    freezing = FreezeCallback("gradual:every=1ep")
    fit(model, freezing, epochs=3)
    assert {"body/kernel", "middle/kernel", "head/kernel"} <= moved(before, model)
    assert int(array_of(model.optimizer.iterations)) == 12


def test_another_model_is_refused_and_so_is_a_model_without_compile() -> None:
    freezing = FreezeCallback("full")
    fit(compiled(), freezing)
    with pytest.raises(BackendError, match="callback that trained"):
        fit(compiled(), freezing)
    with pytest.raises(ValueError, match=r"compile\(\)"):
        fit(network(), FreezeCallback("full"))


def test_an_unknown_policy_is_refused_at_once() -> None:
    with pytest.raises(PolicyError):
        FreezeCallback("no-such-policy")


# -- the price of a switch -----------------------------------------------------------------------


def test_k_plans_make_at_most_k_train_functions_however_often_they_alternate() -> None:
    turns = (("body",), ("middle",), ("body", "middle"))
    freezing = FreezeCallback(Turns(turns, every=2))
    fit(compiled(), freezing, epochs=6)
    assert len(freezing.decisions) == 13
    several = 2 if BACKEND == "jax" else 1  # one for training and one for evaluation
    assert freezing.retraces <= several * len(turns)


def test_the_price_of_a_switch_is_judged() -> None:
    costs = SwitchCosts()
    for _ in range(10):
        costs.note(0.1, switched=False)
    costs.note(2.1, switched=True)
    assert costs.step_s == pytest.approx(0.1)
    assert costs.dwell_steps == 20


def test_a_policy_that_switches_more_than_it_trains_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    freezing = FreezeCallback(Turns((("body",), ("middle",)), every=1))
    monkeypatch.setattr(SwitchCosts, "dwell_steps", property(lambda self: 100))
    with caplog.at_level(logging.WARNING, "frostline"):
        fit(compiled(), freezing, epochs=3)
    assert caplog.text.count("more time goes into switching") == 1
