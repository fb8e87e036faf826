from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from frostline.clock import Duration, Progress
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.importance import FIM, AutoRGN, AutoSNR
from frostline.policy import Event, EventKind, Policy, State
from frostline.testing import example_groups
from numpy_case import NumpyCase

EVERY = Duration.parse
GROUPS = example_groups(4)
SELECTION = AutoRGN(mode="selection")
ALL = [AutoRGN(), SELECTION, AutoSNR(), FIM()]


def start(policy: Policy, groups: LayerGroups = GROUPS) -> tuple[FreezePlan, State]:
    event = Event(EventKind.START, Progress(0, 100, 10))
    return policy.decide(groups, policy.init(groups), event)


def read(
    policy: Policy,
    values: Mapping[str, float],
    state: State | None = None,
    *,
    groups: LayerGroups = GROUPS,
    step: int = 5,
) -> tuple[FreezePlan, State]:
    signal = policy.needs()[0].signal
    event = Event(EventKind.STEP, Progress(step, 100, 10), {signal: values}, sampled={signal: step})
    return policy.decide(groups, state or policy.init(groups), event)


def of(*values: float) -> dict[str, float]:
    return dict(zip(GROUPS.names, values, strict=True))


# -- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_the_backbone_waits_for_the_first_reading(policy: Policy) -> None:
    plan, _ = start(policy)
    assert plan.frozen == GROUPS.backbone
    assert policy.needs()[0].frozen_too


@pytest.mark.parametrize("policy", ALL, ids=repr)
@pytest.mark.parametrize("values", [{}, of(0, 0, 0, 0), of(*[math.nan] * 4)], ids=str)
def test_a_reading_that_says_nothing_changes_nothing(
    policy: Policy, values: Mapping[str, float]
) -> None:
    plan, state = read(policy, values)
    assert plan.frozen == GROUPS.backbone
    known, state = read(policy, of(1, 2, 4, 3), state, step=15)
    assert known.frozen != GROUPS.backbone
    assert read(policy, values, state, step=25)[0] == known


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_neither_order_nor_scale_of_readings_matters(policy: Policy) -> None:
    values = of(1, 2, 4, 3)
    plan, _ = read(policy, values)
    assert read(policy, dict(reversed(values.items())))[0] == plan
    assert read(policy, {n: v * 1024 for n, v in values.items()})[0] == plan


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_a_reading_counts_until_the_next(policy: Policy) -> None:
    plan, state = read(policy, of(1, 2, 4, 3))
    signal = policy.needs()[0].signal
    event = Event(
        EventKind.STEP, Progress(9, 100, 10), {signal: of(9, 1, 1, 1)}, sampled={signal: 5}
    )
    assert policy.decide(GROUPS, state, event) == (plan, state)
    assert read(policy, of(9, 1, 1, 1), state, step=15)[0] != plan


def readings(policy: Policy, steps: int, per_epoch: int) -> list[int]:
    """After how many steps readings were taken in a run, with a value for every unit."""
    case, seen = NumpyCase(), list[int]()
    driver = Driver(policy, case.backend, steps, per_epoch)
    need = policy.needs()[0]
    for _ in range(steps):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
        at = driver._gauges.sampled.get(need.signal)
        if at is not None and at not in seen:
            seen.append(at)
            groups = driver.backend.groups
            units = {p.name for g in groups for p in g.parameters}
            wanted = set(groups.names) if need.per == "group" else units
            assert set(driver._gauges.values[need.signal]) == wanted
    driver.finish()
    return seen


@pytest.mark.parametrize(
    ("policy", "seen"),
    [
        (AutoRGN(), [5, 17, 29]),
        (SELECTION, [5, 17, 29]),
        (AutoRGN(mode="selection", per="parameter", steps=2), [2, 14, 26, 38]),
        (AutoSNR(), [5, 17, 29]),
        (AutoSNR(steps=3, every=EVERY("10%")), [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]),
        (FIM(), [10]),
        (FIM(steps=4, every=EVERY("15st")), [4, 19, 34]),
    ],
    ids=repr,
)
def test_readings_are_of_the_first_batches_of_each_interval(
    policy: Policy, seen: list[int]
) -> None:
    """40 steps in epochs of 12; every group has a value, frozen or not."""
    assert readings(policy, 40, 12) == seen


# -- Auto-RGN ---------------------------------------------------------------------------------


def test_auto_rgn_scales_rates_by_the_largest() -> None:
    plan, state = read(AutoRGN(), of(0.1, 0.4, 0.2, 0.3))
    assert not plan.frozen
    assert plan.lr_scale == pytest.approx({"block0": 0.25, "block2": 0.5, "head": 0.75})
    plan, _ = read(AutoRGN(), of(0.1, 0.2, 0, 0.8), state, step=15)  # the head's own counts
    assert plan.lr_scale == pytest.approx({"block0": 0.125, "block1": 0.25, "block2": 0})


