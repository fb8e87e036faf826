"""What every layer group of a model puts out for the samples of a split, pooled, in one pass.

What a group puts out is the output of the module of it that finished last; a module without
parameters counts for the group that ran just before it, unless it leaves nothing of a map but one
vector (global pooling): maps are pooled here, alike at every depth. Before the pass, three samples
run in two orders: where the rows of an output are, and whether they belong to their samples, is
measured and not assumed. A group whose output cannot be used is left out, and the notes say so.

Pooling, of a map with C channels: the mean over all positions and the standard deviation over
them, channel by channel (statistics pooling: Snyder et al. 2018, "X-Vectors", ICASSP); of pictures
the mean in each cell of the finest grid, up to 3 x 3, that leaves the width within `max_width`.
Measured with ridge probes on validation data, as the mean accuracy over all layer groups:

=====================  =========  =========  =======  ==============
pooled                 ResNet-20  ResNet-56  lite0    SqueezeNet 1.0
=====================  =========  =========  =======  ==============
mean                   0.467      0.503      0.726    0.748
mean, maximum          0.528                 0.744    0.771
2 x 2 means            0.660      0.701      0.730    0.746
mean, deviation        0.562      0.593      0.779    0.782
3 x 3 means, the same  0.760      0.779      0.770    0.782
=====================  =========  =========  =======  ==============

(ResNets of CIFAR-10 on Caltech-101 at 32 pixels, the others of ImageNet on flowers.) Of tokens the
deviation gains as much as the first token (0.023 against 0.021 on banking77, 0.003 against 0.008
on trec6, MiniLM), so pictures and tokens are pooled alike.

Channels beyond `max_width` are mixed by a fixed Gaussian matrix (Johnson-Lindenstrauss): for
twice the width it loses no more than a subset of channels or means of neighbouring ones do, and
means of neighbours lose most where positions lie side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from frostline.backends.torch.digest import unwrapped
from frostline.backends.torch.example import Example
from frostline.backends.torch.tracing import leave_untouched, run_model, tensors_in
from frostline.errors import DataError, ModelError, UsageError
from frostline.groups import LayerGroup, LayerGroups
from frostline.tasks.order import derive_seed
from frostline.tasks.setup import mixed_precision
from frostline.tasks.task import Batch, Split, Task
from frostline.tasks.text import TextPreparation

__all__ = ["Features", "collect_features"]

#: Samples that run in two orders before the pass.
_TRIED = 3
#: Cells per side of the finest grid: 4 x 4 gains nothing more.
_FINEST = 3
#: Numbers that fit in a processor's cache.
_CACHED = 1 << 18
#: Stands for the input of the head where names of groups stand.
_HEAD = ""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Pooled outputs of the layer groups of one model for samples of one split.

    Attributes:
        groups: layer groups in execution order whose pooled output is in `values`; groups of the
            head are not among them, since what a new head puts out says nothing yet.
        values: by group, float32 (N, D), D of each group's own, at most `max_width`.
        head_input: float32 (N, D), what enters the head in evaluation mode; as it is where it is
            one vector per sample, else its mean over positions; None where it cannot be seen.
        labels: class numbers, int64 (N,).
        seconds_s: wall time of the pass, loading of samples included.
        indices: place of each row in its split, int64 (N,), ascending.
        depths: `LayerGroup.depth` of each of `groups`.
        head_layer: name of the linear layer that is the whole head: it reads `head_input` as it
            is, and its output is the model's scores. None where the head is anything else.
        notes: what was left out, and why; one sentence each.
    """

    groups: tuple[str, ...]
    values: Mapping[str, NDArray[np.float32]]
    head_input: NDArray[np.float32] | None
    labels: NDArray[np.int64]
    seconds_s: float
    indices: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    depths: tuple[int, ...] = ()
    head_layer: str | None = None
    notes: tuple[str, ...] = ()


