"""Frozen tensors keep their bits under every optimizer, and what trains, trains as plain Keras.

All runs go through `fit`, compiled, with the backend's own train functions: one switch of plan in
the middle, there and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.backend import KerasBackend
from frostline.backends.keras.names import tensors
from frostline.errors import BackendError
from frostline.plan import FreezePlan
from keras_suite.keras_case import batch, digest, small_model

make = keras.optimizers
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: make.SGD(0.05),
    "momentum": lambda: make.SGD(0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda: make.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=1.0),
    "adam": lambda: make.Adam(0.01, weight_decay=0.01),
    "amsgrad": lambda: make.Adam(0.01, amsgrad=True, global_clipnorm=1.0),
    "adamw": lambda: make.AdamW(0.01, weight_decay=0.1),
    "lion": lambda: make.Lion(0.001, weight_decay=0.1),
    "adafactor": lambda: make.Adafactor(0.01),
    "adagrad": lambda: make.Adagrad(0.05),
    "rmsprop": lambda: make.RMSprop(0.005, momentum=0.5, centered=True),
    "nadam": lambda: make.Nadam(0.01),
    "muon": lambda: make.Muon(0.01),
    "ema": lambda: make.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.5),
    "ema-overwrite": lambda: make.Adam(
        0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2
    ),
    "accumulating": lambda: make.AdamW(0.01, gradient_accumulation_steps=2),
    "scaled-loss": lambda: make.SGD(0.05, momentum=0.9, loss_scale_factor=8.0),
    "dynamic-scale": lambda: make.LossScaleOptimizer(make.Adam(0.01), dynamic_growth_steps=2),
    "schedule": lambda: make.SGD(make.schedules.ExponentialDecay(0.05, 2, 0.5), momentum=0.9),
}
#: On the slow backends some; the others are marked slow there.
QUICK = {"momentum", "adamw", "ema-overwrite", "accumulating", "dynamic-scale"}


def each(name: str) -> Any:
    slow = name not in QUICK and keras.backend.backend() != "torch"
    return pytest.param(name, marks=pytest.mark.slow if slow else ())


EACH = [each(name) for name in OPTIMIZERS]


class Act(keras.callbacks.Callback):
    """Applies plans at the beginnings of these batches."""

    def __init__(self, backend: KerasBackend, plans: dict[int, FreezePlan], every: int = 1) -> None:
        super().__init__()
        self.backend, self.plans, self.every = backend, plans, every
        self.seen: list[dict[str, str]] = []

    def on_train_batch_begin(self, number: int, logs: Any = None) -> None:
        if (plan := self.plans.get(number)) is not None:
            self.backend.apply(plan)
            self.seen.append(self.bits())
        assert self.backend.hold() == ()

    def bits(self) -> dict[str, str]:
        return dict(self.backend.fingerprint(tensors(self.backend._model)))


def data(count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    pairs = [batch(i, 8) for i in range(count)]
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])


def fit(model: keras.Model, count: int, *callbacks: Any, **options: Any) -> None:
    x, y = data(count)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks), **options)


def compiled(optimizer: Any, **options: Any) -> keras.Model:
    model = small_model(dropout=0.2)
    model.compile(optimizer, "mse", **options)
    model.test_on_batch(*batch(0, 8))
    return model


@pytest.mark.parametrize("name", EACH)
def test_frozen_tensors_keep_their_bits_in_one_fit(name: str) -> None:
    model = compiled(OPTIMIZERS[name]())
    backend = KerasBackend(model)
    groups = backend.groups
    two = FreezePlan(frozen=frozenset(groups.names[:2]))
    act = Act(backend, {0: FreezePlan(), 4: two, 8: FreezePlan()})
    fit(model, 12, act)
    free, frozen, again = act.seen
    held = two.held_tensors(groups)
    assert held
    assert {n for n in held if frozen[n] != again[n]} == set()
    parameters = {p.name for g in groups for p in g.parameters}
    assert {n for n in parameters if free[n] == frozen[n]} == set(), "all train before"
    trained = parameters - held
    assert {n for n in trained if frozen[n] == again[n]} == set(), "the others train meanwhile"
    assert {n for n in parameters if again[n] == act.bits()[n]} == set(), "all train again"
    assert all(np.isfinite(array_of(v)).all() for v in tensors(model).values())


@pytest.mark.parametrize("name", EACH)
def test_without_freezing_bits_are_those_of_plain_keras(name: str) -> None:
    plain = compiled(OPTIMIZERS[name]())
    fit(plain, 6)
    model = compiled(OPTIMIZERS[name]())
    backend = KerasBackend(model)
    fit(model, 6, Act(backend, {0: FreezePlan()}))
    assert bits_of(model) == bits_of(plain)


def bits_of(model: keras.Model) -> dict[str, str]:
    found = {n: digest(v) for n, v in tensors(model).items()}
    return found | {f"o{i}": digest(v) for i, v in enumerate(model.optimizer.variables)}


def test_the_end_of_fit_overwrites_no_frozen_weight_with_an_average() -> None:
    model = compiled(make.SGD(0.05, use_ema=True, ema_momentum=0.5))
    backend = KerasBackend(model)
    frozen = FreezePlan(frozen=frozenset(backend.groups.names[:1]))
    act = Act(backend, {0: FreezePlan(), 3: frozen})
    fit(model, 6, act)
    held = frozen.held_tensors(backend.groups)
    assert {n: act.seen[1][n] for n in held} == {n: act.bits()[n] for n in held}
    head = backend._variables["head/kernel"]
    slots = backend._guard.slots(head)
    assert digest(head) in {digest(s) for s in slots}, "what trained is its average"


def test_what_was_frozen_from_the_start_is_not_averaged_with_zeros() -> None:
    options = {"use_ema": True, "ema_momentum": 0.99, "ema_overwrite_frequency": 1}
    model = compiled(make.SGD(1e-4, **options))
    backend = KerasBackend(model)
    before = array_of(backend._variables["block0/kernel"]).copy()
    frozen = FreezePlan(frozen=frozenset(backend.groups.names[:1]))
    fit(model, 6, Act(backend, {0: frozen, 4: FreezePlan()}))
    np.testing.assert_allclose(array_of(backend._variables["block0/kernel"]), before, atol=1e-2)


def test_summed_gradients_of_before_a_freeze_are_dropped() -> None:
    """Frozen after one of two micro-batches, unfrozen after four: its sum must not come back."""
    model = compiled(make.SGD(0.05, gradient_accumulation_steps=2))
    backend = KerasBackend(model)
    frozen = FreezePlan(frozen=frozenset(backend.groups.names[:1]))
    variable = backend._variables["block0/kernel"]
    act = Act(backend, {0: FreezePlan(), 3: frozen})
    fit(model, 3, act)
    assert any(np.any(array_of(s)) for s in backend._guard.slots(variable))
    backend.apply(frozen)
    assert not any(np.any(array_of(s)) for s in backend._guard.slots(variable))


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_factors_scale_steps(name: str) -> None:
    """Half of the step for a factor of a half, none for 0, and bits of plain Keras for 1."""
    ends = {}
    for factor in (1.0, 0.5, 0.0):
        model = compiled(OPTIMIZERS[name](), run_eagerly=True)
        backend = KerasBackend(model)
        variable = backend._variables["block1/kernel"]
        other = backend._variables["head/kernel"]
        before = array_of(variable).copy()
        scales = {"block1": factor, "block2": 0.25}
        fit(model, 1, Act(backend, {0: FreezePlan(lr_scale=scales)}))
        ends[factor] = array_of(variable) - before, digest(other), digest(variable)
    whole, half, none = ends[1.0][0], ends[0.5][0], ends[0.0][0]
    np.testing.assert_allclose(half, whole / 2, rtol=1e-4, atol=1e-7)
    assert not none.any()
    assert len({other for _, other, _ in ends.values()}) == 1
    plain = compiled(OPTIMIZERS[name](), run_eagerly=True)
    fit(plain, 1)
    assert ends[1.0][2] == digest(tensors(plain)["block1/kernel"])


def test_rates_change_without_another_function() -> None:
    model = compiled(OPTIMIZERS["momentum"]())
    backend = KerasBackend(model)
    plans = {i: FreezePlan(lr_scale={"block0": 0.5 + i / 10}) for i in range(4)}
    fit(model, 4, Act(backend, plans))
    assert (backend.switches, backend.steps.built) == (0, backend.steps.built)
    before = digest(backend._variables["block0/kernel"])
    fit(model, 2, Act(backend, {0: FreezePlan(lr_scale={"block0": 0.0})}))
    assert backend.switches == 0
    assert digest(backend._variables["block0/kernel"]) == before


def test_an_optimizer_that_lacks_variables_is_refused() -> None:
    model = small_model()
    model.get_layer("block0").trainable = False
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(BackendError, match="2 of 14 variables are not in it"):
        KerasBackend(model)


def test_half_precision_with_a_scaled_loss() -> None:
    model = small_model(dtype="mixed_float16")
    model.compile(make.LossScaleOptimizer(make.Adam(0.01), initial_scale=2.0**8), "mse")
    model.test_on_batch(*batch(0, 8))
    backend = KerasBackend(model)
    two = FreezePlan(frozen=frozenset(backend.groups.names[:2]))
    act = Act(backend, {0: FreezePlan(), 2: two})
    fit(model, 5, act)
    held = two.held_tensors(backend.groups)
    end = act.bits()
    assert {n: act.seen[1][n] for n in held} == {n: end[n] for n in held}
    assert act.seen[1]["head/kernel"] != end["head/kernel"]


def test_a_loop_of_ones_own_updates_what_the_plan_trains() -> None:
    """It may hand over everything, also what is frozen; `fit` is not needed, nor `compile`."""
    model, optimizer = small_model(), make.AdamW(0.01, weight_decay=0.1)
    backend = KerasBackend(model, optimizer=optimizer)
    two = FreezePlan(frozen=frozenset(backend.groups.names[:2]))
    everything = list(model.trainable_variables)
    backend.apply(two)
    before = {n: digest(v) for n, v in tensors(model).items()}
    for _ in range(2):
        assert backend.hold() == ()
        gradients = [keras.ops.ones(v.shape) for v in everything]
        optimizer.apply(gradients, everything)
    moved = {n for n, v in tensors(model).items() if digest(v) != before[n]}
    parameters = {p.name for g in backend.groups for p in g.parameters}
    assert moved == parameters - two.held_tensors(backend.groups)
