"""What does a change of plan in the midst of Keras's `fit` cost, and is another way cheaper?

One schedule (a block more is unfrozen in each phase) in three ways and without freezing: see
`keras_switch_runs.py`. In one process per Keras backend; ways are interleaved in random order.

    python benchmarks/keras_switch.py [--backends ...] [--rounds 5] [--quick] [--report]

Writes `results/keras_switch.json` and `results/keras_switch.md`; with `--quick` (tiny sizes, a
minute or two) into the system's temporary folder. Quote ratios: they are of interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import RESULTS, processor

BACKENDS = ("tensorflow", "jax", "torch")
WAYS = ("callback", "phases", "mask")
HERE = Path(__file__).resolve().parent
_RUN = (
    "import json, sys, keras_switch_runs as runs; "
    "print(json.dumps(runs.measure(int(sys.argv[1]), sys.argv[2] == 'quick')))"
)


def run_in(backend: str, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """All rounds in a process of this Keras backend."""
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-c", _RUN, str(rounds), "quick" if quick else "whole"]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(log: Mapping[str, Any]) -> str:
    """Markdown: a row per backend and way."""
    lines = [
        (
            "| Keras backend | way | traces | one switch, in steps | step time against full, "
            "by phase | frozen tensors that moved | largest difference in weights from phases |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for backend in BACKENDS:
        if backend in log["rounds"]:
            lines += [_row(backend, way, log["rounds"][backend]) for way in WAYS]
    m = log["machine"]
    lines += [
        "",
        (
            "A switch: what the first step of a phase took beyond a usual one, medians over "
            f"switches and {m['rounds']} rounds. {m['threads']} thread(s) of {m['cores']} cores "
            f"({m['processor']}), load when started {m['load_1min']}. On torch nothing is "
            "compiled: traces are runs. Made by `python benchmarks/keras_switch.py`."
        ),
    ]
    return "# What a change of plan costs in Keras\n\n" + "\n".join(lines) + "\n"


def _row(backend: str, way: str, rounds: Sequence[Mapping[str, Any]]) -> str:
    runs = [r[way] for r in rounds]
    full = [statistics.median(r["full"]["step_s"]) for r in rounds]
    steps = [s / f for r, f in zip(runs, full, strict=True) for s in r["switch_s"]]
    phases = [
        statistics.median(r["step_s"][p] / f for r, f in zip(runs, full, strict=True))
        for p in range(len(runs[0]["step_s"]))
    ]
    ratios = ", ".join(f"{p:.2f}" for p in phases)
    moved = max(r["moved"] for r in runs)
    largest = max(r["largest_difference"] for r in runs)
    return (
        f"| {backend} | {way} | {runs[0]['traces']} | {statistics.median(steps):.0f} | {ratios} "
        f"| {moved or 'none'} | {largest:.1g} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    options = parser.parse_args()
    folder = Path(tempfile.gettempdir()) if options.quick else RESULTS
    path = folder / "keras_switch.json"
    if not options.report:
        machine = {
            "rounds": options.rounds, "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "cores": os.cpu_count(), "processor": processor(),
            "load_1min": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        rounds = {b: run_in(b, options.rounds, options.quick) for b in options.backends}
        path.write_text(json.dumps({"machine": machine, "rounds": rounds}, indent=1) + "\n")
    text = table(json.loads(path.read_text("utf-8")))
    (folder / "keras_switch.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
