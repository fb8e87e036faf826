"""Small Keras models of many shapes, with samples: for comparing cached with plain training."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from frostline.backends.keras.names import layers as layers_of

SAMPLES, BATCH = 40, 16


def long(test: Any) -> Any:
    """Slow where Keras compiles, and much the same there: in the fast run on torch alone."""
    return test if keras.backend.backend() == "torch" else pytest.mark.slow(test)


def long_unless(kinds: Iterable[str], fast: Container[str]) -> list[Any]:
    """Parameters of a test, of which only some are in the fast run where Keras compiles."""
    some = keras.backend.backend() != "torch"
    return [
        pytest.param(kind, marks=pytest.mark.slow) if some and kind not in fast else kind
        for kind in kinds
    ]


@dataclass
class Sample:
    """A compiled model with samples for it."""

    model: keras.Model
    x: Any
    y: Any


def freeze_first(model: keras.Model, share: float) -> None:
    """Freeze a share of the layers that hold weights, in order; the last one trains."""
    seen: set[int] = set()
    leaves = []
    for path, layer in layers_of(model):
        own = {id(v) for v in layer.weights} - seen
        if path and own and not isinstance(layer, keras.Model):
            leaves.append(layer)
            seen |= own
    for layer in leaves[: min(len(leaves) - 1, round(share * len(leaves)))]:
        layer.trainable = False


def pictures(size: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SAMPLES, size, size, 3)).astype("float32")


def vectors(width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SAMPLES, width)).astype("float32")


def tokens(length: int = 6, words: int = 9, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).integers(1, words, size=(SAMPLES, length))
    found[:, -2:] *= np.random.default_rng(seed + 1).integers(0, 2, size=(SAMPLES, 1))
    return found.astype("int32")


def labels(classes: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, classes, SAMPLES)


def compiled(model: keras.Model, loss: Any = None, **settings: Any) -> keras.Model:
    settings = {"optimizer": keras.optimizers.Adam(3e-3), "jit_compile": False} | settings
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, **settings)
    return model


def noisy(model: keras.Model) -> keras.Model:
    """Without weights that are zero or one: their gradients, and so differences, would vanish."""
    source = np.random.default_rng(3)
    for weight in model.weights:
        noise = 0.1 * source.normal(size=weight.shape)
        weight.assign(weight + np.abs(noise).astype("float32"))
    return model


# -- architectures -------------------------------------------------------------------------------


def mlp() -> Sample:
    """Sequential, with normalisation and dropout."""
    model = keras.Sequential([keras.Input((8,))])
    for _ in range(3):
        model.add(layers.Dense(12, activation="relu"))
        model.add(layers.BatchNormalization())
        model.add(layers.Dropout(0.3))
    model.add(layers.Dense(3))
    return Sample(compiled(noisy(model), metrics=["accuracy"]), vectors(), labels())


def residual() -> Sample:
    """Skip connections that cross any boundary."""
    x = inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(6, 3, padding="same")(x)
    for _ in range(3):
        y = layers.Conv2D(6, 3, padding="same")(x)
        y = layers.BatchNormalization()(y)
        x = layers.Activation("relu")(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return Sample(compiled(noisy(keras.Model(inputs, layers.Dense(3)(x)))), pictures(), labels())


def unet() -> Sample:
    """Down and up, with skips from every level."""
    inputs = keras.Input((12, 12, 3))
    a = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    b = layers.Conv2D(6, 3, padding="same", activation="relu")(layers.MaxPooling2D()(a))
    c = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.MaxPooling2D()(b))
    d = layers.Concatenate()([layers.UpSampling2D()(c), b])
    d = layers.Conv2D(6, 3, padding="same", activation="relu")(d)
    e = layers.Concatenate()([layers.Conv2DTranspose(4, 2, strides=2)(d), a])
    model = keras.Model(inputs, layers.Conv2D(1, 1)(e))
    y = np.random.default_rng(5).normal(size=(SAMPLES, 12, 12, 1)).astype("float32")
    return Sample(compiled(noisy(model), loss="mse"), pictures(), y)


def siamese() -> Sample:
    """One branch for two inputs, called as a model."""
    inner = keras.Input((8,))
    h = layers.Dense(6, activation="tanh")(inner)
    branch = keras.Model(inner, layers.Dense(4)(h), name="branch")
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    h = layers.Subtract()([branch(a), branch(b)])
    h = layers.Dense(5, activation="relu")(h)
    model = keras.Model([a, b], layers.Dense(1)(h))
    y = np.random.default_rng(5).normal(size=(SAMPLES, 1)).astype("float32")
    return Sample(compiled(noisy(model), loss="mse"), [vectors(), vectors(seed=1)], y)


def several() -> Sample:
    """Inputs and outputs by name; one output may come from the frozen region alone."""
    a, b = keras.Input((8,), name="a"), keras.Input((12, 12, 3), name="b")
    h = layers.Dense(6, activation="relu")(a)
    early = layers.Dense(2, name="early")(h)
    g = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3, activation="relu")(b))
    late = layers.Dense(3, name="late")(layers.Concatenate()([h, g, a]))
    model = keras.Model({"a": a, "b": b}, {"early": early, "late": late})
    loss = {"early": "mse", "late": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    y = {"early": vectors(2, seed=4), "late": labels()}
    return Sample(compiled(noisy(model), loss=loss), {"a": vectors(), "b": pictures()}, y)


class Positions(layers.Layer):
    """A table for all samples alike, added to what it is called with by the layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal")

    def call(self, x: Any) -> Any:
        return ops.expand_dims(self.table, 0)

    def compute_output_shape(self, shape: Any) -> Any:
        return (1, *shape[1:])


