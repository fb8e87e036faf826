"""A frozen region: found, filled, left out; and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.errors import FrontierError
from frostline.frontier.finding import close, rows_of
from frostline.frontier.region import (
    Region,
    ReplayDiverged,
    difference,
    find_region,
    gradient_difference,
)
from frostline.frontier.structure import tensors_of
from torch_cases import picture

WIDTH = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def freeze(model: nn.Module, *names: str) -> None:
    """All parameters under these names stop training."""
    for name, parameter in model.named_parameters():
        if any(name == n or name.startswith(n + ".") for n in names):
            parameter.requires_grad = False


def batch_of(count: int = 8, *shape: int) -> Example:
    return Example.of(torch.randn(count, *(shape or (WIDTH,))))


class Net(nn.Module):
    """A stem, a special part in the middle, and a head that trains."""

    def __init__(self, special: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.middle = Part(special or (lambda m, h: h))
        self.head = nn.Linear(WIDTH, 2)
        freeze(self, "stem", "middle")

    def forward(self, x: Tensor) -> Any:
        return self.head(self.middle(self.stem(x)))


class Part(nn.Module):
    steps: Tensor

    def __init__(self, special: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.special = special
        self.seen: list[Any] = []
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, h: Tensor) -> Any:
        return self.special(self, self.linear(h).tanh())


def gradients(model: nn.Module, output: Any) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    sum(t.sin().sum() for t in tensors_of(output) if t.requires_grad).backward()  # type: ignore[union-attr]
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(model: nn.Module, region: Region, batch: Example) -> None:
    """Outputs and gradients, to the bit, on rows computed in the same company."""
    rows = region.fill(batch)
    torch.manual_seed(3)
    full = model(*rows_of(batch, range(len(batch_tensor(batch)))).args, **dict(batch.kwargs))
    expected, stream = gradients(model, full), torch.get_rng_state()
    torch.manual_seed(3)
    replay = region.run(batch, rows)
    found = gradients(model, replay)
    assert torch.equal(torch.get_rng_state(), stream)
    assert difference(full, replay) is None
    for one, other in zip(tensors_of(full), tensors_of(replay), strict=True):
        assert torch.equal(one, other)
        assert type(other) is Tensor
    for name, gradient in expected.items():
        twin = found[name]
        assert (gradient is None) == (twin is None), name
        assert gradient is None or torch.equal(gradient, twin)  # type: ignore[arg-type]


def batch_tensor(batch: Example) -> Tensor:
    return next(tensors_of((batch.args, dict(batch.kwargs))))


# -- what is found ------------------------------------------------------------------------------


def test_whole_modules_are_skipped_and_the_last_value_is_stored():
    model = Net()
    region = find_region(model, batch_of())
    assert region.skipped == ("stem", "middle")
    (slot,) = region.slots
    assert (slot.name, slot.shape, slot.dtype) == ("middle", (WIDTH,), torch.float32)
    assert slot.bytes == region.bytes == 4 * WIDTH
    assert region.root is model
    assert not region.empty
    assert region.input_slots == frozenset()
    assert set(region.modules) == {"stem", "middle", "middle.linear"}
    assert set(region.tensors) == {
        "stem.weight", "stem.bias", "middle.linear.weight", "middle.linear.bias", "middle.steps"
    }  # fmt: skip
    assert_same(model, region, batch_of(5))


def test_nothing_frozen_is_an_empty_region():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2))
    region = find_region(model, batch_of())
    assert region.empty
    assert region.skipped == ()
    assert region.gain == 0
    batch = batch_of(5)
    assert torch.equal(region.run(batch, region.fill(batch)), model(*batch.args))


def test_what_comes_after_a_trained_layer_is_not_frozen():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2))
    freeze(model, "0", "2")
    region = find_region(model, batch_of())
    assert region.skipped == ("0",)
    assert_same(model, region, batch_of())


def test_parameters_named_as_live_end_the_region():
    model = Net()
    assert find_region(model, batch_of(), live=("middle.linear.bias",)).skipped == ("stem",)
    assert find_region(model, batch_of(), live=("stem.weight",)).empty


def test_tied_parameters_are_live_under_all_their_names():
    model = Net()
    model.middle.linear.weight = model.stem.weight
    assert find_region(model, batch_of(), live=("middle.linear.weight",)).empty


def test_modules_can_be_kept_apart():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, 2)
    )
    freeze(model, "0")
    assert find_region(model, batch_of()).skipped == ("0",)
    region = find_region(model, batch_of(), split=("0.0",))
    assert region.skipped == ("0.0", "0.1")
    assert_same(model, region, batch_of())


class Twice(nn.Module):
    """One frozen layer called twice, two inputs, and a residual around what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        freeze(self, "shared")

    def forward(self, x: Tensor, *, other: Tensor) -> dict[str, Any]:
        a, b = self.shared(x), self.shared(other).relu()
        return {"a": a + self.head(b), "more": [b, 3, "text"]}


