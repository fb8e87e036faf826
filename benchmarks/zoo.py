"""Every model of the zoo, trained with and without its frozen region: equal, or refused?

`tests/frontier/zoo.py` holds the models and `tests/frontier/harness.py` the comparison. Each model
is frozen in several ways, and trained with a bare region and with the cache that people use; each
way is one line of the log `zoo.json`, from which the table `zoo.md` is made.

    python benchmarks/zoo.py [--only WORD ...]       # a part is printed, and not written
    python benchmarks/zoo.py --cache                 # the runs with the cache alone, into the log
    python benchmarks/zoo.py --device cuda --jobs 8  # on a GPU, into a log and a table of its own
    python benchmarks/zoo.py --report                # the table from the log, no runs
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import bench

from frontier import harness
from frontier.zoo import CASES
from frontier.zoo_cache import compare_cached

NAME = "zoo"
HOSTILE = (
    "Each breaks something a cache takes for granted; a refusal is a right answer. *for "
    "verification*: what training code changed between two steps, which a bare region cannot see "
    "and the cache must."
)
CACHE = (
    "The same comparison with `FrontierCache`, which stores rows on disk, looks before each step "
    "whether weights, modes, settings and what the code reads are what they were, compares some "
    "steps with the full forward pass, and takes that wherever there is no replay. Nothing may "
    "differ here, and nothing may fail."
)
PREFIXES = ("quarter", "half", "three quarters", "all but head")
GOOD = ("equal", "close")
WORDS = {
    "equal": "equal",
    "close": "close",
    "refused": "refused",
    "diverged": "in full",
    "DIFFERENT": "**DIFFERENT**",
    "crashed": "**crashed**",
}
#: Only on another device than the processor.
UNABLE = "unable"


@dataclass(frozen=True)
class Work:
    """One way to freeze one model, to be judged in whichever process is free."""

    case: str
    depth: str
    device: str
    cached: bool


def chosen(options: argparse.Namespace, *, cached: bool) -> list[Work]:
    """Every case at every depth; of those with one of these words in the name, if there are any."""
    words = options.only
    return [
        Work(case.name, depth, options.device, cached)
        for case in CASES.values()
        if not words or any(word in case.name for word in words)
        for depth in case.depths
    ]


def gather(options: argparse.Namespace, *, cached: bool) -> list[dict[str, Any]]:
    """Compare every case at every depth, with a bare region or with the library's cache."""
    work = chosen(options, cached=cached)
    start = functools.partial(prepare_process, options.threads, options.device)
    if options.jobs == 1:
        start()
        return [judge(of) for of in work]
    # A process that was forked could not use a GPU.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, start) as pool:
        return list(pool.map(judge, work))


def prepare_process(threads: int, device: str) -> None:
    """Threads and arithmetic; on a GPU the same kernels for the same sizes, in full float32."""
    torch.set_num_threads(threads)
    logging.getLogger("frostline").setLevel(logging.ERROR)
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def judge(work: Work) -> dict[str, Any]:
    """Both twins, trained and compared; "unable" where the model does not train there at all."""
    case = harness.placed(CASES[work.case], work.device)
    start = time.perf_counter()
    try:
        cell = (_judge_cached if work.cached else _judge_region)(case, work.depth)
    except Exception as error:
        if work.device == "cpu":
            raise
        cell = asdict(harness.Outcome(work.case, work.depth, UNABLE, str(error)[:300]))
        cell |= {"right": True, "steps": 0, "replayed": 0, "notes": []}
    print(f"{'cache: ' * work.cached}{cell['kind']:10} {case.name} | {work.depth} | "
          f"{cell['reason'][:120]}", flush=True)  # fmt: skip
    took = {} if work.cached else {"took_s": round(time.perf_counter() - start, 2)}
    return cell | {"hostile": case.hostile, "needs": case.needs} | took


def _judge_region(case: harness.Case, depth: str) -> dict[str, Any]:
    found = harness.compare(case, depth)
    return asdict(found) | {"right": found.kind in case.right(depth)}


