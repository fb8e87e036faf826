"""The cache of Keras models: what counts as frozen, what is noticed, and what moves with a plan."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

sys.path.insert(0, str(Path(__file__).resolve().parent))
from keras_zoo import (
    BATCH,
    compiled,
    custom,
    freeze_first,
    labels,
    long_unless,
    mlp,
    noisy,
    vectors,
)

from frostline.errors import ConfigError, FrontierError
from frostline.frontier.keras import cached, find_region, fit, frozen_model, rest_model, session
from frostline.frontier.keras.features import Features
from frostline.frontier.keras.parts import data_parts, region_key
from frostline.frontier.keras.region import as_numpy, close
from frostline.frontier.library import Library
from frostline.integrations.keras import FreezeCallback

#: Keras's own conversions of variables to arrays are older than NumPy's `copy` keyword.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": BATCH, "verbose": 0}


class Counting(layers.Layer):
    """Counts its calls in a variable."""

    def build(self, shape: Any) -> None:
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.count.assign_add(1.0)
        return x


class Noise(layers.Layer):
    """Draws in inference, too."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x: Any) -> Any:
        return x + keras.random.normal(ops.shape(x), seed=self.seed_generator)


class Hidden(layers.Layer):
    """Answers differently each time, from a number that Keras does not know."""

    calls = 0

    def call(self, x: Any) -> Any:
        self.calls += 1
        return x * float(self.calls)


class Centred(layers.Layer):
    """Mixes the samples of a batch."""

    def call(self, x: Any) -> Any:
        return x - ops.mean(x, axis=0, keepdims=True)


class Penalty(layers.Layer):
    """Adds to the loss."""

    def call(self, x: Any) -> Any:
        self.add_loss(1e-2 * ops.mean(ops.square(x)))
        return x


FAULTS: dict[str, tuple[Callable[[], keras.Layer], str]] = {
    "state": (Counting, "changes its"),
    "random": (Noise, "draws random numbers"),
    "dropout": (lambda: layers.Dropout(0.5, seed=2), "draws random numbers"),
    "hidden": (Hidden, "another result when it runs again"),
    "mixing": (Centred, "mixes the samples"),
    "statistics": (layers.BatchNormalization, "trains"),
    "penalty": (Penalty, "adds to the loss"),
    "regularizer": (lambda: layers.ActivityRegularization(1e-3), "adds to the loss"),
}


