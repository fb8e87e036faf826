from __future__ import annotations

import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from frostline.errors import DataError
from frostline.tasks.config import RunConfig
from frostline.tasks.data import Data, read_data, split_rows
from frostline.tasks.rows import Rows

PARTS = ("train", "val", "test")


def read(data: Path | str, **settings: Any) -> Data:
    return read_data(RunConfig(model="timm:any", data=str(data), **settings))


def write_pictures(folder: Path, classes: dict[str, int], *, start: int = 0) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shade = (start + 40 * number + i) % 256
            Image.new("RGB", (6, 5), (shade, number, start % 256)).save(folder / name / f"{i}.png")
    return folder


def write_csv(path: Path, rows: list[tuple[str, str]], header: str = "text,label") -> Path:
    path.write_text(header + "\n" + "".join(f"{t},{y}\n" for t, y in rows), encoding="utf-8")
    return path


MOODS = [(f"text {i}", "up" if i % 2 else "down") for i in range(20)]


# -- splitting ---------------------------------------------------------------------------------


counts = st.dictionaries(st.sampled_from("abcdef"), st.integers(3, 40), min_size=2)


def rows_of(classes: dict[str, int]) -> Rows:
    labels = [name for name, count in classes.items() for _ in range(count)]
    random.Random(0).shuffle(labels)
    inputs = [f"sample {i}" for i in range(len(labels))]
    return Rows(inputs, labels, [text.encode() for text in inputs])


@settings(deadline=None)
@given(counts, st.floats(0.05, 0.5), st.integers(0, 2**32 - 1))
def test_a_split_is_disjoint_complete_stratified_and_repeatable(
    classes: dict[str, int], fraction: float, seed: int
) -> None:
    rows = rows_of(classes)
    total = len(rows.labels)
    assume(max(round(total * fraction), len(classes)) <= total - len(classes))
    rest, share = split_rows(rows, fraction, seed=seed, what="val")
    assert sorted([*rest.inputs, *share.inputs]) == sorted(rows.inputs)
    assert not set(rest.inputs) & set(share.inputs)
    label = dict(zip(rows.inputs, rows.labels, strict=True))
    for part in (rest, share):
        assert [label[x] for x in part.inputs] == part.labels
    size = max(round(total * fraction), len(classes))
    assert len(share.labels) == size
    for name, count in classes.items():
        assert abs(Counter(share.labels)[name] - count * size / total) <= 1
    assert set(rest.labels) == set(classes)
    assert split_rows(rows, fraction, seed=seed, what="val") == (rest, share)


def test_another_seed_makes_another_split() -> None:
    rows = rows_of({"a": 30, "b": 30})
    first, second = (split_rows(rows, 0.3, seed=s, what="val")[1].inputs for s in (0, 1))
    assert first != second


def test_shares_are_of_the_whole_data(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(200)]
    data = read(write_csv(tmp_path / "d.csv", rows), val_fraction=0.2, test_fraction=0.3)
    assert data.notes["samples"] == {"train": 100, "val": 40, "test": 60}


def test_the_seed_decides_and_is_recorded(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", MOODS)
    a, b, c = read(path, seed=3), read(path, seed=3), read(path, seed=4)
    assert a.splits["test"].inputs == b.splits["test"].inputs != c.splits["test"].inputs
    assert a.notes["split_from"]["test"] == "train, stratified, seed 3"
    assert a.notes["split_from"]["train"] == "data"
    assert json.loads(json.dumps(a.notes)) == a.notes


# -- folders of pictures -----------------------------------------------------------------------


def test_class_folders_without_splits(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"ant": 10, "bee": 20})
    data = read(tmp_path)
    assert (data.kind, data.labels) == ("image", ("ant", "bee"))
    found = sorted(p for part in PARTS for p in data.splits[part].inputs)
    assert found == sorted(str(p) for p in tmp_path.rglob("*.png"))
    for part in PARTS:
        names = [data.labels[y] for y in data.targets(part)]
        assert names == [Path(p).parent.name for p in data.inputs(part)]


def test_split_folders_are_kept_under_any_of_their_names(tmp_path: Path) -> None:
    for i, name in enumerate(("Train", "validation", "testing")):
        write_pictures(tmp_path / name, {"a": 3, "b": 3}, start=80 * i)
    data = read(tmp_path)
    assert data.notes["split_from"] == dict.fromkeys(PARTS, "data")
    assert all("testing" in p for p in data.splits["test"].inputs)
    assert data.notes["identical_across_splits"] == {}


