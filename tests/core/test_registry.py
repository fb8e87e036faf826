from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.clock import Duration
from frostline.compose import Guard, KeepTrainable, Live, MaxFrozen, Placebo, Then, Union
from frostline.errors import FrostlineError, PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.scheduled import Gradual
from frostline.policies.static import Freeze, Full, LinearProbe
from frostline.policy import Event, Policy, State
from frostline.registry import (
    available_combinators,
    available_policies,
    default_policy,
    make_policy,
    policy_class,
    policy_family,
    policy_text,
)
from frostline.select import select
from frostline.shortform import MAX_DEPTH, MAX_LENGTH, default_of, options_of, readable_type


@dataclass(frozen=True, slots=True)
class Foreign(Policy):
    """A third party's policy with every kind of option."""

    count: int = 1
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    on: bool = False
    when: Duration | None = None
    name: str | None = None
    how: Literal["x", "y"] | None = None
    by: Literal["all"] | float = 2.0
    several: tuple[Policy, ...] = ()
    inner: Policy | None = None

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(), state


@dataclass(frozen=True, slots=True)
class Fails(Policy):
    """A third party's policy that checks nothing itself."""

    count: int = 1

    def __post_init__(self) -> None:
        _ = 1 / self.count

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(), state


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def point(name: str, place: str) -> importlib.metadata.EntryPoint:
        return importlib.metadata.EntryPoint(name, place, "frostline.policies")

    ours = importlib.metadata.entry_points
    points = {
        "frostline.policies": [
            *ours(group="frostline.policies"),
            point("foreign", f"{__name__}:Foreign"),
            point("fails", f"{__name__}:Fails"),
            point("number", "math:pi"),
            point("gone", "no_such_module:X"),
        ],
        "frostline.combinators": list(ours(group="frostline.combinators")),
    }
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points[group])
    assert __name__ in sys.modules
    _forget()
    yield
    _forget()


def _forget() -> None:
    available_policies.cache_clear()
    available_combinators.cache_clear()


def test_short_forms() -> None:
    assert make_policy("linear-probe") == LinearProbe()
    assert make_policy("gradual:every=2ep,live_norm=true") == Gradual(
        Duration.parse("2ep"), live_norm=True
    )
    assert make_policy("gradual:until=30%").until == Duration.parse("30%")  # type: ignore[attr-defined]
    assert make_policy("freeze:select='depth<2 | re:a{1,2}'") == Freeze("depth<2 | re:a{1,2}")
    policy = Gradual()
    assert make_policy(policy) is policy


@pytest.mark.parametrize(
    ("spec", "selector"),
    [
        (
            "freeze:select=backbone & !(kind:norm | depth<2)",
            "backbone & !(kind:norm | depth<2)",
        ),
        ("freeze:select=(head | depth<2)", "(head | depth<2)"),
        ("freeze:select=re:block(0,|1)", "re:block(0,|1)"),
        ("freeze:select=re:layer[1,2]", "re:layer[1,2]"),
        ("freeze:select=re:a[(]b", "re:a[(]b"),
        ("freeze:select=don't*", "don't*"),
        ("freeze:select='don''t*,'", "don't*,"),
        ("freeze:select= depth<2 , live_norm=false", "depth<2"),
        ("freeze:select=re:a\\),live_norm=false", "re:a\\)"),
        ("freeze:select=depth<2,", "depth<2"),
    ],
)
def test_values_run_to_the_next_comma_outside_parentheses(spec: str, selector: str) -> None:
    assert make_policy(spec) == Freeze(selector)


def test_nested_short_forms() -> None:
    every = Duration.parse
    assert make_policy("placebo:policy=(gradual:every=1st,live_norm=on),seed=1") == Placebo(
        Gradual(every("1st"), live_norm=True), seed=1
    )
    assert make_policy("then:first=(linear-probe),after=2ep,second=(gradual:every=1ep)") == Then(
        LinearProbe(), every("2ep"), Gradual(every("1ep"))
    )
    assert make_policy("union:policies=(freeze:select=kind:norm)(gradual)") == Union(
        (Freeze("kind:norm"), Gradual())
    )
    spread = """ union : policies =
        ( freeze : select = kind:norm )
        ( max-frozen : fraction = 0.5 , policy = ( live : policy = ( full ) ) ) """
    assert make_policy(spread) == Union((Freeze("kind:norm"), MaxFrozen(Live(Full()), 0.5)))


