"""Whole runs of Keras models: frozen is frozen, cached equals uncached, resume equals going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import frostline
from crash_runner import __file__ as RUNNER
from frostline.backends.torch.checkpoint import checkpoint_folders
from frostline.cli.app import run as command
from frostline.errors import ModelError, StorageError
from frostline.records import read_run
from frostline.tasks.keras_export import export_keras
from frostline.tasks.run import Run, load
from run_bits import run_bits

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.01,
    "patience": None,
    "threads": 1,
    "device": "cpu",
    "augment": "none",
}


def fit(model: Path, data: Path, output: Path, **settings: Any) -> Run:
    return frostline.fit(str(model), str(data), output=output, **SETTINGS | settings)


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run.path / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, tiny_file: Path, pictures: Path) -> Run:
    """A run with the first convolution frozen; nothing is cached."""
    output = tmp_path_factory.mktemp("runs") / "half"
    return fit(tiny_file, pictures, output, policy="freeze:select=depth==0", cache="off")


def test_frozen_statistics_are_held_and_proved_and_the_others_move(
    half: Run, tiny_file: Path
) -> None:
    from frostline.tasks.config import RunConfig
    from frostline.tasks.models import build_model

    before = build_model(
        RunConfig(model=str(tiny_file), data="d"), kind="image", labels=("dark", "light")
    ).model.state_dict()
    after = tensors(half)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    frozen = {name for name in after if name.startswith(("conv0.", "norm0."))}
    assert {"norm0.moving_mean", "norm0.moving_variance"} <= frozen
    assert moved == after.keys() - frozen - {"drop.seed_generator_state"}  # torch's own stream
    proof = json.loads((half.path / "certificate.json").read_text())
    assert {hold["tensor"] for hold in proof["holds"]} == frozen
    assert half.summary["certificate_ok"]


def test_statistics_are_in_the_checkpoints(half: Run) -> None:
    last = checkpoint_folders(half.path / "checkpoints")[0]
    kept = {n for f in last.glob("*.safetensors") for n in safetensors.torch.load_file(f)}
    assert any(name.endswith("norm1.moving_variance") for name in kept)


def test_the_record_says_what_pixels_the_model_was_given(half: Run) -> None:
    notes = read_run(half.path).header["notes"]
    assert "0 to 255" in notes["pixels"]
    assert notes["fresh_tensors"]["count"] == 0


def test_live_norm_is_a_switch_of_its_own(tiny_file: Path, pictures: Path, tmp_path: Path) -> None:
    run = fit(tiny_file, pictures, tmp_path / "r", policy="linear-probe", live_norm=True, epochs=1)
    held = fit(tiny_file, pictures, tmp_path / "s", policy="linear-probe", epochs=1)
    live, still = tensors(run), tensors(held)
    assert not torch.equal(live["norm0.moving_mean"], still["norm0.moving_mean"])
    assert torch.equal(live["norm0.gamma"], still["norm0.gamma"])
    assert run.summary["certificate_ok"]


def test_live_dropout_may_draw_in_frozen_layers(pictures: Path, tmp_path: Path, saved: Any) -> None:
    import keras

    x = keras.Input((16, 16, 3))
    y = keras.layers.Conv2D(4, 3, name="conv")(x)
    y = keras.layers.SpatialDropout2D(0.3, seed=4, name="drop")(y)
    y = keras.layers.GlobalAveragePooling2D()(y)
    path = saved(keras.Model(x, keras.layers.Dense(2, name="out")(y)))
    live = fit(path, pictures, tmp_path / "r", policy="linear-probe", live_dropout=True, epochs=1)
    held = fit(path, pictures, tmp_path / "s", policy="linear-probe", epochs=1)
    state = "drop.seed_generator_state"
    assert not torch.equal(tensors(live)[state], tensors(held)[state])
    assert live.summary["certificate_ok"]
    assert held.summary["certificate_ok"]


@pytest.mark.parametrize("policy", ["linear-probe", "gradual:every=4st"])
def test_cached_training_is_uncached_training(
    tiny_file: Path, pictures: Path, tmp_path: Path, policy: str
) -> None:
    runs = {
        cache: fit(
            tiny_file, pictures, tmp_path / cache, policy=policy, cache=cache,
            cache_dir=tmp_path / "stores", epochs=3,
        )
        for cache in ("off", "on")
    }  # fmt: skip
    log = (runs["on"].path / "log.txt").read_text()
    assert "batches ran without the frozen part" in log
    assert " 0 of " not in log
    plain, cached = tensors(runs["off"]), tensors(runs["on"])
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-6)


def test_two_files_of_equal_weights_and_unequal_settings_share_no_stored_outputs(
    pictures: Path, tmp_path: Path
) -> None:
    import keras

    def made(slope: float) -> Path:
        keras.utils.set_random_seed(1)
        x = keras.Input((16, 16, 3))
        y = keras.layers.LeakyReLU(slope)(keras.layers.Conv2D(4, 3, name="conv")(x))
        y = keras.layers.GlobalAveragePooling2D()(y)
        model = keras.Model(x, keras.layers.Dense(2, name="out")(y))
        model.save(path := tmp_path / f"m{slope}.keras")
        return path

    computed = []
    for number, path in enumerate((made(0.1), made(0.1), made(0.9))):
        run = fit(path, pictures, tmp_path / f"r{number}", policy="linear-probe", cache="on",
                  cache_dir=tmp_path / "stores")  # fmt: skip
        computed.append("computing it once" in (run.path / "log.txt").read_text())
    assert computed == [True, False, True]


def test_auto_keeps_within_limits(tiny_file: Path, pictures: Path, tmp_path: Path) -> None:
    limits = {"budget": "1h", "memory_budget": "900GiB"}
    run = fit(tiny_file, pictures, tmp_path / "rich", policy="auto", epochs=1, **limits)
    foretold = run.record.first_look["costs"]["foretold"]
    assert set(foretold) == {"first_epoch_from_s", "epoch_from_s", "peak_from_bytes"}
    assert "the run is expected to take" in run.record.decisions[0].plan.reason
    poor = fit(
        tiny_file, pictures, tmp_path / "poor", policy="auto", epochs=1, memory_budget="1KiB"
    )
    assert "and still too much" in poor.record.decisions[0].plan.reason
    assert poor.summary["certificate_ok"]


def test_auto_reads_the_layers_and_solves_the_head(
    tiny_file: Path, pictures: Path, tmp_path: Path
) -> None:
    run = fit(tiny_file, pictures, tmp_path / "run", policy="auto", epochs=1)
    look = json.loads((run.path / "probes.json").read_text())
    assert look
    log = (run.path / "log.txt").read_text()
    assert "the head is solved" in log


@pytest.mark.parametrize("policy", ["gradual:every=2st", "egeria:every=2st", "spectrum", "grades"])
def test_policies_of_all_kinds_run(
    tiny_file: Path, pictures: Path, tmp_path: Path, policy: str
) -> None:
    run = fit(tiny_file, pictures, tmp_path / "run", policy=policy)
    assert run.summary["certificate_ok"]


def test_a_paused_run_goes_on_as_if_it_had_not_paused(
    tiny_file: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = {"policy": "gradual:every=2st", "optimizer_state": "release"}
    straight = fit(tiny_file, pictures, tmp_path / "a", **settings)
    fit(tiny_file, pictures, tmp_path / "b", pause_after=1, **settings)
    paused = fit(tiny_file, pictures, tmp_path / "b", **settings)
    assert run_bits(paused.path) == run_bits(straight.path)


@pytest.mark.slow  # each attempt imports Keras
def test_a_killed_run_ends_as_the_uninterrupted_one(
    tiny_file: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = SETTINGS | {
        "model": str(tiny_file), "data": str(pictures), "policy": "gradual:every=2st",
        "checkpoint_every": "1st", "augment": "flip",
    }  # fmt: skip
    frostline.fit(**settings, output=tmp_path / "straight")
    job = {
        "output": str(tmp_path / "killed"),
        "settings": settings,
        "kills": [{"event": 3}, {"disk": 60}, {"after_s": 0.1}],
    }
    done = subprocess.run(
        [sys.executable, RUNNER],
        input=json.dumps(job),
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(RUNNER).parent), *sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ends"][-1] == 0, done.stderr
    assert report["ends"][0] == -9
    assert run_bits(tmp_path / "killed") == run_bits(tmp_path / "straight")


# -- what comes out ------------------------------------------------------------------------------


def some(pictures: Path) -> list[str]:
    return [str(p) for p in sorted(pictures.rglob("*.png"))[::4]]


def test_a_saved_model_predicts_what_the_trained_one_did(half: Run, pictures: Path) -> None:
    loaded = load(half)
    assert loaded.labels == ("dark", "light")
    assert (half.path / "model" / "architecture.json").is_file()
    lines = (half.path / "predictions.csv").read_text().splitlines()[1:]
    sure = {round(float(line.split(",")[3]), 4) for line in lines}
    found = {
        round(p.probability, 4) for p in loaded.predict([str(p) for p in pictures.rglob("*.png")])
    }
    assert sure <= found


IN_TENSORFLOW = """
import sys, keras, numpy as np
assert keras.config.backend() == "tensorflow"
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
"""


@pytest.mark.slow  # imports TensorFlow
def test_an_exported_file_predicts_the_same_in_tensorflow(
    half: Run, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tuned.keras"
    assert command(["export", str(half.path), str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["labels"] == ["dark", "light"]
    assert told["activation"] == "softmax"
    loaded = load(half)
    (batch,) = loaded.preprocess(some(pictures))
    np.save(tmp_path / "x.npy", batch.permute(0, 2, 3, 1).numpy())
    done = subprocess.run(
        [sys.executable, "-c", IN_TENSORFLOW, str(path), str(tmp_path / "x.npy"),
         str(tmp_path / "y.npy")],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = [list(p.probabilities.values()) for p in loaded.predict(some(pictures))]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, atol=1e-4)


def test_an_exported_file_can_be_tuned_again(half: Run, tmp_path: Path, pictures: Path) -> None:
    export_keras(load(half).model, tmp_path / "m.keras")
    again = fit(tmp_path / "m.keras", pictures, tmp_path / "r", policy="linear-probe", epochs=1)
    for name in ("conv0.kernel", "norm1.moving_mean"):
        assert torch.equal(tensors(again)[name], tensors(half)[name])


def test_export_says_what_cannot_be(half: Run, tmp_path: Path) -> None:
    model = load(half).model
    export_keras(model, tmp_path / "m.keras")
    with pytest.raises(StorageError, match="a file of that name"):
        export_keras(model, tmp_path / "m.keras")
    assert export_keras(model, tmp_path / "m.keras", overwrite=True)["bytes"] > 1000
    with pytest.raises(ModelError, match=r"m\.keras"):
        export_keras(model, tmp_path / "m.h5")
    with pytest.raises(ModelError, match="no Keras model"):
        export_keras(torch.nn.Linear(2, 2), tmp_path / "n.keras")
    assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]


def test_the_command_inspects_and_predicts(
    half: Run, tiny_file: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["inspect", str(tiny_file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "conv0" in json.dumps(told)
    assert command(["predict", str(half.path), *some(pictures)]) == 0
    assert "dark" in capsys.readouterr().out
