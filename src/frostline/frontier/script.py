"""The recording of a forward pass: what happened to values of the frozen region, in order.

A recording is made once per region. Filling and replaying follow it entry by entry; where the
model does something else, they stop (`ReplayDiverged`) instead of guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from frostline.errors import FrontierError

__all__ = [
    "Call",
    "Entry",
    "Out",
    "ReplayDiverged",
    "Script",
    "Spec",
    "Unsettled",
    "Verdict",
    "same_constants",
]


class ReplayDiverged(FrontierError):
    """The model did something else than when its frozen region was recorded."""


class Unsettled(FrontierError):
    """A frozen module becomes what it will be in its first forward pass, which has not been yet."""


class Verdict(Enum):
    """What an operation on values of the frozen region is.

    Attributes:
        GLUE: belongs to the frozen region; its result is needed only if something live reads it.
        EAGER: belongs to it, too, but the shape of its result depends on values.
        LOOK: takes a value out of PyTorch: control flow, NumPy.
        LIVE: reads frozen values and something live.
        CALL: a module call that is skipped.
        GRAD: asks for a gradient of a frozen value.
    """

    GLUE = "glue"
    EAGER = "eager"
    LOOK = "look"
    LIVE = "live"
    CALL = "call"
    GRAD = "grad"


@dataclass(frozen=True, slots=True)
class Out:
    """One leaf of a result.

    Attributes:
        node: number of the value, if it is a new one of the frozen region.
        argument: place among the stand-ins read, if it is one of them.
        constant: the leaf itself otherwise.
    """

    node: int = -1
    argument: int = -1
    constant: Any = None


@dataclass(slots=True)
class Entry:
    """One operation or module call that read values of the frozen region.

    Attributes:
        what: the function; or name and number of the module call.
        verdict: see `Verdict`.
        parents: numbers of the values read.
        constants: other arguments that are no tensors.
        outs: the leaves of the result.
        build: from leaves to the result.
        rebinds: (place among the stand-ins read, number of the value it holds from now on).
        where: name of the module whose code it is; "" for the model itself.
        calls: numbers of the module calls around it, outermost first.
        why: for live ones, what made them so.
        stale: whether a value read had been overwritten through another tensor.
        varying: whether the constants depend on the batch.
        weighted: whether it uses a parameter.
    """

    what: Any
    verdict: Verdict
    parents: tuple[int, ...]
    constants: tuple[Any, ...] = ()
    outs: tuple[Out, ...] = ()
    build: Callable[[Any], Any] = tuple
    rebinds: tuple[tuple[int, int], ...] = ()
    where: str = ""
    calls: tuple[int, ...] = ()
    why: str | None = None
    stale: bool = False
    varying: bool = False
    weighted: bool = False

    @property
    def made(self) -> tuple[int, ...]:
        """Numbers of the values it made."""
        return (*(n for _, n in self.rebinds), *(o.node for o in self.outs if o.node >= 0))

    @property
    def title(self) -> str:
        """For messages."""
        if self.verdict is Verdict.CALL:
            return call_name(*self.what)
        name = getattr(self.what, "__name__", str(self.what))
        return f"{name} in {self.where or 'the model itself'}"


@dataclass(slots=True)
class Call:
    """One module call of the recording.

    Attributes:
        name: of the module.
        number: 0 for its first call.
        around: numbers of the calls around it, outermost first.
        begin: entries recorded before it.
        end: entries recorded when it returned.
        entry: what it becomes in a script that skips it.
        unfit: why it cannot be skipped by itself, or None.
    """

    name: str
    number: int
    around: tuple[int, ...]
    begin: int
    end: int = 0
    entry: Entry | None = None
    unfit: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """What a value looks like.

    Attributes:
        shape: sizes.
        stride: None for contiguous ones.
        dtype: its type.
        device: where it is.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """That of a real tensor."""
        plain = tensor.layout is not torch.strided or tensor.is_contiguous()
        stride = None if plain else tuple(tensor.stride())
        return cls(tuple(tensor.shape), stride, tensor.dtype, tensor.device)

    def meta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor on the meta device that looks like it, with another shape if given."""
        shape = self.shape if shape is None else shape
        if self.stride is None:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        order = sorted(range(len(shape)), key=lambda d: -self.stride[d] if self.stride else 0)
        dense = torch.empty([shape[d] for d in order], dtype=self.dtype, device="meta")
        return dense.permute([order.index(d) for d in range(len(shape))])


@dataclass(slots=True)
class Script:
    """What fillings and replays follow.

    Attributes:
        entries: in order.
        skipped: name -> numbers of its calls that are skipped.
        inputs: number of input values; they are the first ones.
        scripted: names of TorchScript modules, and of compiled ones that train: they count as
            operations.
        grads: numbers of the values that carry a gradient because the model asked for one.
        outputs: numbers of the values that leave through the model's output or its attributes.
    """

    entries: tuple[Entry, ...]
    skipped: Mapping[str, frozenset[int]]
    inputs: int
    scripted: frozenset[str] = frozenset()
    outputs: frozenset[int] = frozenset()
    grads: frozenset[int] = frozenset()
    producers: dict[int, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.producers = {n: e for e in self.entries for n in e.made}


def call_name(name: str, number: int) -> str:
    """A module call for people.

    Example:
        >>> call_name("encoder.layer", 1)
        'encoder.layer#2'
    """
    return f"{name}#{number + 1}" if number else name


def same_constants(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether arguments that are no tensors are the same."""
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a is b:
            continue
        try:
            if type(a) is not type(b) or not bool(a == b):
                return False
        except Exception:  # noqa: BLE001  what cannot be compared is not known to be the same
            return False
    return True
