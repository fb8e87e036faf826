"""Pooled outputs of layer groups against slow versions, and a model that is left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.random_state import read_random_state, same_random_state
from frostline.errors import DataError, ModelError, UsageError
from frostline.groups import LayerGroups
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.features import Features, _mixing, _stratified, collect_features
from frostline.tasks.pooled import mean_pool
from frostline.tasks.task import Split, Task, load_task

Model = Any


@dataclass(frozen=True)
class Stacked:
    """Prepared tensors, stacked."""

    def collate(self, prepared: Sequence[Tensor]) -> tuple[Tensor]:
        return (torch.stack(list(prepared)),)


def task_of(model: nn.Module, inputs: Tensor, labels: Sequence[int] | None = None) -> Task:
    """A task over tensors, (N, ...)."""
    labels = labels or [i % 2 for i in range(len(inputs))]
    split = Split(list(inputs), labels, lambda raw, index, view: raw)
    empty = Split([], [], lambda raw, index, view: raw)
    config = RunConfig(model="m", data="d", batch_size=4)
    names = tuple(map(str, range(max(labels) + 1)))
    return Task("image", config, model, names, split, split, empty, Stacked(), {})  # type: ignore[arg-type]


def collected(model: nn.Module, inputs: Tensor, **options: Any) -> Features:
    task = task_of(model, inputs)
    groups = options.pop("groups", None) or layer_groups(model, Example((inputs[:2],)))
    return collect_features(task, model, task.train, groups, device="cpu", **options)


def pictures(count: int = 9, *, side: int = 8, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, channels, side, side, generator=generator)


def convnet(width: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 7, 3, stride=2, padding=1), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(7, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 2)),
    )


class Net(nn.Module):
    """A body of named layers and a linear head, with a forward pass of the test's own."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


# -- parity -----------------------------------------------------------------------------------


