"""The key of what a Keras region stores: weights, layers, samples, versions, machine.

The sections are those of `frostline.frontier.parts`. What cannot be read makes the key unknown,
and what it names is then used by this run alone.
"""

from __future__ import annotations

import functools
import os
import platform
import types
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import keras
import numpy as np
import xxhash
from numpy.typing import NDArray

from frostline.backends.keras.digest import sha256_of_variables
from frostline.backends.keras.modes import is_held
from frostline.backends.keras.names import layers
from frostline.frontier.identity import Fingerprint, fingerprint
from frostline.frontier.keras.graph import Call, Value
from frostline.frontier.keras.region import KerasRegion, seed_states
from frostline.frontier.key import CacheKey, unknown
from frostline.frontier.machine import kernel_variables, processor

__all__ = ["data_parts", "region_key", "weight_parts"]

#: Raised when a stored value would mean something else, or keys are made in another way.
_FORMAT = 2
#: Import names of what computes, by Keras backend.
_COMPUTES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "jax": ("jax", "jaxlib"),
    "torch": ("torch",),
}
#: Variables through which these choose other kernels, besides those of `kernel_variables`.
_VARIABLES = (
    "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "OMP_NUM_THREADS", "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_XLA_FLAGS", "XLA_FLAGS",
)  # fmt: skip
#: Methods that Keras replaces on each layer by wrappers around the class's own.
_WRAPPED = ("build", "quantize")


def region_key(
    region: KerasRegion,
    *,
    data: Any,
    encoding: str = "exact",
    views: Mapping[str, Any] | None = None,
    compiled: Any = None,
    weights: Mapping[str, Any] | None = None,
) -> CacheKey:
    """The key of what a region stores of some samples.

    Args:
        region: found in the model's present state.
        data: plain JSON that tells the samples, see `data_parts`.
        encoding: how values are stored.
        views: what the content of augmented views depends on; None: there are none.
        compiled: plain JSON that says how the frozen part is compiled: XLA rounds differently.
        weights: see `weight_parts`; None: read now.

    Example:
        >>> from frostline.frontier.keras.region import find_region
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="body"),
        ...                           keras.layers.Dense(1)])
        >>> model.layers[0].trainable = False
        >>> key = region_key(find_region(model, np.eye(3)), data=data_parts([np.eye(3)]))
        >>> key.unknown, list(key.parts["structure"])
        ((), ['body'])
    """
    stored = {v.name: [list(v.shape[1:]), v.dtype] for v in region.frontier}
    return CacheKey(
        {
            "weights": dict(weights) if weights is not None else weight_parts(region),
            "structure": {call.name: _structure(call) for call in region.frozen_calls},
            "slots": stored,
            "preparation": dict(views or {}),
            "data": data,
            "versions": _versions(),
            "compute": _compute(compiled),
            "encoding": dict.fromkeys(stored, encoding),
        }
    )


def weight_parts(region: KerasRegion) -> dict[str, Any]:
    """Type, shape and SHA-256 of every variable that the frozen calls read.

    States of random seeds are left out: what draws from them is stored by view, with its seed.
    """
    seeds = {id(v) for call in region.frozen_calls for v in seed_states(call)}
    named = {name: v for name, v in region.variables if id(v) not in seeds}
    digests = sha256_of_variables(named)
    return {name: [v.dtype, list(v.shape), digests[name]] for name, v in named.items()}


def data_parts(samples: Sequence[NDArray[Any]], name: str | None = None) -> dict[str, Any]:
    """Which samples these are: the digest of their bytes, or the name that the user vouches for.

    Args:
        samples: one array per input, samples first.
        name: for samples too large to digest: with the same name they are taken for the same.

    Example:
        >>> data_parts([np.zeros((4, 2), np.float32)])["shapes"]
        [[4, 2]]
    """
    shapes = [list(array.shape) for array in samples]
    common = {"shapes": shapes, "dtypes": [str(array.dtype) for array in samples]}
    if name is not None:
        return {"name": name, **common}
    return {"content": _content(samples), **common}


