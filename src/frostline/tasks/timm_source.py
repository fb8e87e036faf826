"""Models of timm: ``timm:NAME``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from frostline.errors import ModelError
from frostline.tasks import hub
from frostline.tasks.built import Built, Kind
from frostline.tasks.config import RunConfig
from frostline.tasks.image import from_spec, timm_spec
from frostline.tasks.imports import need
from frostline.tasks.weights import covering_glob, load_into, read_weights

__all__ = ["build", "rebuild"]


def build(name: str, *, config: RunConfig, labels: tuple[str, ...], kind: Kind) -> Built:
    """A timm model with one output per label.

    Raises:
        ModelError: no such model, no such weights, or a model that takes no pictures.
    """
    timm = need("timm", extra="image")
    if kind != "image":
        raise ModelError(
            f"classify text with timm:{name}", found="an image model", fix="a model 'hf:NAME'"
        )
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(
            f"build timm:{name}",
            found="no model of that name" + (f"; did you mean {', '.join(near)}?" if near else ""),
            fix="a name from timm.list_models()",
        )
    options = _options(timm, name, config)
    fresh: tuple[str, ...] = ()
    if config.weights == "pretrained":
        model = _pretrained(timm, name, options, len(labels))
        head = _head(model)
        if model.pretrained_cfg.get("num_classes") != len(labels):
            fresh = tuple(n for n in model.state_dict() if head and n.startswith(f"{head}."))
    else:
        model = _create(timm, name, options, len(labels))
        head = _head(model)
        if config.weights == "random":
            fresh = tuple(n for n, _ in model.named_parameters())
        else:
            tensors = read_weights(Path(config.weights))
            fresh = load_into(model, tensors, head=head, source=str(config.weights))
    if config.weights != "random":
        _start_small(model, fresh)
    data = need("timm.data", extra="image")
    spec = timm_spec(data.resolve_model_data_config(model), config)
    described = {"source": "timm", "name": name, "options": options, "preparation": spec}
    return Built(model, from_spec(spec), described, head, fresh)


def rebuild(spec: Mapping[str, Any], folder: Path, labels: tuple[str, ...]) -> Built:
    """The architecture and preparation of a saved model; weights as initialised."""
    del folder
    timm = need("timm", extra="image")
    model = _create(timm, spec["name"], spec["options"], len(labels))
    return Built(model, from_spec(spec["preparation"]), spec, _head(model))


def _options(timm: Any, name: str, config: RunConfig) -> dict[str, int]:
    """What the constructor must know: some architectures are built for one input size."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return {"img_size": config.image_size} if fixed and config.image_size else {}


def _create(timm: Any, name: str, options: Mapping[str, Any], classes: int) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=classes, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(
            f"build timm:{name}", found=f"{type(error).__name__}: {error}", fix="another model"
        ) from error


def _pretrained(timm: Any, name: str, options: Mapping[str, Any], classes: int) -> Any:
    found = timm.get_pretrained_cfg(name)
    if not found.hf_hub_id:
        raise ModelError(
            f"get pretrained weights of timm:{name}",
            found="none that timm offers as safetensors",
            fix="weights: FILE.safetensors, or weights: random",
        )
    tensors = read_weights(hub.download(found.hf_hub_id, "model.safetensors"))
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            num_classes=classes,
            # timm adapts the tensors to the class count and the input size.
            pretrained_cfg_overlay={"state_dict": tensors},
            **options,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ModelError(f"build timm:{name}", found=found, fix="another model") from error
    model.pretrained_cfg["state_dict"] = None  # a second copy of every weight
    return model


def _start_small(model: nn.Module, fresh: tuple[str, ...]) -> None:
    """Give new linear heads torch's initial weights, which shrink with the number of features.

    Some architectures start them for training from scratch, many times larger (EfficientNet's by
    the number of classes): pretrained features then meet confident nonsense. Probing flowers with
    EfficientNet-lite0 lost several points to it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in fresh:
            module.reset_parameters()


def _head(model: nn.Module) -> str | None:
    found: Any = getattr(model, "pretrained_cfg", {}).get("classifier")
    if isinstance(found, tuple | list):  # distilled models have two heads
        names = [n for n, _ in model.named_modules() if n in found]
        holding = dict.fromkeys(n.partition(".")[0] for n, _ in model.named_parameters())
        return covering_glob(names, list(holding)) if names else None
    return found or None
