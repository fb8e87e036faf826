"""Linear probing in Keras, with and without the cache: accuracy, whole-fit time, step cost.

MobileNet (alpha 0.25, ImageNet weights) frozen, a new head on flowers5. Ways:

- *plain*: `model.fit` with `trainable = False` on the backbone;
- *cached*: `frostline.frontier.keras.fit`, the store empty at the start;
- *found*: the same again, in a store that is full;
- *data set*: the same fed by a shuffled `tf.data.Dataset` (or a `PyDataset`), known by content;
- *by hand*: features by `predict`, then `fit` of a model that is the head alone.

Fits are interleaved, building the model is not timed. Ratios are quoted, seconds tell the machine
of the day.

    KERAS_BACKEND=tensorflow python benchmarks/keras_frontier.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
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


class Shuffled(keras.utils.PyDataset):
    """The same samples in batches without numbers, in another order each epoch."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self.x, self.y = x, y
        self.source = np.random.default_rng(0)
        self.order = self.source.permutation(len(y))

    def __len__(self) -> int:
        return math.ceil(len(self.y) / BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self) -> None:
        """The next epoch has another order."""
        self.order = self.source.permutation(self.order)


def in_batches(x: np.ndarray, y: np.ndarray) -> Any:
    """A data set as users of this backend have it."""
    if keras.backend.backend() != "tensorflow":
        return Shuffled(x, y)
    import tensorflow as tf  # noqa: PLC0415  only where Keras runs on it

    data = tf.data.Dataset.from_tensor_slices((x, y))
    return data.shuffle(len(x), seed=0).batch(BATCH).prefetch(2)


class Rounds:
    """Every way once per round: seconds of the `fit`, of one step, test accuracy."""

    def __init__(self, data: dict[str, Any], size: int, epochs: int) -> None:
        self.size = size
        (self.x, self.y), (self.tx, self.ty) = data["train"], data["test"]
        self.common = {"epochs": epochs, "verbose": 0}

    def ways(self) -> dict[str, Callable[[Path, StepTimes], dict[str, Any]]]:
        """In the order in which they run: "found" has the store of "cached"."""
        return {
            "plain": self.plain, "cached": self.cached, "found": self.cached,
            "data set": self.data_set, "by hand": self.by_hand,
        }  # fmt: skip

    def run(self) -> dict[str, dict[str, Any]]:
        """One round."""
        with tempfile.TemporaryDirectory() as place:
            found = {}
            for name, way in self.ways().items():
                keras.backend.clear_session()
                found[name] = way(Path(place), StepTimes())
            return found

    def plain(self, place: Path, times: StepTimes) -> dict[str, Any]:
        """`model.fit`."""
        model, began = probe(self.size), time.perf_counter()
        model.fit(self.x, self.y, batch_size=BATCH, callbacks=[times], **self.common)
        return self.measured(model, times, time.perf_counter() - began)

    def cached(self, place: Path, times: StepTimes) -> dict[str, Any]:
        """Arrays, with the cache."""
        model, began = probe(self.size), time.perf_counter()
        done = fit(
            model, self.x, self.y, batch_size=BATCH, callbacks=[times], cache=place, **self.common
        )
        seconds = time.perf_counter() - began
        if done.report.replayed != done.report.batches:
            raise SystemExit(f"not cached: {done.report.notes}")
        return self.measured(model, times, seconds, done.report)

    def data_set(self, place: Path, times: StepTimes) -> dict[str, Any]:
        """Batches without numbers, with the cache."""
        model, began = probe(self.size), time.perf_counter()
        done = fit(model, in_batches(self.x, self.y), callbacks=[times], cache=place, **self.common)
        return self.measured(model, times, time.perf_counter() - began, done.report)

    def by_hand(self, place: Path, times: StepTimes) -> dict[str, Any]:
        """Features first, then the head alone."""
        model, began = probe(self.size), time.perf_counter()
        frozen = frozen_model(find_region(model, self.x[:3]))
        features = frozen.predict(self.x, batch_size=BATCH, verbose=0)
        rest = head(features.shape[-1])
        rest.fit(features, self.y, batch_size=BATCH, callbacks=[times], **self.common)
        seconds = time.perf_counter() - began
        test = frozen.predict(self.tx, batch_size=BATCH, verbose=0)
        return self.measured(rest, times, seconds, on=test)

    def measured(
        self, model: keras.Model, times: StepTimes, seconds: float, report: Any = None,
        on: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The figures of one fit."""
        score = model.evaluate(self.tx if on is None else on, self.ty, verbose=0)[1]
        parts = ("find_s", "fill_s", "compute_s", "check_s", "read_s")
        return {
            "fit_s": seconds,
            "step_s": statistics.median(times.seconds),
            "accuracy": float(score),
            "parts": {name: round(getattr(report, name), 3) for name in parts} if report else {},
        }


def summary(rounds: list[dict[str, dict[str, Any]]], epochs: int) -> dict[str, Any]:
    """Medians, ratios, and the bound: E epochs of which one runs the frozen part."""

    def middle(way: str, what: str) -> float:
        return statistics.median(r[way][what] for r in rounds)

    def ratios(what: str, over: str, under: str) -> list[float]:
        return sorted(round(r[over][what] / r[under][what], 2) for r in rounds)

    forward = middle("plain", "step_s") / max(middle("by hand", "step_s"), 1e-9)
    return {
        "epochs": epochs,
        "rounds": len(rounds),
        "accuracy": {way: middle(way, "accuracy") for way in rounds[0]},
        "fit_s": {way: round(middle(way, "fit_s"), 2) for way in rounds[0]},
        "step_ms": {way: round(1e3 * middle(way, "step_s"), 3) for way in rounds[0]},
        "fit plain/cached": ratios("fit_s", "plain", "cached"),
        "fit plain/found": ratios("fit_s", "plain", "found"),
        "fit plain/data set": ratios("fit_s", "plain", "data set"),
        "fit by hand/cached": ratios("fit_s", "by hand", "cached"),
        "step plain/cached": ratios("step_s", "plain", "cached"),
        "step cached/by hand": ratios("step_s", "cached", "by hand"),
        "step data set/by hand": ratios("step_s", "data set", "by hand"),
        "parts": {way: rounds[-1][way]["parts"] for way in ("cached", "found", "data set")},
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
    one = Rounds(data, size, asked.epochs)
    found = [one.run() for _ in range(rounds)]
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
