"""Layer groups of Keras's own architectures, and what freezing saves of a step, against the bound.

For each model: its layer groups with their parameters and costs, and the time of one training step
with the first groups frozen, as a share of the time of a full step. Freezing is done twice, by
plain Keras (`layer.trainable = False`, then compile) and by `KerasBackend`, on two models with the
same weights, in turns with the full step. Ratios are medians over the rounds.

    KERAS_BACKEND=tensorflow python benchmarks/keras_architectures.py

Each Keras backend has its own part of `keras_architectures.json`; the table in
`keras_architectures.md` is made from all of them.
"""

# ruff: noqa: PLC0415  only the framework that Keras runs on
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from frostline.backends.keras.backend import KerasBackend
from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.measure import measure_costs
from frostline.cost import predicted_step_s
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

NAME = "keras_architectures"
RESULTS = Path(__file__).parent / "results"
MODELS: dict[str, Callable[..., keras.Model]] = {
    "VGG16": keras.applications.VGG16,
    "ResNet50": keras.applications.ResNet50,
}
#: Shares of the backbone's groups that are frozen, from the input on.
DEPTHS = (0.5, 0.75, 1.0)
RATE = 1e-4
ABOUT = (
    "Time of a training step with the first groups frozen, over that of a full step, in turns. "
    "*plain*: `layer.trainable = False` before `compile`; *Frostline*: the same plan through "
    "`KerasBackend`; *bound*: (3 - 2f) / 3 for a frozen share f of the forward pass, which takes "
    "gradients to be as dear as the forward pass; *predicted*: from the costs measured. Weights "
    "are random: the cost is that of the shapes."
)
COLUMNS = (
    "model", "full step", "groups frozen", "parameters", "forward", "plain", "Frostline", "bound",
    "predicted",
)  # fmt: skip


class Stepper:
    """One model and several ways to train it, each with its own compiled function."""

    def __init__(self, model: keras.Model, x: Any, y: Any) -> None:
        self.model = model
        self._data = (x, y)

    def seconds(self) -> float:
        """Seconds of one training step, by the clock in use."""
        start = time.perf_counter()
        loss = self.model.train_on_batch(*self._data)
        float(np.ravel(loss)[0])
        return time.perf_counter() - start


class Plain(Stepper):
    """Plain Keras: flags of layers, then `compile`; a compiled function is kept for each depth."""

    def __init__(self, model: keras.Model, x: Any, y: Any) -> None:
        super().__init__(model, x, y)
        self._kept: dict[frozenset[str], tuple[Any, Any]] = {}

    def freeze(self, frozen: frozenset[str], layers: list[str]) -> None:
        """Freeze these layers and no others."""
        self.model.trainable = True
        for name in layers:
            self.model.get_layer(name).trainable = False
        if frozen not in self._kept:
            compiled(self.model)
            self.seconds()  # builds the optimizer and the function
            self._kept[frozen] = (self.model.optimizer, self.model.train_function)
        self.model.optimizer, self.model.train_function = self._kept[frozen]


class Frozen(Stepper):
    """The same through `KerasBackend`."""

    def __init__(self, model: keras.Model, x: Any, y: Any, groups: LayerGroups) -> None:
        super().__init__(model, x, y)
        compiled(model)
        self._backend = KerasBackend(model, groups=groups)

    def freeze(self, frozen: frozenset[str]) -> None:
        """Freeze these groups and no others."""
        self._backend.apply(FreezePlan(frozen=frozen))


def compiled(model: keras.Model) -> None:
    """SGD has no memory of its own, so that several functions of a large model fit."""
    model.compile(keras.optimizers.SGD(RATE), "sparse_categorical_crossentropy")


