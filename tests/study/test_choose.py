"""Candidates are ranked on training samples alone, and one that fails stops no other."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frostline.backends.torch.grouping import layer_groups
from frostline.errors import (
    ConfigError,
    DataError,
    FrontierError,
    FrostlineError,
    ModelError,
    UsageError,
)
from frostline.study import choose as choosing
from frostline.study.choose import SCORES, Choice, choose, source_probabilities
from frostline.study.transferability import leep, linear_probe, logme, nce
from frostline.tasks.config import load_config
from frostline.tasks.features import collect_features
from frostline.tasks.task import Split, Task, load_task
from models_for_tests import TinyNet
from shared import shared

DATA = "tiny_task:tiny_data"
CONV, COLOUR = "tiny_task:tiny_model", "models_for_tests:with_preprocess"
MODULE = '''
import itertools
import torch
from torch import nn
from tiny_task import SIDE, preprocess, tiny_data

calls = itertools.count()

class Blind(nn.Module):
    """Features that are the same for every picture but for a little noise that says nothing."""
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Linear(1, 4)
        self.fc = nn.Linear(4, num_classes)
    def forward(self, x):
        return self.fc(torch.tanh(self.body(x[:, 0, 0, :1])))

class Scaled(nn.Module):
    """A head that is more than one linear layer."""
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, num_classes)
    def forward(self, x):
        return torch.tanh(self.fc(self.conv(x).mean(dim=(2, 3)).relu()))

class Breaks(Blind):
    """Runs on the two samples of a trial, and on no larger batch."""
    def forward(self, x):
        if len(x) > 4:
            raise ArithmeticError("too many\\nsamples")
        return super().forward(x)

threads = set()

def blind(num_classes):
    threads.add(torch.get_num_threads())
    return Blind(num_classes), preprocess

def scaled(num_classes):
    return Scaled(num_classes), preprocess

def breaks(num_classes):
    return Breaks(num_classes), preprocess

def moving_data():
    parts = tiny_data()
    return {**parts, "train": parts["train"][next(calls):]}
'''


@pytest.fixture(autouse=True)
def candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of models that fail in various ways."""
    (tmp_path / "odd_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_models", raising=False)


def chosen(*models: Any, **given: Any) -> Choice:
    settings: dict[str, Any] = {"costs": False, "threads": 1}
    return choose(DATA, list(models), **settings | given)


def names(choice: Choice) -> list[str]:
    return [c.name for c in choice.candidates]


# -- ranking ----------------------------------------------------------------------------------


def test_the_features_that_tell_classes_apart_come_first() -> None:
    choice = chosen("odd_models:blind", COLOUR)
    assert names(choice) == [COLOUR, "odd_models:blind"]
    assert choice.best.scores["probe"] == 1.0
    assert choice.best.ahead is None
    assert choice.sure == choice.candidates[1].ahead == 1.0
    assert choice.near == ()
    assert choice.failures == ()
    assert (choice.samples, choice.train_samples, choice.classes) == (49, 49, 3)
    assert choice.majority_share == pytest.approx(17 / 49)
    for candidate in choice.candidates:
        low, high = candidate.interval
        assert low < (candidate.scores["probe"] or 0.0) <= high


def test_candidates_that_differ_by_nothing_are_told_apart_by_chance() -> None:
    choice = chosen({"model": COLOUR, "name": "a"}, {"model": COLOUR, "name": "b"})
    assert choice.sure == 0.5
    assert [c.name for c in choice.near] == ["b"]


def test_the_scores_are_those_of_the_features() -> None:
    choice = chosen(CONV)
    task = load_task(load_config(None, {"model": CONV, "data": DATA}))
    x = torch.stack([task.train[i, None].inputs for i in range(len(task.train))])
    model: Any = task.model
    with torch.no_grad():  # all of the model but its last layer
        features = model[3][:-1](model[:3](x)).numpy()
    labels = np.array(task.train.labels)
    probe = linear_probe(features, labels)
    assert choice.best.scores["probe"] == pytest.approx(probe.accuracy)
    assert choice.best.interval == pytest.approx(probe.interval())
    assert choice.best.scores["logme"] == pytest.approx(logme(features, labels), abs=1e-4)
    assert choice.best.width == 6


