"""The library's cache as an engine of the harness: the whole of what people use, on the zoo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frontier import harness
from frontier.zoo_cases import SAMPLES, Case
from frostline.backends.torch.example import Example
from frostline.backends.torch.random_state import undisturbed
from frostline.frontier.cache import BLOCK, Batch, FrontierCache
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.frontier.structure import leaves_of, map_leaves

__all__ = ["compare_cached"]


class Samples:
    """The samples of a case, numbered."""

    name, samples, views, preparation, data = "zoo", SAMPLES, 1, {"zoo": 1}, {"seed": 3}

    def __init__(self, case: Case, like: Example) -> None:
        self._case = case
        self.fixed = case.batch_of is None
        with undisturbed():
            harness.seed(1)
            self._all = _of_types(case.make()[1](SAMPLES, 3), like)

    def load(self, indices: Sequence[int], views: Sequence[int]) -> Example:
        """As the protocol says."""
        return self._case.take(self._all, list(indices))

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
        """As the protocol says."""
        for first in firsts:
            yield first, self.load(range(first, min(first + BLOCK, SAMPLES)), ())


def _of_types(data: Example, like: Example) -> Example:
    """The same data; in float64 where another batch is: where the harness asks for it."""
    tensors = [x for x in leaves_of((like.args, dict(like.kwargs))).items if isinstance(x, Tensor)]
    if all(t.dtype != torch.float64 for t in tensors):
        return data

    def widen(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    return Example(*map_leaves((data.args, dict(data.kwargs)), widen, objects=True))


class Cached:
    """A cache that is attached for each step alone, so that the harness sees a plain model."""

    slots: tuple[Any, ...] = ()
    skipped: tuple[str, ...] = ()
    ends: tuple[Any, ...] = ()
    empty = False

    def __init__(self, model: nn.Module, example: Example, case: Case, folder: Path) -> None:
        self._model, self._source = model, Samples(case, example)
        self._cache = FrontierCache(model, Library(folder), min_gain=-1e9)
        self._numbered = self._steps = 0
        self._cache.attach()
        self._gate = vars(model).pop("forward")

    def fill(self, example: Example) -> dict[str, Tensor]:
        """Numbers instead of rows: the cache computes what it stores when it first needs it."""
        first, self._numbered = self._numbered, self._numbered + harness.BLOCK
        return {"number": torch.arange(first, self._numbered)}

    def run(self, example: Example, rows: Mapping[str, Tensor]) -> Any:
        """The model's output through the cache."""
        numbers = rows["number"].tolist()
        # The harness looks at what becomes of the batch, so it is this one and not a copy.
        batch = Batch(self._source, numbers, [0] * len(numbers), first=self._steps == 0,
                      device=next(self._model.parameters()).device, example=example)  # fmt: skip
        self._steps += 1
        shown = self._cache.arguments(batch)
        vars(self._model)["forward"] = self._gate
        try:
            return self._model(*shown.args, **shown.kwargs)
        finally:
            del vars(self._model)["forward"]

    def close(self) -> CacheReport:
        """Close the stores; what the cache did."""
        vars(self._model)["forward"] = self._gate
        self._cache.detach()
        return self._cache.report


def compare_cached(
    case: Case, depth: str, folder: Path
) -> tuple[harness.Outcome, CacheReport | None]:
    """As `harness.compare`, with the library's cache in place of a bare region.

    Args:
        case: what to train.
        depth: how it is frozen.
        folder: of the stores, empty.
    """
    made: list[Cached] = []

    def engine(model: nn.Module, example: Example) -> Cached:
        made.append(Cached(model, example, case, folder / str(len(made))))
        return made[-1]

    found = harness.compare(case, depth, engine)
    reports = [cached.close() for cached in made]
    return replace(found, covered=None), reports[0] if reports else None
