"""What trains, what is random and what depends on the batch is live; and all that follows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.frontier.taint import KeptWrites, Looks, Streams, Taint


class Watched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Linear(4, 4).requires_grad_(requires_grad=False)
        self.moving = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.plain = torch.ones(4)


class Watch:
    """A model, a batch, and what watches them."""

    def __init__(self) -> None:
        self.model = Watched()
        self.batch = torch.randn(5, 4)
        self.kept: list[Tensor] = []
        self.taint = Taint(self.model, [self.batch], self.kept.append)


@pytest.fixture
def watch() -> Watch:
    return Watch()


def live(watch: Watch, run: Callable[[Any, Tensor], Tensor]) -> bool:
    with Looks(watch.taint), watch.taint:
        found = run(watch.model, watch.batch)
    return watch.taint.is_live(found)


ELSEWHERE = torch.ones(4)
FROZEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "layer": lambda m, x: m.still(x),
    "buffer": lambda m, x: x + m.table,
    "attribute": lambda m, x: x * m.plain,
    "number": lambda m, x: x + torch.tensor(2.0),
    "factory": lambda m, x: x + torch.ones(4) * torch.arange(4),
    "dropout that is off": lambda m, x: F.dropout(x, 0.5, training=False),
    "attention without dropout": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "batch norm by running statistics": lambda m, x: F.batch_norm(
        x, torch.zeros(4), torch.ones(4), training=False
    ),
    "array": lambda m, x: x + torch.from_numpy(np.ones(4, np.float32)),
    "after a look at frozen values": lambda m, x: x + torch.tensor(float(m.still.weight.sum())),
    "layer norm": lambda m, x: F.layer_norm(x, (4,)),
    "instance norm": lambda m, x: F.instance_norm(x[:, None]),
    "a copy beside a live value": lambda m, x: (m.moving(x), m.still(x))[1],
}
LIVE: dict[str, Callable[[Any, Tensor], Any]] = {
    "layer": lambda m, x: m.moving(x),
    "after a layer": lambda m, x: m.still(m.moving(x)),
    "detached": lambda m, x: m.moving(x).detach() * 2,
    "without gradient": lambda m, x: torch.no_grad()(m.moving)(x),
    "view": lambda m, x: m.moving(x).view(-1)[3:].reshape(1, -1),
    "weight through data": lambda m, x: x @ m.moving.weight.data,
    "added": lambda m, x: m.still(x) + m.moving(x),
    "written in place": lambda m, x: m.still(x).add_(m.moving(x).detach()),
    "copied in place": lambda m, x: torch.zeros(5, 4).copy_(m.moving(x).detach()),
    "out": lambda m, x: torch.mul(m.moving.weight.data, 2, out=torch.empty(4, 4)),
    "index of": lambda m, x: x[m.moving(x).argmax(0)],
    "dropout": lambda m, x: F.dropout(x, 0.5, training=True),
    "noise": lambda m, x: x + torch.randn(4),
    "noise in place": lambda m, x: torch.zeros(4).normal_(),
    "own generator": lambda m, x: torch.rand(4, generator=torch.Generator()),
    "attention with dropout": lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "batch norm": lambda m, x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
    "batch norm without statistics": lambda m, x: F.batch_norm(x, None, None, training=True),
    "of unseen origin": lambda m, x: x + ELSEWHERE,
    "through NumPy": lambda m, x: x + torch.from_numpy(m.moving(x).detach().numpy() * 2),
    "after a look": lambda m, x: x + torch.tensor(float(m.moving.weight.detach().sum())),
    "after a list": lambda m, x: x + torch.tensor(m.moving.bias.tolist()),
}


@pytest.mark.parametrize("run", FROZEN.values(), ids=FROZEN)
def test_frozen(watch: Watch, run: Any):
    assert not live(watch, run)


@pytest.mark.parametrize("run", LIVE.values(), ids=LIVE)
def test_live(watch: Watch, run: Any):
    assert live(watch, run)


def test_views_of_what_was_written_into_are_live(watch: Watch):
    with watch.taint:
        whole = watch.model.still(watch.batch)
        part = whole[:, 1:]
        assert not watch.taint.is_live(part)
        whole[:, 0].copy_(watch.model.moving(watch.batch)[:, 0].detach())
        assert watch.taint.is_live(part)
        assert watch.taint.is_live([{"a": part}])


def test_a_batch_that_wants_a_gradient_is_live():
    model = Watched()
    batch = torch.ones(2, 4, requires_grad=True)
    assert Taint(model, [batch], print).is_live(batch)
    assert not Taint(model, [batch.detach().clone()], print).is_live(model.table)


def test_marked_values_are_live(watch: Watch):
    watch.taint.mark([watch.model.still.weight])
    assert live(watch, lambda m, x: m.still(x))
    assert not live(watch, lambda m, x: x + m.table)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (LIVE["dropout"], "draws random numbers"),
        (LIVE["batch norm"], "statistics of the batch"),
        (LIVE["of unseen origin"], "origin PyTorch does not see"),
        (LIVE["after a look"], "looking at a value that trains"),
    ],
)
def test_the_reason_is_told_once(watch: Watch, run: Any, why: str):
    live(watch, run)
    assert why in str(watch.taint.take_why())
    assert watch.taint.take_why() is None


def test_writes_to_parameters_and_buffers_are_noted_and_kept(watch: Watch):
    with watch.taint, torch.no_grad():
        watch.model.table[1:].add_(1)
        watch.model.still.weight.data.view(-1).mul_(2)
        torch._foreach_mul_([watch.model.moving.bias], 2)
        torch.add(watch.model.plain, 1)
    assert watch.taint.written == {"table", "still.weight", "moving.bias"}
    assert {id(t) for t in watch.kept} == {
        id(watch.model.table), id(watch.model.still.weight), id(watch.model.moving.bias)
    }  # fmt: skip


def test_what_is_kept_is_what_it_was(watch: Watch):
    seen = []
    taint = Taint(watch.model, [], lambda tensor: seen.append(tensor.tolist()))
    with taint:
        watch.model.table.add_(1)
    assert seen == [[1.0] * 4]


def test_first_writes_are_kept_without_following_anything():
    model = Watched()
    seen: list[Any] = []
    with KeptWrites(model, lambda p: seen.append((p, p.detach().clone()))), torch.no_grad():
        _ = model.still(torch.ones(1, 4))
        assert seen == []
        before = model.still.weight.clone()
        model.still.weight[0].div_(2)
    assert seen[0][0] is model.still.weight
    assert torch.equal(seen[0][1], before)


def test_shapes_that_depend_on_values_are_noticed(watch: Watch):
    with watch.taint:
        _ = watch.batch + 1
        assert not watch.taint.dynamic
        _ = watch.batch.nonzero()
        assert watch.taint.dynamic
        watch.taint.dynamic = False
        _ = watch.batch[watch.batch > 0]
        assert watch.taint.dynamic


def test_work_is_counted_on_the_side_where_it_is(watch: Watch):
    with watch.taint:
        watch.model.still(watch.batch)
    once = watch.taint.work_frozen
    assert once == 2 * 5 * 4 * 4
    assert watch.taint.work_live == 0
    with watch.taint:
        watch.model.moving(watch.batch)
        watch.model.still(watch.batch)
    assert watch.taint.work_live == once
    assert watch.taint.work_frozen == 2 * once


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_drawn_number_makes_what_is_made_of_it_live(watch: Watch, draw: Any):
    streams = watch.taint.streams
    assert not streams.look()
    number = draw()
    assert streams.look()
    assert streams.moved_here
    assert not streams.look()
    assert streams.moved_here  # until the caller says that its code is over
    assert live(watch, lambda m, x: torch.tensor(number) * torch.ones(3))
    streams.moved_here = False
    assert not live(watch, lambda m, x: torch.ones(3) + 1)


def test_streams_only_look():
    before = random.getstate()
    streams = Streams()
    streams.look()
    assert random.getstate() == before
