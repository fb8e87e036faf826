"""The command, versions and settings that give the same runs again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frostline.report.read import ReportRun, Runs
from frostline.tasks.config import RunConfig

if TYPE_CHECKING:
    from frostline.study.spec import StudySpec

__all__ = ["Repeat", "fit_command", "repeat"]

#: Settings of the machine rather than of the run; where its folders are is nobody's business.
_LEFT_OUT = {"output", "cache_dir", "model", "data", "policy"}
_OF_A_STUDY = {"seed"}
#: Settings that follow from the number of training samples.
_SIZED = {"train_samples", "epochs", "budget", "checkpoint_every", "patience"}
#: Of intervals, where nothing else is said.
_LEVEL = 0.95
#: What a record tells of the machine and the libraries.
_VERSIONS = ("python", "torch", "keras", "tensorflow", "jax", "device", "machine", "threads")


@dataclass(frozen=True, slots=True)
class Repeat:
    """What it takes to do a report's runs again.

    Attributes:
        commands: lines for a shell.
        notes: what the commands leave out.
        versions: what the runs were made with, by name.
        settings: every setting of the runs with its default resolved; where runs differ, all
            values that occur.
        data: by split, the number of samples and digests of labels and contents.
    """

    commands: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    settings: Mapping[str, str]
    data: Mapping[str, Mapping[str, str]]


def repeat(runs: Runs) -> Repeat:
    """How to do these runs again."""
    if runs.comparison is None:
        headers = [run.record.header for run in runs.runs]
        commands = dict.fromkeys(fit_command(h["asked"]) for h in headers if "loop" not in h)
        notes = tuple(
            f"{run.name} was recorded in {run.record.header['loop']}: run that program again"
            for run in runs.runs
            if "loop" in run.record.header
        )
    else:
        command, notes = (_curve_command if runs.learning else _compare_command)(runs)
        commands = {command: None}
    first = runs.runs[0]
    facts: Mapping[str, Mapping[str, Any]] = first.record.header.get("data", {})
    return Repeat(
        commands=tuple(commands),
        notes=notes,
        versions=_versions(runs.runs),
        settings=_settings(runs.runs),
        data={
            split: {name: str(value) for name, value in sorted(found.items())}
            for split, found in facts.items()
        },
    )


def fit_command(asked: Mapping[str, Any]) -> str:
    """The line for a shell that fits with these settings; those at their defaults are left out.

    Args:
        asked: settings by name, as the header of a record has them.

    Example:
        >>> fit_command({"model": "timm:resnet18", "data": "my photos", "policy": "full",
        ...              "epochs": 5, "lr": None, "live_norm": True, "patience": None})
        "frostline fit timm:resnet18 'my photos' --policy full --epochs 5 --patience null --live-norm"
    """  # noqa: E501  one line is what it is about
    flags = ["--policy", str(asked["policy"]), *_flags(asked, without=_LEFT_OUT)]
    return _line(["frostline", "fit", str(asked["model"]), str(asked["data"]), *flags])


def _compare_command(runs: Runs) -> tuple[str, tuple[str, ...]]:
    assert runs.comparison is not None  # noqa: S101  the caller looked
    spec = runs.comparison.spec
    policies = [arm.policy for arm in spec.arms if arm.control is None]
    controls = dict.fromkeys(arm.control for arm in spec.arms if arm.control is not None)
    words = ["frostline", "compare", str(spec.settings["model"]), str(spec.settings["data"])]
    words += ["--policies", *policies, "--seeds", _seeds(spec)]
    words += ["--controls", *controls] if controls else []
    words += ["--reference", spec.reference, "--margin", str(spec.margin)]
    words += ["--level", str(spec.level)] if spec.level != _LEVEL else []
    words += ["--target", str(spec.target)] if spec.target is not None else []
    words += _flags(spec.settings, without=_LEFT_OUT | _OF_A_STUDY)
    own = [arm.name for arm in spec.arms if arm.settings and arm.control is None]
    return _line(words), _only_python(own)


def _curve_command(runs: Runs) -> tuple[str, tuple[str, ...]]:
    assert runs.comparison is not None  # noqa: S101  the caller looked
    spec = runs.comparison.spec
    arms = {arm.name.rpartition("@")[0]: arm for arm in spec.arms}
    sizes = sorted({int(arm.settings["train_samples"]) for arm in spec.arms})
    words = ["frostline", "learning-curve"]
    words += [str(spec.settings["model"]), str(spec.settings["data"])]
    words += ["--policies", *(arm.policy for arm in arms.values())]
    words += ["--sizes", *map(str, sizes), "--seeds", _seeds(spec)]
    # It stops no run early unless it is asked to.
    patient = {"patience"} if spec.settings.get("patience") is None else set[str]()
    words += _flags(spec.settings, without=_LEFT_OUT | _OF_A_STUDY | patient)
    return _line(words), _only_python(
        [n for n, arm in arms.items() if arm.settings.keys() - _SIZED]
    )


def _seeds(spec: StudySpec) -> str:
    """How many from 0, or which."""
    if spec.seeds == tuple(range(len(spec.seeds))):
        return str(len(spec.seeds))
    return ",".join(map(str, spec.seeds))


def _only_python(own: Sequence[str]) -> tuple[str, ...]:
    if not own:
        return ()
    return (f"settings of their own, which only Python can give: {', '.join(own)}; see study.json",)


def _flags(given: Mapping[str, Any], *, without: set[str]) -> list[str]:
    words: list[str] = []
    switches: list[str] = []
    for name, field in RunConfig.model_fields.items():
        if name in without or name not in given or given[name] == field.default:
            continue
        flag, value = name.replace("_", "-"), given[name]
        if isinstance(value, bool):
            switches.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", _written(value)]
    return [*words, *switches]


def _written(value: Any) -> str:
    if value is None:
        return "null"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _line(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _versions(runs: Sequence[ReportRun]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        header = run.record.header
        costs: Mapping[str, Any] = header.get("costs", {})
        values = {"frostline": header.get("frostline")} | {
            name: costs.get(name) for name in _VERSIONS
        }
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return {name: " or ".join(values) for name, values in found.items()}


def _settings(runs: Sequence[ReportRun]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in run.config.items():
            if name not in ("output", "cache_dir"):
                found.setdefault(name, {})[_written(value)] = None
    return {name: " · ".join(values) for name, values in sorted(found.items())}
