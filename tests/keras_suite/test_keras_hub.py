"""KerasHub's text classifiers under policies, inside their own `fit`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

if importlib.util.find_spec("keras_hub") is None:
    pytest.skip("needs KerasHub: pip install --no-deps keras-hub", allow_module_level=True)

from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.names import tensors
from frostline.integrations.keras import FreezeCallback, RecordCallback
from frostline.records import read_run
from hub_cases import classifier
from keras_suite.keras_case import digest

TEXTS = ["good fine thing", "bad poor stuff"] * 8


def data(model: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tokenized once, outside `fit`."""
    found = model.preprocessor(TEXTS)
    x = {
        name: np.asarray(keras.ops.convert_to_numpy(v)).astype("int32") for name, v in found.items()
    }
    return x, np.arange(len(TEXTS)) % 2


def ready() -> Any:
    keras.backend.clear_session()
    model = classifier()
    x, y = data(model)
    model.preprocessor = None
    model.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model, x, y


def test_groups_are_embeddings_blocks_and_what_is_outside_the_backbone() -> None:
    model, _, _ = ready()
    groups = layer_groups(model)
    blocks = [n for n in groups.names if "transformer_layer" in n]
    assert blocks == ["bert_backbone/transformer_layer_0", "bert_backbone/transformer_layer_1"]
    assert groups.head == {"logits"}
    assert groups.names[-1] == "logits"
    named = {p.name for g in groups for p in g.parameters}
    assert named == {n for n, v in tensors(model).items() if v.trainable}


@pytest.mark.parametrize("policy", ["gradual:every=1ep", "linear-probe"])
def test_a_policy_runs_inside_fit_and_is_recorded(policy: str, tmp_path: Path) -> None:
    model, x, y = ready()
    before = {n: digest(v) for n, v in tensors(model).items()}
    freezing = FreezeCallback(policy)
    model.fit(
        x, y, batch_size=4, epochs=2, shuffle=False, verbose=0,
        callbacks=[freezing, RecordCallback(tmp_path, freezing)],
    )  # fmt: skip
    after = {n: digest(v) for n, v in tensors(model).items()}
    frozen = freezing.plan.held_tensors(freezing.driver.backend.groups)
    moved = {n for n in after if after[n] != before[n]}
    assert "logits/kernel" in moved
    assert not moved & frozen
    found = read_run(tmp_path)
    assert found.summary["certificate_ok"]
    assert found.header["config"]["model"] == "moods"


@pytest.mark.slow
def test_a_policy_that_reads_gradients_and_one_that_reads_spectra() -> None:
    for policy in ("autofreeze:every=2st", "spectrum:share=0.5"):
        model, x, y = ready()
        freezing = FreezeCallback(policy)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[freezing])
        assert freezing.certificate.holds or not freezing.plan.frozen
