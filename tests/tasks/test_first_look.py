"""The look at the data before training: what it changes, records, costs, and when it is not had."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import frostline
import tiny_task
from faulty_disk import QuickDisk, use_disk
from frostline._io import read_lines
from frostline.backends.torch.grouping import layer_groups
from frostline.errors import MissingExtra
from frostline.records import read_run, without_costs
from frostline.registry import make_policy
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.features import collect_features
from frostline.tasks.first_look import FirstLook, first_look, measured_signals, wanted
from frostline.tasks.probes import ProbeCurve, probe_curve, solved_head
from frostline.tasks.task import Task, load_task

SETTINGS: dict[str, Any] = {
    "model": "tiny_task:tiny_model",
    "data": "tiny_task:tiny_data",
    "policy": "auto",
    "epochs": 2,
    "batch_size": 16,
    "lr": 0.01,
    "threads": 1,
    "device": "cpu",
}
CPU = torch.device("cpu")


def settings(**changed: Any) -> dict[str, Any]:
    """The settings of these tests, changed."""
    return SETTINGS | changed


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def task_of(model: str = "tiny_task:tiny_model") -> Task:
    config = RunConfig(**settings(model=model))
    torch.manual_seed(0)
    return load_task(config)


def looked(task: Task, **options: Any) -> FirstLook:
    groups = layer_groups(task.model, task.example(2), head=task.head)
    options = {"probes": True, "solve": True} | options
    return first_look(task, task.model, groups, CPU, **options)


def lines(run: frostline.Run) -> list[Mapping[str, Any]]:
    return [without_costs(line) for line in read_lines(run.path / "record.jsonl").records]


# -- what it does ------------------------------------------------------------------------------


def test_the_head_is_solved_and_nothing_else_changes() -> None:
    task = task_of()
    groups = layer_groups(task.model, task.example(2), head=task.head)
    before = {name: t.clone() for name, t in task.model.state_dict().items()}
    train = collect_features(task, task.model, task.train, groups, device="cpu")
    look = looked(task)
    assert look.head == "solved"
    expected = solved_head(train, classes=3, seed=task.config.seed, errors=2.0)
    assert expected is not None
    layer = train.head_layer
    after = task.model.state_dict()
    assert np.array_equal(after[f"{layer}.weight"].numpy(), expected[0])
    assert np.array_equal(after[f"{layer}.bias"].numpy(), expected[1])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{layer}.weight", f"{layer}.bias"}


def test_the_probes_are_those_of_the_features() -> None:
    task = task_of()
    groups = layer_groups(task.model, task.example(2), head=task.head)
    train, val = (
        collect_features(task, task.model, split, groups, device="cpu")
        for split in (task.train, task.val)
    )
    look, curve = looked(task, solve=False), probe_curve(train, val, seed=task.config.seed)
    assert look.curve is not None
    assert [p.val_accuracy for p in look.curve.points] == [p.val_accuracy for p in curve.points]
    found = measured_signals(look.curve, groups)
    head = next(g.name for g in groups if g.name in groups.head)
    assert curve.head_input is not None
    assert found["probe_accuracy"] == {p.group: p.val_accuracy for p in curve.points} | {
        head: curve.head_input.val_accuracy
    }
    assert found["probe_behind"][curve.best.group] == 0.0


def test_only_what_is_wanted_is_done() -> None:
    task = task_of()
    before = {name: t.clone() for name, t in task.model.state_dict().items()}
    look = looked(task, solve=False)
    assert look.head == "random, as asked"
    assert all(torch.equal(before[n], t) for n, t in task.model.state_dict().items())
    assert looked(task, probes=False).curve is None


@pytest.mark.parametrize(
    ("policy", "head_start", "expected"),
    [
        ("full", None, (False, False)),
        ("full", "solved", (False, True)),
        ("auto", None, (True, True)),
        ("auto", "random", (True, False)),
        ("probe-depth", None, (True, True)),
        ("affordable:policy=(probe-depth),time=0.5", None, (True, True)),
    ],
)
def test_who_wants_it(policy: str, head_start: Any, expected: tuple[bool, bool]) -> None:
    config = load_config(None, {"model": "m", "data": "d", "head_start": head_start})
    assert wanted(config, make_policy(policy)) == expected


def no_linear_head(num_classes: int) -> tuple[nn.Module, object]:
    """The head is a convolution."""
    model, preprocess = tiny_task.tiny_model(num_classes)
    assert isinstance(model, nn.Sequential)
    model[3] = nn.Sequential(nn.Conv2d(6, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model, preprocess


def test_a_head_that_cannot_be_solved_stays_and_it_is_said(tmp_path: Path) -> None:
    run = frostline.fit(**settings(model=f"{__name__}:no_linear_head"), output=tmp_path / "run")
    assert run.record.first_look["head"] == "random: it is no single linear layer"
    assert run.record.decisions[0].plan.reason.startswith("probes: ")


# -- what a run records ------------------------------------------------------------------------


def test_a_run_under_auto_records_its_look(tmp_path: Path) -> None:
    run = frostline.fit(**SETTINGS, output=tmp_path / "run")
    look = run.record.first_look
    assert look["head"] == "solved"
    assert look["probes"].endswith("(12 validation samples).")
    assert look["costs"]["first_look_s"] > 0
    assert run.summary["first_look_s"] == look["costs"]["first_look_s"]
    assert run.summary["training_s"] >= run.summary["first_look_s"]
    curve = ProbeCurve.from_json(json.loads((run.path / "probes.json").read_text()))
    assert curve.sentence() == look["probes"]
    first = run.record.decisions[0]
    assert set(first.signals) >= {"probe_accuracy", "probe_behind"}
    assert first.plan.reason.startswith("probes: ")


def test_other_policies_look_at_nothing(tmp_path: Path) -> None:
    run = frostline.fit(**settings(policy="full"), output=tmp_path / "run")
    assert run.record.first_look == {}
    assert not (run.path / "probes.json").exists()
    assert run.summary["first_look_s"] == 0


def test_a_solved_head_under_any_policy(tmp_path: Path) -> None:
    """Linear probing that starts at its end is as good after one epoch as it gets."""
    same = settings(policy="linear-probe", epochs=1, lr=1e-9, head_lr=1e-9)
    solved = frostline.fit(**same, head_start="solved", output=tmp_path / "solved")
    random = frostline.fit(**same, output=tmp_path / "random")
    assert solved.metrics[0]["val_loss"] < random.metrics[0]["val_loss"]
    assert not (solved.path / "probes.json").exists()


def test_a_pause_and_a_kill_change_nothing(tmp_path: Path) -> None:
    same = settings(epochs=3)
    whole = frostline.fit(**same, output=tmp_path / "whole")
    frostline.fit(**same, output=tmp_path / "paused", pause_after=1)
    paused = frostline.fit(**same, output=tmp_path / "paused")
    assert lines(paused) == lines(whole)

    def fail(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        frostline.fit(**same, output=tmp_path / "killed", on_event=fail)
    assert read_run(tmp_path / "killed").first_look
    killed = frostline.fit(**same, output=tmp_path / "killed")
    assert lines(killed) == lines(whole)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match="frostline"):
        frostline.fit(**SETTINGS, output=tmp_path / "run")
