"""Policies that never change their plan."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from frostline.compose import kept_plan, kept_text
from frostline.errors import PolicyError, few
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policies.common import NORM_SHIFTS, backbone, input_end
from frostline.policy import Event, Policy, State
from frostline.select import select

__all__ = [
    "AllButNorm",
    "BitFit",
    "First",
    "Freeze",
    "FreezeEmbeddings",
    "Full",
    "Last",
    "LinearProbe",
    "TrainOnly",
    "training",
]


def training(
    groups: LayerGroups, names: Iterable[str], *, live_norm: bool = False, reason: str = ""
) -> FreezePlan:
    """Train these parameters and the head, and nothing else.

    Groups that train in part keep their dropout active; in wholly frozen ones it is off.

    Args:
        groups: the groups.
        names: names of parameters.
        live_norm: let normalisation statistics of groups that do not train whole follow the data.
        reason: of the plan.

    Example:
        >>> from frostline.testing import example_groups
        >>> plan = training(example_groups(3), {"block1.bias"})
        >>> sorted(plan.frozen), sorted(plan.live_dropout)
        (['block0', 'block1'], ['block1'])
    """
    wanted = frozenset(names)
    body = [g for g in groups if g.name not in groups.head]
    # A group without parameters trains nothing: frozen, it is no end of the frozen prefix.
    frozen = frozenset(g.name for g in body if not (g.parameters and g.parameter_names <= wanted))
    exempt = {name: groups[name].parameter_names & wanted for name in frozen}
    return FreezePlan(
        frozen=frozen,
        exempt=exempt,
        live_norm=frozen if live_norm else frozenset(),
        live_dropout=frozenset(name for name, kept in exempt.items() if kept),
        reason=reason,
    )


@dataclass(frozen=True, slots=True)
class _Fixed(Policy):
    """A policy whose plan depends on the groups alone."""

    @abc.abstractmethod
    def plan(self, groups: LayerGroups) -> FreezePlan:
        """The plan. Pure."""

    def init(self, groups: LayerGroups) -> State:
        """Make the plan once; what the groups cannot serve raises here."""
        return {"plan": kept_text(self.plan(groups))}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """That plan, always."""
        del groups, event
        return kept_plan(state["plan"]), state


@dataclass(frozen=True, slots=True)
class Full(Policy):
    """Full fine-tuning: nothing is frozen. The baseline of every comparison.

    Example:
        >>> Full()
        Full()
    """

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The empty plan, always."""
        del groups, event
        return _NOTHING, state


@dataclass(frozen=True, slots=True)
class Freeze(_Fixed):
    """Freeze what a selector picks, from start to end.

    Attributes:
        select: selector of the parameters to freeze (see `frostline.select`).
        live_norm: let normalisation statistics of frozen groups follow the data. Off: the
            statistics are part of what the backbone learned, and the cached outputs of a frozen
            region need them still.

    Example:
        >>> Freeze("first 60%")
        Freeze(select='first 60%', live_norm=False)
    """

    select: str
    live_norm: bool = False

    def __post_init__(self) -> None:
        select(self.select)

    def plan(self, groups: LayerGroups) -> FreezePlan:
        """What the selector picks is frozen; raises if it matches nothing."""
        return FreezePlan.freezing(
            groups,
            self.select,
            live_norm=self.live_norm,
            reason=f"frozen throughout: {self.select}",
        )


@dataclass(frozen=True, slots=True)
class LinearProbe(Policy):
    """Linear probing: the backbone is frozen throughout and only the head trains.

    Attributes:
        live_norm: let normalisation statistics of the backbone follow the data. Off by default,
            as in feature extraction, where the backbone is a fixed function.

    References:
        Alain & Bengio 2016, "Understanding intermediate layers using linear classifier probes",
        arXiv:1610.01644, for linear classifiers on frozen features.

    Example:
        >>> LinearProbe()
        LinearProbe(live_norm=False)
    """

    live_norm: bool = False

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """Everything but the head frozen, always."""
        del event
        body = groups.backbone
        plan = FreezePlan(
            frozen=body,
            live_norm=body if self.live_norm else frozenset(),
            reason="linear probing: only the head trains",
        )
        return plan, state