def attention() -> Sample:
    """Token and position embedding, two blocks, padding masked."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    x = layers.Add()([x, Positions()(x)])
    for _ in range(2):
        y = layers.MultiHeadAttention(2, 4)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, y]))
        y = layers.Dense(8)(layers.Dense(12, activation="gelu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling1D()(x)
    return Sample(compiled(noisy(keras.Model(inputs, layers.Dense(3)(x)))), tokens(), labels())


def recurrent() -> Sample:
    """A masked LSTM, then a GRU in both directions."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True)(inputs)
    x = layers.LSTM(5, return_sequences=True)(x)
    x = layers.Bidirectional(layers.GRU(4))(x)
    return Sample(compiled(noisy(keras.Model(inputs, layers.Dense(3)(x)))), tokens(), labels())


def backbone() -> Sample:
    """A backbone inside a backbone, the outer one called as for inference."""
    inner = keras.Input((12, 12, 4))
    x = layers.Conv2D(4, 3, activation="relu", name="deep")(inner)
    x = layers.BatchNormalization(name="deep_norm")(x)
    core = keras.Model(inner, layers.Conv2D(4, 3, name="deeper")(x), name="core")
    outer = keras.Input((12, 12, 3))
    x = core(layers.Conv2D(4, 3, padding="same", name="stem")(outer))
    x = layers.Dropout(0.2)(layers.BatchNormalization(name="out_norm")(x))
    body = keras.Model(outer, layers.GlobalMaxPooling2D()(x), name="body")
    inputs = keras.Input((12, 12, 3))
    h = body(layers.Rescaling(0.5)(inputs), training=False)
    return Sample(compiled(noisy(keras.Model(inputs, layers.Dense(3)(h)))), pictures(), labels())


def augmented() -> Sample:
    """Random augmentation in front."""
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.RandomFlip("horizontal", seed=1),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Conv2D(4, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    return Sample(compiled(noisy(model)), pictures(), labels())


@keras.saving.register_keras_serializable("frostline_tests")
class Gate(layers.Layer):
    """A layer of the user's, with layers inside."""

    def __init__(self, width: int, **rest: Any) -> None:
        super().__init__(**rest)
        self.width = width
        self.signal, self.gate = layers.Dense(width), layers.Dense(width, activation="sigmoid")

    def build(self, shape: Any) -> None:
        self.signal.build(shape)
        self.gate.build(shape)

    def call(self, x: Any) -> Any:
        return self.signal(x) * self.gate(x)


def custom() -> Sample:
    """The user's own layers, a Lambda and plain operations."""
    inputs = keras.Input((8,))
    x = Gate(6)(inputs)
    x = layers.Lambda(lambda t: ops.sin(t) + 1.0)(x)
    x = ops.concatenate([x, ops.square(x) * 0.5], axis=-1)
    x = Gate(5)(x)
    x = ops.reshape(x, (-1, 5))
    return Sample(compiled(noisy(keras.Model(inputs, layers.Dense(3)(x)))), vectors(), labels())


class Unembed(layers.Layer):
    """Scores by another layer's table."""

    def __init__(self, table: layers.Embedding, **rest: Any) -> None:
        super().__init__(**rest)
        self.table = table

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.transpose(self.table.embeddings))

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], self.table.input_dim)


def tied() -> Sample:
    """The table of words at both ends."""
    inputs = keras.Input((6,), dtype="int32")
    table = layers.Embedding(9, 8)
    x = layers.Dense(8, activation="relu")(table(inputs))
    x = layers.LayerNormalization()(layers.Dense(8)(x))
    model = keras.Model(inputs, Unembed(table)(x))
    return Sample(compiled(noisy(model)), tokens(), tokens(seed=3))


def branches() -> Sample:
    """A frozen and a live branch of one input: the input itself is needed at each step."""
    inputs = keras.Input((8,))
    a = layers.Dense(6, activation="relu", name="a1")(inputs)
    a = layers.Dense(6, name="a2")(a)
    b = layers.Dense(4, activation="relu", name="b1")(inputs)
    b = layers.Dropout(0.4)(b)
    x = layers.Concatenate()([a, b, inputs])
    return Sample(compiled(noisy(keras.Model(inputs, layers.Dense(3)(x)))), vectors(), labels())


def halves() -> Sample:
    """Mixed precision: float16 between layers."""
    inputs = keras.Input((8,))
    x = layers.Dense(8, activation="relu", dtype="mixed_bfloat16")(inputs)
    x = layers.Dense(8, activation="relu", dtype="mixed_bfloat16")(x)
    model = keras.Model(inputs, layers.Dense(3, dtype="float32")(x))
    return Sample(compiled(noisy(model)), vectors(), labels())


def separable() -> Sample:
    """A Sequential of models and layers that normalise in other ways."""
    block = [layers.SeparableConv2D(5, 3), layers.GroupNormalization(1), layers.PReLU()]
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.DepthwiseConv2D(3),
            keras.Sequential([keras.Input((10, 10, 3)), *block]),
            layers.UnitNormalization(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    return Sample(compiled(noisy(model)), pictures(), labels())


SMALL: dict[str, Callable[[], Sample]] = {
    f.__name__: f
    for f in (mlp, residual, unet, siamese, several, attention, recurrent, backbone, augmented,
              custom, tied, branches, halves, separable)
}  # fmt: skip


def application(name: str) -> Callable[[], Sample]:
    """A network of keras.applications on small pictures, its weights random."""

    def make() -> Sample:
        build = getattr(keras.applications, name)
        body = build(include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg")
        inputs = keras.Input((32, 32, 3))
        model = keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.2)(body(inputs))))
        return Sample(compiled(model), pictures(32), labels())

    return make


LARGE = {
    name: application(name)
    for name in ("MobileNetV2", "VGG16", "ResNet50", "EfficientNetB0", "DenseNet121")
}
