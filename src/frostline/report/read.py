"""Run folders and studies as a report reads them: nothing is trained, no framework is loaded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline import _io
from frostline.errors import DamagedFile, DataError
from frostline.records import (
    DIAGNOSIS_NAME,
    PROBES_NAME,
    RECORD_NAME,
    STUDY_NAME,
    RunRecord,
    read_run,
)

if TYPE_CHECKING:
    from frostline.study.analysis import Comparison
    from frostline.study.learning_curve import LearningCurve

__all__ = ["Proof", "ReportRun", "Runs", "read_runs"]

#: Settings that are not what a run is about: by them alone two runs are not told apart.
_ASIDE = {"policy", "seed", "output", "device", "threads"}
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Proof:
    """The proof of freezing of a run, from its record and `certificate.json`.

    Attributes:
        tensors: tensors that were held at some time.
        spans: spans in which one was held.
        sha256: digest of `certificate.json` as the record has it.
        intact: whether the file has that digest; None where the file is absent.
        complete: whether the spans cover all that plans froze, as the run itself found; None for a
            run that does not say.
        check_s: seconds spent on digests.
        holds: the spans, as `certificate.json` has them; none unless it is intact.
    """

    tensors: int
    spans: int
    sha256: str
    intact: bool | None
    complete: bool | None
    check_s: float
    holds: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ReportRun:
    """One run and the files beside its record.

    Attributes:
        name: unique among the runs read together.
        arm: the strategy it belongs to; runs of one strategy differ in their seed.
        seed: its seed.
        record: what happened.
        proof: of freezing; None for a run that is not finished.
        predictions: (index, label, predicted, probability) of each test sample, labels as class
            numbers; none where there is no such file.
        probes: `probes.json`, or None.
        diagnosis: `diagnosis.json`, or None.
    """

    name: str
    arm: str
    seed: int
    record: RunRecord
    proof: Proof | None = None
    predictions: tuple[tuple[int, int, int, float], ...] = ()
    probes: Mapping[str, Any] | None = None
    diagnosis: Mapping[str, Any] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings, with every default resolved."""
        return self.record.header["config"]

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes."""
        return [str(label) for label in self.record.header.get("labels", ())]


@dataclass(frozen=True, slots=True)
class Runs:
    """What a report is about.

    Attributes:
        runs: in the order of their arms, then seeds.
        arms: names of the strategies, in order.
        reference: the strategy that the others are compared with; "" where there is none.
        comparison: what the study says; None for runs that were not declared as one.
        diagnosis: of the study as a whole, or None.
        failures: reasons by "arm, seed n" of runs that failed.
        learning: accuracy by number of training samples on validation and on test data, for a study
            of that; none for others.
    """

    runs: tuple[ReportRun, ...]
    arms: tuple[str, ...]
    reference: str
    comparison: Comparison | None = None
    diagnosis: Mapping[str, Any] | None = None
    failures: Mapping[str, str] = field(default_factory=dict)
    learning: tuple[LearningCurve, ...] = ()

    def of(self, arm: str) -> tuple[ReportRun, ...]:
        """The runs of a strategy."""
        return tuple(run for run in self.runs if run.arm == arm)


def read_runs(paths: Iterable[str | Path]) -> Runs:
    """Read what a report is about.

    Args:
        paths: run folders, folders that hold run folders, or one study.

    Raises:
        DataError: nothing of the kind there, a study among other things, or another format.
        DamagedFile: a record or a file beside it was changed.
        MissingExtra: a study, and the extra that compares its arms is absent.
    """
    given = [Path(path) for path in paths]
    studies = [path for path in given if (path / STUDY_NAME).is_file()]
    if studies and len(given) > 1:
        raise DataError(
            "report on these folders together",
            found=f"the study {studies[0]} and something else",
            fix="report on one study at a time, or give run folders only",
        )
    if studies:
        return _read_study(studies[0])
    folders = list(dict.fromkeys(folder for path in given for folder in _run_folders(path)))
    if not folders:
        raise DataError("write a report", found="no runs", fix="give the folder of a run")
    return _loose([_read_one(folder) for folder in folders])


def _run_folders(path: Path) -> list[Path]:
    if path.is_file() and path.name == RECORD_NAME:
        return [path.parent]
    if (path / RECORD_NAME).is_file():
        return [path]
    found = sorted(record.parent for record in path.glob(f"*/{RECORD_NAME}"))
    if not found:
        raise DataError(
            f"report on {path}",
            found="neither a run nor a study there" if path.is_dir() else "no such folder",
            fix="give the folder that frostline fit or frostline compare printed",
        )
    return found


def _read_one(folder: Path) -> ReportRun:
    record = read_run(folder)
    config = record.header["config"]
    return ReportRun(
        name=folder.resolve().name,
        arm=str(config["policy"]),
        seed=int(config.get("seed", 0)),
        record=record,
        proof=_proof(record),
        predictions=_predictions(folder / "predictions.csv"),
        probes=_beside(folder / PROBES_NAME),
        diagnosis=_beside(folder / DIAGNOSIS_NAME),
    )


def _beside(path: Path) -> Mapping[str, Any] | None:
    """A JSON object in a file that may be absent."""
    if not path.is_file():
        return None
    found = _io.load_json(path, max_bytes=_MAX_BYTES)
    if not isinstance(found, dict):
        raise DamagedFile(
            f"read {path}",
            found=f"a {type(found).__name__}, no object",
            fix="remove the file to report without it",
        )
    return found


def _proof(record: RunRecord) -> Proof | None:
    said = record.certificate
    if said is None:
        return None
    file = record.path / "certificate.json"
    intact, holds = None, ()
    if file.is_file():
        raw = file.read_bytes()
        intact = hashlib.sha256(raw).hexdigest() == said["sha256"]
        holds = tuple(json.loads(raw)["holds"]) if intact else ()
    return Proof(
        tensors=int(said["tensors"]),
        spans=int(said["spans"]),
        sha256=str(said["sha256"]),
        intact=intact,
        complete=record.summary.get("certificate_ok"),
        check_s=float(said["costs"]["check_s"]),
        holds=holds,
    )


def _predictions(path: Path) -> tuple[tuple[int, int, int, float], ...]:
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        rows = [line.split(",") for line in lines[1:]]
        return tuple((int(i), int(label), int(found), float(p)) for i, label, found, p in rows)
    except ValueError as error:
        raise DamagedFile(
            f"read {path}",
            found=f"a line that is not index,label,predicted,probability: {error}",
            fix="remove the file to report without it",
        ) from error


# -- runs that were not declared as a study ----------------------------------------------------


def _loose(runs: Sequence[ReportRun]) -> Runs:
    """Runs told apart by what differs in their settings, in the order given."""
    runs = _named(runs)
    different = _differing(runs)
    runs = [replace(run, arm=_arm_name(run, different)) for run in runs]
    twice = Counter((run.arm, run.seed) for run in runs)
    runs = [
        replace(run, arm=f"{run.arm} [{run.name}]") if twice[run.arm, run.seed] > 1 else run
        for run in runs
    ]
    arms = tuple(dict.fromkeys(run.arm for run in runs))
    ordered = sorted(runs, key=lambda run: (arms.index(run.arm), run.seed))
    full = next((run.arm for run in ordered if run.config["policy"] == "full"), arms[0])
    return Runs(tuple(ordered), arms, full if len(arms) > 1 else "")


def _named(runs: Sequence[ReportRun]) -> list[ReportRun]:
    """The runs, each with a name of its own: that of its folder, with the folder above if need be.

    Folders may be called alike, as ``a/seed-0`` and ``b/seed-0``.
    """
    count = Counter(run.name for run in runs)
    paths = {id(run): run.record.path.resolve() for run in runs}
    longer = [
        run.name if count[run.name] == 1 else f"{paths[id(run)].parent.name}/{run.name}"
        for run in runs
    ]
    again = Counter(longer)
    return [
        replace(run, name=name if again[name] == 1 else str(paths[id(run)]))
        for run, name in zip(runs, longer, strict=True)
    ]


def _differing(runs: Sequence[ReportRun]) -> list[str]:
    """Settings, besides the obvious ones, in which some of the runs differ."""
    asked = [run.record.header.get("asked", {}) for run in runs]
    names = sorted({name for settings in asked for name in settings} - _ASIDE)
    return [n for n in names if len({json.dumps(s.get(n), sort_keys=True) for s in asked}) > 1]


def _arm_name(run: ReportRun, different: Sequence[str]) -> str:
    asked = run.record.header.get("asked", {})
    shown = ", ".join(f"{name}={asked.get(name)}" for name in different)
    return f"{run.arm} ({shown})" if shown else run.arm


# -- studies -----------------------------------------------------------------------------------


def _read_study(path: Path) -> Runs:
    # scipy is only paid for where arms are compared.
    from frostline.tasks.imports import need  # noqa: PLC0415

    need("scipy", extra="study")
    from frostline.study.analysis import analyse  # noqa: PLC0415
    from frostline.study.folder import StudyFolder, TrialKey  # noqa: PLC0415

    comparison, folder = analyse(path), StudyFolder(path)
    runs, failures = [], {}
    for found in comparison.arms:
        name = found.arm.name
        for seed in found.runs:
            run = _read_one(folder.run(TrialKey(name, seed)))
            runs.append(replace(run, name=f"{name}, seed {seed}", arm=name, seed=seed))
        failures |= {f"{name}, seed {seed}": why for seed, why in found.failures.items()}
    if not runs:
        raise DataError(
            f"report on the study {path}",
            found="no finished run",
            fix="go on with the study: the same frostline compare command",
        )
    return Runs(
        runs=tuple(runs),
        arms=tuple(dict.fromkeys(run.arm for run in runs)),
        reference=comparison.spec.reference,
        comparison=comparison,
        diagnosis=_beside(path / DIAGNOSIS_NAME),
        failures=failures,
        learning=_curves(path) if comparison.spec.is_curve else (),
    )


def _curves(path: Path) -> tuple[LearningCurve, ...]:
    from frostline.study.learning_curve import read_curve  # noqa: PLC0415  scipy is in it

    return read_curve(path), read_curve(path, metric="test")
