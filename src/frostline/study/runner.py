"""Runs of a study, one after the other: in turns, each resumable, each in a process of its own.

A study lives in a folder: ``study.json`` declares it, ``runs/ARM/seed-N`` are run folders as `fit`
makes them. What is done is known from those folders alone, so a study that was killed anywhere
goes on with the same call, and one that is finished can be extended by arms or seeds.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import filelock

from frostline import _io, errors
from frostline.cost import backward_share
from frostline.errors import ConfigError, FrostlineError, StorageError, TrainingError
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.policies.common import backbone, freeze_first
from frostline.records import RunRecord, read_run
from frostline.study.charges import read_charges
from frostline.study.folder import StudyFolder, TrialKey, run_order
from frostline.study.spec import Arm, StudySpec

__all__ = [
    "OnEvent",
    "note_failure",
    "open_study",
    "run_once",
    "run_settings",
    "run_study",
    "settle",
]

_log = logging.getLogger("frostline")
#: Receives progress of the runs, each event with "arm", "seed", "place" and "of" besides.
OnEvent = Callable[[dict[str, Any]], None]


@contextmanager
def open_study(
    path: Path, spec: StudySpec, *, same_reference: bool = False
) -> Iterator[tuple[StudyFolder, StudySpec]]:
    """A study's folder, locked, and the study to run there: this one, or the one it extends.

    A declaration that no run has followed yet, as when the data could not be read, is replaced.

    Args:
        path: the folder; made if absent.
        spec: as declared now.
        same_reference: whether a study that is there must have the same reference.

    Raises:
        ConfigError: the folder holds a study that differs in more than arms and seeds, or other
            files.
        StorageError: another process runs it.
    """
    folder = StudyFolder(path)
    _io.make_folder(path)
    lock = filelock.FileLock(folder.lock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StorageError(
            f"run the study in {path}",
            found="another process that runs it",
            fix="wait for it, or choose another output folder",
        ) from None
    with lock:
        if folder.declaration.is_file() and folder.begun:
            there = folder.spec()
            begun = any(folder.done(key) for key in run_order(there))
            spec = there.extended(spec, same_reference=same_reference, begun=begun)
        elif not folder.declaration.is_file() and (strange := _strange(folder)):
            raise ConfigError(
                f"run a study in {path}",
                found=f"files of something else there: {', '.join(strange[:3])}",
                fix="choose a new or empty folder",
            )
        _io.atomic_write_json(folder.declaration, spec.to_json())
        yield folder, spec


def _strange(folder: StudyFolder) -> list[str]:
    """Names of what else lies where a study is to be."""
    return sorted({path.name for path in folder.path.iterdir()} - {folder.lock.name})


def run_study(
    folder: StudyFolder,
    spec: StudySpec,
    *,
    isolate: bool = True,
    on_event: OnEvent | None = None,
) -> StudySpec:
    """Do every run of a study that is not done; the study with its controls settled.

    Args:
        folder: of the study, held by this process.
        spec: the study.
        isolate: give every run a process of its own: then no run's memory counts for another. A
            process takes some seconds to start, which no run is charged for.
        on_event: receives progress.

    Raises:
        KeyboardInterrupt: Ctrl-C; the run in progress was saved.
        FrostlineError: what hits every run alike (data, model, settings, disk). A run that fails
            by itself, as one that diverges, is noted, and the study goes on.
    """
    order = run_order(spec)
    for place, key in enumerate(order):
        if folder.finished(key):
            continue
        arm = spec[key.arm]
        if not arm.settled:
            parent = TrialKey(arm.of, spec.seeds[0])
            if folder.failure(parent).is_file():
                note_failure(folder, key, f"the run it depends on failed: {parent.arm}")
                continue
            charged = read_charges(folder, spec).get(parent, 0.0)
            arm = settle(arm, read_run(folder.run(parent)), charged_s=charged)
            spec = spec.settle(arm)
            _io.atomic_write_json(folder.declaration, spec.to_json())

        def tell(event: dict[str, Any], key: TrialKey = key, place: int = place) -> None:
            if on_event is not None:
                on_event(event | {"arm": key.arm, "seed": key.seed, "place": place + 1}
                         | {"of": len(order)})  # fmt: skip

        settings = run_settings(spec, arm, key.seed, folder.run(key))
        try:
            run_once(settings, tell, isolate=isolate)
        except TrainingError as error:
            _log.warning("%s, seed %d: %s", key.arm, key.seed, error)
            note_failure(folder, key, str(error))
    return spec


def run_settings(spec: StudySpec, arm: Arm, seed: int, output: Path) -> dict[str, Any]:
    """The settings of a run, as `fit` takes them."""
    own = {"policy": arm.policy, "seed": seed, "output": str(output)}
    return {**spec.settings, **arm.settings, **own}


# -- controls ------------------------------------------------------------------------------------


def settle(arm: Arm, parent: RunRecord, *, charged_s: float = 0.0) -> Arm:
    """A control, once its arm's first run is there to say what it costs.

    Args:
        arm: the control.
        parent: the record of that run, finished.
        charged_s: seconds that others spent on what it found stored; they count as its own.
    """
    if arm.control == "time":
        budget = f"{parent.summary['training_s'] + charged_s:.3f}s"
        # Patience would end it before its time.
        settings = {**arm.settings, "budget": budget, "patience": None}
        return replace(arm, policy="full", settings=settings)
    groups = _groups_of(parent)
    wanted = float(parent.summary["backward_share"])
    shares = {
        count: backward_share(groups, freeze_first(groups, count))
        for count in range(len(backbone(groups)) + 1)
    }
    count = min(shares, key=lambda count: (abs(shares[count] - wanted), count))
    return replace(arm, policy=f"first:groups={count}" if count else "full")


def _groups_of(record: RunRecord) -> LayerGroups:
    """The layer groups of a run, as far as its record tells them: names, sizes, costs."""
    costs: Mapping[str, Mapping[str, Any]] = record.header["costs"]["groups"]
    sizes: Mapping[str, int] = record.header["groups"]
    items = tuple(
        LayerGroup(
            name,
            depth,
            (TensorInfo(f"{name}.*", (size,)),) if size else (),
            cost=GroupCost(**costs[name]),
        )
        for depth, (name, size) in enumerate(sizes.items())
    )
    return LayerGroups(items, head=frozenset(record.header["head"]))


def run_once(
    settings: Mapping[str, Any], tell: Callable[[dict[str, Any]], None], *, isolate: bool
) -> None:
    """One run, in a process of its own or in this one.

    Args:
        settings: as `fit` takes them; ``pause_after`` may be among them.
        tell: receives progress.
        isolate: whether in a process of its own.

    Raises:
        FrostlineError: what the run raised.
        KeyboardInterrupt: Ctrl-C; the run has saved itself.
    """
    if isolate:
        _run_apart(settings, tell)
    else:
        # The process that only starts others does without the framework's memory.
        from frostline.tasks.run import fit  # noqa: PLC0415

        fit(**settings, on_event=tell)


# -- processes -----------------------------------------------------------------------------------


def _run_apart(settings: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """One run in a process of its own, which says what happens line by line.

    Raises:
        FrostlineError: what the run raised.
        KeyboardInterrupt: Ctrl-C reached both processes, and the run has saved itself.
    """
    paths = os.pathsep.join(["" if p == os.curdir else p for p in sys.path])
    child = subprocess.Popen(
        [sys.executable, "-m", "frostline.study.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
        text=True,
        encoding="utf-8",
    )
    given, said = cast("IO[str]", child.stdin), cast("IO[str]", child.stdout)
    ended: dict[str, Any] = {}
    with child:
        try:
            with suppress(BrokenPipeError), given:
                json.dump(dict(settings), given)
            for line in said:
                event = json.loads(line)
                if event["kind"] in ("done", "failed"):
                    ended = event
                else:
                    tell(event)
        except KeyboardInterrupt:
            child.wait()  # it got the same signal, and saves itself
            raise
    code = child.wait()
    if ended.get("kind") == "failed":
        raise _raised(ended)
    if code == 130:
        raise KeyboardInterrupt
    if code or ended.get("kind") != "done":
        raise StorageError(
            f"run {settings['output']}",
            found=f"its process ended with code {code}",
            fix="look at log.txt in that folder; the same command goes on from there "
            "(code -9: the machine ran out of memory)",
        )


def _raised(event: Mapping[str, Any]) -> FrostlineError:
    """The error that a child reported, of its own kind."""
    kind = getattr(errors, event["error"], FrostlineError)
    return kind(event["asked"], found=event["found"], fix=event["fix"])


def note_failure(folder: StudyFolder, key: TrialKey, why: str) -> None:
    """Write down why a run could not be finished."""
    _io.make_folder(folder.failure(key).parent)
    _io.atomic_write_json(folder.failure(key), {"why": why})
