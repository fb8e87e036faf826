"""A key changes with everything that shapes stored values, and with nothing else."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import random
import re
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frostline import _io
from frostline.backends.torch.modes import hold_module, release_module
from frostline.errors import FrontierError
from frostline.frontier import describe, parts
from frostline.frontier.describe import fingerprint
from frostline.frontier.key import CacheKey, unknown
from frostline.frontier.parts import compute_parts, model_parts, region_key, region_modules

# -- keys of JSON --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
PARTS = st.dictionaries(
    st.sampled_from(["weights", "structure", "modes", "versions", "compute", "data", "encoding"])
    | st.text(),
    JSON,
    max_size=6,
)


@given(PARTS)
def test_a_key_survives_a_file_and_any_order_of_mappings(given_parts):
    key = CacheKey(given_parts)
    assert CacheKey(json.loads(_io.canonical_json(key.parts))) == key
    assert CacheKey(_reversed(given_parts)) == key
    assert key.differences(CacheKey(given_parts)) == ()


@given(PARTS, PARTS)
@settings(max_examples=300)
def test_keys_are_equal_exactly_when_their_parts_are_and_else_say_why(one, other):
    a, b = CacheKey(one), CacheKey(other)
    same = _io.canonical_json(a.parts) == _io.canonical_json(b.parts)
    assert (a == b) == same == (a.differences(b) == ())
    assert all(isinstance(reason, str) and reason for reason in a.differences(b))


def _reversed(value: object) -> object:
    if isinstance(value, dict):
        return {k: _reversed(v) for k, v in reversed(value.items())}
    return [_reversed(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("pair", [(1, 1.0), (1, True), (0, False), (None, False), ("1", 1),
                                  ([], {}), ([1, 2], [2, 1]), (0.0, -0.0), ("", None)])  # fmt: skip
def test_values_that_python_takes_for_equal_are_told_apart(pair):
    one, other = (CacheKey({"data": {"x": value}}) for value in pair)
    assert one != other
    assert one.differences(other)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), b"bytes", {1: 2}, {0: 2}, {None: 1}, {1, 2}, object(), "\ud800",
     {"\ud800": 1}, 10**400, np.float32(1), functools.reduce(lambda x, _: [x], range(80), [])],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_what_is_no_plain_json_is_refused(value):
    with pytest.raises(FrontierError, match="cannot make a cache key"):
        CacheKey({"data": value})


def test_a_key_does_not_follow_later_changes_of_its_parts():
    given_parts = {"data": {"files": ["a"]}}
    key = CacheKey(given_parts)
    given_parts["data"]["files"].append("b")
    assert key == CacheKey({"data": {"files": ["a"]}})
    assert key.digest == hashlib.sha256(b'{"data":{"files":["a"]}}').hexdigest()


def test_unknown_equals_nothing_and_says_why():
    one, other = (CacheKey({"data": {"set": unknown("a stream")}}) for _ in range(2))
    assert one != other
    assert one.unknown == ("data.set: a stream",)
    assert one.differences(other) == ("data set was unknown (a stream), now unknown (a stream)",)


@pytest.mark.parametrize(
    ("section", "old", "new", "words"),
    [
        ("weights", {"layer3.0.conv1.weight": "a"}, {"layer3.0.conv1.weight": "b"},
         "weights of layer3.0.conv1 changed"),
        ("weights", {f"layer{i}.weight": "a" for i in range(5)},
         {f"layer{i}.weight": "b" for i in range(5)},
         "weights of layer0, layer1, layer2 and 2 more changed"),
        ("weights", {"a.weight": "a"}, {}, "weights of a not there any more"),
        ("weights", {}, {"a.weight": "a"}, "weights of a new"),
        ("structure", {"fc": {"class": "A", "says": "p=0.1", "digest": "x"}},
         {"fc": {"class": "A", "says": "p=0.2", "digest": "y"}}, "fc was p=0.1, now p=0.2"),
        ("structure", {"fc": {"class": "A", "says": "", "digest": "x"}},
         {"fc": {"class": "A", "says": "", "digest": "y"}}, "code or settings of fc changed"),
        ("modes", {"": True, "bn": False}, {"": True, "bn": True}, "bn now in training mode"),
        ("modes", {"": True}, {"": False}, "the model itself now in evaluation mode"),
        ("versions", {"torch": "2.13.0"}, {"torch": "2.14.1"}, "torch 2.13.0, now 2.14.1"),
        ("versions", {"timm": "1.0"}, {}, "timm 1.0, now nothing"),
        ("compute", {"threads": 4}, {"threads": 2}, "made with 4 threads, now 2"),
        ("compute", {"threads": 1}, {"threads": 2}, "made with 1 thread, now 2"),
        ("compute", {"device": "cpu"}, {"device": "H100"}, "made on cpu, now H100"),
        ("encoding", {"s": "exact"}, {"s": "int8"}, "encoding s was exact, now int8"),
        ("data", "a" * 64, "b" * 64, "data was aaaaaaaaaaaa…, now bbbbbbbbbbbb…"),
        ("modes", {"bn": 0}, {"bn": False}, "modes bn was 0, now false"),
        ("weights", {"a.bias": 1}, {"a.bias": True}, "weights a.bias was 1, now true"),
        ("weights", None, {"a": "b"}, 'weights was null, now {"a":"b"}'),
    ],
)  # fmt: skip
def test_differences_are_told_in_words(section, old, new, words):
    assert CacheKey({section: old}).differences(CacheKey({section: new})) == (words,)


def test_many_differences_are_counted():
    one, other = ({f"file {i:02}": n for i in range(30)} for n in (1, 2))
    told = CacheKey({"data": one}).differences(CacheKey({"data": other}))
    assert len(told) == 6
    assert told[-1] == "and 25 more differences of this kind"


# -- one thing at a time -------------------------------------------------------------------------


class Branchy(nn.Module):
    """Frozen stem and block, trainable head; settings of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.ModuleDict({"left": nn.Linear(4, 4), "right": nn.Linear(4, 4)})
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(4, 2)
        self.scale, self.names, self.table = 2.0, ["a", "b"], {"x": 1, "y": 2}
        self.shift = torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).mean((2, 3)) * self.scale
        return self.head(self.drop(sum(branch(x) for branch in self.block.values())))


