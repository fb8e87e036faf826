"""Models of Keras: ``keras:NAME`` of `keras.applications`, or the path of a ``.keras`` file.

``keras:FOLDER`` of texts is a preset of KerasHub: `frostline.tasks.keras_presets`.

They run on Keras's torch backend as torch modules (`frostline.backends.keras.torch_module`), so all
that works on those works here. Options of a name follow it, each after a colon:
``keras:MobileNet:alpha=0.25``.

What pixels a model wants is asked of Keras: `preprocess_input` of the model's own module, tried on
plain colours. Of a ``.keras`` file it is told by the layers in front or by the model's name.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from frostline import _io
from frostline.backends.keras.archive import (
    MAX_JSON_BYTES,
    UNREADABLE,
    check_architecture,
    check_archive,
    loader_errors,
)
from frostline.errors import ModelError
from frostline.tasks import keras_presets
from frostline.tasks.built import Built, Kind
from frostline.tasks.config import RunConfig
from frostline.tasks.image import ImagePreparation, from_spec, pixel_spec
from frostline.tasks.keras_files import read_h5_layers
from frostline.tasks.keras_pixels import (
    applications,
    pixels_of_application,
    pixels_of_file,
)
from frostline.tasks.keras_setup import load_keras, settle_names, settled
from frostline.tasks.weights import load_into, read_weights

if TYPE_CHECKING:
    from frostline.backends.keras.torch_module import KerasClassifier

__all__ = ["build", "rebuild"]

_log = logging.getLogger(__name__)
ARCHITECTURE_FILE = "architecture.json"
HEAD = "predictions"  # what keras.applications call it
_USUAL_SIDE = 224
_SHOWN_SHARE = 0.875  # of the shorter side: what the centre cut keeps, as ImageNet is tested
#: Side in pixels that the weights were trained for, where it is not 224.
_SIDES = {
    "InceptionV3": 299, "Xception": 299, "InceptionResNetV2": 299, "NASNetLarge": 331,
    "EfficientNetB1": 240, "EfficientNetB2": 260, "EfficientNetB3": 300, "EfficientNetB4": 380,
    "EfficientNetB5": 456, "EfficientNetB6": 528, "EfficientNetB7": 600,
    "EfficientNetV2B1": 240, "EfficientNetV2B2": 260, "EfficientNetV2B3": 300,
    "EfficientNetV2S": 384, "EfficientNetV2M": 480, "EfficientNetV2L": 480,
}  # fmt: skip
#: Arguments of the builders that are decided here.
_DECIDED = frozenset({
    "include_top", "weights", "input_tensor", "input_shape", "pooling", "classes",
    "classifier_activation", "name", "include_preprocessing",
})  # fmt: skip
_OFFLINE = (
    "connect to the internet once, give --weights FILE (.safetensors or .h5), or start from random "
    "weights (weights: random)"
)


def build(name: str, *, config: RunConfig, labels: tuple[str, ...], kind: Kind) -> Built:
    """A Keras model with one output per label.

    Args:
        name: of an application, with options, or path of a ``.keras`` file.
        config: its `weights` are 'pretrained' (of a file: its own), 'random', or a file.
        labels: class names.
        kind: "image", or "text" for the folder of a preset.

    Raises:
        ModelError: no such model or weights, or one that does not take such data.
        MissingExtra: Keras or KerasHub is not installed.
    """
    if kind == "text":
        return keras_presets.build(name, config=config, labels=labels)
    if Path(name).expanduser().is_dir():
        raise ModelError(
            f"classify pictures with keras:{name}",
            found="a folder; presets of KerasHub are supported for texts",
            fix="'keras:NAME' of keras.applications, or a .keras file",
        )
    keras = load_keras()
    with settled(keras):
        if name.lower().endswith(".keras"):
            plan, body, head = _from_file(keras, Path(name).expanduser(), config)
        else:
            plan, body, head = _from_application(keras, name, config)
        return _built(plan, body, head, config, labels)


def rebuild(spec: Mapping[str, Any], folder: Path, labels: tuple[str, ...]) -> Built:
    """The architecture and preparation of a saved model; weights as initialised."""
    if spec.get("kind") == "text":
        return keras_presets.rebuild(spec, folder, labels)
    try:
        plan = _Plan(**spec["plan"])
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"load the model in {folder}",
            found=f"no whole plan of it: {error}",
            fix="save it again",
        ) from error
    keras = load_keras()
    extras = None
    with settled(keras):
        if plan.described:
            text = _read_architecture(folder / ARCHITECTURE_FILE)
            body, extras = _body_of_json(keras, text), partial(_write_architecture, text)
        elif plan.application is None:
            raise ModelError(
                f"load the model in {folder}", found="no description of it", fix="save it again"
            )
        else:
            body = _application(keras, plan, weights=None)
        model = _classifier(plan, body, len(labels))
    preparation = replace(from_spec(spec["preparation"]), extras=extras)
    return Built(model, preparation, spec, model.head_name)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a model is built from, as plain JSON.

    Attributes:
        name: as it was asked for.
        application: name in keras.applications; None for a file.
        options: of the application.
        side: of the pictures it is built for, pixels.
        channels: "rgb" or "bgr".
        head: name of the last layer.
        activation: behind it in the Keras model.
        pixels: what values the pictures have, in words.
        digest: SHA-256 of the description, of a file.
        described: whether the saved model has to hold the description: of a file, and of an
            application with Keras's own weights, for which some have layers of their own.
    """

    name: str
    application: str | None
    options: Mapping[str, Any]
    side: int
    channels: str
    head: str
    activation: str
    pixels: str
    digest: str | None = None
    described: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the saved model's description."""
        return {key: getattr(self, key) for key in self.__slots__} | {"options": dict(self.options)}

    @property
    def architecture(self) -> list[Any]:
        """What decides the architecture, besides Keras's version."""
        options = sorted(self.options.items())
        return [
            self.application,
            self.digest,
            [list(o) for o in options],
            self.side,
            self.described,
        ]


