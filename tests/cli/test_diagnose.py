"""`frostline diagnose` on tiny runs: what is printed, what is kept, and what mistakes are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline.records import DIAGNOSIS_NAME, PROBES_NAME

TASK = {"model": "tiny_task:tiny_model", "data": "tiny_task:tiny_data"}
QUICK = {"epochs": 2, "batch_size": 16, "lr": 0.01, "threads": 1, "device": "cpu", "cache": "off"}


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with runs as a study leaves them."""
    place = tmp_path_factory.mktemp("runs")
    with use_disk(QuickDisk()):
        for policy, seed in (("linear-probe", 0), ("linear-probe", 1), ("full", 0)):
            output = place / policy / f"seed-{seed}"
            frostline.fit(**TASK, **QUICK, policy=policy, seed=seed, output=output)
    return place


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to write into."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def test_one_run_is_diagnosed_and_nothing_is_written(cli, runs: Path):
    before = sorted(runs.rglob("*"))
    done = cli("diagnose", runs / "full" / "seed-0")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{runs / 'full' / 'seed-0'}: full, ")
    assert "not found" not in done.out
    assert sorted(runs.rglob("*")) == before
    more = cli("diagnose", runs / "full" / "seed-0", "--considered")
    assert "Learning rate too high: not found" in more.out


def test_a_policy_of_a_study_stands_for_its_seeds(cli, runs: Path):
    arguments = ("diagnose", runs / "linear-probe", "--reference", runs / "full", "--json")
    found = json.loads(cli(*arguments).out)
    assert [Path(run).name for run in found["runs"]] == ["seed-0", "seed-1"]
    assert found["policy"] == "linear-probe"
    sources = {e["source"] for f in found["findings"] + found["considered"] for e in f["evidence"]}
    assert "reference" in sources
    assert "probe" not in sources


def test_what_is_kept_is_what_is_printed_and_the_run_is_as_it_was(cli, runs: Path):
    first = runs / "linear-probe" / "seed-0"
    record = (first / "record.jsonl").read_bytes()
    done = cli("diagnose", runs / "linear-probe", "--probe", "--save", "--json")
    assert done.code == 0, done.err
    assert done.lines == [f"probing the pretrained network of {first}, layer by layer"]
    kept = json.loads((first / DIAGNOSIS_NAME).read_text())
    assert kept == json.loads(done.out)
    assert json.loads((runs / "linear-probe/seed-1" / DIAGNOSIS_NAME).read_text()) == kept
    assert not (runs / "linear-probe/seed-1" / PROBES_NAME).exists()
    assert (first / "record.jsonl").read_bytes() == record
    # The probe that was kept says the same.
    again = cli("diagnose", runs / "linear-probe", "--probe-file", first / PROBES_NAME, "--json")
    assert again.err == ""
    assert json.loads(again.out) == kept
    # It is read without being named, too, as the one that `auto` leaves is.
    assert json.loads(cli("diagnose", runs / "linear-probe", "--json").out) == kept
    # A run with these files beside its record is still the same run.
    assert frostline.fit(**TASK, **QUICK, policy="linear-probe", output=first).path == first


def test_the_probe_is_of_the_samples_of_the_run(cli, runs: Path, monkeypatch):
    import tiny_task

    parts = tiny_task.tiny_data()
    parts["train"] = parts["train"][:40]
    monkeypatch.setattr(tiny_task, "tiny_data", lambda: parts)
    done = cli("diagnose", runs / "full" / "seed-0", "--probe")
    assert done.code == 1
    assert "train samples in tiny_task:tiny_data that are not those of the run" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no run"),
        (("nowhere",), "record.jsonl"),
        (("full/seed-0", "linear-probe/seed-0"), "several strategies"),
        (("full/seed-0", "--curve", "full"), "no study.json"),
        (("full/seed-0", "--probe-file", "none.json"), "no such file"),
        (("full/seed-0", "--probe", "--probe-file", "none.json"), "one of the two"),
        (("full/seed-0", "--probe-file", "full/seed-0/summary.json"), "probe curve"),
    ],
)
def test_a_mistake_is_one_message(cli, runs: Path, monkeypatch, arguments, message):
    monkeypatch.chdir(runs)
    done = cli("diagnose", *arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
