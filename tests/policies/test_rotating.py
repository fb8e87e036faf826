from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from frostline.clock import Duration, Progress
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.rotating import LISA, BAdam, HiFT
from frostline.policy import Event, EventKind, Policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

EVERY = Duration.parse


def with_embeddings(count: int = 6) -> LayerGroups:
    """A group of embeddings, blocks and a head."""
    first = LayerGroup("embeddings", 0, (TensorInfo("table", (9, 4), kind="embedding"),))
    rest = example_groups(count - 1)
    return LayerGroups((first, *(replace(g, depth=g.depth + 1) for g in rest)))


def plans(
    policy: Policy,
    groups: LayerGroups,
    steps: int,
    norms: Mapping[str, float] | None = None,
    *,
    through_json: bool = False,
) -> list[FreezePlan]:
    """The plan of each step; norms are known from the first step on."""
    state, found = policy.init(groups), list[FreezePlan]()
    for step in range(steps):
        signals = {} if norms is None else {"weight_norm": norms}
        sampled = dict.fromkeys(signals, step)
        kind = EventKind.STEP if step else EventKind.START
        event = Event(kind, Progress(step, steps, 10), signals, sampled=sampled)
        if through_json:
            policy, state = copy.deepcopy(policy), json.loads(json.dumps(state))
        plan, state = policy.decide(groups, state, event)
        plan.check(groups)
        found.append(plan)
    return found


def trained(groups: LayerGroups, found: Sequence[FreezePlan]) -> list[str]:
    """Names of the groups of the backbone that train, by step."""
    order = [n for n in groups.names if n in groups.backbone]
    return [" ".join(n for n in order if n not in p.frozen) for p in found]


ALL = [
    LISA(every=EVERY("3st")),
    LISA(every=EVERY("3st"), layers=1, importance="weight_norm", states="release", seed=5),
    BAdam(every=EVERY("4st")),
    BAdam(every=EVERY("4st"), order="random"),
    HiFT(),
    HiFT(order="random", groups=2),
]


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_a_resume_in_the_middle_of_a_turn_draws_the_same(policy: Policy) -> None:
    groups = with_embeddings(7)
    norms = {n: 1.0 + i for i, n in enumerate(groups.names)}
    whole = plans(policy, groups, 40, norms)
    assert plans(policy, groups, 40, norms, through_json=True) == whole
    assert len(set(trained(groups, whole))) > 1


@pytest.mark.parametrize(
    "policy",
    [LISA(every=EVERY("7st")), BAdam(every=EVERY("7st")), HiFT(every=EVERY("7st"))],
    ids=repr,
)
def test_turns_change_on_their_boundaries_and_the_last_may_be_short(policy: Policy) -> None:
    groups = example_groups(30)
    found = trained(groups, plans(policy, groups, 24))
    changes = [i for i in range(1, 24) if found[i] != found[i - 1]]
    assert changes == [7, 14, 21]


# -- LISA -------------------------------------------------------------------------------------


def chi_square(counts: Mapping[Any, int], shares: Mapping[Any, float]) -> float:
    total = sum(counts.values())
    assert counts.keys() <= shares.keys()
    return sum((counts.get(k, 0) - total * p) ** 2 / (total * p) for k, p in shares.items())


def successive(weights: Mapping[str, float], layers: int) -> dict[str, float]:
    """Exact probabilities of the drawn sets, by going through all orders."""
    shares: dict[str, float] = {}
    for order in permutations(weights, layers):
        share, left = 1.0, sum(weights.values())
        for name in order:
            share *= weights[name] / left
            left -= weights[name]
        key = " ".join(sorted(order))
        shares[key] = shares.get(key, 0.0) + share
    return shares


def test_lisa_draws_all_pairs_alike() -> None:
    """6 blocks, 15 pairs: chi square has 14 degrees of freedom, 36.1 is its 0.1 % limit."""
    groups = with_embeddings(8)
    counts = Counter(" ".join(LISA().drawn(groups, turn)) for turn in range(6000))
    assert len(counts) == 15
    assert chi_square(counts, dict.fromkeys(counts, 1 / 15)) < 36.1


