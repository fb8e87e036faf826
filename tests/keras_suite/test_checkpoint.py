"""Checkpoints of Keras runs: resumed equals uninterrupted, whole or absent, never unpickled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from faulty_disk import FAULTS, FaultyDisk, QuickDisk
from frostline import _io
from frostline.backends.checkpoints import checkpoint_folders
from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.checkpoint import (
    load_checkpoint,
    load_weights,
    optimizer_names,
    read_arrays,
    save_checkpoint,
    save_weights,
)
from frostline.backends.keras.names import tensors
from frostline.errors import StorageError
from frostline.integrations.keras import CheckpointCallback, FreezeCallback

EPOCHS, BATCHES, BATCH = 4, 5, 8
POLICIES = [
    "gradual:every=4st",
    "autofreeze:every=3st",
    *(
        pytest.param(policy, marks=pytest.mark.slow)
        for policy in ("lp-ft", "auto-rgn", "freezeout")
    ),
]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_io, "disk", QuickDisk())


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", name="body"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(8, activation="tanh", name="middle"),
            keras.layers.Dropout(0.3, seed=5, name="drop"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def adam() -> keras.Optimizer:
    return keras.optimizers.AdamW(0.01, weight_decay=0.01)


OPTIMIZERS: dict[str, Callable[[], keras.Optimizer]] = {
    "averages": lambda: keras.optimizers.SGD(
        0.05, momentum=0.9, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(adam(), initial_scale=4.0),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
}


def data(part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(3)
    x = source.normal(size=(BATCH * BATCHES, 6)).astype("float32")
    y = source.integers(0, 3, BATCH * BATCHES).astype("int32")
    return x[part], y[part]


class Run:
    """One run with a callback; can be taken up by another one."""

    def __init__(self, policy: str, optimizer: Callable[[], keras.Optimizer] = adam) -> None:
        keras.backend.clear_session()
        self.model = network()
        self.model.compile(
            optimizer(),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self.freezing = FreezeCallback(
            policy, total_steps=EPOCHS * BATCHES, steps_per_epoch=BATCHES
        )

    def fit(self, *more: Any, epochs: int, first: int = 0, part: slice = slice(None)) -> Any:
        x, y = data(part)
        return self.model.fit(
            x, y, batch_size=BATCH, epochs=epochs, initial_epoch=first, shuffle=False, verbose=0,
            validation_data=data(), callbacks=[self.freezing, *more],
        ).history  # fmt: skip

    def evidence(self) -> dict[str, Any]:
        bits = {n: array_of(v).tobytes() for n, v in tensors(self.model).items()}
        names = optimizer_names(self.model)
        slots = {f"slot {n}": array_of(v).tobytes() for n, v in names.items()}
        return bits | slots | {"decisions": [d.to_json() for d in self.freezing.decisions]}


class StopAfter(keras.callbacks.Callback):
    """Saves after so many batches in all, and ends the run as a crash would."""

    def __init__(self, batches: int, folder: Path, freezing: FreezeCallback) -> None:
        super().__init__()
        self.left, self.folder, self.freezing = batches, folder, freezing

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            save_checkpoint(self.folder, self.model, self.freezing)
            raise KeyboardInterrupt


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_resumed_at_an_epoch_equals_the_uninterrupted_one(
    policy: str, tmp_path: Path
) -> None:
    whole = Run(policy)
    history = whole.fit(epochs=EPOCHS)
    broken = Run(policy)
    broken.fit(CheckpointCallback(tmp_path, broken.freezing), epochs=2)
    resumed = Run(policy)
    done = load_checkpoint(tmp_path, resumed.model, resumed.freezing)
    assert done == {"epoch": 2}
    rest = resumed.fit(epochs=EPOCHS, first=2)
    assert resumed.evidence() == whole.evidence()
    assert {k: v[2:] for k, v in history.items()} == rest


def test_a_run_taken_up_after_its_last_epoch_completes_its_proof(tmp_path: Path) -> None:
    whole = Run("linear-probe")
    whole.fit(CheckpointCallback(tmp_path, whole.freezing), epochs=2)
    again = Run("linear-probe")
    assert load_checkpoint(tmp_path, again.model, again.freezing) == {"epoch": 2}
    again.fit(epochs=2, first=2)
    assert again.freezing.certificate.to_json() == whole.freezing.certificate.to_json()
    assert again.evidence() == whole.evidence()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_slot_comes_back(tmp_path: Path, name: str) -> None:
    policy, make = "gradual:every=4st", OPTIMIZERS[name]
    whole = Run(policy, make)
    whole.fit(epochs=2)
    whole.fit(epochs=EPOCHS, first=2)
    broken = Run(policy, make)
    broken.fit(epochs=2)
    save_checkpoint(tmp_path, broken.model, broken.freezing)
    resumed = Run(policy, make)
    load_checkpoint(tmp_path, resumed.model, resumed.freezing)
    resumed.fit(epochs=EPOCHS, first=2)
    assert resumed.evidence() == whole.evidence()


def test_a_run_resumed_within_an_epoch_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """The order of data is the user's: the rest of the epoch is given first."""
    policy = "autofreeze:every=3st"
    whole = Run(policy)
    history = whole.fit(epochs=EPOCHS)
    broken = Run(policy)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(StopAfter(7, tmp_path, broken.freezing), epochs=EPOCHS)
    resumed = Run(policy)
    resumed.model.test_on_batch(*data())  # TensorFlow makes metrics at the first batch
    load_checkpoint(tmp_path, resumed.model, resumed.freezing)
    second = resumed.fit(epochs=2, first=1, part=slice(2 * BATCH, None))
    rest = resumed.fit(epochs=EPOCHS, first=2)
    assert resumed.evidence() == whole.evidence()
    for name, values in history.items():
        assert [*second[name], *rest[name]] == pytest.approx(values[1:], abs=1e-6)


