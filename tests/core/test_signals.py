"""The arithmetic of each signal, against numpy on hand-made data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.signals import SIGNALS, Matrix, Memory, Need, compute_signal, units_of

Array = NDArray[np.float64]
UNIT = LayerGroup("body", 0, (TensorInfo("w", (2, 2)), TensorInfo("b", (2,))))
DATA = np.random.default_rng(0)


@dataclass
class Given:
    """A probe that answers what it was given."""

    g: Sequence[Any] = ()
    w: Sequence[Any] = ()
    u: Sequence[Any] = ()
    a: Any = None
    int8: Any = None
    m: Sequence[Matrix] = ()
    training: bool = True

    def trains(self, unit: LayerGroup) -> bool:
        return self.training

    def gradients(self, unit: LayerGroup) -> list[Any]:
        return [None if g is None else np.asarray(g, float) for g in self.g]

    def weights(self, unit: LayerGroup) -> list[Array]:
        return [np.asarray(w, float) for w in self.w]

    def norm(self, arrays: Sequence[Any], order: Literal[1, 2]) -> float:
        flat = [np.ravel(a) for a in arrays if a is not None]
        return float(np.linalg.norm(np.concatenate(flat), order)) if flat else 0.0

    def dot(self, first: Sequence[Any], second: Sequence[Any]) -> float:
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None]
        return sum(float(np.vdot(a, b)) for a, b in pairs if b is not None)

    def matrices(self, unit: LayerGroup) -> Sequence[Matrix]:
        return self.m

    def learning_rate(self, unit: LayerGroup) -> float:
        return 0.25

    def loss(self) -> float:
        return 1.5

    def activations(self, unit: LayerGroup, *, int8: bool = False) -> Array:
        return np.asarray(self.int8 if int8 else self.a, float)

    def update(self, unit: LayerGroup) -> list[Any]:
        return [None if u is None else np.asarray(u, float) for u in self.u]


def gathered(name: str, *probes: Given, memory: Memory | None = None) -> float | None:
    """What the signal reads after these steps; the first one begins, where it has a reference."""
    signal, steps = SIGNALS[name], list(probes)
    memory = {} if memory is None else memory
    if signal.begin is not None and not memory:
        signal.begin(memory, steps.pop(0), UNIT)
    for probe in steps:
        signal.gather(memory, probe, UNIT)
    return signal.read(memory)


def gradients(n: int) -> list[list[Array]]:
    return [[DATA.normal(size=(2, 2)), DATA.normal(size=2)] for _ in range(n)]


def flat(arrays: Sequence[Array]) -> Array:
    return np.concatenate([np.ravel(a) for a in arrays])


# -- gradients -------------------------------------------------------------------------------


def test_norms_of_one_gradient() -> None:
    probe = Given(g=[[[3, 0], [0, -4]], None], w=[[[0, 6], [8, 0]], [0, 0]])
    assert gathered("gradient_l1", probe) == 7
    assert gathered("gradient_norm", probe) == 5
    assert gathered("relative_gradient_norm", probe) == 0.5
    assert gathered("fisher", probe) == 25
    assert gathered("weight_norm", probe) == 10
    assert gathered("learning_rate", probe) == 0.25
    assert gathered("loss", probe) == 1.5


def test_a_relative_norm_of_zero_weights_is_zero() -> None:
    assert gathered("relative_gradient_norm", Given(g=[[1.0]], w=[[0.0]])) == 0


def test_momentary_values_are_averaged_over_the_gathered_steps() -> None:
    assert gathered("gradient_l1", Given(g=[[1]]), Given(g=[[-3]])) == 2
    assert gathered("fisher", Given(g=[[1]]), Given(g=[[-3]])) == 5


def test_reading_clears_what_was_gathered() -> None:
    for name in ("gradient_norm", "summed_gradient_norm", "gradient_snr", "fisher_ema"):
        memory: Memory = {}
        steps = [Given(g=g) for g in gradients(3)]
        assert gathered(name, *steps, memory=memory) is not None
        assert SIGNALS[name].read(memory) is None


def test_a_summed_gradient_cancels_noise_and_a_mean_of_norms_does_not() -> None:
    there, back = Given(g=[[5.0, 0], [1.0]]), Given(g=[[-5.0, 0], [1.0]])
    assert gathered("summed_gradient_l1", there, back) == 2
    assert gathered("summed_gradient_norm", there, back) == 2
    assert gathered("gradient_l1", there, back) == 6


def test_sums_take_gradients_that_come_and_go() -> None:
    steps = [Given(g=[None, [1.0]]), Given(g=[[2.0], None]), Given(g=[[2.0], [2.0]])]
    assert gathered("summed_gradient_l1", *steps) == 7
    assert gathered("summed_gradient_norm", *steps) == 5


def test_sums_do_not_write_to_gradients() -> None:
    first = np.ones(3)

    class Live(Given):
        def gradients(self, unit: LayerGroup) -> list[Any]:
            return [first]

    for name in ("summed_gradient_norm", "gradient_snr", "gradient_change_l1", "fisher_ema"):
        gathered(name, Live(), Live(), Live())
        gathered(name, Given(g=[None]), Live(), Live())
        assert (first == 1).all()


def test_snr_is_squared_mean_over_variance_per_weight() -> None:
    found = gradients(6)
    stack = np.stack([flat(g) for g in found])
    expected = np.mean(stack.mean(0) ** 2 / (stack.var(0) + 1e-8))
    assert gathered("gradient_snr", *(Given(g=g) for g in found)) == pytest.approx(expected)
    assert gathered("gradient_snr", Given(g=found[0])) is None  # one sample has no variance


def test_fisher_average_decays_and_clips_each_weight() -> None:
    memory: Memory = {}
    assert gathered("fisher_ema", Given(g=[[3.0, 0.5]]), memory=memory) == pytest.approx(1.25)
    second = gathered("fisher_ema", Given(g=[[-0.5, -7.0]]), memory=memory)
    assert second == pytest.approx(0.9 * 1.25 + 0.1 * 1.25)
    third = gathered("fisher_ema", Given(g=[[0.0, 0.0]]), memory=memory)
    assert third == pytest.approx(0.9 * 1.25)


def test_change_of_gradient_between_readings() -> None:
    memory: Memory = {}
    assert gathered("gradient_change_l1", Given(g=[[1.0, 2.0]]), memory=memory) is None
    assert gathered("gradient_change_l1", Given(g=[[2.0, -1.0]]), memory=memory) == 4
    assert gathered("gradient_change_l1", Given(g=[[2.0, -1.0]]), memory=memory) == 0


# -- weights ---------------------------------------------------------------------------------


def test_changes_of_weights() -> None:
    before, after = Given(w=[[3.0, 4.0]]), Given(w=[[3.0, 1.0]])
    assert gathered("weight_delta_l1", before, after) == 3
    assert gathered("weight_delta_norm", before, after) == 3
    assert gathered("update_ratio", before, after) == pytest.approx(3 / 5)
    assert gathered("relative_weight_change", before, after) == pytest.approx((0 + 3 / 4) / 2)


def test_changes_are_to_the_reading_before_not_to_the_first() -> None:
    memory: Memory = {}
    gathered("weight_delta_l1", Given(w=[[0.0]]), Given(w=[[1.0]]), memory=memory)
    assert gathered("weight_delta_l1", Given(w=[[3.0]]), memory=memory) == 2


def test_relative_change_counts_weights_and_not_tensors() -> None:
    before, after = Given(w=[[1.0, 1.0, 1.0], [2.0]]), Given(w=[[2.0, 2.0, 2.0], [2.0]])
    assert gathered("relative_weight_change", before, after) == pytest.approx(3 / 4)


def test_a_weight_of_zero_changes_by_its_size() -> None:
    found = gathered("relative_weight_change", Given(w=[[0.0, -2.0]]), Given(w=[[0.5, -1.0]]))
    assert found == pytest.approx((0.5 + 0.5) / 2)


def test_perturbation_of_weights_moving_in_opposite_directions_does_not_cancel() -> None:
    """A public re-implementation takes the mean of a tensor before the magnitude: 0 here."""
    steps = [Given(w=[[0.0 + k, 0.0 - k]]) for k in range(4)]
    assert gathered("effective_perturbation", *steps) == pytest.approx(1)


def test_perturbation_of_a_weight_that_goes_to_and_fro_is_small() -> None:
    steps = [Given(w=[[float(k % 2)]]) for k in range(3)]
    mean = 0.99 * 0.01 * 1 + 0.01 * -1
    size = 0.99 * 0.01 * 1 + 0.01 * 1
    assert gathered("effective_perturbation", *steps) == pytest.approx(abs(mean) / size)


def test_perturbation_against_numpy() -> None:
    path = [flat(g) for g in gradients(9)]
    mean = size = np.zeros(6)
    for before, after in itertools.pairwise(path):
        mean = 0.99 * mean + 0.01 * (after - before)
        size = 0.99 * size + 0.01 * abs(after - before)
    found = gathered("effective_perturbation", *(Given(w=[p]) for p in path))
    assert found == pytest.approx(abs(mean).sum() / size.sum())


def test_weights_that_stand_still_have_no_perturbation() -> None:
    assert gathered("effective_perturbation", Given(w=[[1.0]]), Given(w=[[1.0]])) == 0


def test_importance_is_gradient_times_the_update_of_the_batch_before() -> None:
    steps = [
        Given(g=[[9.0, 9.0]], u=[[-1.0, 2.0]]),
        Given(g=[[4.0, 1.0]], u=[[0.0, -3.0]]),  # saves 4 - 2
        Given(g=[[7.0, 2.0]], u=[[5.0, 5.0]]),  # saves 6
    ]
    assert gathered("update_importance", *steps) == pytest.approx((2 + 6) / 2)
    assert gathered("update_importance", steps[0]) is None


# -- activations -----------------------------------------------------------------------------


def cka(x: Array, y: Array) -> float:
    """Linear CKA by features: apart from the code under test, which goes by samples."""
    x, y = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


X, Y = DATA.normal(size=(7, 5)) + 1, DATA.normal(size=(7, 4)) - 2


def test_cka_against_numpy() -> None:
    assert gathered("cka_pretrained", Given(a=X), Given(a=Y)) == pytest.approx(cka(X, Y))


def test_cka_ignores_rotation_scale_and_shift() -> None:
    rotation = np.linalg.qr(DATA.normal(size=(5, 5)))[0]
    for other in (X, X @ rotation, 3 * X, X + 5):
        assert gathered("cka_snapshot", Given(a=X), Given(a=other)) == pytest.approx(1)


def test_cka_of_constant_activations_is_one() -> None:
    constant = np.ones((4, 3))
    assert gathered("cka_pretrained", Given(a=constant), Given(a=constant)) == 1


def test_similarity_preserving_loss_against_numpy() -> None:
    def rows(x: Array) -> Array:
        gram = x @ x.T
        return gram / np.linalg.norm(gram, axis=1, keepdims=True)

    expected = np.linalg.norm(rows(X) - rows(Y)) ** 2 / 49
    assert gathered("sp_loss_pretrained", Given(a=X), Given(a=Y)) == pytest.approx(expected)
    assert gathered("sp_loss_pretrained", Given(a=X), Given(a=2 * X)) == pytest.approx(0)


def test_cosine_is_the_mean_over_samples() -> None:
    now, then = np.array([[1.0, 0], [0, 2], [3, 3]]), np.array([[2.0, 0], [0, -1], [1, 0]])
    expected = (1 - 1 + math.sqrt(0.5)) / 3
    assert gathered("cosine_snapshot", Given(a=then), Given(a=now)) == pytest.approx(expected)


def test_a_sample_without_activation_is_similar_to_none() -> None:
    zero = np.zeros((2, 3))
    assert gathered("cosine_pretrained", Given(a=zero), Given(a=zero)) == 0
    assert gathered("sp_loss_pretrained", Given(a=zero), Given(a=zero)) == 0


def test_the_8_bit_reference_is_that_of_rounded_weights() -> None:
    first = Given(a=X, int8=Y)
    assert gathered("cosine_int8", first, Given(a=Y)) == pytest.approx(1)
    assert gathered("cka_int8", first, Given(a=X)) == pytest.approx(cka(X, Y))


def test_activations_of_any_shape_are_flattened_by_sample() -> None:
    square = X[:, :4].reshape(7, 2, 2)
    found = gathered("cka_pretrained", Given(a=square), Given(a=Y))
    assert found == pytest.approx(cka(X[:, :4], Y))


# -- spectra ---------------------------------------------------------------------------------


def spectrum(rows: int, columns: int, singular: Array) -> float:
    low, high = np.percentile(singular, [25, 75])
    ratio = min(rows, columns) / max(rows, columns)
    edge = (high - low) / 1.349 * (1 + math.sqrt(ratio))
    return float(
        singular[singular > edge].sum() / singular[singular <= edge].sum() / singular.max()
    )


def test_spectral_snr_against_numpy_percentiles() -> None:
    expected, matrices = [], []
    for shape in ((9, 8), (6, 7), (9, 9)):
        singular = np.linalg.svd(DATA.normal(size=shape), compute_uv=False)
        expected.append(spectrum(*shape, singular))
        matrices.append(Matrix(*shape, singular.tolist()))
    assert gathered("spectral_snr", Given(m=matrices)) == pytest.approx(np.mean(expected))


def test_degenerate_spectra_have_finite_values() -> None:
    assert gathered("spectral_snr", Given(m=[Matrix(1, 3, [2.0])])) == 0
    assert gathered("spectral_snr", Given(m=[Matrix(2, 2, [0.0, 0.0])])) == 0
    found = gathered("spectral_snr", Given(m=[Matrix(2, 2, [4.0, 4.0])]))
    assert found is not None
    assert math.isfinite(found)
    assert gathered("spectral_snr", Given(m=[])) is None


# -- asking ----------------------------------------------------------------------------------


def test_units_per_parameter_are_named_like_them() -> None:
    groups = LayerGroups((UNIT,))
    assert [u.name for u in units_of(groups, "parameter")] == ["w", "b"]
    assert units_of(groups, "group") == (UNIT,)


def test_groups_that_do_not_train_report_no_gradient_but_a_weight() -> None:
    groups, probe = LayerGroups((UNIT,)), Given(g=[None], w=[[2.0]], training=False)
    assert compute_signal("gradient_norm", probe, groups) == {}
    assert compute_signal("weight_norm", probe, groups) == {"body": 2}


def test_groups_that_never_run_have_no_activations() -> None:
    idle = LayerGroups((LayerGroup("spare", 0, UNIT.parameters, calls=0),))
    assert compute_signal("cka_pretrained", Given(), idle) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"signal": "gradient_nrom", "every": Duration.parse("1ep")}, "no signal of that name"),
        ({"signal": "gradient_norm", "every": None}, "needs an interval"),
        ({"signal": "spectral_snr", "every": Duration.parse("1ep")}, "read once"),
        ({"signal": "fisher", "every": Duration.parse("1ep"), "steps": 0}, "no steps"),
        (
            {"signal": "cosine_int8", "every": Duration.parse("1ep"), "per": "parameter"},
            "layer groups have and parameters have not",
        ),
    ],
)
def test_needs_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        Need(**options)
