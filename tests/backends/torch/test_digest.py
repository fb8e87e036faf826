"""Digests are of the raw bytes of any tensor, and writes are found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from frostline.backends.torch import digest
from frostline.backends.torch.digest import TensorTable, WriteWatch, sha256_of_tensors
from frostline.errors import BackendError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.complex64, torch.int64, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def raw(tensor: torch.Tensor) -> str:
    """SHA-256 by way of Python lists of bytes."""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype)
    flat.copy_(tensor)
    return hashlib.sha256(bytes(flat.reshape(-1).view(torch.uint8).tolist())).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype(dtype: torch.dtype) -> None:
    tensor = (torch.rand(5, 3) * 3).to(dtype)
    assert sha256_of_tensors({"t": tensor}) == {"t": raw(tensor)}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[::3],
        torch.ones(1).expand(4, 4),
        torch.arange(4.0)[1:],
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["scalar", "empty", "transposed", "strided", "expanded", "offset", "conjugate", "nhwc"],
)
def test_any_shape_and_stride(tensor: torch.Tensor) -> None:
    assert sha256_of_tensors({"t": tensor}) == {"t": raw(tensor)}


def test_every_bit_counts() -> None:
    zero = torch.zeros(3)
    assert sha256_of_tensors({"t": zero}) != sha256_of_tensors({"t": -zero})


def test_reading_changes_nothing() -> None:
    weight = nn.Parameter(torch.randn(3))
    weight.grad = torch.ones(3)
    version = weight._version
    sha256_of_tensors({"t": weight})
    assert (weight._version, weight.requires_grad) == (version, True)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(i): torch.randn(i + 1, 7) for i in range(20)}
    alone = sha256_of_tensors(tensors)
    monkeypatch.setattr(digest, "_THREADED_BYTES", 0)
    monkeypatch.setattr(digest.os, "cpu_count", lambda: 4)
    assert sha256_of_tensors(tensors) == alone == {n: raw(t) for n, t in tensors.items()}


def test_a_tensor_under_two_names_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(digest, "_sha256", lambda name, tensor: read.append(name) or "digest")
    tensor = torch.zeros(2)
    assert sha256_of_tensors({"a": tensor, "b": tensor}) == {"a": "digest", "b": "digest"}
    assert len(read) == 1


class Wrapped(torch.Tensor):
    """Stands for tensors whose bytes are elsewhere (DTensor and its like)."""

    def __tensor_flatten__(self) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="meta"),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.zeros(2).as_subclass(Wrapped),
    ],
    ids=["meta", "sparse", "wrapper"],
)
def test_bytes_that_are_not_here_are_an_error(make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(BackendError, match="digest of 'w'"):
        sha256_of_tensors({"w": make()})


def test_the_table_knows_every_name_of_a_tied_weight() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    table = TensorTable(model)
    assert set(table) == {"0.weight", "1.weight"}
    assert table["0.weight"] is table["1.weight"]


def test_the_table_follows_replaced_tensors() -> None:
    model = nn.BatchNorm1d(2)
    table = TensorTable(model)
    model.running_mean = torch.ones(2)
    assert table["running_mean"] is model.running_mean


@pytest.mark.parametrize("name", ["nothing", "bias.weight", ""])
def test_an_unknown_name_is_an_error(name: str) -> None:
    with pytest.raises(BackendError, match="no parameter or buffer"):
        TensorTable(nn.Linear(2, 2))[name]


def two_blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def watch(model: nn.Module) -> WriteWatch:
    table = TensorTable(model)
    return WriteWatch(table, table)


@torch.no_grad()
def add_one(model: nn.Module) -> None:
    model[0].weight.add_(1)


@torch.no_grad()
def replace_parameter(model: nn.Module) -> None:
    other = nn.Parameter(torch.zeros(2, 2))
    while other._version < model[0].weight._version:
        other.add_(0)
    assert other._version == model[0].weight._version  # so that only identity tells them apart
    model[0].weight = other


def replace_buffer(model: nn.Module) -> None:
    model[1].running_mean = model[1].running_mean * 1


def delete(model: nn.Module) -> None:
    del model[0].weight


@pytest.mark.parametrize("write", [add_one, replace_parameter, delete])
def test_writes_are_named_once(write: Callable[[nn.Module], None]) -> None:
    model = two_blocks()
    watching = watch(model)
    assert watching.look() == []
    write(model)
    assert watching.look() == ["0.bias", "0.weight"]
    assert watching.look() == []


@pytest.mark.parametrize("write", [replace_buffer, lambda model: model(torch.randn(4, 2))])
def test_writes_to_statistics_name_the_whole_layer(write: Callable[[nn.Module], None]) -> None:
    model = two_blocks()
    watching = watch(model)
    write(model)
    assert "1.running_mean" in watching.look()


def through_data(model: nn.Module) -> None:
    model[0].weight.data.add_(1)


@torch.no_grad()
def fused_optimizer(model: nn.Module) -> None:
    model[0].weight.grad = torch.zeros(2, 2)
    torch.optim.AdamW([model[0].weight], fused=True, weight_decay=0.1).step()


@pytest.mark.parametrize("write", [through_data, fused_optimizer])
def test_uncounted_writes_are_found_within_a_round(write: Callable[[nn.Module], None]) -> None:
    model = two_blocks()
    watching = watch(model)
    for _ in range(12):
        assert watching.look() == []
    write(model)
    found = [watching.look() for _ in range(7)]
    assert ["0.bias", "0.weight"] in found


def test_tensors_without_counters_are_watched_by_identity_and_checksum() -> None:
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        model.register_buffer("table", torch.zeros(2))
    watching = watch(model)
    assert [watching.look() for _ in range(4)] == [[]] * 4
    with torch.inference_mode():
        model.table.add_(1)
    assert "table" in [name for _ in range(4) for name in watching.look()]
