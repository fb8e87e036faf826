"""The view of a model in training that signals are computed from; it changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from frostline.backends.torch.activations import ProbeBatch
from frostline.backends.torch.optimizer import can_train
from frostline.backends.torch.update import planned_update, readable
from frostline.errors import BackendError, PolicyError
from frostline.groups import LayerGroup
from frostline.signals import Matrix

__all__ = ["TorchProbe"]


class TorchProbe:
    """Satisfies `frostline.signals.Probe` between one backward pass and its update.

    Gradients are read as they are; under a gradient scaler, unscale them first (an optimizer that
    unscales by itself has told the factor, and is understood).

    Args:
        parameters: tensors by name.
        frozen: names of those that do not train.
        batch: the probe batch.
        optimizer: the optimizer, if there is one.
        rates: gives the rate of each of its parameter groups, without the plan's factors.
        loss: the training loss of this step, if known.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        frozen: Collection[str],
        batch: ProbeBatch,
        optimizer: Optimizer | None = None,
        rates: Callable[[], list[Any]] = list,
        loss: float | Tensor | None = None,
    ) -> None:
        self._parameters = parameters
        self._frozen = frozen
        self._batch = batch
        self._optimizer = optimizer
        self._rates = rates
        self._loss = loss
        self._outputs: dict[bool, dict[str, Tensor]] = {}
        self._updates: dict[int, Tensor] | None = None

    def trains(self, unit: LayerGroup) -> bool:
        """Whether the plan in force trains any parameter of the unit."""
        return any(p.name not in self._frozen for p in unit.parameters)

    def gradients(self, unit: LayerGroup) -> list[Tensor | None]:
        """The gradient of each floating-point parameter, None where there is none."""
        return [None if p.grad is None else self._gradient(p.grad) for p in self._floating(unit)]

    def weights(self, unit: LayerGroup) -> list[Tensor]:
        """Each floating-point parameter, as it is now."""
        return [readable(p) for p in self._floating(unit)]

    def norm(self, arrays: Sequence[Tensor | None], order: Literal[1, 2]) -> float:
        """L1 or L2 norm over all tensors together: one transfer from the device."""
        parts = [torch.linalg.vector_norm(t, order) for t in arrays if t is not None]
        if not parts:
            return 0.0
        return float(torch.linalg.vector_norm(_together(parts), order))

    def dot(self, first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
        """Sum of the products of all elements: one transfer from the device."""
        parts = [
            torch.vdot(a.reshape(-1), b.reshape(-1)).real
            for a, b in zip(first, second, strict=True)
            if a is not None and b is not None
        ]
        return float(_together(parts).sum()) if parts else 0.0

    def matrices(self, unit: LayerGroup) -> list[Matrix]:
        """The singular values of each parameter of two or more dimensions."""
        found: list[Matrix] = []
        for parameter, weight in zip(self._floating(unit), self.weights(unit), strict=True):
            if weight.ndim > 1 and weight.numel():
                matrix = _outputs_first(weight, getattr(parameter, "trailing_outputs", 0))
                single = torch.complex64 if matrix.is_complex() else torch.float32
                values = torch.linalg.svdvals(matrix.to(single))
                rows, columns = matrix.shape
                found.append(Matrix(rows, columns, values.tolist()))
        return found

    def learning_rate(self, unit: LayerGroup) -> float:
        """The optimizer's rate for the unit now, without the plan's factor; the largest one."""
        wanted = {id(p) for p in self._floating(unit)}
        groups = self._known_optimizer("read learning rates").param_groups
        return max(
            (
                float(rate)
                for group, rate in zip(groups, self._rates(), strict=True)
                if any(id(p) in wanted for p in group["params"])
            ),
            default=0.0,
        )

    def loss(self) -> float:
        """The training loss of this step."""
        if self._loss is None:
            raise PolicyError(
                "read the training loss",
                found="a step that was sampled without it",
                fix="call driver.sample(loss=...) between backward() and optimizer.step()",
            )
        return float(self._loss.detach() if isinstance(self._loss, Tensor) else self._loss)

    def activations(self, unit: LayerGroup, *, int8: bool = False) -> Tensor:
        """What the unit puts out for the probe batch; one forward pass serves all units."""
        if int8 not in self._outputs:
            self._outputs[int8] = self._batch.outputs(int8=int8)
        if unit.name not in self._outputs[int8]:
            raise BackendError(
                f"read the activations of {unit.name!r}",
                found="no module of it that ran on the probe batch and put out one row per sample",
                fix="use a policy that reads no activations, or other layer groups",
            )
        return self._outputs[int8][unit.name]

    def update(self, unit: LayerGroup) -> list[Tensor | None]:
        """What the optimizer would add to each floating-point parameter now."""
        if self._updates is None:
            optimizer = self._known_optimizer("find out the next update")
            self._updates = planned_update(optimizer, self._rates())
        return [self._updates.get(id(p)) for p in self._floating(unit)]

    # -- inside ------------------------------------------------------------------------------

    def _floating(self, unit: LayerGroup) -> list[Tensor]:
        found = (self._parameters[p.name] for p in unit.parameters)
        return [p for p in found if can_train(p)]

    def _gradient(self, gradient: Tensor) -> Tensor:
        dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
        scale = getattr(self._optimizer, "grad_scale", None)
        return readable(dense) if scale is None else readable(dense) / scale.to(dense.device)

    def _known_optimizer(self, asked: str) -> Optimizer:
        if self._optimizer is None:
            raise BackendError(
                asked, found="this backend was given no optimizer", fix="TorchBackend(model, opt)"
            )
        return self._optimizer


def _together(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([p.to(parts[0].device) for p in parts])


def _outputs_first(weight: Tensor, trailing: int) -> Tensor:
    """A weight as a matrix with a row per output.

    Args:
        weight: of two or more dimensions.
        trailing: how many of the last dimensions count outputs, as in Keras's layers; 0 where the
            first one does.
    """
    if not trailing:
        return weight.reshape(len(weight), -1)
    return weight.reshape(math.prod(weight.shape[:-trailing]), -1).T
