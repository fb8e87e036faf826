"""No test touches the user's own cache of stored outputs."""

from __future__ import annotations

import os
import tempfile

from hypothesis import settings

# On a busy machine any example may take long; no test asserts how long anything takes.
settings.register_profile("frostline", deadline=None)
settings.load_profile("frostline")

_place = tempfile.TemporaryDirectory(prefix="frostline-tests-")


def pytest_configure() -> None:
    """Tests, and the processes they start, keep stored outputs in a folder of this run."""
    os.environ["FROSTLINE_CACHE"] = os.path.join(_place.name, "stores")


def pytest_unconfigure() -> None:
    """Remove it."""
    _place.cleanup()
