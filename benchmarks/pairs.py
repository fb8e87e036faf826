"""Pairs of a pretrained model and a data set of the shared folder, as `fit` takes them."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from frontier_models import SHARED, caffe_picture, convert_lite0, minilm_path, squeezenet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from models_for_tests import CIFAR_MEAN, CIFAR_STD, CifarResNet

__all__ = ["Pair", "pairs"]


@dataclass(frozen=True)
class Pair:
    """A model and data.

    Attributes:
        title: for people.
        model: as `fit` takes it.
        data: folder of the data, or a function that makes it.
        groups: layer groups of the backbone.
        settings: of the runs, besides.
        held_out: kept out of sight while rules were designed, and reported apart.
    """

    title: str
    model: str
    data: Path | str
    groups: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool = False


def cifar_resnet(depth: int, num_classes: int) -> nn.Module:
    """A CIFAR ResNet of 20, 32 or 56 layers."""
    return CifarResNet((depth - 2) // 6, num_classes)


def resnet20(num_classes: int) -> nn.Module:
    """As named, for `fit`."""
    return cifar_resnet(20, num_classes)


def resnet32(num_classes: int) -> nn.Module:
    """As named, for `fit`."""
    return cifar_resnet(32, num_classes)


def resnet56(num_classes: int) -> nn.Module:
    """As named, for `fit`."""
    return cifar_resnet(56, num_classes)


def squeezenet64(num_classes: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """SqueezeNet for pictures of 64 pixels: it brings its own preparation."""
    return squeezenet(num_classes)[0], partial(caffe_picture, side=64)


def shortened(source: Path, target: Path, each: Mapping[str, int]) -> Path:
    """Tables of texts with so many samples of each class, the first ones; 0: all.

    Args:
        source: folder with a table per split.
        target: folder to write to, if it is not there.
        each: samples of a class, by split.
    """
    for split, most in each.items():
        path = target / f"{split}.csv"
        if path.exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        with (source / path.name).open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        seen: Counter[str] = Counter()
        label = head.index("label")
        kept = []
        for row in rows:
            seen[row[label]] += 1
            if not most or seen[row[label]] <= most:
                kept.append(row)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *kept])
    return target


def pairs(scratch: Path) -> dict[str, Pair]:
    """All pairs by name; converted weights go to the scratch folder."""
    data = {name: SHARED / "data" / name for name in ("caltech20_32", "flowers5", "trec6")}
    data |= {"sst2": SHARED / "data/sst2"}
    # 77 classes: evaluating on all samples would take longer than learning from a thousand.
    some = {"train": 0, "val": 5, "test": 10}
    data |= {"banking77": shortened(SHARED / "data/banking77", scratch / "banking77-short", some)}
    cifar = {
        "image_size": 32,
        "image_mean": list(CIFAR_MEAN),
        "image_std": list(CIFAR_STD),
        "views": 2,
    }
    colours = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "image_size": 128}

    def resnet(depth: int) -> dict[str, Any]:
        return {
            "weights": str(SHARED / f"models/resnet_cifar10/resnet{depth}.safetensors"),
            **cifar,
        }

    lite0 = {"weights": str(convert_lite0(scratch / "lite0.safetensors")), **colours}
    text, short = f"hf:{minilm_path()}", {"max_length": 64}
    return {
        "caltech20-resnet20": Pair(
            "caltech20, ResNet-20", "pairs:resnet20", data["caltech20_32"], 10, resnet(20)
        ),
        "caltech20-resnet56": Pair(
            "caltech20, ResNet-56", "pairs:resnet56", data["caltech20_32"], 28, resnet(56),
            held_out=True,
        ),
        "flowers5-lite0": Pair(
            "flowers5, EfficientNet-lite0", "timm:tf_efficientnet_lite0",
            data["flowers5"], 18, lite0,
        ),
        "flowers5-squeezenet": Pair(
            "flowers5, SqueezeNet", "frontier_models:squeezenet", data["flowers5"], 9,
            {"head_lr": 1e-3, "lr": 1e-4},
        ),
        "trec6-minilm": Pair("trec6, MiniLM", text, data["trec6"], 7, short),
        "sst2-minilm": Pair("sst2, MiniLM", text, data["sst2"], 7, short),
        "banking77-minilm": Pair(
            "banking77, MiniLM", text, data["banking77"], 7, short,
            held_out=True,
        ),
        "caltech20-resnet32": Pair(
            "caltech20, ResNet-32", "pairs:resnet32", data["caltech20_32"], 16, resnet(32),
            held_out=True,
        ),
        "caltech20-squeezenet": Pair(
            "caltech20 at 64 px, SqueezeNet", "pairs:squeezenet64", data["caltech20_32"],
            9, {"head_lr": 1e-3, "lr": 1e-4}, held_out=True,
        ),
        "caltech20-lite0": Pair(
            "caltech20, EfficientNet-lite0", "timm:tf_efficientnet_lite0",
            data["caltech20_32"], 18, lite0, held_out=True,
        ),
        "flowers5-resnet20": Pair(
            "flowers5 at 32 px, ResNet-20", "pairs:resnet20", data["flowers5"], 10, resnet(20),
            held_out=True,
        ),
        "flowers5-resnet56": Pair(
            "flowers5 at 32 px, ResNet-56", "pairs:resnet56", data["flowers5"], 28, resnet(56),
            held_out=True,
        ),
        "spoken-resnet20": Pair(
            "spoken digits as pictures, ResNet-20", "pairs:resnet20", "far_data:spoken_digits",
            10, {**resnet(20), "augment": "none", "views": 1}, held_out=True,
        ),
    }  # fmt: skip
