"""Loaders like the user's: the same samples, workers and collate function, other batches.

A `DataLoader` draws from the global generators (or from its own) before and while it hands out
batches. Whoever asks for other batches, or for none, must leave those draws as they were.
`DrawnOrder` makes exactly the draws of the wrapped loader and nothing else; a `Twin` loads given
batches with a private generator and draws nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from frostline.backends.torch.random_state import (
    read_random_state,
    same_random_state,
    seeded,
    undisturbed,
)
from frostline.frontier.identity import content_digest
from frostline.frontier.views import Views

__all__ = [
    "DrawnOrder",
    "Findings",
    "Pick",
    "Probed",
    "Twin",
    "Viewed",
    "Witnessed",
    "fetch",
    "quiet",
]

Loader = DataLoader[Any]
Digests = NDArray[np.uint64]


class DrawnOrder:
    """The batches of keys that a loader would load, drawn as it would draw them.

    torch 2.10 to 2.15: an iteration asks the (batch) sampler for an iterator, then draws the seed
    of the workers, then, with workers, asks for an iterator again. Persistent workers keep their
    seed. Without workers a batch of keys is drawn when it is wanted; with workers
    `prefetch_factor` batches for each are drawn at the start, and one more whenever one arrives.

    Args:
        loader: the loader to copy; it is not iterated.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._started = False
        self.seed_state = _generator_state(loader)

    def start(self) -> Iterator[Any]:
        """Begin an epoch: draw what is drawn at the start, and return what draws the rest."""
        loader = self._loader
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        keys = iter(sampler)
        if not (self._started and loader.persistent_workers and loader.num_workers):
            self.seed_state = _generator_state(loader)
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            if loader.num_workers:
                keys = iter(sampler)
        self._started = True
        return keys

    def waiting(self, keys: Iterator[Any]) -> Iterator[Any]:
        """The same batches of keys, drawn as far ahead as the loader's workers would."""
        ahead = (self._loader.prefetch_factor or 0) * self._loader.num_workers
        return _ahead(keys, deque(islice(keys, ahead)))


def _ahead(keys: Iterator[Any], drawn: deque[Any]) -> Iterator[Any]:
    while True:
        drawn.extend(islice(keys, 1))
        if not drawn:
            return
        yield drawn.popleft()


def _generator_state(loader: Loader) -> Tensor:
    return torch.get_rng_state() if loader.generator is None else loader.generator.get_state()


class Twin:
    """A loader with the settings of another, loading the batches it is given.

    Args:
        loader: whose workers, collate function and pinning to copy.
        data: what to load from; the loader's own data set, or a wrapper of it.
        collate: in place of the loader's collate function.
        workers: processes; None: as many as the loader has.
        persistent: whether workers wait for the next batches when the last were loaded; None: as
            the loader has it.
        batched: False for a data set that is a stream, which cannot be given batches of keys: it
            is cut as the loader cuts it.
    """

    def __init__(
        self,
        loader: Loader,
        data: Any,
        collate: Callable[[Any], Any],
        *,
        workers: int | None = None,
        persistent: bool | None = None,
        batched: bool = True,
    ) -> None:
        workers = loader.num_workers if workers is None else workers
        persistent = loader.persistent_workers if persistent is None else persistent
        self._hand = _Hand()
        self._generator = torch.Generator()
        cut: dict[str, Any] = {"batch_sampler": self._hand}
        if not batched:
            cut = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        if workers:
            cut |= {
                "worker_init_fn": loader.worker_init_fn,
                "multiprocessing_context": loader.multiprocessing_context,
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": persistent,
                "timeout": loader.timeout,
            }
        self._loader = DataLoader(
            data,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=loader.pin_memory,
            pin_memory_device=loader.pin_memory_device,
            generator=self._generator,
            **cut,
        )

    def load(self, batches: Iterable[Any] = (), seed_state: Tensor | None = None) -> Iterator[Any]:
        """Start loading; what comes out are the collated batches in the order given.

        Args:
            batches: of keys; drawn from as workers become free. Not used for a stream.
            seed_state: of the generator that the workers' seed is drawn from.
        """
        if seed_state is not None:
            self._generator.set_state(seed_state)
        self._hand.batches = iter(batches)
        return iter(self._loader)


