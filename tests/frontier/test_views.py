"""Views: fresh ones first, then each sample's own order; a pure function of seed, epoch, index."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import ConfigError
from frostline.frontier.views import MAX_VIEWS, Views
from generators import generator_states

counts = st.integers(1, 12)
seeds = st.integers(0, 2**63 - 1)


def table(views: Views, epochs: range, samples: int) -> np.ndarray:
    """(epochs, samples)."""
    return np.stack([views.of(epoch, np.arange(samples)) for epoch in epochs])


@given(counts, seeds)
def test_each_sample_sees_each_view_once_in_each_round(count, seed):
    views = Views(count, seed)
    for first in (0, count, 5 * count):
        seen = table(views, range(first, first + count), 20)
        assert (np.sort(seen, axis=0) == np.arange(count)[:, None]).all()


@given(counts, seeds)
def test_the_first_epochs_use_one_fresh_view_for_all_samples(count, seed):
    seen = table(Views(count, seed), range(count), 20)
    assert (seen == np.arange(count)[:, None]).all()


@given(st.integers(2, 12), seeds)
def test_no_view_comes_twice_running(count, seed):
    seen = table(Views(count, seed), range(6 * count), 50)
    assert (seen[1:] != seen[:-1]).all()


@given(counts, seeds, st.lists(st.integers(0, 10_000), max_size=20), st.integers(0, 60))
def test_an_index_gets_the_same_view_whoever_asks_with_it(count, seed, indices, epoch):
    views = Views(count, seed)
    together = views.of(epoch, np.array(indices, dtype=np.int64))
    assert together.dtype == np.int64
    assert together.tolist() == [views.of(epoch, i) for i in indices]
    assert together.tolist() == Views(count, seed).of(epoch, indices).tolist()


def test_nothing_is_drawn_from_the_global_generators():
    before = generator_states()
    Views(4, 3).of(17, np.arange(100))
    assert generator_states() == before


@pytest.mark.parametrize("count", [3, 4, 7])
def test_later_orders_are_as_likely_as_each_other(count):
    """Within a round every order is drawn alike, but for the border that keeps views apart."""
    samples = 40_000
    seen = table(Views(count, 5), range(3 * count, 4 * count), samples)
    for place in range(count):
        shares = np.bincount(seen[place], minlength=count) / samples
        assert np.abs(shares - 1 / count).max() < 5 * np.sqrt(1 / count / samples)
    pairs = seen[count - 2] * count + seen[count - 1]
    shares = np.bincount(pairs, minlength=count**2).reshape(count, count) / samples
    assert (shares.diagonal() == 0).all()
    # The first view of a round depends on the round before, which is as even as this one.
    off = shares[~np.eye(count, dtype=bool)]
    assert np.abs(off - 1 / (count * (count - 1))).max() < 0.01


def test_samples_rounds_and_seeds_have_orders_of_their_own():
    rounds = [table(Views(6, seed), range(6 * c, 6 * c + 6), 200)
              for seed, c in itertools.product((0, 1), (1, 2))]  # fmt: skip
    assert len({tuple(order) for order in rounds[0].T.tolist()}) > 100
    for one, other in itertools.combinations(rounds, 2):
        assert (one == other).mean() < 0.3


def test_two_views_alternate():
    assert table(Views(2, 9), range(6), 1).ravel().tolist() == [0, 1, 0, 1, 0, 1]


def test_one_view_is_always_the_same():
    assert not table(Views(1), range(5), 10).any()


def test_shapes_follow_the_indices():
    views = Views(3)
    assert views.of(4, np.zeros((2, 3), int)).shape == (2, 3)
    assert views.of(4, []).shape == (0,)
    assert type(views.of(4, 1)) is int
    assert type(views.of(4, np.int64(1))) is int


@pytest.mark.parametrize(
    ("views", "sentence"),
    [
        (Views(), "once, without augmentation"),
        (Views(augmented=True), "in 1 augmented view, the same in every epoch"),
        (Views(2), "in 2 augmented views; epoch 3 on alternates between them"),
        (Views(4), "in 4 augmented views; epoch 5 on reuses them in random order"),
    ],
)
def test_the_choice_is_said_in_one_sentence(views, sentence):
    assert views.describe() == f"each sample is stored {sentence}"


def test_what_views_hold_depends_on_the_seed_only_where_something_is_drawn():
    assert Views(2, 1).identity == Views(5, 1).identity != Views(2, 2).identity
    assert Views(1, 1).identity == Views(1, 2).identity
    assert Views(1).identity != Views(1, augmented=True).identity
    assert Views(3, 4).seed_of(1, 2) == Views(9, 4).seed_of(1, 2)
    seeds = {Views(3, s).seed_of(i, v) for s in range(4) for i in range(20) for v in range(4)}
    assert len(seeds) == 4 * 20 * 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": 0}, "from 1 to"),
        ({"count": MAX_VIEWS + 1}, "from 1 to"),
        ({"count": True}, "from 1 to"),
        ({"count": 2.0}, "a float"),
        ({"seed": -1}, "from 0 to"),
        ({"seed": 2**63}, "from 0 to"),
        ({"order": "shuffled"}, "unknown order"),
        ({"count": 2, "augmented": False}, "all be equal"),
    ],
)
def test_a_wrong_choice_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Views(**wrong)


def test_epochs_are_not_negative():
    with pytest.raises(ConfigError, match="epoch -1"):
        Views(2).of(-1, 0)