def test_a_second_call_has_a_number_and_a_slot_of_its_own():
    model = Twice()
    batch = Example((torch.randn(6, WIDTH),), {"other": torch.randn(6, WIDTH)})
    region = find_region(model, batch)
    assert region.skipped == ("shared", "shared#2")
    assert [slot.name for slot in region.slots] == ["shared", "relu"]
    assert_same(model, region, batch)
    output = region.run(batch, region.fill(batch))
    assert output["more"][1:] == [3, "text"]


def test_slots_of_one_name_are_told_apart():
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, 2)
            freeze(self, "a", "b")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x).relu()) * self.head(self.b(x).relu())

    model = Same()
    region = find_region(model, batch_of())
    assert [slot.name for slot in region.slots] == ["relu", "relu~2"]
    assert_same(model, region, batch_of())


def test_values_of_one_call_have_places():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
            self.head = nn.Linear(WIDTH, 2)
            freeze(self, "rnn")

        def forward(self, x: Tensor) -> Any:
            out, (hidden, _) = self.rnn(x)
            return self.head(out), self.head(hidden[0])

    model = Pair()
    batch = batch_of(6, 3, WIDTH)
    region = find_region(model, batch)
    assert [slot.name for slot in region.slots] == ["rnn[0]", "__getitem__"] or all(
        slot.name.startswith(("rnn[", "__get")) for slot in region.slots
    )
    assert_same(model, region, batch)


def test_inputs_that_are_read_past_the_region_are_slots_and_said_to_be():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            freeze(self, "stem")

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.head(self.stem(x)) * scale

    model = Reads()
    batch = Example((torch.randn(6, WIDTH),), {"scale": torch.randn(6, 1)})
    region = find_region(model, batch)
    assert region.input_slots == {"input scale"}
    assert set(region.fill(batch)) == {"stem", "input scale"}
    assert_same(model, region, batch)


