"""The sections of a cache key, read off a model and this process.

Each function answers one question and returns plain JSON. Where in doubt they say more than is
needed: a key that is too narrow costs a second filling, one that is too wide a wrong result.

=============  =========================================================================
weights        the bits, dtype, shape and memory order of what the region reads
structure      class, code, settings, hooks and order of children of each of its modules
modes          training or evaluation, module by module
slots          what is stored: names, shapes of one sample, dtypes
preparation    what happens to a sample before the model: transform, collate, views
data           which samples these are
versions       Python, torch and its build, packages that models and transforms come from
compute        device, threads, CPU, precision and determinism settings, autocast
encoding       how values are stored
=============  =========================================================================
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from frostline.backends.torch.blocks import is_norm
from frostline.backends.torch.digest import TensorTable, sha256_of_tensors, unwrapped
from frostline.errors import BackendError, FrontierError
from frostline.frontier.describe import Describer, package_version
from frostline.frontier.key import CacheKey, unknown
from frostline.frontier.machine import kernel_variables, processor

__all__ = [
    "FORMAT",
    "compute_parts",
    "mode_parts",
    "model_parts",
    "region_key",
    "region_modules",
    "slot_parts",
    "structure_parts",
    "version_parts",
    "weight_parts",
]

#: Raised when a stored value would mean something else, or keys are made in another way.
FORMAT = 1

_PACKAGES = ("numpy", "timm", "torchvision", "transformers")
_FLAGS = (
    "are_deterministic_algorithms_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "get_float32_matmul_precision",
    "backends.fp32_precision",
    "backends.mha.get_fastpath_enabled",
    "backends.mkldnn.deterministic",
    "backends.mkldnn.enabled",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
    "backends.opt_einsum.enabled",
    "backends.opt_einsum.strategy",
    "backends.quantized.engine",
    "utils.deterministic.fill_uninitialized_memory",
)
_CUDA_FLAGS = (
    "backends.cuda.cudnn_sdp_enabled",
    "backends.cuda.flash_sdp_enabled",
    "backends.cuda.fp16_bf16_reduction_math_sdp_allowed",
    "backends.cuda.math_sdp_enabled",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.preferred_blas_library",
    "backends.cuda.preferred_linalg_library",
    "backends.cudnn.benchmark",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.deterministic",
    "backends.cudnn.enabled",
    "backends.cudnn.rnn.fp32_precision",
    "backends.cudnn.version",
)


class Stored(Protocol):
    """A tensor of the frontier, as far as the key goes."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


# -- the whole key -------------------------------------------------------------------------------


def region_key(
    model: nn.Module,
    *,
    skipped: Iterable[str],
    slots: Iterable[Stored],
    preparation: Any,
    data: Any,
    tensors: Iterable[str] | None = None,
    passed: Iterable[str] | None = None,
    encoding: str | Mapping[str, str] = "exact",
    device: torch.device | str = "cpu",
    weights: Mapping[str, Any] | None = None,
) -> CacheKey:
    """The key of what a region stores, in the model's and the process's present state.

    Args:
        model: the whole model.
        skipped: the region's module calls that replay leaves out: "layer1", "layer1#2".
        slots: what is stored.
        preparation: plain JSON that tells transforms, collation and views; None: not known.
        data: plain JSON that tells the samples by content; None: not known.
        tensors: names of all parameters and buffers that the region reads outside of `skipped`;
            None: not known, so all that is frozen counts.
        passed: names of modules that are not skipped, though some operation of their own `forward`
            belongs to the region; None: not known, so every module of the model counts.
        encoding: of all slots, or by name.
        device: on which rows are computed.
        weights: this section of another key of the same region, whose tensors are known to be
            what they were then; None: looked at now.

    Raises:
        FrontierError: a name that the model does not have, or parts that are no plain JSON.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).requires_grad_(False)
        >>> key = region_key(model, skipped=["0"], slots=[], preparation={}, data={"sha256": "ab"})
        >>> sorted(key.parts)[:4]
        ['compute', 'data', 'encoding', 'modes']
        >>> key.unknown
        ()
    """
    sections = model_parts(model, skipped=skipped, tensors=tensors, passed=passed, weights=weights)
    stored = slot_parts(slots)
    return CacheKey(
        {
            **sections,
            "slots": stored,
            "preparation": unknown("how samples are prepared") if preparation is None
            else preparation,
            "data": unknown("which samples these are") if data is None else data,
            "compute": compute_parts(device),
            "encoding": {
                name: encoding if isinstance(encoding, str) else encoding.get(name, "exact")
                for name in stored
            },
        }
    )  # fmt: skip


