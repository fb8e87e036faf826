"""The folder that holds all stores: found by key, counted, bounded, pruned.

Layout::

    <root>/
      CACHEDIR.TAG              tells backup programs to pass by
      .lock                     held for moments: while an entry is made or removed
      <32 hex digits>/          an entry, named by the digest of its key
        manifest.json           size and digest of entry.json
        entry.json              the key's parts, columns, rows, and what it is in words
        users/<pid>-<random>.lock   held by each process that has the store open
        rows/                   the store

An entry appears and vanishes by one rename, so no reader sees half of one. Locks are the kernel's:
a killed process holds none. Everything found here is data of unknown origin: what is no entry of
ours is reported and otherwise left alone, and an entry counts only if its key gives its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import platformdirs
from filelock import FileLock, Timeout

from frostline import _io
from frostline._version import __version__
from frostline.errors import DamagedFile, FrontierError, StorageError, UsageError, few
from frostline.frontier.key import CacheKey
from frostline.frontier.store import Column, Damage, Store

__all__ = ["Entry", "Library", "Pruned", "State", "default_root"]

State = Literal["good", "damaged", "half-made", "foreign"]

_log = logging.getLogger("frostline")
_FORMAT = 1
_KIND = "frostline frontier entry 1"
_ENTRY, _USERS, _ROWS, _LOCK, _TAG = "entry.json", "users", "rows", ".lock", "CACHEDIR.TAG"
_NAME = re.compile(r"[0-9a-f]{32}")
#: What `_io` calls things until they are whole.
_DRAFT = re.compile(r"\.tmp-[0-9a-f]{16}")
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by frostline; may be removed.\n"
#: A key lists a few hundred bytes for every tensor and module.
_MAX_ENTRY_BYTES = 16_000_000
_MAX_ROWS = 1 << 32
_WAIT_S = 60.0
#: Looking waits less; what it then does not see is said to be unknown.
_LOOK_S = 2.0


def default_root() -> Path:
    """Where stores are kept: the folder FROSTLINE_CACHE, or `frontier` in the user's cache folder.

    Example:
        >>> default_root().is_absolute()
        True
    """
    if given := os.environ.get("FROSTLINE_CACHE"):
        return Path(given).expanduser().absolute()
    return platformdirs.user_cache_path("frostline") / "frontier"


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands in the library under one name.

    Attributes:
        path: the folder (or whatever it is).
        state: "good"; "damaged": ours and changed; "half-made": left by a killed process;
            "foreign": not ours, never read further and never removed.
        why: what is wrong; empty for a good one.
        size_bytes: what it takes from the disk.
        in_use: whether a process has it open just now.
        last_used: Unix time of the last opening or closing, s.
        created: Unix time, s; None when not known.
        rows: how many there can be; None when not known.
        rows_present: how many there are; None when not known or not counted.
        columns: what a row holds.
        about: what it is, in the words of whoever made it; plain JSON.
        frostline: version that made it.
        key: what its values depend on; None unless it is good.
    """

    path: Path
    state: State
    why: str = ""
    size_bytes: int = 0
    in_use: bool = False
    last_used: float = 0.0
    created: float | None = None
    rows: int | None = None
    rows_present: int | None = None
    columns: tuple[Column, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    frostline: str = ""
    key: CacheKey | None = None

    @property
    def name(self) -> str:
        """Its name in the library: the first 32 digits of the key's digest."""
        return self.path.name


@dataclass(frozen=True, slots=True)
class Pruned:
    """What pruning did, or would do.

    Attributes:
        removed: entries that are gone.
        in_use: entries that were wanted gone, and are being used.
        failed: the other ones that stay, and why.
        litter: drafts of killed processes that are gone.
    """

    removed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    failed: tuple[tuple[Entry, str], ...] = ()
    litter: tuple[str, ...] = ()

    @property
    def freed_bytes(self) -> int:
        """What removal gave back to the disk."""
        return sum(entry.size_bytes for entry in self.removed)


class Library:
    """All stores of one user, or of several who trust each other.

    Args:
        root: the folder; None: `default_root()`. Made at the first `open`, for its owner alone.
        budget_bytes: the most that all stores together should take; None: no bound. Two
            processes that fill at the same time each see what the other had when they began.
        shared: accept a folder of another user, or one that others may write to. They can then
            hand you wrong values; checksums guard against accidents, not against people.

    Example:
        >>> import tempfile
        >>> from frostline.frontier.store import Column
        >>> with tempfile.TemporaryDirectory() as place:
        ...     library = Library(Path(place) / "stores")
        ...     key = CacheKey({"weights": {"conv1": "ab"}})
        ...     store = library.open(key, [Column("x", "float32")], 64, about={"model": "m"})
        ...     store.close()
        ...     [entry.about["model"] for entry in library.entries()]
        ['m']
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        budget_bytes: int | None = None,
        shared: bool = False,
    ) -> None:
        self.root = default_root() if root is None else Path(root).expanduser().absolute()
        self.budget_bytes = budget_bytes
        self.shared = shared

    # -- using -----------------------------------------------------------------------------------

    def open(
        self,
        key: CacheKey,
        columns: Sequence[Column],
        rows: int,
        *,
        about: Mapping[str, Any] | None = None,
        needs_bytes: int = 0,
        most_bytes: int | None = None,
    ) -> Store:
        """The store of a key, made if there is none; in use until its `close`.

        Args:
            key: what the values depend on.
            columns: what a row holds.
            rows: how many there can be, >= 1.
            about: what it is, for people: model, region, data. Plain JSON.
            needs_bytes: room it will want. Within the budget, other entries that nobody uses
                make way, those first that were used longest ago.
            most_bytes: the most it may take, besides the budget of all; None: no bound.

        Raises:
            FrontierError: an entry of this key has other columns or rows: the key is too narrow.
            StorageError: the library cannot be used or written.
        """
        if rows < 1 or not columns:
            raise FrontierError(
                "open a store",
                found=f"{rows} rows of {len(columns)} columns",
                fix="at least one of each",
            )
        self._make_root()
        path = self.place(key)
        with self._locked():
            self._sweep(self.root)
            self._settle(path, key, columns, rows)
            if path.exists():
                self._sweep(path)
                _io.make_folder(path / _USERS)  # whoever removed it took nothing that is needed
            else:
                self._create(path, key, columns, rows, about or {})
            _clear_dead(path / _USERS)
            lease = _Lease(path / _USERS, mode=self._mode)
            try:
                room = [b for b in (self._room_for(path, needs_bytes), most_bytes) if b is not None]
                budget = min(room, default=None)
                return _open_store(path, key, columns, rows, budget, lease)
            except BaseException:
                lease.release()
                raise

    def place(self, key: CacheKey) -> Path:
        """Where the entry of a key is, or would be."""
        return self.root / key.digest[:32]

    def find(self, key: CacheKey) -> Entry | None:
        """The good entry of exactly this key, if there is one; its rows are not counted."""
        if not self._exists():
            return None
        entry = self._read(self.place(key), count=False)
        whole = entry is not None and entry.key is not None and entry.key.digest == key.digest
        return entry if whole else None

    # -- looking ---------------------------------------------------------------------------------

    def entries(self) -> tuple[Entry, ...]:
        """Everything that stands in the library, the last used first; nothing here raises for one.

        Raises:
            StorageError: the library itself cannot be used.
        """
        return tuple(sorted(self._scan(count=True), key=lambda e: (-e.last_used, e.name)))

    def match(self, prefix: str, *, ours: bool = False) -> Entry:
        """The one entry whose name begins so.

        Args:
            prefix: of its name.
            ours: refuse one that is foreign.

        Raises:
            UsageError: none, or several; or a foreign one.
        """
        found = [e for e in self._scan(count=True) if prefix and e.name.startswith(prefix)]
        if len(found) == 1:
            if ours and found[0].state == "foreign":
                raise UsageError(
                    f"work on {prefix!r} in {self.root}",
                    found=f"what is no entry of frostline: {found[0].why}",
                    fix="nothing, it is left alone; or remove it by other means",
                )
            return found[0]
        raise UsageError(
            f"find the cache entry {prefix!r}",
            found=f"{len(found)} entries: {few([e.name for e in found])}" if found else "none",
            fix="give more of its name; all are listed by: frostline cache list",
        )

    def verify(self, entry: Entry) -> Damage:
        """Read every row of an entry and compare its checksum.

        Raises:
            StorageError: it is no good entry, or has gone.
        """
        if entry.key is None or entry.rows is None:
            raise StorageError(
                f"verify {entry.path}", found=entry.why, fix="remove it: frostline cache prune"
            )
        users = entry.path / _USERS
        with _io.storage_errors(f"verify {entry.path}"):
            with self._locked():
                if entry.path.is_dir():  # an entry that has gone must not come back
                    _io.make_folder(users)
                used = users.stat().st_mtime_ns
                lease = _Lease(users, mode=self._mode)
            try:
                seed = bytes.fromhex(entry.key.digest)
                store = Store(entry.path / _ROWS, entry.columns, rows=entry.rows, seed=seed)
                with contextlib.closing(store):
                    return store.verify()
            finally:
                lease.release()
                with contextlib.suppress(OSError):
                    os.utime(users, ns=(used, used))  # being looked at is no use

    # -- removing --------------------------------------------------------------------------------

    def prune(
        self,
        *,
        older_than_s: float | None = None,
        keep_bytes: int | None = None,
        damaged: bool = False,
        names: Iterable[str] = (),
        everything: bool = False,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove entries for any of the given reasons; never one in use, never what is not ours.

        Args:
            older_than_s: those not used for longer, s.
            keep_bytes: the longest unused ones, until the rest takes no more than this.
            damaged: those that are damaged or half-made.
            names: these, by the beginning of their names.
            everything: all.
            dry_run: remove nothing, only say what would go.

        Raises:
            UsageError: a name that fits no entry, several, or something foreign.
            StorageError: the library itself cannot be used.
        """
        named = {self.match(prefix, ours=True).name for prefix in names}
        if not self._exists():
            return Pruned((), ())
        # Whether a store can be opened at all shows when its rows are counted.
        listed = sorted(self._scan(count=damaged), key=lambda e: e.last_used)
        ours = [entry for entry in listed if entry.state != "foreign"]
        now, total = time.time(), sum(e.size_bytes for e in ours)
        removed, in_use, failed = [], [], []
        for entry in ours:
            wanted = (
                everything
                or entry.name in named
                or (damaged and entry.state != "good")
                or (older_than_s is not None and now - entry.last_used > older_than_s)
                or (keep_bytes is not None and total > keep_bytes)
            )
            if not wanted:
                continue
            why = "in use" if entry.in_use else "" if dry_run else self._remove(entry)
            if not why:
                removed.append(entry)
                total -= entry.size_bytes
            elif why == "in use":
                in_use.append(entry)
            else:
                failed.append((entry, why))
        litter: tuple[str, ...] = ()
        if not dry_run:
            with self._locked():
                litter = self._sweep(self.root)
        return Pruned(tuple(removed), tuple(in_use), tuple(failed), litter)

    def _remove(self, entry: Entry) -> str:
        """Why it stays; empty once it is gone."""
        try:
            with self._locked():
                if not os.path.lexists(entry.path):
                    return ""
                if _is_used(entry.path):
                    return "in use"
                _io.discard(entry.path)
        except StorageError as error:
            return error.found
        return ""

    # -- the folder itself -----------------------------------------------------------------------

    @property
    def _mode(self) -> int:
        return 0o666 if self.shared else 0o600

    def _exists(self) -> bool:
        if not os.path.lexists(self.root):
            return False
        self._check_root()
        return True

    def _make_root(self) -> None:
        if not self._exists():
            _io.make_folder(self.root.parent)
            # With its mode from the start: a moment later others could have opened it.
            mode, asked = 0o777 if self.shared else 0o700, f"create the folder {self.root}"
            with _io.storage_errors(asked), contextlib.suppress(FileExistsError):
                os.mkdir(self.root, mode)
            self._check_root()
        if not os.path.lexists(self.root / _TAG):
            with contextlib.suppress(StorageError), self._locked():
                _io.atomic_write_text(self.root / _TAG, _TAG_TEXT)

    def _check_root(self) -> None:
        with _io.storage_errors(f"use the cache folder {self.root}"):
            status = self.root.stat()
        wrong, fix = "", ""
        if not stat.S_ISDIR(status.st_mode):
            wrong, fix = "no folder", "give another one, for example by FROSTLINE_CACHE"
        elif not self.shared and hasattr(os, "geteuid"):
            if status.st_uid != os.geteuid():
                wrong, fix = f"a folder of another user (uid {status.st_uid})", "use one of yours"
            elif status.st_mode & 0o022:
                wrong, fix = "a folder that others may write to", f"chmod go-w {self.root}"
            fix += ", or accept what others put there: shared=True, on the command line --shared"
        if wrong:
            raise StorageError(f"trust the cache folder {self.root}", found=wrong, fix=fix)

    @contextlib.contextmanager
    def _locked(self, *, wait_s: float | None = None) -> Iterator[None]:
        """Be the only process that makes or removes entries. Not to be nested."""
        wait_s = _WAIT_S if wait_s is None else wait_s
        with _native_lock(self.root / _LOCK, mode=self._mode, wait_s=wait_s):
            yield

    def _sweep(self, folder: Path) -> tuple[str, ...]:
        """Remove drafts of killed processes; only under the lock."""
        try:
            return _io.sweep(folder)
        except StorageError as error:
            _log.warning("%s", str(error).replace("\n", " "))
            return ()

    # -- reading entries -------------------------------------------------------------------------

    def _scan(self, *, count: bool, locked: bool = False) -> Iterator[Entry]:
        """Every entry; `locked` says that the caller holds the lock already."""
        if not self._exists():
            return
        with _io.storage_errors(f"list {self.root}"), os.scandir(self.root) as found:
            names = sorted(item.name for item in found if item.name not in (_LOCK, _TAG))
        for name in names:
            path = self.root / name
            entry = self._read(path, count=count) if locked else self._look(path, count=count)
            if entry is not None:
                yield entry

    def _look(self, path: Path, *, count: bool) -> Entry | None:
        """An entry as it is, though others make and remove entries at the same time."""
        entry = self._read(path, count=False)
        if entry is None or not (entry.state == "damaged" or (count and entry.state == "good")):
            return entry
        # An entry that is removed and made again meanwhile looks damaged; and opening a store to
        # count its rows would bring back a folder that has just gone.
        try:
            with self._locked(wait_s=min(_WAIT_S, _LOOK_S)):
                return self._read(path, count=count)
        except StorageError:
            return entry

    def _read(self, path: Path, *, count: bool) -> Entry | None:
        """The entry of a path as it is; None when there is nothing (any more)."""
        try:
            status = path.lstat()
            if why := self._foreign(path, status):
                return Entry(path, "foreign", why, last_used=status.st_mtime)
            size_bytes, odd = _measured(path)
            if _DRAFT.fullmatch(path.name):
                return Entry(path, "half-made", "left by a process that was killed", size_bytes,
                             last_used=status.st_mtime)  # fmt: skip
            used = (path / _USERS).stat().st_mtime if (path / _USERS).is_dir() else status.st_mtime
            common: dict[str, Any] = {
                "size_bytes": size_bytes, "in_use": _is_used(path), "last_used": used,
            }  # fmt: skip
        except OSError as error:
            if not os.path.lexists(path):
                return None
            return Entry(path, "foreign", error.strerror or str(error))
        try:
            facts = _facts(path, odd)
            present = _present(path, facts) if count else None
        except StorageError as error:
            if not os.path.lexists(path):
                return None
            return Entry(path, "damaged", error.found, **common)
        return Entry(path, "good", **common, **facts, rows_present=present)

    def _foreign(self, path: Path, status: os.stat_result) -> str:
        """What shows that something is not ours; empty when nothing does."""
        draft = _DRAFT.fullmatch(path.name)
        if not stat.S_ISDIR(status.st_mode) and not (draft and stat.S_ISREG(status.st_mode)):
            return "no folder"
        if not (draft or _NAME.fullmatch(path.name)):
            return "a name that no entry has"
        if not self.shared and hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            return f"a folder of another user (uid {status.st_uid})"
        return ""

    # -- making entries --------------------------------------------------------------------------

    def _settle(self, path: Path, key: CacheKey, columns: Sequence[Column], rows: int) -> None:
        """Clear the way: what stands under the name is a good entry of this key, or gone."""
        entry = self._read(path, count=False)
        if entry is None:
            return
        if entry.key is None or entry.key.digest != key.digest:
            _log.warning("starting the cache entry %s afresh: %s", path.name, entry.why)
            if entry.in_use:
                raise StorageError(
                    f"use the cache entry {path}",
                    found=f"{entry.why}, and another process has it open",
                    fix="wait until that process has ended, then start again",
                )
            _io.discard(path)
        elif (entry.columns, entry.rows) != (tuple(columns), rows):
            raise FrontierError(
                f"use the cache entry {path}",
                found=f"{entry.rows:,} rows of {len(entry.columns)} column(s) under the same key"
                f" where {rows:,} of {len(columns)} are wanted, or other columns",
                fix="put into the key what differs, or remove the entry: frostline cache prune "
                f"{path.name[:8]}",
            )

    def _create(
        self,
        path: Path,
        key: CacheKey,
        columns: Sequence[Column],
        rows: int,
        about: Mapping[str, Any],
    ) -> None:
        body = {
            "format": _FORMAT,
            "about": about,
            "frostline": __version__,
            "created": time.time(),
            "rows": rows,
            "columns": [asdict(column) for column in columns],
            "key": key.parts,
        }
        with _io.atomic_folder(path, kind=_KIND) as draft:
            _io.atomic_write_json(draft / _ENTRY, body)
            _io.disk.mkdir(draft / _USERS)
            _io.disk.mkdir(draft / _ROWS)
        # Read as everyone will: what cannot be read back must not be filled.
        if _facts(path)["key"].digest != key.digest:
            raise StorageError(
                f"make the cache entry {path}", found="it reads back differently", fix="try again"
            )

    def _room_for(self, path: Path, needs_bytes: int) -> int | None:
        """What the store of `path` may take, after others have made way; None: no bound."""
        if self.budget_bytes is None:
            return None
        scan = self._scan(count=False, locked=True)
        others = [e for e in scan if e.path != path and e.state != "foreign"]
        taken = sum(e.size_bytes for e in others)
        for entry in sorted(others, key=lambda e: e.last_used):
            if taken + needs_bytes <= self.budget_bytes:
                break
            if entry.in_use:
                continue
            with contextlib.suppress(StorageError):
                _io.discard(entry.path)
                taken -= entry.size_bytes
                _log.info("removed the cache entry %s to make room", entry.name)
        return max(0, self.budget_bytes - taken)


# -- what an entry says --------------------------------------------------------------------------


def _facts(path: Path, odd: str = "") -> dict[str, Any]:
    """What an entry's own file says, checked.

    Raises:
        StorageError: it is damaged, or of another format.
    """
    found = f"{odd} in it, which is no file"
    if not odd:
        try:
            _io.verify_folder(path, kind=_KIND)
            body = _io.load_json(path / _ENTRY, max_bytes=_MAX_ENTRY_BYTES)
            facts = _parsed(body)
        except (FrontierError, KeyError, TypeError, ValueError, AttributeError, OSError):
            found = f"{_ENTRY} says nothing useful"
        else:
            if facts["key"].digest[:32] == path.name:
                return facts
            found = "a key that does not give its name"
    raise StorageError(f"read {path}", found=found)


def _parsed(body: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a file's JSON; raises whatever it meets."""
    rows, about = body["rows"], body["about"]
    if body["format"] != _FORMAT or type(rows) is not int or not 0 < rows < _MAX_ROWS:
        raise ValueError
    return {
        "key": CacheKey(body["key"]),
        "rows": rows,
        "columns": tuple(Column(**column) for column in body["columns"]),
        "about": dict(about.items()),
        "created": float(body["created"]),
        "frostline": str(body["frostline"]),
    }


def _present(path: Path, facts: Mapping[str, Any]) -> int | None:
    """How many rows an entry's store has; None when it was never begun."""
    if not any((path / _ROWS).iterdir() if (path / _ROWS).is_dir() else ()):
        return 0
    seed = bytes.fromhex(facts["key"].digest)
    try:
        store = Store(path / _ROWS, facts["columns"], rows=facts["rows"], seed=seed)
        with contextlib.closing(store):
            return int(store.present(np.arange(facts["rows"])).sum())
    except FrontierError as error:
        raise StorageError(f"read {path}", found=error.found) from error


def _measured(path: Path) -> tuple[int, str]:
    """Bytes that a folder takes from the disk, and the first thing in it that is no file."""
    size_bytes, odd = 0, ""
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            place = Path(folder, name)
            try:
                status = place.lstat()
            except FileNotFoundError:
                continue  # another process has just removed it
            if stat.S_ISREG(status.st_mode):
                size_bytes += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
            elif not stat.S_ISDIR(status.st_mode):
                odd = odd or place.relative_to(path).as_posix()
    return size_bytes, odd


# -- who uses what -------------------------------------------------------------------------------


@contextlib.contextmanager
def _native_lock(path: Path, *, mode: int, wait_s: float) -> Iterator[FileLock]:
    """Hold a lock of the kernel's, which ends with the process that holds it.

    Raises:
        StorageError: another one held it all the time, or this disk has no locks.
    """
    lock = FileLock(path, mode=mode, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise StorageError(
            f"lock {path}",
            found=f"another process held it for {wait_s:.0f} s",
            fix="wait for it (it may be removing a large store), then start again",
        ) from None
    except OSError as error:
        raise StorageError(
            f"lock {path}",
            found=error.strerror or str(error),
            fix="keep the cache on a local disk: set FROSTLINE_CACHE to a folder there",
        ) from error
    try:
        yield lock
    finally:
        lock.release()


class _Lease:
    """Says that this process uses an entry, for as long as it lives or until it is released."""

    def __init__(self, folder: Path, *, mode: int) -> None:
        self.path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.lock"
        self._process = os.getpid()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_native_lock(self.path, mode=mode, wait_s=0.0))

    def release(self) -> None:
        """Once is enough. A forked child's copy is not its own to release."""
        if os.getpid() == self._process:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._stack.close()


class _LeasedStore(Store):
    """A store whose entry counts as used until it is closed."""

    def __init__(self, folder: Path, columns: Sequence[Column], *, lease: _Lease, **rest: Any):
        self._lease = lease
        super().__init__(folder, columns, **rest)

    def close(self) -> None:
        """Close the files, and let the entry go."""
        try:
            super().close()
        finally:
            self._lease.release()


def _open_store(
    path: Path,
    key: CacheKey,
    columns: Sequence[Column],
    rows: int,
    budget_bytes: int | None,
    lease: _Lease,
) -> Store:
    def attempt() -> Store:
        return _LeasedStore(
            path / _ROWS, columns, rows=rows, seed=bytes.fromhex(key.digest),
            budget_bytes=budget_bytes, lease=lease,
        )  # fmt: skip

    try:
        return attempt()
    except (DamagedFile, FrontierError) as error:
        # The entry is sound and asks for just this; its store is not. Rows can be computed again.
        if _is_used(path, but=lease):
            raise
        _log.warning("starting the store in %s afresh: %s", path, error.found)
        _io.discard(path / _ROWS)
        return attempt()


def _is_used(path: Path, *, but: _Lease | None = None) -> bool:
    return any(_is_held(user) for user in _users(path / _USERS) if not but or user != but.path)


def _users(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix == ".lock")
    except OSError:
        return []


def _is_held(path: Path) -> bool:
    """Whether a living process holds a lock file; when that cannot be told, yes."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        lock = FileLock(path, thread_local=False, fallback_to_soft=False)
        lock.acquire(timeout=0, blocking=False)
    except (Timeout, PermissionError):
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return True
    lock.release()
    return False


def _clear_dead(folder: Path) -> None:
    """Remove lock files of processes that were killed; only under the library's lock."""
    for user in _users(folder):
        if not _is_held(user):
            with contextlib.suppress(OSError):
                user.unlink()
