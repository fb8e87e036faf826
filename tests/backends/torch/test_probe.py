"""What signals read of a model, that it is true, and that reading leaves no trace."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR

from backends.torch.helpers import NET_GROUPS, Net, TorchCase, batch, bits, groups_of, model_bits
from frostline.backends.torch.backend import TorchBackend
from frostline.backends.torch.checkpoint import load_checkpoint, save_checkpoint
from frostline.backends.torch.trees import pack, unpack
from frostline.errors import BackendError, PolicyError
from frostline.plan import FreezePlan
from frostline.testing import check_backend
from torch_cases import picture

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd-slow": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adamw-tensor-lr": lambda p: AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adam-l2": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
}


class Case(TorchCase):
    """`Net` under another optimizer, one parameter group per layer group."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        parts = (*self.model.blocks, self.model.head)
        self.optimizer: Any = make([{"params": list(m.parameters())} for m in parts])
        self.backend = TorchBackend(self.model, self.optimizer, groups=groups_of(self.model))


def state_bits(case: Case) -> dict[str, Any]:
    """Everything that the optimizer remembers, by parameter name."""
    return {
        name: {k: (bits({k: v}) if isinstance(v, Tensor) else v) for k, v in state.items()}
        for name, p in case.model.named_parameters()
        if (state := case.optimizer.state.get(p)) is not None
    }


