"""Run a model once and write down what ran when, leaving the model exactly as it was.

Definition order says nothing about execution order, so one real forward pass is watched from two
sides. A global module hook sees every module call; a dispatch mode sees every tensor operation
and with it the first use of each parameter and buffer, however it is used (by a layer, by a
function, inside TorchScript, through `.data`). The same mode follows which block's output reached
which block's input, so that blocks in a chain can be told from parallel ones (attention heads,
experts).
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from frostline.errors import ModelError

__all__ = [
    "COMPILED_CALL",
    "HOLDS_NO_TENSOR",
    "Trace",
    "Use",
    "check_runnable",
    "is_compiled",
    "leave_untouched",
    "private_batch",
    "run_model",
    "tensors_in",
    "trace_model",
    "uncompiled",
]

#: Types of most values that operations are given and modules hold: soon asked.
HOLDS_NO_TENSOR = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})


@dataclass(frozen=True, slots=True)
class Use:
    """The first use of a parameter or buffer.

    Attributes:
        tick: position in the order of all events of the pass, >= 0.
        inside: names of the modules running at that moment, outermost first.
    """

    tick: int
    inside: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one forward pass did. Names are the first of each module or tensor.

    Attributes:
        calls: times each module ran; absent means never.
        entered: tick of the first call of each module that ran.
        uses: first use of each parameter and buffer that was used.
        upstream: for each module that ran, the modules whose output it read, directly or through
            other operations, in its first call.
        looped: modules that ran again on what they had computed before.
        added: modules that exist only after the pass, by the name they then have.
    """

    calls: Mapping[str, int]
    entered: Mapping[str, int]
    uses: Mapping[str, Use]
    upstream: Mapping[str, frozenset[str]]
    looped: frozenset[str] = frozenset()
    added: tuple[str, ...] = ()


def check_runnable(model: nn.Module) -> None:
    """Raise unless the model has parameters and all of them hold values.

    Raises:
        ModelError: no parameters, lazy ones, or ones on the meta device.
    """
    tensors = dict(model.named_parameters())
    kind = type(model).__name__
    if not tensors:
        raise ModelError(
            f"find layer groups in {kind}",
            found="a model without parameters",
            fix="pass the module that holds the weights",
        )
    if lazy := [name for name, p in tensors.items() if is_lazy(p)]:
        raise ModelError(
            f"find layer groups in {kind}",
            found=f"lazy parameters without a shape yet: {', '.join(lazy[:3])}",
            fix="run one batch through the model first",
        )
    if meta := [name for name, p in tensors.items() if p.is_meta]:
        raise ModelError(
            f"find layer groups in {kind}",
            found=f"parameters on the meta device, which hold no values: {', '.join(meta[:3])}",
            fix="load the weights first (model.to_empty(device=...) and load_state_dict)",
        )


