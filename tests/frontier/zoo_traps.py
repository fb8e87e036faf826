"""More models that break what is taken for granted, and friendly ones with unusual frontiers."""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frontier.zoo_cases import Made, case, floats, generator, sets
from frontier.zoo_hostile import hostile
from frontier.zoo_small import CLASSES, WIDTH, Block, Tower, tower, vectors, words
from frostline.backends.torch.example import Example

# -- unusual frontiers, as people write them ---------------------------------------------------


class Codes(Tower):
    """A frozen quantiser hands on whole numbers, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        code, seen = h.detach().argmax(1), h.detach() > 0
        return self.head(torch.where(seen, self.last(self.codes(code)), 0.1))


BACKBONE = sets(
    stem="stem.*",
    first="(stem.* | first.*)",
    middle="(stem.* | first.* | middle.*)",
)


@case("frozen quantiser: whole numbers and a mask", depths=sets(
    middle="(stem.* | first.* | middle.*)", last_too="!(head.* | codes.*)"
))  # fmt: skip
def codes() -> Made:
    return Codes(), vectors


class Infinite(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        h = h.masked_fill(x[:, :1].expand_as(h) * h > 0.2, float("-inf"))
        return self.head(self.last((h * 2).softmax(1)))


@case("infinities at the frontier", depths=BACKBONE)
def infinite() -> Made:
    return Infinite(), vectors


class Strided(Tower):
    """The frontier is transposed, and the live part depends on its strides."""

    def forward(self, x: Tensor) -> Any:  # (N, L, 8)
        h = self.first(F.relu(self.stem(x))).transpose(1, 2)  # (N, WIDTH, L), not contiguous
        assert not h.is_contiguous()
        h = h.as_strided(h.size(), h.stride(), h.storage_offset()) * h.stride(1)
        return self.head(self.last(self.middle(h.transpose(1, 2))).mean(1))


@case("strides of the frontier", hostile=True)
def strided() -> Made:
    return Strided(), floats(5, 8)


class Expanded(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x))).unsqueeze(1).expand(-1, 3, -1)
        return self.head(self.last(self.middle(h)).sum(1))


@case("expanded frontier")
def expanded() -> Made:
    return Expanded(), vectors


class Sampler(Tower):
    """A frozen encoder gives a distribution, and the live part draws from it."""

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        found = torch.distributions.Normal(h, F.softplus(h) + 0.1, validate_args=False)
        z = found.rsample()
        return {"scores": self.head(self.last(self.middle(z))), "density": found.log_prob(z)}


@case("live draws from a frozen distribution", depths=BACKBONE)
def sampler() -> Made:
    return Sampler(), vectors


class Distilling(nn.Module):
    """A frozen teacher runs after the student, whose loss needs its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Tower(), Tower()

    def forward(self, x: Tensor) -> Any:
        scores = self.student(x)
        with torch.no_grad():
            wanted = self.teacher(x).softmax(1)
        return {"scores": scores, "loss": F.cross_entropy(scores, wanted)}


@case(
    "frozen teacher after the student",
    depths=sets(
        teacher="teacher.*", teacher_and_stem="(teacher.* | student.stem.*)",
        all_but_head="!student.head.*",
    ),
)  # fmt: skip
def distilling() -> Made:
    return Distilling(), vectors


