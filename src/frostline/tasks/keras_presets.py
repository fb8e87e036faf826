"""Text classifiers from presets of KerasHub: ``keras:FOLDER``, as `save_to_preset` writes it.

Only folders on this machine are read. Their descriptions may name Keras's own layers and
KerasHub's backbones, text classifiers, preprocessors and tokenizers, nothing else; their weights
are plain arrays. Texts are tokenized by the preset's own preprocessor and padded to one length, as
KerasHub does it; TensorFlow Text is not needed. A saved model holds the preset's descriptions and
vocabulary, so that it is built again from its own folder alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from frostline import _io
from frostline.backends.keras.archive import (
    BAD_FILE,
    MAX_JSON_BYTES,
    check_architecture,
    check_h5,
    loader_errors,
)
from frostline.errors import ModelError
from frostline.tasks.built import Built
from frostline.tasks.config import RunConfig
from frostline.tasks.imports import need
from frostline.tasks.keras_setup import load_keras, settle_names, settled
from frostline.tasks.text import PresetPreparation
from frostline.tasks.weights import load_into, read_weights

if TYPE_CHECKING:
    from frostline.backends.keras.torch_module import KerasTextClassifier

__all__ = ["build", "rebuild"]

LONGEST_TOKENS = 512  # default cap: attention is quadratic in the length
_FOLDER = "preset"  # in a saved model
_BACKBONE, _TASK = "config.json", "task.json"
_DESCRIPTIONS = (_BACKBONE, _TASK, "preprocessor.json", "tokenizer.json")
_WEIGHTS, _TASK_WEIGHTS = "model.weights.h5", "task.weights.h5"
_ASSETS = "assets/tokenizer"
#: Classes of KerasHub that a text classifier is made of.
_CLASSES = re.compile(r"[A-Z]\w*(Backbone|TextClassifier|TextClassifierPreprocessor|Tokenizer)")
_OWN_CODE = "a preset that save_to_preset wrote of a text classifier of KerasHub's own"


def build(name: str, *, config: RunConfig, labels: tuple[str, ...]) -> Built:
    """A text classifier with one output per label.

    Args:
        name: folder of a preset.
        config: its `weights` are 'pretrained' (the preset's own), 'random', or a file.
        labels: class names.

    Raises:
        ModelError: no preset of a text classifier there, or one that asks for code of its own.
        MissingExtra: Keras or KerasHub is not installed.
    """
    path = Path(name).expanduser()
    if not (path / _BACKBONE).is_file():
        raise ModelError(
            f"classify texts with keras:{name}",
            found="no folder of a preset" if not path.is_dir() else f"no {_BACKBONE} in the folder",
            fix="the folder of a KerasHub preset (model.save_to_preset), or a model 'hf:NAME'",
        )
    preset = _Preset.read(path)
    pretrained = config.weights == "pretrained"
    if pretrained:
        _check_weights(path)
    keras = load_keras()
    hub = _keras_hub()
    own_head = pretrained and preset.is_task and (path / _TASK_WEIGHTS).is_file()
    with settled(keras):
        task = _task(hub, path, load_weights=pretrained, classes=None if own_head else len(labels))
        length = _length(task, name, config)
        model, dense = _classifier(keras, preset, task, len(labels))
    fresh = _fill(model, dense, config, own_head=own_head, backbone=task.backbone.name)
    spec: dict[str, Any] = {
        "source": "keras",
        "kind": "text",
        "name": f"keras:{name}",
        "digest": preset.digest,
        "max_length": length,
    }
    preparation = _preparation(preset, task, length)
    notes = {"keras": keras.__version__, "keras_hub": hub.__version__}
    return Built(model, preparation, spec, model.head_name, fresh, notes)


def rebuild(spec: Mapping[str, Any], folder: Path, labels: tuple[str, ...]) -> Built:
    """A saved model, weights as initialised, from the descriptions in its folder."""
    preset = _Preset.read(folder / _FOLDER)
    if preset.digest != spec.get("digest"):
        raise ModelError(
            f"load the model in {folder}", found="another preset beside it", fix="save it again"
        )
    keras = load_keras()
    hub = _keras_hub()
    with settled(keras):
        task = _task(hub, folder / _FOLDER, load_weights=False, classes=len(labels))
        task.preprocessor.sequence_length = spec["max_length"]
        model, _ = _classifier(keras, preset, task, len(labels))
    return Built(model, _preparation(preset, task, spec["max_length"]), spec, model.head_name)


# -- what a folder says --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Preset:
    """The files of a preset that say what it is, without its weights.

    Attributes:
        files: by their place in the folder.
    """

    files: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> _Preset:
        """Read and check them.

        Raises:
            ModelError: one that asks for code, or is damaged or too large.
        """
        asked = f"read the preset {folder}"
        try:
            files = {name: _limited(folder / name) for name in cls._names(folder)}
        except OSError as error:
            raise ModelError(asked, found=str(error), fix=_OWN_CODE) from error
        for name in _DESCRIPTIONS:
            if name in files:
                told = _json(asked, name, files[name])
                check_architecture(told, asked=asked, accepts=_of_hub)
                _check_places(told, asked)
        return cls(files)

    @staticmethod
    def _names(folder: Path) -> Iterator[str]:
        yield from (name for name in _DESCRIPTIONS if (folder / name).is_file())
        assets = folder / _ASSETS
        for path in sorted(assets.iterdir()) if assets.is_dir() else ():
            if path.is_file():
                yield f"{_ASSETS}/{path.name}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all of them."""
        told = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        return hashlib.sha256(_io.canonical_json(told)).hexdigest()

    @property
    def is_task(self) -> bool:
        """Whether it describes a text classifier, rather than a backbone for one."""
        told = json.loads(self.files.get(_TASK, b"{}"))
        return str(told.get("class_name", "")).endswith("TextClassifier")

    def write(self, folder: str) -> None:
        """Write the files into the folder of a saved model."""
        for name, data in self.files.items():
            target = Path(folder, _FOLDER, name)
            _io.make_folder(target.parent)
            _io.atomic_write_bytes(target, data)


def _limited(path: Path) -> bytes:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise OSError(f"{path.name} of {path.stat().st_size:,} bytes")
    return path.read_bytes()


def _json(asked: str, name: str, data: bytes) -> Any:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(asked, found=f"{name}: {error}"[:300], fix="an undamaged file") from error
    if not isinstance(found, dict) or "registered_name" not in found:
        # Of other kinds (a checkpoint of transformers) KerasHub would build something of its own.
        raise ModelError(asked, found=f"{name}, which Keras did not write", fix=_OWN_CODE)
    return found


def _check_places(told: Any, asked: str) -> None:
    """Refuse settings that would make KerasHub look for vocabularies elsewhere."""
    waiting = [told]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            place = part.get("config_file")
            if place is not None and place not in _DESCRIPTIONS:
                raise ModelError(asked, found=f"files in {place!a}"[:300], fix=_OWN_CODE)
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _of_hub(part: Mapping[str, Any]) -> bool:
    """Whether a part of a description is one of KerasHub's classes for texts."""
    name, module = part.get("class_name"), part.get("module")
    return (
        isinstance(name, str)
        and isinstance(module, str)
        and _CLASSES.fullmatch(name) is not None
        and module.startswith(("keras_hub.src.models.", "keras_hub.src.tokenizers."))
        and part.get("registered_name") == f"keras_hub>{name}"
    )


def _check_weights(folder: Path) -> None:
    h5py = need("h5py", extra="keras")
    if not (folder / _WEIGHTS).is_file():
        raise ModelError(
            f"read the weights of the preset {folder}",
            found=f"no {_WEIGHTS}; weights in several files are not read",
            fix="save_to_preset(folder, max_shard_size=None), or weights: random",
        )
    for name in (_WEIGHTS, _TASK_WEIGHTS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            with h5py.File(path, "r") as file:
                check_h5(file, path.stat().st_size)
        except BAD_FILE as error:
            found = ascii(" ".join(f"{name}: {error}".split()))[1:-1][:300]
            raise ModelError(
                f"read the weights of the preset {folder}", found=found, fix="an undamaged file"
            ) from error


# -- what it makes -------------------------------------------------------------------------------


def _keras_hub() -> Any:
    return need("keras_hub", extra="keras-hub")


def _task(hub: Any, folder: Path, *, load_weights: bool, classes: int | None) -> Any:
    given = {} if classes is None else {"num_classes": classes}
    fix = "a preset of a text classifier that this version of KerasHub can read"
    with loader_errors(f"load the preset {folder}", fix=fix):
        # The whole path: a bare name may be that of a preset to be downloaded.
        return hub.models.TextClassifier.from_preset(
            str(folder.resolve()), load_weights=load_weights, **given
        )


def _length(task: Any, name: str, config: RunConfig) -> int:
    """Tokens of a text; the preprocessor is set to it."""
    if task.preprocessor is None:
        raise ModelError(
            f"tokenize texts with keras:{name}",
            found="a preset without a tokenizer",
            fix="save the classifier with its preprocessor",
        )
    own = int(task.preprocessor.sequence_length)
    accepted = getattr(task.backbone, "max_sequence_length", None) or own
    if config.max_length is not None and config.max_length > accepted:
        raise ModelError(
            f"read texts of {config.max_length} tokens with keras:{name}",
            found=f"a model made for {accepted}",
            fix=f"max_length of at most {accepted}",
        )
    length = config.max_length or min(own, accepted, LONGEST_TOKENS)
    task.preprocessor.sequence_length = length
    return length


def _classifier(
    keras: Any, preset: _Preset, task: Any, classes: int
) -> tuple[KerasTextClassifier, Any]:
    """The torch module, and the last layer of the preset's own classifier."""
    # Imports Keras, whose backend has to be settled first.
    from frostline.backends.keras.names import SEPARATOR, layers  # noqa: PLC0415
    from frostline.backends.keras.torch_module import KerasTextClassifier  # noqa: PLC0415

    dense = task.layers[-1]
    if not isinstance(dense, keras.layers.Dense) or dense.output is not task.outputs[0]:
        raise ModelError(
            f"fine-tune {type(task).__name__}",
            found=f"a last layer of the kind {type(dense).__name__}",
            fix="a text classifier that ends in a Dense layer",
        )
    body = keras.Model(task.input, dense.input, name=task.name)
    body.trainable = True  # what is frozen is the policy's to say
    beside: dict[str, list[Any]] = {}
    for place, layer in layers(body)[1:]:
        beside.setdefault(place.rpartition(SEPARATOR)[0], []).append(layer)
    for siblings in beside.values():
        settle_names(siblings)
    model = KerasTextClassifier(
        body, head=dense.name, classes=classes, architecture=[preset.digest, _hub_version()]
    )
    return model, dense


def _hub_version() -> str:
    return str(_keras_hub().__version__)


def _fill(
    model: KerasTextClassifier, dense: Any, config: RunConfig, *, own_head: bool, backbone: str
) -> tuple[str, ...]:
    """Put the weights in that were asked for; names of the tensors left as initialised."""
    if config.weights == "random":
        return tuple(n for n, _ in model.named_parameters())
    if isinstance(config.weights, Path):
        tensors = read_weights(config.weights)
        return load_into(model, tensors, head=model.head_name, source=str(config.weights))
    last = (f"{model.head_name}.bias", f"{model.head_name}.weight")
    if not own_head:
        outside = (n for n, _ in model.named_parameters() if not n.startswith(f"{backbone}."))
        return tuple(sorted({*last, *outside}))
    kernel = dense.kernel.value.detach()
    if tuple(kernel.shape) != (model.head.in_features, model.head.out_features):
        return last
    with torch.no_grad():
        model.head.weight.copy_(kernel.T)
        model.head.bias.copy_(dense.bias.value.detach())
    return ()


def _preparation(preset: _Preset, task: Any, length: int) -> PresetPreparation:
    return PresetPreparation(
        partial(_encode, task.preprocessor), length, preset.digest, preset.write
    )


def _encode(preprocessor: Any, text: str) -> Mapping[str, Any]:
    """One text as arrays (L,) by name."""
    return preprocessor(text)
