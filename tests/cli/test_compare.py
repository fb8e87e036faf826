"""`frostline compare`, `study` and `sweep` on a tiny task, and what they say to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faulty_disk import QuickDisk, use_disk

TASK = ("tiny_task:tiny_model", "tiny_task:tiny_data")
QUICK = ("--epochs", "2", "--batch-size", "16", "--lr", "0.01", "--threads", "1", "--device", "cpu",
         "--cache", "off", "--together")  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def test_a_comparison_prints_a_table_and_what_follows(cli, tmp_path: Path):
    arguments = ("compare", *TASK, "--policies", "full", "linear-probe", "--seeds", "2",
                 "--controls", "time", "--output", tmp_path / "study", *QUICK)  # fmt: skip
    done = cli(*arguments)
    assert done.code == 0, done.err
    for text in ("against full", "time@linear-probe", "take: ", "one of full", "study folder",
                 "test acc against full", "whole run", "reached",
                 "margin 0.01 of accuracy, level 0.95",
                 "note: a run is judged by 12 validation samples"):  # fmt: skip
        assert text in done.out
    assert len([line for line in done.lines if line.startswith("run ")]) == 6
    again = cli(*arguments, "--json", "--quiet")
    assert again.err == ""
    found = json.loads(again.out)
    assert [arm["arm"]["name"] for arm in found["arms"]] == [
        "full", "linear-probe", "time@linear-probe"
    ]  # fmt: skip
    assert found["choice"] == "full"
    read = cli("study", tmp_path / "study", "--reference", "linear-probe", "--margin", "0.2")
    assert read.code == 0
    assert "against linear-probe" in read.out
    assert "chosen after the runs, proves nothing" in read.out
    read = cli("study", tmp_path / "study", "--target", "0.05")
    assert "to 5.0 %" in read.out
    assert read.out.count("2 of 2") == 3


def test_a_sweep_ranks_and_says_what_to_compare(cli, tmp_path: Path):
    arguments = ("sweep", *TASK, "--policies", "linear-probe", "full", "--output",
                 tmp_path / "sweep", *QUICK)  # fmt: skip
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "was best with one seed" in done.out
    found = json.loads(cli(*arguments, "--json", "--quiet").out)
    assert {row["arm"] for row in found["rows"]} == {"full", "linear-probe"}


def test_settings_come_from_a_file_too_and_flags_win(cli, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: nowhere:model\ndata: tiny_task:tiny_data\nepochs: 1\nbatch_size: 16\nlr: 0.01\n"
        "threads: 1\ndevice: cpu\ncache: off\npolicy: lp-ft\nseed: 5\noutput: elsewhere\n"
    )
    done = cli("compare", "--model", TASK[0], "--config", file, "--epochs", "2", "--together",
               "--policies", "full", "--seeds", "1", "--output", tmp_path / "s")  # fmt: skip
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "s" / "study.json").read_text())
    assert {k: said["settings"][k] for k in ("model", "data", "lr", "cache")} == {
        "model": TASK[0], "data": TASK[1], "lr": 0.01, "cache": "off"
    }  # fmt: skip
    assert int(said["settings"]["epochs"]) == 2
    assert said["seeds"] == [0]
    assert not {"policy", "seed", "output"} & said["settings"].keys()
    file.write_text("epochs: 1\nepocs: 2\n")
    done = cli("compare", *TASK, "--config", file)
    assert done.code in (1, 2)
    assert "epocs" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--policies", "full"), "no model"),
        (("compare", *TASK, "--seeds", "none"), "no numbers"),
        (("compare", *TASK, "--seeds", "0"), "no numbers"),
        (("compare", *TASK, "--policies", "ful"), "ful"),
        (("compare", *TASK, "--controls", "luck"), "no such control"),
        (("compare", *TASK, "--reference", "none"), "no arm named"),
        (("compare", *TASK, "--margin", "2"), "margin"),
        (("compare", *TASK, "--level", "95"), "level"),
        (("compare", *TASK, "--target", "90"), "target"),
        (("compare", *TASK, "--policies"), "policies"),
        (("compare", *TASK, "--policies", "full", "full"), "twice"),
        (("compare", *TASK, "--nothing", "2"), "nothing"),
        (("compare", *TASK, "--budget", "5"), "budget"),
        (("study", "nowhere"), "no study.json"),
        (("sweep", *TASK, "--policies", "full", "--output", "s", "--factor", "1"), "too small"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2_or_1(
    cli, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())