def test_auto_rgn_by_selection_freezes_below_a_share_of_the_largest() -> None:
    """Of the largest of the backbone, 4: half of it is 2, which trains."""
    plan, state = read(SELECTION, of(1.99, 4, 2, 900))
    assert plan.frozen == {"block0"}
    assert plan.lr_scale == {}
    plan, _ = read(SELECTION, of(4, 1, 1, 0), state, step=15)
    assert plan.frozen == {"block1", "block2"}
    plan, _ = read(AutoRGN(mode="selection", threshold=1), of(1.99, 4, 2, 900))
    assert plan.frozen == {"block0", "block2"}


def test_auto_rgn_by_parameter_leaves_the_rest_of_a_group_training() -> None:
    policy = AutoRGN(mode="selection", per="parameter")
    groups = example_groups(2)
    values = {"block0.weight": 4.0, "block0.bias": 2.5, "block0.norm.weight": 0.1}
    plan, _ = read(policy, values, groups=groups)
    assert plan.frozen_parameters(groups) == {"block0.norm.weight"}
    assert plan.live_dropout == {"block0"}
    assert start(policy, groups)[0].frozen_parameters(groups) == set(values)


def backward_reaches(case: NumpyCase) -> set[str]:
    return {n.partition(".")[0] for n in case.net.parameters if case.has_gradient(n)}


@pytest.mark.parametrize("policy", [AutoRGN(mode="selection", threshold=1), AutoSNR(threshold=1)])
def test_selection_really_freezes(policy: Policy) -> None:
    """The public code leaves requires_grad on: nothing is saved, and all but the rates moves."""
    case = NumpyCase()
    driver = Driver(policy, case.backend, 30, 10)
    for step in range(20):
        with driver.step() as plan:
            case.backward()
            trained = set(driver.backend.groups.names) - plan.frozen
            wide = driver._gauges.wants_frozen(step) and plan.frozen
            assert wide or backward_reaches(case) == trained
            driver.sample()
            assert backward_reaches(case) == trained
            case.update()
    assert len(driver.plan.frozen) == 2  # one group of the backbone and the head train
    holds = driver.finish().holds
    assert holds


@pytest.mark.parametrize(
    "policy", [AutoRGN(mode="selection", per="parameter"), AutoSNR(per="parameter")]
)
def test_by_parameter_reads_and_freezes_parameters(policy: Policy) -> None:
    assert {need.per for need in policy.needs()} == {"parameter"}
    groups = example_groups(2)
    values = {"block0.weight": 4.0, "block0.bias": 1.0, "head.weight": 90.0}
    plan, _ = read(policy, values, groups=groups)  # the norm has no value
    assert plan.frozen_parameters(groups) == {"block0.bias", "block0.norm.weight"}


def test_auto_rgn_reads_the_relative_norm_of_the_first_batches() -> None:
    """Against numpy on the very first gradients, with the backbone's weights unmoved."""
    case, wanted = NumpyCase(), dict[str, list[float]]()
    start_values = {n: a.copy() for n, a in case.net.parameters.items()}
    driver = Driver(AutoRGN(steps=3), case.backend, 40, 10)
    for _ in range(3):
        with driver.step():
            case.backward()
            for group in driver.backend.groups:
                names = sorted(group.parameter_names)
                gradients = [case.net.gradients[n] for n in names]
                g = math.sqrt(sum(float(np.sum(a**2)) for a in gradients if a is not None))
                w = math.sqrt(sum(float(np.sum(case.net.parameters[n] ** 2)) for n in names))
                wanted.setdefault(group.name, []).append(g / w)
            driver.sample()
            case.update()
    for name in case.net.parameters:
        moved = not np.array_equal(case.net.parameters[name], start_values[name])
        assert moved == name.startswith("head")
    driver.begin_step()
    means = {n: sum(v) / 3 for n, v in wanted.items()}
    scale = {n: v / max(means.values()) for n, v in means.items()}
    assert {n: driver.plan.lr_scale.get(n, 1.0) for n in scale} == pytest.approx(scale)


# -- Auto-SNR ---------------------------------------------------------------------------------


def test_auto_snr_brings_ratios_to_one_before_the_threshold() -> None:
    """The public code compares raw ratios with 0.95, here all large or all small."""
    for scale in (1e-4, 1.0, 1e4):
        values = of(*(scale * v for v in (0.2, 0.5, 1.0, 7.0)))
        assert read(AutoSNR(), values)[0].frozen == {"block0"}
        assert read(AutoSNR(threshold=0.95), values)[0].frozen == {"block0", "block1"}


