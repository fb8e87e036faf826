"""The training loop: updates, evaluations and the memory of what was best.

Where the loop is, is two counts (updates complete, epochs evaluated); sample order, augmentation
and random numbers follow from them (`frostline.tasks.order`). So the loop may be stopped between
any two updates and go on from its `LoopState` as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from frostline._io import finite_json
from frostline.clock import Duration
from frostline.cost import backward_share, trained_share
from frostline.driver import Driver
from frostline.errors import NonFiniteLoss
from frostline.groups import LayerGroup, LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.phases import ends_its_phase
from frostline.savings import Savings, Update
from frostline.tasks.allowance import Allowance
from frostline.tasks.caching import RunCache
from frostline.tasks.config import RunConfig
from frostline.tasks.first_look import foretold
from frostline.tasks.order import Batching, epoch_order, seed_update, views_of
from frostline.tasks.resources import Interrupt
from frostline.tasks.task import Batch, Split, Task

__all__ = ["Best", "Listener", "LoopState", "Parts", "TrainingLoop", "evaluate"]

See = Callable[[Tensor, Tensor], object]
Keys = list[list[Any]]  # per batch: (index, view) of its samples


@dataclass(frozen=True, slots=True)
class Best:
    """The best epoch so far, by validation accuracy, ties by validation loss.

    Attributes:
        epoch: epochs complete when it was measured, from 1.
        step: updates complete then.
        val_accuracy: in [0, 1].
        val_loss: mean cross-entropy.
    """

    epoch: int
    step: int
    val_accuracy: float
    val_loss: float

    def beats(self, other: Best | None) -> bool:
        """Whether this epoch is better; a loss that is no number beats nothing but None."""
        if other is None:
            return True
        if self.val_accuracy != other.val_accuracy:
            return self.val_accuracy > other.val_accuracy
        return self.val_loss < other.val_loss


@dataclass(slots=True)
class LoopState:
    """Everything the loop must remember, beyond model, optimizer, schedule and driver.

    Attributes:
        step: updates complete.
        evaluated: epochs whose evaluation is complete.
        best: the best epoch so far.
        stale: evaluations since the best one, or since the policy's last change of phase.
        phase: of the plan after the last evaluation.
        stopped_early: whether patience ran out.
        policy_done: whether the policy ended the run before its epochs were over.
        exhausted: whether the budget allows no further update.
        budget_spent: whether the budget ended the run before its epochs were over.
        spent_s: seconds of training and evaluation so far.
        spent_flop: floating-point operations so far, where the budget counts them.
        total_steps: updates of the whole run as expected after the last evaluation, where the
            budget is one that is counted as the run goes.
        loss_sum: weighted sum of the losses of this epoch's samples.
        loss_weight: sum of those weights.
        trained_share_sum: over all updates, parameters that trained as a share of all.
        backward_share_sum: over all updates, backward work as a share of full fine-tuning's.
    """

    step: int = 0
    evaluated: int = 0
    best: Best | None = None
    stale: int = 0
    phase: int = 0
    stopped_early: bool = False
    policy_done: bool = False
    exhausted: bool = False
    budget_spent: bool = False
    spent_s: float = field(default=0.0, compare=False)
    spent_flop: float = 0.0
    total_steps: int | None = None
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    trained_share_sum: float = 0.0
    backward_share_sum: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without what the clock says: equal runs have equal states."""
        return finite_json({k: v for k, v in asdict(self).items() if k != "spent_s"})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoopState:
        """The inverse of `to_json`, but for the clock."""
        best = data["best"] and Best(
            data["best"]["epoch"],
            data["best"]["step"],
            float(data["best"]["val_accuracy"]),
            float(data["best"]["val_loss"]),  # NaN is a string in JSON
        )
        return cls(**{**data, "best": best})


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop works with.

    Attributes:
        model: the model, on `device`.
        optimizer: over all its parameters.
        scheduler: stepped once per update.
        driver: decides what is frozen.
        device: where the model is.
        forward: context of a forward pass (mixed precision).
        scaler: gradient scaler, or None.
        cache: stored outputs of the frozen layers, or None.
        allowance: how much of the budget is spent.
        sample_flops: floating-point operations of one sample's training step under a plan, where
            the budget counts them.
        savings: adds up what freezing saves, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    driver: Driver
    device: torch.device
    forward: Callable[[], AbstractContextManager[object]]
    scaler: torch.amp.GradScaler | None = None
    cache: RunCache | None = None
    allowance: Allowance | None = None
    sample_flops: Callable[[FreezePlan], float] | None = None
    savings: Savings | None = None


