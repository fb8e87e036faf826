"""The reference backend holds the contract, and each rule catches a backend that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from frostline.backends.numpy import NumpyBackend
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
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_backend_is_caught(broken: type[NumpyBackend], rule: str) -> None:
    make: Callable[[], NumpyCase] = lambda: NumpyCase(broken)  # noqa: E731
    with pytest.raises(ContractBroken, match=rule):
        check_backend(make)
