"""Combinators: policies made of policies. A published recipe is a short function over these.

Every combinator is itself a policy: frozen configuration, JSON state, pure decisions. The state
of an inner policy is nested in the state of the outer one.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from frostline.clock import Duration, Progress
from frostline.cost import check_measured, predicted_step_s
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, EventKind, Policy, State, read_metric
from frostline.select import Selector, select
from frostline.signals import Need

__all__ = [
    "Around",
    "Bootstrap",
    "CostVeto",
    "Discriminative",
    "Every",
    "Guard",
    "KeepTrainable",
    "Live",
    "MaxFrozen",
    "Placebo",
    "PrefixOnly",
    "Slanted",
    "Then",
    "Union",
    "kept_plan",
    "kept_text",
    "scaled",
    "slanted_rate",
    "whole_run",
]

Decided = tuple[FreezePlan, State]
_ONE_EPOCH = Duration.parse("1ep")


def kept_text(plan: FreezePlan) -> str:
    """A plan as one string, for policies that keep plans in their state: see `kept_plan`."""
    return json.dumps(plan.to_json())


@functools.lru_cache(maxsize=256)
def kept_plan(text: str) -> FreezePlan:
    """The inverse of `kept_text`, at the price of a dictionary look-up when asked at every step.

    Example:
        >>> plan = FreezePlan(frozen=frozenset({"stem"}))
        >>> kept_plan(kept_text(plan)) == plan
        True
    """
    return FreezePlan.from_json(json.loads(text))


def scaled(plan: FreezePlan, factors: Mapping[str, float]) -> FreezePlan:
    """The plan with the learning rates of these groups multiplied by these factors.

    Example:
        >>> plan = FreezePlan(lr_scale={"stem": 0.5})
        >>> dict(scaled(plan, {"stem": 0.5, "head": 2.0}).lr_scale)
        {'stem': 0.25, 'head': 2.0}
    """
    rates = dict(plan.lr_scale)
    for name, factor in factors.items():
        rates[name] = rates.get(name, 1.0) * factor
    return replace(plan, lr_scale=rates)


def whole_run(progress: Progress, asked: str) -> int:
    """Steps of the whole run.

    Raises:
        PolicyError: the length is unknown.
    """
    if progress.total_steps is None:
        raise PolicyError(
            asked,
            found="a run of unknown length",
            fix="pass total_steps= to the driver",
        )
    return progress.total_steps


@dataclass(frozen=True, slots=True)
class Union(Policy):
    """Freeze what any of several policies freezes.

    Attributes:
        policies: at least one.
    """

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if not self.policies:
            raise PolicyError("unite no policies", found="an empty tuple", fix="give at least one")

    def needs(self) -> tuple[Need, ...]:
        """What any of them needs."""
        return tuple(need for p in self.policies for need in p.needs())

    def notice(self) -> str:
        """What any of them has to say."""
        return _notices(self.policies)

    def init(self, groups: LayerGroups) -> State:
        """The states of all."""
        return {"each": [p.init(groups) for p in self.policies]}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The union of all plans."""
        answers = [
            p.decide(groups, s, event) for p, s in zip(self.policies, state["each"], strict=True)
        ]
        plan = answers[0][0]
        for other, _ in answers[1:]:
            plan |= other
        return plan, {"each": [s for _, s in answers]}


