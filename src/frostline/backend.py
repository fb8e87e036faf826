"""The contract between the core and a framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.signals import Probe

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

    def probe(self) -> Probe:
        """A side-effect-free view for signals."""
        ...
