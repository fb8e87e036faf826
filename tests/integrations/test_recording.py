"""Runs of loops of one's own: recorded as fit records them, gone on with where the driver is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faulty_disk import QuickDisk, use_disk
from frostline import _io
from frostline.driver import Driver
from frostline.errors import ConfigError, DataError, StorageError
from frostline.integrations.recording import About, Recording, record
from frostline.live import plain
from frostline.records import comparison_table, read_run, without_costs
from frostline.registry import make_policy
from frostline.report.numbers import numbers_of
from frostline.report.read import read_runs
from numpy_case import NumpyCase, copy_into

EPOCHS, STEPS = 4, 3
POLICY = "gradual"  # one group deeper per epoch


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


class Loop:
    """A loop of the user's, which can be taken up by another one where it was saved."""

    def __init__(self, policy: str = POLICY) -> None:
        self.case = NumpyCase()
        self.driver = Driver(
            make_policy(policy), self.case.backend, total_steps=EPOCHS * STEPS,
            steps_per_epoch=STEPS,
        )  # fmt: skip

    def epoch(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            with self.driver.step():
                self.case.backward()
                self.driver.sample()
                self.case.update()

    def epochs(self, run: Recording, count: int) -> None:
        for _ in range(count):
            self.epoch()
            metrics = {"train_loss": 1 / (run.epochs + 1), "val_accuracy": run.epochs / 10}
            run.epoch(metrics)
            self.driver.evaluated(metrics)

    def save(self) -> Any:
        return json.loads(json.dumps(self.driver.state())), self.case

    @classmethod
    def resumed(cls, saved: Any, policy: str = POLICY) -> Loop:
        state, case = saved
        loop = cls(policy)
        copy_into(loop.case, case)
        loop.driver.restore(state)
        return loop


def _whole(folder: Path, policy: str = POLICY, **more: Any) -> Path:
    loop = Loop(policy)
    with record(loop.driver, folder, **more) as run:
        loop.epochs(run, EPOCHS)
    return folder


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [without_costs(line) for line in _io.read_lines(folder / "record.jsonl").records]


class Gone(Exception):
    pass


# -- what is recorded ----------------------------------------------------------------------------


def test_a_loop_is_recorded_as_fit_records_its_runs(tmp_path: Path):
    seen: list[int] = []
    loop = Loop()
    loop.driver.on_decision = lambda decision: seen.append(decision.step)
    before = loop.driver.on_decision
    settings = {"seed": 5, "lr": 0.1}
    folder = tmp_path / "mine"
    with record(loop.driver, folder, model="net", data="noise", settings=settings) as run:
        loop.epochs(run, EPOCHS)
    assert loop.driver.on_decision == before
    found = read_run(folder)
    assert found.finished
    assert found.header["config"] == {"model": "net", "data": "noise", "policy": POLICY, **settings}
    assert list(found.header["groups"]) == list(loop.driver.backend.groups.names)
    assert [d.step for d in found.decisions] == seen == [d.step for d in loop.driver.decisions]
    assert all(d.plan.reason for d in found.decisions)
    assert [line["step"] for line in found.epochs] == [STEPS * (i + 1) for i in range(EPOCHS)]
    costs = found.epochs[-1]["costs"]
    assert 0 < costs["training_s"] <= costs["wall_s"] < found.summary["wall_s"]
    assert costs["peak_memory_bytes"] > 2**20
    assert found.summary["steps"] == EPOCHS * STEPS
    assert found.summary["best_epoch"] == EPOCHS
    assert found.summary["certificate_ok"]
    assert 0 < found.summary["trained_parameter_share"] < 1
    assert json.loads((folder / "summary.json").read_text())["val_accuracy"] == 0.3


def test_reports_tables_and_the_live_page_read_it(tmp_path: Path):
    first = _whole(tmp_path / "one", settings={"seed": 0})
    loop = Loop()
    with (
        contextlib.suppress(Gone),
        record(loop.driver, tmp_path / "two", settings={"seed": 1}) as run,
    ):
        loop.epochs(run, 2)
        raise Gone
    numbers = numbers_of(read_runs([first, tmp_path / "two"]))
    assert [arm.name for arm in numbers.arms] == [POLICY]
    assert [run.finished for run in numbers.arms[0].runs] == [True, False]
    assert [detail.proof is not None for detail in numbers.details] == [True, False]
    assert numbers.details[0].proof.intact
    assert numbers.details[0].proof.complete
    assert numbers.repeat.commands == ()
    assert "one was recorded in a loop of its own: run that program again" in numbers.repeat.notes
    assert numbers.details[0].time_s is not None
    assert json.dumps(numbers.to_json())
    assert comparison_table([first])[0].policy == POLICY
    assert "0.3000" not in plain.render([first])
    assert "30.0 %" in plain.render([first, tmp_path / "two"])


def test_what_was_not_measured_is_said_to_be_so(tmp_path: Path):
    loop = Loop("full")
    with record(loop.driver, tmp_path) as run:
        loop.epoch()
        run.epoch({})
    tiles = {tile.label: tile.value for tile in numbers_of(read_runs([tmp_path])).headline.tiles}
    assert tiles["validation accuracy"] == "not measured"
    assert plain.render([tmp_path])


def test_the_test_result_is_added_before_or_after_the_end(tmp_path: Path):
    loop = Loop()
    with record(loop.driver, tmp_path) as run:
        loop.epochs(run, 1)
        run.tested({"accuracy": 0.5})
    assert read_run(tmp_path).summary["test_accuracy"] == 0.5
    run.tested({"test_accuracy": 0.6, "loss": 2})
    found = read_run(tmp_path)
    assert (found.summary["test_accuracy"], found.summary["test_loss"]) == (0.6, 2.0)
    assert found.summary["val_accuracy"] == 0.0
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] == 0.6
    assert len(_io.read_lines(tmp_path / "record.jsonl").records) == len(_lines(tmp_path))


