"""Tiny data and tiny models, made anew for each session."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["[PAD]", "[UNK]", "good", "fine", "bad", "poor", "thing", "stuff", "day"]


def write_pictures(folder: Path, classes: Mapping[str, int], *, size: tuple[int, int] = (12, 10)):
    """Class folders of distinct PNGs; each class has a shade of its own."""
    shades = np.random.default_rng(0)
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = shades.integers(0, 60, (*size, 3), dtype=np.uint8) + 60 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def write_table(path: Path, rows: int = 20, *, first: int = 0) -> Path:
    """Two classes in turn, every text different."""
    lines = [
        f"good fine thing number {i},up" if i % 2 else f"bad poor stuff number {i},down"
        for i in range(first, first + rows)
    ]
    path.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "shades", {"dark": 10, "light": 12})


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "moods.csv")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    numbers = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.models.WordLevel(numbers, unk_token=WORDS[1])
    built = tokenizers.Tokenizer(words)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token=WORDS[1], pad_token=WORDS[0], model_max_length=32
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A BERT of random weights, as `save_pretrained` leaves it."""
    import transformers

    from frostline.tasks.hf_source import quiet

    folder = tmp_path_factory.mktemp("bert")
    settings = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with quiet(transformers):
        transformers.BertModel(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of random weights with its image processor."""
    transformers = pytest.importorskip("transformers")
    from frostline.tasks.hf_source import quiet

    folder = tmp_path_factory.mktemp("vit")
    settings = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    with quiet(transformers):
        transformers.ViTModel(settings).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
