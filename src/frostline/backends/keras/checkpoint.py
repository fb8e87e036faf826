"""Checkpoints of a Keras run: whole or absent, checked on the way in, and never unpickled.

A checkpoint is a folder ``step-00000123`` that appears by one rename: variables of the model, what
the optimizer remembers and random states as safetensors, everything else as JSON, sizes and SHA-256
of all in a manifest. Slots of the optimizer are kept by the *name* of their variable, so they can
neither be lost nor given to another one.

Example:
    A run that goes on where it was, whatever happened to it::

        from frostline.integrations.keras import CheckpointCallback, FreezeCallback

        freezing = FreezeCallback("gradual:every=1ep")
        done = load_checkpoint("ckpt", model, freezing)
        model.fit(x, y, epochs=10, initial_epoch=done["epoch"] if done else 0, shuffle=False,
                  callbacks=[freezing, CheckpointCallback("ckpt", freezing)])
"""

from __future__ import annotations

import logging
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import keras
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save, save_file

from frostline import _io
from frostline._version import __version__
from frostline.backends.checkpoints import (
    check_keep,
    free_name,
    library_errors,
    newest_step,
    prune,
    read_checkpoint,
    whole,
    write_checkpoint,
)
from frostline.backends.keras.arrays import Array, array_of
from frostline.backends.keras.names import aliases, tensors
from frostline.backends.trees import pack_tree, unpack_tree
from frostline.errors import StorageError, few

if TYPE_CHECKING:
    from frostline.backends.keras.backend import KerasBackend
    from frostline.driver import Driver
    from frostline.policy import Policy

__all__ = ["FreezingRun", "load_checkpoint", "load_weights", "save_checkpoint", "save_weights"]

_log = logging.getLogger("frostline")
KIND = "frostline keras checkpoint 1"
#: Weight files larger than this are refused: a header is text, and so many tensors no model.
_MAX_WEIGHTS_BYTES = 1 << 40
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


class FreezingRun(Protocol):
    """What a checkpoint reads and restores of a run: a `FreezeCallback`."""

    @property
    def policy(self) -> Policy:
        """The policy of the run."""
        ...

    @property
    def driver(self) -> Driver | None:
        """Its driver; None before `fit`."""
        ...

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """Updates per epoch and of the whole run; None if unknown."""
        ...

    def backend_of(self, model: keras.Model) -> KerasBackend:
        """The backend for this model, with the optimizer built."""
        ...

    def resume(
        self,
        state: Mapping[str, Any],
        lengths: tuple[int | None, int | None],
        metrics: Sequence[Any] = (),
    ) -> None:
        """Go on from this state at the next `fit`."""
        ...