def test_a_diagnosis_says_why_there_is_none(tmp_path: Path):
    from frostline.study.run_facts import read_facts

    with pytest.raises(DataError, match="a run recorded in a loop of its own"):
        read_facts(read_run(_whole(tmp_path)))


# -- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY, "gradual:every=4st"])
@pytest.mark.parametrize("lost", [0, 1, STEPS])
def test_a_resumed_run_records_what_the_uninterrupted_one_does(
    tmp_path: Path, lost: int, policy: str
):
    """Lines of work that was lost are dropped and written again."""
    whole = _whole(tmp_path / "whole", policy)
    loop = Loop(policy)
    with contextlib.suppress(Gone), record(loop.driver, tmp_path / "broken") as run:
        loop.epochs(run, 2)
        saved = loop.save()
        spent = read_run(tmp_path / "broken").epochs[-1]["costs"]["wall_s"]
        copy = NumpyCase()
        copy_into(copy, loop.case)
        saved = (saved[0], copy)
        if lost == STEPS:
            loop.epochs(run, 1)
        else:
            loop.epoch(lost)
        raise Gone
    found = read_run(tmp_path / "broken")
    assert not found.finished
    assert len(found.epochs) == 2 + (lost == STEPS)
    again = Loop.resumed(saved, policy)
    with record(again.driver, tmp_path / "broken") as run:
        assert run.epochs == 2
        again.epochs(run, EPOCHS - 2)
    assert _lines(tmp_path / "broken") == _lines(whole)
    assert read_run(tmp_path / "broken").summary["wall_s"] > spent


def test_without_a_checkpoint_an_unfinished_run_starts_over(tmp_path: Path):
    loop = Loop()
    with contextlib.suppress(Gone), record(loop.driver, tmp_path) as run:
        loop.epochs(run, 2)
        raise Gone
    loop = Loop()
    with record(loop.driver, tmp_path) as run:
        assert run.epochs == 0
        loop.epochs(run, EPOCHS)
    assert _lines(tmp_path) == _lines(_whole(tmp_path / "whole"))


def test_starting_over_may_decide_otherwise(tmp_path: Path):
    """Weights that were drawn anew have other spectra; the driver may have started before."""
    for seed, ends in ((0, False), (1, True)):
        loop, source = Loop("spectrum:share=0.5"), np.random.default_rng(seed)
        for array in loop.case.net.parameters.values():
            array[...] = source.normal(size=array.shape)
        loop.driver.start()
        with contextlib.suppress(Gone), record(loop.driver, tmp_path) as run:
            loop.epochs(run, 1)
            if not ends:
                raise Gone
    assert read_run(tmp_path).finished
    assert read_run(tmp_path).decisions == tuple(loop.driver.decisions)


