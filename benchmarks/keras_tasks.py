"""A pretrained Keras model tuned on real pictures: how well, and what does the cache save?

    python benchmarks/keras_tasks.py [--shared ../shared] [--seeds 3] [--quick] [--only ARM ...]
    python benchmarks/keras_tasks.py --report      # the tables again from the log

MobileNet 0.25 of keras.applications, with ImageNet's weights, learns five kinds of flowers. Runs
with the cache where it pays (`cache: auto`, the default) and without follow each other seed by
seed; every run starts from an empty store. CPU seconds are those of the whole `fit` in this
process, so that they mean something on a machine that others use. A finished run is not run again:
delete its line, or the log.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import RESULTS, processor

import frostline
from frostline.tasks.keras_setup import load_keras

LOG, PAGE = RESULTS / "keras_tasks.json", RESULTS / "keras_tasks.md"
WEIGHTS = "models/mobilenet025_keras_imagenet/mobilenet_2_5_224_tf_no_top.h5"
DATA = "data/flowers5"
MODEL = "keras:MobileNet:alpha=0.25"
#: Logistic regression on the frozen features, as the README of the weights tells.
KNOWN = 0.800
COMMON: dict[str, Any] = {
    "augment": "none", "patience": None, "threads": 1, "device": "cpu", "epochs": 8,
}  # fmt: skip
#: By arm: settings, and whether it is run without the cache as well.
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "linear probing, 224 px": (
        {"policy": "linear-probe", "image_size": 224, "lr": 1e-3, "epochs": 12},
        False,
    ),
    "linear probing": ({"policy": "linear-probe", "image_size": 128, "lr": 1e-3}, True),
    "gradual unfreezing": (
        {"policy": "gradual:until=50%", "image_size": 128, "lr": 3e-4},
        True,
    ),
    "auto": ({"policy": "auto", "image_size": 128, "lr": 3e-4}, True),
    "full fine-tuning": ({"policy": "full", "image_size": 128, "lr": 3e-4}, False),
}
COLUMNS = (
    "arm", "px", "epochs", "seeds", "test accuracy", "CPU s cached", "CPU s uncached", "ratio",
    "backward work",
)  # fmt: skip
QUICK: dict[str, Any] = {"epochs": 2, "image_size": 32, "train_samples": 40}


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="tiny, into a temporary folder")
    parser.add_argument("--report", action="store_true", help="the page from the log, no runs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="keras-tasks-")) if options.quick else RESULTS
    log, page = folder / LOG.name, folder / PAGE.name
    known = json.loads(log.read_text()) if log.exists() else {"runs": []}
    if not options.report:
        load_keras()  # its import is no part of any run
        for seed in range(1 if options.quick else options.seeds):
            for name in options.only:
                for line in missing(known["runs"], name, seed):
                    measured = run(line, options.shared, quick=options.quick)
                    known["runs"].append(line | measured)
                    known["machine"] = processor()
                    log.write_text(json.dumps(known, indent=1) + "\n")
                    print(json.dumps(known["runs"][-1]), flush=True)
    page.write_text(report(known))
    print(page)


def missing(runs: list[Mapping[str, Any]], name: str, seed: int) -> Iterator[dict[str, Any]]:
    """The runs of an arm that are not in the log."""
    done = {(r["arm"], r["seed"], r["cache"]) for r in runs}
    for cache in ("auto", "off") if ARMS[name][1] else ("auto",):
        if (name, seed, cache) not in done:
            yield {"arm": name, "seed": seed, "cache": cache}


def run(line: Mapping[str, Any], shared: Path, *, quick: bool) -> dict[str, Any]:
    """One run in folders of its own."""
    settings = COMMON | ARMS[line["arm"]][0] | (QUICK if quick else {})
    with tempfile.TemporaryDirectory(prefix="keras-task-") as place:
        start, cpu = time.perf_counter(), time.process_time()
        found = frostline.fit(
            MODEL,
            str(shared / DATA),
            weights=shared / WEIGHTS,
            output=Path(place) / "run",
            cache=line["cache"],
            cache_dir=Path(place) / "stores",
            seed=line["seed"],
            **settings,
        )
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        summary = found.summary
    kept = ("test_accuracy", "val_accuracy", "backward_share", "certificate_ok", "epochs_run")
    return {
        "settings": {k: v for k, v in settings.items() if k in ("policy", "image_size", "epochs")},
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        **{key: summary[key] for key in kept},
    }


def report(known: Mapping[str, Any]) -> str:
    """The page."""
    ran = {r["arm"] for r in known["runs"]}
    lines = [
        "# Keras models through `frostline fit`",
        "",
        f"MobileNet 0.25 (`{MODEL}`, ImageNet) on flowers5: 500 training, 150 validation and 250",
        "test pictures of five classes. One thread,",
        f"{known.get('machine', 'no machine yet')}. Logistic regression on the frozen features of",
        f"224 pixels is known to reach {KNOWN:.1%}. CPU seconds of the whole call, data reading,",
        "filling the store and the test included; medians over seeds. Written by",
        "`benchmarks/keras_tasks.py`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(row(name, known["runs"]) for name in ARMS if name in ran),
        "",
        "Accuracies are of the cached runs, or of those without where there is no other; in",
        "brackets the lowest and the highest. Ratio: of the medians, uncached to cached, over the",
        "same seeds.",
        "",
    ]
    return "\n".join(lines)


def row(name: str, runs: list[Mapping[str, Any]]) -> str:
    """One line of the table."""
    own = [r for r in runs if r["arm"] == name]
    first = [r for r in own if r["cache"] != "off"]
    plain = [r for r in own if r["cache"] == "off"]
    told = first or plain
    scores = sorted(r["test_accuracy"] for r in told)
    spread = f" ({scores[0]:.1%} to {scores[-1]:.1%})" if len(scores) > 1 else ""
    on, off = (seconds(part) for part in (first, plain))
    both = {r["seed"] for r in first} & {r["seed"] for r in plain}
    ratio = seconds([r for r in plain if r["seed"] in both]) / seconds(
        [r for r in first if r["seed"] in both]
    ) if both else None  # fmt: skip
    settings = told[0]["settings"]
    shown = (
        name, settings["image_size"], settings["epochs"], len(told),
        f"{statistics.median(scores):.1%}{spread}", f"{on:.0f}" if first else "-",
        f"{off:.0f}" if plain else "-", "-" if ratio is None else f"{ratio:.2f}",
        f"{statistics.median(r['backward_share'] for r in told):.0%}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, shown))} |"


def seconds(runs: list[Mapping[str, Any]]) -> float:
    """Median CPU seconds; 0 of none."""
    return statistics.median(r["cpu_s"] for r in runs) if runs else 0.0


if __name__ == "__main__":
    main()
