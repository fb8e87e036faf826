"""Digests of variables."""

from __future__ import annotations

import hashlib

import keras
import ml_dtypes
import numpy as np
import pytest

from frostline.backends.keras.digest import sha256_of_variables

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int32", "uint8", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_digest_is_the_one_of_the_raw_bytes(dtype: str, workers: int) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    values = np.arange(-3, 3).reshape(2, 3).astype(kind)
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX keeps 64-bit numbers only where asked to")
    variables = {
        "a": keras.Variable(values, dtype=dtype, trainable=False),
        "empty": keras.Variable(np.zeros((0, 2), kind), dtype=dtype, trainable=False),
    }
    digests = sha256_of_variables(variables, workers=workers)
    assert digests["a"] == hashlib.sha256(values.tobytes()).hexdigest()
    assert digests["empty"] == hashlib.sha256(b"").hexdigest()


def test_one_bit_changes_the_digest_and_equal_bits_do_not() -> None:
    variable = keras.Variable(np.zeros(3, "float32"))
    before = sha256_of_variables({"v": variable})
    variable.assign(np.array([0.0, -0.0, 0.0], "float32"))
    assert sha256_of_variables({"v": variable}) != before
    variable.assign(np.zeros(3, "float32"))
    assert sha256_of_variables({"v": variable}) == before


def test_one_variable_under_two_names() -> None:
    variable = keras.Variable(np.ones(3, "float32"))
    digests = sha256_of_variables({"a": variable, "b": variable})
    assert digests["a"] == digests["b"]


def test_large_variables_are_read_by_several_threads_alike() -> None:
    big = {f"v{i}": keras.Variable(np.full((600, 1024), i, "float32")) for i in range(3)}
    assert sha256_of_variables(big) == sha256_of_variables(big, workers=1)
