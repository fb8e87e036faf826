"""The frozen region of models drawn at random, against their plain forward pass.

A model is a list of steps over a growing list of values: layers that train or not, called once or
again, residuals, blocks in blocks, several inputs and outputs, in-place writes, views, noise, batch
statistics, looks at values, counters. Whatever the model is, a replay gives what the plain pass
gives: outputs, gradients, buffers and random streams. Where nothing odd happens, the region also
is as large as it can be: every call that reads no live value is left out.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.errors import FrontierError
from frostline.frontier.finding import rows_of
from frostline.frontier.region import Region, ReplayDiverged, find_region
from frostline.frontier.structure import tensors_of

WIDTH = 4
SAMPLES, BLOCK = 12, 6
BATCHES = ((4, 1, 9, 7, 0), (2, 8, 5), (11, 3, 6, 10))
TOLERANCE = 1e-9

FRIENDLY = (
    "linear", "relu", "norm", "eval batchnorm", "eval dropout", "again", "add", "times", "join",
    "swap", "scale", "detach", "block", "pair", "table",
)  # fmt: skip
ODD = (
    "batchnorm", "dropout", "add_", "relu_", "view_", "noise", "center", "look", "count",
    "no_grad", "stash", "fill_",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step of a random model.

    Attributes:
        what: see `Drawn.forward`.
        a: which value it reads; counted from the newest.
        b: which other one.
        trains: whether its own parameters train.
        module: the earlier module it calls, for "again".
    """

    what: str
    a: int = 0
    b: int = 0
    trains: bool = False
    module: int = 0


@dataclass(frozen=True)
class Plan:
    """A random model: its steps, inputs, and the values it returns."""

    steps: tuple[Step, ...]
    inputs: int = 1
    outputs: tuple[int, ...] = (0,)
    kind: str = "tuple"


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
        return self.linear(torch.cat([a, b], 1))


class Block(nn.Module):
    """Two layers and a residual; the second may train while the first does not."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))
        self.two = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"left": self.left(x), "more": (self.right(x), 3)}


class Count(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 1.5


_MODULES: Mapping[str, Any] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no_grad": lambda: nn.Linear(WIDTH, WIDTH),
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batchnorm": lambda: nn.BatchNorm1d(WIDTH),
    "eval batchnorm": lambda: nn.BatchNorm1d(WIDTH).eval(),
    "dropout": lambda: nn.Dropout(0.4),
    "eval dropout": lambda: nn.Dropout(0.4).eval(),
    "join": Join,
    "block": Block,
    "pair": Pair,
    "count": Count,
}


class Drawn(nn.Module):
    """The model of a plan, in double precision and with noise in all it has."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.register_buffer("table", torch.linspace(-1, 1, WIDTH))
        self.stash: Tensor | None = None
        self.trained: list[Tensor] = []
        for step in plan.steps:
            if step.what in _MODULES:
                layer = _MODULES[step.what]()
                self.layers.append(layer)
                trains = step.trains
                for place, parameter in enumerate(layer.parameters()):
                    # Of a block, the first layer trains or the second, or neither.
                    half = step.what == "block" and (step.a + step.b) % 2 == place // 2
                    parameter.requires_grad_(trains and not half)
            elif step.what == "scale":
                self.scales.append(nn.Parameter(torch.ones(WIDTH), requires_grad=step.trains))
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.6)
        self.double()

    def forward(self, x: Tensor, **more: Tensor) -> Any:
        values = [x, *more.values()]
        modules, scales = iter(self.layers), iter(self.scales)
        called: list[nn.Module] = []
        for step in self.plan.steps:
            a, b = values[-1 - step.a % len(values)], values[-1 - step.b % len(values)]
            if step.what.endswith("_") and any(a is v for v in values[: self.plan.inputs]):
                a = a * 1.0
            module = next(modules) if step.what in _MODULES else None
            if module is not None and step.what not in ("join", "pair", "no_grad"):
                called.append(module)
            values.append(self._step(step, a, b, module, called, scales))
        found = [values[-1 - place % len(values)] for place in self.plan.outputs]
        if self.plan.kind == "dict":
            return {str(i): value for i, value in enumerate(found)}
        return tuple(found) if self.plan.kind == "tuple" else found[0]

    def _step(  # noqa: PLR0912
        self, step: Step, a: Tensor, b: Tensor, module: Any, called: Any, scales: Any
    ) -> Any:
        match step.what:
            case "join":
                return module(a, b=b)
            case "pair":
                found = module(a)
                return found["left"] * found["more"][0] + found["more"][1]
            case "no_grad":
                with torch.no_grad():
                    return module(a)
            case "again":
                return called[step.module % len(called)](a) if called else a + 1
            case "add":
                return a + b
            case "times":
                return a * b.tanh()
            case "swap":
                return torch.cat(a.chunk(2, 1)[::-1], 1)
            case "scale":
                return a * next(scales)
            case "detach":
                return a.detach()
            case "table":
                return a + self.table
            case "add_":
                return a.add_(b)
            case "fill_":
                copied = torch.zeros_like(a)
                copied[:, :2] = a[:, 2:]
                copied[:, 2:].copy_(b[:, :2])
                return copied
            case "view_":
                a[:, :2].mul_(1.5)
                return a
            case "noise":
                return a + torch.rand_like(a)
            case "center":
                return a - a.mean(0)
            case "look":
                return a * 2 if bool(a.sum() > 0) else a - 1
            case "stash":
                before = self.stash
                self.stash = a.detach()
                return b if before is None else b * 1.25
            case _:
                return module(a)


