"""Do reads from the store keep up with training: cold, warm, shuffled, with less memory than data?

    python benchmarks/store_reads.py [--folder /tmp] [--rounds 5]
    python benchmarks/store_reads.py --report      # the tables again from the log

"Less memory than data" runs a reader in a memory cgroup of its own, below that of this process,
whose limit covers the files it has in the page cache; it needs the right to make one (version 1 or
2 of the interface), and is left out, and said to be, where that is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench import RESULTS, processor

from frostline.frontier import segments
from frostline.frontier.prefetch import Prefetcher
from frostline.frontier.store import BLOCK_ROWS, Column, Encoding, Store

SIZES = {"1.5 KB": (384, 20_000), "100 KB": (25_600, 4_000), "400 KB": (102_400, 1_000)}
BATCH = 32
#: A data set of 1.2 GB, read with this much memory.
LARGE_ROWS, LARGE_WIDTH, LIMIT_BYTES = 12_000, 25_600, 256 << 20
#: Milliseconds of the training step that reads are hidden behind.
STEP_MS = (5, 20)
KINDS = ("in order, cold", "shuffled, cold", "in order, warm", "shuffled, warm", "later epochs")


def opened(folder: Path, rows: int, encoding: Encoding = "exact") -> Store:
    columns = [Column("x", "float32", encoding)]
    return Store(folder, columns, rows=rows, seed=b"benchmark")


def fill(folder: Path, rows: int, width: int, encoding: Encoding = "exact") -> None:
    store = opened(folder, rows, encoding)
    noise = np.random.default_rng(0).standard_normal((BLOCK_ROWS, width), dtype=np.float32)
    for first in range(0, rows, BLOCK_ROWS):
        store.write(first, {"x": noise[: rows - first]})
    store.close()


def drop(folder: Path) -> None:
    """Let no page of these files stay in memory."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def order(rows: int, shuffled: bool, seed: int) -> list[np.ndarray]:
    numbers = np.random.default_rng(seed).permutation(rows) if shuffled else np.arange(rows)
    return [numbers[i : i + BATCH] for i in range(0, rows, BATCH)]


def epoch(store: Store, batches: list[np.ndarray]) -> float:
    """Milliseconds per batch of one pass."""
    start = time.perf_counter()
    for rows in batches:
        _, ok = store.read(rows)
        assert ok.all()
    return 1e3 * (time.perf_counter() - start) / len(batches)


def passes(folder: Path, rows: int, rounds: int, encoding: Encoding) -> dict[str, list[float]]:
    """Cold and warm passes, in order and shuffled, in turn. A store is opened for each."""
    found: dict[str, list[float]] = {}
    for i in range(rounds):
        for shuffled in (False, True):
            for cold in (True, False):
                if cold:
                    drop(folder)
                store = opened(folder, rows, encoding)
                took = epoch(store, order(rows, shuffled, i))
                name = f"{'shuffled' if shuffled else 'in order'}, {'cold' if cold else 'warm'}"
                found.setdefault(name, []).append(took)
                store.close()
    return found


def again(folder: Path, rows: int, rounds: int) -> list[float]:
    """Shuffled passes after the first with the same store open, as training makes them."""
    store = opened(folder, rows)
    epoch(store, order(rows, shuffled=False, seed=0))
    took = [epoch(store, order(rows, shuffled=True, seed=i)) for i in range(rounds)]
    store.close()
    return took


