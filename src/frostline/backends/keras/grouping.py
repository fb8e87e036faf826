"""Divide a Keras model into layer groups, ordered by measured execution.

One forward pass is traced (`tracing`), the model is divided into units (`blocks`), and the units
become groups: a unit with weights starts one, everything else (normalisation, activations,
dropout) joins the group that ran just before it, or the first one. Groups are ordered by their
first run. A shared layer, and a tied weight, belong to the group that used them first. What never
ran is placed next to its neighbours in definition order, before the head.

The head is, in this order: the layers named by the caller; all that is outside the model's
`backbone`, for models that have one (KerasHub); in a model that is little more than one backbone
used as a layer, all that runs after it; else the group that ran last.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from frostline.backends.grouping import Draft, Placing
from frostline.backends.keras.blocks import Unit, divide, is_norm
from frostline.backends.keras.names import (
    SEPARATOR,
    aliases,
    can_train,
    layers,
    outwards,
    owners,
    tensors,
)
from frostline.backends.keras.tracing import Trace, trace_model
from frostline.errors import BackendError, ModelError, SelectorMatchedNothing, few
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo, TensorInfo

__all__ = ["layer_groups"]

NAMES_SHOWN = 6
#: A nested model with at least this share of all parameters is the backbone.
BACKBONE_SHARE = 0.5
_STATISTICS = ("moving_mean", "moving_variance")


def layer_groups(
    model: keras.Layer, example: Any = None, *, head: str | None = None
) -> LayerGroups:
    """Divide `model` into layer groups, in the order in which they run.

    The model runs one batch in inference mode, symbolically where it can, and is afterwards
    exactly what it was: variables, flags, states of random seeds.

    Args:
        model: a built model: functional, Sequential, subclassed, nested.
        example: the batch to run, as `model(...)` takes it: an array, or a list, tuple or
            dictionary of arrays; None makes one up from the shapes that the model was built with.
        head: glob of the paths of the layers that form the task head.

    Raises:
        BackendError: the model is not built.
        ModelError: the model has no weights, or runs on no batch that was tried.
        SelectorMatchedNothing: the glob matches no layer with parameters.

    Example:
        >>> model = keras.Sequential([keras.Input((8, 8, 3)),
        ...     keras.layers.Conv2D(4, 3, name="conv"), keras.layers.BatchNormalization(name="bn"),
        ...     keras.layers.Flatten(name="flat"), keras.layers.Dense(2, name="out")])
        >>> groups = layer_groups(model)
        >>> groups.names, sorted(groups.head)
        (('conv', 'out'), ['out'])
        >>> [m.name for m in groups["conv"].modules]
        ['conv', 'bn', 'flat']
    """
    _check_built(model)
    wanted_head = _matching(model, head) if head else frozenset()
    trace = trace_model(model, example)
    return _Assembly(model, trace, wanted_head).groups()


def _check_built(model: keras.Layer) -> None:
    unbuilt = [path or model.name for path, layer in layers(model) if not layer.built]
    if unbuilt:
        raise BackendError(
            f"find the layer groups of {model.name}",
            found=f"layers without variables yet (not built): {few(unbuilt)}",
            fix="call model.build(input_shape), or the model once on a batch: model(x)",
        )
    if not can_train(model):
        raise ModelError(
            f"find the layer groups of {model.name}",
            found="no variable that was created trainable",
            fix="pass a model that has weights to train",
        )


class _Assembly:
    def __init__(self, model: keras.Layer, trace: Trace, wanted_head: frozenset[str]) -> None:
        self._model = model
        self._trace = trace
        self._layers = dict(layers(model))
        self._tensors = tensors(model)
        self._can_train = can_train(model)
        self._owners = owners(model)
        self._aliases = aliases(model)
        self._units = divide(model, trace)
        self._head = self._head_parameters(wanted_head)

    def groups(self) -> LayerGroups:
        """The finished groups."""
        placing = Placing(
            self._units, self._tick, lambda unit: bool(self._own(unit)), self._starts,
            self._is_head, embeds=lambda unit: unit.embeds,
        )  # fmt: skip
        drafts = placing.ran()
        if drafts and not any(d.in_head for d in drafts):
            drafts[-1].in_head = True
        placing.place_others(drafts)
        modules = self._modules_of(drafts)
        items = tuple(
            LayerGroup(
                name=draft.main.name,
                depth=depth,
                parameters=tuple(self._infos(draft, trained=True)),
                buffers=tuple(self._infos(draft, trained=False)),
                modules=modules[id(draft)],
                calls=self._calls(draft.main),
            )
            for depth, draft in enumerate(drafts)
        )
        head = frozenset(d.main.name for d in drafts if d.in_head)
        return LayerGroups(items, head=head, notes=tuple(self._notes(items)))

    # -- the head --

    def _head_parameters(self, wanted: frozenset[str]) -> frozenset[str]:
        if wanted:
            return frozenset(n for n in self._can_train if _is_inside(n, wanted))
        backbone = self._backbone()
        if backbone is None:
            return frozenset()
        inside = {n for n in self._can_train if _is_inside(n, {backbone})}
        end = self._last_tick(backbone)
        after = {
            name
            for unit in self._units
            if (tick := self._tick(unit)) is not None and tick > end
            for name in self._own(unit)
        }
        return frozenset(after - inside)

    def _backbone(self) -> str | None:
        """Path of the layer that is the backbone, if one is known to be."""
        known = getattr(self._model, "backbone", None)
        for path, layer in self._layers.items():
            if path and layer is known:
                return path
        whole = sum(self._count(n) for n in self._can_train)
        for path, layer in self._layers.items():
            if path and SEPARATOR not in path and isinstance(layer, keras.Model):
                inside = [n for n in self._can_train if _is_inside(n, {path})]
                if sum(map(self._count, inside)) >= BACKBONE_SHARE * whole and (
                    len({id(self._owners[n]) for n in inside}) > 1
                ):
                    return path
        return None

    def _last_tick(self, path: str) -> int:
        inside = (self._trace.entered.get(p, -1) for p in self._layers if _is_inside(p, {path}))
        return max(inside, default=-1)

    def _count(self, name: str) -> int:
        return int(np.prod(self._tensors[name].shape, dtype=np.int64))

    # -- from units to groups --

    def _own(self, unit: Unit) -> list[str]:
        """The parameters that belong to the unit."""
        return [n for n in unit.tensors if n in self._can_train]

    def _tick(self, unit: Unit) -> int | None:
        """When the unit first ran; None if it never did."""
        ran = (self._trace.entered.get(path) for path in unit.paths)
        return min((tick for tick in ran if tick is not None), default=None)

    def _is_head(self, unit: Unit) -> bool:
        return any(n in self._head for n in self._own(unit))

    def _starts(self, unit: Unit) -> bool:
        # A layer whose weight is tied to one named before it has nothing left to start with.
        return unit.starts and any(len(self._tensors[n].shape) > 1 for n in self._own(unit))

    # -- what is told of a group --

    def _modules_of(self, drafts: list[Draft[Unit]]) -> dict[int, tuple[ModuleInfo, ...]]:
        """For each group the layers that lie wholly inside it; the model itself never does."""
        homes: dict[str, set[int]] = {}
        for draft in drafts:
            for path in (p for unit in draft.units for p in unit.paths):
                for around in outwards(path):
                    homes.setdefault(around, set()).add(id(draft))
        found: dict[int, list[ModuleInfo]] = {id(draft): [] for draft in drafts}
        for path, layer in self._layers.items():
            inside = homes.get(path, set())
            if len(inside) == 1 and not isinstance(layer, keras.layers.InputLayer):
                found[next(iter(inside))].append(ModuleInfo(path, type(layer).__name__))
        return {key: tuple(infos) for key, infos in found.items()}

    def _calls(self, unit: Unit) -> int:
        return max((self._trace.calls.get(path, 0) for path in unit.paths[:1]), default=0) or max(
            self._trace.calls.get(path, 0) for path in unit.paths
        )

    def _infos(self, draft: Draft[Unit], *, trained: bool) -> list[TensorInfo]:
        names = (name for unit in draft.units for name in unit.tensors)
        return [self._info(n) for n in names if (n in self._can_train) == trained]

    def _info(self, name: str) -> TensorInfo:
        variable = self._tensors[name]
        dtype = keras.backend.standardize_dtype(variable.dtype)
        return TensorInfo(
            name=name,
            shape=tuple(variable.shape),
            dtype=dtype,
            itemsize_bytes=_itemsize_bytes(dtype),
            kind=self._kind(name),
            aliases=self._aliases[name],
        )

    def _kind(self, name: str) -> str:
        key = name.rpartition(SEPARATOR)[2].partition("~")[0]
        owner = self._owners[name]
        if name not in self._can_train:
            return "norm" if is_norm(owner) and key in _STATISTICS else "buffer"
        if is_norm(owner):
            return "norm"
        if isinstance(owner, keras.layers.Embedding):
            return "embedding"
        # Attention holds biases by head: (heads, size).
        few_sizes = len(self._tensors[name].shape) <= 2
        named_so = key == "bias" or key.startswith("bias_") or key.endswith("_bias")
        return "bias" if few_sizes and named_so else "weight"

    def _notes(self, groups: Sequence[LayerGroup]) -> Iterator[str]:
        """What the reader should know about this pass."""
        if idle := [g.name for g in groups if not g.calls]:
            yield (
                f"never ran in the traced pass, placed by definition order: {_list(idle)}; "
                "other inputs or training mode may run them"
            )
        if not self._trace.symbolic:
            yield "the model does not run symbolically; a batch was run in earnest to see the order"
        for unit in self._units:
            if (count := self._calls(unit)) > 1 and self._own(unit):
                yield f"{unit.name} ran {count} times; placed at its first run"
        if loose := [n for n in self._can_train if SEPARATOR not in n]:
            yield (
                f"held by the model itself, placed at its beginning: {_list(sorted(loose))}; when "
                "they are used is not seen"
            )
        for group in groups:
            for p in group.parameters:
                if p.aliases:
                    yield f"tied or shared, all in group {group.name!r}: {' = '.join(p.names)}"


def _is_inside(name: str, paths: frozenset[str] | set[str]) -> bool:
    return any(name.startswith(path + SEPARATOR) for path in paths)


def _matching(model: keras.Layer, glob: str) -> frozenset[str]:
    """Paths of layers with parameters that match the glob."""
    trained = can_train(model)
    paths = [p for p, _ in layers(model) if p and any(_is_inside(n, {p}) for n in trained)]
    found = frozenset(p for p in paths if fnmatch.fnmatchcase(p, glob))
    if not found:
        near = difflib.get_close_matches(glob, paths, n=3, cutoff=0.4) or paths[:NAMES_SHOWN]
        raise SelectorMatchedNothing(
            f"find layers that match {glob!r}",
            found=f"none among {len(paths)} layers of {model.name}",
            fix=f"a glob such as {', '.join(map(repr, near))}",
        )
    return found


def _list(names: Sequence[str]) -> str:
    return few(names, most=NAMES_SHOWN)


_ODD_SIZES_BYTES = {"bool": 1, "bfloat16": 2, "int4": 1, "uint4": 1}


def _itemsize_bytes(dtype: str) -> int:
    if dtype.startswith("float8"):
        return 1
    return _ODD_SIZES_BYTES.get(dtype) or np.dtype(dtype).itemsize
