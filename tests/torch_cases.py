"""Models that are awkward to divide, and a picture of everything a model must be left with."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frostline.groups import LayerGroups


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a call must leave unchanged; comparable with `==`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "bits": {name: _bits(t) for name, t in tensors},
        "identity": {name: (id(t), t.data_ptr()) for name, t in tensors},
        "gradients": {name: id(p.grad) for name, p in model.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "attributes": {name: _attributes(m) for name, m in model.named_modules()},
        "random": (
            random.getstate(),
            [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
            torch.get_rng_state().tolist(),
        ),
        "hooks": len(nn.modules.module._global_forward_hooks)
        + len(nn.modules.module._global_forward_pre_hooks),
    }


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _attributes(module: nn.Module) -> dict[str, Any]:
    def key(value: object) -> Any:
        if type(value).__name__ in ("dict", "OrderedDict"):
            return [(name, id(item)) for name, item in value.items()]
        return [id(v) for v in value] if isinstance(value, list) else id(value)

    return {name: key(value) for name, value in vars(module).items()}


def check_complete(model: nn.Module, groups: LayerGroups) -> None:
    """Every parameter and buffer in exactly one group, under all its names; modules too."""
    for found, real in (
        ([p for g in groups for p in g.parameters], model.named_parameters),
        ([b for g in groups for b in g.buffers], model.named_buffers),
    ):
        assert sorted(t.name for t in found) == sorted(name for name, _ in real())
        everything = sorted(name for name, _ in real(remove_duplicate=False))
        assert sorted(n for t in found for n in t.names) == everything
        shapes = {name: tuple(t.shape) for name, t in real()}
        assert all(t.shape == shapes[t.name] for t in found)
    modules = dict(model.named_modules())
    listed = [info.name for g in groups for info in g.modules]
    assert len(listed) == len(set(listed))
    for group in groups:
        own = {t.name for t in (*group.parameters, *group.buffers)}
        for info in group.modules:
            prefix = f"{info.name}." if info.name else ""
            below = modules[info.name]
            inside = {prefix + n for n, _ in (*below.named_parameters(), *below.named_buffers())}
            aliases = {n for t in (*group.parameters, *group.buffers) for n in t.names}
            assert inside <= own | aliases, (group.name, info.name)


class Backwards(nn.Module):
    """Defined last to first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.middle = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.stem = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.stem(x)).relu()))


class Shared(nn.Module):
    """One layer used by two blocks."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.first = nn.ModuleDict({"own": nn.Linear(6, 6), "shared": shared})
        self.second = nn.ModuleDict({"own": nn.Linear(6, 6), "shared": shared})
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = block["shared"](block["own"](x).relu())
        return self.head(x)


class ByName(nn.Module):
    """Branches in a ModuleDict, used in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"late": nn.Linear(4, 4), "early": nn.Linear(4, 4)})
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.branches["late"](self.branches["early"](x)))


class Functional(nn.Module):
    """Weights directly on the root, a scale, and a token: no submodule at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = nn.Parameter(torch.randn(5, 2))
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.w1 = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("offset", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.w1 * self.scale + self.offset)[:, None] + self.token
        return torch.matmul(hidden[:, 0], self.w2)


class Twice(nn.Module):
    """One block that runs on its own output, and a pair of layers that never run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.spare = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.auxiliary = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = self.block(x)
        return self.head(x)


class Tied(nn.Module):
    """An output layer that uses the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(6, 11, bias=False)
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.body(self.embedding(ids)))


class Conditional(nn.Module):
    """A branch that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.positive = nn.Linear(4, 4)
        self.negative = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.positive(x) if x.numel() else self.negative(x))


class Meddler(nn.Module):
    """Changes all it can reach in its forward pass, and draws random numbers everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("lookup", torch.zeros(2), persistent=False)
        self.cache: dict[str, Tensor] = {}
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)  # the caller's batch
        self.count += 1
        self.lookup = self.lookup + 1
        with torch.no_grad():
            self.stem.weight.div_(2)
            self.head.bias.data.view(-1).add_(1)
            self.head.weight.data = self.head.weight.data * 2
        self.cache["x"] = x
        self.history.append(1)
        self.flag = True
        self.register_forward_hook(lambda *_: None)
        noise = random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002
        return self.head(self.stem(x)) + noise


class Rescaled(nn.Module):
    """Halves deep weights in place before anything runs, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.div_(2)
            torch._foreach_mul_([self.head.weight], 3)
        return self.head(self.stem(x))


class Swapper(nn.Module):
    """Replaces a layer at its first forward pass, keeping the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        other = nn.Linear(4, 4)
        other.weight, other.bias = self.inner.weight, self.inner.bias
        self.inner = other
        return self.head(self.inner(x))


class Residual(nn.Module):
    """A block with a list inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for layer in self.layers:
            y = layer(y).relu()
        return x + self.drop(y)


class Head(nn.Module):
    """One attention head of the tutorial kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.key(x).sigmoid() * self.value(x)


class Parallel(nn.Module):
    """A block whose list holds parallel modules of several layers: not stages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width) for _ in range(width // 2))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(torch.cat([head(x) for head in self.heads], -1))


class Stage(nn.Module):
    """A stage: a change of width, then blocks in a chain."""

    def __init__(self, before: int, after: int, count: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.change = nn.Sequential(nn.LayerNorm(before), nn.Linear(before, after))
        self.blocks = nn.Sequential(*(block(after) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.change(x))


class Staged(nn.Module):
    """Two stages, the second with a single block, wrapped once more."""

    def __init__(self, block: type[nn.Module] = Residual) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stages = nn.ModuleList([Stage(4, 8, 2, block), Stage(8, 6, 1, block)])
        self.final_norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.backbone.stages:
            x = stage(x)
        return self.head(self.final_norm(x))


class Towers(nn.Module):
    """Two inputs, one encoder for both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.encoder(a) - self.encoder(b))


class Weighted(nn.Module):
    """Parametrised weights, old style and new, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3, padding=1))
        self.rnn = nn.LSTM(4, 5, num_layers=2, batch_first=True)
        self.out = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.conv(x).mT)[0][:, -1])


AWKWARD: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    kind.__name__: (kind, (torch.ones(2, 4),))
    for kind in (
        Backwards,
        ByName,
        Functional,
        Twice,
        Conditional,
        Meddler,
        Rescaled,
        Swapper,
        Staged,
    )
} | {
    "Shared": (Shared, (torch.ones(2, 6),)),
    "Tied": (Tied, (torch.ones(2, 5, dtype=torch.long),)),
    "Towers": (Towers, (torch.ones(2, 4), torch.zeros(2, 4))),
    "Weighted": (Weighted, (torch.ones(2, 3, 6),)),
}
