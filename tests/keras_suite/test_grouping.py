"""Layer groups of Keras models."""

from __future__ import annotations

import keras
import pytest

from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.names import can_train, tensors
from frostline.errors import BackendError

L = keras.layers


def conv_net() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Rescaling(1 / 255),
            L.Conv2D(4, 3, name="a"),
            L.BatchNormalization(name="a_norm"),
            L.ReLU(),
            L.Conv2D(4, 3, name="b"),
            L.Dropout(0.1, name="drop"),
            L.Flatten(),
            L.Dense(2, name="head"),
        ]
    )


def test_groups_in_order_each_with_the_layers_around_its_weights() -> None:
    model = conv_net()
    groups = layer_groups(model)
    assert groups.names == ("a", "b", "head")
    assert groups.head == {"head"}
    assert groups["a"].parameter_names == {"a/kernel", "a/bias", "a_norm/gamma", "a_norm/beta"}
    assert [b.kind for b in groups["a"].buffers] == ["norm", "norm"]
    assert [(b.name, b.kind) for b in groups["b"].buffers] == [
        ("drop/seed_generator_state", "buffer")
    ]


def test_groups_are_disjoint_and_complete() -> None:
    model = conv_net()
    groups = layer_groups(model)
    parameters = [p.name for g in groups for p in g.parameters]
    buffers = [b.name for g in groups for b in g.buffers]
    assert sorted(parameters) == sorted(can_train(model))
    assert sorted(parameters + buffers) == sorted(tensors(model))


def test_a_model_that_is_not_built_says_how_to_build_it() -> None:
    with pytest.raises(BackendError, match=r"model\.build"):
        layer_groups(keras.Sequential([L.Dense(2)]))
