"""What an encoding does to values, and what it refuses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from frostline.errors import FrontierError
from frostline.frontier.encodings import Codec, Column

SHAPES = [(), (1,), (7,), (5, 1), (3, 4), (16, 6), (64, 3), (4, 3, 5), (16, 2, 9), (0,), (2, 0, 3)]


def there_and_back(column: Column, values: np.ndarray) -> np.ndarray:
    codec = Codec(column, values.shape[1:])
    raw = codec.encode(values)
    assert raw.shape == (len(values), codec.row_bytes)
    out = np.full_like(values, 77)
    codec.decode(raw, out)
    return out


def floats(dtype: str, shape: tuple[int, ...], bound: float) -> st.SearchStrategy[np.ndarray]:
    width = {"float16": 16, "float64": 64}.get(dtype, 32)
    wide = {16: "float16", 32: "float32", 64: "float64"}[width]
    bound = float(np.dtype(wide).type(bound))
    elements = st.floats(-bound, bound, width=width, allow_nan=False)  # pyright: ignore[reportArgumentType]
    target = getattr(ml_dtypes, dtype, dtype)
    return hnp.arrays(wide, (3, *shape), elements=elements).map(lambda a: a.astype(target))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(["float32", "float64"]))
def test_errors_stay_within_what_is_promised(data, shape, dtype: str):
    values = data.draw(floats(dtype, shape, 65_000.0))
    bfloat = there_and_back(Column("x", dtype, "bfloat16"), values)
    assert (np.abs(bfloat - values) <= np.abs(values) * 2.0**-8 + 1e-40).all()
    half = there_and_back(Column("x", dtype, "float16"), values)
    assert (np.abs(half - values) <= np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)).all()
    codec = Codec(Column("x", dtype, "int8"), shape)
    quarter = there_and_back(codec.column, values)
    axis = codec._channel_axis
    axes = tuple(1 + i for i in range(len(shape)) if i != axis)
    largest = np.abs(values).max(axis=axes, keepdims=True, initial=0)
    assert (np.abs(quarter - values) <= largest / 253.9 + 1e-40).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_short_floats_fit_into_int8_as_well(dtype: str, shape: tuple[int, ...]):
    wide = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    values = wide.astype(Column("x", dtype).numpy)
    out = there_and_back(Column("x", dtype, "int8"), values)
    bound = np.abs(wide).max(initial=0) * (1 / 254 + 2.0**-7)
    assert (np.abs(out.astype(np.float32) - wide) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_infinite_or_no_number_survives_or_is_refused(dtype: str):
    values = np.array([[np.inf, -np.inf, np.nan, 1.0]], dtype)
    for encoding in ("exact", "bfloat16", "float16"):
        out = there_and_back(Column("x", dtype, encoding), values)
        assert np.array_equal(out, values, equal_nan=True)
    for bad in (np.inf, -np.inf, np.nan):
        with pytest.raises(FrontierError, match="infinite or not a number"):
            there_and_back(Column("x", dtype, "int8"), np.array([[1.0, bad]], dtype))


def test_the_filler_of_attention_masks_stays_finite():
    lowest = np.finfo(np.float32).min
    values = np.array([[0.0, lowest, 0.0, lowest]], np.float32)
    out = there_and_back(Column("x", "float32", "bfloat16"), values)
    assert out[0, 0] == 0
    assert out[0, 1] == -float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert np.isfinite(there_and_back(Column("x", "float32", "int8"), values)).all()
    with pytest.raises(FrontierError, match="65,504"):
        there_and_back(Column("x", "float32", "float16"), values)
    for encoding in ("bfloat16", "int8"):
        with pytest.raises(FrontierError, match="float32"):
            there_and_back(Column("x", "float64", encoding), np.array([[1e300, 0.0]]))


def test_ends_of_float16_stay_within_it():
    values = np.array([[65504.0, -65504.0, 0.0, 1.0]], np.float16)
    assert np.isfinite(there_and_back(Column("x", "float16", "int8"), values)).all()


def test_an_encoding_that_saves_nothing_is_exact():
    assert Column("x", "bfloat16", "float16").kept == "exact"
    assert Column("x", "float16", "bfloat16").kept == "exact"
    assert Column("x", "float8_e5m2", "int8").kept == "exact"
    assert Column("x", "float16", "int8").kept == "int8"
    assert Column("x", "int64", "int8").kept == "exact"
    assert Column("x", "bool", "float16").kept == "exact"


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((64, 384), 384),  # features keep their own scales: some are far larger than the rest
        ((4, 384), 4),  # few tokens: the scales would weigh more than the values
        ((4, 3), 1),
        ((64, 7, 7), 64),
        ((512, 1, 1), 1),
        ((384,), 1),
        ((), 1),
    ],
)
def test_scales_follow_the_channels(shape: tuple[int, ...], scales: int):
    codec = Codec(Column("x", "float32", "int8"), shape)
    assert codec.row_bytes == 4 * scales + int(np.prod(shape))


def test_a_loud_channel_leaves_the_others_alone():
    values = np.random.default_rng(0).standard_normal((2, 32, 6)).astype(np.float32)
    values[:, :, 2] *= 1000
    out = there_and_back(Column("x", "float32", "int8"), values)
    quiet = [0, 1, 3, 4, 5]
    assert np.abs(out - values)[:, :, quiet].max() < 0.02


@pytest.mark.parametrize("tail", [(), (3,), (384,), (2, 5)])
@pytest.mark.parametrize("encoding", ["exact", "bfloat16", "int8"])
def test_longer_rows_never_take_fewer_bytes(tail: tuple[int, ...], encoding):
    column = Column("t", "float32", encoding, ragged=True)
    sizes = [Codec(column, (length, *tail)).row_bytes for length in range(40)]
    assert sizes == sorted(sizes)  # blocks are spaced for the longest that may lie there
