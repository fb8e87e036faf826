"""The backend holds the contract, and each rule of its own."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends.torch.helpers import (
    NET_GROUPS,
    Net,
    TorchCase,
    batch,
    groups_of,
    model_bits,
    moved,
    train_step,
)
from frostline.backends.torch.backend import TorchBackend, as_found
from frostline.backends.torch.example import Example
from frostline.errors import BackendError, PlanError
from frostline.plan import FreezePlan
from frostline.testing import check_backend


def plan(*frozen: str, **switches: Any) -> FreezePlan:
    return FreezePlan(frozen=frozenset(frozen), **switches)


def backend_of(model: nn.Module, **options: Any) -> TorchBackend:
    return TorchBackend(model, groups=groups_of(model), **options)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


# -- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["keep", "release"])
def test_the_contract_holds(choice: str) -> None:
    check_backend(lambda: TorchCase(optimizer_state=choice))


def test_groups_are_found_when_not_given() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    backend = TorchBackend(model)
    assert backend.groups.parameter_count == 30
    backend.apply(plan(backend.groups[0].name))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


# -- apply -----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model = Net()
    backend = backend_of(model)
    before = flags(model)
    for wrong in (plan(*NET_GROUPS), plan("neck")):
        with pytest.raises(PlanError):
            backend.apply(wrong)
    assert flags(model) == before


def test_a_tied_weight_is_frozen_under_all_its_names() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    groups = groups_of(model, ("0", "1", "2"))
    backend = TorchBackend(model, groups=groups)
    backend.apply(plan("0"))
    assert not model[2].weight.requires_grad
    assert model[2].bias.requires_grad
    same = backend.fingerprint(["0.weight", "2.weight"])
    assert same["0.weight"] == same["2.weight"]


def test_integer_parameters_never_train() -> None:
    model = Net()
    model.head.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    backend = TorchBackend(model, groups=groups_of(model))
    backend.apply(plan("blocks.0"))
    assert not model.head.table.requires_grad
    assert backend.hold() == ()


def test_parameters_found_frozen_are_reported_and_then_follow_the_plan(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net()
    model.blocks[1].requires_grad_(requires_grad=False)
    with caplog.at_level(logging.WARNING, "frostline"):
        backend = backend_of(model)
    assert "4 parameters did not require grad before" in caplog.text
    assert "fixed=" in caplog.text
    backend.apply(plan("blocks.0"))
    assert model.blocks[1].fc.weight.requires_grad
    caplog.clear()
    backend_of(model)
    assert not caplog.text  # what is frozen now, we froze


def test_fixed_parameters_never_train(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.blocks[1].fc.requires_grad_(requires_grad=False)
    with caplog.at_level(logging.WARNING, "frostline"):
        backend = backend_of(model, fixed=as_found(model))
    assert not caplog.text
    for wanted in (plan("blocks.0"), plan()):
        backend.apply(wanted)
        assert not model.blocks[1].fc.weight.requires_grad
        assert model.blocks[1].norm.weight.requires_grad


def test_fixing_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"fix the parameter 'head\.wait'"):
        backend_of(Net(), fixed=["head.wait"])


def test_groups_of_another_model_are_refused() -> None:
    bigger = Net()
    bigger.extra = nn.Linear(2, 2)
    with pytest.raises(BackendError, match=r"2 parameters of the model in no group: extra\.weight"):
        TorchBackend(bigger, groups=groups_of(Net()))
    with pytest.raises(BackendError, match=r"'blocks\.0\.fc\.weight'"):
        TorchBackend(nn.Linear(2, 2), groups=groups_of(Net()))


def test_a_parameter_replaced_behind_our_back_is_refused_at_the_next_plan() -> None:
    model = Net()
    backend = backend_of(model)
    backend.apply(plan("blocks.0"))
    model.head.weight = nn.Parameter(torch.zeros(3, 8))
    with pytest.raises(BackendError, match=r"replaced since .*head\.weight"):
        backend.apply(plan())


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_without_a_shape_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    groups = groups_of(nn.Sequential(nn.Linear(2, 2)), ("0",))
    with pytest.raises(BackendError, match="without a shape"):
        TorchBackend(model, groups=groups)


def test_wrapped_models_are_reached() -> None:
    model = Net()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        backend_of(model).apply(plan())
        TorchBackend(wrapped, groups=groups_of(model)).apply(plan("blocks.0"))
        assert not model.blocks[0].fc.weight.requires_grad


# -- hold ------------------------------------------------------------------------------------


def meddle(model: Net) -> None:
    model.requires_grad_(requires_grad=True)
    model.blocks[0].norm.bias.grad = torch.zeros(6)
    model.head.bias.requires_grad = False
    model.blocks[0].norm.training = True


def test_hold_restores_what_outsiders_changed_and_names_it() -> None:
    model = Net()
    backend = backend_of(model)
    backend.apply(plan("blocks.0"))
    before = flags(model)
    assert backend.hold() == ()
    meddle(model)
    assert set(backend.hold()) == {
        "blocks.0.fc.weight", "blocks.0.fc.bias", "blocks.0.norm.weight", "blocks.0.norm.bias",
        "head.bias", "blocks.0.norm",
    }  # fmt: skip
    assert flags(model) == before
    assert model.blocks[0].norm.bias.grad is None
    assert not model.blocks[0].norm.training
    assert backend.hold() == ()


def test_hold_leaves_gradients_of_what_trains() -> None:
    model = Net()
    backend = backend_of(model)
    backend.apply(plan("blocks.0"))
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = model.head.weight.grad
    assert backend.hold() == ()
    assert model.head.weight.grad is gradient


def test_before_the_first_plan_nothing_is_held() -> None:
    model = Net()
    model.requires_grad_(requires_grad=False)
    backend = backend_of(model)
    assert backend.hold() == ()
    assert backend.written() == ()
    assert not any(flags(model).values())


# -- the graph -------------------------------------------------------------------------------


def nodes(loss: Tensor) -> int:
    """Autograd nodes that backward would visit."""
    seen, todo = set(), deque([loss.grad_fn])
    while todo:
        node = todo.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(next_node for next_node, _ in node.next_functions)
    return len(seen)


def outputs(model: Net) -> tuple[dict[str, bool], int]:
    """Whether each block's output has a history, and the size of the whole graph."""
    recorded: dict[str, bool] = {}
    parts = {f"blocks.{i}": b for i, b in enumerate(model.blocks)} | {"head": model.head}
    handles = [
        part.register_forward_hook(
            lambda m, a, out, name=name: recorded.update({name: out.grad_fn is not None})
        )
        for name, part in parts.items()
    ]
    loss = model(batch(0)[0]).sum()
    for handle in handles:
        handle.remove()
    return recorded, nodes(loss)


