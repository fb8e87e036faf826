"""The driver: the only mutable object of the core. It asks, applies, records and proves.

One driver accompanies one training run. Around every optimizer update it asks the policy, makes
the model equal to the plan through the backend, samples the signals the policy needs, and keeps
the proof that frozen tensors kept their bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from frostline.backend import Backend
from frostline.clock import Progress
from frostline.cost import plan_line
from frostline.errors import (
    BackendError,
    FrozenTensorChanged,
    PolicyError,
    StorageError,
    TrainingError,
    few,
)
from frostline.gauges import Gauges
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Decision, Event, EventKind, Policy, State, read_metric
from frostline.signals import SIGNALS, Array

__all__ = ["Certificate", "Driver", "Hold"]

_log = logging.getLogger("frostline")
_STATE_FORMAT = 2
#: A change of learning rates alone enters the record at most this often in a run.
_RECORDED_RATES = 100
#: So many samples in a row without an update are no longer a gradient scaler finding its scale.
_MISSED_UPDATES = 10


@dataclass(frozen=True, slots=True)
class Hold:
    """One tensor held frozen over a span of updates, with its digest.

    Attributes:
        tensor: name of the parameter or buffer.
        sha256: digest when frozen; the same when the span ended, or the run would have failed.
        from_step: updates complete when it was frozen.
        to_step: updates complete when it was checked last (unfreeze or end of run).
    """

    tensor: str
    sha256: str
    from_step: int
    to_step: int


@dataclass(frozen=True, slots=True)
class Certificate:
    """The proof of freezing of a run: every span in which a tensor was held.

    Attributes:
        holds: the spans, in the order in which they ended.
        check_s: seconds spent on digests.
    """

    holds: tuple[Hold, ...] = ()
    check_s: float = 0.0

    def covers(self, decisions: Sequence[Decision], groups: LayerGroups, *, end: int) -> bool:
        """Whether every tensor that a plan froze was held for as long as the plan was in force.

        Spans that follow each other without an update between them count as one: weights may be
        written back in between, as by early stopping.

        Args:
            decisions: every change of plan of the run, the first one included.
            groups: the layer groups.
            end: updates of the run.

        Example:
            >>> from frostline.groups import LayerGroup, TensorInfo
            >>> groups = LayerGroups((LayerGroup("body", 0, (TensorInfo("body.w", (1,)),)),))
            >>> frozen = [Decision(0, FreezePlan(frozen=frozenset({"body"})))]
            >>> halves = (Hold("body.w", "ab", 0, 4), Hold("body.w", "cd", 4, 8))
            >>> Certificate(halves).covers(frozen, groups, end=8)
            True
            >>> Certificate(halves[:1]).covers(frozen, groups, end=8)
            False
        """
        spans = self._joined()
        ends = [*(decision.step for decision in decisions[1:]), end]
        return all(
            any(begin <= decision.step and until <= stop for begin, stop in spans.get(name, ()))
            for decision, until in zip(decisions, ends, strict=True)
            for name in decision.plan.held_tensors(groups)
        )

    def _joined(self) -> dict[str, list[tuple[int, int]]]:
        """By tensor the spans in which it was held, those that touch made one."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for hold in sorted(self.holds, key=lambda h: (h.from_step, h.to_step)):
            found = spans.setdefault(hold.tensor, [])
            if found and found[-1][1] == hold.from_step:
                found[-1] = found[-1][0], hold.to_step
            else:
                found.append((hold.from_step, hold.to_step))
        return spans

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON, without the time."""
        return [
            {"tensor": h.tensor, "sha256": h.sha256, "from_step": h.from_step, "to_step": h.to_step}
            for h in self.holds
        ]


@dataclass(slots=True)
class _Costs:
    """Seconds the driver itself took, by purpose: charged to the run."""

    policy_s: float = 0.0
    signals_s: float = 0.0
    apply_s: float = 0.0
    digest_s: float = 0.0
    signal_s: dict[str, float] = field(default_factory=dict)
    widened_steps: int = 0

    @contextmanager
    def charge(self, purpose: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, purpose, getattr(self, purpose) + time.perf_counter() - start)


@dataclass(slots=True, weakref_slot=True)
class Driver:
    """Runs a policy over a training loop.

    Args:
        policy: what decides.
        backend: what applies; see `frostline.backend.Backend`.
        total_steps: optimizer updates of the whole run, if known ("30%" needs it).
        steps_per_epoch: updates per epoch, if known ("2ep" needs it).
        on_decision: called with each `Decision` after it was applied.
        prove: keep SHA-256 digests of everything frozen and check them.
        measured: signals of the data that were measured before the run, by name and group, for
            policies that read them ("probe_accuracy"); may be set until the driver starts.
        clock: gives the seconds of training and validation so far, for policies that keep to a
            limit; may be set until the driver starts. None: nobody counts them.

    Attributes:
        plan: the plan in force.
        decisions: every change of plan so far.
        progress: updates completed and totals.
        automatic: whether something calls `sample` before each update without being asked, as
            `torch_driver` arranges; a step in which it does not come made no update.
        costs: seconds spent in the policy, in signals, in applying and in digests; what each
            signal took; and how many steps ran backward through frozen groups for a signal.

    Example:
        One optimizer update is one step, however many micro-batches it accumulates::

            driver = frostline.torch_driver(model, optimizer, "gradual:every=1ep",
                                            total_epochs=5, steps_per_epoch=len(batches))
            for epoch in range(5):
                for x, y in batches:
                    with driver.step():
                        loss_function(model(x), y).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                driver.evaluated({"accuracy": evaluate(model)})
            certificate = driver.finish()
    """

    policy: Policy
    backend: Backend
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    on_decision: Callable[[Decision], None] | None = None
    prove: bool = True
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    clock: Callable[[], float] | None = None
    plan: FreezePlan = field(init=False, default_factory=FreezePlan)
    decisions: list[Decision] = field(init=False, default_factory=list)
    progress: Progress = field(init=False)
    automatic: bool = field(init=False, default=False)
    costs: _Costs = field(init=False, default_factory=_Costs)
    _state: State = field(init=False, default_factory=dict)
    _gauges: Gauges = field(init=False)
    _best: dict[str, Any] | None = field(init=False, default=None)  # value, weights
    _held: dict[str, tuple[str, int]] = field(init=False, default_factory=dict)  # name: sha, since
    _holds: list[Hold] = field(init=False, default_factory=list)
    _stage: str = field(init=False, default="new")
    _open: bool = field(init=False, default=False)  # between begin_step and end_step
    _sampled_at: int = field(init=False, default=-1)  # the step sampled last
    _missed: int = field(init=False, default=0)  # steps in a row whose update never came

    def __post_init__(self) -> None:
        self.progress = Progress(0, self.total_steps, self.steps_per_epoch)
        self._gauges = Gauges(self.policy.needs(), self.progress)
        self.costs.signal_s = self._gauges.seconds

    # -- the loop's side ---------------------------------------------------------------------

    def start(self) -> FreezePlan:
        """Ask the policy for its first plan and apply it; the first step does so if you do not."""
        if self._stage != "new":
            return self.plan
        self._stage = "running"
        if notice := self.policy.notice():
            _log.warning("%s", notice)
        self._state = self.policy.init(self.backend.groups)
        if self._gauges.static:
            with self.costs.charge("signals_s"):
                self._gauges.read_static(
                    self.backend.probe(), self.backend.groups, self._supplied()
                )
        self._ask(EventKind.START, {}, first=True)
        return self.plan

    @contextmanager
    def step(self) -> Iterator[FreezePlan]:
        """Surround one optimizer update: forward, backward and `optimizer.step()`.

        An exception inside leaves the count of completed updates as it was.
        """
        self.begin_step()
        try:
            yield self.plan
        except BaseException:
            self._open = False
            self.backend.narrow()
            raise
        self.end_step()

    def begin_step(self) -> FreezePlan:
        """Before the forward pass of an update: ask, apply, restore what outsiders moved."""
        if not self._started():
            self._ask(EventKind.STEP, {})
        if moved := self.backend.hold():
            _log.warning(
                "step %d: something outside changed the freezing of %s; restored",
                self.progress.step,
                few(moved),
            )
        self._open = True
        if self._gauges.keeps_batch and self.progress.step == 0:
            self.backend.keep_batch()
        if self.plan.frozen and self._gauges.wants_frozen(self.progress.step):
            self.backend.widen()
            self.costs.widened_steps += 1
        return self.plan

    @property
    def sampling(self) -> bool:
        """Whether the present step has signals to sample that were not sampled yet."""
        due = self._open and self._sampled_at != self.progress.step
        return due and bool(self._gauges.due(self.progress.step))

    def sample(self, loss: float | Array | None = None, *, overflow: bool = False) -> None:
        """Between backward and `optimizer.step()`: sample the signals that are due.

        Needed only for policies that read signals; `torch_driver` does it by itself, just before
        the update. Further calls in a step do nothing, also when the step failed and is tried
        again. Under a gradient scaler, unscale first.

        Args:
            loss: the training loss of this step, for policies that read it: a number, or what
                the framework has for one.
            overflow: the gradients are not finite and the update will be skipped (mixed
                precision): nothing is gathered in this step.
        """
        if not self.sampling:
            return
        with self.costs.charge("signals_s"):
            probe = self.backend.probe(loss)
            self._gauges.sample(self.progress.step, probe, self.backend.groups, gather=not overflow)
            self.backend.narrow()
        self._sampled_at, self._missed = self.progress.step, 0

    def end_step(self) -> None:
        """After `optimizer.step()`: count the update and look for writes to frozen tensors.

        Raises:
            FrozenTensorChanged: something wrote to a frozen tensor in this step.
            PolicyError: the policy's signals were due and never sampled.
        """
        if self.sampling and self.automatic:
            self._miss()
        if self.sampling:
            due = self._gauges.due(self.progress.step)
            raise PolicyError(
                f"decide on {', '.join(due)}",
                found=f"no sample taken in step {self.progress.step}",
                fix="call driver.sample() between backward() and optimizer.step()",
            )
        self._open = False
        self.progress = Progress(self.progress.step + 1, self.total_steps, self.steps_per_epoch)
        self._gauges.forget(self.progress.step)
        if self.prove and (suspects := self.backend.written()):
            self._verify([name for name in suspects if name in self._held])

    @property
    def signals(self) -> Mapping[str, Mapping[str, float]]:
        """Newest values of the policy's signals, by signal, then by group or parameter."""
        return self._gauges.values

    @property
    def sampled(self) -> Mapping[str, int]:
        """By signal, after how many updates its newest values were read."""
        return self._gauges.sampled

    def foresee(self, updates: int) -> FreezePlan | None:
        """The plan after so many further updates, if nothing but the clock has a say until then.

        Nothing changes. None for policies that read signals; a policy that answers to metrics may
        decide otherwise at the next evaluation.

        Args:
            updates: how far to look, >= 0; not beyond the last update.
        """
        if self._stage != "running" or self.policy.needs():
            return None
        plan, state, groups = self.plan, self._state, self.backend.groups
        last = self.progress.step + updates
        if self.total_steps is not None:
            last = min(last, self.total_steps - 1)
        for step in range(self.progress.step, last + 1):
            progress = Progress(step, self.total_steps, self.steps_per_epoch)
            event = Event(EventKind.STEP, progress, {}, {}, {})
            plan, state = self.policy.decide(groups, state, event)
        return plan

    def evaluated(self, metrics: Mapping[str, float]) -> FreezePlan:
        """After an evaluation: let the policy see the metrics."""
        self._started()
        self._keep_best(metrics)
        self._ask(EventKind.EVALUATED, dict(metrics))
        return self.plan

    def finish(self) -> Certificate:
        """End the run: check everything still frozen and return the proof.

        The model is left as the last plan has it.

        Raises:
            FrozenTensorChanged: a frozen tensor moved.
        """
        if self._stage == "running":
            self._release(list(self._held))
            self._stage = "finished"
        return self.certificate

    @property
    def held(self) -> Mapping[str, str]:
        """SHA-256 of every tensor that is held frozen now, by name; empty without `prove`."""
        return {name: sha256 for name, (sha256, _) in self._held.items()}

    @property
    def certificate(self) -> Certificate:
        """The spans proved so far (complete after `finish`)."""
        return Certificate(tuple(self._holds), self.costs.digest_s)

    # -- resume ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later: plain JSON, but for arrays.

        Arrays are leaves of it only under policies whose signals remember tensors or that keep
        the best weights of a phase; `save_checkpoint` stores them as safetensors.
        """
        return {
            "format": _STATE_FORMAT,
            "policy": repr(self.policy),
            "step": self.progress.step,
            "sampled_at": self._sampled_at,
            "stage": self._stage,
            "plan": self.plan.to_json(),
            "policy_state": self._state,
            "gauges": self._gauges.state(),
            "batch": self.backend.kept() if self._gauges.keeps_batch else None,
            "best": self._best,
            "widened_steps": self.costs.widened_steps,
            "decisions": [d.to_json() for d in self.decisions],
            "held": {name: list(entry) for name, entry in sorted(self._held.items())},
            "holds": Certificate(tuple(self._holds)).to_json(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`: call after the model and optimizer have their saved values.

        Applies the saved plan and checks that every held tensor has the digest it was saved with.

        Raises:
            StorageError: the state is of another policy or format.
            FrozenTensorChanged: a frozen tensor is not what the checkpoint says.
        """
        if state.get("format") != _STATE_FORMAT:
            raise StorageError(
                "resume the driver",
                found=f"state of format {state.get('format')!r}",
                fix=f"a state written by this version (format {_STATE_FORMAT})",
            )
        if state["policy"] != repr(self.policy):
            raise StorageError(
                f"resume with the policy {self.policy!r}",
                found=f"a checkpoint written under {state['policy']}",
                fix="use the same policy, or start afresh",
            )
        self.progress = Progress(state["step"], self.total_steps, self.steps_per_epoch)
        self.plan = FreezePlan.from_json(state["plan"])
        self.decisions = [Decision.from_json(d) for d in state["decisions"]]
        self._stage, self._sampled_at = state["stage"], state["sampled_at"]
        self._state = state["policy_state"]
        self._gauges.restore(state["gauges"], self.backend.groups)
        self._best = state["best"]
        self.costs.widened_steps = state["widened_steps"]
        if state["batch"] is not None:
            self.backend.restore_kept(state["batch"])
        self._held = {name: (sha, since) for name, (sha, since) in state["held"].items()}
        self._holds = [Hold(**hold) for hold in state["holds"]]
        if self._stage != "new":
            self.backend.apply(self.plan)
            self.backend.written()
            self._verify(list(self._held))

    # -- inside ------------------------------------------------------------------------------

    def _supplied(self) -> Mapping[str, Mapping[str, float]]:
        """What was measured before the run; raises where it is of no such signal or group."""
        known = sorted(name for name, signal in SIGNALS.items() if signal.supplied)
        groups = self.backend.groups.names
        for name, values in self.measured.items():
            if name not in known:
                raise PolicyError(
                    f"supply the signal {name!r}",
                    found="no signal that is measured before the run",
                    fix=f"one of {', '.join(known)}",
                )
            if odd := sorted(set(values) - set(groups)):
                raise PolicyError(
                    f"supply the signal {name!r}",
                    found=f"values of {few(odd)}, which are no layer groups",
                    fix=f"names such as {few(list(groups))}",
                )
            if bad := [group for group, value in values.items() if not math.isfinite(value)]:
                raise PolicyError(
                    f"supply the signal {name!r}", found=f"values of {few(bad)} that are no number"
                )
        return self.measured

    def _started(self) -> bool:
        """Start the run if it has not; whether this call did. Raises when it is over."""
        if self._stage == "finished":
            raise TrainingError(
                f"go on after step {self.progress.step}",
                found="a driver whose run is finished: its proof is complete",
                fix="a new driver for more training",
            )
        new = self._stage == "new"
        self.start()
        return new

    def _ask(self, kind: EventKind, metrics: Mapping[str, float], *, first: bool = False) -> None:
        gauges = self._gauges
        with self.costs.charge("policy_s"):
            progress = self.progress
            if self.clock is not None:
                progress = replace(progress, spent_s=self.clock())
            event = Event(kind, progress, gauges.values, metrics, gauges.sampled)
            plan, self._state = self.policy.decide(self.backend.groups, self._state, event)
        if first:
            self._change(plan, metrics)
        elif plan is not self.plan and plan != self.plan:
            if self.plan.differs_only_in_rates(plan):
                self._change_rates(plan)
            else:
                self._change(plan, metrics)

    def _change(self, plan: FreezePlan, metrics: Mapping[str, float]) -> None:
        plan.check(self.backend.groups)
        held = plan.held_tensors(self.backend.groups) if self.prove else frozenset()
        self._release([name for name in self._held if name not in held])
        if plan.phase != self.plan.phase and self._best is not None:
            self._go_back(self._best["weights"])
            self._best = None
        with self.costs.charge("apply_s"):
            self.backend.apply(plan)
        if new := [name for name in sorted(held) if name not in self._held]:
            with self.costs.charge("digest_s"):
                digests = self.backend.fingerprint(new)
            self._held |= {name: (digests[name], self.progress.step) for name in new}
        self.backend.written()
        self.plan = plan
        _log.info("step %d: %s", self.progress.step, plan_line(self.backend.groups, plan))
        self._record(metrics)

    def _change_rates(self, plan: FreezePlan) -> None:
        """Learning rates may change at every step: applied each time, recorded now and then."""
        with self.costs.charge("apply_s"):
            self.backend.apply(plan)
        self.plan = plan
        spacing = max(1, (self.total_steps or 10_000) // _RECORDED_RATES)
        if self.progress.step - self.decisions[-1].step >= spacing:
            self._record({})

    def _record(self, metrics: Mapping[str, float]) -> None:
        values = {name: dict(found) for name, found in self._gauges.values.items()}
        decision = Decision(self.progress.step, self.plan, values, dict(metrics))
        self.decisions.append(decision)
        if self.on_decision is not None:
            self.on_decision(decision)

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        """Keep the weights if they are the best of this phase and the plan asks for that."""
        mode, _, name = self.plan.keep_best.partition(" ")
        if not name:
            return
        measured = read_metric(metrics, name, f"keep the best weights by {name!r}")
        value = measured if mode == "max" else -measured
        if not math.isnan(value) and (self._best is None or value > self._best["value"]):
            with self.costs.charge("apply_s"):
                self._best = {"value": value, "weights": dict(self.backend.weights())}

    def _miss(self) -> None:
        """Sample a step in which no update came: a gradient scaler skipped it, or a mistake."""
        missed = self._missed + 1
        self.sample(overflow=True)
        self._missed = missed
        if missed == _MISSED_UPDATES:
            _log.warning(
                "step %d: in the last %d steps that were to be sampled, the optimizer of this "
                "driver made no update, so the policy reads nothing. One step of the driver is "
                "one update of the optimizer it was given, not one micro-batch",
                self.progress.step,
                missed,
            )

    def _go_back(self, weights: Mapping[str, Any]) -> None:
        """Write kept weights back; spans of tensors frozen later than those end here."""
        self._verify(list(self._held))  # what is written back now must not hide a change
        with self.costs.charge("apply_s"):
            self.backend.load_weights(weights)
        with self.costs.charge("digest_s"):
            now = self.backend.fingerprint(list(self._held))
        self._end_spans([name for name, (sha256, _) in self._held.items() if now[name] != sha256])

    def _release(self, names: list[str]) -> None:
        self._verify(names)
        self._end_spans(names)

    def _end_spans(self, names: list[str]) -> None:
        for name in sorted(names):
            sha256, since = self._held.pop(name)
            self._holds.append(Hold(name, sha256, since, self.progress.step))

    def _verify(self, names: list[str]) -> None:
        if not names:
            return
        with self.costs.charge("digest_s"):
            now = self.backend.fingerprint(names)
        if missing := [name for name in names if name not in now]:
            raise BackendError("check frozen tensors", found=f"no digest for {few(missing)}")
        moved = [name for name in sorted(names) if now[name] != self._held[name][0]]
        if moved:
            raise FrozenTensorChanged(
                f"go on: frozen tensors changed by step {self.progress.step}",
                found=f"{few(moved)}: other bits than when frozen at step "
                f"{self._held[moved[0]][1]}",
                fix="find what writes to them (weight averaging, a manual copy, a module that "
                "edits itself), or leave their groups trainable",
            )
