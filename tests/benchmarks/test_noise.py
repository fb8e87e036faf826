"""The pretend runs of pure noise, and how policies are told apart by them."""

from __future__ import annotations

import random
import statistics

import noise
import pytest

from frostline.clock import Progress
from frostline.plan import FreezePlan
from frostline.registry import make_policy
from frostline.signals import Need
from frostline.testing import example_groups

GROUPS = example_groups(noise.BACKBONE + 1)


def test_a_frozen_group_has_no_gradient() -> None:
    plan = FreezePlan(frozen=frozenset({"block0"}))
    progress = Progress(9, noise.TOTAL, noise.STEPS_PER_EPOCH)
    every = make_policy("apf").needs()[0].every
    found = noise.Noise().values(Need("gradient_norm", every), GROUPS, plan, progress)
    assert set(found) == set(GROUPS.names) - {"block0"}
    wide = Need("gradient_norm", every, frozen_too=True)
    assert set(noise.Noise().values(wide, GROUPS, plan, progress)) == set(GROUPS.names)


def test_similarities_lie_between_0_and_1_and_rates_follow_the_schedule() -> None:
    every = make_policy("apf").needs()[0].every
    progress = Progress(550, noise.TOTAL, noise.STEPS_PER_EPOCH)
    similar = noise.Noise().values(Need("cka_pretrained", every), GROUPS, FreezePlan(), progress)
    assert all(0 <= v < 1 for v in similar.values())
    rates = noise.Noise().values(Need("learning_rate", every), GROUPS, FreezePlan(), progress)
    assert set(rates.values()) == {noise.rate(progress)}
    assert noise.rate(progress) == pytest.approx(noise.PEAK_RATE / 2)


def test_a_group_frozen_in_part_counts_by_its_parameters() -> None:
    size = GROUPS["block0"].parameter_count
    plan = FreezePlan(
        frozen=frozenset({"block0", "block1"}),
        exempt={"block0": frozenset({"block0.weight"})},
    )
    assert noise.groups_frozen(plan, GROUPS) == pytest.approx(1 + (size - 64) / size)


def test_a_schedule_is_told_from_a_rule_that_listens() -> None:
    schedule = noise.study("freeze-training", 2)
    assert not schedule["by_signals"]
    assert not schedule["by_losses"]
    assert schedule["changes"]
    listens = noise.study("autofreeze", 2)
    assert listens["by_signals"]
    assert not listens["by_losses"]
    assert not noise.study("linear-probe", 2)["changes"]
    assert noise.study("plateau", 2)["by_losses"]


def brute_force(seed: int, decisions: int) -> int:
    """Groups frozen by a median rule on independent changes: no code of ours in it."""
    source, start = random.Random(seed), 0
    for _ in range(decisions):
        changes = [source.random() for _ in range(12 - start)]
        if changes:
            middle = statistics.median(changes)
            start += next(i for i, c in enumerate(changes) if c >= middle)
    return start


def test_autofreeze_on_noise_freezes_what_arithmetic_says() -> None:
    """With 20 intervals, 4, 9, 14 and 19 decisions by the quarters of the run."""
    expected = [statistics.fmean(brute_force(s, n) for s in range(2000)) for n in (4, 9, 14, 19)]
    assert expected == pytest.approx([3.1, 6.5, 9.0, 10.3], abs=0.15)
    policy = make_policy("autofreeze:every=5%")
    runs = [noise.plans(policy, GROUPS, noise.Noise(seed=s)) for s in range(60)]
    found = [statistics.fmean(v) for v in noise.at_quarters(runs, GROUPS)]
    assert found == pytest.approx(expected, abs=1.0)


def test_the_table_lists_every_policy() -> None:
    results = [noise.study(spec, 2) for spec in ("apf", "full", "gradual")]
    text = noise.table({"seeds": 2, "results": results})
    assert "| `apf` |" in text
    assert "only the clock (and a seed): `gradual`" in text
    assert "static: `full`" in text
