"""The view of a Keras model in training that signals are computed from; it changes nothing.

Arrays are NumPy arrays on every Keras backend.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from frostline.backends.keras.activations import ProbeBatch
from frostline.backends.keras.arrays import Array, single_array, to_number
from frostline.backends.keras.kernels import as_matrix
from frostline.backends.keras.optimizer import OptimizerGuard
from frostline.backends.keras.steps import Steps
from frostline.errors import BackendError, PolicyError
from frostline.groups import LayerGroup
from frostline.signals import Matrix

__all__ = ["KerasProbe"]


class KerasProbe:
    """Satisfies `frostline.signals.Probe` between one backward pass and its update.

    Args:
        variables: those that can train, by name.
        owners: the layer that holds each of them, by name.
        frozen: names of those that do not train.
        batch: the probe batch.
        steps: have the gradients.
        guard: stands around the optimizer.
        loss: the training loss of this step, if known.
    """

    def __init__(
        self,
        variables: Mapping[str, keras.Variable],
        owners: Mapping[str, keras.Layer],
        frozen: Collection[str],
        batch: ProbeBatch,
        steps: Steps,
        guard: OptimizerGuard,
        loss: Any = None,
    ) -> None:
        self._variables = variables
        self._owners = owners
        self._frozen = frozen
        self._batch = batch
        self._steps = steps
        self._guard = guard
        self._loss = loss
        self._outputs: dict[bool, dict[str, Array]] = {}
        self._updates: dict[str, Array] | None = None

    def trains(self, unit: LayerGroup) -> bool:
        """Whether the plan in force trains any parameter of the unit."""
        return any(p.name not in self._frozen for p in unit.parameters)

    def gradients(self, unit: LayerGroup) -> list[Array | None]:
        """The gradient of each floating-point parameter, None where there is none."""
        scale = self._guard.loss_scale
        found = (self._steps.gradients.get(name) for name in self._floating(unit))
        return [None if g is None else _unscaled(single_array(g), scale) for g in found]

    def weights(self, unit: LayerGroup) -> list[Array]:
        """Each floating-point parameter, as it is now."""
        return [single_array(self._variables[name]) for name in self._floating(unit)]

    def norm(self, arrays: Sequence[Array | None], order: Literal[1, 2]) -> float:
        """L1 or L2 norm over all arrays together."""
        present = [a for a in arrays if a is not None]
        if order == 1:
            return math.fsum(float(np.abs(a).sum()) for a in present)
        return math.sqrt(math.fsum(float(np.vdot(a, a)) for a in present))

    def dot(self, first: Sequence[Array | None], second: Sequence[Array | None]) -> float:
        """Sum of the products of all elements."""
        pairs = zip(first, second, strict=True)
        return math.fsum(float(np.vdot(a, b)) for a, b in pairs if a is not None and b is not None)

    def matrices(self, unit: LayerGroup) -> list[Matrix]:
        """The singular values of each parameter of two or more dimensions."""
        found: list[Matrix] = []
        for name in self._floating(unit):
            array = single_array(self._variables[name])
            if array.ndim > 1 and array.size:
                matrix = as_matrix(name, array, self._owners[name])
                values = np.linalg.svd(matrix, compute_uv=False)
                rows, columns = matrix.shape
                found.append(Matrix(rows, columns, values.tolist()))
        return found

    def learning_rate(self, unit: LayerGroup) -> float:
        """The optimizer's rate now, without the plan's factor: one for all units."""
        return self._guard.learning_rate

    def loss(self) -> float:
        """The training loss of this step."""
        if self._loss is None:
            raise PolicyError(
                "read the training loss",
                found="a step that was sampled without it",
                fix="call driver.sample(loss=...) between backward pass and update, or train with "
                "a train_step that keeps Keras's own loss metric",
            )
        return to_number(self._loss)

    def activations(self, unit: LayerGroup, *, int8: bool = False) -> Array:
        """What the unit puts out for the probe batch; one forward pass serves all units."""
        if int8 not in self._outputs:
            self._outputs[int8] = self._batch.outputs(int8=int8)
        if unit.name not in self._outputs[int8]:
            raise BackendError(
                f"read the activations of {unit.name!r}",
                found="no layer of it that ran on the probe batch and put out one row per sample",
                fix="use a policy that reads no activations, or other layer groups",
            )
        return self._outputs[int8][unit.name]

    def update(self, unit: LayerGroup) -> list[Array | None]:
        """What the optimizer would add to each floating-point parameter now."""
        if self._updates is None:
            self._updates = self._planned()
        return [self._updates.get(name) for name in self._floating(unit)]

    # -- inside ------------------------------------------------------------------------------

    def _floating(self, unit: LayerGroup) -> list[str]:
        names = (p.name for p in unit.parameters)
        return [n for n in names if keras.backend.is_float_dtype(self._variables[n].dtype)]

    def _planned(self) -> dict[str, Array]:
        scale = self._guard.loss_scale
        names = list(self._steps.gradients)
        gradients = [_unscaled(self._steps.gradients[n], scale) for n in names]
        updates = self._guard.planned(gradients, [self._variables[n] for n in names])
        return dict(zip(names, updates, strict=True))


def _unscaled(gradient: Any, scale: float) -> Any:
    return gradient if scale == 1 else gradient / scale
