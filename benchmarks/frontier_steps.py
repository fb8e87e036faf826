"""What does a training step cost with the frozen region cached? By model and freeze depth.

Four kinds of step, interleaved in one process: nothing frozen; frozen as everyone does it
(`requires_grad=False`, frozen modules in evaluation mode); cached (`Region.run` on rows gathered
from memory); and the rest cut by hand from the model. Then the bounds that no cache can pass:
from the frozen share of the forward pass, and from the measured cost of each layer group.

With `--store` (always on a GPU) one kind more: rows read from disk and brought to the device by
`FrontierCache`. With `--compiled`, at one depth, the same steps under `torch.compile`.

    python benchmarks/frontier_steps.py [--quick] [--rounds 15] [--threads 2] [--clock wall]
    python benchmarks/frontier_steps.py --device cuda [--compiled] [--only NAME ...]
    python benchmarks/frontier_steps.py --report        # the table from the log
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import frontier_models as models
import numpy as np
import torch
from bench import made_by, seconds, wait
from frontier_bench import (
    arguments,
    describe,
    gather,
    interleaved,
    least_ratio,
    machine_of,
    ratio_text,
    ratios,
    rows_of,
    size_text,
)
from frontier_models import Cut, Subject, on_device, scores_of, set_frozen
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.backends.torch.optimizer import parameter_groups
from frostline.cost import predicted_step_s, prefix_bound
from frostline.errors import FrontierError
from frostline.frontier.cache import BLOCK, Batch, FrontierCache
from frostline.frontier.library import Library
from frostline.frontier.region import Region, find_region
from frostline.groups import LayerGroups
from frostline.memory import keeping_freed
from frostline.plan import FreezePlan

#: A cached step may take so much more than the same rest cut by hand.
LIMIT = 1.05
#: A ratio so much above its bound needs an explanation.
TOLERANCE = 1.05
#: Of a rest shorter than this, Python is a visible part: its microseconds are said instead.
SHORT_S = 1e-3
#: The epoch that finding a region is compared with.
EPOCH_SAMPLES = 1000
#: Batches of an epoch of the store, whose order is known when it begins.
EPOCH_BATCHES = 100
#: Compiling takes up to a minute a piece, so it is done at one depth.
COMPILED_DEPTH = "half"
COMPILED = ("compiled full", "compiled naive", "compiled cached", "compiled hand")
#: Batches on a GPU, where those of the processor would measure how fast Python is.
CUDA_PICTURES, CUDA_OTHERS = 128, 64
#: A GPU is lent by the minute.
CUDA_BUDGET_S, BUDGET_S = 12.0, 90.0
BFLOAT16 = "resnet18-224-bf16"


def cuda_subjects(*, quick: bool) -> dict[str, Callable[[], Subject]]:
    """The same models in batches for a GPU, and one under autocast besides."""
    pictures, others = (3, 3) if quick else (CUDA_PICTURES, CUDA_OTHERS)
    side = 64 if quick else 224

    def under_autocast() -> Subject:
        made = models.resnet18(side, pictures)
        title = f"{made.title}, bfloat16 autocast"
        return dataclasses.replace(made, name=BFLOAT16, title=title)

    return {
        "resnet18-96": lambda: models.resnet18(96, pictures),
        "resnet18-224": lambda: models.resnet18(side, pictures),
        "vgg11-96": lambda: models.vgg11(96, pictures),
        "minilm-64": lambda: models.minilm_subject(64, others),
        "minilm-128": lambda: models.minilm_subject(128, others),
        "wav2vec2": lambda: models.wav2vec2(others),
        BFLOAT16: under_autocast,
    }


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
    """Steps of one model. A learning rate of 0 costs the same and keeps the weights.

    Args:
        subject: the model and its samples, on the device.
        groups: with measured costs; None: they are measured.
    """

    def __init__(self, subject: Subject, groups: LayerGroups | None = None) -> None:
        self.subject, self.model = subject, subject.model
        self.device = subject.targets.device
        self.example = subject.call(tuple(t[: subject.batch] for t in subject.inputs))
        self.model.train()
        self.groups = groups or measure_costs(
            self.model, layer_groups(self.model, self.example), self.example, repeats=3
        )
        grouped = parameter_groups(self.model, self.groups, lr=0.0, weight_decay=0.01)
        self.optimizer = torch.optim.AdamW(grouped)
        count = len(subject.targets)
        self.orders = [torch.randperm(count)[: subject.batch] for _ in range(8)]
        self._batches = itertools.cycle([order.to(self.device) for order in self.orders])

    def twin(self) -> Bench:
        """Steps of a copy of the model, so that what is done to it touches no other step."""
        model = copy.deepcopy(self.model)
        return Bench(dataclasses.replace(self.subject, model=model), self.groups)

    def precision(self) -> AbstractContextManager[object]:
        """What every forward pass runs in."""
        if self.subject.name != BFLOAT16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def uncached(
        self, frozen: tuple[str, ...], call: Callable[..., Any] | None = None
    ) -> Callable[[], Callable[[], Tensor]]:
        """Steps through the whole model.

        Args:
            frozen: names of its frozen modules.
            call: instead of the model: what it was compiled to.
        """
        model = self.model if call is None else call  # a compiled model has no truth value

        def ready() -> Callable[[], Tensor]:
            set_frozen(self.model, frozen)

            def step() -> Tensor:
                picked = next(self._batches)
                example = self.subject.call(tuple(t[picked] for t in self.subject.inputs))
                return self.learn(lambda: model(*example.args, **example.kwargs), picked)

            return step

        return ready

    def by_hand(
        self, cut: Cut, stored: models.State, rest: Callable[..., Tensor] | None = None
    ) -> Callable[[], Callable[[], Tensor]]:
        """Steps through the rest alone.

        Args:
            cut: the depth.
            stored: rows of all samples.
            rest: what the rest was compiled to.
        """
        run = rest or cut.rest(self.model)

        def ready() -> Callable[[], Tensor]:
            cut.freeze(self.model)

            def step() -> Tensor:
                picked = next(self._batches)
                return self.learn(lambda: run(tuple(t[picked] for t in stored)), picked)

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
                return self.learn(lambda: region.run(self.example, gathered), picked)

            return step

        return ready

    def learn(self, output: Callable[[], Any], picked: Tensor) -> Tensor:
        """Forward, loss, backward, update."""
        with self.precision():
            scores = scores_of(output())
            loss = nn.functional.cross_entropy(scores, self.subject.targets[picked])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    # -- what is stored ---------------------------------------------------------------------

    def fill(self, cut: Cut) -> tuple[Region, dict[str, Tensor], float, float]:
        """Region, rows of all samples, and the seconds of finding and of filling a batch."""
        cut.freeze(self.model)
        found: list[Region] = []
        parts, fills = list[dict[str, Tensor]](), list[float]()
        with self.precision():
            find_region(self.model, self.example)  # warm: imports, code caches
            find_s = seconds(lambda: found.append(find_region(self.model, self.example)))
            region, subject = found[0], self.subject
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
        with self.precision():
            targets = self.subject.targets[: self.subject.batch]
            loss = nn.functional.cross_entropy(scores_of(output()), targets)
        loss.backward()
        named = self.model.named_parameters()
        found = {name: p.grad.clone() for name, p in named if p.grad is not None}
        self.model.zero_grad()
        return float(loss.detach()), found


# -- rows from the store ----------------------------------------------------------------------


class Held:
    """Samples in main memory as a source of the cache; what reaches the model is read from disk.

    Args:
        subject: whose samples they are.
    """

    def __init__(self, subject: Subject) -> None:
        self.name, self.samples, self.views, self.fixed = "train", len(subject.targets), 1, True
        self.data: Any = {"benchmark": subject.name}
        self.preparation: Any = {}
        self._subject = subject
        self._inputs = tuple(t.cpu() for t in subject.inputs)

    def load(self, indices: Sequence[int], views: Sequence[int]) -> Example:
        """A batch, as the model is called."""
        del views
        return self._subject.call(tuple(t[list(indices)] for t in self._inputs))

    def blocks(self, firsts: Sequence[int], view: int) -> Iterator[tuple[int, Example]]:
        """Blocks of consecutive samples."""
        for first in firsts:
            indices = range(first, min(first + BLOCK, self.samples))
            yield first, self.load(indices, [view] * len(indices))


class Stored:
    """Steps of a model under `FrontierCache`, whose rows lie in a store.

    Args:
        bench: the steps.
        cut: the depth.
        place: folder of the stores.
    """

    def __init__(self, bench: Bench, cut: Cut, place: Path) -> None:
        self._bench, self._cut = bench, cut
        self._source = Held(bench.subject)
        self._cache = FrontierCache(bench.model, Library(place), min_gain=0.0)
        self._kept = [(t, t.detach().clone()) for t in bench.model.buffers()]
        self._left: Iterator[Batch] = iter(())

    def ready(self) -> Callable[[], Tensor]:
        """Begin an epoch; the first steps fill, find and check what is left to do."""
        for buffer, before in self._kept:  # statistics of what the other kinds of step train
            buffer.copy_(before)
        self._cut.freeze(self._bench.model)
        self._left = iter(())
        for _ in range(3):
            self.step()
        return self.step

    def step(self) -> Tensor:
        """One step, as the gate of the cache makes it."""
        batch = next(self._left, None)
        if batch is None:
            self._left = self._epoch()
            batch = next(self._left)
        picked = torch.from_numpy(batch.indices).to(self._bench.device, non_blocking=True)
        given = self._cache.arguments(batch)
        forward = self._bench.model.forward
        return self._bench.learn(
            lambda: self._cache.forward(batch, forward, given.args, dict(given.kwargs)), picked
        )

    def _epoch(self) -> Iterator[Batch]:
        orders = itertools.islice(itertools.cycle(self._bench.orders), EPOCH_BATCHES)
        indices = [order.numpy() for order in orders]
        for number, each in enumerate(indices):
            yield Batch(
                self._source,
                each,
                np.zeros_like(each),
                first=not number,
                order=indices if not number else (),
                device=self._bench.device,
            )

    def other_way(self) -> str | None:
        """Why some steps took the full forward pass, so that their time is not the store's."""
        report = self._cache.report
        if report.replayed == report.batches:
            return None
        passed = report.batches - report.replayed
        return f"{passed} of {report.batches} steps in full: {'; '.join(report.notes)}"

    def close(self) -> None:
        """Close the stores."""
        self._cache.detach()