@pytest.mark.parametrize("by", [name for name in SCORES if name not in ("leep", "nce")])
def test_any_score_can_rank(by: str) -> None:
    choice = chosen("odd_models:blind", COLOUR, by=by, limit=30)
    values = [c.scores[by] or 0.0 for c in choice.candidates]
    assert values == sorted(values, reverse=True)
    assert choice.by == by
    assert choice.sure is not None
    assert 0.5 <= choice.sure <= 1


def test_the_same_call_gives_the_same_ranking_and_moves_no_random_stream() -> None:
    before = torch.get_rng_state()
    one, other = (chosen(CONV, "odd_models:blind", limit=30) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.samples == 30
    for a, b in zip(one.candidates, other.candidates, strict=True):
        assert dataclasses.replace(a, spent_s=0.0) == dataclasses.replace(b, spent_s=0.0)


def test_threads_are_as_asked_and_afterwards_as_before() -> None:
    before = torch.get_num_threads()
    chosen("odd_models:blind", threads=before + 1)
    assert torch.get_num_threads() == before
    assert sys.modules["odd_models"].threads == {before + 1}


def test_another_seed_looks_at_other_samples() -> None:
    one, other = (chosen(COLOUR, limit=20, seed=seed) for seed in (0, 1))
    assert one.best.scores["logme"] != other.best.scores["logme"]


class Forbidden(Split):
    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        raise AssertionError("a sample that is none of ours")


def test_training_samples_are_seen_as_they_are(monkeypatch: Any) -> None:
    seen: list[int | None] = []

    def watched(config: Any) -> Task:
        task = load_task(config)
        prepare = task.train.prepare

        def note(raw: Any, index: int, view: int | None) -> Any:
            seen.append(view)
            return prepare(raw, index, view)

        return dataclasses.replace(task, train=Split(task.train.inputs, task.train.labels, note))

    monkeypatch.setattr(choosing, "load_task", watched)
    chosen(CONV, augment="flip")
    assert seen
    assert set(seen) == {None}


# -- what fails -------------------------------------------------------------------------------


def test_a_candidate_that_fails_is_reported_and_stops_no_other() -> None:
    bad = ("models_for_tests:raises", "models_for_tests:no_model", "odd_models:breaks", "nonsense")
    choice = chosen(*bad[:2], COLOUR, *bad[2:])
    assert names(choice) == [COLOUR]
    assert choice.sure is None
    assert tuple(f.name for f in choice.failures) == bad
    assert all(isinstance(f.error, FrostlineError) for f in choice.failures)
    assert "ZeroDivisionError: a bug" in choice.failures[0].error.found
    assert "too many" in choice.failures[2].error.found
    assert "\n" not in choice.failures[2].error.found
    told = json.loads(json.dumps(choice.to_json()))
    assert [f["error"] for f in told["failures"]] == ["ModelError"] * 4


def test_an_error_of_another_library_becomes_one_of_ours(monkeypatch: Any) -> None:
    def fails(*given: Any, **more: Any) -> Any:
        raise ArithmeticError("no\nmore")

    monkeypatch.setattr(choosing, "linear_probe", fails)
    with pytest.raises(ModelError) as error:
        chosen(COLOUR)
    assert error.value.found == "ArithmeticError: no"


def test_where_none_works_all_reasons_are_told() -> None:
    with pytest.raises(ModelError) as error:
        chosen("models_for_tests:raises", "models_for_tests:no_model")
    assert "models_for_tests:raises: ZeroDivisionError" in error.value.found
    assert "models_for_tests:no_model: a str" in error.value.found
    assert error.value.fix


def test_data_that_cannot_be_read_is_one_error() -> None:
    with pytest.raises(DataError, match="nowhere"):
        choose("nowhere", [COLOUR, CONV], costs=False)


def test_data_that_moves_cannot_be_compared() -> None:
    choice = choose("odd_models:moving_data", [COLOUR, CONV], costs=False)
    assert names(choice) == [COLOUR]
    assert choice.failures[0].error.found == "other training samples"


@pytest.mark.parametrize(
    ("models", "given", "error", "words"),
    [
        ([], {}, UsageError, "none"),
        (COLOUR, {}, UsageError, "one text"),
        ([COLOUR, COLOUR], {}, UsageError, "more than once"),
        ([COLOUR, 3], {}, UsageError, "type int"),
        ([COLOUR], {"by": "luck"}, UsageError, "no score of that name"),
        ([COLOUR], {"by": "leep"}, UsageError, "no candidate with source classes"),
        ([COLOUR], {"limit": 1}, UsageError, "too few"),
        ([{"model": COLOUR, "seed": 1}], {}, ConfigError, "all candidates share"),
        ([{"model": COLOUR, "wieghts": "random"}], {}, ConfigError, "all candidates share"),
        ([{"name": "a"}], {}, ConfigError, "no 'model'"),
        ([COLOUR], {"epochs": 0}, ConfigError, "greater than or equal to 1"),
        ([COLOUR], {"epoch": 1}, ConfigError, "did you mean 'epochs'"),
    ],
)
def test_what_cannot_be_asked_gets_one_message(
    models: Any, given: dict[str, Any], error: type[FrostlineError], words: str
) -> None:
    with pytest.raises(error) as raised:
        choose(DATA, models, costs=False, **given)
    assert words in raised.value.found
    assert raised.value.fix


# -- source classes ---------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> tuple[TinyNet, Path]:
    """A network of seven classes with its weights on disk."""
    torch.manual_seed(3)
    model = TinyNet(7).eval()
    torch.nn.init.normal_(model.fc.weight)
    model.bn.running_mean.uniform_(-1, 1)  # pyright: ignore[reportOptionalMemberAccess]
    file = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), file)
    return model, file


