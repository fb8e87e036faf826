"""Studies from declaration to verdict: what is run, in which order, and what survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline._io import read_lines
from frostline.errors import ConfigError, DataError, PolicyError, StorageError
from frostline.policies.static import First, Full
from frostline.records import without_costs
from frostline.study.analysis import analyse
from frostline.study.compare import compare, declare
from frostline.study.folder import StudyFolder, TrialKey, run_order
from frostline.study.runner import open_study, run_study, settle
from frostline.study.spec import Arm, StudySpec, arms_of, controls_of
from report_records import rewrite_records

TINY: dict[str, Any] = {
    "model": "tiny_task:tiny_model",
    "data": "tiny_task:tiny_data",
    "epochs": 2,
    "batch_size": 16,
    "lr": 0.01,
    "patience": None,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def tiny(tmp_path: Path, policies: Any = ("full", "linear-probe"), **change: Any):
    """A study on the tiny task, in this process."""
    given = TINY | {"cache_dir": str(tmp_path / "stores"), "seeds": 2, "isolate": False} | change
    given.setdefault("output", tmp_path / "study")
    return compare(given.pop("model"), given.pop("data"), policies, **given)


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every run recorded, without what the clock says."""
    found = {}
    for file in sorted(folder.glob("runs/*/*/record.jsonl")):
        lines = [without_costs(line) for line in read_lines(file).records]
        for line in lines:  # measured costs differ, and with them what they weigh
            line.get("results", {}).pop("backward_share", None)
            line.get("config", {}).pop("cache_dir", None)
        found[str(file.relative_to(folder))] = lines
    return found


# -- declaring -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": []}, "no arms"),
        ({"seeds": 0}, "no seeds"),
        ({"seeds": [1, 1]}, "a seed twice"),
        ({"reference": "none"}, "no arm named 'none'"),
        ({"margin": 1.5}, "margin"),
        ({"level": 0}, "level"),
        ({"controls": ["luck"]}, "no such control"),
        ({"settings": TINY | {"policy": "full"}}, "differs from run to run"),
        ({"settings": TINY | {"epochs": 0}}, "epochs"),
        ({"settings": TINY | {"epoch": 1}}, "epoch"),
        ({"policies": {"A b": "full"}}, "no name for a folder"),
        ({"policies": "full"}, "a single str, no list"),
        ({"policies": Full()}, "a single Full, no list"),
        ({"policies": None}, "a single NoneType, no list"),
        ({"policies": [None]}, "no policy"),
        ({"policies": ["full", 3]}, "but a int"),
        ({"policies": {"a": 3}}, "but a int"),
        ({"policies": ["full", "full"]}, "the same policy twice"),
        ({"policies": ["freeze:select=A*", "freeze:select=a*"]}, "of the same name"),
        ({"policies": {"a": {"lr": 1}}}, "no policy"),
        ({"controls": "time"}, "one text, no list"),
        ({"seeds": True}, "neither a whole number"),
        ({"seeds": "3"}, "neither a whole number"),
        ({"seeds": 2.5}, "neither a whole number"),
        ({"seeds": [0, 1.5]}, "neither a whole number"),
        ({"seeds": [0, -1]}, "a seed out of range"),
        ({"seeds": [2**32]}, "a seed out of range"),
        ({"target": 0}, "a target outside"),
        ({"target": 90}, "a target outside"),
        ({"policies": {"a": {"policy": "full", "seed": 3}}}, "study's own"),
        ({"policies": {"a": {"policy": "full", "lr": -1}}}, "lr"),
    ],
)
def test_a_wrong_declaration_is_refused_before_anything_runs(change, message):
    given = {"settings": TINY, "policies": ["full"]} | change
    with pytest.raises(ConfigError, match=message) as caught:
        declare(given.pop("settings"), given.pop("policies"), **given)
    assert caught.value.fix


def test_policies_may_be_objects_and_long_ones_keep_names_apart():
    assert [arm.policy for arm in arms_of([Full(), First(groups=2)])] == ["full", "first:groups=2"]
    inner = "linear-probe"
    for _ in range(5):
        inner = f"guard:policy=({inner}),patience=2"
    arms = arms_of([f"then:first=({inner}),after={n}ep,second=(full)" for n in (1, 2)])
    names = [arm.name for arm in (*arms, *controls_of(arms, ["time"]))]
    assert len(set(names)) == 4
    assert max(map(len, names)) == 80


def test_an_unknown_policy_is_refused_before_anything_runs(tmp_path: Path):
    with pytest.raises(PolicyError, match="gradul"):
        tiny(tmp_path, ["full", "gradul"])
    assert not (tmp_path / "study").exists()


