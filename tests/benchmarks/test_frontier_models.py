"""The rests cut by hand compute what the models compute: else the benchmarks compare nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from frostline.tasks.pooled import MeanPooledClassifier

models = pytest.importorskip("frontier_models")


def chains() -> dict[str, Any]:
    """Small models with the same parts as the large ones."""
    transformers = pytest.importorskip("transformers")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, intermediate_size=32, **small)
    bert = transformers.BertModel(config, add_pooling_layer=False)
    ids = torch.randint(1, 50, (3, 8))
    mask = torch.ones_like(ids)
    short = mask.clone()
    short[0, 5:] = 0
    pooled, call = MeanPooledClassifier(bert, 4), models.call_bert
    sound = models.wav2vec2(2, width=32, layers=2)
    waves = tuple(t[:3] for t in sound.inputs)
    return {
        "resnet": (
            torchvision.models.resnet18(num_classes=4),
            models.resnet_parts(),
            (torch.randn(3, 3, 32, 32),),
            None,
        ),
        "vgg": (
            torchvision.models.vgg11_bn(num_classes=4),
            models.vgg_parts(),
            (torch.randn(3, 3, 32, 32),),
            None,
        ),
        "bert": (pooled, models.bert_parts(2, padded=False), (ids, mask), call),
        "padded bert": (pooled, models.bert_parts(2, padded=True), (ids, short), call),
        "wav2vec2": (sound.model, models.wav2vec2_parts(2), waves, sound.call),
        "kwt": (
            models.KeywordTransformer(4, blocks=2),
            models.keyword_parts(2),
            (torch.randn(3, 16_000),),
            None,
        ),
    }


@pytest.fixture(scope="module")
def all_chains() -> dict[str, Any]:
    return chains()


@pytest.mark.parametrize("name", ["resnet", "vgg", "bert", "padded bert", "wav2vec2", "kwt"])
def test_front_and_rest_are_the_model_at_every_depth(name: str, all_chains: Any) -> None:
    model, parts, inputs, call = all_chains[name]
    owners = sum(bool(part.modules) for part in parts)
    for trains in range(1, owners):
        cut = models.Cut("", parts, trains)
        cut.freeze(model)
        stored = cut.front(model)(inputs)
        torch.manual_seed(1)
        by_hand = cut.rest(model)(stored)
        cut.freeze(model)  # batch statistics moved
        torch.manual_seed(1)
        example = models.Example(inputs) if call is None else call(inputs)
        whole = models.scores_of(model(*example.args, **example.kwargs))
        torch.testing.assert_close(by_hand, whole, rtol=1e-5, atol=1e-5)


def test_a_cut_freezes_what_it_names_and_nothing_else(all_chains: Any) -> None:
    model, parts, _, _ = all_chains["resnet"]
    cut = models.Cut("", parts, 2)
    cut.freeze(model)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"layer4", "fc"}
    assert model.layer4[1].bn1.training
    assert not model.layer4[0].bn1.training
    models.set_frozen(model, ())
    assert all(p.requires_grad for p in model.parameters())
    assert model.bn1.training


def test_what_has_no_weights_is_stored_past(all_chains: Any) -> None:
    """Pooling shrinks what is stored, so nobody would store before it."""
    model, parts, inputs, _ = all_chains["resnet"]
    cut = models.Cut("", parts, 1)
    cut.freeze(model)
    (stored,) = cut.front(model)(inputs)
    assert stored.shape == (3, 512)
    assert not stored.requires_grad


def test_loose_parameters_are_frozen_by_name(all_chains: Any) -> None:
    model, parts, _, _ = all_chains["kwt"]
    models.Cut("", parts, 3).freeze(model)
    assert not model.cls_token.requires_grad
    assert not model.patch_proj.weight.requires_grad
    assert model.head.weight.requires_grad


def test_dropout_in_the_head_stays_active() -> None:
    model = nn.ModuleDict({"dropout": nn.Dropout(0.5), "classifier": nn.Linear(2, 2)})
    models.set_frozen(model, ())
    assert model["dropout"].training
