"""Freezing in one line, for people with a training loop of their own.

`freeze` and `unfreeze` change what is frozen now, `frozen` freezes for the length of a `with`
block and puts everything back, `torch_driver` builds a `Driver` that runs a policy.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from frostline.backends.torch.backend import (
    OptimizerState,
    TorchBackend,
    applied_plan,
    as_found,
    record_plan,
)
from frostline.backends.torch.digest import unwrapped
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.modes import OWN_ATTRIBUTES
from frostline.backends.torch.optimizer import Sample
from frostline.driver import Driver
from frostline.errors import ConfigError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Policy
from frostline.registry import make_policy
from frostline.select import Selector, select

if TYPE_CHECKING:
    from frostline.backends.torch.example import Example

__all__ = ["freeze", "frozen", "torch_driver", "unfreeze"]


def freeze(
    model: nn.Module,
    selector: str | Selector,
    *,
    example: Example | None = None,
    groups: LayerGroups | None = None,
    live_norm: bool = False,
    live_dropout: bool = False,
) -> FreezePlan:
    """Freeze what the selector matches, besides what is frozen already, by hand or by this.

    Args:
        model: any module.
        selector: what to freeze, e.g. "backbone" or "first 60%"; see `frostline.select`.
        example: a batch to run the model on, to find its layer groups; made up if not given.
        groups: the layer groups, if you have them.
        live_norm: let normalisation statistics of the frozen groups follow the data.
        live_dropout: leave dropout of the frozen groups active.

    Returns:
        The plan now in force.

    Raises:
        SelectorError: the selector is unreadable or matches nothing.
        PlanError: nothing would be left to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> plan = freeze(model, "depth==0")
        >>> [p.requires_grad for p in model.parameters()]
        [False, False, True, True]
        >>> plan = unfreeze(model)
        >>> all(p.requires_grad for p in model.parameters())
        True
    """
    groups = _groups(model, groups, example)
    wanted = FreezePlan.freezing(
        groups,
        selector,
        live_norm=live_norm,
        live_dropout=live_dropout,
        reason=f"freeze {selector}",
    )
    before = _plan(model, groups)
    by_hand = as_found(model) - before.frozen_parameters(groups)
    plan = before | wanted
    TorchBackend(model, groups=groups, fixed=by_hand).apply(plan)
    return plan


def unfreeze(model: nn.Module, selector: str | Selector = "all") -> FreezePlan:
    """Make what the selector matches trainable again; by default everything.

    Learning goes on at the next update of any optimizer that holds the parameters. Rate factors
    and switches of what stays frozen stay as they are.

    Returns:
        The plan now in force.

    Raises:
        SelectorError: the selector is unreadable or matches nothing.
    """
    groups = _groups(model, None, None)
    plan = _plan(model, groups)
    chosen = select(selector).parameters(groups)
    by_hand = as_found(model) - plan.frozen_parameters(groups) - chosen
    rest = plan.frozen_parameters(groups) - chosen
    plan = _freezing(groups, rest, plan).because(f"unfreeze {selector}")
    TorchBackend(model, groups=groups, fixed=by_hand).apply(plan)
    return plan


@contextmanager
def frozen(
    model: nn.Module,
    selector: str | Selector,
    *,
    example: Example | None = None,
    groups: LayerGroups | None = None,
    live_norm: bool = False,
    live_dropout: bool = False,
) -> Iterator[FreezePlan]:
    """Freeze for the length of a `with` block; see `freeze` for the arguments.

    Afterwards, whatever happened inside, every `requires_grad` flag, every module's mode and the
    gradients of what the block froze are as they were before. Weights that trained inside stay
    trained.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> with frozen(model, "depth==0"):
        ...     model[0].weight.requires_grad
        False
        >>> model[0].weight.requires_grad
        True
    """
    before = _Snapshot.take(model)
    held: frozenset[int] | None = None
    try:
        plan = freeze(
            model,
            selector,
            example=example,
            groups=groups,
            live_norm=live_norm,
            live_dropout=live_dropout,
        )
        held = frozenset(id(p) for p in model.parameters() if not p.requires_grad)
        yield plan
    finally:
        before.restore(held)


def torch_driver(
    model: nn.Module,
    optimizer: Optimizer,
    policy: str | Policy,
    *,
    total_steps: int | None = None,
    total_epochs: int | None = None,
    steps_per_epoch: int | None = None,
    example: Example | None = None,
    groups: LayerGroups | None = None,
    optimizer_state: OptimizerState = "keep",
    fixed: Collection[str] = (),
) -> Driver:
    """A driver that runs a policy over your own training loop.

    Signals that the policy reads are sampled by themselves just before each `optimizer.step()`
    inside a step of the driver, or inside its closure. Call `driver.sample()` where they must be
    sampled earlier (before gradients are clipped), and `driver.sample(loss=...)` for policies
    that read the training loss.

    Args:
        model: the model.
        optimizer: its optimizer, holding every parameter; see `frostline.parameter_groups`.
        policy: a policy, or its short form, e.g. "gradual:every=1ep".
        total_steps: optimizer updates of the whole run, if known.
        total_epochs: instead of `total_steps`: epochs of the whole run; needs `steps_per_epoch`.
        steps_per_epoch: optimizer updates per epoch, if known.
        example: a batch to run the model on, to find its layer groups; made up if not given.
        groups: the layer groups, if you have them (policies by cost need measured ones).
        optimizer_state: "keep" or "release" what the optimizer remembers of frozen parameters.
        fixed: names of parameters that never train, whatever the policy; see `as_found`.

    Raises:
        PolicyError: unknown policy or option.
        ConfigError: totals that contradict each other.
        BackendError: the optimizer lacks parameters of the model.
    """
    backend = TorchBackend(
        model,
        optimizer,
        groups=_groups(model, groups, example),
        optimizer_state=optimizer_state,
        fixed=fixed,
    )
    driver = Driver(
        make_policy(policy),
        backend,
        total_steps=_total_steps(total_steps, total_epochs, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
    )
    driver.automatic = bool(driver.policy.needs())
    backend.sample_by(_sampler(driver) if driver.automatic else None)
    return driver


def _sampler(driver: Driver) -> Sample:
    """Samples what the driver has due; keeps it no longer alive than others do."""
    known = weakref.ref(driver)

    def sample(loss: Any, *, overflow: bool) -> None:
        driver = known()
        if driver is not None:
            driver.sample(loss, overflow=overflow)

    return sample


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Everything that freezing changes of a model, to be put back exactly."""

    model: nn.Module
    parameters: list[tuple[Tensor, bool, Tensor | None]]
    modules: list[tuple[nn.Module, bool, dict[str, Any]]]
    applied: tuple[LayerGroups, FreezePlan] | None

    @classmethod
    def take(cls, model: nn.Module) -> _Snapshot:
        return cls(
            model,
            [(p, p.requires_grad, p.grad) for p in model.parameters()],
            [
                (m, m.training, {k: vars(m)[k] for k in OWN_ATTRIBUTES if k in vars(m)})
                for m in model.modules()
            ],
            applied_plan(model),
        )

    def restore(self, held: frozenset[int] | None) -> None:
        """Put everything back; gradients only of the held parameters (None: of all)."""
        for p, requires_grad, grad in self.parameters:
            if held is None or id(p) in held:
                p.grad = grad
            p.requires_grad = requires_grad
        for module, training, own in self.modules:
            for key in OWN_ATTRIBUTES:
                vars(module).pop(key, None)
            vars(module).update(own)
            module.training = training
        record_plan(self.model, self.applied)


