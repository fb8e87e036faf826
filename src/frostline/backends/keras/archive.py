"""Keras's files of others, looked through before Keras reads them; no framework is needed for it.

A ``.keras`` file is an archive of a description, which names classes and functions that Keras
imports and calls, and of weights in HDF5, which can point at other files and declare terabytes in
a few bytes. Keras's own `safe_mode` has been got around several times. So the file is first read
as data: its members and their sizes, every class that the description names, every object in its
weights. What passes are descriptions of Keras's own plain layers, and plain arrays no larger than
the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from frostline.errors import ModelError

__all__ = [
    "BAD_FILE",
    "MAX_JSON_BYTES",
    "UNREADABLE",
    "check_architecture",
    "check_archive",
    "check_h5",
    "loader_errors",
]

MAX_JSON_BYTES = 64_000_000
#: What to do about a `.keras` file that Keras cannot load.
UNREADABLE = "a file that this version of Keras can read: save it again with model.save"
MAX_WEIGHTS_BYTES = 16 << 30
MAX_OBJECTS = 200_000
_MAX_DEPTH = 200
#: What json, zipfile and h5py raise over files that are not what they say.
BAD_FILE = (OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError)
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
#: Classes of Keras that run code of the file, load other files, or call other frameworks.
_REFUSED = frozenset({
    "FlaxLayer", "IntegerLookup", "JaxLayer", "Lambda", "StringLookup", "TFSMLayer",
    "TextVectorization", "TorchModuleWrapper", "__lambda__", "function",
})  # fmt: skip
#: Where the classes of plain models live.
_MODULES = (
    "keras.layers.", "keras.models.", "keras.initializers.", "keras.regularizers.",
    "keras.constraints.", "keras.activations.", "keras.dtype_policies.", "keras.quantizers.",
    "keras.random.", "keras.src.models.", "keras.src.ops.", "keras.src.layers.",
)  # fmt: skip
#: What Keras writes without a module: values, not layers.
_VALUES = frozenset({
    "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__", "__keras_tensor__",
})  # fmt: skip
#: Settings of layers under which Keras would read another file.
_PATHS = ("call_endpoint", "filepath", "merges", "proto", "saved_model_path", "vocabulary")
_OWN_CODE = (
    "a model of Keras's own layers; build one with code of your own in a function, and name that: "
    "'package.module:callable'; or read its weights: load_weights(model, path)"
)


@contextlib.contextmanager
def loader_errors(asked: str, *, fix: str) -> Iterator[None]:
    """Whatever one of Keras's loaders raises inside, as a `ModelError`: they raise all kinds.

    Args:
        asked: what was to be done.
        fix: what would work.
    """
    try:
        yield
    except Exception as error:
        raise ModelError(
            asked, found=" ".join(f"{type(error).__name__}: {error}".split())[:400], fix=fix
        ) from error


def check_archive(path: Path) -> dict[str, Any]:
    """The description of the model in a ``.keras`` file, once the whole file is found harmless.

    Raises:
        ModelError: not such a file, damaged, of giant size, or one that asks for code of its own.
    """
    asked = f"read the Keras model {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive)
            config = _json(archive)
            _check_weights(archive)
    except (*BAD_FILE, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        found = ascii(" ".join(f"{e}".split()))[1:-1][:300] or type(e).__name__
        raise ModelError(asked, found=found, fix="a file that model.save('m.keras') wrote") from e
    # How the model was compiled is not read.
    check_architecture({k: v for k, v in config.items() if k != "compile_config"}, asked=asked)
    return config


def check_architecture(
    config: Any,
    *,
    asked: str,
    accepts: Callable[[Mapping[str, Any]], bool] | None = None,
) -> None:
    """Refuse a description of a model that names anything but Keras's own plain layers.

    Args:
        config: plain JSON, as Keras serialises a model.
        asked: what messages say was wanted.
        accepts: whether a part that is not of Keras may be there all the same.

    Raises:
        ModelError: it names another module, a function, a class that runs code, or a file.

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
        if paths := [k for k in _PATHS if part.get(k) and not isinstance(part[k], list)]:
            found = f"a layer that reads another file ({paths[0]})"
            raise ModelError(asked, found=found, fix=_OWN_CODE)
        name, module = part.get("class_name"), part.get("module")
        registered = part.get("registered_name")
        if name is None and module is None and registered is None:
            continue
        if name in _REFUSED:
            found = f"a part of the kind {name!a}, which can run code or read other files"
            raise ModelError(asked, found=found[:300], fix=_OWN_CODE)
        # Functions and classes that somebody registered are called "package>name".
        foreign = any(isinstance(n, str) and ">" in n for n in (registered, part.get("config")))
        of_keras = isinstance(module, str) and (
            module == "keras" or f"{module}.".startswith(_MODULES)
        )
        own = (of_keras or (module is None and name in _VALUES)) and not foreign
        if not own and not (accepts is not None and accepts(part)):
            found = f"code that is no part of Keras: {module}.{registered or name}"
            raise ModelError(asked, found=ascii(found)[1:-1][:300], fix=_OWN_CODE)


def check_h5(root: Any, size: int) -> None:
    """Refuse an open HDF5 file that holds more than groups and plain arrays of its own.

    Args:
        root: `h5py.File`.
        size: bytes of the file; its arrays together may take no more.

    Raises:
        ValueError: links, data in other files, packed data, or more than the file can hold.
    """
    import h5py  # noqa: PLC0415 (Keras brings it; nothing else needs it)

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


def _check_members(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if len(names) != len(set(names)) or not {_CONFIG, _WEIGHTS} <= set(names):
        raise ValueError("an archive without one description and one file of weights")
    if others := set(names) - {_CONFIG, _METADATA, _WEIGHTS}:
        raise ValueError(f"a file that is no part of a plain model: {min(others)!a}"[:300])
    for info in archive.infolist():
        if info.filename != _WEIGHTS and info.file_size > MAX_JSON_BYTES:
            raise ValueError(f"{info.filename} of {info.file_size:,} bytes")


def _json(archive: zipfile.ZipFile) -> dict[str, Any]:
    with archive.open(_CONFIG) as file:
        found = json.loads(file.read(MAX_JSON_BYTES + 1))
    if not isinstance(found, dict):
        raise TypeError("a description that is no object")
    return found


def _check_weights(archive: zipfile.ZipFile) -> None:
    import h5py  # noqa: PLC0415

    info = archive.getinfo(_WEIGHTS)
    if info.file_size > MAX_WEIGHTS_BYTES:
        raise ValueError(f"weights of {info.file_size:,} bytes, more than {MAX_WEIGHTS_BYTES:,}")
    if info.file_size > 100 * max(info.compress_size, 1 << 16):
        raise ValueError("weights that unpack to more than a hundred times their size")
    with h5py.File(io.BytesIO(archive.read(_WEIGHTS)), "r") as file:
        check_h5(file, info.file_size)
