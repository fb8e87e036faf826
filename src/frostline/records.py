"""The record of a run: what was decided, what came out and what it cost, line by line.

``record.jsonl`` starts with a header, goes on with one line per decision and per epoch, and ends
with the proof of freezing and the summary. Everything that depends on the clock or the machine
is under the key ``costs`` of its line, so two runs of one configuration on one machine have
records that are equal without it.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frostline._io import JsonLines, atomic_write_bytes, canonical_json, read_lines
from frostline._version import __version__
from frostline.driver import Certificate
from frostline.errors import DamagedFile, DataError
from frostline.policy import Decision

__all__ = [
    "COLUMNS",
    "DIAGNOSIS_NAME",
    "PROBES_NAME",
    "RECORD_NAME",
    "Row",
    "RunRecord",
    "RunRecorder",
    "comparison_table",
    "read_run",
    "without_costs",
    "write_certificate",
]

RECORD_NAME = "record.jsonl"
#: The declaration of a study, in the folder that holds its runs.
STUDY_NAME = "study.json"
#: What may lie beside it: probes of the layer groups, and a diagnosis.
PROBES_NAME = "probes.json"
DIAGNOSIS_NAME = "diagnosis.json"
_FORMAT = 1


@dataclass(slots=True)
class RunRecorder:
    """Writes the record of one run; the only writer of its file.

    Args:
        path: the file ``record.jsonl``.
        keep: go on after this many lines, dropping later ones; None keeps all.

    Raises:
        StorageError: the file cannot be written.
        DamagedFile: it holds fewer whole lines than `keep`.
    """

    path: Path
    keep: int | None = None
    _lines: JsonLines = field(init=False)

    def __post_init__(self) -> None:
        self._lines = JsonLines(self.path, keep=self.keep)

    @property
    def count(self) -> int:
        """Lines written so far: what a checkpoint notes and resume goes on after."""
        return self._lines.count

    def header(self, about: Mapping[str, Any], *, costs: Mapping[str, Any]) -> None:
        """First line: configuration, data, model and what the record was written by.

        Args:
            about: plain JSON.
            costs: what depends on the machine: measured costs, library versions, device.
        """
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        first = {"kind": "header", "format": _FORMAT, "frostline": __version__}
        self._lines.append(first | dict(about) | {"costs": machine | dict(costs)})
        self._lines.sync()

    def first_look(self, found: Mapping[str, Any], *, costs: Mapping[str, Any]) -> None:
        """What was found on the data before the first decision.

        Args:
            found: plain JSON, free of the clock.
            costs: what depends on it.
        """
        self._lines.append({"kind": "first_look"} | dict(found) | {"costs": dict(costs)})
        self._lines.sync()

    def decision(self, decision: Decision) -> None:
        """A change of plan, durable at once."""
        self._lines.append({"kind": "decision"} | decision.to_json())
        self._lines.sync()

    def epoch(
        self, epoch: int, step: int, metrics: Mapping[str, float], *, costs: Mapping[str, Any]
    ) -> None:
        """The end of an epoch.

        Args:
            epoch: epochs complete, from 1.
            step: updates complete.
            metrics: by name.
            costs: what depends on the machine, e.g. seconds.
        """
        line = {"kind": "epoch", "epoch": epoch, "step": step, "metrics": dict(metrics)}
        self._lines.append(line | {"costs": dict(costs)})

    def certificate(self, certificate: Certificate, *, sha256: str) -> None:
        """The proof of freezing in short.

        Args:
            certificate: the proof.
            sha256: digest of the file that holds it in full.
        """
        self._lines.append(
            {
                "kind": "certificate",
                "tensors": len({hold.tensor for hold in certificate.holds}),
                "spans": len(certificate.holds),
                "sha256": sha256,
                "costs": {"check_s": certificate.check_s},
            }
        )

    def end(self, results: Mapping[str, Any], *, costs: Mapping[str, Any]) -> None:
        """Last line: the summary, durable at once."""
        self._lines.append({"kind": "end", "results": dict(results), "costs": dict(costs)})
        self._lines.sync()

    def sync(self) -> None:
        """Make all lines so far durable."""
        self._lines.sync()

    def close(self) -> None:
        """Close the file; harmless when closed."""
        self._lines.close()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its record tells it.

    Attributes:
        path: the run's folder.
        header: configuration, data, model, versions; its layer groups from shallow to deep.
        epochs: one mapping per epoch: epoch, step, metrics, costs.
        decisions: every change of plan.
        certificate: the proof of freezing in short, or None before the end.
        summary: results and costs of a finished run, else empty.
        torn: whether the last line was cut off in the middle (the run was killed).
        first_look: what was found on the data before training; empty where nothing was looked at.
    """

    path: Path
    header: Mapping[str, Any]
    epochs: tuple[Mapping[str, Any], ...]
    decisions: tuple[Decision, ...]
    certificate: Mapping[str, Any] | None
    summary: Mapping[str, Any]
    torn: bool
    first_look: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)