Unit = Literal["groups", "parameters", "forward"]


@dataclass(frozen=True, slots=True)
class _Ends(_Fixed):
    """Freeze groups from one end of the backbone."""

    groups: int | None = None
    fraction: float | None = None
    of: Unit = "groups"
    live_norm: bool = False

    def __post_init__(self) -> None:
        if (self.groups is None) == (self.fraction is None):
            raise PolicyError(
                "freeze an end of the backbone",
                found="neither groups= nor fraction=" if self.groups is None else "both",
                fix="exactly one, for example groups=3 or fraction=0.5",
            )
        if self.groups is not None and (self.groups < 0 or self.of != "groups"):
            raise PolicyError(
                f"freeze {self.groups} groups of {self.of!r}",
                found="a negative number, or a number of groups together with of=",
                fix="groups=3, or fraction=0.5,of=parameters",
            )
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise PolicyError(
                f"freeze a fraction of {self.fraction}",
                found="a number outside [0, 1]",
                fix="for example fraction=0.5",
            )

    def _frozen(self, groups: LayerGroups, ordered: Sequence[str], end: str) -> FreezePlan:
        if self.groups is None:
            count = _within([_weight(groups[n], self.of) for n in ordered], self.fraction or 0.0)
        elif (count := self.groups) > len(ordered):
            raise PolicyError(
                f"freeze the {end} {count} groups of the backbone",
                found=f"a backbone of {len(ordered)} groups",
                fix=f"at most groups={len(ordered)}",
            )
        frozen = frozenset(ordered[:count])
        asked = "" if self.fraction is None else f" ({self.fraction:.0%} of {self.of} asked)"
        return FreezePlan(
            frozen=frozen,
            live_norm=frozen if self.live_norm else frozenset(),
            reason=f"the {end} {count} of {len(ordered)} backbone groups are frozen{asked}",
        )


@dataclass(frozen=True, slots=True)
class First(_Ends):
    """Freeze the first groups of the backbone, from start to end.

    The n groups nearest the input are frozen; the deeper ones and the head train. With `fraction`,
    n is the largest number of groups that together hold at most that share of the backbone.

    Attributes:
        groups: how many groups, from 0 to those of the backbone. Give this or `fraction`.
        fraction: share of the backbone, in [0, 1]; rounded down to whole groups.
        of: what the share is of: "groups", "parameters" (elements), or "forward" (measured seconds
            of the forward pass). "groups" is ours: it needs no measurement.
        live_norm: let normalisation statistics of frozen groups follow the data. Off, ours: the
            frozen part stays a fixed function.

    References:
        Yosinski et al. 2014, "How transferable are features in deep neural networks?",
        arXiv:1411.1792: freezing the first n layers, by n. Lee et al. 2019, "What Would Elsa Do?",
        arXiv:1911.03090: the same for BERT and RoBERTa. Neither fixes an n for other models.

    Example:
        >>> from frostline.testing import example_groups
        >>> sorted(First(groups=2).plan(example_groups(4)).frozen)
        ['block0', 'block1']
    """

    def plan(self, groups: LayerGroups) -> FreezePlan:
        """The shallow end frozen."""
        return self._frozen(groups, backbone(groups), "first")


