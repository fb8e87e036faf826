"""`frostline cache`: what is stored of frozen regions, whether it holds, and what may go."""

# ruff: noqa: PLC0415  what reads stores is imported when it is needed

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from frostline.cli.terminal import bytes_text, console, escape, print_json, print_table
from frostline.errors import DamagedFile, StorageError, UsageError

if TYPE_CHECKING:
    from frostline.frontier.key import CacheKey
    from frostline.frontier.library import Entry, Library, Pruned

__all__ = ["bytes_from_text", "inspect", "list_", "prune", "seconds_from_text", "verify"]

_Folder = Annotated[
    Path | None,
    Parameter(help="The folder of stores; by default FROSTLINE_CACHE or the user's cache folder."),
]
_Shared = Annotated[
    bool, Parameter(negative="", help="Accept a folder that others own or may write to.")
]
_Json = Annotated[bool, Parameter(negative="", help="Print JSON.")]

_COLUMNS = {
    "entry": "left",
    "state": "left",
    "size": "right",
    "rows": "right",
    "last used": "right",
    "what": "left",
}
_NAME_SHOWN = 12
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZES = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
#: Sections of a key that are long and say little to people; JSON has them in full.
_COUNTED = {"weights": "tensors", "structure": "modules", "modes": "modules"}


def list_(*, folder: _Folder = None, shared: _Shared = False, json: _Json = False) -> None:
    """List the entries: state, size, rows, when they were last used, what they are."""
    library = _library(folder, shared)
    entries = library.entries()
    if json:
        shown = [_as_json(entry) for entry in entries]
        print_json({"folder": str(library.root), "entries": shown})
        return
    if not entries:
        _say(f"nothing is stored in {library.root}")
        return
    _print_entries(entries)
    _say(f"{_counted(entries)} in {library.root}")


def inspect(
    entry: Annotated[str, Parameter(help="The entry, or as much of its name as tells it apart.")],
    *,
    versus: Annotated[
        str | None, Parameter(help="Another entry: show in what this one differs from it.")
    ] = None,
    folder: _Folder = None,
    shared: _Shared = False,
    json: _Json = False,
) -> None:
    """Show what an entry depends on, and why it would or would not be used here and now."""
    library = _library(folder, shared)
    found = library.match(entry)
    if versus is not None:
        _compare(found, library.match(versus), json=json)
        return
    reasons = None if found.key is None else _reasons(found.key)
    if json:
        key = None if found.key is None else found.key.parts
        print_json({**_as_json(found), "key": key, "not_used_because": reasons})
        return
    for label, text in _facts(found).items():
        _say(f"{label:<14}{text}")
    if found.key is not None:
        _say("")
        for label, text in _parts(found.key.parts):
            _say(f"{label:<14}{text}")
        _say("")
        _print_reasons(reasons or [])


def prune(
    *entries: Annotated[str, Parameter(help="Entries, or the beginnings of their names.")],
    older_than: Annotated[
        str | None, Parameter(help="Those not used for longer: 30d, 12h, 2w.")
    ] = None,
    keep_bytes: Annotated[
        str | None,
        Parameter(help="The longest unused ones, until the rest takes no more: 10GiB, 500MB."),
    ] = None,
    damaged: Annotated[
        bool, Parameter(negative="", help="Those that are damaged or were never finished.")
    ] = False,
    all_: Annotated[bool, Parameter(name="--all", negative="", help="All of them.")] = False,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Remove nothing, only say what would go.")
    ] = False,
    folder: _Folder = None,
    shared: _Shared = False,
    json: _Json = False,
) -> None:
    """Remove entries that nobody uses; what they held is computed again when it is needed."""
    if not (entries or older_than or keep_bytes or damaged or all_):
        raise UsageError(
            "prune the cache",
            found="nothing that says which entries",
            fix="give names, --older-than 30d, --keep-bytes 10GiB, --damaged or --all",
        )
    done = _library(folder, shared).prune(
        names=entries,
        older_than_s=None if older_than is None else seconds_from_text(older_than),
        keep_bytes=None if keep_bytes is None else bytes_from_text(keep_bytes),
        damaged=damaged,
        everything=all_,
        dry_run=dry_run,
    )
    if json:
        print_json(_pruned_as_json(done, dry_run=dry_run))
    else:
        _print_pruned(done, dry_run=dry_run)
    if done.failed:
        entry, why = done.failed[0]
        raise StorageError(
            f"remove {len(done.failed)} of the entries",
            found=f"{why} ({entry.path})",
            fix="look at the rights of this folder, then prune again",
        )


