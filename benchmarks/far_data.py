"""Data that is far from photographs, as pictures: handwritten digits, and spoken ones.

What `fit` takes as ``far_data:digits``, for networks that were pretrained on photographs.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from frontier_models import SHARED
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

Samples = list[tuple[Image.Image, str]]
Floats = NDArray[np.float64]

SIDE = 32
#: Samples of the training and the validation split; the rest is for testing, at most so many.
TRAIN, VAL, TEST = 400, 200, 400
#: Samples of a short-time spectrum, at 8 kHz: 32 ms, every 8 ms.
WINDOW, HOP = 256, 64


def digits() -> dict[str, Samples]:
    """Handwritten digits of scikit-learn, 8 x 8 made 32 x 32."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: TRAIN + VAL + TEST]
    made = [(_picture(images[i].reshape(8, 8) / 16), str(labels[i])) for i in order]
    return {"train": made[:TRAIN], "val": made[TRAIN : TRAIN + VAL], "test": made[TRAIN + VAL :]}


def spoken_digits() -> dict[str, Samples]:
    """Spectrograms of spoken digits; the test split is of speakers not heard in training."""
    return {
        name: [
            (_picture(_spectrogram(path)), path.parent.name)
            for path in sorted((SHARED / "data/fsdd" / name).rglob("*.wav"))
        ]
        for name in ("train", "val", "test")
    }


def _spectrogram(path: Path) -> Floats:
    """Levels in [0, 1], low frequencies at the bottom."""
    with wave.open(str(path)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
    sound = np.pad(sound, (0, max(0, 2 * WINDOW - len(sound))))
    starts = range(0, len(sound) - WINDOW + 1, HOP)
    frames = np.stack([sound[s : s + WINDOW] for s in starts]) * np.hanning(WINDOW)
    levels = np.log10(np.abs(np.fft.rfft(frames)) ** 2 + 1)
    return np.flipud((levels / levels.max()).T)


def _picture(levels: Floats) -> Image.Image:
    """Grey levels in [0, 1] as a picture (32, 32, RGB)."""
    grey = Image.fromarray((255 * levels).round().astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB")
