"""Trains under a distribution over two virtual devices; a process of its own, started by a test.

Prints one JSON object: what moved, what was decided, and whether all copies of a variable agree.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np

from frostline.backends.keras.digest import sha256_of_variables
from frostline.backends.keras.names import tensors
from frostline.errors import BackendError
from frostline.integrations.keras import FreezeCallback

DEVICES = 2


def distributed() -> Any:
    """A context in which models are made; two devices share every batch."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        half = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [half] * DEVICES)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(DEVICES)])
        assert strategy.num_replicas_in_sync == DEVICES
        return strategy.scope()
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == DEVICES, devices
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    return nullcontext()


def copies_agree(variable: Any) -> bool:
    """Whether all devices hold the same bits of the variable."""
    value = variable.value
    if hasattr(value, "values"):  # mirrored
        return len({copy.numpy().tobytes() for copy in value.values}) == 1
    shards = getattr(value, "addressable_shards", ())
    return len({np.asarray(shard.data).tobytes() for shard in shards}) <= 1


def network() -> keras.Model:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, name="a"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.2, seed=1, name="drop"),
            layers.Dense(8, name="b"),
            layers.Dense(8, name="c"),
            layers.Dense(3, name="head"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    return model


def main(policy: str, *, spread: bool) -> dict[str, Any]:
    """Train with the policy, on two devices or on one."""
    scope = distributed() if spread else nullcontext()
    keras.utils.set_random_seed(0)
    with scope:
        model = network()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)).astype("float32")
    y = rng.integers(0, 3, 64)
    before = sha256_of_variables(tensors(model))
    freezing = FreezeCallback(policy)
    try:
        history = model.fit(
            x, y, batch_size=16, epochs=3, shuffle=False, verbose=0, callbacks=[freezing]
        )
    except BackendError as error:
        return {"refused": error.found}
    after = sha256_of_variables(tensors(model))
    return {
        "loss": history.history["loss"],
        "decisions": [[d.step, sorted(d.plan.frozen)] for d in freezing.decisions],
        "unmoved": [name for name in before if before[name] == after[name]],
        "torn": [name for name, v in tensors(model).items() if not copies_agree(v)],
        "held": sorted({hold.tensor for hold in freezing.certificate.holds}),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], spread=sys.argv[2] == "spread")))
