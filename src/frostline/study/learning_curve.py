"""Accuracy by number of training samples: when does freezing stop helping?

Every policy is run on nested, stratified subsets of the training data, with several seeds; seeds
draw other subsets. All runs make the same number of updates, that of the largest size: with equal
epochs a sixteenth of the data would train a sixteenth as long, and a policy that needs many updates
would look as if it needed many samples. Passes over a small subset are many instead, and after
each of them the run is evaluated, so its best epoch is chosen among more of them: that flatters
small sizes by a little, and all policies alike.

Curves of this kind are reviewed by Viering and Loog 2023, "The Shape of Learning Curves: A Review",
IEEE TPAMI 45(6), arXiv:2103.10948. No curve is fitted here: few sizes and seeds do not tell which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from frostline import _io
from frostline.clock import Duration
from frostline.errors import ConfigError, DataError, UsageError, few
from frostline.records import read_run
from frostline.registry import make_policy
from frostline.study.compare import declare, default_folder
from frostline.study.folder import StudyFolder, TrialKey
from frostline.study.runner import OnEvent, open_study, run_study
from frostline.study.spec import NAME_LENGTH, StudySpec, arms_of, shortened
from frostline.study.statistics import Paired, paired
from frostline.tasks.allowance import Budget
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.data import read_data

__all__ = [
    "SIZES",
    "LearningCurve",
    "Order",
    "SizePoint",
    "learning_curve",
    "read_curve",
    "resolve_sizes",
    "rising",
    "run_curve",
]

#: Shares of the training data where no sizes are given.
SIZES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
Metric = Literal["val", "test"]
#: How the order of two policies depends on the size.
Change = Literal["changes", "changes by the means", "never changes", "unclear"]
#: The sizes around it, and the size interpolated.
_Crossing = tuple[tuple[int, int], float]
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SizePoint:
    """One policy on one number of training samples.

    Attributes:
        size: training samples.
        scores: accuracy by seed, in [0, 1]; runs that failed or are not finished are absent.
        low: lower end of the interval of the mean over seeds, in [0, 1]; None for one seed, or
            where all are equal.
        high: upper end.
        absent: runs without a score, as "seed n: why".
    """

    size: int
    scores: Mapping[int, float]
    low: float | None
    high: float | None
    absent: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Mean accuracy over seeds; None without any."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else None


@dataclass(frozen=True, slots=True)
class Order:
    """Which of two policies is better, by number of training samples.

    Attributes:
        first: name of a policy.
        second: name of the other one.
        differences: by size, accuracy of the first less that of the second, paired by seed.
        ahead: by size, the policy that is shown to be ahead, "" for none. What is shown at all
            sizes holds together, at the level of the curve (Holm).
        change: "changes": each is shown ahead at some size, the one below and the other above;
            "changes by the means": once, but not shown on both sides; "never changes"; "unclear":
            the means change sides more than once, and not within what one change was shown.
        between: the sizes between which the order changes, or None where it does not.
        at: samples at which the means cross, interpolated on a logarithmic scale, or None.
        sentence: all of it for people.

    References:
        Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal
        of Statistics 6(2).
    """

    first: str
    second: str
    differences: Mapping[int, Paired]
    ahead: Mapping[int, str]
    change: Change
    between: tuple[int, int] | None
    at: float | None
    sentence: str


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Accuracy of policies by number of training samples.

    Attributes:
        policies: short form of each policy, by its name in the study; at least one.
        points: by name, from the smallest size to the largest; at least one.
        metric: "val" or "test": which accuracy the scores are.
        eval_samples: samples that the scores are accuracies on; None where seeds differ in it.
        level: of intervals and orders, in (0, 1).
        notes: what the reader should know; a sentence each.

    Example:
        >>> def points(*scores):
        ...     return tuple(
        ...         _point(size, {0: s, 1: s + 0.01, 2: s - 0.02}, level=0.95)
        ...         for size, s in zip((50, 100, 200), scores)
        ...     )
        >>> curve = LearningCurve(
        ...     {"full": "full", "linear-probe": "linear-probe"},
        ...     {"full": points(0.4, 0.6, 0.9), "linear-probe": points(0.6, 0.65, 0.7)},
        ...     "val", 200, 0.95,
        ... )
        >>> curve.order("full", "linear-probe").between
        (100, 200)
    """

    policies: Mapping[str, str]
    points: Mapping[str, tuple[SizePoint, ...]]
    metric: Metric
    eval_samples: int | None
    level: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> tuple[SizePoint, ...]:
        """The points of a policy, by its name or its short form.

        Raises:
            UsageError: no such policy.
        """
        names = [n for n, policy in self.policies.items() if name in (n, policy)]
        if not names:
            raise UsageError(
                f"read the learning curve of {name!r}",
                found=f"curves of {few(list(self.policies))}",
                fix="the name of one of them",
            )
        return self.points[names[0]]

    def order(self, first: str, second: str) -> Order:
        """Which of two policies is better at which size, and where that changes.

        Raises:
            UsageError: an unknown policy.
            DataError: no size that both have runs of with a common seed.
        """
        one, two = ({p.size: p.scores for p in self[name]} for name in (first, second))
        differences = {
            size: paired(scores, two[size], level=self.level)
            for size, scores in one.items()
            if scores.keys() & two.get(size, {}).keys()
        }
        if not differences:
            raise DataError(
                f"order {first} and {second} by size",
                found="no size at which both were run with the same seed",
                fix="run both with the same sizes and seeds",
            )
        return _order(first, second, differences, self.level)

    def orders(self) -> tuple[Order, ...]:
        """All pairs of policies that have runs of a common size and seed, in the order given."""
        return tuple(
            self.order(a, b) for a, b in combinations(self.policies, 2) if self._common(a, b)
        )

    def _common(self, first: str, second: str) -> bool:
        two = {p.size: p.scores.keys() for p in self[second]}
        return any(p.scores.keys() & two.get(p.size, set()) for p in self[first])

    def rise(self, name: str) -> Paired | None:
        """Accuracy that the last doubling of the data brought, paired by seed.

        Curves flatten, so the next doubling can be expected to bring no more than this. Between
        sizes that are not a factor of two apart the difference is divided by its doublings.

        Returns:
            None where the two largest sizes have no seed in common.

        Raises:
            UsageError: an unknown policy.
        """
        points = [p for p in self[name] if p.scores]
        if len(points) < 2 or not points[-1].scores.keys() & points[-2].scores.keys():
            return None
        doublings = math.log2(points[-1].size / points[-2].size)
        more, less = (
            {seed: score / doublings for seed, score in p.scores.items()}
            for p in (points[-1], points[-2])
        )
        return paired(more, less, level=self.level)

    def sentence(self) -> str:
        """What the curves say of the order of the policies, a sentence per pair."""
        if len(self.policies) == 1:
            return rising(next(iter(self.policies)), self)
        return " ".join(order.sentence for order in self.orders())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the orders of all pairs are in it for the reader, and not read back."""
        orders = [asdict(order) for order in self.orders()]
        return {"format": _FORMAT, **asdict(self), "orders": orders}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LearningCurve:
        """The inverse of `to_json`, also after the JSON was written and read.

        Raises:
            DataError: not what `to_json` gives.
        """
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}, not {_FORMAT}")  # noqa: TRY301
            values = {f.name: data[f.name] for f in fields(cls)}
            points = {n: tuple(map(_read_point, p)) for n, p in values["points"].items()}
            policies, notes = dict(values["policies"]), tuple(values["notes"])
            if not policies or policies.keys() != points.keys():
                raise ValueError("points of other policies")  # noqa: TRY301
            return cls(**values | {"policies": policies, "points": points, "notes": notes})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                "read a learning curve",
                found=f"{type(error).__name__}: {error}",
                fix="an object as LearningCurve.to_json writes it",
            ) from error


def _read_point(data: Mapping[str, Any]) -> SizePoint:
    scores = {int(seed): float(score) for seed, score in data["scores"].items()}
    return SizePoint(
        int(data["size"]), scores, data["low"], data["high"], tuple(data.get("absent", ()))
    )


# -- running -------------------------------------------------------------------------------------


def learning_curve(
    model: str,
    data: str | Path,
    policies: Sequence[str] | Mapping[str, Any] = ("full", "linear-probe"),
    *,
    sizes: Sequence[int | float] = SIZES,
    seeds: int | Sequence[int] = 3,
    output: str | Path | None = None,
    isolate: bool = True,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> LearningCurve:
    """Fine-tune under several policies on nested subsets of the training data.

    Runs are arms POLICY@SIZE of a study. Called again with the same arguments it goes on where it
    was; with more policies, seeds or smaller sizes it does what is missing. Validation and test
    samples are the same for all sizes.

    Args:
        model: what to fine-tune, as `fit` takes it.
        data: what to learn from.
        policies: short forms; or names with a short form or a mapping of "policy" and settings.
        sizes: numbers of training samples (int), or shares of them (float, in (0, 1]); see
            `resolve_sizes`.
        seeds: how many, from 0; or which. Two at least for intervals.
        output: the study's folder; by default under "studies", named after data and model.
        isolate: give each run a process of its own.
        on_event: receives progress.
        **settings: any field of `RunConfig` but policy, seed, output and train_samples. `epochs`
            (and `budget`, in updates) are of the largest size. `patience` is, too, and off by
            default: it would stop sizes after unequal numbers of updates.

    Raises:
        ConfigError: unknown or contradictory settings, or another study in the folder.
        UsageError: sizes that cannot be.
        PolicyError: an unknown policy or option.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
        FrostlineError: what stops every run alike.

    Example:
        ::

            curve = learning_curve("timm:resnet18", "photos/", ["full", "linear-probe"], epochs=5)
            print(curve.sentence())
    """
    folder = run_curve(
        model,
        data,
        policies,
        sizes=sizes,
        seeds=seeds,
        output=output,
        isolate=isolate,
        on_event=on_event,
        **settings,
    )
    return read_curve(folder)


def run_curve(
    model: str,
    data: str | Path,
    policies: Sequence[str] | Mapping[str, Any] = ("full", "linear-probe"),
    *,
    sizes: Sequence[int | float] = SIZES,
    seeds: int | Sequence[int] = 3,
    output: str | Path | None = None,
    isolate: bool = True,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> Path:
    """The runs of `learning_curve`, which see; the study's folder, for `read_curve`."""
    shared = {"model": model, "data": str(data), "patience": None} | settings
    if "train_samples" in shared:
        raise ConfigError(
            "set train_samples for a learning curve", found="its own say", fix="sizes=[...]"
        )
    config = load_config(None, shared)
    train = read_data(config).splits["train"].labels
    counts = resolve_sizes(sizes, total=len(train), classes=len(set(train)))
    spec = _declared(config, shared, policies, counts, seeds)
    path = Path(output) if output is not None else _folder(spec)
    with open_study(path, spec) as (folder, whole):
        run_study(folder, whole, isolate=isolate, on_event=on_event)
    return path


