"""Runs whose fault is known: small networks pretrained here, and samples they suit or do not.

A sample holds two angles, each in a plane of its own, among many values that are noise. A network
that learned one angle has no use for the other. Samples are named by texts, which are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

INPUTS, WIDTHS = 128, (32, 32, 24, 24)
CLASSES, KNOWN = 4, 8
#: What a network may have been pretrained on: the angle of the tasks, the other one, or first
#: both and then, in its deeper half, the other one alone.
Source = Literal["near", "far", "both, then far"]


def samples(
    count: int, seed: int, *, noise: float, classes: int = CLASSES
) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Values (N, 128), and the classes of the first and of the second angle.

    Args:
        count: N.
        seed: of everything random.
        noise: standard deviation, where angles lie on a circle of radius 2.
        classes: equal parts of the circle.
    """
    random = np.random.default_rng((seed, count))
    first, second = np.arange(count) % classes, random.integers(classes, size=count)
    x = noise * random.standard_normal((count, INPUTS))
    for start, part in ((0, first), (2, second)):
        angle = 2 * math.pi * (part + random.normal(0, 0.15, count)) / classes
        x[:, start] += 2 * np.cos(angle)
        x[:, start + 1] += 2 * np.sin(angle)
    # No value of its own holds an angle: they are turned into all of them.
    turned = x @ np.linalg.qr(np.random.default_rng(7).standard_normal((INPUTS, INPUTS)))[0]
    return torch.from_numpy(turned).float(), first, second


def data_folder(
    folder: Path, *, noise: int, train: int = 400, val: int = 200, test: int = 400, seed: int = 0
) -> Path:
    """CSV files whose texts name samples; a data set that `fit` reads.

    Args:
        folder: made if absent.
        noise: its standard deviation in hundredths.
        train: samples, as are `val` and `test`.
        seed: another one gives other samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place, (name, count) in enumerate({"train": train, "val": val, "test": test}.items()):
        rows = [
            f"{3 * seed + place} {count} {noise} {i},part {i % CLASSES}\n" for i in range(count)
        ]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    return folder


@cache
def _table(seed: int, count: int, noise: int) -> Tensor:
    return samples(count, seed, noise=noise / 100)[0]


def prepared(text: str) -> Tensor:
    """The sample that a text names: (128,)."""
    seed, count, noise, place = map(int, text.split())
    return _table(seed, count, noise)[place]


def network(num_classes: int) -> nn.Module:
    """Four layer groups and a head."""
    blocks: list[nn.Module] = [
        nn.Sequential(nn.Linear(wide_in, wide), nn.BatchNorm1d(wide), nn.ReLU())
        for wide_in, wide in zip((INPUTS, *WIDTHS), WIDTHS, strict=False)
    ]
    return nn.Sequential(*blocks, nn.Linear(WIDTHS[-1], num_classes))


def model(num_classes: int) -> tuple[nn.Module, object]:
    """What `planted_task:model` builds."""
    return network(num_classes), prepared


def pretrained(source: Source, folder: Path) -> Path:
    """Weights of a network that learned an angle; made once."""
    path = folder / f"{source.replace(', ', '-').replace(' ', '-')}.safetensors"
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(_learned(source).state_dict(), path)
    return path


def _learned(source: Source, steps: int = 250) -> nn.Module:
    x, *labels = samples(3000, 100, noise=0.6, classes=KNOWN)
    near, far = map(torch.from_numpy, labels)
    net = network(KNOWN)
    blocks = list(net.children())
    trained = list(net.parameters())
    if source == "both, then far":
        half = nn.Sequential(*blocks[:2])
        heads = [nn.Linear(WIDTHS[1], KNOWN) for _ in range(2)]

        def both(chosen: Tensor) -> Tensor:
            seen, pairs = half(x[chosen]), zip(heads, (near, far), strict=True)
            return sum(
                (functional.cross_entropy(head(seen), y[chosen]) for head, y in pairs),
                torch.zeros(()),
            )

        _train(both, [p for m in (half, *heads) for p in m.parameters()], steps)
        trained = [p for m in blocks[2:] for p in m.parameters()]
    y = near if source == "near" else far
    _train(lambda chosen: functional.cross_entropy(net(x[chosen]), y[chosen]), trained, steps)
    return net


def _train(
    loss: Callable[[Tensor], Tensor], trained: list[nn.Parameter], steps: int, count: int = 3000
) -> None:
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(count, (64,))).backward()
        optimizer.step()
        schedule.step()