def slow_statistics(maps: np.ndarray, cells: int) -> np.ndarray:
    """Means in cells x cells parts and the deviation of each channel, in plain loops."""
    found = []
    for sample in maps.astype(np.float64):
        means, side = [], sample.shape[1]
        for channel in sample:
            for i in range(cells):
                for j in range(cells):
                    rows = slice(i * side // cells, -(-(i + 1) * side // cells))
                    columns = slice(j * side // cells, -(-(j + 1) * side // cells))
                    means.append(channel[rows, columns].mean())
        found.append([*means, *(channel.std() for channel in sample)])
    return np.array(found)


def test_pooled_maps_equal_a_slow_version() -> None:
    model, x = convnet().eval(), pictures()
    found = collected(model, x)
    assert found.groups == ("0", "1", "2")
    assert found.depths == (0, 1, 2)
    state = x
    with torch.no_grad():
        for name in found.groups:
            state = model[int(name)](state)
            cells = 3
            wanted = slow_statistics(state.numpy(), cells)
            np.testing.assert_allclose(found.values[name], wanted, atol=1e-5)
            assert found.values[name].dtype == np.float32
        entered = model[3][:3](state)
    assert found.head_input is not None
    np.testing.assert_allclose(found.head_input, entered.numpy(), atol=1e-6)
    assert found.head_layer == "3.3"
    assert found.labels.tolist() == [i % 2 for i in range(9)]
    assert found.indices.tolist() == list(range(9))
    assert found.notes == ()


@pytest.mark.parametrize(("width", "cells"), [(50, 3), (49, 2), (25, 2), (24, 1), (10, 1)])
def test_the_finest_grid_that_fits(width: int, cells: int) -> None:
    found = collected(convnet(), pictures(), max_width=width).values["0"]
    assert found.shape == (9, 5 * (cells * cells + 1))


def test_no_grid_finer_than_the_map() -> None:
    assert collected(convnet(), pictures(side=4)).values["1"].shape == (9, 7 * (4 + 1))


def test_channels_beyond_the_width_are_mixed_alike_in_every_pass() -> None:
    model, x = convnet(64), pictures(40)
    wide, narrow = (collected(model, x, max_width=w) for w in (64, 30))
    assert wide.values["0"].shape == (40, 64)  # the means alone
    assert narrow.values["0"].shape == (40, 30)
    # A linear map of the means: the same for every sample, and for another pass.
    mixing, *_ = np.linalg.lstsq(wide.values["0"], narrow.values["0"], rcond=None)
    np.testing.assert_allclose(wide.values["0"] @ mixing, narrow.values["0"], atol=1e-4)
    again = collected(model, x[30:], max_width=30)
    np.testing.assert_allclose(again.values["0"], narrow.values["0"][30:], atol=1e-5)


def test_mixing_is_the_same_in_every_process() -> None:
    first = _mixing(64, 30)
    _mixing.cache_clear()
    assert torch.equal(first, _mixing(64, 30))


def test_mixing_keeps_lengths_on_average() -> None:
    model, x = convnet(256), pictures(30)
    wide, narrow = (collected(model, x, max_width=w).values["0"] for w in (256, 128))
    ratio = np.linalg.norm(narrow, axis=1) / np.linalg.norm(wide, axis=1)
    assert 0.8 < ratio.mean() < 1.2


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing(size: int) -> None:
    model, x = convnet(), pictures(11)
    one, other = collected(model, x), collected(model, x, batch_size=size)
    for name in one.groups:
        np.testing.assert_allclose(one.values[name], other.values[name], atol=1e-5)


# -- shapes -----------------------------------------------------------------------------------


def test_channels_last_are_found() -> None:
    torch.manual_seed(0)

    def run(own: Any, x: Tensor) -> Tensor:
        first = own.a(x.permute(0, 2, 3, 1))  # (N, H, W, C)
        return own.head(own.b(first).mean(dim=(1, 2)))

    model = Net(run, a=nn.Linear(3, 5), b=nn.Linear(5, 8), head=nn.Linear(8, 2))
    x = pictures(5)
    found = collected(model, x)
    with torch.no_grad():
        first = model.a(x.permute(0, 2, 3, 1))  # type: ignore[operator]
        second = model.b(first)  # type: ignore[operator]
    for name, maps in (("a", first), ("b", second)):
        wanted = slow_statistics(maps.permute(0, 3, 1, 2).numpy(), 3)
        np.testing.assert_allclose(found.values[name], wanted, atol=1e-5)


def test_a_convolution_may_put_its_channels_last() -> None:
    """As the first layer of Swin does."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).permute(0, 2, 3, 1)

    torch.manual_seed(0)
    model = Net(
        lambda own, x: own.head(own.a(x).mean(dim=(1, 2))), a=Patches(), head=nn.Linear(5, 2)
    )
    x = pictures(5)
    groups = layer_groups(model, Example((x[:2],)), boundaries=["a"])
    found = collected(model, x, groups=groups)
    with torch.no_grad():
        maps = model.a.conv(x)  # type: ignore[operator, union-attr]
    np.testing.assert_allclose(found.values["a"], slow_statistics(maps.numpy(), 3), atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_maxvit", "test_efficientnet"])
def test_widths_of_real_architectures(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=2).eval()
    x = pictures(4, side=64 if name == "test_convnext" else 160)
    head = model.pretrained_cfg["classifier"]
    found = collected(model, x, groups=layer_groups(model, Example((x[:2],)), head=head))
    channels = {info["num_chs"] for info in model.feature_info} | {model.num_features}
    allowed = {c * k for c in channels for k in (1, 2, 5, 10)}
    assert found.values[found.groups[1]].shape[1] in allowed
    assert found.values[found.groups[-1]].shape[1] in allowed
    assert found.head_input is not None
    assert found.head_input.shape == (4, model.num_features)
    with torch.no_grad():
        entered = model.forward_head(model.forward_features(x), pre_logits=True)
    np.testing.assert_allclose(found.head_input, entered.numpy(), atol=1e-4)


class Recurrent(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        self.lstm = nn.LSTM(4, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, L, 4)
        out, _ = self.lstm(x if self.batch_first else x.transpose(0, 1))
        return self.head(out[:, -1] if self.batch_first else out[-1])


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_samples_are_found_where_they_are(length: int) -> None:
    """Also where there are as many steps (or twice as many) as samples in the trial or a batch."""
    x = torch.randn(8, length, 4, generator=torch.Generator().manual_seed(0))
    first = collected(Recurrent(batch_first=True), x)
    second = collected(Recurrent(batch_first=False), x)
    assert first.groups == second.groups == ("lstm",)
    np.testing.assert_allclose(first.values["lstm"], second.values["lstm"], atol=1e-6)
    with torch.no_grad():
        out, _ = Recurrent(batch_first=True).lstm(x)
    wanted = np.concatenate([out.mean(1), out.std(1, correction=0)], axis=1)
    np.testing.assert_allclose(first.values["lstm"], wanted, atol=1e-6)


def test_windows_laid_in_a_row_belong_to_their_sample() -> None:
    def run(own: Any, x: Tensor) -> Tensor:
        windows = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        maps = own.a(windows)  # (N * 4, 5, 4, 4)
        return own.head(own.b(maps.mean(dim=(2, 3)).view(len(x), 4, 5).mean(1)))

    torch.manual_seed(0)
    model = Net(run, a=nn.Conv2d(3, 5, 1), b=nn.Linear(5, 5), head=nn.Linear(5, 2))
    x = pictures(6)
    found = collected(model, x, max_width=5).values["a"]
    with torch.no_grad():
        wanted = model.a(x).mean(dim=(2, 3))  # type: ignore[operator]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_a_scalar_for_each_sample() -> None:
    def run(own: Any, x: Tensor) -> Tensor:
        return own.head(own.scale(own.a(x)).unsqueeze(1))

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).squeeze(1)

    model = Net(run, a=nn.Linear(4, 4), scale=Total(), head=nn.Linear(1, 2))
    found = collected(model, torch.randn(7, 4))
    assert found.head_input is not None
    np.testing.assert_array_equal(found.values["a"], found.head_input)
    assert found.values["a"].shape == (7, 1)  # two layers, one group


# -- which output -----------------------------------------------------------------------------


def test_one_activation_for_many_layers_counts_for_the_layer_before_it() -> None:
    torch.manual_seed(0)

    def run(own: Any, x: Tensor) -> Tensor:
        return own.head(own.act(own.b(own.act(own.a(x)))))

    model = Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 6), act=nn.ReLU(), head=nn.Linear(6, 2))
    x = torch.randn(7, 4)
    found = collected(model, x)
    with torch.no_grad():
        first = torch.relu(model.a(x))  # type: ignore[operator]
        second = torch.relu(model.b(first))  # type: ignore[operator]
    np.testing.assert_allclose(found.values["a"], first.numpy(), atol=1e-6)
    np.testing.assert_allclose(found.values["b"], second.numpy(), atol=1e-6)


def test_of_repeated_runs_the_last_counts() -> None:
    torch.manual_seed(0)

    def run(own: Any, x: Tensor) -> Tensor:
        return own.head(own.a(torch.tanh(own.a(x))))

    model = Net(run, a=nn.Linear(4, 4), head=nn.Linear(4, 2))
    x = torch.randn(7, 4)
    found = collected(model, x)
    with torch.no_grad():
        wanted = model.a(torch.tanh(model.a(x)))  # type: ignore[operator]
    np.testing.assert_allclose(found.values["a"], wanted.numpy(), atol=1e-6)


def test_outputs_are_read_before_the_model_writes_over_them() -> None:
    torch.manual_seed(0)

    def run(own: Any, x: Tensor) -> Tensor:
        return own.head(own.a(x).mul_(0))

    model = Net(run, a=nn.Linear(4, 5), head=nn.Linear(5, 2))
    x = torch.randn(7, 4)
    with torch.no_grad():
        wanted = model.a(x)  # type: ignore[operator]
    found = collected(model, x)
    np.testing.assert_allclose(found.values["a"], wanted.numpy(), atol=1e-6)
    assert found.head_input is not None
    assert not found.head_input.any()


@dataclass
class Output:
    steps: Tensor
    hidden: Tensor


class Wrapped(nn.Module):
    """Puts the output of a layer into something."""

    def __init__(self, put: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 5)
        self.put = put

    def forward(self, x: Tensor) -> Any:
        return self.put(self.layer(x))


@pytest.mark.parametrize(
    ("put", "take"),
    [
        (lambda x: (x, None), lambda out: out[0]),
        (lambda x: {"mask": x.long(), "hidden": x}, lambda out: out["hidden"]),
        (lambda x: Output(x.long(), x), lambda out: out.hidden),
        (lambda x: [(), [x]], lambda out: out[1][0]),
    ],
)
def test_outputs_in_containers(put: Callable[..., Any], take: Callable[..., Any]) -> None:
    model = Net(lambda own, x: own.head(take(own.a(x))), a=Wrapped(put), head=nn.Linear(5, 2))
    x = torch.randn(6, 4)
    found = collected(model, x, groups=layer_groups(model, Example((x[:2],)), boundaries=["a"]))
    with torch.no_grad():
        wanted = model.a.layer(x)  # type: ignore[operator, union-attr]
    np.testing.assert_allclose(found.values["a"], wanted.numpy(), atol=1e-6)


# -- what is left out -------------------------------------------------------------------------


def left_out(middle: nn.Module) -> Features:
    torch.manual_seed(0)

    def run(own: Any, x: Tensor) -> Tensor:
        hidden = own.a(x)
        own.middle(hidden)
        return own.head(own.b(hidden))

    layers = {"a": nn.Linear(4, 4), "middle": middle, "b": nn.Linear(4, 4)}
    model = Net(run, **layers, head=nn.Linear(4, 2))
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    return collected(model, x)


class Layer(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x + torch.randn_like(x), id="chance"),
        pytest.param(lambda x: x.sort(dim=0).values, id="samples mixed"),
        pytest.param(lambda x: x[:1], id="one row for all"),
        pytest.param(lambda x: x / 0, id="infinite"),
        pytest.param(lambda x: x.long(), id="whole numbers"),
    ],
)
def test_an_output_that_tells_nothing_of_its_sample_is_left_out_and_named(
    change: Callable[[Tensor], Tensor],
) -> None:
    found = left_out(Layer(change))
    assert found.groups == ("a", "b")
    assert found.depths == (0, 2)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("middle: ")


def test_values_that_become_infinite_on_the_way_are_left_out() -> None:
    # Only the samples of the trial stay finite.
    x = torch.ones(9, 4)
    x[1] = 1e38
    torch.manual_seed(0)
    model = Net(
        lambda own, x: own.head(own.b(own.a(x).clamp(-1, 1))),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    nn.init.constant_(model.a.weight, 1e3)  # type: ignore[arg-type]
    found = collected(model, x)
    assert found.groups == ("b",)
    assert found.notes == ("a: values that are not finite",)


def test_a_shape_that_changes_on_the_way_is_left_out() -> None:
    def change(x: Tensor) -> Tensor:
        return x[:, :2] if bool((x > 0).all()) else x

    torch.manual_seed(0)
    model = Net(
        lambda own, x: own.head(own.pick(own.a(x)).sum(1, keepdim=True).expand(-1, 4)),
        a=nn.Linear(4, 4),
        pick=Layer(change),
        head=nn.Linear(4, 2),
    )
    nn.init.eye_(model.a.weight)  # type: ignore[arg-type]
    nn.init.eye_(model.pick.linear.weight)  # type: ignore[arg-type, union-attr]
    x = -torch.ones(9, 4)
    x[5:8] = 9.0  # neither first, middle nor last
    found = collected(model, x, batch_size=1)
    assert found.groups == ("a",)
    assert found.notes == ("pick: not of one shape for all samples",)


def test_a_side_output_that_is_the_same_for_all_samples_does_not_hide_the_layer() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(4.0).expand(len(x), 4)

    def run(own: Any, x: Tensor) -> Tensor:
        hidden = own.a(x)
        return own.head(own.b(hidden + own.positions(hidden)))

    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 4), "positions": Positions(), "b": nn.Linear(4, 4)}
    model = Net(run, **layers, head=nn.Linear(4, 2))
    x = torch.randn(6, 4)
    with torch.no_grad():
        wanted = model.a(x)  # type: ignore[operator]
    np.testing.assert_allclose(collected(model, x).values["a"], wanted.numpy(), atol=1e-6)


def test_a_group_that_never_ran_is_named() -> None:
    model = Net(
        lambda own, x: own.head(own.b(own.a(x))),
        a=nn.Linear(4, 4),
        unused=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    found = collected(model, torch.randn(6, 4))
    assert found.groups == ("a", "b")
    assert [note.partition(":")[0] for note in found.notes] == ["unused"]


# -- the head ---------------------------------------------------------------------------------


def with_head(head: nn.Module, finish: Callable[[Tensor], Any] = lambda x: x) -> Features:
    torch.manual_seed(0)
    model = Net(lambda own, x: finish(own.head(own.body(x))), body=nn.Linear(4, 5), head=head)
    x = torch.randn(6, 4)
    groups = layer_groups(model, Example((x[:2],)), head="head")
    found = collected(model, x, groups=groups)
    assert found.head_input is not None
    assert found.head_input.shape == (6, 5)
    return found


@pytest.mark.parametrize(
    ("head", "finish", "layer"),
    [
        (nn.Linear(5, 2), lambda x: x, "head"),
        (nn.Linear(5, 2, bias=False), lambda x: SimpleNamespace(logits=x), "head"),
        (nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 2)), lambda x: x, "head.1"),
        (nn.Linear(5, 2), lambda x: x.relu(), None),
        (nn.Linear(5, 2), lambda x: 2 * x, None),
        (nn.Linear(5, 2), lambda x: x.mul_(2), None),
        (nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)), lambda x: x, None),
        (nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 2)), lambda x: x, None),
        (nn.Sequential(nn.ReLU(), nn.Linear(5, 2)), lambda x: x, "head.1"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)), lambda x: x, None),
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 2, bias=False)), lambda x: x, None),
    ],
)
def test_a_head_that_is_one_linear_layer(
    head: nn.Module, finish: Callable[[Tensor], Any], layer: str | None
) -> None:
    assert with_head(head, finish).head_layer == layer


def test_a_head_that_reads_a_map() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda own, x: own.head(own.body(x)).mean(dim=(2, 3)),
        body=nn.Conv2d(3, 5, 3),
        head=nn.Conv2d(5, 2, 1),
    )
    x = pictures(6)
    found = collected(model, x, groups=layer_groups(model, Example((x[:2],)), head="head"))
    with torch.no_grad():
        wanted = model.body(x).mean(dim=(2, 3))  # type: ignore[operator]
    assert found.head_input is not None
    np.testing.assert_allclose(found.head_input, wanted.numpy(), atol=1e-5)
    assert found.head_layer is None


def test_a_model_that_is_all_head() -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(6, 4)
    found = collected(model, x)
    assert (found.groups, found.values) == ((), {})
    assert found.head_input is not None
    np.testing.assert_array_equal(found.head_input, x.numpy())


# -- texts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moods(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Texts of 2 to 8 tokens, not in the order of their lengths."""
    words = ["good", "fine", "thing", "stuff", "day", "bad", "poor"]
    rows = [
        f"{words[i % 7]} {' '.join(words[: (3 * i) % 7 + 1])},{'up' if i % 2 else 'down'}"
        for i in range(20)
    ]
    table = tmp_path_factory.mktemp("lengths") / "moods.csv"
    table.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    settings = {"model": f"hf:{tiny_bert}", "data": str(table), "pooling": "mean"}
    return load_task(load_config(None, settings))


def groups_of(task: Task) -> LayerGroups:
    return layer_groups(task.model, task.example(), head=task.head)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_tokens_are_averaged_without_padding(moods: Task, size: int) -> None:
    found = collect_features(
        moods, moods.model, moods.train, groups_of(moods), device="cpu", batch_size=size
    )
    model: Model = moods.model
    means, deviations = [], []
    for i in range(len(moods.train)):  # alone, so there is no padding
        inputs = moods.collate([moods.train[i, None]]).inputs
        with torch.no_grad():
            hidden = model.backbone(**inputs).last_hidden_state
        means.append(mean_pool(hidden, inputs["attention_mask"])[0].numpy())
        deviations.append(hidden[0].std(0, correction=0).numpy())
    last = found.values[found.groups[-1]]
    np.testing.assert_allclose(last[:, :16], means, atol=1e-5)
    np.testing.assert_allclose(last[:, 16:], deviations, atol=1e-5)
    assert found.head_input is not None
    np.testing.assert_allclose(found.head_input, means, atol=1e-5)
    assert found.head_layer == "classifier"
    assert found.labels.tolist() == list(moods.train.labels)


# -- which samples ----------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 9))
def test_subsets_keep_the_proportions(labels: list[int], limit: int, seed: int) -> None:
    places = _stratified(labels, limit, seed)
    assert len(places) == min(limit, len(labels))
    assert (np.diff(places) > 0).all()
    assert places.min() >= 0
    assert places.max() < len(labels)
    whole, drawn = (np.bincount(x, minlength=5) for x in (labels, np.asarray(labels)[places]))
    present = int((whole > 0).sum())
    if limit >= present:
        assert (drawn[whole > 0] >= 1).all()
        share = (whole - 1).clip(0) * (len(places) - present) / max(1, len(labels) - present)
        assert (np.abs(drawn - (share + 1) * (whole > 0)) < 1).all()
    else:
        assert (np.abs(drawn - whole * limit / len(labels)) < 1).all()
    np.testing.assert_array_equal(places, _stratified(labels, limit, seed))


def test_other_seeds_draw_other_samples() -> None:
    labels = [i % 3 for i in range(300)]
    assert (_stratified(labels, 30, 0) != _stratified(labels, 30, 1)).any()


def test_a_limited_pass_has_the_rows_of_its_samples() -> None:
    model, x = convnet(), pictures(20)
    whole, part = collected(model, x), collected(model, x, limit=7)
    assert len(part.indices) == 7
    assert set(part.labels.tolist()) == {0, 1}
    np.testing.assert_array_equal(part.labels, whole.labels[part.indices])
    for name in whole.groups:
        np.testing.assert_allclose(part.values[name], whole.values[name][part.indices], atol=1e-5)


# -- what is left behind ----------------------------------------------------------------------


class Careless(nn.Module):
    """Draws numbers, counts, writes to itself, and fails on samples that are all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.head = nn.Linear(4, 2)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        self.seen += 1
        self.calls.append(len(x))
        self.last = x
        if not bool(x.flatten(1).any(1).all()):
            raise ZeroDivisionError("a picture of nothing")
        return self.head(self.dropout(self.norm(self.conv(x)).mean(dim=(2, 3))))


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_streams_are_left_as_they_were(fails: bool) -> None:
    torch.manual_seed(0)
    model, x = Careless(), pictures(9)
    model.norm.eval()
    model.train()
    model.dropout.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    hook = model.conv.register_forward_hook(lambda *_: None)
    groups = layer_groups(model, Example((x[:2],)))
    modes = {name: m.training for name, m in model.named_modules()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    streams = read_random_state()
    if fails:
        x = x.clone()
        x[5] = 0  # not one of those that are tried first
        with pytest.raises(ModelError, match="a picture of nothing") as caught:
            collected(model, x, groups=groups)
        assert "batch_size" in caught.value.fix
    else:
        collected(model, x, groups=groups)
    assert same_random_state(streams, read_random_state())
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    after = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    assert hooks == after
    assert model.calls == []
    assert not hasattr(model, "last")
    assert model.head.weight.grad is not None
    hook.remove()


def test_no_augmentation() -> None:
    model = convnet()
    views = []
    split = Split(
        list(pictures(5)), [0, 1, 0, 1, 0], lambda raw, index, view: (views.append(view), raw)[1]
    )
    task = task_of(model, pictures(5))
    groups = layer_groups(model, Example((pictures(2),)))
    collect_features(task, model, split, groups, device="cpu")
    assert set(views) == {None}


def test_wrapped_models_are_looked_into() -> None:
    model, x = convnet(), pictures()
    task, groups = task_of(model, x), layer_groups(model, Example((x[:2],)))
    found = collect_features(task, nn.DataParallel(model), task.train, groups, device="cpu")
    np.testing.assert_allclose(found.values["1"], collected(model, x).values["1"], atol=1e-6)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"limit": 0}, {"max_width": -1}])
def test_numbers_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        collected(convnet(), pictures(), **bad)


def test_a_split_without_samples() -> None:
    task = task_of(convnet(), pictures())
    groups = layer_groups(task.model, Example((pictures(2),)))
    with pytest.raises(DataError, match="without samples"):
        collect_features(task, task.model, task.test, groups, device="cpu")