@dataclass(frozen=True, slots=True)
class Then(Policy):
    """One policy until a boundary, another from there; the later clock starts at the boundary.

    Attributes:
        first: policy before the boundary.
        after: length of the first phase.
        second: policy from the boundary on; sees progress counted from there.

    Phases of the second policy count on from those of the first.
    """

    first: Policy
    after: Duration
    second: Policy

    def needs(self) -> tuple[Need, ...]:
        """What either needs, in its own phase."""
        first = (
            replace(n, until=n.until or (self.after,))
            for n in self.first.needs()
            if n.every is not None
        )
        second = (_after(self.after, n) for n in self.second.needs())
        static = (n for n in self.first.needs() if n.every is None)
        return (*static, *first, *second)

    def notice(self) -> str:
        """What either has to say."""
        return _notices((self.first, self.second))

    def init(self, groups: LayerGroups) -> State:
        """The first policy's state; the second's is made at the boundary, but checked now."""
        self.second.init(groups)
        return {"since": None, "phase": 0, "inner": self.first.init(groups)}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The plan of the phase in force."""
        since = state["since"]
        if since is None and event.progress.reached(self.after):
            # The boundary itself, not the step of the first event past it, so that the clock
            # does not depend on when the policy happens to be asked.
            since = self.after.steps(event.progress)
            state = {"since": since, "phase": state["phase"], "inner": self.second.init(groups)}
            event = replace(event, kind=EventKind.START)
        if since is None:
            plan, inner = self.first.decide(groups, state["inner"], event)
            # The end of the first policy is not the end of the run.
            plan, phase = replace(plan, done=False) if plan.done else plan, plan.phase + 1
        else:
            rebased = replace(event, progress=event.progress.since(since))
            plan, inner = self.second.decide(groups, state["inner"], rebased)
            phase = state["phase"]
            plan = replace(plan, phase=plan.phase + phase)
        return plan, {"since": since, "phase": phase, "inner": inner}


@dataclass(frozen=True, slots=True)
class Around(Policy):
    """A policy around another one."""

    policy: Policy

    def needs(self) -> tuple[Need, ...]:
        """What the inner policy needs."""
        return self.policy.needs()

    def notice(self) -> str:
        """What the inner policy has to say."""
        return self.policy.notice()

    def init(self, groups: LayerGroups) -> State:
        """The inner state."""
        return self.policy.init(groups)


@dataclass(frozen=True, slots=True)
class _Wrapper(Around):
    """A policy that changes the plan of another one and keeps no state of its own."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner plan, changed."""
        plan, state = self.policy.decide(groups, state, event)
        return self.change(groups, plan, event), state

    @abc.abstractmethod
    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The plan to use instead. Pure."""


@dataclass(frozen=True, slots=True)
class KeepTrainable(_Wrapper):
    """Whatever the inner policy freezes, what a selector picks goes on training.

    Attributes:
        policy: the inner policy.
        keep: selector of the parameters that always train.
    """

    keep: str | Selector = "head"

    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The plan with those parameters exempt."""
        kept = select(self.keep).parameters(groups)
        whole = {g.name for g in groups if g.parameter_names <= kept}
        exempt = {
            name: plan.exempt.get(name, frozenset()) | (groups[name].parameter_names & kept)
            for name in plan.frozen - whole
        }
        return replace(plan, frozen=plan.frozen - whole, exempt=exempt)


@dataclass(frozen=True, slots=True)
class Bootstrap(_Wrapper):
    """Nothing is frozen during a first stretch; the inner policy runs meanwhile, unheeded.

    Attributes:
        policy: the inner policy.
        duration: length of the stretch.
    """

    duration: Duration = _ONE_EPOCH

    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The empty plan until the stretch is over."""
        if event.progress.reached(self.duration):
            return plan
        return _with_phase_of(plan, FreezePlan(), f"nothing frozen before {self.duration}")


@dataclass(frozen=True, slots=True)
class MaxFrozen(_Wrapper):
    """At most a share of the groups is frozen; beyond it, the deepest frozen ones train.

    Attributes:
        policy: the inner policy.
        fraction: largest share of groups frozen, in [0, 1]; rounded down to whole groups.
    """

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise PolicyError(
                f"freeze at most a fraction of {self.fraction}",
                found="a number outside [0, 1]",
                fix="for example 0.75",
            )

    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The plan without its deepest groups beyond the limit."""
        ordered = [g.name for g in groups if g.name in plan.frozen]
        return plan.without(ordered[int(len(groups) * self.fraction + 1e-9) :])


@dataclass(frozen=True, slots=True)
class PrefixOnly(_Wrapper):
    """Only the unbroken run of frozen groups from the input stays frozen: what can be skipped.

    Attributes:
        policy: the inner policy.
    """

    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The frozen prefix of the plan."""
        return plan.without(groups.names[plan.frontier(groups) :])


@dataclass(frozen=True, slots=True)
class Live(_Wrapper):
    """Frozen groups keep their normalisation statistics or their dropout live.

    Attributes:
        policy: the inner policy.
        norm: statistics of every frozen group follow the data.
        dropout: dropout of every frozen group stays active.
    """

    norm: bool = True
    dropout: bool = False

    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The plan with those switches."""
        del groups, event
        norm = plan.frozen if self.norm else plan.live_norm
        dropout = plan.frozen if self.dropout else plan.live_dropout
        return replace(plan, live_norm=norm, live_dropout=dropout)


