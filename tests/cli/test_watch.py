"""`frostline watch`: what it prints, what it shows of a run in progress, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from frostline.records import RunRecorder

pytest.importorskip("waitress", reason="needs waitress: pip install 'frostline[live]'")

METRICS = {"train_loss": 0.5, "val_loss": 0.25, "val_accuracy": 0.875}


def _record(folder: Path) -> RunRecorder:
    folder.mkdir(parents=True)
    recorder = RunRecorder(folder / "record.jsonl")
    config = {"model": "timm:resnet18", "policy": "full"}
    recorder.header({"asked": {}, "config": config, "labels": ["a", "b"]}, costs={})
    return recorder


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  our own, on loopback
        return answer.read().decode()


def _until(url: str, text: str) -> str:
    for _ in range(100):
        try:
            page = _read(url)
        except urllib.error.HTTPError:
            page = ""
        if text in page:
            return page
        time.sleep(0.1)
    raise AssertionError(f"{text!r} never came")


def test_the_page_follows_the_run(tmp_path):
    recorder = _record(tmp_path / "runs/first-001")
    with subprocess.Popen(
        [sys.executable, "-c", "from frostline.cli import main; main()", "watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"NO_COLOR": "1"},
    ) as watching:
        assert watching.stdout is not None
        try:
            url = watching.stdout.readline().strip()
            assert "first-001" in _read(url)
            _until(f"{url}page", "timm:resnet18")
            recorder.epoch(1, 10, METRICS, costs={})
            _until(f"{url}page", "87.5 %")
            recorder.close()
            record = tmp_path / "runs/first-001/record.jsonl"
            whole = record.read_bytes()
            record.write_bytes(whole.replace(b"resnet18", b"resnet34"))
            _until(f"{url}state", "damaged")
            _until(f"{url}page", "87.5 %")  # the last good one
            record.write_bytes(whole)
            _until(f"{url}state", '"problem": ""')
        finally:
            watching.kill()


def test_there_must_be_something_to_watch(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("watch")
    assert done.code == 1
    assert "no run in runs" in done.err
    done = cli("watch", "nowhere")
    assert done.code == 1
    assert "no such folder" in done.err
    done = cli("watch", tmp_path, "--port", "70000")
    assert done.code == 2
