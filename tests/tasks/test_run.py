"""The main job in one call: what it leaves, what it refuses, what it gives back."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import frostline
import tiny_task
from faulty_disk import QuickDisk, use_disk
from frostline._io import verify_folder
from frostline.backends.torch.checkpoint import checkpoint_folders, load_checkpoint
from frostline.driver import Driver
from frostline.errors import (
    ConfigError,
    DamagedFile,
    DataError,
    NonFiniteLoss,
    PolicyError,
    StorageError,
)
from frostline.policies.scheduled import Gradual
from frostline.policies.static import Full, LinearProbe
from frostline.records import comparison_table
from frostline.tasks import folder as folders
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.folder import claim
from frostline.tasks.meter import CostMeter
from frostline.tasks.resources import Interrupt, PeakMemory, borrowed_process, pick_device
from frostline.tasks.run import Run
from numpy_case import NumpyCase

SETTINGS: dict[str, Any] = {
    "model": "tiny_task:tiny_model",
    "data": "tiny_task:tiny_data",
    "policy": "linear-probe",
    "epochs": 2,
    "batch_size": 16,
    "lr": 0.01,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[dict[str, Any]]]:
    """A finished run and its events. Tests copy it before they change anything."""
    events: list[dict[str, Any]] = []
    output = tmp_path_factory.mktemp("finished") / "run"
    with use_disk(QuickDisk()):
        run = frostline.fit(**SETTINGS, output=output, on_event=events.append)
    return run, events


@pytest.fixture
def run(finished, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(finished[0].path, tmp_path / "copy")))


# -- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_everything_and_nothing_else(finished):
    run, _ = finished
    assert sorted(p.name for p in run.path.iterdir() if p.name != ".lock") == [
        "best",
        "certificate.json",
        "checkpoints",
        "config.yaml",
        "log.txt",
        "metrics.csv",
        "model",
        "predictions.csv",
        "record.jsonl",
        "summary.json",
    ]
    verify_folder(run.path / "model")


def test_the_summary_says_what_came_out_and_what_it_cost(finished):
    run, _ = finished
    summary = run.summary
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["val_accuracy"] == max(m["val_accuracy"] for m in run.metrics)
    assert summary["epochs_run"] == 2
    assert summary["steps"] == 6  # 49 samples: three batches of 16, the last with one more
    assert summary["certificate_ok"] is True
    assert not summary["stopped_early"]
    groups = run.record.header["groups"]
    head = sum(groups[name] for name in run.record.header["head"])
    assert summary["trained_parameter_share"] == pytest.approx(head / sum(groups.values()))
    assert 0 < summary["backward_share"] < 1
    assert summary["wall_s"] > summary["measure_s"] > 0
    assert summary["peak_memory_bytes"] > 1e6
    assert run.record.summary == summary
    (row,) = comparison_table([run.path])
    assert row.test_accuracy == summary["test_accuracy"]
    assert row.policy == "linear-probe"
    assert None not in (row.wall_s, row.peak_memory_bytes, row.backward_share)


def test_the_resolved_settings_are_saved_and_load_again(finished):
    run, _ = finished
    assert run.config.head_lr == pytest.approx(0.1)  # ten times lr, resolved
    assert run.config == load_config(run.path / "config.yaml")


def test_the_log_says_what_is_frozen(finished):
    text = (finished[0].path / "log.txt").read_text()
    assert "frozen 3 of 4 groups" in text
    assert "epoch 2:" in text
    assert "finished" in text


def test_events_tell_the_progress(finished):
    _, events = finished
    kinds = [event["kind"] for event in events]
    assert kinds.count("step") == 6
    assert kinds.count("epoch") == 2
    assert kinds[-1] == "end"
    assert {"start", "decision", "checkpoint"} <= set(kinds)
    step = next(event for event in events if event["kind"] == "step")
    known = {"kind", "step", "total_steps", "epoch", "loss", "lr"}
    assert step.keys() == known | {"saved_predicted_s"}
    start = next(event for event in events if event["kind"] == "start")
    assert (start["frozen_groups"], start["groups"]) == (3, 4)
    assert 0 < start["frozen_share"] < 1
    json.dumps(events)


def test_the_proof_names_every_frozen_tensor_with_its_bits(finished):
    run, _ = finished
    holds = json.loads((run.path / "certificate.json").read_text())["holds"]
    torch.manual_seed(0)
    model = frostline.load(run).model
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    head = {name for name in names if name.startswith("3.")}
    assert {hold["tensor"] for hold in holds} == names - head
    assert all((hold["from_step"], hold["to_step"]) == (0, 6) for hold in holds)


def best_weights(run: Run, *, steps_per_epoch: int) -> torch.nn.Module:
    model, _ = tiny_task.tiny_model(len(run.record.header["labels"]))
    step = run.summary["best_epoch"] * steps_per_epoch
    assert load_checkpoint(run.path / "best", model=model, step=step, streams=()) == {}
    return model


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in a.state_dict().items())


def test_the_tuned_model_is_the_best_one(finished):
    run, _ = finished
    loaded = frostline.load(run)
    assert same_weights(loaded.model, best_weights(run, steps_per_epoch=3))
    assert not loaded.model.training
    pictures = tiny_task.tiny_data()["test"]
    hits = [
        prediction.label == label
        for prediction, (_, label) in zip(
            loaded.predict([picture for picture, _ in pictures]), pictures, strict=True
        )
    ]
    assert sum(hits) / len(hits) == run.summary["test_accuracy"]


def test_what_signals_cost_is_in_the_summary(tmp_path: Path):
    settings = SETTINGS | {"policy": "autofreeze:every=2st"}
    summary = frostline.fit(**settings, output=tmp_path / "run").summary
    assert summary["signal_s"].keys() == {"summed_gradient_l1"}
    assert 0 < sum(summary["signal_s"].values()) <= summary["signals_s"]
    assert summary["widened_steps"] >= 0


def test_costs_of_signals_add_up_over_sessions():
    meter = CostMeter(torch.device("cpu"), {"signal_s": {"a": 1.0, "b": 2.0}, "widened_steps": 3})
    driver = Driver(Full(), NumpyCase().backend)
    driver.costs.signal_s = {"b": 0.5, "c": 4.0}
    driver.costs.widened_steps = 5
    read = meter.read(driver, measure_s=0.0)
    assert read["signal_s"] == {"a": 1.0, "b": 2.5, "c": 4.0}
    assert read["widened_steps"] == 5  # the driver's own count goes through all sessions


def test_what_a_policy_has_to_say_is_said_once(tmp_path: Path, monkeypatch, caplog):
    """At the start of a run, not again when it is gone on with."""
    monkeypatch.setattr(LinearProbe, "notice", lambda self: "costs a fortune")
    settings = SETTINGS | {"output": tmp_path / "run"}

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frostline.fit(**settings, on_event=stop)
    frostline.fit(**settings)
    said = [r for r in caplog.records if "costs a fortune" in r.getMessage()]
    assert [r.levelname for r in said] == ["WARNING"]


def test_a_run_that_ends_before_its_policy_says_so(tmp_path: Path, caplog):
    frostline.fit(**SETTINGS | {"policy": "chain-thaw"}, output=tmp_path / "run")
    assert "before its policy did: phase 1 of 5" in caplog.text
    caplog.clear()
    frostline.fit(**SETTINGS | {"policy": "lp-ft"}, output=tmp_path / "other")
    assert "before its policy" not in caplog.text


def test_patience_stops_and_the_best_epoch_counts(tmp_path: Path):
    settings = SETTINGS | {"data": "tiny_task:noise_data", "epochs": 12, "patience": 1}
    run = frostline.fit(**settings, output=tmp_path / "run")
    assert run.summary["stopped_early"]
    assert run.summary["epochs_run"] == run.summary["best_epoch"] + 1 < 12
    assert run.summary["val_accuracy"] == run.metrics[-2]["val_accuracy"]
    tuned = frostline.load(run).model
    assert same_weights(tuned, best_weights(run, steps_per_epoch=3))
    last, _ = tiny_task.tiny_model(2)
    load_checkpoint(run.path / "checkpoints", model=last, allow_inexact=True)
    assert not same_weights(tuned, last)


# -- calling again -------------------------------------------------------------------------------


def test_a_finished_run_is_returned_as_it_is(run: Run):
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.name != ".lock"}
    events: list[dict[str, Any]] = []
    again = frostline.fit(**SETTINGS, output=run.path, on_event=events.append)
    assert again.summary == run.summary
    assert events == []
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_fresh_moves_the_old_run_aside(run: Run):
    old = run.summary
    again = frostline.fit(**SETTINGS, output=run.path, fresh=True)
    aside = Run(run.path.with_name("copy.old-001"))
    assert aside.summary == old
    assert again.path == run.path
    assert again.summary["wall_s"] != old["wall_s"]
    assert again.summary["test_loss"] == old["test_loss"]  # the same bits from the same settings


def test_other_settings_in_the_same_folder_are_refused(run: Run):
    with pytest.raises(ConfigError, match=r"lr=0\.01, now 0\.02") as caught:
        frostline.fit(**SETTINGS | {"lr": 0.02}, output=run.path)
    assert "fresh=True" in caught.value.fix
    with pytest.raises(ConfigError, match=r"epochs=2, now 3 \(also seed\)"):
        frostline.fit(**SETTINGS | {"epochs": 3, "seed": 1}, output=run.path)
    frostline.fit(**SETTINGS | {"workers": 1, "checkpoint_every": "1st"}, output=run.path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        frostline.fit(**SETTINGS, output=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "thesis.tex"]


def test_an_output_that_cannot_be_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="create the folder"):
        frostline.fit(**SETTINGS, output=tmp_path / "file" / "run")


def test_runs_are_numbered_and_unfinished_ones_gone_on_with(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = frostline.fit(**SETTINGS)
    assert first.path == Path("runs/tiny_model-linear-probe-001")

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        frostline.fit(**SETTINGS, on_event=stop)
    assert frostline.fit(**SETTINGS | {"seed": 1}).path.name.endswith("-003")
    shutil.rmtree("runs/tiny_model-linear-probe-003")
    assert frostline.fit(**SETTINGS).path.name.endswith("-002")
    assert (tmp_path / "runs/tiny_model-linear-probe-002/summary.json").exists()
    names = sorted(p.name for p in Path("runs").iterdir())
    assert names == ["tiny_model-linear-probe-001", "tiny_model-linear-probe-002"]


def test_one_process_per_folder(tmp_path: Path):
    config = RunConfig(model="m", data="d", output=tmp_path / "run")
    with claim(config, fresh=False):
        for fresh in (False, True):
            if fresh:
                (tmp_path / "run" / "record.jsonl").touch()
            with (
                pytest.raises(StorageError, match=f"another process.*process {os.getpid()} on"),
                claim(config, fresh=fresh),
            ):
                pass
    with claim(config, fresh=False):
        pass


def test_a_lock_that_outlives_its_process_is_waited_for(tmp_path: Path, monkeypatch):
    """Data workers of a killed run hold its lock until they notice."""
    config = RunConfig(model="m", data="d", output=tmp_path / "run")
    waited: list[float] = []
    acquire = folders.filelock.FileLock.acquire

    def noted(self: Any, timeout: float) -> Any:
        waited.append(timeout)
        return acquire(self, timeout=0)

    monkeypatch.setattr(folders.filelock.FileLock, "acquire", noted)
    with claim(config, fresh=False):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        lock = tmp_path / "run" / ".lock"
        lock.write_text(lock.read_text().replace(str(os.getpid()), str(pid)))
        with pytest.raises(StorageError), claim(config, fresh=False):
            pass
    assert waited == [0, folders._ORPHANS_S]


# -- what the caller gets back -------------------------------------------------------------------


def test_the_caller_keeps_streams_threads_signals_and_logging(tmp_path: Path):
    log = logging.getLogger("frostline")
    before = (log.level, list(log.handlers), signal.getsignal(signal.SIGINT))
    torch.set_num_threads(threads := torch.get_num_threads())

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    expected = draw()
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    frostline.fit(**SETTINGS | {"threads": 2}, output=tmp_path / "run")
    assert draw() == expected
    assert torch.get_num_threads() == threads
    assert (log.level, list(log.handlers), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_saves_first_and_the_run_goes_on_later(tmp_path: Path, finished):
    def press(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    settings = SETTINGS | {"output": tmp_path / "run", "checkpoint_every": None}
    with pytest.raises(KeyboardInterrupt):
        frostline.fit(**settings, on_event=press)
    (saved,) = checkpoint_folders(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000002"
    steps: list[int] = []
    run = frostline.fit(**settings, on_event=lambda e: steps.append(e.get("step", -1)))
    assert steps[0] == 2
    assert run.summary["test_loss"] == finished[0].summary["test_loss"]


def test_a_second_ctrl_c_stops_at_once():
    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_saved(tmp_path: Path):
    settings = SETTINGS | {
        "model": "tiny_task:deep_linear_model",
        "lr": 10, "head_lr": 10, "optimizer": "sgd", "policy": "full", "clip_norm": None,
        "warmup": "4st", "epochs": 30, "patience": None, "checkpoint_every": "1st",
    }  # fmt: skip
    with pytest.raises(NonFiniteLoss, match="learning rates") as caught:
        frostline.fit(**settings, output=tmp_path / "run")
    assert caught.value.exit_code == 1
    for saved in checkpoint_folders(tmp_path / "run" / "checkpoints"):
        verify_folder(saved)
    assert not (tmp_path / "run" / "summary.json").exists()
    with pytest.raises(DataError, match="not finished"):
        _ = Run(tmp_path / "run").summary


# -- asking --------------------------------------------------------------------------------------


def test_settings_come_from_a_file_an_object_or_names(tmp_path: Path):
    from frostline.tasks.run import _settings

    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nepochs: 7\nlr: 0.5\n")
    assert _settings(file, {"lr": 0.1}).epochs == 7
    assert _settings(file, {"lr": 0.1}).lr == 0.1
    base = RunConfig(model="m", data="d", epochs=4)
    assert _settings(base, {"seed": 3}) == RunConfig(model="m", data="d", epochs=4, seed=3)
    given = _settings(None, {"model": "m", "data": Path("d"), "policy": Gradual()})
    assert (given.data, given.policy) == ("d", "gradual")
    for config in (None, base):
        with pytest.raises(ConfigError, match="no setting of that name"):
            _settings(config, {"model": "m", "data": "d", "epoch": 3})


def test_none_given_by_name_is_a_setting(tmp_path: Path, monkeypatch):
    seen = {}

    def noted(config: RunConfig, *, fresh: bool) -> Any:
        seen["config"] = config
        raise DataError("stop", found="here")

    monkeypatch.setattr("frostline.tasks.run.claim", noted)
    with pytest.raises(DataError):
        frostline.fit("m", "d", patience=None)
    assert seen["config"].patience is None
    assert seen["config"].policy == "auto"


def test_a_bad_policy_or_device_ends_before_anything_is_read(tmp_path: Path):
    with pytest.raises(PolicyError):
        frostline.fit(**SETTINGS | {"policy": "gradaul"}, output=tmp_path / "a")
    with pytest.raises(ConfigError, match="device"):
        frostline.fit(**SETTINGS | {"device": "quantum"}, output=tmp_path / "b")


# -- loading -------------------------------------------------------------------------------------


def test_only_a_finished_and_whole_model_is_loaded(run: Run, tmp_path: Path):
    assert frostline.load(str(run.path)).labels == ("dark", "light", "red")
    assert frostline.load(run.path / "model").labels == ("dark", "light", "red")
    with pytest.raises(DataError, match="no such folder"):
        frostline.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no finished run"):
        frostline.load(tmp_path / "empty")
    weights = run.path / "model" / "model.safetensors"
    broken = bytearray(weights.read_bytes())
    broken[-1] ^= 1
    weights.write_bytes(broken)
    with pytest.raises(DamagedFile):
        frostline.load(run)


# -- resources -----------------------------------------------------------------------------------


def test_peak_memory_starts_with_the_run():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel's high-water mark can only be reset on Linux")
    block = np.ones(300_000_000, dtype=np.uint8)
    high = PeakMemory(torch.device("cpu")).read()
    del block
    peak = PeakMemory(torch.device("cpu"))
    if peak.read() > high - 200_000_000:
        pytest.skip("this sandbox forbids resetting the high-water mark")
    block = np.ones(100_000_000, dtype=np.uint8)
    assert (
        high - 250_000_000 < peak.read() < high - 150_000_000
    )  # the base itself may shift a little
    del block


def test_a_device_is_picked_or_refused():
    assert pick_device("auto").type in ("cuda", "mps", "cpu")
    with pytest.raises(ConfigError, match="'cpux'"):
        pick_device("cpux")


def test_threads_are_borrowed():
    before = torch.get_num_threads()
    with borrowed_process(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