def test_one_nested_policy_without_commas_needs_no_parentheses() -> None:
    assert make_policy("guard:policy=gradual:every=2ep,patience=3") == Guard(
        Gradual(Duration.parse("2ep")), patience=3
    )
    assert make_policy("union:policies=gradual") == Union((Gradual(),))
    assert make_policy("live:policy='gradual:every=2ep,live_norm=on'") == Live(
        Gradual(Duration.parse("2ep"), live_norm=True)
    )


@pytest.mark.usefixtures("foreign")
def test_a_third_party_policy_is_found_by_its_entry_point() -> None:
    assert make_policy("foreign:count=3,share=0.25,mode=b,on=yes,when=3ep") == Foreign(
        3, 0.25, "b", on=True, when=Duration.parse("3ep")
    )
    assert make_policy("foreign:when=none,name=,how=none,inner=none") == Foreign()
    assert make_policy("foreign:name='none',how=y,by=all,inner=(full)") == Foreign(
        name="none", how="y", by="all", inner=Full()
    )
    assert make_policy("foreign:by=1e3") == Foreign(by=1000.0)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(
    "policy",
    [
        Foreign(name="none"),
        Foreign(name=""),
        Foreign(name=" spaced, and 'quoted' ("),
        Foreign(name="[", how="y"),
        Foreign(name="a[b", inner=Freeze("re:x[1]")),
        Foreign(by=0.1, several=(Full(), Gradual()), inner=Live(Full())),
    ],
)
def test_every_kind_of_value_is_written_so_that_it_reads_back(policy: Policy) -> None:
    text = policy_text(policy)
    assert text.startswith("foreign:")
    assert make_policy(text) == policy


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("name", ["number", "gone"])
def test_a_bad_entry_point_is_named(name: str) -> None:
    with pytest.raises(PolicyError, match=name):
        policy_class(name)


@pytest.mark.usefixtures("foreign")
def test_whatever_a_policy_raises_names_the_policy() -> None:
    with pytest.raises(PolicyError, match="build the policy 'fails:count=0'"):
        make_policy("fails:count=0")
    with pytest.raises(PolicyError, match="build the policy 'fails:count=0'"):
        make_policy("live:policy=(fails:count=0),norm=false")


def test_one_name_with_two_meanings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "frostline.policies": "frostline.policies.static:Full",
        "frostline.combinators": "frostline.compose:Live",
    }
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [importlib.metadata.EntryPoint("full", points[group], group)],
    )
    _forget()
    try:
        with pytest.raises(PolicyError, match="two definitions"):
            policy_class("full")
    finally:
        _forget()


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("gradul", "did you mean 'gradual'"),
        ("gradual:evry=1ep", "did you mean 'every'"),
        ("gradual:every", "option=value"),
        ("gradual:groups_per_step=two", "which is no int"),
        ("gradual:live_norm=maybe", "which is no bool"),
        ("gradual:every=3", "bare number"),
        ("gradual:every=1ep,every=2ep", "'every' of the policy 'gradual' twice"),
        ("gradual:groups_per_step=" + "9" * 5000, "which is no int"),
        ("max-frozen:policy=(full),fraction=nan", "which is no float"),
        ("guard:policy=(full),mode=most", "which is no min | max"),
        ("gradual:live_norm=maybe", "try:   true or false"),
        ("first:groups=two", "try:   a whole number or none"),
        ("guard:policy=(full),mode=most", "try:   min | max"),
        ("then:first=(full),after=1ep", "then:first=...,after=...,second=..."),
        ("guard:policy=(full),patience=0", "patience below 1"),
        ("guard:policy=(full),tolerance=-0.1", "negative"),
        ("freeze", "no 'select', which has no default"),
        ("freeze:select='a", "unclosed quote"),
        ("freeze:select='a'b", "'b' where ',' belongs"),
        ("", "no policy of that name"),
        (3, "a int"),
        ("x" * (MAX_LENGTH + 1), "characters\n.*at most 10,000"),
        # nested
        ("placbo:policy=(full)", "did you mean 'placebo'"),
        ("placebo:policy=(gradul)", "did you mean 'gradual'"),
        ("placebo:policy=(gradual:evry=1ep)", "did you mean 'every'"),
        ("placebo:policy=(gradual),sed=1", "did you mean 'seed'"),
        ("placebo", "no 'policy', which has no default"),
        ("then:first=(full)", "no 'after'"),
        ("placebo:policy=(gradual:every=1ep", "a parenthesis that is never closed"),
        ("placebo:policy=(gradual", "a parenthesis that is never closed"),
        ("placebo:policy=(", "no policy of that name"),
        ("placebo:policy=((gradual))", "no policy of that name"),
        ("placebo:policy=()", "no policy of that name"),
        ("placebo:policy=", "no policy of that name"),
        ("placebo:policy=(gradual))", r"'\)' where ',' belongs"),
        ("placebo:policy=(gradual)(full)", r"'\(full\)' where ',' belongs"),
        ("placebo:policy=(gradual,seed=1)", "',seed=1.' where ':' or '.' belongs"),
        ("placebo:policy=(gradual:)x", "'x' where ',' belongs"),
        ("freeze:select=re:(a", "a parenthesis that is never closed"),
        ("live:policy=(freeze:select=re:(a)", "a parenthesis that is never closed"),
        ("union:policies=(full)gradual", "'gradual' where ',' belongs"),
        ("union:policies=", "no policy of that name"),
    ],
)
def test_bad_specs_say_what_would_work(spec: str, found: str) -> None:
    with pytest.raises(FrostlineError, match=found) as caught:
        make_policy(spec)
    assert str(caught.value).startswith("cannot ")
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "spec",
    [
        "live:policy=(" * 300 + "full",
        "live:policy=(" * 300 + "full" + ")" * 300,
        "live:policy=" * 300 + "full",
        "freeze:select=" + "(" * 4000 + "head" + ")" * 4000,
        "freeze:select=" + "!" * 4000 + "head",
        "freeze:select='" + "(" * 4000 + "'",
        "keep-trainable:policy=(full),keep=" + "!" * 4000 + "head",
        "(" * 9000,
        "union:policies=" + "(" * 9000,
        "freeze:select=" + "[" * 9000,
        "freeze:select=" + "'" * 9001,
    ],
    ids=lambda spec: spec[:20],
)
def test_hostile_nesting_is_refused_without_exhausting_the_stack(spec: str) -> None:
    with contextlib.suppress(FrostlineError):
        make_policy(spec)