def collect_features(
    task: Task,
    model: nn.Module,
    split: Split,
    groups: LayerGroups,
    *,
    device: torch.device | str,
    batch_size: int | None = None,
    limit: int | None = None,
    max_width: int = 512,
) -> Features:
    """Run a split through a model once and keep what each layer group puts out, pooled.

    Evaluation mode, no gradients, no augmentation, the precision of the run. Modes, buffers,
    hooks and attributes of the model and the global random streams are afterwards as before,
    also after an exception. Texts run from the shortest to the longest, to be padded little; rows
    are in the order of the split all the same.

    Args:
        task: whose model and split these are.
        model: on `device`.
        split: samples to run.
        groups: the model's layer groups.
        device: where the model is.
        batch_size: samples per forward pass, >= 1; the run's by default.
        limit: at most so many samples, >= 1: a subset with the classes in their proportions (at
            least one of each where that many fit), drawn by the run's seed. None: all.
        max_width: most values kept per sample and group, >= 1.

    Raises:
        UsageError: a number out of range.
        DataError: the split is empty, or a sample cannot be prepared.
        ModelError: the model cannot run on these samples.

    Example:
        >>> from frostline.backends.torch.grouping import layer_groups
        >>> from frostline.tasks.config import RunConfig
        >>> from frostline.tasks.image import ImagePreparation
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        ... )
        >>> split = Split([1.0, 2.0], [0, 1], lambda raw, index, view: torch.full((3, 8, 8), raw))
        >>> preparation = ImagePreparation({}, lambda picture: picture)
        >>> config = RunConfig(model="m", data="d")
        >>> task = Task("image", config, model, ("a", "b"), split, split, split, preparation, {})
        >>> groups = layer_groups(model, task.example())
        >>> features = collect_features(task, model, split, groups, device="cpu")
        >>> features.groups, features.values["0"].shape, features.head_layer
        (('0',), (2, 40), '3')
    """
    start = time.perf_counter()
    _check(split, batch_size=batch_size, limit=limit, max_width=max_width)
    indices = _stratified(split.labels, limit, derive_seed(task.config.seed, "features", 0))
    model = unwrapped(model)
    run = _Pass(task, model, split, torch.device(device))
    size = batch_size or task.config.batch_size
    with leave_untouched(model):
        plan = _Plan.of(run, groups, max_width)
        rows, lost = _collected(run, plan, indices, size, max_width)
    kept = tuple(g for g in groups if g.name in rows)
    return Features(
        groups=tuple(g.name for g in kept),
        values={g.name: rows[g.name] for g in kept},
        head_input=rows.get(_HEAD),
        labels=np.asarray(split.labels, np.int64)[indices],
        seconds_s=time.perf_counter() - start,
        indices=indices,
        depths=tuple(g.depth for g in kept),
        head_layer=plan.head_layer if _HEAD in rows else None,
        notes=(*plan.notes.values(), *lost.values()),
    )


