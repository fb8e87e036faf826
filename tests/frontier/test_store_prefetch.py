"""Reading ahead: in order, never too far, and every end is clean."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from faulty_disk import QuickDisk, use_disk
from frostline.errors import FrontierError
from frostline.frontier.prefetch import Prefetcher
from frostline.frontier.store import Column, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with use_disk(QuickDisk()):
        store = Store(tmp_path, [Column("x", "float32")], rows=320, seed=b"k")
        for first in range(0, 320, 32):
            rows = np.arange(first, first + 32, dtype=np.float32)
            store.write(first, {"x": np.repeat(rows[:, None], 10, 1)})
        yield store
        store.close()


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "frostline-prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_batches_come_in_order(store: Store, depth: int):
    random = np.random.default_rng(0)
    asked = [random.integers(0, 320, n) for n in (5, 0, 32, 1, 100)]
    with Prefetcher(store, iter(asked), depth=depth) as batches:
        seen = list(batches)
        assert list(batches) == []
    assert [rows.tolist() for rows, _ in seen] == [rows.tolist() for rows in asked]
    for rows, (values, ok) in seen:
        assert ok.all()
        assert (values["x"] == rows[:, None]).all()
    assert threads() == []


def test_no_more_than_depth_batches_are_read_ahead(store: Store):
    taken, waiting = [], threading.Event()

    def source() -> Iterator[np.ndarray]:
        for i in range(20):
            taken.append(i)
            if i == 3:
                waiting.set()
            yield np.array([i])

    with Prefetcher(store, source(), depth=3) as batches:
        assert waiting.wait(10)
        assert len(taken) == 4  # three ready, one waiting for room
        next(batches)
    assert len(taken) <= 6
    assert threads() == []


def test_what_goes_wrong_is_raised_in_its_place(store: Store):
    asked = [np.array([1]), np.array([2]), np.array([9999]), np.array([3])]
    with Prefetcher(store, asked) as batches:
        assert next(batches)[0].tolist() == [1]
        assert next(batches)[0].tolist() == [2]
        with pytest.raises(FrontierError):
            next(batches)
        assert list(batches) == []

    def source() -> Iterator[np.ndarray]:
        yield np.array([1])
        raise KeyError("from the source")

    with Prefetcher(store, source()) as batches:
        next(batches)
        with pytest.raises(KeyError, match="from the source"):
            next(batches)
    assert threads() == []


def test_leaving_early_stops_the_thread(store: Store):
    endless = itertools.repeat(np.array([1, 2]))
    with Prefetcher(store, endless) as batches:
        next(batches)
    assert threads() == []
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_a_forgotten_reader_stops_by_itself(store: Store):
    batches = Prefetcher(store, itertools.repeat(np.array([1, 2])))
    next(batches)
    (thread,) = threads()
    del batches
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_lengths_are_passed_on(tmp_path: Path):
    with use_disk(QuickDisk()):
        store = Store(tmp_path, [Column("t", "float32", ragged=True)], rows=32, seed=b"k")
        store.write(0, {"t": np.ones((32, 4, 2), np.float32)})
        with Prefetcher(store, [np.arange(3)], lengths={"t": 6}) as batches:
            ((_, (values, ok)),) = list(batches)
        assert ok.all()
        assert values["t"].shape == (3, 6, 2)
        store.close()
