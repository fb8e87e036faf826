"""Sweeps: who is stopped when, what a killed one goes on with, and where the trials are kept."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faulty_disk import QuickDisk, use_disk
from frostline.errors import ConfigError
from frostline.records import RunRecord, read_run
from frostline.study.search import rungs, sweep

TINY: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 16,
    "lr": 0.01,
    "patience": None,
    "threads": 1,
    "device": "cpu",
    "cache": "off",
}
POLICIES = ["full", "linear-probe", "first:groups=1", "first:groups=2", "gradual", "bitfit"]


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def tiny(tmp_path: Path, policies: Any = POLICIES, **change: Any):
    given = TINY | {"isolate": False, "output": tmp_path / "sweep"} | change
    return sweep("tiny_task:tiny_model", "tiny_task:tiny_data", policies, **given)


@given(st.integers(1, 200), st.integers(1, 20), st.integers(2, 5))
def test_rungs_rise_by_the_factor_to_the_whole_run(epochs, first, factor):
    found = rungs(epochs, first=first, factor=factor)
    assert found[-1] == epochs
    assert list(found) == sorted(set(found))
    assert all(b == a * factor for a, b in itertools.pairwise(found[:-1]))
    assert found[0] == min(first, epochs)


@pytest.mark.parametrize("change", [{"first": 0}, {"factor": 1}, {"epochs": 0}])
def test_numbers_that_are_too_small_are_refused(tmp_path: Path, change):
    with pytest.raises(ConfigError):
        tiny(tmp_path, **change)


def test_a_sweep_stops_most_and_runs_the_best_to_the_end(tmp_path: Path):
    found = tiny(tmp_path)
    assert {row.arm for row in found.rows} == {
        "full", "linear-probe", "first-groups=1", "first-groups=2", "gradual", "bitfit"
    }  # fmt: skip
    finished = [row for row in found.rows if row.state == "finished"]
    stopped = [row for row in found.rows if row.state == "stopped"]
    assert finished
    assert stopped
    assert all(row.epochs == 4 for row in finished)
    assert all(row.epochs in (1, 3) for row in stopped)
    assert found.rows[0].state == "finished"
    best = max(row.val_accuracy or 0 for row in finished)
    assert found.rows[0].val_accuracy == best
    assert found.rows[0].policy in found.sentence
    # Of all that reached a rung the best third went past it, and nobody else.
    runs = {row.arm: read_run(tmp_path / "sweep/runs" / row.arm / "seed-0") for row in found.rows}
    for rung in (1, 3):
        scores = {
            arm: max((m["val_accuracy"], -m["val_loss"]) for m in _metrics(run)[:rung])
            for arm, run in runs.items() if len(run.epochs) >= rung
        }  # fmt: skip
        best = sorted(scores, key=lambda arm: scores[arm])[-max(1, len(scores) // 3) :]
        assert {arm for arm, run in runs.items() if len(run.epochs) > rung} == set(best)


def _metrics(run: RunRecord) -> list[dict[str, float]]:
    return [line["metrics"] for line in run.epochs]


@pytest.mark.parametrize("storage", ["nonsense", "nosuchbase://x", "sqlite:////no/such/place/t.db"])
def test_a_storage_that_does_not_open_is_said(tmp_path: Path, storage: str):
    with pytest.raises(ConfigError, match="keep the trials in") as caught:
        tiny(tmp_path, ["full"], epochs=1, storage=storage)
    assert "sqlite:///" in str(caught.value)


def test_the_order_of_policies_does_not_decide_who_is_stopped(tmp_path: Path):
    one, other = (
        {row.policy: (row.state, row.epochs, row.val_accuracy) for row in tiny(
            tmp_path, policies, output=tmp_path / str(number) / "sweep").rows}
        for number, policies in enumerate((POLICIES[:4], POLICIES[3::-1]))
    )  # fmt: skip
    assert one == other


def test_each_seed_is_a_sweep_of_its_own_in_the_same_folder(tmp_path: Path):
    first, second = (tiny(tmp_path, POLICIES[:2], seed=seed) for seed in (0, 1))
    alone = tiny(tmp_path, POLICIES[:2], seed=1, output=tmp_path / "alone" / "sweep")
    shown = [
        [(r.arm, r.state, r.epochs, r.val_accuracy) for r in found.rows]
        for found in (second, alone)
    ]
    assert shown[0] == shown[1]
    assert tiny(tmp_path, POLICIES[:2]).rows == first.rows


def test_a_sweep_goes_on_after_an_interrupt_and_takes_more_policies(tmp_path: Path):
    straight = tiny(tmp_path, output=tmp_path / "straight" / "sweep")
    seen: list[str] = []

    def interrupt(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch" and event["arm"] not in seen and len(seen) < 2:
            seen.append(event["arm"])
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path, POLICIES[:4], on_event=interrupt)
    tiny(tmp_path, POLICIES[:4])
    again = tiny(tmp_path)
    plain = [(r.arm, r.state, r.epochs, r.val_accuracy) for r in again.rows]
    assert plain == [(r.arm, r.state, r.epochs, r.val_accuracy) for r in straight.rows]


def test_a_policy_that_diverges_is_last_and_not_tried_again(tmp_path: Path):
    wild = {"policy": "full", "lr": 10.0, "optimizer": "sgd", "clip_norm": None, "warmup": "0st",
            "head_lr": 10.0}  # fmt: skip
    tries: list[str] = []
    counts: list[int] = []

    def note(event: dict[str, Any]) -> None:
        if event["kind"] == "start":
            tries.append(event["arm"])

    for _ in range(2):
        found = sweep(
            "tiny_task:deep_linear_model", "tiny_task:tiny_data", {"wild": wild, "tame": "full"},
            **TINY | {"epochs": 3, "lr": 1e-3}, first=3, isolate=False, output=tmp_path / "sweep",
            on_event=note,
        )  # fmt: skip
        assert [row.arm for row in found.rows] == ["tame", "wild"]
        assert found.rows[1].state == "failed"
        counts.append(tries.count("wild"))
    assert counts[0] == counts[1] >= 1


def test_a_sweep_over_data_trains_whole_runs_on_more_and_more_samples(tmp_path: Path):
    found = tiny(tmp_path, over="data", first=9, factor=2, epochs=2)
    assert {row.state for row in found.rows} == {"finished", "stopped"}
    finished = [row for row in found.rows if row.state == "finished"]
    assert all(row.samples == 49 for row in finished)
    assert all(row.work == 2 * (9 + 18 + 36 + 49) for row in finished)
    assert all(row.epochs == 2 for row in found.rows)
    for row in found.rows:
        folder = tmp_path / "sweep" / "runs" / row.arm
        sizes = sorted(read_run(run).header["data"]["train"]["samples"] for run in folder.iterdir())
        assert sizes == [n for n in (9, 18, 36, 49) if n <= row.samples]
        if row.state == "stopped":
            assert row.samples < 49
            assert row.work == 2 * sum(sizes)
    share = sum(row.work for row in found.rows) / (2 * 49 * len(found.rows))
    assert f"took {share:.0%} of the updates" in found.sentence
    # Parts are nested, and the last run is the one that a study of the folder shows.
    best = found.rows[0]
    assert read_run(tmp_path / "sweep" / "runs" / best.arm / "seed-0").summary["val_accuracy"] == (
        best.val_accuracy
    )


def test_a_sweep_over_data_goes_on_after_an_interrupt(tmp_path: Path):
    given: dict[str, Any] = {"over": "data", "first": 12, "factor": 2, "epochs": 1}
    straight = tiny(tmp_path, output=tmp_path / "straight" / "sweep", **given)
    seen: list[str] = []

    def interrupt(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch" and len(seen) < 3:
            seen.append(event["arm"])
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path, on_event=interrupt, **given)
    again = tiny(tmp_path, **given)
    plain = [(r.arm, r.state, r.samples, r.val_accuracy, r.work) for r in again.rows]
    assert plain == [(r.arm, r.state, r.samples, r.val_accuracy, r.work) for r in straight.rows]


def test_a_sweep_over_something_else_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="neither"):
        tiny(tmp_path, over="seeds")


def test_trials_are_kept_where_the_caller_keeps_studies(tmp_path: Path):
    storage = optuna.storages.InMemoryStorage()
    tiny(tmp_path, ["full", "linear-probe"], epochs=2, storage=storage)
    assert not (tmp_path / "sweep" / "trials.db").exists()
    (study,) = optuna.get_all_study_summaries(storage)
    assert study.n_trials == 2
