"""The cache of Keras models fed with data sets and generators: samples known by their content."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from keras_zoo import (
    BATCH,
    SAMPLES,
    branches,
    compiled,
    freeze_first,
    labels,
    long,
    long_unless,
    mlp,
    noisy,
    vectors,
)

from frostline.errors import FrontierError
from frostline.frontier.encodings import Column
from frostline.frontier.keras import cached, fit, session
from frostline.frontier.keras import contents as contents_module
from frostline.frontier.keras.arrivals import Arrivals, row_digests
from frostline.frontier.keras.contents import Contents
from frostline.frontier.keras.region import as_numpy
from frostline.frontier.key import CacheKey
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.integrations.keras import FreezeCallback

STEPS = -(-SAMPLES // BATCH)
BACKEND = keras.backend.backend()


class Rows(keras.utils.PyDataset):
    """Batches of arrays; reshuffled by itself after each epoch, or noisy, or endless."""

    def __init__(
        self, x: Any, y: Any, *, shuffled: bool = False, noise: float = 0.0, endless: bool = False
    ) -> None:
        super().__init__()
        self.x, self.y, self.shuffled, self.noise, self.endless = x, y, shuffled, noise, endless
        self.source = np.random.default_rng(3)
        self.order = np.arange(len(y))

    @property
    def num_batches(self) -> int | None:
        return None if self.endless else -(-len(self.y) // BATCH)

    def __getitem__(self, index: int) -> Any:
        index %= -(-len(self.y) // BATCH)
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        x = self.x[rows]
        return x + self.noise * self.source.normal(size=x.shape).astype(x.dtype), self.y[rows]

    def on_epoch_end(self) -> None:
        if self.shuffled:
            self.order = self.source.permutation(self.order)


def generator(x: Any, y: Any) -> Iterator[Any]:
    data = Rows(x, y)
    while True:
        for index in range(STEPS):
            yield data[index]


def tf_data(x: Any, y: Any) -> Any:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((x, y))
    return data.shuffle(SAMPLES, seed=5).batch(BATCH).prefetch(2)


def loader(x: Any, y: Any) -> Any:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    order = torch.Generator().manual_seed(4)
    return DataLoader(data, batch_size=BATCH, shuffle=True, generator=order)


INPUTS: dict[str, Callable[[Any, Any], Any]] = {
    "in order": Rows,
    "reshuffled": lambda x, y: Rows(x, y, shuffled=True),
    "generator": generator,
}
if BACKEND == "tensorflow":
    INPUTS["tf.data"] = tf_data
if BACKEND == "torch":
    INPUTS["loader"] = loader


def both(make: Callable[[], Any], tmp_path: Path, **more: Any) -> tuple[Any, Any, Any]:
    """History and weights, plain and cached, of a Sequential half frozen, and the report."""
    found = []
    report = None
    for cache in (None, tmp_path):
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = more.get("model", lambda: mlp().model)()
        freeze_first(model, 0.5)
        keras.utils.set_random_seed(2)
        data = make()
        x, y = data if isinstance(data, tuple) else (data, None)
        wanted: dict[str, Any] = {"epochs": 3, "verbose": 0} | more.get("settings", {})
        wanted["callbacks"] = [one() for one in more.get("callbacks", ())]
        if "validation" in more:
            wanted["validation_data"] = more["validation"]()
        if cache is None:
            history = model.fit(x, y, **wanted)
        else:
            done = fit(model, x, y, cache=cache, **wanted, **more.get("cached", {}))
            history, report = done.history, done.report
        found.append((history.history, [as_numpy(v) for v in model.variables]))
    return (*found, report)


def same(one: Any, other: Any) -> None:
    assert one[0].keys() == other[0].keys()
    for metric, values in one[0].items():
        np.testing.assert_allclose(other[0][metric], values, rtol=1e-5, atol=1e-6)
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", long_unless(INPUTS, ("reshuffled", "tf.data")))
def test_any_input_trains_as_in_plain_keras(kind: str, tmp_path: Path) -> None:
    settings = {"generator": {"steps_per_epoch": STEPS, "shuffle": False}}.get(kind, {})
    if kind in ("tf.data", "loader"):
        settings["shuffle"] = False  # they do it themselves
    plain, found, report = both(
        lambda: INPUTS[kind](vectors(), labels()), tmp_path, settings=settings
    )
    same(plain, found)
    assert report.filled_rows == SAMPLES  # each sample once, whatever the order
    assert report.batches == 3 * STEPS
    assert report.replayed >= 2 * STEPS
    assert any("known by content" in note for note in report.notes)


@long
def test_a_later_run_finds_what_the_first_stored(tmp_path: Path) -> None:
    both(lambda: Rows(vectors(), labels(), shuffled=True), tmp_path)
    plain, found, report = both(lambda: Rows(vectors(), labels(), shuffled=True), tmp_path)
    same(plain, found)
    assert (report.found_rows, report.filled_rows) == (SAMPLES, 0)
    assert report.computed_rows <= BATCH  # the first batch
    assert report.replayed == report.batches


@long
def test_validation_data_may_be_of_another_kind(tmp_path: Path) -> None:
    taken = vectors(seed=2)[:10], labels()[:10]
    for train, validation, rows in (
        (lambda: Rows(vectors(), labels()), lambda: taken, SAMPLES + 10),
        (lambda: (vectors(), labels()), lambda: Rows(*taken), SAMPLES + 10),
        (lambda: Rows(vectors(), labels()), lambda: Rows(*taken), SAMPLES + 10),
    ):
        plain, found, report = both(
            train, tmp_path / str(len(list(tmp_path.iterdir()))), validation=validation,
            settings={"epochs": 2, "batch_size": None if isinstance(train(), Rows) else BATCH},
        )  # fmt: skip
        same(plain, found)
        assert report.filled_rows == rows


def test_samples_that_never_come_again_are_given_up(tmp_path: Path) -> None:
    plain, found, report = both(
        lambda: Rows(vectors(), labels(), noise=0.1), tmp_path, settings={"epochs": 4}
    )
    same(plain, found)
    assert report.filled_rows == SAMPLES  # those of the first epoch, no more
    assert report.computed_rows == 2 * SAMPLES  # of the third epoch on the whole model runs
    assert report.replayed <= 1
    assert any("differ from epoch to epoch" in note and "views=4" in note for note in report.notes)


@long
def test_policies_move_the_frontier_here_too(tmp_path: Path) -> None:
    plain, found, report = both(
        lambda: Rows(vectors(), labels(), shuffled=True), tmp_path,
        callbacks=[lambda: FreezeCallback("gradual:every=1ep")],
    )  # fmt: skip
    same(plain, found)
    assert report.replayed > 0


@long
def test_one_step_may_take_several_batches(tmp_path: Path) -> None:
    if BACKEND == "torch":
        pytest.skip("Keras on PyTorch takes one")

    def model() -> Any:
        sample = mlp()
        return compiled(sample.model, steps_per_execution=2)

    plain, found, report = both(lambda: Rows(vectors(), labels()), tmp_path, model=model)
    same(plain, found)
    assert report.batches == 3 * STEPS


class OwnFunction(keras.callbacks.Callback):
    """Puts a compiled step of the user's in place of Keras's."""

    def on_train_begin(self, logs: Any = None) -> None:
        import tensorflow as tf

        model = self.model
        model.train_function = tf.function(lambda batches: model.train_step(batches.get_next()))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="functions of TensorFlow's iterators")
@pytest.mark.parametrize("kind", ["arrays", "in order"])
def test_steps_that_others_compiled_are_fed_too(kind: str, tmp_path: Path) -> None:
    arrays = vectors(), labels()
    plain, found, report = both(
        lambda: arrays if kind == "arrays" else Rows(*arrays), tmp_path,
        callbacks=[OwnFunction], settings={"batch_size": BATCH},
    )  # fmt: skip
    same(plain, found)
    assert report.replayed >= 2 * STEPS


@long
def test_inputs_that_the_rest_reads_come_along(tmp_path: Path) -> None:
    plain, found, report = both(
        lambda: Rows(vectors(), labels()), tmp_path, model=lambda: branches().model
    )
    same(plain, found)
    assert report.replayed >= 2 * STEPS


@long
def test_samples_of_several_shapes_train_uncached(tmp_path: Path) -> None:
    class Lengths(Rows):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return (np.abs(x[:, : 4 + index % 2]) * 3).astype("int32"), y

    def model() -> Any:
        inputs = keras.Input((None,), dtype="int32")
        x = layers.GlobalAveragePooling1D()(layers.Embedding(30, 4)(inputs))
        x = layers.Dense(5, activation="relu")(x)
        return compiled(noisy(keras.Model(inputs, layers.Dense(3)(x))))

    plain, found, report = both(lambda: Lengths(vectors(), labels()), tmp_path, model=model)
    same(plain, found)
    assert any("not cached any more" in note for note in report.notes)


@long
def test_little_room_means_little_is_kept(tmp_path: Path) -> None:
    plain, found, report = both(
        lambda: Rows(vectors(), labels()), tmp_path, cached={"most_bytes": 600}
    )
    same(plain, found)
    assert 0 < report.filled_rows < SAMPLES
    assert any("no room for more" in note for note in report.notes)


@long
def test_stored_values_that_are_wrong_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CHECKED_EVERY", 1)
    real = Arrivals._stored
    state = {"reads": 0}

    def stored(self: Any, digests: Any, report: Any) -> Any:
        values, good = real(self, digests, report)
        state["reads"] += 1
        return [value + 1 for value in values] if state["reads"] > 8 else values, good

    monkeypatch.setattr(Arrivals, "_stored", stored)
    _, _, report = both(lambda: Rows(vectors(), labels()), tmp_path)
    assert "not cached any more" in " ".join(report.notes)
    assert report.replayed < report.batches


def test_views_of_samples_without_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FrontierError, match="no sample can be asked for again"):
        fit(mlp().model, Rows(vectors(), labels()), cache=tmp_path, views=2)


# -- what arrives, by itself ---------------------------------------------------------------------


def squares(batch: Any) -> list[Any]:
    return [batch[0] ** 2]


def opened(place: str | Path, **more: Any) -> Arrivals:
    columns = [Column("x", "float32")]

    def make(shapes: Any, of_columns: Any) -> Contents:
        key = CacheKey({"shapes": [list(shape) for shape in shapes]})
        return Contents(Library(place), key, columns, of_columns, about={}, **more)

    return Arrivals(columns, squares, make)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=40), min_size=1, max_size=8))
def test_every_row_is_what_its_own_content_gives(batches: list[list[int]]) -> None:
    pool = np.random.default_rng(0).normal(size=(71, 3)).astype("float32")
    report, seen = CacheReport(), set()
    with tempfile.TemporaryDirectory() as place:
        store = opened(place)
        for rows in batches:
            (values,), known = store.read([pool[rows]], report)
            np.testing.assert_array_equal(values, pool[rows] ** 2)
            assert known == seen.issuperset(rows)
            seen.update(rows)
        assert report.filled_rows == len(seen)
        store.close()


def test_rows_that_were_damaged_are_computed_again(tmp_path: Path) -> None:
    pool = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    store, report = opened(tmp_path), CacheReport()
    store.read([pool], report)
    for file in tmp_path.rglob("*.rows"):
        file.write_bytes(bytes(file.stat().st_size))
    (values,), known = store.read([pool], report)
    np.testing.assert_array_equal(values, pool**2)
    assert not known
    assert report.computed_rows == 2 * len(pool)
    assert store.read([pool], report)[1]
    store.close()


def test_a_row_is_its_content_in_every_input() -> None:
    one, other = np.zeros((2, 3), np.float32), np.array([[0], [1]], np.int32)
    first, second = row_digests([one, other])
    assert first != second
    assert row_digests([one, other[::-1]]) == [second, first]
    assert len(set(row_digests([one]))) == 1


def test_the_room_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, report = opened(tmp_path, capacity=32), CacheReport()
    pool = np.arange(120, dtype=np.float32).reshape(40, 3)
    assert not store.read([pool], report)[1]
    assert store.read([pool[:32]], report)[1]
    (values,), known = store.read([pool], report)
    assert not known
    np.testing.assert_array_equal(values, pool**2)
    with pytest.raises(FrontierError, match="used up"):
        store.digests([pool], report)
    store.close()
    monkeypatch.setattr(contents_module, "DISK_SHARE", 0.0)
    store = opened(tmp_path / "other")
    store.read([pool], report)
    assert not store.read([pool[8:]], report)[1]
    store.close()


def test_a_later_session_finds_what_an_earlier_one_left(tmp_path: Path) -> None:
    pool = np.random.default_rng(0).normal(size=(70, 3)).astype("float32")
    store = opened(tmp_path)
    store.read([pool[:50]], CacheReport())
    store.close()
    store, report = opened(tmp_path), CacheReport()
    store.read([pool[:8]], report)  # tells the shapes
    assert store.read([pool[:50]], report)[1]
    assert (report.found_rows, report.computed_rows) == (50, 8)
    store.read([pool], report)
    store.close()
    store, report = opened(tmp_path), CacheReport()
    store.read([pool[:1]], report)
    (values,), known = store.read([pool], report)
    assert known
    np.testing.assert_array_equal(values, pool**2)
    store.close()


def test_two_that_write_at_once_never_read_each_others_rows(tmp_path: Path) -> None:
    pool = np.random.default_rng(0).normal(size=(128, 3)).astype("float32")
    one, other, report = opened(tmp_path), opened(tmp_path), CacheReport()
    for first in range(0, 128, 16):
        mine, theirs = pool[first : first + 16], pool[::-1][first : first + 16]
        for store, batch in ((one, mine), (other, theirs)):
            np.testing.assert_array_equal(store.read([batch], report)[0][0], batch**2)
    for store in (one, other):
        np.testing.assert_array_equal(store.read([pool], report)[0][0], pool**2)
        store.close()
    store, report = opened(tmp_path), CacheReport()
    store.read([pool[:1]], report)
    np.testing.assert_array_equal(store.read([pool], report)[0][0], pool**2)
    store.close()


# -- frontier values as data ---------------------------------------------------------------------


def test_a_data_set_is_read_once_and_then_read_from_the_store() -> None:
    model = branches().model
    freeze_first(model, 0.5)
    x, y = vectors(), labels()
    with cached(model, Rows(x, y, shuffled=True)) as data:
        assert len(data) == SAMPLES
        np.testing.assert_array_equal(data.y, y)
        rows = np.array([5, 0, 33])
        values = data.values(rows)
        found = data.rest.predict(values if len(values) > 1 else values[0], verbose=0)
        np.testing.assert_allclose(found, model.predict(x[rows], verbose=0), rtol=1e-5, atol=1e-6)
        batches = data.batches(batch_size=16, seed=3)
        np.testing.assert_array_equal(batches[0][1], y[batches.rows(0)])
        compiled(data.rest)
        history = data.rest.fit(batches, epochs=2, shuffle=False, verbose=0).history
        assert np.isfinite(history["loss"]).all()
    with pytest.raises(FrontierError, match="without an end"):
        cached(model, Rows(x, y, endless=True))
    with pytest.raises(FrontierError, match="no batch"):
        cached(model, Rows(x[:0], y[:0]))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's data sets")
def test_a_tensorflow_data_set_reads_the_store(tmp_path: Path) -> None:
    import tensorflow as tf

    model = mlp().model
    freeze_first(model, 0.5)
    x, y = vectors(), labels()
    with cached(model, x, cache=tmp_path) as data:
        dataset = data.dataset(y, batch_size=16, seed=3)
        assert int(dataset.cardinality()) == STEPS
        batches = data.batches(y, batch_size=16, seed=3)
        for _ in range(2):
            for index, (values, targets) in enumerate(dataset):
                np.testing.assert_array_equal(values, batches[index][0])
                np.testing.assert_array_equal(targets, batches[index][1])
            batches.on_epoch_end()
        compiled(data.rest)
        history = data.rest.fit(dataset, epochs=2, shuffle=False, verbose=0).history
        assert history["loss"][1] < history["loss"][0]
        assert isinstance(dataset, tf.data.Dataset)
    with cached(model, tf_data(x, y)) as data:
        assert sorted(np.asarray(data.y).tolist()) == sorted(y.tolist())
        assert data.dataset(shuffle=False).element_spec[1].shape.rank == 1
    with pytest.raises(FrontierError, match="without an end"):
        cached(model, tf_data(x, y).repeat())
