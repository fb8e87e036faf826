"""The frozen region of a model: found, computed apart, and left out.

Example:
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> batch = Example.of(torch.randn(6, 4))
    >>> region = find_region(model, batch)
    >>> region.skipped
    ('0', '1')
    >>> rows = region.fill(batch)
    >>> torch.equal(region.run(batch, rows), model(*batch.args))
    True
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frostline.backends.torch.digest import unwrapped
from frostline.backends.torch.example import Example
from frostline.backends.torch.tracing import is_compiled, leave_untouched, uncompiled
from frostline.errors import FrontierError
from frostline.frontier.arrays import sent
from frostline.frontier.finding import (
    LENIENCE,
    Found,
    Opened,
    Pattern,
    analyse,
    batch_size,
    close,
    record,
    rows_of,
)
from frostline.frontier.pieces import Pieces
from frostline.frontier.script import ReplayDiverged, Spec, Unsettled, Verdict, call_name
from frostline.frontier.sessions import (
    AllFilled,
    Filler,
    Recorder,
    Refiller,
    Replayer,
    hooks_on_values,
    overridden,
    real_leaves,
)
from frostline.frontier.state import (
    Settings,
    hook_tables,
    ignoring_known_hooks,
    is_foreign,
)
from frostline.frontier.structure import leaves_of, map_leaves, tensors_of
from frostline.frontier.taint import KeptWrites

__all__ = [
    "Ending",
    "Region",
    "ReplayDiverged",
    "Slot",
    "difference",
    "find_region",
    "gradient_difference",
]

#: By the names of the parameters that have one.
Gradients = Mapping[str, Tensor]

#: Floating-point operations done in the time in which a stored byte is read, about: 20 GFLOP/s on
#: one core against 1 GB/s, checksum included.
_WORK_PER_BYTE = 20
#: Samples that a region is found and rehearsed with.
_REHEARSED = 4
#: Recordings made with some modules taken as a whole, before everything is looked into.
_ROUNDS = 5
_LIVE_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001
#: Pairs of samples for further recordings, which must take the same path as the first. No sample
#: has the same company in all, none is in all of them (of four samples), and ranks change.
_PAIRS = (((2, 0), (3, 1)), ((1, 0), (3, 2)), ((2, 1), (3, 0)))
_PAIRS_OF_THREE = (((2, 0), (0, 1)), ((1, 0), (2, 1)), ((2, 0), (1, 2)))


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the frontier, stored per sample.

    Attributes:
        name: what makes it, e.g. "layer3" or "flatten"; "input" for a tensor of the batch.
        number: its number in the recording.
        shape: of one sample, in the example it was found with.
        dtype: of the value.
        pattern: where the samples are in the value.
    """

    name: str
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    pattern: Pattern

    @property
    def bytes(self) -> int:
        """Bytes per sample of this shape."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a module that holds frozen work is run and not skipped.

    Attributes:
        module: its name.
        why: for people.
    """

    module: str
    why: str


@dataclass(slots=True)
class _Tape:
    """What values look like for one kind of batch, and those that are the same for all samples."""

    specs: dict[int, Spec]
    constants: dict[int, Tensor]
    samples: int


def find_region(
    model: nn.Module,
    example: Example,
    *,
    split: Collection[str] = (),
    live: Collection[str] = (),
) -> Region:
    """Find what of a model need not be computed again, under its present state.

    Frozen is what depends on no parameter that requires grad, on no random number and on no
    statistic of the batch. The model runs a few times on three samples and is left as it was.

    Args:
        model: as it is trained: `requires_grad` and modes as the plan sets them.
        example: a batch of at least 3 different samples, samples first.
        split: names of modules that must be skipped by themselves, not inside a larger one.
        live: names of parameters that count as trained, though they do not require grad now.

    Raises:
        FrontierError: the model cannot be replayed; says which module and why.
    """
    root = unwrapped(model)
    _check_kind(model)
    size = batch_size(example)
    if size < 3:
        raise FrontierError(
            "find the frozen region",
            found=f"a batch of {size}, in which samples cannot be told apart",
            fix="a batch of at least 3 samples",
        )
    example = rows_of(example, range(min(_REHEARSED, size)))
    failures: list[FrontierError] = []
    pairs = _PAIRS if size > 3 else _PAIRS_OF_THREE
    # Modules that are frozen altogether are first tried as a whole; hooks known to be harmless
    # are ignored, unless the rehearsal shows that they do something.
    for attempt, whole, ignore in (
        (pairs[0][1:], True, True),
        (pairs[0], False, True),
        (pairs[0], False, False),
        (pairs[1], False, True),
        (pairs[2], False, True),
    ):
        try:
            with leave_untouched(root) as keep, ignoring_known_hooks(ignore), uncompiled():
                first = _first_pass(root, example, keep)
                recorded = partial(_recorded, root, example, attempt, keep, split, live)
                names = _frozen_modules(root, split, live) if whole else frozenset[str]()
                region = _looked_into(recorded, names)
            region.settle(first.writes)
            rehearse(region, example, first)
        except Unsettled:
            raise
        except FrontierError as error:
            failures.append(error)
        else:
            return region
    # What a module looked into says is the better reason.
    raise failures[1]


