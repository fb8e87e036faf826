"""Training and evaluation mode of frozen modules: held in evaluation whoever calls `train()`.

Every trainer calls `model.train()` at the start of an epoch, which would wake the dropout and the
running statistics of frozen layers. A held module therefore gets its own `train` as an instance
attribute: children follow the call as always, the module itself stays in evaluation mode. Nothing
is paid per step. Live modules (`live_norm`, `live_dropout`) are simply not held, so `model.eval()`
before a validation puts them in evaluation mode like the rest of the model.

The attribute survives `copy.deepcopy` (weight averages are copies), does not appear in
`state_dict`, and a pickled model loads without Frostline, no longer held.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from operator import attrgetter

from torch import nn

from frostline.errors import BackendError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

__all__ = ["OWN_ATTRIBUTES", "HeldModes", "hold_module", "is_held", "release_module"]

#: Where a held module keeps a `train` that somebody else had put on the instance before us.
_OUTER = "_frostline_outer_train"
#: Instance attributes that holding sets.
OWN_ATTRIBUTES = ("train", _OUTER)
_training = attrgetter("training")


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """`nn.Module.train` of a held module: children follow `mode`, the module itself does not.

    Named `train`, because copies and pickles look a bound method up by the name of its function.
    """
    outer = vars(self).get(_OUTER)
    if outer is None:
        type(self).train(self, mode)
    else:
        outer(mode)
    self.training = False
    return self


_HELD = train


def is_held(module: nn.Module) -> bool:
    """Whether the module is held in evaluation mode.

    Example:
        >>> is_held(nn.Linear(2, 2))
        False
    """
    return getattr(vars(module).get("train"), "__func__", None) is _HELD


def hold_module(module: nn.Module) -> None:
    """Put the module in evaluation mode and keep it there."""
    if not is_held(module):
        if "train" in vars(module):
            setattr(module, _OUTER, vars(module)["train"])
        vars(module)["train"] = types.MethodType(_HELD, module)
    module.training = False


def release_module(module: nn.Module, *, training: bool) -> None:
    """Let the module follow `train()` again, from the given mode on."""
    del vars(module)["train"]
    if _OUTER in vars(module):
        vars(module)["train"] = vars(module).pop(_OUTER)
    module.training = training


class HeldModes:
    """The modules of one model that a plan holds in evaluation mode.

    Args:
        root: the model; its own mode is never held, since trainers read it to know the phase.
        groups: its layer groups; `LayerGroup.modules` says which modules a group controls.

    Raises:
        BackendError: a group names a module that the model does not have.
    """

    def __init__(self, root: nn.Module, groups: LayerGroups) -> None:
        self._root = root
        self._by_group = {
            # The name of the root is empty.
            group.name: {m.name: _submodule(root, m.name) for m in group.modules if m.name}
            for group in groups
        }
        self._norms = {
            buffer.name.rpartition(".")[0]
            for group in groups
            for buffer in group.buffers
            if buffer.kind == "norm"
        }
        self._names: list[str] = []
        self._held: list[nn.Module] = []

    def apply(self, plan: FreezePlan) -> None:
        """Hold exactly the modules that the plan wants held, whatever was held before."""
        wanted = dict(self._wanted(plan))
        keep = set(wanted.values())
        for module in self._root.modules():
            if is_held(module) and module not in keep:
                release_module(module, training=self._root.training)
        for module in keep:
            hold_module(module)
        self._names, self._held = list(wanted), list(wanted.values())

    def restore(self) -> list[str]:
        """Put back held modules that somebody set to training mode by assignment; their names."""
        if not any(map(_training, self._held)):
            return []
        moved = [n for n, m in zip(self._names, self._held, strict=True) if m.training]
        for module in self._held:
            module.training = False
        return moved

    def _wanted(self, plan: FreezePlan) -> Iterator[tuple[str, nn.Module]]:
        for group, modules in self._by_group.items():
            if group not in plan.frozen:
                continue
            for name, module in modules.items():
                live = plan.live_norm if name in self._norms else plan.live_dropout
                if group not in live:
                    yield name, module


def _submodule(root: nn.Module, name: str) -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        raise BackendError(
            f"control the mode of the module {name!r}",
            found="no module of that name in this model",
            fix="find the layer groups again after changing the model's modules",
        ) from error