def verify(
    *entries: Annotated[str, Parameter(help="Entries, or the beginnings of their names.")],
    folder: _Folder = None,
    shared: _Shared = False,
    json: _Json = False,
) -> None:
    """Read every row of these entries, or of all, and compare its checksum."""
    library = _library(folder, shared)
    named = [library.match(name, ours=True) for name in entries]
    chosen = named or library.entries()
    rows = [_verified(library, entry) for entry in chosen if entry.state != "foreign"]
    if json:
        print_json(rows)
    elif rows:
        print_table(
            {"entry": "left", "rows read": "right", "damaged": "right", "result": "left"},
            [
                (r["name"][:_NAME_SHOWN], f"{r['checked']:,}", f"{r['damaged']:,}",
                 r["why"] or "as written") for r in rows
            ],
        )  # fmt: skip
    else:
        _say(f"nothing is stored in {library.root}")
    if bad := [r for r in rows if r["why"]]:
        raise DamagedFile(
            f"trust all of {library.root}",
            found=f"{len(bad)} damaged of {len(rows)} entries",
            fix="nothing needs doing, damaged rows are computed again; entries that are no good "
            "take room until: frostline cache prune --damaged",
        )


# -- what is asked -------------------------------------------------------------------------------


def seconds_from_text(text: str) -> float:
    """A length of time from the command line, s.

    Raises:
        UsageError: not a number with a unit.

    Example:
        >>> seconds_from_text("30d"), seconds_from_text("1.5h")
        (2592000.0, 5400.0)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h|d|w)", text.strip())
    if match is None:
        raise UsageError(
            f"read the length of time {text!r}",
            found="no number with a unit",
            fix="write it like 30d, 12h, 45min or 2w",
        )
    return float(match[1]) * _UNITS[match[2]]


def bytes_from_text(text: str) -> int:
    """A size from the command line, bytes.

    Raises:
        UsageError: not a number, or an unknown unit.

    Example:
        >>> bytes_from_text("10GiB"), bytes_from_text("1.5 MB"), bytes_from_text("0")
        (10737418240, 1500000, 0)
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?i?b?)", text.strip().lower())
    if match is None or match[2] not in _SIZES:
        raise UsageError(
            f"read the size {text!r}",
            found="no number of bytes",
            fix="write it like 10GiB, 500MB or 0",
        )
    return int(float(match[1]) * _SIZES[match[2]])


def _library(folder: Path | None, shared: bool) -> Library:
    from frostline.frontier.library import Library

    return Library(folder, shared=shared)


def _reasons(key: CacheKey) -> list[str]:
    """What of the versions and the machine is not as it was."""
    from frostline.frontier.key import CacheKey
    from frostline.frontier.parts import compute_parts, version_parts

    versions, compute = (key.parts.get(name) or {} for name in ("versions", "compute"))
    device = "cpu" if compute.get("device") == "cpu" else "cuda"
    packages = [name for name in versions if re.fullmatch(r"\w{1,99}", name) and name != "python"]
    then = CacheKey({"versions": versions, "compute": compute})
    now = CacheKey({"versions": version_parts(packages), "compute": compute_parts(device)})
    return [*(f"not known: {why}" for why in key.unknown), *then.differences(now)]


def _compare(one: Entry, other: Entry, *, json: bool) -> None:
    """Say in what two entries differ: why the one was not used for the other."""
    for entry in (one, other):
        if entry.key is None:
            raise UsageError(
                f"compare the cache entry {entry.name[:_NAME_SHOWN]!r}",
                found=f"an entry that is {entry.state}: {entry.why}",
                fix="choose two good ones: frostline cache list",
            )
    reasons = list(other.key.differences(one.key)) if one.key and other.key else []
    if json:
        print_json({"name": one.name, "versus": other.name, "differences": reasons})
        return
    names = one.name[:_NAME_SHOWN], other.name[:_NAME_SHOWN]
    if not reasons:
        _say(f"{names[0]} and {names[1]} are the same entry")
        return
    _say(f"From {names[1]} to {names[0]}:")
    for reason in reasons:
        _say(f"- {reason}")


def _verified(library: Library, entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"name": entry.name, "checked": 0, "damaged": 0, "why": entry.why}
    if entry.state != "good":
        return found
    try:
        damage = library.verify(entry)
    except StorageError as error:
        return found | {"why": error.found}
    count = len(damage.damaged)
    why = f"{count:,} rows are not what was written" if count else ""
    return found | {"checked": damage.checked, "damaged": count, "why": why}


