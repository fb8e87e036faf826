"""What a diagnosis says: findings, the evidence for and against them, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from frostline import _io

__all__ = [
    "MEASURED",
    "NEUTRAL",
    "Action",
    "Diagnosis",
    "Evidence",
    "Finding",
    "Gain",
    "Kind",
    "Source",
]

#: What can be found.
Kind = Literal[
    "too much frozen",
    "too little frozen",
    "learning rate too high",
    "learning rate too low",
    "stopped too early",
    "trained longer than needed",
    "head not converged",
    "wrong layer depth",
    "too little data",
    "nothing wrong",
]
#: Where a piece of evidence comes from. The last four were measured for the purpose, or leave no
#: doubt (a run that failed).
Source = Literal["curves", "settings", "failure", "reference", "probe", "learning curve"]
MEASURED = ("failure", "reference", "probe", "learning curve")
_FORMAT = 1
#: What stands against any finding before evidence is seen: odds of about one to four.
_DOUBT = 1.5
#: The most that curves and settings can say against a finding, all together.
_LEAST = -1.5
#: A piece of evidence below this weight is neutral.
NEUTRAL = 0.15


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that speaks for or against a finding.

    Attributes:
        source: where it comes from.
        says: what was seen, with its numbers.
        values: these numbers by name; units in the name, losses as shares of the chance loss.
        weight: natural logarithm of odds; above 0 for the finding, below 0 against it.

    Example:
        >>> Evidence("curves", "the loss rose by 0.3", {"rise": 0.3}, 1.2).strength
        'strongly for'
    """

    source: Source
    says: str
    values: Mapping[str, float]
    weight: float

    @property
    def strength(self) -> str:
        """The weight in words: strongly, clearly or weakly for or against, or neutral."""
        size = abs(self.weight)
        if size < NEUTRAL:
            return "neutral"
        word = "strongly" if size >= 1.2 else "clearly" if size >= 0.6 else "weakly"
        return f"{word} {'for' if self.weight > 0 else 'against'}"


@dataclass(frozen=True, slots=True)
class Action:
    """What to do next.

    Attributes:
        settings: of `RunConfig`, to be changed; empty where no setting is the answer.
        text: the same for people.

    Example:
        >>> Action({"policy": "first:groups=6"}, "policy=first:groups=6").text
        'policy=first:groups=6'
    """

    settings: Mapping[str, Any]
    text: str


@dataclass(frozen=True, slots=True)
class Gain:
    """What the action can be expected to bring.

    Attributes:
        accuracy: validation accuracy, as a share of samples; None where nothing says it.
        time_share: share of the training time saved, [0, 1); None where nothing says it.
        basis: what says it, or why nothing does.
    """

    accuracy: float | None
    time_share: float | None
    basis: str

    def sentence(self) -> str:
        """The same for people.

        Example:
            >>> Gain(0.034, None, "a run with it").sentence()
            '+3.4 points of accuracy (a run with it)'
        """
        parts = []
        if self.accuracy is not None:
            parts.append(f"{100 * self.accuracy:+.1f} points of accuracy")
        if self.time_share is not None:
            parts.append(f"{100 * self.time_share:.0f} % of the training time saved")
        return f"{' and '.join(parts) or 'not known'} ({self.basis})"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that limits the run, as far as it is shown.

    Attributes:
        kind: what.
        evidence: for and against, the weightiest first.
        missing: what would settle it, the most telling first.
        action: what to do next; None where nothing is wrong.
        gain: what that can be expected to bring; None where nothing is wrong.
    """

    kind: Kind
    evidence: tuple[Evidence, ...]
    missing: tuple[str, ...]
    action: Action | None
    gain: Gain | None

    @property
    def weight(self) -> float:
        """All evidence together, less the doubt; above 0 where it is more likely true.

        What curves and settings say against it is bounded: they are of one run, and what does not
        show in them may be there all the same.
        """
        against = [e.weight for e in self.evidence if e.weight < 0 and e.source not in MEASURED]
        rest = sum(e.weight for e in self.evidence) - sum(against)
        return rest + max(_LEAST, sum(against)) - _DOUBT

    @property
    def made(self) -> bool:
        """Whether the evidence suffices: it outweighs the doubt, and is more than one number."""
        speaking = [e for e in self.evidence if e.weight >= NEUTRAL]
        measured = any(e.source in MEASURED for e in speaking)
        return self.weight > 0 and (measured or len(speaking) > 1)

    @property
    def strength(self) -> str:
        """The weight in words: "strong", "fair" or "weak" evidence; "none" if it is not made."""
        if not self.made:
            return "none"
        return "strong" if self.weight >= 2 else "fair" if self.weight >= 0.75 else "weak"

    def sentence(self) -> str:
        """The finding, its weightiest evidence and the next action."""
        if self.kind == "nothing wrong":
            seen = "; ".join(e.says for e in self.evidence[:3])
            return f"Nothing wrong is shown: {seen}."
        seen = "; ".join(e.says for e in self.evidence if e.weight > 0)
        text = f"{self.kind.capitalize()} ({self.strength} evidence): {seen}."
        if self.action is not None and self.gain is not None:
            text += f" Next: {self.action.text}. Expected: {self.gain.sentence()}."
        return text

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        words = [asdict(e) | {"strength": e.strength} for e in self.evidence]
        derived = {"weight": self.weight, "made": self.made, "strength": self.strength}
        return asdict(self) | derived | {"evidence": words}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What limits a run, or several of one strategy.

    Attributes:
        runs: folders of the runs.
        policy: what they froze.
        val_accuracy: mean over the runs of the best epoch's; None where none was evaluated.
        findings: what is found, by weight; "nothing wrong" alone where that is so.
        considered: what is not found, with its evidence, by weight.
        notes: what was left aside, and why.
    """

    runs: tuple[str, ...]
    policy: str
    val_accuracy: float | None
    findings: tuple[Finding, ...]
    considered: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The findings in words, the weightiest first."""
        return " ".join(finding.sentence() for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        own = {
            "format": _FORMAT,
            "runs": list(self.runs),
            "policy": self.policy,
            "val_accuracy": self.val_accuracy,
            "sentence": self.sentence(),
            "notes": list(self.notes),
        }
        parts = {"findings": self.findings, "considered": self.considered}
        found = own | {name: [f.to_json() for f in part] for name, part in parts.items()}
        return _io.finite_json(found)