def model_parts(
    model: nn.Module,
    *,
    skipped: Iterable[str],
    tensors: Iterable[str] | None = None,
    passed: Iterable[str] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The sections that the model decides: weights, structure, modes, versions.

    Some 60 ms for 90 MB of weights, nearly all of it SHA-256. Arguments as for `region_key`.

    Raises:
        FrontierError: a name that the model does not have.
    """
    root = unwrapped(model)
    skipped, passed = tuple(skipped), None if passed is None else tuple(passed)
    names = region_modules(root, skipped, passed)
    structure, packages = structure_parts(root, names)
    return {
        "weights": dict(weights)
        if weights is not None
        else weight_parts(root, tensors, skipped=skipped, loose=passed is None or bool(passed)),
        "structure": structure,
        "modes": mode_parts(root, names),
        "versions": version_parts(packages),
    }


def region_modules(
    model: nn.Module, skipped: Iterable[str], passed: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Names of the modules whose code or settings may shape what the region stores.

    These are the skipped ones with all that is inside them, the passed ones, and the ancestors of
    both, whose `forward` calls them. Arguments as for `region_key`.

    Raises:
        FrontierError: a name that the model does not have.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Linear(2, 1))
        >>> region_modules(model, skipped=["0"], passed=[])
        ('', '0', '0.0')
    """
    known = dict(unwrapped(model).named_modules(remove_duplicate=False))
    if passed is None:
        return tuple(known)
    calls = [_module_of(call, known) for call in skipped]
    wanted = {"", *calls, *(_module_of(call, known) for call in passed)}
    wanted |= {name for name in known if any(_is_inside(name, call) for call in calls)}
    for name in tuple(wanted):
        path = name.split(".")
        wanted |= {".".join(path[:depth]) for depth in range(1, len(path))}
    return tuple(name for name in known if name in wanted)


def _module_of(call: str, known: Mapping[str, nn.Module]) -> str:
    """The module of a call: "layer1#2" is the second one of layer1."""
    name, mark, number = call.rpartition("#")
    if mark and number.isdecimal() and call not in known:
        call = name
    if call not in known:
        raise FrontierError(
            f"make a cache key with the module {call!r}",
            found="no module of that name in the model",
            fix="find the region again after changing the model's modules",
        )
    return call


def _is_inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


# -- the model -----------------------------------------------------------------------------------


def weight_parts(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    skipped: Iterable[str] = (),
    loose: bool = False,
) -> dict[str, Any]:
    """For each tensor: dtype, shape, strides, device, SHA-256 of its bits.

    Strides count, since kernels are chosen by them and round differently.

    Args:
        model: whose tensors these are.
        names: of parameters and buffers; None: every buffer and every frozen parameter.
        skipped: module calls; whatever tensor is inside these modules counts as well.
        loose: some operation of the region is in no skipped module. It may read tensors of any
            module (``F.linear(x, self.other.weight)``), so all that is frozen counts as well,
            except the running statistics of norms that are collecting them.

    Raises:
        FrontierError: a name that the model does not have.

    Example:
        >>> model = nn.Linear(2, 1).requires_grad_(False)
        >>> weight_parts(model)["weight"][:3]
        ['torch.float32', [1, 2], [2, 1]]
    """
    root = unwrapped(model)
    table = TensorTable(root)
    known = dict(root.named_modules(remove_duplicate=False))
    calls = [_module_of(call, known) for call in skipped]
    trained = {id(p) for p in root.parameters() if p.requires_grad}
    frozen = [name for name in table if id(table[name]) not in trained]
    if names is None:
        names = frozen
    elif loose:
        names = {*names, *(name for name in frozen if not _is_collected(name, known))}
    inside = [n for n in table if any(_is_inside(n.rpartition(".")[0], call) for call in calls)]
    wanted = sorted({*names, *inside})
    if lost := [name for name in wanted if name not in table]:
        raise FrontierError(
            f"make a cache key with the tensor {lost[0]!r}",
            found="no parameter or buffer of that name in the model",
            fix="find the region again after changing the model's modules",
        )
    return _digests({name: table[name] for name in wanted})


def _is_collected(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor is a statistic that its norm moves at each step."""
    home, _, own = name.rpartition(".")
    module = modules[home]
    if own in (
        "moving_mean",
        "moving_variance",
    ):  # Keras's, see frostline.backends.keras.torch_module
        return module.training and is_norm(module)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return own in statistics and module.training and hasattr(module, "track_running_stats")


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        digests: dict[str, Any] = dict(sha256_of_tensors(tensors))
    except (BackendError, RuntimeError):  # one that cannot be read: find out which
        digests = {name: _digest_or_unknown(tensor) for name, tensor in tensors.items()}
    return {
        name: digest
        if isinstance(digest, dict)
        else [str(t.dtype), list(t.shape), list(t.stride()), t.device.type, digest]
        for name, t in tensors.items()
        for digest in (digests[name],)
    }


def _digest_or_unknown(tensor: Tensor) -> Any:
    try:
        return sha256_of_tensors({"it": tensor}, workers=1)["it"]
    except (BackendError, RuntimeError) as error:
        return unknown(getattr(error, "found", "") or type(error).__name__)


def structure_parts(
    model: nn.Module, names: Iterable[str]
) -> tuple[dict[str, Any], frozenset[str]]:
    """What each module does besides its tensors, and the packages whose version says the rest.

    Args:
        model: whose modules these are.
        names: which of them, see `region_modules`.

    Returns:
        For each module its class, what it says of itself, and a digest of its code, settings,
        hooks and children's names; and import names of packages.

    Example:
        >>> structure, packages = structure_parts(nn.Sequential(nn.Linear(2, 1)), ["0"])
        >>> structure["0"]["class"], structure["0"]["says"]
        ('torch.nn.modules.linear.Linear', 'in_features=2, out_features=1, bias=True')
        >>> "torch" in packages
        True
    """
    known = dict(unwrapped(model).named_modules(remove_duplicate=False))
    first_names = {id(module): name for name, module in reversed(known.items())}
    describer = Describer({name: known[name] for name in first_names.values()})
    found: dict[str, Any] = {}
    for name in names:
        module = known[name]
        if (first := first_names[id(module)]) != name:
            found[name] = {"same module as": first}
            continue
        digest = describer.module_digest(module)
        about = {"class": f"{type(module).__module__}.{type(module).__qualname__}"}
        about["says"] = _says(module)
        found[name] = about | (digest if isinstance(digest, dict) else {"digest": digest})
    return found, frozenset(describer.packages)


def _says(module: nn.Module) -> str:
    """For people; code of others, so it may fail, and its text is cut."""
    try:
        said = " ".join(module.extra_repr().split())
    except Exception:  # noqa: BLE001  whatever others' `extra_repr` raises, the digest tells more
        return ""
    return ascii(said)[1:-1][:200]


def mode_parts(model: nn.Module, names: Iterable[str]) -> dict[str, bool]:
    """For each module: True in training mode.

    Example:
        >>> mode_parts(nn.Sequential(nn.Dropout()).eval(), ["0"])
        {'0': False}
    """
    known = dict(unwrapped(model).named_modules(remove_duplicate=False))
    return {name: bool(known[name].training) for name in names}


def slot_parts(slots: Iterable[Stored]) -> dict[str, Any]:
    """For each slot its shape and dtype.

    Raises:
        FrontierError: two of one name.
    """
    listed = list(slots)
    found = {slot.name: [list(slot.shape), str(slot.dtype)] for slot in listed}
    if len(found) < len(listed):
        raise FrontierError(
            "make a cache key", found="two slots of one name", fix="give each slot its own name"
        )
    return found


# -- this process --------------------------------------------------------------------------------


def version_parts(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of all that computes: Python, torch and its build, known and given packages.

    Installed versions, so that it makes no difference what has been imported so far.

    Args:
        packages: import names of further packages.

    Example:
        >>> version_parts()["torch"] == torch.__version__
        True
    """
    found = {
        "cache format": str(FORMAT),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch build": _torch_build(),
    }
    for name in sorted({*_PACKAGES, *packages} - {"torch"}):
        if version := package_version(name):
            found[name] = version
    return found


@functools.cache
def _torch_build() -> str:
    """A digest of compiler, BLAS and oneDNN versions, and build options."""
    text = f"{torch.version.git_version} {torch.__config__.show()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compute_parts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything about machine and settings that moves the last bits of a result.

    Args:
        device: on which rows are computed; of other kinds than "cpu" and "cuda" too little is
            known, so their values are never used again.

    Example:
        >>> compute_parts()["threads"] == torch.get_num_threads()
        True
    """
    device = torch.device(device)
    found: dict[str, Any] = {
        "device": _device(device),
        "cpu": processor(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "default_dtype": str(torch.get_default_dtype()),
        "autocast": {kind: _autocast(kind) for kind in sorted({"cpu", device.type})},
        "denormals": bool((torch.full((), 1e-40) * 0.5).item()),
        "nnpack": _nnpack(),
        "environment": kernel_variables(),
    }
    flags = _FLAGS + (_CUDA_FLAGS if device.type == "cuda" else ())
    return found | {name: _flag(name) for name in flags}


def _device(device: torch.device) -> Any:
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or not torch.cuda.is_available():
        return unknown(f"what a device of kind {device.type!r} computes")
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name} ({facts.major}.{facts.minor}, {facts.multi_processor_count} units)"


def _autocast(kind: str) -> str:
    try:
        enabled = torch.is_autocast_enabled(kind)
    except RuntimeError:  # a kind that has none
        return "off"
    return str(torch.get_autocast_dtype(kind)) if enabled else "off"


def _nnpack() -> bool | None:
    # Private, because torch.backends.nnpack has a public setter and no getter.
    getter = getattr(torch._C, "_get_nnpack_enabled", None)  # noqa: SLF001
    return None if getter is None else bool(getter())


def _flag(name: str) -> Any:
    """A setting of torch by its dotted name; None where this torch has none."""
    try:
        value: Any = torch
        for step in name.split("."):
            value = getattr(value, step)
        value = value() if callable(value) else value
    except AttributeError:
        return None
    except RuntimeError as error:  # two ways to say one thing, used against each other
        return f"contradictory: {str(error).partition('.')[0][:80]}"
    return value if isinstance(value, bool | int | str | None) else str(value)
