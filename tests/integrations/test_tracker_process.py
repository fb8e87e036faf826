"""The process of trackers: each gets every line until it fails, and is closed with the status."""

from __future__ import annotations

import io
import json

import pytest

from frostline.integrations import tracker_process


class Fake:
    """Notes what it is told; raises in one of its methods."""

    def __init__(self, name: str, fails: str = "") -> None:
        self.name = name
        self.fails = fails
        self.told: list = []
        self._note("open")

    def values(self, values, step) -> None:
        self._note("values", values, step)

    def text(self, name, text, step) -> None:
        self._note("text", name, text, step)

    def close(self, status) -> None:
        self._note("close", status)

    def _note(self, what, *told) -> None:
        if what == self.fails:
            raise RuntimeError(f"no {what}\nhere")
        self.told.append((what, *told))


def _serve(monkeypatch, fails, lines):
    made: dict[str, Fake] = {}

    def open_fake(name, about):
        made[name] = Fake(name, fails.get(name, ""))
        return made[name]

    monkeypatch.setattr(tracker_process, "open_tracker", open_fake)
    first = {"trackers": ["one", "two"], "folder": "f", "name": "x", "settings": {}, "step": 0}
    answers = io.StringIO()
    tracker_process.serve(first, iter(lines), answers)
    return made, [json.loads(line) for line in answers.getvalue().splitlines()]


LINES = [
    {"values": {"loss": 0.5, "bad": "NaN"}, "step": 1},
    {"texts": {"decision": "why"}, "step": 2},
]


def test_each_is_told_and_closed(monkeypatch):
    made, answers = _serve(monkeypatch, {}, [*LINES, {"status": "finished"}])
    assert answers == []
    for fake in made.values():
        opened, values, text, close = fake.told
        assert opened == ("open",)
        assert values[1]["loss"] == 0.5
        assert values[1]["bad"] != values[1]["bad"]  # a number again
        assert text == ("text", "decision", "why", 2)
        assert close == ("close", "finished")


def test_a_run_that_vanishes_is_closed_as_unfinished(monkeypatch):
    made, _ = _serve(monkeypatch, {}, LINES)
    assert made["one"].told[-1] == ("close", "unfinished")


@pytest.mark.parametrize("fails", ["open", "values", "text", "close"])
def test_one_that_fails_is_left_out_and_the_others_are_told_on(monkeypatch, fails):
    made, answers = _serve(monkeypatch, {"one": fails}, [*LINES, *LINES, {"status": "finished"}])
    assert answers == [{"tracker": "one", "found": f"RuntimeError: no {fails} here"}]
    assert len(made["two"].told) == 6
    assert fails == "close" or "one" not in made or ("close", "finished") not in made["one"].told