@dataclass(frozen=True, slots=True)
class Discriminative(_Wrapper):
    """Discriminative learning rates: the deeper a group, the higher its rate.

    The head keeps its rate; a group of the backbone that is d groups away from the head (1 for the
    deepest one) has its rate divided by `factor` d times.

    Attributes:
        policy: the inner policy; factors of its own are multiplied.
        factor: ratio of the rates of two neighbouring groups, >= 1; 1 changes nothing. 2.6, the
            paper's, for a model of four groups: with 40 of them the stem would stand still.

    References:
        Howard & Ruder 2018, arXiv:1801.06146, section 3.2.
    """

    factor: float = 2.6

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise PolicyError(
                f"divide learning rates by {self.factor} from group to group",
                found="a factor that is below 1, infinite or not a number",
                fix="for example 2.6; 1 changes nothing",
            )

    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The plan with the rates of the backbone divided."""
        del event
        names = [g.name for g in groups if g.name not in groups.head]
        count = len(names)
        return scaled(plan, {n: self.factor ** (i - count) for i, n in enumerate(names)})


@dataclass(frozen=True, slots=True)
class Slanted(_Wrapper):
    """Slanted triangular learning rates: a short linear rise, then a long linear fall.

    A factor on the rate of every group, so the schedule of the optimizer itself should be constant
    (`schedule=constant`): any other one is multiplied. Needs a known number of steps.

    Attributes:
        policy: the inner policy; factors of its own are multiplied.
        cut: share of the run in which the rate rises, in [0, 1). 0.1, the paper's.
        ratio: how much smaller the lowest rate is than the highest, >= 1. 32, the paper's.

    References:
        Howard & Ruder 2018, arXiv:1801.06146, section 3.2, equation 3; see `slanted_rate`.
    """

    cut: float = 0.1
    ratio: float = 32.0

    def __post_init__(self) -> None:
        if not (0 <= self.cut < 1 and 1 <= self.ratio < math.inf):
            raise PolicyError(
                f"slant learning rates with cut={self.cut} and ratio={self.ratio}",
                found="a cut outside [0, 1) or a ratio below 1",
                fix="for example cut=0.1,ratio=32",
            )

    def change(self, groups: LayerGroups, plan: FreezePlan, event: Event) -> FreezePlan:
        """The plan with every rate multiplied by the factor of this step."""
        total = whole_run(event.progress, "slant learning rates over the run")
        rate = slanted_rate(event.progress.step, total, self.cut, self.ratio)
        return scaled(plan, dict.fromkeys(groups.names, rate))


def slanted_rate(step: int, total: int, cut: float = 0.1, ratio: float = 32.0) -> float:
    """Equation 3 of Howard & Ruder 2018: the rate after `step` of `total` updates, highest is 1.

    The fall takes the `total - floor(total * cut)` steps that are left. Where `total * cut` is a
    whole number this is the paper's formula; elsewhere that one falls below `1 / ratio`, for runs
    of 19 steps even below 0.

    Example:
        >>> [slanted_rate(t, 20) for t in (0, 1, 2, 11, 20)]
        [0.03125, 0.515625, 1.0, 0.515625, 0.03125]
    """
    # Through its decimal form: 0.29 of 100 steps are 29, and the float is a little less.
    top = math.floor(total * Fraction(str(cut)))
    share = step / top if step < top else max(0.0, 1 - (step - top) / (total - top))
    return (1 + share * (ratio - 1)) / ratio


@dataclass(frozen=True, slots=True)
class Every(Around):
    """Ask the inner policy only once per interval; in between its last plan holds.

    Attributes:
        policy: the inner policy.
        interval: time between two questions, > 0. Evaluations are passed on whenever they come.
    """

    interval: Duration = _ONE_EPOCH

    def __post_init__(self) -> None:
        if not self.interval.value:
            raise PolicyError(
                f"ask every {self.interval}",
                found="an interval of no length",
                fix="for example interval=1ep",
            )

    def init(self, groups: LayerGroups) -> State:
        """The inner state, and no plan yet."""
        return {"asked": None, "plan": None, "inner": self.policy.init(groups)}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner plan when due, else the last one."""
        turn = event.progress.step // max(1, self.interval.steps(event.progress))
        if state["asked"] == turn and event.kind is not EventKind.EVALUATED:
            return kept_plan(state["plan"]), state
        plan, inner = self.policy.decide(groups, state["inner"], event)
        return plan, {"asked": turn, "plan": kept_text(plan), "inner": inner}


_NOT_WORTH_IT = "cost-veto: freezing would save less than the change of plan costs"


