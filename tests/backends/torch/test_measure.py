"""Measured costs: exact where a clock of our own advances, plausible where the real one does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.backends.torch import measure
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.cost import predicted_step_s
from frostline.errors import ModelError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from torch_cases import AWKWARD, Meddler, picture


class FakeTime:
    """A clock that only work advances: marks cost nothing, so figures are exact."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTime]:
    clock = FakeTime()
    monkeypatch.setattr(measure, "time", clock)
    yield clock
    Work.clock = None


class Work(torch.autograd.Function):
    """Multiplies by a weight, and takes the time it is told for each part."""

    clock: FakeTime | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, costs: tuple[float, ...]) -> Tensor:
        assert Work.clock is not None
        Work.clock.seconds += costs[0]
        ctx.save_for_backward(x, weight)
        ctx.costs = costs
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        assert Work.clock is not None
        x, weight = ctx.saved_tensors
        Work.clock.seconds += ctx.costs[1] * ctx.needs_input_grad[0]
        Work.clock.seconds += ctx.costs[2] * ctx.needs_input_grad[1]
        return (
            grad * weight if ctx.needs_input_grad[0] else None,
            (grad * x).sum(0) if ctx.needs_input_grad[1] else None,
            None,
        )


class Timed(nn.Module):
    """A layer of known cost: forward, input gradient, weight gradient, frozen forward."""

    def __init__(self, *costs: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.costs = costs

    def forward(self, x: Tensor) -> Tensor:
        forward, *backward, frozen = self.costs
        recording = torch.is_grad_enabled()
        return Work.apply(x, self.weight, (forward if recording else frozen, *backward))


COSTS = {"0": (1.0, 2.0, 3.0, 0.5), "2": (4.0, 5.0, 6.0, 4.0), "3": (7.0, 8.0, 9.0, 6.0)}
X = torch.ones(2, 4, 4)


def timed_chain() -> nn.Module:
    return nn.Sequential(Timed(*COSTS["0"]), nn.ReLU(), Timed(*COSTS["2"]), Timed(*COSTS["3"]))


def test_known_costs_are_found_exactly(fake_time: FakeTime) -> None:
    Work.clock = fake_time
    model = timed_chain()
    groups = layer_groups(model, Example(args=(X,)))
    assert groups.names == ("0", "2", "3")
    measured = measure_costs(model, groups, Example(args=(X,)))
    for group in measured:
        assert group.cost is not None
        forward, through, weights, frozen = COSTS[group.name]
        assert group.cost.forward_s == pytest.approx(forward)
        # The first group never needs a gradient for its input.
        assert group.cost.input_grad_s == pytest.approx(through if group.depth else 0.0)
        assert group.cost.weight_grad_s == pytest.approx(weights)
        assert group.cost.frozen_forward_s == pytest.approx(frozen)
    plan = FreezePlan(frozen=frozenset({"0", "2"}))
    assert predicted_step_s(measured, plan) == pytest.approx(0.5 + 4 + 7 + 9)


def test_branches_each_have_a_first_group(fake_time: FakeTime) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a0, self.a1 = Timed(1, 2, 3, 1), Timed(1, 2, 3, 1)
            self.b0, self.b1 = Timed(1, 2, 3, 1), Timed(1, 4, 3, 1)
            self.head = Timed(1, 5, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a1(self.a0(x)) + self.b1(self.b0(x)))

    Work.clock = fake_time
    model = Branches()
    example = Example(args=(X,))
    measured = measure_costs(model, layer_groups(model, example), example)
    found = {g.name: g.cost.input_grad_s for g in measured if g.cost}
    assert found == pytest.approx({"a0": 0, "a1": 2, "b0": 0, "b1": 4, "head": 5})


def test_a_block_that_uses_a_layer_of_another_group_keeps_its_own_time(
    fake_time: FakeTime,
) -> None:
    class Block(Timed):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__(10, 20, 30, 10)
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.shared(x))

    Work.clock = fake_time
    shared = Timed(1, 2, 3, 1)
    model = nn.Sequential(shared, Block(shared))
    example = Example(args=(X,))
    groups = layer_groups(model, example, boundaries=["1"])
    measured = measure_costs(model, groups, example)
    assert {g.name: g.cost.forward_s for g in measured if g.cost} == {"0": 2, "1": 10}


def test_kept_bytes_are_counted_once_without_weights_and_inputs() -> None:
    # Kept: the input of each layer (the batch itself apart) and ReLU's output, which is the
    # same storage as the next layer's input.
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.Linear(32, 2))
    example = Example(args=(torch.ones(5, 8),))
    measured = measure_costs(model, layer_groups(model, example), example, repeats=1)
    kept = {g.name: g.cost.activation_bytes for g in measured if g.cost}
    assert kept == {"0": 5 * 16 * 4, "2": 0, "3": 5 * 32 * 4}


def check_sane(groups: LayerGroups) -> None:
    assert groups.measured
    for group in groups:
        assert group.cost is not None
        assert min(group.cost.forward_s, group.cost.input_grad_s, group.cost.weight_grad_s) >= 0
        assert group.cost.optimizer_s > 0
        assert (group.cost.forward_s > 0) == (group.calls > 0), group.name
    assert groups[0].cost is not None
    assert groups[0].cost.input_grad_s == 0


@pytest.mark.parametrize("name", sorted(AWKWARD.keys() - {"Meddler"}))
def test_awkward_models_are_measured_and_left_untouched(name: str) -> None:
    kind, args = AWKWARD[name]
    model = kind()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.children(), model).eval()
    example = Example(args=args)
    groups = layer_groups(model, example)
    before = picture(model)
    measured = measure_costs(model, groups, example, repeats=1)
    assert picture(model) == before
    assert measured == groups.with_costs({g.name: g.cost for g in measured if g.cost})
    check_sane(measured)


def test_no_hook_of_the_users_optimizer_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: pytest.fail("accumulated"))
    example = Example(args=(torch.ones(2, 4),))
    check_sane(measure_costs(model, layer_groups(model, example), example, repeats=1))


def test_batch_norm_on_one_sample_is_measured_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    example = Example(args=(torch.ones(1, 4),))
    before = picture(model)
    check_sane(measure_costs(model, layer_groups(model, example), example, repeats=1))
    assert picture(model) == before


def test_a_step_that_fails_leaves_the_model_untouched() -> None:
    class Refuses(Meddler):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if torch.is_grad_enabled():
                raise RuntimeError("no training here")
            return out

    model = Refuses()
    example = Example(args=(torch.ones(2, 4),))
    groups = layer_groups(model, example)
    before = picture(model)
    with pytest.raises(ModelError, match="no training here"):
        measure_costs(model, groups, example)
    assert picture(model) == before


def test_an_output_without_gradient_is_refused() -> None:
    class Labels(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input).argmax(-1)

    model = nn.Sequential(Labels(4, 2))
    example = Example(args=(torch.ones(2, 4),))
    groups = layer_groups(model, example)
    with pytest.raises(ModelError, match="carries no gradient"):
        measure_costs(model, groups, example)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_of_the_device_are_the_clock_there() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).cuda()
    example = Example(args=(torch.ones(8, 64),))
    check_sane(measure_costs(model, layer_groups(model, example), example, repeats=2))