def resolve_sizes(sizes: Sequence[int | float], *, total: int, classes: int) -> tuple[int, ...]:
    """Numbers of training samples, ascending.

    Shares that leave less than one sample of each class are left out: the same shares then do for
    large data and for fifty samples.

    Args:
        sizes: numbers (int, from one of each class to all) or shares (float, in (0, 1]).
        total: training samples, >= 2.
        classes: among them, >= 2.

    Raises:
        UsageError: a number or share out of range, or none that is left.

    Example:
        >>> resolve_sizes((1 / 16, 1 / 4, 1.0), total=50, classes=4)
        (12, 50)
        >>> resolve_sizes((20, 40), total=50, classes=4)
        (20, 40)
    """
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        fix = "a list such as [100, 400, 1.0]"
        raise UsageError(f"train on the sizes {sizes!r}", found="no list of sizes", fix=fix)
    found: set[int] = set()
    for size in sizes:
        whole = isinstance(size, int) and not isinstance(size, bool)
        if whole and classes <= size <= total:
            found.add(int(size))
        elif isinstance(size, float) and 0 < size <= 1:
            found |= {round(size * total)} if round(size * total) >= classes else set()
        else:
            raise UsageError(
                f"train on a subset of size {size!r}",
                found=f"{total} training samples of {classes} classes",
                fix=f"a number from {classes} to {total}, or a share such as 0.5 or 1.0",
            )
    if not found:
        raise UsageError(
            "draw a learning curve",
            found=f"no size with one sample of each of {classes} classes",
            fix="larger sizes",
        )
    return tuple(sorted(found))


