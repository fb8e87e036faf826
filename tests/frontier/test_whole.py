"""Frozen modules recorded as a whole; a region used again in other modes; state that settles."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frontier.test_cache import Given, run, tower
from frontier.test_loader import assert_same as same_training
from frontier.test_region import WIDTH, Net, assert_same, batch_of, freeze
from frostline.errors import FrontierError
from frostline.frontier import finding
from frostline.frontier import region as module
from frostline.frontier.cache import FrontierCache
from frostline.frontier.library import Library
from frostline.frontier.region import find_region
from frostline.frontier.script import Unsettled

Special = Callable[[Any, Tensor], Any]
OUTSIDE: list[Tensor] = []


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    OUTSIDE.clear()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was recorded, and which modules were to be taken as a whole."""
    seen: list[Any] = []
    plain = finding.record

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append([args[4], None])
        seen[-1][1] = plain(*args, **kwargs)
        return seen[-1][1]

    monkeypatch.setattr(module, "record", record)
    return seen


def looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_frozen_modules", lambda *_: frozenset())


def number(m: Any, h: Tensor) -> Tensor:
    return h * h.sum().item()


def listed_out(m: Any, h: Tensor) -> Tensor:
    return h * 2 if h.max().tolist() > 1e3 else h


def array(m: Any, h: Tensor) -> Tensor:
    return h * 2 if float(h.detach().numpy().max()) > 1e3 else h


def way(m: Any, h: Tensor) -> Tensor:
    return h * 2 if bool(h.mean() > 0) else h * 3


def shape_of_values(m: Any, h: Tensor) -> Tensor:
    return h + h[h[:, 0] > 0].sum() * 0


def noise(m: Any, h: Tensor) -> Tensor:
    return h + torch.rand_like(h)


def python_noise(m: Any, h: Tensor) -> Tensor:
    return h * random.random()


def counted(m: Any, h: Tensor) -> Tensor:
    m.steps += 1
    return h


def listed(m: Any, h: Tensor) -> Tensor:
    m.seen.append(float(len(h)))
    return h


def flag(m: Any, h: Tensor) -> Tensor:
    return torch.where((h > 40).any(), h * 2, h)


def rolled(m: Any, h: Tensor) -> Tensor:
    return h + h.roll(1, 0)


def in_place(m: Any, h: Tensor) -> Tensor:
    return h.mul_(2)


def turned(m: Any, h: Tensor) -> Tensor:
    return h.unsqueeze(1).transpose(0, 1).squeeze(0)


def shape_only(m: Any, h: Tensor) -> Tensor:
    return h + h.new_ones(WIDTH) + torch.zeros_like(h[0])


SPECIALS: tuple[Special, ...] = (
    number, listed_out, array, way, shape_of_values, noise, python_noise, counted, listed, flag,
    rolled, in_place, turned, shape_only,
)  # fmt: skip
#: Of these the middle is taken as a whole.
WHOLE = (in_place, turned)


@pytest.mark.parametrize("special", SPECIALS, ids=lambda s: s.__name__)
def test_the_region_is_the_one_that_looking_into_everything_gives(
    special: Special, recordings: list[Any], monkeypatch: pytest.MonkeyPatch
):
    model = Net(special)
    found = find_region(model, batch_of())
    opened = "middle" not in recordings[-1][0]
    looked_into(monkeypatch)
    other = find_region(model, batch_of())
    assert found.skipped == other.skipped
    assert [s.name for s in found.slots] == [s.name for s in other.slots]
    assert opened == (special not in WHOLE)
    assert ("middle" in found.skipped) == (special in WHOLE or special is shape_only)


def test_nothing_is_written_down_inside_of_what_is_frozen(recordings: list[Any]):
    model = nn.Sequential(
        nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(9)]),
        nn.Linear(WIDTH, 2),
    )
    freeze(model, "0")
    region = find_region(model, batch_of())
    assert region.skipped == ("0",)
    assert len(recordings) == 2
    for _, recording in recordings:
        assert [e.title for e in recording.recorder.entries] == ["0", "linear in 1"]
    assert_same(model, region, batch_of())


class Leaks(nn.Module):
    """The middle gives a value away by another way than its result."""

    def __init__(self, take: Callable[[Any], Any], give: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(WIDTH, WIDTH), Gives(give)
        self.head = nn.Linear(WIDTH, 2)
        self.take = take
        self.held: dict[str, Tensor] = {}
        object.__setattr__(self.middle, "around", self)
        freeze(self, "stem", "middle")

    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.stem(x))
        return self.head(h + self.take(self))


