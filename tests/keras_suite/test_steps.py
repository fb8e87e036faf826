"""Switches of plan within one `fit`: the right variables train, nothing is traced twice."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.backend import KerasBackend
from frostline.backends.keras.modes import is_held
from frostline.backends.keras.names import tensors
from frostline.clock import Duration
from frostline.driver import Driver
from frostline.errors import BackendError
from frostline.groups import LayerGroups
from frostline.integrations.keras import FreezeCallback
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State
from frostline.signals import Need
from keras_suite.keras_case import batch, digest, momentum, small_model


def compiled(**options: Any) -> keras.Model:
    model = small_model(dropout=0.2)
    model.compile(momentum(), "mse", **options)
    model.test_on_batch(*batch(0, 8))
    return model


def fit(model: keras.Model, steps: int, *callbacks: Any, **options: Any) -> Any:
    pairs = [batch(i, 8) for i in range(steps)]
    x, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return model.fit(
        x, y, batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks), **options
    )


def bits(model: keras.Model) -> dict[str, str]:
    found = {n: digest(v) for n, v in tensors(model).items()}
    return found | {f"o{i}": digest(v) for i, v in enumerate(model.optimizer.variables)}


class Plans(keras.callbacks.Callback):
    """Applies these plans, one at each batch, and notes the bits after each."""

    def __init__(self, backend: KerasBackend, plans: list[FreezePlan]) -> None:
        super().__init__()
        self.backend, self.plans = backend, plans
        self.seen: list[dict[str, str]] = []

    def on_train_batch_begin(self, number: int, logs: Any = None) -> None:
        self.backend.apply(self.plans[number])
        self.seen.append(dict(self.backend.fingerprint(tensors(self.backend._model))))

    def moved(self, step: int) -> set[str]:
        before, after = self.seen[step], self.seen[step + 1]
        return {n for n in before if before[n] != after[n]}


def freezing(*names: str) -> FreezePlan:
    return FreezePlan(frozen=frozenset(names))


def alike(**options: Any) -> keras.Model:
    """Layers of equal shapes and nothing else: one program fits several plans."""
    keras.utils.set_random_seed(5)
    names = ("a", "b", "c", "d")
    x = inputs = keras.Input((6,))
    for name in names:
        x = keras.layers.Dense(6, activation="tanh", name=name)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    model.compile(momentum(), "mse", **options)
    model.test_on_batch(*batch(0, 8))
    return model


class Turns(Policy):
    """Freezes the second and the third layer in turn."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        name = groups.names[1 + event.progress.step % 2]
        return FreezePlan(frozen=frozenset({name})), state


class WatchedTurns(Turns):
    """The same, and reads gradients."""

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", Duration.parse("1st")),)


