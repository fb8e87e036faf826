"""A network and a data set so small that a run takes seconds, with every awkward part in them.

Batch normalisation, dropout and random augmentation: whatever resume forgets shows in the bits.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

CLASSES = ("dark", "light", "red")
SIDE = 8
#: A short run of these, as `frostline.fit` and a file of settings take it.
RUN: dict[str, Any] = {
    "model": "tiny_task:tiny_model",
    "data": "tiny_task:tiny_data",
    "policy": "linear-probe",
    "epochs": 3,
    "batch_size": 16,
    "lr": 0.01,
    "patience": None,
    "threads": 1,
}


def preprocess(picture: Image.Image) -> Tensor:
    """(3, 8, 8), roughly centred."""
    picture = picture.resize((SIDE, SIDE))  # augmentation cuts pieces out
    pixels = torch.tensor(list(picture.tobytes()), dtype=torch.float32)
    return pixels.reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 128 - 1


def tiny_model(num_classes: int) -> tuple[nn.Module, object]:
    """A convolutional network with four layer groups."""

    def block(wide_in: int, wide_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(wide_in, wide_out, 3, padding=1), nn.BatchNorm2d(wide_out), nn.ReLU()
        )

    model = nn.Sequential(
        block(3, 4),
        block(4, 6),
        block(6, 6),
        nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, num_classes)
        ),
    )
    return model, preprocess


def deep_linear_model(num_classes: int) -> tuple[nn.Module, object]:
    """No normalisation: a large learning rate throws its weights to infinity."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16), nn.Linear(16, 16), nn.Linear(16, num_classes)
    ), preprocess


def _pictures(count: int, seed: int) -> list[tuple[Image.Image, str]]:
    generator = torch.Generator().manual_seed(seed)
    centres = {"dark": (60, 60, 60), "light": (190, 190, 190), "red": (190, 60, 60)}
    made = []
    for i in range(count):
        label = CLASSES[i % 3]
        noise = torch.randn(SIDE, SIDE, 3, generator=generator) * 50
        pixels = (noise + torch.tensor(centres[label])).clamp(0, 255).byte()
        made.append((Image.frombytes("RGB", (SIDE, SIDE), bytes(pixels.flatten().tolist())), label))
    return made


def tiny_data() -> dict[str, list[tuple[Image.Image, str]]]:
    """49 + 12 + 12 pictures: a last batch of one sample with batches of 4, 8, 12 and 16."""
    return {"train": _pictures(49, 1), "val": _pictures(12, 2), "test": _pictures(12, 3)}


def noise_data() -> dict[str, list[tuple[Image.Image, str]]]:
    """Two labels that say nothing about the pictures: nothing to learn, so patience runs out."""
    parts = tiny_data()
    return {
        name: [(picture, CLASSES[i * i % 3]) for i, (picture, _) in enumerate(part[::-1])]
        for name, part in parts.items()
    }
