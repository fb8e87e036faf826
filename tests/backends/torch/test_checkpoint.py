"""A resumed loop equals the uninterrupted one bit for bit, and nothing wrong is ever loaded."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lion_pytorch
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from faulty_disk import FaultyDisk, QuickDisk, count_calls, run_killed, use_disk
from frostline import _io
from frostline.backends.torch import checkpoint
from frostline.backends.torch.checkpoint import load_checkpoint, save_checkpoint
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.optimizer import parameter_groups
from frostline.driver import Driver
from frostline.errors import StorageError
from frostline.groups import LayerGroup, LayerGroups, ModuleInfo, TensorInfo

Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


OPTIMIZERS: dict[str, Build] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": partial(torch.optim.Adam, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
    "adamw-foreach": partial(torch.optim.AdamW, foreach=True),
    "adamw-tensor-lr": partial(torch.optim.AdamW, capturable=False, foreach=False),
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "adagrad": torch.optim.Adagrad,
    "lion": lion_pytorch.Lion,
}
SCHEDULERS: dict[str, Build] = {
    "none": lambda optimizer: None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, 20, cycle_momentum=False),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5]),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.MultiStepLR(o, [2])], [4]
    ),
}
STEPS = 10


class Loop:
    """Somebody's own training loop, with dropout, batch norm and a freezing policy."""

    def __init__(
        self,
        optimizer: str = "adamw",
        scheduler: str = "lambda",
        state: Any = "keep",
        policy: str = "gradual:every=3st",
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 5), nn.Linear(5, 3)
        )
        groups = groups_of(self.model)
        made = parameter_groups(self.model, groups, lr=0.02, weight_decay=0.01)
        self.optimizer = OPTIMIZERS[optimizer](made, lr=0.02)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.driver: Driver = torch_driver(
            self.model, self.optimizer, policy, groups=groups, optimizer_state=state
        )
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002

    @property
    def objects(self) -> dict[str, Any]:
        found = {
            "model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
            "driver": self.driver,
        }  # fmt: skip
        return {name: thing for name, thing in found.items() if thing is not None}

    def train(self, steps: int) -> Loop:
        for _ in range(steps):
            with self.driver.step():
                self.optimizer.zero_grad()
                # All three global streams matter, as they may in anybody's loop.
                noise = random.random() + np.random.rand()  # noqa: NPY002
                loss = self.model(torch.randn(5, 4) + noise).square().mean()
                loss.backward()
                self.optimizer.step()
                if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                    self.scheduler.step(loss.item())
                elif self.scheduler is not None:
                    self.scheduler.step()
        return self

    def bits(self) -> dict[str, Any]:
        """Everything that must be equal, spelled exactly."""
        names = {p: n for n, p in self.model.named_parameters()}
        state = {names[p]: spell(s) for p, s in self.optimizer.state.items() if s}
        return {
            "model": spell(dict(self.model.state_dict())),
            "state": dict(sorted(state.items())),
            "groups": [
                {k: spell(v) for k, v in g.items() if k != "params"}
                for g in self.optimizer.param_groups
            ],
            "scheduler": spell(self.scheduler.state_dict()) if self.scheduler else None,
            "driver": self.driver.state(),
            "random": spell(checkpoint.read_random_state()),
        }


