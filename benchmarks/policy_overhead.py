"""What does a policy itself cost? Its share of the time of a whole run, for every policy.

Each policy runs at its defaults over a whole run: 200 steps of ResNet-20 (8 epochs, batch 32) and
40 steps of a BERT of the shape of MiniLM (4 epochs, batch 16, 32 tokens), with random weights and
data. Charged are the driver's seconds in the policy, in signals and in changing plans, and the
backward passes that run through frozen groups for a signal, as predicted from group costs; all
over the time that full fine-tuning needs for these steps. Digests, the proof of freezing, are
listed apart. Full fine-tuning runs between the policies, so that drift shows.

    python benchmarks/policy_overhead.py [--threads 2] [--clock wall] [--only NAME ...]
    python benchmarks/policy_overhead.py --report      # tables and cards again, from the log

On a machine that others use: --threads 1 --clock cpu. Each finished run is kept in
`results/policy_overhead.json` at once; the same command goes on from there, --fresh starts over.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence_report as report
import torch
from bench import machine, minilm
from specs import default_specs, unlisted
from torch import nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.backends.torch.optimizer import parameter_groups
from frostline.cost import predicted_step_s
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from models_for_tests import resnet20

#: A policy that costs more of a full step than this should say so when a run starts.
NOTICE_FROM = 0.02
#: Full fine-tuning runs again after so many policies.
BASELINE_EVERY = 10


@dataclass(frozen=True)
class Subject:
    """A model, its batches and the length of a run.

    Attributes:
        name: as in `specs.default_specs`.
        title: for people.
        model: with random weights.
        batches: a few different ones, used in turn.
        epochs: of the run.
        steps_per_epoch: of the run.
    """

    name: str
    title: str
    model: nn.Module
    batches: list[tuple[Example, torch.Tensor]]
    epochs: int
    steps_per_epoch: int


def small_resnet() -> Subject:
    """ResNet-20 on 32 pixels."""
    torch.manual_seed(0)
    batches = [(Example((torch.randn(32, 3, 32, 32),)), torch.randint(20, (32,))) for _ in range(4)]
    return Subject("resnet20", "ResNet-20, 32 px, batch 32", resnet20(20), batches, 8, 25)


def small_bert() -> Subject:
    """The BERT of the other benchmarks, on 32 tokens."""
    case = minilm()
    batches = []
    for _ in range(4):
        ids = torch.randint(case.model.config.vocab_size, (16, 32))  # type: ignore[union-attr]
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches.append((Example(kwargs=kwargs), torch.randint(6, (16,))))
    return Subject("bert", "BERT 6x384 (MiniLM), 32 tokens, batch 16", case.model, batches, 4, 10)


SUBJECTS: tuple[Callable[[], Subject], ...] = (small_resnet, small_bert)


class Bench:
    """Runs policies over one subject, always from the same weights."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        example = subject.batches[0][0]
        groups = layer_groups(subject.model, example)
        self.groups: LayerGroups = measure_costs(subject.model, groups, example, repeats=5)
        self.weights = copy.deepcopy(subject.model.state_dict())

    def run(self, spec: str) -> dict[str, Any]:
        """One whole run under a policy: what it was charged, and what its steps took."""
        subject, model = self.subject, self.subject.model
        model.load_state_dict(self.weights)
        torch.manual_seed(0)
        grouped = parameter_groups(model, self.groups, lr=1e-4, weight_decay=0.01)
        optimizer = torch.optim.AdamW(grouped)
        driver = torch_driver(
            model,
            optimizer,
            spec,
            total_epochs=subject.epochs,
            steps_per_epoch=subject.steps_per_epoch,
            groups=self.groups,
        )
        costs, full = driver.costs, predicted_step_s(self.groups, FreezePlan())
        extra, start = 0.0, time.perf_counter()
        for epoch in range(subject.epochs):
            model.train()
            for _ in range(subject.steps_per_epoch):
                widened, step = costs.widened_steps, driver.progress.step
                with driver.step() as plan:
                    if costs.widened_steps > widened:
                        extra += full - predicted_step_s(self.groups, plan)
                    example, targets = subject.batches[step % len(subject.batches)]
                    out = model(*example.args, **example.kwargs)
                    logits = out if isinstance(out, torch.Tensor) else out.logits
                    loss = nn.functional.cross_entropy(logits, targets)
                    optimizer.zero_grad()
                    loss.backward()
                    driver.sample(loss=float(loss.detach()))
                    optimizer.step()
            # A validation that improves, then worsens: what reads it has something to decide.
            done = (epoch + 1) / subject.epochs
            value = 0.5 + abs(done - 0.6)
            metrics = {"train_loss": 1.5 - done, "val_loss": value, "val_accuracy": 1.5 - value}
            driver.evaluated(metrics)
        wall = time.perf_counter() - start
        return {
            "policy_s": costs.policy_s,
            "signals_s": costs.signals_s,
            "apply_s": costs.apply_s,
            "digest_s": costs.digest_s,
            "widened_steps": costs.widened_steps,
            "widened_extra_s": extra,
            "wall_s": wall,
            "steps": driver.progress.step,
            "full_step_predicted_s": full,
            "notice": driver.policy.notice(),
        }


