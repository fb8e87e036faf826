"""How one row of one column is spelt in bytes: exact, half as long, or a quarter.

| encoding | bytes per element | error of a stored value | NaN, infinities |
|---|---|---|---|
| exact | its own | none | kept, bit for bit |
| bfloat16 | 2 | at most 2^-8 of the value | kept (a NaN stays some NaN) |
| float16 | 2 | at most 2^-11 of the value (2^-25 below 2^-14) | kept (a NaN stays some NaN) |
| int8 | 1, and 4 per scale | at most 1/254 of the largest value of its channel | refused |

`float16` refuses finite values beyond 65,504. `bfloat16` takes every finite float32: values within
half a step of float32's end (the usual filler of attention masks) become its own largest number
rather than infinity. An encoding that would not make a column smaller, and any encoding of a
column that is not floating, is exact.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError

__all__ = ["Codec", "Column", "Encoding"]

Encoding = Literal["exact", "bfloat16", "float16", "int8"]

_BYTES = {"bfloat16": 2, "float16": 2, "int8": 1}
_FLOATS = ("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_OTHERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
           "complex64", "complex128")  # fmt: skip
_LARGEST_INT8 = 127
#: The fewest values that share a scale of 4 bytes, unless the whole row has fewer.
_VALUES_PER_SCALE = 8


@dataclass(frozen=True)
class Column:
    """One kind of value that a store keeps for every sample.

    Attributes:
        name: any text without meaning to the store.
        dtype: of the values as written and as read, e.g. "float32", "bfloat16", "int64", "bool".
        encoding: how floating values are kept on disk; others are always exact.
        ragged: the first dimension of a row differs from block to block, e.g. tokens.

    Raises:
        FrontierError: an unknown dtype or encoding.

    Example:
        >>> Column("layer3", "float32", "bfloat16").kept
        'bfloat16'
        >>> Column("attention_mask", "int64", "bfloat16").kept
        'exact'
    """

    name: str
    dtype: str
    encoding: Encoding = "exact"
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _FLOATS + _OTHERS:
            raise FrontierError(
                f"store the column {self.name!r}",
                found=f"values of type {self.dtype!r}",
                fix="one of " + ", ".join(_FLOATS + _OTHERS),
            )
        if self.encoding not in get_args(Encoding):
            raise FrontierError(
                f"store the column {self.name!r} as {self.encoding!r}",
                found="no such encoding",
                fix="one of " + ", ".join(get_args(Encoding)),
            )

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype as numpy knows it."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    @property
    def kept(self) -> Encoding:
        """The encoding that is really used: exact where the asked one would save nothing."""
        saves = _BYTES.get(self.encoding, math.inf) < self.numpy.itemsize
        return self.encoding if saves and self.dtype in _FLOATS else "exact"


@dataclass(frozen=True)
class Codec:
    """Turns rows of one column and one shape into bytes and back.

    Attributes:
        column: what the rows are.
        shape: of one row.

    Example:
        >>> Codec(Column("x", "float32", "int8"), (64, 7, 7)).row_bytes  # 64 scales of 4 bytes
        3392
    """

    column: Column
    shape: tuple[int, ...]

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        count = math.prod(self.shape)
        if self.column.kept == "int8":
            return 4 * math.prod(self._scales) + count
        return count * _BYTES.get(self.column.kept, self.column.numpy.itemsize)

    @functools.cached_property
    def _channel_axis(self) -> int | None:
        """The axis of a row along which int8 scales differ; None: one scale for the row.

        The last of `(tokens, features)`, the first of `(channels, height, width)`; another one
        where so few values would share a scale that the scales would outweigh what is saved.
        """
        axes = (1, 0) if len(self.shape) == 2 else (0,) if self.shape else ()
        count = math.prod(self.shape)
        return next((a for a in axes if count >= _VALUES_PER_SCALE * self.shape[a]), None)

    @functools.cached_property
    def _scales(self) -> tuple[int, ...]:
        """Shape of the int8 scales of one row, as it broadcasts against the row."""
        return tuple(n if i == self._channel_axis else 1 for i, n in enumerate(self.shape))

    def encode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Rows `(n, *shape)` as bytes `(n, row_bytes)`.

        Raises:
            FrontierError: a value that this encoding cannot hold.
        """
        count = len(values)
        if self.column.kept == "int8":
            return self._encode_int8(values)
        if self.column.kept == "bfloat16":
            values = self._to_bfloat16(values)
        elif self.column.kept == "float16":
            values = self._to_float16(values)
        return np.ascontiguousarray(values).reshape(count, -1).view(np.uint8).reshape(count, -1)

    def decode(self, raw: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Bytes `(n, row_bytes)` into rows `(n, *shape)` of the column's own type."""
        count = len(raw)
        if self.column.kept == "exact":
            out[...] = raw.view(self.column.numpy).reshape(out.shape)
        elif self.column.kept == "int8":
            head = 4 * math.prod(self._scales)
            scales = raw[:, :head].copy().view(np.float32).reshape(count, *self._scales)
            whole = raw[:, head:].view(np.int8).reshape(out.shape)
            with np.errstate(over="ignore"):
                out[...] = whole * scales.astype(_working(self.column))
        elif self.column.kept == "bfloat16" and self.column.dtype == "float32":
            # Widening by shifting bits; several times faster than a cast of ml_dtypes.
            wide = out.view(np.uint32)
            wide[...] = raw.view(np.uint16).reshape(out.shape)
            np.left_shift(wide, 16, out=wide)
        else:
            kept = getattr(ml_dtypes, self.column.kept, self.column.kept)
            out[...] = raw.view(kept).reshape(out.shape).astype(out.dtype)

    def _to_bfloat16(self, values: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(over="ignore", invalid="ignore"):
            single = values.astype(np.float32)
            self._refuse(np.isinf(single) & np.isfinite(values), "beyond the range of float32")
            half = single.astype(ml_dtypes.bfloat16)
        rounded_up = np.isfinite(single) & np.isinf(half.astype(np.float32))
        if rounded_up.any():
            largest = ml_dtypes.finfo(ml_dtypes.bfloat16).max
            half[rounded_up] = np.copysign(np.float32(largest), single[rounded_up])
        return half

    def _to_float16(self, values: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            half = values.astype(np.float16)
        self._refuse(np.isinf(half) & np.isfinite(values), "beyond 65,504, the end of float16")
        return half

    def _encode_int8(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        count = len(values)
        wide = values.astype(_working(self.column))
        axes = tuple(1 + i for i in range(len(self.shape)) if i != self._channel_axis)
        largest = np.max(np.abs(wide), axis=axes, keepdims=True, initial=0)
        self._refuse(~np.isfinite(largest), "that is infinite or not a number")
        with np.errstate(over="ignore", under="ignore"):
            scales = (largest / _LARGEST_INT8).astype(np.float32)
            self._refuse(~np.isfinite(scales), "beyond the range of float32")
            over = ~np.isfinite((scales * np.float32(_LARGEST_INT8)).astype(np.float32))
        scales = np.where(over, np.nextafter(scales, np.float32(0)), scales)
        steps = wide / np.where(scales == 0, 1, scales)
        whole = np.clip(np.rint(steps), -_LARGEST_INT8, _LARGEST_INT8).astype(np.int8)
        parts = (scales.reshape(count, -1).view(np.uint8), whole.reshape(count, -1).view(np.uint8))
        return np.concatenate(parts, axis=1)

    def _refuse(self, bad: NDArray[np.bool_], found: str) -> None:
        if bad.any():
            raise FrontierError(
                f"keep the column {self.column.name!r} as {self.column.kept}",
                found=f"a value {found}",
                fix="keep it exact, or as bfloat16",
            )


def _working(column: Column) -> type[np.floating[Any]]:
    return np.float64 if column.dtype == "float64" else np.float32
