"""Layer groups of Keras models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.backends.keras.digest import sha256_of_variables
from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.names import can_train, tensors
from frostline.backends.keras.tracing import trace_model
from frostline.errors import BackendError, ModelError, SelectorMatchedNothing
from frostline.groups import LayerGroups

L = keras.layers


def check_complete(model: keras.Model, groups: LayerGroups) -> None:
    parameters = [p.name for g in groups for p in g.parameters]
    buffers = [b.name for g in groups for b in g.buffers]
    assert sorted(parameters) == sorted(can_train(model))
    assert sorted(parameters + buffers) == sorted(tensors(model))


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
    check_complete(model, groups)
    assert groups.names == ("a", "b", "head")
    assert groups.head == {"head"}
    assert groups["a"].parameter_names == {"a/kernel", "a/bias", "a_norm/gamma", "a_norm/beta"}
    assert [b.kind for b in groups["a"].buffers] == ["norm", "norm"]
    assert [(b.name, b.kind) for b in groups["b"].buffers] == [
        ("drop/seed_generator_state", "buffer")
    ]


def test_kinds_of_parameters() -> None:
    x = keras.Input((5,), dtype="int32")
    y = L.Embedding(10, 4, name="words")(x)
    y = L.MultiHeadAttention(2, 4, name="mha")(y, y)
    y = L.LayerNormalization(name="norm")(y)
    y = L.LSTM(3, name="lstm")(y)
    groups = layer_groups(keras.Model(x, L.Dense(2, name="head")(y)))
    kinds = {p.name: p.kind for g in groups for p in g.parameters}
    assert kinds["words/embeddings"] == "embedding"
    assert kinds["mha/query/kernel"] == "weight"
    assert kinds["mha/query/bias"] == "bias"
    assert kinds["norm/gamma"] == kinds["norm/beta"] == "norm"
    assert kinds["lstm/lstm_cell/recurrent_kernel"] == "weight"
    assert kinds["lstm/lstm_cell/bias"] == "bias"
    assert groups.names == ("words", "mha", "lstm", "head")


def test_order_is_that_of_execution_not_of_definition() -> None:
    class Backwards(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.last = L.Dense(2, name="last")
            self.never = L.Dense(3, name="never")
            self.first = L.Dense(3, name="first")

        def build(self, shape) -> None:
            self.first.build(shape)
            self.last.build((None, 3))
            self.never.build((None, 3))

        def call(self, x):
            return self.last(self.first(x))

    model = Backwards()
    model(np.ones((2, 4), "float32"))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert groups.names == ("first", "never", "last")
    assert groups.head == {"last"}
    assert "never ran" in groups.notes[0]


def test_blocks_by_name() -> None:
    def block(x, name: str):
        y = L.BatchNormalization(name=f"{name}_0_bn")(x)
        y = L.Conv2D(4, 3, padding="same", name=f"{name}_1_conv")(y)
        y = L.BatchNormalization(name=f"{name}_1_bn")(y)
        y = L.Conv2D(4, 3, padding="same", name=f"{name}_2_conv")(y)
        return L.Add(name=f"{name}_add")([x, y])

    x = keras.Input((8, 8, 3))
    y = L.Conv2D(4, 3, name="conv1_conv")(x)
    y = L.BatchNormalization(name="conv1_bn")(y)
    y = block(block(y, "conv2_block1"), "conv2_block2")
    y = block(y, "conv3_block1")
    model = keras.Model(x, L.Dense(2, name="top")(L.Flatten()(y)))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert groups.names == ("conv1", "conv2_block1", "conv2_block2", "conv3_block1", "top")
    # A normalisation before its convolution belongs to its block all the same.
    assert "conv2_block1_0_bn/gamma" in groups["conv2_block1"].parameter_names


def test_blocks_by_parallel_branches() -> None:
    def inception(x, name: str):
        ends = [L.Conv2D(4, 1)(x), L.Conv2D(4, 3, padding="same")(L.Conv2D(4, 1)(x))]
        return L.Concatenate(name=name)(ends)

    x = keras.Input((8, 8, 3))
    y = L.Conv2D(4, 3, name="stem")(x)
    y = inception(inception(inception(y, "mixed_a"), "mixed_b"), "mixed_c")
    model = keras.Model(x, L.Dense(2, name="top")(L.Flatten()(y)))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert groups.names == ("stem", "mixed_a", "mixed_b", "mixed_c", "top")


def test_branches_that_are_most_of_the_model_are_no_block() -> None:
    a, b = keras.Input((4,)), keras.Input((4,))
    left = L.Dense(4, name="left2")(L.Dense(4, name="left1")(a))
    right = L.Dense(4, name="right2")(L.Dense(4, name="right1")(b))
    model = keras.Model([a, b], L.Dense(2, name="top")(L.Concatenate()([left, right])))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert len(groups) == 5
    assert groups.names[-1] == "top"


def test_depthwise_and_pointwise_convolutions_are_one_block() -> None:
    x = keras.Input((8, 8, 4))
    y = x
    for i in range(3):
        y = L.DepthwiseConv2D(3, padding="same", name=f"conv_dw_{i}")(y)
        y = L.BatchNormalization(name=f"conv_dw_{i}_bn")(y)
        y = L.Conv2D(4, 1, name=f"conv_pw_{i}")(y)
        y = L.BatchNormalization(name=f"conv_pw_{i}_bn")(y)
    model = keras.Model(x, L.Conv2D(2, 3, name="top")(y))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert groups.names == ("conv_dw_0", "conv_dw_1", "conv_dw_2", "top")


def test_numbers_of_dimensions_make_no_blocks() -> None:
    x = keras.Input((12, 12, 3))
    y = x
    for name in ("conv2d_a", "conv2d_b", "conv1d_a", "conv1d_b"):
        y = L.Conv2D(4, 3, name=name)(y)
    model = keras.Model(x, L.Flatten()(y))
    assert len(layer_groups(model)) == 4


def transformer_block(name: str) -> keras.Layer:
    class Block(keras.Layer):
        def __init__(self) -> None:
            super().__init__(name=name)
            self.attention = L.MultiHeadAttention(2, 4, name="attention")
            self.norm = L.LayerNormalization(name="norm")
            self.feed = L.Dense(4, name="feed")
            self.drop = L.Dropout(0.1, name="drop")

        def call(self, x, training=None):
            return self.norm(x + self.drop(self.feed(self.attention(x, x)), training=training))

    return Block()


def test_a_layer_of_layers_that_repeats_is_one_group() -> None:
    block = type(transformer_block("t"))
    x = keras.Input((5, 4))
    y = L.Dense(4, name="in")(x)
    first = transformer_block("block_0")
    second = block.__new__(block)
    block.__init__(second)
    third = block.__new__(block)
    block.__init__(third)
    third.name = "block_2"
    y = third(second(first(y)))
    model = keras.Model(x, L.Dense(2, name="top")(y))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert groups.names == ("in", "block_0", "t", "block_2", "top")
    assert {m.name for m in groups["block_0"].modules} >= {"block_0", "block_0/drop"}


def test_small_models_side_by_side_are_blocks() -> None:
    def stage(name: str) -> keras.Model:
        return keras.Sequential(
            [L.Conv2D(4, 3, padding="same", name="c1"), L.Conv2D(4, 3, padding="same", name="c2")],
            name=name,
        )

    model = keras.Sequential(
        [keras.Input((8, 8, 4)), *(stage(f"stage{i}") for i in "abcd"), L.Dense(2, name="top")]
    )
    assert layer_groups(model).names == ("stagea", "stageb", "stagec", "staged", "top")


def backbone() -> keras.Model:
    x = keras.Input((8, 8, 3))
    y = x
    for i in range(3):
        y = L.Conv2D(16, 3, padding="same", name=f"c{i}")(y)
    return keras.Model(x, y, name="base")


def test_what_runs_after_a_backbone_is_the_head() -> None:
    x = keras.Input((8, 8, 3))
    y = L.GlobalAveragePooling2D()(backbone()(x))
    y = L.Dense(8, name="hidden")(y)
    model = keras.Model(x, L.Dense(2, name="out")(y))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert groups.names == ("base/c0", "base/c1", "base/c2", "hidden", "out")
    assert groups.head == {"hidden", "out"}


def test_the_head_can_be_named() -> None:
    assert layer_groups(conv_net(), head="[bh]*").head == {"b", "head"}
    with pytest.raises(SelectorMatchedNothing, match="'head'"):
        layer_groups(conv_net(), head="heat")


def test_shared_layers_and_tied_weights_are_merged() -> None:
    shared = L.Dense(4, name="shared")
    x = keras.Input((4,))
    y = shared(L.Dense(4, name="between")(shared(x)))
    model = keras.Model(x, L.Dense(2, name="top")(y))
    groups = layer_groups(model)
    check_complete(model, groups)
    assert groups.names == ("shared", "between", "top")
    assert groups["shared"].calls == 2
    assert any("ran 2 times" in note for note in groups.notes)


def test_a_model_whose_flow_depends_on_values_is_run_in_earnest() -> None:
    class Choosing(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = L.Dense(4, name="first")
            self.norm = L.BatchNormalization(name="norm")
            self.second = L.Dense(4, name="second")
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="n")

        def build(self, shape) -> None:
            for layer in (self.first, self.norm, self.second):
                layer.build((None, 4))

        def call(self, x, training=None):
            self.count.assign(self.count + 1)
            x = self.norm(self.first(x), training=training)
            if float(keras.ops.stop_gradient(keras.ops.sum(x))) < 1e9:
                x = self.second(x)
            return x

    model = Choosing()
    model(np.ones((2, 4), "float32"))
    before = sha256_of_variables(tensors(model))
    groups = layer_groups(model, np.ones((2, 4), "float32"))
    assert groups.names == ("first", "second")
    assert sha256_of_variables(tensors(model)) == before


def test_finding_groups_leaves_the_model_as_it_was() -> None:
    model = conv_net()
    model.get_layer("a").trainable = False
    before = sha256_of_variables(tensors(model))
    flags = [v.trainable for v in tensors(model).values()]
    layer_groups(model)
    assert sha256_of_variables(tensors(model)) == before
    assert [v.trainable for v in tensors(model).values()] == flags
    assert all("call" not in vars(layer) for layer in model.layers)


def test_a_model_that_is_not_built_says_how_to_build_it() -> None:
    with pytest.raises(BackendError, match=r"model\.build"):
        layer_groups(keras.Sequential([L.Dense(2)]))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="created trainable"):
        layer_groups(keras.Sequential([keras.Input((2,)), L.ReLU()]))


def test_a_batch_that_does_not_fit_is_refused_with_its_reason() -> None:
    with pytest.raises(ModelError, match="to see the order of its layers"):
        layer_groups(conv_net(), np.ones((2, 9), "float32"))


NAMES = st.sampled_from(["conv", "block1_a", "block1_b", "block2_a", "block2_b", "x_1", "x_2"])
KINDS = st.sampled_from(["dense", "norm", "drop", "add", "again", "nested"])
#: Layers of a random graph: kind, where its input comes from, what else it uses, name or None.
PARTS = st.tuples(KINDS, st.integers(0, 99), st.integers(0, 99), st.none() | NAMES)


def graph(parts) -> keras.Model:
    """Dense layers, normalisation, dropout, sums, nested models, and layers used again."""
    x = keras.Input((4,))
    ends, used = [x], []
    for i, (kind, source, other, stem) in enumerate(parts):
        name = stem and f"{stem}_{i}"
        fed = ends[source % len(ends)]
        if kind == "add":
            ends.append(L.Add()([fed, ends[other % len(ends)]]))
            continue
        if kind == "again" and used:
            layer = used[other % len(used)]
        elif kind == "norm":
            layer = L.BatchNormalization(name=name)
        elif kind == "drop":
            layer = L.Dropout(0.1, name=name)
        elif kind == "nested":
            layer = keras.Sequential([keras.Input((4,)), L.Dense(4), L.Dense(4)], name=name)
        else:
            layer = L.Dense(4, name=name)
        used.append(layer)
        ends.append(layer(fed))
    return keras.Model(x, L.Dense(2, name="top")(L.Concatenate()([*ends, x])))


# Groups do not depend on the backend; the shapes of symbolic runs do, and JAX's are slow.
@settings(max_examples=30 if keras.backend.backend() == "tensorflow" else 8)
@given(st.lists(PARTS, min_size=1, max_size=9))
def test_random_graphs_give_disjoint_complete_ordered_groups(parts) -> None:
    model = graph(parts)
    groups = layer_groups(model)
    check_complete(model, groups)
    ran = {path: tick for path, tick in trace_model(model).entered.items() if "/" not in path}
    starts = [min(ran[p.name.partition("/")[0]] for p in g.parameters) for g in groups]
    assert starts == sorted(starts)
    assert "top/kernel" in {p.name for name in groups.head for p in groups[name].parameters}
