"""The Keras backend as a case for the contract suite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.backends.keras.backend import KerasBackend
from frostline.backends.keras.names import tensors

WIDTH, CLASSES, BATCH = 8, 3, 16


def small_model(seed: int = 3, *, dropout: float = 0.25, dtype: str | None = None) -> keras.Model:
    """Three blocks of dense, norm, dropout and a head; alike for equal seeds."""
    keras.utils.set_random_seed(seed)
    make = keras.layers
    x = inputs = keras.Input((6,), name="x")
    for i in range(3):
        x = make.Dense(WIDTH, name=f"block{i}", dtype=dtype)(x)
        x = make.BatchNormalization(name=f"norm{i}", dtype=dtype)(x)
        x = make.Activation("gelu", name=f"act{i}", dtype=dtype)(x)
        x = make.Dropout(dropout, seed=seed + i, name=f"drop{i}", dtype=dtype)(x)
    x = make.Dense(CLASSES, name="head", dtype=dtype)(x)
    return keras.Model(inputs, x, name="small")


def momentum() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01)


def batch(step: int, size: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(step + 1)
    return (
        source.normal(size=(size, 6)).astype("float32"),
        source.normal(size=(size, CLASSES)).astype("float32"),
    )


class KerasCase:
    """`small_model` on seeded data, outside `fit`."""

    def __init__(
        self,
        backend_class: type[KerasBackend] = KerasBackend,
        optimizer: Callable[[], Any] = momentum,
        **compiled: Any,
    ) -> None:
        self.model = small_model()
        self.model.compile(optimizer(), "mse", **compiled)
        self.model.test_on_batch(*batch(0))  # builds metrics and optimizer
        self.backend = backend_class(self.model)
        self.step = 0

    def backward(self) -> None:
        self.step += 1
        self.backend.backward(batch(self.step))

    def update(self) -> None:
        self.backend.update()

    def has_gradient(self, parameter: str) -> bool:
        return parameter in self.backend.steps.gradients

    def evidence(self) -> Mapping[str, str]:
        found = {f"m:{n}": v for n, v in tensors(self.model).items()}
        found |= {f"o:{i}": v for i, v in enumerate(self.model.optimizer.variables)}
        digests = {n: digest(v) for n, v in found.items()}
        return digests | {f"g:{n}": digest(g) for n, g in self.backend.steps.gradients.items()}

    def tamper(self, tensor: str) -> None:
        variable = tensors(self.model)[tensor]
        array = np.array(ops.convert_to_numpy(variable))
        array[(0,) * array.ndim] += 1e-6
        variable.assign(array)


def digest(tensor: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(ops.convert_to_numpy(tensor)).tobytes()).hexdigest()