def test_auto_snr_sees_noise_for_what_it_is() -> None:
    """layer0's gradient is the same in all batches, layer1's has no mean, layer2's half of each."""
    case, source = NumpyCase(), np.random.default_rng(0)
    driver = Driver(AutoSNR(steps=8), case.backend, 40, 20)
    noise = {"layer0": 0.1, "layer1": 50.0, "layer2": 0.1, "head": 1.0}
    for _ in range(8):
        with driver.step():
            for name, weight in case.net.parameters.items():
                layer = name.partition(".")[0]
                jitter = noise[layer] * source.normal(size=weight.shape)
                case.net.gradients[name] = 1.0 + jitter
            driver.sample()
            case.update()
    driver.begin_step()
    assert driver.plan.frozen == {"layer1"}


# -- FIM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"groups": 1}, {"block1"}),
        ({"groups": 2}, {"block1", "block2"}),
        ({"groups": 9}, {"block0", "block1", "block2"}),
        ({"fraction": 0.1}, {"block1"}),
        ({"fraction": 0.67}, {"block1", "block2"}),
        ({"fraction": 1.0}, {"block0", "block1", "block2"}),
        ({}, {"block1"}),
    ],
)
def test_fim_trains_the_first_of_the_ranking(options: dict[str, Any], trained: set[str]) -> None:
    plan, _ = read(FIM(**options), of(1, 4, 2, 900))
    assert GROUPS.backbone - plan.frozen == trained


@pytest.mark.parametrize(("count", "trained"), [(5, 2), (10, 4), (12, 4), (2, 1), (1, 1)])
def test_fim_counts_shares_exactly(count: int, trained: int) -> None:
    """0.4 of 5 and of 10 are whole."""
    groups, source = example_groups(count + 1), random.Random(1)
    values = {g.name: source.uniform(1, 2) for g in groups}
    plan, _ = read(FIM(), values, groups=groups)
    assert count - len(plan.frozen) == trained


def test_fim_by_size_prefers_dense_information() -> None:
    def group(name: str, depth: int, size: int) -> LayerGroup:
        return LayerGroup(name, depth, (TensorInfo(f"{name}.w", (size,)),))

    groups = LayerGroups((group("large", 0, 100), group("small", 1, 10), group("head", 2, 5)))
    values = {"large": 5.0, "small": 1.0, "head": 1.0}
    assert read(FIM(groups=1), values, groups=groups)[0].frozen == {"small"}
    assert read(FIM(groups=1, normalise=True), values, groups=groups)[0].frozen == {"large"}


def test_fim_ranks_by_squared_gradients_of_the_sample() -> None:
    case, total = NumpyCase(), dict[str, float]()
    driver = Driver(FIM(groups=1, steps=4), case.backend, 40, 20)
    for _ in range(4):
        with driver.step():
            case.backward()
            for name, gradient in case.net.gradients.items():
                assert gradient is not None
                layer = name.partition(".")[0]
                total[layer] = total.get(layer, 0.0) + float(np.sum(np.square(gradient)))
            driver.sample()
            case.update()
    driver.begin_step()
    best = max(driver.backend.groups.backbone, key=lambda n: total[n])
    assert driver.backend.groups.backbone - driver.plan.frozen == {best}
    values = driver._gauges.values["fisher"]
    assert values == pytest.approx({n: v / 4 for n, v in total.items()})


# -- options ----------------------------------------------------------------------------------


def test_published_defaults() -> None:
    assert (AutoRGN().mode, AutoRGN().steps, str(AutoRGN().every)) == ("rates", 5, "1ep")
    assert (AutoSNR().steps, str(AutoSNR().every)) == (5, "1ep")
    assert (FIM().every, FIM().normalise) == (None, False)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AutoRGN, {"threshold": 0}),
        (AutoRGN, {"threshold": 1.5}),
        (AutoRGN, {"steps": 0}),
        (AutoRGN, {"every": EVERY("0ep")}),
        (AutoRGN, {"per": "parameter"}),
        (AutoSNR, {"steps": 1}),
        (AutoSNR, {"threshold": math.nan}),
        (AutoSNR, {"every": EVERY("0st")}),
        (FIM, {"fraction": 0}),
        (FIM, {"fraction": 1.1}),
        (FIM, {"groups": 0}),
        (FIM, {"steps": 0}),
        (FIM, {"every": EVERY("0%")}),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="cannot"):
        kind(**options)


def test_what_readings_cost_is_said_at_the_start() -> None:
    assert "5 steps of a reading, every 1ep" in AutoRGN().notice()
    assert "5 steps of a reading, every 1ep" in AutoSNR().notice()
    assert "the first 10 steps: " in FIM().notice()
    assert "and again every 2ep" in FIM(every=Duration.parse("2ep")).notice()
