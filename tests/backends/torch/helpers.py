"""Small models with layer groups made by hand, so that these tests do not depend on tracing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from frostline.backends.torch.backend import TorchBackend
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo, TensorInfo

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class Block(nn.Module):
    """Batch norm, linear, GELU, dropout; each parameter has a gradient that is not zero."""

    def __init__(self, wide_in: int, wide_out: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.fc = nn.Linear(wide_in, wide_out)
        self.norm = nn.BatchNorm1d(wide_in)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(nn.functional.gelu(self.fc(self.norm(x))))


class Net(nn.Module):
    """Three blocks and a head: (N, 6) -> (N, 3)."""

    def __init__(self, seed: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(
                [Block(6, 8, dropout), Block(8, 8, dropout), Block(8, 8, dropout)]
            )
            self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


NET_GROUPS = ("blocks.0", "blocks.1", "blocks.2", "head")


def groups_of(model: nn.Module, prefixes: Sequence[str] = NET_GROUPS) -> LayerGroups:
    """One layer group per module name, in the order given; tied weights go to the first."""
    names_of: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(p), []).append(name)
    tensors = dict(model.named_parameters())

    def inside(name: str, prefix: str) -> bool:
        return prefix in ("", name) or name.startswith(f"{prefix}.")

    groups = []
    for depth, prefix in enumerate(prefixes):
        parameters = tuple(
            _info(model, name, p, "weight", tuple(names_of[id(p)][1:]))
            for name, p in tensors.items()
            if inside(name, prefix)
        )
        buffers = tuple(
            _info(model, name, b, "buffer", ())
            for name, b in model.named_buffers()
            if inside(name, prefix)
        )
        modules = tuple(
            ModuleInfo(name, type(m).__name__)
            for name, m in model.named_modules()
            if inside(name, prefix)
        )
        groups.append(LayerGroup(prefix, depth, parameters, buffers, modules))
    return LayerGroups(tuple(groups))


def _info(
    model: nn.Module, name: str, tensor: Tensor, kind: str, aliases: tuple[str, ...]
) -> TensorInfo:
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, NORMS):
        kind = "norm"
    elif name.endswith("bias"):
        kind = "bias"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(name, tuple(tensor.shape), dtype, tensor.element_size(), kind, aliases)


def batch(step: int, size: int = 16, wide: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """The batch of one step: a function of the step alone."""
    source = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, wide, generator=source)
    return x, torch.randint(classes, (size,), generator=source)


def bits(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor, worked out apart from the code under test."""
    return {
        name: hashlib.sha256(
            bytes(t.detach().cpu().contiguous().flatten().view(torch.uint8).tolist())
        ).hexdigest()
        for name, t in tensors.items()
    }


def model_bits(model: nn.Module) -> dict[str, str]:
    """Digests of every parameter and buffer of a model."""
    return bits({**dict(model.named_parameters()), **dict(model.named_buffers())})


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """Names whose digest changed."""
    return {name for name in before if before[name] != after[name]}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One plain update."""
    x, y = batch(step)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


class TorchCase:
    """`Net` in training, as `frostline.testing.check_backend` wants it."""

    def __init__(
        self, backend_class: type[TorchBackend] = TorchBackend, *, optimizer_state: str = "keep"
    ) -> None:
        torch.manual_seed(5)
        self.model = Net(seed=3)
        self.optimizer = torch.optim.SGD(
            [{"params": m.parameters()} for m in (*self.model.blocks, self.model.head)],
            lr=0.05,
            momentum=0.9,
            weight_decay=0.01,
        )
        self.backend = backend_class(
            self.model,
            self.optimizer,
            groups=groups_of(self.model),
            optimizer_state=optimizer_state,
        )
        self.step = 0

    def backward(self) -> None:
        torch.manual_seed(self.step)
        x, y = batch(self.step)
        self.step += 1
        self.model.train()
        nn.functional.cross_entropy(self.model(x), y).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def has_gradient(self, parameter: str) -> bool:
        return self.model.get_parameter(parameter).grad is not None

    def evidence(self) -> Mapping[str, str]:
        named = dict(self.model.named_parameters())
        gradients = {f"grad:{n}": p.grad for n, p in named.items() if p.grad is not None}
        state = {
            f"state:{n}:{k}": v
            for n, p in named.items()
            for k, v in self.optimizer.state.get(p, {}).items()
            if isinstance(v, Tensor)
        }
        random = {"random": torch.random.get_rng_state()}
        return model_bits(self.model) | bits(gradients) | bits(state) | bits(random)

    def tamper(self, tensor: str) -> None:
        held = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}[tensor]
        held.data.view(-1)[0] += 1
