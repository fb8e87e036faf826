"""What modules and objects remember, and whether it changed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.frontier.state import (
    Settings,
    foreign_hooks,
    hook_tables,
    ignoring_known_hooks,
    is_foreign,
    state_of,
)


@dataclass
class Box:
    items: list[Any] = field(default_factory=list)


def changes(value: Any, change: Any) -> bool:
    before = state_of(value)
    assert state_of(value) == before  # a look changes nothing
    change()
    return state_of(value) != before


def test_writes_into_containers_show():
    for held in ([1], deque([1])):
        assert changes(held, lambda h=held: h.append(2))
    table = {"a": 1}
    assert changes(table, lambda: table.update(a=2))
    assert changes(table, lambda: table.update(b=1))
    names = {"a"}
    assert changes(names, lambda: names.add("b"))


def test_writes_into_tensors_show():
    tensor = torch.ones(2)
    assert changes(tensor, lambda: tensor.add_(1))
    assert changes([tensor], lambda: tensor.view(-1).mul_(1))  # a write of the same values, too
    box = [tensor]
    assert changes(box, lambda: box.__setitem__(0, torch.ones(2)))
    assert not changes(tensor, lambda: tensor + 1)


def test_changes_deep_inside_show():
    box = Box([{"a": [torch.ones(1)]}])
    assert changes(box, box.items[0]["a"][0].zero_)
    assert changes(box, lambda: box.items.append(1))


def test_a_ring_of_objects_ends():
    one, two = Box(), Box()
    one.items, two.items = [two], [one]
    assert state_of(one) == state_of(one)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.count = 0
        self.seen: list[int] = []
        self.latest: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))


def test_what_a_module_holds_shows():
    module = Odd()
    assert changes(module, lambda: setattr(module, "count", 1))
    assert changes(module, lambda: module.seen.append(1))
    assert changes(module, lambda: setattr(module, "latest", torch.ones(1)))
    assert changes(module, lambda: setattr(module, "fresh", 1))
    assert changes(module, lambda: module.calls.add_(1))
    assert changes(module, lambda: module.register_forward_hook(lambda *_: None))
    assert changes(module, lambda: setattr(module, "training", False))


def test_submodules_speak_for_themselves():
    module = Odd()
    assert not changes(module, lambda: setattr(module.inner, "tag", 1))
    vars(module)["other"] = nn.Linear(2, 2)  # held as a plain attribute: known by identity
    assert changes(module, lambda: vars(module).update(other=nn.Linear(2, 2)))


def test_an_override_of_forward_is_no_change():
    module = nn.Linear(2, 2)
    assert not changes(module, lambda: vars(module).update(forward=len))


# -- hooks -------------------------------------------------------------------------------------


def of_the_user(*_: Any) -> None:
    pass


def of(home: str) -> Any:
    def hook(*_: Any) -> None:
        pass

    hook.__module__ = home
    return hook


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_anywhere_inside_is_found(kind: str):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    assert foreign_hooks(model) == {}
    getattr(model[0][0], kind)(of_the_user)
    assert foreign_hooks(model) == dict.fromkeys(("", "0", "0.0"), "of_the_user")


def test_hooks_known_to_be_harmless_are_ignored_on_request():
    assert is_foreign(of_the_user)
    assert not is_foreign(of("frostline.probes"))
    known = of("transformers.utils.output_capturing")
    assert not is_foreign(known)
    with ignoring_known_hooks(ignore=False):
        assert is_foreign(known)
        assert not is_foreign(of("frostline.probes"))
        with ignoring_known_hooks(ignore=True):
            assert not is_foreign(known)
    assert not is_foreign(known)
    assert is_foreign(of("transformers.models.bert"))


def test_a_hook_that_is_an_object_belongs_where_its_class_does():
    class Hook:
        def __call__(self, *_: Any) -> None:
            pass

    assert is_foreign(Hook())
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(Hook())
    assert foreign_hooks(model)[""] == "Hook"


def test_hook_tables_are_the_modules_own():
    module = nn.Linear(2, 2)
    handle = module.register_forward_hook(of_the_user)
    assert [len(table) for table in hook_tables(module)] == [1, 0]
    handle.remove()
    assert [len(table) for table in hook_tables(module)] == [0, 0]


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: setattr(m[1], "p", 0.5), "drop.p"),
        (lambda m: setattr(m[1], "training", False), "drop.training"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 2))), "linear.weight"),
        (lambda m: setattr(m[0], "bias", None), "linear.bias"),
        (lambda m: delattr(m[1], "p"), "drop.p"),
        (lambda m: setattr(m[1], "p", "0.0"), "drop.p"),
        (lambda m: setattr(m[2], "running_mean", torch.zeros(2)), "norm.running_mean"),
        (lambda m: m.__setitem__(0, nn.Linear(2, 2)), "0"),
    ],
)
def test_a_changed_setting_is_named(change: Any, name: str):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.BatchNorm1d(2))
    settings = Settings({"": model, "linear": model[0], "drop": model[1], "norm": model[2]})
    assert settings.changed() is None
    change(model)
    assert settings.changed() == name


def test_a_tensor_replaced_by_its_equal_is_another():
    """Whoever writes into the new one is not seen by those who watch the old one."""
    module = nn.PReLU(1)
    settings = Settings({"relu": module})
    module.weight = nn.Parameter(module.weight.detach().clone())
    assert settings.changed() == "relu.weight"


def test_what_was_changed_back_is_unchanged():
    module = nn.Dropout(0.1)
    settings = Settings({"drop": module})
    module.p = 0.2
    module.p = 0.1
    assert settings.changed() is None


def test_values_written_in_place_are_no_settings():
    """They are watched by their version, see the cache."""
    module = nn.Linear(2, 2)
    settings = Settings({"linear": module})
    with torch.no_grad():
        module.weight.zero_()
    module.kept = object()  # type: ignore[assignment]
    assert settings.changed() is None


@pytest.mark.filterwarnings("ignore")  # TorchScript is being retired, and says so
def test_scripted_modules_have_no_tables_to_look_at():
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    assert Settings({"x": scripted}).changed() is None
