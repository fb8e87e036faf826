"""Divide a model into layer groups, ordered by measured execution.

One forward pass is traced (`tracing`), the model is divided into units (`blocks`), and the units
become groups: a unit with weights starts one, everything else (normalisation, class tokens,
positions, activations, dropout) joins the group that ran just before it, or the first one. Groups
are ordered by the first use of their parameters. Tied weights belong to the group that used them
first. What never ran is placed next to its neighbours in definition order, before the head.

The head is, in this order: the modules named by the caller; for Hugging Face models all that is
outside `base_model`; for timm models what `get_classifier()` returns; else the group that ran
last.
"""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from frostline.backends.grouping import Draft, Placing
from frostline.backends.torch.blocks import Unit, divide, is_norm, type_name
from frostline.backends.torch.example import Example, example_batch
from frostline.backends.torch.tracing import Trace, check_runnable, trace_model
from frostline.errors import SelectorMatchedNothing, few
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo, TensorInfo

__all__ = ["layer_groups"]

NAMES_SHOWN = 6
#: Running statistics, as PyTorch and Keras call them.
_NORM_BUFFERS = (
    "running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance"
)  # fmt: skip
#: State of the random numbers of one layer, as Keras calls it: it moves while dropout is active.
_SEED_BUFFER = "seed_generator_state"


def layer_groups(
    model: nn.Module,
    example: Example | Tensor | Mapping[str, Any] | None = None,
    *,
    boundaries: Sequence[str] | None = None,
    head: str | None = None,
) -> LayerGroups:
    """Divide `model` into layer groups, in the order in which they run.

    The model runs one batch in evaluation mode and is afterwards exactly what it was: weights,
    buffers, modes, hooks, gradients, and the random states of Python, NumPy and PyTorch.

    Args:
        model: any module with parameters.
        example: the batch to run: a tensor, keyword arguments by name, or an `Example`; None
            makes one up (see `example_batch`).
        boundaries: globs of module or parameter names; each outermost match is one group, the
            rest is found automatically between them.
        head: glob of the modules that form the task head.

    Raises:
        ModelError: the model has no parameters, lazy or meta ones, or cannot run the batch, or
            the example is no batch.
        SelectorMatchedNothing: a glob matches no module with parameters.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> groups = layer_groups(model)
        >>> groups.names, sorted(groups.head)
        (('0', '5'), ['5'])
        >>> [m.type for m in groups["0"].modules]
        ['Conv2d', 'BatchNorm2d', 'ReLU', 'AdaptiveAvgPool2d', 'Flatten']
    """
    check_runnable(model)
    wanted = frozenset().union(*(_matching(model, glob) for glob in boundaries or ()))
    wanted_head = _matching(model, head) if head else frozenset()
    batch = Example.of(example) if example is not None else example_batch(model)
    trace = trace_model(model, batch.args, batch.kwargs)
    units = divide(model, trace, whole=_outermost(wanted), apart=_outermost(wanted_head))
    return _Assembly(model, trace, units, wanted_head).groups()


