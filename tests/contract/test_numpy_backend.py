"""The reference backend holds the contract, and each rule catches a backend that breaks it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from frostline.backends.numpy import NumpyBackend
from frostline.errors import BackendError
from frostline.groups import LayerGroup
from frostline.plan import FreezePlan
from frostline.testing import ContractBroken, check_backend
from numpy_case import NumpyCase


def test_reference_backend_holds_the_contract() -> None:
    check_backend(NumpyCase)


class KeepsGradients(NumpyBackend):
    def apply(self, plan: FreezePlan) -> None:
        kept = dict(self.net.gradients)
        super().apply(plan)
        self.net.gradients.update(kept)


class FreezesForGood(NumpyBackend):
    def apply(self, plan: FreezePlan) -> None:
        before = dict(self.net.trainable)
        super().apply(plan)
        for name, was in before.items():
            self.net.trainable[name] &= was or name.startswith("head")

    def hold(self) -> tuple[str, ...]:
        return ()


class ForgetsStatistics(NumpyBackend):
    def apply(self, plan: FreezePlan) -> None:
        super().apply(plan)
        self.net.norm_live = dict.fromkeys(self.net.norm_live, True)

    def hold(self) -> tuple[str, ...]:
        return ()


class IgnoresRates(NumpyBackend):
    def apply(self, plan: FreezePlan) -> None:
        super().apply(plan)
        self.optimizer.scale = {}


class FreezesNothing(NumpyBackend):
    def _enforce(self) -> tuple[str, ...]:
        return ()


class AcceptsAnything(NumpyBackend):
    def apply(self, plan: FreezePlan) -> None:
        self._plan = plan
        self._enforce()
        self.optimizer.scale = dict(plan.lr_scale)


class BlindFingerprint(NumpyBackend):
    def fingerprint(self, names: Iterable[str]) -> Mapping[str, str]:
        return {
            n: "0" if n.endswith("running_mean") else d
            for n, d in super().fingerprint(names).items()
        }


class BlindToHeld(NumpyBackend):
    """Reports no change of what it is told to hold."""

    def fingerprint(self, names: Iterable[str]) -> Mapping[str, str]:
        held = self._plan.held_tensors(self.groups)
        return {n: "0" if n in held else d for n, d in super().fingerprint(names).items()}


class ClumsyProbe(NumpyBackend):
    def probe(self, loss: float | None = None) -> Any:
        self.net.random.random()
        return super().probe(loss)


class MutProbe(NumpyBackend):
    def probe(self, loss: float | None = None) -> Any:
        probe = super().probe(loss)

        class Silent:
            def __getattr__(self, name: str) -> Any:
                return getattr(probe, name)

            def norm(self, arrays: Any, order: int) -> float:
                return 0.0

        return Silent()


class AlwaysComplains(NumpyBackend):
    def hold(self) -> tuple[str, ...]:
        super().hold()
        return ("layer0.weight",)


class ShallowFreeze(NumpyBackend):
    """Freezes weights, forgets biases."""

    def _enforce(self) -> tuple[str, ...]:
        moved = super()._enforce()
        for name in self.net.trainable:
            if name.endswith("bias"):
                self.net.trainable[name] = True
        return moved


class WidensNothing(NumpyBackend):
    def widen(self) -> None:
        pass


class TrainsWhatItWidens(NumpyBackend):
    """Forgets during a widened step what is frozen."""

    def widen(self) -> None:
        super().widen()
        self._plan = FreezePlan()


class StaysWide(NumpyBackend):
    def narrow(self) -> None:
        pass


class LoudEnd(NumpyBackend):
    """Takes its own widening for somebody else's doing."""

    def hold(self) -> tuple[str, ...]:
        return self._enforce()