# -- updates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_contract_holds_under(name: str) -> None:
    check_backend(lambda: Case(OPTIMIZERS[name]))


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_the_one_the_optimizer_then_makes(name: str, updates: int) -> None:
    case = Case(OPTIMIZERS[name])
    for _ in range(updates):
        case.backward()
        case.update()
    case.backward()
    evidence, state, options = case.evidence(), state_bits(case), _options(case.optimizer)
    probe = case.backend.probe()
    planned = [u for g in case.backend.groups for u in probe.update(g)]
    assert case.evidence() == evidence
    assert state_bits(case) == state
    assert _options(case.optimizer) == options
    names = [p.name for g in case.backend.groups for p in g.parameters]
    before = {n: case.model.get_parameter(n).detach().clone() for n in names}
    case.update()
    for parameter, update in zip(names, planned, strict=True):
        real = case.model.get_parameter(parameter).detach() - before[parameter]
        assert torch.equal(update, real), parameter


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: str(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def test_an_update_calls_no_hook_and_counts_for_no_scheduler() -> None:
    case, called = Case(OPTIMIZERS["sgd"]), []
    StepLR(case.optimizer, 1)
    case.optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    case.optimizer.register_step_post_hook(lambda *_: called.append("after"))
    step = case.optimizer.step
    case.backward()
    attributes = {k: copy.copy(v) for k, v in vars(case.optimizer).items() if k != "state"}
    case.backend.probe().update(case.backend.groups[0])
    assert called == []
    assert case.optimizer.step == step
    assert not getattr(case.optimizer, "_opt_called", False)
    assert {k: v for k, v in vars(case.optimizer).items() if k != "state"} == attributes


def test_an_update_knows_no_factor_of_the_plan() -> None:
    plain, scaled = Case(OPTIMIZERS["sgd"]), Case(OPTIMIZERS["sgd"])
    scaled.backend.apply(FreezePlan(lr_scale=dict.fromkeys(NET_GROUPS, 0.5)))
    found: list[list[Tensor]] = []
    for case in (plain, scaled):
        case.backward()
        # As seen by somebody who samples inside the update, after the rates are scaled.
        case.optimizer.register_step_pre_hook(
            lambda *_, case=case: found.append(
                [
                    *case.backend.probe().update(case.backend.groups[1]),
                    torch.tensor(case.backend.probe().learning_rate(case.backend.groups[1])),
                ]
            )
        )
        case.update()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert float(found[0][-1]) == pytest.approx(0.1)


def test_an_update_that_fails_half_way_changes_nothing() -> None:
    class Fragile(SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1)
                    self.state[p]["seen"] = True
            raise ZeroDivisionError

    case = Case(lambda p: Fragile(p, lr=0.1))
    case.backward()
    before = case.evidence()
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        case.backend.probe().update(case.backend.groups[0])
    assert case.evidence() == before
    assert not case.optimizer.state


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = nn.Linear(2, 1)
    backend = TorchBackend(model, LBFGS(model.parameters()), groups=groups_of(model, ("",)))
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(BackendError, match=r"next update of a LBFGS[\s\S]*closure"):
        backend.probe().update(backend.groups[0])


def test_an_optimizer_that_writes_to_gradients_and_draws_numbers_leaves_both() -> None:
    class Noisy(SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.add_(torch.randn_like(p))
                    p.data.add_(p.grad, alpha=-group["lr"])

    case = Case(lambda p: Noisy(p, lr=0.1))
    case.backward()
    before = case.evidence()
    assert case.backend.probe().update(case.backend.groups[0])[0] is not None
    assert case.evidence() == before


def test_half_precision_updates_are_in_single_precision() -> None:
    model = nn.Linear(2, 1, dtype=torch.bfloat16)
    backend = TorchBackend(model, SGD(model.parameters(), 1.0), groups=groups_of(model, ("",)))
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    probe, group = backend.probe(), backend.groups[0]
    for arrays in (probe.update(group), probe.gradients(group), probe.weights(group)):
        assert [a.dtype for a in arrays] == [torch.float32] * 2


# -- arrays and numbers ----------------------------------------------------------------------


def test_gradients_weights_and_updates_stay_in_line() -> None:
    model = Net()
    model.head.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    model.head.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = SGD(model.parameters(), 0.1)
    backend = TorchBackend(model, optimizer, groups=groups_of(model))
    x, y = batch(0)
    (nn.functional.cross_entropy(model(x), y) + model.head.wave.abs().sum()).backward()
    model.head.bias.grad = None
    probe, head = backend.probe(), backend.groups["head"]
    names = [p.name for p in head.parameters if not p.name.endswith("table")]
    for arrays in (probe.gradients(head), probe.weights(head), probe.update(head)):
        assert len(arrays) == len(names)
    assert [a is None for a in probe.gradients(head)] == [n == "head.bias" for n in names]
    assert not any(a.requires_grad for a in (*probe.weights(head), probe.gradients(head)[0]))
    wave = model.head.wave.detach()
    assert probe.dot([wave, None], [wave, wave]) == pytest.approx(2)
    assert probe.norm([wave], 1) == pytest.approx(2)


def test_the_largest_rate_of_a_unit_counts() -> None:
    model = Net()
    groups = [
        {"params": model.blocks.parameters(), "lr": 0.1},
        {"params": [model.head.weight], "lr": torch.tensor(0.5)},
        {"params": [model.head.bias], "lr": 0.25},
    ]
    backend = TorchBackend(model, SGD(groups), groups=groups_of(model))
    rates = [backend.probe().learning_rate(g) for g in backend.groups]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.5])


def test_without_an_optimizer_there_are_no_rates_and_updates() -> None:
    model = Net()
    probe = TorchBackend(model, groups=groups_of(model)).probe()
    for ask in (probe.learning_rate, probe.update):
        with pytest.raises(BackendError, match="no optimizer"):
            ask(groups_of(model)[0])


def test_a_loss_that_nobody_gave_is_asked_for() -> None:
    model = Net()
    backend = TorchBackend(model, groups=groups_of(model))
    assert backend.probe(0.5).loss() == 0.5
    with pytest.raises(PolicyError, match=r"driver\.sample\(loss=\.\.\.\)"):
        backend.probe().loss()


def test_matrices_are_weights_seen_by_their_first_dimension() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 5), nn.Conv2d(3, 1, 1, dtype=torch.bfloat16))
    backend = TorchBackend(model, groups=groups_of(model, ("0", "1")))
    (matrix,) = backend.probe().matrices(backend.groups[0])
    flat = model[0].weight.detach().reshape(3, 50)
    assert (matrix.rows, matrix.columns) == (3, 50)
    expected = torch.linalg.eigvalsh((flat @ flat.T).double()).flip(0).sqrt().tolist()
    assert matrix.singular == pytest.approx(expected, rel=1e-4)
    assert len(backend.probe().matrices(backend.groups[1])[0].singular) == 1


