"""One attempt at a recorded run of `fit` with checkpoints, which may be killed.

As a program, for Keras backends whose threads do not survive a fork::

    python crash_run.py FOLDER OUT.json [DISK CALL AT WHICH IT IS KILLED]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from faulty_disk import KillingDisk, QuickDisk
from frostline import _io
from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.checkpoint import load_checkpoint, optimizer_names
from frostline.backends.keras.names import tensors
from frostline.integrations.keras import CheckpointCallback, FreezeCallback, RecordCallback
from frostline.records import without_costs

EPOCHS, BATCHES, BATCH = 4, 3, 8
POLICY = "autofreeze:every=3st"  # gathers gradients between decisions


def network() -> keras.Model:
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    model = keras.Sequential(
        [keras.Input((6,)), dense(8, "tanh", name="body"),
         keras.layers.BatchNormalization(name="norm"), dense(8, "tanh", name="middle"),
         keras.layers.Dropout(0.3, seed=5, name="drop"), dense(3, name="head")]
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(0.01), loss, metrics=["accuracy"])
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(3)
    x = source.normal(size=(BATCH * BATCHES, 6)).astype("float32")
    return x, source.integers(0, 3, len(x)).astype("int32")


def attempt(folder: Path, out: Path, disk: _io.Disk) -> None:
    """Go on from the newest checkpoint to the end, and write what came out."""
    _io.disk = disk
    model = network()
    freezing = FreezeCallback(POLICY, total_steps=EPOCHS * BATCHES, steps_per_epoch=BATCHES)
    done = load_checkpoint(folder / "checkpoints", model, freezing)
    saving = CheckpointCallback(folder / "checkpoints", freezing)
    model.fit(
        *data(), batch_size=BATCH, epochs=EPOCHS, initial_epoch=done["epoch"] if done else 0,
        shuffle=False, verbose=0, validation_data=data(),
        callbacks=[freezing, RecordCallback(folder / "run", freezing), saving],
    )  # fmt: skip
    out.write_text(json.dumps(evidence(model, freezing, folder / "run")))


def evidence(model: keras.Model, freezing: FreezeCallback, run: Path) -> dict[str, Any]:
    """Everything that must be as without the kills: bits, decisions, proof, record."""
    found = {f"model {n}": v for n, v in tensors(model).items()}
    found |= {f"optimizer {n}": v for n, v in optimizer_names(model).items()}
    lines = _io.read_lines(run / "record.jsonl").records
    return {
        "bits": {n: hashlib.sha256(array_of(v).tobytes()).hexdigest() for n, v in found.items()},
        "decisions": [d.to_json() for d in freezing.decisions],
        "proof": freezing.certificate.to_json(),
        "record": [without_costs(line) for line in lines],
    }


def main() -> None:
    folder, out, *at = sys.argv[1:]
    attempt(Path(folder), Path(out), KillingDisk(int(at[0])) if at else QuickDisk())


if __name__ == "__main__":
    main()
