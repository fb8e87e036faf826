"""Run folders of loops that are not Frostline's: for `frostline show`, `report` and `watch`.

`record` is for loops of your own, `frostline.integrations.keras.RecordCallback` for Keras's `fit`.
Both write what `frostline fit` writes: ``record.jsonl`` line by line, at the end
``certificate.json`` and ``summary.json``. A killed run leaves a folder that can be read, and a
resumed one goes on in it: the state of the driver says which lines are still true.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from frostline import _io
from frostline.cost import backward_share, trained_share
from frostline.driver import Driver
from frostline.errors import ConfigError, StorageError
from frostline.frontier.report import CacheReport
from frostline.memory import ResidentPeak
from frostline.policy import Decision
from frostline.records import RunRecorder, write_certificate
from frostline.registry import policy_text
from frostline.tasks.folder import RunFolder, check_same, locked, move_aside

__all__ = ["About", "Recording", "record"]

_log = logging.getLogger("frostline")

#: Settings that have arguments of their own, or are the driver's.
_TAKEN = ("data", "model", "policy")
_SECONDS = ("policy_s", "signals_s", "apply_s", "digest_s")
_FRAMEWORKS = ("torch", "keras", "tensorflow", "jax")
#: The recording that this process has open in a folder.
_OPEN: dict[Path, weakref.ref[Recording]] = {}


@dataclass(frozen=True, slots=True)
class About:
    """What a recorded run is, as its report shows it.

    Attributes:
        model: name of the model.
        data: name of the data.
        settings: plain JSON of your own, e.g. ``{"seed": 0, "lr": 1e-3}``; by what differs in it
            a report tells runs apart, and a run is gone on with only under the same.
        loop: what trained, in words.

    Raises:
        ConfigError: settings that are no plain JSON, or that belong elsewhere.
    """

    model: str = "own model"
    data: str = "own data"
    settings: Mapping[str, Any] = field(default_factory=dict)
    loop: str = "a loop of its own"

    def __post_init__(self) -> None:
        asked = "record these settings"
        if taken := sorted(set(self.settings) & set(_TAKEN)):
            raise ConfigError(
                asked, found=f"{taken[0]!r} among them", fix="model= and data=; the policy is known"
            )
        try:
            _io.canonical_json(_io.finite_json(dict(self.settings)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(asked, found=str(error), fix="numbers, texts, lists") from error
        if not isinstance(seed := self.settings.get("seed", 0), int) or isinstance(seed, bool):
            raise ConfigError(asked, found=f"seed={seed!r}", fix="a whole number")

    def asked(self, driver: Driver) -> dict[str, Any]:
        """What must be the same to go on, plain JSON."""
        named = {"model": self.model, "data": self.data, "policy": policy_text(driver.policy)}
        return _io.finite_json({**self.settings, **named})


class Recording:
    """The record of one run; `record` and `RecordCallback` make it.

    Args:
        folder: of the run.
        about: what the run is.
        fresh: move an earlier run in the folder aside.

    Attributes:
        folder: names of the files in it.
    """

    def __init__(self, folder: str | Path, about: About, *, fresh: bool = False) -> None:
        self.folder = RunFolder(Path(folder))
        self._about = about
        self._fresh = fresh
        self._held = contextlib.ExitStack()  # the lock
        self._holds_lock = False
        self._recorder: RunRecorder | None = None
        self._driver: Driver | None = None
        self._epochs: list[Mapping[str, Any]] = []
        self._decided = 0  # decisions written
        self._tests: dict[str, float] = {}
        self._cache: dict[str, Any] = {}
        self._ended: tuple[dict[str, Any], dict[str, Any], int] | None = None
        self._carried: dict[str, Any] = {}  # costs of earlier sessions and drivers
        self._base: dict[str, Any] = {}  # of this driver, before it was followed
        self._peak = ResidentPeak()
        self._since = self._trains_since = time.perf_counter()
        self._trained_s = 0.0
        self._went_on = False

    # -- the loop's side -----------------------------------------------------------------------

    def start_clock(self) -> None:
        """What is charged to the run begins now; otherwise it began when this was made."""
        self._since = time.perf_counter()

    def attach(
        self, driver: Driver, *, epochs: int | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Begin the record of this driver's run, or go on with it where the driver is.

        Args:
            driver: of the run, new or restored.
            epochs: how many are complete, where the loop knows; lines of later ones are dropped.
            config: settings that were found rather than given, plain JSON.

        Raises:
            ConfigError: another run is in the folder, or a finished one that goes further.
            StorageError: another process records there, or the folder cannot be used.
            DamagedFile: a line of the record was changed.
        """
        self._claim()
        try:
            self._begin(driver, self._place(driver, epochs), config or {})
            self.catch_up()
        except BaseException:
            self.close()
            raise
        if epochs is not None and self._went_on and self.epochs < epochs:
            _log.warning(
                "the record in %s lacks the newest of %d epochs: record an epoch before the "
                "checkpoint of it is saved",
                self.folder.path,
                epochs,
            )

    def follow(self, driver: Driver) -> None:
        """Go on with a driver that took the place of the one before in the midst of the run."""
        if driver is not self._driver:
            self._trained_s = time.perf_counter() - self._trains_since
            self._carried = self._costs()
            self._since = self._trains_since = time.perf_counter()
            self._trained_s = 0.0
            self._driver, self._base = driver, _spent(driver)
        self.catch_up()

    @property
    def epochs(self) -> int:
        """How many epochs the record tells of: the number of the newest."""
        return self._epochs[-1]["epoch"] if self._epochs else 0

    def catch_up(self) -> None:
        """Write the decisions that are not written yet."""
        recorder, driver = self._open
        for decision in driver.decisions[self._decided :]:
            recorder.decision(decision)
            self._decided += 1

    def epoch(self, metrics: Mapping[str, float], *, number: int | None = None) -> None:
        """The end of an epoch.

        Args:
            metrics: by name; reports draw "train_loss", "val_loss" and "val_accuracy".
            number: epochs complete, from 1; by default one more than before.

        Raises:
            StorageError: it cannot be written.
        """
        recorder, driver = self._open
        self.catch_up()
        if number is None:
            number = self.epochs + 1
        self._trained_s = time.perf_counter() - self._trains_since
        values = {name: float(value) for name, value in metrics.items()}
        line = {"epoch": number, "step": driver.progress.step, "metrics": values}
        costs = self._costs()
        recorder.epoch(number, driver.progress.step, values, costs=costs)
        recorder.sync()
        self._epochs.append(line | {"costs": costs})

    def tested(self, metrics: Mapping[str, float]) -> None:
        """What the model reached on test data, also after the end of the run.

        Args:
            metrics: by name, e.g. ``{"accuracy": 0.9}``; in the summary as "test_accuracy".
        """
        self._tests |= {f"test_{n.removeprefix('test_')}": float(v) for n, v in metrics.items()}
        self._end_anew()

    def cached(self, report: CacheReport) -> None:
        """What a cache of frozen layers did in the run and what it cost, also after its end."""
        self._cache = {"cache": asdict(report)}
        self._end_anew()

    def finish(self) -> None:
        """End the run: check what is frozen, write the proof and the summary.

        Raises:
            FrozenTensorChanged: a frozen tensor moved.
            StorageError: a file cannot be written.
        """
        recorder, driver = self._open
        certificate = driver.finish()
        self.catch_up()
        if not self._trained_s:
            self._trained_s = time.perf_counter() - self._trains_since
        sha256 = write_certificate(self.folder.certificate, certificate)
        recorder.certificate(certificate, sha256=sha256)
        self._end(self._results(driver), self._costs() | _backward(driver))

    def close(self) -> None:
        """Close the files and let the folder go; harmless when closed."""
        self._close_file()
        self._holds_lock = False
        self._held.close()

    # -- inside --------------------------------------------------------------------------------

    @property
    def _open(self) -> tuple[RunRecorder, Driver]:
        if self._recorder is None or self._driver is None:
            raise StorageError(
                f"record in {self.folder.path}",
                found="a record that is closed",
                fix="within the run; another recording in the same folder ends this one",
            )
        return self._recorder, self._driver

    def _claim(self) -> None:
        """Lock the folder; a recording of this process that still holds it is over."""
        if self._holds_lock:
            return
        place = self.folder.path.resolve()
        before = _OPEN.get(place)
        if before is not None and (earlier := before()) is not None:
            earlier.close()
        if self._fresh:
            move_aside(self.folder)
            self._fresh = False
        _io.make_folder(self.folder.path)
        self._held.enter_context(locked(self.folder))
        self._holds_lock = True
        _OPEN[place] = weakref.ref(self)
        _io.sweep(self.folder.path)

    def _begin(self, driver: Driver, place: _Place, config: Mapping[str, Any]) -> None:
        self._close_file()
        if os.path.lexists(self.folder.summary):
            _io.discard(self.folder.summary)  # its presence says: finished
        recorder = self._recorder = RunRecorder(self.folder.record, keep=place.keep)
        self._epochs, self._carried, self._decided = place.epochs, place.costs, place.decisions
        self._base = _spent(driver) if place.keep else {}
        self._tests, self._cache = {}, {}
        self._driver, self._ended, self._went_on = driver, None, bool(place.keep)
        self._trains_since, self._trained_s = time.perf_counter(), 0.0
        if place.keep:
            _log.info("recording goes on in %s at step %d", self.folder.path, driver.progress.step)
        else:
            recorder.header(self._header(driver, config), costs=_environment(driver))
            _log.info("new record in %s", self.folder.path)

    def _place(self, driver: Driver, epochs: int | None) -> _Place:
        """Where the record goes on."""
        there = self.folder.asked()
        if there is None:
            return _Place()
        asked = self._about.asked(driver)
        both = sorted({*asked, *there})
        check_same(self.folder, {n: asked.get(n) for n in both}, {n: there.get(n) for n in both})
        lines = _io.read_lines(self.folder.record).records
        names = list(driver.backend.groups.names)
        if lines[0]["depths"] != names:
            raise self._another("other layer groups there")
        ends = [line for line in lines if line["kind"] == "end"]
        if ends and driver.progress.step < ends[-1]["results"]["steps"]:
            raise self._another(
                f"a finished run of {ends[-1]['results']['steps']} updates, "
                f"and a driver after {driver.progress.step}"
            )
        place = _kept(lines, driver, epochs)
        if place.contradicted:
            raise self._another("other decisions there than those of this driver")
        return place

    def _another(self, found: str) -> ConfigError:
        return ConfigError(
            f"go on with the run in {self.folder.path}",
            found=found,
            fix="another folder, load the checkpoint that belongs to it, or start over: fresh=True",
        )

    def _header(self, driver: Driver, config: Mapping[str, Any]) -> dict[str, Any]:
        asked, groups = self._about.asked(driver), driver.backend.groups
        return {
            "asked": asked,
            "config": {**_io.finite_json(dict(config)), **asked},
            "loop": self._about.loop,
            "notes": {"groups": list(groups.notes)},
            "groups": {g.name: g.parameter_count for g in groups},
            "depths": list(groups.names),
            "head": sorted(groups.head),
        }

    def _costs(self) -> dict[str, Any]:
        """All costs so far, as an epoch and the end tell them."""
        _, driver = self._open
        now, carried = _spent(driver), self._carried
        found = {n: carried.get(n, 0.0) + now[n] - self._base.get(n, 0.0) for n in _SECONDS}
        signals = _sum(carried.get("signal_s", {}), now["signal_s"], self._base.get("signal_s", {}))
        wall_s = time.perf_counter() - self._since
        peak = max(int(carried.get("peak_memory_bytes", 0)), self._peak.read())
        return found | {
            "signal_s": signals,
            "widened_steps": driver.costs.widened_steps,
            "wall_s": carried.get("wall_s", 0.0) + wall_s,
            "training_s": carried.get("training_s", 0.0) + self._trained_s,
            "peak_memory_bytes": peak,
        }

    def _results(self, driver: Driver) -> dict[str, Any]:
        best = _best(self._epochs)
        metrics = {} if best is None else best["metrics"]
        steps, groups = driver.progress.step, driver.backend.groups
        return {
            "val_accuracy": metrics.get("val_accuracy"),
            "val_loss": metrics.get("val_loss"),
            "trained_parameter_share": _mean_share(driver, trained_share),
            "epochs_run": len(self._epochs),
            "best_epoch": best and best["epoch"],
            "steps": steps,
            "policy_done": driver.plan.done,
            "decisions": len(driver.decisions),
            "certificate_ok": driver.certificate.covers(driver.decisions, groups, end=steps),
        }

    def _end(self, results: dict[str, Any], costs: dict[str, Any]) -> None:
        """The last line and the summary; the folder is anybody's again."""
        recorder, _ = self._open
        results, costs = results | self._tests, costs | self._cache
        recorder.end(results, costs=costs)
        _io.atomic_write_json(self.folder.summary, results | costs)
        self._ended = results, costs, recorder.count
        self.close()

    def _end_anew(self) -> None:
        """Write the last line again with what was learnt since; nothing before there is one."""
        if self._ended is not None:
            results, costs, lines = self._ended
            self._claim()
            self._recorder = RunRecorder(self.folder.record, keep=lines - 1)
            self._end(results, costs)

    def _close_file(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()


@contextlib.contextmanager
def record(
    driver: Driver,
    folder: str | Path,
    *,
    model: str = "own model",
    data: str = "own data",
    settings: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Iterator[Recording]:
    """Record the run of a driver in a folder, as `frostline fit` does, while the block runs.

    `frostline show`, `report`, `runs` and `watch` read the folder, also while the run goes on. At
    the end of the block the driver is finished, and proof and summary are written. After an
    exception, or a kill, the folder stays as it is: a run that is not finished. To go on with it,
    load the checkpoint into the driver first; without one the record starts over.

    Args:
        driver: of your loop.
        folder: of the run; made if need be.
        model: name of the model, for people.
        data: name of the data, for people.
        settings: plain JSON, e.g. ``{"seed": 0, "lr": 1e-3}``; reports tell runs apart by it.
        fresh: move an earlier run in the folder aside.

    Raises:
        ConfigError: another run is in the folder, or settings that cannot be recorded.
        StorageError: another process records there, or a file cannot be written.

    Example:
        >>> import tempfile
        >>> from frostline.backends.numpy import Momentum, NumpyBackend, NumpyNet
        >>> from frostline.records import read_run
        >>> from frostline.registry import make_policy
        >>> net = NumpyNet((4, 8, 2))
        >>> backend = NumpyBackend(net, Momentum(net, lr=0.1))
        >>> driver = Driver(make_policy("linear-probe"), backend, total_steps=2)
        >>> folder = tempfile.mkdtemp()
        >>> with record(driver, folder, settings={"seed": 3}) as run:
        ...     for _ in range(2):
        ...         with driver.step():
        ...             pass
        ...     run.epoch({"val_accuracy": 0.75})
        >>> found = read_run(folder)
        >>> found.finished, found.summary["val_accuracy"], found.summary["certificate_ok"]
        (True, 0.75, True)
    """
    about = About(model=model, data=data, settings=dict(settings or {}))
    recording, before = Recording(folder, about, fresh=fresh), driver.on_decision
    recording.attach(driver)

    def decided(decision: Decision) -> None:
        if before is not None:
            before(decision)
        recording.catch_up()

    driver.on_decision = decided
    try:
        yield recording
        recording.finish()
    finally:
        driver.on_decision = before
        recording.close()


# -- where a record goes on ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """The lines of a record that are still true.

    Attributes:
        keep: how many of the first ones.
        decisions: of these, decisions.
        epochs: of these, epochs.
        costs: of the newest line that tells them.
        contradicted: whether a line tells of another run than the driver's.
    """

    keep: int = 0
    decisions: int = 0
    epochs: list[Mapping[str, Any]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    contradicted: bool = False


def _kept(lines: Sequence[Mapping[str, Any]], driver: Driver, epochs: int | None) -> _Place:
    """Lines up to what the driver has not done yet; what follows was lost with its process."""
    if not driver.progress.step:
        return _Place(keep=1)
    step, decided = driver.progress.step, [_plain(d) for d in driver.decisions]
    decisions = 0
    kept: list[Mapping[str, Any]] = []
    costs: dict[str, Any] = {}
    for number, line in enumerate(lines):
        kind = line["kind"]
        if kind == "decision":
            if decisions == len(decided):
                return _Place(number, decisions, kept, costs)
            if {k: v for k, v in line.items() if k != "kind"} != decided[decisions]:
                return _Place(contradicted=True)
            decisions += 1
        elif kind == "epoch":
            if line["step"] > step or (epochs is not None and line["epoch"] > epochs):
                return _Place(number, decisions, kept, costs)
            kept.append(line)
            costs = dict(line["costs"])
        elif kind == "certificate":
            costs = dict(next((e["costs"] for e in lines[number:] if e["kind"] == "end"), costs))
            return _Place(number, decisions, kept, costs)
    return _Place(len(lines), decisions, kept, costs)


def _plain(decision: Decision) -> Any:
    return _io.finite_json(decision.to_json())


# -- figures -------------------------------------------------------------------------------------


def _environment(driver: Driver) -> dict[str, Any]:
    """What depends on the machine: versions of what is loaded, measured costs."""
    loaded = {name: sys.modules.get(name) for name in _FRAMEWORKS}
    versions = {name: getattr(m, "__version__", None) for name, m in loaded.items()}
    costs = {g.name: asdict(g.cost) for g in driver.backend.groups if g.cost is not None}
    return {n: str(v) for n, v in versions.items() if v is not None} | {"groups": costs}


def _spent(driver: Driver) -> dict[str, Any]:
    costs = driver.costs
    return {n: getattr(costs, n) for n in _SECONDS} | {"signal_s": dict(costs.signal_s)}


def _sum(
    carried: Mapping[str, float], now: Mapping[str, float], base: Mapping[str, float]
) -> dict[str, float]:
    return {
        name: carried.get(name, 0.0) + now.get(name, 0.0) - base.get(name, 0.0)
        for name in sorted({*carried, *now})
    }


def _mean_share(driver: Driver, share: Any) -> float:
    """A share of the plans of a run, mean over its updates."""
    steps, decisions, groups = driver.progress.step, driver.decisions, driver.backend.groups
    if not steps:
        return share(groups, driver.plan)
    ends = [*(decision.step for decision in decisions[1:]), steps]
    spans = zip(decisions, ends, strict=True)
    return sum(share(groups, d.plan) * (end - d.step) for d, end in spans) / steps


def _backward(driver: Driver) -> dict[str, float]:
    """The backward work that was done, where the layer groups were measured."""
    if not driver.backend.groups.measured:
        return {}
    return {"backward_share": _mean_share(driver, backward_share)}


def _best(epochs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The best epoch by validation accuracy, then loss; without either the last."""

    def rank(line: Mapping[str, Any]) -> tuple[float, float, int]:
        metrics = line["metrics"]
        accuracy = float(metrics.get("val_accuracy", math.nan))
        loss = float(metrics.get("val_loss", math.nan))
        known = not (math.isnan(accuracy) and math.isnan(loss))
        return (
            -math.inf if math.isnan(accuracy) else accuracy,
            -math.inf if math.isnan(loss) else -loss,
            0 if known else line["epoch"],
        )

    return max(epochs, key=rank, default=None)
