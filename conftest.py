"""No test touches the user's own cache of stored outputs."""

from __future__ import annotations

import os
import tempfile

from hypothesis import settings

# On a busy machine any example may take long; no test asserts how long anything takes.
settings.register_profile("frostline", deadline=None)
settings.load_profile("frostline")

# Keras is asked for by naming the backend it is to run on, once per process: see tests/keras_suite.
collect_ignore_glob = (
    []
    if os.environ.get("KERAS_BACKEND")
    else [
        "tests/keras_suite/*",
        "src/frostline/backends/keras/*",
        "src/frostline/frontier/keras/*",
        "src/frostline/integrations/keras.py",
    ]
)

_place = tempfile.TemporaryDirectory(prefix="frostline-tests-")


def pytest_configure() -> None:
    """Tests, and the processes they start, keep stored outputs in a folder of this run."""
    os.environ["FROSTLINE_CACHE"] = os.path.join(_place.name, "stores")


def pytest_unconfigure() -> None:
    """Remove it."""
    _place.cleanup()
