"""A policy that reads nothing but the pretrained weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from frostline.compose import kept_plan, kept_text
from frostline.errors import PolicyError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo, enclosing
from frostline.plan import FreezePlan
from frostline.policies.static import training
from frostline.policy import Event, Policy, State
from frostline.signals import Need

__all__ = ["Spectrum", "module_type"]


@dataclass(frozen=True, slots=True)
class Spectrum(Policy):
    """Spectrum: train the weight matrices with the clearest spectra of each type, throughout.

    The score of a matrix is the sum of its singular values above the noise edge over the sum of
    those below, divided by the largest; the edge is IQR / 1.349 * (1 + sqrt(beta)), with beta the
    smaller of its two sizes over the larger. Among the matrices of one type (`module_type`), the
    `share` with the highest scores trains, rounded down, and so does the head. All else is frozen:
    other matrices, biases, norms and embeddings. No data is read.

    Attributes:
        share: share of the matrices of a type that train, in [0, 1]. 0.25, the smaller of the two
            that the paper reports; the public implementation takes 0.5 unless told otherwise.
        embeddings: train the embeddings, too, as the public implementation always does. Off, ours:
            they lie at the input, so that the gradient would have to pass through the whole model.

    References:
        Hartford et al. 2024, "Spectrum: Targeted Training on Signal to Noise Ratio",
        arXiv:2406.06623. The edge follows Marchenko and Pastur in form only: it lacks their factor
        sqrt(n), so the score ranks matrices of like shape and means little by itself.

    Example:
        >>> Spectrum(share=0.5).needs()[0].signal
        'spectral_snr'
    """

    share: float = 0.25
    embeddings: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise PolicyError(
                f"train a share of {self.share} of the matrices",
                found="a number outside [0, 1]",
                fix="for example share=0.25",
            )

    def needs(self) -> tuple[Need, ...]:
        """The score of every parameter, read once."""
        return (Need("spectral_snr", None, per="parameter"),)

    def notice(self) -> str:
        """That the spectra are dear."""
        return (
            "spectrum takes the singular values of every weight matrix before the first step: this "
            "shows in short runs."
        )

    def init(self, groups: LayerGroups) -> State:
        """No plan yet: it comes with the scores."""
        return {"plan": None}

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        """The plan made of the scores at the first question, always."""
        if state["plan"] is None:
            plan = self._plan(groups, event.signals["spectral_snr"])
            return plan, {"plan": kept_text(plan)}
        return kept_plan(state["plan"]), state

    def _plan(self, groups: LayerGroups, scores: Mapping[str, float]) -> FreezePlan:
        body = [p for g in groups if g.name not in groups.head for p in g.parameters]
        homes = {p.name: g for g in groups for p in g.parameters}
        types: dict[str, list[TensorInfo]] = {}
        for p in body:
            if p.kind == "weight" and len(p.shape) > 1 and p.name in scores:
                types.setdefault(_type_of(p, homes[p.name]), []).append(p)
        share = Fraction(str(self.share))
        best: list[str] = []
        for alike in types.values():
            # Equal scores: the deeper one, whose training is cheaper.
            ranked = sorted(enumerate(alike), key=lambda e: (scores[e[1].name], e[0]), reverse=True)
            best += [p.name for _, p in ranked[: math.floor(len(alike) * share)]]
        tables = [p.name for p in body if p.kind == "embedding" and self.embeddings]
        count = sum(map(len, types.values()))
        reason = f"Spectrum: {len(best)} of {count} matrices of {len(types)} types train"
        return training(groups, [*best, *tables], reason=reason)


def _type_of(parameter: TensorInfo, group: LayerGroup) -> str:
    """The type of a matrix; in the flat models of Keras, whose names number the blocks, by group.

    There "conv2_block1_2_conv/kernel" in the group "conv2_block1" is a "_2_conv/kernel"; where the
    name is that of the group, the class of the layer stands for it.
    """
    if "/" not in parameter.name:
        return module_type(parameter.name)
    rest = parameter.name.removeprefix(group.name)
    kinds = {m.name: m.type for m in group.modules}
    home = next(enclosing(parameter.name))
    return f"{kinds.get(home, '')}{rest}" if home == group.name else rest


def module_type(parameter: str) -> str:
    """What kind of matrix a parameter is: its name without numbers.

    Indices are dropped, and so are digits at the end of the names of enclosing modules. The name
    of the module itself keeps them, unless nothing encloses it: "fc1" and "fc2" do other work.

    Example:
        >>> module_type("encoder.layer.11.attention.self.query.weight")
        'encoder.layer.attention.self.query.weight'
        >>> module_type("layer3.0.conv2.weight"), module_type("layer3.weight")
        ('layer.conv2.weight', 'layer.weight')
    """
    names = [part for part in parameter.split(".") if not part.isdigit()]
    path, leaf = names[:-1], names[-1:]
    outer, own = path[:-1], path[-1:]
    plain = [part.rstrip("0123456789") or part for part in (outer or own)]
    return ".".join([*plain, *(own if outer else ()), *leaf])
