"""Names of layers and variables: the route of layer names from the model, joined by "/".

Keras gives every layer a name, but the path that it notes in a variable is the one of the first
build: a backbone used in two models, or a layer made by hand, has paths that say nothing of this
model. Here a variable is named by where it stands in the model at hand: "resnet50/conv1_conv/
kernel". The model's own name is left out. A second layer of the same name beside the first is
"dense~2". What is reachable by several routes (a shared layer, tied weights) has one name, that of
the first route, and the others are aliases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import keras

__all__ = ["SEPARATOR", "aliases", "can_train", "layers", "outwards", "owners", "tensors"]

SEPARATOR = "/"


def layers(model: keras.Layer) -> list[tuple[str, keras.Layer]]:
    """Every layer of the model once, with its path, in the order in which they were added.

    The first one is the model itself, under the empty path. A layer comes before the layers in it.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
        >>> [path for path, layer in layers(model) if layer.variables]
        ['', 'out']
    """
    seen: set[int] = set()
    return [
        (path, layer)
        for path, layer in _routes(model)
        if id(layer) not in seen and not seen.add(id(layer))
    ]


def tensors(model: keras.Layer) -> dict[str, keras.Variable]:
    """Every variable of the model once, by name: weights, statistics, states of random seeds.

    Variables of metrics and of the optimizer are not the model's.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
        >>> list(tensors(model))
        ['out/kernel', 'out/bias']
    """
    seen: set[int] = set()
    return {
        entry.name: entry.variable
        for entry in _entries(model)
        if id(entry.variable) not in seen and not seen.add(id(entry.variable))
    }


def aliases(model: keras.Layer) -> dict[str, tuple[str, ...]]:
    """For every name in `tensors` the further names of the same variable; mostly ().

    Example:
        >>> x = keras.Input((2,))
        >>> aliases(keras.Model(x, keras.layers.Dense(1, name="out")(x)))["out/kernel"]
        ()
    """
    names: dict[int, list[str]] = {}
    for entry in _entries(model):
        names.setdefault(id(entry.variable), []).append(entry.name)
    return {first: tuple(others) for first, *others in names.values()}


def can_train(model: keras.Layer) -> frozenset[str]:
    """Names of the variables that were created trainable, frozen by hand since or not.

    `Variable.trainable` cannot tell: it is False both for a moving mean and for a frozen kernel.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(name="n")])
        >>> model.trainable = False
        >>> sorted(can_train(model))
        ['n/beta', 'n/gamma']
    """
    created = {id(entry.variable) for entry in _entries(model) if entry.created_trainable}
    return frozenset(name for name, v in tensors(model).items() if id(v) in created)


def owners(model: keras.Layer) -> Mapping[str, keras.Layer]:
    """For every name in `tensors` the layer that holds the variable itself.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
        >>> owners(model)["out/bias"].name
        'out'
    """
    found: dict[int, keras.Layer] = {}
    for entry in _entries(model):
        found.setdefault(id(entry.variable), entry.layer)
    return {name: found[id(v)] for name, v in tensors(model).items()}


def outwards(path: str) -> Iterator[str]:
    """The path itself, then the layers around it, from the inside out; the model is left out.

    Example:
        >>> list(outwards("bert/layer_0/query"))
        ['bert/layer_0/query', 'bert/layer_0', 'bert']
    """
    while path:
        yield path
        path = path.rpartition(SEPARATOR)[0]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One variable under one of its names."""

    name: str
    variable: keras.Variable
    layer: keras.Layer
    created_trainable: bool


@dataclass(frozen=True, slots=True)
class _Inside:
    """What a layer itself holds, in the order of creation."""

    trainable: tuple[keras.Variable, ...]
    others: tuple[keras.Variable, ...]
    layers: tuple[keras.Layer, ...]


def _entries(model: keras.Layer) -> Iterator[_Entry]:
    for path, layer in _routes(model):
        inside = _inside(layer)
        taken: set[str] = set()
        for position, variable in enumerate((*inside.trainable, *inside.others)):
            name = _unique(_joined(path, variable.name), taken)
            yield _Entry(name, variable, layer, position < len(inside.trainable))


def _routes(layer: keras.Layer, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Every route to every layer."""
    yield path, layer
    taken: set[str] = set()
    for inner in _inside(layer).layers:
        yield from _routes(inner, _unique(_joined(path, inner.name), taken))


def _joined(path: str, name: str) -> str:
    return f"{path}{SEPARATOR}{name}" if path else name


def _unique(name: str, taken: set[str]) -> str:
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}~{count}"
    taken.add(found)
    return found


def _inside(layer: keras.Layer) -> _Inside:
    # Private, because the public `variables` mixes in those of inner layers, no public property
    # tells what was created trainable, and layers that are no models do not list their layers.
    trainable = tuple(layer._trainable_variables)  # noqa: SLF001
    known = {id(v) for v in trainable}
    others = tuple(v for v in layer._non_trainable_variables if id(v) not in known)  # noqa: SLF001
    states = tuple(s.state for s in layer._seed_generators)  # noqa: SLF001
    return _Inside(trainable, (*others, *states), tuple(layer._layers))  # noqa: SLF001
