"""The arithmetic of what a policy itself costs, on made-up logs."""

from __future__ import annotations

from typing import Any

import pytest

policy_overhead = pytest.importorskip("policy_overhead")


def run(
    policy: str, *, signals_s: float = 0.0, extra_s: float = 0.0, **more: Any
) -> dict[str, Any]:
    return {
        "model": "resnet20",
        "title": "ResNet-20",
        "policy": policy,
        "spec": policy,
        "policy_s": 0.0,
        "signals_s": signals_s,
        "apply_s": 0.0,
        "digest_s": 0.0,
        "widened_steps": 0,
        "widened_extra_s": extra_s,
        "wall_s": 10.0 + signals_s,
        "steps": 100,
        "full_step_predicted_s": 0.08,
        "notice": "",
    } | more


def test_charges_are_over_the_time_of_full_fine_tuning() -> None:
    runs = [run("full"), run("apf", signals_s=0.5, wall_s=4.5), run("full", wall_s=10.0)]
    found = {r["policy"]: r for r in policy_overhead.results(runs)}
    assert found["apf"]["overhead"] == pytest.approx(0.05)
    assert found["apf"]["steps_of_full"] == pytest.approx(0.4)
    assert found["full"]["overhead"] == 0


def test_a_widened_backward_pass_is_charged_in_steps_of_the_cost_model() -> None:
    runs = [run("full"), run("apf", extra_s=0.8)]
    assert policy_overhead.results(runs)[1]["overhead"] == pytest.approx(0.1)


def test_digests_are_apart() -> None:
    runs = [run("full"), run("apf", digest_s=1.0, wall_s=11.0)]
    found = policy_overhead.results(runs)[1]
    assert found["overhead"] == 0
    assert found["digests"] == pytest.approx(0.1)
    assert found["steps_of_full"] == pytest.approx(1)


def test_a_notice_is_due_where_any_model_pays() -> None:
    cheap = [run("full"), run("apf", signals_s=0.1)]
    dear = [r | {"model": "bert"} for r in (run("full"), run("apf", signals_s=0.5))]
    flags = {(r["model"], r["policy"]): r["flag"] for r in policy_overhead.results(cheap + dear)}
    assert "says nothing" in flags["resnet20", "apf"]
    assert "says nothing" in flags["bert", "apf"]
    assert not flags["bert", "full"]
    assert "never costs" in policy_overhead.flag(0.019, "dear")
    assert not policy_overhead.flag(0.021, "dear")


def test_drift_shows_in_the_baselines() -> None:
    runs = [run("full", wall_s=9.0), run("full"), run("full", wall_s=12.0)]
    assert policy_overhead.drift(runs, "resnet20") == pytest.approx((0.9, 1.2))


def test_the_table_and_the_cards_name_the_policy() -> None:
    machine = dict.fromkeys(("torch", "threads", "cores", "processor", "clock"), "x")
    runs = [run("full"), run("apf", signals_s=0.5)]
    log = {"machine": machine, "runs": runs, "results": policy_overhead.results(runs)}
    assert "| `apf` | 5.00% |" in policy_overhead.table(log)
    assert policy_overhead.report.overheads(log)["apf"] == {"resnet20": 5.0}
