"""Policies made of phases: each says what trains, and ends by the clock or by a metric."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from frostline.clock import Duration, Progress
from frostline.compose import kept_plan, kept_text
from frostline.errors import PolicyError, few
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.phase_file import Phase, PhaseList, read_phases
from frostline.plan import FreezePlan
from frostline.policies.common import improved, metric
from frostline.policy import Event, EventKind, Policy, State
from frostline.select import Selector

__all__ = ["ChainThaw", "FineTune", "LpFt", "Phases", "Stage", "ends_its_phase"]

_ONE_EPOCH = Duration.parse("1ep")
_HALF = Duration.parse("50%")


@runtime_checkable
class Stage(Protocol):
    """A policy that knows whether it will end the phase of a plan by itself."""

    def ends_phase(self, groups: LayerGroups, plan: FreezePlan) -> bool:
        """Whether it will, by the clock or by a metric."""
        ...


def ends_its_phase(policy: Policy, groups: LayerGroups, plan: FreezePlan) -> bool:
    """Whether the policy, or one that it is made of, will end the phase of this plan.

    Who stops a run when a metric no longer improves asks this first: the policy has a better use
    for that moment.

    Example:
        >>> from frostline.testing import example_groups
        >>> ends_its_phase(LpFt(), example_groups(), FreezePlan(phase=0))
        True
    """
    if isinstance(policy, Stage):
        return policy.ends_phase(groups, plan)
    parts = [getattr(policy, name, None) for name in ("policy", "first", "second")]
    inner = [*parts, *getattr(policy, "policies", ())]
    return any(ends_its_phase(p, groups, plan) for p in inner if isinstance(p, Policy))


@dataclass(frozen=True, slots=True)
class _Phased(Policy):
    """Goes through a list of phases. When the last one has ended, the plan says `done`.

    A phase that goes back to its best weights and was evaluated ends at an evaluation: the first
    one at or after its length.
    """

    @abc.abstractmethod
    def phases(self, groups: LayerGroups) -> Sequence[Phase]:
        """The phases in order. Pure."""

    def ends_phase(self, groups: LayerGroups, plan: FreezePlan) -> bool:
        """Whether the phase of this plan has an end of its own."""
        phases = self.phases(groups)
        return plan.phase < len(phases) and phases[plan.phase].ends

    def init(self, groups: LayerGroups) -> State:
        """No phase yet; raises if some phase does not fit the groups."""
        phases = self.phases(groups)
        _plans(phases, groups, range(len(phases)))
        return {"phase": -1}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The plan of the phase in force."""
        step = event.progress.step
        if state["phase"] < 0:
            for phase in self.phases(groups):
                phase.end(0, event.progress)  # raises now if a length cannot be resolved
            state = self._enter(groups, 0, 0, event.progress, "")
        elif event.kind is EventKind.EVALUATED and not state["done"]:
            state = self._judge(groups, state | {"measured": True}, event)
        while state["end"] is not None and step >= state["end"]:
            # The boundary itself, not the step of the first event past it.
            since = state["end"]
            if state["measured"] and self.phases(groups)[state["phase"]].restore_best:
                # Its best weights are those of an evaluation: to end between two of them would
                # throw away what was learned since the last one.
                if event.kind is not EventKind.EVALUATED:
                    break
                since = step
            state = self._next(groups, state, since, event.progress, "its time is over")
        return kept_plan(state["plan"]), state

    def _judge(self, groups: LayerGroups, state: State, event: Event) -> State:
        phase = self.phases(groups)[state["phase"]]
        if phase.patience is None:
            return state
        value, best = metric(event, phase.metric), state["best"]
        if improved(value, best, phase.mode, phase.min_delta):
            return state | {"best": value, "bad": 0}
        state = state | {"bad": state["bad"] + 1}
        if state["bad"] < phase.patience:
            return state
        best = "any number" if best is None else f"{best:.4g}"
        why = f"{phase.metric} not better than {best} in {phase.patience} evaluations"
        return self._next(groups, state, event.progress.step, event.progress, why)

    def _next(
        self, groups: LayerGroups, state: State, since: int, progress: Progress, why: str
    ) -> State:
        return self._enter(groups, state["phase"] + 1, since, progress, f", the one before: {why}")

    def _enter(
        self, groups: LayerGroups, number: int, since: int, progress: Progress, why: str
    ) -> State:
        phases = self.phases(groups)
        done = number == len(phases)
        plan = _plan(phases, groups, min(number, len(phases) - 1))
        if done:
            reason = f"all {number} phases are over, the last one: {why.rpartition(': ')[2]}"
            plan = replace(plan, phase=number, keep_best="", done=True, reason=reason)
        else:
            plan = plan.because(plan.reason + why)
        return {
            "phase": number,
            "end": None if done else phases[number].end(since, progress),
            "best": None,
            "bad": 0,
            "measured": False,
            "done": done,
            "plan": kept_text(plan),
        }


