"""What is watched: news without rendering, one page per version, problems told, rest in between."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from frostline.errors import DamagedFile, DataError
from frostline.live.watched import Watched
from report_records import write_study


class Renderer:
    """Counts; fails when told."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None
        self.slow_s = 0.0
        self.now = 0.0

    def __call__(self, paths) -> str:
        self.calls += 1
        self.now += self.slow_s
        if self.error is not None:
            raise self.error
        return f"page {self.calls} of {', '.join(p.name for p in paths)}"

    def clock(self) -> float:
        return self.now


@pytest.fixture
def render() -> Renderer:
    return Renderer()


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def _write(file: Path, text: str = "x") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _watched(render: Renderer, *paths: Path) -> Watched:
    return Watched(paths, render, clock=render.clock, spent=render.clock)


def test_a_folder_without_a_record_is_waited_for(run, render):
    watched = _watched(render, run)
    state = watched.state()
    assert (state.phase, state.version, state.changed_s, state.problem) == ("waiting", "", None, "")
    assert watched.page() is None
    assert render.calls == 0
    _write(run / "record.jsonl")
    assert watched.state().phase == "unfinished"
    assert watched.page().html == "page 1 of run"


def test_a_page_is_made_once_per_version(run, render):
    _write(run / "record.jsonl")
    watched = _watched(render, run)
    versions = {watched.state().version for _ in range(3)}
    assert render.calls == 1
    _write(run / "record.jsonl", "longer")
    assert watched.state().version not in versions
    assert render.calls == 2
    os.utime(run / "record.jsonl", (1, 1))
    watched.state()
    assert render.calls == 3
    _write(run / "summary.json")
    assert watched.state().phase == "finished"
    assert render.calls == 4


def test_a_slow_page_rests_before_it_is_made_again(run, render):
    render.slow_s = 2.0
    _write(run / "record.jsonl")
    watched = _watched(render, run)
    watched.page()  # the first one imports what it needs, and is not counted
    _write(run / "record.jsonl", "more")
    second = watched.page()
    assert second.html.startswith("page 2")
    _write(run / "record.jsonl", "still more")
    render.now += 30.0
    assert watched.page() is second
    assert watched.state().version == second.version  # of what would be served
    render.now += 10.0
    assert watched.page().html.startswith("page 3")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DamagedFile("read x", found="line 3 is damaged"), "line 3 is damaged"),
        (ZeroDivisionError("a bug"), "unexpected ZeroDivisionError: a bug"),
    ],
)
def test_what_cannot_be_shown_is_told_and_the_last_good_page_stays(run, render, error, says):
    _write(run / "record.jsonl")
    watched = _watched(render, run)
    good = watched.page()
    render.error = error
    _write(run / "record.jsonl", "damaged")
    state = watched.state()
    assert says in state.problem
    assert state.version == good.version
    assert watched.page() is good
    watched.state()
    assert render.calls == 2  # not tried again until a file changes
    render.error = None
    _write(run / "record.jsonl", "mended now")
    assert watched.state().problem == ""
    assert watched.page().html == "page 3 of run"


def test_a_run_moved_aside_is_no_problem_and_its_successor_is_shown(run, render):
    _write(run / "record.jsonl")
    watched = _watched(render, run)
    watched.page()
    run.rename(run.with_name("run.old-001"))
    assert (watched.state().phase, watched.state().problem) == ("waiting", "")
    _write(run / "record.jsonl")
    assert watched.state().phase == "unfinished"
    assert watched.page().html == "page 2 of run"


def test_a_study_is_finished_when_the_last_run_that_it_declares_is(tmp_path, render):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.8, 0.9]})
    watched = _watched(render, study)
    assert watched.state().phase == "finished"
    shutil.rmtree(study / "runs" / "bitfit" / "seed-1")  # between two runs
    assert watched.state().phase == "unfinished"
    (study / "runs" / "bitfit" / "seed-1.failed.json").write_text("{}")
    assert watched.state().phase == "finished"
    (study / "study.json").write_text("{")
    assert watched.state().phase == "finished"


def test_runs_of_a_study_are_found_and_links_not_followed(tmp_path, render):
    study = tmp_path / "study"
    _write(study / "runs/full/seed-0/record.jsonl")
    _write(tmp_path / "elsewhere/record.jsonl")
    (study / "runs/link").symlink_to(tmp_path / "elsewhere")
    watched = _watched(render, study)
    before = watched.version()
    _write(tmp_path / "elsewhere/record.jsonl", "changed")
    assert watched.version() == before
    _write(study / "runs/probe/seed-0/record.jsonl")
    assert watched.version() != before
    _write(study / "runs/full/seed-0/summary.json")
    assert watched.state().phase == "unfinished"
    _write(study / "runs/probe/seed-0/summary.json")
    assert watched.state().phase == "finished"


def test_many_threads_make_one_page(run, render):
    _write(run / "record.jsonl")
    watched = _watched(render, run)
    threads = [threading.Thread(target=watched.state) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert render.calls == 1


def test_what_is_no_folder_is_refused(tmp_path, render):
    _write(tmp_path / "file")
    with pytest.raises(DataError, match="no such folder"):
        _watched(render, tmp_path / "nowhere")
    with pytest.raises(DataError, match="a file"):
        _watched(render, tmp_path / "file")
