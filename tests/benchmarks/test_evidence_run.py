"""Runs of the evidence on a handful of random pictures: what is trained and what is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from frostline import FreezePlan, LayerGroups, Policy
from frostline.clock import Duration
from frostline.cost import predicted_step_s
from frostline.groups import GroupCost
from frostline.policy import Event, State
from frostline.signals import Need
from models_for_tests import resnet20

evidence = pytest.importorskip("evidence")

COSTS = {
    name: GroupCost(forward_s=1, input_grad_s=1, weight_grad_s=1)
    for name in ("conv1", *(f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)), "linear")
}


@pytest.fixture(scope="module")
def case() -> Any:
    torch.manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(count, 3, 32, 32), torch.arange(count) % 4

    weights = {n: w for n, w in resnet20().state_dict().items() if "num_batches" not in n}
    return evidence.Case(split(64), split(8), split(8), weights)


def run(case: Any, arm: str, spec: Any, **more: Any) -> dict[str, Any]:
    job = evidence.Job(arm, spec, more.pop("seed", 0), more.pop("epochs", 2), **more)
    return evidence.Run(case, job, COSTS).result()


@dataclass(frozen=True, slots=True)
class Wide(Policy):
    """Freezes the backbone and reads its gradients at every other step all the same."""

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", Duration.parse("2st"), frozen_too=True),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(frozen=groups.backbone), state


@dataclass(frozen=True, slots=True)
class Done(Policy):
    """Has nothing more to gain."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(done=True), state


def share(*frozen: str) -> float:
    return _predicted(FreezePlan(frozen=frozenset(frozen))) / _predicted(FreezePlan())


def _predicted(plan: FreezePlan) -> float:
    model = resnet20(4)
    groups = evidence.layer_groups(model, evidence.Example((torch.randn(2, 3, 32, 32),)))
    return predicted_step_s(groups.with_costs(COSTS), plan)


def test_full_fine_tuning_is_the_unit_of_compute(case: Any) -> None:
    found = run(case, "full", "full")
    assert found["step_share"] == pytest.approx(1)
    assert found["steps"] == found["whole_run_steps"] == 4
    assert found["frozen_share"] == 0


def test_a_prefix_costs_what_the_cost_model_says(case: Any) -> None:
    found = run(case, "prefix", "first:groups=2")
    assert found["step_share"] == pytest.approx(share("conv1", "layer1.0"))
    assert found["frozen_share"] == pytest.approx(2 / 11)
    assert found["holds"] > 0


def test_half_the_budget_is_half_the_steps_and_half_the_compute(case: Any) -> None:
    found = run(case, "budget", "full", budget=50)
    assert found["steps"] == 2
    assert found["step_share"] == pytest.approx(0.5)


def test_a_widened_step_costs_a_full_one(case: Any) -> None:
    found = run(case, "policy", Wide())
    assert found["widened_steps"] == 2
    assert found["step_share"] == pytest.approx((1 + share(*list(COSTS)[:-1])) / 2)
    assert found["overhead_share"] > 0


def test_a_policy_that_is_done_ends_the_run_and_pays_for_what_it_ran(case: Any) -> None:
    found = run(case, "policy", Done())
    assert found["steps"] == 2
    assert found["step_share"] == pytest.approx(0.5)


def test_the_same_job_gives_the_same_figures(case: Any) -> None:
    one, two = (run(case, "full", "full", seed=3, epochs=1) for _ in range(2))
    assert one["val_accuracy"] == two["val_accuracy"]
    assert one["test_accuracy"] == two["test_accuracy"]


def test_the_grid_has_controls_per_seed_and_placebos_of_what_reads_signals() -> None:
    specs = {"full": "full", "gradual": "gradual", "apf": "apf"}
    grid = list(evidence.jobs(specs, [0, 1], 10, groups=11))
    assert len(grid) == len(set(grid)) == 2 * (1 + 10 + 9 + 2 + 1)
    assert [j.arm for j in grid if j.spec == "apf" and j.seed == 1] == ["policy", "placebo"]
    assert grid[0].arm == "full"


def test_a_policy_with_rates_of_its_own_starts_from_a_constant_one() -> None:
    """Else its schedule would be multiplied with another, and the comparison be unfair to it."""
    assert evidence.settings(2).schedule == "cosine"
    own = evidence.settings(2, own_rates=True)
    assert (own.schedule, own.warmup) == ("constant", "0st")
    assert evidence.settings(2).lr == own.lr
