"""The Keras backend holds the contract, and the contract catches a Keras backend that does not."""

from __future__ import annotations

import pytest

from frostline.testing import check_backend
from keras_suite.keras_case import KerasCase


def test_keras_backend_holds_the_contract() -> None:
    check_backend(KerasCase)
