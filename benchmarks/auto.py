"""Is `auto` as good as the best strategy of a full sweep, and at what part of its cost?

For each pair of a pretrained model and a data set: all static depths (at most nine of them, evenly
spaced) and the main policies, and `auto`, each with three seeds, by `frostline.compare`. The best
strategy is the one with the best mean accuracy on *test* data, which nobody could have picked;
`auto` and all training see training and validation data alone.

    python benchmarks/auto.py [--only PAIR ...] [--seeds 3] [--scratch DIR]     # resumable
    python benchmarks/auto.py --read --only PAIR --scratch DIR  # seeds that all strategies have
    python benchmarks/auto.py --report                                # the tables from the log

A study per pair goes to the scratch folder; what it says is kept in `results/auto.json`. Needs
`data` and `models` of the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, processor
from pairs import Pair, pairs
from scipy import stats

import frostline
from frostline._version import __version__
from frostline.study.analysis import ArmFigures, analyse

LOG, TABLE = RESULTS / "auto.json", RESULTS / "auto.md"
#: The page of the policy, which shows the gist.
PAGE = Path(__file__).parents[1] / "docs/policies/auto.md"
_GIST = re.compile("(<!-- pairs -->\n).*?(<!-- /pairs -->)", re.DOTALL)
POLICIES = ("full", "linear-probe", "gradual:until=50%", "lp-ft", "autofreeze")
#: Strategies of one comparison whose cost is held against full fine-tuning.
EIGHT = 8
_INTRODUCTION = """# `auto` against a sweep of all strategies

Test accuracy in points, mean over seeds. *Best* is the strategy of the sweep with the best mean on
test data, in hindsight; *picked* is the one with the best mean on validation data. *Met*: `auto` is
at most 0.5 points below the best one, or its distance is within the 95 % interval over seeds. Cost:
seconds of training and validation of `auto`, the look at the data included, as a share of those of
the whole sweep, each run charged as if alone, medians over seeds. *Eight*: what eight strategies
together took with shared frozen outputs, in full fine-tunings.
"""
_HEAD = (
    "| pair | auto | best | auto minus best | met | picked | full | of sweep | of full | eight |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
#: Columns of the page: pair, auto, best, difference, full, time of full.
_GIST_COLUMNS = (0, 1, 2, 3, 6, 8)
MOST_DEPTHS = 9
SEEDS = 3
CLOSE = 0.005
COST_SHARE = 0.25


@dataclass(frozen=True)
class Size:
    """How much of a pair is swept: what two cores do in an hour.

    Attributes:
        epochs: of every run.
        settings: of every run, besides those of the pair.
    """

    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)


SIZES: Mapping[str, Size] = {
    "caltech20-resnet20": Size(10),
    "caltech20-resnet56": Size(6),
    "flowers5-lite0": Size(6, {"image_size": 96}),
    "flowers5-squeezenet": Size(6),
    "trec6-minilm": Size(4, {"train_samples": 600}),
    "sst2-minilm": Size(4, {"train_samples": 600}),
    "banking77-minilm": Size(4, {"train_samples": 770}),
    "caltech20-resnet32": Size(6),
    "caltech20-squeezenet": Size(6, {"train_samples": 400}),
    "caltech20-lite0": Size(6, {"image_size": 64, "train_samples": 400}),
    "flowers5-resnet20": Size(10),
    "flowers5-resnet56": Size(6),
    "spoken-resnet20": Size(10),
}


def depths(groups: int) -> list[str]:
    """Static prefixes between nothing and the whole backbone, at most `MOST_DEPTHS`.

    Example:
        >>> depths(4)
        ['first:groups=1', 'first:groups=2', 'first:groups=3']
    """
    inner = list(range(1, groups))
    if len(inner) > MOST_DEPTHS:
        step = (len(inner) - 1) / (MOST_DEPTHS - 1)
        inner = sorted({inner[round(i * step)] for i in range(MOST_DEPTHS)})
    return [f"first:groups={count}" for count in inner]


# -- running -----------------------------------------------------------------------------------


def sweep(name: str, pair: Pair, scratch: Path, seeds: int, threads: int) -> dict[str, Any]:
    """Run what is missing of one pair's study and give its figures."""
    size = SIZES[name]
    arms = [POLICIES[0], POLICIES[1], *depths(pair.groups), *POLICIES[2:], "auto"]
    study = frostline.compare(
        pair.model, pair.data, arms,
        seeds=seeds, output=scratch / name, isolate=False, on_event=_say, epochs=size.epochs,
        threads=threads, cache_dir=scratch / "cache", checkpoint_every=None,
        **{**pair.settings, **size.settings},
    )  # fmt: skip
    return _described(name, pair, threads, figures(study.path))


