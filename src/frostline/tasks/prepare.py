"""What every session of a run builds first: task, layer groups, training parts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from frostline.backends.torch.backend import as_found
from frostline.backends.torch.example import Example
from frostline.backends.torch.flops import count_flops
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.errors import DataError
from frostline.groups import GroupCost, LayerGroups
from frostline.records import read_run
from frostline.savings import Savings
from frostline.tasks.allowance import Allowance, Budget, step_flops
from frostline.tasks.caching import build_cache
from frostline.tasks.config import RunConfig
from frostline.tasks.folder import RunFolder, asked_settings
from frostline.tasks.loop import Parts
from frostline.tasks.order import Batching
from frostline.tasks.setup import build_optimizer, build_policy, build_schedule, mixed_precision
from frostline.tasks.task import Split, Task, load_task

__all__ = ["EXAMPLES", "Prepared", "prepare"]

#: Samples that groups are found and measured with.
EXAMPLES = 2


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a session trains with, the same in every session of a run.

    Attributes:
        task: data and model.
        groups: layer groups with measured costs.
        parts: model, optimizer and the rest.
        batching: how an epoch is cut into updates.
        measure_s: seconds this session spent on measuring the groups.
    """

    task: Task
    groups: LayerGroups
    parts: Parts
    batching: Batching
    measure_s: float

    def about(self, asked: RunConfig) -> dict[str, Any]:
        """The header of the record: what the run is, free of the machine."""
        return {
            "asked": asked_settings(asked),
            "config": self.task.config.model_dump(mode="json", exclude={"output", "trackers"}),
            "data": _data_facts(self.task),
            "labels": list(self.task.labels),
            "notes": dict(self.task.notes),
            "groups": {g.name: g.parameter_count for g in self.groups},
            "depths": list(self.groups.names),  # keys of a record are sorted, lists are not
            "head": sorted(self.groups.head),
        }

    def environment(self) -> dict[str, Any]:
        """The rest of the header: what depends on the machine."""
        return {
            "torch": str(torch.__version__),
            "device": str(self.parts.device),
            "threads": torch.get_num_threads(),
            "groups": {g.name: asdict(g.cost) for g in self.groups if g.cost is not None},
            "measure_s": self.measure_s,
        }


def prepare(config: RunConfig, folder: RunFolder, device: torch.device) -> Prepared:
    """Build everything for a session.

    Args:
        config: the settings as asked.
        folder: the run's folder; the costs of its groups are measured by the first session and
            read by the later ones.
        device: where to train.

    Raises:
        DataError: the data cannot be used, or is not what the run started with.
        FrostlineError: anything else that cannot be built.
    """
    task = load_task(config)
    config = task.config
    model = task.model.to(device)
    example = _moved(task.example(EXAMPLES), device)
    groups = layer_groups(model, example, head=task.head)
    start = time.perf_counter()
    recorded = None if folder.asked() is None else _recorded_costs(folder, task)
    groups = groups.with_costs(recorded) if recorded else measure_costs(model, groups, example)
    measure_s = 0.0 if recorded else time.perf_counter() - start
    optimizer = build_optimizer(config, model, groups)
    batching = Batching(len(task.train), config.batch_size, config.accumulate)
    budget = None if config.budget is None else Budget.parse(config.budget)
    allowance = Allowance(budget, config.epochs, batching.steps_per_epoch)
    driver = torch_driver(
        model,
        optimizer,
        build_policy(config),
        total_steps=allowance.steps,
        steps_per_epoch=batching.steps_per_epoch,
        groups=groups,
        optimizer_state=config.optimizer_state,
        fixed=as_found(model),  # what the model's author froze (sinusoidal positions) stays so
    )
    scheduler = build_schedule(config, optimizer, driver.progress, allowance)
    forward, scaler = mixed_precision(config, device)
    cache = build_cache(task, model, device)
    flops = None
    if budget is not None and budget.unit == "flop":
        forward_flops = count_flops(model, groups, example, samples=EXAMPLES)
        flops = partial(step_flops, groups, forward_flops)
    savings = Savings(groups, measured_samples=EXAMPLES, measure_s=measure_s)
    parts = Parts(
        model,
        optimizer,
        scheduler,
        driver,
        device,
        forward,
        scaler,
        cache,
        allowance,
        flops,
        savings,
    )
    return Prepared(task, groups, parts, batching, measure_s)


def _recorded_costs(folder: RunFolder, task: Task) -> dict[str, GroupCost]:
    """What the first session measured; raises when the data is not what it had."""
    header = read_run(folder.path).header
    here, recorded = _data_facts(task), header["data"]
    if here != recorded:
        changed = next(name for name in here if here[name] != recorded.get(name))
        raise DataError(
            f"go on with the run in {folder.path}",
            found=f"other data than when it started: {changed} differs",
            fix="bring back the data of the start, or start over: fresh=True (--fresh)",
        )
    costs: Mapping[str, Mapping[str, Any]] = header["costs"]["groups"]
    return {name: GroupCost(**cost) for name, cost in costs.items()}


def _data_facts(task: Task) -> dict[str, Any]:
    """Size of each split, digests of its labels and of what its samples hold."""

    def facts(split: Split, name: str) -> dict[str, Any]:
        text = ",".join(str(label) for label in split.labels)
        return {
            "samples": len(split),
            "labels_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "content_sha256": task.notes.get("content_sha256", {}).get(name),
        }

    splits = {"train": task.train, "val": task.val, "test": task.test}
    return {name: facts(split, name) for name, split in splits.items()}


def _moved(example: Example, device: torch.device) -> Example:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return replace(
        example,
        args=tuple(move(value) for value in example.args),
        kwargs={name: move(value) for name, value in example.kwargs.items()},
    )
