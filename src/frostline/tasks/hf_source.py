"""Models of Hugging Face transformers: ``hf:NAME_OR_DIR``.

Weights are read from safetensors only, and no code that comes with a model is run: a repository
that asks for it (``auto_map``) is refused even where a class of that name is built in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from frostline.errors import ModelError
from frostline.tasks import hub
from frostline.tasks.built import Built, Kind, Preparation
from frostline.tasks.config import RunConfig
from frostline.tasks.image import ImagePreparation
from frostline.tasks.imports import need
from frostline.tasks.pooled import MeanPooledClassifier
from frostline.tasks.text import TextPreparation
from frostline.tasks.weights import read_weights

__all__ = ["HEAD_FILE", "build", "quiet", "rebuild"]

_log = logging.getLogger(__name__)
HEAD_FILE = "head.safetensors"
LONGEST_TOKENS = 512  # default cap: attention is quadratic in the length
_AUTO = {"image": "AutoModelForImageClassification", "text": "AutoModelForSequenceClassification"}


def build(name: str, *, config: RunConfig, labels: tuple[str, ...], kind: Kind) -> Built:
    """A transformers classifier with one output per label.

    Raises:
        ModelError: no such model, no safetensors, a model that wants to run its own code, or one
            that cannot classify this kind of data.
    """
    transformers = need("transformers", extra="text")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ModelError(
            f"build hf:{name}", found="no such folder", fix="one that save_pretrained wrote"
        )
    pooling = "model" if kind == "image" else config.pooling or _declared_pooling(name)
    with quiet(transformers), hub.translated(f"build hf:{name}"):
        settings = _settings(transformers, name, labels)
        preparation = _preparation(transformers, name, config, settings, kind)
        model, fresh = _model(transformers, name, config, settings, kind, pooling)
    if isinstance(preparation, TextPreparation):
        _agree_on_padding(model, preparation.tokenizer)
    spec: dict[str, Any] = {"source": "hf", "name": name, "kind": kind, "pooling": pooling}
    if isinstance(preparation, TextPreparation):
        spec["max_length"] = preparation.max_length
    return Built(model, preparation, spec, _head(spec), fresh)


def rebuild(spec: Mapping[str, Any], folder: Path, labels: tuple[str, ...]) -> Built:
    """A saved model with its weights, from the files of its folder only."""
    transformers = need("transformers", extra="text")
    place = str(folder)
    with quiet(transformers), hub.translated(f"load the model in {folder}"):
        settings = _settings(transformers, place, labels)
        if spec["kind"] == "text":
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
            preparation: Preparation = TextPreparation(tokenizer, spec["max_length"])
        else:
            preparation = _image_preparation(transformers, place, {})
        if spec["pooling"] == "mean":
            backbone, _ = _from_pretrained(transformers, "AutoModel", place, settings)
            model: nn.Module = _pooled(backbone, settings)
            model.classifier.load_state_dict(read_weights(folder / HEAD_FILE))
        else:
            model, fresh = _from_pretrained(transformers, _AUTO[spec["kind"]], place, settings)
            if fresh:
                found = f"no values for {', '.join(fresh[:3])}"
                raise ModelError(f"load the model in {folder}", found=found, fix="save it again")
    return Built(model, preparation, spec, _head(spec))


def _settings(transformers: Any, name: str, labels: tuple[str, ...]) -> Any:
    """The model's configuration with our labels."""
    raw, _ = transformers.PretrainedConfig.get_config_dict(name)
    _refuse_code(name, raw, "config.json")
    for file in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (path := Path(name) / file).is_file():
            _refuse_code(name, json.loads(path.read_text(encoding="utf-8")), file)
    return transformers.AutoConfig.from_pretrained(
        name,
        trust_remote_code=False,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification",
        use_cache=False,  # keys and values of earlier tokens are of no use to a classifier
    )


def _refuse_code(name: str, raw: Mapping[str, Any], file: str) -> None:
    if "auto_map" in raw:
        raise ModelError(
            f"use hf:{name}",
            found=f"'auto_map' in its {file}: the model wants to run code that comes with it",
            fix="a model whose architecture is built into transformers",
        )


