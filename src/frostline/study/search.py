"""Wide sweeps: many policies, most of them stopped early, by successive halving.

Each policy is a trial of an Optuna study that lives in the sweep's folder as SQLite, or wherever
the caller keeps Optuna studies. Halving over epochs pauses a run at each rung, and one that is
stopped can be gone on with. Halving over data trains anew at each rung, whole runs on more and more
samples: it does not mistake a slow start for a bad end, but says of few samples what may not hold
for many. What comes out ranks policies by one seed; which of the best is better is for `compare` to
say.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
from optuna.trial import TrialState

from frostline.errors import ConfigError, TrainingError
from frostline.records import RECORD_NAME, read_run
from frostline.study.compare import declare
from frostline.study.folder import StudyFolder, TrialKey
from frostline.study.runner import (
    OnEvent,
    note_failure,
    open_study,
    run_once,
    run_settings,
)
from frostline.study.spec import StudySpec
from frostline.tasks.config import RunConfig
from frostline.tasks.data import read_data

__all__ = ["Over", "Sweep", "SweepRow", "rungs", "sweep"]

_log = logging.getLogger("frostline")
_ARM = "arm"
_WHY = "why"
#: What the rungs of a sweep are made of.
Over = Literal["epochs", "data"]
_FIRST_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A policy of a sweep.

    Attributes:
        arm: its name.
        policy: its short form.
        state: "finished", "stopped" (others were better at its last rung) or "failed".
        epochs: that it ran, at its last rung where each rung is a run of its own.
        samples: training samples of its last rung.
        val_accuracy: the best of that run so far, in [0, 1]; None if it failed before the first
            evaluation.
        training_s: seconds of training, over all rungs.
        work: samples it was trained on, over all epochs and rungs.
    """

    arm: str
    policy: str
    state: str
    epochs: int
    samples: int
    val_accuracy: float | None
    training_s: float
    work: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found.

    Attributes:
        path: its folder.
        rows: the policies, the best first: those that ran longest before those stopped earlier.
        epochs: of a whole run.
        samples: training samples of a whole run.
    """

    path: Path
    rows: tuple[SweepRow, ...]
    epochs: int
    samples: int

    @property
    def sentence(self) -> str:
        """What to do next, with numbers."""
        best = self.rows[0]
        if best.val_accuracy is None:
            return "no policy could be trained"
        share = sum(row.work for row in self.rows) / self.samples
        share /= self.epochs * len(self.rows)
        others = [row.policy for row in self.rows[1:3] if row.val_accuracy is not None]
        next_ = f"; compare it with {' and '.join(others)} over several seeds" if others else ""
        return (
            f"{best.policy} was best with one seed: {100 * best.val_accuracy:.1f} % on validation "
            f"data; training took {share:.0%} of the updates of whole runs of all{next_}"
        )


def rungs(whole: int, *, first: int = 1, factor: int = 3) -> tuple[int, ...]:
    """Epochs (or samples) after which policies are stopped, and those of a whole run.

    Args:
        whole: epochs or samples of a whole run, >= 1.
        first: what each policy gets, >= 1.
        factor: of those that reach a rung, one in so many goes on; >= 2.

    Raises:
        ConfigError: a number is too small.

    Example:
        >>> rungs(10), rungs(10, first=2, factor=2), rungs(1)
        ((1, 3, 9, 10), (2, 4, 8, 10), (1,))
    """
    if whole < 1 or first < 1 or factor < 2:
        raise ConfigError(
            f"halve with first={first}, factor={factor} of {whole} in all",
            found="a number that is too small",
            fix="first=1 and factor=2 or more",
        )
    found, rung = [], first
    while rung < whole:
        found.append(rung)
        rung *= factor
    return (*found, whole)


def sweep(  # noqa: PLR0913 - all by name, all with defaults
    model: str,
    data: str | Path,
    policies: Sequence[str] | Mapping[str, Any],
    *,
    output: str | Path,
    over: Over = "epochs",
    first: int | None = None,
    factor: int = 3,
    seed: int = 0,
    storage: str | optuna.storages.BaseStorage | None = None,
    isolate: bool = True,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> Sweep:
    """Try many policies on one seed, and stop early those that others leave behind.

    Asynchronous successive halving: a policy goes on past a rung if it is in the best 1/factor of
    those that have reached it so far. The first to come are hardly stopped, so policies that are
    cheap belong first. The same call goes on where it was; with more policies it tries those, too.

    Args:
        model: what to fine-tune, as `fit` takes it.
        data: what to learn from.
        policies: as `compare` takes them.
        output: the sweep's folder.
        over: what rungs are made of: "epochs" of one run, or "data": runs on nested parts of the
            training samples (`train_samples`), the classes in their proportions.
        first: epochs or samples that each policy gets, >= 1; by default 1 epoch or 100 samples.
        factor: of those that reach a rung, one in so many goes on; >= 2.
        seed: of all runs.
        storage: where Optuna keeps the trials; by default ``trials.db`` in the folder.
        isolate: give each run a process of its own.
        on_event: receives progress.
        **settings: any field of `RunConfig` but policy, seed and output.

    References:
        Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", MLSys
        (arXiv:1810.05934), for the rule; Optuna's SuccessiveHalvingPruner applies it.

    Raises:
        ConfigError: unknown settings, or another sweep in the folder.
        PolicyError: an unknown policy or option.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    given = {"model": model, "data": str(data)} | settings
    if over not in get_args(Over):
        raise ConfigError(f"halve over {over!r}", found="neither 'epochs' nor 'data'")
    spec = declare(given, policies, seeds=[seed])
    config = RunConfig(**spec.settings)
    if over == "epochs":
        first, whole_run = first if first is not None else 1, config.epochs
    else:
        first = first if first is not None else _FIRST_SAMPLES
        whole_run = len(read_data(config).targets("train"))
    steps = rungs(whole_run, first=first, factor=factor)
    suffix = "" if over == "epochs" else "-data"
    path = Path(output)
    with open_study(path, spec) as (folder, whole), _quiet():
        kept = storage or f"sqlite:///{(path / 'trials.db').resolve()}"
        trials = optuna.create_study(
            storage=kept,
            study_name=f"{path.resolve().name}-{first}-{factor}{suffix}",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first, reduction_factor=factor
            ),
        )
        _enqueue(trials, [arm.name for arm in whole.arms])
        while trials.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = trials.ask()
            key = TrialKey(trial.user_attrs[_ARM], seed)
            say = _saying(whole, key, on_event)
            state = _climb(folder, whole, key, steps, trial, over=over, isolate=isolate, say=say)
            score = _score(folder.run(key)) if state is TrialState.COMPLETE else None
            trials.tell(trial, score, state)
        rows = _rows(trials, folder, whole, seed)
        samples = whole_run if over == "data" else max(row.samples for row in rows)
        return Sweep(path, rows, config.epochs, samples)


