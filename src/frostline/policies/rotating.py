"""Policies that train a few groups at a time, by turns: little optimizer state is needed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from frostline.clock import Duration
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.common import backbone, check_interval, choice, often
from frostline.policy import Event, Policy, State
from frostline.signals import Need

__all__ = ["LISA", "BAdam", "HiFT"]

_LISA_TURN = Duration.parse("20st")
_BADAM_TURN = Duration.parse("50st")
_ONE_STEP = Duration.parse("1st")
_WEIGHT_NORM = "weight_norm"
#: Turns of fewer steps than this are worth a word.
_SHORT = 20

Order = Literal["descending", "ascending", "random"]
Block = TypeVar("Block")


@dataclass(frozen=True, slots=True)
class LISA(Policy):
    """Train embeddings, head and a few randomly drawn groups, drawn anew by turns (LISA).

    Every K steps `layers` groups are drawn from the backbone without its embeddings, without
    replacement; they train with the embeddings and the head until the next draw, all others are
    frozen.

    Attributes:
        every: K, the length of a turn; "20st", the public code's.
        layers: groups drawn, >= 1; 2, the paper's.
        importance: "uniform", all groups alike, the paper's and the public code's. "weight_norm",
            ours: one after the other, each with a probability proportional to the L2 norm of its
            weights at the draw among those that are left; the first turn is uniform.
        keep_embeddings: always train the groups that hold embeddings. On, the paper's; the
            gradient then runs through the whole backbone at every step, whatever was drawn. Off,
            they are drawn like any other group, and the backward pass ends at the shallowest.
        states: "keep", the public code's: the optimizer remembers every group that ever trained,
            so that its memory grows to that of full fine-tuning. "release" forgets a group when
            it freezes, which is what saves memory.
        seed: of the draws.
        live_norm: let normalisation statistics of resting groups follow the data, as they do in the
            public code, which freezes weights alone. Off, ours: they run with what they learned,
            and no statistics drift while their weights rest.

    References:
        Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
        Model Fine-Tuning", NeurIPS, arXiv:2403.17919. Public ports freeze before the optimizer is
        made, and what is frozen then never trains; here the optimizer holds all groups from the
        start.

    Example:
        >>> from frostline.testing import example_groups
        >>> groups, policy = example_groups(6), LISA(layers=1)
        >>> len(policy.drawn(groups, turn=0)), policy.drawn(groups, 7) == policy.drawn(groups, 7)
        (1, True)
    """

    every: Duration = _LISA_TURN
    layers: int = 2
    importance: Literal["uniform", "weight_norm"] = "uniform"
    keep_embeddings: bool = True
    states: Literal["keep", "release"] = "keep"
    seed: int = 0
    live_norm: bool = False

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise PolicyError(
                f"draw {self.layers} groups", found="fewer than one", fix="for example layers=2"
            )
        check_interval(self.every)

    def needs(self) -> tuple[Need, ...]:
        """The norms of weights, where draws go by them."""
        return (Need(_WEIGHT_NORM, self.every),) if self.importance == "weight_norm" else ()

    def notice(self) -> str:
        """That frequent changes are dear."""
        return _changes_are_dear("lisa", self.every)

    def init(self, groups: LayerGroups) -> State:
        """Nothing drawn yet."""
        del groups
        return {"turn": None, "drawn": []}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The groups drawn for this turn train."""
        turn = _turn(event, self.every)
        if turn != state["turn"]:
            norms = event.signals.get(_WEIGHT_NORM, {})
            state = {"turn": turn, "drawn": self.drawn(groups, turn, norms)}
        drawn, kept = state["drawn"], _embeddings(groups) if self.keep_embeddings else []
        what = "the embeddings, " if kept else ""
        why = f"lisa: {what}{', '.join(drawn) or 'nothing'} and the head train in turn {turn + 1}"
        release, live = self.states == "release", self.live_norm
        return _training(groups, [*drawn, *kept], why, release=release, live_norm=live), state

    def drawn(
        self, groups: LayerGroups, turn: int, norms: Mapping[str, float] | None = None
    ) -> list[str]:
        """The groups of a turn, from shallow to deep; a function of seed, turn and norms alone."""
        blocks = _blocks(groups, embeddings=not self.keep_embeddings)
        weights = [1.0] * len(blocks)
        if self.importance == "weight_norm" and norms:
            found = [norms.get(name, 0.0) for name in blocks]
            weights = [w if math.isfinite(w) else 0.0 for w in found]
        places = _draw(weights, self.layers, choice(self.seed, turn))
        return [name for i, name in enumerate(blocks) if i in places]