class RealUpdate(NumpyBackend):
    """The defect of public probes: works an update out with the very velocity of the optimizer."""

    def probe(self, loss: float | None = None) -> Any:
        probe, optimizer = super().probe(loss), self.optimizer

        class Moving:
            def __getattr__(self, name: str) -> Any:
                return getattr(probe, name)

            def update(self, unit: LayerGroup) -> list[Any]:
                found = probe.update(unit)
                for p, u in zip(unit.parameters, found, strict=True):
                    if u is not None:
                        optimizer.velocity[p.name] = -u / optimizer.lr
                return found

        return Moving()


class StaleGradients(NumpyBackend):
    """Reads each gradient once, until somebody holds the plan."""

    def hold(self) -> tuple[str, ...]:
        self.read: dict[str, Any] = {}
        return super().hold()

    def probe(self, loss: float | None = None) -> Any:
        probe = super().probe(loss)
        read = vars(self).setdefault("read", {})

        class Stale:
            def __getattr__(self, name: str) -> Any:
                return getattr(probe, name)

            def gradients(self, unit: LayerGroup) -> list[Any]:
                return read.setdefault(unit.name, [copy.copy(g) for g in probe.gradients(unit)])

        return Stale()


class NoBatch(NumpyBackend):
    def keep_batch(self) -> None:
        pass


class LatestBatch(NumpyBackend):
    def keep_batch(self) -> None:
        self.net.on_training = self._keep


class LosesBatch(NumpyBackend):
    def restore_kept(self, kept: Any) -> None:
        super().restore_kept(kept[::-1])


class FixedActivations(NumpyBackend):
    def activations(self, layer: str, *, int8: bool = False) -> Any:
        return np.ones((16, 2))


class ForgetsBuffers(NumpyBackend):
    def load_weights(self, weights: Mapping[str, Any]) -> None:
        super().load_weights({**weights, **self.net.buffers})


class KeepsVelocity(NumpyBackend):
    def load_weights(self, weights: Mapping[str, Any]) -> None:
        velocity = dict(self.optimizer.velocity)
        super().load_weights(weights)
        self.optimizer.velocity.update(velocity)


class SharesWeights(NumpyBackend):
    def weights(self) -> Mapping[str, Any]:
        return self.net.parameters | self.net.buffers


class NeverReleases(NumpyBackend):
    def apply(self, plan: FreezePlan) -> None:
        super().apply(replace(plan, released=frozenset()))


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (KeepsGradients, "freezing drops gradients at once"),
        (FreezesForGood, "unfreezing|idempotent|others train"),
        (ForgetsStatistics, "statistics follow the data|frozen tensors keep"),
        (IgnoresRates, "rate of zero"),
        (FreezesNothing, "frozen|gradient"),
        (AcceptsAnything, "does not fit is refused"),
        (BlindFingerprint, "sees every single change"),
        (BlindToHeld, "a write to a frozen tensor fails the run"),
        (ClumsyProbe, "a probe moves nothing"),
        (MutProbe, "report their gradient"),
        (AlwaysComplains, "nothing is amiss"),
        (ShallowFreeze, "amiss|gradient|frozen"),
        (WidensNothing, "widened steps? gives? frozen groups"),
        (TrainsWhatItWidens, "changes no training|no trace|trains no more"),
        (StaysWide, "narrow drops|changes no training"),
        (LoudEnd, "hold ends a widened step silently"),
        (RealUpdate, "a probe moves nothing"),
        (StaleGradients, "summed over the interval"),
        (NoBatch, "probe batch|are kept"),
        (LatestBatch, "once kept stays"),
        (LosesBatch, "once kept stays"),
        (FixedActivations, "present weights"),
        (ForgetsBuffers, "written back, bit for bit"),
        (KeepsVelocity, "the optimizer forgets"),
        (SharesWeights, "written back, bit for bit"),
        (NeverReleases, "starts again as with a fresh optimizer"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_backend_is_caught(broken: type[NumpyBackend], rule: str) -> None:
    make: Callable[[], NumpyCase] = lambda: NumpyCase(broken)  # noqa: E731
    with pytest.raises((ContractBroken, BackendError), match=rule):
        check_backend(make)
