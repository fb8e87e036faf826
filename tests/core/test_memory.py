"""What becomes of freed memory, seen by the pages that the system has to hand out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(os, "confstr") or
    "CS_GNU_LIBC_VERSION" not in os.confstr_names or not os.confstr("CS_GNU_LIBC_VERSION"),
    reason="needs the GNU C library",
)  # fmt: skip

MIB = 1 << 20
#: Frees and needs blocks as training steps do; prints pages handed out per step, and what is
#: resident after the last.
SCRIPT = """
import ctypes, resource
from pathlib import Path
from frostline.memory import keeping_freed

MIB = 1 << 20
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages are counted, so all alike

def step():
    for size in (80, 20, 40):
        block = bytearray(size * MIB)  # asks for cleared memory
        block[::4096] = bytes(len(block[::4096]))

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) // 1024 for x in lines if x.startswith("VmRSS"))

def main():
    for _ in range(2):
        step()
    print(pages())
    with keeping_freed() as kept:
        print(int(kept))
        with keeping_freed():
            step()
        step()
        print(pages())
        print(resident())
    print(resident())
    print(pages())

main()
"""


def told(**environment: str) -> list[int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in found.stdout.split()]


def test_freed_memory_is_kept_and_then_given_back():
    before, kept, inside, held, after, again = told()
    assert kept == 1
    pages_of_a_step = 140 * MIB // 4096
    assert inside < pages_of_a_step / 20 < pages_of_a_step / 2 < before
    assert held - after > 60  # MiB
    assert again > pages_of_a_step / 2


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TOP_PAD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
)
def test_what_the_user_chose_is_not_changed(environment: dict[str, str]):
    _, kept, *_ = told(**environment)
    assert kept == 0


COLLECTOR = """
import gc
from frostline.memory import leaving_old_objects

class Cycle:
    alive = 0
    def __init__(self):
        self.me = self
        Cycle.alive += 1
    def __del__(self):
        Cycle.alive -= 1

def main():
    gc.collect()
    Cycle()
    before = len(gc.get_objects())
    with leaving_old_objects():
        print(int(len(gc.get_objects()) < before / 10))
        gc.collect()
        print(Cycle.alive)
        Cycle()
        with leaving_old_objects():
            pass
        print(gc.get_freeze_count() > 0)
    print(Cycle.alive, gc.get_freeze_count())
    gc.collect()
    print(Cycle.alive)
    gc.disable()
    with leaving_old_objects():
        print(gc.get_freeze_count())

main()
"""


def test_the_collector_leaves_what_was_there_and_collects_what_came():
    found = subprocess.run(
        [sys.executable, "-c", COLLECTOR], capture_output=True, text=True, check=True
    )
    # Few objects are looked at; what was there waits, also through a block inside this one; what
    # came is collected at the end, and all is as before.
    assert found.stdout.split() == ["1", "1", "True", "1", "0", "0", "0"]