def save_checkpoint(
    folder: str | Path,
    model: keras.Model,
    callback: FreezingRun | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    step: int | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint and, once it is read back and verified, remove the oldest beyond `keep`.

    What the callback holds frozen is written once: as long as it is the same, further checkpoints
    hold a hard link to the file of the one before. Each is whole by itself.

    Call it between optimizer updates: in callbacks after an epoch or after a batch, or after `fit`.
    The states of Python's and NumPy's generators (and torch's on that backend) and of all Keras
    seed generators of the model are saved with it. One process may write in a folder.

    Args:
        folder: where the checkpoints of this run live; created when absent.
        model: compiled; all its variables, those of its optimizer and its metrics are saved.
        callback: the `FreezeCallback` of the run.
        extra: plain JSON of your own, returned by `load_checkpoint`.
        step: updates completed, for the name; by default the callback's count, else one more than
            the newest checkpoint's.
        keep: how many of the newest to keep, >= 2 (one to fall back on) or 0 for all.

    Returns:
        The new folder.

    Raises:
        StorageError: it cannot be written, or a part holds what cannot be saved. Earlier
            checkpoints are untouched.
    """
    folder = Path(folder)
    check_keep(keep)
    _io.make_folder(folder)
    _io.sweep(folder)
    parts = _collect(model, callback)
    driver = None if callback is None else callback.driver
    number = step
    if number is None:
        number = newest_step(folder) + 1 if driver is None else driver.progress.step
    target = free_name(folder, number)
    held = {} if driver is None else driver.held
    write_checkpoint(
        target, parts.trees, parts.tensors, step=number, kind=KIND, held=held,
        beside=[folder], write=write_arrays,
        about={"extra": dict(extra or {}), "versions": _versions()},
    )  # fmt: skip
    if keep:
        prune(folder, keep)
    return target


def load_checkpoint(
    folder: str | Path,
    model: keras.Model,
    callback: FreezingRun | None = None,
    *,
    step: int | None = None,
) -> dict[str, Any] | None:
    """Put the newest checkpoint that verifies into these objects; its `extra`, or None if none.

    Everything is checked before anything is changed. Call it before `fit`, with a model built and
    compiled as then and a callback of the same policy.

    Args:
        folder: as given to `save_checkpoint`.
        model: of the same architecture; its variables and those of its optimizer are overwritten.
        callback: goes on at its next `fit`, with the same decisions as without the interruption.
        step: load the checkpoint of this step instead of the newest.

    Raises:
        StorageError: checkpoints are there and none fits or verifies; nothing was changed.
    """
    found = whole(Path(folder), step, kind=KIND)
    if found is None:
        return None
    path, note = found
    trees, arrays, state = read_checkpoint(path, note, read_arrays)
    if state["versions"] != _versions():
        _log.warning("%s was written with %s: bits may differ", path, state["versions"])
    parts = _Parts(trees, arrays)
    for change in _plan_changes(path, parts, model, callback):
        change()
    _log.info("restored %s", path)
    return state["extra"]


def save_weights(model: keras.Model, path: str | Path) -> None:
    """Write all variables of the model by name into one safetensors file, whole or not at all.

    Names are those of `frostline.backends.keras.names`; they do not depend on the Keras backend.

    Args:
        model: built.
        path: of the file; replaced if there is one.

    Raises:
        StorageError: it cannot be written.

    Example:
        >>> import tempfile
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
        >>> file = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> save_weights(model, file)
        >>> load_weights(model, file)
        ()
    """
    path = Path(path)
    arrays = {name: array_of(v) for name, v in tensors(model).items()}
    with library_errors(f"write {path}"):
        data = save(_plain(arrays))
    _io.atomic_write_bytes(path, data)


def load_weights(model: keras.Model, path: str | Path, *, strict: bool = True) -> tuple[str, ...]:
    """Read variables of the model by name from a safetensors file.

    Args:
        model: built.
        path: of a file that `save_weights` wrote, or another with the same names.
        strict: refuse a file that lacks a variable or has one more; otherwise what is in both is
            read.

    Returns:
        Names that are in one of the two only (always empty with `strict`).

    Raises:
        StorageError: no safetensors file, or names, shapes or types do not fit; nothing was read.
    """
    path = Path(path)
    saved, mine = read_arrays(path), tensors(model)
    odd = tuple(sorted(saved.keys() ^ mine.keys()))
    if odd and strict:
        place = "file" if odd[0] in saved else "model"
        raise _unfit(path, f"{odd[0]!r} only in the {place} ({len(odd)} such names)")
    if not saved.keys() & mine.keys():
        raise _unfit(path, f"no name in common; the model has {few(sorted(mine))}")
    _check_variables(path, {n: v for n, v in mine.items() if n in saved}, saved)
    for name, variable in mine.items():
        if name in saved:
            variable.assign(saved[name])
    return odd


# -- parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parts:
    """A checkpoint in memory: JSON trees by part, and the arrays they point to, by file."""

    trees: dict[str, Any]
    tensors: dict[str, dict[str, Array]]


def _collect(model: keras.Model, callback: FreezingRun | None) -> _Parts:
    if callback is not None:
        callback.backend_of(model).steps.sync()
    parts = _Parts({}, {})
    ties = aliases(model)
    parts.tensors["model"] = {n: array_of(v) for n, v in tensors(model).items()}
    parts.trees["model"] = {n: list(ties[n]) for n in parts.tensors["model"]}

    def put(part: str, value: Any) -> None:
        found: dict[str, Array] = {}
        parts.trees[part] = pack_tree(value, part, _keeper(found))
        if found:
            parts.tensors[part] = found

    optimizer = model.optimizer
    if optimizer is not None and optimizer.built:
        put(
            "optimizer",
            {
                "class": type(optimizer).__qualname__,
                "variables": {n: array_of(v) for n, v in optimizer_names(model).items()},
            },
        )
    put("metrics", [array_of(v) for v in model.metrics_variables])
    if callback is not None and callback.driver is not None:
        put("driver", callback.driver.state())
        put("lengths", list(callback.lengths))
    put("random", _read_random())
    return parts


def _keeper(found: dict[str, Array]) -> Callable[[Any, str], dict[str, Any] | None]:
    def keep(leaf: Any, where: str) -> dict[str, Any] | None:
        if not (isinstance(leaf, np.ndarray) or keras.ops.is_tensor(leaf)):
            return None
        found[where] = np.array(array_of(leaf))
        return {"!": "array", "name": where}

    return keep


def optimizer_names(model: keras.Model) -> dict[str, keras.Variable]:
    """Every variable of the model's optimizer by a name: slots by that of their variable.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
        >>> model.compile(keras.optimizers.SGD(momentum=0.9))
        >>> model.optimizer.build(model.trainable_variables)
        >>> list(optimizer_names(model))
        ['0:iteration', '1:learning_rate', 'out/kernel:2', 'out/bias:3']
    """
    by_path = _unique_paths(model)
    found: dict[str, keras.Variable] = {}
    for place, variable in enumerate(model.optimizer.variables):
        name = next(
            (n for stem, n in by_path.items() if variable.name.startswith(f"{stem}_")), None
        )
        found[f"{place}:{variable.name}" if name is None else f"{name}:{place}"] = variable
    return found


def _unique_paths(model: keras.Model) -> dict[str, str]:
    """By what Keras makes of a variable's path in names of slots, the name; longest first."""
    found: dict[str, str] = {}
    for name, variable in tensors(model).items():
        found.setdefault(variable.path.replace("/", "_"), name)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _plan_changes(
    path: Path, parts: _Parts, model: keras.Model, callback: FreezingRun | None
) -> list[Callable[[], object]]:
    """Check every part and return what to do, so that nothing is changed unless all fits."""
    trees = {
        name: unpack_tree(tree, lambda tag, part=name: parts.tensors[part][tag["name"]])
        for name, tree in parts.trees.items()
        if name != "model"
    }
    if ("driver" in trees) != (callback is not None):
        found = "no state of a callback" if callback is not None else "state of a callback"
        fix = "leave the callback out" if callback is not None else "pass callback="
        raise StorageError(f"resume exactly from {path}", found=f"{found} in it", fix=fix)
    if callback is not None:
        callback.backend_of(model)  # builds the optimizer over all variables
        _same_policy(path, callback, trees["driver"])
    mine, saved = tensors(model), parts.tensors["model"]
    if odd := sorted(saved.keys() ^ mine.keys()):
        place = "checkpoint" if odd[0] in saved else "model"
        raise _unfit(path, f"{odd[0]!r} only in the {place} ({len(odd)} such names)")
    _check_variables(path, mine, saved)
    if {n: list(a) for n, a in aliases(model).items()} != parts.trees["model"]:
        raise _unfit(path, "other variables are tied there")
    changes: list[Callable[[], object]] = [lambda: _assign(mine, saved)]
    if "optimizer" in trees:
        changes.append(_optimizer_change(path, model, trees["optimizer"]))
    if callback is not None:
        lengths = tuple(trees["lengths"])
        changes.append(lambda: callback.resume(trees["driver"], lengths, trees["metrics"]))
    changes.append(lambda: _write_random(trees["random"]))
    return changes


def _same_policy(path: Path, callback: FreezingRun, state: Mapping[str, Any]) -> None:
    if state["policy"] != repr(callback.policy):
        raise StorageError(
            f"resume from {path} with the policy {callback.policy!r}",
            found=f"a checkpoint written under {state['policy']}",
            fix="use the same policy, or start afresh",
        )


def _optimizer_change(
    path: Path, model: keras.Model, saved: Mapping[str, Any]
) -> Callable[[], object]:
    optimizer = model.optimizer
    if optimizer is None or saved["class"] != type(optimizer).__qualname__:
        here = "none" if optimizer is None else type(optimizer).__qualname__
        raise _other_optimizer(path, f"{saved['class']} there, {here} here")
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    mine = optimizer_names(model)
    if odd := sorted(saved["variables"].keys() ^ mine.keys()):
        place = "checkpoint" if odd[0] in saved["variables"] else "optimizer"
        raise _other_optimizer(path, f"{odd[0]!r} only in the {place} ({len(odd)} such names)")
    _check_variables(path, mine, saved["variables"])
    return lambda: _assign(mine, saved["variables"])


def _assign(variables: Mapping[str, keras.Variable], values: Mapping[str, Array]) -> None:
    for name, variable in variables.items():
        variable.assign(values[name])


def _check_variables(
    path: Path, variables: Mapping[str, keras.Variable], saved: Mapping[str, Array]
) -> None:
    for name, variable in variables.items():
        mine = tuple(variable.shape), keras.backend.standardize_dtype(variable.dtype)
        theirs = saved[name].shape, saved[name].dtype.name
        if mine != theirs:
            raise _unfit(path, f"{name!r} is {_spell(*theirs)} there, {_spell(*mine)} here")


def _spell(shape: Sequence[int], dtype: str) -> str:
    return f"{tuple(shape)} {dtype}"


def _unfit(path: Path, found: str) -> StorageError:
    return StorageError(
        f"load the model from {path}", found=found, fix="build the model as when it was saved"
    )


def _other_optimizer(path: Path, found: str) -> StorageError:
    return StorageError(
        f"load the optimizer from {path}", found=found, fix="compile as when it was saved"
    )


def _versions() -> dict[str, str]:
    return {
        "frostline": __version__,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "machine": platform.machine(),
    }


# -- arrays on disk ------------------------------------------------------------------------------


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays and read them back: safetensors has no checksum, and disks can lie.

    Raises:
        StorageError: it cannot be written, or reads back differently.
    """
    plain = _plain(arrays)
    with library_errors(f"write {path}"):
        _io.disk.produce(path, lambda place: save_file(plain, str(place)))
    written = read_arrays(path)
    if written.keys() != plain.keys() or not all(_same(plain[n], a) for n, a in written.items()):
        raise StorageError(
            f"write {path}",
            found="what was written reads back differently",
            fix="check the disk, or write to another one",
        )


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of a safetensors file, bfloat16 included.

    Raises:
        StorageError: it cannot be read, or is no safetensors file of types that NumPy has.
    """
    with _io.storage_errors(f"read {path}"):
        if path.stat().st_size > _MAX_WEIGHTS_BYTES:
            raise StorageError(f"read {path}", found="more than a terabyte")
        data = path.read_bytes()
    with library_errors(f"read {path}"):
        found = safetensors.deserialize(data)
    return {name: _array(path, name, entry) for name, entry in found}


def _array(path: Path, name: str, entry: Mapping[str, Any]) -> Array:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise StorageError(
            f"read {path}",
            found=f"{name!r} of the type {entry['dtype']}",
            fix=f"types are {', '.join(_DTYPES)}",
        )
    return np.frombuffer(entry["data"], dtype=dtype).reshape(entry["shape"])


def _plain(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def _same(one: Array, other: Array) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


# -- random number generators --------------------------------------------------------------------


def _read_random() -> dict[str, Any]:
    """The global generators; those of layers are variables of the model."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  the stream others draw from
    }
    if keras.backend.backend() == "torch":
        import torch  # noqa: PLC0415 (only on this backend of Keras)

        state["torch"] = torch.get_rng_state().numpy()
    return state


def _write_random(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    if keras.backend.backend() == "torch" and "torch" in state:
        import torch  # noqa: PLC0415

        torch.set_rng_state(torch.from_numpy(np.array(state["torch"])))
