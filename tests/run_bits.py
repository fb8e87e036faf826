"""What two runs of the same settings must have in common, bit for bit."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from frostline._io import read_lines, verify_folder
from frostline.backends.torch.checkpoint import checkpoint_folders
from frostline.records import without_costs

#: Keys of a summary that depend on the clock or the machine.
_CLOCK = ("wall_s", "training_s", "measure_s", "policy_s", "signals_s", "apply_s", "digest_s")
_MACHINE = (
    "first_look_s", "signal_s", "peak_memory_bytes", "backward_share", "cache", "savings",
)  # fmt: skip


def run_bits(run: Path) -> dict[str, Any]:
    """Weights, optimizer state, plan history, records, proof, results and the saved model."""
    last = checkpoint_folders(run / "checkpoints")[0]
    verify_folder(last)
    verify_folder(run / "model")
    state = json.loads((last / "state.json").read_text())
    del state["extra"]["costs"], state["parts"]["random"]
    # Measured costs differ from run to run, and with them what they weigh.
    del state["extra"]["loop"]["backward_share_sum"]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "last": last.name[:13],
        "tensors": {file.name: _sha256(file) for file in sorted(last.glob("*.safetensors"))},
        "state": state,
        "record": [without_costs(line) for line in read_lines(run / "record.jsonl").records],
        "certificate": _sha256(run / "certificate.json"),
        "summary": {k: v for k, v in summary.items() if k not in (*_CLOCK, *_MACHINE)},
        "metrics": _without_clock(run / "metrics.csv"),
        "model": _sha256(run / "model" / "model.safetensors"),
        "config": (run / "config.yaml").read_text().replace(str(run), "RUN"),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_clock(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "wall_s"} for row in csv.DictReader(file)]
