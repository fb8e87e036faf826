"""Frontier values as a data set of their own, for loops that are not `model.fit` on the model."""

from __future__ import annotations

import contextlib
import math
import tempfile
from types import TracebackType
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.features import Features, Samples, runner
from frostline.frontier.keras.parts import region_key
from frostline.frontier.keras.region import KerasRegion, find_region, frozen_model, rest_model
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport

__all__ = ["CachedData", "FrontierBatches"]


class FrontierBatches(keras.utils.PyDataset):
    """Batches of `(frontier values, y)`, in an order that is a function of seed and epoch.

    Args:
        data: what is read.
        y: targets, one row per sample; None: none.
        batch_size: samples of a batch; the last one may be shorter.
        shuffle: whether each epoch has an order of its own.
        seed: of these orders.
    """

    def __init__(
        self, data: CachedData, y: Any, *, batch_size: int, shuffle: bool, seed: int
    ) -> None:
        super().__init__()
        self._data, self._y, self._batch_size = data, y, batch_size
        self._shuffle, self._seed, self.epoch = shuffle, seed, 0

    def __len__(self) -> int:
        return math.ceil(len(self._data.samples) / self._batch_size)

    def rows(self, index: int) -> NDArray[np.int64]:
        """Numbers of the samples of one batch of the present epoch."""
        order = np.arange(len(self._data.samples))
        if self._shuffle:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(order)
        return order[index * self._batch_size : (index + 1) * self._batch_size]

    def __getitem__(self, index: int) -> Any:
        rows = self.rows(index)
        values = self._data.values(rows)
        x = values if len(values) > 1 else values[0]
        if self._y is None:
            return (x,)
        return x, keras.tree.map_structure(lambda array: np.asarray(array)[rows], self._y)

    def on_epoch_end(self) -> None:
        """The next epoch has the next order."""
        self.epoch += 1


class CachedData:
    """The stored outflow of a model's frozen region on some samples; a context manager.

    Args:
        model, samples, region: what was run on what.
        library: where the values are; None: in a folder that goes with this object.
        encoding: how floating values are kept.
        report: what filling took.

    Attributes:
        rest: the model that trains, from `values` to the model's outputs; its layers are the
            model's own. Compile it, and train it on `batches`.
    """

    def __init__(
        self,
        model: keras.Model,
        samples: Samples,
        region: KerasRegion,
        *,
        library: Library | None,
        encoding: Encoding,
        report: CacheReport,
    ) -> None:
        if why := region.why_not:
            raise FrontierError(
                "store what the frozen layers give", found=why, fix="freeze layers first"
            )
        self.samples, self.region, self.report = samples, region, report
        self.rest = _fed_plainly(rest_model(region))
        self._stack = contextlib.ExitStack()
        key = region_key(
            region, data=samples.data, encoding=encoding,
            compiled=[bool(model.jit_compile), bool(model.run_eagerly)],
        )  # fmt: skip
        if library is None or key.unknown:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="frostline-"))
            library = Library(folder)
        self._features = Features(
            samples, region.frontier, key, library, encoding=encoding,
            compute=runner(frozen_model(region), model),
            about={"model": model.name, "data": samples.name, "of": "keras"},
        )  # fmt: skip
        self._stack.callback(self._features.close)
        try:
            self._features.fill(report)
        except BaseException:
            self.close()
            raise

    def values(self, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """What `rest` takes for these samples: `(len(rows), ...)` each, private copies."""
        order = {id(v): i for i, v in enumerate(self.region.graph.inputs)}
        passed = [self.samples.arrays[order[id(v)]][rows] for v in self.region.passed]
        return [*self._features.read(rows, self.report), *passed]

    def batches(
        self, y: Any = None, *, batch_size: int = 32, shuffle: bool = True, seed: int = 0
    ) -> FrontierBatches:
        """A data set for `rest.fit(..., shuffle=False)`; it shuffles by itself, by its seed."""
        return FrontierBatches(self, y, batch_size=batch_size, shuffle=shuffle, seed=seed)

    def close(self) -> None:
        """Close the store."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _fed_plainly(rest: keras.Model) -> keras.Model:
    """The same layers; one tensor is fed as such, not as a list of one: Keras warns of that."""
    if len(rest.inputs) > 1:
        return rest
    return keras.Model(rest.inputs[0], rest.output, name=rest.name)


def stored(
    model: keras.Model,
    samples: Samples,
    x: Any,
    *,
    library: Library | None,
    encoding: Encoding,
) -> CachedData:
    """Find the region on the first samples, fill, and hand out."""
    first = keras.tree.map_structure(lambda array: np.asarray(array[:3]), x)
    region = find_region(model, first)
    return CachedData(
        model, samples, region, library=library, encoding=encoding, report=CacheReport()
    )
