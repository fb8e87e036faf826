"""The numbers and words of a report are those of the records, no better and no surer."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.cli.app import app
from frostline.cli.flags import overrides
from frostline.errors import DamagedFile, DataError
from frostline.policy import Decision
from frostline.report.mistakes import mistakes, with_samples
from frostline.report.numbers import Numbers, numbers_of
from frostline.report.read import read_runs
from frostline.report.repeat import fit_command
from frostline.report.results import curves
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.folder import asked_settings
from report_records import plan, probe, write_run, write_study


def numbers(*paths: Path) -> Numbers:
    return numbers_of(read_runs(paths))


# -- results -------------------------------------------------------------------------------------


def test_curves_span_the_seeds_and_leave_out_what_is_no_number(tmp_path: Path):
    one = write_run(tmp_path / "one", accuracies=(0.5, 0.7, 0.9))
    two = write_run(tmp_path / "two", seed=1, accuracies=(0.3, math.nan))
    points = [p for p in curves(read_runs([one, two]).runs) if p.metric == "val_accuracy"]
    assert [(p.epoch, p.seeds) for p in points] == [(1, 2), (2, 1), (3, 1)]
    assert (points[0].low, points[0].mean, points[0].high) == (0.3, 0.4, 0.5)
    assert points[0].seconds == 1.0


def test_an_unfinished_run_is_shown_as_far_as_it_has_come(tmp_path: Path):
    found = numbers(write_run(tmp_path / "run", accuracies=(0.6, 0.5), finished=False))
    run = found.arms[0].runs[0]
    assert (run.finished, run.val_accuracy, run.test_accuracy, run.steps) == (False, 0.6, None, 20)
    assert "Not finished" in " ".join(found.headline.sentences)
    proof = found.headline.tiles[-1]
    assert (proof.value, proof.tone) == ("not proved", "bad")
    assert found.details[0].time_s is None


def test_runs_with_common_seeds_get_an_interval_but_no_verdict(tmp_path: Path):
    paths = [
        write_run(tmp_path / f"{policy}{seed}", policy=policy, seed=seed, accuracies=(accuracy,))
        for policy, values in {"full": (0.8, 0.82), "bitfit": (0.7, 0.73)}.items()
        for seed, accuracy in enumerate(values)
    ]
    full, bitfit = numbers(*paths).arms
    assert full.reference
    assert bitfit.verdict == ""
    assert bitfit.difference is not None
    mean, low, high = bitfit.difference
    assert mean == pytest.approx(-0.095)
    assert low is not None
    assert low < mean < (high or 0)


def test_one_seed_says_nothing_of_chance(tmp_path: Path):
    found = numbers(write_run(tmp_path / "a"), write_run(tmp_path / "b", policy="bitfit"))
    assert found.arms[1].difference == (0.0, None, None)
    assert "one seed says nothing of chance" in " ".join(found.headline.sentences)


def test_strategies_without_a_common_seed_are_not_compared(tmp_path: Path):
    found = numbers(write_run(tmp_path / "a"), write_run(tmp_path / "b", policy="bitfit", seed=1))
    assert found.arms[1].difference is None
    assert "no finished run with a seed" in found.arms[1].sentence


def test_only_unbeaten_strategies_are_on_the_front(tmp_path: Path):
    for name, accuracy, step_s in (("full", 0.9, 0.3), ("bitfit", 0.8, 0.1), ("first", 0.7, 0.2)):
        write_run(tmp_path / name, policy=name, accuracies=(accuracy,), step_s=step_s)
    found = numbers(tmp_path)
    assert {arm.name: arm.pareto for arm in found.arms} == {
        "full": True, "bitfit": True, "first": False
    }  # fmt: skip


def test_measured_time_is_held_against_full_fine_tuning_seed_by_seed(tmp_path: Path):
    write_run(tmp_path / "full", policy="full", step_s=0.4)
    frozen = [Decision(0, plan("stem", "body"))]
    write_run(tmp_path / "first", policy="first", step_s=0.3, decisions=frozen)
    first = next(arm for arm in numbers(tmp_path).arms if arm.name == "first")
    assert first.measured_share == pytest.approx(0.75)
    assert first.mean("predicted_share") == pytest.approx(0.5)


# -- the headline --------------------------------------------------------------------------------


def test_a_study_opens_with_what_to_take_and_how_sure_that_is(tmp_path: Path):
    scores = {"full": [0.80, 0.81, 0.79], "bitfit": [0.83, 0.841, 0.82], "first": [0.5, 0.52, 0.5]}
    found = numbers(write_study(tmp_path / "study", scores))
    assert found.headline.title == "Take bitfit: better than full, in 50 % of its training time."
    text = " ".join(found.headline.sentences)
    assert "95 % interval" in text
    assert "The study took" in text
    assert [(arm.chosen, arm.verdict) for arm in found.arms] == [
        (False, ""), (True, "better"), (False, "worse")
    ]  # fmt: skip
    assert found.featured == "bitfit, seed 0"


def test_a_study_that_shows_nothing_says_so(tmp_path: Path):
    found = numbers(write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.6, 0.95]}))
    assert found.headline.title == "Stay with full: nothing faster was shown to be as good."


def test_a_study_of_one_seed_shows_no_winner(tmp_path: Path):
    found = numbers(write_study(tmp_path / "study", {"full": [0.8], "bitfit": [0.99]}))
    assert found.headline.title.startswith("One seed shows no winner")


def test_a_missing_run_is_named(tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.8, 0.9]})
    (study / "runs" / "bitfit" / "seed-1" / "summary.json").unlink()
    assert "Not finished: bitfit, seed 1." in numbers(study).headline.sentences


def test_what_makes_runs_unlike_is_told(tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.8, 0.9]})
    _declare(study, added=["bitfit"])
    (note,) = [text for text in numbers(study).headline.sentences if text.startswith("Note: ")]
    assert note.startswith("Note: bitfit joined when others had run")


def _declare(study: Path, **more: object) -> None:
    spec = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps(spec | more))


def test_a_failed_run_is_named_with_its_reason(tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.8, 0.9]})
    (study / "runs" / "bitfit" / "seed-1.failed.json").write_text('{"why": "a loss of nan"}')
    assert "Failed: bitfit, seed 1: a loss of nan" in numbers(study).headline.sentences


def test_a_changed_certificate_is_no_proof(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "certificate.json").write_text("{}")
    tile = numbers(run).headline.tiles[-1]
    assert (tile.value, tile.tone) == ("not proved", "bad")
    assert numbers(write_run(tmp_path / "other")).headline.tiles[-1].value == "bit for bit"


# -- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_counted_by_class_pair_and_seed(tmp_path: Path):
    first = [(0, 0, 0.9), (0, 1, 0.8), (1, 1, 0.7), (1, 0, 0.95), (1, 0, 0.6)]
    second = [(0, 0, 0.9), (0, 0, 0.8), (1, 1, 0.7), (1, 0, 0.5), (1, 1, 0.6)]
    paths = [
        write_run(tmp_path / "a", predictions=first),
        write_run(tmp_path / "b", predictions=second, seed=1),
    ]
    runs = read_runs(paths)
    found = mistakes(runs.runs[0], runs.runs)
    assert found is not None
    assert (found.samples, found.right, found.seeds) == (5, 2, 2)
    assert [(c.label, c.samples, c.right) for c in found.classes] == [("dog", 3, 1), ("cat", 2, 1)]
    assert [(m.index, m.label, m.predicted, m.wrong_in) for m in found.worst] == [
        (3, "dog", "cat", 2), (1, "cat", "dog", 1), (4, "dog", "cat", 1)
    ]  # fmt: skip
    first_pair = found.confusions[0]
    assert (first_pair.label, first_pair.predicted, first_pair.samples) == ("dog", "cat", 2)


def test_a_run_without_predictions_has_no_mistakes(tmp_path: Path):
    assert numbers(write_run(tmp_path / "run", finished=False)).mistakes is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a tiny task, short enough to get something wrong."""
    import frostline

    folder = tmp_path_factory.mktemp("tiny") / "run"
    frostline.fit("tiny_task:tiny_model", "tiny_task:tiny_data", "linear-probe", epochs=1,
                  batch_size=16, threads=1, device="cpu", cache="off", output=folder)  # fmt: skip
    return folder