def trace_model(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trace:
    """Run `model(*args, **kwargs)` in evaluation mode and record what happens.

    Weights, buffers, modes, hooks, attributes, gradients and global random states are afterwards
    what they were.

    Raises:
        ModelError: the model cannot run on this batch.
    """
    check_runnable(model)
    with leave_untouched(model) as keep:
        recorder = _Recorder(model, keep)
        with recorder.watching():
            run_model(model, args, kwargs)
    return recorder.trace()


def run_model(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run in evaluation mode without gradients, on private copies of the batch.

    Changes modes and random state: call it inside `leave_untouched`.

    Raises:
        ModelError: the model cannot run on this batch.
    """
    # The flags are set one by one: `eval()` is overridden in models that merge weights in it.
    for module in model.modules():
        module.training = False
    own_args, own_kwargs = private_batch(model, args, kwargs)
    try:
        with torch.no_grad(), uncompiled():
            return model(*own_args, **own_kwargs)
    except Exception as error:
        shapes = _describe((tuple(args), dict(kwargs)))
        raise ModelError(
            f"run {type(model).__name__} on a batch of {shapes}",
            found=f"{type(error).__name__}: {_first_line(error)}",
            fix="pass a batch the model accepts: Example(args=(...,), kwargs={...})",
        ) from error


@contextmanager
def leave_untouched(model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """Restore the model and all global random states on leaving, whatever happened inside.

    Yields a function that must be called with a parameter before its values are overwritten
    (buffers are always copied beforehand; weights only on demand, since they may be large).
    """
    undo = [*_saved_random_states(), *(_saved_attributes(m) for m in model.modules())]
    buffers = {id(b): (b, b.detach().clone()) for b in model.buffers() if not is_lazy(b)}
    owners = {id(p): p for p in model.parameters()}
    parameters = [_saved_parameter(p) for p in owners.values()]
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(tensor: Tensor) -> None:
        if id(tensor) in owners and id(tensor) not in copies:
            copies[id(tensor)] = (tensor, tensor.detach().clone())

    try:
        yield keep
    finally:
        for restore in (*undo, *parameters):
            restore()
        with torch.no_grad():
            for tensor, before in (*buffers.values(), *copies.values()):
                if not _same_bits(tensor, before):
                    # Not counted as a write: a backward pass may be waiting for these values.
                    tensor.data.copy_(before)


class _Recorder(TorchDispatchMode):
    """Writes down module calls and tensor uses of one forward pass."""

    def __init__(self, model: nn.Module, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._keep = keep
        self._model = model
        self._modules = {id(m): name for name, m in model.named_modules()}
        self._tensors = {id(t): (name, t) for name, t in _named_tensors(model)}
        self._storages = _unshared_storages(self._tensors.values())
        self._stack: list[str] = []
        self._tick = 0
        self._calls: dict[str, int] = {}
        self._entered: dict[str, int] = {}
        self._uses: dict[str, Use] = {}
        # Sets of modules as bit masks: one bit per module.
        self._bits = {name: 1 << i for i, name in enumerate(self._modules.values())}
        self._upstream: dict[str, int] = {}
        self._looped: set[str] = set()
        self._added: tuple[str, ...] = ()
        self._origin = WeakTensorKeyDictionary()

    def trace(self) -> Trace:
        """What was recorded."""
        upstream = {
            name: frozenset(other for other, bit in self._bits.items() if bit & seen)
            for name, seen in self._upstream.items()
        }
        return Trace(
            self._calls, self._entered, self._uses, upstream, frozenset(self._looped), self._added
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record until left. The hooks are global, so the model's own hooks are not touched."""
        with ExitStack() as stack:
            enter = register_module_forward_pre_hook(self._enter)
            stack.callback(enter.remove)
            leave = register_module_forward_hook(self._leave, always_call=True)
            stack.callback(leave.remove)
            stack.enter_context(self)
            yield
        now = self._model.named_modules()
        self._added = tuple(name for name, m in now if id(m) not in self._modules)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the tensors an operation reads, and pass it on."""
        kwargs = kwargs or {}
        read = list(tensors_in((args, kwargs)))
        written = {id(t) for t in _written(func, args, kwargs)}
        for tensor in read:
            self._note(tensor, written=id(tensor) in written)
        result = func(*args, **kwargs)
        self._spread(read, result)
        return result

    def _note(self, tensor: Tensor, *, written: bool) -> None:
        known = self._tensors.get(id(tensor)) or self._storages.get(_storage(tensor))
        if known is None:
            return
        name, owner = known
        if written:
            # Weights that a model rescales in place are not thereby used (RWKV).
            self._keep(owner)
        elif name not in self._uses:
            self._uses[name] = Use(self._next(), tuple(self._stack))

    def _spread(self, read: Sequence[Tensor], result: Any) -> None:
        origin = functools.reduce(operator.or_, (self._origin.get(t) or 0 for t in read), 0)
        if not origin:
            return
        for name in self._stack:
            if self._calls[name] == 1:
                self._upstream[name] = self._upstream.get(name, 0) | origin
            elif origin & self._bits[name]:
                self._looped.add(name)
        for tensor in tensors_in(result):
            self._mark(tensor, origin)

    def _mark(self, tensor: Tensor, origin: int) -> None:
        if id(tensor) not in self._tensors:
            self._origin[tensor] = origin | (self._origin.get(tensor) or 0)

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        name = self._modules.get(id(module))
        if name is None:
            return
        self._stack.append(name)
        self._calls[name] = self._calls.get(name, 0) + 1
        if name not in self._entered:
            self._entered[name] = self._next()

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        name = self._modules.get(id(module))
        if name is None:
            return
        if self._stack and self._stack[-1] == name:
            self._stack.pop()
        for tensor in tensors_in(output):
            self._mark(tensor, self._bits[name])

    def _next(self) -> int:
        self._tick += 1
        return self._tick


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operator overwrites."""
    # The schema is the only place that says whether an operator writes to an argument; operator
    # overloads have no public accessor for it (pytorch's own dispatch modes read it like this).
    if func._schema.is_mutable:  # noqa: SLF001
        yield from tensors_in((args[:1], kwargs.get("out")))


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _unshared_storages(
    tensors: Iterator[tuple[str, Tensor]] | Any,
) -> dict[int, tuple[str, Tensor]]:
    """Tensors by the address of their storage, where no other shares it: finds `.data`."""
    found: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if address := _storage(tensor):
            found.setdefault(address, []).append((name, tensor))
    return {address: owners[0] for address, owners in found.items() if len(owners) == 1}


def _storage(tensor: Tensor) -> int:
    """Address of a plain tensor's storage; 0 where there is none."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain or tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in HOLDS_NO_TENSOR:
        return
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def private_batch(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the batch on the model's device: some models write into their input."""
    devices = {p.device for p in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None

    def copy(tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        return own if device is None else own.to(device)

    return _map_tensors((tuple(args), dict(kwargs)), copy)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value


#: Where `nn.Module.compile` leaves what is called in place of the module's own code; private
#: upstream, and there is no public way to ask.
COMPILED_CALL = "_compiled_call_impl"


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module go through `torch.compile`, as a wrapper or in place.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> is_compiled(layer), is_compiled(torch.compile(layer))
        (False, True)
        >>> layer.compile()
        >>> is_compiled(layer)
        True
    """
    # No public way to ask of what was compiled in place; a wrapper has one child of this name.
    own = vars(module)
    return own.get(COMPILED_CALL) is not None or "_orig_mod" in own.get("_modules", ())


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules as plain ones: compiled code hides modules from hooks."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        # A compiled module reports its own call besides the original's; nothing counts it twice.
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
        yield


def _saved_random_states() -> list[Callable[[], Any]]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    undo: list[Callable[[], Any]] = [
        lambda: random.setstate(python),
        lambda: np.random.set_state(numpy),  # noqa: NPY002
        lambda: torch.set_rng_state(cpu),
    ]
    if torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        undo.append(lambda: torch.cuda.set_rng_state_all(cuda))
    if torch.backends.mps.is_available():
        mps = torch.mps.get_rng_state()
        undo.append(lambda: torch.mps.set_rng_state(mps))
    return undo


_CONTAINERS = frozenset({dict, OrderedDict, list, set, deque})
#: What most attributes of modules are: asking these is half the time of a copy.
_NO_GENERATORS = frozenset({*_CONTAINERS, *HOLDS_NO_TENSOR, tuple})


def _saved_attributes(module: nn.Module) -> Callable[[], None]:
    """Undo for everything assigned on the module, or put into containers it holds directly.

    That covers the training flag, parameters, buffers, submodules, hooks, and the caches and
    flags that some models set in their forward pass.
    """
    training = module.training
    attributes = vars(module)
    before = dict(attributes)
    contents: list[tuple[Any, Any]] = []
    generators: list[Callable[[], Any]] = []
    for value in before.values():
        kind = type(value)
        if kind in _CONTAINERS:  # most are tables of hooks without any: nothing to copy
            contents.append((value, value.copy() if value else ()))
        elif kind not in _NO_GENERATORS and (undo := _saved_generator(value)):
            generators.append(undo)

    def restore() -> None:
        if module.training != training:
            module.training = training
        if not _same_items(attributes, before):
            attributes.clear()
            attributes.update(before)
        for container, items in contents:
            if container or items:
                _refill(container, items)
        for undo in generators:
            undo()

    return restore


def _saved_generator(value: Any) -> Callable[[], Any] | None:
    """Undo for draws from a generator that a module keeps for itself."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.Generator):
        numpy = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", numpy)
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    return None


def _refill(container: Any, items: Any) -> None:
    if not items:
        container.clear()
    elif isinstance(container, dict):
        if not _same_items(container, items):
            container.clear()
            container.update(items)
    elif isinstance(container, set):
        container.clear()
        container.update(items)
    elif len(container) != len(items) or any(
        a is not b for a, b in zip(container, items, strict=True)
    ):
        container.clear()
        container.extend(items)


def _same_items(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))


def _saved_parameter(parameter: Tensor) -> Callable[[], None]:
    """Undo for the gradient, the trainable flag, and a replaced `.data`."""
    gradient, trainable = parameter.grad, parameter.requires_grad
    values = None if is_lazy(parameter) else parameter.data

    def restore() -> None:
        if values is not None and parameter.data_ptr() != values.data_ptr():
            parameter.data = values
        if parameter.requires_grad != trainable:
            parameter.requires_grad_(trainable)
        if parameter.grad is not gradient:
            parameter.grad = gradient

    return restore


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.layout is not torch.strided:
        return False
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


def _describe(value: Any) -> str:
    shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(value)]
    return ", ".join(shapes) or "no tensors"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
