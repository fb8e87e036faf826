"""The folder of a run: where things are, who may write there, and which folder a run gets."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from frostline import _io
from frostline.errors import ConfigError, FrostlineError, StorageError
from frostline.records import PROBES_NAME, RECORD_NAME, read_run
from frostline.tasks.config import RunConfig

__all__ = [
    "RunFolder",
    "asked_settings",
    "check_same",
    "claim",
    "locked",
    "log_to",
    "move_aside",
]

_log = logging.getLogger("frostline")
#: Settings that change where and how a run is done, not what comes out.
_FREE = {
    "output",
    "workers",
    "checkpoint_every",
    "keep_checkpoints",
    "cache_dir",
    "cache_limit_gib",
    "trackers",
}
#: How long the workers of a killed run may hold its lock until they notice.
_ORPHANS_S = 15.0


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names inside a run's folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """What happened, line by line."""
        return self.path / RECORD_NAME

    @property
    def metrics(self) -> Path:
        """Metrics per epoch, for a spreadsheet."""
        return self.path / "metrics.csv"

    @property
    def summary(self) -> Path:
        """Results and costs; there only when the run is finished."""
        return self.path / "summary.json"

    @property
    def predictions(self) -> Path:
        """Label, prediction and its probability for each test sample, as numbers of classes."""
        return self.path / "predictions.csv"

    @property
    def probes(self) -> Path:
        """Probes of the layer groups before training, where the policy reads them."""
        return self.path / PROBES_NAME

    @property
    def certificate(self) -> Path:
        """The proof of freezing."""
        return self.path / "certificate.json"

    @property
    def log(self) -> Path:
        """What was logged."""
        return self.path / "log.txt"

    @property
    def model(self) -> Path:
        """The tuned model."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Where an interrupted run goes on."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Weights of the best epochs."""
        return self.path / "best"

    @property
    def trackers(self) -> Path:
        """What trackers keep."""
        return self.path / "trackers"

    @property
    def lock(self) -> Path:
        """Held by the process that runs."""
        return self.path / ".lock"

    def started(self) -> bool:
        """Whether a run has begun to record here."""
        return self.record.is_file() and self.record.stat().st_size > 0

    def asked(self) -> Mapping[str, Any] | None:
        """The settings the run here was asked for; None when none has begun.

        Raises:
            DamagedFile: its record is damaged.
        """
        if not self.started():
            return None
        try:
            return read_run(self.path).header["asked"]
        except FrostlineError as error:
            if _first_line_torn(self.record):
                return None
            raise StorageError(
                f"go on with the run in {self.path}",
                found=str(error.found),
                fix="restore record.jsonl from a copy, or start over: fresh=True (--fresh)",
            ) from error


def _first_line_torn(record: Path) -> bool:
    """Whether the run was killed before its first line was whole: nothing to go on with."""
    return b"\n" not in record.read_bytes()


def asked_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that must be the same to go on with a run, as plain JSON."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE}


@contextlib.contextmanager
def claim(config: RunConfig, *, fresh: bool) -> Iterator[RunFolder]:
    """The folder of a run, locked for this process.

    With `config.output` that folder: a run of the same settings there is gone on with, `fresh`
    moves it aside. Without, a new numbered folder under ``runs``, or the newest one of this name
    if it holds an unfinished run of the same settings.

    Raises:
        ConfigError: the folder holds a run of other settings, or foreign files.
        StorageError: another process runs there, or the folder cannot be used.
    """
    with contextlib.ExitStack() as stack:
        if config.output is None:
            folder = _numbered(config, stack, fresh=fresh)
        else:
            folder = RunFolder(Path(config.output))
            if fresh:
                move_aside(folder)
            _io.make_folder(folder.path)
            stack.enter_context(locked(folder))
            _check_fits(folder, config)
        yield folder


def _check_fits(folder: RunFolder, config: RunConfig) -> None:
    there = folder.asked()
    if there is None:
        known = {p.name for p in (folder.config, folder.record, folder.log, folder.lock)}
        ours = (".tmp-", f"{RECORD_NAME}.torn-")
        names = {p.name for p in folder.path.iterdir() if not p.name.startswith(ours)}
        if strange := sorted(names - known):
            raise ConfigError(
                f"run in {folder.path}",
                found=f"files of something else there: {', '.join(strange[:3])}",
                fix="choose a new or empty folder",
            )
        return
    check_same(folder, asked_settings(config), there)


def check_same(folder: RunFolder, wanted: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise unless the run in the folder was asked for with these settings.

    Args:
        folder: of the run.
        wanted: settings now, plain JSON.
        there: settings as the record has them.

    Raises:
        ConfigError: some differ.
    """
    if other := sorted(key for key in wanted if wanted[key] != there.get(key)):
        key = other[0]
        raise ConfigError(
            f"go on with the run in {folder.path}",
            found=f"other settings there: {key}={there.get(key)!r}, now {wanted[key]!r}"
            + (f" (also {', '.join(other[1:])})" if other[1:] else ""),
            fix="use the same settings, another output folder, or start over: fresh=True (--fresh)",
        )


