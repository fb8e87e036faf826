"""Cached training of many architectures, at several depths, against plain `model.fit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import keras_zoo
from keras_zoo import BATCH, LARGE, SMALL, Sample, freeze_first

from frostline.frontier.keras import fit
from frostline.frontier.keras.region import as_numpy

#: Keras's own conversions of variables to arrays are older than NumPy's `copy` keyword.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
DEPTHS = [0.6, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (0.3, 1.0))]
#: Where nothing can be cached, and what the report says then.
REFUSED = {"augmented": "draws random numbers in training"}
#: Rows computed in blocks of 32 and in batches of 16 are not always equal to the last bit.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def trained(name: str, depth: float, cache: Path | None) -> tuple[Sample, Any, Any]:
    """The zoo's model after two epochs, plain or cached; its history, and the cache's report."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(11)
    sample = (SMALL | LARGE)[name]()
    freeze_first(sample.model, depth)
    settings: dict[str, Any] = {"epochs": 2, "batch_size": BATCH, "verbose": 0}
    take = lambda array: array[:10]  # noqa: E731
    settings["validation_data"] = keras.tree.map_structure(take, (sample.x, sample.y))
    keras.utils.set_random_seed(12)
    if cache is None:
        return sample, sample.model.fit(sample.x, sample.y, **settings).history, None
    done = fit(sample.model, sample.x, sample.y, cache=cache, **settings)
    return sample, done.history.history, done.report


def check(name: str, depth: float, place: Path) -> None:
    plain, wanted, _ = trained(name, depth, None)
    cached, found, report = trained(name, depth, place)
    why = REFUSED.get(name)
    assert report.replayed == (0 if why else report.batches), report.notes
    if why:
        assert why in " ".join(report.notes)
    assert found.keys() == wanted.keys()
    for metric, values in wanted.items():
        np.testing.assert_allclose(found[metric], values, **CLOSE, err_msg=metric)
    variables = zip(
        (*plain.model.variables, *plain.model.optimizer.variables),
        (*cached.model.variables, *cached.model.optimizer.variables),
        strict=True,
    )
    for one, other in variables:
        a, b = (as_numpy(v).astype("float64") for v in (one, other))
        np.testing.assert_allclose(b, a, **CLOSE, err_msg=one.path)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", SMALL)
def test_cached_training_is_plain_training(name: str, depth: float, tmp_path: Path) -> None:
    check(name, depth, tmp_path / "stores")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0.5, 1.0])
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_too(name: str, depth: float, tmp_path: Path) -> None:
    check(name, depth, tmp_path / "stores")


def test_the_zoo_has_many_kinds() -> None:
    assert len(SMALL) + len(LARGE) >= 12
    assert keras_zoo.SAMPLES % BATCH  # the last batch of an epoch is shorter