@dataclass
class _Assembly:
    model: nn.Module
    trace: Trace
    units: list[Unit]
    wanted_head: frozenset[str]

    def __post_init__(self) -> None:
        self.aliases = _names_by_identity(self.model)
        self.claims = self._claims()
        self.head_parameters = self._head_parameters()

    def groups(self) -> LayerGroups:
        """The finished groups."""
        placing = Placing(
            self.units, self._tick, lambda unit: bool(self._owned(unit)), self._starts,
            self._is_head, embeds=lambda unit: isinstance(unit.module, nn.Embedding),
        )  # fmt: skip
        drafts = placing.ran()
        if drafts and not self.head_parameters:
            drafts[-1].in_head = True
        placing.place_others(drafts)
        names = [d.main.name or type_name(self.model) for d in drafts]
        members = self._modules_of(drafts)
        items = tuple(
            LayerGroup(
                name=name,
                depth=depth,
                parameters=tuple(self._tensors(draft, parameters=True)),
                buffers=tuple(self._tensors(draft, parameters=False)),
                modules=members[id(draft)],
                calls=self._calls(draft.main),
            )
            for depth, (name, draft) in enumerate(zip(names, drafts, strict=True))
        )
        head = frozenset(n for n, d in zip(names, drafts, strict=True) if d.in_head)
        notes = [*_notes(self.model, items, self.trace), *self._head_note(head)]
        return LayerGroups(items, head=head, notes=tuple(notes))

    def _head_note(self, head: frozenset[str]) -> Iterator[str]:
        output = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not self.head_parameters and isinstance(output, nn.Module):
            yield (
                "the output layer has no weights of its own (tied), so the group that ran last "
                f"is taken as head: {', '.join(head)}"
            )

    def _claims(self) -> dict[int, Unit]:
        """The unit that owns each parameter and buffer: the one running at its first use."""
        holders: dict[int, list[Unit]] = {}
        for unit in self.units:
            for _, tensor in _tensors_of(unit):
                holders.setdefault(id(tensor), []).append(unit)
        return {key: self._first_user(key, units) for key, units in holders.items()}

    def _first_user(self, key: int, units: list[Unit]) -> Unit:
        use = self.trace.uses.get(self.aliases[key][0])
        if use is not None:
            for name in reversed(use.inside):
                for unit in units:
                    if unit.module is not None and unit.name == name:
                        return unit
        return units[0]

    def _head_parameters(self) -> frozenset[int]:
        told = bool(self.wanted_head)
        modules = _under(self.model, self.wanted_head) if told else _known_head(self.model)
        return frozenset(
            id(p) for p in modules if told or self.aliases[id(p)][0] in self.trace.uses
        )

    def _owned(self, unit: Unit) -> list[Tensor]:
        """The parameters that belong to the unit."""
        return [
            t for _, t in _tensors_of(unit)
            if isinstance(t, nn.Parameter) and self.claims[id(t)] is unit
        ]  # fmt: skip

    def _tick(self, unit: Unit) -> int | None:
        """When the unit first did something; None if it never did."""
        used = [
            self.trace.uses[name].tick
            for t in self._owned(unit)
            if (name := self.aliases[id(t)][0]) in self.trace.uses
        ]
        if used:
            return min(used)
        if unit.module is None:
            use = self.trace.uses.get(unit.name)
            return use.tick if use is not None and self.claims[id(unit.tensor)] is unit else None
        if self._owned(unit):
            return None
        ran = [self.trace.entered.get(self.aliases[id(m)][0]) for m in unit.module.modules()]
        return min((tick for tick in ran if tick is not None), default=None)

    def _is_head(self, unit: Unit) -> bool:
        return any(id(t) in self.head_parameters for t in self._owned(unit))

    def _starts(self, unit: Unit) -> bool:
        # A layer whose weight is tied to one that ran earlier has nothing left to start with.
        return unit.starts and any(t.ndim > 1 or unit.module is None for t in self._owned(unit))

    def _tensors(self, draft: Draft[Unit], *, parameters: bool) -> Iterator[TensorInfo]:
        done: set[int] = set()
        for unit in draft.units:
            for module, tensor in _tensors_of(unit):
                own = self.claims[id(tensor)] is unit and id(tensor) not in done
                if own and isinstance(tensor, nn.Parameter) == parameters:
                    done.add(id(tensor))
                    name, *others = self.aliases[id(tensor)]
                    yield _describe(name, tuple(others), tensor, module)

    def _modules_of(self, drafts: list[Draft[Unit]]) -> dict[int, tuple[ModuleInfo, ...]]:
        """For each group the modules that lie wholly inside it."""
        groups = {id(unit): id(draft) for draft in drafts for unit in draft.units}
        owner = {key: groups[id(unit)] for key, unit in self.claims.items()}
        direct: dict[int, int] = {}
        for unit in sorted(self.units, key=lambda u: -u.name.count(".")):
            for module in unit.module.modules() if unit.module is not None else ():
                direct.setdefault(id(module), groups[id(unit)])
        found: dict[int, list[ModuleInfo]] = {id(draft): [] for draft in drafts}
        for name, module in self.model.named_modules():
            inside = {
                owner[id(t)]
                for t in (*module.parameters(), *module.buffers())
            } | {
                direct[id(m)]
                for m in module.modules()
                if id(m) in direct and not any(True for _ in m.parameters())
            }  # fmt: skip
            if len(inside) == 1:
                found[inside.pop()].append(ModuleInfo(name, type_name(module)))
        return {key: tuple(infos) for key, infos in found.items()}

    def _calls(self, unit: Unit) -> int:
        if unit.module is None:
            return int(unit.name in self.trace.uses)
        if calls := self.trace.calls.get(unit.name, 0):
            return calls
        inner = (self.trace.calls.get(self.aliases[id(m)][0], 0) for m in unit.module.modules())
        used = any(self.aliases[id(t)][0] in self.trace.uses for t in self._owned(unit))
        return max(max(inner, default=0), int(used))


