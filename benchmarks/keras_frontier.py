"""Linear probing in Keras, with and without the cache: accuracy, whole-fit time, step cost.

MobileNet (alpha 0.25, ImageNet weights) frozen, a new head on flowers5. Three ways:

- *plain*: `model.fit` with `trainable = False` on the backbone;
- *cached*: `frostline.frontier.keras.fit`, the store empty at the start;
- *by hand*: features by `predict`, then `fit` of a model that is the head alone.

Fits are interleaved; ratios are quoted, seconds tell the machine of the day.

    KERAS_BACKEND=tensorflow python benchmarks/keras_frontier.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from PIL import Image

from frostline.frontier.keras import find_region, fit, frozen_model

SHARED = Path(os.environ.get("FROSTLINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
WEIGHTS = SHARED / "models/mobilenet025_keras_imagenet/mobilenet_2_5_224_tf_no_top.h5"
FLOWERS = SHARED / "data/flowers5"
BATCH = 32


def flowers(split: str, size: int, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `(n, size, size, 3)` in [-1, 1] and labels, in a fixed mixed order."""
    files = sorted((FLOWERS / split).glob("*/*.jpg"))
    classes = sorted({file.parent.name for file in files})
    order = np.random.default_rng(0).permutation(len(files))[:most]
    pictures = [Image.open(files[i]).convert("RGB").resize((size, size)) for i in order]
    x = np.stack([np.asarray(p, np.float32) for p in pictures]) / 127.5 - 1
    return x, np.array([classes.index(files[i].parent.name) for i in order])


def probe(size: int) -> keras.Model:
    """The frozen backbone with a new head, compiled."""
    keras.utils.set_random_seed(0)
    body = keras.applications.MobileNet(
        input_shape=(size, size, 3), alpha=0.25, include_top=False, pooling="avg", weights=WEIGHTS
    )
    body.trainable = False
    inputs = keras.Input((size, size, 3))
    return compiled(keras.Model(inputs, scored(body(inputs, training=False))))


def head(width: int) -> keras.Model:
    """The same head alone."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((width,))
    return compiled(keras.Model(inputs, scored(inputs)))


def scored(features: Any) -> Any:
    """Scores of the classes; dropout and learning rate were chosen on the validation pictures."""
    features = layers.BatchNormalization(name="scale")(features)
    features = layers.Dropout(0.3, seed=1, name="drop")(features)
    return layers.Dense(5, name="head")(features)


def compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(6e-3), loss, metrics=["accuracy"])
    return model


class StepTimes(keras.callbacks.Callback):
    """Seconds of each step, without those of the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Remember which one."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop it."""
        if self._epoch:
            self.seconds.append(time.perf_counter() - self._began)


def one_round(data: dict[str, Any], size: int, epochs: int) -> dict[str, dict[str, float]]:
    """Each way once: seconds of the whole fit, of one step, test accuracy."""
    (x, y), (tx, ty) = data["train"], data["test"]
    common = {"batch_size": BATCH, "epochs": epochs, "verbose": 0}

    def plain(times: StepTimes) -> Callable[[], float]:
        model = probe(size)
        model.fit(x, y, callbacks=[times], **common)
        return lambda: model.evaluate(tx, ty, verbose=0)[1]

    def cached(times: StepTimes) -> Callable[[], float]:
        model = probe(size)
        with tempfile.TemporaryDirectory() as place:
            done = fit(model, x, y, callbacks=[times], cache=place, **common)
        if done.report.replayed != done.report.batches:
            raise SystemExit(f"not cached: {done.report.notes}")
        return lambda: model.evaluate(tx, ty, verbose=0)[1]

    def by_hand(times: StepTimes) -> Callable[[], float]:
        frozen = frozen_model(find_region(probe(size), x[:3]))
        features = frozen.predict(x, batch_size=BATCH, verbose=0)
        model = head(features.shape[-1])
        model.fit(features, y, callbacks=[times], **common)
        test = frozen.predict(tx, batch_size=BATCH, verbose=0)
        return lambda: model.evaluate(test, ty, verbose=0)[1]

    found = {}
    for way in (plain, cached, by_hand):
        keras.backend.clear_session()
        times, began = StepTimes(), time.perf_counter()
        score = way(times)
        seconds = time.perf_counter() - began
        found[way.__name__] = {
            "fit_s": seconds,
            "step_s": statistics.median(times.seconds),
            "accuracy": float(score()),
        }
    return found


def summary(rounds: list[dict[str, dict[str, float]]], epochs: int) -> dict[str, Any]:
    """Medians, ratios, and the bound: E epochs of which one runs the frozen part."""

    def middle(way: str, what: str) -> float:
        return statistics.median(r[way][what] for r in rounds)

    def ratios(what: str, over: str, under: str) -> list[float]:
        return sorted(round(r[over][what] / r[under][what], 2) for r in rounds)

    forward = middle("plain", "step_s") / max(middle("by_hand", "step_s"), 1e-9)
    return {
        "epochs": epochs,
        "rounds": len(rounds),
        "accuracy": {way: middle(way, "accuracy") for way in rounds[0]},
        "fit_s": {way: round(middle(way, "fit_s"), 2) for way in rounds[0]},
        "step_ms": {way: round(1e3 * middle(way, "step_s"), 3) for way in rounds[0]},
        "fit plain/cached": ratios("fit_s", "plain", "cached"),
        "fit by hand/cached": ratios("fit_s", "by_hand", "cached"),
        "step plain/cached": ratios("step_s", "plain", "cached"),
        "step cached/by hand": ratios("step_s", "cached", "by_hand"),
        "bound of fit plain/cached": round(epochs * forward / (forward - 1 + epochs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few, small pictures, one round")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    asked = parser.parse_args()
    size, most = (96, 64) if asked.quick else (224, None)
    rounds = 1 if asked.quick else asked.rounds
    data = {split: flowers(split, size, most) for split in ("train", "test")}
    found = [one_round(data, size, asked.epochs) for _ in range(rounds)]
    figures = {
        "keras": keras.version(),
        "backend": keras.backend.backend(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "pictures": len(data["train"][0]),
        "size": size,
        **summary(found, asked.epochs),
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
