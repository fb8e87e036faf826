"""The loader of cached batches over data sets, samplers and workers as people combine them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, WeightedRandomSampler, get_worker_info

from frontier.test_loader import (
    CLASSES,
    SAMPLES,
    WIDTH,
    Counted,
    Noisy,
    both,
    cached,
    net,
    seeded_loader,
    train,
)
from frostline.frontier.library import Library
from frostline.frontier.views import Views


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "frostline")


def by_class(draws: int = SAMPLES) -> WeightedRandomSampler:
    """Samples of a rare class as often as those of a frequent one."""
    labels = Counted().y
    weights = 1.0 / torch.bincount(labels, minlength=CLASSES)[labels].double()
    return WeightedRandomSampler(weights.tolist(), draws)


@pytest.mark.parametrize(("workers", "drop_last"), [(0, False), (2, True)])
def test_a_class_weighted_sampler(workers: int, drop_last: bool, library: Library) -> None:
    """Some samples come twice in an epoch and others never; each is computed once."""
    cache = both(library, Counted, shuffle=False, sampler=by_class(), drop_last=drop_last,
                 num_workers=workers)  # fmt: skip
    assert cache.report.replayed == cache.report.batches == (12 if drop_last else 15)
    assert cache.report.filled_rows == SAMPLES


def test_a_sampler_of_more_draws_than_samples(library: Library) -> None:
    cache = both(library, Counted, shuffle=False, sampler=by_class(3 * SAMPLES + 7), epochs=2)
    assert cache.report.replayed == cache.report.batches == 30
    assert cache.report.filled_rows == SAMPLES


def test_views_made_by_workers(library: Library) -> None:
    """The same as those made in this process, and none is computed twice."""
    traces = []
    for workers in (0, 2):
        model = net()
        cache = cached(Library(library.root.parent / str(workers)), model=model)
        loader = cache.loader(
            seeded_loader(Noisy(), shuffle=False, num_workers=workers), views=Views(2)
        )
        traces.append(train(model, loader, epochs=4))
        cache.detach()
        assert cache.report.filled_rows == 2 * SAMPLES
        assert any("in 2 augmented views" in note for note in cache.report.notes)
        assert any(note.endswith("bytes per sample, in 2 views") for note in cache.report.notes)
    for one, other in zip(*(trace.losses for trace in traces), strict=True):
        assert torch.equal(one, other)


# -- Hugging Face data sets -----------------------------------------------------------------------


def rows() -> dict[str, Any]:
    data = Counted()
    return {"x": data.x.tolist(), "label": data.y.tolist(), "name": [f"n{i}" for i in range(75)]}


def by_column(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    assert batch["x"].shape[1:] == (WIDTH,)
    assert all(name.startswith("n") for name in batch["name"])
    return nn.functional.cross_entropy(model(batch["x"]), batch["label"]), batch["label"]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_hugging_face_data_set(workers: int, library: Library) -> None:
    datasets = pytest.importorskip("datasets")

    def data() -> Any:
        return datasets.Dataset.from_dict(rows()).with_format("torch")

    cache = both(library, data, by_column, shuffle=False, sampler=by_class(), drop_last=True,
                 num_workers=workers)  # fmt: skip
    assert cache.report.replayed == cache.report.batches == 12
    # Known by content: a later process finds what this one has stored.
    again = both(library, data, by_column, num_workers=workers)
    assert again.report.filled_rows == 0
    assert again.report.found_rows == SAMPLES


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_hugging_face_stream(workers: int, library: Library) -> None:
    datasets = pytest.importorskip("datasets")

    def data() -> Any:
        whole = datasets.Dataset.from_dict(rows())
        return whole.to_iterable_dataset(num_shards=4).with_format("torch")

    cache = both(library, data, by_column, shuffle=False, num_workers=workers, drop_last=True,
                 wrap={"stable_order": True})  # fmt: skip
    assert cache.report.replayed == cache.report.batches


class Shared(IterableDataset):
    """A stream whose workers each give a share of the samples."""

    def __iter__(self) -> Iterator[Any]:
        data, info = Counted(), get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (data[i] for i in range(start, SAMPLES, step))


@pytest.mark.parametrize("drop_last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_stream_with_workers(drop_last: bool, library: Library) -> None:
    """Without `samples=`: they are counted by going through the stream once."""
    cache = both(library, Shared, shuffle=False, num_workers=2, drop_last=drop_last,
                 wrap={"stable_order": True})  # fmt: skip
    assert cache.report.replayed == cache.report.batches
    assert cache.report.filled_rows == (64 if drop_last else SAMPLES)
