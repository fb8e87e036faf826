"""A Keras model on Keras's torch backend as a torch module like any other.

Keras layers on that backend are torch modules already, but not in the way that PyTorch's tools
read them: a functional model lists no submodules, names are paths with slashes, running statistics
and states of random seeds are `Parameter`s, and whether a layer trains is told by an argument of
the call, not by `training`. So each Keras layer gets a module of ours beside it:

- its parameters are the very tensors of the layer's variables that were created trainable, and its
  buffers share memory with the others, so that both sides see every write;
- the layer runs through it, so that hooks, tracing and replay see each layer run;
- a layer whose call takes `training` is given the module's own `training`, layer by layer: so
  `model.train()`, `eval()` and a mode that is held in one layer mean what they mean in PyTorch.

Names follow the route of layer names (`frostline.backends.keras.names`), with dots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import torch
from torch import Tensor, nn

from frostline.backends.keras.kernels import row_axes
from frostline.backends.keras.names import SEPARATOR, can_train, layers, owners, tensors
from frostline.errors import ModelError

__all__ = ["KerasClassifier", "KerasModule", "KerasTextClassifier"]


class _KerasCall:
    """What a module runs of its Keras layer; the layer itself stays out of PyTorch's sight.

    Args:
        layer: the layer.
        call: runs it: the layer, or its own `call` where Keras has already begun the call.
        place: what tells it apart from all other layers, besides its tensors: plain JSON.

    Attributes:
        held: variables whose tensors the module holds, by its names for them; with each, whether
            it is a parameter.
        constants: tensors that the layer computes with and that are no variables, by attribute.
    """

    __slots__ = ("_call", "_place", "_takes_training", "constants", "held", "layer")

    def __init__(self, layer: keras.Layer, call: Callable[..., Any], place: Any) -> None:
        self.layer = layer
        self.held: dict[str, tuple[keras.Variable, bool]] = {}
        self._call = call
        self._place = place
        self.constants = _constants(layer)
        self._takes_training = "training" in inspect.signature(layer.call).parameters

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, training: bool) -> Any:
        """Run the layer in this mode, whatever mode the call around it has."""
        given = dict(kwargs)
        if self._takes_training:
            given["training"] = training
        if isinstance(self.layer, keras.layers.Normalization):
            self.layer.finalize_state()  # it computes with views, which a move leaves behind
        if not isinstance(self.layer, keras.layers.Rescaling):
            return self._call(*args, **given)
        # Keras would make tensors of its numbers in each call, whose origin nobody can follow.
        before = {name: getattr(self.layer, name) for name in self.constants}
        try:
            for name, constant in self.constants.items():
                setattr(self.layer, name, constant)
            return self._call(*args, **given)
        finally:
            for name, value in before.items():
                setattr(self.layer, name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        """Refused: a copied layer would train the original's tensors."""
        raise ModelError(
            f"copy the Keras layer {self.layer.name!r} with its module",
            found="tensors that belong to both",
            fix="build the model again and use load_state_dict",
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused, as above."""
        return self.__deepcopy__({})

    def stands_for(self) -> Any:
        """What decides the layer's result besides its tensors, for keys of stored outputs."""
        return ["keras", keras.__version__, self._place]


def _constants(layer: keras.Layer) -> dict[str, Tensor]:
    """Tensors among a layer's attributes, or what has to become one."""
    if isinstance(layer, keras.layers.Rescaling):
        found: dict[str, Any] = {"scale": layer.scale, "offset": layer.offset}
        to_tensor: Any = keras.ops.convert_to_tensor
        return {
            name: to_tensor(value, dtype=layer.compute_dtype)
            for name, value in found.items()
            if not isinstance(value, int | float)
        }
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    }


class _KerasGraph(_KerasCall):
    """The same of a functional model: its layers run as the modules that they have.

    A module that is skipped, because its outputs are stored, then costs nothing of Keras's call.

    Attributes:
        modules: by identity of their layers.
    """

    __slots__ = ("modules",)

    def __init__(self, layer: keras.Model, place: Any) -> None:
        super().__init__(layer, layer, place)
        self.modules: dict[int, nn.Module] = {}

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, training: bool) -> Any:
        """Run the layers; each is told its own mode."""
        del kwargs, training
        return _run_graph(self.layer, args[0], lambda step: self.modules.get(id(step), step))


def _run_graph(model: keras.Model, inputs: Any, runner: Callable[[Any], Any]) -> Any:
    """Run a functional model with `runner(step)` in the place of each of its steps."""
    # Private upstream: Keras has no public way to run its graph with other callables in it, as
    # its own quantizers and exporters do, nor to reach the graph inside a Sequential.
    graph = getattr(model, "_functional", None) or model
    given = graph._standardize_inputs(inputs)  # noqa: SLF001
    found = graph._run_through_graph(given, operation_fn=runner)  # noqa: SLF001
    return found[0] if isinstance(found, list | tuple) and len(found) == 1 else found


