"""A diagnosis in one call: what there is to go on is gathered, and every rule asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from frostline import _io
from frostline.errors import UsageError, few
from frostline.records import DIAGNOSIS_NAME, PROBES_NAME, RunRecord, read_run
from frostline.study.diagnosis.case import Case, references_of
from frostline.study.diagnosis.findings import Diagnosis
from frostline.study.diagnosis.rules import RULES, nothing_wrong, with_missing
from frostline.study.run_facts import RunFacts, differing_settings, read_facts
from frostline.tasks.run import Run

if TYPE_CHECKING:
    from frostline.study.diagnosis.probing import ProbeCurve
    from frostline.study.learning_curve import LearningCurve

__all__ = ["diagnose", "save_diagnosis"]

Runs = Run | RunRecord | str | Path | Sequence[Run | RunRecord | str | Path]


def diagnose(
    run_or_runs: Runs,
    *,
    reference: Runs | None = None,
    probe: ProbeCurve | None = None,
    curve: LearningCurve | None = None,
) -> Diagnosis:
    """Find what limits a run, from its record and whatever was measured besides.

    The record alone tells least. Most telling are other runs on the same data that differ in one
    respect (policy, learning rate or length), a probe of the pretrained network, and a learning
    curve that has the policy in it. A diagnosis without them says what they would settle.

    Args:
        run_or_runs: one run, or several of the same settings with other seeds; a folder, a `Run` or
            a record. It need not be finished.
        reference: runs to hold it against, of any strategies: a short full fine-tuning, say. They
            may differ from it in the policy (and be shorter), in the learning rates, or in
            length; others are left aside with a note.
        probe: of the pretrained network on this data, from `probe_run` of `.probing`.
        curve: from `frostline.study.learning_curve.learning_curve`, on this data.

    Raises:
        DataError: no record there, or runs without an epoch and without a reason for it.
        UsageError: runs of several strategies, or a probe or reference of another task.
        DamagedFile: a record cannot be read.

    Example:
        ::

            found = diagnose("runs/resnet18-linear-probe-001", reference="runs/resnet18-full-001")
            print(found.sentence())
    """
    facts = tuple(read_facts(record) for record in _records(run_or_runs))
    if not facts:
        raise UsageError("diagnose a run", found="no run", fix="one at least")
    _check_one_strategy(facts)
    notes: list[str] = []
    references = references_of(facts, () if reference is None else _records(reference), notes)
    _check_probe(facts[0], probe)
    case = Case(facts, references, probe, curve, tuple(notes))
    found = [f for rule in RULES if (f := rule(case)) is not None]
    found = sorted((with_missing(f, case) for f in found), key=lambda f: -f.weight)
    made = tuple(f for f in found if f.made)
    rest = tuple(f for f in found if not f.made)
    return Diagnosis(
        runs=tuple(str(f.path) for f in facts),
        policy=facts[0].config.policy,
        val_accuracy=case.accuracy if case.accuracies else None,
        findings=made or (nothing_wrong(case, rest),),
        considered=rest,
        notes=case.notes,
    )


def save_diagnosis(found: Diagnosis, *, probe: ProbeCurve | None = None) -> tuple[Path, ...]:
    """Keep a diagnosis as ``diagnosis.json`` beside the record of each of its runs.

    What was there before is replaced. Nothing of the run itself is touched.

    Args:
        found: the diagnosis.
        probe: to be kept, too, as ``probes.json`` beside the record of the first run.

    Returns:
        The files written.

    Raises:
        StorageError: a file cannot be written; what was there before is intact.
    """
    values = {Path(run) / DIAGNOSIS_NAME: found.to_json() for run in found.runs}
    if probe is not None:
        values[Path(found.runs[0]) / PROBES_NAME] = probe.to_json()
    for path, value in values.items():
        _io.atomic_write_json(path, value)
    return tuple(values)


def _records(runs: Runs) -> tuple[RunRecord, ...]:
    given = [runs] if isinstance(runs, Run | RunRecord | str | Path) else list(runs)
    records = []
    for run in given:
        place = run.path if isinstance(run, Run) else run
        records.append(place if isinstance(place, RunRecord) else read_run(place))
    return tuple(records)


def _check_one_strategy(facts: Sequence[RunFacts]) -> None:
    for other in facts[1:]:
        if differing := sorted(differing_settings(facts[0], other)):
            raise UsageError(
                "diagnose runs together",
                found=f"runs of several strategies: {few(differing)} differ in {other.path}",
                fix="runs that differ in their seeds alone; others may be a reference",
            )


def _check_probe(facts: RunFacts, probe: ProbeCurve | None) -> None:
    if probe is not None and probe.classes != facts.classes:
        raise UsageError(
            "diagnose a run by a probe",
            found=f"a probe of {probe.classes} classes and a run of {facts.classes}",
            fix="a probe of the same network on the same data",
        )
