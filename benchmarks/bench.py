"""What the benchmarks share: the models, one training step, and the machine they ran on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from frostline.backends.torch.example import Example
from frostline.backends.torch.optimizer import parameter_groups
from frostline.frontier.cache import moved
from frostline.groups import LayerGroups

BATCH = 16
#: On a GPU a batch of 16 measures how fast Python starts kernels.
CUDA_BATCH = 64
#: On a GPU shorter steps are timed in blocks of about so long.
SHORT_S, BLOCK_S = 5e-3, 20e-3
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A model with random weights and one batch for it."""

    name: str
    model: nn.Module
    example: Example
    targets: torch.Tensor

    def on(self, device: str) -> Case:
        """The same on a device."""
        return dataclasses.replace(
            self,
            model=self.model.to(device),
            example=moved(self.example, torch.device(device)),
            targets=self.targets.to(device),
        )

    def optimizer(self, model: nn.Module, groups: LayerGroups) -> torch.optim.Optimizer:
        """AdamW over every parameter, grouped by layer group."""
        return torch.optim.AdamW(parameter_groups(model, groups, lr=1e-4, weight_decay=0.01))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Forward, backward, update."""
        out = model(*self.example.args, **self.example.kwargs)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        nn.functional.cross_entropy(logits, self.targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def resnet18(batch: int = BATCH) -> Case:
    """ResNet-18 of torchvision, 10 classes, 112 pixels."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    example = Example((torch.randn(batch, 3, 112, 112),))
    return Case("ResNet-18, 112 px", model, example, torch.randint(10, (batch,)))


def minilm(batch: int = BATCH) -> Case:
    """A BERT of the shape of all-MiniLM-L6-v2 (6 layers of 384), 64 tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=6,
    )
    ids = torch.randint(config.vocab_size, (batch, 64))
    example = Example(kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    model = BertForSequenceClassification(config)
    return Case("BERT 6x384 (MiniLM), 64 tokens", model, example, torch.randint(6, (batch,)))


CASES: tuple[Callable[[int], Case], ...] = (resnet18, minilm)


def cases(device: str) -> list[Callable[[], Case]]:
    """What makes the cases on a device, in the batch size that it is measured with."""
    size = batch_of(device)
    return [lambda make=make: make(size).on(device) for make in CASES]


def batch_of(device: str) -> int:
    """Samples of a step on a device."""
    return CUDA_BATCH if device == "cuda" else BATCH


def runs_ahead() -> bool:
    """Whether work goes on after the call that began it has returned: a GPU is in use."""
    return torch.cuda.is_initialized()


def wait() -> None:
    """Until all work that was begun is done: every timed block begins and ends with it."""
    if runs_ahead():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call, by the clock in use."""
    return _seconds_of(work, 1)


def step_seconds(work: Callable[[], object]) -> float:
    """Seconds of one step.

    On a GPU the mean of several where they are short: in training the next step begins while the
    last one still runs, and waiting after each would measure the waiting.
    """
    took = _seconds_of(work, 1)
    if not runs_ahead() or took >= SHORT_S:
        return took
    return _seconds_of(work, math.ceil(BLOCK_S / max(took, 1e-4)))


def _seconds_of(work: Callable[[], object], count: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(count):
        work()
    wait()
    return (time.perf_counter() - start) / count


def add_device(parser: argparse.ArgumentParser, devices: Sequence[str] = ("cpu", "cuda")) -> None:
    """The option `--device`."""
    parser.add_argument(
        "--device",
        choices=devices,
        default="cpu",
        help="cuda: on a GPU, with larger batches; log and table are files of their own",
    )


def check_device(chosen: argparse.Namespace) -> None:
    """Stop where the GPU that was asked for is not there, or its time could not be told.

    Raises:
        SystemExit: says what to do.
    """
    if chosen.device != "cuda":
        return
    if chosen.clock == "cpu":
        raise SystemExit("--device cuda needs --clock wall: a processor does not see a GPU's time")
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here; --device cpu runs")
    torch.cuda.init()  # from now on every timed block waits for it


def titled(name: str, device: str) -> str:
    """The name of log and table: those of a GPU are files of their own.

    Example:
        >>> titled("saving", "cpu"), titled("saving", "cuda")
        ('saving', 'saving_cuda')
    """
    return name if device == "cpu" else f"{name}_{device}"


def device_of(machine: Mapping[str, Any]) -> str:
    """The device that figures are of, by what the log says of the machine."""
    return "cuda" if "gpu" in machine else "cpu"


def made_by(name: str, machine: Mapping[str, Any]) -> str:
    """The words on where a table comes from."""
    device = device_of(machine)
    option = "" if device == "cpu" else f" --device {device}"
    return f"Made by `python benchmarks/{name}.py{option}` from `{titled(name, device)}.json`."


def arguments(doc: str | None, rounds: int) -> argparse.Namespace:
    """The options of every benchmark; sets the threads and the clock."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds, for a machine that others use, with --threads 1",
    )
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    add_device(parser)
    chosen = parser.parse_args()
    if not chosen.report:
        check_device(chosen)
    torch.set_num_threads(chosen.threads)
    if chosen.clock == "cpu":
        time.perf_counter = time.process_time  # everywhere, also where groups are measured
    return chosen


def machine(chosen: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    on_gpu = getattr(chosen, "device", "cpu") == "cuda"  # scripts without the option run on the CPU
    gpu = {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
    return gpu | {
        "clock": chosen.clock,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def describe(log: dict[str, Any]) -> str:
    """The line under a table."""
    m = log["machine"]
    batch = batch_of(device_of(m))
    return f"{where(m)}, load when started {m['load_1min']}, batch {batch}, AdamW, {precision(m)}."


def where(m: Mapping[str, Any]) -> str:
    """What a machine is, and by what clock it was measured."""
    gpu = f"{m['gpu']}, " if "gpu" in m else ""
    return (
        f"{gpu}torch {m['torch']}, {m['threads']} threads of {m['cores']} cores "
        f"({m['processor']}), {m['clock']} time"
    )


def precision(m: Mapping[str, Any]) -> str:
    """Of the arithmetic; torch's default on CUDA allows TF32 in convolutions."""
    return "float32 (TF32 in convolutions, as torch has it)" if "gpu" in m else "float32"


def read(name: str, device: str) -> dict[str, Any]:
    """The log of a benchmark."""
    return json.loads((RESULTS / f"{titled(name, device)}.json").read_text("utf-8"))


def write(name: str, log: dict[str, Any], table: str) -> None:
    """Write the log and the table made from it, side by side."""
    name = titled(name, device_of(log["machine"]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(log, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


def processor() -> str:
    """The name that the processor gives itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or "unknown")
