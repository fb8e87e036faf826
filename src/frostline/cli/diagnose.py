"""`frostline diagnose`: what limits a run, with the evidence, and what to do next."""

# ruff: noqa: PLC0415  a command is imported to show its help; what reads records is not

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from frostline.cli.terminal import console, escape, print_json
from frostline.errors import DataError, UsageError

if TYPE_CHECKING:
    from frostline.study.diagnosis import Diagnosis, Evidence, Finding

__all__ = ["diagnose"]

_List = Parameter(consume_multiple=True, negative="")
_RECORD = "record.jsonl"


def diagnose(
    *runs: Annotated[
        Path,
        Parameter(help="Folders of runs of one strategy; or of a study's policy, with its seeds."),
    ],
    reference: Annotated[
        list[Path] | None,
        Parameter(
            help="Folders of runs to hold it against: another policy, learning rate or length.",
            negative="",
        ),
        _List,
    ] = None,
    probe: Annotated[
        Path | None, Parameter(help="File of a probe of the pretrained network (JSON).")
    ] = None,
    curve: Annotated[
        Path | None, Parameter(help="Folder of a study that drew a learning curve.")
    ] = None,
    considered: Annotated[
        bool, Parameter(negative="", help="Show also what was considered and not found.")
    ] = False,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """Say what limits a run: findings with their evidence, what is missing, and what to do next."""
    from frostline.study.diagnosis import diagnose as diagnose_runs
    from frostline.study.learning_curve import read_curve

    if not runs:
        raise UsageError("diagnose a run", found="no run", fix="frostline diagnose RUN")
    found = diagnose_runs(
        _expanded(runs),
        reference=_expanded(reference or ()),
        probe=None if probe is None else _probe(probe),
        curve=None if curve is None else read_curve(curve),
    )
    if json:
        print_json(found.to_json())
        return
    _print(found, considered=considered)


def _expanded(folders: Sequence[Path]) -> list[Path]:
    """Run folders; a folder of a study's policy stands for the runs of its seeds."""
    found: list[Path] = []
    for folder in folders:
        seeds = sorted(record.parent for record in folder.glob(f"seed-*/{_RECORD}"))
        found += seeds if seeds and not (folder / _RECORD).exists() else [folder]
    return found


def _probe(path: Path) -> Any:
    """A probe curve from its file.

    Raises:
        DataError: no such file, or not one of these.
    """
    from frostline import _io
    from frostline.study.probes import ProbeCurve

    if not path.is_file():
        raise DataError(
            f"read the probe {path}", found="no such file", fix="a file of ProbeCurve.to_json"
        )
    return ProbeCurve.from_json(_io.load_json(path))


def _print(found: Diagnosis, *, considered: bool) -> None:
    count = len(found.runs)
    runs = "".join(found.runs) if count == 1 else f"{count} runs"
    accuracy = "" if found.val_accuracy is None else f", {100 * found.val_accuracy:.1f} % right"
    _say(f"{runs}: {found.policy}{accuracy} on validation data")
    for finding in found.findings:
        _say("")
        _show(finding)
    for finding in found.considered if considered else ():
        _say("")
        _show(finding)
    for note in found.notes:
        _say(f"note: {note}")


def _show(finding: Finding) -> None:
    kind = finding.kind[0].upper() + finding.kind[1:]
    if finding.kind == "nothing wrong":
        _say("Nothing wrong is shown")
    elif finding.made:
        _say(f"{kind} ({finding.strength} evidence)")
    else:
        _say(f"{kind}: not found")
    for evidence in finding.evidence:
        _say(f"  {_side(evidence, finding):<18} {evidence.says} [{evidence.source}]")
    if finding.missing:
        _say(f"  missing            {'; '.join(finding.missing)}")
    if finding.made and finding.action is not None and finding.gain is not None:
        _say(f"  next               {finding.action.text}")
        _say(f"  expected           {finding.gain.sentence()}")


def _side(evidence: Evidence, finding: Finding) -> str:
    return "seen" if finding.kind == "nothing wrong" else evidence.strength


def _say(text: str) -> None:
    console(sys.stdout).print(escape(text), soft_wrap=True)