def _content(samples: Sequence[NDArray[Any]]) -> Any:
    """A digest of all bytes; of texts and the like, by what they are.

    128 bits of xxh3, some 25 times as fast as SHA-256: pictures fill gigabytes, and nobody gains
    by handing himself other samples with the digest of his own.
    """
    if any(array.dtype.hasobject for array in samples):
        return _known(fingerprint([np.ascontiguousarray(array) for array in samples]))
    hasher = xxhash.xxh3_128()
    for array in samples:
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def _structure(call: Call) -> dict[str, Any]:
    """What a call does besides its variables, and what it reads."""
    layer = call.operation
    read = keras.tree.map_structure(
        lambda leaf: leaf.name if isinstance(leaf, Value) else leaf, (call.args, call.kwargs)
    )
    said: list[Any] = [read]
    for path, inner in layers(layer) if isinstance(layer, keras.Layer) else [("", layer)]:
        settings = _settings(inner)
        if isinstance(settings, str):
            return {"class": _class(layer), "digest": unknown(f"{path or call.name}: {settings}")}
        said.append((path, settings))
    return {"class": _class(layer), "digest": _known(fingerprint(said))}


def _settings(layer: Any) -> Any:
    """What a layer is besides its variables; text: why that cannot be told."""
    ours = type(layer).__module__.startswith("keras.")
    code = {n: value for n, value in vars(layer).items() if _is_foreign_code(layer, n, value)}
    if not isinstance(layer, keras.Layer):
        return [_class(layer), None if ours else type(layer), _own(layer), code]
    try:
        config = dict(layer.get_config())
    except (NotImplementedError, TypeError, ValueError) as error:
        return f"it has no configuration ({type(error).__name__})"
    for name in ("name", "trainable"):
        config.pop(name, None)
    if isinstance(layer, keras.layers.Lambda):  # its code is read, not the text of its settings
        config = {"arguments": layer.arguments}
    return [_class(layer), None if ours else type(layer), config, {} if ours else _own(layer), code]


def _is_foreign_code(layer: Any, name: str, value: Any) -> bool:
    """Whether this attribute is a function of the user's, such as an activation."""
    if name in _WRAPPED or (name == "call" and is_held(layer)):
        return False
    return (
        isinstance(value, types.FunctionType | types.MethodType)
        and not (value.__module__ or "").startswith("keras.")
        and getattr(value, "__self__", None) is not layer
    )


def _own(layer: Any) -> dict[str, Any]:
    """Attributes that the class of a user's layer sets beyond those of every layer."""
    found = {}
    for name, value in vars(layer).items():
        known = name in _common() or name.startswith("_self_") or name in (*_WRAPPED, "call")
        if known or _is_foreign_code(layer, name, value):
            continue
        leaves = [
            leaf for leaf in keras.tree.flatten(value)
            if not isinstance(leaf, keras.Variable | keras.Layer | keras.KerasTensor)
        ]  # fmt: skip
        if leaves:
            found[name] = leaves
    return found


@functools.cache
def _common() -> frozenset[str]:
    return frozenset({*vars(keras.layers.Layer()), *vars(keras.layers.Identity())})


def _class(layer: Any) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _known(found: Fingerprint) -> Any:
    return unknown(found.unknown) if found.digest is None else found.digest


@functools.cache
def _versions() -> dict[str, str]:
    found = {"cache format": f"keras {_FORMAT}", "python": platform.python_version()}
    found |= {"keras": keras.version(), "numpy": np.__version__}
    for name in _COMPUTES.get(keras.backend.backend(), ()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _compute(compiled: Any) -> dict[str, Any]:
    return {
        "backend": keras.backend.backend(),
        "device": "cpu" if _on_cpu() else unknown("what an accelerator computes"),
        "cpu": processor(),
        "compiled": compiled,
        "image data format": keras.backend.image_data_format(),
        "default_dtype": keras.backend.floatx(),
        "dtype policy": keras.config.dtype_policy().name,
        "environment": kernel_variables()
        | {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _on_cpu() -> bool:
    """Whether this backend computes on the processor alone."""
    if keras.backend.backend() == "torch":
        tensor: Any = keras.ops.convert_to_tensor(0.0)
        return tensor.device.type == "cpu"
    return all(device.lower().startswith("cpu") for device in keras.distribution.list_devices())
