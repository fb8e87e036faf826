"""Models that take another way for some batches: no text is padded, so the mask is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.frontier import cache as module
from frostline.frontier.cache import Batch, FrontierCache
from frostline.frontier.library import Library

SAMPLES, LONGEST, WIDTH, CLASSES = 88, 6, 8, 3


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "frostline")


class Reader(nn.Module):
    """Words, attention under a mask that is left out where it masks nothing, the mean, a head."""

    def __init__(self, doubled: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.doubled = doubled

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        scores = self.attention(x) @ x.transpose(1, 2)
        if not mask.all():
            scores = scores.masked_fill(~mask[:, None, :], -1e9)
        elif self.doubled:
            scores = 2 * scores
        x = scores.softmax(-1) @ x
        kept = mask[:, :, None].to(x.dtype)
        return self.head((x * kept).sum(1) / kept.sum(1))


class Texts:
    """A source of texts, padded to the longest of a batch.

    Args:
        lengths: of each text.
    """

    name, views, fixed, preparation = "texts", 1, False, {"none": 1}

    def __init__(self, lengths: Sequence[int]) -> None:
        source = torch.Generator().manual_seed(4)
        self.ids = torch.randint(1, 11, (len(lengths), LONGEST), generator=source)
        self.labels = torch.randint(CLASSES, (len(lengths),), generator=source)
        self.lengths = torch.tensor(list(lengths))
        self.samples, self.data = len(lengths), {"seed": 4}

    def load(self, indices: Sequence[int], views: Sequence[int]) -> Example:
        rows = list(indices)
        longest = int(self.lengths[rows].max())
        mask = torch.arange(longest) < self.lengths[rows, None]
        return Example((self.ids[rows, :longest] * mask, mask))

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
        for first in firsts:
            span = range(first, min(first + 32, self.samples))
            yield first, self.load(span, [view] * len(span))


#: From the shortest to the longest: the last blocks are of equal lengths, as where texts are cut.
CUT = sorted([1 + i % 5 for i in range(40)] + [LONGEST] * 48)
#: The first samples are alike, and so is the recording: blocks with padding are the other way.
ALIKE = [2] * 40 + [2 + i % 5 for i in range(48)]
#: Of the first four some pairs are padded and some are not.
UNLIKE = [1, 3, 3, 3] + [3 + i % 4 for i in range(84)]
#: The same, and none is longer.
SHORT = [1, 3, 3, 3] + [1 + i % 3 for i in range(40)] + [3] * 44


def train(
    make: Callable[[], nn.Module], source: Texts, library: Library | None, *, epochs: int = 3
) -> tuple[list[Tensor], list[Tensor], FrontierCache | None]:
    """Losses, gradients of the head, and the cache that was used."""
    torch.manual_seed(0)
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    cache = None if library is None else FrontierCache(model, library, min_gain=-1e9)
    if cache is not None:
        cache.attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], []
    for epoch in range(epochs):
        order = torch.randperm(
            source.samples, generator=torch.Generator().manual_seed(epoch)
        ).tolist()
        for begin in range(0, source.samples, 8):
            rows = order[begin : begin + 8]
            example = source.load(rows, [0] * len(rows))
            if cache is not None:
                batch = Batch(source, rows, [0] * len(rows), first=begin == 0, example=example)
                example = cache.arguments(batch)
            loss = nn.functional.cross_entropy(model(*example.args), source.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            gradients += [p.grad.clone() for p in model.head.parameters()]  # type: ignore[union-attr]
    if cache is not None:
        cache.detach()
    return losses, gradients, cache


def compared(tmp_path: Any, make: Callable[[], nn.Module], lengths: Sequence[int]) -> FrontierCache:
    plain = train(make, Texts(lengths), None)
    losses, gradients, cache = train(make, Texts(lengths), Library(tmp_path / "stores"))
    torch.testing.assert_close(losses, plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, plain[1], rtol=1e-4, atol=1e-6)
    assert cache is not None
    return cache


@pytest.mark.parametrize("lengths", [CUT, ALIKE, UNLIKE, SHORT])
def test_both_ways_are_stored_and_replayed(tmp_path: Any, lengths: list[int]) -> None:
    report = compared(tmp_path, Reader, lengths).report
    assert report.replayed == report.batches
    assert report.filled_rows == len(lengths)
    assert not any("not cached" in note or "full forward" in note for note in report.notes)


def test_another_way_is_looked_for_once_for_all_batches_that_take_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    real = module.find_region

    def counted(*args: Any, **options: Any) -> Any:
        found.append(1)
        return real(*args, **options)

    monkeypatch.setattr(module, "find_region", counted)
    compared(tmp_path, Reader, CUT)
    assert len(found) == 2


@pytest.mark.parametrize("lengths", [CUT, ALIKE], ids=["cut", "alike"])
def test_a_way_that_gives_other_values_for_the_same_samples_is_refused(
    tmp_path: Any, lengths: list[int]
) -> None:
    """What a batch without padding stores would be wrong among others, and is not stored."""
    cache = compared(tmp_path, lambda: Reader(doubled=True), lengths)
    said = "another way through the model is not cached: 'div' gives something else"
    assert any(note.startswith(said) for note in cache.report.notes)
    assert cache.report.replayed < cache.report.batches


def test_ways_without_number_are_given_up(tmp_path: Any) -> None:
    class Strange(Reader):
        """Does something else for each number of padded places."""

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.words(ids)
            for _ in range(int((~mask).sum())):
                x = x + 0
            kept = mask[:, :, None].to(x.dtype)
            return self.head((x * kept).sum(1) / kept.sum(1))

    cache = compared(tmp_path, Strange, [1 + i % LONGEST for i in range(SAMPLES)])
    assert cache.report.replayed < cache.report.batches
