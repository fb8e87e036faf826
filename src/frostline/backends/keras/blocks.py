"""Where a model can be divided: its units, found from nesting, from names and from the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import keras

from frostline.backends.keras.names import SEPARATOR, layers, owners, tensors

__all__ = ["Unit", "divide", "is_norm"]

_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
    keras.layers.SpectralNormalization,
)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A piece of the model that is not divided further.

    Attributes:
        name: path of the layer, or common part of the paths of several.
        paths: paths of all layers in it, the ones inside layers included.
        tensors: names of the variables in it.
        starts: whether it begins a layer group; otherwise it joins one.
    """

    name: str
    paths: tuple[str, ...]
    tensors: tuple[str, ...]
    starts: bool


def is_norm(layer: keras.Layer) -> bool:
    """Whether the layer is a normalisation layer: a known one, or one that is called so."""
    if isinstance(layer, keras.layers.SpectralNormalization):
        return False  # it holds the kernel of another layer
    known = isinstance(layer, _NORMS)
    return known or (
        "norm" in type(layer).__name__.lower() and all(len(v.shape) < 2 for v in layer.variables)
    )


def divide(model: keras.Layer) -> list[Unit]:
    """The units of a model, in definition order."""
    return list(_Divider(model).units("", model))


class _Divider:
    def __init__(self, model: keras.Layer) -> None:
        self._paths = dict(layers(model))
        self._tensors = tensors(model)
        self._owners = owners(model)

    def units(self, path: str, layer: keras.Layer) -> Iterator[Unit]:
        """Divide one layer."""
        children = self._children(path)
        if children and (path == "" or self._divides(layer)):
            own = tuple(n for n, o in self._owners.items() if o is layer)
            if own:
                yield Unit(path or layer.name, (path,), own, starts=False)
            for child in children:
                yield from self.units(child, self._paths[child])
        else:
            yield self._whole(path, layer)

    def _divides(self, layer: keras.Layer) -> bool:
        return isinstance(layer, keras.Model)

    def _children(self, path: str) -> list[str]:
        depth = path.count(SEPARATOR) + 1 if path else 0
        prefix = path + SEPARATOR if path else ""
        return [p for p in self._paths if p and p.startswith(prefix) and p.count("/") == depth]

    def _whole(self, path: str, layer: keras.Layer) -> Unit:
        prefix = path + SEPARATOR if path else ""
        inside = tuple(p for p in self._paths if p == path or p.startswith(prefix))
        held = {id(self._paths[p]) for p in inside}
        own = tuple(n for n, o in self._owners.items() if id(o) in held)
        starts = any(len(self._tensors[n].shape) > 1 and not is_norm(self._owners[n]) for n in own)
        return Unit(path or layer.name, inside, own, starts)
