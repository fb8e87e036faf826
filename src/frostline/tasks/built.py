"""What every source of models returns: the model, its preparation, and how to build it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from frostline.tasks.image import ImagePreparation
from frostline.tasks.text import EncodedTextPreparation, PresetPreparation, TextPreparation

__all__ = ["Built", "Kind", "Preparation"]

Kind = Literal["image", "text"]
Preparation = ImagePreparation | TextPreparation | EncodedTextPreparation | PresetPreparation


@dataclass(frozen=True)
class Built:
    """A classifier with its preparation.

    Attributes:
        model: plain torch module.
        preparation: raw inputs to model inputs.
        spec: plain JSON from which the same architecture is built again without any download.
        head: glob of the head's modules, or None when unknown.
        fresh: names of tensors that start from random values.
        notes: plain JSON for the run's record, besides what all sources tell.
    """

    model: nn.Module
    preparation: Preparation
    spec: Mapping[str, Any]
    head: str | None = None
    fresh: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
