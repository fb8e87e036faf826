"""Text, speech and two-tower models of transformers, made tiny."""

# The configurations of transformers take more than their signatures say.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from frontier.zoo_cases import (
    Freeze,
    Made,
    MakeBatch,
    case,
    generator,
    prefixes,
    sets,
    tokens,
    waves,
)
from frostline.backends.torch.example import Example
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.tasks.pooled import MeanPooledClassifier

LABELS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_labels": LABELS,
}


def _bert(**more: Any) -> hf.BertForSequenceClassification:
    return hf.BertForSequenceClassification(hf.BertConfig(**(SIZES | more)))


@case("BERT", optimizer="adamw")
def bert() -> Made:
    return _bert(), tokens()


@case("BERT, eager attention, all hidden states and attentions out", optimizer="adamw")
def bert_all_out() -> Made:
    model = _bert(attn_implementation="eager", output_hidden_states=True, output_attentions=True)
    return model, tokens()


@case("BERT, labels in the batch (loss inside)", optimizer="adamw")
def bert_labels() -> Made:
    make = tokens()

    def labelled(n: int, seed: int) -> Example:
        batch = make(n, seed)
        return Example(kwargs={**batch.kwargs, "labels": torch.arange(n) % LABELS})

    return _bert(), labelled


@case("BERT, live dropout", depths=prefixes(live_dropout=True), hostile=True, optimizer="adamw")
def bert_live_dropout() -> Made:
    return _bert(), tokens()


def _trim(batch: Example) -> Example:
    """Cut the padding that no sample of the batch needs, as a collator does."""
    longest = int(batch.kwargs["attention_mask"].sum(1).max())
    return Example(kwargs={k: v[:, :longest].clone() for k, v in batch.kwargs.items()})


@case("BERT, padded to the longest in the batch", optimizer="adamw", batch_of=_trim)
def bert_ragged() -> Made:
    make = tokens()

    def ragged(n: int, seed: int) -> Example:
        batch = make(n, seed)
        mask = batch.kwargs["attention_mask"].clone()
        mask[:, 9] = 0  # one sample has all 10 tokens, so that the batches are of unequal length
        mask[n // 2] = 1
        return Example(
            kwargs={"input_ids": batch.kwargs["input_ids"] * mask, "attention_mask": mask}
        )

    return _bert(), ragged


@case("mean-pooled BERT", optimizer="adamw")
def mean_pooled() -> Made:
    return MeanPooledClassifier(hf.BertModel(hf.BertConfig(**SIZES)), LABELS), tokens()


def _checkpointing(*, reentrant: bool) -> Made:
    model = _bert()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model, tokens()


@case("BERT, gradient checkpointing", optimizer="adamw")
def bert_checkpointing() -> Made:
    return _checkpointing(reentrant=False)


@case(
    "BERT, reentrant gradient checkpointing",
    optimizer="adamw",
    nothing_at=frozenset({"quarter", "half", "three quarters", "all but head"}),
)
def bert_checkpointing_reentrant() -> Made:
    return _checkpointing(reentrant=True)


@case("BERT, autocast", tolerance=3e-2, around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
def bert_autocast() -> Made:
    return _bert(), tokens()


@case("BERT in bfloat16", tolerance=3e-2)
def bert_bfloat16() -> Made:
    return _bert().bfloat16(), tokens()


@case("DistilBERT", optimizer="adamw")
def distilbert() -> Made:
    config = hf.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=4, n_heads=2, hidden_dim=64, max_position_embeddings=32,
        num_labels=LABELS,
    )  # fmt: skip
    return hf.DistilBertForSequenceClassification(config), tokens()


@case("RoBERTa", optimizer="adamw")
def roberta() -> Made:
    config = hf.RobertaConfig(**SIZES, pad_token_id=0)
    return hf.RobertaForSequenceClassification(config), tokens()


@case(
    "ALBERT, one layer called many times",
    nothing_at=frozenset({"layer alone"}),
    optimizer="adamw",
    depths={**prefixes(), **sets(layer_alone="*albert_layers*", embeddings="*embedding*")},
)
def albert() -> Made:
    config = hf.AlbertConfig(**SIZES, embedding_size=16, hidden_dropout_prob=0.1)
    return hf.AlbertForSequenceClassification(config), tokens()


@case("ELECTRA", optimizer="adamw")
def electra() -> Made:
    return hf.ElectraForSequenceClassification(
        hf.ElectraConfig(**SIZES, embedding_size=16)
    ), tokens()


@case("DeBERTa-v2", optimizer="adamw")
def deberta() -> Made:
    config = hf.DebertaV2Config(
        **SIZES, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        pooler_hidden_size=32,
    )  # fmt: skip
    return hf.DebertaV2ForSequenceClassification(config), tokens()


@case("XLNet", optimizer="adamw")
def xlnet() -> Made:
    config = hf.XLNetConfig(
        vocab_size=64, d_model=32, n_layer=4, n_head=2, d_inner=64, num_labels=LABELS
    )
    return hf.XLNetForSequenceClassification(config), tokens()


@case("GPT-2, tied language model", optimizer="adamw")
def gpt2() -> Made:
    return _gpt2(cache=False)


@case("GPT-2, keys and values in the output", optimizer="adamw", hostile=True)
def gpt2_cache() -> Made:
    return _gpt2(cache=True)


def _gpt2(*, cache: bool) -> Made:
    config = hf.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=4, n_head=2, use_cache=cache
    )
    return hf.GPT2LMHeadModel(config), tokens(mask=False)


