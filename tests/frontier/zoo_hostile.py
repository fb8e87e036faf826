"""Models that break what a cache of frozen values takes for granted.

At each depth either the replay is right, or it is refused, or it gives way to the full forward.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontier.zoo_cases import Made, case, generator, prefixes, sets, tokens
from frontier.zoo_small import CLASSES, WIDTH, Block, Tower, tower, vectors
from frostline.backends.torch.example import Example


def hostile(name: str, **options: Any) -> Callable[[type[Any]], type[Any]]:
    """Put a tower with the decorated block in its middle, or the decorated tower, into the zoo."""

    def add(kind: type[Any]) -> type[Any]:
        def make() -> Made:
            return (kind(), vectors) if issubclass(kind, Tower) else tower(kind)

        case(name, hostile=True, **options)(make)
        return kind

    return add


# -- control flow ------------------------------------------------------------------------------


@hostile("control flow by the batch's values")
class Branching(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * 2 if h.mean() > 0.11 else h - 1


@hostile("control flow by the batch's values, in the model itself")
class BranchingTower(Tower):
    def forward(self, x: Tensor) -> Any:
        x = self.first(F.relu(self.stem(x)))
        if float(x.sum()) > 0:
            x = self.middle(x)
        return self.head(self.last(x))


@hostile("control flow by one sample's values")
class BranchingBySample(Block):
    def change(self, h: Tensor) -> Tensor:
        return torch.stack([row * 2 if row[0] > 0 else row - 1 for row in h])


@hostile("number read from a value and used later")
class Reading(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * float(h.abs().max())


@hostile("early exit by confidence")
class EarlyExit(Tower):
    def forward(self, x: Tensor) -> Any:
        x = self.middle(self.first(F.relu(self.stem(x))))
        if x.softmax(1).max() > 0.95:
            return self.head(x)
        return self.head(self.last(x))


@hostile("loop as often as the values say")
class Looping(Block):
    def change(self, h: Tensor) -> Tensor:
        for _ in range(5):
            if h.norm() < 4:
                break
            h = h * 0.6
        return h


@hostile("rows chosen by a mask")
class Masking(Block):
    def change(self, h: Tensor) -> Tensor:
        h = h.clone()
        chosen = h[:, 0] > 0
        h[chosen] = self.linear(h[chosen])
        return h


@hostile("stops where a value is not finite")
class Guarding(Block):
    def change(self, h: Tensor) -> Tensor:
        if not torch.isfinite(h).all():
            raise ValueError("not finite")
        return h


# -- state -------------------------------------------------------------------------------------


@hostile("counter used by the output")
class Counter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def change(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * (1 + self.calls % 3)


@hostile("counter used by nobody")
class IdleCounter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def change(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h


@hostile("list that grows")
class Growing(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def change(self, h: Tensor) -> Tensor:
        self.norms.append(float(h.norm()))
        return h


@hostile("buffer written in place in every mode")
class Buffered(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.mean: Tensor

    def change(self, h: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h - self.mean


@hostile("buffer replaced at each call")
class Replacing(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.steps: Tensor

    def change(self, h: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return h / (1 + self.steps)


@hostile("number of calls in a buffer that nobody reads")
class Tracking(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.batches: Tensor

    def change(self, h: Tensor) -> Tensor:
        self.batches += 1
        return h


@hostile("table computed at the first call and kept")
class Table(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def change(self, h: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(-1, 1, WIDTH)
        return h + self.table


@hostile("table kept per batch size", memos=("tables",))
class TableBySize(Block):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}

    def change(self, h: Tensor) -> Tensor:
        table = self.tables.setdefault(len(h), torch.full((len(h), 1), 0.5))
        return h * table


@hostile("last value kept for whoever asks")
class Keeping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.latest: Tensor | None = None

    def change(self, h: Tensor) -> Tensor:
        self.latest = h.detach()
        return h


@hostile("previous batch used in the next")
class Recurrence(Block):
    def __init__(self) -> None:
        super().__init__()
        self.previous: Tensor | None = None

    def change(self, h: Tensor) -> Tensor:
        before, self.previous = self.previous, h.detach().mean(0)
        return h if before is None else h + before


@hostile("memory bank written by every batch")
class Bank(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(6, WIDTH))
        self.bank: Tensor

    def change(self, h: Tensor) -> Tensor:
        self.bank = torch.cat([self.bank, h.detach()])[-6:]
        return h + (h @ self.bank.T).softmax(1) @ self.bank


@hostile("weights rescaled in place in evaluation mode")
class Rescaling(Block):
    def __init__(self) -> None:
        super().__init__()
        self.rescaled = False

    def change(self, h: Tensor) -> Tensor:
        if self.rescaled == self.training:
            with torch.no_grad():
                self.linear.weight.mul_(2.0 if self.training else 0.5)
            self.rescaled = not self.training
        return self.linear(h)


class _Fresh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.linear(x))


@hostile("modules swapped at the first forward")
class Swapping(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.swapped = False

    def forward(self, x: Tensor) -> Any:
        if not self.swapped and self.training:
            fresh = _Fresh()
            fresh.linear = self.middle.linear
            self.middle, self.swapped = fresh, True
        return super().forward(x)


def _halve(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 0.5


@hostile("hook installed at the first forward")
class Hooking(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.hooked = False

    def forward(self, x: Tensor) -> Any:
        if not self.hooked:
            self.hooked = True
            self.middle.register_forward_hook(_halve)
        return super().forward(x)


# -- randomness --------------------------------------------------------------------------------


@hostile("dropout in every mode")
class AlwaysDropout(Block):
    def change(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.3, training=True)


@hostile("noise from torch")
class Noise(Block):
    def change(self, h: Tensor) -> Tensor:
        return h + 0.1 * torch.rand_like(h)


@hostile("noise from a generator of its own")
class PrivateNoise(Block):
    def __init__(self) -> None:
        super().__init__()
        self.draws = generator(5)

    def change(self, h: Tensor) -> Tensor:
        return h + 0.1 * torch.rand(h.shape, generator=self.draws)


@hostile("noise from NumPy")
class NumpyNoise(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * (1 + float(np.random.rand()))  # noqa: NPY002


@hostile("noise from a NumPy generator of its own")
class PrivateNumpyNoise(Block):
    def __init__(self) -> None:
        super().__init__()
        self.draws = np.random.default_rng(5)

    def change(self, h: Tensor) -> Tensor:
        return h + torch.from_numpy(self.draws.standard_normal(h.shape, dtype=np.float32))


@hostile("noise from Python")
class PythonNoise(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * (2 if random.random() > 0.5 else 1)


@hostile("numbers drawn and thrown away")
class IdleDraws(Block):
    def change(self, h: Tensor) -> Tensor:
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002
        return h


@hostile("generators seeded in the forward pass")
class Seeding(Block):
    def change(self, h: Tensor) -> Tensor:
        torch.manual_seed(3)
        return h + torch.rand(WIDTH)


@hostile("live dropout", depths=prefixes(live_dropout=True))
class LiveDropout(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def change(self, h: Tensor) -> Tensor:
        return self.drop(h)


@hostile("noise whose state is put back")
class HiddenNoise(Block):
    def change(self, h: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return h + 0.1 * torch.rand_like(h)


# -- batches that mix --------------------------------------------------------------------------


@hostile("batch norm that follows the data", depths=prefixes(live_norm=True))
class LiveNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]


@hostile("batch norm without running statistics")
class Untracked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)  # type: ignore[assignment]


@hostile("batch norm by function, in training mode")
class FunctionalNorm(Block):
    def change(self, h: Tensor) -> Tensor:
        return F.batch_norm(h, None, None, training=True)


@hostile("mean of the batch taken off")
class Centred(Block):
    def change(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


@hostile("softmax over the batch")
class BatchSoftmax(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * h.softmax(0) * 4


@hostile("neighbour in the batch")
class Rolled(Block):
    def change(self, h: Tensor) -> Tensor:
        return h + h.roll(1, 0)


@hostile("rank in the batch")
class Ranked(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * (1 + h[:, :1].argsort(0).argsort(0))


@hostile("divided by the batch's size")
class BySizeOfBatch(Block):
    def change(self, h: Tensor) -> Tensor:
        return h / len(h)


@hostile("place in the batch")
class ByPlace(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * torch.arange(1.0, len(h) + 1)[:, None]


@hostile("first sample of the batch is special")
class FirstSample(Block):
    def change(self, h: Tensor) -> Tensor:
        return h + h[:1]


class SeldomMixing(Tower):
    """The mean of the batch is added where one sample says so; one of all samples does."""

    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        h = h + (x[:, 0] > 6).any() * h.mean(0)
        return self.head(self.last(h))


@case("samples mix only where one is odd", hostile=True, needs="verification")
def seldom_mixing() -> Made:
    def odd(n: int, seed: int) -> Example:
        (x,) = vectors(n, seed).args
        x[13, 0] = 7
        return Example((x,))

    return SeldomMixing(), odd


@hostile("contrastive scores")
class Contrastive(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        h = F.normalize(h, dim=1)
        return {"alike": h @ h.T, "scores": self.head(self.last(h))}


@hostile("samples in another order inside")
class Sorting(Tower):
    """As for packed sequences: sorted by a value of each sample, and put back."""

    def forward(self, x: Tensor) -> Any:
        order = x[:, 0].argsort(descending=True)
        h = self.middle(self.first(F.relu(self.stem(x[order]))))
        return self.head(self.last(h[order.argsort()]))


@hostile("batch halved inside")
class Halves(Tower):
    """Pairs of neighbours in the batch become one."""

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        half = len(h) // 2
        h = torch.cat([h[:half] + h[half : 2 * half], h[: len(h) - half]])
        return self.head(self.last(self.middle(h)))


class Trimming(nn.Module):
    """Cuts its inputs to the longest sample of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.one, self.two, self.three = Block(), Block(), Block()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        longest = int(attention_mask.sum(1).max())
        x = self.embed(input_ids[:, :longest])
        x = self.three(self.two(self.one(x)))
        return self.head(x.mean(1))  # padding counts: the result depends on the batch


