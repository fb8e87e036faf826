"""What training will cost at every depth of freezing, with and without the cache, foretold.

Depth counts frozen layer groups from the input: 0, 1, ... all but the head. At a few depths, the
anchors, real training steps are run (`frostline.frontier.trial`) and timed, the frozen region is
found, filled, stored and replayed, and the growth of the peak of memory is read. Between two
anchors a figure follows the sum of the measured costs of the groups: it moves from the one anchor
to the other by the share of the way that the sum has gone. The bytes of a stored sample are asked
of the region itself at every depth.

From these parts `foretell_epochs` is arithmetic, without any measurement: epochs from steps, the
first epoch with the filling of the cache in it, and after how many epochs the cache has paid.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.measure import measure_costs
from frostline.backends.torch.tracing import tensors_in
from frostline.cost import predicted_step_s
from frostline.errors import FrontierError
from frostline.frontier.region import Region, find_region
from frostline.frontier.store import BLOCK_ROWS, Column, Store
from frostline.frontier.trial import BRIEFLY_S, LEAST_S, Recipe, Rehearsal, rehearsal
from frostline.groups import GroupCost, LayerGroups
from frostline.plan import FreezePlan

__all__ = [
    "LEAST_GAIN",
    "DepthCost",
    "EpochCost",
    "StepCosts",
    "Workload",
    "anchors_among",
    "foretell_epochs",
    "foretell_steps",
]

#: Share of a run's time that a cache must save to be worth its disk and its risk.
LEAST_GAIN = 0.05
ANCHORS = 6
#: Steps after which memory is what it will be: the optimizer's state comes with the first.
_TO_GROW = 4
#: How often the region of evaluation is counted: once for itself, and once because comparing the
#: first batches with the full forward pass takes as many passes of few samples.
_AGAIN = 2
#: Depths at which memory is read by itself; between them it follows the sizes of tensors.
_GROWN = 4
#: Samples that are enough to find a region.
FEW = 4
#: Share of the time that this process has the processor on a quiet machine, at least.
_UNDISTURBED = 0.8

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DepthCost:
    """What one step costs with this many groups frozen.

    Attributes:
        depth: frozen groups, counted from the input.
        frozen: their names.
        step_s: seconds of one training step without the cache.
        cached_step_s: seconds of one step on stored samples, without reading them; None where
            nothing can be skipped.
        fill_s: seconds to compute what is stored for the samples of one batch.
        eval_s: seconds to validate one batch.
        cached_eval_s: seconds to validate one batch of stored samples.
        read_s: seconds to read the stored rows of one batch, in any order, checksums compared.
        write_s: seconds to write them.
        row_bytes: bytes stored per sample, without the few that the store adds; None where nothing
            can be skipped, and where the region was not looked for.
        saved_bytes: bytes of a checkpoint, and of the weights once more for the best epoch.
        peak_memory_bytes: weights, and the most memory in use above them during steps without
            the cache; None where it cannot be known.
        tried: whether steps were run at this depth; figures of others lie between two that were.
        refused: why nothing can be skipped, in words; empty where something can.
        find_s: seconds that a run takes to find what can be skipped, for training and for
            validation, and to compare its first batches with the full forward pass.
    """

    depth: int
    frozen: tuple[str, ...]
    step_s: float
    cached_step_s: float | None
    fill_s: float | None
    eval_s: float
    cached_eval_s: float | None
    read_s: float
    write_s: float
    row_bytes: int | None
    saved_bytes: int
    peak_memory_bytes: int | None
    tried: bool
    refused: str = ""
    find_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What steps cost at every depth, for one model and one batch.

    Attributes:
        batch_size: samples in the batch.
        depths: one entry per depth, from 0.
        spent_s: seconds the prediction itself took.
        processor_s: processor seconds of this process in that time.
        groups: the layer groups, with their measured costs.
        in_use_bytes: memory in use before the trial steps, weights included, from which peaks are
            counted; None where it cannot be known.
    """

    batch_size: int
    depths: tuple[DepthCost, ...]
    spent_s: float = 0.0
    processor_s: float = 0.0
    groups: LayerGroups = field(default_factory=lambda: LayerGroups(()))
    in_use_bytes: int | None = None

    @property
    def disturbed(self) -> bool:
        """Whether others had the processor for a part of the time, so that times are too long."""
        return self.processor_s < _UNDISTURBED * self.spent_s


