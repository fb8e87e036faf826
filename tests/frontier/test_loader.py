"""Cached training in a loop of the user's own, against the same loop without the cache."""

from __future__ import annotations

import copy
import io
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
)

import frostline
from frostline.errors import FrontierError
from frostline.frontier import side
from frostline.frontier.cache import FrontierCache
from frostline.frontier.library import Library
from frostline.frontier.loader import CachedLoader
from frostline.frontier.views import Views
from generators import generator_states

WIDTH, CLASSES, SAMPLES = 64, 3, 75
Wrap = Callable[[nn.Module, DataLoader], Any]


class Counted(Dataset):
    """(x, y) pairs; counts how often a sample was read."""

    def __init__(self, samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(samples, WIDTH, generator=generator)
        self.y = torch.randint(CLASSES, (samples,), generator=generator)
        self.read = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return self.x[index], self.y[index]


class Net(nn.Module):
    """A frozen stem with normalisation, a trained middle with dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 16)
        )
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        stem = self.stem(x)
        if mask is not None:
            stem = stem * mask
        return self.head(torch.relu(self.middle(stem))) * scale


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for norm in (model.stem[1], model.middle[1]):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    model.train()
    frostline.freeze(model, "stem*")
    model.stem.eval()
    return model


def seeded_loader(data: Any, *, batch_size: int = 16, **options: Any) -> DataLoader:
    options.setdefault("shuffle", True)
    return DataLoader(data, batch_size=batch_size, **options)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "frostline")


def cached(library: Library, **options: Any) -> FrontierCache:
    return options.pop("kind", FrontierCache)(options.pop("model"), library, min_gain=-1e9,
                                              **options)  # fmt: skip


class Trace(NamedTuple):
    """All that one training shows."""

    losses: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]
    labels: list[Tensor]
    random: Any


Step = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y), y


def train(
    model: nn.Module, loader: Any, step: Step = pair, *, epochs: int = 3, seed: int = 7
) -> Trace:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, gradients, labels = [], [], []
    for _ in range(epochs):
        for batch in loader:
            loss, y = step(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
            labels.append(torch.as_tensor(y).clone())
            gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return Trace(losses, gradients, state, labels, generator_states())


def assert_same(cached: Trace, plain: Trace, *, exact: bool = False) -> None:
    """Labels, state and random streams equal; values to 1e-5, or to the bit."""
    assert len(cached.losses) == len(plain.losses)
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 5e-6}
    for mine, theirs in zip(cached.labels, plain.labels, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(cached.losses, plain.losses, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    for mine, theirs in zip(cached.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    for name, theirs in plain.state.items():
        torch.testing.assert_close(cached.state[name], theirs, **tolerance)
    assert str(cached.random) == str(plain.random)


def both(
    library: Library,
    data: Callable[[], Any],
    step: Step = pair,
    *,
    make: Callable[[], nn.Module] = net,
    epochs: int = 3,
    exact: bool = False,
    wrap: dict[str, Any] | None = None,
    **options: Any,
) -> FrontierCache:
    """Train twice, without and with the cache, and compare; the cache stays attached."""
    plain = train(make(), seeded_loader(data(), **options), step, epochs=epochs)
    model = make()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(data(), **options), **(wrap or {}))
    assert_same(train(model, loader, step, epochs=epochs), plain, exact=exact)
    cache.detach()
    return cache


# -- ways of calling the model -----------------------------------------------------------------


class Item(NamedTuple):
    x: Tensor
    y: Tensor


class Many(Dataset):
    """Samples of another build around the same pairs."""

    def __init__(self, build: Callable[[int, Tensor, Tensor], Any]) -> None:
        self.inner, self.build = Counted(), build

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.build(index, *self.inner[index])


def as_dict(index: int, x: Tensor, y: Tensor) -> Any:
    return {"x": x, "m": (x[:16] > 0).float(), "y": y, "id": f"s{index}", "w": index / 7}


def as_item(index: int, x: Tensor, y: Tensor) -> Any:
    return Item(x, y)


def nested(index: int, x: Tensor, y: Tensor) -> Any:
    return {"in": [x, (y, f"n{index}")], "k": 3}


def by_key(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    assert all(isinstance(i, str) for i in batch["id"])
    loss = nn.functional.cross_entropy(model(batch["x"], mask=batch["m"]), batch["y"],
                                       reduction="none")  # fmt: skip
    return (loss * batch["w"].float()).mean(), torch.stack([batch["y"],
        torch.tensor([int(i[1:]) for i in batch["id"]])])  # fmt: skip


def by_keywords(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    inputs = {"x": batch["x"], "mask": batch["m"]}
    return nn.functional.cross_entropy(model(**inputs, scale=2.0), batch["y"]), batch["y"]


def moved_to(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = (t.to("cpu", non_blocking=True) for t in batch)
    return nn.functional.cross_entropy(model(x), y), y


def cast(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return nn.functional.cross_entropy(model(x.double().float()), y), y


def by_attribute(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return nn.functional.cross_entropy(model(batch.x), batch.y), batch.y


def inside(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, (y, names) = batch["in"]
    assert batch["k"].tolist() == [3] * len(names)
    return nn.functional.cross_entropy(model(x), y), y


def twice(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    first = model(batch["x"])
    second = model(batch["x"], mask=batch["m"])
    return nn.functional.cross_entropy(first + second, batch["y"]), batch["y"]


def two_inputs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    first, second = model(batch["x"]), model(batch["z"])
    third = model(batch["x"].bfloat16().float())
    return nn.functional.cross_entropy(first + 2 * second + third, batch["y"]), batch["y"]


def as_two(index: int, x: Tensor, y: Tensor) -> Any:
    return {"x": x, "z": x.flip(0), "y": y}


CALLS = {
    "two inputs": (lambda: Many(as_two), two_inputs),
    "tuple": (Counted, pair),
    "moved": (Counted, moved_to),
    "cast": (Counted, cast),
    "dict": (lambda: Many(as_dict), by_key),
    "keywords": (lambda: Many(as_dict), by_keywords),
    "named tuple": (lambda: Many(as_item), by_attribute),
    "nested": (lambda: Many(nested), inside),
    "two calls in a step": (lambda: Many(as_dict), twice),
}


@pytest.mark.parametrize("how", CALLS)
def test_cached_training_equals_plain_training(how: str, library: Library) -> None:
    data, step = CALLS[how]
    cache = both(library, data, step)
    calls = {"two calls in a step": 30, "two inputs": 45}.get(how, 15)
    assert cache.report.replayed == cache.report.batches == calls
    assert cache.report.filled_rows == SAMPLES * calls // 15


def test_nothing_is_loaded_any_more_once_all_is_stored(library: Library) -> None:
    model, data = net(), Counted()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(data))
    train(model, loader, epochs=1)
    before = data.read
    assert before < 3 * SAMPLES
    train(model, loader, epochs=1)  # a glance at two samples whether they changed
    assert data.read <= before + 2
    assert cache.report.replayed == 10


def test_equal_to_the_bit_where_batches_are_the_blocks(library: Library) -> None:
    both(library, lambda: Counted(96), batch_size=32, shuffle=False, exact=True)


def test_a_float64_model_is_equal_far_below_float32(library: Library) -> None:
    def make() -> nn.Module:
        return net().double()

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return nn.functional.cross_entropy(model(batch[0].double()), batch[1]), batch[1]

    assert both(library, Counted, step, make=make).report.replayed == 15


# -- what the user does on the way ----------------------------------------------------------------


def doubled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return nn.functional.cross_entropy(model(x * 2), y), y


def by_name_alone(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return nn.functional.cross_entropy(model(torch.relu(input=x)), y), y


def doubled_in_place(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x.mul_(2)
    return nn.functional.cross_entropy(model(x), y), y


def written_through_a_view(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x.view(-1)[:WIDTH].zero_()
    return nn.functional.cross_entropy(model(x), y), y


def written_through_data(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x.data.mul_(0.5)
    return nn.functional.cross_entropy(model(x), y), y


def written_through_numpy(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x.numpy()[0] = 1
    return nn.functional.cross_entropy(model(x), y), y


def written_through_a_view_of_a_cast(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = x.double()
    x.view(-1)[:WIDTH].zero_()
    return nn.functional.cross_entropy(model(x.float()), y), y


def cast_and_written(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = x.double()
    x.mul_(2)
    return nn.functional.cross_entropy(model(x.float()), y), y


def mixed_up(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    share = random.betavariate(1, 1)
    order = torch.randperm(len(x))
    scores = model(share * x + (1 - share) * x[order])
    loss = nn.functional.cross_entropy
    return share * loss(scores, y) + (1 - share) * loss(scores, y[order]), y


def with_input_gradient(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x.requires_grad_()
    loss = nn.functional.cross_entropy(model(x), y)
    (slope,) = torch.autograd.grad(loss, x, retain_graph=True)
    return loss + slope.norm(), y


def twice_with_a_change_between(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    first = nn.functional.cross_entropy(model(x), y)
    x += 1
    return first + nn.functional.cross_entropy(model(x), y), y


CHANGES = [doubled, by_name_alone, doubled_in_place, written_through_a_view, written_through_data,
           written_through_a_view_of_a_cast, cast_and_written,
           written_through_numpy, mixed_up, with_input_gradient]  # fmt: skip


class Copies(Counted):
    """Gives a private copy each time, so that writing into a batch cannot harm the data."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x.clone(), y.clone()


@pytest.mark.parametrize("step", CHANGES, ids=lambda step: step.__name__)
def test_a_changed_batch_takes_the_full_forward_pass(step: Step, library: Library) -> None:
    cache = both(library, Copies, step, exact=True)
    assert cache.report.replayed == 0
    assert sum("changed on its way" in n for n in cache.report.notes) == 1


def test_a_batch_changed_after_its_first_use_is_seen_as_it_is(library: Library) -> None:
    cache = both(library, Copies, twice_with_a_change_between)
    assert cache.report.replayed == 15


def test_looking_at_the_batch_changes_nothing(library: Library) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        assert x.shape == (len(y), WIDTH)
        assert x.dtype == torch.float32
        assert not x.requires_grad
        assert x.mean().item() != 0
        loss = nn.functional.cross_entropy(model(x), y)
        return loss + 0.1 * x.abs().mean(), y

    assert both(library, Counted, step).report.replayed == 15


def test_a_forward_pass_outside_of_the_loader_simply_runs(library: Library) -> None:
    model, plain = net(), net()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Counted()))
    x = torch.randn(5, WIDTH)
    for batch in loader:
        model(batch[0])
    for other in (model, plain):
        other.eval()
    plain.load_state_dict(model.state_dict())
    before = cache.report.batches
    assert torch.equal(model(x), plain(x))
    assert cache.report.batches == before
    cache.detach()


