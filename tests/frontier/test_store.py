"""The store: what comes back is what was written, or is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faulty_disk import QuickDisk, use_disk
from frostline.errors import DamagedFile, FrontierError
from frostline.frontier.store import BLOCK_ROWS, Column, Store

X = Column("x", "float32")


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def numbers(rows: Any, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Values that are a function of the row number."""
    rows = np.asarray(rows)
    return np.stack(
        [np.random.default_rng(int(r)).standard_normal(shape).astype(dtype) for r in rows]
    ) if len(rows) else np.zeros((0, *shape), dtype)  # fmt: skip


def fill(store: Store, firsts: Any, *shape: int, count: int = BLOCK_ROWS) -> None:
    for first in firsts:
        rows = np.arange(first, min(first + count, store.rows))
        assert store.write(int(first), {"x": numbers(rows, *shape)})


# -- round trips ---------------------------------------------------------------------------------


def test_rows_come_back_in_any_order(tmp_path: Path):
    store = Store(tmp_path, [X], rows=100, seed=b"k")
    fill(store, [64, 0, 96], 2, 3)
    rows = np.array([99, 3, 64, 3, 31, 40, 0, 1, 2])
    values, ok = store.read(rows)
    assert ok.tolist() == [True, True, True, True, True, False, True, True, True]
    assert (values["x"][ok] == numbers(rows[ok], 2, 3)).all()
    assert not values["x"][5].any()
    assert store.present(rows).tolist() == ok.tolist()
    store.close()


def test_nothing_is_there_before_the_first_write(tmp_path: Path):
    store = Store(tmp_path, [X, Column("y", "int64")], rows=10, seed=b"k")
    values, ok = store.read(np.arange(4))
    assert not ok.any()
    assert {name: v.shape for name, v in values.items()} == {"x": (4, 0), "y": (4, 0)}
    assert values["y"].dtype == np.int64
    assert store.verify().checked == 0


def test_another_handle_sees_rows_as_they_come(tmp_path: Path):
    writer = Store(tmp_path, [X], rows=64, seed=b"k")
    reader = Store(tmp_path, [X], rows=64, seed=b"k")
    assert not reader.present(np.arange(64)).any()
    fill(writer, [32], 5)
    assert reader.present(np.arange(64)).tolist() == [False] * 32 + [True] * 32
    values, ok = reader.read(np.arange(30, 34))
    assert ok.tolist() == [False, False, True, True]
    assert (values["x"][2:] == numbers([32, 33], 5)).all()


def test_the_arrays_are_private_copies(tmp_path: Path):
    store = Store(tmp_path, [X], rows=32, seed=b"k")
    fill(store, [0], 4)
    first, _ = store.read(np.arange(32))
    first["x"][:] = -1
    again, ok = store.read(np.arange(32))
    assert ok.all()
    assert (again["x"] == numbers(range(32), 4)).all()


DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "bool", "int8", "int64",
          "uint16", "complex64"]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_columns_come_back_bit_for_bit(tmp_path_factory, data: st.DataObject):
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    columns = [Column(f"c{i}", t, ragged=data.draw(st.booleans())) for i, t in enumerate(dtypes)]
    tails = [tuple(data.draw(st.lists(st.integers(0, 4), max_size=3))) for _ in columns]
    rows = data.draw(st.integers(1, 130))
    store = Store(tmp_path_factory.mktemp("s"), columns, rows=rows, seed=b"k")
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    firsts = random.permutation(np.arange(0, rows, BLOCK_ROWS))
    written: dict[int, dict[str, np.ndarray]] = {}
    for first in firsts[: data.draw(st.integers(0, len(firsts)))].tolist():
        count = min(BLOCK_ROWS, rows - first)
        block = {}
        for column, tail in zip(columns, tails, strict=True):
            length = (int(random.integers(0, 9)),) if column.ragged else ()
            size = column.numpy.itemsize * int(np.prod(length + tail)) * count
            high = 2 if column.dtype == "bool" else 256
            raw = random.integers(0, high, size, dtype=np.uint8)
            block[column.name] = raw.view(column.numpy).reshape(count, *length, *tail)
        assert store.write(first, block)
        for i in range(count):
            written[first + i] = {name: v[i] for name, v in block.items()}
    if data.draw(st.booleans()):
        store.close()
        store = Store(store.folder, columns, rows=rows, seed=b"k")
    asked = random.integers(0, rows, 50)
    values, ok = store.read(asked)
    assert ok.tolist() == [int(r) in written for r in asked]
    for column in columns:
        for i in np.flatnonzero(ok):
            row, want = values[column.name][i], written[int(asked[i])][column.name]
            if column.ragged:
                assert not row[len(want) :].view(np.uint8).any() if row[len(want) :].size else True
                row = row[: len(want)]
            assert row.shape == want.shape
            assert row.tobytes() == want.tobytes()
    store.close()