# -- activations -----------------------------------------------------------------------------


def kept(model: nn.Module, *args: Any, groups: Any = None, **kwargs: Any) -> TorchBackend:
    """A backend that has kept this batch as its probe batch."""
    backend = TorchBackend(model, groups=groups or groups_of(model))
    backend.keep_batch()
    model.train()
    model(*args, **kwargs)
    return backend


def test_activations_are_those_of_evaluation_mode() -> None:
    model, (x, _) = Net(), batch(0)
    backend = kept(model, x)
    model.eval()
    with torch.no_grad():
        expected = [model.blocks[0](x)]
        expected += [model.blocks[1](expected[-1])]
        expected += [model.blocks[2](expected[-1])]
        expected += [model.head(expected[-1])]
    model.train()
    before = picture(model)
    probe = backend.probe()
    for group, output in zip(backend.groups, expected, strict=True):
        torch.testing.assert_close(probe.activations(group), output, rtol=0, atol=0)
    assert picture(model) == before


def test_one_forward_pass_serves_all_groups_of_a_probe() -> None:
    model, calls = Net(), []
    backend = kept(model, batch(0)[0])
    model.register_forward_hook(lambda *_: calls.append(1))
    probe = backend.probe()
    for _ in range(2):
        for group in backend.groups:
            probe.activations(group)
    assert calls == [1]
    backend.probe().activations(backend.groups[0])
    assert calls == [1, 1]


def test_the_batch_is_the_first_of_training_and_a_copy() -> None:
    model, x = Net(), batch(0)[0].clone()
    backend = TorchBackend(model, groups=groups_of(model))
    backend.keep_batch()
    backend.keep_batch()
    model.eval()
    model(batch(5)[0])
    assert backend.kept() is None
    model.train()
    model(x)
    assert not model._forward_pre_hooks
    x.zero_()
    model(batch(1)[0])
    backend.keep_batch()
    model(batch(2)[0])
    assert torch.equal(backend.kept()["args"][0], batch(0)[0])


def test_without_a_batch_activations_are_refused() -> None:
    model = Net()
    backend = TorchBackend(model, groups=groups_of(model))
    with pytest.raises(BackendError, match="no probe batch"):
        backend.probe().activations(backend.groups[0])


def test_8_bit_activations_use_rounded_weights_and_leave_the_model() -> None:
    model, (x, _) = Net(), batch(0)
    backend = kept(model, x)
    before = picture(model)
    found = backend.probe().activations(backend.groups["head"], int8=True)
    assert picture(model) == before
    rounded = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in rounded.parameters():
            if p.ndim > 1:
                step = p.abs().amax(1, keepdim=True) / 127
                p.copy_((p / step).round() * step)
        torch.testing.assert_close(found, rounded(x))
        assert not torch.allclose(found, model.eval()(x), atol=1e-6)


