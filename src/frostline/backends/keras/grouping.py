"""Divide a Keras model into layer groups, ordered by measured execution.

One forward pass is traced (`tracing`), the model is divided into units (`blocks`), and the units
become groups: a unit with weights starts one, everything else (normalisation, activations,
dropout) joins the group that ran just before it, or the first one. Groups are ordered by their
first run. A shared layer belongs to the group that used it first. What never ran is placed after
its neighbour in definition order, before the head.

The head is what the caller named; else the group that ran last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras

from frostline.backends.keras.blocks import Unit, divide, is_norm
from frostline.backends.keras.names import aliases, can_train, layers, owners, tensors
from frostline.backends.keras.tracing import Trace, trace_model
from frostline.errors import BackendError, ModelError
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo, TensorInfo

__all__ = ["layer_groups"]


def layer_groups(model: keras.Layer, example: Any = None) -> LayerGroups:
    """Divide `model` into layer groups, in the order in which they run.

    The model runs one batch in inference mode, symbolically where it can, and is afterwards
    exactly what it was.

    Args:
        model: a built model: functional, Sequential, subclassed, nested.
        example: the batch to run, as `model(...)` takes it; None makes one up from the shapes that
            the model was built with.

    Raises:
        BackendError: the model is not built.
        ModelError: the model has no weights, or runs on no batch that was tried.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="body"),
        ...                           keras.layers.Dense(2, name="head")])
        >>> groups = layer_groups(model)
        >>> groups.names, sorted(groups.head)
        (('body', 'head'), ['head'])
    """
    _check_built(model)
    trace = trace_model(model, example)
    return _Assembly(model, trace).groups()


def _check_built(model: keras.Layer) -> None:
    unbuilt = [path or model.name for path, layer in layers(model) if not layer.built]
    if unbuilt:
        raise BackendError(
            f"find the layer groups of {model.name}",
            found=f"layers without variables yet (not built): {', '.join(unbuilt[:3])}",
            fix="call model.build(input_shape), or the model once on a batch: model(x)",
        )
    if not can_train(model):
        raise ModelError(
            f"find the layer groups of {model.name}",
            found="no variable that was created trainable",
            fix="pass a model that has weights to train",
        )


@dataclass
class _Draft:
    """A group being put together."""

    units: list[Unit] = field(default_factory=list)

    @property
    def main(self) -> Unit:
        return next((u for u in self.units if u.starts), self.units[0])


class _Assembly:
    def __init__(self, model: keras.Layer, trace: Trace) -> None:
        self._model = model
        self._trace = trace
        self._tensors = tensors(model)
        self._can_train = can_train(model)
        self._owners = owners(model)
        self._aliases = aliases(model)
        self._layers = dict(layers(model))

    def groups(self) -> LayerGroups:
        drafts = self._drafts()
        items = tuple(
            LayerGroup(
                name=draft.main.name,
                depth=depth,
                parameters=tuple(self._infos(draft, trained=True)),
                buffers=tuple(self._infos(draft, trained=False)),
                modules=tuple(
                    ModuleInfo(path, type(self._layers[path]).__name__)
                    for unit in draft.units
                    for path in unit.paths
                ),
                calls=max(self._trace.calls.get(p, 0) for u in draft.units for p in u.paths),
            )
            for depth, draft in enumerate(drafts)
        )
        return LayerGroups(items, head=frozenset({items[-1].name}))

    def _drafts(self) -> list[_Draft]:
        units = divide(self._model)
        ticks = {id(u): self._tick(u) for u in units}
        last = 0
        for unit in units:  # what never ran follows its neighbour in definition order
            if ticks[id(unit)] is None:
                ticks[id(unit)] = last
            last = ticks[id(unit)]
        drafts: list[_Draft] = []
        waiting: list[Unit] = []
        for unit in sorted(units, key=lambda u: ticks[id(u)]):
            if self._starts(unit):
                drafts.append(_Draft([*waiting, unit]))
                waiting = []
            elif drafts:
                drafts[-1].units.append(unit)
            else:
                waiting.append(unit)
        return drafts or [_Draft(waiting)]

    def _starts(self, unit: Unit) -> bool:
        return unit.starts and any(n in self._can_train for n in unit.tensors)

    def _tick(self, unit: Unit) -> Any:
        ran = [self._trace.entered[p] for p in unit.paths if p in self._trace.entered]
        return min(ran, default=None)

    def _infos(self, draft: _Draft, *, trained: bool) -> list[TensorInfo]:
        return [
            self._info(name)
            for unit in draft.units
            for name in unit.tensors
            if (name in self._can_train) == trained
        ]

    def _info(self, name: str) -> TensorInfo:
        variable, owner = self._tensors[name], self._owners[name]
        dtype = keras.backend.standardize_dtype(variable.dtype)
        return TensorInfo(
            name=name,
            shape=tuple(variable.shape),
            dtype=dtype,
            itemsize_bytes=_itemsize_bytes(dtype),
            kind=self._kind(name, variable, owner),
            aliases=self._aliases[name],
        )

    def _kind(self, name: str, variable: Any, owner: keras.Layer) -> str:
        key = name.rpartition("/")[2].partition("~")[0]
        if name not in self._can_train:
            return "norm" if is_norm(owner) and key.startswith("moving_") else "buffer"
        if is_norm(owner):
            return "norm"
        if isinstance(owner, keras.layers.Embedding):
            return "embedding"
        return "bias" if "bias" in key and len(variable.shape) <= 2 else "weight"


_SIZES: Mapping[str, int] = {"bool": 1, "bfloat16": 2}


def _itemsize_bytes(dtype: str) -> int:
    bits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return _SIZES.get(dtype) or max(1, int(bits[-2:] if not dtype.startswith("float8") else 8) // 8)
