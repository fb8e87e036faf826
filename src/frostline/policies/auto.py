"""The default of `fit`: a depth read from the data, kept within a budget, corrected as it trains.

`Auto` is made of parts that also serve alone: `ProbeDepth` says where to begin, `Steer` moves from
there by what validation shows, `Affordable` bounds what a step may cost as a share of full
fine-tuning, and `Within` what the run may take in seconds and bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from frostline.clock import Duration
from frostline.compose import Around, kept_plan, kept_text
from frostline.cost import check_measured, predicted_step_s
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import (
    backbone,
    check_options,
    finite,
    freeze_first,
    improved,
    metric,
)
from frostline.policies.within import Within
from frostline.policy import Event, EventKind, Policy, State
from frostline.signals import Need

__all__ = ["Affordable", "Auto", "ProbeDepth", "Steer"]

_ACCURACY, _BEHIND = "probe_accuracy", "probe_behind"
_GRADIENT = "relative_gradient_norm"
_ONE_EPOCH = Duration.parse("1ep")

Decided = tuple[FreezePlan, State]


@dataclass(frozen=True, slots=True)
class ProbeDepth(Policy):
    """Freeze the groups before the first one that a linear probe reads as well as any.

    Before training, linear probes are fitted to what each layer group puts out for the training
    data, and asked about the validation data. Up to the first group whose probe is not shown to be
    worse than the best one, features get better with depth and are worth keeping; from there on
    pretrained layers add nothing that can be read off, so these train. That group itself trains.

    `fit` measures the probes; around a loop of your own set them on the driver
    (`driver.measured`) before it starts. Where there are none, the first `fallback` of the
    groups is frozen, and the reason says so.

    Attributes:
        tolerance: accuracy that a probe may be behind the best one beyond noise, [0, 1). 0: ours.
        fallback: share of the backbone's groups to freeze without probes, in [0, 1]. Half: ours.

    References:
        The probes: Alain & Bengio 2016, "Understanding intermediate layers using linear classifier
        probes", arXiv:1610.01644. The rule is ours.

    Example:
        >>> from frostline.clock import Progress
        >>> from frostline.testing import example_groups
        >>> groups = example_groups(4)
        >>> behind = {"block0": 0.3, "block1": 0.1, "block2": 0.0}
        >>> event = Event(EventKind.START, Progress(), {"probe_behind": behind})
        >>> plan, _ = ProbeDepth().decide(groups, {}, event)
        >>> sorted(plan.frozen)
        ['block0', 'block1']
    """

    tolerance: float = 0.0
    fallback: float = 0.5

    def __post_init__(self) -> None:
        check_options(
            self, {"tolerance": 0 <= self.tolerance < 1, "fallback": 0 <= self.fallback <= 1}
        )

    def needs(self) -> tuple[Need, ...]:
        """The probes."""
        return Need(_ACCURACY, None), Need(_BEHIND, None)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The same prefix throughout."""
        names = backbone(groups)
        behind = finite(names, event.signals.get(_BEHIND, {}))
        if not behind:
            count = int(len(names) * self.fallback)
            reason = f"no probes: the first {count} of {len(names)} groups"
            return freeze_first(groups, count, reason), state
        first = next(name for name in names if behind.get(name, math.inf) <= self._bound(behind))
        count = names.index(first)
        return freeze_first(groups, count, self._reason(first, count, groups, event)), state

    def _bound(self, behind: Mapping[str, float]) -> float:
        return max(self.tolerance, min(behind.values()))  # the best is never out of bounds

    def _reason(self, first: str, count: int, groups: LayerGroups, event: Event) -> str:
        accuracy = event.signals.get(_ACCURACY, {})
        names = backbone(groups)
        text = f"probes: {first} is the first of {len(names)} groups that reads as well as any"
        body = finite(names, accuracy)
        if first in body:
            best = max(body, key=lambda name: body[name])
            text += f" ({body[first]:.3f}, the best {body[best]:.3f} at {best}"
            head = finite(sorted(groups.head), accuracy)
            text += f", what enters the head {max(head.values()):.3f})" if head else ")"
        return f"{text}; the {count} before it are frozen"


