"""The library of stores: whole or absent entries, hostile folders, locks, pruning, crashes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from faulty_disk import FAULTS, FaultyDisk, QuickDisk, count_calls, run_killed, use_disk
from frostline import _io
from frostline.errors import FrontierError, StorageError, UsageError
from frostline.frontier import library as library_module
from frostline.frontier.key import CacheKey
from frostline.frontier.library import Library, default_root
from frostline.frontier.store import Column

COLUMNS = [Column("x", "float32")]
ROWS = 64
BLOCK = {"x": np.arange(32 * 4, dtype=np.float32).reshape(32, 4)}


@pytest.fixture(autouse=True)
def _quick_disk() -> Iterator[None]:
    with use_disk(QuickDisk()):
        yield


def key(name: str = "a") -> CacheKey:
    return CacheKey({"weights": {name: "bits"}, "versions": {"torch": "2.14"}})


def fill(library: Library, name: str = "a", *, used_s_ago: float = 0.0) -> Path:
    store = library.open(key(name), COLUMNS, ROWS, about={"model": name})
    assert store.write(0, BLOCK)
    store.close()
    path = library.root / key(name).digest[:32]
    moment = time.time() - used_s_ago
    os.utime(path / "users", (moment, moment))
    return path


def states(library: Library) -> dict[str, str]:
    return {entry.name: entry.state for entry in library.entries()}


def usable(library: Library, name: str = "a") -> None:
    """Whatever happened: the library opens, stores and finds."""
    fill(library, name)
    entry = library.find(key(name))
    assert entry is not None
    assert library.verify(entry).damaged == ()
    assert set(states(library).values()) <= {"good"}
    assert not [p.name for p in library.root.rglob(".tmp-*")]


# -- use -----------------------------------------------------------------------------------------


def test_a_store_is_found_again_by_its_key(library):
    fill(library)
    store = library.open(key(), COLUMNS, ROWS)
    values, ok = store.read(np.arange(40))
    store.close()
    assert ok.tolist() == [True] * 32 + [False] * 8
    assert np.array_equal(values["x"][:32], BLOCK["x"])
    assert library.find(key("b")) is None


def test_an_entry_says_what_it_is(library):
    path = fill(library)
    (entry,) = library.entries()
    assert (entry.name, entry.path, entry.state, entry.why) == (path.name, path, "good", "")
    assert (entry.rows, entry.rows_present, entry.columns) == (ROWS, 32, tuple(COLUMNS))
    assert entry.about == {"model": "a"}
    assert entry.key == key()
    assert entry.created is not None
    assert abs(entry.created - time.time()) < 60
    on_disk = sum(p.stat().st_blocks * 512 for p in path.rglob("*") if p.is_file())
    assert entry.size_bytes == on_disk > 32 * 16
    assert not entry.in_use


def test_nothing_is_made_by_looking(library):
    assert library.entries() == ()
    assert library.find(key()) is None
    assert library.prune(everything=True).removed == ()
    assert not library.root.exists()


def test_other_columns_or_rows_under_one_key_are_refused(library):
    fill(library)
    for columns, rows in ((COLUMNS, 96), ([Column("y", "float32")], ROWS),
                          ([Column("x", "float32", "int8")], ROWS)):  # fmt: skip
        with pytest.raises(FrontierError, match="under the same key"):
            library.open(key(), columns, rows)
    for columns, rows in (([], ROWS), (COLUMNS, 0)):
        with pytest.raises(FrontierError, match="cannot open a store"):
            library.open(key("new"), columns, rows)
    assert len(library.entries()) == 1


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "here"))
    assert Library().root == default_root() == tmp_path / "here"
    monkeypatch.setenv("FROSTLINE_CACHE", "relative")
    assert default_root() == Path.cwd() / "relative"
    monkeypatch.delenv("FROSTLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert default_root() == tmp_path / "frostline/frontier"


def test_names_are_matched_by_their_beginning(library):
    path = fill(library)
    assert library.match(path.name[:4]).path == path
    for prefix in ("", "xyz", "../", path.name + "0"):
        with pytest.raises(UsageError, match="cannot find the cache entry"):
            library.match(prefix)
    names = [fill(library, str(i)).name for i in range(20)]
    twice = next(n[0] for n in names if sum(m.startswith(n[0]) for m in names) > 1)
    with pytest.raises(UsageError, match="entries: "):
        library.match(twice)


# -- whose folder --------------------------------------------------------------------------------


def test_the_folder_is_made_for_its_owner_alone(library):
    before = os.umask(0)
    try:
        fill(library)
    finally:
        os.umask(before)
    assert stat.S_IMODE(library.root.stat().st_mode) == 0o700
    assert (library.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(library, mode):
    library.root.mkdir()
    library.root.chmod(mode)
    for use in (library.entries, lambda: library.open(key(), COLUMNS, ROWS), library.prune,
                lambda: library.find(key())):  # fmt: skip
        with pytest.raises(StorageError, match="others may write"):
            use()
    fill(Library(library.root, shared=True))
    assert len(Library(library.root, shared=True).entries()) == 1


def test_a_folder_of_another_user_is_refused(library, monkeypatch):
    fill(library)
    monkeypatch.setattr(os, "geteuid", lambda: 65_000)
    with pytest.raises(StorageError, match="another user"):
        library.entries()


def test_an_entry_of_another_user_is_foreign(library, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    path = fill(library)
    os.chown(path, 65_534, 65_534)
    (entry,) = library.entries()
    assert (entry.state, entry.why) == ("foreign", "a folder of another user (uid 65534)")
    assert library.find(key()) is None
    assert library.prune(everything=True).removed == ()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="no folder"):
        Library(tmp_path / "file").entries()
    with pytest.raises(StorageError):
        Library(tmp_path / "file" / "inner").open(key(), COLUMNS, ROWS)


# -- hostile folders -----------------------------------------------------------------------------


def _planted(root: Path) -> None:
    """Everything that is no entry, under names that entries have and others."""
    names = (f"{i:032x}" for i in range(100))
    (root / "junk").touch()
    (root / "folder").mkdir()
    (root / ("x" * 255)).touch()
    (root / "a\nb\x1b[31m").mkdir()
    os.mkfifo(root / next(names))
    (root / next(names)).symlink_to("/etc")
    (root / next(names)).symlink_to("/nowhere")
    (root / next(names)).touch()
    (root / next(names).upper().replace("0", "A")).mkdir()
    os.mkfifo(root / ".tmp-0123456789abcdef")


def _entry_with(root: Path, number: int, body: bytes, *, kind: str = "") -> Path:
    path = root / f"{number:032x}"
    with _io.atomic_folder(path, kind=kind or library_module._KIND) as draft:
        _io.write_file(draft / "entry.json", body)
        (draft / "users").mkdir()
        (draft / "rows").mkdir()
    return path


def test_what_is_no_entry_is_reported_and_left_alone(library):
    path = fill(library)
    _planted(library.root)
    names = set(os.listdir(library.root))
    assert list(states(library).values()).count("foreign") == len(names) - 3  # entry, lock, tag
    assert states(library)[path.name] == "good"
    done = library.prune(everything=True, damaged=True, older_than_s=0, keep_bytes=0)
    assert [e.path for e in done.removed] == [path]
    assert set(os.listdir(library.root)) >= names - {path.name, ".tmp-0123456789abcdef"}
    assert Path("/etc/passwd").exists()
    fill(library)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 200 + b"1" + b"}" * 200,
     b'{"format": 1, "format": 1}', b'{"format": 2}', b" " * 17_000_000,
     b'{"format":1,"key":{},"rows":1e999,"about":{},"columns":[],"created":0,"frostline":""}',
     b'{"format":1,"key":{},"rows":64,"about":{},"columns":[],"created":0,"frostline":""}',
     b'{"format":1,"key":[],"rows":64,"about":{},"columns":[],"created":0,"frostline":""}',
     b'{"format":1,"key":{},"rows":9999999999,"about":{},"columns":[],"created":0,"frostline":""}',
     b'{"format":1,"key":{},"rows":64,"about":[],"columns":{},"created":[],"frostline":1}',
     b'{"format":1,"key":{},"rows":1,"about":{},"columns":[{}],"created":0,"frostline":""}'],
    ids=lambda body: ascii(body[:60]),
)  # fmt: skip
def test_an_entry_that_says_nothing_useful_is_damaged(library, body):
    fill(library)
    path = _entry_with(library.root, 1, body)
    assert states(library)[path.name] == "damaged"
    with pytest.raises(StorageError):
        library.verify(library.match(path.name))
    assert [e.path for e in library.prune(damaged=True).removed] == [path]
    assert len(library.entries()) == 1


@pytest.mark.parametrize("at", ["rows/000.seg", "users/1-00.lock", "rows", "manifest.json",
                                "entry.json", "users"])  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "link", "file", "folder"])
def test_odd_things_in_an_entry_never_block_and_never_lead_out(library, tmp_path, at, kind):
    path = fill(library)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    place = path / at
    if place.is_dir():
        _io.discard(place)
    place.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to(outside)
    elif kind == "file":
        place.write_bytes(b"junk")
    else:
        place.mkdir()
    (entry,) = library.entries()
    if kind in ("fifo", "link"):
        assert entry.state == "damaged"
    library.prune(everything=True)
    assert (outside / "keep").exists()
    usable(library)


def test_every_changed_byte_of_an_entry_is_noticed(library):
    path = fill(library)
    for name in ("manifest.json", "entry.json"):
        whole = (path / name).read_bytes()
        for place in range(0, len(whole), 7):
            bad = bytearray(whole)
            bad[place] ^= 1 << (place % 8)
            (path / name).write_bytes(bytes(bad))
            entry = library._read(path, count=False)
            assert entry is not None
            assert entry.state == "damaged", (name, place)
        (path / name).write_bytes(whole)
    assert states(library) == {path.name: "good"}


def test_an_entry_under_another_name_is_not_believed(library):
    path = fill(library)
    other = library.root / key("b").digest[:32]
    path.rename(other)
    assert library.find(key("b")) is None
    assert states(library) == {other.name: "damaged"}
    store = library.open(key("b"), COLUMNS, ROWS)
    assert not store.present(np.arange(ROWS)).any()
    store.close()


def test_a_damaged_entry_is_made_afresh(library, caplog):
    path = fill(library)
    (path / "entry.json").write_bytes(b"{}")
    with caplog.at_level(logging.WARNING, "frostline"):
        usable(library)
    assert "afresh" in caplog.text


def test_a_damaged_store_is_begun_again(library, caplog):
    path = fill(library)
    (path / "rows" / "store.json").write_bytes(b"{}")
    assert states(library)[path.name] == "damaged"
    with caplog.at_level(logging.WARNING, "frostline"):
        usable(library)
    assert "afresh" in caplog.text


def test_a_damaged_row_is_found(library):
    path = fill(library)
    largest = max((p for p in (path / "rows").iterdir()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(17)
        file.write(b"\xaa")
    (entry,) = library.entries()
    used = entry.last_used
    damage = library.verify(entry)
    assert (damage.checked, len(damage.damaged)) == (32, 1)
    assert library.entries()[0].last_used == used  # being looked at is no use


# -- pruning -------------------------------------------------------------------------------------


def test_the_longest_unused_go_first(library):
    paths = [fill(library, str(i), used_s_ago=100 * i) for i in range(5)]
    size = library.entries()[0].size_bytes
    assert [e.path for e in library.entries()] == paths
    done = library.prune(keep_bytes=3 * size)
    assert [e.path for e in done.removed] == [paths[4], paths[3]]
    assert done.freed_bytes == 2 * size
    done = library.prune(older_than_s=150)
    assert [e.path for e in done.removed] == [paths[2]]
    done = library.prune(names=[paths[1].name[:6]])
    assert [e.path for e in done.removed] == [paths[1]]
    assert [e.path for e in library.prune(damaged=True).removed] == []
    assert [e.path for e in library.prune(everything=True).removed] == [paths[0]]
    assert library.entries() == ()


def test_keeping_exactly_what_is_there_removes_nothing(library):
    fill(library, "a")
    fill(library, "b")
    total = sum(e.size_bytes for e in library.entries())
    assert library.prune(keep_bytes=total).removed == ()
    assert len(library.prune(keep_bytes=total - 1).removed) == 1


def test_a_dry_run_removes_nothing(library):
    path = fill(library)
    (library.root / ".tmp-0123456789abcdef").mkdir()
    done = library.prune(everything=True, dry_run=True)
    assert {e.path.name for e in done.removed} == {path.name, ".tmp-0123456789abcdef"}
    assert len(library.entries()) == 2


def test_opening_counts_as_use(library):
    paths = [fill(library, name, used_s_ago=ago) for name, ago in (("old", 900), ("new", 100))]
    library.open(key("old"), COLUMNS, ROWS).close()
    assert [e.path for e in library.entries()] == paths
    assert [e.path for e in library.prune(older_than_s=50).removed] == [paths[1]]


def test_the_budget_makes_older_entries_give_way(library):
    for i in range(4):
        fill(library, str(i), used_s_ago=100 * (i + 1))
    size = library.entries()[0].size_bytes
    bounded = Library(library.root, budget_bytes=4 * size)
    with_open = bounded.open(key("3"), COLUMNS, ROWS)  # in use, so it stays
    os.utime(library.root / key("3").digest[:32] / "users", (0, 0))  # though longest ago
    store = bounded.open(key("new"), COLUMNS, ROWS, needs_bytes=2 * size)
    kept = {e.about["model"] for e in bounded.entries() if e.about}
    assert kept == {"0", "3"}
    assert store._budget_bytes == 4 * size - sum(e.size_bytes for e in bounded.entries() if e.about)
    store.close()
    with_open.close()
    tight = Library(library.root, budget_bytes=0)
    store = tight.open(key("tight"), COLUMNS, ROWS)
    assert not store.write(0, BLOCK)
    store.close()


def test_an_entry_in_use_is_not_removed(library):
    store = library.open(key(), COLUMNS, ROWS)
    assert store.write(0, BLOCK)
    (entry,) = library.entries()
    assert entry.in_use
    for dry_run in (True, False):
        done = library.prune(everything=True, dry_run=dry_run)
        assert ([e.name for e in done.in_use], done.removed) == ([entry.name], ())
    second = library.open(key(), COLUMNS, ROWS)
    second.close()
    second.close()
    assert library.entries()[0].in_use
    assert store.read(np.arange(3))[1].all()
    store.close()
    assert not library.entries()[0].in_use
    assert list((entry.path / "users").iterdir()) == []
    assert len(library.prune(everything=True).removed) == 1


def test_an_entry_that_is_taken_up_meanwhile_is_not_removed(library, monkeypatch):
    fill(library)
    stale = Library._scan(library, count=False)
    seen = list(stale)
    store = library.open(key(), COLUMNS, ROWS)
    monkeypatch.setattr(Library, "_scan", lambda self, **options: iter(seen))
    done = library.prune(everything=True)
    assert (done.removed, len(done.in_use)) == ((), 1)
    store.close()


def test_an_entry_that_cannot_be_removed_is_told(library, monkeypatch):
    path = fill(library)

    def refuse(path: Path) -> None:
        raise StorageError("remove", found="no permission")

    monkeypatch.setattr(_io, "discard", refuse)
    done = library.prune(everything=True)
    assert [(e.path, why) for e, why in done.failed] == [(path, "no permission")]


def test_a_damaged_entry_in_use_is_not_taken_away(library):
    store = library.open(key(), COLUMNS, ROWS)
    path = library.root / key().digest[:32]
    (path / "entry.json").write_bytes(b"{}")
    with pytest.raises(StorageError, match="another process"):
        library.open(key(), COLUMNS, ROWS)
    store.close()
    usable(library)


def test_a_damaged_store_in_use_is_not_taken_away(library):
    store = library.open(key(), COLUMNS, ROWS)
    assert store.write(0, BLOCK)
    header = library.root / key().digest[:32] / "rows" / "store.json"
    header.write_bytes(b"{}")
    with pytest.raises(StorageError, match="cannot trust"):
        library.open(key(), COLUMNS, ROWS)
    assert store.read(np.arange(32))[1].all()
    store.close()
    usable(library)


def test_a_number_of_rows_that_no_memory_holds_is_refused(library):
    body = json.loads((fill(library) / "entry.json").read_text())
    assert library_module._parsed(body)["rows"] == ROWS
    for rows in (1 << 32, 0, -1, True, 64.0, "64", None):
        with pytest.raises((ValueError, TypeError)):
            library_module._parsed(body | {"rows": rows})


def test_a_lock_that_is_held_is_waited_for_and_then_told(library, monkeypatch):
    fill(library)
    monkeypatch.setattr(library_module, "_WAIT_S", 0.1)
    with FileLock(library.root / ".lock", fallback_to_soft=False):
        with pytest.raises(StorageError, match="another process held it"):
            library.open(key(), COLUMNS, ROWS)
        assert [e.rows_present for e in library.entries()] == [None]  # looking goes on without
    assert [e.rows_present for e in library.entries()] == [32]


def test_a_disk_without_locks_is_told(library, monkeypatch):
    def refuse(self: FileLock, *args: object, **kwargs: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(StorageError, match="not supported") as error:
        library.open(key(), COLUMNS, ROWS)
    assert "local disk" in error.value.fix


# -- other processes -----------------------------------------------------------------------------

_HOLD = """
import sys, time
import numpy as np
from frostline.frontier.key import CacheKey
from frostline.frontier.library import Library
from frostline.frontier.store import Column
key = CacheKey({{"weights": {{"a": "bits"}}, "versions": {{"torch": "2.14"}}}})
store = Library({root!r}).open(key, [Column("x", "float32")], 64)
print("open", flush=True)
time.sleep(60)
"""


def test_a_killed_process_holds_nothing(library):
    fill(library)
    code = _HOLD.format(root=str(library.root))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        assert library.entries()[0].in_use
        assert library.prune(everything=True).removed == ()
        child.send_signal(signal.SIGKILL)
        child.wait()
    entry = library.entries()[0]
    assert not entry.in_use
    assert len(list((entry.path / "users").iterdir())) == 1  # the dead one's
    library.open(key(), COLUMNS, ROWS).close()
    assert list((entry.path / "users").iterdir()) == []


def _race(root: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    library = Library(root)
    for _ in range(12):
        name = str(random.integers(3))
        if random.random() < 0.3:
            library.prune(everything=True)
            continue
        store = library.open(key(name), COLUMNS, ROWS)
        store.write(0, BLOCK)
        values, ok = store.read(np.arange(32))
        assert ok.all()
        assert np.array_equal(values["x"], BLOCK["x"])
        store.close()
        assert not [e for e in library.entries() if e.state in ("damaged", "foreign")]


def test_processes_that_open_and_prune_at_once_never_see_half_an_entry(library):
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_race, args=(str(library.root), i)) for i in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    usable(library)


def test_a_forked_child_does_not_let_go_of_its_parents_entry(library):
    store = library.open(key(), COLUMNS, ROWS)
    pid = os.fork()
    if pid == 0:
        try:
            store.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert library.entries()[0].in_use
    store.close()


def test_counting_rows_does_not_bring_back_what_is_being_removed(library, monkeypatch):
    path = fill(library)
    real = library_module._present

    def removed_before(path: Path, facts: dict[str, object]) -> int | None:
        if not lock_is_free():
            return real(path, facts)  # nobody can remove it now
        _io.discard(path)
        return real(path, facts)

    def lock_is_free() -> bool:
        lock = FileLock(library.root / ".lock", fallback_to_soft=False, blocking=False)
        try:
            with lock:
                return True
        except TimeoutError:
            return False

    monkeypatch.setattr(library_module, "_present", removed_before)
    assert [e.rows_present for e in library.entries()] == [32]
    assert path.exists()


# -- every call can fail or be the last ----------------------------------------------------------


def _open_and_close(library: Library) -> None:
    library.open(key(), COLUMNS, ROWS, about={"model": "m"}).close()


@pytest.mark.parametrize("work", ["open", "prune", "heal"])
def test_killed_at_any_call_the_library_stays_usable(tmp_path, work):
    def prepared(name: str) -> tuple[Library, object]:
        library = Library(tmp_path / name)
        if work != "open":
            path = fill(library)
        if work == "heal":
            (path / "rows" / "store.json").write_bytes(b"{}")
        if work == "prune":
            return library, lambda: library.prune(everything=True)
        return library, lambda: _open_and_close(library)

    calls = count_calls(prepared("count")[1])
    assert calls >= 6
    for at in range(calls):
        library, run = prepared(str(at))
        assert run_killed(run, at), at
        assert set(states(library).values()) <= {"good", "half-made"} | (
            {"damaged"} if work == "heal" else set()
        )
        usable(library)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "exit"])
@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failing_disk_is_one_error_and_nothing_lost(tmp_path, fault, for_ever):
    calls = count_calls(lambda: _open_and_close(Library(tmp_path / "count")))
    for at in range(calls):
        library = Library(tmp_path / f"{at}")
        fill(library, "other")
        with use_disk(FaultyDisk(at, fault, for_ever=for_ever)):
            try:
                _open_and_close(library)
            except StorageError:
                assert not any(e.in_use for e in library.entries())
        assert states(library)[key("other").digest[:32]] == "good"
        usable(library)


def test_entries_hold_no_more_than_json(library):
    path = fill(library)
    body = json.loads((path / "entry.json").read_text())
    assert CacheKey(body["key"]) == key()
    assert sorted(body) == ["about", "columns", "created", "format", "frostline", "key", "rows"]
