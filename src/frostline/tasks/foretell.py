"""What a run on given data will cost at every depth of freezing, before any training.

The parts that belong to a task are measured on it: preparing its samples, its validation, and the
saving of checkpoints. The rest is `frostline.frontier.foretell`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from frostline.backends.torch.backend import as_found
from frostline.backends.torch.checkpoint import save_checkpoint
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.tracing import tensors_in
from frostline.errors import ConfigError, DataError
from frostline.frontier.foretell import (
    FEW,
    EpochCost,
    StepCosts,
    Workload,
    foretell_epochs,
    foretell_steps,
)
from frostline.frontier.trial import Recipe
from frostline.groups import LayerGroups
from frostline.tasks.config import RunConfig
from frostline.tasks.models import as_logits
from frostline.tasks.order import derive_seed, epoch_order
from frostline.tasks.resources import borrowed_process, pick_device
from frostline.tasks.setup import build_optimizer, mixed_precision
from frostline.tasks.task import Batch, Split, Task, load_task

__all__ = ["Forecast", "foretell_task"]

#: Batches that are prepared to learn what a sample takes.
BATCHES = 4

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
        work = Workload(
            samples=len(task.train),
            val_samples=len(task.val),
            load_s=load_s,
            val_load_s=val_load_s,
            workers=config.workers,
            cores=os.cpu_count() or 1,
            views=views,
            epochs=config.epochs,
            save_s=_saving_s_per_byte(task) if config.checkpoint_every else 0.0,
        )
    spent = time.perf_counter() - started
    return Forecast(task.config, steps.groups, steps, work, foretell_epochs(steps, work), spent)


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


def _typical_batch(task: Task, split: Split, *, augmented: bool) -> tuple[Batch, float]:
    """Of a few batches the one whose size is nearest the mean, and seconds to prepare a sample.

    Raises:
        DataError: too few samples to find a frozen region with.
    """
    size = min(task.config.batch_size, len(split))
    if augmented and size < FEW - 1:
        raise DataError(
            "foretell what training costs",
            found=f"batches of {size}",
            fix=f"at least {FEW - 1} training samples, and a batch_size of at least {FEW - 1}",
        )
    order = epoch_order(task.config.seed, 0, len(split))
    view = derive_seed(task.config.seed, "view", 0) if augmented else None
    task.collate([split[order[0], view]])  # opens what is opened once
    batches: list[Batch] = []
    started = time.perf_counter()
    for first in range(0, min(len(split) - size + 1, BATCHES * size), size):
        indices = order[first : first + size]
        batches.append(task.collate([split[i, view] for i in indices]))
    spent = time.perf_counter() - started
    sizes = [_elements(batch) for batch in batches]
    mean = sum(sizes) / len(sizes)
    typical = min(range(len(sizes)), key=lambda i: abs(sizes[i] - mean))
    return batches[typical], spent / (len(batches) * size)


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
