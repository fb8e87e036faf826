"""Which sample is which: the user's own `DataLoader`, with the index of each sample beside it.

A `Feed` hands out the batches of the loader it wraps as *tickets*: the indices of their samples
and the view each is in. A batch is only loaded when somebody asks its ticket for it, so an epoch
whose samples are all stored reads nothing. Order, batch borders and the random numbers drawn for
them are those of the loader itself, so training does not notice.

Stored values are only right while an index means the same sample. The feed therefore remembers a
digest of the content of whatever it loads and raises `SampleChanged` when it meets another.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from frostline.backends.torch.random_state import mix
from frostline.errors import FrontierError
from frostline.frontier.identity import UNKNOWN, Fingerprint, fingerprint
from frostline.frontier.loading import (
    DrawnOrder,
    Findings,
    Pick,
    Probed,
    Twin,
    Viewed,
    Witnessed,
    quiet,
)
from frostline.frontier.segments import BLOCK_ROWS
from frostline.frontier.stream import Stream
from frostline.frontier.views import IntArray, Views

__all__ = ["BLOCK", "Feed", "SampleChanged", "Ticket"]

#: Samples that are always computed together.
BLOCK = BLOCK_ROWS
#: Samples loaded at the start to see whether their content is random.
_PROBES = 8
#: How many of them are also collated alone, to see whether that is random.
_COLLATED_PROBES = 2
Digests = NDArray[np.uint64]
Load = Literal["lazy", "all"]


class SampleChanged(FrontierError):
    """The data set gives another content for an index than it gave before."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One batch of the user's loader, not necessarily loaded.

    Attributes:
        indices: (N,) of its samples in the data set.
        view: (N,) of each sample.
    """

    indices: IntArray
    view: IntArray
    _load: Callable[[], Any] = field(repr=False)

    def load(self) -> Any:
        """The real batch: these samples in these views, collated by the user's function.

        Raises:
            SampleChanged: one of them is not what it was.
        """
        return self._load()


class Feed:
    """A `DataLoader` whose batches say which samples they hold and are loaded on demand.

    The loader is never iterated itself; its samplers, generator and data set are used, so calls
    like `sampler.set_epoch(e)` work as always.

    Args:
        loader: over a map-style data set with integer keys (also Hugging Face `Dataset`,
            `Subset`, `ConcatDataset`), or over a stream, see `stable_order`.
        views: how many views of each sample are stored, and whether random transforms run.
        identity: the user's own name or version of the data, plain JSON. It vouches for the data
            set, its transforms and the collate function, which are then not looked at.
        stable_order: the user's promise that a stream gives the same samples in the same order in
            each epoch. Content that differs at a position raises.
        samples: how many samples a stream gives in an epoch; None: it is asked, or counted by
            going through it once.

    Attributes:
        loader: the wrapped loader.
        views: as given.
        samples: in the data set; for a stream, delivered in one epoch.

    Raises:
        FrontierError: a loader whose samples have no number, or whose content is not a function
            of number and view.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(5.0))
        >>> feed = Feed(DataLoader(data, batch_size=2))
        >>> for ticket in feed.epoch(0):
        ...     print(ticket.indices, ticket.load())
        [0 1] [tensor([0., 1.])]
        [2 3] [tensor([2., 3.])]
        [4] [tensor([4.])]
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        views: Views = Views(),  # noqa: B008  frozen
        identity: Any = None,
        stable_order: bool = False,
        samples: int | None = None,
    ) -> None:
        _require_plain(loader)
        self.loader = loader
        self.views = views
        self._given = identity
        # Before anything is loaded: a data set may count or keep what it loads.
        self._known = {} if identity is not None else _fingerprints(loader)
        self._order = DrawnOrder(loader)
        self._seen: dict[int, Digests] = {}
        self._blocks_asked = 0
        self._content: list[str] = []
        self._stream: Stream | None = None
        if isinstance(loader.dataset, IterableDataset):
            _require_stable(views, stable_order)
            self._stream = Stream(loader, samples)
            self.samples = self._stream.samples
            self._stream.on_read = self._witness
            if (counted := self._stream.counted) is not None:
                self.recall(range(self.samples), 0, counted)
        else:
            self.samples = _length(loader.dataset)
            self._require_function(self._probe())

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    # -- epochs ----------------------------------------------------------------------------------

    def epoch(self, epoch: int, *, load: Load = "lazy") -> Iterator[Ticket]:
        """The batches of an epoch, in the loader's order.

        Calling it draws from the random generators what `iter(loader)` would draw.

        Args:
            epoch: from 0; decides the views only. The order is the sampler's.
            load: "lazy": read a batch when its ticket is asked for it, in this process. "all":
                the loader's workers read all batches ahead, as they do for the loader itself.

        Raises:
            FrontierError: a sampler that gives other keys than indices.
            SampleChanged: a sample is not what it was.
        """
        keys = self._order.start()
        if self._stream is not None:
            if load == "lazy" and (sizes := self._stream.sizes) is not None:
                return self._stream_lazily(sizes)
            return self._stream_all(self._stream)
        if load == "all":
            return self._load_all(epoch, keys)
        return self._load_lazily(epoch, self._order.waiting(keys))

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Any]]:
        """Batches of 32 consecutive samples each (the last of all may be shorter), collated.

        Loaded by as many workers as the loader has, which stay for the next call. The global
        generators are not moved. Asking again ends what is left of an earlier call.

        Args:
            firsts: index of the first sample of each block, a multiple of 32; in any order. For a
                stream, rising indices are read in one go.
            view: of all these samples.

        Yields:
            the first index and the batch.

        Raises:
            FrontierError: no such block or view; a call after this one.
            SampleChanged: a sample is not what it was.
        """
        self._require_blocks(firsts, view)
        self._blocks_asked += 1
        return self._blocks(list(firsts), view, self._blocks_asked)

    def load(self, indices: Sequence[int] | IntArray, views: Sequence[int] | IntArray) -> Any:
        """Any samples in any views, collated; in this process, without moving the generators.

        Args:
            indices: (N,) of the samples, 0 to `samples` - 1, N >= 1. Of a stream, everything up to
                the last of them is read.
            views: (N,) of each.

        Raises:
            FrontierError: no such sample or view.
            SampleChanged: one of them is not what it was.
        """
        numbers, view = self._indices(indices), np.asarray(views, np.int64)
        self._require_view(int(view.min()))
        self._require_view(int(view.max()))
        return self._load(numbers, view, numbers.tolist())

    def close(self) -> None:
        """End all worker processes; the feed starts new ones when it needs them."""
        for name in ("_whole", "_lone", "_blockwise"):
            vars(self).pop(name, None)
        if self._stream is not None:
            self._stream.close()

    # -- identity --------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What the samples are, as plain JSON; None in it stands for "cannot be known".

        Keys: "kind" ("map" or "stream"), "samples", "class", "data" (data set with transforms),
        "collate", "given", "views", "cut" (how a stream is cut and shared out), "content" (of the
        samples first looked at), "unknown" (why something is None, for people).
        """
        loader = self.loader
        kind = type(loader.dataset)
        stream = self._stream is not None
        return {
            "kind": "stream" if stream else "map",
            "samples": self.samples,
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "data": self._known["data"].digest if self._known else "given",
            "collate": self._known["collate"].digest if self._known else "given",
            "given": self._given,
            "views": self.views.identity,
            "cut": [loader.batch_size, loader.drop_last, loader.num_workers] if stream else [],
            "content": self._content,
            "unknown": [f"{name}: {f.unknown}" for name, f in self._known.items() if f.unknown],
        }

    @property
    def known(self) -> bool:
        """Whether `identity` says all that values computed from the samples depend on."""
        return not any(value is None for key, value in self.identity.items() if key != "given")

    def describe(self) -> str:
        """One sentence on views for people."""
        return self.views.describe()

    # -- witnesses -------------------------------------------------------------------------------

    def digests(self, indices: Sequence[int] | IntArray, view: int) -> Digests:
        """Digests of the content of these samples, 0 for those not loaded so far.

        To be stored beside what was computed from them, and given back by `recall`.
        """
        return self._table(view)[np.asarray(indices, np.int64)]

    def recall(self, indices: Sequence[int] | IntArray, view: int, digests: Digests) -> None:
        """Take over digests that were stored earlier; 0 means unknown.

        Raises:
            SampleChanged: a sample loaded meanwhile is not what it was then.
        """
        known = np.asarray(indices, np.int64)
        self._witness(known, np.full(known.shape, view), np.asarray(digests, np.uint64))

    def witness(self, epoch: int, *, most: int = 2) -> int:
        """Load a few known samples again, other ones each epoch, and compare them.

        Returns:
            how many were compared; 0 where nothing is known.

        Raises:
            SampleChanged: one of them is not what it was.
        """
        compared = 0
        for view, table in sorted(self._seen.items()):
            known = np.flatnonzero(table)
            if self._stream is not None:
                known = known[:most]  # going far into a stream would cost as much as an epoch
            elif len(known):
                drawn = [mix(self.views.seed, epoch, view, i) % len(known) for i in range(most)]
                known = known[sorted(set(drawn))]
            if len(known) and compared < most:
                self._load(known, np.full(known.shape, view), known.tolist())
                compared += len(known)
        return compared

    def _witness(self, indices: IntArray, view: IntArray, digests: Digests) -> None:
        if len(digests) != len(indices):
            return  # a data set that makes whole batches by itself
        for number in np.unique(view):
            mine = view == number
            which, new = indices[mine], digests[mine]
            table = self._table(int(number))
            old = table[which]
            changed = which[(old != UNKNOWN) & (new != UNKNOWN) & (old != new)]
            if len(changed):
                raise self._changed(int(changed[0]), int(number))
            table[which] = np.where(new == UNKNOWN, old, new)

    def _table(self, view: int) -> Digests:
        return self._seen.setdefault(view, np.zeros(self.samples, np.uint64))

    def _changed(self, index: int, view: int) -> SampleChanged:
        stream = self._stream is not None
        where = f"position {index} of the stream" if stream else f"sample {index}"
        return SampleChanged(
            f"use what is stored for {where}" + (f", view {view}" if self.views.augmented else ""),
            found="another content than when it was first loaded",
            fix="give the samples in the same order in each epoch (no shuffling in the stream), "
            "or train without the cache"
            if stream
            else "leave the data as it is during training, and switch on augmentation by "
            "views=Views(4) if the transforms are random",
        )

    # -- map-style -------------------------------------------------------------------------------

    def _load_all(self, epoch: int, keys: Iterator[Any]) -> Iterator[Ticket]:
        taken: deque[tuple[IntArray, IntArray]] = deque()
        batches = self._whole.load(self._recorded(epoch, keys, taken), self._order.seed_state)
        return self._loaded(batches, taken)

    def _recorded(
        self, epoch: int, keys: Iterator[Any], taken: deque[tuple[IntArray, IntArray]]
    ) -> Iterator[Any]:
        views = self._views_of(epoch)
        for batch in keys:
            indices = self._indices(batch)
            view = views[indices]
            taken.append((indices, view))
            yield self._picks(indices, view, batch)

    def _loaded(
        self, batches: Iterator[Any], taken: deque[tuple[IntArray, IntArray]]
    ) -> Iterator[Ticket]:
        for digests, batch in batches:
            indices, view = taken.popleft()
            self._witness(indices, view, np.frombuffer(digests, np.uint64))
            yield Ticket(indices, view, _given(batch))

    def _load_lazily(self, epoch: int, keys: Iterator[Any]) -> Iterator[Ticket]:
        views = self._views_of(epoch)
        for batch in keys:
            indices = self._indices(batch)
            view = views[indices]
            yield Ticket(indices, view, self._later(indices, view, batch))

    def _views_of(self, epoch: int) -> IntArray:
        """The views of all samples at once: some ms, where each batch for itself costs more."""
        return self.views.of(epoch, np.arange(self.samples))

    def _later(self, indices: IntArray, view: IntArray, batch: Any) -> Callable[[], Any]:
        return lambda: self._load(indices, view, batch)

    def _load(self, indices: IntArray, view: IntArray, batch: Any) -> Any:
        if self._stream is not None:
            return self._stream.batch(indices.tolist())
        picks = self._picks(indices, view, batch)
        ((digests, loaded),) = quiet(self._lone.load([picks]))
        self._witness(indices, view, np.frombuffer(digests, np.uint64))
        return loaded

    def _picks(self, indices: IntArray, view: IntArray, batch: Any) -> Any:
        if not self.views.augmented:
            return batch
        return [Pick(*p) for p in zip(indices.tolist(), view.tolist(), batch, strict=True)]

    def _indices(self, batch: Any) -> IntArray:
        try:
            indices = np.array([operator.index(key) for key in batch], np.int64)
        except TypeError as error:
            raise FrontierError(
                "tell which samples a batch holds",
                found=f"keys of the sampler that are no whole numbers ({error})",
                fix="use a sampler that gives indices, or train without the cache",
            ) from error
        indices = np.where(indices < 0, indices + self.samples, indices)
        if ((indices < 0) | (indices >= self.samples)).any():
            raise FrontierError(
                "tell which samples a batch holds",
                found=f"an index outside of 0 to {self.samples - 1} from the sampler",
                fix="let len() of the data set tell how many samples there are",
            )
        return indices

    def _blocks(self, firsts: list[int], view: int, asked: int) -> Iterator[tuple[int, Any]]:
        for first, batch in zip(firsts, self._block_batches(firsts, view), strict=True):
            yield first, batch
            if asked != self._blocks_asked:
                raise FrontierError(
                    "load more blocks",
                    found="blocks that were asked for later",
                    fix="take all blocks of one call before the next call",
                )

    def _block_batches(self, firsts: list[int], view: int) -> Iterator[Any]:
        ranges = [np.arange(f, min(f + BLOCK, self.samples)) for f in firsts]
        if self._stream is not None:
            yield from (self._stream.batch(r.tolist()) for r in ranges)
            return
        views = [np.full(r.shape, view) for r in ranges]
        picks = (self._picks(r, v, r.tolist()) for r, v in zip(ranges, views, strict=True))
        batches = quiet(self._blockwise.load(picks))
        for indices, numbers, (digests, batch) in zip(ranges, views, batches, strict=True):
            self._witness(indices, numbers, np.frombuffer(digests, np.uint64))
            yield batch

    def _require_blocks(self, firsts: Sequence[int], view: int) -> None:
        self._require_view(view)
        for first in firsts:
            if first % BLOCK or not 0 <= first < self.samples:
                raise FrontierError(
                    f"load the block of samples from {first} on",
                    found=f"blocks of {BLOCK} of {self.samples} samples",
                    fix=f"ask for a multiple of {BLOCK} below {self.samples}",
                )

    def _require_view(self, view: int) -> None:
        if not 0 <= view < self.views.count:
            raise FrontierError(
                f"load view {view}",
                found=f"{self.views.count} views of each sample",
                fix=f"ask for a view from 0 to {self.views.count - 1}",
            )

    # Loaders like the user's are made when first needed: their workers cost memory.

    @cached_property
    def _data(self) -> Any:
        data = self.loader.dataset
        return Viewed(data, self.views) if self.views.augmented else data

    @cached_property
    def _collate(self) -> Witnessed:
        return Witnessed(self.loader.collate_fn)

    @cached_property
    def _whole(self) -> Twin:
        return Twin(self.loader, self._data, self._collate)

    @cached_property
    def _blockwise(self) -> Twin:
        return Twin(self.loader, self._data, self._collate, persistent=True)

    @cached_property
    def _lone(self) -> Twin:
        # What `worker_init_fn` prepares, a data set may need: then this process cannot load.
        if self.loader.worker_init_fn is not None and self.loader.num_workers:
            return Twin(self.loader, self._data, self._collate, workers=1, persistent=True)
        return Twin(self.loader, self._data, self._collate, workers=0)

    # -- is the content a function of index and view? ------------------------------------------

    def _probe(self) -> list[Findings]:
        count = min(_PROBES, self.samples)
        indices = sorted({round(i * (self.samples - 1) / max(count - 1, 1)) for i in range(count)})
        workers = min(self.loader.num_workers, 1) if self.loader.worker_init_fn else 0
        data = Probed(self.loader.dataset, self.loader.collate_fn)
        found = Twin(self.loader, data, _as_it_is, workers=workers, persistent=False)
        asked = [[(i, n < _COLLATED_PROBES)] for n, i in enumerate(indices)]
        return [finding for (finding,) in quiet(found.load(asked))]

    def _require_function(self, findings: list[Findings]) -> None:
        self._content = [f"{f.digest:016x}" for f in findings]
        if any(f.own for f in findings):
            raise FrontierError(
                "store what is computed from these samples",
                found="another content each time, also after seeding: a transform draws from a "
                "generator of its own",
                fix="let it draw from the global generators (random, numpy.random, torch), "
                "or train without the cache",
            )
        if any(f.collate for f in findings):
            raise FrontierError(
                "store what is computed from these samples",
                found="a collate function that draws random numbers: what it makes of a sample "
                "changes with the batch",
                fix="draw in a transform of the data set, or augment after the frontier",
            )
        if any(f.random for f in findings) and not self.views.augmented:
            raise FrontierError(
                "store each sample once",
                found="random transforms: samples differ each time they are loaded",
                fix="store several views by views=Views(4), keep one of them for ever by "
                "views=Views(1, augmented=True), or switch the transforms off",
            )

    # -- streams ---------------------------------------------------------------------------------

    def _stream_all(self, stream: Stream) -> Iterator[Ticket]:
        first = 0
        for count, batch in stream.delivered(self._order.seed_state):
            yield self._stream_ticket(first, count, _given(batch))
            first += count

    def _stream_lazily(self, sizes: Sequence[int]) -> Iterator[Ticket]:
        first = 0
        for count in sizes:
            indices = np.arange(first, first + count)
            view = np.zeros(count, np.int64)
            yield Ticket(indices, view, self._later(indices, view, None))
            first += count

    def _stream_ticket(self, first: int, count: int, load: Callable[[], Any]) -> Ticket:
        return Ticket(np.arange(first, first + count), np.zeros(count, np.int64), load)


def _fingerprints(loader: DataLoader[Any]) -> dict[str, Fingerprint]:
    return {
        "data": fingerprint(loader.dataset),
        "collate": fingerprint((loader.collate_fn, loader.worker_init_fn)),
    }


def _given(batch: Any) -> Callable[[], Any]:
    return lambda: batch


def _as_it_is(samples: Any) -> Any:
    return samples


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError as error:
        raise FrontierError(
            "number the samples of the data set",
            found=f"a {type(data).__name__} without len()",
            fix="give the data set a __len__",
        ) from error


def _require_plain(loader: Any) -> None:
    asked = "tell which samples a batch holds"
    if not isinstance(loader, DataLoader):
        raise FrontierError(
            asked,
            found=f"a {type(loader).__name__}",
            fix="give a torch.utils.data.DataLoader",
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise FrontierError(
            asked,
            found=f"a {type(loader).__name__}, which iterates in a way of its own",
            fix="give the plain torch.utils.data.DataLoader that it was made from",
        )
    if loader.batch_sampler is None:
        raise FrontierError(
            asked,
            found="a loader with batch_size=None: its data set makes whole batches",
            fix="give the loader a batch_size or a batch_sampler",
        )


def _require_stable(views: Views, stable_order: bool) -> None:
    if views.augmented:
        raise FrontierError(
            "store augmented views of a stream",
            found="a data set without random access: no sample can be made again in another view",
            fix="use a map-style data set, or augment after the frontier",
        )
    if not stable_order:
        raise FrontierError(
            "tell which sample of a stream is which",
            found="an IterableDataset, whose samples have no number but their position",
            fix="if it gives the same samples in the same order in each epoch, say so by "
            "stable_order=True (it is checked); else train without the cache",
        )