def _is_graph(layer: keras.Layer) -> bool:
    """Whether a layer is a model that is nothing but a graph of layers: Keras's, or KerasHub's."""
    kind = type(layer)
    own = kind.__module__.startswith("keras.") and kind.__name__ in ("Functional", "Sequential")
    # A backbone adds settings to a functional model, and runs as one.
    hub = kind.__module__.startswith("keras_hub.src.models.") and (
        getattr(kind.call, "__qualname__", "") == "Functional.call"
    )
    return (own or hub) and isinstance(layer, keras.Model) and bool(getattr(layer, "inputs", None))


class _Home(nn.Module):
    """A module that holds tensors of a Keras layer."""

    _keras: _KerasCall
    original_name: str

    @property
    def calls(self) -> _KerasCall:
        """What it runs."""
        return self._keras

    def hold(self, name: str, variable: keras.Variable, *, trained: bool) -> None:
        """Make a variable's tensor a parameter of this module, or share it as a buffer."""
        value = variable.value
        if trained:
            value.requires_grad = True
            value.trailing_outputs = self._trailing_outputs(name, value)
            self.register_parameter(name, value)
        else:
            # A parameter in Keras; as a buffer it shares the memory, so both see each write.
            self.register_buffer(name, value.detach())
        self._keras.held[name] = variable, trained

    def _trailing_outputs(self, name: str, value: Tensor) -> int:
        """How many dimensions at the end count outputs; PyTorch's weights have them in front."""
        if value.ndim < 2:
            return 0
        rows = row_axes(name, value.ndim, self._keras.layer)
        if rows == (0,):
            return 0
        trailing = tuple(range(value.ndim - len(rows), value.ndim))
        return len(rows) if rows == trailing else 1

    def replaced(self) -> Iterator[tuple[keras.Variable, Tensor]]:
        """Tensors that stand here in the place of the Keras layer's own, with its variables."""
        for name, (variable, trained) in self._keras.held.items():
            value, own = variable.value, getattr(self, name)
            if own is not value if trained else own.data_ptr() != value.data_ptr():
                yield variable, own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As PyTorch moves a module: parameters stay the objects they are, buffers do not."""
        super()._apply(fn, recurse)
        for name, (variable, trained) in self._keras.held.items():
            own = getattr(self, name)
            if not trained and own.data_ptr() != variable.value.data_ptr():
                variable.value.data = own
                self.register_buffer(name, variable.value.detach())
        return self


class KerasModule(_Home):
    """One Keras layer: its tensors, its mode, and the modules of the layers in it.

    Args:
        layer: the layer.
        place: what tells it apart from all other layers, besides its tensors: plain JSON.
        stepwise: whether it is a step of a functional model, which runs this module; else Keras
            calls the layer, whose `call` goes through this module.
    """

    def __init__(self, layer: keras.Layer, place: Any, *, stepwise: bool) -> None:
        super().__init__()
        self.original_name = type(layer).__name__
        if _is_graph(layer):
            self._keras: _KerasCall = _KerasGraph(layer, place)
        else:
            self._keras = _KerasCall(layer, layer if stepwise else layer.call, place)
        # Where tracing and keys look for what a module computes with.
        self.constants = tuple(self._keras.constants.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer, in this module's mode."""
        return self._keras(args, kwargs, training=self.training)

    def extra_repr(self) -> str:
        """The layer's name and settings that are plain."""
        return f"name={self._keras.layer.name!r}"


