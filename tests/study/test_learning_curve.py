"""Accuracy by number of samples: what is run, what is read, and where the order changes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from faulty_disk import QuickDisk, use_disk
from frostline.errors import ConfigError, DataError, PolicyError, UsageError
from frostline.records import read_run
from frostline.study import learning_curve as module
from frostline.study.compare import compare
from frostline.study.folder import StudyFolder, TrialKey
from frostline.study.learning_curve import (
    SIZES,
    LearningCurve,
    SizePoint,
    learning_curve,
    read_curve,
    resolve_sizes,
)
from frostline.tasks.config import load_config
from frostline.tasks.order import Batching

TINY: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.01,
    "threads": 1,
    "device": "cpu",
    "cache": "off",
    "isolate": False,
}


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def drawn(path: Path, **change: Any) -> LearningCurve:
    wanted = TINY | {"policies": ["full", "linear-probe"], "sizes": (12, 49), "seeds": 2} | change
    data = wanted.pop("data", "tiny_task:tiny_data")
    return learning_curve("tiny_task:tiny_model", data, output=path, **wanted)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, LearningCurve]:
    with use_disk(QuickDisk()):
        path = tmp_path_factory.mktemp("curve") / "study"
        return path, drawn(path)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [100, 0.5, "100", None])
def test_sizes_that_are_no_list_are_refused(sizes: Any):
    with pytest.raises(UsageError, match="no list of sizes"):
        resolve_sizes(sizes, total=50, classes=4)


@given(st.integers(2, 9), st.integers(9, 10_000), st.lists(st.floats(1e-3, 1.0), min_size=1))
def test_shares_become_numbers_that_hold_every_class(classes: int, total: int, shares: list[float]):
    kept = sorted({round(s * total) for s in shares if round(s * total) >= classes})
    if not kept:
        with pytest.raises(UsageError, match="larger sizes"):
            resolve_sizes(shares, total=total, classes=classes)
        return
    found = resolve_sizes(shares, total=total, classes=classes)
    assert list(found) == kept
    assert resolve_sizes(found, total=total, classes=classes) == found


def test_the_usual_sizes_do_for_fifty_samples():
    assert resolve_sizes(SIZES, total=50, classes=4) == (6, 12, 25, 50)


@pytest.mark.parametrize("size", [1, 3, 51, 0, -1, 0.0, 1.5, True, "half", None, math.nan])
def test_a_size_that_cannot_be_is_refused(size: Any):
    with pytest.raises(UsageError, match="4 to 50"):
        resolve_sizes([size], total=50, classes=4)


@given(st.integers(2, 500), st.integers(0, 500), st.integers(1, 64), st.integers(1, 30))
def test_all_sizes_make_the_same_updates(size: int, more: int, batch: int, epochs: int):
    given = {"model": "m", "data": "d", "batch_size": batch, "epochs": epochs, "patience": 3}
    config = load_config(None, given)
    largest = size + more
    length = module._length(config, size, largest)
    steps, most = (Batching(n, batch).steps_per_epoch for n in (size, largest))
    updates = epochs * most
    assert length["budget"] == f"{updates}st"
    assert (length["epochs"] - 1) * steps < updates <= length["epochs"] * steps
    assert (length["patience"] - 1) * steps < 3 * most <= length["patience"] * steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "10s"}, "in common"),
        ({"train_samples": 20}, "sizes="),
        ({"policy": "full"}, "policies="),
        ({"seeds": 0}, "no seeds"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_a_wrong_declaration_is_refused_before_anything_runs(tmp_path: Path, change, message):
    with pytest.raises(ConfigError, match=message):
        drawn(tmp_path / "study", **change)
    assert not (tmp_path / "study").exists()
    with pytest.raises(PolicyError, match="gradul"):
        drawn(tmp_path / "study", policies=["gradul"])


# -- runs ------------------------------------------------------------------------------------------


def runs_of(path: Path) -> dict[tuple[str, int], Any]:
    spec, study = StudyFolder(path).spec(), StudyFolder(path)
    keys = [TrialKey(arm.name, seed) for arm in spec.arms for seed in spec.seeds]
    return {(key.arm, key.seed): read_run(study.run(key)) for key in keys}


def test_every_policy_runs_on_every_size_with_as_many_updates(done):
    runs = runs_of(done[0])
    assert {arm for arm, _ in runs} == {
        "full@12", "full@49", "linear-probe@12", "linear-probe@49",
    }  # fmt: skip
    for (arm, seed), record in runs.items():
        assert record.header["data"]["train"]["samples"] == int(arm.rpartition("@")[2])
        assert record.header["config"]["policy"] == arm.rpartition("@")[0]
        assert record.header["config"]["seed"] == seed
        assert record.summary["steps"] == 12  # 2 epochs of 49 samples in batches of 8
        assert not record.summary["stopped_early"]
    subsets = {
        (arm.rpartition("@")[2], seed): r.header["data"]["train"]["content_sha256"]
        for (arm, seed), r in runs.items()
    }
    assert len(set(subsets.values())) == 3  # two small ones, by seed, and the whole


def test_the_curve_is_what_the_records_say(done):
    path, curve = done
    assert curve.policies == {"full": "full", "linear-probe": "linear-probe"}
    assert curve.eval_samples == 12
    assert (curve.metric, curve.level, curve.notes) == ("val", 0.95, ())
    for (arm, seed), record in runs_of(path).items():
        name, _, size = arm.rpartition("@")
        point = next(p for p in curve[name] if p.size == int(size))
        assert point.scores[seed] == record.summary["val_accuracy"]
        tested = next(p for p in read_curve(path, metric="test")[name] if p.size == int(size))
        assert tested.scores[seed] == record.summary["test_accuracy"]


def test_the_same_call_runs_nothing_again_and_a_smaller_size_is_added(done, tmp_path: Path):
    path = Path(shutil.copytree(done[0], tmp_path / "study"))
    before = {p: p.stat().st_mtime_ns for p in path.rglob("record.jsonl")}
    assert drawn(path) == done[1]
    more = drawn(path, sizes=(6, 12, 49))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [p.size for p in more["full"]] == [6, 12, 49]
    assert more["full"][1:] == done[1]["full"]
    shutil.rmtree(StudyFolder(path).run(TrialKey("full@6", 1)))
    less = read_curve(path)
    assert less["full"][0].absent == ("seed 1: not finished",)
    assert less.notes == ("full on 6, seed 1: not finished",)
    assert less["linear-probe"] == more["linear-probe"]


def test_a_curve_that_was_stopped_goes_on_to_the_same_end(done, tmp_path: Path):
    def stop(event: dict[str, Any]) -> None:
        if event["place"] == 3 and event["kind"] == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "study", on_event=stop)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}
    assert len(before) == 2
    assert drawn(tmp_path / "study") == done[1]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_sizes_share_what_frozen_layers_put_out_for_validation(tmp_path: Path):
    stores = {"cache": "on", "cache_dir": str(tmp_path / "stores"), "augment": "none"}
    drawn(tmp_path / "study", policies=["linear-probe"], seeds=1, **stores)
    caches = {arm: r.summary["cache"] for (arm, _), r in runs_of(tmp_path / "study").items()}
    assert caches["linear-probe@12"]["found_rows"] == 0
    assert caches["linear-probe@49"]["found_rows"] == 12
    assert caches["linear-probe@49"]["filled_rows"] == 49  # a part is another data set


def test_a_run_that_fails_is_noted_and_left_out(done, tmp_path: Path):
    path = Path(shutil.copytree(done[0], tmp_path / "study"))
    key = TrialKey("full@12", 1)
    StudyFolder(path).failure(key).write_text(json.dumps({"why": "cannot go on\n  found: NaN"}))
    curve = read_curve(path)
    assert list(curve["full"][0].scores) == [0]
    assert curve.notes == ("full on 12, seed 1: cannot go on found: NaN",)
    assert curve.order("full", "linear-probe").differences[12].n == 1


def test_what_is_no_curve_is_refused(done, tmp_path: Path):
    with pytest.raises(DataError, match="no study"):
        read_curve(tmp_path)
    settings = TINY | {"epochs": 1, "seeds": 1, "output": tmp_path / "other"}
    compare("tiny_task:tiny_model", "tiny_task:tiny_data", ["full"], **settings)
    with pytest.raises(DataError, match="no policy at a size"):
        read_curve(tmp_path / "other")
    with pytest.raises(UsageError, match="'val' or 'test'"):
        read_curve(done[0], metric="train")  # pyright: ignore[reportArgumentType]
    empty = Path(shutil.copytree(done[0], tmp_path / "empty"))
    shutil.rmtree(empty / "runs")
    with pytest.raises(DataError, match="no finished run"):
        read_curve(empty)


def test_policies_that_count_in_epochs_are_pointed_out():
    assert module._counts_epochs("gradual")
    assert module._counts_epochs("gradual:every=2ep")
    assert not module._counts_epochs("gradual:every=10%")
    assert not module._counts_epochs("full")
    notes = module._notes({"a": "gradual"}, {})
    assert "lengths in %" in notes[0]


# -- orders ----------------------------------------------------------------------------------------


def planted(
    first: dict[int, float], second: dict[int, float], *, noise: float = 0.002, seeds: int = 4
) -> LearningCurve:
    """Two policies with known means, a steady spread over seeds."""
    swing = [noise * (-1) ** i * (1 + i // 2) for i in range(seeds)]

    def points(means: dict[int, float], sign: float) -> tuple[SizePoint, ...]:
        return tuple(
            module._point(n, {i: m + sign * s for i, s in enumerate(swing)}, level=0.95)
            for n, m in means.items()
        )

    return LearningCurve(
        policies={"full": "full", "probe": "linear-probe"},
        points={"full": points(first, 1), "probe": points(second, -1)},
        metric="val",
        eval_samples=200,
        level=0.95,
    )


RISING: dict[int, float] = {50: 0.5, 100: 0.6, 200: 0.7, 400: 0.8}
FLAT: dict[int, float] = dict.fromkeys(RISING, 0.65)


def test_a_change_that_is_shown_on_both_sides():
    order = planted(RISING, FLAT).order("full", "probe")
    assert (order.change, order.between) == ("changes", (100, 200))
    assert order.ahead == {50: "probe", 100: "probe", 200: "full", 400: "full"}
    assert order.at == pytest.approx(math.sqrt(100 * 200))
    assert order.sentence == (
        "probe is ahead of full up to 100 samples, and behind from 200 on (they cross at about "
        "140); shown with 4 seeds: probe by 15.0 points on 50, probe by 5.0 points on 100, full by "
        "5.0 points on 200, full by 15.0 points on 400."
    )
    # The other way round it is the same.
    turned = planted(RISING, FLAT).order("probe", "full")
    assert (turned.change, turned.between, turned.at) == (order.change, order.between, order.at)
    assert turned.ahead == order.ahead
    assert turned.sentence == order.sentence


def test_a_change_that_the_means_alone_show():
    order = planted(RISING, FLAT, noise=0.2).order("full", "probe")
    assert (order.change, order.between) == ("changes by the means", (100, 200))
    assert set(order.ahead.values()) == {""}
    assert order.sentence.startswith("By the means, probe is ahead of full up to 100 samples")
    assert order.sentence.endswith("shown with 4 seeds: no difference at any size.")


@pytest.mark.parametrize(
    ("second", "change", "said"),
    [
        ({n: m - 0.1 for n, m in RISING.items()}, "never changes", "full is never behind probe"),
        ({n: m + 0.1 for n, m in RISING.items()}, "never changes", "probe is never behind full"),
        (RISING, "never changes", "full and probe are equal from 50 to 400 samples"),
        ({50: 0.6, 100: 0.5, 200: 0.8, 400: 0.7}, "unclear", "changes more than once"),
    ],
)
def test_no_one_change(second, change, said):
    order = planted(RISING, second).order("full", "probe")
    assert (order.change, order.between, order.at) == (change, None, None)
    assert said in order.sentence


def test_equal_policies_are_never_said_to_differ():
    order = planted(RISING, RISING, noise=0.0).order("full", "probe")
    assert set(order.ahead.values()) == {""}


def test_one_seed_says_nothing_of_chance():
    order = planted(RISING, FLAT, seeds=1).order("full", "probe")
    assert order.change == "changes by the means"
    assert "one seed says nothing of chance" in order.sentence


@given(st.floats(0.01, 0.3), st.floats(30.0, 900.0))
def test_the_crossing_of_straight_lines_is_found(slope: float, at: float):
    sizes = (16, 32, 64, 128, 256, 512, 1024)
    means = {n: slope * math.log2(n / at) for n in sizes}
    assume(all(abs(m) > 1e-6 for m in means.values()))
    (((low, high), found),) = module._crossings(means)
    assert low < at < high
    assert found == pytest.approx(at, rel=1e-6)


@given(st.lists(st.tuples(st.floats(-0.3, 0.3), st.booleans()), min_size=1, max_size=6))
def test_a_change_is_told_only_where_all_means_agree_with_it(points: list[tuple[float, bool]]):
    means = {50 * 2**i: mean for i, (mean, _) in enumerate(points)}
    names = {
        50 * 2**i: "ab"[mean > 0] if mean and sure else "" for i, (mean, sure) in enumerate(points)
    }
    shown = module._shown_change(names)
    change, between, at = module._change(module._crossings(means), shown)
    if between is None:
        assert at is None
        assert change in ("unclear", "never changes")
        signs = {m > 0 for m in means.values() if m}
        assert (change == "never changes") == (len(signs) < 2)
        return
    low, high = between
    before = {mean > 0 for size, mean in means.items() if mean and size <= low}
    after = {mean > 0 for size, mean in means.items() if mean and size >= high}
    assert len(before) == len(after) == 1
    assert before != after
    assert at is not None
    assert low * (1 - 1e-9) <= at <= high * (1 + 1e-9)
    assert (change == "changes") == (shown is not None)


@given(st.dictionaries(st.integers(2, 5000), st.none() | st.floats(1e-6, 1.0), min_size=1))
def test_what_is_shown_follows_holm(p_values: dict[int, float | None]):
    found = module._holm(p_values, 0.95)
    known = sorted((p, size) for size, p in p_values.items() if p is not None)
    adjusted, running = {}, 0.0
    for rank, (p, size) in enumerate(known):  # adjusted p-values, Holm 1979
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[size] = running
    clear = {s: p for s, p in adjusted.items() if abs(p - 0.05) > 1e-9}
    assert {s for s in clear if s in found} == {s for s, p in clear.items() if p <= 0.05}


def test_by_chance_alone_an_order_is_seldom_shown():
    random, trials, sizes = np.random.default_rng(0), 2000, (25, 50, 100, 200, 400)
    noise = random.normal(0.0, 0.02, (trials, len(sizes), 4))
    found: Any = stats.ttest_1samp(noise, 0.0, axis=-1)
    shown = [
        bool(module._holm(dict(zip(sizes, map(float, p), strict=True)), 0.95)) for p in found.pvalue
    ]
    assert abs(sum(shown) / trials - 0.05) < 0.015  # 0.005 is the standard error


def test_policies_without_a_common_run_have_no_order(done):
    curve = planted(RISING, {800: 0.9})
    with pytest.raises(DataError, match="same sizes"):
        curve.order("full", "probe")
    assert curve.orders() == ()
    assert curve.to_json()["orders"] == []
    with pytest.raises(UsageError, match="full, probe"):
        curve.order("full", "gradual")
    assert curve["linear-probe"] == curve["probe"]


# -- more data -------------------------------------------------------------------------------------


def test_what_a_doubling_brings_is_per_doubling():
    curve = planted({50: 0.5, 100: 0.6, 400: 0.8}, FLAT)
    rise = curve.rise("full")
    assert rise is not None
    assert rise.difference == pytest.approx(0.1)
    assert curve.rise("linear-probe").difference == pytest.approx(0.0)  # pyright: ignore[reportOptionalMemberAccess]


def test_one_policy_alone_tells_of_more_data():
    curve = planted(RISING, FLAT)
    alone = LearningCurve({"full": "full"}, {"full": curve["full"]}, "val", 200, 0.95)
    assert alone.sentence().startswith("The last doubling of the data brought full +10.0 points")
    one = LearningCurve({"full": "full"}, {"full": curve["full"][:1]}, "val", 200, 0.95)
    assert one.rise("full") is None
    assert "one size alone" in one.sentence()


# -- files -----------------------------------------------------------------------------------------


def test_a_curve_survives_json(done):
    for curve in (done[1], planted(RISING, FLAT), planted(RISING, FLAT, seeds=1)):
        text = json.dumps(curve.to_json(), allow_nan=False)
        again = LearningCurve.from_json(json.loads(text))
        assert again == curve
        assert again.sentence() == curve.sentence()


@pytest.mark.parametrize("change", [{"format": 2}, {"points": 3}, {"policies": None}])
def test_json_of_something_else_is_refused(change: dict[str, Any]):
    data = json.loads(json.dumps(planted(RISING, FLAT).to_json()))
    with pytest.raises(DataError, match="learning curve"):
        LearningCurve.from_json(data | change)


def test_intervals_are_students_and_stay_within_accuracies():
    point = module._point(50, {0: 0.99, 1: 1.0, 2: 0.97}, level=0.95)
    assert point.mean == pytest.approx(0.98667, abs=1e-5)
    assert point.high == 1.0
    mean, error = 0.9866667, 0.00881917  # of three values, by hand
    assert point.low == pytest.approx(mean - 4.302653 * error, abs=1e-5)
    assert module._point(50, {}, level=0.95).mean is None
