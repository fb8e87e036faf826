"""Units of any model become groups: none is lost, in the order of their runs, the head last."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.backends.grouping import Draft, Placing, known_parameters
from frostline.errors import BackendError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo


@dataclass(frozen=True, eq=False)
class Unit:
    name: str
    starts: bool
    owns: bool
    head: bool
    embeds: bool
    tick: int | None


def placing(units: list[Unit]) -> Placing[Unit]:
    return Placing(
        units,
        tick=lambda u: u.tick,
        owns=lambda u: u.owns,
        starts=lambda u: u.starts and u.owns,
        is_head=lambda u: u.head and u.owns,
        embeds=lambda u: u.embeds,
    )


def groups(units: list[Unit]) -> list[Draft[Unit]]:
    found = placing(units)
    drafts = found.ran()
    found.place_others(drafts)
    return drafts


@st.composite
def models(draw: st.DrawFn) -> list[Unit]:
    count = draw(st.integers(1, 12))
    ticks = draw(st.permutations(range(count)))
    kinds = draw(st.lists(st.tuples(*[st.booleans()] * 5), min_size=count, max_size=count))
    return [
        # A head has something to begin with.
        Unit(f"u{i}", starts, owns, head and starts, embeds and starts, tick if ran else None)
        for i, ((starts, owns, head, embeds, ran), tick) in enumerate(
            zip(kinds, ticks, strict=True)
        )
    ]


@given(models())
def test_every_unit_is_in_one_group_and_none_is_empty(units: list[Unit]) -> None:
    drafts = groups(units)
    placed = [id(u) for draft in drafts for u in draft.units]
    assert sorted(placed) == sorted(map(id, units))
    assert all(draft.units for draft in drafts)


@given(models())
def test_head_and_body_are_never_in_one_group(units: list[Unit]) -> None:
    for draft in groups(units):
        assert {u.head for u in draft.units if u.owns} <= {draft.in_head}


@given(models())
def test_groups_of_what_ran_are_in_the_order_of_its_first_run(units: list[Unit]) -> None:
    drafts = placing(units).ran()
    begun = [min(u.tick for u in d.units if u.tick is not None) for d in drafts]
    assert begun == sorted(begun)


@given(models())
def test_a_group_has_one_beginning_unless_it_embeds(units: list[Unit]) -> None:
    for draft in groups(units):
        starting = [u for u in draft.units if u.starts and u.owns]
        assert len(starting) <= 1 or all(u.embeds for u in starting)


@given(models())
def test_what_never_ran_is_placed_before_a_head_that_did(units: list[Unit]) -> None:
    drafts = groups(units)
    ran = {id(u) for u in units if u.tick is not None}
    heads = [i for i, d in enumerate(drafts) if d.in_head and ran & set(map(id, d.units))]
    for place, draft in enumerate(drafts):
        unrun = all(u.tick is None for u in draft.units)
        if unrun and not draft.in_head and heads:
            assert place < heads[0]


def unit(name: str, tick: int | None, *, head: bool = False, **more: bool) -> Unit:
    kind = {"starts": True, "owns": True, "embeds": False} | more
    return Unit(name, kind["starts"], kind["owns"], head, kind["embeds"], tick)


def names(units: list[Unit]) -> list[str]:
    return [" ".join(u.name for u in d.units) for d in groups(units)]


def test_each_rule_on_an_example() -> None:
    norm, relu = (unit("norm", 1, starts=False), unit("relu", 2, starts=False, owns=False))
    assert names([unit("a", 0), norm, relu, unit("b", 3)]) == ["a norm relu", "b"]
    waits = unit("norm", 0, starts=False)
    assert names([waits, unit("a", 1)]) == ["norm a"]
    assert names([waits, unit("top", 1, head=True)]) == ["norm", "top"]
    assert names([unit("e", 0, embeds=True), unit("f", 1, embeds=True)]) == ["e f"]
    assert names([unit("late", 5), unit("early", 2)]) == ["early", "late"]
    assert names([unit("a", 0), unit("never", None), unit("top", 1, head=True)]) == [
        "a", "never", "top"
    ]  # fmt: skip
    assert names([relu]) == ["relu"]
    assert groups([unit("e", None, starts=False), unit("a", 0)])[0].main.name == "a"


def test_fixed_names_are_known_by_their_first_and_unknown_ones_refused() -> None:
    tied = TensorInfo("embed.weight", (2, 2), aliases=("head.weight",))
    found = LayerGroups((LayerGroup("embed", 0, (tied,)),))
    assert known_parameters(["head.weight"], found, names="x") == {"embed.weight"}
    with pytest.raises(BackendError, match="'nothing'"):
        known_parameters(["nothing"], found, names="names as in the model")
