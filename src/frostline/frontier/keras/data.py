"""Frontier values as a data set of their own, for loops that are not `model.fit` on the model."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError, MissingExtra
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.features import Samples
from frostline.frontier.keras.region import KerasRegion, as_numpy, find_region, flat_inputs
from frostline.frontier.keras.stores import Stores, Use
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport

__all__ = ["CachedData", "FrontierBatches", "gathered", "stored"]

#: What `tf.data.Dataset.cardinality` says of data sets without an end.
_INFINITE = -1


class FrontierBatches(keras.utils.PyDataset):
    """Batches of `(frontier values, *targets)`, in an order that is a function of seed and epoch.

    Args:
        data: what is read.
        targets: none, y, or y and sample weights; one row per sample each.
        batch_size: samples of a batch; the last one may be shorter.
        shuffle: whether each epoch has an order of its own.
        seed: of these orders.
    """

    def __init__(
        self,
        data: CachedData,
        targets: Sequence[Any],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self._data, self._targets, self._batch_size = data, targets, batch_size
        self._shuffle, self._seed, self.epoch = shuffle, seed, 0
        self._newest: tuple[int, NDArray[np.int64]] | None = None  # epoch, and its order

    def __len__(self) -> int:
        return math.ceil(len(self._data) / self._batch_size)

    def rows(self, index: int, *, epoch: int | None = None) -> NDArray[np.int64]:
        """Numbers of the samples of one batch; of the present epoch, if none is given."""
        order = self._order(self.epoch if epoch is None else epoch)
        return order[index * self._batch_size : (index + 1) * self._batch_size]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Of all samples in an epoch; the newest one is kept for the batches to come."""
        newest = self._newest
        if newest is None or newest[0] != epoch:
            order = np.arange(len(self._data))
            if self._shuffle:
                order = np.random.default_rng([self._seed, epoch]).permutation(order)
            # Whole at once: other threads may read another epoch.
            newest = self._newest = epoch, order
        return newest[1]

    def read(self, rows: NDArray[np.int64]) -> tuple[Any, ...]:
        """Values and targets of these samples."""
        values = self._data.values(rows)
        x = tuple(values) if len(values) > 1 else values[0]

        def take(array: Any) -> Any:
            return np.asarray(array)[rows]

        return (x, *(keras.tree.map_structure(take, target) for target in self._targets))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.read(self.rows(index))

    def on_epoch_end(self) -> None:
        """The next epoch has the next order."""
        self.epoch += 1


class CachedData:
    """The stored outflow of a model's frozen region on some samples; a context manager.

    Args:
        rest: the model that trains, from `values` to the model's outputs.
        region: what was run.
        read: from numbers of samples to what `rest` takes for them.
        count: of samples.
        targets: what the samples brought with them: None, `(y,)` or `(y, sample_weight)`.
        report: what filling took.
        stack: what is closed with this object.

    Attributes:
        rest: its layers are the model's own. Compile it, and train it on `batches` or `dataset`.
        y: the targets that the samples brought; None: they brought none.
        sample_weight: likewise.
    """

    def __init__(
        self,
        rest: keras.Model,
        region: KerasRegion,
        read: Callable[[NDArray[np.int64]], list[NDArray[Any]]],
        count: int,
        *,
        targets: tuple[Any, ...] = (),
        report: CacheReport,
        stack: contextlib.ExitStack,
    ) -> None:
        self.rest, self.region, self.report = _fed_plainly(rest), region, report
        self.y, self.sample_weight = (*targets, None, None)[:2]
        self._read, self._count, self._stack = read, count, stack

    def __len__(self) -> int:
        """How many samples there are."""
        return self._count

    def values(self, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """What `rest` takes for these samples: `(len(rows), ...)` each, private copies."""
        return self._read(rows)

    def batches(
        self, y: Any = None, *, batch_size: int = 32, shuffle: bool = True, seed: int = 0
    ) -> FrontierBatches:
        """A data set for `rest.fit(..., shuffle=False)`; it shuffles by itself, by its seed.

        Args:
            y: targets, one row per sample; None: those that the samples brought, if any.
            batch_size: samples of a batch; the last one may be shorter.
            shuffle: whether each epoch has an order of its own.
            seed: of these orders.
        """
        targets = [self.y, self.sample_weight] if y is None else [y]
        return FrontierBatches(
            self, [t for t in targets if t is not None],
            batch_size=batch_size, shuffle=shuffle, seed=seed,
        )  # fmt: skip

    def dataset(
        self,
        y: Any = None,
        *,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int = 0,
        prefetch: int | None = None,
    ) -> Any:
        """The same as a `tf.data.Dataset`, for loops of TensorFlow; needs TensorFlow.

        Each time it is iterated is the next epoch, with the order that `batches` has in it.

        Args:
            y: as for `batches`.
            batch_size: as for `batches`.
            shuffle: as for `batches`.
            seed: as for `batches`.
            prefetch: batches that are read ahead; None: as many as TensorFlow sees fit.

        Returns:
            A data set of `(values,)`, `(values, y)` or `(values, y, sample_weight)`.

        Raises:
            MissingExtra: TensorFlow is not installed.
        """
        tf = _tensorflow()
        batches = self.batches(y, batch_size=batch_size, shuffle=shuffle, seed=seed)
        epochs = itertools.count()
        one = batches.read(np.zeros(1, np.int64))

        def epoch() -> Iterator[Any]:
            number = next(epochs)
            for index in range(len(batches)):
                yield batches.read(batches.rows(index, epoch=number))

        spec = keras.tree.map_structure(
            lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), one
        )
        dataset = tf.data.Dataset.from_generator(epoch, output_signature=spec)
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))
        return dataset.prefetch(tf.data.AUTOTUNE if prefetch is None else prefetch)

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


