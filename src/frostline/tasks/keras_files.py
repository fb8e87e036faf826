"""Keras's files of others, read so that none of them can run code or reach for other files.

``.keras``: a zip archive of a description (JSON) and weights (HDF5). Before Keras sees it, its
members, the classes that the description names, and every object of the HDF5 file are checked.

``.h5``: weights in the layout that Keras used before ``.keras``, read as plain arrays. A model is
never built from such a file.

HDF5 can point to other files (external links, external and virtual data) and can declare terabytes
in a few bytes; both are refused. What is left are arrays no larger than the file.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostline.errors import ModelError
from frostline.tasks.imports import need

__all__ = ["MAX_JSON_BYTES", "check_architecture", "check_archive", "read_h5_layers"]

MAX_JSON_BYTES = 64_000_000
MAX_WEIGHTS_BYTES = 16 << 30
MAX_OBJECTS = 200_000
_MAX_DEPTH = 200
#: What json, zipfile and h5py raise over files that are not what they say.
_BAD_FILE = (OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError)
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
#: Classes of Keras that run code of the file, load other files, or call other frameworks.
_REFUSED = frozenset({
    "FlaxLayer", "IntegerLookup", "JaxLayer", "Lambda", "StringLookup", "TFSMLayer",
    "TextVectorization", "TorchModuleWrapper",
})  # fmt: skip
_OWN_CODE = (
    "a model of Keras's own layers; build one with code of your own in a function, and name that: "
    "'package.module:callable'"
)
_CONVERT_H5 = (
    "the weights in the layout of Keras before version 3, or a .safetensors file (docs/models.md "
    "has the line that converts one)"
)


def check_archive(path: Path) -> dict[str, Any]:
    """The description of the model in a ``.keras`` file, once the whole file is found harmless.

    Raises:
        ModelError: not such a file, damaged, of giant size, or one that asks for code of its own.
    """
    asked = f"read the Keras model {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive.namelist())
            config = _json(archive)
            _check_weights(archive)
    except (*_BAD_FILE, zipfile.BadZipFile, zlib.error) as e:
        found = " ".join(f"{e}".split())[:300] or type(e).__name__
        raise ModelError(asked, found=found, fix="a file that model.save('m.keras') wrote") from e
    # How the model was compiled is not read.
    check_architecture({k: v for k, v in config.items() if k != "compile_config"}, asked=asked)
    return config


def check_architecture(config: Any, *, asked: str) -> None:
    """Refuse a description of a model that names anything but Keras's own plain layers.

    Args:
        config: plain JSON, as Keras serialises a model.
        asked: what messages say was wanted.

    Raises:
        ModelError: it names another module, a function, or a class that runs code.

    Example:
        >>> check_architecture({"module": "keras.layers", "class_name": "Dense"}, asked="try")
        >>> check_architecture({"module": "os", "class_name": "system"}, asked="try")
        Traceback (most recent call last):
            ...
        frostline.errors.ModelError: cannot try
          found: code that is no part of Keras: os.system
          ...
    """
    for part in _parts(config, asked):
        name = part.get("class_name")
        module, registered = part.get("module"), part.get("registered_name")
        if name is None and module is None and registered is None:
            continue
        if name == "__lambda__" or name in _REFUSED:
            found = f"a layer of the kind {name!a}, which can run code or read other files"
            raise ModelError(asked, found=found[:300], fix=_OWN_CODE)
        value = module is None and name in _VALUES
        function = module == "builtins" and name == "function"
        of_keras = isinstance(module, str) and (
            module == "keras" or f"{module}.".startswith(_MODULES)
        )
        # Functions and classes that somebody registered are called "package>name".
        foreign = any(isinstance(n, str) and ">" in n for n in (registered, part.get("config")))
        if not (value or function or of_keras) or foreign:
            found = f"code that is no part of Keras: {module}.{registered or name}"
            raise ModelError(asked, found=ascii(found)[1:-1][:300], fix=_OWN_CODE)


#: Where the classes and functions of plain models live.
_MODULES = (
    "keras.layers.", "keras.models.", "keras.initializers.", "keras.regularizers.",
    "keras.constraints.", "keras.activations.", "keras.dtype_policies.", "keras.quantizers.",
    "keras.random.", "keras.src.models.", "keras.src.ops.", "keras.src.layers.",
)  # fmt: skip
#: What Keras writes without a module: values, not layers.
_VALUES = frozenset({
    "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__", "__keras_tensor__",
})  # fmt: skip


def read_h5_layers(path: Path) -> list[tuple[str, list[NDArray[Any]]]]:
    """Layers with weights in a ``.h5`` file of the old layout: name and arrays, in file order.

    Raises:
        ModelError: absent, of another layout, damaged, or with links to other files.
    """
    h5py = need("h5py", extra="keras")
    asked = f"read the weights {path}"
    try:
        size = path.stat().st_size
        with h5py.File(path, "r") as file:
            _check_objects(h5py, file, size)
            root = file.get("model_weights", file)  # files of whole models have them inside
            found = [(name, _arrays(root[name])) for name in _names(root, "layer_names")]
    except _BAD_FILE as error:
        found_ = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(asked, found=ascii(found_)[1:-1], fix=_CONVERT_H5) from error
    for name, arrays in found:
        if any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in arrays):
            wrong = f"values that are not finite in {name!a}"
            raise ModelError(asked, found=wrong[:300], fix="an undamaged file")
    return [(name, arrays) for name, arrays in found if arrays]


def _parts(value: Any, asked: str) -> Iterator[Mapping[str, Any]]:
    """All mappings in a description."""
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ModelError(asked, found="a description nested too deep", fix=_OWN_CODE)
        if isinstance(part, Mapping):
            yield part
            waiting += [(inner, depth + 1) for inner in part.values()]
        elif isinstance(part, list | tuple):
            waiting += [(inner, depth + 1) for inner in part]


def _check_members(names: list[str]) -> None:
    if len(names) != len(set(names)) or not {_CONFIG, _WEIGHTS} <= set(names):
        raise ValueError("an archive without one description and one file of weights")
    if others := sorted(set(names) - {_CONFIG, _METADATA, _WEIGHTS}):
        raise ValueError(f"a file that is no part of a plain model: {others[0]!a}"[:300])


def _json(archive: zipfile.ZipFile) -> dict[str, Any]:
    size = archive.getinfo(_CONFIG).file_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"a description of {size:,} bytes, more than {MAX_JSON_BYTES:,}")
    with archive.open(_CONFIG) as file:
        found = json.loads(file.read(MAX_JSON_BYTES + 1))
    if not isinstance(found, dict):
        raise TypeError("a description that is no object")
    return found


def _check_weights(archive: zipfile.ZipFile) -> None:
    info = archive.getinfo(_WEIGHTS)
    if info.file_size > MAX_WEIGHTS_BYTES:
        raise ValueError(f"weights of {info.file_size:,} bytes, more than {MAX_WEIGHTS_BYTES:,}")
    if info.file_size > 100 * max(info.compress_size, 1 << 16):
        raise ValueError("weights that unpack to more than a hundred times their size")
    h5py = need("h5py", extra="keras")
    plain = io.BytesIO(archive.read(_WEIGHTS))
    with h5py.File(plain, "r") as file:
        _check_objects(h5py, file, info.file_size)


def _check_objects(h5py: Any, root: Any, size: int) -> None:
    """Only groups and plain arrays that lie in the file itself, and together fit into it."""
    total = count = 0
    waiting = [(root, 0)]
    while waiting:
        group, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError("groups nested too deep")
        for name in group:
            count += 1
            if count > MAX_OBJECTS:
                raise ValueError(f"more than {MAX_OBJECTS:,} objects")
            kind = group.get(name, getlink=True, getclass=True)
            item = group[name] if kind is h5py.HardLink else None
            if isinstance(item, h5py.Group):
                waiting.append((item, depth + 1))
            elif isinstance(item, h5py.Dataset):
                total += _checked_bytes(h5py, item)
                if total > size:
                    raise ValueError("arrays that are larger than the file they should be in")
            else:
                raise ValueError(  # noqa: TRY004  the file's fault, not a caller's
                    f"neither a group nor an array, but a link or a type: {name!a}"[:200]
                )


def _checked_bytes(h5py: Any, data: Any) -> int:
    if data.is_virtual or data.external:
        raise ValueError(f"data in other files: {data.name!a}"[:200])
    if data.id.get_create_plist().get_nfilters():
        raise ValueError(f"packed data: {data.name!a}"[:200])
    if data.dtype.kind not in "fiub" and not h5py.check_string_dtype(data.dtype):
        raise ValueError(f"data that are no numbers: {data.name!a}"[:200])
    return int(data.size or 0) * int(data.dtype.itemsize)


def _names(group: Any, key: str) -> list[str]:
    """A list of names; long ones are kept in parts."""
    parts = [key] if key in group.attrs else []
    while f"{key}{len(parts)}" in group.attrs:
        parts.append(f"{key}{len(parts)}")
    if not parts:
        raise ValueError(f"an HDF5 file without Keras's list of {key.replace('_', ' ')}")
    raw = [name for part in parts for name in group.attrs[part]]
    return [name.decode("utf-8") if isinstance(name, bytes) else str(name) for name in raw]


def _arrays(group: Any) -> list[NDArray[Any]]:
    found = []
    for name in _names(group, "weight_names"):
        data = group[name]
        if data.dtype.kind not in "fiub":
            raise ValueError(f"weights that are no numbers: {name!a}"[:200])
        found.append(np.asarray(data[()]))
    return found
