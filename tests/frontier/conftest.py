"""The zoo fills one list on import: collecting its files for examples would do so twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from frostline.frontier.library import Library

collect_ignore_glob = ["zoo*.py"]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """An empty folder of stores."""
    return Library(tmp_path / "stores")
