"""The state of every global random generator, comparable with ==."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generator_states() -> tuple[Any, ...]:
    """What Python, NumPy and torch would draw next, torch also on every GPU that is in use."""
    numbers = np.random.get_state()  # noqa: NPY002  the global generator is the point
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
    streams = [state.tolist() for state in (torch.get_rng_state(), *devices)]
    return random.getstate(), str(numbers), numbers[1].tobytes(), streams


def shake_generators(seed: int) -> None:
    """Put all of them somewhere else."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
