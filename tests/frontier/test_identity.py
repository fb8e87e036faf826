"""Digests of samples and of data sets: equal for equal things, in any process, and else not."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import io
import os
import subprocess
import sys
import textwrap
import threading
import types
from collections import OrderedDict, UserDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from frostline.frontier.identity import UNKNOWN, content_digest, fingerprint

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@dataclasses.dataclass
class Record:
    values: torch.Tensor
    label: int = 0


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@given(PLAIN, PLAIN)
def test_digests_are_equal_exactly_for_equal_things(one, other):
    assert content_digest(one) == content_digest(copy.deepcopy(one)) != UNKNOWN
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))
    if repr(one) != repr(other):
        assert content_digest(one) != content_digest(other)
        assert fingerprint(one) != fingerprint(other)


def _pairs() -> list[tuple[object, object]]:
    """Things that look alike and are not."""
    ones, base = torch.ones(2, 3), np.arange(6.0)
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    touched = picture.copy()
    touched.putpixel((3, 3), (1, 2, 4))
    return [
        (1, True), (1, 1.0), ("1", 1), (b"a", "a"), (0.0, -0.0), ([], ()), ([1], (1,)), ({}, []),
        ([[1], 2], [1, [2]]), (["ab", "c"], ["a", "bc"]), (["a"] * 20, ["a"] * 19 + ["b"]),
        ([("a", 1)] * 20, [("a", 1)] * 19 + [("a", 2)]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"a": None}, {"a": "None"}),
        (ones, torch.ones(3, 2)), (ones, ones.double()), (ones, ones.int()), (ones, ones.numpy()),
        (ones, torch.tensor([[1.0, 1, 1], [1, 1, 1.0000001]])),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16)),
        (base, np.array([0.0, 1, 2, 3, 4, 6])),
        (base, base.reshape(2, 3)), (base, base.astype(">f8")), (base, base.astype(np.float32)),
        (np.array(["a", 1], object), np.array(["a", 2], object)),
        (np.float32(1), np.float64(1)), (picture, touched), (picture, picture.convert("L")),
        (picture, picture.resize((2, 8))), (Colour.RED, Colour.BLUE), ({1, 2}, {1, 3}),
        (Record(ones), Record(ones, 1)), (Record(ones), {"values": ones, "label": 0}),
        (OrderedDict(a=1), {"a": 1}), (UserDict(a=1), UserDict(a=2)),
        (slice(1, 2), slice(1, 3)), (range(3), range(4)), (torch.float32, torch.float64),
    ]  # fmt: skip


@pytest.mark.parametrize("pair", _pairs(), ids=lambda pair: f"{pair[0]!r:.20}")
def test_what_looks_alike_is_told_apart(pair):
    one, other = pair
    for digest in (content_digest, lambda value: fingerprint(value).digest):
        assert digest(one) == digest(copy.deepcopy(one))
        assert digest(one) not in (digest(other), None, UNKNOWN)
        assert digest(other) not in (None, UNKNOWN)


def test_the_memory_layout_does_not_count():
    values = torch.arange(12.0).reshape(3, 4)
    assert content_digest(values.t().contiguous()) == content_digest(values.t())
    assert content_digest(values[::2].clone()) == content_digest(values[::2])
    array = np.arange(12.0).reshape(3, 4)
    assert content_digest(np.asfortranarray(array)) == content_digest(array)
    assert content_digest(np.ascontiguousarray(array[:, ::2])) == content_digest(array[:, ::2])
    assert content_digest((values, values)) == content_digest((values, values.clone()))


def test_circles_end():
    one: list[object] = [1]
    one.append(one)
    other: list[object] = [2]
    other.append(other)
    assert content_digest(one) not in (UNKNOWN, content_digest(other))


def test_nesting_without_end_is_unknown():
    deep: object = 1
    for _ in range(5_000):
        deep = [deep]
    assert content_digest(deep) == UNKNOWN
    assert "deep" in fingerprint(deep).unknown


class Angry:
    def __reduce_ex__(self, protocol):
        raise ZeroDivisionError("no copies")


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (lambda: threading.Lock(), "_thread.lock"),  # noqa: PLW0108
        (lambda: (i for i in ()), "generator"),
        (lambda: io.TextIOWrapper(io.BytesIO()), "TextIOWrapper"),
        (Angry, "no copies"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.ones(2, 2).to_sparse(), "sparse"),
    ],
)
def test_what_cannot_be_read_is_unknown(thing, said):
    value = {"inside": [thing()]}
    assert content_digest(value) == UNKNOWN
    found = fingerprint(value)
    assert found.digest is None
    assert said in found.unknown


def _function(body: str, **names: object) -> types.FunctionType:
    space: dict[str, object] = {"__name__": "users_script", **names}
    exec(textwrap.dedent(body), space)  # noqa: S102
    return space["f"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x): return x + 1", "def f(x): return x + 2"),
        ("def f(x): return x + 1", "def f(x): return x - 1"),
        ("def f(x): return x.a()", "def f(x): return x.b()"),
        ("def f(x, y=1): return x", "def f(x, y=2): return x"),
        ("def f(x, *, y=1): return x", "def f(x, *, y=2): return x"),
        ("def f(x): return (lambda y: y + 1)(x)", "def f(x): return (lambda y: y + 2)(x)"),
        ("def g(n):\n def f(x): return n\n return f\nf = g(1)",
         "def g(n):\n def f(x): return n\n return f\nf = g(2)"),
        ("N = 1\ndef f(x): return x + N", "N = 2\ndef f(x): return x + N"),
        ("def g(x): return 1\ndef f(x): return g(x)", "def g(x): return 2\ndef f(x): return g(x)"),
        ("class C:\n def m(self): return 1\ndef f(x): return C().m()",
         "class C:\n def m(self): return 2\ndef f(x): return C().m()"),
        ("class C:\n k = 1\ndef f(x): return C.k", "class C:\n k = 2\ndef f(x): return C.k"),
        ("class B:\n k = 1\nclass C(B): pass\ndef f(x): return C.k",
         "class B:\n k = 2\nclass C(B): pass\ndef f(x): return C.k"),
        ("class C:\n @property\n def p(self): return 1\ndef f(x): return C().p",
         "class C:\n @property\n def p(self): return 2\ndef f(x): return C().p"),
        ("class C:\n @staticmethod\n def p(): return 1\ndef f(x): return C().p",
         "class C:\n @staticmethod\n def p(): return 2\ndef f(x): return C().p"),
        ("import functools\n@functools.lru_cache\ndef g(x): return 1\ndef f(x): return g(x)",
         "import functools\n@functools.lru_cache\ndef g(x): return 2\ndef f(x): return g(x)"),
    ],
)  # fmt: skip
def test_code_is_part_of_a_function(one, other):
    assert fingerprint(_function(one)) == fingerprint(_function(one))
    assert fingerprint(_function(one)).digest not in (None, fingerprint(_function(other)).digest)


def test_comments_and_blank_lines_are_not():
    assert fingerprint(_function("def f(x): return x")) == fingerprint(
        _function("\n\n# A comment.\n\ndef f(x):\n    # And more.\n    return x")
    )


def test_functions_of_a_users_module_are_followed():
    helpers = types.ModuleType("users_helpers")
    helpers.g = _function("def f(x): return 1")
    f = _function("def f(x): return helpers.g(x)", helpers=helpers)
    before = fingerprint(f)
    helpers.unused = 1
    assert fingerprint(f) == before
    helpers.g = _function("def f(x): return 2")
    assert fingerprint(f) != before


def test_partials_methods_and_modules():
    assert fingerprint(functools.partial(max, 1)) != fingerprint(functools.partial(max, 2))
    assert fingerprint([1].append) != fingerprint([2].append)
    linear = torch.nn.Linear(2, 2)
    before = fingerprint(linear)
    assert fingerprint(copy.deepcopy(linear)) == before
    with torch.no_grad():
        linear.weight[0, 0] += 1
    assert before.digest not in (None, fingerprint(linear).digest)
    assert fingerprint(defaultdict(list)) != fingerprint(defaultdict(int))


def test_transforms_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms.v2")

    def make(size: int) -> object:
        return transforms.Compose([transforms.RandomResizedCrop(size), transforms.ToImage()])

    assert fingerprint(make(32)) == fingerprint(make(32)) != fingerprint(make(33))
    assert fingerprint(make(32)).digest


def test_generators_by_their_state():
    for make in (lambda: torch.Generator().manual_seed(1), lambda: np.random.default_rng(1)):
        before, generator = fingerprint(make()), make()
        assert fingerprint(generator) == before
        torch.rand(1, generator=generator) if isinstance(generator, torch.Generator) else (
            generator.random()
        )
        assert before.digest not in (None, fingerprint(generator).digest)


# -- files -----------------------------------------------------------------------------------------


def _rewrite(path: Path) -> None:
    old = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(old + 1, old + 1))


@pytest.mark.parametrize("how", [str, Path, lambda p: [(str(p), i) for i in range(30)],
                                 lambda p: {"files": [str(p)]}])  # fmt: skip
def test_a_file_that_is_named_counts(tmp_path, how):
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    before = fingerprint(how(file))
    assert fingerprint(how(file)) == before
    assert content_digest(str(file)) != UNKNOWN
    _rewrite(file)
    assert before.digest not in (None, fingerprint(how(file)).digest)


@pytest.mark.parametrize("change", ["rewrite", "add", "remove"])
def test_so_does_what_is_in_a_folder(tmp_path, change):
    inner = tmp_path / "train" / "cats"
    inner.mkdir(parents=True)
    for name in "ab":
        (inner / name).write_bytes(b"x" + name.encode())
    data = {"root": str(tmp_path), "names": ["a", "b"]}
    before = fingerprint(data)
    assert fingerprint(data) == before
    if change == "rewrite":
        _rewrite(inner / "b")
    elif change == "add":
        (inner / "c").touch()
    else:
        (inner / "a").unlink()
    assert before.digest not in (None, fingerprint(data).digest)


def test_a_folder_too_large_to_look_at_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("frostline.frontier.identity._MAX_FILES", 3)
    for name in "abcd":
        (tmp_path / name).touch()
    assert "over 3 files" in fingerprint(tmp_path).unknown


def test_a_file_mapped_into_memory_is_named_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(10))
    mapped = np.lib.format.open_memmap(tmp_path / "a.npy", mode="r")
    before = fingerprint(mapped)
    assert fingerprint(np.lib.format.open_memmap(tmp_path / "a.npy", mode="r")) == before
    _rewrite(tmp_path / "a.npy")
    assert before.digest not in (None, fingerprint(mapped).digest)


# -- Hugging Face ----------------------------------------------------------------------------------


def test_hugging_face_data_by_content_and_format():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": list(range(50)), "y": list("ab") * 25})
    again = datasets.Dataset.from_dict({"x": list(range(50)), "y": list("ab") * 25})
    other = datasets.Dataset.from_dict({"x": [*range(49), 0], "y": list("ab") * 25})
    whole = fingerprint(data)
    assert whole.digest
    assert whole == fingerprint(again) != fingerprint(other)
    assert fingerprint(data.select([1, 2])) == fingerprint(data.select(range(1, 3)))
    variants = [data, data.select([1, 2]), data.select([2, 1]), data.with_format("torch"),
                data.with_format("torch", columns=["x"]), data.rename_column("x", "z"),
                data.with_transform(lambda rows: rows),
                data.with_transform(dict)]  # fmt: skip
    assert len({fingerprint(variant) for variant in variants}) == len(variants)


def test_pictures_outside_of_a_table_count(tmp_path):
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    data = datasets.Dataset.from_dict({"picture": [str(tmp_path / "a.png")]})
    data = data.cast_column("picture", datasets.Image())
    before = fingerprint(data)
    assert before.digest
    _rewrite(tmp_path / "a.png")
    assert fingerprint(data) != before


def test_a_table_too_large_to_read_is_unknown(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("frostline.frontier.identity._MAX_TABLE_BYTES", 10)
    data = datasets.Dataset.from_dict({"x": list(range(50))})
    assert "too much to read" in fingerprint(data).unknown


# -- other processes -------------------------------------------------------------------------------

_SCRIPT = """
import numpy as np, torch, functools
from frostline.frontier.identity import content_digest, fingerprint

NAMES = {"a", "b", "c"}

class Data(torch.utils.data.Dataset):
    kinds = frozenset(["x", "y", "z"])

    def __init__(self):
        self.values = torch.arange(6.0)
        self.transform = functools.partial(np.clip, a_min=0, a_max=1)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index in {"q", "r", "s"}:
            return sorted(NAMES)
        return self.transform(self.values[index])

print(fingerprint(Data()).digest, content_digest({"x": {"a", "b", "c"}, "y": torch.ones(3)}))
"""


def test_digests_are_the_same_in_every_process():
    printed = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
    assert "None" not in printed.pop()
