"""What does the driver cost with a policy that never changes its plan, and what do digests cost?

Three figures per model: the driver's calls alone, in microseconds against a training step; whole
steps with the driver against the same steps frozen by hand without Frostline, interleaved; and
SHA-256 over everything frozen, in MB/s and as a share of a run of 100 steps.

    python benchmarks/overhead.py [--rounds 60] [--threads 2] [--clock wall] [--device cuda]
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable
from typing import Any

from bench import (
    Case,
    arguments,
    cases,
    describe,
    machine,
    made_by,
    read,
    seconds,
    step_seconds,
    write,
)
from torch import nn

from frostline.backends.torch import digest
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.grouping import layer_groups
from frostline.driver import Driver
from frostline.groups import LayerGroups

POLICY = "linear-probe"
SHORT_RUN_STEPS = 100


def freeze_by_hand(model: nn.Module, groups: LayerGroups) -> None:
    """What careful users write themselves: flags off, frozen parts in evaluation mode."""
    model.requires_grad_(requires_grad=False)
    for group in groups:
        for info in group.modules:
            module = model.get_submodule(info.name)
            module.training = group.name in groups.head
        for p in group.parameters:
            model.get_parameter(p.name).requires_grad = group.name in groups.head


def calls_alone(driver: Driver, repeats: int = 300) -> float:
    """Seconds of the driver's calls around one step in which nothing happens."""

    def step() -> None:
        driver.begin_step()
        driver.end_step()

    return statistics.median(seconds(step) for _ in range(repeats))


def paired(plain: Callable[[], None], driven: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Seconds of both in turn, the order changing from round to round."""
    times: dict[str, list[float]] = {"plain": [], "driven": []}
    for i in range(rounds):
        both = [("plain", plain), ("driven", driven)]
        for name, work in both if i % 2 else reversed(both):
            times[name].append(step_seconds(work))
    return times


def digests(model: nn.Module) -> dict[str, Any]:
    """MB/s of SHA-256 over all tensors of a model, with one thread and with all."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    size = sum(t.nbytes for t in tensors.values())
    took = {}
    for name, workers in (("one_thread", 1), ("all_threads", os.cpu_count() or 1)):
        runs = [
            seconds(lambda workers=workers: digest.sha256_of_tensors(tensors, workers=workers))
            for _ in range(7)
        ]
        took[name] = min(runs)
    return {"bytes": size, "seconds": took}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    by_hand, model = copy.deepcopy(case.model), case.model
    groups = layer_groups(model, case.example)
    by_hand.train()
    freeze_by_hand(by_hand, groups)
    model.train()
    optimizers = [case.optimizer(m, groups) for m in (by_hand, model)]
    driver = torch_driver(model, optimizers[1], POLICY, groups=groups)

    def plain() -> None:
        case.step(by_hand, optimizers[0])

    def driven() -> None:
        with driver.step():
            case.step(model, optimizers[1])

    for work in (plain, driven, plain, driven):
        work()
    times = paired(plain, driven, rounds)
    assert driver.finish().holds
    again = torch_driver(model, optimizers[1], POLICY, groups=groups)
    again.start()
    return {
        "model": case.name,
        "held_tensors": len(again.plan.held_tensors(groups)),
        "calls_s": calls_alone(again),
        "times": times,
        "digests": digests(model),
    }


def row(result: dict[str, Any]) -> str:
    plain, driven = result["times"]["plain"], result["times"]["driven"]
    step = statistics.median(plain)
    low, middle, high = statistics.quantiles(
        [b / a - 1 for a, b in zip(plain, driven, strict=True)], n=4
    )
    size, took = result["digests"]["bytes"], result["digests"]["seconds"]
    rates = " / ".join(f"{size / 1e6 / took[n]:,.0f}" for n in ("one_thread", "all_threads"))
    # Twice over everything: at the first freeze and at the end.
    share = 2 * took["all_threads"] / (SHORT_RUN_STEPS * step)
    return (
        f"| {result['model']} | {result['held_tensors']} | {1e3 * step:.1f} "
        f"| {1e6 * result['calls_s']:.0f} | {result['calls_s'] / step:.2%} "
        f"| {middle:+.2%} ({low:+.2%} to {high:+.2%}) | {size / 1e6:.0f} | {rates} | {share:.2%} |"
    )


def table(log: dict[str, Any]) -> str:
    """Markdown, from the log alone."""
    head = (
        "| model | tensors held | ms per step, by hand | driver's calls, µs | of the step "
        "| step with driver against by hand (quartiles) | MB | SHA-256, MB/s, one / all threads "
        f"| of a run of {SHORT_RUN_STEPS} steps |\n|---|---|---|---|---|---|---|---|---|"
    )
    notes = (
        f"{describe(log)} Policy `{POLICY}`: the cheapest step there is, so the hardest case. "
        f"{log['rounds']} pairs of steps. {made_by('overhead', log['machine'])}"
    )
    lines = ["# What the driver costs", "", notes, "", head, *map(row, log["results"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    chosen = arguments(__doc__, rounds=60)
    if chosen.report:
        log = read("overhead", chosen.device)
    else:
        log = {"machine": machine(chosen), "rounds": chosen.rounds}
        log["results"] = [measure(make(), chosen.rounds) for make in cases(chosen.device)]
    write("overhead", log, table(log))


if __name__ == "__main__":
    main()
