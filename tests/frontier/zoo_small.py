"""Small models written here, each for one thing that real models do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from frontier.zoo_cases import Made, case, floats, generator, prefixes, sets
from frostline.backends.torch.example import Example

WIDTH = 16
CLASSES = 3


class Block(nn.Module):
    """A residual block; cases override `change`, which sees (N, WIDTH) before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(F.gelu(self.linear(self.norm(x))))

    def change(self, h: Tensor) -> Tensor:
        return h


class Tower(nn.Module):
    """Stem, three blocks and a head on vectors; `special` stands in the middle.

    Four prefixes freeze the stem, `first`, `middle`, `last`: at two of them the special block
    trains, at two it is frozen.
    """

    def __init__(self, special: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.first = Block()
        self.middle = special()
        self.last = Block()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.last(self.middle(self.first(F.relu(self.stem(x))))))


vectors = floats(8)


def tower(special: Callable[[], nn.Module] = Block) -> Made:
    return Tower(special), vectors


@case("tower")
def plain() -> Made:
    return tower()


# -- sequences ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Two recurrent layers; sequences may be packed by their lengths."""

    def __init__(self, kind: Callable[..., nn.RNNBase], *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.embed = nn.Embedding(32, 12)
        self.one = kind(12, 8, batch_first=True, bidirectional=True)
        self.two = kind(16, 8, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
        x, _ = self.one(x)
        x, _ = self.two(x)
        if self.packed:
            x, _ = nn.utils.rnn.pad_packed_sequence(x, batch_first=True, total_length=ids.shape[1])
        last = x[torch.arange(len(ids)), lengths - 1]
        return self.head(F.relu(self.mix(last)))


def words(n: int, seed: int) -> Example:
    g = generator(seed)
    ids = torch.randint(1, 32, (n, 7), generator=g)
    return Example((ids, torch.randint(2, 8, (n,), generator=g)))


@case("LSTM")
def lstm() -> Made:
    return Recurrent(nn.LSTM, packed=False), words


@case("GRU on packed sequences")
def gru() -> Made:
    return Recurrent(nn.GRU, packed=True), words


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with positions; batch or sequence first inside."""

    def __init__(self, *, batch_first: bool, masked: bool = False) -> None:
        super().__init__()
        self.batch_first, self.masked = batch_first, masked
        self.embed = nn.Embedding(32, WIDTH)
        self.positions = nn.Parameter(torch.randn(7, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 32, batch_first=batch_first, norm_first=not batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions  # (N, L, D)
        if not self.batch_first:
            x = x.transpose(0, 1)
        pad = torch.arange(ids.shape[1]) >= lengths[:, None] if self.masked else None
        x = self.encoder(x, src_key_padding_mask=pad)
        return self.head(x.mean(1 if self.batch_first else 0))


@case("nn.TransformerEncoder, batch first")
def encoder() -> Made:
    return Encoder(batch_first=True), words


@case("nn.TransformerEncoder, padding mask")
def encoder_masked() -> Made:
    return Encoder(batch_first=True, masked=True), words


@case("nn.TransformerEncoder, sequence first inside")
def encoder_sequence_first() -> Made:
    return Encoder(batch_first=False), words


class SequenceFirst(nn.Module):
    """The inputs themselves are (L, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)).mean(0))


@case("inputs with samples in dimension 1", hostile=True, sample_dim=1)
def sequence_first() -> Made:
    def make(n: int, seed: int) -> Example:
        return Example((torch.randn(5, n, 8, generator=generator(seed)),))

    return SequenceFirst(), make


class Attention(nn.Module):
    """`nn.MultiheadAttention` layers, whose weights go out too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, maps = self.stem(x), []
        for layer in self.layers:
            y, seen = layer(x, x, x, need_weights=True)
            x = x + y
            maps.append(seen)
        return self.head(x.mean(1)), maps


@case("nn.MultiheadAttention")
def attention() -> Made:
    return Attention(), floats(5, 8)


class Frames(nn.Module):
    """Frames folded into the batch: dimension 0 of the frontier is samples times frames."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Linear(8, WIDTH)
        self.join = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 3, H, W)
        n, frames = x.shape[:2]
        x = F.relu(self.one(x.flatten(0, 1)))
        x = F.relu(self.two(x)).mean((2, 3))
        x = self.three(x).view(n, frames, -1)
        return self.head(F.relu(self.join(x)).mean(1))


@case("frames folded into the batch")
def frames() -> Made:
    return Frames(), floats(2, 3, 8, 8)


# -- inputs and outputs ------------------------------------------------------------------------


