"""Training on stored outputs of frozen layers: the same run, with less work."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline.backends.torch.checkpoint import checkpoint_folders
from frostline.errors import ConfigError, DataError
from frostline.frontier.cache import BLOCK
from frostline.tasks import caching, image
from frostline.tasks.caching import SplitSource, build_cache
from frostline.tasks.config import load_config
from frostline.tasks.image import ImagePreparation
from frostline.tasks.order import views_of
from frostline.tasks.run import Run
from frostline.tasks.task import Task, load_task
from run_bits import run_bits
from tasks.conftest import write_table
from tiny_task import RUN

IMAGE: dict[str, Any] = RUN | {"epochs": 4, "device": "cpu", "cache": "on"}
TRAIN, VAL = 49, 12


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """A folder of stored outputs that no other test uses."""
    return tmp_path / "stores"


def results(run: Run) -> dict[str, list[float]]:
    keys = ("train_loss", "val_loss", "val_accuracy")
    found = {key: [float(m[key]) for m in run.metrics] for key in keys}
    return found | {"test": [run.summary["test_loss"], run.summary["test_accuracy"]]}


def assert_alike(one: Run, other: Run) -> None:
    """Equal but for what the company of other samples does to rounding."""
    for key, values in results(one).items():
        assert values == pytest.approx(results(other)[key], rel=2e-4), key
    assert one.summary["steps"] == other.summary["steps"]


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts pictures that are opened; a zero is added by `mark`."""
    seen = [0]
    opened = image.open_picture

    def count(raw: Any) -> Any:
        seen[-1] += 1
        return opened(raw)

    monkeypatch.setattr(image, "open_picture", count)
    return seen


def mark(seen: list[int]) -> Any:
    """Starts another count at the end of each epoch."""

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch":
            seen.append(0)

    return on_event


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


# -- the same run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"augment": "none"},
        {"augment": "basic", "views": 3},
        {"accumulate": 2, "class_weights": "balanced"},
        {"policy": "gradual:every=2ep"},
        {"policy": "train-only:select=last 2 groups"},
        {"precision": "bf16"},
    ],
    ids=lambda change: "-".join(map(str, change.values())) or "plain",
)
def test_pictures_train_alike_with_and_without(tmp_path: Path, stores: Path, change: Any):
    settings = IMAGE | change
    plain = frostline.fit(**settings | {"cache": "off"}, output=tmp_path / "plain")
    cached = frostline.fit(**settings, cache_dir=stores, output=tmp_path / "cached")
    if change.get("precision") == "bf16":
        assert results(plain)["train_loss"] == pytest.approx(
            results(cached)["train_loss"], rel=2e-2
        )
    else:
        assert_alike(plain, cached)
    costs = cached.summary["cache"]
    assert costs["replayed"] > 0
    assert costs["filled_rows"] > 0


@pytest.mark.parametrize("policy", ["linear-probe", "train-only:select=last 2 groups"])
def test_texts_train_alike_with_and_without(tmp_path: Path, stores: Path, tiny_bert, policy: str):
    settings = IMAGE | {
        "model": f"hf:{tiny_bert}",
        "weights": "pretrained",
        "data": write_table(tmp_path / "moods.csv", 60),
        "policy": policy,
        "epochs": 3,
    }
    plain = frostline.fit(**settings | {"cache": "off"}, output=tmp_path / "plain")
    cached = frostline.fit(**settings, cache_dir=stores, output=tmp_path / "cached")
    assert_alike(plain, cached)
    assert cached.summary["cache"]["replayed"] > 0


def test_gradual_unfreezing_fills_less_and_less(tmp_path: Path, stores: Path):
    """Every other epoch has another region; all are found again by a second run."""
    settings = IMAGE | {"policy": "gradual:every=2ep", "augment": "none", "epochs": 5}
    plain = frostline.fit(**settings | {"cache": "off"}, output=tmp_path / "plain")
    cached = frostline.fit(**settings, cache_dir=stores, output=tmp_path / "cached")
    assert_alike(plain, cached)
    notes = cached.summary["cache"]["notes"]
    assert sum(note.startswith("cached for train") for note in notes) >= 2
    again = frostline.fit(**settings, cache_dir=stores, output=tmp_path / "again")
    assert again.summary["cache"]["filled_rows"] == 0
    assert results(again) == results(cached)


# -- less work -------------------------------------------------------------------------------------


