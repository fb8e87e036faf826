"""Tests that need Keras: one process per Keras backend, chosen by the variable KERAS_BACKEND.

    KERAS_BACKEND=tensorflow pytest tests/keras_suite

Without the variable the root `conftest.py` leaves this folder out, so that an ordinary run never
imports Keras.
"""

from __future__ import annotations

import os
import warnings

import pytest

#: A program that runs without Keras, with its own folder first among the places of imports.
collect_ignore_glob: list[str] = ["parity_torch.py"]
if os.environ.get("KERAS_BACKEND"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports of packages that are not ours
        import keras
else:
    collect_ignore_glob = ["*"]


#: What takes long where Keras compiles, and is much the same there: fast on torch alone.
LONG_WHERE_COMPILED = {
    "test_checkpoint", "test_crash", "test_docs", "test_frontier_zoo", "test_grouping",
    "test_keras_hub", "test_measure",
    "test_model_file", "test_plain_keras", "test_policies_on_keras",
}  # fmt: skip


#: What else takes long on one backend, and is fast on another.
LONG_ON = {
    "tensorflow": {"test_record", "test_views"},
    "jax": {"test_callback", "test_frontier", "test_inputs", "test_record", "test_views"},
}
#: One of each of these stays fast everywhere.
FAST = {
    "test_plans_change_within_one_fit_and_the_proof_says_when",
    "test_policies_move_the_frontier",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    backend = os.environ.get("KERAS_BACKEND", "")
    if backend == "torch":
        return
    long = LONG_WHERE_COMPILED | LONG_ON.get(backend, set())
    for item in items:
        ours = item.path.parent.name == "keras_suite" and item.name not in FAST
        if ours and item.path.stem in long:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_keras() -> None:
    """Names of layers, and whatever else Keras counts, start afresh in every test."""
    keras.backend.clear_session()
