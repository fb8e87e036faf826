"""Tensors of a model by name: where they are now, whether they were written to, their SHA-256.

Names are looked up again at every use. A frozen weight that somebody replaces by another tensor
is therefore found just like one that somebody writes to.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frostline.errors import BackendError

__all__ = ["TensorTable", "WriteWatch", "sha256_of_tensors", "unwrapped"]

#: How much of a tensor is checked in passing: some ten microseconds.
_HEAD_BYTES = 32 << 10
#: Below this, starting threads costs more than it saves (measured: see benchmarks/overhead.py).
_THREADED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of one tensor: a module's live dictionary, and the key in it."""

    table: Mapping[str, Tensor | None]
    key: str

    @property
    def tensor(self) -> Tensor | None:
        # The tables of a TorchScript module have no `get`.
        return self.table[self.key] if self.key in self.table else None  # noqa: SIM401


class TensorTable:
    """Every parameter and buffer of a model under every name it has, always as it is now.

    Args:
        root: the model; wrappers around it leave no trace in the names.

    Example:
        >>> table = TensorTable(nn.Linear(2, 1))
        >>> table["bias"].shape
        torch.Size([1])
    """

    def __init__(self, root: nn.Module) -> None:
        self._slots = {
            f"{path}.{key}" if path else key: _Slot(table, key)
            for path, module in unwrapped(root).named_modules(remove_duplicate=False)
            for table in _live_tables(module)
            for key, tensor in table.items()
            if tensor is not None
        }

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            BackendError: the model has none.
        """
        slot = self._slots.get(name)
        tensor = None if slot is None else slot.tensor
        if tensor is None:
            raise BackendError(
                f"find the tensor {name!r}",
                found="no parameter or buffer of that name in the model",
                fix="find the layer groups again after changing the model's modules",
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def slots(self, names: Iterable[str]) -> list[_Slot]:
        """The places of these tensors, for repeated fast look-ups.

        Raises:
            BackendError: the model has no tensor of one of these names.
        """
        return [self._slots[name] for name in names if self[name] is not None]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile` and data-parallel wrappers.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    inner = model
    while True:
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif (compiled := dict(inner.named_children()).get("_orig_mod")) is not None:
            inner = compiled  # a compiled module's only child; its prefix in every state_dict
        else:
            return inner


class WriteWatch:
    """Says which of a set of tensors were written to or replaced since it last looked.

    Every look compares autograd's version counters, a few dozen nanoseconds a tensor. Writes
    through `.data`, by fused optimizers and by some kernels are not counted, so every look also
    compares the checksum of the head of one tensor in main memory with that of a round ago.

    Args:
        table: the tensors of the model.
        names: which of them to watch.
    """

    def __init__(self, table: TensorTable, names: Iterable[str]) -> None:
        self._names = sorted(names)
        self._slots = table.slots(self._names)
        self._seen = [slot.tensor for slot in self._slots]
        self._versions = [_version(tensor) for tensor in self._seen]
        near = [i for i, tensor in enumerate(self._seen) if _is_near(tensor)]
        self._patrol = itertools.cycle(near)
        self._checksums: dict[int, int] = {}

    def look(self) -> list[str]:
        """Names of tensors written to or replaced since the last look.

        With a tensor come all watched tensors of the same module: normalisation kernels count
        the write to one of their statistics only.
        """
        now = [slot.tensor for slot in self._slots]
        versions = [_version(tensor) for tensor in now]
        before, self._seen = self._seen, now
        old, self._versions = self._versions, versions
        changed = self._patrolled()
        if versions != old or any(map(operator.is_not, now, before)):
            changed += [
                i for i in range(len(now)) if versions[i] != old[i] or now[i] is not before[i]
            ]
        homes = {self._names[i].rpartition(".")[0] for i in changed}
        return [n for n in self._names if n.rpartition(".")[0] in homes] if homes else []

    def _patrolled(self) -> list[int]:
        """The next tensor on the round, if its head is not what it was."""
        i = next(self._patrol, -1)
        tensor = self._seen[i] if i >= 0 else None
        if tensor is None or not _is_near(tensor):
            return []
        head = tensor.detach().reshape(-1)[: _HEAD_BYTES // tensor.element_size()]
        checksum = zlib.crc32(head.view(torch.uint8).numpy().data)
        return [i] if self._checksums.setdefault(i, checksum) != checksum else []


def sha256_of_tensors(
    tensors: Mapping[str, Tensor], *, workers: int | None = None
) -> dict[str, str]:
    """SHA-256 (hex) of the raw bytes of each tensor, in row-major order.

    Args:
        tensors: by name; one given under several names is read once.
        workers: threads, >= 1; None: one per core if there is enough to read.

    Raises:
        BackendError: a tensor whose bytes are not all here (meta, distributed, sparse, quantized).

    Example:
        >>> sha256_of_tensors({"zero": torch.zeros(())})["zero"][:8]
        'df3f6198'
    """
    distinct = {id(t): (name, t) for name, t in tensors.items()}
    work = sorted(distinct.values(), key=lambda item: -item[1].numel() * item[1].element_size())
    if workers is None:
        size_bytes = sum(t.numel() * t.element_size() for _, t in work)
        workers = (os.cpu_count() or 1) if size_bytes >= _THREADED_BYTES else 1
    if workers == 1:
        digests = [_sha256(name, t) for name, t in work]
    else:
        with ThreadPoolExecutor(workers) as pool:
            digests = list(pool.map(lambda item: _sha256(*item), work))
    by_id = {id(t): digest for (_, t), digest in zip(work, digests, strict=True)}
    return {name: by_id[id(t)] for name, t in tensors.items()}


def _sha256(name: str, tensor: Tensor) -> str:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        raise _unreadable(name, f"a tensor on {tensor.device} with layout {tensor.layout}")
    if hasattr(tensor, "__tensor_flatten__"):  # the protocol of wrapping subclasses, e.g. DTensor
        raise _unreadable(name, f"a {type(tensor).__name__}, whose bytes are spread or wrapped")
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = plain.view(torch.uint8).cpu().numpy()
    return hashlib.sha256(data.data, usedforsecurity=False).hexdigest()


def _unreadable(name: str, found: str) -> BackendError:
    return BackendError(
        f"take the digest of {name!r}",
        found=found,
        fix="materialise the model before training, or run with prove=False",
    )


def _live_tables(module: nn.Module) -> tuple[Mapping[str, Tensor | None], ...]:
    # Private, because torch has no public live view: `named_parameters()` walks the whole model,
    # and buffers are replaced by assignment, so a stored tensor would go stale.
    return module._parameters, module._buffers  # noqa: SLF001


def _is_near(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not hasattr(tensor, "__tensor_flatten__")
        and tensor.is_contiguous()
        and not tensor.is_quantized
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
    )


def _version(tensor: Tensor | None) -> int:
    # Private, because torch has no public form; its documentation of in-place correctness checks
    # ("a tensor keeps a version counter") names this attribute. Inference tensors have none.
    if tensor is None or tensor.is_inference():
        return -1
    return tensor._version  # noqa: SLF001
