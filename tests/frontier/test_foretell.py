"""What is foretold: exact on a clock that only work moves, right by counting, and without trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from frostline.backends.torch import measure
from frostline.backends.torch.backend import TorchBackend, applied_plan
from frostline.backends.torch.example import Example
from frostline.backends.torch.freeze import freeze
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.errors import FrontierError
from frostline.frontier import foretell, trial
from frostline.frontier.foretell import (
    LEAST_GAIN,
    DepthCost,
    EpochCost,
    StepCosts,
    Workload,
    foretell_epochs,
    foretell_steps,
    store_seconds,
)
from frostline.frontier.region import find_region
from frostline.frontier.trial import Recipe, any_loss
from frostline.groups import GroupCost, LayerGroups
from frostline.plan import FreezePlan
from torch_cases import picture

BATCH = 8


class FakeTime:
    """A clock that only work advances."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    process_time = perf_counter


CLOCK = FakeTime()


class Toll(torch.autograd.Function):
    """Multiplies by a weight; every part of it has the same price."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, price: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.price = price
        CLOCK.seconds += price
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        CLOCK.seconds += ctx.price * sum(ctx.needs_input_grad[:2])
        return (
            grad * weight if ctx.needs_input_grad[0] else None,
            (grad * x).sum(0) if ctx.needs_input_grad[1] else None,
            None,
        )


class Slow(nn.Module):
    """A layer of known price."""

    def __init__(self, price: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4) + 0.5)
        self.price = price

    def forward(self, x: Tensor) -> Tensor:
        return Toll.apply(x, self.weight, self.price)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    for module in (measure, trial, foretell):
        monkeypatch.setattr(module, "time", CLOCK)
    return CLOCK


PRICES = (1.0, 4.0, 2.0, 8.0, 3.0)


def slow_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Slow(price) for price in PRICES))


def slow_batch() -> Example:
    return Example((torch.randn(BATCH, 4, 4, generator=torch.Generator().manual_seed(1)),))


def batch() -> Example:
    return Example((torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(1)),))


def step_price(depth: int) -> float:
    return sum(PRICES) + sum(PRICES[depth + 1 :]) + sum(PRICES[depth:])


@pytest.mark.parametrize("anchors", [2, 3, 99])
def test_figures_are_exact_on_a_clock_that_only_work_moves(
    fake_time: FakeTime, anchors: int
) -> None:
    model = slow_chain()
    found = foretell_steps(model, layer_groups(model, slow_batch()), slow_batch(), anchors=anchors)
    assert found.batch_size == BATCH
    assert [c.depth for c in found.depths] == [0, 1, 2, 3, 4]
    assert [c.step_s for c in found.depths] == pytest.approx([step_price(d) for d in range(5)])
    assert sum(c.tried for c in found.depths) == min(anchors, 5)
    for cost in found.depths[1:]:
        assert cost.frozen == tuple("01234"[: cost.depth])
        assert cost.cached_step_s == pytest.approx(
            step_price(cost.depth) - sum(PRICES[: cost.depth])
        )
        assert cost.fill_s == pytest.approx(sum(PRICES[: cost.depth]))
        assert cost.eval_s == pytest.approx(sum(PRICES))
        assert cost.cached_eval_s == pytest.approx(sum(PRICES[cost.depth :]))


def test_what_a_step_costs_besides_its_groups_is_in_every_figure(fake_time: FakeTime) -> None:
    def loss(output: Any) -> Tensor:
        CLOCK.seconds += 100
        return any_loss(output)

    model = slow_chain()
    groups = layer_groups(model, slow_batch())
    found = foretell_steps(model, groups, slow_batch(), Recipe(loss=loss), anchors=2)
    for cost in found.depths:
        assert cost.step_s == pytest.approx(100 + step_price(cost.depth))
        if cost.depth:
            rest = step_price(cost.depth) - sum(PRICES[: cost.depth])
            assert cost.cached_step_s == pytest.approx(100 + rest)


def test_steps_are_what_training_then_takes(fake_time: FakeTime) -> None:
    model = slow_chain()
    groups = layer_groups(model, slow_batch())
    found = foretell_steps(model, groups, slow_batch(), anchors=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backend = TorchBackend(model, optimizer, groups=groups)
    for cost in found.depths:
        backend.apply(FreezePlan(frozen=frozenset(cost.frozen)))
        before = fake_time.seconds
        any_loss(model(*slow_batch().args)).backward()
        assert cost.step_s == pytest.approx(fake_time.seconds - before)


class Widths(nn.Module):
    """Frontiers of other sizes and types at every depth, two at one of them, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 16)
        self.b = nn.Linear(16, 6)
        self.c = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6 + 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        return self.head(torch.cat([self.drop(self.norm(self.c(self.b(a).relu()))), a], 1))