class Nested(nn.Module):
    """Keyword-only inputs in a dict of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, WIDTH), nn.Linear(4, WIDTH)
        self.names = nn.Embedding(9, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, *, parts: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        one, two = parts["floats"]
        x = F.relu(self.a(one)) + F.relu(self.b(two)) * scale + self.names(parts["id"]).sum(1)
        return {"scores": [self.head(torch.tanh(self.mix(x)))], "parts": len(parts)}


@case("nested keyword-only inputs")
def nested() -> Made:
    def make(n: int, seed: int) -> Example:
        g = generator(seed)
        parts = {
            "floats": [torch.randn(n, 8, generator=g), torch.randn(n, 4, generator=g)],
            "id": torch.randint(9, (n, 2), generator=g),
            "text": [f"sample {i}" for i in range(n)],
        }
        return Example(kwargs={"parts": parts, "scale": 0.5})

    return Nested(), make


class Found:
    """A plain object with attributes."""

    def __init__(self, scores: Tensor, features: Tensor) -> None:
        self.scores, self.features = scores, features


@dataclass
class FoundData:
    scores: Tensor
    features: Tensor


class FoundTuple(NamedTuple):
    scores: Tensor
    features: Tensor


class Beside(nn.Module):
    """A branch that can be frozen beside one that trains; both go out in a class of its own."""

    def __init__(self, kind: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.kind = kind
        self.still = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.moving = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        still = self.still(x)
        scores = self.head(torch.cat([self.moving(x), still], 1))
        return self.kind(scores, still)


BESIDE = sets(
    branch="still.*",
    part_of_branch="still.0.*",
    other_branch="moving.*",
    both="(still.* | moving.*)",
)


@case("frozen branch, plain object out", depths=BESIDE)
def beside_object() -> Made:
    return Beside(Found), vectors


@case("frozen branch, dataclass out", depths=BESIDE)
def beside_dataclass() -> Made:
    return Beside(FoundData), vectors


@case("frozen branch, named tuple out", depths=BESIDE)
def beside_tuple() -> Made:
    return Beside(FoundTuple), vectors


class SideAdapter(nn.Module):
    """Small layers beside a backbone read each of its values and never feed it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([nn.Linear(8, WIDTH), *(Block() for _ in range(3))])
        self.side = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        beside: Any = 0
        for layer, small in zip(self.backbone, self.side, strict=True):
            x = layer(x)
            beside = torch.tanh(small(x) + beside)
        return self.head(beside)


@case(
    "adapters beside the backbone",
    nothing_at=frozenset({"deep"}),
    depths=sets(backbone="backbone.*", half="(backbone.0* | backbone.1*)", deep="backbone.3*"),
)
def side_adapter() -> Made:
    return SideAdapter(), vectors


class Echo(Tower):
    """Returns its input, a view of it, and a value from the middle."""

    def forward(self, x: Tensor) -> Any:
        h = self.middle(self.first(F.relu(self.stem(x))))
        return {"scores": self.head(self.last(h)), "input": x, "view": x[:, 2:4], "middle": h}


@case("inputs, views and inner values go out")
def echo() -> Made:
    return Echo(), vectors


class Telling(Tower):
    """Fields that are no tensors and differ between batches."""

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return {"scores": out, "count": len(x), "largest": float(x.max()), "shape": out.shape}


@case("fields that are no tensors")
def telling() -> Made:
    return Telling(), vectors


class Ignoring(Tower):
    """The output ignores what the backbone found."""

    def forward(self, x: Tensor) -> Any:
        self.last(self.middle(self.first(F.relu(self.stem(x)))))
        return self.head(F.pad(x, (0, WIDTH - 8)))


@case("output that ignores the frontier")
def ignoring() -> Made:
    return Ignoring(), vectors


class Wrapped(nn.Module):
    """An `nn.Sequential` in a module that does nothing itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@case("nn.Sequential in a wrapper")
def wrapped() -> Made:
    layers: list[nn.Module] = [nn.Linear(8, WIDTH), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True)]
    return Wrapped(nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(WIDTH, CLASSES))), vectors


class Spectrum(nn.Module):
    """Complex numbers between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(9, 9, dtype=torch.cfloat), nn.Linear(9, 9)
        self.three = nn.Linear(9, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.one(torch.fft.rfft(x))
        y = F.relu(self.two(z.abs()))
        y = torch.view_as_real(z * y).sum(-1)
        return {"scores": self.head(F.relu(self.three(y))), "spectrum": z}


@case("complex numbers")
def spectrum() -> Made:
    return Spectrum(), floats(16)


def _ask_grad(batch: Example) -> Example:
    return Example(tuple(x.requires_grad_() for x in batch.args))


@case("input that requires grad", hostile=True, batch_of=_ask_grad)
def input_grad() -> Made:
    return Tower(), vectors


class AsksGrad(Tower):
    """Asks for the gradient of a frozen value, as `enable_input_require_grads` does."""

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.stem(x))
        if not h.requires_grad:
            h.requires_grad_()
        return self.head(self.last(self.middle(self.first(h))))


