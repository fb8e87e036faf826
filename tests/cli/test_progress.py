"""Progress: lines away from a terminal, a bar on one, both escaped; time left from the pace."""

from __future__ import annotations

import io

import pytest

from frostline.cli import progress

START = {
    "kind": "start",
    "path": "runs/\x1b[31mx",
    "resumed": False,
    "step": 0,
    "total_steps": 10,
    "epochs": 2,
    "plan": "frozen 1 of 2 groups",
    "reason": "",
}


def _step(step: int) -> dict:
    return {"kind": "step", "step": step, "total_steps": 10, "epoch": 1, "loss": 0.5, "lr": 0.1}


def _epoch(epoch: int, *, better: bool) -> dict:
    metrics = {"train_loss": 0.25, "val_loss": 0.5, "val_accuracy": 0.875}
    return {
        "kind": "epoch",
        "epoch": epoch,
        "step": 5 * epoch,
        "metrics": metrics,
        "better": better,
        "costs": {},
    }


DECISION = {"kind": "decision", "step": 5, "plan": "frozen 0 of 2 groups", "reason": "time"}
EVENTS = (START, _step(1), _epoch(1, better=True), DECISION, _epoch(2, better=False))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _shown(stream: io.StringIO, *, quiet: bool = False) -> str:
    with progress.follow(stream, title="gr\x1badual", quiet=quiet) as on_event:
        for event in EVENTS:
            on_event(event)
    return stream.getvalue()


def test_lines_away_from_a_terminal():
    lines = _shown(io.StringIO()).splitlines()
    assert lines[0] == r"run folder runs/\x1b[31mx"
    assert lines[1] == "frozen 1 of 2 groups"
    expected = "epoch 1/2, train loss 0.2500, val loss 0.5000, val accuracy 87.5 %, best so far"
    assert lines[2].startswith(expected)
    assert lines[3] == "step 5: frozen 0 of 2 groups"
    assert lines[4] == "  time"
    assert "best so far" not in lines[5]
    assert len(lines) == 6


def test_the_reason_of_the_first_plan_is_shown():
    stream = io.StringIO()
    with progress.follow(stream) as on_event:
        on_event(START | {"reason": "the head\x1b first"})
    assert stream.getvalue().splitlines()[-1] == r"  the head\x1b first"


def test_of_many_changes_of_plan_the_first_are_shown_and_the_rest_counted_in_each_epoch():
    stream = io.StringIO()
    with progress.follow(stream) as on_event:
        on_event(START)
        for epoch in (1, 2):
            for step in range(1, 101):
                on_event(DECISION | {"step": step, "plan": f"frozen {(step + 1) % 2} of 2 groups"})
            on_event(_epoch(epoch, better=True))
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("step ") for line in lines) == 2 * progress._MOST_CHANGES
    more = f"{100 - progress._MOST_CHANGES} more changes of plan in this epoch: see record.jsonl"
    assert lines.count(more) == 2


def test_changes_of_rates_at_every_step_leave_room_for_changes_of_what_is_frozen():
    stream = io.StringIO()
    with progress.follow(stream) as on_event:
        on_event(START)
        for step in range(1, 101):
            frozen = f"frozen {1 + step // 50} of 9 groups"
            on_event(DECISION | {"step": step, "plan": frozen})
        on_event(_epoch(1, better=True))
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 1", "step 2", "step 50", "step 100"]
    assert "96 more changes of plan" in stream.getvalue()


def test_quiet_shows_nothing():
    assert _shown(io.StringIO(), quiet=True) == ""


def test_a_terminal_gets_the_lines_and_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = _shown(Terminal())
    assert "update 1/10" in shown
    assert r"runs/\x1b[31mx" in shown  # the name, escaped; the bar's own sequences are real
    assert r"gr\x1badual" in shown


def test_no_colour_is_obeyed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    import re

    colours = re.findall(r"\x1b\[([0-9;]*)m", _shown(Terminal()))
    assert not [c for c in colours if any(30 <= int(n) <= 107 for n in c.split(";") if n)]


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[" not in _shown(Terminal()).replace(r"\x1b", "")


def test_resume_is_said():
    stream = io.StringIO()
    with progress.follow(stream) as on_event:
        on_event(START | {"resumed": True, "step": 7})
    assert "going on in" in stream.getvalue()
    assert "after update 7" in stream.getvalue()


@pytest.mark.parametrize(
    ("step", "seconds", "text"),
    [(0, 5.0, ""), (2, 4.0, "about 16.0 s left"), (10, 20.0, "nearly done")],
)
def test_time_left_follows_the_pace_of_this_session(step, seconds, text):
    now = iter((100.0, 100.0 + seconds))
    pace = progress._Pace(clock=lambda: next(now))
    pace.start(20)
    assert pace.left_text(20 + step, 30) == text


FROZEN = {"frozen_groups": 3, "groups": 8, "frozen_share": 0.625}


def test_what_is_frozen_and_the_time_saved_are_below_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with progress.follow(stream) as on_event:
        on_event(START | FROZEN)
        on_event(_epoch(1, better=True) | {"costs": {"saved_predicted_s": 75.0}})
        on_event(_epoch(2, better=False) | {"metrics": _epoch(2, better=False)["metrics"]
                 | {"val_accuracy": 0.5}})  # fmt: skip
        on_event(_step(6) | {"saved_predicted_s": 90.0})
    shown = stream.getvalue()
    assert "epoch 2: val accuracy 50.0 %  best epoch 1: val accuracy 87.5 %" in shown
    assert "frozen 3 of 8 groups, 62.5 % of parameters  saved 1 min 30 s (predicted)" in shown


def test_lines_say_the_time_saved_and_that_it_is_a_prediction():
    stream = io.StringIO()
    with progress.follow(stream) as on_event:
        on_event(START)
        on_event(_epoch(1, better=True) | {"costs": {"saved_predicted_s": -2.5}})
        on_event(_epoch(2, better=True) | {"costs": {"saved_predicted_s": None}})
    first, second = stream.getvalue().splitlines()[-2:]
    assert first.endswith(", 2.5 s more than full fine-tuning (predicted)")
    assert "predicted" not in second
