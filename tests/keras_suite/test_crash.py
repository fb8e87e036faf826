"""Keras runs killed at any moment of saving end as the uninterrupted one: to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest

from faulty_disk import FaultyDisk, KillingDisk, QuickDisk
from frostline import _io
from keras_suite.crash_run import EPOCHS, attempt

FORKS = keras.backend.backend() == "torch"
PROGRAM = Path(__file__).with_name("crash_run.py")


@pytest.fixture(autouse=True)
def own_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_io, "disk", QuickDisk())


def killed(folder: Path, at: int) -> bool:
    """One attempt, killed at a call that changes the disk; whether it was killed before its end."""
    out = folder / "out.json"
    if not FORKS:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(PROGRAM), str(folder), str(out), str(at)]
        done = subprocess.run(command, env=environment, check=False, capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()[-2000:]
        return done.returncode != 0
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            attempt(folder, out, KillingDisk(at))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """The uninterrupted run, and how often it changes the disk per epoch."""
    folder, counting = tmp_path_factory.mktemp("straight"), FaultyDisk()
    before = _io.disk
    try:
        attempt(folder, folder / "out.json", counting)
    finally:
        _io.disk = before
    return json.loads((folder / "out.json").read_text()), len(counting.calls) // EPOCHS


def check(folder: Path, expected: dict[str, Any], next_kill: Callable[[], int], kills: int) -> None:
    folder.mkdir(exist_ok=True)
    ends = [killed(folder, next_kill()) for _ in range(kills)]
    assert any(ends)
    attempt(folder, folder / "out.json", QuickDisk())
    assert json.loads((folder / "out.json").read_text()) == expected


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_random_moments_of_saving(
    seed: int, tmp_path: Path, straight: tuple[dict[str, Any], int]
) -> None:
    """Calls of one and a half epochs: before the first checkpoint, in it, and in the second."""
    expected, calls = straight
    chance = random.Random(seed)
    check(tmp_path / "run", expected, lambda: chance.randrange(calls * 3 // 2), kills=5)


@pytest.mark.skipif(not FORKS, reason="the code is the same, and a process takes seconds to start")
@pytest.mark.parametrize("every", [23, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_each_call_in_turn(
    every: int, tmp_path: Path, straight: tuple[dict[str, Any], int]
) -> None:
    expected, calls = straight
    for at in range(2, calls * 2, every):
        check(tmp_path / f"at-{at}", expected, lambda at=at: at, kills=1)