NAMES = st.lists(
    st.sampled_from(["full", "linear-probe", "gradual", "bitfit", "autofreeze", "first:groups=1"]),
    min_size=1,
    max_size=4,
    unique=True,
)


@given(
    NAMES, st.lists(st.sampled_from(["time", "compute", "placebo"]), unique=True), st.integers(1, 6)
)
def test_every_arm_runs_once_per_seed_in_mirrored_turns(policies, controls, seeds):
    spec = declare(TINY, policies, controls=controls, seeds=seeds)
    order = run_order(spec)
    assert sorted(set(order), key=str) == sorted(order, key=str)
    assert len(order) == len(spec.arms) * seeds
    turns = [[key.arm for key in order if key.seed == seed] for seed in spec.seeds]
    assert all(turn == (turns[0] if i % 2 == 0 else turns[0][::-1]) for i, turn in enumerate(turns))
    for arm in spec.arms:  # in the first turn controls come after what they depend on
        assert not arm.of or turns[0].index(arm.of) < turns[0].index(arm.name)
    assert StudySpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.extended(spec) == spec


def test_only_rules_with_signals_have_a_placebo_and_static_prefixes_are_their_own_compute():
    arms = arms_of(["full", "gradual", "autofreeze", "first:groups=1"])
    names = {arm.name for arm in controls_of(arms, ["time", "compute", "placebo"])}
    assert names == {
        "time@gradual", "time@autofreeze", "time@first-groups=1",
        "compute@gradual", "compute@autofreeze", "placebo@autofreeze",
    }  # fmt: skip


# -- running ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Any:
    """A finished study with every control."""
    with use_disk(QuickDisk()):
        path = tmp_path_factory.mktemp("whole")
        policies = ["full", "gradual:until=50%", "autofreeze:every=25%", "linear-probe"]
        return tiny(path, policies, controls=["time", "compute", "placebo"])


def test_a_study_has_every_run_with_its_seed_and_policy(done):
    spec = StudyFolder(done.path).spec()
    for key in run_order(spec):
        config = frostline.tasks.run.Run(StudyFolder(done.path).run(key)).config
        assert (config.seed, config.policy) == (key.seed, spec[key.arm].policy)
    assert all(arm.settled for arm in spec.arms)
    assert spec["placebo@autofreeze-every=25"].policy == ("placebo:policy=(autofreeze:every=25%)")


def test_a_control_in_time_is_full_and_takes_about_as_long(done):
    found = done.analyse()
    arm = found["time@linear-probe"].arm
    assert arm.policy == "full"
    first = found["linear-probe"].runs[0].training_s
    assert float(arm.settings["budget"].removesuffix("s")) == pytest.approx(first, abs=1e-3)


def test_a_control_in_compute_is_the_prefix_whose_backward_work_is_nearest(done):
    found = done.analyse()
    record = frostline.tasks.run.Run(
        StudyFolder(done.path).run(TrialKey("gradual-until=50", 0))
    ).record
    again = settle(Arm("x", "", {}, "compute", "gradual-until=50"), record)
    assert again.policy == found["compute@gradual-until=50"].arm.policy
    assert again.policy == "full" or again.policy.startswith("first:groups=")


def test_the_same_call_runs_nothing_again(done, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in done.path.rglob("record.jsonl")}
    policies = ["full", "gradual:until=50%", "autofreeze:every=25%", "linear-probe"]
    tiny(done.path.parent, policies, controls=["time", "compute", "placebo"])
    assert {p: p.stat().st_mtime_ns for p in done.path.rglob("record.jsonl")} == before


def test_what_was_declared_cannot_be_changed_by_going_on(done):
    policies = ["full", "gradual:until=50%", "autofreeze:every=25%", "linear-probe"]
    for change, message in (
        ({"margin": 0.05}, "margin"),
        ({"epochs": 3}, "epochs=2"),
        ({"reference": "linear-probe"}, "reference"),
        ({"policies": {"full": "bitfit"}}, "another name"),
    ):
        given = {"policies": policies} | change
        with pytest.raises(ConfigError, match=message):
            tiny(done.path.parent, given.pop("policies"), **given)


def test_a_study_is_extended_by_seeds_and_arms(tmp_path: Path):
    tiny(tmp_path, ["full"], seeds=1)
    before = records(tmp_path / "study")
    more = tiny(tmp_path, ["full", "linear-probe"], seeds=2)
    after = records(tmp_path / "study")
    assert {name: after[name] for name in before} == before
    assert len(after) == 4
    whole = tiny(tmp_path, output=tmp_path / "at once", cache_dir=str(tmp_path / "other stores"))
    assert records(whole.path) == records(more.path)


