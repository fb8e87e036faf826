"""Measured costs of the layer groups of Keras models."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from frostline.backends.keras.digest import sha256_of_variables
from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.measure import measure_costs
from frostline.backends.keras.names import layers, tensors
from frostline.cost import group_reports, predicted_step_s
from frostline.errors import ModelError
from frostline.plan import FreezePlan

L = keras.layers


def network() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((64,)),
            L.Dense(8, name="small"),
            L.BatchNormalization(name="norm"),
            L.Dropout(0.5, name="drop"),
            L.Dense(2048, activation="relu", name="wide"),
            L.Dense(1024, name="dear"),
            L.Dense(2, name="head"),
        ]
    )


def test_costs_of_all_groups_and_the_model_as_it_was() -> None:
    model = network()
    model.get_layer("wide").trainable = False
    model.get_layer("dear").kernel.trainable = False
    groups = layer_groups(model)
    before = sha256_of_variables(tensors(model))
    flags = [v.trainable for v in tensors(model).values()]
    shown = [layer.trainable for _, layer in layers(model)]
    measured = measure_costs(model, groups, np.ones((16, 64), "float32"), repeats=2)
    assert measured.measured
    assert measured.names == groups.names
    assert sha256_of_variables(tensors(model)) == before
    assert [v.trainable for v in tensors(model).values()] == flags
    assert [layer.trainable for _, layer in layers(model)] == shown
    assert all("call" not in vars(layer) for _, layer in layers(model))
    for group in measured:
        cost = group.cost
        assert cost is not None
        assert min(cost.forward_s, cost.input_grad_s, cost.weight_grad_s, cost.optimizer_s) >= 0
        assert cost.frozen_forward_s is not None
        assert cost.frozen_forward_s > 0
    assert measured[0].cost.input_grad_s == 0  # type: ignore[union-attr]
    # (16, 8) of float32 from each of the three layers: dense, normalisation, dropout.
    assert measured["small"].cost.activation_bytes == 3 * 16 * 8 * 4  # type: ignore[union-attr]
    assert measured["wide"].cost.activation_bytes == 16 * 2048 * 4  # type: ignore[union-attr]


def test_the_dear_group_has_the_largest_part_and_freezing_saves() -> None:
    model = network()
    measured = measure_costs(model, layer_groups(model), np.ones((256, 64), "float32"))
    reports = {r.group.name: r for r in group_reports(measured)}
    assert max(reports.values(), key=lambda r: r.forward_share).group.name == "dear"
    frozen = FreezePlan(frozen=frozenset({"small", "wide", "dear"}))
    assert predicted_step_s(measured, frozen) < predicted_step_s(measured, FreezePlan())


def test_a_batch_is_made_up_where_none_is_given() -> None:
    x = keras.Input((6,), dtype="int32")
    y = L.Embedding(10, 4, name="words")(x)
    y = L.GlobalAveragePooling1D()(y)
    model = keras.Model(x, L.Dense(2, name="head")(y))
    assert measure_costs(model, layer_groups(model), repeats=1).measured


def test_a_batch_that_does_not_fit_is_refused() -> None:
    model = network()
    with pytest.raises(ModelError, match="run a training step"):
        measure_costs(model, layer_groups(model), np.ones((16, 63), "float32"))
