"""Layer groups of real architectures, with random weights and small inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.groups import LayerGroups
from torch_cases import check_complete, picture

os.environ.setdefault("HF_HUB_OFFLINE", "1")

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def image(size: int, batch: int = 2) -> Example:
    return Example(args=(torch.zeros(batch, 3, size, size),))


def small_vgg() -> nn.Module:
    with torch.device("meta"):  # the original classifier has 120 million weights
        model = torchvision.models.vgg11_bn(init_weights=False)
    model.features.to_empty(device="cpu")
    for name, sizes in {"0": (25088, 8), "3": (8, 8), "6": (8, 4)}.items():
        setattr(model.classifier, name, nn.Linear(*sizes))
    return model


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32
    )


def transformer(kind: str, **options: Any) -> nn.Module:
    family = kind.partition("For")[0].removesuffix("LMHeadModel")
    config = getattr(transformers, f"{family}Config")(**options)
    return getattr(transformers, kind)(config)


BODY = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
BERT = {**BODY, "intermediate_size": 32, "vocab_size": 50}
WAVES = {
    **BODY,
    "intermediate_size": 32,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "vocab_size": 12,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 50,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"d_model": 16, "num_layers": 2, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 50}

# name -> (model, batch or None to make one up, expected groups, expected head)
Case = tuple[Callable[[], nn.Module], Example | None, str, str]
CASES: dict[str, Case] = {
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=4),
        image(32),
        "conv1 layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1 layer4.0 layer4.1 fc",
        "fc",
    ),
    "vgg11_bn": (
        small_vgg,
        image(32, 1),
        (
            "features.0 features.4 features.8 features.11 features.15 features.18 features.22 "
            "features.25 classifier.0 classifier.3 classifier.6"
        ),
        "classifier.6",
    ),
    "vit": (
        small_vit,
        None,
        (
            "conv_proj encoder.layers.encoder_layer_0 encoder.layers.encoder_layer_1 "
            "encoder.layers.encoder_layer_2 heads"
        ),
        "heads",
    ),
    "bert": (
        lambda: transformer("BertForSequenceClassification", **BERT),
        None,
        "bert.embeddings bert.encoder.layer.0 bert.encoder.layer.1 bert.pooler classifier",
        "classifier",
    ),
    "distilbert": (
        lambda: transformer(
            "DistilBertForSequenceClassification",
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            vocab_size=50,
        ),
        None,
        (
            "distilbert.embeddings distilbert.transformer.layer.0 distilbert.transformer.layer.1 "
            "pre_classifier classifier"
        ),
        "pre_classifier classifier",
    ),
    "hf-vit": (
        lambda: transformer(
            "ViTForImageClassification", **BODY, intermediate_size=32, image_size=16, patch_size=8
        ),
        None,
        "vit.embeddings vit.layers.0 vit.layers.1 classifier",
        "classifier",
    ),
    "wav2vec2": (
        lambda: transformer("Wav2Vec2ForSequenceClassification", **WAVES),
        None,
        (
            "wav2vec2.feature_extractor.conv_layers.0 wav2vec2.feature_extractor.conv_layers.1 "
            "wav2vec2.feature_extractor.conv_layers.2 wav2vec2.feature_projection "
            "wav2vec2.encoder.pos_conv_embed wav2vec2.encoder.layers.0 wav2vec2.encoder.layers.1 "
            "projector classifier"
        ),
        "projector classifier",
    ),
    "whisper": (
        lambda: transformer("WhisperForConditionalGeneration", **WHISPER),
        None,
        (
            "model.encoder.conv1 model.encoder.conv2 model.encoder.embed_positions "
            "model.encoder.layers.0 model.encoder.layers.1 model.decoder.embed_tokens "
            "model.decoder.layers.0 model.decoder.layers.1"
        ),
        "model.decoder.layers.1",
    ),
    "gpt2": (
        lambda: transformer("GPT2LMHeadModel", **GPT),
        None,
        "transformer.wte transformer.h.0 transformer.h.1",
        "transformer.h.1",
    ),
    "gpt2-classifier": (
        lambda: transformer("GPT2ForSequenceClassification", **GPT),
        None,
        "transformer.wte transformer.h.0 transformer.h.1 score",
        "score",
    ),
    "t5": (
        lambda: transformer("T5ForConditionalGeneration", **T5),
        None,
        "encoder.embed_tokens encoder.block.0 encoder.block.1 decoder.block.0 decoder.block.1",
        "decoder.block.1",
    ),
    "albert": (
        lambda: transformer("AlbertForSequenceClassification", **BERT, embedding_size=8),
        None,
        "albert.embeddings albert.encoder albert.pooler classifier",
        "classifier",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_of_known_architectures(name: str) -> None:
    build, example, names, head = CASES[name]
    model = build().train()
    before = picture(model)
    groups = layer_groups(model, example)
    assert picture(model) == before
    check_complete(model, groups)
    assert " ".join(groups.names) == names
    assert groups.head == set(head.split())


def ordinals(model: nn.Module) -> dict[str, int]:
    """timm's own place of each parameter, by name."""
    from timm.models._manipulate import group_parameters

    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tf_efficientnet_lite0", 19),
        ("convnext_atto", 17),
        ("mobilenetv3_small_050", 15),
        ("test_vit", 8),
        ("test_resnet", 8),
    ],
)
def test_order_agrees_with_timms_own(name: str, count: int) -> None:
    model = timm.create_model(name, num_classes=4)
    groups = layer_groups(model, None if name.startswith("test_") else image(32))
    check_complete(model, groups)
    theirs = ordinals(model)
    places = [theirs[g.parameters[0].name] for g in groups]
    assert places == sorted(places)
    # Blocks are as fine as timm's; only norms are placed with a neighbour.
    norms = {p.name for g in groups for p in g.parameters if p.kind == "norm"}
    for group in groups:
        assert len({theirs[p] for p in group.parameter_names - norms}) == 1, group.name
    classifier = {id(p) for p in model.get_classifier().parameters()}
    assert {n for n, p in model.named_parameters() if id(p) in classifier} <= {
        p for name in groups.head for p in groups[name].parameter_names
    }
    assert len(groups.head) == 1
    assert len(groups) == count