def _saying(spec: StudySpec, key: TrialKey, tell: OnEvent | None) -> OnEvent:
    """What passes the events of a run on, with its place in the sweep."""
    place = [arm.name for arm in spec.arms].index(key.arm)
    where = {"arm": key.arm, "seed": key.seed, "place": place + 1, "of": len(spec.arms)}

    def say(event: dict[str, Any]) -> None:
        if tell is not None:
            tell(event | where)

    return say


def _enqueue(trials: optuna.Study, arms: Sequence[str]) -> None:
    """Queue the arms that are new, and those whose trial a killed process left unfinished."""
    known: set[str] = set()
    for trial in trials.get_trials(deepcopy=False):
        if trial.state is TrialState.RUNNING:
            trials.tell(trial.number, state=TrialState.FAIL)
        elif trial.state is not TrialState.FAIL or _WHY in trial.user_attrs:
            known.add(trial.user_attrs[_ARM])
    for arm in arms:
        if arm not in known:
            trials.enqueue_trial({}, user_attrs={_ARM: arm})


def _climb(
    folder: StudyFolder,
    spec: StudySpec,
    key: TrialKey,
    steps: Sequence[int],
    trial: optuna.Trial,
    *,
    over: Over,
    isolate: bool,
    say: OnEvent,
) -> TrialState:
    """One policy from rung to rung, until it is stopped or done.

    A rung over epochs is a pause of the one run; over data it is a run of its own.
    """
    for step in steps:
        last = step == steps[-1]
        part = over == "data" and not last
        place = _part(folder, key, step) if part else folder.run(key)
        settings = run_settings(spec, spec[key.arm], key.seed, place)
        if not last:
            settings["train_samples" if part else "pause_after"] = step
        if not _trained(folder, key, settings, trial, isolate=isolate, say=say):
            return TrialState.FAIL
        trial.report(_score(place), step)
        if last or (over == "epochs" and read_run(place).finished):  # patience may end it before
            return TrialState.COMPLETE
        if trial.should_prune():
            return TrialState.PRUNED
    raise AssertionError("the last rung ends the run")


