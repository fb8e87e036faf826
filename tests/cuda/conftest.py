"""Tests on a CUDA device: `pytest tests/cuda`.

Without one every test here is skipped. `FROSTLINE_TEST_DEVICE=cpu` runs the same tests on the CPU,
to see that they themselves are sound; those that make sense on CUDA alone ask for `cuda` and are
skipped even then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from frostline.frontier.library import Library

# cuBLAS reads it when its first handle is made; child processes inherit it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ON_CPU = os.environ.get("FROSTLINE_TEST_DEVICE") == "cpu"


@pytest.fixture
def gpu() -> torch.device:
    """The device under test."""
    if ON_CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; FROSTLINE_TEST_DEVICE=cpu runs these tests on the CPU")
    return torch.device("cuda")


@pytest.fixture
def cuda(gpu: torch.device) -> torch.device:
    """The device under test, where it is CUDA."""
    if gpu.type != "cuda":
        pytest.skip("makes sense on CUDA only")
    return gpu


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, and the random streams as they were."""
    devices = list(range(torch.cuda.device_count())) if not ON_CPU else []
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.use_deterministic_algorithms(mode=before)
        torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """An empty folder of stores."""
    return Library(tmp_path / "stores")
