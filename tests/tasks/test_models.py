from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from frostline.backends.torch.random_state import seeded
from frostline.errors import MissingExtra, ModelError
from frostline.tasks import hub, imports
from frostline.tasks.config import RunConfig
from frostline.tasks.models import build_model, rebuild_model
from frostline.tasks.weights import covering_glob, find_head, load_into
from generators import generator_states
from models_for_tests import tiny
from shared import shared

LABELS = ("a", "b", "c")


def build(model: str, *, kind: Any = "image", labels: tuple[str, ...] = LABELS, **settings: Any):
    settings = {"weights": "random"} | settings
    return build_model(RunConfig(model=model, data="d", **settings), kind=kind, labels=labels)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    ("model", "head"),
    [
        ("timm:test_resnet", "fc"),
        ("timm:test_vit", "head"),
        ("torchvision:squeezenet1_0", "classifier.1"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
        ("models_for_tests:tiny", "fc"),
    ],
)
def test_a_model_has_one_output_per_label_and_knows_its_head(model: str, head: str) -> None:
    built = build(model)
    assert built.head == head
    assert not built.model.training
    size = 160 if model == "timm:test_vit" else 224
    assert built.model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert json.loads(json.dumps(built.spec)) == built.spec


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out(name: str) -> None:
    built = build(f"torchvision:{name}")
    assert not [n for n, _ in built.model.named_parameters() if n.lower().startswith("aux")]
    assert built.spec["options"]["transform_input"] is False


def test_distilled_models_have_two_heads_under_one_glob() -> None:
    built = build("timm:deit_tiny_distilled_patch16_224")
    assert built.head == "head*"


def test_the_seed_decides_fresh_weights_and_no_global_generator_moves() -> None:
    states = generator_states()
    first, again, other = (build("timm:test_resnet", seed=s).model for s in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert generator_states() == states


def test_seeded_restores_after_an_error() -> None:
    def fails() -> None:
        with seeded(3):
            torch.rand(3)
            raise ZeroDivisionError

    before = generator_states()
    with pytest.raises(ZeroDivisionError):
        fails()
    assert generator_states() == before


@pytest.mark.parametrize(
    "model", ["timm:test_resnet", "torchvision:squeezenet1_0", "models_for_tests:tiny"]
)
def test_weights_of_other_classes_keep_the_backbone_and_a_fresh_head(
    tmp_path: Path, model: str
) -> None:
    source = build(model, labels=tuple("abcdefg"), seed=5)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_model(source.model, str(path))
    found = build(model, weights=path)
    assert found.fresh == (f"{source.head}.bias", f"{source.head}.weight")
    ours, theirs = found.model.state_dict(), source.model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n not in found.fresh)
    whole = build(model, labels=tuple("abcdefg"), weights=path)
    assert whole.fresh == ()
    assert same(whole.model, source.model)


def test_a_new_timm_head_starts_small(tmp_path: Path) -> None:
    """timm starts EfficientNet heads by the number of classes: 0.26 instead of 0.02 for five."""
    file = tmp_path / "lite0.safetensors"
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    safetensors.torch.save_file(model.state_dict(), file)
    head = build("timm:tf_efficientnet_lite0", weights=file).model.classifier
    assert float(head.weight.detach().std()) < 2 / head.in_features**0.5


def test_half_precision_files_become_single_precision() -> None:
    model = tiny(3)
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tiny(3).state_dict().items()}
    load_into(model, halves, head="fc", source="x")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.conv.weight, halves["conv.weight"].float())


def test_a_backbone_without_any_head_loads() -> None:
    tensors = {n: t for n, t in tiny(3).state_dict().items() if not n.startswith("fc.")}
    assert load_into(tiny(3), tensors, head="fc", source="x") == ("fc.bias", "fc.weight")


def test_pretrained_timm_reads_safetensors_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    source = timm.create_model("test_resnet")
    safetensors.torch.save_model(source, str(path))
    asked = []
    monkeypatch.setattr(hub, "download", lambda *names: asked.append(names) or path)
    built = build("timm:test_resnet", weights="pretrained")
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    assert built.fresh == ("fc.weight", "fc.bias")
    theirs = source.state_dict()
    ours = built.model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n not in built.fresh)
    assert json.loads(json.dumps(built.spec)) == built.spec
    assert built.model.pretrained_cfg["state_dict"] is None


@pytest.mark.parametrize("model", ["timm:test_resnet", "hf:frostline-tests/absent"])
def test_no_connection_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="weights: random") as caught:
        build(model, weights="pretrained")
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_library_names_the_line_that_installs_it() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'frostline\[image\]'"):
        imports.need("no_such_library.inside", extra="image")


