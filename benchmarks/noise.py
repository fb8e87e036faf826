"""What do freezing rules do on pure noise? Which of them are schedules in disguise?

Every registered policy decides over a pretend run of 20 epochs of 50 steps, on 12 groups and a
head. Signals are independent draws, the same distribution for every group and at every time;
validation is a plateau with noise. There is nothing to find: whatever a rule freezes here it
freezes by construction. No training, no framework; a minute or two.

    python benchmarks/noise.py [--seeds 10]

Writes `results/noise.json` and the table in docs/noise.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_report import RESULTS, ROOT, filled
from specs import default_specs

from frostline.clock import Duration, Progress
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, EventKind, Policy
from frostline.registry import make_policy
from frostline.signals import SIGNALS, Need, units_of
from frostline.testing import example_groups

EPOCHS, STEPS_PER_EPOCH = 20, 50
TOTAL = EPOCHS * STEPS_PER_EPOCH
BACKBONE = 12
QUARTERS = (0.25, 0.5, 0.75, 1.0)
PEAK_RATE, WARMUP = 3e-4, 0.1
#: Further forms, besides the default of every policy.
VARIANTS = ("autofreeze:every=5%",)
PAGE = ROOT / "docs" / "noise.md"

Draw = Callable[[random.Random], float]


def log_normal(source: random.Random) -> float:
    """The exponential of a standard normal draw."""
    return source.lognormvariate(0, 1)


def absolute_normal(source: random.Random) -> float:
    """Magnitude of a standard normal draw."""
    return abs(source.gauss(0, 1))


def constant(source: random.Random) -> float:
    """No noise either."""
    del source
    return 1.0


def squeezed(value: float) -> float:
    """Into [0, 1), where a similarity or a share lives."""
    return value / (1 + value)


_BOUNDED = ("cka_", "cosine_", "effective_perturbation")


@dataclass(frozen=True)
class Noise:
    """Signals and metrics that carry no information.

    Attributes:
        draw: distribution of the signals.
        seed: of the signals.
        metrics_seed: of loss and validation.
    """

    draw: Draw = log_normal
    seed: int = 0
    metrics_seed: int = 0

    def values(
        self, need: Need, groups: LayerGroups, plan: FreezePlan, progress: Progress
    ) -> dict[str, float]:
        """A reading of one signal: of what trains, where frozen groups have none."""
        source = random.Random(f"{self.seed}/{need.signal}/{progress.step}")  # noqa: S311
        frozen = plan.frozen_parameters(groups)
        absent = SIGNALS[need.signal].trained_only and not need.frozen_too
        found: dict[str, float] = {}
        for unit in units_of(groups, need.per):
            value = self._value(need.signal, source, progress)
            if not (absent and unit.parameter_names <= frozen):
                found[unit.name] = value
        return found

    def _value(self, signal: str, source: random.Random, progress: Progress) -> float:
        if signal == "learning_rate":
            return rate(progress)
        if signal == "loss":  # one for all groups
            return self.metrics(progress.step)["train_loss"]
        value = self.draw(source)
        if signal == "update_importance" and self.draw is not constant:
            value = source.gauss(0, 1)  # of either sign
        return squeezed(value) if signal.startswith(_BOUNDED) else value

    def metrics(self, step: int) -> dict[str, float]:
        """A plateau with noise."""
        source = random.Random(f"{self.metrics_seed}/metrics/{step}")  # noqa: S311
        return {
            "train_loss": 0.5 + source.gauss(0, 0.02),
            "val_loss": 0.8 + source.gauss(0, 0.02),
            "val_accuracy": min(1.0, 0.75 + source.gauss(0, 0.01)),
        }


def rate(progress: Progress) -> float:
    """Linear warm-up over a tenth of the run, then a cosine to 0."""
    done = progress.fraction or 0.0
    if done < WARMUP:
        return PEAK_RATE * (done + 1 / TOTAL) / WARMUP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def plans(policy: Policy, groups: LayerGroups, noise: Noise) -> list[FreezePlan]:
    """The plan in force after 0, 1, ... TOTAL steps."""
    needs = [(need, *_window(need)) for need in policy.needs()]
    signals: dict[str, Mapping[str, float]] = {}
    sampled: dict[str, int] = {}
    plan, progress = FreezePlan(), Progress(0, TOTAL, STEPS_PER_EPOCH)
    for need, _, _ in needs:
        if need.every is None:
            signals[need.signal] = noise.values(need, groups, plan, progress)
            sampled[need.signal] = 0
    state, found = policy.init(groups), []
    for step in range(TOTAL):
        progress = Progress(step, TOTAL, STEPS_PER_EPOCH)
        kind = EventKind.STEP if step else EventKind.START
        event = Event(kind, progress, dict(signals), sampled=dict(sampled))
        plan, state = policy.decide(groups, state, event)
        found.append(plan)
        for need, start, end in needs:
            if _reads(need, start, end, step):
                signals[need.signal] = noise.values(need, groups, plan, progress)
                sampled[need.signal] = step + 1
        done = Progress(step + 1, TOTAL, STEPS_PER_EPOCH)
        if done.step % STEPS_PER_EPOCH == 0:
            metrics = noise.metrics(done.step)
            event = Event(EventKind.EVALUATED, done, dict(signals), metrics, dict(sampled))
            plan, state = policy.decide(groups, state, event)
    return [*found, plan]


def _window(need: Need) -> tuple[int, int]:
    """First step of a request, and the first step past it."""
    start = _passed(need.after)
    return start, TOTAL + 1 if need.until is None else _passed(need.until)


def _passed(lengths: tuple[Duration, ...]) -> int:
    start = 0
    for length in lengths:
        start += length.steps(Progress(0, max(1, TOTAL - start), STEPS_PER_EPOCH))
    return start


def _reads(need: Need, start: int, end: int, step: int) -> bool:
    if need.every is None or not start <= step < end:
        return False
    clock = Progress(0, max(1, TOTAL - start), STEPS_PER_EPOCH)
    begins = SIGNALS[need.signal].begin is not None and step == start
    return not begins and (step - start + 1) % max(1, need.every.steps(clock)) == 0


# -- figures ----------------------------------------------------------------------------------


def groups_frozen(plan: FreezePlan, groups: LayerGroups) -> float:
    """Groups of the backbone that are frozen; one frozen in part counts by its parameters."""
    frozen = plan.frozen_parameters(groups)
    return sum(
        sum(p.count for p in group.parameters if p.name in frozen) / group.parameter_count
        for group in groups
        if group.name not in groups.head
    )


def at_quarters(runs: list[list[FreezePlan]], groups: LayerGroups) -> list[list[float]]:
    """Groups frozen after 25, 50, 75 and 100 % of each run."""
    moments = [round(q * TOTAL) for q in QUARTERS]
    return [[round(groups_frozen(run[m], groups), 4) for run in runs] for m in moments]


def first_freeze(run: list[FreezePlan]) -> float | None:
    """Share of the run after which something is frozen for the first time."""
    return next((step / TOTAL for step, plan in enumerate(run) if plan.frozen), None)


def differ(one: list[FreezePlan], other: list[FreezePlan]) -> bool:
    """Whether two runs were ever under different plans."""
    return any(a != b for a, b in zip(one, other, strict=True))


def study(spec: str, seeds: int) -> dict[str, Any]:
    """All figures of one policy."""
    policy, groups = make_policy(spec), example_groups(BACKBONE + 1)
    signals = sorted({need.signal for need in policy.needs()})
    runs = [plans(policy, groups, Noise(seed=s, metrics_seed=s)) for s in range(seeds)]
    even = plans(policy, groups, Noise(constant))
    other_signals = [plans(policy, groups, Noise(seed=s)) for s in (1, 2)]
    other_metrics = [plans(policy, groups, Noise(metrics_seed=s)) for s in (1, 2)]
    absolute = [
        plans(policy, groups, Noise(absolute_normal, s, s)) for s in range(seeds if signals else 1)
    ]
    firsts = [f for run in runs if (f := first_freeze(run)) is not None]
    return {
        "spec": spec,
        "signals": signals,
        "frozen": at_quarters(runs, groups),
        "frozen_absolute_normal": at_quarters(absolute, groups),
        "frozen_constant": at_quarters([even], groups),
        "first_freeze": statistics.fmean(firsts) if firsts else None,
        "runs_that_froze": len(firsts) / len(runs),
        "rates": any(plan.lr_scale for plan in runs[0]),
        "by_signals": any(differ(runs[0], run) for run in (even, *other_signals)),
        "by_losses": any(differ(runs[0], run) for run in other_metrics),
        "changes": any(plan != runs[0][0] for plan in runs[0]),
    }


# -- output -----------------------------------------------------------------------------------


def table(log: dict[str, Any]) -> str:
    """Markdown: rules that read signals or metrics, then the rest by name."""
    dynamic = [r for r in log["results"] if r["signals"] or r["by_losses"]]
    head = (
        "| policy | 25 % | 50 % | 75 % | 100 % | first freeze | decided by "
        "| all equal: 100 % | normal: 100 % |\n|---|---|---|---|---|---|---|---|---|"
    )
    lines = [head, *map(_row, dynamic), ""]
    for label, changes in (("only the clock (and a seed)", True), ("nothing: static", False)):
        names = [
            f"`{r['spec']}`" for r in log["results"] if r not in dynamic and r["changes"] is changes
        ]
        lines.append(f"Decided by {label}: {', '.join(names) or 'none'}.")
        lines.append("")
    lines.append(
        f"Mean ± standard deviation over {log['seeds']} seeds; {EPOCHS} epochs of "
        f"{STEPS_PER_EPOCH} steps. Made by `python benchmarks/noise.py`."
    )
    return "\n".join(lines)


def _row(result: dict[str, Any]) -> str:
    first = result["first_freeze"]
    shown = "never" if first is None else f"{first:.0%}"
    if first is not None and result["runs_that_froze"] < 1:
        shown += f" (in {result['runs_that_froze']:.0%} of runs)"
    sources = {"signals": result["by_signals"], "losses": result["by_losses"]}
    decided = " and ".join(name for name, used in sources.items() if used)
    rates = ", rates" if result["rates"] else ""
    cells = [_spread(values) for values in result["frozen"]]
    cells += [shown, (decided or "**the clock alone**") + rates]
    cells += [_spread(result[f"frozen_{n}"][-1]) for n in ("constant", "absolute_normal")]
    return f"| `{result['spec']}` | {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(set(values)) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def specs() -> Iterator[str]:
    """Every policy at its defaults, and the variants."""
    yield from default_specs("noise").values()
    yield from VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--report", action="store_true", help="no runs: the page from the log")
    options = parser.parse_args()
    path: Path = RESULTS / "noise.json"
    if not options.report:
        log = {"seeds": options.seeds, "results": []}
        for spec in sorted(specs()):
            log["results"].append(study(spec, options.seeds))
            print(spec, [_spread(v) for v in log["results"][-1]["frozen"]], flush=True)
        lines = ",\n".join(json.dumps(result) for result in log["results"])
        path.write_text(f'{{"seeds": {options.seeds}, "results": [\n{lines}\n]}}\n', "utf-8")
    log = json.loads(path.read_text("utf-8"))
    PAGE.write_text(filled(PAGE.read_text("utf-8"), PAGE.name, "noise", table(log)), "utf-8")


if __name__ == "__main__":
    main()