def widths() -> tuple[nn.Module, LayerGroups]:
    torch.manual_seed(0)
    model = Widths()
    return model, layer_groups(model, batch())


def test_bytes_are_those_that_a_region_then_fills() -> None:
    model, groups = widths()
    found = foretell_steps(model, groups, batch(), anchors=2, times=1)
    assert found.depths[0].row_bytes is None
    assert found.depths[0].refused == "nothing is frozen"
    optimizer = torch.optim.AdamW(model.parameters())
    backend = TorchBackend(model, optimizer, groups=groups)
    sizes = set()
    for cost in found.depths[1:]:
        backend.apply(FreezePlan(frozen=frozenset(cost.frozen)))
        model.train()
        rows = find_region(model, batch()).fill(batch())
        assert cost.row_bytes == sum(t.nbytes for t in rows.values()) // BATCH
        sizes.add(cost.row_bytes)
        state = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        steps = 4 * sum(p.requires_grad for p in model.parameters())  # AdamW counts per tensor
        assert abs(cost.saved_bytes - (2 * weights + state + steps)) < 4 * 12
    assert len(sizes) > 1


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_to_the_bit(*, measured: bool, training: bool) -> None:
    model, groups = widths()
    if measured:
        groups = measure_costs(model, groups, batch(), repeats=1)
    model.train(training)
    model.get_parameter("a.bias").requires_grad = False
    model(*batch().args).sum().backward()
    example = batch()
    given = example.args[0].clone()
    before = picture(model)
    foretell_steps(model, groups, example, times=1)
    assert picture(model) == before
    assert applied_plan(model) is None
    assert torch.equal(example.args[0], given)


def test_the_plan_of_a_frozen_model_is_left_in_force() -> None:
    model, groups = widths()
    plan = freeze(model, "a.*", groups=groups)
    before, trained = picture(model), set()

    def loss(output: Any) -> Tensor:
        trained.add(model.get_parameter("a.weight").requires_grad)
        return any_loss(output)

    found = foretell_steps(model, groups, batch(), Recipe(loss=loss), times=1)
    assert picture(model) == before
    assert applied_plan(model) == (groups, plan)
    # The plan is set aside meanwhile: with nothing frozen, everything trains.
    assert trained == {True, False}
    steps = [c.saved_bytes for c in found.depths]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == len(steps)


