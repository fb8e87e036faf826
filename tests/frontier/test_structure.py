"""Values with tensors inside: apart and together again."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from frostline.frontier.structure import (
    attributes_of,
    holds_tensors,
    leaves_of,
    map_leaves,
    tensors_of,
)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Holder:
    value: Any
    more: Any = None


class Plain:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


leaves = st.one_of(
    st.integers(), st.none(), st.booleans(), st.text(max_size=3), st.floats(allow_nan=False)
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(max_size=2), inner, max_size=2).map(UserDict),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal in value and in the type of every container."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (dict, UserDict)):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    return one == other


@given(values)
def test_apart_and_together_is_the_same(value: Any):
    parts = leaves_of(value)
    assert same(parts.build(parts.items), value)
    assert same(map_leaves(value, lambda leaf: leaf), value)


@given(values)
def test_other_leaves_go_where_they_came_from(value: Any):
    parts = leaves_of(value)
    changed = parts.build([(i,) for i in range(len(parts.items))])
    counted = iter(range(len(parts.items)))
    assert same(changed, map_leaves(value, lambda _: (next(counted),)))


@given(values)
def test_taking_apart_leaves_the_original_alone(value: Any):
    before = repr(value)
    built = map_leaves(value, lambda leaf: [leaf])
    assert repr(value) == before
    if isinstance(value, (list, dict, UserDict)):
        assert built is not value


def test_a_recipe_can_be_used_again_and_again():
    parts = leaves_of({"a": [1, 2]})
    assert parts.build([3, 4]) == parts.build([3, 4]) == {"a": [3, 4]}


def test_tensors_come_in_order():
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    found = list(tensors_of([a, {"x": 1, "y": (b, "no")}, Holder(c)]))
    assert [id(t) for t in found] == [id(a), id(b), id(c)]


def test_objects_with_tensors_are_looked_into_only_if_asked():
    one = torch.ones(1)
    held = Holder(one, more=[one, 2])
    doubled = leaves_of(held).build([torch.zeros(1), torch.zeros(1), 5])
    assert isinstance(doubled, Holder)
    assert float(doubled.value) == 0
    assert doubled.more[1] == 5
    assert held.value is one  # a copy was changed, not the original
    assert map_leaves(held, lambda leaf: leaf) is held


def test_objects_without_tensors_are_leaves():
    plain = Plain(x=1)
    assert leaves_of(plain).items == (plain,)
    assert not holds_tensors(plain)
    assert holds_tensors(Plain(x=torch.ones(1)))
    assert attributes_of(Plain) == attributes_of(len) == attributes_of(3) == {}


def test_a_tensor_is_a_leaf_whatever_it_carries():
    tensor = torch.ones(2)
    tensor.tag = torch.ones(1)  # type: ignore[attr-defined]
    assert leaves_of(tensor).items == (tensor,)


def test_what_pytorch_returns_keeps_its_type():
    found = torch.randn(3, 4).max(1)
    built = map_leaves(found, lambda leaf: leaf)
    assert type(built) is type(found)
    assert torch.equal(built.indices, found.indices)


def test_packed_sequences_are_built_again():
    packed = pack_padded_sequence(torch.randn(3, 4, 2), torch.tensor([4, 2, 1]), batch_first=True)
    built = map_leaves(packed, lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf)
    assert isinstance(built, PackedSequence)
    assert torch.equal(built.data, packed.data * 2)


def test_a_mapping_of_a_class_of_its_own_stays_one():
    found = UserDict(a=torch.ones(1))
    built = map_leaves(found, lambda leaf: leaf + 1)
    assert type(built) is UserDict
    assert float(built["a"]) == 2
    assert float(found["a"]) == 1
