"""Trackers by name: what each is told, in its own words.

All keep what they are told on this machine, in the folder given, unless the tracker's own
environment variables say otherwise: ``MLFLOW_TRACKING_URI``, ``WANDB_MODE``, ``TRACKIO_DIR``,
``TRACKIO_SPACE_ID``, ``TRACKIO_SERVER_URL``. Their usage statistics stay off unless a variable
turns them on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from frostline.errors import MissingExtra

__all__ = [
    "TRACKERS",
    "About",
    "Status",
    "Tracker",
    "TrackerName",
    "check_installed",
    "open_tracker",
]

TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]
Status = Literal["finished", "unfinished", "failed"]

TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
_PROJECT = "frostline"
#: Their own switches against usage statistics; what is set already stays.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "DO_NOT_TRACK": "1",
}
#: Seconds between two writings of the growing list of decisions to MLflow.
_TEXT_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class About:
    """What a tracker is told first.

    Attributes:
        folder: where it keeps what it keeps.
        name: of the run.
        settings: of the run, plain JSON.
        step: updates complete: 0, or more where a run goes on.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    step: int = 0

    @property
    def identity(self) -> str:
        """The same for every session that writes into this folder."""
        file = self.folder / "id"
        try:
            return file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            file.write_text(secrets.token_hex(8), encoding="ascii")
            return self.identity


class Tracker(Protocol):
    """Something that keeps numbers and texts of a run."""

    def values(self, values: Mapping[str, float], step: int) -> None:
        """Keep numbers by name, as of so many updates."""
        ...

    def text(self, name: str, text: str, step: int) -> None:
        """Keep a text, as of so many updates."""
        ...

    def close(self, status: Status) -> None:
        """Write out what is left."""
        ...


def check_installed(names: Collection[TrackerName]) -> None:
    """Raise unless the packages of these trackers are there.

    Raises:
        MissingExtra: one is not; the message holds the line that installs it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise MissingExtra(
                f"log to {name}",
                found=f"no package {name!r} in this Python",
                fix="pip install 'frostline[trackers]'",
            )


def open_tracker(name: TrackerName, about: About) -> Tracker:
    """A tracker, ready. Meant for a process of its own: some change the one they are in.

    Args:
        name: which.
        about: the run.
    """
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    kinds: Mapping[TrackerName, type[Any]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _MLflow,
        "wandb": _WandB,
        "trackio": _Trackio,
    }
    about.folder.mkdir(parents=True, exist_ok=True)
    return kinds[name](about)


class _TensorBoard:
    """Event files in ``tensorboard``; a run that goes on hides what it does again."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  each when it is used

        purge = about.step + 1 if about.step else None
        self._writer = SummaryWriter(str(about.folder / "tensorboard"), purge_step=purge)
        if not about.step:
            self.text("settings", json.dumps(dict(about.settings), indent=2), 0)

    def values(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, f"```\n{text}\n```", step)  # it is read as Markdown

    def close(self, status: Status) -> None:
        self._writer.close()


class _MLflow:
    """A run of the experiment ``frostline``, the same one for every session."""

    _STATUS: Mapping[Status, str] = {
        "finished": "FINISHED",
        "unfinished": "KILLED",
        "failed": "FAILED",
    }

    def __init__(self, about: About) -> None:
        # Its store of plain files asks for this; a data base would need the whole of MLflow.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (about.folder / "mlflow").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        there = self._client.get_experiment_by_name(project)
        experiment = there.experiment_id if there else self._client.create_experiment(project)
        self._run = self._found(experiment, about.identity) or self._new(experiment, about)
        self._lines: list[str] = []
        self._due = 0.0

    def _found(self, experiment: str, identity: str) -> str | None:
        runs = self._client.search_runs([experiment], f"tags.`frostline.id` = '{identity}'")
        if not runs:
            return None
        self._client.update_run(runs[0].info.run_id, status="RUNNING")
        return runs[0].info.run_id

    def _new(self, experiment: str, about: About) -> str:
        tags = {"frostline.id": about.identity}
        run = self._client.create_run(experiment, tags=tags, run_name=about.name).info.run_id
        for name, value in about.settings.items():
            self._client.log_param(run, name, str(value)[:500])
        return run

    def values(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step)
            for name, value in values.items()
        ]
        for first in range(0, len(metrics), 500):  # it takes a thousand at once
            self._client.log_batch(self._run, metrics=metrics[first : first + 500])

    def text(self, name: str, text: str, step: int) -> None:
        self._lines.append(f"{step}\t{name}\t{text}")
        if time.monotonic() >= self._due:
            self._write()

    def close(self, status: Status) -> None:
        self._write()
        self._client.set_terminated(self._run, status=self._STATUS[status])

    def _write(self) -> None:
        if self._lines:
            self._client.log_text(self._run, "\n".join(self._lines) + "\n", "texts.tsv")
        self._due = time.monotonic() + _TEXT_EVERY_S


class _WandB:
    """An offline run, for `wandb sync`, unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, about: About) -> None:
        import wandb  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=about.name,
            id=about.identity,
            dir=os.environ.get("WANDB_DIR") or str(about.folder),
            config=dict(about.settings),
            mode=os.environ.get("WANDB_MODE", "offline"),  # pyright: ignore[reportArgumentType]
            resume="allow",
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
        # Its own steps may not go back, as those of a run do that goes on from a checkpoint.
        self._run.define_metric("*", step_metric="update")

    def values(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"update": step, **values})

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({"update": step, name: text})

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=int(status == "failed"))


class _Trackio:
    """A data base in ``trackio``, unless ``TRACKIO_DIR`` says otherwise."""

    def __init__(self, about: About) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((about.folder / "trackio").absolute()))
        # It reads the variable when it is imported.
        import trackio  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or _PROJECT,
            name=about.name,
            config=dict(about.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def values(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: text}, step=step)

    def close(self, status: Status) -> None:
        self._run.finish()
