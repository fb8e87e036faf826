"""Reports rest on records alone, so no disk of these tests needs to be slow."""

from __future__ import annotations

import pytest

from faulty_disk import QuickDisk, use_disk


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield
