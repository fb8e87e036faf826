"""Rows on their way to a device: a GPU is never waited for. No GPU is needed to see that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.frontier import cache
from frostline.frontier.arrays import sent, wait_for

CUDA = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of tensors; nothing is moved."""
    found: list[Any] = []

    def pin_memory(self: Tensor) -> Tensor:
        found.append("pinned")
        return self

    def to(self: Tensor, *given: Any, **named: Any) -> Tensor:
        found.append((given, named))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    return found


def test_main_memory_goes_to_a_gpu_without_waiting(calls: list[Any]) -> None:
    sent(torch.ones(2), CUDA)
    assert calls == ["pinned", ((CUDA, torch.float32), {"non_blocking": True})]


def test_batches_go_to_a_gpu_the_same_way(calls: list[Any]) -> None:
    cache.moved(cache.Example((torch.ones(2),)), CUDA)
    assert calls[0] == "pinned"


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("meta")])
def test_elsewhere_nothing_is_pinned(calls: list[Any], device: torch.device) -> None:
    sent(torch.ones(2), device)
    assert calls == [((device, torch.float32), {})]


ODD = {
    "parameter": nn.Parameter(torch.ones(2)),
    "sparse": torch.eye(2).to_sparse(),
    "without values": torch.empty(2, device="meta"),
    "with a gradient": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_pinned_is_moved_as_ever(calls: list[Any], kind: str) -> None:
    sent(ODD[kind], CUDA)
    assert calls == [((CUDA, torch.float32), {})]


def test_the_clock_of_filling_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    wait_for(torch.device("cpu"))
    assert waited == []
    wait_for(CUDA)
    assert waited == [CUDA]
