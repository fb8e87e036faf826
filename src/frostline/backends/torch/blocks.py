"""Where a model can be divided: its blocks, found from structure and from what ran.

The rules, in the order they apply:

1. A module that the caller named is one block.
2. The root is divided, and so is every container (`Sequential`, `ModuleList`, `ModuleDict`) of
   several layers that is not part of a repeated block: `features` of a VGG becomes its layers.
3. A module that holds a *run of blocks* - several modules of one class, each with several layers,
   each fed by the one before - is divided at any depth: stages, encoders, whole backbones.
4. Modules of one class side by side repeat; inside such a repeated module only rule 3 divides.
   So a residual block or a transformer layer stays whole, whatever lists it holds.
5. A module that is called again on its own output is never divided: its parts have no order.
6. Everything else is one block. Normalisation, activations and loose vectors are no blocks; they
   join one (see `grouping`).
7. If this leaves fewer than four blocks, the largest one that does not repeat is divided.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from frostline.backends.torch.tracing import Trace

__all__ = ["Unit", "divide", "is_norm", "type_name"]

FEWEST_BLOCKS = 4
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A piece of the model that is not divided further.

    Attributes:
        name: dotted name of the module, or of a tensor held directly by a divided module.
        module: the module; None for a tensor.
        tensor: the tensor; None for a module.
        starts: whether it begins a layer group; otherwise it joins one.
        repeats: whether it is one of several of its class, or part of such a one.
    """

    name: str
    module: nn.Module | None
    tensor: Tensor | None
    starts: bool
    repeats: bool = False


def divide(
    model: nn.Module,
    trace: Trace,
    *,
    whole: frozenset[str] = frozenset(),
    apart: frozenset[str] = frozenset(),
) -> list[Unit]:
    """The units of a model, in definition order.

    Args:
        model: any module.
        trace: one forward pass of it.
        whole: names of modules or parameters that must be units of their own.
        apart: names of those that must not share a unit with anything outside them.
    """
    split: frozenset[str] = frozenset()
    while True:
        divider = _Divider(model, trace, whole, apart, split)
        units = list(divider.units(model))
        if sum(u.starts for u in units) >= FEWEST_BLOCKS:
            return units
        largest = max(
            (u for u in units if divider.splittable(u)),
            key=lambda u: _size(u.module),
            default=None,
        )
        if largest is None:
            return units
        split |= {largest.name}