def branchy() -> Branchy:
    torch.manual_seed(0)
    model = Branchy().requires_grad_(requires_grad=False)
    model.head.requires_grad_()
    return model


SLOT = SimpleNamespace(name="block", shape=(4,), dtype=torch.float32)


def key_of(model: nn.Module, **changed: object) -> CacheKey:
    arguments = {
        "skipped": ["stem", "block.left", "block.right"],
        "passed": ["", "drop"],
        "tensors": [],
        "slots": [SLOT],
        "preparation": {"transform": fingerprint(str.upper)},
        "data": {"sha256": "ab"},
    }
    return region_key(model, **arguments | changed)


def _flip(tensor: torch.Tensor) -> None:
    tensor.detach().view(torch.uint8).reshape(-1)[0].bitwise_xor_(1)


def _in_training(module: nn.Module) -> None:
    module.train(not module.training)


def _hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


def _pre_hooked(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: args)


def _own_forward(module: nn.Module) -> None:
    module.forward = lambda x: x


def _reordered(model: nn.Module) -> None:
    model.block = nn.ModuleDict({name: model.block[name] for name in ("right", "left")})


def _tied(model: nn.Module) -> None:
    model.block["right"] = model.block["left"]


CHANGES: dict[str, Callable[[Branchy], object]] = {
    "one weight bit": lambda m: _flip(m.stem[0].weight),
    "a bit of a bias in a branch": lambda m: _flip(m.block["right"].bias),
    "a running statistic": lambda m: _flip(m.stem[1].running_var),
    "a counter among the buffers": lambda m: m.stem[1].num_batches_tracked.add_(1),
    "weights of another dtype": lambda m: m.block["left"].bfloat16(),
    "weights in another order": lambda m: m.stem[0].to(memory_format=torch.channels_last),
    "the mode of a norm": lambda m: _in_training(m.stem[1]),
    "the mode of a passed module": lambda m: _in_training(m.drop),
    "a number among the settings": lambda m: setattr(m, "scale", 2.5),
    "its type": lambda m: setattr(m, "scale", 2),
    "a list among the settings": lambda m: m.names.append("c"),
    "a value of a dict": lambda m: m.table.update(x=2),
    "the order of a dict in the settings": lambda m: setattr(m, "table", {"y": 2, "x": 1}),
    "a tensor that is no buffer": lambda m: _flip(m.shift),
    "a setting of an inner module": lambda m: setattr(m.stem[1], "eps", 1e-3),
    "a setting without a place in extra_repr": lambda m: setattr(m.stem[0], "extra", 1),
    "padding": lambda m: setattr(m.stem[0], "padding", (1, 1)),
    "a module of another class": lambda m: m.stem.__setitem__(2, nn.GELU()),
    "one more module": lambda m: m.stem.append(nn.Identity()),
    "the order of children": _reordered,
    "one module in two places": _tied,
    "a hook": lambda m: _hooked(m.stem[0]),
    "a hook before": lambda m: _pre_hooked(m.stem),
    "a forward of its own": lambda m: _own_forward(m.stem[2]),
    "dropout of a passed module": lambda m: setattr(m.drop, "p", 0.2),
    "compilation": lambda m: m.stem.compile(),
    "the same bits as another dtype": lambda m: m.stem[1].register_buffer(
        "num_batches_tracked", m.stem[1].num_batches_tracked.view(torch.float64)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_region_changes_the_key(change):
    model = branchy()
    before = key_of(model)
    assert not before.unknown
    CHANGES[change](model)
    after = key_of(model)
    assert after != before
    assert before.differences(after)


IRRELEVANT: dict[str, Callable[[Branchy], object]] = {
    "nothing": lambda m: None,
    "trainable weights": lambda m: _flip(m.head.weight),
    "settings of a live module": lambda m: setattr(m.head, "extra", 1),
    "the mode of a live module": lambda m: _in_training(m.head),
    "gradients": lambda m: setattr(m.head.weight, "grad", torch.ones(2, 4)),
    "a hook on a live module": lambda m: _hooked(m.head),
    "a use": lambda m: m.eval()(torch.ones(2, 3, 8, 8)) is m.train(),
    "an equal object in the place of another": lambda m: setattr(m, "names", ["a", "b"]),
    "an equal tensor in the place of another": lambda m: setattr(m, "shift", torch.ones(3)),
}


@pytest.mark.parametrize("change", IRRELEVANT)
def test_what_the_region_does_not_depend_on_changes_nothing(change):
    model = branchy()
    before = key_of(model)
    IRRELEVANT[change](model)
    assert before.differences(key_of(model)) == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"data": {"sha256": "ac"}},
        {"preparation": {"transform": fingerprint(str.lower)}},
        {"encoding": "bfloat16"},
        {"encoding": {"block": "int8"}},
        {"slots": [SimpleNamespace(name="block", shape=(5,), dtype=torch.float32)]},
        {"slots": [SimpleNamespace(name="block", shape=(4,), dtype=torch.bfloat16)]},
        {"slots": [SimpleNamespace(name="other", shape=(4,), dtype=torch.float32)]},
        {"slots": []},
        {"skipped": ["stem", "block.left"]},
        {"tensors": ["head.weight"]},
        {"passed": None},
    ],
    ids=ascii,
)
def test_a_change_of_the_request_changes_the_key(changed):
    model = branchy()
    assert key_of(model) != key_of(model, **changed)


