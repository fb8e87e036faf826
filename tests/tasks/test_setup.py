"""Settings become the training parts they describe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from frostline.clock import Progress
from frostline.errors import ConfigError, PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.policy import Event, EventKind
from frostline.tasks.config import RunConfig
from frostline.tasks.setup import (
    build_optimizer,
    build_policy,
    build_schedule,
    learning_rate_factor,
    learning_rate_scales,
    mixed_precision,
)

MODEL = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
GROUPS = LayerGroups(
    tuple(
        LayerGroup(
            str(i),
            i,
            (TensorInfo(f"{i}.weight", (2, 2)), TensorInfo(f"{i}.bias", (2,), kind="bias")),
        )
        for i in range(3)
    ),
    head=frozenset({"2"}),
)


def config(**settings: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": "d", "lr": 0.1, **settings})


def test_rates_fall_towards_the_input_and_the_head_has_its_own():
    assert learning_rate_scales(config(), GROUPS) == {"0": 1.0, "1": 1.0, "2": 1.0}
    scales = learning_rate_scales(config(lr_decay=0.5, head_lr=1.0), GROUPS)
    assert scales == {"0": 0.5, "1": 1.0, "2": 10.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)],
)
def test_the_optimizer_holds_every_parameter_with_its_rate(name: str, kind: type):
    made = build_optimizer(config(optimizer=name, lr_decay=0.5, weight_decay=0.3), MODEL, GROUPS)
    assert type(made) is kind
    held = {p: g for g in made.param_groups for p in g["params"]}
    assert held.keys() == set(MODEL.parameters())
    rates = [held[MODEL[i].weight]["lr"] for i in range(3)]
    assert rates == [0.05, 0.1, 0.1]
    assert held[MODEL[0].weight]["weight_decay"] == 0.3
    assert held[MODEL[0].bias]["weight_decay"] == 0.0


def test_an_optimizer_needs_a_rate():
    with pytest.raises(ConfigError, match="no learning rate"):
        build_optimizer(RunConfig(model="m", data="d"), MODEL, GROUPS)


def test_cosine_rises_then_falls_to_zero():
    factor = learning_rate_factor(config(warmup="20%"), Progress(total_steps=10))
    values = [factor(step) for step in range(11)]
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values == sorted(values[:2]) + sorted(values[2:], reverse=True)
    assert values[10] == pytest.approx(0, abs=1e-12)


def test_a_warm_up_longer_than_the_run_still_trains():
    factor = learning_rate_factor(config(warmup="100st"), Progress(total_steps=4))
    assert [factor(step) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    one = learning_rate_factor(config(), Progress(total_steps=1))
    assert one(0) == 1.0


def test_the_schedule_scales_every_group():
    optimizer = build_optimizer(config(head_lr=1.0, warmup="2st"), MODEL, GROUPS)
    schedule = build_schedule(config(warmup="2st"), optimizer, Progress(total_steps=4))
    rates = []
    for _ in range(4):
        rates.append([optimizer.param_groups[i]["lr"] for i in (0, -1)])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx(x) for x in ([0.05, 0.5], [0.1, 1], [0.1, 1], [0.05, 0.5])]


def test_live_switches_reach_every_frozen_group():
    event = Event(EventKind.START, Progress(total_steps=9, steps_per_epoch=3))
    plain = build_policy(config(policy="linear-probe"))
    assert not plain.decide(GROUPS, plain.init(GROUPS), event)[0].live_norm
    live = build_policy(config(policy="linear-probe", live_norm=True, live_dropout=True))
    plan, _ = live.decide(GROUPS, live.init(GROUPS), event)
    assert plan.frozen == plan.live_norm == plan.live_dropout == {"0", "1"}
    assert live.needs() == plain.needs()
    with pytest.raises(PolicyError):
        build_policy(config(policy="nothing-such"))


def test_mixed_precision_fits_the_device():
    forward, scaler = mixed_precision(config(), torch.device("cpu"))
    with forward():
        assert not torch.is_autocast_enabled("cpu")
    assert scaler is None
    forward, scaler = mixed_precision(config(precision="bf16"), torch.device("cpu"))
    with forward():
        assert MODEL(torch.ones(1, 2)).dtype == torch.bfloat16
    assert scaler is None
    with pytest.raises(ConfigError, match="fp16 on cpu"):
        mixed_precision(config(precision="fp16"), torch.device("cpu"))