TINY = "models_for_tests:tiny"
SMALL: dict[str, Any] = {"image_size": 8}


def test_source_classes_are_what_the_whole_pretrained_model_says(
    source: tuple[TinyNet, Path],
) -> None:
    model, file = source
    choice = chosen({"model": TINY, "weights": str(file)}, **SMALL)
    task = load_task(load_config(None, {"model": TINY, "data": DATA, **SMALL}))
    x = torch.stack([task.train[i, None].inputs for i in range(len(task.train))])
    labels = np.array(task.train.labels)
    with torch.no_grad():
        theta = model(x).double().softmax(1).numpy()
    assert choice.best.scores["leep"] == pytest.approx(leep(theta, labels), abs=1e-5)
    assert choice.best.scores["nce"] == pytest.approx(nce(theta.argmax(1), labels))
    assert choice.best.notes == ()


def test_leep_ranks_candidates_without_source_classes_last(source: tuple[TinyNet, Path]) -> None:
    own = {"model": TINY, "weights": str(source[1]), "name": "pretrained"}
    choice = chosen(COLOUR, own, by="leep", **SMALL)
    assert names(choice) == ["pretrained", COLOUR]
    assert choice.candidates[1].ahead is None


def probabilities(model: str, **given: Any) -> tuple[Any, str]:
    task = load_task(load_config(None, {"model": model, "data": DATA, **given}))
    device = torch.device("cpu")
    groups = layer_groups(task.model, task.example(), head=task.head)
    found = collect_features(task, task.model, task.train, groups, device=device, limit=9)
    assert found.head_input is not None
    return source_probabilities(task, found)


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    file = path / f"{len(tensors)}.safetensors"
    save_file(tensors, file)
    return {"weights": file}


def test_without_a_classifier_that_fits_there_are_none(
    source: tuple[TinyNet, Path], tmp_path: Path
) -> None:
    tensors = source[0].state_dict()
    bare = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    wide = bare | {"fc.weight": torch.zeros(7, 9), "fc.bias": torch.zeros(7)}
    for weights, why in (
        ({"weights": "random"}, "random weights"),
        ({}, "weights without a file"),
        (saved(tmp_path, bare), "the weights hold no classifier"),
        (saved(tmp_path, wide), "a classifier of shape (7, 9) for 4 features"),
    ):
        theta, found = probabilities(TINY, **SMALL, **weights)
        assert theta is None
        assert why in found


def test_a_classifier_without_bias_is_read(source: tuple[TinyNet, Path], tmp_path: Path) -> None:
    tensors = {name: v for name, v in source[0].state_dict().items() if name != "fc.bias"}
    theta, _ = probabilities(TINY, **SMALL, **saved(tmp_path, tensors))
    assert theta is not None
    assert theta.shape == (9, 7)
    assert np.allclose(theta.sum(1), 1)


