"""The arithmetic of memory, encodings and views, on made-up logs and tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frostline.frontier.views import Views

memory = pytest.importorskip("frontier_memory")
models = pytest.importorskip("frontier_models")


@pytest.fixture
def setting() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    parts = (
        models.Part(("0",), lambda m: lambda s: (m[1](m[0](s[0])),)),
        models.Part(("2",), lambda m: lambda s: (m[2](s[0]),)),
    )
    return memory.Setting(model, models.Cut("all but head", parts, 1), 1e-2, 1e-1, 3)


def data(count: int = 70) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(count, 4)
    return (x,), (x[:, 0] > 0).long()


def test_rows_are_made_block_by_block_by_the_frozen_front(setting: Any) -> None:
    inputs, _ = data()
    (rows,) = memory.front_rows(setting, memory.blocks_of(inputs))
    with torch.no_grad():
        whole = setting.model[:2](inputs[0])
    torch.testing.assert_close(rows, whole)


def test_every_encoding_is_smaller_than_the_one_before_and_learns(setting: Any) -> None:
    inputs, targets = data()
    stored = memory.front_rows(setting, memory.blocks_of(inputs))
    found = memory.encodings(setting, stored, targets, (stored, targets), 2)
    by = {e["encoding"]: e for e in found}
    assert by["exact"]["error"] == 0
    assert 0 < by["float16"]["error"] < by["bfloat16"]["error"] < by["int8"]["error"] < 0.02
    assert all(len(e["accuracies"]) == 2 and min(e["accuracies"]) > 0.7 for e in found)
    assert all(e["bytes_in_memory"] == 32 for e in found)
    assert by["bfloat16"]["accuracies"] != []


def test_training_the_rest_leaves_the_model_and_repeats(setting: Any) -> None:
    inputs, targets = data()
    stored = memory.front_rows(setting, memory.blocks_of(inputs))
    before = [p.clone() for p in setting.model.parameters()]

    def rows(picked: Any, _: int) -> Any:
        return tuple(t[picked] for t in stored)

    accuracies = {memory.train_rest(setting, rows, targets, (stored, targets), 5) for _ in range(2)}
    assert len(accuracies) == 1
    for old, new in zip(before, setting.model.parameters(), strict=True):
        assert torch.equal(old, new)
    one, two = (setting.fresh(seed)[2].weight for seed in (0, 1))
    assert not torch.equal(one, two)


def test_rows_come_from_the_view_that_the_epoch_has() -> None:
    seen = [(torch.full((5, 2), float(view)) + torch.arange(5)[:, None] / 10,) for view in range(4)]
    views = Views(2, seed=3)
    rows = memory._from_views(seen, views)
    picked = np.array([4, 1])
    for epoch in range(4):
        (found,) = rows(picked, epoch)
        expected = views.of(epoch, picked) + picked / 10
        assert found[:, 0].tolist() == pytest.approx(expected.tolist())


def test_differences_are_within_seeds() -> None:
    difference, error = memory.compared([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-9)
    assert memory.compared([0.5], [0.4]) == (pytest.approx(0.1), 0.0)


def test_few_seeds_need_a_large_difference() -> None:
    assert memory.verdict(0.042, 0.01, 3) == "no difference seen"
    assert memory.verdict(0.044, 0.01, 3) == "higher"
    assert memory.verdict(-0.028, 0.01, 5) == "lower"
    assert memory.verdict(0.0, 0.0, 3) == "no difference seen"
    assert memory.verdict(0.1, 0.0, 1) == "one seed"


def log() -> dict[str, Any]:
    machine = dict.fromkeys(("torch", "threads", "cores", "processor", "clock", "load_1min"), 1)
    exact = {"depth": "half", "encoding": "exact", "bytes_on_disk": 4096.0, "error": 0.0}
    half = exact | {"encoding": "bfloat16", "bytes_on_disk": 2048.0, "error": 1e-3}
    peak = {"job": "run", "before_bytes": 2**20, "peak_bytes": 2**30}
    kinds = {
        "memory": [peak | {"cache": "off"}, peak | {"cache": "on", "peak_bytes": 2**29}],
        "encodings": [exact | {"accuracies": [0.5, 0.7]}, half | {"accuracies": [0.4, 0.6]}],
        "views": [
            {"views": "1", "accuracies": [0.4, 0.6]},
            {"views": memory.FRESH, "accuracies": [0.5, 0.7]},
        ],
    }
    return {
        "results": [
            {"name": k, "kind": k, "title": k, "machine": machine, "epochs": 9, "entries": e}
            for k, e in kinds.items()
        ]
    }


def test_the_tables_compare_with_the_right_row() -> None:
    text = memory.table(log())
    assert "| `run` | 1.0 MB | 1,024 MB | 512 MB | 0.50 |" in text
    assert "| half | exact | 4.0 KB | 1.00 | 0 | 0.6000 |  |  |" in text
    assert (
        "| half | bfloat16 | 2.0 KB | 2.00 | 1.0e-03 | 0.5000 | -0.1000 ± 0.0000 | lower |" in text
    )
    assert "| 1 | 0.5000 | -0.1000 ± 0.0000 | lower |" in text
    assert "2 seeds. 9 epochs." in text


def test_only_what_was_measured_is_reported() -> None:
    one = {"results": log()["results"][:1]}
    assert "Accuracy by" not in memory.table(one)
    assert "Nothing measured" in memory.table({"results": []})


def test_a_report_needs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    import sys

    file = tmp_path / "log.json"
    file.write_text(json.dumps(log()))
    monkeypatch.setattr(sys, "argv", ["frontier_memory.py", "--report", "--log", str(file)])
    threads = torch.get_num_threads()
    memory.main()
    torch.set_num_threads(threads)
    assert "0.50" in file.with_suffix(".md").read_text("utf-8")
    assert json.loads(file.read_text()) == log()