@dataclass(frozen=True, slots=True)
class CostVeto(Around):
    """Refuse freezing that saves less over the rest of the run than it costs to switch.

    Attributes:
        policy: the inner policy.
        switch_cost_s: seconds a change of plan costs (digests, refilling caches), >= 0.

    Needs measured group costs and a known number of steps.
    """

    switch_cost_s: float = 0.0

    def init(self, groups: LayerGroups) -> State:
        """The inner state; raises if costs were never measured."""
        check_measured(groups, "veto freezing by its cost")
        return {"plan": None, "inner": self.policy.init(groups)}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner plan, unless it freezes more and does not pay; then the plan in force."""
        wanted, inner = self.policy.decide(groups, state["inner"], event)
        now = kept_plan(state["plan"]) if state["plan"] else FreezePlan()
        if self._pays(groups, now, wanted, event):
            plan = wanted
        else:
            plan = _with_phase_of(wanted, now, now.reason or _NOT_WORTH_IT)
        return plan, {"plan": kept_text(plan), "inner": inner}

    def _pays(self, groups: LayerGroups, now: FreezePlan, wanted: FreezePlan, event: Event) -> bool:
        if wanted.frozen_parameters(groups) <= now.frozen_parameters(groups):
            return True  # unfreezing is a matter of quality, not of cost
        total = whole_run(event.progress, "weigh a freeze against its cost")
        remaining = max(0, total - event.progress.step)
        saved = predicted_step_s(groups, now) - predicted_step_s(groups, wanted)
        return saved * remaining > self.switch_cost_s


@dataclass(frozen=True, slots=True)
class Guard(Around):
    """Unfreeze everything while a validation metric is worse than its best by too much.

    Attributes:
        policy: the inner policy.
        metric: name of the metric to watch.
        mode: "min" if smaller is better, "max" if larger is.
        tolerance: how much worse than the best is still accepted, in units of the metric, >= 0.
        patience: evaluations in a row beyond the tolerance before it trips, >= 1.

    It lets go again as soon as the metric is back within the tolerance.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    tolerance: float = 0.0
    patience: int = 1

    def __post_init__(self) -> None:
        if self.patience < 1 or not 0 <= self.tolerance < math.inf:
            raise PolicyError(
                f"guard with patience={self.patience} and tolerance={self.tolerance}",
                found="patience below 1, or a tolerance that is negative or infinite",
                fix="for example patience=1,tolerance=0",
            )

    def init(self, groups: LayerGroups) -> State:
        """No best value yet."""
        return {"best": None, "bad": 0, "inner": self.policy.init(groups)}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner plan, or the empty one while tripped."""
        plan, inner = self.policy.decide(groups, state["inner"], event)
        best, bad = state["best"], state["bad"]
        if event.kind is EventKind.EVALUATED:
            value = read_metric(event.metrics, self.metric, f"guard the metric {self.metric!r}")
            best, bad = self._judge(best, bad, value)
        if bad >= self.patience:
            than = "no number" if best is None else f"worse than its best {best:.4g}"
            plan = _with_phase_of(plan, FreezePlan(), f"guard: {self.metric} {than}")
        return plan, {"best": best, "bad": bad, "inner": inner}

    def _judge(self, best: float | None, bad: int, value: float) -> tuple[float | None, int]:
        sign = 1.0 if self.mode == "min" else -1.0
        if not math.isfinite(value):  # never a best: it would not survive JSON
            return best, bad + 1
        if best is None or sign * value <= sign * best:
            return value, 0
        return best, bad + 1 if sign * (value - best) > self.tolerance else 0


@dataclass(frozen=True, slots=True)
class Placebo(Around):
    """A control: the same rule fed the same signal values, shuffled between groups.

    If a policy does no better than its placebo, its signals carried no information.

    Attributes:
        policy: the inner policy.
        seed: of the shuffles; each sample of each signal has its own permutation.
    """

    seed: int = 0

    def decide(self, groups: LayerGroups, state: State, event: Event) -> Decided:
        """The inner decision on shuffled signals."""
        shuffled = {name: self._shuffle(name, v) for name, v in event.signals.items()}
        return self.policy.decide(groups, state, replace(event, signals=shuffled))

    def _shuffle(self, name: str, values: Mapping[str, float]) -> dict[str, Any]:
        # Keyed by the values: one sample keeps one permutation, however often it is looked at.
        key = f"{self.seed}/{name}/{list(values.items())!r}".encode()
        order = list(values.values())
        random.Random(hashlib.sha256(key).digest()).shuffle(order)  # noqa: S311 - no secret
        return dict(zip(values, order, strict=True))


def _with_phase_of(plan: FreezePlan, instead: FreezePlan, reason: str) -> FreezePlan:
    """Another plan in the same phase: what a combinator freezes instead ends no phase."""
    return replace(
        instead, phase=plan.phase, keep_best=plan.keep_best, done=plan.done, reason=reason
    )


def _notices(policies: Iterable[Policy]) -> str:
    return " ".join(dict.fromkeys(text for p in policies if (text := p.notice())))


def _after(boundary: Duration, need: Need) -> Need:
    """The need on a clock that starts at the boundary; static ones are read before any."""
    if need.every is None:
        return need
    until = None if need.until is None else (boundary, *need.until)
    return replace(need, after=(boundary, *need.after), until=until)
