"""What policies share: prefixes of the backbone, new readings, seeded choices."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping

from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, State

__all__ = ["backbone", "choice", "freeze_first", "freeze_only", "metric", "new_reading"]


def backbone(groups: LayerGroups) -> list[str]:
    """Names of the groups that are not the head, in execution order."""
    return [g.name for g in groups if g.name not in groups.head]


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


def new_reading(state: State, event: Event, signal: str) -> Mapping[str, float] | None:
    """The values of a signal if they are newer than `state["seen"]`, else None.

    The caller keeps `event.sampled[signal]` as `"seen"` in its next state.
    """
    at = event.sampled.get(signal)
    return None if at is None or at == state.get("seen") else event.signals[signal]


def metric(event: Event, name: str) -> float:
    """A validation metric of an evaluation.

    Raises:
        PolicyError: the evaluation has no metric of this name.
    """
    if name not in event.metrics:
        raise PolicyError(
            f"decide on the metric {name!r}",
            found=f"an evaluation with {', '.join(sorted(event.metrics)) or 'no metrics'}",
            fix="name one of those",
        )
    return event.metrics[name]


def choice(seed: int, *turn: object) -> random.Random:
    """Randomness that depends on nothing but a seed and what is decided: the same after a resume.

    Example:
        >>> choice(0, 3).random() == choice(0, 3).random() != choice(0, 4).random()
        True
    """
    key = "/".join(map(str, (seed, *turn))).encode()
    return random.Random(hashlib.sha256(key).digest())  # noqa: S311 - no secret
