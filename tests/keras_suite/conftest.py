"""Tests that need Keras: one process per Keras backend, chosen by the variable KERAS_BACKEND.

    KERAS_BACKEND=tensorflow pytest tests/keras_suite

Without the variable the root `conftest.py` leaves this folder out, so that an ordinary run never
imports Keras.
"""

from __future__ import annotations

import os
import warnings

# Bits must be the same on every machine, and nobody reads TensorFlow's greetings.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of imports of packages that are not ours
    import keras

import pytest


@pytest.fixture(autouse=True)
def fresh_keras() -> None:
    """Names of layers, and whatever else Keras counts, start afresh in every test."""
    keras.backend.clear_session()
