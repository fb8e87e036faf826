"""Keras on its torch backend, and models that do not depend on what was built before them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from frostline.errors import ModelError
from frostline.tasks.imports import need

__all__ = ["load_keras", "settle_names", "settled"]


def load_keras() -> ModuleType:
    """Keras on its torch backend.

    The backend is chosen when Keras is imported, once per process.

    Raises:
        ModelError: Keras was imported with another backend.
        MissingExtra: it is not installed.
    """
    if "keras" not in sys.modules:
        before = os.environ.get("KERAS_BACKEND")
        os.environ["KERAS_BACKEND"] = "torch"
        try:
            need("keras", extra="keras")
        finally:
            if before is None:
                del os.environ["KERAS_BACKEND"]
            else:
                os.environ["KERAS_BACKEND"] = before
    keras = need("keras", extra="keras")
    if keras.config.backend() != "torch":
        raise ModelError(
            "run a Keras model as a torch module",
            found=f"Keras imported with the backend {keras.config.backend()!r} in this process",
            fix="KERAS_BACKEND=torch before the first import of keras, or another process; on "
            "other backends use frostline.integrations.keras",
        )
    return keras


@contextlib.contextmanager
def settled(keras: Any) -> Iterator[None]:
    """Models built inside have channels last and lie on the CPU, whatever the user's defaults."""
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_last")
    try:
        with keras.device("cpu"):
            yield
    finally:
        keras.config.set_image_data_format(before)


def settle_names(layers: Iterable[Any]) -> None:
    """Number the layers beside each other that Keras named by itself from the start.

    It counts through the whole process, and tensors are named by their layers.
    """
    counts: dict[str, int] = {}
    for layer in layers:
        base = _snake(type(layer).__name__)
        if re.fullmatch(rf"{base}(_\d+)?", layer.name):
            count = counts.get(base, 0)
            counts[base] = count + 1
            layer.name = f"{base}_{count}" if count else base


def _snake(name: str) -> str:
    """As Keras makes a layer's name from its class.

    Example:
        >>> _snake("Conv2D"), _snake("BatchNormalization"), _snake("ReLU")
        ('conv2d', 'batch_normalization', 're_lu')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
