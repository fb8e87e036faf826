"""The parts of a run's time add up, and predictions are those of the cost model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.plan import FreezePlan
from frostline.policy import Decision
from frostline.records import RunRecord, read_run
from frostline.report.costs import PARTS, predicted_share, time_parts
from report_records import plan, write_run

SECONDS = st.floats(0, 100)


@given(SECONDS, SECONDS, st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_the_parts_of_a_run_add_up_to_all_of_it(training, outside, parts):
    names = ("policy_s", "signals_s", "apply_s", "digest_s")
    costs = dict(zip(names, parts[:4], strict=True))
    cache = dict(zip(("find_s", "fill_s", "read_s", "check_s"), parts[4:], strict=True))
    spent = training + sum(parts)
    summary = {**costs, "cache": cache, "measure_s": 1.0, "training_s": spent,
               "wall_s": spent + 1.0 + outside}  # fmt: skip
    found = time_parts(RunRecord(Path("r"), {}, (), (), None, summary, torn=False))
    assert found is not None
    assert found.keys() == PARTS.keys()
    assert sum(found.values()) == pytest.approx(summary["wall_s"])
    assert found["training"] == pytest.approx(training)
    assert found["cache"] == pytest.approx(sum(parts[4:]))
    assert min(found.values()) >= 0


def test_an_unfinished_run_has_no_parts(tmp_path: Path):
    assert time_parts(read_run(write_run(tmp_path / "run", finished=False))) is None


@pytest.mark.parametrize(
    ("decisions", "share"),
    [
        # A step of three groups costs 3 forward, 2 input gradients, 3 weight gradients.
        ([Decision(0, plan())], 1.0),
        ([Decision(0, plan("stem", "body"))], 4 / 8),
        ([Decision(0, plan("stem", "body")), Decision(10, plan())], (4 / 8 + 1) / 2),
        ([Decision(0, plan("stem")), Decision(5, plan()), Decision(5, plan("stem"))], 6 / 8),
    ],
)
def test_the_predicted_share_is_the_mean_over_updates(tmp_path, decisions, share):
    record = read_run(write_run(tmp_path / "run", decisions=decisions))
    assert predicted_share(record) == pytest.approx(share)


def test_batches_from_the_cache_leave_out_the_frozen_prefix(tmp_path: Path):
    frozen = [Decision(0, plan("stem", "body"))]
    cache = {"batches": 10, "replayed": 5}
    record = read_run(write_run(tmp_path / "run", decisions=frozen, costs={"cache": cache}))
    assert predicted_share(record) == pytest.approx((4 / 8 + 2 / 8) / 2)


def test_without_measured_costs_nothing_is_predicted():
    header = {"groups": {"a": 1}, "head": ["a"], "costs": {}}
    decisions = (Decision(0, FreezePlan()),)
    assert (
        predicted_share(RunRecord(Path("r"), header, (), decisions, None, {"steps": 1}, torn=False))
        is None
    )
