"""What the live page shows: the files of runs, whether they changed, and the page made of them.

Asking for news costs a few `stat` calls. The page is made again only when a file changed, and not
before it has rested for a multiple of the processor time that the last one took: a page that is
looked at must not take the processor from the training that it shows.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from frostline.errors import DataError, FrostlineError
from frostline.records import DIAGNOSIS_NAME, PROBES_NAME, RECORD_NAME, STUDY_NAME

__all__ = ["Page", "Phase", "Render", "State", "Watched"]

_log = logging.getLogger("frostline")

#: Makes the page of these run folders or studies.
Render = Callable[[Sequence[Path]], str]
Phase = Literal["waiting", "unfinished", "finished"]

#: How many times as long as it took a page rests: it takes a twentieth of a core at most.
_REST = 19.0
#: A study has its runs three folders down: runs/ARM/seed-N.
_DEEPEST = 4
_BESIDE = ("summary.json", "predictions.csv", "certificate.json", PROBES_NAME, DIAGNOSIS_NAME)


@dataclass(frozen=True, slots=True)
class Page:
    """The page as it was made.

    Attributes:
        version: of the files that it shows.
        html: the page.
    """

    version: str
    html: str


@dataclass(frozen=True, slots=True)
class State:
    """What is to be said of the runs without making a page.

    Attributes:
        version: of the page that would be served now.
        phase: "waiting" (no record yet), "unfinished" or "finished" (all of them, and all that a
            study declares).
        changed_s: seconds since a record was written last; None without one.
        problem: why the newest files cannot be shown; empty when they can.
    """

    version: str
    phase: Phase
    changed_s: float | None
    problem: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "version": self.version,
            "phase": self.phase,
            "changed_s": self.changed_s,
            "problem": self.problem,
        }


@dataclass(slots=True)
class Watched:
    """Runs or studies, and the newest page of them. May be asked from several threads.

    Args:
        paths: run folders or studies. A folder without a record is waited for.
        render: makes the page; what it raises is told, and the last good page stays.
        clock: seconds, only ever growing.
        spent: seconds of processor time.

    Raises:
        DataError: no such folder.
    """

    paths: Sequence[Path]
    render: Render
    clock: Callable[[], float] = time.monotonic
    spent: Callable[[], float] = time.process_time
    _page: Page | None = field(init=False, default=None)
    _tried: str = field(init=False, default="")  # version that was rendered last, well or not
    _problem: str = field(init=False, default="")
    _rests_until: float = field(init=False, default=float("-inf"))
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for path in self.paths:
            if not path.is_dir():
                raise DataError(
                    f"watch {path}",
                    found="a file" if path.exists() else "no such folder",
                    fix="give the folder of a run or a study, as frostline fit printed it",
                )

    def state(self) -> State:
        """What there is now; makes a page if one is due."""
        records = list(self._records())
        times = [stat.st_mtime for r in records if (stat := _stat(r)) is not None]
        page = self.page()
        return State(
            version=page.version if page is not None else "",
            phase=_phase(records, self.paths),
            changed_s=round(max(0.0, time.time() - max(times)), 1) if times else None,
            problem=self._problem,
        )

    def page(self) -> Page | None:
        """The newest page that could be made; None when none could so far."""
        with self._lock:
            version = self.version()
            if not version:  # no record yet, or moved away: nothing is wrong
                self._problem = self._tried = ""
            elif version != self._tried and self.clock() >= self._rests_until:
                self._make(version)
            return self._page

    def version(self) -> str:
        """Changes when a file does: from names, sizes, times, numbers on the disk; "" for none."""
        told: list[str] = []
        for record in self._records():
            for file in (record, *(record.with_name(name) for name in _BESIDE)):
                if (stat := _stat(file)) is not None:
                    numbers = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                    told.append(f"{file}\0{numbers}")
        if not told:
            return ""
        return hashlib.sha256("\n".join(told).encode(errors="surrogateescape")).hexdigest()[:16]

    def _records(self) -> Iterator[Path]:
        for path in self.paths:
            yield from _records_under(path, _DEEPEST)

    def _make(self, version: str) -> None:
        started, first = self.spent(), not self._tried  # the first one imports what it needs
        try:
            self._page = Page(version, self.render(self.paths))
            self._problem = ""
        except FrostlineError as error:
            self._problem = str(error)
        except Exception as error:  # noqa: BLE001  the page stays up and says so
            self._problem = f"unexpected {type(error).__name__}: {error}"
            _log.warning("the page cannot be made: %s", self._problem)
        self._tried = version
        self._rests_until = self.clock() + (0.0 if first else _REST * (self.spent() - started))


def _records_under(folder: Path, depth: int) -> Iterator[Path]:
    """The record of a run folder, or those of the runs in a study; links are not followed."""
    if (folder / RECORD_NAME).is_file():
        yield folder / RECORD_NAME
        return
    try:
        inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink())
    except OSError:  # removed or moved meanwhile
        return
    if depth:
        for place in inner:
            yield from _records_under(place, depth - 1)


def _phase(records: Sequence[Path], paths: Sequence[Path]) -> Phase:
    if not records:
        return "waiting"
    whole = all(record.with_name("summary.json").is_file() for record in records)
    return "finished" if whole and not any(map(_lacks_runs, paths)) else "unfinished"


def _lacks_runs(path: Path) -> bool:
    """Whether this is a study with runs to come."""
    if not (path / STUDY_NAME).is_file():
        return False
    try:
        # Runs are watched without what comparing them needs.
        from frostline.study.folder import StudyFolder, run_order  # noqa: PLC0415

        study = StudyFolder(path)
        return not all(map(study.finished, run_order(study.spec())))
    except FrostlineError:  # damaged, or a package is missing: making the page complains of it
        return False


def _stat(path: Path) -> Any:
    try:
        return path.stat()
    except OSError:
        return None
