"""Policies that use only the clock."""

from __future__ import annotations

from dataclasses import dataclass

from frostline.clock import Duration, Progress
from frostline.compose import Discriminative, Slanted, kept_plan, kept_text
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import backbone, input_end
from frostline.policies.static import Full
from frostline.policy import Event, Policy, State
from frostline.select import select

__all__ = ["Gradual", "ULMFiT", "Wav2Vec2"]

_ONE_EPOCH = Duration.parse("1ep")
_HEAD_ONLY, _HALF = Duration.parse("10000st"), Duration.parse("50%")


@dataclass(frozen=True, slots=True)
class Gradual(Policy):
    """Gradual unfreezing: the head first, then one more group from deep to shallow per interval.

    During the first interval only the head trains; after each interval `groups_per_step` deeper
    groups join, and what has been unfrozen stays so.

    Attributes:
        every: length of an interval. "1ep", as in the paper.
        groups_per_step: groups that join at each interval, >= 1; the paper's 1. Models split into
            many groups may need more to reach the stem within the run.
        until: by when everything is unfrozen; None keeps `groups_per_step`. Given, the groups are
            spread evenly over this time instead ("50%" unfreezes the stem half-way).
        live_norm: let normalisation statistics of frozen groups follow the data.

    References:
        Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
        arXiv:1801.06146, section 3.3. The paper combines it with discriminative and slanted
        triangular learning rates, which are separate knobs here.

    Example:
        >>> Gradual(every=Duration.parse("2ep")).groups_per_step
        1
    """

    every: Duration = _ONE_EPOCH
    groups_per_step: int = 1
    until: Duration | None = None
    live_norm: bool = False

    def __post_init__(self) -> None:
        if self.groups_per_step < 1 or not self.every.value:
            raise PolicyError(
                f"unfreeze {self.groups_per_step} groups every {self.every}",
                found="an interval or a number of groups that is not positive",
                fix="for example every=1ep,groups_per_step=1",
            )

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The head and the groups whose time has come train; the rest is frozen."""
        names = backbone(groups)
        joined = min(len(names), self._joined(len(names), event))
        frozen = frozenset(names[: len(names) - joined])
        plan = FreezePlan(
            frozen=frozen,
            live_norm=frozen if self.live_norm else frozenset(),
            reason=f"gradual unfreezing: head and {joined} of {len(names)} groups train",
        )
        return plan, state

    def _joined(self, count: int, event: Event) -> int:
        progress = event.progress
        if self.until is None:
            intervals = progress.step // max(1, self.every.steps(progress))
            return intervals * self.groups_per_step
        end = max(1, self.until.steps(progress))
        return count * progress.step // end


@dataclass(frozen=True, slots=True)
class ULMFiT(Policy):
    """ULMFiT: gradual unfreezing, discriminative and slanted triangular learning rates.

    The head trains first, and one more group from deep to shallow joins per interval. The rate of
    a group that is d groups away from the head is divided by `factor` d times. All rates rise
    linearly in the first `cut` of the run and fall linearly to 1/`ratio` of the highest.

    The schedule of the optimizer itself should be constant: any other one is multiplied. Each of
    the three parts can be switched off, for the ablations of the paper.

    Attributes:
        gradual: unfreeze gradually; off, everything trains from the start. On, the paper's.
        every: length of an interval. "1ep", the paper's.
        groups_per_step: groups that join at each interval, >= 1; the paper's 1.
        until: by when everything is unfrozen, spread evenly over this time; None, the paper's,
            keeps `groups_per_step`.
        factor: ratio of the rates of neighbouring groups, >= 1; 1 switches it off. 2.6, the
            paper's, for a model of four groups: take less for many.
        slanted: slanted triangular rates; off, the optimizer's own schedule. On, the paper's.
        cut: share of the run in which rates rise, in [0, 1). 0.1, the paper's.
        ratio: highest rate over the lowest, >= 1. 32, the paper's.

    References:
        Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
        arXiv:1801.06146, sections 3.2 (equation 3) and 3.3; table 7 for the ablations.

    Example:
        >>> ULMFiT(gradual=False, slanted=False).factor
        2.6
    """

    gradual: bool = True
    every: Duration = _ONE_EPOCH
    groups_per_step: int = 1
    until: Duration | None = None
    factor: float = 2.6
    slanted: bool = True
    cut: float = 0.1
    ratio: float = 32.0

    def __post_init__(self) -> None:
        self._recipe()  # its parts check their options

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The plan of the parts that are on."""
        return self._recipe().decide(groups, state, event)

    def _recipe(self) -> Policy:
        inner = Gradual(self.every, self.groups_per_step, self.until)
        policy = Discriminative(inner if self.gradual else Full(), self.factor)
        slanted = Slanted(policy, self.cut, self.ratio)
        return slanted if self.slanted else policy


@dataclass(frozen=True, slots=True)
class Wav2Vec2(Policy):
    """The wav2vec 2.0 recipe: head only at first, then all but the front end.

    For the first `head_only` updates, or the share `at_most` of a shorter run, only the head
    trains. Then everything does but the front end, which never trains.

    Attributes:
        head_only: length of the first phase. "10000st", that of most published configurations.
        at_most: cap of the first phase; None for none. "50%", ours, for runs shorter than the
            published ones: their 10,000 updates are half of the 20,000 for ten hours of speech.
        frontend: selector of the parameters that never train (the convolutions over the raw
            signal, "*feature_extractor*" in common implementations). None, ours, takes the group
            nearest the input, so that the policy fits any model.

    References:
        Baevski et al. 2020, "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech
        Representations", arXiv:2006.11477. The public implementation calls the options
        `freeze_finetune_updates` (0 for the base model on 100 and 960 hours) and
        `feature_grad_mult`. There the dropout of frozen parts stays active; here it is off.

    Example:
        >>> str(Wav2Vec2().head_only)
        '10000st'
    """

    head_only: Duration = _HEAD_ONLY
    at_most: Duration | None = _HALF
    frontend: str | None = None

    def __post_init__(self) -> None:
        if self.frontend is not None:
            select(self.frontend)

    def init(self, groups: LayerGroups) -> State:
        """Resolve the selector once; it raises here if it matches nothing."""
        return {"plan": kept_text(self._later(groups))}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The plan of the phase in force."""
        length = self._length(event.progress)
        if event.progress.step >= length:
            return kept_plan(state["plan"]), state
        reason = f"wav2vec 2.0: only the head trains before step {length}"
        return FreezePlan(frozen=groups.backbone, reason=reason), state

    def _later(self, groups: LayerGroups) -> FreezePlan:
        if self.frontend is None:
            plan = FreezePlan(frozen=frozenset(input_end(groups)))
        else:
            plan = FreezePlan.freezing(groups, self.frontend).without(groups.head)
        return plan.because("wav2vec 2.0: all but the front end trains")

    def _length(self, progress: Progress) -> int:
        length = self.head_only.steps(progress)
        if self.at_most is None or progress.total_steps is None:
            return length
        return min(length, self.at_most.steps(progress))
