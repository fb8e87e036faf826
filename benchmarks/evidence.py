"""Does a freezing rule earn its place? Every policy against its placebo and simple controls.

ResNet-20, pretrained on CIFAR-10, is fine-tuned on caltech20 (20 classes, 40 pictures of each)
with the settings that `frostline fit` uses by default. The arms, for every seed:

- the policy;
- its placebo: the same rule fed the same signals, shuffled between groups (policies with signals);
- full fine-tuning, with all steps and with 10, 20, ... 90 % of them, its schedule compressed;
- static prefixes: the shallowest 1, 2, ... groups frozen throughout.

Compute is the sum of step times predicted from group costs, which are measured once and kept with
the results, plus what the policy itself took, over full fine-tuning's. The weights of the epoch
with the best validation accuracy are tested, once.

    python benchmarks/evidence.py --shared ../shared --jobs 2      # resumable; skips what is done
    python benchmarks/evidence.py --report                         # tables and cards from the log

Each finished run is one line of `results/evidence.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import evidence_report as report
import numpy as np
import torch
from bench import processor
from PIL import Image
from safetensors.torch import load_file
from specs import OWN_RATES, chosen
from torch import Tensor, nn
from torch.nn import functional

from frostline.backends.torch.example import Example
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.clock import Progress
from frostline.compose import Placebo
from frostline.cost import predicted_step_s, trained_share
from frostline.driver import Driver
from frostline.groups import GroupCost, LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Policy
from frostline.registry import make_policy
from frostline.tasks.config import RunConfig, load_config, resolve_config
from frostline.tasks.order import Batching, derive_seed, epoch_order, seed_update
from frostline.tasks.setup import build_optimizer, build_schedule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from models_for_tests import CIFAR_MEAN, CIFAR_STD, resnet20

WEIGHTS = "models/resnet_cifar10/resnet20.safetensors"
DATA = "data/caltech20_32"
BUDGETS = range(10, 100, 10)
EVALUATION_BATCH = 40
Costs = dict[str, GroupCost]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arm: "full", "prefix", "budget", "policy" or "placebo".
        spec: short form of the policy.
        seed: of head, order, flips and placebo.
        epochs: length of a whole run.
        budget: steps of this run, in percent of a whole run.
    """

    arm: str
    spec: str
    seed: int
    epochs: int
    budget: int = 100

    def policy(self) -> Policy:
        """What decides."""
        policy = make_policy(self.spec)
        return Placebo(policy, seed=self.seed) if self.arm == "placebo" else policy


