"""One `fit` whose steps run only what trains: the user's own model, optimizer and callbacks.

Keras is given the numbers of the samples in place of the samples, so that it shuffles, splits and
batches as ever. Between its iterator and the model's compiled step the numbers become frontier
values (or, where nothing can be cached, the samples themselves), and `model.call` runs the rest of
the graph on them. Whenever what trains has changed, the frozen region is looked for again: that is
how callbacks that freeze and unfreeze layers are followed.

The model's compiled functions are wrapped for the length of one step only: whoever else keeps or
replaces them finds what he left.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.backends.keras.names import layers as layers_of
from frostline.errors import FrontierError, StorageError
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.features import Features, Runner, Samples, runner
from frostline.frontier.keras.graph import Value, build
from frostline.frontier.keras.parts import region_key, weight_parts
from frostline.frontier.keras.region import (
    KerasRegion,
    as_numpy,
    close,
    find_region,
    frozen_model,
    put_back,
    rest_model,
)
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.frontier.segments import BLOCK_ROWS

__all__ = ["ROWS", "Before", "Behind", "Session"]

_log = logging.getLogger("frostline")

#: Name of the one input that Keras sees: numbers of samples.
ROWS = "frostline_rows"
_FRONTIER = "frostline_frontier"
#: Samples of a comparison of outputs; as many as were tried, so that little is compiled anew.
_CHECKED_SAMPLES = 3
#: One step in so many, at random, is followed by a comparison.
CHECKED_EVERY = 200
#: Tells frontiers apart for as long as the process lives: compiled functions know them by it.
_numbers = itertools.count()
#: Outputs may differ by this many times the rounding of one value.
_OUTPUT_TIMES = {"exact": 10.0, "bfloat16": 1000.0, "float16": 300.0, "int8": 2000.0}


@dataclass(eq=False)
class _Use:
    """What the model runs on at present.

    Attributes:
        number: tells the frontiers of one session apart.
        region, rest, features: None and empty where the model runs on the samples themselves.
        flags: the state of the model that the region was found in.
        weights: digests of what the region read then.
    """

    number: int
    region: KerasRegion | None = None
    rest: Any = None
    features: list[Features] = field(default_factory=list)
    flags: tuple[Any, ...] = ()
    weights: Mapping[str, Any] = field(default_factory=dict)
    run: Any = None


class Session:
    """Makes a model's `fit` run on stored frontiers while it is open.

    Args:
        model: functional or Sequential, compiled.
        sources: the samples, and `x` as the user gave it, in the model's own structure; rows are
            numbered through all of them.
        library: where stores are kept; None: nothing is cached.
        encoding: how floating values are kept.
        most_bytes: the most that one store may take.
        report: what happened is counted there.
        seed: of the choice of the rows that are compared.
    """

    def __init__(
        self,
        model: keras.Model,
        sources: Sequence[tuple[Samples, Any]],
        *,
        library: Library | None,
        encoding: Encoding = "exact",
        most_bytes: int | None = None,
        report: CacheReport,
        seed: int = 0,
    ) -> None:
        self.model, self.report = model, report
        self._sources, self._library = sources, library
        self._encoding: Encoding = encoding
        self._most_bytes = most_bytes
        self._random = np.random.default_rng(seed)
        self._uses: dict[int, _Use] = {}
        self._raw = _Use(next(_numbers))
        self._now = self._raw
        self._refused: dict[tuple[Any, ...], str] = {}
        self._seen: Any = None
        self._flags: tuple[Any, ...] = ()
        self._steps: dict[Any, tuple[Callable[[Any], Any], Any]] = {}
        self._pipelines: dict[Any, tuple[dict[str, Any], Any]] = {}
        self._layers = [layer for _, layer in layers_of(model) if layer is not model]
        self._building = True
        self._starts = np.cumsum([0, *(len(samples) for samples, _ in sources)])
        self._stack = contextlib.ExitStack()
        self._private: Library | None = None

    # -- opening and closing ---------------------------------------------------------------------

    def __enter__(self) -> Self:
        model = self.model
        self._plain_call = model.call
        self._spec = model.input_spec
        self._own_call = vars(model).get("call")
        model.call = self._call
        model.input_spec = None  # numbers and frontiers are no inputs of the model
        return self

    def __exit__(self, *_: object) -> None:
        self.unwrap()
        del self.model.call
        if self._own_call is not None:
            self.model.call = self._own_call
        self.model.input_spec = self._spec
        self._steps.clear()
        self._pipelines.clear()
        for use in self._uses.values():
            for features in use.features:
                features.close()
        self._stack.close()

    def rows(self, source: int) -> dict[str, NDArray[np.int64]]:
        """What Keras is given in place of the samples of a source."""
        start, end = self._starts[source], self._starts[source + 1]
        return {ROWS: np.arange(start, end, dtype=np.int64)}

    @property
    def region(self) -> KerasRegion | None:
        """The region in use; None where nothing is cached at present."""
        return self._now.region

    # -- what Keras calls ------------------------------------------------------------------------

    def _call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of `model.call`: frontiers run the rest, all else the whole."""
        number = _number(inputs)
        if _are_rows(inputs):
            inputs = self._made_up(inputs)
        if number is None:
            return self._plain_call(inputs, *args, **kwargs)
        use = self._uses[number]
        training = kwargs.get("training", args[0] if args else None)
        values = [inputs[name] for name in sorted(inputs)]
        return use.rest.call(values, training=training)

    def _made_up(self, inputs: Any) -> Any:
        """For the shapes of outputs: Keras builds losses and metrics before it trains."""
        if not self._building:
            raise FrontierError(
                "run the model on numbers of samples",
                found="a step that was compiled without their frontier",
                fix="let Keras make its train function: model.make_train_function(force=True)",
            )
        count = inputs[ROWS].shape[0] or 1
        return keras.tree.map_structure(
            lambda array: keras.ops.zeros((count, *array.shape[1:]), _dtype(array)),
            self._sources[0][1],
        )

    def wrap(self, name: str, *, count: bool) -> None:
        """For the coming step, let a compiled function of the model be handed frontiers."""
        function = getattr(self.model, name)
        if self._within(function) is not None:
            return

        def fed(*args: Any) -> Any:
            *state, batches = args
            return self._step(function, state, batches, count=count)

        fed.__wrapped__ = function  # pyright: ignore[reportFunctionMemberAccess]
        self.model.__dict__[name] = fed  # past Keras's `__setattr__`, which takes its time

    def unwrap(self) -> None:
        """After a step: the functions are as they were."""
        for name in ("train_function", "test_function"):
            within = self._within(getattr(self.model, name))
            if within is not None:
                self.model.__dict__[name] = within

    @staticmethod
    def _within(function: Any) -> Any:
        """What one of our wrappers holds; None: it is none."""
        ours = getattr(function, "__qualname__", "").endswith("Session.wrap.<locals>.fed")
        return function.__wrapped__ if ours else None

    def _step(self, function: Any, state: Sequence[Any], batches: Any, *, count: bool) -> Any:
        if isinstance(batches, list | tuple):  # PyTorch's trainer hands over a list of one
            return function(*state, [self._translated(batch, count=count) for batch in batches])
        given = (self._translated(batch, count=count) for batch in batches)
        spec = getattr(batches, "element_spec", None)
        if spec is None or self.model.run_eagerly:
            return function(*state, given)
        if (getattr(function, "__module__", None) or "").startswith("keras."):
            several = list(itertools.islice(given, self.model.steps_per_execution))
            return self._traced(function, spec, len(several))(several)
        return function(self._tensorflow_batches(batches, spec, count=count))

    def _traced(self, function: Any, spec: Any, several: int) -> Callable[[Any], Any]:
        """Keras's own step on batches whose size is known only where Keras knows it.

        It weighs the losses of several outputs by the size that it sees when it traces.
        """
        key = (id(function), self._now.number, several)
        if key not in self._steps:
            import tensorflow as tf  # noqa: PLC0415  only where Keras runs on it

            # The function is kept as well: its id is not given to another one.
            traced = tf.function(
                function, input_signature=[[self._spec_of(spec)] * several], autograph=False
            )
            self._steps[key] = (traced, function)
        return self._steps[key][0]

    def _tensorflow_batches(self, batches: Any, spec: Any, *, count: bool) -> Any:
        """The same for steps that others made: TensorFlow's iterators keep sizes to themselves."""
        key = (self._now.number, count)
        if key not in self._pipelines:
            import tensorflow as tf  # noqa: PLC0415

            outer: dict[str, Any] = {}

            def translated() -> Iterator[Any]:
                for batch in outer["of"]:
                    yield self._translated(batch, count=count)

            signature = self._spec_of(spec)
            dataset = tf.data.Dataset.from_generator(translated, output_signature=signature)
            self._pipelines[key] = (outer, dataset)
        outer, dataset = self._pipelines[key]
        if outer.get("of") is not batches:
            outer.update(of=batches, inner=iter(dataset))
        return outer["inner"]

    def _spec_of(self, spec: Any) -> Any:
        """What becomes of batches of row numbers that look like this."""
        import tensorflow as tf  # noqa: PLC0415

        x, y, weight = keras.utils.unpack_x_y_sample_weight(spec)
        if not _are_rows(x):
            return spec
        size = x[ROWS].shape[0]
        like = keras.tree.map_structure(
            lambda t: tf.TensorSpec((size, *t.shape[1:]), t.dtype),
            self._inputs(self._starts[:1], self._now),
        )
        return keras.utils.pack_x_y_sample_weight(like, y, weight)

    def _translated(self, batch: Any, *, count: bool) -> Any:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if not _are_rows(x):
            return batch  # samples of somebody else's
        rows = as_numpy(x[ROWS]).astype(np.int64)
        if count:
            self.report.batches += 1
            self.report.replayed += self._now.region is not None
        return keras.utils.pack_x_y_sample_weight(self._inputs(rows, self._now), y, weight)

    def _inputs(self, rows: NDArray[np.int64], use: _Use) -> Any:
        """What the model is called with for these samples."""
        source = int(np.searchsorted(self._starts, rows[0], side="right")) - 1
        local = rows - self._starts[source]
        samples, x = self._sources[source]
        if use.region is None:
            return _tensors(x, local)
        given = use.features[source].read(local, self.report)
        order = {id(v): i for i, v in enumerate(use.region.graph.inputs)}
        given += [samples.arrays[order[id(v)]][local] for v in use.region.passed]
        return {
            f"{_FRONTIER}:{use.number}:{i:04d}": keras.ops.convert_to_tensor(value)
            for i, value in enumerate(given)
        }

    # -- following the model ---------------------------------------------------------------------

    def begin(self) -> None:
        """Everything is built: from now on no step may see numbers of samples."""
        self._building = False

    def follow(self, *, epoch: bool = False) -> None:
        """Before a step, or an epoch: look again if what trains may have changed.

        Compiled steps go by the flags of the time when they were made; others by those of now.
        """
        function = self.model.train_function
        live = keras.backend.backend() != "tensorflow" or self.model.run_eagerly
        if not (epoch or function is not self._seen or (live and self._is_eager)):
            return
        # TensorFlow's steps go on training what trained when they were made.
        flags = self._flags_now() if live or function is not self._seen else self._flags
        self._seen = function
        if flags != self._flags or epoch:
            _sync(self.model)
            self._choose(flags)

    @property
    def _is_eager(self) -> bool:
        """Whether each step goes by the flags of its own moment."""
        return keras.backend.backend() == "torch" or bool(self.model.run_eagerly)

    def _choose(self, flags: tuple[Any, ...]) -> None:
        """The use that fits the model's flags: the present one, one from before, or a new one."""
        self._flags = flags
        if self._library is None:
            return
        began, counted = time.perf_counter(), self.report.fill_s + self.report.check_s
        old, self._now = self._now, self._raw
        try:
            fits = [use for use in self._uses.values() if use.flags == flags]
            fresh = [use for use in fits if self._is_fresh(use)]
            if fits and not fresh and flags not in self._refused:
                self.report.note("frozen weights have changed: their outputs are computed again")
            if flags in self._refused:
                return
            with _generators_kept():
                self._now = fresh[-1] if fresh else self._prepared(old, flags)
        except (FrontierError, StorageError) as error:
            self._refused[flags] = error.found
            self.report.note(f"not cached: {error.found}")
        finally:
            counted = self.report.fill_s + self.report.check_s - counted
            self.report.find_s += time.perf_counter() - began - counted

    def _flags_now(self) -> tuple[Any, ...]:
        """The flags and wrappers that regions depend on."""
        modes = tuple((layer.trainable, vars(layer).get("call")) for layer in self._layers)
        return *modes, tuple(v.trainable for v in self.model.variables)

    def _is_fresh(self, use: _Use) -> bool:
        return use.region is None or weight_parts(use.region) == use.weights

    def _prepared(self, old: _Use, flags: tuple[Any, ...]) -> _Use:
        """The region of now, found, filled and compared with the whole model."""
        region = find_region(self.model, _first_rows(self._sources[0][1]), wrapped=True)
        if why := region.why_not or _cast(self.model, region):
            raise FrontierError("cache these layers", found=why)
        use = _Use(
            next(_numbers), region, rest_model(region), flags=flags,
            weights=weight_parts(region), run=runner(frozen_model(region), self.model),
        )  # fmt: skip
        try:
            self._fill(use, region, self._shortcut(old, region))
            self._uses[use.number] = use
            self._compare(use)
        except (FrontierError, StorageError):
            self._uses.pop(use.number, None)
            for features in use.features:
                features.close()
            raise
        self.report.note(region.describe())
        return use

    def _fill(self, use: _Use, region: KerasRegion, shortcut: tuple[_Use, Runner] | None) -> None:
        compiled = [bool(self.model.jit_compile), bool(self.model.run_eagerly)]
        for source, (samples, _) in enumerate(self._sources):
            key = region_key(
                region, data=samples.data, encoding=self._encoding,
                compiled=compiled, weights=use.weights,
            )  # fmt: skip
            if key.unknown:
                self.report.note(f"for this run only: {key.unknown[0]}")
            features = Features(
                samples, region.frontier, key, self._place(known=not key.unknown),
                encoding=self._encoding, most_bytes=self._most_bytes,
                about={"model": self.model.name, "data": samples.name, "of": "keras"},
                compute=shortcut[1] if shortcut else use.run,
                source=shortcut[0].features[source] if shortcut else None,
            )  # fmt: skip
            use.features.append(features)
            features.fill(self.report)
            features.compute_from_samples(use.run)

    def _place(self, *, known: bool) -> Library:
        """The library; for what no later run can recognise, one that goes with this run."""
        if known and self._library is not None:
            return self._library
        if self._private is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="frostline-"))
            self._private = Library(folder)
        return self._private

    def _shortcut(self, old: _Use, region: KerasRegion) -> tuple[_Use, Runner] | None:
        """How to compute a deeper frontier from the one before, where that has all it needs."""
        if old.region is None or self._encoding != "exact" or not self._is_fresh(old):
            return None
        if not set(old.region.frozen) <= set(region.frozen):
            return None
        names = {v.name: v for call in region.graph.calls for v in call.outputs}
        sources = [names[v.name] for v in old.region.frontier]
        shared = {names[v.name]: a for v, a in old.region.shared.items()}
        try:
            model = build(region.graph, sources, list(region.frontier), shared=shared)
        except FrontierError:
            return None  # it needs the samples as well
        self.report.note("filled from the frontier before it")
        return old, runner(model, self.model)

    # -- comparing -------------------------------------------------------------------------------

    def check(self) -> None:
        """After a step, now and then: compare; a region that differs is given up."""
        if self._now.region is None or self._random.integers(CHECKED_EVERY):
            return
        _sync(self.model)
        with _generators_kept():
            why = self._difference(self._now)
        if why:
            self._refused[self._now.flags] = why
            self.report.note(f"not cached any more: {why}")
            _log.warning("not cached any more: %s", why)
            self._now = self._raw

    def _compare(self, use: _Use) -> None:
        if why := self._difference(use):
            raise FrontierError("cache these layers", found=why)

    def _difference(self, use: _Use) -> str:
        """What replay does differently from the whole model on a few random samples, or ""."""
        self.report.checked += 1
        began = time.perf_counter()
        try:
            return self._compared(use)
        finally:
            self.report.check_s += time.perf_counter() - began

    def _compared(self, use: _Use) -> str:
        for source, (samples, x) in enumerate(self._sources):
            block = int(self._random.integers(-(-len(samples) // BLOCK_ROWS))) * BLOCK_ROWS
            if name := use.features[source].doubt(block):
                return f"{name} gives other values now than those that were stored"
            rows = self._random.integers(len(samples), size=_CHECKED_SAMPLES)
            whole = self._forward(_tensors(x, rows))
            rest = self._forward(self._inputs(rows + self._starts[source], use))
            times = _OUTPUT_TIMES[self._encoding]
            if not all(close(a, b, times=times) for a, b in zip(whole, rest, strict=True)):
                return f"the outputs differ on {samples.name} samples when the rest runs alone"
        return ""

    def _forward(self, inputs: Any) -> list[NDArray[Any]]:
        """The model's outputs in inference; its state is left as it was."""
        with put_back(self.model.non_trainable_variables):
            outputs = self.model(inputs, training=False)
        return [as_numpy(output) for output in keras.tree.flatten(outputs)]


class Before(keras.callbacks.Callback):
    """Stands before all other callbacks: what they see of the model is theirs."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Leave the model's functions as they were."""
        self._session.unwrap()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Leave the model's functions as they were."""
        self._session.unwrap()


class Behind(keras.callbacks.Callback):
    """Stands behind all other callbacks: what they did to the model is done."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def on_train_begin(self, logs: Any = None) -> None:
        """Losses and metrics are built by now."""
        self._session.begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Look whether frozen weights are what they were."""
        self._session.follow(epoch=True)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Look whether another callback has changed what trains."""
        self._session.follow()
        self._session.wrap("train_function", count=True)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compare, now and then."""
        self._session.check()

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Evaluation runs on frontiers as well."""
        self._session.wrap("test_function", count=False)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """The global generators are afterwards where they were: Keras shuffles samples by them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch = sys.modules.get("torch") if keras.backend.backend() == "torch" else None
    drawn = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if torch:
            torch.set_rng_state(drawn)


def _number(inputs: Any) -> int | None:
    """Of the frontier that these inputs are; None: they are none."""
    if not (isinstance(inputs, Mapping) and inputs):
        return None
    kind, _, rest = str(next(iter(inputs))).partition(":")
    return int(rest.partition(":")[0]) if kind == _FRONTIER else None


def _tensors(x: Any, rows: NDArray[np.int64]) -> Any:
    """Some samples in the structure of `x`, typed as Keras types the arrays that `fit` is given."""

    def take(array: Any) -> Any:
        values = np.asarray(array[rows])
        return keras.ops.convert_to_tensor(values, dtype=_dtype(array))

    return keras.tree.map_structure(take, x)


def _dtype(array: NDArray[Any]) -> str:
    floating = np.issubdtype(array.dtype, np.floating)
    return keras.backend.floatx() if floating else str(array.dtype)


def _are_rows(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and set(inputs) == {ROWS}


def _first_rows(x: Any) -> Any:
    return keras.tree.map_structure(lambda array: np.asarray(array[:_CHECKED_SAMPLES]), x)


def _cast(model: keras.Model, region: KerasRegion) -> str:
    """Why frontier values would not reach the rest as they are; empty when they do."""
    if isinstance(model, keras.Function):
        return ""  # functional models take each input as it is
    odd = [v for v in region.frontier if _is_float(v) and v.dtype != model.compute_dtype]
    return f"{odd[0].name} is {odd[0].dtype}, and {model.name} casts what it gets" if odd else ""


def _is_float(value: Value) -> bool:
    return "float" in value.dtype


def _sync(model: keras.Model) -> None:
    """On JAX, let the model's variables hold their values in the middle of an epoch."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
