"""Randomness that leaves no trace: a block that draws from a given seed and restores the rest."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["mix", "seeded"]


def mix(*numbers: int) -> int:
    """One seed in [0, 2**32) from several numbers; the same in every process.

    Example:
        >>> mix(0, 7) == mix(0, 7), mix(0, 7) == mix(7, 0)
        (True, False)
    """
    text = ",".join(str(n) for n in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and restore all three afterwards.

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
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global generator is what others draw from
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        torch.set_rng_state(kept[2])
