"""Position as arithmetic: which samples, which augmentation and which random numbers come when.

Everything is a pure function of the run's seed and of a count (epoch or update), so a resumed run
computes where it is instead of replaying how it got there, and no random state is ever stored.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch

from frostline.frontier.cache import BLOCK
from frostline.frontier.views import Views

__all__ = ["Batching", "derive_seed", "epoch_order", "seed_update", "views_of"]

T = TypeVar("T")


def derive_seed(seed: int, purpose: str, count: int) -> int:
    """A seed of 32 bits for one purpose at one time; equal arguments give equal seeds.

    Example:
        >>> derive_seed(0, "update", 1) != derive_seed(0, "update", 2)
        True
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{count}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order in which an epoch visits `count` samples: each index once.

    Args:
        seed: of the run.
        epoch: from 0; every epoch has another order.
        count: samples in the split.

    Example:
        >>> sorted(epoch_order(0, 3, 4))
        [0, 1, 2, 3]
    """
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "order", epoch)))
    return generator.permutation(count).tolist()


def seed_update(seed: int, purpose: str, count: int) -> None:
    """Seed every global random stream for one update (or one evaluation)."""
    value = derive_seed(seed, purpose, count)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  models of others draw from the global stream
    if _accelerated():
        torch.manual_seed(value)
    else:  # the same for the CPU; the other spends a millisecond on devices that are not there
        torch.default_generator.manual_seed(value)


@cache
def _accelerated() -> bool:
    return torch.accelerator.is_available()


def views_of(seed: int, views: int | None, epoch: int, indices: Sequence[int]) -> list[int]:
    """The view in which each sample is trained on in an epoch.

    A block of 32 consecutive samples is in one view, since what is stored is stored by block and
    view: an epoch computes no more than it uses. Blocks are in different views at one time; of
    two views, neighbouring blocks always are.

    Args:
        seed: of the run.
        views: how many there are of each sample; None: a new one in each epoch.
        epoch: from 0.
        indices: numbers of the samples.

    Example:
        >>> views_of(0, 2, 0, [0, 31, 32]), views_of(0, 2, 1, [0, 31, 32])
        ([0, 0, 1], [1, 1, 0])
    """
    if views is None:
        return [derive_seed(seed, "view", epoch)] * len(indices)
    blocks = np.asarray(indices, np.int64) // BLOCK
    turns = Views(views, seed).of(epoch, blocks)
    return ((turns + blocks) % views).tolist()


@dataclass(frozen=True, slots=True)
class Batching:
    """How an epoch is cut into updates, and updates into batches.

    Attributes:
        samples: samples in the split, >= 1.
        batch_size: samples per forward pass.
        accumulate: forward passes per update.

    Example:
        >>> Batching(samples=7, batch_size=2, accumulate=2).updates(list("abcdefg"))
        [[['a', 'b'], ['c', 'd']], [['e', 'f', 'g']]]
    """

    samples: int
    batch_size: int
    accumulate: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch."""
        batches = -(-self.samples // self.batch_size) - self._merged
        return -(-batches // self.accumulate)

    def updates(self, order: list[T]) -> list[list[list[T]]]:
        """The batches of each update of an epoch, in order.

        A last batch of a single sample joins the one before: batch normalisation cannot learn
        from one.
        """
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self._merged:
            last = batches.pop()
            batches[-1] = batches[-1] + last
        return [batches[i : i + self.accumulate] for i in range(0, len(batches), self.accumulate)]

    @property
    def _merged(self) -> int:
        """1 when a single last sample joins the batch before, else 0."""
        alone = self.samples % self.batch_size == 1 and self.batch_size > 1
        return int(alone and self.samples > self.batch_size)
