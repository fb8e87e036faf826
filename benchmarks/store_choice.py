"""Which way of keeping rows on disk: our own flat files, or a library that others keep?

Every candidate is filled in blocks of 32 rows and read in random batches of 32, warm and cold, in
turn with all others. Cold means that every page of its files was dropped from memory and the
candidate opened again.

    python benchmarks/store_choice.py [--folder /tmp] [--rounds 5]
    python benchmarks/store_choice.py --report      # the table again from the log
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import safetensors.numpy
import tensordict
import torch
import zarr
from bench import RESULTS, processor
from numpy.typing import NDArray
from safetensors import safe_open

from frostline.frontier.store import BLOCK_ROWS, Column, Store

#: float32 values per row, and rows.
SIZES = {"1.5 KB": (384, 20_000), "100 KB": (25_600, 3_000), "400 KB": (102_400, 1_000)}
BATCH, WARM_BATCHES, COLD_BATCHES = 32, 20, 6


class Candidate:
    """One way to keep `rows` rows of `width` float32 values in a folder."""

    name = ""
    notes = ""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.folder, self.rows, self.width = folder, rows, width

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        raise NotImplementedError

    def open(self) -> None:
        """Get ready to read."""
        raise NotImplementedError

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and maps."""


class Ours(Candidate):
    """The store of this package."""

    name = "own flat files"
    notes = "checksum of every row, on every read; any order; processes share without locks"

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        self.open()
        for i, block in enumerate(blocks):
            self.store.write(i * BLOCK_ROWS, {"x": block})

    def open(self) -> None:
        """Get ready to read."""
        columns = [Column("x", "float32")]
        self.store = Store(self.folder, columns, rows=self.rows, seed=b"benchmark")

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        values, ok = self.store.read(rows)
        assert ok.all()
        return values["x"]

    def close(self) -> None:
        """Let go of files and maps."""
        self.store.close()


class PlainMap(Candidate):
    """A plain map of one file."""

    name = "np.memmap"
    notes = "no checksums, no record of which rows are there; SIGBUS on a full disk or a cut file"

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        shape = (self.rows, self.width)
        array = np.memmap(self.folder / "x", np.float32, "w+", shape=shape)
        for i, block in enumerate(blocks):
            array[i * BLOCK_ROWS : i * BLOCK_ROWS + len(block)] = block
        array.flush()
        self.array = array

    def open(self) -> None:
        """Get ready to read."""
        shape = (self.rows, self.width)
        self.array = np.memmap(self.folder / "x", np.float32, "r", shape=shape)

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        return np.asarray(self.array[rows])

    def close(self) -> None:
        """Let go of files and maps."""
        del self.array


class SafeTensors(Candidate):
    """A file per block."""

    name = "safetensors"
    notes = "one file per block, handles kept open; header checked, payload not"

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        for i, block in enumerate(blocks):
            safetensors.numpy.save_file({"x": block}, self.folder / f"{i}.safetensors")
        self.open()

    def open(self) -> None:
        """Get ready to read."""
        self.handles: dict[int, Any] = {}

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        out = np.empty((len(rows), self.width), np.float32)
        for i, row in enumerate(rows.tolist()):
            block, inner = divmod(row, BLOCK_ROWS)
            if block not in self.handles:
                path = self.folder / f"{block}.safetensors"
                self.handles[block] = safe_open(path, framework="numpy").get_slice("x")
            out[i] = self.handles[block][inner]
        return out

    def close(self) -> None:
        """Let go of files and maps."""
        self.handles.clear()


class TensorDictMap(Candidate):
    """A memory-mapped tensor."""

    name = "tensordict"
    notes = "MemoryMappedTensor: as np.memmap"

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        self.tensor = tensordict.MemoryMappedTensor.empty(
            (self.rows, self.width), dtype=torch.float32, filename=str(self.folder / "x.memmap")
        )
        for i, block in enumerate(blocks):
            first = i * BLOCK_ROWS
            self.tensor[first : first + len(block)] = torch.from_numpy(block)

    def open(self) -> None:
        """Get ready to read."""
        self.tensor = tensordict.MemoryMappedTensor.from_filename(
            str(self.folder / "x.memmap"), torch.float32, torch.Size((self.rows, self.width))
        )

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        return torch.Tensor(self.tensor[torch.from_numpy(rows)]).numpy()

    def close(self) -> None:
        """Let go of files and maps."""
        del self.tensor


