"""Damaged and malicious inputs: each is one error of the right class that names its place."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from frostline.errors import ConfigError, DataError, FrostlineError, ModelError
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.data import read_data
from frostline.tasks.models import build_model
from frostline.tasks.pictures import open_picture
from frostline.tasks.task import load_task
from frostline.tasks.weights import load_into, read_weights
from models_for_tests import tiny


def encoded(format_: str, *, size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, format_)
    return stream.getvalue()


def cut(format_: str, share: float) -> bytes:
    whole = encoded(format_)
    return whole[: int(len(whole) * share)]


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


PICTURES: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x89",
    "text": b"not a picture at all",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "html": b"<!doctype html><title>404</title>",
    "zip": b"PK\x03\x04" + bytes(60),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "psd": b"8BPS\x00\x01" + bytes(60),
    "fits": b"SIMPLE  =                    T" + bytes(2850),
    "ppm, readable but not allowed": b"P6 2 2 255\n" + bytes(12),
    "jpeg 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(60),
    "bomb by header": png_header(50_000, 50_000),
    "bomb that Pillow only warns of": png_header(10_000, 10_000),
    "zero size": png_header(0, 0),
    "no pixels": png_header(4, 4),
    "png with a changed pixel byte": flipped(encoded("PNG"), 400),
    "gif without frames": b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
    **{
        f"{name} cut at {share:.0%}": cut(name, share)
        for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
        for share in (0.02, 0.5, 0.95)
    },
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_picture_is_named_and_never_black(tmp_path: Path, name: str) -> None:
    path = tmp_path / "suspect.jpg"
    path.write_bytes(PICTURES[name])
    with pytest.raises(DataError, match=r"suspect\.jpg") as caught:
        open_picture(path)
    assert caught.value.fix


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_the_same_pictures_undamaged_are_read(tmp_path: Path, format_: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(format_))
    picture = open_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (30, 40))
    assert picture.getextrema() != ((0, 0),) * 3


def two_classes(folder: Path) -> Path:
    for number, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (4, 4), (i, number, 0)).save(folder / name / f"{i}.png")
    return folder


def empty_class(folder: Path) -> Path:
    (two_classes(folder) / "c").mkdir()
    return folder


def class_of_other_files(folder: Path) -> Path:
    (empty_class(folder) / "c" / "x.heic").write_bytes(b"x")
    return folder


def one_class(folder: Path) -> Path:
    two_classes(folder)
    for path in (folder / "b").iterdir():
        path.unlink()
    (folder / "b").rmdir()
    return folder


def flat(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "x.png")
    return folder


def unseen_class(folder: Path) -> Path:
    two_classes(folder / "train")
    two_classes(folder / "test")
    (folder / "test" / "z").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "test" / "z" / "0.png")
    return folder


def no_train(folder: Path) -> Path:
    two_classes(folder / "test")
    return folder


def two_vals(folder: Path) -> Path:
    for name in ("train", "val", "valid"):
        two_classes(folder / name)
    return folder


def rare_class(folder: Path) -> Path:
    two_classes(folder)
    (folder / "c").mkdir()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "c" / "0.png")
    return folder


def broken_picture(folder: Path) -> Path:
    two_classes(folder)
    (folder / "a" / "3.png").write_bytes(cut("PNG", 0.5))
    return folder


def broken_class(folder: Path) -> Path:
    two_classes(folder)
    for path in (folder / "b").iterdir():
        path.write_bytes(b"x")
    return folder


def empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


FOLDERS: list[tuple[Callable[[Path], Path], str]] = [
    (empty_class, "no files"),
    (class_of_other_files, "heic"),
    (one_class, "one class only"),
    (flat, "no class folders"),
    (unseen_class, "'z'"),
    (no_train, "none for training"),
    (two_vals, "two folders for one split"),
    (rare_class, "only 1 of class 'c'"),
    (broken_picture, r"OSError|SyntaxError"),
    (empty_folder, "no class folders"),
]


@pytest.mark.parametrize(("make", "found"), FOLDERS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_bad_folder(tmp_path: Path, make: Callable[[Path], Path], found: str) -> None:
    with pytest.raises(DataError, match=found) as caught:
        read_data(RunConfig(model="m", data=str(make(tmp_path / "data"))))
    assert caught.value.fix


def test_a_class_without_a_readable_picture_is_not_skipped_silently(tmp_path: Path) -> None:
    folder = broken_class(tmp_path / "data")
    with pytest.raises(DataError, match="no readable picture left"):
        read_data(RunConfig(model="m", data=str(folder), skip_bad=True))


GOOD = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)).encode()
TABLES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("csv", b"", "empty file"),
    "header only": ("csv", b"text,label\n", "no rows"),
    "NUL": ("csv", b"text,label\na\0b,x\n", "line 2"),
    "unclosed quote": ("csv", b'text,label\nfine,a\n"open,b\n' + GOOD, "line 3"),
    "text after a quote": ("csv", b'text,label\n"a" b,x\n', "line 2"),
    "UTF-16": ("csv", "text,label\na,b\n".encode("utf-16"), "UTF-16"),
    "Latin-1": ("csv", b"text,label\nfine,a\ncaf\xe9,b\n", "line 3"),
    "ragged, short": ("csv", b"text,label\na,b\nonly one\n", "line 3"),
    "ragged, long": ("csv", b"text,label\na,b,c\n", "line 2"),
    "doubled column": ("csv", b"text,label,text\na,b,c\n", "twice"),
    "giant field": ("csv", b"text,label\n" + b"x" * 200_000 + b",a\n", "line 2"),
    "no label column": ("csv", b"text,mood\na,b\n", "label column"),
    "no text column": ("csv", b"words,label\na,b\n", "text column"),
    "semicolons": ("csv", b"text;label\na;b\n", "text column"),
    "empty text": ("csv", b"text,label\n" + GOOD + b" ,a\n", "line 22"),
    "empty label": ("csv", b"text,label\n" + GOOD + b"x,\n", "line 22"),
    "one class": ("csv", b"text,label\na,x\nb,x\n", "one class only"),
    "every label differs": ("csv", b"text,label\na,1\nb,2\nc,3\n", "only 1 of class"),
    "not JSON": ("jsonl", b'{"text": "a", "label": "b"}\nnope\n', "line 2"),
    "a list": ("jsonl", b"[1, 2]\n", "a list"),
    "doubled key": ("jsonl", b'{"text": "a", "text": "b", "label": "c"}\n', "twice"),
    "NaN": ("jsonl", b'{"text": "a", "label": NaN}\n', "NaN"),
    "deep": ("jsonl", b"[" * 100_000 + b"\n", "line 1"),
    "giant number": ("jsonl", b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n", "line 1"),
    "lone surrogate": ("jsonl", b'{"text": "\\ud800", "label": "a"}\n', "Unicode"),
    "number as text": ("jsonl", b'{"text": 5, "label": "a"}\n', "a int instead"),
    "measurement as label": ("jsonl", b'{"text": "a", "label": 0.5}\n', "measurement"),
    "infinite label": ("jsonl", b'{"text": "a", "label": 1e999}\n', "measurement"),
    "null label": ("jsonl", b'{"text": "a", "label": null}\n', "no label"),
    "object as label": ("jsonl", b'{"text": "a", "label": {}}\n', "a dict as label"),
    "missing key": ("jsonl", b'{"text": "a", "label": "b"}\n{"text": "c"}\n', "line 2"),
    "no Parquet": ("parquet", b"PAR1 nothing PAR1", "read"),
    "empty Parquet": ("parquet", b"", "read"),
    "unknown suffix": ("xlsx", b"PK\x03\x04", "suffix '.xlsx'"),
    "a picture": ("png", encoded("PNG"), "single picture"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_table(tmp_path: Path, name: str) -> None:
    suffix, content, found = TABLES[name]
    path = tmp_path / f"suspect.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=found) as caught:
        read_data(RunConfig(model="m", data=str(path)))
    assert "suspect" in str(caught.value) or "class" in str(caught.value)
    assert caught.value.fix


def test_flipped_bytes_of_a_parquet_file_never_escape_as_something_else(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "d.parquet"
    columns = {"text": [f"t {i}" for i in range(30)], "label": [i % 2 for i in range(30)]}
    parquet.write_table(pa.table(columns), path)
    whole = path.read_bytes()
    dice = random.Random(0)
    refused = 0
    for _ in range(60):
        path.write_bytes(flipped(whole, dice.randrange(len(whole))))
        try:
            read_data(RunConfig(model="m", data=str(path)))
        except DataError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "data",
    ["absent", "absent/train.csv", "absent*.csv", "a\0b", "x" * 5000, "no_such_module:data"],
)
def test_data_that_is_not_there(data: str) -> None:
    with pytest.raises(DataError):
        read_data(RunConfig(model="m", data=data))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("floats", "float64"),
        ("paths_absent", "absent-0"),
        ("unlabelled", "pairs"),
        ("none_labels", "no label in row 40"),
        ("empty", "empty split"),
        ("raises", "ZeroDivisionError: a bug"),
        ("number", "int"),
        ("odd_split", "'spare'"),
        ("mixed", "splits train, test"),
        ("not_callable", "a int"),
        ("absent", "no attribute"),
    ],
)
def test_a_callable_that_returns_no_data(name: str, found: str) -> None:
    with pytest.raises(DataError, match=found):
        read_data(RunConfig(model="m", data=f"data_for_tests:{name}"))


# -- weights -----------------------------------------------------------------------------------


def file_of(header: Any, payload: bytes = bytes(16), *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + payload


def entry(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "zero header": bytes(8),
    "header past the end": file_of({"a": entry([4], 0, 16)}, length=10_000),
    "giant header": file_of({}, length=2**63),
    "header of 20 MB": file_of(b" " * 20_000_000),
    "no JSON": file_of(b"{nope"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([1, 2]),
    "deep": file_of(b"[" * 100_000),
    "doubled name": file_of(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    ),
    "overlap": file_of({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}),
    "gap": file_of({"a": entry([2], 0, 8)}),
    "past the end": file_of({"a": entry([8], 0, 32)}),
    "backwards": file_of({"a": entry([4], 16, 0)}),
    "wrong size": file_of({"a": entry([3], 0, 16)}),
    "overflowing shape": file_of({"a": entry([2**40, 2**40], 0, 16)}),
    "negative shape": file_of({"a": entry([-4], 0, 16)}),
    "unknown type": file_of({"a": entry([4], 0, 16, "F99")}),
    "too many tensors": file_of({f"t{i}": entry([0], 0, 0) for i in range(100_001)}, b""),
    "NaN": safetensors.torch.save({"a": torch.tensor([1.0, float("nan")])}),
    "infinity": safetensors.torch.save({"a": torch.tensor([1.0, float("inf")]).half()}),
    "zip in disguise": b"PK\x03\x04" + bytes(100),
    "pickle in disguise": b"\x80\x04\x95" + bytes(100),
    "HDF5 in disguise": b"\x89HDF\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_bad_weight_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "suspect.safetensors"
    path.write_bytes(WEIGHTS[name])
    with pytest.raises(ModelError, match="suspect") as caught:
        read_weights(path)
    assert caught.value.fix


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin", ".h5", ".ckpt", ".onnx", ""])
def test_formats_that_can_run_code_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    with pytest.raises(ModelError, match="save_file"):
        read_weights(path)


def test_flipped_header_bits_are_refused_or_change_names_only(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model = tiny(3)
    whole = safetensors.torch.save(model.state_dict())
    (length,) = struct.unpack("<Q", whole[:8])
    dice = random.Random(0)
    loaded = 0
    for _ in range(200):
        at, bit = dice.randrange(8 + length), dice.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
        try:
            load_into(tiny(3), read_weights(path), head=None, source="w")
            loaded += 1
        except ModelError:
            pass
    # Of what still loads, nothing but the ignored counter and metadata may have been hit.
    assert loaded < 20


def state(**changes: Any) -> dict[str, torch.Tensor]:
    tensors = {**tiny(3).state_dict(), **changes}
    return {k: v for k, v in tensors.items() if v is not None}


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        (state(**{"conv.weight": None}), r"1 missing \(conv.weight\)"),
        (state(**{"conv.weight": None, "cnov.weight": torch.ones(4, 3, 3, 3)}), "cnov"),
        (state(**{"conv.weight": torch.ones(4, 3, 5, 5)}), r"of another shape \(conv.weight"),
        (state(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
        ({}, "missing"),
        (state(**{"x\x1b[31m\n": torch.ones(1)}), r"x\\x1b\[31m\\n"),
        (state(**{"../../etc": torch.ones(1)}), "unexpected"),
    ],
)
def test_weights_that_do_not_fit(tensors: dict[str, torch.Tensor], found: str) -> None:
    model = tiny(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError, match=found) as caught:
        load_into(model, tensors, head="fc", source="w.safetensors")
    assert "\x1b" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- model names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("timm:test_resnt", "did you mean test_resnet"),
        ("timm:", "no such form"),
        ("timm:hf-hub:a/b", "no model of that name"),
        ("torchvision:resnet19", "did you mean"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier of that name"),
        ("resnet18", "no such form"),
        ("kears:ResNet50", "No module named 'kears'"),
        ("os:system", "TypeError"),
        ("models_for_tests:absent", "no attribute"),
        ("models_for_tests:no_model", "a str"),
        ("models_for_tests:raises", "ZeroDivisionError: a bug"),
        ("models_for_tests.py:tiny", "No module named|is not a package"),
        ("hf:/no/such/folder", "no such folder"),
        ("hf:no such name", "hf:no such name"),
    ],
)
def test_a_bad_model_name(model: str, found: str) -> None:
    config = RunConfig(model=model, data="d", weights="random")
    with pytest.raises(ModelError, match=found) as caught:
        build_model(config, kind="image", labels=("a", "b"))
    assert caught.value.fix


def test_one_bad_setting_among_good_ones_is_one_error(pictures: Path) -> None:
    config = load_config(None, {"model": "models_for_tests:wrong_shape", "data": str(pictures)})
    with pytest.raises(ModelError, match=r"an output of shape \(2, 2, 224, 224\)"):
        load_task(config)
    with pytest.raises(ConfigError):
        load_config(None, {"model": "timm:test_resnet", "data": str(pictures), "epochs": 0})


def test_every_error_has_three_parts_and_an_exit_code() -> None:
    with pytest.raises(FrostlineError) as caught:
        read_data(RunConfig(model="m", data="absent"))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["found", "try"]
    assert caught.value.exit_code == 1
