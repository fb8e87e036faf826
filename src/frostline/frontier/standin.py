"""Stand-ins: tensors that are not computed, but know what they would look like.

While the rest of a model runs on stored values, the values of the frozen region are stand-ins: a
tensor class without memory that answers what can be known without values (shape, dtype, device),
and hands every operation to the session it belongs to. The session decides whether the operation
belongs to the frozen region, too (the result is another stand-in), or needs the real value.

A stand-in never makes a number up: what its session cannot give raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from frostline.errors import FrontierError

__all__ = ["Node", "Session", "StandIn", "stand_in", "stand_ins_in", "with_values"]


class Session(Protocol):
    """Decides about operations on the stand-ins it has given out."""

    open: bool

    def operation(self, func: Any, args: Any, kwargs: Any, found: list[StandIn]) -> Any:
        """Run or record an operation of PyTorch that reads these stand-ins."""
        ...


class Node:
    """One value of the frozen region: a place in the recorded order, and how to get at it.

    Attributes:
        id: its number in the recording; -1 for values that left the frozen region.
        session: what decides about operations on it.
        value: the real tensor, once it is known.
        get: computes it.
        version: autograd's version counter of `value` when the node was made.
        grad: whether the model's own code asked for a gradient of this value, which trains nothing.
    """

    __slots__ = ("get", "grad", "id", "session", "value", "version")

    def __init__(
        self,
        number: int,
        session: Session,
        value: Tensor | None = None,
        get: Callable[[], Tensor] | None = None,
    ) -> None:
        self.id = number
        self.session = session
        self.value = value
        self.get = get
        self.grad = False
        self.version = 0 if value is None else version_of(value)

    def real(self) -> Tensor:
        """The real value.

        Raises:
            FrontierError: it was skipped, and nothing is stored from which it follows.
        """
        if self.value is None:
            if self.get is None:
                raise FrontierError(
                    "use the value of a skipped layer",
                    found="a tensor that was neither computed nor stored",
                    fix="read it inside the model's forward pass, or train without the cache",
                )
            self.value = self.get()
        return self.value

    @property
    def live(self) -> bool:
        """Whether the value left the frozen region: code that trains has written into it."""
        return self.id < 0


class StandIn(Tensor):
    """A tensor of the frozen region: metadata, and a node."""

    node: Node
    place: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer from metadata, or leave it to the session."""
        kwargs = kwargs or {}
        answer = _METADATA.get(func)
        if answer is not None:
            return answer(func, args, kwargs)
        found = list(stand_ins_in((args, kwargs)))
        for each in found:
            node = each.node
            if node.session.open and not node.live:
                return node.session.operation(func, args, kwargs, found)
        return func(*with_values(args), **with_values(kwargs))


def stand_in(node: Node, meta: Tensor, place: torch.device) -> StandIn:
    """A stand-in of a node.

    Args:
        node: what it stands for.
        meta: a tensor on the meta device, of its shape and dtype; may be shared.
        place: the device that it answers.
    """
    made = meta.as_subclass(StandIn)
    made.node = node
    made.place = place
    return made


def stand_ins_in(value: Any) -> Iterator[StandIn]:
    """All stand-ins in the arguments of an operation."""
    kind = type(value)
    if kind is StandIn:
        yield value
    elif kind is tuple or kind is list:
        for item in value:
            yield from stand_ins_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from stand_ins_in(item)
    elif isinstance(value, slice):
        yield from stand_ins_in((value.start, value.stop, value.step))


def with_values(value: Any) -> Any:
    """The arguments of an operation with real tensors in place of stand-ins."""
    kind = type(value)
    if kind is StandIn:
        return value.node.real()
    if kind is tuple or kind is list:
        return kind([with_values(item) for item in value])
    if kind is dict:
        return {key: with_values(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(with_values(v) for v in (value.start, value.stop, value.step)))
    return value


def version_of(tensor: Tensor) -> int:
    """How often the tensor's memory was written to, as autograd counts it."""
    if tensor.is_inference():
        raise FrontierError(
            "follow writes to a tensor",
            found="one made in inference mode, which counts none",
            fix="torch.no_grad() instead of torch.inference_mode() inside the model",
        )
    # The counter has no public accessor; autograd's documentation names this attribute.
    return tensor._version  # noqa: SLF001


# -- what a stand-in knows without values ----------------------------------------------------


def _ask_meta(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  as "Extending PyTorch" documents
        return func(*args, **kwargs)


def _ask_real(func: Any, args: Any, kwargs: Any) -> Any:
    """What depends on the real tensor, where it has left the frozen region."""
    node = args[0].node
    if node.live:
        return func(node.real(), *args[1:], **kwargs)
    return node.grad if func == _REQUIRES_GRAD else _FROZEN[func]


def _device(func: Any, args: Any, kwargs: Any) -> torch.device:
    del func, kwargs
    return args[0].place


def _is_cuda(func: Any, args: Any, kwargs: Any) -> bool:
    del func, kwargs
    return args[0].place.type == "cuda"


def _is_cpu(func: Any, args: Any, kwargs: Any) -> bool:
    del func, kwargs
    return args[0].place.type == "cpu"


def _get_device(func: Any, args: Any, kwargs: Any) -> int:
    del func, kwargs
    place = args[0].place
    return -1 if place.type == "cpu" else (place.index or 0)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_REQUIRES_GRAD = _getter("requires_grad")
_FROZEN: dict[Any, Any] = {
    _REQUIRES_GRAD: False,
    _getter("is_leaf"): True,
    _getter("grad_fn"): None,
    _getter("grad"): None,
    _getter("retains_grad"): False,
}
_METADATA: dict[Any, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys(_FROZEN, _ask_real),
    **{
        _getter(name): _ask_meta
        for name in ("shape", "dtype", "layout", "ndim", "names", "is_sparse", "is_quantized",
                     "is_nested", "itemsize", "nbytes", "is_mkldnn", "is_sparse_csr", "output_nr",
                     "is_mps", "is_xla", "is_xpu", "is_vulkan", "is_ipu", "is_maia", "is_mtia")
        if hasattr(Tensor, name)
    },
    **{
        getattr(Tensor, name): _ask_meta
        for name in ("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset",
                     "is_contiguous", "is_floating_point", "is_complex", "is_signed",
                     "element_size", "__len__", "is_inference", "is_same_size", "has_names",
                     "is_conj", "is_neg", "dense_dim", "sparse_dim")
        if hasattr(Tensor, name)
    },
    torch.numel: _ask_meta,
    torch.is_floating_point: _ask_meta,
    torch.is_complex: _ask_meta,
    torch.is_conj: _ask_meta,
    torch.is_neg: _ask_meta,
    torch.is_inference: _ask_meta,
    _getter("device"): _device,
    _getter("is_cuda"): _is_cuda,
    _getter("is_cpu"): _is_cpu,
    _getter("is_meta"): lambda *_: False,
    Tensor.get_device: _get_device,
}  # fmt: skip
