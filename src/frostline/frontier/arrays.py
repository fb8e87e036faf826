"""Between PyTorch's tensors and NumPy's arrays, without copying and with bfloat16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["sent", "to_numpy", "to_torch", "wait_for"]


def to_numpy(value: Tensor) -> NDArray[Any]:
    """The values as an array; memory is shared where it can be.

    Example:
        >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype
        dtype(bfloat16)
    """
    value = value.detach().cpu().contiguous()
    if value.dtype is torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def to_torch(value: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The array as a tensor of this type.

    Example:
        >>> to_torch(np.ones(2, np.float32), torch.float32)
        tensor([1., 1.])
    """
    value = np.asarray(value, order="C")
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(value).to(dtype)


def sent(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device; main memory goes to a GPU without waiting for the copy.

    Ordinary memory would be waited for, and with it all steps that the GPU has still to do. The
    page-locked copy is PyTorch's own, which reuses it only when the GPU has read it.

    Args:
        value: of any device.
        device: where it is wanted.
        dtype: of the result; None: its own.

    Example:
        >>> sent(torch.ones(2), torch.device("cpu"), torch.float64).dtype
        torch.float64
    """
    dtype = value.dtype if dtype is None else dtype
    plain = type(value) is Tensor and value.layout is torch.strided and not value.requires_grad
    if device.type != "cuda" or value.device.type != "cpu" or not plain:
        return value.to(device, dtype)
    return value.pin_memory().to(device, dtype, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Until a device has done what it was given: before, a clock tells nothing of its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