class _Hand:
    """A batch sampler that hands out what it was given last."""

    def __init__(self) -> None:
        self.batches: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.batches


@dataclass(frozen=True, slots=True)
class Pick:
    """One sample in one view.

    Attributes:
        index: of the sample, from 0.
        view: which of its views.
        key: what the data set is asked for, as the sampler gave it.
    """

    index: int
    view: int
    key: Any


def fetch(data: Any, key: Any) -> Any:
    """One sample, read as a loader reads it."""
    many = getattr(data, "__getitems__", None)
    return many([key])[0] if many else data[key]


class _Around:
    """A data set around the user's: what it does not know itself, the user's answers.

    `worker_init_fn` finds the data set through `get_worker_info()` and may set attributes on it.
    """

    def __init__(self, data: Any) -> None:
        vars(self)["data"] = data

    def __len__(self) -> int:
        return len(vars(self)["data"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `__getitems__` too: wrapped samples are fetched one by one
            raise AttributeError(name)
        return getattr(vars(self)["data"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["data"], name, value)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Viewed(_Around):
    """A map-style data set whose random transforms are functions of (seed, index, view) alone."""

    def __init__(self, data: Any, views: Views) -> None:
        super().__init__(data)
        vars(self)["views"] = views

    def __getitem__(self, pick: Pick) -> Any:
        with seeded(vars(self)["views"].seed_of(pick.index, pick.view)):
            return fetch(vars(self)["data"], pick.key)


@dataclass(frozen=True, slots=True)
class Findings:
    """What loading one sample three times showed.

    Attributes:
        digest: of its content under one seed.
        own: it differs under the same seed.
        random: it differs under another seed, or something was drawn.
        collate: collating it draws, or differs under another seed.
    """

    digest: int
    own: bool
    random: bool
    collate: bool


class Probed(_Around):
    """The user's data set, loading each sample three times and telling what differed.

    Keys are (key, whether to look at the collate function too).
    """

    def __init__(self, data: Any, collate: Callable[[Any], Any]) -> None:
        super().__init__(data)
        vars(self)["collate"] = collate

    def __getitem__(self, asked: tuple[Any, bool]) -> Findings:
        data, (key, collated) = vars(self)["data"], asked
        one, drew = _watched(11, lambda: content_digest(fetch(data, key)))
        again, _ = _watched(11, lambda: content_digest(fetch(data, key)))
        other, _ = _watched(12, lambda: content_digest(fetch(data, key)))
        by_batch = collated and self._collates_at_random(key)
        return Findings(one, one != again, drew or one != other, by_batch)

    def _collates_at_random(self, key: Any) -> bool:
        data, collate = vars(self)["data"], vars(self)["collate"]
        results = []
        for seed in (11, 12):
            with seeded(0):
                sample = fetch(data, key)
            # Collating one sample alone may fail where a batch of the user's would not.
            try:
                results.append(_watched(seed, lambda s=sample: content_digest(collate([s]))))
            except Exception:  # noqa: BLE001
                return False
        return results[0] != results[1] or results[0][1]


def _watched(seed: int, load: Callable[[], int]) -> tuple[int, bool]:
    """What `load` returns under this seed, and whether it drew from a global generator."""
    with seeded(seed):
        before = read_random_state()
        result = load()
        return result, not same_random_state(before, read_random_state())


class Witnessed:
    """A collate function that also digests each sample before it is collated."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> tuple[bytes, Any]:
        """The digests of the samples, 8 bytes each, and the batch."""
        digests = np.zeros(0, np.uint64)
        if isinstance(samples, list):  # else a data set that makes whole batches by itself
            digests = np.array([content_digest(sample) for sample in samples], np.uint64)
        return digests.tobytes(), self.collate(samples)


def quiet(items: Iterator[Any]) -> Iterator[Any]:
    """The same items; making one leaves the global generators where they were."""
    while True:
        with undisturbed():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