def announced(folder: Path, rows: int, rounds: int) -> dict[str, list[float]]:
    """Cold shuffled batches with and without telling the kernel of all rows first, in turn."""
    found: dict[str, list[float]] = {"announced": [], "one by one": []}
    real = segments.announce
    for i in range(2 * rounds):
        name = ("announced", "one by one")[i % 2]
        segments.announce = real if name == "announced" else lambda _: None
        drop(folder)
        store = opened(folder, rows)
        found[name].append(epoch(store, order(rows, shuffled=True, seed=i // 2)[:20]))
        store.close()
    segments.announce = real
    return found


# -- hiding behind a step ------------------------------------------------------------------------


class Step:
    """A training step: one core computes, or (on an accelerator) this thread waits."""

    def __init__(self, milliseconds: float, *, waits: bool) -> None:
        self.wait_s = milliseconds / 1e3 if waits else 0.0
        self.matrix = np.ones((256, 256), np.float32)
        self.turns = 1
        if not waits:
            took = min(self.seconds() for _ in range(50))
            self.turns = max(1, round(milliseconds / 1e3 / took))

    def __call__(self) -> None:
        """Work, or wait."""
        if self.wait_s:
            time.sleep(self.wait_s)
            return
        for _ in range(self.turns):
            self.matrix @ self.matrix

    def seconds(self) -> float:
        """Take a step, and say how long it took."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def hidden(folder: Path, rows: int, rounds: int, step: Step) -> dict[str, list[float]]:
    """Milliseconds per step: alone, with cold reads before each, and with reads ahead."""
    count = min(60, rows // BATCH)
    found: dict[str, list[float]] = {"step alone": [], "read, then step": [], "read ahead": []}
    for i in range(rounds):
        batches = order(rows, shuffled=True, seed=i)[:count]
        start = time.perf_counter()
        for _ in batches:
            step()
        found["step alone"].append(1e3 * (time.perf_counter() - start) / count)
        for name in ("read, then step", "read ahead"):
            drop(folder)
            store = opened(folder, rows)
            start = time.perf_counter()
            if name == "read ahead":
                with Prefetcher(store, batches, depth=2) as ahead:
                    for _, (_, ok) in ahead:
                        assert ok.all()
                        step()
            else:
                for asked in batches:
                    assert store.read(asked)[1].all()
                    step()
            found[name].append(1e3 * (time.perf_counter() - start) / count)
            store.close()
    return found


# -- less memory than data -----------------------------------------------------------------------


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A cgroup below our own with this limit, removed afterwards."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = dict(line.split(":", 2)[1:] for line in lines)
    if "memory" in own:
        base, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        parent = base / own["memory"].lstrip("/")
    else:
        base, limit = Path("/sys/fs/cgroup"), "memory.max"
        parent = base / own[""].lstrip("/")
    group = parent / f"store-reads-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def inner(folder: Path, group: str, epochs: int) -> None:
    """Runs in a process of its own: joins the group, reads, prints what it cost."""
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    store = opened(folder, LARGE_ROWS)
    took = [epoch(store, order(LARGE_ROWS, shuffled=True, seed=i)) for i in range(epochs)]
    store.close()
    usage: dict[str, int] = {}
    for name in ("memory.max_usage_in_bytes", "memory.peak", "memory.failcnt"):
        if group and (path := Path(group, name)).exists():
            usage[name] = int(path.read_text())
    lines = Path("/proc/self/io").read_text().splitlines()
    disk = next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    print(json.dumps({"ms": took, "read_bytes": disk, "usage": usage}))


def starved(folder: Path, epochs: int = 3) -> dict[str, Any]:
    """The same passes over a large store with plenty of memory and with little."""
    fill(folder, LARGE_ROWS, LARGE_WIDTH)

    def run(group: str) -> dict[str, Any]:
        drop(folder)
        command = [sys.executable, __file__, "--inner", str(folder), group, str(epochs)]
        return json.loads(subprocess.check_output(command, text=True))

    found: dict[str, Any] = {"plenty": run("")}
    try:
        with memory_group(LIMIT_BYTES) as group:
            found["little"] = run(str(group))
    except OSError as error:
        found["refused"] = str(error)
    return found


# -- the table -----------------------------------------------------------------------------------


def rate(milliseconds: float, width: int) -> str:
    size = BATCH * width * 4
    return f"{milliseconds:.2f} ms ({size / milliseconds / 1e3:,.0f} MB/s)"


def table(log: dict[str, Any]) -> str:
    middle = statistics.median
    lines = [
        "# The store: do reads keep up?",
        "",
        "Made by `benchmarks/store_reads.py` from `store_reads.json`: batches of 32 rows, medians",
        "of interleaved rounds, every row checked. Cold: its pages were dropped from memory before",
        "the pass (what the host of a virtual machine caches is not). MB/s of decoded float32.",
        "",
        "| rows | " + " | ".join(KINDS) + " |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in log["passes"].items():
        width = found["width"]
        cells = [rate(middle(found[k]), width) if k in found else "-" for k in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Cold shuffled batches, all rows announced first as the store does, or read one by one:",
    ]
    lines += ["", "| rows | announced | one by one | |", "|---|---|---|---|"]
    for size, found in log["announced"].items():
        good, bad = middle(found["announced"]), middle(found["one by one"])
        lines.append(f"| {size} | {good:.2f} ms | {bad:.2f} ms | {bad / good:.1f} times |")
    lines += ["", "Later epochs: shuffled, the same store open. Columns of up to 64 MB are then in",
              "memory (1.5 KB rows here).", "", "## Behind a training step", "",
              "Cold shuffled rows of 100 KB. While a core computes, the reader needs another one:",
              "those lines say little where the load below is near the number of cores.", "",
              "| step | alone | read, then step | read ahead | hidden |",
              "|---|---|---|---|---|"]  # fmt: skip
    for name, found in log["hidden"].items():
        alone, inline, ahead = (min(v) for v in found.values())
        share = (inline - ahead) / (inline - alone)
        cells = [f"{value:.1f} ms" for value in (alone, inline, ahead)]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {share:.0%} |")
    lines += ["", "## More data than memory", ""]
    starved_log = log["starved"]
    data = LARGE_ROWS * LARGE_WIDTH * 4
    plenty = starved_log["plenty"]
    if "little" in starved_log:
        little = starved_log["little"]
        peak = next((v for k, v in little["usage"].items() if "max_usage" in k or "peak" in k), 0)
        lines += [
            f"A store of {data / 1e6:,.0f} MB, shuffled, read by a process in a memory cgroup of",
            f"{LIMIT_BYTES / 1e6:,.0f} MB, page cache included (it used {peak / 1e6:,.0f} MB),",
            "against one without a limit.",
            "",
            "| | epoch 1 | epoch 2 | epoch 3 | read from disk |",
            "|---|---|---|---|---|",
        ]
        for name, found in (("no limit", plenty), ("limit", little)):
            cells = [rate(v, LARGE_WIDTH) for v in found["ms"]]
            volume = f"{found['read_bytes'] / data:.2f} times the data"
            lines.append(f"| {name} | " + " | ".join([*cells, volume]) + " |")
    else:
        lines.append(f"Not measured: {starved_log['refused']}.")
    m = log["machine"]
    lines += ["", f"{m['processor']}, {m['cores']} cores, load when started {m['load_1min']}.", ""]
    return "\n".join(lines)


def measure(place: Path, rounds: int) -> dict[str, Any]:
    log: dict[str, Any] = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 1),
        },
        "passes": {},
        "announced": {},
        "hidden": {},
    }
    encodings: tuple[Encoding, ...] = ("exact", "bfloat16", "float16", "int8")
    for size, (width, rows) in SIZES.items():
        for encoding in encodings if size == "100 KB" else encodings[:1]:
            folder = place / f"{width}-{encoding}"
            fill(folder, rows, width, encoding)
            found: dict[str, Any] = dict(passes(folder, rows, rounds, encoding))
            found["width"] = width
            if encoding == "exact":
                found["later epochs"] = again(folder, rows, rounds)
                log["announced"][size] = announced(folder, rows, rounds)
            log["passes"][f"{size}, {encoding}"] = found
    width, rows = SIZES["100 KB"]
    folder = place / f"{width}-exact"
    for waits in (False, True):
        for milliseconds in STEP_MS:
            step = Step(milliseconds, waits=waits)
            name = f"{milliseconds} ms, {'an accelerator computes' if waits else 'a core computes'}"
            log["hidden"][name] = hidden(folder, rows, rounds, step)
    log["starved"] = starved(place / "large")
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only the tables, from the log")
    parser.add_argument("--inner", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inner:
        inner(Path(chosen.inner[0]), chosen.inner[1], int(chosen.inner[2]))
        return
    path = RESULTS / "store_reads.json"
    if not chosen.report:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as place:
            log = measure(Path(place), chosen.rounds)
        path.write_text(json.dumps(log, indent=1) + "\n")
    text = table(json.loads(path.read_text()))
    (RESULTS / "store_reads.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
