"""Runs of Keras's own `fit`, recorded: readable at any moment, gone on with, safe to show."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from faulty_disk import QuickDisk
from frostline import _io
from frostline.backends.keras.checkpoint import load_checkpoint
from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.measure import measure_costs
from frostline.cli.app import run as command
from frostline.errors import BackendError, ConfigError
from frostline.frontier.keras.fitting import fit as cached_fit
from frostline.integrations.keras import CheckpointCallback, FreezeCallback, RecordCallback
from frostline.live import plain
from frostline.records import read_run, without_costs
from frostline.report.numbers import numbers_of
from frostline.report.page import page
from frostline.report.read import read_runs

EPOCHS, BATCHES, BATCH = 3, 3, 8
POLICY = "gradual"  # one group deeper per epoch
HOSTILE = "<script>alert(1)<|script>\x1b[31m"  # Keras allows no slash in a name


#: Compiling takes long, and what is compiled is no matter of the record.
later = pytest.mark.slow if keras.backend.backend() != "torch" else lambda test: test


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_io, "disk", QuickDisk())


def network(name: str = "body") -> keras.Model:
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    model = keras.Sequential(
        [keras.Input((6,)), dense(8, "tanh", name=name), dense(8, "tanh", name="middle"),
         dense(3, name="head")], name="small",
    )  # fmt: skip
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(3)
    x = source.normal(size=(BATCH * BATCHES, 6)).astype("float32")
    return x, source.integers(0, 3, len(x)).astype("int32")


def train(
    model: keras.Model, *callbacks: Any, epochs: int = EPOCHS, first: int = 0
) -> keras.callbacks.History:
    return model.fit(
        *data(), batch_size=BATCH, epochs=epochs, initial_epoch=first, shuffle=False, verbose=0,
        validation_data=data(), callbacks=list(callbacks),
    )  # fmt: skip


def recorded(folder: Path, **more: Any) -> FreezeCallback:
    model, freezing = network(), FreezeCallback(POLICY)
    train(model, freezing, RecordCallback(folder, freezing, **more))
    return freezing


def lines(folder: Path) -> list[dict[str, Any]]:
    return [without_costs(line) for line in _io.read_lines(folder / "record.jsonl").records]


def test_fit_is_recorded_as_frostline_records_its_own_runs(tmp_path: Path) -> None:
    model, freezing = network(), FreezeCallback(POLICY)
    recording = RecordCallback(tmp_path, freezing, data="noise", settings={"seed": 7})
    history = train(model, freezing, recording).history
    found = read_run(tmp_path)
    config = found.header["config"]
    assert (config["model"], config["data"], config["policy"]) == ("small", "noise", POLICY)
    assert (config["seed"], config["epochs"], config["steps_per_epoch"]) == (7, EPOCHS, BATCHES)
    assert config["optimizer"] == "Adam"
    assert config["learning_rate"] == pytest.approx(0.01)
    assert config["keras_backend"] == keras.backend.backend()
    assert found.header["costs"]["keras"] == keras.__version__
    assert list(found.header["groups"]) == ["body", "middle", "head"]
    assert found.header["head"] == ["head"]
    assert [d.to_json() for d in found.decisions] == [d.to_json() for d in freezing.decisions]
    assert len(found.decisions) == EPOCHS
    for place, line in enumerate(found.epochs):
        assert (line["epoch"], line["step"]) == (place + 1, BATCHES * (place + 1))
        metrics = line["metrics"]
        assert metrics["val_accuracy"] == history["val_sparse_categorical_accuracy"][place]
        assert metrics["train_loss"] == history["loss"][place]
        assert 0 < line["costs"]["training_s"] <= line["costs"]["wall_s"]
    assert found.summary["certificate_ok"]
    assert found.summary["val_accuracy"] == max(history["val_sparse_categorical_accuracy"])
    assert found.summary["wall_s"] > 0
    recording.tested({"sparse_categorical_accuracy": 0.5})
    assert read_run(tmp_path).summary["test_accuracy"] == 0.5


@later
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="it refuses such names")
def test_the_commands_show_it_whatever_its_layers_are_called(tmp_path: Path, capsys) -> None:
    model, folder = network(HOSTILE), tmp_path / "run"
    measured = measure_costs(model, layer_groups(model), data()[0])
    freezing = FreezeCallback(POLICY, groups=measured)
    train(model, freezing, RecordCallback(folder, freezing, data=HOSTILE))
    assert HOSTILE in read_run(folder).header["groups"]
    assert command(["show", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["details"][0]["timeline"]["groups"][0] == HOSTILE
    assert told["arms"][0]["runs"][0]["predicted_share"] < 1
    assert told["arms"][0]["runs"][0]["backward_share"] < 1
    assert command(["show", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "model.fit of Keras: run that program again" in said
    for html in (page(numbers_of(read_runs([folder]))), plain.render([folder])):
        assert "<script>alert(1)" not in html
    assert command(["runs", str(tmp_path)]) == 0
    assert POLICY in capsys.readouterr().out


def test_a_resumed_fit_records_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    """Killed after an epoch that was recorded and whose checkpoint was not saved any more."""
    recorded(tmp_path / "whole")

    class Kill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    def callbacks(freezing: FreezeCallback, *between: Any) -> list[Any]:
        record = RecordCallback(tmp_path / "run", freezing)
        return [freezing, record, *between, CheckpointCallback(tmp_path / "ckpt", freezing)]

    model, freezing = network(), FreezeCallback(POLICY)
    with pytest.raises(KeyboardInterrupt):
        train(model, *callbacks(freezing, Kill()))
    assert len(read_run(tmp_path / "run").epochs) == 2
    assert not read_run(tmp_path / "run").finished
    model, freezing = network(), FreezeCallback(POLICY)
    done = load_checkpoint(tmp_path / "ckpt", model, freezing)
    assert done == {"epoch": 1}
    train(model, *callbacks(freezing), first=1)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    with pytest.raises(ConfigError, match="a finished run of 9 updates"):
        recorded(tmp_path / "run")
    recorded(tmp_path / "run", fresh=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_killed_process_leaves_a_folder_that_can_be_read(tmp_path: Path) -> None:
    if keras.backend.backend() != "torch":
        pytest.skip("TensorFlow and JAX have threads, which do not survive a fork")

    class Die(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if freezing.driver and freezing.driver.progress.step == BATCHES + 2:
                os.kill(os.getpid(), signal.SIGKILL)

    model, freezing = network(), FreezeCallback(POLICY)
    pid = os.fork()
    if pid == 0:
        try:
            train(model, freezing, RecordCallback(tmp_path, freezing), Die())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    found = read_run(tmp_path)
    assert not found.finished
    assert len(found.epochs) == 1
    assert len(found.decisions) == 2
    assert numbers_of(read_runs([tmp_path])).arms[0].runs[0].epochs == 1


@later
def test_a_second_fit_goes_on_and_early_stopping_is_part_of_the_proof(tmp_path: Path) -> None:
    model, freezing = network(), FreezeCallback("linear-probe")
    record = RecordCallback(tmp_path, freezing)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=0, restore_best_weights=True)
    train(model, stop, freezing, record, epochs=2)
    first = read_run(tmp_path)
    train(model, stop, freezing, record, epochs=2)
    found = read_run(tmp_path)
    assert [line["epoch"] for line in found.epochs] == list(range(1, len(found.epochs) + 1))
    assert len(found.epochs) > len(first.epochs)
    assert found.finished
    assert found.summary["certificate_ok"]
    assert found.summary["wall_s"] > first.summary["wall_s"]
    assert [line["kind"] for line in lines(tmp_path)].count("end") == 1


@later
def test_a_cached_fit_is_recorded_with_what_the_cache_did(tmp_path: Path) -> None:
    model, freezing = network(), FreezeCallback("linear-probe")
    record = RecordCallback(tmp_path / "run", freezing)
    x, y = data()
    done = cached_fit(
        model, x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, cache=tmp_path / "store",
        validation_data=data(), callbacks=[freezing, record],
    )  # fmt: skip
    record.cached(done.report)
    found = read_run(tmp_path / "run")
    assert found.summary["cache"]["replayed"] == done.report.replayed > 0
    assert found.summary["certificate_ok"]
    detail = numbers_of(read_runs([tmp_path / "run"])).details[0]
    assert detail.cache == tuple(done.report.notes)
    assert detail.time_s["cache"] > 0


@later
def test_any_order_of_the_callbacks_records_the_same(tmp_path: Path) -> None:
    recorded(tmp_path / "one")
    model, freezing = network(), FreezeCallback(POLICY)
    train(model, RecordCallback(tmp_path / "two", freezing), freezing)
    kept = ("decision", "epoch", "end")
    one, two = (
        sorted((x for x in lines(tmp_path / n) if x["kind"] in kept), key=json.dumps)
        for n in ("one", "two")
    )
    assert one == two


def test_without_its_freeze_callback_it_says_so(tmp_path: Path) -> None:
    record = RecordCallback(tmp_path, FreezeCallback(POLICY))
    with pytest.raises(BackendError, match="FreezeCallback not among the callbacks"):
        train(network(), record)
    with pytest.raises(ConfigError, match="'model' among them"):
        RecordCallback(tmp_path, FreezeCallback(POLICY), settings={"model": "x"})
