"""Held modules stay in evaluation mode whoever calls what, and nobody else notices."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from backends.torch.helpers import Net, groups_of
from frostline.backends.torch.modes import HeldModes, is_held
from frostline.errors import BackendError
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo
from frostline.plan import FreezePlan

SHALLOW = FreezePlan(frozen=frozenset({"blocks.0", "blocks.1"}))


def held_net(plan: FreezePlan = SHALLOW) -> tuple[Net, HeldModes]:
    model = Net()
    modes = HeldModes(model, groups_of(model))
    modes.apply(plan)
    return model, modes


def training(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if m.training}


FROZEN = {
    "blocks.0", "blocks.0.fc", "blocks.0.norm", "blocks.0.drop",
    "blocks.1", "blocks.1.fc", "blocks.1.norm", "blocks.1.drop",
}  # fmt: skip


def everything() -> set[str]:
    return {name for name, _ in Net().named_modules()}


@pytest.mark.parametrize("calls", [["train"], ["eval", "train"], ["train", "train"]])
def test_frozen_modules_stay_in_eval_through_train(calls: list[str]) -> None:
    model, _ = held_net()
    for call in calls:
        getattr(model, call)()
    assert training(model) == everything() - FROZEN


def test_eval_reaches_every_module() -> None:
    model, _ = held_net(FreezePlan(frozen=frozenset({"blocks.0"}), live_norm={"blocks.0"}))
    assert "blocks.0.norm" in training(model)
    model.eval()
    assert training(model) == set()


def test_train_on_a_part_of_the_model_keeps_the_hold() -> None:
    model, _ = held_net()
    model.blocks.train()
    model.blocks[0].train()
    model.blocks[0].norm.train()
    assert training(model) == everything() - FROZEN


@pytest.mark.parametrize(
    ("switches", "live"),
    [
        ({"live_norm": {"blocks.0"}}, {"blocks.0.norm"}),
        ({"live_dropout": {"blocks.0"}}, {"blocks.0", "blocks.0.fc", "blocks.0.drop"}),
        ({"live_norm": {"blocks.0"}, "live_dropout": {"blocks.0"}},
         {"blocks.0", "blocks.0.fc", "blocks.0.drop", "blocks.0.norm"}),
    ],
)  # fmt: skip
def test_norm_and_dropout_are_two_switches(switches: dict, live: set[str]) -> None:
    model, _ = held_net(FreezePlan(frozen=frozenset({"blocks.0"}), **switches))
    model.train()
    frozen = {name for name in FROZEN if name.startswith("blocks.0")}
    assert training(model) == everything() - (frozen - live)


def test_the_root_is_never_held() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    info = LayerGroup("all", 0, (), (), (ModuleInfo("", "Sequential"), ModuleInfo("1", "Dropout")))
    modes = HeldModes(model, LayerGroups((info,)))
    modes.apply(FreezePlan(frozen=frozenset({"all"})))
    model.train()
    assert training(model) == {"", "0"}


@pytest.mark.parametrize("mode", [True, False])
def test_release_gives_the_mode_of_the_model_and_leaves_no_trace(mode: bool) -> None:
    model, modes = held_net()
    model.train(mode)
    modes.apply(FreezePlan())
    assert training(model) == (everything() if mode else set())
    assert not any("train" in vars(m) for m in model.modules())
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in Net().modules()]


def test_applying_does_not_depend_on_what_another_holder_did() -> None:
    model, _ = held_net()
    other = HeldModes(model, groups_of(model))
    other.apply(FreezePlan(frozen=frozenset({"blocks.1"})))
    model.train()
    assert training(model) == everything() - {n for n in FROZEN if n.startswith("blocks.1")}


def test_setting_the_flag_by_hand_is_found_and_put_back() -> None:
    model, modes = held_net()
    assert modes.restore() == []
    for module in model.modules():  # as trainers do when they put saved modes back
        module.training = True
    assert set(modes.restore()) == FROZEN
    assert training(model) == everything() - FROZEN
    assert modes.restore() == []


def test_a_deep_copy_is_held_by_itself() -> None:
    model, modes = held_net()
    twin = copy.deepcopy(model)
    twin.train()
    assert training(twin) == everything() - FROZEN
    modes.apply(FreezePlan())
    model.eval()
    twin.train()
    assert training(model) == set()
    assert training(twin) == everything() - FROZEN
    HeldModes(twin, groups_of(twin)).apply(FreezePlan())
    assert training(twin) == everything()


def test_a_pickled_model_comes_back_as_a_plain_one() -> None:
    model, _ = held_net()
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301 (written two lines above)
    assert training(twin) == everything() - FROZEN
    assert not any(is_held(m) for m in twin.modules())
    assert b"frostline" not in pickle.dumps(model).replace(b"backends.torch.helpers", b"")
    twin.train()
    assert training(twin) == everything()


def test_a_saved_model_loads(tmp_path: Path) -> None:
    model, _ = held_net()
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert twin.state_dict().keys() == Net().state_dict().keys()


def test_state_dict_is_that_of_the_plain_model() -> None:
    model, _ = held_net()
    assert list(model.state_dict()) == list(Net().state_dict())
    Net().load_state_dict(model.state_dict())


def test_a_compiled_model_holds_too() -> None:
    model, _ = held_net()
    compiled = torch.compile(model, backend="eager")
    compiled.train()
    assert training(model) == everything() - FROZEN
    before = model.blocks[0].norm.running_mean.clone()
    compiled(torch.randn(4, 6))
    assert torch.equal(model.blocks[0].norm.running_mean, before)
    assert not torch.equal(model.blocks[2].norm.running_mean, torch.zeros(8))


class Stubborn(nn.Linear):
    """Counts calls of `train`, as models with their own override do."""

    calls = 0

    def train(self, mode: bool = True) -> Stubborn:
        self.calls += 1
        return super().train(mode)


def test_an_override_of_train_still_runs() -> None:
    model = nn.Sequential(Stubborn(2, 2), nn.Linear(2, 2))
    modes = HeldModes(model, groups_of(model, ("0", "1")))
    modes.apply(FreezePlan(frozen=frozenset({"0"})))
    model.train()
    assert model[0].calls == 1
    assert not model[0].training


def test_a_train_that_somebody_else_put_on_the_instance_comes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen: list[bool] = []
    model[0].train = seen.append
    theirs = model[0].train
    modes = HeldModes(model, groups_of(model, ("0", "1")))
    modes.apply(FreezePlan(frozen=frozenset({"0"})))
    model.train()
    assert seen == [True]
    assert not model[0].training
    modes.apply(FreezePlan())
    assert model[0].train is theirs
    assert "_frostline_outer_train" not in vars(model[0])


def test_a_module_that_is_not_there_is_an_error() -> None:
    info = LayerGroup("a", 0, (), (), (ModuleInfo("gone", "Linear"),))
    with pytest.raises(BackendError, match="'gone'"):
        HeldModes(nn.Linear(1, 1), LayerGroups((info,)))
