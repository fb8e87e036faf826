"""Global random number generators: seeded for a while, put back, compared."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from frostline.backends.torch.random_state import read_random_state, same_random_state, seeded

DRAWS: list[Callable[[], float]] = [
    random.random,
    lambda: float(np.random.random()),  # noqa: NPY002  the global generator
    lambda: float(torch.rand(())),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_follow_the_seed_and_leave_no_trace(draw: Callable[[], float]):
    before = read_random_state()
    found = []
    for seed in (3, 3, 4):
        with seeded(seed):
            start = read_random_state()
            found.append(draw())
            assert not same_random_state(start, read_random_state())
    assert found[0] == found[1] != found[2]
    assert same_random_state(before, read_random_state())


def test_the_generators_of_devices_are_compared():
    cpu = read_random_state()
    here = {**cpu, "cuda": [torch.tensor([1, 2], dtype=torch.uint8)]}
    moved = {**cpu, "cuda": [torch.tensor([1, 3], dtype=torch.uint8)]}
    assert same_random_state(here, dict(here))
    assert not same_random_state(here, moved)
    assert not same_random_state(here, {k: v for k, v in cpu.items() if k != "cuda"})
