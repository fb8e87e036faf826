"""What does it cost to try eight strategies, in full fine-tunings?

`sweep` runs them with one seed and stops early what others leave behind (successive halving over
epochs); they share the frozen outputs that are stored. Full fine-tuning by itself is run before
and after it, and its seconds of training and validation are divided by the mean of these two. What
`compare` takes, which runs all to their end, is in `auto.md`.

    python benchmarks/eight_strategies.py [--only PAIR ...] [--threads 1]
    python benchmarks/eight_strategies.py --report

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
from pairs import Pair, pairs

import frostline
from frostline.study.search import sweep

LOG, TABLE = RESULTS / "eight_strategies.json", RESULTS / "eight_strategies.md"
ASKED = 2.0
#: By pair.
STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "flowers5-lite0": (
        "linear-probe", "first:groups=14", "first:groups=9", "auto", "lp-ft",
        "gradual:until=50%", "autofreeze", "full",
    ),
    "trec6-minilm": (
        "linear-probe", "first:groups=5", "first:groups=3", "auto", "lp-ft",
        "gradual:until=50%", "autofreeze", "full",
    ),
}  # fmt: skip
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "flowers5-lite0": {"epochs": 9, "image_size": 96},
    "trec6-minilm": {"epochs": 9, "train_samples": 300},
}


def measure(name: str, pair: Pair, threads: int, scratch: Path) -> dict[str, Any]:
    """Seconds of the sweep and of full fine-tuning."""
    before = os.getloadavg()[0]
    settings: dict[str, Any] = {
        **pair.settings, **SETTINGS[name], "threads": threads, "patience": None,
        "checkpoint_every": None,
    }  # fmt: skip

    def alone(place: str) -> float:
        run = frostline.fit(
            pair.model, pair.data, "full", output=scratch / place, cache="off", **settings
        )
        return run.summary["training_s"]

    full = [alone("full-1")]
    swept = sweep(
        pair.model, pair.data, STRATEGIES[name], output=scratch / "sweep", isolate=False,
        cache_dir=scratch / "cache", **settings,
    )  # fmt: skip
    full.append(alone("full-2"))
    rows = {row.policy: row for row in swept.rows}
    return {
        "title": pair.title,
        "full_s": full,
        "settings": dict(SETTINGS[name]),
        "strategies": {
            policy: {
                "seconds": rows[policy].training_s,
                "epochs": rows[policy].epochs,
                "val": rows[policy].val_accuracy,
            }
            for policy in STRATEGIES[name]
        },
        "best": swept.rows[0].policy,
        "threads": threads,
        "load": [before, os.getloadavg()[0]],
        "processor": processor(),
        "torch": str(torch.__version__),
    }


def table(log: Mapping[str, Any]) -> str:
    """The page."""
    about = (
        "Seconds of training and validation of eight strategies in a `sweep` with one seed, over "
        "those of one full fine-tuning by itself (mean of one before and one after)."
    )
    lines = [f"# What it costs to try eight strategies\n\n{about}\n"]
    lines += ["| pair | in full fine-tunings | best | load |", "|---|---|---|---|"]
    lines += [_row(found) for found in log.values()]
    for found in log.values():
        lines += _details(found)
    return "\n".join([*lines, "", "Made by `python benchmarks/eight_strategies.py`.", ""])


def _full_s(found: Mapping[str, Any]) -> float:
    return sum(found["full_s"]) / len(found["full_s"])


def _row(found: Mapping[str, Any]) -> str:
    share = sum(row["seconds"] for row in found["strategies"].values()) / _full_s(found)
    verdict = "" if share <= ASKED else f" (MISSES {ASKED:g})"
    return (
        f"| {found['title']} | {share:.2f}{verdict} | `{found['best']}` "
        f"| {found['load'][0]:.1f} to {found['load'][1]:.1f} |"
    )


def _details(found: Mapping[str, Any]) -> list[str]:
    full_s = _full_s(found)
    shown = ", ".join(f"{name}={value}" for name, value in found["settings"].items())
    about = (
        f"{shown}; torch {found['torch']}, {found['threads']} thread(s), {found['processor']}; "
        f"full fine-tuning by itself took {found['full_s'][0]:.0f} and {found['full_s'][1]:.0f} s."
    )
    lines = ["", f"## {found['title']}\n\n{about}\n"]
    lines += ["| strategy | epochs | in full fine-tunings | validation |", "|---|---|---|---|"]
    lines += [
        f"| `{policy}` | {row['epochs']} | {row['seconds'] / full_s:.2f} | {100 * row['val']:.1f} |"
        for policy, row in found["strategies"].items()
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    chosen = parser.parse_args()
    log = json.loads(LOG.read_text()) if LOG.exists() else {}
    if not chosen.report:
        for name in chosen.only:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                log[name] = measure(name, pairs(folder)[name], chosen.threads, folder)
            LOG.write_text(json.dumps(log, indent=1) + "\n")
    TABLE.write_text(table(log))
    print(table(log))


if __name__ == "__main__":
    main()
