"""A folder of class folders of pictures, with or without train/val/test folders above them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from frostline.errors import DataError
from frostline.tasks.pictures import FORMATS, SUFFIXES, check_pictures
from frostline.tasks.rows import Rows, keep_good, split_name

__all__ = ["read_image_folder"]

_log = logging.getLogger(__name__)
_LAYOUT = "FOLDER/CLASS/picture.jpg, or FOLDER/{train,val,test}/CLASS/picture.jpg"


def read_image_folder(folder: Path, *, skip_bad: bool) -> dict[str, Rows]:
    """Rows by split: "train", "val", "test", or only "all" where there are no split folders.

    Args:
        folder: of class folders, or of split folders of class folders.
        skip_bad: leave unreadable pictures out and list them, instead of raising.

    Raises:
        DataError: no pictures, an empty class, an unreadable picture; names it.
    """
    splits = _split_folders(folder)
    if not splits:
        return {"all": _read(folder, skip=skip_bad)}
    if "train" not in splits:
        raise DataError(
            f"read the folder {folder}",
            found=f"folders {', '.join(p.name for p in splits.values())}, and none for training",
            fix=_LAYOUT,
        )
    return {name: _read(path, skip=skip_bad) for name, path in splits.items()}


def _split_folders(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _folders(folder):
        # A class may be called "train"; a split holds folders.
        name = split_name(path.name) if any(_folders(path)) else None
        if name in found:
            raise DataError(
                f"read the folder {folder}",
                found=f"two folders for one split: {found[name].name} and {path.name}",
                fix="keep one of them",
            )
        if name:
            found[name] = path
    others = [p.name for p in _folders(folder) if p not in found.values()]
    if found and others:
        _log.warning("ignored beside the split folders of %s: %s", folder, ", ".join(others))
    return found


def _read(folder: Path, *, skip: bool) -> Rows:
    paths: list[str] = []
    labels: list[str] = []
    for path in _folders(folder):
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        pictures = [p for p in pictures if p.is_file() and not p.name.startswith(".")]
        if not pictures:
            raise _empty(path)
        paths += [str(p) for p in pictures]
        labels += [path.name] * len(pictures)
    if not paths:
        raise DataError(f"find pictures in {folder}", found="no class folders", fix=_LAYOUT)
    rows = keep_good(paths, labels, check_pictures(paths), skip=skip)
    if lost := sorted(set(labels) - set(rows.labels)):
        raise DataError(
            f"use the class {lost[0]!r} of {folder}",
            found="no readable picture left in it",
            fix=f"pictures of a readable kind: {', '.join(FORMATS)}",
        )
    return rows


def _empty(folder: Path) -> DataError:
    others = [p for p in folder.rglob("*") if p.is_file()]
    kinds = sorted({p.suffix.lower() or "no suffix" for p in others})
    found = f"{len(others)} files, none a picture ({', '.join(kinds)})" if others else "no files"
    return DataError(
        f"use the class folder {folder}",
        found=found,
        fix=f"put pictures in it ({', '.join(sorted(SUFFIXES))}), or remove the folder",
    )


def _folders(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("."))
