from __future__ import annotations

import pickle

import pytest

from frostline import errors
from frostline.errors import FrostlineError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FrostlineError)
]


def test_the_docstring_draws_the_whole_tree() -> None:
    drawing = errors.__doc__ or ""
    assert all(kind.__name__ in drawing for kind in KINDS)
    assert sorted(errors.__all__) == sorted(kind.__name__ for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_three_things_and_survives_a_process_boundary(
    kind: type[FrostlineError],
) -> None:
    error = kind("do it", found="a stone", fix="bring bread")
    assert str(error) == "cannot do it\n  found: a stone\n  try:   bring bread"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes, as workers send them
    assert type(again) is kind
    assert str(again) == str(error)


def test_exit_codes() -> None:
    assert errors.SelectorMatchedNothing("a", found="b").exit_code == 2
    assert errors.DataError("a", found="b").exit_code == 1
