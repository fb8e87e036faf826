"""The feed: the loader's own batches and random numbers, with indices; loaded or not."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from frostline.errors import FrontierError
from frostline.frontier.feed import BLOCK, Feed, SampleChanged
from frostline.frontier.views import Views
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


class AtOnce(Uneven):
    """Draws all batches as soon as it is asked for an iterator."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(super().__iter__()))


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
    "batches drawn at once": lambda n, size, drop: {"batch_sampler": AtOnce(n)},
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


@pytest.mark.parametrize(
    "order", ["shuffled", "draws all the time", "batches of its own", "batches drawn at once"]
)
@pytest.mark.parametrize("load", ["none", "all", "mixed"])
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
    st.sampled_from(sorted(set(ORDERS) - {"batches of its own", "batches drawn at once"})),
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


@pytest.mark.parametrize("load", ["lazy", "all"])
@pytest.mark.parametrize("order", sorted(set(ORDERS) - {"negative"}))
def test_tickets_name_what_they_load(order, load):
    feed = Feed(_loader(Numbered(), order))
    for ticket in feed.epoch(0, load=load):
        assert ticket.indices.tolist() == ticket.load()[1].tolist()


def test_nothing_is_made_when_nobody_asks():
    data = Numbered()
    feed = Feed(_loader(data, "shuffled"))
    data.made = 0
    tickets = list(feed.epoch(0))
    assert data.made == 0
    tickets[3].load()
    assert data.made == len(tickets[3].indices)


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_are_consecutive_samples_in_the_order_asked(workers):
    feed = Feed(_loader(Numbered(), "shuffled", num_workers=workers))
    shake_generators(1)
    before = generator_states()
    for firsts in ([64, 0, 32], [0], [], [32, 32]):
        got = list(feed.blocks(firsts, 0))
        assert [first for first, _ in got] == firsts
        for first, (values, numbers) in got:
            assert numbers.tolist() == list(range(first, min(first + BLOCK, 70)))
            assert values[:, 0].tolist() == numbers.tolist()
    assert generator_states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_amid_an_epoch_do_not_move_it(workers):
    plain = _plain_epochs(_loader(Numbered(), "shuffled", num_workers=workers), 2)
    feed = Feed(_loader(Numbered(), "shuffled", num_workers=workers))
    shake_generators(5)
    ours = []
    for epoch in range(2):
        for ticket in feed.epoch(epoch):
            blocks = list(feed.blocks([int(ticket.indices[0]) // BLOCK * BLOCK], 0))
            assert len(blocks) == 1
            ours.append((ticket.load(), torch.rand(()).item()))
        ours.append(generator_states())
    _same(plain, ours)


def test_workers_of_blocks_stay():
    def where(samples):
        return os.getpid()

    feed = Feed(_loader(Numbered(), "shuffled", num_workers=2, collate_fn=where))
    seen = [{process for _, process in feed.blocks([0, 32], 0)} for _ in range(3)]
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 2
    assert os.getpid() not in seen[0]
    feed.close()
    after = {process for _, process in feed.blocks([0, 32], 0)}
    assert not after & seen[0]


@pytest.mark.parametrize("first", [1, -32, 96, 70])
def test_blocks_begin_at_multiples(first):
    with pytest.raises(FrontierError, match="block of samples"):
        Feed(_loader(Numbered(), "shuffled")).blocks([0, first], 0)


@pytest.mark.parametrize("view", [-1, 1])
def test_blocks_are_of_a_view_that_there_is(view):
    with pytest.raises(FrontierError, match="1 views"):
        Feed(_loader(Numbered(), "shuffled")).blocks([0], view)


def test_a_second_call_ends_the_first():
    feed = Feed(_loader(Numbered(), "shuffled"))
    early = feed.blocks([0, 32], 0)
    next(early)
    assert [first for first, _ in feed.blocks([64], 0)] == [64]
    with pytest.raises(FrontierError, match="asked for later"):
        next(early)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_samples_can_be_loaded(workers):
    feed = Feed(_loader(Numbered(), "shuffled", num_workers=workers))
    before = generator_states()
    assert feed.load([5, 69, 5, 0], [0, 0, 0, 0])[1].tolist() == [5, 69, 5, 0]
    assert generator_states() == before
    with pytest.raises(FrontierError, match="1 views"):
        feed.load([1, 2], [0, 1])
    with pytest.raises(FrontierError, match="0 to 69"):
        feed.load([70], [0])
    feed = Feed(_loader(Noisy(), "shuffled", num_workers=workers), views=Views(2))
    together = feed.load([3, 3, 4], [0, 1, 1])[0].tolist()
    assert together[0] != together[1]
    assert together == [feed.load([i], [v])[0][0].tolist() for i, v in ((3, 0), (3, 1), (4, 1))]


# -- views -----------------------------------------------------------------------------------------


def _by_sample(batch: Any) -> dict[int, list[float]]:
    values, numbers = batch
    return dict(zip(numbers.tolist(), values.tolist(), strict=True))


def test_a_view_is_a_function_of_index_view_and_seed_alone():
    views = Views(3, seed=8)
    seen: dict[tuple[int, int], list[float]] = {}

    def check(ticket_or_block: Any, view: Any) -> None:
        for place, (index, values) in enumerate(_by_sample(ticket_or_block).items()):
            number = view if isinstance(view, int) else int(view[place])
            assert seen.setdefault((index, number), values) == values

    for workers in (0, 2):
        feed = Feed(_loader(Noisy(), "shuffled", num_workers=workers), views=views)
        shake_generators(workers)
        for epoch in range(5):
            for ticket in feed.epoch(epoch, load=("lazy", "all")[epoch % 2]):
                assert ticket.view.tolist() == views.of(epoch, ticket.indices).tolist()
                check(ticket.load(), ticket.view)
        for view in range(3):
            for _, block in feed.blocks([32, 64, 0], view):
                check(block, view)
        feed.close()
    assert len(seen) == 3 * 70
    contents = {tuple(v - i for v in values) for (i, _), values in seen.items()}
    assert len(contents) == 3 * 70, "every view of every sample is another one"
    other = Feed(_loader(Noisy(), "as they come"), views=Views(3, seed=9))
    assert not any(values == seen[i, 0] for i, values in
                   _by_sample(next(other.epoch(0)).load()).items())  # fmt: skip


@pytest.mark.parametrize("load", ["lazy", "all"])
@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_do_not_move_the_generators(load, workers):
    plain = _plain_epochs(_loader(Numbered(), "shuffled", num_workers=workers), 2)
    feed = Feed(_loader(Noisy(), "shuffled", num_workers=workers), views=Views(2))
    ours = _feed_epochs(feed, 2, load)
    assert [s[1] for s in plain if len(s) == 2] == [s[1] for s in ours if len(s) == 2]
    assert plain[-1] == ours[-1]


@pytest.mark.slow  # a new Python in each worker
def test_workers_that_start_afresh_make_the_same_views():
    loader = DataLoader(
        Noisy(), batch_size=32, num_workers=1, multiprocessing_context="spawn", shuffle=True
    )
    feed = Feed(loader, views=Views(2))
    ((_, (values, _)),) = feed.blocks([0], 1)
    assert torch.equal(values, feed.load(range(32), [1] * 32)[0])
    feed.close()


def test_random_transforms_need_views():
    with pytest.raises(FrontierError, match="random transforms"):
        Feed(_loader(Noisy(), "shuffled"))
    feed = Feed(_loader(Noisy(), "shuffled"), views=Views(1, augmented=True))
    batches = [[t.load()[0] for t in feed.epoch(e)] for e in range(2)]
    assert torch.cat(batches[0]).sum() == pytest.approx(torch.cat(batches[1]).sum().item())


def test_a_transform_that_draws_without_using_it_counts_as_random():
    class Drawing(Numbered):
        def __getitem__(self, index):
            torch.rand(())
            return super().__getitem__(index)

    with pytest.raises(FrontierError, match="random transforms"):
        Feed(_loader(Drawing(), "shuffled"))


def test_loading_beside_an_epoch_never_moves_the_generators():
    class Sometimes(Numbered):
        """Draws at one sample that is not looked at in advance."""

        def __getitem__(self, index):
            if index == 33:
                torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
            return super().__getitem__(index)

    feed = Feed(_loader(Sometimes(), "as they come"))
    before = generator_states()
    list(feed.blocks([32], 0))
    feed.load([33], [0])
    for ticket in feed.epoch(0):
        here = generator_states()
        ticket.load()
        assert generator_states() == here
    feed.witness(0, most=70)
    torch.set_rng_state(torch.tensor(before[-1], dtype=torch.uint8))  # the seed of the workers
    assert generator_states() == before


def test_a_generator_of_its_own_is_refused_in_any_case():
    class Private(Numbered):
        def __init__(self):
            super().__init__()
            self.generator = np.random.default_rng(0)

        def __getitem__(self, index):
            return self.generator.random()

    for views in (Views(1), Views(4)):
        with pytest.raises(FrontierError, match="generator of its own"):
            Feed(_loader(Private(), "shuffled"), views=views)


def test_a_random_collate_function_is_refused_in_any_case():
    def masking(samples):
        values = torch.stack([values for values, _ in samples])
        return values * (torch.rand(values.shape) > 0.5), torch.tensor([n for _, n in samples])

    for views in (Views(1), Views(4)):
        with pytest.raises(FrontierError, match="collate function"):
            Feed(_loader(Numbered(), "shuffled", collate_fn=masking), views=views)


def test_looking_for_randomness_moves_no_generator():
    shake_generators(2)
    before = generator_states()
    feed = Feed(_loader(Noisy(), "shuffled", num_workers=2), views=Views(2))
    _ = feed.identity
    assert generator_states() == before


# -- data that changes -------------------------------------------------------------------------


def test_a_sample_that_changes_is_noticed_when_it_is_loaded():
    data = TensorDataset(torch.arange(70.0))
    feed = Feed(_loader(data, "as they come"))
    tickets = list(feed.epoch(0))
    tickets[2].load()
    tickets[3].load()
    data.tensors[0][17] = -1
    tickets[3].load()
    with pytest.raises(SampleChanged, match="sample 17"):
        tickets[2].load()
    with pytest.raises(SampleChanged, match="sample 17"):
        list(feed.blocks([0], 0))
    with pytest.raises(SampleChanged, match="sample 17"):
        list(feed.epoch(1, load="all"))


def test_a_witness_looks_at_other_samples_each_epoch():
    data = Numbered(1000)
    feed = Feed(_loader(data, "as they come"))
    assert feed.witness(0) == 0, "nothing known, nothing to compare"
    list(feed.blocks([0, 32], 0))
    seen: list[int] = []
    original = Numbered.__getitem__

    class Watching(Numbered):
        pass

    def watching(self, index):
        seen.append(index)
        return original(self, index)

    data.__class__ = Watching
    Watching.__getitem__ = watching
    before = generator_states()
    compared = sum(feed.witness(epoch, most=3) for epoch in range(20))
    assert generator_states() == before
    assert compared == len(seen)
    assert 40 < compared <= 60
    assert max(seen) < 64
    assert len(set(seen)) > 20


def test_digests_travel_to_another_process():
    data = TensorDataset(torch.arange(70.0))
    first = Feed(_loader(data, "as they come"))
    assert not first.digests(range(70), 0).any()
    list(first.blocks([0], 0))
    stored = first.digests(range(70), 0)
    assert stored[:32].all()
    assert not stored[32:].any()
    first.recall(range(70), 0, np.zeros(70, np.uint64))
    assert (first.digests(range(70), 0) == stored).all(), "unknown takes nothing back"
    data.tensors[0][5] = 99
    second = Feed(_loader(data, "as they come"))
    second.recall(range(70), 0, stored)
    with pytest.raises(SampleChanged, match="sample 5"):
        list(second.blocks([0], 0))
    third = Feed(_loader(data, "as they come"))
    list(third.blocks([0], 0))
    with pytest.raises(SampleChanged, match="sample 5"):
        third.recall(range(70), 0, stored)


def test_views_are_witnessed_apart():
    feed = Feed(_loader(Noisy(), "shuffled"), views=Views(2))
    for epoch in range(3):
        for ticket in feed.epoch(epoch):
            ticket.load()
    assert (feed.digests(range(70), 0) != feed.digests(range(70), 1)).all()
    assert feed.witness(0) >= 1


def test_samples_that_cannot_be_read_are_not_witnessed():
    class Opaque(Numbered):
        def __getitem__(self, index):
            return (i for i in range(index))

    loader = DataLoader(Opaque(), batch_size=4, collate_fn=len)
    feed = Feed(loader)
    assert [ticket.load() for ticket in feed.epoch(0)][-1] == 2
    assert not feed.digests(range(70), 0).any()
    assert feed.witness(0) == 0


# -- other data sets -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_subsets_and_chains_number_their_own_samples(workers):
    parts = [Subset(Numbered(70), range(10, 20)), Subset(Numbered(70), range(40, 65))]
    data = ConcatDataset(parts)
    feed = Feed(DataLoader(data, batch_size=4, shuffle=True, num_workers=workers))
    assert feed.samples == 35
    for ticket in feed.epoch(0, load="all"):
        expected = [i + 10 if i < 10 else i + 30 for i in ticket.indices.tolist()]
        assert ticket.load()[1].tolist() == expected
    ((_, (_, numbers)),) = feed.blocks([0], 0)
    assert numbers.tolist() == [*range(10, 20), *range(40, 62)]


def test_data_sets_that_fetch_many_at_once_are_asked_so():
    class Many(Numbered):
        def __getitems__(self, indices):
            self.asked = [*getattr(self, "asked", []), list(indices)]
            return [Numbered.__getitem__(self, i) for i in indices]

        def __getitem__(self, index):
            raise AssertionError("one by one")

    feed = Feed(_loader(Many(), "as they come"))
    feed.loader.dataset.asked = []
    next(feed.epoch(0)).load()
    assert feed.loader.dataset.asked == [list(range(8))]
    seeded = Feed(_loader(Many(), "as they come"), views=Views(2))
    next(seeded.epoch(0)).load()
    assert seeded.loader.dataset.asked[-8:] == [[i] for i in range(8)]


def test_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": list(range(70)), "y": [str(i) for i in range(70)]})
    plain = DataLoader(data, batch_size=8, shuffle=True)
    torch.manual_seed(3)
    expected = list(plain)
    for load in ("lazy", "all"):
        feed = Feed(DataLoader(data, batch_size=8, shuffle=True))
        torch.manual_seed(3)
        got = [(ticket.indices.tolist(), ticket.load()) for ticket in feed.epoch(0, load=load)]
        assert [g[0] for g in got] == [g[1]["x"].tolist() for g in got]
        assert [g[1]["y"] for g in got] == [e["y"] for e in expected]
    assert feed.identity["data"]

    def jitter(rows):
        return {"x": [x + random.random() for x in rows["x"]]}

    noisy = data.with_transform(jitter)
    with pytest.raises(FrontierError, match="random transforms"):
        Feed(DataLoader(noisy, batch_size=8))
    feed = Feed(DataLoader(noisy, batch_size=8, shuffle=True), views=Views(2))
    seen = {}
    for epoch in range(4):
        for ticket in feed.epoch(epoch, load="all"):
            for i, v, x in zip(ticket.indices, ticket.view, ticket.load()["x"], strict=True):
                assert seen.setdefault((int(i), int(v)), x.item()) == x.item()


def test_what_workers_prepare_is_there():
    class Lazy(Numbered):
        file = None

        def __getitem__(self, index):
            return torch.tensor(self.file[index])

    def prepare(worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        info.dataset.file = list(range(len(info.dataset)))

    for views in (Views(1), Views(2)):
        loader = DataLoader(
            Lazy(), batch_size=8, shuffle=True, num_workers=2, worker_init_fn=prepare
        )
        feed = Feed(loader, views=views)
        for load in ("lazy", "all"):
            for ticket in feed.epoch(0, load=load):
                assert ticket.load().tolist() == ticket.indices.tolist()
        ((_, block),) = feed.blocks([32], 0)
        assert block.tolist() == list(range(32, 64))
        feed.close()


def test_errors_of_the_data_set_come_through():
    class Broken(Numbered):
        def __getitem__(self, index):
            if index == 11:
                raise KeyError("the eleventh")
            return super().__getitem__(index)

    feed = Feed(_loader(Broken(), "as they come"))
    tickets = list(feed.epoch(0))
    tickets[0].load()
    with pytest.raises(KeyError, match="eleventh"):
        tickets[1].load()
    with pytest.raises(KeyError, match="eleventh"):
        list(feed.blocks([0], 0))


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_no_loader_is_refused():
    class Own(DataLoader):
        def __iter__(self):
            return super().__iter__()

    cases = [
        ([1, 2], "a list"),
        (Own(Numbered()), "way of its own"),
        (DataLoader(Numbered(), batch_size=None), "batch_size=None"),
    ]
    for loader, said in cases:
        with pytest.raises(FrontierError, match=said):
            Feed(loader)


def test_keys_that_are_no_indices_are_refused():
    class Words(Numbered):
        def __getitem__(self, key):
            return len(str(key))

    feed = Feed(DataLoader(Words(), batch_sampler=[["a", "b"]]))
    with pytest.raises(FrontierError, match="no whole numbers"):
        next(feed.epoch(0))
    feed = Feed(DataLoader(Words(), batch_sampler=[[3, 70]]))
    with pytest.raises(FrontierError, match="0 to 69"):
        next(feed.epoch(0))


def test_a_map_without_length_is_refused():
    class Endless(Dataset):
        def __getitem__(self, index):
            return index

    with pytest.raises(FrontierError, match="without len"):
        Feed(DataLoader(Endless(), sampler=[1, 2]))


def test_length_and_description_are_the_loaders():
    feed = Feed(_loader(Noisy(), "shuffled"), views=Views(4))
    assert len(feed) == len(feed.loader) == 9
    assert feed.describe() == Views(4).describe()


# -- streams ---------------------------------------------------------------------------------------


class Flow(IterableDataset):
    """Numbers in a row, shared out among workers."""

    def __init__(self, samples: int = 70, shuffled: bool = False, shared: bool = True) -> None:
        self.samples = samples
        self.shuffled = shuffled
        self.shared = shared

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info and self.shared else (0, 1)
        order = list(range(start, self.samples, step))
        if self.shuffled:
            random.shuffle(order)
        for i in order:
            yield torch.full((3,), float(i)), i


class SizedFlow(Flow):
    promised = 70

    def __len__(self) -> int:
        return self.promised


def _flow_loader(kind: type[Flow], size: int, drop: bool, **more: Any) -> DataLoader:
    return DataLoader(kind(), batch_size=size, drop_last=drop, **more)


@pytest.mark.parametrize("kind", [Flow, SizedFlow])
@pytest.mark.parametrize("size", [1, 8, 70, 100])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("load", ["none", "lazy", "all", "mixed"])
def test_streams_give_the_loaders_batches(kind, size, drop, load):
    plain = _plain_epochs(_flow_loader(kind, size, drop), 2)
    feed = Feed(_flow_loader(kind, size, drop), stable_order=True)
    _same(plain, _feed_epochs(feed, 2, load))


@pytest.mark.parametrize("more", [{"num_workers": 2}, {"num_workers": 3, "shared": False},
                                  {"num_workers": 2, "persistent_workers": True}])  # fmt: skip
@pytest.mark.parametrize("load", ["lazy", "all", "mixed"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_streams_with_workers_are_numbered_as_delivered(more, load):
    more = dict(more)
    data = Flow(shared=more.pop("shared", True))
    plain = _plain_epochs(DataLoader(data, batch_size=8, **more), 2)
    feed = Feed(DataLoader(data, batch_size=8, **more), stable_order=True)
    assert feed.samples == (70 if data.shared else 210)
    _same(plain, _feed_epochs(feed, 2, load))
    delivered = torch.cat([b[0][1] for b in plain[: len(plain) // 2 - 1]]).tolist()
    shake_generators(4)
    before = generator_states()
    for first, (_, numbers) in feed.blocks([32, 64, 0, 32], 0):
        assert numbers.tolist() == delivered[first : min(first + BLOCK, feed.samples)]
    assert generator_states() == before
    for ticket in feed.epoch(1):
        assert ticket.load()[1].tolist() == [delivered[i] for i in ticket.indices]
    feed.close()


@pytest.mark.parametrize("load", ["lazy", "all"])
def test_positions_count_up(load):
    feed = Feed(DataLoader(Flow(), batch_size=8), stable_order=True)
    for epoch in range(2):
        tickets = list(feed.epoch(epoch, load=load))
        assert np.concatenate([t.indices for t in tickets]).tolist() == list(range(70))
        assert all(t.load()[1].tolist() == t.indices.tolist() for t in tickets)
        assert not any(t.view.any() for t in tickets)


def test_the_length_of_a_stream_is_not_believed_where_workers_may_repeat_it():
    feed = Feed(DataLoader(SizedFlow(shared=False), batch_size=8, num_workers=2), stable_order=True)
    assert feed.samples == 140


def test_nothing_is_read_from_a_stream_when_nobody_asks():
    reads = []

    class Reading(SizedFlow):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    feed = Feed(DataLoader(Reading(), batch_size=8), stable_order=True)
    indices = np.concatenate([ticket.indices for ticket in feed.epoch(0)])
    assert indices.tolist() == list(range(70))
    assert not reads
    list(feed.blocks([0, 32, 64], 0))
    assert len(reads) == 1, "rising blocks are read in one go"


def test_any_samples_of_a_stream_can_be_loaded():
    feed = Feed(DataLoader(Flow(), batch_size=8), stable_order=True)
    assert feed.load([60, 3, 60, 2], [0] * 4)[1].tolist() == [60, 3, 60, 2]
    assert feed.load([61], [0])[1].tolist() == [61]
    assert feed.load([5], [0])[1].tolist() == [5], "back to the start"


def test_a_stream_must_be_promised_to_be_stable():
    with pytest.raises(FrontierError, match="stable_order=True"):
        Feed(DataLoader(Flow(), batch_size=8))
    with pytest.raises(FrontierError, match="random access"):
        Feed(DataLoader(Flow(), batch_size=8), views=Views(2), stable_order=True)


@pytest.mark.parametrize("kind", [Flow, SizedFlow])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("load", ["lazy", "all", "blocks", "witness"])
def test_a_stream_in_another_order_is_noticed(kind, workers, load):
    loader = DataLoader(kind(shuffled=True), batch_size=8, num_workers=workers)
    feed = Feed(loader, stable_order=True)

    def read(epoch: int) -> None:
        if load == "blocks":
            list(feed.blocks([0], 0))
        elif load == "witness":
            feed.witness(epoch)
        else:
            for ticket in feed.epoch(epoch, load=load):
                ticket.load()

    if kind is SizedFlow:  # else counting the samples was a first look
        list(feed.blocks([0], 0))
    with pytest.raises(SampleChanged, match="position"):
        read(0)


def test_the_witness_of_a_stable_stream_is_content():
    feed = Feed(DataLoader(Flow(), batch_size=8), stable_order=True)
    list(feed.blocks([0, 32], 0))
    assert feed.witness(0) == feed.witness(1) == 2


def test_a_stream_that_is_shorter_or_longer_than_promised():
    class Lying(SizedFlow):
        promised = 100

    feed = Feed(DataLoader(Lying(), batch_size=8), stable_order=True)
    with pytest.raises(FrontierError, match="its end after 70 samples, where 100"):
        list(feed.blocks([0, 32, 64], 0))
    feed = Feed(DataLoader(Flow(), batch_size=8), stable_order=True, samples=20)
    with pytest.raises(FrontierError, match="more than the 20"):
        list(feed.epoch(0, load="all"))


def test_a_stream_that_can_be_read_once_is_noticed():
    class Once(SizedFlow):
        def __init__(self):
            super().__init__()
            self.rest = iter(range(70))

        def __iter__(self):
            return self.rest

    feed = Feed(DataLoader(Once(), batch_size=8), stable_order=True)
    list(feed.epoch(0, load="all"))
    with pytest.raises(FrontierError, match="its end after 0 samples"):
        next(feed.epoch(1)).load()


def test_hugging_face_streams():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": list(range(70))}).to_iterable_dataset()
    feed = Feed(DataLoader(data.with_format("torch"), batch_size=8), stable_order=True)
    for epoch in range(2):
        for ticket in feed.epoch(epoch):
            assert ticket.load()["x"].tolist() == ticket.indices.tolist()
    shuffled = data.shuffle(seed=1, buffer_size=30).with_format("torch")
    feed = Feed(DataLoader(shuffled, batch_size=8), stable_order=True)
    list(feed.epoch(0, load="all"))
    shuffled.set_epoch(1)
    with pytest.raises(SampleChanged):
        list(feed.epoch(1, load="all"))


# -- identity --------------------------------------------------------------------------------------


def _identity(data: Any, **more: Any) -> Any:
    identity = Feed(DataLoader(data, batch_size=8), **more).identity
    assert json.loads(json.dumps(identity)) == identity
    return identity


def test_equal_data_have_equal_identities():
    one = _identity(TensorDataset(torch.arange(70.0)))
    assert one == _identity(TensorDataset(torch.arange(70.0)))
    changed = torch.arange(70.0)
    changed[33] += 1
    assert one["data"]
    assert one != _identity(TensorDataset(changed))
    assert one != _identity(TensorDataset(torch.arange(71.0)))
    assert not one["unknown"]


def test_the_collate_function_is_part_of_it():
    data = TensorDataset(torch.arange(70.0))
    one = Feed(DataLoader(data, collate_fn=len)).identity
    other = Feed(DataLoader(data, collate_fn=lambda s: len(s) + 1)).identity
    assert one["collate"] != other["collate"]
    assert one["data"] == other["data"]


def test_views_are_part_of_it_but_not_their_number():
    data = Noisy()
    assert _identity(data, views=Views(2)) == _identity(data, views=Views(3))
    assert _identity(data, views=Views(2)) != _identity(data, views=Views(2, seed=1))


def test_what_cannot_be_known_is_said():
    data = Numbered()
    data.lock = threading.Lock()
    identity = _identity(data)
    assert identity["data"] is None
    assert not Feed(DataLoader(data)).known
    assert Feed(DataLoader(data), identity=3).known
    assert Feed(DataLoader(Numbered())).known
    assert "_thread.lock" in identity["unknown"][0]
    given_ = _identity(data, identity="mine, version 3")
    assert given_["given"] == "mine, version 3"
    assert given_["data"] == given_["collate"] == "given"


def test_how_a_stream_is_cut_is_part_of_it():
    one = Feed(DataLoader(Flow(), batch_size=8), stable_order=True).identity
    other = Feed(DataLoader(Flow(), batch_size=9), stable_order=True).identity
    assert one["kind"] == "stream"
    assert one["cut"] != other["cut"]


def test_identity_does_not_depend_on_what_was_loaded_before():
    data = Numbered()
    before = _identity(data)
    feed = Feed(DataLoader(Numbered(), batch_size=8))
    list(feed.epoch(0, load="all"))
    assert feed.identity == before
