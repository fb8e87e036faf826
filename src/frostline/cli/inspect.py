"""`frostline inspect`: the layer groups of a model, what they cost, what freezing would save.

With data it also foretells what a run on it will take at every depth, with and without the cache.
"""

# ruff: noqa: PLC0415  torch is imported when it is needed

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from frostline.cli.terminal import (
    bytes_text,
    console,
    count_text,
    escape,
    print_json,
    print_table,
)
from frostline.cost import GroupReport, group_reports
from frostline.errors import ModelError
from frostline.groups import LayerGroups
from frostline.tasks.config import RunConfig, load_config

if TYPE_CHECKING:
    from frostline.backends.torch.example import Example
    from frostline.frontier.foretell import EpochCost
    from frostline.tasks.built import Built
    from frostline.tasks.foretell import Forecast

__all__ = ["inspect"]

_COLUMNS = {
    "depth": "right",
    "layer group": "left",
    "parameters": "right",
    "buffers": "right",
    "forward": "right",
    "backward": "right",
    "activations": "right",
    "saves": "right",
    "cached": "right",
}
_LEGEND = """\
forward, backward: measured share of the pass
activations:       bytes kept for the backward pass when the group trains
saves:             share of a full step's time saved at best by freezing up to here
cached:            the same with the features of the frozen part kept, not computed again"""
_RUN_COLUMNS = {
    "frozen": "right",
    "step": "right",
    "cached": "right",
    "epoch": "right",
    "first": "right",
    "cached epoch": "right",
    "pays after": "right",
    "memory": "right",
    "disk": "right",
    "cache": "left",
}
_RUN_LEGEND = """\
frozen:       layer groups frozen, counted from the input; the others train
step, cached: one training step, computed in full and from stored features (without reading them)
epoch:        preparing samples, all steps, validation and a checkpoint, without the cache
first:        the first epoch with the cache, which fills it
cached epoch: each epoch once all samples are stored
pays after:   epochs from which on the run with the cache is the shorter one
memory:       weights, and what steps without the cache use above them at their peak
disk:         what the cache stores of all training and validation samples
cache:        whether to, in a run of this many epochs
*             a depth at which steps were run; other depths lie between two of these"""


def inspect(  # noqa: PLR0913  one per flag
    model: Annotated[
        str, Parameter(help="'timm:NAME', 'torchvision:NAME', 'hf:NAME_OR_DIR' or a callable.")
    ],
    *,
    weights: Annotated[
        str, Parameter(help="'random', 'pretrained' or a .safetensors file; costs are the same.")
    ] = "random",
    data: Annotated[
        str | None, Parameter(help="What to learn from, as for fit: foretells runs on it.")
    ] = None,
    epochs: Annotated[int, Parameter(help="Length of the foretold run.")] = 10,
    batch_size: Annotated[
        int | None, Parameter(help="Samples in a batch; by default 8, with --data 32.")
    ] = None,
    image_size: Annotated[
        int | None, Parameter(help="Side of the picture in pixels; by default the model's own.")
    ] = None,
    kind: Annotated[
        Literal["image", "text"] | None, Parameter(help="What a Hugging Face model classifies.")
    ] = None,
    classes: Annotated[int, Parameter(help="Classes of the head; the data's own win.")] = 10,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], Parameter(help="Arithmetic of the foretold run.")
    ] = "fp32",
    augment: Annotated[
        Literal["none", "flip", "basic"] | None, Parameter(help="As for fit, for --data.")
    ] = None,
    views: Annotated[
        int, Parameter(help="Stored views of each sample, for augmentation with the cache.")
    ] = 1,
    workers: Annotated[int, Parameter(help="Processes that prepare samples.")] = 0,
    threads: Annotated[int | None, Parameter(help="CPU threads for arithmetic.")] = None,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """Show the layer groups of a model and what freezing each would save.

    The groups are in the order in which they run; depth 0 is nearest the input. Times are measured
    on this machine, on one batch of the size given. With --data, steps at some depths are tried
    on the data itself (tens of seconds to minutes), and the run is foretold; nothing is trained.
    """
    settings = {"model": model, "weights": weights, "image_size": image_size}
    if data is not None:
        run = {"data": data, "epochs": epochs, "precision": precision, "workers": workers}
        given = {"batch_size": batch_size, "augment": augment, "threads": threads}
        given = {name: value for name, value in given.items() if value is not None}
        _foretell(load_config(None, settings | run | given), views, as_json=json)
        return
    config = load_config(
        None, settings | {"data": "none", "batch_size": 8 if batch_size is None else batch_size}
    )
    built = _built(config, kind, tuple(str(i) for i in range(classes)))
    groups = _measured(built, config)
    if json:
        print_json(_as_json(groups))
        return
    _print_groups(groups, model)


def _print_groups(groups: LayerGroups, title: str) -> None:
    print_table(_COLUMNS, [_cells(r, groups) for r in group_reports(groups)], title=title)
    _print_lines((*_LEGEND.splitlines(), *(f"note: {note}" for note in groups.notes)))


def _print_lines(lines: Iterable[str]) -> None:
    out = console(sys.stdout)
    for line in lines:
        out.print(escape(line), soft_wrap=True)