@pytest.mark.parametrize("policy", [Turns(), WatchedTurns()], ids=["fused", "split"])
def test_no_step_runs_the_program_of_another_plan(policy: Policy) -> None:
    """Shapes fit, so such a program would take one layer for the other without an error.

    What moves would be right, too: only values tell. They are held against steps that are not
    compiled, where nothing can be stale.
    """
    ends = []
    for options in ({}, {"run_eagerly": True}):
        model = alike(**options)
        history = fit(model, 4, FreezeCallback(policy)).history
        x, y = batch(77, 8)
        found = {n: array_of(v) for n, v in tensors(model).items()}
        found |= {f"slot {v.path}": array_of(v) for v in model.optimizer.variables}
        ends.append((found, history["loss"], model.evaluate(x, y, verbose=0)))
    (one, loss, evaluated), (other, eager_loss, eager_evaluated) = ends
    assert loss == pytest.approx(eager_loss, rel=1e-4)
    assert evaluated == pytest.approx(eager_evaluated, rel=1e-4)
    assert len(one) == len(other)
    for mine, theirs in zip(one.values(), other.values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_plans_that_differ_in_nothing_but_the_layer_each_train_their_own() -> None:
    """Compiled programs of both plans look alike: Keras on JAX takes one for the other."""
    model = alike()
    backend = KerasBackend(model)
    plans = [freezing("b"), freezing("c"), freezing("b"), freezing("c")]
    act = Plans(backend, [*plans, FreezePlan()])
    fit(model, 5, act)
    for step, plan in enumerate(plans):
        held = plan.held_tensors(backend.groups)
        assert act.moved(step) == tensors(model).keys() - held
    assert backend.switches == 4


def test_evaluation_after_a_switch_is_of_the_right_weights() -> None:
    model = alike()
    backend = KerasBackend(model)
    x, y = batch(77, 8)
    for plan in (freezing("b"), freezing("c"), freezing("b")):
        backend.apply(plan)
        fit(model, 1)
        loss = model.evaluate(x, y, verbose=0)
        predicted = model.predict(x, verbose=0)
        outputs = array_of(model(x, training=False))
        np.testing.assert_allclose(predicted, outputs, rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(float(np.mean((outputs - y) ** 2)), rel=1e-4)


def test_a_plan_seen_before_needs_no_new_function() -> None:
    model = compiled()
    backend = KerasBackend(model)
    traces = []
    inner = model.train_step

    def counting(*args: Any) -> Any:
        traces.append(len(args))
        return inner(*args)

    model.train_step = counting
    plans = [freezing("block0"), freezing("block0", "block1"), freezing("block0")] * 2
    fit(model, 6, Plans(backend, plans))
    if keras.backend.backend() == "torch":
        assert len(traces) == 6  # runs, not traces
    else:
        assert len(traces) == 2
    assert backend.switches == 4


class Reading(Policy):
    """Reads gradients of everything at every second step and freezes two groups in turn."""

    def needs(self) -> tuple[Need, ...]:
        every = Duration.parse("2st")
        return tuple(
            Need(s, every, None, frozen_too=True)
            for s in ("gradient_norm", "update_importance", "cka_pretrained", "loss")
        )

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        first = groups.names[event.progress.step // 3 % 2]
        return FreezePlan(frozen=frozenset({first}), phase=sum(event.sampled.values())), state


class Replay(Reading):
    """The same plans, and reads nothing."""

    def needs(self) -> tuple[Need, ...]:
        return ()

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        first = groups.names[event.progress.step // 3 % 2]
        return FreezePlan(frozen=frozenset({first})), state


class Drive(keras.callbacks.Callback):
    """The least callback that drives a policy inside `fit`."""

    def __init__(self, policy: Policy, *, split: bool) -> None:
        super().__init__()
        self.policy, self.split = policy, split

    def on_train_begin(self, logs: Any = None) -> None:
        self.backend = KerasBackend(self.model)
        self.driver = Driver(self.policy, self.backend, total_steps=8)
        if self.split:
            self.backend.sample_by(
                lambda loss, *, overflow: self.driver.sample(loss, overflow=overflow)
            )

    def on_train_batch_begin(self, number: int, logs: Any = None) -> None:
        self.driver.begin_step()

    def on_train_batch_end(self, number: int, logs: Any = None) -> None:
        self.driver.end_step()

    def on_train_end(self, logs: Any = None) -> None:
        self.certificate = self.driver.finish()


FORMS: dict[str, dict[str, Any]] = {"compiled": {}, "eager": {"run_eagerly": True}}
if keras.backend.backend() == "tensorflow":
    FORMS["xla"] = {"jit_compile": True}


@pytest.mark.parametrize("form", FORMS)
def test_reading_signals_within_fit_changes_no_bits(form: str) -> None:
    ends = []
    for policy in (Reading(), Replay()):
        model = compiled(**FORMS[form])
        drive = Drive(policy, split=True)
        history = fit(model, 8, drive).history
        ends.append((bits(model), drive.certificate.to_json(), history["loss"]))
        if policy.needs():
            values = drive.driver.signals
    assert ends[0] == ends[1]
    assert set(values["gradient_norm"]) == {"block0", "block1", "block2", "head"}
    assert all(v > 0 for v in values["gradient_norm"].values())
    assert len(set(values["loss"].values())) == 1


def test_a_split_step_within_fit_is_the_one_outside() -> None:
    inside = compiled()
    fit(inside, 6, Drive(Replay(), split=True))
    outside = compiled()
    backend = KerasBackend(outside)
    driver = Driver(Replay(), backend)
    for step in range(6):
        with driver.step():
            backend.backward(batch(step, 8))
            backend.update()
    driver.finish()
    assert bits(inside) == bits(outside)


def test_split_and_fused_steps_agree() -> None:
    ends = []
    for split in (False, True):
        model = compiled()
        fit(model, 6, Drive(Replay(), split=split))
        ends.append({n: array_of(v) for n, v in tensors(model).items()})
    for name, value in ends[0].items():
        np.testing.assert_allclose(ends[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_what_outsiders_change_is_put_back() -> None:
    model = compiled()
    backend = KerasBackend(model)
    backend.apply(freezing("block0", "block1"))
    model.get_layer("block0").trainable = True
    model.get_layer("head").trainable = False
    del model.get_layer("drop0").__dict__["call"]
    moved = set(backend.hold())
    assert {"block0/kernel", "block0", "head/kernel", "head", "drop0"} <= moved
    assert backend.hold() == ()
    assert is_held(model.get_layer("drop0"))
    model.trainable = False
    assert backend.hold()
    assert len(model.trainable_variables) == 6


def test_a_model_compiled_again_is_refused() -> None:
    model = compiled()
    backend = KerasBackend(model)
    backend.apply(freezing("block0"))
    model.compile(momentum(), "mse")
    with pytest.raises(BackendError, match="compiled again"):
        backend.hold()


def test_dropout_and_statistics_follow_their_switches() -> None:
    model = compiled(run_eagerly=True)
    backend = KerasBackend(model)
    seeds = {n: v for n, v in tensors(model).items() if v.name == "seed_generator_state"}
    assert len(seeds) == 3
    for live, moving in ((frozenset(), 2), (frozenset({"block0"}), 3)):
        backend.apply(FreezePlan(frozen=frozenset({"block0"}), live_dropout=live, live_norm=live))
        before = {n: digest(v) for n, v in tensors(model).items()}
        backend.backward(batch(1))
        backend.update()
        moved = {n for n, v in tensors(model).items() if digest(v) != before[n]}
        assert len(moved & seeds.keys()) == moving
        assert ("norm0/moving_mean" in moved) == bool(live)
        assert "block0/kernel" not in moved


def test_everything_comes_off() -> None:
    model = compiled()
    backend = KerasBackend(model)
    backend.apply(freezing("block0"))
    backend.remove()
    assert "apply" not in vars(model.optimizer)
    assert not any(is_held(layer) for layer in model.layers)
    for layer in model.layers:  # on TensorFlow `model.trainable = True` does nothing to a True one
        layer.trainable = True
    before = digest(tensors(model)["block0/kernel"])
    fit(model, 1)
    assert digest(tensors(model)["block0/kernel"]) != before


class Broken(Reading):
    """Fails while signals are read, in the first step after a switch."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        frozen = groups.names[1 + (event.progress.step >= 3)]
        return FreezePlan(frozen=frozenset({frozen})), state


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_a_step_that_fails_after_a_switch_leaves_the_weights_of_the_step_before(
    split: bool,
) -> None:
    """Keras on JAX would write values of one layer to another of the same shape."""
    model = compiled(run_eagerly=keras.backend.backend() != "jax")
    drive = Drive(Broken() if split else Replay(), split=split)
    before: dict[str, str] = {}
    inner = model.train_step

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, number: int, logs: Any = None) -> None:
            if number == 3:
                before.update(drive.backend.fingerprint(tensors(model)))

    def failing(*args: Any) -> Any:
        if before:
            raise KeyboardInterrupt
        return inner(*args)

    model.train_step = failing
    with pytest.raises(KeyboardInterrupt):
        fit(model, 6, drive, Stop())
    after = {n: digest(v) for n, v in tensors(model).items()}
    assert after == before


def test_signals_of_a_scaled_loss_are_those_of_the_loss() -> None:
    found = []
    for scaled in (False, True):
        model = small_model(dropout=0.0)
        optimizer: Any = momentum()
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
        model.compile(optimizer, "mse", run_eagerly=True)
        model.test_on_batch(*batch(0, 8))
        backend = KerasBackend(model)
        backend.backward(batch(1))
        probe = backend.probe(backend.steps.loss)
        values = [probe.norm(probe.gradients(g), 2) for g in backend.groups]
        moved = [probe.norm(probe.update(g), 2) for g in backend.groups]
        found.append([probe.loss(), *values, *moved])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_augmentation_is_never_held() -> None:
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.RandomFlip(seed=1, name="flip")(inputs)
    x = keras.layers.Conv2D(4, 3, name="conv")(x)
    x = keras.layers.Dropout(0.5, seed=2, name="drop")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    model.compile("sgd", "mse")
    backend = KerasBackend(model)
    backend.apply(FreezePlan(frozen=frozenset(backend.groups.names[:-1])))
    assert is_held(model.get_layer("drop"))
    assert not is_held(model.get_layer("flip"))
