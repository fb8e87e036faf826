"""The reference backend: a small network in NumPy that shows the contract in plain code.

Documentation and the tests of the core run on it; it is meant to be read, not to be fast.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from frostline.errors import BackendError, PolicyError
from frostline.groups import GroupCost, LayerGroup, LayerGroups, ModuleInfo, TensorInfo
from frostline.plan import FreezePlan
from frostline.signals import Matrix

__all__ = ["Momentum", "NumpyBackend", "NumpyNet"]

Array = NDArray[np.float64]


@dataclass(slots=True)
class NumpyNet:
    """Layers of `x -> dropout(relu(norm(x @ w + b)))` and a linear head, with hand-made gradients.

    Args:
        sizes: widths from input to output, e.g. (4, 8, 8, 2): two layers and a head.
        seed: of the initial weights.
        dropout: probability of dropping an activation in training, in [0, 1).

    Attributes:
        parameters: arrays by name, e.g. "layer0.weight" (in, out).
        buffers: running statistics by name, e.g. "layer0.running_mean" (out,).
        gradients: gradient by parameter name; None where none was computed.
        trainable: whether a gradient is computed, by parameter name.
        norm_live: whether statistics follow the data in training, by layer name.
        dropout_live: whether dropout is active in training, by layer name.
        on_training: called with the inputs of each forward pass in training.
    """

    sizes: tuple[int, ...]
    seed: int = 0
    dropout: float = 0.0
    parameters: dict[str, Array] = field(init=False, default_factory=dict)
    buffers: dict[str, Array] = field(init=False, default_factory=dict)
    gradients: dict[str, Array | None] = field(init=False, default_factory=dict)
    trainable: dict[str, bool] = field(init=False, default_factory=dict)
    norm_live: dict[str, bool] = field(init=False, default_factory=dict)
    dropout_live: dict[str, bool] = field(init=False, default_factory=dict)
    random: np.random.Generator = field(init=False)
    on_training: Callable[[Array], None] | None = field(init=False, default=None)
    _tape: list[tuple[Array, ...]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        for name, (n, m) in zip(
            self.layers, zip(self.sizes, self.sizes[1:], strict=False), strict=True
        ):
            self.parameters[f"{name}.weight"] = self.random.normal(size=(n, m)) / np.sqrt(n)
            self.parameters[f"{name}.bias"] = np.zeros(m)
            if name != "head":
                self.buffers[f"{name}.running_mean"] = np.zeros(m)
                self.norm_live[name] = self.dropout_live[name] = True
        self.trainable = dict.fromkeys(self.parameters, True)
        self.gradients = dict.fromkeys(self.parameters)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in execution order; the last is the head."""
        return (*(f"layer{i}" for i in range(len(self.sizes) - 2)), "head")

    def forward(self, x: Array, *, training: bool = True) -> Array:
        """Outputs (N, sizes[-1]) for inputs (N, sizes[0])."""
        if training and self.on_training is not None:
            self.on_training(x)
        self._tape = []
        for name in self.layers:
            z = x @ self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]
            keep = np.ones_like(z)
            if name != "head":
                z = z - self._mean(name, z, training)
                keep = (z > 0) * self._mask(name, z.shape, training)
            self._tape.append((x, keep))
            x = z * keep
        self._tape.append((x, x))
        return x

    def outputs(self) -> dict[str, Array]:
        """What each layer put out in the last forward pass."""
        inputs = [step[0] for step in self._tape]
        return dict(zip(self.layers, inputs[1:], strict=True))

    def loss(self, x: Array, y: Array, *, training: bool = True) -> float:
        """Mean squared error; with `training`, leaves gradients of what trains."""
        error = self.forward(x, training=training) - y
        if training:
            self._backward(2 * error / error.size)
        return float(np.mean(error**2))

    def _mean(self, name: str, z: Array, training: bool) -> Array:
        stat = self.buffers[f"{name}.running_mean"]
        if training and self.norm_live[name]:
            stat += 0.1 * (z.mean(axis=0) - stat)
        return stat.copy()

    def _mask(self, name: str, shape: tuple[int, ...], training: bool) -> Array:
        if not (training and self.dropout and self.dropout_live[name]):
            return np.ones(shape)
        return (self.random.random(shape) >= self.dropout) / (1 - self.dropout)

    def _backward(self, grad: Array) -> None:
        frontier = next(i for i, n in enumerate(self.layers) if self._trains(n))
        for i in reversed(range(frontier, len(self.layers))):
            name, (x, keep) = self.layers[i], self._tape[i]
            grad = grad * keep
            for part, value in (("weight", x.T @ grad), ("bias", grad.sum(axis=0))):
                if self.trainable[key := f"{name}.{part}"]:
                    known = self.gradients[key]
                    self.gradients[key] = value if known is None else known + value
            grad = grad @ self.parameters[f"{name}.weight"].T

    def _trains(self, layer: str) -> bool:
        return self.trainable[f"{layer}.weight"] or self.trainable[f"{layer}.bias"]


