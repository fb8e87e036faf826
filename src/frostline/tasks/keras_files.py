"""Old files of Keras's weights: ``.h5`` in the layout before ``.keras``, read as plain arrays.

A model is never built from such a file, and `frostline.backends.keras.archive` looks through it
first: HDF5 can point to other files and declare terabytes in a few bytes. What is left are arrays
no larger than the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostline.backends.keras.archive import BAD_FILE, check_h5
from frostline.errors import ModelError
from frostline.tasks.imports import need

__all__ = ["read_h5_layers"]

_CONVERT_H5 = (
    "the weights in the layout of Keras before version 3, or a .safetensors file (docs/models.md "
    "has the line that converts one)"
)


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
            check_h5(file, size)
            root = file.get("model_weights", file)  # files of whole models have them inside
            found = [(name, _arrays(root[name])) for name in _names(root, "layer_names")]
    except BAD_FILE as error:
        found_ = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(asked, found=ascii(found_)[1:-1], fix=_CONVERT_H5) from error
    for name, arrays in found:
        if any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in arrays):
            wrong = f"values that are not finite in {name!a}"
            raise ModelError(asked, found=wrong[:300], fix="an undamaged file")
    return [(name, arrays) for name, arrays in found if arrays]


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
