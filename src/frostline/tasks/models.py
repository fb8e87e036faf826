"""Models by name: ``timm:``, ``torchvision:``, ``hf:``, ``keras:``, a .keras file, a callable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from frostline.backends.torch.random_state import seeded
from frostline.errors import ModelError
from frostline.tasks import (
    callable_source,
    hf_source,
    keras_source,
    timm_source,
    torchvision_source,
)
from frostline.tasks.built import Built, Kind
from frostline.tasks.config import RunConfig
from frostline.tasks.imports import is_callable_spec

__all__ = ["as_logits", "build_model", "model_logits", "rebuild_model"]

_SOURCES: Mapping[str, ModuleType] = {
    "timm": timm_source,
    "torchvision": torchvision_source,
    "hf": hf_source,
    "keras": keras_source,
}
_FORMS = (
    "'timm:NAME', 'torchvision:NAME', 'hf:NAME_OR_DIR', 'keras:NAME_OR_DIR', a .keras file or "
    "'package.module:callable'"
)


def build_model(config: RunConfig, *, kind: Kind, labels: tuple[str, ...]) -> Built:
    """The model `config.model` with one output per label, in eval mode.

    Fresh tensors are a function of `config.seed`; no global generator moves.

    Raises:
        ModelError: no such model or weights, or they do not fit.
        MissingExtra: an optional dependency is absent.

    Example:
        >>> config = RunConfig(model="timm:test_resnet", data="photos", weights="random")
        >>> build_model(config, kind="image", labels=("cat", "dog")).head
        'fc'
    """
    source, colon, name = config.model.partition(":")
    with seeded(config.seed):
        if colon and name and source in _SOURCES:
            built = _SOURCES[source].build(name, config=config, labels=labels, kind=kind)
        elif config.model.lower().endswith(".keras"):
            built = keras_source.build(config.model, config=config, labels=labels, kind=kind)
        elif is_callable_spec(config.model):
            built = callable_source.build(config.model, config=config, labels=labels, kind=kind)
        else:
            raise ModelError(f"build the model {config.model!r}", found="no such form", fix=_FORMS)
    built.model.eval()
    return built


def rebuild_model(spec: Mapping[str, Any], folder: Path, labels: tuple[str, ...]) -> Built:
    """The model a saved folder describes, without any download.

    Raises:
        ModelError: it cannot be built any more.
    """
    sources = {**_SOURCES, "callable": callable_source}
    source = spec.get("source")
    if source not in sources:
        raise ModelError(
            f"load the model in {folder}",
            found=f"the source {source!r}",
            fix=f"a folder of this version; sources: {', '.join(sources)}",
        )
    with seeded(0):
        built = sources[source].rebuild(spec, folder, labels)
    built.model.eval()
    return built


def model_logits(
    model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any], *, classes: int
) -> Tensor:
    """Forward pass of any classifier: scores (N, classes).

    Raises:
        ModelError: the output is no such tensor.
    """
    out = model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
    return as_logits(out, classes=classes)


def as_logits(out: Any, *, classes: int) -> Tensor:
    """The scores (N, classes) in what a classifier returned.

    Raises:
        ModelError: there are none.

    Example:
        >>> from types import SimpleNamespace
        >>> as_logits(SimpleNamespace(logits=Tensor(2, 3)), classes=3).shape
        torch.Size([2, 3])
    """
    found = getattr(out, "logits", out)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] != classes:
        named = type(found).__name__
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {named}"
        raise ModelError(
            f"tell {classes} classes apart with this model",
            found=f"an output of {shape}",
            fix=f"a model that returns scores of shape (N, {classes})",
        )
    return found