def spell(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().reshape(-1).contiguous()
        return (str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: spell(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(spell, value)]
    return value if not isinstance(value, float) else value.hex()


def groups_of(model: nn.Sequential) -> LayerGroups:
    """One layer group per child that has parameters, without running anything."""
    items = []
    for name, module in model.named_children():
        kind = "norm" if isinstance(module, nn.BatchNorm1d) else "weight"
        own = [(f"{name}.{n}", p) for n, p in module.named_parameters()]
        if own:
            items.append(
                LayerGroup(
                    name,
                    len(items),
                    tuple(TensorInfo(n, tuple(p.shape), kind=kind) for n, p in own),
                    tuple(
                        TensorInfo(f"{name}.{n}", tuple(b.shape), kind="norm")
                        for n, b in module.named_buffers()
                    ),
                    (ModuleInfo(name, type(module).__name__),),
                )
            )
    return LayerGroups(tuple(items))


# -- what is frozen is written once --------------------------------------------------------------


def test_frozen_tensors_are_written_once_and_each_checkpoint_is_whole(tmp_path: Path):
    loop = Loop(policy="first:groups=2")
    one, two = (save_checkpoint(tmp_path, **loop.train(1).objects) for _ in range(2))
    assert one.joinpath("held.safetensors").samefile(two / "held.safetensors")
    assert not one.joinpath("model.safetensors").samefile(two / "model.safetensors")
    shutil.rmtree(one)
    again = Loop(policy="first:groups=2").train(5)
    assert load_checkpoint(tmp_path, **again.objects) == {}
    assert again.bits() == loop.bits()


def test_what_is_frozen_later_or_trains_again_is_written_anew(tmp_path: Path):
    loop = Loop(policy="gradual:every=2st")
    saved = [save_checkpoint(tmp_path, **loop.train(1).objects, keep=0) for _ in range(8)]
    bits = loop.bits()
    files = [path / "held.safetensors" for path in saved]
    same = [a.exists() and b.exists() and a.samefile(b) for a, b in itertools.pairwise(files)]
    assert any(same)
    assert not all(same)
    for path in saved:  # each by itself gives what was there at its step
        _io.verify_folder(path)
        again = Loop(policy="gradual:every=2st")
        only = tmp_path / "only" / path.name
        shutil.copytree(path, only)
        assert load_checkpoint(only.parent, **again.objects) == {}
        assert again.train(8 - again.driver.progress.step).bits() == bits
        shutil.rmtree(only)


def test_a_frozen_file_that_was_cut_short_is_not_shared(tmp_path: Path):
    loop = Loop(policy="first:groups=2").train(1)
    one = save_checkpoint(tmp_path, **loop.objects)
    with (one / "held.safetensors").open("r+b") as file:
        file.truncate(20)
    two = save_checkpoint(tmp_path, **loop.train(1).objects)
    assert not one.joinpath("held.safetensors").samefile(two / "held.safetensors")
    assert load_checkpoint(tmp_path, **Loop(policy="first:groups=2").objects) == {}


def test_without_links_frozen_tensors_are_written_each_time(tmp_path: Path, monkeypatch):
    def refuse(self: Any, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(QuickDisk, "link", refuse, raising=False)
    loop = Loop(policy="first:groups=2")
    one, two = (save_checkpoint(tmp_path, **loop.train(1).objects) for _ in range(2))
    assert not one.joinpath("held.safetensors").samefile(two / "held.safetensors")
    _io.verify_folder(two)


# -- exact resume --------------------------------------------------------------------------------

CASES = [
    *[(optimizer, "lambda", state) for optimizer in OPTIMIZERS for state in ("keep", "release")],
    *[("adamw", scheduler, "release") for scheduler in SCHEDULERS],
]


@pytest.mark.parametrize(("optimizer", "scheduler", "state"), CASES)
def test_a_resumed_loop_equals_the_uninterrupted_one(tmp_path, optimizer, scheduler, state):
    build = partial(Loop, optimizer, scheduler, state)
    straight = build().train(STEPS).bits()
    interrupted = build()
    for _ in range(3):  # saved and thrown away three times, in different phases of the policy
        interrupted.train(3)
        saved = interrupted.bits()
        save_checkpoint(tmp_path, **interrupted.objects, extra={"done": 3})
        assert interrupted.bits() == saved
        interrupted.train(1)
        interrupted = build()
        assert load_checkpoint(tmp_path, **interrupted.objects) == {"done": 3}
        assert interrupted.bits() == saved
    assert interrupted.train(1).bits() == straight


def test_tensor_learning_rates_and_step_counters_keep_their_type(tmp_path: Path):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2).to(torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), foreach=False)

    model, optimizer = build()
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model=model, optimizer=optimizer)
    again, other = build()
    load_checkpoint(tmp_path, model=again, optimizer=other)
    state = other.state[again.weight]
    assert state["step"].dtype == torch.float32
    assert state["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(state["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert isinstance(other.param_groups[0]["lr"], Tensor)
    assert other.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_gradient_scaler_goes_on_where_it_was(tmp_path: Path):
    model = nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    scaler.update(32.0)
    save_checkpoint(tmp_path, model=model, scaler=scaler)
    fresh = torch.amp.GradScaler("cpu", init_scale=64.0)
    load_checkpoint(tmp_path, model=model, scaler=fresh)
    assert fresh.state_dict() == scaler.state_dict()
    assert fresh.get_scale() == 32.0


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path):
    def build() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return model

    model = build()
    path = save_checkpoint(tmp_path, model=model)
    assert set(_io.load_json(path / "state.json")["parts"]["model"]) == {
        "a.weight",
        "a.bias",
        "b.bias",
    }
    again = build()
    load_checkpoint(tmp_path, model=again)
    assert again["a"].weight is again["b"].weight
    assert torch.equal(again["a"].weight, model["a"].weight)
    untied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(StorageError, match=r"'b.weight' only in the model"):
        load_checkpoint(tmp_path, model=untied)