@dataclass(frozen=True, slots=True)
class Workload:
    """What an epoch consists of, besides steps.

    Attributes:
        samples: training samples, >= 1.
        val_samples: samples of each validation.
        load_s: seconds to prepare one training sample.
        val_load_s: seconds to prepare one validation sample.
        workers: processes that prepare samples; 0: the training process itself.
        cores: processors that they share with training.
        views: stored views per sample, >= 1.
        epochs: length of the run, >= 1: for the gain and the advice.
        save_s: seconds to save one byte of a checkpoint at the end of each epoch.
    """

    samples: int
    val_samples: int = 0
    load_s: float = 0.0
    val_load_s: float = 0.0
    workers: int = 0
    cores: int = 1
    views: int = 1
    epochs: int = 10
    save_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EpochCost:
    """What epochs cost at one depth. None where nothing can be cached.

    Attributes:
        step: the costs of a step.
        epoch_s: seconds of an epoch without the cache: preparing samples, steps, validation.
        first_epoch_s: seconds of the first epoch with the cache, which finds what can be skipped,
            fills it, and compares a few samples with the full forward pass.
        cached_epoch_s: seconds of an epoch once all samples are stored.
        break_even_epochs: the number of epochs from which on a run with the cache is the shorter
            one; None where it never is.
        disk_bytes: bytes of the store: rows of all samples in all views; None where that
            is not known.
        gain: share of the run's time that the cache saves, negative where it loses.
        advice: "cache", or why not.
    """

    step: DepthCost
    epoch_s: float
    first_epoch_s: float | None
    cached_epoch_s: float | None
    break_even_epochs: int | None
    disk_bytes: int | None
    gain: float | None
    advice: str

    @property
    def worth_caching(self) -> bool:
        """Whether the cache is expected to pay within the run."""
        return self.advice == "cache"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: the fields of both, on one level."""
        own = {k: v for k, v in asdict(self).items() if k != "step"}
        return {**asdict(self.step), **own, "worth_caching": self.worth_caching}


# -- from steps to epochs --------------------------------------------------------------------


def foretell_epochs(steps: StepCosts, work: Workload) -> tuple[EpochCost, ...]:
    """Epochs at every depth, with and without the cache.

    Validation samples are stored like training samples, in one view.

    Example:
        >>> cost = DepthCost(
        ...     depth=1, frozen=("a",), step_s=1.0, cached_step_s=0.2, fill_s=0.4, eval_s=0.5,
        ...     cached_eval_s=0.1, read_s=0.05, write_s=0.1, row_bytes=100, saved_bytes=0,
        ...     peak_memory_bytes=None, tried=True, find_s=0.5,
        ... )
        >>> [epoch] = foretell_epochs(StepCosts(10, (cost,)), Workload(samples=40, epochs=4))
        >>> epoch.epoch_s, epoch.first_epoch_s, epoch.cached_epoch_s, epoch.break_even_epochs
        (4.0, 3.5, 1.0, 1)
        >>> round(epoch.gain, 3), epoch.advice
        (0.594, 'cache')
    """
    return tuple(_epochs_at(cost, steps.batch_size, work) for cost in steps.depths)


def _epochs_at(cost: DepthCost, batch_size: int, work: Workload) -> EpochCost:
    steps, validations = work.samples / batch_size, work.val_samples / batch_size
    load = _with_workers(work, work.samples * work.load_s, steps * cost.step_s)
    val_load = _with_workers(work, work.val_samples * work.val_load_s, validations * cost.eval_s)
    saving = cost.saved_bytes * work.save_s
    epoch = load + val_load + saving
    if cost.cached_step_s is None or cost.fill_s is None or cost.cached_eval_s is None:
        return EpochCost(cost, epoch, None, None, None, None, None, f"no: {cost.refused}")
    cached = (
        steps * (cost.cached_step_s + cost.read_s)
        + validations * (cost.cached_eval_s + cost.read_s)
        + saving
    )
    each = cost.fill_s + cost.write_s
    fill = _with_workers(work, work.samples * work.load_s, steps * each)
    val_fill = _with_workers(work, work.val_samples * work.val_load_s, validations * each)
    once = val_fill + cost.find_s
    gain = 1 - _run_s(cached, fill, once, work.views, work.epochs) / (work.epochs * epoch)
    even = _break_even(epoch, cached, fill, once, work.views)
    return EpochCost(
        step=cost,
        epoch_s=epoch,
        first_epoch_s=cached + fill + once,
        cached_epoch_s=cached,
        break_even_epochs=even,
        disk_bytes=None
        if cost.row_bytes is None
        else cost.row_bytes * (work.samples * work.views + work.val_samples),
        gain=gain,
        advice=_advice(gain, even, work.epochs),
    )


def _with_workers(work: Workload, preparing_s: float, computing_s: float) -> float:
    """Seconds of preparing and computing: one after the other, or beside each other."""
    if not work.workers:
        return preparing_s + computing_s
    beside = max(preparing_s / work.workers, computing_s)
    return max(beside, (preparing_s + computing_s) / max(1, min(work.cores, work.workers + 1)))


def _run_s(cached: float, fill: float, once: float, views: int, epochs: int) -> float:
    return epochs * cached + min(views, epochs) * fill + once


def _break_even(epoch: float, cached: float, fill: float, once: float, views: int) -> int | None:
    """The least number of epochs, from which on the cached run stays the shorter one."""
    saved = epoch - cached
    if saved <= 0:
        return None
    if (saved - fill) > 0:  # pays while it is still filled
        early = max(1, math.ceil(once / (saved - fill)))
        if early <= views:
            return early
    return max(1, math.ceil((views * fill + once) / saved))


def _advice(gain: float, even: int | None, epochs: int) -> str:
    if gain >= LEAST_GAIN:
        return "cache"
    if even is not None and even > epochs:
        return f"no: it pays after {even} epochs, and the run has {epochs}"
    if gain > 0:
        return f"no: it would save {100 * gain:.1f} %, less than {100 * LEAST_GAIN:.0f} %"
    return "no: it would save nothing"


# -- steps -----------------------------------------------------------------------------------


def foretell_steps(
    model: nn.Module,
    groups: LayerGroups,
    example: Example | Tensor | Mapping[str, Any],
    recipe: Recipe | None = None,
    *,
    anchors: int = ANCHORS,
    times: int = 3,
    regions: Literal["all", "tried", "none"] = "all",
    most_bytes: float | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> StepCosts:
    """What a step costs at every depth, from trial steps at some of them.

    The model is afterwards what it was, to the bit. Takes about 10 steps per anchor, and 8 more
    where the groups come without measured costs; for that time there is a second copy of the
    weights, and once the gradients and the optimizer state of full fine-tuning.

    Args:
        model: the model, on its device.
        groups: its layer groups; their costs are measured if they were not yet.
        example: a batch of the size and shape that training will have.
        recipe: loss, optimizer and what else is in a step; AdamW by default.
        anchors: depths at which steps are run, >= 2.
        times: runs of each timed piece of work, of which the least counts; 1: no more than tells.
        regions: depths whose frozen region is found: at others what is stored of a sample is not
            known, nor whether something can be. "none": nothing is foretold of the cache.
        most_bytes: no steps are run at depths whose weights, gradients, optimizer state and
            activations are together larger; None: at any.
        folder: where a store will be, for a trial of its disk; the folder for temporary files by
            default.
        progress: receives a line when a part of the work begins.

    Raises:
        FrontierError: the batch has no samples dimension, or the output no gradient.
        ModelError: the model cannot run on the batch.

    Example:
        >>> from frostline.backends.torch.grouping import layer_groups
        >>> parts = (nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> model, batch = nn.Sequential(*parts), torch.randn(8, 4)
        >>> costs = foretell_steps(model, layer_groups(model, batch), batch)
        >>> [(c.depth, c.row_bytes) for c in costs.depths]
        [(0, None), (1, 256), (2, 256)]
    """
    started, processor = time.perf_counter(), time.process_time()
    say = progress or (lambda _: None)
    batch = Example.of(example)
    size = samples_in(batch)
    least_s = LEAST_S if times > 1 else BRIEFLY_S
    with rehearsal(model, groups, batch, recipe or Recipe(), least_s=least_s) as stage:
        found = _Found(stage, _few_samples(batch, size), times, folder)
        deepest = _deepest(groups)
        found.settle(deepest)
        if not groups.measured and most_bytes is None:
            # Before the costs: the heap that their full steps leave has room for every tensor at a
            # place of its own, and much more of it comes into use than in a run.
            say(f"memory with 0 to {deepest} of {len(groups)} groups frozen")
            count = min(anchors, _GROWN, deepest + 1)
            found.grow(np.linspace(0, deepest, count).round().astype(int).tolist())
        say(f"steps with {deepest} of {len(groups)} groups frozen")
        found.plain(deepest)
        if not groups.measured:
            say(f"costs of {len(groups)} layer groups, on a batch of {size}")
            groups = measure_costs(model, groups, batch, repeats=2)
        shape = _Shape.of(groups)
        tried = anchors_among(shape, anchors, first=found.first(shape, most_bytes))
        for depth in reversed(tried[:-1]):
            say(f"steps with {depth} of {len(groups)} groups frozen")
            try:
                found.plain(depth)
            except torch.OutOfMemoryError:  # what fits says what does not
                say("they do not fit into the memory of the device")
                tried = tuple(d for d in tried if d > depth)
                break
        for depth in shape.depths if regions == "all" else tried if regions == "tried" else ():
            if depth in tried:
                say(f"cached steps with {depth} of {len(groups)} groups frozen")
            found.cached(depth, run=depth in tried)
        if regions == "none":
            found.refused = dict.fromkeys(shape.depths, "it was not asked for")
        elif regions == "tried" and (why := found.refused.get(deepest)) is not None:
            found.refused = dict.fromkeys(shape.depths, why)
    depths = tuple(_cost_at(d, groups, shape, found, tried) for d in shape.depths)
    spent = time.perf_counter() - started
    processor_s = time.process_time() - processor
    return StepCosts(size, depths, spent, processor_s, groups, found.in_use_bytes)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sums of group costs by depth: how figures move between anchors, not where they are."""

    step: tuple[float, ...]
    cached: tuple[float, ...]
    fill: tuple[float, ...]
    memory: tuple[float, ...]

    @classmethod
    def of(cls, groups: LayerGroups) -> _Shape:
        last = _deepest(groups)
        plans = [FreezePlan(frozen=frozenset(groups.names[:d])) for d in range(last + 1)]
        costs = [g.cost or GroupCost() for g in groups]
        frozen = [_frozen_forward_s(c) for c in costs]
        return cls(
            step=tuple(predicted_step_s(groups, p) for p in plans),
            cached=tuple(predicted_step_s(groups, p, frozen_prefix_cached=True) for p in plans),
            fill=tuple(sum(frozen[:d]) for d in range(last + 1)),
            memory=tuple(
                float(
                    sum(c.activation_bytes for c in costs[d:])
                    + 3 * sum(p.size_bytes for g in groups[d:] for p in g.parameters)
                )
                for d in range(last + 1)
            ),
        )

    @property
    def depths(self) -> range:
        return range(len(self.step))


def _deepest(groups: LayerGroups) -> int:
    """How many groups are frozen where only the head trains."""
    return min((g.depth for g in groups if g.name in groups.head), default=len(groups) - 1)


def anchors_among(shape: _Shape, count: int, *, first: int = 0) -> tuple[int, ...]:
    """The depths at which steps are run: both ends, then where figures change most in between.

    Args:
        shape: sums of group costs by depth.
        count: how many, >= 2.
        first: the shallowest one.
    """
    last = len(shape.step) - 1
    chosen = sorted({first, last})

    def change(pair: tuple[int, int]) -> float:
        one, other = pair
        return sum(
            abs(math.log(max(values[one], 1e-9) / max(values[other], 1e-9)))
            for values in (shape.step, shape.cached)
        )

    while len(chosen) < min(count, last - first + 1):
        gaps = [(a, b) for a, b in itertools.pairwise(chosen) if b - a > 1]
        one, other = max(gaps, key=change)
        middles = range(one + 1, other)
        middle = min(middles, key=lambda m: abs(change((one, m)) - change((m, other))))
        chosen = sorted({*chosen, middle})
    return tuple(chosen)


class _Found:
    """Figures by depth, as they were measured."""

    def __init__(self, stage: Rehearsal, few: Example, times: int, folder: Path | None) -> None:
        self._stage = stage
        self._few = few
        self._times = times
        self._folder = folder
        self.step: dict[int, float] = {}
        self.evaluation: dict[int, float] = {}
        self.memory: dict[int, float] = {}
        self.cached_step: dict[int, float] = {}
        self.find: dict[int, float] = {}
        self.fill: dict[int, float] = {}
        self.read: dict[int, float] = {}
        self.write: dict[int, float] = {}
        self.row_bytes: dict[int, int] = {}
        self.refused: dict[int, str] = {}
        self._state_share = 0.0
        self._grown = False
        self._weights = sum(t.nbytes for t in (*stage.model.parameters(), *stage.model.buffers()))

    def settle(self, depth: int) -> None:
        """Load libraries, take the memory in use as the zero, and run what loads kernels."""
        self._stage.load_libraries()
        self._stage.memory.start()
        self._stage.freeze(depth)
        self._stage.step()
        self._stage.evaluate()
        self._state_share = self._stage.state_share()

    def grow(self, depths: Sequence[int]) -> None:
        """How far memory grows at some depths, by as many steps as it takes to grow.

        From depth to depth it grows: what was freed before cannot hide what comes.
        """
        stage, self._grown = self._stage, True
        for depth in sorted(depths, reverse=True):
            self._freeze(depth)
            try:
                for _ in range(_TO_GROW):
                    stage.step()
            except torch.OutOfMemoryError:  # what fits will be found by the steps that are timed
                return
            self._note_memory(depth)

    def _freeze(self, depth: int) -> None:
        """Freeze this many groups, and let the peak of memory start afresh."""
        self._stage.freeze(depth)
        with contextlib.suppress(OSError):
            self._stage.memory.forget()

    def _note_memory(self, depth: int) -> None:
        if (grown := self._stage.memory.read()) is not None:
            self.memory[depth] = self._weights + grown

    @property
    def in_use_bytes(self) -> int | None:
        """What was in use when memory began to be read, without the copy of the weights."""
        zero = self._stage.memory.zero_bytes
        return None if zero is None else zero - self._weights

    def first(self, shape: _Shape, most_bytes: float | None) -> int:
        """The shallowest depth that fits into so many bytes, as far as costs can say."""
        fits = (d for d in shape.depths if self._weights + shape.memory[d] <= (most_bytes or 0))
        return 0 if most_bytes is None else next(fits, shape.depths[-1])

    def saved_bytes(self, groups: LayerGroups, depth: int) -> float:
        """Bytes of a checkpoint and of the best weights."""
        trained = sum(p.size_bytes for g in groups[depth:] for p in g.parameters)
        return 2 * self._weights + self._state_share * trained

    def plain(self, depth: int) -> None:
        """Steps without the cache."""
        stage = self._stage
        self._freeze(depth)
        self.step[depth] = stage.seconds(stage.step, times=self._times)
        if not self._grown:
            self._note_memory(depth)
        if self._times > 1 or not self.evaluation:  # all that is asked of it is the least
            self.evaluation[depth] = stage.seconds(stage.evaluate, times=self._times - 1)

    def cached(self, depth: int, *, run: bool) -> None:
        """The region at this depth, and steps on stored rows where asked for."""
        if not depth:  # the end from which cached figures start
            self.refused[0] = "nothing is frozen"
            if 0 in self.step:
                self.cached_step[0] = self.step[0]
            self.find[0] = self.fill[0] = self.read[0] = self.write[0] = 0.0
            return
        stage = self._stage
        stage.freeze(depth)
        try:
            started = time.perf_counter()
            region = find_region(stage.model, self._few)
            spent = time.perf_counter() - started
            if _skips_nothing(region):
                self.refused[depth] = _why_empty(region)
                return
            self.row_bytes[depth] = region.bytes
            if run:
                self._replay(depth, region)
                self.find[depth] = spent + _AGAIN * self._again_s(region)
        except FrontierError as error:
            self.refused[depth] = f"{error.asked}: {error.found}"

    def _again_s(self, region: Region) -> float:
        """Seconds to find the region as evaluation has it, on a few samples."""
        self._stage.model.eval()
        started = time.perf_counter()
        try:
            region.again(self._few)
        except FrontierError:  # another one, or none: a run looks for it all the same
            with contextlib.suppress(FrontierError):
                find_region(self._stage.model, self._few)
        self._stage.model.train()
        return time.perf_counter() - started

    def _replay(self, depth: int, region: Region) -> None:
        stage = self._stage
        fill = partial(region.fill, stage.example)
        self.fill[depth] = stage.seconds(fill, times=self._times - 1)
        rows = fill()
        replay = partial(region.run, stage.example, rows)
        self.cached_step[depth] = stage.seconds(lambda: stage.step(replay), times=self._times)
        if self._times > 1:  # close in time: on a busy machine the two must be comparable
            self.step[depth] = min(self.step[depth], stage.seconds(stage.step, times=1))
        self.write[depth], self.read[depth] = store_seconds(rows, self._folder, times=self._times)


def _skips_nothing(region: Region) -> bool:
    """Whether nothing is left out; storing the batch itself leaves out nothing either."""
    stored = {slot.name for slot in region.slots}
    return region.empty or bool(stored and stored <= region.input_slots)


def _why_empty(region: Region) -> str:
    ends = [f"{ending.module}: {ending.why}" for ending in region.ends[:1]]
    return f"nothing can be skipped{''.join(f' ({end})' for end in ends)}"


def _cost_at(
    depth: int, groups: LayerGroups, shape: _Shape, found: _Found, tried: Sequence[int]
) -> DepthCost:
    refused = depth in found.refused
    cached = None if refused else _between(found.cached_step, shape.cached, depth)
    fill = None if refused else _between(found.fill, shape.fill, depth)
    known = len(found.row_bytes) + len(found.refused) == len(shape.depths)
    sizes = [float(found.row_bytes.get(d, 0)) for d in shape.depths] if known else shape.fill
    memory = _between(found.memory, shape.memory, depth)
    evaluation = min(found.evaluation.values())
    whole = sum(_frozen_forward_s(g.cost or GroupCost()) for g in groups)
    share = shape.fill[depth] / whole if whole else 0.0
    return DepthCost(
        depth=depth,
        frozen=groups.names[:depth],
        step_s=_between(found.step, shape.step, depth) or 0.0,
        cached_step_s=cached,
        fill_s=fill,
        eval_s=evaluation,
        cached_eval_s=None if cached is None else min(cached, evaluation * (1 - share)),
        read_s=0.0 if refused else _between(found.read, sizes, depth) or 0.0,
        write_s=0.0 if refused else _between(found.write, sizes, depth) or 0.0,
        saved_bytes=round(found.saved_bytes(groups, depth)),
        row_bytes=None if refused else found.row_bytes.get(depth),
        peak_memory_bytes=None if memory is None else round(memory),
        tried=depth in tried,
        refused=found.refused.get(depth, ""),
        find_s=0.0 if refused else _between(found.find, shape.fill, depth) or 0.0,
    )


def _frozen_forward_s(cost: GroupCost) -> float:
    return cost.forward_s if cost.frozen_forward_s is None else cost.frozen_forward_s


def _between(known: Mapping[int, float], shape: Sequence[float], depth: int) -> float | None:
    """A figure at a depth from those at its two nearest anchors.

    Example:
        >>> _between({0: 10.0, 2: 20.0}, [1.0, 4.0, 5.0], 1)
        17.5
    """
    if depth in known:
        return known[depth]
    below = max((d for d in known if d < depth), default=None)
    above = min((d for d in known if d > depth), default=None)
    if below is None or above is None:
        # Beyond the last anchor at which it could be measured: in proportion to the nearest one.
        near = below if below is not None else above
        if near is None:
            return None
        return known[near] * (shape[depth] / shape[near] if shape[near] else 1.0)
    way = shape[above] - shape[below]
    gone = (shape[depth] - shape[below]) / way if way else 0.5
    return known[below] + min(1.0, max(0.0, gone)) * (known[above] - known[below])


def store_seconds(
    rows: Mapping[str, Tensor], folder: Path | None = None, *, times: int = 3
) -> tuple[float, float]:
    """Seconds to write rows into a store, and to read as many back in another order.

    Args:
        rows: (N, ...) by slot name.
        folder: where a store is made, and removed.
        times: reads, of which the fastest counts.

    Example:
        >>> write_s, read_s = store_seconds({"layer1": torch.zeros(8, 3)})
        >>> write_s > 0 and read_s > 0
        True
    """
    arrays = {name: _plain(value) for name, value in rows.items()}
    count = len(next(iter(arrays.values())))
    columns = [Column(name, str(array.dtype)) for name, array in arrays.items()]
    order = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="frostline-", dir=folder) as place:
        store = Store(Path(place), columns, rows=BLOCK_ROWS * -(-count // BLOCK_ROWS), seed=b"")
        started = time.perf_counter()
        for first in range(0, count, BLOCK_ROWS):
            store.write(first, {n: a[first : first + BLOCK_ROWS] for n, a in arrays.items()})
        wrote = time.perf_counter() - started
        took = []
        for _ in range(times):
            wanted = order.permutation(count)
            started = time.perf_counter()
            store.read(wanted)
            took.append(time.perf_counter() - started)
        store.close()
    return wrote, min(took)


def _plain(value: Tensor) -> NDArray[Any]:
    """The bytes of a tensor as an array; NumPy has no bfloat16 of its own."""
    host = value.detach().cpu()
    return (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()


def samples_in(example: Example) -> int:
    """Samples in a batch: the first size of its first tensor.

    Raises:
        FrontierError: no tensor with dimensions.
    """
    sizes = [len(t) for t in tensors_in((example.args, dict(example.kwargs))) if t.ndim]
    if not sizes:
        raise FrontierError(
            "foretell what training costs",
            found="an example without a tensor that has samples",
            fix="a batch as the model is called in training: Example(args=(batch,))",
        )
    return sizes[0]


def _few_samples(example: Example, size: int) -> Example:
    """The first samples of a batch, enough to find a region."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:FEW] if value.ndim and len(value) == size else value
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        return [cut(v) for v in value] if isinstance(value, list) else value

    if size <= FEW:
        return example
    args, kwargs = tuple(cut(v) for v in example.args), cut(dict(example.kwargs))
    return replace(example, args=args, kwargs=kwargs)
