"""Between PyTorch's tensors and NumPy's arrays, without copying and with bfloat16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["to_numpy", "to_torch"]


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
