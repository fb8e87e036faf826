"""The frozen region costs nothing: its outflow is stored per sample, and training runs the rest.

`FrontierCache` watches a model. When a batch of known samples reaches it, the cache finds the
frozen region under the model's present state, makes sure that the frontier of these samples is
stored (in whole blocks, from the nearest shallower frontier if there is one), and runs the model
with the frozen part left out. Where it cannot be exact, it says why and the model runs as ever.
"""

from __future__ import annotations

import hashlib
import logging
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from frostline.backends.torch.digest import (
    TensorTable,
    WriteWatch,
    sha256_of_tensors,
    unwrapped,
)
from frostline.backends.torch.example import Example
from frostline.backends.torch.random_state import mix
from frostline.backends.torch.tracing import COMPILED_CALL, is_compiled
from frostline.errors import FrontierError, StorageError
from frostline.frontier.arrays import sent, to_numpy, to_torch, wait_for
from frostline.frontier.balance import Balance
from frostline.frontier.encodings import Encoding
from frostline.frontier.feature_augment import FeatureAugment
from frostline.frontier.finding import batch_size, close, rows_of
from frostline.frontier.key import CacheKey, unknown
from frostline.frontier.library import Library
from frostline.frontier.moves import cast_of
from frostline.frontier.parts import region_key
from frostline.frontier.prefetch import Prefetcher, Read
from frostline.frontier.region import Region, ReplayDiverged, Slot, difference, find_region
from frostline.frontier.report import CacheReport
from frostline.frontier.script import Unsettled
from frostline.frontier.segments import BLOCK_ROWS
from frostline.frontier.side import skeleton
from frostline.frontier.standin import Node, StandIn, stand_in, with_values
from frostline.frontier.store import Column, Store, bytes_of_rows
from frostline.frontier.structure import leaves_of, map_leaves, tensors_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from frostline.frontier.loader import CachedLoader
    from frostline.frontier.views import Views

__all__ = ["BLOCK", "Batch", "CacheReport", "FrontierCache", "ShapesVary", "Source"]

_log = logging.getLogger("frostline")
_flag = attrgetter("requires_grad")
_mode = attrgetter("training")

#: Samples computed together: a stored row is then a pure function of its key.
BLOCK = BLOCK_ROWS
#: Samples of a batch that are compared with the full forward pass.
CHECKED_SAMPLES = 2
#: Most that rounding may take from a stored value, as a share of the largest one.
_ROUNDING = {"bfloat16": 1e-2, "float16": 2e-3, "int8": 2e-2}
#: Batches compared with the full forward pass when a region is first used.
CHECKED_FIRST = 2
#: Afterwards one batch in so many, at random.
CHECKED_EVERY = 200
#: Rows of at least so many bytes are read ahead on a thread.
AHEAD_BYTES = 16 << 10
#: Blocks that are loaded and filled together, at most: so many, or of so many bytes.
_HEAP_BLOCKS, _HEAP_BYTES = 8, 64 << 20
#: Blocks filled before a process looks again what others have filled.
_TURN_BLOCKS = 8
#: Divergences in a row after which a region is given up.
PATIENCE = 5
#: Ways through the frozen part that are looked for besides the first.
_MOST_WAYS = 3


class ShapesVary(FrontierError):
    """A source has found out that its samples are not of one shape: `fixed` is False from now."""


class Source(Protocol):
    """Samples with numbers: what the cache computes frontiers of.

    Attributes:
        name: e.g. "train"; for messages and keys.
        samples: how many there are.
        views: views of each sample that are stored, >= 1.
        fixed: whether all samples have inputs of one shape, so that a batch need not be loaded to
            know what it looks like.
        data: plain JSON that says which samples these are by content; None: unknown.
        preparation: plain JSON that says what happens to them before the model; None: unknown.
    """

    name: str
    samples: int
    views: int
    data: Any
    preparation: Any

    @property
    def fixed(self) -> bool:
        """See above; may turn False, see `ShapesVary`."""
        ...

    def load(self, indices: Sequence[int], views: Sequence[int]) -> Example:
        """The model's arguments for these samples, collated."""
        ...

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
        """The same for blocks of `BLOCK` consecutive samples (the last may be shorter)."""
        ...


class Batch:
    """One batch of known samples on its way to the model; its tensors may not be loaded yet.

    Args:
        source: whose samples they are.
        indices: (N,) numbers of the samples.
        views: (N,) view of each.
        first: whether it is the first of an epoch: regions change here if they can.
        order: rows of this and the following batches of the epoch, as far as known: they are
            computed at once and read ahead.
        draw: number of the draw of augmentation in feature space.
        example: the model's arguments, if they are loaded already.
        device: where the model wants them.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        views: Sequence[int],
        *,
        first: bool = False,
        order: Sequence[NDArray[np.int64]] = (),
        draw: int = 0,
        example: Example | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.order = order
        self.draw = draw
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.views = np.asarray(views, np.int64)
        self.first = first
        self.open = True
        self.served = False
        self._device = torch.device(device)
        self._example = None if example is None else moved(example, self._device)

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,) numbers of their rows in a store."""
        return self.views * padded(self.source.samples) + self.indices

    @property
    def real_device(self) -> torch.device:
        """Where the model wants its arguments."""
        return self._device

    @property
    def loaded(self) -> bool:
        """Whether the real tensors are here."""
        return self._example is not None

    def real(self) -> Example:
        """The real arguments on the device of the model, loaded if they are not."""
        if self._example is None:
            given = self.source.load(self.indices.tolist(), self.views.tolist())
            self._example = moved(given, self._device)
        return self._example

    def stand_ins(self, looks: Example | None) -> Example:
        """The arguments as stand-ins that load themselves when somebody looks at them.

        Args:
            looks: a batch of this source with tensors of the right shapes but for the number of
                samples; None: load the real one.
        """
        shaped = self.real() if looks is None or self.loaded else looks
        size, count = batch_size(shaped), len(self.indices)
        number = iter(range(1 << 30))

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            whole = leaf.ndim and len(leaf) == size
            shape = (count, *leaf.shape[1:]) if whole else tuple(leaf.shape)
            meta = torch.empty(shape, dtype=leaf.dtype, device="meta")
            place = next(number)
            return stand_in(Node(place, self, get=lambda: self._leaf(place)), meta, self._device)

        args, kwargs = map_leaves((shaped.args, dict(shaped.kwargs)), wrap, objects=True)
        return Example(args, kwargs)

    def called(self, args: Any, kwargs: Any, leaves: Sequence[Tensor]) -> Batch | None:
        """This batch, if a model is called with all of its tensors in their order, unchanged."""
        del args, kwargs
        ours = all(
            type(leaf) is StandIn and leaf.node.session is self and leaf.node.id == place
            for place, leaf in enumerate(leaves)
        )
        return self if ours else None

    def operation(self, func: Any, args: Any, kwargs: Any, found: list[StandIn]) -> Any:
        """An operation on an argument: moving it changes nothing, all else takes real values."""
        if func in _MOVES and len(found) == 1 and found[0] is args[0]:
            node, place = found[0].node, _goal(func, args, kwargs)
            if place is not None:
                meta = torch.empty(found[0].shape, dtype=found[0].dtype, device="meta")
                return stand_in(node, meta, place)
        return func(*with_values(args), **with_values(kwargs))

    def _leaf(self, place: int) -> Tensor:
        real = self.real()
        return list(tensors_of((real.args, dict(real.kwargs))))[place]


