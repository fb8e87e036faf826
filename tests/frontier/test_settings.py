"""What the code of modules reads besides tensors, and whether a change of it is noticed."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.frontier.state import Settings

SCALES = {"first": 1.0, "second": [1.0, 2.0]}
OFFSET = 0.5
UNREAD = 1.0
LARGE = list(range(1000))
TABLE = torch.ones(3)
options = types.ModuleType("options_of_no_package")
vars(options).update(gain=1.0, unread=1.0)


class Choice:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.factor, self.inner = 1.0, {"bias": [0.0]}


def helper(x: Tensor) -> Tensor:
    return x + OFFSET


class Reads(nn.Module):
    """Reads globals, a helper's globals, a module of settings, an object and a container."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.listed, self.plain = Choice(), [1.0, 2.0], 1
        self.args = types.SimpleNamespace(power=1.0)
        self._private, self.history = [float("nan")], [0.0]

    @property
    def scale(self) -> float:
        return SCALES["first"] * self.listed[0] * len(self._private)

    def log(self, loss: float) -> None:
        self.history.append(loss * UNREAD)

    def forward(self, x: Tensor) -> Tensor:
        return (
            helper(x**self.args.power * self.scale * self.choice.factor * options.gain)
            + len(LARGE) * TABLE
        )


@pytest.fixture(autouse=True)
def _globals_as_they_were(monkeypatch: pytest.MonkeyPatch):
    here = globals()
    for name in ("OFFSET", "LARGE", "UNREAD"):
        monkeypatch.setitem(here, name, here[name])
    monkeypatch.setitem(here, "SCALES", {"first": 1.0, "second": [1.0, 2.0]})
    monkeypatch.setitem(vars(options), "gain", 1.0)
    monkeypatch.setitem(vars(options), "unread", 1.0)


def change_inner(model: Reads) -> None:
    model.choice.inner["bias"][0] = 1.0


CHANGES: dict[str, Any] = {
    "middle.plain": lambda model: setattr(model, "plain", 2),
    "middle.choice": lambda model: setattr(model.choice, "factor", 2.0),
    "middle.choice, deep inside": change_inner,
    "middle.listed": lambda model: model.listed.append(3.0),
    "middle.args": lambda model: setattr(model.args, "power", 2.0),
    "middle._private": lambda model: model._private.append(3.0),
    "the global SCALES": lambda model: SCALES.update(first=2.0),
    "the global OFFSET": lambda model: globals().update(OFFSET=1.0),
    "the global options.gain": lambda model: vars(options).update(gain=2.0),
    "the global TABLE": lambda model: TABLE.add_(0),
    "the global LARGE": lambda model: globals().update(LARGE=[1]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_named(name: str) -> None:
    model = Reads()
    settings = Settings({"middle": model})
    assert settings.changed() is None
    assert settings.changed() is None
    CHANGES[name](model)
    assert settings.changed() == name.partition(",")[0]


def test_what_the_code_does_not_read_is_not_looked_at() -> None:
    model = Reads()
    settings = Settings({"middle": model})
    vars(options)["unread"] = 2.0
    globals()["UNREAD"] = 2.0
    model.log(0.5)  # what training code keeps on its model
    LARGE.append(1)  # of a large container only whether it is another one
    LARGE.pop()
    assert settings.changed() is None


def test_what_passes_leave_behind_is_forgotten() -> None:
    model = Reads()
    settings = Settings({"middle": model})
    model.choice.factor = 2.0
    settings.keep_lasting()
    assert settings.changed() is None
    model.choice.factor = 3.0
    assert settings.changed() is None
    SCALES["first"] = 2.0
    assert settings.changed() == "the global SCALES"


def test_objects_and_globals_of_packages_are_not_looked_into() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    settings = Settings({"layer": layer, "drop": layer.dropout})
    assert not settings.looked_around
    assert Settings({"middle": Reads()}).looked_around
