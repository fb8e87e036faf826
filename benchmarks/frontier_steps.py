"""What does a training step cost with the frozen region cached? By model and freeze depth.

Four kinds of step, interleaved in one process: nothing frozen; frozen as everyone does it
(`requires_grad=False`, frozen modules in evaluation mode); cached (`Region.run` on rows gathered
from memory); and the rest cut by hand from the model. Then the bounds that no cache can pass:
from the frozen share of the forward pass, and from the measured cost of each layer group.

    python benchmarks/frontier_steps.py [--quick] [--rounds 15] [--threads 2] [--clock wall]
    python benchmarks/frontier_steps.py --report        # the table from the log
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import frontier_models as models
import torch
from bench import seconds
from frontier_bench import (
    arguments,
    describe,
    gather,
    interleaved,
    least_ratio,
    ratio_text,
    ratios,
    rows_of,
    size_text,
)
from frontier_models import Cut, Subject, scores_of, set_frozen
from torch import Tensor, nn

from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.backends.torch.optimizer import parameter_groups
from frostline.cost import predicted_step_s, prefix_bound
from frostline.frontier.region import Region, find_region
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

#: A cached step may take so much more than the same rest cut by hand.
LIMIT = 1.05
#: A ratio so much above its bound needs an explanation.
TOLERANCE = 1.05
#: Of a rest shorter than this, Python is a visible part: its microseconds are said instead.
SHORT_S = 1e-3
#: The epoch that finding a region is compared with.
EPOCH_SAMPLES = 1000


def subjects(*, quick: bool) -> dict[str, Callable[[], Subject]]:
    """The models; tiny batches when quick."""

    def size(batch: int) -> int:
        return 3 if quick else batch

    return {
        "resnet18-96": lambda: models.resnet18(96, size(32)),
        "resnet18-224": lambda: models.resnet18(64 if quick else 224, size(16)),
        "vgg11-96": lambda: models.vgg11(96, size(8)),
        "minilm-64": lambda: models.minilm_subject(64, size(16)),
        "minilm-128": lambda: models.minilm_subject(128, size(16)),
        "wav2vec2": lambda: models.wav2vec2(size(8)),
    }


class Bench:
    """Steps of one model. A learning rate of 0 costs the same and keeps the weights."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.model = subject, subject.model
        self.example = subject.call(tuple(t[: subject.batch] for t in subject.inputs))
        self.model.train()
        self.groups = measure_costs(
            self.model, layer_groups(self.model, self.example), self.example, repeats=3
        )
        grouped = parameter_groups(self.model, self.groups, lr=0.0, weight_decay=0.01)
        self.optimizer = torch.optim.AdamW(grouped)
        count = len(subject.targets)
        orders = [torch.randperm(count)[: subject.batch] for _ in range(8)]
        self._batches = itertools.cycle(orders)

    def uncached(self, frozen: tuple[str, ...]) -> Callable[[], Callable[[], Tensor]]:
        """Steps through the whole model."""

        def ready() -> Callable[[], Tensor]:
            set_frozen(self.model, frozen)

            def step() -> Tensor:
                picked = next(self._batches)
                example = self.subject.call(tuple(t[picked] for t in self.subject.inputs))
                return self._learn(self.model(*example.args, **example.kwargs), picked)

            return step

        return ready

    def by_hand(self, cut: Cut, stored: models.State) -> Callable[[], Callable[[], Tensor]]:
        """Steps through the rest alone."""

        def ready() -> Callable[[], Tensor]:
            cut.freeze(self.model)
            rest = cut.rest(self.model)

            def step() -> Tensor:
                picked = next(self._batches)
                return self._learn(rest(tuple(t[picked] for t in stored)), picked)

            return step

        return ready

    def cached(
        self, cut: Cut, region: Region, rows: Mapping[str, Tensor]
    ) -> Callable[[], Callable[[], Tensor]]:
        """Steps by the region."""

        def ready() -> Callable[[], Tensor]:
            cut.freeze(self.model)

            def step() -> Tensor:
                picked = next(self._batches)
                gathered = {name: values[picked] for name, values in rows.items()}
                return self._learn(region.run(self.example, gathered), picked)

            return step

        return ready

    def _learn(self, output: Any, picked: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(scores_of(output), self.subject.targets[picked])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    # -- what is stored ---------------------------------------------------------------------

    def fill(self, cut: Cut) -> tuple[Region, dict[str, Tensor], float, float]:
        """Region, rows of all samples, and the seconds of finding and of filling a batch."""
        cut.freeze(self.model)
        find_region(self.model, self.example)  # warm: imports, code caches
        found: list[Region] = []
        find_s = seconds(lambda: found.append(find_region(self.model, self.example)))
        region, parts = found[0], list[dict[str, Tensor]]()
        subject, fills = self.subject, list[float]()
        for start in range(0, len(subject.targets), subject.batch):
            batch = tuple(t[start : start + subject.batch] for t in subject.inputs)
            example = subject.call(batch)
            fills.append(seconds(lambda example=example: parts.append(region.fill(example))))
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return region, rows, find_s, min(fills)

    def gradients(self, output: Callable[[], Any]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the first batch, from equal random numbers."""
        torch.manual_seed(0)
        self.model.zero_grad()
        loss = nn.functional.cross_entropy(
            scores_of(output()), self.subject.targets[: self.subject.batch]
        )
        loss.backward()
        named = self.model.named_parameters()
        found = {name: p.grad.clone() for name, p in named if p.grad is not None}
        self.model.zero_grad()
        return float(loss.detach()), found


def measure(make: Callable[[], Subject], rounds: int) -> dict[str, Any]:
    """Seconds of every kind of step at every depth."""
    subject = make()
    bench = Bench(subject)
    variants: dict[str, Callable[[], Callable[[], object]]] = {"full": bench.uncached(())}
    cuts: list[dict[str, Any]] = []
    for cut in subject.cuts:
        region, rows, find_s, fill_s = bench.fill(cut)
        stored = cut.front(subject.model)(subject.inputs)
        entry = {"depth": cut.name, "find_s": find_s, "fill_s": fill_s, "batch": subject.batch}
        entry |= _predicted(bench.groups, cut) | _sizes(region, rows, stored, subject)
        entry["differs"] = _differences(bench, cut, region, rows, stored)
        cuts.append(entry)
        variants[f"{cut.name}/naive"] = bench.uncached(cut.frozen)
        variants[f"{cut.name}/cached"] = bench.cached(cut, region, rows)
        variants[f"{cut.name}/hand"] = bench.by_hand(cut, stored)
    times = interleaved(variants, rounds)
    for entry in cuts:
        own = {kind: times[f"{entry['depth']}/{kind}"] for kind in ("naive", "cached", "hand")}
        entry["times"] = {"full": times["full"], **own}
    return {"title": subject.title, "depths": cuts}


def _predicted(groups: LayerGroups, cut: Cut) -> dict[str, float]:
    """What the measured group costs say of a depth."""
    inside = tuple(f"{name}." for name in cut.frozen)
    frozen = [
        g.name
        for g in groups
        if all(p.name.startswith(inside) or p.name in cut.frozen for p in g.parameters)
    ]
    plan = FreezePlan(frozen=frozenset(frozen))
    forward = {g.name: g.cost.forward_s for g in groups if g.cost}
    return {
        "forward_fraction": sum(forward[name] for name in frozen) / sum(forward.values()),
        "full_predicted_s": predicted_step_s(groups, FreezePlan()),
        "naive_predicted_s": predicted_step_s(groups, plan),
        "cached_predicted_s": predicted_step_s(groups, plan, frozen_prefix_cached=True),
    }


def _sizes(
    region: Region, rows: Mapping[str, Tensor], stored: models.State, subject: Subject
) -> dict[str, Any]:
    count = len(subject.targets)
    return {
        "slots": len(region.slots),
        "skipped": len(region.skipped),
        "bytes": sum(t.nbytes for t in rows.values()) / count,
        "bytes_by_hand": sum(t.nbytes for t in stored) / count,
    }


def _differences(
    bench: Bench,
    cut: Cut,
    region: Region,
    rows: Mapping[str, Tensor],
    stored: models.State,
) -> dict[str, float]:
    """Largest difference of a gradient from the uncached one, over the largest gradient."""
    batch, rest = bench.subject.batch, cut.rest(bench.model)
    cut.freeze(bench.model)
    first = {name: values[:batch] for name, values in rows.items()}
    example = bench.example
    _, whole = bench.gradients(lambda: bench.model(*example.args, **example.kwargs))
    _, cached = bench.gradients(lambda: region.run(example, first))
    _, hand = bench.gradients(lambda: rest(tuple(t[:batch] for t in stored)))
    scale = max(float(g.abs().max()) for g in whole.values())
    assert whole.keys() == cached.keys() == hand.keys(), "other parameters got gradients"
    return {
        kind: max(float((found[n] - whole[n]).abs().max()) for n in whole) / scale
        for kind, found in (("cached", cached), ("hand", hand))
    }


# -- the table --------------------------------------------------------------------------------


def summary(entry: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one depth; ratios are medians over rounds."""
    times = entry["times"]
    f = min(1.0, entry["forward_fraction"])
    cached = max(entry["cached_predicted_s"], 1e-12)
    low, middle, high = ratios(times["cached"], times["hand"])
    return {
        "over_full": ratios(times["full"], times["cached"])[1],
        "over_full_by_hand": ratios(times["full"], times["hand"])[1],
        "over_full_bound": prefix_bound(f, frozen_prefix_cached=True),
        "over_full_parts": entry["full_predicted_s"] / cached,
        "over_naive": ratios(times["naive"], times["cached"])[1],
        "over_naive_by_hand": ratios(times["naive"], times["hand"])[1],
        "over_naive_bound": naive_bound(f),
        "over_naive_parts": entry["naive_predicted_s"] / cached,
        "over_hand": middle,
        "over_hand_low": low,
        "over_hand_high": high,
        "over_hand_least": least_ratio(times["cached"], times["hand"]),
        "python_us": 1e6
        * statistics.median(a - b for a, b in zip(times["cached"], times["hand"], strict=True)),
        "hand_s": statistics.median(times["hand"]),
        # Finding happens once, so against one epoch of steps as they are without a cache.
        "find_share": entry["find_s"]
        / (min(times["naive"]) * max(1.0, EPOCH_SAMPLES / entry["batch"])),
    }


def naive_bound(f: float) -> float:
    """Largest gain of one steady step over `requires_grad=False`, forward : backward = 1 : 2.

    Example:
        >>> naive_bound(0.5)
        1.3333333333333333
    """
    return (3 - 2 * f) / (3 - 3 * f) if f < 1 else float("inf")


def notes(found: Mapping[str, float]) -> str:
    """What to say of a depth: misses, and figures above their bound."""
    said = []
    if found["over_hand"] > LIMIT:
        if found["hand_s"] < SHORT_S:
            said.append(f"rest under 1 ms: {found['python_us']:.0f} µs more than by hand")
        else:
            said.append(f"MISSES {LIMIT:.2f} by {found['python_us'] / 1e3:.2g} ms in all")
    elif found["over_hand"] < 2 - LIMIT:
        said.append("SUSPICIOUS: faster than by hand")
    for over in ("over_full", "over_naive"):
        bound = max(found[f"{over}_bound"], found[f"{over}_parts"])
        if found[over] <= TOLERANCE * bound:
            continue
        what = over.removeprefix("over_")
        if found[over] <= TOLERANCE * found[f"{over}_by_hand"]:
            said.append(f"above the bound over {what}, as the rest by hand is (see above)")
        else:
            said.append(f"SUSPICIOUS: above the bound over {what}")
    return "; ".join(said)


HEAD = (
    "frozen",
    "full ms",
    "naive ms",
    "cached ms",
    "by hand ms",
    "full / cached",
    "bound by share, by parts",
    "naive / cached",
    "bound by share, by parts",
    "cached / by hand (quartiles; least)",
    "finding, of an epoch",
    "stored per sample (by hand)",
    "",
)


def row(entry: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    found, times = summary(entry), entry["times"]
    steps = [
        f"{1e3 * statistics.median(times[kind]):.4g}"
        for kind in ("full", "naive", "cached", "hand")
    ]
    spread = f"{found['over_hand_low']:.3f} to {found['over_hand_high']:.3f}"
    return [
        entry["depth"],
        *steps,
        ratio_text(found["over_full"]),
        f"{ratio_text(found['over_full_bound'])}, {ratio_text(found['over_full_parts'])}",
        ratio_text(found["over_naive"]),
        f"{ratio_text(found['over_naive_bound'])}, {ratio_text(found['over_naive_parts'])}",
        f"{found['over_hand']:.3f} ({spread}; {found['over_hand_least']:.3f})",
        f"{found['find_share']:.2%}",
        f"{size_text(entry['bytes'])} ({size_text(entry['bytes_by_hand'])})",
        notes(found),
    ]


ABOUT = (
    "Whole steps: gathering the batch, forward, loss, backward, AdamW, zero_grad; kinds of steps "
    "interleaved in one process. 'full': nothing frozen; 'naive': `requires_grad=False` and frozen "
    "modules in evaluation mode; 'cached': `Region.run`; 'by hand': only the rest of the model, "
    "written for this cut. Ratios are medians over rounds, within each round; milliseconds are "
    "medians, and only their ratios mean something on another machine. Bounds of one steady step: "
    "by share 1/(1-f) and (3-2f)/(3-3f) with f the frozen share of the forward pass; by parts from "
    "the measured costs of the layer groups. They assume forward : backward = 1 : 2 or equal parts "
    "of each group; the first group that trains needs no input gradient, and on a processor that "
    "saves more than its share; and the optimizer spares what is frozen, such as large tables of "
    "word vectors, which the share does not count. So a figure may pass them: then the rest cut by "
    "hand must, too. 'Finding' is the time of `find_region` over that of the naive steps of "
    f"{EPOCH_SAMPLES:,} samples."
)


def table(log: Mapping[str, Any]) -> str:
    """Markdown, from the log alone."""
    lines = ["# Step time with the frozen region cached", "", f"{describe(log)} {ABOUT}"]
    for result in log["results"]:
        worst = max(max(entry["differs"].values()) for entry in result["depths"])
        rounds = len(result["depths"][0]["times"]["full"])
        lines += [
            "",
            f"## {result['title']}",
            "",
            f"{rounds} rounds. Gradients of the cached step and of the rest by hand are "
            + ("equal to the uncached ones to the bit." if not worst else "")
            + (f"within {worst:.0e} of the uncached ones' largest." if worst else ""),
            "",
            *rows_of(HEAD, [row(entry) for entry in result["depths"]]),
        ]
    lines += ["", "Made by `python benchmarks/frontier_steps.py` from `frontier_steps.json`."]
    return "\n".join(lines) + "\n"


def main() -> None:
    chosen = arguments(__doc__, rounds=15, quick=2, only=tuple(subjects(quick=True)))
    made = subjects(quick=chosen.quick)
    gather(
        "frontier_steps",
        chosen,
        {name: (lambda m=m: measure(m, chosen.rounds)) for name, m in made.items()},
        table,
    )


if __name__ == "__main__":
    main()
