"""What trackers are told, and that none can stop, delay or change what tells them."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from frostline.clock import Duration
from frostline.driver import Driver
from frostline.errors import ConfigError, MissingExtra
from frostline.groups import LayerGroups
from frostline.integrations import tracking
from frostline.integrations.tracking import DriverLog, Tracking, open_tracking, track
from frostline.plan import FreezePlan
from frostline.policies.scheduled import Gradual
from frostline.policy import Event, Policy, State
from frostline.signals import Need
from numpy_case import NumpyCase


class Spy:
    """A tracker such as Accelerate's: `log(values, step=)`."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, Any], int]] = []

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.told.append((dict(values), step))

    def of(self, name: str) -> list[tuple[int, Any]]:
        return [(step, values[name]) for values, step in self.told if name in values]


class Writer:
    """A writer such as TensorBoard's."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))


class Broken:
    def log(self, values: Mapping[str, Any], step: int) -> None:
        raise RuntimeError("the disk\nis full")


@dataclass(frozen=True, slots=True)
class Reads(Policy):
    """Reads a signal every three updates and freezes nothing."""

    def needs(self) -> tuple[Need, ...]:
        return (Need("gradient_norm", Duration.parse("3st")),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(), state


def _case(policy: Policy | None = None) -> tuple[NumpyCase, Driver]:
    case = NumpyCase()
    policy = policy or Gradual(Duration.parse("2st"))
    return case, Driver(policy, case.backend, total_steps=8, steps_per_epoch=4)


def _train(case: NumpyCase, driver: Driver, log: DriverLog | None = None) -> None:
    for _ in range(8):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
        if log is not None:
            log.log({"loss": 0.5})


# -- what is told --------------------------------------------------------------------------------


def test_decisions_and_what_is_frozen_are_told():
    case, driver = _case()
    spy, seen = Spy(), []
    driver.on_decision = seen.append
    with track(driver, [spy]) as log:
        _train(case, driver, log)
    assert [d.step for d in seen] == [step for step, _ in spy.of("decision")]  # as before, too
    assert len(seen) > 2
    for step, text in spy.of("decision"):
        assert text.startswith(f"step {step}: frozen ")
    assert "gradual unfreezing" in spy.of("decision")[-1][1]
    groups = dict(spy.of("frozen/groups"))
    assert groups == {d.step: len(d.plan.frozen) for d in seen}
    assert spy.of("frozen/parameter_share")[-1][1] == 0
    for name in driver.backend.groups.names:
        states = [value for _, value in spy.of(f"frozen/{name}")]
        assert all(one != two for one, two in itertools.pairwise(states))
    assert [value for _, value in spy.of("loss")] == [0.5] * 8
    assert driver.on_decision == seen.append


def test_each_reading_of_a_signal_is_told_once_per_group():
    case, driver = _case(Reads())
    spy = Spy()
    with track(driver, [spy]) as log:
        _train(case, driver, log)
    for name in driver.backend.groups.names:
        found = spy.of(f"gradient_norm/{name}")
        assert [step for step, _ in found] == [3, 6]
        assert all(value > 0 for _, value in found)


def test_a_writer_gets_numbers_as_scalars_and_decisions_as_texts():
    case, driver = _case()
    writer = Writer()
    with track(driver, [writer]) as log:
        _train(case, driver, log)
    assert ("loss", 0.5, 8) in writer.scalars
    assert all(name == "decision" for name, _, _ in writer.texts)
    assert writer.texts


# -- what they cannot do -------------------------------------------------------------------------


def test_one_that_raises_is_left_out_said_once_and_training_is_the_same(caplog):
    case, driver = _case()
    _train(case, driver)
    other, driven = _case()
    spy = Spy()
    with caplog.at_level(logging.WARNING), track(driven, [Broken(), spy]) as log:
        _train(other, driven, log)
    said = [r.getMessage() for r in caplog.records if "told nothing more" in r.getMessage()]
    assert said == ["Broken is told nothing more, the run goes on: RuntimeError: the disk is full"]
    assert spy.of("loss")
    assert other.evidence() == case.evidence()
    assert driven.decisions == driver.decisions


def test_what_training_raises_comes_through():
    _, driver = _case()
    with pytest.raises(ZeroDivisionError), track(driver, [Broken()]):
        raise ZeroDivisionError


def test_an_unknown_tracker_is_refused():
    _, driver = _case()
    with pytest.raises(ConfigError, match="'tensorbord'"), track(driver, ["tensorbord"]):
        pass
    with pytest.raises(ConfigError, match="log to a int"), track(driver, [3]):
        pass


def test_one_that_is_not_installed_is_refused_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'frostline\[trackers\]'"):
        open_tracking(["wandb"], tmp_path, name="x")


# -- the process of trackers ---------------------------------------------------------------------


def _apart(tmp_path, monkeypatch, code: str) -> Tracking:
    """Trackers whose process runs this code instead."""
    monkeypatch.setattr(tracking, "_COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(tracking, "check_installed", lambda names: None)
    return open_tracking(
        ["mlflow"], tmp_path / "trackers", name="x", settings={"nan": float("nan")}
    )


ECHO = """
import sys
from pathlib import Path
Path("told.jsonl").write_text(sys.stdin.read())
"""


def test_the_process_is_told_all_in_order(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    told = _apart(tmp_path, monkeypatch, ECHO)
    for step in range(1000):
        told.values({"loss": step / 7, "bad": float("inf")}, step)
    told.text("decision", "why\nnot </script>\x1b", 3)
    told.close("finished")
    assert not caplog.records
    lines = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert lines[0]["trackers"] == ["mlflow"]
    assert lines[0]["settings"] == {"nan": "NaN"}
    assert [line["step"] for line in lines[1:1001]] == list(range(1000))
    assert lines[7]["values"] == {"loss": 6 / 7, "bad": "Infinity"}
    assert lines[1001]["texts"] == {"decision": "why\nnot </script>\x1b"}
    assert lines[1002] == {"status": "finished"}


def test_what_it_reports_is_said(tmp_path, monkeypatch, caplog):
    code = """
