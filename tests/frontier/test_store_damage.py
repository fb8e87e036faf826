"""Faults of every kind: a row is what was written, or it is absent."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from faulty_disk import FAULTS, FaultyDisk, QuickDisk, count_calls, run_killed, use_disk
from frostline.errors import DamagedFile, StorageError
from frostline.frontier import segments
from frostline.frontier.store import Column, Store

COLUMNS = [Column("x", "float32"), Column("t", "int16", ragged=True)]
ROWS = 200
FIRSTS = range(0, ROWS, 32)
SEGMENT_BYTES = 1000


@pytest.fixture(autouse=True)
def _from_a_quick_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is flushed, and nothing is kept in memory: every read goes to the files."""
    monkeypatch.setattr(segments, "KEPT_BYTES", 0)
    with use_disk(QuickDisk()):
        yield


def opened(folder: Path, seed: bytes = b"k", **options) -> Store:
    return Store(folder, COLUMNS, rows=ROWS, seed=seed, **options)


def length_of(first: int) -> int:
    return 1 + first // 32 % 4


def block(first: int) -> dict[str, np.ndarray]:
    """The one right value of a block."""
    rows = np.arange(first, min(first + 32, ROWS))
    x = rows[:, None] + np.arange(3, dtype=np.float32) / 4
    t = rows[:, None, None] * 7 + np.arange(length_of(first) * 2).reshape(1, -1, 2)
    return {"x": x.astype(np.float32), "t": t.astype(np.int16)}


def fill(folder: Path, firsts=FIRSTS) -> None:
    store = opened(folder)
    for first in firsts:
        store.write(first, block(first))
    store.close()


def believed(store: Store) -> set[int]:
    """Rows that the store gives out; each is checked to be right."""
    rows = np.random.default_rng(0).permutation(ROWS)
    values, ok = store.read(rows)
    for i in np.flatnonzero(ok).tolist():
        first = rows[i] // 32 * 32
        right = {name: v[rows[i] - first] for name, v in block(int(first)).items()}
        length = length_of(int(first))
        assert (values["x"][i] == right["x"]).all()
        assert (values["t"][i, :length] == right["t"]).all()
        assert not values["t"][i, length:].any()
    for value in values.values():
        assert not value[~ok].any()
    return set(rows[ok].tolist())


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# -- changed, cut and swapped bytes --------------------------------------------------------------


def flip_bits(folder: Path, step: int) -> int:
    """Change one bit after another, every `step`-th; how many were tried."""
    fill(folder, [0, 32])
    whole = set(range(64))
    flips = unnoticed = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for bit in range(0, len(good) * 8, step):
            flips += 1
            broken = bytearray(good)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            try:
                store = opened(folder)
            except DamagedFile:
                assert path.name == "store.json"
                continue
            there = believed(store)
            if path.name == "001-01-000000.rows" and bit < 256 * 8:  # padding before its block
                assert there == whole
                continue
            unnoticed += there == whole
            assert len(whole - there) in ((0, 64) if path.suffix == ".json" else (0, 1))
            if there != whole and path.name.endswith(".rows"):
                assert store.damaged_rows == 1
            for first in (0, 32):
                assert store.write(first, block(first))
            assert believed(store) == whole
            store.close()
            assert path.read_bytes() == good
        path.write_bytes(good)
    assert unnoticed == 0
    return flips


def test_no_flipped_bit_is_believed(tmp_path: Path):
    assert flip_bits(tmp_path / "s", 37) > 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_none_of_all_bits_is_believed_flipped(tmp_path: Path):
    assert flip_bits(tmp_path / "s", 1) > 20_000


