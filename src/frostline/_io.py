"""Files that are whole or absent: the one place through which Frostline changes a disk.

Three shapes cover everything a run leaves behind:

- a small file, written beside its target and renamed over it (`atomic_write_bytes` and friends);
- a folder with one commit point: files, then a manifest of sizes and SHA-256, then one rename
  (`atomic_folder`, `verify_folder`, `newest_valid`);
- an append-only file of JSON lines, each with its number and checksum (`JsonLines`, `read_lines`).

File contents reach the disk before the name that shows them does, and the name before the caller
goes on. A failed flush is never retried: the kernel may have dropped the data it refused, so the
draft is thrown away and the error raised. Readers check digests, so a changed bit is noticed.

Every call that changes something goes through `disk`. Tests put a `Disk` there that fails, tears
or stops the process at the n-th call.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frostline.errors import DamagedFile, StorageError

__all__ = [
    "Disk",
    "JsonLines",
    "Lines",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "canonical_json",
    "discard",
    "finite_json",
    "load_json",
    "make_folder",
    "newest_valid",
    "read_lines",
    "storage_errors",
    "sweep",
    "verify_folder",
    "write_file",
]

_log = logging.getLogger("frostline")
_MANIFEST = "manifest.json"
_MANIFEST_FORMAT = 1
_DRAFT = re.compile(r"\.tmp-[0-9a-f]{16}")
_CHUNK_BYTES = 1 << 20
_MAX_DEPTH = 64
_MAX_JSON_BYTES = 1_000_000
#: A manifest lists files, and a run folder has few: more than this is not one of ours.
_MAX_MANIFEST_BYTES = 16_000_000


class Disk:
    """The system calls that change a disk, one method each."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def allocate(self, fd: int, offset: int, size_bytes: int) -> None:
        """Claim the room of a range, so that a full disk says so now and not in a later write."""
        if hasattr(os, "posix_fallocate"):  # macOS has none; there `pwrite` itself says it
            os.posix_fallocate(fd, offset, size_bytes)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def truncate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def produce(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let a library write the file or files of `path` by itself."""
        write(path)


disk = Disk()

# -- errors --------------------------------------------------------------------------------------

_FIXES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space (whatever was written before is intact), "
    "then start again: it goes on from there",
    (errno.EACCES, errno.EPERM, errno.EROFS): "choose a folder you may write to",
    (errno.EIO,): "check the disk (the system log says more), or write to another one",
    (errno.EMFILE, errno.ENFILE): "close other programs or raise the limit: ulimit -n 4096",
    (errno.EFBIG,): "raise the limit of file sizes: ulimit -f unlimited",
    (errno.ENAMETOOLONG,): "choose a folder with a shorter path",
    (errno.ENOENT,): "check the path: the folder was moved, removed or never made",
    (errno.ENOTDIR, errno.EISDIR, errno.ELOOP): "something else has this name; move it away",
    (errno.EEXIST, errno.ENOTEMPTY): "move away what has this name, or choose another one",
}


@contextlib.contextmanager
def storage_errors(asked: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that says what was being done and what would work.

    Args:
        asked: a verb phrase that completes "cannot ...".
    """
    try:
        yield
    except OSError as error:
        fix = next((text for codes, text in _FIXES.items() if error.errno in codes), "")
        place = (
            f" ({error.filename})" if error.filename and str(error.filename) not in asked else ""
        )
        found = f"{error.strerror or error}{place}"
        raise StorageError(
            asked, found=found, fix=fix or "look at the path and the disk"
        ) from error


def _damaged(path: Path, found: str) -> DamagedFile:
    return DamagedFile(
        f"trust {path}",
        found=found,
        fix="restore it from a copy, or remove it: an older or fresh one is used then",
    )


# -- single files --------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Create a folder with its parents, durably; one that is there is left as it is."""
    with storage_errors(f"create the folder {path}"):
        missing = [p for p in (path, *path.parents) if not p.is_dir()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                disk.mkdir(folder)
            _sync_folder(folder.parent)
    if not path.is_dir():
        raise StorageError(
            f"create the folder {path}", found="a file of that name", fix="choose another name"
        )


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it; not atomic by itself, so for drafts only."""
    fd = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        _write_all(fd, data)
        disk.fsync(fd)
    finally:
        disk.close(fd)
    # A disk that lies about a write is caught here, before anything relies on the file.
    if path.read_bytes() != data:
        raise OSError(errno.EIO, "what was written reads back differently", str(path))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by `data`: at every moment readers see the old or the new one, whole.

    Raises:
        StorageError: it cannot be written; the old file is untouched.
    """
    draft = _draft_of(path)
    with storage_errors(f"write {path}"):
        try:
            write_file(draft, data)
            disk.rename(draft, path)
        except BaseException:
            _remove_quietly(draft)
            raise
        _sync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of a text in UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """`atomic_write_bytes` of a value as indented JSON; NaN and infinities become strings."""
    text = json.dumps(finite_json(value), indent=2, allow_nan=False, ensure_ascii=False)
    atomic_write_text(path, text + "\n")


def _draft_of(path: Path) -> Path:
    return path.parent / f".tmp-{secrets.token_hex(8)}"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = disk.write(fd, view)
        if written <= 0:
            raise OSError(errno.EIO, "the disk took no bytes")
        view = view[written:]


def _sync_folder(path: Path) -> None:
    fd = disk.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


def _sync_file(path: Path) -> None:
    fd = disk.open(path, os.O_RDONLY)
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


# -- removing ------------------------------------------------------------------------------------


def sweep(folder: Path) -> tuple[str, ...]:
    """Remove the drafts that a killed writer left in a folder; their names.

    Only one process may write in the folder: the drafts of another writer look the same.
    """
    if not folder.is_dir():
        return ()
    with storage_errors(f"remove unfinished files in {folder}"):
        left = sorted(p for p in folder.iterdir() if _DRAFT.fullmatch(p.name))
        for draft in left:
            _remove_tree(draft)
    if left:
        _log.info("removed %d unfinished draft(s) in %s", len(left), folder)
    return tuple(p.name for p in left)


def discard(path: Path) -> None:
    """Remove a folder so that it vanishes at once: no moment shows half of it."""
    with storage_errors(f"remove {path}"):
        draft = _draft_of(path)
        disk.rename(path, draft)
        _sync_folder(path.parent)
        _remove_tree(draft)


def _remove_tree(path: Path) -> None:
    if not stat.S_ISDIR(path.lstat().st_mode):
        disk.unlink(path)
        return
    for folder, names, files in os.walk(path, topdown=False):
        for name in files:
            disk.unlink(Path(folder, name))
        for name in names:
            inner = Path(folder, name)
            if inner.is_symlink():
                disk.unlink(inner)
            else:
                disk.rmdir(inner)
    disk.rmdir(path)


def _remove_quietly(path: Path) -> None:
    """Best effort after a failure; what stays is swept by the next start."""
    with contextlib.suppress(OSError):
        _remove_tree(path)


# -- folders with one commit point ---------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(
    target: Path,
    *,
    kind: str,
    note: Mapping[str, Any] | None = None,
    shared: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Fill a draft folder; when the block ends well, it appears under its name, whole and durable.

    Args:
        target: where it will appear; nothing may have this name yet.
        kind: what the folder is, checked by readers, e.g. "frostline checkpoint 1".
        note: plain JSON kept in the manifest.
        shared: SHA-256 of the files in it that are links to a sealed file, by name: they are not
            read again. See `share_file`.

    Yields:
        The draft folder to write into.

    Raises:
        StorageError: it cannot be written; nothing is visible under `target`.
    """
    make_folder(target.parent)
    draft = _draft_of(target)
    with storage_errors(f"write {target}"):
        try:
            disk.mkdir(draft)
            yield draft
            _seal(draft, kind, note or {}, shared or {})
            _publish(draft, target)
        except BaseException:
            _remove_quietly(draft)
            raise
        _sync_folder(target.parent)


def _publish(draft: Path, target: Path) -> None:
    if os.path.lexists(target):  # rename would silently replace an empty folder
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    disk.rename(draft, target)


def _seal(draft: Path, kind: str, note: Mapping[str, Any], shared: Mapping[str, str]) -> None:
    files = []
    for path in _files_under(draft):
        name = path.relative_to(draft).as_posix()
        entry = {"name": name, "size": path.stat().st_size}
        if name not in shared:
            _sync_file(path)
        files.append(entry | {"sha256": shared.get(name) or _sha256(path)})
    body = {"format": _MANIFEST_FORMAT, "kind": kind, "note": dict(note), "files": files}
    write_file(draft / _MANIFEST, _manifest_bytes(body))
    for folder, _, _ in os.walk(draft, topdown=False):
        _sync_folder(Path(folder))


def share_file(source: Path, target: Path) -> str | None:
    """Give a file of a sealed folder a second name in a draft; its SHA-256 as sealed.

    Both folders stay whole by themselves: removing one leaves the other its file. None, and no
    file, where the file system has no such links or the sealed folder no such file.

    Args:
        source: the file; the manifest of its folder vouches for it.
        target: the new name, on the same file system.
    """
    try:
        entries = _read_manifest(source.parent)["files"]
        entry = next(e for e in entries if e["name"] == source.name)
        if source.lstat().st_size != entry["size"]:
            return None
        disk.link(source, target)
    except (OSError, StorageError, StopIteration):
        return None
    return entry["sha256"]


def _files_under(folder: Path) -> list[Path]:
    found = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path != folder / _MANIFEST)


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json({"body": body, "sha256": digest}) + b"\n"


def verify_folder(
    path: Path, *, kind: str | None = None, unread: Collection[str] = ()
) -> dict[str, Any]:
    """Check a folder against its manifest, byte for byte; the note it was sealed with.

    Args:
        path: a folder that `atomic_folder` wrote.
        kind: what it must be; None accepts any.
        unread: names of files whose bytes were verified before, under another name.

    Raises:
        DamagedFile: not such a folder, or a file is missing or changed.
    """
    body = _read_manifest(path)
    if kind is not None and body["kind"] != kind:
        raise _damaged(path, f"a folder of kind {body['kind']!r} where {kind!r} belongs")
    for entry in body["files"]:
        _verify_file(path, entry, read=entry["name"] not in unread)
    return body["note"]


def sealed_note(path: Path) -> dict[str, Any] | None:
    """The note a folder was sealed with, its files unread; None where there is no manifest."""
    try:
        return _read_manifest(path)["note"]
    except StorageError:
        return None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise _damaged(path, "no folder (a link or a file)")
        if not stat.S_ISREG((path / _MANIFEST).lstat().st_mode):
            raise _damaged(path / _MANIFEST, "no regular file")
        raw = _read_capped(path / _MANIFEST, _MAX_MANIFEST_BYTES)
    except OSError as error:
        raise _damaged(path, f"no readable {_MANIFEST}: {error.strerror}") from error
    try:
        body = json.loads(raw)["body"]
        whole = _manifest_bytes(body) == raw
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path / _MANIFEST, "text that is no manifest") from error
    if not whole:
        raise _damaged(path / _MANIFEST, "a digest that does not match its text")
    if body.get("format") != _MANIFEST_FORMAT:
        raise StorageError(
            f"read {path}",
            found=f"a manifest of format {body.get('format')!r}",
            fix=f"use the version of frostline that wrote it (this one reads {_MANIFEST_FORMAT})",
        )
    return body


def _verify_file(folder: Path, entry: Mapping[str, Any], *, read: bool) -> None:
    path = folder / entry["name"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise _damaged(path, "a name that leads out of its folder")
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, "no regular file")
        if status.st_size != entry["size"]:
            raise _damaged(path, f"{status.st_size} bytes where {entry['size']} were written")
        digest = _sha256(path) if read else entry["sha256"]
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if digest != entry["sha256"]:
        raise _damaged(path, f"SHA-256 {digest[:12]}… where {entry['sha256'][:12]}… was written")


def newest_valid(
    folders: Iterable[Path], *, kind: str | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The first folder that verifies, with its note; damaged ones are warned about and passed over.

    Args:
        folders: candidates, newest first.
        kind: what they must be; None accepts any.
    """
    for folder in folders:
        try:
            return folder, verify_folder(folder, kind=kind)
        except StorageError as error:
            _log.warning("passing over %s: %s", folder, error.found)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- JSON ----------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, finite numbers only."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode("utf-8")


def finite_json(value: Any) -> Any:
    """The value with NaN and infinities as the strings "NaN", "Infinity" and "-Infinity".

    `float()` reads all three back.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    return value


def load_json(path: Path, *, max_bytes: int = _MAX_JSON_BYTES) -> Any:
    """Read a JSON file strictly: no repeated keys, no NaN, bounded size and depth.

    Raises:
        StorageError: it cannot be read.
        DamagedFile: too large, too deep, or not strict JSON.
    """
    with storage_errors(f"read {path}"):
        raw = _read_capped(path, max_bytes)
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite_float,
        )
        _check_shape(value)
    except RecursionError as error:
        raise _unreadable(path, f"nesting deeper than {_MAX_DEPTH}") from error
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    return value


def _read_capped(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise _unreadable(path, f"more than {max_bytes:,} bytes")
    return raw


def _unreadable(path: Path, found: str) -> DamagedFile:
    return DamagedFile(
        f"read {path} as JSON", found=found, fix="restore the file as it was written"
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} twice in one object")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"the number {text}, which JSON does not have")


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]}, which is too large")
    return value


def _check_shape(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"nesting deeper than {_MAX_DEPTH}")
        for item in level:
            if isinstance(item, str):
                item.encode("utf-8")  # a lone surrogate raises here, not when it is printed
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in ([*item, *item.values()] if isinstance(item, dict) else item)
        ]


# -- append-only lines ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lines:
    """What a file of checked JSON lines holds.

    Attributes:
        records: the values of all whole lines.
        ends: byte offset after each line.
        tail: bytes after the last whole line: a write that was cut off.
    """

    records: tuple[Any, ...]
    ends: tuple[int, ...]
    tail: bytes


def read_lines(path: Path) -> Lines:
    """Read checked JSON lines.

    Raises:
        StorageError: it cannot be read.
        DamagedFile: a line is damaged, lost or out of place, and whole lines follow it.
    """
    with storage_errors(f"read {path}"):
        raw = path.read_bytes()
    return _parse_lines(path, raw, keep=None)


def _parse_lines(path: Path, raw: bytes, *, keep: int | None) -> Lines:
    """Whole lines up to the first bad one, or the first `keep`; what follows is the tail."""
    records, ends, place = [], [], 0
    while place < len(raw) and (keep is None or len(records) < keep):
        end = raw.find(b"\n", place) + 1
        if not end or (record := _decode_line(raw[place:end], len(records))) is _BAD:
            break
        records.append(record)
        ends.append(end)
        place = end
    tail = raw[place:]
    if keep is None and any(_decode_line(line, None) is not _BAD for line in _later(tail)):
        raise _damaged(path, f"line {len(records) + 1} is damaged or out of place")
    return Lines(tuple(records), tuple(ends), tail)


def _later(tail: bytes) -> list[bytes]:
    return tail.splitlines(keepends=True)


_BAD = object()
_LINE = re.compile(rb'\{"crc":"([0-9a-f]{8})","n":(0|[1-9]\d*),"data":(.*)\}\n', re.DOTALL)


def _encode_line(record: Any, number: int) -> bytes:
    data = canonical_json(finite_json(record))
    crc = zlib.crc32(b"%d:%s" % (number, data))
    return b'{"crc":"%08x","n":%d,"data":%s}\n' % (crc, number, data)


def _decode_line(line: bytes, number: int | None) -> Any:
    """The record of a line, or `_BAD`; `number` None accepts any place in the file."""
    match = _LINE.fullmatch(line)
    if match is None or (number is not None and int(match[2]) != number):
        return _BAD
    if int(match[1], 16) != zlib.crc32(b"%s:%s" % (match[2], match[3])):
        return _BAD
    try:
        return json.loads(match[3])
    except (ValueError, RecursionError):
        return _BAD


@dataclass(slots=True)
class JsonLines:
    """The one writer of a file of checked JSON lines.

    Opening cuts a torn tail, keeps it in a file beside, and says so.

    Args:
        path: the file; created when absent.
        keep: go on after this many lines and drop the rest: the work they tell of is redone.
            None keeps all.

    Attributes:
        count: lines in the file.

    Raises:
        StorageError: the file cannot be opened.
        DamagedFile: fewer whole lines than `keep`, or a damaged line amid whole ones.
    """

    path: Path
    keep: int | None = None
    count: int = field(init=False, default=0)
    _fd: int = field(init=False, default=-1)
    _size_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        with storage_errors(f"open {self.path}"):
            self._fd = disk.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                self._recover()
            except BaseException:
                self.close()
                raise
            _sync_folder(self.path.parent)

    def append(self, record: Any) -> None:
        """Add one line with one write; NaN and infinities become strings.

        Raises:
            StorageError: it cannot be written.
        """
        line = _encode_line(record, self.count)
        with storage_errors(f"write {self.path}"):
            try:
                _write_all(self._fd, line)
            except BaseException:
                with contextlib.suppress(OSError):
                    disk.truncate(self._fd, self._size_bytes)
                raise
        self._size_bytes += len(line)
        self.count += 1

    def sync(self) -> None:
        """Make all lines so far durable.

        Raises:
            StorageError: they cannot be, or the file is not as long as what was written.
        """
        with storage_errors(f"write {self.path}"):
            disk.fsync(self._fd)
            if os.fstat(self._fd).st_size != self._size_bytes:
                raise OSError(errno.EIO, "the file is not as long as what was written")

    def close(self) -> None:
        """Close the file; harmless when closed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with storage_errors(f"close {self.path}"):
                disk.close(fd)

    def _recover(self) -> None:
        lines = _parse_lines(self.path, self.path.read_bytes(), keep=self.keep)
        if self.keep is not None and len(lines.records) < self.keep:
            raise _damaged(
                self.path, f"{len(lines.records)} whole lines where {self.keep} were written"
            )
        self.count = len(lines.records)
        self._size_bytes = lines.ends[-1] if lines.ends else 0
        if not lines.tail:
            return
        if _decode_line(_later(lines.tail)[-1], None) is _BAD:
            self._put_aside(lines.tail)
        disk.truncate(self._fd, self._size_bytes)
        disk.fsync(self._fd)

    def _put_aside(self, tail: bytes) -> None:
        torn = self.path.with_name(f"{self.path.name}.torn-{hashlib.sha256(tail).hexdigest()[:8]}")
        if not torn.exists():
            atomic_write_bytes(torn, tail)
        _log.warning(
            "%s ended in %d bytes of an unfinished line; cut, kept in %s",
            self.path, len(tail), torn.name,
        )  # fmt: skip
