"""Tensors and variables of any Keras backend as NumPy arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

__all__ = ["Array", "array_of", "single_array", "to_number"]

Array = NDArray[Any]


def array_of(tensor: Any) -> Array:
    """A tensor or variable in main memory as it is, bit for bit; perhaps a view: do not write.

    Example:
        >>> array_of(keras.Variable([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    if isinstance(tensor, keras.Variable):
        tensor = tensor.value
    if keras.backend.backend() == "torch" and ops.is_tensor(tensor):
        return _array_of_torch(tensor)
    if type(tensor).__name__ == "IndexedSlices":  # TensorFlow's gradients of embeddings
        tensor = ops.convert_to_tensor(tensor)
    array: Any = ops.convert_to_numpy(tensor)
    return np.asarray(array)


def _array_of_torch(tensor: Any) -> Array:
    # Not by Keras: it calls `np.array(tensor)`, which warns under NumPy 2.
    import ml_dtypes  # noqa: PLC0415
    import torch  # noqa: PLC0415 (only on this backend of Keras)

    here = tensor.detach().cpu()
    if here.dtype == torch.bfloat16:  # NumPy has none: the same bits under another name
        return here.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return here.numpy()


def single_array(tensor: Any) -> Array:
    """The same in single precision or more: half overflows in sums of squares.

    Example:
        >>> single_array(keras.ops.ones((2,), dtype="bfloat16")).dtype
        dtype('float32')
    """
    array = array_of(tensor)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def to_number(tensor: Any) -> float:
    """A scalar as a float.

    Example:
        >>> to_number(keras.ops.ones(()))
        1.0
    """
    return float(array_of(tensor))
