"""Models of torchvision: ``torchvision:NAME``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from frostline.errors import ModelError
from frostline.tasks import hub
from frostline.tasks.built import Built, Kind
from frostline.tasks.config import RunConfig
from frostline.tasks.image import from_spec, pixel_spec
from frostline.tasks.imports import need
from frostline.tasks.weights import find_head, load_into, read_weights

__all__ = ["build", "rebuild"]


def build(name: str, *, config: RunConfig, labels: tuple[str, ...], kind: Kind) -> Built:
    """A torchvision classifier with one output per label.

    Raises:
        ModelError: no such classifier, or no such weights.
    """
    models = need("torchvision.models", extra="image")
    if kind != "image":
        raise ModelError(
            f"classify text with torchvision:{name}",
            found="an image model",
            fix="a model 'hf:NAME'",
        )
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ModelError(
            f"build torchvision:{name}",
            found="no classifier of that name"
            + (f"; did you mean {', '.join(near)}?" if near else ""),
            fix="a name from torchvision.models.list_models(module=torchvision.models)",
        )
    pretrained = models.get_model_weights(name).DEFAULT
    options = _options(models, name, pretrained=config.weights == "pretrained")
    model = models.get_model(name, weights=None, num_classes=len(labels), **options)
    head = find_head(model, len(labels))
    if config.weights == "random":
        fresh = tuple(n for n, _ in model.named_parameters())
    elif config.weights == "pretrained":
        fresh = load_into(model, _download(pretrained, name), head=head, source=str(pretrained))
    else:
        tensors = read_weights(Path(config.weights))
        fresh = load_into(model, tensors, head=head, source=str(config.weights))
    spec = _spec_of(pretrained.transforms(), config)
    described = {
        "source": "torchvision",
        "name": name,
        "options": options,
        "preparation": spec,
    }
    return Built(model, from_spec(spec), described, head, fresh)


def rebuild(spec: Mapping[str, Any], folder: Path, labels: tuple[str, ...]) -> Built:
    """The architecture and preparation of a saved model; weights as initialised."""
    del folder
    models = need("torchvision.models", extra="image")
    model = models.get_model(spec["name"], weights=None, num_classes=len(labels), **spec["options"])
    head = find_head(model, len(labels))
    return Built(model, from_spec(spec["preparation"]), spec, head)


def _options(models: Any, name: str, *, pretrained: bool) -> dict[str, bool]:
    """What torchvision's builders set themselves when they download weights."""
    accepted = inspect.signature(getattr(models, _class_name(models, name), nn.Module)).parameters
    wanted = {
        "aux_logits": False,  # auxiliary classifiers serve training from scratch only
        "transform_input": pretrained,
        "init_weights": True,
    }
    return {key: value for key, value in wanted.items() if key in accepted}


def _class_name(models: Any, name: str) -> str:
    built = inspect.signature(models.get_model_builder(name)).return_annotation
    return built if isinstance(built, str) else built.__name__


def _download(weights: Any, name: str) -> dict[str, Tensor]:
    # torchvision publishes no safetensors: its own loader, with hash check and tensors only.
    with hub.translated(f"get pretrained weights of torchvision:{name}"):
        found = weights.get_state_dict(progress=False, check_hash=True)
    return {key: value for key, value in found.items() if not key.lower().startswith("aux")}


def _spec_of(transform: Any, config: RunConfig) -> dict[str, Any]:
    return pixel_spec(
        config,
        resize=transform.resize_size[0],
        crop=transform.crop_size[0],
        mean=transform.mean,
        std=transform.std,
        interpolation=transform.interpolation.value,
    )
