"""What the benchmarks share: the models, one training step, and the machine they ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from frostline.backends.torch.example import Example
from frostline.backends.torch.optimizer import parameter_groups
from frostline.groups import LayerGroups

BATCH = 16
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A model with random weights and one batch for it."""

    name: str
    model: nn.Module
    example: Example
    targets: torch.Tensor

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


def resnet18() -> Case:
    """ResNet-18 of torchvision, 10 classes, 112 pixels."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    example = Example((torch.randn(BATCH, 3, 112, 112),))
    return Case("ResNet-18, 112 px", model, example, torch.randint(10, (BATCH,)))


def minilm() -> Case:
    """A BERT of the shape of all-MiniLM-L6-v2 (6 layers of 384), 64 tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=6,
    )
    ids = torch.randint(config.vocab_size, (BATCH, 64))
    example = Example(kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    model = BertForSequenceClassification(config)
    return Case("BERT 6x384 (MiniLM), 64 tokens", model, example, torch.randint(6, (BATCH,)))


CASES: tuple[Callable[[], Case], ...] = (resnet18, minilm)


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call, by the clock in use."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.clock == "cpu":
        time.perf_counter = time.process_time  # everywhere, also where groups are measured
    return chosen


def machine(chosen: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
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
    return (
        f"torch {m['torch']}, {m['threads']} threads of {m['cores']} cores ({m['processor']}), "
        f"{m['clock']} time, load when started {m['load_1min']}, batch {BATCH}, AdamW, float32."
    )


def write(name: str, log: dict[str, Any], table: str) -> None:
    """Write the log and the table made from it, side by side."""
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
