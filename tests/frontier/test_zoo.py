"""Every model of the zoo, trained with and without its frozen region; and the harness itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontier import harness
from frontier.zoo import CASES
from frontier.zoo_small import Tower
from frostline.backends.torch.example import Example
from frostline.errors import FrontierError

CELLS = [(case, depth) for case in CASES.values() for depth in case.depths]
#: One depth of each: deep in the model, where friendly ones still train a part of the backbone.
FAST = [(case, list(case.depths)[-1 if case.hostile else -2]) for case in CASES.values()
        if len(case.depths) > 1]  # fmt: skip
FAST += [(case, next(iter(case.depths))) for case in CASES.values() if len(case.depths) == 1]
SLOW = [cell for cell in CELLS if cell not in FAST]


EVERY = ""
#: What the region does not do yet, by case and depth; an entry that is mended must go.
KNOWN = {
    ("GRU on packed sequences", EVERY): "refused: packed data change their length with the batch",
    ("nested keyword-only inputs", EVERY): "refused: a list of one text per sample",
    ("backbone in inference mode", EVERY): "refused: such tensors count no writes",
    ("BERT, eager attention, all hidden states and attentions out", EVERY):
        "refused: transformers collects attentions of layers that do not run",
    ("batch of a class of its own", EVERY): "refused: samples inside an object",
}  # fmt: skip


def named(cells: list[Any], known: Mapping[tuple[str, str], str] = KNOWN) -> list[Any]:
    def marks(name: str, depth: str) -> list[pytest.MarkDecorator]:
        why = known.get((name, depth)) or known.get((name, EVERY))
        return [pytest.mark.xfail(reason=why)] if why else []

    return [
        pytest.param(case, depth, id=f"{case.name}-{depth}", marks=marks(case.name, depth))
        for case, depth in cells
    ]


def check(case: harness.Case, depth: str) -> None:
    found = harness.compare(case, depth)
    if case.needs == "verification":
        assert found.kind != "crashed", found
        return
    once = found.kind == "diverged" and found.full_steps <= 1  # state that settles at first use
    assert found.kind in case.right(depth) or once, found


@pytest.mark.parametrize(("case", "depth"), named(FAST))
def test_the_region_changes_nothing(case: harness.Case, depth: str) -> None:
    check(case, depth)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "depth"), named(SLOW))
def test_the_region_changes_nothing_at_any_depth(case: harness.Case, depth: str) -> None:
    check(case, depth)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "depth"), named(CELLS, {}))
def test_two_uncached_twins_agree_to_the_bit(case: harness.Case, depth: str) -> None:
    found = harness.compare(case, depth, harness.Uncached)
    assert found.kind == "equal", found


def test_what_is_known_is_there() -> None:
    cells = {(case.name, depth) for case, depth in CELLS} | {(name, EVERY) for name in CASES}
    assert not KNOWN.keys() - cells


def test_the_zoo_is_large() -> None:
    assert sum(not case.hostile for case in CASES.values()) >= 60
    assert sum(case.hostile for case in CASES.values()) >= 60


def test_every_sample_is_met_in_batches_of_several_sizes() -> None:
    order = harness.order()
    assert sorted(i for batch in order for i in batch) == list(range(harness.SAMPLES))
    assert len({len(batch) for batch in order}) > 2
    assert all(batch != sorted(batch) for batch in order)


# -- the harness sees what is planted ----------------------------------------------------------


class HandCut:
    """A region of the tower cut by hand behind its first block; planted faults inherit."""

    slots: tuple[Any, ...] = ()
    skipped = ("stem", "first")
    ends: tuple[Any, ...] = ()
    empty = False

    def __init__(self, model: nn.Module, example: Example) -> None:
        assert isinstance(model, Tower)
        self.model = model
        self.calls = 0
        self.find(example)

    def find(self, example: Example) -> None: ...

    def fill(self, example: Example) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"first": self.model.first(F.relu(self.model.stem(example.args[0])))}

    def run(self, example: Example, rows: Mapping[str, Tensor]) -> Any:
        self.calls += 1
        return self.rest(rows["first"])

    def rest(self, h: Tensor) -> Any:
        return self.model.head(self.model.last(self.model.middle(h)))


PLANTED: dict[str, tuple[type[HandCut], str, str]] = {}


def planted(kind: str, words: str = "") -> Callable[[type[HandCut]], type[HandCut]]:
    def add(engine: type[HandCut]) -> type[HandCut]:
        PLANTED[engine.__name__] = (engine, kind, words)
        return engine

    return add


planted("equal")(HandCut)


@planted("close")
class LastBits(HandCut):
    def rest(self, h: Tensor) -> Any:
        return super().rest(h * (1 + 2e-7))


@planted("DIFFERENT", "output")
class SlightlyOff(HandCut):
    def rest(self, h: Tensor) -> Any:
        return super().rest(h * (1 + 1e-4))


@planted("DIFFERENT", "output")
class OtherSample(HandCut):
    def rest(self, h: Tensor) -> Any:
        return super().rest(h.roll(1, 0))


@planted("DIFFERENT", "output")
class OneWrongRow(HandCut):
    def rest(self, h: Tensor) -> Any:
        return super().rest(torch.cat([h[:-1], h[:1]]))


@planted("DIFFERENT", "output")
class BatchAsFilled(HandCut):
    """Rows depend on the batch in which they were filled."""

    def fill(self, example: Example) -> dict[str, Tensor]:
        rows = super().fill(example)["first"]
        return {"first": rows - 0.01 * rows.mean(0)}


@planted("DIFFERENT", "output")
class Stale(HandCut):
    """Gives the rows of the first batch for ever."""

    kept: Tensor | None = None

    def rest(self, h: Tensor) -> Any:
        if self.kept is None:
            self.kept = h
        return super().rest(self.kept[torch.arange(len(h)) % len(self.kept)])


@planted("DIFFERENT", "step 2: output")
class StaleLater(HandCut):
    """Remembers the output of the live part in the third step."""

    def rest(self, h: Tensor) -> Any:
        return super().rest(h) * (1 if self.calls < 3 else 1.01)


@planted("DIFFERENT", "gradient of middle")
class Detached(HandCut):
    def rest(self, h: Tensor) -> Any:
        return self.model.head(self.model.last(self.model.middle(h).detach()))


@planted("crashed", "does not require grad")
class NoGradient(HandCut):
    def rest(self, h: Tensor) -> Any:
        return super().rest(h).detach()


@planted("DIFFERENT", "gradient of head.bias")
class GradientLost(HandCut):
    def rest(self, h: Tensor) -> Any:
        head = self.model.head
        h = self.model.last(self.model.middle(h))
        return F.linear(h, head.weight, head.bias.detach())


@planted("DIFFERENT", "gradient of stem")
class FrozenGetsGradient(HandCut):
    def rest(self, h: Tensor) -> Any:
        stem = self.model.stem.weight.requires_grad_()
        return super().rest(h) + 0 * stem.sum()


@planted("DIFFERENT", "random state of torch")
class DrawsTorch(HandCut):
    def rest(self, h: Tensor) -> Any:
        torch.rand(1)
        return super().rest(h)


@planted("DIFFERENT", "random state of numpy")
class DrawsNumpy(HandCut):
    def rest(self, h: Tensor) -> Any:
        np.random.rand()  # noqa: NPY002
        return super().rest(h)


@planted("DIFFERENT", "random state of python")
class DrawsPython(HandCut):
    def rest(self, h: Tensor) -> Any:
        random.random()
        return super().rest(h)


@planted("DIFFERENT", "finding the region moved random state")
class DrawsWhileFinding(HandCut):
    def find(self, example: Example) -> None:
        torch.rand(1)


@planted("DIFFERENT", "filling the region moved random state")
class DrawsWhileFilling(HandCut):
    def fill(self, example: Example) -> dict[str, Tensor]:
        random.random()
        return super().fill(example)


@planted("DIFFERENT", "finding the region moved hooks of first")
class LeavesHook(HandCut):
    def find(self, example: Example) -> None:
        self.model.first.register_forward_hook(lambda *_: None)


@planted("DIFFERENT", "finding the region moved parameter stem.weight")
class WritesWeight(HandCut):
    def find(self, example: Example) -> None:
        with torch.no_grad():
            self.model.stem.weight[0, 0] += 1e-3


@planted("DIFFERENT", "finding the region moved attribute")
class LeavesMode(HandCut):
    def find(self, example: Example) -> None:
        self.model.last.eval()


@planted("DIFFERENT", "filling the region moved attribute last.seen")
class LeavesAttribute(HandCut):
    def fill(self, example: Example) -> dict[str, Tensor]:
        vars(self.model.last)["seen"] = 1
        return super().fill(example)


@planted("DIFFERENT", "finding the region moved gradient of")
class LeavesGradient(HandCut):
    def find(self, example: Example) -> None:
        self.model(*example.args).sum().backward()


@planted("DIFFERENT", "the caller's batch")
class WritesBatch(HandCut):
    def run(self, example: Example, rows: Mapping[str, Tensor]) -> Any:
        example.args[0][0, 0] = 0
        return super().run(example, rows)


class Disguised(Tensor):
    """Looks like a tensor and is none of the model's."""


