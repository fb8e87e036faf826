"""`.keras` files: plain models load, anything with code or pointers in it is refused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from frostline.backends.keras.arrays import array_of
from frostline.backends.keras.model_file import load_model
from frostline.errors import FrostlineError, ModelError


def plain(path: Path) -> Path:
    """A functional model with a nested one, a norm, an operation and an activation."""
    inner = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, activation="gelu"),
         keras.layers.BatchNormalization()], name="inner",
    )  # fmt: skip
    x = keras.Input((4,))
    y = keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1))(inner(x) + 1.0)
    keras.Model(x, y).save(path)
    return path


def test_a_plain_model_loads_with_its_weights(tmp_path: Path) -> None:
    path = plain(tmp_path / "m.keras")
    model, again = load_model(path), load_model(path)
    x = np.ones((2, 4), "float32")
    assert np.array_equal(array_of(model(x)), array_of(again(x)))
    assert not getattr(model, "compiled", False)


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with some of its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_config(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        edit(config)
        members["config.json"] = json.dumps(config).encode()

    return change


def foreign_class(config: dict[str, Any]) -> None:
    config["config"]["layers"][0] |= {"module": "os", "class_name": "system"}


def download(config: dict[str, Any]) -> None:
    config["config"]["layers"][0] |= {"module": "keras.utils", "class_name": "get_file"}


def a_function(config: dict[str, Any]) -> None:
    config["config"]["layers"][0]["config"]["hook"] = {
        "module": "builtins", "class_name": "function", "config": "exec",
    }  # fmt: skip


def custom(config: dict[str, Any]) -> None:
    config["config"]["layers"][0]["registered_name"] = "evil>Layer"


def vocabulary(config: dict[str, Any]) -> None:
    config["config"]["layers"][0]["config"]["vocabulary"] = "/etc/passwd"


def saved_lambda(config: dict[str, Any]) -> None:
    config["config"]["layers"][0]["class_name"] = "Lambda"


def asset(members: dict[str, bytes]) -> None:
    members["assets/../../x"] = b"x"


def no_config(members: dict[str, bytes]) -> None:
    del members["config.json"]


def deep(members: dict[str, bytes]) -> None:
    members["config.json"] = b"[" * 100_000 + b"]" * 100_000


def _weights(edit: Callable[[h5py.File], None]) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        buffer = io.BytesIO(members["model.weights.h5"])
        with h5py.File(buffer, "r+") as file:
            edit(file)
        members["model.weights.h5"] = buffer.getvalue()

    return change


def _external_link(file: h5py.File) -> None:
    file["elsewhere"] = h5py.ExternalLink("/etc/passwd", "/")


def _external_data(file: h5py.File) -> None:
    file.create_dataset("x", (4,), "u1", external=[("/etc/hostname", 0, 4)])


def _vast(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 40,), "f4", chunks=(1 << 10,))


BAD: dict[str, Callable[[dict[str, bytes]], None]] = {
    "foreign class": with_config(foreign_class),
    "download": with_config(download),
    "function": with_config(a_function),
    "custom": with_config(custom),
    "vocabulary": with_config(vocabulary),
    "lambda": with_config(saved_lambda),
    "asset": asset,
    "no config": no_config,
    "deep": deep,
    "external link": _weights(_external_link),
    "external data": _weights(_external_data),
    "vast": _weights(_vast),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_with_code_or_pointers_in_it_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Keras sees it."""
    path = rewritten(plain(tmp_path / "m.keras"), BAD[name])
    monkeypatch.setattr(keras.saving, "load_model", lambda *a, **k: pytest.fail("Keras loaded it"))
    with pytest.raises(ModelError):
        load_model(path)


def test_a_lambda_layer_is_refused(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x + 1)])
    model.save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="can run code"):
        load_model(tmp_path / "m.keras")


def test_no_file_and_no_archive(tmp_path: Path) -> None:
    (tmp_path / "m.keras").write_bytes(b"\x80\x04 not a zip")
    for name in ("m.keras", "absent.keras"):
        with pytest.raises(FrostlineError):
            load_model(tmp_path / name)
