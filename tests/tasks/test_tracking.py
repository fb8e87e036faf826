"""Trackers and savings of a whole run: what is told, and that the run is the same without them."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline.errors import ConfigError, MissingExtra
from frostline.integrations import tracking
from frostline.integrations.trackers import check_installed
from frostline.records import read_run
from frostline.tasks.config import dump_config, load_config
from run_bits import run_bits

SETTINGS: dict[str, Any] = {
    "model": "tiny_task:tiny_model",
    "data": "tiny_task:tiny_data",
    "policy": "gradual:until=60%",
    "epochs": 3,
    "batch_size": 16,
    "lr": 0.01,
    "threads": 1,
    "device": "cpu",
    "patience": None,
}
#: Stands in for the trackers: every session's lines in a file of its own.
_NOTE = """
import sys, time
lines = sys.stdin.read()
open(f"told-{time.time_ns()}.jsonl", "w").write(lines)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "_COMMAND", (sys.executable, "-c", _NOTE))
    monkeypatch.setattr(tracking, "check_installed", lambda names: None)
    monkeypatch.setattr("frostline.tasks.session.check_installed", lambda names: None)
    with use_disk(QuickDisk()):
        yield


def _fit(output: str, **more: Any) -> Path:
    return frostline.fit(**SETTINGS, output=output, **more).path


def _told() -> list[list[dict[str, Any]]]:
    """Lines of each session, in order."""
    files = sorted(Path().glob("told-*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def _bits(run: Path) -> dict[str, Any]:
    return {name: bits for name, bits in run_bits(run).items() if name != "config"}


def test_a_run_is_the_same_with_trackers_and_they_are_told_all_of_it():
    plain, told = _fit("plain"), _fit("told", trackers=["mlflow", "wandb"])
    assert _bits(told) == _bits(plain)
    (lines,) = _told()
    first, *rest, last = lines
    assert first["trackers"] == ["mlflow", "wandb"]
    assert first["folder"] == "told/trackers"
    assert first["settings"]["policy"] == "gradual:until=60%"
    assert last == {"status": "finished"}
    values = [(line["step"], line["values"]) for line in rest if "values" in line]
    record = read_run(told)
    for epoch in record.epochs:
        found = {}
        for step, numbers in values:
            found |= numbers if step == epoch["step"] else {}
        assert found["epoch/val_accuracy"] == epoch["metrics"]["val_accuracy"]
        assert found["cost/wall_s"] == epoch["costs"]["wall_s"]
    losses = [step for step, numbers in values if "train/loss" in numbers]
    assert losses == list(range(1, record.summary["steps"] + 1))
    texts = [line["texts"]["decision"] for line in rest if "texts" in line]
    assert len(texts) == len(record.decisions)
    assert all(d.plan.reason in text for d, text in zip(record.decisions, texts, strict=True))
    assert any("summary/test_accuracy" in numbers for _, numbers in values)


def test_signals_are_told_per_group():
    policy = {"policy": "autofreeze:every=2st"}
    run = frostline.fit(**SETTINGS | policy, output="run", trackers=["trackio"]).path
    (lines,) = _told()
    names = {name for line in lines for name in line.get("values", {})}
    signals = {s for d in read_run(run).decisions for s in d.signals}
    assert signals
    groups = read_run(run).header["groups"]
    assert all(any(f"{s}/{g}" in names for g in groups) for s in signals)


def test_trackers_are_free_to_change_when_a_run_goes_on():
    _fit("run", trackers=["mlflow"], pause_after=1)
    _fit("run", pause_after=2)
    done = _fit("run", trackers=["tensorboard"])
    straight = _fit("straight")
    assert _bits(done) == _bits(straight)
    first, last = _told()
    assert first[-1] == {"status": "unfinished"}
    assert last[0]["step"] == read_run(done).epochs[1]["step"]
    assert last[-1] == {"status": "finished"}


def test_a_run_that_fails_is_told_as_failed():
    broken = SETTINGS | {"model": "tiny_task:deep_linear_model", "lr": 10.0, "policy": "full"}
    with pytest.raises(frostline.FrostlineError):
        frostline.fit(
            **broken | {"optimizer": "sgd", "clip_norm": None, "epochs": 20},
            output="run",
            trackers=["mlflow"],
        )
    assert _told()[-1][-1] == {"status": "failed"}


def test_a_process_that_dies_does_not_touch_the_run(monkeypatch, caplog):
    monkeypatch.setattr(tracking, "_COMMAND", (sys.executable, "-c", "import os; os._exit(9)"))
    plain = _fit("plain")
    with caplog.at_level(logging.WARNING):
        told = _fit("told", trackers=["mlflow"])
    assert _bits(told) == _bits(plain)
    assert caplog.text.count("ended by itself") == 1
    assert "ended by itself" in (told / "log.txt").read_text()


def test_one_that_is_not_installed_is_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr("frostline.tasks.session.check_installed", check_installed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="frostline\\[trackers\\]"):
        _fit("run", trackers=["mlflow"])
    assert not Path("run/record.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("tensorboard,mlflow", ("tensorboard", "mlflow")),
        (["wandb", "wandb"], ("wandb",)),
        ("", ()),
        ("none", ()),
        ([], ()),
    ],
)
def test_trackers_are_read_from_text_and_lists(given, read, tmp_path):
    config = load_config(None, {"model": "m", "data": "d", "trackers": given})
    assert config.trackers == read
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("given", ["tensorbord", 3, ["mlflow", "x"], {"mlflow": True}])
def test_no_such_tracker(given):
    with pytest.raises(ConfigError, match="set trackers"):
        load_config(None, {"model": "m", "data": "d", "trackers": given})


# -- time saved ----------------------------------------------------------------------------------


def test_the_time_saved_goes_on_through_sessions_and_is_in_the_record():
    _fit("run", pause_after=1)
    before = read_run("run").epochs[-1]["costs"]
    done = _fit("run")
    costs = [epoch["costs"] for epoch in read_run(done).epochs]
    assert costs[0] == before
    full = [cost["full_predicted_s"] for cost in costs]
    assert full == sorted(full)
    savings = json.loads((done / "summary.json").read_text())["savings"]
    assert savings["full_predicted_s"] == pytest.approx(full[-1])
    charged = savings["updates_s"] + savings["measure_s"]
    assert savings["saved_predicted_s"] == pytest.approx(savings["full_predicted_s"] - charged)
    assert savings["wait_samples"] + savings["other_samples"] == 3 * 49


def test_with_the_cache_the_pace_comes_from_filling_it():
    policy = {"policy": "linear-probe", "cache": "on", "augment": "none"}
    run = frostline.fit(**SETTINGS | policy, output="run", cache_dir="store").path
    summary = json.loads((run / "summary.json").read_text())
    assert summary["cache"]["computed_rows"] >= 49
    assert 0 < summary["cache"]["compute_s"] <= summary["cache"]["fill_s"]
    savings = summary["savings"]
    assert savings["other_samples"] == 3 * 49
    assert savings["full_predicted_s"] > 0
    again = frostline.fit(**SETTINGS | policy, output="again", cache_dir="store").path
    savings = json.loads((again / "summary.json").read_text())["savings"]
    assert savings["saved_predicted_s"] is None  # an earlier run paid, nothing tells the pace
