"""Which pretrained model to fine-tune on a data set, before any of them is trained.

Each candidate runs once over some training samples. What enters its head is scored
(`frostline.study.transferability`), a few trial steps say what fine-tuning it costs, and the
candidates are ranked by one of the scores. Validation and test samples are not looked at.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from frostline.backends.torch.backend import as_found
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.errors import ConfigError, DataError, FrostlineError, ModelError, UsageError, few
from frostline.frontier.foretell import foretell_epochs, foretell_steps
from frostline.frontier.trial import Recipe
from frostline.groups import LayerGroups
from frostline.study.transferability import (
    Probe,
    gbc,
    h_score,
    leep,
    linear_probe,
    logme,
    nce,
    shrunk_h_score,
)
from frostline.tasks import hub
from frostline.tasks.config import RunConfig, load_config
from frostline.tasks.features import Features, collect_features
from frostline.tasks.foretell import workload_of
from frostline.tasks.order import derive_seed
from frostline.tasks.resources import borrowed_process, pick_device
from frostline.tasks.setup import build_optimizer, mixed_precision
from frostline.tasks.task import Task, load_task
from frostline.tasks.weights import read_weights

__all__ = [
    "PER_MODEL",
    "RANK_BY",
    "SCORES",
    "Candidate",
    "Choice",
    "Costs",
    "Failure",
    "choose",
]

_log = logging.getLogger("frostline")

Progress = Callable[[str], None]
#: A candidate's name, or its settings with "model" among them.
Wanted = str | Mapping[str, Any]

#: What is ranked by where nothing else is said.
RANK_BY = "probe"
#: Settings that a candidate may have of its own: those that change nothing about the samples.
PER_MODEL = ("weights", "image_size", "image_mean", "image_std", "max_length", "pooling")
#: Training samples that are looked at, at most.
LIMIT = 1000
#: From this share of resamples on, a candidate counts as behind.
CLEARLY = 0.95
_DRAWS, _HALVES = 2000, 40


@dataclass(frozen=True, slots=True)
class _Material:
    """What scores are computed from: features (N, D), labels (N,), source classes (N, Z)."""

    features: NDArray[Any]
    labels: NDArray[Any]
    source: NDArray[Any] | None
    correct: NDArray[np.bool_]

    def at(self, rows: NDArray[np.intp]) -> _Material:
        """The same for some of the samples."""
        source = None if self.source is None else self.source[rows]
        return _Material(self.features[rows], self.labels[rows], source, self.correct[rows])


#: Scores by name; None where a candidate has no source classes.
SCORES: Mapping[str, Callable[[_Material], float | None]] = {
    "probe": lambda m: float(m.correct.mean()),
    "logme": lambda m: logme(m.features, m.labels),
    "h_score": lambda m: h_score(m.features, m.labels),
    "shrunk_h_score": lambda m: shrunk_h_score(m.features, m.labels),
    "gbc": lambda m: gbc(m.features, m.labels),
    "leep": lambda m: None if m.source is None else leep(m.source, m.labels),
    "nce": lambda m: None if m.source is None else nce(m.source.argmax(1), m.labels),
}


@dataclass(frozen=True, slots=True)
class Costs:
    """What fine-tuning a candidate costs, from trial steps on a batch of the data.

    "Full" is full fine-tuning, "probing" linear probing: all but the head frozen.

    Attributes:
        batch_size: samples in a step.
        load_s: seconds to prepare a sample.
        forward_s: seconds of the forward pass per sample, in evaluation mode without gradients.
        full_step_s: seconds of a step.
        probing_step_s: the same, probing.
        cached_step_s: the same, probing on stored features; None where they cannot be stored.
        full_epoch_s: seconds of an epoch: preparing samples, steps, validation.
        probing_epoch_s: the same, probing.
        cached_epoch_s: the same, probing on stored features, once they are stored.
        full_memory_bytes: weights, and the most memory in use above them; None where it cannot
            be known.
        probing_memory_bytes: the same, probing.
        checkpoint_bytes: a checkpoint of full fine-tuning, and the weights of the best epoch.
        disturbed: whether other programs had the processor, so that times are too long.
    """

    batch_size: int
    load_s: float
    forward_s: float
    full_step_s: float
    probing_step_s: float
    cached_step_s: float | None
    full_epoch_s: float
    probing_epoch_s: float
    cached_epoch_s: float | None
    full_memory_bytes: int | None
    probing_memory_bytes: int | None
    checkpoint_bytes: int
    disturbed: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model with its scores and costs.

    Attributes:
        name: as it was given, or the model with its own settings.
        model: what `frostline.fit` takes.
        settings: its own settings.
        scores: by name (`SCORES`), higher is better; None where there are no source classes.
        interval: Wilson's 95 % interval of the probe's accuracy.
        ahead: share of resamples in which the first of the ranking is ahead of this one, ties
            half; None for the first, and for one that has no such score.
        width: numbers that enter the head, per sample.
        parameters: of the model with its new head.
        weights_bytes: bytes of its parameters and buffers.
        costs: of fine-tuning; None where they were not asked for or could not be found.
        notes: what a reader should know.
        spent_s: seconds that all this took.
    """

    name: str
    model: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float | None]
    interval: tuple[float, float]
    ahead: float | None
    width: int
    parameters: int
    weights_bytes: int
    costs: Costs | None = None
    notes: tuple[str, ...] = ()
    spent_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        own = {key: str(value) for key, value in self.settings.items() if isinstance(value, Path)}
        return asdict(self) | {"settings": dict(self.settings) | own, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that could not be scored, and why."""

    name: str
    error: FrostlineError

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        error = self.error
        told = {"asked": error.asked, "found": error.found, "fix": error.fix}
        return {"name": self.name, "error": type(error).__name__, **told}


@dataclass(frozen=True, slots=True)
class Choice:
    """Candidates in the order in which they promise to fine-tune well.

    Attributes:
        data: the data set.
        by: name of the score that ranks.
        candidates: the most promising first.
        failures: models that could not be scored.
        samples: training samples that were looked at.
        train_samples: training samples there are.
        classes: number of classes.
        majority_share: share of the largest class: what knowing nothing gets right.
        spent_s: seconds that all took.
    """

    data: str
    by: str
    candidates: tuple[Candidate, ...]
    failures: tuple[Failure, ...]
    samples: int
    train_samples: int
    classes: int
    majority_share: float
    spent_s: float = 0.0

    @property
    def best(self) -> Candidate:
        """The first of the ranking."""
        return self.candidates[0]

    @property
    def sure(self) -> float | None:
        """Share of resamples in which the first is ahead of the second; None without a second."""
        return self.candidates[1].ahead if len(self.candidates) > 1 else None

    @property
    def near(self) -> tuple[Candidate, ...]:
        """Candidates that are not clearly behind the first: it leads in less than 95 %."""
        return tuple(c for c in self.candidates[1:] if c.ahead is not None and c.ahead < CLEARLY)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "data": self.data,
            "by": self.by,
            "candidates": [c.to_json() for c in self.candidates],
            "failures": [f.to_json() for f in self.failures],
            "samples": self.samples,
            "train_samples": self.train_samples,
            "classes": self.classes,
            "majority_share": self.majority_share,
            "sure": self.sure,
            "near": [c.name for c in self.near],
            "spent_s": self.spent_s,
        }


def choose(
    data: str | Path,
    models: Sequence[Wanted],
    *,
    by: str = RANK_BY,
    limit: int = LIMIT,
    costs: bool = True,
    progress: Progress | None = None,
    **settings: Any,
) -> Choice:
    """Rank pretrained models for a data set, without training any of them.

    All candidates see the same training samples, drawn with the same share of each class. How sure
    the ranking is, resampling says: for the probe a bootstrap over what it got right (it is not
    trained again), for the other scores halves of each class, which vary as a bootstrap does
    without repeating samples. It is sure of the score only: how well a score agrees with real
    fine-tuning is measured in `benchmarks/results/choose.md`.

    Args:
        data: what to learn from, as `fit` takes it.
        models: names as `fit` takes them, or mappings with "model", perhaps "name", and settings
            of that model alone: those in `PER_MODEL`.
        by: the score that ranks, a name in `SCORES`.
        limit: training samples that are looked at, at most, >= 2.
        costs: whether to run trial steps (about four full ones per candidate).
        progress: receives a line when a part of the work begins.
        **settings: any field of `RunConfig`, for all candidates.

    Raises:
        UsageError: no models, two of one name, an unknown score, or settings that cannot be.
        FrostlineError: no model could be scored; the first reason.

    Example:
        A ranking, and what is known about the first::

            from frostline.study.choose import choose

            choice = choose("photos/", ["timm:resnet18", "timm:efficientnet_lite0"])
            print(choice.best.name, choice.best.scores["probe"], choice.sure)
    """
    started = time.perf_counter()
    _check(by, limit)
    wanted, how = _asked(str(data), models, settings), _How(by, limit, costs=costs)
    found, failures = list[_Found](), list[Failure]()
    for place, asked in enumerate(wanted, 1):
        say = _numbered(progress, f"{place} of {len(wanted)}, {asked.name}")
        try:
            with borrowed_process(asked.config.threads):
                one = _examine(asked, how, say)
            if found:
                _check_same_samples(found[0], one)
            found.append(one)
        except FrostlineError as error:
            _log.info("%s cannot be scored: %s", asked.name, error.found)
            failures.append(Failure(asked.name, error))
    if not found:
        raise _none_left(failures)
    return _ranked(str(data), by, found, tuple(failures), time.perf_counter() - started)


# -- what is asked ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """A candidate as it was asked for: its name, its own settings, and all of them."""

    name: str
    settings: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True, slots=True)
class _How:
    """What is done with every candidate; see `choose`."""

    by: str
    limit: int
    costs: bool


def _check(by: str, limit: int) -> None:
    if by not in SCORES:
        raise UsageError(
            f"rank models by {by!r}",
            found="no score of that name",
            fix=f"one of {', '.join(SCORES)}",
        )
    if limit < 2:
        raise UsageError(f"score models on {limit} samples", found="too few", fix="2 or more")


def _asked(data: str, models: Sequence[Wanted], settings: Mapping[str, Any]) -> list[_Asked]:
    if not models or isinstance(models, str):
        found = "none" if not models else "one text"
        raise UsageError("choose among models", found=found, fix="a list of models as fit takes")
    listed = [_one_asked(data, model, settings) for model in models]
    names = [asked.name for asked in listed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            "choose among models",
            found=f"{few(twice)} more than once",
            fix="settings that differ, or a 'name' for each",
        )
    return listed


def _one_asked(data: str, wanted: Wanted, settings: Mapping[str, Any]) -> _Asked:
    if not isinstance(wanted, str | Mapping):
        kind = type(wanted).__name__
        fix = "a name as fit takes it, or a mapping with 'model'"
        raise UsageError("choose among models", found=f"an object of type {kind}", fix=fix)
    given = {"model": wanted} if isinstance(wanted, str) else dict(wanted)
    named, own = given.pop("name", None), {k: v for k, v in given.items() if k != "model"}
    if unknown := sorted(own.keys() - set(PER_MODEL)):
        raise ConfigError(
            f"set {unknown[0]!r} for one model",
            found="a setting that all candidates share, or none at all",
            fix=f"name, model, {', '.join(PER_MODEL)}; all others once for all",
        )
    config = load_config(None, {**settings, **given, "data": data})
    text = ",".join((config.model, *(f"{k}={_shown(v)}" for k, v in own.items())))
    return _Asked(str(named or text), own, config)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _numbered(progress: Progress | None, start: str) -> Progress:
    return lambda line: progress(f"{start}: {line}") if progress else None


# -- one candidate ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """A candidate, and what comparing it with others takes."""

    candidate: Candidate
    labels: NDArray[np.int64]
    content: Any
    draws: NDArray[np.float64] | None
    train_samples: int
    classes: int


def _examine(asked: _Asked, how: _How, say: Progress) -> _Found:
    """Score one candidate.

    Raises:
        FrostlineError: it cannot be loaded, run or scored; errors of others become ModelError.
    """
    try:
        return _examined(asked, how, say)
    except FrostlineError:
        raise
    except Exception as error:  # models of others fail in their own ways
        lines = str(error).splitlines() or [""]
        raise ModelError(
            f"score {asked.name}",
            found=f"{type(error).__name__}: {lines[0]}"[:400],
            fix="settings that suit the model, or leave it out",
        ) from error


def _examined(asked: _Asked, how: _How, say: Progress) -> _Found:
    started = time.perf_counter()
    say("data and model")
    task = load_task(asked.config)
    seed = task.config.seed
    look = _Look(task, pick_device(task.config.device))
    say(f"features of {min(how.limit, len(task.train))} training samples")
    features, values = look.features(how.limit)
    say("scores")
    probe = linear_probe(values, features.labels, seed=seed)
    source, why = source_probabilities(task, features)
    material = _Material(values, features.labels, source, probe.correct)
    scores = {score: compute(material) for score, compute in SCORES.items()}
    notes = [*_doubts(probe), *([f"no LEEP and NCE: {why}"] if source is None else [])]
    costs = None
    if how.costs:
        say("trial steps")
        costs, refused = look.costs(features.indices)
        notes += [f"no costs: {refused}"] if costs is None else []
    groups = look.groups
    candidate = Candidate(
        name=asked.name,
        model=asked.config.model,
        settings=dict(asked.settings),
        scores=scores,
        interval=probe.interval(),
        ahead=None,
        width=values.shape[1],
        parameters=groups.parameter_count,
        weights_bytes=sum(t.size_bytes for g in groups for t in (*g.parameters, *g.buffers)),
        costs=costs,
        notes=tuple(notes),
        spent_s=time.perf_counter() - started,
    )
    return _Found(
        candidate=candidate,
        labels=features.labels,
        content=task.notes.get("content_sha256", {}).get("train"),
        draws=_drawn(how.by, material, seed),
        train_samples=len(task.train),
        classes=len(task.labels),
    )


def _doubts(probe: Probe) -> Iterator[str]:
    if not probe.settled:
        yield "the probe's training was cut off before its loss settled"


def _drawn(by: str, material: _Material, seed: int) -> NDArray[np.float64] | None:
    """The score on resamples, the same ones for every candidate; None where there is no score."""
    score = SCORES[by]
    if score(material) is None:
        return None
    rng = np.random.default_rng(derive_seed(seed, "choose", 1))
    drawn = _bootstrap(rng, material.labels) if by == "probe" else _halves(rng, material.labels)
    if by == "probe":
        return np.array([material.correct[rows].mean() for rows in drawn])
    return np.array([score(material.at(rows)) for rows in drawn], dtype=np.float64)


def _bootstrap(rng: np.random.Generator, labels: NDArray[Any]) -> Iterator[NDArray[np.intp]]:
    for _ in range(_DRAWS):
        yield rng.integers(len(labels), size=len(labels))


def _halves(rng: np.random.Generator, labels: NDArray[Any]) -> Iterator[NDArray[np.intp]]:
    """Half of each class, and at least one sample of it."""
    kinds = [np.flatnonzero(labels == kind) for kind in np.unique(labels)]
    for _ in range(_HALVES):
        yield np.concatenate([rng.permutation(k)[: -(-len(k) // 2)] for k in kinds])


@dataclass(slots=True)
class _Look:
    """One candidate on its device.

    Args:
        task: data and model.
        device: where the model runs.
    """

    task: Task
    device: Any
    groups: LayerGroups = field(init=False)

    def __post_init__(self) -> None:
        model = self.task.model.to(self.device)
        self.groups = layer_groups(model, self._example([0, 1]), head=self.task.head)

    def features(self, limit: int) -> tuple[Features, NDArray[np.float32]]:
        """What is known of up to `limit` training samples, and what enters the head (N, D).

        Raises:
            ModelError: what enters the head cannot be told.
        """
        task = self.task
        # Of the groups' outputs, which are not read here, as little is kept as can be.
        found = collect_features(
            task, task.model, task.train, self.groups, device=self.device, limit=limit, max_width=1
        )
        if found.head_input is None:
            raise ModelError(
                f"score {task.config.model}",
                found=next(
                    (n for n in found.notes if n.startswith("head")), "no input of its head"
                ),
                fix="a model whose head reads one vector per sample",
            )
        return found, found.head_input

    def costs(self, places: NDArray[np.int64]) -> tuple[Costs | None, str]:
        """What fine-tuning costs, or None and why it cannot be told.

        Args:
            places: of samples in the training split, of which a batch is made.
        """
        try:
            return self._costs(places), ""
        except FrostlineError as error:
            return None, error.found

    def _costs(self, places: NDArray[np.int64]) -> Costs:
        task, model, config = self.task, self.task.model, self.task.config
        size = min(config.batch_size, len(places))
        # From all over the split: data sets are often sorted by class.
        picked = places[np.linspace(0, len(places) - 1, size).round().astype(int)].tolist()
        started = time.perf_counter()
        batch = self._example(picked)
        load_s = (time.perf_counter() - started) / size
        recipe = Recipe(
            optimizer=lambda model, groups: build_optimizer(config, model, groups),
            forward=mixed_precision(config, self.device)[0],
            clip_norm=config.clip_norm,
            fixed=as_found(model),
        )
        # Both ends are tried, so costs of groups matter to no figure: two samples are enough.
        groups = measure_costs(model, self.groups, self._example(picked[:2]), repeats=1)
        steps = foretell_steps(model, groups, batch, recipe, anchors=2, times=2)
        epochs = foretell_epochs(steps, workload_of(task, load_s, load_s))
        full, probing = epochs[0], epochs[-1]
        return Costs(
            batch_size=size,
            load_s=load_s,
            forward_s=full.step.eval_s / size,
            full_step_s=full.step.step_s,
            probing_step_s=probing.step.step_s,
            cached_step_s=probing.step.cached_step_s,
            full_epoch_s=full.epoch_s,
            probing_epoch_s=probing.epoch_s,
            cached_epoch_s=probing.cached_epoch_s,
            full_memory_bytes=full.step.peak_memory_bytes,
            probing_memory_bytes=probing.step.peak_memory_bytes,
            checkpoint_bytes=full.step.saved_bytes,
            disturbed=steps.disturbed,
        )

    def _example(self, places: Sequence[int]) -> Example:
        """Training samples as a batch on the device."""
        train = self.task.train
        samples = [train[i, None] for i in places if i < len(train)]
        inputs = self.task.collate(samples).to(self.device).inputs
        return Example(args=inputs) if isinstance(inputs, tuple) else Example(kwargs=inputs)


# -- source classes ---------------------------------------------------------------------------


def source_probabilities(task: Task, features: Features) -> tuple[NDArray[np.float64] | None, str]:
    """What the pretrained head, which the new one replaced, says of each sample.

    The softmax of x W' + b, with x what enters the head, and W and b from the file of the weights.
    It is known where the new head is one linear layer and nothing else.

    Args:
        task: data and model.
        features: of the samples, with what enters the head (N, D).

    Returns:
        Probabilities (N, Z) of the Z source classes, or None and why there are none.
    """
    x, layer = features.head_input, features.head_layer
    if x is None or layer is None:
        return None, "the head is not one linear layer"
    if task.spec.get("pooling") == "mean":
        return None, "mean pooling takes the place of the architecture's own classifier"
    try:
        file, why = _weights_file(task)
        tensors = {} if file is None else read_weights(file)
    except ModelError as error:
        return None, error.found
    if file is None:
        return None, why
    weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
    if weight is None:
        return None, "the weights hold no classifier"
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        return None, f"a classifier of shape {tuple(weight.shape)} for {x.shape[1]} features"
    scores = x.astype(np.float64) @ weight.double().numpy().T
    return softmax(scores if bias is None else scores + bias.double().numpy(), axis=1), ""


def _weights_file(task: Task) -> tuple[Path | None, str]:
    """The safetensors file of the pretrained weights, or None and why there is none.

    Raises:
        ModelError: it should be on the hub and cannot be had.
    """
    config = task.config
    if config.weights == "random":
        return None, "random weights"
    if isinstance(config.weights, Path):
        return config.weights, ""
    source, _, name = config.model.partition(":")
    if source == "timm":
        settings: Any = getattr(task.model, "pretrained_cfg", {})
        return hub.download(settings["hf_hub_id"], "model.safetensors"), ""
    if source == "hf":
        local = Path(name) / "model.safetensors"
        return (local if local.is_file() else hub.download(name, "model.safetensors")), ""
    return None, "weights without a file that can be read here (a setting: weights)"


# -- all of them ------------------------------------------------------------------------------


def _check_same_samples(first: _Found, one: _Found) -> None:
    same = first.content == one.content and np.array_equal(first.labels, one.labels)
    if not same:
        raise DataError(
            f"compare {one.candidate.name} with {first.candidate.name}",
            found="other training samples",
            fix="data that is the same whenever it is read",
        )


def _none_left(failures: Sequence[Failure]) -> FrostlineError:
    """The one reason why nothing works, or the first with the names of all."""
    first = failures[0].error
    if all((type(f.error), f.error.args) == (type(first), first.args) for f in failures):
        return first
    told = "; ".join(f"{f.name}: {f.error.found}" for f in failures)
    error = ModelError(f"score any of {len(failures)} models", found=told, fix=first.fix)
    error.__cause__ = first
    return error


def _ranked(
    data: str, by: str, found: Sequence[_Found], failures: tuple[Failure, ...], spent_s: float
) -> Choice:
    def place(one: _Found) -> tuple[bool, float, int]:
        score = one.candidate.scores[by]
        return score is None, -(score or 0.0), one.candidate.parameters

    first, *others = sorted(found, key=place)
    if first.draws is None:
        raise UsageError(
            f"rank models by {by}",
            found="no candidate with source classes",
            fix="another score, such as probe",
        )
    behind = [replace(one.candidate, ahead=_ahead(first.draws, one.draws)) for one in others]
    return Choice(
        data=data,
        by=by,
        candidates=(first.candidate, *behind),
        failures=failures,
        samples=len(first.labels),
        train_samples=first.train_samples,
        classes=first.classes,
        majority_share=float(np.unique(first.labels, return_counts=True)[1].max())
        / len(first.labels),
        spent_s=spent_s,
    )


def _ahead(first: NDArray[np.float64], other: NDArray[np.float64] | None) -> float | None:
    """Share of resamples in which the first has the higher score, ties half."""
    if other is None:
        return None
    return float(np.mean(first > other) + 0.5 * np.mean(first == other))