def measured(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Groups and ratios of one model."""
    shape = (chosen.pixels, chosen.pixels, 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((chosen.batch, *shape)).astype("float32")
    y = rng.integers(0, 10, chosen.batch)
    models = [MODELS[name](weights=None, input_shape=shape, classes=10) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    groups = measure_costs(models[0], layer_groups(models[0]), x, repeats=chosen.rounds)
    plain, ours = Plain(models[0], x, y), Frozen(models[1], x, y, groups)
    plans = {
        share: frozenset(groups.names[: max(1, round(share * len(groups.backbone)))])
        for share in DEPTHS
    }
    full = frozenset[str]()
    times: dict[tuple[str, frozenset[str]], list[float]] = {}
    for turn in range(chosen.rounds + 1):
        for frozen in (full, *plans.values()):
            plain.freeze(frozen, layers_of(groups, frozen))
            ours.freeze(frozen)
            for who, stepper in (("plain", plain), ("ours", ours)):
                if not turn:
                    stepper.seconds()  # traces
                    continue
                times.setdefault((who, frozen), []).append(stepper.seconds())
    rows = [row(groups, share, frozen, times, full) for share, frozen in plans.items()]
    step_s = statistics.median(times["plain", full])
    ours_s = statistics.median(times["ours", full])
    print(f"{name}: full step {step_s:.3f} s, through KerasBackend {ours_s:.3f} s", flush=True)
    return {
        "groups": [group(g, groups) for g in groups],
        "head": sorted(groups.head),
        "step_s": step_s,
        "ours_step_s": ours_s,
        "rows": rows,
    }


def layers_of(groups: LayerGroups, frozen: frozenset[str]) -> list[str]:
    """Layers of these groups that plain Keras finds by name."""
    return [m.name for g in groups if g.name in frozen for m in g.modules if "/" not in m.name]


def row(
    groups: LayerGroups,
    share: float,
    frozen: frozenset[str],
    times: dict[tuple[str, frozenset[str]], list[float]],
    full: frozenset[str],
) -> dict[str, Any]:
    """One frozen depth: ratios of step times, and what bounds them."""
    forward = {g.name: g.cost.forward_s if g.cost else 0.0 for g in groups}
    part = sum(forward[name] for name in frozen) / sum(forward.values())
    plan = FreezePlan(frozen=frozen)

    def ratio(who: str) -> float:
        pairs = zip(times[who, frozen], times[who, full], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {
        "share": share,
        "frozen": len(frozen),
        "parameters": sum(groups[n].parameter_count for n in frozen) / groups.parameter_count,
        "forward": part,
        "plain": ratio("plain"),
        "ours": ratio("ours"),
        "bound": (3 - 2 * part) / 3,
        "predicted": predicted_step_s(groups, plan) / predicted_step_s(groups, FreezePlan()),
    }


def group(g: Any, groups: LayerGroups) -> dict[str, Any]:
    """One layer group with its share of the forward pass."""
    whole = sum(other.cost.forward_s for other in groups if other.cost) or 1.0
    return {
        "name": g.name,
        "parameters": g.parameter_count,
        "layers": sum(1 for m in g.modules),
        "forward": g.cost.forward_s / whole,
        "activation_bytes": g.cost.activation_bytes,
    }


def table(log: dict[str, Any]) -> str:
    """Markdown, from the log alone."""
    lines = ["# Keras's architectures: layer groups, and what freezing saves of a step", "", ABOUT]
    for backend, part in log.items():
        m = part["machine"]
        lines += ["", f"## Keras on {backend}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for name, found in part["models"].items():
            count = len(found["groups"])
            for r in found["rows"]:
                lines.append(
                    f"| {name} | {1e3 * found['step_s']:.0f} ms | {r['frozen']} of {count} "
                    f"| {r['parameters']:.0%} | {r['forward']:.0%} | {r['plain']:.2f} "
                    f"| {r['ours']:.2f} | {r['bound']:.2f} | {r['predicted']:.2f} |"
                )
        about = (
            f"Keras {m['keras']}, {backend} {m['version']}, batch {m['batch']} of {m['pixels']} "
            f"pixels, {m['rounds']} rounds, {m['threads']} thread(s) of {m['cores']} cores "
            f"({m['processor']}), {m['clock']} time, load when started {m['load_1min']}."
        )
        lines += ["", about]
        for name, found in part["models"].items():
            lines += ["", f"### {name} on {backend}", ""]
            lines += [
                "| depth | layer group | layers | parameters | forward |",
                "|---|---|---|---|---|",
            ]
            for depth, g in enumerate(found["groups"]):
                head = " (head)" if g["name"] in found["head"] else ""
                lines.append(
                    f"| {depth} | {g['name']}{head} | {g['layers']} | {g['parameters']:,} "
                    f"| {g['forward']:.1%} |"
                )
    lines += ["", f"Made by `python benchmarks/{NAME}.py` from `{NAME}.json`.", ""]
    return "\n".join(lines)


def machine(chosen: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "keras": keras.__version__,
        "version": __import__(keras.backend.backend()).__version__,
        "clock": chosen.clock,
        "batch": chosen.batch,
        "pixels": chosen.pixels,
        "rounds": chosen.rounds,
        "threads": chosen.threads,
        "cores": os.cpu_count(),
        "processor": next(found, platform.processor() or "unknown"),
        "load_1min": round(os.getloadavg()[0], 1),
    }


def set_threads(count: int) -> None:
    """Threads for arithmetic, where the backend lets itself be told in time."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(count)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    elif keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--quick", action="store_true", help="small sizes, to a temporary folder")
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    chosen = parser.parse_args()
    folder = Path(tempfile.gettempdir()) if chosen.quick else RESULTS
    if chosen.quick:
        chosen.batch, chosen.pixels, chosen.rounds = 4, 64, 3
    path = folder / f"{NAME}.json"
    log = json.loads(path.read_text()) if path.exists() else {}
    if not chosen.report:
        set_threads(chosen.threads)
        if chosen.clock == "cpu":
            time.perf_counter = time.process_time
        part = log.setdefault(keras.backend.backend(), {"models": {}})
        part["machine"] = machine(chosen)
        for name in chosen.only:
            part["models"][name] = measured(name, chosen)
            gc.collect()
            keras.backend.clear_session()
        path.write_text(json.dumps(log, indent=1) + "\n")
    (folder / f"{NAME}.md").write_text(table(log))
    print(table(log))


if __name__ == "__main__":
    main()
