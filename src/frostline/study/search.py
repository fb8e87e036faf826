"""Wide sweeps: many policies, most of them stopped early, by successive halving.

Each policy is a trial of an Optuna study that lives in the sweep's folder as SQLite, or wherever
the caller keeps Optuna studies. Halving over epochs pauses a run at each rung, and one that is
stopped can be gone on with. Halving over data trains anew at each rung, whole runs on more and more
samples: it does not mistake a slow start for a bad end, but says of few samples what may not hold
for many. What comes out ranks policies by one seed; which of the best is better is for `compare` to
say.

All policies reach a rung before any goes past it. Optuna's own pruner decides as each comes along,
which suits many workers; one after the other, the cheap and weak ones first, nearly all would be
the best so far, and run to the end.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

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
#: Validation accuracy, and loss with the sign turned.
_Score = tuple[float, float]


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

    Successive halving: all policies run to the first rung, the best 1/factor of them (at least
    one) to the next, and so on. The same call goes on where it was; with more policies it tries
    those, too, and goes on with stopped ones that are now among the best.

    Args:
        model: what to fine-tune, as `fit` takes it.
        data: what to learn from.
        policies: as `compare` takes them.
        output: the sweep's folder.
        over: what rungs are made of: "epochs" of one run, or "data": runs on nested parts of the
            training samples (`train_samples`), the classes in their proportions.
        first: epochs or samples that each policy gets, >= 1; by default 1 epoch or 100 samples.
        factor: of those that reach a rung, one in so many goes on; >= 2.
        seed: of all runs; each seed is a sweep of its own, also in one folder.
        storage: where Optuna keeps the trials; by default ``trials.db`` in the folder.
        isolate: give each run a process of its own.
        on_event: receives progress.
        **settings: any field of `RunConfig` but policy, seed and output.

    References:
        Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter
        Optimization", AISTATS (arXiv:1502.07943), algorithm 1.

    Raises:
        ConfigError: unknown settings, another sweep in the folder, a storage that does not open.
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
    suffix = ("" if over == "epochs" else "-data") + (f"-seed-{seed}" if seed else "")
    path = Path(output)
    with open_study(path, spec) as (folder, whole), _quiet():
        kept = storage or f"sqlite:///{(path / 'trials.db').resolve()}"
        trials = _trials(kept, f"{path.resolve().name}-{first}-{factor}{suffix}")
        _Halving(folder, whole, seed, trials, over, isolate, on_event).run(steps, factor)
        rows = _rows(trials, folder, whole, seed)
        samples = whole_run if over == "data" else max(row.samples for row in rows)
        return Sweep(path, rows, config.epochs, samples)


def _trials(storage: str | optuna.storages.BaseStorage, name: str) -> optuna.Study:
    """Optuna's study of this name, new or there before.

    Raises:
        ConfigError: the storage cannot be opened.
    """
    try:
        return optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.OptunaError) as error:
        raise ConfigError(
            f"keep the trials in {storage}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="an address as SQLAlchemy reads it, e.g. sqlite:///trials.db, or no storage",
        ) from error


@dataclass(slots=True)
class _Halving:
    """The policies of a sweep on their way from rung to rung.

    Attributes:
        folder: of the sweep.
        spec: its policies and settings.
        seed: of all runs.
        trials: where Optuna keeps them.
        over: what the rungs are made of: over epochs a rung is a pause of the one run, over data
            it is a run of its own.
        isolate: whether each run has a process of its own.
        tell: receives progress.
    """

    folder: StudyFolder
    spec: StudySpec
    seed: int
    trials: optuna.Study
    over: Over
    isolate: bool
    tell: OnEvent | None
    _live: dict[str, optuna.Trial] = field(init=False, default_factory=dict)
    _ended: dict[str, optuna.trial.FrozenTrial] = field(init=False, default_factory=dict)

    def run(self, steps: Sequence[int], factor: int) -> None:
        """All policies to the first of these epochs (or samples), the best on to the next."""
        for trial in self.trials.get_trials(deepcopy=False):
            if trial.state is TrialState.RUNNING:  # of a killed process
                self.trials.tell(trial.number, state=TrialState.FAIL)
            elif trial.state is not TrialState.FAIL or _WHY in trial.user_attrs:
                self._ended[trial.user_attrs[_ARM]] = trial
        names = [arm.name for arm in self.spec.arms]
        for step in steps:
            found = {name: self._reach(name, step, last=step == steps[-1]) for name in names}
            there = {name: score for name, score in found.items() if score is not None}
            ranked = sorted(there, key=lambda name: there[name], reverse=True)
            goes_on = [] if step == steps[-1] else ranked[: max(1, len(ranked) // factor)]
            for name, score in there.items():
                if name not in goes_on:
                    self._end(name, score)
            names = [name for name in names if name in goes_on]

    def _key(self, name: str) -> TrialKey:
        return TrialKey(name, self.seed)

    def _reach(self, name: str, step: int, *, last: bool) -> _Score | None:
        """What a policy scores at a rung, trained up to there if it is not; None if it failed."""
        ended = self._ended.get(name)
        if ended is not None and ended.state is TrialState.FAIL:
            return None
        key, part = self._key(name), self.over == "data" and not last
        place = _part(self.folder, key, step) if part else self.folder.run(key)
        most = None if part or last else step
        if ended is not None and step in ended.intermediate_values:
            return _score(place, most)
        trial = self._live.get(name)
        if trial is None:
            trial = self._live[name] = self.trials.ask()
            trial.set_user_attr(_ARM, name)
            for earlier, score in ({} if ended is None else ended.intermediate_values).items():
                trial.report(score, earlier)
            self._ended.pop(name, None)
        settings = run_settings(self.spec, self.spec[name], key.seed, place)
        if not last:
            settings["train_samples" if part else "pause_after"] = step
        if not self._trained(trial, key, settings):
            return None
        score = _score(place, most)
        trial.report(score[0], step)
        return score

    def _trained(self, trial: optuna.Trial, key: TrialKey, settings: dict[str, Any]) -> bool:
        """Run, or go on with a run; whether it got through. The trial keeps why not."""
        if _has_run(Path(settings["output"]), settings.get("pause_after")):
            return True
        try:
            run_once(settings, self._saying(key), isolate=self.isolate)
        except TrainingError as error:
            _log.warning("%s: %s", key.arm, error)
            note_failure(self.folder, key, str(error))
            trial.set_user_attr(_WHY, str(error))
            self.trials.tell(trial, state=TrialState.FAIL)
            return False
        return True

    def _end(self, name: str, score: _Score) -> None:
        """A policy is stopped, or has come to its end."""
        if (trial := self._live.pop(name, None)) is None:  # it was before
            return
        if _has_run(self.folder.run(self._key(name)), None):  # patience may end it early
            self.trials.tell(trial, score[0])
        else:
            self.trials.tell(trial, state=TrialState.PRUNED)

    def _saying(self, key: TrialKey) -> OnEvent:
        """What passes the events of a run on, with its place in the sweep."""
        place = [arm.name for arm in self.spec.arms].index(key.arm)
        where = {"arm": key.arm, "seed": key.seed, "place": place + 1, "of": len(self.spec.arms)}

        def say(event: dict[str, Any]) -> None:
            if self.tell is not None:
                self.tell(event | where)

        return say


def _has_run(run: Path, epochs: int | None) -> bool:
    """Whether a run has so many epochs already; None: whether it is finished."""
    if not (run / RECORD_NAME).is_file():
        return False
    record = read_run(run)
    return record.finished or (epochs is not None and len(record.epochs) >= epochs)


def _part(folder: StudyFolder, key: TrialKey, samples: int) -> Path:
    """Where the run on a part of the data is."""
    return folder.run(key).with_name(f"seed-{key.seed}-samples-{samples}")


def _score(run: Path, epochs: int | None = None) -> _Score:
    """The best validation accuracy within so many epochs; of equal ones the loss decides."""
    metrics = [line["metrics"] for line in read_run(run).epochs[:epochs]]
    return max((float(m["val_accuracy"]), -float(m["val_loss"])) for m in metrics)


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
                val_accuracy=_score(records[-1].path)[0] if lines else None,
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