def _plan(phases: Sequence[Phase], groups: LayerGroups, number: int) -> FreezePlan:
    """The plan of one phase."""
    first = next((i for i in range(number, 0, -1) if not phases[i].add), 0)
    return _plans(phases, groups, range(first, number + 1))[-1]


def _plans(
    phases: Sequence[Phase], groups: LayerGroups, numbers: Sequence[int]
) -> list[FreezePlan]:
    """The plans of phases in a row; a phase that adds builds on those before it."""
    plans: list[FreezePlan] = []
    trained, rates = frozenset[str](), dict[str, float]()
    for number in numbers:
        phase = phases[number]
        own = phase.parameters(groups)
        if phase.add and own <= trained:
            raise PolicyError(
                f"add {phase.train} in phase {number}" + (phase.place and f" ({phase.place})"),
                found="nothing that does not train already",
                fix="leave the phase out, or correct what it names",
            )
        here = {g.name: phase.rate(groups, g.depth) for g in groups if g.parameter_names & own}
        trained, rates = (trained | own, here | rates) if phase.add else (own, here)
        named = Selector(str(phase.train), _answer(trained))
        which = few([g.name for g in groups if g.parameter_names & trained])
        reason = f"phase {number + 1} of {len(phases)}: {which} train"
        plan = FreezePlan.training_only(groups, named, reason=reason)
        # Where the weights go back to the best, what the optimizer knew of others is of no use.
        released = plan.frozen if phase.restore_best else frozenset[str]()
        keep = phase.keep_best
        plans.append(replace(plan, lr_scale=rates, released=released, phase=number, keep_best=keep))
    return plans


def _answer(names: frozenset[str]) -> Callable[[LayerGroups], frozenset[str]]:
    return lambda _: names  # a function of its own, so that the turns of a loop share no name


@dataclass(frozen=True, slots=True)
class ChainThaw(_Phased):
    """Chain-thaw: the head alone, then each group alone from shallow to deep, then everything.

    A phase ends when the metric has not improved for `patience` evaluations. Training then goes
    on from the best weights of the phase with a fresh optimizer. After the last phase the run may
    end. In the phases of single groups the head is frozen, too: that is the published rule.

    It trains the model once per layer group and twice more; give the run many epochs.

    Attributes:
        patience: evaluations without improvement that end a phase, >= 1. 5, as in the authors'
            code.
        metric: what is to improve. Their `val_loss`.
        mode: "min" if smaller is better, "max" if larger is.
        min_delta: improvements must be larger than this, >= 0; their 0.
        length: longest duration of a phase, up to the next evaluation, so that a short run gets
            through all of them; None, as in their code, leaves it to the metric.
        head_lr: factor on the learning rate in the first phase, > 0. They trained the new layer at
            1e-3 and all later phases at 1e-4, a factor of 10; ours is 1, because `fit` gives the
            head ten times the rate already (`head_lr`).

    References:
        Felbo et al. 2017, "Using millions of emoji occurrences to learn any-domain representations
        for detecting sentiment, emotion and sarcasm", arXiv:1708.00524, section 3.3; code
        bfelbo/DeepMoji.

    Example:
        >>> from frostline.testing import example_groups
        >>> [str(phase.train) for phase in ChainThaw().phases(example_groups(3))]
        ['head', 'block0', 'block1', 'all']
    """

    patience: int = 5
    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0
    length: Duration | None = None
    head_lr: float = 1.0

    def __post_init__(self) -> None:
        self._phase("head", self.head_lr)  # raises on a bad option

    def phases(self, groups: LayerGroups) -> tuple[Phase, ...]:
        """Head, single groups, all."""
        # Alone, a group that never runs would leave nothing to compute a gradient of.
        body = (g for g in groups if g.name not in groups.head)
        names = [g.name for g in body if g.parameters and g.calls]
        alone = (Selector.where(_is(name), text=name) for name in names)
        return (
            self._phase("head", self.head_lr),
            *(self._phase(one, 1.0) for one in alone),
            self._phase("all", 1.0),
        )

    def _phase(self, train: str | Selector, lr: float) -> Phase:
        return Phase(
            train,
            length=self.length,
            patience=self.patience,
            metric=self.metric,
            mode=self.mode,
            min_delta=self.min_delta,
            restore_best=True,
            lr=lr,
        )


