"""What keeping freed memory saves in a step on a processor, and what it costs in memory.

Every run is a process of its own: two epochs of `fit` without the cache, the second one timed, in
turn with and without `frostline.memory.keeping_freed`.

    python benchmarks/freed_memory.py [--rounds 2] [--threads 2]
    python benchmarks/freed_memory.py --report        # the table from the log

Needs `data` and `models` of the shared folder beside the checkout, and the GNU C library.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import arguments, machine, made_by, read, where, write
from pairs import pairs

import frostline
from frostline.memory import keeping_freed

NAME = "freed_memory"
#: Pairs of `pairs.py`, and settings besides.
WHAT: Mapping[str, Mapping[str, Any]] = {
    "flowers5-lite0": {"image_size": 160, "train_samples": 320},
    "flowers5-squeezenet": {"train_samples": 320},
    "caltech20-resnet20": {},
    "trec6-minilm": {"train_samples": 600},
}
POLICIES = ("full",)
#: Set to what it is by default, it changes nothing but that Frostline changes nothing either.
USUAL = {"MALLOC_ARENA_TEST": "8"}


def one(pair: str, policy: str, threads: str, place: str) -> None:
    """A single run in this process: prints JSON on the last line."""
    chosen = pairs(Path(place))[pair]
    settings = {**chosen.settings, **WHAT[pair], "epochs": 2, "threads": int(threads)}
    ends: list[float] = []

    def note(event: Mapping[str, Any]) -> None:
        if event["kind"] == "epoch":
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        run = frostline.fit(
            chosen.model, chosen.data, policy, output=Path(folder) / "run", cache="off",
            checkpoint_every=None, on_event=note, **settings,
        )  # fmt: skip
        peak_bytes = run.summary["peak_memory_bytes"]
    print(json.dumps({"epoch_s": ends[-1] - ends[-2], "peak_bytes": peak_bytes}))


def measure(pair: str, policy: str, rounds: int, threads: int, place: str) -> dict[str, Any]:
    """Runs with and without, in turn."""
    runs: dict[str, list[Any]] = {"kept": [], "usual": []}
    for turn in range(rounds):
        for name in ("kept", "usual") if turn % 2 else ("usual", "kept"):
            environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
            found = subprocess.run(
                [sys.executable, __file__, "--one", pair, policy, str(threads), place],
                env=environment | (USUAL if name == "usual" else {}),
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            runs[name].append(json.loads(found.stdout.splitlines()[-1]))
    return {"pair": pair, "policy": policy, **runs}


def table(log: Mapping[str, Any]) -> str:
    """The page."""
    lines = [
        "# Keeping freed memory during a run\n",
        (
            f"{where(log['machine'])}, {log['rounds']} runs each. Seconds of an epoch with what is "
            "freed kept in the process, and as the C library does it; medians, and the least and "
            "largest. Every run is a process of its own.\n"
        ),
        "| run | policy | usual, s | kept, s | usual / kept | peak, kept / usual |",
        "|---|---|---|---|---|---|",
    ]
    for row in log["results"]:
        usual, kept = ([run["epoch_s"] for run in row[name]] for name in ("usual", "kept"))
        peaks = [
            statistics.median(run["peak_bytes"] for run in row[name]) for name in ("kept", "usual")
        ]
        ratio = statistics.median(usual) / statistics.median(kept)
        lines.append(
            f"| {row['title']} | `{row['policy']}` | {_spread(usual)} | {_spread(kept)} "
            f"| {ratio:.2f} | {peaks[0] / peaks[1]:.2f} |"
        )
    return "\n".join([*lines, "", made_by(NAME, log["machine"]), ""])


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure and write the table."""
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
        return
    chosen = arguments(__doc__, rounds=2)
    if chosen.report:
        log = read(NAME, "cpu")
        write(NAME, log, table(log))
        return
    with keeping_freed() as works:
        if not works:
            raise SystemExit("keeping freed memory changes nothing here: no GNU C library")
    with tempfile.TemporaryDirectory() as place:
        known = pairs(Path(place))
        results = [
            {"title": known[pair].title.partition(" at ")[0], "settings": dict(more)}
            | measure(pair, policy, chosen.rounds, chosen.threads, place)
            for pair, more in WHAT.items()
            for policy in POLICIES
        ]
    log = {"machine": machine(chosen), "rounds": chosen.rounds, "results": results}
    write(NAME, log, table(log))


if __name__ == "__main__":
    main()