def test_the_frozen_prefix_records_no_graph() -> None:
    model = Net()
    backend = backend_of(model)
    sizes = []
    for depth in range(4):
        backend.apply(plan(*NET_GROUPS[:depth]))
        recorded, size = outputs(model)
        assert recorded == {name: i >= depth for i, name in enumerate(NET_GROUPS)}
        sizes.append(size)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    backend.apply(plan())
    assert outputs(model)[1] == sizes[0]


def test_an_early_bias_that_trains_defeats_the_saving_and_is_named() -> None:
    model = Net()
    backend = backend_of(model)
    early = plan(*NET_GROUPS[:3], exempt={"blocks.0": frozenset({"blocks.0.fc.bias"})})
    backend.apply(early)
    assert all(outputs(model)[0].values())
    assert backend.explain(early) == (
        "blocks.0.fc.bias trains (8 values): backward runs through all 4 groups, 3 of them frozen"
    )


def test_an_early_bias_is_logged_when_the_plan_is_applied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = backend_of(Net())
    with caplog.at_level(logging.INFO, "frostline"):
        backend.apply(plan("blocks.0", "blocks.1"))
        assert "backward runs" not in caplog.text
        backend.apply(plan("blocks.0", exempt={"blocks.0": frozenset({"blocks.0.fc.bias"})}))
    assert "blocks.0.fc.bias trains (8 values)" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (plan(), "backward runs through all 4 groups"),
        (plan(*NET_GROUPS[:3]), "backward runs through 1 of 4 groups; the 3 before head record no"),
        (plan("head"), "(68 values): backward runs through all 4 groups, 1 of them frozen"),
        (plan(*NET_GROUPS[:2], "head"), "backward runs through 2 of 4 groups, 1 of them frozen"),
    ],
)
def test_plans_are_explained(wanted: FreezePlan, expected: str) -> None:
    assert expected in backend_of(Net()).explain(wanted)


