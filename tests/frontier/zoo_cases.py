"""What a case of the zoo is: a model with random weights, its data, and the ways to freeze it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

SAMPLES = 24
"""Samples of every data set; no other dimension of an input has this size."""

MakeBatch = Callable[[int, int], Example]
"""(n, seed) -> n samples."""
Freeze = Callable[[LayerGroups], FreezePlan]
Made = tuple[nn.Module, MakeBatch]


def prefix(share: float, **options: Any) -> Freeze:
    """Freeze this share of the backbone's groups, from the input on, and at least one."""

    def plan(groups: LayerGroups) -> FreezePlan:
        names = [g.name for g in groups if g.name not in groups.head]
        frozen = frozenset(names[: max(1, round(share * len(names)))])
        live: dict[str, Any] = {key: frozen for key, on in options.items() if on}
        return FreezePlan(frozen=frozen, **live)

    return plan


def prefixes(**options: Any) -> dict[str, Freeze]:
    """Four prefixes of the layer groups; `live_norm` and `live_dropout` go to the plan."""
    shares = {"quarter": 0.25, "half": 0.5, "three quarters": 0.75, "all but head": 1.0}
    return {name: prefix(share, **options) for name, share in shares.items()}


def sets(**selectors: str) -> dict[str, Freeze]:
    """Frozen sets by name, each a selector of parameters."""
    return {
        name.replace("_", " "): lambda groups, s=selector: FreezePlan.freezing(groups, s)
        for name, selector in selectors.items()
    }


def keep_training(*words: str) -> dict[str, Freeze]:
    """The four prefixes, but parameters with one of these words in their name still train."""

    def plan(inner: Freeze) -> Freeze:
        def exempting(groups: LayerGroups) -> FreezePlan:
            found = inner(groups)
            exempt = {
                g.name: frozenset(n for n in g.parameter_names if any(w in n for w in words))
                for g in groups
            }
            return FreezePlan(frozen=found.frozen, exempt=exempt)

        return exempting

    return {name: plan(freeze) for name, freeze in prefixes().items()}


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: unique.
        make: gives the model and its data; what it draws from is seeded by the caller, and two
            calls after the same seed give models that are equal and share nothing.
        depths: ways to freeze, by name.
        hostile: a refusal, or leaving the replay at run time, may be the right answer.
        needs: "verification" where only later steps show what is wrong, so that it is for the
            verification at run time to find.
        around: wraps every call of the model, e.g. autocast.
        between: what training code does to the model between two steps.
        batch_of: turns the gathered samples into the batch that the model gets.
        optimizer: "sgd" or "adamw".
        tolerance: largest relative error that is no difference.
        sample_dim: the dimension of the inputs that holds the samples.
        nothing_at: depths at which nothing can be left out.
        memos: words in the names of attributes that only remember what is computed again where
            they are empty: they may be missing, and must be right where they are there.
        by_hand: freeze by `requires_grad` and `eval()` alone, as the backend cannot.
    """

    name: str
    make: Callable[[], Made]
    depths: Mapping[str, Freeze] = field(default_factory=prefixes)
    hostile: bool = False
    needs: str = ""
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    between: Callable[[nn.Module, int], None] | None = None
    batch_of: Callable[[Example], Example] | None = None
    optimizer: str = "sgd"
    tolerance: float = 1e-5
    sample_dim: int = 0
    nothing_at: frozenset[str] = frozenset()
    memos: tuple[str, ...] = ()
    by_hand: bool = False

    def right(self, depth: str) -> frozenset[str]:
        """The outcomes that are right."""
        if self.hostile:
            return frozenset({"equal", "close", "refused", "diverged"})
        return frozenset({"equal", "close", *(["refused"] if depth in self.nothing_at else [])})

    def take(self, data: Example, indices: list[int]) -> Example:
        """Private copies of these samples."""
        batch = pick(data, indices, self.sample_dim)
        return self.batch_of(batch) if self.batch_of is not None else batch


CASES: dict[str, Case] = {}


def case(name: str, **options: Any) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Put the model that the decorated function makes into the zoo."""

    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        if name in CASES:
            raise ValueError(f"two cases are named {name!r}")
        CASES[name] = Case(name, make, **options)
        return make

    return add


def pick(data: Example, indices: list[int], dim: int = 0) -> Example:
    """The samples at these places, copied, in every tensor and list that has all samples."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.ndim <= dim or value.shape[dim] != SAMPLES:
                return value.clone()
            taken = value.index_select(dim, torch.tensor(indices, device=value.device))
            if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
                taken = taken.contiguous(memory_format=torch.channels_last)
            return taken
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list) and len(value) == SAMPLES:
            return [value[i] for i in indices]
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item) for item in value)
        return value

    return Example(tuple(walk(a) for a in data.args), {k: walk(v) for k, v in data.kwargs.items()})


# -- data --------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*sizes: int) -> MakeBatch:
    """One positional input of normal values, (n, *sizes)."""
    return lambda n, seed: Example((torch.randn(n, *sizes, generator=generator(seed)),))


def pictures(size: int = 32) -> MakeBatch:
    return floats(3, size, size)


def pixels(size: int = 32) -> MakeBatch:
    """Pictures under the name that Hugging Face models use."""
    return lambda n, seed: Example(
        kwargs={"pixel_values": torch.randn(n, 3, size, size, generator=generator(seed))}
    )


def waves(length: int = 400) -> MakeBatch:
    return lambda n, seed: Example(
        kwargs={"input_values": torch.randn(n, length, generator=generator(seed))}
    )


def tokens(vocabulary: int = 64, length: int = 10, *, mask: bool = True) -> MakeBatch:
    """Token ids, padded with 0 after 4 to `length` tokens, and the mask that says so."""

    def make(n: int, seed: int) -> Example:
        g = generator(seed)
        ids = torch.randint(3, vocabulary, (n, length), generator=g)
        if not mask:
            return Example(kwargs={"input_ids": ids})
        lengths = torch.randint(4, length + 1, (n,), generator=g)
        lengths[:: max(1, n - 1)] = length
        seen = (torch.arange(length) < lengths[:, None]).long()
        return Example(kwargs={"input_ids": ids * seen, "attention_mask": seen})

    return make