@dataclass(frozen=True, slots=True)
class Listener:
    """What happens besides training; each is called between two updates.

    Attributes:
        updated: after each update, with its loss.
        best: when the weights as they are now were measured to be the best so far; before the
            policy hears of it, which may set the weights back.
        evaluated: after each epoch, with its metrics and whether it is the best so far.
        checkpoint: when one is due.
    """

    updated: Callable[[float], None]
    best: Callable[[], None]
    evaluated: Callable[[dict[str, float], bool], None]
    checkpoint: Callable[[], None]


@dataclass(slots=True)
class TrainingLoop:
    """Trains until the epochs are over, patience runs out, or the policy has nothing more to do.

    Args:
        task: data and how to feed it.
        parts: model, optimizer and the rest.
        batching: how an epoch is cut.
        listener: records, checkpoints, progress.
        interrupt: Ctrl-C.
        state: where to go on.
    """

    task: Task
    parts: Parts
    batching: Batching
    listener: Listener
    interrupt: Interrupt
    state: LoopState = field(default_factory=LoopState)
    _weights: Tensor | None = field(init=False, default=None)
    _shares: tuple[FreezePlan, float, float] | None = field(init=False, default=None)
    _opened: bool = field(init=False, default=False)
    _since: float = field(init=False, default=0.0)  # when seconds were counted last
    _flops: tuple[FreezePlan, float] | None = field(init=False, default=None)
    # Listing the parameters of a deep model takes longer than a step of its head.
    _parameters: tuple[nn.Parameter, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self._parameters = tuple(self.parts.model.parameters())
        if (allowance := self.parts.allowance) is not None:
            allowance.seconds = lambda: self.state.spent_s
            allowance.operations = lambda: self.state.spent_flop
        times, _ = foretold(self.parts.driver.policy)
        if times:  # the clock is asked before each update
            self.parts.driver.clock = lambda: self.state.spent_s
        weights = self.task.class_weights()
        self._weights = None if weights is None else weights.to(self.parts.device)

    @property
    def config(self) -> RunConfig:
        """The settings of the run."""
        return self.task.config

    @property
    def done(self) -> bool:
        """Whether training is over."""
        state = self.state
        ended = state.stopped_early or state.policy_done or state.budget_spent
        return ended or state.evaluated >= self.config.epochs

    def run(self, *, pause_after: int | None = None) -> None:
        """Train from where `state` is to the end.

        Args:
            pause_after: stop once so many epochs are evaluated, to go on later as if nothing had
                happened; None: do not.

        Raises:
            NonFiniteLoss: the loss or the gradient is no number any more.
            KeyboardInterrupt: Ctrl-C; `state` and parts are consistent and can be saved.
        """
        self._since = time.perf_counter()
        while not self.done and (pause_after is None or self.state.evaluated < pause_after):
            whole = (self.state.evaluated + 1) * self.batching.steps_per_epoch
            if self.state.step == whole or self.state.exhausted:
                self._end_epoch()
            else:
                self._train_epoch()

    # -- training ----------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """The rest of the current epoch."""
        epoch, done = divmod(self.state.step, self.batching.steps_per_epoch)
        order = epoch_order(self.config.seed, epoch, len(self.task.train))
        updates = self.batching.updates(order)[done:]
        views = views_of(self.config.seed, self.config.views, epoch, range(len(order)))
        keys = [[(i, views[i]) for i in batch] for update in updates for batch in update]
        if self.parts.cache is not None:
            self.parts.cache.expect(lasting=self._lasts())
        batches = self._batches(self.task.train, keys, draw=self.state.step)
        self.parts.model.train()
        self._opened = False
        for update in updates:
            self.interrupt.check()
            loss, weight = self._update(
                [i for batch in update for i in batch], len(update), batches
            )
            self._count(loss, weight, sum(map(len, update)))
            if self.state.exhausted:
                return

    def _update(
        self, indices: list[int], count: int, batches: Iterator[Batch]
    ) -> tuple[float, float]:
        """One optimizer update over `count` batches: its mean loss and total weight."""
        parts, timer = self.parts, _Timer(self.parts.cache)
        weight = self._weight_of(indices)
        with parts.driver.step():
            self._open_epoch()
            seed_update(self.config.seed, "update", self.state.step)
            parts.optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), dtype=torch.float64, device=parts.device)
            for _ in range(count):
                with timer.waiting():
                    batch = next(batches)
                with timer.computing():
                    loss += self._backward(batch.to(parts.device), weight)
            with timer.computing():
                value = float(loss)  # waits for a device that runs ahead
            if not math.isfinite(value):
                raise self._not_finite(f"a loss of {value}")
            if parts.scaler is not None:
                parts.scaler.unscale_(parts.optimizer)
            parts.driver.sample(loss=value, overflow=self._overflown())
            with timer.computing():
                self._clip()
                self._step()
        if parts.savings is not None:
            timer.tell(parts.savings, parts.driver.plan, len(indices))
        return value, weight

    def _open_epoch(self) -> None:
        """Tell the cache, once per epoch or session, what was frozen at the epoch's start."""
        cache, driver = self.parts.cache, self.parts.driver
        if self._opened or cache is None:
            return
        self._opened = True
        begin = self.state.evaluated * self.batching.steps_per_epoch
        plans = [d.plan for d in driver.decisions if d.step <= begin][-1:]
        plans += [d.plan for d in driver.decisions if d.step > begin]
        groups = driver.backend.groups
        frozen = [plan.frozen_parameters(groups) for plan in plans]
        cache.start_epoch(
            frozen=frozen[0] if frozen else frozenset(),
            intact=all(frozen[0] <= later for later in frozen),
        )

    def _lasts(self) -> bool:
        """Whether what is frozen in this epoch is frozen in the one before or after it, too.

        What is stored for one epoch alone costs as much as it saves. It follows from decisions
        and the clock, so an interrupted run answers as an uninterrupted one.
        """
        driver, size = self.parts.driver, self.batching.steps_per_epoch
        groups, begin = driver.backend.groups, self.state.evaluated * size
        driver.start()
        now = driver.foresee(0) or driver.plan
        if begin:
            before = [d.plan for d in driver.decisions if d.step <= begin - size][-1:]
            if before and before[0].frozen_parameters(groups) == now.frozen_parameters(groups):
                return True
        if self.state.evaluated + 1 >= self.config.epochs:
            return False
        after = driver.foresee(begin + size - driver.progress.step)
        return after is None or now.frozen_parameters(groups) <= after.frozen_parameters(groups)

    def _overflown(self) -> bool:
        """Whether the scaler will skip this update; looked up only if a signal depends on it."""
        parts = self.parts
        if parts.scaler is None or not parts.driver.sampling:
            return False
        gradients = [p.grad for p in parts.model.parameters() if p.grad is not None]
        return not math.isfinite(float(nn.utils.get_total_norm(gradients)))

    def _backward(self, batch: Batch, weight: float) -> Tensor:
        with self.parts.forward():
            logits = self.task.logits(self.parts.model, batch)
        losses = functional.cross_entropy(
            logits.float(), batch.targets, weight=self._weights, reduction="sum"
        )
        loss = losses / weight
        scaled = loss if self.parts.scaler is None else self.parts.scaler.scale(loss)
        scaled.backward()
        return loss.detach().double()

    def _weight_of(self, indices: list[int]) -> float:
        """The sum of sample weights of an update, so that its loss is one mean over all batches."""
        if self._weights is None:
            return float(len(indices))
        labels = torch.tensor([self.task.train.labels[i] for i in indices])
        return float(self._weights.cpu().double()[labels].sum())

    def _clip(self) -> None:
        if self.config.clip_norm is None:
            return
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        if self.parts.scaler is None and not math.isfinite(float(norm)):
            raise self._not_finite(f"a gradient of norm {float(norm)}")

    def _step(self) -> None:
        optimizer, scaler = self.parts.optimizer, self.parts.scaler
        if scaler is None:
            optimizer.step()
            self.parts.scheduler.step()
            return
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:  # else the update was skipped, and the rate waits
            self.parts.scheduler.step()

    def _spend(self, samples: int) -> None:
        """Charge the time since the last call and the work of an update of so many samples."""
        state, allowance, plan = self.state, self.parts.allowance, self.parts.driver.plan
        now = time.perf_counter()
        state.spent_s += now - self._since
        self._since = now
        if (of := self.parts.sample_flops) is not None and samples:
            if self._flops is None or self._flops[0] is not plan:
                self._flops = plan, of(plan)
            state.spent_flop += self._flops[1] * samples
        if allowance is not None:
            state.exhausted = allowance.spent(state.step)

    def _count(self, loss: float, weight: float, samples: int) -> None:
        state = self.state
        trained, backward = self._shares_of(self.parts.driver.plan)
        state.step += 1
        self._spend(samples)
        state.loss_sum += loss * weight
        state.loss_weight += weight
        state.trained_share_sum += trained
        state.backward_share_sum += backward
        self.listener.updated(loss)
        if state.step % self.batching.steps_per_epoch and self._checkpoint_due():
            self.listener.checkpoint()

    def _shares_of(self, plan: FreezePlan) -> tuple[float, float]:
        if self._shares is None or self._shares[0] is not plan:
            groups = self.parts.driver.backend.groups
            self._shares = (plan, trained_share(groups, plan), backward_share(groups, plan))
        return self._shares[1:]

    def _checkpoint_due(self) -> bool:
        if self.config.checkpoint_every is None:
            return False
        every = Duration.parse(self.config.checkpoint_every).steps(self.parts.driver.progress)
        return self.state.step % max(1, every) == 0

    # -- evaluation --------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        state = self.state
        metrics = {"train_loss": state.loss_sum / state.loss_weight}
        measured = self.evaluate(self.task.val)
        metrics |= {f"val_{name}": value for name, value in measured.items()}
        self._spend(0)
        if (allowance := self.parts.allowance) is not None and allowance.counted:
            state.total_steps = allowance.expected_steps(state.step)
            self.parts.driver.total_steps = state.total_steps
        found = Best(state.evaluated + 1, state.step, measured["accuracy"], measured["loss"])
        better = found.beats(state.best)
        if better:
            self.listener.best()
        plan = self.parts.driver.evaluated(metrics)
        self.state = replace(
            state,
            evaluated=state.evaluated + 1,
            best=found if better else state.best,
            stale=0 if better or plan.phase != state.phase else state.stale + 1,
            phase=plan.phase,
            loss_sum=0.0,
            loss_weight=0.0,
        )
        if self.state.evaluated < self.config.epochs:
            self.state.policy_done = plan.done
            self.state.stopped_early = not plan.done and self._out_of_patience(plan)
            self.state.budget_spent = self.state.exhausted
        self.listener.evaluated(metrics, better)
        if not self.done and self._checkpoint_due():
            self.listener.checkpoint()

    def _out_of_patience(self, plan: FreezePlan) -> bool:
        """Whether too many epochs brought nothing, and the policy has no answer of its own."""
        patience, driver = self.config.patience, self.parts.driver
        if patience is None or self.state.stale < patience:
            return False
        return not ends_its_phase(driver.policy, driver.backend.groups, plan)

    def evaluate(self, split: Split, *, see: See | None = None) -> dict[str, float]:
        """Loss and accuracy on a split, without augmentation.

        Args:
            split: in its order.
            see: receives the scores (N, C) of each batch and their classes (N,).

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        seed_update(self.config.seed, "evaluate", self.state.evaluated)
        size = self.config.batch_size
        keys = [
            [(i, None) for i in range(start, min(start + size, len(split)))]
            for start in range(0, len(split), size)
        ]
        return evaluate(self.task, self.parts, self._batches(split, keys), self.interrupt, see)

    def _batches(self, split: Split, keys: Keys, *, draw: int = 0) -> Iterator[Batch]:
        if self.parts.cache is not None and self.parts.cache.serves(split):
            return self.parts.cache.batches(split, keys, draw=draw)
        # A generator of its own: the loader draws a seed for its workers, which must not move
        # the global stream.
        loader = DataLoader(
            split,
            batch_sampler=keys,
            collate_fn=self.task.collate,
            num_workers=self.config.workers,
            generator=torch.Generator(),
        )
        return iter(loader)

    # -- failure -----------------------------------------------------------------------------

    def _not_finite(self, what: str) -> NonFiniteLoss:
        rates = sorted({float(group["lr"]) for group in self.parts.optimizer.param_groups})
        groups = self.parts.driver.backend.groups
        where = _first_non_finite(self.parts.model, groups)
        return NonFiniteLoss(
            f"go on training after update {self.state.step}",
            found=f"{what} at learning rates {rates[0]:g} to {rates[-1]:g}"
            + (f"; {where}" if where else ""),
            fix="a smaller lr or head_lr, a longer warmup, a clip_norm, or precision: fp32",
        )


class _Timer:
    """Seconds of one update, and how the cache stood before it."""

    def __init__(self, cache: RunCache | None) -> None:
        self._report = None if cache is None else cache.frontier.report
        self._before = self._cached()
        self._started = time.perf_counter()
        self._compute_s = self._wait_s = 0.0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around forward and backward passes and the optimizer."""
        start = time.perf_counter()
        yield
        self._compute_s += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - start

    def tell(self, savings: Savings, plan: FreezePlan, samples: int) -> None:
        """Count the update, now that it is over."""
        total = time.perf_counter() - self._started
        pairs = zip(self._cached(), self._before, strict=True)
        replayed, rows, ran_s = (now - then for now, then in pairs)
        whole = not replayed and not rows
        savings.add(plan, Update(samples, total, self._compute_s, self._wait_s, whole))
        if rows:
            savings.filled(plan, samples=int(rows), compute_s=ran_s)

    def _cached(self) -> tuple[float, float, float]:
        """Batches served, and samples and seconds of filling, so far."""
        report = self._report
        if report is None:
            return (0, 0, 0)
        return report.replayed, report.computed_rows, report.compute_s


