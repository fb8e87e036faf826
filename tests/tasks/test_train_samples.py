"""Fewer training samples by one setting: stratified, seeded, nested, and known to the cache."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline.errors import ConfigError, DataError
from frostline.tasks.caching import SplitSource
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.data import Data, nested_order, read_data
from frostline.tasks.prepare import _data_facts
from frostline.tasks.run import Run
from frostline.tasks.task import load_task
from tiny_task import RUN

TINY: dict[str, Any] = RUN | {"device": "cpu"}


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def seats(sizes: dict[str, int], total: int) -> Counter[str]:
    """How many samples of each class a subset holds: seats given one by one, by Sainte-Lague."""
    seated = Counter(dict.fromkeys(sizes, 1))
    while seated.total() < total:
        left = [name for name in sizes if seated[name] < sizes[name]]
        # A class of N with k seats has the claim N / (2k + 1) to the next one.
        claims = {name: Fraction(sizes[name], 2 * seated[name] + 1) for name in left}
        best = max(claims.values())
        seated[next(name for name in left if claims[name] == best)] += 1
    return seated


classes = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 12), min_size=2)


@given(classes, st.integers(0, 2**32 - 1))
def test_every_subset_is_stratified_and_holds_the_smaller_ones(sizes: dict[str, int], seed: int):
    labels = [name for name, count in sizes.items() for _ in range(count)]
    random.Random(seed).shuffle(labels)
    order = nested_order(labels, seed=seed)
    assert sorted(order) == list(range(len(labels)))
    for total in range(len(sizes), len(labels) + 1):
        found = Counter(labels[i] for i in order[:total])
        # Classes with equal claims may come in either order; what they have claimed is the same.
        last = [Fraction(2 * found[n] - 1, sizes[n]) for n in sizes if found[n] > 1]
        following = [Fraction(2 * found[n] + 1, c) for n, c in sizes.items() if found[n] < c]
        assert not last or not following or max(last) <= min(following)
        assert min(found[name] for name in sizes) >= 1
        claims = [Fraction(c, 2 * k + 1) for c in sizes.values() for k in range(1, c)]
        if len(set(claims)) == len(claims):
            assert found == seats(sizes, total)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_shares_are_those_of_the_whole(a: int, b: int, c: int, seed: int):
    labels = ["a"] * a + ["b"] * b + ["c"] * c
    order = nested_order(labels, seed=seed)
    for total in range(3, len(labels) + 1):
        found = Counter(labels[i] for i in order[:total])
        for name, count in {"a": a, "b": b, "c": c}.items():
            # One of each class is more than its share of a few; beyond that less than two off.
            exact = count * total / len(labels)
            assert found[name] == 1 or abs(found[name] - exact) < 2


def test_another_seed_draws_other_samples():
    labels = ["a", "b"] * 50
    first, again, other = (nested_order(labels, seed=seed)[:20] for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)


def test_samples_of_a_class_are_drawn_evenly():
    drawn = Counter(i for seed in range(400) for i in nested_order(list("aaaabbbb"), seed=seed)[:2])
    assert sorted(drawn) == list(range(8))
    assert min(drawn.values()) > 60  # 100 expected, 9 the standard deviation


# -- reading ---------------------------------------------------------------------------------------


def moods(folder: Path, count: int = 60) -> Path:
    file = folder / "moods.csv"
    rows = [f"text {i},{'up' if i % 3 else 'down'}\n" for i in range(count)]
    file.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    return file


def read(file: Path, **settings: Any) -> Data:
    return read_data(RunConfig(model="hf:any", data=str(file), **settings))


def test_only_training_samples_are_left_out(tmp_path: Path):
    file = moods(tmp_path)
    whole = read(file)
    parts = [read(file, train_samples=count) for count in (6, 12, 24)]
    kept = [set(part.splits["train"].inputs) for part in parts]
    assert kept[0] < kept[1] < kept[2] < set(whole.splits["train"].inputs)
    assert [len(part.splits["train"].labels) for part in parts] == [6, 12, 24]
    for part in parts:
        assert part.labels == whole.labels
        assert all(part.splits[name] == whole.splits[name] for name in ("val", "test"))
        places = [whole.splits["train"].inputs.index(x) for x in part.splits["train"].inputs]
        assert places == sorted(places)  # in the order in which they came
    assert Counter(parts[1].splits["train"].labels) == {"up": 8, "down": 4}


def test_what_was_kept_is_recorded(tmp_path: Path):
    notes = read(moods(tmp_path), train_samples=12, seed=7).notes
    assert notes["samples"]["train"] == 12
    assert notes["split_from"]["train"] == "data; 12 of 42, stratified, seed 7"
    assert notes["classes"] == {"down": 4, "up": 8}


@pytest.mark.parametrize("count", [42, 43, 10**6, None])
def test_as_many_as_there_are_is_all_of_them(tmp_path: Path, count: int | None):
    file = moods(tmp_path)
    assert read(file, train_samples=count) == read(file)


def test_less_than_one_of_each_class_is_refused(tmp_path: Path):
    file = tmp_path / "three.csv"
    rows = [f"text {i},{'abc'[i % 3]}\n" for i in range(60)]
    file.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    with pytest.raises(DataError, match="train_samples=3 or more"):
        read(file, train_samples=2)
    assert set(read(file, train_samples=3).splits["train"].labels) == set("abc")


@pytest.mark.parametrize("count", [1, 0, -5, True, 2.5, "many"])
def test_a_number_that_is_none_is_refused(count: Any):
    with pytest.raises(ConfigError, match="train_samples"):
        load_config(None, {"model": "m", "data": "d", "train_samples": count})


# -- identity --------------------------------------------------------------------------------------


def test_a_subset_is_other_data_to_cache_and_resume():
    tasks = [load_task(load_config(None, TINY | {"train_samples": n})) for n in (12, 24, None)]
    keys = [SplitSource(t, t.train, "train", views=1, augmented=False).data for t in tasks]
    facts = [_data_facts(t)["train"] for t in tasks]
    assert len(set(keys)) == 3
    assert [f["samples"] for f in facts] == [12, 24, 49]
    assert [f["content_sha256"] for f in facts] == keys
    vals = {SplitSource(t, t.val, "val", views=1, augmented=False).data for t in tasks}
    assert len(vals) == 1


def test_another_number_of_samples_is_another_run(tmp_path: Path):
    frostline.fit(**TINY, train_samples=12, output=tmp_path / "run", pause_after=1)
    with pytest.raises(ConfigError, match="train_samples=12"):
        frostline.fit(**TINY, train_samples=24, output=tmp_path / "run")
    done = frostline.fit(**TINY, train_samples=12, output=tmp_path / "run")
    assert done.summary["steps"] == 3


def losses(run: Run) -> list[float]:
    return [m[name] for m in run.metrics for name in ("train_loss", "val_loss", "val_accuracy")]


def test_stored_outputs_of_one_subset_are_not_taken_for_those_of_another(tmp_path: Path):
    stores = tmp_path / "stores"
    for count in (24, 12, 49):
        settings = TINY | {"train_samples": count, "augment": "none"}
        cached = frostline.fit(
            **settings, cache="on", cache_dir=stores, output=tmp_path / f"cached {count}"
        )
        plain = frostline.fit(**settings, cache="off", output=tmp_path / f"plain {count}")
        assert cached.summary["cache"]["replayed"] > 0
        assert losses(cached) == pytest.approx(losses(plain), rel=2e-4)
