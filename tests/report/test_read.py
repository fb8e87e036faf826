"""Runs and studies are read with names of their own; what is damaged is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from frostline.errors import DamagedFile, DataError
from frostline.report.read import read_runs
from report_records import write_run, write_study


def test_runs_of_one_policy_with_several_seeds_are_one_strategy(tmp_path: Path):
    paths = [write_run(tmp_path / f"gradual-{s}", policy="gradual", seed=s) for s in (1, 0)]
    paths.append(write_run(tmp_path / "full", policy="full"))
    found = read_runs(paths)
    assert found.arms == ("gradual", "full")
    assert [run.seed for run in found.of("gradual")] == [0, 1]
    assert found.reference == "full"
    assert found.comparison is None


def test_strategies_are_named_after_the_settings_in_which_they_differ(tmp_path: Path):
    slow = write_run(tmp_path / "slow", settings={"lr": 1e-4})
    fast = write_run(tmp_path / "fast", settings={"lr": 1e-3})
    assert read_runs([slow, fast]).arms == ("full (lr=0.0001)", "full (lr=0.001)")


def test_runs_that_differ_in_nothing_are_told_apart_by_their_folders(tmp_path: Path):
    found = read_runs([write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")])
    assert found.arms == ("full [a/run]", "full [b/run]")
    assert len({run.name for run in found.runs}) == 2


def test_a_folder_of_runs_stands_for_them_and_no_run_counts_twice(tmp_path: Path):
    first = write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "runs" / "two", seed=1)
    assert len(read_runs([tmp_path / "runs", first, first / "record.jsonl"]).runs) == 2


def test_a_study_is_read_with_its_verdicts(tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.81], "bitfit": [0.8, 0.82]})
    (study / "runs" / "bitfit" / "seed-1" / "diagnosis.json").write_text('{"sentence": "x"}')
    found = read_runs([study])
    assert found.arms == ("full", "bitfit")
    assert found.comparison is not None
    assert found.reference == "full"
    assert found.runs[-1].diagnosis == {"sentence": "x"}


def test_what_is_beside_a_run_is_read(tmp_path: Path):
    run = read_runs([write_run(tmp_path / "run")]).runs[0]
    assert run.predictions == ((0, 0, 0, 0.9), (1, 1, 0, 0.8), (2, 1, 1, 0.7))
    assert run.labels == ["cat", "dog"]
    assert run.proof is not None
    assert (run.proof.intact, run.proof.complete, run.proof.tensors) == (True, True, 1)
    assert run.probes is run.diagnosis is None


def test_a_certificate_that_was_changed_is_not_believed(tmp_path: Path):
    run = write_run(tmp_path / "run")
    path = run / "certificate.json"
    path.write_text(path.read_text().replace("abab", "cdcd", 1))
    proof = read_runs([run]).runs[0].proof
    assert proof is not None
    assert proof.intact is False
    assert proof.holds == ()
    path.unlink()
    assert (proof := read_runs([run]).runs[0].proof) is not None
    assert proof.intact is None


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("predictions.csv", "index,label,predicted,probability\n0,a,1,0.5\n", DamagedFile),
        ("predictions.csv", "index,label,predicted,probability\n0,1\n", DamagedFile),
        ("probes.json", "[]", DamagedFile),
        ("probes.json", "{", DamagedFile),
        ("diagnosis.json", '{"a": 1, "a": 2}', DamagedFile),
        ("record.jsonl", "{}\n", DamagedFile),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name, text, error):
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(error, match=name):
        read_runs([run])


def test_what_is_no_run_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    study = write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.8, 0.9]})
    run = write_run(tmp_path / "run")
    for paths, message in [
        ([tmp_path / "empty"], "neither a run nor a study"),
        ([tmp_path / "absent"], "no such folder"),
        ([], "no runs"),
        ([study, run], "something else"),
    ]:
        with pytest.raises(DataError, match=message):
            read_runs(paths)