def test_pictures_are_not_decoded_in_later_epochs(tmp_path, stores, monkeypatch):
    seen = decoded(monkeypatch)
    frostline.fit(
        **IMAGE | {"augment": "none"},
        cache_dir=stores, output=tmp_path / "run", on_event=mark(seen),
    )  # fmt: skip
    first, *later, test = seen[:5]
    assert first >= TRAIN + VAL
    # What remains are comparisons of a few samples with the full forward pass.
    assert sum(later) + 0 * test <= 3 * 4
    monkeypatch.undo()
    without = decoded(monkeypatch)
    frostline.fit(
        **IMAGE | {"augment": "none", "cache": "off"},
        output=tmp_path / "other", on_event=mark(without),
    )  # fmt: skip
    assert without[1:4] == [TRAIN + VAL] * 3


def test_two_views_are_filled_in_two_epochs(tmp_path, stores, monkeypatch):
    seen = decoded(monkeypatch)
    run = frostline.fit(**IMAGE, cache_dir=stores, output=tmp_path / "run", on_event=mark(seen))
    first, second, third, fourth, _ = seen[:5]
    assert min(first, second) >= TRAIN
    assert third + fourth <= 2 * 4
    assert run.summary["cache"]["filled_rows"] == 2 * TRAIN + VAL


def test_a_second_run_fills_nothing_and_is_the_same(tmp_path: Path, stores: Path):
    first = frostline.fit(**IMAGE, cache_dir=stores, output=tmp_path / "first")
    before = files(stores)
    second = frostline.fit(**IMAGE | {"epochs": 3}, cache_dir=stores, output=tmp_path / "second")
    assert second.summary["cache"]["filled_rows"] == 0
    assert second.summary["cache"]["found_rows"] == first.summary["cache"]["filled_rows"] > 0
    assert first.summary["cache"]["found_rows"] == 0
    assert second.summary["cache"]["replayed"] == second.summary["cache"]["batches"]
    assert files(stores) == before
    third = frostline.fit(**IMAGE, cache_dir=stores, output=tmp_path / "third")
    assert results(third) == results(first)


def test_other_learning_rates_and_heads_share_what_is_stored(tmp_path: Path, stores: Path):
    frostline.fit(**IMAGE, cache_dir=stores, output=tmp_path / "first")
    other = frostline.fit(
        **IMAGE | {"lr": 0.1, "batch_size": 8, "epochs": 2, "optimizer": "sgd"},
        cache_dir=stores, output=tmp_path / "second",
    )  # fmt: skip
    assert other.summary["cache"]["filled_rows"] == 0


def test_other_data_shares_nothing(tmp_path: Path, stores: Path):
    frostline.fit(**IMAGE, cache_dir=stores, output=tmp_path / "first")
    other = frostline.fit(
        **IMAGE | {"data": "tiny_task:noise_data"}, cache_dir=stores, output=tmp_path / "second"
    )
    assert other.summary["cache"]["filled_rows"] > 0


def test_off_writes_nothing_and_reports_nothing(tmp_path: Path, stores: Path):
    run = frostline.fit(**IMAGE | {"cache": "off"}, cache_dir=stores, output=tmp_path / "run")
    assert files(stores) == []
    assert "cache" not in run.summary or run.summary["cache"] is None


def test_a_policy_that_freezes_nothing_stores_nothing(tmp_path: Path, stores: Path):
    settings = IMAGE | {"policy": "full", "epochs": 1}
    run = frostline.fit(**settings, cache_dir=stores, output=tmp_path / "run")
    assert run.summary["cache"]["replayed"] == 0
    assert not [name for name in files(stores) if name.endswith(".rows")]
    plain = frostline.fit(**settings | {"cache": "off"}, output=tmp_path / "plain")
    assert results(run) == results(plain)


def test_a_full_budget_costs_time_and_nothing_else(tmp_path: Path, stores: Path):
    plenty = frostline.fit(**IMAGE, cache_dir=stores, output=tmp_path / "plenty")
    little = frostline.fit(
        **IMAGE, cache_dir=tmp_path / "little", cache_limit_gib=1e-7, output=tmp_path / "run"
    )
    assert_alike(plenty, little)
    rows = [p for p in (tmp_path / "little").rglob("*.rows") if p.is_file()]
    assert sum(p.stat().st_blocks * 512 for p in rows) <= 8192


