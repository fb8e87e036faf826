"""The demo's own parts: its data, and the conversion of its weights."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch, tmp_path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    module = __import__("digits")
    monkeypatch.delitem(sys.modules, "digits")
    return module


def test_the_digits_are_split_once_and_evenly(demo):
    splits = demo.digits()
    assert {name: len(pairs) for name, pairs in splits.items()} == {
        "train": 1000,
        "val": 397,
        "test": 400,
    }
    for pairs in splits.values():
        counts = Counter(label for _, label in pairs)
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 0.1 * len(pairs)
    pixels = np.stack([picture for picture, _ in splits["train"]])
    assert pixels.shape == (1000, 8, 8)
    assert (pixels.dtype, pixels.min(), pixels.max()) == (np.uint8, 0, 255)


def test_the_converted_weights_fit_the_model(demo):
    if importlib.util.find_spec(demo.PACKAGE) is None:
        pytest.skip(f"needs the package {demo.PACKAGE}, which `make setup` installs")
    demo.convert_weights()
    assert [p.name for p in demo.OUTPUT.iterdir()] == [demo.WEIGHTS.name]
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(load_file(demo.WEIGHTS), strict=True)
    # Statistics of trained batch norms: no variance is negative, none is the initial 1.
    variances = [v for name, v in model.state_dict().items() if name.endswith("running_var")]
    assert all(bool((v >= 0).all()) and bool((v != 1).any()) for v in variances)


def test_weights_of_another_network_are_refused(demo, monkeypatch):
    if importlib.util.find_spec(demo.PACKAGE) is None:
        pytest.skip(f"needs the package {demo.PACKAGE}, which `make setup` installs")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create("tf_efficientnet_lite1"))
    with pytest.raises((ValueError, demo.ModelError)):
        demo.convert_weights()
    assert not demo.WEIGHTS.exists()
