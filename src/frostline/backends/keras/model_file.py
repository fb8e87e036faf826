"""Models from `.keras` files, which are other people's archives: looked through before Keras does.

`frostline.backends.keras.archive` says what passes. Only then Keras loads the file, with
`safe_mode=True` and without compiling.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import keras

from frostline.backends.keras.archive import UNREADABLE, check_archive, loader_errors

__all__ = ["load_model"]


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
    check_archive(path)
    with loader_errors(f"load the Keras model {path}", fix=UNREADABLE):
        return cast("keras.Model", keras.saving.load_model(path, compile=False, safe_mode=True))
