"""Every registered policy, and every combinator, holds the policy contract."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from frostline import FreezePlan, LayerGroups, Policy, available_policies, make_policy, policies
from frostline.clock import Duration
from frostline.compose import (
    Bootstrap,
    CostVeto,
    Discriminative,
    Every,
    Guard,
    KeepTrainable,
    MaxFrozen,
    Placebo,
    PrefixOnly,
    Slanted,
    Then,
    Union,
)
from frostline.errors import PolicyError
from frostline.policies.auto import Affordable, Steer
from frostline.policies.scheduled import Gradual
from frostline.policies.static import Freeze, Full, LinearProbe
from frostline.policy import Event, State
from frostline.registry import available_combinators, policy_class, policy_text
from frostline.signals import Need
from frostline.testing import ContractBroken, check_policy, event_stream, example_groups

# Further forms to check besides the plain name; a policy that needs options has only these.
SPECS = {
    "auto": ["auto", "auto:time=0.5,patience=1", "auto:memory=0.3,tolerance=0.1"],
    "probe-depth": ["probe-depth", "probe-depth:tolerance=0.3,fallback=0"],
    "freeze": ["freeze:select=backbone", "freeze:select=kind:norm | first 2 groups,live_norm=true"],
    "first": ["first:groups=2", "first:fraction=0.5,of=forward,live_norm=true"],
    "last": ["last:groups=2", "last:fraction=0.5,of=parameters"],
    "train-only": ["train-only:select=block1", "train-only:select=kind:bias"],
    "all-but-norm": ["all-but-norm", "all-but-norm:live_norm=true"],
    "bitfit": ["bitfit", "bitfit:norm_shifts=false"],
    "freeze-embeddings": ["freeze-embeddings:fallback=first"],
    "linear-probe": ["linear-probe", "linear-probe:live_norm=true"],
    "ulmfit": ["ulmfit", "ulmfit:gradual=false", "ulmfit:until=50%,factor=1,slanted=false"],
    "wav2vec2": ["wav2vec2", "wav2vec2:head_only=5st,at_most=none,frontend=block0 | block1.bias"],
    "freezeout": ["freezeout", "freezeout:t0=0.5,scale=linear,scale_lr=false"],
    "freeze-training": ["freeze-training", "freeze-training:start=10%,end=2ep"],
    "spfde": ["spfde", "spfde:start=3st,every=1st,saving=1,anneal=false"],
    "composer-linear": ["composer-linear", "composer-linear:freeze_start=0,every=1st"],
    "spectrum": ["spectrum", "spectrum:share=0.5,embeddings=true"],
    "gradual": ["gradual", "gradual:every=3st,groups_per_step=2", "gradual:until=50%"],
    "autofreeze": ["autofreeze", "autofreeze:every=5st,percentile=75"],
    "pipetransformer": ["pipetransformer", "pipetransformer:rule=cap,alpha=0.2"],
    "grades": [
        "grades",
        "grades:every=2st,per=group",
        "grades:tau=5,relative=false,measure=gradient,start=0%,every=3st",
    ],
    "egeria": [
        "egeria:tolerance=2,window=2",
        "egeria:every=2st,bootstrap=none,window=3,tolerance=0.9,refresh=5st,reference=snapshot",
        "egeria:every=1st,bootstrap=9,window=2,tolerance=1,unfreeze=decay,drop=1.5",
    ],
    "etuner": ["etuner:threshold=0.9,patience=1,unfreeze=0.9", "etuner:unfreeze=none,every=1ep"],
    "apf": ["apf:threshold=1", "apf:threshold=0.9,crowded=0,every=2st"],
    "slimfit": ["slimfit", "slimfit:frozen=0.5,every=3st,seed=1"],
    "chain-thaw": ["chain-thaw", "chain-thaw:patience=1,head_lr=10", "chain-thaw:length=4st"],
    "lp-ft": ["lp-ft", "lp-ft:patience=1,restore_best=false,lr=0.1"],
    "fine-tune": ["fine-tune", "fine-tune:head=30%,spread=1"],
    "phases": [f"phases:file={Path(__file__).with_name('phases.yaml')}"],
    "plateau": ["plateau", "plateau:direction=freeze,groups_per_step=2,cooldown=1"],
    "elastic": ["elastic:every=5st", "elastic:rho=0.3,every=1st", "elastic:rho=1,every=1ep"],
    "al-sar": [
        "al-sar:every=3st",
        "al-sar:every=1st,by_batch=true",
        "al-sar:every=1ep,unfreeze_rate=0,by_batch=true,seed=2",
    ],
    "auto-rgn": [
        "auto-rgn",
        "auto-rgn:mode=selection,threshold=0.8,steps=2,every=3st",
        "auto-rgn:mode=selection,per=parameter",
    ],
    "auto-snr": ["auto-snr", "auto-snr:threshold=0.9,per=parameter,steps=2"],
    "fim": ["fim", "fim:groups=2,steps=3,every=1ep,normalise=true"],
    "lisa": [
        "lisa:every=4st",
        "lisa:every=4st,layers=9,importance=weight_norm,states=release",
        "lisa:every=10%,layers=1,keep_embeddings=false,seed=1",
    ],
    "badam": ["badam:every=5st", "badam:every=4st,order=random,embeddings=true,seed=3"],
    "hift": [
        "hift",
        "hift:order=random,groups=2",
        "hift:every=3st,order=descending,live_norm=true",
    ],
}
ALL = [spec for name in available_policies() for spec in SPECS.get(name, [name])]
EVERY = Duration.parse


@dataclass(frozen=True, slots=True)
class FreezeQuiet(Policy):
    """Test policy: freezes the backbone groups whose gradient is below the median."""

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", EVERY("3st")),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        values = event.signals.get("gradient_norm", {})
        middle = sorted(values.values())[len(values) // 2] if values else 0
        quiet = {g for g, v in values.items() if v < middle} - groups.head
        return FreezePlan(frozen=frozenset(quiet)), {"seen": state.get("seen", 0) + 1}


COMBINED = [
    Union((Gradual(), Freeze("kind:bias"))),
    Then(LinearProbe(), EVERY("2ep"), Gradual(EVERY("1ep"))),
    Then(Full(), EVERY("9st"), FreezeQuiet()),
    KeepTrainable(LinearProbe(), "kind:norm"),
    Bootstrap(FreezeQuiet(), EVERY("10%")),
    MaxFrozen(LinearProbe(), 0.5),
    PrefixOnly(FreezeQuiet()),
    Every(FreezeQuiet(), EVERY("1ep")),
    CostVeto(Gradual(), switch_cost_s=0.1),
    CostVeto(FreezeQuiet(), switch_cost_s=0.1),
    Guard(LinearProbe(), metric="loss", tolerance=0.05),
    Guard(FreezeQuiet(), metric="accuracy", mode="max", patience=2),
    Placebo(FreezeQuiet(), seed=1),
    Discriminative(Gradual(), 1.5),
    Slanted(Discriminative(FreezeQuiet()), cut=0.3),
    Then(Slanted(Full()), EVERY("2ep"), Slanted(Gradual())),
    FreezeQuiet(),
    Steer(FreezeQuiet(), patience=1),
    Steer(Gradual(), metric="accuracy", mode="max", patience=1),
    Affordable(FreezeQuiet(), time=0.6),
    Affordable(Gradual(), memory=0.5),
]


def test_every_shipped_policy_is_registered() -> None:
    shipped = {
        kind
        for info in pkgutil.iter_modules(policies.__path__, "frostline.policies.")
        for kind in vars(importlib.import_module(info.name)).values()
        if isinstance(kind, type)
        and issubclass(kind, Policy)
        and kind.__module__ == info.name
        and not kind.__name__.startswith("_")
    }
    kinds = (policy_class(name) for name in (*available_policies(), *available_combinators()))
    assert shipped == {kind for kind in kinds if kind.__module__.startswith("frostline.policies.")}


@pytest.mark.parametrize("spec", ALL)
def test_registered_policy_holds_the_contract(spec: str) -> None:
    policy = make_policy(spec)
    for seed in range(3):
        check_policy(policy, seed=seed)
    assert make_policy(policy_text(policy)) == policy


@pytest.mark.parametrize("policy", COMBINED, ids=repr)
def test_combinator_holds_the_contract(policy: Policy) -> None:
    for seed in range(3):
        check_policy(policy, seed=seed)


@dataclass(frozen=True)
class Breaks(Policy):
    """Test policy that breaks one rule."""

    how: str

    def init(self, groups: LayerGroups) -> State:
        return {"n": random.random()} if self.how == "init" else {"n": 0}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        step, frozen = event.progress.step, frozenset[str]()
        if self.how == "mutates":
            state["n"] += 1
        if self.how == "random":
            frozen = frozenset(random.sample(sorted(groups.backbone), 2))
        if self.how == "remembers":
            object.__setattr__(self, "how", "remembers")
            object.__setattr__(self, "last", getattr(self, "last", -1) + 1)
            frozen = frozenset(groups.names[: getattr(self, "last") % 3])  # noqa: B009
        if self.how == "unknown":
            frozen = frozenset({"no such group"})
        if self.how == "everything":
            frozen = frozenset(groups.names)
        state = {"n": (1, 2)} if self.how == "tuple" else dict(state)
        if self.how == "keys":
            state = {"n": {step: 1}}  # type: ignore[dict-item]
        if self.how == "nan":
            state = {"n": float("nan")}
        plan = FreezePlan(frozen=frozen)
        return (plan if self.how != "json plan" else plan.to_json()), state  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("init", "init is pure"),
        ("mutates", "does not change the state"),
        ("random", "same answer twice"),
        ("remembers", "same answer twice"),
        ("tuple", "plain JSON"),
        ("keys", "plain JSON"),
        ("nan", "plain JSON"),
        ("json plan", "answers with a plan"),
    ],
)
def test_a_broken_policy_is_caught(how: str, rule: str) -> None:
    with pytest.raises(ContractBroken, match=rule):
        check_policy(Breaks(how))


@pytest.mark.parametrize("how", ["unknown", "everything"])
def test_a_plan_that_does_not_fit_is_caught(how: str) -> None:
    with pytest.raises(Exception, match="cannot"):
        check_policy(Breaks(how))


def test_mutable_configuration_is_caught() -> None:
    @dataclass
    class Mutable(Policy):
        """Not frozen."""

        def decide(
            self, groups: LayerGroups, state: State, event: Event
        ) -> tuple[FreezePlan, State]:
            return FreezePlan(), state

    with pytest.raises(ContractBroken, match="immutable"):
        check_policy(Mutable())


def test_hidden_memory_breaks_resume() -> None:
    """State kept outside the JSON state is lost on resume; the suite sees that."""
    seen: list[int] = []

    @dataclass(frozen=True)
    class Hidden(Policy):
        """Counts events in a list of its own."""

        def decide(
            self, groups: LayerGroups, state: State, event: Event
        ) -> tuple[FreezePlan, State]:
            if event.progress.step not in seen:
                seen.append(event.progress.step)
            return FreezePlan(frozen=frozenset(groups.names[: len(seen) % 2])), state

    with pytest.raises(ContractBroken, match="interrupted equals uninterrupted"):
        check_policy(Hidden())


def test_example_groups_are_measured() -> None:
    assert example_groups().measured
    assert dataclasses.asdict(example_groups()[0])["name"] == "block0"


def test_the_events_of_a_pretend_run_keep_to_the_windows_of_needs() -> None:
    """A request with `after` and `until` is read where a driver would read it."""
    policy = make_policy("elastic:every=5st")
    read = [e.sampled.get("update_importance") for e in event_stream(policy, example_groups())]
    assert sorted({at for at in read if at is not None}) == [2, *range(7, 43, 5)]


def test_needs_that_no_driver_can_serve_are_caught() -> None:
    @dataclass(frozen=True)
    class Torn(Policy):
        """Wants one signal in two ways."""

        def needs(self) -> tuple[Need, ...]:
            return Need("loss", EVERY("2st")), Need("loss", EVERY("3st"))

        def decide(
            self, groups: LayerGroups, state: State, event: Event
        ) -> tuple[FreezePlan, State]:
            return FreezePlan(), state

    with pytest.raises(PolicyError, match="two ways"):
        check_policy(Torn())