@case("frozen value asked for its gradient", hostile=True)
def asks_grad() -> Made:
    return AsksGrad(), vectors


# -- how layers are called ---------------------------------------------------------------------


class Checkpointed(Tower):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        for block in (self.first, self.middle, self.last):
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@case("torch.utils.checkpoint")
def checkpointed() -> Made:
    return Checkpointed(reentrant=False), vectors


@case("torch.utils.checkpoint, reentrant")
def checkpointed_reentrant() -> Made:
    return Checkpointed(reentrant=True), vectors


class NoGrad(Tower):
    """The backbone runs under `no_grad` or in inference mode, as people write it."""

    def __init__(self, guard: Callable[[], Any]) -> None:
        super().__init__()
        self.guard = guard

    def forward(self, x: Tensor) -> Any:
        with self.guard():
            h = self.middle(self.first(F.relu(self.stem(x))))
        return self.head(self.last(h.clone()))


NO_GRAD = sets(backbone="(stem.* | first.* | middle.*)", all_but_head="!head.*")


@case("backbone under no_grad", depths=NO_GRAD)
def no_grad() -> Made:
    return NoGrad(torch.no_grad), vectors


@case("backbone in inference mode", depths=NO_GRAD)
def inference() -> Made:
    return NoGrad(torch.inference_mode), vectors


class Shared(nn.Module):
    """One block called twice, the second time on what a layer of its own made of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.shared = Block()
        self.between = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.relu(self.stem(x)))
        return self.head(self.shared(F.relu(self.between(x))))


@case(
    "frozen module called twice, the second time on live values",
    nothing_at=frozenset({"shared alone"}),
    depths={**prefixes(), **sets(shared_alone="shared.*", stem_and_shared="(stem.* | shared.*)")},
)
def shared() -> Made:
    return Shared(), vectors


class Siamese(nn.Module):
    """Two views of a sample through one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), Block(), Block())
        self.project = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        one, two = (self.project(self.encoder(v)) for v in (a, b))
        return self.head(torch.cat([one * two, (one - two).abs()], 1))


@case("Siamese encoder")
def siamese() -> Made:
    def make(n: int, seed: int) -> Example:
        g = generator(seed)
        return Example((torch.randn(n, 8, generator=g), torch.randn(n, 8, generator=g)))

    return Siamese(), make


