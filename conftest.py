"""No test touches the user's own cache of stored outputs."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest
from hypothesis import settings

# On a busy machine any example may take long; no test asserts how long anything takes.
settings.register_profile("frostline", deadline=None)
settings.load_profile("frostline")

# Keras is asked for by naming the backend it is to run on, once per process: see tests/keras_suite.
KERAS = bool(os.environ.get("KERAS_BACKEND"))
KERAS_PLACES = [
    "tests/keras_suite/*",
    "src/frostline/backends/keras/*",
    "src/frostline/frontier/keras/*",
    "src/frostline/integrations/keras.py",
]
collect_ignore_glob = [] if KERAS else KERAS_PLACES
#: Keras's PyTorch backend reads tensors in a way that NumPy 2 warns of.
NOT_OURS = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"

if KERAS:
    # Bits must be the same on every machine, and nobody reads TensorFlow's greetings.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

_place = tempfile.TemporaryDirectory(prefix="frostline-tests-")


def pytest_configure() -> None:
    """Tests, and the processes they start, keep stored outputs in a folder of this run."""
    os.environ["FROSTLINE_CACHE"] = os.path.join(_place.name, "stores")
    # A job in the background of a script is started deaf to Ctrl-C, which some tests send.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Keras's own warnings pass where Keras runs."""
    for item in items if KERAS else ():
        item.add_marker(pytest.mark.filterwarnings(NOT_OURS))


def pytest_unconfigure() -> None:
    """Remove it."""
    _place.cleanup()
