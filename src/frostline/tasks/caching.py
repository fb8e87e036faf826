"""The frontier cache of a run: its splits as numbered samples, and batches that it serves.

Where the outputs of the frozen layers are stored, neither pictures are decoded nor frozen layers
run. Which views a sample is seen in, and in which order, is the same with and without the cache.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from frostline.backends.torch.example import Example
from frostline.frontier import cache as frontier
from frostline.frontier.cache import BLOCK, FrontierCache
from frostline.frontier.feature_augment import read_feature_augment
from frostline.frontier.identity import fingerprint
from frostline.frontier.library import Library
from frostline.frontier.structure import tensors_of
from frostline.tasks.image import ImagePreparation
from frostline.tasks.resources import pick_device
from frostline.tasks.task import Batch, Split, Task
from frostline.tasks.text import PresetPreparation, TextPreparation

__all__ = ["RunCache", "SplitSource", "build_cache"]

_log = logging.getLogger("frostline")
_AUTO_GAIN = 0.05
#: Blocks prepared ahead while others are computed, and how large they may be together.
_AHEAD_BLOCKS, _AHEAD_BYTES = 8, 64 << 20
#: Whose transforms are known to draw nothing; a user's own function may.
_QUIET_SOURCES = ("timm", "torchvision", "hf")
#: Samples kept in memory as they were prepared: texts are small, and read at each step.
_KEPT_SAMPLES = 1_000_000


class SplitSource:
    """A split of a task, as `FrontierCache` knows samples.

    Texts are numbered from the shortest to the longest: samples that are computed together are
    then padded little.

    Args:
        task: whose split it is.
        split: its samples.
        name: "train" or "val".
        views: views of each sample; 1 and no augmentation for validation.
        augmented: whether view numbers change anything.
    """

    def __init__(self, task: Task, split: Split, name: str, *, views: int, augmented: bool) -> None:
        self.name = name
        self.samples = len(split)
        self.views = views
        self.fixed = not isinstance(task.preparation, TextPreparation)
        self.data = task.notes.get("content_sha256", {}).get(name)
        self.preparation = _preparation(task, augmented=augmented)
        self._task = task
        self._split = split
        self._augmented = augmented
        self._kept: dict[int, Any] = {}
        lengths = [0 if self.fixed else len(text) for text in split.inputs]
        #: Place in the split of each numbered sample, and the other way round.
        self.places = np.argsort(lengths, kind="stable")
        self.numbers = np.argsort(self.places)

    def load(self, indices: Sequence[int], views: Sequence[int]) -> Example:
        """The model's arguments for these samples, collated."""
        places = self.places[list(indices)].tolist()
        samples = [self._sample(i, v) for i, v in zip(places, views, strict=True)]
        return _example(self._task.collate(samples))

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
        """The same for blocks of consecutive samples, prepared by the run's workers."""
        spans = [range(first, min(first + BLOCK, self.samples)) for first in firsts]
        if not self._task.config.workers:
            load = lambda span: self.load(span, [view] * len(span))  # noqa: E731
            ahead = self._repeats and _spare_processor(self._task.config.device)
            found = _ahead(load, spans) if ahead else map(load, spans)
            yield from zip(firsts, found, strict=True)
            return
        seen = view if self._augmented else None
        loader = DataLoader(
            self._split,
            batch_sampler=[[(int(self.places[i]), seen) for i in span] for span in spans],
            collate_fn=self._task.collate,
            num_workers=self._task.config.workers,
            generator=torch.Generator(),  # a seed for the workers must not move the global stream
        )
        for first, batch in zip(firsts, loader, strict=True):
            yield first, _example(batch)

    @property
    def _repeats(self) -> bool:
        """Whether preparing draws nothing from the process's random streams, by any thread."""
        how = self._task.preparation
        if not isinstance(how, ImagePreparation) or how.spec["source"] not in _QUIET_SOURCES:
            return False
        return not self._augmented or how.augment in ("none", "flip")

    def _sample(self, index: int, view: int) -> Any:
        key = index, view if self._augmented else None
        if self.fixed:
            return self._split[key]
        if index not in self._kept and len(self._kept) < _KEPT_SAMPLES:
            self._kept[index] = self._split[key]
        return self._kept[index] if index in self._kept else self._split[key]


def _spare_processor(device: str) -> bool:
    """Whether a thread can prepare samples without taking a processor from the arithmetic.

    Threads of arithmetic wait for each other at every step: one that is held up holds up all.
    """
    if pick_device(device).type != "cpu":
        return True
    mine = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return torch.get_num_threads() < (len(mine(0)) if mine else os.cpu_count() or 1)


