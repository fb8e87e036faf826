"""`model.fit` with the frozen layers run once per sample: one function to call in its place."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np

from frostline.errors import ConfigError, FrontierError, few
from frostline.frontier.encodings import Encoding
from frostline.frontier.keras.data import CachedData, gathered, stored
from frostline.frontier.keras.features import Samples
from frostline.frontier.keras.region import as_numpy, flat_inputs
from frostline.frontier.keras.session import TEST, TRAIN, Before, Behind, Session
from frostline.frontier.library import Library
from frostline.frontier.report import CacheReport
from frostline.frontier.views import Views
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
    views: int | Views | None = None,
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
        x: arrays, samples first: one, or a list or dict of them as the model takes them. Or what
            else `model.fit` takes, `tf.data.Dataset`, `PyDataset`, `DataLoader` or a generator:
            its samples are known again by their content.
        y: targets as arrays; None where `x` brings them.
        callbacks: as for `model.fit`; with a `frostline.integrations.keras.FreezeCallback` among
            them its policy says what is frozen when, and the cache follows. Without one the
            `trainable` flags say it, and what other callbacks make of them.
        validation_data: `(x, y)` or `(x, y, sample_weight)` of arrays, or a data set.
        cache: where values are kept; None: in the user's cache folder, for later runs too; a
            path or `Library`: there; False: nowhere, `model.fit` runs as it is.
        views: K stored versions of each training sample where random layers (`RandomFlip`, ...)
            in front of the frozen ones augment it. Epoch e < K makes view e, later epochs reuse
            the views in random order; drawn by seed, sample and view. None: nothing random is
            stored.
        dtype: "float32" keeps every bit; "bfloat16", "float16" and "int8" take less room.
        data_name: names the samples in the key, instead of a digest of all their bytes.
        most_bytes: the most that the values of one set of samples may take; None: no bound for
            arrays, half of the free disk for what else `x` may be.
        **rest: of `model.fit`: `batch_size`, `epochs`, `shuffle`, `sample_weight`, `class_weight`, `verbose`, ...

    Raises:
        FrontierError: `x` is nothing that fits the model; views of samples without numbers.
        ConfigError: an unknown dtype; views that cannot be.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8), keras.layers.Dense(1)])
        >>> model.layers[0].trainable = False
        >>> model.compile("sgd", "mse")
        >>> done = fit(model, np.eye(3), np.ones((3, 1)), epochs=2, verbose=0)
        >>> done.report.replayed
        2
    """  # noqa: E501
    encoding, stored_views = _encoding(dtype), _views(views, x)
    report = CacheReport()
    arriving = [name for name, data in ((TRAIN, x), (TEST, validation_data)) if _arrives(data)]
    sources = [] if TRAIN in arriving else [_source(model, x, "train", data_name)]
    library = _library(cache)
    why = [] if cache is False else _reasons_not_to(model, callbacks)
    if library is None or why:
        for reason in why:
            report.note(f"not cached: {reason}")
        counting = [_Counting(report), *callbacks]
        history = model.fit(x, y, validation_data=validation_data, callbacks=counting, **rest)
        return CachedFit(history, report)
    numbered = _numbered(validation_data)
    if numbered:
        sources.append(_source(model, validation_data[0], "validation", data_name))
    session = Session(
        model, sources, arriving=arriving, library=library, encoding=encoding, views=stored_views,
        most_bytes=most_bytes, report=report,
    )  # fmt: skip
    with session:
        if numbered:
            validation_data = (session.rows(len(sources) - 1), *validation_data[1:])
        history = model.fit(
            x if TRAIN in arriving else session.rows(0), y, validation_data=validation_data,
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
    most_bytes: int | None = None,
) -> CachedData:
    """The outputs of the frozen layers as data, for training loops of your own.

    Args:
        model: functional or Sequential, with some layers frozen by their `trainable` flags.
        x: arrays, samples first; or a finite `tf.data.Dataset`, `PyDataset`, `DataLoader` or
            generator of batches, which is read once, its targets too.
        cache: as for `fit`; False: in a folder that goes when the result is closed.
        dtype: as for `fit`.
        data_name: as for `fit`.
        most_bytes: as for `fit`.

    Raises:
        FrontierError: nothing is frozen from the inputs on, or what cannot be cut exactly; a data
            set without an end.

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
    encoding = _encoding(dtype)
    if _arrives(x):
        return gathered(model, x, library=_library(cache), encoding=encoding, most_bytes=most_bytes)
    samples, arrays = _source(model, x, "train", data_name)
    return stored(
        model, samples, arrays, library=_library(cache), encoding=encoding, most_bytes=most_bytes
    )


class _Counting(keras.callbacks.Callback):
    """Counts the batches of a `fit` without cache."""

    def __init__(self, report: CacheReport) -> None:
        super().__init__()
        self._report = report

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """One more; `batch` is the number of the last one of a call."""
        self._report.batches += 1


def _reasons_not_to(model: keras.Model, callbacks: Sequence[keras.callbacks.Callback]) -> list[str]:
    """Why nothing may be cached, whatever is frozen."""
    replicas = getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)
    several = f"the model trains on {replicas} devices at once" if replicas > 1 else ""
    return [
        why
        for why in (several, _sees_samples(model), *map(_looks_inside, callbacks))
        if why
    ]  # fmt: skip


def _views(views: int | Views | None, x: Any) -> Views | None:
    if views is None:
        return None
    if _arrives(x):
        raise FrontierError(
            "store views of samples that have no number",
            found=f"a {type(x).__name__}, of which no sample can be asked for again",
            fix="give arrays, or leave views out",
        )
    asked = views if isinstance(views, Views) else Views(views, augmented=True)
    return asked if asked.augmented else None


def _arrives(x: Any) -> bool:
    """Whether `model.fit` takes it as batches of samples that have no number."""
    if isinstance(x, keras.utils.PyDataset) or inspect.isgenerator(x):
        return True
    modules = [kind.__module__ for kind in type(x).__mro__]
    loader = any(name.startswith(("torch.utils.data", "grain")) for name in modules)
    return loader or (hasattr(x, "element_spec") and hasattr(x, "__iter__"))


def _numbered(data: Any) -> bool:
    """Whether these are validation arrays, which may be numbered."""
    return isinstance(data, tuple | list) and 2 <= len(data) <= 3


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
            fix="give arrays, samples first, or a data set that model.fit takes",
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
