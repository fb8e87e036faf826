"""The Keras backend holds the contract, and the contract catches a Keras backend that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.backend import KerasBackend
from frostline.backends.keras.names import layers
from frostline.errors import BackendError
from frostline.plan import FreezePlan
from frostline.testing import ContractBroken, check_backend
from frostline.testing import backend as contract
from keras_suite.keras_case import KerasCase, adamw

EAGER = partial(KerasCase, run_eagerly=True)


def test_keras_backend_holds_the_contract() -> None:
    """Uncompiled: the same code traces nothing, and so takes seconds instead of minutes."""
    check_backend(EAGER)


@pytest.mark.parametrize(
    "check", ["_check_no_gradient", "_check_rates", "_check_sampling", "_check_sums"]
)
def test_compiled_steps_hold_the_contract(check: str) -> None:
    getattr(contract, check)(KerasCase)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_compiled_steps_hold_the_whole_contract(optimizer: str) -> None:
    check_backend(KerasCase if optimizer == "momentum" else partial(KerasCase, optimizer=adamw))


class KeepsGradients(KerasBackend):
    def apply(self, plan: FreezePlan) -> None:
        kept = dict(self.steps.gradients)
        super().apply(plan)
        self.steps.gradients.update(kept)


class TrainsEverything(KerasBackend):
    """Sets flags and forgets the optimizer: what an old gradient does is nobody's business."""

    def apply(self, plan: FreezePlan) -> None:
        kept = dict(self.steps.gradients)
        super().apply(plan)
        self.steps.gradients.update(kept)
        self._guard.train(self._variables.values())
        self.steps.form = replace(self.steps.form, trained=frozenset(self._variables))


class ForgetsStatistics(KerasBackend):
    def apply(self, plan: FreezePlan) -> None:
        super().apply(plan)
        self._modes.release()
        for path, layer in layers(self._model):
            if path.startswith("norm"):
                layer._trainable = True

    def hold(self) -> tuple[str, ...]:
        self.narrow()
        return ()


class IgnoresRates(KerasBackend):
    def apply(self, plan: FreezePlan) -> None:
        super().apply(replace(plan, lr_scale={}))


class BlindFingerprint(KerasBackend):
    def fingerprint(self, names: Iterable[str]) -> Mapping[str, str]:
        found = super().fingerprint(names)
        return {n: "0" if n.endswith("moving_mean") else d for n, d in found.items()}


class AlwaysComplains(KerasBackend):
    def hold(self) -> tuple[str, ...]:
        return (*super().hold(), "block0/kernel")


class WidensNothing(KerasBackend):
    def widen(self) -> None:
        pass


class StaysWide(KerasBackend):
    def narrow(self) -> None:
        pass


class RealUpdate(KerasBackend):
    """Finds the next update out by making it."""

    def probe(self, loss: Any = None) -> Any:
        probe, backend = super().probe(loss), self

        class Moving:
            def __getattr__(self, name: str) -> Any:
                return getattr(probe, name)

            def update(self, unit: Any) -> Any:
                found = probe.update(unit)
                slots = [backend._guard.slots(v)[0] for v in backend._variables.values()]
                for slot in slots:
                    slot.assign_add(slot * 0 + 1)
                return found

        return Moving()


class NoBatch(KerasBackend):
    def keep_batch(self) -> None:
        pass


class KeepsSlots(KerasBackend):
    def load_weights(self, weights: Mapping[str, Any]) -> None:
        slots = [
            (s, array_of(s).copy()) for v in self._variables.values() for s in self._guard.slots(v)
        ]
        super().load_weights(weights)
        for slot, value in slots:
            slot.assign(value)


class NeverReleases(KerasBackend):
    def apply(self, plan: FreezePlan) -> None:
        super().apply(replace(plan, released=frozenset()))


class Blinking(KerasBackend):
    """Reading signals runs the model once more, and its statistics and seeds move."""

    def probe(self, loss: Any = None) -> Any:
        self._model(self._batch.to_tree(), training=True)
        return super().probe(loss)


@pytest.mark.parametrize(
    ("broken", "check", "rule"),
    [
        (KeepsGradients, "_check_no_gradient", "freezing drops gradients at once"),
        (TrainsEverything, "_check_no_gradient", "drops gradients|moves nothing"),
        (ForgetsStatistics, "_check_norm", "statistics follow the data"),
        (IgnoresRates, "_check_rates", "rate of zero"),
        (BlindFingerprint, "_check_fingerprint", "sees every single change"),
        (AlwaysComplains, "_check_idempotent", "nothing is amiss"),
        (WidensNothing, "_check_widened", "gives frozen groups"),
        (StaysWide, "_check_widened", "narrow drops"),
        (RealUpdate, "_check_widened", "a probe moves nothing"),
        (NoBatch, "_check_batch", "probe batch|are kept"),
        (KeepsSlots, "_check_weights", "the optimizer forgets"),
        (NeverReleases, "_check_released", "as with a fresh optimizer"),
        (Blinking, "_check_probe", "a probe moves nothing"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_backend_is_caught(broken: type[KerasBackend], check: str, rule: str) -> None:
    make: Callable[[], KerasCase] = partial(KerasCase, broken, run_eagerly=True)
    with pytest.raises((ContractBroken, BackendError), match=rule):
        getattr(contract, check)(make)
