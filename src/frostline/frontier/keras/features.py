"""Frontier values of some samples: computed once, block by block, kept on disk, read in any order.

Rows are computed in whole blocks of `BLOCK_ROWS` consecutive samples, the last one filled up with
its last sample: a row's bits depend on the batch around it, and this way a store is a function of
its key, whoever fills it and in whatever order training asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.graph import Value
from frostline.frontier.keras.parts import data_parts
from frostline.frontier.keras.region import as_numpy, close
from frostline.frontier.key import CacheKey
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.frontier.segments import BLOCK_ROWS
from frostline.frontier.store import Column, Store

__all__ = ["Features", "Runner", "Samples", "runner"]

#: Arrays of one batch, in a fixed order, to arrays of the results.
Runner = Callable[[Sequence[NDArray[Any]]], list[NDArray[Any]]]
#: Most that rounding may take from a stored value, against what exact values may differ.
_ROUNDING = {"exact": 1.0, "bfloat16": 100.0, "float16": 20.0, "int8": 200.0}


@dataclass(slots=True)
class Samples:
    """Samples that a model is trained or evaluated on.

    Attributes:
        name: "train" or "validation"; for messages.
        arrays: one for each input of the model, samples first.
        data_name: what the user calls them, in place of a digest of their bytes.
    """

    name: str
    arrays: list[NDArray[Any]]
    data_name: str | None = None
    _data: dict[str, Any] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def data(self) -> dict[str, Any]:
        """Plain JSON that tells which samples these are; read once."""
        if self._data is None:
            self._data = data_parts(self.arrays, self.data_name)
        return self._data

    def rows(self, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """These samples, `(len(rows), ...)` of each input."""
        return [np.asarray(array[rows]) for array in self.arrays]

    def block(self, first: int) -> NDArray[np.int64]:
        """Numbers of the samples that are computed with sample `first`; the last one repeats."""
        return np.minimum(np.arange(first, first + BLOCK_ROWS), len(self) - 1)


class Features:
    """Stored frontier values of some samples.

    Args:
        samples: whose values these are.
        frontier: the columns.
        key: what the values depend on.
        library: where the store is.
        encoding: how floating values are kept.
        compute: from the samples' arrays, or `source`'s values, of one block to the frontier.
        source: features of a shallower frontier to compute from; None: the samples themselves.
        about: in words, for `frostline cache list`.
        most_bytes: the most that the store may take; None: no bound.

    Raises:
        FrontierError: the budget has no room for all rows.
        StorageError: the disk refuses.
    """

    def __init__(
        self,
        samples: Samples,
        frontier: Sequence[Value],
        key: CacheKey,
        library: Library,
        *,
        encoding: Encoding,
        compute: Runner,
        about: Mapping[str, Any],
        source: Features | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self.samples, self.frontier, self.encoding = samples, tuple(frontier), encoding
        self._compute, self._source = compute, source
        columns = [Column(value.name, value.dtype, encoding) for value in self.frontier]
        self.store: Store = library.open(
            key, columns, len(samples), about=about, most_bytes=most_bytes
        )

    def fill(self, report: CacheReport) -> None:
        """Compute the rows that are not there, block by block.

        Raises:
            FrontierError: the budget has no room for them, or they cannot be encoded.
            StorageError: the disk refuses.
        """
        for first in range(0, len(self.samples), BLOCK_ROWS):
            rows = self._real(first)
            if self.store.present(rows).all():
                report.found_rows += len(rows)
                continue
            self._fill(first, report)
        report.stored_bytes += self.store.bytes_on_disk
        self._source = None  # not needed any more; its store may be closed

    def read(self, rows: NDArray[np.int64], report: CacheReport) -> list[NDArray[Any]]:
        """The frontier values of these samples, `(len(rows), ...)` each, in the frontier's order.

        A row that was damaged since it was written is computed again, with its block.

        Raises:
            FrontierError: a row that is damaged each time it is read.
        """
        began = time.perf_counter()
        values, good = self.store.read(rows)
        report.read_s += time.perf_counter() - began
        if not good.all():
            for first in sorted({int(row) // BLOCK_ROWS * BLOCK_ROWS for row in rows[~good]}):
                self._fill(first, report)
            values, good = self.store.read(rows)
        if not good.all():
            raise FrontierError(
                f"read stored values from {self.store.folder}",
                found=f"{int((~good).sum())} row(s) that read back damaged each time",
                fix="check the disk, or train uncached: cache=False",
            )
        report.read_rows += len(rows)
        return [values[value.name] for value in self.frontier]

    def doubt(self, first: int) -> str:
        """The name of a frontier value that computing one block again gives differently, or ""."""
        rows = self._real(first)
        stored, good = self.store.read(rows)
        again = self._compute(self.samples.rows(self.samples.block(first)))
        for value, fresh in zip(self.frontier, again, strict=True):
            kept = stored[value.name][good]
            if not close(kept, fresh[: len(rows)][good], times=_ROUNDING[self.encoding]):
                return value.name
        return ""

    def compute_from_samples(self, compute: Runner) -> None:
        """What computes blocks from now on: from the samples alone."""
        self._compute = compute

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _real(self, first: int) -> NDArray[np.int64]:
        return np.arange(first, min(first + BLOCK_ROWS, len(self.samples)))

    def _fill(self, first: int, report: CacheReport) -> None:
        began = time.perf_counter()
        block = self.samples.block(first)
        given = self._source.read(block, report) if self._source else self.samples.rows(block)
        computed = self._compute(given)
        report.compute_s += time.perf_counter() - began
        rows = self._real(first)
        values = {
            value.name: np.ascontiguousarray(array[: len(rows)])
            for value, array in zip(self.frontier, computed, strict=True)
        }
        if not self.store.write(first, values):
            raise FrontierError(
                f"keep the frontier of {len(self.samples):,} samples",
                found=f"a budget that is used up at row {first:,}",
                fix="allow more bytes, or store half as many: dtype='bfloat16'",
            )
        report.filled_rows += len(rows)
        report.computed_rows += len(rows)
        report.fill_s += time.perf_counter() - began


def runner(model: keras.Model, like: keras.Model) -> Runner:
    """Runs a functional model on whole blocks, compiled as the user's own model is.

    On JAX it keeps its own copies of the variables' values: those of the model are given away
    while `fit` runs.
    """
    if keras.backend.backend() == "jax":
        return _jax_runner(model, compiled=bool(like.jit_compile) and not like.run_eagerly)
    model.run_eagerly = bool(like.run_eagerly)
    model.jit_compile = bool(like.jit_compile)

    def run(batch: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        tensors = [keras.ops.convert_to_tensor(array) for array in batch]
        given = tensors if len(tensors) > 1 else tensors[0]
        return [as_numpy(array) for array in keras.tree.flatten(model.predict_on_batch(given))]

    return run


def _jax_runner(model: keras.Model, *, compiled: bool) -> Runner:
    import jax  # noqa: PLC0415  only where Keras runs on it

    def values(variables: Sequence[keras.Variable]) -> list[Any]:
        return [jax.numpy.array(variable.value, copy=True) for variable in variables]

    trainable, others = values(model.trainable_variables), values(model.non_trainable_variables)

    def forward(trainable: list[Any], others: list[Any], batch: list[Any]) -> Any:
        given = batch if len(batch) > 1 else batch[0]
        return model.stateless_call(trainable, others, given, training=False)[0]

    step = jax.jit(forward) if compiled else forward

    def run(batch: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        arrays = [jax.numpy.asarray(array) for array in batch]
        return [as_numpy(array) for array in keras.tree.flatten(step(trainable, others, arrays))]

    return run