def _preparation(
    transformers: Any, name: str, config: RunConfig, settings: Any, kind: Kind
) -> Preparation:
    if kind == "image":
        return _image_preparation(transformers, name, _image_overrides(transformers, name, config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.pad_token is None:  # decoders were trained without padding
        if tokenizer.eos_token is None:
            raise ModelError(
                f"pad texts for hf:{name}",
                found="a tokenizer without padding or end-of-text token",
                fix="set pad_token in the tokenizer's files",
            )
        tokenizer.pad_token = tokenizer.eos_token
    accepted = min(
        tokenizer.model_max_length,
        getattr(settings, "max_position_embeddings", None) or LONGEST_TOKENS,
    )
    if config.max_length is not None and config.max_length > accepted:
        raise ModelError(
            f"read texts of {config.max_length} tokens with hf:{name}",
            found=f"a model made for {accepted}",
            fix=f"max_length of at most {accepted}",
        )
    return TextPreparation(tokenizer, config.max_length or min(accepted, LONGEST_TOKENS))


def _image_overrides(transformers: Any, name: str, config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.image_mean is not None:
        found |= {"image_mean": list(config.image_mean), "do_normalize": True}
    if config.image_std is not None:
        found |= {"image_std": list(config.image_std), "do_normalize": True}
    if config.image_size is not None:
        usual, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        square = {"height": config.image_size, "width": config.image_size}
        short = "shortest_edge" in (usual.get("size") or {})
        found |= {"size": {"shortest_edge": config.image_size} if short else square}
        found |= {"crop_size": square} if usual.get("crop_size") else {}
    return found


def _image_preparation(
    transformers: Any, name: str, overrides: Mapping[str, Any]
) -> ImagePreparation:
    processor = transformers.AutoImageProcessor.from_pretrained(
        name, trust_remote_code=False, **overrides
    )
    return ImagePreparation(
        {"source": "hf"},
        _ProcessorTransform(processor),
        keyword="pixel_values",
        extras=processor.save_pretrained,
    )


class _ProcessorTransform:
    """One picture through an image processor; a class, so that workers can receive it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, picture: Any) -> Tensor:
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]


def _model(
    transformers: Any, name: str, config: RunConfig, settings: Any, kind: Kind, pooling: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and the names of the tensors that start from random values."""
    auto = "AutoModel" if pooling == "mean" else _AUTO[kind]
    if config.weights == "random":
        model = getattr(transformers, auto).from_config(settings)
        whole = _pooled(model, settings) if pooling == "mean" else model
        return whole, tuple(n for n, _ in whole.named_parameters())
    if config.weights == "pretrained":
        model, fresh = _from_pretrained(transformers, auto, name, settings)
    else:
        tensors = read_weights(Path(config.weights))
        model, fresh = _from_tensors(transformers, auto, tensors, settings)
    inside = fresh if pooling == "mean" else _inside_backbone(fresh, model)
    if missing := [n for n in inside if "pooler." not in n]:
        raise ModelError(
            f"load the weights of hf:{name} ({config.weights})",
            found=f"no fitting values for {len(missing)} tensors of the backbone, "
            f"first {missing[0]!r}",
            fix="weights of this very architecture, or weights: random",
        )
    if pooling == "mean":
        return _pooled(model, settings), ("classifier.bias", "classifier.weight")
    if inside:
        _log.warning(
            "%s start from random values inside the backbone: what freezes the backbone freezes "
            "them; pooling: mean does without",
            ", ".join(inside),
        )
    return model, fresh


def _inside_backbone(names: Sequence[str], model: Any) -> list[str]:
    return [n for n in names if n.startswith(f"{model.base_model_prefix}.")]


def _from_tensors(
    transformers: Any, auto: str, tensors: Mapping[str, Tensor], settings: Any
) -> tuple[Any, tuple[str, ...]]:
    # Through the library: names on disk and in memory differ in many architectures.
    kind = type(getattr(transformers, auto).from_config(settings))
    return _loaded(kind, None, settings, state_dict=dict(tensors))


def _from_pretrained(
    transformers: Any, auto: str, name: str, settings: Any
) -> tuple[Any, tuple[str, ...]]:
    return _loaded(getattr(transformers, auto), name, settings, trust_remote_code=False)


def _loaded(
    kind: Any, name: str | None, settings: Any, **source: Any
) -> tuple[Any, tuple[str, ...]]:
    """A model and the names of its tensors for which there were no values of this shape."""
    model, info = kind.from_pretrained(
        name,
        config=settings,
        use_safetensors=True,
        dtype="float32",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **source,
    )
    misshapen = [entry[0] for entry in info["mismatched_keys"]]
    return model, tuple(sorted({*info["missing_keys"], *misshapen}))


def _pooled(backbone: Any, settings: Any) -> MeanPooledClassifier:
    if getattr(backbone, "pooler", None) is not None:
        # As `add_pooling_layer=False` leaves it: unused layers would be trained for nothing.
        backbone.pooler = None
    dropout = getattr(settings, "hidden_dropout_prob", None)
    return MeanPooledClassifier(
        backbone, settings.num_labels, dropout=0.1 if dropout is None else dropout
    )


def _declared_pooling(name: str) -> str:
    """What a sentence-transformers folder says of its pooling; "model" where nothing is said."""
    found = Path(name) / "1_Pooling" / "config.json"
    if not Path(name).is_dir():
        return "mean" if name.startswith("sentence-transformers/") else "model"
    if not found.is_file():
        return "model"
    try:
        declared = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"read {found}", found=str(error), fix="an undamaged folder") from error
    return "mean" if declared.get("pooling_mode_mean_tokens") else "model"


def _agree_on_padding(model: nn.Module, tokenizer: Any) -> None:
    settings: Any = getattr(model, "config", None)
    if settings is not None and getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = tokenizer.pad_token_id


def _head(spec: Mapping[str, Any]) -> str | None:
    # Elsewhere all that lies outside the base model, which layer groups know by themselves.
    return "classifier" if spec["pooling"] == "mean" else None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the library's progress bars and load reports; fresh tensors are in our notes."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