def _judge_cached(case: harness.Case, depth: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found, report = compare_cached(case, depth, Path(folder))
    return {
        "case": case.name, "depth": depth,
        "kind": found.kind, "reason": found.reason, "error": found.error,
        "steps": report.batches if report else 0,
        "replayed": report.replayed if report else 0,
        "notes": list(report.notes) if report else [],
    }  # fmt: skip


def verdict(cell: dict[str, Any]) -> str:
    """What a table says of one cell: the outcome, and how much was skipped."""
    kind = cell["kind"]
    if kind == UNABLE:
        return "-"
    text = WORDS[kind]
    if cell["needs"] and kind == "DIFFERENT":
        return "for verification"
    if kind in GOOD and cell["covered"] is not None:
        text += f" {cell['covered']:.0%}"
    if kind == "close":
        text += f" ({cell['error']:.0e})"
    if kind == "diverged":
        text += f" {cell['full_steps']}/{len(harness.SIZES)}"
    return text


def parts(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Friendly cells, hostile ones, and those that training code changes, where they train."""
    cells = [c for c in cells if c["kind"] != UNABLE]
    return {
        "as people write them": [c for c in cells if not c["hostile"]],
        "hostile": [c for c in cells if c["hostile"] and not c["needs"]],
        "changed between steps": [c for c in cells if c["needs"]],
    }


def summary(cells: list[dict[str, Any]]) -> list[str]:
    """Counts of friendly and of hostile cells."""
    lines = ["| models | architectures | ways to freeze | " + " | ".join(WORDS) + " |",
             "|---" * (3 + len(WORDS)) + "|"]  # fmt: skip
    for name, rows in parts(cells).items():
        counts = Counter(c["kind"] for c in rows)
        models = len({c["case"] for c in rows})
        numbers = " | ".join(str(counts[kind]) for kind in WORDS)
        lines.append(f"| {name} | {models} | {len(rows)} | {numbers} |")
    return lines


def through_cache(cells: list[dict[str, Any]]) -> list[str]:
    """What the cache made of the same models: counts, and each that is not equal."""
    kinds = ("equal", "close", "DIFFERENT", "crashed")
    lines = ["| models | ways to freeze | " + " | ".join(WORDS[k] for k in kinds)
             + " | steps without the frozen part |", "|---" * (len(kinds) + 3) + "|"]  # fmt: skip
    for name, rows in parts(cells).items():
        counts = Counter(c["kind"] for c in rows)
        steps, replayed = (sum(c[key] for c in rows) for key in ("steps", "replayed"))
        numbers = " | ".join(str(counts[kind]) for kind in kinds)
        lines.append(f"| {name} | {len(rows)} | {numbers} | {replayed:,} of {steps:,} |")
    wrong = [c for c in cells if c["kind"] not in GOOD]
    lines += [
        "",
        *(f"- {c['case']}, {c['depth']}: {c['kind']}, {c['reason'][:200]}" for c in wrong),
    ]
    return lines if wrong else lines[:-1]


def matrix(cells: list[dict[str, Any]]) -> list[str]:
    """Architectures by depth; frozen sets with names of their own in the last column."""
    lines = ["| architecture | " + " | ".join(PREFIXES) + " | other sets |",
             "|---" * (len(PREFIXES) + 2) + "|"]  # fmt: skip
    for name in dict.fromkeys(c["case"] for c in cells):
        found = {c["depth"]: verdict(c) for c in cells if c["case"] == name}
        prefixes = " | ".join(found.pop(depth, "") for depth in PREFIXES)
        others = "; ".join(f"{depth}: {text}" for depth, text in found.items())
        lines.append(f"| {name} | {prefixes} | {others} |")
    return lines


def reasons(cells: list[dict[str, Any]]) -> list[str]:
    """Why what was not replayed was not, one line per model and reason."""
    lines = ["| architecture | frozen | outcome | reason |", "|---|---|---|---|"]
    found: dict[tuple[str, str, str], list[str]] = {}
    for c in cells:
        if c["kind"] not in (*GOOD, UNABLE):
            found.setdefault((c["case"], c["kind"], c["reason"]), []).append(c["depth"])
    for (name, kind, why), depths in found.items():
        text = why.replace("|", "/").removeprefix("FrontierError: ")
        lines.append(f"| {name} | {', '.join(depths)} | {WORDS[kind]} | {text[:300]} |")
    return lines


def table(log: dict[str, Any]) -> str:
    """Markdown, from the log alone."""
    cells, m = log["cells"], log["machine"]
    worst = max((c["error"] for c in cells if c["kind"] == "close"), default=0.0)
    about = (
        f"Twins with random weights are trained for {log['steps']} steps on {log['samples']} "
        "samples in shuffled batches of unequal sizes, one by its plain forward pass, one on rows "
        "that its frozen region stored in fixed blocks. After every step outputs, loss, every "
        "gradient, buffers, attributes, the random states of PyTorch, NumPy and Python and the "
        "caller's batch are compared. *equal*: all bits; *close*: the largest relative error is "
        f"given, the largest of all is {worst:.0e} (beyond 1e-5 only where float64 shows that it "
        "is rounding, and in bfloat16); the percentage is the share of frozen layers skipped "
        "(those fed by trainable ones cannot be). "
        "*refused*: no replay, with a reason. *in full 2/4*: two of four steps left the replay "
        "and took the full forward pass, with equal results. The columns are shares of the "
        "backbone's layer groups that are frozen, from the input on."
    )
    friendly = [c for c in cells if not c["hostile"]]
    unable = [c for c in cells if c["kind"] == UNABLE]
    machine = f"torch {m['torch']}, {m['threads']} thread(s), {m['processor']}."
    if "gpu" in m:
        machine = f"{m['gpu']}, deterministic kernels, no TF32; {machine}"
    if unable:
        about += (
            f" {len(unable)} of {len(cells)} ways (-) are left out: there the model itself does "
            "not train on this device, most often as it makes tensors on the processor."
        )
    return "\n".join(
        [
            "# The zoo: training on a frozen region, model by model",
            "",
            about,
            "",
            *summary(cells),
            "",
            "## The cache that people use",
            "",
            CACHE,
            "",
            *through_cache(log.get("cached", [])),
            "",
            "## Models as people write them",
            "",
            *matrix(friendly),
            "",
            "## Hostile models",
            "",
            HOSTILE,
            "",
            *matrix([c for c in cells if c["hostile"]]),
            "",
            "## What was not replayed, and why",
            "",
            *reasons(cells),
            "",
            f"{machine} {bench.made_by(NAME, m)}",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="in the name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="no runs: the table from the log")
    parser.add_argument("--cache", action="store_true", help="only the runs with the cache")
    bench.add_device(parser)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    log = bench.read(NAME, options.device) if options.report or options.cache else {}
    if options.report:
        bench.write(NAME, log, table(log))
        return
    options.clock = "wall"
    bench.check_device(options)
    torch.set_num_threads(options.threads)
    if not options.cache:
        log = {
            "machine": bench.machine(options),
            "steps": len(harness.SIZES),
            "samples": harness.SAMPLES,
            "cells": gather(options, cached=False),
        }
        if not options.only:  # the second half is as long
            path = bench.RESULTS / f"{bench.titled(NAME, options.device)}.json"
            path.write_text(json.dumps(log, indent=1) + "\n")
    log["cached"] = gather(options, cached=True)
    if options.only:
        print(table(log))
    else:
        bench.write(NAME, log, table(log))
    wrong = [c for c in log["cells"] if not c["right"] and not c["needs"]]
    print(f"{len(wrong)} of {len(log['cells'])} are not right")
    wrong = [c for c in log["cached"] if c["kind"] not in (*GOOD, UNABLE)]
    print(f"{len(wrong)} of {len(log['cached'])} are not right with the cache")


if __name__ == "__main__":
    main()