@dataclass(frozen=True, slots=True)
class Last(_Ends):
    """Freeze the last groups of the backbone: the shallow ones and the head train.

    The n groups nearest the head are frozen; the shallower ones and the head train. With
    `fraction`, n is the largest number of groups that together hold at most that share of the
    backbone. Nothing can be skipped: the gradient passes through the frozen groups, so only their
    weight gradients and optimizer work are saved.

    Attributes:
        groups: how many groups, from 0 to those of the backbone. Give this or `fraction`.
        fraction: share of the backbone, in [0, 1]; rounded down to whole groups.
        of: what the share is of: "groups", "parameters" (elements), or "forward" (measured seconds
            of the forward pass). "groups" is ours: it needs no measurement.
        live_norm: let normalisation statistics of frozen groups follow the data. Off, ours: the
            frozen part stays a fixed function.

    References:
        Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        arXiv:2210.11466: under shifts of the input, tuning the first block alone beats tuning all.
        The paper freezes its head, too; here the head always trains.

    Example:
        >>> from frostline.testing import example_groups
        >>> sorted(Last(groups=2).plan(example_groups(4)).frozen)
        ['block1', 'block2']
    """

    def plan(self, groups: LayerGroups) -> FreezePlan:
        """The deep end frozen."""
        return self._frozen(groups, backbone(groups)[::-1], "last")


@dataclass(frozen=True, slots=True)
class TrainOnly(_Fixed):
    """Train only what a selector picks, and the head: surgical fine-tuning.

    Attributes:
        select: selector of the parameters that train (see `frostline.select`). No default: the
            paper chooses the block by the kind of shift.
        live_norm: let normalisation statistics of frozen groups follow the data. Off: the public
            implementation of the paper keeps the model in evaluation mode.

    References:
        Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        arXiv:2210.11466: the first block for shifts of the input, middle blocks for shifts of the
        features, the last ones for shifts of the output. The paper freezes its head when another
        block is tuned; here the head always trains. The public implementation computes the
        gradients of everything; here the backward pass ends at the shallowest group that trains.

    Example:
        >>> from frostline.testing import example_groups
        >>> sorted(TrainOnly("block1").plan(example_groups(4)).frozen)
        ['block0', 'block2']
    """

    select: str
    live_norm: bool = False

    def __post_init__(self) -> None:
        select(self.select)

    def plan(self, groups: LayerGroups) -> FreezePlan:
        """What the selector picks trains; raises if it matches nothing."""
        return training(
            groups,
            select(self.select).parameters(groups),
            live_norm=self.live_norm,
            reason=f"only {self.select} and the head train",
        )


@dataclass(frozen=True, slots=True)
class AllButNorm(_Fixed):
    """Freeze everything but the parameters of normalisation layers and the head.

    Scales and shifts of all normalisation layers train; all other weights of the backbone are
    frozen. Whether the running statistics follow the data is a switch of its own.

    Attributes:
        live_norm: let running statistics follow the data, and normalise by those of the batch in
            training. Off, ours: a pretrained backbone keeps its statistics; the paper, which
            trains from random weights, has them on.

    References:
        Frankle, Schwab & Morcos 2021, "Training BatchNorm and Only BatchNorm", arXiv:2003.00152.
        The paper starts from random weights and trains the head in part of its experiments; here
        the backbone is pretrained and the head always trains.

    Example:
        >>> from frostline.testing import example_groups
        >>> sorted(AllButNorm().plan(example_groups(3)).exempt["block0"])
        ['block0.norm.weight']
    """

    live_norm: bool = False

    def plan(self, groups: LayerGroups) -> FreezePlan:
        """Norms and the head train; raises if there are no norms."""
        names = _wanted(groups, lambda p: p.kind == "norm")
        if not names:
            raise PolicyError(
                "train normalisation layers only",
                found="a backbone without normalisation parameters",
                fix="'bitfit' trains biases, 'linear-probe' the head alone",
            )
        reason = f"{len(names)} normalisation parameters and the head train"
        return training(groups, names, live_norm=self.live_norm, reason=reason)