@dataclass(frozen=True, slots=True)
class _Pass:
    """The model's own pass over the few samples: what a replay must give as well.

    Attributes:
        result: (output, gradients by the names of the parameters).
        writes: parameters that it wrote to.
        reentrant: whether its graph runs through reentrant checkpoints.
    """

    result: Any
    writes: tuple[str, ...]
    reentrant: bool


def _first_pass(root: nn.Module, example: Example, keep: Callable[[Tensor], None]) -> _Pass:
    """Run the model as it is: it swaps modules and fills caches now, and not when recorded."""
    own = rows_of(example, range(batch_size(example)))
    watch = KeptWrites(root, keep)
    with _explained(f"run {type(root).__name__} on a few samples"):
        with watch:
            output = root(*own.args, **own.kwargs)
        reentrant = _reentrant(output)
        return _Pass((output, _gradients(output, root)), tuple(watch.written), reentrant)


@contextmanager
def _explained(asked: str) -> Iterator[None]:
    """Whatever a model raises, as a `FrontierError`."""
    try:
        yield
    except (FrontierError, Opened):
        raise
    except Exception as error:
        raise FrontierError(
            asked,
            found=f"{type(error).__name__}: {_first_line(error)}",
            fix="nothing to do: the full forward pass is taken",
        ) from error


def rehearse(region: Region, example: Example, first: _Pass) -> None:
    """Run the model without its frozen part on a few samples, and compare with its full pass.

    Outputs, and the gradients of a loss over them, must agree. The model is left as it was.

    Args:
        region: of the model.
        example: the samples.
        first: the full pass over them.

    Raises:
        FrontierError: they do not; says in what.
    """
    if region.wants_gradients and first.reentrant:
        raise FrontierError(
            "replay the frozen region",
            found="reentrant gradient checkpointing, which asks stored values for gradients",
            fix="gradient checkpointing with use_reentrant=False",
        )
    rows = region.fill(example)
    region.check_recorded(rows)
    output, gradients = region.observed(lambda own: region.run(own, rows), example)
    wrong = difference(first.result[0], output) or gradient_difference(first.result[1], gradients)
    if wrong is not None:
        raise FrontierError(
            "replay the frozen region",
            found=f"the rehearsal on {batch_size(example)} samples went wrong: {wrong}",
            fix="nothing to do: the full forward pass is taken",
        )


def difference(one: Any, other: Any) -> str | None:
    """What two outputs of a model differ in beyond rounding, in words; None if in nothing."""
    a, b = leaves_of(one).items, leaves_of(other).items
    if len(a) != len(b):
        return f"{len(b)} values come out where the full forward pass gives {len(a)}"
    for place, (x, y) in enumerate(zip(a, b, strict=True)):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return f"output {place} is a {type(y).__name__}, not a {type(x).__name__}"
        if not isinstance(x, Tensor):
            if isinstance(x, (int, float, str)) and x != y:
                return f"output {place} is {y!r}, not {x!r}"
        elif x.shape != y.shape:
            return f"output {place} has shape {tuple(y.shape)}, not {tuple(x.shape)}"
        elif not close(x.detach(), y.detach(), lenience=LENIENCE):
            worst = float((x.detach().double() - y.detach().double()).abs().max())
            return f"output {place} is off by {worst:.3g}"
    return None


def gradient_difference(one: Gradients, other: Gradients) -> str | None:
    """Which gradient differs beyond rounding, in words; None if none does.

    What a norm or softmax takes out again, such as a bias before batch norm, has a gradient that
    is rounding and nothing else. It is judged by the largest gradient of its module.
    """
    if one.keys() != other.keys():
        return "other parameters get gradients than in the full forward pass"
    scales: dict[str, float] = {}
    for name, gradient in one.items():
        owner = name.rpartition(".")[0]
        scales[owner] = max(scales.get(owner, 0.0), _largest(gradient))
    for name, gradient in one.items():
        twin, scale = other[name], scales[name.rpartition(".")[0]]
        if not close(gradient, twin, lenience=LENIENCE, scale=scale):
            worst = float((gradient.double() - twin.double()).abs().max())
            return f"the gradient of {name} is off by {worst:.3g}"
    return None