def test_a_constant_tensor_beside_the_batch_is_not_cached(library: Library) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return nn.functional.cross_entropy(model(x, torch.ones(len(y), 16)), y), y

    assert both(library, Counted, step).report.replayed == 0


def test_an_argument_that_changes_at_each_step_is_given_up(library: Library) -> None:
    def make() -> Callable[[nn.Module, Any], tuple[Tensor, Tensor]]:
        steps = iter(range(1000))

        def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = batch
            return nn.functional.cross_entropy(model(x, scale=1.0 + next(steps) / 100), y), y

        return step

    plain = train(net(), seeded_loader(Counted()), make())
    model = net()
    cache = cached(library, model=model)
    assert_same(train(model, cache.loader(seeded_loader(Counted())), make()), plain)
    cache.detach()
    assert any("more than 8 ways" in note for note in cache.report.notes)


def test_a_second_way_of_calling_is_learnt_later(library: Library) -> None:
    def make() -> Step:
        count = iter(range(1000))

        def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            mask = batch["m"] if next(count) >= 5 else None
            return nn.functional.cross_entropy(model(batch["x"], mask), batch["y"]), batch["y"]

        return step

    data = lambda: Many(as_dict)  # noqa: E731
    plain = train(net(), seeded_loader(data()), make())
    model = net()
    cache = cached(library, model=model)
    assert_same(train(model, cache.loader(seeded_loader(data())), make()), plain)
    cache.detach()
    assert cache.report.replayed == 14  # all but the one that came as a surprise


