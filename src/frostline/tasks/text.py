"""From a text to a model's input: the model's own tokenizer, padded per batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frostline.tasks.imports import need

__all__ = ["EncodedTextPreparation", "PresetPreparation", "TextPreparation"]


@dataclass(frozen=True)
class TextPreparation:
    """Texts to token ids.

    Attributes:
        tokenizer: a Hugging Face tokenizer with a padding token.
        max_length: longest text in tokens; the rest is cut.
    """

    tokenizer: Any
    max_length: int

    def __call__(self, raw: str, index: int = 0, view: int | None = None) -> Mapping[str, Any]:
        """One text as lists of ids; texts have no augmentation, so every view is the same."""
        del index, view
        return dict(self.tokenizer(raw, truncation=True, max_length=self.max_length))

    def collate(self, prepared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pad to the longest text of the batch: (N, L) per input."""
        transformers = need("transformers", extra="text")
        return dict(transformers.DataCollatorWithPadding(self.tokenizer)(list(prepared)))

    @property
    def extras(self) -> Callable[[str], Any]:
        """Writes the tokenizer's files into a folder."""
        return self.tokenizer.save_pretrained


@dataclass(frozen=True)
class PresetPreparation:
    """Texts to token ids by a preset of KerasHub, all of one length, as KerasHub feeds them.

    Attributes:
        encode: from a text to arrays (L,) by name.
        max_length: L, tokens of a text: longer ones are cut, shorter ones padded.
        digest: SHA-256 of the files that say how.
        extras: writes these files into a folder.
    """

    encode: Callable[[str], Mapping[str, Any]]
    max_length: int
    digest: str
    extras: Callable[[str], Any]

    def __call__(self, raw: str, index: int = 0, view: int | None = None) -> Mapping[str, Tensor]:
        """One text as tensors (L,) of int32; every view is the same."""
        del index, view
        return {n: torch.as_tensor(a, dtype=torch.int32) for n, a in self.encode(raw).items()}

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack to (N, L) per input."""
        return {name: torch.stack([p[name] for p in prepared]) for name in prepared[0]}


@dataclass(frozen=True)
class EncodedTextPreparation:
    """Texts to tensors by a function of the user's.

    Attributes:
        transform: from a text to a tensor, of one shape for all texts.
    """

    transform: Callable[[str], Tensor]
    extras: None = None

    def __call__(self, raw: str, index: int = 0, view: int | None = None) -> Tensor:
        """One text, encoded; every view is the same."""
        del index, view
        return self.transform(raw)

    def collate(self, prepared: Sequence[Tensor]) -> tuple[Tensor]:
        """Stack to (N, ...)."""
        return (torch.stack(list(prepared)),)
