"""Folders of checkpoints: how they are named, found, pruned, and share what stays the same.

A checkpoint is a folder ``step-00000123`` that appears by one rename. What is in it is the
backend's: `frostline.backends.torch.checkpoint` and `frostline.backends.keras.checkpoint`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from frostline import _io
from frostline.errors import StorageError

__all__ = [
    "Held",
    "check_keep",
    "checkpoint_folders",
    "checkpoint_step",
    "free_name",
    "library_errors",
    "newest_step",
    "prune",
    "read_checkpoint",
    "whole",
    "write_checkpoint",
]

_NAME = re.compile(r"step-(\d{8,18})(?:-(\d{1,9}))?")
#: Everything that is no tensor.
STATE = "state.json"
#: What is held frozen: a file of its own, which following checkpoints link to.
HELD = "held.safetensors"
MAX_STATE_BYTES = 1 << 28  # driver history of long runs; its digest was checked before it is read


@dataclass(frozen=True, slots=True)
class Held:
    """Tensors that are held frozen, and where they may be saved already.

    Attributes:
        sha256: digest by name.
        beside: further folders of checkpoints of this run whose files may be linked to.
    """

    sha256: Mapping[str, str]
    beside: tuple[Path, ...] = ()


def checkpoint_folders(folder: Path) -> list[Path]:
    """Everything in a folder that is named like a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    named = [(m, path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    ordered = sorted(named, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 1)), reverse=True)
    return [path for _, path in ordered]


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name, or -1 for another name.

    Example:
        >>> checkpoint_step(Path("checkpoints/step-00000123"))
        123
    """
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def newest_step(folder: Path) -> int:
    """The largest step of which there is a checkpoint; -1 if there is none."""
    return max((checkpoint_step(path) for path in checkpoint_folders(folder)), default=-1)


def whole(folder: Path, step: int | None, *, kind: str) -> tuple[Path, Mapping[str, Any]] | None:
    """The newest checkpoint that verifies, with its note; None if there is no checkpoint at all.

    Args:
        folder: where they live.
        step: only those of this step.
        kind: what they must be.

    Raises:
        StorageError: checkpoints are there and none verifies.
    """
    candidates = checkpoint_folders(folder)
    if step is not None:
        candidates = [path for path in candidates if checkpoint_step(path) == step]
    if not candidates:
        return None
    found = _io.newest_valid(candidates, kind=kind)
    if found is None:
        raise StorageError(
            f"resume from {folder}",
            found=f"{len(candidates)} checkpoint(s), none of them whole",
            fix="restore one from a copy, or start afresh in another folder",
        )
    return found


def free_name(folder: Path, step: int) -> Path:
    """An unused name: a step that is saved again never overwrites what was there."""
    base = folder / f"step-{step:08d}"
    taken = [path for path in checkpoint_folders(folder) if checkpoint_step(path) == step]
    if not taken:
        return base
    match = _NAME.fullmatch(taken[0].name)
    return folder / f"{base.name}-{int(match[2] or 1) + 1 if match else 2}"


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoint_folders(folder)[keep:]:
        _io.discard(old)


def check_keep(keep: int) -> None:
    """Raise unless at least one checkpoint stays to fall back on.

    Raises:
        StorageError: `keep` is 1 or negative.
    """
    if keep < 0 or keep == 1:
        raise StorageError(
            f"keep {keep} checkpoints",
            found="none to fall back on",
            fix="keep=2 or more, 0 for all",
        )


def digest_of_held(frozen: Mapping[str, str]) -> str:
    """What is held, with its values; empty for nothing."""
    return hashlib.sha256(_io.canonical_json(frozen)).hexdigest() if frozen else ""


def share_held(places: Sequence[Path], held: str, target: Path) -> str | None:
    """Link to the newest file that holds just these tensors; its SHA-256, or None."""
    for place in places:
        for path in checkpoint_folders(place)[:1]:
            note = _io.sealed_note(path)
            if note is not None and note.get("held") == held:
                return _io.share_file(path / HELD, target)
    return None


@contextmanager
def library_errors(asked: str) -> Iterator[None]:
    """The tensor library reports system errors as text: give them back their number."""
    try:
        yield
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            fix = "only dense tensors of the framework's usual types can be saved"
            raise StorageError(asked, found=str(error), fix=fix) from error
        with _io.storage_errors(asked):
            raise OSError(int(number[1]), str(error)) from error


@contextmanager
def readable_extra() -> Iterator[None]:
    """Say what `extra` may hold."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise StorageError(
            "save `extra`",
            found=str(error),
            fix="plain JSON: finite numbers, strings, lists, dicts",
        ) from error


def write_checkpoint(
    target: Path,
    trees: Mapping[str, Any],
    tensors: Mapping[str, dict[str, Any]],
    *,
    step: int,
    kind: str,
    held: Mapping[str, str],
    beside: Sequence[Path],
    write: Callable[[Path, dict[str, Any]], object],
    about: Mapping[str, Any],
) -> None:
    """Write a checkpoint folder in one rename, and read it back.

    Args:
        target: the new folder.
        trees: JSON by part.
        tensors: by file, "model" among them.
        step: updates completed.
        kind: what the manifest says the folder is.
        held: SHA-256 of what is held frozen, by name: written once, in a file of its own.
        beside: folders whose checkpoints may hold the same file already.
        write: writes tensors by name into a file.
        about: what the state says besides the parts.

    Raises:
        StorageError: it cannot be written or read back.
    """
    frozen = {n: held[n] for n in sorted(held) if n in tensors["model"]}
    note = {"step": step, "parts": sorted(trees), "held": digest_of_held(frozen)}
    shared: dict[str, str] = {}
    with _io.atomic_folder(target, kind=kind, note=note, shared=shared) as draft:
        if frozen:
            known = share_held(beside, note["held"], draft / HELD)
            if known is None:
                write(draft / HELD, {name: tensors["model"][name] for name in frozen})
            else:
                shared[HELD] = known
        for name, found in tensors.items():
            apart = frozen if name == "model" else ()
            write(draft / f"{name}.safetensors", {n: t for n, t in found.items() if n not in apart})
        with readable_extra():
            text = _io.canonical_json({"parts": trees, **about})
        _io.write_file(draft / STATE, text)
    _io.verify_folder(target, kind=kind, unread=shared)


def read_checkpoint(
    path: Path, note: Mapping[str, Any], read: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """Trees by part, tensors by file and the whole state of a folder that `whole` found.

    Args:
        path: the folder.
        note: of its manifest.
        read: reads tensors by name from a file.
    """
    state = _io.load_json(path / STATE, max_bytes=MAX_STATE_BYTES)
    tensors = {file.stem: read(file) for file in sorted(path.glob("*.safetensors"))}
    tensors.setdefault("model", {}).update(tensors.pop(Path(HELD).stem, {}))
    return {name: state["parts"][name] for name in note["parts"]}, tensors, state
