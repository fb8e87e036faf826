"""`frostline choose`: which pretrained model to fine-tune on your data, before any training."""

# ruff: noqa: PLC0415  what runs models is imported when they run

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from frostline.cli.flags import setting_from_text
from frostline.cli.inspect import time_text
from frostline.cli.terminal import (
    bytes_text,
    console,
    count_text,
    escape,
    print_json,
    print_table,
)
from frostline.errors import ConfigError, few
from frostline.tasks import strict_yaml
from frostline.tasks.config import RunConfig

if TYPE_CHECKING:
    from frostline.study.choose import Candidate, Choice, Wanted

__all__ = ["advice", "choose"]

By = Literal["probe", "logme", "h_score", "shrunk_h_score", "gbc", "leep", "nce"]
_TITLES: Mapping[str, str] = {
    "probe": "probe",
    "logme": "LogME",
    "h_score": "H-score",
    "shrunk_h_score": "shrunk H-score",
    "gbc": "GBC",
    "leep": "LEEP",
    "nce": "NCE",
}
_COLUMNS = {
    "rank": "right",
    "model": "left",
    "probe": "right",
    "95 % interval": "right",
    "behind": "right",
    **dict.fromkeys(list(_TITLES.values())[1:], "right"),
    "parameters": "right",
    "epoch": "right",
    "probing": "right",
    "memory": "right",
}
_LEGEND = """\
probe:    accuracy of a linear classifier on frozen features, cross-validated, and its interval
behind:   share of resamples in which the first of the ranking is ahead of this one
others:   scores of the same features, and of the source classes; higher is better
epoch:    of full fine-tuning, from trial steps
probing:  an epoch of linear probing, without stored features
memory:   weights, and what steps of full fine-tuning use above them at their peak"""
_SETTING = re.compile(r",(?=[a-z_]+=)")


