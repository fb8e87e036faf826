"""Where a Keras model can be divided: its units, found from nesting; in flat models see `flat`.

1. The model is divided, and so is every model in it. A layer of Keras's own is one unit, whatever
   layers it holds (attention, recurrent layers), except a wrapper around a model.
2. Layers of one class side by side, with several layers in each, repeat: each is one unit, unless
   it holds such a run of blocks itself. Small models side by side, of the same classes of layers,
   repeat, too.
3. A layer of the user's own that does not repeat is divided if something repeats in it.
4. If this leaves fewer than four units with weights, the largest one that is a plain model or does
   not repeat is divided.

Normalisation, activations and loose vectors are no blocks; they join one (see `grouping`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from frostline.backends.keras.flat import Piece, blocks
from frostline.backends.keras.names import SEPARATOR, can_train, layers, outwards, owners, tensors
from frostline.backends.keras.tracing import Trace

__all__ = ["Unit", "divide", "is_norm"]

FEWEST_BLOCKS = 4
SMALL_MODEL_LAYERS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A piece of the model that is not divided further.

    Attributes:
        name: path of the layer, or of what several layers have in common.
        paths: paths of all layers in it, inner layers included.
        tensors: names of the variables in it.
        starts: whether it begins a layer group; otherwise it joins one.
        repeats: whether it is one of several alike, or part of such a one.
        embeds: whether all its weights are embeddings.
    """

    name: str
    paths: tuple[str, ...]
    tensors: tuple[str, ...]
    starts: bool
    repeats: bool = False
    embeds: bool = False


def is_norm(layer: keras.Layer) -> bool:
    """Whether the layer is a normalisation layer: a known one, or one that is called so.

    A layer that is merely called so ("WeightNormDense", a wrapper) holds more than vectors.
    """
    if isinstance(layer, _NORMS):
        return True
    return "norm" in type(layer).__name__.lower() and all(len(v.shape) < 2 for v in layer.variables)


_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)


def divide(model: keras.Layer, trace: Trace) -> list[Unit]:
    """The units of a model, in definition order.

    Args:
        model: a built model.
        trace: one forward pass of it.
    """
    split: frozenset[str] = frozenset()
    while True:
        divider = _Divider(model, trace, split)
        units = list(divider.units(""))
        if sum(u.starts for u in units) >= FEWEST_BLOCKS:
            return units
        largest = max(filter(divider.splittable, units), key=divider.size, default=None)
        if largest is None:
            return units
        split |= {largest.name}


