"""One run of a study in a process of its own: settings in, events out, a line of JSON each.

Run as ``python -m frostline.study.child`` by `frostline.study.runner`; standard output belongs to
the events, so whatever else prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

from frostline._io import finite_json
from frostline.errors import FrostlineError

__all__ = ["main"]

#: Steps come faster than anybody can look at them.
_STEPS_EVERY_S = 0.2


def main() -> int:
    """Read the settings from standard input, run, and say how it ended; the exit code."""
    settings = json.load(sys.stdin)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as events:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return _run(settings, events)


def _run(settings: dict[str, Any], events: TextIO) -> int:
    last = [0.0]

    def say(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            if time.monotonic() - last[0] < _STEPS_EVERY_S:
                return
            last[0] = time.monotonic()
        events.write(json.dumps(finite_json(event)) + "\n")
        events.flush()

    from frostline.tasks.run import fit  # noqa: PLC0415  after standard output was moved

    try:
        fit(**settings, on_event=say)
    except FrostlineError as error:
        say(
            {
                "kind": "failed",
                "error": type(error).__name__,
                "asked": error.asked,
                "found": str(error.found),
                "fix": error.fix,
            }
        )
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    say({"kind": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