def choose(  # noqa: PLR0913  one per flag
    data: Annotated[str, Parameter(help="What to learn from, as for fit.")],
    *models: Annotated[
        str,
        Parameter(
            help="As for fit; settings of its own follow: 'timm:resnet18,weights=FILE,"
            "image_size=64'. A name to show: ',name=TEXT'."
        ),
    ],
    settings: Annotated[
        Path | None,
        Parameter(
            help="YAML file: settings for all models, and 'models', a list of models "
            "or of mappings with 'model' and its own settings."
        ),
    ] = None,
    limit: Annotated[int, Parameter(help="Training samples to look at, at most.")] = 1000,
    by: Annotated[By, Parameter(help="The score that ranks.")] = "probe",
    seed: Annotated[int | None, Parameter(help="Draws samples and folds.")] = None,
    batch_size: Annotated[
        int | None, Parameter(help="Samples in a trial step; by default 32.")
    ] = None,
    image_size: Annotated[
        int | None, Parameter(help="Side of the picture in pixels, for all models.")
    ] = None,
    threads: Annotated[int | None, Parameter(help="CPU threads for arithmetic.")] = None,
    costs: Annotated[
        bool, Parameter(help="Whether to run trial steps, for times and memory.")
    ] = True,
    json: Annotated[bool, Parameter(negative="", help="Print JSON.")] = False,
    quiet: Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="No progress.")] = False,
) -> None:
    """Rank pretrained models for your data by scores of their frozen features.

    Nothing is trained but linear classifiers on features. Only training samples are looked at.
    """
    from frostline.study.choose import choose as choose_model

    shared, listed = _from_file(settings)
    flags = {
        "seed": seed,
        "batch_size": batch_size,
        "image_size": image_size,
        "threads": threads,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    found = choose_model(
        data,
        [*listed, *map(_from_text, models)],
        by=by,
        limit=limit,
        costs=costs,
        progress=None if quiet else _show,
        **shared | given,
    )
    if json:
        print_json(found.to_json() | {"advice": advice(found)})
        return
    _print(found)


def _show(line: str) -> None:
    sys.stderr.write(f"scoring {escape(line)}\n")


# -- what is asked ----------------------------------------------------------------------------


def _from_text(text: str) -> Mapping[str, Any]:
    """A model and its own settings, as on the command line.

    Example:
        >>> _from_text("timm:resnet18,image_size=64,image_mean=0.5,0.5,0.5")
        {'model': 'timm:resnet18', 'image_size': '64', 'image_mean': ('0.5', '0.5', '0.5')}
    """
    model, *settings = _SETTING.split(text)
    pairs = (setting.split("=", 1) for setting in settings)
    return {"model": model} | {
        name: setting_from_text(name, value) if name in RunConfig.model_fields else value
        for name, value in pairs
    }


def _from_file(path: Path | None) -> tuple[dict[str, Any], list[Wanted]]:
    """Settings for all models, and models.

    Raises:
        ConfigError: no such file, or not of this form.
    """
    if path is None:
        return {}, []
    values = dict(strict_yaml.parse(_read(path), source=str(path)).values)
    models = values.pop("models", [])
    if not isinstance(models, list) or not all(isinstance(m, str | dict) for m in models):
        raise ConfigError(
            f"read the models in {path}",
            found="no list of models",
            fix="models: [timm:resnet18, {model: timm:resnet34, weights: FILE}]",
        )
    for key in ("model", "data"):
        if key in values:
            raise ConfigError(
                f"set {key!r} in {path}",
                found="a setting that is not for all models",
                fix="data on the command line; models in the list 'models'",
            )
    return values, models


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(strict_yaml.MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or NUL in the name
        raise ConfigError(
            f"read {path}", found=str(error), fix="a YAML text file in UTF-8"
        ) from error


# -- what is shown ----------------------------------------------------------------------------


def _print(found: Choice) -> None:
    rows = [_cells(place, c) for place, c in enumerate(found.candidates, 1)]
    filled = [i for i, _ in enumerate(_COLUMNS) if any(row[i] is not None for row in rows)]
    names = list(_COLUMNS)
    print_table(
        {names[i]: _COLUMNS[names[i]] for i in filled},
        [[row[i] for i in filled] for row in rows],
        title=_title(found),
    )
    out = console(sys.stdout)
    for line in (*_LEGEND.splitlines(), *_notes(found), "", advice(found)):
        out.print(escape(line), soft_wrap=True)


def _title(found: Choice) -> str:
    return (
        f"{found.data}: {found.samples} of {found.train_samples} training samples, "
        f"{found.classes} classes, ranked by {_TITLES[found.by]}"
    )


def _cells(place: int, candidate: Candidate) -> tuple[str | None, ...]:
    scores, costs = candidate.scores, candidate.costs
    low, high = candidate.interval
    return (
        str(place),
        candidate.name,
        _percent(scores["probe"]),
        f"{100 * low:.1f} to {100 * high:.1f} %",
        None if candidate.ahead is None else f"{100 * candidate.ahead:.0f} %",
        *(_figure(scores[name]) for name in list(_TITLES)[1:]),
        count_text(candidate.parameters),
        None if costs is None else time_text(costs.full_epoch_s),
        None if costs is None else time_text(costs.probing_epoch_s),
        None if costs is None or costs.full_memory_bytes is None
        else bytes_text(costs.full_memory_bytes),
    )  # fmt: skip


def _figure(score: float | None) -> str | None:
    return None if score is None else f"{score:.3f}" if abs(score) < 10 else f"{score:.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _notes(found: Choice) -> Iterator[str]:
    for note in dict.fromkeys(n for c in found.candidates for n in c.notes):
        of = [c.name for c in found.candidates if note in c.notes]
        yield f"note: {note} ({few(of)})"
    if any(c.costs is not None and c.costs.disturbed for c in found.candidates):
        yield "note: other programs had the processor for part of the time; times are too long"
    for failure in found.failures:
        yield f"left out: {failure.name}: {failure.error.found}"
    yield f"note: this took {found.spent_s:.0f} s"


def advice(found: Choice) -> str:
    """What to do, in a sentence or two: with what it rests on and what it costs."""
    best, near = found.best, found.near
    if best.interval[0] <= found.majority_share:
        return (
            f"None of these features is shown to tell the classes apart: {best.name} gets "
            f"{_percent(best.scores['probe'])} right, and always answering the largest class "
            f"{_percent(found.majority_share)}."
        )
    taken = _cheapest((best, *near))
    if near:
        names = [c.name for c in (best, *near)]
        first = (
            f"{few(names[:-1])} and {names[-1]} cannot be told apart on these samples ({best.name} "
            f"is ahead of {near[0].name} in {100 * (near[0].ahead or 0):.0f} % of resamples): "
            f"take the cheapest of them, {taken.name}; {_ground(found, taken)}"
        )
    else:
        first = f"Take {taken.name}: {_ground(found, taken)}{_lead(found)}"
    return f"{first}. {_price(taken)}".rstrip()


def _ground(found: Choice, taken: Candidate) -> str:
    if found.by != "probe":
        return f"its {_TITLES[found.by]} is {_figure(taken.scores[found.by])}"
    low, high = (100 * end for end in taken.interval)
    right = _percent(taken.scores["probe"])
    return f"a linear probe on its features gets {right} right ({low:.1f} to {high:.1f} %)"


def _lead(found: Choice) -> str:
    if found.sure is None:
        return ", and no other model was scored" if len(found.candidates) == 1 else ""
    return f", ahead of {found.candidates[1].name} in {100 * found.sure:.0f} % of resamples"


def _cheapest(candidates: Sequence[Candidate]) -> Candidate:
    """By an epoch of full fine-tuning where all have one, else by parameters."""
    times = [c.costs.full_epoch_s for c in candidates if c.costs is not None]
    if len(times) < len(candidates):
        return min(candidates, key=lambda c: c.parameters)
    return candidates[times.index(min(times))]


def _price(candidate: Candidate) -> str:
    costs = candidate.costs
    if costs is None:
        return f"It has {count_text(candidate.parameters)} parameters."
    full = _joined(time_text(costs.full_epoch_s), costs.full_memory_bytes)
    probing = _joined(time_text(costs.probing_epoch_s), costs.probing_memory_bytes)
    return f"An epoch of full fine-tuning takes {full}, of linear probing {probing}."


def _joined(time: str, memory_bytes: int | None) -> str:
    parts: Iterable[str] = (time,) if memory_bytes is None else (time, bytes_text(memory_bytes))
    return " and ".join(parts)
