"""What is live: everything that depends on a trainable parameter, on chance, or on the batch.

While a model runs, every tensor operation is watched below autograd, where nothing is hidden:
functions, operators of other packages, TorchScript, in-place writes and views all pass here.
Liveness belongs to memory, not to tensor objects, so a view of a live tensor is live, and so is a
frozen one after live code has written into it.

Operations on values whose origin was not seen (memory filled through NumPy, tensors kept in
closures) count as live: what is not known to be frozen is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from frostline.backends.torch.tracing import HOLDS_NO_TENSOR, tensors_in
from frostline.frontier.standin import StandIn

__all__ = ["Inside", "KeptWrites", "Looks", "Streams", "Taint", "held_by"]

_LIFT = torch.ops.aten.lift_fresh.default
_DYNAMIC = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
#: Functions through which values leave PyTorch unseen.
_WAYS_OUT = frozenset(
    getattr(Tensor, name)
    for name in ("numpy", "__array__", "tolist", "item", "__dlpack__", "__bool__", "__float__",
                 "__int__", "__index__", "untyped_storage", "data_ptr")
)  # fmt: skip


@dataclass(slots=True)
class Inside:
    """What happens inside a frozen module that runs as a whole.

    Attributes:
        steps: each operation with the shapes of its results, and whether a sample decides them.
        lived: whether anything in it was live.
        looked: whether code took a value out of PyTorch.
    """

    steps: list[tuple[Any, tuple[tuple[int, ...], ...], bool]] = field(default_factory=list)
    lived: bool = False
    looked: bool = False


class Taint(TorchDispatchMode):
    """Follows liveness through every operation while it is entered.

    Args:
        model: parameters that require grad are live from the start.
        batch: tensors of the batch; those that require grad are live.
        keep: called with a parameter before an operation writes to it.
        counts: whether to count floating-point operations.

    Attributes:
        why: first reason for which something became live, by kind, in words.
        written: names of parameters and buffers that were written to.
        dynamic: whether the shape of some result depended on values; reset by callers.
        work_live: floating-point operations of matrix products and the like that were live.
        work_frozen: the same for those that were not.
        looked: whether code has looked at a live value, so that what it does next may depend on it.
        inside: what happens in the frozen module that runs as a whole now, if one does.
        escaped: names of such modules whose inner values were used outside of them.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Iterable[Tensor],
        keep: Callable[[Tensor], None],
        *,
        counts: bool = True,
    ) -> None:
        super().__init__()
        self._counts = counts
        self._keep = keep
        self._held: list[Any] = []  # nothing is freed, so that no address is used twice
        self._names: dict[int, tuple[str, Tensor]] = {}
        self._live: set[int] = set()
        self._known: set[int] = set()
        self.written: set[str] = set()
        self.why: str | None = None
        self.looked = False
        self.dynamic = False
        self.work_live = 0
        self.work_frozen = 0
        self.streams = Streams()
        self.inside: Inside | None = None
        self.escaped: set[str] = set()
        self._sampled: set[int] = set()
        self._inner: dict[int, str] = {}
        self._made: set[int] = set()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(_memory(tensor), (name, tensor))
        for tensor in (*model.parameters(), *batch):
            if tensor.requires_grad:
                self._mark(tensor)
        for tensor in (*model.parameters(), *model.buffers(), *batch, *_kept_by(model)):
            self._known.add(_memory(tensor))
            self._held.append(tensor)

    def sample(self, tensor: Tensor) -> None:
        """Say that the samples of the batch decide this tensor, and all that follows from it."""
        self._sampled.add(_memory(tensor))

    def is_sampled(self, tensor: Tensor) -> bool:
        """Whether the samples of the batch decide a tensor."""
        return _memory(tensor) in self._sampled

    def enter(self) -> Inside:
        """From now on a frozen module runs as a whole."""
        self.inside = Inside()
        self._made.clear()
        return self.inside

    def leave(self, name: str, results: Iterable[Tensor]) -> None:
        """It has run; what it made, but for its results, is nobody else's."""
        self.inside = None
        own = self._made - {_memory(tensor) for tensor in results}
        self._inner.update(dict.fromkeys(own, name))

    def belongs_inside(self, value: Any) -> bool:
        """Whether a value holds what a module that ran as a whole made and did not return."""
        if not self._inner:
            return False
        memories = map(_memory, tensors_in(value))
        homes = {self._inner[memory] for memory in memories if memory in self._inner}
        self.escaped |= homes
        return bool(homes)

    def is_live(self, value: Any) -> bool:
        """Whether any tensor in a value is live."""
        return any(self._of(tensor) for tensor in tensors_in(value))

    def mark(self, value: Any) -> None:
        """Make all tensors in a value live."""
        for tensor in tensors_in(value):
            self._mark(tensor)

    def take_why(self) -> str | None:
        """The reason noted since the last call."""
        why, self.why = self.why, None
        return why

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and mark what follows from live values."""
        kwargs = kwargs or {}
        read = list(tensors_in((args, kwargs)))
        memories = [_memory(tensor) for tensor in read]
        written = _written(func, args, kwargs)
        live = self._cause(func, args, kwargs, read)
        for tensor in written:
            self._note_write(tensor)
        result, drew = _watched(func, args, kwargs)
        work = _work(func, args, kwargs, result) if self._counts else 0
        if drew and not live:
            self.why = f"draws random numbers ({func.name().removeprefix('aten::')})"
            live = True
        self.work_live += work * live
        self.work_frozen += work * (not live)
        self._held.append(result)
        made = list(tensors_in(result))
        places = {_memory(tensor) for tensor in (*made, *written)} - {0}
        sampled = not self._sampled.isdisjoint(memories)
        if sampled:
            self._sampled |= places
        self._note_place(func, made, memories, places - self._known, live=live, sampled=sampled)
        self._known |= places
        if live:
            self._live |= places
        return result

    def _note_place(
        self, func: Any, made: Sequence[Tensor], memories: Sequence[int], fresh: set[int],
        *, live: bool, sampled: bool,
    ) -> None:  # fmt: skip
        """Keep what is inside a module that runs as a whole apart from all else."""
        if (inside := self.inside) is None:
            if self._inner:
                self.escaped |= {self._inner[m] for m in memories if m in self._inner}
            return
        inside.lived = inside.lived or live
        inside.looked = inside.looked or (sampled and not made)
        # Kernels also return empty tensors, and what seeded ones return besides is no fact.
        shapes = () if _facts(func)[1] else tuple(tuple(t.shape) for t in made if t.numel())
        inside.steps.append((func, shapes, sampled))
        self._made |= fresh

    def _cause(self, func: Any, args: Any, kwargs: Any, read: list[Tensor]) -> bool:
        """Whether what comes out is live, for whatever reason."""
        self.dynamic = self.dynamic or _facts(func)[0]
        if func is _LIFT:  # Python numbers become tensors this way
            read = []
        if any(self._of(tensor) for tensor in read):
            return True
        if _uses_batch_statistics(func, args, kwargs):
            self.why = "normalises by the statistics of the batch"
            return True
        if not read:
            if self.looked:
                self.why = "makes a tensor after looking at a value that trains"
                return True
            self.streams.look()
            return self.streams.moved_here
        return False

    def _of(self, tensor: Tensor) -> bool:
        memory = _memory(tensor)
        if memory in self._live:
            return True
        if memory and memory not in self._known and tensor.numel():
            self._known.add(memory)
            self._held.append(tensor)
            self.why = "uses a tensor whose origin PyTorch does not see (NumPy, a closure)"
            self._live.add(memory)
            return True
        return False

    def _mark(self, tensor: Tensor) -> None:
        if memory := _memory(tensor):
            self._live.add(memory)

    def _note_write(self, tensor: Tensor) -> None:
        if (known := self._names.get(_memory(tensor))) is not None:
            name, owner = known
            self._keep(owner)
            self.written.add(name)


class KeptWrites(TorchDispatchMode):
    """Saves parameters before they are written to, while the model runs for the first time.

    Args:
        model: whose parameters.
        keep: called with one before an operation writes to it.

    Attributes:
        written: names of those that were written to.
    """

    def __init__(self, model: nn.Module, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.written: set[str] = set()
        self._keep = keep
        self._owners = {_memory(p): (name, p) for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Save what the operation writes to, and run it."""
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            if (known := self._owners.get(_memory(tensor))) is not None:
                name, owner = known
                self.written.add(name)
                self._keep(owner)
        return func(*args, **kwargs)