def evaluate(
    task: Task,
    parts: Parts,
    batches: Iterator[Batch],
    interrupt: Interrupt,
    see: See | None = None,
) -> dict[str, float]:
    """Mean cross-entropy and accuracy over batches; sums are kept in double precision."""
    loss = torch.zeros((), dtype=torch.float64, device=parts.device)
    correct = torch.zeros((), dtype=torch.int64, device=parts.device)
    count = 0
    parts.model.eval()
    with torch.no_grad():
        for batch in batches:
            interrupt.check()
            moved = batch.to(parts.device)
            with parts.forward():
                logits = task.logits(parts.model, moved)
            if see is not None:
                see(logits, moved.targets)
            each = functional.cross_entropy(logits.float(), moved.targets, reduction="none")
            loss += each.double().sum()
            correct += (logits.argmax(dim=1) == moved.targets).sum()
            count += batch.size
    return {"loss": float(loss) / count, "accuracy": int(correct) / count}


def _first_non_finite(model: nn.Module, groups: LayerGroups) -> str:
    """The shallowest group with a weight, else a gradient, that is no number."""
    parameters = dict(model.named_parameters())

    def bad(group: LayerGroup, *, gradient: bool) -> bool:
        found = [parameters[p.name] for p in group.parameters if p.name in parameters]
        tensors = [p.grad if gradient else p for p in found]
        return any(t is not None and not torch.isfinite(t).all() for t in tensors)

    for gradient, what in ((False, "weight"), (True, "gradient")):
        for group in groups:
            if bad(group, gradient=gradient):
                return f"the first {what} that is not finite is in group {group.name!r}"
    return ""