def test_fixed_parameters_are_not_said_to_train() -> None:
    model = Net()
    body = [n for n, _ in model.named_parameters() if not n.startswith("head")]
    text = backend_of(model, fixed=body).explain(plan())
    assert text == "backward runs through 1 of 4 groups; the 3 before head record no graph"


def test_an_input_that_requires_grad_is_found_with_the_number() -> None:
    model = Net()
    backend = backend_of(model)
    wanted = plan(*NET_GROUPS[:3])
    backend.apply(wanted)
    before = model_bits(model)
    still = Example((batch(0)[0],))
    assert "requires grad" not in backend.explain(wanted, still)
    asking = Example((batch(0)[0].requires_grad_(),))
    assert "3 of the frozen groups, from blocks.0 on, record a graph" in backend.explain(
        wanted, asking
    )
    handle = model.blocks[1].register_forward_hook(lambda m, a, out: out.requires_grad_())
    assert "2 of the frozen groups, from blocks.1 on" in backend.explain(wanted, still)
    handle.remove()
    assert model_bits(model) == before
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


# -- probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_probe_values(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    backend = backend_of(model)
    backend.apply(plan("blocks.0"))
    x, y = batch(0)
    nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
    probe, groups = backend.probe(), backend.groups
    flat = torch.cat([p.grad.double().flatten() for p in model.head.parameters()])
    found = probe.gradients(groups["head"])
    assert probe.norm(found, 1) == pytest.approx(float(flat.abs().sum()), rel=1e-5)
    assert probe.norm(found, 2) == pytest.approx(float(flat.norm()), rel=1e-5)
    weights = torch.cat([p.detach().double().flatten() for p in model.blocks[0].parameters()])
    own = probe.weights(groups["blocks.0"])
    assert probe.norm(own, 2) == pytest.approx(float(weights.norm()), rel=1e-5)
    assert probe.gradients(groups["blocks.0"]) == [None] * 4
    assert probe.norm([None] * 4, 2) == probe.norm([], 1) == 0


def test_half_precision_norms_do_not_overflow() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float16), nn.Linear(4, 1))
    backend = TorchBackend(model, groups=groups_of(model, ("0", "1")))
    model[0].weight.grad = torch.full((4, 4), 60000.0, dtype=torch.float16)
    probe = backend.probe()
    found = probe.norm(probe.gradients(backend.groups[0]), 2)
    assert found == pytest.approx(240000, rel=1e-3)


def test_sparse_gradients_are_probed() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    backend = TorchBackend(model, groups=groups_of(model, ("0", "1")))
    model(torch.tensor([1, 1, 3])).sum().backward()
    dense = model[0].weight.grad.to_dense()
    probe = backend.probe()
    (found,) = probe.gradients(backend.groups[0])
    torch.testing.assert_close(found, dense)
    assert not model[0].weight.grad.is_coalesced()


# -- compiled models -------------------------------------------------------------------------


def test_a_compiled_graph_follows_every_change_of_plan() -> None:
    model, plain = Net(dropout=0.0), Net(dropout=0.0)
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain)]
    backends = [backend_of(m) for m in (model, plain)]
    for step, frozen in enumerate([(), NET_GROUPS[:2], (), NET_GROUPS[2:3], NET_GROUPS[:2]]):
        for backend in backends:
            backend.apply(plan(*frozen))
        before = model_bits(model)
        train_step(compiled, optimizers[0], step)
        train_step(plain, optimizers[1], step)
        held = plan(*frozen).held_tensors(backends[0].groups)
        assert not held & moved(before, model_bits(model))
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