@dataclass(frozen=True, slots=True)
class BAdam(Policy):
    """Train one group of the backbone at a time, each with fresh optimizer state (BAdam).

    One group trains, with the head, for `every` steps; then the next one. The optimizer's state of
    every frozen group is released, so that it remembers one group and the head.

    Attributes:
        every: length of a turn; "50st", the public code's.
        order: "descending", from deep to shallow, the public code's; "ascending"; or "random", in
            a new order in each sweep. One group for good is `train-only`.
        embeddings: let groups that hold embeddings take turns. Off, the public code's: they are
            frozen throughout.
        seed: of the random orders.
        live_norm: let normalisation statistics of resting groups follow the data, as they do in the
            public code, which freezes weights alone. Off, ours.

    References:
        Luo, Yu & Li 2024, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large
        Language Models", NeurIPS, arXiv:2404.02827. The public code freezes the head, too, unless
        asked; here the head always trains and keeps its optimizer state.

    Example:
        >>> from frostline.testing import example_groups
        >>> [BAdam().block(example_groups(4), turn) for turn in range(4)]
        ['block2', 'block1', 'block0', 'block2']
    """

    every: Duration = _BADAM_TURN
    order: Order = "descending"
    embeddings: bool = False
    seed: int = 0
    live_norm: bool = False

    def __post_init__(self) -> None:
        check_interval(self.every)

    def notice(self) -> str:
        """That frequent changes are dear."""
        return _changes_are_dear("badam", self.every)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The group in turn trains; all others are frozen and forgotten."""
        turn = _turn(event, self.every)
        name = self.block(groups, turn)
        why = f"badam: {name or 'nothing'} and the head train in turn {turn + 1}"
        plan = _training(groups, [name], why, release=True, live_norm=self.live_norm)
        return plan, state

    def block(self, groups: LayerGroups, turn: int) -> str:
        """The group of a turn; empty where there is none."""
        blocks = _blocks(groups, embeddings=self.embeddings)
        sweep, place = divmod(turn, max(1, len(blocks)))
        return _ordered(blocks, self.order, self.seed, sweep)[place] if blocks else ""


@dataclass(frozen=True, slots=True)
class HiFT(Policy):
    """Train the next group of the backbone at every step, in sweeps (HiFT).

    `groups` neighbouring groups train, with the head, for a turn of `every`; then the next ones.
    Optimizer state is kept, so that a group goes on where it was a sweep ago.

    Attributes:
        every: length of a turn; "1st", the paper's.
        order: "ascending", from shallow to deep, "descending" or "random", one random order for
            all sweeps. The paper has all three; "ascending" by default is ours.
        groups: how many train together, >= 1; 1, the paper's.
        seed: of the random order.
        live_norm: let normalisation statistics of resting groups follow the data, as they do in the
            public code, which freezes weights alone. Off, ours.

    References:
        Liu et al. 2024, "HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy", EMNLP,
        arXiv:2401.15207. There the learning rate moves on once per sweep, so that all groups have
        the same; here it moves on at every step. Groups of a sweep then differ by what the
        schedule changes in one sweep, which is little where a run has many. There the head takes
        turns and states of resting groups move to the host; here the head always trains and
        states stay.

    Example:
        >>> from frostline.testing import example_groups
        >>> [HiFT(groups=2).block(example_groups(4), turn) for turn in range(3)]
        [['block0', 'block1'], ['block2'], ['block0', 'block1']]
    """

    every: Duration = _ONE_STEP
    order: Order = "ascending"
    groups: int = 1
    seed: int = 0
    live_norm: bool = False

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise PolicyError(
                f"train {self.groups} groups at a time",
                found="fewer than one",
                fix="for example groups=1",
            )
        check_interval(self.every)

    def notice(self) -> str:
        """That frequent changes are dear."""
        return _changes_are_dear("hift", self.every)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The groups in turn train; all others are frozen."""
        turn = _turn(event, self.every)
        names = self.block(groups, turn)
        why = f"hift: {', '.join(names) or 'nothing'} and the head train in turn {turn + 1}"
        plan = _training(groups, names, why, release=False, live_norm=self.live_norm)
        return plan, state

    def block(self, groups: LayerGroups, turn: int) -> list[str]:
        """The groups of a turn."""
        names = _blocks(groups, embeddings=True)
        blocks = [names[i : i + self.groups] for i in range(0, len(names), self.groups)]
        place = turn % max(1, len(blocks))
        return _ordered(blocks, self.order, self.seed)[place] if blocks else []


def _training(
    groups: LayerGroups, names: Sequence[str], reason: str, *, release: bool, live_norm: bool
) -> FreezePlan:
    frozen, none = groups.backbone.difference(names), frozenset[str]()
    return FreezePlan(
        frozen=frozen,
        live_norm=frozen if live_norm else none,
        released=frozen if release else none,
        reason=reason,
    )


def _turn(event: Event, every: Duration) -> int:
    return event.progress.step // max(1, every.steps(event.progress))


def _blocks(groups: LayerGroups, *, embeddings: bool) -> list[str]:
    """Groups of the backbone that can take turns."""
    left_out = [] if embeddings else _embeddings(groups)
    return [n for n in backbone(groups) if groups[n].parameters and n not in left_out]


def _embeddings(groups: LayerGroups) -> list[str]:
    return [
        name
        for name in backbone(groups)
        if any(p.kind == "embedding" for p in groups[name].parameters)
    ]


def _ordered(blocks: Sequence[Block], order: Order, seed: int, sweep: int = 0) -> list[Block]:
    ordered = list(blocks)
    if order == "descending":
        ordered.reverse()
    elif order == "random":
        choice(seed, sweep).shuffle(ordered)
    return ordered


def _draw(weights: Sequence[float], count: int, source: random.Random) -> set[int]:
    """Places drawn one after the other, by weight among those left; alike where all weigh 0."""
    left, drawn = dict(enumerate(weights)), set[int]()
    while left and len(drawn) < count:
        places = list(left)
        found = source.choices(places, list(left.values()) if any(left.values()) else None)[0]
        drawn.add(found)
        del left[found]
    return drawn


def _changes_are_dear(name: str, every: Duration) -> str:
    if every.unit != "st" or every.value >= _SHORT:
        return ""
    return (
        f"{name} changes what is frozen {often(every)}: each change takes time, and proving it "
        "more."
    )