def _names_by_identity(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, parameter and buffer, the first one first."""
    names: dict[int, list[str]] = {}
    for name, item in (
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(item), []).append(name)
    return names


def _tensors_of(unit: Unit) -> Iterator[tuple[nn.Module | None, Tensor]]:
    """Parameters and buffers of a unit, each with the module that holds it."""
    if unit.tensor is not None:
        yield None, unit.tensor
    elif unit.module is not None:
        for module in unit.module.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                yield module, tensor


def _describe(
    name: str, aliases: tuple[str, ...], tensor: Tensor, module: nn.Module | None
) -> TensorInfo:
    is_parameter = isinstance(tensor, nn.Parameter)
    return TensorInfo(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        itemsize_bytes=tensor.element_size(),
        kind=_parameter_kind(name, tensor, module) if is_parameter else _buffer_kind(name, module),
        aliases=aliases,
    )


def _parameter_kind(name: str, tensor: Tensor, module: nn.Module | None) -> str:
    key = name.rpartition(".")[2]
    if module is not None and is_norm(module):
        return "norm"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if tensor.ndim <= 1 and (key == "bias" or key.startswith("bias_") or key.endswith("_bias")):
        return "bias"
    return "weight"


def _buffer_kind(name: str, module: nn.Module | None) -> str:
    own = name.rpartition(".")[2]
    if own in _NORM_BUFFERS and module is not None and is_norm(module):
        return "norm"
    return "seed" if own == _SEED_BUFFER else "buffer"


def _matching(model: nn.Module, glob: str) -> frozenset[str]:
    """Names of modules with parameters, and of parameters, that match the glob."""
    names = [
        name for name, m in model.named_modules() if name and any(True for _ in m.parameters())
    ]
    names += [name for name, _ in model.named_parameters()]
    found = frozenset(name for name in names if fnmatch.fnmatchcase(name, glob))
    if not found:
        near = difflib.get_close_matches(glob, names, n=3, cutoff=0.4) or names[:NAMES_SHOWN]
        raise SelectorMatchedNothing(
            f"find modules that match {glob!r}",
            found=f"none among {len(names)} modules and parameters of {type(model).__name__}",
            fix=f"a glob such as {', '.join(map(repr, near))}",
        )
    return found


def _outermost(names: Iterable[str]) -> frozenset[str]:
    names = frozenset(names)
    return frozenset(n for n in names if not any(n.startswith(f"{o}.") for o in names))


def _under(model: nn.Module, names: frozenset[str]) -> list[Tensor]:
    outer = _outermost(names)
    return [
        p
        for name, p in model.named_parameters()
        if any(name == o or name.startswith(f"{o}.") for o in outer)
    ]


def _known_head(model: nn.Module) -> list[Tensor]:
    """Parameters of the task head, where the model's library says which they are."""
    library = sys.modules.get("transformers")
    if library is not None and isinstance(model, library.PreTrainedModel):
        base: Any = model.base_model
        inside = {id(p) for p in base.parameters()}
        return [p for p in model.parameters() if id(p) not in inside] if base is not model else []
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return []
    found = get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return [p for h in heads if isinstance(h, nn.Module) for p in h.parameters()]


def _notes(model: nn.Module, groups: Sequence[LayerGroup], trace: Trace) -> Iterator[str]:
    """What the reader should know about this pass."""
    idle = [g.name for g in groups if not g.calls]
    if idle:
        yield (
            f"never ran in the traced pass, placed by definition order: {_list(idle)}; "
            "other inputs or training mode may run them"
        )
    unused = [p.name for g in groups if g.calls for p in g.parameters if p.name not in trace.uses]
    if unused:
        yield f"not used in the traced pass, other inputs may use them: {_list(unused)}"
    yield from _repeats(model, trace)
    for group in groups:
        for p in group.parameters:
            if p.aliases:
                yield f"tied weights, all in group {group.name!r}: {' = '.join(p.names)}"
    if trace.added:
        yield f"the forward pass adds or replaces modules: {_list(trace.added)}"


def _repeats(model: nn.Module, trace: Trace) -> Iterator[str]:
    told: set[int] = set()
    for name, module in model.named_modules():
        count = trace.calls.get(name, 0)
        if count > 1 and id(module) not in told and any(True for _ in module.parameters()):
            told |= {id(m) for m in module.modules()}
            how = ", on its own output" if name in trace.looped else ""
            yield f"{name} ran {count} times{how}; placed at its first run"


def _list(names: Sequence[str]) -> str:
    return few(names, most=NAMES_SHOWN)
