"""The zoo through the cache that people use: what a bare region cannot see must be seen here."""

from __future__ import annotations

from pathlib import Path

import pytest

from faulty_disk import QuickDisk, use_disk
from frontier import harness
from frontier.test_zoo import CELLS, named
from frontier.zoo_cache import compare_cached

#: Where a bare region is right, and the cache around it once was not.
ONCE_WRONG = {
    "live code writes into a frozen value",
    "momentum teacher written in the forward pass",
    "scripted submodule",
}
WATCHED = [(case, depth) for case, depth in CELLS if case.name in ONCE_WRONG]
CHANGED = [(case, depth) for case, depth in CELLS if case.needs]


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


@pytest.mark.parametrize(("case", "depth"), named(CHANGED, {}))
def test_what_training_code_changes_between_steps_is_seen(
    case: harness.Case, depth: str, tmp_path: Path
) -> None:
    found, report = compare_cached(case, depth, tmp_path)
    assert found.kind == "equal", found
    assert report is not None
    assert report.replayed >= 1


@pytest.mark.parametrize(("case", "depth"), named(WATCHED, {}))
def test_what_the_cache_does_besides_replaying_changes_nothing(
    case: harness.Case, depth: str, tmp_path: Path
) -> None:
    assert compare_cached(case, depth, tmp_path)[0].kind == "equal"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "depth"), named(CELLS, {}))
def test_the_cache_changes_nothing(case: harness.Case, depth: str, tmp_path: Path) -> None:
    found, report = compare_cached(case, depth, tmp_path)
    assert found.kind in ("equal", "close"), found
    assert report is not None
    assert report.batches == len(harness.SIZES)
