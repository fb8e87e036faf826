"""`frostline.fit` on the device: with and without the cache, interrupted, in mixed precision."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline.errors import ConfigError
from frostline.tasks.config import load_config
from frostline.tasks.run import Run
from run_bits import run_bits
from tasks.conftest import tiny_bert, tokenizer, write_table
from tiny_task import RUN

__all__ = ["tiny_bert", "tokenizer"]


@pytest.fixture(autouse=True)
def _quick_disk() -> Iterator[None]:
    with use_disk(QuickDisk()):
        yield


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of the device in TF32 round a thousand times more."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def fit(output: Path, device: torch.device, **settings: Any) -> Run:
    return frostline.fit(**RUN | {"device": str(device), "output": output} | settings)


def text_settings(bert: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    table = folder / "moods.csv"
    return {
        "model": f"hf:{bert}",
        "weights": "pretrained",
        "data": table if table.exists() else write_table(table, 60),
    }


def assert_alike(one: Run, other: Run, *, rel: float = 5e-4) -> None:
    """Losses equal but for rounding, and so are the weights."""
    assert one.summary["steps"] == other.summary["steps"]
    for key in ("train_loss", "val_loss", "val_accuracy"):
        values = [[float(m[key]) for m in run.metrics] for run in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=rel), key
    for key in ("test_loss", "test_accuracy"):
        assert one.summary[key] == pytest.approx(other.summary[key], rel=rel), key
    mine, theirs = (frostline.load(run).model.state_dict() for run in (one, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=10 * rel, atol=10 * rel)


@pytest.mark.parametrize("policy", ["linear-probe", "gradual:every=1ep"])
@pytest.mark.parametrize("kind", ["pictures", "texts"])
def test_the_same_run_with_and_without_the_cache(
    kind: str, policy: str, gpu: torch.device, tmp_path: Path, tiny_bert: Path
) -> None:
    # Adaptive optimizers blow up the rounding of gradients that are 0 (of biases before a norm).
    settings: dict[str, Any] = {"policy": policy, "optimizer": "sgd"}
    if kind == "texts":
        settings |= text_settings(tiny_bert, tmp_path / "data")
    plain = fit(tmp_path / "plain", gpu, cache="off", **settings)
    stores = tmp_path / "stores"
    cached = fit(tmp_path / "cached", gpu, cache="on", cache_dir=stores, **settings)
    assert_alike(cached, plain)
    assert cached.summary["cache"]["replayed"] > 0, cached.summary["cache"]["notes"]
    again = fit(tmp_path / "again", gpu, cache="on", cache_dir=stores, **settings)
    assert again.summary["cache"]["filled_rows"] == 0
    ours, theirs = (run_bits(run.path) for run in (again, cached))
    for part in ("tensors", "model", "certificate"):
        assert ours[part] == theirs[part], part


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision: str, gpu: torch.device, tmp_path: Path) -> None:
    if precision == "fp16" and gpu.type != "cuda":
        with pytest.raises(ConfigError, match="fp16"):
            fit(tmp_path / "plain", gpu, precision=precision)
        return
    plain = fit(tmp_path / "plain", gpu, cache="off", precision=precision)
    cached = fit(
        tmp_path / "cached", gpu, cache="on", cache_dir=tmp_path / "stores", precision=precision
    )
    assert_alike(cached, plain, rel=2e-2)
    assert cached.summary["cache"]["replayed"] > 0, cached.summary["cache"]["notes"]


def test_the_peak_is_that_of_the_device(cuda: torch.device, tmp_path: Path) -> None:
    run = fit(tmp_path / "run", cuda, cache="off")
    peak = run.summary["peak_memory_bytes"]
    assert 0 < peak <= torch.cuda.max_memory_allocated(cuda)
    # A process with CUDA in it has more resident; this network needs a few, cuBLAS some more.
    assert peak < 512 << 20
    held = torch.empty(1 << 30, dtype=torch.uint8, device=cuda)
    larger = fit(tmp_path / "larger", cuda, cache="off")
    assert larger.summary["peak_memory_bytes"] >= held.nbytes


class Stop(Exception):
    """The process ends here, as far as the run can tell."""


@pytest.mark.parametrize("cache", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stopped_and_resumed_equals_uninterrupted(
    precision: str, cache: str, gpu: torch.device, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Batch norm, dropout on the device and random augmentation: whatever is lost shows."""
    if precision == "fp16":
        request.getfixturevalue("cuda")
    settings: dict[str, Any] = {
        "policy": "gradual:every=5st", "batch_size": 8, "accumulate": 2, "precision": precision,
        "optimizer_state": "release", "checkpoint_every": "2st", "cache": cache,
        "augment": "flip" if cache == "on" else "basic", "class_weights": "balanced",
    }  # fmt: skip
    stores = tmp_path / "stores"
    settings |= {"cache_dir": stores} if cache == "on" else {}
    straight = fit(tmp_path / "straight", gpu, **settings)
    if cache == "on":
        shutil.rmtree(stores)

    left = 5

    def on_event(event: dict[str, Any]) -> None:
        nonlocal left
        left -= event["kind"] == "step"
        if left == 0:
            raise Stop

    with pytest.raises(Stop):
        fit(tmp_path / "stopped", gpu, on_event=on_event, **settings)
    torch.manual_seed(123)  # another process would begin elsewhere
    resumed = fit(tmp_path / "stopped", gpu, **settings)
    ours, theirs = run_bits(resumed.path), run_bits(straight.path)
    for part in ours:
        assert ours[part] == theirs[part], part


def test_a_seed_decides_everything(gpu: torch.device, tmp_path: Path) -> None:
    """Dropout on the device as well, whatever was drawn there before."""
    runs = []
    for name in ("one", "other"):
        runs.append(run_bits(fit(tmp_path / name, gpu, policy="full").path))
        torch.rand(7, device=gpu)
    for part in runs[0]:
        assert runs[0][part] == runs[1][part], part


def test_what_was_trained_predicts_without_the_device(gpu: torch.device, tmp_path: Path) -> None:
    run = fit(tmp_path / "run", gpu)
    loaded = frostline.load(run)
    assert {p.device.type for p in loaded.model.parameters()} == {"cpu"}
    assert load_config(run.path / "config.yaml").device == str(gpu)
