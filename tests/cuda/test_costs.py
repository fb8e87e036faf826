"""Costs measured and foretold on the device: by its own clock and memory, without a trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from backends.torch.helpers import model_bits
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.frontier.foretell import foretell_steps
from frostline.groups import LayerGroups
from frostline.tasks.config import load_config
from frostline.tasks.foretell import foretell_task
from generators import generator_states


def network(device: torch.device) -> tuple[nn.Module, LayerGroups, Example]:
    torch.manual_seed(0)
    wide = 256
    blocks = [nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(0.1)) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(wide, 3)).to(device)
    example = Example((torch.randn(64, wide, device=device),))
    return model, layer_groups(model, example), example


def test_measured_costs_are_sane_and_leave_no_trace(gpu: torch.device) -> None:
    model, groups, example = network(gpu)
    before = model_bits(model), generator_states()
    measured = measure_costs(model, groups, example, repeats=2)
    assert (model_bits(model), generator_states()) == before
    for group in measured:
        cost = group.cost
        assert cost is not None
        for seconds in (cost.forward_s, cost.optimizer_s, cost.frozen_forward_s):
            assert 0 < seconds < 10, group.name
            assert math.isfinite(seconds)
        assert cost.input_grad_s >= 0
        assert cost.weight_grad_s >= 0
        assert cost.input_grad_s + cost.weight_grad_s > 0
        assert cost.activation_bytes > 0


def test_an_example_in_main_memory_is_moved(gpu: torch.device) -> None:
    model, groups, example = network(gpu)
    there = Example(tuple(t.cpu() for t in example.args))
    assert measure_costs(model, groups, there, repeats=1).measured


def test_events_of_the_device_are_the_clock(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host clock would read how fast kernels are queued, not how long they take."""
    made = 0
    event = torch.cuda.Event

    def counted(*args: Any, **kwargs: Any) -> torch.cuda.Event:
        nonlocal made
        made += 1
        return event(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "Event", counted)
    model, groups, example = network(cuda)
    measure_costs(model, groups, example, repeats=1)
    assert made > len(groups)


def test_large_products_take_the_time_of_the_device(cuda: torch.device) -> None:
    """2 x 8192^3 operations are about 1.1e12: no card does 5e14 in a second in float32."""
    wide = 8192
    model = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide)).to(cuda)
    example = Example((torch.randn(wide, wide, device=cuda),))
    measured = measure_costs(model, layer_groups(model, example), example, repeats=1)
    for group in measured:
        assert group.cost is not None
        assert 2 * wide**3 / group.cost.forward_s < 5e14


def test_foretold_steps_are_sane_and_leave_no_trace(gpu: torch.device) -> None:
    model, groups, example = network(gpu)
    for _ in range(2):  # from here on the libraries of the device have their work space
        torch.autograd.grad(model(*example.args).sum(), list(model.parameters()))
    before = model_bits(model), generator_states()
    costs = foretell_steps(model, groups, example, times=1)
    assert (model_bits(model), generator_states()) == before
    assert len(costs.depths) == len(groups)
    for depth in costs.depths:
        assert 0 < depth.step_s < 10
        assert math.isfinite(depth.step_s)
        # A Linux process may have so little to add that nothing is seen; the device counts all.
        if gpu.type == "cuda":
            assert depth.peak_memory_bytes is not None
            assert depth.peak_memory_bytes > 0
    if gpu.type == "cuda":
        memory = [d.peak_memory_bytes or 0 for d in costs.depths]
        assert memory[-1] < memory[0]  # gradients and optimizer state of what is frozen are gone
        assert memory[0] < 256 << 20  # the resident memory of a process with CUDA is more


def test_inspect_with_data(gpu: torch.device) -> None:
    settings = {
        "model": "tiny_task:tiny_model", "data": "tiny_task:tiny_data", "device": str(gpu),
        "batch_size": 16, "threads": 1, "augment": "none",
    }  # fmt: skip
    config = load_config(None, settings)
    before = generator_states()
    forecast = foretell_task(config)
    assert generator_states() == before
    assert forecast.groups.measured
    assert all(0 < d.step_s < 60 for d in forecast.steps.depths)
