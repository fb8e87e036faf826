"""Run folders with records made up by hand: any groups, plans and figures, in milliseconds."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frostline import _io
from frostline.driver import Certificate, Hold
from frostline.plan import FreezePlan
from frostline.policy import Decision
from frostline.records import RunRecorder
from frostline.tasks.config import RunConfig
from frostline.tasks.folder import asked_settings

COST = {"forward_s": 1.0, "input_grad_s": 1.0, "weight_grad_s": 1.0, "optimizer_s": 0.0,
        "activation_bytes": 10, "frozen_forward_s": None}  # fmt: skip
#: What must never become markup, script or a link, nor steer a terminal.
HOSTILE = (
    "</script><script>window.owned=1</script>",
    '"><img src=x onerror="window.owned=2">',
    "' onmouseover='window.owned=3",
    "javascript:window.owned=4",
    "line\u2028separator\u2029and\nnewline",
    "<!--<script>",
    "{{7*7}}${7*7}{% raw %}",
    "\x1b[31mred\x07\u202eetxt.exe",
    "=cmd|' /C calc'!A0",
    "]]>&amp;&lt;",
    'datum"] || (window.owned=5) || ["',
)


def plan(*frozen: str, reason: str = "", **more: Any) -> FreezePlan:
    """A plan that freezes these groups."""
    return FreezePlan(frozen=frozenset(frozen), reason=reason, **more)


def write_run(
    folder: Path,
    *,
    policy: str = "full",
    seed: int = 0,
    groups: Mapping[str, int] | None = None,
    decisions: Sequence[Decision] = (),
    accuracies: Sequence[float] = (0.5, 0.75),
    steps_per_epoch: int = 10,
    step_s: float = 0.1,
    finished: bool = True,
    labels: Sequence[str] = ("cat", "dog"),
    predictions: Sequence[tuple[int, int, float]] = ((0, 0, 0.9), (1, 0, 0.8), (1, 1, 0.7)),
    settings: Mapping[str, Any] | None = None,
    costs: Mapping[str, Any] | None = None,
    val_samples: int | None = None,
) -> Path:
    """A run folder as `fit` leaves it, but for model and checkpoints."""
    groups = groups or {"stem": 10, "body": 70, "head": 20}
    given = {"model": "timm:net", "data": "photos", "policy": policy, "seed": seed}
    config = RunConfig(**given | dict(settings or {}))
    folder.mkdir(parents=True)
    recorder = RunRecorder(folder / "record.jsonl")
    recorder.header(
        {
            "asked": asked_settings(config),
            "config": config.model_dump(mode="json", exclude={"output"}),
            "data": {
                name: {"samples": samples, "content_sha256": "00"}
                for name, samples in (("val", val_samples), ("test", len(predictions)))
                if samples is not None
            },
            "labels": list(labels),
            "notes": {},
            "groups": dict(groups),
            "depths": list(groups),
            "head": [list(groups)[-1]],
        },
        costs={"device": "cpu", "torch": "2", "groups": dict.fromkeys(groups, COST)},
    )
    for decision in decisions or (Decision(0, plan(reason="everything trains")),):
        recorder.decision(decision)
    steps = steps_per_epoch * len(accuracies)
    for epoch, accuracy in enumerate(accuracies, start=1):
        spent = step_s * steps_per_epoch * epoch
        recorder.epoch(
            epoch,
            steps_per_epoch * epoch,
            {"train_loss": 1 / epoch, "val_loss": 1.5 / epoch, "val_accuracy": accuracy},
            costs={"wall_s": spent + 1, "training_s": spent, "peak_memory_bytes": 2**30},
        )
    if finished:
        held = (Hold(f"{next(iter(groups))}.w", "ab" * 32, 0, steps),)
        text = _io.canonical_json({"format": 1, "holds": Certificate(held).to_json()}) + b"\n"
        (folder / "certificate.json").write_bytes(text)
        recorder.certificate(Certificate(held, 0.01), sha256=hashlib.sha256(text).hexdigest())
        best = max(range(len(accuracies)), key=lambda i: accuracies[i])
        results = {
            "val_accuracy": accuracies[best],
            "test_accuracy": accuracies[best] - 0.02,
            "trained_parameter_share": 0.5,
            "epochs_run": len(accuracies),
            "best_epoch": best + 1,
            "steps": steps,
            "certificate_ok": True,
        }
        spent = {
            "wall_s": step_s * steps + 2,
            "training_s": step_s * steps,
            "peak_memory_bytes": 2**30,
            "backward_share": 0.4,
            "policy_s": 0.01,
            "signals_s": 0.02,
            "signal_s": {"gradient_l2": 0.02},
            "apply_s": 0.01,
            "digest_s": 0.01,
            "measure_s": 0.5,
            **(costs or {}),
        }
        recorder.end(results, costs=spent)
        lines = [f"{i},{label},{found},{p}" for i, (label, found, p) in enumerate(predictions)]
        text = "\n".join(["index,label,predicted,probability", *lines]) + "\n"
        (folder / "predictions.csv").write_text(text)
        (folder / "summary.json").write_text(json.dumps(results | spent))
    recorder.close()
    return folder


def write_study(
    folder: Path, arms: Mapping[str, Sequence[float]], *, margin: float = 0.01, **more: Any
) -> Path:
    """A study: accuracy by arm and seed; the first arm is the reference and twice as slow."""
    for arm, accuracies in arms.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(
                folder / "runs" / arm / f"seed-{seed}",
                policy=arm,
                seed=seed,
                accuracies=(accuracy / 2, accuracy),
                step_s=0.2 if arm == next(iter(arms)) else 0.1,
                **more,
            )
    count = len(next(iter(arms.values())))
    spec = {
        "format": 1,
        "settings": {"model": "timm:net", "data": "photos", "epochs": 2},
        "arms": [
            {"name": arm, "policy": arm, "settings": {}, "control": None, "of": ""} for arm in arms
        ],
        "seeds": list(range(count)),
        "reference": next(iter(arms)),
        "margin": margin,
        "level": 0.95,
    }
    (folder / "study.json").write_text(json.dumps(spec))
    return folder


def write_curve(
    folder: Path, policies: Mapping[str, Mapping[int, Sequence[float | None]]], *, policy: str = ""
) -> Path:
    """A learning curve: accuracy by policy, training samples and seed; None is not run.

    Args:
        folder: of the study.
        policies: accuracies.
        policy: short form of all of them, where names are no short forms.
    """
    arms = []
    for name, sizes in policies.items():
        for size, accuracies in sizes.items():
            arm, own = f"{name}@{size}", policy or name
            settings = {"train_samples": size}
            arms.append(
                {"name": arm, "policy": own, "settings": settings, "control": None, "of": ""}
            )
            for seed, accuracy in enumerate(accuracies):
                if accuracy is not None:
                    place = folder / "runs" / arm / f"seed-{seed}"
                    scores = (accuracy / 2, accuracy)
                    write_run(
                        place,
                        policy=own,
                        seed=seed,
                        accuracies=scores,
                        settings=settings,
                        val_samples=50,
                    )
    spec = {
        "format": 1,
        "settings": {"model": "timm:net", "data": "photos", "epochs": 2},
        "arms": arms,
        "seeds": list(range(max(len(a) for of in policies.values() for a in of.values()))),
        "reference": arms[0]["name"],
        "margin": 0.01,
        "level": 0.95,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(spec))
    return folder


def rewrite_records(folder: Path, change: Callable[[dict[str, Any], str, int], None]) -> None:
    """Change every line of the records of a study, given the arm and the seed."""
    for file in folder.glob("runs/*/*/record.jsonl"):
        arm, seed = file.parts[-3], int(file.parts[-2].removeprefix("seed-"))
        lines = _io.read_lines(file).records
        for line in lines:
            change(line, arm, seed)
        file.unlink()
        out = _io.JsonLines(file)
        for line in lines:
            out.append(line)
        out.close()


def hostile_run(folder: Path) -> Path:
    """A run in which every foreign name and text is hostile."""
    groups = {name: 10 + i for i, name in enumerate(HOSTILE)}
    first, *others = HOSTILE
    decisions = [
        Decision(
            5 * i,
            plan(*HOSTILE[: i % len(HOSTILE)], reason=text, lr_scale={HOSTILE[-1]: 0.5}),
            signals={text: dict.fromkeys(HOSTILE, 0.5)},
            metrics={text: 0.25},
        )
        for i, text in enumerate(HOSTILE)
    ]
    run = write_run(
        folder,
        groups=groups,
        decisions=decisions,
        accuracies=(0.1,) * 8,
        labels=HOSTILE,
        predictions=[(i, (i + 1) % len(HOSTILE), 0.9) for i in range(len(HOSTILE))],
        settings={"model": first, "data": others[0]},
        costs={"cache": {"notes": list(HOSTILE), "batches": 0}},
    )
    finding = {"kind": first, "strength": others[0], "evidence": [{"says": t} for t in HOSTILE],
               "action": {"text": others[1]}, "gain": others[2]}  # fmt: skip
    told = json.dumps({"sentence": HOSTILE[4], "findings": [finding]})
    (run / "diagnosis.json").write_text(told)
    points = [probe(name, depth) for depth, name in enumerate(HOSTILE)]
    (run / "probes.json").write_text(
        json.dumps({"format": 1, "points": points, "head_input": None, "commonest": 0.2})
    )
    return run


def probe(group: str, depth: int) -> dict[str, Any]:
    """A point of a probe curve, as its JSON has it."""
    return {"group": group, "depth": depth, "val_accuracy": 0.5 + depth / 100,
            "accuracy_interval": [0.4, 0.7]}  # fmt: skip


def large_run(folder: Path, *, seed: int, groups: int = 100, decisions: int = 1000) -> Path:
    """A run with many groups and decisions, each of which freezes half of the groups anew."""
    source = random.Random(seed)
    names = [f"encoder.layer.{i}.attention" for i in range(groups)]
    made = [
        Decision(
            10 * i,
            plan(
                *source.sample(names, groups // 2),
                reason=f"decision {i}: the signal of {source.choice(names)} fell below its limit",
            ),
            signals={"update_ratio": {name: source.random() for name in names}},
        )
        for i in range(decisions)
    ]
    return write_run(
        folder,
        policy="lisa",
        seed=seed,
        groups=dict.fromkeys(names, 1000),
        decisions=made,
        accuracies=[0.5 + i / 100 for i in range(20)],
        steps_per_epoch=decisions * 10 // 20,
    )