@dataclass(frozen=True)
class Case:
    """Pictures in memory (normalised, N x 3 x 32 x 32), labels, and pretrained weights."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, shared: Path) -> Case:
        """Read both folders."""
        splits = {name: _pictures(shared / DATA / name) for name in ("train", "val", "test")}
        return cls(**splits, weights=load_file(shared / WEIGHTS))

    def model(self, seed: int) -> nn.Module:
        """The pretrained network with a new head."""
        torch.manual_seed(derive_seed(seed, "head", 0))
        model = resnet20(int(self.train[1].max()) + 1)
        body = {name: w for name, w in self.weights.items() if not name.startswith("linear.")}
        missing, unexpected = model.load_state_dict(body, strict=False)
        kept = ("linear.weight", "linear.bias")
        assert not unexpected
        assert all(n in kept or n.endswith("num_batches_tracked") for n in missing)
        # Faster on processors, and the same arithmetic.
        return model.to(memory_format=torch.channels_last)

    def example(self, config: RunConfig) -> Example:
        """One batch."""
        return Example((self.train[0][: config.batch_size],))


def _pictures(folder: Path) -> tuple[Tensor, Tensor]:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            with Image.open(path) as picture:
                pixels.append(np.asarray(picture.convert("RGB")))
            labels.append(label)
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    ready = (x - mean) / std
    return ready.contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def settings(epochs: int, *, own_rates: bool = False) -> RunConfig:
    """What `frostline fit` uses for pictures, without early stopping.

    A policy that schedules the learning rate by itself gets a constant one to start from.
    """
    base: dict[str, Any] = {"model": "resnet20", "data": "caltech20", "epochs": epochs}
    base |= {"patience": None}
    if own_rates:
        base |= {"schedule": "constant", "warmup": "0st"}
    return resolve_config(load_config(None, base), "image")


# -- one run ----------------------------------------------------------------------------------


class Run:
    """Trains one arm and counts what it costs."""

    def __init__(self, case: Case, job: Job, costs: Costs) -> None:
        own_rates = str(job.spec).partition(":")[0] in OWN_RATES
        self.case, self.job = case, job
        self.config = settings(job.epochs, own_rates=own_rates)
        self.batching = Batching(len(case.train[1]), self.config.batch_size)
        per_epoch = self.batching.steps_per_epoch
        self.whole_run_steps = job.epochs * per_epoch
        self.total_steps = max(1, round(self.whole_run_steps * job.budget / 100))
        self.model = case.model(job.seed)
        groups = layer_groups(self.model, case.example(self.config)).with_costs(costs)
        self.optimizer = build_optimizer(self.config, self.model, groups)
        progress = Progress(0, self.total_steps, per_epoch)
        self.schedule = build_schedule(self.config, self.optimizer, progress)
        self.driver = torch_driver(
            self.model,
            self.optimizer,
            job.policy(),
            total_steps=self.total_steps,
            steps_per_epoch=per_epoch,
            groups=groups,
        )
        self.tally = Tally(self.driver, groups)

    def result(self) -> dict[str, Any]:
        """Train, test once, and say what it took."""
        start = time.perf_counter()
        best, weights, curve = (-1.0, 0.0, 0), dict[str, Tensor](), list[float]()
        for epoch in range(self.job.epochs):
            loss = self._train(epoch)
            val_loss, val_accuracy = self._evaluate(self.case.val)
            curve.append(val_accuracy)
            # Before the policy is told: it may set the weights back.
            if (val_accuracy, -val_loss) > best[:2]:
                best = (val_accuracy, -val_loss, epoch + 1)
                weights = copy.deepcopy(self.model.state_dict())
            metrics = {"train_loss": loss, "val_loss": val_loss, "val_accuracy": val_accuracy}
            plan = self.driver.evaluated(metrics)
            if plan.done or self.driver.progress.step >= self.total_steps:
                break
        holds = len(self.driver.finish().holds)
        self.model.load_state_dict(weights)
        _, test_accuracy = self._evaluate(self.case.test)
        return {
            **asdict(self.job),
            "test_accuracy": test_accuracy,
            "val_accuracy": curve,
            "best_epoch": best[2],
            "steps": self.driver.progress.step,
            "whole_run_steps": self.whole_run_steps,
            **self.tally.result(self.whole_run_steps),
            "decisions": len(self.driver.decisions),
            "holds": holds,
            "cpu_s": time.perf_counter() - start,
        }

    def _train(self, epoch: int) -> float:
        """One epoch, or what is left of the run: its mean loss."""
        x, y = self.case.train
        seed = self.job.seed
        updates = self.batching.updates(epoch_order(seed, epoch, len(y)))
        generator = torch.Generator().manual_seed(derive_seed(seed, "view", epoch))
        flipped = torch.rand(len(y), generator=generator) < 0.5
        self.model.train()
        losses = []
        for (batch,) in updates[: self.total_steps - self.driver.progress.step]:
            rows = torch.tensor(batch)
            mirror = flipped[rows].view(-1, 1, 1, 1)
            pictures = torch.where(mirror, x[rows].flip(3), x[rows])
            seed_update(seed, "update", self.driver.progress.step)
            with self.tally.step():
                losses.append(self._update(pictures, y[rows]))
        return sum(losses) / len(losses)

    def _update(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(self.model(x), y)
        loss.backward()
        value = float(loss.detach())
        self.driver.sample(loss=value)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or torch.inf)
        self.optimizer.step()
        self.schedule.step()
        return value

    def _evaluate(self, split: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Mean loss and accuracy."""
        self.model.eval()
        with torch.no_grad():
            scores = torch.cat([self.model(x) for x in split[0].split(EVALUATION_BATCH)])
        loss = functional.cross_entropy(scores, split[1])
        return float(loss), float((scores.argmax(1) == split[1]).double().mean())


class Tally:
    """Sums up what the steps of a run cost, predicted and measured."""

    def __init__(self, driver: Driver, groups: LayerGroups) -> None:
        self.driver, self.groups = driver, groups
        self.full_s = predicted_step_s(groups, FreezePlan())
        self.predicted_s = self.measured_s = self.frozen = self.trained = 0.0
        self._known: tuple[FreezePlan, float, float, float] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one update."""
        costs = self.driver.costs
        widened, charged, start = costs.widened_steps, self._charged(), time.perf_counter()
        with self.driver.step() as plan:
            yield
        self.measured_s += time.perf_counter() - start - (self._charged() - charged)
        # A backward pass widened for a signal costs what full fine-tuning costs.
        wide = costs.widened_steps > widened
        predicted, frozen, trained = self._shares(plan)
        self.predicted_s += self.full_s if wide else predicted
        self.frozen += frozen
        self.trained += trained

    def result(self, whole_run_steps: int) -> dict[str, float]:
        """Shares of full fine-tuning's compute, and where they come from."""
        costs, steps = self.driver.costs, self.driver.progress.step
        share = self.predicted_s / (self.full_s * whole_run_steps)
        own = costs.policy_s + costs.signals_s + costs.apply_s
        return {
            "step_share": share,
            # As a share of this run's own steps, so that a slower processor cancels out.
            "overhead_share": share * own / self.measured_s,
            "frozen_share": self.frozen / steps,
            "trained_share": self.trained / steps,
            "widened_steps": costs.widened_steps,
            "steps_s": self.measured_s,
            "policy_s": costs.policy_s,
            "signals_s": costs.signals_s,
            "apply_s": costs.apply_s,
            "digest_s": costs.digest_s,
        }

    def _shares(self, plan: FreezePlan) -> tuple[float, float, float]:
        """Seconds of a step, share of groups of which nothing trains, share of what trains."""
        if self._known is None or self._known[0] is not plan:
            held = sum(not plan.trains(group) for group in self.groups)
            self._known = (
                plan,
                predicted_step_s(self.groups, plan),
                held / len(self.groups),
                trained_share(self.groups, plan),
            )
        return self._known[1:]

    def _charged(self) -> float:
        costs = self.driver.costs
        return costs.policy_s + costs.signals_s + costs.apply_s + costs.digest_s