class Methods(Tower):
    """Blocks are called by other names than `forward`, and directly."""

    def encode(self, x: Tensor) -> Tensor:
        return self.first.forward(F.relu(self.stem.forward(x)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.last(self.middle(self.encode(x))))


@case("methods other than forward")
def methods() -> Made:
    return Methods(), vectors


class Aliased(Tower):
    """One block under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.second = self.first

    def forward(self, x: Tensor) -> Any:
        x = self.second(self.first(F.relu(self.stem(x))))
        return self.head(self.last(self.middle(x)))


@case("one module under two names")
def aliased() -> Made:
    return Aliased(), vectors


class Twice(nn.Module):
    """The whole model twice per step, as R-Drop does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tower()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        return [self.model(x), self.drop(self.model(x))]


@case("the model twice per step")
def twice() -> Made:
    return Twice(), vectors


class Returning(Block):
    """Returns more than a tensor: nested, with None and numbers."""

    def forward(self, x: Tensor) -> Any:
        h = super().forward(x)
        return {"h": h, "more": (h * 2, None, {"n": 3, "both": [h, h.sum(1)]})}


class Unpacking(Tower):
    def __init__(self) -> None:
        super().__init__(Returning)

    def forward(self, x: Tensor) -> Any:
        found = self.middle(self.first(F.relu(self.stem(x))))
        more = found["more"]
        h = found["h"] + more[0] / more[2]["n"] + more[2]["both"][1].unsqueeze(1)
        return {"scores": self.head(self.last(h)), "same": found["h"], "again": found["h"]}


@case("block with nested results")
def unpacking() -> Made:
    return Unpacking(), vectors


class SparseGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.other = nn.Embedding(32, WIDTH), nn.Embedding(32, WIDTH, sparse=True)
        self.one, self.two = Block(), Block()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        h = self.two(self.one(self.embed(ids)))
        return self.head((h + self.other(ids)).mean(1))


@case("sparse gradients", depths=sets(embed="embed.*", blocks="(embed.* | one.* | two.*)"))
def sparse_gradient() -> Made:
    return SparseGradient(), words


@dataclass
class Parcel:
    """A batch of a class of its own."""

    x: Tensor
    ids: Tensor


class Parcels(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)

    def forward(self, parcel: Parcel) -> Any:
        return super().forward(parcel.x + self.embed(parcel.ids))


def _parcel(batch: Example) -> Example:
    return Example((Parcel(*batch.args),))


@case("batch of a class of its own", batch_of=_parcel)
def parcels() -> Made:
    def make(n: int, seed: int) -> Example:
        g = generator(seed)
        return Example((torch.randn(n, 8, generator=g), torch.randint(9, (n,), generator=g)))

    return Parcels(), make


# -- inputs that are not per sample ------------------------------------------------------------


class Tempered(Tower):
    """The first block's result is scaled by a number or tensor that comes with the batch."""

    def forward(self, x: Tensor, temperature: Any) -> Any:
        h = self.first(F.relu(self.stem(x))) * temperature
        return self.head(self.last(self.middle(h)))


def _number(batch: Example) -> Example:
    return Example(batch.args, {"temperature": 1.0 + 0.5 * (len(batch.args[0]) % 4)})


@case("number in the batch that the frozen part uses", hostile=True, batch_of=_number)
def tempered() -> Made:
    return Tempered(), vectors


def _scalar(batch: Example) -> Example:
    return Example(batch.args, {"temperature": torch.tensor(1.0 + 0.5 * (len(batch.args[0]) % 4))})


@case("tensor of no samples in the batch that the frozen part uses", hostile=True, batch_of=_scalar)
def tempered_tensor() -> Made:
    return Tempered(), vectors


@case("constant number in the batch", batch_of=lambda b: Example(b.args, {"temperature": 0.7}))
def tempered_constant() -> Made:
    return Tempered(), vectors


class Prompted(Tower):
    """A table comes with every batch and is the same until it changes."""

    def forward(self, x: Tensor, table: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        h = h + (h @ table.T).softmax(1) @ table
        return self.head(self.last(self.middle(h)))


def _table(batch: Example) -> Example:
    sign = 1.0 if len(batch.args[0]) in (4, 8) else -1.0
    table = sign * torch.linspace(-1, 1, 5 * WIDTH).reshape(5, WIDTH).sin()
    return Example(batch.args, {"table": table})


@case("table in the batch that changes", hostile=True, batch_of=_table)
def prompted() -> Made:
    return Prompted(), vectors


# -- mixing that a few samples hide ------------------------------------------------------------


@hostile("flag over the batch read by live code")
class Flagged(Tower):
    def forward(self, x: Tensor) -> Any:
        odd = (x[:, 2] > 1.9).any()  # in one of four batches
        h = self.first(F.relu(self.stem(x)))
        return self.head(self.last(torch.where(odd, self.middle(h), h * 0.5)))


@hostile("weak mixing")
class Weak(Block):
    def change(self, h: Tensor) -> Tensor:
        return h + 3e-4 * h.mean(0)


@hostile("divided by the batch's largest value")
class Largest(Block):
    def change(self, h: Tensor) -> Tensor:
        return h / h.abs().max()


@hostile("below the batch's largest, by feature")
class BelowLargest(Block):
    def change(self, h: Tensor) -> Tensor:
        return h - h.amax(0)


@hostile("clipped at a quantile of the batch")
class Clipped(Block):
    def change(self, h: Tensor) -> Tensor:
        return h.clamp(max=torch.quantile(h.detach(), 0.9))


@hostile("counts of neighbours in the batch")
class Neighbours(Block):
    def change(self, h: Tensor) -> Tensor:
        near = (torch.cdist(h.detach(), h.detach()) < 2.0).float().mean(1, keepdim=True)
        return h * near


@hostile("duplicates in the batch joined")
class Unique(Block):
    def change(self, h: Tensor) -> Tensor:
        found, places = torch.unique((h.detach()[:, 0] > 0).long(), return_inverse=True)
        return h * (1 + found[places].float() * len(found))[:, None]


@hostile("only when the batch is large")
class LargeBatch(Block):
    def change(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if len(h) >= 6 else h


@hostile("running order of the samples")
class Cumulative(Block):
    def change(self, h: Tensor) -> Tensor:
        return h.cumsum(0)


# -- errors, threads, objects ------------------------------------------------------------------


@hostile("catches every error")
class Catching(Block):
    def change(self, h: Tensor) -> Tensor:
        try:
            return h * (1 + abs(float(h.mean())))
        except Exception:  # noqa: BLE001
            return h * 0


@hostile("catches every error around live work")
class CatchingTower(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        try:
            if float(h.sum()) > 0:
                h = self.middle(h)
            h = self.last(h)
        except Exception:  # noqa: BLE001
            h = torch.zeros_like(h)
        return self.head(h)


@hostile("branch in another thread")
class Threaded(Tower):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.stem(x))
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(self.first, h)
            out = self.middle(h)
            return self.head(self.last(out + beside.result()))


@hostile("tag on a tensor read later")
class Tagging(Tower):
    class Tagger(Block):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            out.scale = 3.0  # type: ignore[attr-defined]
            return out

    def __init__(self) -> None:
        super().__init__(Tagging.Tagger)

    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        return self.head(self.last(h * getattr(h, "scale", 1.0)))


class Lazily(Block):
    def parts(self, x: Tensor) -> Iterator[Tensor]:
        yield x
        yield F.gelu(self.linear(self.norm(x)))

    def forward(self, x: Tensor) -> Any:
        return self.parts(x)


@hostile("block that returns a generator")
class Generating(Tower):
    def __init__(self) -> None:
        super().__init__(Lazily)

    def forward(self, x: Tensor) -> Any:
        parts = self.middle(self.first(F.relu(self.stem(x))))
        return self.head(self.last(sum(parts)))  # type: ignore[arg-type]


@hostile("values copied by copy and deepcopy")
class Copying(Block):
    def change(self, h: Tensor) -> Tensor:
        return copy.copy(h) + (copy.deepcopy(h.detach()) if not h.requires_grad else h)


@hostile("detached in place, data assigned")
class Assigning(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x))).detach()
        h.data = h.data * 2
        return self.head(self.last(self.middle(h.detach_())))


@hostile("value kept in a dict under its id")
class ById(Tower):
    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        names = {id(h): 2.0}
        same = self.middle(h)
        return self.head(
            self.last(same * names.get(id(h), 1.0) + (h if any(h is v for v in [h]) else 0))
        )


@hostile("forward patched on the instance")
class Patched(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.middle.forward = functools.partial(_doubled, self.middle)  # type: ignore[assignment]


def _doubled(block: Block, x: Tensor) -> Tensor:
    return type(block).forward(block, x) * 2


@hostile("counter in the model, then control flow by frozen values")
class CountsThenLooks(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        h = self.middle(self.first(F.relu(self.stem(x))))
        if float(h.mean()) > 0.25:
            h = h * 0.5
        return self.head(self.last(h)) / self.calls


@hostile("live draws, then control flow by frozen values", depths=sets(
    first="(stem.* | first.*)", two="(stem.* | first.* | last.*)"
))  # fmt: skip
class DrawsThenLooks(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        out = self.norm(self.noise(self.middle(h)))
        if float(h.detach().mean()) > 0.3:
            out = out * 0.5
        return self.head(self.last(out))


@hostile("momentum teacher written in the forward pass", depths=sets(teacher="teacher.*"))
class Momentum(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.stem.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
            seen = self.teacher(x)
        return self.head(self.last(self.middle(self.first(F.relu(self.stem(x))))) * seen)


@hostile("frozen weights borrowed from a live layer", depths=sets(last="last.*", stem="stem.*"))
class Borrowed(Tower):
    """A frozen block's bias is, by reference, memory of a layer that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shadow", self.first.linear.weight.detach())  # the same memory
        self.shadow: Tensor

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.stem(x))
        beside = F.pad(x, (0, WIDTH - 8)) @ self.shadow
        return self.head(self.last(self.middle(self.first(h)) + beside))


@case("loop over the samples", hostile=True)
def per_sample() -> Made:
    class PerSample(Tower):
        def forward(self, x: Tensor) -> Any:
            h = self.first(F.relu(self.stem(x)))
            return [self.head(self.last(self.middle(row[None]))) for row in h]

    return PerSample(), vectors


@case("compiled submodule", hostile=True, by_hand=True)
def compiled() -> Made:
    def make() -> nn.Module:
        block = torch.compile(Block(), backend="eager", dynamic=True)
        assert isinstance(block, nn.Module)
        return block

    return tower(make)


class _Setting:
    scale = 1.0


def _set_inside(model: nn.Module, step: int) -> None:
    vars(model.get_submodule("middle"))["setting"].scale = 1.0 + step


class _WithSetting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.setting = _Setting()

    def change(self, h: Tensor) -> Tensor:
        return h * self.setting.scale


@case("setting inside an object that training code changes", hostile=True, between=_set_inside,
      needs="verification")  # fmt: skip
def inner_setting() -> Made:
    return tower(_WithSetting)
