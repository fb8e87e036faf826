"""When does freezing stop helping? Accuracy by number of training samples, on real data.

ResNet-20, pretrained on CIFAR-10, is fine-tuned on nested, stratified parts of caltech20 (20
classes, 40 pictures of each) with the settings that `frostline fit` uses by default; every run
makes as many updates as one on all 800 pictures. Runs are kept in the study's folder, so the same
command goes on where it was stopped.

    python benchmarks/learning_curve.py [--pair caltech20-resnet20] [--folder FOLDER] [--seeds 3]
    python benchmarks/learning_curve.py --read         # what is done so far; nothing is run
    python benchmarks/learning_curve.py --report       # the page again from the log

Writes `results/learning_curve.json` and `results/learning_curve.md`. Needs `data` and `models` of
the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import RESULTS, processor
from pairs import pairs

from frostline.study.folder import StudyFolder
from frostline.study.learning_curve import LearningCurve, SizePoint, read_curve, rising, run_curve

PATH = RESULTS / "learning_curve.json"
POLICIES = ("full", "first:groups=4", "linear-probe")
SIZES = (100, 200, 400, 800)
TITLES: Mapping[str, str] = {"val": "validation", "test": "test"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing, unless told not to, and read all of it."""
    folder: Path = options.folder
    pair = pairs(folder.parent)[options.pair]
    settings = {"threads": 1, "device": "cpu", "cache_dir": str(folder.parent / "stores")}
    settings |= {"checkpoint_every": None, **pair.settings}
    if not options.read:
        run_curve(
            pair.model,
            pair.data,
            POLICIES,
            sizes=SIZES,
            seeds=options.seeds,
            output=folder,
            isolate=False,
            on_event=told,
            **settings,
        )
    return {
        "title": pair.title,
        "processor": processor(),
        "epochs": StudyFolder(folder).spec().settings["epochs"],
        **{metric: read_curve(folder, metric=metric).to_json() for metric in TITLES},
    }


def told(event: Mapping[str, Any]) -> None:
    """A line per run."""
    if event["kind"] == "end":
        place = f"{event['place']} of {event['of']}: {event['arm']}, seed {event['seed']}"
        print(f"{place}, {event['summary']['training_s']:.0f} s", flush=True)


# -- the page --------------------------------------------------------------------------------------


def page(log: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    curves = {metric: LearningCurve.from_json(log[metric]) for metric in TITLES}
    first = curves["val"]
    sizes = [point.size for point in next(iter(first.points.values()))]
    seeds = {seed for points in first.points.values() for p in points for seed in p.scores}
    absent = sum(len(p.absent) for points in first.points.values() for p in points)
    runs = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    lines = [
        "# When does freezing stop helping?",
        "",
        f"Made by `python benchmarks/learning_curve.py`: {log['title']}, {runs},",
        f"{log['epochs']} epochs of {sizes[-1]} samples and as many updates on fewer;",
        f"{log['processor']}. Means over seeds, with {100 * first.level:g} % intervals of them.",
        *([f"{absent} runs are not done: means are over fewer seeds there."] if absent else []),
    ]
    for metric, curve in curves.items():
        lines += [
            "",
            f"Accuracy on {curve.eval_samples} {TITLES[metric]} samples:",
            "",
            f"| samples | {' | '.join(f'`{policy}`' for policy in curve.policies.values())} |",
            f"|---|{'---|' * len(curve.policies)}",
            *(row(size, curve) for size in sizes),
            "",
            *(f"- {order.sentence}" for order in curve.orders()),
            *(f"- {rising(name, curve)}" for name in curve.policies),
            *(f"- {note}" for note in curve.notes if not note.endswith("not finished")),
        ]
    return "\n".join(lines) + "\n"


def row(size: int, curve: LearningCurve) -> str:
    points = [next(p for p in curve[name] if p.size == size) for name in curve.policies]
    return f"| {size} | {' | '.join(map(cell, points))} |"


def cell(point: SizePoint) -> str:
    if point.mean is None:
        return "-"
    text = f"{100 * point.mean:.1f} %"
    if point.low is None or point.high is None:
        return text
    return f"{text} ({100 * point.low:.1f} to {100 * point.high:.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    place = Path(tempfile.gettempdir()) / "frostline-learning-curve"
    parser.add_argument("--pair", default="caltech20-resnet20")
    parser.add_argument("--folder", type=Path, default=place / "study", help="of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--read", action="store_true", help="no runs: what is done in the folder")
    parser.add_argument("--report", action="store_true", help="no runs: the page from the log")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args(arguments)
    if not options.report:
        options.folder.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(measure(options), indent=1) + "\n", "utf-8")
    log = json.loads(options.out.read_text("utf-8"))
    options.out.with_suffix(".md").write_text(page(log), "utf-8")


if __name__ == "__main__":
    main()
