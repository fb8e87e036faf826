"""Is what `frostline inspect` foretells what is then measured?

For every model one process foretells all depths. Then, for each of some depths, a process of its
own builds the model afresh, freezes it as users do, and trains: seconds per step, the peak of its
resident set in these steps above what it was before (with all libraries loaded, but no model), and,
where a region can be skipped, seconds per cached step and bytes per sample. Whole tasks are runs of
`frostline fit` with the cache off and, from an empty one, on: the least of the epochs after the
first, and the first.

    python benchmarks/foretell.py [--only NAME ...] [--threads 1] [--clock cpu]
    python benchmarks/foretell.py --report    # the table from the log, no measurements
    python benchmarks/foretell.py --device cuda   # steps and memory of a GPU, all in one process

What is in the log is not measured again; delete lines to measure them anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from bench import (
    RESULTS,
    add_device,
    check_device,
    device_of,
    machine,
    made_by,
    precision,
    read,
    seconds,
    titled,
    where,
)
from frontier_models import SHARED, minilm_path
from frontier_runs import Stamps
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import v2
from transformers import (
    AutoModelForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from frostline.backends.torch.backend import TorchBackend
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.optimizer import parameter_groups
from frostline.cost import predicted_step_s
from frostline.errors import FrontierError
from frostline.frontier.cache import moved
from frostline.frontier.foretell import foretell_steps
from frostline.frontier.region import find_region
from frostline.frontier.trial import Recipe
from frostline.groups import LayerGroups
from frostline.memory import give_back_freed, keeping_freed, leaving_old_objects
from frostline.plan import FreezePlan
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.foretell import foretell_task
from frostline.tasks.run import fit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from models_for_tests import CIFAR_MEAN, CIFAR_STD, resnet20

BATCH = 32
CUDA_BATCH = 64
DEPTHS = 5
STEPS = 5
#: Of the runs whose epochs are measured, by their cache.
EPOCHS = {"off": 3, "on": 5}
BOUND = 0.15
#: Quantities that are compared: key in the log, words, factor and unit of the table.
COMPARED = {
    "step_s": ("step", 1e3, "ms"),
    "cached_step_s": ("cached step", 1e3, "ms"),
    "peak_memory_bytes": ("peak memory", 2**-20, "MiB"),
    "epoch_s": ("epoch", 1, "s"),
    "first_epoch_s": ("first epoch with cache", 1, "s"),
    "cached_epoch_s": ("later epoch with cache", 1, "s"),
}


# -- models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and one batch for it."""

    model: nn.Module
    example: Example
    targets: torch.Tensor

    @property
    def size(self) -> int:
        """Samples of the batch."""
        return len(self.targets)

    def on(self, device: str) -> Case:
        """The same on a device."""
        example = moved(self.example, torch.device(device))
        return Case(self.model.to(device), example, self.targets.to(device))


def _pictures(model: nn.Module, batch: int, side: int, classes: int = 10) -> Case:
    return Case(
        model, Example((torch.randn(batch, 3, side, side),)), torch.randint(classes, (batch,))
    )


def _resnet18(batch: int, side: int) -> Case:
    return _pictures(torchvision.models.resnet18(num_classes=10), batch, side)


def _vgg(batch: int, side: int) -> Case:
    return _pictures(torchvision.models.vgg11_bn(num_classes=10), batch, side)


def _resnet20(batch: int) -> Case:
    return _pictures(resnet20(20), batch, 32, 20)