def test_ragged_rows_are_cut_and_padded(tmp_path: Path):
    store = Store(tmp_path, [Column("t", "float32", ragged=True)], rows=96, seed=b"k")
    store.write(0, {"t": numbers(range(32), 3, 2)})
    store.write(32, {"t": numbers(range(32, 64), 7, 2)})
    rows = np.array([40, 1])
    longest, ok = store.read(rows)
    assert ok.all()
    assert longest["t"].shape == (2, 7, 2)
    assert (longest["t"][0] == numbers([40], 7, 2)[0]).all()
    assert (longest["t"][1, :3] == numbers([1], 3, 2)[0]).all()
    assert not longest["t"][1, 3:].any()
    for length in (0, 1, 3, 5, 7, 12):
        cut, ok = store.read(rows, lengths={"t": length})
        assert ok.all()
        padded = np.zeros((2, max(length, 7), 2), np.float32)
        padded[:, :7] = longest["t"]
        assert (cut["t"] == padded[:, :length]).all()


def test_lengths_share_few_files_and_take_only_their_room(tmp_path: Path):
    store = Store(tmp_path, [Column("t", "float32", ragged=True)], rows=32 * 64, seed=b"k")
    elements = 0
    for block in range(64):
        length = 33 + block % 32
        store.write(32 * block, {"t": np.ones((32, length, 64), np.float32)})
        elements += 32 * length * 64
    assert len(list(tmp_path.glob("*.rows"))) == 1
    assert store.bytes_on_disk < elements * 4 * 1.03 + 64 * 4096 + 65_536


# -- who may use it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"seed": b"other"},
        {"rows": 65},
        {"columns": [Column("y", "float32")]},
        {"columns": [Column("x", "float64")]},
        {"columns": [Column("x", "float32", "int8")]},
        {"columns": [Column("x", "float32", ragged=True)]},
        {"columns": [X, Column("y", "float32")]},
    ],
)
def test_a_store_of_another_kind_is_refused(tmp_path: Path, other: dict[str, Any]):
    Store(tmp_path, [X], rows=64, seed=b"k").close()
    wanted = {"columns": [X], "rows": 64, "seed": b"k"} | other
    with pytest.raises(FrontierError, match="of another kind"):
        Store(tmp_path, wanted.pop("columns"), **wanted)


def test_a_changed_header_is_refused(tmp_path: Path):
    Store(tmp_path, [X], rows=64, seed=b"k").close()
    header = tmp_path / "store.json"
    whole = header.read_bytes()
    header.write_bytes(whole.replace(b"float32", b"float64"))
    with pytest.raises(DamagedFile):
        Store(tmp_path, [X], rows=64, seed=b"k")
    header.write_bytes(json.dumps(json.loads(whole)).encode())
    with pytest.raises(DamagedFile):
        Store(tmp_path, [X], rows=64, seed=b"k")


def test_what_does_not_fit_is_refused(tmp_path: Path):
    store = Store(tmp_path, [X], rows=64, seed=b"k")
    fill(store, [0], 3)
    good = numbers(range(32), 3)
    for first, values in [
        (0, {}),
        (0, {"y": good}),
        (1, {"x": good}),
        (64, {"x": good}),
        (-32, {"x": good}),
        (32, {"x": good[:0]}),
        (0, {"x": np.concatenate([good, good])}),
        (0, {"x": good.astype(np.float64)}),
        (0, {"x": numbers(range(32), 4)}),
        (0, {"x": np.float32(3)}),
    ]:
        with pytest.raises(FrontierError):
            store.write(first, {k: np.asarray(v) for k, v in values.items()})
    for rows in ([64], [-1], [[0]]):
        with pytest.raises(FrontierError):
            store.read(np.array(rows))
    store.close()
    store.close()
    with pytest.raises(FrontierError, match="closed"):
        store.read(np.array([0]))
    for columns in ([], [X, X]):
        with pytest.raises(FrontierError):
            Store(tmp_path / "n", columns, rows=64, seed=b"k")
    with pytest.raises(FrontierError):
        Column("x", "object")
    with pytest.raises(FrontierError):
        Column("x", "float32", "int4")  # pyright: ignore[reportArgumentType]


# -- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 20_000, 100_000, 300_000, 10_000_000])
def test_the_same_rows_are_kept_whatever_the_order(tmp_path: Path, budget: int):
    kept = []
    for name, seed in (("a", 0), ("b", 1)):
        store = Store(tmp_path / name, [X], rows=1000, seed=b"k", budget_bytes=budget)
        for first in np.random.default_rng(seed).permutation(np.arange(0, 1000, 32)).tolist():
            rows = np.arange(first, min(first + 32, 1000))
            store.write(first, {"x": numbers(rows, 100)})
        kept.append(store.present(np.arange(1000)).tolist())
        assert store.bytes_on_disk <= max(budget, 20_000)
        assert sum(kept[-1]) == store.admitted_rows
    assert kept[0] == kept[1] == sorted(kept[0], reverse=True)


def test_a_ragged_store_stays_in_its_budget(tmp_path: Path):
    columns = [Column("t", "float32", ragged=True)]
    store = Store(tmp_path, columns, rows=3200, seed=b"k", budget_bytes=500_000)
    accepted = [
        store.write(32 * i, {"t": np.ones((32, 1 + i % 9, 40), np.float32)}) for i in range(100)
    ]
    assert any(accepted)
    assert not all(accepted)
    assert 300_000 < store.bytes_on_disk <= 500_000
    assert store.write(0, {"t": np.ones((32, 1, 40), np.float32)})
    assert store.present(np.arange(0, 3200, 32)).tolist() == accepted
