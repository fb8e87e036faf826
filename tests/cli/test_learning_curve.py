"""`frostline learning-curve` on a tiny task: table, sentences, JSON, and what mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faulty_disk import QuickDisk, use_disk
from frostline.cli.learning_curve import print_curve
from frostline.study.learning_curve import LearningCurve, SizePoint

TASK = ("tiny_task:tiny_model", "tiny_task:tiny_data")
QUICK = ("--epochs", "1", "--batch-size", "16", "--lr", "0.01", "--threads", "1", "--device", "cpu",
         "--cache", "off", "--together")  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def test_a_curve_is_drawn_read_again_and_used_by_a_diagnosis(cli, tmp_path: Path):
    arguments = ("learning-curve", *TASK, "--policies", "full", "linear-probe", "--sizes", "12",
                 "100%", "--seeds", "1", "--output", tmp_path / "study", *QUICK)  # fmt: skip
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert len([line for line in done.lines if line.startswith("run ")]) == 4
    assert [line.split()[0] for line in done.out.splitlines() if "%" in line][:2] == ["12", "49"]
    for text in ("samples", "accuracy on 12 validation samples", "one seed says", "study folder"):
        assert text in done.out
    again = cli(*arguments, "--json", "--quiet", "--metric", "test")
    assert again.err == ""
    found = json.loads(again.out)
    assert found["metric"] == "test"
    assert found["policies"] == {"full": "full", "linear-probe": "linear-probe"}
    shown = cli("study", tmp_path / "study")  # from its records, the curve that it is
    assert shown.out == done.out
    assert json.loads(cli("study", tmp_path / "study", "--json").out)["policies"]
    assert "linear-probe@49" in cli("study", tmp_path / "study", "--margin", "0.2").out
    run = tmp_path / "study/runs/full@49/seed-0"
    seen = json.loads(cli("diagnose", run, "--curve", tmp_path / "study", "--json").out)
    sources = {e["source"] for f in seen["findings"] + seen["considered"] for e in f["evidence"]}
    assert "learning curve" in sources


def test_a_size_without_runs_is_a_dash(capsys):
    point = SizePoint(100, {0: 0.5, 1: 0.6}, 0.4, 0.7)
    none = SizePoint(100, {}, None, None, ("seed 0: not finished",))
    other = SizePoint(200, {0: 0.75}, None, None)
    curve = LearningCurve(
        {"full": "full", "\x1b[31mhalf": "first:fraction=0.5"},
        {"full": (point, other), "\x1b[31mhalf": (none,)},
        "val", None, 0.9, ("half on 100, seed 0: not finished",),
    )  # fmt: skip
    print_curve(curve)
    out = capsys.readouterr().out
    rows = [[c.strip() for c in line.split("  ") if c] for line in out.splitlines()]
    assert ["100", "55.0 % [40.0, 70.0]", "-"] in rows
    assert ["200", "75.0 %", "-"] in rows
    assert "accuracy on validation samples; [90 % interval of the mean]" in out
    assert "note: half on 100, seed 0: not finished" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policies", "full"), "no model"),
        ((*TASK, "--sizes", "many"), "no number"),
        ((*TASK, "--sizes", "2"), "3 to 49"),
        ((*TASK, "--sizes", "200%"), "3 to 49"),
        ((*TASK, "--seeds", "0"), "no numbers"),
        ((*TASK, "--policies", "ful"), "ful"),
        ((*TASK, "--budget", "60s"), "in common"),
        ((*TASK, "--train-samples", "20"), "train-samples"),
    ],
)
def test_a_mistake_is_one_message(cli, tmp_path: Path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = cli("learning-curve", *arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())
