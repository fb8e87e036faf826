"""The PyTorch backend: makes a model and its optimizer equal to a plan.

Frozen means four things at once, none of which is enough alone: `requires_grad` is off (the
backward pass stops), `grad is None` (neither momentum nor weight decay moves the weight), modules
with statistics or dropout are in evaluation mode whoever calls `train()`, and the bits are
watched (a version counter at every step, SHA-256 at freeze and unfreeze).

The plan decides alone. Parameters that had been frozen by hand before train as the plan says (a
log line counts them); those that must never train are named in `fixed`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frostline.backends.grouping import known_parameters
from frostline.backends.torch.activations import ProbeBatch
from frostline.backends.torch.digest import TensorTable, WriteWatch, sha256_of_tensors, unwrapped
from frostline.backends.torch.example import Example
from frostline.backends.torch.explain import explain_plan, recorded_groups
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.modes import HeldModes
from frostline.backends.torch.optimizer import (
    Homes,
    Sample,
    Scales,
    StepGuard,
    can_train,
    check_membership,
    check_restart,
    group_scales,
    layers_by_group,
    release_state,
    restart_state,
)
from frostline.backends.torch.probe import TorchProbe
from frostline.errors import BackendError, few
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

__all__ = ["OptimizerState", "TorchBackend", "applied_plan", "as_found", "record_plan"]

_log = logging.getLogger("frostline")
_requires_grad = attrgetter("requires_grad")

#: What becomes of the optimizer's memory of a parameter that is frozen: kept, so that it goes on
#: where it stopped, or released, so that the bytes are free and it starts afresh.
OptimizerState = Literal["keep", "release"]


class TorchBackend:
    """Satisfies `frostline.backend.Backend` for one `nn.Module`.

    Args:
        model: the model; may be wrapped by `torch.compile` or data-parallel wrappers.
        optimizer: the optimizer that updates it; it must hold every parameter from the start.
            Without one, plans that scale learning rates are refused.
        groups: the layer groups; found by running the model once if not given.
        optimizer_state: "keep" or "release" what the optimizer remembers of frozen parameters.
        fixed: names of parameters that never train, whatever the plan; see `as_found`.

    Raises:
        BackendError: groups and model do not fit, or the optimizer lacks parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        groups: LayerGroups | None = None,
        optimizer_state: OptimizerState = "keep",
        fixed: Collection[str] = (),
    ) -> None:
        self._root = unwrapped(model)
        self._groups = groups if groups is not None else layer_groups(self._root)
        self._optimizer = optimizer
        self._optimizer_state: OptimizerState = optimizer_state
        self._parameters = _resolve(self._root, self._groups)
        self._fixed = known_parameters(
            fixed, self._groups, names="names as in model.named_parameters(), or as_found(model)"
        )
        self._modes = HeldModes(self._root, self._groups)
        self._batch = ProbeBatch(model, self._groups)
        self._plan: FreezePlan | None = None
        self._wide = False
        self._released: frozenset[str] = frozenset()
        self._frozen: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}
        self._layers: Homes = []
        self._watch = WriteWatch(TensorTable(self._root), ())
        self._guard: StepGuard | None = None
        if optimizer is not None:
            able = {n: p for n, p in self._parameters.items() if self._able(n, p)}
            check_membership(optimizer, able)
            self._guard = StepGuard.of(optimizer, self._root)
            self._guard.parameters = list(self._parameters.items())
            if optimizer_state == "release":
                check_restart(optimizer)
        self._report_found()

    @property
    def groups(self) -> LayerGroups:
        """The layer groups of the model."""
        return self._groups

    def apply(self, plan: FreezePlan) -> None:
        """Make the model and the optimizer equal to `plan`.

        Raises:
            PlanError: the plan does not fit the groups, or nothing would train.
            BackendError: the model's parameters were replaced since the groups were found, or
                the optimizer cannot follow the plan's learning rates.
        """
        plan.check(self._groups)
        self.narrow()
        if self._plan is not None and self._plan.differs_only_in_rates(plan):
            self._apply_rates(plan)
            return
        self._check_parameters()
        names = plan.frozen_parameters(self._groups)
        frozen = {n: p for n, p in self._parameters.items() if n in names or not self._able(n, p)}
        trained = {n: p for n, p in self._parameters.items() if n not in frozen}
        homes = self._homes(trained)
        scales = self._scales(plan, homes)
        self._check_release(plan)
        for p in frozen.values():
            p.requires_grad = False
            p.grad = None
        for p in trained.values():
            p.requires_grad = True
        self._plan, self._frozen, self._trained, self._layers = plan, frozen, trained, homes
        self._modes.apply(plan)
        self._apply_to_optimizer(plan, scales)
        self._watch = WriteWatch(TensorTable(self._root), plan.held_tensors(self._groups))
        record_plan(self._root, (self._groups, plan))
        if any(g.name in plan.frozen for g in self._groups[plan.frontier(self._groups) :]):
            _log.info("%s", self.explain(plan))

    def hold(self) -> tuple[str, ...]:
        """Restore what outsiders changed of the plan; names of what had moved."""
        self.narrow()
        moved = self._guard.take_report() if self._guard else []
        for name, p in self._frozen.items():
            if p.requires_grad or p.grad is not None:
                p.requires_grad = False
                p.grad = None
                moved.append(name)
        if not all(map(_requires_grad, self._trained.values())):
            for name, p in self._trained.items():
                if not p.requires_grad:
                    p.requires_grad = True
                    moved.append(name)
        return (*dict.fromkeys(moved), *self._modes.restore())

    def written(self) -> tuple[str, ...]:
        """Held tensors that may have been written to since the last call."""
        return tuple(self._watch.look())

    def fingerprint(self, names: Iterable[str]) -> Mapping[str, str]:
        """SHA-256 (hex) of the bytes of the named parameters and buffers.

        Raises:
            BackendError: an unknown name, or a tensor whose bytes are not all here.
        """
        table = TensorTable(self._root)
        return sha256_of_tensors({name: table[name] for name in names})

    def probe(self, loss: float | Tensor | None = None) -> TorchProbe:
        """A side-effect-free view for signals; `loss` is what `TorchProbe.loss` answers."""
        rates = self._guard.rates if self._guard is not None else list
        return TorchProbe(self._parameters, self._frozen, self._batch, self._optimizer, rates, loss)

    def sample_by(self, sample: Sample | None) -> None:
        """Call this before each update from now on, when its gradients are there; None: nothing."""
        if self._guard is not None:
            self._guard.sample = sample

    def widen(self) -> None:
        """For one step, compute gradients of frozen groups, too; modes stay as they are."""
        wide = {n: p for n, p in self._frozen.items() if self._able(n, p)}
        for p in wide.values():
            p.requires_grad = True
        self._wide = True
        if self._guard is not None:
            self._guard.widened = wide

    def narrow(self) -> None:
        """Drop the gradients of frozen groups and compute no more."""
        if not self._wide:
            return
        self._wide = False
        for p in self._frozen.values():
            p.requires_grad = False
            p.grad = None
        if self._guard is not None:
            self._guard.widened = {}

    def keep_batch(self) -> None:
        """Keep the inputs of the model's next forward pass in training as the probe batch."""
        self._batch.keep_next()

    def kept(self) -> Any:
        """The probe batch as plain values and tensors; None if there is none."""
        return self._batch.to_tree()

    def restore_kept(self, kept: Any) -> None:
        """Take the probe batch of a checkpoint back."""
        self._batch.from_tree(kept)

    def weights(self) -> Mapping[str, Tensor]:
        """Copies of all parameters and buffers in main memory, tied ones under their first name."""
        return {n: t.detach().to("cpu", copy=True) for n, t in self._tensors()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Write all parameters and buffers back; the optimizer forgets what it remembered.

        Raises:
            BackendError: other names or shapes than those of the model, or an optimizer that
                cannot start afresh; nothing was written.
        """
        if self._optimizer is not None:
            check_restart(self._optimizer)
        tensors = dict(self._tensors())
        if odd := [
            n for n, t in tensors.items() if n not in weights or weights[n].shape != t.shape
        ]:
            raise BackendError(
                "load weights",
                found=f"none of the right shape for {few(odd)}",
                fix="weights that `weights()` of this model gave",
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(weights[name])
        if self._optimizer is not None:
            release_state(self._optimizer, self._parameters.values())
            restart_state(self._optimizer, self._parameters.values())

    def explain(self, plan: FreezePlan, example: Example | None = None) -> str:
        """How far backward runs under a plan and which parameter makes it so, in a sentence.

        With an example, the model runs once as it is now (apply the plan first), and frozen groups
        that record a graph although nothing before them trains are named as well.
        """
        text = explain_plan(self._groups, plan, fixed=self._never())
        if example is None:
            return text
        recorded = recorded_groups(self._root, self._groups, example)
        wasted = [
            name for name in recorded if self._groups[name].depth < plan.frontier(self._groups)
        ]
        if not wasted:
            return text
        return (
            f"{text}; but an input or activation requires grad, so that {len(wasted)} of the "
            f"frozen groups, from {wasted[0]} on, record a graph and backward runs through them too"
        )

    # -- inside ------------------------------------------------------------------------------

    def _able(self, name: str, p: Tensor) -> bool:
        return name not in self._fixed and can_train(p)

    def _never(self) -> frozenset[str]:
        return frozenset(n for n, p in self._parameters.items() if not self._able(n, p))

    def _homes(self, trained: Mapping[str, Tensor]) -> Homes:
        """For each optimizer group the layer groups that it trains."""
        if self._optimizer is None:
            return []
        group_of = {id(p): self._groups.of_parameter(n).name for n, p in trained.items()}
        return layers_by_group(self._optimizer, group_of)

    def _scales(self, plan: FreezePlan, homes: Homes) -> Scales:
        if self._optimizer is None and plan.lr_scale:
            raise BackendError(
                f"scale the learning rate of {few(sorted(plan.lr_scale))}",
                found="this backend was given no optimizer",
                fix="TorchBackend(model, optimizer)",
            )
        return group_scales(homes, plan)

    def _apply_rates(self, plan: FreezePlan) -> None:
        """The light path of `apply`, for policies that change rates at every step."""
        if self._optimizer is not None and len(self._layers) != len(self._optimizer.param_groups):
            self._layers = self._homes(self._trained)
        scales = self._scales(plan, self._layers)
        if self._guard is not None:
            self._guard.set_scales(scales)
        self._plan = plan
        record_plan(self._root, (self._groups, plan))

    def _check_release(self, plan: FreezePlan) -> None:
        afresh = plan.keep_best or (plan.released and not self._released)
        if afresh and self._optimizer is not None:
            check_restart(self._optimizer)

    def _apply_to_optimizer(self, plan: FreezePlan, scales: Scales) -> None:
        if self._optimizer is None or self._guard is None:
            return
        self._guard.set_scales(scales)
        self._guard.expected = {
            g.name: [self._trained[p.name] for p in g.parameters if p.name in self._trained]
            for g in self._groups
            if g.calls
        }
        dropped = set(plan.released) if self._optimizer_state == "keep" else set(self._groups.names)
        names = {n for n in self._frozen if self._groups.of_parameter(n).name in dropped}
        release_state(self._optimizer, (self._frozen[n] for n in names))
        restart_state(self._optimizer, (p for n, p in self._trained.items() if n in self._released))
        self._released = frozenset(names | (self._released & self._frozen.keys()))

    def _check_parameters(self) -> None:
        now = _resolve(self._root, self._groups)
        if other := [n for n, p in self._parameters.items() if now[n] is not p]:
            raise BackendError(
                "apply a plan",
                found=f"parameters replaced since the groups were found: {few(other)}",
                fix="change the model first, then build the optimizer and the driver",
            )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._root.named_parameters()
        yield from self._root.named_buffers()

    def _report_found(self) -> None:
        if self._root in _APPLIED:
            return
        found = [n for n, p in self._parameters.items() if self._able(n, p) and not p.requires_grad]
        if found:
            _log.warning(
                "%d parameters did not require grad before (%s); from now on the plan decides. "
                "Name those that must never train in TorchBackend(fixed=...)",
                len(found),
                few(found),
            )


def as_found(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that do not require grad now: for `TorchBackend(fixed=...)`.

    Use it where a model's author fixed weights on purpose (sinusoidal positions, the base under
    an adapter), on a model that Frostline has not frozen.

    Example:
        >>> sorted(as_found(nn.Linear(2, 2).requires_grad_(False)))
        ['bias', 'weight']
    """
    return frozenset(n for n, p in unwrapped(model).named_parameters() if not p.requires_grad)


def applied_plan(model: nn.Module) -> tuple[LayerGroups, FreezePlan] | None:
    """The layer groups and the plan applied last to this model, or None.

    Example:
        >>> applied_plan(nn.Linear(2, 2)) is None
        True
    """
    return _APPLIED.get(unwrapped(model))


def record_plan(model: nn.Module, applied: tuple[LayerGroups, FreezePlan] | None) -> None:
    """Set what `applied_plan` answers; None forgets."""
    _APPLIED.pop(unwrapped(model), None)
    if applied is not None:
        _APPLIED[unwrapped(model)] = applied


#: What was applied last to each living model: pure data, so that no model is kept alive.
_APPLIED: WeakKeyDictionary[nn.Module, tuple[LayerGroups, FreezePlan]] = WeakKeyDictionary()


def _resolve(root: nn.Module, groups: LayerGroups) -> dict[str, Tensor]:
    table = TensorTable(root)
    found = {p.name: table[p.name] for g in groups for p in g.parameters}
    ids = {id(p) for p in found.values()}
    if missing := [n for n, p in root.named_parameters() if id(p) not in ids]:
        raise BackendError(
            "freeze by these layer groups",
            found=f"{len(missing)} parameters of the model in no group: {few(missing)}",
            fix="find the groups on this very model: layer_groups(model)",
        )
    if lazy := [n for n, p in found.items() if nn.parameter.is_lazy(p)]:
        raise BackendError(
            "freeze this model",
            found=f"parameters without a shape yet: {few(lazy)}",
            fix="run the model once, then build the optimizer and the driver",
        )
    return found