def test_auto_leaves_out_what_saves_little(tmp_path: Path, stores: Path, monkeypatch):
    from frostline.tasks import caching

    monkeypatch.setattr(caching, "_AUTO_GAIN", 0.99)
    run = frostline.fit(
        **IMAGE | {"cache": "auto", "epochs": 1}, cache_dir=stores, output=tmp_path / "auto"
    )
    assert run.summary["cache"]["replayed"] == 0
    forced = frostline.fit(**IMAGE | {"epochs": 1}, cache_dir=stores, output=tmp_path / "on")
    assert forced.summary["cache"]["replayed"] > 0


def test_new_views_in_each_epoch_are_not_cached_in_training(tmp_path, stores, caplog):
    caplog.set_level("INFO")
    settings = IMAGE | {"augment": "basic", "epochs": 2}
    run = frostline.fit(**settings, cache_dir=stores, output=tmp_path / "run")
    assert "not cached in training: a new view" in caplog.text
    assert run.summary["cache"]["filled_rows"] == VAL
    plain = frostline.fit(**settings | {"cache": "off"}, output=tmp_path / "plain")
    assert_alike(plain, run)


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "int8"])
def test_rounded_stores_train_nearly_alike(tmp_path: Path, stores: Path, encoding: str):
    plain = frostline.fit(**IMAGE | {"cache": "off"}, output=tmp_path / "plain")
    rounded = frostline.fit(
        **IMAGE, cache_dtype=encoding, cache_dir=stores, output=tmp_path / "run"
    )
    assert rounded.summary["cache"]["replayed"] > 0
    assert results(rounded)["train_loss"] == pytest.approx(results(plain)["train_loss"], rel=0.05)
    assert results(rounded)["train_loss"] != results(plain)["train_loss"]


# -- workers, costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["linear-probe", "gradual:every=2ep"])
def test_workers_change_nothing(tmp_path: Path, policy: str):
    runs = [
        frostline.fit(
            **IMAGE | {"policy": policy, "epochs": 3, "workers": workers},
            cache_dir=tmp_path / f"stores{workers}", output=tmp_path / str(workers),
        )
        for workers in (0, 2)
    ]  # fmt: skip
    assert results(runs[0]) == results(runs[1])
    bits = [
        {p.name: p.read_bytes() for p in (tmp_path / f"stores{n}").rglob("*.rows") if p.is_file()}
        for n in (0, 2)
    ]
    assert bits[0] == bits[1]
    counts = [{k: v for k, v in run.summary["cache"].items() if isinstance(v, int)} for run in runs]
    assert counts[0] == counts[1]


def test_the_summary_says_what_the_cache_did_and_cost(tmp_path: Path, stores: Path):
    run = frostline.fit(**IMAGE, cache_dir=stores, output=tmp_path / "run")
    costs = run.summary["cache"]
    assert costs.keys() == {
        "batches", "replayed", "found_rows", "filled_rows", "read_rows", "checked",
        "fill_s", "computed_rows", "compute_s", "find_s", "check_s", "read_s", "stored_bytes",
        "notes",
    }  # fmt: skip
    assert costs["batches"] == costs["replayed"] == 4 * (3 + 1)
    assert costs["read_rows"] == 4 * (TRAIN + VAL)
    assert costs["filled_rows"] == 2 * TRAIN + VAL
    assert costs["checked"] >= 2
    assert costs["stored_bytes"] > 0
    assert all(costs[name] >= 0 for name in ("fill_s", "find_s", "check_s", "read_s"))
    assert any("cached for train" in note for note in costs["notes"])
    assert "cached for train" in (run.path / "log.txt").read_text()
    json.dumps(costs)


# -- augmentation in feature space ---------------------------------------------------------------


def test_feature_augmentation_changes_training_by_seed_alone(tmp_path: Path, stores: Path):
    def fit(name: str, **change: Any) -> dict[str, list[float]]:
        settings = {**IMAGE, "epochs": 2, "augment": "none", **change}
        return results(frostline.fit(**settings, cache_dir=stores, output=tmp_path / name))

    plain = fit("plain")
    noisy = fit("noisy", feature_augment="noise=0.5")
    assert noisy["train_loss"] != plain["train_loss"]
    assert fit("again", feature_augment="noise=0.5") == noisy
    assert fit("batches", feature_augment="noise=0.5", workers=1) == noisy
    other = fit("other", feature_augment="noise=0.1")
    assert other["train_loss"] != noisy["train_loss"]


