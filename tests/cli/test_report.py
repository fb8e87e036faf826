"""`frostline report` and `frostline show`: pages, files, lines, and what mistakes are told."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from faulty_disk import QuickDisk, use_disk
from frostline.policy import Decision
from report_records import hostile_run, plan, write_run, write_study

DECISIONS = [
    Decision(0, plan("stem", "body", reason="head first")),
    Decision(10, plan("stem", reason="body joins")),
]


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def test_a_report_is_written_into_the_folder_of_its_run(cli, tmp_path: Path):
    run = write_run(tmp_path / "run", policy="gradual", decisions=DECISIONS)
    done = cli("report", run)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "gradual reached 75.0 % validation accuracy.",
        f"report: {run / 'report.html'}",
    ]
    assert "<title>timm:net on photos</title>" in (run / "report.html").read_text()
    assert cli("report", run).code == 0


def test_several_runs_make_one_report_here_with_figures(cli, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", policy="bitfit")]
    done = cli("report", *runs, "--figures", "figures")
    assert done.code == 0, done.err
    assert Path("report.html").is_file()
    assert "files in figures" in done.err
    assert Path("figures/quality_time.svg").is_file()


def test_the_numbers_of_a_report_as_json(cli, tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.81], "bitfit": [0.8, 0.82]})
    done = cli("report", study, "--json")
    assert done.code == 0, done.err
    assert [arm["name"] for arm in json.loads(done.out)["arms"]] == ["full", "bitfit"]
    assert not (study / "report.html").exists()


def test_a_report_in_a_run_folder_does_not_keep_the_run_from_going_on(cli, tmp_path: Path):
    quick = ("--epochs", "1", "--batch-size", "16", "--threads", "1", "--device", "cpu",
             "--cache", "off", "--output", tmp_path / "run")  # fmt: skip
    fit = ("fit", "tiny_task:tiny_model", "tiny_task:tiny_data", "--policy", "full", *quick)
    assert cli(*fit).code == 0
    done = cli("report", tmp_path / "run", "--samples")
    assert done.code == 0, done.err
    assert cli(*fit).code == 0


def test_show_draws_what_was_frozen_when(cli, tmp_path: Path):
    run = write_run(tmp_path / "run", policy="gradual", decisions=DECISIONS)
    done = cli("show", run)
    assert done.code == 0, done.err
    stem, body, head = (
        next(line for line in done.out.splitlines() if line.startswith(f"{name} "))
        for name in ("stem", "body", "head")
    )
    assert set(stem.split()[1]) == {"█"}
    assert (body.count("█"), body.count("·")) == (body.count("·"), body.count("█"))
    assert set(head.split()[1]) == {"·"}
    assert "body joins" in done.out
    assert "frostline fit timm:net photos --policy gradual" in done.out
    short = cli("show", run, "--decisions", "1")
    assert "body joins" not in short.out
    assert "and 1 more decisions" in short.out
    assert json.loads(cli("show", run, "--json").out)["featured"] == "run"


def test_hostile_names_do_not_reach_the_terminal(cli, tmp_path: Path):
    done = cli("show", hostile_run(tmp_path / "run"), "--decisions", "0")
    assert done.code == 0, done.err
    assert not set("\x1b\x07\u202e\u2028") & set(done.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "no such folder"),
        (("report", "."), "neither a run nor a study"),
        (("show", "nowhere"), "no such folder"),
        (("report",), "report --help"),
    ],
)
def test_a_mistake_is_one_message(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert not list(tmp_path.iterdir())


def test_a_page_of_ones_own_is_not_overwritten(cli, tmp_path: Path):
    run = write_run(tmp_path / "run")
    (tmp_path / "mine.html").write_text("mine")
    done = cli("report", run, "--output", tmp_path / "mine.html")
    assert done.code == 1
    assert "no report" in done.err
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_without_the_extra_the_line_that_installs_it_is_said(cli, tmp_path, monkeypatch):
    real = importlib.import_module

    def absent(name: str, package: str | None = None):
        if name == "altair":
            raise ModuleNotFoundError("No module named 'altair'", name="altair")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    done = cli("report", write_run(tmp_path / "run"))
    assert done.code == 2
    assert "pip install 'frostline[report]'" in done.err
    assert cli("show", tmp_path / "run").code == 0