def test_depth_is_bounded_at_the_number_named() -> None:
    def nested(depth: int) -> str:
        return "live:policy=(" * depth + "full" + ")" * depth

    assert policy_text(make_policy(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    with pytest.raises(PolicyError, match=f"nested more than {MAX_DEPTH} deep"):
        make_policy(nested(MAX_DEPTH + 1))
    with pytest.raises(PolicyError, match=f"nested more than {MAX_DEPTH} deep"):
        make_policy("live:policy=" * (MAX_DEPTH + 1) + "full")
    many = "union:policies=" + "(full)" * (2 * MAX_DEPTH)
    assert policy_text(make_policy(many)) == many


def test_text_is_the_inverse() -> None:
    for spec in (
        "full",
        "linear-probe:live_norm=true",
        "gradual:every=2ep,groups_per_step=3",
        "freeze:select=backbone & !(kind:norm | depth<2)",
        "placebo:policy=(gradual:every=2ep),seed=1",
        "then:first=(linear-probe),after=2ep,second=(union:policies=(gradual)(full))",
    ):
        assert policy_text(make_policy(spec)) == spec
    quoted = Freeze("re:layer[12],x")
    assert make_policy(policy_text(quoted)) == quoted


def test_what_no_short_form_gives_back_is_shown_as_code() -> None:
    ours = Live(Foreign())
    assert policy_text(ours) == repr(ours)
    kept = KeepTrainable(Full(), select("head"))  # a rule made in code may be any function
    assert policy_text(kept) == repr(kept)
    deep: Policy = Full()
    for _ in range(MAX_DEPTH + 1):
        deep = Live(deep)
    assert policy_text(deep) == repr(deep)


# -- every policy there is ----------------------------------------------------------------------

_SELECTORS = st.sampled_from(
    ["head", "backbone & !(kind:norm | depth<2)", "re:a{1,2}", "re:x[,)]'", "don't*", "'a'"]
)
_DURATIONS = st.builds(
    lambda n, unit: Duration.parse(f"{n}{unit}"), st.integers(1, 99), st.sampled_from(["st", "ep"])
) | st.sampled_from([Duration.parse("0.5ep"), Duration.parse("33.3%")])
#: Words that stand for a string option; each policy refuses those that are none of its own.
_TEXTS = _SELECTORS | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)


def _values(hint: Any, inner: st.SearchStrategy[Policy]) -> st.SearchStrategy[Any]:
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 50),
        float: st.floats(0, 1) | st.floats(allow_nan=False),
        Duration: _DURATIONS,
        str: _TEXTS,
        type(None): st.none(),
        Policy: inner,
        tuple[Policy, ...]: st.lists(inner, min_size=1, max_size=3).map(tuple),
    }
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of([_values(h, inner) for h in typing.get_args(hint)])
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    return simple.get(hint, st.nothing())


