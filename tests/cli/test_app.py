"""The command line itself: help, suggestions, exit codes, one message per failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from frostline.cli import app
from frostline.errors import ModelError, StorageError, UsageError
from report_records import write_curve, write_study


def test_help_lists_every_command(cli):
    done = cli("--help")
    assert done.code == 0
    assert all(
        name in done.out for name in ("inspect", "fit", "predict", "policies", "cache", "Examples:")
    )
    assert done.err == ""


def test_version(cli):
    from frostline import __version__

    assert cli("--version").out.strip() == __version__


@pytest.mark.parametrize("command", ["inspect", "fit", "predict", "policies", "cache"])
def test_every_command_explains_itself_with_examples(cli, command):
    done = cli(command, "--help")
    assert done.code == 0
    assert f"frostline {command}" in done.out.partition("Examples:")[2]


FRAMEWORKS = frozenset({"torch", "keras", "timm", "transformers", "datasets"})


@pytest.mark.parametrize(
    "arguments", [["--help"], ["policies"], ["fit", "--help"], ["cache", "prune", "--help"]]
)
def test_light_commands_import_no_framework(arguments):
    assert _imported(arguments, FRAMEWORKS | {"sklearn", "numpy"}) == "[]"


def test_what_reads_records_alone_imports_no_framework(tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.81], "bitfit": [0.8, 0.82]})
    curve = write_curve(tmp_path / "curve", {"full": {50: [0.4, 0.5], 100: [0.5, 0.6]}})
    shown = ["show", study / "runs/full/seed-0"]
    for command in (
        *([name, path] for name in ("report", "study") for path in (study, curve)),
        shown,
    ):
        assert _imported(command, FRAMEWORKS) == "[]", command


def _imported(arguments: Sequence[str | Path], heavy: frozenset[str]) -> str:
    """Which of these packages a command imports; what it says besides."""
    code = (
        "import sys\n"
        "from frostline.cli.app import run\n"
        "code = run(sys.argv[1:])\n"
        f"sys.stderr.write(repr(sorted({set(heavy)!r} & set(sys.modules))))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["policys"], 'Did you mean "policies"?'),
        (["policies", "--jsn"], "Did you mean --json?"),
        (["fit", "--polcy", "full"], "Did you mean --policy?"),
        (["policies", "gradul"], "did you mean 'gradual'?"),
    ],
)
def test_a_typo_gets_a_suggestion_and_exit_code_2(cli, arguments, suggestion):
    done = cli(*arguments)
    assert done.code == 2
    assert done.lines[0].startswith("cannot ")
    assert done.lines[1].startswith("  found: ")
    assert suggestion in done.lines[1]
    assert done.out == ""


def test_extra_arguments_are_refused(cli):
    done = cli("policies", "full", "gradual")
    assert done.code == 2
    assert "gradual" in done.err


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UsageError("a", found="b", fix="c"), 2, ["cannot a", "  found: b", "  try:   c"]),
        (ModelError("a", found="b"), 1, ["cannot a", "  found: b"]),
        (
            StorageError("a", found="\x1b[31m[red]", fix="x\u202ey"),
            1,
            ["cannot a", r"  found: \x1b[31m[red]", r"  try:   x\u202ey"],
        ),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (
            ZeroDivisionError("a\x07b"),
            1,
            [
                r"unexpected ZeroDivisionError: a\x07b; set FROSTLINE_DEBUG=1 for the traceback",
            ],
        ),
    ],
)
def test_every_failure_is_one_message_and_a_code(cli, monkeypatch, error, code, lines):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    done = cli("fit")
    assert (done.code, done.lines, done.out) == (code, lines, "")


def test_the_traceback_is_there_when_asked_for(process):
    done = process("policies", "nope", env={"FROSTLINE_DEBUG": "1"})
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.lines[-3] == "cannot use the policy 'nope'"


def test_no_traceback_otherwise(process):
    done = process("policies", "nope")
    assert done.code == 2
    assert "Traceback" not in done.err


def test_a_reader_that_leaves_early_is_no_crash():
    command = "from frostline.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", command, "policies", "gradual"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""


def test_colour_only_where_it_is_wanted(process):
    assert "\x1b" not in process("--help").out
    assert "\x1b" not in process("policies").out
