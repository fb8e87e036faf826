"""SHA-256 of variables: over the raw bytes, so a digest here equals one of the PyTorch side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from frostline.errors import BackendError

__all__ = ["sha256_of_variables"]

#: Below this, starting threads costs more than it saves.
_THREADED_BYTES = 4 << 20


def sha256_of_variables(
    variables: Mapping[str, keras.Variable], *, workers: int | None = None
) -> dict[str, str]:
    """SHA-256 (hex) of the raw bytes of each variable, in row-major order.

    Args:
        variables: by name; one given under several names is read once.
        workers: threads, >= 1; None: one per core if there is enough to read.

    Raises:
        BackendError: a variable without a value, or whose buffer was given away (JAX, inside a
            running `fit`; call `model.jax_state_sync()` before).

    Example:
        >>> zero = keras.Variable(0.0, dtype="float32")
        >>> sha256_of_variables({"zero": zero})["zero"][:8]
        'df3f6198'
    """
    distinct = {id(v): (name, v) for name, v in variables.items()}
    if keras.backend.backend() == "torch":
        digests = _sha256_torch(distinct, workers)
    else:
        digests = _sha256_numpy(distinct, workers)
    return {name: digests[id(v)] for name, v in variables.items()}


def _sha256_torch(distinct: Mapping[int, tuple[str, Any]], workers: int | None) -> dict[int, str]:
    # Imported here: the other backends of Keras run without PyTorch.
    from frostline.backends.torch.digest import sha256_of_tensors  # noqa: PLC0415

    names = {name: key for key, (name, _) in distinct.items()}
    tensors = {name: variable.value for name, variable in distinct.values()}
    found = sha256_of_tensors(tensors, workers=workers)
    return {names[name]: digest for name, digest in found.items()}


def _sha256_numpy(distinct: Mapping[int, tuple[str, Any]], workers: int | None) -> dict[int, str]:
    arrays = {key: _raw_bytes(name, variable) for key, (name, variable) in distinct.items()}
    work = sorted(arrays, key=lambda key: -arrays[key].nbytes)
    if workers is None:
        size_bytes = sum(a.nbytes for a in arrays.values())
        workers = (os.cpu_count() or 1) if size_bytes >= _THREADED_BYTES else 1
    if workers == 1:
        return {key: _sha256(arrays[key]) for key in work}
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(work, pool.map(lambda key: _sha256(arrays[key]), work), strict=True))


def _raw_bytes(name: str, variable: Any) -> NDArray[np.uint8]:
    value = variable.value
    deleted = getattr(value, "is_deleted", None)
    if value is None or (deleted is not None and deleted()):
        raise BackendError(
            f"take the digest of {name!r}",
            found="a variable whose value is not here (given away to a compiled step, or not made)",
            fix="build the model; on JAX call model.jax_state_sync() before",
        )
    # TensorFlow's variables answer `numpy()`, also mirrored ones; JAX arrays are read in place.
    array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sha256(data: NDArray[np.uint8]) -> str:
    return hashlib.sha256(data.data, usedforsecurity=False).hexdigest()
