"""The table that holds auto against a sweep: verdicts, costs, and what it cannot say."""

from __future__ import annotations

import pytest

auto = pytest.importorskip("auto")


def arm(*accuracy: float, seconds: float = 10.0, val: float | None = None):
    return {
        str(seed): {
            "test_accuracy": value,
            "val_accuracy": value if val is None else val,
            "training_s": seconds / 2,
            "alone_s": seconds,
            "backward_share": 1.0,
        }
        for seed, value in enumerate(accuracy)
    }


def pair(**change):
    found = {"title": "t", "held_out": False, "epochs": 1, "settings": {}, "torch": "2",
             "threads": 1, "processor": "p", "said": {"0": ["a < b"]}, "missing": []}  # fmt: skip
    return found | change


def test_the_best_is_by_test_data_and_the_picked_one_by_validation() -> None:
    arms = {
        "full": arm(0.80, 0.82, val=0.9, seconds=30),
        "first-groups=1": arm(0.84, 0.86, val=0.8, seconds=20),
        "auto": arm(0.83, 0.85, seconds=10),
    }
    found = auto.outcome(arms)
    assert (found.best, found.picked) == ("first-groups=1", "full")
    assert found.gap == pytest.approx(-0.01)
    assert found.share == pytest.approx(10 / 50)
    assert found.wide == pytest.approx(0.0, abs=1e-9)
    assert not found.met  # a point behind with every seed


@pytest.mark.parametrize(
    ("own", "met"),
    [((0.846, 0.846), True), ((0.844, 0.844), False), ((0.80, 0.86), True)],
)
def test_half_a_point_or_the_interval_of_seeds(own, met) -> None:
    arms = {"full": arm(0.85, 0.85), "auto": arm(*own)}
    assert auto.outcome(arms).met is met


def test_one_seed_has_no_interval() -> None:
    assert auto.difference({"a": arm(0.5), "b": arm(0.4)}, "a", "b") == (
        pytest.approx(0.1),
        float("inf"),
    )


def test_eight_strategies_against_full_fine_tuning_alone() -> None:
    prefixes = {f"first-groups={n}": arm(0.5, seconds=4) for n in range(1, 10)}
    four = {name: arm(0.5, seconds=4) for name in ("full", "linear-probe", "gradual", "lp-ft")}
    assert auto.eight_cost(four | prefixes) == pytest.approx(8 * 2 / 4)
    assert auto.eight_cost(four) is None


def test_the_page_holds_every_pair_and_says_what_is_missing() -> None:
    log = {
        "flowers5-lite0": pair(title="seen", arms={"full": arm(0.5), "auto": arm(0.6)}),
        "caltech20-resnet56": pair(
            title="unseen", held_out=True, arms={"full": arm(0.5), "auto": arm(0.4, 0.41)},
            missing=["auto, seed 2"],
        ),
        "trec6-minilm": pair(title="no auto", arms={"full": arm(0.5)}, missing=["auto, seed 0"]),
    }  # fmt: skip
    page = auto.table(log)
    assert "| seen | 60.0 | 50.0 `full` | +10.0 ± inf | yes |" in page
    assert "| unseen (held out) |" in page
    assert page.index("| seen |") < page.index("| unseen")
    assert f"Pairs not run yet: {len(auto.SIZES) - 2} of {len(auto.SIZES)}" in page
    assert "Not finished: auto, seed 2." in page
    assert "`auto`, seed 0: a < b" in page


@pytest.mark.parametrize("groups", [1, 2, 10, 11, 28, 60])
def test_depths_are_spread_over_the_backbone(groups: int) -> None:
    counts = [int(text.partition("=")[2]) for text in auto.depths(groups)]
    assert counts == sorted(set(counts))
    assert len(counts) == min(groups - 1, auto.MOST_DEPTHS)
    if counts:
        assert (counts[0], counts[-1]) == (1, groups - 1)
