"""`frostline watch`: what it prints, what it shows of a run in progress, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest

import frostline
from faulty_disk import QuickDisk, use_disk

pytest.importorskip("waitress", reason="needs waitress: pip install 'frostline[live]'")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> list[bytes]:
    """The lines of the record of a run."""
    output = tmp_path_factory.mktemp("finished") / "run"
    with use_disk(QuickDisk()):
        run = frostline.fit(
            "tiny_task:tiny_model", "tiny_task:tiny_data", "full",
            output=output, epochs=2, threads=1, device="cpu", cache="off",
        )  # fmt: skip
    return (run.path / "record.jsonl").read_bytes().splitlines(keepends=True)


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  our own, on loopback
        return answer.read().decode()


def _until(url: str, text: str) -> str:
    for _ in range(300):
        try:
            page = _read(url)
        except urllib.error.HTTPError:
            page = ""
        if text in page:
            return page
        time.sleep(0.1)
    raise AssertionError(f"{text!r} never came")


@pytest.mark.parametrize("charts", [True, False])
def test_the_page_follows_the_run(tmp_path, finished, charts):
    epochs = [i for i, line in enumerate(finished) if b'"kind":"epoch"' in line]
    accuracy = json.loads(finished[epochs[0]])["data"]["metrics"]["val_accuracy"]
    record = tmp_path / "runs/first-001/record.jsonl"
    record.parent.mkdir(parents=True)
    record.write_bytes(b"".join(finished[: epochs[0]]))
    hide = "" if charts else "import sys; sys.modules['altair'] = None; "
    with subprocess.Popen(
        [sys.executable, "-c", f"{hide}from frostline.cli import main; main()", "watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"NO_COLOR": "1"},
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        try:
            url = watching.stdout.readline().strip()
            assert ("without charts" in watching.stderr.readline()) is not charts
            assert "first-001" in _read(url)
            before = _until(f"{url}page", "tiny_task:tiny_model")
            assert ("vega" in before.lower()) is charts
            record.write_bytes(b"".join(finished[: epochs[0] + 1]))
            _until(f"{url}page", f"{100 * accuracy:.1f}")
            whole = record.read_bytes()
            record.write_bytes(whole.replace(b"tiny_model", b"tidy_model"))
            _until(f"{url}state", "damaged")
            _until(f"{url}page", f"{100 * accuracy:.1f}")  # the last good one
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