class Looks(TorchFunctionMode):
    """Notices when code takes the value of a live tensor out of PyTorch."""

    def __init__(self, taint: Taint) -> None:
        super().__init__()
        self._taint = taint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the look, and pass the call on."""
        if func in _WAYS_OUT and type(args[0]) is not StandIn:
            taint = self._taint
            if taint.is_live(args[0]):
                taint.looked = True
            if taint.inside is not None and taint.is_sampled(args[0]):
                taint.inside.looked = True
        return func(*args, **(kwargs or {}))


class Streams:
    """The generators of Python and NumPy: whether they have moved, and in whose code.

    Attributes:
        moved_here: whether they moved in the code that runs now.
    """

    def __init__(self) -> None:
        self.moved_here = False
        self._python, self._numpy = random.getstate(), _numpy_state()

    def look(self) -> bool:
        """Whether they moved since the last look."""
        python, numpy = random.getstate(), _numpy_state()
        moved = python != self._python or numpy != self._numpy
        self._python, self._numpy = python, numpy
        self.moved_here = self.moved_here or moved
        return moved


def _watched(func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """The result of an operation, and whether it drew random numbers.

    Attention is marked as random even without dropout, so the generators themselves are asked.
    """
    if not _facts(func)[1]:
        return func(*args, **kwargs), False
    before = _torch_states()
    result = func(*args, **kwargs)
    drew = any(not torch.equal(a, b) for a, b in zip(before, _torch_states(), strict=True))
    return result, drew or kwargs.get("generator") is not None


def _work(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Floating-point operations, for the operators that PyTorch can count."""
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def _torch_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _numpy_state() -> tuple[bytes, int]:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002  what models of others draw from
    return np.asarray(keys).tobytes(), int(position)


