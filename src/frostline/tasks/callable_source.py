"""Models of the user's own: ``package.module:callable``, called with ``num_classes=N``.

It returns a module, or a pair (module, preprocess); a module may also carry `preprocess` as an
attribute. `preprocess` turns one raw input (a PIL picture, a text) into a tensor; without it,
pictures are resized, cut and normalised as ImageNet's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from frostline.errors import ModelError
from frostline.tasks.built import Built, Kind, Preparation
from frostline.tasks.config import RunConfig
from frostline.tasks.image import ImagePreparation, from_spec, pixel_spec
from frostline.tasks.imports import resolve_callable
from frostline.tasks.text import EncodedTextPreparation
from frostline.tasks.weights import find_head, load_into, read_weights

__all__ = ["build", "rebuild"]

_log = logging.getLogger("frostline")
#: Settings that only the preparation of pictures here reads.
_OF_PICTURES = ("image_size", "image_mean", "image_std")
_RETURNS = "a function that takes num_classes and returns an nn.Module, or (module, preprocess)"


def build(name: str, *, config: RunConfig, labels: tuple[str, ...], kind: Kind) -> Built:
    """The user's model with one output per label.

    Without a weights file the values are whatever the function itself provides. Settings that its
    own preparation does not hear of are named in a warning: candidates of `choose` share theirs.

    Raises:
        ModelError: it cannot be called, returns something else, or the weights do not fit.
    """
    model, preprocess = _call(name, len(labels))
    given = [field for field in _OF_PICTURES if getattr(config, field) is not None]
    if preprocess and given:
        _log.warning(
            "%s brings its own `preprocess`, which does not hear of %s", name, " and ".join(given)
        )
    head = find_head(model, len(labels))
    fresh: tuple[str, ...] = ()
    if isinstance(config.weights, Path):
        tensors = read_weights(config.weights)
        fresh = load_into(model, tensors, head=head, source=str(config.weights))
    spec = None if preprocess else _default_spec(name, config, kind)
    described = {"source": "callable", "name": name, "kind": kind, "preparation": spec}
    return Built(model, _preparation(described, preprocess), described, head, fresh)


def rebuild(spec: Mapping[str, Any], folder: Path, labels: tuple[str, ...]) -> Built:
    """The user's model, from the same function; it must still be importable."""
    del folder
    model, preprocess = _call(spec["name"], len(labels))
    head = find_head(model, len(labels))
    return Built(model, _preparation(spec, preprocess), spec, head)


def _call(name: str, classes: int) -> tuple[nn.Module, Callable[[Any], Any] | None]:
    function = resolve_callable(name, error=ModelError)
    try:
        result: Any = function(num_classes=classes)
    except Exception as error:  # the user's own code
        raise ModelError(
            f"call {name}(num_classes={classes})",
            found=f"{type(error).__name__}: {error}",
            fix=_RETURNS,
        ) from error
    model, preprocess = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"use what {name} returned", found=f"a {type(model).__name__}", fix=_RETURNS
        )
    found = preprocess or getattr(model, "preprocess", None)
    return model, found if callable(found) else None


def _default_spec(name: str, config: RunConfig, kind: Kind) -> dict[str, Any]:
    if kind == "text":
        raise ModelError(
            f"feed texts to {name}",
            found="no `preprocess` that turns a text into a tensor",
            fix="return (module, preprocess), or use 'hf:NAME'",
        )
    return pixel_spec(config)


def _preparation(spec: Mapping[str, Any], preprocess: Callable[[Any], Any] | None) -> Preparation:
    if spec["preparation"] is not None:
        return from_spec(spec["preparation"])
    if preprocess is None:
        raise ModelError("prepare inputs", found="no `preprocess` any more", fix=_RETURNS)
    if spec["kind"] == "text":
        return EncodedTextPreparation(preprocess)
    return ImagePreparation({"source": "callable"}, preprocess)