def _largest(value: Tensor) -> float:
    """The largest finite number in it, without its sign; 0 where there is none."""
    finite = value.to_dense().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def _looked_into(recorded: Callable[[frozenset[str]], Region], names: frozenset[str]) -> Region:
    """The region by some recordings of few samples.

    Modules taken as a whole are looked into where one recording shows that it is needed; where
    that takes too many recordings, everything is looked into by the caller's next attempt.

    Args:
        recorded: gives the region with these modules taken as a whole, or raises `Opened`.
        names: of modules to begin with.
    """
    for _ in range(_ROUNDS):
        try:
            return recorded(names)
        except Opened as error:
            names -= error.names
    raise FrontierError(
        "record the frozen region",
        found="frozen modules that have to be looked into",
        fix="nothing to do: the full forward pass is taken",
    )


def _frozen_modules(
    root: nn.Module, split: Collection[str], live: Collection[str]
) -> frozenset[str]:
    """Names of modules in which nothing trains and nothing has to be kept apart."""
    trained = {n for n, p in root.named_parameters(remove_duplicate=False) if p.requires_grad}
    apart = {name.partition("#")[0].removesuffix(".*") for name in split}
    # What is to be kept apart inside of a module may be the module's own code.
    own = {name.removesuffix(".*") for name in split if name.endswith(".*")}
    # Not worth a try: these are live in training.
    odd = {n for n, m in root.named_modules() if isinstance(m, torch.jit.ScriptModule)
           or (m.training and isinstance(m, _LIVE_IN_TRAINING))}  # fmt: skip
    inner = {*trained, *live, *apart, *odd}
    around = {name[:place] for name in inner for place, c in enumerate(name) if c == "."}
    return frozenset(n for n, _ in root.named_modules() if n) - around - own - odd


def _recorded(
    root: nn.Module,
    example: Example,
    pairs: Sequence[tuple[int, int]],
    keep: Callable[[Tensor], None],
    split: Collection[str],
    live: Collection[str],
    whole: frozenset[str],
) -> Region:
    three = rows_of(example, (0, 1, 2))
    with _explained(f"record the frozen region of {type(root).__name__}"):
        one = record(root, three, keep, live, whole)
        others = [
            (
                record(root, rows_of(example, pair), keep, live, whole, counts=False),
                [(sample, place) for place, sample in enumerate(pair) if sample < 3],
            )
            for pair in pairs
        ]
    found = analyse(root, one, others, split)
    tape = _Tape(
        dict(one.recorder.specs),
        {n: one.recorder.values[n] for n in found.constants},
        one.samples,
    )
    return Region(root, found, three, tape, one.recorder)


def _trains(module: nn.Module) -> bool:
    """Whether a module is run in each step; compiled ones are operations only if they train."""
    return is_compiled(module) or any(p.requires_grad for p in module.parameters())


