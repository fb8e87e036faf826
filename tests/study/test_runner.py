"""The folder of a study: what is declared there, when it holds, how it grows. Nothing trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from frostline.errors import ConfigError
from frostline.records import read_run
from frostline.study.analysis import analyse
from frostline.study.compare import declare
from frostline.study.runner import open_study, settle
from frostline.study.spec import Arm, StudySpec
from report_records import write_run

SETTINGS = {"model": "timm:net", "data": "photos"}


def opened(path: Path, policies: Sequence[str], **more: Any) -> StudySpec:
    """The study to run there, as the runner sees it."""
    given = {"settings": SETTINGS, "seeds": 1} | more
    same = given.pop("same_reference", False)
    spec = declare(given.pop("settings"), policies, **given)
    with open_study(path, spec, same_reference=same) as (folder, whole):
        assert folder.spec() == whole
        return whole


def ran(path: Path, *arms: str) -> None:
    """Records of runs with the first seed."""
    for arm in arms:
        write_run(path / "runs" / arm / "seed-0", policy=arm)


def test_a_declaration_that_no_run_followed_is_made_anew(tmp_path: Path):
    opened(tmp_path, ["full"], settings=SETTINGS | {"data": "nothing"})
    log = tmp_path / "runs/full/seed-0/log.txt"  # of a run that could not read its data
    log.parent.mkdir(parents=True)
    log.touch()
    assert opened(tmp_path, ["full"], margin=0.02).settings == SETTINGS
    ran(tmp_path / "other", "full")
    (tmp_path / "other/runs/full").rename(tmp_path / "runs/gradual")
    with pytest.raises(ConfigError, match="margin"):
        opened(tmp_path, ["full"], margin=0.03)


def test_a_run_that_failed_holds_its_declaration(tmp_path: Path):
    opened(tmp_path, ["full"])
    failure = tmp_path / "runs/full/seed-0.failed.json"
    failure.parent.mkdir(parents=True)
    failure.write_text('{"why": "a loss of nan"}')
    with pytest.raises(ConfigError, match="level"):
        opened(tmp_path, ["full"], level=0.9)


@pytest.mark.parametrize("change", [{"margin": 0.5}, {"level": 0.5}, {"target": 0.5}])
def test_what_was_declared_before_the_runs_cannot_be_changed(tmp_path: Path, change):
    opened(tmp_path, ["full"])
    ran(tmp_path, "full")
    assert opened(tmp_path, ["full"]) == opened(tmp_path, ["full", "gradual"][:1])
    with pytest.raises(ConfigError, match=next(iter(change))) as caught:
        opened(tmp_path, ["full"], **change)
    assert "another output folder" in caught.value.fix


def test_a_study_that_is_extended_keeps_its_reference(tmp_path: Path):
    assert opened(tmp_path, ["linear-probe"]).reference == "linear-probe"
    ran(tmp_path, "linear-probe")
    whole = opened(tmp_path, ["full", "linear-probe"])
    assert (whole.reference, [arm.name for arm in whole.arms]) == (
        "linear-probe", ["linear-probe", "full"]
    )  # fmt: skip
    with pytest.raises(ConfigError, match="reference"):
        opened(tmp_path, ["full"], reference="full", same_reference=True)


def test_arms_that_join_when_others_have_run_are_told_of(tmp_path: Path):
    assert opened(tmp_path, ["full"]).added == ()
    assert opened(tmp_path, ["full", "linear-probe"]).added == ()  # nobody has run
    ran(tmp_path, "full", "linear-probe")
    whole = opened(tmp_path, ["full", "linear-probe", "gradual"], controls=["time"])
    assert whole.added == ("gradual", "time@linear-probe", "time@gradual")
    assert not any("joined" in note for note in analyse(tmp_path).notes)  # it has not run yet
    ran(tmp_path, "gradual")
    assert opened(tmp_path, ["full"]).added == whole.added
    (note,) = [note for note in analyse(tmp_path).notes if "joined" in note]
    assert note.startswith("gradual joined when others had run")


def test_a_control_in_time_is_given_what_its_arm_found_stored(tmp_path: Path):
    record = read_run(write_run(tmp_path / "run", policy="linear-probe"))
    control = Arm("time@linear-probe", "", {"lr": 0.1}, "time", "linear-probe")
    assert settle(control, record).settings["budget"] == "2.000s"
    settled = settle(control, record, charged_s=1.5)
    assert settled.policy == "full"
    assert settled.settings == {"lr": 0.1, "budget": "3.500s", "patience": None}