def _declared(
    config: RunConfig,
    shared: Mapping[str, Any],
    policies: Sequence[str] | Mapping[str, Any],
    sizes: Sequence[int],
    seeds: int | Sequence[int],
) -> StudySpec:
    """The study: every policy on every size, with the updates of the largest."""
    arms: dict[str, Any] = {}
    for arm in arms_of(policies):
        own = load_config(None, {**shared, **arm.settings, "policy": arm.policy})
        for size in sizes:
            end = f"@{size}"
            name = f"{shortened(arm.name, NAME_LENGTH - len(end))}{end}"
            length = _length(own, size, sizes[-1])
            arms[name] = {"policy": arm.policy, **arm.settings, **length}
    base = {key: value for key, value in shared.items() if key not in ("epochs", "budget")}
    # The reference is there whatever sizes and policies are added.
    reference = next(name for name in arms if name.endswith(f"@{sizes[-1]}")) if arms else None
    return declare(base | {"epochs": config.epochs}, arms, seeds=seeds, reference=reference)


def _length(config: RunConfig, size: int, largest: int) -> dict[str, Any]:
    """Settings with which a run on a subset makes the updates of a run on the largest."""
    from frostline.tasks.order import Batching  # noqa: PLC0415  torch is in it

    steps, most = (
        Batching(n, config.batch_size, config.accumulate).steps_per_epoch for n in (size, largest)
    )
    updates = config.epochs * most
    if config.budget is not None:
        budget = Budget.parse(config.budget)
        if budget.unit != "st":
            raise ConfigError(
                f"draw a learning curve with the budget {config.budget}",
                found="a budget other than updates, which all sizes have in common",
                fix="budget='500st', or epochs of the largest size",
            )
        updates = min(updates, int(budget.amount))
    given: dict[str, Any] = {
        "train_samples": size,
        "epochs": math.ceil(updates / steps),
        "budget": f"{updates}st",
        "checkpoint_every": f"{most}st",
    }
    if config.patience is not None:
        given["patience"] = math.ceil(config.patience * most / steps)
    return given