@pytest.mark.parametrize("section", ["data", "preparation"])
def test_without_an_identity_no_two_keys_are_equal(section):
    model = branchy()
    one, other = (key_of(model, **{section: None}) for _ in range(2))
    assert one != other
    assert one.unknown[0].startswith(section)


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _set(read: Callable[[], object], write: Callable[..., object], value: object) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _attribute(owner: object, name: str, value: object) -> contextlib.AbstractContextManager[None]:
    return _set(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


@contextlib.contextmanager
def _variable(name: str) -> Iterator[None]:
    os.environ[name] = "COMPATIBLE"
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


COMPUTE: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "threads": _threads,
    "default dtype": lambda: _set(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: _set(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, value=True
    ),
    "precision of products": lambda: _attribute(
        torch.backends.mkldnn.matmul, "fp32_precision", "bf16"
    ),
    "oneDNN": lambda: _attribute(torch.backends.mkldnn, "enabled", value=False),
    "fast path": lambda: _set(
        torch.backends.mha.get_fastpath_enabled,
        torch.backends.mha.set_fastpath_enabled,
        value=False,
    ),
    "MKL's kernels": lambda: _variable("MKL_CBWR"),
    "denormals": _flushing,
}


@pytest.mark.parametrize("setting", COMPUTE)
def test_a_change_of_how_is_computed_changes_the_key(setting):
    before = compute_parts()
    with COMPUTE[setting]():
        assert CacheKey(compute_parts()) != CacheKey(before)
    assert CacheKey(compute_parts()) == CacheKey(before)


def test_the_dtype_of_autocast_counts():
    with torch.autocast("cpu", torch.bfloat16):
        one = compute_parts()
    with torch.autocast("cpu", torch.float16):
        assert compute_parts() != one


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_we_do_not_know_is_never_reused(device):
    assert CacheKey(compute_parts(device)).unknown


def test_versions_count(monkeypatch):
    before = parts.version_parts(["yaml"])
    monkeypatch.setattr(parts, "package_version", lambda name: "0.0")
    assert CacheKey(parts.version_parts(["yaml"])) != CacheKey(before)
    monkeypatch.setattr(parts, "FORMAT", 2)
    assert parts.version_parts()["cache format"] == "2"


def test_an_edited_file_changes_the_key(tmp_path):
    file = tmp_path / "a.png"
    model, keys = branchy(), []
    for content in (b"old", b"new"):
        file.write_bytes(content)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        keys.append(key_of(model, data={"files": {file.name: digest}}))
    assert keys[0].differences(keys[1])[0].startswith("data files.a.png was")


def test_a_held_module_has_the_key_of_one_in_evaluation_mode():
    model = branchy().eval()
    before = key_of(model)
    hold_module(model.stem[1])
    assert key_of(model) == before
    release_module(model.stem[1], training=False)
    model.stem[1].train = lambda mode=True: None  # somebody's own
    assert key_of(model) != before


def test_wrappers_leave_no_trace():
    model = branchy()
    assert key_of(nn.DataParallel(model)) == key_of(model)


def test_a_copy_has_the_same_key_and_making_a_key_changes_nothing():
    model = branchy()
    state, counts = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    key = key_of(model)
    assert key_of(copy.deepcopy(model)) == key
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, counts[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_tensors_that_cannot_be_read_make_the_key_unique():
    model = branchy()
    model.stem[0] = nn.Conv2d(3, 4, 3, device="meta").requires_grad_(requires_grad=False)
    one, other = key_of(model), key_of(model)
    assert one != other
    assert any("meta" in reason for reason in one.unknown)


def test_not_knowing_what_is_read_takes_everything_frozen():
    model = branchy()
    before = key_of(model, tensors=None)
    _flip(model.head.weight)
    assert key_of(model, tensors=None) == before
    model.register_buffer("more", torch.zeros(1))
    assert "more" in key_of(model, tensors=None).parts["weights"]


class Borrowing(nn.Module):
    """Its own forward uses the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lender, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(self.stem(x), self.lender.weight)
        return self.head(self.norm(x))


def test_a_weight_that_is_read_around_its_module_counts():
    model = Borrowing().requires_grad_(requires_grad=False)
    model.head.requires_grad_()
    model.norm.requires_grad_()

    def key() -> CacheKey:
        return key_of(model, skipped=["stem"], passed=[""], tensors=["stem.weight"])

    before = key()
    model.norm.running_mean.add_(1)  # moves at every step
    model.norm.num_batches_tracked.add_(1)
    _flip(model.head.weight)
    assert key() == before
    _flip(model.lender.weight)
    assert before.differences(key()) == ("weights of lender changed",)


def test_calls_are_told_from_names():
    model = branchy()
    assert region_modules(model, ["stem#2"], []) == region_modules(model, ["stem"], [])
    assert region_modules(model, ["block.left"], []) == ("", "block", "block.left")
    assert region_modules(model, [""], []) == tuple(dict(model.named_modules()))
    assert region_modules(model, ["stem"]) == tuple(dict(model.named_modules()))


@pytest.mark.parametrize("changed", [{"skipped": ["stm"]}, {"tensors": ["stem.0.wight"]},
                                     {"passed": ["stem.9"]}, {"slots": [SLOT, SLOT]}])  # fmt: skip
def test_names_that_the_model_does_not_have_are_refused(changed):
    with pytest.raises(FrontierError, match="cannot make a cache key"):
        key_of(branchy(), **changed)


# -- code ----------------------------------------------------------------------------------------

SOURCE = '''\
"""A model of the user's own."""
import torch
from torch import nn
import {helpers} as helpers

SCALE = 2.0
TABLE = {{"one": 1}}

def helper(x, power=1):
    return helpers.shift(x) * SCALE

def other(x):
    return x

class Net(nn.Module):
    SIZE = 3

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    @property
    def two(self):
        return 2

    @staticmethod
    def third(x):
        return x / 3

    def forward(self, x):
        return self.step(helper(x)) in {{1, 2, 3, "a", "b", "c"}}

    def step(self, x):
        return [self.inner(v) * TABLE["one"] for v in x]
'''
HELPERS = """\
OFFSET = 1

def shift(x):
    return x + OFFSET

def unused(x):
    return x
"""
_number = itertools.count()


def _module(folder: Path, text: str, name: str) -> object:
    file = folder / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    importlib.invalidate_caches()
    exec(compile(text, file, "exec"), module.__dict__)  # noqa: S102  a fresh import, uncached
    sys.dont_write_bytecode = before
    return module


def _code_key(folder: Path, source: str = SOURCE, helpers: str = HELPERS) -> CacheKey:
    _module(folder, helpers, "frostline_test_helpers")
    module = _module(folder, source.format(helpers="frostline_test_helpers"), "frostline_test_net")
    torch.manual_seed(0)
    return CacheKey(model_parts(module.Net().requires_grad_(requires_grad=False), skipped=[""]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.step(helper(x))", "self.step(other(x))"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("x / 3", "x / 4"),
        ("return 2", "return 4"),
        ("SIZE = 3", "SIZE = 4"),
        ("power=1", "power=2"),
        ('"one": 1', '"one": 2'),
        ("* SCALE", "+ SCALE"),
        ("self.inner(v)", "self.inner(-v)"),
        ("OFFSET = 1", "OFFSET = 2"),
        ("x + OFFSET", "x - OFFSET"),
    ],
)
def test_edited_code_changes_the_key(tmp_path, old, new):
    before = _code_key(tmp_path)
    assert not before.unknown
    assert old in SOURCE.format(helpers="") + HELPERS
    braces = str.maketrans({"{": "{{", "}": "}}"})
    after = _code_key(
        tmp_path,
        SOURCE.replace(old.translate(braces), new.translate(braces)),
        HELPERS.replace(old, new),
    )
    assert before != after
    assert "changed" in before.differences(after)[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('own."""', 'own."""\n\n# a comment\n'),
        ("return x\n\nclass", "return x + 1\n\nclass"),  # a function that nobody calls
        ("def unused(x):\n    return x", "def unused(x):\n    return 2 * x"),
    ],
)
def test_edits_that_no_result_depends_on_change_nothing(tmp_path, old, new):
    assert old in SOURCE + HELPERS
    before = _code_key(tmp_path)
    after = _code_key(tmp_path, SOURCE.replace(old, new), HELPERS.replace(old, new))
    assert before.differences(after) == ()


def test_a_class_of_a_package_is_looked_at_for_foreign_methods(monkeypatch):
    model = branchy()
    before = key_of(model)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
    assert before.differences(key_of(model)) == ("code or settings of stem.1 changed",)


def test_a_wrapper_does_not_pass_for_what_it_wraps():
    def wrapped(factor: int) -> Callable[..., object]:
        @functools.wraps(torch.nn.functional.relu)
        def relu(x: torch.Tensor) -> torch.Tensor:
            return x * factor

        return relu

    assert fingerprint(wrapped(1)) == fingerprint(wrapped(1))
    assert fingerprint(wrapped(1)) != fingerprint(wrapped(2))
    assert fingerprint(wrapped(1)) != fingerprint(torch.nn.functional.relu)


def test_what_a_wrapper_takes_from_its_globals_counts(tmp_path):
    text = """
import functools, torch
FACTOR = {}
@functools.wraps(torch.nn.functional.relu)
def relu(x):
    return x * FACTOR
"""
    one, other = (
        fingerprint(_module(tmp_path, text.format(n), "frostline_test_wrapper").relu)
        for n in (1, 2)
    )
    assert one != other


# -- values --------------------------------------------------------------------------------------


class Plain:
    def __init__(self, **own: object) -> None:
        vars(self).update(own)


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: object) -> None:
        self.x = x


class Hiding(Plain):
    def __getstate__(self) -> dict[str, object]:
        return {}


class Mapped(dict):
    pass


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Number(int):
    pass


class Pair(NamedTuple):
    a: int
    b: int


def _loop(value: object) -> list[object]:
    inner: list[object] = [value]
    inner.append(inner)
    return inner


DIFFERENT: list[Callable[[], object]] = [
    lambda: None, lambda: True, lambda: 1, lambda: 1.0, lambda: 1j, lambda: "1", lambda: b"1",
    lambda: Number(1), lambda: Number(2), lambda: 2**70, lambda: 2**71, lambda: float("nan"),
    lambda: float("inf"), lambda: 0.0, lambda: -0.0, lambda: "é", lambda: "\ud800",
    lambda: {"a", "b", "c", "d"}, list, tuple, dict, set, frozenset, lambda: [1, 2],
    lambda: [2, 1], lambda: (1, 2), lambda: Pair(1, 2), lambda: [[1], 2], lambda: [[1, 2]],
    lambda: {"a": 1, "b": 2}, lambda: {"b": 2, "a": 1}, lambda: {1: "a"}, lambda: {"1": "a"},
    lambda: {1, 2}, lambda: {1, 3}, lambda: OrderedDict(a=1), lambda: Mapped(a=1),
    lambda: deque([1]), lambda: deque([1], maxlen=3), lambda: _loop(1), lambda: _loop(2),
    lambda: torch.float32, lambda: "torch.float32", lambda: torch.device("cpu"),
    lambda: torch.ones(2), lambda: torch.ones(3), lambda: torch.ones(2).double(),
    lambda: torch.ones(2, 2), lambda: nn.Parameter(torch.ones(2)), lambda: np.ones(2),
    lambda: np.ones((2, 1)), lambda: np.zeros(2), lambda: np.float32(1), lambda: np.float64(1),
    lambda: np.array(["a", None]), lambda: np.dtype("f4"), lambda: np.dtype("f8"),
    lambda: Path("a"), lambda: Path("b"), lambda: re.compile("a"),
    lambda: re.compile("a", re.ASCII),
    lambda: Colour.RED, lambda: Colour.BLUE, lambda: Plain(x=1), lambda: Plain(x=2),
    lambda: Plain(y=1), lambda: Slotted(1), lambda: Slotted(2), lambda: Hiding(x=1),
    lambda: Hiding(x=2), lambda: SimpleNamespace(x=1), lambda: len, lambda: "builtins.len",
    lambda: str.upper, lambda: "a".upper, lambda: "b".upper, lambda: functools.partial(len, "a"),
    lambda: functools.partial(len, "b"), lambda: Plain, lambda: Slotted, lambda: Plain(x=1).__eq__,
    lambda: nn.Linear(1, 1).eval().requires_grad_(requires_grad=False).double(), nn.ReLU,
    lambda: nn.ReLU(inplace=True), lambda: nn.ReLU().eval(), lambda: torch.relu,
    lambda: torch.nn.functional.relu, lambda: torch.ops.aten.relu, lambda: random.Random(1),
    lambda: random.Random(2), lambda: np.random.default_rng(1), lambda: np.random.default_rng(2),
    lambda: slice(1), lambda: slice(2), lambda: range(3), lambda: range(4), lambda: ...,
    lambda: json, lambda: logging.getLogger("a"), threading.Lock,
    lambda: weakref.ref(Colour), lambda: int, lambda: list[int], lambda: lambda x: x,
    lambda: lambda x: x + 1,
]  # fmt: skip


def test_values_that_differ_are_told_apart():
    values = [make() for make in DIFFERENT]
    found = [json.dumps(fingerprint(value), sort_keys=True) for value in values]
    twice = {text for text in found if found.count(text) > 1}
    assert not twice, [repr(v) for v, text in zip(values, found, strict=True) if text in twice]


def test_values_made_alike_are_equal():
    for number, make in enumerate(DIFFERENT):
        if "nn.Linear" in (made := repr(one := make())) or made.startswith("Linear"):
            continue  # random weights
        assert fingerprint(one) == fingerprint(make()), (number, made)


def _opened() -> object:
    return open(__file__, "rb", buffering=0)


@pytest.mark.parametrize(
    "make",
    [lambda: (x for x in ()), torch.Generator, _opened, lambda: Plain(x=_opened()),
     lambda: [[(x for x in ())]], lambda: functools.reduce(lambda x, _: [x], range(300), []),
     sys._getframe],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_described_equals_nothing(make):
    value = make()
    assert fingerprint(value) != fingerprint(value)
    assert "unknown" in fingerprint(value)


def test_the_place_of_what_is_unknown_is_told():
    model = branchy()
    model.stem[0].source = open(__file__)  # noqa: SIM115
    with model.stem[0].source:
        reasons = key_of(model).unknown
    assert reasons == ("structure.stem.0: an _io.TextIOWrapper as source",)


def test_what_is_unknown_is_told_wherever_it_is_used():
    model = branchy()
    model.stem[0].stream = model.stem[2].stream = (x for x in ())
    assert key_of(model).unknown == (
        "structure.stem.0: a generator as stream",
        "structure.stem.2: a generator as stream",
    )


def test_shared_values_are_described_once_and_large_ones_refused(monkeypatch):
    wide = [["x"] * 20]
    for _ in range(40):
        wide = [wide, wide]  # 2**40 lists, if each were described
    assert "digest" in fingerprint(wide)
    monkeypatch.setattr(describe, "_MAX_NODES", 100)
    assert "unknown" in fingerprint([[i] for i in range(200)])


def test_a_trainable_tensor_among_the_settings_counts_by_shape_only():
    model = branchy()
    model.drop.loose = [nn.Parameter(torch.zeros(2))]
    before = key_of(model)
    model.drop.loose[0].data.add_(1)
    assert key_of(model) == before


# -- another process -----------------------------------------------------------------------------

_CHILD = """
import sys
sys.path[:0] = {paths!r}
import warnings; warnings.simplefilter("ignore")
{imports}
import importlib.util
spec = importlib.util.spec_from_file_location("test_key_of_child", {file!r})
module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module
spec.loader.exec_module(module)
key = module.process_key()
print(key.digest)
"""


def process_key() -> CacheKey:
    values = [fingerprint(make()) for make in DIFFERENT[:-2] if not isinstance(make(), nn.Linear)]
    return CacheKey({**key_of(branchy()).parts, "values": values})


@pytest.mark.parametrize("imports", ["", "import PIL.Image, scipy, yaml"])
def test_another_process_makes_the_same_key(imports):
    def ask(hash_seed: str) -> str:
        paths = [str(Path(__file__).parents[1])]
        code = _CHILD.format(paths=paths, file=__file__, imports=imports)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return done.stdout.strip()

    assert len({ask("1"), ask("2")}) == 1
