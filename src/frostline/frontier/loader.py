"""The cache in a loop of your own: the user's loader, with batches that are loaded on demand.

A `CachedLoader` gives the batches of the loader it wraps, in the same order and of the same build.
Tensors that reach the model are stand-ins: they know their shape, and load themselves as soon as
anybody but the model looks at them. Which tensors those are, and how the model is called with
them, is learnt from the first batch: all its tensors are stand-ins, and those that arrive in the
model's `forward` unchanged are its inputs. All else (labels, names, weights) is real, and kept in
memory by sample, so that a batch whose inputs are stored is not loaded at all.

Where something cannot be known, batches are loaded as ever, and the cache's report says why.

Example:
    >>> import tempfile, torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from frostline.frontier.cache import FrontierCache
    >>> from frostline.frontier.library import Library
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> data = TensorDataset(torch.randn(40, 64), torch.randint(2, (40,)))
    >>> place = tempfile.TemporaryDirectory()
    >>> cache = FrontierCache(model, Library(place.name + "/stores"))
    >>> loader = cache.loader(DataLoader(data, batch_size=8, shuffle=True))
    >>> for epoch in range(2):
    ...     for x, y in loader:
    ...         nn.functional.cross_entropy(model(x), y).backward()
    >>> cache.report.batches, cache.report.replayed
    (10, 10)
    >>> cache.detach()
    >>> place.cleanup()
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from frostline.errors import FrontierError
from frostline.frontier.cache import BLOCK, Batch, FrontierCache, padded
from frostline.frontier.calls import Call, CalledBatch, Leaf, Step, signature
from frostline.frontier.feed import Feed, SampleChanged, Ticket
from frostline.frontier.key import unknown
from frostline.frontier.side import SideTable, Unsplittable, folded, is_whole, unfolded
from frostline.frontier.standin import StandIn
from frostline.frontier.structure import leaves_of, map_leaves
from frostline.frontier.views import Views

__all__ = ["CachedLoader"]

IntArray = NDArray[np.int64]
#: Memory for labels and the like.
SIDE_BYTES = 1 << 30
#: Ways of calling the model that are told apart; more mean an argument that changes at each step.
_MOST_CALLS = 8
#: How often all tensors of a batch are made stand-ins again, to learn more.
_MOST_LESSONS = 3
#: Batches in a row that were not served from the store, after which workers load ahead.
_PATIENCE = 2
_DRAWN_AT_ONCE = (
    SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler,
    DistributedSampler,
)  # fmt: skip


class CachedLoader:
    """A `DataLoader` whose batches need not be loaded where the model's frontier is stored.

    Made by `FrontierCache.loader`. What it does not know, the wrapped loader answers
    (`batch_size`, `sampler`, `num_workers`, ...).

    Args:
        cache: of the model that the batches go to.
        loader: the user's.
        name: of these samples, for keys and messages.
        views: how many views of each sample are stored, see `Views`; a number stands for
            `Views(number)`.
        identity: the user's own name of the data, see `Feed`.
        stable_order: the user's promise on a stream, see `Feed`.
        samples: of a stream, see `Feed`.
        side_bytes: memory for labels and whatever else comes with the inputs.

    Raises:
        FrontierError: samples that cannot be told apart or stored, see `Feed`.
    """

    def __init__(
        self,
        cache: FrontierCache,
        loader: DataLoader[Any],
        *,
        name: str,
        views: Views | int = 1,
        identity: Any = None,
        stable_order: bool = False,
        samples: int | None = None,
        side_bytes: int = SIDE_BYTES,
    ) -> None:
        views = Views(views) if isinstance(views, int) else views
        self.loader = loader
        self.name = name
        self._cache = cache
        self._feed = _Feed(
            loader, self._data_changed,
            views=views, identity=identity, stable_order=stable_order, samples=samples,
        )  # fmt: skip
        if views.augmented:
            cache.report.note(f"{name}: {self._feed.describe()}")
        self.fixed = True
        self._epoch = 0
        self._calls: dict[Any, Call] = {}
        self._inputs: frozenset[int] = frozenset()
        self._looks: dict[int, _Look] = {}
        self._side: SideTable | None = SideTable(self._feed.samples, views.count, side_bytes)
        self._lessons = 1
        self._learning = True
        self._lazy = True
        self._misses = 0
        self._dropped = False
        known = self._feed.identity
        gone = [key for key in ("data", "collate") if known[key] is None]
        self._lost = unknown("; ".join(known["unknown"]) or "the data set") if gone else None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        # Only what this class has not: settings of the wrapped loader, as trainers read them.
        if name.startswith("_") or "loader" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.loader, name)

    @property
    def dataset(self) -> Any:
        """The wrapped loader's data set."""
        return self.loader.dataset

    def set_epoch(self, epoch: int) -> None:
        """Number the next epoch, from 0: for its views, and for samplers that want to know.

        Without it, epochs are counted.
        """
        self._epoch = epoch
        for each in (self.loader.sampler, self.loader.batch_sampler, self.loader.dataset):
            if callable(tell := getattr(each, "set_epoch", None)):
                tell(epoch)

    def close(self) -> None:
        """End the worker processes; they start again when they are needed."""
        self._feed.close()

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch, as the wrapped loader gives them."""
        epoch = self._epoch
        self._epoch += 1
        if self._serves and epoch:
            self._feed.witness(epoch)
        if not self._serves:
            for ticket in self._feed.epoch(epoch, load="all"):
                yield ticket.load()
            return
        yield from self._batches(epoch)

    # -- one epoch ---------------------------------------------------------------------------

    @property
    def _serves(self) -> bool:
        return self._cache.is_attached and not self._dropped

    def _batches(self, epoch: int) -> Iterator[Any]:
        lazy = self._lazy and self.fixed and self._side is not None
        tickets = self._feed.epoch(epoch, load="lazy" if lazy else "all")
        waiting: deque[Ticket] = deque()
        first, called = True, False
        while (ticket := _next(waiting, tickets)) is not None:
            if first and lazy and self._drawn_at_once:
                waiting.extend(tickets)
            if not self._serves:
                yield ticket.load()
                continue
            step = Step(self, ticket, first, _Order(waiting, padded(self._feed.samples)))
            yield self._batch(step)
            first, called = False, called or bool(step.batches)
            self._after(step)
            if lazy and self._misses >= _PATIENCE and self._feed.by_index:
                tickets = self._feed.ahead(itertools.chain(tuple(waiting), tickets))
                waiting.clear()
                lazy = False
        if self._serves and not first and not called:
            self._cache.report.note(
                f"nothing is cached for {self.name}: no batch reached the model's forward as it "
                "was loaded"
            )

    @property
    def _drawn_at_once(self) -> bool:
        """Whether the sampler draws all random numbers of an epoch before its first index."""
        loader = self.loader
        plain = type(loader.batch_sampler) is BatchSampler
        sampler: Any = loader.sampler
        whole = getattr(sampler, "num_samples", 0) <= self._feed.samples
        return plain and type(sampler) in _DRAWN_AT_ONCE and (
            (whole and not getattr(sampler, "replacement", False))
            or type(sampler) is WeightedRandomSampler
        )  # fmt: skip

    def _after(self, step: Step) -> None:
        served = bool(step.batches) and all(batch.served for batch in step.batches)
        self._misses = 0 if served else self._misses + 1
        self._lazy = self._misses < _PATIENCE
        if self._learning and self._calls:
            self._learning = False
            self._lessons += 1
            self._check_company(step)
        if step.mixed and not step.taught and self._lessons <= _MOST_LESSONS:
            self._learning = True
        if step.looked and not step.batches:
            self._cache.report.note(
                f"a batch of {self.name} took the full forward pass: it was changed on its way to "
                "the model"
            )

    def _batch(self, step: Step) -> Any:
        """What the user gets."""
        indices, views = step.indices, step.views
        side = self._side
        lazy = self.fixed and not (self._learning or step.loaded)
        if lazy and side is not None and side.knows(indices, views):
            return side.build(indices, views, step.stand_in)
        count = itertools.count()

        def show(leaf: Any) -> Any:
            place = next(count)
            wanted = self._learning or place in self._inputs
            return step.stand_in(place) if wanted and _is_plain_tensor(leaf) else unfolded(leaf)

        real = folded(step.real(), len(indices))
        if self._dropped:
            return step.real()
        step.taught = self._learning
        return map_leaves(real, show, objects=True)

    # -- learning ----------------------------------------------------------------------------

    def called(self, step: Step, args: Any, kwargs: Any, leaves: Sequence[Tensor]) -> Batch | None:
        """The batch that the model is called with; None if it is none of ours, unchanged."""
        if self._dropped or step.touched:
            return None
        nodes = [leaf.node if type(leaf) is StandIn else None for leaf in leaves]
        ours = [n for n in nodes if isinstance(n, Leaf) and n.session is step and n.id >= 0]
        devices = {leaf.device for leaf in leaves}
        if len(ours) < len(leaves) or len(devices) > 1:
            step.mixed = True
            return None
        key = signature(args, kwargs)
        if key is None:
            self._cache.report.note(
                f"not cached for {self.name}: the model is called with more than tensors and "
                "plain values"
            )
            return None
        if (call := self._calls.get(key)) is None:
            if len(self._calls) >= _MOST_CALLS:
                self._cache.report.note(
                    f"not cached for {self.name}: the model is called in more than {_MOST_CALLS} "
                    "ways"
                )
                return None
            call = self._calls[key] = Call(self, len(self._calls), args, kwargs)
            self._inputs = self._inputs | {node.id for node in ours}
            self._learn(step.indices, step.views, step.real())
        batch = CalledBatch(step, call, devices.pop())
        step.batches.append(batch)
        return batch

    def seen(self, indices: IntArray, views: IntArray, batch: Any) -> None:
        """Take note of a batch that was loaded for whatever reason."""
        if self._inputs and not self._dropped:
            self._learn(indices, views, batch)

    def _learn(self, indices: IntArray, views: IntArray, batch: Any) -> None:
        size = len(indices)
        leaves = leaves_of(folded(batch, size)).items
        for place in self._inputs:
            leaf = leaves[place] if place < len(leaves) else None
            if not _is_plain_tensor(leaf):
                self.fixed = False
                continue
            look = _Look.of(leaf, size)
            if self._looks.setdefault(place, look) != look and self.fixed:
                self.fixed = False
                self._cache.report.note(
                    f"samples of {self.name} have inputs of different shapes: batches are loaded "
                    "at each step, and only the frozen computation is saved"
                )
        if self._side is None:
            return
        try:
            self._side.learn(indices, views, batch, self._inputs)
        except Unsplittable as error:
            self._side = None
            self._cache.report.note(
                f"batches of {self.name} are loaded at each step, and only the frozen computation "
                f"is saved: they hold {error}"
            )

    def _check_company(self, step: Step) -> None:
        """Load the first samples again in another batch: what is theirs must be the same."""
        indices, views = step.indices, step.views
        if not self._feed.by_index:
            return
        others = np.setdiff1d(np.arange(min(self._feed.samples, len(indices) + 1)), indices)[:1]
        company = np.concatenate([indices[::-1], others])
        self.load(company, np.concatenate([views[::-1], views[: len(others)]]))

    def load(self, indices: IntArray, views: IntArray) -> Any:
        """A batch of any samples, as the user's loader would collate them.

        Raises:
            FrontierError: the data changed under its indices.
        """
        batch = self._feed.load(indices, views)
        self._require_same()
        self.seen(indices, views, batch)
        return batch

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Any]]:
        """Batches of consecutive samples, loaded by the workers."""
        for first, batch in self._feed.blocks(firsts, view):
            self._require_same()
            count = min(BLOCK, self._feed.samples - first)
            indices = np.arange(first, first + count)
            self.seen(indices, np.full(count, view), batch)
            yield first, batch

    @property
    def samples(self) -> int:
        """In the data set."""
        return self._feed.samples

    @property
    def views(self) -> int:
        """Stored of each sample."""
        return self._feed.views.count

    @property
    def data(self) -> Any:
        """Which samples these are, for keys."""
        if self._lost is not None:
            return self._lost
        found = self._feed.identity
        return {key: found[key] for key in ("kind", "class", "data", "given", "cut", "content")}

    @property
    def preparation(self) -> Any:
        """What happens to them, for keys."""
        found = self._feed.identity
        return {key: found[key] for key in ("collate", "views")}

    # -- data that changes -------------------------------------------------------------------

    def _data_changed(self, error: SampleChanged) -> None:
        if not self._dropped:
            self._dropped = True
            self._cache.report.note(f"{self.name} is not cached any more: {error.asked}: "
                                    f"{error.found}")  # fmt: skip

    def _require_same(self) -> None:
        if self._dropped:
            raise FrontierError(
                f"use what is stored for {self.name}",
                found="samples that changed under their index",
                fix="leave the data as it is during training",
            )

    # -- what a step needs -------------------------------------------------------------------

    def look(self, place: int, size: int) -> tuple[Tensor, torch.device]:
        """What a leaf looks like in a batch of some size."""
        look = self._looks[place]
        shape = (size, *look.shape) if look.whole else look.shape
        return torch.empty(shape, dtype=look.dtype, device="meta"), look.device

    def kept(self, place: int, step: Step) -> Tensor | None:
        """A leaf of a batch that was not loaded, if it is small enough to be in memory."""
        side = self._side
        if side is None or not side.holds(place) or not side.knows(step.indices, step.views):
            return None
        return side.leaf(place, step.indices, step.views)


@dataclass(frozen=True, slots=True)
class _Look:
    """What a leaf looks like: per sample if `whole`, else all of it."""

    whole: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, leaf: Tensor, size: int) -> _Look:
        whole = is_whole(leaf, size)
        shape = tuple(leaf.shape[1:] if whole else leaf.shape)
        return cls(whole, shape, leaf.dtype, leaf.device)


def _is_plain_tensor(leaf: Any) -> TypeGuard[Tensor]:
    return type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_quantized


def _next(waiting: deque[Ticket], tickets: Iterator[Ticket]) -> Ticket | None:
    return waiting.popleft() if waiting else next(tickets, None)


class _Order(Sequence[IntArray]):
    """Rows of the batches to come, as far as their samples are known."""

    def __init__(self, waiting: deque[Ticket], stride: int) -> None:
        self._waiting, self._stride = waiting, stride

    def __len__(self) -> int:
        return len(self._waiting)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        ticket = self._waiting[place]
        return ticket.view * self._stride + ticket.indices


class _Feed(Feed):
    """A feed that says of changed data what it has to say, and goes on."""

    def __init__(
        self, loader: DataLoader[Any], changed: Callable[[SampleChanged], None], **settings: Any
    ) -> None:
        self._changed_data = changed
        super().__init__(loader, **settings)

    @property
    def by_index(self) -> bool:
        """Whether any sample can be loaded at any time."""
        return not isinstance(self.loader.dataset, IterableDataset)

    def ahead(self, tickets: Iterator[Ticket]) -> Iterator[Ticket]:
        """The same batches, read ahead by the loader's workers."""
        taken: deque[tuple[IntArray, IntArray]] = deque()

        def picks() -> Iterator[Any]:
            for ticket in tickets:
                taken.append((ticket.indices, ticket.view))
                yield self._picks(ticket.indices, ticket.view, ticket.indices.tolist())

        return self._loaded(self._whole.load(picks(), self._order.seed_state), taken)

    def _witness(self, indices: IntArray, view: IntArray, digests: NDArray[np.uint64]) -> None:
        try:
            super()._witness(indices, view, digests)
        except SampleChanged as error:
            self._changed_data(error)
