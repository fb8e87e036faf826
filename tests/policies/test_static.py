"""Policies with one plan for the whole run: what exactly trains under each."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from frostline.clock import Progress
from frostline.driver import Driver
from frostline.errors import PolicyError, SelectorMatchedNothing
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.static import (
    AllButNorm,
    BitFit,
    First,
    Freeze,
    FreezeEmbeddings,
    Last,
    LinearProbe,
    TrainOnly,
    training,
)
from frostline.policy import Event, EventKind, Policy
from frostline.testing import example_groups
from numpy_case import NumpyCase

GROUPS = example_groups(5)
HEAD = {"head.weight", "head.bias"}


def plan_of(policy: Policy, groups: LayerGroups = GROUPS) -> FreezePlan:
    state = policy.init(groups)
    plan, same = policy.decide(groups, state, Event(EventKind.START, Progress(0, 100, 10)))
    assert same == state
    return plan


def trained(policy: Policy, groups: LayerGroups = GROUPS) -> set[str]:
    everything = {p.name for g in groups for p in g.parameters}
    return everything - plan_of(policy, groups).frozen_parameters(groups)


def body(*suffixes: str) -> set[str]:
    return {f"block{i}.{s}" for i in range(4) for s in suffixes}


def sized(*counts: int, seconds: tuple[float, ...] = ()) -> LayerGroups:
    """Groups with these numbers of elements (the last is the head) and forward seconds."""
    costs = [GroupCost(s) for s in seconds] or [None] * len(counts)
    return LayerGroups(
        tuple(
            LayerGroup(f"g{i}", i, (TensorInfo(f"g{i}.weight", (n,)),), cost=cost)
            for i, (n, cost) in enumerate(zip(counts, costs, strict=True))
        )
    )


# -- first and last ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(5))
def test_first_and_last_freeze_their_end_of_the_backbone(count: int) -> None:
    names = [f"block{i}" for i in range(4)]
    assert plan_of(First(groups=count)).frozen == set(names[:count])
    assert plan_of(Last(groups=count)).frozen == set(names[4 - count :])


@pytest.mark.parametrize(
    ("fraction", "count"), [(0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (0.99, 3), (1, 4)]
)
def test_a_fraction_of_the_groups_is_rounded_down(fraction: float, count: int) -> None:
    assert len(plan_of(First(fraction=fraction)).frozen) == count
    assert len(plan_of(Last(fraction=fraction)).frozen) == count


def test_a_fraction_can_be_of_parameters_or_of_measured_forward_time() -> None:
    # backbone: 10, 20, 30, 40 elements; 4, 3, 2, 1 seconds
    groups = sized(10, 20, 30, 40, 1000, seconds=(4, 3, 2, 1, 100))

    def counts(of: str, kind: type[First | Last]) -> list[int]:
        fractions = (0.09, 0.1, 0.3, 0.4, 0.69, 0.7, 1.0)
        return [len(plan_of(kind(fraction=f, of=of), groups).frozen) for f in fractions]  # type: ignore[arg-type]

    assert counts("parameters", First) == [0, 1, 2, 2, 3, 3, 4]
    assert counts("parameters", Last) == [0, 0, 0, 1, 1, 2, 4]
    assert counts("forward", First) == [0, 0, 0, 1, 1, 2, 4]
    assert counts("forward", Last) == [0, 1, 2, 2, 3, 3, 4]


def test_rounded_sums_of_seconds_do_not_cost_a_group() -> None:
    groups = sized(*[1] * 11, seconds=(0.1,) * 11)
    assert sum([0.1] * 3) > 0.1 * 10 * 0.3  # what a bare comparison would trip over
    assert len(plan_of(First(fraction=0.3, of="forward"), groups).frozen) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 1, "fraction": 0.5},
        {"groups": -1},
        {"groups": 1, "of": "parameters"},
        {"fraction": 1.1},
        {"fraction": -0.1},
        {"fraction": float("nan")},
    ],
)
def test_first_refuses_what_is_unclear(options: dict[str, object]) -> None:
    with pytest.raises(PolicyError):
        First(**options)  # type: ignore[arg-type]


def test_first_refuses_more_groups_than_there_are() -> None:
    with pytest.raises(PolicyError, match="at most groups=4"):
        First(groups=5).init(GROUPS)


def test_a_share_of_time_needs_measured_costs() -> None:
    with pytest.raises(PolicyError, match="measure"):
        First(fraction=0.5, of="forward").init(sized(1, 1, 1))


def test_the_order_is_that_of_execution() -> None:
    """Composer orders layers by the module tree: a wrong prefix on non-sequential models."""
    names = ("zeta", "mid", "alpha", "head")  # as executed; the tree and the alphabet disagree
    groups = LayerGroups(tuple(LayerGroup(n, i, (TensorInfo(n),)) for i, n in enumerate(names)))
    assert plan_of(First(groups=1), groups).frozen == {"zeta"}
    assert plan_of(Last(groups=1), groups).frozen == {"alpha"}


def test_live_norm_is_a_switch_of_its_own() -> None:
    for policy in (First(groups=2), TrainOnly("block1"), AllButNorm(), BitFit(), LinearProbe()):
        assert not plan_of(policy).live_norm
        live = dataclasses.replace(policy, live_norm=True)  # type: ignore[type-var]
        assert plan_of(live).live_norm == plan_of(policy).frozen != set()


# -- selections of parameters -----------------------------------------------------------------


def test_train_only_trains_the_selection_and_the_head() -> None:
    assert trained(TrainOnly("block1")) == {
        "block1.weight", "block1.bias", "block1.norm.weight", *HEAD
    }  # fmt: skip
    assert trained(TrainOnly("block1.weight | block2.bias")) == {
        "block1.weight", "block2.bias", *HEAD
    }  # fmt: skip
    with pytest.raises(SelectorMatchedNothing):
        TrainOnly("no such").init(GROUPS)


def test_all_but_norm_trains_norms_and_the_head() -> None:
    assert trained(AllButNorm()) == body("norm.weight") | HEAD
    with pytest.raises(PolicyError, match="bitfit"):
        AllButNorm().init(sized(1, 1))


def test_bitfit_trains_exactly_biases_and_the_head() -> None:
    assert trained(BitFit()) == body("bias") | HEAD


def test_bitfit_counts_shifts_of_norms_as_biases_but_no_scales() -> None:
    shapes = {"fc.weight": "weight", "fc.bias": "bias", "ln.weight": "norm", "ln.bias": "norm"}
    parameters = tuple(TensorInfo(f"b.{n}", (2,), kind=k) for n, k in shapes.items())
    groups = LayerGroups(
        (LayerGroup("b", 0, parameters), LayerGroup("head", 1, (TensorInfo("w"),)))
    )
    assert trained(BitFit(), groups) == {"b.fc.bias", "b.ln.bias", "w"}
    assert trained(BitFit(norm_shifts=False), groups) == {"b.fc.bias", "w"}
    with pytest.raises(PolicyError, match="all-but-norm"):
        BitFit().init(sized(1, 1))


def test_biases_of_the_head_alone_are_no_bitfit() -> None:
    """Nor are its norms or its tables what the other selections are about."""
    kinds = {"bias": BitFit(), "norm": AllButNorm(), "embedding": FreezeEmbeddings()}
    for kind, policy in kinds.items():
        head = LayerGroup("head", 1, (TensorInfo("head.w"), TensorInfo("head.x", kind=kind)))
        groups = LayerGroups((LayerGroup("body", 0, (TensorInfo("w"),)), head))
        with pytest.raises(PolicyError, match="backbone without"):
            policy.init(groups)


def test_bitfit_end_to_end_moves_biases_and_the_head_only() -> None:
    case = NumpyCase()
    before = {n: a.copy() for n, a in (case.net.parameters | case.net.buffers).items()}
    driver = Driver(BitFit(), case.backend)
    for _ in range(3):
        with driver.step():
            case.backward()
            assert case.net.dropout_live["layer0"]  # it trains in part
            case.update()
    moved = {
        n for n, a in (case.net.parameters | case.net.buffers).items() if (a != before[n]).any()
    }
    assert moved == {"layer0.bias", "layer1.bias", "layer2.bias", "head.weight", "head.bias"}
    assert {h.tensor for h in driver.finish().holds} == before.keys() - moved


def test_freeze_embeddings_freezes_tables_and_nothing_else() -> None:
    stem = (TensorInfo("emb.word", (9, 2), kind="embedding"), TensorInfo("emb.norm", kind="norm"))
    groups = LayerGroups(
        (
            LayerGroup("emb", 0, stem),
            LayerGroup("relu", 1, ()),
            LayerGroup("body", 2, (TensorInfo("body.w"),)),
            LayerGroup("head", 3, (TensorInfo("head.e", (2, 9), kind="embedding"),)),
        )
    )
    plan = plan_of(FreezeEmbeddings(), groups)
    assert plan.frozen_parameters(groups) == {"emb.word"}
    assert plan.frozen == plan.live_dropout == {"emb"}


def test_freeze_embeddings_says_what_to_do_without_any() -> None:
    with pytest.raises(PolicyError, match="fallback=first"):
        FreezeEmbeddings().init(GROUPS)
    assert plan_of(FreezeEmbeddings(fallback="first")).frozen == {"block0"}


def test_a_group_without_parameters_does_not_end_the_frozen_prefix() -> None:
    groups = LayerGroups(
        (
            LayerGroup("relu", 0, ()),
            LayerGroup("body", 1, (TensorInfo("w"),)),
            LayerGroup("head", 2, (TensorInfo("h"),)),
        )
    )
    assert training(groups, {"w"}).frontier(groups) == 1


def test_dropout_is_off_only_where_nothing_trains() -> None:
    plan = plan_of(TrainOnly("block1.bias"))
    assert plan.live_dropout == {"block1"}


def test_freeze_reads_its_plan_once() -> None:
    policy = Freeze("first 2 groups")
    state = policy.init(GROUPS)
    event = Event(EventKind.STEP, Progress(3))
    assert policy.decide(GROUPS, state, event)[0] is policy.decide(GROUPS, state, event)[0]


def test_weights_frozen_by_train_only_keep_their_bits() -> None:
    case = NumpyCase()
    before = case.net.parameters["layer0.weight"].copy()
    driver = Driver(TrainOnly("layer2"), case.backend)
    for _ in range(3):
        with driver.step():
            case.backward()
            case.update()
    np.testing.assert_array_equal(case.net.parameters["layer0.weight"], before)


def test_the_fallback_for_embeddings_is_the_first_group_with_parameters() -> None:
    groups = LayerGroups(
        tuple(dataclasses.replace(g, parameters=()) if g.depth == 0 else g for g in GROUPS)
    )
    plan = plan_of(FreezeEmbeddings(fallback="first"), groups)
    assert plan.frozen == {"block0", "block1"}
