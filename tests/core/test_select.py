from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import SelectorError, SelectorMatchedNothing
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo, TensorInfo
from frostline.select import Selector, select
from frostline.testing import example_groups

GROUPS = example_groups(5)  # block0..block3, head
EVERYTHING = frozenset(p for g in GROUPS for p in g.parameter_names)


def names(text: str) -> set[str]:
    return {g.name for g in select(text).groups(GROUPS)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("block1", {"block1"}),
        ("block[12]", {"block1", "block2"}),
        ("block[!12]", {"block0", "block3"}),
        ("block1.norm", {"block1"}),
        ("*.bias", {"block0", "block1", "block2", "block3", "head"}),
        ("re:block[0-2]", {"block0", "block1", "block2"}),
        ("re:(block0|head)", {"block0", "head"}),
        ("depth<2", {"block0", "block1"}),
        ("depth >= 3", {"block3", "head"}),
        ("depth==4", {"head"}),
        ("depth 1..2", {"block1", "block2"}),
        ("first 2 groups", {"block0", "block1"}),
        ("last 1 group", {"head"}),
        ("first 60%", {"block0", "block1", "block2"}),
        ("first 1%", {"block0"}),
        ("first 100%", {"block0", "block1", "block2", "block3", "head"}),
        ("first 100% of parameters", {"block0", "block1", "block2", "block3", "head"}),
        ("first 20.41% of parameters", {"block0"}),
        ("first 50% of parameters", {"block0", "block1"}),
        ("last 30% of parameters", {"head"}),
        ("type:BatchNorm*", {"block0", "block1", "block2", "block3"}),
        ("kind:norm", {"block0", "block1", "block2", "block3"}),
        ("head", {"head"}),
        ("backbone", {"block0", "block1", "block2", "block3"}),
        ("all", {"block0", "block1", "block2", "block3", "head"}),
        ("block0 | head", {"block0", "head"}),
        ("backbone & !block0", {"block1", "block2", "block3"}),
        ("!(block0 | head)", {"block1", "block2", "block3"}),
        ("block0 | block1 & kind:norm", {"block0", "block1"}),
    ],
)
def test_forms(text: str, expected: set[str]) -> None:
    assert names(text) == expected


def test_parts_of_a_group() -> None:
    assert select("block1 & kind:bias").parameters(GROUPS) == {"block1.bias"}
    assert select("type:BatchNorm1d").parameters(GROUPS) == {
        f"block{i}.norm.weight" for i in range(4)
    }
    assert select("block1.norm").parameters(GROUPS) == {"block1.norm.weight"}


@pytest.mark.parametrize(
    "text",
    ["", "  ", "3", "|", "a |", "& a", "(a", "a)", "!", "kind:color", "re:(", "first 0 groups",
     "first 101%", "first 1.5 groups", "first 3 groups of parameters", None, 7],
)  # fmt: skip
def test_unreadable_selectors_raise(text: object) -> None:
    with pytest.raises(SelectorError) as caught:
        select(text).parameters(GROUPS)  # type: ignore[arg-type]
    assert not isinstance(caught.value, SelectorMatchedNothing)


def test_a_bare_number_is_refused_with_both_readings() -> None:
    with pytest.raises(SelectorError, match=re.escape("'first 10 groups' or 'depth==10'")):
        select("10")


@pytest.mark.parametrize("text", ["blok1", "block0 | blok1", "!blok1", "depth>9", "block0 & head"])
def test_what_matches_nothing_raises(text: str) -> None:
    with pytest.raises(SelectorMatchedNothing):
        select(text).parameters(GROUPS)


def test_the_nearest_names_are_offered() -> None:
    with pytest.raises(SelectorMatchedNothing, match=r"nearest names: .*block1"):
        select("blok1").parameters(GROUPS)


ATOMS = ["block0", "depth<3", "kind:bias", "head", "type:Block", "first 40%", "re:.*weight"]
selectors = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: f"({p[0]} | {p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]} & {p[1]})"),
        inner.map(lambda s: f"!{s}"),
    ),
    max_leaves=5,
).filter(lambda s: "re:" not in s[:-1] or s.startswith("re:"))


def found(selector: Selector) -> frozenset[str]:
    try:
        return selector.parameters(GROUPS)
    except SelectorMatchedNothing:
        return frozenset()


@given(selectors)
def test_text_and_objects_agree(text: str) -> None:
    assert found(select(str(select(text)))) == found(select(text))


@given(st.sampled_from(ATOMS), st.sampled_from(ATOMS))
def test_set_laws(a: str, b: str) -> None:
    one, two = select(a), select(b)
    assert found(one | two) == found(one) | found(two)
    assert found(one & two) == found(one) & found(two)
    assert found(~one) == EVERYTHING - found(one)


def test_predicates() -> None:
    big = Selector.where(lambda g, p: p.count > 8, text="big")
    assert big.parameters(GROUPS) == {f"{g.name}.weight" for g in GROUPS}
    assert str(big & select("head")) == "(big & head)"


def keras_groups() -> LayerGroups:
    """Named as Keras names: by the route of layers, joined by "/"."""
    body = LayerGroup(
        "backbone/block1",
        0,
        (
            TensorInfo("backbone/block1_conv/kernel", (3, 3), aliases=("twin/block1_conv/kernel",)),
            TensorInfo("backbone/block1_bn/gamma", (3,), kind="norm"),
        ),
        modules=(
            ModuleInfo("backbone/block1_conv", "Conv2D"),
            ModuleInfo("backbone/block1_bn", "BatchNormalization"),
        ),
    )
    head = LayerGroup("dense", 1, (TensorInfo("dense/kernel", (3, 2)),))
    return LayerGroups((body, head))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("backbone", {"backbone/block1_conv/kernel", "backbone/block1_bn/gamma"}),
        ("re:backbone", {"backbone/block1_conv/kernel", "backbone/block1_bn/gamma"}),
        ("backbone/block1_conv", {"backbone/block1_conv/kernel"}),
        ("twin/*", {"backbone/block1_conv/kernel"}),
        ("backbone/block1", {"backbone/block1_conv/kernel", "backbone/block1_bn/gamma"}),
        ("type:BatchNormalization", {"backbone/block1_bn/gamma"}),
        ("*/kernel & !dense", {"backbone/block1_conv/kernel"}),
        ("depth<1 & kind:norm", {"backbone/block1_bn/gamma"}),
    ],
)
def test_names_joined_by_slashes(text: str, expected: set[str]) -> None:
    assert select(text).parameters(keras_groups()) == expected
