from __future__ import annotations

import pytest

from frostline.errors import BackendError
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.testing import example_groups


def group(name: str, depth: int, *parameters: TensorInfo) -> LayerGroup:
    return LayerGroup(name, depth, parameters or (TensorInfo(f"{name}.w", (2, 3)),))


def test_lookup_by_place_name_and_parameter() -> None:
    groups = example_groups(4)
    assert groups[0] is groups["block0"]
    assert [g.name for g in groups[1:3]] == ["block1", "block2"]
    assert groups.of_parameter("block2.norm.weight").name == "block2"
    assert "block1" in groups
    assert "block9" not in groups
    assert groups.backbone == {"block0", "block1", "block2"}
    assert groups.head == {"head"}


def test_tied_weights_are_found_under_every_name() -> None:
    tied = TensorInfo("emb.weight", (5, 2), aliases=("out.weight",))
    groups = LayerGroups((group("emb", 0, tied), group("body", 1)))
    assert groups.of_parameter("out.weight") is groups.of_parameter("emb.weight")
    assert groups.parameter_count == 16


@pytest.mark.parametrize(
    "items",
    [
        (group("a", 1),),
        (group("a", 0), group("a", 1)),
        (group("a", 0), group("b", 1, TensorInfo("a.w"))),
        (group("a", 0, TensorInfo("x", aliases=("a.w",))), group("b", 1, TensorInfo("a.w"))),
    ],
    ids=["depth", "name", "parameter", "alias"],
)
def test_groups_that_overlap_or_are_out_of_order_raise(items: tuple[LayerGroup, ...]) -> None:
    with pytest.raises(BackendError):
        LayerGroups(items)


def test_unknown_head_raises() -> None:
    with pytest.raises(BackendError, match="head"):
        LayerGroups((group("a", 0),), head=frozenset({"b"}))


def test_costs_attach_by_name() -> None:
    groups = LayerGroups((group("a", 0), group("b", 1)))
    assert not groups.measured
    half = groups.with_costs({"a": GroupCost(1, 2, 3)})
    assert not half.measured
    assert half["a"].cost is not None
    assert half["a"].cost.backward_s == 5
    assert half.with_costs({"b": GroupCost()}).measured


def test_sizes() -> None:
    info = TensorInfo("w", (3, 4), "float16", 2)
    assert (info.count, info.size_bytes, TensorInfo("s").count) == (12, 24, 1)
    made = LayerGroup("a", 0, (info,), (TensorInfo("a.mean", (4,)),))
    assert (made.parameter_count, made.size_bytes) == (12, 24 + 16)