import sys
print('no JSON', flush=True)
print('{"tracker": "mlflow", "found": "no network"}', flush=True)
sys.stdin.read()
"""
    with caplog.at_level(logging.WARNING):
        _apart(tmp_path, monkeypatch, code).close("finished")
    assert "mlflow is told nothing more, the run goes on: no network" in caplog.text


@pytest.mark.parametrize(
    "code",
    ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)", "import os; os.close(0)"],
)
def test_a_process_that_dies_harms_nobody_and_is_said_once(tmp_path, monkeypatch, caplog, code):
    with caplog.at_level(logging.WARNING):
        told = _apart(tmp_path, monkeypatch, code)
        for step in range(3000):
            told.values({"loss": 0.5}, step)
        for _ in range(500):
            if caplog.records:
                break
            time.sleep(0.02)
        told.values({"loss": 0.5}, 3000)
        told.close("finished")
    (record,) = caplog.records
    assert "ended by itself" in record.getMessage()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise SystemExit(3)", "ended by itself, code 3"),
        ("import os, time; os.close(0); time.sleep(600)", "was ended"),
    ],
)
def test_a_process_that_never_listened_is_not_left_behind(
    tmp_path, monkeypatch, caplog, code, found
):
    class Late(subprocess.Popen):
        """Known to whoever started it when it listens no more."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)
            while True:
                try:
                    os.write(self.stdin.fileno(), b"\n")
                except BrokenPipeError:
                    return
                time.sleep(0.02)

    started: list[subprocess.Popen] = []
    monkeypatch.setattr(tracking.subprocess, "Popen", Late)
    with caplog.at_level(logging.WARNING):
        _apart(tmp_path, monkeypatch, code).close("finished")
    (process,), (record,) = started, caplog.records
    assert process.returncode is not None
    assert process.stdin.closed
    assert process.stdout.closed
    assert found in record.getMessage()


def test_one_that_hangs_delays_nothing_and_is_ended_in_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "_CLOSE_S", 0.5)
    monkeypatch.setattr(tracking, "_QUEUE", 100)
    told = _apart(tmp_path, monkeypatch, "import time; time.sleep(600)")
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(20_000):  # more than pipe and queue hold
            told.values({"a name that is long enough to fill a pipe": 0.5}, step)
        spent = time.monotonic() - start
        told.close("finished")
    assert spent < 10  # milliseconds, but for a busy machine
    assert "do not keep up" in caplog.text
    assert "were ended" in caplog.text
    assert len([r for r in caplog.records if "keep up" in r.getMessage()]) == 1


def test_where_no_process_can_be_had_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "_COMMAND", (str(tmp_path / "no-such-python"),))
    monkeypatch.setattr(tracking, "check_installed", lambda names: None)
    with caplog.at_level(logging.WARNING):
        told = open_tracking(["mlflow"], tmp_path, name="x")
    assert "mlflow is told nothing more" in caplog.text
    told.values({"loss": 0.5}, 1)
    told.close("finished")