class Gives(nn.Module):
    def __init__(self, give: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.give = nn.Linear(WIDTH, WIDTH), give

    def forward(self, h: Tensor) -> Tensor:
        inner = self.linear(h).tanh()
        self.give(self, inner)
        return inner * 2


def give_to_list(m: Any, h: Tensor) -> None:
    OUTSIDE[:] = [h]


def give_to_parent(m: Any, h: Tensor) -> None:
    m.around.held["latest"] = h


def give_as_attribute(m: Any, h: Tensor) -> None:
    m.latest = h


@pytest.mark.parametrize(
    ("give", "take"),
    [
        (give_to_list, lambda m: OUTSIDE[0]),
        (give_to_parent, lambda m: m.held["latest"]),
        (give_as_attribute, lambda m: m.middle.latest),
    ],
    ids=["list", "parent", "attribute"],
)
def test_a_value_that_leaves_by_another_way_is_seen(give: Any, take: Any, recordings: list[Any]):
    model = Leaks(take, give)
    region = find_region(model, batch_of())
    assert "middle" in recordings[0][0]
    assert "middle" not in region.skipped
    assert "middle" not in recordings[-1][0]
    assert_same(model, region, batch_of())


def test_a_value_left_behind_as_an_attribute_of_another_module_is_seen(recordings: list[Any]):
    model = Leaks(lambda m: 0, give_to_parent)
    assert "middle" not in find_region(model, batch_of()).skipped


def test_hooks_inside_see_real_values(recordings: list[Any]):
    model, seen = Net(), []
    model.middle.linear.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    region = find_region(model, batch_of())
    assert "middle" not in region.skipped
    seen.clear()
    assert_same(model, region, batch_of())
    assert (8, WIDTH) in seen


def test_what_the_recordings_do_not_show_the_rehearsal_does():
    """Only more than three samples are mixed: no recording has so many."""
    model = Net(lambda m, h: torch.cat([h[:1], h[1:].flip(0)]) if len(h) > 3 else h)
    with pytest.raises(FrontierError, match="depends on the other samples"):
        find_region(model, batch_of())


# -- again ---------------------------------------------------------------------------------------


class Modes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        h = self.drop(self.middle(self.stem(x)))
        return self.head(h) if self.training else self.head(h).softmax(1)


def test_a_region_serves_evaluation_after_training():
    model = Modes()
    region = find_region(model, batch_of())
    model.eval()
    with torch.no_grad():
        assert region.changed() is not None
        twin = region.again(batch_of())
        assert twin.is_twin_of(region)
        rows = twin.fill(batch_of(9))
        batch = batch_of(9)
        rows = twin.fill(batch)
        assert torch.equal(twin.run(batch, rows), model(*batch.args))
        assert twin.changed() is None
    model.train()
    assert_same(model, region, batch_of())


def test_a_region_is_not_used_again_where_more_may_be_frozen():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(), nn.Linear(WIDTH, WIDTH),
                          nn.Linear(WIDTH, 2))  # fmt: skip
    freeze(model, "0", "2")
    region = find_region(model, batch_of())
    assert region.skipped == ("0",)
    assert not region.holds_all_frozen
    model.eval()
    with pytest.raises(FrontierError, match="outside of it"):
        region.again(batch_of())
    assert "2" in find_region(model, batch_of()).skipped


def test_a_region_is_not_used_again_where_frozen_layers_run_in_another_mode():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))
    freeze(model, "0")
    model[0].eval()
    region = find_region(model, batch_of())
    model.train()
    with pytest.raises(FrontierError, match="in training mode"):
        region.again(batch_of())


