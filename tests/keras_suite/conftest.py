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

import pytest

collect_ignore_glob: list[str] = []
if os.environ.get("KERAS_BACKEND"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports of packages that are not ours
        import keras
else:
    collect_ignore_glob = ["*"]

#: Keras's PyTorch backend reads tensors in a way that NumPy 2 warns of.
_NOT_OURS = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.filterwarnings(_NOT_OURS))


@pytest.fixture(autouse=True)
def fresh_keras() -> None:
    """Names of layers, and whatever else Keras counts, start afresh in every test."""
    keras.backend.clear_session()
