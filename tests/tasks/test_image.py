from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frostline.errors import DataError
from frostline.tasks.config import RunConfig
from frostline.tasks.image import ImagePreparation, from_spec, pixel_spec, timm_spec
from frostline.tasks.pictures import check_pictures, open_picture
from generators import generator_states, shake_generators

CONFIG = RunConfig(model="m", data="d")


def photo(width: int = 90, height: int = 70) -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def config(**given: Any) -> RunConfig:
    return RunConfig(model="m", data="d", **given)


# -- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "pixel"),
    [
        (np.full((4, 5), 7, np.uint8), (7, 7, 7)),
        (np.full((4, 5, 1), 7, np.uint8), (7, 7, 7)),
        (np.full((4, 5, 3), 7, np.uint8), (7, 7, 7)),
        (np.full((4, 5, 4), 7, np.uint8), (7, 7, 7)),
        (Image.new("1", (5, 4), 1), (255, 255, 255)),
        (Image.new("L", (5, 4), 9), (9, 9, 9)),
        (Image.new("RGBA", (5, 4), (1, 2, 3, 4)), (1, 2, 3)),
        (Image.new("CMYK", (5, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("I;16", (5, 4), 257 * 9), (9, 9, 9)),
        (Image.new("I", (5, 4), 257 * 9), (9, 9, 9)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(raw: Any, pixel: tuple[int, ...]) -> None:
    picture = open_picture(raw)
    assert (picture.mode, picture.size) == ("RGB", (5, 4))
    assert picture.getpixel((0, 0)) == pixel


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(DataError, match="floating-point"):
        open_picture(Image.new("F", (5, 4)))


def test_a_transparent_palette_opens_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.new("P", (4, 4)).save(path, transparency=b"\x00\x80")
    assert open_picture(path).mode == "RGB"


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    path = tmp_path / "p.jpg"
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    assert open_picture(path).size == (4, 8)


def test_digests_are_of_pixels_and_errors_keep_their_place(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    photo().save(tmp_path / "b.bmp")
    (tmp_path / "c.png").write_bytes(b"x")
    a, b, c, d = check_pictures(
        [tmp_path / "a.png", tmp_path / "b.bmp", tmp_path / "c.png", photo(91)]
    )
    assert a == b != d
    assert isinstance(c, DataError)
    assert "c.png" in str(c)


# -- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "efficientnet_lite0"])
def test_timm_models_get_their_own_transform(name: str) -> None:
    model = timm.create_model(name)
    own = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**own, is_training=False)(photo())
    assert torch.equal(from_spec(timm_spec(own, CONFIG))(photo()), expected)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "efficientnet_b0"])
def test_torchvision_models_get_their_own_transform(name: str) -> None:
    from frostline.tasks.torchvision_source import _spec_of

    own = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    expected = own(photo())
    # Rounding aside: the newer transforms scale before they subtract.
    assert torch.allclose(from_spec(_spec_of(own, CONFIG))(photo()), expected, atol=1e-6)


@pytest.mark.parametrize("size", [8, 33, 64])
def test_an_asked_for_size_shows_the_whole_square(size: int) -> None:
    square = Image.new("RGB", (40, 40), (255, 0, 0))
    square.paste((0, 255, 0), (1, 1, 39, 39))
    base = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    wanted = config(image_size=size, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    for spec in (timm_spec(base, wanted), pixel_spec(wanted)):
        found = from_spec(spec)(square)
        assert found.shape == (3, size, size)
        assert found[0, 0, :].mean() > found[0, size // 2, size // 2]  # the red border is there


def test_mean_and_std_are_of_pixels_in_0_to_1() -> None:
    wanted = config(image_size=8, image_mean=(127 / 255,) * 3, image_std=(128 / 255,) * 3)
    found = from_spec(pixel_spec(wanted))(Image.new("RGB", (8, 8), (255, 127, 0)))
    assert torch.allclose(found[:, 0, 0], torch.tensor([1.0, 0.0, -127 / 128]), atol=1e-6)


# -- views -------------------------------------------------------------------------------------


def preparation(augment: Any, seed: int = 0) -> ImagePreparation:
    wanted = config(image_size=16, augment=augment, seed=seed)
    return from_spec(pixel_spec(wanted)).configured(wanted)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["none", "flip", "basic"]),
    st.integers(0, 10**6),
    st.none() | st.integers(0, 2**63),
    st.integers(0, 2**32 - 1),
)
def test_a_sample_is_a_pure_function_of_index_and_view(
    augment: str, index: int, view: int | None, state: int
) -> None:
    prepare = preparation(augment)
    first = prepare(photo(), index, view)
    shake_generators(state)
    before = generator_states()
    there = pickle.loads(pickle.dumps(prepare))  # noqa: S301  what a worker process receives
    assert torch.equal(first, there(photo(), index, view))
    assert generator_states() == before


def test_views_differ_by_index_view_and_seed() -> None:
    prepare, other = preparation("basic"), preparation("basic", seed=1)
    samples = [prepare(photo(), 0, 0), prepare(photo(), 1, 0), prepare(photo(), 0, 1)]
    samples.append(other(photo(), 0, 0))
    assert all(not torch.equal(a, b) for i, a in enumerate(samples) for b in samples[i + 1 :])


def test_flips_are_left_right_and_come_up_half_the_time() -> None:
    prepare = preparation("flip")
    plain = prepare(photo(), 0, None)
    views = [prepare(photo(40, 40), 0, v) for v in range(200)]
    plain = prepare(photo(40, 40), 0, None)
    flipped = plain.flip(2)
    kinds = [torch.allclose(v, plain, atol=1e-6) for v in views]
    # Resizing is symmetric only up to rounding of 8-bit pixels.
    others = [v for v, is_plain in zip(views, kinds, strict=True) if not is_plain]
    assert all((v - flipped).abs().max() < 0.05 for v in others)
    assert 60 < sum(kinds) < 140


def test_crops_keep_at_least_half_of_the_picture() -> None:
    from frostline.tasks.image import _augmented

    sizes = []
    for seed in range(50):
        torch.manual_seed(seed)
        width, height = _augmented(photo(100, 80)).size
        sizes.append(width * height / 8000)
    assert 0.48 < min(sizes) < 0.7
    assert max(sizes) <= 1


def test_without_a_view_nothing_is_random() -> None:
    plain, augmented = preparation("none"), preparation("basic")
    assert torch.equal(plain(photo(), 3, None), augmented(photo(), 3, None))
    assert torch.equal(plain(photo(), 3, None), plain(photo(), 3, 17))
