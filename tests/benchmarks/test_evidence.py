"""The arithmetic, the verdicts and the pages of the evidence, on made-up logs."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import evidence_report as report
import pytest
import specs
from scipy import stats

from frostline.registry import make_policy

SEEDS = (0, 1, 2)


def row(
    arm: str, spec: str, seed: int, accuracy: float, share: float, *, budget: int = 100, **more: Any
) -> dict[str, Any]:
    return {
        "arm": arm,
        "spec": spec,
        "seed": seed,
        "epochs": 10,
        "budget": budget,
        "test_accuracy": accuracy,
        "val_accuracy": [accuracy],
        "step_share": share,
        "overhead_share": 0.0,
        "frozen_share": 0.5,
        "steps_s": 20 * share,
    } | more


def controls() -> list[dict[str, Any]]:
    """Full fine-tuning 0.80 +- a bit; prefixes of 1 and 2 groups; half and a tenth of the steps."""
    rows = []
    for seed in SEEDS:
        noise = 0.01 * (seed - 1)
        rows += [
            row("full", "full", seed, 0.80 + noise, 1.0),
            row("prefix", "first:groups=1", seed, 0.79 + noise, 0.8),
            row("prefix", "first:groups=2", seed, 0.78 + noise, 0.5),
            row("budget", "full", seed, 0.70 + noise, 0.5, budget=50),
            row("budget", "full", seed, 0.40 + noise, 0.1, budget=10),
        ]
    return rows


def policy_rows(accuracies: list[float], share: float, arm: str = "policy") -> list[dict[str, Any]]:
    return [row(arm, "apf", s, a, share) for s, a in zip(SEEDS, accuracies, strict=True)]


def compared(*extra: dict[str, Any]) -> report.Comparison:
    found = report.compare("apf", "apf", [*controls(), *extra], 10)
    assert found is not None
    return found


def test_every_registered_policy_is_measured_or_excused() -> None:
    assert not specs.unlisted()
    assert not specs.SPECS.keys() & specs.EXCUSED.keys()


@pytest.mark.parametrize("name", sorted(specs.SPECS))
def test_a_spec_is_of_the_policy_it_stands_for(name: str) -> None:
    assert specs.SPECS[name].partition(":")[0] == name
    make_policy(specs.SPECS[name])


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_is_students(n: int) -> None:
    values = [math.sin(i) for i in range(n)]
    low, high = stats.t.interval(0.95, n - 1, loc=statistics.fmean(values), scale=stats.sem(values))
    assert report.interval(values) == pytest.approx(
        (statistics.fmean(values), float(low), float(high)), abs=1e-3
    )


def test_one_value_has_no_interval() -> None:
    assert report.interval([0.5]) == (0.5, None, None)


@pytest.mark.parametrize(
    ("share", "accuracy"),
    [(0.05, 0.4), (0.1, 0.4), (0.3, 0.55), (0.75, 0.75), (1.0, 0.8), (2, 0.8)],
)
def test_accuracy_between_two_budgets_is_linear_and_outside_constant(
    share: float, accuracy: float
) -> None:
    points = {0.1: 0.4, 0.5: 0.7, 1.0: 0.8}
    assert report.at_budget(points, share) == pytest.approx(accuracy)


def test_the_nearest_prefix_counts_and_of_two_the_dearer() -> None:
    assert report.nearest([0.25, 0.75, 1.0], 0.5) == 0.75
    assert report.nearest([0.25, 0.75, 1.0], 0.49) == 0.25


def test_differences_are_paired_by_seed() -> None:
    found = compared(*policy_rows([0.82, 0.83, 0.84], 0.5), *policy_rows([0.8] * 3, 0.6, "placebo"))
    assert found.against("full") == pytest.approx((0.03, 0.03, 0.03))
    assert found.against("prefix") == pytest.approx((0.05, 0.05, 0.05))
    assert found.against("time_matched") == pytest.approx((0.13, 0.13, 0.13))
    mean, low, high = found.against("placebo") or (0, 0, 0)
    assert mean == pytest.approx(0.03)
    assert low is not None
    assert high is not None
    assert low < mean < high
    assert found.prefixes == [2, 2, 2]


def test_what_a_policy_itself_takes_counts_as_compute() -> None:
    """A rule that freezes much but costs as much is compared with what its whole price buys."""
    rows = [r | {"overhead_share": 0.4} for r in policy_rows([0.8] * 3, 0.5)]
    found = compared(*rows)
    assert found.share == pytest.approx([0.9] * 3)
    assert set(found.prefixes) <= {0, 1}  # 0.9 is half-way between both
    assert found.controls["time_matched"][1] == pytest.approx(0.7 + 0.1 * 0.8)


def test_a_seed_without_all_arms_is_left_out() -> None:
    rows = [*policy_rows([0.8, 0.8, 0.8], 0.5)[:2]]
    assert compared(*rows).seeds == [0, 1]
    assert report.compare("apf", "apf", rows, 10) is None


def test_other_epochs_and_other_options_are_other_experiments() -> None:
    rows = policy_rows([0.8] * 3, 0.5)
    assert report.compare("apf", "apf", [*controls(), *rows], 8) is None
    assert report.compare("apf", "apf:threshold=1", [*controls(), *rows], 10) is None


@pytest.mark.parametrize(
    ("accuracies", "share", "words"),
    [
        ([0.80, 0.81, 0.82], 0.5, ["1.0 points above", "better than a static prefix"]),
        ([0.70, 0.71, 0.72], 0.5, ["9.0 points below", "worse than a static prefix"]),
        ([0.70, 0.80, 0.87], 0.5, ["Within seed noise", "not shown better than a static prefix"]),
    ],
)
def test_a_verdict_claims_what_the_intervals_exclude(
    accuracies: list[float], share: float, words: list[str]
) -> None:
    text = report.verdict(compared(*policy_rows(accuracies, share)))
    assert all(word in text for word in words), text
    assert "at 50% of its compute" in text


def test_a_verdict_on_a_policy_that_saves_nothing_has_no_cheaper_controls() -> None:
    text = report.verdict(compared(*policy_rows([0.8, 0.79, 0.83], 1.0)))
    assert "prefix" not in text
    assert "cut to" not in text


def test_a_placebo_that_trains_alike_is_named() -> None:
    rows = policy_rows([0.8, 0.79, 0.83], 0.5)
    same = [r | {"arm": "placebo"} for r in rows]
    assert "its signals decided nothing" in report.verdict(compared(*rows, *same))
    other = [r | {"val_accuracy": [0.1]} for r in same]
    assert "better than a static" in report.verdict(compared(*rows, *other))
    assert "decided nothing" not in report.verdict(compared(*rows, *other))


def test_one_seed_gives_no_verdict() -> None:
    assert "no verdict" in report.verdict(compared(policy_rows([0.8] * 3, 0.5)[0]))


def test_full_fine_tuning_is_the_baseline() -> None:
    found = report.compare("full", "full", controls(), 10)
    assert found is not None
    assert found.against("full") == (0, 0, 0)
    assert report.verdict(found) == "The baseline of these comparisons."


def test_a_crash_loses_only_the_line_it_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = report.Log(path)
    log.append({"arm": "costs", "costs": {}})
    first, second = controls()[:2]
    log.append(first)
    with path.open("a") as file:
        file.write(json.dumps(second)[:30])
    again = report.Log(path)
    assert again.keys() == {report.key(first)}
    again.append(second)
    assert report.Log(path).keys() == {report.key(first), report.key(second)}
    assert again.costs is not None


def test_a_page_is_filled_again_and_again_the_same() -> None:
    page = "# x\n<!-- evidence -->\nold\n<!-- /evidence -->\nrest\n"
    once = report.filled(page, "x.md", "evidence", "new")
    assert once == "# x\n<!-- evidence -->\nnew\n<!-- /evidence -->\nrest\n"
    assert report.filled(once, "x.md", "evidence", "new") == once


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"x\.md lacks"):
        report.filled("# x\n<!-- evidence -->\n", "x.md", "evidence", "new")


def test_everything_is_written_from_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SPECS", {"full": "full", "apf": "apf"})
    monkeypatch.setattr(report, "EXCUSED", {"phases": "a reason"})
    monkeypatch.setattr(report, "CARDS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PACKAGED", tmp_path / "evidence.json")
    monkeypatch.setattr(report, "OVERHEAD", tmp_path / "overhead.json")
    overhead = {"results": [{"policy": "apf", "model": "bert", "overhead": 0.0123}]}
    (tmp_path / "overhead.json").write_text(json.dumps(overhead))
    log = report.Log(tmp_path / "log.jsonl")
    for entry in [*controls(), *policy_rows([0.7, 0.7, 0.7], 0.5)]:
        log.append(entry)
    for name in ("full", "apf", "phases"):
        (tmp_path / f"{name}.md").write_text("a\n<!-- evidence -->\n<!-- /evidence -->\nb\n")
    report.write(log.path, 10)
    pages = {p.name: p.read_text() for p in tmp_path.glob("*.md")}
    report.write(log.path, 10)
    assert pages == {p.name: p.read_text() for p in tmp_path.glob("*.md")}
    assert "Not measured: a reason." in pages["phases.md"]
    assert "worse than a static prefix" in pages["apf.md"]
    assert "1.2 % in 40 steps of BERT" in pages["apf.md"]
    assert "`apf`" in pages["evidence.md"]
    data = json.loads((tmp_path / "evidence.json").read_text())
    assert data["date"] is None
    assert data["policies"]["apf"]["overhead"] == {"bert": 1.23}
    assert data["policies"]["apf"]["vs_full"][0] == pytest.approx(-0.1)
    assert data["policies"]["apf"]["vs_placebo"] is None
    assert "full" in data["policies"]


def test_the_packaged_evidence_is_readable() -> None:
    data = json.loads(report.PACKAGED.read_text("utf-8"))
    assert data.keys() == {"setting", "date", "policies"}
    for name, entry in data["policies"].items():
        if "verdict" in entry:
            assert entry["spec"].partition(":")[0] == name
            assert entry["verdict"].endswith(".")
