"""Nothing foreign steers the terminal: every string printed went through `escape`."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.cli import terminal

STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


@given(st.text(st.characters(codec=None)))
def test_no_steering_character_survives(text: str):
    shown = terminal.escape(text)
    left = [c for c in shown if unicodedata.category(c) in STEERING and c not in "\u200c\u200d"]
    assert not left


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_what_steers_nothing_is_unchanged(text: str):
    assert terminal.escape(text) == text


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),
        ("a\r\nb\x00", r"a\r\nb\x00"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff.jpg", r"\udcff.jpg"),
        ("\u2028", r"\u2028"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_escapes_are_readable(foreign: str, shown: str):
    assert terminal.escape(foreign) == shown


def test_markup_and_emoji_codes_in_names_stay_as_they_are(capsys: pytest.CaptureFixture[str]):
    names = ("[bold red]rose[/]", ":rose:", "\x1b[2J", "[link=http://x]y[/link]", "[/]")
    terminal.print_table({"class": "left"}, [(n,) for n in names], title="[red]t[/]\x07")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    for name in ("[bold red]rose[/]", ":rose:", r"\x1b[2J", "[link=http://x]y[/link]", "[red]t[/]"):
        assert name in out


def test_a_terminal_that_is_not_utf8_gets_escapes_instead_of_an_error():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    terminal.console(stream).print("Gänseblümchen")
    stream.flush()
    assert raw.getvalue().strip() == rb"G\xe4nsebl\xfcmchen"


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]):
    terminal.print_json({"\x9b": "\u202e"})
    assert capsys.readouterr().out == '{\n  "\\u009b": "\\u202e"\n}\n'


def test_absent_values_are_dashes(capsys: pytest.CaptureFixture[str]):
    terminal.print_table({"a": "left", "b": "right"}, [("x", None)])
    assert capsys.readouterr().out.split()[-2:] == ["x", "-"]
