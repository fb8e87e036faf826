"""What a run on given data will cost at every depth of freezing, before any training.

The parts that belong to a task are measured on it: preparing its samples, its validation, and the
saving of checkpoints. The rest is `frostline.frontier.foretell`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from frostline.backends.torch.backend import as_found
from frostline.backends.torch.checkpoint import save_checkpoint
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.tracing import tensors_in
from frostline.cost import predicted_step_s
from frostline.errors import ConfigError, DataError
from frostline.frontier.foretell import (
    FEW,
    EpochCost,
    StepCosts,
    Workload,
    foretell_epochs,
    foretell_steps,
)
from frostline.frontier.trial import Recipe, memory_in_use
from frostline.groups import GroupCost, LayerGroups
from frostline.plan import FreezePlan
from frostline.tasks.config import RunConfig
from frostline.tasks.models import as_logits
from frostline.tasks.order import derive_seed, epoch_order
from frostline.tasks.resources import borrowed_process, pick_device
from frostline.tasks.setup import build_optimizer, mixed_precision
from frostline.tasks.task import Batch, Split, Task, load_task

__all__ = ["Forecast", "Outlook", "foretell_limits", "foretell_task", "workload_of"]

#: Batches that are prepared to learn what a sample takes.
BATCHES = 4
#: Steps of full fine-tuning that foretelling limits takes as long as.
_STEPS = 5

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will cost, by depth.

    Attributes:
        config: the settings, resolved for the task.
        groups: the layer groups with measured costs.
        steps: costs of steps.
        work: what an epoch consists of.
        epochs: costs of epochs, one entry per depth.
        spent_s: seconds the prediction took, with the loading of the data.
    """

    config: RunConfig
    groups: LayerGroups
    steps: StepCosts
    work: Workload
    epochs: tuple[EpochCost, ...]
    spent_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "batch_size": self.steps.batch_size,
            "disturbed": self.steps.disturbed,
            "work": asdict(self.work),
            "depths": [epoch.to_json() for epoch in self.epochs],
            "spent_s": self.spent_s,
        }


