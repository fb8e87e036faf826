"""Compare freezing policies in one call: the runs, their records, and what they say."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.errors import ConfigError
from frostline.policy import Policy
from frostline.study.analysis import Comparison, analyse
from frostline.study.runner import OnEvent, open_study, run_study
from frostline.study.spec import StudySpec, arms_of, controls_of
from frostline.tasks.config import RunConfig, load_config

__all__ = ["Study", "compare", "declare"]

#: What a study says by itself, so that no run of it may be told otherwise.
_OWN = {"policy", "seed", "output"}


@dataclass(frozen=True, slots=True)
class Study:
    """A study in its folder, finished or not.

    Attributes:
        path: the folder.

    Example:
        >>> Study(Path("studies/flowers5-resnet18")).path.name
        'flowers5-resnet18'
    """

    path: Path

    def analyse(
        self,
        *,
        reference: str | None = None,
        margin: float | None = None,
        level: float | None = None,
        target: float | None = None,
    ) -> Comparison:
        """What the records say; see `frostline.study.analysis.analyse`."""
        return analyse(self.path, reference=reference, margin=margin, level=level, target=target)


def compare(  # noqa: PLR0913 - all by name, all with defaults
    model: str,
    data: str | Path,
    policies: Sequence[str | Policy] | Mapping[str, Any] = (
        "full",
        "linear-probe",
        "gradual",
        "auto",
    ),
    *,
    seeds: int | Sequence[int] = 3,
    controls: Sequence[str] = (),
    reference: str | None = None,
    margin: float = 0.01,
    level: float = 0.95,
    target: float | None = None,
    output: str | Path | None = None,
    isolate: bool = True,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> Study:
    """Fine-tune under several policies with several seeds, and compare them fairly.

    All runs have one budget (`epochs`, or `budget` in updates, seconds or operations) and the same
    seeds; arms take turns in an order that is reversed with every seed. They share one store of
    frozen outputs, and what a run finds there is charged to it. Called again with the same
    arguments it goes on where it was; with more policies or seeds it does what is missing.

    Args:
        model: what to fine-tune, as `fit` takes it.
        data: what to learn from.
        policies: short forms or policies; or names with one of these, or with a mapping of "policy"
            and settings.
        seeds: how many, from 0; or which.
        controls: of "time" (full fine-tuning in the seconds of each arm), "compute" (a static
            prefix of equal backward work) and "placebo" (signals shuffled).
        reference: name of the arm that the others are compared with; by default "full" if it is
            there, else the first. A study that is gone on with keeps its own.
        margin: how much worse in accuracy (a share: 0.01 is a point) still counts as not worse.
            It is declared before the runs and cannot be changed by going on.
        level: at which all intervals hold together, (0, 1).
        target: validation accuracy that times are taken to, (0, 1]; by default the reference's mean
            less the margin, which is known only afterwards.
        output: the study's folder; by default under "studies", named after data and model.
        isolate: give each run a process of its own, so that its memory is its own.
        on_event: receives progress.
        **settings: any field of `RunConfig` but policy, seed and output.

    Raises:
        ConfigError: unknown or contradictory settings, or another study in the folder.
        PolicyError: an unknown policy or option.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
        FrostlineError: what stops every run alike.

    Example:
        ::

            study = frostline.compare("timm:resnet18", "photos/", ["full", "first:fraction=0.5"])
            print(study.analyse().because)
    """
    spec = declare(
        {"model": model, "data": str(data)} | settings,
        policies,
        seeds=seeds,
        controls=controls,
        reference=reference,
        margin=margin,
        level=level,
        target=target,
    )
    path = Path(output) if output is not None else default_folder(spec)
    same = reference is not None
    with open_study(path, spec, same_reference=same) as (folder, whole):
        run_study(folder, whole, isolate=isolate, on_event=on_event)
    return Study(path)


def declare(
    settings: Mapping[str, Any],
    policies: Iterable[str | Policy] | Mapping[str, Any],
    *,
    seeds: int | Iterable[int] = 3,
    controls: Sequence[str] = (),
    reference: str | None = None,
    margin: float = 0.01,
    level: float = 0.95,
    target: float | None = None,
) -> StudySpec:
    """A study from what a user says, checked as far as it can be without running anything.

    Raises:
        ConfigError: settings that no run takes, or that the study says by itself.
        PolicyError: an unknown policy or option.

    Example:
        >>> spec = declare({"model": "timm:resnet18", "data": "photos"}, ["full", "bitfit"])
        >>> spec.reference, spec.seeds
        ('full', (0, 1, 2))
    """
    if odd := sorted(_OWN & settings.keys()):
        raise ConfigError(
            f"set {odd[0]} for a whole study",
            found="something that differs from run to run",
            fix={"policy": "policies=[...]", "seed": "seeds=[...]"}.get(odd[0], "output="),
        )
    arms = arms_of(policies)
    for arm in arms:
        if odd := sorted(_OWN & arm.settings.keys()):
            raise ConfigError(
                f"set {odd[0]} in the arm {arm.name!r}",
                found="the study's own say",
                fix="policy, and settings other than seed and output",
            )
        load_config(None, {**settings, **arm.settings, "policy": arm.policy})
    names = [arm.name for arm in arms]
    fallback = "full" if "full" in names else (names[0] if names else "")
    plain = load_config(None, dict(settings)).model_dump(mode="json", exclude_unset=True)
    return StudySpec(
        settings=plain,
        arms=(*arms, *controls_of(arms, controls)),
        seeds=_seeds(seeds),
        reference=reference or fallback,
        margin=margin,
        level=level,
        target=target,
    )


def _seeds(seeds: int | Iterable[int]) -> tuple[int, ...]:
    """The seeds; a number is how many.

    Raises:
        ConfigError: neither a whole number nor whole numbers.

    Example:
        >>> _seeds(3), _seeds([4, 5])
        ((0, 1, 2), (4, 5))
    """
    try:
        if isinstance(seeds, bool | str):
            raise TypeError  # noqa: TRY301  Python counts True as 1
        if isinstance(seeds, Iterable):
            return tuple(map(operator.index, seeds))
        return tuple(range(operator.index(seeds)))
    except TypeError:
        raise ConfigError(
            f"use the seeds {seeds!r}",
            found="neither a whole number nor a list of them",
            fix="seeds=3 for 0, 1 and 2; or seeds=[4, 5, 6]",
        ) from None


def default_folder(spec: StudySpec) -> Path:
    """Where a study lives that was not told where to.

    Example:
        >>> spec = declare({"model": "timm:resnet18", "data": "my/photos"}, ["full"])
        >>> default_folder(spec).as_posix()
        'studies/photos-resnet18'
    """
    config = RunConfig(**spec.settings)
    parts = [Path(config.data.rpartition(":")[2]).stem, config.model.rpartition(":")[2]]
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(part).name).strip("-.") for part in parts]
    return Path("studies") / "-".join(name or "x" for name in names)
