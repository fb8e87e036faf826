"""The arithmetic of step times, on made-up logs, and one tiny real measurement."""

from __future__ import annotations

from typing import Any

import pytest

steps = pytest.importorskip("frontier_steps")
bench = pytest.importorskip("frontier_bench")


def entry(**more: Any) -> dict[str, Any]:
    times = {"full": 0.6, "naive": 0.3, "cached": 0.1, "hand": 0.1} | more.pop("times", {})
    return {
        "depth": "half",
        "find_s": 0.3,
        "fill_s": 0.1,
        "batch": 10,
        "forward_fraction": 0.5,
        "full_predicted_s": 0.6,
        "naive_predicted_s": 0.4,
        "cached_predicted_s": 0.1,
        "bytes": 2048.0,
        "bytes_by_hand": 1024.0,
        "differs": {"cached": 0.0, "hand": 0.0},
        "times": {name: [value, 2 * value, 4 * value] for name, value in times.items()},
    } | more


def noted(**more: Any) -> str:
    return steps.notes(steps.summary(entry(**more)))


def test_ratios_are_within_rounds() -> None:
    """A round in which the machine was slow changes no ratio."""
    found = steps.summary(entry())
    assert found["over_full"] == pytest.approx(6)
    assert found["over_naive"] == pytest.approx(3)
    assert found["over_hand"] == pytest.approx(1)
    assert bench.ratios([1, 2, 30], [1, 1, 10]) == pytest.approx((1.5, 2, 2.5))
    assert bench.ratios([3], [2]) == (1.5, 1.5, 1.5)
    assert bench.least_ratio([4, 2], [1, 5]) == 2


def test_bounds_by_share_and_by_parts() -> None:
    found = steps.summary(entry())
    assert found["over_full_bound"] == pytest.approx(2)
    assert found["over_full_parts"] == pytest.approx(6)
    assert found["over_naive_bound"] == pytest.approx(4 / 3)
    assert found["over_naive_parts"] == pytest.approx(4)
    assert steps.naive_bound(1.0) == float("inf")
    # Gains over full and over naive differ by what naive gains over full.
    assert steps.naive_bound(0.75) == pytest.approx(4 / (3 / (3 - 1.5)))


def test_nothing_is_said_of_what_is_as_it_should_be() -> None:
    assert not noted()


def test_a_cached_step_dearer_than_by_hand_is_a_miss() -> None:
    assert noted(times={"cached": 0.106}).startswith("MISSES 1.05 by")
    assert not noted(times={"cached": 0.104})


def test_a_rest_under_a_millisecond_is_told_in_microseconds() -> None:
    tiny = {"cached": 0.0004, "hand": 0.0002}
    said = noted(times=tiny, cached_predicted_s=1e-5)
    assert said == "rest under 1 ms: 400 µs more than by hand"  # the median round is twice as slow


def test_a_cached_step_cheaper_than_by_hand_is_suspicious() -> None:
    assert "SUSPICIOUS: faster than by hand" in noted(times={"cached": 0.09})


def test_a_figure_above_its_bound_needs_the_rest_by_hand_to_be_above_too() -> None:
    low = {"cached_predicted_s": 0.2}
    assert "above the bound over full, as the rest by hand is" in noted(**low)
    said = noted(**low, times={"cached": 0.08, "hand": 0.3})
    assert "SUSPICIOUS: above the bound over full" in said
    assert "SUSPICIOUS: above the bound over naive" in said


def test_finding_is_compared_with_one_naive_epoch() -> None:
    assert steps.summary(entry())["find_share"] == pytest.approx(0.3 / (0.3 * 100))


def test_the_table_names_model_depth_and_ratio() -> None:
    machine = dict.fromkeys(("torch", "threads", "cores", "processor", "clock", "load_1min"), 1)
    result = {"name": "m", "title": "Model", "machine": machine, "rounds": 3, "depths": [entry()]}
    text = steps.table({"results": [result]})
    assert "## Model" in text
    assert "| half | 1200 | 600 | 200 | 200 | 6.00 | 2.00, 6.00 |" in text
    assert "equal to the uncached ones to the bit" in text
    assert "3 rounds" in text
    result["depths"][0]["differs"]["cached"] = 1e-6
    assert "within 1e-06" in steps.table({"results": [result]})
    assert "Nothing measured yet" in steps.table({"results": []})


def test_every_variant_runs_in_every_round_until_the_budget_is_spent() -> None:
    calls: list[str] = []

    def ready(name: str) -> Any:
        return lambda: lambda: calls.append(name)

    times = bench.interleaved({"a": ready("a"), "b": ready("b")}, 5, budget_s=-1.0)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert len(bench.interleaved({"a": ready("a")}, 5)["a"]) == 5
    assert set(calls) == {"a", "b"}


def test_a_real_model_is_measured_and_its_gradients_agree() -> None:
    pytest.importorskip("torchvision")
    models = pytest.importorskip("frontier_models")
    found = steps.measure(lambda: models.resnet18(32, 3), steps.Wanted(rounds=1))
    assert found["depths"][0]["depth"] == "all but head"
    for e in found["depths"]:
        assert max(e["differs"].values()) < 1e-4
        assert e["bytes"] == e["bytes_by_hand"]
        assert 0 < e["forward_fraction"] < 1
    assert "ResNet-18" in steps.table(
        {"results": [found | {"rounds": 1, "machine": steps_machine()}]}
    )


def steps_machine() -> dict[str, Any]:
    return dict.fromkeys(("torch", "threads", "cores", "processor", "clock", "load_1min"), 1)