def test_missing_splits_are_cut_from_training_only(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", {"a": 10, "b": 10})
    write_pictures(tmp_path / "test", {"a": 2, "b": 2}, start=100)
    data = read(tmp_path)
    assert data.notes["samples"] == {"train": 17, "val": 3, "test": 4}
    assert all("train" in p for p in data.splits["val"].inputs)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = read(write_pictures(tmp_path, {"bus": 8, "train": 8}))
    assert data.labels == ("bus", "train")


def test_numbers_as_class_names_sort_by_value(tmp_path: Path) -> None:
    assert read(write_pictures(tmp_path, {"10": 5, "9": 5, "1": 5})).labels == ("1", "9", "10")


def test_other_files_and_hidden_ones_are_passed_over(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 8, "b": 8})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "._0.png").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("x")
    assert sum(read(tmp_path).notes["samples"].values()) == 16


def test_identical_pictures_across_splits_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i, name in enumerate(("train", "val", "test")):
        write_pictures(tmp_path / name, {"a": 3, "b": 3}, start=80 * i)
    source = tmp_path / "train" / "a" / "0.png"
    Image.open(source).save(tmp_path / "test" / "a" / "copy.bmp")  # other bytes, same pixels
    with caplog.at_level(logging.WARNING):
        data = read(tmp_path)
    assert data.notes["identical_across_splits"] == {"train and test": 1}
    assert "train and test share 1 identical" in caplog.text


def test_skipped_pictures_are_counted_and_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 8, "b": 8})
    bad = tmp_path / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=r"a/3\.png"):
        read(tmp_path)
    data = read(tmp_path, skip_bad=True)
    assert data.notes["skipped"] == 1
    assert "a/3.png" in data.notes["skipped_first"][0]
    assert sum(data.notes["samples"].values()) == 15


# -- tables ------------------------------------------------------------------------------------


def test_formats_agree(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    write_csv(tmp_path / "d.csv", MOODS)
    (tmp_path / "d.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in MOODS))
    lines = [json.dumps({"text": t, "label": y, "more": [1]}) for t, y in MOODS]
    (tmp_path / "d.jsonl").write_text("\n\n".join(lines))
    columns = {"text": [t for t, _ in MOODS], "label": [y for _, y in MOODS]}
    parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    first, *others = [read(tmp_path / f"d.{s}") for s in ("csv", "tsv", "jsonl", "parquet")]
    for other in others:
        assert other.splits == first.splits
    assert first.kind == "text"


def test_csv_details(tmp_path: Path) -> None:
    text = '\ufefftext,label,n\r\n"a, ""b""\nc",x,1\r\n\r\n' + "".join(
        f"row {i},{'xy'[i % 2]},2\r\n" for i in range(19)
    )
    path = tmp_path / "d.csv"
    path.write_bytes(text.encode())
    found = [t for part in PARTS for t in read(path).splits[part].inputs]
    assert 'a, "b"\nc' in found
    assert len(found) == 20


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(20)]
    assert read(write_csv(tmp_path / "a.csv", rows, "Question, Class")).labels == ("a", "b")
    odd = write_csv(tmp_path / "b.csv", rows, "one,two")
    with pytest.raises(DataError, match="text_column"):
        read(odd)
    assert read(odd, text_column="one", label_column="two").labels == ("a", "b")


def test_split_files_in_a_folder_and_by_pattern(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "dev", "test")):
        write_csv(tmp_path / f"{name}.csv", [(f"{i} {t}", y) for t, y in MOODS])
    (tmp_path / "labels.json").write_text("[]")
    by_folder, by_pattern = read(tmp_path), read(f"{tmp_path}/*.csv")
    assert by_folder.splits == by_pattern.splits
    assert by_folder.splits["val"].inputs[0] == "1 text 0"


def test_rows_without_text_or_label_can_be_skipped(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", [*MOODS, ("", "up"), ("words", " ")])
    with pytest.raises(DataError, match="line 22"):
        read(path)
    data = read(path, skip_bad=True)
    assert data.notes["skipped"] == 2
    assert "line 23" in data.notes["skipped_first"][1]


# -- the user's own ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [
        ("arrays", "image", ("0", "1")),
        ("pil_splits", "image", ("a", "b")),
        ("texts", "text", ("a", "b")),
        ("text_dataset", "text", ("no", "yes")),
        ("image_dataset", "image", ("a", "b")),
    ],
)
def test_data_from_a_callable(name: str, kind: str, labels: tuple[str, ...]) -> None:
    data = read(f"data_for_tests:{name}")
    assert (data.kind, data.labels) == (kind, labels)
    assert sum(data.notes["samples"].values()) == 40
    made = "train, stratified, seed 0"
    assert data.notes["split_from"]["val"] == ("data" if name == "pil_splits" else made)


def test_a_callable_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moods_here.py").write_text(
        "def rows():\n    return [(f'text {i}', i % 2) for i in range(20)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert read("moods_here:rows").labels == ("0", "1")


def test_raw_inputs_are_what_was_read(tmp_path: Path) -> None:
    data = read(write_csv(tmp_path / "d.csv", MOODS))
    assert list(data.inputs("val")) == list(data.splits["val"].inputs)
    pictures = read("data_for_tests:arrays").inputs("train")
    assert all(isinstance(a, np.ndarray) for a in pictures)