def faulty(kind: str) -> keras.Model:
    """Frozen layers around one that must run at each step."""
    inputs = keras.Input((8,))
    x = layers.Dense(6, activation="relu", name="first")(inputs)
    fault = FAULTS[kind][0]()
    fault.name = "fault"
    x = fault(x)
    x = layers.Dense(6, activation="relu", name="second")(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    model.get_layer("first").trainable = model.get_layer("second").trainable = False
    return compiled(noisy(model))


@pytest.mark.parametrize("kind", FAULTS)
def test_what_must_run_at_each_step_is_live(kind: str) -> None:
    model = faulty(kind)
    before = [np.array(as_numpy(v)) for v in model.variables]
    region = find_region(model, vectors())
    assert region.frozen == ("first",)
    assert FAULTS[kind][1] in region.reasons["fault"]
    # Trying leaves no trace.
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(as_numpy(variable), value)


@pytest.mark.parametrize("kind", sorted(FAULTS.keys() - {"hidden"}))
def test_and_trains_as_it_does_in_plain_keras(kind: str, tmp_path: Path) -> None:
    found = []
    for cache in (None, tmp_path):
        keras.backend.clear_session()
        keras.utils.set_random_seed(4)
        model = faulty(kind)
        keras.utils.set_random_seed(5)
        if cache is None:
            history = model.fit(vectors(), labels(), **SETTINGS)
        else:
            done = fit(model, vectors(), labels(), cache=cache, **SETTINGS)
            history = done.history
            assert done.report.replayed == done.report.batches
        found.append((history.history, [as_numpy(v) for v in model.variables]))
    (one, weights), (other, others) = found
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_the_two_parts_make_the_whole() -> None:
    model = custom().model
    freeze_first(model, 0.6)
    region = find_region(model, vectors())
    x = ops.convert_to_tensor(vectors())
    whole = model(x, training=False)
    parts = rest_model(region)(frozen_model(region)(x), training=False)
    np.testing.assert_array_equal(as_numpy(parts), as_numpy(whole))
    assert {id(v) for v in rest_model(region).trainable_variables} == {
        id(v) for v in model.trainable_variables
    }


class Subclassed(keras.Model):
    """A model by its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = layers.Dense(4), layers.Dense(3)
        self.body.trainable = False

    def call(self, x: Any) -> Any:
        return self.head(self.body(x))


class OwnStep(keras.Model):
    """A functional model whose step looks at the samples."""

    def compute_metrics(self, x: Any, *rest: Any, **more: Any) -> Any:
        return super().compute_metrics(x, *rest, **more)


def refused_models() -> dict[str, keras.Model]:
    inputs = keras.Input((8,))
    body = layers.Dense(4, trainable=False)
    own = OwnStep(inputs, layers.Dense(3)(body(inputs)))
    live = keras.Sequential([keras.Input((8,)), layers.Dense(3)])
    subclassed = Subclassed()
    subclassed(vectors())
    return {"records no graph": subclassed, "sees the samples": own, "trains": live}


@pytest.mark.parametrize("why", ["records no graph", "sees the samples", "trains"])
def test_what_cannot_be_cached_trains_all_the_same(why: str, tmp_path: Path) -> None:
    model = compiled(refused_models()[why])
    done = fit(model, vectors(), labels(), cache=tmp_path, **SETTINGS)
    assert done.report.replayed == 0
    assert why in " ".join(done.report.notes)
    assert done.history.history["loss"][-1] < done.history.history["loss"][0]


def both(tmp_path: Path, **more: Any) -> tuple[Any, Any, Any]:
    """Histories and weights, plain and cached, of a Sequential half frozen, and the report."""
    found = []
    for cache in (None, tmp_path):
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = mlp().model
        freeze_first(model, 0.5)
        keras.utils.set_random_seed(2)
        callbacks = [make() for make in more.get("callbacks", ())]
        settings = SETTINGS | {"callbacks": callbacks} | more.get("settings", {})
        if cache is None:
            history, report = model.fit(vectors(), labels(), **settings), None
        else:
            done = fit(model, vectors(), labels(), cache=cache, **settings)
            history, report = done.history, done.report
        found.append((history.history, [as_numpy(v) for v in model.variables]))
    return (*found, report)


def same(one: Any, other: Any, **close_to: float) -> None:
    close_to = close_to or {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(other[0]["loss"], one[0]["loss"], **close_to)
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(b, a, **close_to)


class Meddler(keras.callbacks.Callback):
    """Writes to a frozen weight in the midst of training."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            weight = self.model.layers[0].weights[0]
            weight.assign(as_numpy(weight) * 1.5)


def test_frozen_weights_that_change_are_noticed(tmp_path: Path) -> None:
    plain, cached, report = both(tmp_path, callbacks=[Meddler])
    same(plain, cached)
    assert "frozen weights have changed" in " ".join(report.notes)


class Writer(keras.callbacks.Callback):
    """Gives the model other weights: between two epochs, or between two steps."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.epoch = when, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        if (self.when, epoch) == ("epoch", 1):
            self.write()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.when, self.epoch, batch) == ("step", 1, 0):
            self.write()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if (self.when, epoch) == ("end", 0):
            self.write()

    def write(self) -> None:
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # else a running epoch does not see what is written
        self.model.set_weights([0.9 * weight for weight in self.model.get_weights()])


@pytest.mark.parametrize("when", long_unless(["epoch", "step", "end"], ["step"]))
def test_weights_that_a_callback_sets_are_believed_at_once(when: str, tmp_path: Path) -> None:
    settings = {"validation_data": (vectors(seed=1)[:10], labels()[:10])}
    plain, cached, report = both(tmp_path, callbacks=[lambda: Writer(when)], settings=settings)
    same(plain, cached)
    np.testing.assert_allclose(cached[0]["val_loss"], plain[0]["val_loss"], rtol=1e-5)
    assert "frozen weights have changed" in " ".join(report.notes)
    assert report.replayed == report.batches
    assert report.filled_rows == 2 * (len(vectors()) + 10)


@pytest.mark.parametrize("when", long_unless(["epoch", "step"], ["step"]))
def test_and_under_a_policy_the_proof_says_so(when: str, tmp_path: Path) -> None:
    def run(cache: Any) -> tuple[Any, Any]:
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = mlp().model
        keras.utils.set_random_seed(2)
        callback = FreezeCallback("gradual:every=2ep")
        settings = SETTINGS | {"callbacks": [Writer(when), callback]}
        if cache is None:
            model.fit(vectors(), labels(), **settings)
        else:
            done = fit(model, vectors(), labels(), cache=cache, **settings)
            assert "frozen weights have changed" in " ".join(done.report.notes)
        assert "set_weights" not in vars(model)
        return callback.certificate, [as_numpy(v) for v in model.variables]

    (one, weights), (other, others) = run(None), run(tmp_path)
    assert len(one.holds) == len(other.holds)
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_policies_move_the_frontier(tmp_path: Path) -> None:
    for spec in ("gradual:every=1ep", "freezeout"):
        callbacks = [lambda spec=spec: FreezeCallback(spec)]
        plain, cached, report = both(tmp_path / spec[:5], callbacks=callbacks)
        same(plain, cached)
        assert report.replayed > 0
        assert len([note for note in report.notes if "are frozen; kept" in note]) >= 2


def test_a_policy_that_reads_frozen_layers_is_not_cached(tmp_path: Path) -> None:
    callback = FreezeCallback("egeria:tolerance=2,window=2,every=2st")
    model = mlp().model
    done = fit(model, vectors(), labels(), cache=tmp_path, callbacks=[callback], **SETTINGS)
    assert "the policy reads" in done.report.notes[0]
    assert not done.report.replayed


@pytest.mark.parametrize("settings", [{"shuffle": False}, {"validation_split": 0.25},
                                      {"class_weight": {0: 1.0, 1: 2.0, 2: 0.5}}])  # fmt: skip
def test_settings_of_fit_mean_what_they_mean(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, cached, report = both(tmp_path, settings=settings)
    same(plain, cached)
    assert report.replayed == report.batches > 0


def test_a_second_run_finds_what_the_first_stored(tmp_path: Path) -> None:
    _, _, first = both(tmp_path)
    _, _, second = both(tmp_path)
    assert (first.found_rows, second.filled_rows) == (0, 0)
    assert second.found_rows == first.filled_rows == len(vectors())


def test_damaged_rows_are_computed_again(tmp_path: Path) -> None:
    both(tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.parent.name == "rows" and f.suffix != ".json"]
    for file in files:
        data = bytearray(file.read_bytes())
        for place in range(0, len(data), 97):
            data[place] ^= 0x40
        file.write_bytes(data)
    plain, cached, report = both(tmp_path)
    same(plain, cached)
    assert report.filled_rows > 0


def test_stored_values_that_are_wrong_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "CHECKED_EVERY", 1)
    real = Features.read
    state = {"reads": 0}

    def read(self: Any, rows: Any, report: Any) -> Any:
        values = real(self, rows, report)
        state["reads"] += 1
        return [value + 1 for value in values] if state["reads"] > 4 else values

    monkeypatch.setattr(Features, "read", read)
    with caplog.at_level(logging.WARNING, logger="frostline"):
        _, _, report = both(tmp_path)
    assert "not cached any more: the outputs differ" in " ".join(report.notes)
    assert "not cached any more" in caplog.text
    assert 0 < report.replayed < report.batches


def test_lossy_values_are_close(tmp_path: Path) -> None:
    plain, cached, report = both(tmp_path, settings={})
    exact = report.stored_bytes
    keras.backend.clear_session()
    keras.utils.set_random_seed(1)
    model = mlp().model
    freeze_first(model, 0.5)
    keras.utils.set_random_seed(2)
    done = fit(model, vectors(), labels(), cache=tmp_path, dtype="bfloat16", **SETTINGS)
    np.testing.assert_allclose(done.history.history["loss"], plain[0]["loss"], rtol=2e-2)
    assert done.report.stored_bytes <= exact
    assert done.report.replayed == done.report.batches
    same(plain, cached)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = mlp().model
    freeze_first(model, 0.5)
    fit(model, vectors(), labels(), cache=tmp_path, **SETTINGS)
    assert not {"call", "set_weights", "load_weights"} & vars(model).keys()
    before = model.evaluate(vectors(), labels(), verbose=0, return_dict=True)
    assert np.isfinite(before["loss"])
    history = model.fit(vectors(), labels(), **SETTINGS).history
    assert np.isfinite(history["loss"]).all()
    np.testing.assert_array_equal(model.predict(vectors(), verbose=0).shape, (len(vectors()), 3))


def test_frontier_values_are_data_for_other_loops(tmp_path: Path) -> None:
    model = mlp().model
    freeze_first(model, 0.5)
    x, y = vectors(), labels()
    with cached(model, x, cache=tmp_path) as data:
        rows = np.array([5, 0, 33])
        wanted = model.predict(x[rows], verbose=0)
        np.testing.assert_allclose(
            data.rest.predict(data.values(rows)[0], verbose=0), wanted, rtol=1e-5, atol=1e-6
        )
        one, again = (data.batches(y, batch_size=16, seed=3) for _ in range(2))
        first = [one.rows(i).tolist() for i in range(len(one))]
        assert first == [again.rows(i).tolist() for i in range(len(again))]
        assert sorted(np.concatenate(first).tolist()) == list(range(len(x)))
        one.on_epoch_end()
        assert first != [one.rows(i).tolist() for i in range(len(one))]
        compiled(data.rest)
        before = [as_numpy(v) for v in model.trainable_variables]
        data.rest.fit(again, epochs=1, shuffle=False, verbose=0)
    moved = [
        not np.array_equal(a, as_numpy(v))
        for a, v in zip(before, model.trainable_variables, strict=True)
    ]
    assert all(moved)
    for layer in model.layers:
        layer.trainable = True
    with pytest.raises(FrontierError, match="no layer with weights is frozen"):
        cached(model, x, cache=tmp_path)


def test_the_key_says_what_values_depend_on() -> None:
    def key(**change: Any) -> Any:
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = custom().model
        freeze_first(model, 0.6)
        if "weight" in change:
            weight = model.layers[1].weights[0]
            weight.assign(as_numpy(weight) + 1)
        if "setting" in change:
            model.layers[1].width = 7
        x = vectors(seed=change.get("seed", 0))
        return region_key(find_region(model, x), data=data_parts([x]))

    first = key()
    assert not first.unknown
    assert first.digest == key().digest
    assert "weights of" in first.differences(key(weight=True))[0]
    assert "code or settings of gate" in first.differences(key(setting=True))[0]
    assert "data" in first.differences(key(seed=1))[0]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    model = mlp().model
    with pytest.raises(ConfigError, match="bfloat16"):
        fit(model, vectors(), labels(), cache=tmp_path, dtype="float7")
    with pytest.raises(FrontierError, match="arrays"):
        fit(model, [list(row) for row in vectors()], labels(), cache=tmp_path)
    with pytest.raises(FrontierError, match="samples first"):
        fit(model, vectors()[:, None], labels(), cache=tmp_path)


def test_no_room_is_said_and_trains_uncached(tmp_path: Path) -> None:
    model = mlp().model
    freeze_first(model, 0.5)
    library = Library(tmp_path)
    done = fit(model, vectors(), labels(), cache=library, most_bytes=10, **SETTINGS)
    assert not done.report.replayed
    assert "used up" in done.report.notes[0]


def test_closeness_is_relative_to_the_largest() -> None:
    one = np.array([1e3, 1e-3], np.float32)
    assert close(one, one + np.float32(1e-3))
    assert not close(one, one + np.float32(1.0))
    assert not close(one, one.astype(np.float64))
    assert not close(np.array([np.nan]), np.array([1.0]))