@pytest.mark.parametrize("name", ["000-00-000000.rows", "001-01-000000.rows", "001.sums"])
def test_a_truncated_file_loses_rows_and_nothing_else(tmp_path: Path, name: str):
    folder = tmp_path / "s"
    fill(folder)
    good = (folder / name).read_bytes()
    for size in range(0, len(good), 41):
        open_before = opened(folder)
        assert len(believed(open_before)) == ROWS
        os.truncate(folder / name, size)  # a map of this file would end the process
        for store in (open_before, opened(folder)):
            assert len(believed(store)) < ROWS or name.endswith("sums")
            store.close()
        fill(folder)
        assert (folder / name).read_bytes() == good
        assert len(believed(opened(folder))) == ROWS


def test_a_right_row_in_a_wrong_place_is_not_believed(tmp_path: Path):
    folder = tmp_path / "s"
    fill(folder)
    path, sums = folder / "000-00-000000.rows", folder / "000.sums"
    data, checks = bytearray(path.read_bytes()), bytearray(sums.read_bytes())
    for a, b in ((3, 70), (10, 11)):
        for array, size in ((data, 12), (checks, 8)):
            one, two = slice(a * size, (a + 1) * size), slice(b * size, (b + 1) * size)
            array[one], array[two] = array[two], array[one]
    path.write_bytes(data)
    sums.write_bytes(checks)
    store = opened(folder)
    assert set(range(ROWS)) - believed(store) == {3, 70, 10, 11}
    assert store.damaged_rows == 4
    assert store.verify().damaged == (3, 10, 11, 70)
    assert store.verify().checked == ROWS


def test_files_of_another_key_or_column_are_not_believed(tmp_path: Path):
    fill(tmp_path / "a")
    other = Store(tmp_path / "b", COLUMNS, rows=ROWS, seed=b"other")
    other.write(0, block(0))
    for path in (tmp_path / "a").glob("0*"):
        shutil.copy(path, tmp_path / "b" / path.name)
    other.close()
    store = opened(tmp_path / "b", seed=b"other")
    assert believed(store) == set()
    assert store.damaged_rows == ROWS
    twins = [Column("a", "float32"), Column("b", "float32")]
    store = Store(tmp_path / "c", twins, rows=ROWS, seed=b"k")
    x = block(0)["x"]
    store.write(0, {"a": x, "b": x})
    store.close()
    for kind in ("-00-000000.rows", ".sums"):
        shutil.copy(tmp_path / "c" / f"000{kind}", tmp_path / "c" / f"001{kind}")
    _, ok = Store(tmp_path / "c", twins, rows=ROWS, seed=b"k").read(np.arange(32))
    assert not ok.any()


def test_a_damaged_row_is_absent_until_it_is_written_again(tmp_path: Path, caplog):
    fill(tmp_path)
    path = tmp_path / "000-00-000000.rows"
    data = bytearray(path.read_bytes())
    data[12 * 40] ^= 1
    path.write_bytes(data)
    store = opened(tmp_path)
    assert store.present(np.array([40])).all()
    assert believed(store) == set(range(ROWS)) - {40}
    assert "1 damaged row(s)" in caplog.text
    assert not store.present(np.array([40])).any()
    assert store.damaged_rows == 1
    assert store.write(32, block(32))
    assert store.damaged_rows == 0
    assert believed(store) == set(range(ROWS))


def test_lost_shapes_are_learnt_again(tmp_path: Path, caplog):
    fill(tmp_path)
    (tmp_path / "shapes.json").write_bytes(b"{}")
    store = opened(tmp_path)
    assert "afresh" in caplog.text
    assert believed(store) == set() if store.present(np.arange(1)).any() else True
    store.write(0, block(0))
    assert believed(store) == set(range(ROWS))


# -- every call that can fail or be the last -----------------------------------------------------