def _folder(spec: StudySpec) -> Path:
    path = default_folder(spec)
    return path.with_name(f"{path.name}-curve")


# -- reading -------------------------------------------------------------------------------------


def read_curve(folder: str | Path, *, metric: Metric = "val") -> LearningCurve:
    """The learning curves of a study, from its records alone; it need not be finished.

    Args:
        folder: of a study that `learning_curve` ran.
        metric: accuracy on validation data ("val", what decisions are made by) or on test data.

    Raises:
        DataError: no study there, none of this kind, or no run of it is finished.
        DamagedFile: a record cannot be read.
        UsageError: an unknown metric.
    """
    if metric not in ("val", "test"):
        raise UsageError(
            f"read a learning curve by {metric!r}", found="no such metric", fix="'val' or 'test'"
        )
    study = StudyFolder(Path(folder))
    spec = study.spec()
    found: dict[str, list[SizePoint]] = {}
    policies: dict[str, str] = {}
    sizes: set[int] = set()
    for arm in spec.arms:
        name, _, size = arm.name.rpartition("@")
        if not arm.at_size:
            raise DataError(
                f"read a learning curve from {folder}",
                found=f"a study with the arm {arm.name!r}, which is no policy at a size",
                fix="a study that learning_curve ran",
            )
        policies[name] = arm.policy
        point, samples = _measured(study, spec, arm.name, int(size), metric)
        found.setdefault(name, []).append(point)
        sizes |= samples
    if not sizes:
        raise DataError(
            f"read a learning curve from {folder}",
            found="no finished run",
            fix="go on with it: call learning_curve with the same arguments",
        )
    return LearningCurve(
        policies=policies,
        points={n: tuple(sorted(p, key=lambda p: p.size)) for n, p in found.items()},
        metric=metric,
        eval_samples=sizes.pop() if len(sizes) == 1 else None,
        level=spec.level,
        notes=_notes(policies, found),
    )


