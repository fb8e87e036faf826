"""Diagnoses of runs: on curves made by hand, and of real runs whose fault was planted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline.errors import DataError, UsageError
from frostline.plan import FreezePlan
from frostline.policy import Decision
from frostline.records import RunRecord
from frostline.registry import make_policy
from frostline.study.diagnosis import Diagnosis, Evidence, Finding, diagnose
from frostline.study.diagnosis.actions import change_rate
from frostline.study.diagnosis.case import Case, difference
from frostline.study.diagnosis.probing import probe_run
from frostline.study.learning_curve import LearningCurve, _point
from frostline.study.run_facts import MEASURES, RunFacts, read_facts
from frostline.tasks.config import load_config, resolve_config
from planted_task import data_folder, pretrained

GROUPS = {"stem": 500, "body": 1000, "deep": 1000, "head": 68}
EPOCHS = 12


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


# -- records made by hand --------------------------------------------------------------------------


def record(  # one setting after the other, as a run has them
    name: str = "run",
    *,
    train: Any = None,
    val: Any = None,
    accuracy: Any = None,
    policy: str = "full",
    frozen: tuple[str, ...] = (),
    classes: int = 4,
    samples: int = 400,
    val_samples: int = 200,
    per_epoch: int = 12,
    finished: bool = True,
    stopped: bool = False,
    folder: Path = Path("/nowhere"),
    **settings: Any,
) -> RunRecord:
    """A run with these curves, in units of the chance loss; healthy ones by default."""
    train = [0.9, 0.5, 0.35, 0.28, 0.25, 0.24, 0.23, 0.22, 0.22] if train is None else train
    val = [x + 0.03 for x in train] if val is None else val
    accuracy = [1 - 0.5 * x for x in val] if accuracy is None else accuracy
    chance = math.log(classes)
    wanted = {"model": "m:n", "data": "d", "policy": policy, "epochs": len(val), "lr": 3e-3}
    wanted |= {"head_lr": 3e-2, "patience": None, **settings}
    config = resolve_config(load_config(None, wanted), "text")
    body = sum(size for group, size in GROUPS.items() if group != "head")
    held = sum(GROUPS[group] for group in frozen)
    share = (body - held + GROUPS["head"]) / (body + GROUPS["head"])
    summary = {
        "trained_parameter_share": share, "stopped_early": stopped, "budget_spent": False,
    }  # fmt: skip
    lines = [
        {
            "epoch": e + 1,
            "step": (e + 1) * per_epoch,
            "metrics": {"train_loss": t * chance, "val_loss": v * chance, "val_accuracy": a},
            "costs": {"training_s": e + 1.0},
        }
        for e, (t, v, a) in enumerate(zip(train, val, accuracy, strict=True))
    ]
    return RunRecord(
        path=folder / name,
        header={
            "asked": {k: v for k, v in wanted.items() if k != "head_lr" or "head_lr" in settings},
            "config": config.model_dump(mode="json", exclude={"output"}),
            "data": {"train": {"samples": samples}, "val": {"samples": val_samples}},
            "labels": [f"class {i}" for i in range(classes)],
            "notes": {"classes": {f"class {i}": samples / classes for i in range(classes)}},
            "groups": GROUPS,
            "head": ["head"],
        },
        epochs=tuple(lines),
        decisions=(Decision(0, FreezePlan(frozen=frozenset(frozen))),),
        certificate=None,
        summary=summary if finished else {},
        torn=False,
    )


BODY = ("stem", "body", "deep")
PROBED: dict[str, Any] = {"policy": "linear-probe", "frozen": BODY}
#: What is left of a loss that the trained part cannot fit.
UNDERFIT = [0.98, 0.86, 0.82, 0.81, 0.80, 0.80, 0.80, 0.80, 0.80]


def kinds(found: Diagnosis) -> list[str]:
    return [f.kind for f in found.findings]


def the(found: Diagnosis, kind: str) -> Finding:
    return next(f for f in (*found.findings, *found.considered) if f.kind == kind)


def test_a_healthy_run_has_no_finding():
    found = diagnose(record())
    assert kinds(found) == ["nothing wrong"]
    finding = found.findings[0]
    assert (finding.action, finding.gain) == (None, None)
    assert len(finding.evidence) > 3
    assert finding.missing
    assert finding.sentence().startswith("Nothing wrong is shown: validation accuracy is 87.5 %")


def test_what_the_trained_part_cannot_fit_is_too_much_frozen():
    found = diagnose(record(train=UNDERFIT, **PROBED))
    assert kinds(found) == ["too much frozen"]
    finding = found.findings[0]
    assert finding.action is not None
    assert finding.action.settings == {"policy": "first:groups=1"}  # of three, half are kept
    assert finding.gain is not None
    assert finding.gain.accuracy is None
    assert "short run" in finding.gain.basis
    assert finding.missing[0] == "a run that trains more: a short full fine-tuning"
    # The same curves say nothing of freezing where nothing is frozen.
    assert "too much frozen" not in [f.kind for f in diagnose(record(train=UNDERFIT)).considered]


def test_features_at_chance_level_are_not_half_kept():
    flat = [1.02, 1.0, 0.99, 0.99, 0.98, 0.98, 0.98, 0.98]
    found = diagnose(record(train=flat, accuracy=[0.25, 0.27] * 4, **PROBED))
    assert kinds(found)[0] == "too much frozen"
    assert found.findings[0].action is not None
    assert found.findings[0].action.settings == {"policy": "full"}


LEARNED_BY_HEART: dict[str, Any] = {
    "train": [1.0, 0.6, 0.35, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.02],
    "val": [0.8, 0.55, 0.45, 0.47, 0.55, 0.62, 0.68, 0.72, 0.74, 0.75],
    "accuracy": [0.6, 0.75, 0.8, 0.8, 0.78, 0.76, 0.75, 0.74, 0.74, 0.73],
    "samples": 48,
}


def overfit(name: str = "run", **change: Any) -> RunRecord:
    return record(name, **(LEARNED_BY_HEART | change))


def test_what_is_fitted_and_forgotten_is_too_little_frozen():
    found = diagnose(overfit())
    assert kinds(found)[0] == "too little frozen"
    finding = found.findings[0]
    assert finding.action is not None
    assert finding.action.settings == {"policy": "linear-probe"}
    assert {e.source for e in finding.evidence} == {"curves", "settings"}
    assert "learning curve" in " ".join(finding.missing)
    assert "training accuracy" in " ".join(finding.missing)
    # With many samples of each class half of what trains is frozen, not all of it.
    many = diagnose(overfit(samples=1000))
    assert the(many, "too little frozen").action.settings == {"policy": "first:groups=2"}  # pyright: ignore[reportOptionalMemberAccess]


def test_a_loss_at_chance_until_the_rate_falls_is_a_rate_too_high():
    val = [3.0, 8.0, 5.0, 4.0, 3.0, 2.0, 1.2, 0.8, 0.6, 0.5, 0.45, 0.45]
    train = [1.2, 1.3, 1.2, 1.1, 1.1, 1.0, 0.9, 0.7, 0.6, 0.5, 0.45, 0.4]
    found = diagnose(record(train=train, val=val, accuracy=[0.3] * 6 + [0.6] * 6, lr=0.5))
    assert kinds(found)[0] == "learning rate too high"
    assert found.findings[0].action is not None
    assert found.findings[0].action.settings == {"lr": 0.001}


def test_a_run_that_diverged_had_a_rate_too_high(tmp_path: Path):
    bad = record("seed-0", folder=tmp_path, epochs=12, train=[], val=[], accuracy=[])
    with pytest.raises(DataError, match="without a finished epoch"):
        diagnose(bad)
    why = "cannot go on training\n  found: a loss of nan at learning rates 1 to 1"
    (tmp_path / "seed-0.failed.json").write_text(json.dumps({"why": why}))
    found = diagnose(bad, reference=record("other"))
    assert kinds(found)[0] == "learning rate too high"
    assert "a loss of nan" in found.findings[0].evidence[0].says
    assert found.val_accuracy is None
    assert found.notes == ("left aside, as the run itself failed: /nowhere/other",)


def test_a_loss_that_never_moves_is_a_rate_too_low():
    val = [1.10 - 0.003 * e for e in range(12)]
    found = diagnose(record(train=val, accuracy=[0.3] * 12, lr=1e-6, head_lr=1e-5))
    assert kinds(found)[0] == "learning rate too low"
    action = found.findings[0].action
    assert action is not None
    assert action.settings == {"lr": 0.001, "head_lr": 0.01}
    # Left to follow the backbone's, the head's rate needs no saying.
    short = {k: v for k, v in record().header.items() if k != "asked"} | {"asked": {}}
    case = Case((read_facts(replace(record(lr=1e-6), header=short)),), (), None, None)
    assert change_rate(case, lower=False)[0].settings.keys() == {"lr"}


def test_a_loss_that_falls_to_the_end_was_stopped_too_early():
    found = diagnose(record(train=[0.95, 0.7, 0.5], per_epoch=8))
    assert kinds(found)[0] == "stopped too early"
    assert found.findings[0].action is not None
    assert found.findings[0].action.settings == {"epochs": 6}
    assert "more epochs: curves of fewer than five say little" in found.findings[0].missing


def test_what_patience_ended_goes_on_without_it():
    steep = [0.95, 0.8, 0.7, 0.6, 0.5, 0.42]
    found = diagnose(record(train=steep, stopped=True, epochs=30, patience=3))
    assert kinds(found)[0] == "stopped too early"
    assert found.findings[0].action is not None
    assert found.findings[0].action.settings == {"patience": None}


def test_a_run_that_is_not_finished_is_gone_on_with():
    steep = [0.95, 0.8, 0.7, 0.6]
    finding = the(diagnose(record(train=steep, finished=False, epochs=30)), "stopped too early")
    assert finding.action is not None
    assert finding.action.text == "go on with it: the same fit call"
    assert any("not finished: 4 of 30 epochs" in e.says for e in finding.evidence)


def test_epochs_after_the_best_one_are_saved():
    long = [0.6, 0.3, 0.2] + [0.205 + 0.001 * e for e in range(27)]
    found = diagnose(record(train=long))
    assert kinds(found)[0] == "trained longer than needed"
    gain = found.findings[0].gain
    assert gain is not None
    assert gain.accuracy == 0.0
    assert gain.time_share == pytest.approx(1 - 6 / 30)
    assert found.findings[0].action is not None
    assert found.findings[0].action.settings == {"patience": 3}


def test_a_head_that_could_not_move_has_not_converged():
    slow = [1.0 - 0.02 * e for e in range(12)]
    found = diagnose(record(train=slow, head_lr=1e-4, **PROBED))
    assert kinds(found)[0] == "head not converged"
    assert found.findings[0].action is not None
    assert found.findings[0].action.settings.keys() == {"head_lr"}
    assert found.findings[0].action.settings["head_lr"] > 1e-3


# -- what is measured besides ----------------------------------------------------------------------


def test_a_reference_that_trains_more_settles_it_and_is_the_advice():
    run = record(train=UNDERFIT, accuracy=[0.60] * 9, **PROBED)
    better = [record(f"full-{i}", seed=i, accuracy=[0.8 + 0.01 * i] * 9) for i in range(3)]
    found = diagnose(run, reference=better)
    finding = found.findings[0]
    assert finding.kind == "too much frozen"
    assert finding.strength == "strong"
    assert finding.evidence[0].source == "reference"
    assert finding.evidence[0].values["gain"] == pytest.approx(0.21)
    assert finding.action is not None
    assert finding.action.settings == {"policy": "full"}
    assert finding.gain is not None
    assert finding.gain.accuracy == pytest.approx(0.21)
    assert finding.gain.basis == "what 3 runs with it brought"
    # One that brings nothing speaks against, however the curves look.
    same = [record(f"full-{i}", seed=i, accuracy=[0.6] * 9) for i in range(3)]
    assert the(diagnose(run, reference=same), "too much frozen").weight < finding.weight - 2


@pytest.mark.parametrize("shorter", [True, False])
def test_a_short_reference_counts_where_it_is_better_and_half_where_it_is_worse(shorter: bool):
    length = 6 if shorter else 9
    run = record(train=UNDERFIT, accuracy=[0.60] * 9, **PROBED)
    good = record("full", train=[0.5] * length, accuracy=[0.8] * length)
    bad = record("full", train=[0.9] * length, accuracy=[0.5] * length)
    weights = [
        next(
            e.weight
            for e in the(diagnose(run, reference=r), "too much frozen").evidence
            if e.source == "reference"
        )
        for r in (good, bad)
    ]
    assert weights[0] == pytest.approx(4.0, abs=0.3)
    assert weights[1] == pytest.approx(-1.54 if shorter else -3.08, abs=0.01)


def test_references_that_differ_in_too_much_are_left_aside_with_a_note():
    run = record(train=UNDERFIT, **PROBED)
    others = [
        record("rate", lr=1e-2),  # policy and rate
        record("longer", train=[0.5] * 20),  # policy, and longer
        record("size", train_samples=100, **PROBED),
        record("same", train=UNDERFIT, seed=5, **PROBED),
        run,
    ]
    found = diagnose(run, reference=others)
    assert [note.rpartition("/")[2] for note in found.notes] == ["rate", "longer", "size", "same"]
    assert "more than one respect (lr, policy)" in found.notes[0]
    assert all(e.source != "reference" for f in found.findings for e in f.evidence)


def test_rates_and_lengths_are_judged_by_references_of_their_own():
    run = record(accuracy=[0.6] * 9)
    up = record("up", lr=1e-2, head_lr=1e-1, accuracy=[0.8] * 9)
    down = record("down", lr=1e-3, head_lr=1e-2, accuracy=[0.8] * 9)
    long = record("long", train=[0.4] * 18, accuracy=[0.8] * 18)
    assert kinds(diagnose(run, reference=down))[0] == "learning rate too high"
    by_rate = diagnose(run, reference=up)
    assert the(by_rate, "learning rate too low").evidence[0].weight == 4.0
    assert the(by_rate, "learning rate too low").action.settings == {"head_lr": 0.1, "lr": 0.01}  # pyright: ignore[reportOptionalMemberAccess]
    by_length = the(diagnose(run, reference=long), "stopped too early")
    assert by_length.evidence[0].source == "reference"
    assert by_length.action is not None
    assert by_length.action.settings == {"epochs": 18}


def test_freezing_more_at_no_loss_saves_time():
    run = overfit()
    quick = overfit("probe", **PROBED)
    fast = tuple({**line, "costs": {"training_s": 0.3 * line["epoch"]}} for line in quick.epochs)
    found = diagnose(run, reference=replace(quick, epochs=fast))
    gain = the(found, "too little frozen").gain
    assert gain is not None
    assert gain.accuracy == pytest.approx(0.0)
    assert gain.time_share == pytest.approx(0.7)


class Point:
    """As much of a probe as is read."""

    def __init__(self, group: str, accuracy: float, behind: float, depth: int = 9) -> None:
        self.group, self.depth, self.val_accuracy = group, depth, accuracy
        self.accuracy_interval = (accuracy - 0.05, accuracy + 0.05)
        self.behind = (behind - 0.03, behind + 0.03)


class Probe:
    """A probe curve with these accuracies, from shallow to deep, and what enters the head."""

    def __init__(self, *accuracies: float, head: float, classes: int = 4) -> None:
        best = max(accuracies)
        names = zip(BODY, accuracies, strict=True)
        self.points = [Point(name, a, best - a, i) for i, (name, a) in enumerate(names)]
        self.head_input = Point("", head, best - head)
        self.classes, self.train_samples, self.val_samples = classes, 400, 200
        self.commonest = 0.25

    @property
    def best(self) -> Point:
        return max(self.points, key=lambda p: p.val_accuracy)

    def knee(self) -> Point:
        return next(p for p in self.points if p.behind[0] <= 0)


def probed(*accuracies: float, head: float, **change: Any) -> Any:
    return Probe(*accuracies, head=head, **change)


def test_a_probe_that_peaks_before_the_end_is_a_wrong_depth():
    run = record(train=UNDERFIT, accuracy=[0.6] * 9, **PROBED)
    found = diagnose(run, probe=probed(0.7, 0.9, 0.7, head=0.6))
    assert kinds(found)[0] == "wrong layer depth"
    finding = found.findings[0]
    assert finding.action is not None
    assert finding.action.settings == {"policy": "first:groups=2"}
    assert finding.gain is not None
    assert finding.gain.accuracy == pytest.approx(0.3)
    # Where the groups behind it train already, it is no finding.
    freed = record(train=UNDERFIT, accuracy=[0.6] * 9, policy="first:groups=2", frozen=BODY[:2])
    found = diagnose(freed, probe=probed(0.7, 0.9, 0.7, head=0.6))
    assert finding.kind not in [f.kind for f in (*found.findings, *found.considered)]


def test_a_probe_of_the_head_input_tells_a_lagging_head_from_poor_features():
    run = record(train=UNDERFIT, accuracy=[0.6] * 9, **PROBED)
    lagging = diagnose(run, probe=probed(0.5, 0.7, 0.9, head=0.9))
    assert kinds(lagging)[0] == "head not converged"
    assert lagging.findings[0].gain is not None
    assert lagging.findings[0].gain.accuracy == pytest.approx(0.3)
    poor = diagnose(run, probe=probed(0.5, 0.55, 0.6, head=0.6))
    assert kinds(poor)[0] == "too much frozen"
    assert not the(poor, "head not converged").made


def test_a_probe_at_chance_frees_everything_and_one_that_reads_it_all_freezes_more():
    run = record(train=UNDERFIT, accuracy=[0.3] * 9, **PROBED)
    free = the(diagnose(run, probe=probed(0.26, 0.25, 0.27, head=0.26)), "too much frozen")
    assert free.action is not None
    assert free.action.settings == {"policy": "full"}
    found = diagnose(overfit(samples=400), probe=probed(0.6, 0.9, 0.9, head=0.9))
    over = the(found, "too little frozen")
    assert over.action is not None
    assert over.action.settings == {"policy": "first:groups=2"}
    assert over.gain is not None
    assert over.gain.accuracy == pytest.approx(0.1)


def test_a_probe_of_another_task_is_refused():
    with pytest.raises(UsageError, match="7 classes and a run of 4"):
        diagnose(record(), probe=probed(0.5, 0.5, 0.5, head=0.5, classes=7))


def curve(**scores: list[float]) -> LearningCurve:
    """Learning curves on 100, 200 and 400 samples with two seeds."""
    points = {
        name.replace("_", "-"): tuple(
            _point(n, {0: s, 1: s + 0.004}, level=0.95)
            for n, s in zip((100, 200, 400), of, strict=True)
        )
        for name, of in scores.items()
    }
    return LearningCurve({name: name for name in points}, points, "val", 1000, 0.95)


def test_a_learning_curve_that_rises_asks_for_data():
    run = overfit(samples=400)
    found = the(diagnose(run, curve=curve(full=[0.5, 0.65, 0.8])), "too little data")
    assert found.made
    assert found.gain is not None
    assert found.gain.accuracy == pytest.approx(0.15)
    assert found.action is not None
    assert found.action.text == "label about 400 more samples, twice as many in all"
    flat = the(diagnose(run, curve=curve(full=[0.8, 0.8, 0.8])), "too little data")
    assert not flat.made
    assert not the(diagnose(run), "too little data").made


def test_a_learning_curve_says_which_policy_leads_at_this_size():
    lines = curve(full=[0.5, 0.65, 0.8], linear_probe=[0.7, 0.7, 0.7])
    few = the(diagnose(overfit(samples=100), curve=lines), "too little frozen")
    assert few.action is not None
    assert few.action.settings == {"policy": "linear-probe"}
    assert few.gain is not None
    assert few.gain.accuracy == pytest.approx(0.2)
    run = record(train=UNDERFIT, accuracy=[0.7] * 9, **PROBED)
    many = diagnose(run, curve=lines)
    assert kinds(many)[0] == "too much frozen"
    assert many.findings[0].gain is not None
    assert many.findings[0].gain.accuracy == pytest.approx(0.1)


# -- what holds of every diagnosis -----------------------------------------------------------------

losses = st.lists(st.floats(0.0, 3.0) | st.just(math.nan), min_size=1, max_size=15)


@st.composite
def records(draw: st.DrawFn) -> RunRecord:
    train = draw(losses)
    size = len(train)
    shares = st.floats(0.0, 3.0).map(lambda share: round(share, 4))
    val = draw(st.lists(shares, min_size=size, max_size=size))
    accuracy = draw(st.lists(st.floats(0.0, 1.0), min_size=size, max_size=size))
    count = draw(st.integers(0, 3))
    policy = {0: "full", 3: "linear-probe"}.get(count, f"first:groups={count}")
    return record(
        train=train,
        val=val,
        accuracy=accuracy,
        policy=policy,
        frozen=BODY[:count],
        lr=draw(st.floats(1e-7, 10.0)),
        head_lr=draw(st.floats(1e-7, 10.0)),
        optimizer=draw(st.sampled_from(["adamw", "sgd"])),
        schedule=draw(st.sampled_from(["cosine", "constant"])),
        class_weights=draw(st.sampled_from(["none", "balanced"])),
        patience=draw(st.none() | st.integers(1, 9)),
        samples=draw(st.integers(8, 5000)),
        finished=draw(st.booleans()),
        stopped=draw(st.booleans()),
    )


@given(records())
def test_no_finding_rests_on_one_number_and_every_advice_can_be_followed(run: RunRecord):
    found = diagnose(run)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.findings
    assert list(found.findings) == sorted(found.findings, key=lambda f: -f.weight)
    for finding in (*found.findings, *found.considered):
        assert all(math.isfinite(e.weight) for e in finding.evidence)
        if finding.kind == "nothing wrong":
            assert len(found.findings) == 1
            continue
        assert finding.made == (finding in found.findings)
        speaking = [e for e in finding.evidence if e.weight >= 0.15]
        assert not finding.made or len(speaking) >= 2
        against = sum(min(0.0, e.weight) for e in finding.evidence)
        assert finding.weight == pytest.approx(
            sum(max(0.0, e.weight) for e in finding.evidence) + max(-1.5, against) - 1.5
        )
        assert finding.missing
        assert finding.action is not None
        assert finding.gain is not None
        assert finding.gain.basis
        settings = {**run.header["config"], **finding.action.settings}
        make_policy(load_config(None, settings).policy)
        assert finding.action.text


@given(records(), st.integers(2, 9), st.integers(2, 9))
def test_measures_do_not_depend_on_the_number_of_classes(run: RunRecord, one: int, two: int):
    def scaled(classes: int) -> RunFacts:
        names = [f"class {i}" for i in range(classes)]
        header = {**run.header, "labels": names, "notes": {"classes": dict.fromkeys(names, 10)}}
        factor = math.log(classes) / math.log(4)
        lines = tuple(
            {**line, "metrics": {**line["metrics"],
             **{k: line["metrics"][k] * factor for k in ("train_loss", "val_loss")}}}
            for line in run.epochs
        )  # fmt: skip
        return read_facts(replace(run, header=header, epochs=lines))

    for name, measure in MEASURES.items():
        if name in ("samples_per_class", "head_reach", "stride", "early"):
            continue  # not of the losses
        assert measure.of(scaled(one)) == pytest.approx(measure.of(scaled(two)), abs=1e-9), name


@given(st.permutations(range(3)))
def test_runs_count_alike_in_any_order(order: list[int]):
    runs = [record(f"seed-{i}", seed=i, train=[0.9, 0.5 - 0.1 * i, 0.3, 0.25]) for i in range(3)]
    one, two = diagnose(runs), diagnose([runs[i] for i in order])
    assert {f.kind: f.weight for f in two.considered} == pytest.approx(
        {f.kind: f.weight for f in one.considered}
    )
    assert "runs with other seeds" not in one.findings[0].missing


@given(st.lists(st.floats(0.0, 0.5), min_size=2, max_size=2, unique=True))
def test_the_more_the_loss_rises_the_more_it_speaks_of_overfitting(rises: list[float]):
    low, high = sorted(rises)

    def weight(rise: float) -> float:
        tail = [0.4 + rise * min(1.0, e / 5) for e in range(7)]
        run = record(train=[0.8, 0.5, 0.3, *[0.1] * 7], val=[0.8, 0.5, 0.4, *tail])
        return the(diagnose(run), "too little frozen").weight

    assert weight(low) <= weight(high) + 1e-9


def test_evidence_is_mirrored_by_its_words():
    for weight, words in ((1.3, "strongly for"), (-0.7, "clearly against"), (0.2, "weakly for"),
                          (0.1, "neutral")):  # fmt: skip
        assert Evidence("curves", "", {}, weight).strength == words


def test_runs_of_several_strategies_are_refused():
    with pytest.raises(UsageError, match="lr differ"):
        diagnose([record(), record("other", lr=0.1)])
    with pytest.raises(UsageError, match="another task"):
        diagnose(record(), reference=record("other", classes=5))
    with pytest.raises(UsageError, match="no run"):
        diagnose([])


def test_settings_of_another_version_are_left_aside_or_refused():
    def changed(name: str, **change: Any) -> RunRecord:
        run = record(name)
        return replace(run, header={**run.header, "config": {**run.header["config"], **change}})

    newer = changed("newer", not_here_yet="x")
    assert diagnose(newer).to_json()["findings"] == diagnose(record()).to_json()["findings"]
    found = diagnose(newer, reference=record("other", policy="linear-probe", frozen=BODY))
    assert "more than one respect (not_here_yet, policy)" in found.notes[0]
    with pytest.raises(DataError, match="schedule"):
        diagnose(changed("odd", schedule="sawtooth"))


def test_balanced_weights_make_no_gap():
    facts = read_facts(overfit(class_weights="balanced"))
    assert MEASURES["gap"].of(facts) is None
    assert MEASURES["gap"].of(read_facts(overfit())) is not None


# -- measures --------------------------------------------------------------------------------------


def facts(**change: Any) -> RunFacts:
    return read_facts(record(**change))


def test_settling_is_progress_per_learning_rate():
    even = facts(train=[1.0] * 12)
    ends = np.array(even.travelled)
    middle = (ends - np.diff([0, *ends]) / 2) / ends[-1]
    # The last fifth, two epochs of twelve, is averaged: hence the tolerance.
    assert MEASURES["settling"].of(facts(train=list(1 - 0.5 * middle))) == pytest.approx(
        1, abs=0.06
    )
    flat = [1.0, 0.6, 0.4, *[0.3] * 9]
    assert MEASURES["settling"].of(facts(train=flat)) == pytest.approx(0.0, abs=0.01)
    assert MEASURES["settling"].of(facts(train=[1.0] * 12)) is None  # noise over noise
    assert MEASURES["settling"].of(facts(train=[1.0, 0.5])) is None


def test_factors_are_those_of_the_schedule():
    for settings in ({"warmup": "10%"}, {"schedule": "constant"}, {"warmup": "0st"}):
        run = facts(train=[0.5] * 10, per_epoch=7, **settings)
        assert run.planned_steps == 70
        from frostline.clock import Progress
        from frostline.tasks.setup import learning_rate_factor

        factor = learning_rate_factor(run.config, Progress(total_steps=70))
        means = [np.mean([factor(s) for s in range(7 * e, 7 * e + 7)]) for e in range(10)]
        assert run.factors == pytest.approx(means)
        assert run.travelled[-1] == pytest.approx(sum(factor(s) for s in range(70)))
    assert facts(train=[0.5] * 4, epochs=8, budget="30st", per_epoch=10).planned_steps == 40
    assert facts(train=[0.5] * 3, epochs=8, budget="30st", per_epoch=10).planned_steps == 30


def test_the_gap_is_against_the_losses_before_and_after_an_epoch():
    # A training loss that is a mean over an epoch lies between the two validation losses.
    val = [1.0 - 0.05 * e for e in range(10)]
    train = [v + 0.025 for v in val]
    assert MEASURES["gap"].of(facts(train=train, val=val)) == pytest.approx(0.0, abs=1e-9)


def test_the_trained_share_of_an_unfinished_run_comes_from_its_decisions():
    plans = (Decision(0, FreezePlan(frozen=frozenset(BODY))), Decision(18, FreezePlan()))
    run = replace(record(train=[0.5] * 3, finished=False), decisions=plans)
    assert read_facts(run).share == pytest.approx(0.5)  # 18 of 36 updates
    assert read_facts(record(**PROBED)).share == pytest.approx(0.0)
    assert read_facts(record(policy="first:groups=1", frozen=BODY[:1])).share == pytest.approx(0.8)
    assert read_facts(record(policy="first:groups=1", frozen=BODY[:1])).frozen_prefix == 1


def test_the_error_of_a_difference_holds_the_truth():
    random, runs, held = np.random.default_rng(0), 300, 0
    for _ in range(runs):
        right = random.binomial(200, (0.7, 0.75)) / 200
        one, two = (read_facts(record(train=[0.5], accuracy=[a])) for a in right)
        gain, error = difference([two], [one])
        held += abs(gain - 0.05) < 1.96 * error
    assert held / runs > 0.93


# -- planted faults --------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "model": "planted_task:model", "epochs": 12, "batch_size": 32, "lr": 3e-3, "head_lr": 3e-2,
    "patience": None, "threads": 1, "device": "cpu", "cache": "off", "checkpoint_every": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A folder for data and weights."""
    return tmp_path_factory.mktemp("planted")