@st.composite
def _policies(draw: st.DrawFn, depth: int = 2) -> Policy:
    """Any registered policy with any options that it takes."""
    names = sorted(available_policies()) + sorted(available_combinators()) * (depth > 0)
    name = draw(st.sampled_from(names))
    kind = policy_class(name)
    hints = typing.get_type_hints(kind)
    inner = _policies(depth=depth - 1) if depth else st.nothing()
    given: dict[str, Any] = {}
    for field in options_of(kind):
        if default_of(field) is dataclasses.MISSING or draw(st.booleans()):
            given[field.name] = draw(_values(hints[field.name], inner))
    try:
        return kind(**given)
    except FrostlineError:  # what it does not take: fall back on what every policy list has
        return draw(st.sampled_from([Full(), LinearProbe(), Gradual(), Freeze("a, b | (head)")]))


@settings(deadline=None, max_examples=300)
@given(_policies())
def test_every_policy_made_of_registered_ones_has_a_text_that_gives_it_back(policy: Policy) -> None:
    text = policy_text(policy)
    assert text != repr(policy)
    assert make_policy(text) == policy
    assert policy_text(make_policy(text)) == text


#: A further value per option where those tried below are refused.
_OTHER = ("0.25", "2", "0.5", "0", "1", "2ep", "10%", "head", "(full)", "(full)(gradual)", "true",
          "false", "none", "3", "7", "0.9", "5st", "val_accuracy", "phases.yaml")  # fmt: skip


@pytest.mark.parametrize("name", [*available_policies(), *available_combinators()])
def test_every_field_of_every_policy_is_reached_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("phases.yaml").write_text("phases:\n- train: head\n  length: 1ep\n- train: all\n")
    kind = policy_class(name)
    hints = typing.get_type_hints(kind)
    for field in options_of(kind):
        changed = [
            policy
            for text in (*typing.get_args(_literal(hints[field.name])), *_OTHER)
            if (policy := _tried(name, field.name, text)) is not None
            and getattr(policy, field.name) != default_of(field)
        ]
        assert changed, f"{name}:{field.name}= takes none of the values tried"
        for policy in changed:
            assert getattr(make_policy(policy_text(policy)), field.name) == getattr(
                policy, field.name
            )


def _literal(hint: Any) -> Any:
    choices = typing.get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
    return next((c for c in choices if typing.get_origin(c) is Literal), None)


#: What may have to be given besides the option that is set.
_COMPANIONS = {
    "policy": "(full)", "first": "(full)", "after": "1ep", "second": "(full)",
    "policies": "(full)", "select": "head", "fraction": "0.5", "train": "head",
    "file": "phases.yaml",
}  # fmt: skip


def _tried(name: str, option: str, value: str) -> Policy | None:
    known = {f.name for f in options_of(policy_class(name))}
    companions = {k: v for k, v in _COMPANIONS.items() if k in known and k != option}
    modes = {"mode": "selection"} if "mode" in known else {}
    for others in ({}, companions, companions | modes):
        options = others | {option: value}
        try:
            return make_policy(f"{name}:" + ",".join(f"{k}={v}" for k, v in options.items()))
        except FrostlineError:
            continue
    return None


def test_families() -> None:
    assert policy_family("full") == policy_family("freeze") == "static"
    assert policy_family("first") == "static"
    assert policy_family("spectrum") == "static"
    assert policy_family("gradual") == policy_family("freezeout") == "scheduled"
    for turns in ("badam", "hift", "lisa"):  # seeds and orders measure nothing
        assert policy_family(turns) == "scheduled"
    assert policy_family("autofreeze") == policy_family("plateau") == "dynamic"
    assert policy_family("then") == "combinator"
    assert not available_policies().keys() & available_combinators().keys()


def test_defaults() -> None:
    assert default_policy("gradual") == Gradual()
    assert default_policy("freeze") is default_policy("placebo") is None


def test_types_are_written_for_people() -> None:
    assert readable_type(tuple[Policy, ...]) == "several policies"
    assert readable_type(Literal["a"] | None) == "a | none"
    assert readable_type(float) == "float"
