"""The cache itself: what it does when plan, weights, modes, data or disk are not what they were."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import frostline
from frontier.test_loader import (
    CLASSES,
    SAMPLES,
    WIDTH,
    Counted,
    Trace,
    assert_same,
    cached,
    net,
    pair,
    seeded_loader,
    train,
)
from frostline.backends.torch.example import Example
from frostline.frontier import balance
from frostline.frontier import cache as module
from frostline.frontier.cache import Batch, FrontierCache
from frostline.frontier.encodings import Encoding
from frostline.frontier.library import Library
from frostline.frontier.store import Column, Store, bytes_of_rows

Change = Callable[[nn.Module, int], None]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "frostline")


class Tower(nn.Module):
    """Blocks in a row, each with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU())
              for _ in range(4)]
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def tower(frozen: int = 2) -> Tower:
    torch.manual_seed(0)
    model = Tower()
    freeze_first(model, frozen)
    return model


def freeze_first(model: nn.Module, count: int) -> None:
    for number, block in enumerate(model.blocks):
        block.requires_grad_(number >= count)
        for parameter in block.parameters():
            parameter.grad = None


class Given:
    """A source of plain tensors that counts what is asked of it."""

    name, views, fixed, preparation = "given", 1, True, {"none": 1}

    def __init__(self, samples: int = SAMPLES) -> None:
        self.inner = Counted(samples)
        self.samples, self.data = samples, {"seed": 5}
        self.loaded = self.blocked = 0

    def load(self, indices: Sequence[int], views: Sequence[int]) -> Example:
        self.loaded += len(indices)
        return Example((self.inner.x[list(indices)],))

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
        for first in firsts:
            self.blocked += 1
            yield first, Example((self.inner.x[first : first + 32],))


