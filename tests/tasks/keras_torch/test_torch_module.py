"""A Keras model as a torch module: same numbers, and modes, tensors and names as PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from frostline.backends.keras.torch_module import KerasClassifier, KerasModule
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.tracing import leave_untouched
from frostline.errors import ModelError
from frostline.frontier.finding import record

L = keras.layers


def body(*, side: int = 12, seed: int | None = None) -> Any:
    """A nested model, a layer that is used twice, and a layer that is made of layers."""
    inner_in = keras.Input((side, side, 4))
    y = L.Conv2D(4, 3, padding="same", name="conv")(inner_in)
    inner = keras.Model(inner_in, L.BatchNormalization(name="norm", momentum=0.5)(y), name="inner")
    x = keras.Input((side, side, 3))
    y = L.Conv2D(4, 3, padding="same", name="stem")(x)
    y = L.BatchNormalization(name="norm", momentum=0.5)(y)
    y = inner(y)
    twice = L.ReLU(name="train")  # the name of a method of torch's modules
    y = twice(y)
    y = L.SpatialDropout2D(0.4, name="drop", seed=seed)(y) + y
    y = L.TimeDistributed(L.Conv1D(5, 3, padding="same", name="rows"), name="each")(y)
    y = L.GlobalAveragePooling2D(name="pool")(twice(y))
    return keras.Model(x, y, name="body")


def module(**settings: Any) -> KerasClassifier:
    keras.utils.set_random_seed(0)
    return KerasClassifier(body(**settings), head="predictions", classes=3).eval()


def pictures(count: int = 4, side: int = 12) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_scores_are_those_of_the_keras_model() -> None:
    net = module()
    whole = net.to_keras()
    x = pictures()
    found = net(x).softmax(1).detach().numpy()
    wanted = np.asarray(whole.predict(x.permute(0, 2, 3, 1).numpy(), verbose=0))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_blue_comes_first_where_the_weights_want_it() -> None:
    keras.utils.set_random_seed(0)
    net = KerasClassifier(body(), head="p", classes=3, channels="bgr").eval()
    plain = module()
    plain.head.load_state_dict(net.head.state_dict())
    assert torch.equal(net(pictures()), plain(pictures().flip(1)))


def test_names_parameters_and_buffers_are_as_in_torch() -> None:
    net = module()
    assert [n for n, _ in net.named_parameters()] == [
        "stem.kernel", "stem.bias", "norm.gamma", "norm.beta",
        "inner.conv.kernel", "inner.conv.bias", "inner.norm.gamma", "inner.norm.beta",
        "each.rows.kernel", "each.rows.bias", "predictions.weight", "predictions.bias",
    ]  # fmt: skip
    assert {n.rpartition(".")[2] for n, _ in net.named_buffers()} == {
        "moving_mean", "moving_variance", "seed_generator_state",
    }  # fmt: skip
    assert isinstance(net.get_submodule("train_"), KerasModule)
    assert all(p.requires_grad for p in net.parameters())


def test_a_hand_frozen_layer_is_the_policys_to_freeze() -> None:
    made = body()
    made.get_layer("inner").trainable = False
    net = KerasClassifier(made, head="p", classes=2)
    assert all(p.requires_grad for p in net.parameters())


def test_groups_know_norms_and_their_statistics() -> None:
    groups = layer_groups(module(), pictures(2), head="predictions")
    assert groups.names == ("stem", "inner", "each", "predictions")
    assert {p.name: p.kind for p in groups["stem"].parameters} == {
        "stem.kernel": "weight",
        "stem.bias": "bias",
        "norm.gamma": "norm",
        "norm.beta": "norm",
    }
    assert [b.kind for b in groups["inner"].buffers if "moving" in b.name] == ["norm"] * 2
    assert groups.head == {"predictions"}


def moved(net: nn.Module, x: Tensor) -> set[str]:
    before = {n: b.clone() for n, b in net.named_buffers()}
    net(x)
    return {n for n, b in net.named_buffers() if not torch.equal(b, before[n])}


def test_each_layer_has_its_own_mode() -> None:
    net, x = module(), pictures()
    assert moved(net, x) == set()
    assert torch.equal(net(x), net(x))
    net.train()
    assert moved(net, x) == {
        "norm.moving_mean", "norm.moving_variance", "inner.norm.moving_mean",
        "inner.norm.moving_variance", "drop.seed_generator_state",
    }  # fmt: skip
    assert not torch.equal(net(x), net(x))  # dropout
    net.get_submodule("norm").eval()
    net.get_submodule("drop").eval()
    assert moved(net, x) == {"inner.norm.moving_mean", "inner.norm.moving_variance"}
    assert torch.equal(net(x), net(x))


def test_statistics_move_as_in_keras() -> None:
    net, x = module(), pictures()
    twin = keras.models.clone_model(net.to_keras())
    twin.set_weights(net.to_keras().get_weights())
    net.train()(x)
    twin(x.permute(0, 2, 3, 1), training=True)
    for path, own in (("norm", twin), ("inner.norm", twin.get_layer("inner"))):
        wanted = own.get_layer("norm").moving_variance.value
        assert torch.equal(net.get_submodule(path).moving_variance, wanted.detach())


def test_gradients_reach_every_parameter_and_are_those_of_keras() -> None:
    net, x = module(), pictures()
    net(x).square().sum().backward()
    mine = {n: p.grad for n, p in net.named_parameters()}
    assert all(g is not None for g in mine.values())
    for p in net.parameters():
        p.grad = None
    features = net.calls.layer(x.permute(0, 2, 3, 1), training=False)
    net.head(features).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, mine[name])


def test_seeds_of_dropout_are_state_that_is_saved() -> None:
    net, x = module(seed=7).train(), pictures()
    state = {n: t.clone() for n, t in net.state_dict().items()}
    first, second = net(x), net(x)
    assert not torch.equal(first, second)
    net.load_state_dict(state)
    assert torch.equal(net(x), first)


def test_tensors_stay_shared_when_the_module_moves() -> None:
    net, x = module(), pictures()
    net._apply(torch.clone)  # as `to` another device does
    net.train()
    assert "norm.moving_mean" in moved(net, x)
    assert net.eval().double().get_submodule("norm").moving_mean.dtype == torch.float64


def test_tensors_that_are_replaced_for_a_call_are_the_ones_used() -> None:
    net, x = module(), pictures()
    before = net(x)
    halved = {n: t * 0.5 for n, t in net.named_parameters()}
    found = functional_call(net, halved, (x,))
    assert torch.equal(net(x), before)
    net.load_state_dict(halved, strict=False)
    torch.testing.assert_close(net(x), found)


def test_assigned_tensors_count_and_lose_nothing_in_silence() -> None:
    net, x = module(), pictures()
    net.load_state_dict({n: t * 2 for n, t in net.state_dict().items()}, assign=True)
    other = module()
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), other(x))
    with pytest.raises(ModelError, match="what BatchNormalization learns of the data would be"):
        net.train()(x)


def scaling(*, adapted: bool) -> Any:
    x = keras.Input((8, 8, 3))
    y = L.Rescaling([2.0, 3.0, 4.0], [0.0, 1.0, 2.0], name="scale")(x)
    settings = {} if adapted else {"mean": [1.0, 2.0, 3.0], "variance": [4.0, 5.0, 6.0]}
    layer = L.Normalization(name="normal", **settings)
    y = layer(y)
    if adapted:
        layer.adapt(np.random.default_rng(0).normal(3, 2, (16, 8, 8, 3)))
    y = L.GlobalAveragePooling2D()(L.Conv2D(4, 3, name="conv")(y))
    return keras.Model(x, y)


@pytest.mark.parametrize("adapted", [True, False])
def test_constants_of_layers_are_known_and_statistics_of_the_data_are_loaded(adapted: bool) -> None:
    keras.utils.set_random_seed(0)
    made = scaling(adapted=adapted)
    net = KerasClassifier(made, head="p", classes=2).eval()
    x = pictures(4, 8)
    torch.testing.assert_close(net.head(made(x.permute(0, 2, 3, 1))), net(x))
    fresh = KerasClassifier(keras.models.clone_model(made), head="p", classes=2).eval()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    assert isinstance(made.get_layer("scale").scale, list)  # as it was, for saving
    net.requires_grad_(requires_grad=False).head.requires_grad_()
    example = Example((x,))
    with leave_untouched(net):
        seen = record(net, example, lambda _: None)
    assert seen.recorder.frozen_share > 0.9


def test_a_copy_is_refused() -> None:
    with pytest.raises(ModelError, match="tensors that belong to both"):
        copy.deepcopy(module())


def test_a_layer_of_the_heads_name_is_refused() -> None:
    with pytest.raises(ModelError, match="a layer of that name"):
        KerasClassifier(body(), head="norm", classes=2)


def test_kernels_as_matrices_have_a_row_per_output() -> None:
    from frostline.backends.torch.probe import _outputs_first

    made = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(5, 3, name="a"),
            L.DepthwiseConv2D(3, depth_multiplier=2, name="b"),
            L.GlobalAveragePooling2D(),
        ]
    )
    net = KerasClassifier(keras.Model(made.inputs, made.outputs[0]), head="p", classes=2)
    shapes = {
        n: _outputs_first(p, getattr(p, "trailing_outputs", 0)).shape
        for n, p in net.named_parameters()
        if p.ndim > 1
    }
    assert shapes == {"a.kernel": (5, 27), "b.kernel": (10, 9), "p.weight": (2, 10)}