def run(place: Path, source: Any, name: str, *, noise: int = 50, samples: int = 240, **settings):
    data = data_folder(place / f"data-{noise}-{samples}", noise=noise, train=samples, val=200)
    with use_disk(QuickDisk()):
        weights = pretrained(source, place)
        output = place / "runs" / name
        return frostline.fit(**BASE | settings, data=data, weights=weights, output=output)


def followed(place: Path, source: Any, name: str, found: Diagnosis, before: Any, **settings):
    """The run that the first finding advises."""
    action = found.findings[0].action
    assert action is not None
    own = {k: v for k, v in settings.items() if k not in action.settings}
    return run(place, source, f"{name}-advised", **own, **action.settings)


def test_linear_probing_on_features_of_another_task_is_too_much_frozen(planted: Path):
    settings: dict[str, Any] = {"policy": "linear-probe", "samples": 160, "epochs": 10}
    before = run(planted, "far", "far", **settings)
    found = diagnose(before)
    assert kinds(found)[0] == "too much frozen"
    after = followed(planted, "far", "far", found, before, **settings)
    assert after.summary["test_accuracy"] > before.summary["test_accuracy"] + 0.1
    sure = diagnose(before.path, reference=after)
    assert sure.findings[0].strength == "strong"
    assert sure.findings[0].gain is not None
    expected = after.summary["val_accuracy"] - before.summary["val_accuracy"]
    assert sure.findings[0].gain.accuracy == pytest.approx(expected)
    assert kinds(diagnose(after))[0] != "too much frozen"
    probe = probe_run(before.path)
    assert [point.group for point in probe.points] == list(read_facts(before.record).backbone)
    assert (probe.train_samples, probe.val_samples) == (160, 200)
    probed = diagnose(before, probe=probe).findings[0]
    assert probed.kind in ("too much frozen", "wrong layer depth")
    assert probed.strength == "strong"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_planted_faults_are_found_and_the_advice_helps(planted: Path, seed: int):
    few: dict[str, Any] = {"noise": 90, "samples": 480, "train_samples": 50, "epochs": 20}
    few |= {"batch_size": 16, "lr": 1e-2}
    cases: list[tuple[str, str, dict[str, Any], float]] = [
        ("too much frozen", "far", {"policy": "linear-probe"}, 0.2),
        ("too little frozen", "near", {"policy": "full"} | few, -0.03),
        ("learning rate too high", "near", {"policy": "full", "lr": 1.0, "head_lr": 10.0}, 0.1),
        ("learning rate too low", "near", {"policy": "full", "lr": 1e-6, "head_lr": 1e-5}, 0.3),
        ("head not converged", "near", {"policy": "linear-probe", "head_lr": 3e-4}, 0.2),
        ("stopped too early", "both, then far", {"policy": "full", "epochs": 3}, 0.1),
    ]
    for kind, source, settings, gain in cases:
        name = f"{kind}-{seed}".replace(" ", "-")
        before = run(planted, source, name, **settings, seed=seed)
        found = diagnose(before)
        assert kinds(found)[0] == kind, found.sentence()
        after = followed(planted, source, name, found, before, **settings, seed=seed)
        assert after.summary["test_accuracy"] >= before.summary["test_accuracy"] + gain, kind
        if kind == "too little frozen":
            assert after.summary["backward_share"] < 0.2
    healthy = run(
        planted, "near", f"healthy-{seed}", policy="first:groups=2", patience=3, seed=seed
    )
    assert kinds(diagnose(healthy)) == ["nothing wrong"]