# -- what comes with the inputs -------------------------------------------------------------------


def ranked(samples: list[Any]) -> Any:
    x, y = torch.utils.data.default_collate(samples)
    return x, y, torch.arange(len(x)) / 7


def by_rank(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y, rank = batch
    loss = nn.functional.cross_entropy(model(x), y, reduction="none")
    return (loss * rank).mean(), y


@pytest.mark.parametrize("shuffle", [True, False])
def test_labels_that_depend_on_the_batch_are_loaded(shuffle: bool, library: Library) -> None:
    cache = both(library, Counted, by_rank, collate_fn=ranked, shuffle=shuffle, batch_size=8)
    assert any("depend on the batch" in note for note in cache.report.notes)
    assert cache.report.replayed == cache.report.batches


def weighted(samples: list[Any]) -> Any:
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y, "classes": torch.arange(CLASSES) + 1.0, "unit": "px", "of": (1, "a")}


def by_class_weight(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    assert (batch["unit"], batch["of"]) == ("px", (1, "a"))
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], batch["classes"]), batch["y"]


def test_what_is_the_same_in_all_batches_is_kept_once(library: Library) -> None:
    data = Counted()
    cache = both(library, lambda: data, by_class_weight, collate_fn=weighted, epochs=4)
    assert cache.report.replayed == 20


