from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.errors import ConfigError
from frostline.tasks import strict_yaml
from frostline.tasks.config import RunConfig, dump_config, load_config, resolve_config

NEEDED = {"model": "timm:test_resnet", "data": "photos"}
fractions = st.floats(0.01, 0.49)
lengths = st.one_of(
    st.integers(0, 10**6).map(lambda n: f"{n}st"),
    st.integers(0, 100).map(lambda n: f"{n}%"),
    st.integers(0, 400).map(lambda n: f"{n / 4}ep"),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
channels = st.tuples(*[st.floats(0.001, 10)] * 3)


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


configs = st.builds(
    RunConfig,
    model=texts,
    data=texts,
    policy=texts,
    weights=st.sampled_from(["pretrained", "random", Path("a b/c.safetensors")]),
    output=maybe(st.just(Path("runs/one"))),
    seed=st.integers(0, 2**32 - 1),
    epochs=st.integers(1, 1000),
    lr=maybe(st.floats(1e-12, 10)),
    head_lr=maybe(st.floats(1e-12, 10)),
    weight_decay=st.floats(0, 10),
    warmup=lengths,
    checkpoint_every=maybe(lengths),
    clip_norm=maybe(st.floats(1e-6, 1e300)),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    patience=maybe(st.integers(1, 99)),
    live_norm=st.booleans(),
    image_mean=maybe(channels),
    image_std=maybe(channels),
    augment=st.sampled_from([None, "none", "flip", "basic"]),
    text_column=maybe(texts),
    val_fraction=fractions,
    test_fraction=fractions,
    skip_bad=st.booleans(),
)


@settings(deadline=None)
@given(configs)
def test_a_dumped_configuration_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=10), json_values, max_size=5))
def test_what_is_written_reads_back_equal(values: dict) -> None:
    assert strict_yaml.parse(strict_yaml.dump(values), source="x").values == values


def test_every_field_says_what_it_means() -> None:
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_overrides_win_and_the_file_fills_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: a:b\ndata: d\nepochs: 3\nlr: 1e-3\n")
    config = load_config(path, {"epochs": 5})
    assert (config.epochs, config.lr, config.model) == (5, 0.001, "a:b")


def test_a_command_line_number_is_read_as_one() -> None:
    assert load_config(None, NEEDED | {"lr": "3e-4", "epochs": "7"}).lr == 3e-4


def test_auto_values_follow_the_kind_of_task_and_explicit_ones_stay() -> None:
    config = load_config(None, NEEDED)
    image, text = resolve_config(config, "image"), resolve_config(config, "text")
    assert (image.lr, image.head_lr, image.augment) == (3e-4, 3e-3, "flip")
    assert (text.lr, text.head_lr, text.augment) == (1e-4, 1e-3, "none")
    chosen = resolve_config(load_config(None, NEEDED | {"lr": 0.02, "augment": "basic"}), "image")
    assert (chosen.lr, chosen.head_lr, chosen.augment) == (0.02, 0.2, "basic")
    assert resolve_config(image, "image") == image


def test_text_cannot_be_flipped() -> None:
    with pytest.raises(ConfigError, match="no augmentation"):
        resolve_config(load_config(None, NEEDED | {"augment": "flip"}), "text")


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("epochs: 1\nepochs: 2", 2, "twice, first on line 1"),
        ("a: {b: 1, b: 2}", 1, "twice"),
        ("epochs: &x 1\nseed: *x", 2, "alias"),
        ("model: !!python/object:os.system x", 1, "tag"),
        ("model: !local x", 1, "tag"),
        ("epochs: !!int '5'", 1, "tag"),
        ("seed: 1\nmodel: !!binary aGVsbG8=", 2, "tag"),
        ("data: !!set {a, b}", 1, "tag"),
        ("[" * 5000, 1, "64 levels"),
        ("{a: " * 5000, 1, "64 levels"),
        ("model: [a", 1, "expected"),
        ("- a\n- b", 1, "key: value"),
        ("just words", 1, "key: value"),
        ("1: 2", 1, "no word"),
        ("? [a]\n: b", 1, "no word"),
        ("seed: 1\n---\nseed: 2", 2, "document"),
        ("seed: " + "9" * 5000, 1, "digits"),
        ("model: 'open", 1, "end of stream"),
        ("a:\n\tb: 1", 2, "tab|token"),
        ("seed: 1\nlearning_rate: 2", 2, "no setting of that name"),
        ("epoch: 2", 1, "did you mean 'epochs'"),
        ("<<: {epochs: 2}", 1, "no setting"),
        ("seed: 1\nepochs: many", 2, "valid integer"),
        ("epochs: 1.5", 1, "fractional"),
        ("lr: true", 1, "true or false"),
        ("lr: no", 1, "valid number"),
        ("lr: .nan", 1, "finite"),
        ("lr: .inf", 1, "finite|less than"),
        ("lr: -1", 1, "greater than 0"),
        ("seed: 4294967296", 1, "less than"),
        ("batch_size: 0", 1, "greater than"),
        ("warmup: 10", 1, "string"),
        ("warmup: '10'", 1, "bare number"),
        ("checkpoint_every: often", 1, "unknown form"),
        ("precision: fp8", 1, "fp32"),
        ("image_mean: [0.5, 0.5]", 1, "required"),
        ("image_mean: [0.5, 0.5, x]", 1, "valid number"),
        ("optimizer: 3", 1, "adamw"),
        ("model:", 1, "valid string"),
        ("model: 5", 1, "valid string"),
        ("skip_bad: maybe", 1, "valid boolean"),
    ],
)
def test_a_bad_file_is_one_config_error_with_its_line(
    tmp_path: Path, text: str, line: int, found: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"(?s)line {line}.*({found})") as caught:
        load_config(path, {k: v for k, v in NEEDED.items() if k not in text})
    assert caught.value.fix


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"seed: \x00", b"a: \xc3(", b"# " + b"x" * 1_000_001],
    ids=["UTF-16", "NUL", "not UTF-8", "over 1 MB"],
)
def test_bytes_that_are_no_settings(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize("path", ["absent.yaml", "a\0b.yaml", "."])
def test_a_file_that_cannot_be_read(path: str) -> None:
    with pytest.raises(ConfigError):
        load_config(path)


def test_missing_and_contradictory_settings() -> None:
    with pytest.raises(ConfigError, match="no 'data'"):
        load_config(None, {"model": "a:b"})
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        load_config(None, NEEDED | {"val_fraction": 0.6, "test_fraction": 0.6})
    with pytest.raises(ConfigError, match="above 0"):
        load_config(None, NEEDED | {"image_std": (1.0, 0.0, 1.0)})


def test_yaml_without_surprises() -> None:
    text = "a: no\nb: 010\nc: 1:30\nd: 1e3\ne: 2020-01-01\nf: 0x1f\ng: 1_000\nh: ~\ni: .inf"
    assert strict_yaml.parse(text, source="x").values == {
        "a": "no", "b": 10, "c": "1:30", "d": 1000.0, "e": "2020-01-01",
        "f": "0x1f", "g": "1_000", "h": None, "i": math.inf,
    }  # fmt: skip


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert load_config(path, NEEDED) == load_config(None, NEEDED)


def test_the_strict_rules_stay_out_of_everyone_elses_yaml() -> None:
    import yaml

    assert yaml.safe_load("a: no\nb: 010") == {"a": False, "b": 8}