def test_rows_are_samples_first_wherever_the_samples_are():
    class Turned(nn.Module):
        """Two entries per sample, in the second dimension of what goes on."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, 6)
            self.last = nn.Linear(2, 2)
            freeze(self, "stem")

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).reshape(-1, 3).T  # (3, 2N)
            return self.last((h * 2).T.reshape(-1, 3, 2)) + h.new_ones(1)

    model = Turned()
    region = find_region(model, batch_of())
    batch = batch_of(7)
    rows = region.fill(batch)
    assert all(len(value) == 7 for value in rows.values())
    order = [3, 0, 6]
    some = rows_of(batch, order)
    picked = {name: value[order] for name, value in rows.items()}
    torch.testing.assert_close(region.run(some, picked), model(*some.args))


def test_what_is_given_to_all_samples_alike_is_no_slot():
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.places = nn.Embedding(9, WIDTH), nn.Embedding(5, WIDTH)
            self.head = nn.Linear(WIDTH, 2)
            freeze(self, "embed", "places")

        def forward(self, ids: Tensor) -> Tensor:
            places = torch.arange(ids.shape[1])[None]
            return self.head(self.embed(ids)) * self.places(places).sum()

    model = Position()
    batch = Example.of(torch.randint(0, 9, (6, 5)))
    region = find_region(model, batch)
    assert [slot.name for slot in region.slots] == ["embed"]
    assert_same(model, region, batch)


def test_gain_is_a_share_and_falls_with_what_must_be_read():
    def gain(width: int, depth: int) -> float:
        layers = [nn.Linear(width, width) for _ in range(depth)]
        model = nn.Sequential(*layers, nn.Linear(width, 2))
        freeze(model, *(str(i) for i in range(depth)))
        return find_region(model, batch_of(4, width)).gain

    assert gain(8, 1) < gain(8, 4) < gain(8, 20) < 1
    assert gain(64, 3) > gain(8, 3)


def test_frozen_work_is_counted_per_sample():
    region = find_region(Net(), batch_of())
    assert region.frozen_work == 2 * 2 * WIDTH * WIDTH
    assert region.frozen_share == pytest.approx(4 / 5)


# -- where it ends, and why ---------------------------------------------------------------------

ENDS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "noise": (lambda m, h: h + torch.randn_like(h), "draws random numbers"),
    "Python's numbers": (lambda m, h: h * random.random(), "draws random numbers"),
    "NumPy's numbers": (lambda m, h: h * float(np.random.rand()), "draws random"),  # noqa: NPY002
    "statistics": (lambda m, h: F.batch_norm(h, None, None, training=True), "statistics"),
    "mean": (lambda m, h: h - h.mean(0), "mixes the samples"),
    "rank": (lambda m, h: h + h.argsort(0), "mixes the samples"),
    "counter": (lambda m, h: (m.seen.append(1), h)[1], "changes its own state"),
    "list": (lambda m, h: (m.seen.__setitem__(slice(None), [h]), h)[1], "changes its own state"),
    "buffer": (lambda m, h: (m.steps.add_(1), h)[1], "writes to its own"),
    "look": (lambda m, h: h * 2 if float(h.abs().sum()) < 1e6 else h, "looks at values"),
    "boolean index": (lambda m, h: h + h[h > -9].sum() * 0, "looks at values"),
    "odd object": (lambda m, h: (h, m)[0:2], "returns a Part"),
}


@pytest.mark.parametrize(("special", "why"), ENDS.values(), ids=ENDS)
def test_the_region_ends_with_a_reason_and_stays_right(special: Any, why: str):
    model = Net(special)
    if why == "returns a Part":
        model.middle.register_forward_hook(lambda m, a, out: out[0])
    batch = batch_of()
    region = find_region(model, batch)
    assert "middle" not in region.skipped
    assert "stem" in region.skipped
    assert [end.module for end in region.ends] == ["middle"]
    if why != "returns a Part":  # the hook comes first
        assert why in region.ends[0].why
    for _ in range(2):
        step(model, region, batch_of(6))


def step(model: nn.Module, region: Region, batch: Example) -> None:
    """Replay and plain pass from one state: everything comes out alike."""
    rows = region.fill(batch)
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def seeded() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002

    seeded()
    full = model(*batch.args)
    after = {n: t.clone() for n, t in model.state_dict().items()}
    streams = torch.get_rng_state().tolist(), random.getstate()
    model.load_state_dict(before)
    seeded()
    replay = region.run(batch, rows)
    for one, other in zip(tensors_of(full), tensors_of(replay), strict=True):
        assert torch.equal(one, other)
    assert (torch.get_rng_state().tolist(), random.getstate()) == streams
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), name


def test_active_dropout_ends_the_region_and_idle_dropout_does_not():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 2))
    freeze(model, "0")
    assert find_region(model, batch_of()).skipped == ("0",)
    model[1].eval()
    assert find_region(model, batch_of()).skipped == ("0", "1")


def test_batch_norm_by_its_own_statistics_is_frozen_and_by_the_batchs_is_not():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))
    freeze(model, "0", "1")
    region = find_region(model, batch_of())
    assert region.skipped == ("0",)
    step(model, region, batch_of())
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[arg-type]
    model[1].eval()
    region = find_region(model, batch_of())
    assert region.skipped == ("0", "1")
    assert_same(model, region, batch_of())


# -- nothing is left behind ---------------------------------------------------------------------


def clean(model: nn.Module) -> None:
    assert all("forward" not in vars(module) for module in model.modules())


class Boom(Exception):
    pass


def test_finding_filling_and_running_leave_the_model_as_it_was():
    model = Net(lambda m, h: h + F.dropout(h, 0.1))
    handle = model.middle.linear.register_forward_hook(lambda *_: None)
    hooks = dict(model.middle.linear._forward_hooks)
    batch = batch_of()
    before = picture(model)
    region = find_region(model, batch)
    assert picture(model) == before
    rows = region.fill(batch)
    assert picture(model) == before
    region.run(batch, rows)
    clean(model)
    assert dict(model.middle.linear._forward_hooks) == hooks
    assert model.middle.linear._forward_hooks[handle.id] is hooks[handle.id]


class Breaks(Net):
    """Raises when told to, before anything is computed."""

    broken = False

    def forward(self, x: Tensor) -> Any:
        if type(self).broken:
            raise Boom("on purpose")
        return super().forward(x)


@pytest.mark.parametrize("where", ["find", "fill", "refill", "run"])
def test_nothing_is_left_behind_when_the_forward_raises(where: str, monkeypatch):
    model = Breaks()
    hook = lambda *_: None  # noqa: E731
    model.middle.linear.register_forward_hook(hook)
    model.head.register_forward_pre_hook(hook)
    forward = model.stem.forward = model.stem.forward  # an override of the user's own
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    monkeypatch.setattr(Breaks, "broken", True)
    before = picture(model)
    calls = {
        "find": lambda: find_region(model, batch),
        "fill": lambda: region.fill(batch),
        "refill": lambda: region.refill(region, batch, rows),
        "run": lambda: region.run(batch, rows),
    }
    with pytest.raises((FrontierError, Boom), match="on purpose"):
        calls[where]()
    after = picture(model)
    for key in before:
        assert after[key] == before[key], key
    assert vars(model.stem)["forward"] is forward
    assert list(model.middle.linear._forward_hooks.values()) == [hook]
    assert list(model.head._forward_pre_hooks.values()) == [hook]


def test_the_batch_is_left_alone():
    model = Net(lambda m, h: h.add_(1))
    batch = batch_of()
    before = batch_tensor(batch).clone()
    region = find_region(model, batch)
    region.run(batch, region.fill(batch))
    assert torch.equal(batch_tensor(batch), before)
    assert batch_tensor(batch)._version == 0


def test_a_model_that_writes_into_its_batch_is_refused_and_the_batch_left_alone():
    class Writes(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.mul_(2))

    batch = batch_of()
    with pytest.raises(FrontierError, match="writes into the batch"):
        find_region(Writes(), batch)
    assert batch_tensor(batch)._version == 0


def test_a_returned_value_that_was_written_to_through_a_view_is_right_or_refused():
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            freeze(self, "stem")

        def forward(self, x: Tensor) -> Any:
            h = self.stem(x)
            out = self.head(h)
            kept = h.clone()
            kept[:, :2].clamp_(max=50.0)  # nothing in the samples that it is found with
            return out, kept

    model = Clamped()
    batch = Example.of(torch.randn(6, WIDTH) * 1e4)
    try:
        region = find_region(model, batch_of())
    except FrontierError as error:
        assert "overwritten" in error.found  # noqa: PT017
        return
    assert_same(model, region, batch)


def test_live_code_that_writes_in_place_gets_values_of_its_own():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            freeze(self, "stem")

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return h.add_(self.head(x)) * 2

    model = InPlace()
    batch = batch_of()
    region = find_region(model, batch)
    assert_same(model, region, batch)


# -- hooks --------------------------------------------------------------------------------------


def test_hooks_see_real_values_and_may_change_them():
    model = Net()
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append((type(args[0]), type(out), out.detach().clone()))
        return out * 2

    model.middle.linear.register_forward_hook(hook)
    batch = batch_of()
    region = find_region(model, batch)
    assert "middle" not in region.skipped
    assert any("hook" in end.why for end in region.ends)
    seen.clear()
    full = model(*batch.args)
    expected = seen.pop()
    rows = region.fill(batch)
    seen.clear()
    replay = region.run(batch, rows)
    assert torch.equal(full, replay)
    assert [kind for *kinds, _ in seen for kind in kinds] == [Tensor, Tensor]
    assert torch.equal(seen[0][2], expected[2])


def test_a_hook_before_a_layer_changes_what_goes_in():
    model = Net()
    model.middle.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    region = find_region(model, batch_of())
    assert "middle" not in region.skipped
    assert_same(model, region, batch_of())


def test_a_hook_that_removes_itself_is_not_put_back():
    model = Net()
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    handle = model.head.register_forward_hook(lambda *_: handle.remove())
    region.run(batch, rows)
    assert model.head._forward_hooks == {}


# -- divergence ---------------------------------------------------------------------------------


def flips(model: nn.Module) -> None:
    """From now on the model takes another path, after it has drawn and counted."""
    model.flag.append(1)  # type: ignore[operator, union-attr]


class Flips(nn.Module):
    """Counts and draws in what trains, and then may go another way."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.stem, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(WIDTH, 2)
        self.how, self.flag = how, [0]
        freeze(self, "stem", "last")

    def forward(self, x: Tensor) -> Tensor:
        first = self.drop(self.norm(x))
        other = self.how(self, x) if len(self.flag) > 1 else self.last(self.stem(x).relu())
        return self.head(first + other)