@dataclass(frozen=True, slots=True)
class BitFit(_Fixed):
    """BitFit: only biases and the head train.

    Every additive term of the backbone trains: biases of linear and convolution layers and the
    shifts of normalisation layers. All else is frozen.

    Attributes:
        norm_shifts: whether shifts of normalisation layers are among the biases. On, the paper's:
            its bias terms include those of LayerNorm. Convolutions before a batch norm have no
            bias of their own, so that in such networks the shifts are all there is.
        live_norm: let normalisation statistics of frozen groups follow the data. Off, ours; the
            paper's models have no such statistics.

    References:
        Ben Zaken, Ravfogel & Goldberg 2022, "BitFit: Simple Parameter-efficient Fine-tuning for
        Transformer-based Masked Language-models", arXiv:2106.10199.

    Example:
        >>> from frostline.testing import example_groups
        >>> sorted(BitFit().plan(example_groups(3)).exempt["block1"])
        ['block1.bias']
    """

    norm_shifts: bool = True
    live_norm: bool = False

    def plan(self, groups: LayerGroups) -> FreezePlan:
        """Biases and the head train; raises if there are no biases."""
        names = _wanted(groups, self._is_bias)
        if not names:
            raise PolicyError(
                "train biases only",
                found="a backbone without biases",
                fix="'all-but-norm' trains normalisation layers, 'linear-probe' the head alone",
            )
        reason = f"BitFit: {len(names)} biases and the head train"
        return training(groups, names, live_norm=self.live_norm, reason=reason)

    def _is_bias(self, parameter: TensorInfo) -> bool:
        if parameter.kind == "norm":
            return self.norm_shifts and parameter.own_name in NORM_SHIFTS
        return parameter.kind == "bias"


@dataclass(frozen=True, slots=True)
class FreezeEmbeddings(_Fixed):
    """Freeze only the embeddings; everything else trains.

    Attributes:
        fallback: what to freeze in a model without embeddings: "error" stops with a message,
            "first" freezes the group nearest the input. "error" is ours; the paper, whose models
            are for pictures, calls the first layer (patches or stem) the embedding.

    References:
        Kumar et al. 2022, "How to Fine-Tune Vision Models with SGD", arXiv:2211.09359: with the
        embedding layer frozen, SGD does about as well as AdamW out of distribution.

    Example:
        >>> from frostline.testing import example_groups
        >>> sorted(FreezeEmbeddings(fallback="first").plan(example_groups(3)).frozen)
        ['block0']
    """

    fallback: Literal["error", "first"] = "error"

    def plan(self, groups: LayerGroups) -> FreezePlan:
        """Embeddings of the backbone frozen; raises if there are none and no fallback."""
        names = _wanted(groups, lambda p: p.kind == "embedding")
        if not names and self.fallback == "first" and (first := input_end(groups)):
            return FreezePlan(
                frozen=frozenset(first), reason=f"the first group, {first[-1]}, is frozen"
            )
        if not names:
            raise PolicyError(
                "freeze the embeddings",
                found="a backbone without embeddings",
                fix="fallback=first freezes the group nearest the input, "
                "the embedding of a model for pictures",
            )
        rest = _wanted(groups, lambda p: p.kind != "embedding")
        plan = training(groups, rest, reason=f"embeddings frozen throughout: {few(sorted(names))}")
        return plan.without(g.name for g in groups if not g.parameter_names & names)


_NOTHING = FreezePlan(reason="full fine-tuning: everything trains")


def _wanted(groups: LayerGroups, rule: Callable[[TensorInfo], bool]) -> frozenset[str]:
    """Names of the backbone's parameters of which the rule holds."""
    return frozenset(
        p.name for g in groups if g.name not in groups.head for p in g.parameters if rule(p)
    )


def _weight(group: LayerGroup, unit: Unit) -> float:
    if unit == "groups":
        return 1
    if unit == "parameters":
        return group.parameter_count
    if group.cost is None:
        raise PolicyError(
            "freeze a share of the forward pass",
            found=f"group {group.name!r} has no measured cost",
            fix="measure first: measure_costs(model, groups), or of=parameters",
        )
    return group.cost.forward_s


def _within(weights: Sequence[float], fraction: float) -> int:
    """How many of the first weights sum to at most a fraction of all."""
    limit = sum(weights) * fraction * (1 + 1e-9)  # sums of seconds are rounded
    total, count = 0.0, 0
    for weight in weights:
        total += weight
        if total > limit:
            break
        count += 1
    return count
