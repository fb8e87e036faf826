"""The probe batch of a model, and what each layer group puts out for it.

The batch is the input of one forward pass in training, kept by a hook that removes itself. The
model runs on it in evaluation mode, without gradients, in the precision (autocast) of the pass it
was taken from, and is afterwards what it was: weights, buffers, modes, hooks, random streams.

What a layer group puts out is the output of the module of the group that finished last (the first
floating-point tensor of it); of a module that runs several times, the last run counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from frostline.backends.torch.digest import unwrapped
from frostline.backends.torch.tracing import leave_untouched, tensors_in, uncompiled
from frostline.errors import BackendError
from frostline.groups import LayerGroups

__all__ = ["ProbeBatch"]

_INT8_STEPS = 127


class ProbeBatch:
    """One batch of one model, kept for signals of activations.

    Args:
        model: the model as it is called: wrappers (`torch.compile`, data-parallel) included.
        groups: its layer groups.
    """

    def __init__(self, model: nn.Module, groups: LayerGroups) -> None:
        self._outer = model
        self._root = unwrapped(model)
        self._sources = _sources(self._root, groups)
        self._inputs: _Inputs | None = None
        self._hook: RemovableHandle | None = None

    def keep_next(self) -> None:
        """Keep the inputs of the next forward pass in training, unless a batch is kept."""
        if self._inputs is None and self._hook is None:
            # On the outermost module: a hook on the inner one would be compiled, twice.
            self._hook = self._outer.register_forward_pre_hook(self._take, with_kwargs=True)

    def to_tree(self) -> dict[str, Any] | None:
        """The batch as plain values and tensors, for a checkpoint."""
        if self._inputs is None:
            return None
        return {f.name: getattr(self._inputs, f.name) for f in dataclasses.fields(_Inputs)}

    def from_tree(self, tree: Mapping[str, Any] | None) -> None:
        """Take back what `to_tree` gave."""
        self._stop_waiting()
        self._inputs = None
        if tree is not None:
            self._inputs = _Inputs(
                tuple(_copied(tuple(tree["args"]))), _copied(tree["kwargs"]), tree["autocast"]
            )

    def outputs(self, *, int8: bool = False) -> dict[str, Tensor]:
        """What each layer group puts out, (samples, features) in single precision, by name.

        Groups that put out nothing usable are absent.

        Args:
            int8: round all weights of two or more dimensions to 8 bits per output channel first.

        Raises:
            BackendError: no batch was kept, or the model cannot run on it in evaluation mode.
        """
        if self._inputs is None:
            raise BackendError(
                "read activations",
                found="no probe batch",
                fix="keep_batch() before a forward pass of the model in training mode; call the "
                "model itself, not its parts",
            )
        inputs, found = self._inputs, dict[str, Tensor]()
        size = next((len(t) for t in tensors_in((inputs.args, inputs.kwargs)) if t.ndim), 0)
        with _running(self._root), inputs.precision(self._root), self._noting(found, size):
            args, kwargs = _copied(inputs.args), _copied(inputs.kwargs)
            try:
                if int8:
                    functional_call(self._root, _rounded(self._root), tuple(args), dict(kwargs))
                else:
                    self._root(*args, **kwargs)
            except Exception as error:
                raise BackendError(
                    f"run {type(self._root).__name__} on its probe batch in evaluation mode",
                    found=f"{type(error).__name__}: {error}",
                    fix="use a policy that reads no activations",
                ) from error
        return found

    def _take(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training:
            self._stop_waiting()
            self._inputs = _Inputs(
                tuple(_copied(tuple(args))), _copied(kwargs), _autocast(self._root)
            )

    def _stop_waiting(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @contextmanager
    def _noting(self, found: dict[str, Tensor], size: int) -> Iterator[None]:
        with ExitStack() as stack:
            for group, modules in self._sources.items():
                for module in modules:
                    handle = module.register_forward_hook(_noter(found, group, size))
                    stack.callback(handle.remove)
            yield


@dataclass(frozen=True, slots=True)
class _Inputs:
    """How the model was called: arguments, and the autocast dtype ("" where it was off)."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: str

    def precision(self, root: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """The precision of that call, whatever is in force now."""
        dtype = getattr(torch, self.autocast) if self.autocast else None
        device = _device_type(root)
        return torch.autocast(device, dtype=dtype, enabled=bool(dtype), cache_enabled=False)


class _Fields(dict[str, Any]):
    """Named inputs that models read as items or as attributes (tokenizer output, dataclasses)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _copied(value: Any) -> Any:
    """Own copies of all tensors in nested arguments; other objects stay as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return _Fields({key: _copied(item) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, tuple):  # named
        return type(value)(*(_copied(item) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return _Fields({f.name: _copied(getattr(value, f.name)) for f in fields})
    return value


@contextmanager
def _running(root: nn.Module) -> Iterator[None]:
    with leave_untouched(root), uncompiled(), torch.no_grad():
        # One by one: `eval()` is overridden in models that merge weights in it.
        for module in root.modules():
            module.training = False
        yield


def _sources(root: nn.Module, groups: LayerGroups) -> dict[str, list[nn.Module]]:
    """The modules of each group that lie in no other module of it, without the root."""
    modules = dict(root.named_modules())
    found: dict[str, list[nn.Module]] = {}
    for group in groups:
        # A block that only uses layers of other groups is in no group's modules, but names its own.
        names = {m.name for m in group.modules if m.name} | ({group.name} & modules.keys() - {""})
        outermost = [n for n in names if not any(_inside(n, other) for other in names)]
        found[group.name] = [modules[n] for n in sorted(outermost) if n in modules]
    return found


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _noter(found: dict[str, Tensor], group: str, size: int) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        usable = (t for t in tensors_in(output) if t.is_floating_point() and t.ndim)
        for tensor in usable:
            if (flat := _by_sample(tensor.detach(), size)) is not None:
                # A copy: what follows may write to it in place.
                found[group] = flat.to(torch.float32, copy=True)
                return

    return note


def _by_sample(tensor: Tensor, size: int) -> Tensor | None:
    """The tensor as (samples, features), wherever its samples are; None if nowhere."""
    if size and tensor.shape[0] % size == 0:  # tokens of a sample may have been laid in a row
        return tensor.reshape(size, -1)
    for place, length in enumerate(tensor.shape):
        if length == size:
            return tensor.movedim(place, 0).reshape(size, -1)
    return None


def _rounded(root: nn.Module) -> dict[str, Tensor]:
    """8-bit versions of the weights, one step size per output channel; vectors stay."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in root.named_modules():
        for key, p in module.named_parameters(path, recurse=False):
            if id(p) in seen or p.ndim < 2 or not p.is_floating_point():
                continue
            seen.add(id(p))
            others = [d for d in range(p.ndim) if d != _output_dimension(module)]
            value = p.detach().float()
            step = value.abs().amax(others, keepdim=True) / _INT8_STEPS
            whole = torch.round(value / torch.where(step == 0, 1, step))
            found[key] = (whole * step).to(p.dtype)
    return found


def _output_dimension(module: nn.Module) -> int:
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return 1 if transposed or type(module).__name__ == "Conv1D" else 0  # Conv1D: of GPT-2


def _device_type(root: nn.Module) -> str:
    return next((p.device.type for p in root.parameters()), "cpu")


def _autocast(root: nn.Module) -> str:
    device = _device_type(root)
    if not torch.is_autocast_enabled(device):
        return ""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