PATHS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another operation": lambda m, x: m.last(m.stem(x).tanh()),
    "another order": lambda m, x: m.stem(m.last(x).relu()),
    "another input": lambda m, x: m.last(x.relu()),
    "less": lambda m, x: m.stem(x),
    "more": lambda m, x: m.last(m.stem(x).relu()).neg().neg(),
    "other settings": lambda m, x: m.last(F.leaky_relu(m.stem(x), 0.2)),
    "an error": lambda m, x: x[:, 99:],
}


@pytest.mark.parametrize("how", PATHS.values(), ids=PATHS)
def test_another_path_diverges_and_what_was_done_is_undone(how: Any):
    model = Flips(how)
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    flips(model)
    before = picture(model)
    with pytest.raises(ReplayDiverged):
        region.run(batch, rows)
    assert picture(model) | {"identity": 0} == before | {"identity": 0}
    clean(model)
    assert model.norm.num_batches_tracked == 0
    if how is not PATHS["an error"]:
        model(*batch.args)
        assert model.norm.num_batches_tracked == 1


def test_other_settings_of_an_operation_diverge():
    slope = [0.1]
    model = Net()
    model.forward = lambda x: model.head(F.leaky_relu(model.stem(x), slope[0]))  # type: ignore[method-assign]
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    slope[0] = 0.5
    with pytest.raises(ReplayDiverged, match="other settings"):
        region.run(batch, rows)
    with pytest.raises(ReplayDiverged, match="other settings"):
        region.fill(batch)


