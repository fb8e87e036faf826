"""The runs of `keras_switch.py`, in the Keras backend of their process.

The same schedule, blocks of a network unfrozen one after the other from the head, in three ways:

- callback: one `fit` with `FreezeCallback`;
- phases: a `fit` per phase (`initial_epoch=`), flags set between them, compiled again, and the
  optimizer's variables carried over by hand;
- mask: everything trainable throughout, gradients of what should be frozen multiplied by zero.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.names import tensors
from frostline.groups import LayerGroups
from frostline.integrations.keras import FreezeCallback
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State

BATCH = 16
RATE = 0.01


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        pixels: of the pictures, square.
        filters: of the first block; doubled by each that follows.
        blocks: convolutional blocks before the head.
        steps: updates per phase; there is one phase more than there are blocks.
    """

    pixels: int = 64
    filters: int = 16
    blocks: int = 3
    steps: int = 30


QUICK = Size(16, 4, 2, 6)


@dataclass
class Seen(keras.callbacks.Callback):
    """Seconds of every step, and how often the network was traced (or run, where it is eager)."""

    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._since = 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Start the clock: what other callbacks do before the step is in it if they come later."""
        del batch, logs
        self._since = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop it; reading the loss waits for the step."""
        del batch
        float((logs or {}).get("loss", 0.0))
        self.seconds.append(time.perf_counter() - self._since)


def network(size: Size) -> keras.Model:
    """Blocks "block0", ... of convolution, norm and pooling, and a head."""
    keras.utils.set_random_seed(0)
    layers: list[Any] = [keras.Input((size.pixels, size.pixels, 3))]
    for number in range(size.blocks):
        wide = size.filters << number
        block = [
            keras.layers.Conv2D(wide, 3, padding="same", activation="relu", name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.MaxPooling2D(name="pool"),
        ]
        layers.append(keras.Sequential(block, name=f"block{number}"))
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5, name="head")]
    return keras.Sequential(layers)


def optimizer() -> keras.Optimizer:
    """With momentum and decay, so that what is only masked moves."""
    return keras.optimizers.SGD(RATE, momentum=0.9, weight_decay=0.01)


