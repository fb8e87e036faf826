"""Runs `fit` again and again in processes that are killed, until it comes to its end.

A program: imports everything once, then forks a child for each attempt, so that a kill costs no
import. Reads one JSON object from its standard input and writes one to its output::

    {"output": FOLDER, "settings": {...}, "kills": [KILL, ...]}  ->  {"ends": [...], "left": [...]}

A kill is {"event": n} (SIGKILL at the n-th event, that is between updates), {"disk": n} (SIGKILL
at the n-th call that changes the disk), {"after_s": t} (SIGKILL from outside, t seconds after the
start of training, wherever that is) or {"interrupt": n} (Ctrl-C at the n-th event).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import frostline
from faulty_disk import KillingDisk, QuickDisk, kill_now
from frostline import _io
from frostline.errors import FrostlineError
from frostline.tasks import session

assert session  # imported before the first fork


def attempt(output: str, settings: dict[str, Any], kill: dict[str, Any], started: int) -> int:
    """In the child: one call of fit; its exit code."""
    _io.disk = KillingDisk(kill["disk"]) if "disk" in kill else QuickDisk()
    events = 0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal events
        if event["kind"] == "start":
            os.write(started, b"!")
        if events == kill.get("event"):
            kill_now()
        if events == kill.get("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        events += 1

    try:
        frostline.fit(output=output, on_event=on_event, **settings)
    except KeyboardInterrupt:
        return 130
    except FrostlineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def run_child(output: str, settings: dict[str, Any], kill: dict[str, Any]) -> int:
    """Fork one attempt, kill it from outside if asked to, and wait for its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(reading)
            code = attempt(output, settings, kill, writing)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    os.read(reading, 1)  # training has begun, or the child is gone
    os.close(reading)
    if "after_s" in kill:
        time.sleep(kill["after_s"])
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    ends = [run_child(job["output"], job["settings"], kill) for kill in job["kills"]]
    while ends[-1:] != [0] and len(ends) < len(job["kills"]) + 3:
        ends.append(run_child(job["output"], job["settings"], {}))
    litter = sorted(str(p) for p in Path(job["output"]).rglob(".tmp-*"))
    json.dump({"ends": ends, "litter": litter}, sys.stdout)


if __name__ == "__main__":
    main()
