"""Layer groups: the ordered, disjoint, complete division of a model that everything else uses.

Pure data. A backend finds the groups; the core never sees a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from frostline.errors import BackendError

__all__ = ["GroupCost", "LayerGroup", "LayerGroups", "ModuleInfo", "TensorInfo", "enclosing"]

#: Between the parts of a name: PyTorch writes "layer1.0.weight", Keras "block1/conv/kernel".
_SEPARATOR = re.compile(r"[./]")


def enclosing(name: str) -> Iterator[str]:
    """The modules around a tensor or module, from the inside out.

    Example:
        >>> list(enclosing("layer1.0.weight")), list(enclosing("block1/conv/kernel"))
        (['layer1.0', 'layer1'], ['block1/conv', 'block1'])
    """
    ends = [match.start() for match in _SEPARATOR.finditer(name)]
    return (name[:end] for end in reversed(ends))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One parameter or buffer.

    Attributes:
        name: name in the model's state, e.g. "layer1.0.conv1.weight" or "block1/conv1/kernel".
        shape: sizes of the dimensions; () for a scalar.
        dtype: framework-neutral name, e.g. "float32".
        itemsize_bytes: bytes per element.
        kind: for parameters "weight", "bias", "norm" (scale or shift of a normalisation layer)
            or "embedding"; for buffers "norm" (running statistics), "seed" (state of
            random numbers) or "buffer".
        aliases: further names of the very same tensor (tied weights).
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    itemsize_bytes: int = 4
    kind: str = "weight"
    aliases: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return self.count * self.itemsize_bytes

    @property
    def own_name(self) -> str:
        """The last part of the name, e.g. "weight"."""
        return _SEPARATOR.split(self.name)[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """The name and every alias."""
        return (self.name, *self.aliases)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module inside a group: its name and the name of its class."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class GroupCost:
    """What one group costs in one training step, measured.

    Attributes:
        forward_s: seconds in the forward pass.
        input_grad_s: seconds to carry the gradient through the group to its input.
        weight_grad_s: seconds for the gradients of the group's own parameters.
        optimizer_s: seconds to update the group's parameters.
        activation_bytes: bytes kept from forward for backward when the whole group trains.
        frozen_forward_s: seconds in the forward pass while the group is frozen (nothing recorded,
            normalisation and dropout in evaluation mode); None where it was not measured.
    """

    forward_s: float = 0.0
    input_grad_s: float = 0.0
    weight_grad_s: float = 0.0
    optimizer_s: float = 0.0
    activation_bytes: int = 0
    frozen_forward_s: float | None = None

    @property
    def backward_s(self) -> float:
        """Seconds of the whole backward pass of the group."""
        return self.input_grad_s + self.weight_grad_s


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The smallest unit that is frozen together.

    Attributes:
        name: name of the block, unique in its model.
        depth: position in measured execution order; 0 is nearest the input.
        parameters: the parameters of the group; each parameter of a model is in exactly one group.
        buffers: the buffers of the group.
        modules: the modules whose mode (training or evaluation) the group controls.
        calls: how often the group's modules ran in the traced forward pass (0: never).
        cost: measured cost, or None until measured.
    """

    name: str
    depth: int
    parameters: tuple[TensorInfo, ...]
    buffers: tuple[TensorInfo, ...] = ()
    modules: tuple[ModuleInfo, ...] = ()
    calls: int = 1
    cost: GroupCost | None = None

    @property
    def parameter_names(self) -> frozenset[str]:
        """Names of the parameters (first names only; aliases are in `TensorInfo.aliases`)."""
        return frozenset(p.name for p in self.parameters)

    @property
    def parameter_count(self) -> int:
        """Elements in all parameters."""
        return sum(p.count for p in self.parameters)

    @property
    def size_bytes(self) -> int:
        """Bytes in parameters and buffers."""
        return sum(t.size_bytes for t in (*self.parameters, *self.buffers))


@dataclass(frozen=True, slots=True, eq=True)
class LayerGroups(Sequence[LayerGroup]):
    """All groups of a model, in execution order.

    Attributes:
        items: the groups; `items[i].depth == i`.
        head: names of the groups that form the task head (at least one).
        notes: what the reader should know: modules that ran twice, never or conditionally,
            tied weights, groups whose place in the order is not certain.

    Raises:
        BackendError: depths out of order, a name or parameter twice, or an unknown head.

    Example:
        >>> body = LayerGroup("body", 0, (TensorInfo("body.weight", (2, 2)),))
        >>> head = LayerGroup("head", 1, (TensorInfo("head.weight", (1, 2)),))
        >>> groups = LayerGroups((body, head), head=frozenset({"head"}))
        >>> groups.names
        ('body', 'head')
        >>> groups["head"].depth
        1
    """

    items: tuple[LayerGroup, ...]
    head: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    _by_name: Mapping[str, LayerGroup] = field(init=False, repr=False, compare=False)
    _of_parameter: Mapping[str, LayerGroup] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name: dict[str, LayerGroup] = {}
        of_parameter: dict[str, LayerGroup] = {}
        for depth, group in enumerate(self.items):
            if group.depth != depth:
                raise _broken(f"group {group.name!r} has depth {group.depth} at place {depth}")
            if group.name in by_name:
                raise _broken(f"two groups are named {group.name!r}")
            by_name[group.name] = group
            for parameter in group.parameters:
                for name in parameter.names:
                    if name in of_parameter:
                        other = of_parameter[name].name
                        raise _broken(f"parameter {name!r} is in {other!r} and {group.name!r}")
                    of_parameter[name] = group
        if unknown := self.head - by_name.keys():
            raise _broken(f"head names unknown groups {sorted(unknown)}")
        if self.items and not self.head:
            object.__setattr__(self, "head", frozenset({self.items[-1].name}))
        object.__setattr__(self, "_by_name", by_name)
        object.__setattr__(self, "_of_parameter", of_parameter)

    @overload
    def __getitem__(self, key: int | str) -> LayerGroup: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[LayerGroup, ...]: ...
    def __getitem__(self, key: int | str | slice) -> LayerGroup | tuple[LayerGroup, ...]:
        return self._by_name[key] if isinstance(key, str) else self.items[key]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[LayerGroup]:
        return iter(self.items)

    def __contains__(self, key: object) -> bool:
        return key in self._by_name if isinstance(key, str) else key in self.items

    @property
    def names(self) -> tuple[str, ...]:
        """Group names in execution order."""
        return tuple(g.name for g in self.items)

    @property
    def backbone(self) -> frozenset[str]:
        """Names of all groups that are not the head."""
        return frozenset(self._by_name) - self.head

    @property
    def parameter_count(self) -> int:
        """Elements in all parameters of the model."""
        return sum(g.parameter_count for g in self.items)

    @property
    def measured(self) -> bool:
        """Whether every group has a measured cost."""
        return bool(self.items) and all(g.cost is not None for g in self.items)

    def of_parameter(self, name: str) -> LayerGroup:
        """The group that holds the parameter of this name (or alias).

        Raises:
            KeyError: no parameter has this name.
        """
        return self._of_parameter[name]

    def with_costs(self, costs: Mapping[str, GroupCost]) -> LayerGroups:
        """The same groups with measured costs attached, by group name."""
        items = tuple(replace(g, cost=costs.get(g.name, g.cost)) for g in self.items)
        return replace(self, items=items)


def _broken(found: str) -> BackendError:
    return BackendError(
        "build layer groups",
        found=found,
        fix="groups are ordered by depth, disjoint and uniquely named; report the backend",
    )