def test_views_of_one_storage_and_unsaved_buffers_are_kept(tmp_path: Path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.arange(12.0).reshape(3, 4)
            self.left, self.right = nn.Parameter(both[:, :2]), nn.Parameter(both[:, 2:])
            self.register_buffer("count", torch.tensor(3), persistent=False)

    model, again = Odd(), Odd()
    save_checkpoint(tmp_path, model=model)
    with torch.no_grad():
        again.left.zero_()
        again.get_buffer("count").zero_()
    load_checkpoint(tmp_path, model=again)
    assert torch.equal(again.left, model.left)
    assert int(again.get_buffer("count")) == 3


# -- random streams ------------------------------------------------------------------------------


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_loading_moves_the_random_streams_asked_for_and_no_other(tmp_path: Path):
    model = nn.Linear(1, 1)
    save_checkpoint(tmp_path, model=model)
    first = draw()
    load_checkpoint(tmp_path, model=model)
    assert draw() == first

    later = checkpoint.read_random_state()
    for streams in ((), ("torch",), ("python", "numpy")):
        checkpoint.write_random_state(later)
        unmoved = draw()
        checkpoint.write_random_state(later)
        load_checkpoint(tmp_path, model=model, streams=streams)
        expected = [
            first[i] if name in streams else unmoved[i]
            for i, name in enumerate(("python", "numpy", "torch"))
        ]
        assert list(draw()) == expected
    checkpoint.write_random_state(later)
    load_checkpoint(tmp_path, model=model, allow_inexact=True)
    assert draw() == unmoved
    with pytest.raises(StorageError, match="'dice'"):
        load_checkpoint(tmp_path, model=model, streams=("dice",))


def test_saving_moves_no_random_stream(tmp_path: Path):
    before = spell(checkpoint.read_random_state())
    save_checkpoint(tmp_path, **Loop().train(2).objects)
    loop = Loop().train(2)
    before = loop.bits()["random"]
    save_checkpoint(tmp_path, **loop.objects)
    assert loop.bits()["random"] == before


# -- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "driver"])
def test_every_saved_part_must_be_asked_for(tmp_path: Path, part: str):
    save_checkpoint(tmp_path, **Loop().train(2).objects)
    loop = Loop()
    fewer = {name: thing for name, thing in loop.objects.items() if name != part}
    before = loop.bits()
    with pytest.raises(StorageError, match=f"{part} in it, not asked for"):
        load_checkpoint(tmp_path, **fewer)
    assert loop.bits() == before
    load_checkpoint(tmp_path, **fewer, allow_inexact=True)
    assert loop.bits() != before


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "driver"])
def test_every_part_asked_for_must_be_there(tmp_path: Path, part: str):
    objects = Loop().train(2).objects
    del objects[part]
    save_checkpoint(tmp_path, **objects)
    with pytest.raises(StorageError, match=f"no {part} in it"):
        load_checkpoint(tmp_path, **Loop().objects)
    load_checkpoint(tmp_path, **Loop().objects, allow_inexact=True)