@case("trims to the longest in the batch", hostile=True)
def trimming() -> Made:
    make = tokens()

    def ragged(n: int, seed: int) -> Example:
        batch = make(n, seed)
        mask = batch.kwargs["attention_mask"].clone()
        mask[:, 9] = 0
        mask[n // 2] = 1
        return Example(kwargs={"input_ids": batch.kwargs["input_ids"], "attention_mask": mask})

    return Trimming(), ragged


# -- side channels -----------------------------------------------------------------------------


@hostile("value left in an attribute for a later module")
class Smuggling(Tower):
    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        vars(self.first)["left"] = x * 2
        x = self.last(self.middle(self.first(x)))
        return self.head(x + vars(self.first)["left"])


class _Leaving(Block):
    def change(self, h: Tensor) -> Tensor:
        vars(self)["left"] = h.tanh()
        return h


@hostile("value left by a module for another")
class Attribute(Tower):
    def __init__(self) -> None:
        super().__init__(_Leaving)

    def forward(self, x: Tensor) -> Any:
        x = self.last(self.middle(self.first(F.relu(self.stem(x)))))
        return self.head(x + vars(self.middle)["left"])


_SHELF: list[Tensor] = []


class _Shelving(Block):
    def change(self, h: Tensor) -> Tensor:
        _SHELF.append(h.tanh())
        return h


@hostile("value left in a global list")
class GlobalList(Tower):
    def __init__(self) -> None:
        super().__init__(_Shelving)

    def forward(self, x: Tensor) -> Any:
        _SHELF.clear()
        x = self.last(self.middle(self.first(F.relu(self.stem(x)))))
        return self.head(x + _SHELF.pop())


@hostile("value left in a closure")
class Closure(Tower):
    def __init__(self) -> None:
        box: dict[str, Tensor] = {}

        class Leaving(Block):
            def change(self, h: Tensor) -> Tensor:
                box["left"] = h.tanh()
                return h

        super().__init__(Leaving)
        self.fetch = lambda: box["left"]

    def forward(self, x: Tensor) -> Any:
        x = self.last(self.middle(self.first(F.relu(self.stem(x)))))
        return self.head(x + self.fetch())


@hostile("value of the previous batch read from a side channel")
class Stale(Tower):
    def __init__(self) -> None:
        super().__init__(_Leaving)

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        before = vars(self.middle).get("left")
        h = self.last(self.middle(h))
        return self.head(h if before is None else h + before.detach().mean(0))


# -- in place ----------------------------------------------------------------------------------


@hostile("live code writes into a frozen value")
class Writing(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        if not h.requires_grad:
            h.mul_(self.head.weight.detach().mean() + 1)
        return self.head(self.last(h + 0))


@hostile("live code writes into a view of a frozen value used again")
class WritingView(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x))).clone()
        part = h[:, :4]
        part += self.head.bias.detach().sum()
        h[:, 4:8] = 0.5
        return self.head(self.last(self.middle(h)) + h)


