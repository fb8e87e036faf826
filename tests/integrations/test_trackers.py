"""Each tracker's real package: what was logged reads back, resumed runs are one, nothing leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from frostline.integrations import tracking
from frostline.integrations.tracking import open_tracking

#: Whoever else is asked for, when a tracker wants to talk to somebody: refused, and written down.
_FENCE = """
import os, runpy, socket, sys

def fence(method):
    def fenced(self, address, *rest):
        local = self.family == getattr(socket, "AF_UNIX", None) or (
            isinstance(address, tuple) and str(address[0]) in ("127.0.0.1", "localhost", "::1"))
        if not local:
            with open(os.environ["FENCE"], "a") as file:
                file.write(repr(address) + "\\n")
            raise OSError("fenced")
        return method(self, address, *rest)
    return fenced

socket.socket.connect = fence(socket.socket.connect)
socket.socket.connect_ex = fence(socket.socket.connect_ex)
resolve = socket.getaddrinfo
def look_up(host, *rest, **more):
    if host not in (None, "127.0.0.1", "localhost", "::1", "", b"localhost"):
        with open(os.environ["FENCE"], "a") as file:
            file.write("look up " + repr(host) + "\\n")
        raise socket.gaierror("fenced")
    return resolve(host, *rest, **more)
socket.getaddrinfo = look_up
runpy.run_module("frostline.integrations.tracker_process", run_name="__main__")
"""

pytestmark = pytest.mark.slow  # each imports its package: seconds


def _needs(name: str) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {name}: pip install 'frostline[trackers]'")


@pytest.fixture(autouse=True)
def fence(tmp_path, monkeypatch) -> Iterator[Path]:
    """No variable of the user's decides, and no connection leaves this machine."""
    asked = tmp_path / "asked-for"
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FENCE", str(asked))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "_COMMAND", (sys.executable, "-c", _FENCE))
    monkeypatch.setattr(tracking, "_CLOSE_S", 300.0)  # imports on a busy machine
    yield asked
    assert not asked.exists(), asked.read_text()


def _log(folder: Path, name: str, caplog, *, steps: range, status: str = "finished") -> None:
    told = open_tracking(
        [name],
        folder,
        name="first-001",
        settings={"policy": "gradual", "lr": 0.001, "budget": None},
        step=steps.start - 1,
    )
    for step in steps:
        told.values({"train/loss": 1 / step, "grad_norm/layer1.0": 2.0 * step}, step)
    told.text("decision", f"step {steps.stop - 1}: frozen 1 of 3\n<b>reason</b>", steps.stop - 1)
    told.values({"bad": float("nan")}, steps.stop - 1)
    told.close(status)
    assert not caplog.records, caplog.text


def test_tensorboard(tmp_path, caplog):
    _needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _log(tmp_path / "t", "tensorboard", caplog, steps=range(1, 9), status="unfinished")
    _log(tmp_path / "t", "tensorboard", caplog, steps=range(5, 13))  # updates 5 to 8 again
    read = EventAccumulator(str(tmp_path / "t/tensorboard"))
    read.Reload()
    found = [(e.step, pytest.approx(e.value)) for e in read.Scalars("train/loss")]
    assert found == [(step, 1 / step) for step in range(1, 13)]
    text = read.Tensors("decision/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "<b>reason</b>" in text
    settings = read.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"policy": "gradual"' in settings


def test_mlflow(tmp_path, caplog):
    _needs("mlflow")
    _log(tmp_path / "t", "mlflow", caplog, steps=range(1, 5), status="unfinished")
    status, _, _ = _mlflow(tmp_path / "t/mlflow")
    assert status == "KILLED"
    _log(tmp_path / "t", "mlflow", caplog, steps=range(5, 9))
    status, run, metrics = _mlflow(tmp_path / "t/mlflow")
    assert status == "FINISHED"
    assert run["params"] == {"policy": "gradual", "lr": "0.001", "budget": "None"}
    assert run["name"] == "first-001"
    assert metrics["train/loss"] == [[step, pytest.approx(1 / step)] for step in range(1, 9)]
    assert metrics["grad_norm/layer1.0"][-1] == [8, 16.0]
    assert "step 8: frozen 1 of 3" in run["texts"]


def _mlflow(folder: Path) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """The one run there, read by MLflow in a process of its own: it changes the one it is in."""
    code = """
import json, sys
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient(Path(sys.argv[1]).as_uri())
(run,) = client.search_runs([client.get_experiment_by_name("frostline").experiment_id])
metrics = {name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)]
           for name in ("train/loss", "grad_norm/layer1.0")}
texts = (Path(run.info.artifact_uri.removeprefix("file://")) / "texts.tsv").read_text()
print(json.dumps([run.info.status, {"params": run.data.params, "name": run.info.run_name,
                  "texts": texts}, metrics]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def test_wandb_offline(tmp_path, caplog):
    _needs("wandb")
    _log(tmp_path / "t", "wandb", caplog, steps=range(1, 5), status="unfinished")
    _log(tmp_path / "t", "wandb", caplog, steps=range(3, 9))
    runs = sorted((tmp_path / "t/wandb").glob("offline-run-*"))
    assert len(runs) == 2
    identity = (tmp_path / "t/id").read_text()
    assert all(run.name.endswith(identity) for run in runs)  # one run, once it is synced
    first, second = (_wandb(run) for run in runs)
    assert [row["update"] for row in first if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in second if "train/loss" in row] == [
        pytest.approx(1 / step) for step in range(3, 9)
    ]
    assert any("frozen 1 of 3" in str(row.get("decision")) for row in second)


def _wandb(run: Path) -> list[dict[str, Any]]:
    """The rows in an offline run's log, as W&B reads it itself."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in _chunks(next(run.glob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def _chunks(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, parts with checksum, length and kind."""
    place, whole = 7, b""  # after the file's own header
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", log, place + 4)
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def test_trackio(tmp_path, caplog):
    _needs("trackio")
    _log(tmp_path / "t", "trackio", caplog, steps=range(1, 5), status="unfinished")
    _log(tmp_path / "t", "trackio", caplog, steps=range(5, 9))
    code = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(SQLiteStorage.get_runs("frostline"))
print(json.dumps(SQLiteStorage.get_logs("frostline", "first-001"), default=str))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "t/trackio")},
    )
    runs, rows = done.stdout.splitlines()[-2:]
    assert runs == "['first-001']"
    found = json.loads(rows)
    losses = {row["step"]: row["train/loss"] for row in found if "train/loss" in row}
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 9)}
    assert any("frozen 1 of 3" in str(row.get("decision")) for row in found)


def test_trackers_of_accelerate(tmp_path):
    _needs("accelerate")
    _needs("tensorboard")
    code = """
import sys
from accelerate.state import PartialState
from accelerate.tracking import TensorBoardTracker
from frostline.integrations.tracking import open_tracking
PartialState(cpu=True)
tracker = TensorBoardTracker("mine", sys.argv[1])
tracker.start()
told = open_tracking([tracker], sys.argv[1], name="mine")
told.values({"loss": 0.5}, 3)
told.text("decision", "frozen 1 of 3", 3)
told.close("finished")
tracker.finish()
"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=300)
    read = EventAccumulator(str(tmp_path / "mine"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(3, 0.5)]
    assert "frozen 1 of 3" in str(read.Tensors("decision/text_summary")[0].tensor_proto)