def test_lisa_by_importance_draws_successively_by_weight() -> None:
    """4 blocks, 6 pairs: 5 degrees of freedom, 0.1 % limit 20.5."""
    groups = with_embeddings(6)
    weights = {"block0": 1.0, "block1": 2.0, "block2": 3.0, "block3": 6.0}
    policy = LISA(importance="weight_norm")
    norms = weights | {"embeddings": 100.0, "head": 100.0}
    counts = Counter(" ".join(policy.drawn(groups, turn, norms)) for turn in range(6000))
    wanted = successive(weights, 2)
    assert sum(wanted.values()) == pytest.approx(1)
    assert chi_square(counts, wanted) < 20.5
    # the test can tell: neither uniform draws nor products of shares would pass
    assert chi_square(counts, dict.fromkeys(wanted, 1 / 6)) > 100
    products = {k: np.prod([weights[n] for n in k.split()]) for k in wanted}
    total = sum(products.values())
    assert chi_square(counts, {k: float(v / total) for k, v in products.items()}) > 50


def test_lisa_by_importance_is_uniform_until_norms_are_known() -> None:
    groups, policy = with_embeddings(6), LISA(importance="weight_norm")
    for nothing in (None, {}, dict.fromkeys(groups.names, 0.0), {"block0": float("nan")}):
        counts = Counter(" ".join(policy.drawn(groups, turn, nothing)) for turn in range(3000))
        assert chi_square(counts, dict.fromkeys(counts, 1 / 6)) < 20.5


def test_lisa_never_draws_what_weighs_nothing_while_others_do() -> None:
    groups, policy = with_embeddings(6), LISA(importance="weight_norm", layers=3)
    norms = {"block1": 1.0, "block2": 1.0, "block3": 1.0}
    for turn in range(50):
        assert policy.drawn(groups, turn, norms) == ["block1", "block2", "block3"]


def test_lisa_keeps_a_turns_draw_whatever_is_read_meanwhile() -> None:
    groups, policy = with_embeddings(6), LISA(EVERY("5st"), importance="weight_norm")
    state, found = policy.init(groups), list[FreezePlan]()
    for step in range(5):
        norms = {"weight_norm": {n: float((i + step) % 4) for i, n in enumerate(groups.names)}}
        event = Event(EventKind.STEP, Progress(step), norms, sampled={"weight_norm": step})
        plan, state = policy.decide(groups, state, event)
        found.append(plan)
    assert len(set(trained(groups, found))) == 1


def test_lisa_always_trains_embeddings_and_head() -> None:
    groups = with_embeddings(6)
    found = plans(LISA(every=EVERY("1st")), groups, 50)
    assert all("embeddings" not in p.frozen and "head" not in p.frozen for p in found)
    assert all(len(p.frozen) == 2 for p in found)
    assert {p.frontier(groups) for p in found} == {0}


def test_lisa_without_kept_embeddings_draws_them_like_any_other_group() -> None:
    groups = with_embeddings(6)
    policy = LISA(every=EVERY("1st"), layers=1, keep_embeddings=False)
    found = trained(groups, plans(policy, groups, 2000))
    assert chi_square(Counter(found), dict.fromkeys(groups.backbone, 1 / 5)) < 18.5
    assert {p.frontier(groups) for p in plans(policy, groups, 50)} == {0, 1, 2, 3, 4}


def test_lisa_with_more_layers_than_there_are_trains_all() -> None:
    groups = example_groups(4)
    assert not plans(LISA(layers=9), groups, 1)[0].frozen


def test_lisa_forgets_only_where_asked() -> None:
    groups = with_embeddings(6)
    for plan in plans(LISA(), groups, 50):
        assert not plan.released
    for plan in plans(LISA(states="release"), groups, 50):
        assert plan.released == plan.frozen != frozenset()


def test_seeds_differ() -> None:
    groups = example_groups(12)
    draws = {tuple(tuple(LISA(seed=seed).drawn(groups, t)) for t in range(4)) for seed in range(5)}
    assert len(draws) == 5