def test_another_model_is_refused_before_anything_changes(tmp_path: Path):
    save_checkpoint(tmp_path, model=nn.Linear(2, 3), extra={})
    for model, found in (
        (nn.Linear(3, 3), r"\(3, 2\) float32 there, \(3, 3\) float32 here"),
        (nn.Linear(2, 3).double(), "float64 here"),
        (nn.Linear(2, 3, bias=False), "'bias' only in the checkpoint"),
        (nn.Sequential(nn.Linear(2, 3)), "only in the"),
    ):
        before = spell(dict(model.state_dict()))
        with pytest.raises(StorageError, match=found):
            load_checkpoint(tmp_path, model=model)
        assert spell(dict(model.state_dict())) == before


def test_another_optimizer_is_refused_before_anything_changes(tmp_path: Path):
    model = nn.Linear(2, 3)
    save_checkpoint(tmp_path, model=model, optimizer=torch.optim.Adam(model.parameters()))
    others = {
        "AdamW here": torch.optim.AdamW(model.parameters()),
        "2 here": torch.optim.Adam([{"params": [p]} for p in model.parameters()]),
        "other parameters": torch.optim.Adam([model.bias, model.weight]),
        "'note'": torch.optim.Adam([{"params": list(model.parameters()), "note": 1}]),
    }
    with torch.no_grad():
        model.weight.zero_()
    for found, optimizer in others.items():
        with pytest.raises(StorageError, match=found):
            load_checkpoint(tmp_path, model=model, optimizer=optimizer)
        assert not model.weight.any()
    stranger = torch.optim.Adam(nn.Linear(2, 3).parameters())
    with pytest.raises(StorageError, match="a parameter in it that the model does not have"):
        save_checkpoint(tmp_path, model=model, optimizer=stranger)


def test_another_scheduler_or_policy_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path, **Loop(scheduler="cosine").objects)
    with pytest.raises(StorageError, match="LambdaLR here"):
        load_checkpoint(tmp_path, **Loop(scheduler="lambda").objects)
    with pytest.raises(StorageError, match="same policy"):
        load_checkpoint(tmp_path, **Loop(scheduler="cosine", policy="full").objects)


class _Callable:
    def __init__(self) -> None:
        self.inner = object()

    def __call__(self, step: int) -> float:
        return 1.0


def test_state_that_is_no_data_is_named(tmp_path: Path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, _Callable())
    with pytest.raises(StorageError, match="scheduler/state/lr_lambdas/0/inner"):
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    for extra in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(StorageError, match="plain JSON"):
            save_checkpoint(tmp_path, model=model, extra=extra)
    assert os.listdir(tmp_path) == []


def test_a_model_with_hidden_state_is_refused(tmp_path: Path):
    class Hidden(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    with pytest.raises(StorageError, match="_extra_state"):
        save_checkpoint(tmp_path, model=Hidden(1, 1))


# -- names, keeping, damage ----------------------------------------------------------------------


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert load_checkpoint(tmp_path / "absent", model=nn.Linear(1, 1)) is None
    save_checkpoint(tmp_path, model=nn.Linear(1, 1))
    assert load_checkpoint(tmp_path, model=nn.Linear(1, 1)) == {}


def test_names_follow_the_driver_else_they_count(tmp_path: Path):
    loop = Loop().train(7)
    assert save_checkpoint(tmp_path / "a", **loop.objects).name == "step-00000007"
    model = nn.Linear(1, 1)
    names = [save_checkpoint(tmp_path / "b", model=model).name for _ in range(2)]
    assert names == ["step-00000000", "step-00000001"]
    assert save_checkpoint(tmp_path / "b", model=model, step=123).name == "step-00000123"


def test_the_newest_are_kept_and_nothing_is_overwritten(tmp_path: Path):
    model = nn.Linear(1, 1)
    for step in (1, 2, 10, 10):
        save_checkpoint(tmp_path, model=model, step=step, extra={"step": step})
    assert sorted(os.listdir(tmp_path)) == ["step-00000010", "step-00000010-2"]
    save_checkpoint(tmp_path, model=model, step=11, keep=0)
    assert len(os.listdir(tmp_path)) == 3
    with pytest.raises(StorageError, match="keep 1 checkpoints"):
        save_checkpoint(tmp_path, model=model, keep=1)
    assert load_checkpoint(tmp_path, model=model, step=10) == {"step": 10}
    assert load_checkpoint(tmp_path, model=model, step=5) is None


def saved_twice(folder: Path) -> nn.Module:
    model = nn.Linear(2, 2)
    for step in (1, 2):
        with torch.no_grad():
            model.weight.fill_(step)
        save_checkpoint(folder, model=model, step=step, extra={"step": step})
    return model


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, name, caplog):
    model = saved_twice(tmp_path)
    file = tmp_path / "step-00000002" / name
    whole = file.read_bytes()
    rng = random.Random(0)
    for bit in sorted(rng.sample(range(len(whole) * 8), 60)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        caplog.clear()
        assert load_checkpoint(tmp_path, model=model) == {"step": 1}
        assert model.weight[0, 0] == 1
        assert "passing over" in caplog.text
    file.unlink()
    assert load_checkpoint(tmp_path, model=model) == {"step": 1}
    file.write_bytes(whole)
    assert load_checkpoint(tmp_path, model=model) == {"step": 2}


def test_without_any_whole_checkpoint_loading_fails(tmp_path: Path):
    model = saved_twice(tmp_path)
    for folder in tmp_path.iterdir():
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=r"2 checkpoint.* none of them whole"):
        load_checkpoint(tmp_path, model=model)