def test_all_runs_have_the_budget_of_the_study(tmp_path: Path):
    found = tiny(tmp_path, seeds=1, epochs=10, budget="5st").analyse()
    steps = {
        name: frostline.tasks.run.Run(tmp_path / f"study/runs/{name}/seed-0").summary["steps"]
        for name in ("full", "linear-probe")
    }
    assert steps == {"full": 5, "linear-probe": 5}
    assert found.spec.settings["budget"] == "5st"
    flop = tiny(tmp_path, seeds=1, epochs=10, budget="2e7flop", output=tmp_path / "flop")
    ends = {
        name: frostline.tasks.run.Run(flop.path / f"runs/{name}/seed-0").summary
        for name in ("full", "linear-probe")
    }
    assert all(end["budget_spent"] for end in ends.values())
    assert ends["full"]["steps"] < ends["linear-probe"]["steps"]  # whose updates take less


def test_foreign_files_and_a_second_process_are_refused(tmp_path: Path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("")
    with pytest.raises(ConfigError, match=r"dear\.txt"):
        tiny(tmp_path, output=tmp_path / "letters")
    spec = declare(TINY, ["full"])
    with open_study(tmp_path / "study", spec), pytest.raises(StorageError, match="another process"):
        tiny(tmp_path)
    with pytest.raises(DataError, match=r"study\.json"):
        analyse(tmp_path / "letters")


def test_a_run_that_diverges_is_noted_and_the_others_go_on(tmp_path: Path):
    policies = {"full": "full", "wild": {"policy": "full", "lr": 10.0, "optimizer": "sgd",
                "clip_norm": None, "warmup": "0st", "head_lr": 10.0, "epochs": 4}}  # fmt: skip
    study = tiny(
        tmp_path, policies, model="tiny_task:deep_linear_model", seeds=2, cache="off", lr=1e-3
    )
    found = study.analyse()
    assert found["wild"].failures.keys() == {0, 1}
    assert "finite" in found["wild"].failures[0] or "loss" in found["wild"].failures[0]
    assert found["wild"].verdict is None
    assert found.choice == "full"
    assert not found.missing


# -- killed and resumed ----------------------------------------------------------------------------

SCRIPT = """
import sys
from faulty_disk import QuickDisk
from frostline import _io
_io.disk = QuickDisk()
from study.test_compare import tiny
from pathlib import Path
tiny(Path(sys.argv[1]), ["full", "gradual:until=50%"], epochs=3, checkpoint_every="1st")
"""


def start(place: Path) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_study_killed_anywhere_goes_on_with_the_same_records(tmp_path: Path, how: int):
    assert start(tmp_path / "straight").wait() == 0
    expected = records(tmp_path / "straight" / "study")
    assert len(expected) == 4
    for turn in range(20):
        child = start(tmp_path / "cut")
        time.sleep(4 + 0.35 * turn)
        child.send_signal(how)
        if child.wait() == 0:
            break
    assert start(tmp_path / "cut").wait() == 0
    assert records(tmp_path / "cut" / "study") == expected


def test_a_study_interrupted_in_each_run_goes_on_with_the_same_records(tmp_path: Path):
    straight = tiny(tmp_path, output=tmp_path / "straight", checkpoint_every="1st")
    seen: set[tuple[str, int]] = set()

    def interrupt(event: dict[str, Any]) -> None:
        key = (event["arm"], event["seed"])
        if event["kind"] == "step" and event["step"] == 2 + len(seen) and key not in seen:
            seen.add(key)
            raise KeyboardInterrupt

    given = {"cache_dir": str(tmp_path / "stores 2"), "checkpoint_every": "1st"}
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path, **given, on_event=interrupt)
    found = analyse(tmp_path / "study")
    assert found.missing
    assert not found.choice or found.choice in ("full", "linear-probe")
    again = tiny(tmp_path, **given)
    assert records(again.path) == records(straight.path)
    assert not again.analyse().missing


# -- processes -------------------------------------------------------------------------------------