@case("Llama classifier", optimizer="adamw")
def llama() -> Made:
    return _llama(cache=False)


@case("Llama classifier, keys and values in the output", optimizer="adamw", hostile=True)
def llama_cache() -> Made:
    return _llama(cache=True)


def _llama(*, cache: bool) -> Made:
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0, use_cache=cache)
    return hf.LlamaForSequenceClassification(config), tokens()


def _pairs(vocabulary: int = 64, target: int = 6) -> MakeBatch:
    source = tokens(vocabulary)

    def make(n: int, seed: int) -> Example:
        ids = torch.randint(3, vocabulary, (n, target), generator=generator(seed + 1))
        return Example(kwargs={**source(n, seed).kwargs, "decoder_input_ids": ids})

    return make


ENCODER_DECODER: dict[str, Freeze] = {**prefixes(), **sets(encoder="*encoder*")}


@case("T5", optimizer="adamw", depths=ENCODER_DECODER)
def t5() -> Made:
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2,
        num_heads=2, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), _pairs()


@case("BART", optimizer="adamw", depths=ENCODER_DECODER)
def bart() -> Made:
    config = hf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=32, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        use_cache=False,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config), _pairs()


@case(
    "CLIP",
    optimizer="adamw",
    depths={**prefixes(), **sets(vision_tower="vision_model*", text_tower="text_model*")},
)
def clip() -> Made:
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.CLIPConfig(
        text_config={**tower, "intermediate_size": 64, "vocab_size": 64,
                     "max_position_embeddings": 32, "eos_token_id": 63, "bos_token_id": 1},
        vision_config={**tower, "intermediate_size": 64, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    text = tokens(63)

    def make(n: int, seed: int) -> Example:
        pixels = torch.randn(n, 3, 16, 16, generator=generator(seed + 1))
        return Example(kwargs={**text(n, seed).kwargs, "pixel_values": pixels})

    return hf.CLIPModel(config), make


@case("Whisper", optimizer="adamw", depths=ENCODER_DECODER)
def whisper() -> Made:
    config = hf.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=12, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip

    def make(n: int, seed: int) -> Example:
        g = generator(seed)
        heard = torch.randn(n, 8, 2 * 12, generator=g)
        ids = torch.randint(3, 64, (n, 6), generator=g)
        return Example(kwargs={"input_features": heard, "decoder_input_ids": ids})

    return hf.WhisperForConditionalGeneration(config), make


SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "num_labels": LABELS,
    "vocab_size": 32,
    "layerdrop": 0.0,
}


def _speech(kind: str, model: str, **more: Any) -> Made:
    config = getattr(hf, kind)(**(SPEECH | more))
    return getattr(hf, model)(config), waves()


@case("Wav2Vec2, group norm", optimizer="adamw")
def wav2vec2_group() -> Made:
    return _speech("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", mask_time_prob=0.0)


@case("Wav2Vec2, layer norm", optimizer="adamw")
def wav2vec2_layer() -> Made:
    return _speech(
        "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", mask_time_prob=0.0,
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
    )  # fmt: skip


@case("Wav2Vec2, time masks from NumPy and layer drop", optimizer="adamw", hostile=True)
def wav2vec2_masks() -> Made:
    return _speech(
        "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", mask_time_prob=0.3,
        mask_time_length=2, mask_time_min_masks=1, layerdrop=0.3,
    )  # fmt: skip


@case("HuBERT", optimizer="adamw")
def hubert() -> Made:
    return _speech("HubertConfig", "HubertForSequenceClassification", mask_time_prob=0.0)


# -- adapters ----------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A linear layer plus a trainable low-rank change, with dropout before it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.base(x) + self.drop(x) @ self.lora_a.T @ self.lora_b.T


def _with_lora(model: nn.Module, names: tuple[str, ...], layers: tuple[int, ...]) -> nn.Module:
    for path, module in list(model.named_modules()):
        parent, _, last = path.rpartition(".")
        if last in names and any(f".{i}." in path for i in layers):
            assert isinstance(module, nn.Linear)
            setattr(model.get_submodule(parent), last, LoRA(module))
    return model


def _only(*words: str) -> Freeze:
    """Freeze all but parameters with one of these words in their name."""

    def plan(groups: LayerGroups) -> FreezePlan:
        keep = {
            g.name: frozenset(n for n in g.parameter_names if any(w in n for w in words))
            for g in groups
        }
        frozen = frozenset(g.name for g in groups if keep[g.name] != g.parameter_names)
        return FreezePlan(frozen=frozen, exempt=keep)

    return plan


LORA = {"lora and head": _only("lora_", "classifier", "score"), "lora alone": _only("lora_")}


@case("BERT, LoRA in every layer", optimizer="adamw", depths=LORA)
def bert_lora() -> Made:
    return _with_lora(_bert(), ("query", "value"), (0, 1, 2, 3)), tokens()


@case("BERT, LoRA in the two deepest layers", optimizer="adamw", depths=LORA)
def bert_lora_deep() -> Made:
    return _with_lora(_bert(), ("query", "value"), (2, 3)), tokens()


@case("Llama, LoRA in the deepest layer", optimizer="adamw", depths=LORA)
def llama_lora() -> Made:
    model, make = llama()
    return _with_lora(model, ("q_proj", "v_proj"), (3,)), make


@case(
    "BERT, only biases train",
    optimizer="adamw",
    depths={
        "bitfit": _only(".bias"),
        "deepest biases": _only("layer.3.output.dense.bias", "classifier"),
    },
)
def bert_bitfit() -> Made:
    return _bert(), tokens()
