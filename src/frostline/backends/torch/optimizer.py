"""The optimizer's side of freezing: membership, learning rates per layer group, state.

Freezing never edits which parameters an optimizer has. Every parameter is in it from the start;
what is frozen has no gradient, so that no optimizer touches it. Learning rates per layer group
are applied for the moment of the update only and taken back at once: whatever schedules or
displays the rate never sees the scaled value.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from frostline.backends.torch.digest import TensorTable
from frostline.errors import BackendError, PlanError, few
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

__all__ = ["StepGuard", "check_membership", "fresh_state", "parameter_groups"]

_log = logging.getLogger("frostline")

#: Optimizer groups, each with the factor on its learning rate.
Scales = list[tuple[dict[str, Any], float]]
#: Optimizer groups, each with the names of the layer groups it trains.
Homes = list[tuple[dict[str, Any], frozenset[str]]]


class Sample(Protocol):
    """What a guard calls between gradients and update."""

    def __call__(self, loss: Any, *, overflow: bool) -> None:
        """Sample signals.

        Args:
            loss: what a closure returned, None where there is none.
            overflow: the gradients are not finite and there will be no update.
        """
        ...


def parameter_groups(
    model: nn.Module,
    groups: LayerGroups,
    *,
    lr: float,
    weight_decay: float = 0.0,
    no_decay: Collection[str] = ("norm", "bias"),
    lr_scale: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: one or two per layer group, all parameters in them.

    Args:
        model: the model; parameters are taken whether or not they are frozen now.
        groups: its layer groups.
        lr: learning rate of a group with scale 1, > 0.
        weight_decay: decay of the parameters that decay, >= 0.
        no_decay: kinds of parameters (`TensorInfo.kind`) that never decay.
        lr_scale: lasting factor on the rate by group name (discriminative rates); a plan's own
            `lr_scale` multiplies it.

    Raises:
        PlanError: `lr_scale` names an unknown group.

    Example:
        >>> from frostline.groups import LayerGroup, TensorInfo
        >>> body = LayerGroup("body", 0, (TensorInfo("weight"), TensorInfo("bias", kind="bias")))
        >>> groups = LayerGroups((body,))
        >>> made = parameter_groups(nn.Linear(2, 1), groups, lr=0.1, weight_decay=0.01)
        >>> [(g["frostline_group"], g["weight_decay"]) for g in made]
        [('body', 0.01), ('body', 0.0)]
    """
    scales = dict(lr_scale or {})
    if unknown := sorted(scales.keys() - set(groups.names)):
        raise PlanError(
            f"scale the learning rate of {', '.join(unknown)}",
            found=f"groups named {', '.join(groups.names)}",
            fix="use names from layer_groups(model)",
        )
    table = TensorTable(model)
    made: list[dict[str, Any]] = []
    for group in groups:
        rate = lr * scales.get(group.name, 1.0)
        split: dict[float, list[Tensor]] = {}
        for info in group.parameters:
            decay = 0.0 if info.kind in no_decay else weight_decay
            if can_train(tensor := table[info.name]):
                split.setdefault(decay, []).append(tensor)
        made += [
            {"params": p, "lr": rate, "weight_decay": decay, "frostline_group": group.name}
            for decay, p in sorted(split.items(), reverse=True)
        ]
    return made


def can_train(tensor: Tensor) -> bool:
    """Whether a tensor can have a gradient at all: floating point or complex.

    Example:
        >>> import torch
        >>> can_train(torch.zeros(2, dtype=torch.int8))
        False
    """
    return tensor.is_floating_point() or tensor.is_complex()