def test_other_arguments_of_a_skipped_call_diverge():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.linear(x) * scale

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = Scaled(), nn.Linear(WIDTH, 2)
            self.table = np.array([2.0])  # of arrays only the identity is watched
            freeze(self, "stem")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x, float(self.table[0])))

    model = Outer()
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    model.table[0] = 3.0
    with pytest.raises(ReplayDiverged, match="other arguments"):
        region.run(batch, rows)


def test_an_undoing_can_be_asked_for():
    model = Flips(PATHS["less"])
    batch = batch_of()
    region = find_region(model, batch)
    before = picture(model)
    with region.undoing() as undo:
        model(*batch.args)
        undo()
    assert picture(model)["bits"] == before["bits"]
    assert picture(model)["random"] == before["random"]


# -- what must be as it was ---------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rate": (lambda m: setattr(m[1], "p", 0.5), "1.p"),
    "mode": (lambda m: m[1].train(), "1.training"),
    "weight": (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 4))), "0.weight"),
    "layer": (lambda m: m.__setitem__(0, nn.Linear(4, 4)), "0"),
    "mode of all": (lambda m: setattr(m, "training", False), "training"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_changed_settings_of_frozen_modules_stop_it(change: Any, name: str):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1).eval(), nn.Linear(4, 2))
    freeze(model, "0")
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    assert region.changed() is None
    change(model)
    assert region.changed() == name
    with pytest.raises(ReplayDiverged, match="no longer what it was"):
        region.run(batch, rows)