def test_evaluation_is_without_feature_augmentation(tmp_path: Path, stores: Path):
    """At a learning rate of nothing, only the training loss differs."""
    still = {**IMAGE, "lr": 1e-30, "head_lr": 1e-30, "epochs": 1, "weight_decay": 0.0}
    plain = frostline.fit(**still, cache_dir=stores, output=tmp_path / "plain")
    noisy = frostline.fit(
        **still, feature_augment="noise=0.9", cache_dir=stores, output=tmp_path / "noisy"
    )
    assert results(noisy)["train_loss"] != results(plain)["train_loss"]
    assert results(noisy)["val_loss"] == results(plain)["val_loss"]


def test_feature_augmentation_without_a_cache_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cached outputs"):
        frostline.fit(
            **IMAGE | {"cache": "off"}, feature_augment="noise=0.5", output=tmp_path / "run"
        )


# -- interrupted -----------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            raise Stop

    return on_event


MOVING: dict[str, Any] = IMAGE | {
    "policy": "gradual:every=7st",
    "batch_size": 8,
    "checkpoint_every": "2st",
    "optimizer_state": "release",
    "feature_augment": "noise=0.1",
    "epochs": 4,
}


@pytest.mark.parametrize("lost", [False, True], ids=["stores kept", "stores lost"])
@pytest.mark.parametrize("steps", [(3,), (8, 13), (10, 15, 20)], ids=str)
def test_stopped_amid_an_epoch_under_a_moving_plan(tmp_path, stores, steps, lost: bool):
    """The plan changes at updates 7, 14 and 21; epochs have 6. To the bit."""
    settings = MOVING | {"cache_dir": stores}
    straight = frostline.fit(**settings, output=tmp_path / "straight")
    assert straight.summary["cache"]["replayed"] > 0
    shutil.rmtree(stores)
    for step in steps:
        with pytest.raises(Stop):
            frostline.fit(**settings, output=tmp_path / "run", on_event=stop_at(step))
        if lost:
            shutil.rmtree(stores, ignore_errors=True)
    frostline.fit(**settings, output=tmp_path / "run")
    assert run_bits(tmp_path / "run") == run_bits(tmp_path / "straight")


def test_a_checkpoint_holds_nothing_of_the_cache(tmp_path: Path, stores: Path):
    with pytest.raises(Stop):
        frostline.fit(**MOVING, cache_dir=stores, output=tmp_path / "run", on_event=stop_at(7))
    newest = checkpoint_folders(tmp_path / "run" / "checkpoints")[0]
    state = (newest / "state.json").read_text()
    assert str(stores) not in state


# -- views ---------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    views=st.integers(1, 9),
    turn=st.integers(0, 5),
    count=st.integers(1, 200),
)
def test_every_view_comes_once_in_as_many_epochs(seed: int, views: int, turn: int, count: int):
    seen = [views_of(seed, views, turn * views + e, range(count)) for e in range(views)]
    assert all(sorted(of_sample) == list(range(views)) for of_sample in zip(*seen, strict=True))


@given(seed=st.integers(0, 2**32 - 1), views=st.integers(2, 9), epoch=st.integers(0, 100))
def test_a_block_is_in_one_view(seed: int, views: int, epoch: int):
    found = views_of(seed, views, epoch, range(4 * BLOCK))
    blocks = [set(found[i : i + BLOCK]) for i in range(0, len(found), BLOCK)]
    assert all(len(block) == 1 for block in blocks)
    if views == 2:
        assert all(one != other for one, other in itertools.pairwise(blocks))


def test_a_view_depends_on_the_sample_alone_not_on_the_batch():
    whole = views_of(3, 4, 2, range(200))
    assert views_of(3, 4, 2, [150, 7, 64]) == [whole[150], whole[7], whole[64]]


def test_without_a_number_of_views_each_epoch_has_a_new_one():
    epochs = [views_of(0, None, epoch, range(3)) for epoch in range(50)]
    assert all(len(set(views)) == 1 for views in epochs)
    assert len({views[0] for views in epochs}) == 50


def load(**change: Any) -> Task:
    settings = {key: IMAGE[key] for key in ("model", "data", "policy", "batch_size", "lr")}
    return load_task(load_config(None, settings | change))


def test_flip_has_two_views_that_mirror_each_other():
    task = load(augment="flip")
    one, two, three = (task.train[(5, view)].inputs for view in (0, 1, 2))
    assert torch.equal(one, task.train[(5, None)].inputs)
    assert torch.equal(one, three)
    assert torch.equal(two, one.flip(-1))
    assert not torch.equal(one, two)