def test_tied_output_layers_are_one_group_under_all_names() -> None:
    groups = layer_groups(transformer("GPT2LMHeadModel", **GPT))
    assert groups.of_parameter("lm_head.weight") is groups["transformer.wte"]
    assert any("transformer.wte.weight = lm_head.weight" in note for note in groups.notes)
    assert any("head" in note and "tied" in note for note in groups.notes)


def test_what_only_training_uses_is_reported() -> None:
    groups = layer_groups(transformer("Wav2Vec2ForSequenceClassification", **WAVES))
    assert any("wav2vec2.masked_spec_embed" in note for note in groups.notes)


def test_auxiliary_classifiers_never_run_in_evaluation_and_are_not_the_head() -> None:
    model = torchvision.models.googlenet(num_classes=4, init_weights=False, aux_logits=True)
    groups = layer_groups(model, image(64))
    assert groups.head == {"fc"}
    assert [groups[n].calls for n in ("aux1", "aux2", "fc")] == [0, 0, 1]
    assert groups["aux1"].depth < groups["fc"].depth


def test_kinds_and_modules_of_a_real_network() -> None:
    groups: LayerGroups = layer_groups(torchvision.models.resnet18(num_classes=4), image(32))
    block = groups["layer2.0"]
    assert {p.kind for p in block.parameters} == {"weight", "norm"}
    assert {b.kind for b in block.buffers} == {"norm"}
    types = {m.name: m.type for m in block.modules}
    assert types["layer2.0"] == "BasicBlock"
    assert types["layer2.0.downsample.1"] == "BatchNorm2d"
    assert "layer2" not in types
    stem = {m.name for m in groups["conv1"].modules}
    assert stem == {"conv1", "bn1", "relu", "maxpool"}
    assert "avgpool" in {m.name for m in groups["layer4.1"].modules}