def test_changes_of_what_trains_are_no_matter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 2))
    freeze(model, "0")
    batch = batch_of()
    region = find_region(model, batch)
    model[2].weight = nn.Parameter(torch.ones(2, 4))
    assert region.changed() is None


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        freeze(self, "stem")

    def forward(self, x: Tensor, scale: Any = 1.0, table: Any = None, flag: bool = False) -> Tensor:
        h = self.stem(x * scale)
        h = h if table is None else h * table
        return self.head(-h if flag else h)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"scale": 2.0}, {"scale": 3.0}),
        ({"scale": torch.tensor(2.0)}, {"scale": torch.tensor(3.0)}),
        ({"table": torch.ones(1, WIDTH)}, {"table": torch.zeros(1, WIDTH)}),
        ({"flag": False}, {"flag": True}),
        ({"scale": 2.0}, {"scale": 2.0, "flag": False}),
    ],
    ids=["number", "tensor without samples", "table", "flag", "one more"],
)
def test_arguments_given_to_all_samples_alike_must_be_what_they_were(before: Any, after: Any):
    model = Given()
    batch = Example((torch.randn(6, WIDTH),), before)
    region = find_region(model, batch)
    assert_same(model, region, batch)
    rows = region.fill(batch)
    other = Example(batch.args, after)
    for call in (lambda: region.fill(other), lambda: region.run(other, rows)):
        with pytest.raises(ReplayDiverged, match="same for all samples"):
            call()


# -- company ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "special",
    [
        lambda m, h: h - h.mean(0) if len(h) >= 6 else h,
        lambda m, h: h * (1 + (torch.cdist(h, h) < 1e-6).float().sum() / 100 * (len(h) > 5)),
    ],
)
def test_rows_that_depend_on_a_large_batch_are_noticed_at_the_first_one(special: Any):
    model = Net(special)
    region = find_region(model, batch_of(4))
    if "middle" in region.skipped:
        with pytest.raises(FrontierError, match="depends on the other samples"):
            region.fill(batch_of(16))
    region.fill(batch_of(4))


def test_a_path_that_only_some_values_take_diverges():
    model = Net(lambda m, h: h * 2 if bool(h.sum() < 1e3) else h - 1)
    region = find_region(model, batch_of())
    batch = batch_of()
    rows = region.fill(batch)
    torch.testing.assert_close(region.run(batch, rows), model(*batch.args))
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(region.run(batch, rows), model(*batch.args))


# -- shapes -------------------------------------------------------------------------------------


