"""The process in which trackers live: lines of JSON in, what failed out.

Started with ``python -m frostline.integrations.tracker_process``. Trackers open threads, sockets
and files, draw random numbers, take signals and seconds of import; none of that may touch a run.
When the run's process ends in whatever way, standard input ends, and the trackers are closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from frostline.integrations.trackers import About, Status, Tracker, open_tracker

__all__ = ["main", "serve"]


def main() -> int:
    """Read the run from the first line, then what to log; the exit code."""
    with contextlib.suppress(OSError, AttributeError):  # not on Windows
        os.nice(10)  # training goes first
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever they print
        lines = (json.loads(line) for line in sys.stdin)
        first = next(lines, None)
        if first is not None:
            serve(first, lines, answers)
    return 0


def serve(first: dict[str, Any], lines: Iterator[dict[str, Any]], answers: TextIO) -> None:
    """Open trackers, pass on what comes, close them.

    Args:
        first: the run and its trackers.
        lines: numbers, texts, and the status at the end; without one the run is unfinished.
        answers: receives a line of JSON for each tracker that failed.
    """
    about = About(Path(first["folder"]), first["name"], first["settings"], first["step"])
    trackers: dict[str, Tracker] = {}
    for name in first["trackers"]:
        with _told(name, answers, trackers):
            trackers[name] = open_tracker(name, about)
    status: Status = "unfinished"
    for line in lines:
        if "status" in line:
            status = line["status"]
            break
        for name in list(trackers):
            with _told(name, answers, trackers):
                _pass_on(trackers[name], line)
    for name in list(trackers):
        with _told(name, answers, trackers):
            trackers[name].close(status)


def _pass_on(tracker: Tracker, line: dict[str, Any]) -> None:
    if values := line.get("values"):
        # What is no number in JSON comes as a string.
        tracker.values({name: float(value) for name, value in values.items()}, line["step"])
    for name, text in line.get("texts", {}).items():
        tracker.text(name, text, line["step"])


@contextlib.contextmanager
def _told(name: str, answers: TextIO, trackers: dict[str, Tracker]) -> Iterator[None]:
    """A tracker that fails is left out from then on, and the run is told once."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever a tracker raises
        trackers.pop(name, None)
        found = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        with contextlib.suppress(OSError):  # the run may be gone
            answers.write(json.dumps({"tracker": name, "found": found}) + "\n")
            answers.flush()


if __name__ == "__main__":
    sys.exit(main())
