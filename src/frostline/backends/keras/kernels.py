"""Weights of Keras layers as matrices: which of their axes count outputs.

Keras has outputs last, PyTorch first; a convolution is (height, width, in, out) here and
(out, in, height, width) there. Attention keeps two axes of outputs, (in, heads, size), which in
PyTorch are one. Signals of spectra, and weights rounded per output, must be the same of both.
"""

from __future__ import annotations

import keras
import numpy as np

from frostline.backends.keras.arrays import Array
from frostline.backends.keras.names import SEPARATOR

__all__ = ["as_matrix", "output_axes", "row_axes"]

_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


def as_matrix(name: str, array: Array, owner: keras.Layer) -> Array:
    """A weight as the matrix that PyTorch's first dimension by all others would be.

    The order of its columns is Keras's, which singular values do not depend on.

    Args:
        name: of the variable.
        array: the weight, of two or more dimensions.
        owner: the layer that holds it.

    Example:
        >>> conv = keras.layers.Conv2D(8, 3, name="conv")
        >>> conv.build((None, 9, 9, 4))
        >>> as_matrix("conv/kernel", np.zeros(conv.kernel.shape), conv).shape
        (8, 36)
    """
    rows = row_axes(name, array.ndim, owner)
    moved = np.moveaxis(array, rows, range(len(rows)))
    return moved.reshape(int(np.prod(moved.shape[: len(rows)])), -1)


def row_axes(name: str, ndim: int, owner: keras.Layer) -> tuple[int, ...]:
    """The axes that PyTorch has in front: outputs, but of transposed convolutions the inputs."""
    return (ndim - 1,) if isinstance(owner, _TRANSPOSED) else output_axes(name, ndim, owner)


def output_axes(name: str, ndim: int, owner: keras.Layer) -> tuple[int, ...]:
    """The axes of a weight that count what it puts out.

    Args:
        name: of the variable.
        ndim: of the variable, at least 2.
        owner: the layer that holds it.

    Example:
        >>> query = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 8))
        >>> output_axes("query/kernel", 3, query)
        (1, 2)
    """
    own = name.rpartition(SEPARATOR)[2].partition("~")[0]
    if isinstance(owner, keras.layers.Embedding):
        return (0,)
    if own == "depthwise_kernel" or isinstance(owner, _DEPTHWISE):
        return (ndim - 2, ndim - 1)
    if isinstance(owner, _TRANSPOSED):
        return (ndim - 2,)
    if isinstance(owner, keras.layers.EinsumDense) and own == "kernel":
        return _of_equation(owner.equation, ndim)
    return (ndim - 1,)


def _of_equation(equation: str, ndim: int) -> tuple[int, ...]:
    """Axes of the second operand that its result keeps; the last one where that says nothing."""
    operands, _, result = equation.replace(" ", "").partition("->")
    kernel = operands.partition(",")[2]
    found = tuple(i for i, axis in enumerate(kernel) if axis in result)
    return found if len(kernel) == ndim and 0 < len(found) < ndim else (ndim - 1,)