class Words(nn.Module):
    """Texts of some length, with padding that is masked out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)
        self.mix = nn.TransformerEncoderLayer(WIDTH, 1, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)
        freeze(self, "embed", "mix")
        self.mix.eval()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.mix(self.embed(ids), src_key_padding_mask=mask)
        return self.head((h * (~mask)[..., None]).sum(1))


def texts(count: int, length: int) -> Example:
    ids = torch.randint(1, 9, (count, length))
    return Example(kwargs={"ids": ids, "mask": torch.zeros(count, length, dtype=torch.bool)})


def test_other_lengths_are_learned_on_the_way():
    model = Words()
    region = find_region(model, texts(6, 5))
    for length in (5, 7, 3):
        batch = texts(6, length)
        rows = region.fill(batch)
        torch.testing.assert_close(
            region.run(batch, rows), model(**batch.kwargs), rtol=1e-5, atol=1e-6
        )
        for slot in region.slots:
            assert rows[slot.name].shape[1:] == region.row_shape(slot, batch)
        fresh = texts(4, length + 10)
        assert region.row_shape(region.slots[0], fresh)[0] in (length + 10, WIDTH)


def test_rows_longer_or_shorter_than_the_batch_are_fitted():
    """Texts are stored as long as in their block, and read in batches of another length."""
    model = Words()
    region = find_region(model, texts(6, 5))
    long = texts(4, 8)
    long.kwargs["mask"][:, 5:] = True  # type: ignore[index]
    short = Example(kwargs={name: value[:, :5] for name, value in long.kwargs.items()})
    expected = model(**short.kwargs)
    stored = region.fill(long)
    torch.testing.assert_close(region.run(short, stored), expected, rtol=1e-4, atol=1e-5)
    stored = region.fill(short)
    torch.testing.assert_close(region.run(long, stored), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_a_new_shape_without_values_is_refused():
    model = Words()
    region = find_region(model, texts(6, 5))
    meta = Example(kwargs={k: v.to("meta") for k, v in texts(4, 6).kwargs.items()})
    with pytest.raises(ReplayDiverged, match="without its values"):
        region.row_shape(region.slots[0], meta)


def test_a_batch_that_is_not_there_is_enough_to_run():
    model = Net()
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    empty = Example.of(torch.empty(8, WIDTH, device="meta"))
    assert torch.equal(region.run(empty, rows), model(*batch.args))


@pytest.mark.parametrize("count", [1, 2, 3, 33])
def test_any_number_of_samples(count: int):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    freeze(model, "0")
    region = find_region(model, batch_of(4, 1, 4, 4))
    assert_same(model, region, batch_of(count, 1, 4, 4))


def test_the_memory_layout_of_a_value_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    )
    freeze(model, "0")
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    region = find_region(model, Example.of(images))
    seen: list[Any] = []
    model[1].register_forward_pre_hook(lambda m, a: seen.append(a[0].stride()))
    assert_same(model, region, Example.of(images))
    assert seen[0] == seen[1]


# -- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batch", "why"),
    [
        (nn.Linear(4, 2), batch_of(2), "batch of 2"),
        (nn.Linear(4, 2), Example((3,)), "no tensor"),
        (nn.DataParallel(nn.Linear(4, 2)), batch_of(), "threads"),
        (nn.Linear(9, 2), batch_of(), "RuntimeError"),
    ],
    ids=["few samples", "no tensor", "threads", "does not run"],
)
def test_refused(model: nn.Module, batch: Example, why: str):
    with pytest.raises(FrontierError) as caught:
        find_region(model, batch)
    assert why in caught.value.asked + caught.value.found
    assert caught.value.fix


def test_the_rehearsal_refuses_what_comes_out_otherwise():
    """A value that leaves the model in a way that nobody sees."""
    calls: list[int] = []

    class Counts(Net):
        def forward(self, x: Tensor) -> Any:
            calls.append(1)
            return super().forward(x) + len(calls)

    with pytest.raises(FrontierError, match="rehearsal"):
        find_region(Counts(), batch_of())


def test_what_differs_is_said():
    one = (torch.ones(2), 3)
    assert difference(one, (torch.ones(2), 3)) is None
    assert difference(one, (torch.ones(2) + 1e-6, 3)) is None
    assert "off by 1" in str(difference(one, (torch.zeros(2), 3)))
    assert "has shape" in str(difference(one, (torch.ones(3), 3)))
    assert "is 4, not 3" in str(difference(one, (torch.ones(2), 4)))
    assert "values come out" in str(difference(one, (torch.ones(2),)))
    assert "is a int, not a Tensor" in str(difference(one, (2, 3)))
    assert difference((torch.tensor([float("nan")]),), (torch.tensor([float("nan")]),)) is None


def test_gradients_that_cancel_are_judged_by_their_module():
    """A bias before batch norm has a gradient of rounding alone, which no two passes share."""
    full = {
        "0.weight": torch.tensor([2.0, 1.0]),
        "0.bias": torch.tensor([4e-7]),
        "b": torch.ones(1),
    }
    assert gradient_difference(full, {**full, "0.bias": torch.tensor([-3e-7])}) is None
    assert "of 0.bias is off" in str(gradient_difference(full, {**full, "0.bias": torch.ones(1)}))
    off = {**full, "0.weight": torch.tensor([2.0, 1.1])}
    assert "of 0.weight is off by 0.1" in str(gradient_difference(full, off))
    # Alone in its module it is judged by itself.
    alone = {"0.bias": torch.tensor([4e-7])}
    assert gradient_difference(alone, {"0.bias": torch.tensor([-3e-7])}) is not None
    assert "other parameters" in str(gradient_difference(full, alone))


@pytest.mark.parametrize("extreme", [float("inf"), -float("inf"), torch.finfo(torch.float32).min])
def test_extremes_hide_no_difference(extreme: float):
    one = torch.tensor([extreme, 1.0, 2.0])
    assert close(one, one.clone())
    assert not close(one, torch.tensor([extreme, 1.0, 2.5]))
    assert not close(one, torch.tensor([1.0, 1.0, 2.0]))


def test_what_is_no_number_is_no_zero():
    nothing = torch.tensor([float("nan"), 1.0])
    assert close(nothing, nothing.clone())
    assert not close(nothing, torch.tensor([0.0, 1.0]))
    assert not close(torch.tensor([0.0, 1.0]), nothing)


# -- filling from a shallower region ------------------------------------------------------------


class Chain(nn.Module):
    """Four layers with a residual around each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_a_deeper_region_is_filled_from_a_shallower_one():
    model = Chain()
    freeze(model, "layers.0", "layers.1")
    batch = batch_of()
    shallow = find_region(model, batch)
    rows = shallow.fill(batch)
    freeze(model, "layers.2", "layers.3")
    deep = find_region(model, batch, split=shallow.parts)
    empty = Example.of(torch.empty(8, WIDTH, device="meta"))
    filled = deep.refill(shallow, empty, rows)
    direct = deep.fill(batch)
    assert filled.keys() == direct.keys()
    for name, value in direct.items():
        assert torch.equal(filled[name], value)
    clean(model)


