"""Text classifiers from presets of KerasHub: built, trained, saved and loaded; none runs code."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import torch

import frostline
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.cli.app import run as command
from frostline.errors import MissingExtra, ModelError
from frostline.tasks.config import RunConfig
from frostline.tasks.keras_export import export_keras
from frostline.tasks.models import build_model

if importlib.util.find_spec("keras_hub") is None:
    pytest.skip("needs KerasHub: pip install --no-deps keras-hub", allow_module_level=True)

from hub_cases import LENGTH, WORDS, classifier, preset

LABELS = ("down", "up")
QUICK: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "lr": 0.01, "patience": None, "threads": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preset(tmp_path_factory.mktemp("presets") / "bert")


def build(folder: Path, *, labels: tuple[str, ...] = LABELS, **settings: Any) -> Any:
    config = RunConfig(model=f"keras:{folder}", data="d", **settings)
    return build_model(config, kind="text", labels=labels)


def inputs(built: Any, *texts: str) -> dict[str, torch.Tensor]:
    return built.preparation.collate([built.preparation(text) for text in texts])


# -- what is built -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_scores_are_those_of_the_preset_itself(kind: str, tmp_path: Path) -> None:
    built = build(preset(tmp_path / "p", kind))
    assert built.fresh == ()
    assert not built.model.training
    texts = ["Good things", "a bad, POOR thing"]
    whole = classifier(kind)
    wanted = whole(whole.preprocessor(texts), training=False).detach()
    found = built.model(**inputs(built, *texts)).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_texts_are_tokenized_by_the_preset_and_padded_to_its_length(bert: Path) -> None:
    built = build(bert)
    found = inputs(built, "good things unheard")
    ids = [WORDS.index(w) for w in ("[CLS]", "good", "thing", "##s", "[UNK]", "[SEP]")]
    assert found["token_ids"].tolist() == [ids + [0] * (LENGTH - len(ids))]
    assert found["padding_mask"].sum() == len(ids)
    assert {t.dtype for t in found.values()} == {torch.int32}
    short = build(bert, max_length=5)
    assert inputs(short, "good things unheard")["token_ids"].shape == (1, 5)
    with pytest.raises(ModelError, match=f"made for {LENGTH}"):
        build(bert, max_length=LENGTH + 1)


def test_a_head_of_other_classes_is_replaced_and_a_backbone_alone_gets_one(
    bert: Path, tmp_path: Path
) -> None:
    three = build(bert, labels=("a", "b", "c"))
    assert set(three.fresh) == {"logits.weight", "logits.bias"}
    assert three.model(**inputs(three, "good")).shape == (1, 3)
    alone = shutil.copytree(bert, tmp_path / "alone")
    for name in ("task.json", "task.weights.h5"):
        (alone / name).unlink()
    fresh = build(alone)
    assert set(fresh.fresh) == {"logits.weight", "logits.bias"}
    own = dict(build(bert).model.named_parameters())
    for name, value in fresh.model.named_parameters():
        if name not in fresh.fresh:
            assert torch.equal(value, own[name])


def test_random_weights_and_a_file_of_weights(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    random = build(bert, weights="random")
    assert len(random.fresh) == len(list(random.model.parameters()))
    file = tmp_path / "w.safetensors"
    save_file({n: t.contiguous() for n, t in random.model.state_dict().items()}, str(file))
    again = build(bert, weights=file)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, random.model.state_dict()[name])


def test_layer_groups_are_embeddings_blocks_and_head(bert: Path) -> None:
    built = build(bert)
    batch = Example(kwargs=inputs(built, "good thing", "bad stuff"))
    groups = layer_groups(built.model, batch, head=built.head)
    names = [g.name for g in groups]
    assert names[-1] == "logits"
    assert groups.head == {"logits"}
    blocks = [n for n in names if "transformer_layer" in n]
    assert blocks == [f"bert_backbone.transformer_layer_{i}" for i in range(2)]
    assert sum(g.parameter_count for g in groups) == sum(
        p.numel() for p in built.model.parameters()
    )


# -- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["gradual:every=1ep", "linear-probe"])
def test_fit_trains_saves_and_predicts(
    policy: str, bert: Path, table: Path, tmp_path: Path
) -> None:
    run = frostline.fit(f"keras:{bert}", table, policy, output=tmp_path / "run", **QUICK)
    assert run.summary["certificate_ok"]
    assert run.summary["val_accuracy"] >= 0.5
    loaded = frostline.load(run)
    found = loaded.predict(["good fine thing", "bad poor stuff"])
    assert {p.label for p in found} <= {"down", "up"}
    assert frostline.load(run).predict(["good fine thing"])[0] == found[0]
    with pytest.raises(ModelError, match="its tokenizer, too"):
        export_keras(loaded.model, tmp_path / "x.keras")


def test_cached_training_is_uncached_training(bert: Path, table: Path, tmp_path: Path) -> None:
    import safetensors.torch

    ends = []
    for cache in ("on", "off"):
        out = tmp_path / cache
        run = frostline.fit(
            f"keras:{bert}", table, "linear-probe", output=out, cache=cache,
            cache_dir=tmp_path / "store", **QUICK,
        )  # fmt: skip
        ends.append(safetensors.torch.load_file(run.path / "model" / "model.safetensors"))
        if cache == "on":
            assert run.summary["cache"]["replayed"] > 0
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


def test_a_saved_model_needs_its_own_folder_only(bert: Path, table: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(bert, tmp_path / "gone")
    run = frostline.fit(f"keras:{moved}", table, "linear-probe", output=tmp_path / "run", **QUICK)
    before = frostline.load(run).predict(["good fine thing"])
    shutil.rmtree(moved)
    shutil.copytree(run.path / "model", tmp_path / "model")
    assert frostline.load(tmp_path / "model").predict(["good fine thing"]) == before


def test_inspect_shows_its_layer_groups(bert: Path, table: Path, capsys: Any) -> None:
    assert command(["inspect", f"keras:{bert}", "--data", str(table)]) == 0
    assert "transformer_layer_1" in capsys.readouterr().out


@pytest.mark.slow
def test_auto_probes_it(bert: Path, table: Path, tmp_path: Path) -> None:
    run = frostline.fit(f"keras:{bert}", table, "auto", output=tmp_path / "run", **QUICK)
    assert (run.path / "probes.json").is_file()


# -- what is refused -----------------------------------------------------------------------------


def edited(name: str, edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        edit(told)
        (folder / name).write_text(json.dumps(told))

    return change


def weights(write: Callable[[Any], None], name: str = "model.weights.h5") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with h5py.File(folder / name, "a") as file:
            write(file)

    return change


def into(module: str, name: str, registered: str) -> Callable[[dict[str, Any]], None]:
    return lambda told: told.update(
        {"module": module, "class_name": name, "registered_name": registered}
    )


def tokenizer_file(told: dict[str, Any]) -> None:
    told["config"]["vocabulary"] = "/etc/passwd"


def elsewhere(told: dict[str, Any]) -> None:
    told["config"]["config_file"] = "/etc/tokenizer.json"


def function(told: dict[str, Any]) -> None:
    told["config"]["activation"] = {
        "module": "builtins", "class_name": "function", "config": "exec",
    }  # fmt: skip


def large(file: Any) -> None:
    file.create_dataset("large", shape=(1 << 40,), dtype="f4")


def outside(file: Any) -> None:
    file["elsewhere"] = h5py.ExternalLink("/etc/hostname", "/")


def no_list(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "foreign class": (edited("config.json", into("os", "system", "system")), "no part of Keras"),
    "own class": (
        edited("config.json", into("mine", "BertBackbone", "keras_hub>BertBackbone")),
        "no part of Keras",
    ),
    "other of the hub": (
        edited("task.json", into("keras_hub.src.utils", "Preset", "keras_hub>Preset")),
        "no part of Keras",
    ),
    "package": (
        edited("task.json", into("keras_hub.src.models.x", "ATextClassifier", "x>ATextClassifier")),
        "no part of Keras",
    ),
    "lambda": (edited("task.json", into("keras.layers", "Lambda", "Lambda")), "can run code"),
    "function": (edited("task.json", function), "can run code"),
    "vocabulary": (edited("tokenizer.json", tokenizer_file), "reads another file"),
    "place": (edited("tokenizer.json", elsewhere), "files in '/etc"),
    "no json": (lambda f: (f / "task.json").write_text("{") and None, "task.json"),
    "transformers": (no_list, "which Keras did not write"),
    "link": (weights(outside), "a link or a type"),
    "vast": (weights(large, "task.weights.h5"), "larger than the file"),
    "no weights": (lambda f: (f / "model.weights.h5").unlink(), "no model.weights.h5"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_preset_that_wants_more_is_refused_before_kerashub_sees_it(
    name: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras_hub

    change, found = HOSTILE[name]
    folder = shutil.copytree(bert, tmp_path / "bad")
    change(folder)
    monkeypatch.setattr(
        keras_hub.models.TextClassifier, "from_preset", lambda *_, **__: pytest.fail("was loaded")
    )
    with pytest.raises(ModelError, match=found):
        build(folder)


def test_names_of_presets_on_the_hub_and_pictures_are_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bert_tiny_en_uncased", "kaggle://keras/bert/keras/bert_tiny_en_uncased"):
        with pytest.raises(ModelError, match="no folder of a preset"):
            build(Path(name))
    with pytest.raises(ModelError, match="supported for texts"):
        build_model(RunConfig(model=f"keras:{bert}", data="d"), kind="image", labels=LABELS)
    # A folder that is called like a preset to be downloaded is read as what it is.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bert, "bert_tiny_en_uncased")
    assert build(Path("bert_tiny_en_uncased")).fresh == ()


def test_a_damaged_saved_model_says_so(bert: Path, table: Path, tmp_path: Path) -> None:
    run = frostline.fit(f"keras:{bert}", table, "linear-probe", output=tmp_path / "run", **QUICK)
    place = shutil.copytree(run.path / "model", tmp_path / "model")
    (place / "manifest.json").unlink()
    from frostline.tasks.saved import load_saved

    file = place / "preset" / "assets" / "tokenizer" / "vocabulary.txt"
    file.write_text(file.read_text().replace("good", "evil"))
    with pytest.raises(ModelError, match="another preset beside it"):
        load_saved(place)


def test_without_kerashub_the_line_that_installs_it_is_given(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(MissingExtra, match=r"pip install 'frostline\[keras-hub\]'"):
        build(bert)


def test_the_tokenizer_needs_no_tensorflow_text() -> None:
    assert "tensorflow_text" not in sys.modules
    assert np.asarray(classifier().preprocessor("good")["token_ids"]).shape == (LENGTH,)
    assert keras.config.backend() == "torch"