def _described(name: str, pair: Pair, threads: int, found: dict[str, Any]) -> dict[str, Any]:
    size = SIZES[name]
    return found | {
        "title": pair.title, "held_out": pair.held_out, "epochs": size.epochs,
        "settings": dict(size.settings), "threads": threads, "processor": processor(),
        "torch": str(torch.__version__), "frostline": __version__,
    }  # fmt: skip


def _say(event: Mapping[str, Any]) -> None:
    if event["kind"] == "end":
        found = event["summary"]
        shown = f"val {found['val_accuracy']:.4f}, test {found['test_accuracy']:.4f}"
        print(f"{event['place']}/{event['of']} {event['arm']} seed {event['seed']}: {shown}")


def figures(study: Path) -> dict[str, Any]:
    """What the records of a study say, by arm and seed, and what `auto` said of itself."""
    found = analyse(study)
    arms = {of.arm.name: _rows(of) for of in found.arms if of.runs}
    every = set.intersection(*(set(rows) for rows in arms.values())) if arms else set()
    arms = {name: {seed: rows[seed] for seed in sorted(every)} for name, rows in arms.items()}
    said: dict[str, list[str]] = {}
    for seed in found["auto"].runs if "auto" in arms else ():
        run = frostline.Run(study / "runs" / "auto" / f"seed-{seed}")
        said[str(seed)] = [d.plan.reason for d in run.record.decisions]
    return {"arms": arms, "said": said, "missing": list(found.missing)}


def _rows(of: ArmFigures) -> dict[str, dict[str, float]]:
    names = ("val_accuracy", "test_accuracy", "training_s", "alone_s", "backward_share")
    return {str(seed): {n: getattr(run, n) for n in names} for seed, run in of.runs.items()}


# -- reporting ---------------------------------------------------------------------------------

Arms = Mapping[str, Mapping[str, Mapping[str, float]]]


def mean(arms: Arms, arm: str, figure: str) -> float:
    """Mean over the seeds of an arm."""
    return statistics.fmean(row[figure] for row in arms[arm].values())


def middle_s(arms: Arms, arm: str, figure: str = "alone_s") -> float:
    """Median seconds over the seeds of an arm: one run beside other work must not count thrice."""
    return statistics.median(row[figure] for row in arms[arm].values())


