"""What a run, or a driver in your own loop, tells trackers; and that they can do it no harm.

Trackers named by name live in a process of their own, which is fed through a queue: nothing waits
for them, a queue that is full drops what comes, and one that fails is left out. Trackers given as
objects (Accelerate's, a W&B run, a `SummaryWriter`) are called here, and left out when they raise.
Either is said once in the log.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from frostline._io import finite_json
from frostline.cost import plan_line, trained_share
from frostline.driver import Driver
from frostline.errors import ConfigError
from frostline.integrations.trackers import (
    TRACKERS,
    About,
    Status,
    TrackerName,
    check_installed,
)
from frostline.policy import Decision

__all__ = ["DriverLog", "Tracking", "open_tracking", "track"]

_log = logging.getLogger("frostline")

_COMMAND = (sys.executable, "-m", "frostline.integrations.tracker_process")
_QUEUE = 20_000
#: How long the end of a run waits for trackers to write what they have.
_CLOSE_S = 60.0


class _Sink(Protocol):
    def tell(self, line: Mapping[str, Any]) -> None: ...
    def close(self, status: Status) -> None: ...


@dataclass(frozen=True, slots=True)
class Tracking:
    """Where numbers and texts of a run go. Nothing here raises or waits, but for `close`."""

    sinks: Sequence[_Sink] = ()

    def values(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, as of so many updates."""
        if values:
            self._tell({"values": dict(values), "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        """A text, as of so many updates."""
        self._tell({"texts": {name: text}, "step": step})

    def close(self, status: Status) -> None:
        """Let trackers write what they have; waits for them, but not for ever."""
        for sink in self.sinks:
            sink.close(status)

    def _tell(self, line: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.tell(line)


def open_tracking(
    trackers: Sequence[TrackerName | object],
    folder: str | Path,
    *,
    name: str,
    settings: Mapping[str, Any] | None = None,
    step: int = 0,
) -> Tracking:
    """Start trackers.

    Args:
        trackers: by name ("tensorboard", "mlflow", "wandb", "trackio"), or objects that have
            `log(values, step=...)`, as Accelerate's trackers and W&B runs, or `add_scalar` and
            `add_text`, as TensorBoard's writers. Objects stay yours: they are not closed.
        folder: where those named keep what they keep.
        name: of the run.
        settings: of the run, plain JSON.
        step: updates complete, where a run goes on.

    Raises:
        ConfigError: no such tracker.
        MissingExtra: the package of one is not installed.
    """
    named = [tracker for tracker in trackers if isinstance(tracker, str)]
    if unknown := sorted(set(named) - set(TRACKERS)):
        raise ConfigError(
            f"log to {unknown[0]!r}",
            found="no tracker of that name",
            fix=f"one of {', '.join(TRACKERS)}, or an object with log(values, step=...)",
        )
    check_installed(cast("Sequence[TrackerName]", named))
    sinks: list[_Sink] = [_here(t) for t in trackers if not isinstance(t, str)]
    if named:
        about = About(Path(folder), name, dict(settings or {}), step)
        with suppress(_NotStarted):
            sinks.append(_Apart(_started(about, named)))
    return Tracking(sinks)


# -- drivers -------------------------------------------------------------------------------------


class DriverLog:
    """Logs a driver's decisions with their reasons, what is frozen, and the signals it reads.

    Args:
        driver: whose; its `on_decision` is called as before.
        tracking: where to.
    """

    def __init__(self, driver: Driver, tracking: Tracking) -> None:
        self._driver = driver
        self._tracking = tracking
        self._sampled: dict[str, int] = {}
        self._frozen: frozenset[str] | None = None
        self._before = driver.on_decision
        driver.on_decision = self._decided

    def log(self, values: Mapping[str, float] | None = None, *, step: int | None = None) -> None:
        """Numbers of your own, and the signals read since the last call.

        Args:
            values: by name, e.g. ``{"loss": 0.3}``.
            step: updates complete; the driver's by default.
        """
        step = self._driver.progress.step if step is None else step
        self._tracking.values({**(values or {}), **self._new_signals()}, step)

    def detach(self) -> None:
        """Leave the driver as it was."""
        self._driver.on_decision = self._before

    def _decided(self, decision: Decision) -> None:
        if self._before is not None:
            self._before(decision)
        groups, plan = self._driver.backend.groups, decision.plan
        values = {
            "frozen/groups": float(len(plan.frozen)),
            "frozen/parameter_share": 1 - trained_share(groups, plan),
        }
        before = self._frozen
        for group in groups:
            if before is None or (group.name in before) != (group.name in plan.frozen):
                values[f"frozen/{group.name}"] = float(group.name in plan.frozen)
        self._frozen = plan.frozen
        self._tracking.values(values | self._new_signals(), decision.step)
        text = plan_line(groups, plan)
        reason = f"\n{plan.reason}" if plan.reason else ""
        self._tracking.text("decision", f"step {decision.step}: {text}{reason}", decision.step)

    def _new_signals(self) -> dict[str, float]:
        """Values of signals that were read since they were logged last."""
        found: dict[str, float] = {}
        for signal, when in self._driver.sampled.items():
            if self._sampled.get(signal) != when:
                self._sampled[signal] = when
                values = self._driver.signals[signal]
                found |= {f"{signal}/{unit}": value for unit, value in values.items()}
        return found


@contextmanager
def track(
    driver: Driver,
    trackers: Sequence[TrackerName | object],
    *,
    folder: str | Path = "trackers",
    name: str = "run",
    settings: Mapping[str, Any] | None = None,
) -> Iterator[DriverLog]:
    """Log what a driver decides and reads, and numbers of your own, while the block runs.

    Logged at each change of plan: how much is frozen, which groups changed, and the plan with its
    reason as text; and each signal of the policy when it was read, per group. A tracker that fails
    is left out and said once in the log; training goes on as if it were not there.

    Args:
        driver: of your loop.
        trackers: names or objects, see `open_tracking`.
        folder: where those named keep what they keep; the same folder goes on with the same run.
        name: of the run.
        settings: what trackers show as settings, plain JSON.

    Raises:
        ConfigError: no such tracker.
        MissingExtra: the package of one is not installed.

    Example:
        By name, or with objects of your own::

            with frostline.track(driver, ["tensorboard"], folder="runs/mine") as log:
                for x, y in batches:
                    with driver.step():
                        ...
                    log.log({"loss": loss.item()})

        Whatever has `log` may be one, here a stand-in that prints:

        >>> from frostline.backends.numpy import Momentum, NumpyBackend, NumpyNet
        >>> from frostline.registry import make_policy
        >>> class Printer:
        ...     def log(self, values, step):
        ...         print(step, {k: v for k, v in values.items() if k in ("frozen/groups", "loss")})
        >>> net = NumpyNet((4, 8, 2))
        >>> backend = NumpyBackend(net, Momentum(net, lr=0.1))
        >>> driver = Driver(make_policy("linear-probe"), backend, total_steps=1)
        >>> with track(driver, [Printer()]) as log:
        ...     with driver.step():
        ...         pass
        ...     log.log({"loss": 0.5})
        0 {'frozen/groups': 1.0}
        0 {}
        1 {'loss': 0.5}
    """
    tracking = open_tracking(
        trackers, folder, name=name, settings=settings, step=driver.progress.step
    )
    log = DriverLog(driver, tracking)
    status: Status = "failed"
    try:
        yield log
        status = "finished"
    except KeyboardInterrupt:
        status = "unfinished"
        raise
    finally:
        log.detach()
        tracking.close(status)


# -- objects -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Here:
    """A tracker in this process, until it raises."""

    tracker: Any
    failed: bool = False

    def tell(self, line: Mapping[str, Any]) -> None:
        if self.failed:
            return
        try:
            self._log(line)
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self.failed = True
            found = " ".join(f"{type(error).__name__}: {error}".split())
            _say_failed(type(self.tracker).__name__, found)

    def close(self, status: Status) -> None:
        """It is its owner's to close."""

    def _log(self, line: Mapping[str, Any]) -> None:
        told = {**line.get("values", {}), **line.get("texts", {})}
        if not hasattr(self.tracker, "add_scalar"):
            self.tracker.log(told, step=line["step"])
            return
        for name, value in told.items():
            add = self.tracker.add_text if isinstance(value, str) else self.tracker.add_scalar
            add(name, value, line["step"])


def _here(tracker: object) -> _Here:
    if not hasattr(tracker, "log") and not hasattr(tracker, "add_scalar"):
        raise ConfigError(
            f"log to a {type(tracker).__name__}",
            found="neither log(values, step=...) nor add_scalar and add_text",
            fix=f"one of {', '.join(TRACKERS)}, or such an object",
        )
    return _Here(tracker)


# -- a process of their own ----------------------------------------------------------------------


class _NotStarted(Exception):
    pass


def _started(about: About, names: Sequence[str]) -> subprocess.Popen[str]:
    """The process of trackers, told of the run."""
    paths = os.pathsep.join(["" if p == os.curdir else p for p in sys.path])
    first = {
        "trackers": list(names),
        "folder": str(about.folder),
        "name": about.name,
        "settings": finite_json(dict(about.settings)),
        "step": about.step,
    }
    process: subprocess.Popen[str] | None = None
    try:
        about.folder.mkdir(parents=True, exist_ok=True)
        with (about.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  our own module
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": paths},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the run, which then ends it
            )
        given = cast("Any", process.stdin)
        given.write(json.dumps(first) + "\n")
        given.flush()
    except OSError as error:
        found = str(error) if process is None else _ended(process)
        _say_failed(", ".join(names), found)
        raise _NotStarted from error
    return process


def _ended(process: subprocess.Popen[str]) -> str:
    """What became of a process that does not listen; nothing of it is left."""
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what it was not told cannot be told any more
            cast("Any", pipe).close()
    if _ends_within(1.0, process):
        return f"their process ended by itself, code {process.returncode}"
    return "their process does not listen, and was ended"


def _ends_within(seconds: float, process: subprocess.Popen[str]) -> bool:
    """Whether a process ends by itself in this time; else it is ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


@dataclass(slots=True)
class _Apart:
    """Trackers in a process of their own, fed through a queue by a thread."""

    process: subprocess.Popen[str]
    _lines: queue.Queue[Mapping[str, Any] | None] = field(init=False)
    _threads: list[threading.Thread] = field(init=False)
    _dropped: bool = field(init=False, default=False)
    _gone: bool = field(init=False, default=False)  # or it will be, for it was told to

    def __post_init__(self) -> None:
        self._lines = queue.Queue(_QUEUE)
        self._threads = [
            threading.Thread(target=work, name="frostline trackers", daemon=True)
            for work in (self._feed, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, line: Mapping[str, Any]) -> None:
        if self._gone:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            if not self._dropped:
                self._dropped = True
                _log.warning("trackers do not keep up: some of what they are told is left out")

    def close(self, status: Status) -> None:
        self._gone = True
        for line in ({"status": status}, None):
            with suppress(queue.Full):
                self._lines.put(line, timeout=1.0)
        if not _ends_within(_CLOSE_S, self.process):
            _log.warning("trackers were not done %.0f s after the run, and were ended", _CLOSE_S)
        for thread in self._threads:
            thread.join(1.0)

    def _feed(self) -> None:
        given = cast("Any", self.process.stdin)
        # The process may have ended: what it was not told, it was not told.
        with suppress(OSError, ValueError), given:
            while (line := self._lines.get()) is not None:
                given.write(json.dumps(finite_json(line)) + "\n")
                if self._lines.empty():
                    given.flush()

    def _listen(self) -> None:
        answers = cast("Any", self.process.stdout)
        with suppress(OSError, ValueError), answers:
            for answer in answers:
                with suppress(ValueError, KeyError, TypeError):
                    told = json.loads(answer)
                    _say_failed(told["tracker"], told["found"])
        code = self.process.wait()
        if not self._gone:
            self._gone = True
            _say_failed("whoever was tracking", f"their process ended by itself, code {code}")


def _say_failed(name: str, found: str) -> None:
    _log.warning("%s is told nothing more, the run goes on: %s", name, found)