@dataclass(slots=True)
class Momentum:
    """Gradient descent with momentum and weight decay; skips parameters without a gradient.

    Args:
        net: whose parameters are updated.
        lr: learning rate, > 0.
        momentum: share of the last update carried over, in [0, 1).
        weight_decay: pull to zero per update, >= 0.

    Attributes:
        scale: factor on the learning rate by layer name.
        velocity: optimizer state by parameter name.
    """

    net: NumpyNet
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.01
    scale: dict[str, float] = field(init=False, default_factory=dict)
    velocity: dict[str, Array] = field(init=False, default_factory=dict)

    def step(self) -> None:
        """One update; gradients are cleared."""
        for name, gradient in self.net.gradients.items():
            if gradient is None:
                continue
            value = self.net.parameters[name]
            pull = gradient + self.weight_decay * value
            self.velocity[name] = self.momentum * self.velocity.get(name, 0.0) + pull
            value -= self.lr * self.scale.get(name.partition(".")[0], 1.0) * self.velocity[name]
            self.net.gradients[name] = None


@dataclass(slots=True)
class NumpyBackend:
    """The backend contract over `NumpyNet`; see `frostline.backend.Backend`.

    Example:
        >>> net = NumpyNet((4, 8, 2))
        >>> backend = NumpyBackend(net, Momentum(net))
        >>> backend.apply(FreezePlan(frozen=frozenset({"layer0"})))
        >>> net.trainable["layer0.weight"], net.trainable["head.weight"]
        (False, True)
    """

    net: NumpyNet
    optimizer: Momentum
    groups: LayerGroups = field(init=False)
    _plan: FreezePlan = field(init=False, default_factory=FreezePlan)
    _wide: bool = field(init=False, default=False)
    _batch: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.groups = LayerGroups(
            tuple(self._group(name, depth) for depth, name in enumerate(self.net.layers))
        )

    def apply(self, plan: FreezePlan) -> None:
        """Make the network equal to the plan."""
        plan.check(self.groups)
        self._plan, self._wide = plan, False
        self._enforce()
        self.optimizer.scale = dict(plan.lr_scale)
        for group in plan.released:
            for name in self.groups[group].parameter_names & self.frozen:
                self.optimizer.velocity.pop(name, None)

    def hold(self) -> tuple[str, ...]:
        """Set again what outsiders changed."""
        self.narrow()
        return self._enforce()

    def written(self) -> tuple[str, ...]:
        """Every held tensor: this backend cannot tell, so the digests decide."""
        return tuple(sorted(self._plan.held_tensors(self.groups)))

    def fingerprint(self, names: Iterable[str]) -> Mapping[str, str]:
        """SHA-256 of the bytes of parameters and buffers."""
        tensors = self.net.parameters | self.net.buffers
        return {name: hashlib.sha256(tensors[name].tobytes()).hexdigest() for name in names}

    def probe(self, loss: float | None = None) -> _Probe:
        """A view for signals."""
        return _Probe(self, loss)

    def widen(self) -> None:
        """Gradients of frozen parameters, too, in the next backward pass."""
        self._wide = True
        self.net.trainable = dict.fromkeys(self.net.parameters, True)

    def narrow(self) -> None:
        """Drop the gradients of frozen parameters."""
        if self._wide:
            self._wide = False
            self._enforce()

    def keep_batch(self) -> None:
        """Keep the inputs of the next forward pass in training."""
        if self._batch is None:
            self.net.on_training = self._keep

    def kept(self) -> Array | None:
        """The probe batch."""
        return None if self._batch is None else self._batch.copy()

    def restore_kept(self, kept: Array) -> None:
        """Take it back."""
        self._keep(kept)

    def weights(self) -> Mapping[str, Array]:
        """Copies of parameters and buffers."""
        return {n: a.copy() for n, a in (self.net.parameters | self.net.buffers).items()}

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Write them back in place and forget all velocity."""
        for name, array in (self.net.parameters | self.net.buffers).items():
            array[...] = weights[name]
        self.optimizer.velocity.clear()

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen parameters."""
        return self._plan.frozen_parameters(self.groups)

    def activations(self, layer: str, *, int8: bool = False) -> Array:
        """What a layer puts out for the probe batch, in evaluation mode."""
        if self._batch is None:
            raise BackendError("read activations", found="no probe batch", fix="keep_batch() first")
        twin = copy.copy(self.net)  # shares arrays; has its own tape
        if int8:
            twin.parameters = {n: _rounded(a) for n, a in self.net.parameters.items()}
        twin.forward(self._batch, training=False)
        return twin.outputs()[layer]

    def _keep(self, x: Array) -> None:
        self._batch, self.net.on_training = x.copy(), None

    def _enforce(self) -> tuple[str, ...]:
        plan, net, moved = self._plan, self.net, []
        frozen = plan.frozen_parameters(self.groups)
        for name in net.parameters:
            if net.trainable[name] == (name in frozen):
                net.trainable[name] = name not in frozen
                moved.append(name)
            if name in frozen:
                net.gradients[name] = None
        for switch, live in (
            (net.norm_live, plan.live_norm),
            (net.dropout_live, plan.live_dropout),
        ):
            for layer in switch:
                wanted = layer not in plan.frozen or layer in live
                if switch[layer] != wanted:
                    switch[layer] = wanted
                    moved.append(layer)
        return tuple(moved)

    def _group(self, layer: str, depth: int) -> LayerGroup:
        net = self.net

        def info(name: str, array: Array, kind: str) -> TensorInfo:
            return TensorInfo(name, array.shape, "float64", 8, kind)

        return LayerGroup(
            name=layer,
            depth=depth,
            parameters=tuple(
                info(n, a, n.rpartition(".")[2])
                for n, a in net.parameters.items()
                if n.startswith(f"{layer}.")
            ),
            buffers=tuple(
                info(n, a, "norm") for n, a in net.buffers.items() if n.startswith(f"{layer}.")
            ),
            modules=(ModuleInfo(layer, "Layer"),),
            cost=_cost(net.parameters[f"{layer}.weight"].size),
        )