def _squeezenet(batch: int) -> Case:
    model = torchvision.models.squeezenet1_0()
    weights = load_file(SHARED / "models/squeezenet10_imagenet/squeezenet1_0.fp16.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    model.classifier[1] = nn.Conv2d(512, 5, 1)
    return _pictures(model, batch, 224, 5)


def _minilm(batch: int, tokens: int) -> Case:
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=6)
    ids = torch.randint(1000, model.config.vocab_size, (batch, tokens))
    example = Example(kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return Case(model, example, torch.randint(6, (batch,)))


def _wav2vec2(batch: int) -> Case:
    config = Wav2Vec2Config(
        conv_dim=(256,) * 7,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        classifier_proj_size=128,
        num_labels=10,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    model = Wav2Vec2ForSequenceClassification(config)
    return Case(model, Example((torch.randn(batch, 16_000),)), torch.randint(10, (batch,)))


CASES: Mapping[str, tuple[str, Callable[[int], Case]]] = {
    "resnet18-96": ("ResNet-18, 96 px", lambda n: _resnet18(n, 96)),
    "resnet18-224": ("ResNet-18, 224 px", lambda n: _resnet18(n, 224)),
    "vgg11-96": ("VGG-11-bn, 96 px", lambda n: _vgg(n, 96)),
    "minilm-64": ("MiniLM, 64 tokens", lambda n: _minilm(n, 64)),
    "minilm-128": ("MiniLM, 128 tokens", lambda n: _minilm(n, 128)),
    "wav2vec2": ("wav2vec2 shape (7 convolutions, 4 layers of 256), 1 s", _wav2vec2),
    "resnet20": ("ResNet-20, 32 px", _resnet20),
    "squeezenet": ("SqueezeNet 1.0, 224 px", _squeezenet),
}


#: Whole tasks: words, model, data and settings, as `frostline fit` takes them.
TASKS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "resnet20-caltech20": (
        "ResNet-20 on caltech20_32: 800 training and 200 validation pictures of 32 px",
        {"model": "foretell:resnet20_task", "data": "caltech20_32"},
    ),
    "squeezenet-flowers5": (
        "SqueezeNet 1.0 on flowers5 at 96 px: JPEG pictures to decode",
        {"model": "torchvision:squeezenet1_0", "data": "flowers5", "image_size": 96},
    ),
}


def resnet20_task(num_classes: int) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """What `load_task` calls."""
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return resnet20(num_classes), v2.Compose([*steps, v2.Normalize(CIFAR_MEAN, CIFAR_STD)])


def settings(name: str, chosen: argparse.Namespace) -> RunConfig:
    given = TASKS[name][1]
    fixed = {"weights": "random", "augment": "none", "epochs": 10, "threads": chosen.threads}
    return load_config(None, given | fixed | {"data": str(SHARED / "data" / given["data"])})


def build(name: str, device: str = "cpu") -> Case:
    torch.manual_seed(0)
    return CASES[name][1](batch_of(device)).on(device)


def batch_of(device: str) -> int:
    """Samples of a step on a device."""
    return CUDA_BATCH if device == "cuda" else BATCH


# -- one process each --------------------------------------------------------------------------


def foretell(name: str, device: str = "cpu") -> dict[str, Any]:
    """All depths, foretold; and the sums of group costs alone, for comparison."""
    case = build(name, device)
    groups = layer_groups(case.model, case.example)
    recipe = Recipe(loss=lambda out: loss_of(out, case.targets), clip_norm=1.0)
    steps = foretell_steps(case.model, groups, case.example, recipe)
    plans = [plan_of(groups, d) for d in range(len(groups))]
    sums = [predicted_step_s(steps.groups, plan) for plan in plans]
    cached = [predicted_step_s(steps.groups, plan, frozen_prefix_cached=True) for plan in plans]
    return {
        "groups": list(groups.names),
        "spent_s": steps.spent_s,
        "depths": [
            {
                "depth": c.depth,
                "tried": c.tried,
                "step_s": c.step_s,
                "cached_step_s": c.cached_step_s,
                "fill_s": c.fill_s,
                "row_bytes": c.row_bytes,
                "peak_memory_bytes": c.peak_memory_bytes,
                "refused": c.refused,
                "sums_step_s": sums[c.depth],
                "sums_cached_step_s": cached[c.depth],
            }
            for c in steps.depths
        ],
    }


def measure(name: str, depth: int, device: str = "cpu") -> dict[str, Any]:
    """Real training at one depth."""
    warm_up(device)
    first = build(name, device)  # imports what this model needs
    layer_groups(first.model, first.example)
    del first
    grown = memory_from_now(device)
    case = build(name, device)
    groups = layer_groups(case.model, case.example)
    optimizer = torch.optim.AdamW(parameter_groups(case.model, groups, lr=1e-4, weight_decay=0.01))
    backend = TorchBackend(case.model, optimizer, groups=groups)
    backend.apply(plan_of(groups, depth))
    case.model.train()
    if device != "cuda":
        Path("/proc/self/clear_refs").write_text("5")  # loading the weights had a peak of its own

    def step(forward: Callable[[], Any]) -> None:
        backend.hold()
        optimizer.zero_grad(set_to_none=True)
        loss_of(forward(), case.targets).backward()
        nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
        optimizer.step()

    took = timed(lambda: step(lambda: case.model(*case.example.args, **case.example.kwargs)))
    found = {"depth": depth, "step_s": took, "peak_memory_bytes": grown()}
    return found | (measure_cached(case, step) if depth else {})


def foretell_epochs_of(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    found = foretell_task(settings(name, chosen))
    told = found.to_json()
    return {"groups": list(found.groups.names), **told}


def measure_epochs(name: str, depth: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Epochs of real runs, the first one aside: without the cache, and from an empty one on."""
    _, *later = epochs_of(name, depth, chosen, cache="off")
    found = {"depth": depth, "epoch_s": min(later)}
    if not depth:
        return found
    first, *later = epochs_of(name, depth, chosen, cache="on")
    return found | {"first_epoch_s": first, "cached_epoch_s": min(later)}


def epochs_of(name: str, depth: int, chosen: argparse.Namespace, *, cache: str) -> list[float]:
    """Seconds of the epochs of a run, each with its validation and checkpoint."""
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as place:
        changes = {
            "policy": f"first:groups={depth}" if depth else "full",
            "epochs": EPOCHS[cache],
            "output": Path(place) / "run",
            "cache": cache,
            "cache_dir": Path(place) / "cache",
        }
        fit(config=settings(name, chosen).model_copy(update=changes), on_event=stamps)
    return stamps.times(chosen.clock)["epochs_s"]


def measure_cached(case: Case, step: Callable[[Callable[[], Any]], None]) -> dict[str, Any]:
    try:
        region = find_region(case.model, case.example)
        if region.empty:
            return {"refused": "empty"}
        rows = region.fill(case.example)
        took = timed(lambda: step(lambda: region.run(case.example, rows)))
    except FrontierError as error:
        return {"refused": str(error)}
    size = sum(t.nbytes for t in rows.values()) // case.size
    return {"cached_step_s": took, "row_bytes": size}


def timed(work: Callable[[], None]) -> list[float]:
    work()
    took: list[float] = []
    while len(took) < STEPS or (sum(took) < 1 and len(took) < 200):
        took.append(seconds(work))  # waits for a GPU, as `fit` does to know the loss
    return took


def loss_of(output: Any, targets: torch.Tensor) -> torch.Tensor:
    scores = output if isinstance(output, torch.Tensor) else output.logits
    return nn.functional.cross_entropy(scores, targets)


def plan_of(groups: LayerGroups, depth: int) -> FreezePlan:
    return FreezePlan(frozen=frozenset(groups.names[:depth]))


def resident(line: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in status if x.startswith(f"{line}:"))


def memory_from_now(device: str) -> Callable[[], int]:
    """What gives the bytes by which the peak of memory then lies above the present use."""
    gc.collect()  # what was there before
    if device != "cuda":
        give_back_freed()
        before = resident("VmRSS")
        return lambda: resident("VmHWM") - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    return lambda: torch.cuda.max_memory_allocated() - held


def warm_up(device: str = "cpu") -> None:
    """Load what every training loads: kernels, the optimizer, the compiler it imports."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
    net.to(device)
    net(torch.randn(2, 3, 8, 8, device=device)).sum().backward()
    torch.optim.AdamW(net.parameters()).step()


# -- the log -----------------------------------------------------------------------------------


def child(chosen: argparse.Namespace, *arguments: str) -> dict[str, Any]:
    """The JSON that a process of this script printed last."""
    options = ["--threads", str(chosen.threads), "--clock", chosen.clock]
    done = subprocess.run(
        [sys.executable, __file__, *options, *arguments],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(chosen.threads)},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fill_log(chosen: argparse.Namespace) -> dict[str, Any]:
    file = log_file(chosen.device)
    log: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"models": {}}
    log["machine"] = machine(chosen)
    if chosen.device == "cuda":
        return fill_log_of_gpu(chosen, log)
    for name in chosen.only or (*CASES, *TASKS):
        entry = log["models"].setdefault(name, {"measured": {}})
        if "foretold" not in entry:
            entry["foretold"] = child(chosen, "--foretell", name)
            save(log)
        for depth in depths_of(entry):
            if str(depth) not in entry["measured"]:
                entry["measured"][str(depth)] = child(chosen, "--measure", name, str(depth))
                save(log)
        print(name, file=sys.stderr, flush=True)
    return log


def fill_log_of_gpu(chosen: argparse.Namespace, log: dict[str, Any]) -> dict[str, Any]:
    """All in this process: what torch allocated on a GPU is known without starting afresh."""
    for name in chosen.only or tuple(CASES):
        if name in TASKS:
            raise SystemExit(f"{name} is measured on the processor only")
        start = time.monotonic()
        warm_up("cuda")
        entry = log["models"].setdefault(name, {"measured": {}})
        if "foretold" not in entry:
            entry["foretold"] = foretell(name, "cuda")
            save(log)
        for depth in depths_of(entry):
            if str(depth) not in entry["measured"]:
                entry["measured"][str(depth)] = measure(name, depth, "cuda")
                save(log)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return log


def depths_of(entry: Mapping[str, Any]) -> list[int]:
    """The depths that are measured: evenly from nothing to all but the head."""
    last = len(entry["foretold"]["depths"]) - 1
    return sorted({round(i * last / (DEPTHS - 1)) for i in range(DEPTHS)})


def log_file(device: str) -> Path:
    return RESULTS / f"{titled('foretell', device)}.json"


def save(log: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    log_file(device_of(log["machine"])).write_text(json.dumps(log, indent=1) + "\n")


# -- the table ---------------------------------------------------------------------------------


def cells(log: Mapping[str, Any]) -> Iterator[tuple[str, int, str, float, float, bool]]:
    """Everything that was foretold and measured: model, depth, quantity, both, whether tried."""
    for name, entry in log["models"].items():
        foretold = {c["depth"]: c for c in entry.get("foretold", {}).get("depths", ())}
        for measured in entry["measured"].values():
            said = foretold[measured["depth"]]
            for key in COMPARED:
                if said.get(key) is not None and measured.get(key) is not None:
                    seen = measured[key]
                    least = min(seen) if isinstance(seen, list) else seen
                    yield name, measured["depth"], key, said[key], least, said["tried"]


def within(errors: list[float]) -> str:
    good = sum(abs(e) <= BOUND for e in errors)
    return f"{good} of {len(errors)} ({good / len(errors):.0%})" if errors else "-"


def table(log: Mapping[str, Any]) -> str:
    """Markdown, from the log alone."""
    m = log["machine"]
    found = list(cells(log))
    lines = [
        "# Foretold against measured",
        "",
        conditions(m),
        "",
        HOW_ON_GPU if "gpu" in m else HOW,
        (
            f"Least of {STEPS} steps or more. The error is foretold / measured - 1. Depths with * "
            "are those at which the prediction ran steps itself; others lie between two of these."
        ),
        "",
        "| quantity | within 15 % | of these at depths without trial steps | largest error |",
        "|---|---|---|---|",
    ]
    for key, (words, _, _) in COMPARED.items():
        errors = [said / seen - 1 for _, _, k, said, seen, _ in found if k == key]
        between = [s / seen - 1 for _, _, k, s, seen, tried in found if k == key and not tried]
        if errors:
            worst = max(errors, key=abs)
            lines.append(f"| {words} | {within(errors)} | {within(between)} | {worst:+.0%} |")
    for key, words in (("step_s", "step"), ("cached_step_s", "cached step")):
        errors = sums_errors(log, key)
        if errors:
            worst = max(errors, key=abs)
            lines.append(
                f"| {words} by sums of group costs alone | {within(errors)} | - | {worst:+.0%} |"
            )
    wanted = CASES if "gpu" in m else {**CASES, **TASKS}
    missing = [name for name in wanted if not log["models"].get(name, {}).get("measured")]
    if missing:
        lines += ["", f"Not compared yet: {', '.join(missing)}."]
    if "note" in log:
        lines += ["", log["note"]]
    for name, (title, _) in {**CASES, **TASKS}.items():
        if name in log["models"] and log["models"][name]["measured"]:
            clock = "processor" if m["clock"] == "cpu" else "wall"
            lines += ["", *model_lines(title, log["models"][name], name, found, clock)]
    return "\n".join(lines) + "\n"


def conditions(m: Mapping[str, Any]) -> str:
    """What and where it was measured."""
    if "gpu" in m:
        return (
            f"{where(m)}, batch {CUDA_BATCH}, AdamW, gradient norm clipped at 1, {precision(m)}. "
            f"{made_by('foretell', m)}"
        )
    return (
        f"torch {m['torch']}, {m['threads']} thread(s) of {m['cores']} cores ({m['processor']}), "
        f"{m['clock']} time, load when started {m['load_1min']}, batch {BATCH}, AdamW, gradient "
        f"norm clipped at 1, float32. {made_by('foretell', m)}"
    )


HOW = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[0].replace("\n", " ")
HOW_ON_GPU = (
    "For every model all depths are foretold. Then, at each of some depths, the model is built "
    "afresh, frozen as users do, and trained: seconds per step, the peak of what torch has "
    "allocated on the GPU above what it had before the model was built, and, where a region can be "
    "skipped, seconds per cached step, from rows on the GPU."
)


def sums_errors(log: Mapping[str, Any], key: str) -> list[float]:
    errors = []
    for entry in log["models"].values():
        for measured in entry["measured"].values():
            said = entry["foretold"]["depths"][measured["depth"]].get(f"sums_{key}")
            if said is not None and key in measured:
                errors.append(said / min(measured[key]) - 1)
    return errors


def model_lines(
    title: str, entry: Mapping[str, Any], name: str, found: list[tuple[Any, ...]], clock: str
) -> list[str]:
    mine = {(d, k): (said, seen) for n, d, k, said, seen, _ in found if n == name}
    keys = [k for k in COMPARED if any(key == k for _, key in mine)]
    heads = [f"{COMPARED[k][0]}, {COMPARED[k][2]}: foretold, measured" for k in keys]
    depths = entry["foretold"]["depths"]
    lines = [
        f"## {title}",
        "",
        (
            f"{len(entry['foretold']['groups'])} groups; the prediction took "
            f"{entry['foretold']['spent_s']:.0f} s of {clock} time."
        ),
        "",
        f"| frozen | {' | '.join(heads)} | KiB per sample |",
        f"|---|{'---|' * (len(heads) + 1)}",
    ]
    for measured in sorted(entry["measured"].values(), key=lambda m: m["depth"]):
        depth = measured["depth"]
        row = [f"{depth}{'*' if depths[depth]['tried'] else ''}"]
        for key in keys:
            said, seen = mine.get((depth, key), (None, None))
            scale = COMPARED[key][1]
            row.append(
                "-"
                if seen is None
                else f"{said * scale:.4g}, {seen * scale:.4g} ({said / seen - 1:+.0%})"
            )
        size = depths[depth]["row_bytes"]
        row.append("-" if size is None else f"{size / 1024:.4g}")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def of_one(chosen: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own is for."""
    if name := chosen.foretell:
        return foretell(name) if name in CASES else foretell_epochs_of(name, chosen)
    name, depth = chosen.measure[0], int(chosen.measure[1])
    return measure(name, depth) if name in CASES else measure_epochs(name, depth, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=(*CASES, *TASKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), help="default cpu; of a GPU wall")
    add_device(parser)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--foretell", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.clock = chosen.clock or ("wall" if chosen.device == "cuda" else "cpu")
    if not chosen.report:
        check_device(chosen)
    torch.set_num_threads(chosen.threads)
    if chosen.clock == "cpu":
        time.perf_counter = time.process_time  # everywhere, also where groups are measured
    if chosen.foretell or chosen.measure:
        with keeping_freed(), leaving_old_objects():  # as `fit` does
            print(json.dumps(of_one(chosen)))
        return
    log = read("foretell", chosen.device) if chosen.report else fill_log(chosen)
    text = table(log)
    log_file(chosen.device).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
