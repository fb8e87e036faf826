"""What a plan says of a Keras model itself: trainable flags, and layers held in inference.

Keras has one flag for two things: `layer.trainable = False` freezes a layer's variables, and puts a
`BatchNormalization` in inference. Plans keep them apart. So variables get their own flag each
(`exempt` gamma and beta of a held normalisation still train), and every layer of a frozen group
whose call takes `training` gets its own `call` as an instance attribute that passes
`training=False`: nothing is drawn, no statistics move, whatever the layer above says. Keras calls
what it finds on the instance. The attribute is no variable and no config, so `save` and `clone`
do not see it.

A layer that holds others and hands `training` on to them is held only where all of them are.
Layers that augment images are never held: they belong to the data, wherever they stand.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import keras

from frostline.backends.keras.names import SEPARATOR, can_train, layers, owners, tensors
from frostline.errors import BackendError, few
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

__all__ = ["Flags", "HeldModes", "hold_layer", "is_held", "release_layer"]

_MARK = "_frostline_held"


def is_held(layer: keras.Layer) -> bool:
    """Whether the layer is held in inference.

    Example:
        >>> is_held(keras.layers.Dropout(0.5))
        False
    """
    return getattr(vars(layer).get("call"), _MARK, None) is not None


def hold_layer(layer: keras.Layer) -> None:
    """Let every call of the layer be one in inference, until `release_layer`.

    Example:
        >>> layer = keras.layers.Dropout(0.5)
        >>> hold_layer(layer)
        >>> float(keras.ops.sum(layer(keras.ops.ones((4, 4)), training=True)))
        16.0
    """
    if not is_held(layer):
        # Past Keras's `__setattr__`: it tracks what layers are given.
        layer.__dict__["call"] = _in_inference(layer.call, had_own="call" in vars(layer))


def release_layer(layer: keras.Layer) -> None:
    """Let the layer follow `training` again."""
    inner, had_own = getattr(vars(layer)["call"], _MARK)
    del layer.__dict__["call"]
    if had_own:
        layer.__dict__["call"] = inner


def _in_inference(inner: Callable[..., Any], *, had_own: bool) -> Callable[..., Any]:
    order = list(inspect.signature(inner).parameters)

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        place = order.index("training")
        if len(args) > place:
            args = (*args[:place], False, *args[place + 1 :])
        else:
            kwargs["training"] = False
        return inner(*args, **kwargs)

    setattr(call, _MARK, (inner, had_own))
    return call


#: What `RandomFlip`, `RandAugment` and their like are.
_AUGMENTATION: Any = keras.layers.RandomFlip.__base__


def _takes_training(layer: keras.Layer) -> bool:
    if isinstance(layer, _AUGMENTATION):
        return False
    found = inspect.signature(layer.call).parameters.get("training")
    return found is not None and found.kind is not inspect.Parameter.VAR_KEYWORD


class HeldModes:
    """The layers of one model that a plan holds in inference.

    Args:
        model: the model; itself never held, since its callers say whether they train.
        groups: its layer groups; `LayerGroup.modules` says which layers a group controls.

    Raises:
        BackendError: a group names a layer that the model does not have.
    """

    def __init__(self, model: keras.Layer, groups: LayerGroups) -> None:
        self._layers = {path: layer for path, layer in layers(model) if layer is not model}
        self._takes = {p for p, layer in self._layers.items() if _takes_training(layer)}
        self._norms = norm_layers(model, groups)
        self._group_of = {m.name: g.name for g in groups for m in g.modules if m.name}
        if unknown := sorted(self._group_of.keys() - self._layers.keys()):
            raise BackendError(
                f"control the mode of {few(unknown)}",
                found="no layer of that name in this model",
                fix="find the layer groups again after changing the model's layers",
            )
        self._held: dict[str, keras.Layer] = {}

    @property
    def held(self) -> frozenset[str]:
        """Paths of the layers held now."""
        return frozenset(self._held)

    def apply(self, plan: FreezePlan) -> None:
        """Hold exactly the layers that the plan wants held, whatever was held before."""
        held = {path: self._layers[path] for path in self._wanted(plan)}
        for path, layer in self._layers.items():
            if is_held(layer) and path not in held:
                release_layer(layer)
        for layer in held.values():
            hold_layer(layer)
        self._held = held

    def restore(self) -> list[str]:
        """Hold again the layers that somebody gave another `call`; their names."""
        moved = [path for path, layer in self._held.items() if not is_held(layer)]
        for path in moved:
            hold_layer(self._held[path])
        return moved

    def release(self) -> None:
        """Hold nothing."""
        for layer in self._layers.values():
            if is_held(layer):
                release_layer(layer)
        self._held = {}

    def _wanted(self, plan: FreezePlan) -> Iterator[str]:
        alone = {path for path in self._takes if self._is_still(path, plan)}
        awake = self._takes - alone
        for path in alone:
            if not any(_inside(other, path) for other in awake):
                yield path

    def _is_still(self, path: str, plan: FreezePlan) -> bool:
        group = self._group_of.get(path)
        live = plan.live_norm if path in self._norms else plan.live_dropout
        return group is not None and group in plan.frozen and group not in live


def norm_layers(model: keras.Layer, groups: LayerGroups) -> frozenset[str]:
    """Paths of the layers that hold running statistics."""
    home = {id(layer): path for path, layer in layers(model)}
    holders = owners(model)
    return frozenset(
        home[id(holders[b.name])] for g in groups for b in g.buffers if b.kind == "norm"
    )


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}{SEPARATOR}")


class Flags:
    """The `trainable` flags of a model's layers and variables.

    A layer shows False where nothing of it trains and no statistics of it follow the data. What
    decides is the flag of each variable; only the model's own flag hides them all.

    Args:
        model: the model.
        groups: its layer groups.
    """

    def __init__(self, model: keras.Model, groups: LayerGroups) -> None:
        self._model = model
        found = tensors(model)
        self._variables = {n: v for n, v in found.items() if n in can_train(model)}
        names = {id(v): n for n, v in self._variables.items()}
        self._layers = [(p, layer) for p, layer in layers(model) if layer is not model]
        self._inside = {
            p: frozenset(names[id(v)] for v in layer.variables if id(v) in names)
            for p, layer in self._layers
        }
        norms = norm_layers(model, groups)
        self._norm_group = {m.name: g.name for g in groups for m in g.modules if m.name in norms}
        self._wanted_layers: dict[str, bool] = {}
        self._frozen: frozenset[str] = frozenset()
        self._wide = False

    @property
    def variables(self) -> Mapping[str, keras.Variable]:
        """Variables that were created trainable, by name."""
        return self._variables

    @property
    def statistics(self) -> tuple[str, ...]:
        """Paths of the layers whose statistics follow the data under the plan in force."""
        return tuple(p for p in self._norm_group if self._wanted_layers.get(p, True))

    def apply(self, plan: FreezePlan, frozen: Collection[str]) -> None:
        """Set all flags as the plan says; `frozen` names the variables that do not train."""
        self._frozen, self._wide = frozenset(frozen), False
        self._wanted_layers = {
            path: self._layer_trains(path, plan)
            for path, _ in self._layers
            if self._inside[path] or path in self._norm_group
        }
        self._set()

    def widen(self, names: Collection[str]) -> None:
        """Let these frozen variables have gradients; the flags of layers stay."""
        self._wide = True
        for name in names:
            self._variables[name].trainable = True

    def narrow(self) -> None:
        """End what `widen` began."""
        self._wide = False
        for name in self._frozen:
            variable = self._variables[name]
            if variable.trainable:
                variable.trainable = False

    def restore(self) -> list[str]:
        """Put back what somebody changed; names of the variables and layers that had moved."""
        moved = [n for n, v in self._variables.items() if v.trainable == (n in self._frozen)]
        moved += [
            path
            for path, layer in self._layers
            if layer.trainable != self._wanted_layers.get(path, layer.trainable)
        ]
        if not self._model.trainable:
            moved.append(self._model.name)
        if moved:
            self._set()
        return moved

    def _set(self) -> None:
        # Layers before variables, outer before inner: a layer's setter writes to all inside it.
        if not self._model.trainable:
            self._model.trainable = True
        for path, layer in self._layers:
            wanted = self._wanted_layers.get(path)
            if wanted is not None and layer.trainable != wanted:
                layer.trainable = wanted
        for name, variable in self._variables.items():
            if variable.trainable == (name in self._frozen):
                variable.trainable = name not in self._frozen

    def _layer_trains(self, path: str, plan: FreezePlan) -> bool:
        if (group := self._norm_group.get(path)) is not None:
            return group not in plan.frozen or group in plan.live_norm
        return not self._inside[path] <= self._frozen
