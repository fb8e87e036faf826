"""What does plain Keras do when layers are frozen or unfrozen, and what does Frostline do?

Each case (`keras_trap_cases.py`) trains a small network for a few batches and looks at the bits of
what should be frozen and of what should train: once with Keras alone and once with
`FreezeCallback`, in one process per Keras backend. Nothing is timed; the machine may be busy.

    python benchmarks/keras_traps.py [--backends tensorflow jax torch] [--report]

Writes `results/keras_traps.json` and the table in docs/keras_traps.md. `--report` makes the table
from the log, without runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence_report import RESULTS, ROOT, filled

LOG = RESULTS / "keras_traps.json"
PAGE = ROOT / "docs" / "keras_traps.md"
BACKENDS = ("tensorflow", "jax", "torch")
TOOLS = ("keras", "frostline")
HERE = Path(__file__).resolve().parent
_RUN = "import json, sys, keras_trap_cases as cases; print(json.dumps(cases.run(sys.argv[1:])))"


def run_in(backend: str, tools: Sequence[str]) -> dict[str, Any]:
    """Every case in a process of this Keras backend."""
    environment = os.environ | {
        "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", _RUN, *tools]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(log: Mapping[str, Any]) -> str:
    """Markdown: one row per case, a column per tool and backend."""
    runs = {b: log[b]["cases"] for b in BACKENDS if b in log}
    columns = [(tool, b) for tool in TOOLS for b in runs]
    head = " | ".join(f"{tool.capitalize()}, {b}" for tool, b in columns)
    lines = [f"| case | {head} |", "|---" * (len(columns) + 1) + "|"]
    for name, entry in next(iter(runs.values())).items():
        cells = " | ".join(_cell(runs[b][name].get(tool)) for tool, b in columns)
        lines.append(f"| {entry['title']} | {cells} |")
    versions = sorted({log[b]["keras"] for b in runs})
    lines += ["", f"Keras {', '.join(versions)}. Made by `python benchmarks/keras_traps.py`."]
    return "\n".join(lines)


def _cell(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return "-"
    if outcome["note"]:
        return outcome["note"]
    verdict = outcome["verdict"]
    return verdict if verdict == "right" else f"**{verdict}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    options = parser.parse_args()
    log = json.loads(LOG.read_text("utf-8")) if LOG.exists() else {}
    if not options.report:
        for backend in options.backends:
            log[backend] = run_in(backend, options.tools)
        LOG.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    PAGE.write_text(filled(PAGE.read_text("utf-8"), PAGE.name, "traps", table(log)), "utf-8")


if __name__ == "__main__":
    main()
