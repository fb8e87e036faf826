"""What a run of `fit` tells the trackers of its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frostline.driver import Driver
from frostline.integrations.trackers import Status, TrackerName
from frostline.integrations.tracking import DriverLog, open_tracking
from frostline.tasks.folder import RunFolder

__all__ = ["RunTracking"]

#: Numbers of single updates are told at most about this often in a run.
_POINTS = 1000


class RunTracking:
    """Trackers of one session of a run.

    Args:
        folder: of the run.
        trackers: their names.
        settings: of the run, as asked.
        driver: of this session, restored.

    Raises:
        MissingExtra: the package of a tracker is not installed.
    """

    def __init__(
        self,
        folder: RunFolder,
        trackers: Sequence[TrackerName],
        settings: Mapping[str, Any],
        driver: Driver,
    ) -> None:
        self._tracking = open_tracking(
            trackers,
            folder.trackers,
            name=folder.path.name,
            settings=settings,
            step=driver.progress.step,
        )
        self._log = DriverLog(driver, self._tracking)
        self._loss: list[float] = []

    def updated(self, event: Mapping[str, Any]) -> None:
        """An update: loss (a mean over those since the last point), rate, time saved."""
        self._loss.append(event["loss"])
        every = max(1, (event["total_steps"] or 0) // _POINTS)
        if event["step"] % every:
            self._log.log(step=event["step"])  # signals are told when they are read
            return
        values = {"train/loss": sum(self._loss) / len(self._loss), "train/lr": event["lr"]}
        if event["saved_predicted_s"] is not None:
            values["time/saved_predicted_s"] = event["saved_predicted_s"]
        self._loss.clear()
        self._log.log(values, step=event["step"])

    def evaluated(self, step: int, metrics: Mapping[str, float], costs: Mapping[str, Any]) -> None:
        """The end of an epoch: its metrics and what the run cost so far."""
        known = {name: value for name, value in costs.items() if value is not None}
        self._log.log({f"epoch/{name}": value for name, value in metrics.items()}, step=step)
        self._log.log({f"cost/{name}": float(value) for name, value in known.items()}, step=step)

    def summary(self, step: int, summary: Mapping[str, Any]) -> None:
        """The end of the run: every number of its summary."""
        numbers = {n: v for n, v in summary.items() if isinstance(v, (int, float))}
        self._log.log({f"summary/{name}": float(v) for name, v in numbers.items()}, step=step)

    def close(self, status: Status) -> None:
        """Let them write what they have; waits for them, but not for ever."""
        self._log.detach()
        self._tracking.close(status)
