"""A run's record says what happened, in order, and a changed line is noticed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from frostline._io import JsonLines
from frostline.driver import Certificate, Hold
from frostline.errors import DamagedFile, DataError
from frostline.plan import FreezePlan
from frostline.policy import Decision
from frostline.records import (
    COLUMNS,
    Row,
    RunRecorder,
    comparison_table,
    read_run,
    without_costs,
)

DECISION = Decision(3, FreezePlan(frozen=frozenset({"stem"}), reason="time"), metrics={"a": 1.0})
CERTIFICATE = Certificate(
    (Hold("w", "ab", 0, 3), Hold("w", "ab", 5, 9), Hold("b", "cd", 0, 9)), 0.5
)
RESULTS = {"val_accuracy": 0.9, "test_accuracy": 0.8, "trained_parameter_share": 0.25}
COSTS = {"wall_s": 12.5, "peak_memory_bytes": 1000, "backward_share": 0.4}


def write_run(folder: Path, *, policy: str = "full", wall_s: float = 1.0) -> Path:
    folder.mkdir()
    recorder = RunRecorder(folder / "record.jsonl")
    recorder.header({"config": {"policy": policy}}, costs={"device": "cpu"})
    recorder.decision(DECISION)
    recorder.epoch(1, 10, {"val_loss": float("nan")}, costs={"wall_s": wall_s})
    recorder.epoch(2, 20, {"val_loss": 0.5}, costs={"wall_s": 2 * wall_s})
    recorder.certificate(CERTIFICATE, sha256="00")
    recorder.end(RESULTS, costs=COSTS)
    recorder.close()
    return folder


def test_a_record_tells_the_run(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a"))
    assert run.path == tmp_path / "a"
    assert run.header["config"] == {"policy": "full"}
    assert run.header["frostline"]
    assert run.decisions == (DECISION,)
    assert run.decisions[0].plan.reason == "time"
    assert [line["epoch"] for line in run.epochs] == [1, 2]
    assert math.isnan(float(run.epochs[0]["metrics"]["val_loss"]))
    assert run.certificate is not None
    assert (run.certificate["tensors"], run.certificate["spans"]) == (2, 3)
    assert run.finished
    assert run.summary == RESULTS | COSTS
    assert not run.torn
    assert read_run(tmp_path / "a" / "record.jsonl").summary == run.summary


def test_two_equal_runs_differ_only_in_costs(tmp_path: Path):
    runs = [read_run(write_run(tmp_path / n, wall_s=s)) for n, s in (("a", 1.0), ("b", 7.0))]
    assert runs[0].epochs != runs[1].epochs
    plain = [[without_costs(line) for line in run.epochs] for run in runs]
    assert plain[0] == plain[1]


def test_an_interrupted_run_is_readable(tmp_path: Path):
    file = write_run(tmp_path / "a") / "record.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:3]) + whole[3][:20])
    run = read_run(tmp_path / "a")
    assert not run.finished
    assert run.torn
    assert len(run.epochs) == 1
    assert run.certificate is None
    assert run.summary == {}


def test_going_on_repeats_no_line(tmp_path: Path):
    file = write_run(tmp_path / "a") / "record.jsonl"
    whole = file.read_bytes()
    recorder = RunRecorder(file, keep=3)
    assert recorder.count == 3
    recorder.epoch(2, 20, {"val_loss": 0.5}, costs={"wall_s": 2.0})
    recorder.certificate(CERTIFICATE, sha256="00")
    recorder.end(RESULTS, costs=COSTS)
    recorder.close()
    recorder.close()
    assert file.read_bytes() == whole


@pytest.mark.parametrize("lost", range(5))
def test_a_lost_line_is_noticed(tmp_path: Path, lost: int):
    file = write_run(tmp_path / "a") / "record.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
    with pytest.raises(DamagedFile):
        read_run(tmp_path / "a")


def test_what_is_no_record_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no record\.jsonl"):
        read_run(tmp_path)
    file = tmp_path / "record.jsonl"
    JsonLines(file).append({"kind": "epoch"})
    with pytest.raises(DamagedFile, match="0 headers"):
        read_run(tmp_path)
    file.unlink()
    JsonLines(file).append({"kind": "header", "format": 99})
    with pytest.raises(DataError, match="format 99"):
        read_run(tmp_path)


def test_runs_side_by_side(tmp_path: Path):
    full, probe = write_run(tmp_path / "a"), write_run(tmp_path / "b", policy="linear-probe")
    unfinished = write_run(tmp_path / "c")
    lines = (unfinished / "record.jsonl").read_bytes().splitlines(keepends=True)
    (unfinished / "record.jsonl").write_bytes(b"".join(lines[:-1]))
    rows = comparison_table([full, read_run(probe), str(unfinished)])
    assert rows[0] == Row("a", "full", 0.9, 0.8, 12.5, 1000, 0.25, 0.4)
    assert rows[1] == Row("b", "linear-probe", 0.9, 0.8, 12.5, 1000, 0.25, 0.4)
    assert rows[2] == Row("c", "full", None, None, None, None, None, None)
    assert list(COLUMNS) == list(Row.__dataclass_fields__)


def test_layer_groups_are_read_from_shallow_to_deep_though_keys_are_sorted(tmp_path: Path):
    recorder = RunRecorder(tmp_path / "record.jsonl")
    names = ["stem", "layer.2", "layer.10", "head"]
    header = {"groups": dict.fromkeys(names, 1), "depths": names, "head": ["head"]}
    recorder.header(header, costs={"groups": dict.fromkeys(names, 0.5)})
    recorder.close()
    read = read_run(tmp_path).header
    assert list(read["groups"]) == names
    assert list(read["costs"]["groups"]) == names


def test_a_record_without_their_order_gets_the_natural_one_with_the_head_last(tmp_path: Path):
    recorder = RunRecorder(tmp_path / "record.jsonl")
    names = ["embeddings", "layer.2", "layer.10", "classifier"]
    recorder.header({"groups": dict.fromkeys(names, 1), "head": ["classifier"]}, costs={})
    recorder.close()
    assert list(read_run(tmp_path).header["groups"]) == names
