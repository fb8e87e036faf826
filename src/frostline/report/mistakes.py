"""What the model got wrong on the test split, from its predictions and, if asked, the data."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from frostline.errors import DataError
from frostline.report.read import ReportRun

__all__ = ["ClassResult", "Confusion", "Mistake", "Mistakes", "mistakes", "with_samples"]

_MOST_CLASSES = 40  # beyond, a confusion matrix cannot be read
_TEXT = 280
_SIDE = 96


@dataclass(frozen=True, slots=True)
class Mistake:
    """A test sample with the wrong prediction.

    Attributes:
        index: place in the test split.
        label: its class.
        predicted: what the model said.
        probability: how sure it was, in [0, 1].
        wrong_in: with how many of the strategy's seeds it was wrong.
        text: the sample, cut; None unless it is a text and was read.
        picture: data URI of a small JPEG; None unless it is a picture and was read.
    """

    index: int
    label: str
    predicted: str
    probability: float
    wrong_in: int
    text: str | None = None
    picture: str | None = None


@dataclass(frozen=True, slots=True)
class ClassResult:
    """A class of the test split: how many samples it has and how many were right."""

    label: str
    samples: int
    right: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """How many samples of one class were taken for another, or rightly for their own."""

    label: str
    predicted: str
    samples: int


@dataclass(frozen=True, slots=True)
class Mistakes:
    """What one run got wrong.

    Attributes:
        run: name of the run.
        arm: its strategy.
        seeds: runs of the strategy that saw the same test samples, this one included.
        samples: in the test split.
        right: of those, predicted rightly.
        classes: by class, the worst first.
        confusions: counts of (class, prediction), the most frequent mistakes first, those that
            were right last; only for up to 40 classes are the right ones listed.
        worst: the wrong predictions that the model was surest of.
    """

    run: str
    arm: str
    seeds: int
    samples: int
    right: int
    classes: tuple[ClassResult, ...]
    confusions: tuple[Confusion, ...]
    worst: tuple[Mistake, ...]


def mistakes(run: ReportRun, siblings: Sequence[ReportRun], *, most: int = 24) -> Mistakes | None:
    """What a run got wrong; None where it left no predictions.

    Args:
        run: the run.
        siblings: runs of the same strategy; those with the same test labels say with how many
            seeds a sample was wrong.
        most: of the surest mistakes to list.
    """
    if not run.predictions:
        return None
    names = dict(enumerate(run.labels))

    def name(number: int) -> str:
        return names.get(number, f"class {number}")

    same = [s for s in siblings if _labels(s) == _labels(run)] or [run]
    wrong_in = Counter(
        index for s in same for index, label, found, _ in s.predictions if label != found
    )
    pairs = Counter((label, found) for _, label, found, _ in run.predictions)
    totals = Counter(label for _, label, _, _ in run.predictions)
    ordered = sorted(totals, key=lambda c: (pairs[c, c] / totals[c], -totals[c], c))
    shown = sorted(pairs.items(), key=lambda item: (item[0][0] == item[0][1], -item[1], item[0]))
    if len(totals) > _MOST_CLASSES:
        shown = [item for item in shown if item[0][0] != item[0][1]]
    surest = sorted((row for row in run.predictions if row[1] != row[2]), key=lambda row: -row[3])
    return Mistakes(
        run=run.name,
        arm=run.arm,
        seeds=len(same),
        samples=len(run.predictions),
        right=sum(pairs[c, c] for c in totals),
        classes=tuple(ClassResult(name(c), totals[c], pairs[c, c]) for c in ordered),
        confusions=tuple(Confusion(name(a), name(b), count) for (a, b), count in shown),
        worst=tuple(
            Mistake(index, name(label), name(found), p, wrong_in[index])
            for index, label, found, p in surest[:most]
        ),
    )


def _labels(run: ReportRun) -> list[int]:
    return [label for _, label, _, _ in run.predictions]


def with_samples(found: Mistakes, run: ReportRun) -> Mistakes:
    """The same with the samples themselves: small pictures, or the beginnings of texts.

    Reads the data of the run again, which may take as long as it did then.

    Args:
        found: mistakes of the run.
        run: the run.

    Raises:
        DataError: the data cannot be read, or is not what the run was tested on.
        MissingExtra: an optional dependency that reads it is absent.
    """
    # Only those who ask for samples pay for what reads them.
    from frostline.tasks.config import load_config  # noqa: PLC0415
    from frostline.tasks.data import read_data  # noqa: PLC0415
    from frostline.tasks.task import content_digest  # noqa: PLC0415

    data = read_data(load_config(None, dict(run.config)))
    rows = data.splits["test"]
    recorded = run.record.header["data"]["test"]["content_sha256"]
    if list(data.targets("test")) != _labels(run) or content_digest(rows.digests) != recorded:
        raise DataError(
            f"show test samples of {run.name}",
            found=f"other data in {run.config['data']} than the run was tested on",
            fix="bring back the data of the run, or leave out --samples",
        )
    shown = {"text": _as_text, "image": _as_picture}[data.kind]
    worst = tuple(replace(m, **shown(rows.inputs[m.index])) for m in found.worst)
    return replace(found, worst=worst)


def _as_text(raw: str) -> dict[str, str]:
    text = " ".join(raw.split())
    return {"text": text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"}


def _as_picture(raw: Any) -> dict[str, str]:
    from frostline.tasks.pictures import open_picture  # noqa: PLC0415

    picture = open_picture(raw)
    picture.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    return {"picture": f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"}
