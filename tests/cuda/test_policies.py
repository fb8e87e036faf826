"""Every policy on the device: it decides as on the CPU, and a resumed run equals a whole one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import contract.test_policies_on_backends as shared
from backends.torch.helpers import batch, groups_of, model_bits
from device_run import SPLIT, DeviceRun, load
from frostline.backends.torch.checkpoint import load_checkpoint, save_checkpoint
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.optimizer import parameter_groups
from frostline.backends.torch.random_state import read_random_state, same_random_state, seeded
from frostline.compose import Placebo
from frostline.errors import StorageError
from frostline.policy import Policy
from frostline.registry import make_policy


@pytest.mark.parametrize("policy", [p for p in shared.POLICIES if not isinstance(p, Placebo)])
def test_a_policy_decides_as_on_the_cpu(policy: str | Policy, gpu: torch.device) -> None:
    """In float64 and without dropout the devices differ by rounding alone.

    A placebo draws its shuffles from the bits of what was measured, so rounding is all it takes.
    """
    plans = []
    for device in (torch.device("cpu"), gpu):
        torch.manual_seed(1)
        recorded = shared.Recorded(make_policy(policy))
        run = DeviceRun(recorded, device, torch.float64, dropout=0.0)
        shared.train(run, shared.STEPS)
        proof = run.driver.finish()
        plans.append((recorded.plans, [(h.tensor, h.from_step, h.to_step) for h in proof.holds]))
    (on_cpu, proved), (on_device, proved_there) = plans
    assert proved == proved_there
    assert len(on_cpu) == len(on_device)
    for one, other in zip(on_cpu, on_device, strict=True):
        # Rates may follow from measured numbers, and with them their rounding.
        assert replace(one, lr_scale={}) == replace(other, lr_scale={})
        assert dict(other.lr_scale) == pytest.approx(dict(one.lr_scale), rel=1e-6)


@pytest.mark.parametrize("policy", shared.POLICIES)
def test_a_policy_interrupted_equals_uninterrupted(
    policy: str | Policy, gpu: torch.device, tmp_path: Path
) -> None:
    def make() -> DeviceRun:
        torch.manual_seed(1)
        return DeviceRun(make_policy(policy), gpu)

    def resume(old: DeviceRun) -> DeviceRun:
        save_checkpoint(tmp_path, model=old.model, optimizer=old.optimizer, driver=old.driver)
        new = make()
        load_checkpoint(tmp_path, model=new.model, optimizer=new.optimizer, driver=new.driver)
        return new

    shared.check_interrupted(make, resume)


def test_draws_on_the_device_follow_the_seed_and_leave_no_trace(cuda: torch.device) -> None:
    torch.rand(1, device=cuda)
    before, found = read_random_state(), []
    for seed in (3, 3, 4):
        with seeded(seed):
            start = read_random_state()
            found.append(float(torch.rand((), device=cuda)))
            assert not same_random_state(start, read_random_state())
    assert found[0] == found[1] != found[2]
    assert same_random_state(before, read_random_state())


def test_dropout_on_the_device_goes_on_where_it_stopped(gpu: torch.device, tmp_path: Path) -> None:
    """The stream of the device is in the checkpoint."""
    model = nn.Linear(2, 2).to(gpu)
    x = torch.ones(1000, device=gpu)
    torch.manual_seed(3)
    nn.functional.dropout(x)
    save_checkpoint(tmp_path, model=model)
    following = nn.functional.dropout(x)
    assert not torch.equal(following, nn.functional.dropout(x))
    load_checkpoint(tmp_path, model=model)
    assert torch.equal(nn.functional.dropout(x), following)


# -- from one device to another --------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_of_the_cpu_loads_on_the_device(
    fused: bool, gpu: torch.device, tmp_path: Path
) -> None:
    old = DeviceRun(make_policy(SPLIT), torch.device("cpu"), fused=fused)
    shared.train(old, 8)
    save_checkpoint(tmp_path, model=old.model, optimizer=old.optimizer, driver=old.driver)
    new = DeviceRun(make_policy(SPLIT), gpu, fused=fused)
    load(tmp_path, new, streams=("python", "numpy", "torch"))
    assert model_bits(new.model) == model_bits(old.model)
    for p in new.model.parameters():
        for key, value in new.optimizer.state.get(p, {}).items():
            # torch keeps plain step counters in main memory, for all but fused optimizers.
            assert value.device.type == (gpu.type if fused or key != "step" else "cpu"), key
    shared.train(new, shared.STEPS)
    assert new.driver.finish().holds


CHILD = """
import sys, torch
from pathlib import Path
import contract.test_policies_on_backends as shared
from device_run import SPLIT, DeviceRun, load
from backends.torch.helpers import model_bits
from frostline.errors import StorageError
from frostline.registry import make_policy

assert not torch.cuda.is_available()
run = DeviceRun(make_policy(SPLIT), torch.device("cpu"))
before = model_bits(run.model)
if sys.argv[2] == "cuda":
    try:
        load(Path(sys.argv[1]), run)
    except StorageError as error:
        assert "CUDA" in str(error), error
    else:
        raise SystemExit("random states of CUDA were dropped silently")
    assert model_bits(run.model) == before
load(Path(sys.argv[1]), run, streams=("python", "numpy", "torch"))
print(sorted(model_bits(run.model).items()))
shared.train(run, shared.STEPS)
assert run.driver.finish().holds
"""


def test_a_checkpoint_of_the_device_loads_in_a_process_without_it(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of the device cannot be restored there: refused, unless they are not asked for."""
    old = DeviceRun(make_policy(SPLIT), gpu)
    shared.train(old, 8)
    save_checkpoint(tmp_path, model=old.model, optimizer=old.optimizer, driver=old.driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    command = [sys.executable, "-c", CHILD, str(tmp_path), gpu.type]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(model_bits(old.model).items()))


def test_as_many_devices_are_asked_for(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2).to(cuda)
    save_checkpoint(tmp_path, model=model)
    there = torch.cuda.device_count()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there + 1)
    with pytest.raises(StorageError, match=f"random states of {there} CUDA devices; {there + 1}"):
        load_checkpoint(tmp_path, model=model)


# -- the driver under DistributedDataParallel ------------------------------------------------------


def test_the_driver_works_in_a_group_of_one(gpu: torch.device, tmp_path: Path) -> None:
    import torch.distributed as dist

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    kind = "nccl" if gpu.type == "cuda" else "gloo"
    place = torch.device("cuda", 0) if gpu.type == "cuda" else None
    dist.init_process_group(kind, store=store, rank=0, world_size=1, device_id=place)
    try:
        model = shared.Blocks().to(gpu)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        groups = groups_of(model, shared.GROUPS)
        optimizer = AdamW(parameter_groups(model, groups, lr=0.02, weight_decay=0.01))
        driver = torch_driver(wrapped, optimizer, SPLIT, groups=groups, total_steps=5)
        start = model_bits(model)
        for step in range(5):
            x, y = batch(step)
            with driver.step():
                nn.functional.cross_entropy(wrapped(x.to(gpu)), y.to(gpu)).backward()
                optimizer.step()
                optimizer.zero_grad()
        held = {h.tensor: h.sha256 for h in driver.finish().holds}
        end = model_bits(model)
    finally:
        dist.destroy_process_group()
    assert held
    assert all(start[n] == end[n] == digest for n, digest in held.items())
    assert {n for n in end if n.startswith("head.")} <= {n for n in end if end[n] != start[n]}
