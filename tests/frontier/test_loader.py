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
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
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