def velocity_of(case: NumpyCase) -> set[str]:
    return {name.partition(".")[0] for name in case.optimizer.velocity}


def train(case: NumpyCase, driver: Driver, steps: int) -> None:
    for _ in range(steps):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()


@pytest.mark.parametrize(
    "policy",
    [
        LISA(every=EVERY("2st"), layers=1),
        LISA(every=EVERY("2st"), layers=1, importance="weight_norm", states="release"),
        BAdam(every=EVERY("4st")),
        HiFT(),
    ],
    ids=repr,
)
def test_every_layer_moves_sooner_or_later(policy: Policy) -> None:
    """Ports of LISA freeze before the optimizer is made: what is frozen then never trains."""
    case = NumpyCase()
    before = {n: a.copy() for n, a in case.net.parameters.items()}
    driver = Driver(policy, case.backend, 60, 6)
    train(case, driver, 60)
    for name, value in case.net.parameters.items():
        assert not np.array_equal(value, before[name]), name
    driver.finish()


def test_lisa_keeps_or_releases_the_optimizers_memory() -> None:
    """The public callback never frees any: memory drifts to that of full fine-tuning."""
    for states, most in (("keep", 4), ("release", 2)):
        case = NumpyCase()
        policy = LISA(every=EVERY("2st"), layers=1, states=states)  # type: ignore[arg-type]
        driver, largest = Driver(policy, case.backend, 24, 6), 0
        for _ in range(24):
            train(case, driver, 1)
            largest = max(largest, len(velocity_of(case)))
        assert largest == most


# -- BAdam ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_badam_visits_every_block_once_per_sweep(order: Any) -> None:
    groups = with_embeddings(8)  # 6 blocks
    found = trained(groups, plans(BAdam(EVERY("5st"), order=order), groups, 5 * 6 * 4))
    turns = found[::5]
    assert found == [name for name in turns for _ in range(5)]
    sweeps = [turns[i : i + 6] for i in range(0, 24, 6)]
    blocks = [f"block{i}" for i in range(6)]
    assert all(sorted(sweep) == blocks for sweep in sweeps)
    if order == "random":
        assert len({tuple(s) for s in sweeps}) == 4
    else:
        assert all(s == (blocks if order == "ascending" else blocks[::-1]) for s in sweeps)


def test_badam_freezes_embeddings_unless_asked() -> None:
    groups = with_embeddings(4)
    found = trained(groups, plans(BAdam(EVERY("1st")), groups, 4))
    assert found == ["block1", "block0", "block1", "block0"]
    found = trained(groups, plans(BAdam(EVERY("1st"), embeddings=True), groups, 4))
    assert found == ["block1", "block0", "embeddings", "block1"]


def test_badam_releases_all_that_is_frozen() -> None:
    groups = with_embeddings(6)
    for plan in plans(BAdam(), groups, 200):
        assert plan.released == plan.frozen
        assert len(plan.frozen) == 4


def test_badam_leaves_no_state_of_frozen_groups() -> None:
    """States that are kept in silence make the claim on memory void."""
    case = NumpyCase()
    driver, seen = Driver(BAdam(EVERY("3st")), case.backend, 12, 6), list[str]()
    for _ in range(12):
        train(case, driver, 1)
        (active,) = driver.backend.groups.backbone - driver.plan.frozen
        assert velocity_of(case) == {active, "head"}
        seen.append(active)
    assert seen[::3] == ["layer2", "layer1", "layer0", "layer2"]


def test_badam_starts_each_block_afresh() -> None:
    """The first update of a turn has no momentum: it is the rate times the gradient."""
    case = NumpyCase()
    driver = Driver(BAdam(EVERY("2st")), case.backend, 8, 8)
    train(case, driver, 6)
    name = "layer2.bias"
    with driver.step():
        case.backward()
        gradient, before = case.net.gradients[name], case.net.parameters[name].copy()
        assert gradient is not None
        pull = gradient + case.optimizer.weight_decay * before
        driver.sample()
        case.update()
    assert case.net.parameters[name] == pytest.approx(before - case.optimizer.lr * pull)