# -- the log ----------------------------------------------------------------------------------


def gather(options: argparse.Namespace) -> None:
    """Run what is missing, full fine-tuning before, between and after."""
    torch.set_num_threads(options.threads)
    if options.clock == "cpu":
        time.perf_counter = time.process_time
    log: dict[str, Any] = {"machine": machine(options), "runs": []}
    if report.OVERHEAD.exists() and not options.fresh:
        log = json.loads(report.OVERHEAD.read_text("utf-8"))
    done = {(run["model"], run["spec"]) for run in log["runs"]}
    for make in SUBJECTS:
        subject = make()
        if options.models and subject.name not in options.models:
            continue
        found = default_specs(subject.name)
        todo = {
            name: spec
            for name, spec in found.items()
            if name != "full"
            and (subject.name, spec) not in done
            and (not options.only or name in options.only)
        }
        if not todo:
            continue
        bench = Bench(subject)
        bench.run("full")  # warm
        for count, (name, spec) in enumerate(todo.items()):
            if count % BASELINE_EVERY == 0:
                _keep(log, subject, "full", "full", bench.run("full"))
            _keep(log, subject, name, spec, bench.run(spec))
        _keep(log, subject, "full", "full", bench.run("full"))


def _keep(log: dict[str, Any], subject: Subject, name: str, spec: str, run: dict[str, Any]) -> None:
    row = {"model": subject.name, "title": subject.title, "policy": name, "spec": spec, **run}
    log["runs"].append(row)
    log["results"] = results(log["runs"])
    report.RESULTS.mkdir(exist_ok=True)
    text = json.dumps(log, indent=1) + "\n"
    report.OVERHEAD.write_text(text, "utf-8")
    found = next(r for r in log["results"] if (r["model"], r["spec"]) == (subject.name, spec))
    print(
        f"{subject.name} {spec}: {found['overhead']:.2%}, digests {found['digests']:.2%}, "
        f"run of {run['wall_s']:.1f} s",
        flush=True,
    )


# -- arithmetic -------------------------------------------------------------------------------


