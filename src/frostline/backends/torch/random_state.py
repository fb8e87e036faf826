"""The states of the global random number generators: read, and put back one by one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["RANDOM_STREAMS", "read_random_state", "write_random_state"]

#: Random number generators that a checkpoint holds.
RANDOM_STREAMS = ("python", "numpy", "torch", "cuda")


def read_random_state() -> dict[str, Any]:
    """The states of `RANDOM_STREAMS`; "cuda" only where CUDA is in use."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  the stream others draw from
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def write_random_state(state: Mapping[str, Any]) -> None:
    """Put streams read by `read_random_state` back; streams it does not name are not moved."""
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        np.random.set_state(state["numpy"])  # noqa: NPY002
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