def odd(samples: list[Any]) -> Any:
    x, y = torch.utils.data.default_collate(samples)
    return x, y, {"when": object()}


def test_odd_objects_are_loaded(library: Library) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        assert type(batch[2]["when"]) is object
        return nn.functional.cross_entropy(model(batch[0]), batch[1]), batch[1]

    cache = both(library, Counted, step, collate_fn=odd)
    assert cache.report.replayed == 15
    assert any("they hold a object" in note for note in cache.report.notes)


def test_the_memory_for_labels_is_bounded(library: Library) -> None:
    model = net()
    cache = cached(library, model=model)
    loader = CachedLoader(cache, seeded_loader(Counted()), name="x", side_bytes=100)
    cache.attach()
    plain = train(net(), seeded_loader(Counted()))
    assert_same(train(model, loader), plain)
    assert any("set aside in memory" in note for note in cache.report.notes)
    cache.detach()


# -- inputs of different lengths ------------------------------------------------------------------


class Reader(nn.Module):
    """Frozen embedding and mixing of tokens, trained head, as over padded text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32, padding_idx=0)
        self.mix = nn.Sequential(nn.Linear(32, 32), nn.GELU())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.mix(self.embed(ids))
        weights = mask.unsqueeze(-1).to(found.dtype)
        return self.head((found * weights).sum(1) / weights.sum(1))


class Texts(Dataset):
    def __init__(self, *, equal_until: int = 0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.texts = [
            torch.randint(1, 50, (5 if i < equal_until else 2 + i % 9,), generator=generator)
            for i in range(SAMPLES)
        ]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.texts[index], index % CLASSES


def pad(samples: list[Any]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([s[0] for s in samples], batch_first=True)
    return {"ids": ids, "mask": ids > 0, "labels": torch.tensor([s[1] for s in samples])}


def reader(frozen: str = "embed* | mix*") -> Reader:
    torch.manual_seed(0)
    model = Reader()
    frostline.freeze(model, frozen)
    return model


def read_text(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    loss = nn.functional.cross_entropy(model(batch["ids"], batch["mask"]), batch["labels"])
    return loss, batch["labels"]


@pytest.mark.parametrize("equal_until", [0, 40])
def test_texts_of_different_lengths(equal_until: int, library: Library) -> None:
    cache = both(library, lambda: Texts(equal_until=equal_until), read_text, make=reader,
                 collate_fn=pad, shuffle=not equal_until)  # fmt: skip
    assert any("different shapes" in note for note in cache.report.notes)
    assert cache.report.replayed >= 14


def test_rows_of_different_lengths(library: Library) -> None:
    """Here what is stored is as long as the text: found out while it is being stored."""
    cache = both(library, lambda: Texts(equal_until=40), read_text, collate_fn=pad, shuffle=False,
                 make=lambda: reader("embed*"))  # fmt: skip
    assert cache.report.replayed == 14
    assert not any("not cached any more" in note for note in cache.report.notes)


# -- random transforms, order, workers ------------------------------------------------------------


class Noisy(Counted):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(WIDTH), y


def test_random_transforms_need_views(library: Library) -> None:
    cache = cached(library, model=net())
    with pytest.raises(FrontierError, match="views"):
        cache.loader(seeded_loader(Noisy()))


def test_views_of_random_transforms_come_again(library: Library) -> None:
    model = net()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Noisy(), shuffle=False), views=Views(2))
    model.eval()
    with torch.no_grad():
        epochs = [torch.cat([model(x) for x, _ in loader]) for _ in range(5)]
    cache.detach()
    torch.testing.assert_close(epochs[0], epochs[2])
    torch.testing.assert_close(epochs[1], epochs[3])
    assert not torch.allclose(epochs[0], epochs[1])
    assert cache.report.filled_rows == 2 * SAMPLES


def test_views_hold_what_the_transforms_give(library: Library) -> None:
    """What the model computes from the store is what it computes from the batch itself."""
    model = net()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Noisy()), views=2)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            for x, _ in loader:
                torch.testing.assert_close(model(x), model(x + 0))
    cache.detach()


class Rude(Sampler[int]):
    """Draws from the global generator at every index."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield int(torch.randint(SAMPLES, ()))