def _memory(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none of its own."""
    # Without the modes: they would take this for the model's own look at the tensor.
    with torch._C.DisableTorchFunction():  # noqa: SLF001  no public name
        if tensor.layout is not torch.strided or tensor.is_meta:
            return 0
        return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operator overwrites."""
    found: list[Tensor] = []
    for place, name in _facts(func)[2]:
        found += tensors_in(args[place] if place < len(args) else kwargs.get(name))
    return found


@lru_cache(maxsize=4096)
def _facts(func: Any) -> tuple[bool, bool, tuple[tuple[int, str], ...], bool]:
    """What an operator is known to be, looked up once.

    Returns:
        whether values decide the shape of its result; whether it may draw random numbers; places
        and names of the arguments that it overwrites; whether it is a batch normalisation.
    """
    # Only the schema says what is written, and overloads have no public accessor for it.
    schema = func._schema  # noqa: SLF001
    writes = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    norm = "batch_norm" in func.name() and "backward" not in func.name()
    return (
        bool(_DYNAMIC & set(func.tags)),
        torch.Tag.nondeterministic_seeded in func.tags,
        writes if schema.is_mutable else (),
        norm,
    )


def _uses_batch_statistics(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Batch normalisation in training mode; instance normalisation shows as a batch of one."""
    if not _facts(func)[3]:
        return False
    arguments = func._schema.arguments  # noqa: SLF001  as above
    flags = {a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
             for i, a in enumerate(arguments)}  # fmt: skip
    training = flags.get("training", flags.get("train", "update" in func.name()))
    shape = args[0].shape
    return bool(training) and not (shape[0] == 1 and flags.get("running_mean") is None)


def _kept_by(model: nn.Module) -> Iterable[Tensor]:
    """Tensors that modules keep as plain attributes: constants, caches."""
    for module in model.modules():
        for _, value in held_by(module):
            yield from tensors_in(value)


def held_by(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module that may hold tensors, but for parameters, buffers and submodules."""
    for key, value in vars(module).items():
        if type(value) in HOLDS_NO_TENSOR or key in _OWN_TABLES:
            continue
        # Dictionaries first: asking an abstract class takes longer, and most are tables of hooks.
        if isinstance(value, (Tensor, dict, list, tuple, Mapping)) and (
            isinstance(value, Tensor) or len(value)
        ):
            yield key, value


_OWN_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