def test_a_head_that_is_more_than_linear_has_none(tmp_path: Path) -> None:
    import odd_models  # pyright: ignore[reportMissingImports]

    given = saved(tmp_path, odd_models.Scaled(7).state_dict())
    theta, why = probabilities("odd_models:scaled", **given)
    assert theta is None
    assert why == "the head is not one linear layer"


# -- costs ------------------------------------------------------------------------------------


def test_costs_are_found_without_a_look_at_validation_and_test(monkeypatch: Any) -> None:
    def guarded(config: Any) -> Task:
        task = load_task(config)
        splits = {
            name: Forbidden(split.inputs, split.labels, split.prepare)
            for name, split in (("val", task.val), ("test", task.test))
        }
        return dataclasses.replace(task, **splits)

    monkeypatch.setattr(choosing, "load_task", guarded)
    choice = chosen(CONV, costs=True, batch_size=16)
    assert choice.failures == ()
    costs = choice.best.costs
    assert costs is not None
    assert costs.batch_size == 16
    for name, value in dataclasses.asdict(costs).items():
        if value is not None and name != "disturbed":
            assert value > 0, name
    steps, validations = 49 / 16, 12 / 16
    prepared = (49 + 12) * costs.load_s
    evaluated = validations * 16 * costs.forward_s
    assert costs.full_epoch_s == pytest.approx(prepared + steps * costs.full_step_s + evaluated)
    assert costs.probing_step_s < costs.full_step_s
    model = load_task(load_config(None, {"model": CONV, "data": DATA})).model
    assert choice.best.parameters == sum(p.numel() for p in model.parameters())
    assert choice.best.weights_bytes == sum(
        t.nbytes for t in itertools.chain(model.parameters(), model.buffers())
    )


def test_a_model_that_is_all_head_has_costs_too() -> None:
    costs = chosen(COLOUR, costs=True).best.costs
    assert costs is not None
    assert costs.full_step_s == costs.probing_step_s


def test_costs_that_cannot_be_told_are_a_note(monkeypatch: Any) -> None:
    def refuses(*given: Any, **more: Any) -> Any:
        raise FrontierError("foretell", found="no samples dimension")

    monkeypatch.setattr(choosing, "foretell_steps", refuses)
    best = chosen(CONV, costs=True).best
    assert best.costs is None
    assert "no costs: no samples dimension" in best.notes
    assert best.scores["probe"] is not None


def test_progress_says_which_candidate_and_what() -> None:
    lines: list[str] = []
    chosen(COLOUR, "models_for_tests:raises", progress=lines.append)
    assert lines[0] == f"1 of 2, {COLOUR}: data and model"
    assert lines[-1] == "2 of 2, models_for_tests:raises: data and model"
    assert any("features of 49 training samples" in line for line in lines)


def test_a_limit_keeps_every_class() -> None:
    choice = chosen(COLOUR, limit=7)
    assert (choice.samples, choice.train_samples, choice.classes) == (7, 49, 3)
    assert choice.majority_share == pytest.approx(3 / 7)


def test_names_tell_settings_apart() -> None:
    choice = chosen({"model": CONV, "image_mean": (0.5, 0.5, 0.5)}, {"model": CONV})
    assert set(names(choice)) == {CONV, f"{CONV},image_mean=0.5,0.5,0.5"}
    assert choice.sure == 0.5  # the model brings its own preparation


def test_all_of_it_is_plain_json() -> None:
    choice = chosen(CONV, {"model": COLOUR, "weights": Path("absent.safetensors")}, COLOUR)
    told = json.loads(json.dumps(choice.to_json()))
    assert told["near"] == [c.name for c in choice.near]
    assert told["candidates"][0]["scores"]["leep"] is None
    assert told["failures"][0]["name"] == f"{COLOUR},weights=absent.safetensors"


# -- real data --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_weights_beat_random_ones_on_real_pictures() -> None:
    data = shared("data/caltech20_32")
    weights = shared("models/resnet_cifar10/resnet20.safetensors")
    model = "models_for_tests:resnet20"
    choice = choose(
        data,
        [model, {"model": model, "weights": str(weights), "name": "pretrained"}],
        limit=400,
        image_size=32,
        threads=1,
    )
    assert choice.best.name == "pretrained"
    assert choice.sure == 1.0
    assert choice.best.scores["leep"] is not None
    assert all(c.costs is not None for c in choice.candidates)
