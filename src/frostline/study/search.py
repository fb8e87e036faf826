"""Wide sweeps: many policies, most of them stopped early, by successive halving over epochs.

Each policy is a trial of an Optuna study that lives in the sweep's folder as SQLite, or wherever
the caller keeps Optuna studies. A trial that is stopped is a paused run: it can be gone on with.
What comes out ranks policies by one seed; which of the best is better is for `compare` to say.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from frostline.errors import ConfigError, TrainingError
from frostline.records import read_run
from frostline.study.compare import declare
from frostline.study.runner import (
    OnEvent,
    StudyFolder,
    TrialKey,
    note_failure,
    open_study,
    run_once,
    run_settings,
)
from frostline.study.spec import StudySpec
from frostline.tasks.config import RunConfig

__all__ = ["Sweep", "SweepRow", "rungs", "sweep"]

_log = logging.getLogger("frostline")
_ARM = "arm"
_WHY = "why"


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A policy of a sweep.

    Attributes:
        arm: its name.
        policy: its short form.
        state: "finished", "stopped" (others were better after as many epochs) or "failed".
        epochs: that it ran.
        val_accuracy: the best so far, in [0, 1]; None if it failed before the first evaluation.
        training_s: seconds of training.
    """

    arm: str
    policy: str
    state: str
    epochs: int
    val_accuracy: float | None
    training_s: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found.

    Attributes:
        path: its folder.
        rows: the policies, the best first: those that ran longest before those stopped earlier.
        epochs: of a whole run.
    """

    path: Path
    rows: tuple[SweepRow, ...]
    epochs: int

    @property
    def sentence(self) -> str:
        """What to do next, with numbers."""
        best = self.rows[0]
        if best.val_accuracy is None:
            return "no policy could be trained"
        run = sum(row.epochs for row in self.rows)
        share = run / (self.epochs * len(self.rows))
        others = [row.policy for row in self.rows[1:3] if row.val_accuracy is not None]
        next_ = f"; compare it with {' and '.join(others)} over several seeds" if others else ""
        return (
            f"{best.policy} was best with one seed: {100 * best.val_accuracy:.1f} % on validation "
            f"data; {run} epochs were run, {share:.0%} of what all policies would take{next_}"
        )


def rungs(epochs: int, *, first: int = 1, factor: int = 3) -> tuple[int, ...]:
    """Epochs after which policies are stopped, and the last.

    Args:
        epochs: of a whole run, >= 1.
        first: epochs that each policy gets, >= 1.
        factor: of those that reach a rung, one in so many goes on; >= 2.

    Raises:
        ConfigError: a number is too small.

    Example:
        >>> rungs(10), rungs(10, first=2, factor=2), rungs(1)
        ((1, 3, 9, 10), (2, 4, 8, 10), (1,))
    """
    if epochs < 1 or first < 1 or factor < 2:
        raise ConfigError(
            f"halve with first={first}, factor={factor} of {epochs} epochs",
            found="a number that is too small",
            fix="first=1 and factor=2 or more",
        )
    found, rung = [], first
    while rung < epochs:
        found.append(rung)
        rung *= factor
    return (*found, epochs)


def sweep(
    model: str,
    data: str | Path,
    policies: Sequence[str] | Mapping[str, Any],
    *,
    output: str | Path,
    first: int = 1,
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
        first: epochs that each policy gets, >= 1.
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
    spec = declare(given, policies, seeds=[seed])
    epochs = RunConfig(**spec.settings).epochs
    steps = rungs(epochs, first=first, factor=factor)
    path = Path(output)
    with open_study(path, spec) as (folder, whole), _quiet():
        kept = storage or f"sqlite:///{(path / 'trials.db').resolve()}"
        trials = optuna.create_study(
            storage=kept,
            study_name=f"{path.resolve().name}-{first}-{factor}",
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
            state = _climb(folder, whole, key, steps, trial, isolate=isolate, tell=on_event)
            trials.tell(trial, _score(folder, key) if state is TrialState.COMPLETE else None, state)
        return Sweep(path, _rows(trials, folder, whole, seed), epochs)


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
    isolate: bool,
    tell: OnEvent | None,
) -> TrialState:
    """One policy from rung to rung, until it is stopped or done."""
    place = [arm.name for arm in spec.arms].index(key.arm)

    def say(event: dict[str, Any]) -> None:
        if tell is not None:
            where = {"arm": key.arm, "seed": key.seed, "place": place + 1, "of": len(spec.arms)}
            tell(event | where)

    settings = run_settings(spec, spec[key.arm], key.seed, folder.run(key))
    for step in steps:
        last = step == steps[-1]
        try:
            run_once(settings | {"pause_after": None if last else step}, say, isolate=isolate)
        except TrainingError as error:
            _log.warning("%s: %s", key.arm, error)
            note_failure(folder, key, str(error))
            trial.set_user_attr(_WHY, str(error))
            return TrialState.FAIL
        trial.report(_score(folder, key), step)
        if last or read_run(folder.run(key)).finished:  # patience may end it before
            return TrialState.COMPLETE
        if trial.should_prune():
            return TrialState.PRUNED
    raise AssertionError("the last rung ends the run")


def _score(folder: StudyFolder, key: TrialKey) -> float:
    """The best validation accuracy so far."""
    lines = read_run(folder.run(key)).epochs
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
        key = TrialKey(arm.name, seed)
        lines = read_run(folder.run(key)).epochs
        rows.append(
            SweepRow(
                arm=arm.name,
                policy=arm.policy,
                state=names.get(states[arm.name], "failed"),
                epochs=len(lines),
                val_accuracy=_score(folder, key) if lines else None,
                training_s=float(lines[-1]["costs"]["training_s"]) if lines else 0.0,
            )
        )
    order = {"finished": 0, "stopped": 1, "failed": 2}
    rows.sort(key=lambda r: (order[r.state], -r.epochs * (r.state == "stopped"),
                             -(r.val_accuracy or 0.0)))  # fmt: skip
    return tuple(rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna speaks of every trial on standard error; the level is put back afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
