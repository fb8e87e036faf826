"""The same policy on the same network takes the same decisions in PyTorch and in Keras.

Weights, data, their order and the arithmetic of layers and optimizers are equal; only the
frameworks differ. The torch side runs in a process without Keras.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import parity_setting as setting

from frostline.backends.keras.names import tensors
from frostline.integrations.keras import FreezeCallback

#: The conversion of tensors to arrays in Keras is older than NumPy's `copy` keyword.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

#: One policy of every kind for every run of the suite, under optimizers in turn.
JOBS = ("bitfit/momentum", "gradual:every=10st/adam", "freezeout/sgd", "auto-rgn/momentum")
MORE = [
    *(f"{spec}/momentum" for spec in setting.POLICIES if f"{spec}/momentum" not in JOBS),
    *(f"{spec}/sgd" for spec in ("full", "gradual:every=10st", "auto-rgn")),
    *(f"{spec}/adam" for spec in ("bitfit", "linear-probe", "lp-ft", "autofreeze:every=5st")),
]
PARAMETERS = [*JOBS, *(pytest.param(job, marks=pytest.mark.slow) for job in MORE)]


@pytest.fixture(scope="session")
def torch_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the torch side did in the jobs of this session."""
    jobs = sorted(
        {
            item.callspec.params["job"]
            for item in request.session.items
            if isinstance(item, pytest.Function) and "job" in getattr(item, "fixturenames", ())
        }
    )
    out = tmp_path_factory.mktemp("parity") / "torch.json"
    program = Path(__file__).with_name("parity_torch.py")
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    command = [sys.executable, str(program), str(out), *jobs]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=500)
    return json.loads(out.read_text("utf-8"))


def network() -> keras.Model:
    """Three blocks and a head, with the initial weights of both sides."""
    layers: list[Any] = [keras.Input((setting.SIZES[0],))]
    for name, wide in zip(setting.BLOCKS, setting.SIZES[1:], strict=True):
        block = [
            keras.layers.BatchNormalization(
                momentum=setting.MOMENTUM, epsilon=setting.EPSILON, name="norm"
            ),
            keras.layers.Dense(wide, name="dense"),
            keras.layers.Activation("tanh"),
            keras.layers.Dropout(0.0, name="drop"),
        ]
        layers.append(keras.Sequential(block, name=name))
    model = keras.Sequential([*layers, keras.layers.Dense(setting.CLASSES, name="head")])
    values = setting.weights()
    for name, variable in tensors(model).items():
        if name in values:
            variable.assign(values[name])
    return model


def array(variable: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))


def optimizer_of(name: str) -> keras.Optimizer:
    rate = setting.RATES[name]
    if name == "adam":
        return keras.optimizers.Adam(rate, epsilon=1e-7)
    return keras.optimizers.SGD(rate, momentum=0.9 if name == "momentum" else 0.0)


class Losses(keras.callbacks.Callback):
    """The mean loss of the epoch so far, after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.found.append(float(logs["loss"]))


def run(job: str) -> dict[str, Any]:
    """The same as `parity_torch.run`, by `fit`."""
    spec, optimizer_name = job.rsplit("/", 1)
    model, losses = network(), Losses()
    freezing = FreezeCallback(spec, groups=setting.groups("keras"))
    model.compile(
        optimizer_of(optimizer_name),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
    )
    model.fit(
        *setting.TRAIN,
        batch_size=setting.BATCH,
        epochs=setting.EPOCHS,
        shuffle=False,
        verbose=0,
        validation_data=setting.VAL,
        validation_batch_size=len(setting.VAL[0]),
        callbacks=[freezing, losses],
    )
    decisions = [d.to_json() for d in freezing.decisions]
    return {
        "decisions": [{"step": d["step"], "plan": _bare(d["plan"])} for d in decisions],
        "held": sorted([h.tensor, h.from_step, h.to_step] for h in freezing.certificate.holds),
        "losses": losses.found,
        "weights": {n: array(v) for n, v in tensors(model).items()},
    }


def _bare(plan: dict[str, Any]) -> dict[str, Any]:
    exempt = {group: sorted(kept) for group, kept in plan.get("exempt", {}).items()}
    return plan | {"exempt": exempt, "reason": ""}


def running_means(losses: list[float]) -> list[float]:
    """What Keras shows: means since the beginning of the epoch."""
    table = np.reshape(losses, (-1, setting.PER_EPOCH))
    return (np.cumsum(table, axis=1) / np.arange(1, setting.PER_EPOCH + 1)).reshape(-1).tolist()


def same_decisions(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same plans at the same steps; learning rates that follow signals to rounding."""
    assert [d["step"] for d in ours] == [d["step"] for d in theirs]
    for one, other in zip(ours, theirs, strict=True):
        rates = one["plan"].pop("lr_scale", {}), other["plan"].pop("lr_scale", {})
        assert rates[0] == pytest.approx(rates[1], rel=1e-3)
        assert one["plan"] == other["plan"]


@pytest.mark.parametrize("job", PARAMETERS)
def test_the_same_decisions_proof_losses_and_weights_as_on_torch(
    job: str, torch_runs: dict[str, Any]
) -> None:
    torch_run, keras_run = torch_runs[job], run(job)
    same_decisions(keras_run["decisions"], torch_run["decisions"])
    assert keras_run["held"] == torch_run["held"]
    np.testing.assert_allclose(
        keras_run["losses"], running_means(torch_run["losses"]), rtol=0, atol=1e-5
    )
    for name, value in torch_run["weights"].items():
        np.testing.assert_allclose(keras_run["weights"][name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_most_of_these_policies_freeze_something(torch_runs: dict[str, Any]) -> None:
    freezing = {job.partition("/")[0] for job, run in torch_runs.items() if run["held"]}
    assert len(freezing) >= 15
