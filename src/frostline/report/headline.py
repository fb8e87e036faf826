"""The result in words: what won, by how much, how sure that is, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frostline.report.read import Runs
from frostline.report.results import ArmResult
from frostline.text import bytes_text, percent_text, seconds_text

__all__ = ["Headline", "Tile", "featured", "headline"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at a glance.

    Attributes:
        label: what it is.
        value: the figure with its unit.
        note: what it means, or what it is compared with.
        tone: "good", "bad" or "" for neither.
    """

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Headline:
    """The result in words.

    Attributes:
        title: in one sentence.
        sentences: what it rests on, and what it does not show.
        tiles: the most important figures.
    """

    title: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]


def featured(arms: Sequence[ArmResult]) -> ArmResult:
    """The strategy that a report opens with: the chosen one, else the one that scored best.

    Ties go to the faster one, then to the first.
    """
    chosen = [arm for arm in arms if arm.chosen]
    return chosen[0] if chosen else _highest(arms)


def _highest(arms: Sequence[ArmResult]) -> ArmResult:
    return min(
        (arm for arm in arms if not arm.control),
        key=lambda arm: (-(arm.mean("val_accuracy") or 0.0), arm.mean("training_s") or 0.0),
        default=arms[0],
    )


def headline(runs: Runs, arms: Sequence[ArmResult]) -> Headline:
    """The result of these runs.

    Args:
        runs: what was read.
        arms: their results.
    """
    best = featured(arms)
    base = next((arm for arm in arms if arm.reference), None)
    if runs.learning:
        title, sentences = _of_sizes(runs)
    elif runs.comparison is not None:
        title, sentences = _of_study(runs, arms, best, base)
    elif len(arms) > 1:
        title, sentences = _of_several(arms, best)
    else:
        title, sentences = _of_one(best)
    unfinished = [run.name for arm in arms for run in arm.runs if not run.finished]
    if unfinished:
        sentences.append(f"Not finished, shown as far as they have come: {', '.join(unfinished)}.")
    sentences += [f"Failed: {name}: {why}" for name, why in runs.failures.items()]
    return Headline(title, tuple(sentences), tuple(_tiles(runs, best, base)))


def _of_study(
    runs: Runs, arms: Sequence[ArmResult], best: ArmResult, base: ArmResult | None
) -> tuple[str, list[str]]:
    found = runs.comparison
    assert found is not None  # noqa: S101  the caller looked
    missing = [f"Not finished: {'; '.join(found.missing)}."] if found.missing else []
    missing += [f"Note: {note}." for note in found.notes]
    if not found.choice or base is None:
        return f"No result yet: {found.because}.", missing
    if len(found.spec.seeds) == 1 and len(runs.arms) > 1:
        title = f"One seed shows no winner; {_highest(arms).name} scored highest."
    elif best is base:
        title = f"Stay with {base.name}"
        title += ": nothing faster was shown to be as good." if len(runs.arms) > 1 else "."
    else:
        title = f"Take {best.name}: {best.verdict} {_than(best)} {base.name}{_in_time(best)}."
    sentences = []
    if best is not base:
        sentences.append(f"Validation accuracy of {best.name}: {best.sentence}.")
    if found.best is not None:
        sentences.append(f"On validation data {found.best.sentence}.")
    if found.reference_s:
        times = found.spent_s / found.reference_s
        sentences.append(
            f"The study took {seconds_text(found.spent_s)} of training in all: "
            f"{times:.1f} times one run of {base.name}."
        )
    return title, sentences + missing


def _of_sizes(runs: Runs) -> tuple[str, list[str]]:
    """How the order of strategies depends on the number of training samples."""
    from frostline.study.learning_curve import rising  # noqa: PLC0415  scipy is in it

    curve = runs.learning[0]
    orders = curve.orders()
    said = [order.sentence for order in orders]
    said += [rising(name, curve) for name in curve.policies]
    points = [point for of in curve.points.values() for point in of]
    sizes = sorted({point.size for point in points if point.scores})
    seeds = max((d.n for order in orders for d in order.differences.values()), default=0)
    if len(sizes) == 1:
        title = f"One size, {sizes[0]:,} samples, does not say when freezing stops helping."
    elif len(curve.policies) > 1 and not orders:
        title = "Nothing can be compared: no two strategies share a size and a seed."
    elif seeds == 1:
        title = "One seed does not show when freezing stops helping."
    else:
        title, _, ground = said.pop(0).partition("; ")
        title = f"{title.removesuffix('.')}."
        said = [*([f"{ground[0].upper()}{ground[1:]}"] if ground else []), *said]
    if absent := sum(len(point.absent) for point in points):
        runs_of = absent + sum(len(point.scores) for point in points)
        said.append(
            f"{absent} of {runs_of} runs are missing: means are over fewer seeds there, or absent."
        )
    missing = {why for p in points for why in p.absent}
    notes = [note for note in curve.notes if not any(note.endswith(why) for why in missing)]
    return title, [*said, *(f"Note: {note}." for note in notes)]


