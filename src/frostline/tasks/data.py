"""Data sets by name: read, checked, split.

D is a folder of class folders of pictures, a table of texts and labels (a CSV, TSV, JSON Lines or
Parquet file, a folder with train/val/test files, or a pattern such as ``data/*.csv``), or
``package.module:callable``. Splits the data brings are kept; missing ones are cut from the
training data, stratified by class and seeded. Labelled rows are held as Hugging Face `datasets`
in memory: nothing is downloaded, no cache is written.
"""

from __future__ import annotations

import glob
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frostline.errors import DataError
from frostline.tasks.config import RunConfig
from frostline.tasks.folders import read_image_folder
from frostline.tasks.imports import is_callable_spec, need, resolve_callable
from frostline.tasks.pictures import SUFFIXES, check_pictures
from frostline.tasks.rows import Rows, keep_good, split_name
from frostline.tasks.tables import (
    LABEL_COLUMNS,
    READERS,
    TEXT_COLUMNS,
    TextOptions,
    find_column,
    label_name,
    read_table,
    text_rows,
)

__all__ = ["Data", "nested_order", "read_data", "split_rows"]

_log = logging.getLogger(__name__)
_FORMS = (
    "a folder of class folders of pictures; a .csv, .tsv, .jsonl or .parquet file, or a folder "
    "with train, val and test ones; or 'package.module:callable'"
)
Kind = Literal["image", "text"]


@dataclass(frozen=True)
class Data:
    """A data set cut into three.

    Attributes:
        kind: what the inputs are.
        labels: class names, sorted (by value where all are whole numbers).
        splits: "train", "val", "test" with their rows.
        notes: plain JSON: sizes, where each split came from, what was left out, repeats.
    """

    kind: Kind
    labels: tuple[str, ...]
    splits: Mapping[str, Rows]
    notes: Mapping[str, Any]

    def targets(self, split: str) -> list[int]:
        """Class numbers of a split's rows."""
        number = {name: i for i, name in enumerate(self.labels)}
        return [number[label] for label in self.splits[split].labels]

    def inputs(self, split: str) -> Sequence[Any]:
        """Raw inputs of a split; texts and paths in an Arrow table that workers can share."""
        inputs = self.splits[split].inputs
        if not inputs or not isinstance(inputs[0], str):
            return inputs
        datasets = need("datasets", extra=self.kind)
        return datasets.Dataset.from_dict({"input": list(inputs)})["input"]


def read_data(config: RunConfig) -> Data:
    r"""Read, check and split the data set `config.data`.

    Raises:
        DataError: it cannot be read, or not be split; names file and line.

    Example:
        >>> import tempfile; from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "moods.csv"
        >>> _ = file.write_text("text,label\n" + "fine,good\nbad,poor\n" * 10)
        >>> data = read_data(RunConfig(model="hf:any", data=str(file)))
        >>> data.kind, data.labels, len(data.splits["train"].labels)
        ('text', ('good', 'poor'), 14)
    """
    kind, found = _read(config)
    labels = _labels(found["all" if "all" in found else "train"], config.data)
    origin = dict.fromkeys(found, "data")
    splits = _complete(found, config, origin)
    splits["train"] = _at_most(splits["train"], config, origin)
    _check_classes(splits, labels)
    repeats = _repeats(splits)
    for pair, count in repeats.items():
        _log.warning("%s share %d identical samples: scores may flatter", pair, count)
    skipped = [place for rows in found.values() for place in rows.skipped]
    if skipped:
        _log.warning("left out %d unreadable samples, first: %s", len(skipped), skipped[0])
    notes = {
        "kind": kind,
        "samples": {name: len(rows.labels) for name, rows in splits.items()},
        "split_from": origin,
        "skipped": len(skipped),
        "skipped_first": skipped[:20],
        "identical_across_splits": repeats,
        "classes": dict(sorted(Counter(splits["train"].labels).items())),
    }
    return Data(kind, labels, splits, notes)


def split_rows(rows: Rows, fraction: float, *, seed: int, what: str) -> tuple[Rows, Rows]:
    """Cut a share off, stratified by class and seeded: (the rest, the share).

    Args:
        rows: at least two of each class.
        fraction: share to cut off, (0, 1); never fewer rows than there are classes.
        seed: decides which rows.
        what: name of the share in messages.

    Raises:
        DataError: too few rows.
    """
    selection = need("sklearn.model_selection", extra="text")
    counts = Counter(rows.labels)
    total, least = len(rows.labels), min(counts.values())
    size = min(max(round(total * fraction), len(counts)), total - len(counts))
    if least < 2 or size < len(counts):
        rare = min(counts, key=lambda c: (counts[c], c))
        raise DataError(
            f"cut a {what} split off {total} samples of {len(counts)} classes",
            found=f"only {least} of class {rare!r}",
            fix=f"more samples of it, or bring your own {what} split",
        )
    rest, share = selection.train_test_split(
        range(total), test_size=size, stratify=list(rows.labels), random_state=seed
    )
    return rows.take(sorted(rest)), rows.take(sorted(share))


