"""The contract between the core and a framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.signals import Array, Probe

__all__ = ["Backend"]


class Backend(Protocol):
    """Makes one model (and its optimizer) equal to a plan, whatever it was before.

    `frostline.testing.check_backend` is the executable form of this contract.
    """

    @property
    def groups(self) -> LayerGroups:
        """The layer groups of the model; the same object for the backend's whole life."""
        ...

    def apply(self, plan: FreezePlan) -> None:
        """Make the model equal to `plan`. Idempotent, and independent of earlier plans.

        Frozen parameters afterwards have no gradient and get no update from any optimizer;
        normalisation and dropout in frozen groups follow the plan's two switches. Parameters
        that train do so from the next update on. Optimizer membership never changes.

        Raises:
            PlanError: the plan does not fit the groups.
        """
        ...

    def hold(self) -> tuple[str, ...]:
        """Restore whatever outsiders changed of the applied plan; names of what had moved.

        Called before every update, so it must be cheap.
        """
        ...

    def written(self) -> tuple[str, ...]:
        """Held tensors that may have been written to since the last call. A cheap hint.

        May name too many (the caller compares digests) and may miss writes that bypass the
        framework; the digests at unfreeze and at the end find those.
        """
        ...

    def fingerprint(self, names: Iterable[str]) -> Mapping[str, str]:
        """SHA-256 (hex) of the bytes of the named parameters and buffers."""
        ...

    def probe(self, loss: float | None = None) -> Probe:
        """A side-effect-free view for signals; `loss` is what `Probe.loss` answers."""
        ...

    def widen(self) -> None:
        """For one step, compute gradients of frozen groups, too: before its forward pass.

        Modes stay as the plan has them. Whatever happens to the step, `narrow`, `hold` and
        `apply` end it, and no frozen tensor moves: its gradient is dropped before the update.
        """
        ...

    def narrow(self) -> None:
        """End what `widen` began: drop the gradients of frozen groups. Idempotent."""
        ...

    def keep_batch(self) -> None:
        """Keep the inputs of the model's next forward pass in training as the probe batch.

        Does nothing once a batch is kept.
        """
        ...

    def kept(self) -> Any:
        """The probe batch for a checkpoint: plain values with arrays as leaves, None if none."""
        ...

    def restore_kept(self, kept: Any) -> None:
        """Take the probe batch of a checkpoint back."""
        ...

    def weights(self) -> Mapping[str, Array]:
        """Copies of all parameters and buffers, by name."""
        ...

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Write all parameters and buffers back; the optimizer forgets what it remembered."""
        ...
