"""Models from `.keras` files, which are other people's archives: looked through before Keras does.

A `.keras` file names classes and functions that Keras imports and calls, and holds arrays in HDF5,
which can point at other files. Keras's own `safe_mode` has been got around several times. So the
file is first read as data: members and sizes of the archive, every class and function that its
configuration names (only layers, initializers, ... of Keras itself), every link and size in its
weights. Only then Keras loads it, with `safe_mode=True` and without compiling.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import h5py
import keras

from frostline import _io
from frostline.errors import ModelError

__all__ = ["load_model"]

_MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}
_MAX_CONFIG_BYTES = 1 << 26
_MAX_EXPANSION = 1000  # of weights: zeros compress well, bombs better
#: Packages of Keras whose classes are data with arithmetic. Not: saving, utils, applications, ...
_PACKAGES = (
    "activations", "constraints", "dtype_policies", "initializers", "layers", "losses", "metrics",
    "models", "ops", "optimizers", "quantizers", "random", "regularizers",
)  # fmt: skip
#: Layers that run code from the file, or read other files.
_REFUSED = {"FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper", "__lambda__"}
#: Keys of `get_config` under which a path would be read.
_PATHS = {"filepath", "call_endpoint", "saved_model_path"}


def load_model(path: str | Path) -> keras.Model:
    """A model from a `.keras` file, uncompiled, if everything in it is Keras's own.

    Args:
        path: of the file.

    Raises:
        ModelError: no such file, code in it or code that it names, or a damaged or oversized one.

    Example:
        >>> import tempfile
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
        >>> file = Path(tempfile.mkdtemp()) / "model.keras"
        >>> model.save(file)
        >>> [layer.name for layer in load_model(file).layers]
        ['out']
    """
    path = Path(path)
    try:
        with _io.storage_errors(f"read {path}"), zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            _check_config(path, archive.read("config.json"))
            _check_weights(path, archive.read("model.weights.h5"))
    except (zipfile.BadZipFile, ValueError, RecursionError, UnicodeDecodeError) as error:
        raise _refused(path, f"no sound archive: {error}") from error
    try:
        return cast("keras.Model", keras.saving.load_model(path, compile=False, safe_mode=True))
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise _refused(path, str(error).strip().partition("\n")[0]) from error


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if odd := sorted(set(names) - _MEMBERS):
        raise _refused(path, f"{odd[0]!r} in the archive, which is no part of a plain model")
    if missing := sorted(_MEMBERS - {"metadata.json"} - set(names)):
        raise _refused(path, f"no {missing[0]} in the archive")
    if len(names) != len(set(names)):
        raise _refused(path, "two members of one name in the archive")
    for info in infos:
        small = info.file_size <= _MAX_CONFIG_BYTES
        bomb = info.file_size > _MAX_EXPANSION * max(info.compress_size, 1)
        if bomb and not small:
            raise _refused(path, f"{info.filename} would unpack to {info.file_size} bytes")
        if info.filename.endswith(".json") and not small:
            raise _refused(path, f"{info.filename} of {info.file_size} bytes")


def _check_config(path: Path, text: bytes) -> None:
    for entry in _mappings(json.loads(text)):
        if "class_name" in entry:
            _check_class(path, entry)
        if paths := sorted(k for k in _PATHS & entry.keys() if entry[k]):
            raise _refused(path, f"a layer that reads another file ({paths[0]})")
        if isinstance(entry.get("vocabulary"), str):
            raise _refused(path, "a layer that reads another file (vocabulary)")


def _check_class(path: Path, entry: Mapping[str, Any]) -> None:
    name, module = entry["class_name"], entry.get("module")
    if name in _REFUSED:
        raise _refused(path, f"a {name}, which is code")
    if name == "function":
        raise _refused(path, f"the function {entry.get('config')!r}, which is code")
    if module is None or module == "builtins":
        plain = isinstance(name, str) and name.startswith("__")  # __tensor__, __keras_tensor__, ...
        if not plain:
            raise _refused(path, f"{name!r} of no module of Keras")
        return
    parts = str(module).removeprefix("keras.src").removeprefix("keras").strip(".").split(".")
    foreign = str(module).partition(".")[0] != "keras" or parts[0] not in ("", *_PACKAGES)
    registered = entry.get("registered_name")
    custom = isinstance(registered, str) and ">" in registered and not _of_keras(registered)
    if foreign or custom:
        raise _refused(path, f"{module}.{name}, which is not of Keras's layers")


def _of_keras(registered: str) -> bool:
    return registered.partition(">")[0] in ("keras", "Keras")


def _check_weights(path: Path, data: bytes) -> None:
    """Only arrays and groups: no links to other files, no arrays that are kept elsewhere."""
    total = 0
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            for group, key in _links(file):
                link = group.get(key, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    raise _refused(path, f"{key!r} in the weights is a link to elsewhere")
                item = group[key]
                if isinstance(item, h5py.Dataset):
                    if item.external or item.is_virtual:
                        raise _refused(path, f"{key!r} in the weights is kept in another file")
                    total += item.nbytes
    except (OSError, RuntimeError, KeyError) as error:
        raise _refused(path, f"damaged weights: {error}") from error
    if total > _MAX_EXPANSION * len(data):
        raise _refused(path, f"weights that would take {total} bytes")


def _links(group: h5py.Group, depth: int = 0) -> Iterator[tuple[h5py.Group, str]]:
    if depth > 64:
        raise KeyError("groups nested deeper than 64")
    for key in map(str, group):
        yield group, key
        if isinstance(group.get(key, getlink=True), h5py.HardLink):
            item = group[key]
            if isinstance(item, h5py.Group):
                yield from _links(item, depth + 1)


def _mappings(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    if depth > 200:
        raise ValueError("a configuration nested deeper than 200")
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _mappings(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _mappings(item, depth + 1)


def _refused(path: Path, found: str) -> ModelError:
    return ModelError(
        f"load the model {path}",
        found=found,
        fix="build the model in your own code and read its weights: load_weights(model, path)",
    )
