"""What policies share: plans, readings, seeded choices and checks of options."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State, read_metric
from frostline.signals import Need

__all__ = [
    "NORM_SHIFTS",
    "backbone",
    "check_interval",
    "check_options",
    "choice",
    "finite",
    "freeze_first",
    "freeze_only",
    "freeze_parameters",
    "improved",
    "input_end",
    "metric",
    "new_reading",
    "often",
    "readings_from_start",
]

#: What frameworks call the shift of a normalisation layer, which is a bias.
NORM_SHIFTS = ("bias", "beta", "shift")


def backbone(groups: LayerGroups) -> list[str]:
    """Names of the groups that are not the head, in execution order."""
    return [g.name for g in groups if g.name not in groups.head]


def input_end(groups: LayerGroups) -> list[str]:
    """The first group of the backbone that has parameters, after those before it that have none.

    Example:
        >>> from frostline.testing import example_groups
        >>> input_end(example_groups(4))
        ['block0']
    """
    names = backbone(groups)
    end = next((i for i, name in enumerate(names) if groups[name].parameters), -1)
    return names[: end + 1]


def freeze_first(groups: LayerGroups, count: int, reason: str = "") -> FreezePlan:
    """Freeze the first `count` groups of the backbone (all of them if there are fewer).

    Example:
        >>> from frostline.testing import example_groups
        >>> sorted(freeze_first(example_groups(4), 2).frozen)
        ['block0', 'block1']
    """
    return FreezePlan(frozen=frozenset(backbone(groups)[: max(0, count)]), reason=reason)


def freeze_only(groups: LayerGroups, names: Iterable[str], reason: str = "") -> FreezePlan:
    """Freeze these groups, save those of the head."""
    return FreezePlan(frozen=frozenset(names) - groups.head, reason=reason)


def freeze_parameters(
    groups: LayerGroups, names: Iterable[str], *, done: bool = False, reason: str = ""
) -> FreezePlan:
    """Freeze single parameters; the rest of their groups trains as if nothing were frozen.

    Example:
        >>> from frostline.testing import example_groups
        >>> plan = freeze_parameters(example_groups(), ["block0.weight"])
        >>> sorted(plan.frozen_parameters(example_groups()))
        ['block0.weight']
    """
    held: dict[str, set[str]] = {}
    for name in names:
        held.setdefault(groups.of_parameter(name).name, set()).add(name)
    exempt = {group: groups[group].parameter_names - frozen for group, frozen in held.items()}
    partly = frozenset(group for group, rest in exempt.items() if rest)
    return FreezePlan(
        frozen=frozenset(held),
        exempt=exempt,
        live_norm=partly,
        live_dropout=partly,
        done=done,
        reason=reason,
    )


def new_reading(state: State, event: Event, signal: str) -> Mapping[str, float] | None:
    """The values of a signal if they are newer than `state["seen"]`, else None.

    The caller keeps `event.sampled[signal]` as `"seen"` in its next state.
    """
    at = event.sampled.get(signal)
    return None if at is None or at == state.get("seen") else event.signals[signal]


def finite(units: Iterable[str], values: Mapping[str, float]) -> dict[str, float]:
    """The values of those of the units that have one that is a finite number.

    Example:
        >>> finite(["a", "b", "c"], {"b": 2.0, "c": float("nan")})
        {'b': 2.0}
    """
    return {u: values[u] for u in units if math.isfinite(values.get(u, math.nan))}


def metric(event: Event, name: str) -> float:
    """A validation metric of an evaluation.

    Raises:
        PolicyError: the evaluation has no metric of this name.
    """
    return read_metric(event.metrics, name, f"decide on the metric {name!r}")


def improved(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a value beats the best so far by more than `min_delta`; what is no number never does.

    Infinities do not, either: kept as a best they would not survive JSON.

    Example:
        >>> improved(0.4, None, "min"), improved(0.4, 0.5, "min"), improved(0.4, 0.5, "max")
        (True, True, False)
        >>> improved(float("nan"), None, "min"), improved(0.4, 0.5, "min", min_delta=0.2)
        (False, False)
    """
    if not math.isfinite(value):
        return False
    return best is None or (best - value if mode == "min" else value - best) > min_delta


def choice(seed: int, *turn: object) -> random.Random:
    """Randomness that depends on nothing but a seed and what is decided: the same after a resume.

    Example:
        >>> choice(0, 3).random() == choice(0, 3).random() != choice(0, 4).random()
        True
    """
    key = "/".join(map(str, (seed, *turn))).encode()
    return random.Random(hashlib.sha256(key).digest())  # noqa: S311 - no secret


def check_interval(every: Duration) -> None:
    """Raise unless the interval has a length."""
    if not every.value:
        raise PolicyError(
            f"decide every {every}", found="an interval of no length", fix="for example every=1ep"
        )


def check_options(policy: Policy, bounds: Mapping[str, bool]) -> None:
    """Raise unless each of the options named holds what is said of it."""
    for name, holds in bounds.items():
        if not holds:
            raise PolicyError(
                f"use {name}={getattr(policy, name)}",
                found="a value out of its range",
                fix="frostline policies NAME says what each option may be",
            )


def often(every: Duration) -> str:
    """An interval in words: "1st" would be read as the first.

    Example:
        >>> often(Duration.parse("1st")), often(Duration.parse("5%"))
        ('every step', 'every 5%')
    """
    return "every step" if str(every) == "1st" else f"every {every}"


def readings_from_start(
    signal: str, steps: int, every: Duration, per: Literal["group", "parameter"] = "group"
) -> tuple[Need, Need]:
    """A reading of all groups over the first steps, and one at the start of each later interval.

    Example:
        >>> first, rest = readings_from_start("fisher", 5, Duration.parse("1ep"))
        >>> str(first.every), str(rest.every), rest.steps
        ('5st', '1ep', 5)
    """
    first = Duration.parse(f"{steps}st")
    at_once = Need(signal, first, steps=steps, per=per, frozen_too=True, until=(first,))
    return at_once, replace(at_once, every=every, after=(first,), until=None)
