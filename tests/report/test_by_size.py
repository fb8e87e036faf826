"""Learning curves in the report: what is drawn, what is said, and what may be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frostline.errors import DataError
from frostline.report.charts import Chart, charts_of, compiled
from frostline.report.figures import write_figures
from frostline.report.numbers import Numbers, numbers_of
from frostline.report.page import page
from frostline.report.read import read_runs
from report_records import HOSTILE, write_curve, write_study

#: Freezing helps with few samples and hinders with many.
CROSSING = {
    "full": {50: [0.40, 0.41, 0.42], 100: [0.60, 0.61, 0.60], 200: [0.90, 0.92, 0.93]},
    "linear-probe": {50: [0.60, 0.61, 0.63], 100: [0.65, 0.66, 0.64], 200: [0.70, 0.71, 0.72]},
}


def numbers(place: Path, policies: Any = CROSSING, **more: Any) -> Numbers:
    return numbers_of(read_runs([write_curve(place / "study", policies, **more)]))


def chart(found: Numbers, name: str = "by_size") -> Chart:
    return next(chart for chart in charts_of(found) if chart.name == name)


def values(drawn: Chart, name: str) -> list[dict[str, Any]]:
    layers = [layer["data"] for layer in drawn.spec["layer"]]
    return next(data["values"] for data in layers if data["name"] == name)


def test_the_title_answers_where_freezing_stops_helping(tmp_path: Path) -> None:
    said = numbers(tmp_path).headline
    assert said.title == (
        "linear-probe is ahead of full up to 100 samples, and behind from 200 on (they cross at "
        "about 110)."
    )
    assert said.sentences[0].startswith("Shown with 3 seeds: linear-probe by 20.3 points on 50")
    assert sum("last doubling" in sentence for sentence in said.sentences) == 2


def test_what_is_drawn_are_the_numbers(tmp_path: Path) -> None:
    found = numbers(tmp_path)
    drawn = chart(found)
    means = {(row["arm"], row["size"]): row["mean"] for row in values(drawn, "means")}
    assert means["full", 50] == pytest.approx(0.41)
    assert means["linear-probe", 200] == pytest.approx(0.71)
    assert len(means) == 6
    assert {(r["arm"], r["size"], r["seed"]): r["score"] for r in values(drawn, "runs")} == {
        (name, size, seed): score
        for name, sizes in CROSSING.items()
        for size, scores in sizes.items()
        for seed, score in enumerate(scores)
    }
    assert {row["arm"]: row["size"] for row in values(drawn, "last")} == dict.fromkeys(
        CROSSING, 200
    )
    for row in values(drawn, "bands"):
        assert row["low"] < row["mean"] < row["high"]
    [crossing] = values(drawn, "crossings")
    assert 100 < crossing["at"] < 200
    assert crossing["says"] == found.learning[0].orders()[0].sentence
    assert [row[:2] for row in drawn.rows[:2]] == [(50, "full"), (50, "linear-probe")]
    assert "Dashed: where means cross." in drawn.summary
    assert "Accuracy on 50 validation samples." in drawn.summary
    test = {(r["arm"], r["size"]): r["mean"] for r in values(chart(found, "by_size_test"), "means")}
    assert test["full", 50] == pytest.approx(0.39)


def test_sizes_do_not_compete_as_strategies(tmp_path: Path) -> None:
    found = numbers(tmp_path)
    assert not any(arm.chosen or arm.reference or arm.verdict for arm in found.arms)
    names = {chart.name for chart in charts_of(found)}
    assert {"by_size", "by_size_test", "val_accuracy"} <= names
    assert not names & {"quality_time", "quality_memory"}
    text = page(found)
    assert "When does freezing stop helping?" in text
    assert "Every strategy at every size" in text
    assert "against the reference" not in text


def test_it_says_how_to_do_it_again(tmp_path: Path) -> None:
    again = numbers(tmp_path).repeat
    [command] = again.commands
    assert command == (
        "frostline learning-curve timm:net photos --policies full linear-probe --sizes 50 100 200 "
        "--seeds 3 --epochs 2"
    )
    assert again.notes == ()


def test_the_first_tile_says_whose_accuracy_it_is(tmp_path: Path) -> None:
    first = numbers(tmp_path).headline.tiles[0]
    assert first.note == "full@200, 90.0 to 93.0 % over 3 seeds"


def test_other_studies_have_no_such_chart(tmp_path: Path) -> None:
    write_study(tmp_path, {"full": [0.8, 0.81], "bitfit": [0.83, 0.84]})
    found = numbers_of(read_runs([tmp_path]))
    assert found.learning == ()
    assert not any(chart.name.startswith("by_size") for chart in charts_of(found))
    assert "against the reference" in page(found)


def test_numbers_are_plain_json(tmp_path: Path) -> None:
    plain = json.loads(json.dumps(numbers(tmp_path).to_json()))
    assert [curve["metric"] for curve in plain["learning"]] == ["val", "test"]
    assert plain["learning"][0]["points"]["full"][0]["scores"] == {"0": 0.40, "1": 0.41, "2": 0.42}


def test_one_seed_has_no_band_and_no_points_of_seeds(tmp_path: Path) -> None:
    found = numbers(tmp_path, {n: {s: a[:1] for s, a in of.items()} for n, of in CROSSING.items()})
    drawn = chart(found)
    assert not values(drawn, "bands")
    assert not values(drawn, "runs")
    assert "Bands" not in drawn.summary
    assert found.headline.title == "One seed does not show when freezing stops helping."
    assert any(s.endswith("one seed says nothing of chance.") for s in found.headline.sentences)
    assert compiled(drawn.spec)


def test_what_is_missing_is_said_and_the_rest_drawn(tmp_path: Path) -> None:
    holes = {
        "full": {50: [0.4, None], 100: [None, None], 200: [0.9, 0.91]},
        "linear-probe": {50: [None, 0.6], 100: [0.65, 0.66], 200: [None, None]},
    }
    found = numbers(tmp_path, holes)
    drawn = chart(found)
    assert {(row["arm"], row["size"]) for row in values(drawn, "means")} == {
        ("full", 50), ("full", 200), ("linear-probe", 50), ("linear-probe", 100)
    }  # fmt: skip
    assert {row["arm"]: row["size"] for row in values(drawn, "last")} == {
        "full": 200, "linear-probe": 100
    }  # fmt: skip
    missing = {(row[0], row[1]): row[-1] for row in drawn.rows}
    assert missing[100, "full"] == "seed 0: not finished; seed 1: not finished"
    assert missing[100, "linear-probe"] == ""
    missing = "6 of 12 runs are missing: means are over fewer seeds there, or absent."
    assert [s for s in found.headline.sentences if "missing" in s] == [missing]
    assert not any(s.startswith("Note: ") for s in found.headline.sentences)
    assert found.headline.title.startswith("Nothing can be compared")
    assert page(found)


@pytest.mark.parametrize(
    "policies",
    [
        {"full": {50: [0.4, 0.5]}},
        {"full": {50: [0.4, 0.5], 100: [0.5, 0.6]}},
        {"full": {50: [0.4, 0.5]}, "linear-probe": {50: [0.5, 0.4]}},
        {"full": {50: [0.5, 0.5]}, "linear-probe": {50: [0.5, 0.5]}},
    ],
)
def test_one_policy_or_one_size_is_drawn_too(policies: Any, tmp_path: Path) -> None:
    found = numbers(tmp_path, policies)
    sizes = {size for of in policies.values() for size in of}
    assert found.headline.title == (
        "One size, 50 samples, does not say when freezing stops helping."
        if len(sizes) == 1
        else "The last doubling of the data brought full +10.0 points, with no interval."
    )
    assert compiled(chart(found).spec)
    assert page(found)


def test_a_study_of_which_nothing_is_finished_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        numbers(tmp_path, {"full": {50: [None]}})


def test_hostile_reasons_stay_text(tmp_path: Path) -> None:
    holes = {"full": {50: [0.4, None], 100: [0.5, 0.6]}}
    folder = write_curve(tmp_path / "study", holes)
    why = json.dumps({"why": " ".join(HOSTILE)})
    (folder / "runs" / "full@50" / "seed-1.failed.json").write_text(why)
    found = numbers_of(read_runs([folder]))
    text = page(found)
    assert any("full@50, seed 1: " in sentence for sentence in found.headline.sentences)
    for name in HOSTILE:
        assert "<" not in name or name not in text


def test_figures_are_written(tmp_path: Path) -> None:
    files = {path.name for path in write_figures(numbers(tmp_path), tmp_path / "figures")}
    assert {"by_size.svg", "by_size.png", "by_size.csv", "by_size_test.svg"} <= files
    assert "linear-probe" in (tmp_path / "figures/by_size.svg").read_text()
    table = (tmp_path / "figures/by_size.csv").read_text().splitlines()
    assert table[0] == "training samples,strategy,mean,low,high,seeds,missing"
    assert len(table) == 7
