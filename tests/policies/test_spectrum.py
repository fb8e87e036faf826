"""Spectrum: the ranking against NumPy, and what trains in the end."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frostline.clock import Progress
from frostline.driver import Driver
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.spectrum import Spectrum, module_type
from frostline.policy import Event, EventKind
from numpy_case import NumpyCase


def encoder(layers: int) -> LayerGroups:
    """Embeddings, blocks of two types of matrices, and a head."""

    def block(i: int) -> LayerGroup:
        name = f"layers.{i}"
        return LayerGroup(
            name,
            i + 1,
            (
                TensorInfo(f"{name}.attn.query.weight", (8, 8)),
                TensorInfo(f"{name}.mlp.fc1.weight", (16, 8)),
                TensorInfo(f"{name}.mlp.fc1.bias", (16,), kind="bias"),
                TensorInfo(f"{name}.norm.weight", (8,), kind="norm"),
            ),
        )

    words = LayerGroup("words", 0, (TensorInfo("words.weight", (9, 8), kind="embedding"),))
    head = LayerGroup("head", layers + 1, (TensorInfo("head.weight", (2, 8)),))
    return LayerGroups((words, *map(block, range(layers)), head))


GROUPS = encoder(4)


def event(scores: dict[str, float], step: int = 0) -> Event:
    kind = EventKind.STEP if step else EventKind.START
    return Event(kind, Progress(step, 10), {"spectral_snr": scores}, sampled={"spectral_snr": 0})


def scores_of(query: list[float], fc1: list[float]) -> dict[str, float]:
    found = {f"layers.{i}.attn.query.weight": v for i, v in enumerate(query)}
    found |= {f"layers.{i}.mlp.fc1.weight": v for i, v in enumerate(fc1)}
    return found | {"words.weight": 99.0, "head.weight": 98.0}


def trained(plan: FreezePlan, groups: LayerGroups = GROUPS) -> set[str]:
    return {p.name for g in groups for p in g.parameters} - plan.frozen_parameters(groups)


def decide(policy: Spectrum, scores: dict[str, float]) -> FreezePlan:
    return policy.decide(GROUPS, policy.init(GROUPS), event(scores))[0]


def test_the_best_matrices_of_each_type_train() -> None:
    """Types are ranked apart: all scores of one type may lie above those of another."""
    scores = scores_of([1, 4, 3, 2], [0.1, 0.2, 0.4, 0.3])
    assert trained(decide(Spectrum(), scores)) == {
        "layers.1.attn.query.weight", "layers.2.mlp.fc1.weight", "head.weight"
    }  # fmt: skip
    assert trained(decide(Spectrum(0.5), scores)) == {
        "layers.1.attn.query.weight", "layers.2.attn.query.weight",
        "layers.2.mlp.fc1.weight", "layers.3.mlp.fc1.weight", "head.weight",
    }  # fmt: skip
    assert trained(decide(Spectrum(0.49), scores)) == trained(decide(Spectrum(0.25), scores))
    assert trained(decide(Spectrum(0), scores)) == {"head.weight"}


def test_biases_norms_and_embeddings_stay_frozen() -> None:
    left = trained(decide(Spectrum(1), scores_of([1, 1, 1, 1], [1, 1, 1, 1])))
    assert left == {n for g in GROUPS for n in g.parameter_names if "fc1.weight" in n} | {
        n for g in GROUPS for n in g.parameter_names if "query" in n
    } | {"head.weight"}


def test_embeddings_train_only_when_asked_and_then_all_is_passed_through() -> None:
    scores = scores_of([1, 2, 3, 4], [1, 2, 3, 4])
    assert decide(Spectrum(), scores).frontier(GROUPS) == 4
    plan = decide(Spectrum(embeddings=True), scores)
    assert "words.weight" in trained(plan)
    assert plan.frontier(GROUPS) == 0  # the whole backward pass, for a quarter of the matrices


def test_of_equal_scores_the_deeper_matrix_trains() -> None:
    plan = decide(Spectrum(), scores_of([1, 1, 1, 1], [1, 1, 1, 1]))
    assert plan.frozen == GROUPS.backbone
    assert set(plan.exempt) == {"layers.3"}


def test_the_scores_are_read_once() -> None:
    policy = Spectrum()
    plan, state = policy.decide(
        GROUPS, policy.init(GROUPS), event(scores_of([4, 1, 1, 1], [4, 1, 1, 1]))
    )
    state = json.loads(json.dumps(state))
    later = event(scores_of([1, 1, 1, 4], [1, 1, 1, 4]), 5)
    assert policy.decide(GROUPS, state, later)[0] == plan


def test_what_has_no_score_stays_frozen() -> None:
    scores = scores_of([1, 2, 3, 4], [1, 2, 3, 4])
    del scores["layers.3.attn.query.weight"]
    assert "layers.3.attn.query.weight" not in trained(decide(Spectrum(1), scores))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(PolicyError):
        Spectrum(share)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert.encoder.layer.11.attention.self.query.weight",
         "bert.encoder.layer.attention.self.query.weight"),
        ("layer2.1.conv1.weight", "layer.conv1.weight"),
        ("layer2.1.conv2.weight", "layer.conv2.weight"),
        ("blocks.3.1.conv_pw.weight", "blocks.conv_pw.weight"),
        ("blocks.10.mlp.fc2.weight", "blocks.mlp.fc2.weight"),
        ("features.0.weight", "features.weight"),
        ("layer0.weight", "layer.weight"),
        ("weight", "weight"),
        ("0.weight", "weight"),
        ("12.34", ""),
    ],
)  # fmt: skip
def test_the_type_is_the_name_without_numbers(name: str, kind: str) -> None:
    assert module_type(name) == kind


def numpy_score(w: np.ndarray) -> float:
    """The published score, written with NumPy and apart from the library."""
    s = np.linalg.svd(w, compute_uv=False)
    edge = np.subtract(*np.percentile(s, [75, 25])) / 1.349
    edge *= 1 + np.sqrt(min(w.shape) / max(w.shape))
    return s[s > edge].sum() / s[s <= edge].sum() / s.max()


@pytest.mark.parametrize("seed", range(5))
def test_end_to_end_the_matrix_that_numpy_ranks_first_trains(seed: int) -> None:
    case = NumpyCase()
    source = np.random.default_rng(seed)
    for i, size in enumerate([(4, 8), (8, 8), (8, 8)]):
        left, _, right = np.linalg.svd(source.normal(size=size), full_matrices=False)
        spectrum = [0.01, *source.uniform(0, 5, size[0] - 2), 10]  # some noise in any case
        case.net.parameters[f"layer{i}.weight"][...] = left * spectrum @ right
    before = {n: a.copy() for n, a in case.net.parameters.items()}
    scores = {n: numpy_score(a) for n, a in before.items() if a.ndim > 1 and "head" not in n}

    driver = Driver(Spectrum(share=0.34), case.backend)
    for _ in range(2):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
    moved = {n for n, a in case.net.parameters.items() if (a != before[n]).any()}
    assert moved == {max(scores, key=lambda n: scores[n]), "head.weight", "head.bias"}
    driver.finish()


def test_in_flat_keras_names_the_role_in_the_block_is_the_type() -> None:
    def block(i: int) -> LayerGroup:
        name = f"conv2_block{i}"
        kernels = (f"{name}_1_conv/kernel", f"{name}_2_conv/kernel")
        return LayerGroup(name, i, tuple(TensorInfo(k, (8, 8)) for k in kernels))

    single = LayerGroup(
        "dense_7", 4, (TensorInfo("dense_7/kernel", (8, 8)),), modules=(ModuleInfo("dense_7", "D"),)
    )
    head = LayerGroup("head", 5, (TensorInfo("head/kernel", (2, 8)),))
    groups = LayerGroups((*map(block, range(4)), single, head))
    scores = {f"conv2_block{i}_{r}_conv/kernel": float(i * r) for i in range(4) for r in (1, 2)}
    policy = Spectrum()
    plan, _ = policy.decide(groups, policy.init(groups), event(scores | {"dense_7/kernel": 9.0}))
    everything = {p.name for g in groups for p in g.parameters}
    assert everything - plan.frozen_parameters(groups) == {
        "conv2_block3_1_conv/kernel",
        "conv2_block3_2_conv/kernel",
        "head/kernel",
    }
