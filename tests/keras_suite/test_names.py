"""Names of layers and variables."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from frostline.backends.keras.names import aliases, can_train, layers, owners, tensors

L = keras.layers


def functional() -> keras.Model:
    x = keras.Input((8, 8, 3))
    y = L.Conv2D(4, 3, name="conv")(x)
    y = L.BatchNormalization(name="bn")(y)
    y = L.GlobalAveragePooling2D()(y)
    return keras.Model(x, L.Dense(2, name="out")(y), name="whole")


class Blocks(keras.Model):
    """Layers in a list and in a dictionary, two of the same name, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [L.Dense(3, name="same"), L.Dense(3, name="same")]
        self.ends = {"out": L.Dense(2, name="out")}
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.ends["out"](x) * self.scale


def test_the_models_own_name_is_left_out() -> None:
    assert list(tensors(functional())) == [
        "conv/kernel", "conv/bias", "bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance",
        "out/kernel", "out/bias",
    ]  # fmt: skip


def test_a_backbone_used_as_a_layer_keeps_its_place_in_the_names() -> None:
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, functional()(x))
    assert "whole/conv/kernel" in tensors(model)


def test_a_backbone_whose_layers_are_taken_over_one_by_one_has_no_place_in_them() -> None:
    base = functional()
    model = keras.Model(base.input, L.Dense(5, name="new")(base.get_layer("bn").output))
    assert next(iter(tensors(model))) == "conv/kernel"
    assert "new/kernel" in tensors(model)


def test_lists_dictionaries_equal_names_and_own_weights_of_a_subclassed_model() -> None:
    model = Blocks()
    model(np.ones((1, 3), "float32"))
    assert set(tensors(model)) == {
        "scale", "same/kernel", "same/bias", "same~2/kernel", "same~2/bias", "out/kernel",
        "out/bias",
    }  # fmt: skip


def test_every_variable_has_exactly_one_name() -> None:
    x = keras.Input((6, 4))
    y = L.Bidirectional(L.LSTM(3, dropout=0.1, return_sequences=True), name="both")(x)
    y = L.MultiHeadAttention(2, 4, dropout=0.1, name="mha")(y, y)
    y = L.TimeDistributed(L.Dense(3), name="each")(y)
    y = L.GaussianNoise(0.1)(y)
    model = keras.Model(x, L.SpectralNormalization(L.Dense(2), name="spectral")(y))
    model.compile("adam", "mse", metrics=["mae"])
    named = tensors(model)
    assert sorted(map(id, named.values())) == sorted(map(id, model.variables))
    assert "both/forward_lstm/lstm_cell/recurrent_kernel" in named
    assert "mha/query/kernel" in named


def test_shared_layers_and_tied_variables_have_one_name_and_aliases() -> None:
    shared = L.Dense(4, name="shared")
    x = keras.Input((4,))
    one = keras.Model(x, shared(x), name="one")
    x2 = keras.Input((4,))
    two = keras.Model(x2, shared(x2), name="two")
    both = keras.Input((4,))
    model = keras.Model(both, two(one(both)))
    assert list(tensors(model)) == ["one/shared/kernel", "one/shared/bias"]
    assert aliases(model)["one/shared/kernel"] == ("two/shared/kernel",)
    assert [layer is shared for _, layer in layers(model)].count(True) == 1


def test_created_trainable_is_seen_whatever_the_flags_say_now() -> None:
    model = functional()
    before = can_train(model)
    model.trainable = False
    assert can_train(model) == before
    assert before == {"conv/kernel", "conv/bias", "bn/gamma", "bn/beta", "out/kernel", "out/bias"}


def test_a_layer_made_frozen_was_still_created_trainable() -> None:
    model = keras.Sequential([keras.Input((2,)), L.Dense(1, trainable=False, name="d")])
    assert can_train(model) == {"d/kernel", "d/bias"}


def test_names_do_not_depend_on_the_backbone_having_been_built_elsewhere() -> None:
    base = functional()
    for _ in range(2):
        x = keras.Input((8, 8, 3))
        base = keras.Model(x, base(x), name="outer")
    assert next(iter(tensors(base))) == "outer/whole/conv/kernel"


def test_owners_are_the_layers_that_hold_the_variables_themselves() -> None:
    model = keras.Sequential([keras.Input((4, 3)), L.LSTM(2, name="lstm")])
    assert type(owners(model)["lstm/lstm_cell/kernel"]).__name__ == "LSTMCell"


@pytest.mark.parametrize("kind", [L.Dropout, L.RandomFlip])
def test_states_of_random_seeds_are_tensors_that_cannot_train(kind) -> None:
    layer = kind(0.1, name="r") if kind is L.Dropout else kind(name="r")
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    assert list(tensors(model)) == ["r/seed_generator_state"]
    assert not can_train(model)