def _than(arm: ArmResult) -> str:
    return "" if arm.verdict == "undecided" else "than"


def _in_time(arm: ArmResult) -> str:
    if arm.time_ratio is None:
        return ""
    return f", in {arm.time_ratio[0]:.0%} of its training time".replace("%", " %")


def _of_several(arms: Sequence[ArmResult], best: ArmResult) -> tuple[str, list[str]]:
    quality = percent_text(best.mean("val_accuracy"))
    title = f"{best.name} has the best validation accuracy of {len(arms)} strategies"
    title += f": {quality}." if quality else "."
    sentences = [f"{arm.name}: {arm.sentence}." for arm in arms if arm.sentence]
    sentences.append(
        "These runs were not declared as a study, so no margin was fixed before them and the best "
        "was picked after the fact; frostline compare does both properly."
    )
    return title, sentences


def _of_one(arm: ArmResult) -> tuple[str, list[str]]:
    quality, test = (percent_text(arm.mean(name)) for name in ("val_accuracy", "test_accuracy"))
    title = f"{arm.name} reached {quality} validation accuracy." if quality else arm.name
    sentences = []
    if test:
        sentences.append(f"The same weights got {test} of the test split right.")
    if (backward := percent_text(arm.mean("backward_share"))) is not None:
        sentences.append(f"It did {backward} of the backward work of full fine-tuning.")
    if len(arm.runs) == 1:
        sentences.append("One seed says nothing of chance.")
    return title, sentences


def _tiles(runs: Runs, best: ArmResult, base: ArmResult | None) -> list[Tile]:
    tiles = [_quality(best, named=bool(runs.learning))]
    if (seconds := best.mean("wall_s")) is not None:
        tiles.append(_cost("whole run", seconds_text(seconds), best, base, "wall_s"))
    if (memory := best.mean("peak_memory_bytes")) is not None:
        tiles.append(
            _cost("memory at its peak", bytes_text(memory), best, base, "peak_memory_bytes")
        )
    if (backward := best.mean("backward_share")) is not None:
        trained = percent_text(best.mean("trained_parameter_share"))
        note = f"{trained} of parameters trained" if trained else ""
        tiles.append(Tile("backward work done", percent_text(backward) or "", note))
    tiles.append(_proof(runs))
    return tiles


def _quality(arm: ArmResult, *, named: bool = False) -> Tile:
    values = arm.values("val_accuracy")
    if not values:
        ended = all(run.finished for run in arm.runs)
        return Tile("validation accuracy", "not measured" if ended else "not yet", arm.name)
    spread = (
        f"{100 * min(values):.1f} to {100 * max(values):.1f} % over {len(values)} seeds"
        if len(values) > 1
        else "one seed"
    )
    spread = f"{arm.name}, {spread}" if named else spread
    return Tile("validation accuracy", percent_text(arm.mean("val_accuracy")) or "", spread)


def _cost(label: str, value: str, best: ArmResult, base: ArmResult | None, name: str) -> Tile:
    """A cost, held against the reference's; less than a hundredth apart is no difference."""
    mine, theirs = best.mean(name), base.mean(name) if base else None
    if base is None or base is best or not mine or not theirs:
        return Tile(label, value, best.name)
    share = mine / theirs
    tone = "good" if share < 0.99 else "bad" if share > 1.01 else ""
    return Tile(label, value, f"{share:.2f} of {base.name}'s", tone)


def _proof(runs: Runs) -> Tile:
    proofs = [run.proof for run in runs.runs if run.proof is not None]
    if not proofs:
        return Tile("frozen stayed frozen", "not proved", "no run is finished", "bad")
    if any(proof.intact is False or proof.complete is False for proof in proofs):
        return Tile("frozen stayed frozen", "not proved", "see the certificates", "bad")
    spans = sum(proof.spans for proof in proofs)
    if not spans:
        return Tile("frozen stayed frozen", "nothing frozen", f"{len(proofs)} certificates")
    return Tile("frozen stayed frozen", "bit for bit", f"{spans:,} spans proved by digest", "good")