def _foretell(config: RunConfig, views: int, *, as_json: bool) -> None:
    from frostline.tasks.foretell import foretell_task

    def show(line: str) -> None:
        sys.stderr.write(f"measuring {escape(line)}\n")

    found = foretell_task(config, views=views, progress=show)
    if as_json:
        print_json({**_as_json(found.groups), "run": found.to_json()})
        return
    _print_groups(found.groups, config.model)
    print_table(_RUN_COLUMNS, [_run_cells(e) for e in found.epochs], title=_run_title(found))
    _print_lines((*_RUN_LEGEND.splitlines(), *_run_notes(found)))


def _run_title(found: Forecast) -> str:
    work, config = found.work, found.config
    return (
        f"{config.data}: {work.samples} training and {work.val_samples} validation samples, "
        f"batches of {found.steps.batch_size}, {config.epochs} epochs, {config.optimizer}, "
        f"{config.precision}"
    )


def _run_notes(found: Forecast) -> Iterator[str]:
    work = found.work
    prepared = f"{time_text(work.load_s)} per training sample"
    yield f"note: preparing samples takes {prepared}, {time_text(work.val_load_s)} for validation"
    if found.config.augment not in (None, "none"):
        yield (
            f"note: with the cache each sample is seen in {work.views} augmented "
            f"{'view' if work.views == 1 else 'views'} (--views)"
        )
    if found.steps.disturbed:
        yield "note: other programs had the processor for part of the time; times are too long"
    yield f"note: this took {found.spent_s:.0f} s"


def _run_cells(epoch: EpochCost) -> tuple[str | None, ...]:
    step = epoch.step
    return (
        f"{step.depth}{'*' if step.tried else ' '}",
        time_text(step.step_s),
        _time(step.cached_step_s),
        time_text(epoch.epoch_s),
        _time(epoch.first_epoch_s),
        _time(epoch.cached_epoch_s),
        None if epoch.break_even_epochs is None else f"{epoch.break_even_epochs} ep",
        None if step.peak_memory_bytes is None else f"{step.peak_memory_bytes / 2**20:.0f} MiB",
        None if epoch.disk_bytes is None else bytes_text(epoch.disk_bytes),
        f"yes, saves {_percent(epoch.gain or 0.0)}" if epoch.worth_caching else epoch.advice,
    )


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else time_text(seconds)


def time_text(seconds: float) -> str:
    """A short time for people, in milliseconds or seconds.

    Example:
        >>> time_text(0.00123), time_text(0.1234), time_text(12.34), time_text(345.6)
        ('1.23 ms', '123 ms', '12.3 s', '346 s')
    """
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def _built(
    config: RunConfig, kind: Literal["image", "text"] | None, labels: Sequence[str]
) -> Built:
    from frostline.tasks.models import build_model

    if kind is not None or not config.model.startswith("hf:"):
        return build_model(config, kind=kind or "image", labels=tuple(labels))
    try:
        return build_model(config, kind="text", labels=tuple(labels))
    except ModelError as first:
        try:
            return build_model(config, kind="image", labels=tuple(labels))
        except ModelError:
            raise first from None


def _measured(built: Built, config: RunConfig) -> LayerGroups:
    from frostline.backends.torch.grouping import layer_groups
    from frostline.backends.torch.measure import measure_costs

    example = _example(built, config)
    groups = layer_groups(built.model, example, head=built.head)
    return measure_costs(built.model, groups, example)


def _example(built: Built, config: RunConfig) -> Example:
    """Pictures of the size the model is prepared for; for texts, what the model says of itself."""
    import numpy as np

    from frostline.backends.torch.example import Example, example_batch
    from frostline.tasks.image import ImagePreparation

    if not isinstance(built.preparation, ImagePreparation):
        return example_batch(built.model, batch_size=config.batch_size)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    prepare = built.preparation.configured(config)
    batch: Any = prepare.collate([prepare(noise)] * config.batch_size)
    return Example(kwargs=batch) if isinstance(batch, Mapping) else Example(args=batch)


def _cells(report: GroupReport, groups: LayerGroups) -> tuple[str | None, ...]:
    group, cost = report.group, report.group.cost
    nothing_left = group.depth == len(groups) - 1
    return (
        str(group.depth),
        f"{group.name} (head)" if group.name in groups.head else group.name,
        count_text(group.parameter_count),
        count_text(sum(b.count for b in group.buffers)),
        _percent(report.forward_share),
        _percent(report.backward_share),
        bytes_text(cost.activation_bytes) if cost else None,
        None if nothing_left else _percent(report.saving),
        None if nothing_left else _percent(report.cached_saving),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _as_json(groups: LayerGroups) -> dict[str, Any]:
    rows = [
        {
            "depth": r.group.depth,
            "name": r.group.name,
            "head": r.group.name in groups.head,
            "parameters": r.group.parameter_count,
            "buffers": sum(b.count for b in r.group.buffers),
            "forward_share": r.forward_share,
            "backward_share": r.backward_share,
            "activation_bytes": r.group.cost.activation_bytes if r.group.cost else None,
            "saving": r.saving,
            "cached_saving": r.cached_saving,
        }
        for r in group_reports(groups)
    ]
    return {"groups": rows, "notes": list(groups.notes), "parameters": groups.parameter_count}