def _groups(model: nn.Module, groups: LayerGroups | None, example: Example | None) -> LayerGroups:
    """The groups given, else those of the plan in force, else found by running the model."""
    if groups is not None:
        return groups
    root = unwrapped(model)
    known = applied_plan(root)
    if known is not None and _fits(root, known[0]):
        return known[0]
    return layer_groups(root, example)


def _fits(root: nn.Module, groups: LayerGroups) -> bool:
    return {n: tuple(p.shape) for n, p in root.named_parameters()} == {
        p.name: p.shape for g in groups for p in g.parameters
    }


def _plan(model: nn.Module, groups: LayerGroups) -> FreezePlan:
    """The plan in force, in terms of these groups."""
    known = applied_plan(model)
    if known is None:
        return FreezePlan()
    if known[0].names == groups.names:
        return known[1]
    present = {p.name for g in groups for p in g.parameters}
    return _freezing(groups, known[1].frozen_parameters(known[0]) & present, FreezePlan())


def _freezing(groups: LayerGroups, parameters: frozenset[str], like: FreezePlan) -> FreezePlan:
    """A plan that freezes exactly these parameters, with the rates and switches of another."""
    names = frozenset(g.name for g in groups if g.parameter_names & parameters)
    exempt = {g.name: g.parameter_names - parameters for g in groups if g.name in names}
    return replace(like, frozen=names, exempt=exempt)


def _total_steps(steps: int | None, epochs: int | None, per_epoch: int | None) -> int | None:
    if epochs is None:
        return steps
    if per_epoch is None or steps not in (None, epochs * per_epoch):
        raise ConfigError(
            f"count a run of {epochs} epochs",
            found=f"steps_per_epoch={per_epoch}, total_steps={steps}",
            fix="give total_epochs with steps_per_epoch, or total_steps alone",
        )
    return epochs * per_epoch