class _Divider:
    def __init__(self, model: keras.Layer, trace: Trace, split: frozenset[str]) -> None:
        self._trace = trace
        self._split = split
        self._layers = dict(layers(model))
        self._tensors = tensors(model)
        self._can_train = can_train(model)
        self._children: dict[str, list[str]] = {path: [] for path in self._layers}
        self._inside: dict[str, list[str]] = {path: [] for path in self._layers}
        for path in self._layers:
            for around in (*outwards(path), ""):
                self._inside[around].append(path)
            if path:
                self._children[path.rpartition(SEPARATOR)[0]].append(path)
        self._owned: dict[int, list[str]] = {}
        for name, owner in owners(model).items():
            self._owned.setdefault(id(owner), []).append(name)
        self._weights = {p: sum(map(self._holds_weight, self._inside[p])) for p in self._layers}

    def units(self, path: str, *, repeats: bool = False) -> Iterator[Unit]:
        """Divide the layer at `path`."""
        if path in self._split or self._divides(path, repeats=repeats):
            yield from self._parts(path, repeats=repeats)
        else:
            yield self._unit(path or self._layers[path].name, [path], repeats=repeats)

    def splittable(self, unit: Unit) -> bool:
        """Whether dividing this unit gives more of them, and is allowed."""
        if unit.name not in self._layers or unit.name in self._split:
            return False
        layer = self._layers[unit.name]
        if isinstance(layer, keras.Model) and _is_of_keras(layer):
            return self._weights[unit.name] > 1
        return self._weights[unit.name] > 1 and not (unit.repeats or _is_of_keras(layer))

    def size(self, unit: Unit) -> int:
        """Elements in it."""
        return sum(self._count(name) for name in unit.tensors)

    def _count(self, name: str) -> int:
        count = 1
        for size in self._tensors[name].shape:
            count *= size
        return count

    # -- which layers to divide --

    def _divides(self, path: str, *, repeats: bool) -> bool:
        layer = self._layers[path]
        if not path:
            return bool(self._children[path])
        if self._weights[path] < 2:
            return False
        if repeats:
            return self._holds_run(path)
        if isinstance(layer, keras.Model):
            return True
        if _is_of_keras(layer):
            return isinstance(layer, keras.layers.Wrapper) and any(
                isinstance(self._layers[p], keras.Model) for p in self._children[path]
            )
        return self._holds_run(path) or any(
            self._divides(child, repeats=False) for child in self._children[path]
        )

    def _alike(self, path: str) -> list[list[str]]:
        """Children with several layers, those that are alike together."""
        found: dict[Any, list[str]] = {}
        for child in self._children[path]:
            if self._weights[child] > 1 and (kind := self._kind(child)) is not None:
                found.setdefault(kind, []).append(child)
        return list(found.values())

    def _kind(self, path: str) -> Any:
        """What makes layers alike: the class; of plain models what they hold."""
        layer = self._layers[path]
        if not _is_of_keras(layer):
            return type(layer)
        if not isinstance(layer, keras.Model):
            return None
        held = [self._layers[p] for p in self._inside[path] if self._holds_weight(p)]
        return frozenset(map(type, held)) if len(held) <= SMALL_MODEL_LAYERS else None

    def _holds_run(self, path: str) -> bool:
        return any(len(same) > 1 for same in self._alike(path)) or any(
            self._holds_run(child) for child in self._children[path]
        )

    def _holds_weight(self, path: str) -> bool:
        """Whether the layer itself holds more than vectors."""
        layer = self._layers[path]
        return not is_norm(layer) and any(
            name in self._can_train and self._is_weight(name, layer)
            for name in self._owned.get(id(layer), ())
        )

    def _is_weight(self, name: str, layer: keras.Layer) -> bool:
        """Tell weights from class tokens and positions, whose first dimension stands for the batch.

        Keras's own layers hold none of these.
        """
        shape = self._tensors[name].shape
        if _is_of_keras(layer) and not isinstance(layer, keras.Model):
            return len(shape) > 1 and not name.rpartition(SEPARATOR)[2].startswith("bias")
        return len(shape) > 1 and shape[0] > 1 and sum(size > 1 for size in shape) > 1

    # -- parts of a divided layer --

    def _parts(self, path: str, *, repeats: bool) -> Iterator[Unit]:
        layer = self._layers[path]
        if own := self._owned.get(id(layer)):
            starts = self._holds_weight(path)
            yield Unit(path or layer.name, (path,), tuple(own), starts, repeats)
        repeated = {p for same in self._alike(path) if len(same) > 1 for p in same}
        block_of = self._flat_blocks(path)
        done: set[str] = set()
        for child in self._children[path]:
            name, members = block_of.get(child, (child, [child]))
            if len(members) == 1:
                yield from self.units(child, repeats=repeats or child in repeated)
            elif name not in done:
                done.add(name)
                yield self._unit(name, members, repeats=True)

    def _flat_blocks(self, path: str) -> dict[str, tuple[str, list[str]]]:
        """For every child that is part of a block: the block's name and its children."""
        pieces = {
            child: self._piece(child)
            for child in self._children[path]
            if self._weights[child] < 2 or _is_of_keras(self._layers[child])
            if not isinstance(self._layers[child], keras.Model)
        }
        place = {id(piece): child for child, piece in pieces.items()}
        found: dict[str, tuple[str, list[str]]] = {}
        for name, block in blocks(list(pieces.values()), self._layers[path]):
            members = sorted((place[id(p)] for p in block), key=list(pieces).index)
            full = f"{path}{SEPARATOR}{name}" if path else name
            found |= dict.fromkeys(members, (full, members))
        return found

    def _piece(self, path: str) -> Piece:
        names = [n for p in self._inside[path] for n in self._owned.get(id(self._layers[p]), ())]
        return Piece(
            self._layers[path],
            self._trace.entered.get(path),
            starts=self._weights[path] > 0,
            trains=any(n in self._can_train for n in names),
        )

    def _unit(self, name: str, members: Sequence[str], *, repeats: bool) -> Unit:
        paths = [p for member in members for p in self._inside[member]]
        names = [n for p in paths for n in self._owned.get(id(self._layers[p]), ())]
        starting = [self._layers[p] for p in paths if self._holds_weight(p)]
        return Unit(
            name,
            tuple(paths),
            tuple(names),
            starts=bool(starting),
            repeats=repeats,
            embeds=bool(starting)
            and all(isinstance(layer, keras.layers.Embedding) for layer in starting),
        )


def _is_of_keras(layer: keras.Layer) -> bool:
    return type(layer).__module__.startswith("keras.")
