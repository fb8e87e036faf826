"""The global random number generators: read, put back, seeded for a while, left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from frostline.seeds import mix

__all__ = [
    "RANDOM_STREAMS",
    "mix",
    "read_random_state",
    "same_random_state",
    "seeded",
    "undisturbed",
    "write_random_state",
]

#: Random number generators that a checkpoint holds.
RANDOM_STREAMS = ("python", "numpy", "torch", "cuda")


def read_random_state() -> dict[str, Any]:
    """The states of `RANDOM_STREAMS`; "cuda" only where CUDA is in use."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  the stream others draw from
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # asked for every sample: whether there is one is dearer
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


def same_random_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether all generators stood at the same place; CUDA's too, where either read them.

    Example:
        >>> before = read_random_state()
        >>> same_random_state(before, read_random_state())
        True
        >>> with undisturbed():
        ...     _ = random.random()
        ...     same_random_state(before, read_random_state())
        False
    """
    numbers = [
        {key: np.asarray(value).tobytes() for key, value in state.items() if key != "state"}
        | {key: np.asarray(value).tobytes() for key, value in state["state"].items()}
        for state in (one["numpy"], other["numpy"])
    ]
    return (
        one["python"] == other["python"]
        and numbers[0] == numbers[1]
        and torch.equal(one["torch"], other["torch"])
        and _bytes_of(one.get("cuda", ())) == _bytes_of(other.get("cuda", ()))
    )


def _bytes_of(states: Iterable[torch.Tensor]) -> list[bytes]:
    return [state.numpy().tobytes() for state in states]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put every global generator back afterwards, whatever was drawn.

    Example:
        >>> random.seed(1)
        >>> with undisturbed():
        ...     first = random.random()
        >>> first == random.random()
        True
    """
    state = read_random_state()
    try:
        yield
    finally:
        write_random_state(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator, and put all of them back afterwards; CUDA's where it is in use.

    Third-party transforms and initialisers draw from the global generators; this way they are
    functions of `seed`, and the training loop's own random stream does not notice.

    Args:
        seed: 0 to 2**32 - 1.

    Example:
        >>> with seeded(1):
        ...     first = random.random()
        >>> with seeded(1):
        ...     first == random.random()
        True
    """
    with undisturbed():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the global generator is what others draw from
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        yield
