"""Does a comparison of a policy with itself say that both take the same time?

Two arms of one policy, many seeds, in the mirrored order of `frostline.compare`. The ratio of their
times should be 1, and its interval should hold 1: what is left is drift that the order does not
cancel, and what the second arm gains from the first, the shared store above all.

    python benchmarks/same_time.py [--seeds 8] [--epochs 3] [--threads 1]
    python benchmarks/same_time.py --report

Needs `data` and `models` of the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, processor
from pairs import pairs

import frostline
from frostline.study.statistics import ratio

LOG, TABLE = RESULTS / "same_time.json", RESULTS / "same_time.md"
POLICIES = ("full", "first:groups=4", "linear-probe")
BOUND = 0.02


def measure(policy: str, seeds: int, epochs: int, threads: int, scratch: Path) -> dict[str, Any]:
    """Seconds of both arms by seed."""
    pair = pairs(scratch)["caltech20-resnet20"]
    before = os.getloadavg()[0]
    study = frostline.compare(
        pair.model, pair.data, {"a": policy, "b": policy},
        seeds=seeds, output=scratch / policy.replace(":", "-"), isolate=False, epochs=epochs,
        threads=threads, cache_dir=scratch / "cache", checkpoint_every=None, **pair.settings,
    )  # fmt: skip
    found = study.analyse()
    arms = {
        name: {str(seed): [run.training_s, run.alone_s] for seed, run in found[name].runs.items()}
        for name in ("a", "b")
    }
    return {
        "arms": arms,
        "load": [before, os.getloadavg()[0]],
        "epochs": epochs,
        "threads": threads,
    }


def table(log: Mapping[str, Any]) -> str:
    """The page."""
    lines = [
        "# A policy compared with itself\n",
        (
            f"{log['title']}, torch {log['torch']}, {log['processor']}. Seconds of training of arm "
            "b over those of arm a, the same policy with the same seeds in mirrored order, "
            "geometric mean and 95 % interval; as they were, and charged as if alone.\n"
        ),
        "| policy | seeds, epochs | as they were | as if alone | within 1.00 ± 0.02 | load |",
        "|---|---|---|---|---|---|",
    ]
    for policy, found in log["policies"].items():
        raw, alone = (_ratio(found["arms"], place) for place in (0, 1))
        held = abs((alone.ratio or 0) - 1) <= BOUND
        lines.append(
            f"| `{policy}` | {alone.n}, {found['epochs']} | {_text(raw)} | {_text(alone)} "
            f"| {'yes' if held else 'NO'} | {found['load'][0]:.1f} to {found['load'][1]:.1f} |"
        )
    return "\n".join([*lines, "", "Made by `python benchmarks/same_time.py`.", ""])


def _ratio(arms: Mapping[str, Mapping[str, list[float]]], place: int) -> Any:
    a, b = ({int(seed): both[place] for seed, both in arms[name].items()} for name in "ab")
    return ratio(b, a)


def _text(found: Any) -> str:
    if found.low is None:
        return f"{found.ratio:.3f}"
    return f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f})"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    options = parser.parse_args()
    if not options.report:
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as scratch:
            found = {
                policy: measure(
                    policy, options.seeds, options.epochs, options.threads, Path(scratch)
                )
                for policy in POLICIES
            }
        log = {
            "title": "caltech20 at 32 px, ResNet-20",
            "torch": str(torch.__version__),
            "processor": processor(),
            "policies": found,
        }
        LOG.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    text = table(json.loads(LOG.read_text("utf-8")))
    TABLE.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
