"""Layer groups of hand-made models: exact names where they matter, invariants everywhere."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.errors import ModelError, SelectorMatchedNothing
from frostline.groups import LayerGroups
from torch_cases import (
    AWKWARD,
    Backwards,
    Conditional,
    Functional,
    Meddler,
    Parallel,
    Rescaled,
    Residual,
    Shared,
    Staged,
    Swapper,
    Tied,
    Towers,
    Twice,
    Weighted,
    check_complete,
    picture,
)


def groups_of(model: nn.Module, *args: Tensor, **options: object) -> LayerGroups:
    groups = layer_groups(model, Example(args=args), **options)
    check_complete(model, groups)
    return groups


X = torch.ones(2, 4)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models_are_divided_completely_and_left_untouched(name: str) -> None:
    kind, args = AWKWARD[name]
    model = kind().train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad = False
    next(model.children(), model).eval()
    batch = tuple(a.clone() for a in args)
    before = picture(model)
    groups_of(model, *batch)
    assert picture(model) == before
    assert all(torch.equal(a, b) for a, b in zip(batch, args, strict=True))


def test_order_is_execution_not_definition() -> None:
    groups = groups_of(Backwards(), X)
    assert groups.names == ("stem", "middle", "head")
    assert groups.head == {"head"}
    assert [p.name for p in groups["stem"].parameters] == [
        "stem.weight",
        "stem.bias",
        "norm.weight",
        "norm.bias",
    ]
    assert [p.kind for p in groups["stem"].parameters] == ["weight", "bias", "norm", "norm"]


def test_branches_in_a_dict_are_ordered_by_use() -> None:
    model, x = AWKWARD["ByName"][0](), X
    assert groups_of(model, x).names == ("branches.early", "branches.late", "out")


def test_parameters_on_the_root_are_ordered_by_use() -> None:
    groups = groups_of(Functional(), X)
    assert groups.names == ("w1", "w2")
    assert [p.name for p in groups["w1"].parameters] == ["w1", "scale", "token"]
    assert [b.name for b in groups["w1"].buffers] == ["offset"]
    assert groups["w1"].calls == 1


def test_a_shared_layer_is_in_the_group_that_used_it_first() -> None:
    groups = groups_of(Shared(), torch.ones(2, 6))
    assert groups.names == ("first.own", "first.shared", "second.own", "head")
    shared = groups["first.shared"]
    assert shared.calls == 2
    assert shared.parameters[0].names == ("first.shared.weight", "second.shared.weight")
    assert any("first.shared ran 2 times" in note for note in groups.notes)


def test_a_block_that_loops_is_not_divided_and_the_unrun_is_placed_before_the_head() -> None:
    groups = groups_of(Twice(), X)
    assert groups.names == ("stem", "block", "spare", "auxiliary", "head")
    assert [g.calls for g in groups] == [1, 2, 0, 0, 1]
    assert groups.head == {"head"}
    assert any("block ran 2 times, on its own output" in n for n in groups.notes)
    assert any("never ran" in n and "spare, auxiliary" in n for n in groups.notes)


def test_an_encoder_that_runs_on_two_inputs_is_divided() -> None:
    groups = groups_of(Towers(), X, X)
    assert groups.names == ("encoder.0", "encoder.2", "head")
    assert [g.calls for g in groups] == [2, 2, 1]


def test_tied_weights_are_one_group_under_all_names() -> None:
    groups = groups_of(Tied(), torch.ones(2, 5, dtype=torch.long))
    assert groups.names == ("embedding", "body")
    (tied,) = groups["embedding"].parameters
    assert tied.names == ("output.weight", "embedding.weight")
    assert tied.kind == "embedding"
    assert any("tied weights" in note for note in groups.notes)


def test_a_branch_not_taken_is_reported_not_guessed_about() -> None:
    groups = groups_of(Conditional(), X)
    assert groups.names == ("stem", "positive", "negative", "head")
    assert groups["negative"].calls == 0
    assert any("never ran" in n and "negative" in n for n in groups.notes)


def test_stages_are_divided_to_blocks_and_blocks_stay_whole() -> None:
    groups = groups_of(Staged(), X)
    assert groups.names == (
        "backbone.stages.0.change",
        "backbone.stages.0.blocks.0",
        "backbone.stages.0.blocks.1",
        "backbone.stages.1.change",
        "backbone.stages.1.blocks.0",
        "head",
    )
    last = groups["backbone.stages.1.blocks.0"]
    assert "final_norm.weight" in last.parameter_names
    names = [m.name for m in last.modules]
    assert "backbone.stages.1.blocks" in names  # holds nothing else
    assert "backbone.stages.1" not in names  # spans two groups
    assert "backbone.stages.1.blocks.0.drop" in names


def test_parallel_modules_in_a_block_do_not_divide_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Parallel(8), Parallel(8), nn.Linear(8, 2))
    assert groups_of(model, X).names == ("0", "1", "2", "3")


def test_lists_and_twins_divide_a_module_that_does_not_repeat() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.convs:
                x = conv(x)
            return x

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Residual(4), Residual(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = nn.Sequential(Encoder(), Twins(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    names = groups_of(model, X).names
    assert names == ("0.convs.0", "0.convs.1", "0.convs.2", "1.one", "1.two", "2", "3", "4")


def test_a_small_model_is_divided_further() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    model = nn.Sequential(Net(), nn.ReLU(), nn.Linear(4, 2))
    assert groups_of(model, X).names == ("0.a", "0.b", "0.c", "2")


def test_rescaling_weights_in_place_is_no_use_of_them() -> None:
    assert groups_of(Rescaled(), X).names == ("stem", "head")


def test_parametrised_and_recurrent_layers() -> None:
    groups = groups_of(Weighted(), torch.ones(2, 3, 6))
    assert groups.names == ("conv", "rnn", "out")
    assert next(m.type for m in groups["conv"].modules if m.name == "conv") == "Conv1d"
    kinds = {p.name: p.kind for p in groups["rnn"].parameters}
    assert kinds["rnn.weight_ih_l0"] == "weight"
    assert kinds["rnn.bias_hh_l1"] == "bias"


def test_a_replaced_module_is_noted() -> None:
    groups = groups_of(Swapper(), X)
    assert groups.names == ("inner", "head")
    assert any("adds or replaces modules: inner" in note for note in groups.notes)


def test_norms_join_the_layer_before_and_share_its_group() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    groups = groups_of(model, torch.ones(2, 3, 8, 8))
    assert groups.names == ("1", "5", "8")
    assert [m.name for m in groups["1"].modules] == ["0", "1", "2", "3", "4"]
    assert [m.name for m in groups["5"].modules] == ["5", "6", "7"]
    assert {b.kind for b in groups["1"].buffers} == {"norm"}


def test_a_root_that_is_one_layer() -> None:
    groups = groups_of(nn.Linear(4, 2), X)
    assert groups.names == ("Linear",)
    assert [m.name for m in groups[0].modules] == [""]


def test_only_norms_make_one_group() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.LayerNorm(4))
    assert groups_of(model, X).names == ("0",)


def test_boundaries_set_the_groups_and_the_rest_is_found() -> None:
    model = Staged()
    groups = groups_of(model, X, boundaries=["backbone.stages.*"])
    assert groups.names == ("backbone.stages.0", "backbone.stages.1", "head")
    finer = groups_of(model, X, boundaries=["backbone.stages.0.blocks.0.layers.*"])
    assert finer.names[:4] == (
        "backbone.stages.0.change",
        "backbone.stages.0.blocks.0.layers.0",
        "backbone.stages.0.blocks.0.layers.1",
        "backbone.stages.0.blocks.1",
    )


def test_the_head_can_be_told() -> None:
    groups = groups_of(Staged(), X, head="backbone.stages.1.*")
    assert groups.head == {"backbone.stages.1.change", "backbone.stages.1.blocks.0"}
    assert groups_of(Twice(), X, head="auxiliary").head == {"auxiliary"}


def test_a_norm_of_the_head_does_not_join_the_backbone() -> None:
    model = Staged()
    groups = groups_of(model, X, head="final_norm")
    assert groups.head == {"final_norm"}
    assert groups["final_norm"].parameter_names == {"final_norm.weight", "final_norm.bias"}


@pytest.mark.parametrize("options", [{"boundaries": ["backbome*"]}, {"head": "haed"}])
def test_a_glob_that_matches_nothing_raises(options: dict[str, object]) -> None:
    with pytest.raises(SelectorMatchedNothing, match=r"backbone|head"):
        groups_of(Staged(), X, **options)


def test_models_that_cannot_be_divided_say_why() -> None:
    with pytest.raises(ModelError, match="without parameters"):
        layer_groups(nn.ReLU(), Example(args=(X,)))
    with pytest.raises(ModelError, match="lazy parameters"):
        layer_groups(nn.Sequential(nn.LazyLinear(3)), Example(args=(X,)))
    with pytest.raises(ModelError, match="meta device"):
        layer_groups(nn.Linear(3, 3, device="meta"), Example(args=(X,)))
    with pytest.raises(ModelError, match=r"\(2, 4\) float32"):
        layer_groups(nn.Linear(3, 3), Example(args=(X,)))


def test_a_failing_forward_leaves_the_model_untouched_too() -> None:
    class Fails(Meddler):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("boom")

    model = Fails()
    before = picture(model)
    with pytest.raises(ModelError, match="boom"):
        layer_groups(model, Example(args=(X.clone(),)))
    assert picture(model) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_graphs_and_scripts_are_divided() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for other in (
        torch.fx.symbolic_trace(model),
        torch.jit.script(model),
        torch.jit.trace(model, X),
    ):
        assert groups_of(other, X).names == ("0", "2")


def test_compiled_models_are_divided_as_they_are_written() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    compiled = torch.compile(model, backend="eager")
    assert groups_of(compiled, X).names == ("_orig_mod.0", "_orig_mod.2")
    model.compile(backend="eager")
    assert groups_of(model, X).names == ("0", "2")


def test_every_order_of_definition_gives_the_same_groups() -> None:
    def chain(order: list[int]) -> nn.Module:
        class Chain(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                for i in range(4):
                    x = getattr(self, f"layer{i}")(x)
                return x

        model = Chain()
        for i in order:
            model.add_module(f"layer{i}", nn.Linear(4, 4))
        return model

    for _ in range(5):
        order = random.sample(range(4), 4)
        assert groups_of(chain(order), X).names == ("layer0", "layer1", "layer2", "layer3")


class Random(nn.Module):
    """Runs some of its children, in an order of its own, some twice."""

    def __init__(self, children: list[nn.Module], order: list[int], loose: bool) -> None:
        super().__init__()
        for i, child in enumerate(children):
            self.add_module(f"part{i}", child)
        self.order = order
        self.loose = nn.Parameter(torch.ones(1, 4)) if loose else None

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self._modules.values())
        for i in self.order:
            x = parts[i % len(parts)](x)
        return x if self.loose is None else x * self.loose


LEAVES = st.sampled_from(
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.LayerNorm(4),
        lambda: nn.BatchNorm1d(4),
        nn.ReLU,
        nn.Dropout,
        lambda: nn.PReLU(4),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ]
).map(lambda make: make())


def _nested(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    some = st.lists(children, min_size=1, max_size=4)
    return st.one_of(
        some.map(lambda parts: nn.Sequential(*parts)),
        st.builds(Random, some, st.lists(st.integers(0, 3), max_size=5), st.booleans()),
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_models_are_divided_completely(data: st.DataObject) -> None:
    model = data.draw(st.recursive(LEAVES, _nested, max_leaves=12).map(nn.Sequential))
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(layers) > 1 and data.draw(st.booleans()):
        layers[-1].bias = layers[0].bias  # tied
    if not any(True for _ in model.parameters()):
        return
    before = picture(model)
    groups = groups_of(model, X)
    assert picture(model) == before
    assert [g.depth for g in groups] == list(range(len(groups)))
    if any(g.calls and g.parameters for g in groups):  # else no group that ran can be a head
        assert all(groups[name].calls for name in groups.head)


@given(order=st.permutations(range(5)))
@settings(max_examples=20, deadline=None)
def test_depth_follows_the_order_of_execution(order: list[int]) -> None:
    model = Random([nn.Linear(4, 4) for _ in range(5)], list(order), loose=False)
    assert groups_of(model, X).names == tuple(f"part{i}" for i in order)
