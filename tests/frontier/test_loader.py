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
    TensorDataset,
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


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "stores")


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


CALLS = {
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
    calls = 30 if how == "two calls in a step" else 15
    assert cache.report.replayed == cache.report.batches == calls
    assert cache.report.filled_rows == SAMPLES * (2 if calls == 30 else 1)


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


CHANGES = [doubled, doubled_in_place, written_through_a_view, written_through_data,
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
            return nn.functional.cross_entropy(model(x, scale=1.0 + next(steps)), y), y

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


def reader() -> Reader:
    torch.manual_seed(0)
    model = Reader()
    frostline.freeze(model, "embed* | mix*")
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
    epochs = []
    with torch.no_grad():
        for _ in range(5):
            epochs.append(torch.cat([model(x) for x, _ in loader]))
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
