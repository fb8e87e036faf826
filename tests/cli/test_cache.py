"""`frostline cache`: what is shown, what is removed, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from frostline.cli.cache import bytes_from_text, seconds_from_text
from frostline.errors import UsageError
from frostline.frontier.key import CacheKey, unknown
from frostline.frontier.library import Library
from frostline.frontier.store import Column

HOSTILE = "m\x1b[31m\u202e[red]evil[/red]"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "stores"
    monkeypatch.setenv("FROSTLINE_CACHE", str(folder))
    return folder


def parts(name: str = "a", **more: object) -> dict[str, object]:
    from frostline.frontier.parts import compute_parts, version_parts

    now = {"versions": version_parts(), "compute": compute_parts()}
    return {"weights": {f"{name}.weight": "bits"}, **now, **more}


def fill(root: Path, name: str = "a", *, used_s_ago: float = 0.0, **more: object) -> str:
    key = CacheKey(parts(name, **more))
    store = Library(root).open(
        key, [Column("x", "float32")], 64, about={"model": name, "data": "flowers"}
    )
    store.write(0, {"x": np.ones((32, 4), np.float32)})
    store.close()
    moment = time.time() - used_s_ago
    os.utime(root / key.digest[:32] / "users", (moment, moment))
    return key.digest[:32]


# -- list ----------------------------------------------------------------------------------------


def test_an_empty_cache_is_said(cli, root):
    done = cli("cache", "list")
    assert (done.code, done.out, done.err) == (0, f"nothing is stored in {root}\n", "")
    assert json.loads(cli("cache", "list", "--json").out) == {"folder": str(root), "entries": []}
    assert cli("cache", "verify").out == f"nothing is stored in {root}\n"
    assert cli("cache", "prune", "--all").out == "removed 0 entries, 0 B\n"


def test_entries_are_listed(cli, root):
    old, new = fill(root, "old", used_s_ago=3 * 86_400), fill(root, "new")
    done = cli("cache", "list")
    assert (done.code, done.err) == (0, "")
    rows = [line for line in done.out.splitlines() if "32 of 64" in line]
    assert [line.split()[0] for line in rows] == [new[:12], old[:12]]
    assert "3 d ago" in rows[1]
    assert "old, flowers" in rows[1]
    assert "KiB" in rows[0]
    assert f"2 entries, {24 * 2}.0 KiB in {root}" in done.out
    first, second = json.loads(cli("cache", "list", "--json").out)["entries"]
    assert (first["name"], second["name"]) == (new, old)
    assert (first["rows"], first["rows_present"], first["state"]) == (64, 32, "good")
    assert first["about"] == {"model": "new", "data": "flowers"}


def test_another_folder_can_be_given(cli, root, tmp_path):
    fill(tmp_path / "other")
    assert "32 of 64" in cli("cache", "list", "--folder", tmp_path / "other").out
    assert "nothing" in cli("cache", "list").out


def test_what_others_wrote_cannot_steer_the_terminal(cli, root):
    name = fill(root, HOSTILE, data={HOSTILE: HOSTILE})
    (root / HOSTILE.replace("/", "")).mkdir()
    for arguments in (["list"], ["inspect", name], ["prune", "--all", "--dry-run"], ["verify"]):
        done = cli("cache", *arguments)
        assert not {"\x1b", "\u202e"} & set(done.out + done.err)
    assert "[red]evil[/red]" in cli("cache", "list").out


def test_a_folder_that_others_may_write_to_is_refused(cli, root):
    fill(root)
    root.chmod(0o777)
    for arguments in (["list"], ["inspect", "a"], ["prune", "--all"], ["verify"]):
        done = cli("cache", *arguments)
        assert done.code == 1
        assert done.lines[0].startswith("cannot trust the cache folder")
        assert "--shared" in done.lines[2]
    assert "32 of 64" in cli("cache", "list", "--shared").out


# -- inspect -------------------------------------------------------------------------------------


def test_an_entry_that_fits_here_says_so(cli, root):
    name = fill(root, slots={"x": [[4], "torch.float32"]})
    out = cli("cache", "inspect", name[:10]).out
    assert "the same here and now" in out
    assert "column x      float32, kept exact" in out
    assert "weights       1 tensors" in out
    assert 'slots         x: [[4], "torch.float32"]' in out
    shown = json.loads(cli("cache", "inspect", name, "--json").out)
    assert shown["not_used_because"] == []
    assert CacheKey(shown["key"]).digest == shown["digest"]


def test_an_entry_that_does_not_fit_says_why(cli, root):
    from frostline.frontier.parts import compute_parts, version_parts

    versions = version_parts() | {"torch": "1.0", "no_such_package": "3"}
    compute = compute_parts() | {"threads": 97}
    name = fill(root, versions=versions, compute=compute, data=unknown("a stream"))
    out = cli("cache", "inspect", name).out
    told = [line for line in out.splitlines() if line.startswith("- ")]
    assert told[0] == "- not known: data: a stream"
    assert told[1].startswith("- made with 97 threads, now ")
    assert told[2] == "- no_such_package 3, now nothing"
    assert told[3].startswith("- torch 1.0, now ")
    assert len(json.loads(cli("cache", "inspect", name, "--json").out)["not_used_because"]) == 4


def test_a_damaged_entry_can_be_looked_at(cli, root):
    name = fill(root)
    (root / name / "entry.json").write_text("{}")
    done = cli("cache", "inspect", name)
    assert done.code == 0
    assert "state         damaged: " in done.out
    shown = json.loads(cli("cache", "inspect", name, "--json").out)
    assert (shown["key"], shown["not_used_because"]) == (None, None)


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["prune"]])
def test_a_name_that_fits_nothing_is_one_message(cli, root, command):
    fill(root)
    done = cli("cache", *command, "nosuch")
    assert (done.code, done.out) == (2, "")
    assert done.lines[0] == "cannot find the cache entry 'nosuch'"


def test_two_entries_are_compared(cli, root):
    one = fill(root, compute={"threads": 2})
    other = fill(root, compute={"threads": 4})
    done = cli("cache", "inspect", one, "--versus", other[:9])
    assert done.out == f"From {other[:12]} to {one[:12]}:\n- made with 4 threads, now 2\n"
    shown = json.loads(cli("cache", "inspect", one, "--versus", other, "--json").out)
    assert shown["differences"] == ["made with 4 threads, now 2"]
    assert "the same entry" in cli("cache", "inspect", one, "--versus", one).out
    (root / other / "entry.json").write_text("{}")
    done = cli("cache", "inspect", one, "--versus", other)
    assert (done.code, done.out) == (2, "")
    assert "an entry that is damaged" in done.err


@pytest.mark.parametrize("command", [["verify"], ["prune"]])
def test_what_is_not_ours_is_refused_by_name(cli, root, command):
    fill(root)
    (root / "holiday").mkdir()
    done = cli("cache", *command, "holiday")
    assert (done.code, done.out) == (2, "")
    assert "what is no entry of frostline: a name that no entry has" in done.err
    assert (root / "holiday").exists()
    assert "foreign: a name that no entry has" in cli("cache", "inspect", "holiday").out


def test_a_name_in_a_cache_that_is_not_there_fits_nothing(cli, root):
    assert cli("cache", "prune", "abc").code == cli("cache", "verify", "abc").code == 2
    assert not root.exists()


@pytest.mark.parametrize("harm", ["header", "shapes", "sums", "rows", "users", "link"])
def test_a_damaged_folder_is_one_message_in_every_command(cli, root, harm):
    """No command raises, and what can be told about the entry is told."""
    name = fill(root)
    entry = root / name
    if harm == "header":
        (entry / "rows" / "store.json").write_text("{")
    elif harm == "shapes":
        (entry / "rows" / "shapes.json").write_bytes(b"\x00" * 40)
    elif harm == "sums":
        (entry / "rows" / "000.sums").write_bytes(b"\xff" * 5)
    elif harm == "link":
        (entry / "rows" / "000.sums").unlink()
        (entry / "rows" / "000.sums").symlink_to("/etc/hostname")
    else:
        shutil.rmtree(entry / harm)
    whole = harm in ("users", "rows", "shapes", "sums")  # rows are gone, and computed again
    state = "good" if whole else "damaged"
    for command in (["list"], ["inspect", name], ["verify"], ["prune", "--damaged", "--dry-run"]):
        done = cli("cache", *command)
        assert "Traceback" not in done.err
        assert done.code == (1 if command == ["verify"] and not whole else 0), (command, done.err)
    (listed,) = json.loads(cli("cache", "list", "--json").out)["entries"]
    assert listed["state"] == state
    assert cli("cache", "prune", "--damaged").code == 0
    assert entry.exists() is whole
    Library(root).open(CacheKey(parts()), [Column("x", "float32")], 64).close()
    assert cli("cache", "verify").code == 0


# -- prune ---------------------------------------------------------------------------------------


def test_pruning_wants_a_reason(cli, root):
    name = fill(root)
    done = cli("cache", "prune")
    assert done.code == 2
    assert "--older-than" in done.err
    assert (root / name).exists()


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--older-than", "2d"], ["b"]),
        (["--older-than", "52w"], ["a", "b"]),
        (["--keep-bytes", "30KiB"], ["b"]),
        (["--keep-bytes", "0"], []),
        (["--keep-bytes", "1GB"], ["a", "b"]),
        (["--all"], []),
        (["--damaged"], ["a", "b"]),
        (["--all", "--dry-run"], ["a", "b"]),
    ],
)
def test_entries_are_pruned(cli, root, arguments, left):
    names = {fill(root, "a", used_s_ago=3 * 86_400): "a", fill(root, "b"): "b"}
    done = cli("cache", "prune", *arguments)
    assert (done.code, done.err) == (0, "")
    assert sorted(names[n] for n in names if (root / n).exists()) == left
    assert ("would remove" if "--dry-run" in arguments else "removed") in done.out


def test_named_and_damaged_entries_are_pruned(cli, root):
    a, b, c = (fill(root, name) for name in "abc")
    (root / b / "manifest.json").unlink()
    (root / ".tmp-0123456789abcdef").mkdir()
    shown = json.loads(cli("cache", "prune", a, "--damaged", "--json").out)
    assert {e["name"] for e in shown["removed"]} == {a, b, ".tmp-0123456789abcdef"}
    assert shown["freed_bytes"] > 0
    assert [p.name for p in root.iterdir() if len(p.name) == 32] == [c]


def test_an_entry_in_use_is_left_alone_and_said(cli, root):
    store = Library(root).open(CacheKey(parts()), [Column("x", "float32")], 64)
    done = cli("cache", "prune", "--all")
    assert done.code == 0
    assert "left alone, in use by running processes: " in done.out
    assert "in use" in cli("cache", "list").out
    store.close()


@pytest.mark.parametrize(
    "text", ["30", "d", "-1d", "1e3d", "1 fortnight", "", "1d2h", "9" * 30 + "d"]
)
def test_lengths_of_time_that_say_nothing(cli, root, text):
    with pytest.raises(UsageError):
        seconds_from_text(text)
    assert cli("cache", "prune", f"--older-than={text or ' '}").code == 2


@pytest.mark.parametrize("text", ["GiB", "-1", "1e9", "10 potatoes", "1i", "9" * 30, " "])
def test_sizes_that_say_nothing(cli, root, text):
    with pytest.raises(UsageError):
        bytes_from_text(text)
    assert cli("cache", "prune", f"--keep-bytes={text}").code == 2


def test_times_and_sizes():
    assert [seconds_from_text(t) for t in ("2w", "1 d", "0.5h", "3min", "7s")] == [
        1_209_600, 86_400, 1800, 180, 7,
    ]  # fmt: skip
    assert [bytes_from_text(t) for t in ("7", "1kB", "2KB", "1KiB", "3mb", "1TiB", "2.5gib")] == [
        7, 1000, 2000, 1024, 3_000_000, 1 << 40, 5 << 29,
    ]  # fmt: skip


# -- verify --------------------------------------------------------------------------------------


def test_what_is_whole_is_said_to_be(cli, root):
    name = fill(root)
    (root / "junk").touch()
    done = cli("cache", "verify")
    assert (done.code, done.err) == (0, "")
    assert "as written" in done.out
    (row,) = json.loads(cli("cache", "verify", name[:8], "--json").out)
    assert row == {"name": name, "checked": 32, "damaged": 0, "why": ""}


def test_damage_is_found_and_told_by_the_exit_code(cli, root):
    name, other = fill(root), fill(root, "other")
    largest = max((root / name / "rows").iterdir(), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.write(b"\xaa")
    (root / other / "entry.json").write_text("{}")
    done = cli("cache", "verify")
    assert done.code == 1
    assert "1 rows are not what was written" in done.out
    assert any("2 damaged of 2 entries" in line for line in done.lines)
    rows = json.loads(cli("cache", "verify", "--json").out)
    assert {r["damaged"] for r in rows} == {0, 1}


# -- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "inspect", "prune", "verify"])
def test_every_command_explains_itself_with_examples(cli, command):
    done = cli("cache", command, "--help")
    assert done.code == 0
    assert f"frostline cache {command}" in done.out.partition("Examples:")[2]
    assert command in cli("cache", "--help").out


def test_listing_loads_no_framework(root):
    fill(root)
    code = (
        "import sys\n"
        "from frostline.cli.app import run\n"
        "code = run(['cache', 'list']) or run(['cache', 'verify'])\n"
        "sys.stderr.write(repr(sorted({'torch', 'timm', 'transformers'} & set(sys.modules))))\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "[]")