def _measured(
    study: StudyFolder, spec: StudySpec, arm: str, size: int, metric: Metric
) -> tuple[SizePoint, set[int]]:
    """The point of an arm, and how many samples its accuracies are of."""
    scores: dict[int, float] = {}
    absent: list[str] = []
    samples: set[int] = set()
    for seed in spec.seeds:
        key = TrialKey(arm, seed)
        if study.failure(key).is_file():
            why = str(_io.load_json(study.failure(key))["why"])
            absent.append(f"seed {seed}: {' '.join(why.split())}")
        elif study.finished(key):
            record = read_run(study.run(key))
            scores[seed] = float(record.summary[f"{metric}_accuracy"])
            samples.add(int(record.header["data"][metric]["samples"]))
        else:
            absent.append(f"seed {seed}: not finished")
    return _point(size, scores, level=spec.level, absent=tuple(absent)), samples


def _point(
    size: int, scores: Mapping[int, float], *, level: float, absent: tuple[str, ...] = ()
) -> SizePoint:
    low = high = None
    if scores:
        mean = paired(scores, dict.fromkeys(scores, 0.0), level=level)
        if mean.low is not None and mean.high is not None:
            low, high = max(0.0, mean.low), min(1.0, mean.high)
    return SizePoint(size, dict(scores), low, high, absent)


def _notes(
    policies: Mapping[str, str], points: Mapping[str, Sequence[SizePoint]]
) -> tuple[str, ...]:
    notes = []
    for name, policy in policies.items():
        if _counts_epochs(policy):
            notes.append(
                f"{name} counts in epochs, which are shorter in updates on small subsets; lengths "
                "in % are the same for all sizes"
            )
    for name, of in points.items():
        notes += [f"{name} on {p.size}, {why}" for p in of for why in p.absent]
    return tuple(notes)


def _counts_epochs(policy: str) -> bool:
    """Whether an option of a policy, default or not, is a length in epochs.

    Example:
        >>> _counts_epochs("gradual:every=1ep"), _counts_epochs("gradual:every=10%")
        (True, False)
    """
    text = repr(make_policy(policy))
    return bool(re.search(rf"{Duration.__name__}\([^()]*\([^()]*\), unit='ep'\)", text))


# -- orders --------------------------------------------------------------------------------------


def _order(first: str, second: str, differences: Mapping[int, Paired], level: float) -> Order:
    means = {size: d.difference for size, d in sorted(differences.items())}
    shown = _holm({size: d.p_value for size, d in differences.items()}, level)
    ahead = {
        size: (first if mean > 0 else second) if size in shown else ""
        for size, mean in means.items()
    }
    change, between, at = _change(_crossings(means), _shown_change(ahead))
    order = Order(
        first=first,
        second=second,
        differences=dict(sorted(differences.items())),
        ahead=ahead,
        change=change,
        between=between,
        at=at,
        sentence="",
    )
    return replace(order, sentence=f"{_capital(_verdict(order))}; {_ground(order)}.")


def _change(
    crossings: Sequence[_Crossing], shown: tuple[int, int] | None
) -> tuple[Change, tuple[int, int] | None, float | None]:
    """How the order changes, between which sizes, and where the means cross.

    Args:
        crossings: of the means.
        shown: sizes around the one change that is shown, or None.
    """
    between = shown or (crossings[0][0] if len(crossings) == 1 else None)
    if between is None:
        return ("unclear" if crossings else "never changes"), None, None
    inside = [x for (a, b), x in crossings if between[0] <= a and b <= between[1]]
    if len(inside) < len(crossings):  # beyond what is shown the means change sides again
        return "unclear", None, None
    at = math.exp(sum(map(math.log, inside)) / len(inside))
    return ("changes" if shown else "changes by the means"), between, at


