"""The backend holds the contract, and each rule of its own."""

from __future__ import annotations

from backends.torch.helpers import TorchCase
from frostline.testing import check_backend


def test_torch_backend_holds_the_contract() -> None:
    check_backend(TorchCase)


def test_releasing_optimizer_state_holds_the_contract() -> None:
    check_backend(lambda: TorchCase(optimizer_state="release"))
