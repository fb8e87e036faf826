"""Unfreezing schedules: ULMFiT with its parts, and the wav2vec 2.0 recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from frostline.clock import Duration, Progress
from frostline.driver import Driver
from frostline.errors import PolicyError, SelectorError, SelectorMatchedNothing
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.scheduled import Gradual, ULMFiT, Wav2Vec2
from frostline.policy import Event, EventKind, Policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

D = Duration.parse
GROUPS = example_groups(5)
BLOCKS = ["block0", "block1", "block2", "block3"]


def plan_at(policy: Policy, step: int, total: int | None = 100) -> FreezePlan:
    event = Event(EventKind.STEP, Progress(step, total, 10))
    return policy.decide(GROUPS, policy.init(GROUPS), event)[0]


# -- ULMFiT -----------------------------------------------------------------------------------


def test_ulmfit_unfreezes_one_group_per_epoch() -> None:
    assert [len(plan_at(ULMFiT(), s).frozen) for s in (0, 9, 10, 20, 30, 39, 40, 99)] == [
        4, 4, 3, 2, 1, 1, 0, 0
    ]  # fmt: skip
    assert plan_at(ULMFiT(), 10).frozen == {"block0", "block1", "block2"}


def test_ulmfit_divides_rates_by_its_factor_from_group_to_group() -> None:
    rates = plan_at(ULMFiT(slanted=False), 0).lr_scale
    assert "head" not in rates
    assert [rates[name] for name in BLOCKS] == pytest.approx(
        [1 / 45.6976, 1 / 17.576, 1 / 6.76, 1 / 2.6]
    )


def test_ulmfit_slants_all_rates_alike() -> None:
    # cut = 10: p = 0, 1/2, 1, 1/2 at 0, 5, 10, 55
    for step, rate in ((0, 1 / 32), (5, 16.5 / 32), (10, 1), (55, 16.5 / 32)):
        rates = plan_at(ULMFiT(), step).lr_scale
        assert rates.get("head", 1.0) == pytest.approx(rate)
        assert rates["block3"] == pytest.approx(rate / 2.6)


def test_every_part_of_ulmfit_can_be_taken_away() -> None:
    """The ladder of the paper's table 7."""
    nothing = ULMFiT(gradual=False, factor=1, slanted=False)
    assert all(plan_at(nothing, step) == FreezePlan() for step in range(0, 100, 7))
    alone = ULMFiT(factor=1, slanted=False)
    assert all(plan_at(alone, s) == plan_at(Gradual(), s) for s in range(0, 100, 7))
    discriminative = plan_at(ULMFiT(gradual=False, slanted=False), 0)
    assert not discriminative.frozen
    assert set(discriminative.lr_scale) == set(BLOCKS)
    slanted = plan_at(ULMFiT(gradual=False, factor=1), 0)
    assert set(slanted.lr_scale.values()) == {1 / 32}
    assert set(slanted.lr_scale) == set(GROUPS.names)


def test_ulmfit_without_slanted_rates_needs_no_total() -> None:
    assert len(plan_at(ULMFiT(slanted=False), 10, total=None).frozen) == 3
    with pytest.raises(PolicyError, match="total_steps="):
        plan_at(ULMFiT(), 10, total=None)


@pytest.mark.parametrize(
    "options", [{"factor": 0.5}, {"cut": 1.0}, {"ratio": 0.0}, {"groups_per_step": 0}]
)
@pytest.mark.parametrize("on", [True, False])
def test_ulmfit_checks_the_options_of_all_parts(options: dict[str, float], *, on: bool) -> None:
    with pytest.raises(PolicyError):
        ULMFiT(gradual=on, slanted=on, **options)  # type: ignore[arg-type]


# -- wav2vec 2.0 ------------------------------------------------------------------------------


def test_wav2vec2_trains_the_head_first_and_never_the_front_end() -> None:
    policy = Wav2Vec2(D("30st"))
    assert plan_at(policy, 0).frozen == plan_at(policy, 29).frozen == GROUPS.backbone
    assert plan_at(policy, 30).frozen == plan_at(policy, 99).frozen == {"block0"}


def test_wav2vec2_caps_the_first_phase_in_short_runs() -> None:
    assert len(plan_at(Wav2Vec2(), 49).frozen) == 4
    assert len(plan_at(Wav2Vec2(), 50).frozen) == 1
    assert len(plan_at(Wav2Vec2(at_most=None), 99).frozen) == 4
    for step, count in ((9_999, 4), (10_000, 1)):
        assert len(plan_at(Wav2Vec2(), step, total=100_000).frozen) == count
        assert len(plan_at(Wav2Vec2(), step, total=None).frozen) == count


def test_wav2vec2_takes_a_selector_for_the_front_end() -> None:
    plan = plan_at(Wav2Vec2(D("1st"), frontend="block0 | block1.weight"), 1)
    assert plan.frozen == {"block0", "block1"}
    assert plan.exempt["block1"] == {"block1.bias", "block1.norm.weight"}
    assert plan_at(Wav2Vec2(D("1st"), frontend="all"), 1).frozen == GROUPS.backbone
    with pytest.raises(SelectorMatchedNothing):
        Wav2Vec2(frontend="conv*").init(GROUPS)
    with pytest.raises(SelectorError):
        Wav2Vec2(frontend="&")


# -- end to end -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "joins"),
    [
        (Gradual(D("2st")), {"layer2": 2, "layer1": 4, "layer0": 6}),
        (ULMFiT(every=D("2st")), {"layer2": 2, "layer1": 4, "layer0": 6}),
        (Wav2Vec2(D("3st")), {"layer2": 3, "layer1": 3}),
    ],
    ids=repr,
)
def test_what_is_unfrozen_really_trains(policy: Policy, joins: dict[str, int]) -> None:
    """Public ports freeze before they build the optimizer: what joins later never moves.

    The optimizer here is older than the policy's first plan, and every group moves from the very
    step at which it joins, and not before.
    """
    case = NumpyCase()
    driver = Driver(policy, case.backend, total_steps=12, steps_per_epoch=4)
    joined: dict[str, int] = {}
    for step in range(12):
        before = {n: a.copy() for n, a in case.net.parameters.items()}
        with driver.step():
            case.backward()
            case.update()
        for layer in case.net.layers[:-1]:
            moved = {
                part
                for part in ("weight", "bias")
                if (case.net.parameters[f"{layer}.{part}"] != before[f"{layer}.{part}"]).any()
            }
            assert moved == ({"weight", "bias"} if layer in joined or moved else set())
            if moved:
                joined.setdefault(layer, step)
    assert joined == joins
    driver.finish()


def test_wav2vec2_takes_the_first_group_with_parameters_for_the_front_end() -> None:
    groups = LayerGroups(
        tuple(replace(g, parameters=()) if g.depth == 0 else g for g in example_groups(4))
    )
    policy = Wav2Vec2(head_only=Duration.parse("1st"))
    event = Event(EventKind.STEP, Progress(1, 10))
    plan, _ = policy.decide(groups, policy.init(groups), event)
    assert plan.frozen == {"block0", "block1"}