# -- compiled ---------------------------------------------------------------------------------


def compiled(
    bench: Bench, cut: Cut, stored: models.State, rows: Mapping[str, Tensor]
) -> tuple[dict[str, Callable[[], Callable[[], Tensor]]], float]:
    """The kinds of step under `torch.compile`, each with a copy of the model of its own.

    The cached step compiles each module that trains by itself, which is what the cache supports;
    the others compile the whole model, and the rest by hand as one function. Shapes are static:
    a region is found on a few samples, after which code for any number of them would be made.

    Args:
        bench: the uncompiled steps.
        cut: the depth.
        stored: rows of all samples for the rest by hand.
        rows: the same for the region.

    Returns:
        what makes each ready, and the seconds of finding a region in what is compiled.
    """
    full, naive, cached, hand = (bench.twin() for _ in COMPILED)
    cut.freeze(cached.model)
    for part in cut.parts[cut.place :]:
        for name in part.modules:
            cached.model.get_submodule(name).compile(dynamic=False)
    start = time.perf_counter()
    with cached.precision():
        region = find_region(cached.model, cached.example)
    find_s = time.perf_counter() - start
    whole = partial(torch.compile, dynamic=False)
    kinds = (
        full.uncached((), whole(full.model)),
        naive.uncached(cut.frozen, whole(naive.model)),
        cached.cached(cut, region, rows),
        hand.by_hand(cut, stored, whole(cut.rest(hand.model))),
    )
    named = zip(COMPILED, kinds, strict=True)
    return {f"{cut.name}/{name}": ready for name, ready in named}, find_s