class TiedWeights(nn.Module):
    """Scores by the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.one, self.two = Block(), Block()
        self.out = nn.Linear(WIDTH, 32, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.two(self.one(self.embed(ids))))


@case(
    "tied weights",
    nothing_at=frozenset({"one"}),
    depths=sets(embedding="embed.*", one="one.*", both="(embed.* | one.*)", all_but_two="!two.*"),
)
def tied() -> Made:
    return TiedWeights(), lambda n, seed: Example(
        (torch.randint(32, (n, 5), generator=generator(seed)),)
    )


class Borrowing(Tower):
    """Uses the weights of a layer without calling it."""

    def forward(self, x: Tensor) -> Any:
        x = F.relu(F.linear(x, self.stem.weight, self.stem.bias))
        x = F.layer_norm(self.first(x), (WIDTH,), self.first.norm.weight)
        return self.head(self.last(self.middle(x) @ self.first.linear.weight))


@case("weights used without their module")
def borrowing() -> Made:
    return Borrowing(), vectors


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.randn(WIDTH))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.log.exp()


def _wrap(block: Block, how: Callable[[nn.Module], Any]) -> Block:
    how(block.linear)
    return block


def _scaled(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Scale())


@case("weight_norm")
def weight_norm() -> Made:
    return tower(lambda: _wrap(Block(), parametrizations.weight_norm))


@case("spectral_norm")
def spectral_norm() -> Made:
    return tower(lambda: _wrap(Block(), parametrizations.spectral_norm))


@case("parametrize")
def parametrized() -> Made:
    return tower(lambda: _wrap(Block(), _scaled))


class Averaging(Block):
    """Keeps a moving average of what it saw while it trains, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.average: Tensor

    def change(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.average.lerp_(h.mean(0), 0.1)
        return h - self.average


@case("buffer with a moving average, in training only")
def averaging() -> Made:
    return tower(Averaging)


class Constant(Tower):
    """A frozen table whose first dimension is as long as the example (4) is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        table = self.table(torch.arange(4)).tanh()  # (4, WIDTH), the same for every batch
        seen = torch.softmax(h @ table.T, 1) @ table
        return self.head(self.last(self.middle(h) + seen))


@case("constant with as many rows as the example has samples")
def constant() -> Made:
    return Constant(), vectors


class Functorch(Tower):
    """Per-sample work by `torch.func.vmap`, and a functional call."""

    def forward(self, x: Tensor) -> Any:
        h = torch.func.vmap(lambda row: torch.outer(row, row).sum(0))(F.relu(self.stem(x)))
        h = self.first(h.tanh())
        weights: dict[str, Tensor] = dict(self.middle.named_parameters())
        return self.head(self.last(torch.func.functional_call(self.middle, weights, (h,))))


@case("vmap and functional_call", hostile=True)
def functorch() -> Made:
    return Functorch(), vectors


class Looking(Tower):
    """Looks at everything a tensor tells besides its values."""

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(self.stem(x)))
        assert isinstance(h, Tensor)
        assert h.dtype == torch.float32
        assert h.device.type == "cpu"
        assert h.is_contiguous()
        assert not h.is_sparse
        assert h.numel() == h.shape[0] * WIDTH == len(h) * h.size(1)
        assert h.stride() == (WIDTH, 1)
        h = self.middle(h.reshape(len(h), 2, -1).permute(0, 2, 1).flatten(1))
        h = torch.stack(list(h.unbind(1)), 1)
        h = torch.cat(h.chunk(4, 1)[::-1], 1).type_as(x).to(x.device)
        return self.head(self.last(h))


@case("shapes, types and strides looked at")
def looking() -> Made:
    return Looking(), vectors


class ByType(Block):
    """Takes another way where a value is not exactly a tensor."""

    def change(self, h: Tensor) -> Tensor:
        return h if type(h) is Tensor else h * 3


@case("exact type looked at")
def by_type() -> Made:
    return tower(ByType)


class ByGrad(Block):
    """Takes another way where a value requires a gradient or grads are recorded."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2 if x.requires_grad else x
        return super().forward(x * 0.5 if torch.is_grad_enabled() else x)


@case("requires_grad looked at")
def by_grad() -> Made:
    return tower(ByGrad)


class BySize(Block):
    """Takes another way for larger batches."""

    def change(self, h: Tensor) -> Tensor:
        return (
            torch.cat([self.linear(part) for part in h.split(3)]) if len(h) > 5 else self.linear(h)
        )


@case("another way for larger batches")
def by_size() -> Made:
    return tower(BySize)


class Hidden(Block):
    """A layer kept in a list, where PyTorch does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(WIDTH, WIDTH)]

    def change(self, h: Tensor) -> Tensor:
        return self.hidden[0](h)


@case("trainable layer that is not registered", hostile=True)
def hidden() -> Made:
    return tower(Hidden)


class HiddenFrozen(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.hidden[0].requires_grad_(requires_grad=False)


@case("frozen layer that is not registered", hostile=True)
def hidden_frozen() -> Made:
    return tower(HiddenFrozen)


# -- hooks -------------------------------------------------------------------------------------


def _hooked(add: Callable[[Tower], None]) -> Made:
    model = Tower()
    add(model)
    return model, vectors


@case("forward hooks that change the output")
def hooks_changing() -> Made:
    def add(model: Tower) -> None:
        for block in (model.first, model.middle):
            block.register_forward_hook(lambda _m, _i, out: out * 0.5 + 0.1)
        model.last.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))

    return _hooked(add)


def _note(seen: list[Any], module: nn.Module, args: Any, out: Tensor) -> None:
    seen.append(float(out.detach().sum()))


@case("forward hooks that record", hostile=True)
def hooks_recording() -> Made:
    def add(model: Tower) -> None:
        seen: list[Any] = []
        vars(model)["seen"] = seen
        for block in (model.first, model.middle, model.last):
            block.register_forward_hook(functools.partial(_note, seen))

    return _hooked(add)


def _keep(kept: dict[str, Any], module: nn.Module, args: Any, out: Tensor) -> None:
    kept["features"] = out


@case("forward hook that keeps features for the loss", hostile=True)
def hooks_keeping() -> Made:
    class Keeping(Tower):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x), "features": vars(self)["kept"]["features"]}

    model = Keeping()
    kept: dict[str, Any] = {}
    vars(model)["kept"] = kept
    model.middle.register_forward_hook(functools.partial(_keep, kept))
    return model, vectors


@case("backward hooks")
def hooks_backward() -> Made:
    def add(model: Tower) -> None:
        for block in (model.middle, model.last):
            block.register_full_backward_hook(
                lambda _m, given, _o: tuple(g if g is None else g * 0.5 for g in given)
            )
        for p in model.parameters():
            p.register_hook(lambda g: g * 2)

    return _hooked(add)