@dataclass(frozen=True, slots=True)
class _Head:
    """The last layer of a file: kernel (D, C) and bias (C,)."""

    kernel: Tensor
    bias: Tensor


def _built(
    plan: _Plan, body: Any, head: _Head | None, config: RunConfig, labels: tuple[str, ...]
) -> Built:
    _refuse_unfit(plan, body)
    keras = load_keras()
    if plan.application is None:
        pixels = pixels_of_file(keras, body, source=plan.name)
    else:
        pixels = pixels_of_application(keras, plan.application)
    plan = replace(plan, channels=pixels.channels, pixels=pixels.words)
    _log.info("%s: pictures of %d x %d, %s", plan.name, plan.side, plan.side, pixels.words)
    model = _classifier(plan, body, len(labels))
    fresh = _fill(model, body, head, config)
    spec = pixel_spec(
        config,
        resize=round(plan.side / _SHOWN_SHARE),
        crop=plan.side,
        mean=pixels.mean,
        std=pixels.std,
    )
    described = {
        "source": "keras",
        "name": plan.name,
        "plan": plan.to_json(),
        "preparation": spec,
    }
    preparation: ImagePreparation = from_spec(spec)
    if plan.described:
        preparation = replace(preparation, extras=partial(_write_architecture, body.to_json()))
    notes = {"pixels": plan.pixels, "keras": keras.__version__}
    return Built(model, preparation, described, model.head_name, fresh, notes)


def _classifier(plan: _Plan, body: Any, classes: int) -> KerasClassifier:
    # Imports Keras, whose backend has to be settled first.
    from frostline.backends.keras.torch_module import KerasClassifier  # noqa: PLC0415

    body.trainable = True  # what is frozen is the policy's to say
    return KerasClassifier(
        body,
        head=plan.head,
        classes=classes,
        channels=plan.channels,
        activation=plan.activation,
        architecture=plan.architecture,
    )


