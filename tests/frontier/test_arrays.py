"""Tensors as arrays and back, to the last bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from frostline.frontier.arrays import to_numpy, to_torch

KINDS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(0,), (3,), (1, 1), (2, 3), (2, 0, 4)], ids=str)
def test_there_and_back(dtype: torch.dtype, shape: tuple[int, ...]):
    value = (torch.randn(shape) * 3).to(dtype)
    array = to_numpy(value)
    assert array.shape == shape
    back = to_torch(array, dtype)
    assert back.dtype is dtype
    assert back.shape == value.shape
    assert torch.equal(back, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_values_keep_their_bits(dtype: torch.dtype):
    value = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 3.14159]).to(dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(to_torch(to_numpy(value), dtype).view(bits), value.view(bits))


def test_bfloat16_is_an_array_of_its_own_kind():
    assert to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_are_made_whole(dtype: torch.dtype):
    value = torch.arange(12).reshape(3, 4).to(dtype).T[1:]
    assert torch.equal(to_torch(to_numpy(value), dtype), value)


def test_memory_is_shared_where_it_can_be():
    value = torch.zeros(3)
    to_numpy(value)[0] = 5
    assert float(value[0]) == 5


def test_tensors_that_train_are_read():
    weight = torch.nn.Parameter(torch.ones(2))
    assert to_numpy(weight).tolist() == [1, 1]


def test_an_array_becomes_the_type_asked_for():
    stored = np.array([1.5, 2.5], ml_dtypes.bfloat16)
    found = to_torch(stored, torch.float32)
    assert found.dtype is torch.float32
    assert found.tolist() == [1.5, 2.5]
    assert to_torch(np.array([1.5]), torch.float32).dtype is torch.float32
