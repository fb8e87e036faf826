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
    for text in ("against full", "time@linear-probe", "take: ", "one of full", "study folder"):
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


def test_a_sweep_ranks_and_says_what_to_compare(cli, tmp_path: Path):
    arguments = ("sweep", *TASK, "--policies", "linear-probe", "full", "--output",
                 tmp_path / "sweep", *QUICK)  # fmt: skip
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "was best with one seed" in done.out
    found = json.loads(cli(*arguments, "--json", "--quiet").out)
    assert {row["arm"] for row in found["rows"]} == {"full", "linear-probe"}


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
