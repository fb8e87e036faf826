"""The feed: the loader's own batches and random numbers, with indices; loaded or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from frostline.frontier.feed import Feed
from generators import generator_states, shake_generators


class Numbered(Dataset):
    """Samples that tell their own index, and count how often they were made."""

    def __init__(self, samples: int = 70) -> None:
        self.samples = samples
        self.made = 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.made += 1
        return torch.full((3,), float(index)), int(index)


class Noisy(Numbered):
    """Random transforms that draw from all three global generators."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = random.random() + np.random.rand() + torch.rand(3)  # noqa: NPY002
        return index + 0.01 * noise, index


class Rude(Sampler[int]):
    """Draws from the global generators at once, and for each index again."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        start = int(torch.randint(self.samples, ()))
        random.random()
        return self._rest(start)

    def _rest(self, start: int) -> Iterator[int]:
        for i in range(self.samples):
            np.random.rand()  # noqa: NPY002
            yield (start + i + int(torch.randint(3, ()))) % self.samples


class Uneven(Sampler[list[int]]):
    """A batch sampler with batches of several sizes, drawn at random, with repetitions."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(7):
            yield torch.randint(self.samples, (1 + i % 4,)).tolist()


def _own(samples: int, seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed + samples)


# Each makes the loader's arguments anew: samplers with generators of their own remember.
ORDERS: dict[str, Callable[[int, int, bool], dict[str, Any]]] = {
    "as they come": lambda n, size, drop: {"batch_size": size, "drop_last": drop},
    "shuffled": lambda n, size, drop: {"batch_size": size, "drop_last": drop, "shuffle": True},
    "shuffled, own generator": lambda n, size, drop: {
        "batch_size": size, "drop_last": drop, "shuffle": True, "generator": _own(n),
    },
    "with replacement": lambda n, size, drop: {
        "batch_size": size, "drop_last": drop,
        "sampler": RandomSampler(range(n), replacement=True, num_samples=n + 40),
    },
    "weighted": lambda n, size, drop: {
        "batch_size": size, "drop_last": drop,
        "sampler": WeightedRandomSampler(torch.arange(1.0, n + 1).tolist(), n),
    },
    "subset": lambda n, size, drop: {
        "batch_size": size, "drop_last": drop,
        "sampler": SubsetRandomSampler(range(0, n, 2)),
    },
    "distributed": lambda n, size, drop: {
        "batch_size": size, "drop_last": drop,
        "sampler": DistributedSampler(range(n), num_replicas=3, rank=1),
    },
    "draws all the time": lambda n, size, drop: {
        "batch_size": size, "drop_last": drop, "sampler": Rude(n),
    },
    "batches of its own": lambda n, size, drop: {"batch_sampler": Uneven(n)},
    "batches of tensors": lambda n, size, drop: {
        "batch_sampler": [torch.arange(i, min(i + size, n)) for i in range(0, n, size)],
    },
    "negative": lambda n, size, drop: {"batch_sampler": BatchSampler(range(-n, 0), size, drop)},
}  # fmt: skip


def _loader(data: Any, order: str, size: int = 8, drop: bool = False, **more: Any) -> DataLoader:
    return DataLoader(data, **ORDERS[order](len(data), size, drop), **more)


def _plain_epochs(loader: DataLoader, epochs: int, stop: int | None = None) -> list[Any]:
    """Batches with the random numbers a training step draws in between, and the state after."""
    shake_generators(5)
    seen = []
    for _ in range(epochs):
        for number, batch in enumerate(loader):
            seen.append((batch, torch.rand(()).item()))
            if number == stop:
                break
        seen.append(generator_states())
    return seen


def _feed_epochs(feed: Feed, epochs: int, load: str, stop: int | None = None) -> list[Any]:
    shake_generators(5)
    seen = []
    for epoch in range(epochs):
        how = {"mixed": ("lazy", "all")[epoch % 2], "none": "lazy"}.get(load, load)
        for number, ticket in enumerate(feed.epoch(epoch, load=how)):
            batch = ticket.indices if load == "none" else ticket.load()
            seen.append((batch, torch.rand(()).item()))
            if number == stop:
                break
        seen.append(generator_states())
    return seen


def _same(plain: list[Any], ours: list[Any]) -> None:
    assert len(plain) == len(ours)
    for one, other in zip(plain, ours, strict=True):
        if not isinstance(one[0], list | tuple) or len(one) != 2:
            assert one == other, "another state of the generators"
            continue
        assert one[1] == other[1], "training drew another number"
        indices = one[0][1].tolist()
        if isinstance(other[0], np.ndarray):
            assert (other[0] % 70).tolist() == [i % 70 for i in indices]
        else:
            assert torch.equal(one[0][0], other[0][0])
            assert indices == other[0][1].tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("load", ["none", "lazy", "all", "mixed"])
def test_batches_and_generators_are_those_of_the_loader(order, load):
    plain = _plain_epochs(_loader(Numbered(), order), 3)
    _same(plain, _feed_epochs(Feed(_loader(Numbered(), order)), 3, load))


@pytest.mark.parametrize("order", ["shuffled", "draws all the time", "batches of its own"])
@pytest.mark.parametrize("load", ["none", "lazy", "all", "mixed"])
@pytest.mark.parametrize(
    "workers",
    [{}, {"persistent_workers": True}, {"prefetch_factor": 3}],
    ids=["fresh", "persistent", "far ahead"],
)
def test_the_same_with_workers(order, load, workers):
    settings_ = {"num_workers": 2, **workers}
    plain = _plain_epochs(_loader(Numbered(), order, **settings_), 3)
    feed = Feed(_loader(Numbered(), order, **settings_))
    _same(plain, _feed_epochs(feed, 3, load))
    feed.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("load", ["none", "all"])
def test_an_epoch_that_is_broken_off_leaves_what_the_loader_would(workers, load):
    plain = _plain_epochs(_loader(Numbered(), "draws all the time", num_workers=workers), 2, stop=3)
    feed = Feed(_loader(Numbered(), "draws all the time", num_workers=workers))
    _same(plain, _feed_epochs(feed, 2, load, stop=3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(set(ORDERS) - {"batches of its own"})),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([0, 0, 0, 0, 0, 2]),
    st.sampled_from(["none", "all", "mixed"]),
)
def test_any_loader(order, size, drop, workers, load):
    plain = _plain_epochs(_loader(Numbered(), order, size, drop, num_workers=workers), 2)
    _same(plain, _feed_epochs(Feed(_loader(Numbered(), order, size, drop, num_workers=workers)),
                              2, load))  # fmt: skip


@pytest.mark.parametrize("order", ["as they come", "shuffled"])
def test_each_sample_comes_once_in_an_epoch(order):
    feed = Feed(_loader(Numbered(), order))
    for epoch in range(2):
        seen = np.concatenate([ticket.indices for ticket in feed.epoch(epoch)])
        assert sorted(seen.tolist()) == list(range(70))


def test_nothing_is_made_when_nobody_asks():
    data = Numbered()
    feed = Feed(_loader(data, "shuffled"))
    data.made = 0
    tickets = list(feed.epoch(0))
    assert data.made == 0
    tickets[3].load()
    assert data.made == len(tickets[3].indices)