def test_planted_folders_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = saved_twice(tmp_path)
    (tmp_path / "step-99999999").mkdir()
    (tmp_path / "step-99999998").symlink_to("/etc")
    (tmp_path / "checkpoint-5").mkdir()
    os.mkfifo(tmp_path / "step-99999997")
    assert load_checkpoint(tmp_path, model=model) == {"step": 2}
    assert caplog.text.count("passing over") == 3


def test_another_version_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    model = nn.Linear(1, 1)
    monkeypatch.setattr(checkpoint, "_versions", lambda: {"torch": "1.0"})
    save_checkpoint(tmp_path, model=model)
    monkeypatch.undo()
    load_checkpoint(tmp_path, model=model)
    assert "bits may differ" in caplog.text


# -- faults --------------------------------------------------------------------------------------


def save_third(folder: Path, model: nn.Module) -> None:
    save_checkpoint(folder, model=model, step=3, extra={"step": 3})


def check_after_fault(folder: Path, model: nn.Module) -> int:
    """At least one whole checkpoint is there, and it holds what its step says."""
    extra = load_checkpoint(folder, model=model)
    assert extra is not None
    assert (model.weight == extra["step"]).all()
    return extra["step"]


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short", "lying", "exit"])
@pytest.mark.parametrize("for_ever", [False, True])
def test_a_whole_checkpoint_exists_whatever_fails(tmp_path, fault, for_ever):
    model = saved_twice(tmp_path / "0")

    def scene(name: str) -> tuple[Path, nn.Module]:
        folder = tmp_path / name
        fresh = saved_twice(folder)
        with torch.no_grad():
            fresh.weight.fill_(3)
        return folder, fresh

    with torch.no_grad():
        model.weight.fill_(3)
    calls = count_calls(lambda: save_third(tmp_path / "0", model))
    outcomes = set()
    for at in range(0, calls, 3 if fault in ("EIO", "short") else 1):
        folder, fresh = scene(f"{at + 1}")
        if fault == "exit":
            assert run_killed(partial(save_third, folder, fresh), at)
        else:
            with use_disk(FaultyDisk(at, fault, for_ever=for_ever)):
                try:
                    save_third(folder, fresh)
                except StorageError as error:
                    assert error.fix  # noqa: PT017
        outcomes.add(check_after_fault(folder, fresh))
        fresh.weight.data.fill_(4)
        save_checkpoint(folder, model=fresh, step=4, extra={"step": 4})
        assert check_after_fault(folder, fresh) == 4
        assert all(name.startswith("step-") for name in os.listdir(folder))  # the save swept
    assert outcomes == {2, 3}


def test_a_full_disk_under_the_tensor_library_is_a_storage_error(tmp_path: Path):
    model = nn.Linear(300, 300)
    save_checkpoint(tmp_path, model=model, step=1)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(StorageError, match="File too large"):
            save_checkpoint(tmp_path, model=model, step=2)

    assert not run_killed(work, at=10**9)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path, model=model) == {}


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path):
    path = save_checkpoint(tmp_path, **Loop().train(4).objects)
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    for file in path.glob("*.json"):
        json.loads(file.read_text())