def test_only_what_lies_between_runs():
    model = Chain()
    freeze(model, "layers.0", "layers.1")
    batch = batch_of()
    shallow = find_region(model, batch)
    rows = shallow.fill(batch)
    freeze(model, "layers.2")
    deep = find_region(model, batch, split=shallow.parts)
    with torch.no_grad():  # had they run, the result would show it
        for parameter in model.layers[0].parameters():
            parameter.fill_(float("nan"))
    filled = deep.refill(shallow, batch, rows)
    assert all(torch.isfinite(value).all() for value in filled.values())
    assert all(len(value) == 8 for value in filled.values())


def test_refilling_leaves_everything_as_it_was():
    model = Chain()
    model.layers[3].append(nn.Dropout(0.5))  # type: ignore[operator]
    freeze(model, "layers.0")
    batch = batch_of()
    shallow = find_region(model, batch)
    rows = shallow.fill(batch)
    kept = {name: value.clone() for name, value in rows.items()}
    freeze(model, "layers.1", "layers.2")
    deep = find_region(model, batch, split=shallow.parts)
    before = picture(model)
    deep.refill(shallow, batch, rows)
    assert picture(model) == before
    assert all(torch.equal(rows[name], kept[name]) for name in rows)


def test_what_the_shallower_region_lacks_is_an_error():
    model = Chain()
    freeze(model, "layers.0")
    batch = batch_of()
    shallow = find_region(model, batch)
    freeze(model, "layers.1")
    deep = find_region(model, batch, split=shallow.parts)
    empty = Example.of(torch.empty(8, WIDTH, device="meta"))
    with pytest.raises((FrontierError, RuntimeError, NotImplementedError)):
        deep.refill(shallow, empty, {})
    clean(model)


# -- what a pass is made of ---------------------------------------------------------------------


def test_values_kept_as_attributes_are_real_afterwards():
    class Keeps(Net):
        features: Any = None

        def forward(self, x: Tensor) -> Any:
            h = self.middle(self.stem(x))
            self.features = {"h": h}
            return self.head(h)

    model = Keeps()
    batch = batch_of()
    region = find_region(model, batch)
    rows = region.fill(batch)
    model(*batch.args)
    expected = model.features["h"]
    model.features = None
    region.run(batch, rows)
    assert type(model.features["h"]) is Tensor
    assert torch.equal(model.features["h"], expected)


def test_gradients_are_on_in_the_frozen_part_as_they_were():
    seen: list[bool] = []
    model = Net(lambda m, h: (seen.append(torch.is_grad_enabled()), h)[1])
    region = find_region(model, batch_of())
    seen.clear()
    region.fill(batch_of())
    assert set(seen) == {True}
    with torch.no_grad():
        region = find_region(model, batch_of())
    seen.clear()
    region.fill(batch_of())
    assert set(seen) == {False}


def test_another_forward_can_be_called():
    model = Net()
    batch = batch_of()
    region = find_region(model, batch)
    forward = type(model).forward.__get__(model)
    model.forward = lambda *_: pytest.fail("the other one was called")  # type: ignore[method-assign]
    found = region.run(batch, region_rows(model, region, batch, forward), forward=forward)
    assert torch.equal(found, forward(*batch.args))


def region_rows(model: Any, region: Region, batch: Example, forward: Any) -> dict[str, Tensor]:
    del model.forward
    try:
        return region.fill(batch)
    finally:
        model.forward = lambda *_: pytest.fail("the other one was called")


def test_autocast_is_part_of_what_a_batch_looks_like():
    model = Net()
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        region = find_region(model, batch)
        assert region.slots[0].dtype is torch.bfloat16
        rows = region.fill(batch)
        assert rows["middle"].dtype is torch.bfloat16
        assert torch.equal(region.run(batch, rows), model(*batch.args))