def test_a_sampler_that_draws_as_it_goes(library: Library) -> None:
    cache = both(library, Counted, shuffle=False, sampler=Rude())
    assert cache.report.replayed == 15


def test_with_persistent_workers(library: Library) -> None:
    cache = both(library, Counted, num_workers=1, persistent_workers=True, epochs=2)
    assert cache.report.replayed == 10


def test_what_is_not_served_is_read_by_the_workers(library: Library) -> None:
    model, data = net(), Counted()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(data, num_workers=1))
    before = data.read  # in this process: a look at the first samples
    train(model, loader, doubled, epochs=2)
    assert data.read - before <= 3 * 16
    cache.detach()


def test_workers_load_ahead_when_nothing_is_served(library: Library) -> None:
    both(library, Copies, doubled, num_workers=1, persistent_workers=True, epochs=2, exact=True)


class Numbers(IterableDataset):
    def __init__(self) -> None:
        self.inner = Counted()

    def __iter__(self) -> Iterator[Any]:
        return (self.inner[i] for i in range(SAMPLES))


def test_a_stream_of_stable_order(library: Library) -> None:
    wrap = {"stable_order": True, "samples": SAMPLES}
    cache = both(library, Numbers, shuffle=False, wrap=wrap)
    assert cache.report.replayed == 15


# -- data that changes ----------------------------------------------------------------------------


def test_data_that_change_under_their_index_are_dropped(library: Library) -> None:
    model, data = net(), Copies()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(data))
    train(model, loader, epochs=1)
    replayed = cache.report.replayed
    data.x += 1
    plain = copy.deepcopy(model)
    now = train(model, loader, epochs=2)
    assert cache.report.replayed == replayed
    assert any("not cached any more" in note for note in cache.report.notes)
    assert_same(now, train(plain, seeded_loader(data), epochs=2), exact=True)
    cache.detach()