class Named(nn.Module):
    """Takes its inputs in one object, by attribute and by item, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, given: Any, *, pair: Any, times: int = 1) -> dict[str, Any]:
        x = given.x + (given["x"] if isinstance(given, dict | UserDict) else given.x)
        hidden = self.body(x + pair[0] + pair[1]["more"]).relu_()
        return {"times": times, "hidden": (hidden,), "logits": self.head(hidden) * times}


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like the output of a tokenizer."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


@dataclass
class Fields:
    """Inputs in a dataclass."""

    x: Tensor


@pytest.mark.parametrize("wrap", [lambda x: Encoding({"x": x}), Fields], ids=["mapping", "fields"])
def test_nested_inputs_are_kept_and_survive_a_checkpoint(wrap: Any) -> None:
    model, x = Named(), torch.randn(3, 4)
    groups = groups_of(model, ("body", "head"))
    pair = (x, {"more": x * 2})
    backend = kept(model, wrap(x), pair=pair, times=3, groups=groups)
    tensors: dict[str, Tensor] = {}
    tree = pack(backend.kept(), "batch", tensors)
    other = TorchBackend(model, groups=groups)
    other.restore_kept(unpack(tree, tensors))
    with torch.no_grad():
        expected = model.eval()(wrap(x), pair=pair, times=3)
    for each in (backend, other):
        found = each.probe().activations(groups["head"])
        torch.testing.assert_close(found * 3, expected["logits"], rtol=0, atol=0)


def test_what_later_layers_write_in_place_is_not_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)))
    x = torch.randn(5, 4)
    backend = kept(model, x, groups=groups_of(model, ("0", "1")))
    found = backend.probe().activations(backend.groups[0])
    torch.testing.assert_close(found, model[0](x).detach())


class Sequences(nn.Module):
    """Sequence first, samples laid in a row, and a group that puts out nothing of use."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 5)
        self.rows = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)
        self.offset = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:  # (samples, length, 4)
        states = self.rnn(x.transpose(0, 1))[0].transpose(0, 1)
        rows = self.rows(states.reshape(-1, 5))
        return self.head(rows.reshape(len(x), -1, 5)[:, -1]) + self.offset


def test_samples_are_found_wherever_they_lie() -> None:
    model, x = Sequences(), torch.randn(3, 7, 4)
    groups = groups_of(model, ("rnn", "rows", "head", "offset"))
    backend = kept(model, x, groups=groups)
    probe = backend.probe()
    assert [tuple(probe.activations(groups[g]).shape) for g in ("rnn", "rows", "head")] == [
        (3, 35), (3, 35), (3, 2),
    ]  # fmt: skip
    with torch.no_grad():
        one = model.rnn(x[1:2].transpose(0, 1))[0].reshape(-1)
    torch.testing.assert_close(probe.activations(groups["rnn"])[1], one)
    with pytest.raises(BackendError, match="'offset'"):
        probe.activations(groups["offset"])


def test_a_model_that_cannot_run_in_evaluation_mode_says_so() -> None:
    class TrainsOnly(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise NotImplementedError
            return super().forward(x)

    backend = kept(TrainsOnly(), batch(0)[0])
    with pytest.raises(BackendError, match="NotImplementedError"):
        backend.probe().activations(backend.groups[0])
    assert backend.kept() is not None


def test_activations_are_computed_in_the_precision_of_training() -> None:
    model, (x, _) = Net(), batch(0)
    backend = TorchBackend(model, groups=groups_of(model))
    backend.keep_batch()
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x)
    outside = backend.probe().activations(backend.groups["head"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = backend.probe().activations(backend.groups["head"])
        expected = model.eval()(x).detach().float()
    assert outside.dtype == torch.float32
    assert torch.equal(outside, expected)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrapped_models_keep_the_batch_they_are_given(wrap: Any) -> None:
    model, (x, _) = Net(), batch(0)
    outer = wrap(model)
    backend = TorchBackend(outer, groups=groups_of(model))
    backend.keep_batch()
    outer.train()
    outer(x)
    found = backend.probe().activations(backend.groups["head"])
    torch.testing.assert_close(found, model.eval()(x).detach())


def test_a_model_that_was_compiled_and_run_before_keeps_its_batch() -> None:
    model, (x, _) = Net(), batch(0)
    compiled = torch.compile(model, backend="eager")
    compiled(batch(1)[0])
    backend = TorchBackend(compiled, groups=groups_of(model))
    backend.keep_batch()
    compiled(x)
    assert torch.equal(backend.kept()["args"][0], x)


def test_a_compiled_model_around_the_given_one_is_seen_through() -> None:
    model, (x, _) = Net(), batch(0)
    compiled = torch.compile(model, backend="eager")
    backend = TorchBackend(model, groups=groups_of(model))
    backend.keep_batch()
    compiled(x)
    compiled(batch(1)[0])
    assert torch.equal(backend.kept()["args"][0], x)


def test_named_tuples_keep_their_names() -> None:
    pair = namedtuple("pair", "x y")  # noqa: PYI024 - untyped on purpose

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2)

        def forward(self, given: Any) -> Tensor:
            return self.body(given.x + given.y)

    model = Takes()
    backend = kept(
        model, pair(torch.ones(2, 2), torch.ones(2, 2)), groups=groups_of(model, ("body",))
    )
    assert backend.probe().activations(backend.groups[0]).shape == (2, 2)


# -- widening, weights, release --------------------------------------------------------------


def test_a_widened_step_that_nobody_ends_moves_nothing_frozen() -> None:
    case = Case(OPTIMIZERS["sgd"])
    case.backward()
    case.update()
    frozen = FreezePlan(frozen=frozenset(NET_GROUPS[:2]))
    case.backend.apply(frozen)
    before, state = model_bits(case.model), state_bits(case)
    case.backend.widen()
    case.backward()
    assert case.has_gradient("blocks.0.fc.weight")
    case.update()
    after = model_bits(case.model)
    held = frozen.held_tensors(case.backend.groups)
    assert all(before[n] == after[n] for n in held)
    assert all(state_bits(case)[n] == state[n] for n in held if n in state)
    assert not case.model.blocks[0].fc.weight.requires_grad
    assert case.backend.hold() == ()


def test_fixed_parameters_are_not_widened() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), 0.1)
    backend = TorchBackend(model, optimizer, groups=groups_of(model), fixed=["blocks.0.fc.weight"])
    backend.apply(FreezePlan(frozen=frozenset({"blocks.0"})))
    backend.widen()
    assert not model.blocks[0].fc.weight.requires_grad
    assert model.blocks[0].fc.bias.requires_grad


