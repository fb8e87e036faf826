"""The main job in one call: `fit` a model to data under a freezing policy, `load` what came out.

A run lives in one folder, and calling `fit` again with the same settings goes on with it: an
interrupted run resumes where it was, a finished one is returned as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline import _io
from frostline.errors import ConfigError, DataError
from frostline.policy import Policy
from frostline.records import RunRecord, read_run
from frostline.registry import short_form
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.folder import RunFolder, claim, log_to
from frostline.tasks.resources import borrowed_process

if TYPE_CHECKING:
    from frostline.tasks.saved import Loaded
    from frostline.tasks.session import OnEvent

__all__ = ["Run", "fit", "load"]

_log = logging.getLogger("frostline")


@dataclass(frozen=True, slots=True)
class Run:
    """A run in its folder, finished or not.

    Attributes:
        path: the folder.

    Example:
        >>> Run(Path("runs/resnet18-gradual-001")).path.name
        'resnet18-gradual-001'
    """

    path: Path

    @property
    def config(self) -> RunConfig:
        """The settings, with every default resolved."""
        return load_config(RunFolder(self.path).config)

    @property
    def record(self) -> RunRecord:
        """What happened: epochs, decisions, proof."""
        return read_run(self.path)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Metrics of each evaluated epoch, in order."""
        return [
            {name: float(value) for name, value in line["metrics"].items()}
            for line in self.record.epochs
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """Results and costs of a finished run: accuracies, seconds, bytes, shares.

        Raises:
            DataError: the run is not finished.
        """
        file = RunFolder(self.path).summary
        if not file.exists():
            raise DataError(
                f"summarise the run {self.path}",
                found="a run that is not finished",
                fix="go on with it: call fit with the same settings and output",
            )
        return _io.load_json(file)


def fit(
    model: str | None = None,
    data: str | Path | None = None,
    policy: str | Policy | None = None,
    *,
    config: RunConfig | str | Path | None = None,
    fresh: bool = False,
    on_event: OnEvent | None = None,
    pause_after: int | None = None,
    **settings: Any,
) -> Run:
    """Fine-tune a model under a freezing policy, from data to a tested, saved model.

    An unfinished run of the same settings in the same folder is gone on with, and a finished one
    returned as it is. The caller's random streams, threads and Ctrl-C handling are as before
    when it returns.

    Args:
        model: what to fine-tune, e.g. "timm:resnet18".
        data: what to learn from, e.g. a folder of class folders.
        policy: what is frozen when, e.g. "gradual:every=1ep" (the default is auto), or a
            `Policy` of registered classes, also a combined one.
        config: settings, or a YAML file of them; what is given here by name wins.
        fresh: start over: an earlier run in the same folder is moved aside, never overwritten.
        on_event: receives progress: mappings with "kind" (start, step, epoch, decision,
            checkpoint, end).
        pause_after: leave the run unfinished once so many epochs are complete; the same call with
            another number or none goes on with it.
        **settings: any field of `RunConfig`, e.g. `epochs=5, lr=3e-4, output="runs/first"`.

    Raises:
        ConfigError: unknown or contradictory settings, or another run in the folder.
        PolicyError: unknown policy or option, or a policy that has no short form.
        DataError: the data cannot be used.
        ModelError: the model cannot be had.
        TrainingError: training cannot go on.
        StorageError: a file cannot be written or read; what was saved before is intact.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.

    Example:
        Five lines from data to a model in use::

            import frostline
            run = frostline.fit("timm:resnet18", "photos/", "gradual", epochs=5)
            print(run.summary["test_accuracy"])
            model = frostline.load(run)
            print(model.predict(["new.jpg"]))
    """
    given = {"model": model, "data": data, "policy": policy} | settings
    resolved = _settings(config, {k: v for k, v in given.items() if v is not None or k in settings})
    with claim(resolved, fresh=fresh) as folder:
        if folder.summary.exists():
            _log.info("%s is finished already", folder.path)
            return Run(folder.path)
        # Only a run that trains pays for importing what training needs.
        from frostline.tasks.session import run_session  # noqa: PLC0415

        with log_to(folder.log), borrowed_process(resolved.threads):
            run_session(resolved, folder, on_event or _ignore, pause_after=pause_after)
        return Run(folder.path)


def load(run: Run | str | Path) -> Loaded:
    """The tuned model of a run, in evaluation mode, with its preparation and labels.

    Args:
        run: a finished run, its folder, or a copy of its ``model`` folder.

    Raises:
        DataError: no model there.
        DamagedFile: a file of it was changed.
    """
    from frostline.tasks.saved import load_saved  # noqa: PLC0415

    path = run.path if isinstance(run, Run) else Path(run)
    folder = RunFolder(path).model if RunFolder(path).model.is_dir() else path
    if not (folder / "manifest.json").is_file():
        raise DataError(
            f"load the model of {path}",
            found="no finished run there" if path.is_dir() else "no such folder",
            fix="give the folder of a finished run, as fit printed it",
        )
    _io.verify_folder(folder)
    return load_saved(folder)


def _settings(config: RunConfig | str | Path | None, given: dict[str, Any]) -> RunConfig:
    if isinstance(given.get("policy"), Policy):
        given["policy"] = short_form(given["policy"])
    if isinstance(given.get("data"), Path):
        given["data"] = str(given["data"])
    if not isinstance(config, RunConfig):
        return load_config(config, given)
    if unknown := given.keys() - RunConfig.model_fields.keys():
        raise ConfigError(
            f"set {min(unknown)!r}",
            found="no setting of that name",
            fix=f"one of {', '.join(RunConfig.model_fields)}",
        )
    return load_config(None, config.model_dump(exclude_unset=True) | given)


def _ignore(event: dict[str, Any]) -> None:
    del event