def nested_order(labels: Sequence[str], *, seed: int) -> list[int]:
    """Places of all samples, so ordered that the first n are a stratified subset for every n.

    One of each class comes first, in the order of their sizes. After that classes take turns by
    the divisors 1, 3, 5, ...: k samples of a class of N come at (k - 1/2) / N, so that the first n
    hold the classes in their proportions. Which sample of a class is next is drawn.

    Args:
        labels: class of each sample, at least one.
        seed: decides which samples, >= 0.

    References:
        Sainte-Lague 1910, "La representation proportionnelle et la methode des moindres carres",
        Annales scientifiques de l'E.N.S. 27: the divisors; with them no class ever loses a seat
        when one more is given.

    Example:
        >>> order = nested_order(list("aaaaaabbb"), seed=0)
        >>> ["".join(sorted("aaaaaabbb"[i] for i in order[:n])) for n in (2, 3, 6)]
        ['ab', 'aab', 'aaaabb']
    """
    random = np.random.default_rng((seed, len(labels)))
    names, classes = np.unique(np.asarray(labels), return_inverse=True)
    turn = np.empty(len(labels))
    for number in range(len(names)):
        places = random.permutation(np.flatnonzero(classes == number))
        turn[places] = (np.arange(len(places)) + 0.5) / len(places)
        turn[places[0]] -= 1  # before all others
    # Classes of one size come at the same time: neither is always first.
    return np.lexsort((random.random(len(labels)), turn)).tolist()


def _at_most(rows: Rows, config: RunConfig, origin: dict[str, str]) -> Rows:
    """The training rows that the settings allow, in the order in which they came."""
    wanted, total = config.train_samples, len(rows.labels)
    if wanted is None or wanted >= total:
        return rows
    if wanted < (classes := len(set(rows.labels))):
        raise DataError(
            f"train on {wanted} of {total} samples",
            found=f"{classes} classes, so not one sample of each",
            fix=f"train_samples={classes} or more",
        )
    origin["train"] += f"; {wanted} of {total}, stratified, seed {config.seed}"
    return rows.take(sorted(nested_order(rows.labels, seed=config.seed)[:wanted]))


def _complete(
    found: Mapping[str, Rows], config: RunConfig, origin: dict[str, str]
) -> dict[str, Rows]:
    whole = "all" in found
    splits = {"train": found["all"]} if whole else dict(found)
    if whole:
        origin["train"] = origin.pop("all")
    base = len(splits["train"].labels)
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if name in splits:
            continue
        # The share is of the data as it came, not of what earlier cuts left.
        share = fraction * base / len(splits["train"].labels)
        rest, cut = split_rows(splits["train"], share, seed=config.seed, what=name)
        splits |= {"train": rest, name: cut}
        origin[name] = f"train, stratified, seed {config.seed}"
    return {name: splits[name] for name in ("train", "val", "test")}


def _labels(rows: Rows, source: str) -> tuple[str, ...]:
    names = set(rows.labels)
    if not names:
        raise DataError(
            f"learn from {source}", found="no usable row to train on", fix="add samples"
        )
    if len(names) < 2:
        raise DataError(
            f"learn classes from {source}",
            found=f"one class only: {', '.join(map(repr, names))}",
            fix="data with at least two classes",
        )
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda n: (int(n), n)))
    return tuple(sorted(names))


def _check_classes(splits: Mapping[str, Rows], labels: tuple[str, ...]) -> None:
    for name in ("val", "test"):
        rows = splits[name]
        if not rows.labels:
            raise DataError(f"use the {name} split", found="no rows", fix="add some, or remove it")
        if unseen := sorted(set(rows.labels) - set(labels)):
            raise DataError(
                f"score the {name} split",
                found=f"the class {unseen[0]!r}, of which training has no sample",
                fix="add training samples of it, or remove it",
            )
        if missing := sorted(set(labels) - set(rows.labels)):
            _log.warning("no %s sample of class %s", name, ", ".join(map(repr, missing)))


def _repeats(splits: Mapping[str, Rows]) -> dict[str, int]:
    digests = {name: set(rows.digests) for name, rows in splits.items()}
    pairs = (("train", "val"), ("train", "test"), ("val", "test"))
    counts = {f"{a} and {b}": len(digests[a] & digests[b]) for a, b in pairs}
    return {pair: count for pair, count in counts.items() if count}


def _read(config: RunConfig) -> tuple[Kind, dict[str, Rows]]:
    path = Path(config.data)
    try:
        if path.is_dir():
            return _read_folder(path, config)
        if path.is_file():
            return "text", {"all": _read_file(path, config)}
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise DataError(f"read {config.data!r}", found=str(error), fix=_FORMS) from error
    if is_callable_spec(config.data):
        return _read_callable(config)
    if glob.has_magic(config.data):
        return "text", _read_files([Path(p) for p in glob.glob(config.data)], config)
    raise DataError(f"read {config.data!r}", found="no such file or folder", fix=_FORMS)


