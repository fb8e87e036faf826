"""The clock's word on the cache: only what is known well enough is held against it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.frontier.balance import ENOUGH_READINGS, Balance

SECONDS = st.floats(1e-9, 1e3)


def balance(computing_s: float, reading_s: float, readings: int = ENOUGH_READINGS) -> Balance:
    """A balance in which each sample took so long."""
    made = Balance()
    made.add_computed(64, 64 * computing_s)
    for _ in range(readings):
        made.add_read(8, 8 * reading_s)
    return made


@given(SECONDS, SECONDS)
def test_reading_that_takes_longer_is_a_loss(one: float, other: float) -> None:
    shorter, longer = sorted((one, 2 * other + one))
    assert balance(longer, shorter).loss is None
    assert balance(shorter, longer).loss is not None
    saved = balance(longer, shorter).saved_s
    assert saved == pytest.approx(longer - shorter, rel=1e-6, abs=1e-12 * max(1.0, longer))


def test_a_few_readings_say_nothing() -> None:
    assert balance(1.0, 5.0, ENOUGH_READINGS - 1).loss is None
    assert balance(1.0, 5.0).loss is not None


def test_where_nothing_was_computed_nothing_is_compared() -> None:
    found = Balance()
    for _ in range(2 * ENOUGH_READINGS):
        found.add_read(8, 1.0)
    assert (found.saved_s, found.loss) == (None, None)


def test_the_figures_are_said() -> None:
    assert balance(0.0001, 0.00025).loss == (
        "reading a stored sample takes 0.25 ms, computing it takes 0.1 ms"
    )
