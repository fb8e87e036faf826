"""`model.fit` with the frozen layers run once per sample: one function to call in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np

from frostline.errors import ConfigError, FrontierError, few
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.data import CachedData, stored
from frostline.frontier.keras.features import Samples
from frostline.frontier.keras.region import as_numpy, flat_inputs
from frostline.frontier.keras.session import Before, Behind, Session
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.policy import Policy
from frostline.signals import SIGNALS

__all__ = ["CachedFit", "cached", "fit"]

Cache = bool | str | Path | Library | None
#: Steps that see `x`, and so would see frontier values in its place.
_STEPS = ("train_step", "test_step", "compute_loss", "compute_metrics", "stateless_compute_loss",
          "compute_loss_and_updates")  # fmt: skip


@dataclass(frozen=True)
class CachedFit:
    """What `fit` gives back.

    Attributes:
        history: Keras's own, as `model.fit` returns it.
        report: what the cache did, what it cost, and why where it did nothing.
    """

    history: keras.callbacks.History
    report: CacheReport


def fit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    validation_data: Any = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    cache: Cache = None,
    dtype: str = "float32",
    data_name: str | None = None,
    most_bytes: int | None = None,
    **rest: Any,
) -> CachedFit:
    """Train as `model.fit` does, with the outputs of frozen layers computed once per sample.

    Same order of samples, same steps, same callbacks; the model, its optimizer and its metrics
    are the user's own. Where something cannot be cached exactly, that is said in the report and
    the whole model runs.

    Args:
        model: compiled; functional or Sequential ones are cached.
        x: arrays, samples first: one, or a list or dict of them as the model takes them.
        y: targets as arrays.
        callbacks: as for `model.fit`; with a `frostline.integrations.keras.FreezeCallback` among
            them its policy says what is frozen when, and the cache follows. Without one the
            `trainable` flags say it, and what other callbacks make of them.
        validation_data: `(x, y)` or `(x, y, sample_weight)` of arrays is cached as well; what
            else Keras takes is evaluated uncached.
        cache: where values are kept; None: in the user's cache folder, for later runs too; a
            path or `Library`: there; False: nowhere, the whole model runs at each step.
        dtype: "float32" keeps every bit; "bfloat16", "float16" and "int8" take less room.
        data_name: names the samples in the key, instead of a digest of all their bytes.
        most_bytes: the most that the values of one set of samples may take; None: no bound.
        **rest: of `model.fit`: `batch_size`, `epochs`, `shuffle`, `sample_weight`, `class_weight`, `verbose`, ...

    Raises:
        FrontierError: `x` is no set of arrays that fits the model.
        ConfigError: an unknown dtype.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8), keras.layers.Dense(1)])
        >>> model.layers[0].trainable = False
        >>> model.compile("sgd", "mse")
        >>> done = fit(model, np.eye(3), np.ones((3, 1)), epochs=2, verbose=0)
        >>> done.report.replayed
        2
    """  # noqa: E501
    encoding = _encoding(dtype)
    report = CacheReport()
    sources = [_source(model, x, "train", data_name)]
    validation_data, more = _validation(model, validation_data, data_name)
    sources += more
    library = _library(cache)
    if library is not None and (why := _sees_samples(model)):
        report.note(f"not cached: {why}")
        library = None
    for callback in callbacks:
        if library is not None and (why := _looks_inside(callback)):
            report.note(f"not cached: {why}")
            library = None
    session = Session(
        model, sources, library=library, encoding=encoding, most_bytes=most_bytes, report=report
    )
    with session:
        if more:
            validation_data = (session.rows(1), *validation_data[1:])
        history = model.fit(
            session.rows(0), y, validation_data=validation_data,
            callbacks=[Before(session), *callbacks, Behind(session)], **rest,
        )  # fmt: skip
    return CachedFit(history, report)


def cached(
    model: keras.Model,
    x: Any,
    *,
    cache: Cache = None,
    dtype: str = "float32",
    data_name: str | None = None,
) -> CachedData:
    """The outputs of the frozen layers as data, for training loops of your own.

    Args:
        model: functional or Sequential, with some layers frozen by their `trainable` flags.
        x: arrays, samples first.
        cache: as for `fit`; False: in a folder that goes when the result is closed.
        dtype: as for `fit`.
        data_name: as for `fit`.

    Raises:
        FrontierError: nothing is frozen from the inputs on, or what cannot be cut exactly.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8), keras.layers.Dense(1)])
        >>> model.layers[0].trainable = False
        >>> with cached(model, np.eye(3), cache=False) as data:
        ...     data.rest.compile("sgd", "mse")
        ...     batches = data.batches(np.ones((3, 1)), batch_size=2, seed=1)
        ...     history = data.rest.fit(batches, epochs=2, shuffle=False, verbose=0)
        >>> len(history.history["loss"])
        2
    """  # noqa: E501
    samples, arrays = _source(model, x, "train", data_name)
    return stored(model, samples, arrays, library=_library(cache), encoding=_encoding(dtype))


def _encoding(dtype: str) -> Encoding:
    if dtype in ("float32", "exact"):
        return "exact"
    if dtype not in get_args(Encoding):
        raise ConfigError(
            f"keep values as {dtype!r}",
            found="no such dtype",
            fix="one of float32, bfloat16, float16, int8",
        )
    return dtype  # pyright: ignore[reportReturnType]


def _library(cache: Cache) -> Library | None:
    if cache is False:
        return None
    if isinstance(cache, Library):
        return cache
    return Library() if cache is None or cache is True else Library(cache)


def _source(model: keras.Model, x: Any, name: str, data_name: str | None) -> tuple[Samples, Any]:
    leaves = keras.tree.flatten(x)
    if not leaves or not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        raise FrontierError(
            f"number the {name} samples",
            found=f"a {type(x).__name__} where arrays belong",
            fix="give arrays, samples first; for a tf.data.Dataset: np.concatenate its batches",
        )
    arrays = keras.tree.map_structure(as_numpy, x)
    try:
        flat = flat_inputs(model, arrays)
    except AttributeError:  # a model without symbolic inputs runs on x as it is
        flat = [np.asarray(leaf) for leaf in keras.tree.flatten(arrays)]
    return Samples(name, flat, data_name and f"{data_name} ({name})"), arrays


def _looks_inside(callback: keras.callbacks.Callback) -> str:
    """What a policy reads of frozen layers, which then have to run; empty when nothing."""
    policy = getattr(callback, "policy", None)  # a FreezeCallback's
    if not isinstance(policy, Policy):
        return ""
    inside = [
        need.signal for need in policy.needs()
        if need.frozen_too or SIGNALS[need.signal].activations
    ]  # fmt: skip
    return f"the policy reads {few(inside)} of layers that are frozen" if inside else ""


def _validation(
    model: keras.Model, data: Any, data_name: str | None
) -> tuple[Any, list[tuple[Samples, Any]]]:
    if not isinstance(data, tuple | list) or not 2 <= len(data) <= 3:
        return data, []
    return tuple(data), [_source(model, data[0], "validation", data_name)]


def _sees_samples(model: keras.Model) -> str:
    """What of the user's own code looks at `x` in a step; empty when nothing does."""
    if "call" in vars(model):
        return f"the call of {model.name} was replaced"
    for kind in type(model).__mro__:
        own = not kind.__module__.startswith("keras.")
        for name in _STEPS:
            if (own and name in vars(kind)) or name in vars(model):
                return f"{type(model).__name__}.{name} is the user's own and sees the samples"
    return ""