def compiled(model: keras.Model, chosen: keras.Optimizer) -> keras.Model:
    """For class numbers."""
    model.compile(chosen, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def data(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """One phase is one epoch."""
    source = np.random.default_rng(0)
    count = BATCH * size.steps
    x = source.normal(size=(count, size.pixels, size.pixels, 3)).astype("float32")
    return x, source.integers(0, 5, count).astype("int32")


def frozen_in(phase: int, size: Size) -> list[str]:
    """Names of the blocks frozen in a phase: all at first, one fewer in each that follows."""
    return [f"block{n}" for n in range(size.blocks - phase)]


@dataclass(frozen=True)
class Unfreezing(Policy):
    """One block more trains in each epoch."""

    size: Size

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """By the clock alone."""
        blocks = frozen_in(event.progress.step // self.size.steps, self.size)
        names = frozenset(g.name for g in groups if g.name.partition("/")[0] in blocks)
        return FreezePlan(frozen=names), state


class Masked(keras.optimizers.SGD):
    """Multiplies the gradients of some layers by zero."""

    masked: Sequence[str] = ()

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """With zeros for what is masked."""
        variables = self._trainable_variables if trainable_variables is None else list(
            trainable_variables
        )  # fmt: skip
        kept = [
            keras.ops.zeros_like(g) if any(f"/{n}/" in f"/{v.path}/" for n in self.masked) else g
            for g, v in zip(grads, variables, strict=True)
        ]
        return super().apply(kept, variables if trainable_variables is not None else None)


@dataclass
class Run:
    """One run: seconds by phase, and what became of what should be frozen."""

    size: Size
    seconds: list[list[float]] = field(default_factory=list)
    traces: int = 0
    moved: int = 0
    total_s: float = 0.0
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def fit(self, model: keras.Model, first: int, last: int, *callbacks: Any) -> None:
        """Train phases `first` to `last`, without the end."""
        seen = Seen()
        x, y = data(self.size)
        model.fit(
            x, y, batch_size=BATCH, shuffle=False, verbose=0, initial_epoch=first, epochs=last,
            callbacks=[seen, *callbacks],
        )  # fmt: skip
        steps = self.size.steps
        self.seconds += [seen.seconds[i : i + steps] for i in range(0, len(seen.seconds), steps)]

    def end(self, model: keras.Model) -> None:
        """Keep the weights."""
        self.weights = {n: np.array(array_of(v)) for n, v in tensors(model).items()}


def counting(model: keras.Model, run: Run) -> None:
    """Count how often the network is traced for training."""
    layer = model.get_layer("head")
    call = layer.call

    def counted(*args: Any, **kwargs: Any) -> Any:
        run.traces += 1
        return call(*args, **kwargs)

    vars(layer)["call"] = counted


def bits_of(model: keras.Model, blocks: Sequence[str]) -> dict[str, bytes]:
    """Bytes of what is in these blocks."""
    return {
        n: array_of(v).tobytes() for n, v in tensors(model).items() if n.partition("/")[0] in blocks
    }


def watching(run: Run) -> keras.callbacks.Callback:
    """Counts tensors that should be frozen in an epoch and moved."""

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            del logs
            self.before = bits_of(self.model, frozen_in(epoch, run.size))

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            del logs
            after = bits_of(self.model, frozen_in(epoch, run.size))
            run.moved += sum(self.before[n] != after[n] for n in after)

    return Watch()


def callback(size: Size) -> Run:
    """One `fit` with `FreezeCallback`."""
    run, model = Run(size), compiled(network(size), optimizer())
    counting(model, run)
    run.fit(model, 0, size.blocks + 1, FreezeCallback(Unfreezing(size)), watching(run))
    run.end(model)
    return run


def phases(size: Size) -> Run:
    """A `fit` per phase; the optimizer's variables are carried over by the path of their weight."""
    run, model = Run(size), network(size)
    counting(model, run)
    kept: dict[str, np.ndarray] = {}
    for phase in range(size.blocks + 1):
        frozen = frozen_in(phase, size)
        for number in range(size.blocks):
            name = f"block{number}"
            model.get_layer(name).trainable = name not in frozen
        chosen = optimizer()
        compiled(model, chosen)
        chosen.build(model.trainable_variables)
        for variable in chosen.variables:
            if variable.name in kept:
                variable.assign(kept[variable.name])
        run.fit(model, phase, phase + 1, watching(run))
        kept |= {v.name: np.array(array_of(v)) for v in chosen.variables}
    run.end(model)
    return run


def mask(size: Size) -> Run:
    """Everything trainable; gradients become zeros. The function is traced anew in each phase."""
    run, model = Run(size), network(size)
    counting(model, run)
    chosen = Masked(RATE, momentum=0.9, weight_decay=0.01)
    compiled(model, chosen)
    for phase in range(size.blocks + 1):
        chosen.masked = frozen_in(phase, size)
        model.train_function = None
        if keras.backend.backend() == "jax":  # bound methods are equal, and so is their program
            compiled(model, chosen)
        run.fit(model, phase, phase + 1, watching(run))
    run.end(model)
    return run


def full(size: Size) -> Run:
    """Nothing frozen: what the others are compared with."""
    run, model = Run(size), compiled(network(size), optimizer())
    counting(model, run)
    run.fit(model, 0, size.blocks + 1)
    run.end(model)
    return run


WAYS: dict[str, Callable[[Size], Run]] = {
    "callback": callback, "phases": phases, "mask": mask, "full": full,
}  # fmt: skip


def summary(run: Run, exact: Run) -> dict[str, Any]:
    """Figures of one run."""
    usual = [statistics.median(phase[2:]) for phase in run.seconds]
    first = [phase[0] - middle for phase, middle in zip(run.seconds, usual, strict=True)]
    largest = max(
        float(np.abs(run.weights[n].astype("float64") - exact.weights[n]).max())
        for n in exact.weights
    )
    return {
        "step_s": usual,
        "switch_s": first[1:],
        "total_s": run.total_s,
        "traces": run.traces,
        "moved": run.moved,
        "largest_difference": largest,
    }


def measure(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """All ways in every round, in random order."""
    size, order, found = QUICK if quick else Size(), random.Random(0), []  # noqa: S311
    for _ in range(rounds):
        runs: dict[str, Run] = {}
        for name in order.sample(sorted(WAYS), len(WAYS)):
            keras.backend.clear_session()
            start = time.perf_counter()
            runs[name] = WAYS[name](size)
            runs[name].total_s = time.perf_counter() - start
        found.append({n: summary(run, runs["phases"]) for n, run in runs.items()})
    return found
