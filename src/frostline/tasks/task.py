"""A task: data, model and everything between them, ready for a training loop.

`load_task` reads the data, builds the model for its classes, and prepares samples the way the
model expects. A sample is a pure function of its index and its view (the seed of its
augmentation), so any order, any number of workers and any resume see the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.tracing import leave_untouched, run_model
from frostline.errors import ModelError
from frostline.tasks.built import Preparation
from frostline.tasks.config import RunConfig, resolve_config
from frostline.tasks.data import read_data
from frostline.tasks.image import ImagePreparation
from frostline.tasks.models import as_logits, build_model, model_logits
from frostline.tasks.saved import describe, save_model

__all__ = ["Batch", "Sample", "Split", "Task", "balanced_weights", "content_digest", "load_task"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prepared sample.

    Attributes:
        index: its place in the split.
        inputs: what the model's preparation made of it: a tensor, or a mapping of tensors/lists.
        label: class number, >= 0.
    """

    index: int
    inputs: Any
    label: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples put together for one forward pass.

    Attributes:
        inputs: positional (tuple) or keyword (mapping) arguments of the model.
        targets: class numbers, LongTensor (N,).
        indices: places of the samples in their split, in batch order.
    """

    inputs: tuple[Any, ...] | Mapping[str, Any]
    targets: Tensor
    indices: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return len(self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        moved: tuple[Any, ...] | Mapping[str, Any]
        if isinstance(self.inputs, tuple):
            moved = tuple(move(v) for v in self.inputs)
        else:
            moved = {k: move(v) for k, v in self.inputs.items()}
        return Batch(moved, self.targets.to(device), self.indices)


class Split(torch.utils.data.Dataset[Sample]):
    """The samples of one split; indexed by `(index, view)`.

    Works as the data set of a `torch.utils.data.DataLoader` whose sampler yields such pairs.

    Args:
        inputs: raw inputs (paths, texts, images).
        labels: class number per input.
        prepare: pure function of (raw input, index, view).

    Example:
        >>> split = Split(["a", "b"], [0, 1], lambda raw, index, view: raw.upper())
        >>> split[1, None]
        Sample(index=1, inputs='B', label=1)
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        labels: Sequence[int],
        prepare: Callable[[Any, int, int | None], Any],
    ) -> None:
        self.inputs = inputs
        self.labels = tuple(labels)
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int | None]) -> Sample:
        """The sample at `index`; `view` seeds its augmentation, None means no augmentation."""
        index, view = key
        return Sample(index, self.prepare(self.inputs[index], index, view), self.labels[index])


@dataclass(frozen=True)
class Task:
    """Data and model, ready for a training loop.

    Attributes:
        kind: "image" or "text".
        config: the configuration with its defaults resolved for this kind.
        model: plain torch model whose head has one output per label.
        labels: class names, in the order of the outputs.
        train: samples to learn from.
        val: samples to choose by.
        test: samples to report on, once, at the end.
        preparation: turns raw inputs into the model's inputs.
        spec: plain JSON from which the architecture is built again.
        head: glob of the head's modules, or None when unknown.
        notes: plain JSON for the run's record: sizes, how splits were made, what was left out,
            which tensors start fresh.
    """

    kind: Literal["image", "text"]
    config: RunConfig
    model: nn.Module
    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    preparation: Preparation
    spec: Mapping[str, Any]
    head: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Put samples together: images stacked, texts padded to the longest."""
        preparation: Any = self.preparation
        return Batch(
            inputs=preparation.collate([s.inputs for s in samples]),
            targets=torch.tensor([s.label for s in samples], dtype=torch.long),
            indices=tuple(s.index for s in samples),
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass: scores (N, C) before the softmax.

        Raises:
            ModelError: the output is no (N, C) tensor.
        """
        return model_logits(model, batch.inputs, classes=len(self.labels))

    def example(self, size: int = 2) -> Example:
        """A real batch of the first training samples, as `layer_groups` takes it.

        Args:
            size: samples in it, 1 to 4 are plenty.
        """
        samples = [self.train[i, None] for i in range(min(size, len(self.train)))]
        inputs = self.collate(samples).inputs
        if isinstance(inputs, tuple):
            return Example(args=inputs)
        return Example(kwargs=inputs)

    def class_weights(self) -> Tensor | None:
        """Loss weight per class (C,) as the configuration asks, or None for equal weights."""
        if self.config.class_weights == "none":
            return None
        return balanced_weights(self.train.labels, classes=len(self.labels))

    def save_model(
        self, folder: Path, model: nn.Module, *, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write the model, its preparation and a model card, for `load_saved`.

        Args:
            folder: created if absent; files of an earlier model in it are replaced one by one.
            model: this task's model, as trained.
            metrics: figures for the card, by name.
        """
        card = describe(self.config, self.notes, metrics or {})
        save_model(
            folder,
            model,
            preparation=self.preparation,
            spec=self.spec,
            labels=self.labels,
            card=card,
        )


def balanced_weights(labels: Sequence[int], *, classes: int) -> Tensor:
    """Weights inversely proportional to class frequency, 1 on average over the samples.

    Example:
        >>> balanced_weights([0, 0, 0, 1], classes=2).tolist()
        [0.6666666865348816, 2.0]
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=classes)
    return len(labels) / (classes * counts.clamp(min=1).float())


def load_task(config: RunConfig) -> Task:
    """Read the data, make the splits, build the model for its classes.

    Raises:
        DataError: the data cannot be read or split; names file and line.
        ModelError: the model or its weights cannot be had.
        ConfigError: settings that contradict the data.
        MissingExtra: an optional dependency is absent.
    """
    data = read_data(config)
    config = resolve_config(config, data.kind)
    built = build_model(config, kind=data.kind, labels=data.labels)
    preparation = built.preparation
    if isinstance(preparation, ImagePreparation):
        preparation = preparation.configured(config)
    train, val, test = (
        Split(data.inputs(name), data.targets(name), preparation)
        for name in ("train", "val", "test")
    )
    content = {name: content_digest(data.splits[name].digests) for name in ("train", "val", "test")}
    notes = {
        **data.notes,
        "content_sha256": content,
        "head": built.head,
        "fresh_tensors": _counted(built.fresh),
        **built.notes,
    }
    task = Task(
        kind=data.kind,
        config=config,
        model=built.model,
        labels=data.labels,
        train=train,
        val=val,
        test=test,
        preparation=preparation,
        spec=built.spec,
        head=built.head,
        notes=notes,
    )
    _try_out(task)
    return task


def content_digest(digests: Sequence[bytes]) -> str:
    """SHA-256 over what the samples of a split hold, in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(d).digest() for d in digests)).hexdigest()


def _counted(names: Sequence[str], *, shown: int = 10) -> dict[str, Any]:
    return {"count": len(names), "first": list(names[:shown])}


def _try_out(task: Task) -> None:
    """Run two samples through the model: better now than after an hour of preparation."""
    example = task.example()
    try:
        with leave_untouched(task.model):
            out = run_model(task.model, example.args, example.kwargs)
    except ModelError as error:
        raise ModelError(
            f"run {task.config.model} on its training samples",
            found=error.found,
            fix="settings that suit the model (image_size, max_length), or another model",
        ) from error
    as_logits(out, classes=len(task.labels))
