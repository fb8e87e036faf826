"""A batch to run a model on: given by the caller, or made up from what the model says of itself.

What a model is fed is nowhere declared in PyTorch, but most models carry a hint: timm a
`pretrained_cfg`, transformers a `config`, all others a first layer. Each hint gives candidate
batches; the first one the model can digest is taken. Random values come from a private generator,
so no global random state moves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from frostline.backends.torch.tracing import trace_model
from frostline.errors import ModelError

__all__ = ["Example", "example_batch"]

TEXT_LENGTH_TOKENS = 64
AUDIO_LENGTH_SAMPLES = 16_000
IMAGE_SIZES = (64, 32, 224, 28, 96, 128, 299, 384, 512)
SERIES_LENGTHS = (64, 256, 1024, 16_000)
FIRST_LAYERS_TRIED = 6
REASONS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Example:
    """One batch, as the model is called: ``model(*args, **kwargs)``.

    Attributes:
        args: positional arguments, usually one tensor whose first dimension is the batch.
        kwargs: keyword arguments, e.g. what a Hugging Face tokenizer returns.

    Example:
        >>> Example(args=(torch.zeros(2, 3, 32, 32),)).args[0].shape
        torch.Size([2, 3, 32, 32])
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Example | Tensor | Mapping[str, Any]) -> Example:
        """An example from what people have at hand: one tensor, or keyword arguments by name.

        Raises:
            ModelError: anything else.

        Example:
            >>> Example.of(torch.zeros(2, 4)).args[0].shape
            torch.Size([2, 4])
        """
        if isinstance(batch, Example):
            return batch
        if isinstance(batch, Tensor):
            return cls((batch,))
        if isinstance(batch, Mapping):
            return cls(kwargs=batch)
        raise ModelError(
            "run the model on an example",
            found=f"a {type(batch).__name__}",
            fix="a tensor, keyword arguments by name, or Example(args=(...), kwargs={...})",
        )


def example_batch(model: nn.Module, *, batch_size: int = 2) -> Example:
    """Make up a batch that `model` can run on; values are random, shapes are the model's own.

    Models of timm, torchvision and transformers get their real image size (texts 64 tokens,
    waveforms 16000 samples); of all others the first layers are asked.

    Args:
        model: any module; left exactly as it was.
        batch_size: samples in the batch, >= 1 (1 is used where a model takes no more).

    Raises:
        ModelError: no batch that was tried runs.

    Example:
        >>> example_batch(nn.Linear(3, 1)).args[0].shape
        torch.Size([2, 3])
    """
    maker = _Maker(model, batch_size)
    failures: dict[str, None] = {}
    for candidate in _candidates(model, maker):
        try:
            trace_model(model, candidate.args, candidate.kwargs)
        except ModelError as error:
            failures[error.found] = None
        else:
            return candidate
    tried = "; ".join(list(failures)[:REASONS_SHOWN]) or "nothing in the model tells its input"
    raise ModelError(
        f"make up a batch for {type(model).__name__}",
        found=f"{len(failures)} different failures, such as: {tried}" if failures else tried,
        fix="pass one: layer_groups(model, Example(args=(batch,))) or Example(kwargs={...})",
    )


class _Maker:
    """Tensors with the model's device and dtype, from a private generator."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        floats = [p for p in model.parameters() if p.is_floating_point()]
        self.batch_size = batch_size
        self._dtype = floats[0].dtype if floats else torch.float32
        self._device = floats[0].device if floats else torch.device("cpu")
        self._generator = torch.Generator().manual_seed(0)

    def floats(self, *sizes: int) -> Tensor:
        """Standard normal values, (batch, *sizes)."""
        values = torch.randn((self.batch_size, *sizes), generator=self._generator)
        return values.to(self._device, self._dtype)

    def integers(self, bound: int, *sizes: int) -> Tensor:
        """Integers in [0, bound), (batch, *sizes)."""
        sizes = (self.batch_size, *sizes)
        return torch.randint(0, max(1, bound), sizes, generator=self._generator).to(self._device)

    def ones(self, *sizes: int) -> Tensor:
        """Integer ones, (batch, *sizes)."""
        return torch.ones((self.batch_size, *sizes), dtype=torch.long, device=self._device)


def _candidates(model: nn.Module, make: _Maker) -> Iterator[Example]:
    if _is_transformers(model):
        yield from _for_transformers(model, make)
        if make.batch_size > 1:
            # Decoders without a padding token classify one text at a time only.
            make.batch_size = 1
            yield from _for_transformers(model, make)
        return
    for sizes in _declared_sizes(model):
        yield Example(args=(make.floats(*sizes),))
    count = _required_arguments(model)
    for layer in _first_layers(model):
        for tensor in _fed_to(layer, make):
            yield Example(args=(tensor,) * count)


def _declared_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Input shapes (channels, height, width) that the model states itself."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        if isinstance(config, Mapping) and config.get("input_size"):
            channels, height, width = config["input_size"]
            yield getattr(model, "in_chans", channels), *_image_size(model, (height, width))
            yield channels, height, width
    size = _image_size(model, None)
    if size is None and type(model).__module__.startswith("torchvision.models"):
        size = (299, 299) if type(model).__name__ == "Inception3" else (224, 224)
    if size is not None:
        yield _channels(model), *size


def _image_size(model: nn.Module, default: Any) -> Any:
    # Vision transformers keep their size: on themselves (torchvision) or their patch embedding.
    for owner in (model, getattr(model, "patch_embed", None)):
        for attribute in ("image_size", "img_size"):
            size = getattr(owner, attribute, None)
            if isinstance(size, int):
                return size, size
            if isinstance(size, tuple) and len(size) == 2:
                return size
    return default


def _channels(model: nn.Module) -> int:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def _first_layers(model: nn.Module) -> list[nn.Module]:
    known = [m for m in model.modules() if isinstance(m, tuple(_FEEDS))]
    return known[:FIRST_LAYERS_TRIED]


def _required_arguments(model: nn.Module) -> int:
    """How many positional arguments `forward` cannot do without; at least 1."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, len(needed))