@hostile("live values written into a frozen tensor")
class Scatter(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        both = torch.cat([h, h.new_zeros(h.shape)], 1)
        both[:, WIDTH:] = self.middle(h)
        return self.head(self.last(both[:, :WIDTH] * both[:, WIDTH:]))


@hostile("writes into the caller's batch before the first layer")
class WritesBatch(Tower):
    def forward(self, x: Tensor) -> Any:
        x.mul_(0.5).clamp_(-1, 1)
        return super().forward(x)


@hostile("writes into the caller's batch after the backbone")
class WritesBatchLate(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        x.copy_(h[:, :8].detach())
        return self.head(self.last(h))


class _WritesInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x.add_(0.1)
        return super().forward(x)


@hostile("frozen block writes into what it was given, used again")
class WritesInput(Tower):
    def __init__(self) -> None:
        super().__init__(_WritesInput)

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x))) * 1
        return self.head(self.last(self.middle(h)) + h)


# -- live values that look frozen --------------------------------------------------------------


DEEP = sets(
    last="last.*", middle_and_last="(middle.* | last.*)", first_and_last="(first.* | last.*)"
)


@hostile("frozen module fed by a live one", depths=DEEP)
class Fed(Tower):
    pass


@hostile("frozen module fed by a detached live value", depths=DEEP)
class Detached(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        return self.head(h + self.last(h.detach()))


@hostile("frozen module fed by a live value under no_grad", depths=DEEP)
class LiveNoGrad(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        with torch.no_grad():
            seen = self.last(h)
        return self.head(h + seen)


@hostile("frozen module fed by the argmax of a live one", depths=DEEP)
class Argmax(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Embedding(WIDTH, WIDTH)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        return self.head(h + self.last(h.argmax(1)))


@hostile(
    "frozen experts chosen by a live gate",
    depths=sets(experts="experts.*", stem_too="(stem.* | experts.*)"),
)
class Experts(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        chance = self.gate(x).softmax(1)
        chosen = chance.argmax(1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            if len(rows):
                out[rows] = expert(x[rows]) * chance[rows, i : i + 1]
        return self.head(self.last(self.middle(self.first(out))))


@hostile("live number decides a frozen branch", depths=DEEP)
class LiveBranch(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        h = self.last(x[:, :1].expand(-1, WIDTH)) + h if float(self.head.bias[0]) > 0 else h
        return self.head(self.middle(h))


@hostile("live weight read under .data", depths=DEEP)
class Data(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        h = self.last(h * self.head.weight.data.mean(0))
        return self.head(self.middle(h))


@hostile("live weight read as NumPy", depths=DEEP)
class ThroughNumpy(Tower):
    def forward(self, x: Tensor) -> Any:
        scale = torch.from_numpy(self.head.weight.detach().numpy().mean(0))
        h = self.last(F.relu(F.pad(x, (0, 8))) * scale)
        return self.head(self.middle(self.first(F.relu(self.stem(x)))) + h)


@hostile("live weight read through a list", depths=DEEP)
class ThroughList(Tower):
    def forward(self, x: Tensor) -> Any:
        scale = torch.tensor(self.head.bias.tolist()).sum()
        h = self.last(F.relu(F.pad(x, (0, 8))) * scale)
        return self.head(self.middle(self.first(F.relu(self.stem(x)))) + h)


# -- foreign code ------------------------------------------------------------------------------


@hostile("through NumPy and back")
class Numpy(Block):
    def change(self, h: Tensor) -> Tensor:
        return h + torch.from_numpy(np.tanh(h.detach().numpy()))


@hostile("through a Python list and back")
class Listed(Block):
    def change(self, h: Tensor) -> Tensor:
        return h + torch.tensor(h.tolist()).tanh()


class _Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def _foreign(module: object) -> nn.Module:
    assert isinstance(module, nn.Module)
    return module


@case("scripted submodule", hostile=True, by_hand=True)
def scripted() -> Made:
    return tower(lambda: _foreign(torch.jit.script(_Scripted())))


@case("traced submodule", hostile=True, by_hand=True)
def traced() -> Made:
    return tower(lambda: _foreign(torch.jit.trace(_Scripted(), torch.zeros(2, WIDTH))))


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * 3 * x  # not the derivative, on purpose


@hostile("autograd function of its own")
class OwnFunction(Block):
    def change(self, h: Tensor) -> Tensor:
        return _Square.apply(h)  # type: ignore[return-value]


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


@hostile("gradient reversal")
class Reversal(Block):
    def change(self, h: Tensor) -> Tensor:
        return _Reversed.apply(h)  # type: ignore[return-value]


@hostile("gradient taken inside the forward pass")
class InnerGradient(Block):
    def change(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            seen = h.detach().requires_grad_()
            (slope,) = torch.autograd.grad(torch.sin(self.linear(seen)).sum(), seen)
        return h + slope


@hostile("subclass of Tensor inside")
class Subclass(Block):
    class Marked(Tensor):
        pass

    def change(self, h: Tensor) -> Tensor:
        return (h.as_subclass(Subclass.Marked) * 2).as_subclass(Tensor)


@hostile("sparse tensor inside")
class Sparse(Block):
    def change(self, h: Tensor) -> Tensor:
        eye = torch.eye(WIDTH).to_sparse()
        return torch.sparse.mm(eye, h.T).T


@hostile("identity of a value looked at")
class Identity(Tower):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.stem(x))
        first = nn.Identity()(h)
        out = self.middle(self.first(first))
        return self.head(self.last(out * 2 if first is h else out))


@hostile("memory address of a value looked at")
class Address(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        view = h.view(-1, WIDTH)
        out = self.middle(h)
        return self.head(self.last(out * 2 if view.data_ptr() == h.data_ptr() else out))


@hostile("value printed")
class Printing(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * (2 if "nan" not in f"{h} {h[0, 0]:.3f}" else 1)


# -- changed between steps ---------------------------------------------------------------------


class _Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def change(self, h: Tensor) -> Tensor:
        return h * self.scale


def _set_scale(model: nn.Module, step: int) -> None:
    vars(model.get_submodule("middle"))["scale"] = 1.0 + step


@case("attribute that training code sets per step", hostile=True, between=_set_scale,
      needs="verification")  # fmt: skip
def scaled() -> Made:
    return tower(_Scaled)


def _write_weight(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        model.get_submodule("first").get_parameter("linear.weight").mul_(1.5)


@case("frozen weight that training code writes", hostile=True, between=_write_weight,
      needs="verification")  # fmt: skip
def written() -> Made:
    return tower()


def _add_hook(model: nn.Module, step: int) -> None:
    model.get_submodule("first").register_forward_hook(_halve)


@case("hook put on a frozen module between steps", hostile=True, between=_add_hook,
      needs="verification")  # fmt: skip
def hooked_later() -> Made:
    return tower()


def _unfreeze(model: nn.Module, step: int) -> None:
    if step == 1:
        model.get_submodule("first").requires_grad_()


@case("layer unfrozen by hand between steps", hostile=True, between=_unfreeze,
      needs="verification")  # fmt: skip
def unfrozen_later() -> Made:
    return tower()


class _Moded(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * 2 if self.training else h


def _flip(model: nn.Module, step: int) -> None:
    model.get_submodule("middle").training = step % 2 == 0


@case("mode of a module flipped between steps", hostile=True, between=_flip,
      needs="verification")  # fmt: skip
def flipped() -> Made:
    return tower(_Moded)


_KNOB = {"scale": 1.0}


class _Knobbed(Block):
    def change(self, h: Tensor) -> Tensor:
        return h * _KNOB["scale"]


def _turn(model: nn.Module, step: int) -> None:
    _KNOB["scale"] = 1.0 + step


@case("global setting that training code turns", hostile=True, between=_turn,
      needs="verification")  # fmt: skip
def knobbed() -> Made:
    _KNOB["scale"] = 1.0
    return tower(_Knobbed)