def _ahead(load: Callable[[range], Example], spans: Sequence[range]) -> Iterator[Example]:
    """Loaded spans in order; a thread loads the next ones while the caller computes."""
    if not spans:
        return
    yield (first := load(spans[0]))
    block_bytes = sum(t.nbytes for t in tensors_of((first.args, dict(first.kwargs))))
    depth = min(_AHEAD_BLOCKS, max(1, _AHEAD_BYTES // max(1, block_bytes)))
    thread = ThreadPoolExecutor(1, "frostline-load")
    try:
        coming: deque[Future[Example]] = deque()
        for span in spans[1:]:
            coming.append(thread.submit(load, span))
            if len(coming) > depth:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class RunCache:
    """The cache of one run.

    Attributes:
        frontier: of the model.
        sources: its splits by name.
        task: whose splits they are.
        device: where the model is.
    """

    frontier: FrontierCache
    sources: Mapping[str, SplitSource]
    task: Task
    device: torch.device

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Serve the model's forward passes inside the block."""
        with self.frontier.attached():
            yield

    def expect(self, *, lasting: bool) -> None:
        """Say at the start of an epoch whether what is frozen stays so for more than this one."""
        self.frontier.adopt(lasting or self.task.config.cache == "on")

    def start_epoch(self, *, frozen: Collection[str], intact: bool) -> None:
        """Say what has been frozen since the first update of the epoch.

        Args:
            frozen: names of the parameters frozen then.
            intact: whether all of them have been frozen ever since.
        """
        names = {name for name, _ in self.frontier.root.named_parameters()}
        self.frontier.start_epoch(names - set(frozen), intact=intact)

    def serves(self, split: Split) -> bool:
        """Whether batches of this split should come from `batches`."""
        source = self._source(split)
        return source is not None and not self.frontier.is_off(source)

    def batches(
        self, split: Split, keys: Sequence[Sequence[tuple[int, int | None]]], *, draw: int = 0
    ) -> Iterator[Batch]:
        """Batches whose inputs are loaded only if somebody looks at them.

        Args:
            split: whose samples.
            keys: per batch (index, view) of its samples.
            draw: number of the first batch's draw of augmentation in feature space.
        """
        source = self._source(split)
        if source is None:
            raise KeyError("a split that is not cached")
        made = [
            frontier.Batch(
                source,
                source.numbers[[i for i, _ in batch]].tolist(),
                [v or 0 for _, v in batch] if source.views > 1 else [0] * len(batch),
                first=place == 0,
                draw=draw + place,
                device=self.device,
            )
            for place, batch in enumerate(keys)
        ]
        if made:
            made[0].order = [batch.rows for batch in made]
        labels = torch.tensor(split.labels, dtype=torch.long)
        for batch in made:
            example = self.frontier.arguments(batch)
            indices = tuple(source.places[batch.indices].tolist())
            inputs = example.args or dict(example.kwargs)
            yield Batch(inputs, labels[list(indices)], indices)

    def costs(self) -> dict[str, Any]:
        """What the cache did in this session: batches served, seconds, bytes, notes."""
        return asdict(self.frontier.report)

    def _source(self, split: Split) -> SplitSource | None:
        if split is self.task.train:
            return self.sources.get("train")
        return self.sources.get("val") if split is self.task.val else None


def build_cache(task: Task, model: nn.Module, device: torch.device) -> RunCache | None:
    """The cache that the settings ask for; None where it is off.

    Raises:
        ConfigError: settings of it that cannot be read.
        FrontierError: a model that cannot be cached at all.
    """
    config = task.config
    if config.cache == "off":
        return None
    sources = {"val": SplitSource(task, task.val, "val", views=1, augmented=False)}
    if config.views is None:
        _log.info("not cached in training: a new view of each sample in each epoch; set views")
    else:
        augmented = config.augment not in (None, "none") and config.views > 1
        sources["train"] = SplitSource(
            task, task.train, "train", views=config.views if augmented else 1, augmented=augmented
        )
    text = config.feature_augment
    cache = FrontierCache(
        model,
        Library(config.cache_dir, budget_bytes=int(config.cache_limit_gib * 2**30)),
        encoding=config.cache_dtype,
        min_gain=_AUTO_GAIN if config.cache == "auto" else 0.0,
        seed=config.seed,
        strict=True,
        augment=None if text is None else read_feature_augment(text),
    )
    return RunCache(cache, sources, task, device)


def _preparation(task: Task, *, augmented: bool) -> Any:
    """What is done to a sample before the model, as plain JSON; None if that cannot be told."""
    preparation = task.preparation
    if isinstance(preparation, ImagePreparation):
        what: Any = (preparation.transform, preparation.keyword)
    elif isinstance(preparation, TextPreparation):
        backend = getattr(preparation.tokenizer, "backend_tokenizer", None)
        told = None if backend is None else backend.to_str()
        settings = [preparation.tokenizer.padding_side, preparation.max_length, told]
        return {"text": settings, "order": "length"} if told is not None else None
    elif isinstance(preparation, PresetPreparation):
        return {"preset": [preparation.digest, preparation.max_length]}
    else:
        what = preparation.transform
    found = fingerprint(what).digest
    if found is None:
        return None
    config = task.config
    return {
        "transform": found,
        "views": [config.augment, config.seed] if augmented else None,
    }


def _example(batch: Batch) -> Example:
    if isinstance(batch.inputs, tuple):
        return Example(args=batch.inputs)
    return Example(kwargs=batch.inputs)