def test_a_region_is_not_used_again_where_the_model_goes_another_way():
    class Other(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.stem(x)
            return self.head(self.middle(h) if self.training else self.middle(h * 2))

    model = Other()
    region = find_region(model, batch_of())
    model.eval()
    with pytest.raises(FrontierError):
        region.again(batch_of())


def test_the_cache_finds_one_region_for_training_and_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[bool] = []
    plain = module.find_region

    def find(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(model.training)
        return plain(model, *args, **kwargs)

    monkeypatch.setattr("frostline.frontier.cache.find_region", find)
    model, train, val = tower(), Given(), Given()
    val.name = "val"
    with FrontierCache(model, Library(tmp_path / "stores"), min_gain=0).attached() as cache:
        run(model, cache, train, epochs=1)
        model.eval()
        with torch.no_grad():
            run_once(model, cache, val)
    assert calls == [True]
    assert any("cached for val" in note for note in cache.report.notes)


def run_once(model: nn.Module, cache: FrontierCache, source: Given) -> None:
    from frostline.frontier.cache import Batch

    for first in (0, 16):
        indices = list(range(first, first + 16))
        batch = Batch(source, indices, [0] * 16, first=first == 0)
        example = cache.arguments(batch)
        expected = type(model).forward(model, source.inner.x[indices])
        assert torch.allclose(model(*example.args), expected, atol=1e-6)
        assert batch.served


# -- state that settles at first use -------------------------------------------------------------


class Rescales(nn.Module):
    """Halves its own weights at first use, as some models do in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tower()
        self.inner.blocks[0].done = False
        first = self.inner.blocks[0]
        plain = type(first).forward

        def forward(x: Tensor) -> Tensor:
            if not first.done:
                with torch.no_grad():
                    first[0].weight.mul_(0.5)
                first.done = True
            return plain(first, x)

        first.forward = forward

    @property
    def blocks(self) -> Any:
        return self.inner.blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_finding_waits_for_the_first_pass():
    model = Rescales()
    before = model.inner.blocks[0][0].weight.clone()
    with pytest.raises(Unsettled, match=r"blocks\.0"):
        find_region(model, batch_of(8, WIDTH_OF_TOWER))
    assert torch.equal(model.inner.blocks[0][0].weight, before)
    assert model.inner.blocks[0].done is False
    model(torch.randn(2, WIDTH_OF_TOWER))
    assert not find_region(model, batch_of(8, WIDTH_OF_TOWER)).empty


WIDTH_OF_TOWER = Given().inner.x.shape[1]


def test_the_cache_takes_the_first_batch_whole_and_the_rest_from_the_store(tmp_path: Path):
    plain = run(Rescales(), None, Given())
    model = Rescales()
    with FrontierCache(model, Library(tmp_path / "stores"), min_gain=0).attached() as cache:
        trained = run(model, cache, Given())
    same_training(trained, plain)
    assert cache.report.replayed == cache.report.batches - 1


def test_buffers_of_modules_that_run_are_put_back_after_a_divergence():
    class Counts(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.middle(self.stem(x))
            return self.head(h * 2 if bool(h.sum() > 1e3) else h - 1)

    model = Counts(lambda m, h: (m.steps.add_(1), h * 1.5)[1])
    model.middle.eval()
    region = find_region(model, batch_of())
    batch = batch_of()
    large = batch_of().args[0] * 0 + 1
    with torch.no_grad():
        model.middle.linear.weight.fill_(1e3)
        model.middle.linear.bias.fill_(1e3)
    before = model.middle.steps.clone()
    rows = {s.name: torch.full((8, *s.shape), 1e3) for s in region.slots}
    with pytest.raises(FrontierError):
        region.run(type(batch).of(large), rows)
    assert torch.equal(model.middle.steps, before)


def test_blocks_filled_together_are_those_filled_one_by_one():
    model = Net()
    region = find_region(model, batch_of())
    blocks = [batch_of(32), batch_of(32), batch_of(5)]
    stream = torch.get_rng_state()
    together = list(region.fill_many(blocks))
    assert torch.equal(torch.get_rng_state(), stream)
    for block, rows in zip(blocks, together, strict=True):
        assert {n: v.tolist() for n, v in rows.items()} == {
            n: v.tolist() for n, v in region.fill(block).items()
        }


def test_filling_leaves_hooks_of_skipped_modules_as_they_were():
    """Some libraries hook every module in the first pass of the whole model."""

    class Hooks(Net):
        def forward(self, x: Tensor) -> Any:
            if not hasattr(self, "hooked"):
                self.hooked = True
                self.stem.register_forward_hook(_collect)
            return super().forward(x)

    _collect.__module__ = "transformers.utils.output_capturing"
    model = Hooks()
    region = find_region(model, batch_of())
    assert "stem" in region.skipped
    for _ in range(3):
        region.fill(batch_of(32))
    assert not model.stem._forward_hooks
    assert not hasattr(model, "hooked")


def _collect(module: nn.Module, given: Any, result: Any) -> None: ...
