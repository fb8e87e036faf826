"""Freezing under `tf.distribute.MirroredStrategy` and `keras.distribution.DataParallel` (JAX).

Each run has two virtual CPU devices and a process of its own: devices are fixed at the first use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() == "torch", reason="spreads over processes, not over devices"
    ),
]

CASE = Path(__file__).with_name("distributed_case.py")
BODY = {
    "a/kernel", "a/bias", "norm/gamma", "norm/beta", "norm/moving_mean", "norm/moving_variance",
    "b/kernel", "b/bias", "c/kernel", "c/bias",
}  # fmt: skip


def run(policy: str, how: str = "spread") -> dict[str, Any]:
    command = [sys.executable, str(CASE), policy, how]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_frozen_throughout_does_not_move_and_the_copies_agree() -> None:
    found = run("linear-probe")
    assert set(found["unmoved"]) - {"drop/seed_generator_state"} == BODY
    assert set(found["held"]) >= BODY
    assert not found["torn"]


def test_a_schedule_decides_as_on_one_device_and_ends_near_it() -> None:
    spread, alone = run("gradual:every=1ep"), run("gradual:every=1ep", "alone")
    assert spread["decisions"] == alone["decisions"]
    assert len(spread["decisions"]) == 4
    assert not spread["torn"]
    # Group "a", with normalisation and dropout, never trained: the arithmetic is the same.
    assert spread["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_rates_by_group_work() -> None:
    found = run("ulmfit")
    assert not found["torn"]
    assert "head/kernel" not in found["unmoved"]


def test_policies_that_read_gradients_are_refused_or_work() -> None:
    found = run("autofreeze")
    if keras.backend.backend() == "tensorflow":
        assert "each with gradients of its own" in found["refused"]
    else:
        assert not found["torn"]