def test_an_import_error_inside_a_library_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        imports.need("broken_library", extra="image")


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("weights", ["pretrained", "random", "file"])
def test_a_hugging_face_text_model(tiny_bert: Path, pooling: Any, weights: str) -> None:
    given = tiny_bert / "model.safetensors" if weights == "file" else weights
    built = build(f"hf:{tiny_bert}", kind="text", pooling=pooling, weights=given)
    tensors = safetensors.torch.load_file(tiny_bert / "model.safetensors")
    ours = built.model.state_dict()
    name = "encoder.layer.0.attention.self.query.weight"
    prefix = "backbone" if pooling == "mean" else "bert"
    assert torch.equal(ours[f"{prefix}.{name}"], tensors[name]) == (weights != "random")
    if weights != "random":
        assert built.fresh == ("classifier.bias", "classifier.weight")


def test_a_sentence_encoder_is_pooled_as_it_says(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "encoder")
    assert build(f"hf:{folder}", kind="text").spec["pooling"] == "model"
    (folder / "1_Pooling").mkdir()
    declared = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(declared))
    assert build(f"hf:{folder}", kind="text").spec["pooling"] == "mean"
    assert build(f"hf:{folder}", kind="text", pooling="model").spec["pooling"] == "model"


def test_padding_does_not_change_what_mean_pooling_sees(tiny_bert: Path) -> None:
    built = build(f"hf:{tiny_bert}", kind="text", pooling="mean", weights="pretrained")
    texts = ["good day", "bad poor thing stuff day good fine"]
    encoded = [built.preparation(t) for t in texts]
    with torch.no_grad():
        together = built.model(**built.preparation.collate(encoded))
        alone = built.model(**built.preparation.collate(encoded[:1]))
    assert torch.allclose(together[0], alone[0], atol=1e-6)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused(
    tiny_bert: Path, tmp_path: Path, file: str
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    content = json.loads((folder / file).read_text())
    content["auto_map"] = {"AutoModel": "evil.Model"}
    (folder / file).write_text(json.dumps(content))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(ModelError, match="auto_map"):
        build(f"hf:{folder}", kind="text")
    assert not (tmp_path / "canary").exists()


def test_pickled_weights_of_a_hugging_face_folder_are_not_read(
    tiny_bert: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        build(f"hf:{folder}", kind="text", weights="pretrained")


def test_a_half_empty_hugging_face_file_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for pooling in ("mean", "model"):
        with pytest.raises(ModelError, match="1 tensors of the backbone"):
            build(f"hf:{folder}", kind="text", pooling=pooling, weights="pretrained")


def test_an_image_model_refuses_texts() -> None:
    for model in ("timm:test_resnet", "torchvision:resnet18", "models_for_tests:tiny"):
        with pytest.raises(ModelError, match="text"):
            build(model, kind="text")


def test_an_unknown_saved_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="source 'flax'"):
        rebuild_model({"source": "flax"}, tmp_path, LABELS)


def test_the_head_is_the_last_layer_with_one_output_per_class() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 5))
    assert find_head(net, 3) == "1"
    assert find_head(net, 7) is None


def test_a_glob_covers_exactly_the_wanted_names() -> None:
    assert covering_glob(["head", "head_dist"], ["body", "head", "head_dist"]) == "head*"
    assert covering_glob(["a", "b"], ["a", "b", "c"]) is None


def test_torchvision_builders_still_take_what_we_pass() -> None:
    for name in ("googlenet", "inception_v3", "vgg11_bn", "vit_b_16"):
        assert name in torchvision.models.list_models(module=torchvision.models)


def test_resnet20_is_the_network_its_weights_belong_to() -> None:
    weights = shared("models/resnet_cifar10/resnet20.safetensors")
    built = build("models_for_tests:resnet20", labels=tuple("0123456789"), weights=weights)
    assert built.fresh == ()
    assert sum(p.numel() for p in built.model.parameters()) == 269_722


def prepares_itself(num_classes: int) -> tuple[nn.Module, Any]:
    """A model with a preparation of its own."""
    return tiny(num_classes), lambda picture: torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    "setting", [{"image_size": 64}, {"image_mean": [0.5] * 3}, {"image_std": [0.5] * 3}]
)
def test_a_preparation_that_does_not_hear_of_a_setting_is_said(setting: dict[str, Any], caplog):
    build("tasks.test_models:prepares_itself")
    build("models_for_tests:tiny", **setting)
    assert not caplog.records
    build("tasks.test_models:prepares_itself", **setting)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"does not hear of {next(iter(setting))}" in record.getMessage()