def type_name(module: nn.Module) -> str:
    """Name of the module's class; of the original class where it is parametrised or scripted."""
    original = getattr(module, "original_name", None)
    if isinstance(original, str):
        return original
    return parametrize.type_before_parametrizations(module).__name__


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation layer: a known one, or one that is called so.

    A layer that is merely called so ("WeightNormLinear") holds more than vectors.
    """
    if isinstance(module, _NORMS):
        return True
    own = module.parameters(recurse=False)
    return "norm" in type_name(module).lower() and all(
        sum(size > 1 for size in p.shape) < 2 for p in own
    )


_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class _Divider:
    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        whole: frozenset[str],
        apart: frozenset[str],
        split: frozenset[str],
    ) -> None:
        self._root = model
        self._trace = trace
        self._whole = whole
        self._apart = apart
        self._split = split
        self._names = {id(m): name for name, m in model.named_modules()}
        self._weights = _layers_below(model)
        self._runs: dict[int, bool] = {}
        self._seen: set[int] = set()

    def units(self, module: nn.Module, *, repeats: bool = False) -> Iterator[Unit]:
        """Divide one module."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        name = self._names[id(module)]
        if name not in self._whole and (
            self._must_divide(module) or self._divides(module, repeats=repeats)
        ):
            yield from self._parts(module, name, repeats=repeats)
        else:
            starts = name in self._whole or self._weights[id(module)] > 0
            yield Unit(name, module, None, starts, repeats)

    def splittable(self, unit: Unit) -> bool:
        """Whether dividing this unit gives more blocks, and is allowed."""
        return (
            unit.module is not None
            and not unit.repeats
            and unit.name not in self._whole | self._trace.looped
            and not _is_layer(unit.module)
            and self._weights[id(unit.module)] > 1
        )

    def _parts(self, module: nn.Module, name: str, *, repeats: bool) -> Iterator[Unit]:
        prefix = f"{name}." if name else ""
        for key, parameter in module.named_parameters(recurse=False):
            starts = prefix + key in self._whole or _is_matrix(parameter)
            yield Unit(prefix + key, None, parameter, starts, repeats)
        for key, buffer in module.named_buffers(recurse=False):
            yield Unit(prefix + key, None, buffer, starts=False)
        peers = self._peers(module)
        for child in module.children():
            same = peers.get(type_name(child), [])
            repeated = len(same) > 1 and not isinstance(child, _CONTAINERS)
            if repeated and any(self._holds_run(peer) for peer in same):
                # All stages are divided alike, also one with a single block.
                self._runs[id(child)] = True
            yield from self.units(child, repeats=repeats or repeated)

    def _must_divide(self, module: nn.Module) -> bool:
        name = self._names[id(module)]
        prefix = f"{name}." if name else ""
        inner = (self._whole | self._apart) - {name}
        return name in self._split or any(other.startswith(prefix) for other in inner)

    def _divides(self, module: nn.Module, *, repeats: bool) -> bool:
        if self._names[id(module)] in self._trace.looped:
            return False
        if module is self._root:
            return not _is_layer(module) or self._holds_run(module)
        if _is_plain(module) and self._is_single_block(module):
            return True
        if repeats or _is_layer(module):
            return self._holds_run(module)
        if isinstance(module, _CONTAINERS):
            return self._weights[id(module)] > 1
        return (
            self._holds_run(module)
            or self._is_mostly_list(module)
            or any(len(same) > 1 for same in self._blocks(module).values())
            or any(
                self._divides(child, repeats=False)
                for child in module.children()
                if not isinstance(child, _CONTAINERS)
            )
        )

    def _peers(self, module: nn.Module) -> dict[str, list[nn.Module]]:
        """Children with layers, by class."""
        found: dict[str, list[nn.Module]] = {}
        for child in module.children():
            if self._weights[id(child)]:
                found.setdefault(type_name(child), []).append(child)
        return found

    def _blocks(self, module: nn.Module) -> dict[str, list[nn.Module]]:
        """Children with several layers that are no plain containers, by class."""
        return {
            kind: same
            for kind, peers in self._peers(module).items()
            if (same := [p for p in peers if self._weights[id(p)] > 1 and not _is_plain(p)])
        }

    def _is_single_block(self, module: nn.Module) -> bool:
        """Whether a container holds one block and nothing else with weights."""
        same = list(self._blocks(module).values())
        return (
            len(same) == 1
            and len(same[0]) == 1
            and self._weights[id(same[0][0])] == self._weights[id(module)]
        )

    def _holds_run(self, module: nn.Module) -> bool:
        if id(module) not in self._runs:
            self._runs[id(module)] = (
                isinstance(module, _CONTAINERS)
                and any(self._is_chain(same) for same in self._blocks(module).values())
            ) or any(self._holds_run(child) for child in module.children())
        return self._runs[id(module)]

    def _is_chain(self, modules: list[nn.Module]) -> bool:
        """Whether one is fed by the one before; taken for granted where neither was seen."""
        names = [self._names[id(m)] for m in modules]
        upstream = self._trace.upstream
        return any(
            later not in upstream or earlier in upstream[later]
            for earlier, later in itertools.pairwise(names)
        )

    def _is_mostly_list(self, module: nn.Module) -> bool:
        """Whether at least half of the layers are alike and stand in lists directly below."""
        counts: Counter[str] = Counter()
        for child in module.children():
            if isinstance(child, _CONTAINERS):
                counts.update({k: len(v) for k, v in self._peers(child).items()})
        alike = max(counts.values(), default=0)
        return alike > 1 and 2 * alike >= self._weights[id(module)]


def _size(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def _is_layer(module: nn.Module) -> bool:
    """Whether PyTorch itself defines the class, containers excepted: such a layer is one block."""
    if isinstance(module, _CONTAINERS) or type(module) is nn.Module:
        return False
    return any(
        kind.__module__.startswith("torch.nn.") for kind in type(module).__mro__[:-1]
        if kind is not nn.Module
    )  # fmt: skip


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _CONTAINERS


def _layers_below(model: nn.Module) -> dict[int, int]:
    """For every module, how many modules in it hold weights of their own."""
    own = {id(m): _holds_weight(m) for m in model.modules()}
    return {id(m): sum(own[id(part)] for part in m.modules()) for m in model.modules()}


def _holds_weight(module: nn.Module) -> bool:
    if is_norm(module):
        return False
    known = _is_layer(module)
    return any(
        parameter.ndim > 1 and (known or _is_matrix(parameter))
        for parameter in module.parameters(recurse=False)
    )


def _is_matrix(parameter: Tensor) -> bool:
    """Tell weights from class tokens and positions, whose first dimension stands for the batch."""
    return parameter.ndim > 1 and parameter.shape[0] > 1 and sum(s > 1 for s in parameter.shape) > 1