# -- a split as a source -------------------------------------------------------------------------


def source_of(task: Task, *, views: int = 2) -> SplitSource:
    return SplitSource(task, task.train, "train", views=views, augmented=views > 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_are_the_samples_in_order_in_one_view(workers: int):
    source = source_of(load(workers=workers, augment="flip"))
    assert (source.samples, source.views, source.fixed) == (TRAIN, 2, True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    blocks = dict(source.blocks([0, BLOCK], 1))
    assert torch.equal(torch.get_rng_state(), before)  # workers are seeded apart
    assert list(blocks) == [0, BLOCK]
    for first, size in ((0, BLOCK), (BLOCK, TRAIN - BLOCK)):
        whole = source.load(range(first, first + size), [1] * size)
        assert torch.equal(blocks[first].args[0], whole.args[0])
        assert len(whole.args[0]) == size
    plain = source.load([BLOCK], [0]).args[0]
    assert torch.equal(plain, blocks[BLOCK].args[0][:1].flip(-1))


def quiet(task: Task) -> Task:
    """The same task, its transform said to be one of a library."""
    assert isinstance(task.preparation, ImagePreparation)
    return replace(task, preparation=replace(task.preparation, spec={"source": "timm"}))


def threads_of(monkeypatch: pytest.MonkeyPatch, *, fail_at: int = -1) -> list[str]:
    """Names of the threads that open pictures, in turn; one of them cannot be opened."""
    seen: list[str] = []
    opened = image.open_picture

    def watched(raw: Any) -> Any:
        seen.append(threading.current_thread().name.partition("_")[0])
        if len(seen) - 1 == fail_at:
            raise DataError("read a picture", found="nothing")
        return opened(raw)

    monkeypatch.setattr(image, "open_picture", watched)
    return seen


def loading() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("frostline-load")]


def processors(monkeypatch: pytest.MonkeyPatch, *, spare: int) -> None:
    """As many as there are threads of arithmetic, and some more."""
    mine = range(torch.get_num_threads() + spare)
    monkeypatch.setattr(caching.os, "sched_getaffinity", lambda _: mine, raising=False)


@pytest.fixture
def spare_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    processors(monkeypatch, spare=1)


@pytest.mark.usefixtures("spare_processor")
@pytest.mark.parametrize("augment", ["none", "flip"])
def test_the_next_pictures_are_prepared_beside_the_computing(augment: str, monkeypatch):
    source = source_of(quiet(load(augment=augment)))
    whole = source.load(range(TRAIN), [1] * TRAIN).args[0]
    seen = threads_of(monkeypatch)
    blocks = [example.args[0] for _, example in source.blocks([0, BLOCK], 1)]
    assert torch.equal(torch.cat(blocks), whole)
    assert seen == ["MainThread"] * BLOCK + ["frostline-load"] * (TRAIN - BLOCK)
    assert not loading()


@pytest.mark.parametrize("spare", [0, -1])
def test_pictures_are_not_prepared_on_a_processor_that_computes(spare: int, monkeypatch):
    processors(monkeypatch, spare=spare)
    seen = threads_of(monkeypatch)
    assert len(list(source_of(quiet(load(augment="none"))).blocks([0, BLOCK], 0))) == 2
    assert set(seen) == {"MainThread"}


@pytest.mark.usefixtures("spare_processor")
@pytest.mark.parametrize(
    "task", [lambda: quiet(load(augment="basic")), lambda: load(augment="none")]
)
def test_what_may_draw_at_random_is_prepared_by_the_main_thread(task: Any, monkeypatch):
    seen = threads_of(monkeypatch)
    assert len(list(source_of(task()).blocks([0, BLOCK], 1))) == 2
    assert set(seen) == {"MainThread"}


@pytest.mark.usefixtures("spare_processor")
def test_a_picture_that_cannot_be_read_ahead_is_told_where_it_is_wanted(monkeypatch):
    source = source_of(quiet(load(augment="none")))
    threads_of(monkeypatch, fail_at=BLOCK + 1)
    blocks = source.blocks([0, BLOCK], 0)
    assert next(blocks)[0] == 0
    with pytest.raises(DataError, match="read a picture"):
        next(blocks)
    assert not loading()


@pytest.mark.usefixtures("spare_processor")
def test_reading_ahead_ends_when_nobody_wants_more(monkeypatch):
    source = source_of(quiet(load(augment="none")))
    blocks = source.blocks([0, BLOCK, 0, BLOCK, 0, BLOCK] * 3, 0)
    assert [next(blocks)[0], next(blocks)[0]] == [0, BLOCK]
    blocks.close()
    assert not loading()


def test_views_that_change_nothing_are_not_prepared_apart():
    source = source_of(load(augment="basic", views=2), views=1)
    one, two = (source.load([3], [view]).args[0] for view in (0, 1))
    assert torch.equal(one, two)


def test_what_happens_to_a_picture_is_part_of_what_is_known():
    known = source_of(load(augment="flip")).preparation
    assert known == source_of(load(augment="flip")).preparation
    assert known != source_of(load(augment="basic", views=2)).preparation
    assert known != source_of(load(augment="flip", seed=1)).preparation
    assert known != source_of(load(augment="flip"), views=1).preparation
    alone = [source_of(load(augment="flip", seed=n), views=1).preparation for n in (0, 1)]
    assert alone[0] == alone[1]  # without views, the seed is no matter


def test_which_pictures_they_are_is_part_of_what_is_known():
    one, other = (load(data=f"tiny_task:{name}_data") for name in ("tiny", "noise"))
    assert source_of(one).data != source_of(other).data
    assert source_of(one).data is not None


def test_texts_are_prepared_once_and_are_of_all_lengths(tiny_bert: Path, table: Path, monkeypatch):
    task = load(model=f"hf:{tiny_bert}", data=str(table), weights="random")
    source = SplitSource(task, task.train, "train", views=1, augmented=False)
    assert not source.fixed
    calls: list[int] = []
    prepared = type(task.train).__getitem__

    def count(self: Any, key: Any) -> Any:
        calls.append(key[0])
        return prepared(self, key)

    monkeypatch.setattr(type(task.train), "__getitem__", count)
    one, two = (source.load([0, 1, 0], [0, 0, 0]) for _ in range(2))
    assert calls == source.places[:2].tolist()
    assert all(torch.equal(one.kwargs[key], two.kwargs[key]) for key in one.kwargs)
    shorter = load(model=f"hf:{tiny_bert}", data=str(table), weights="random", max_length=3)
    other = SplitSource(shorter, shorter.train, "train", views=1, augmented=False)
    assert source.preparation is not None
    assert other.preparation != source.preparation


def test_texts_are_numbered_by_length_and_batches_hold_the_samples_asked_for(
    tiny_bert: Path, table: Path, stores: Path
):
    task = load(model=f"hf:{tiny_bert}", data=str(table), weights="random", cache_dir=stores)
    source = SplitSource(task, task.train, "train", views=1, augmented=False)
    lengths = [len(task.train.inputs[i]) for i in source.places]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1
    assert source.numbers[source.places].tolist() == list(range(source.samples))
    cache = build_cache(task, task.model, torch.device("cpu"))
    assert cache is not None
    asked = [5, 0, 3, 8]
    (batch,) = cache.batches(task.train, [[(i, None) for i in asked]])
    plain = task.collate([task.train[i, None] for i in asked])
    assert batch.indices == plain.indices == tuple(asked)
    assert torch.equal(batch.targets, plain.targets)
    assert torch.equal(batch.inputs["input_ids"] * 1, plain.inputs["input_ids"])


def test_batches_are_loaded_only_if_somebody_looks(stores: Path, monkeypatch):
    task = load(cache="on", cache_dir=stores, augment="none")
    cache = build_cache(task, task.model, torch.device("cpu"))
    assert cache is not None
    assert cache.serves(task.train)
    assert not cache.serves(task.test)
    keys = [[(i, 0) for i in range(n, n + 4)] for n in (0, 4)]
    list(cache.batches(task.train, keys))  # what they look like
    seen = decoded(monkeypatch)
    batches = list(cache.batches(task.train, keys))
    assert [batch.indices for batch in batches] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert batches[0].targets.tolist() == list(task.train.labels[:4])
    looked = seen[0]
    real = torch.stack([task.train[(i, 0)].inputs for i in range(4)])
    assert torch.equal(batches[0].inputs[0] * 1, real)
    assert seen[0] == 4 + 4 * (looked == 0) + looked


def test_no_cache_where_it_is_off(stores: Path):
    task = load(cache="off", cache_dir=stores)
    assert build_cache(task, task.model, torch.device("cpu")) is None
    assert files(stores) == []
