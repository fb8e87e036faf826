from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.scheduled import Gradual
from frostline.policies.static import Freeze, LinearProbe
from frostline.policy import Event, Policy, State
from frostline.registry import available_policies, make_policy, policy_class, policy_text


@dataclass(frozen=True, slots=True)
class Foreign(Policy):
    """A third party's policy with every kind of option."""

    count: int = 1
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    on: bool = False
    when: Duration | None = None

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(), state


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    points = [
        *importlib.metadata.entry_points(group="frostline.policies"),
        importlib.metadata.EntryPoint("foreign", "foreign_package:Foreign", "frostline.policies"),
        importlib.metadata.EntryPoint("number", "math:pi", "frostline.policies"),
        importlib.metadata.EntryPoint("gone", "no_such_module:X", "frostline.policies"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    package = types.ModuleType("foreign_package")
    monkeypatch.setattr(package, "Foreign", Foreign, raising=False)
    monkeypatch.setitem(sys.modules, "foreign_package", package)
    available_policies.cache_clear()
    yield
    available_policies.cache_clear()


def test_short_forms() -> None:
    assert make_policy("linear-probe") == LinearProbe()
    assert make_policy("gradual:every=2ep,live_norm=true") == Gradual(
        Duration.parse("2ep"), live_norm=True
    )
    assert make_policy("gradual:until=30%").until == Duration.parse("30%")  # type: ignore[attr-defined]
    assert make_policy("freeze:select='depth<2 | re:a{1,2}'") == Freeze("depth<2 | re:a{1,2}")
    policy = Gradual()
    assert make_policy(policy) is policy


@pytest.mark.usefixtures("foreign")
def test_a_third_party_policy_is_found_by_its_entry_point() -> None:
    assert make_policy("foreign:count=3,share=0.25,mode=b,on=yes,when=3ep") == Foreign(
        3, 0.25, "b", on=True, when=Duration.parse("3ep")
    )
    assert make_policy("foreign:when=none") == Foreign()


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("name", ["number", "gone"])
def test_a_bad_entry_point_is_named(name: str) -> None:
    with pytest.raises(PolicyError, match=name):
        policy_class(name)


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("gradul", "did you mean 'gradual'"),
        ("gradual:evry=1ep", "did you mean 'every'"),
        ("gradual:every", "option=value"),
        ("gradual:groups_per_step=two", "which is no int"),
        ("gradual:live_norm=maybe", "which is no bool"),
        ("gradual:every=3", "bare number"),
        ("freeze", "select"),
        ("freeze:select='a", "unclosed quote"),
        ("", "no policy of that name"),
        (3, "a int"),
    ],
)
def test_bad_specs_say_what_would_work(spec: str, found: str) -> None:
    with pytest.raises(Exception, match=found) as caught:
        make_policy(spec)
    assert str(caught.value).startswith("cannot ")


def test_text_is_the_inverse() -> None:
    for spec in ("full", "linear-probe:live_norm=true", "gradual:every=2ep,groups_per_step=3"):
        assert policy_text(make_policy(spec)) == spec
    quoted = Freeze("re:layer[12],x")
    assert make_policy(policy_text(quoted)) == quoted