def test_data_that_change_in_the_middle_of_an_epoch(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever loads a changed sample finds out; from then on nothing stored is used."""
    monkeypatch.setattr(side, "SMALL_BYTES", 0)  # else nothing would have to be loaded
    model, data = net(), Copies()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(data))
    train(model, loader, epochs=1)
    for number, (x, y) in enumerate(loader):
        if number == 2:
            data.x += 1
            assert x.sum() != 0  # loads the real batch
        replayed = cache.report.replayed
        nn.functional.cross_entropy(model(x), y)
        if number >= 2:
            assert cache.report.replayed == replayed
    cache.detach()


# -- loops as people write them -------------------------------------------------------------------


def test_evaluation_in_the_middle_of_an_epoch(library: Library) -> None:
    def run(model: nn.Module, loader: Any, val: Any) -> tuple[Trace, list[Tensor]]:
        scores: list[Tensor] = []

        def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            if len(scores) % 3 == 1:
                model.eval()
                with torch.no_grad():
                    found = [(model(x).argmax(1) == y).float().mean() for x, y in val]
                scores.append(torch.stack(found).mean())
                model.train()
                model.stem.eval()
            else:
                scores.append(torch.zeros(()))
            return pair(model, batch)

        return train(model, loader, step), scores

    def loaders() -> tuple[DataLoader, DataLoader]:
        return seeded_loader(Counted()), seeded_loader(Counted(40), shuffle=False)

    plain, plain_scores = run(net(), *loaders())
    model = net()
    cache = cached(library, model=model)
    trace, scores = run(model, *(cache.loader(loader) for loader in loaders()))
    cache.detach()
    assert_same(trace, plain)
    assert scores == plain_scores
    assert cache.report.replayed == cache.report.batches == 15 + 5 * 3


def test_a_validation_loader_under_no_grad(library: Library) -> None:
    model, plain = net().eval(), net().eval()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Counted(), shuffle=False))
    with torch.no_grad():
        for _ in range(2):
            for (x, y), (a, b) in zip(loader, seeded_loader(Counted(), shuffle=False), strict=True):
                assert torch.equal(y, b)
                torch.testing.assert_close(model(x), plain(a), rtol=1e-5, atol=1e-6)
    cache.detach()
    assert cache.report.replayed == 10


def test_accumulated_gradients(library: Library) -> None:
    def run(model: nn.Module, loader: Any) -> list[Tensor]:
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for _ in range(3):
            for number, batch in enumerate(loader):
                (pair(model, batch)[0] / 2).backward()
                if number % 2:
                    found += [p.grad.clone() for p in model.head.parameters()]
                    optimizer.step()
                    optimizer.zero_grad()
        return found

    plain = run(net(), seeded_loader(Counted()))
    model = net()
    cache = cached(library, model=model)
    torch.testing.assert_close(run(model, cache.loader(seeded_loader(Counted()))), plain,
                               rtol=1e-5, atol=5e-6)  # fmt: skip
    cache.detach()


def test_autocast_around_the_forward_pass(library: Library) -> None:
    """bfloat16 rounds by the company of a sample, so losses agree to its precision only."""

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(batch[0])
        assert scores.dtype == torch.bfloat16
        return nn.functional.cross_entropy(scores.float(), batch[1]), batch[1]

    plain = train(net(), seeded_loader(Counted()), step)
    model = net()
    cache = cached(library, model=model)
    mine = train(model, cache.loader(seeded_loader(Counted())), step)
    torch.testing.assert_close(mine.losses, plain.losses, rtol=2e-2, atol=2e-2)
    assert cache.report.replayed == 15
    train(model, cache.loader(seeded_loader(Counted())), epochs=1)  # and without: other rows
    assert cache.report.filled_rows == 2 * SAMPLES
    cache.detach()


def test_a_model_inside_another(library: Library) -> None:
    def make() -> nn.Sequential:
        inner = net()
        torch.manual_seed(1)
        return nn.Sequential(inner, nn.Linear(CLASSES, CLASSES))

    plain = train(make(), seeded_loader(Counted()))
    for whole in (False, True):
        model = make()
        cache = cached(library, model=model if whole else model[0])
        assert_same(train(model, cache.loader(seeded_loader(Counted()), name="x")), plain)
        cache.detach()
        assert cache.report.replayed == 15


def test_two_models_share_a_loader(library: Library) -> None:
    def step(other: nn.Module) -> Step:
        def both_models(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = batch
            wanted = other(x).softmax(1)
            return nn.functional.cross_entropy(model(x), y) + (model(x) * wanted).mean(), y

        return both_models

    plain = train(net(), seeded_loader(Counted()), step(net(9)))
    model, other = net(), net(9)
    cache, its_own = cached(library, model=model), cached(library, model=other)
    loader = cache.loader(seeded_loader(Counted()))
    its_own.attach()
    assert_same(train(model, loader, step(other)), plain)
    assert cache.report.replayed == 30
    assert its_own.report.replayed == 15
    cache.detach()
    its_own.detach()


def test_the_model_can_be_copied_and_saved_while_attached(library: Library) -> None:
    model, plain = net(), net()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Counted()))
    for x, _ in loader:
        model(x)
    assert list(model.state_dict()) == list(plain.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    twin = copy.deepcopy(model)
    before = cache.report.batches
    for x, _ in loader:
        torch.manual_seed(0)
        mine = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(twin(x), mine, rtol=1e-5, atol=1e-6)
    assert cache.report.batches == before + 5
    cache.detach()
    assert "forward" not in vars(model)
    assert twin.forward.__self__ is twin


class Trap(nn.Module):
    """Fails when told to."""

    error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error("now")
        return x


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_forward_pass(error: type[BaseException], library: Library) -> None:
    def run(model: nn.Module, loader: Any) -> Trace:
        model.head = nn.Sequential(model.head, Trap())
        train(model, loader, epochs=1)
        for number, batch in enumerate(loader):
            model.head[1].error = error if number == 3 else None
            if number == 3:
                with pytest.raises(error, match="now"):
                    pair(model, batch)
                break
            pair(model, batch)
        model.head[1].error = None
        return train(model, loader, epochs=2)

    plain = run(net(), seeded_loader(Counted()))
    model = net()
    cache = cached(library, model=model)
    mine = run(model, cache.loader(seeded_loader(Counted())))
    cache.detach()
    assert_same(mine, plain)
    assert cache.report.replayed == 5 + 3 + 10


def test_leaving_an_epoch_early(library: Library) -> None:
    model, plain = net(), net()
    cache = cached(library, model=model)
    mine, theirs = cache.loader(seeded_loader(Counted())), seeded_loader(Counted())
    found = []
    for m, loader in ((model, mine), (plain, theirs)):
        torch.manual_seed(2)
        found.append([])
        for _ in range(3):
            for number, batch in enumerate(loader):
                found[-1].append(pair(m, batch)[0].detach())
                if number == 2:
                    break
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    cache.detach()


def test_after_detaching_batches_are_plain(library: Library) -> None:
    model = net()
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Counted()))
    with cache.attached():
        train(model, loader, epochs=1)
    assert all(type(x) is Tensor for x, _ in loader)
    assert "forward" not in vars(model)
    assert_same(train(net(), loader), train(net(), seeded_loader(Counted())), exact=True)


def test_detaching_in_the_middle_of_an_epoch(library: Library) -> None:
    model = net()
    cache = cached(library, model=model)
    for number, (x, y) in enumerate(cache.loader(seeded_loader(Counted()))):
        if number == 2:
            cache.detach()
        assert model(x).shape == (len(y), CLASSES)
        assert (type(x) is Tensor) == (number > 2)


def test_trainers_find_what_they_read_of_a_loader(library: Library) -> None:
    class Told(Sampler[int]):
        epoch = -1

        def __len__(self) -> int:
            return SAMPLES

        def __iter__(self) -> Iterator[int]:
            return iter(range(SAMPLES))

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler, data = Told(), Counted()
    plain = seeded_loader(data, shuffle=False, sampler=sampler)
    loader = cached(library, model=net()).loader(plain)
    assert len(loader) == len(plain)
    assert loader.dataset is data
    assert (loader.batch_size, loader.sampler, loader.drop_last) == (16, sampler, False)
    loader.set_epoch(4)
    assert sampler.epoch == 4
    with pytest.raises(AttributeError, match="colour"):
        loader.colour  # noqa: B018


def test_a_data_parallel_model_is_refused() -> None:
    with pytest.raises(FrontierError, match="DistributedDataParallel"):
        FrontierCache(nn.DataParallel(net()))


def test_a_loader_that_iterates_by_itself_is_refused(library: Library) -> None:
    with pytest.raises(FrontierError, match="DataLoader"):
        cached(library, model=net()).loader([1, 2])  # type: ignore[arg-type]


def test_a_model_called_by_another_method_is_said_to_be_uncached(library: Library) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        stem = model.stem(batch[0])
        return nn.functional.cross_entropy(model.head(model.middle(stem)), batch[1]), batch[1]

    cache = both(library, Counted, step, exact=True)
    assert any("no batch reached" in note for note in cache.report.notes)


def test_a_hugging_face_model_with_labels_in_the_batch(library: Library) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = BertForSequenceClassification(
            BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=64, num_labels=CLASSES, max_position_embeddings=32)
        )  # fmt: skip
        model.train()
        frostline.freeze(model, "bert.embeddings* | bert.encoder.layer.0.*")
        return model

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        batch = {key: value.to("cpu") for key, value in batch.items()}
        return model(**batch).loss, batch["labels"]

    def gather(samples: list[Any]) -> dict[str, Tensor]:
        found = pad(samples)
        return {"input_ids": found["ids"], "attention_mask": found["mask"].long(),
                "labels": found["labels"]}  # fmt: skip

    cache = both(library, Texts, step, make=make, collate_fn=gather)
    # A batch in which nothing is padded goes another way through the model.
    assert cache.report.replayed >= 10


RANK = """
import sys
sys.path[:0] = {paths!r}
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from frontier.test_loader import Counted, net, seeded_loader
import frostline
from frostline.frontier.library import Library

rank, world, use = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4] == "cached"
torch.distributed.init_process_group(
    "gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
model = DistributedDataParallel(net())
data = Counted()
sampler = DistributedSampler(data, world, rank, seed=1)
loader = seeded_loader(data, batch_size=5, shuffle=False, sampler=sampler)
if use:
    cache = frostline.FrontierCache(model, Library(sys.argv[5]), min_gain=-1e9)
    loader = cache.loader(loader)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
torch.manual_seed(rank)
losses = []
for epoch in range(2):
    sampler.set_epoch(epoch)
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
report = vars(cache) and cache.report if use else None
print("RESULT", repr((losses, [p.sum().item() for p in model.parameters()],
      (report.filled_rows, report.replayed, report.batches) if use else None)))
torch.distributed.destroy_process_group()
"""


def distributed(place: Path, world: int, kind: str) -> list[Any]:
    paths = [str(Path(__file__).parents[1])]
    rendezvous = place / f"meet-{world}-{kind}-{len(list(place.iterdir()))}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(paths=paths), str(rank), str(world),
             str(rendezvous), kind, str(place / "stores")],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    results = []
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        results.append(eval(out.partition("RESULT ")[2]))  # noqa: S307  our own numbers
    return results


@pytest.mark.slow
def test_processes_that_train_together_share_their_rows(tmp_path: Path) -> None:
    plain, shared = distributed(tmp_path, 2, "plain"), distributed(tmp_path, 2, "cached")
    for (losses, sums, _), (mine, its, _) in zip(plain, shared, strict=True):
        np.testing.assert_allclose(mine, losses, rtol=1e-5)
        np.testing.assert_allclose(its, sums, rtol=1e-5, atol=1e-5)
    for _, _, (_, replayed, batches) in shared:
        assert replayed == batches == 16
    for world in (1, 3):
        again = distributed(tmp_path, world, "cached")
        assert [counts[0] for *_, counts in again] == [0] * world
        alone = distributed(tmp_path, world, "plain")
        for (losses, *_), (mine, *_) in zip(alone, again, strict=True):
            np.testing.assert_allclose(mine, losses, rtol=1e-5)
