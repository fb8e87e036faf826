"""What freezing saved so far: measured seconds against predicted ones of full fine-tuning.

The costs of layer groups are measured on a few samples, so they say how dear the parts are beside
each other, not what a batch of this run takes. So an update that ran the whole forward pass is
predicted from its own seconds: full fine-tuning would have computed longer by the ratio of the two
predicted steps. An update that took a part from the cache has no such seconds. Its prediction is
scaled by what updates with the whole forward pass, and the filling of the cache, took against what
the costs predict for them. Until there is one of either, nothing is claimed.

Charged to freezing: all seconds of the updates (reading data, the policy, its signals, digests,
the cache with its filling) and the measuring of the costs. Counted on neither side: evaluation and
checkpoints. What full fine-tuning would wait for its data is taken from updates that read theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frostline.cost import predicted_forward_s, predicted_step_s
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

__all__ = ["Savings", "Update"]

_FULL = FreezePlan()
_SUMS = (
    "measure_s",
    "updates_s",
    "whole_full_s",
    "other_samples",
    "seen_s",
    "predicted_s",
    "wait_s",
    "wait_samples",
)


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update, timed.

    Attributes:
        samples: training samples in it.
        total_s: seconds from its begin to its end, everything charged.
        compute_s: of these, seconds of forward and backward passes and of the optimizer.
        wait_s: of these, seconds spent waiting for data.
        whole: whether the whole forward pass ran, nothing of it taken from the cache.
    """

    samples: int
    total_s: float
    compute_s: float
    wait_s: float
    whole: bool


@dataclass(slots=True)
class Savings:
    """Adds up updates, measured and as full fine-tuning is predicted to take them.

    Args:
        groups: layer groups with measured costs.
        measured_samples: how many samples their costs were measured on, >= 1.
        measure_s: seconds that the measuring took.

    Raises:
        PlanError: on the first update, if the groups were never measured.

    Example:
        >>> from frostline.groups import GroupCost, LayerGroup
        >>> cost = GroupCost(forward_s=1, input_grad_s=1, weight_grad_s=1)
        >>> groups = LayerGroups((LayerGroup("a", 0, (), cost=cost),
        ...                       LayerGroup("b", 1, (), cost=cost)))
        >>> savings = Savings(groups, measured_samples=1)
        >>> half = FreezePlan(frozen=frozenset({"a"}))  # 3 s predicted, 5 s without freezing
        >>> update = Update(samples=1, total_s=3, compute_s=3, wait_s=0, whole=True)
        >>> savings.add(half, update)  # the first sets things up
        >>> savings.saved_s is None
        True
        >>> savings.add(half, update)
        >>> savings.full_s, savings.saved_s
        (10.0, 4.0)
    """

    groups: LayerGroups
    measured_samples: int
    measure_s: float = 0.0
    updates_s: float = 0.0
    whole_full_s: float = 0.0  # predicted of full fine-tuning, for updates that ran whole
    other_samples: int = 0  # in all other updates
    seen_s: float = field(default=0.0, init=False)  # measured, where the costs predict ...
    predicted_s: float = field(default=0.0, init=False)  # ... so much
    wait_s: float = field(default=0.0, init=False)
    wait_samples: int = field(default=0, init=False)
    _fresh: bool = field(default=True, init=False)
    _steps: tuple[FreezePlan, float] | None = field(default=None, init=False)
    _full_step_s: float | None = field(default=None, init=False)

    def add(self, plan: FreezePlan, update: Update) -> None:
        """Count an update. The first of a session says nothing of the pace: much is set up in it.

        Args:
            plan: in force during it.
            update: as it was timed.
        """
        self.updates_s += update.total_s
        first, self._fresh = self._fresh, False
        if first or not update.whole:
            self.other_samples += update.samples
            return
        step_s = self._step_s(plan)
        self.seen_s += update.compute_s
        self.predicted_s += step_s * update.samples / self.measured_samples
        self.wait_s += update.wait_s
        self.wait_samples += update.samples
        longer = self._full_s() / step_s if step_s else 1.0
        self.whole_full_s += update.compute_s * longer + update.wait_s

    def filled(self, plan: FreezePlan, *, samples: int, compute_s: float) -> None:
        """Count a filling of the cache: the forward pass of the frozen prefix over new samples.

        Args:
            plan: in force during it.
            samples: whose frozen prefix ran.
            compute_s: seconds that it ran, without reading samples and writing what came out.
        """
        predicted = predicted_forward_s(self.groups, plan, below=plan.frontier(self.groups))
        self.seen_s += compute_s
        self.predicted_s += predicted * samples / self.measured_samples

    @property
    def full_s(self) -> float | None:
        """Seconds that full fine-tuning is predicted to take for these samples; None: unknown."""
        if not self.predicted_s:
            return None
        scale = self.seen_s / self.predicted_s
        wait = self.wait_s / self.wait_samples if self.wait_samples else 0.0
        each = scale * self._full_s() / self.measured_samples + wait
        return self.whole_full_s + self.other_samples * each

    @property
    def saved_s(self) -> float | None:
        """Seconds saved, as predicted; negative where freezing cost more. None: unknown."""
        full = self.full_s
        return None if full is None else full - self.updates_s - self.measure_s

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: what was added up, and what follows from it."""
        summed = {name: getattr(self, name) for name in _SUMS}
        return summed | {"full_predicted_s": self.full_s, "saved_predicted_s": self.saved_s}

    def restore(self, data: Mapping[str, Any]) -> None:
        """Go on from what an earlier session added up; what is absent counts as nothing."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + data.get(name, 0))

    def _full_s(self) -> float:
        """The predicted step of full fine-tuning, on the samples that costs were measured on."""
        if self._full_step_s is None:
            self._full_step_s = predicted_step_s(self.groups, _FULL)
        return self._full_step_s

    def _step_s(self, plan: FreezePlan) -> float:
        if self._steps is None or self._steps[0] is not plan:
            self._steps = plan, predicted_step_s(self.groups, plan)
        return self._steps[1]
