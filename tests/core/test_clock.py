from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.clock import Duration, Progress
from frostline.errors import DurationError

units = st.sampled_from(["st", "ep", "%"])


@given(st.integers(0, 10**9), units)
def test_parse_and_print_are_inverse(value: int, unit: str) -> None:
    text = f"{value}{unit}"
    assert str(Duration.parse(text)) == text
    assert Duration.parse(Duration.parse(text)) == Duration.parse(text)


@pytest.mark.parametrize(
    "text", ["3", "ep", "-1ep", "1 epoch", "1.5st", "", "nan%", "1e3st", "٣ep", "1ep2st", None, 3]
)
def test_what_has_no_clear_unit_is_refused(text: object) -> None:
    with pytest.raises(DurationError):
        Duration.parse(text)  # type: ignore[arg-type]


def test_a_bare_number_says_so() -> None:
    with pytest.raises(DurationError, match="bare number"):
        Duration.parse("3")


@given(st.integers(1, 500), st.integers(1, 50), st.integers(0, 100))
def test_shares_and_epochs_agree(per_epoch: int, epochs: int, percent: int) -> None:
    progress = Progress(0, per_epoch * epochs, per_epoch)
    share = Duration.parse(f"{percent}%").steps(progress)
    assert 0 <= share <= per_epoch * epochs
    assert share == -(-per_epoch * epochs * percent // 100)  # ceiling, exact
    assert Duration.parse(f"{epochs}ep").steps(progress) == Duration.parse("100%").steps(progress)


@given(st.integers(0, 1000), st.integers(0, 1000), units, st.integers(0, 40))
def test_reached_is_monotone(a: int, b: int, unit: str, value: int) -> None:
    early, late = sorted((a, b))
    duration = Duration.parse(f"{value}{unit}")
    if Progress(early, 1000, 25).reached(duration):
        assert Progress(late, 1000, 25).reached(duration)


def test_ten_tenths_are_one_epoch() -> None:
    """Exact fractions: 0.1 is not rounded, so boundaries cannot drift."""
    progress = Progress(0, None, 10)
    assert [Duration.parse(f"0.{n}ep").steps(progress) for n in range(1, 10)] == list(range(1, 10))


@pytest.mark.parametrize("text", ["1ep", "30%"])
def test_unknown_totals_are_named(text: str) -> None:
    with pytest.raises(DurationError, match=r"steps_per_epoch|total_steps"):
        Duration.parse(text).steps(Progress(3))


@given(st.integers(0, 100), st.integers(0, 100))
def test_rebased_clock(step: int, boundary: int) -> None:
    moved = Progress(step + boundary, 300, 10).since(boundary)
    assert (moved.step, moved.total_steps, moved.steps_per_epoch) == (step, 300 - boundary, 10)


def test_progress_fractions() -> None:
    assert Progress(5, 20, 10).fraction == 0.25
    assert Progress(25, 20, 10).fraction == 1.0
    assert Progress(5).fraction is None
    assert Progress().step == Progress(3).epoch == 0
    assert Progress(5, 20).remaining_steps == 15
    assert Progress(19, 100, 10).epoch == 1
    assert Progress(20, 100, 10).epoch == 2


@pytest.mark.parametrize("values", [(-1, None, None), (0, 0, None), (0, None, -3)])
def test_impossible_progress(values: tuple[int, int | None, int | None]) -> None:
    with pytest.raises(DurationError):
        Progress(*values)
