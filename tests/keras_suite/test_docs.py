"""The code in the pages on Keras runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np

from frostline.records import read_run

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "keras.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_runs_from_top_to_bottom(capsys) -> None:
    names: dict[str, Any] = {}
    for code in BLOCK.findall(PAGE.read_text("utf-8")):
        exec(code, names)  # noqa: S102  our own page
    said = capsys.readouterr().out
    assert names["groups"].names == ("block1", "block2", "head")
    assert "0 ['block1', 'block2']" in said
    assert "tensors proved" in said
    assert names["measured"].measured


def test_the_records_of_the_page_on_fit_are_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="body"), keras.layers.Dense(2, name="head")]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = np.ones((8, 4), "float32"), np.arange(8) % 2
    names: dict[str, Any] = {"model": model, "x": x, "y": y, "vx": x, "vy": y, "tx": x, "ty": y}
    blocks = BLOCK.findall((DOCS / "keras_fit.md").read_text("utf-8"))
    (code,) = [block for block in blocks if "RecordCallback(" in block]
    exec(code, names)  # noqa: S102  our own page
    found = read_run("runs/mine")
    assert found.finished
    assert found.summary["test_accuracy"] is not None
