"""Batches computed in pieces: which size is taken, and that no value depends on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.frontier.pieces import WORTH, Pieces
from frostline.frontier.region import Region, find_region

WHOLE, PIECE = 32, 8
SECONDS = st.floats(1e-6, 1e3)


def settled(whole_s: list[float], pieces_s: float) -> int:
    """The size after the trials, when whole batches and pieces take so long."""
    pieces, times = Pieces(), iter(whole_s)
    pieces.allow(PIECE, whole=WHOLE)
    for _ in range(3):
        whole = pieces.size(WHOLE) == WHOLE
        pieces.add(WHOLE, next(times) if whole else pieces_s)
    return pieces.size(WHOLE)


@given(st.lists(SECONDS, min_size=2, max_size=2), SECONDS)
def test_the_faster_way_is_taken(whole_s: list[float], pieces_s: float):
    assert (settled(whole_s, pieces_s) == PIECE) == (pieces_s < WORTH * min(whole_s))


def test_one_disturbed_batch_does_not_decide():
    assert settled([5.0, 1.0], 1.2) == WHOLE


@given(st.integers(1, 100), st.integers(0, 100), st.integers(1, 100))
def test_only_batches_that_pieces_divide_are_cut(samples: int, size: int, whole: int):
    pieces = Pieces()
    pieces.allow(size, whole=whole)
    for _ in range(4):
        taken = pieces.size(samples)
        assert taken == samples or (taken == size and samples == whole and samples % size == 0)
        pieces.add(samples, 1.0 if taken == samples else 0.1)


def test_nothing_is_cut_before_it_was_allowed_or_after_it_was_forbidden():
    pieces = Pieces()
    assert pieces.size(WHOLE) == WHOLE
    pieces.allow(PIECE, whole=WHOLE)
    pieces.add(WHOLE, 1.0)
    assert pieces.size(WHOLE) == PIECE
    pieces.forbid()
    assert pieces.size(WHOLE) == WHOLE


# -- in a region ------------------------------------------------------------------------------


class Net(nn.Module):
    """A frozen convolution, what is done with it, and a head that trains."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.middle = middle
        self.conv.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes in which batches are computed, where pieces are taken as soon as allowed."""
    taken: list[int] = []

    def size(self: Pieces, samples: int) -> int:
        return self._size if samples == self._whole else samples

    def filled(self: Region, example: Example) -> dict[int, Tensor]:
        taken.append(len(example.args[0]))
        return original(self, example)

    original = Region._filled
    monkeypatch.setattr(Pieces, "size", size)
    monkeypatch.setattr(Region, "_filled", filled)
    return taken


def filled_twice(model: nn.Module, sizes: list[int], last: int = WHOLE) -> tuple[Tensor, Tensor]:
    """The rows of a batch computed whole, and what a batch of them gives afterwards."""
    torch.manual_seed(0)
    batch = torch.randn(WHOLE, 3, 6, 6)
    region = find_region(model, Example.of(batch[:4]))
    sizes.clear()
    whole, again = region.fill_many([Example.of(batch), Example.of(batch[:last])])
    (name,) = whole
    return whole[name], again[name]


def test_pieces_give_the_rows_of_the_whole_batch(sizes: list[int]):
    whole, pieces = filled_twice(Net(torch.relu), sizes)
    assert sizes == [32, 8, 8, 8, 8, 8]  # whole, its check, and the same in pieces
    assert torch.equal(whole, pieces)


def test_a_shorter_batch_is_computed_whole(sizes: list[int]):
    whole, again = filled_twice(Net(torch.relu), sizes, last=20)
    assert sizes == [32, 8, 20]
    assert torch.equal(whole[:20], again)


def test_what_differs_in_the_last_bit_is_not_cut(sizes: list[int], monkeypatch: pytest.MonkeyPatch):
    def nudged(self: Region, example: Example) -> dict[int, Tensor]:
        kept = original(self, example)
        if len(example.args[0]) == PIECE:
            return {n: torch.nextafter(v, torch.tensor(9.0)) for n, v in kept.items()}
        return kept

    original = Region._filled
    monkeypatch.setattr(Region, "_filled", nudged)
    whole, again = filled_twice(Net(torch.relu), sizes)
    assert sizes == [32, 8, 32]
    assert torch.equal(whole, again)


def test_a_model_that_takes_another_way_for_a_piece_is_computed_whole(sizes: list[int]):
    calls: list[int] = []

    def looks(h: Tensor) -> Tensor:
        calls.append(len(h))
        other = len(h) == PIECE and calls.count(PIECE) > 2
        return torch.relu(h).clone() if other else torch.relu(h)

    whole, again = filled_twice(Net(looks), sizes)
    assert sizes == [32, 8, 8, 8, 32]
    assert torch.equal(whole, again)