def warmed(
    variants: Mapping[str, Callable[[], Callable[[], object]]],
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of compiling each kind of step, and why one could not be."""
    took, failed = dict[str, float](), dict[str, str]()
    for name, ready in variants.items():
        start = time.perf_counter()
        try:
            for _ in range(2):
                ready()()
            wait()
        except Exception as error:  # noqa: BLE001 - the compiler's; the other figures are kept
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        took[name] = time.perf_counter() - start
    return took, failed


# -- measuring --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        rounds: of all kinds of step.
        device: "cpu" or "cuda".
        store: whether steps on rows from disk are among them.
        compiled: whether compiled ones are, at one depth.
        budget_s: seconds of timing, about.
    """

    rounds: int
    device: str = "cpu"
    store: bool = False
    compiled: bool = False
    budget_s: float = BUDGET_S


def measure(make: Callable[[], Subject], wanted: Wanted) -> dict[str, Any]:
    """Seconds of every kind of step at every depth."""
    subject = on_device(make(), wanted.device)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as ends:
        found = _measured(Bench(subject), wanted, Path(place), ends)
    return {"title": subject.title, **found}


def _measured(
    bench: Bench, wanted: Wanted, place: Path, ends: contextlib.ExitStack
) -> dict[str, Any]:
    subject = bench.subject
    refused = dict[str, str]()
    variants: dict[str, Callable[[], Callable[[], object]]] = {"full": bench.uncached(())}
    cuts: list[dict[str, Any]] = []
    from_disk = dict[str, Stored]()
    for cut in subject.cuts:
        try:
            region, rows, find_s, fill_s = bench.fill(cut)
        except FrontierError as error:  # other depths, and other models, are measured all the same
            refused[cut.name] = str(error.found)
            continue
        with bench.precision():
            stored = cut.front(subject.model)(subject.inputs)
        entry = {"depth": cut.name, "find_s": find_s, "fill_s": fill_s, "batch": subject.batch}
        entry |= _predicted(bench.groups, cut) | _sizes(region, rows, stored, subject)
        entry["differs"] = _differences(bench, cut, region, rows, stored)
        cuts.append(entry)
        variants[f"{cut.name}/naive"] = bench.uncached(cut.frozen)
        variants[f"{cut.name}/cached"] = bench.cached(cut, region, rows)
        variants[f"{cut.name}/hand"] = bench.by_hand(cut, stored)
        if wanted.store:
            steps = Stored(bench, cut, place / cut.name.replace(" ", "-"))
            ends.callback(steps.close)
            from_disk[f"{cut.name}/store"] = steps
            variants[f"{cut.name}/store"] = steps.ready
        if wanted.compiled and cut.name == COMPILED_DEPTH:
            variants |= _compiled_where_it_goes(bench, cut, stored, rows, entry)
    times = interleaved(variants, wanted.rounds, budget_s=wanted.budget_s)
    for name, steps in from_disk.items():
        if (why := steps.other_way()) is not None:
            refused[name] = why
            del times[name]
    for entry in cuts:
        own = {
            n.partition("/")[2]: t for n, t in times.items() if n.startswith(f"{entry['depth']}/")
        }
        entry["times"] = {"full": times["full"], **own}
    return {"depths": cuts, "refused": refused}


def _compiled_where_it_goes(
    bench: Bench,
    cut: Cut,
    stored: models.State,
    rows: Mapping[str, Tensor],
    entry: dict[str, Any],
) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """The compiled kinds of step; what failed is in the entry, and costs no other figure."""
    try:
        more, find_s = compiled(bench, cut, stored, rows)
    except FrontierError as error:
        name = f"{cut.name}/compiled cached"
        entry["compiling_s"], entry["not_compiled"] = {name: 0.0}, {name: str(error.found)}
        return {}
    took, failed = warmed(more)
    took[f"{cut.name}/compiled cached"] += find_s  # compiles for few samples
    entry["compiling_s"], entry["not_compiled"] = took, failed
    return {name: ready for name, ready in more.items() if name not in failed}


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
    "interleaved in one process, which keeps what it frees, as `fit` does. 'full': "
    "nothing frozen; 'naive': `requires_grad=False` and frozen modules in evaluation mode; "
    "'cached': `Region.run`; 'by hand': only the rest of the model, "
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


ABOUT_STORE = (
    "'From the store': the same step by `FrontierCache`, whose rows are read from files, with "
    "checksums, and brought to the device. The files are in the system's memory, since they were "
    "just written; a disk that is slower than the step shows in `store_reads.md`."
)
STORE_HEAD = (
    "frozen", "cached ms", "from the store ms", "store / cached (quartiles)", "naive / store",
    "read per step", "rate needed, MB/s",
)  # fmt: skip
ABOUT_COMPILED = (
    "'Compiled': under `torch.compile`. 'Full', 'naive' and 'by hand' are compiled as a whole, "
    "of the cached step each module that trains by itself. 'Gain' is uncompiled over compiled. "
    "Compiling is the time until the second step is done, for each kind."
)
COMPILED_HEAD = (
    "frozen", "kind of step", "ms", "compiled ms", "gain (quartiles)",
    "compiled full / this, compiled", "compiling s", "",
)  # fmt: skip


def of_three(three: Sequence[float]) -> str:
    """A median with its quartiles."""
    low, middle, high = three
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def store_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One line per depth that was also measured with rows from disk."""
    made = []
    for entry in result["depths"]:
        if (stored := entry["times"].get("store")) is None:
            continue
        times, step = entry["times"], entry["bytes"] * entry["batch"]
        made.append(
            [
                entry["depth"],
                f"{1e3 * statistics.median(times['cached']):.4g}",
                f"{1e3 * statistics.median(stored):.4g}",
                of_three(ratios(stored, times["cached"])),
                ratio_text(ratios(times["naive"], stored)[1]),
                size_text(step),
                f"{step / 1e6 / statistics.median(times['cached']):,.0f}",
            ]
        )
    return made


def compiled_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One line per kind of step that was also compiled."""
    made = []
    for entry in result["depths"]:
        times, failed = entry["times"], entry.get("not_compiled", {})
        for name, took in entry.get("compiling_s", {}).items():
            kind = name.partition("/compiled ")[2]
            plain = f"{1e3 * statistics.median(times[kind]):.4g}"
            if name in failed:
                made.append([entry["depth"], kind, plain, *"---", f"{took:.0f}", failed[name]])
                continue
            own, full = times[f"compiled {kind}"], times.get("compiled full")
            over = "-" if full is None else ratio_text(ratios(full, own)[1])
            gain = of_three(ratios(times[kind], own))
            ms = f"{1e3 * statistics.median(own):.4g}"
            made.append([entry["depth"], kind, plain, ms, gain, over, f"{took:.0f}", ""])
    return made


def besides(result: Mapping[str, Any]) -> list[str]:
    """The tables of the kinds of step that are measured on demand."""
    lines = []
    if found := store_rows(result):
        lines += ["", *rows_of(STORE_HEAD, found)]
    if found := compiled_rows(result):
        lines += ["", *rows_of(COMPILED_HEAD, found)]
    return lines


def refusals(result: Mapping[str, Any]) -> list[str]:
    """What could not be cached, and why."""
    found = result.get("refused", {})
    return ["", *(f"- NOT CACHED, {name}: {why}" for name, why in found.items())] if found else []


def about(log: Mapping[str, Any]) -> str:
    """What the figures of a log are."""
    said = [describe(log), ABOUT]
    if any(store_rows(result) for result in log["results"]):
        said.append(ABOUT_STORE)
    if any(compiled_rows(result) for result in log["results"]):
        said.append(ABOUT_COMPILED)
    return " ".join(said)


def table(log: Mapping[str, Any]) -> str:
    """Markdown, from the log alone."""
    lines = ["# Step time with the frozen region cached", "", about(log)]
    for result in log["results"]:
        if not result["depths"]:
            lines += ["", f"## {result['title']}", *refusals(result)]
            continue
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
            *besides(result),
            *refusals(result),
        ]
    lines += ["", made_by("frontier_steps", machine_of(log))]
    return "\n".join(lines) + "\n"


def main() -> None:
    names = tuple(cuda_subjects(quick=True))
    chosen = arguments(
        __doc__, rounds=15, quick=2, only=names, devices=("cpu", "cuda"), more=more_options
    )
    on_gpu = chosen.device == "cuda"
    made = (cuda_subjects if on_gpu else subjects)(quick=chosen.quick)
    wanted = Wanted(
        rounds=chosen.rounds,
        device=chosen.device,
        store=on_gpu or chosen.store,
        compiled=chosen.compiled,
        budget_s=CUDA_BUDGET_S if on_gpu else BUDGET_S,
    )
    with keeping_freed():  # as `fit` does
        gather(
            "frontier_steps",
            chosen,
            {name: (lambda m=m: measure(m, wanted)) for name, m in made.items()},
            table,
        )


def more_options(parser: argparse.ArgumentParser) -> None:
    """The kinds of step that are measured on demand."""
    parser.add_argument("--store", action="store_true", help="also with rows read from disk")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")


if __name__ == "__main__":
    main()
