"""What a run may take: updates, seconds or operations, and what becomes of its schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline.backends.torch.example import Example
from frostline.backends.torch.flops import count_flops
from frostline.backends.torch.grouping import layer_groups
from frostline.errors import ConfigError
from frostline.plan import FreezePlan
from frostline.tasks.allowance import Allowance, Budget, step_flops
from frostline.tasks.config import load_config
from frostline.tasks.run import Run
from frostline.testing import example_groups
from run_bits import run_bits

TINY: dict[str, Any] = {
    "model": "tiny_task:tiny_model",
    "data": "tiny_task:tiny_data",
    "policy": "gradual:until=50%",
    "epochs": 4,
    "batch_size": 8,
    "lr": 0.01,
    "patience": None,
    "threads": 1,
    "device": "cpu",
    "cache": "off",
}
PER_EPOCH = 6  # 49 samples in batches of 8; a last one of a single sample joins the one before


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


@pytest.mark.parametrize("text", ["500", "1ep", "30%", "0s", "-1s", "1.5st", "inf s", "nan s", ""])
def test_what_is_no_budget_is_refused_with_what_would_be(text: str):
    with pytest.raises(ConfigError, match="500st"):
        load_config(None, {**TINY, "budget": text})


@given(st.sampled_from(["st", "s", "flop"]), st.integers(1, 10**15))
def test_budgets_are_read_back(unit: str, amount: int):
    budget = Budget.parse(f"{amount} {unit}")
    assert Budget.parse(str(budget)).amount == pytest.approx(amount, rel=1e-8)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=30))
def test_the_share_never_falls_and_ends_at_one(costs: list[float]):
    spent = [0.0]
    allowance = Allowance(Budget(10.0, "s"), 3, 10, seconds=lambda: spent[0])
    shares = []
    for step, cost in enumerate(costs, 1):
        spent[0] += cost
        shares.append(allowance.share(step))
        assert step < allowance.expected_steps(step) or allowance.spent(step) or step >= 30
    assert shares == sorted(shares)
    assert allowance.spent(30)
    assert allowance.spent(len(costs)) == (spent[0] >= 10 or len(costs) >= 30)


def fitted(tmp_path: Path, name: str = "run", **change: Any) -> tuple[Run, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    run = frostline.fit(**TINY | change, output=tmp_path / name, on_event=events.append)
    return run, [event for event in events if event["kind"] == "step"]


def test_updates_end_amid_an_epoch_with_the_rate_at_its_end(tmp_path: Path):
    run, steps = fitted(tmp_path, budget="9st")
    assert run.summary["steps"] == 9
    assert [line["step"] for line in run.record.epochs] == [PER_EPOCH, 9]
    assert run.summary["budget_spent"]
    assert steps[-1]["lr"] < 0.05 * max(step["lr"] for step in steps)
    # "50%" is of what the budget allows.
    assert run.record.decisions[-1].step == pytest.approx(9 / 2, abs=1)


def test_a_budget_beyond_the_epochs_changes_nothing(tmp_path: Path):
    plain, _ = fitted(tmp_path, "plain")
    more, _ = fitted(tmp_path, "more", budget="1000st")
    assert plain.metrics == more.metrics
    assert not more.summary["budget_spent"]


@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_run_under_a_budget_of_operations_is_the_same(tmp_path: Path, stop: int):
    whole, _ = fitted(tmp_path, "probe", policy="full", budget="1e12flop")
    assert not whole.summary["budget_spent"]
    change = {"policy": "gradual:until=50%", "budget": f"{flops_of(10):.0f}flop"}
    straight, _ = fitted(tmp_path, "straight", **change)
    assert straight.summary["budget_spent"]
    assert 10 <= straight.summary["steps"] < 4 * PER_EPOCH

    def interrupt(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == stop:
            raise KeyboardInterrupt

    settings = TINY | change | {"output": tmp_path / "again", "checkpoint_every": "1st"}
    with pytest.raises(KeyboardInterrupt):
        frostline.fit(**settings, on_event=interrupt)
    again = frostline.fit(**settings)
    assert run_bits(again.path)["summary"] == run_bits(straight.path)["summary"]
    assert again.metrics == straight.metrics


def flops_of(steps: int) -> float:
    """Operations of so many updates of full fine-tuning of the tiny task."""
    from frostline.tasks.task import load_task

    task = load_task(load_config(None, TINY))
    example = task.example(2)
    groups = layer_groups(task.model, example, head=task.head)
    forward = count_flops(task.model, groups, example, samples=2)
    return step_flops(groups, forward, FreezePlan()) * 8 * steps


def test_seconds_end_a_run_and_its_rate_has_fallen(tmp_path: Path):
    run, steps = fitted(tmp_path, budget="0.05s", epochs=4000)
    assert run.summary["budget_spent"]
    assert run.summary["training_s"] >= 0.05
    assert 1 <= run.summary["steps"] < 4000 * PER_EPOCH
    assert steps[-1]["lr"] < max(step["lr"] for step in steps) or len(steps) < 3


def test_operations_are_those_of_the_shapes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    batch = Example((torch.ones(2, 3, 4, 4),))
    found = count_flops(model, layer_groups(model, batch), batch, samples=2)
    assert found == {"0": 2 * 16 * 8 * 27, "2": 2 * 128 * 5}


def test_freezing_a_prefix_saves_its_backward_and_freezing_amid_only_its_weights():
    groups = example_groups(4)
    forward = {g.name: 1.0 for g in groups}
    full = step_flops(groups, forward, FreezePlan())
    prefix = step_flops(groups, forward, FreezePlan(frozen=frozenset(groups.names[:2])))
    amid = step_flops(groups, forward, FreezePlan(frozen=frozenset(groups.names[1:2])))
    assert (full - prefix, full - amid) == (4.0, 1.0)


def test_a_pause_leaves_a_run_that_goes_on_as_if_there_had_been_none(tmp_path: Path):
    straight, _ = fitted(tmp_path, "straight")
    for pause in (1, 3):
        paused = frostline.fit(**TINY, output=tmp_path / "paused", pause_after=pause)
        assert len(paused.metrics) == pause
        assert not paused.record.finished
    again = frostline.fit(**TINY, output=tmp_path / "paused")
    assert run_bits(again.path) == run_bits(straight.path)
