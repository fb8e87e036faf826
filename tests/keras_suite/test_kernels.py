"""Weights as matrices: the spectra of Keras's kernels are those of the same weights in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.backend import KerasBackend
from frostline.backends.keras.kernels import as_matrix, output_axes
from frostline.backends.keras.names import owners, tensors
from frostline.driver import Driver
from frostline.plan import FreezePlan
from frostline.registry import make_policy

L = keras.layers
#: A model of one layer, and how its kernel lies in PyTorch: that one's first axis, then the rest.
CASES: dict[str, tuple[Callable[[], tuple[Any, Any]], str, Callable[[np.ndarray], np.ndarray]]] = {
    "dense": (lambda: ((6,), L.Dense(5, name="l")), "l/kernel", lambda k: k.T),
    "conv": (
        lambda: ((9, 9, 4), L.Conv2D(6, (3, 2), name="l")),
        "l/kernel",
        lambda k: k.transpose(3, 2, 0, 1),
    ),
    "conv 1d": (
        lambda: ((9, 4), L.Conv1D(6, 3, name="l")),
        "l/kernel",
        lambda k: k.transpose(2, 1, 0),
    ),
    "depthwise": (
        lambda: ((9, 9, 4), L.DepthwiseConv2D(3, depth_multiplier=2, name="l")),
        "l/kernel",
        lambda k: k.transpose(2, 3, 0, 1).reshape(8, 1, 3, 3),
    ),
    "transposed": (
        lambda: ((9, 9, 4), L.Conv2DTranspose(6, 3, name="l")),
        "l/kernel",
        lambda k: k.transpose(3, 2, 0, 1),
    ),
    "embedding": (lambda: ((9,), L.Embedding(7, 3, name="l")), "l/embeddings", lambda k: k),
    "query": (
        lambda: ((9, 6), L.EinsumDense("abc,cde->abde", (None, 2, 4), name="l")),
        "l/kernel",
        lambda k: k.reshape(6, 8).T,
    ),
    "attention output": (
        lambda: ((9, 2, 4), L.EinsumDense("abcd,cde->abe", (None, 6), name="l")),
        "l/kernel",
        lambda k: k.reshape(8, 6).T,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_singular_values_and_sizes_are_those_of_the_same_weight_in_torch(name: str) -> None:
    make, kernel, turned = CASES[name]
    keras.utils.set_random_seed(4)
    shape, layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    array = np.array(array_of(tensors(model)[kernel]))
    ours = as_matrix(kernel, array, owners(model)[kernel])
    theirs = turned(array)
    theirs = theirs.reshape(len(theirs), -1)
    assert ours.shape == theirs.shape
    values = [np.linalg.svd(m, compute_uv=False) for m in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)


def test_outputs_of_a_transposed_convolution_are_not_its_rows() -> None:
    layer = L.Conv2DTranspose(6, 3)
    assert output_axes("l/kernel", 4, layer) == (2,)


def network(seed: int) -> keras.Model:
    """Two convolutions of one type, whose spectra differ, and a head."""
    keras.utils.set_random_seed(seed)
    conv = L.Conv2D
    model = keras.Sequential(
        [keras.Input((6, 6, 4)), conv(4, 3, padding="same", name="block1_conv"),
         L.ReLU(name="block1_relu"), conv(4, 3, padding="same", name="block2_conv"),
         L.ReLU(name="block2_relu"), L.GlobalAveragePooling2D(name="pool"),
         L.Dense(2, name="head")]
    )  # fmt: skip
    model.compile("sgd", "mse")
    return model


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch is in this process there")
def test_spectrum_scores_and_plan_are_those_of_torch() -> None:
    import torch

    from frostline.backends.torch.freeze import torch_driver

    model = network(1)
    # One strong direction: a clear spectrum in (out, in * height * width), not along one axis.
    kernel = model.get_layer("block2_conv").kernel
    source = np.random.default_rng(0)
    rank_one = np.multiply.outer(source.normal(size=36), source.normal(size=4)).reshape(3, 3, 4, 4)
    kernel.assign(np.array(array_of(kernel)) + rank_one.astype("float32"))
    net = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
        torch.nn.Linear(4, 2),
    )
    with torch.no_grad():
        for place, name in ((0, "block1_conv"), (1, "block2_conv")):
            array = np.array(array_of(model.get_layer(name).kernel)).transpose(3, 2, 0, 1)
            net[place][0].weight.copy_(torch.from_numpy(array.copy()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    theirs = torch_driver(net, optimizer, "spectrum:share=0.5", total_steps=1)
    ours = Driver(make_policy("spectrum:share=0.5"), KerasBackend(model), total_steps=1)
    ours.start()
    theirs.start()
    names = {"block1_conv/kernel": "0.0.weight", "block2_conv/kernel": "1.0.weight"}
    scores = [d.signals["spectral_snr"] for d in (ours, theirs)]
    for name, other in names.items():
        assert scores[0][name] == pytest.approx(scores[1][other], rel=1e-3)
    trained = [
        {p.name for g in d.backend.groups for p in g.parameters}
        - d.plan.frozen_parameters(d.backend.groups)
        for d in (ours, theirs)
    ]
    assert {names[n] for n in trained[0] if n in names} == trained[1] & set(names.values())
    assert len(trained[0] & names.keys()) == 1


def test_weights_rounded_to_8_bits_keep_a_step_per_output() -> None:
    """Each head of attention has its own scale, as in PyTorch, where heads are rows."""
    keras.utils.set_random_seed(0)
    layer = L.EinsumDense("abc,cde->abde", (None, 2, 4), name="query")
    model = keras.Sequential(
        [keras.Input((5, 6)), layer, L.Reshape((5, 8), name="flat"), L.Dense(2, name="head")]
    )
    array = np.array(array_of(layer.kernel))
    array[:, 0, 0] *= 1000  # one output; the others must not become coarse
    layer.kernel.assign(array)
    model.compile("sgd", "mse")
    backend = KerasBackend(model)
    backend.apply(FreezePlan())
    x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")
    model.test_on_batch(x, np.zeros((4, 5, 2), "float32"))
    backend.keep_batch()
    backend.backward((x, np.zeros((4, 5, 2), "float32")))
    probe = backend.probe()
    group = backend.groups["query"]
    exact, rounded = probe.activations(group), probe.activations(group, int8=True)
    far = np.abs(exact - rounded).reshape(4, 5, 8)[..., 1:].max()
    assert far < 0.05 * np.abs(exact.reshape(4, 5, 8)[..., 1:]).max()
