"""One batch of a user's loop, and the ways in which a model is called with it.

A `Step` is what the stand-ins of one batch belong to. It keeps in mind moves and casts on the way
to the model, gives real values to everybody else, and notices when a tensor was written to. A
`Call` is one way of calling the model: which leaf of the user's batch goes into which argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frostline.backends.torch.example import Example
from frostline.frontier.cache import BLOCK, Batch, ShapesVary, moved
from frostline.frontier.feed import Ticket
from frostline.frontier.moves import Cast, cast_of
from frostline.frontier.side import folded, is_plain, skeleton
from frostline.frontier.standin import Node, StandIn, stand_in, version_of, with_values
from frostline.frontier.structure import leaves_of, map_leaves

__all__ = ["Call", "CalledBatch", "Leaf", "Step", "signature"]

IntArray = NDArray[np.int64]


class Owner(Protocol):
    """The loader that a step comes from."""

    name: str
    fixed: bool

    @property
    def samples(self) -> int: ...
    @property
    def views(self) -> int: ...
    @property
    def data(self) -> Any: ...
    @property
    def preparation(self) -> Any: ...
    def load(self, indices: IntArray, views: IntArray) -> Any: ...
    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Any]]: ...
    def seen(self, indices: IntArray, views: IntArray, batch: Any) -> None: ...
    def look(self, place: int, size: int) -> tuple[Tensor, torch.device]: ...
    def kept(self, place: int, step: Step) -> Tensor | None: ...
    def called(
        self, step: Step, args: Any, kwargs: Any, leaves: Sequence[Tensor]
    ) -> Batch | None: ...


class Step:
    """One batch on its way through the user's loop: what its stand-ins belong to."""

    def __init__(
        self, loader: Owner, ticket: Ticket, first: bool, order: Sequence[IntArray]
    ) -> None:
        self.open = True
        self.first = first
        self.order = order
        self.indices, self.views = ticket.indices, ticket.view
        self.batches: list[CalledBatch] = []
        self.changed = self.looked = self.mixed = self.taught = False
        self._loader = loader
        self._ticket = ticket
        self._given: list[tuple[Tensor, Any]] = []
        self._real: Any = None
        self._leaves: tuple[Any, ...] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the real batch is here."""
        return self._leaves is not None

    def real(self) -> Any:
        """The user's batch, loaded if it is not."""
        if self._leaves is None:
            self._real = self._ticket.load()
            self._leaves = leaves_of(folded(self._real, len(self.indices))).items
            self._loader.seen(self.indices, self.views, self._real)
        return self._real

    def leaves(self) -> tuple[Any, ...]:
        """Its leaves, by place."""
        self.real()
        return self._leaves or ()

    def called(self, args: Any, kwargs: Any, leaves: Sequence[Tensor]) -> Batch | None:
        """The batch that a model's forward was called with."""
        return self._loader.called(self, args, kwargs, leaves)

    def stand_in(self, place: int) -> StandIn:
        """For one leaf of the batch."""
        if self.loaded:
            leaf = self.leaves()[place]
            meta, device = torch.empty_like(leaf, device="meta"), leaf.device
        else:
            meta, device = self._loader.look(place, len(self.indices))
        return stand_in(Leaf(place, self, lambda: self._leaf(place)), meta, device)

    def _leaf(self, place: int) -> Tensor:
        value = None if self.loaded else self._loader.kept(place, self)
        return self.given(self.leaves()[place] if value is None else value)

    def given(self, value: Tensor) -> Tensor:
        """Keep in mind what a tensor is like when it is handed out."""
        self._given.append((value, _state(value)))
        return value

    @property
    def touched(self) -> bool:
        """Whether a tensor of it may no longer be what was loaded."""
        return self.changed or any(_state(value) != state for value, state in self._given)

    def operation(self, func: Any, args: Any, kwargs: Any, found: list[StandIn]) -> Any:
        """Moves and casts are kept in mind; all else takes real values."""
        alone = bool(args) and len(found) == 1 and found[0] is args[0]
        cast = cast_of(func, args, kwargs) if alone else None
        if cast is not None:
            return _casted(found[0], cast)
        self.looked = True
        self.changed = self.changed or func in _HANDS_OUT_MEMORY
        reals = [s.node.real() for s in found]
        before = [_state(value) for value in reals]
        result = func(*with_values(args), **with_values(kwargs))
        for s, value, state in zip(found, reals, before, strict=True):
            if _state(value) != state:  # written to, or asked for a gradient
                self.changed = True
                s.node = Node(-1, self, value)
        return result


class Leaf(Node):
    """A leaf of the user's batch.

    Attributes:
        casts: what was done to it since that changes no sample by another: dtype and layout.
    """

    __slots__ = ("casts",)

    def __init__(
        self,
        place: int,
        step: Any,
        get: Callable[[], Tensor],
        casts: tuple[tuple[Any, Any], ...] = (),
    ) -> None:
        super().__init__(place, step, get=get)
        self.casts = casts


#: What lets others write without a trace in the version counter.
_HANDS_OUT_MEMORY = frozenset({
    Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage,
    Tensor.storage, vars(torch._C.TensorBase)["data"].__get__, Tensor.share_memory_,  # noqa: SLF001
})  # fmt: skip