# -- choosing a folder ---------------------------------------------------------------------------


def _numbered(config: RunConfig, stack: contextlib.ExitStack, *, fresh: bool) -> RunFolder:
    runs, name = Path("runs"), _name(config)
    taken = _taken(runs, name)
    if taken and not fresh and (last := _resumable(RunFolder(runs / taken[-1]), config, stack)):
        return last
    number = int(taken[-1].rpartition("-")[2]) + 1 if taken else 1
    _io.make_folder(runs)
    while True:
        folder = RunFolder(runs / f"{name}-{number:03d}")
        try:
            with _io.storage_errors(f"create the folder {folder.path}"):
                _io.disk.mkdir(folder.path)
        except StorageError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            number += 1
            continue
        stack.enter_context(locked(folder))
        return folder


def _taken(runs: Path, name: str) -> list[str]:
    pattern = re.compile(re.escape(name) + r"-(\d{3,9})")
    found = [p.name for p in runs.iterdir() if pattern.fullmatch(p.name)] if runs.is_dir() else []
    return sorted(found, key=lambda text: int(text.rpartition("-")[2]))


def _resumable(
    folder: RunFolder, config: RunConfig, stack: contextlib.ExitStack
) -> RunFolder | None:
    """The folder, locked, when it holds an unfinished run of these settings that nobody runs."""
    if not folder.started() or folder.summary.exists():
        return None
    try:
        if folder.asked() != asked_settings(config):
            return None
        stack.enter_context(locked(folder))
    except StorageError as error:
        _log.info("not going on in %s: %s", folder.path, error.found)
        return None
    return folder


def _name(config: RunConfig) -> str:
    """A folder name from model and policy: the last words of each, safe everywhere."""
    model = re.split(r"[:/\\]", config.model.rstrip("/\\"))[-1]
    policy = config.policy.partition(":")[0]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{model}-{policy}").strip("-.")[:80] or "run"


def move_aside(folder: RunFolder) -> None:
    """Give an old run another name: nothing is ever overwritten."""
    if not os.path.lexists(folder.path) or not any(folder.path.iterdir()):
        return
    with locked(folder):
        number = 1
        while os.path.lexists(
            aside := folder.path.with_name(f"{folder.path.name}.old-{number:03d}")
        ):
            number += 1
        with _io.storage_errors(f"move {folder.path} aside"):
            _io.disk.rename(folder.path, aside)
        _log.info("moved the earlier run to %s", aside)


# -- one writer per folder -----------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it however this process ends."""
    lock = filelock.FileLock(folder.lock, thread_local=False, fallback_to_soft=False)
    with _io.storage_errors(f"lock {folder.path}"):
        try:
            lock.acquire(timeout=0 if _holder_lives(folder) else _ORPHANS_S)
        except filelock.Timeout as error:  # an OSError, too
            raise StorageError(
                f"run in {folder.path}",
                found=f"another process runs there: {_holder(folder)}",
                fix="wait for it to end, stop it, or choose another output folder",
            ) from error
    try:
        with _io.storage_errors(f"lock {folder.path}"):
            folder.lock.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        lock.release()


def _holder_info(folder: RunFolder) -> dict[str, Any]:
    try:
        info = _io.load_json(folder.lock)
    except StorageError:
        return {}
    return info if isinstance(info, dict) else {}


def _holder(folder: RunFolder) -> str:
    info = _holder_info(folder)
    return (
        f"process {info['pid']} on {info['host']}" if info.keys() >= {"pid", "host"} else "unknown"
    )


def _holder_lives(folder: RunFolder) -> bool:
    """Whether the process that wrote the lock is alive, as far as can be told from here.

    If it is dead and the lock is held, its data workers are about to notice and end.
    """
    info = _holder_info(folder)
    if info.get("host") != socket.gethostname() or not isinstance(info.get("pid"), int):
        return True
    try:
        os.kill(info["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# -- log -----------------------------------------------------------------------------------------


class _LogFile(logging.FileHandler):
    """A log file that a full disk leaves incomplete, without noise: records are the evidence."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        del record

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what Frostline logs at INFO and above to a file."""
    with _io.storage_errors(f"write {path}"):
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = _log.level
    if not _log.isEnabledFor(logging.INFO):
        _log.setLevel(logging.INFO)
    _log.addHandler(handler)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        handler.close()
        _log.setLevel(before)
