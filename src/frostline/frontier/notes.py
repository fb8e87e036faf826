"""The two small files of a store: JSON with its own digest, whole or absent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frostline import _io
from frostline.errors import DamagedFile, StorageError

__all__ = ["read_checked", "write_once"]


def write_once(path: Path, body: Mapping[str, Any]) -> None:
    """Write a small file with its digest. Other processes write the same at the same time."""
    text = _io.canonical_json({"body": body, "sha256": _digest(body)})
    for _ in range(8):
        try:
            _io.atomic_write_bytes(path, text + b"\n")
            return
        except StorageError:
            # One that starts now takes our draft for that of a killed process, and removes it.
            if not path.exists():
                continue
            return
    _io.atomic_write_bytes(path, text + b"\n")


def read_checked(path: Path) -> dict[str, Any]:
    """The body of a small file, once its bytes are what was written.

    Raises:
        DamagedFile: they are not.
    """
    found = _io.load_json(path)
    body = found.get("body") if isinstance(found, dict) else None
    whole = _io.canonical_json({"body": body, "sha256": _digest(body)}) + b"\n"
    with _io.storage_errors(f"read {path}"):
        same = whole == path.read_bytes()
    if not isinstance(body, dict) or not same:
        raise DamagedFile(
            f"trust {path}",
            found="a digest that does not match its text",
            fix="remove the folder: what it held is computed again",
        )
    return body


def _digest(body: object) -> str:
    return hashlib.sha256(_io.canonical_json(body)).hexdigest()
