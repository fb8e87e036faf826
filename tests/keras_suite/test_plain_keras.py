"""What plain Keras does in each trap, and that the callback does right in all of them.

The first half watches upstream: when a verdict changes there, docs/keras_traps.md is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import keras_trap_cases as traps

#: Keras's torch backend calls `np.array(tensor)`, and torch's `__array__` has no `copy` yet.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

BACKENDS = ("tensorflow", "jax", "torch")

#: Verdicts in this order.
PLAIN = {
    "freeze_in_fit": ("moves, silent", "raises", "right"),
    "freeze_in_fit_remade": ("right", "raises", "right"),
    "unfreeze_in_fit": ("raises", "raises", "raises"),
    "unfreeze_in_fit_unmade": ("stuck, silent", "raises", "raises"),
    "unfreeze_all": ("stuck, silent", "right", "right"),
    "freeze_between_fits": ("moves, silent", "raises", "right"),
    "recompile": ("stuck, silent", "stuck, silent", "stuck, silent"),
    "ema_overwrite": ("moves, raises", "raises", "moves, raises"),
    "ema_end_of_fit": ("stuck, silent", "raises", "raises"),
    "ema_second_fit": ("right", "raises", "right"),
    "zero_gradients": ("moves, silent", "moves, silent", "moves, silent"),
    "accumulation": ("right", "moves, silent", "right"),
    "loss_scale": ("right", "raises", "right"),
    "norm_by_variable": ("moves, silent", "moves, silent", "moves, silent"),
    "dropout": ("moves, silent", "moves, silent", "moves, silent"),
    "nested": ("right", "right", "right"),
    "shared": ("right", "raises", "stuck, silent"),
    "flipped_back": ("right", "raises", "raises"),
    "adam_jump": ("moves, silent", "moves, silent", "moves, silent"),
}


def test_every_case_has_its_verdict() -> None:
    assert PLAIN.keys() == traps.CASES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_what_plain_keras_does(name: str) -> None:
    expected = PLAIN[name][BACKENDS.index(keras.backend.backend())]
    assert traps.CASES[name][1](frostline=False).verdict == expected


#: What Frostline leaves as Keras has it: one step count for all weights is Keras's Adam.
KEPT = {"adam_jump": "moves, silent"}


@pytest.mark.parametrize("name", PLAIN)
def test_the_callback_does_right(name: str) -> None:
    assert traps.CASES[name][1](frostline=True).verdict == KEPT.get(name, "right")