def _check_kind(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise FrontierError(
            "replay the frozen region of a DataParallel model",
            found="threads that share one model",
            fix="DistributedDataParallel, one process per device",
        )


class Region:
    """A frozen region and how to do without it. Made by `find_region`.

    Attributes:
        slots: what is stored per sample.
        skipped: module calls that are left out, "layer1", or "layer1#2" for a second call.
        ends: modules with frozen work that are run all the same, and why.
        frozen_share: share of the forward pass's floating-point operations that is frozen, [0, 1].
        frozen_work: frozen floating-point operations per sample.
    """

    def __init__(
        self,
        root: nn.Module,
        found: Found,
        example: Example,
        tape: _Tape,
        recorder: Recorder,
    ) -> None:
        self._root = root
        self.frozen_share = recorder.frozen_share
        self.frozen_work = recorder.frozen_work // tape.samples
        self._found = found
        self._names = _input_names(example)
        self._tapes: dict[Any, _Tape] = {self._signature(example): tape}
        self._modules = {name: root.get_submodule(name) for name in found.script.skipped}
        opaque = {name: root.get_submodule(name) for name in found.script.scripted}
        trained = {name for name, module in opaque.items() if _trains(module)}
        self._modules |= {name: m for name, m in opaque.items() if name not in trained}
        self._sent = {**self._modules, **opaque}
        self.slots = self._make_slots(tape)
        self.skipped = tuple(
            entry.title for entry in found.script.entries if entry.verdict is Verdict.CALL
        )
        self.ends = tuple(Ending(module, why) for module, why in found.ends)
        self._recorded = {
            slot.name: slot.pattern.split(recorder.values[slot.number], tape.samples)
            for slot in self.slots
        }
        self._by_number = {slot.number: slot for slot in self.slots}
        self._settings = Settings(self._settled())
        self._writes: tuple[str, ...] = ()
        self._evaluating = [
            inner
            for module in self._modules.values()
            for inner in module.modules()
            if not inner.training
        ]
        self._may_look = any(
            e.verdict in (Verdict.LOOK, Verdict.EAGER) for e in found.script.entries
        )
        self._largest = _REHEARSED
        self._pieces = Pieces()
        self._given = _given_alike(example)
        self._with_grad = torch.is_grad_enabled()
        self._keeps = [(vars(root.get_submodule(name)), key) for name, key in recorder.kept]
        self._hooked = {
            name: module
            for name, module in root.named_modules()
            if name and any(is_foreign(h) for table in hook_tables(module) for h in table.values())
        }
        skipped = {id(inner) for module in self._modules.values() for inner in module.modules()}
        homes = {name.rpartition(".")[0] for name in recorder.written}
        self._buffered = [
            (module, name in homes, tuple(module.buffers(recurse=False)))
            for name, module in root.named_modules()
            if id(module) not in skipped and any(True for _ in module.buffers(recurse=False))
        ]

    @property
    def empty(self) -> bool:
        """Whether nothing is left out in a replay: no module call, no use of a parameter."""
        return not self.skipped and not any(
            entry.weighted and entry.verdict is Verdict.GLUE for entry in self._found.script.entries
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules whose work is skipped, their submodules included."""
        names = []
        for name, module in self._modules.items():
            names += [f"{name}.{inner}" if inner else name for inner, _ in module.named_modules()]
        for entry in self._found.script.entries:
            if entry.verdict in (Verdict.GLUE, Verdict.EAGER):
                names.append(entry.where)
        return tuple(dict.fromkeys(names))

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of modules that are run although operations of their own belong to the region."""
        work = (Verdict.GLUE, Verdict.EAGER, Verdict.LOOK)
        places = [e.where for e in self._found.script.entries if e.verdict in work]
        return tuple(dict.fromkeys(places))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of frozen parameters and buffers that the region reads."""
        names = dict.fromkeys(
            f"{name}.{inner}"
            for name, module in self._modules.items()
            for inner, _ in (*module.named_parameters(), *module.named_buffers())
        )
        for place in self.passed:
            module = self._root.get_submodule(place)
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            frozen = (inner for inner, tensor in own if not tensor.requires_grad)
            names |= dict.fromkeys(f"{place}.{inner}" if place else inner for inner in frozen)
        return tuple(names)

    @property
    def bytes(self) -> int:
        """Bytes of all slots per sample of the example's shape."""
        return sum(slot.bytes for slot in self.slots)

    @property
    def gain(self) -> float:
        """Share of a training step that not computing the frozen part saves, by counted work.

        A step is one forward pass and a backward pass of twice the live part's work; reading
        counts as much as the arithmetic that could be done meanwhile. Counted, not timed: the same
        on each run.
        """
        f = self.frozen_share
        reading = self.bytes * _WORK_PER_BYTE
        kept = 1 - reading / self.frozen_work if self.frozen_work else 0.0
        return f * kept / (f + 3 * (1 - f)) if f else 0.0

    @property
    def input_slots(self) -> frozenset[str]:
        """Names of the slots that are tensors of the batch: not needed where the batch is."""
        return frozenset(s.name for s in self.slots if s.number < self._found.script.inputs)

    def row_shape(self, slot: Slot, example: Example) -> tuple[int, ...]:
        """The shape of one row of a slot in a batch like this one.

        Raises:
            ReplayDiverged: the model takes another path for this batch.
        """
        tape = self._tape(example)
        meta = tape.specs[slot.number].meta()
        return tuple(slot.pattern.split(meta, tape.samples).shape[1:])

    def settle(self, writes: Collection[str] = ()) -> None:
        """Call once when the model is as it was before the recording.

        Args:
            writes: parameters that the first pass wrote to.

        Raises:
            Unsettled: a frozen module has a state that it gets in its first pass only; skipped,
                it would not get it.
        """
        self._writes = tuple(writes)
        moved = self._settings.keep_lasting()
        inside = tuple(f"{name}." for name in self._modules)
        if lost := next((n for n in (*writes, *moved) if n.startswith(inside)), None):
            raise Unsettled(
                "replay the frozen region",
                found=f"{lost} becomes what it will be in the model's first forward pass",
                fix="run the model on one batch in the mode in which it is trained",
            )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """`leave_untouched` for passes of this model, the parameters that they write included."""
        with leave_untouched(self._root) as keep:
            for name in self._writes:
                keep(self._root.get_parameter(name))
            yield

    def again(self, example: Example) -> Region:
        """The same region in the model's present modes, rehearsed: for evaluation after training.

        For a fraction of the price of finding it, where every frozen layer is in it, and none
        that was in evaluation mode has begun to train.

        Args:
            example: a batch of at least one sample.

        Raises:
            FrontierError: it is another region in these modes, or may be.
        """
        # Evaluation only switches chance and the statistics of batches off, training also on.
        here = not any(module.training for module in self._evaluating)
        if not here or not self.holds_all_frozen:
            raise FrontierError(
                "use the frozen region in other modes",
                found="frozen layers outside of it, or in training mode where they were not",
                fix="find the region again",
            )
        twin: Region = copy.copy(self)
        twin._tapes = dict(self._tapes)
        twin._recorded = {}  # of other samples
        twin._with_grad = torch.is_grad_enabled()
        twin._given = _given_alike(example)
        few = rows_of(example, range(min(_REHEARSED, batch_size(example))))
        with leave_untouched(self._root) as keep:
            first = _first_pass(self._root, few, keep)
            twin._settings = Settings(twin._settled())
        twin.settle(first.writes)
        rehearse(twin, few, first)
        return twin

    def is_twin_of(self, other: Region) -> bool:
        """Whether one of them comes from the other by `again`."""
        return self._found is other._found

    @property
    def holds_all_frozen(self) -> bool:
        """Whether every layer whose parameters are all frozen is skipped, or code of it is."""
        inside = tuple(f"{name}." for name in self._modules)
        passed = set(self.passed)
        for name, module in self._root.named_modules():
            own = list(module.parameters(recurse=False))
            frozen = bool(own) and not any(p.requires_grad for p in own)
            if frozen and name not in passed and not f"{name}.".startswith(inside):
                return False
        return True

    @property
    def wants_gradients(self) -> bool:
        """Whether the model's own code asks frozen values for gradients."""
        script = self._found.script
        return bool(script.grads) or any(e.verdict is Verdict.GRAD for e in script.entries)

    @property
    def root(self) -> nn.Module:
        """The model."""
        return self._root

    def observed(self, run: Callable[[Example], Any], example: Example) -> tuple[Any, Gradients]:
        """What a pass gives, gradients included, leaving the model and random streams as they are.

        Returns:
            (output, gradients of the trained parameters by name).

        Raises:
            FrontierError: the pass failed.
        """
        own = rows_of(example, range(batch_size(example)))
        with self.untouched():
            try:
                output = run(own)
                return output, _gradients(output, self._root)
            except FrontierError:
                raise
            except Exception as error:
                raise FrontierError(
                    "rehearse the replay of the frozen region",
                    found=f"{type(error).__name__}: {_first_line(error)}",
                    fix="nothing to do: the full forward pass is taken",
                ) from error

    # -- compute -----------------------------------------------------------------------------

    def fill(self, example: Example) -> dict[str, Tensor]:
        """Compute the frozen part only, and give what is to be stored: (N, ...) by slot name.

        The model is left as it was.

        Args:
            example: a batch of any number of samples.

        Raises:
            ReplayDiverged: the model took another path than when it was recorded.
        """
        return self.fill_many([example])[0]

    def fill_many(self, examples: Iterable[Example]) -> list[dict[str, Tensor]]:
        """The same for several batches, in less time than one by one.

        Setting the model back takes some milliseconds, and is done once for all of them.
        """
        done: list[dict[str, Tensor]] = []
        with self.untouched(), torch.set_grad_enabled(self._with_grad):
            for example in examples:
                self._check_given(example)
                done.append(self._in_pieces(example))
        return done

    def _in_pieces(self, example: Example) -> dict[str, Tensor]:
        """The rows of a batch, computed as many at a time as takes less time."""
        samples = batch_size(example)
        size = self._pieces.size(samples)
        start = time.perf_counter()
        if size == samples:
            rows = self._rows(example)
            self._pieces.add(samples, time.perf_counter() - start)
            if samples > self._largest:
                self._check_company(example, rows)
            return rows
        pieces = [rows_of(example, range(at, at + size)) for at in range(0, samples, size)]
        with suppress(FrontierError, RuntimeError):  # the model looks at what a batch is made of
            parts = [self._rows(piece) for piece in pieces]
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._pieces.add(samples, time.perf_counter() - start)
            return rows
        self._pieces.forbid()
        return self._in_pieces(example)

    def _rows(self, example: Example) -> dict[str, Tensor]:
        """What is to be stored of a batch, by slot name."""
        kept, samples = self._filled(example), batch_size(example)
        return {s.name: s.pattern.split(kept[s.number], samples).contiguous() for s in self.slots}

    def check_recorded(self, rows: Mapping[str, Tensor]) -> None:
        """Compare the rows of the first samples with those of the recording, in other company.

        Raises:
            FrontierError: a row depends on how many others there are, or on which.
        """
        for name, recorded in self._recorded.items():
            if rows[name].shape[1:] == recorded.shape[1:]:
                self._require_same(name, rows[name][: len(recorded)], recorded)

    @staticmethod
    def _require_same(name: str, one: Tensor, other: Tensor) -> None:
        if not close(one, other):
            raise FrontierError(
                "store the frozen region by sample",
                found=f"the output of {name!r} depends on the other samples of a batch",
                fix="nothing to do: the full forward pass is taken",
            )

    def _check_given(self, example: Example) -> None:
        """What every sample is given alike must be what it was in the recording."""
        given = _given_alike(example)
        same = len(given) == len(self._given) and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(self._given, given, strict=True)
        )
        if not same:
            raise ReplayDiverged(
                "replay the frozen region",
                found="an argument that is the same for all samples has another value",
                fix="nothing to do: this batch takes the full forward pass",
            )

    def _check_company(self, example: Example, rows: Mapping[str, Tensor]) -> None:
        """Compute a few rows of the largest batch so far again by themselves.

        Raises:
            FrontierError: a row depends on how many others there are, or on which.
        """
        samples = self._largest = batch_size(example)
        few = list(range(0, samples, max(1, min(4, samples // 4))))
        alone = self._rows(rows_of(example, few))
        exact = all(t.device.type == "cpu" for t in tensors_of((example.args, example.kwargs)))
        for name, apart in alone.items():
            among = rows[name][few]
            self._require_same(name, among, apart)
            exact = exact and torch.equal(among, apart)
        # To the bit, so that what is stored does not depend on the clock.
        self._pieces.allow(len(few) if exact else 0, whole=samples)

    def _filled(self, example: Example) -> dict[int, Tensor]:
        wanted = frozenset(self._by_number) | self._found.constants
        filler = Filler(self._found.script, wanted, stop=True)
        self._go(example, filler)
        if missing := wanted - filler.kept.keys():
            raise ReplayDiverged(
                "fill the frozen region",
                found=f"the model ended without computing {len(missing)} values",
                fix="nothing to do: the full forward pass is taken",
            )
        self._remember(example, filler)
        return filler.kept

    def _go(self, example: Example, session: Filler) -> None:
        count = iter(range(self._found.script.inputs))

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            own = leaf.detach().clone()
            return session.input(next(count), own)

        args, kwargs = map_leaves((example.args, dict(example.kwargs)), wrap, objects=True)
        try:
            with overridden(self._sent, session.call), hooks_on_values(self._hooked):
                self._root(*args, **kwargs)
        except (AllFilled, FrontierError) as end:
            if isinstance(end, FrontierError):
                raise
        except Exception as error:
            raise _failed("fill", error) from error
        finally:
            session.open = False

    def _remember(self, example: Example, filler: Filler) -> None:
        """What values look like in a batch of this kind."""
        signature = self._signature(example)
        missing = {n for e in self._found.script.entries for n in e.made} - filler.specs.keys()
        if signature in self._tapes or missing - self._after_slots():
            return
        constants = {n: filler.kept[n] for n in self._found.constants}
        specs = dict(filler.specs)
        for number in missing:
            specs[number] = self._any_tape().specs[number]
        self._tapes[signature] = _Tape(specs, constants, batch_size(example))

    def refill(
        self, shallower: Region, example: Example, rows: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What `fill` gives, computed from the stored rows of a shallower region.

        Only what lies between the two frontiers runs.

        Args:
            shallower: a region of the same model, all of whose skipped calls are skipped here by
                themselves: find this one with `split=shallower.parts`.
            example: the batch, or one that looks like it.
            rows: (N, ...) by slot name of the shallower region.

        Raises:
            ReplayDiverged: the model took another path than when it was recorded.
            FrontierError: something is needed that the shallower region did not store.
        """
        samples = batch_size(example)
        tape = self._tape(example)
        keys = self._places()
        stored = {
            place: shallower._by_number[number]
            for place, number in shallower._places().items()
            if number in shallower._by_number
        }
        at = {keys[place]: slot for place, slot in stored.items() if place in keys}

        def get(number: int) -> Callable[[], Tensor] | None:
            if (slot := at.get(number)) is not None and slot.name in rows:
                shape = slot.pattern.shape(tape.specs[number], samples)
                return lambda: _placed(rows[slot.name], slot, tape.specs[number], shape)
            if number in self._found.constants:
                return tape.constants[number].clone
            return None

        metas = _Metas(tape, self._found.patterns, samples)
        session = Refiller(self._found.script, get, metas, frozenset(self._by_number))
        args, kwargs = self._stand_ins(example, session)
        with (
            self.untouched(),
            torch.set_grad_enabled(self._with_grad),
            overridden(self._sent, session.call),
            hooks_on_values(self._hooked),
        ):
            with suppress(AllFilled):
                self._root(*args, **kwargs)
            kept = {number: node.real().detach() for number, node in session.kept.items()}
            session.open = False
        return {
            slot.name: slot.pattern.split(kept[slot.number], samples).contiguous()
            for slot in self.slots
            if slot.number in kept
        }

    @property
    def parts(self) -> tuple[str, ...]:
        """What a deeper region must keep apart, to be filled from this one: for `split`."""
        calls = (entry.what[0] for entry in self._found.script.entries
                 if entry.verdict is Verdict.CALL)  # fmt: skip
        return (*dict.fromkeys(calls), *(f"{name}.*" for name in self.passed if name))

    def _places(self) -> dict[Any, int]:
        """Numbers of values by what makes them, which is the same in other regions."""
        seen: dict[Any, int] = {}
        found: dict[Any, int] = {("input", i): i for i in range(self._found.script.inputs)}
        for entry in self._found.script.entries:
            if entry.verdict is Verdict.CALL:
                key: Any = entry.what
            else:
                title = (entry.where, str(getattr(entry.what, "__name__", entry.what)))
                seen[title] = seen.get(title, 0) + 1
                key = (*title, seen[title])
            found.update({(key, i): number for i, number in enumerate(entry.made)})
        return found

    def changed(self) -> str | None:
        """The name of a setting of its modules that is no longer what it was, or None."""
        return self._settings.changed()

    # -- replay ------------------------------------------------------------------------------

    def run(
        self,
        example: Example,
        rows: Mapping[str, Tensor],
        *,
        forward: Callable[..., Any] | None = None,
        known: bool = False,
    ) -> Any:
        """Run the model with the frozen part left out.

        Args:
            example: the batch; only its shapes and what the live part reads of it are used.
            rows: (N, ...) by slot name, as `fill` gave them for these samples.
            forward: what to call instead of the model.
            known: `changed` has just been asked.

        Returns:
            The model's output.

        Raises:
            ReplayDiverged: the model took another path than recorded; what the attempt changed
                (random streams, buffers) was put back.
        """
        if not known and (name := self._settings.changed()) is not None:
            raise ReplayDiverged(
                "replay the frozen region",
                found=f"{name} is no longer what it was when the region was found",
                fix="find the region again",
            )
        self._check_given(example)
        samples = batch_size(example)
        tape = self._tape(example)
        session = self._replayer(rows, tape, samples)
        args, kwargs = self._stand_ins(example, session)
        call = self._root if forward is None else forward
        with (
            self.undoing(),
            overridden(self._sent, session.call),
            hooks_on_values(self._hooked),
        ):
            try:
                output = real_leaves(call(*args, **kwargs))
                self._settle_attributes()
            except FrontierError:
                raise
            except Exception as error:  # the full forward pass will tell if it is the model's own
                raise _failed("replay", error) from error
            finally:
                session.open = False
        return output

    def _settle_attributes(self) -> None:
        """Real tensors where the model keeps values of this pass as attributes."""
        for table, key in self._keeps:
            table[key] = real_leaves(table[key])

    def _replayer(self, rows: Mapping[str, Tensor], tape: _Tape, samples: int) -> Replayer:
        found = self._found

        def get(number: int) -> Callable[[], Tensor] | None:
            if (slot := self._by_number.get(number)) is not None:
                shape = slot.pattern.shape(tape.specs[number], samples)
                return lambda: _placed(rows[slot.name], slot, tape.specs[number], shape)
            if number in found.constants:
                return tape.constants[number].clone
            return None

        metas = _Metas(tape, found.patterns, samples)
        return Replayer(found.script, get, metas, found.needed)

    def _stand_ins(self, example: Example, session: Replayer) -> tuple[Any, Any]:
        count = iter(range(self._found.script.inputs))

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            number = next(count)
            return session.input(number, None if leaf.is_meta else leaf)

        return map_leaves((example.args, dict(example.kwargs)), wrap, objects=True)

    def _tape(self, example: Example) -> _Tape:
        signature = self._signature(example)
        if signature not in self._tapes:
            size = batch_size(example)
            few = rows_of(example, tuple(range(min(2, size))))
            if any(t.is_meta for t in tensors_of((few.args, dict(few.kwargs)))):
                raise ReplayDiverged(
                    "replay the frozen region",
                    found="a batch of another shape than seen before, without its values",
                    fix="give the real batch",
                )
            self._learn(few)
        return self._tapes[signature]

    def _learn(self, example: Example) -> None:
        wanted = frozenset(self._by_number) | self._found.constants
        filler = Filler(self._found.script, wanted, stop=False)
        with self.untouched(), torch.set_grad_enabled(self._with_grad):
            self._go(example, filler)
        self._remember(example, filler)

    def _signature(self, example: Example) -> Any:
        """What a batch has in common with others: all but the number of samples."""
        leaves = leaves_of((example.args, dict(example.kwargs))).items
        size = batch_size(example)
        kinds = tuple(
            (tuple(x.shape[1:]) if x.ndim and len(x) == size else tuple(x.shape), x.dtype)
            if isinstance(x, Tensor)
            else str(x)
            for x in leaves
        )
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        )
        return kinds, size == 1, tuple(example.kwargs), autocast

    # -- inside ------------------------------------------------------------------------------

    def _any_tape(self) -> _Tape:
        return next(iter(self._tapes.values()))

    def _make_slots(self, tape: _Tape) -> tuple[Slot, ...]:
        script, slots, used = self._found.script, [], set[str]()
        for number in self._found.slots:
            pattern, spec = self._found.patterns[number], tape.specs[number]
            producer = script.producers.get(number)
            name = self._names[number] if producer is None else _slot_name(producer, number)
            base, again = name, 1
            while name in used:
                again += 1
                name = f"{base}~{again}"
            used.add(name)
            shape = tuple(pattern.split(spec.meta(), tape.samples).shape[1:])
            slots.append(Slot(name, number, shape, spec.dtype, pattern))
        return tuple(slots)

    def _settled(self) -> dict[str, nn.Module]:
        """The modules whose settings the stored values depend on: skipped ones, and around."""
        known = dict(self._root.named_modules(remove_duplicate=False))
        found: dict[str, nn.Module] = {"": self._root}
        for name in self.modules:
            found[name] = known[name]
            while name := name.rpartition(".")[0]:
                found[name] = known[name]
        return found

    def _after_slots(self) -> set[int]:
        """Values made when all slots are known."""
        wanted = set(self._by_number) | self._found.constants
        after: set[int] = set()
        for entry in self._found.script.entries:
            if not wanted:
                after.update(entry.made)
            wanted.difference_update(entry.made)
        return after

    @contextmanager
    def undoing(self) -> Iterator[Callable[[], None]]:
        """Put random streams and buffers back on divergence, or when the yielded function says."""
        cpu = torch.get_rng_state()
        others = (random.getstate(), np.random.get_state()) if self._may_look else None  # noqa: NPY002
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        buffers = [
            (b, b.detach().clone())
            for module, written, own in self._buffered
            if written or module.training
            for b in own
        ]

        def undo() -> None:
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state_all(cuda)
            if others is not None:
                random.setstate(others[0])
                np.random.set_state(others[1])  # noqa: NPY002
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

        try:
            yield undo
        except ReplayDiverged:
            undo()
            raise


class _Metas:
    """What values look like in a batch of some number of samples."""

    def __init__(self, tape: _Tape, patterns: Mapping[int, Pattern], samples: int) -> None:
        self._tape, self._patterns, self._samples = tape, patterns, samples

    def __call__(self, number: int) -> tuple[Tensor, torch.device]:
        spec = self._tape.specs[number]
        pattern = self._patterns.get(number)
        if pattern is None or pattern.dim < 0:
            return spec.meta(), spec.device
        return spec.meta(pattern.shape(spec, self._samples)), spec.device


def _placed(rows: Tensor, slot: Slot, spec: Spec, shape: tuple[int, ...]) -> Tensor:
    """Stored rows as the value that the model expects: on its device, in its shape and layout."""
    value = slot.pattern.joined(sent(rows, spec.device, spec.dtype))
    if tuple(value.shape) != shape:
        value = _fitted(value, shape)
    if spec.stride is None:
        return value.contiguous()
    out = torch.empty_like(spec.meta(shape), device=spec.device)
    return out.copy_(value)


def _fitted(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cut, or padded by zeros at the end, to another length."""
    for dim, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if have > want:
            value = value.narrow(dim, 0, want)
        elif have < want:
            pad = list(value.shape)
            pad[dim] = want - have
            value = torch.cat([value, value.new_zeros(pad)], dim)
    return value


def _reentrant(output: Any) -> bool:
    """Whether the graph of an output runs through reentrant checkpoints."""
    waiting = [t.grad_fn for t in tensors_of(output) if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            return True
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        waiting += following
    return False


def _gradients(output: Any, model: nn.Module) -> Gradients:
    """Gradients of a loss that weighs every number of the output differently."""
    outputs = [t for t in tensors_of(output) if t.requires_grad and t.is_floating_point()]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not outputs or not trained:
        return {}
    loss = torch.stack(
        [
            (t.float() * torch.arange(t.numel(), device=t.device).sin().reshape(t.shape)).sum()
            for t in outputs
        ]
    ).sum()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, found, strict=True) if g is not None}


def _given_alike(example: Example) -> list[Any]:
    """The arguments that are not one per sample: numbers, flags, tensors without samples."""
    size = batch_size(example)
    leaves = leaves_of((example.args, dict(example.kwargs))).items
    return [
        leaf
        for leaf in leaves
        if (isinstance(leaf, Tensor) and not leaf.is_meta and (not leaf.ndim or len(leaf) != size))
        or isinstance(leaf, (int, float, str, bool, type(None)))
    ]


def _failed(what: str, error: Exception) -> ReplayDiverged:
    return ReplayDiverged(
        f"{what} the frozen region",
        found=f"{type(error).__name__}: {_first_line(error)}",
        fix="nothing to do: this batch takes the full forward pass",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _slot_name(producer: Any, number: int) -> str:
    if producer.verdict is Verdict.CALL:
        base = call_name(*producer.what)
    else:
        function = getattr(producer.what, "__name__", "value")
        base = f"{producer.where}:{function}" if producer.where else function
    place = producer.made.index(number)
    return base if len(producer.made) == 1 else f"{base}[{place}]"


def _input_names(example: Example) -> list[str]:
    names = []
    for place, value in enumerate(example.args):
        names += [f"input {place}"] * len(list(tensors_of(value)))
    for key, value in example.kwargs.items():
        names += [f"input {key}"] * len(list(tensors_of(value)))
    return names
