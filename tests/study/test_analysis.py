"""What the records of a study say, on records whose every figure is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frostline.errors import ConfigError, DamagedFile, DataError
from frostline.study.analysis import analyse
from report_records import rewrite_records, write_study

REACHED = {"full": (0.5, 0.8), "linear-probe": (0.7, 0.75), "gradual": (0.1, 0.2)}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two seeds, 12 validation samples; epochs end after 10 and 20 s, with the other seed twice."""
    folder = write_study(tmp_path / "study", dict.fromkeys(REACHED, (0.5, 0.5)))

    def plant(line: dict[str, Any], arm: str, seed: int) -> None:
        scores, costs = REACHED[arm], line.get("costs", {})
        if line["kind"] == "header":
            line["data"]["val"] = {"samples": 12, "content_sha256": f"of seed {seed}"}
            costs["threads"] = 1
        if line["kind"] == "epoch":
            line["metrics"]["val_accuracy"] = scores[line["epoch"] - 1]
            costs["training_s"] = 10.0 * line["epoch"] * (1 + seed)
        if line["kind"] == "end":
            line["results"]["val_accuracy"] = scores[1]
            costs |= {"training_s": 20.0 * (1 + seed), "wall_s": 30.0}
            if arm == "linear-probe":
                costs |= {"training_s": 5.0, "wall_s": 40.0}

    rewrite_records(folder, plant)
    return folder


def test_times_are_taken_to_the_target(study: Path):
    found = analyse(study, target=0.7)
    assert found.target == 0.7
    assert found["full"].reached == {0: 20.0, 1: 40.0}
    assert found["linear-probe"].reached == {0: 10.0, 1: 20.0}
    assert (found["full"].reached_s, found["linear-probe"].reached_s) == (40.0, 20.0)
    ratio = found["linear-probe"].target
    assert ratio is not None
    assert ratio.ratio == pytest.approx(0.5)


def test_a_run_that_never_got_to_the_target_is_later_than_all(study: Path):
    found = analyse(study)  # the mean of full less the margin
    assert found.target == pytest.approx(0.79)
    assert found["linear-probe"].reached == {0: None, 1: None}
    assert found["linear-probe"].reached_s is None
    ratio = found["linear-probe"].target
    assert ratio is not None
    assert (ratio.arm_reached, ratio.control_reached, ratio.slower) == (0, 2, 2)


def test_a_declared_target_is_the_one(study: Path):
    file = study / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target": 0.6}))
    found = analyse(study)
    assert found.target == 0.6
    assert not any("target" in note for note in found.notes)
    for target in (0, 1.5, -1):
        with pytest.raises(ConfigError, match="target"):
            analyse(study, target=target)


def test_the_front_is_of_whole_runs(study: Path):
    found = analyse(study)
    # It trains faster, but is worse, needs as much memory, and longer from loading to saving.
    assert found["linear-probe"].mean("alone_s") == 5.0 < (found["full"].mean("alone_s") or 0)
    assert [found[name].pareto for name in REACHED] == [True, False, False]
    whole = found["linear-probe"].whole
    assert whole is not None
    assert whole.ratio == pytest.approx(4 / 3)


def test_what_a_run_found_stored_is_charged_to_all_its_times(study: Path):
    stored = {"found_rows": 0, "filled_rows": 100, "fill_s": 5.0}

    def plant(line: dict[str, Any], arm: str, seed: int) -> None:
        if line["kind"] == "end" and arm != "full":
            first = arm == "linear-probe" and seed == 0
            line["costs"]["cache"] = stored if first else stored | {"found_rows": 80} | {
                "filled_rows": 0
            }  # fmt: skip

    rewrite_records(study, plant)
    found = analyse(study, target=0.1)
    assert found["linear-probe"].runs[0].alone_s == 5.0
    assert found["linear-probe"].runs[1].alone_s == 5.0 + 80 * 0.05
    gradual = found["gradual"].runs[0]
    assert (gradual.training_s, gradual.alone_s, gradual.whole_s) == (20.0, 24.0, 34.0)
    assert found["gradual"].reached[0] == 14.0


def test_few_validation_samples_for_the_margin_are_noted(study: Path):
    assert analyse(study).notes == (
        (
            "a run is judged by 12 validation samples, so that one of them is 0.083 of accuracy, "
            "more than the margin of 0.01"
        ),
    )


def test_what_was_chosen_after_the_runs_is_noted(study: Path):
    assert analyse(study, margin=0.2).notes == (
        "a margin of 0.01 was declared; one of 0.2, chosen after the runs, proves nothing",
    )
    said = analyse(study, reference="linear-probe", level=0.9, target=0.5).notes
    assert said[:3] == (
        "the reference linear-probe was chosen after the runs; full was declared",
        "the level 0.9 was chosen after the runs; 0.95 was declared",
        "the target 0.5 was chosen after the runs; none was declared",
    )


def test_runs_that_do_not_compare_are_noted(study: Path):
    def plant(line: dict[str, Any], arm: str, seed: int) -> None:
        if line["kind"] == "header" and arm == "linear-probe":
            line["costs"]["threads"] = 7
            if seed == 1:
                line["data"]["val"]["content_sha256"] = "of other pictures"

    rewrite_records(study, plant)
    found = analyse(study, margin=0.2).notes
    data, threads = found[1:]
    assert data.startswith("validation samples of linear-probe are not those of full with seed 1")
    assert threads == "runs differ in threads (1, 7): their times and memory do not compare"


def test_without_predictions_only_the_test_difference_is_missing(study: Path):
    whole = analyse(study)
    file = study / "runs/linear-probe/seed-0/predictions.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DamagedFile, match="label"):
        analyse(study)
    file.unlink()
    found = analyse(study)
    assert found["linear-probe"].test is None
    assert found["gradual"].test is not None
    assert found["linear-probe"].verdict == whole["linear-probe"].verdict


def test_one_test_sample_gives_no_test_difference(study: Path):
    for file in study.glob("runs/*/*/predictions.csv"):
        file.write_text("index,label,predicted,probability\n0,1,1,0.9\n")
    assert analyse(study)["linear-probe"].test is None


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": 1}', '{"format": 1, "arms": [{}]}', '{"format": 1, "a": 2}']
)
def test_a_declaration_that_is_none_is_refused(study: Path, text: str):
    (study / "study.json").write_text(text)
    with pytest.raises((DamagedFile, ConfigError)) as caught:
        analyse(study)
    assert caught.value.fix
    (study / "study.json").unlink()
    with pytest.raises(DataError, match="no study"):
        analyse(study)