def results(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and policy: charges over the time of the same steps of full fine-tuning.

    That time is the median over all runs of full fine-tuning, without what the driver charged.
    """
    full: dict[str, list[float]] = {}
    for run in runs:
        if run["policy"] == "full":
            full.setdefault(run["model"], []).append(own_s(run) / run["steps"])
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        whole = statistics.median(full[run["model"]]) * run["steps"]
        # The cost model's seconds are worth what they are of its own full step.
        wide = run["widened_extra_s"] / (run["full_step_predicted_s"] * run["steps"])
        parts = {"decisions": "policy_s", "signals": "signals_s", "changes": "apply_s"}
        charges = {part: run[seconds] / whole for part, seconds in parts.items()}
        overhead = sum(charges.values()) + wide
        found[run["model"], run["spec"]] = {
            **{name: run[name] for name in ("model", "title", "policy", "spec", "notice")},
            **charges,
            "widened": wide,
            "overhead": overhead,
            "digests": run["digest_s"] / whole,
            "steps_of_full": own_s(run) / whole,
        }
    for row in found.values():
        # With the digests of what is frozen: frequent changes of plan are dear by them.
        same = [r["overhead"] + r["digests"] for r in found.values() if r["spec"] == row["spec"]]
        row["flag"] = flag(max(same), row["notice"])
    return list(found.values())


def own_s(run: dict[str, Any]) -> float:
    """Seconds of a run without what the driver took."""
    charged = run["policy_s"] + run["signals_s"] + run["apply_s"] + run["digest_s"]
    return run["wall_s"] - charged


def flag(overhead: float, notice: str) -> str:
    """What is wrong with the notice of a policy, by its overhead on the model where it is most."""
    if overhead > NOTICE_FROM and not notice:
        return f"costs more than {NOTICE_FROM:.0%} and says nothing"
    if overhead <= NOTICE_FROM and notice:
        return f"has a notice and never costs {NOTICE_FROM:.0%}"
    return ""


def drift(runs: list[dict[str, Any]], model: str) -> tuple[float, float]:
    """Fastest and slowest run of full fine-tuning over the median one."""
    took = [own_s(r) for r in runs if r["policy"] == "full" and r["model"] == model]
    middle = statistics.median(took)
    return min(took) / middle, max(took) / middle


def table(log: dict[str, Any]) -> str:
    """Markdown, from the log alone."""
    m = log["machine"]
    about = (
        "At default settings, of the time that full fine-tuning needs for the same steps: the "
        "policy's decisions, its signals, changes of plan, and backward passes through frozen "
        "groups for a signal ('widened', predicted from group costs). Digests, the proof of "
        f"freezing, are apart. torch {m['torch']}, {m['threads']} threads of {m['cores']} cores "
        f"({m['processor']}), {m['clock']} time. Made by `python benchmarks/policy_overhead.py` "
        "from `policy_overhead.json`."
    )
    head = (
        "| policy | overhead | decisions | signals | changes | widened | digests "
        "| own steps of full | |\n|---|---|---|---|---|---|---|---|---|"
    )
    lines = ["# What each policy itself costs", "", about]
    for model in dict.fromkeys(r["model"] for r in log["results"]):
        rows = [r for r in log["results"] if r["model"] == model]
        low, high = drift(log["runs"], model)
        lines += [
            "",
            f"## {rows[0]['title']}",
            "",
            f"Runs of full fine-tuning in between took {low:.2f} to {high:.2f} of their median.",
            "",
            head,
        ]
        for r in sorted(rows, key=lambda r: -r["overhead"]):
            parts = ("overhead", "decisions", "signals", "changes", "widened", "digests")
            cells = " | ".join(f"{r[part]:.2%}" for part in parts)
            lines.append(f"| `{r['spec']}` | {cells} | {r['steps_of_full']:.0%} | {r['flag']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these policies")
    parser.add_argument("--models", nargs="+", choices=("resnet20", "bert"))
    parser.add_argument("--fresh", action="store_true", help="forget the log")
    parser.add_argument("--log", type=Path, default=report.OVERHEAD)
    parser.add_argument("--report", action="store_true", help="no runs: tables and cards")
    options = parser.parse_args()
    if missing := unlisted():
        raise SystemExit(f"list these policies in specs.py, or excuse them: {', '.join(missing)}")
    report.OVERHEAD = options.log
    if not options.report:
        gather(options)
    log = json.loads(options.log.read_text("utf-8"))
    log["results"] = results(log["runs"])
    options.log.write_text(json.dumps(log, indent=1) + "\n", "utf-8")  # the cards read it
    text = table(log)
    options.log.with_suffix(".md").write_text(text, "utf-8")
    print(text)
    if options.report:
        report.write()


if __name__ == "__main__":
    main()
