"""Keras models by name and from files: what is built, with which weights, on which pixels."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from frostline.backends.keras.names import tensors
from frostline.errors import ModelError
from frostline.tasks.built import Built
from frostline.tasks.config import RunConfig
from frostline.tasks.keras_pixels import applications, pixels_of_application
from frostline.tasks.models import build_model, rebuild_model
from generators import generator_states
from shared import shared

L = keras.layers
LABELS = ("a", "b", "c")
SMALL = "keras:MobileNet:alpha=0.25"


def build(model: str | Path, *, labels: tuple[str, ...] = LABELS, **settings: Any) -> Built:
    config = RunConfig(model=str(model), data="d", **{"image_size": 32} | settings)
    return build_model(config, kind="image", labels=labels)


def file(path: Path, *, labels: tuple[str, ...] = LABELS, **settings: Any) -> Built:
    return build(path, labels=labels, **{"image_size": None} | settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def pictures(side: int = 32) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))


# -- applications --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MobileNet:alpha=0.25", "MobileNetV2:alpha=0.35", "ResNet50V2"])
def test_a_named_model_has_an_output_per_label_and_its_own_head(name: str) -> None:
    built = build(f"keras:{name}", weights="random")
    assert built.head == "predictions"
    assert not built.model.training
    assert built.model(pictures()).shape == (3, 3)
    assert len(built.fresh) == len(list(built.model.parameters()))
    assert json.loads(json.dumps(built.spec)) == built.spec


def test_seeds_decide_fresh_weights_and_names_do_not_count_through_the_process() -> None:
    states = generator_states()
    first, again, other = (build(SMALL, weights="random", seed=s).model for s in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert first.state_dict().keys() == other.state_dict().keys()
    assert [n for n, _ in first.named_modules()] == [n for n, _ in other.named_modules()]
    assert generator_states() == states


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("MobilNet", r"no model of that name.*did you mean MobileNet"),
        ("MobileNet:alpha", r"'alpha' where an option belongs"),
        ("MobileNet:classes=3", r"'classes=3' where an option belongs"),
        ("MobileNet:alpha=wide", r"'alpha=wide', which is no float"),
        ("MobileNet:alpha=0.25:alpha=1", r"alpha=1' where"),
        ("VGG16:alpha=1", r"'alpha=1' where"),
        ("MobileNetV3Small:minimalistic=2", "which is no bool"),
    ],
)
def test_bad_names_and_options_say_what_would_work(name: str, found: str) -> None:
    with pytest.raises(ModelError, match=found):
        build(f"keras:{name}", weights="random")


def test_too_small_pictures_are_an_error_of_ours() -> None:
    with pytest.raises(ModelError, match="image_size"):
        build("keras:MobileNet", weights="random", image_size=16)


def test_texts_are_refused() -> None:
    config = RunConfig(model="keras:MobileNet", data="d")
    with pytest.raises(ModelError, match="no folder of a preset"):
        build_model(config, kind="text", labels=LABELS)


def test_a_failed_download_says_what_works_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, weights: str | None, **__: Any) -> None:
        assert weights == "imagenet"
        raise Exception("URL fetch failure on https://...: None -- no route")  # noqa: TRY002

    monkeypatch.setattr(keras.applications, "MobileNet", offline)
    with pytest.raises(ModelError, match=r"URL fetch failure.*\n.*weights: random"):
        build("keras:MobileNet")


def test_a_process_with_another_backend_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ModelError, match=r"backend 'jax' in this process\n.*KERAS_BACKEND=torch"):
        build(SMALL, weights="random")


@pytest.mark.parametrize("name", applications(keras))
def test_pixels_are_what_preprocess_input_makes_of_them(name: str) -> None:
    pixels = pixels_of_application(keras, name)
    raw = torch.randint(0, 256, (3, 5, 5), generator=torch.Generator().manual_seed(1)).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (pixels.mean, pixels.std))
    ours = (raw / 255 - mean) / std
    if pixels.channels == "bgr":
        ours = ours.flip(0)
    home = importlib.import_module(getattr(keras.applications, name).__module__)
    wanted = home.preprocess_input(raw.permute(1, 2, 0).numpy()[None].copy())
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy()[None], wanted, atol=2e-4)


def test_the_channels_and_pixels_are_in_the_notes() -> None:
    built = build("keras:VGG16", weights="random")
    assert "vgg16.preprocess_input" in built.notes["pixels"]
    assert built.spec["plan"]["channels"] == "bgr"


# -- weights -------------------------------------------------------------------------------------


def h5_of(path: Path, body: Any, *, extra: bool = False) -> Path:
    """Weights in the layout that Keras 2 wrote."""
    layers = [layer for layer in body.layers if layer.weights]
    with h5py.File(path, "w") as out:
        names = [layer.name for layer in layers] + ["fc"] * extra
        out.attrs["layer_names"] = [n.encode() for n in names]
        for layer in layers:
            group = out.create_group(layer.name)
            values = [*layer.trainable_weights, *layer.non_trainable_weights]
            labels = [f"{layer.name}/{i}:0" for i in range(len(values))]
            group.attrs["weight_names"] = [n.encode() for n in labels]
            for label, value in zip(labels, values, strict=True):
                group[label] = value.value.detach().numpy()
        if extra:
            group = out.create_group("fc")
            group.attrs["weight_names"] = [b"fc/kernel:0"]
            group["fc/kernel:0"] = np.zeros((2, 2))
    return path


def test_weights_by_our_names_by_keras_names_and_of_old_files_are_the_same(tmp_path: Path) -> None:
    source = build(SMALL, weights="random", seed=5, labels=tuple("abcdefg"))
    ours = tmp_path / "ours.safetensors"
    safetensors.torch.save_model(source.model, str(ours))
    body = source.model.calls.layer
    theirs = tmp_path / "theirs.safetensors"
    named = {n: v.value.detach().contiguous() for n, v in tensors(body).items()}
    safetensors.torch.save_file(named, str(theirs))
    old = h5_of(tmp_path / "old.h5", body, extra=True)
    found = [build(SMALL, weights=path) for path in (ours, theirs, old)]
    for built in found:
        assert built.fresh == ("predictions.bias", "predictions.weight")
        for name, tensor in source.model.state_dict().items():
            if name not in built.fresh:
                assert torch.equal(built.model.state_dict()[name], tensor), name
    whole = build(SMALL, weights=ours, labels=tuple("abcdefg"))
    assert whole.fresh == ()
    assert same(whole.model, source.model)


def test_a_head_by_keras_names_is_turned_round(tmp_path: Path) -> None:
    source = build(SMALL, weights="random", seed=5).model
    whole = tmp_path / "whole.safetensors"
    named = {n: v.value.detach().contiguous() for n, v in tensors(source.to_keras()).items()}
    safetensors.torch.save_file(named, str(whole))
    built = build(SMALL, weights=whole)
    assert built.fresh == ()
    assert same(built.model, source)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    body = build(SMALL, weights="random").model.calls.layer
    path = h5_of(tmp_path / "w.h5", body)
    with pytest.raises(ModelError, match=r"for the layer 'conv1'.*\n.*alpha"):
        build("keras:MobileNet:alpha=0.5", weights=path)
    with pytest.raises(ModelError, match="'nothing' of the file"):
        build("keras:MobileNet:alpha=0.25:depth_multiplier=2", weights=h5_shortened(path))


def h5_shortened(path: Path) -> Path:
    with h5py.File(path, "a") as file:
        file.attrs["layer_names"] = []
    return path


def test_the_file_of_imagenet_gives_what_keras_gives() -> None:
    path = shared("models/mobilenet025_keras_imagenet/mobilenet_2_5_224_tf_no_top.h5")
    built = build(SMALL, weights=path, image_size=64)
    wanted = keras.applications.MobileNet(
        input_shape=(64, 64, 3), alpha=0.25, include_top=False, pooling="avg", weights=str(path)
    )
    x = pictures(64) * 2 - 1
    with torch.no_grad():
        scores = built.model(x)
        features = wanted(x.permute(0, 2, 3, 1), training=False)
        assert torch.equal(built.model.head(features), scores)


# -- files ---------------------------------------------------------------------------------------


def test_a_file_whose_classes_are_ours_keeps_its_head(tiny_file: Path) -> None:
    built = file(tiny_file, labels=("a", "b"))
    assert built.head == "out"
    assert built.fresh == ()
    assert built.spec["preparation"]["crop"] == 16
    assert "0 to 255" in built.notes["pixels"]
    x = 255 * pictures(16)
    wanted = keras.saving.load_model(tiny_file).predict(x.permute(0, 2, 3, 1).numpy(), verbose=0)
    np.testing.assert_allclose(built.model(x).softmax(1).detach().numpy(), wanted, atol=1e-6)


def test_other_classes_get_a_head_of_their_own(tiny_file: Path) -> None:
    built = file(tiny_file)
    assert built.fresh == ("out.bias", "out.weight")
    kept = file(tiny_file, labels=("a", "b"))
    ours, theirs = built.model.state_dict(), kept.model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n not in built.fresh)


def test_random_weights_keep_only_the_architecture(tiny_file: Path) -> None:
    one, two = (file(tiny_file, weights="random", seed=s).model for s in (0, 0))
    assert same(one, two)
    assert not torch.equal(
        one.state_dict()["conv0.kernel"], file(tiny_file).model.state_dict()["conv0.kernel"]
    )


def nested(*, activation: str, functional: bool) -> Any:
    keras.utils.set_random_seed(0)
    x = keras.Input((16, 16, 3))
    y = L.BatchNormalization(name="norm")(L.Conv2D(4, 3, name="conv")(x))
    base = keras.Model(x, y, name="mobilenet_1.00_16")
    base.trainable = False
    dense = L.Dense(3, name="top")
    if functional:
        x = keras.Input((16, 16, 3))
        y = dense(L.GlobalAveragePooling2D()(base(x)))
        return keras.Model(x, L.Activation(activation)(y))
    return keras.Sequential([base, L.GlobalAveragePooling2D(), dense, L.Activation(activation)])


@pytest.mark.parametrize("functional", [True, False])
def test_a_frozen_backbone_in_a_model_trains_when_the_policy_says_so(
    saved: Callable[[Any], Path], functional: bool
) -> None:
    path = saved(nested(activation="softmax", functional=functional))
    built = file(path)
    names = [n for n, p in built.model.named_parameters() if p.requires_grad]
    assert names == [
        "mobilenet_1_00_16.conv.kernel", "mobilenet_1_00_16.conv.bias",
        "mobilenet_1_00_16.norm.gamma", "mobilenet_1_00_16.norm.beta", "top.weight", "top.bias",
    ]  # fmt: skip
    assert built.fresh == ()
    assert "mobilenet.preprocess_input" in built.notes["pixels"]  # by the backbone's name
    x = pictures(16)
    wanted = keras.saving.load_model(path).predict(x.permute(0, 2, 3, 1).numpy(), verbose=0)
    np.testing.assert_allclose(built.model(x).softmax(1).detach().numpy(), wanted, atol=1e-6)


def test_a_backbone_without_head_is_pooled(saved: Callable[[Any], Path]) -> None:
    x = keras.Input((None, None, 3))
    built = file(saved(keras.Model(x, L.Conv2D(7, 3, name="conv")(x / 127.5 - 1))), image_size=24)
    assert built.model(pictures(24)).shape == (3, 3)
    assert built.model.head.in_features == 7
    assert built.spec["preparation"]["crop"] == 24
    assert "0 to 255" in built.notes["pixels"]


def test_unknown_pixels_are_said_aloud(
    saved: Callable[[Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    x = keras.Input((16, 16, 3))
    built = file(saved(keras.Model(x, L.Conv2D(7, 3, kernel_regularizer="l2")(x))))
    assert built.spec["preparation"]["std"] == [1, 1, 1]
    assert "does not say what pixels it wants" in caplog.text
    assert "penalties on its weights" in caplog.text


def test_channels_first_files_work(saved: Callable[[Any], Path]) -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((3, 16, 16))
    y = L.Conv2D(4, 3, data_format="channels_first")(x)
    y = L.GlobalAveragePooling2D(data_format="channels_first")(y)
    path = saved(keras.Model(x, L.Dense(3)(y)))
    built = file(path)
    found = built.model(pictures(16)).detach().numpy()
    wanted = keras.saving.load_model(path).predict(pictures(16).numpy(), verbose=0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert built.spec["plan"]["activation"] == "linear"


def two_outputs() -> Any:
    x = keras.Input((16, 16, 3))
    y = L.Flatten()(x)
    return keras.Model(x, [L.Dense(2)(y), L.Dense(3)(y)])


def hidden_head() -> Any:
    top = keras.Sequential([keras.Input((8,)), L.Dense(3, activation="softmax")], name="top")
    x = keras.Input((16, 16, 3))
    return keras.Model(x, top(L.GlobalAveragePooling2D()(L.Conv2D(8, 3)(x))))


def ends_in_an_operation() -> Any:
    x = keras.Input((16, 16, 3))
    return keras.Model(x, keras.ops.softmax(L.Dense(3)(L.Flatten()(x))))


def plain(shape: tuple[int | None, ...]) -> Any:
    x = keras.Input(shape)
    return keras.Model(x, L.Dense(3)(L.GlobalAveragePooling2D()(L.Conv2D(4, 3)(x))))


@pytest.mark.parametrize(
    ("make", "found", "settings"),
    [
        (two_outputs, "no functional model of one input and one output", {}),
        (ends_in_an_operation, "no last Dense layer", {}),
        (hidden_head, "its classifier inside the inner model 'top'", {}),
        (lambda: plain((16, 12, 3)), "pictures of 16 x 12", {}),
        (lambda: plain((16, 16, 1)), r"inputs of shape \(None, 16, 16, 1\)", {}),
        (lambda: plain((16, 16, 3)), "a model built for 16", {"image_size": 24}),
        (lambda: keras.Sequential([keras.Input((16, 16, 3)), L.Flatten()]), "without weights", {}),
    ],
)
def test_models_that_are_no_classifiers_of_pictures_are_refused(
    saved: Callable[[Any], Path], make: Callable[[], Any], found: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=found):
        file(saved(make()), **settings)


@pytest.mark.parametrize("labels", [("a", "b"), LABELS])
def test_a_saved_model_is_built_again_from_its_folder_only(
    tiny_file: Path, tmp_path: Path, labels: tuple[str, ...]
) -> None:
    built = file(tiny_file, labels=labels)
    assert built.preparation.extras is not None
    built.preparation.extras(str(tmp_path))
    spec = json.loads(json.dumps(built.spec))
    again = rebuild_model(spec, tmp_path, labels)
    again.model.load_state_dict(built.model.state_dict())
    x = 255 * pictures(16)
    assert torch.equal(again.model(x), built.model(x))
    (tmp_path / "architecture.json").write_text('{"module": "os", "class_name": "system"}')
    with pytest.raises(ModelError, match="code that is no part of Keras"):
        rebuild_model(spec, tmp_path, labels)


def test_an_application_is_built_again_without_files(tmp_path: Path) -> None:
    built = build(SMALL, weights="random")
    again = rebuild_model(json.loads(json.dumps(built.spec)), tmp_path, LABELS)
    again.model.load_state_dict(built.model.state_dict())
    assert torch.equal(again.model(pictures()), built.model(pictures()))
    assert again.preparation.spec == built.preparation.spec


def test_what_an_application_adds_for_its_own_weights_is_saved_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EfficientNet has one more layer with Keras's weights than without."""
    original = keras.applications.MobileNet

    @functools.wraps(original)
    def pretend(*, weights: str | None, input_shape: Any, **options: Any) -> Any:
        body = original(weights=None, input_shape=input_shape, **options)
        if weights is None:
            return body
        x = keras.Input(input_shape)
        return keras.Model(x, body(L.Rescaling([2.0, 3.0, 4.0], name="more")(x)))

    monkeypatch.setattr(keras.applications, "MobileNet", pretend)
    built = build(SMALL)
    assert built.preparation.extras is not None
    built.preparation.extras(str(tmp_path))
    again = rebuild_model(json.loads(json.dumps(built.spec)), tmp_path, LABELS)
    again.model.load_state_dict(built.model.state_dict())
    assert torch.equal(again.model(pictures()), built.model(pictures()))


@pytest.mark.parametrize("plan", [None, {}, {"name": "x", "application": "VGG16", "code": 1}])
def test_a_damaged_description_is_an_error_of_ours(tmp_path: Path, plan: Any) -> None:
    with pytest.raises(ModelError, match="no whole plan"):
        rebuild_model({"source": "keras", "plan": plan}, tmp_path, LABELS)


def test_the_users_defaults_are_left_as_they_are() -> None:
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        assert build(SMALL, weights="random").model.channels_last
        assert keras.config.image_data_format() == "channels_first"
    finally:
        keras.config.set_image_data_format(before)
