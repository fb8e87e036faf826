"""One process's share of a run: build everything, go on where the run is, save, finish.

A run may take several sessions. Each builds the same parts from the same settings, loads the
newest checkpoint, trains on, and leaves files of which each is whole or absent.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from frostline import _io
from frostline.backends.torch.checkpoint import (
    checkpoint_folders,
    checkpoint_step,
    load_checkpoint,
    save_checkpoint,
)
from frostline.backends.torch.example import Example
from frostline.backends.torch.freeze import torch_driver
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.driver import Certificate
from frostline.errors import DataError
from frostline.groups import GroupCost, LayerGroups
from frostline.policy import Decision
from frostline.study.records import RunRecorder, read_run
from frostline.tasks.config import RunConfig, dump_config
from frostline.tasks.folder import RunFolder, asked_settings
from frostline.tasks.loop import Listener, LoopState, Parts, TrainingLoop
from frostline.tasks.order import Batching
from frostline.tasks.resources import Interrupt, PeakMemory, pick_device
from frostline.tasks.setup import build_optimizer, build_policy, build_schedule, mixed_precision
from frostline.tasks.task import Split, Task, load_task

__all__ = ["OnEvent", "Session"]

_log = logging.getLogger("frostline")
_DRIVER_COSTS = ("policy_s", "signals_s", "apply_s", "digest_s")

#: Receives progress: a mapping with "kind" (start, step, epoch, decision, checkpoint, end).
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Session:
    """Trains a run in its locked folder until it is finished or interrupted.

    Args:
        config: the settings as asked.
        folder: the run's folder, claimed by this process.
        on_event: receives progress.
    """

    config: RunConfig
    folder: RunFolder
    on_event: OnEvent
    interrupt: Interrupt = field(init=False, default_factory=Interrupt)
    task: Task = field(init=False)
    groups: LayerGroups = field(init=False)
    parts: Parts = field(init=False)
    loop: TrainingLoop = field(init=False)
    recorder: RunRecorder = field(init=False)
    _started: float = field(init=False)
    _peak: PeakMemory = field(init=False)
    _carried: dict[str, float] = field(init=False, default_factory=dict)
    _best_steps: list[int] = field(init=False, default_factory=list)
    _epochs: list[Mapping[str, Any]] = field(init=False, default_factory=list)
    _saved: tuple[int, int] = field(init=False, default=(-1, -1))  # step, epochs evaluated
    _trained: bool = field(init=False, default=False)

    def run(self) -> dict[str, Any]:
        """Do the whole of it; the summary.

        Raises:
            KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
            FrostlineError: anything else that stops a run.
        """
        self._started = time.perf_counter()
        device = pick_device(self.config.device)
        self._peak = PeakMemory(device)
        for place in (self.folder.path, self.folder.checkpoints, self.folder.best):
            _io.sweep(place)
        self._prepare(device)
        self._resume()
        try:
            self._train()
            return self._finish()
        finally:
            self.recorder.close()

    # -- before training ---------------------------------------------------------------------

    def _prepare(self, device: torch.device) -> None:
        """Task, groups and training parts, the same in every session."""
        self.task = task = load_task(self.config)
        config = task.config
        model = task.model.to(device)
        example = _moved(task.example(), device)
        self.groups = self._measured(layer_groups(model, example, head=task.head), example)
        optimizer = build_optimizer(config, model, self.groups)
        batching = Batching(len(task.train), config.batch_size, config.accumulate)
        driver = torch_driver(
            model,
            optimizer,
            build_policy(config),
            total_epochs=config.epochs,
            steps_per_epoch=batching.steps_per_epoch,
            groups=self.groups,
            optimizer_state=config.optimizer_state,
        )
        scheduler = build_schedule(config, optimizer, driver.progress)
        forward, scaler = mixed_precision(config, device)
        self.parts = Parts(model, optimizer, scheduler, driver, device, forward, scaler)
        listener = Listener(self._updated, self._evaluated, self._checkpoint)
        self.loop = TrainingLoop(task, self.parts, batching, listener, self.interrupt)

    def _measured(self, groups: LayerGroups, example: Example) -> LayerGroups:
        """The groups with costs: measured by the first session, and kept by the later ones."""
        if self.folder.asked() is not None:
            header = read_run(self.folder.path).header
            self._check_data(header["data"])
            costs = header["costs"]["groups"]
            return groups.with_costs({name: GroupCost(**cost) for name, cost in costs.items()})
        start = time.perf_counter()
        measured = measure_costs(self.task.model, groups, example)
        self._carried["measure_s"] = time.perf_counter() - start
        return measured

    def _check_data(self, recorded: Mapping[str, Any]) -> None:
        if recorded != (here := _data_facts(self.task)):
            changed = next(name for name in here if here[name] != recorded.get(name))
            raise DataError(
                f"go on with the run in {self.folder.path}",
                found=f"other data than when it started: {changed} differs",
                fix="bring back the data of the start, or start over: fresh=True (--fresh)",
            )

    def _resume(self) -> None:
        """Go on from the newest checkpoint, or from the start."""
        driver, first = self.parts.driver, self.folder.asked() is None
        extra = load_checkpoint(
            self.folder.checkpoints,
            model=self.parts.model,
            optimizer=self.parts.optimizer,
            scheduler=self.parts.scheduler,
            scaler=self.parts.scaler,
            driver=driver,
            streams=(),
        )
        if extra is not None:
            self.loop.state = LoopState.from_json(extra["loop"])
            self._carried = dict(extra["costs"])
            self._best_steps = list(extra["best_steps"])
            self._trained = extra["trained"]
        keep = extra["record_lines"] if extra is not None else int(not first)
        self.recorder = RunRecorder(self.folder.record, keep=keep)
        if first:
            _io.atomic_write_text(self.folder.config, dump_config(self.task.config))
            self.recorder.header(self._about(), costs=self._environment())
        self._epochs = list(read_run(self.folder.path).epochs)
        driver.on_decision = self._decided
        self._announce(resumed=not first)

    def _about(self) -> dict[str, Any]:
        return {
            "asked": asked_settings(self.config),
            "config": self.task.config.model_dump(mode="json", exclude={"output"}),
            "data": _data_facts(self.task),
            "labels": list(self.task.labels),
            "notes": dict(self.task.notes),
            "groups": {g.name: g.parameter_count for g in self.groups},
            "head": sorted(self.groups.head),
        }

    def _environment(self) -> dict[str, Any]:
        return {
            "torch": str(torch.__version__),
            "device": str(self.parts.device),
            "threads": torch.get_num_threads(),
            "groups": {g.name: asdict(g.cost) for g in self.groups if g.cost is not None},
            "measure_s": self._carried.get("measure_s", 0.0),
        }

    def _announce(self, *, resumed: bool) -> None:
        state, driver = self.loop.state, self.parts.driver
        if not resumed:
            _log.info("new run in %s", self.folder.path)
        plan = driver.start()  # a new driver says its first plan by itself
        if resumed:
            _log.info("going on in %s after update %d", self.folder.path, state.step)
            _log.info("step %d: %s", state.step, plan.summary(self.groups))
        self.on_event(
            {
                "kind": "start",
                "path": str(self.folder.path),
                "resumed": resumed,
                "step": state.step,
                "total_steps": driver.total_steps,
                "epochs": self.task.config.epochs,
                "plan": plan.summary(self.groups),
            }
        )

    # -- while training ----------------------------------------------------------------------

    def _train(self) -> None:
        try:
            with self.interrupt:
                self.loop.run()
        except KeyboardInterrupt:
            if self.interrupt.asked:  # else it may have come in the middle of an update
                self._checkpoint()
                _log.warning("interrupted; the same command goes on from here")
            raise

    def _updated(self, loss: float) -> None:
        state, driver = self.loop.state, self.parts.driver
        rate = max(float(group["lr"]) for group in self.parts.optimizer.param_groups)
        self.on_event(
            {
                "kind": "step",
                "step": state.step,
                "total_steps": driver.total_steps,
                "epoch": state.evaluated + 1,
                "loss": loss,
                "lr": rate,
            }
        )

    def _decided(self, decision: Decision) -> None:
        self.recorder.decision(decision)
        summary = decision.plan.summary(self.groups)
        event = {"kind": "decision", "step": decision.step, "plan": summary}
        self.on_event(event | {"reason": decision.plan.reason})

    def _evaluated(self, metrics: dict[str, float], better: bool) -> None:
        state = self.loop.state
        if better:
            save_checkpoint(self.folder.best, model=self.parts.model, step=state.step, keep=0)
        costs = {"wall_s": self._wall_s(), "peak_memory_bytes": self._peak_bytes()}
        self.recorder.epoch(state.evaluated, state.step, metrics, costs=costs)
        line = {"epoch": state.evaluated, "step": state.step, "metrics": metrics, "costs": costs}
        self._epochs.append(line)
        _io.atomic_write_text(self.folder.metrics, _csv(self._epochs))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        _log.info("epoch %d: %s%s", state.evaluated, shown, " (best so far)" if better else "")
        self.on_event({"kind": "epoch", "better": better} | line)

    def _checkpoint(self) -> None:
        """Save everything; nothing when this very place is saved already."""
        state = self.loop.state
        if (state.step, state.evaluated) == self._saved:
            return
        self.recorder.sync()
        keep = max(2, self.task.config.keep_checkpoints)
        steps = [*self._best_steps, state.best.step] if state.best else self._best_steps
        self._best_steps = steps[-keep:]
        path = save_checkpoint(
            self.folder.checkpoints,
            model=self.parts.model,
            optimizer=self.parts.optimizer,
            scheduler=self.parts.scheduler,
            scaler=self.parts.scaler,
            driver=self.parts.driver,
            extra={
                "loop": state.to_json(),
                "record_lines": self.recorder.count,
                "best_steps": self._best_steps,
                "trained": self._trained,
                "costs": self._costs(),
            },
            step=state.step,
            keep=keep,
        )
        self._saved = (state.step, state.evaluated)
        self._prune_best()
        self.on_event({"kind": "checkpoint", "step": state.step, "path": str(path)})

    def _prune_best(self) -> None:
        """Remove best weights that no kept checkpoint refers to any more."""
        if not self._best_steps:
            return
        for old in checkpoint_folders(self.folder.best):
            if checkpoint_step(old) < min(self._best_steps):
                _io.discard(old)

    # -- costs -------------------------------------------------------------------------------

    def _wall_s(self) -> float:
        return self._carried.get("wall_s", 0.0) + time.perf_counter() - self._started

    def _peak_bytes(self) -> int:
        return max(int(self._carried.get("peak_memory_bytes", 0)), self._peak.read())

    def _costs(self) -> dict[str, float]:
        """What the run cost so far, over all its sessions."""
        costs = {
            name: self._carried.get(name, 0.0) + getattr(self.parts.driver.costs, name)
            for name in _DRIVER_COSTS
        }
        return costs | {
            "wall_s": self._wall_s(),
            "peak_memory_bytes": self._peak_bytes(),
            "measure_s": self._carried.get("measure_s", 0.0),
        }

    # -- after training ----------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        """Prove, restore the best, test once, save the model; the summary is the last file.

        The checkpoint comes first: from here on no session trains this run again.
        """
        certificate = self.parts.driver.finish()
        if not self._trained:
            self._trained, self._saved = True, (-1, -1)
            self._checkpoint()
        self.recorder.certificate(certificate, sha256=self._write_certificate(certificate))
        tested = self._test()
        self._save_model(tested)
        results, costs = self._results(tested), self._costs()
        updates = max(1, self.loop.state.step)
        costs["backward_share"] = self.loop.state.backward_share_sum / updates
        self.recorder.end(results, costs=costs)
        summary = results | costs
        _io.atomic_write_json(self.folder.summary, summary)
        _log.info("finished: %s", self.folder.path)
        self.on_event({"kind": "end", "path": str(self.folder.path), "summary": summary})
        return summary

    def _write_certificate(self, certificate: Certificate) -> str:
        content = {"format": 1, "holds": certificate.to_json()}
        text = _io.canonical_json(content)
        _io.atomic_write_bytes(self.folder.certificate, text + b"\n")
        return hashlib.sha256(text + b"\n").hexdigest()

    def _test(self) -> dict[str, float]:
        """Metrics of the best weights on the test split."""
        if best := self.loop.state.best:
            load_checkpoint(self.folder.best, model=self.parts.model, step=best.step, streams=())
        measured = self.loop.evaluate(self.task.test)
        return {f"test_{name}": value for name, value in measured.items()}

    def _save_model(self, tested: Mapping[str, float]) -> None:
        best = self.loop.state.best
        metrics = dict(tested)
        if best is not None:
            metrics |= {"val_accuracy": best.val_accuracy, "val_loss": best.val_loss}
        if os.path.lexists(self.folder.model):  # a session was killed between here and the end
            _io.discard(self.folder.model)
        with _io.atomic_folder(self.folder.model, kind="frostline model 1") as draft:
            write = self.task.save_model
            _io.disk.produce(draft, lambda place: write(place, self.parts.model, metrics=metrics))

    def _results(self, tested: Mapping[str, float]) -> dict[str, Any]:
        """What came out, free of clock and machine."""
        state = self.loop.state
        best = {} if state.best is None else asdict(state.best)
        return {
            "val_accuracy": best.get("val_accuracy"),
            "val_loss": best.get("val_loss"),
            **tested,
            "trained_parameter_share": state.trained_share_sum / max(1, state.step),
            "epochs_run": state.evaluated,
            "best_epoch": best.get("epoch"),
            "steps": state.step,
            "stopped_early": state.stopped_early,
            "decisions": len(self.parts.driver.decisions),
            "certificate_ok": True,  # finish() raised otherwise
        }


def _moved(example: Example, device: torch.device) -> Example:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return replace(
        example,
        args=tuple(move(value) for value in example.args),
        kwargs={name: move(value) for name, value in example.kwargs.items()},
    )


def _data_facts(task: Task) -> dict[str, Any]:
    """Size and digest of the labels of each split: enough to notice that data was exchanged."""

    def facts(split: Split) -> dict[str, Any]:
        text = ",".join(str(label) for label in split.labels)
        return {"samples": len(split), "labels_sha256": hashlib.sha256(text.encode()).hexdigest()}

    return {"train": facts(task.train), "val": facts(task.val), "test": facts(task.test)}


def _csv(epochs: list[Mapping[str, Any]]) -> str:
    names = list(epochs[0]["metrics"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["epoch", "step", *names, "wall_s"])
    for line in epochs:
        values = [line["metrics"][name] for name in names]
        writer.writerow([line["epoch"], line["step"], *values, round(line["costs"]["wall_s"], 3)])
    return out.getvalue()
