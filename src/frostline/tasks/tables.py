"""Tables of texts and labels: CSV, TSV, JSON Lines and Parquet, read strictly.

A table that is silently half-read trains a model on the wrong data, so nothing is guessed: bad
encoding, NUL bytes, unclosed quotes, ragged or doubled columns, missing labels and empty texts
are errors that name file and line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from frostline.errors import DataError
from frostline.tasks.imports import need
from frostline.tasks.rows import Rows, keep_good

__all__ = ["READERS", "TextOptions", "find_column", "read_table", "text_rows"]

TEXT_COLUMNS = ("text", "sentence", "question", "utterance", "content", "document", "review")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "intent", "sentiment", "y")
_SKIP = "correct the row, or set skip_bad to leave such rows out"

Record = tuple[str, dict[str, Any]]  # where it stands ("line 7"), and its values by column


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How to read a table.

    Attributes:
        text_column: name, or None to find it.
        label_column: name, or None to find it.
        skip_bad: leave rows without text or label out and list them, instead of raising.
    """

    text_column: str | None = None
    label_column: str | None = None
    skip_bad: bool = False


def read_table(path: Path, options: TextOptions) -> Rows:
    """The labelled texts of one file.

    Raises:
        DataError: unreadable, or a row without text or label; names file and line.
    """
    columns, records = READERS[path.suffix.lower()](path)
    text = find_column(columns, options.text_column, TEXT_COLUMNS, what="text", where=str(path))
    label = find_column(columns, options.label_column, LABEL_COLUMNS, what="label", where=str(path))
    rows = [(f"{path}, {place}", record.get(text), record.get(label)) for place, record in records]
    if not rows:
        raise DataError(f"read {path}", found="no rows", fix="one text and label per row")
    return text_rows(rows, skip=options.skip_bad)


def text_rows(rows: Sequence[tuple[str, Any, Any]], *, skip: bool) -> Rows:
    """Check (place, text, label) triples.

    Raises:
        DataError: no text, no label, or text that is none, when bad rows are not skipped.
    """
    checked = [_check(place, text, label) for place, text, label in rows]
    labels = [
        "" if isinstance(c, DataError) else label_name(rows[i][2]) for i, c in enumerate(checked)
    ]
    return keep_good([text for _, text, _ in rows], labels, checked, skip=skip)


def find_column(
    columns: Sequence[str], wanted: str | None, usual: Sequence[str], *, what: str, where: str
) -> str:
    """The column asked for, or the first usual name that is there.

    Raises:
        DataError: no such column.

    Example:
        >>> find_column(["id", "Question"], None, TEXT_COLUMNS, what="text", where="a.csv")
        'Question'
    """
    lowered = {c.strip().lower(): c for c in reversed(columns)}
    if wanted is not None and wanted in columns:
        return wanted
    found = None if wanted else next((lowered[u] for u in usual if u in lowered), None)
    if found is None:
        raise DataError(
            f"find the {what} column {wanted!r} in {where}"
            if wanted
            else f"find the {what} column in {where}",
            found=f"columns {', '.join(map(repr, columns))}"[:500],
            fix=f"name it with {what}_column, or call it one of {', '.join(usual)}",
        )
    return found


def label_name(label: Any) -> str:
    """How a label reads: text without surrounding spaces; 1.0 is "1".

    Example:
        >>> label_name(" yes "), label_name(1.0)
        ('yes', '1')
    """
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def _check(place: str, text: Any, label: Any) -> bytes | DataError:
    found = _text_problem(text) or _label_problem(label)
    if found:
        return DataError(f"use the row at {place}", found=found, fix=_SKIP)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _text_problem(text: Any) -> str | None:
    if not isinstance(text, str):
        return "no text" if text is None else f"a {type(text).__name__} instead of text"
    if not text.strip():
        return "an empty text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text that is not valid Unicode at character {error.start}"
    return None


def _label_problem(label: Any) -> str | None:
    if label is None or (isinstance(label, str) and not label.strip()):
        return "no label"
    if isinstance(label, float) and not label.is_integer():
        return f"the label {label}, a measurement where a class belongs"
    if not isinstance(label, str | int | float):
        return f"a {type(label).__name__} as label"
    return None


def _read_csv(path: Path) -> tuple[list[str], list[Record]]:
    reader = csv.reader(
        io.StringIO(_text(path), newline=""),
        delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
        strict=True,
    )
    rows = list(_csv_rows(reader, path))
    if not rows:
        raise DataError(f"read {path}", found="an empty file", fix="a header line, then rows")
    columns = [c.strip() for c in rows[0][1]]
    if doubled := sorted({c for c in columns if columns.count(c) > 1}):
        _fail(path, rows[0][0], f"the column {doubled[0]!r} twice", "give each its own name")
    records: list[Record] = []
    for line, row in rows[1:]:
        if len(row) != len(columns):
            found = f"{len(row)} fields where the header has {len(columns)}"
            _fail(path, line, found, "put texts that hold commas in double quotes")
        records.append((f"line {line}", dict(zip(columns, row, strict=True))))
    return columns, records


def _csv_rows(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    while True:
        line = reader.line_num + 1  # where this row begins: it may span lines
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = "a quote that is never closed" if "end of data" in str(error) else str(error)
            _fail(path, line, found, "double the quotes inside quoted texts")
        if row:
            yield line, row


def _read_jsonl(path: Path) -> tuple[list[str], list[Record]]:
    records: list[Record] = []
    columns: dict[str, None] = {}
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            _fail(path, line, f"no JSON object: {error}", "one object per line")
        if not isinstance(row, dict):
            _fail(path, line, f"a {type(row).__name__}", "one object per line")
        records.append((f"line {line}", row))
        columns.update(dict.fromkeys(row))
    return list(columns), records


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that occurs twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is no JSON number")


def _read_parquet(path: Path) -> tuple[list[str], list[Record]]:
    parquet = need("pyarrow.parquet", extra="text")
    try:
        table = parquet.read_table(path)
        table.validate(full=True)
        rows = table.to_pylist()
    # Arrow raises its own classes, OSError and ValueError alike on damaged files.
    except Exception as error:
        raise DataError(
            f"read {path}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="a Parquet file with a text and a label column",
        ) from error
    return list(table.column_names), [(f"row {i}", row) for i, row in enumerate(rows, start=1)]


#: Readers by suffix: (column names, records).
READERS: dict[str, Callable[[Path], tuple[list[str], list[Record]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"read {path}", found=str(error), fix="a readable file") from error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        _fail(path, 1, "UTF-16 text", "save it as UTF-8")
    if b"\0" in raw:
        _fail(path, _line(raw, raw.index(b"\0")), "a NUL byte", "save it as plain UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"the byte 0x{raw[error.start]:02x}, which is not UTF-8"
        _fail(path, _line(raw, error.start), found, "save it as UTF-8")


def _line(raw: bytes, offset: int) -> int:
    return raw.count(b"\n", 0, offset) + 1


def _fail(path: Path, line: int, found: str, fix: str) -> NoReturn:
    raise DataError(f"read {path}, line {line}", found=found, fix=fix)