def test_a_kill_at_any_call_loses_only_what_was_not_written(tmp_path: Path):
    fill(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    folder = tmp_path / "s"
    calls = count_calls(lambda: fill(tmp_path / "counted"))
    seen = set()
    for at in range(calls):
        assert run_killed(lambda: fill(folder), at)
        if folder.exists():
            store = opened(folder)
            seen.add(len(believed(store)))
            store.close()
        fill(folder)
        assert contents(folder) == whole
        shutil.rmtree(folder)
    assert {0, 32, 160, 192} <= seen


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "exit"])
@pytest.mark.parametrize("for_ever", [False, True])
def test_a_failing_call_is_a_clean_error(tmp_path: Path, fault: str, for_ever: bool):
    fill(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    folder = tmp_path / "s"
    calls = count_calls(lambda: fill(tmp_path / "counted"))
    for at in range(calls):
        disk = FaultyDisk(at, fault, for_ever=for_ever)
        with use_disk(disk), contextlib.suppress(StorageError):
            fill(folder)
        if (folder / "store.json").exists():
            believed(opened(folder))
        fill(folder)
        assert contents(folder) == whole
        shutil.rmtree(folder)


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked process; its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended_well(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_full_disk_is_a_clean_error_and_the_store_goes_on_after_it(tmp_path: Path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        store = opened(tmp_path)
        for first in (0, 32, 64):
            store.write(first, block(first))
        with pytest.raises(StorageError, match="File too large"):
            store.write(96, block(96))
        assert len(believed(store)) == 96
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY))
        for first in FIRSTS:
            assert store.write(first, block(first))
        assert len(believed(store)) == ROWS

    assert ended_well(in_child(limited))
    assert len(believed(opened(tmp_path))) == ROWS


# -- killed writers, and several at once ---------------------------------------------------------


def write_for_ever(folder: Path, seed: int) -> None:
    store = opened(folder)
    random = np.random.default_rng(seed)
    while True:
        first = int(random.choice(FIRSTS))
        store.write(first, block(first))


def killed_writers(tmp_path: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        folder = tmp_path / f"s{i % 5}"
        pid = in_child(lambda folder=folder, i=i: write_for_ever(folder, i))
        time.sleep(random.uniform(0.001, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        store = opened(folder)
        believed(store)
        store.close()
        assert not list(folder.glob(".tmp-*"))


def test_killed_writers_leave_valid_stores(tmp_path: Path):
    killed_writers(tmp_path, 20)


@pytest.mark.slow
def test_many_killed_writers_leave_valid_stores(tmp_path: Path):
    killed_writers(tmp_path, 600)


def share(folder: Path, seconds: float, seed: int) -> None:
    """Write and read at random, opening anew now and then; every row believed is right."""
    random = np.random.default_rng(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        store = opened(folder)
        for _ in range(20):
            first = int(random.choice(FIRSTS))
            store.write(first, block(first))
            there = believed(store)
            assert set(range(first, min(first + 32, ROWS))) <= there
        assert store.damaged_rows == 0
        store.close()


def shared(tmp_path: Path, seconds: float) -> None:
    folder = tmp_path / "s"
    pids = [in_child(lambda seed=seed: share(folder, seconds, seed)) for seed in (1, 2)]
    assert all([ended_well(pid) for pid in pids])  # noqa: C419 - wait for both
    fill(folder)
    fill(tmp_path / "alone")
    assert contents(folder) == contents(tmp_path / "alone")


def test_two_processes_share_a_store(tmp_path: Path):
    for i in range(5):
        shared(tmp_path / f"{i}", 0.3)


@pytest.mark.slow
def test_two_processes_share_a_store_for_long(tmp_path: Path):
    shared(tmp_path, 40)


# -- against a model -----------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """Two handles on one store, and a hand that damages its files.

    `clean` are the rows that must be there; any other row may be there, if it is right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path
        self.clean: set[int] = set()
        self.stores: list[Store] = []
        self.lost: list[set[int]] = [set(), set()]

    @initialize()
    def start(self) -> None:
        self.folder = Path(os.environ["FROSTLINE_TEST_FOLDER"]) / os.urandom(8).hex()
        self.stores = [opened(self.folder), opened(self.folder)]

    @rule(which=st.sampled_from([0, 1]), first=st.sampled_from(FIRSTS))
    def write(self, which: int, first: int) -> None:
        assert self.stores[which].write(first, block(first))
        rows = set(range(first, min(first + 32, ROWS)))
        self.clean |= rows
        self.lost[which] -= rows

    @rule(which=st.sampled_from([0, 1]))
    def read(self, which: int) -> None:
        there = believed(self.stores[which])
        # A handle that once saw a row damaged reports it absent until it writes it itself.
        assert self.clean <= there | self.lost[which]
        self.lost[which] |= set(range(ROWS)) - there
        self.lost[which] -= there

    @rule(which=st.sampled_from([0, 1]))
    def reopen(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = opened(self.folder)
        self.lost[which] = set()

    @rule(which=st.sampled_from([0, 1]))
    def verify(self, which: int) -> None:
        damage = self.stores[which].verify()
        assert not self.clean & set(damage.damaged)
        assert damage.checked >= len(self.clean)
        self.lost[which] = set(damage.damaged)

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        files = sorted(p for p in self.folder.iterdir() if p.suffix != ".json")
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        size = path.stat().st_size
        if not size:
            return
        offset = data.draw(st.integers(0, size - 1))
        if data.draw(st.booleans()):
            os.truncate(path, offset)
            self.clean -= self.touched(path.name, offset, size)
        else:
            raw = bytearray(path.read_bytes())
            raw[offset] ^= data.draw(st.integers(1, 255))
            path.write_bytes(raw)
            self.clean -= self.touched(path.name, offset, offset + 1)
        self.lost = [lost | set(range(ROWS)) - self.clean for lost in self.lost]

    def touched(self, name: str, start: int, stop: int) -> set[int]:
        """Rows with bytes between `start` and `stop` of a file."""
        if name.endswith(".sums"):
            size = 8 if name.startswith("000") else 16
            return set(range(start // size, -(-stop // size)))
        column, rung, segment = (int(part) for part in name.removesuffix(".rows").split("-"))
        slot = 32 * 4 * (1 << rung) if column else 32 * 12
        before = segment * max(1, SEGMENT_BYTES // slot)
        return set(range((before + start // slot) * 32, (before + -(-stop // slot)) * 32))

    @invariant()
    def nothing_is_left_lying_about(self) -> None:
        assert not list(self.folder.glob(".tmp-*")) if self.stores else True

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        if self.stores:
            shutil.rmtree(self.folder)


def run_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int, **options
) -> None:
    monkeypatch.setattr(segments, "KEPT_BYTES", kept_bytes)
    monkeypatch.setenv("FROSTLINE_TEST_FOLDER", str(tmp_path))
    monkeypatch.setattr(segments, "SEGMENT_BYTES", SEGMENT_BYTES)  # several segments
    case = StoreMachine.TestCase()
    case.settings = settings(deadline=None, **options)
    case.runTest()


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_the_store_is_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int):
    run_machine(tmp_path, monkeypatch, kept_bytes, max_examples=15, stateful_step_count=15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_store_is_its_model_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_machine(tmp_path, monkeypatch, 0, max_examples=1000, stateful_step_count=40)
    run_machine(tmp_path, monkeypatch, 1 << 20, max_examples=1000, stateful_step_count=40)


def test_what_is_kept_in_memory_is_right_and_can_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(segments, "KEPT_BYTES", 1 << 20)
    fill(tmp_path)
    path = tmp_path / "000-00-000000.rows"
    data = bytearray(path.read_bytes())
    data[12 * 7] ^= 1
    path.write_bytes(data)
    store = opened(tmp_path)
    assert believed(store) == set(range(ROWS)) - {7}  # what is damaged is not kept
    assert believed(store) == set(range(ROWS)) - {7}
    data[12 * 8] ^= 1
    path.write_bytes(data)
    assert believed(store) == set(range(ROWS)) - {7}  # row 8 was read before
    assert store.verify().damaged == (7, 8)  # looks at the disk
    assert believed(store) == set(range(ROWS)) - {7, 8}
    store.write(0, block(0))
    assert believed(store) == set(range(ROWS))


# -- small things that matter --------------------------------------------------------------------


def test_a_damaged_length_leads_nowhere(tmp_path: Path):
    fill(tmp_path)
    path = tmp_path / "001.sums"
    entries = np.frombuffer(path.read_bytes(), "<u8").reshape(-1, 2).copy()
    entries[5, 1] |= 0x7FFF_0000  # two thousand million tokens
    entries[6, 1] ^= 1 << 40
    path.write_bytes(entries.tobytes())
    store = opened(tmp_path)
    values, ok = store.read(np.arange(8))
    assert ok.tolist() == [True] * 5 + [False, False, True]
    assert values["t"].shape == (8, length_of(0), 2)
    assert store.damaged_rows == 2


def test_room_is_claimed_then_rows_are_written_then_checksums(tmp_path: Path):
    store = opened(tmp_path)
    store.write(0, block(0))
    disk = FaultyDisk()
    with use_disk(disk):
        store.write(0, block(0))
    assert disk.calls == ["allocate", "pwrite", "pwrite"] * 2


def test_a_failed_rows_write_leaves_no_checksum(tmp_path: Path):
    store = opened(tmp_path)
    store.write(32, block(32))
    with use_disk(FaultyDisk(2, "ENOSPC")), pytest.raises(StorageError, match="No space left"):
        store.write(0, block(0))
    assert believed(store) == believed(opened(tmp_path)) == set(range(32, 64))
    store.write(0, block(0))
    assert believed(store) == set(range(64))


def test_rows_of_different_segments_are_read_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 32 * 12)  # a block of "x" in each
    fill(tmp_path)
    rows = np.array([32, 1, 66, 3])  # places 0, 1, 2, 3 of segments 1, 0, 2, 0
    values, ok = opened(tmp_path).read(rows)
    assert ok.all()
    assert values["x"][:, 0].tolist() == rows.tolist()


def test_a_damaged_row_is_zero_in_a_store_of_one_column(tmp_path: Path):
    store = Store(tmp_path, COLUMNS[:1], rows=32, seed=b"k")
    store.write(0, {"x": np.ones((32, 3), np.float32)})
    path = tmp_path / "000-00-000000.rows"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    values, ok = store.read(np.arange(2))
    assert ok.tolist() == [False, True]
    assert values["x"].tolist() == [[0.0] * 3, [1.0] * 3]


def test_a_row_that_another_process_healed_is_believed(tmp_path: Path):
    fill(tmp_path)
    path = tmp_path / "000.sums"
    data = bytearray(path.read_bytes())
    data[8 * 3] ^= 1
    path.write_bytes(data)
    early, healer = opened(tmp_path), opened(tmp_path)
    assert early.present(np.arange(8)).all()  # it holds the damaged checksum now
    healer.write(0, block(0))
    assert early.read(np.arange(8))[1].all()
    assert early.damaged_rows == 0


def test_a_store_wholly_in_memory_is_verified_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(segments, "KEPT_BYTES", 1 << 20)
    fill(tmp_path)
    store = opened(tmp_path)
    assert believed(store) == set(range(ROWS))
    os.truncate(tmp_path / "000-00-000000.rows", 0)
    assert believed(store) == set(range(ROWS))
    assert store.verify().damaged == tuple(range(ROWS))
    assert believed(store) == set()


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_a_short_write_is_gone_on_with(tmp_path: Path, at: int):
    store = opened(tmp_path)
    store.write(32, block(32))
    store.write(0, block(0))  # its files are open now
    for path in tmp_path.glob("0*"):
        os.truncate(path, 0)
    with use_disk(FaultyDisk(at, "short")):
        store.write(0, block(0))
    assert believed(opened(tmp_path)) == set(range(32))
