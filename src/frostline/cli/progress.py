"""Progress of a run on stderr: a live bar on a terminal, plain lines elsewhere.

Both show the same lines: where the run writes, changes of plan with the policy's reason, each
epoch. Of the changes within one epoch only the first few are shown, for some policies change their
plan at every step; the record has them all. The bar adds what moves between them: updates, loss,
time left, and below it the newest metrics, what is frozen, and the time saved so far. That time is
a prediction (`frostline.savings`), and is called one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from frostline.cli.results import seconds_text
from frostline.cli.terminal import console, escape

__all__ = ["follow", "saved_text"]

OnEvent = Callable[[Mapping[str, Any]], None]

#: Changes of plan shown in one epoch: of what is frozen, and of learning rates alone.
_MOST_CHANGES = 8
_MOST_RATES = 1


@contextmanager
def follow(stream: TextIO, *, title: str = "", quiet: bool = False) -> Iterator[OnEvent]:
    """Show a run while the block runs: pass what this yields as `on_event`.

    Args:
        stream: where to; a live bar if it is a terminal, lines otherwise.
        title: what the bar is called, e.g. the policy.
        quiet: show nothing.

    Example:
        Used by the command, and by scripts that want the same display::

            with follow(sys.stderr) as on_event:
                frostline.fit("timm:resnet18", "photos/", on_event=on_event)
    """
    out = console(stream)
    if quiet:
        yield _ignore
    elif not out.is_terminal or out.is_dumb_terminal:
        yield _Lines(lambda line: out.print(line, soft_wrap=True)).receive
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[now]}", markup=False),
        )
        with _Display(*columns, console=out, transient=True) as bar:
            lines = _Lines(lambda line: bar.console.print(line, soft_wrap=True))
            yield _Bar(bar, bar.add_task(escape(title), total=None, now="preparing"), lines).receive


def _ignore(event: Mapping[str, Any]) -> None:
    del event


@dataclass(slots=True)
class _Pace:
    """Time left, from the pace of this session."""

    clock: Callable[[], float] = time.monotonic
    started: float = 0.0
    first_step: int = 0

    def start(self, step: int) -> None:
        self.started, self.first_step = self.clock(), step

    def left_text(self, step: int, total: int | None) -> str:
        done = step - self.first_step
        if not total or done < 1:
            return ""
        left = (self.clock() - self.started) / done * (total - step)
        return f"about {seconds_text(left)} left" if left >= 1 else "nearly done"


class _Display(Progress):
    """A bar with lines of text below it."""

    below: tuple[str, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the lines, each cut where the terminal ends."""
        yield from super().get_renderables()
        for line in self.below:
            yield Text(escape(line), no_wrap=True, overflow="ellipsis", style="dim")


@dataclass(slots=True)
class _State:
    """The newest of what a run said of itself."""

    metrics: str = ""
    best: str = ""
    frozen: str = ""
    saved: str = ""

    def receive(self, event: Mapping[str, Any]) -> None:
        """Take in an event."""
        if event.get("frozen_groups") is not None:
            share = f"{100 * event['frozen_share']:.1f} % of parameters"
            count = f"{event['frozen_groups']} of {event['groups']} groups"
            self.frozen = f"frozen {count}, {share}"
        if event["kind"] == "epoch":
            accuracy = f"val accuracy {100 * event['metrics']['val_accuracy']:.1f} %"
            self.metrics = f"epoch {event['epoch']}: {accuracy}"
            if event["better"]:
                self.best = self.metrics
            event = event["costs"]
        if event.get("saved_predicted_s") is not None:
            self.saved = saved_text(event["saved_predicted_s"])

    def lines(self) -> tuple[str, ...]:
        """For below the bar."""
        best = f"best {self.best}" if self.best and self.best != self.metrics else ""
        first = "  ".join(filter(None, (self.metrics, best)))
        second = "  ".join(filter(None, (self.frozen, self.saved)))
        return tuple(filter(None, (first, second)))


def saved_text(seconds: float) -> str:
    """Time saved against full fine-tuning, a prediction, for people.

    Example:
        >>> saved_text(95), saved_text(-2)
        ('saved 1 min 35 s (predicted)', '2.0 s more than full fine-tuning (predicted)')
    """
    if seconds <= -0.1:
        return f"{seconds_text(-seconds)} more than full fine-tuning (predicted)"
    return f"saved {seconds_text(max(0.0, seconds))} (predicted)"


@dataclass(slots=True)
class _Lines:
    """Events as lines of text."""

    say: Callable[[str], Any]
    pace: _Pace = field(default_factory=_Pace)
    _epochs: int = 0
    _total: int | None = None
    _plan: str = ""  # the newest
    _left: dict[bool, int] = field(default_factory=dict[bool, int])
    _more: int = 0  # changes of plan in this epoch that were not shown

    def receive(self, event: Mapping[str, Any]) -> None:
        """Say what is worth a line."""
        match event["kind"]:
            case "start":
                self._epochs, self._total = event["epochs"], event["total_steps"]
                self.pace.start(event["step"])
                if event["resumed"]:
                    self.say(escape(f"going on in {event['path']} after update {event['step']}"))
                else:
                    self.say(escape(f"run folder {event['path']}"))
                self._say_plan("", event)
            case "decision" if event["step"]:
                self._decision(event)
            case "epoch":
                if self._more:
                    self.say(f"{self._more} more changes of plan in this epoch: see record.jsonl")
                self._left, self._more = {}, 0
                self.say(self._epoch(event))

    def _decision(self, event: Mapping[str, Any]) -> None:
        same = event["plan"] == self._plan  # only rates changed: some policies do so at each step
        left = self._left.setdefault(same, _MOST_RATES if same else _MOST_CHANGES)
        if left:
            self._left[same] = left - 1
            self._say_plan(f"step {event['step']}: ", event)
        else:
            self._plan = event["plan"]
            self._more += 1

    def _say_plan(self, when: str, event: Mapping[str, Any]) -> None:
        self._plan = event["plan"]
        self.say(escape(f"{when}{event['plan']}"))
        if event["reason"]:
            self.say(escape(f"  {event['reason']}"))

    def _epoch(self, event: Mapping[str, Any]) -> str:
        metrics = event["metrics"]
        parts = [
            f"epoch {event['epoch']}/{self._epochs}",
            f"train loss {metrics['train_loss']:.4f}",
            f"val loss {metrics['val_loss']:.4f}",
            f"val accuracy {100 * metrics['val_accuracy']:.1f} %",
        ]
        if event["better"]:
            parts.append("best so far")
        if left := self.pace.left_text(event["step"], self._total):
            parts.append(left)
        if (saved := event["costs"].get("saved_predicted_s")) is not None:
            parts.append(saved_text(saved))
        return ", ".join(parts)


@dataclass(slots=True)
class _Bar:
    """Events as a live bar, with the lines above it and the state of the run below."""

    bar: _Display
    task: TaskID
    lines: _Lines
    state: _State = field(default_factory=_State)

    def receive(self, event: Mapping[str, Any]) -> None:
        """Move the bar, then say what is worth a line."""
        self.lines.receive(event)
        self.state.receive(event)
        self.bar.below = self.state.lines()
        match event["kind"]:
            case "start":
                total, step = event["total_steps"], event["step"]
                self.bar.update(self.task, total=total, completed=step, now="training")
            case "step":
                step, total = event["step"], event["total_steps"]
                left = self.lines.pace.left_text(step, total)
                now = f"update {step}/{total}  loss {event['loss']:.3f}  {left}"
                self.bar.update(self.task, completed=step, now=now)