def check_membership(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Raise unless the optimizer holds each of these parameters exactly once, by identity.

    Raises:
        BackendError: naming the parameters that it lacks or holds twice.
    """
    count: dict[int, int] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            count[id(p)] = count.get(id(p), 0) + 1
    missing = [name for name, p in parameters.items() if id(p) not in count]
    if missing:
        raise BackendError(
            "drive this optimizer",
            found=f"{len(missing)} of {len(parameters)} parameters are not in it and would never "
            f"train: {few(missing)}",
            fix="build it over all parameters, frozen or not: "
            "torch.optim.AdamW(frostline.parameter_groups(model, groups, lr=...)); parameters "
            "that must never train are named in TorchBackend(fixed=...)",
        )
    twice = [name for name, p in parameters.items() if count[id(p)] > 1]
    if twice:
        raise BackendError(
            "drive this optimizer",
            found=f"parameters that are in it more than once: {few(twice)}",
            fix="give each parameter to one parameter group only",
        )


class StepGuard:
    """Stands around every `optimizer.step()` of one optimizer for one model.

    Before the update it lets the driver sample signals, drops gradients that reached frozen
    parameters (a zero gradient is enough for momentum and weight decay to move a weight), scales
    learning rates by layer group, and at the first update under a plan looks for groups that
    should train and got no gradient. After the update it puts the very same learning-rate objects
    back.

    Attributes:
        parameters: all parameters by name.
        expected: parameters by name of the groups of which one must get a gradient.
        widened: frozen parameters that get gradients in this step, which the update must not see.
        sample: called before each update, when gradients are there (after a closure, with its
            loss).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.parameters: list[tuple[str, Tensor]] = []
        self.expected: Mapping[str, list[Tensor]] = {}
        self.widened: Mapping[str, Tensor] = {}
        self.sample: Sample | None = None
        self._optimizer = weakref.ref(optimizer)
        self._scales: Scales = []
        self._scaled: list[tuple[dict[str, Any], Any, Any]] = []
        self._dropped: list[str] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        optimizer.register_state_dict_pre_hook(self._settle)

    @classmethod
    def of(cls, optimizer: Optimizer, model: nn.Module) -> StepGuard:
        """The one guard of this optimizer for this model, made when there is none."""
        guards = _GUARDS.setdefault(optimizer, WeakKeyDictionary())
        if model not in guards:
            guards[model] = cls(optimizer)
        return guards[model]

    def set_scales(self, scales: Scales) -> None:
        """Scale these optimizer groups around every update from now on, and no others."""
        self._settle()
        self._scales = [(group, scale) for group, scale in scales if scale != 1]

    def take_report(self) -> list[str]:
        """Names of frozen parameters whose gradient was dropped since the last call.

        Also ends the scaling of an update that failed half-way.
        """
        if self._scaled:
            self._settle()
        report, self._dropped = self._dropped, []
        return report

    def rates(self) -> list[Any]:
        """The learning rate of each parameter group, without factors, also during an update."""
        optimizer = self._optimizer()
        scaled = {
            id(group): original for group, original, now in self._scaled if group["lr"] is now
        }
        groups = [] if optimizer is None else optimizer.param_groups
        return [scaled.get(id(group), group["lr"]) for group in groups]

    def narrow(self) -> None:
        """Drop the gradients of widened parameters, and let them have no more."""
        for p in self.widened.values():
            p.requires_grad = False
            p.grad = None
        self.widened = {}

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._settle()
        _, *rest = args  # the first is the optimizer
        closure = kwargs.get("closure", rest[0] if rest else None)
        if closure is not None:
            self._scale()
            sampling = self._sampling(closure)
            if "closure" in kwargs:
                return args, {**kwargs, "closure": sampling}
            return (optimizer, sampling, *rest[1:]), kwargs
        if self.sample is not None:
            self.sample(None, overflow=_found_inf(optimizer))
        self._drop()
        self._scale()
        return None

    def _sampling(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, followed by what must lie between gradients and update."""

        def sampled() -> Any:
            loss = closure()
            if self.sample is not None:
                self.sample(loss, overflow=False)
            self._drop()
            return loss

        return sampled

    def _drop(self) -> None:
        self.narrow()
        for name, p in self.parameters:
            if not p.requires_grad and p.grad is not None:
                p.grad = None
                self._dropped.append(name)
        if self.expected:
            self._look_for_gradients()

    def _scale(self) -> None:
        for group, scale in self._scales:
            original = group["lr"]
            group["lr"] = scaled = original * scale
            self._scaled.append((group, original, scaled))

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._settle()

    def _settle(self, optimizer: Optimizer | None = None) -> None:
        del optimizer
        for group, original, scaled in self._scaled:
            if group["lr"] is scaled:  # whoever set another rate meanwhile knows better
                group["lr"] = original
        self._scaled = []

    def _look_for_gradients(self) -> None:
        silent = [
            name for name, ps in self.expected.items() if ps and all(p.grad is None for p in ps)
        ]
        self.expected = {}
        if silent:
            _log.warning(
                "groups that should train got no gradient in the first update under this plan: "
                "%s. Reentrant gradient checkpointing behind a frozen part does this (use "
                "use_reentrant=False), and so does a part that does not reach the loss",
                few(silent),
            )


def _found_inf(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler told an optimizer that unscales by itself to skip this update."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


#: One guard per optimizer and model. Guards hold tensors and parameter groups, never a key.
_GUARDS: WeakKeyDictionary[Optimizer, WeakKeyDictionary[nn.Module, StepGuard]] = WeakKeyDictionary()


def layers_by_group(optimizer: Optimizer, group_of: Mapping[int, str]) -> Homes:
    """Each optimizer group with the names of the layer groups it trains.

    Args:
        optimizer: the optimizer.
        group_of: name of the layer group by `id` of each parameter that trains.
    """
    return [
        (group, frozenset(group_of[id(p)] for p in group["params"] if id(p) in group_of))
        for group in optimizer.param_groups
    ]


def group_scales(homes: Homes, plan: FreezePlan) -> Scales:
    """The learning-rate factor of each optimizer group under a plan.

    Raises:
        BackendError: an optimizer group mixes layer groups of different factors.
    """
    scales: Scales = []
    for number, (group, names) in enumerate(homes):
        factors = {plan.lr_scale.get(name, 1.0) for name in names}
        if len(factors) > 1:
            raise BackendError(
                f"scale learning rates by layer group ({few(sorted(names))})",
                found=f"optimizer group {number} mixes layer groups of different factors",
                fix="build the optimizer from frostline.parameter_groups(model, groups, lr=...)",
            )
        scales.append((group, factors.pop() if factors else 1.0))
    return scales


def release_state(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Drop what the optimizer remembers of these parameters."""
    for p in parameters:
        optimizer.state.pop(p, None)


def restart_state(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Give parameters without state the state that a new optimizer would give them."""
    home = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        known = p in optimizer.state or id(p) not in home
        if not known and (state := fresh_state(optimizer, p, home[id(p)])):
            optimizer.state[p] = state


def check_restart(optimizer: Optimizer) -> None:
    """Raise unless `restart_state` will work: asked before any state is released.

    Raises:
        BackendError: the optimizer cannot be built again from its defaults.
    """
    group = optimizer.param_groups[0]
    fresh_state(optimizer, group["params"][0], group)


def fresh_state(
    optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]
) -> dict[str, Any]:
    """The state a new optimizer of the same kind has for a parameter before its first update.

    Most make theirs at the first update, so that this is empty; Adagrad makes it when built.

    Raises:
        BackendError: the optimizer cannot be built again from its defaults.
    """
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    try:
        twin = type(optimizer)([{**options, "params": [parameter]}], **defaults)  # type: ignore[call-arg]
    except (TypeError, ValueError, AssertionError) as error:
        raise BackendError(
            f"restart the state of a {type(optimizer).__name__}",
            found=f"it cannot be built from its own defaults: {error}",
            fix="use optimizer_state='keep' and a policy that never starts the optimizer afresh "
            "(restore_best=false)",
        ) from error
    return dict(twin.state.get(parameter, {}))
