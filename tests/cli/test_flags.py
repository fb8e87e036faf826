"""Every setting is a flag, read off the model; what was not given is not passed on."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest

from frostline.cli.flags import config_flags, overrides
from frostline.tasks.config import RunConfig, load_config


@pytest.fixture
def parsed(monkeypatch) -> Callable[..., dict]:
    """What a command with these flags receives, for a command line."""
    from cyclopts import App

    def parse(*tokens: str) -> dict:
        received: dict = {}

        @config_flags
        def command(given: typing.Mapping[str, object], *, extra: int = 0) -> None:
            received.update(given, extra=extra)

        App(default_command=command)(tokens, result_action="return_value", exit_on_error=False)
        assert received.pop("extra") is not None
        return received

    return parse


def test_every_setting_has_a_flag(cli):
    words = set(cli("fit", "--help").out.split())
    for name in RunConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in words


def test_only_what_was_given_is_passed_on(parsed):
    assert parsed() == {}
    assert parsed("m", "d") == {"model": "m", "data": "d"}
    assert parsed("--data", "d") == {"data": "d"}
    assert parsed("m", "d", "full", "--lr", "1e-3") == {
        "model": "m",
        "data": "d",
        "policy": "full",
        "lr": "1e-3",
    }


def test_by_position_and_by_name_are_the_same(parsed):
    assert parsed("m", "d", "full") == parsed("--policy", "full", "--data", "d", "--model", "m")


def test_switches_have_both_directions(parsed):
    assert parsed("--live-norm") == {"live_norm": True}
    assert parsed("--no-live-norm") == {"live_norm": False}


_SAMPLES = {
    "model": "timm:resnet18",
    "data": "d",
    "policy": "full",
    "weights": "random",
    "output": "somewhere",
    "budget": "500st",
    "warmup": "3st",
    "checkpoint_every": "10%",
    "device": "cpu",
    "text_column": "t",
    "label_column": "l",
    "image_mean": "0.1,0.2,0.3",
    "image_std": "0.1,0.2,0.3",
    "val_fraction": "0.2",
    "test_fraction": "0.25",
    "lr_decay": "0.5",
    "feature_augment": "noise=0.1",
}


def _sample(name: str) -> str:
    if name in _SAMPLES:
        return _SAMPLES[name]
    kinds = [RunConfig.model_fields[name].annotation]
    kinds = [*kinds, *(a for k in kinds for a in typing.get_args(k))]
    literal = next((k for k in kinds if typing.get_origin(k) is typing.Literal), None)
    return typing.get_args(literal)[-1] if literal else "9"


@pytest.mark.parametrize(
    "name", [n for n, f in RunConfig.model_fields.items() if f.annotation is not bool]
)
def test_the_text_of_every_flag_makes_a_setting(parsed, name):
    given = parsed(f"--{name.replace('_', '-')}", _sample(name))
    config = load_config(None, {"model": "timm:x", "data": "d", **overrides(given)})
    value = getattr(config, name)
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert shown.removesuffix(".0") == _sample(name)


def test_null_unsets_what_may_be_unset():
    assert overrides({"patience": "null", "clip_norm": "null"}) == {
        "patience": None,
        "clip_norm": None,
    }
    assert overrides({"policy": "null"}) == {"policy": "null"}
