"""A run killed at any moment, any number of times, ends as the uninterrupted one: to the bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import frostline
from crash_runner import __file__ as RUNNER
from faulty_disk import FaultyDisk, QuickDisk, count_calls, use_disk
from frostline._io import read_lines, verify_folder
from frostline.backends.torch.checkpoint import checkpoint_folders
from frostline.errors import DataError, StorageError
from run_bits import run_bits

TESTS = Path(RUNNER).parent
SETTINGS: dict[str, Any] = {
    "model": "tiny_task:tiny_model",
    "data": "tiny_task:tiny_data",
    "policy": "gradual:every=5st",
    "epochs": 3,
    "batch_size": 8,
    "accumulate": 2,
    "lr": 0.01,
    "head_lr": 0.03,
    "lr_decay": 0.9,
    "patience": None,
    "optimizer_state": "release",
    "checkpoint_every": "2st",
    "augment": "basic",
    "class_weights": "balanced",
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def run_with_kills(
    output: Path, kills: list[dict[str, Any]], settings: dict[str, Any] = SETTINGS
) -> list[int]:
    """Exit codes of all attempts; the last one is 0, and nothing unfinished is left."""
    job = {"output": str(output), "settings": settings, "kills": kills}
    done = subprocess.run(
        [sys.executable, RUNNER],
        input=json.dumps(job),
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ends"][-1] == 0, done.stderr
    assert report["litter"] == []
    return report["ends"]


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted run, in this very process."""
    output = tmp_path_factory.mktemp("straight") / "run"
    with use_disk(QuickDisk()):
        frostline.fit(**SETTINGS, output=output)
    return run_bits(output)


def test_killed_again_and_again(tmp_path: Path, straight: dict[str, Any]):
    """Mid-epoch, inside a save, twice in one epoch, soon after a resume, and by Ctrl-C."""
    kills = [
        {"event": 5}, {"disk": 40}, {"event": 2}, {"after_s": 0.02}, {"interrupt": 3}, {"disk": 90}
    ]  # fmt: skip
    ends = run_with_kills(tmp_path / "run", kills)
    assert ends[:6] == [-9, -9, -9, -9, 130, -9]
    assert run_bits(tmp_path / "run") == straight


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_moments(tmp_path: Path, straight: dict[str, Any], seed: int):
    """3 to 6 kills in one run, of every sort."""
    chance = random.Random(seed)
    sorts = [
        lambda: {"event": chance.randrange(12)},
        lambda: {"disk": chance.randrange(400)},
        lambda: {"after_s": chance.random() * 0.6},
        lambda: {"interrupt": chance.randrange(12)},
    ]
    run_with_kills(tmp_path / "run", [chance.choice(sorts)() for _ in range(3 + seed % 4)])
    assert run_bits(tmp_path / "run") == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd", "optimizer_state": "keep"},
        {"optimizer": "adam", "policy": "full", "precision": "bf16"},
        {"policy": "linear-probe", "live_norm": True, "live_dropout": True},
        {"workers": 2},
        {"data": "tiny_task:noise_data", "patience": 1, "epochs": 6},
        {"checkpoint_every": "1ep", "schedule": "constant", "clip_norm": None},
        {"policy": "autofreeze:every=3st"},
        {"policy": "egeria:every=2st,tolerance=2,window=2"},
        {"policy": "slimfit:every=2st", "optimizer_state": "keep"},
        {"policy": "apf:every=1st,threshold=1", "checkpoint_every": "1st"},
        {"policy": "lp-ft:probe=1ep"},
        {"policy": "auto:patience=1", "epochs": 5},
    ],
    ids="-".join,
)
def test_killed_under_other_settings(tmp_path: Path, change: dict[str, Any]):
    settings = SETTINGS | change
    frostline.fit(**settings, output=tmp_path / "straight")
    kills = [{"event": 6}, {"disk": 60}, {"event": 4}, {"disk": 45}]
    run_with_kills(tmp_path / "run", kills, settings)
    assert run_bits(tmp_path / "run") == run_bits(tmp_path / "straight")


class Stop(Exception):
    """The process ends here, as far as the run can tell: nothing more is saved."""


def stop_at(number: int, kind: str = "step"):
    """Raises at the n-th event of a kind."""
    seen = 0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal seen
        if event["kind"] == kind:
            seen += 1
            if seen == number:
                raise Stop

    return on_event


@pytest.mark.parametrize(
    ("kind", "number"), [("start", 1), ("step", 3), ("epoch", 1), ("checkpoint", 5), ("epoch", 3)]
)
def test_stopped_at_each_kind_of_event(tmp_path, straight, kind: str, number: int):
    with pytest.raises(Stop):
        frostline.fit(**SETTINGS, output=tmp_path / "run", on_event=stop_at(number, kind))
    frostline.fit(**SETTINGS, output=tmp_path / "run")
    assert run_bits(tmp_path / "run") == straight


def test_the_test_split_is_seen_once_and_training_is_over_then(tmp_path, straight, monkeypatch):
    """Killed after the final checkpoint: the next session tests, and makes no update."""
    from frostline.tasks.session import Session

    def no_test(self: Session) -> dict[str, float]:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_test", no_test)
        with pytest.raises(Stop):
            frostline.fit(**SETTINGS, output=tmp_path / "run")
    events: list[str] = []
    frostline.fit(
        **SETTINGS, output=tmp_path / "run", on_event=lambda event: events.append(event["kind"])
    )
    assert events == ["start", "end"]
    assert run_bits(tmp_path / "run") == straight