@dataclass(frozen=True, slots=True)
class Affordable(Around):
    """Freeze further groups, from the input on, until a step costs no more than allowed.

    Both costs are predicted from what was measured before training: the time of a step by
    `frostline.cost.predicted_step_s`, memory as the bytes of the activations that the backward pass
    keeps. If even linear probing costs more, that is what is left, and the reason says so.

    Attributes:
        policy: the inner policy.
        time: most time of a step, as a share of full fine-tuning's, (0, 1]; 1: no bound.
        memory: most memory for activations, as a share of full fine-tuning's, (0, 1]; 1: no bound.
    """

    time: float = 1.0
    memory: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, {"time": 0 < self.time <= 1, "memory": 0 < self.memory <= 1})

    def init(self, groups: LayerGroups) -> State:
        """The inner state; raises if costs were never measured and some bound is set."""
        if min(self.time, self.memory) < 1:
            check_measured(groups, "bound the cost of a step")
        return {"inner": self.policy.init(groups), "wanted": None, "plan": None}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner plan, and as long a frozen prefix as the bounds ask for."""
        plan, inner = self.policy.decide(groups, state["inner"], event)
        state = state | {"inner": inner}
        if min(self.time, self.memory) == 1:
            return plan, state
        # Asked at every step, and dear: the answer is kept for as long as the wish is the same.
        if (wanted := kept_text(plan)) != state["wanted"]:
            state |= {"wanted": wanted, "plan": kept_text(self._bounded(groups, plan))}
        return kept_plan(state["plan"]), state

    def _bounded(self, groups: LayerGroups, plan: FreezePlan) -> FreezePlan:
        names, more, frozen = backbone(groups), plan, ""
        for count in range(1, len(names) + 1):
            if self._fits(groups, more):
                break
            more = replace(plan, frozen=plan.frozen | frozenset(names[:count]), exempt={})
            frozen = f"the first {count} frozen: "
        if not self._fits(groups, more):
            frozen = f"all {len(names)} frozen, and still too dear: "
        return more.because(f"{plan.reason}; {frozen}{self._costs(groups, more)}")

    def _fits(self, groups: LayerGroups, plan: FreezePlan) -> bool:
        full = FreezePlan()
        cheap = predicted_step_s(groups, plan) <= self.time * predicted_step_s(groups, full) + 1e-12
        return cheap and _activations(groups, plan) <= self.memory * _activations(groups, full)

    def _costs(self, groups: LayerGroups, plan: FreezePlan) -> str:
        """What a step is predicted to take, and what it may take."""
        full, said = FreezePlan(), []
        for bound, of, what in (
            (self.time, predicted_step_s, "time"),
            (self.memory, _activations, "memory for activations"),
        ):
            if bound < 1:
                share = of(groups, plan) / (of(groups, full) or 1)
                said.append(f"{100 * share:.3g} % of the {what} (at most {100 * bound:.3g} %)")
        return f"a step is predicted to take {' and '.join(said)} of full fine-tuning"


def _activations(groups: LayerGroups, plan: FreezePlan) -> int:
    """Bytes of activations that the backward pass keeps: those from the frontier on."""
    frontier = plan.frontier(groups)
    return sum(g.cost.activation_bytes for g in groups if g.cost and g.depth >= frontier)


@dataclass(frozen=True, slots=True)
class Steer(Around):
    """Unfreeze deeper when training underfits, freeze more when it overfits, by validation.

    Training stalls when in `patience` evaluations in a row neither the metric nor the validation
    accuracy (where there is one) was better than before. If meanwhile the training loss went on
    falling, below the validation loss, it is overfitting: half of the groups that still train are
    frozen, too. Else it is underfitting: the frontier moves towards the input, to the shallowest
    frozen group whose relative gradient norm is at least the median of those that train, and
    otherwise by half of what is frozen. After a move training goes on from the best weights since
    the move before. When a move would undo that one, or nothing is left to move, it stays so.

    Attributes:
        policy: the inner policy, which says where to begin: its frozen prefix.
        metric: what is to improve; ours: `val_loss`.
        mode: "min" if smaller is better, "max" if larger is.
        patience: evaluations without improvement that count as a stall, >= 1. Ours: 2.

    References:
        The relative gradient norm as a sign of what wants to change: Lee et al. 2023, "Surgical
        Fine-Tuning Improves Adaptation to Distribution Shifts", arXiv:2210.11466. The rule is ours.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 2

    def __post_init__(self) -> None:
        check_options(self, {"patience": self.patience >= 1, "mode": self.mode in ("min", "max")})

    def needs(self) -> tuple[Need, ...]:
        """What the inner policy needs, and gradients of all groups once per epoch."""
        return *self.policy.needs(), Need(_GRADIENT, _ONE_EPOCH, frozen_too=True)

    def init(self, groups: LayerGroups) -> State:
        """Nothing seen yet."""
        return {
            "inner": self.policy.init(groups),
            "moved": None,  # frozen groups of the backbone since the last move
            "moves": [],
            "over": False,
            "best": None,
            "accuracy": None,
            "train": None,  # training loss at the last improvement
            "bad": 0,
            "why": "",
        }

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner plan, its frontier moved as far as validation asked for."""
        inner, inner_state = self.policy.decide(groups, state["inner"], event)
        state = state | {"inner": inner_state}
        names = backbone(groups)
        start = _prefix(names, inner)
        if event.kind is EventKind.EVALUATED and not state["over"]:
            state = self._judge(names, start, state, event)
        plan = inner
        if state["moved"] is not None:
            frozen = inner.frozen - frozenset(names) | frozenset(names[: state["moved"]])
            plan = replace(inner, frozen=frozen, exempt={})
        keep = "" if state["over"] else f"{self.mode} {self.metric}"
        phase = inner.phase + len(state["moves"])
        return replace(plan, phase=phase, keep_best=keep, reason=inner.reason + state["why"]), state

    def _judge(self, names: Sequence[str], start: int, state: State, event: Event) -> State:
        value, metrics = metric(event, self.metric), event.metrics
        train = metrics.get("train_loss", math.nan)
        better = improved(value, state["best"], self.mode)
        accuracy = metrics.get("val_accuracy", math.nan)
        more = improved(accuracy, state["accuracy"], "max")
        known: dict[str, Any] = {"train": train if math.isfinite(train) else None, "bad": 0}
        if better:
            known["best"] = value
        if more:
            known["accuracy"] = accuracy
        if better or more:
            return state | known
        state = state | {"bad": state["bad"] + 1}
        if state["bad"] < self.patience:
            # After a move its first training loss is what later ones are held against.
            return state if state["train"] is not None else state | {"train": known["train"]}
        return self._move(names, start, state, event, train=train)

    def _move(
        self, names: Sequence[str], start: int, state: State, event: Event, *, train: float
    ) -> State:
        now = start if state["moved"] is None else state["moved"]
        before, loss = state["train"], event.metrics.get("val_loss", math.nan)
        fell = before is not None and train < before
        if fell and not train > loss:
            move, to = "freeze", now + max(1, (len(names) - now + 1) // 2)
        else:
            move, to = "unfreeze", self._deeper(names, now, event)
        best, count = _shown(state["best"]), self.patience
        seen = f"{self.metric} not better than {best} in {count} evaluations"
        trend = f"training loss {_shown(before)}, now {train:.4g}"
        word = "overfitting" if move == "freeze" else "underfitting"
        undone = bool(state["moves"]) and state["moves"][-1] != move
        if undone or not 0 <= to <= len(names) or to == now:
            stays = "that would undo the move before" if undone else "no group is left to move"
            return state | {"over": True, "why": f"; {word}: {seen}, {trend}; {stays}: no change"}
        why = f"; {word}: {seen}, {trend}: now {to} of {len(names)} groups frozen, not {now}"
        return state | {
            "moved": to,
            "moves": [*state["moves"], move],
            "bad": 0,
            "why": why,
            "train": None,
        }

    def _deeper(self, names: Sequence[str], now: int, event: Event) -> int:
        """How many groups stay frozen when more are to train."""
        norms = finite(names, event.signals.get(_GRADIENT, {}))
        trained = [norms[name] for name in names[now:] if name in norms]
        if trained:
            least = statistics.median(trained)
            wanting = [i for i, name in enumerate(names[:now]) if norms.get(name, -1.0) >= least]
            if wanting:
                return wanting[0]
        return now // 2 if now else -1


def _prefix(names: Sequence[str], plan: FreezePlan) -> int:
    """How many groups of the backbone, from the input on, train nothing."""
    return next((i for i, n in enumerate(names) if n not in plan.frozen), len(names))


def _shown(value: float | None) -> str:
    return "any number" if value is None else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Auto(Policy):
    """Chosen from the data: begin at the depth that probes say, correct it by validation.

    Before training, one pass of the data solves the head (`fit` does: setting `head_start`) and
    fits a linear probe to every layer group. The groups before the first one that reads as well as
    any are frozen (`probe-depth`). If training stalls, underfitting unfreezes deeper and
    overfitting freezes more (`steer`). What a step costs is bounded by `time` and `memory`
    (`affordable`), what the run takes by `run_s` and `peak_bytes` (`within`), which `fit` sets from
    its budgets. The reason of each decision says what was seen.

    Attributes:
        time: most time of a step, as a share of full fine-tuning's, (0, 1]; 1: no bound.
        memory: most memory for activations, as a share of full fine-tuning's, (0, 1]; 1: no bound.
        tolerance: accuracy that a probe may be behind the best one beyond noise, [0, 1).
        patience: evaluations without improvement that count as a stall, >= 1.
        metric: what is to improve.
        mode: "min" if smaller is better, "max" if larger is.
        run_s: most seconds of the whole run, > 0; None: no limit.
        peak_bytes: most bytes that a step may have in use, > 0; None: no limit.

    References:
        `within(affordable(steer(probe-depth)))`; ours, from the sources named there. Starting from
        a solved head: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and
        Underperform Out-of-Distribution", arXiv:2202.10054.

    Example:
        >>> type(Auto(time=0.5).policy.policy).__name__
        'Affordable'
    """

    time: float = 1.0
    memory: float = 1.0
    tolerance: float = 0.0
    patience: int = 2
    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    run_s: float | None = None
    peak_bytes: float | None = None

    def __post_init__(self) -> None:
        self.policy  # noqa: B018 - raises on a bad option

    @property
    def policy(self) -> Within:
        """The policy that this one is."""
        start = ProbeDepth(tolerance=self.tolerance)
        steered = Steer(start, metric=self.metric, mode=self.mode, patience=self.patience)
        bounded = Affordable(steered, time=self.time, memory=self.memory)
        return Within(bounded, run_s=self.run_s, peak_bytes=self.peak_bytes)

    def needs(self) -> tuple[Need, ...]:
        """Probes before training, and gradients of all groups once per epoch."""
        return self.policy.needs()

    def init(self, groups: LayerGroups) -> State:
        """The state of the parts."""
        return self.policy.init(groups)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The plan of the parts."""
        return self.policy.decide(groups, state, event)