# -- HiFT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
@pytest.mark.parametrize(("size", "turns"), [(1, 7), (2, 4), (3, 3), (9, 1)])
def test_hift_visits_every_group_once_per_sweep(order: Any, size: int, turns: int) -> None:
    groups = with_embeddings(8)  # 7 groups with the embeddings
    found = trained(groups, plans(HiFT(order=order, groups=size), groups, 3 * turns))
    sweeps = [found[i : i + turns] for i in range(0, 3 * turns, turns)]
    names = [n for n in groups.names if n != "head"]
    assert sorted(" ".join(sweeps[0]).split()) == sorted(names)
    assert sweeps[0] == sweeps[1] == sweeps[2]  # a random order is one for all sweeps
    if order == "ascending":
        assert " ".join(sweeps[0]).split() == names
    if order == "descending":
        assert found[0].split()[-1] == names[-1]


def test_hift_orders_differ() -> None:
    groups = example_groups(9)
    orders = [
        trained(groups, plans(HiFT(order="random", seed=seed), groups, 8)) for seed in range(3)
    ]
    assert len({tuple(o) for o in orders}) == 3


def test_hift_goes_on_with_the_momentum_of_its_last_turn() -> None:
    case = NumpyCase()
    driver = Driver(HiFT(), case.backend, 12, 6)
    train(case, driver, 3)
    assert velocity_of(case) == {"layer0", "layer1", "layer2", "head"}
    kept = case.optimizer.velocity["layer1.weight"].copy()
    train(case, driver, 1)
    assert np.array_equal(case.optimizer.velocity["layer1.weight"], kept)
    assert not any(p.released for p in plans(HiFT(), example_groups(5), 9))


# -- all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [LISA(), BAdam(), HiFT()], ids=repr)
def test_a_model_that_is_all_head_or_without_blocks_trains_its_head(policy: Policy) -> None:
    head = LayerGroups((replace(example_groups(2)[1], depth=0),))
    assert not plans(policy, head, 3)[-1].frozen
    empty = LayerGroup("pool", 0, ())
    groups = LayerGroups((empty, example_groups(2)[1]))
    assert plans(policy, groups, 3)[-1].frozen == {"pool"}


@pytest.mark.parametrize("policy", [LISA(layers=1), BAdam(), HiFT()], ids=repr)
def test_groups_without_parameters_take_no_turn(policy: Any) -> None:
    items = list(example_groups(4))
    items[1] = LayerGroup("pool", 1, ())
    groups = LayerGroups(tuple(items))
    found = trained(groups, plans(replace(policy, every=EVERY("1st")), groups, 40))
    assert set(found) == {"block0", "block2"}


def test_published_defaults() -> None:
    assert (str(LISA().every), LISA().layers, LISA().importance) == ("20st", 2, "uniform")
    assert (str(BAdam().every), BAdam().order, BAdam().embeddings) == ("50st", "descending", False)
    assert (str(HiFT().every), HiFT().groups) == ("1st", 1)
    assert not LISA().needs()
    assert LISA(importance="weight_norm").needs()[0].signal == "weight_norm"


def test_frequent_changes_are_announced() -> None:
    assert not LISA().notice()
    assert not BAdam().notice()
    assert "every step" in HiFT().notice()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LISA, {"layers": 0}),
        (LISA, {"every": EVERY("0st")}),
        (BAdam, {"every": EVERY("0%")}),
        (HiFT, {"groups": 0}),
        (HiFT, {"every": EVERY("0ep")}),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="cannot"):
        kind(**options)


@pytest.mark.parametrize("kind", [LISA, BAdam, HiFT])
def test_statistics_of_resting_groups_follow_the_data_where_asked(
    kind: type[LISA | BAdam | HiFT],
) -> None:
    """The public codes freeze weights alone and leave every module in training mode."""
    groups = example_groups(6)
    for plan in plans(kind(every=EVERY("2st"), live_norm=True), groups, 8):
        assert plan.frozen
        assert plan.live_norm == plan.frozen
    assert not any(plan.live_norm for plan in plans(kind(every=EVERY("2st")), groups, 8))