def stored(
    model: keras.Model,
    samples: Samples,
    x: Any,
    *,
    library: Library | None,
    encoding: Encoding,
    most_bytes: int | None = None,
) -> CachedData:
    """Find the region on the first samples, fill, and hand out.

    Raises:
        FrontierError: nothing is frozen from the inputs on; no room.
        StorageError: the disk refuses.
    """
    region = _found(model, keras.tree.map_structure(lambda array: np.asarray(array[:3]), x))
    report = CacheReport()
    with contextlib.ExitStack() as stack:
        stores, use = _opened(
            stack, model, [samples], region, library=library, encoding=encoding,
            most_bytes=most_bytes, report=report,
        )  # fmt: skip
        stores.fill(use, Use())
        report.stored_bytes = use.shelves[0].bytes_on_disk

        def read(rows: NDArray[np.int64]) -> list[NDArray[Any]]:
            values = use.shelves[0].read(rows, report, epoch=None)
            return [*values, *use.passed(samples.arrays, rows)]

        return CachedData(
            use.rest, region, read, len(samples), report=report, stack=stack.pop_all()
        )


def gathered(
    model: keras.Model,
    x: Any,
    *,
    library: Library | None,
    encoding: Encoding,
    most_bytes: int | None = None,
) -> CachedData:
    """Read a data set of batches once, store its frontier values, and hand out.

    Raises:
        FrontierError: no end, no batch; nothing is frozen from the inputs on; no room.
        StorageError: the disk refuses.
    """
    batches = _batches(x)
    first = next(batches, None)
    if first is None:
        raise FrontierError(
            "store what the frozen layers give", found="no batch", fix="give some samples"
        )
    region = _found(model, _parts(first)[0])
    report = CacheReport()
    with contextlib.ExitStack() as stack:
        stores, use = _opened(
            stack, model, [], region, library=library, encoding=encoding,
            most_bytes=most_bytes, report=report,
        )  # fmt: skip
        arrivals = stores.arrivals(use, passed=True)
        order: list[bytes] = []
        targets = []
        for batch in itertools.chain([first], batches):
            inputs, *brought = _parts(batch)
            order += arrivals.digests(flat_inputs(model, inputs), report)
            targets.append(
                [keras.tree.map_structure(as_numpy, t) for t in brought if t is not None]
            )
        report.stored_bytes = arrivals.bytes_on_disk

        def read(rows: NDArray[np.int64]) -> list[NDArray[Any]]:
            return arrivals.stored([order[row] for row in rows], report)

        return CachedData(
            use.rest, region, read, len(order),
            targets=_joined(targets), report=report, stack=stack.pop_all(),
        )  # fmt: skip


def _opened(
    stack: contextlib.ExitStack,
    model: keras.Model,
    sources: Sequence[Samples],
    region: KerasRegion,
    **kept: Any,
) -> tuple[Stores, Use]:
    """Stores for a region, and what runs on them; both are closed with the stack."""
    stores = stack.enter_context(Stores(model, sources, **kept))
    use = stores.use(region, ())
    stack.callback(use.close)
    return stores, use


def _found(model: keras.Model, x: Any) -> KerasRegion:
    region = find_region(model, x)
    if why := region.why_not:
        raise FrontierError(
            "store what the frozen layers give", found=why, fix="freeze layers first"
        )
    return region


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and weights of a batch, as arrays of any framework."""
    batch = tuple(batch) if isinstance(batch, list) else batch
    return keras.utils.unpack_x_y_sample_weight(batch)


def _joined(batches: list[list[Any]]) -> tuple[Any, ...]:
    """Targets of all batches, one after the other."""
    return tuple(
        keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *part)
        for part in zip(*batches, strict=True)
    )


def _batches(x: Any) -> Iterator[Any]:
    """The batches of one epoch."""
    if isinstance(x, keras.utils.PyDataset):
        endless = x.num_batches is None
    else:
        endless = hasattr(x, "cardinality") and int(x.cardinality()) == _INFINITE
    if endless:
        raise FrontierError(
            "read a data set once",
            found=f"a {type(x).__name__} without an end",
            fix="leave .repeat() out, or take as many batches as there are: .take(n)",
        )
    return iter(x)


def _fed_plainly(rest: keras.Model) -> keras.Model:
    """The same layers; one tensor is fed as such, not as a list of one: Keras warns of that."""
    if len(rest.inputs) > 1:
        return rest
    return keras.Model(rest.inputs[0], rest.output, name=rest.name)


def _tensorflow() -> Any:
    try:
        import tensorflow as tf  # noqa: PLC0415  only for those who ask for its data sets
    except ImportError as error:
        raise MissingExtra(
            "make a tf.data.Dataset",
            found="no TensorFlow",
            fix="pip install tensorflow, or use .batches(), which every Keras backend takes",
        ) from error
    return tf
