"""`frostline diagnose`: what limits a run, with the evidence, and what to do next."""

# ruff: noqa: PLC0415  a command is imported to show its help; what reads records is not

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from frostline.cli.terminal import console, escape, print_json
from frostline.errors import UsageError
from frostline.records import PROBES_NAME, RECORD_NAME
from frostline.text import percent_text

if TYPE_CHECKING:
    from frostline.study.diagnosis import Diagnosis, Evidence, Finding
    from frostline.study.diagnosis.probing import ProbeCurve

__all__ = ["diagnose"]

_List = Parameter(consume_multiple=True, negative="")


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
        bool,
        Parameter(
            negative="",
            help="Probe the pretrained network first, layer by layer: about an epoch of forward "
            "passes. Runs under auto have been.",
        ),
    ] = False,
    probe_file: Annotated[
        Path | None, Parameter(help="Read the probe from this file instead (probes.json).")
    ] = None,
    curve: Annotated[
        Path | None, Parameter(help="Folder of a study that drew a learning curve.")
    ] = None,
    considered: Annotated[
        bool, Parameter(negative="", help="Show also what was considered and not found.")
    ] = False,
    save: Annotated[
        bool,
        Parameter(
            negative="",
            help="Keep it as diagnosis.json beside each run's record, and a new probe as "
            "probes.json beside the first.",
        ),
    ] = False,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
) -> None:
    """Say what limits a run: findings with their evidence, what is missing, and what to do next."""
    if not runs:
        raise UsageError("diagnose a run", found="no run", fix="frostline diagnose RUN")
    if probe and probe_file is not None:
        raise UsageError(
            "probe the network", found="--probe and --probe-file", fix="one of the two"
        )
    from frostline.study.diagnosis import diagnose as diagnose_runs
    from frostline.study.diagnosis import save_diagnosis
    from frostline.study.learning_curve import read_curve

    folders = _expanded(runs)
    own = folders[0] / PROBES_NAME  # a run under auto has one
    file = own if probe_file is None and not probe and own.is_file() else probe_file
    probed = _probed(folders[0], file) if probe or file is not None else None
    found = diagnose_runs(
        folders,
        reference=_expanded(reference or ()),
        probe=probed,
        curve=None if curve is None else read_curve(curve),
    )
    kept = save_diagnosis(found, probe=probed if probe else None) if save else ()
    if json:
        print_json(found.to_json())
        return
    _print(found, considered=considered)
    for path in kept:
        _say(f"kept: {path}")


def _expanded(folders: Sequence[Path]) -> list[Path]:
    """Run folders; a folder of a study's policy stands for the runs of its seeds."""
    found: list[Path] = []
    for folder in folders:
        seeds = sorted(record.parent for record in folder.glob(f"seed-*/{RECORD_NAME}"))
        found += seeds if seeds and not (folder / RECORD_NAME).exists() else [folder]
    return found


def _probed(run: Path, file: Path | None) -> ProbeCurve:
    """The probe in a file, or else of this run's network, which takes a while."""
    from frostline.study.diagnosis.probing import probe_run, read_probe

    if file is not None:
        return read_probe(file)
    text = f"probing the pretrained network of {run}, layer by layer"
    console(sys.stderr).print(escape(text), soft_wrap=True)
    return probe_run(run)


def _print(found: Diagnosis, *, considered: bool) -> None:
    count = len(found.runs)
    runs = "".join(found.runs) if count == 1 else f"{count} runs"
    accuracy = "" if found.val_accuracy is None else f", {percent_text(found.val_accuracy)} right"
    _say(f"{runs}: {found.policy}{accuracy} on validation data")
    for finding in found.findings:
        _say("")
        _show(finding)
        if finding.action is not None and finding.action.settings:
            _say(f"  to try it          {_command(found.runs[0], finding.action.settings)}")
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


def _command(run: str, settings: Mapping[str, Any]) -> str:
    """What runs the same with other settings.

    Example:
        >>> _command("runs/a", {"policy": "first:groups=2", "patience": None, "live_norm": False})
        'frostline fit --config runs/a/config.yaml --policy first:groups=2 --patience null --no-live-norm --output NEW'
    """  # noqa: E501
    flags: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", "null" if value is None else str(value)]
    config = str(Path(run) / "config.yaml")
    return shlex.join(["frostline", "fit", "--config", config, *flags, "--output", "NEW"])


def _side(evidence: Evidence, finding: Finding) -> str:
    return "seen" if finding.kind == "nothing wrong" else evidence.strength


def _say(text: str) -> None:
    console(sys.stdout).print(escape(text), soft_wrap=True)
