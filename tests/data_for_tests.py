"""Data that tests name as `data_for_tests:NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def _gray(value: int) -> np.ndarray:
    return np.full((8, 9), value, dtype=np.uint8)


def arrays() -> list[tuple[np.ndarray, int]]:
    """Gray pictures of two classes, all different."""
    return [(_gray(i + 100 * (i % 2)), i % 2) for i in range(40)]


def pil_splits() -> dict[str, list[tuple[Any, str]]]:
    """RGB pictures with splits of their own."""
    pairs = [(Image.fromarray(a).convert("RGB"), "ab"[y]) for a, y in arrays()]
    return {"train": pairs[:20], "validation": pairs[20:30], "test": pairs[30:]}


def texts() -> list[tuple[str, str]]:
    """Labelled texts."""
    return [(f"text number {i}", "ab"[i % 2]) for i in range(40)]


def text_dataset() -> Any:
    """A Hugging Face data set with class names."""
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"sentence": [f"text {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    return datasets.Dataset.from_dict(rows, features=features)


def image_dataset() -> Any:
    """A Hugging Face data set of encoded pictures."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = [{"image": Image.fromarray(a).convert("RGB"), "label": "ab"[y]} for a, y in arrays()]
    return datasets.Dataset.from_list(rows, features=features)


def floats() -> list[tuple[np.ndarray, int]]:
    """Pictures of the wrong number type."""
    return [(_gray(i) / 255.0, i % 2) for i in range(40)]


def paths_absent() -> list[tuple[Path, int]]:
    """Pictures that are not there."""
    return [(Path(f"absent-{i}.png"), i % 2) for i in range(40)]


def unlabelled() -> list[np.ndarray]:
    """Pictures without labels."""
    return [a for a, _ in arrays()]


def none_labels() -> list[tuple[np.ndarray, int | None]]:
    """Pictures one of which lost its label."""
    return [*arrays(), (_gray(77), None)]


def empty() -> list[Any]:
    """Nothing."""
    return []


def raises() -> list[Any]:
    """A function with a bug."""
    raise ZeroDivisionError("a bug")


def number() -> int:
    """Not data."""
    return 5


def odd_split() -> dict[str, Any]:
    """A split of unknown meaning."""
    return {"train": arrays(), "spare": arrays()}


def mixed() -> dict[str, Any]:
    """Pictures to learn from and texts to test on."""
    return {"train": arrays(), "test": texts()}


not_callable = 3
