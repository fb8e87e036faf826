"""A tuned Keras model as a ``.keras`` file, which Keras loads on any of its backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from frostline import _io
from frostline.errors import ModelError, StorageError

__all__ = ["export_keras"]


def export_keras(model: nn.Module, path: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a model that `keras_source` built as one file.

    Args:
        model: as trained.
        path: of the file, ending in ``.keras``.
        overwrite: whether an existing file may be replaced.

    Returns:
        ``{"path", "bytes", "activation", "channels"}``: what was written, what the last layer puts
        out (probabilities for "softmax"), and in which order it wants colours.

    Raises:
        ModelError: no Keras model.
        StorageError: the file exists, or cannot be written.
    """
    if not hasattr(model, "to_keras"):
        raise ModelError(
            f"write {path}",
            found=f"a {type(model).__name__}, which is no Keras model",
            fix="a run with a model 'keras:NAME' or of a .keras file",
        )
    if not hasattr(model, "channels"):
        raise ModelError(
            f"write {path}",
            found="a text model of KerasHub, which is more than its layers: its tokenizer, too",
            fix="load the run with frostline.load, which tokenizes",
        )
    if path.suffix != ".keras":
        raise ModelError(f"write {path}", found="another ending", fix=f"{path.stem}.keras")
    if path.exists() and not overwrite:
        raise StorageError(f"write {path}", found="a file of that name", fix="another name")
    keras_model: Any = model
    draft = path.with_name(f".{path.name}.draft.keras")
    try:
        with _io.storage_errors(f"write {path}"):
            keras_model.to_keras().save(draft)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "activation": keras_model.activation,
        "channels": keras_model.channels,
    }
