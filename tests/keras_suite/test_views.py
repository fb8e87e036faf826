"""Augmented views in the cache of Keras models: what is drawn, when, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

sys.path.insert(0, str(Path(__file__).resolve().parent))
from keras_zoo import BATCH, SAMPLES, compiled, labels, long, mlp, noisy, pictures, vectors

from frostline.errors import ConfigError
from frostline.frontier.keras import find_region, fit
from frostline.frontier.keras.features import Samples, Shelf, drawn
from frostline.frontier.keras.forward import Forward
from frostline.frontier.keras.region import as_numpy, frozen_model
from frostline.frontier.report import CacheReport
from frostline.frontier.views import Views

STEPS = -(-SAMPLES // BATCH)
SETTINGS: dict[str, Any] = {"batch_size": BATCH, "verbose": 0}


def augmenting(*front: keras.Layer, between: tuple[keras.Layer, ...] = ()) -> keras.Model:
    """Random layers, a frozen body, a head that trains."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(1)
    body = [
        layers.Conv2D(4, 3, strides=3, activation="relu", name="body1"),
        *between,
        layers.Conv2D(4, 3, activation="relu", name="body2"),
    ]
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            *front,
            *body,
            layers.Flatten(name="flat"),
            layers.Dense(3, name="head"),
        ]
    )
    for layer in body:
        layer.trainable = False
    return compiled(noisy(model), metrics=["accuracy"])


def flip() -> keras.Layer:
    return layers.RandomFlip("horizontal", seed=1, name="flip")


class Blend(layers.Layer):
    """Draws, and mixes each sample with the one before."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x: Any, training: bool = False) -> Any:
        if not training:
            return x
        share = keras.random.uniform((), seed=self.seed_generator)
        return x + share * ops.roll(x, 1, axis=0)


def train(model: keras.Model, place: Path, epochs: int, **more: Any) -> Any:
    keras.utils.set_random_seed(2)
    return fit(model, pictures(), labels(), cache=place, epochs=epochs, **(SETTINGS | more))


def test_random_layers_in_front_are_stored_in_views(tmp_path: Path) -> None:
    done = train(augmenting(flip()), tmp_path, 5, views=2)
    report = done.report
    assert np.isfinite(done.history.history["loss"]).all()
    # Two views of all samples, and the one block that was compared in inference.
    assert 2 * SAMPLES < report.filled_rows <= 3 * SAMPLES
    assert report.batches == 5 * STEPS
    assert report.replayed >= 3 * STEPS
    said = " ".join(report.notes)
    assert "2 augmented views; epoch 3 on alternates between them; drawn by seed 0: flip" in said


@long
def test_a_later_run_finds_them_and_more_views_are_added(tmp_path: Path) -> None:
    train(augmenting(flip()), tmp_path, 2, views=2)
    again = train(augmenting(flip()), tmp_path, 3, views=3).report
    assert again.found_rows >= 2 * SAMPLES
    assert again.filled_rows == SAMPLES
    other = train(augmenting(flip()), tmp_path, 2, views=Views(2, seed=1)).report
    assert other.filled_rows == 2 * SAMPLES


def test_what_is_stored_is_the_body_on_augmented_samples() -> None:
    model, x = augmenting(flip()), pictures()
    region = find_region(model, x, draws=True)
    assert region.draws == ("flip",)
    assert "body2" in region.frozen
    forward = Forward(frozen_model(region), model, region.seeds)
    before = [np.array(as_numpy(v)) for v in model.variables]
    views = Views(3)
    blocks = [drawn(forward, views, view)([x[:32]], 0)[0] for view in range(3)]
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(as_numpy(variable), value)  # no trace
    straight, mirrored = forward([x[:32]])[0], forward([x[:32, :, ::-1]])[0]
    for block in blocks:
        one = np.isclose(block, straight, atol=1e-5).reshape(32, -1).all(1)
        other = np.isclose(block, mirrored, atol=1e-5).reshape(32, -1).all(1)
        assert (one | other).all()
        assert 0 < other.sum() < 32
    assert not np.array_equal(blocks[0], blocks[1])
    np.testing.assert_array_equal(drawn(forward, views, 1)([x[:32]], 0)[0], blocks[1])
    assert not np.array_equal(drawn(forward, Views(3, seed=1), 1)([x[:32]], 0)[0], blocks[1])


def test_evaluation_is_not_augmented(tmp_path: Path) -> None:
    model = augmenting(flip())
    taken = pictures(seed=4)[:10], labels()[:10]
    done = train(model, tmp_path, 2, views=2, validation_data=taken)
    wanted = model.evaluate(*taken, verbose=0, return_dict=True)
    assert done.history.history["val_loss"][-1] == pytest.approx(wanted["loss"], rel=1e-5)
    model = augmenting(flip())
    done = train(model, tmp_path / "split", 2, views=2, validation_split=0.25)
    wanted = model.evaluate(pictures()[30:], labels()[30:], verbose=0, return_dict=True)
    assert done.history.history["val_loss"][-1] == pytest.approx(wanted["loss"], rel=1e-5)


def test_without_views_the_report_says_what_to_do(tmp_path: Path) -> None:
    report = train(augmenting(flip()), tmp_path, 1).report
    assert not report.replayed
    assert "flip draws random numbers in training" in report.notes[0]
    assert "views=4 stores that many versions" in report.notes[0]


def test_nothing_random_means_one_version(tmp_path: Path) -> None:
    model = mlp().model
    for layer in model.layers[:2]:
        layer.trainable = False
    done = fit(model, vectors(), labels(), cache=tmp_path, views=3, epochs=2, **SETTINGS)
    assert done.report.filled_rows == SAMPLES
    assert any("each sample is stored once" in note for note in done.report.notes)


def test_what_draws_behind_weights_stays_live() -> None:
    drop = layers.Dropout(0.5, seed=1, name="drop")
    region = find_region(augmenting(flip(), between=(drop,)), pictures(), draws=True)
    assert region.frozen == ("flip", "body1")
    assert "drop" in region.reasons


def test_augmentation_that_mixes_samples_is_live(tmp_path: Path) -> None:
    region = find_region(augmenting(Blend(name="blend")), pictures(), draws=True)
    assert "mixes the samples" in region.reasons["blend"]
    done = train(augmenting(Blend(name="blend")), tmp_path, 1, views=2)
    assert not done.report.replayed
    assert "mixes the samples" in done.report.notes[0]


def test_views_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="count"):
        train(augmenting(flip()), tmp_path, 1, views=0)


class Told:
    """Features that say which view was read."""

    def __init__(self, view: int | None) -> None:
        self.view = -1 if view is None else view

    def read(self, rows: Any, report: Any) -> list[Any]:
        return [np.stack([np.full(len(rows), self.view), rows], axis=1)]


def test_each_epoch_reads_the_views_of_its_number() -> None:
    views = Views(3, seed=5)
    shelf: Any = Shelf(Samples("train", [vectors()]), views, Told)  # pyright: ignore[reportArgumentType]
    rows, report = np.array([7, 3, 20, 3]), CacheReport()
    for epoch in range(9):
        ((found,)) = shelf.read(rows, report, epoch=epoch)
        np.testing.assert_array_equal(found[:, 0], views.of(epoch, rows))
        np.testing.assert_array_equal(found[:, 1], rows)
    ((calm,)) = shelf.read(rows, report, epoch=None)
    assert set(calm[:, 0].tolist()) == {-1}
