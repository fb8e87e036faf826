"""What a study compares: arms, seeds, one budget, and what was declared before it started."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from frostline.errors import ConfigError
from frostline.policy import Policy
from frostline.registry import make_policy, short_form

__all__ = [
    "CONTROLS",
    "NAME_LENGTH",
    "Arm",
    "Control",
    "StudySpec",
    "arms_of",
    "controls_of",
    "shortened",
]

Control = Literal["time", "compute", "placebo"]

#: What each control of an arm is.
CONTROLS: Mapping[Control, str] = {
    "time": "full fine-tuning, its schedule compressed into the training seconds of the arm",
    "compute": "the static prefix whose backward work is nearest to the arm's",
    "placebo": "the arm's rule with the values of its signals shuffled between layer groups",
}
_FORMAT = 1
#: Most characters of the name of an arm, which is that of a folder.
NAME_LENGTH = 80
_NAME = re.compile(rf"[a-z0-9][a-z0-9.+=_@-]{{0,{NAME_LENGTH - 1}}}")
_SEED_END = 2**32


@dataclass(frozen=True, slots=True)
class Arm:
    """One strategy of a study.

    Attributes:
        name: its name in tables and folders.
        policy: short form of the policy; "" for a control that is not settled yet.
        settings: settings of its runs that differ from the study's.
        control: which control it is, or None for a strategy of interest.
        of: the arm that it controls.

    Example:
        >>> Arm("half", "first:fraction=0.5").policy
        'first:fraction=0.5'
    """

    name: str
    policy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    control: Control | None = None
    of: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name an arm {self.name!r}",
                found="no name for a folder",
                fix="lower-case letters, digits and . + = _ @ -, at most 80",
            )

    @property
    def settled(self) -> bool:
        """Whether it is known what its runs do."""
        return bool(self.policy)

    @property
    def at_size(self) -> bool:
        """Whether it is a policy at a number of training samples, and named POLICY@SIZE."""
        name, _, size = self.name.rpartition("@")
        return bool(name) and str(self.settings.get("train_samples")) == size


@dataclass(frozen=True, slots=True)
class StudySpec:
    """A study as declared.

    Attributes:
        settings: of every run, as `RunConfig` takes them, without policy, seed and output.
        arms: strategies of interest first, then their controls.
        seeds: of the runs; every arm has one run per seed.
        reference: name of the arm that the others are compared with.
        margin: how much worse in accuracy (share, [0, 1)) still counts as not worse.
        level: of the intervals, (0, 1).
        target: validation accuracy that times are taken to, (0, 1]; None: the reference's mean
            less the margin.
        added: arms that joined when others had run, and so did not take turns with them.

    Raises:
        ConfigError: no arms or seeds, a name twice, an unknown reference, numbers out of range.

    Example:
        >>> spec = StudySpec({"model": "m", "data": "d"}, (Arm("full", "full"),), (0, 1), "full")
        >>> StudySpec.from_json(spec.to_json()) == spec
        True
    """

    settings: Mapping[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    reference: str
    margin: float = 0.01
    level: float = 0.95
    target: float | None = None
    added: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names, seeds = [arm.name for arm in self.arms], self.seeds
        wrong = (
            (not names, "no arms", "policies: one at least, e.g. full"),
            (not seeds, "no seeds", "seeds: one at least, three or more for intervals"),
            (len({*names}) < len(names), "an arm twice", "a name of its own for each arm"),
            (len({*seeds}) < len(seeds), "a seed twice", "each seed once"),
            (
                not all(0 <= seed < _SEED_END for seed in seeds),
                "a seed out of range",
                "whole numbers from 0 to 2**32-1",
            ),
            (
                self.reference not in names,
                f"no arm named {self.reference!r}",
                f"a reference among {', '.join(names)}",
            ),
            (not 0 <= self.margin < 1, "a margin outside [0, 1)", "0.01 for a point of accuracy"),
            (not 0 < self.level < 1, "a level outside (0, 1)", "for example 0.95"),
            (
                self.target is not None and not 0 < self.target <= 1,
                "a target outside (0, 1]",
                "an accuracy, for example 0.9",
            ),
        )
        for bad, found, fix in wrong:
            if bad:
                raise ConfigError("declare a study", found=found, fix=fix)

    @property
    def is_curve(self) -> bool:
        """Whether its arms are the points of a learning curve."""
        return all(arm.at_size for arm in self.arms)

    def __getitem__(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def settle(self, arm: Arm) -> StudySpec:
        """The same study with a control settled."""
        arms = tuple(arm if arm.name == old.name else old for old in self.arms)
        return replace(self, arms=arms)

    def extended(
        self, other: StudySpec, *, same_reference: bool = True, begun: bool = False
    ) -> StudySpec:
        """This study with the arms and seeds that `other` has besides.

        Args:
            other: what is asked for now.
            same_reference: whether it must have the same reference; else this one's is kept.
            begun: whether runs are done, so that new arms come late.

        Raises:
            ConfigError: the two differ in more than arms and seeds.
        """
        for name in ("settings", "margin", "level", "target", "reference"):
            if name == "reference" and not same_reference:
                continue
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ConfigError(
                    f"go on with the study with {name} {_shown(mine, theirs, first=False)}",
                    found=f"a study declared with {_shown(mine, theirs, first=True)}",
                    fix="use the same, or another output folder",
                )
        here = {arm.name: arm for arm in self.arms}
        for arm in other.arms:
            if arm.name in here and (arm.control, arm.of) != (
                here[arm.name].control,
                here[arm.name].of,
            ):
                raise _renamed(arm)
            if arm.settled and arm.name in here and here[arm.name] != arm:
                raise _renamed(arm)
        new = tuple(arm for arm in other.arms if arm.name not in here)
        seeds = (*self.seeds, *(seed for seed in other.seeds if seed not in self.seeds))
        added = (*self.added, *(arm.name for arm in new if begun))
        return replace(self, arms=(*self.arms, *new), seeds=seeds, added=added)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"format": _FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudySpec:
        """The inverse of `to_json`.

        Raises:
            ConfigError: another format.
        """
        if data.get("format") != _FORMAT:
            raise ConfigError(
                "read a study",
                found=f"format {data.get('format')!r}",
                fix=f"use the version that wrote it; this one reads format {_FORMAT}",
            )
        values: dict[str, Any] = {key: value for key, value in data.items() if key != "format"}
        values |= {name: tuple(data.get(name, ())) for name in ("seeds", "added")}
        values["arms"] = tuple(Arm(**arm) for arm in data["arms"])
        return cls(**values)


def arms_of(policies: Mapping[str, Any] | Iterable[str | Policy]) -> tuple[Arm, ...]:
    """Arms from policies, named after them; a mapping names them, and may add settings.

    Args:
        policies: short forms or policies; or by name one of these, or a mapping with "policy" and
            settings of its own.

    Raises:
        PolicyError: an unknown policy or option, or a policy without a short form.
        ConfigError: no list of policies, two arms of one name, or an arm without a policy.

    Example:
        >>> [arm.name for arm in arms_of(["full", "gradual:until=50%"])]
        ['full', 'gradual-until=50']
        >>> arms_of({"slow": {"policy": "full", "lr": 1e-5}})[0].settings
        {'lr': 1e-05}
    """
    if isinstance(policies, str | Policy) or not isinstance(policies, Iterable):
        kind = type(policies).__name__
        fix = "a list such as ['full', 'linear-probe'], or a mapping of names to policies"
        raise ConfigError("compare policies", found=f"a single {kind}, no list", fix=fix)
    if isinstance(policies, Mapping):
        return tuple(_arm(str(name), what) for name, what in policies.items())
    return tuple(_arm(name, text) for name, text in _named(policies).items())


def _named(policies: Iterable[str | Policy]) -> dict[str, str]:
    """Short forms by the names they give arms."""
    found: dict[str, str] = {}
    for policy in policies:
        text = _text("", policy)
        name = _slug(text)
        if name in found:
            same = found[name] == text
            raise ConfigError(
                f"compare {text!r}",
                found="the same policy twice" if same else f"{found[name]!r}, of the same name",
                fix="each once" if same else "names for both: a mapping of names to policies",
            )
        found[name] = text
    return found


def _arm(name: str, what: Any) -> Arm:
    given = dict(what) if isinstance(what, Mapping) else {"policy": what}
    policy = _text(name, given.pop("policy", None))
    make_policy(policy)
    return Arm(name, policy, given)


def _text(name: str, policy: Any) -> str:
    if not isinstance(policy, str | Policy):
        what = repr(name) if name else "policies"
        found = "no policy" if policy is None else f"no policy, but a {type(policy).__name__}"
        raise ConfigError(f"compare {what}", found=found, fix="a short form, such as 'full'")
    return short_form(policy)


def controls_of(arms: Sequence[Arm], wanted: Sequence[str]) -> tuple[Arm, ...]:
    """The controls of these arms; those that depend on what an arm costs are not settled yet.

    Full fine-tuning needs none, a static prefix is its own in compute, and only rules with signals
    have a placebo.

    Args:
        arms: strategies of interest.
        wanted: of `CONTROLS`.

    Raises:
        ConfigError: an unknown control.

    Example:
        >>> found = controls_of(arms_of(["full", "autofreeze"]), ["time", "placebo"])
        >>> [(arm.name, arm.settled) for arm in found]
        [('time@autofreeze', False), ('placebo@autofreeze', True)]
    """
    if isinstance(wanted, str):
        fix = f"a list of {', '.join(CONTROLS)}"
        raise ConfigError(f"control by {wanted!r}", found="one text, no list", fix=fix)
    if unknown := [name for name in wanted if name not in CONTROLS]:
        raise ConfigError(
            f"control by {unknown[0]!r}", found="no such control", fix=", ".join(CONTROLS)
        )
    found = []
    for kind in CONTROLS:
        for arm in arms if kind in wanted else ():
            name = shortened(f"{kind}@{arm.name}")
            policy = make_policy(arm.policy)
            if kind == "placebo" and policy.needs():
                shuffled = f"placebo:policy=({arm.policy})"
                found.append(Arm(name, shuffled, arm.settings, kind, arm.name))
            elif kind != "placebo" and arm.policy != "full":
                static = kind == "compute" and arm.policy.partition(":")[0] in _STATIC_PREFIXES
                if not static:
                    found.append(Arm(name, "", arm.settings, kind, arm.name))
    return tuple(found)


_STATIC_PREFIXES = ("first", "linear-probe")


def _slug(text: str) -> str:
    """A name for a folder from a short form; equal texts have equal names."""
    plain = re.sub(r"[^a-z0-9.+=_@]+", "-", text.lower()).strip("-.")
    return shortened(plain) or "arm"


def shortened(name: str, most: int = NAME_LENGTH) -> str:
    """A name of at most so many characters; a digest keeps apart those that are longer.

    Args:
        name: the name.
        most: characters, 10 or more.

    Example:
        >>> shortened("full"), shortened("first-of-all-groups", 14)
        ('full', 'first-a46ff996')
    """
    if len(name) <= most:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: most - 9].rstrip('-.')}-{digest}"


def _shown(mine: Any, theirs: Any, *, first: bool) -> str:
    """What differs, of two mappings only the values that do."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        keys = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        chosen = mine if first else theirs
        return ", ".join(f"{k}={chosen.get(k)!r}" for k in keys[:3])
    return repr(mine if first else theirs)


def _renamed(arm: Arm) -> ConfigError:
    return ConfigError(
        f"add the arm {arm.name!r}",
        found="an arm of that name that does something else",
        fix="give it another name: {name: policy}",
    )