@dataclass(frozen=True, slots=True)
class LpFt(_Phased):
    """LP-FT: linear probing first, then full fine-tuning from the head that it found.

    A new head that is random pulls the features away while it learns, most of all for data unlike
    the training data; a head that fits already does not.

    Attributes:
        probe: length of linear probing. Half of the run, as the paper's equal budget for both
            stages.
        patience: evaluations without improvement that end linear probing sooner, >= 1; None, ours,
            leaves it to the clock. The rest of the run is then fine-tuning.
        metric: what is to improve.
        mode: "min" if smaller is better, "max" if larger is.
        restore_best: start the second stage from the best head, with a fresh optimizer, as two
            trainings one after the other would; it then starts at an evaluation. On; ours.
        lr: factor on the learning rate of the second stage, > 0; ours: 1. The paper tried six
            rates for each stage.

    References:
        Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution", arXiv:2202.10054.

    Example:
        >>> LpFt().probe
        Duration(value=Fraction(50, 1), unit='%')
    """

    probe: Duration = _HALF
    patience: int | None = None
    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    restore_best: bool = True
    lr: float = 1.0

    def __post_init__(self) -> None:
        self._phases()

    def phases(self, groups: LayerGroups) -> tuple[Phase, ...]:
        """Head, all."""
        del groups
        return self._phases()

    def _phases(self) -> tuple[Phase, ...]:
        first = Phase(
            "head",
            length=self.probe,
            patience=self.patience,
            metric=self.metric,
            mode=self.mode,
            restore_best=self.restore_best,
        )
        return first, Phase("all", lr=self.lr)


@dataclass(frozen=True, slots=True)
class FineTune(_Phased):
    """fastai's fine_tune: an epoch of the head, then all at half the rate, smaller when shallow.

    In the second phase the deepest group trains at `lr` times the rate and the shallowest at
    `lr / spread`, the others geometrically in between.

    fastai also restarts a one-cycle schedule in each phase (rising for 99 % of the first, for 30 %
    of the second). Schedules belong to the loop here, which has one for the whole run: `fit` warms
    up once (`warmup`) and then falls (`schedule`). Set `head_lr` to `lr` there for fastai's rates.

    Attributes:
        head: length of the first phase. "1ep", as in fastai (`freeze_epochs`).
        lr: factor on the learning rate of the second phase, > 0; fastai's 0.5.
        spread: how many times smaller the rate of the shallowest group is, > 0; fastai's 100
            (`lr_mult`).

    References:
        fastai, `Learner.fine_tune` (Apache-2.0); Howard & Gugger 2020, "fastai: A Layered API for
        Deep Learning", arXiv:2002.04688. fastai forgets the optimizer's state at the change of
        phase; here the head keeps it, and the other groups had none.

    Example:
        >>> FineTune().spread
        100.0
    """

    head: Duration = _ONE_EPOCH
    lr: float = 0.5
    spread: float = 100.0

    def __post_init__(self) -> None:
        self._phases()

    def phases(self, groups: LayerGroups) -> tuple[Phase, ...]:
        """Head, all."""
        del groups
        return self._phases()

    def _phases(self) -> tuple[Phase, ...]:
        return Phase("head", length=self.head), Phase("all", lr=self.lr, spread=self.spread)


@dataclass(frozen=True, slots=True)
class Phases(_Phased):
    """Phases of one's own from a YAML file, also from one written for finetuning-scheduler.

    Each phase says what trains, when it ends (length, until, patience), at which factor on the
    learning rate, and whether training goes on from its best weights. docs/schedules.md shows both
    forms. The content of the file is part of the policy: a run does not resume with another one.

    Attributes:
        file: path of the file, or a `PhaseList` in Python.
        metric: metric of phases that name none. "val_loss", as finetuning-scheduler has it.
        mode: direction of that metric.
        patience: evaluations without improvement that end a phase of a finetuning-scheduler file,
            which does not say it itself; that package's 3. None leaves it to
            `max_transition_epoch`.
        strip: beginning of the parameter names of such a file that is cut off, e.g. "model.".
        lr: the learning rate that the rates in such a file are relative to: the run's own.

    References:
        finetuning-scheduler (Apache-2.0) for the second form. There, "best" is over all phases so
        far; here it is over the phase that ends.

    Example:
        >>> two = PhaseList((Phase("head", length=Duration.parse("1ep")), Phase("all")))
        >>> Phases(two).phases(None)[0].train
        'head'
    """

    file: str | PhaseList
    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    patience: int | None = 3
    strip: str = ""
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise PolicyError(
                f"take rates relative to {self.lr}", found="no number above 0", fix="lr=3e-4"
            )
        if isinstance(self.file, str):
            found = read_phases(
                self.file,
                metric=self.metric,
                mode=self.mode,
                patience=self.patience,
                strip=self.strip,
                lr=self.lr,
            )
            object.__setattr__(self, "file", found)

    def phases(self, groups: LayerGroups | None) -> tuple[Phase, ...]:
        """Those of the file."""
        del groups
        return () if isinstance(self.file, str) else self.file.phases  # read by __post_init__


def _is(name: str) -> Callable[[LayerGroup, TensorInfo], bool]:
    return lambda group, _: group.name == name