def read_run(path: str | Path) -> RunRecord:
    """Read the record of a run, finished or not.

    Args:
        path: the run's folder or its ``record.jsonl``.

    Raises:
        DataError: no record there, or of a format this version does not read.
        DamagedFile: a line was changed, lost or moved.
    """
    path = Path(path)
    file = path / RECORD_NAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"read the run {path}", found=f"no {RECORD_NAME}", fix="give the folder of a run"
        )
    lines = read_lines(file)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for record in lines.records:
        kinds.setdefault(record["kind"], []).append(record)
    header = _header(file, kinds.get("header", []))
    end = kinds.get("end", [])
    return RunRecord(
        path=file.parent,
        header=header,
        epochs=tuple(kinds.get("epoch", ())),
        decisions=tuple(Decision.from_json(d) for d in kinds.get("decision", ())),
        certificate=next(iter(kinds.get("certificate", ())), None),
        summary=end[-1]["results"] | end[-1]["costs"] if end else {},
        torn=bool(lines.tail),
        first_look=next(iter(kinds.get("first_look", ())), {}),
    )


def _header(file: Path, headers: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(headers) != 1:
        raise DamagedFile(
            f"read {file}", found=f"{len(headers)} headers", fix="start the run afresh"
        )
    if headers[0]["format"] != _FORMAT:
        raise DataError(
            f"read {file}",
            found=f"a record of format {headers[0]['format']!r}",
            fix=f"use the version that wrote it; this one reads format {_FORMAT}",
        )
    return _by_depth(headers[0])


def _by_depth(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """The header with its layer groups from shallow to deep.

    Lines are written with sorted keys, so the order is a list of its own. Records older than that
    list get the natural order of names, in which 10 follows 9, with the head last.

    Example:
        >>> found = _by_depth({"groups": {"a.10": 1, "a.9": 2, "b": 3, "top": 4}, "head": ["b"]})
        >>> list(found["groups"])
        ['a.9', 'a.10', 'top', 'b']
        >>> list(_by_depth({"groups": {"a": 1, "b": 2}, "depths": ["b", "a"]})["groups"])
        ['b', 'a']
    """
    if "groups" not in header:
        return header
    head = header.get("head", ())
    names = header.get("depths") or sorted(
        header["groups"], key=lambda name: (name in head, _natural(name))
    )
    costs = header.get("costs", {})
    measured = costs.get("groups", {})
    ordered = {name: measured[name] for name in names if name in measured}
    return {
        **header,
        "groups": {name: header["groups"][name] for name in names},
        "costs": {**costs, "groups": ordered} if "groups" in costs else costs,
    }


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key by which numbers in names are compared as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def write_certificate(path: Path, certificate: Certificate) -> str:
    """Write the proof of freezing in full, whole or not at all; the SHA-256 of the file.

    Args:
        path: of the file, `certificate.json` in the folder of a run.
        certificate: the proof.

    Raises:
        StorageError: it cannot be written.
    """
    text = canonical_json({"format": 1, "holds": certificate.to_json()}) + b"\n"
    atomic_write_bytes(path, text)
    return hashlib.sha256(text).hexdigest()


def without_costs(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line without what depends on the clock or the machine: what two equal runs share.

    Example:
        >>> without_costs({"kind": "epoch", "step": 3, "costs": {"wall_s": 1.2}})
        {'kind': 'epoch', 'step': 3}
    """
    return {key: value for key, value in record.items() if key != "costs"}


@dataclass(frozen=True, slots=True)
class Row:
    """One run in a table of runs; a figure the record does not have is None.

    Attributes:
        run: name of the run's folder.
        policy: its policy.
        val_accuracy: of the best epoch, in [0, 1].
        test_accuracy: of the same weights, in [0, 1].
        wall_s: seconds of the whole run, everything charged.
        peak_memory_bytes: largest memory in use.
        trained_parameter_share: parameters that trained, mean over steps, in [0, 1].
        backward_share: backward work done, mean over steps, in [0, 1].
    """

    run: str
    policy: str
    val_accuracy: float | None
    test_accuracy: float | None
    wall_s: float | None
    peak_memory_bytes: int | None
    trained_parameter_share: float | None
    backward_share: float | None


#: Heading of each field of a `Row`, in order.
COLUMNS: Mapping[str, str] = {
    "run": "run",
    "policy": "policy",
    "val_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "wall_s": "wall time (s)",
    "peak_memory_bytes": "peak memory (bytes)",
    "trained_parameter_share": "parameters trained",
    "backward_share": "backward work done",
}


def comparison_table(runs: Iterable[str | Path | RunRecord]) -> list[Row]:
    """Runs side by side, in the order given.

    Args:
        runs: run folders or records.
    """
    records = [run if isinstance(run, RunRecord) else read_run(run) for run in runs]
    return [
        Row(
            run=record.path.name,
            policy=record.header["config"]["policy"],
            **{name: record.summary.get(name) for name in list(COLUMNS)[2:]},
        )
        for record in records
    ]