def _check(split: Split, **numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(
                f"collect features with {name}={value}",
                found="a number below 1",
                fix=f"{name} of at least 1",
            )
    if not len(split):
        raise DataError("collect features", found="a split without samples", fix="add samples")


# -- which samples -----------------------------------------------------------------------------


def _stratified(labels: Sequence[int], limit: int | None, seed: int) -> NDArray[np.int64]:
    """Ascending places of at most `limit` samples, the classes in their proportions."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    classes, places = np.unique(np.asarray(labels), return_inverse=True)
    counts = np.bincount(places)
    # Largest remainders; where they fit, one sample of each class comes first.
    base = np.ones_like(counts) if limit >= len(classes) else np.zeros_like(counts)
    share = (counts - base) * ((limit - base.sum()) / max(1, (counts - base).sum()))
    quota = base + np.floor(share + 1e-9).astype(np.int64)
    rest = np.argsort(-(base + share - quota), kind="stable")[: limit - quota.sum()]
    quota[rest] += 1
    generator = np.random.Generator(np.random.Philox(key=seed))
    drawn = [
        generator.permutation(np.flatnonzero(places == c))[:count] for c, count in enumerate(quota)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


# -- running -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pass:
    """How samples get through the model. All of it happens inside `leave_untouched`."""

    task: Task
    model: nn.Module
    split: Split
    device: torch.device

    def batches(self, indices: NDArray[np.int64], size: int) -> Iterator[tuple[Any, Batch]]:
        """All samples, each batch with the rows of its samples."""
        order = np.arange(len(indices))
        if isinstance(self.task.preparation, TextPreparation):
            order = np.argsort([len(self.split.inputs[i]) for i in indices], kind="stable")
        rows = [order[i : i + size] for i in range(0, len(order), size)]
        loader = DataLoader(
            self.split,
            batch_sampler=[[(int(indices[r]), None) for r in some] for some in rows],
            collate_fn=self.task.collate,
            num_workers=self.task.config.workers,
            generator=torch.Generator(),
        )
        yield from zip(rows, loader, strict=True)

    def batch(self, indices: Sequence[int]) -> Batch:
        """A few samples."""
        return self.task.collate([self.split[i, None] for i in indices])

    def run(self, batch: Batch) -> Any:
        """What the model returns for a batch."""
        example = _example(batch.to(self.device))
        forward, _ = mixed_precision(self.task.config, self.device)
        try:
            with forward():
                return run_model(self.model, example.args, example.kwargs)
        except ModelError as error:
            raise ModelError(
                f"collect features of {self.task.config.model}",
                found=error.found,
                fix="a smaller batch_size, or settings that suit the model",
            ) from error

    @property
    def precision(self) -> torch.dtype:
        """The coarsest number type that arithmetic is done in."""
        named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return named[self.task.config.precision]


def _example(batch: Batch) -> Example:
    if isinstance(batch.inputs, tuple):
        return Example(args=batch.inputs)
    return Example(kwargs=batch.inputs)


class _Seen(NamedTuple):
    """A tensor that passed by: the output of a module, or the input of the head."""

    group: str
    module: str
    tensor: Tensor


@dataclass(slots=True, eq=False)
class _Watch:
    """Tells what the layer groups put out, while it happens.

    Attributes:
        model: watched.
        groups: its layer groups.
    """

    model: nn.Module
    groups: LayerGroups
    _current: str | None = field(init=False, default=None)

    @contextmanager
    def telling(self, note: Callable[[_Seen], None]) -> Iterator[None]:
        """Call `note` with each output and each input of the head; after one forward pass, done."""
        self._current = None
        with ExitStack() as stack:
            for group, name, module in self._places():
                owner = group if any(True for _ in module.parameters()) else None
                hook = module.register_forward_hook(self._after(name, owner, note))
                stack.callback(hook.remove)
            for name in self.head_layers():
                before, module = self._before(name, note), self.model.get_submodule(name)
                hook = module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def head_layers(self) -> list[str]:
        """The modules that hold the parameters of the head themselves."""
        tensors = [p.name for name in self.groups.head for p in self.groups[name].parameters]
        owners = {_owner(name) for name in tensors}
        whole = not self.groups.backbone  # else what enters the root enters no head
        return sorted(name for name in owners if name or whole)

    def _places(self) -> Iterator[tuple[str, str, nn.Module]]:
        """The modules of each group that lie in no other module of it, with group and name."""
        modules = dict(self.model.named_modules())
        for group in self.groups:
            for name in _outermost(group, modules):
                yield group.name, name, modules[name]

    def _after(self, name: str, owner: str | None, note: Callable[[_Seen], None]) -> Any:
        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # One ReLU may serve many layers: it belongs to the one that ran before it.
            self._current = owner or self._current
            tensor = _first_floating(output)
            if self._current is not None and tensor is not None:
                note(_Seen(self._current, name, tensor))

        return after

    def _before(self, name: str, note: Callable[[_Seen], None]) -> Any:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if (tensor := _first_floating((args, kwargs))) is not None:
                note(_Seen(_HEAD, name, tensor))

        return before


def _owner(tensor: str) -> str:
    """The module that uses a parameter of this name; a parametrised one keeps it further inside."""
    module, parametrised, _ = f".{tensor}".partition(".parametrizations.")
    return module[1:] if parametrised else tensor.rpartition(".")[0]


def _outermost(group: LayerGroup, modules: Mapping[str, nn.Module]) -> list[str]:
    # A block that only uses layers of other groups is in no group's modules, but names its own.
    names = {m.name for m in group.modules} | {group.name}
    names = {n for n in names if n in modules}
    names = names - {""} or names  # the root stands for itself only where there is nothing else
    return sorted(n for n in names if not any(n.startswith(f"{o}.") for o in names))


def _first_floating(value: Any) -> Tensor | None:
    """The first tensor of real numbers in what a module takes or returns."""
    if is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = vars(value)
    usable = (t for t in tensors_in(value) if t.is_floating_point() and t.ndim and t.numel())
    return next(usable, None)


# -- pooling -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """How an output is pooled.

    Attributes:
        samples: dimension of the samples; if there are more rows than samples in dimension 0, the
            rows of each sample lie side by side.
        channels: dimension of the channels once samples come first: 1 or -1.
        grid: cells per side, of pictures.
        deviation: whether the standard deviation over positions is kept as well.
        positions: whether there are any: maps and tokens, not vectors.
    """

    samples: int
    channels: int
    grid: int
    deviation: bool
    positions: bool


def _layout(
    shape: Sequence[int], samples: int, size: int, weights: _Weights, max_width: int
) -> _Layout:
    """The layout for an output of this shape.

    Args:
        shape: of the output.
        samples: dimension of the samples.
        size: samples in it.
        weights: shapes of the parameters that made it.
        max_width: most values per sample.
    """
    rest = [length for place, length in enumerate(shape) if place != samples]
    if len(rest) == 1 and shape[samples] > size:
        rest = [shape[samples] // size, *rest]
    if len(rest) < 2:
        return _Layout(samples, -1, 1, deviation=False, positions=False)
    channels = _channels(rest, weights)
    width = rest[0] if channels == 1 else rest[-1]
    space = rest[1:] if channels == 1 else rest[:-1]
    positions = math.prod(space) > 1
    deviation = 2 * width <= max_width and positions
    sides = [
        side
        for side in range(1, _FINEST + 1)
        if side <= min(space) and width * (side * side + deviation) <= max_width
    ]
    grid = max(sides, default=1) if len(space) == 2 else 1
    return _Layout(samples, channels, grid, deviation, positions)


#: Shapes of parameters.
_Weights = tuple[tuple[int, ...], ...]


def _channels(rest: Sequence[int], weights: _Weights) -> int:
    """Where the channels are, in the sizes of one sample's output: 1 (first) or -1 (last).

    As many as a parameter has rows or columns; if both places could be, the channels come first
    where the weights convolve over as many dimensions as there are.
    """
    widths = {length for shape in weights for length in shape[:2]}
    first, last = rest[0] in widths, rest[-1] in widths
    if first != last:
        return 1 if first else -1
    return 1 if any(len(shape) == len(rest) + 1 for shape in weights) else -1


def _pooled(
    tensor: Tensor, size: int, layout: _Layout, mask: Tensor | None, max_width: int | None
) -> Tensor | None:
    """An output as float32 (N, D); None where it has no row for each of the samples.

    Args:
        tensor: the output.
        size: samples in the batch, N.
        layout: how to read it.
        mask: 1 for tokens and 0 for padding, (N, L), or None.
        max_width: most values per sample; None: no bound.
    """
    rows = _by_sample(tensor.detach().float(), size, layout.samples)
    if rows is None:
        return None
    if len(rows) > size:  # each a map of its own: windows, frames
        count = len(rows) // size
        pooled = _statistics(rows, layout, None).unflatten(0, (size, count)).mean(1)
    else:
        pooled = _statistics(rows, layout, mask)
    if max_width is not None and pooled.shape[1] > max_width:
        pooled = pooled @ _mixing(pooled.shape[1], max_width).to(pooled.device)
    return pooled


def _by_sample(tensor: Tensor, size: int, samples: int) -> Tensor | None:
    """The same with samples first, (N, ...); (N * k, ...) where each sample has k maps."""
    if samples >= tensor.ndim:
        return None
    length = tensor.shape[samples]
    if length == size:
        rows = tensor.movedim(samples, 0)
        return rows.unsqueeze(1) if rows.ndim == 1 else rows
    if samples or length % size:
        return None
    return tensor.unflatten(0, (size, -1)) if tensor.ndim <= 2 else tensor


def _statistics(rows: Tensor, layout: _Layout, mask: Tensor | None) -> Tensor:
    """Means and deviations over positions: (N, D) of (N, ...)."""
    if rows.ndim == 2:
        return rows.clone()  # what follows in the model may write to it in place
    maps = rows.movedim(layout.channels, 1)  # (N, C, *positions)
    weights = _weights(maps, mask)
    if layout.grid > 1:
        parts = [functional.adaptive_avg_pool2d(maps, layout.grid).flatten(1)]
    elif weights is None:
        parts = [maps.mean(dim=tuple(range(2, maps.ndim)))]
    else:
        parts = [(maps * weights).sum(2)]
    if layout.deviation:
        parts.append(_deviation(maps, weights))
    return torch.cat(parts, dim=1)


def _weights(maps: Tensor, mask: Tensor | None) -> Tensor | None:
    """Weight of each token in a mean, (N, 1, L); None where all positions count alike."""
    if mask is None or maps.ndim != 3 or mask.shape != (len(maps), maps.shape[2]):
        return None
    real = (mask != 0).unsqueeze(1).float()
    return real / real.sum(2, keepdim=True).clamp(min=1)


def _deviation(maps: Tensor, weights: Tensor | None) -> Tensor:
    """Standard deviation over positions: (N, C) of (N, C, *positions).

    A quarter of the time of `torch.var`, since a few samples at a time stay in the cache.
    """
    space = tuple(range(2, maps.ndim))
    step = max(1, _CACHED // maps[0].numel()) if maps.device.type == "cpu" else len(maps)
    found = []
    for start in range(0, len(maps), step):
        some = maps[start : start + step]
        if weights is None:
            centred = some - some.mean(dim=space, keepdim=True)
            found.append(centred.square_().mean(dim=space))
        else:
            share = weights[start : start + step]
            centred = some - (some * share).sum(2, keepdim=True)
            found.append((centred.square_() * share).sum(2))
    return torch.cat(found).sqrt()


@lru_cache(maxsize=8)
def _mixing(width: int, kept: int) -> Tensor:
    """A fixed Gaussian matrix (width, kept) that keeps squared lengths on average."""
    generator = torch.Generator().manual_seed(derive_seed(width, "mixing", kept))
    return torch.randn(width, kept, generator=generator) / math.sqrt(kept)


# -- which outputs -----------------------------------------------------------------------------


class _Source(NamedTuple):
    """The module whose last output counts for a group, and how that is pooled."""

    module: str
    layout: _Layout


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the pass keeps.

    Attributes:
        watch: tells what passes by.
        sources: by group; the head's input is the one of `_HEAD`.
        head_layer: name of the linear layer that is the whole head, or None.
        notes: a sentence by group that is left out.
    """

    watch: _Watch
    sources: Mapping[str, _Source]
    head_layer: str | None
    notes: Mapping[str, str]

    @classmethod
    def of(cls, run: _Pass, groups: LayerGroups, max_width: int) -> _Plan:
        """Run a few samples in two orders, and choose."""
        size = min(_TRIED, len(run.split))
        places = np.linspace(0, len(run.split) - 1, size).round().astype(int).tolist()
        trial = _Trial(run, _Watch(run.model, groups), size, max_width)
        first, turned = trial.rows(places), trial.rows(places[1:] + places[:1])
        sources, notes = dict[str, _Source](), dict[str, str]()
        wanted = [g.name for g in groups if g.name not in groups.head]
        for name in (*wanted, _HEAD):
            what = f"{name}: what it puts out" if name else "head: what enters it"
            seen = [s for s in first if s.group == name]
            if name == _HEAD:
                seen = [s for s in seen if s.module == seen[0].module]
            kept = [s for s in seen if _keeps_samples(first[s], turned.get(s), run.precision)]
            if kept:
                telling = [s for s in kept if _varies(first[s])] or kept
                sources[name] = _last(telling, run.model)
            elif seen:
                notes[name] = f"{what} has no row for each sample that is its own and finite"
            else:
                notes[name] = f"{what} was not seen: no module of it ran"
        head_layer = trial.head_layer if _HEAD in sources else None
        return cls(trial.watch, sources, head_layer, notes)


def _last(candidates: list[_Candidate], model: nn.Module) -> _Source:
    """The last of them, but no mere pooling of a map that came before."""
    left = list(candidates)
    while (
        not left[-1].layout.positions
        and any(c.layout.positions for c in left)
        and not any(True for _ in model.get_submodule(left[-1].module).parameters())
    ):
        left.pop()
    return _Source(left[-1].module, left[-1].layout)


class _Candidate(NamedTuple):
    """One way to read one output."""

    group: str
    module: str
    layout: _Layout


@dataclass(slots=True)
class _Trial:
    """Reads the outputs for a few samples in every way that their shapes allow."""

    run: _Pass
    watch: _Watch
    size: int
    max_width: int
    head_layer: str | None = field(init=False, default=None)

    def rows(self, places: Sequence[int]) -> dict[_Candidate, Tensor]:
        """Pooled outputs (n, D) by candidate, in the order in which they last appeared."""
        found: dict[_Candidate, Tensor] = {}
        batch = self.run.batch(places).to(self.run.device)
        mask = _mask(batch)

        def note(one: _Seen) -> None:
            for layout in self._layouts(one):
                limit = self.max_width if one.group else None
                pooled = _pooled(one.tensor, self.size, layout, mask, limit)
                key = _Candidate(one.group, one.module, layout)
                found.pop(key, None)
                if pooled is not None:
                    found[key] = pooled.cpu()

        with self.watch.telling(note), self._linear_head() as linear:
            output = self.run.run(batch)
        self.head_layer = linear.name if linear.made(output) else None
        return found

    def _layouts(self, one: _Seen) -> Iterator[_Layout]:
        """Every place where the samples could be; the likeliest, the first dimension, last."""
        groups, shape = self.watch.groups, one.tensor.shape
        owners = [groups[one.group]] if one.group else [groups[name] for name in groups.head]
        weights = tuple(p.shape for g in owners for p in g.parameters)
        places = [d for d in reversed(range(1, len(shape))) if shape[d] == self.size]
        if shape[0] % self.size == 0:
            places.append(0)
        for place in places:
            found = _layout(shape, place, self.size, weights, self.max_width)
            # A head that reads a map averages it, as far as can be told.
            yield found if one.group else replace(found, grid=1, deviation=False)

    @contextmanager
    def _linear_head(self) -> Iterator[_LinearHead]:
        """Looks at the head during a forward pass, where it is one linear layer."""
        names = self.watch.head_layers()
        layer = self.run.model.get_submodule(names[0]) if len(names) == 1 else None
        if type(layer) is not nn.Linear:  # a parametrised one has a class of its own
            yield _LinearHead("")
            return
        head = _LinearHead(names[0])
        with layer.register_forward_hook(head.see):
            yield head


@dataclass(slots=True)
class _LinearHead:
    """What passed through the only layer of a head."""

    name: str
    seen: tuple[Tensor, Tensor, Tensor] | None = None

    def see(self, _module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep the input, the output, and a copy of the output."""
        self.seen = inputs[0], output, output.detach().clone()

    def made(self, returned: Any) -> bool:
        """Whether it read one vector per sample and the model returned what it put out."""
        scores = _first_floating(getattr(returned, "logits", returned))
        if self.seen is None or scores is None:
            return False
        read, output, values = self.seen
        # The very same memory: a function of zeros may be zeros as well.
        same = scores.data_ptr() == output.data_ptr() and torch.equal(scores, values)
        return same and read.ndim == 2


def _keeps_samples(rows: Tensor, turned: Tensor | None, precision: torch.dtype) -> bool:
    """Whether the rows are finite, and move with their samples when these change places."""
    if turned is None or turned.shape != rows.shape or not bool(torch.isfinite(rows).all()):
        return False
    allowed = math.sqrt(torch.finfo(precision).eps) * float(rows.abs().max())
    return bool(((rows.roll(-1, 0) - turned).abs() <= allowed).all())


def _varies(rows: Tensor) -> bool:
    """Whether the rows differ: what is the same for all samples tells nothing of them."""
    return len(rows) == 1 or bool((rows != rows[0]).any())


def _mask(batch: Batch) -> Tensor | None:
    """The attention mask of a call (N, L), where it has one."""
    if isinstance(batch.inputs, tuple):
        return None
    found = batch.inputs.get("attention_mask", batch.inputs.get("padding_mask"))  # KerasHub's
    return found if isinstance(found, Tensor) else None


def _collected(
    run: _Pass, plan: _Plan, indices: NDArray[np.int64], size: int, max_width: int
) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """Rows by group, and a sentence by group whose output failed on the way."""
    found: dict[str, NDArray[np.float32]] = {}
    lost: dict[str, str] = {}
    for rows, batch in run.batches(indices, size):
        pooled = _pooled_outputs(run, plan, batch, max_width)
        for name in plan.sources.keys() - lost.keys():
            values = pooled.get(name)
            if name not in found and values is not None:
                found[name] = np.empty((len(indices), values.shape[1]), np.float32)
            if values is None or values.shape[1] != found[name].shape[1]:
                lost[name] = f"{name or 'head input'}: not of one shape for all samples"
                found.pop(name, None)
                continue
            found[name][rows] = values.cpu().numpy()
    for name in [n for n, values in found.items() if not np.isfinite(values).all()]:
        lost[name] = f"{name or 'head input'}: values that are not finite"
        del found[name]
    return found, lost


def _pooled_outputs(run: _Pass, plan: _Plan, batch: Batch, max_width: int) -> dict[str, Tensor]:
    """Pooled outputs (N, D) of one batch, by group; of repeated runs the last."""
    found: dict[str, Tensor] = {}
    mask = _mask(batch)
    mask = mask if mask is None else mask.to(run.device)

    def note(one: _Seen) -> None:
        source = plan.sources.get(one.group)
        if source is None or source.module != one.module:
            return
        limit = max_width if one.group else None
        pooled = _pooled(one.tensor, batch.size, source.layout, mask, limit)
        found.pop(one.group, None)
        if pooled is not None:
            found[one.group] = pooled

    with plan.watch.telling(note):
        run.run(batch)
    return found