def run(
    model: nn.Module,
    cache: FrontierCache | None,
    source: Given,
    *,
    epochs: int = 2,
    change: Change = lambda model, step: None,
    size: int = 15,
) -> Trace:
    """Train on a source by hand; `change(model, step)` runs before each step."""
    torch.manual_seed(1)
    losses, gradients = [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(source.samples).tolist()
        for begin in range(0, source.samples, size):
            change(model, step)
            rows = order[begin : begin + size]
            example = Example((source.inner.x[rows],))
            if cache is not None:
                batch = Batch(source, rows, [0] * len(rows), first=begin == 0)
                example = cache.arguments(batch)
            loss = nn.functional.cross_entropy(model(*example.args), source.inner.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
            gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            step += 1
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return Trace(losses, gradients, state, [], torch.get_rng_state().tolist())


def compare(
    library: Library,
    change: Change = lambda model, step: None,
    *,
    make: Callable[[], nn.Module] = tower,
    epochs: int = 2,
    exact: bool = False,
    **options: Any,
) -> tuple[FrontierCache, Given]:
    """The same training with and without the cache; both must agree."""
    plain = run(make(), None, Given(), change=change, epochs=epochs)
    model, source = make(), Given()
    cache = cached(library, model=model, **options)
    with cache.attached():
        assert_same(run(model, cache, source, change=change, epochs=epochs), plain, exact=exact)
    return cache, source


def test_a_plan_that_never_moves(library: Library) -> None:
    cache, source = compare(library)
    assert cache.report.replayed == cache.report.batches == 10
    assert cache.report.filled_rows == SAMPLES
    assert source.blocked == 3


def test_a_setting_that_keeps_changing_ends_the_cache(library: Library) -> None:
    """Finding the region anew for each step costs more than the cache saves."""

    def turn(model: nn.Module, step: int) -> None:
        vars(model.blocks)["turned"] = step

    cache, _ = compare(library, turn, epochs=3)
    assert cache.report.batches == 15
    assert cache.report.replayed == module.PATIENCE
    assert cache.report.notes[-1] == "not cached any more: blocks.turned has changed 5 times"


# -- the plan moves ------------------------------------------------------------------------------


def test_freezing_more_is_filled_from_the_shallower_store(library: Library) -> None:
    """In the middle of an epoch the old store serves on; then the new one is filled from it."""
    seen: list[tuple[int, int, int]] = []
    model, source = tower(1), Given()
    cache = cached(library, model=model)

    def change(model: nn.Module, step: int) -> None:
        seen.append((step, source.blocked, cache.report.filled_rows))
        if step == 2:
            freeze_first(model, 3)

    plain = run(tower(1), None, Given(), epochs=3,
                change=lambda m, step: freeze_first(m, 3) if step == 2 else None)  # fmt: skip
    with cache.attached():
        mine = run(model, cache, source, epochs=3, change=change)
    assert_same(mine, plain)
    assert cache.report.replayed == 15
    assert source.blocked == 3
    at = {step: rows for step, _, rows in seen}
    assert at[5] == SAMPLES  # the first epoch knew one store only
    assert cache.report.filled_rows == 2 * SAMPLES


def test_unfreezing_falls_back(library: Library) -> None:
    cache, _ = compare(library, lambda m, step: freeze_first(m, 0) if step == 3 else None)
    assert cache.report.replayed == 3


def test_unfreezing_a_part_falls_back_to_what_still_holds(library: Library) -> None:
    def change(model: nn.Module, step: int) -> None:
        if step in (5, 8):
            freeze_first(model, {5: 3, 8: 1}[step])

    cache, source = compare(library, change, make=lambda: tower(1), epochs=3)
    assert cache.report.replayed == cache.report.batches
    assert source.blocked == 3


def test_a_plan_that_flips_keeps_what_still_holds(library: Library) -> None:
    def change(model: nn.Module, step: int) -> None:
        freeze_first(model, 1 + step // 5 % 2)

    cache, source = compare(library, change, epochs=6)
    # The first block never trains; the second one does, so it is filled anew from the first.
    assert cache.report.filled_rows == 4 * SAMPLES
    assert source.blocked == 3
    assert cache.report.replayed == 30


# -- space ---------------------------------------------------------------------------------------


def budget_for(rows: int, stores: int = 1) -> int:
    """Bytes in which so many rows of each of `stores` depths have room."""
    return stores * bytes_of_rows({Column("blocks.1", "float32"): (WIDTH,)}, rows)


@pytest.mark.parametrize("rows", [0, 32, 64])
def test_a_budget_smaller_than_the_data(rows: int, library: Library) -> None:
    budget = budget_for(rows)
    cache, _ = compare(library, budget_bytes=budget, epochs=3)
    assert cache.report.replayed == 15
    assert SAMPLES < cache.report.filled_rows < 4 * SAMPLES
    (told,) = [note for note in cache.report.notes if "budget" in note]
    assert f"it holds {rows} of {SAMPLES} rows of given ({SAMPLES} samples)" in told
    assert cache.report.stored_bytes <= budget


def test_a_later_run_is_told_of_the_budget_as_well(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    compare(library, budget_bytes=budget_for(32))
    caplog.set_level("WARNING", "frostline")
    cache, _ = compare(library, budget_bytes=budget_for(32))
    assert cache.report.found_rows == 32
    assert any("it holds 32 of" in note for note in cache.report.notes)
    assert any("the budget is full" in record.message for record in caplog.records)


def test_a_budget_with_room_for_all_says_nothing(library: Library) -> None:
    cache, _ = compare(library, budget_bytes=budget_for(96))
    assert cache.report.filled_rows == SAMPLES
    assert not any("budget" in note for note in cache.report.notes)


def freezing_on(model: nn.Module, step: int) -> None:
    """One block more in each epoch."""
    if step % 5 == 0:
        freeze_first(model, 1 + step // 5)


@pytest.mark.parametrize("whose", ["model", "library"])
def test_depths_that_serve_nothing_make_way(whose: str, library: Library) -> None:
    """Room for two depths: the one in use, and the one that it is filled from."""
    compare(Library(library.root.parent / "roomy"), make=lambda: tower(1), epochs=1)
    (entry,) = Library(library.root.parent / "roomy").entries()
    budget = budget_for(96) + int(1.5 * entry.size_bytes)
    options: dict[str, Any] = {"budget_bytes": budget - 0.5 * entry.size_bytes}
    if whose == "library":  # it counts its own notes on each store as well
        library, options = Library(library.root, budget_bytes=budget), {}
    cache, source = compare(library, freezing_on, make=lambda: tower(1), epochs=4, **options)
    assert cache.report.replayed == 20
    assert source.blocked == 3  # never from the input again
    assert cache.report.filled_rows == 4 * SAMPLES
    assert not any("budget is full" in note for note in cache.report.notes)
    assert sum("made way" in note for note in cache.report.notes) == 2
    left = sorted(entry.about["frontier"] for entry in library.entries())
    assert left == ["blocks.2", "blocks.3"]


def test_depths_live_side_by_side_where_there_is_room(library: Library) -> None:
    cache, _ = compare(library, freezing_on, make=lambda: tower(1), epochs=4,
                       budget_bytes=budget_for(96, stores=5))  # fmt: skip
    assert not any("made way" in note for note in cache.report.notes)
    assert len(library.entries()) == 4


def test_what_serves_other_samples_stays(library: Library) -> None:
    model, source, other = tower(1), Given(), Given()
    other.name = "other"
    cache = cached(library, model=model, budget_bytes=budget_for(96) + 20_000)
    with cache.attached():
        run(model, cache, other, epochs=1)
        run(model, cache, source, epochs=1)
        freeze_first(model, 3)
        run(model, cache, source, epochs=1)
        freeze_first(model, 1)
        filled = cache.report.filled_rows
        run(model, cache, other, epochs=1)
        assert cache.report.filled_rows == filled
    assert any("rows of given" in note for note in cache.report.notes)
    assert not any("made way" in note for note in cache.report.notes)


def test_a_store_does_not_take_room_from_itself(library: Library) -> None:
    """A setting changed and changed back: the same store again, with the same room."""

    def change(model: nn.Module, step: int) -> None:
        if step in (5, 10):
            model.blocks[1][1].eps = {5: 0.5, 10: 1e-5}[step]

    cache, _ = compare(library, change, epochs=3, budget_bytes=budget_for(96, stores=2))
    assert cache.report.filled_rows == 2 * SAMPLES
    assert not any("made way" in note or "full" in note for note in cache.report.notes)


# -- the clock ------------------------------------------------------------------------------------


def slow(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Each reading takes so long."""
    read = Store.read

    def late(self: Store, rows: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return read(self, rows, **options)

    monkeypatch.setattr(Store, "read", late)


@pytest.mark.parametrize("strict", [False, True])
def test_a_cache_that_costs_time_is_given_up(
    strict: bool, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "ENOUGH_READINGS", 8)
    slow(monkeypatch, seconds=0.02)
    model, source = tower(), Given()
    cache = FrontierCache(model, library, min_gain=1e-6, strict=strict)
    with cache.attached():
        mine = run(model, cache, source, epochs=4)
    assert_same(mine, run(tower(), None, Given(), epochs=4))
    (told,) = [note for note in cache.report.notes if "reading a stored sample takes" in note]
    # Where runs must be able to go on bit for bit, the clock may not decide.
    assert cache.report.replayed == (20 if strict else 8)
    assert ("costs time" in told) is strict


def test_where_the_user_insists_the_clock_is_not_asked(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "ENOUGH_READINGS", 8)
    slow(monkeypatch, seconds=0.02)
    model = tower()
    cache = FrontierCache(model, library, min_gain=0.0)
    with cache.attached():
        run(model, cache, Given(), epochs=4)
    assert cache.report.replayed == 20


def test_a_cache_that_saves_time_stays(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "ENOUGH_READINGS", 8)

    class Slow(Given):
        def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
            for found in super().blocks(firsts, view):
                time.sleep(0.1)
                yield found

    model = tower()
    cache = FrontierCache(model, library, min_gain=1e-6)
    with cache.attached():
        run(model, cache, Slow(), epochs=4)
    assert cache.report.replayed == 20


# -- what is said ---------------------------------------------------------------------------------


def test_what_is_stored_for_one_run_only_is_said(library: Library) -> None:
    model, source = tower(), Given()
    source.data = None
    cache = cached(library, model=model)
    with cache.attached():
        run(model, cache, source, epochs=1)
    assert "stored for this run only: data.content: which samples these are" in cache.report.notes


def test_where_the_region_ends_too_early_is_said(library: Library) -> None:
    def make() -> nn.Module:
        model = tower(3)
        model.blocks[1].append(nn.Dropout(0.5))
        return model

    cache, _ = compare(library, make=make)
    said = "not everything that is frozen is left out: blocks.1.3 draws random numbers"
    assert any(note.startswith(said) for note in cache.report.notes), cache.report.notes
    whole, _ = compare(Library(library.root.parent / "other"), make=lambda: tower(3))
    assert not any("left out" in note for note in whole.report.notes)


@pytest.mark.parametrize(("encoding", "tolerance"), [("bfloat16", 3e-2), ("float16", 3e-3),
                                                     ("int8", 5e-2)])  # fmt: skip
def test_encodings_are_as_near_as_they_can(
    encoding: Encoding, tolerance: float, library: Library
) -> None:
    plain = run(tower(), None, Given())
    model, source = tower(), Given()
    cache = cached(library, model=model, encoding=encoding)
    with cache.attached():
        mine = run(model, cache, source)
    assert cache.report.replayed == 10, cache.report.notes
    torch.testing.assert_close(mine.losses, plain.losses, rtol=tolerance, atol=tolerance)
    assert not torch.equal(torch.stack(mine.losses), torch.stack(plain.losses))


# -- damage and errors ----------------------------------------------------------------------------


def test_damaged_rows_are_computed_again(library: Library) -> None:
    compare(library)
    (values,) = library.root.rglob("rows/*.rows")
    body = bytearray(values.read_bytes())
    body[700:720] = bytes(20)
    values.write_bytes(body)
    cache, _ = compare(library)
    assert cache.report.replayed == 10
    assert cache.report.filled_rows == 1 + 32  # at once; and with its block when it comes again
    assert compare(library)[0].report.filled_rows == 0


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stores hold wrong rows under right checksums."""
    write = Store.write

    def wrong(self: Store, first: int, values: Any) -> bool:
        return write(self, first, {name: value * 1.5 for name, value in values.items()})

    monkeypatch.setattr(Store, "write", wrong)


def test_wrong_rows_with_right_checksums_are_found(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    cache, _ = compare(library, exact=True)
    assert cache.report.replayed == 0
    assert any("blocks.1" in note and "not what it gives now" in note
               for note in cache.report.notes), cache.report.notes  # fmt: skip


def test_rows_that_go_wrong_later_are_found_by_chance(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKED_EVERY", 1)
    model, source = tower(), Given()
    cache = cached(library, model=model)
    read = Store.read

    def wrong(self: Store, rows: Any, **options: Any) -> Any:
        values, good = read(self, rows, **options)
        return {name: value + 1 for name, value in values.items()}, good

    def change(model: nn.Module, step: int) -> None:
        if step == 6:
            monkeypatch.setattr(Store, "read", wrong)

    with cache.attached():
        mine = run(model, cache, source, change=change)
    assert_same(mine, run(tower(), None, Given()))
    assert cache.report.replayed == 6


# -- the model changes under our hands -------------------------------------------------------------


def test_a_weight_of_the_frozen_region_is_changed_by_hand(library: Library) -> None:
    def change(model: nn.Module, step: int) -> None:
        if step == 4:
            with torch.no_grad():
                model.blocks[1][0].weight.mul_(1.01)

    cache, _source = compare(library, change, epochs=3)
    assert cache.report.filled_rows == 2 * SAMPLES
    assert cache.report.replayed == 15
    assert len(library.entries()) == 2


def test_a_weight_is_replaced(library: Library) -> None:
    def change(model: nn.Module, step: int) -> None:
        if step == 4:
            weight = model.blocks[0][0].weight
            model.blocks[0][0].weight = nn.Parameter(weight.detach() + 0.1, requires_grad=False)

    compare(library, change, epochs=3)
    assert len(library.entries()) == 2


def test_a_weight_is_written_without_changing_it(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data-parallel wrappers do so with buffers at each step: the store stays in use."""
    opened: list[object] = []
    whole = Library.open
    monkeypatch.setattr(Library, "open", lambda *a, **k: opened.append(a) or whole(*a, **k))

    def change(model: nn.Module, step: int) -> None:
        weight = model.blocks[0][0].weight
        with torch.no_grad():
            weight.copy_(weight.clone())

    cache, _ = compare(library, change)
    assert cache.report.filled_rows == SAMPLES
    assert len(opened) == 1


def test_an_attribute_of_a_frozen_module_is_changed(library: Library) -> None:
    def change(model: nn.Module, step: int) -> None:
        if step == 4:
            model.blocks[1][1].eps = 0.5

    cache, _ = compare(library, change, epochs=3)
    assert cache.report.filled_rows == 2 * SAMPLES
    assert cache.report.replayed == 15
    assert len(library.entries()) == 2


def test_a_frozen_module_is_replaced(library: Library) -> None:
    def change(model: nn.Module, step: int) -> None:
        if step == 4:
            torch.manual_seed(3)
            model.blocks[1][2] = nn.Tanh()

    cache, _ = compare(library, change, epochs=3)
    assert cache.report.replayed >= 10


def test_modes_are_changed(library: Library) -> None:
    """Dropout in the frozen part is random in training mode: then it is not stored."""

    def make() -> nn.Module:
        model = tower(2)
        model.blocks[1].append(nn.Dropout(0.5))
        model.blocks[1][3].eval()
        return model

    def change(model: nn.Module, step: int) -> None:
        if step == 5:
            model.blocks[1][3].train()
        if step == 10:
            model.blocks[1][3].eval()

    cache, _ = compare(library, change, make=make, epochs=3)
    assert cache.report.replayed >= 10


def test_training_and_evaluation_take_turns(library: Library) -> None:
    def change(model: nn.Module, step: int) -> None:
        model.train(step % 2 == 0)

    cache, _ = compare(library, change, epochs=4)
    assert cache.report.replayed == 20


def test_a_normalisation_that_follows_the_data_is_not_stored(library: Library) -> None:
    def make() -> nn.Module:
        model = net()
        frostline.unfreeze(model)
        model.stem.requires_grad_(requires_grad=False)
        return model.train()

    cache, _ = compare(library, make=make)
    assert cache.report.replayed == 10
    rows = [entry.about["frontier"] for entry in library.entries()]
    assert rows == ["stem.0"]  # what comes before the norm


# -- coming back ----------------------------------------------------------------------------------


def test_resuming_reuses_the_store_and_gives_the_same_bits(library: Library) -> None:
    first, _ = tower(), None
    cache = cached(library, model=first)
    with cache.attached():
        one = run(first, cache, Given())
    again, source = tower(), Given()
    cache = cached(library, model=again)
    with cache.attached():
        two = run(again, cache, source)
    assert cache.report.filled_rows == source.blocked == 0
    assert cache.report.replayed == 10
    assert_same(two, one, exact=True)


def test_an_interrupted_filling_goes_on_where_it_ended(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks are written when the few that are loaded together have been computed.
    monkeypatch.setattr(module, "_HEAP_BLOCKS", 1)

    class Breaks(Given):
        def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
            for number, block in enumerate(super().blocks(firsts, view)):
                if number == 1:
                    raise KeyboardInterrupt
                yield block

    _whole, _ = compare(Library(library.root.parent / "other"))
    model = tower()
    cache = cached(library, model=model)
    with pytest.raises(KeyboardInterrupt), cache.attached():
        run(model, cache, Breaks())
    assert "forward" not in vars(model)
    again, source = tower(), Given()
    cache = cached(library, model=again)
    with cache.attached():
        mine = run(again, cache, source)
    assert source.blocked == 2
    assert cache.report.filled_rows == SAMPLES - 32
    assert_same(mine, run(tower(), None, Given()))


def test_other_data_weights_or_transforms_get_another_store(library: Library) -> None:
    def once(model: nn.Module, **facts: Any) -> int:
        source = Given()
        vars(source).update(facts)
        cache = cached(library, model=model)
        with cache.attached():
            run(model, cache, source, epochs=1)
        return cache.report.filled_rows

    other = tower()
    with torch.no_grad():
        other.blocks[0][0].bias.add_(1e-7)
    assert once(tower()) == SAMPLES
    assert once(tower()) == 0
    assert once(other) == SAMPLES
    assert once(tower(), data={"seed": 6}) == SAMPLES
    assert once(tower(), preparation={"none": 2}) == SAMPLES
    assert [once(tower(), data=None) for _ in range(2)] == [SAMPLES, SAMPLES]


SECOND = """
import sys
sys.path[:0] = {paths!r}
from frontier.test_cache import Given, Library, Path, cached, run, tower
model = tower()
cache = cached(Library(Path({root!r})), model=model)
with cache.attached():
    trace = run(model, cache, Given())
print("RESULT", [loss.item() for loss in trace.losses], cache.report.replayed)
"""


@pytest.mark.slow
def test_two_processes_at_once(library: Library) -> None:
    code = SECOND.format(paths=[str(Path(__file__).parents[1])], root=str(library.root))
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    plain = [loss.item() for loss in run(tower(), None, Given()).losses]
    for answer in answers:
        losses, _, replayed = answer.partition("RESULT ")[2].rpartition(" ")
        np.testing.assert_allclose(np.fromstring(losses[1:-1], sep=","), plain, rtol=1e-5)
        assert int(replayed) == 10
    assert len(library.entries()) == 1


# -- what it leaves alone -------------------------------------------------------------------------


def test_a_model_that_trains_whole_is_left_alone(library: Library) -> None:
    cache, source = compare(library, make=lambda: tower(0), exact=True)
    assert cache.report.replayed == source.blocked == 0
    assert not library.root.exists()


def test_where_little_is_gained_nothing_is_stored(library: Library) -> None:
    model, source = tower(1), Given()
    cache = FrontierCache(model, library, min_gain=0.9)
    with cache.attached():
        assert_same(run(model, cache, source), run(tower(1), None, Given()), exact=True)
    assert cache.report.replayed == 0
    assert any("would save" in note for note in cache.report.notes)


def test_a_disk_that_refuses_costs_only_time(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> bool:
        raise frostline.errors.StorageError("write", found="no space left", fix="make room")

    monkeypatch.setattr(Store, "write", full)
    cache, _ = compare(library, exact=True)
    assert cache.report.replayed == 0
    assert any("no space left" in note for note in cache.report.notes)


def test_detaching_gives_the_forward_of_the_user_back(library: Library) -> None:
    model = tower()
    own = model.forward
    model.forward = own
    cache = cached(library, model=model)
    with cache.attached():
        assert model.forward is not own
        copy.deepcopy(model)(torch.zeros(2, WIDTH))
    assert vars(model)["forward"] is own


def test_a_loader_and_the_bits(library: Library) -> None:
    """Rows read from the store are those that the blocks gave: two cached runs are equal."""
    traces = []
    for _ in range(2):
        model = net()
        cache = cached(library, model=model)
        traces.append(train(model, cache.loader(seeded_loader(Counted())), pair))
        cache.detach()
    assert_same(traces[1], traces[0], exact=True)
