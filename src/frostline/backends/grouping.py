"""From the pieces of a model to its layer groups, whatever the framework.

A backend divides a model into units in definition order and says of each when it first ran. A unit
with weights begins a group; everything else joins the group that ran just before it, or the first
one. What never ran is placed next to its neighbours in definition order, before the head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from frostline.errors import BackendError
from frostline.groups import LayerGroups

__all__ = ["Draft", "Placing", "known_parameters"]


class Piece(Protocol):
    """A unit of a model."""

    @property
    def starts(self) -> bool:
        """Whether it is such that it begins a group."""
        ...


U = TypeVar("U", bound=Piece)


@dataclass(eq=False, slots=True)
class Draft(Generic[U]):
    """A group being put together.

    Attributes:
        units: in the order in which they joined.
        in_head: whether it is part of the head.
    """

    units: list[U]
    in_head: bool

    @property
    def main(self) -> U:
        """The unit that names the group."""
        return next((u for u in self.units if u.starts), self.units[0])


@dataclass(frozen=True, slots=True)
class Placing(Generic[U]):
    """Puts the units of a model into groups.

    Args:
        units: in definition order; told apart by identity.
        tick: when a unit first ran; None if it never did.
        owns: whether parameters belong to it.
        starts: whether it begins a group: it is of that sort, and has something left to begin with.
        is_head: whether any of its parameters is of the head.
        embeds: whether it is an embedding; those that run one after the other are one group.

    Example:
        >>> from types import SimpleNamespace
        >>> units = [SimpleNamespace(name=n, starts=n[0] != "r") for n in ("a", "relu", "b", "c")]
        >>> ran = {"a": 0, "relu": 1, "c": 2}
        >>> placing = Placing(units, tick=lambda u: ran.get(u.name),
        ...     owns=lambda u: u.starts, starts=lambda u: u.starts,
        ...     is_head=lambda u: u.name == "c", embeds=lambda u: False)
        >>> drafts = placing.ran()
        >>> [[u.name for u in draft.units] for draft in drafts]
        [['a', 'relu'], ['c']]
        >>> placing.place_others(drafts)
        >>> [[u.name for u in draft.units] for draft in drafts]
        [['a', 'relu'], ['b'], ['c']]
    """

    units: Sequence[U]
    tick: Callable[[U], int | None]
    owns: Callable[[U], bool]
    starts: Callable[[U], bool]
    is_head: Callable[[U], bool]
    embeds: Callable[[U], bool]

    def ran(self) -> list[Draft[U]]:
        """The groups of the units that ran, in the order of their first run."""
        ticks = ((self.tick(unit), unit) for unit in self.units)
        ran = sorted(((t, u) for t, u in ticks if t is not None), key=lambda pair: pair[0])
        drafts: list[Draft[U]] = []
        waiting: list[U] = []
        for _, unit in ran:
            if self._joins(unit, drafts):
                drafts[-1].units.append(unit)
            elif self.starts(unit):
                drafts += self._begun(waiting, unit)
                waiting = []
            else:
                waiting.append(unit)
        return drafts + self._left(waiting, drafts)

    def place_others(self, drafts: list[Draft[U]]) -> None:
        """Give every unit that never ran a place next to its neighbours in definition order.

        Args:
            drafts: of the units that ran; the others join them, or get a draft of their own.
        """
        place = {id(unit): draft for draft in drafts for unit in draft.units}
        for index, unit in enumerate(self.units):
            if id(unit) in place:
                continue
            before = [u for u in reversed(self.units[:index]) if id(u) in place]
            after = [u for u in self.units[index + 1 :] if id(u) in place]
            near = place[id((before or after)[0])] if before or after else None
            if near is not None and not self.starts(unit) and self._fits(unit, near):
                near.units.append(unit)
                place[id(unit)] = near
                continue
            draft = Draft([unit], self.is_head(unit))
            drafts.insert(_position(drafts, draft, near, later=bool(before)), draft)
            place[id(unit)] = draft

    def _joins(self, unit: U, drafts: Sequence[Draft[U]]) -> bool:
        if not drafts:
            return False
        if not self.owns(unit):
            return True
        if drafts[-1].in_head != self.is_head(unit):
            return False
        if not self.starts(unit):
            return True
        return self.embeds(unit) and all(self.embeds(u) for u in drafts[-1].units if u.starts)

    def _begun(self, waiting: list[U], unit: U) -> list[Draft[U]]:
        in_head = self.is_head(unit)
        if all(self.is_head(u) == in_head or not self.owns(u) for u in waiting):
            return [Draft([*waiting, unit], in_head)]
        return [Draft(waiting, not in_head), Draft([unit], in_head)]

    def _left(self, waiting: list[U], drafts: Sequence[Draft[U]]) -> list[Draft[U]]:
        owning = [u for u in waiting if self.owns(u)]
        if owning:
            return [Draft(waiting, self.is_head(owning[0]))]
        if drafts:
            drafts[-1].units.extend(waiting)
        return []

    def _fits(self, unit: U, draft: Draft[U]) -> bool:
        return not self.owns(unit) or draft.in_head == self.is_head(unit)


def _position(
    drafts: list[Draft[U]], draft: Draft[U], near: Draft[U] | None, *, later: bool
) -> int:
    position = drafts.index(near) + later if near is not None else 0
    if draft.in_head:
        return position
    return min([position, *(i for i, d in enumerate(drafts) if d.in_head)])


def known_parameters(fixed: Collection[str], groups: LayerGroups, *, names: str) -> frozenset[str]:
    """The parameters of these names, each by its first one.

    Args:
        fixed: names, aliases included.
        groups: the layer groups.
        names: what right names look like, for the message.

    Raises:
        BackendError: no parameter of such a name.
    """
    try:
        return frozenset(
            p.name for n in fixed for p in groups.of_parameter(n).parameters if n in p.names
        )
    except KeyError as error:
        raise BackendError(
            f"fix the parameter {error.args[0]!r}", found="no parameter of that name", fix=names
        ) from error