def _part(folder: StudyFolder, key: TrialKey, samples: int) -> Path:
    """Where the run on a part of the data is."""
    return folder.run(key).with_name(f"seed-{key.seed}-samples-{samples}")


def _trained(
    folder: StudyFolder,
    key: TrialKey,
    settings: dict[str, Any],
    trial: optuna.Trial,
    *,
    isolate: bool,
    say: OnEvent,
) -> bool:
    """Run, or go on with a run; whether it got through. The trial keeps why not."""
    try:
        run_once(settings, say, isolate=isolate)
    except TrainingError as error:
        _log.warning("%s: %s", key.arm, error)
        note_failure(folder, key, str(error))
        trial.set_user_attr(_WHY, str(error))
        return False
    return True


def _score(run: Path) -> float:
    """The best validation accuracy so far."""
    lines = read_run(run).epochs
    return max(float(line["metrics"]["val_accuracy"]) for line in lines)


def _rows(
    trials: optuna.Study, folder: StudyFolder, spec: StudySpec, seed: int
) -> tuple[SweepRow, ...]:
    states = {
        trial.user_attrs[_ARM]: trial.state
        for trial in trials.get_trials(deepcopy=False)
        if trial.state.is_finished()
    }
    names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped"}
    rows = []
    for arm in spec.arms:
        records = [read_run(run) for run in _runs(folder, TrialKey(arm.name, seed))]
        lines = records[-1].epochs
        ends = [record.epochs[-1] for record in records if record.epochs]
        sizes = [int(record.header["data"]["train"]["samples"]) for record in records]
        rows.append(
            SweepRow(
                arm=arm.name,
                policy=arm.policy,
                state=names.get(states[arm.name], "failed"),
                epochs=len(lines),
                samples=sizes[-1],
                val_accuracy=_score(records[-1].path) if lines else None,
                training_s=sum(float(line["costs"]["training_s"]) for line in ends),
                work=sum(n * len(r.epochs) for n, r in zip(sizes, records, strict=True)),
            )
        )
    order = {"finished": 0, "stopped": 1, "failed": 2}
    rows.sort(key=lambda r: (order[r.state], -r.epochs * r.samples * (r.state == "stopped"),
                             -(r.val_accuracy or 0.0)))  # fmt: skip
    return tuple(rows)


def _runs(folder: StudyFolder, key: TrialKey) -> list[Path]:
    """The runs of an arm that have begun, the largest part of the data last."""
    parts = folder.run(key).parent.glob(f"seed-{key.seed}-samples-*")
    found = sorted(parts, key=lambda path: int(path.name.rpartition("-")[2]))
    return [run for run in (*found, folder.run(key)) if (run / RECORD_NAME).is_file()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna speaks of every trial on standard error; the level is put back afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
