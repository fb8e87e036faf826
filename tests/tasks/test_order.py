"""Order, augmentation and random numbers are functions of seed and count."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostline.tasks.order import Batching, derive_seed, epoch_order, seed_update


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6), count=st.integers(1, 200))
def test_an_epoch_visits_every_sample_once(seed: int, epoch: int, count: int):
    order = epoch_order(seed, epoch, count)
    assert sorted(order) == list(range(count))
    assert order == epoch_order(seed, epoch, count)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(seed, epoch, 20)) for seed in range(5) for epoch in range(20)]
    assert len(set(orders)) == 100


def test_the_order_is_the_same_in_every_process():
    assert epoch_order(0, 0, 8) == EXPECTED


EXPECTED = [7, 6, 4, 1, 0, 3, 2, 5]


@given(samples=st.integers(1, 300), batch_size=st.integers(1, 40), accumulate=st.integers(1, 5))
def test_every_sample_is_in_one_batch_and_steps_are_counted(samples, batch_size, accumulate):
    batching = Batching(samples, batch_size, accumulate)
    updates = batching.updates(list(range(samples)))
    flat = [i for update in updates for batch in update for i in batch]
    assert flat == list(range(samples))
    assert len(updates) == batching.steps_per_epoch
    assert all(1 <= len(update) <= accumulate for update in updates)
    sizes = [len(batch) for update in updates for batch in update]
    assert max(sizes) <= batch_size + 1
    if samples > 1 and batch_size > 1:
        assert min(sizes) > 1  # batch normalisation cannot learn from one sample


def test_seeds_differ_by_seed_purpose_and_count():
    seeds = {
        derive_seed(seed, purpose, count)
        for seed in range(10)
        for purpose in ("order", "view", "update")
        for count in range(10)
    }
    assert len(seeds) == 300


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: float(torch.rand(()))],
    ids=["python", "numpy", "torch"],
)  # fmt: skip
def test_every_global_stream_is_seeded(draw):
    seed_update(0, "update", 7)
    first = draw()
    draw()
    seed_update(0, "update", 7)
    assert draw() == first
    seed_update(0, "update", 8)
    assert draw() != first
