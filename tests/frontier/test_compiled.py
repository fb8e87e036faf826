"""`torch.compile` beside the cache: what trains may be compiled, what is frozen is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frontier.test_cache import Given, Tower, run, tower
from frontier.test_loader import CLASSES, WIDTH, assert_same, cached
from frostline.backends.torch.example import Example
from frostline.frontier.cache import FrontierCache
from frostline.frontier.library import Library
from frostline.frontier.region import find_region


@pytest.fixture(autouse=True)
def _afresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiler:
    """A compiler that compiles nothing, and counts how often it was asked and used."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def counted(*given: Any) -> Any:
            self.calls += 1
            return graph.forward(*given)

        return counted


def in_place(module: nn.Module, compiler: Compiler) -> nn.Module:
    module.compile(backend=compiler, dynamic=True)
    return module


def wrapped(module: nn.Module, compiler: Compiler) -> nn.Module:
    made = torch.compile(module, backend=compiler, dynamic=True)
    assert isinstance(made, nn.Module)
    return made


WAYS = {"in place": in_place, "wrapped": wrapped}


def block(number: int, way: str, compiler: Compiler) -> Callable[[Tower], nn.Module]:
    """Compiles one block of a tower."""

    def compiled(model: Tower) -> nn.Module:
        model.blocks[number] = WAYS[way](model.blocks[number], compiler)
        return model

    return compiled


def trained(
    library: Library, compiled: Callable[[Tower], nn.Module], plain: Any
) -> tuple[FrontierCache, nn.Module]:
    model = compiled(tower())
    cache = cached(library, model=model)
    with cache.attached():
        mine = run(model, cache, Given())
    names = {name.replace("_orig_mod.", ""): value for name, value in mine.state.items()}
    assert_same(mine._replace(state=names), plain)
    return cache, model


@pytest.mark.parametrize("way", WAYS)
def test_what_trains_may_be_compiled(way: str, library: Library) -> None:
    """The layer at the frontier, which is handed stored values: the hardest place."""
    compiler = Compiler()

    cache, _ = trained(library, block(2, way, compiler), run(tower(), None, Given()))
    assert cache.report.replayed == cache.report.batches == 10, cache.report.notes
    assert compiler.calls >= 10
    assert compiler.graphs <= 4


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_and_compiled_is_left_out(way: str, library: Library) -> None:
    compiler = Compiler()

    cache, model = trained(library, block(1, way, compiler), run(tower(), None, Given()))
    assert cache.report.replayed == cache.report.batches == 10, cache.report.notes
    region = find_region(model, Example((torch.randn(6, WIDTH),)))
    assert region.skipped in (("blocks.0", "blocks.1"), ("blocks.0", "blocks.1#1"))


@pytest.mark.parametrize("way", WAYS)
def test_a_model_compiled_as_a_whole_runs_its_own_code(way: str, library: Library) -> None:
    """And says so; afterwards it is compiled as before."""
    compiler = Compiler()
    cache, model = trained(
        library, lambda model: WAYS[way](model, compiler), run(tower(), None, Given())
    )
    assert cache.report.replayed == cache.report.batches == 10, cache.report.notes
    assert any("compiled as a whole" in note for note in cache.report.notes)
    assert compiler.calls == 0
    assert model(torch.zeros(2, WIDTH)).shape == (2, CLASSES)
    assert compiler.calls == 1


def test_a_compiled_layer_that_trains_keeps_what_is_frozen_inside_of_it(library: Library) -> None:
    """It counts as one operation: the region ends before it."""
    compiler = Compiler()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = in_place(tower(2), compiler)
            self.stem = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(self.stem(x))

    torch.manual_seed(3)
    region = find_region(Outer(), Example((torch.randn(6, WIDTH),)))
    assert region.skipped == ("stem",)