def _fed_to(layer: nn.Module, make: _Maker) -> Iterator[Tensor]:
    for kind, feed in _FEEDS.items():
        if isinstance(layer, kind):
            yield from feed(layer, make)
            return


def _images(channels: int, make: _Maker) -> Iterator[Tensor]:
    for size in IMAGE_SIZES:
        yield make.floats(channels, size, size)


def _series(channels: int, make: _Maker) -> Iterator[Tensor]:
    for length in SERIES_LENGTHS:
        yield make.floats(channels, length)


def _volumes(channels: int, make: _Maker) -> Iterator[Tensor]:
    for size in (16, 32, 64, 112):
        yield make.floats(channels, size, size, size)


def _features(size: int, make: _Maker) -> Iterator[Tensor]:
    yield make.floats(size)
    yield make.floats(16, size)
    side = int((size / 3) ** 0.5), int(size**0.5)
    if 3 * side[0] ** 2 == size:
        yield make.floats(3, side[0], side[0])
    if side[1] ** 2 == size:
        yield make.floats(1, side[1], side[1])


def _sequences(size: int, make: _Maker) -> Iterator[Tensor]:
    yield make.floats(16, size)
    yield make.floats(size)


def _tokens(count: int, make: _Maker) -> Iterator[Tensor]:
    for length in (TEXT_LENGTH_TOKENS, 16, 8, 1):
        yield make.integers(count, length)
    yield make.integers(count)


def _normalised(shape: tuple[int, ...], make: _Maker) -> Iterator[Tensor]:
    yield make.floats(*shape)
    yield make.floats(16, *shape)


_FEEDS: dict[type[nn.Module], Callable[[Any, _Maker], Iterator[Tensor]]] = {
    nn.Conv1d: lambda m, make: _series(m.in_channels, make),
    nn.Conv2d: lambda m, make: _images(m.in_channels, make),
    nn.Conv3d: lambda m, make: _volumes(m.in_channels, make),
    nn.Linear: lambda m, make: _features(m.in_features, make),
    nn.Embedding: lambda m, make: _tokens(m.num_embeddings, make),
    nn.EmbeddingBag: lambda m, make: _tokens(m.num_embeddings, make),
    nn.RNNBase: lambda m, make: _sequences(m.input_size, make),
    nn.MultiheadAttention: lambda m, make: _sequences(m.embed_dim, make),
    nn.BatchNorm1d: lambda m, make: _features(m.num_features, make),
    nn.BatchNorm2d: lambda m, make: _images(m.num_features, make),
    nn.BatchNorm3d: lambda m, make: _volumes(m.num_features, make),
    nn.LayerNorm: lambda m, make: _normalised(m.normalized_shape, make),
}


def _is_transformers(model: nn.Module) -> bool:
    # A model of that library exists only where the library is loaded already.
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _for_transformers(model: nn.Module, make: _Maker) -> Iterator[Example]:
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    inputs = {
        name: value
        for name, value in _transformers_inputs(model, config, make, set(accepted)).items()
        if name in accepted
    }
    yield Example(kwargs=inputs)
    yield Example(kwargs={k: v for k, v in inputs.items() if k != "decoder_input_ids"})
    dummy: Any = model.dummy_inputs
    yield Example(kwargs={k: v for k, v in dummy.items() if k in accepted})


def _transformers_inputs(
    model: nn.Module, config: Any, make: _Maker, accepted: set[str]
) -> dict[str, Tensor]:
    wanted = {str(model.main_input_name)}
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        wanted |= {"input_ids", "pixel_values"}
    inputs: dict[str, Tensor] = {}
    if "pixel_values" in wanted:
        inputs["pixel_values"] = _pixels(getattr(config, "vision_config", config), make)
    if "input_values" in wanted:
        inputs["input_values"] = _waveform(config, make)
    if "input_features" in wanted:
        inputs["input_features"] = _spectrogram(config, make)
    if "input_ids" in wanted:
        inputs["input_ids"] = _text(getattr(config, "text_config", config), make)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _text(config, make, length=16)
    return inputs


def _text(config: Any, make: _Maker, *, length: int = TEXT_LENGTH_TOKENS) -> Tensor:
    vocabulary = int(getattr(config, "vocab_size", 2))
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa numbers positions from 2; the last position is never needed here.
    length = min(length, positions - 2) if isinstance(positions, int) and positions > 4 else length
    # The lowest ids are padding and markers in nearly every vocabulary.
    low = min(vocabulary // 2, 10)
    ids = low + make.integers(vocabulary - low, length)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        # Encoder-decoder classifiers read the state at the end-of-text token.
        ids[ids == end] = low if end != low else low + 1
        ids[:, -1] = end
    return ids


def _pixels(config: Any, make: _Maker) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return make.floats(int(getattr(config, "num_channels", 3)), height, width)


def _waveform(config: Any, make: _Maker) -> Tensor:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return make.floats(config.max_length, config.num_mel_bins)
    return make.floats(AUDIO_LENGTH_SAMPLES)


def _spectrogram(config: Any, make: _Maker) -> Tensor:
    if hasattr(config, "max_source_positions"):
        return make.floats(config.num_mel_bins, 2 * config.max_source_positions)
    bins = getattr(config, "feature_projection_input_dim", getattr(config, "num_mel_bins", 80))
    return make.floats(100, bins)