@planted("DIFFERENT", "Disguised")
class Leaks(HandCut):
    def rest(self, h: Tensor) -> Any:
        return super().rest(h).as_subclass(Disguised)


@planted("DIFFERENT", "output")
class OtherType(HandCut):
    def rest(self, h: Tensor) -> Any:
        return [super().rest(h)]


@planted("DIFFERENT", "not (6, 3)")
class OtherShape(HandCut):
    def rest(self, h: Tensor) -> Any:
        return super().rest(h).unsqueeze(0)


@planted("crashed", "KeyError")
class Crashes(HandCut):
    def rest(self, h: Tensor) -> Any:
        raise KeyError("first")


class ReplayDiverged(FrontierError):
    """Named like the library's."""


@planted("diverged", "another way")
class Leaves(HandCut):
    def rest(self, h: Tensor) -> Any:
        if self.calls == 2:
            raise ReplayDiverged("replay", found="another way")
        return super().rest(h)


@planted("DIFFERENT", "leaving the replay moved random state of torch")
class LeavesDrawn(Leaves):
    def rest(self, h: Tensor) -> Any:
        torch.rand(1)
        raise ReplayDiverged("replay", found="another way")


@planted("DIFFERENT", "leaving the replay moved the caller's batch")
class LeavesWritten(HandCut):
    def run(self, example: Example, rows: Mapping[str, Tensor]) -> Any:
        example.args[0].zero_()
        raise ReplayDiverged("replay", found="another way")


