"""Does freezing save what it can? Step time of depth-k plans against two bounds.

For every k the shallowest k layer groups are frozen and whole training steps are timed: forward,
backward, AdamW. Plans are interleaved in random order, so that what else the machine does falls
on all alike, and compared within each round.

Bounds: 3/(3-2f), with f the frozen share of the forward pass, assumes that forward, input gradient
and weight gradient cost the same; the other is predicted from the measured cost of each group.

    python benchmarks/saving.py [--rounds 15] [--threads 2] [--clock wall] [--device cuda]
"""

from __future__ import annotations

import random
import statistics
from typing import Any

from bench import (
    Case,
    arguments,
    cases,
    describe,
    machine,
    made_by,
    read,
    step_seconds,
    write,
)

from frostline.backends.torch.backend import TorchBackend
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.cost import predicted_step_s, prefix_bound
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan


def plan_of(groups: LayerGroups, depth: int) -> FreezePlan:
    return FreezePlan(frozen=frozenset(groups.names[:depth]))


def measure(case: Case, rounds: int, repeats: int = 3) -> dict[str, Any]:
    """Step seconds of every depth in every round, and the measured cost of every group."""
    model = case.model.train()
    groups = measure_costs(model, layer_groups(model, case.example), case.example, repeats=repeats)
    optimizer = case.optimizer(model, groups)
    backend = TorchBackend(model, optimizer, groups=groups)
    order = random.Random(0)  # noqa: S311 (an order of measurements)
    times: dict[int, list[float]] = {depth: [] for depth in range(len(groups))}
    for _ in range(rounds):
        for depth in order.sample(sorted(times), len(times)):
            backend.apply(plan_of(groups, depth))
            case.step(model, optimizer)
            took = [step_seconds(lambda: case.step(model, optimizer)) for _ in range(2)]
            times[depth].append(min(took))
    forward = sum(g.cost.forward_s for g in groups if g.cost)
    full = predicted_step_s(groups, FreezePlan())
    return {
        "model": case.name,
        "depths": [
            {
                "depth": depth,
                "frozen": list(groups.names[:depth]),
                "forward_fraction": sum(g.cost.forward_s for g in groups[:depth] if g.cost)
                / forward,
                "predicted": full / predicted_step_s(groups, plan_of(groups, depth)),
                "seconds": times[depth],
            }
            for depth in times
        ],
    }


def rows(result: dict[str, Any]) -> list[str]:
    """One line of the table per depth."""
    full = result["depths"][0]["seconds"]
    lines = []
    for entry in result["depths"]:
        ratios = [a / b for a, b in zip(full, entry["seconds"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        f = entry["forward_fraction"]
        lines.append(
            f"| {entry['depth']} | {f:.0%} | {1e3 * statistics.median(entry['seconds']):.1f} "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {prefix_bound(min(1.0, f)):.2f} "
            f"| {entry['predicted']:.2f} | {middle / entry['predicted']:.0%} |"
        )
    return lines


def table(log: dict[str, Any]) -> str:
    """Markdown, from the log alone."""
    head = (
        "| groups frozen | of the forward pass | ms per step | speed-up (quartiles) "
        "| bound 3/(3-2f) | bound from measured costs | reached |\n|---|---|---|---|---|---|---|"
    )
    notes = (
        f"{describe(log)} {log['rounds']} rounds, interleaved; speed-up over nothing frozen within "
        f"each round, median. {made_by('saving', log['machine'])} A figure "
        "above the first bound is possible: the shallowest group that trains needs no input "
        "gradient, frozen normalisation runs in evaluation mode, and the optimizer skips frozen "
        "weights; the second bound counts the first and the last of these."
    )
    parts = ["# What freezing saves per step", "", notes]
    for result in log["results"]:
        parts += ["", f"## {result['model']}", "", head, *rows(result)]
    return "\n".join(parts) + "\n"


def main() -> None:
    chosen = arguments(__doc__, rounds=15)
    if chosen.report:
        log = read("saving", chosen.device)
        write("saving", log, table(log))
        return
    log = {"machine": machine(chosen), "rounds": chosen.rounds}
    log["results"] = []
    for make in cases(chosen.device):
        log["results"].append(measure(make(), chosen.rounds))
        write("saving", log, table(log))


if __name__ == "__main__":
    main()
