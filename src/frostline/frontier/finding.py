"""From two recordings of a model to a script, and to what has to be stored.

Two recordings of few samples, in other company and other number, tell which values belong to one
sample each, which are the same for all, and which mix the samples of a batch. What mixes is
never stored: it is computed again from what does not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.tracing import tensors_in
from frostline.errors import FrontierError
from frostline.frontier.script import Call, Entry, Script, Spec, Verdict, call_name, same_constants
from frostline.frontier.sessions import (
    NO_SAMPLE,
    TRAINS,
    Recorder,
    hooks_on_values,
    overridden,
)
from frostline.frontier.standin import StandIn, version_of
from frostline.frontier.structure import attributes_of, leaves_of, map_leaves, tensors_of
from frostline.frontier.taint import Looks, Taint, held_by

__all__ = [
    "LENIENCE",
    "Found",
    "Opened",
    "Pattern",
    "Recording",
    "analyse",
    "batch_size",
    "close",
    "record",
    "rows_of",
    "tolerance",
]

#: Largest difference between a sample's values in two batches, as a share of the largest value:
#: what other company does to the rounding of matrix products, and some room.
_TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: The same for float32 that is computed in fewer bits, by the names that torch gives them: the
#: mantissas of TF32 and float16 have equal length.
_REDUCED = {"tf32": _TOLERANCE[torch.float16], "bf16": _TOLERANCE[torch.bfloat16]}
#: How much more may have come together where outputs of whole models are compared.
LENIENCE = 30
#: No difference above this share of the largest value is taken for rounding there.
_MOST = 0.1


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where the samples are in a value.

    Attributes:
        dim: the dimension along which samples lie, -1 for a value that is the same for all.
        each: entries of that dimension per sample.
    """

    dim: int
    each: int = 1

    def split(self, value: Tensor, samples: int) -> Tensor:
        """Samples first: (N, ...)."""
        moved = value.movedim(self.dim, 0)
        if self.each == 1:
            return moved
        return moved.reshape(samples, self.each, *moved.shape[1:])

    def joined(self, rows: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.each != 1:
            rows = rows.reshape(-1, *rows.shape[2:])
        return rows.movedim(0, self.dim)

    def shape(self, spec: Spec, samples: int) -> tuple[int, ...]:
        """The shape for a number of samples."""
        if self.dim < 0:
            return spec.shape
        return (*spec.shape[: self.dim], samples * self.each, *spec.shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded pass.

    Attributes:
        recorder: what it saw.
        outputs: numbers of the values in the model's output and in its modules' attributes.
        samples: how many samples it had.
    """

    recorder: Recorder
    outputs: frozenset[int]
    samples: int


@dataclass(frozen=True, slots=True)
class Found:
    """What analysing the recordings gave.

    Attributes:
        script: what to follow.
        patterns: where the samples are, by value; values that mix samples are absent.
        slots: numbers of the values to store, in order.
        constants: numbers of the values that are the same for every sample.
        needed: numbers of the values that may have to be computed from slots.
        ends: (module, why) of the calls that could not be skipped although they hold frozen work.
    """

    script: Script
    patterns: Mapping[int, Pattern]
    slots: tuple[int, ...]
    constants: frozenset[int]
    needed: frozenset[int]
    ends: tuple[tuple[str, str], ...]


class Opened(Exception):
    """Modules that were taken as a whole have to be looked into.

    Attributes:
        names: of these modules.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = frozenset(names)


def batch_size(example: Example) -> int:
    """Samples in a batch: the first dimension of its first tensor.

    Raises:
        FrontierError: no tensor with a dimension.
    """
    for tensor in tensors_of((example.args, dict(example.kwargs))):
        if tensor.ndim:
            return len(tensor)
    raise FrontierError(
        "find the samples of a batch",
        found="no tensor among the model's arguments",
        fix="a model that is called with tensors whose first dimension is the sample",
    )


def rows_of(example: Example, rows: Sequence[int]) -> Example:
    """Some samples of a batch; tensors without the batch's first dimension stay whole."""
    size = batch_size(example)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size:
            return leaf[list(rows)]
        return leaf

    args, kwargs = map_leaves((example.args, dict(example.kwargs)), take, objects=True)
    return Example(args, kwargs)


def record(
    model: nn.Module,
    example: Example,
    keep: Callable[[Tensor], None],
    live: Collection[str] = (),
    whole: Collection[str] = (),
    *,
    counts: bool = True,
) -> Recording:
    """Run the model as it is on a few samples and write down what happens.

    Call it inside `leave_untouched`.

    Args:
        model: to run.
        example: a few samples.
        keep: called with a parameter before it is written to.
        live: names of parameters that count as trained, whatever they say.
        whole: names of modules to run as a whole.
        counts: whether to count floating-point operations.

    Raises:
        Opened: some of these have to be looked into.
        FrontierError: the model cannot be replayed.
    """
    args, kwargs = map_leaves((example.args, dict(example.kwargs)), _own, objects=True)
    taint = Taint(model, list(tensors_in((args, kwargs))), keep, counts=counts)
    taint.mark([p for n, p in model.named_parameters(remove_duplicate=False) if n in live])
    recorder = Recorder(model, taint, whole)
    modules = {name: module for name, module in model.named_modules() if name}
    wrap = lambda leaf: recorder.input(leaf) if isinstance(leaf, Tensor) else leaf  # noqa: E731
    ins = map_leaves((args, kwargs), wrap, objects=True)
    versions = [version_of(t) for t in tensors_in((args, kwargs))]
    with overridden(modules, recorder.call), hooks_on_values(modules), Looks(taint), taint:
        output = model(*ins[0], **ins[1])
    if versions != [version_of(t) for t in tensors_in((args, kwargs))]:
        raise FrontierError(
            "replay the frozen region",
            found="the model writes into the batch it is given",
            fix="x = x * 2 instead of x.mul_(2), or nothing: the full forward pass is taken",
        )
    attributes = [(name, key, value) for name, module in model.named_modules()
                  for key, value in held_by(module)]  # fmt: skip
    for value in (leaves_of(output).items, *(value for *_, value in attributes)):
        taint.belongs_inside(value)
    if opened := recorder.opened | taint.escaped:
        raise Opened(opened)
    leaving = set(_frozen_in(leaves_of(output).items))
    _check_fresh(leaves_of(output).items)
    if hidden := set(stand_ins_anywhere(output)) - leaving:
        raise FrontierError(
            "replay the frozen region",
            found=f"the model's output holds {len(hidden)} values of frozen layers inside an "
            "object (a cache of keys and values)",
            fix="call the model with use_cache=False",
        )
    for name, key, value in attributes:
        if kept := set(_frozen_in(tensors_in(value))):
            _check_fresh(tensors_in(value))
            leaving |= kept
            recorder.kept.append((name, key))
    recorder.open = False
    return Recording(recorder, frozenset(leaving), batch_size(example))


def stand_ins_anywhere(value: Any, depth: int = 8) -> Iterator[int]:
    """Numbers of frozen values in a value and, unlike `leaves_of`, deep inside its objects."""
    if type(value) is StandIn:
        if not value.node.live:
            yield value.node.id
    elif depth == 0 or isinstance(value, (Tensor, nn.Module)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from stand_ins_anywhere(item, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from stand_ins_anywhere(item, depth - 1)
    else:
        for item in attributes_of(value).values():
            yield from stand_ins_anywhere(item, depth - 1)


def _own(leaf: Any) -> Any:
    """A private copy: some models write into their input."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _check_fresh(leaves: Iterable[Any]) -> None:
    """Raise if a frozen value that leaves the model was overwritten through another tensor."""
    for leaf in leaves:
        frozen = type(leaf) is StandIn and not leaf.node.live
        if frozen and version_of(leaf.node.real()) != leaf.node.version:
            raise FrontierError(
                "replay the frozen region",
                found="the model gives out a value that was overwritten through another tensor",
                fix="nothing to do: the full forward pass is taken",
            )


def _frozen_in(leaves: Iterable[Any]) -> Iterable[int]:
    return (x.node.id for x in leaves if type(x) is StandIn and not x.node.live)


def tolerance(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """Largest relative difference that other company in a batch may make; 0 for whole numbers.

    A GPU picks its kernels by the sizes of a batch, and torch lets it compute convolutions of
    float32 in TF32, of 10 bits, unless told not to. Autocast shortens what a float32 is made of.

    Args:
        dtype: of the value.
        device: where it was computed; None: on the processor.

    Example:
        >>> tolerance(torch.float32), tolerance(torch.int64)
        (3e-05, 0.0)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     tolerance(torch.float32)
        0.03
    """
    own = _TOLERANCE.get(dtype, 0.0 if not dtype.is_floating_point else 6e-2)
    if not own or dtype == torch.float64:
        return own
    kind = "cpu" if device is None else device.type
    coarse = [own]
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        coarse.append(_TOLERANCE.get(torch.get_autocast_dtype(kind), own))
    if dtype == torch.float32:
        coarse += [_REDUCED.get(name, own) for name in _float32_precisions(kind)]
    return max(coarse)


def _float32_precisions(kind: str) -> tuple[str, ...]:
    """In what float32 is computed on a kind of device: "ieee", "tf32", "bf16" or "none"."""
    found: Any = torch.backends
    if kind == "cuda":
        of = found.cuda.matmul, found.cudnn.conv, found.cudnn.rnn
    else:
        of = found.mkldnn.matmul, found.mkldnn.conv, found.mkldnn.rnn
    return tuple(str(part.fp32_precision) for part in of)


class _Unfit(Exception):
    """A chosen call cannot be skipped after all."""

    def __init__(self, call: int, why: str) -> None:
        super().__init__(why)
        self.call, self.why = call, why


def analyse(
    model: nn.Module,
    one: Recording,
    others: Sequence[tuple[Recording, Sequence[tuple[int, int]]]],
    split: Collection[str] = (),
) -> Found:
    """What to skip, what to store and what to compute again.

    Args:
        model: the model recorded.
        one: the first recording.
        others: recordings of another number of samples, in other company; with each the pairs of
            (place in `one`, place there) of the same samples.
        split: names of modules that must be skipped by themselves, not inside a larger one.

    Raises:
        FrontierError: the recordings differ in more than numbers, or a frozen value was
            overwritten through another tensor.
    """
    for other, _ in others:
        _check_insides(one.recorder, other.recorder)
        _check_same_path(one.recorder, other.recorder)
    other = others[0][0]
    shapes = _shapes(one, other)
    mixed = _mixed(one.recorder, shapes)
    patterns = {
        number: pattern
        for number, pattern in shapes.items()
        if number not in mixed
        and all(_agrees(number, pattern, one, twin, shared) for twin, shared in others)
    }
    unfit: dict[int, str] = {}
    while True:
        chosen = _choose(one.recorder.calls, unfit, frozenset(split))
        try:
            script = _script(model, one, chosen)
            _compute_at_once(script, shapes, one.recorder)
            _mark_varying(script, other.recorder)
            slots, constants, needed = _slots(script, patterns, one.recorder)
        except _Unfit as error:
            if error.call in one.recorder.insides:
                raise Opened({one.recorder.calls[error.call].name}) from None
            unfit[error.call] = error.why
        else:
            break
    ends = _ends(one.recorder, chosen, unfit)
    return Found(script, patterns, slots, constants, needed, ends)


def _check_same_path(one: Recorder, other: Recorder) -> None:
    for a, b in zip(one.entries, other.entries, strict=False):
        same = a.what == b.what and a.parents == b.parents and a.made == b.made
        if not same or a.verdict is not b.verdict:
            raise FrontierError(
                "record the frozen region",
                found=f"the model takes another path for other samples: {a.title}, {b.title}",
                fix="nothing to do: the full forward pass is taken",
            )
    if len(one.entries) != len(other.entries) or len(one.calls) != len(other.calls):
        raise FrontierError(
            "record the frozen region",
            found="the model does more for some samples than for others",
            fix="nothing to do: the full forward pass is taken",
        )


def _check_insides(one: Recorder, other: Recorder) -> None:
    """Raise if a module that ran as a whole did other things for another number of samples.

    A value that samples decide, and whose shape is the same for any number of them, holds a fact
    about the whole batch: its maximum, a flag. What follows from it may mix samples, even if it
    did not in these few.
    """
    if one.insides.keys() != other.insides.keys():
        raise Opened({r.calls[i].name for r in (one, other) for i in r.insides})
    opened: set[str] = set()
    for number, inside in one.insides.items():
        steps, twins = inside.steps, other.insides[number].steps
        same = len(steps) == len(twins) and all(
            a[0] is b[0] and a[2] == b[2] for a, b in zip(steps, twins, strict=True)
        )
        alike = same and any(
            a[2] and b[2] and any(x == y for x, y in zip(a[1], b[1], strict=True))
            for a, b in zip(steps, twins, strict=True)
        )
        if not same or alike:
            opened.add(one.calls[number].name)
    if opened:
        raise Opened(opened)


def _inputs(recorder: Recorder) -> int:
    """How many values come with the batch: the first ones."""
    return next((min(e.made) for e in recorder.entries if e.made), len(recorder.specs))


def _mixed(recorder: Recorder, shapes: Mapping[int, Pattern]) -> set[int]:
    """Values that follow from a fact about the whole batch, as `_check_insides` has it.

    Samples may be mixed by it, though they were not in the few that were recorded.
    """
    alike = {number for number, pattern in shapes.items() if pattern.dim < 0}
    inputs = _inputs(recorder)
    free = _free_of_values(recorder.entries) | (alike & set(range(inputs)))
    mixed: set[int] = set()
    for entry in recorder.entries:
        if free.issuperset(entry.made):
            continue
        if not mixed.isdisjoint(entry.parents):
            mixed.update(entry.made)
        elif not free.issuperset(entry.parents):
            mixed.update(alike.intersection(entry.made) - free)
    return mixed


def _shapes(one: Recording, other: Recording) -> dict[int, Pattern]:
    """Where the samples would be, by shape alone; absent where the shape depends on values."""
    found: dict[int, Pattern] = {}
    for number, value in one.recorder.values.items():
        twin = other.recorder.values[number]
        pattern = _pattern(value, twin, one.samples, other.samples)
        if pattern is not None:
            found[number] = pattern
    return found


def _pattern(value: Tensor, twin: Tensor, samples: int, others: int) -> Pattern | None:
    if value.dtype != twin.dtype or value.ndim != twin.ndim:
        return None
    dims = [d for d, (a, b) in enumerate(zip(value.shape, twin.shape, strict=True)) if a != b]
    if not dims:
        return Pattern(-1)
    if len(dims) > 1:
        return None
    dim = dims[0]
    each, rest = divmod(value.shape[dim], samples)
    fits = not rest and each * others == twin.shape[dim]
    return Pattern(dim, each) if fits else None


def _agrees(
    number: int,
    pattern: Pattern,
    one: Recording,
    other: Recording,
    shared: Sequence[tuple[int, int]],
) -> bool:
    """Whether a value belongs to its samples alone, or is the same for all."""
    value, twin = one.recorder.values[number], other.recorder.values[number]
    if pattern.dim < 0:
        return _equal_bits(value, twin)
    if _pattern(value, twin, one.samples, other.samples) != pattern:
        return False
    a, b = pattern.split(value, one.samples), pattern.split(twin, other.samples)
    return all(close(a[i], b[j]) for i, j in shared)


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def close(one: Tensor, other: Tensor, *, lenience: float = 1.0, scale: float = 0.0) -> bool:
    """Whether two computations of one value agree within `lenience` times `tolerance`.

    Args:
        one: the value, on the device where it is computed.
        other: the value, computed again; on the same device.
        lenience: at least 1; more never allows above a tenth of the largest value.
        scale: of what was added up to the value, where that may cancel: its rounding is allowed
            once, without lenience.
    """
    if one.shape != other.shape:
        return False
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    real = one.dtype if not one.dtype.is_complex else torch.float32
    once = tolerance(real, one.device)
    allowed = min(lenience * once, _MOST)
    if not allowed:
        return bool(torch.equal(one, other))
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (one, other))
    # Infinities and the lowest number of a mask say nothing of the size of the others.
    ordinary = a.abs() < torch.finfo(real).max / 16
    if not ordinary.all():
        if not torch.allclose(b[~ordinary], a[~ordinary], rtol=allowed, atol=0, equal_nan=True):
            return False
        a, b = a[ordinary], b[ordinary]
    largest = float(a.abs().max()) if a.numel() else 0.0
    most = max(allowed * largest, once * scale, 1e-30)
    return bool(((a - b).abs() <= most).all())


def _choose(calls: Sequence[Call], unfit: Mapping[int, str], split: frozenset[str]) -> set[int]:
    """The outermost calls that can be skipped."""
    chosen: set[int] = set()
    for index, call in enumerate(calls):
        if any(around in chosen for around in call.around):
            continue
        holds = any(name != call.name and name.startswith(call.name + ".") for name in split)
        works = call.end > call.begin and call.unfit is None and call.entry is not None
        if works and not holds and index not in unfit:
            chosen.add(index)
    return chosen


def _script(model: nn.Module, recording: Recording, chosen: set[int]) -> Script:
    recorder = recording.recorder
    events: list[tuple[int, int, Entry]] = []
    for index in chosen:
        call = recorder.calls[index]
        if call.entry is not None:
            events.append((call.begin, 0, replace(call.entry)))
    for place, entry in enumerate(recorder.entries):
        if not chosen.intersection(entry.calls):
            events.append((place, 1, replace(entry)))
    events.sort(key=lambda event: event[:2])
    inputs = _inputs(recorder)
    entries = [entry for _, _, entry in events]
    _check_available(recorder, entries, recording.outputs, chosen, inputs)
    skipped: dict[str, set[int]] = {}
    for index in chosen:
        call = recorder.calls[index]
        skipped.setdefault(call.name, set()).add(call.number)
    scripted = frozenset(
        n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)
    )
    scripted |= recorder.opaque
    return Script(
        tuple(entries),
        {name: frozenset(numbers) for name, numbers in skipped.items()},
        inputs,
        scripted,
        recording.outputs,
        frozenset(recorder.grads),
    )


def _check_available(
    recorder: Recorder,
    entries: Sequence[Entry],
    outputs: frozenset[int],
    chosen: set[int],
    inputs: int,
) -> None:
    """Every value read must be an input or come out of something that is not skipped."""
    there = set(range(inputs))
    for entry in entries:
        if entry.stale:
            raise FrontierError(
                "replay the frozen region",
                found=f"{entry.title} reads a value that was overwritten through another tensor",
                fix="nothing to do: the full forward pass is taken",
            )
        for number in entry.parents:
            if number not in there:
                raise _escaped(recorder, number, chosen)
        there.update(entry.made)
    for number in outputs - there:
        raise _escaped(recorder, number, chosen)


def _escaped(recorder: Recorder, number: int, chosen: set[int]) -> Exception:
    for entry in recorder.entries:
        if number in entry.made:
            for index in entry.calls:
                if index in chosen:
                    return _Unfit(index, "hands a value on by another way than its result")
    return FrontierError(
        "replay the frozen region",
        found="a value of unknown origin",
        fix="nothing to do: the full forward pass is taken",
    )


def _compute_at_once(script: Script, shapes: Collection[int], recorder: Recorder) -> None:
    """What has a shape that only its values tell is computed, never made up."""
    for entry in script.entries:
        if all(number in shapes for number in entry.made):
            continue
        if entry.verdict is Verdict.CALL:
            raise _Unfit(_index(recorder, entry), "returns tensors whose shape depends on values")
        if entry.verdict is Verdict.GLUE:
            entry.verdict = Verdict.EAGER


def _mark_varying(script: Script, other: Recorder) -> None:
    """Arguments that are other numbers for another number of samples are not compared."""
    calls = {(c.name, c.number): c.entry for c in other.calls}
    twins: dict[Any, Any] = {}
    for entry in other.entries:
        twins.setdefault((str(entry.what), entry.parents, entry.made), []).append(entry)
    for entry in script.entries:
        if entry.verdict is Verdict.CALL:
            twin = calls.get(entry.what)
        else:
            same = twins.get((str(entry.what), entry.parents, entry.made))
            twin = same.pop(0) if same else None
        entry.varying = twin is None or not same_constants(entry.constants, twin.constants)


def _slots(
    script: Script, patterns: Mapping[int, Pattern], recorder: Recorder
) -> tuple[tuple[int, ...], frozenset[int], frozenset[int]]:
    """Which needed values to store, which are constant, which to compute from the others."""
    reads = (Verdict.LIVE, Verdict.LOOK, Verdict.EAGER)  # a wish for a gradient reads nothing
    wanted = {p for e in script.entries if e.verdict in reads for p in e.parents} | script.outputs
    skips, free = _behind_skips(script), _free_of_values(script.entries)
    slots: set[int] = set()
    constants: set[int] = set()
    computed: set[int] = set()

    def settle(number: int) -> None:
        if number in slots or number in constants or number in computed:
            return
        pattern, producer = patterns.get(number), script.producers.get(number)
        if producer is None:
            if pattern is not None and pattern.dim >= 0:
                slots.add(number)
            else:  # not one per sample: taken from the batch, and compared with the recorded one
                computed.add(number)
        elif pattern is not None and pattern.dim < 0 and number in free:
            constants.add(number)
        elif producer.verdict is Verdict.CALL:
            if pattern is None or pattern.dim < 0:
                raise _Unfit(_index(recorder, producer), "mixes the samples of a batch, or chance")
            slots.add(number)
        else:
            known = slots | constants | computed
            stored = pattern is not None and pattern.dim >= 0 and producer.verdict is Verdict.GLUE
            if stored and number in skips and not known.issuperset(producer.parents):
                slots.add(number)
                return
            for parent in producer.parents:
                settle(parent)
            computed.add(number)

    for number in sorted(wanted):
        settle(number)
    return tuple(sorted(slots)), frozenset(constants), frozenset(computed)


#: Functions that read the shape of their argument and no value.
_SHAPE_ONLY = frozenset(
    {torch.zeros_like, torch.ones_like, torch.full_like, Tensor.new_zeros, Tensor.new_ones,
     Tensor.new_full, Tensor.new_tensor}
)  # fmt: skip


def _free_of_values(entries: Iterable[Entry]) -> set[int]:
    """Values that no sample decides, only shapes: the same for all of one shape.

    That a value was the same in all recordings does not show it: a flag over a batch often is.
    """
    free: set[int] = set()
    for entry in entries:
        shape_only = entry.verdict is Verdict.GLUE and entry.what in _SHAPE_ONLY
        if shape_only or (entry.parents and free.issuperset(entry.parents)):
            free.update(entry.made)
    return free


def _behind_skips(script: Script) -> set[int]:
    """Values that depend on a skipped call, or on a parameter used by a function."""
    found: set[int] = set()
    for entry in script.entries:
        heavy = entry.verdict is Verdict.CALL or entry.weighted
        if heavy or not found.isdisjoint(entry.parents):
            found.update(entry.made)
    return found


def _index(recorder: Recorder, entry: Entry) -> int:
    return next(i for i, c in enumerate(recorder.calls) if (c.name, c.number) == entry.what)


def _ends(
    recorder: Recorder, chosen: set[int], unfit: Mapping[int, str]
) -> tuple[tuple[str, str], ...]:
    """Innermost calls that do some frozen work and still run, with the reason."""
    ends: dict[str, str] = {}
    for index, call in enumerate(recorder.calls):
        why = unfit.get(index) or call.unfit
        if why in (None, TRAINS, NO_SAMPLE) or index in chosen:
            continue
        ends.setdefault(call_name(call.name, call.number), why)
    inner = {
        name: why
        for name, why in ends.items()
        if not any(other.startswith(name + ".") for other in ends)
    }
    return tuple(inner.items())