def _casted(found: StandIn, cast: Cast) -> StandIn:
    """The stand-in of a moved or cast tensor; the tensor itself where nothing changes."""
    node: Any = found.node
    same = cast.device in (None, found.device) and cast.dtype in (None, found.dtype)
    if same and cast.layout is None:
        return found
    meta = Cast(None, cast.dtype, cast.layout)(torch.empty_like(_meta(found), device="meta"))
    casts = node.casts
    if cast.dtype not in (None, found.dtype) or cast.layout is not None:
        casts = (*casts, (cast.dtype, cast.layout))
    fresh = Leaf(node.id, node.session, lambda: node.session.given(cast(node.real())), casts)
    return stand_in(fresh, meta, cast.device or found.device)


def _meta(found: StandIn) -> Tensor:
    return torch.empty_strided(
        tuple(found.shape), tuple(found.stride()), dtype=found.dtype, device="meta"
    )


def _state(tensor: Tensor) -> Any:
    return version_of(tensor), tensor.requires_grad, tensor.shape


# -- one way of calling the model --------------------------------------------------------------


def _blank(leaf: Any) -> Any:
    """A stand-in that says only which leaf it stands for."""
    if type(leaf) is not StandIn:
        return leaf
    node: Any = leaf.node
    return stand_in(Leaf(node.id, _NO_STEP, _nothing, node.casts), _EMPTY, leaf.device)


class _NoStep:
    """What the stand-ins of a recipe belong to: nobody computes with them."""

    open = False

    def operation(self, func: Any, args: Any, kwargs: Any, found: list[StandIn]) -> Any:
        """Never called: it is closed."""
        raise NotImplementedError


_NO_STEP = _NoStep()
_EMPTY = torch.empty(0, device="meta")


def _nothing() -> Tensor:
    raise NotImplementedError


def _casts_of(leaf: StandIn) -> Any:
    node: Any = leaf.node
    return node.casts


def signature(args: Any, kwargs: Any) -> Any:
    """What tells one way of calling the model from another; None if it holds odd objects."""
    parts: list[Any] = [skeleton((args, kwargs))]
    for leaf in leaves_of((args, kwargs)).items:
        if type(leaf) is StandIn:
            node: Any = leaf.node
            parts.append((node.id, node.casts))
        elif is_plain(leaf):
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts)


class Call:
    """The samples of a loader as one way of calling the model wants them: a `Source`."""

    def __init__(self, loader: Owner, number: int, args: Any, kwargs: Any) -> None:
        self._loader = loader
        self.name = loader.name if not number else f"{loader.name}, call {number + 1}"
        self.samples, self.views = loader.samples, loader.views
        self.data = loader.data
        self._template = map_leaves((tuple(args), dict(kwargs)), _blank, objects=True)
        refs = leaves_of((args, kwargs)).items
        self.preparation = {
            **loader.preparation,
            "call": [
                [str(leaf.node.id), str(_casts_of(leaf))] if type(leaf) is StandIn else repr(leaf)
                for leaf in refs
            ],
            "build": str(skeleton((args, kwargs))),
        }

    @property
    def fixed(self) -> bool:
        """Whether all samples have inputs of one shape, as far as seen."""
        return self._loader.fixed

    def load(self, indices: Sequence[int], views: Sequence[int]) -> Example:
        """The model's arguments for these samples."""
        numbers = np.asarray(indices, np.int64)
        fixed = self.fixed
        batch = self._loader.load(numbers, np.asarray(views, np.int64))
        self._require(fixed)
        return self.example(batch, len(numbers))

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
        """The same by whole blocks."""
        fixed = self.fixed
        for first, batch in self._loader.blocks(firsts, view):
            self._require(fixed)
            yield first, self.example(batch, min(BLOCK, self.samples - first))

    def _require(self, fixed: bool) -> None:
        if fixed and not self.fixed:
            raise ShapesVary(
                f"store the inputs of {self.name} in rows of one shape",
                found="samples of different shapes",
                fix="nothing to do: they are stored in rows of different lengths",
            )

    def example(self, batch: Any, size: int) -> Example:
        """The arguments that the model is called with for a batch of the user's."""
        leaves = leaves_of(folded(batch, size)).items

        def fill(leaf: Any) -> Any:
            if type(leaf) is not StandIn:
                return leaf
            node: Any = leaf.node
            value = leaves[node.id]
            for dtype, layout in node.casts:
                value = Cast(None, dtype, layout)(value)
            return value

        args, kwargs = map_leaves(self._template, fill, objects=True)
        return Example(args, kwargs)


class CalledBatch(Batch):
    """A batch of the user's, as the model was called with it."""

    def __init__(self, step: Step, call: Call, device: torch.device) -> None:
        super().__init__(
            call, step.indices.tolist(), step.views.tolist(),
            first=step.first, order=step.order, device=device,
        )  # fmt: skip
        self._step = step
        self._call = call

    @property
    def loaded(self) -> bool:
        """Whether the real batch is here."""
        return self._step.loaded

    def real(self) -> Example:
        """The model's arguments."""
        example = self._call.example(self._step.real(), len(self.indices))
        return moved(example, self.real_device)
