"""Files are whole or absent, at every call that can fail or be the last."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faulty_disk import FAULTS, FaultyDisk, QuickDisk, count_calls, run_killed, use_disk
from frostline import _io
from frostline.errors import DamagedFile, StorageError

KIND = "test folder 1"


@pytest.fixture(autouse=True)
def _quick_disk():
    """No real flush: these tests stop processes, never the power."""
    with use_disk(QuickDisk()):
        yield


def fill(target: Path, content: bytes = b"content") -> None:
    with _io.atomic_folder(target, kind=KIND, note={"step": 3}) as draft:
        _io.write_file(draft / "a.bin", content)
        (draft / "inner").mkdir()
        _io.write_file(draft / "inner" / "b.bin", content * 100)


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".tmp-"))


# -- one file ------------------------------------------------------------------------------------


def test_atomic_write_replaces_the_whole_file(tmp_path: Path):
    file = tmp_path / "f.txt"
    _io.atomic_write_text(file, "old")
    _io.atomic_write_text(file, "new £")
    assert file.read_bytes() == "new £".encode()
    assert visible(tmp_path) == ["f.txt"]
    assert _io.sweep(tmp_path) == ()


def test_atomic_json_spells_what_json_lacks(tmp_path: Path):
    file = tmp_path / "f.json"
    _io.atomic_write_json(file, {"a": float("nan"), "b": [float("inf"), -float("inf")], "c": (1,)})
    assert _io.load_json(file) == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": [1]}
    assert math.isnan(float(_io.load_json(file)["a"]))


def test_a_folder_is_created_with_its_parents(tmp_path: Path):
    _io.make_folder(tmp_path / "a" / "b")
    _io.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot create the folder"):
        _io.make_folder(tmp_path / "file")


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "exit"])
@pytest.mark.parametrize("for_ever", [False, True])
def test_a_failed_write_leaves_the_old_file_or_the_new_one(tmp_path, fault, for_ever):
    file = tmp_path / "f.txt"

    def work() -> None:
        _io.atomic_write_bytes(file, b"new" * 50)

    _io.atomic_write_bytes(file, b"old")
    for at in range(count_calls(work)):
        _io.atomic_write_bytes(file, b"old")
        try:
            with use_disk(FaultyDisk(at, fault, for_ever=for_ever)):
                work()
        except StorageError:
            assert file.read_bytes() in (b"old", b"new" * 50)
        else:
            assert file.read_bytes() == b"new" * 50
        _io.sweep(tmp_path)
        assert visible(tmp_path) == ["f.txt"]


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    file = tmp_path / "f.txt"

    def work() -> None:
        _io.atomic_write_bytes(file, b"new" * 50)

    seen = set()
    for at in range(count_calls(work)):
        _io.atomic_write_bytes(file, b"old")
        assert run_killed(work, at)
        seen.add(file.read_bytes())
        _io.sweep(tmp_path)
        assert os.listdir(tmp_path) == ["f.txt"]
    assert seen == {b"old", b"new" * 50}


def test_contents_are_flushed_before_the_name_and_the_name_before_returning(tmp_path: Path):
    disk = FaultyDisk()
    with use_disk(disk):
        _io.atomic_write_bytes(tmp_path / "f", b"x")
    assert disk.calls == ["open", "write", "fsync", "close", "rename", "open", "fsync", "close"]


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "may write to"),
        (errno.EROFS, "may write to"),
        (errno.EIO, "check the disk"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENAMETOOLONG, "shorter path"),
        (errno.ENOTDIR, "something else has this name"),
        (errno.EXDEV, "look at the path"),
    ],
)
def test_system_errors_say_what_would_work(code: int, fix: str):
    with pytest.raises(StorageError) as caught, _io.storage_errors("write /x/y"):
        raise OSError(code, os.strerror(code), "/x/y")
    assert caught.value.asked == "write /x/y"
    assert os.strerror(code) in caught.value.found
    assert fix in caught.value.fix


def test_a_really_full_device_is_named():
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(StorageError, match="No space left"), _io.storage_errors("write"):
            _io.disk.write(fd, b"x")
    finally:
        os.close(fd)


def test_a_limit_of_file_sizes_stops_a_write_cleanly(tmp_path: Path):
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(StorageError, match="File too large"):
            _io.atomic_write_bytes(tmp_path / "f", b"x" * 5000)

    assert not run_killed(work, at=10**9)
    assert os.listdir(tmp_path) == []


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_appears_whole_with_its_note(tmp_path: Path):
    fill(tmp_path / "f")
    assert _io.verify_folder(tmp_path / "f", kind=KIND) == {"step": 3}
    assert visible(tmp_path) == ["f"]


def test_nothing_appears_when_the_block_fails(tmp_path: Path):
    def work() -> None:
        with _io.atomic_folder(tmp_path / "f", kind=KIND) as draft:
            _io.write_file(draft / "a", b"x")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        work()
    assert os.listdir(tmp_path) == []


def test_a_folder_never_replaces_another(tmp_path: Path):
    fill(tmp_path / "f", b"first")
    with pytest.raises(StorageError, match="exists"):
        fill(tmp_path / "f", b"second")
    assert (tmp_path / "f" / "a.bin").read_bytes() == b"first"
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="exists"):
        fill(tmp_path / "empty")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_is_whole_or_absent_whatever_fails(tmp_path: Path, fault: str):
    def work() -> None:
        fill(tmp_path / "f")

    calls = count_calls(work)
    _io.discard(tmp_path / "f")
    assert calls > 20
    for at in range(calls):
        if fault == "exit":
            assert run_killed(work, at)
        else:
            with use_disk(FaultyDisk(at, fault)):
                try:
                    work()
                except StorageError:
                    pass
                else:  # a short write is completed by the next one
                    assert fault == "short"
        if visible(tmp_path):
            _io.verify_folder(tmp_path / "f", kind=KIND)
            assert (tmp_path / "f" / "a.bin").read_bytes() == b"content"
            _io.discard(tmp_path / "f")
        _io.sweep(tmp_path)
        assert os.listdir(tmp_path) == []


def test_a_fault_while_recovering_from_a_kill(tmp_path: Path):
    """Compound faults: the sweep itself is killed at every call, and the next one finishes."""

    def work() -> None:
        fill(tmp_path / "f")

    assert run_killed(work, at=12)
    litter = os.listdir(tmp_path)
    assert len(litter) == 1
    for at in range(50):
        if not run_killed(lambda: _io.sweep(tmp_path), at):
            break
        if not os.listdir(tmp_path):
            break
    else:
        pytest.fail("the sweep never came to its end")
    assert os.listdir(tmp_path) == []


def test_a_discarded_folder_vanishes_at_once(tmp_path: Path):
    def work() -> None:
        _io.discard(tmp_path / "f")

    fill(tmp_path / "f")
    calls = count_calls(work)
    for at in range(calls):
        fill(tmp_path / "f")
        assert run_killed(work, at)
        if visible(tmp_path):
            _io.verify_folder(tmp_path / "f", kind=KIND)
            _io.discard(tmp_path / "f")
        _io.sweep(tmp_path)


def test_sweeping_leaves_what_is_not_ours(tmp_path: Path):
    (tmp_path / ".tmp-notes").mkdir()
    (tmp_path / ".tmp-0123456789abcdef").mkdir()
    assert _io.sweep(tmp_path) == (".tmp-0123456789abcdef",)
    assert os.listdir(tmp_path) == [".tmp-notes"]
    assert _io.sweep(tmp_path / "absent") == ()


# -- damage --------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_folder_is_noticed(tmp_path: Path):
    folder = tmp_path / "f"
    with _io.atomic_folder(folder, kind=KIND, note={"step": 3}) as draft:
        _io.write_file(draft / "a.bin", bytes(range(40)))
    for name in ("manifest.json", "a.bin"):
        whole = (folder / name).read_bytes()
        for bit in range(len(whole) * 8):
            broken = bytearray(whole)
            broken[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(broken)
            with pytest.raises(StorageError):
                _io.verify_folder(folder, kind=KIND)
        (folder / name).write_bytes(whole)
    _io.verify_folder(folder, kind=KIND)


def test_every_truncation_of_a_folder_is_noticed(tmp_path: Path):
    fill(tmp_path / "f")
    for name in ("manifest.json", "a.bin"):
        whole = (tmp_path / "f" / name).read_bytes()
        for size in range(len(whole)):
            (tmp_path / "f" / name).write_bytes(whole[:size])
            with pytest.raises(DamagedFile):
                _io.verify_folder(tmp_path / "f")
        (tmp_path / "f" / name).write_bytes(whole)


def test_planted_things_are_refused(tmp_path: Path):
    fill(tmp_path / "good")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    fill(tmp_path / "linked")
    (tmp_path / "linked" / "a.bin").unlink()
    (tmp_path / "linked" / "a.bin").symlink_to("/etc/hostname")
    fill(tmp_path / "lost")
    (tmp_path / "lost" / "a.bin").unlink()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "manifest.json")
    for name in ("link", "file", "empty", "fifo", "linked", "lost", "pipe", "absent"):
        with pytest.raises(DamagedFile):
            _io.verify_folder(tmp_path / name)


def test_a_manifest_cannot_point_outside(tmp_path: Path):
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "f").mkdir()
    entry = {"name": "../secret", "size": 1, "sha256": _io._sha256(tmp_path / "secret")}
    body = {"format": 1, "kind": KIND, "note": {}, "files": [entry]}
    (tmp_path / "f" / "manifest.json").write_bytes(_io._manifest_bytes(body))
    with pytest.raises(DamagedFile, match="out of its folder"):
        _io.verify_folder(tmp_path / "f")


def test_another_kind_or_a_newer_format_is_refused(tmp_path: Path):
    fill(tmp_path / "f")
    with pytest.raises(DamagedFile, match="kind"):
        _io.verify_folder(tmp_path / "f", kind="something else")
    body = {"format": 99, "kind": KIND, "note": {}, "files": []}
    (tmp_path / "f" / "manifest.json").write_bytes(_io._manifest_bytes(body))
    with pytest.raises(StorageError, match="format 99"):
        _io.verify_folder(tmp_path / "f")


def test_the_newest_whole_folder_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("1", "2", "3"):
        fill(tmp_path / name)
    (tmp_path / "3" / "a.bin").write_bytes(b"changed")
    found = _io.newest_valid([tmp_path / n for n in "321"], kind=KIND)
    assert found == (tmp_path / "2", {"step": 3})
    assert "passing over" in caplog.text
    assert _io.newest_valid([tmp_path / "3"]) is None
    assert _io.newest_valid([]) is None


# -- strict JSON ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("[1e999]", "too large"),
        ("[" * 100_000, "deeper"),
        ("[" * 65 + "]" * 65, "deeper"),
        ("[" + "1" * 5000 + "]", "digits"),
        ('["\\ud800"]', "surrogate"),
        ("", "Expecting"),
        ("{", "Expecting"),
        (" " * 1_000_001, "more than 1,000,000 bytes"),
    ],
)
def test_json_that_is_not_strict_is_refused(tmp_path: Path, text: str, found: str):
    file = tmp_path / "f.json"
    file.write_text(text)
    with pytest.raises(DamagedFile, match=found):
        _io.load_json(file)


def test_json_of_other_bytes_or_absent_is_refused(tmp_path: Path):
    (tmp_path / "f.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DamagedFile):
        _io.load_json(tmp_path / "f.json")
    with pytest.raises(StorageError, match="No such file"):
        _io.load_json(tmp_path / "absent.json")


def test_strict_json_is_read(tmp_path: Path):
    (tmp_path / "f.json").write_text('{"a": [1, 2.5, null, "é", {"b": true}]}')
    assert _io.load_json(tmp_path / "f.json") == {"a": [1, 2.5, None, "é", {"b": True}]}
    (tmp_path / "deep.json").write_text("[" * 63 + "]" * 63)
    _io.load_json(tmp_path / "deep.json")


# -- lines ---------------------------------------------------------------------------------------


def write_lines(path: Path, count: int) -> None:
    lines = _io.JsonLines(path)
    for i in range(count):
        lines.append({"i": i, "text": "a\nb"})
    lines.sync()
    lines.close()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(records=st.lists(PLAIN, max_size=5))
def test_lines_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, records: list):
    file = tmp_path_factory.mktemp("lines") / "r.jsonl"
    lines = _io.JsonLines(file)
    for record in records:
        lines.append(record)
    lines.close()
    read = _io.read_lines(file)
    assert list(read.records) == records
    assert read.tail == b""


def test_a_torn_tail_is_cut_and_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "r.jsonl"
    write_lines(file, 3)
    whole = file.read_bytes()
    second = _io.read_lines(file).ends[1]
    for size in range(second + 1, len(whole)):
        file.write_bytes(whole[:size])
        assert len(_io.read_lines(file).records) == 2
        caplog.clear()
        lines = _io.JsonLines(file)
        assert lines.count == 2
        assert "unfinished line" in caplog.text
        lines.append({"i": 2, "text": "a\nb"})
        lines.close()
        assert file.read_bytes() == whole
        (torn,) = tmp_path.glob("r.jsonl.torn-*")
        assert torn.read_bytes() == whole[second:size]
        torn.unlink()


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    write_lines(file, 3)
    whole = file.read_bytes()
    for bit in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        try:
            read = _io.read_lines(file)
        except DamagedFile:
            continue
        assert read.tail  # flagged, and the damaged line is not used
        assert read.records == tuple({"i": i, "text": "a\nb"} for i in range(len(read.records)))
        assert len(read.records) >= 1  # a changed line end takes the next line with it


def test_lost_doubled_and_swapped_lines_are_noticed(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    write_lines(file, 4)
    a, b, c, d = file.read_bytes().splitlines(keepends=True)
    for order in ([a, c, d], [b, c, d], [a, b, b, c, d], [a, c, b, d], [a, b, d]):
        file.write_bytes(b"".join(order))
        with pytest.raises(DamagedFile, match=r"line \d is damaged or out of place"):
            _io.read_lines(file)
        with pytest.raises(DamagedFile):
            _io.JsonLines(file)


def test_going_on_after_a_line_drops_the_later_ones(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    write_lines(file, 5)
    whole = file.read_bytes()
    lines = _io.JsonLines(file, keep=3)
    assert lines.count == 3
    for i in (3, 4):
        lines.append({"i": i, "text": "a\nb"})
    lines.close()
    assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(DamagedFile, match="5 whole lines where 6"):
        _io.JsonLines(file, keep=6)


def test_damage_after_the_kept_lines_does_not_matter(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    write_lines(file, 4)
    whole = bytearray(file.read_bytes())
    whole[_io.read_lines(file).ends[1] + 30] ^= 1
    file.write_bytes(whole)
    with pytest.raises(DamagedFile):
        _io.JsonLines(file)
    assert _io.JsonLines(file, keep=2).count == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_records_survive_whatever_fails(tmp_path: Path, fault: str):
    file = tmp_path / "r.jsonl"
    calls = count_calls(lambda: write_lines(file, 3))
    file.unlink()
    for at in range(calls):
        if fault == "exit":
            assert run_killed(lambda: write_lines(file, 3), at)
        else:
            with use_disk(FaultyDisk(at, fault)):
                try:
                    write_lines(file, 3)
                except StorageError:
                    pass
                else:
                    assert fault == "short"
        if file.exists():
            try:
                records = _io.read_lines(file).records
            except DamagedFile:  # later lines follow the torn one, so it is not cut: it is flagged
                assert fault == "lying"
            else:
                assert [r["i"] for r in records] == list(range(len(records)))
                assert _io.JsonLines(file).count == len(records)
        for left in tmp_path.iterdir():
            left.unlink()


def test_a_failed_append_leaves_no_half_line(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    lines = _io.JsonLines(file)
    lines.append({"i": 0})
    with use_disk(FaultyDisk(0, "ENOSPC")), pytest.raises(StorageError, match="No space left"):
        lines.append({"i": 1})
    lines.append({"i": "again"})
    lines.close()
    assert [r["i"] for r in _io.read_lines(file).records] == [0, "again"]


def test_records_hold_what_json_lacks(tmp_path: Path):
    lines = _io.JsonLines(tmp_path / "r.jsonl")
    lines.append({"loss": float("nan")})
    lines.close()
    assert _io.read_lines(tmp_path / "r.jsonl").records == ({"loss": "NaN"},)


def test_any_json_reader_reads_a_line(tmp_path: Path):
    write_lines(tmp_path / "r.jsonl", 1)
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert line == {"crc": line["crc"], "n": 0, "data": {"i": 0, "text": "a\nb"}}


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX")
def test_the_usual_umask_decides_who_may_read(tmp_path: Path):
    before = os.umask(0o027)
    try:
        _io.atomic_write_bytes(tmp_path / "f", b"x")
        fill(tmp_path / "g")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "g").stat().st_mode & 0o777 == 0o750


# -- writing in place, for files whose readers check every row -----------------------------------


def test_rows_are_put_where_they_belong_and_room_is_claimed_first(tmp_path: Path):
    file = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    disk = _io.Disk()
    disk.allocate(file, 4096, 8192)
    if hasattr(os, "posix_fallocate"):
        assert os.fstat(file).st_size == 12_288
    assert disk.pwrite(file, b"abc", 5) == 3
    os.close(file)
    assert (tmp_path / "f").read_bytes()[:9] == b"\0\0\0\0\0abc\0"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS cannot claim room")
def test_claiming_more_room_than_allowed_is_a_clean_error(tmp_path: Path):
    file = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            _io.Disk().allocate(file, 0, 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.close(file)
