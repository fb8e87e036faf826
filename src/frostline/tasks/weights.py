"""Weights from safetensors files, checked before they touch a model.

A file of other classes than ours is normal when fine-tuning: head tensors that do not fit stay
freshly initialised and are reported. Anything else that is missing, unexpected or misshapen is an
error, since a half-loaded backbone trains without complaint and scores badly.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from frostline.errors import ModelError, few

__all__ = ["covering_glob", "find_head", "load_into", "read_weights"]

MAX_HEADER_BYTES = 16_000_000
MAX_TENSORS = 100_000
_SIGNATURES = {b"PK\x03\x04": "a zip archive (PyTorch's own format)", b"\x89HDF": "an HDF5 file"}
_CONVERT = (
    "convert it where you trust it: safetensors.torch.save_file("
    "torch.load('old.pth', weights_only=True), 'new.safetensors')"
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ModelError: absent, of another format, damaged, or with values that are not finite.
    """
    asked = f"read the weights {path}"
    if path.suffix.lower() != ".safetensors":
        found = f"a {path.suffix or 'suffixless'} file; only safetensors can run no code"
        raise ModelError(asked, found=found, fix=_CONVERT)
    try:
        _check_header(path)
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        fix = "a .safetensors file; download or convert it again"
        raise ModelError(asked, found=_one_line(error), fix=fix) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            found = f"values that are not finite in {name!r}"
            raise ModelError(asked, found=found, fix="an undamaged file")
    return tensors


def load_into(
    model: nn.Module, tensors: Mapping[str, Tensor], *, head: str | None, source: str
) -> tuple[str, ...]:
    """Copy tensors into a model by name; head tensors that do not fit stay as initialised.

    Args:
        model: receives the values, converted to its own number types.
        tensors: by the model's own parameter and buffer names.
        head: glob of the head's modules, or None.
        source: what messages call the tensors' origin.

    Returns:
        Names of the head tensors left freshly initialised.

    Raises:
        ModelError: tensors missing, unexpected or of another shape outside the head.
    """
    own = model.state_dict()
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in tensors if n not in own]
    misshapen = [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    fresh = {n for n in (*missing, *misshapen) if in_module(n, head)}
    _raise_unless_fitting(
        missing=[n for n in missing if n not in fresh],
        unexpected=[n for n in unexpected if not in_module(n, head)],
        misshapen=[f"{n} {tuple(tensors[n].shape)}" for n in misshapen if n not in fresh],
        own=own,
        source=source,
    )
    kept = {n: own[n] if n in fresh else tensors.get(n, own[n]) for n in own}
    model.load_state_dict(kept, strict=True)
    return tuple(sorted(fresh))


def find_head(model: nn.Module, classes: int) -> str | None:
    """Name of the last linear or convolution layer with one output per class.

    Example:
        >>> find_head(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), 3)
        '2'
    """
    layers = {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    return next((n for n in reversed(layers) if layers[n] == classes), None)


def covering_glob(wanted: Sequence[str], among: Iterable[str]) -> str | None:
    """One glob that matches the wanted names and no other; None where there is none.

    Example:
        >>> covering_glob(["pre_head", "head"], ["body", "pre_head", "head"])
        '*head'
    """
    if len(wanted) == 1:
        return wanted[0]
    start, end = _shared_start(wanted), _shared_start([n[::-1] for n in wanted])[::-1]
    for glob in (f"{start}*", f"*{end}"):
        if [n for n in among if fnmatch.fnmatchcase(n, glob)] == list(wanted):
            return glob
    return None


def _shared_start(names: Sequence[str]) -> str:
    length = 0
    for letters in zip(*names, strict=False):
        if len(set(letters)) > 1:
            break
        length += 1
    return names[0][:length] if names else ""


def in_module(tensor: str, glob: str | None) -> bool:
    """Whether a tensor lies in a module that matches the glob.

    Example:
        >>> in_module("fc.0.weight", "fc"), in_module("fc.0.weight", "fc.1")
        (True, False)
    """
    path = tensor
    while glob is not None and "." in path:
        path = path.rpartition(".")[0]
        if fnmatch.fnmatchcase(path, glob):
            return True
    return False


def _raise_unless_fitting(
    *,
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
    own: Mapping[str, Tensor],
    source: str,
) -> None:
    problems = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if not problems:
        return
    wrong = (unexpected or missing or [m.split(" ")[0] for m in misshapen])[0]
    near = difflib.get_close_matches(wrong, own, n=3, cutoff=0.4)
    raise ModelError(
        f"load {source} into the model",
        found=f"tensors: {'; '.join(problems)}",
        fix=f"weights of the same architecture; nearest to {_escaped(wrong)} in the model: "
        f"{', '.join(near) or 'none'}",
    )


def _first(names: list[str]) -> str:
    return few([_escaped(name) for name in names])


def _escaped(name: str) -> str:
    # A name from a foreign file must not move the cursor or start a new line.
    return ascii(name)[1:-1][:200]


def _check_header(path: Path) -> None:
    """What the format demands and its library lets pass: repeated names, giant headers."""
    with path.open("rb") as file:
        start = file.read(8)
        for signature, kind in _SIGNATURES.items():
            if start.startswith(signature):
                raise ValueError(f"{kind}, not safetensors")
        if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            raise ValueError("a pickle file, which can run code, not safetensors")
        if len(start) < 8:
            raise ValueError(f"{len(start)} bytes, too few for a header")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
        header = json.loads(file.read(length), object_pairs_hook=_no_twins)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError(f"a header that is no object of at most {MAX_TENSORS:,} tensors")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a header that names one tensor twice")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