_MOVES = frozenset({Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.contiguous})


def _goal(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """Where an operation moves a tensor to; None if it does more than that."""
    if func in (Tensor.pin_memory, Tensor.contiguous):
        return args[0].place
    cast = cast_of(func, args, kwargs)
    return cast.device if cast is not None and cast.dtype is None and cast.layout is None else None


def padded(samples: int) -> int:
    """Rows of one view: samples, rounded up to whole blocks.

    Example:
        >>> padded(33)
        64
    """
    return -(-samples // BLOCK) * BLOCK


def moved(example: Example, device: torch.device) -> Example:
    """The same batch with its tensors on a device."""

    def move(leaf: Any) -> Any:
        return sent(leaf, device) if isinstance(leaf, Tensor) else leaf

    args, kwargs = map_leaves((example.args, dict(example.kwargs)), move, objects=True)
    return Example(args, kwargs)


T = TypeVar("T")


@dataclass(slots=True)
class _Use:
    """A region that is in use for one source: with its store, and what it was found under."""

    region: Region
    store: Store
    source: Source
    columns: tuple[Slot, ...]
    watch: WriteWatch
    frozen: tuple[Tensor, ...]
    training: bool
    looks: Example
    ragged: bool
    table: TensorTable
    served: int = 0
    diverged: int = 0
    closed: bool = False
    full: bool = False
    told: bool = False
    losing: bool = False
    balance: Balance = field(default_factory=Balance)
    digests: Mapping[str, Any] = field(default_factory=dict)
    kind: Any = None
    split: tuple[str, ...] = ()
    ways: list[Region] = field(default_factory=list)
    refused_ways: int = 0

    def by_any(self, action: Callable[[Region], T]) -> T:
        """What an action gives on the region, or on another way that the model takes through it.

        Raises:
            ReplayDiverged: it is none of them; as the region itself said it.
        """
        try:
            return action(self.region)
        except ReplayDiverged:
            for way in self.ways:
                with suppress(ReplayDiverged):
                    return action(way)
            raise

    def usable(self) -> bool:
        """Whether it still holds: nothing in it trains, nothing in it was written to."""
        if self.closed or any(map(_flag, self.frozen)):
            return False
        if self.region.changed() is not None:
            self.closed = True
            return False
        return self.weights_hold()

    def weights_hold(self) -> bool:
        """Whether the tensors that it reads are what they were."""
        # Data-parallel wrappers write buffers at each step that are afterwards what they were.
        if (written := self.watch.look()) and self._differ(written):
            self.closed = True
        return not self.closed

    def _differ(self, names: Sequence[str]) -> bool:
        now = sha256_of_tensors({name: self.table[name] for name in names})
        return any(list(self.digests.get(name, ()))[-1:] != [now[name]] for name in names)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A reader that is some batches ahead."""

    use: _Use
    reader: Prefetcher


class FrontierCache:
    """Runs a model without its frozen part wherever that is stored, and stores it where not.

    Args:
        model: the model as it is trained; wrappers allowed.
        library: the folder of stores; None: the user's cache folder.
        encoding: of floating values: "exact", "bfloat16", "float16" or "int8".
        budget_bytes: the most that this model's stores may take; None: no bound.
        min_gain: do not cache where less than this share of a step is saved, in [0, 1), counted
            in arithmetic. Above 0 the clock decides as well: a region whose stored samples take
            longer to read than to compute is given up (with `strict`, only said to be one).
        seed: decides which batches are checked.
        strict: which region serves a batch follows from the plan of now and that of the start of
            the epoch alone, so that an interrupted run can go on bit for bit; see `start_epoch`.
        augment: changes stored values in training, see `frostline.frontier.feature_augment`.

    Attributes:
        report: what it did.

    Example:
        Used by `frostline.fit`; in a loop of your own, see `frostline.frontier.loader`.
    """

    def __init__(
        self,
        model: nn.Module,
        library: Library | None = None,
        *,
        encoding: Encoding = "exact",
        budget_bytes: int | None = None,
        min_gain: float = 0.05,
        seed: int = 0,
        strict: bool = False,
        augment: FeatureAugment | None = None,
    ) -> None:
        self._strict = strict
        self._augment = augment
        self._trained: frozenset[str] = frozenset()
        self._intact = True
        self._adopts = True
        if isinstance(model, nn.DataParallel):
            raise FrontierError(
                "cache the frozen region of a DataParallel model",
                found="threads that share one model",
                fix="DistributedDataParallel, one process per device",
            )
        self._root = unwrapped(model)
        self._compiled = _compiled_whole(model)
        self._library = Library() if library is None else library
        self._encoding: Encoding = encoding
        self._budget_bytes = budget_bytes
        self._min_gain = min_gain
        self._seed = seed
        self._parameters = tuple(self._root.parameters())
        self._modules = tuple(self._root.modules())
        self._found: dict[Any, Region | str] = {}
        self._unsettled: set[Any] = set()
        self._moves: dict[Any, int] = {}
        self._uses: dict[str, list[_Use]] = {}
        self._active: dict[str, tuple[Any, _Use | None]] = {}
        self._looks: dict[str, Example] = {}
        self._known_stores: set[str] = set()
        self._loaders: list[CachedLoader] = []
        self._off: dict[str, bytes] = {}
        self._ahead: dict[str, _Ahead] = {}
        self._attached = False
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []
        self.report = CacheReport()
        if self._compiled:
            self.report.note(
                "the model is compiled as a whole: with the cache it runs uncompiled; to compile "
                "what trains, compile those layers by themselves, as in model.head.compile()",
                warn=True,
            )

    # -- attaching ---------------------------------------------------------------------------

    @property
    def root(self) -> nn.Module:
        """The model, without wrappers."""
        return self._root

    @property
    def is_attached(self) -> bool:
        """Whether the model's forward pass goes through the cache."""
        return self._attached

    def loader(
        self,
        loader: DataLoader[Any],
        *,
        name: str | None = None,
        views: Views | int = 1,
        identity: Any = None,
        stable_order: bool = False,
        samples: int | None = None,
    ) -> CachedLoader:
        """Attach, and wrap a loader so that its batches are known: for loops of your own.

        Args:
            loader: of the batches that the model is trained or evaluated on.
            name: of its samples; None: counted, so keep the order of these calls between runs.
            views: how many views of each sample are stored, for random transforms.
            identity: your own name or version of the data; None: it is looked at.
            stable_order: your promise that a stream gives the same samples in the same order.
            samples: of a stream, in an epoch.

        Raises:
            FrontierError: samples that cannot be told apart or stored, see `Feed`.
        """
        from frostline.frontier.loader import CachedLoader  # noqa: PLC0415  it imports this module

        name = name or f"loader {len(self._loaders) + 1}"
        made = CachedLoader(self, loader, name=name, views=views, identity=identity,
                            stable_order=stable_order, samples=samples)  # fmt: skip
        self._loaders.append(made)
        self.attach()
        return made

    def attach(self) -> None:
        """From now on the model's forward pass goes through the cache."""
        if not self._attached:
            gate = _Gate(self, self._root, self._root.forward)
            for table, key, plain in (*self._compiled, (vars(self._root), "forward", gate)):
                self._replaced.append((table, key, table.get(key, _ABSENT)))
                table[key] = plain
            self._attached = True

    def detach(self) -> None:
        """Leave the model as it was found; stores are closed."""
        if self._attached:
            for table, key, before in reversed(self._replaced):
                if before is _ABSENT:
                    del table[key]
                else:
                    table[key] = before
            self._replaced.clear()
            self._attached = False
        for loader in self._loaders:
            loader.close()
        for name in tuple(self._ahead):
            self._stop_ahead(name)
        for use in (use for uses in self._uses.values() for use in uses):
            use.store.close()
        self._uses.clear()
        self._active.clear()

    @contextmanager
    def attached(self) -> Iterator[FrontierCache]:
        """`attach` for the length of a block."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def _ungated(self) -> Iterator[None]:
        gate = vars(self._root).pop("forward", None)
        try:
            yield
        finally:
            if gate is not None:
                vars(self._root)["forward"] = gate

    def start_epoch(self, trained: Collection[str] = (), *, intact: bool = True) -> None:
        """From now on the region may only hold what was frozen when the epoch began.

        Args:
            trained: names of the parameters that trained in the first update of this epoch.
            intact: whether all that was frozen then has been frozen ever since. If not, training
                takes the full forward pass until the next epoch.
        """
        self._trained, self._intact = frozenset(trained), intact

    def adopt(self, allowed: bool) -> None:
        """Whether regions may come into use from now on; those in use stay."""
        self._adopts = allowed

    def is_off(self, source: Source) -> bool:
        """Whether the last batch of this source was not cached, under what is frozen now.

        Its batches are then better loaded ahead by workers than one by one on demand.
        """
        _, use = self._active.get(source.name, (None, None))
        if not self._adopts and use is None:
            return True
        return self._off.get(source.name) == bytes(map(_flag, self._parameters))

    def arguments(self, batch: Batch) -> Example:
        """What to call the model with for this batch: stand-ins, where nothing must be loaded."""
        looks = self._looks.get(batch.source.name) if batch.source.fixed else None
        return batch.stand_ins(looks)

    # -- one forward pass --------------------------------------------------------------------

    def forward(self, batch: Batch, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the model on a batch of known samples, without its frozen part if possible."""
        self.report.batches += 1
        try:
            use = self._use_for(batch)
        except (FrontierError, StorageError) as error:
            self.report.note(f"not cached: {error.found}")
            use = None
        if use is None:
            return self._full(batch, forward, args, kwargs)
        try:
            values = self._values(use, batch)
            shown = self._shown(use, batch, args, kwargs)
            output = self._replay(use, batch, shown, values, forward)
        except ReplayDiverged as error:
            self._note_divergence(use, error)
            return self._full(batch, forward, args, kwargs)
        except ShapesVary:
            use.closed = True
            self._active.pop(batch.source.name, None)
            return self._full(batch, forward, args, kwargs)
        except (FrontierError, StorageError) as error:
            self._give_up(use, error.found)
            return self._full(batch, forward, args, kwargs)
        use.served += 1
        use.diverged = 0
        batch.served = True
        self.report.replayed += 1
        if self._min_gain > 0 and not use.losing and (loss := use.balance.loss) is not None:
            self._veto(use, loss)
        return output

    def _full(self, batch: Batch, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not batch.loaded:
            self._looks.setdefault(batch.source.name, _few(batch.real()))
        return forward(*map_leaves(args, _real, objects=True),
                       **map_leaves(kwargs, _real, objects=True))  # fmt: skip

    def _replay(
        self,
        use: _Use,
        batch: Batch,
        shown: Example,
        values: Mapping[str, Tensor],
        forward: Callable[..., Any],
    ) -> Any:
        if self._due(use):
            start = time.perf_counter()
            try:
                self._check(use, batch, values, forward, CHECKED_SAMPLES)
            except ReplayDiverged:  # another path for few samples, none of which is padded
                self._check(use, batch, values, forward, len(batch.indices))
            self.report.checked += 1
            self.report.check_s += time.perf_counter() - start
        if self._augment is not None and self._root.training:
            values = self._augment(values, mix(self._seed, batch.draw))

        def replay(region: Region) -> Any:
            return region.run(shown, values, forward=forward, known=True)

        return self._on_a_way(use, replay, partial(self._another_way, use, batch))

    def _due(self, use: _Use) -> bool:
        if use.served < CHECKED_FIRST:
            return True
        text = f"{self._seed}/{use.source.name}/{self.report.batches}".encode()
        draw = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")
        return draw % CHECKED_EVERY == 0

    def _check(
        self,
        use: _Use,
        batch: Batch,
        values: Mapping[str, Tensor],
        forward: Callable[..., Any],
        samples: int,
    ) -> None:
        """Compare replay and full forward pass on the first of the batch's samples.

        The model and the random streams are afterwards what they were.

        Raises:
            FrontierError: they differ by more than rounding.
        """
        few = slice(0, samples)
        own = batch.source.load(batch.indices[few].tolist(), batch.views[few].tolist())
        real = moved(own, batch.real_device)
        with torch.no_grad():
            with use.region.untouched():
                copied = rows_of(real, range(batch_size(real)))
                full = forward(*copied.args, **copied.kwargs)
            stored = {name: value[few] for name, value in values.items()}
            # Rounded values are compared by themselves: what the rest makes of the rounding is
            # what was asked for.
            rounded = self._encoding != "exact"
            with use.region.untouched():
                # Copies: live code may write into what it is given.
                copies = {name: value.clone() for name, value in stored.items()}
                shown = use.by_any(lambda way: way.fill(real)) if rounded else copies
                output = use.by_any(lambda way: way.run(real, shown, forward=forward))
        wrong = difference(full, output)
        culprit = self._culprit(use, real, stored) if wrong or rounded else None
        if wrong is None and culprit is not None:
            wrong = "stored values are off by more than rounding"
        if wrong is not None:
            nothing = "all stored values are right, so the rest depends on something else"
            raise FrontierError(
                "replay the frozen region",
                found=f"{wrong}; {culprit or nothing}",
                fix="nothing to do: training goes on with the full forward pass",
            )

    def _culprit(self, use: _Use, example: Example, values: Mapping[str, Tensor]) -> str | None:
        """Which stored value is wrong, in words; None if none is."""
        fresh = use.by_any(lambda way: way.fill(example))
        for slot in use.columns:
            have = values.get(slot.name)
            if have is None or have.shape != fresh[slot.name].shape:
                continue
            rounded = self._encoding != "exact" and slot.dtype.is_floating_point
            if not (
                _near(fresh[slot.name], have, _ROUNDING[self._encoding])
                if rounded
                else close(have.to(fresh[slot.name].device), fresh[slot.name])
            ):
                return f"the stored output of {slot.name!r} is not what it gives now"
        return None

    def _shown(self, use: _Use, batch: Batch, args: Any, kwargs: Any) -> Example:
        """The arguments for a replay: real where they are loaded, else shapes only."""
        if batch.loaded:
            return batch.real()

        def show(leaf: Any) -> Any:
            if type(leaf) is not StandIn:
                return leaf
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

        return Example(*map_leaves((tuple(args), dict(kwargs)), show, objects=True))

    def _note_divergence(self, use: _Use, error: ReplayDiverged) -> None:
        use.diverged += 1
        self.report.note(f"a batch took the full forward pass: {error.found}")
        if use.diverged >= PATIENCE or (use.served == 0 and use.diverged >= 2):
            self._give_up(use, error.found)

    def _veto(self, use: _Use, loss: str) -> None:
        """What the clock says against a region: measured cost above measured saving."""
        use.losing = True
        if self._strict:  # which region serves a batch must not depend on the clock
            self.report.note(f"the cache costs time for {use.source.name}: {loss}", warn=True)
        else:
            self._give_up(use, loss)

    def _give_up(self, use: _Use, why: str) -> None:
        use.closed = True
        self._found[use.kind] = why
        self._active.pop(use.source.name, None)
        _log.warning("the cache is off for %s: %s", use.source.name, why)
        self.report.note(f"not cached any more: {why}")

    # -- which region ------------------------------------------------------------------------

    def _state(self, training: bool) -> Any:
        """All that decides the frozen region, but for the model's code."""
        modes = bytes(map(_mode, self._modules))
        autocast = tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", "cuda")
        )
        return training, bytes(map(_flag, self._parameters)), modes, autocast, self._trained

    def _use_for(self, batch: Batch) -> _Use | None:
        if all(map(_flag, self._parameters)):  # nothing is frozen, or not in this step
            return None
        if self._strict and self._root.training and not self._intact:
            return None
        if batch.first:  # listing them takes longer than all else here
            self._modules = tuple(self._root.modules())
        state = self._state(self._root.training)
        known, use = self._active.get(batch.source.name, (None, None))
        if known == state and (use is None or use.usable()):
            return use
        if not batch.first and known is not None:
            old = use if self._strict else self._shallower(batch)
            if old is not None and old.usable():
                return old
            if self._strict:
                return None
        if not self._adopts:
            self.report.note("not cached: what is frozen changes after this epoch")
            return None
        use = self._adopt(batch, state)
        self._active[batch.source.name] = state, use
        if use is None:
            self._off[batch.source.name] = bytes(map(_flag, self._parameters))
        else:
            self._off.pop(batch.source.name, None)
        return use

    def _shallower(self, batch: Batch) -> _Use | None:
        """The deepest region used before that still holds: good for the rest of an epoch."""
        uses = [
            use
            for use in self._uses.get(batch.source.name, ())
            if use.training == self._root.training and use.usable()
        ]
        holding = (use for use in uses if use.region.changed() is None)
        return max(holding, key=lambda use: len(use.frozen), default=None)

    def _adopt(self, batch: Batch, state: Any) -> _Use | None:
        """The region of the model's present state, found if need be, with its store."""
        start = time.perf_counter()
        try:
            return self._adopted(batch, state)
        finally:
            self.report.find_s += time.perf_counter() - start

    def _adopted(self, batch: Batch, state: Any) -> _Use | None:
        older = self._shallower(batch)
        example = self._sample(batch)
        kind = state, _built(example)
        found = self._found.get(kind)
        moved = found.changed() if isinstance(found, Region) else None
        if moved is not None and self._keeps_moving(kind, moved):
            found = self._found[kind] = f"{moved} keeps changing"
        elif found is None or moved is not None:
            found = self._found[kind] = self._find(state, example, older, batch)
        if isinstance(found, str):
            return None
        use = self._opened(found, batch.source, example, older)
        use.kind = kind
        uses = self._uses.setdefault(batch.source.name, [])
        self._looks[batch.source.name] = _few(example)
        same = [u for u in uses if u.store.folder == use.store.folder and not u.closed]
        if same:
            use.store.close()
            return same[0]
        uses.append(use)
        return use

    def _keeps_moving(self, kind: Any, name: str) -> bool:
        """Whether a setting has changed so often that finding the region anew does not pay."""
        self._moves[kind] = self._moves.get(kind, 0) + 1
        if self._moves[kind] < PATIENCE:
            return False
        self.report.note(f"not cached any more: {name} has changed {PATIENCE} times")
        return True

    def _sample(self, batch: Batch) -> Example:
        """A few samples to find the region with: the first ones, so that it is always the same."""
        return self._taken(batch, range(min(4, batch.source.samples)))

    def _taken(self, batch: Batch, indices: Sequence[int]) -> Example:
        views = [int(batch.views.min())] * len(indices)
        return moved(batch.source.load(list(indices), views), batch.real_device)

    def _seen_before(self, state: Any, example: Example) -> Region | None:
        """The region of the same plan in other modes, if it is the same in these."""
        wanted = (state[1], *state[3:]), _built(example)
        for (other, built), region in self._found.items():
            if isinstance(region, Region) and ((other[1], *other[3:]), built) == wanted:
                with suppress(FrontierError):
                    return region.again(example)
        return None

    def _find(self, state: Any, example: Example, older: _Use | None, batch: Batch) -> Region | str:
        if older is None and (seen := self._seen_before(state, example)) is not None:
            return seen
        split = () if older is None else older.region.parts
        try:
            region = self._found_with(example, split, batch)
        except Unsettled as error:
            if state in self._unsettled:  # a full forward pass has been, and it still is
                return error.found
            self._unsettled.add(state)
            raise
        except FrontierError as error:
            self.report.note(f"not cached: {error.found}")
            return error.found
        if not region.empty and region.gain < self._min_gain:
            self.report.note(
                f"not cached: it would save {max(0.0, region.gain):.0%} of a step, counted in "
                f"arithmetic, for {region.bytes:,} bytes per sample"
            )
            return "too little to gain"
        if region.empty:
            why = "; ".join(f"{e.module} {e.why}" for e in region.ends[:3])
            self.report.note(f"not cached: nothing is frozen{': ' + why if why else ''}")
            return "nothing is frozen"
        return region

    def _found_with(self, example: Example, split: Sequence[str], batch: Batch) -> Region:
        """The region by a few samples.

        Where some of the few are padded and others are not, the model may take different ways for
        pairs of them: then others are tried.
        """
        try:
            return find_region(self._root, example, split=split, live=self._trained)
        except Unsettled:
            raise
        except FrontierError:
            if not batch.source.fixed:
                # Of the first block: of a stream no more is read for it.
                block = self._taken(batch, range(min(BLOCK, batch.source.samples)))
                for other in _by_padding(block):
                    with suppress(FrontierError):
                        return find_region(self._root, other, split=split, live=self._trained)
            raise

    def _opened(self, region: Region, source: Source, example: Example, older: _Use | None) -> _Use:
        # Tensors of the batch are stored only where batches are not loaded for each step.
        slots = tuple(s for s in region.slots if source.fixed or s.name not in region.input_slots)
        columns = [
            Column(
                slot.name,
                str(slot.dtype).removeprefix("torch."),
                self._encoding if slot.dtype.is_floating_point else "exact",
                ragged=not source.fixed and bool(slot.shape),
            )
            for slot in slots
        ]
        columns = columns or [Column("nothing", "bool")]
        with self._ungated():  # the gate is no part of what the model computes
            key = region_key(
                self._root,
                skipped=region.skipped,
                slots=slots,
                preparation=source.preparation,
                data={
                    "name": source.name,
                    "samples": source.samples,
                    "fixed": source.fixed,
                    "content": unknown("which samples these are")
                    if source.data is None
                    else source.data,
                },
                tensors=region.tensors,
                passed=region.passed,
                encoding=self._encoding,
                weights=self._weights_of(region),
                device=_device_of(example),
            )
        if key.unknown:
            self.report.note(f"stored for this run only: {key.unknown[0]}")
        rows = source.views * padded(source.samples)
        frontier = ", ".join(slot.name for slot in slots)
        about = {
            "model": type(self._root).__name__,
            "data": f"{source.name}, {source.samples} samples, {source.views} views",
            "frontier": frontier,
        }
        shapes = [slot.shape for slot in slots] or [()]
        needs_bytes = bytes_of_rows(dict(zip(columns, shapes, strict=True)), rows)
        store = self._store(key, columns, rows, about, needs_bytes)
        while (room := store.budget_bytes) is not None and room < needs_bytes:
            if (spare := self._spare(source, older, store)) is None:
                break
            store.close()
            self._let_go(spare)
            store = self._store(key, columns, rows, about, needs_bytes)
        if str(store.folder) not in self._known_stores:
            self._known_stores.add(str(store.folder))
            self.report.found_rows += int(store.present(np.arange(rows)).sum())
        table = TensorTable(self._root)
        names = [name for name in region.tensors if name in table]
        parameters = dict(self._root.named_parameters(remove_duplicate=False))
        frozen = tuple(parameters[name] for name in names if name in parameters)
        views = f", in {source.views} views" if source.views > 1 else ""
        self.report.note(
            f"cached for {source.name}: the output of {frontier or 'nothing'}, "
            f"{sum(s.bytes for s in slots):,} bytes per sample{views}"
        )
        if self._augment is not None and self._root.training:
            self.report.note(f"stored values are changed at random in each step: {self._augment}")
        self._say_where_it_ends(region)
        return _Use(
            region, store, source, slots, WriteWatch(table, names), frozen,
            self._root.training, _few(example), not source.fixed, table,
            digests=key.parts["weights"],
            split=() if older is None else older.region.parts,
        )  # fmt: skip

    def _say_where_it_ends(self, region: Region) -> None:
        """Why less is skipped than is frozen, if so; that is mended where it is known."""
        if region.ends and not region.holds_all_frozen:
            why = "; ".join(f"{end.module} {end.why}" for end in region.ends[:3])
            self.report.note(f"not everything that is frozen is left out: {why}")

    def _store(
        self,
        key: CacheKey,
        columns: Sequence[Column],
        rows: int,
        about: Mapping[str, str],
        needs_bytes: int,
    ) -> Store:
        return self._library.open(
            key,
            columns,
            rows,
            about=about,
            needs_bytes=needs_bytes,
            most_bytes=self._room(self._library.place(key)),
        )

    def _spare(self, source: Source, older: _Use | None, store: Store) -> _Use | None:
        """What makes way where the budget has no room for all depths that were used.

        The store from which the new one is filled stays, and so does what serves other samples;
        stores that no longer hold go first, then the oldest.
        """
        serving = (use for name, (_, use) in self._active.items() if name != source.name)
        kept = {use.store.folder for use in (*serving, older) if use is not None}
        kept.add(store.folder)
        uses = [use for uses in self._uses.values() for use in uses]
        idle = [use for use in uses if use.store.folder not in kept]
        return min(idle, key=lambda use: not use.closed, default=None)

    def _let_go(self, spare: _Use) -> None:
        """Stop using a store; where the budget is this model's own, remove it."""
        name = spare.source.name
        spare.closed = True
        if (ahead := self._ahead.get(name)) is not None and ahead.use is spare:
            self._stop_ahead(name)
        spare.store.close()
        for known, uses in self._uses.items():
            self._uses[known] = [use for use in uses if use is not spare]
        if self._budget_bytes is not None:
            self._library.prune(names=[spare.store.folder.parent.name])
        frontier = ", ".join(slot.name for slot in spare.columns)
        self.report.note(f"the store of {frontier} made way: the budget has no room for both")

    def _weights_of(self, region: Region) -> Mapping[str, Any] | None:
        """Digests of what a region reads, from a use of it whose tensors have not moved since."""
        for use in (use for uses in self._uses.values() for use in uses):
            if use.region.is_twin_of(region) and use.digests and use.weights_hold():
                return use.digests
        return None

    def _room(self, entry: Path) -> int | None:
        """Bytes that the store of this entry may take."""
        if self._budget_bytes is None:
            return None
        stores = {u.store.folder: u.store for uses in self._uses.values() for u in uses}
        others = (s.bytes_on_disk for folder, s in stores.items() if folder.parent != entry)
        return max(0, self._budget_bytes - sum(others))

    # -- values ------------------------------------------------------------------------------

    def _values(self, use: _Use, batch: Batch) -> dict[str, Tensor]:
        """The stored rows of a batch, computed where they are not stored."""
        rows = batch.rows
        if not use.store.present(rows).all():
            self._fill(use, batch)
        start = time.perf_counter()
        values, good = self._read(use, batch)
        took_s = time.perf_counter() - start
        if (count := int(good.sum())) > 0:
            use.balance.add_read(count, took_s)
        self.report.read_s += took_s
        self.report.read_rows += count
        found = {slot.name: to_torch(values[slot.name], slot.dtype) for slot in use.columns}
        if not good.all():
            self._patch(use, batch, found, ~good)
        return found

    def _read(self, use: _Use, batch: Batch) -> Read:
        """The rows of a batch: read ahead where their order is known, else now."""
        if use.ragged:
            return use.store.read(batch.rows, lengths=self._lengths(use, batch))
        name = batch.source.name
        if len(batch.order) and self._reads_ahead(use):
            self._stop_ahead(name)
            self._ahead[name] = _Ahead(use, Prefetcher(use.store, list(batch.order)))
        if (ahead := self._ahead.get(name)) is not None:
            if ahead.use is use and (found := next(ahead.reader, None)) is not None:
                rows, read = found
                if np.array_equal(rows, batch.rows) and read[1].all():
                    return read
            self._stop_ahead(name)  # another order than foretold
        return use.store.read(batch.rows)

    def _reads_ahead(self, use: _Use) -> bool:
        """A thread costs more than it hides where rows are small."""
        return sum(slot.bytes for slot in use.columns) >= AHEAD_BYTES

    def _stop_ahead(self, name: str) -> None:
        if (ahead := self._ahead.pop(name, None)) is not None:
            ahead.reader.close()

    def _lengths(self, use: _Use, batch: Batch) -> dict[str, int]:
        if not use.ragged:
            return {}
        real = batch.real()

        def lengths(region: Region) -> dict[str, int]:
            slots = {slot.name: slot for slot in region.slots}
            return {
                s.name: region.row_shape(slots[s.name], real)[0] for s in use.columns if s.shape
            }

        return self._on_a_way(use, lengths, partial(self._another_way, use, batch))

    def _patch(
        self, use: _Use, batch: Batch, found: dict[str, Tensor], missing: NDArray[np.bool_]
    ) -> None:
        """Compute the rows that no store holds (over the budget, damaged) for this batch alone."""
        places = np.flatnonzero(missing)
        few = moved(
            use.source.load(batch.indices[places].tolist(), batch.views[places].tolist()),
            batch.real_device,
        )
        fresh = use.by_any(lambda way: way.fill(few))
        self.report.filled_rows += len(places)
        at = torch.from_numpy(places)
        for slot in use.columns:
            value = fresh[slot.name].cpu()
            if found[slot.name].shape[1:] != value.shape[1:]:
                shape = (len(missing), *value.shape[1:])
                kept = found[slot.name]
                whole = torch.zeros(shape, dtype=slot.dtype)
                if kept.ndim == whole.ndim and (~missing).any():
                    whole = _padded_to(kept, shape)
                found[slot.name] = whole
            found[slot.name][at] = _padded_to(value, (len(places), *found[slot.name].shape[1:]))

    def _fill(self, use: _Use, batch: Batch) -> None:
        """Compute and store the blocks that this batch and the known following ones need."""
        start = time.perf_counter()
        rows = np.concatenate([batch.rows, *batch.order])
        missing = np.unique(rows[~use.store.present(rows)] // BLOCK) * BLOCK
        missing = missing[missing + BLOCK <= padded(use.store.admitted_rows)]
        stride = padded(use.source.samples)
        for view in np.unique(missing // stride).tolist():
            firsts = [int(row % stride) for row in missing if row // stride == view]
            if (older := self._refillable(use)) is not None:
                firsts = self._refill(use, older, firsts, view)
            for some in _turns(firsts):
                # Another process may have been here in the meantime.
                due = [f for f in some if not use.store.present(_block(f, view, use.source)).all()]
                self._fill_blocks(use, due, view, batch)
        self._say_what_fits(use)
        self.report.fill_s += time.perf_counter() - start
        self.report.stored_bytes = sum(
            u.store.bytes_on_disk for uses in self._uses.values() for u in uses if not u.closed
        )

    def _fill_blocks(self, use: _Use, firsts: Sequence[int], view: int, batch: Batch) -> None:
        if not firsts or use.full:
            return
        stride = padded(use.source.samples)
        loading = time.perf_counter()
        for some in _heaps(use.source.blocks(firsts, view)):
            examples = [moved(e, batch.real_device) for _, e in some]
            wait_for(batch.real_device)  # what training has queued is not computing for the store
            start = time.perf_counter()
            filled = self._filled(use, examples, [f for f, _ in some], view)
            wait_for(batch.real_device)
            end = time.perf_counter()
            samples = sum(batch_size(e) for e in examples)
            use.balance.add_computed(samples, end - (loading if use.source.fixed else start))
            self.report.compute_s += end - start
            self.report.computed_rows += sum(len(next(iter(v.values()), ())) for v in filled)
            for (first, _), values in zip(some, filled, strict=True):
                if not self._write(use, view * stride + first, values):
                    use.full = use.ragged  # rows of one length are admitted by their number
                    return
            loading = time.perf_counter()

    def _filled(
        self, use: _Use, examples: Sequence[Example], firsts: Sequence[int], view: int
    ) -> list[dict[str, Tensor]]:
        """What is to be stored of some blocks, whichever way the model takes for each."""
        with suppress(ReplayDiverged):
            return use.region.fill_many(examples)
        filled: list[dict[str, Tensor]] = []
        for example, first in zip(examples, firsts, strict=True):
            rows = range(first, first + batch_size(example))
            find = partial(self._way_of, use, example, rows, view)
            filled.append(self._on_a_way(use, lambda way, e=example: way.fill(e), find))
        return filled

    # -- other ways through the model --------------------------------------------------------

    @staticmethod
    def _on_a_way(use: _Use, action: Callable[[Region], T], find: Callable[[], Region | None]) -> T:
        """What an action gives on a way that is known, or on one that has to be found first.

        Raises:
            ReplayDiverged: there is none.
        """
        try:
            return use.by_any(action)
        except ReplayDiverged:
            if (way := find()) is None:
                raise
            return action(way)

    def _another_way(self, use: _Use, batch: Batch) -> Region | None:
        """The way that the model takes for a batch, where it is another one than found so far."""
        views = np.unique(batch.views)
        if not batch.loaded or len(views) > 1:
            return None
        return self._way_of(use, batch.real(), batch.indices.tolist(), int(views[0]))

    def _way_of(
        self, use: _Use, example: Example, indices: Sequence[int], view: int
    ) -> Region | None:
        """Another recording of the same region, for samples that the model treats otherwise.

        Models of transformers leave out the mask of a batch in which no text is padded. What such
        a batch stores must be good for all others, so a few of its samples are computed both
        ways: by themselves, and among others.
        """
        if len(use.ways) + use.refused_ways >= _MOST_WAYS or use.source.fixed:
            return None
        start = time.perf_counter()
        way = self._recorded_way(use, example, indices, view)
        self.report.find_s += time.perf_counter() - start
        if isinstance(way, str):
            use.refused_ways += 1
            self.report.note(f"another way through the model is not cached: {way}")
            return None
        use.ways.append(way)
        use.served = 0  # the next batches are compared with the full forward pass again
        return way

    def _recorded_way(
        self, use: _Use, example: Example, indices: Sequence[int], view: int
    ) -> Region | str:
        """The way that samples take, by a few of them that take it; or why there is none."""
        why = "too few samples"
        together = [*range(min(4, use.source.samples)), *indices]
        pool = use.source.load(together, [view] * len(together))
        for few in _by_padding(moved(pool, _device_of(example))):
            try:
                way = find_region(self._root, few, split=use.split, live=self._trained)
                return self._unlike(use, way, example, indices, view) or way
            except FrontierError as error:
                why = error.found
        return why

    def _unlike(
        self, use: _Use, way: Region, example: Example, indices: Sequence[int], view: int
    ) -> str | None:
        """Why what one way stores may not be used by the other, in words; None if it may."""

        def described(region: Region) -> Any:
            slots = {(s.name, s.dtype, len(s.shape)) for s in region.slots}
            return slots, region.skipped, set(region.tensors), set(region.passed)

        if described(use.region) != described(way):
            return "other values come out of its frozen part"
        regions, device = (use.region, *use.ways, way), _device_of(example)
        whole, size, seen = way.fill(example), len(indices), {id(way)}
        for place in sorted({0, size // 2, size - 1}):
            own = {name: value[place] for name, value in whole.items()}
            # By itself nothing pads it; among the first samples and one of its own batch it may.
            for company in ([indices[place]], [0, min(1, use.source.samples - 1), indices[-1]]):
                together = [indices[place], *company]
                mixed = moved(use.source.load(together, [view] * len(together)), device)
                for region in regions:
                    with suppress(ReplayDiverged):
                        rows = region.fill(mixed)
                        seen.add(id(region))
                        for slot in use.columns:
                            if not close(*_common(own[slot.name], rows[slot.name][0])):
                                return f"{slot.name!r} gives something else for the same sample"
                        break
        return None if len(seen) > 1 else "no sample that was tried takes both ways"

    def _write(self, use: _Use, first: int, values: Mapping[str, Tensor]) -> bool:
        arrays = {slot.name: to_numpy(values[slot.name]) for slot in use.columns}
        count = len(next(iter(values.values()))) if values else 0
        if not arrays:
            arrays = {"nothing": np.zeros(count or BLOCK, np.bool_)}
        self.report.filled_rows += count
        return use.store.write(first, arrays)

    def _say_what_fits(self, use: _Use) -> None:
        """How many samples the budget leaves room for, where that is not all of them."""
        source, stride = use.source, padded(use.source.samples)
        if use.told or (not use.full and use.store.admitted_rows >= source.views * stride):
            return
        use.told = True
        if use.ragged:
            fit = int(use.store.present(np.arange(source.views * stride)).sum())
        else:
            whole, rest = divmod(use.store.admitted_rows, stride)
            fit = whole * source.samples + min(rest, source.samples)
        views = f" in {source.views} views" if source.views > 1 else ""
        self.report.note(
            f"the budget is full: it holds {fit:,} of {source.samples * source.views:,} rows of "
            f"{source.name} ({source.samples:,} samples{views}); the others are computed anew in "
            "every epoch",
            warn=True,
        )

    def _refillable(self, use: _Use) -> _Use | None:
        """A shallower region from which this one can be filled: never from the input again."""
        # Rounded values would make what is stored depend on how the plan came about.
        if use.ragged or self._encoding != "exact":
            return None
        for older in reversed(self._uses.get(use.source.name, [])):
            fits = older is not use and older.training == use.training and older.usable()
            if fits and set(older.region.skipped) <= set(use.region.skipped):
                return older
        return None

    def _refill(self, use: _Use, older: _Use, firsts: list[int], view: int) -> list[int]:
        """Fill blocks from a shallower store; the ones that could not be are given back."""
        left: list[int] = []
        for first in firsts:
            rows = _block(first, view, use.source)
            values, good = older.store.read(rows)
            if not good.all():
                left.append(first)
                continue
            known = {s.name: to_torch(values[s.name], s.dtype) for s in older.columns}
            try:
                found = use.region.refill(older.region, _shapes(use.looks, len(rows)), known)
            except FrontierError:
                return [*left, *(f for f in firsts if f >= first)]
            if not self._write(use, int(rows[0]), found):
                return []
        return left


_ABSENT = object()


def _compiled_whole(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """What to put where so that a model that was compiled as a whole runs its own code.

    Compiled code knows no stand-ins: it would be compiled again in each step, or fail.
    """
    found: list[tuple[dict[str, Any], str, Any]] = []
    root = unwrapped(model)
    while True:
        own = vars(model)
        if own.get(COMPILED_CALL) is not None:
            found.append((own, COMPILED_CALL, None))
        if model is root:
            return found
        (inner,) = model.children()
        if is_compiled(model) and "forward" in own:
            found.append((own, "forward", inner.__call__))
        model = inner


@dataclass(frozen=True)
class _Gate:
    """The forward of a model under a cache; copies of the model have their own forward again."""

    cache: FrontierCache
    root: nn.Module
    original: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Through the cache if all tensors are those of one batch, else as ever."""
        batch, ours = _batch_of(args, kwargs)
        if batch is None and not ours:
            return self.original(*args, **kwargs)
        if batch is None:  # changed on its way: the real values are the right ones
            real = map_leaves((args, kwargs), _real, objects=True)
            return self.original(*real[0], **real[1])
        return self.cache.forward(batch, self.original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return types.MethodType(type(self.root).forward, memo[id(self.root)])

    def __reduce__(self) -> Any:
        return types.MethodType, (type(self.root).forward, self.root)


def _batch_of(args: Any, kwargs: Any) -> tuple[Batch | None, bool]:
    """The batch whose arguments these are, unchanged, if any; whether any is a batch's at all."""
    leaves = [x for x in leaves_of((args, kwargs)).items if isinstance(x, Tensor)]
    session: Any = next((x.node.session for x in leaves if type(x) is StandIn), None)
    called = getattr(session, "called", None)
    return (None, False) if called is None else (called(args, kwargs, leaves), True)


def _real(leaf: Any) -> Any:
    return leaf.node.real() if type(leaf) is StandIn else leaf


def _near(fresh: Tensor, have: Tensor, share: float) -> bool:
    """Whether values differ by no more than a share of the largest one."""
    a, b = fresh.detach().cpu().double(), have.detach().cpu().double()
    largest = float(a.abs().max()) if a.numel() else 0.0
    return bool(((a - b).abs() <= share * largest).all())


def _by_padding(example: Example) -> Iterator[Example]:
    """Four samples of a batch that are padded most, and four that are padded least.

    Padding is told by zeros in whole numbers and truth values, as masks and tokens have them.
    """
    size = batch_size(example)
    zeros = torch.zeros(size)
    for tensor in tensors_of((example.args, dict(example.kwargs))):
        counts = not (tensor.is_floating_point() or tensor.is_complex())
        if counts and tensor.ndim > 1 and len(tensor) == size:
            zeros += (tensor == 0).flatten(1).sum(1).cpu()
    order = zeros.argsort(stable=True).tolist()
    for rows in (order[-4:], order[:4]):
        yield rows_of(example, rows)


def _device_of(example: Example) -> torch.device:
    return next(iter(tensors_of((example.args, dict(example.kwargs))))).device


def _common(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """What two rows have in common where one is padded to a greater length."""
    shape = tuple(slice(min(a, b)) for a, b in zip(one.shape, other.shape, strict=True))
    return one[shape], other[shape]


def _few(example: Example) -> Example:
    return rows_of(example, range(min(2, batch_size(example))))


def _built(example: Example) -> Any:
    """What tells one way of calling a model from another: all but shapes and values of tensors."""
    whole = example.args, dict(example.kwargs)
    leaves = leaves_of(whole).items
    return skeleton(whole), tuple(x.dtype if isinstance(x, Tensor) else str(x) for x in leaves)


def _shapes(example: Example, count: int) -> Example:
    """A batch that looks like this one, of another number of samples."""
    size = batch_size(example)

    def show(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        whole = leaf.ndim and len(leaf) == size
        shape = (count, *leaf.shape[1:]) if whole else tuple(leaf.shape)
        return torch.empty(shape, dtype=leaf.dtype, device="meta")

    return Example(*map_leaves((example.args, dict(example.kwargs)), show, objects=True))


def _block(first: int, view: int, source: Source) -> NDArray[np.int64]:
    start = view * padded(source.samples) + first
    return np.arange(start, start + min(BLOCK, source.samples - first), dtype=np.int64)


def _heaps(blocks: Iterator[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
    """Some blocks at a time: a few, or fewer where their inputs are large.

    One at first, then two, and so on: while these are computed, a source may prepare the next.
    """
    heap: list[tuple[int, Example]] = []
    held_bytes, most = 0, 1
    for first, example in blocks:
        heap.append((first, example))
        held_bytes += sum(t.nbytes for t in tensors_of((example.args, dict(example.kwargs))))
        if len(heap) >= most or held_bytes >= _HEAP_BYTES:
            yield heap
            heap, held_bytes, most = [], 0, min(2 * most, _HEAP_BLOCKS)
    if heap:
        yield heap


def _turns(firsts: Sequence[int]) -> Iterator[Sequence[int]]:
    """Blocks in parts; processes that train together begin at different places."""
    world = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world:
        start = len(firsts) * torch.distributed.get_rank() // torch.distributed.get_world_size()
        firsts = [*firsts[start:], *firsts[:start]]
    step = _TURN_BLOCKS if world else max(1, len(firsts))
    for begin in range(0, len(firsts), step):
        yield firsts[begin : begin + step]


def _padded_to(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = torch.zeros(shape, dtype=value.dtype)
    cut = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, shape, strict=True))
    out[cut] = value[cut]
    return out