def _read_folder(folder: Path, config: RunConfig) -> tuple[Kind, dict[str, Rows]]:
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in READERS and p.is_file())
    splits = [p for p in tables if split_name(p.stem)]
    if splits:
        return "text", _read_files(splits, config)
    if len(tables) == 1 and not any(p.is_dir() for p in folder.iterdir()):
        return "text", {"all": _read_file(tables[0], config)}
    return "image", read_image_folder(folder, skip_bad=config.skip_bad)


def _read_files(paths: Sequence[Path], config: RunConfig) -> dict[str, Rows]:
    found: dict[str, Path] = {}
    for path in sorted(paths):
        name = split_name(path.stem)
        if name is None or name in found:
            problem = f"{path.name}, {'a second one' if name else 'which names no split'}"
            raise DataError(
                f"read {config.data}", found=problem, fix="one file each: train, val, test"
            )
        found[name] = path
    if "train" not in found:
        listed = ", ".join(p.name for p in found.values()) or "no file"
        raise DataError(f"read {config.data}", found=listed, fix="a file called train")
    return {name: _read_file(path, config) for name, path in found.items()}


def _read_file(path: Path, config: RunConfig) -> Rows:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        found = "a single picture" if suffix in SUFFIXES else f"the suffix {suffix!r}"
        raise DataError(f"read {path}", found=found, fix=_FORMS)
    return read_table(path, _text_options(config))


def _text_options(config: RunConfig) -> TextOptions:
    return TextOptions(config.text_column, config.label_column, config.skip_bad)


def _read_callable(config: RunConfig) -> tuple[Kind, dict[str, Rows]]:
    function: Callable[[], Any] = resolve_callable(config.data, error=DataError)
    try:
        result = function()
    except Exception as error:
        raise DataError(
            f"call {config.data}()", found=f"{type(error).__name__}: {error}", fix=_RETURNS
        ) from error
    parts: Mapping[str, Any] = result if isinstance(result, Mapping) else {"all": result}
    found: dict[str, Rows] = {}
    kinds: set[Kind] = set()
    for name, part in parts.items():
        split = "all" if name == "all" else split_name(str(name))
        if split is None or split in found or (split == "all" and len(parts) > 1):
            raise _returned(config.data, f"the split {name!r}")
        kind, found[split] = _rows_of(part, config)
        kinds.add(kind)
    if len(kinds) != 1 or not ({"all", "train"} & found.keys()):
        raise _returned(config.data, f"splits {', '.join(map(str, parts)) or 'none'}")
    return kinds.pop(), found


_RETURNS = (
    "a callable without arguments that returns (input, label) pairs or a datasets.Dataset, or "
    "a dict of them by split: train, val, test"
)


def _returned(spec: str, found: str) -> DataError:
    return DataError(f"use what {spec} returned", found=found, fix=_RETURNS)


def _rows_of(part: Any, config: RunConfig) -> tuple[Kind, Rows]:
    pairs = (
        _from_dataset(part, config) if hasattr(part, "column_names") else _from_pairs(part, config)
    )
    inputs, labels = pairs
    if not inputs:
        raise _returned(config.data, "an empty split")
    if isinstance(inputs[0], str):
        rows = [
            (f"{config.data}, row {i}", t, y) for i, (t, y) in enumerate(zip(*pairs, strict=True))
        ]
        return "text", text_rows(rows, skip=config.skip_bad)
    names = [label_name(y) for y in labels]
    if "" in names or "None" in names:
        raise _returned(
            config.data,
            f"no label in row {min(names.index(n) for n in ('', 'None') if n in names)}",
        )
    return "image", keep_good(inputs, names, check_pictures(inputs), skip=config.skip_bad)


def _from_pairs(part: Any, config: RunConfig) -> tuple[Sequence[Any], Sequence[Any]]:
    try:
        pairs = [(x, y) for x, y in part]
    except (TypeError, ValueError) as error:
        raise _returned(config.data, f"no (input, label) pairs: {error}") from error
    return [x for x, _ in pairs], [y for _, y in pairs]


def _from_dataset(part: Any, config: RunConfig) -> tuple[Sequence[Any], Sequence[Any]]:
    datasets = need("datasets", extra="text")
    where = config.data
    columns = list(part.column_names)
    label = find_column(columns, config.label_column, LABEL_COLUMNS, what="label", where=where)
    images = [n for n, f in part.features.items() if isinstance(f, datasets.Image)]
    if images:
        # Decoded by us, with our limits.
        inputs = part.cast_column(images[0], datasets.Image(decode=False))[images[0]]
    else:
        text = find_column(columns, config.text_column, TEXT_COLUMNS, what="text", where=where)
        inputs = part[text]
    feature = part.features[label]
    labels = list(part[label])
    if isinstance(feature, datasets.ClassLabel):
        labels = [None if y is None or y < 0 else feature.int2str(y) for y in labels]
    return list(inputs), labels
