"""The reference backend as a case for the contract suite."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from frostline.backends.numpy import Momentum, NumpyBackend, NumpyNet


class NumpyCase:
    """A four-layer network on seeded data."""

    def __init__(self, backend_class: type[NumpyBackend] = NumpyBackend) -> None:
        self.net = NumpyNet((4, 8, 8, 8, 2), seed=3, dropout=0.25)
        self.optimizer = Momentum(self.net, lr=0.05)
        self.backend = backend_class(self.net, self.optimizer)
        self.step = 0

    def backward(self) -> None:
        source = np.random.default_rng(self.step)
        self.step += 1
        self.net.loss(source.normal(size=(16, 4)), source.normal(size=(16, 2)))

    def update(self) -> None:
        self.optimizer.step()

    def has_gradient(self, parameter: str) -> bool:
        return self.net.gradients[parameter] is not None

    def evidence(self) -> Mapping[str, str]:
        arrays = {
            **{f"p:{n}": a for n, a in self.net.parameters.items()},
            **{f"b:{n}": a for n, a in self.net.buffers.items()},
            **{f"g:{n}": a for n, a in self.net.gradients.items() if a is not None},
            **{f"v:{n}": a for n, a in self.optimizer.velocity.items()},
        }
        digests = {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in arrays.items()}
        return digests | {"random": str(self.net.random.bit_generator.state)}

    def tamper(self, tensor: str) -> None:
        found = (self.net.parameters | self.net.buffers)[tensor]
        found[(0,) * found.ndim] += 1e-6


def copy_into(target: NumpyCase, source: NumpyCase) -> None:
    """What a checkpoint would carry: values, optimizer state, randomness, position; no plan."""
    for mine, theirs in (
        (target.net.parameters, source.net.parameters),
        (target.net.buffers, source.net.buffers),
    ):
        for name, array in theirs.items():
            mine[name][...] = array
    target.optimizer.velocity = {n: v.copy() for n, v in source.optimizer.velocity.items()}
    target.net.random.bit_generator.state = source.net.random.bit_generator.state
    target.step = source.step