def test_a_failure_half_way_leaves_the_model_as_it_was() -> None:
    model, groups = widths()
    groups = measure_costs(model, groups, batch(), repeats=1)
    before, calls = picture(model), []

    def loss(output: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 7:
            raise RuntimeError("enough")
        return any_loss(output)

    with pytest.raises(RuntimeError, match="enough"):
        foretell_steps(model, groups, batch(), Recipe(loss=loss))
    assert picture(model) == before
    assert applied_plan(model) is None


def test_parameters_that_never_train_are_not_trained_in_trials() -> None:
    model, groups = widths()
    weight = model.get_parameter("head.weight")
    weight.requires_grad = False
    seen: set[bool] = set()

    def loss(output: Any) -> Tensor:
        seen.add(weight.requires_grad)
        return any_loss(output)

    foretell_steps(model, groups, batch(), Recipe(loss=loss), times=1, anchors=2)
    assert seen == {False}


class Mixes(nn.Module):
    """What the frozen part gives for a sample depends on the samples beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return self.head(self.b(self.a(x).relu()))


def test_what_is_measured_of_the_cache_is_there_where_something_can_be_skipped() -> None:
    model, groups = widths()
    found = foretell_steps(model, groups, batch(), anchors=2, times=1)
    assert found.depths[0].find_s == 0
    assert all(c.find_s > 0 for c in found.depths[1:])
    refused = foretell_steps(Mixes(), layer_groups(Mixes(), batch()), batch(), times=1)
    assert all(c.find_s == 0 for c in refused.depths)


def test_memory_is_not_read_again_once_the_heap_is_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, groups = widths()
    read: list[str] = []
    note = foretell._Found._note_memory

    def noted(self: Any, depth: int) -> None:
        read.append(f"memory {depth}")
        note(self, depth)

    def costs(*args: Any, **options: Any) -> Any:
        read.append("costs")
        return measure_costs(*args, **options)

    monkeypatch.setattr(foretell._Found, "_note_memory", noted)
    monkeypatch.setattr(foretell, "measure_costs", costs)
    foretell_steps(model, groups, batch(), times=1)
    deepest = len(groups) - 1
    depths = sorted({round(i * deepest / 3) for i in range(4)}, reverse=True)
    assert read == [*(f"memory {d}" for d in depths), "costs"]
    read.clear()  # nothing comes between steps where costs are known
    measured = measure_costs(model, groups, batch(), repeats=1)
    foretell_steps(model, measured, batch(), times=1, anchors=2)
    assert read == [f"memory {deepest}", "memory 0"]


def test_where_nothing_can_be_cached_the_reason_is_said() -> None:
    model = Mixes()
    groups = layer_groups(model, batch())
    steps = foretell_steps(model, groups, batch(), times=1)
    for epoch in foretell_epochs(steps, Workload(samples=100)):
        assert epoch.step.step_s > 0
        assert epoch.step.cached_step_s is None
        assert epoch.step.row_bytes is None
        assert epoch.disk_bytes is None
        assert epoch.advice == f"no: {epoch.step.refused}"
        assert len(epoch.step.refused) > 10


def test_groups_without_costs_are_measured_and_said_so() -> None:
    model = slow_chain()
    lines: list[str] = []
    groups = layer_groups(model, slow_batch())
    foretell_steps(model, groups, slow_batch(), anchors=2, times=1, progress=lines.append)
    # Memory before the costs, whose full steps would leave the heap in pieces.
    assert lines[0] == "memory with 0 to 4 of 5 groups frozen"
    assert lines[1] == "steps with 4 of 5 groups frozen"
    assert lines[2] == "costs of 5 layer groups, on a batch of 8"
    lines.clear()
    measured = measure_costs(model, groups, slow_batch(), repeats=1)
    foretell_steps(model, measured, slow_batch(), anchors=2, times=1, progress=lines.append)
    assert lines[1] == "steps with 0 of 5 groups frozen"


def test_an_example_without_samples_is_refused() -> None:
    model, groups = widths()
    with pytest.raises(FrontierError, match="without a tensor that has samples"):
        foretell_steps(model, groups, Example((3.0,)))


def test_an_output_without_gradient_is_refused() -> None:
    with pytest.raises(FrontierError, match="carries no gradient"):
        any_loss({"logits": torch.zeros(2, 2)})


# -- anchors -----------------------------------------------------------------------------------


def shape(step: tuple[float, ...], cached: tuple[float, ...] | None = None) -> Any:
    return foretell._Shape(step, cached or step, step, step)


def test_anchors_are_the_ends_and_where_figures_change_most() -> None:
    falling = shape((8.0, 7.9, 7.8, 2.0, 1.9, 1.8))
    assert foretell.anchors_among(falling, 2) == (0, 5)
    assert set(foretell.anchors_among(falling, 4)) >= {0, 2, 3, 5}
    assert foretell.anchors_among(falling, 99) == (0, 1, 2, 3, 4, 5)
    assert foretell.anchors_among(shape((1.0,)), 5) == (0,)


def test_figures_between_anchors_go_the_way_of_the_sum() -> None:
    between = foretell._between
    assert between({0: 10.0, 2: 20.0}, [0.0, 1.0, 4.0], 1) == 12.5
    assert between({0: 10.0, 2: 20.0}, [0.0, 9.0, 4.0], 1) == 20.0  # never beyond an anchor
    assert between({0: 10.0, 2: 20.0}, [3.0, 3.0, 3.0], 1) == 15.0
    assert between({1: 10.0}, [8.0, 4.0, 2.0], 2) == 5.0  # beyond the last: in proportion
    assert between({}, [1.0], 0) is None


# -- epochs ------------------------------------------------------------------------------------


def cost(**changed: Any) -> DepthCost:
    usual: dict[str, Any] = {
        "depth": 1,
        "frozen": ("a",),
        "step_s": 1.0,
        "cached_step_s": 0.2,
        "fill_s": 0.4,
        "eval_s": 0.4,
        "cached_eval_s": 0.1,
        "read_s": 0.05,
        "write_s": 0.1,
        "row_bytes": 100,
        "saved_bytes": 1000,
        "peak_memory_bytes": None,
        "tried": True,
        "find_s": 0.25,
    }
    return DepthCost(**{**usual, **changed})


def epoch(work: Workload, **changed: Any) -> EpochCost:
    (found,) = foretell_epochs(StepCosts(10, (cost(**changed),)), work)
    return found


def test_an_epoch_is_loading_steps_validation_and_saving() -> None:
    work = Workload(samples=40, val_samples=20, load_s=0.01, val_load_s=0.02, save_s=1e-3)
    found = epoch(work)
    assert found.epoch_s == pytest.approx(40 * 0.01 + 4 * 1.0 + 20 * 0.02 + 2 * 0.4 + 1)
    cached = 4 * (0.2 + 0.05) + 2 * (0.1 + 0.05) + 1
    assert found.cached_epoch_s == pytest.approx(cached)
    filling = 40 * 0.01 + 20 * 0.02 + (4 + 2) * (0.4 + 0.1)
    assert found.first_epoch_s == pytest.approx(cached + filling + 0.25)
    assert found.disk_bytes == 6000


def test_finding_the_region_is_paid_for_once() -> None:
    work = Workload(samples=40, epochs=4)
    free, slow = epoch(work, find_s=0.0), epoch(work, find_s=3.0)
    assert slow.first_epoch_s == pytest.approx((free.first_epoch_s or 0) + 3)
    assert slow.cached_epoch_s == free.cached_epoch_s
    assert slow.gain == pytest.approx((free.gain or 0) - 3 / (4 * free.epoch_s))
    assert free.break_even_epochs == 1
    assert slow.break_even_epochs == 2  # 2 s of filling and 3 of finding, 3 saved in each epoch


def test_every_view_of_a_training_sample_is_stored_and_validation_once() -> None:
    assert epoch(Workload(samples=40, val_samples=20, views=3)).disk_bytes == (3 * 40 + 20) * 100


def test_workers_hide_the_cheaper_of_loading_and_computing() -> None:
    work = Workload(samples=40, load_s=0.05, workers=2, cores=8)  # loading 2 s, steps 4 s
    assert epoch(work).epoch_s == pytest.approx(4.0)
    work = Workload(samples=40, load_s=0.5, workers=2, cores=8)  # loading 20 s by two
    assert epoch(work).epoch_s == pytest.approx(10.0)
    work = Workload(samples=40, load_s=0.05, workers=4, cores=1)  # nobody works beside anybody
    assert epoch(work).epoch_s == pytest.approx(6.0)


SECONDS = st.floats(0.01, 10)


@given(
    step=SECONDS,
    cached=SECONDS,
    fill=st.floats(0, 30),
    val_fill=st.floats(0, 30),
    views=st.integers(1, 8),
)
def test_break_even_is_what_counting_finds(
    step: float, cached: float, fill: float, val_fill: float, views: int
) -> None:
    found = foretell._break_even(step, cached, fill, val_fill, views)

    def lead(epochs: int) -> float:
        return epochs * step - foretell._run_s(cached, fill, val_fill, views, epochs)

    if found is None:
        assert lead(100_000) <= 0 or step - cached < 1e-6
    else:
        ahead = [lead(found + i) for i in range(50)]
        assert all(x >= -1e-6 * found * step for x in ahead)
        assert found == 1 or lead(found - 1) < 1e-6 * found * step


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ({}, "cache"),
        ({"cached_step_s": 0.93, "read_s": 0.0, "fill_s": 0.0, "write_s": 0.0}, "cache"),
        (
            {
                "cached_step_s": 0.96,
                "read_s": 0.0,
                "fill_s": 0.0,
                "write_s": 0.0,
                "find_s": 0.0,
            },
            "no: it would save 4.0 %, less than 5 %",
        ),
        ({"fill_s": 12.0}, "no: it pays after 17 epochs, and the run has 10"),
        ({"cached_step_s": 1.0}, "no: it would save nothing"),
    ],
)
def test_advice_is_to_cache_only_what_pays(changed: dict[str, Any], advice: str) -> None:
    found = epoch(Workload(samples=40), **changed)
    assert found.advice == advice
    assert found.worth_caching == (advice == "cache")
    assert found.worth_caching == ((found.gain or 0) >= LEAST_GAIN)


def test_one_view_more_than_the_run_has_epochs_never_pays_by_reuse() -> None:
    assert not epoch(Workload(samples=40, views=10, epochs=10), fill_s=1.0).worth_caching
    assert epoch(Workload(samples=40, views=2, epochs=10), fill_s=1.0).worth_caching


def test_json_has_all_of_it_on_one_level() -> None:
    told = epoch(Workload(samples=40)).to_json()
    names = {*DepthCost.__dataclass_fields__, *EpochCost.__dataclass_fields__} - {"step"}
    assert told.keys() == names | {"worth_caching"}


# -- parts -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_growth_sees_what_was_used_and_freed() -> None:
    memory = trial.PeakGrowth(torch.device("cpu"))
    memory.start()
    if memory.read() is None:
        pytest.skip("this kernel does not let its mark be reset")
    big = torch.ones(2**24)  # 64 MiB
    del big
    grown = memory.read()
    assert grown is not None
    assert 60 * 2**20 < grown < 80 * 2**20
    memory.start()
    again = memory.read()
    assert again is not None
    assert again < 8 * 2**20


_PEAKS = """
import json
import torch
from torch import nn
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.frontier.foretell import foretell_steps

torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)), nn.Linear(512, 2))
example = Example((torch.randn(256, 512),))
found = foretell_steps(model, layer_groups(model, example), example, times=1, anchors=3)
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps([weights, [c.peak_memory_bytes for c in found.depths]]))
"""


def test_peak_memory_counts_weights_and_falls_with_depth() -> None:
    # A process of its own: what the allocator of an old one keeps is no matter of the model.
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True, timeout=120
    )
    weights, peaks = json.loads(done.stdout)
    if None in peaks:
        pytest.skip("memory is not known on this system")
    # Everything trains: besides the weights gradients and two states, what the optimizer takes
    # for the length of an update (twice the weights), and activations (1.2 times).
    assert 3.5 * weights < peaks[0] < 10 * weights
    assert weights < peaks[-1] < 2.5 * weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_rows_of_any_type_are_tried_in_a_store(dtype: torch.dtype, tmp_path: Any) -> None:
    rows = {"a": torch.ones(40, 3, dtype=dtype), "b": torch.zeros(40)}
    write_s, read_s = store_seconds(rows, tmp_path, times=1)
    assert write_s > 0
    assert read_s > 0
    assert list(tmp_path.iterdir()) == []


def test_times_are_disturbed_when_others_have_the_processor() -> None:
    assert StepCosts(1, (), spent_s=10, processor_s=7).disturbed
    assert not StepCosts(1, (), spent_s=10, processor_s=9).disturbed
    assert not StepCosts(1, (), spent_s=10, processor_s=20).disturbed


@pytest.mark.parametrize("cut", [lambda e: e.args[0], lambda e: e.args[1]["x"]])
def test_few_samples_cut_every_tensor_with_samples(cut: Callable[[Example], Tensor]) -> None:
    example = Example((torch.zeros(8, 2), {"x": torch.zeros(8)}), {"mask": torch.zeros(5, 5)})
    few = foretell._few_samples(example, 8)
    assert len(cut(few)) == foretell.FEW
    assert few.kwargs["mask"].shape == (5, 5)
    small = Example((torch.zeros(3, 2),))
    assert foretell._few_samples(small, 3) is small


def test_groups_without_any_cost_do_not_divide_by_zero() -> None:
    model, groups = widths()
    groups = groups.with_costs({g.name: GroupCost() for g in groups})
    found = foretell_steps(model, groups, batch(), times=1, anchors=2)
    assert all(c.step_s > 0 for c in found.depths)
