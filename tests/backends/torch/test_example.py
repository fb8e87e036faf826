"""Batches made up for models that nobody described."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.backends.torch.example import Example, example_batch
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.backends.torch.tracing import leave_untouched, run_model
from frostline.errors import ModelError
from torch_cases import Backwards, Meddler, Tied, Towers, picture


class Flat(nn.Module):
    """Wants images of one size only, and says so nowhere."""

    def __init__(self, size: int, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3, padding=1)
        self.out = nn.Linear(2 * size * size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][-1])


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(7, 2), (2, 7)),
        (nn.Sequential(nn.Conv1d(3, 4, 5), nn.AdaptiveAvgPool1d(1)), (2, 3, 64)),
        (nn.Sequential(nn.Conv3d(2, 4, 3)), (2, 2, 16, 16, 16)),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), (2, 64)),
        (nn.Sequential(nn.LayerNorm((3, 5)), nn.Linear(5, 1)), (2, 3, 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), (2, 784)),
        (Flat(28, channels=1), (2, 1, 28, 28)),
        (Flat(32), (2, 3, 32, 32)),
        (Recurrent(), (2, 16, 5)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 16, 8)),
    ],
)
def test_the_first_layers_tell_the_shape(model: nn.Module, shape: tuple[int, ...]) -> None:
    (batch,) = example_batch(model).args
    assert tuple(batch.shape) == shape
    run_model(model, (batch,), {})


def test_a_model_of_two_inputs_gets_two() -> None:
    assert len(example_batch(Towers()).args) == 2


def test_first_defined_need_not_be_first_run() -> None:
    assert example_batch(Backwards()).args[0].shape == (2, 4)
    assert example_batch(Tied()).args[0].dtype == torch.long


def test_values_follow_the_models_precision_and_the_size_asked_for() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    (batch,) = example_batch(model, batch_size=5).args
    assert batch.dtype == torch.float64
    assert len(batch) == 5


def test_the_same_batch_every_time_and_no_random_state_moves() -> None:
    model = Meddler()
    before = picture(model)
    first, second = example_batch(model), example_batch(model)
    assert torch.equal(first.args[0], second.args[0])
    assert picture(model) == before


def test_a_model_that_cannot_be_fed_says_what_was_tried() -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            raise ValueError("needs a graph")

    with pytest.raises(ModelError, match=r"needs a graph") as caught:
        example_batch(Odd(3, 3))
    assert "Example(args=(batch,))" in caught.value.fix


def test_no_hint_at_all() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ModelError, match="nothing in the model tells its input"):
        example_batch(model)


def test_declared_image_sizes_are_used() -> None:
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    small = timm.create_model("test_resnet", num_classes=2)
    assert example_batch(small).args[0].shape == (2, *small.pretrained_cfg["input_size"])
    grey = timm.create_model("test_vit", num_classes=2, in_chans=1, img_size=80)
    assert example_batch(grey).args[0].shape == (2, 1, 80, 80)
    squeeze = torchvision.models.squeezenet1_1(num_classes=2)
    assert example_batch(squeeze, batch_size=1).args[0].shape == (1, 3, 224, 224)


def test_transformers_configurations_are_read() -> None:
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **tiny, intermediate_size=8, vocab_size=30, max_position_embeddings=20
    )
    made = example_batch(transformers.BertModel(config)).kwargs
    assert set(made) == {"input_ids", "attention_mask"}
    assert made["input_ids"].shape == (2, 18)
    assert int(made["input_ids"].max()) < 30


def test_running_changes_neither_the_batch_nor_the_model() -> None:
    model = Meddler()
    batch = torch.ones(2, 4)
    before = picture(model)
    with leave_untouched(model) as keep:
        for parameter in model.parameters():
            keep(parameter)
        run_model(model, Example(args=(batch,)).args, {})
        random.random()
    assert torch.equal(batch, torch.ones(2, 4))
    assert picture(model) == before


@pytest.mark.parametrize("batch", [torch.zeros(2, 4), {"input": torch.zeros(2, 4)}])
def test_a_tensor_or_keyword_arguments_serve_as_an_example(batch: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = layer_groups(model, batch)
    assert groups.names == layer_groups(model, Example((torch.zeros(2, 4),))).names
    assert measure_costs(model, groups, batch).measured


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a list[\s\S]*keyword arguments by name"):
        layer_groups(nn.Linear(4, 2), [torch.zeros(2, 4)])  # type: ignore[arg-type]