def test_runs_in_processes_of_their_own_record_the_same(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    events: list[dict[str, Any]] = []
    apart = tiny(tmp_path, ["full"], seeds=1, isolate=True, on_event=events.append)
    here = tiny(tmp_path, ["full"], seeds=1, output=tmp_path / "here")
    assert records(apart.path) == records(here.path)
    kinds = [event["kind"] for event in events]
    assert "start" in kinds
    assert kinds[-1] == "end"
    assert events[0]["arm"] == "full"
    assert (events[0]["place"], events[0]["of"]) == (1, 1)


def test_the_error_of_a_process_arrives_as_it_was(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(DataError) as caught:
        tiny(tmp_path, ["full"], data=str(tmp_path / "nothing.csv"), isolate=True)
    assert "nothing.csv" in str(caught.value)
    assert caught.value.fix


# -- what the records say --------------------------------------------------------------------------


def test_the_analysis_rests_on_records_alone(done, tmp_path: Path):
    copy = Path(shutil.copytree(done.path, tmp_path / "copy"))
    for name in ("checkpoints", "best", "model"):
        for folder in copy.glob(f"runs/*/*/{name}"):
            shutil.rmtree(folder)
    found, again = done.analyse(), analyse(copy)
    assert json.dumps(again.to_json(), allow_nan=False) == json.dumps(found.to_json())


def test_figures_are_those_of_the_runs(done):
    found = done.analyse()
    for figures in found.arms:
        for seed, run in figures.runs.items():
            key = TrialKey(figures.arm.name, seed)
            whole = frostline.tasks.run.Run(StudyFolder(done.path).run(key))
            assert run.val_accuracy == max(m["val_accuracy"] for m in whole.metrics)
            assert run.test_accuracy == whole.summary["test_accuracy"]
            assert run.alone_s >= run.training_s
            assert [score for _, score in run.curve] == [m["val_accuracy"] for m in whole.metrics]
    names = [f.arm.name for f in found.arms if f.verdict is not None]
    assert set(names) == {a.name for a in found.spec.arms} - {"full"}
    assert found["linear-probe"].test is not None
    assert any(f.pareto for f in found.arms)
    assert found.spent_s > (found.reference_s or 0)


def test_what_a_run_found_stored_is_charged_to_it(tmp_path: Path):
    study = tiny(tmp_path, {"one": "linear-probe", "two": "linear-probe"}, seeds=1, cache="on")
    found = study.analyse()
    one, two = (found[name].runs[0] for name in ("one", "two"))
    assert one.alone_s == one.training_s
    assert two.alone_s > two.training_s


def test_a_control_in_time_is_given_what_its_arm_found_stored(tmp_path: Path):
    policies = {"one": "linear-probe", "two": "linear-probe"}
    study = tiny(tmp_path, policies, seeds=1, cache="on", controls=["time"])
    found = study.analyse()
    for name in policies:
        budget = float(found[f"time@{name}"].arm.settings["budget"].removesuffix("s"))
        assert budget == pytest.approx(found[name].runs[0].alone_s, abs=1e-3)
    assert found["two"].runs[0].alone_s > found["two"].runs[0].training_s


def planted(folder: Path, scores: dict[str, list[float]], seconds: dict[str, float]) -> None:
    """Records of runs that never were: what the analysis says of them is known."""

    def plant(line: dict[str, Any], arm: str, seed: int) -> None:
        if line["kind"] == "epoch":
            line["metrics"]["val_accuracy"] = scores[arm][seed]
        if line["kind"] == "end":
            line["results"]["val_accuracy"] = scores[arm][seed]
            line["costs"] |= {"training_s": seconds[arm], "cache": None}

    rewrite_records(folder, plant)


@pytest.mark.parametrize(
    ("fast", "choice", "kind"),
    [
        ([0.90, 0.91, 0.92, 0.90], "linear-probe", "not worse"),
        ([0.80, 0.82, 0.81, 0.80], "full", "worse"),
        ([0.95, 0.96, 0.97, 0.95], "linear-probe", "better"),
        ([0.99, 0.80, 0.70, 0.99], "full", "undecided"),
    ],
)
def test_the_choice_follows_what_was_shown(tmp_path: Path, fast, choice, kind):
    study = tiny(tmp_path, seeds=4, epochs=1)
    scores = {"full": [0.901, 0.909, 0.92, 0.901], "linear-probe": fast}
    planted(study.path, scores, {"full": 10.0, "linear-probe": 2.0})
    found = study.analyse()
    verdict = found["linear-probe"].verdict
    assert verdict is not None
    assert (verdict.kind, found.choice) == (kind, choice)
    assert choice in found.because
    time_ratio = found["linear-probe"].time
    assert time_ratio is not None
    assert time_ratio.ratio == pytest.approx(0.2)


def test_run_study_settles_nothing_of_a_parent_that_failed(tmp_path: Path):
    spec = declare(TINY | {"cache": "off"}, ["full", "linear-probe"], controls=["time"], seeds=1)
    with open_study(tmp_path / "study", spec) as (folder, whole):
        failure = folder.failure(TrialKey("linear-probe", 0))
        failure.parent.mkdir(parents=True)
        failure.write_text(json.dumps({"why": "planted"}))
        run_study(folder, whole, isolate=False)
    found = analyse(tmp_path / "study")
    assert "linear-probe" in found["time@linear-probe"].failures[0]
    assert not found.missing