def _cost(weights: int) -> GroupCost:
    """Counted, not measured: a product takes a nanosecond per weight, an update a tenth of it."""
    return GroupCost(weights * 1e-9, weights * 1e-9, weights * 1e-9, weights * 1e-10)


@dataclass(frozen=True, slots=True)
class _Probe:
    """The probe of this backend; see `frostline.signals.Probe`."""

    backend: NumpyBackend
    given_loss: float | None

    def trains(self, unit: LayerGroup) -> bool:
        frozen = self.backend.frozen
        return any(p.name not in frozen for p in unit.parameters)

    def gradients(self, unit: LayerGroup) -> list[Array | None]:
        return [self.backend.net.gradients[p.name] for p in unit.parameters]

    def weights(self, unit: LayerGroup) -> list[Array]:
        return [self.backend.net.parameters[p.name] for p in unit.parameters]

    def norm(self, arrays: Sequence[Array | None], order: Literal[1, 2]) -> float:
        powers = (float((np.abs(a) ** order).sum()) for a in arrays if a is not None)
        return sum(powers) ** (1 / order)

    def dot(self, first: Sequence[Array | None], second: Sequence[Array | None]) -> float:
        pairs = zip(first, second, strict=True)
        return sum(float((a * b).sum()) for a, b in pairs if a is not None and b is not None)

    def matrices(self, unit: LayerGroup) -> list[Matrix]:
        flat = [w.reshape(w.shape[0], -1) for w in self.weights(unit) if w.ndim > 1]
        return [Matrix(*w.shape, np.linalg.svd(w, compute_uv=False).tolist()) for w in flat]

    def learning_rate(self, unit: LayerGroup) -> float:
        del unit  # one rate for all
        return self.backend.optimizer.lr

    def loss(self) -> float:
        if self.given_loss is None:
            raise PolicyError(
                "read the training loss",
                found="a step that was sampled without it",
                fix="driver.sample(loss=...)",
            )
        return self.given_loss

    def activations(self, unit: LayerGroup, *, int8: bool = False) -> Array:
        return self.backend.activations(unit.name, int8=int8)

    def update(self, unit: LayerGroup) -> list[Array | None]:
        optimizer, found = self.backend.optimizer, list[Array | None]()
        for p, g, w in zip(unit.parameters, self.gradients(unit), self.weights(unit), strict=True):
            if g is None:
                found.append(None)
                continue
            pull = g + optimizer.weight_decay * w
            velocity = optimizer.momentum * optimizer.velocity.get(p.name, 0.0) + pull
            found.append(-optimizer.lr * velocity)
        return found


def _rounded(array: Array) -> Array:
    """8-bit weights, one step size per output; biases stay."""
    if array.ndim < 2:
        return array
    step = np.abs(array).max(axis=0) / 127
    return np.round(array / np.where(step == 0, 1, step)) * step