def test_samples_are_shown_as_small_pictures(tiny: Path):
    runs = read_runs([tiny])
    found = mistakes(runs.runs[0], runs.runs)
    assert found is not None
    assert found.worst
    shown = with_samples(found, runs.runs[0])
    assert all((m.picture or "").startswith("data:image/jpeg;base64,") for m in shown.worst)


def test_samples_of_other_data_are_refused(tiny: Path):
    run = read_runs([tiny]).runs[0]
    found = mistakes(run, [run])
    assert found is not None
    run.record.header["data"]["test"]["content_sha256"] = "00"
    with pytest.raises(DataError, match="other data"):
        with_samples(found, run)


def test_a_real_run_is_read_whole(tiny: Path):
    found = numbers(tiny)
    assert found.details[0].time_s is not None
    assert sum(found.details[0].time_s.values()) == pytest.approx(
        found.arms[0].mean("wall_s"), rel=0.01
    )
    assert found.details[0].timeline.sentence().startswith("4 layer groups over 3 updates")
    assert found.headline.tiles[-1].value == "bit for bit"


# -- what others wrote ---------------------------------------------------------------------------


def test_probes_and_diagnoses_are_taken_over(tmp_path: Path):
    run = write_run(tmp_path / "run")
    points = {"points": [probe("stem", 0)], "head_input": probe("", 3), "commonest": 0.2}
    (run / "probes.json").write_text(json.dumps(points))
    finding = {"kind": "too_deep", "strength": "likely", "evidence": [{"says": "x"}],
               "action": None, "gain": 0.25}  # fmt: skip
    (run / "diagnosis.json").write_text(json.dumps({"sentence": "s", "findings": [finding]}))
    found = numbers(run)
    assert [(p.group, p.depth) for p in found.probes] == [("stem", 0), ("what enters the head", 3)]
    assert found.diagnoses[0].findings[0].kind == "too deep"
    assert found.diagnoses[0].findings[0].gain == "0.25"