class _Classifier(_Home):
    """A Keras model without its last dense layer, and a linear layer of PyTorch in its place.

    The last layer is PyTorch's own, so that whatever solves, probes or replaces heads knows it.

    Args:
        body: a functional model from inputs to one vector per sample.
        head: name of the last layer.
        classes: number of outputs.
        activation: what the Keras model puts behind its last layer; scores here are without it.
        architecture: plain JSON that with Keras's version decides what the body computes, besides
            its tensors.
    """

    def __init__(
        self, body: keras.Model, *, head: str, classes: int, activation: str, architecture: Any
    ) -> None:
        super().__init__()
        self.original_name = type(body).__name__
        self.head_name = head
        self.activation = activation
        self._keras = _KerasGraph(body, architecture)
        _attach(self, body, architecture)
        if hasattr(self, self.head_name):
            raise ModelError(
                f"put a head named {head!r} on {body.name}",
                found="a layer of that name in the model",
                fix="another name for one of them",
            )
        self.add_module(self.head_name, nn.Linear(body.output_shape[-1], classes))

    def scores(self, inputs: Any, device: torch.device) -> Tensor:
        """Scores (N, classes) for inputs as the body takes them."""
        # Keras computes where it is told to, by default on a GPU if there is one.
        with keras.device(str(device)), self._own_tensors():
            features = self._keras((inputs,), {}, training=self.training)
        return self.head(features)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        found = self.get_submodule(self.head_name)
        if not isinstance(found, nn.Linear):
            raise ModelError(
                f"use the head {self.head_name!r}",
                found=f"a {type(found).__name__} in its place",
                fix="a torch.nn.Linear",
            )
        return found

    def to_keras(self) -> keras.Model:
        """The whole as a Keras model: its last layer is Keras's again, with the activation.

        It takes inputs as the Keras body does: pictures of its layout and order of channels. It
        shares the body with this module: save it, do not train it.
        """
        body, head = self._keras.layer, self.head
        dense = keras.layers.Dense(
            head.out_features, activation=self.activation, name=self.head_name
        )
        with keras.device(str(head.weight.device)):
            model = keras.Model(body.input, dense(body.outputs[0]), name=body.name)
            dense.set_weights(
                [head.weight.detach().T.cpu().numpy(), head.bias.detach().cpu().numpy()]
            )
        return model

    def _own_tensors(self) -> AbstractContextManager[Any]:
        """Let Keras compute with this module's tensors, where they are others than its own.

        So it is while `torch.func.functional_call` runs, and after `load_state_dict(assign=True)`.
        """
        homes = [m for m in self.modules() if isinstance(m, _Home)]
        pairs = [pair for home in homes for pair in home.replaced()]
        if not pairs:
            return nullcontext()
        if moving := [
            m for m in homes if m.training and any(True for _ in m.buffers(recurse=False))
        ]:
            raise ModelError(
                "train a Keras model as a torch module",
                found=f"tensors that were replaced ({len(pairs)}), so that what "
                f"{moving[0].original_name} learns of the data would be lost",
                fix="write into tensors instead of replacing them: load_state_dict without "
                "assign=True; or evaluation mode",
            )
        return keras.StatelessScope(state_mapping=pairs)


class KerasClassifier(_Classifier):
    """A Keras classifier of pictures; `to_keras` puts everything together again.

    Args:
        body: a functional model from pictures to one vector per sample.
        head: name of the last layer.
        classes: number of outputs.
        channels: "rgb", or "bgr" where the weights expect blue first.
        activation: what the Keras model puts behind its last layer; scores here are without it.
        architecture: plain JSON that with Keras's version decides what the body computes, besides
            its tensors.

    Shapes:
        pictures (N, 3, H, W), float, red first -> scores (N, classes), before any softmax.
    """

    def __init__(
        self,
        body: keras.Model,
        *,
        head: str,
        classes: int,
        channels: str = "rgb",
        activation: str = "softmax",
        architecture: Any = None,
    ) -> None:
        super().__init__(
            body, head=head, classes=classes, activation=activation, architecture=architecture
        )
        self.channels = channels
        self.channels_last = body.input_shape[-1] == 3

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (N, classes) for pictures (N, 3, H, W)."""
        if self.channels == "bgr":
            pictures = pictures.flip(1)
        if self.channels_last:
            pictures = pictures.permute(0, 2, 3, 1)
        return self.scores(pictures, pictures.device)


class KerasTextClassifier(_Classifier):
    """A Keras classifier of tokens, whose inputs have names.

    Args:
        body: a functional model from named inputs to one vector per sample.
        head: name of the last layer.
        classes: number of outputs.
        architecture: plain JSON that with the versions of Keras and KerasHub decides what the body
            computes, besides its tensors.

    Shapes:
        each input (N, L), int32 -> scores (N, classes), before any softmax.
    """

    def __init__(
        self, body: keras.Model, *, head: str, classes: int, architecture: Any = None
    ) -> None:
        super().__init__(
            body, head=head, classes=classes, activation="linear", architecture=architecture
        )

    def forward(self, **inputs: Tensor) -> Tensor:
        """Scores (N, classes) for named inputs, each (N, L)."""
        return self.scores(inputs, next(iter(inputs.values())).device)


def _attach(root: _Classifier, model: keras.Layer, architecture: Any) -> None:
    """Put a module for each layer of the model below the root, and the tensors into them."""
    homes: dict[str, _Home] = {"": root}
    by_layer: dict[int, _Home] = {id(model): root}
    for path, layer in layers(model)[1:]:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        above, _, own = path.rpartition(SEPARATOR)
        home = homes[above]
        graph = home.calls if isinstance(home.calls, _KerasGraph) else None
        module = KerasModule(layer, [architecture, path], stepwise=graph is not None)
        homes[path] = by_layer[id(layer)] = module
        home.add_module(_free(home, own), module)
        if graph is not None:
            graph.modules[id(layer)] = module
        else:
            _send_calls(layer, module)
    trained = can_train(model)
    holders = owners(model)
    for name, variable in tensors(model).items():
        home = by_layer[id(holders[name])]
        own = _free(home, name.rpartition(SEPARATOR)[2])
        home.hold(own, variable, trained=name in trained)


def _free(home: nn.Module, name: str) -> str:
    """The name without dots, and with underscores where torch's modules have such an attribute."""
    name = name.replace(".", "_")
    while hasattr(home, name):
        name += "_"
    return name


def _send_calls(layer: keras.Layer, module: KerasModule) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    layer.call = call