def test_a_damaged_newest_checkpoint_costs_time_and_nothing_else(tmp_path, straight, caplog):
    with pytest.raises(Stop):
        frostline.fit(**SETTINGS, output=tmp_path / "run", on_event=stop_at(7))
    newest, older = checkpoint_folders(tmp_path / "run" / "checkpoints")
    (newest / "optimizer.safetensors").write_bytes(b"")
    verify_folder(older)
    frostline.fit(**SETTINGS, output=tmp_path / "run")
    assert "passing over" in caplog.text
    assert run_bits(tmp_path / "run") == straight


def test_a_damaged_record_is_refused(tmp_path: Path):
    with pytest.raises(Stop):
        frostline.fit(**SETTINGS, output=tmp_path / "run", on_event=stop_at(7))
    record = tmp_path / "run" / "record.jsonl"
    whole = bytearray(record.read_bytes())
    whole[read_lines(record).ends[0] + 60] ^= 4
    record.write_bytes(whole)
    with pytest.raises(StorageError, match="fresh=True"):
        frostline.fit(**SETTINGS, output=tmp_path / "run")


def test_other_data_than_at_the_start_is_refused(tmp_path: Path, monkeypatch):
    import tiny_task

    with pytest.raises(Stop):
        frostline.fit(**SETTINGS, output=tmp_path / "run", on_event=stop_at(3))
    other = tiny_task.noise_data()
    monkeypatch.setattr(tiny_task, "tiny_data", lambda: other)
    with pytest.raises(DataError, match="train differs"):
        frostline.fit(**SETTINGS, output=tmp_path / "run")


def disk_fills(output: Path, at: int, straight: dict[str, Any]) -> None:
    """Full from one call on; an error and nothing half-written; space again, and it goes on."""
    with use_disk(FaultyDisk(at, "ENOSPC", for_ever=True)), pytest.raises(StorageError) as caught:
        frostline.fit(**SETTINGS, output=output)
    assert "No space left" in str(caught.value)
    assert "free some space" in caught.value.fix
    for folder in checkpoint_folders(output / "checkpoints"):
        verify_folder(folder)
    frostline.fit(**SETTINGS, output=output)
    assert run_bits(output) == straight


def calls_of_a_run(output: Path) -> int:
    return count_calls(lambda: frostline.fit(**SETTINGS, output=output))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_disk_that_fills_stops_the_run_and_harms_nothing(tmp_path, straight, share: float):
    total = calls_of_a_run(tmp_path / "counted")
    disk_fills(tmp_path / "run", int(total * share), straight)


@pytest.mark.slow
def test_a_disk_that_fills_at_any_call(tmp_path: Path, straight: dict[str, Any]):
    total = calls_of_a_run(tmp_path / "counted")
    for number, at in enumerate(range(0, total, max(1, total // 60))):
        disk_fills(tmp_path / f"run{number}", at, straight)


PHASES = """\
phases:
  - train: head
    patience: 1
    min_delta: 9   # nothing is that much better: two epochs of three updates
  - add: last 2 groups
    length: 5st    # from update 6 to 11, back to the weights of update 9
    restore_best: true
  - train: all
    lr: 0.5
    patience: 1
    min_delta: 9
"""


@pytest.fixture(scope="module")
def phased(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings with that schedule, and the uninterrupted run."""
    folder = tmp_path_factory.mktemp("phased")
    (folder / "phases.yaml").write_text(PHASES)
    settings = SETTINGS | {"policy": f"phases:file={folder / 'phases.yaml'}", "epochs": 12}
    with use_disk(QuickDisk()):
        frostline.fit(**settings, output=folder / "run")
    return settings, run_bits(folder / "run")


def test_a_run_goes_through_its_phases_and_ends_with_them(phased):
    _, bits = phased
    decisions = bits["state"]["parts"]["driver"]["decisions"]
    assert [(d["step"], d["plan"].get("phase", 0)) for d in decisions] == [
        (0, 0), (6, 1), (12, 2), (18, 3)
    ]  # fmt: skip
    summary = bits["summary"]
    assert (summary["steps"], summary["epochs_run"]) == (18, 6)
    assert summary["policy_done"]
    assert not summary["stopped_early"]
    assert summary["certificate_ok"]


@pytest.mark.parametrize("step", [2, 7, 10, 13, 18])
def test_stopped_in_any_phase_it_goes_on_as_if_nothing_had_happened(tmp_path, phased, step: int):
    """What is kept of a phase, its best weights and its counts, is in the checkpoint."""
    settings, straight = phased
    with pytest.raises(Stop):
        frostline.fit(**settings, output=tmp_path / "run", on_event=stop_at(step))
    frostline.fit(**settings, output=tmp_path / "run")
    assert run_bits(tmp_path / "run") == straight


@pytest.mark.slow
def test_killed_in_every_phase_of_a_schedule(tmp_path: Path, phased):
    settings, straight = phased
    kills = [{"event": 8}, {"event": 8}, {"disk": 70}, {"event": 6}, {"event": 5}]
    run_with_kills(tmp_path / "run", kills, settings)
    assert run_bits(tmp_path / "run") == straight


def test_a_schedule_that_was_changed_is_not_gone_on_with(tmp_path: Path):
    file = tmp_path / "phases.yaml"
    file.write_text(PHASES)
    settings = SETTINGS | {"policy": f"phases:file={file}", "epochs": 12}
    with pytest.raises(Stop):
        frostline.fit(**settings, output=tmp_path / "run", on_event=stop_at(5))
    file.write_text(PHASES.replace("5st", "7st"))
    with pytest.raises(StorageError, match="written under"):
        frostline.fit(**settings, output=tmp_path / "run")