@pytest.mark.parametrize("name", ["probes.json", "diagnosis.json"])
@pytest.mark.parametrize(
    "text", ["{}", '{"points": 3, "commonest": 1}', '{"sentence": "s", "findings": [1]}']
)
def test_what_others_wrote_badly_is_named(tmp_path: Path, name, text):
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(DamagedFile, match=name):
        numbers(run)


# -- doing it again ------------------------------------------------------------------------------

SETTINGS = st.fixed_dictionaries(
    {"model": st.sampled_from(["timm:resnet18", "hf:./a model"]),
     "data": st.sampled_from(["photos", "it's; rm -rf $HOME", "reviews.csv"]),
     "policy": st.sampled_from(["full", "gradual:until=50%", "placebo:policy=(autofreeze)"])},
    optional={
        "epochs": st.integers(1, 50), "lr": st.sampled_from([1e-4, 0.1]), "seed": st.integers(0, 9),
        "patience": st.sampled_from([None, 1, 3]), "live_norm": st.booleans(),
        "image_mean": st.just((0.5, 0.4, 0.3)), "budget": st.sampled_from([None, "500st"]),
        "warmup": st.sampled_from(["10%", "3st"]),
        "class_weights": st.sampled_from(["none", "balanced"]),
    },
)  # fmt: skip


@given(SETTINGS)
def test_the_command_gives_the_same_settings_again(settings):
    config = RunConfig(**settings)
    asked = asked_settings(config)
    tokens = shlex.split(fit_command(json.loads(json.dumps(asked))))[1:]
    _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    given = {k: v for k, v in bound.arguments.items() if k in RunConfig.model_fields}
    assert asked_settings(load_config(None, overrides(given))) == asked


def test_the_command_of_a_study_parses_and_names_what_it_cannot_give(tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.8, 0.9]})
    spec = json.loads((study / "study.json").read_text())
    spec["arms"][1]["settings"] = {"lr": 0.1}
    (study / "study.json").write_text(json.dumps(spec))
    found = numbers(study).repeat
    (line,) = found.commands
    assert line.startswith("frostline compare timm:net photos --policies full bitfit --seeds 2")
    app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)
    assert "bitfit" in found.notes[0]
    assert not {"--level", "--target"} & set(shlex.split(line))
    _declare(study, level=0.9, target=0.7)
    (line,) = numbers(study).repeat.commands
    _, bound, _ = app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)
    assert (bound.arguments["level"], bound.arguments["target"]) == (0.9, 0.7)


def test_folders_of_the_machine_are_not_repeated(tmp_path: Path):
    run = write_run(tmp_path / "run", settings={"cache_dir": tmp_path / "secret"})
    assert "secret" not in json.dumps(numbers(run).to_json())


def test_the_numbers_are_plain_json(tmp_path: Path):
    study = write_study(tmp_path / "study", {"full": [0.8, 0.9], "bitfit": [0.8, 0.9]})
    found = numbers(study).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert found["details"][0]["timeline"]["groups"] == ["stem", "body", "head"]