def test_weights_that_do_not_fit_are_refused_before_any_is_written() -> None:
    case = Case(OPTIMIZERS["adamw"])
    weights = dict(case.backend.weights())
    before = model_bits(case.model)
    for wrong in ({}, weights | {"head.bias": torch.zeros(7)}):
        with pytest.raises(BackendError, match="load weights"):
            case.backend.load_weights({n: t + 1 for n, t in wrong.items()})
    assert model_bits(case.model) == before


@pytest.mark.parametrize("name", ["adamw", "adagrad", "sgd"])
def test_releasing_frees_state_and_training_again_starts_afresh(name: str) -> None:
    case = Case(OPTIMIZERS[name])
    case.backward()
    case.update()
    fresh = Case(OPTIMIZERS[name])
    frozen = frozenset({"blocks.0"})
    inside = {n for n, _ in case.model.named_parameters() if n.startswith("blocks.0")}
    case.backend.apply(FreezePlan(frozen=frozen))
    assert inside <= state_bits(case).keys()
    case.backend.apply(FreezePlan(frozen=frozen, released=frozen))
    assert not inside & state_bits(case).keys()
    case.backend.apply(FreezePlan())
    expected = {n: s for n, s in state_bits(fresh).items() if n in inside}
    assert {n: s for n, s in state_bits(case).items() if n in inside} == expected
    assert bool(expected) == (name == "adagrad")


def test_loading_weights_gives_eager_optimizers_their_first_state() -> None:
    case, fresh = Case(OPTIMIZERS["adagrad"]), Case(OPTIMIZERS["adagrad"])
    case.backward()
    case.update()
    case.backend.load_weights(fresh.backend.weights())
    assert state_bits(case) == state_bits(fresh)
    assert model_bits(case.model) == model_bits(fresh.model)


# -- rates alone -----------------------------------------------------------------------------