# -- the queue --------------------------------------------------------------------------------


def jobs(specs: dict[str, str], seeds: list[int], epochs: int, groups: int) -> Iterator[Job]:
    """Every run of the grid, controls first; equal runs once."""
    found: dict[Job, None] = {}
    for seed in seeds:
        found[Job("full", "full", seed, epochs)] = None
        for count in range(1, groups):
            found[Job("prefix", report.prefix_spec(count), seed, epochs)] = None
        for budget in BUDGETS:
            found[Job("budget", "full", seed, epochs, budget)] = None
        for spec in specs.values():
            if spec != "full":
                found[Job("policy", spec, seed, epochs)] = None
            if make_policy(spec).needs():
                found[Job("placebo", spec, seed, epochs)] = None
    yield from found


_worker: dict[str, Any] = {}


def _start_worker(shared: Path, costs: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    # Processor seconds: what else the machine does must not count.
    time.perf_counter = time.process_time
    _worker["case"] = Case.load(shared)
    _worker["costs"] = _costs_from_json(costs)


def _work(job: Job) -> dict[str, Any]:
    return Run(_worker["case"], job, _worker["costs"]).result()


def _costs_from_json(costs: dict[str, Any]) -> Costs:
    return {name: GroupCost(**cost) for name, cost in costs.items()}


def measure(shared: Path, epochs: int) -> dict[str, Any]:
    """Group costs on one thread, and the machine they hold for."""
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # as in the workers
    case = Case.load(shared)
    model, example = case.model(0), case.example(settings(epochs))
    groups = measure_costs(model, layer_groups(model, example), example, repeats=7)
    return {
        "arm": "costs",
        "costs": {g.name: asdict(g.cost) for g in groups if g.cost},
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processors": multiprocessing.cpu_count(),
            "processor": processor(),
        },
    }


def work(options: argparse.Namespace) -> int:
    """Run what is missing; how many runs failed."""
    log = report.Log(options.log)
    if log.costs is None:
        log.append(measure(options.shared, options.epochs))
    assert log.costs is not None
    costs, done = log.costs["costs"], log.keys()
    seeds = list(range(options.seeds))
    grid = jobs(chosen(options.only), seeds, options.epochs, len(costs))
    todo = [job for job in grid if report.key(asdict(job)) not in done]
    print(f"{len(todo)} runs to do, {len(done)} in the log", flush=True)
    failed, start = 0, time.monotonic()
    with ProcessPoolExecutor(
        options.jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(options.shared, costs),
    ) as pool:
        waiting = {pool.submit(_work, job): job for job in todo}
        for count, future in enumerate(as_completed(waiting), 1):
            job = waiting[future]
            if error := future.exception():
                failed += 1
                print(f"FAILED {job}: {type(error).__name__}: {error}", flush=True)
                continue
            row = future.result()
            log.append(row)
            left = (time.monotonic() - start) / count * (len(todo) - count) / 60
            print(
                f"{count}/{len(todo)} {job.arm} {job.spec} seed {job.seed} {job.budget} %: "
                f"{row['test_accuracy']:.1%} at {row['step_share']:.0%} of the steps' compute "
                f"+ {row['overhead_share']:.1%}, {row['cpu_s']:.0f} s; {left:.0f} min left",
                flush=True,
            )
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data and weights")
    parser.add_argument("--epochs", type=int, default=report.EPOCHS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these policies (and controls)")
    parser.add_argument("--log", type=Path, default=report.EVIDENCE)
    parser.add_argument("--report", action="store_true", help="no runs: tables and cards")
    options = parser.parse_args()
    if options.report:
        report.write(options.log, options.epochs)
    elif failed := work(options):
        raise SystemExit(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
