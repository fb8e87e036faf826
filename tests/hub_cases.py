"""Tiny text classifiers of KerasHub, of random weights; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "fine", "bad", "poor", "thing",
         "stuff", "number", "##s"]  # fmt: skip
LENGTH = 12


def classifier(kind: str = "Bert", *, classes: int = 2, seed: int = 3) -> Any:
    """A classifier with its preprocessor: two transformer blocks of width 16."""
    import keras
    import keras_hub

    models = keras_hub.models
    keras.utils.set_random_seed(seed)
    tokenizer = getattr(models, f"{kind}Tokenizer")(vocabulary=WORDS, lowercase=True)
    preprocessor = getattr(models, f"{kind}TextClassifierPreprocessor")(
        tokenizer, sequence_length=LENGTH
    )
    backbone = getattr(models, f"{kind}Backbone")(
        vocabulary_size=len(WORDS), num_layers=2, num_heads=2, hidden_dim=16,
        intermediate_dim=32, max_sequence_length=LENGTH, name=f"{kind.lower()}_backbone",
    )  # fmt: skip
    make = getattr(models, f"{kind}TextClassifier")
    return make(backbone, num_classes=classes, preprocessor=preprocessor, name="moods")


def preset(folder: Path, kind: str = "Bert", **more: Any) -> Path:
    """The same as `save_to_preset` writes it."""
    classifier(kind, **more).save_to_preset(str(folder))
    return folder
