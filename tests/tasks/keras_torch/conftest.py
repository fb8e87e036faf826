"""Tests of Keras models as torch modules: they need Keras on its torch backend.

    KERAS_BACKEND=torch pytest tests/tasks/keras_torch

Importing Keras takes seconds and cannot be undone, so an ordinary run leaves this folder out;
`tests/tasks/test_keras.py` runs it in a process of its own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_HERE = os.environ.get("KERAS_BACKEND") == "torch"
collect_ignore_glob = [] if _HERE else ["test_*.py"]

if _HERE:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports of packages that are not ours
        import keras


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Keras 3.15 has variables whose `__array__` numpy 2 finds old-fashioned.
    harmless = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(harmless))


@pytest.fixture(autouse=True)
def _quick_disk():
    from faulty_disk import QuickDisk, use_disk

    with use_disk(QuickDisk()):
        yield


@pytest.fixture
def same_seed() -> None:
    keras.utils.set_random_seed(0)


def tiny_model(*, classes: int = 2, side: int | None = 16, activation: str = "softmax") -> Any:
    """Pixels of 0 to 255 -> probabilities; two convolutions with norms, one dropout."""
    L = keras.layers
    steps = [L.Rescaling(1 / 127.5, -1.0, name="scale")]
    for number, width in enumerate((4, 6)):
        steps += [
            L.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{number}"),
            L.BatchNormalization(name=f"norm{number}", momentum=0.5),
            L.ReLU(name=f"relu{number}"),
        ]
    steps += [L.GlobalAveragePooling2D(name="pool"), L.Dropout(0.3, name="drop")]
    x = keras.Input((side, side, 3))
    y = x
    for step in steps:
        y = step(y)
    return keras.Model(x, L.Dense(classes, activation=activation, name="out")(y), name="tiny")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained-looking model in a file: its statistics have moved."""
    keras.utils.set_random_seed(3)
    model = tiny_model()
    model(255 * keras.random.uniform((8, 16, 16, 3), seed=1), training=True)
    path = tmp_path_factory.mktemp("keras") / "tiny.keras"
    model.save(path)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a Keras model into a file."""

    def save(model: Any) -> Path:
        path = tmp_path / "saved.keras"
        model.save(path)
        return path

    return save