@planted("refused", "no such model")
class RefusesToFind(HandCut):
    def find(self, example: Example) -> None:
        raise FrontierError("find", found="no such model")


@planted("refused", "no such model")
class RefusesToFill(HandCut):
    def fill(self, example: Example) -> dict[str, Tensor]:
        raise FrontierError("fill", found="no such model")


@planted("refused", "empty")
class Empty(HandCut):
    empty = True


@planted("refused", "rows of slot first")
class TooFewRows(HandCut):
    def fill(self, example: Example) -> dict[str, Tensor]:
        return {"first": super().fill(example)["first"][1:]}


@pytest.mark.parametrize("name", PLANTED)
def test_the_harness_finds_what_is_planted(name: str) -> None:
    engine, kind, words = PLANTED[name]
    found = harness.compare(CASES["tower"], "half", engine)
    assert found.kind == kind, found
    assert words in found.reason


def test_the_harness_sees_buffers_that_were_not_written() -> None:
    class Skips(HandCut):
        def rest(self, h: Tensor) -> Any:
            average = self.model.middle.get_buffer("average")
            before = average.clone()
            output = super().rest(h)
            with torch.no_grad():
                average.copy_(before)
            return output

    case = CASES["buffer with a moving average, in training only"]
    assert harness.compare(case, "half", HandCut).kind == "equal"
    assert "buffer middle.average" in harness.compare(case, "half", Skips).reason


def test_the_harness_sees_counters_that_did_not_count() -> None:
    class Skips(HandCut):
        def rest(self, h: Tensor) -> Any:
            output = super().rest(h)
            vars(self.model.middle)["calls"] = 0
            return output

    case = CASES["counter used by nobody"]
    assert harness.compare(case, "half", HandCut).kind == "equal"
    assert "attribute middle.calls" in harness.compare(case, "half", Skips).reason


def test_rounding_is_told_from_errors_in_float64() -> None:
    class Rounds(HandCut):
        def rest(self, h: Tensor) -> Any:
            return super().rest(h * (1 + 1e3 * torch.finfo(h.dtype).eps))

    found = harness.compare(CASES["tower"], "half", Rounds)
    assert found.kind == "close"
    assert "in float64" in found.reason
    assert found.error > harness.FLOAT32
