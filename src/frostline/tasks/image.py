"""From a picture to a model's input, and back to the same after saving.

The evaluation transform is the model's own, kept as plain JSON from which it is built again:

==============  ============================================================================
"source"        built by
==============  ============================================================================
"timm"          `timm.data.create_transform` from the model's data configuration
"torchvision"   resize, centre crop and normalisation as the weights' own transform has them
"hf"            the image processor saved beside the model (`AutoImageProcessor`)
"callable"      the user's function returns it together with the model
==============  ============================================================================

Augmentation changes the picture before that transform, so one works for all sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from frostline.backends.torch.random_state import mix, seeded
from frostline.tasks.config import RunConfig
from frostline.tasks.imports import need
from frostline.tasks.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImagePreparation", "from_spec", "pixel_spec", "timm_spec"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST_CROP = 0.5  # share of the area that the "basic" augmentation keeps at least
Spec = Mapping[str, Any]


@dataclass(frozen=True)
class ImagePreparation:
    """Pictures to model inputs.

    Attributes:
        spec: JSON that the transform is built from.
        transform: from an RGB picture to a tensor (3, H, W).
        keyword: name of the model's argument, or None for the first positional one.
        augment: what a view changes.
        seed: mixed into every view.
        extras: writes what `spec` refers to (an image processor) into a folder.
    """

    spec: Spec
    transform: Callable[[Image], Any]
    keyword: str | None = None
    augment: Literal["none", "flip", "basic"] = "none"
    seed: int = 0
    extras: Callable[[str], Any] | None = field(default=None, compare=False)

    def __call__(self, raw: Any, index: int = 0, view: int | None = None) -> Tensor:
        """One picture, prepared: a pure function of its arguments.

        Args:
            raw: what `open_picture` reads.
            index: place in its split.
            view: number of the augmented view, or None for none. Of 'flip' there are two: even
                ones as they are, odd ones mirrored.
        """
        picture = open_picture(raw)
        if view is None or self.augment == "none":
            return self.transform(picture)
        if self.augment == "flip":
            return self.transform(_mirrored(picture) if view % 2 else picture)
        with seeded(mix(self.seed, index, view)):
            return self.transform(_augmented(picture))

    def collate(self, prepared: Sequence[Tensor]) -> tuple[Tensor] | dict[str, Tensor]:
        """Stack to (N, 3, H, W)."""
        batch = torch.stack(list(prepared))
        return {self.keyword: batch} if self.keyword else (batch,)

    def configured(self, config: RunConfig) -> ImagePreparation:
        """The same with the run's augmentation and seed."""
        return replace(self, augment=config.augment or "none", seed=config.seed)


def from_spec(spec: Spec) -> ImagePreparation:
    """Build from the JSON of a "timm" or "torchvision" source."""
    build = {"timm": _timm_transform, "torchvision": _pixel_transform}[spec["source"]]
    return ImagePreparation(spec, build(spec))


def timm_spec(model_config: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A timm data configuration with the run's overrides.

    A size asked for is the size seen: nothing beyond the centre square is cropped away.
    """
    found = {
        "input_size": list(model_config["input_size"]),
        "interpolation": model_config["interpolation"],
        "mean": list(model_config["mean"]),
        "std": list(model_config["std"]),
        "crop_pct": model_config["crop_pct"],
        "crop_mode": model_config["crop_mode"],
    }
    if config.image_size is not None:
        size = [found["input_size"][0], config.image_size, config.image_size]
        found |= {"input_size": size, "crop_pct": 1.0}
    return {"source": "timm", **found, **_colours(config)}


def pixel_spec(
    config: RunConfig,
    *,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
) -> dict[str, Any]:
    """Resize the shorter side, cut the centre, normalise; with the run's overrides.

    Args:
        config: its image_size, image_mean and image_std win.
        resize: shorter side after resizing, pixels.
        crop: side of the centre square, pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        interpolation: name of a torchvision InterpolationMode.
    """
    if config.image_size is not None:
        resize = crop = config.image_size
    found = {"resize": resize, "crop": crop, "mean": list(mean), "std": list(std)}
    return {
        "source": "torchvision",
        **found,
        "interpolation": interpolation,
        **_colours(config),
    }


def _colours(config: RunConfig) -> dict[str, list[float]]:
    found = {"mean": config.image_mean, "std": config.image_std}
    return {name: list(value) for name, value in found.items() if value is not None}


def _timm_transform(spec: Spec) -> Callable[[Image], Tensor]:
    data = need("timm.data", extra="image")
    return data.create_transform(
        input_size=tuple(spec["input_size"]),
        is_training=False,
        interpolation=spec["interpolation"],
        mean=tuple(spec["mean"]),
        std=tuple(spec["std"]),
        crop_pct=spec["crop_pct"],
        crop_mode=spec["crop_mode"],
    )


def _pixel_transform(spec: Spec) -> Callable[[Image], Tensor]:
    v2 = need("torchvision.transforms.v2", extra="image")
    mode = v2.InterpolationMode(spec["interpolation"])
    return v2.Compose(
        [
            v2.Resize(spec["resize"], interpolation=mode, antialias=True),
            v2.CenterCrop(spec["crop"]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec["mean"], spec["std"]),
        ]
    )


def _augmented(picture: Image) -> Image:
    v2 = need("torchvision.transforms.v2", extra="image")
    functional = need("torchvision.transforms.v2.functional", extra="image")
    crop = need("torchvision.transforms", extra="image").RandomResizedCrop
    # Cut only: the evaluation transform resizes, so pixels are interpolated once.
    box = crop.get_params(picture, scale=[SMALLEST_CROP, 1.0], ratio=[3 / 4, 4 / 3])
    return v2.RandomHorizontalFlip()(functional.crop(picture, *box))


def _mirrored(picture: Image) -> Image:
    functional = need("torchvision.transforms.v2.functional", extra="image")
    return functional.horizontal_flip(picture)
