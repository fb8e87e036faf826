"""Files of others: plain ones are read, and none runs code or reaches for another file."""

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

from frostline.backends.keras.archive import check_architecture, check_archive
from frostline.errors import ModelError
from frostline.tasks.config import RunConfig
from frostline.tasks.keras_files import read_h5_layers
from frostline.tasks.models import build_model

Change = Callable[[dict[str, bytes]], None]


def changed(path: Path, target: Path, change: Change, **settings: Any) -> Path:
    """The archive with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", **settings) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def in_config(before: str, after: str) -> Change:
    def change(members: dict[str, bytes]) -> None:
        text = members["config.json"].decode()
        assert before in text
        members["config.json"] = text.replace(before, after, 1).encode()

    return change


def in_weights(write: Callable[[Any], None]) -> Change:
    def change(members: dict[str, bytes]) -> None:
        box = io.BytesIO(members["model.weights.h5"])
        with h5py.File(box, "a") as file:
            write(file)
        members["model.weights.h5"] = box.getvalue()

    return change


def large(file: Any) -> None:
    file.create_dataset("large", shape=(1 << 40,), dtype="f4")


def external(file: Any) -> None:
    file["elsewhere"] = h5py.ExternalLink("/etc/hostname", "/")


def soft(file: Any) -> None:
    file["elsewhere"] = h5py.SoftLink("/layers")


def outside(file: Any) -> None:
    file.create_dataset("outside", (4,), "u1", external=[("/etc/hostname", 0, 4)])


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (4,))  # noqa: S108  never opened
    file.create_virtual_dataset("virtual", layout)


def packed(file: Any) -> None:
    file.create_dataset("packed", data=np.zeros(100_000), compression="gzip")


def objects(file: Any) -> None:
    file.create_dataset("objects", (1,), h5py.special_dtype(ref=h5py.Reference))


def named_type(file: Any) -> None:
    file["type"] = np.dtype("f4")


HOSTILE_H5 = {
    large: "larger than the file", external: "a link or a type", soft: "a link or a type",
    outside: "data in other files", virtual: "data in other files", packed: "packed data",
    objects: "no numbers", named_type: "a link or a type",
}  # fmt: skip
CONV = '"module": "keras.layers", "class_name": "Conv2D"'
HOSTILE: dict[str, tuple[Change, str]] = {
    "lambda": (in_config(CONV, CONV.replace("Conv2D", "Lambda")), "'Lambda', which can run code"),
    "torch": (in_config(CONV, CONV.replace("Conv2D", "TorchModuleWrapper")), "can run code"),
    "lookup": (in_config(CONV, CONV.replace("Conv2D", "StringLookup")), "read other files"),
    "foreign": (
        in_config(CONV, '"module": "os", "class_name": "system"'),
        "no part of Keras: os.Conv2D|no part of Keras: os.system",
    ),
    "registered": (
        in_config('"registered_name": null', '"registered_name": "mine>Layer"'),
        "no part of Keras: .*mine>Layer",
    ),
    "utility": (
        in_config(CONV, '"module": "keras.utils", "class_name": "get_file"'),
        "no part of Keras: keras.utils",
    ),
    "no module": (in_config(CONV, '"module": null, "class_name": "Mine"'), "no part of Keras"),
    "no json": (lambda m: m.update({"config.json": b"{"}), "Expecting property name"),
    "a list": (lambda m: m.update({"config.json": b"[]"}), "no object"),
    "deep": (
        lambda m: m.update({"config.json": b'{"a":' * 5000 + b"1" + b"}" * 5000}),
        "recursion|nested too deep",
    ),
    "no weights": (lambda m: m.pop("model.weights.h5") and None, "one file of weights"),
    "assets": (lambda m: m.update({"assets/x.txt": b""}), "no part of a plain model"),
    "way out": (lambda m: m.update({"../x": b""}), "no part of a plain model"),
    "no hdf5": (lambda m: m.update({"model.weights.h5": b"\x80\x04"}), "signature"),
} | {f"h5 {write.__name__}": (in_weights(write), found) for write, found in HOSTILE_H5.items()}


def test_a_plain_file_is_read(tiny_file: Path) -> None:
    assert check_archive(tiny_file)["class_name"] == "Functional"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_wants_more_is_refused_before_keras_sees_it(
    tiny_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, found = HOSTILE[name]
    path = changed(tiny_file, tmp_path / "bad.keras", change)
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(ModelError, match=found):
        build_model(RunConfig(model=str(path), data="d"), kind="image", labels=("a", "b"))


def test_weights_that_unpack_to_far_more_are_refused(tiny_file: Path, tmp_path: Path) -> None:
    def blow_up(members: dict[str, bytes]) -> None:
        members["model.weights.h5"] += bytes(50_000_000)

    path = changed(tiny_file, tmp_path / "b.keras", blow_up, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ModelError, match="a hundred times"):
        check_archive(path)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.keras").write_bytes(b"PK\x03\x04 nothing else")
    for path in (tmp_path / "a.keras", tmp_path / "absent.keras"):
        with pytest.raises(ModelError, match=r"model\.save"):
            check_archive(path)


def test_how_a_model_was_compiled_does_not_matter(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])

    @keras.saving.register_keras_serializable("mine")
    def loss(y: Any, z: Any) -> Any:
        return keras.ops.mean(y - z)

    model.compile(loss=loss)
    model.save(tmp_path / "m.keras")
    assert "mine" in json.dumps(check_archive(tmp_path / "m.keras"))


@pytest.mark.parametrize("kind", ["Dense", "MultiHeadAttention", "RandomFlip", "Bidirectional"])
def test_all_that_keras_itself_writes_of_plain_layers_is_accepted(kind: str) -> None:
    layers = keras.layers
    made = {
        "Dense": lambda: layers.Dense(2, kernel_regularizer=keras.regularizers.L1L2(1, 1)),
        "MultiHeadAttention": lambda: layers.MultiHeadAttention(2, 2, dtype="mixed_float16"),
        "RandomFlip": lambda: layers.RandomFlip("horizontal"),
        "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(2)),
    }[kind]()
    check_architecture(keras.saving.serialize_keras_object(made), asked="read a layer")


# -- old files of weights ------------------------------------------------------------------------


def old_file(path: Path, *, inside: str | None = None) -> Path:
    with h5py.File(path, "w") as file:
        root = file.create_group(inside) if inside else file
        root.attrs["layer_names0"] = [b"conv", b"empty"]
        root.attrs["layer_names1"] = [b"norm"]
        for name, count in (("conv", 1), ("empty", 0), ("norm", 2)):
            group = root.create_group(name)
            names = [f"{name}/{i}:0".encode() for i in range(count)]
            group.attrs["weight_names"] = names or np.zeros(0, "S1")
            for i in range(count):
                group[f"{name}/{i}:0"] = np.full((2, 3), i, "f4")
    return path


@pytest.mark.parametrize("inside", [None, "model_weights"])
def test_layers_with_weights_are_read_in_order(tmp_path: Path, inside: str | None) -> None:
    found = read_h5_layers(old_file(tmp_path / "w.h5", inside=inside))
    assert [(name, [float(a[0, 0]) for a in arrays]) for name, arrays in found] == [
        ("conv", [0.0]), ("norm", [0.0, 1.0])
    ]  # fmt: skip


@pytest.mark.parametrize("write", HOSTILE_H5)
def test_old_files_that_reach_out_are_refused(tmp_path: Path, write: Callable[[Any], None]) -> None:
    path = old_file(tmp_path / "w.h5")
    with h5py.File(path, "a") as file:
        write(file)
    with pytest.raises(ModelError, match=HOSTILE_H5[write]):
        read_h5_layers(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = old_file(tmp_path / "w.h5")
    with h5py.File(path, "a") as file:
        file["conv/conv/0:0"][0, 0] = np.nan
    with pytest.raises(ModelError, match="not finite in 'conv'"):
        read_h5_layers(path)


def test_files_of_other_layouts_are_refused(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save_weights(
        tmp_path / "new.weights.h5"
    )
    (tmp_path / "text.h5").write_text("no")
    for name, found in (("new.weights.h5", "without Keras's list"), ("text.h5", "signature"),
                        ("absent.h5", "No such file")):  # fmt: skip
        with pytest.raises(ModelError, match=found):
            read_h5_layers(tmp_path / name)
