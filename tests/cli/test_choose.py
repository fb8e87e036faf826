"""`frostline choose` prints a ranking, what is left out and why, and one piece of advice."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from cyclopts import App

from frostline.cli.choose import By, advice
from frostline.cli.choose import choose as command
from frostline.errors import ConfigError, FrostlineError, ModelError, UsageError
from frostline.study.choose import SCORES, Candidate, Choice, Costs, Failure

DATA = "tiny_task:tiny_data"
CONV, COLOUR = "tiny_task:tiny_model", "models_for_tests:with_preprocess"
FAST = ("--no-costs", "--threads", "1")


def call(*arguments: str | Path) -> tuple[str, str]:
    """What the command prints; its errors come through."""
    app = App(name="frostline")
    app.command(command, name="choose")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        app(
            ["choose", *map(str, arguments)],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    return out.getvalue(), err.getvalue()


def row(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if f" {name} " in line)


def test_the_table_ranks_and_the_rest_says_why() -> None:
    out, err = call(DATA, CONV, f"{COLOUR},name=colours", "models_for_tests:raises", *FAST)
    lines = out.splitlines()
    assert lines[0].strip() == (f"{DATA}: 49 of 49 training samples, 3 classes, ranked by probe")
    first, second = row(out, "colours"), row(out, CONV)
    assert first.split()[:3] == ["1", "colours", "100.0"]
    assert second.split()[:2] == ["2", CONV]
    assert lines.index(first) < lines.index(second)
    assert "left out: models_for_tests:raises: ZeroDivisionError: a bug" in lines
    assert any(line.startswith("note: no LEEP and NCE: ") for line in lines)
    assert "LEEP" not in lines[2]  # a column without any figure
    assert "epoch" not in lines[2]
    assert ", colours; a linear probe on its features gets 100.0 % right (92.7 to" in lines[-1]
    assert "scoring 1 of 3, tiny_task:tiny_model: data and model" in err.splitlines()


def test_costs_are_in_the_table_and_in_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def made(data: str, models: Any, **given: Any) -> Choice:
        asked.update(given, data=data, models=models)
        return choice(candidate("a", 0.9, None, 40.0), candidate("b", 0.7, 0.99, None))

    monkeypatch.setattr("frostline.study.choose.choose", made)
    out, _ = call("photos", "timm:a,image_mean=0.5,0.5,0.5", "--batch-size", "16", "-q")
    assert asked == {
        "data": "photos",
        "models": [{"model": "timm:a", "image_mean": ("0.5", "0.5", "0.5")}],
        "by": "probe",
        "limit": 1000,
        "costs": True,
        "progress": None,
        "batch_size": 16,
    }
    titles = next(line for line in out.splitlines() if "LogME" in line)
    for title in ("epoch", "probing", "memory"):
        assert title in titles
    assert row(out, "a").split()[-6:] == ["40.0", "s", "10.0", "s", "1.00", "GiB"]
    assert row(out, "b").split()[-3:] == ["-", "-", "-"]
    assert "An epoch of full fine-tuning takes 40.0 s and 1.00 GiB" in out.splitlines()[-1]


def test_json_holds_everything() -> None:
    out, err = call(DATA, COLOUR, "nonsense", "--limit", "20", "--json", "-q", *FAST)
    told = json.loads(out)
    assert err == ""
    assert told["samples"] == 20
    assert [c["name"] for c in told["candidates"]] == [COLOUR]
    assert set(told["candidates"][0]["scores"]) == set(SCORES)
    assert [f["name"] for f in told["failures"]] == ["nonsense"]
    assert told["advice"].startswith(f"Take {COLOUR}")


def test_the_scores_that_rank_are_those_there_are() -> None:
    assert get_args(By) == tuple(SCORES)
    out, _ = call(DATA, COLOUR, CONV, "--by", "logme", "-q", *FAST)
    assert "ranked by LogME" in out
    assert ": its LogME is " in out.splitlines()[-1]


def test_settings_come_from_a_file_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "seed: 5\nimage_size: 8\nthreads: 1\nmodels:\n"
        f"  - {CONV}\n"
        "  - model: models_for_tests:tiny\n    weights: random\n    image_mean: [0.5, 0.5, 0.5]\n"
    )
    out, _ = call(DATA, f"{COLOUR},name=third", "--settings", file, "--json", "-q", "--no-costs")
    found = {c["name"]: c for c in json.loads(out)["candidates"]}
    second = "models_for_tests:tiny,weights=random,image_mean=0.5,0.5,0.5"
    assert set(found) == {CONV, second, "third"}
    assert found[second]["settings"]["image_mean"] == [0.5, 0.5, 0.5]
    again, _ = call(DATA, "--settings", file, "--seed", "0", "--json", "-q", "--no-costs")
    other = {c["name"]: c for c in json.loads(again)["candidates"]}
    assert other[CONV]["scores"]["probe"] != found[CONV]["scores"]["probe"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: timm:resnet18", "no list of models"),
        ("models: [3]", "no list of models"),
        ("model: timm:resnet18", "not for all models"),
        ("data: photos", "not for all models"),
        ("epoch: 3", "no setting of that name"),
        ("[", "expected"),
    ],
)
def test_a_file_that_cannot_be_read_gets_one_message(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        call(DATA, COLOUR, "--settings", file, *FAST)
    assert words in error.value.found


def test_a_file_that_is_not_there_gets_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        call(DATA, "--settings", tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((DATA,), UsageError, "none"),
        ((DATA, f"{CONV},colour=red"), ConfigError, "all candidates share"),
        ((DATA, f"{CONV},image_size=red"), ConfigError, "integer"),
        ((DATA, "models_for_tests:raises"), ModelError, "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_done_gets_one_message(
    arguments: tuple[str, ...], error: type[FrostlineError], words: str
) -> None:
    with pytest.raises(error) as raised:
        call(*arguments, "-q", *FAST)
    assert words in raised.value.found


def test_foreign_names_are_escaped() -> None:
    out, err = call(DATA, f"{CONV},name=red\x1b[31m\u202e", "no\x1b[2J", *FAST)
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err
    assert r"Take red\x1b[31m\u202e" in out
    assert r"left out: no\x1b[2J" in out


# -- advice -----------------------------------------------------------------------------------


def costs(seconds: float) -> Costs:
    return Costs(32, 0, 0, 1, 1, None, seconds, seconds / 4, None, 2**30, None, 0)


def candidate(name: str, probe: float, ahead: float | None, seconds: float | None) -> Candidate:
    interval = (probe - 0.03, probe + 0.03)
    spent = None if seconds is None else costs(seconds)
    scores = dict.fromkeys(SCORES) | {"probe": probe, "logme": 10 * probe}
    return Candidate(name, name, {}, scores, interval, ahead, 8, int(1e6 * probe), 4, spent)


Make = Callable[..., Choice]


def choice(*candidates: Candidate, by: str = "probe", **more: Any) -> Choice:
    return Choice("d", by, candidates, (), 100, 500, 5, **{"majority_share": 0.2} | more)


def test_a_clear_first_is_advised_with_its_price() -> None:
    found = choice(candidate("a", 0.9, None, 40.0), candidate("b", 0.7, 0.99, 10.0))
    assert advice(found) == (
        "Take a: a linear probe on its features gets 90.0 % right (87.0 to 93.0 %), ahead of b in "
        "99 % of resamples. An epoch of full fine-tuning takes 40.0 s and 1.00 GiB, of linear "
        "probing 10.0 s."
    )


def test_of_those_that_cannot_be_told_apart_the_cheapest_is_advised() -> None:
    three = [candidate("a", 0.9, None, 40.0), candidate("b", 0.89, 0.7, 10.0)]
    text = advice(choice(*three, candidate("c", 0.6, 1.0, 1.0)))
    assert text.startswith(
        "a and b cannot be told apart on these samples (a is ahead of b in 70 % of resamples): "
        "take the cheapest of them, b; a linear probe on its features gets 89.0 % right"
    )
    assert "takes 10.0 s" in text
    # Without all costs the smaller model is the cheaper one.
    text = advice(choice(three[0], candidate("b", 0.91, 0.7, None)))
    assert "take the cheapest of them, a;" in text


def test_features_that_tell_nothing_are_not_advised() -> None:
    text = advice(choice(candidate("a", 0.22, None, 1.0), candidate("b", 0.2, 0.6, 1.0)))
    assert text == (
        "None of these features is shown to tell the classes apart: a gets 22.0 % right, and "
        "always answering the largest class 20.0 %."
    )


def test_another_score_is_named() -> None:
    text = advice(choice(candidate("a", 0.9, None, None), by="logme"))
    assert text == (
        "Take a: its LogME is 9.000, and no other model was scored. It has 900.00 k parameters."
    )


def test_a_second_without_the_score_is_not_compared() -> None:
    second = dataclasses.replace(candidate("b", 0.9, None, None), scores={"leep": None})
    first = dataclasses.replace(candidate("a", 0.9, None, None), scores={"leep": -0.5})
    text = advice(choice(first, second, by="leep"))
    assert text == "Take a: its LEEP is -0.500. It has 900.00 k parameters."


def test_failures_are_told_of_in_json() -> None:
    failure = Failure("x", ModelError("load x", found="nothing", fix="look"))
    assert failure.to_json() == {
        "name": "x", "error": "ModelError", "asked": "load x", "found": "nothing", "fix": "look"
    }  # fmt: skip