def step_of(kinds: tuple[str, ...]) -> st.SearchStrategy[Step]:
    places = st.integers(0, 6)
    return st.builds(Step, st.sampled_from(kinds), places, places, st.booleans(), st.integers(0, 4))


def plan_of(kinds: tuple[str, ...], *, longest: int = 8) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        st.lists(step_of(kinds), min_size=1, max_size=longest).map(tuple),
        st.integers(1, 3),
        st.lists(st.integers(0, 5), min_size=1, max_size=3).map(lambda x: (0, *x)),
        st.sampled_from(("tuple", "dict", "one")),
    )


def data_of(plan: Plan) -> Example:
    chance = torch.Generator().manual_seed(7)
    tensors = [
        torch.randn(SAMPLES, WIDTH, generator=chance, dtype=torch.float64)
        for _ in range(plan.inputs)
    ]
    return Example((tensors[0],), {f"more{i}": t for i, t in enumerate(tensors[1:])})


# -- what a step of training sees ----------------------------------------------------------------


@dataclass
class Seen:
    """All that one pass gives and leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    streams: Any


def observe(model: nn.Module, call: Any, seed: int) -> Seen:
    torch.manual_seed(seed)
    random.seed(seed)
    model.zero_grad(set_to_none=True)
    outputs = list(tensors_of(call()))
    weights = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
    loss = sum((o.sin() * weights).sum() for o in outputs if o.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    return Seen(
        [o.detach().clone() for o in outputs],
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        {n: b.clone() for n, b in model.named_buffers()},
        (torch.get_rng_state().tolist(), random.getstate()),
    )


def same(one: Seen, other: Seen, *, exact: bool) -> None:
    assert len(one.outputs) == len(other.outputs)
    for a, b in zip(one.outputs, other.outputs, strict=True):
        equal(a, b, exact=exact)
    for name, gradient in one.gradients.items():
        twin = other.gradients[name]
        assert (gradient is None) == (twin is None), name
        if gradient is not None and twin is not None:
            equal(gradient, twin, exact=exact)
    for name, buffer in one.buffers.items():
        equal(buffer, other.buffers[name], exact=exact)
    assert one.streams == other.streams


def equal(one: Tensor, other: Tensor, *, exact: bool) -> None:
    assert one.shape == other.shape
    assert one.stride() == other.stride()
    if exact:
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    else:
        a, b = one.nan_to_num(), other.nan_to_num()
        assert float((a - b).abs().max()) <= TOLERANCE * (1 + float(a.abs().max()))


def compare(plan: Plan) -> Region | None:
    """Train a few steps with and without the region; None where it is refused."""
    torch.set_num_threads(1)
    plain = Drawn(plan)
    data = data_of(plan)
    try:
        observe(copy.deepcopy(plain), lambda: plain_call(copy.deepcopy(plain), data), 0)
    except RuntimeError:
        return None  # autograd forbids what it does in place: no such model can be trained
    cached = copy.deepcopy(plain)
    before = state_of(cached)
    try:
        region = find_region(cached, rows_of(data, range(4)))
    except FrontierError:
        assert state_of(cached) == before
        return None
    assert state_of(cached) == before
    stored = {}
    with contextlib.suppress(FrontierError):
        parts = [region.fill(rows_of(data, range(f, f + BLOCK))) for f in range(0, SAMPLES, BLOCK)]
        assert state_of(cached) == before
        stored = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        assert all(len(rows) == SAMPLES for rows in stored.values())
    for number, batch in enumerate(BATCHES):
        example = rows_of(data, batch)
        full = observe(plain, lambda e=example: plain_call(plain, e), number)
        try:
            # The first batch on rows computed in its own company: equal to the last bit.
            rows = region.fill(example) if number == 0 else None
            if rows is None:
                rows = {name: value[list(batch)].clone() for name, value in stored.items()}
                if len(rows) < len(region.slots):
                    raise ReplayDiverged("fill", found="nothing", fix="")
            given = {name: value.clone() for name, value in rows.items()}
            replay = observe(cached, lambda e=example, g=given: region.run(e, g), number)
        except FrontierError:
            replay = observe(cached, lambda e=example: plain_call(cached, e), number)
        same(full, replay, exact=number == 0)
        assert all("forward" not in vars(m) for m in cached.modules())
        train(plain)
        cached.load_state_dict(plain.state_dict())
    return region


def plain_call(model: nn.Module, example: Example) -> Any:
    own = rows_of(example, range(len(example.args[0])))
    return model(*own.args, **own.kwargs)


def state_of(model: nn.Module) -> Any:
    return (
        {n: t.detach().tolist() for n, t in model.state_dict().items()},
        [set(vars(m)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad.nan_to_num().clamp(-1, 1))


# -- the tests -----------------------------------------------------------------------------------

QUIET = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)


@settings(QUIET, max_examples=25)
@given(plan_of(FRIENDLY))
def test_a_replay_gives_what_the_plain_pass_gives(plan: Plan):
    region = compare(plan)
    assert region is not None  # nothing odd in it: there is no reason to refuse
    assert set(region.skipped) >= outermost(frozen_calls(plan), plan)


@settings(QUIET, max_examples=30)
@given(plan_of((*FRIENDLY, *ODD, *ODD)))
def test_whatever_odd_things_it_does(plan: Plan):
    compare(plan)


@pytest.mark.slow
@settings(QUIET, max_examples=3000)
@given(plan_of(FRIENDLY, longest=16))
def test_many_friendly_models(plan: Plan):
    region = compare(plan)
    assert region is not None
    assert set(region.skipped) >= outermost(frozen_calls(plan), plan)


@pytest.mark.slow
@settings(QUIET, max_examples=2500)
@given(plan_of((*FRIENDLY, *ODD, *ODD), longest=16))
def test_many_odd_models(plan: Plan):
    compare(plan)


# -- an oracle of its own for how large the region must be ---------------------------------------


def frozen_calls(plan: Plan) -> set[str]:
    """The module calls of a friendly plan that read nothing live, by arithmetic on the plan."""
    live = [False] * plan.inputs
    frozen: set[str] = set()
    counts: dict[str, int] = {}
    called: list[tuple[str, Step]] = []
    layers = 0
    for step in plan.steps:
        reads = live[-1 - step.a % len(live)]
        other = live[-1 - step.b % len(live)]
        makes = reads
        if step.what in _MODULES or step.what == "again":
            if step.what == "again":
                if not called:
                    live.append(reads)
                    continue
                name, origin = called[step.module % len(called)]
            else:
                name, origin = f"layers.{layers}", step
                layers += 1
                if step.what not in ("join", "pair"):
                    called.append((name, step))
            reads = reads or (step.what == "join" and other)
            trains = origin.trains and origin.what not in ("relu", "eval dropout")
            for inner, trained in parts_of(name, origin, trains=trains):
                counts[inner] = counts.get(inner, 0) + 1
                if not reads and not trained:
                    count = counts[inner]
                    frozen.add(inner if count == 1 else f"{inner}#{count}")
            makes = reads or trains
        elif step.what in ("add", "times"):
            makes = reads or other
        elif step.what == "scale":
            makes = reads or step.trains
        elif step.what == "detach":
            makes = reads  # detached from the gradient, but it changes from step to step
        live.append(makes)
    return frozen


def parts_of(name: str, step: Step, *, trains: bool) -> list[tuple[str, bool]]:
    """The calls of a step, with whether each contains something live, given a frozen input."""
    if step.what != "block":
        return [(name, trains)]
    first = trains and (step.a + step.b) % 2 != 0
    return [(name, trains), (f"{name}.one", first), (f"{name}.two", trains)]


def outermost(calls: set[str], plan: Plan) -> set[str]:
    """Calls that are in no other of them: blocks are skipped whole where they can be."""
    del plan

    def inside(call: str) -> bool:
        name, _, count = call.partition("#")
        around = name.rpartition(".")[0]
        return f"{around}#{count}" in calls if count else around in calls

    return {call for call in calls if not inside(call)}


LOOKS = Plan((Step("eval dropout"), Step("look")))


def test_a_look_at_a_whole_batch_takes_the_branch_of_this_batch():
    """Hypothesis found it: no recorded sample, and no filled block, goes the other way."""
    compare(LOOKS)