def _holm(p_values: Mapping[int, float | None], level: float) -> set[int]:
    """Sizes whose difference is shown, at a level at which all of them hold together.

    Example:
        >>> sorted(_holm({50: 0.01, 100: 0.03, 200: 0.04, 400: None}, 0.95))
        [50]
    """
    known = sorted((p, size) for size, p in p_values.items() if p is not None)
    shown: set[int] = set()
    for left, (p, size) in zip(range(len(p_values), 0, -1), known, strict=False):
        if p > (1 - level) / left:
            break
        shown.add(size)
    return shown


def _crossings(means: Mapping[int, float]) -> list[_Crossing]:
    """Where the means change sides: the sizes around it, and the size interpolated.

    Example:
        >>> (between, at), = _crossings({50: -0.1, 100: -0.1, 400: 0.1})
        >>> between, round(at)
        ((100, 400), 200)
    """
    some = [(size, mean) for size, mean in means.items() if mean]
    return [
        ((a, b), math.exp(math.log(a) + math.log(b / a) * p / (p - q)))
        for (a, p), (b, q) in pairwise(some)
        if (p < 0) != (q < 0)
    ]


def _shown_change(ahead: Mapping[int, str]) -> tuple[int, int] | None:
    """The sizes around the one change among those that are shown, or None."""
    shown = [(size, name) for size, name in ahead.items() if name]
    changes = [(a, b) for (a, one), (b, two) in pairwise(shown) if one != two]
    return changes[0] if len(changes) == 1 else None


def _capital(text: str) -> str:
    """The text as it begins a sentence: names of policies keep their letters."""
    return f"B{text[1:]}" if text.startswith("by the means") else text


def _verdict(order: Order) -> str:
    """How the order depends on the size."""
    first, second, sizes = order.first, order.second, list(order.differences)
    means = [d.difference for d in order.differences.values()]
    spread = f"from {sizes[0]} to {sizes[-1]} samples" if sizes[1:] else f"on {sizes[0]} samples"
    if order.between is not None:
        low, high = order.between
        rising = order.differences[high].difference > order.differences[low].difference
        small, large = (second, first) if rising else (first, second)
        by = "by the means, " if order.change == "changes by the means" else ""
        about = "" if order.at is None else f" (they cross at about {_round(order.at)})"
        return (
            f"{by}{small} is ahead of {large} up to {low} samples, and behind from {high} on{about}"
        )
    if order.change == "unclear":
        return f"by the means, the order of {first} and {second} changes more than once {spread}"
    if not any(means):
        return f"{first} and {second} are equal {spread}"
    best, worse = (first, second) if sum(means) > 0 else (second, first)
    return f"by the means, {best} is never behind {worse} {spread}"


def _ground(order: Order) -> str:
    """What of it is shown, and by how many seeds."""
    seeds = max(d.n for d in order.differences.values())
    if seeds == 1:
        return "one seed says nothing of chance"
    shown = [
        f"{name} by {100 * abs(order.differences[size].difference):.1f} points on {size}"
        for size, name in order.ahead.items()
        if name
    ]
    return f"shown with {seeds} seeds: {', '.join(shown) or 'no difference at any size'}"


def rising(name: str, curve: LearningCurve) -> str:
    """What the last doubling of the data brought a policy, in a sentence."""
    rise = curve.rise(name)
    if rise is None:
        return f"{name} was run on one size alone, which says nothing of more data."
    text = f"the last doubling of the data brought {name} {100 * rise.difference:+.1f} points"
    if rise.low is None or rise.high is None:
        return f"{text[0].upper()}{text[1:]}, with no interval."
    return f"{text[0].upper()}{text[1:]} ({100 * rise.low:+.1f} to {100 * rise.high:+.1f})."


def _round(samples: float) -> int:
    """Two figures: more would claim too much.

    Example:
        >>> _round(1234.0), _round(87.3)
        (1200, 87)
    """
    step = 10 ** max(0, math.floor(math.log10(max(1.0, samples))) - 1)
    return round(samples / step) * step