def _fill(
    model: KerasClassifier, body: Any, head: _Head | None, config: RunConfig
) -> tuple[str, ...]:
    """Put the weights in that were asked for; names of the tensors left as initialised."""
    own_head = (f"{model.head_name}.bias", f"{model.head_name}.weight")
    if config.weights == "random":
        return tuple(n for n, _ in model.named_parameters())
    if isinstance(config.weights, Path):
        if config.weights.suffix.lower() in (".h5", ".hdf5"):
            _assign_layers(body, read_h5_layers(config.weights), source=str(config.weights))
            return own_head
        tensors = _by_our_names(read_weights(config.weights), model.head_name)
        return load_into(model, tensors, head=model.head_name, source=str(config.weights))
    layer = model.head
    if head is None or head.kernel.shape != (layer.in_features, layer.out_features):
        return own_head
    with torch.no_grad():
        layer.weight.copy_(head.kernel.T)
        layer.bias.copy_(head.bias)
    return ()


def _by_our_names(tensors: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """Tensors named by Keras's routes (`conv1/kernel`) or by ours (`conv1.kernel`), as ours."""
    found = {
        name.replace(".", "_").replace("/", ".") if "/" in name else name: tensor
        for name, tensor in tensors.items()
    }
    kernel = found.pop(f"{head}.kernel", None)
    return found if kernel is None else found | {f"{head}.weight": kernel.T.contiguous()}


# -- applications ------------------------------------------------------------------------------


def _from_application(keras: Any, text: str, config: RunConfig) -> tuple[_Plan, Any, None]:
    name, *given = text.split(":")
    known = applications(keras)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ModelError(
            f"build keras:{text}",
            found="no model of that name in keras.applications"
            + (f"; did you mean {', '.join(near)}?" if near else ""),
            fix=f"one of {', '.join(known)}; or the path of a .keras file",
        )
    plan = _Plan(
        name=f"keras:{text}",
        application=name,
        options=_options(keras, text, name, given),
        side=config.image_size or _SIDES.get(name, _USUAL_SIDE),
        channels="rgb",
        head=HEAD,
        activation="softmax",
        pixels="",
        described=config.weights == "pretrained",
    )
    weights = "imagenet" if config.weights == "pretrained" else None
    return plan, _application(keras, plan, weights=weights), None


def _options(keras: Any, text: str, name: str, given: Sequence[str]) -> dict[str, Any]:
    parameters = inspect.signature(getattr(keras.applications, name)).parameters
    accepted = {k: p.default for k, p in parameters.items() if k not in _DECIDED}
    found: dict[str, Any] = {}
    for part in given:
        key, sign, value = part.partition("=")
        if not sign or key not in accepted or key in found:
            raise ModelError(
                f"build keras:{text}",
                found=f"{part!r} where an option belongs",
                fix=f"{name}:OPTION=VALUE, with each of {', '.join(accepted)} at most once"
                if accepted
                else f"keras:{name}, which has no options",
            )
        found[key] = _value(text, part, value, accepted[key])
    return found


def _value(text: str, part: str, value: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        number = float(value)
        return int(value) if isinstance(default, int) else number
    except (KeyError, ValueError) as error:
        wanted = type(default).__name__
        raise ModelError(
            f"build keras:{text}",
            found=f"{part!r}, which is no {wanted}",
            fix=f"a value such as {default}",
        ) from error


def _application(keras: Any, plan: _Plan, *, weights: str | None) -> Any:
    name = str(plan.application)
    function = getattr(keras.applications, name)
    options = dict(plan.options)
    own_name = inspect.signature(function).parameters.get("name")
    if own_name is not None and own_name.default is None:
        options["name"] = name.lower()
    fix = _OFFLINE if weights else "another image_size, or other options"
    with (
        loader_errors(f"build {plan.name}", fix=fix),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sys.stderr),
    ):
        # Weights of the size nearest to ours are what we want.
        warnings.filterwarnings("ignore", message=".*input_shape. is undefined or non-square")
        body = function(
            include_top=False,
            weights=weights,
            pooling="avg",
            input_shape=(plan.side, plan.side, 3),
            **options,
        )
    settle_names(body.layers)
    return body


def _assign_layers(
    body: Any, found: Sequence[tuple[str, Sequence[np.ndarray]]], *, source: str
) -> None:
    """Put the arrays of a file into the layers with weights, in their order, as Keras does."""
    layers = [layer for layer in body.layers if layer.weights]
    for place, layer in enumerate(layers):
        own = [*layer.trainable_weights, *layer.non_trainable_weights]
        wanted = [tuple(v.shape) for v in own]
        name, arrays = found[place] if place < len(found) else ("nothing", [])
        shapes = [a.shape for a in arrays]
        if shapes != wanted:
            raise ModelError(
                f"load {source} into the model",
                found=f"{name!a} of the file, with shapes {shapes}, for the layer {layer.name!r}, "
                f"with shapes {wanted}"[:400],
                fix="weights of the same architecture and options (alpha, ...)",
            )
        for variable, array in zip(own, arrays, strict=True):
            variable.assign(array)
    if rest := [name for name, _ in found[len(layers) :]]:
        _log.info("not used from %s, behind the last layer kept: %s", source, ascii(rest)[:200])


# -- files -------------------------------------------------------------------------------------


def _from_file(keras: Any, path: Path, config: RunConfig) -> tuple[_Plan, Any, _Head | None]:
    description = check_archive(path)
    with loader_errors(f"load the Keras model {path}", fix=UNREADABLE):
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    body, dense, activation = _cut(path, model)
    if config.weights == "random":
        body = keras.models.clone_model(body)
    plan = _Plan(
        name=str(path),
        application=None,
        options={},
        side=_side(path, body, config),
        channels="rgb",
        head=dense.name if dense is not None else _free_name(body),
        activation=activation,
        pixels="",
        described=True,
        digest=hashlib.sha256(_io.canonical_json(description)).hexdigest(),
    )
    return plan, body, None if dense is None else _head_of(dense)


def _cut(path: Path, model: Any) -> tuple[Any, Any, str]:
    """The model up to its last dense layer, that layer, and the activation behind it."""
    keras = load_keras()
    asked = f"fine-tune the Keras model {path}"
    outputs = getattr(model, "outputs", None)
    if not outputs or len(outputs) != 1 or len(model.inputs) != 1:
        raise ModelError(
            asked,
            found="no functional model of one input and one output",
            fix="a Sequential or functional model that classifies pictures",
        )
    steps = _steps(keras, model)
    source = steps[0].input if isinstance(model, keras.Sequential) else model.inputs
    end, activation = steps.pop(), None
    while isinstance(end.layer, keras.layers.Activation | keras.layers.Softmax) and steps:
        activation = getattr(getattr(end.layer, "activation", None), "__name__", "softmax")
        end = next((s for s in reversed(steps) if s.output is end.input), _NO_STEP)
    if isinstance(end.layer, keras.layers.Dense):
        activation = activation or end.layer.activation.__name__
        body = keras.Model(source, end.input, name=model.name)
        return body, end.layer, "linear" if activation == "linear" else "softmax"
    rank = 0 if activation is not None else len(end.output.shape)
    if isinstance(end.layer, keras.Model):
        _refuse_hidden_head(asked, end.layer)
    features = end.output
    if rank == 4:
        axes = "channels_last" if model.input_shape[-1] == 3 else "channels_first"
        features = keras.layers.GlobalAveragePooling2D(data_format=axes, name="pooled")(features)
    elif rank != 2 or end.layer is None:
        raise ModelError(
            asked,
            found="no last Dense layer, nor a last layer whose values are features",
            fix="a model that ends in a Dense layer, or a backbone that ends in features",
        )
    return keras.Model(source, features, name=model.name), None, "softmax"


class _Step(NamedTuple):
    """One layer of a model, with what enters and leaves it."""

    layer: Any
    input: Any
    output: Any


_NO_STEP = _Step(None, None, None)


def _steps(keras: Any, model: Any) -> list[_Step]:
    """The layers of the model itself, the one that makes its output last."""
    found: list[_Step] = []
    if isinstance(model, keras.Sequential):
        # Called anew: while a Sequential grows, Keras calls its layers several times.
        x = keras.Input(batch_shape=model.input_shape, dtype=model.inputs[0].dtype)
        for layer in model.layers:
            found.append(_Step(layer, x, layer(x)))
            x = found[-1].output
        return found
    for layer in model.layers:
        with contextlib.suppress(AttributeError, ValueError):  # an input, or called several times
            found.append(_Step(layer, layer.input, layer.output))
    last = [s for s in found if s.output is model.outputs[0]]
    return [
        *(s for s in found if s.output is not model.outputs[0]),
        *(last or [_Step(None, None, model.outputs[0])]),
    ]


def _refuse_hidden_head(asked: str, last: Any) -> None:
    """A classifier inside an inner model would be taken for features."""
    keras = load_keras()
    inner = last.layers[-1]
    name = getattr(getattr(inner, "activation", None), "__name__", None)
    if isinstance(inner, keras.layers.Dense) and name in ("softmax", "sigmoid"):
        raise ModelError(
            asked,
            found=f"its classifier inside the inner model {last.name!r}",
            fix="save the model with the last Dense layer at its top level, or without it",
        )


def _head_of(dense: Any) -> _Head:
    kernel = dense.kernel.value.detach().float().clone()
    bias = None if dense.bias is None else dense.bias.value.detach().float().clone()
    return _Head(kernel, torch.zeros(kernel.shape[1]) if bias is None else bias)


def _free_name(body: Any) -> str:
    taken = {layer.name for layer in body.layers}
    return next(n for n in (HEAD, "classifier", "frostline_head") if n not in taken)


def _side(path: Path, body: Any, config: RunConfig) -> int:
    shape = body.input_shape
    asked = f"feed pictures to the Keras model {path}"
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise ModelError(
            asked, found=f"inputs of shape {shape}", fix="a model of pictures with three channels"
        )
    height, width = shape[1:3] if shape[3] == 3 else shape[2:4]
    if height != width:
        raise ModelError(
            asked, found=f"pictures of {height} x {width}", fix="a model of square pictures"
        )
    if None not in (height, config.image_size) and height != config.image_size:
        raise ModelError(
            f"feed pictures of {config.image_size} pixels to the Keras model {path}",
            found=f"a model built for {height}",
            fix=f"image_size: {height}, or leave it out",
        )
    return height or config.image_size or _USUAL_SIDE


def _body_of_json(keras: Any, text: str) -> Any:
    fix = "a version of Keras near the one that saved it"
    with loader_errors(f"build the model of {ARCHITECTURE_FILE}", fix=fix):
        return keras.models.model_from_json(text)


def _write_architecture(text: str, folder: str) -> None:
    _io.atomic_write_text(Path(folder) / ARCHITECTURE_FILE, text)


def _read_architecture(path: Path) -> str:
    description = _io.load_json(path, max_bytes=MAX_JSON_BYTES)
    check_architecture(description, asked=f"load the model in {path.parent}")
    return json.dumps(description)


# -- what cannot be -----------------------------------------------------------------------------


def _refuse_unfit(plan: _Plan, body: Any) -> None:
    if not body.weights:
        raise ModelError(
            f"fine-tune {plan.name}", found="a model without weights", fix="another model"
        )
    if quantized := [layer.name for layer in body.layers if layer.quantization_mode]:
        raise ModelError(
            f"fine-tune {plan.name}",
            found=f"quantized layers, first {quantized[0]!r}",
            fix="the model as it was before it was quantized",
        )
    if body.losses:
        _log.warning(
            "%s has penalties on its weights (regularizers), which are not applied; weight_decay "
            "is",
            plan.name,
        )