def _killed(work: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_killed_run_is_readable_and_another_process_takes_over(tmp_path: Path):
    def work() -> None:
        loop = Loop()
        with record(loop.driver, tmp_path / "run") as run:
            loop.epochs(run, 2)
            with (tmp_path / "run" / "record.jsonl").open("ab") as file:
                file.write(b'{"crc":"00')  # a line that was being written
            os.kill(os.getpid(), signal.SIGKILL)

    _killed(work)
    found = read_run(tmp_path / "run")
    assert found.torn
    assert len(found.epochs) == 2
    loop = Loop()
    with record(loop.driver, tmp_path / "run") as run:
        loop.epochs(run, EPOCHS)
    assert read_run(tmp_path / "run").finished


def test_a_finished_run_goes_on_with_its_own_driver_only(tmp_path: Path):
    loop = Loop()
    with record(loop.driver, tmp_path) as run:
        loop.epochs(run, 2)
        saved = loop.save()
    again = Loop.resumed(saved)
    with record(again.driver, tmp_path) as run:
        assert not (tmp_path / "summary.json").exists()
        again.epochs(run, 2)
    assert len(read_run(tmp_path).epochs) == EPOCHS
    before = (tmp_path / "record.jsonl").read_bytes()
    for early in (Loop(), Loop.resumed(saved)):
        with (
            pytest.raises(ConfigError, match="a finished run of 12 updates"),
            record(early.driver, tmp_path),
        ):
            pass
    assert (tmp_path / "record.jsonl").read_bytes() == before
    assert read_run(tmp_path).finished
    loop = Loop()
    with record(loop.driver, tmp_path, fresh=True) as run:
        loop.epochs(run, 1)
    (aside,) = tmp_path.parent.glob(f"{tmp_path.name}.old-*")
    assert (aside / "record.jsonl").read_bytes() == before


def test_other_settings_groups_and_decisions_are_refused(tmp_path: Path):
    loop = Loop()
    with contextlib.suppress(Gone), record(loop.driver, tmp_path, settings={"lr": 1}) as run:
        loop.epochs(run, 2)
        raise Gone
    state, case = loop.save()
    before = (tmp_path / "record.jsonl").read_bytes()
    for settings in ({"lr": 2}, {}, {"lr": 1, "seed": 2}):
        again = Loop.resumed((state, case))
        with (
            pytest.raises(ConfigError, match="other settings there"),
            record(again.driver, tmp_path, settings=settings),
        ):
            pass
    state["decisions"][0]["step"] = 1
    again = Loop.resumed((state, case))
    with (
        pytest.raises(ConfigError, match="other decisions there"),
        record(again.driver, tmp_path, settings={"lr": 1}),
    ):
        pass
    assert (tmp_path / "record.jsonl").read_bytes() == before


def test_another_process_that_records_there_is_an_error(tmp_path: Path):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        loop = Loop()
        with record(loop.driver, tmp_path):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    try:
        loop = Loop()
        with (
            pytest.raises(StorageError, match="another process runs there"),
            record(loop.driver, tmp_path),
        ):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    loop = Loop()
    with record(loop.driver, tmp_path) as run:
        loop.epochs(run, 1)


def test_a_later_recording_of_this_process_ends_an_earlier_one(tmp_path: Path):
    """As in a notebook, where a cell is run again after an interruption."""
    first, second = Loop(), Loop()
    stale = Recording(tmp_path, About())
    stale.attach(first.driver)
    with record(second.driver, tmp_path) as run:
        second.epochs(run, 1)
        with pytest.raises(StorageError, match="a record that is closed"):
            stale.epoch({})
        second.epochs(run, 1)
    assert len(read_run(tmp_path).epochs) == 2


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"policy": "full"}, "'policy' among them"), ({"a": object()}, "object"),
     ({"seed": "one"}, "seed='one'")],
)  # fmt: skip
def test_settings_that_cannot_be_recorded_are_refused(settings: dict[str, Any], found: str):
    with pytest.raises(ConfigError, match=found):
        About(settings=settings)
