"""What is stored for a model's frozen region, and what the model runs on meanwhile.

Samples given as arrays have numbers, and a `Shelf` of stores. Samples that arrive in batches are
known by their content. Later runs find both again.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.errors import FrontierError
from frostline.frontier.encodings import Column, Encoding
from frostline.frontier.keras.arrivals import Arrivals
from frostline.frontier.keras.contents import Contents
from frostline.frontier.keras.features import Compute, Features, Samples, Shelf, drawn
from frostline.frontier.keras.forward import Forward
from frostline.frontier.keras.graph import build
from frostline.frontier.keras.parts import region_key, weight_parts
from frostline.frontier.keras.region import KerasRegion, frozen_model, rest_model
from frostline.frontier.key import CacheKey
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.frontier.views import Views

__all__ = ["Stores", "Use"]

#: Tells frontiers apart for as long as the process lives: compiled functions know them by it.
_numbers = itertools.count()


@dataclass(eq=False)
class Use:
    """What the model runs on while its flags are as they are.

    Attributes:
        region: None where the model runs on the samples themselves; all below is empty then.
        rest: the model from the frontier on.
        forward: the model up to the frontier.
        flags: the state of the model that the region was found in.
        weights: digests of what the region read then.
        shelves: what is stored of samples with numbers, source by source.
        arrivals: what is stored of samples without.
        number: tells the frontiers of one process apart.
    """

    region: KerasRegion | None = None
    rest: Any = None
    forward: Forward | None = None
    flags: tuple[Any, ...] = ()
    weights: Mapping[str, Any] = field(default_factory=dict)
    shelves: list[Shelf] = field(default_factory=list)
    arrivals: Arrivals | None = None
    number: int = field(default_factory=_numbers.__next__)

    @property
    def is_fresh(self) -> bool:
        """Whether the frozen weights are what they were."""
        return self.region is None or weight_parts(self.region) == self.weights

    def passed(
        self, arrays: Sequence[NDArray[Any]], rows: NDArray[np.int64] | None = None
    ) -> list[NDArray[Any]]:
        """Of the arrays of some samples, one per input, those that the rest reads itself.

        Args:
            arrays: `(N, ...)` each.
            rows: which samples; None: all.
        """
        if self.region is None:
            return []
        order = {id(value): i for i, value in enumerate(self.region.graph.inputs)}
        read = [arrays[order[id(value)]] for value in self.region.passed]
        return read if rows is None else [np.asarray(array[rows]) for array in read]

    def forward_and_passed(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """All that the rest reads of some samples."""
        return [*(self.forward(arrays) if self.forward else []), *self.passed(arrays)]

    def close(self) -> None:
        """Close its stores."""
        for shelf in self.shelves:
            shelf.close()
        if self.arrivals is not None:
            self.arrivals.close()


class Stores:
    """Opens and fills the stores of one training run; a context manager.

    Args:
        model: compiled.
        sources: samples with numbers.
        library: where their stores are; None: in a folder that goes with the run.
        encoding: how floating values are kept.
        most_bytes: the most that the values of one set of samples may take.
        views: stored versions of each training sample, where random layers are let in.
        report: what happened is counted there.
    """

    def __init__(
        self,
        model: keras.Model,
        sources: Sequence[Samples],
        *,
        library: Library | None,
        encoding: Encoding,
        most_bytes: int | None = None,
        views: Views | None = None,
        report: CacheReport,
    ) -> None:
        self.encoding: Encoding = encoding
        self.report = report
        self._model, self._sources, self._library = model, sources, library
        self._most_bytes, self._views = most_bytes, views
        self._private: Library | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def use(self, region: KerasRegion, flags: tuple[Any, ...]) -> Use:
        """What the model is to run on under a region, nothing stored so far."""
        forward = Forward(frozen_model(region), self._model, region.seeds)
        return Use(region, rest_model(region), forward, flags, weight_parts(region))

    def fill(self, use: Use, old: Use) -> None:
        """Open the stores of samples with numbers; fill them, unless views come epoch by epoch.

        Args:
            use: what they are for.
            old: what the model ran on before: its values may be all that the new ones need.

        Raises:
            FrontierError: no room, or values that cannot be kept.
            StorageError: the disk refuses.
        """
        assert use.region is not None and use.forward is not None  # noqa: S101, PT018
        shortcut = self._shortcut(old, use.region) if self._sources else None
        for number, samples in enumerate(self._sources):
            source = old.shelves[number].features(None) if shortcut else None
            shelf = self._shelf(use, samples, shortcut, source)
            use.shelves.append(shelf)
            if not use.region.draws:
                features = shelf.features(None)
                features.fill(self.report)
                features.compute_from_samples(use.forward)

    def arrivals(self, use: Use, *, passed: bool = False) -> Arrivals:
        """The store of samples without numbers; made when it is first asked for.

        Args:
            use: what it is for.
            passed: keep the inputs, too, that the rest reads itself.
        """
        if use.arrivals is None:
            assert use.region is not None and use.forward is not None  # noqa: S101, PT018
            region, compute = use.region, use.forward
            columns = [Column(v.name, v.dtype, self.encoding) for v in region.frontier]
            if passed and region.passed:
                columns += [Column(v.name, v.dtype) for v in region.passed]
                compute = use.forward_and_passed
            use.arrivals = Arrivals(columns, compute, self._contents(use, columns))
            self.report.note("samples without numbers are known by content")
        return use.arrivals

    def _contents(
        self, use: Use, columns: Sequence[Column]
    ) -> Callable[[list[Any], list[Any]], Contents]:
        """Where the values of samples are kept whose shapes are not known yet."""

        def make(shapes: list[Any], of_columns: list[Any]) -> Contents:
            key = self._key(use, {"by content": [list(shape) for shape in shapes]}, columns)
            return Contents(
                self._place(known=not key.unknown), key, columns, of_columns,
                most_bytes=self._most_bytes,
                about={"model": self._model.name, "data": "by content", "of": "keras"},
            )  # fmt: skip

        return make

    def _key(
        self, use: Use, data: Any, columns: Sequence[Column] = (), views: Any = None
    ) -> CacheKey:
        """What the values of some samples depend on."""
        assert use.region is not None  # noqa: S101  for the type checker
        key = region_key(
            use.region, data=data, encoding=self.encoding, views=views, weights=use.weights,
            compiled=[bool(self._model.jit_compile), bool(self._model.run_eagerly)],
        )  # fmt: skip
        if columns:
            key = CacheKey({**key.parts, "slots": {c.name: [c.dtype, c.kept] for c in columns}})
        if key.unknown:
            self.report.note(f"for this run only: {key.unknown[0]}")
        return key

    def _shelf(
        self,
        use: Use,
        samples: Samples,
        shortcut: Compute | None,
        source: Features | None,
    ) -> Shelf:
        region, forward = use.region, use.forward
        assert region is not None and forward is not None  # noqa: S101, PT018
        views = self._views if region.draws and samples.name == "train" else None

        def make(view: int | None) -> Features:
            compute: Compute = forward
            preparation = None
            if view is not None and views is not None:
                compute = drawn(forward, views, view)
                preparation = {**views.identity, "view": view}
            key = self._key(use, samples.data, views=preparation)
            return Features(
                samples, region.frontier, key, self._place(known=not key.unknown),
                encoding=self.encoding, most_bytes=self._share(views),
                about={"model": self._model.name, "data": samples.name, "of": "keras"},
                compute=shortcut or compute, source=source,
            )  # fmt: skip

        return Shelf(samples, views, make)

    def _share(self, views: Views | None) -> int | None:
        """The most that one store may take: views share what there is."""
        if self._most_bytes is None or views is None:
            return self._most_bytes
        return self._most_bytes // views.count

    def _place(self, *, known: bool) -> Library:
        """The library; for what no later run can recognise, one that goes with this run."""
        if known and self._library is not None:
            return self._library
        if self._private is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="frostline-"))
            self._private = Library(folder)
        return self._private

    def _shortcut(self, old: Use, region: KerasRegion) -> Compute | None:
        """How to compute a deeper frontier from the one before, where that has all it needs."""
        if old.region is None or self.encoding != "exact" or not old.is_fresh:
            return None
        if old.region.draws or region.draws or not set(old.region.frozen) <= set(region.frozen):
            return None
        names = {v.name: v for call in region.graph.calls for v in call.outputs}
        sources = [names[v.name] for v in old.region.frontier]
        shared = {names[v.name]: a for v, a in old.region.shared.items()}
        try:
            model = build(region.graph, sources, list(region.frontier), shared=shared)
        except FrontierError:
            return None  # it needs the samples as well
        self.report.note("filled from the frontier before it")
        return Forward(model, self._model)
