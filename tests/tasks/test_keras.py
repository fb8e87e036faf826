"""The tests in `keras_torch`, in a process where Keras runs on its torch backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_CHOSEN_BY_US = """
import os, sys
from frostline.tasks.keras_setup import load_keras
assert "keras" not in sys.modules
assert load_keras().config.backend() == "torch"
assert os.environ["KERAS_BACKEND"] == "tensorflow", "the caller's own choice is left as it was"
"""
_TOO_LATE = """
import keras
from frostline.errors import ModelError
from frostline.tasks.keras_setup import load_keras
try:
    load_keras()
except ModelError as error:
    print(error)
"""


def run_python(*arguments: str, backend: str) -> subprocess.CompletedProcess[str]:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **quiet, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(autouse=True)
def _keras() -> None:
    pytest.importorskip("h5py", reason="needs Keras")
    # Not imported: it would choose its backend for this whole process.
    if not any((Path(p) / "keras").is_dir() for p in sys.path):
        pytest.skip("needs Keras")


@pytest.mark.skipif(os.environ.get("KERAS_BACKEND") == "torch", reason="this process runs them")
def test_keras_models_as_torch_modules() -> None:
    done = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
        str(HERE / "keras_torch"), backend="torch",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_backend_is_chosen_before_the_import() -> None:
    done = run_python("-c", _CHOSEN_BY_US, backend="tensorflow")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_another_backend_in_the_process_is_an_error_that_says_how() -> None:
    done = run_python("-c", _TOO_LATE, backend="jax")
    assert "Keras imported with the backend 'jax'" in done.stdout
    assert "KERAS_BACKEND=torch" in done.stdout
