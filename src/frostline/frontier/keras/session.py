"""One `fit` whose steps run only what trains: the user's own model, optimizer and callbacks.

Arrays: Keras is given the numbers of the samples in place of the samples, so that it shuffles,
splits and batches as ever. Data sets and generators stay what they are. Between Keras's iterator
and the model's compiled step, numbers and samples become frontier values (or, where nothing can be
cached, stay or become the samples themselves), and `model.call` runs the rest of the graph on them.
Whenever what trains has changed, the frozen region is looked for again: that is how callbacks that
freeze and unfreeze layers are followed.

The model's compiled functions are wrapped for the length of one step only: whoever else keeps or
replaces them finds what he left.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.backends.keras.names import layers as layers_of
from frostline.errors import FrontierError, StorageError, few
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.features import Samples
from frostline.frontier.keras.graph import Value
from frostline.frontier.keras.region import (
    KerasRegion,
    as_numpy,
    close,
    find_region,
    flat_inputs,
    put_back,
)
from frostline.frontier.keras.stores import Stores, Use
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.frontier.segments import BLOCK_ROWS
from frostline.frontier.views import Views

__all__ = ["ROWS", "Before", "Behind", "Session"]

_log = logging.getLogger("frostline")

#: Name of the one input that Keras sees of arrays: numbers of samples.
ROWS = "frostline_rows"
_FRONTIER = "frostline_frontier"
#: Samples of a comparison of outputs; as many as were tried, so that little is compiled anew.
_CHECKED_SAMPLES = 3
#: One step in so many, at random, is followed by a comparison.
CHECKED_EVERY = 200
#: Outputs may differ by this many times the rounding of one value.
_OUTPUT_TIMES = {"exact": 10.0, "bfloat16": 1000.0, "float16": 300.0, "int8": 2000.0}
#: The model's functions that are wrapped.
TRAIN, TEST = "train_function", "test_function"
#: What writes to weights in one go, and so may change frozen ones between two epochs.
_WRITERS = ("set_weights", "load_weights")


class Session:
    """Makes a model's `fit` run on stored frontiers while it is open.

    Args:
        model: functional or Sequential, compiled.
        sources: arrays, as samples and as the user gave them, in the model's own structure; rows
            are numbered through all of them.
        arriving: which of `TRAIN` and `TEST` are fed with samples that have no number.
        library: where stores are kept; None: in a folder that goes with the session.
        encoding: how floating values are kept.
        most_bytes: the most that one store may take.
        views: stored versions of each training sample, where random layers augment it.
        report: what happened is counted there.
        seed: of the choice of the rows that are compared.
    """

    def __init__(
        self,
        model: keras.Model,
        sources: Sequence[tuple[Samples, Any]],
        *,
        arriving: Collection[str] = (),
        library: Library | None,
        encoding: Encoding = "exact",
        most_bytes: int | None = None,
        views: Views | None = None,
        report: CacheReport,
        seed: int = 0,
    ) -> None:
        self.model, self.report = model, report
        self._sources, self._arriving = sources, frozenset(arriving)
        self._encoding: Encoding = encoding
        self._views = views
        self._stores = Stores(
            model, [samples for samples, _ in sources], library=library, encoding=encoding,
            most_bytes=most_bytes, views=views, report=report,
        )  # fmt: skip
        self._random = np.random.default_rng(seed)
        self._uses: dict[int, Use] = {}
        self._raw = Use()
        self._now = self._raw
        self._refused: dict[tuple[Any, ...], str] = {}
        self._seen: Any = None
        self._flags: tuple[Any, ...] = ()
        self._steps: dict[Any, tuple[Callable[[Any], Any], Any]] = {}
        self._pipelines: dict[Any, _Pipeline] = {}
        self._layers = [layer for _, layer in layers_of(model) if layer is not model]
        self._building = True
        self._epoch = 0
        # The newest batch of samples that have no number, and whether the first one is awaited.
        self._arrived: Any = None
        self._awaited = False
        self._new_each_time = False
        self._doubted = False
        self._starts = np.cumsum([0, *(len(samples) for samples, _ in sources)])

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
        self._unwatch()
        del self.model.call
        if self._own_call is not None:
            self.model.call = self._own_call
        self.model.input_spec = self._spec
        self._steps.clear()
        self._pipelines.clear()
        for use in self._uses.values():
            stores = [*use.shelves, *([use.arrivals] if use.arrivals else [])]
            with contextlib.suppress(StorageError):  # a folder that somebody took away
                self.report.stored_bytes += sum(store.bytes_on_disk for store in stores)
            use.close()
        self._stores.__exit__()

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

    def wrap(self, name: str) -> None:
        """For the coming step, let a compiled function of the model be handed frontiers.

        Args:
            name: `TRAIN` or `TEST`.
        """
        function = getattr(self.model, name)
        if self._within(function) is not None:
            return

        def fed(*args: Any) -> Any:
            *state, batches = args
            return self._step(name, function, state, batches)

        fed.__wrapped__ = function  # pyright: ignore[reportFunctionMemberAccess]
        self.model.__dict__[name] = fed  # past Keras's `__setattr__`, which takes its time

    def unwrap(self) -> None:
        """After a step: the functions are as they were."""
        for name in (TRAIN, TEST):
            within = self._within(getattr(self.model, name))
            if within is not None:
                self.model.__dict__[name] = within

    @staticmethod
    def _within(function: Any) -> Any:
        """What one of our wrappers holds; None: it is none."""
        ours = getattr(function, "__qualname__", "").endswith("Session.wrap.<locals>.fed")
        return function.__wrapped__ if ours else None

    def _step(self, name: str, function: Any, state: Sequence[Any], batches: Any) -> Any:
        if isinstance(batches, list | tuple):  # PyTorch's trainer hands over a list of one
            return function(*state, self._translated(name, list(batches), state))
        spec = getattr(batches, "element_spec", None)
        several = self.model.steps_per_execution
        if spec is not None and self._is_left_alone(name):
            self.report.batches += several if name == TRAIN else 0
            return function(*state, batches)
        taken = list(itertools.islice(batches, several))
        if not taken:
            raise StopIteration  # as the iterator itself would say it
        given = self._translated(name, taken, state)
        module = getattr(function, "__module__", None) or ""
        if spec is None or self.model.run_eagerly or module.startswith("frostline."):
            return function(*state, iter(given))
        if module.startswith("keras."):
            self._build(given[0])
            return self._traced(function, _spec_of(spec, given[0]), len(given))(given)
        return function(self._pipeline(name, spec, given))

    def _is_left_alone(self, name: str) -> bool:
        """Whether batches go to the model as they are, by TensorFlow's own way."""
        return name in self._arriving and self._now.region is None and not self._awaited

    def _build(self, batch: Any) -> None:
        """Let optimizer, loss and metrics make their variables before the first step.

        TensorFlow traces a step that makes some twice.
        """
        optimizer = self.model.optimizer
        if getattr(optimizer, "built", True):
            return
        optimizer.build(self.model.trainable_variables)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if not all(
            hasattr(leaf, "shape") for leaf in keras.tree.flatten((y, weight)) if leaf is not None
        ):
            return  # targets that are absent in ways of TensorFlow's own
        with keras.StatelessScope():  # nothing is counted here
            given = {"y": y, "y_pred": self.model(x, training=False), "sample_weight": weight}
            self.model.compute_loss(x=x, training=False, **given)
            self.model.compute_metrics(x=x, **given)

    def _traced(self, function: Any, spec: Any, several: int) -> Callable[[Any], Any]:
        """Keras's own step on batches whose size is known only where Keras knows it.

        It weighs the losses of several outputs by the size that it sees when it traces.
        """
        key = (id(function), self._now.number, several)
        if key not in self._steps:
            import tensorflow as tf  # noqa: PLC0415  only where Keras runs on it

            # The function is kept as well: its id is not given to another one.
            traced = tf.function(function, input_signature=[[spec] * several], autograph=False)
            self._steps[key] = (traced, function)
        return self._steps[key][0]

    def _pipeline(self, name: str, spec: Any, given: list[Any]) -> Any:
        """A TensorFlow iterator over these batches, for steps that others made and compiled."""
        key = (self._now.number, name)
        if key not in self._pipelines:
            self._pipelines[key] = _Pipeline(_spec_of(spec, given[0]))
        return self._pipelines[key].over(given, whole=len(given) == self.model.steps_per_execution)

    # -- batches ---------------------------------------------------------------------------------

    def _translated(self, name: str, batches: list[Any], state: Sequence[Any]) -> list[Any]:
        """What the step is given in place of some batches."""
        if self._awaited:
            self._choose_late(batches[0], state)
        try:
            found = [self._one(name, batch) for batch in batches]
        except (FrontierError, StorageError) as error:
            self._give_up(error.found)
            found = [self._one(name, batch) for batch in batches]
        if name == TRAIN:
            self.report.batches += len(found)
            self.report.replayed += sum(replayed for _, replayed in found)
        return [batch for batch, _ in found]

    def _one(self, name: str, batch: Any) -> tuple[Any, bool]:
        """What becomes of one batch, and whether it came without the frozen part being run."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if _are_rows(x):
            rows = as_numpy(x[ROWS]).astype(np.int64)
            x, replayed = self._of_rows(rows, self._now, self._epoch if name == TRAIN else None)
        elif name in self._arriving and self._now.region is not None:
            x, replayed = self._of_samples(x, counted=name == TRAIN)
        else:
            return batch, False
        return keras.utils.pack_x_y_sample_weight(x, y, weight), replayed

    def _of_rows(self, rows: NDArray[np.int64], use: Use, epoch: int | None) -> tuple[Any, bool]:
        """What the model is called with for the samples of these numbers."""
        source = int(np.searchsorted(self._starts, rows[0], side="right")) - 1
        local = rows - self._starts[source]
        samples, x = self._sources[source]
        if use.region is None:
            return _tensors(x, local), False
        computed = self.report.computed_rows
        values = use.shelves[source].read(local, self.report, epoch=epoch)
        given = [*values, *use.passed(samples.arrays, local)]
        return _named(use, given), self.report.computed_rows == computed

    def _of_samples(self, x: Any, *, counted: bool) -> tuple[Any, bool]:
        """The same for samples that have no number."""
        self._arrived = x
        flat = flat_inputs(self.model, x)
        values, known = self._stores.arrivals(self._now).read(flat, self.report, counted=counted)
        return _named(self._now, [*values, *self._now.passed(flat)]), known

    # -- following the model ---------------------------------------------------------------------

    def begin(self) -> None:
        """Everything is built: from now on no step may see numbers of samples."""
        self._building = False

    def begin_epoch(self, epoch: int) -> None:
        """Before an epoch: look whether frozen weights are what they were."""
        self._epoch = epoch
        self._watch()
        if self._now.arrivals is not None:
            try:
                self._now.arrivals.begin_epoch()
            except FrontierError as error:
                self._new_each_time = True  # whatever a callback freezes next
                self._give_up(error.found, fix=error.fix)
        self.follow(epoch=True)

    def follow(self, *, epoch: bool = False) -> None:
        """Before a step, or an epoch: look again if what trains may have changed.

        Compiled steps go by the flags of the time when they were made; others by those of now.
        """
        function = self.model.train_function
        live = keras.backend.backend() != "tensorflow" or self.model.run_eagerly
        surely = epoch or self._doubted
        if not (surely or function is not self._seen or (live and self._is_eager)):
            return
        # TensorFlow's steps go on training what trained when they were made.
        flags = self._flags_now() if live or function is not self._seen else self._flags
        self._seen = function
        self._doubted = False
        if flags != self._flags or surely:
            _sync(self.model)
            self._choose(flags)

    def follow_writes(self) -> None:
        """Before a step of evaluation: look again if weights were written."""
        if self._doubted:
            self.follow()

    @property
    def _is_eager(self) -> bool:
        """Whether each step goes by the flags of its own moment."""
        return keras.backend.backend() == "torch" or bool(self.model.run_eagerly)

    def _watch(self) -> None:
        """Notice `set_weights` and `load_weights` of other callbacks, whoever watches them too."""
        for name in _WRITERS:
            inner = vars(self.model).get(name)
            if not isinstance(inner, _Watched):
                self.model.__dict__[name] = _Watched(self, name, inner)

    def _unwatch(self) -> None:
        for name in _WRITERS:
            watched = vars(self.model).get(name)
            if isinstance(watched, _Watched):
                del self.model.__dict__[name]
                if watched.inner is not None:
                    self.model.__dict__[name] = watched.inner

    def doubt(self) -> None:
        """Weights were written: what is stored is believed only after another look."""
        self._doubted = True

    def _choose_late(self, batch: Any, state: Sequence[Any]) -> None:
        """The first samples without numbers are here: now the region can be looked for."""
        self._awaited = False
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        self._arrived = keras.tree.map_structure(as_numpy, x)
        _lend(self.model, state)
        self._choose(self._flags)

    def _choose(self, flags: tuple[Any, ...]) -> None:
        """The use that fits the model's flags: the present one, one from before, or a new one."""
        self._flags = flags
        if not self._sources and self._arrived is None:
            self._awaited = True
            return
        began, counted = time.perf_counter(), self.report.fill_s + self.report.check_s
        old, self._now = self._now, self._raw
        try:
            fits = [use for use in self._uses.values() if use.flags == flags]
            fresh = [use for use in fits if use.is_fresh]
            if fits and not fresh and flags not in self._refused:
                self.report.note("frozen weights have changed: their outputs are computed again")
            if flags in self._refused or self._new_each_time:
                return
            with _generators_kept():
                self._now = fresh[-1] if fresh else self._prepared(old, flags)
        except (FrontierError, StorageError) as error:
            self._refused[flags] = error.found
            self.report.note(f"not cached: {error.found}")
        finally:
            counted = self.report.fill_s + self.report.check_s - counted
            self.report.find_s += time.perf_counter() - began - counted

    def _give_up(self, why: str, *, fix: str = "") -> None:
        """From now on the whole model runs, as long as its flags are what they are."""
        self._refused[self._now.flags] = why
        self.report.note(f"not cached any more: {why}" + f"; {fix}" * bool(fix))
        _log.warning("not cached any more: %s", why)
        self._now = self._raw

    def _flags_now(self) -> tuple[Any, ...]:
        """The flags and wrappers that regions depend on."""
        modes = tuple((layer.trainable, vars(layer).get("call")) for layer in self._layers)
        return *modes, tuple(v.trainable for v in self.model.variables)

    def _prepared(self, old: Use, flags: tuple[Any, ...]) -> Use:
        """The region of now, found, filled and compared with the whole model."""
        x = _first_rows(self._sources[0][1] if self._sources else self._arrived)
        region = find_region(self.model, x, wrapped=True, draws=self._views is not None)
        if why := region.why_not or _cast(self.model, region):
            raise FrontierError("cache these layers", found=why)
        use = self._stores.use(region, flags)
        try:
            self._stores.fill(use, old)
            self._uses[use.number] = use
            self._compare(use)
        except (FrontierError, StorageError):
            self._uses.pop(use.number, None)
            use.close()
            raise
        self.report.note(region.describe())
        if self._views is not None:
            self.report.note(_said_of(self._views, region))
        return use

    # -- comparing -------------------------------------------------------------------------------

    def check(self) -> None:
        """After a step, now and then: compare; a region that differs is given up."""
        if self._now.region is None or self._random.integers(CHECKED_EVERY):
            return
        _sync(self.model)
        with _generators_kept():
            why = self._difference(self._now)
        if why:
            self._give_up(why)

    def _compare(self, use: Use) -> None:
        if why := self._difference(use, new=True):
            raise FrontierError("cache these layers", found=why)

    def _difference(self, use: Use, *, new: bool = False) -> str:
        """What replay does differently from the whole model on a few random samples, or ""."""
        self.report.checked += 1
        began, filled = time.perf_counter(), self.report.fill_s
        try:
            return self._compared(use, new=new) or self._compared_batch(use, new=new)
        finally:
            self.report.check_s += time.perf_counter() - began - (self.report.fill_s - filled)

    def _compared(self, use: Use, *, new: bool) -> str:
        for source, (samples, x) in enumerate(self._sources):
            shelf, pick = use.shelves[source], int(self._random.integers(1 << 30))
            # What was computed a moment ago by the same program needs no second time.
            if not (new and shelf.is_own) and (name := shelf.doubt(pick)):
                return _changed(name)
            block = int(self._random.integers(-(-len(samples) // BLOCK_ROWS))) * BLOCK_ROWS
            rows = block + self._random.integers(
                min(BLOCK_ROWS, len(samples) - block), size=_CHECKED_SAMPLES
            )
            frontier, _ = self._of_rows(rows + self._starts[source], use, None)
            if not self._is_same(_tensors(x, rows), frontier):
                return f"the outputs differ on {samples.name} samples when the rest runs alone"
        return ""

    def _compared_batch(self, use: Use, *, new: bool) -> str:
        """The same for the newest samples without numbers."""
        if self._arrived is None:
            return ""
        x = keras.tree.map_structure(as_numpy, self._arrived)
        flat = flat_inputs(self.model, x)
        arrivals = self._stores.arrivals(use)
        values, _ = arrivals.read(flat, self.report)
        if not (new and arrivals.is_own) and (name := arrivals.doubt(flat, self.report)):
            return _changed(name)
        rows = self._random.integers(len(flat[0]), size=_CHECKED_SAMPLES)
        given = [array[rows] for array in (*values, *use.passed(flat))]
        if not self._is_same(_tensors(x, rows), _named(use, given)):
            return "the outputs differ on samples of a batch when the rest runs alone"
        return ""

    def _is_same(self, inputs: Any, frontier: Any) -> bool:
        """Whether the whole model and the rest give the same, but for rounding."""
        whole, rest = self._forward(inputs), self._forward(frontier)
        times = _OUTPUT_TIMES[self._encoding]
        return all(close(a, b, times=times) for a, b in zip(whole, rest, strict=True))

    def _forward(self, inputs: Any) -> list[NDArray[Any]]:
        """The model's outputs in inference; its state, of random seeds too, is as it was."""
        with put_back(self.model.non_trainable_variables):
            outputs = self.model(inputs, training=False)
        return [as_numpy(output) for output in keras.tree.flatten(outputs)]


class _Watched:
    """In place of a method of the model that writes its weights."""

    def __init__(self, session: Session, name: str, inner: Any) -> None:
        self.inner = inner
        self._session, self._name = session, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._session.model
        self._session.doubt()
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return getattr(type(model), self._name)(model, *args, **kwargs)


class _Pipeline:
    """A TensorFlow iterator that gives what it was handed, however often."""

    def __init__(self, spec: Any) -> None:
        import tensorflow as tf  # noqa: PLC0415

        self._waiting: deque[Any] = deque()
        options = tf.data.Options()
        # What is read ahead would find nothing, and end.
        options.autotune.enabled = False
        options.experimental_optimization.inject_prefetch = False
        handed = tf.data.Dataset.from_generator(self._handed, output_signature=spec)
        self._dataset = handed.with_options(options)
        self._iterator: Any = None

    def _handed(self) -> Iterator[Any]:
        while self._waiting:
            yield self._waiting.popleft()

    def over(self, batches: list[Any], *, whole: bool) -> Any:
        """The iterator, about to give these batches.

        Args:
            batches: of one call of a step.
            whole: they are as many as a step asks for; else it ends after them.
        """
        self._waiting.extend(batches)
        iterator = iter(self._dataset) if self._iterator is None else self._iterator
        self._iterator = iterator if whole else None
        return iterator


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
        self._session.begin_epoch(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Look whether another callback has changed what trains."""
        self._session.follow()
        self._session.wrap(TRAIN)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compare, now and then."""
        self._session.check()

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Evaluation runs on frontiers as well."""
        self._session.follow_writes()
        self._session.wrap(TEST)


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


def _named(use: Use, values: Sequence[NDArray[Any]]) -> Any:
    """What the model is called with where these values are its frontier."""
    return {
        f"{_FRONTIER}:{use.number}:{i:04d}": keras.ops.convert_to_tensor(value)
        for i, value in enumerate(values)
    }


def _spec_of(spec: Any, given: Any) -> Any:
    """What TensorFlow knows of batches that become such ones.

    Args:
        spec: of the batches before.
        given: one of those that they became.
    """
    import tensorflow as tf  # noqa: PLC0415

    old, y, weight = keras.utils.unpack_x_y_sample_weight(spec)
    x, _, _ = keras.utils.unpack_x_y_sample_weight(given)
    if not _are_rows(old) and _number(x) is None:
        return spec
    size = keras.tree.flatten(old)[0].shape[0]
    like = keras.tree.map_structure(lambda t: tf.TensorSpec((size, *t.shape[1:]), t.dtype), x)
    return keras.utils.pack_x_y_sample_weight(like, y, weight)


def _said_of(views: Views, region: KerasRegion) -> str:
    if region.draws:
        return f"{views.describe()}; drawn by seed {views.seed}: {few(region.draws)}"
    return "nothing in front of the frozen layers draws at random: each sample is stored once"


def _changed(name: str) -> str:
    return f"{name} gives other values now than those that were stored"


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
    return keras.tree.map_structure(lambda array: as_numpy(array[:_CHECKED_SAMPLES]), x)


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


def _lend(model: keras.Model, state: Sequence[Any]) -> None:
    """On JAX, where a step is under way, let the variables hold what it was given.

    A copy: the step gives its own away.
    """
    if keras.backend.backend() != "jax" or not state:
        return
    import jax  # noqa: PLC0415

    parts = (model.trainable_variables, model.non_trainable_variables)
    for variables, values in zip(parts, state[0], strict=False):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(jax.numpy.array(value, copy=True))
