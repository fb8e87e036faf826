"""Changes of stored values: shapes stay, the distribution is as said, off changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from frostline.errors import ConfigError, FrontierError
from frostline.frontier.feature_augment import (
    STEPS,
    FeatureAugment,
    Step,
    kind_of,
    read_feature_augment,
)
from generators import generator_states

SHAPES = {"vector": (16,), "tokens": (9, 8), "map": (4, 6, 6), "map-last": (6, 6, 4)}
ALL = "noise=0.3,drop=0.2,flip,shift=0.2,tokens=0.3"


def rows(samples: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    slots = {
        name: torch.randn(samples, *shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }
    return slots | {
        "mask": torch.ones(samples, 1, 9, 9),
        "ids": torch.arange(samples * 9).reshape(samples, 9),
        "label": torch.zeros(samples),
    }


def one(text: str, values: Tensor, seed: int = 0) -> Tensor:
    return read_feature_augment(text)({"x": values}, seed)["x"]


@pytest.mark.parametrize("text", ["noise=0.3", "drop=0.2", "flip", "shift=0.2", "tokens=0.3", ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_types_and_inputs_stay(text, dtype):
    given_rows, untouched = rows(dtype=dtype), rows(dtype=dtype)
    before = generator_states()
    out = read_feature_augment(text)(given_rows, seed=3)
    assert generator_states() == before
    assert list(out) == list(given_rows)
    for name, values in given_rows.items():
        assert torch.equal(values, untouched[name]), "the given tensor was written to"
        assert (out[name].shape, out[name].dtype) == (values.shape, values.dtype)
        if name in ("mask", "ids", "label"):
            assert out[name] is values


@pytest.mark.parametrize("text", ["", "off", " off ", *(f"{name}=0" for name in STEPS)])
def test_off_is_the_identity(text):
    given_rows = rows()
    out = read_feature_augment(text)(given_rows, seed=3)
    assert all(out[name] is given_rows[name] for name in given_rows)


@pytest.mark.parametrize("text", ["noise=0.3", "drop=0.2", "flip", "shift=0.2", "tokens=0.3", ALL])
def test_the_seed_alone_decides(text):
    augment = read_feature_augment(text)
    for seed in range(3):
        once, again, other = augment(rows(), seed), augment(rows(), seed), augment(rows(), seed + 9)
        assert all(torch.equal(once[name], again[name]) for name in once)
        assert any(not torch.equal(once[name], other[name]) for name in once)


@pytest.mark.parametrize(
    ("shape", "channel"), [((8,), 1), ((12, 8), 2), ((8, 5, 5), 1), ((5, 5, 8), 3)]
)
def test_noise_is_a_share_of_each_channels_deviation(shape, channel):
    scale = torch.arange(8.0).reshape([-1 if i == channel else 1 for i in range(len(shape) + 1)])
    values = 100 + scale * torch.randn(4000, *shape, generator=torch.Generator().manual_seed(1))
    noise = (one("noise=0.5", values) - values).movedim(channel, 0).reshape(8, -1)
    assert not noise[0].any(), "a channel that does not vary gets no noise"
    assert torch.allclose(noise[1:].std(1), 0.5 * torch.arange(1.0, 8), rtol=0.05)
    assert (noise[1:].mean(1) / noise[1:].std(1)).abs().max() < 5 / noise.shape[1] ** 0.5
    assert (torch.corrcoef(noise[1:]) - torch.eye(7)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("shape", "channel"), [((50,), 1), ((5, 50), 2), ((50, 4, 4), 1), ((4, 4, 50), 3)]
)
def test_drop_zeroes_whole_channels_and_keeps_the_mean(shape, channel):
    out = one("drop=0.2", torch.ones(400, *shape)).movedim(channel, 1).reshape(400, 50, -1)
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert (out == out[:, :, :1]).all(), "all places of a channel share its fate"
    share = (out[:, :, 0] == 0).float()
    assert abs(share.mean() - 0.2) < 0.02
    assert share.mean(1).std() > 0.02, "each sample draws for itself"


def test_drop_takes_what_is_no_number_along():
    values = torch.full((200, 10), torch.inf)
    out = one("drop=0.5", values)
    assert not out.isnan().any()
    assert 0.4 < (out == 0).float().mean() < 0.6


@pytest.mark.parametrize(("shape", "axis"), [((3, 4, 4), 3), ((4, 4, 3), 2)])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_flip_mirrors_that_share_of_the_samples(shape, axis, share):
    values = torch.randn(2000, *shape, generator=torch.Generator().manual_seed(1))
    out = one(f"flip={share}", values)
    same = (out == values).flatten(1).all(1)
    mirrored = (out == values.flip(axis)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.float().mean() - share) < 0.05


def test_flip_leaves_vectors_and_tokens_alone():
    out = read_feature_augment("flip=1,shift=0.5")(rows(), 0)
    assert torch.equal(out["vector"], rows()["vector"])
    assert torch.equal(out["tokens"], rows()["tokens"])


@pytest.mark.parametrize("last", [False, True])
def test_shift_moves_each_sample_by_whole_cells(last):
    places = torch.arange(100.0).reshape(10, 10)
    values = places[None, None].expand(3000, 2, 10, 10)
    out = one("shift=0.2", values.movedim(1, 3) if last else values)
    out = out.movedim(3, 1) if last else out
    down, right = 5 - out[:, 0, 5, 5] // 10, 5 - out[:, 0, 5, 5] % 10
    for moved in (down, right):
        counts = torch.bincount((moved + 2).long(), minlength=5)
        assert len(counts) == 5
        assert (counts / 3000 - 0.2).abs().max() < 0.04
    assert abs(torch.corrcoef(torch.stack([down, right]))[0, 1]) < 0.1
    for i in range(30):
        row = (torch.arange(10) - down[i].long()).clamp(0, 9)
        column = (torch.arange(10) - right[i].long()).clamp(0, 9)
        assert torch.equal(out[i], values[i][:, row][:, :, column])


def test_all_maps_of_a_sample_move_together():
    coarse = torch.arange(64.0).reshape(8, 8)
    fine = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1)
    slots = {
        "coarse": coarse[None, None].repeat(50, 2, 1, 1),
        "fine": fine[None, None].repeat(50, 3, 1, 1),
        "last": fine[None, :, :, None].repeat(50, 1, 1, 2),
    }
    out = read_feature_augment("flip,shift=0.3")(slots, 4)
    assert not torch.equal(out["coarse"], slots["coarse"])
    twice = out["coarse"][:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(out["fine"][:, :1], twice)
    assert torch.equal(out["last"][..., 0], twice[:, 0])


def test_tokens_are_lost_but_never_the_first():
    out = one("tokens=0.3", torch.ones(500, 21, 4))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert (out == out[:, :, :1]).all(), "a token is lost whole"
    assert out[:, 0].all()
    assert abs((out[:, 1:, 0] == 0).float().mean() - 0.3) < 0.03


def test_slots_of_equal_length_lose_the_same_tokens():
    slots = {"one": torch.ones(40, 20, 4), "two": torch.ones(40, 20, 7)}
    out = read_feature_augment("tokens=0.5")(slots, 1)
    assert torch.equal(out["one"][:, :, 0], out["two"][:, :, 0])


def test_slots_get_noise_of_their_own():
    values = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    for text in ("noise=0.5", "drop=0.5"):
        out = read_feature_augment(text)({"one": values, "two": values}, 1)
        assert not torch.equal(out["one"], out["two"])


def test_an_empty_batch_passes():
    empty = {name: values[:0] for name, values in rows().items()}
    assert all(v.shape[0] == 0 for v in read_feature_augment(ALL)(empty, 0).values())


def test_one_sample_alone_passes():
    for name, values in read_feature_augment(ALL)(rows(1), 0).items():
        assert values.isfinite().all(), name


@pytest.mark.parametrize("text", ["flip", "shift=0.1", "drop=0.1"])
def test_axes_that_the_shape_does_not_tell_are_asked_for(text):
    values = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    with pytest.raises(FrontierError, match="kinds="):
        one(text, values)
    augment = read_feature_augment("flip=1", {"x": "map"})
    assert torch.equal(augment({"x": values}, 0)["x"], values.flip(3))
    augment = read_feature_augment("flip=1", {"x": "map-last"})
    assert torch.equal(augment({"x": values}, 0)["x"], values.flip(2))
    augment = read_feature_augment(ALL, {"x": "other"})
    assert augment({"x": values}, 0)["x"] is values


def test_kinds():
    assert [kind_of(shape) for shape in ((3,), (3, 4), (3, 4, 4), (4, 4, 3), (4, 4, 4))] == [
        "vector", "tokens", "map", "map-last", "map",
    ]  # fmt: skip
    assert [kind_of(shape) for shape in ((), (1, 4, 4), (2, 3, 4, 4))] == ["other"] * 3
    with pytest.raises(ConfigError, match="no kind"):
        read_feature_augment("noise=1", {"x": "picture"})({"x": torch.ones(2, 3)}, 0)  # type: ignore[dict-item]


@given(
    st.lists(
        st.builds(Step, st.sampled_from(sorted(STEPS)), st.floats(0, 0.5)),
        unique_by=lambda step: step.name,
    )
)
def test_what_is_written_is_read_again(steps):
    augment = FeatureAugment(tuple(steps))
    assert read_feature_augment(str(augment)) == augment


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nosie=0.1", "write 'noise'"),
        ("brightness=0.1", "choose from noise"),
        ("noise", "no amount"),
        ("noise=", "no number"),
        ("noise=much", "no number: 'much'"),
        ("noise=nan", "no number"),
        ("noise=inf", "no number"),
        ("noise=-1", "no number"),
        ("noise=1e3", "no number"),
        ("noise=11", "from 0 to 10"),
        ("drop=1", "from 0 to 0.9"),
        ("flip=1.5", "from 0 to 1"),
        ("shift=0.6", "from 0 to 0.5"),
        ("noise=0.1,,flip", "between two commas"),
        ("noise=0.1,", "between two commas"),
        ("=0.1", "between two commas"),
        ("flip,flip", "flip more than once"),
        ("off,flip", "choose from"),
        ("x" * 5000, "5,000 characters"),
    ],
)
def test_what_cannot_be_read_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        read_feature_augment(text)