def test_what_is_frozen_is_written_once(tmp_path: Path) -> None:
    run = Run("linear-probe")
    run.fit(CheckpointCallback(tmp_path, run.freezing), epochs=2)
    first, second = (path / "held.safetensors" for path in checkpoint_folders(tmp_path))
    assert first.samefile(second)
    frozen = {h.tensor for h in run.freezing.certificate.holds}
    assert frozen == set(read_arrays(first))


def test_another_policy_model_or_optimizer_is_refused_before_anything_changes(
    tmp_path: Path,
) -> None:
    run = Run("linear-probe")
    run.fit(CheckpointCallback(tmp_path, run.freezing), epochs=1)
    other = Run("full")
    before = other.evidence()
    with pytest.raises(StorageError, match="under LinearProbe"):
        load_checkpoint(tmp_path, other.model, other.freezing)
    assert {k: v for k, v in other.evidence().items() if k in before} == before
    with pytest.raises(StorageError, match="state of a callback"):
        load_checkpoint(tmp_path, other.model)
    another = Run("linear-probe", lambda: keras.optimizers.SGD(0.1))
    with pytest.raises(StorageError, match="AdamW there, SGD here"):
        load_checkpoint(tmp_path, another.model, another.freezing)
    small = Run("linear-probe")
    small.model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="head")])
    small.model.compile(adam(), "mse")
    with pytest.raises(StorageError, match="only in the checkpoint"):
        load_checkpoint(tmp_path, small.model, small.freezing)


def test_no_checkpoint_is_no_error_and_a_damaged_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run("linear-probe")
    assert load_checkpoint(tmp_path, run.model, run.freezing) is None
    run.fit(CheckpointCallback(tmp_path, run.freezing), epochs=2)
    newest = checkpoint_folders(tmp_path)[0] / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    fresh = Run("linear-probe")
    assert load_checkpoint(tmp_path, fresh.model, fresh.freezing) == {"epoch": 1}
    assert "passing over" in caplog.text


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the code is the same")
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "exit"])
def test_a_whole_checkpoint_exists_whatever_fails(
    tmp_path: Path, fault: str, for_ever: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `for_ever` nothing can be cleaned up either, as after a kill."""
    run, fresh = Run("linear-probe"), Run("linear-probe")
    run.fit(epochs=1)
    counting = FaultyDisk()
    monkeypatch.setattr(_io, "disk", counting)
    save_checkpoint(tmp_path / "count", run.model, run.freezing)
    for at in range(0, len(counting.calls), every):
        folder = tmp_path / f"{fault}{at}"
        monkeypatch.setattr(_io, "disk", QuickDisk())
        save_checkpoint(folder, run.model, run.freezing, extra={"n": 1})
        monkeypatch.setattr(_io, "disk", FaultyDisk(at, fault, for_ever=for_ever))
        with contextlib.suppress(StorageError):
            save_checkpoint(folder, run.model, run.freezing, extra={"n": 2})
        monkeypatch.setattr(_io, "disk", QuickDisk())
        found = load_checkpoint(folder, fresh.model, fresh.freezing)
        assert found in ({"n": 1}, {"n": 2})


def test_weights_by_name_go_to_another_model_of_the_same_build(tmp_path: Path) -> None:
    one, path = network(), tmp_path / "weights.safetensors"
    one.get_layer("body").kernel.assign_add(np.ones((6, 8), "float32"))
    save_weights(one, path)
    other = network()
    assert load_weights(other, path) == ()
    for name, variable in tensors(one).items():
        assert array_of(variable).tobytes() == array_of(tensors(other)[name]).tobytes()


def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(network(), path)
    wide = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(9, name="body"), keras.layers.Dense(3, name="new")]
    )
    before = {n: array_of(v).tobytes() for n, v in tensors(wide).items()}
    with pytest.raises(StorageError, match="only in the"):
        load_weights(wide, path)
    with pytest.raises(StorageError, match=r"is .* there"):
        load_weights(wide, path, strict=False)
    assert {n: array_of(v).tobytes() for n, v in tensors(wide).items()} == before
    narrow = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, name="body")])
    odd = load_weights(narrow, path, strict=False)
    assert "head/kernel" in odd


def test_bfloat16_and_scalars_survive(tmp_path: Path) -> None:
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, name="out", dtype="bfloat16")]
    )
    path = tmp_path / "w.safetensors"
    save_weights(model, path)
    assert read_arrays(path)["out/kernel"].dtype.name == "bfloat16"
    assert load_weights(model, path) == ()


@pytest.fixture
def garbage(tmp_path: Path) -> Path:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(b"\x80\x04garbage")
    return path


def test_a_file_of_another_kind_is_refused(garbage: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        load_weights(network(), garbage)
    with pytest.raises(StorageError):
        load_weights(network(), tmp_path / "absent.safetensors")
