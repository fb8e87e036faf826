"""A loop of torch with checkpoints, recorded: a resumed one records what the whole one does."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

import frostline
from faulty_disk import QuickDisk, use_disk
from frostline import _io
from frostline.records import read_run, without_costs

EPOCHS, STEPS = 3, 2


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


class Gone(Exception):
    pass


def train(folder: Path, *, until: int = EPOCHS, measure: bool = False) -> None:
    """Go on from the newest checkpoint; a crash after so many epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    groups = frostline.layer_groups(model, torch.randn(2, 4))
    if measure:
        groups = frostline.measure_costs(model, groups, torch.randn(2, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    driver = frostline.torch_driver(
        model, optimizer, "gradual", total_epochs=EPOCHS, steps_per_epoch=STEPS, groups=groups
    )
    saved = {"model": model, "optimizer": optimizer, "driver": driver}
    done = frostline.load_checkpoint(folder / "ckpt", **saved)
    with frostline.record(driver, folder / "run", model="mlp") as run:
        for epoch in range(done["epoch"] if done else 0, EPOCHS):
            for step in range(STEPS):
                source = torch.Generator().manual_seed(epoch * STEPS + step)
                with driver.step():
                    loss = model(torch.randn(4, 4, generator=source)).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            metrics = {"train_loss": loss.item(), "val_accuracy": 1 / (1 + loss.item())}
            run.epoch(metrics)
            driver.evaluated(metrics)
            if epoch + 1 == until < EPOCHS:
                raise Gone  # the checkpoint of this epoch was not saved any more
            frostline.save_checkpoint(folder / "ckpt", **saved, extra={"epoch": epoch + 1})


def test_a_resumed_loop_records_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    with contextlib.suppress(Gone):
        train(tmp_path / "broken", until=2)
    assert not read_run(tmp_path / "broken" / "run").finished
    train(tmp_path / "broken")
    lines = [
        [without_costs(x) for x in _io.read_lines(tmp_path / n / "run" / "record.jsonl").records]
        for n in ("whole", "broken")
    ]
    assert lines[0] == lines[1]


def test_measured_groups_tell_the_backward_work(tmp_path: Path) -> None:
    train(tmp_path, measure=True)
    found = read_run(tmp_path / "run")
    assert 0 < found.summary["backward_share"] < 1
    assert found.header["costs"]["torch"] == torch.__version__
    assert set(found.header["costs"]["groups"]) == set(found.header["groups"])
