"""`frostline inspect`: the layer groups of a model, what they cost, what freezing would save."""

# ruff: noqa: PLC0415  torch is imported when it is needed

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
    from frostline.tasks.built import Built

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


def inspect(
    model: Annotated[
        str, Parameter(help="'timm:NAME', 'torchvision:NAME', 'hf:NAME_OR_DIR' or a callable.")
    ],
    *,
    weights: Annotated[
        str, Parameter(help="'random', 'pretrained' or a .safetensors file; costs are the same.")
    ] = "random",
    batch_size: Annotated[int, Parameter(help="Samples in the batch that is measured.")] = 8,
    image_size: Annotated[
        int | None, Parameter(help="Side of the picture in pixels; by default the model's own.")
    ] = None,
    kind: Annotated[
        Literal["image", "text"] | None, Parameter(help="What a Hugging Face model classifies.")
    ] = None,
    classes: Annotated[int, Parameter(help="Classes of the head.")] = 10,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """Show the layer groups of a model and what freezing each would save.

    The groups are in the order in which they run; depth 0 is nearest the input. Times are measured
    on this machine, on one batch of the size given.
    """
    settings = {"model": model, "weights": weights, "image_size": image_size}
    config = load_config(None, settings | {"data": "none", "batch_size": batch_size})
    built = _built(config, kind, tuple(str(i) for i in range(classes)))
    groups = _measured(built, config)
    if json:
        print_json(_as_json(groups))
        return
    print_table(_COLUMNS, [_cells(r, groups) for r in group_reports(groups)], title=model)
    out = console(sys.stdout)
    for line in (*_LEGEND.splitlines(), *(f"note: {note}" for note in groups.notes)):
        out.print(escape(line), soft_wrap=True)


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
