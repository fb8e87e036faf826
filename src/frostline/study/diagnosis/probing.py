"""A probe of the network that a run began with, on the run's own data: evidence to diagnose by."""

from __future__ import annotations

from pathlib import Path

from frostline import _io
from frostline.backends.torch.grouping import layer_groups
from frostline.errors import DataError
from frostline.records import RunRecord, read_run
from frostline.tasks.config import load_config
from frostline.tasks.features import collect_features
from frostline.tasks.probes import ProbeCurve, ProbePoint, probe_curve
from frostline.tasks.resources import borrowed_process, pick_device
from frostline.tasks.task import Task, load_task

__all__ = ["ProbeCurve", "ProbePoint", "probe_run", "read_probe"]


def probe_run(run: RunRecord | str | Path) -> ProbeCurve:
    """Probe every layer group of the pretrained network of a run, on the run's samples.

    Data and pretrained weights are read again as the run read them; nothing is trained but linear
    probes, and the test split is not looked at. Takes about as long as an epoch of forward passes.

    Args:
        run: its record or folder; it need not be finished.

    Raises:
        ConfigError: settings that this version does not have.
        DataError: no record there, the data cannot be read, or is not what the run learned from.
        ModelError: the model or its weights cannot be had, or cannot be probed.
        DamagedFile: the record cannot be read.

    Example:
        ::

            found = diagnose("runs/resnet18-full-001", probe=probe_run("runs/resnet18-full-001"))
    """
    record = run if isinstance(run, RunRecord) else read_run(run)
    config = load_config(None, record.header["config"])
    device = pick_device(config.device)
    with borrowed_process(config.threads):
        task = load_task(config)
        _check_same_data(task, record)
        groups = layer_groups(task.model, task.example(), head=task.head)
        model = task.model.to(device)
        train, val = (
            collect_features(task, model, split, groups, device=device)
            for split in (task.train, task.val)
        )
        return probe_curve(train, val, seed=config.seed)


def _check_same_data(task: Task, record: RunRecord) -> None:
    for split, digest in task.notes["content_sha256"].items():
        if digest != record.header["data"][split]["content_sha256"]:
            raise DataError(
                f"probe the network of {record.path}",
                found=f"{split} samples in {task.config.data} that are not those of the run",
                fix="the data as it was, or a run on the data as it is",
            )


def read_probe(path: str | Path) -> ProbeCurve:
    """A probe from the file that `frostline diagnose --probe --save` or `ProbeCurve.to_json` left.

    Raises:
        DataError: no such file, or not one of these.
        DamagedFile: no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"read the probe {path}", found="no such file", fix="a file of ProbeCurve.to_json"
        )
    return ProbeCurve.from_json(_io.load_json(path))
