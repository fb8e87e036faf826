"""What the benchmarks of the cache share: options, interleaved timing, ratios and tables."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import (
    RESULTS,
    add_device,
    check_device,
    machine,
    precision,
    step_seconds,
    titled,
    where,
)

#: A variant is repeated within a round until so many seconds have passed, at most so often.
LEAST_S, MOST_REPEATS = 0.1, 40
#: Steps that take longer need no warm one in each round.
LONG_S = 0.3
LEAST_ROUNDS = 3
Times = dict[str, list[float]]


def arguments(
    doc: str | None,
    *,
    rounds: int,
    quick: int,
    only: Sequence[str] = (),
    devices: Sequence[str] = ("cpu",),
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The options; sets the threads and the clock.

    Args:
        doc: of the script.
        rounds: by default.
        quick: with `--quick`.
        only: what `--only` may name.
        devices: what `--device` may name.
        more: adds options of the script's own.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help=f"default {rounds}, with --quick {quick}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds, for a machine that others use, with --threads 1",
    )
    parser.add_argument("--only", nargs="+", choices=only or None, metavar="NAME")
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    parser.add_argument("--log", type=Path, help="instead of the one in results/")
    add_device(parser, devices)
    if more is not None:
        more(parser)
    chosen = parser.parse_args()
    if not chosen.report:
        check_device(chosen)
    chosen.rounds = chosen.rounds or (quick if chosen.quick else rounds)
    torch.set_num_threads(chosen.threads)
    if chosen.clock == "cpu":
        time.perf_counter = time.process_time  # everywhere, also where groups are measured
    return chosen


def gather(
    name: str,
    chosen: argparse.Namespace,
    measurements: Mapping[str, Callable[[], dict[str, Any]]],
    table: Callable[[Mapping[str, Any]], str],
) -> None:
    """Measure, or only report; the log is written after each measurement, and the table from it.

    What `--only` leaves out stays in the log as it was.

    Args:
        name: of log and table in `results/`.
        chosen: the options.
        measurements: by name; each gives one entry of the log's "results".
        table: Markdown from the log alone.
    """
    name = titled(name, chosen.device)
    quick = Path(tempfile.gettempdir()) / f"{name}.quick.json"
    file = chosen.log or (quick if chosen.quick else RESULTS / f"{name}.json")
    log: dict[str, Any] = {"results": []}
    if file.exists() and (chosen.report or chosen.only):
        log = json.loads(file.read_text("utf-8"))
    if not chosen.report:
        for title, measure in measurements.items():
            if chosen.only and title not in chosen.only:
                continue
            start = time.monotonic()
            found = {"name": title, "machine": machine(chosen), "rounds": chosen.rounds}
            found |= measure()
            log["results"] = [r for r in log["results"] if r["name"] != title] + [found]
            order = list(measurements)
            log["results"].sort(key=lambda r: order.index(r["name"]))
            _write(file, log, table)
            took = time.monotonic() - start
            print(f"{title}: measured in {took:.0f} s", file=sys.stderr, flush=True)
    _write(file, log, table)
    print(table(log))


def _write(file: Path, log: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    file.with_suffix(".md").write_text(table(log), "utf-8")


def describe(log: Mapping[str, Any]) -> str:
    """The line under a heading: where it was measured, from the first entry of the log."""
    if not log["results"]:
        return "Nothing measured yet."
    m = log["results"][0]["machine"]
    loads = [r["machine"]["load_1min"] for r in log["results"]]
    return f"{where(m)}, load at the starts {min(loads)} to {max(loads)}, {precision(m)}."


def machine_of(log: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the first entry of a log was measured; nothing of an empty log."""
    return log["results"][0]["machine"] if log["results"] else {}


def interleaved(
    variants: Mapping[str, Callable[[], Callable[[], object]]],
    rounds: int,
    *,
    budget_s: float = 90.0,
) -> Times:
    """Seconds of every variant in every round, in random order within each.

    Args:
        variants: by name, what makes it ready (untimed) and returns the work of one step. Those
            whose names agree up to a slash run next to each other: they are compared most.
        rounds: at most, >= 1.
        budget_s: no round but the first three begins later than this.
    """
    order = random.Random(0)  # noqa: S311 (an order of measurements)
    times: Times = {name: [] for name in variants}
    start = time.monotonic()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() - start > budget_s:
            break
        for name in _shuffled(list(variants), order):
            work, known = variants[name](), times[name]
            if not known or min(known) < LONG_S:
                work()  # warm
            known.append(_least_of_several(work))
    return times


def _shuffled(names: Sequence[str], order: random.Random) -> list[str]:
    kin: dict[str, list[str]] = {}
    for name in names:
        kin.setdefault(name.partition("/")[0], []).append(name)
    groups = order.sample(list(kin.values()), len(kin))
    return [name for group in groups for name in order.sample(group, len(group))]


def _least_of_several(work: Callable[[], object]) -> float:
    took = [step_seconds(work)]
    while sum(took) < LEAST_S and len(took) < MOST_REPEATS:
        took.append(step_seconds(work))
    return min(took)


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles (low, median, high) of above / below, round by round."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    if len(each) == 1:
        return each[0], each[0], each[0]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return low, middle, high


def least_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The least of all rounds over the least: what else the machine does can only add."""
    return min(above) / min(below)


def rows_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def ratio_text(value: float) -> str:
    """A ratio with as many digits as it deserves."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size_text(count: float) -> str:
    """Bytes for people.

    Example:
        >>> size_text(1536), size_text(98304)
        ('1.5 KB', '96 KB')
    """
    value, unit = (count / 1024, "KB") if count < 2**20 else (count / 2**20, "MB")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def cores() -> int:
    """Cores of this machine."""
    return os.cpu_count() or 1
