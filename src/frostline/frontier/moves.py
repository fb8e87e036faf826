"""Operations that move or cast a tensor, told from those that look at its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cast", "cast_of"]

_DTYPES = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.long: torch.int64,
    Tensor.int: torch.int32,
}


@dataclass(frozen=True, slots=True)
class Cast:
    """A move to another device, dtype or layout; None: as it is."""

    device: torch.device | None
    dtype: torch.dtype | None
    layout: torch.memory_format | None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor, moved and cast."""
        kept: dict[str, Any] = {} if self.layout is None else {"memory_format": self.layout}
        return tensor.to(device=self.device, dtype=self.dtype, **kept)


def cast_of(func: Any, args: Any, kwargs: Any) -> Cast | None:
    """What an operation on a tensor does, if it is nothing but a move or a cast; else None.

    Example:
        >>> cast_of(Tensor.to, (torch.ones(2), "cpu", torch.float16), {}).dtype
        torch.float16
        >>> cast_of(Tensor.to, (torch.ones(2), torch.ones(2)), {}) is None
        True
    """
    if func in _DTYPES and len(args) == 1 and not kwargs:
        return Cast(None, _DTYPES[func], None)
    if func is Tensor.cpu and len(args) == 1 and not kwargs:
        return Cast(torch.device("cpu"), None, None)
    if func is Tensor.cuda and not kwargs.keys() - {"device", "non_blocking"}:
        wanted = next((a for a in args[1:] if a is not None and not isinstance(a, bool)), None)
        named = kwargs.get("device") if wanted is None else wanted
        return Cast(_exact("cuda" if named is None else named), None, None)
    if func is Tensor.pin_memory:
        return Cast(None, None, None)
    if func is Tensor.contiguous and len(args) == 1:
        return Cast(None, None, kwargs.get("memory_format", torch.contiguous_format))
    if func is not Tensor.to or kwargs.keys() - {
        "device", "dtype", "non_blocking", "copy", "memory_format"
    }:  # fmt: skip
        return None
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in args[1:]:
        if isinstance(arg, (str, torch.device, int)) and not isinstance(arg, bool):
            device = arg
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif not isinstance(arg, bool):
            return None
    return Cast(_exact(device), dtype, kwargs.get("memory_format"))


def _exact(device: Any) -> torch.device | None:
    if device is None:
        return None
    if isinstance(device, int):
        return torch.device("cuda", device)
    named = torch.device(device)
    if named.type == "cuda" and named.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return named
