"""What is frozen *now*: the state a backend makes a model equal to.

A plan states the wanted result, never a change, so that applying one is idempotent and resume,
undo and replay are the same operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from frostline.errors import PlanError
from frostline.groups import LayerGroup, LayerGroups
from frostline.select import Selector, select

__all__ = ["FreezePlan"]


@dataclass(frozen=True, slots=True)
class FreezePlan:
    """The wanted state of every layer group. Groups it does not name train normally.

    Attributes:
        frozen: names of the frozen groups.
        exempt: parameters that still train though their group is frozen, by group name
            (BitFit keeps biases, "all but norm" keeps norms).
        lr_scale: factor on the learning rate by group name, >= 0; absent means 1.
        live_norm: frozen groups whose normalisation statistics still follow the data.
        live_dropout: frozen groups whose dropout stays active.
        released: frozen groups of which the optimizer remembers nothing; they start afresh.
        phase: number of the phase of training that this plan belongs to, >= 0.
        keep_best: "min METRIC" or "max METRIC": the best weights by that metric are kept while
            the phase lasts, and when a plan of another phase follows, training goes on from them
            with a fresh optimizer. Empty: no weights are kept.
        done: nothing more is to be gained, and the run may end at its next evaluation.
        reason: one sentence on why, for people; not part of equality.

    Plans form a lattice: `a | b` freezes what either freezes, and is associative, commutative
    and idempotent.

    Example:
        >>> a, b = FreezePlan(frozen=frozenset({"stem"})), FreezePlan(frozen=frozenset({"body"}))
        >>> sorted((a | b).frozen)
        ['body', 'stem']
    """

    frozen: frozenset[str] = frozenset()
    exempt: Mapping[str, frozenset[str]] = field(default_factory=dict, hash=False)
    lr_scale: Mapping[str, float] = field(default_factory=dict, hash=False)
    live_norm: frozenset[str] = frozenset()
    live_dropout: frozenset[str] = frozenset()
    released: frozenset[str] = frozenset()
    phase: int = 0
    keep_best: str = ""
    done: bool = False
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        # Normal form: what says nothing is left out, so that equal plans compare equal.
        put = object.__setattr__
        if isinstance(self.frozen, str):  # a set of its letters otherwise
            raise PlanError(
                f"freeze {self.frozen!r}",
                found="text where a set of group names belongs",
                fix=f"frozen=frozenset({{{self.frozen!r}}}), or FreezePlan.freezing",
            )
        if not isinstance(self.phase, int) or self.phase < 0:
            raise PlanError(
                f"be in phase {self.phase!r}",
                found="no whole number of 0 or more",
                fix="phase=0 in the first phase, one more in each that follows",
            )
        put(self, "frozen", frozenset(self.frozen))
        exempt = {g: frozenset(p) for g, p in self.exempt.items() if p and g in self.frozen}
        put(self, "exempt", MappingProxyType(exempt))
        for name, scale in self.lr_scale.items():
            if not 0 <= scale < float("inf"):
                raise PlanError(
                    f"scale the learning rate of group {name!r} by {scale}",
                    found="a factor that is negative, infinite or not a number",
                    fix="a factor of 0 or more; 1 changes nothing",
                )
        scales = {g: float(s) for g, s in self.lr_scale.items() if s != 1}
        put(self, "lr_scale", MappingProxyType(scales))
        put(self, "live_norm", frozenset(self.live_norm) & self.frozen)
        put(self, "live_dropout", frozenset(self.live_dropout) & self.frozen)
        put(self, "released", frozenset(self.released) & self.frozen)
        mode, _, metric = self.keep_best.partition(" ")
        if self.keep_best and (mode not in ("min", "max") or not metric):
            raise PlanError(
                f"keep the best weights by {self.keep_best!r}",
                found="neither 'min METRIC' nor 'max METRIC'",
                fix="for example 'min val_loss'",
            )

    @classmethod
    def freezing(
        cls,
        groups: LayerGroups,
        selector: str | Selector,
        *,
        live_norm: bool = False,
        live_dropout: bool = False,
        reason: str = "",
    ) -> FreezePlan:
        """Freeze the parameters a selector matches; a group is frozen when any of its are.

        Raises:
            SelectorError: unreadable selector.
            SelectorMatchedNothing: it matches no parameter.
        """
        wanted = select(selector).parameters(groups)
        frozen = [g for g in groups if g.parameter_names & wanted]
        names = frozenset(g.name for g in frozen)
        return cls(
            frozen=names,
            exempt={g.name: g.parameter_names - wanted for g in frozen},
            live_norm=names if live_norm else frozenset(),
            live_dropout=names if live_dropout else frozenset(),
            reason=reason,
        )

    @classmethod
    def training_only(
        cls, groups: LayerGroups, selector: str | Selector, *, reason: str = ""
    ) -> FreezePlan:
        """Freeze everything but the parameters a selector matches."""
        wanted = select(selector).parameters(groups)
        return cls(
            frozen=frozenset(
                # A group without parameters has nothing to train: it must not end the prefix.
                g.name
                for g in groups
                if not (g.parameters and g.parameter_names <= wanted)
            ),
            exempt={g.name: g.parameter_names & wanted for g in groups},
            reason=reason,
        )

    def __or__(self, other: FreezePlan) -> FreezePlan:
        def both(get: Callable[[FreezePlan], frozenset[str]]) -> frozenset[str]:
            # A switch stays live only if every plan that freezes the group leaves it live.
            return frozenset(
                name
                for name in get(self) | get(other)
                if all(name in get(p) for p in (self, other) if name in p.frozen)
            )

        def exempt(name: str) -> frozenset[str]:
            kept = [p.exempt.get(name, frozenset()) for p in (self, other) if name in p.frozen]
            return frozenset.intersection(*kept)

        scales = dict(self.lr_scale)
        for name, scale in other.lr_scale.items():
            scales[name] = min(scale, scales.get(name, scale))
        frozen = self.frozen | other.frozen
        return FreezePlan(
            frozen=frozen,
            exempt={name: exempt(name) for name in frozen},
            lr_scale=scales,
            live_norm=both(lambda p: p.live_norm),
            live_dropout=both(lambda p: p.live_dropout),
            released=both(lambda p: p.released),
            phase=max(self.phase, other.phase),
            keep_best=max(self.keep_best, other.keep_best),
            done=self.done or other.done,
            reason="; ".join(dict.fromkeys(r for r in (self.reason, other.reason) if r)),
        )

    def without(self, names: Iterable[str]) -> FreezePlan:
        """The same plan with these groups trainable."""
        return replace(self, frozen=self.frozen - frozenset(names))

    def because(self, reason: str) -> FreezePlan:
        """The same plan with another reason."""
        return replace(self, reason=reason)

    def differs_only_in_rates(self, other: FreezePlan) -> bool:
        """Whether the other plan is the same but for `lr_scale`."""
        return (
            self.lr_scale != other.lr_scale
            and self.frozen == other.frozen
            and self == replace(other, lr_scale=self.lr_scale)
        )

    def trains(self, group: LayerGroup) -> bool:
        """Whether any parameter of the group trains."""
        return group.name not in self.frozen or bool(self.exempt.get(group.name))

    def frozen_parameters(self, groups: LayerGroups) -> frozenset[str]:
        """Names of all parameters that do not train."""
        return frozenset(
            name
            for g in groups
            if g.name in self.frozen
            for name in g.parameter_names - self.exempt.get(g.name, frozenset())
        )

    def held_tensors(self, groups: LayerGroups) -> frozenset[str]:
        """Names of all parameters and buffers that must stay bit-identical under this plan."""
        buffers = frozenset(
            buffer.name
            for g in groups
            if g.name in self.frozen
            for buffer in g.buffers
            if not (buffer.kind == "norm" and g.name in self.live_norm)
            and not (buffer.kind == "seed" and g.name in self.live_dropout)
        )
        return self.frozen_parameters(groups) | buffers

    def frontier(self, groups: LayerGroups) -> int:
        """Depth of the shallowest group that trains: everything before it is the frozen prefix.

        Equals `len(groups)` when nothing trains.
        """
        return next((g.depth for g in groups if self.trains(g)), len(groups))

    def frozen_count(self, groups: LayerGroups) -> int:
        """Elements in all parameters that do not train."""
        frozen = self.frozen_parameters(groups)
        return sum(p.count for g in groups for p in g.parameters if p.name in frozen)

    def check(self, groups: LayerGroups) -> None:
        """Raise unless the plan fits these groups and leaves something to train.

        Raises:
            PlanError: unknown group or parameter, or everything frozen.
        """
        named = self.frozen | self.lr_scale.keys()
        if unknown := sorted(named - set(groups.names)):
            raise PlanError(
                f"freeze {', '.join(unknown)}",
                found=f"groups named {', '.join(groups.names)}",
                fix="use names from layer_groups(model), or a selector",
            )
        for name, parameters in self.exempt.items():
            if unknown := sorted(parameters - groups[name].parameter_names):
                raise PlanError(
                    f"exempt {', '.join(unknown)} in group {name!r}",
                    found=f"its parameters are {', '.join(sorted(groups[name].parameter_names))}",
                    fix="exempt parameters of that group",
                )
        if groups and self.frontier(groups) == len(groups):
            raise PlanError(
                "train under a plan that freezes everything",
                found=f"all {len(groups)} groups frozen, 0 parameters left to train",
                fix=f"leave at least the head trainable: {', '.join(sorted(groups.head))}",
            )

    def summary(self, groups: LayerGroups) -> str:
        """One line for people: groups and parameters frozen, and the state of the switches."""
        count, total = self.frozen_count(groups), groups.parameter_count
        norm = "live" if self.live_norm else "held"
        if not self.frozen:
            return f"frozen 0 of {len(groups)} groups: all {total:,} parameters train"
        return (
            f"frozen {len(self.frozen)} of {len(groups)} groups, "
            f"{count:,} of {total:,} parameters ({count / max(1, total):.1%}), "
            f"norm statistics {norm}, backward stops at depth {self.frontier(groups)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, sorted, without what says nothing."""
        full = {
            "frozen": sorted(self.frozen),
            "exempt": {g: sorted(p) for g, p in sorted(self.exempt.items())},
            "lr_scale": dict(sorted(self.lr_scale.items())),
            "live_norm": sorted(self.live_norm),
            "live_dropout": sorted(self.live_dropout),
            "released": sorted(self.released),
            "phase": self.phase,
            "keep_best": self.keep_best,
            "done": self.done,
            "reason": self.reason,
        }
        return {key: value for key, value in full.items() if value or key == "frozen"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FreezePlan:
        """The inverse of `to_json`.

        Raises:
            PlanError: not the JSON of a plan.
        """
        try:
            return cls(
                frozen=frozenset(data["frozen"]),
                exempt={g: frozenset(p) for g, p in data.get("exempt", {}).items()},
                lr_scale=dict(data.get("lr_scale", {})),
                live_norm=frozenset(data.get("live_norm", ())),
                live_dropout=frozenset(data.get("live_dropout", ())),
                released=frozenset(data.get("released", ())),
                phase=data.get("phase", 0),
                keep_best=data.get("keep_best", ""),
                done=data.get("done", False),
                reason=data.get("reason", ""),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                "read a plan from JSON",
                found=f"{type(error).__name__}: {error}",
                fix="an object as FreezePlan.to_json writes it",
            ) from error