class Zarr(Candidate):
    """A sharded array."""

    name = "zarr 3"
    notes = "a shard per block, a chunk per row, no compression, CRC-32C of every chunk"

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        self.array = zarr.create_array(
            self.folder / "x.zarr",
            shape=(self.rows, self.width),
            chunks=(1, self.width),
            shards=(BLOCK_ROWS, self.width),
            dtype="float32",
            compressors=[zarr.codecs.Crc32cCodec()],
        )
        for i, block in enumerate(blocks):
            self.array[i * BLOCK_ROWS : i * BLOCK_ROWS + len(block)] = block

    def open(self) -> None:
        """Get ready to read."""
        array = zarr.open_array(self.folder / "x.zarr", mode="r")
        self.array = array

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        return np.asarray(self.array.get_orthogonal_selection((rows,)))

    def close(self) -> None:
        """Let go of files and maps."""
        del self.array


class Lmdb(Candidate):
    """A B+ tree of rows."""

    name = "LMDB"
    notes = "a key per row, a transaction per block without flush; one writer at a time; no sums"

    def _environment(self, **options: Any) -> lmdb.Environment:
        size = int(self.rows * (self.width * 4 + 8192) * 1.5) + (64 << 20)
        return lmdb.open(str(self.folder), map_size=size, sync=False, readahead=False, **options)

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        self.environment = self._environment()
        for i, block in enumerate(blocks):
            with self.environment.begin(write=True) as transaction:
                for j, row in enumerate(block):
                    key = (i * BLOCK_ROWS + j).to_bytes(8, "big")
                    transaction.put(key, row.data.cast("B"), append=True)

    def open(self) -> None:
        """Get ready to read."""
        self.environment = self._environment(readonly=True, lock=False)

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        out = np.empty((len(rows), self.width), np.float32)
        with self.environment.begin(buffers=True) as transaction:
            for i, row in enumerate(rows.tolist()):
                value = transaction.get(row.to_bytes(8, "big"))
                out[i] = np.frombuffer(value, np.float32)
        return out

    def close(self) -> None:
        """Let go of files and maps."""
        self.environment.close()


