"""The folder of a study: where its declaration and its runs lie, and in which order they are done.

What is done is known from these files alone; reading them needs no framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from frostline import _io
from frostline.errors import DamagedFile, DataError
from frostline.records import RECORD_NAME, STUDY_NAME
from frostline.study.spec import StudySpec

__all__ = ["StudyFolder", "TrialKey", "run_order"]


@dataclass(frozen=True, slots=True)
class TrialKey:
    """One run of a study: which arm, which seed."""

    arm: str
    seed: int


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Names inside a study's folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def declaration(self) -> Path:
        """What is compared."""
        return self.path / STUDY_NAME

    @property
    def lock(self) -> Path:
        """Held by the process that runs the study."""
        return self.path / ".lock"

    def run(self, key: TrialKey) -> Path:
        """The folder of a run."""
        return self.path / "runs" / key.arm / f"seed-{key.seed}"

    def failure(self, key: TrialKey) -> Path:
        """Why a run could not be finished; absent for one that could."""
        return self.path / "runs" / key.arm / f"seed-{key.seed}.failed.json"

    def spec(self) -> StudySpec:
        """The declaration.

        Raises:
            DataError: no study there.
            DamagedFile: it cannot be read.
        """
        if not self.declaration.is_file():
            raise DataError(
                f"read the study {self.path}",
                found="no study.json",
                fix="give the folder that frostline compare printed",
            )
        found = _io.load_json(self.declaration)
        try:
            return StudySpec.from_json(found)
        except (AttributeError, KeyError, TypeError) as error:
            raise DamagedFile(
                f"read the study {self.path}",
                found=f"a {self.declaration.name} that declares none ({error})",
                fix="bring the file back from a copy; the runs beside it are whole",
            ) from error

    @property
    def begun(self) -> bool:
        """Whether a run of the study has recorded anything, or failed."""
        runs = self.path / "runs"
        return any(runs.glob(f"*/*/{RECORD_NAME}")) or any(runs.glob("*/*.failed.json"))

    def done(self, key: TrialKey) -> bool:
        """Whether a run came to its end and did not fail."""
        return (self.run(key) / "summary.json").is_file() and not self.failure(key).is_file()

    def finished(self, key: TrialKey) -> bool:
        """Whether a run came to its end, or failed for good."""
        return (self.run(key) / "summary.json").is_file() or self.failure(key).is_file()


def run_order(spec: StudySpec) -> list[TrialKey]:
    """The runs in the order in which they are done.

    Seed by seed; with every other seed the order of the arms is reversed, so that a machine that
    becomes slower or faster meanwhile does so for all arms alike (A B, B A, ...). In the first
    seed controls come after the arms that they depend on.

    Example:
        >>> from frostline.study.spec import arms_of
        >>> spec = StudySpec({}, arms_of(["full", "linear-probe"]), (0, 1), "full")
        >>> [f"{key.arm}/{key.seed}" for key in run_order(spec)]
        ['full/0', 'linear-probe/0', 'linear-probe/1', 'full/1']
    """
    settled = [arm.name for arm in spec.arms if arm.control is None]
    names = settled + [arm.name for arm in spec.arms if arm.control is not None]
    return [
        TrialKey(name, seed)
        for turn, seed in enumerate(spec.seeds)
        for name in (names if turn % 2 == 0 else reversed(names))
    ]
