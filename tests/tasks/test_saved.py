from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from frostline.errors import DataError, FrostlineError, ModelError
from frostline.tasks.config import load_config
from frostline.tasks.saved import Loaded, describe, load_saved
from frostline.tasks.task import Task, load_task

IMAGE_MODELS = [
    "timm:test_resnet",
    "torchvision:squeezenet1_0",
    "models_for_tests:tiny",
    "models_for_tests:with_preprocess",
    "hf:{tiny_vit}",
]
TEXT_MODELS = [
    ("hf:{tiny_bert}", "model"),
    ("hf:{tiny_bert}", "mean"),
    ("models_for_tests:letters", None),
]


def load(model: str, data: Path, **given: Any) -> Task:
    given = {"weights": "random"} | {k: v for k, v in given.items() if v is not None}
    return load_task(load_config(None, {"model": model, "data": str(data), **given}))


def trained(task: Task) -> Task:
    """The task with every weight and statistic moved, so that nothing agrees by default."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*task.model.parameters(), *task.model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.01)
    return task


def agrees(task: Task, loaded: Loaded) -> None:
    task.model.eval()
    batch = task.collate([task.test[i, None] for i in range(3)])
    with torch.inference_mode():
        expected = task.logits(task.model, batch).softmax(1)
    found = loaded.predict([task.test.inputs[i] for i in range(3)])
    for row, prediction in zip(expected.tolist(), found, strict=True):
        assert list(prediction.probabilities) == list(task.labels)
        assert list(prediction.probabilities.values()) == pytest.approx(row, abs=1e-6)
        assert prediction.probability == max(prediction.probabilities.values())
        assert prediction.probabilities[prediction.label] == prediction.probability
        assert sum(prediction.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_an_image_model_comes_back_the_same(
    tmp_path: Path, pictures: Path, tiny_vit: Path, model: str
) -> None:
    task = trained(load(model.format(tiny_vit=tiny_vit), pictures, image_mean=(0.4, 0.5, 0.6)))
    task.save_model(tmp_path / "model", task.model, metrics={"val_accuracy": 0.75})
    loaded = load_saved(tmp_path / "model")
    assert (loaded.kind, loaded.labels) == ("image", ("dark", "light"))
    assert not loaded.model.training
    agrees(task, loaded)


@pytest.mark.parametrize(("model", "pooling"), TEXT_MODELS)
def test_a_text_model_comes_back_the_same(
    tmp_path: Path, table: Path, tiny_bert: Path, model: str, pooling: str | None
) -> None:
    task = trained(load(model.format(tiny_bert=tiny_bert), table, pooling=pooling))
    task.save_model(tmp_path, task.model)
    agrees(task, load_saved(tmp_path))


def test_nothing_is_fetched_from_where_the_model_came_from(
    tmp_path: Path, table: Path, tiny_bert: Path
) -> None:
    task = load(f"hf:{tiny_bert}", table)
    task.save_model(tmp_path / "model", task.model)
    about = json.loads((tmp_path / "model" / "frostline.json").read_text())
    about["spec"]["name"] = "/gone"
    (tmp_path / "model" / "frostline.json").write_text(json.dumps(about))
    agrees(task, load_saved(tmp_path / "model"))


def test_hugging_face_loads_what_was_saved(tmp_path: Path, table: Path, tiny_bert: Path) -> None:
    import transformers

    from frostline.tasks.hf_source import quiet

    task = trained(load(f"hf:{tiny_bert}", table, pooling="model"))
    task.save_model(tmp_path, task.model)
    with quiet(transformers):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "down", 1: "up"}
    task.model.eval()
    inputs = tokenizer("good fine day", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, task.model(**inputs).logits)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path, pictures: Path) -> None:
    task = load("models_for_tests:tied", pictures, image_size=16)
    task.save_model(tmp_path, task.model)
    loaded = load_saved(tmp_path)
    agrees(task, loaded)
    assert loaded.model.first.weight is loaded.model.second.weight


def test_single_predictions_equal_batched_ones(tmp_path: Path, pictures: Path) -> None:
    task = trained(load("models_for_tests:tiny", pictures, image_size=16))
    task.save_model(tmp_path, task.model)
    loaded = load_saved(tmp_path)
    paths = [Path(p) for p in task.test.inputs]
    ones = [loaded.predict([p])[0].probability for p in paths]
    assert [p.probability for p in loaded.predict(paths, batch_size=2)] == pytest.approx(ones)
    assert loaded.predict([]) == []


def test_bad_inputs_are_data_errors(
    tmp_path: Path, pictures: Path, table: Path, tiny_bert: Path
) -> None:
    for model, data, bad in (
        ("models_for_tests:tiny", pictures, ["absent.png", 5, b"x"]),
        (f"hf:{tiny_bert}", table, ["", "  ", 5, None]),
    ):
        task = load(model, data)
        folder = tmp_path / task.kind
        task.save_model(folder, task.model)
        loaded = load_saved(folder)
        for raw in bad:
            with pytest.raises(DataError):
                loaded.predict([raw])
        with pytest.raises(DataError, match="where a list belongs"):
            loaded.predict("one.png")


@pytest.fixture
def saved(tmp_path: Path, pictures: Path) -> Path:
    task = load("models_for_tests:tiny", pictures, image_size=16)
    task.save_model(tmp_path / "model", task.model)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "labels": 3, "spec": {}}',
     '{"format": 1, "labels": ["a"], "spec": {"source": "pickle"}}', "[" * 5000,
     '{"format": 1, "format": 1}'],
)  # fmt: skip
def test_a_damaged_description_is_one_error(saved: Path, content: str) -> None:
    (saved / "frostline.json").write_text(content)
    with pytest.raises(FrostlineError):
        load_saved(saved)


def test_damaged_or_foreign_weights_are_one_error(saved: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ModelError):
        load_saved(saved)
    weights.write_bytes(whole.replace(b'"conv.bias"', b'"conv.bits"'))
    with pytest.raises(ModelError, match=r"conv\.bi"):
        load_saved(saved)
    weights.unlink()
    with pytest.raises(ModelError):
        load_saved(saved)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match="finished run"):
            load_saved(folder)


def test_the_card_says_what_matters_and_runs_no_markup(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert "dark" in card
    assert "policy auto" in card
    assert "Nothing was measured" in card
    config = load_config(None, {"model": "m`\n# x", "data": "/private/place/</script>"})
    hostile = describe(config, {"classes": {"[a](b)\x1b": 3}}, {"acc": 0.5})
    assert "\x1b" not in hostile
    assert "/private" not in hostile
    assert "\n# x" not in hostile
    assert r"\[a\](b)?: 3 training" in hostile
    assert "acc: 0.5" in hostile


def test_saving_twice_keeps_the_newer(saved: Path, pictures: Path) -> None:
    task = trained(load("models_for_tests:tiny", pictures, image_size=16))
    task.save_model(saved, task.model)
    agrees(task, load_saved(saved))