# -- what is shown -------------------------------------------------------------------------------


def _say(text: str) -> None:
    console(sys.stdout).print(escape(text), soft_wrap=True)


def _print_entries(entries: Iterable[Entry]) -> None:
    print_table(
        _COLUMNS,
        [
            (
                entry.name[:_NAME_SHOWN],
                "in use" if entry.in_use else entry.state,
                bytes_text(entry.size_bytes),
                _rows(entry),
                _ago(entry.last_used),
                _what(entry),
            )
            for entry in entries
        ],
    )


def _rows(entry: Entry) -> str | None:
    if entry.rows is None or entry.rows_present is None:
        return None
    return f"{entry.rows_present:,} of {entry.rows:,}"


def _what(entry: Entry) -> str:
    """One line: what its maker calls it, or what is wrong with it."""
    if entry.why:
        return entry.why
    return ", ".join(_short(value) for value in entry.about.values()) or "nothing said"


def _short(value: object, most: int = 60) -> str:
    import json

    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _ago(moment: float) -> str:
    """How long ago, in the largest unit that fits.

    Example:
        >>> _ago(time.time() - 7300)
        '2 h ago'
    """
    passed = max(0.0, time.time() - moment)
    for unit, seconds in (("d", 86_400), ("h", 3600), ("min", 60)):
        if passed >= seconds:
            return f"{passed / seconds:.0f} {unit} ago"
    return "now"


def _counted(entries: Iterable[Entry]) -> str:
    sizes = [entry.size_bytes for entry in entries]
    return f"{len(sizes)} {'entry' if len(sizes) == 1 else 'entries'}, {bytes_text(sum(sizes))}"


def _facts(entry: Entry) -> dict[str, str]:
    facts = {
        "entry": entry.name,
        "folder": str(entry.path),
        "state": f"{entry.state}{': ' * bool(entry.why)}{entry.why}",
        "in use": "yes" if entry.in_use else "no",
        "size": bytes_text(entry.size_bytes),
        "rows": _rows(entry) or "not known",
        "last used": _date(entry.last_used),
        "made": "not known" if entry.created is None else _date(entry.created),
        "frostline": entry.frostline or "not known",
        **{str(name): _short(value, 200) for name, value in entry.about.items()},
    }
    for column in entry.columns:
        kind = f"{column.dtype}, kept {column.encoding}{', ragged' * column.ragged}"
        facts[f"column {column.name}"] = kind
    return facts


def _date(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "not known"


def _parts(parts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for section, value in parts.items():
        if section in _COUNTED and isinstance(value, dict):
            yield section, f"{len(value)} {_COUNTED[section]}"
        elif isinstance(value, dict):
            for name, item in value.items():
                yield section, f"{name}: {_short(item, 100)}"
        else:
            yield section, _short(value, 100)


def _print_reasons(reasons: list[str]) -> None:
    if not reasons:
        _say("Versions, processor and settings are the same here and now: for the same model, data")
        _say("and preparation its rows are used.")
        return
    _say("Not used here and now, because:")
    for reason in reasons:
        _say(f"- {reason}")


def _print_pruned(done: Pruned, *, dry_run: bool) -> None:
    if done.removed:
        _print_entries(done.removed)
    verb = "would remove" if dry_run else "removed"
    _say(f"{verb} {_counted(done.removed)}")
    if done.in_use:
        names = ", ".join(entry.name[:_NAME_SHOWN] for entry in done.in_use)
        _say(f"left alone, in use by running processes: {names}")
    if done.litter:
        _say(f"removed {len(done.litter)} leftovers of processes that were killed")


def _pruned_as_json(done: Pruned, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "removed": [_as_json(entry) for entry in done.removed],
        "freed_bytes": done.freed_bytes,
        "in_use": [entry.name for entry in done.in_use],
        "failed": [{"name": entry.name, "why": why} for entry, why in done.failed],
        "litter": list(done.litter),
    }


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "folder": str(entry.path),
        "state": entry.state,
        "why": entry.why,
        "size_bytes": entry.size_bytes,
        "in_use": entry.in_use,
        "last_used": entry.last_used,
        "created": entry.created,
        "rows": entry.rows,
        "rows_present": entry.rows_present,
        "columns": [asdict(column) for column in entry.columns],
        "about": dict(entry.about),
        "frostline": entry.frostline,
        "digest": entry.key.digest if entry.key else None,
    }
