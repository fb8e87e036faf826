"""What both sides of the parity tests share: data, weights, names, policies. NumPy only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from frostline.groups import GroupCost, LayerGroup, LayerGroups, ModuleInfo, TensorInfo

SIZES = (6, 8, 8, 8)  # three blocks of norm, dense, tanh, dropout of rate 0
CLASSES = 3
BATCH, PER_EPOCH, EPOCHS = 16, 10, 5
STEPS = PER_EPOCH * EPOCHS
MOMENTUM, EPSILON = 0.9, 1e-3  # of batch norm
RATES = {"sgd": 0.1, "momentum": 0.03, "adam": 0.01}
BLOCKS = ("block0", "block1", "block2")
GROUPS = (*BLOCKS, "head")
COST = GroupCost(0.01, 0.01, 0.01, 0.001, 1024)

#: Every family: static, scheduled, by validation, by gradients, by activations, by weights.
POLICIES = (
    "full",
    "linear-probe",
    "first:fraction=0.5",
    "bitfit",
    "all-but-norm",
    "gradual:every=10st",
    "freezeout",
    "freeze-training",
    "ulmfit:until=50%,factor=1.3",
    "lp-ft",
    "chain-thaw:length=20%",
    "plateau:min_delta=0.05",
    "lisa:every=7st",
    "hift:every=5st",
    "auto-rgn",
    "autofreeze:every=5st",
    "grades:tau=0.9,every=2st,start=20%",
    "egeria:tolerance=2,window=2,every=2st",
    "fim",
    "spectrum:share=0.7",
    "apf:threshold=0.9,crowded=0,every=2st",
)


@dataclass(frozen=True)
class Tensor:
    """One tensor under the names of both sides; `turned`: the kernel is transposed on one."""

    torch: str
    keras: str
    kind: str
    shape: tuple[int, ...]
    trains: bool = True

    @property
    def turned(self) -> bool:
        return len(self.shape) == 2


def tensors() -> dict[str, list[Tensor]]:
    """By group; shapes as Keras has them."""
    found: dict[str, list[Tensor]] = {}
    for block, (wide_in, wide_out) in zip(BLOCKS, itertools.pairwise(SIZES), strict=True):
        found[block] = [
            Tensor(f"{block}.dense.weight", f"{block}/dense/kernel", "weight", (wide_in, wide_out)),
            Tensor(f"{block}.dense.bias", f"{block}/dense/bias", "bias", (wide_out,)),
            *(
                Tensor(f"{block}.norm.{t}", f"{block}/norm/{k}", "norm", (wide_in,), trains)
                for t, k, trains in (
                    ("weight", "gamma", True),
                    ("bias", "beta", True),
                    ("running_mean", "moving_mean", False),
                    ("running_var", "moving_variance", False),
                )
            ),
        ]
    found["head"] = [
        Tensor("head.weight", "head/kernel", "weight", (SIZES[-1], CLASSES)),
        Tensor("head.bias", "head/bias", "bias", (CLASSES,)),
    ]
    return found


def groups(side: str) -> LayerGroups:
    """The layer groups with the names of "torch" or "keras", and costs as if measured."""
    items = []
    for depth, (name, found) in enumerate(tensors().items()):
        infos = [
            (t.trains, TensorInfo(getattr(t, side), _shape(t, side), kind=t.kind)) for t in found
        ]
        joint = "." if side == "torch" else "/"
        kinds = {"dense": "Linear", "norm": "BatchNorm1d", "drop": "Dropout"}
        if side == "keras":
            kinds = {"dense": "Dense", "norm": "BatchNormalization", "drop": "Dropout"}
        inner = [ModuleInfo(f"{name}{joint}{k}", v) for k, v in kinds.items()]
        items.append(
            LayerGroup(
                name,
                depth,
                tuple(i for trains, i in infos if trains),
                tuple(i for trains, i in infos if not trains),
                (ModuleInfo(name, "Block"), *(inner if name != "head" else ())),
                cost=COST,
            )
        )
    return LayerGroups(tuple(items), head=frozenset({"head"}))


def _shape(tensor: Tensor, side: str) -> tuple[int, ...]:
    return tensor.shape[::-1] if side == "torch" else tensor.shape


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Initial values, float32, by Keras's names."""
    source, found = np.random.default_rng(seed), {}
    for each in (t for group in tensors().values() for t in group):
        value = source.normal(size=each.shape) / np.sqrt(each.shape[0])
        if each.kind == "norm":
            ones = each.keras.endswith(("gamma", "moving_variance"))
            value = np.ones(each.shape) if ones else np.zeros(each.shape)
        found[each.keras] = value.astype("float32")
    return found


def data(seed: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (samples, 6) float32 and labels (samples,) int64 that follow from them."""
    source = np.random.default_rng(seed)
    x = source.normal(size=(samples, SIZES[0])).astype("float32")
    teacher = np.random.default_rng(99).normal(size=(SIZES[0], CLASSES))
    y = (np.tanh(x @ teacher) + source.normal(size=(samples, CLASSES)) / 3).argmax(axis=1)
    return x, y.astype("int64")


TRAIN = data(1, BATCH * PER_EPOCH)
VAL = data(2, 64)