def test_a_change_of_rates_alone_is_light(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(OPTIMIZERS["sgd"])
    frozen = frozenset({"blocks.0"})
    case.backend.apply(FreezePlan(frozen=frozen))
    monkeypatch.setattr(TorchBackend, "_check_parameters", lambda _: pytest.fail("full path"))
    case.backend.apply(FreezePlan(frozen=frozen, lr_scale={"head": 0.0}))
    before = model_bits(case.model)
    case.backward()
    case.update()
    assert before["head.weight"] == model_bits(case.model)["head.weight"]
    assert before["blocks.1.fc.weight"] != model_bits(case.model)["blocks.1.fc.weight"]
    with pytest.raises(pytest.fail.Exception, match="full path"):
        case.backend.apply(FreezePlan(lr_scale={"head": 0.5}))


def test_rates_follow_optimizer_groups_that_were_added() -> None:
    case = Case(OPTIMIZERS["sgd"])
    case.backend.apply(FreezePlan(lr_scale={"head": 0.5}))
    case.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    case.backend.apply(FreezePlan(lr_scale={"head": 0.25}))
    case.backward()
    case.update()


# -- checkpoints -----------------------------------------------------------------------------


def test_a_checkpoint_carries_trees_of_tensors_bit_for_bit(tmp_path: Any) -> None:
    """A driver's state as leaves of its tree: what signals remember, the batch, best weights."""

    class Carrier:
        held = MappingProxyType[str, str]({})

        def __init__(self, state: Any = None) -> None:
            self.kept = state
            self.progress = type("Progress", (), {"step": 3})()

        def state(self) -> Any:
            return self.kept

        def restore(self, state: Any) -> None:
            self.kept = state

    source = torch.Generator().manual_seed(0)
    tree = {
        "memory": [{"g": {"total": [torch.randn(3, 2, generator=source), None], "n": 2}}],
        "best": {"value": -0.5, "weights": {"w": torch.tensor([1.5, float("nan")])}},
        "batch": {"args": (torch.arange(4), "text"), "kwargs": {}, "autocast": "bfloat16"},
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    model = nn.Linear(1, 1)
    save_checkpoint(tmp_path, model=model, driver=Carrier(tree))  # type: ignore[arg-type]
    found = Carrier()
    load_checkpoint(tmp_path, model=model, driver=found)  # type: ignore[arg-type]
    assert repr(_in_order(found.kept)) == repr(_in_order(tree))
    assert found.kept["half"].dtype == torch.bfloat16


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(item) for item in value] if isinstance(value, list) else value


def test_a_tensor_of_a_device_that_is_not_here_comes_to_main_memory() -> None:
    place = {"!": "tensor", "name": "t", "device": "cuda:97"}
    assert unpack(place, {"t": torch.ones(2)}).device.type == "cpu"
    assert "device" not in pack(torch.ones(1), "t", {})


class Unbuildable(SGD):
    """Takes an argument that it does not keep among its defaults."""

    def __init__(self, params: Any, lr: float, odd: int) -> None:
        super().__init__(params, lr=lr, momentum=0.9 + 0 * odd)


def test_an_optimizer_that_cannot_start_afresh_is_refused_before_a_phase_and_any_write() -> None:
    model = Net()
    groups = groups_of(model)
    backend = TorchBackend(model, Unbuildable(model.parameters(), 0.1, 1), groups=groups)
    with pytest.raises(BackendError, match="restore_best=false"):
        backend.apply(FreezePlan(keep_best="min val_loss"))
    before = model_bits(model)
    with pytest.raises(BackendError, match="restore_best=false"):
        backend.load_weights({n: t + 1 for n, t in backend.weights().items()})
    assert model_bits(model) == before


def test_loading_weights_leaves_what_an_optimizer_knows_of_other_models() -> None:
    model, other = Net(), nn.Linear(2, 2)
    optimizer = SGD([*model.parameters(), *other.parameters()], lr=0.1, momentum=0.9)
    backend = TorchBackend(model, optimizer, groups=groups_of(model))
    backend.apply(FreezePlan())
    (model(batch(0)[0]).sum() + other(torch.ones(1, 2)).sum()).backward()
    optimizer.step()
    backend.load_weights(backend.weights())
    assert not any(optimizer.state.get(p) for p in model.parameters())
    assert all(optimizer.state[p] for p in other.parameters())