def foretell_task(
    config: RunConfig, *, views: int = 1, progress: Progress | None = None
) -> Forecast:
    """What a run with these settings will cost at every depth of freezing.

    Runs a few dozen training steps on a few batches, and puts the model back as it was; nothing is
    kept on disk. The policy of the settings is not read: every depth is foretold.

    Args:
        config: the settings, as `fit` takes them.
        views: stored views per sample, >= 1; more than one is of use where samples are augmented.
        progress: receives a line when a part of the work begins.

    Raises:
        ConfigError: no views, or several of samples that are not augmented.
        DataError: the data cannot be read, or has too few samples.
        FrostlineError: anything else that stops a run with these settings.
    """
    say = progress or (lambda _: None)
    started = time.perf_counter()
    device = pick_device(config.device)
    with borrowed_process(config.threads):
        say("data and model")
        task = load_task(config)
        _check_views(views, task.config)
        model = task.model.to(device)
        batch, load_s = _typical_batch(task, task.train, augmented=True)
        _, val_load_s = _typical_batch(task, task.val, augmented=False)
        inputs = batch.to(device)
        example = _example(inputs)
        groups = layer_groups(model, example, head=task.head)
        steps = foretell_steps(
            model, groups, example, _recipe(task, inputs, device), progress=progress
        )
        work = workload_of(task, load_s, val_load_s, views=views, saves=True)
    spent = time.perf_counter() - started
    return Forecast(task.config, steps.groups, steps, work, foretell_epochs(steps, work), spent)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run has to expect at every depth, for policies that keep it within limits.

    Attributes:
        signals: for `Driver.measured`: values by the first group that trains.
        spent_s: seconds it took to find out.
        peak_bytes: most memory that was in use meanwhile; None where it cannot be known.
    """

    signals: Mapping[str, Mapping[str, float]]
    spent_s: float
    peak_bytes: int | None


def foretell_limits(
    task: Task,
    model: nn.Module,
    groups: LayerGroups,
    device: torch.device,
    *,
    measured_samples: int,
    times: bool,
    most_bytes: float | None = None,
    most_s: float | None = None,
) -> Outlook:
    """What epochs take and how far memory grows, from as few trial steps as tell it.

    Steps are run at two depths: where the head alone trains, and where everything does, or as much
    as `most_bytes` allows. What lies between follows the measured costs of the groups. Takes some
    five steps of full fine-tuning; the model is afterwards what it was.

    Args:
        task: what is trained.
        model: on `device`.
        groups: its layer groups with measured costs.
        device: where the model is.
        measured_samples: how many samples their costs were measured on.
        times: whether epochs are foretold, besides memory.
        most_bytes: most memory in use; None: no bound.
        most_s: most seconds that it should take: steps are run on fewer samples where a whole batch
            would take longer, unless memory is to be foretold. None: no bound.

    Raises:
        DataError: too few samples.
        FrontierError: the output carries no gradient.
    """
    started, config = time.perf_counter(), task.config
    size = config.batch_size
    if most_s is not None and most_bytes is None:
        each = predicted_step_s(groups, FreezePlan()) / measured_samples
        size = min(size, max(FEW, int(most_s / (_STEPS * each)) if each else size))
    batch, load_s = _typical_batch(task, task.train, augmented=True, batches=2, size=size)
    _, val_load_s = _typical_batch(task, task.val, augmented=False, batches=1, size=size)
    inputs = batch.to(device)
    before = memory_in_use(device)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    steps = foretell_steps(
        model,
        _of_samples(groups, len(batch.targets) / measured_samples),
        _example(inputs),
        _recipe(task, inputs, device),
        anchors=2,
        times=1,
        regions="tried" if times and config.cache != "off" else "none",
        most_bytes=None if most_bytes is None else most_bytes - (before or 0) + weights,
    )
    zero = steps.in_use_bytes
    work = workload_of(task, load_s, val_load_s, views=config.views or 1, saves=times)
    signals: dict[str, dict[str, float]] = {}
    for epoch in foretell_epochs(steps, work):
        first = later = epoch.epoch_s
        cached = (epoch.first_epoch_s, epoch.cached_epoch_s)
        if None not in cached and (epoch.worth_caching or config.cache == "on"):
            first, later = (seconds or 0.0 for seconds in cached)
        values = {"first_epoch_from_s": first, "epoch_from_s": later} if times else {}
        if zero is not None and epoch.step.peak_memory_bytes is not None:
            values["peak_from_bytes"] = zero + epoch.step.peak_memory_bytes - weights
        for name, value in values.items():
            signals.setdefault(name, {})[groups.names[epoch.step.depth]] = value
    peaks = [
        d.peak_memory_bytes for d in steps.depths if d.tried and d.peak_memory_bytes is not None
    ]
    # The copy of the weights that is held meanwhile has the size of the weights.
    peak = (zero or 0) + max(peaks) if peaks else None
    return Outlook(signals, time.perf_counter() - started, peak)


def workload_of(
    task: Task, load_s: float, val_load_s: float, *, views: int = 1, saves: bool = False
) -> Workload:
    """What an epoch of a task consists of, besides steps; saving is measured where it is wanted."""
    config = task.config
    return Workload(
        samples=len(task.train),
        val_samples=len(task.val),
        load_s=load_s,
        val_load_s=val_load_s,
        workers=config.workers,
        cores=os.cpu_count() or 1,
        views=views,
        epochs=config.epochs,
        save_s=_saving_s_per_byte(task) if saves and config.checkpoint_every else 0.0,
    )


def _of_samples(groups: LayerGroups, ratio: float) -> LayerGroups:
    """The groups with costs as of so many times the samples they were measured on."""

    def grown(cost: GroupCost) -> GroupCost:
        frozen = cost.frozen_forward_s
        return replace(
            cost,
            forward_s=ratio * cost.forward_s,
            input_grad_s=ratio * cost.input_grad_s,
            weight_grad_s=ratio * cost.weight_grad_s,
            activation_bytes=round(ratio * cost.activation_bytes),
            frozen_forward_s=None if frozen is None else ratio * frozen,
        )

    return groups.with_costs({g.name: grown(g.cost) for g in groups if g.cost is not None})


def _check_views(views: int, config: RunConfig) -> None:
    if views < 1:
        raise ConfigError(f"store {views} views", found="none", fix="views=1 or more")
    if views > 1 and config.augment == "none":
        raise ConfigError(
            f"store {views} views of each sample",
            found="augment=none, so that all of them are the same",
            fix="views=1, or augment=flip",
        )


def _recipe(task: Task, batch: Batch, device: torch.device) -> Recipe:
    config, weights = task.config, task.class_weights()
    weights = None if weights is None else weights.to(device)
    forward, _ = mixed_precision(config, device)

    def loss(output: Any) -> Tensor:
        logits = as_logits(output, classes=len(task.labels))
        return functional.cross_entropy(logits.float(), batch.targets, weight=weights)

    return Recipe(
        loss=loss,
        optimizer=lambda model, groups: build_optimizer(config, model, groups),
        forward=forward,
        clip_norm=config.clip_norm,
        fixed=as_found(task.model),
    )


def _typical_batch(
    task: Task,
    split: Split,
    *,
    augmented: bool,
    batches: int = BATCHES,
    size: int | None = None,
) -> tuple[Batch, float]:
    """Of a few batches the one whose size is nearest the mean, and seconds to prepare a sample.

    Raises:
        DataError: too few samples to find a frozen region with.
    """
    size = min(size or task.config.batch_size, len(split))
    if augmented and size < FEW - 1:
        raise DataError(
            "foretell what training costs",
            found=f"batches of {size}",
            fix=f"at least {FEW - 1} training samples, and a batch_size of at least {FEW - 1}",
        )
    order = epoch_order(task.config.seed, 0, len(split))
    view = derive_seed(task.config.seed, "view", 0) if augmented else None
    task.collate([split[order[0], view]])  # opens what is opened once
    made: list[Batch] = []
    started = time.perf_counter()
    for first in range(0, min(len(split) - size + 1, batches * size), size):
        indices = order[first : first + size]
        made.append(task.collate([split[i, view] for i in indices]))
    spent = time.perf_counter() - started
    sizes = [_elements(batch) for batch in made]
    mean = sum(sizes) / len(sizes)
    typical = min(range(len(sizes)), key=lambda i: abs(sizes[i] - mean))
    return made[typical], spent / (len(made) * size)


def _elements(batch: Batch) -> int:
    return sum(t.numel() for t in tensors_in(batch.inputs))


def _example(batch: Batch) -> Example:
    inputs = batch.inputs
    return Example(args=inputs) if isinstance(inputs, tuple) else Example(kwargs=inputs)


def _saving_s_per_byte(task: Task) -> float:
    """Seconds to save one byte of a checkpoint, from saving the weights once."""
    tensors: Sequence[Tensor] = [*task.model.parameters(), *task.model.buffers()]
    with tempfile.TemporaryDirectory(
        prefix="frostline-", dir=_nearest_folder(task.config)
    ) as place:
        started = time.perf_counter()
        save_checkpoint(Path(place), model=task.model, step=0, keep=0)
        spent = time.perf_counter() - started
    return spent / max(1, sum(t.nbytes for t in tensors))


def _nearest_folder(config: RunConfig) -> Path | None:
    """A folder on the disk that the run would write to, as far as it exists."""
    wanted = (config.output or Path("runs")).absolute()
    found = next((p for p in (wanted, *wanted.parents) if p.is_dir()), None)
    return found if found is not None and os.access(found, os.W_OK) else None