def difference(arms: Arms, one: str, other: str) -> tuple[float, float]:
    """Mean difference in test accuracy over common seeds, and half of its 95 % interval."""
    seeds = sorted(arms[one].keys() & arms[other].keys())
    gaps = [arms[one][s]["test_accuracy"] - arms[other][s]["test_accuracy"] for s in seeds]
    if len(gaps) < 2:
        return gaps[0], float("inf")
    wide = float(stats.t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
    return statistics.fmean(gaps), wide


def table(log: Mapping[str, Any]) -> str:
    """The page."""
    lines = [_INTRODUCTION, *_HEAD, *(f"| {' | '.join(_cells(found))} |" for found in _done(log))]
    lines += ["", *_verdict(log)]
    for found in log.values():
        lines += ["", *_details(found)]
    return "\n".join([*lines, "", "Made by `python benchmarks/auto.py`.", ""])


@dataclass(frozen=True)
class Outcome:
    """How `auto` came out on one pair."""

    best: str
    picked: str
    gap: float
    wide: float
    share: float

    @property
    def met(self) -> bool:
        """Whether it is as close to the best as asked."""
        return self.gap >= -max(CLOSE, self.wide)


def outcome(arms: Arms) -> Outcome:
    """The pair's verdict."""
    others = [name for name in arms if name != "auto"]
    best = max(others, key=lambda name: mean(arms, name, "test_accuracy"))
    picked = max(others, key=lambda name: mean(arms, name, "val_accuracy"))
    gap, wide = difference(arms, "auto", best)
    whole = sum(middle_s(arms, name) for name in others)
    return Outcome(best, picked, gap, wide, middle_s(arms, "auto") / whole)


def eight_cost(arms: Arms) -> float | None:
    """Seconds that eight strategies took together, over those of full fine-tuning alone."""
    wanted = [n for n in arms if n.startswith(("full", "linear-probe", "gradual", "lp-ft"))]
    prefixes = [name for name in arms if name.startswith("first")]
    step = max(1, len(prefixes) // (EIGHT - len(wanted)))
    wanted += prefixes[::step][: EIGHT - len(wanted)]
    if len(wanted) < EIGHT:
        return None
    return sum(middle_s(arms, n, "training_s") for n in wanted) / middle_s(arms, "full")


def _done(log: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pairs that `auto` has run on, those held out last."""
    done = [found for found in log.values() if "auto" in found["arms"]]
    return sorted(done, key=lambda found: found["held_out"])


def _cells(found: Mapping[str, Any]) -> list[str]:
    arms: Arms = found["arms"]
    of, eight = outcome(arms), eight_cost(arms)
    held = " (held out)" if found["held_out"] else ""
    return [
        f"{found['title']}{held}",
        f"{100 * mean(arms, 'auto', 'test_accuracy'):.1f}",
        f"{100 * mean(arms, of.best, 'test_accuracy'):.1f} `{of.best}`",
        f"{100 * of.gap:+.1f} ± {100 * of.wide:.1f}",
        "yes" if of.met else "NO",
        f"{100 * mean(arms, of.picked, 'test_accuracy'):.1f} `{of.picked}`",
        f"{100 * mean(arms, 'full', 'test_accuracy'):.1f}",
        f"{of.share:.0%}" + ("" if of.share <= COST_SHARE else " TOO MUCH"),
        f"{middle_s(arms, 'auto') / middle_s(arms, 'full'):.2f}",
        "-" if eight is None else f"{eight:.2f}",
    ]


def gist(log: Mapping[str, Any]) -> str:
    """What the policy's page shows of it: some columns."""
    lines = [
        "| pair | `auto` | best, in hindsight | difference | full | time, of full |",
        "|---|---|---|---|---|---|",
    ]
    rows = ([cells[i] for i in _GIST_COLUMNS] for cells in map(_cells, _done(log)))
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *_verdict(log), ""])


def _verdict(log: Mapping[str, Any]) -> list[str]:
    done = _done(log)
    if not done:
        return ["No pair is finished."]
    apart = {
        "All pairs": done,
        "Pairs that the rules were made with": [found for found in done if not found["held_out"]],
        "Pairs held out": [found for found in done if found["held_out"]],
    }
    lines = [_counted(title, found) for title, found in apart.items() if found]
    few = [found["title"] for found in done if len(found["arms"]["auto"]) < SEEDS]
    if few:
        lines.append(
            f"- Fewer than {SEEDS} seeds, so that the interval allows much: {' and '.join(few)}."
        )
    return [*lines, f"- Pairs not run yet: {len(SIZES) - len(done)} of {len(SIZES)}."]


def _counted(title: str, done: Sequence[Mapping[str, Any]]) -> str:
    found = [outcome(pair["arms"]) for pair in done]
    close = sum(of.gap >= -CLOSE for of in found)
    met, cheap = sum(of.met for of in found), sum(of.share <= COST_SHARE for of in found)
    text = f"- {title}: met on {met} of {len(found)}, on {close} of them by the half point itself; "
    return f"{text}{cheap} within {COST_SHARE:.0%} of the sweep's cost."


def _details(found: Mapping[str, Any]) -> list[str]:
    arms: Arms = found["arms"]
    what = ", ".join(f"{k}={v}" for k, v in found["settings"].items())
    lines = [
        f"## {found['title']}\n",
        (
            f"{found['epochs']} epochs{', ' if what else ''}{what}; torch {found['torch']}, "
            f"{found['threads']} thread(s), {found['processor']}.\n"
        ),
        "| strategy | test accuracy (by seed) | validation | seconds alone | backward work |",
        "|---|---|---|---|---|",
    ]
    for name, runs in arms.items():
        each = ", ".join(f"{100 * row['test_accuracy']:.1f}" for row in runs.values())
        lines.append(
            f"| `{name}` | {100 * mean(arms, name, 'test_accuracy'):.1f} ({each}) "
            f"| {100 * mean(arms, name, 'val_accuracy'):.1f} | {middle_s(arms, name):.1f} "
            f"| {mean(arms, name, 'backward_share'):.0%} |"
        )
    for seed, reasons in found["said"].items():
        lines += [f"\n`auto`, seed {seed}: " + " Then: ".join(reasons)]
    if found["missing"]:
        lines.append(f"\nNot finished: {', '.join(found['missing'])}.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="PAIR", choices=sorted(SIZES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="folder of the studies, to go on later")
    parser.add_argument("--report", action="store_true", help="no runs: the tables from the log")
    parser.add_argument("--read", action="store_true", help="no runs: what the studies hold")
    options = parser.parse_args(arguments)
    log: dict[str, Any] = json.loads(LOG.read_text("utf-8")) if LOG.exists() else {}
    if not options.report:
        torch.set_num_threads(options.threads)
        scratch = options.scratch or Path(tempfile.gettempdir()) / "frostline-auto"
        scratch.mkdir(parents=True, exist_ok=True)
        known = pairs(scratch)
        for name in options.only or SIZES:
            if options.read:
                found = figures(scratch / name)
                log[name] = _described(name, known[name], options.threads, found)
            else:
                log[name] = sweep(name, known[name], scratch, options.seeds, options.threads)
            ordered = {n: log[n] for n in SIZES if n in log}
            LOG.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
    TABLE.write_text(table(log), "utf-8")
    text = _GIST.sub(lambda m: m[1] + gist(log) + m[2], PAGE.read_text("utf-8"))
    PAGE.write_text(text, "utf-8")
    print(table(log))


if __name__ == "__main__":
    main()