class Arrow(Candidate):
    """One file of record batches."""

    name = "Arrow IPC"
    notes = "a record batch per block, mapped; written once in order, whole at the end; no sums"

    def fill(self, blocks: Iterable[NDArray[Any]]) -> None:
        """Write all blocks, in order."""
        schema = pa.schema([("x", pa.binary(self.width * 4))])
        path = str(self.folder / "x.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for block in blocks:
                buffers = [None, pa.py_buffer(block)]
                column = pa.FixedSizeBinaryArray.from_buffers(schema[0].type, len(block), buffers)
                writer.write_batch(pa.record_batch([column], schema=schema))
        self.open()

    def open(self) -> None:
        """Get ready to read."""
        self.file = pa.memory_map(str(self.folder / "x.arrow"))
        self.reader = pa.ipc.open_file(self.file)
        self.batches: dict[int, NDArray[Any]] = {}

    def _batch(self, number: int) -> NDArray[Any]:
        if number not in self.batches:
            buffer = self.reader.get_batch(number).column(0).buffers()[1]
            self.batches[number] = np.frombuffer(buffer, np.float32).reshape(-1, self.width)
        return self.batches[number]

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as one new array."""
        out = np.empty((len(rows), self.width), np.float32)
        for i, row in enumerate(rows.tolist()):
            out[i] = self._batch(row // BLOCK_ROWS)[row % BLOCK_ROWS]
        return out

    def close(self) -> None:
        """Let go of files and maps."""
        self.batches.clear()
        del self.reader
        self.file.close()


CANDIDATES = (Ours, PlainMap, SafeTensors, TensorDictMap, Zarr, Lmdb, Arrow)


def blocks_of(rows: int, width: int) -> Iterable[NDArray[Any]]:
    """Blocks whose first value in each row is its number; the rest does not compress."""
    noise = np.random.default_rng(0).standard_normal((BLOCK_ROWS, width), dtype=np.float32)
    for first in range(0, rows, BLOCK_ROWS):
        block = noise[: rows - first].copy()
        block[:, 0] = np.arange(first, first + len(block))
        yield block


def drop(folder: Path) -> None:
    """Let no page of these files stay in memory (they must be closed and unmapped)."""
    gc.collect()
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def timed_reads(candidate: Candidate, random: np.random.Generator, batches: int) -> list[float]:
    """Milliseconds of each batch; every batch is checked after the clock stopped."""
    took = []
    for _ in range(batches):
        rows = random.integers(0, candidate.rows, BATCH)
        start = time.perf_counter()
        values = candidate.read(rows)
        took.append(1e3 * (time.perf_counter() - start))
        assert values.shape == (BATCH, candidate.width)
        assert (values[:, 0] == rows).all()
    return took


def typical(found: dict[str, Any], kind: str) -> float:
    """The lower quartile of warm batches (what others do on the machine only ever adds).

    Cold batches count by rounds, and by the median of their means: a map fetches more than was
    asked for, so its later batches are partly warm.
    """
    if kind == "warm":
        return statistics.quantiles(found["warm"], n=4)[0]
    each = np.reshape(found["cold"], (-1, COLD_BATCHES))
    return float(np.median(each.mean(axis=1)))


def measure(size: str, place: Path, rounds: int) -> dict[str, Any]:
    width, rows = SIZES[size]
    candidates = [kind(place / kind.__name__, rows, width) for kind in CANDIDATES]
    result: dict[str, Any] = {c.name: {"fill": [], "warm": [], "cold": []} for c in candidates}
    for _ in range(2):
        for candidate in candidates:
            shutil.rmtree(candidate.folder, ignore_errors=True)
            candidate.folder.mkdir()
            start = time.perf_counter()
            candidate.fill(blocks_of(rows, width))
            result[candidate.name]["fill"].append(time.perf_counter() - start)
            candidate.close()
            drop(candidate.folder)
    random = np.random.default_rng(1)
    for _ in range(rounds):
        for candidate in candidates:
            drop(candidate.folder)
            candidate.open()
            result[candidate.name]["cold"] += timed_reads(candidate, random, COLD_BATCHES)
            candidate.close()
    for candidate in candidates:
        candidate.open()
        for first in range(0, rows, BATCH):
            candidate.read(np.arange(first, min(first + BATCH, rows)))
    for _ in range(rounds):
        for candidate in candidates:
            result[candidate.name]["warm"] += timed_reads(candidate, random, WARM_BATCHES)
    for candidate in candidates:
        candidate.close()
        files = [p for p in candidate.folder.rglob("*") if p.is_file()]
        result[candidate.name]["files"] = len(files)
        result[candidate.name]["bytes"] = sum(p.stat().st_blocks * 512 for p in files)
        shutil.rmtree(candidate.folder)
    return result


def table(log: dict[str, Any]) -> str:
    lines = [
        "# The store: own flat files or a library?",
        "",
        "Made by `benchmarks/store_choice.py` from `store_choice.json`. Random batches of 32 rows",
        "in interleaved rounds; in brackets the time against ours. Warm: each row was read before;",
        "lower quartile of batches. Cold: pages dropped and files opened again (what the host of a",
        f"virtual machine caches is not); median of rounds of {COLD_BATCHES} batches. Fill: in",
        "order, not flushed.",
        "",
    ]
    for size, results in log["sizes"].items():
        width, rows = SIZES[size]
        payload = rows * width * 4
        lines += [
            f"## Rows of {size} ({rows:,} of them)",
            "",
            "| candidate | warm, ms | cold, ms | fill, MB/s | bytes / payload | files |",
            "|---|---|---|---|---|---|",
        ]
        ours = {k: typical(results[Ours.name], k) for k in ("warm", "cold")}
        for name, found in results.items():
            cells = []
            for key in ("warm", "cold"):
                value = typical(found, key)
                cells.append(f"{value:.2f} ({value / ours[key]:.2f})")
            cells.append(f"{payload / min(found['fill']) / 1e6:,.0f}")
            cells += [f"{found['bytes'] / payload:.3f}", f"{found['files']:,}"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## What each promises", "", "| candidate | |", "|---|---|"]
    lines += [f"| {kind.name} | {kind.notes} |" for kind in CANDIDATES]
    lines += ["", "## The choice", "", *CONCLUSION, "", describe(log), ""]
    return "\n".join(line.rstrip() for line in lines)


CONCLUSION = (
    "Own flat files. Maps (np.memmap, tensordict, Arrow, safetensors, LMDB) win as long as all is",
    "in memory: they copy, and check nothing; ours takes a checksum of every copy. Once rows must",
    "come from disk, which is when the speed of a store matters, maps wait for one page after",
    "another with Python held up, while ours asks for the whole batch at once. Of the libraries",
    "only zarr checks rows, and it reads and writes far more slowly. LMDB is safe when killed, but",
    "has one writer at a time and finds no changed bit. Arrow and safetensors files are written",
    "whole, so a store that fills in the order of training is a file per block or nothing. Short",
    "rows that were read once are kept in memory here as well, after they were checked.",
)


def describe(log: dict[str, Any]) -> str:
    m = log["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    return f"{m['processor']}, {m['cores']} cores, load when started {m['load_1min']}; {versions}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only the table, from the log")
    chosen = parser.parse_args()
    path = RESULTS / "store_choice.json"
    if not chosen.report:
        torch.set_num_threads(1)
        modules = (np, safetensors, tensordict, zarr, lmdb, pa)
        log: dict[str, Any] = {
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "load_1min": round(os.getloadavg()[0], 1),
                "versions": {m.__name__: m.__version__ for m in modules},
            },
            "sizes": {},
        }
        with tempfile.TemporaryDirectory(dir=chosen.folder) as place:
            for size in SIZES:
                log["sizes"][size] = measure(size, Path(place), chosen.rounds)
        path.write_text(json.dumps(log, indent=1) + "\n")
    text = table(json.loads(path.read_text()))
    (RESULTS / "store_choice.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
