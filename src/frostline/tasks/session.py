"""One process's share of a run: go on where the run is, save on the way, finish.

A run may take several sessions. Each builds the same parts from the same settings, loads the
newest checkpoint, trains on, and leaves files of which each is whole or absent.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from frostline import _io
from frostline.backends.torch.checkpoint import (
    Held,
    checkpoint_folders,
    checkpoint_step,
    load_checkpoint,
    save_checkpoint,
)
from frostline.cost import plan_line, trained_share
from frostline.driver import Certificate
from frostline.errors import ConfigError, StorageError
from frostline.integrations.trackers import Status, check_installed
from frostline.plan import FreezePlan
from frostline.policies.phases import ends_its_phase
from frostline.policy import Decision
from frostline.records import RunRecorder, read_run, write_certificate
from frostline.tasks.config import RunConfig, budget_bytes, dump_config
from frostline.tasks.first_look import (
    first_look,
    foretold,
    measured_signals,
    samples_within,
    wanted,
)
from frostline.tasks.folder import RunFolder, asked_settings
from frostline.tasks.foretell import Outlook, foretell_limits
from frostline.tasks.loop import Listener, LoopState, TrainingLoop
from frostline.tasks.meter import CostMeter
from frostline.tasks.prepare import EXAMPLES, Prepared, prepare
from frostline.tasks.resources import Interrupt, pick_device
from frostline.tasks.tracking import RunTracking
from frostline.text import seconds_text

__all__ = ["OnEvent", "Session", "run_session"]

_log = logging.getLogger("frostline")

#: Shares of a time budget that the forward passes of a look at the data, and foretelling what
#: training takes, may have. Preparing samples and fitting probes takes about as long again.
_LOOK_SHARE, _OUTLOOK_SHARE = 0.08, 0.05
#: Receives progress: a mapping with "kind" (start, step, epoch, decision, checkpoint, end).
OnEvent = Callable[[dict[str, Any]], None]


def run_session(
    config: RunConfig, folder: RunFolder, on_event: OnEvent, *, pause_after: int | None = None
) -> None:
    """Train the run in its claimed folder until it is finished, paused or interrupted.

    Args:
        config: the settings as asked.
        folder: the run's folder, claimed by this process.
        on_event: receives progress.
        pause_after: leave the run unfinished once so many epochs are complete.

    Raises:
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        FrostlineError: anything else that stops a run.
    """
    check_installed(config.trackers)
    device = pick_device(config.device)
    meter = CostMeter(device)
    for place in (folder.path, folder.checkpoints, folder.best):
        _io.sweep(place)
    session = Session(folder, prepare(config, folder, device), meter, on_event)
    status: Status = "failed"
    try:
        session.resume(config)
        done = session.train(pause_after=pause_after)
        if done:
            session.finish()
        status = "finished" if done else "unfinished"
    except KeyboardInterrupt:
        status = "unfinished"
        raise
    finally:
        session.close(status)


@dataclass(slots=True)
class Session:
    """The moving parts of one session. `resume`, `train` and `finish` are called in this order.

    Args:
        folder: the run's folder.
        prepared: what it trains with.
        meter: what it costs.
        on_event: receives progress.
    """

    folder: RunFolder
    prepared: Prepared
    meter: CostMeter
    on_event: OnEvent
    loop: TrainingLoop = field(init=False)
    recorder: RunRecorder = field(init=False)
    first_look_s: float = field(init=False, default=0.0)
    tracking: RunTracking | None = field(init=False, default=None)
    _interrupt: Interrupt = field(init=False, default_factory=Interrupt)
    _epochs: list[Mapping[str, Any]] = field(init=False, default_factory=list)
    _best_steps: list[int] = field(init=False, default_factory=list)  # of the kept checkpoints
    _saved: tuple[int, int] = field(init=False, default=(-1, -1))  # step, epochs evaluated
    _trained: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        p = self.prepared
        listener = Listener(self._updated, self._best, self._evaluated, self._checkpoint)
        self.loop = TrainingLoop(p.task, p.parts, p.batching, listener, self._interrupt)

    # -- before training ---------------------------------------------------------------------

    def resume(self, config: RunConfig) -> None:
        """Go on from the newest checkpoint, or from the start."""
        parts, first = self.prepared.parts, self.folder.asked() is None
        extra = load_checkpoint(
            self.folder.checkpoints,
            model=parts.model,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            scaler=parts.scaler,
            driver=parts.driver,
            streams=(),  # the loop seeds every update by itself
        )
        if extra is not None:
            self.loop.state = LoopState.from_json(extra["loop"])
            self.loop.state.spent_s = extra["costs"]["training_s"]
            if (total := self.loop.state.total_steps) is not None:
                parts.driver.total_steps = total
                parts.driver.progress = replace(parts.driver.progress, total_steps=total)
            self.meter.carried = extra["costs"]
            if parts.savings is not None:
                parts.savings.restore(extra["costs"].get("savings", {}))
            self._best_steps = extra["best_steps"]
            self._trained = extra["trained"]
        keep = extra["record_lines"] if extra is not None else int(not first)
        self.recorder = RunRecorder(self.folder.record, keep=keep)
        if first:
            _io.atomic_write_text(self.folder.config, dump_config(self.prepared.task.config))
            self.recorder.header(self.prepared.about(config), costs=self.prepared.environment())
        self._epochs = list(read_run(self.folder.path).epochs)
        parts.driver.on_decision = self._decided
        if extra is None:
            self._look_first()
        if config.trackers:
            asked = asked_settings(config)
            self.tracking = RunTracking(self.folder, config.trackers, asked, parts.driver)
        self._announce(resumed=not first)

    def _look_first(self) -> None:
        """Probe the data, solve the head and foretell costs, as policy and settings want it."""
        parts, task, groups = self.prepared.parts, self.prepared.task, self.prepared.groups
        probes, solve = wanted(task.config, parts.driver.policy)
        found: dict[str, Any] = {}
        costs: dict[str, Any] = {}
        measured: dict[str, Mapping[str, float]] = {}
        if probes or solve:
            most = self._budget_share_s(_LOOK_SHARE)
            look = first_look(
                task,
                parts.model,
                groups,
                parts.device,
                probes=probes,
                solve=solve,
                most_samples=None
                if most is None
                else samples_within(groups, most, measured_samples=EXAMPLES),
            )
            for note in look.notes:
                _log.info("first look: %s", note)
            _log.info("first look: the head is %s", look.head)
            found = {"head": look.head, "notes": list(look.notes), "probes": None}
            if (curve := look.curve) is not None:
                _log.info("first look: %s", curve.sentence())
                _io.atomic_write_json(self.folder.probes, curve.to_json())
                found["probes"] = curve.sentence()
            measured |= measured_signals(look.curve, groups)
            self.first_look_s += look.seconds_s
        if (outlook := self._outlook()) is not None:
            costs = {"foretold": outlook.signals}
            measured |= outlook.signals
            self.first_look_s += outlook.spent_s
        if found or costs:
            parts.driver.measured = measured
            costs["first_look_s"] = self.first_look_s
            self.recorder.first_look(found, costs=costs)
            self.loop.state.spent_s += self.first_look_s

    def _outlook(self) -> Outlook | None:
        """What the run has to expect at every depth, where its policy keeps to limits."""
        parts, config = self.prepared.parts, self.prepared.task.config
        times, memory = foretold(parts.driver.policy)
        if not (times or memory):
            return None
        self.meter.keep()  # foretelling starts the measuring of memory afresh
        outlook = foretell_limits(
            self.prepared.task,
            parts.model,
            self.prepared.groups,
            parts.device,
            measured_samples=EXAMPLES,
            times=times,
            most_bytes=budget_bytes(config) if memory else None,
            most_s=self._budget_share_s(_OUTLOOK_SHARE),
        )
        self.meter.keep(outlook.peak_bytes or 0)
        if memory and "peak_from_bytes" not in outlook.signals:
            raise ConfigError(
                f"keep memory within {config.memory_budget or 'a limit'}",
                found=f"a system that does not tell how much is in use on {parts.device}",
                fix="leave out the memory budget, or train on CUDA or on Linux",
            )
        _log.info("foretold at every depth in %s", seconds_text(outlook.spent_s))
        return outlook

    def _budget_share_s(self, share: float) -> float | None:
        """Seconds that are this share of the run's time budget; None where it has none."""
        allowance = self.prepared.parts.allowance
        budget = None if allowance is None else allowance.budget
        seconds = None if budget is None else budget.seconds
        return None if seconds is None else share * seconds

    def _announce(self, *, resumed: bool) -> None:
        step, driver = self.loop.state.step, self.prepared.parts.driver
        if not resumed:
            _log.info("new run in %s", self.folder.path)
        plan = driver.start()  # a new driver says its first plan by itself
        summary = plan_line(self.prepared.groups, plan)
        if resumed:
            _log.info("going on in %s after update %d", self.folder.path, step)
            _log.info("step %d: %s", step, summary)
        self.on_event(
            {
                "kind": "start",
                "path": str(self.folder.path),
                "resumed": resumed,
                "step": step,
                "total_steps": driver.total_steps,
                "epochs": self.loop.config.epochs,
                "plan": summary,
                "reason": plan.reason,
            }
            | self._frozen(plan)
        )

    def close(self, status: Status) -> None:
        """End what is open; harmless where nothing is."""
        if self.tracking is not None:
            self.tracking.close(status)
        if hasattr(self, "recorder"):  # absent when resuming failed
            self.recorder.close()

    # -- while training ----------------------------------------------------------------------

    def train(self, *, pause_after: int | None = None) -> bool:
        """Train to the end, or to a pause; on Ctrl-C save first. Whether it is the end."""
        cache = self.prepared.parts.cache
        try:
            with self._interrupt, nullcontext() if cache is None else cache.attached():
                self.loop.run(pause_after=pause_after)
        except KeyboardInterrupt:
            if self._interrupt.asked:  # else it may have come in the middle of an update
                self._checkpoint()
                _log.warning("interrupted; the same command goes on from here")
            raise
        if not self.loop.done:
            self._checkpoint()
            _log.info("paused in %s after %d epochs", self.folder.path, self.loop.state.evaluated)
        return self.loop.done

    def _updated(self, loss: float) -> None:
        state, parts = self.loop.state, self.prepared.parts
        event = {
            "kind": "step",
            "step": state.step,
            "total_steps": parts.driver.total_steps,
            "epoch": state.evaluated + 1,
            "loss": loss,
            "lr": max(float(group["lr"]) for group in parts.optimizer.param_groups),
            "saved_predicted_s": None if parts.savings is None else parts.savings.saved_s,
        }
        if self.tracking is not None:
            self.tracking.updated(event)
        self.on_event(event)

    def _decided(self, decision: Decision) -> None:
        self.recorder.decision(decision)
        summary = plan_line(self.prepared.groups, decision.plan)
        event = {"kind": "decision", "step": decision.step, "plan": summary}
        self.on_event(event | {"reason": decision.plan.reason} | self._frozen(decision.plan))

    def _frozen(self, plan: FreezePlan) -> dict[str, Any]:
        """How much is frozen, for people and trackers."""
        groups = self.prepared.groups
        return {
            "frozen_groups": len(plan.frozen),
            "groups": len(groups),
            "frozen_share": 1 - trained_share(groups, plan),
        }

    def _best(self) -> None:
        parts = self.prepared.parts
        save_checkpoint(
            self.folder.best,
            model=parts.model,
            step=self.loop.state.step,
            keep=0,
            held=Held(parts.driver.held, (self.folder.checkpoints,)),
        )

    def _evaluated(self, metrics: dict[str, float], better: bool) -> None:
        state = self.loop.state
        costs = {
            "wall_s": self.meter.wall_s,
            "training_s": state.spent_s,
            "peak_memory_bytes": self.meter.peak_memory_bytes,
        }
        if (savings := self.prepared.parts.savings) is not None:
            costs["full_predicted_s"] = savings.full_s
            costs["saved_predicted_s"] = savings.saved_s
        self.recorder.epoch(state.evaluated, state.step, metrics, costs=costs)
        line = {"epoch": state.evaluated, "step": state.step, "metrics": metrics, "costs": costs}
        self._epochs.append(line)
        _io.atomic_write_text(self.folder.metrics, _csv(self._epochs))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        _log.info("epoch %d: %s%s", state.evaluated, shown, " (best so far)" if better else "")
        if self.tracking is not None:
            self.tracking.evaluated(state.step, metrics, costs)
        self.on_event({"kind": "epoch", "better": better} | line)

    def _checkpoint(self) -> None:
        """Save everything; nothing when this very place is saved already."""
        state, parts = self.loop.state, self.prepared.parts
        if (state.step, state.evaluated) == self._saved:
            return
        self.recorder.sync()
        keep = max(2, self.loop.config.keep_checkpoints)
        steps = [*self._best_steps, state.best.step] if state.best else self._best_steps
        self._best_steps = steps[-keep:]
        path = save_checkpoint(
            self.folder.checkpoints,
            model=parts.model,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            scaler=parts.scaler,
            driver=parts.driver,
            extra={
                "loop": state.to_json(),
                "record_lines": self.recorder.count,
                "best_steps": self._best_steps,
                "trained": self._trained,
                "costs": self._costs(),
            },
            step=state.step,
            keep=keep,
            held=Held(parts.driver.held, (self.folder.best,)),
        )
        self._saved = (state.step, state.evaluated)
        self._prune_best()
        self.on_event({"kind": "checkpoint", "step": state.step, "path": str(path)})

    def _prune_best(self) -> None:
        """Remove best weights that no kept checkpoint refers to any more."""
        for old in checkpoint_folders(self.folder.best):
            if checkpoint_step(old) < min(self._best_steps, default=0):
                _io.discard(old)

    def _costs(self) -> dict[str, Any]:
        parts = self.prepared.parts
        costs = self.meter.read(
            parts.driver, measure_s=self.prepared.measure_s, first_look_s=self.first_look_s
        )
        costs["training_s"] = self.loop.state.spent_s
        if parts.savings is not None:
            costs["savings"] = parts.savings.to_json()
        return costs

    # -- after training ----------------------------------------------------------------------

    def finish(self) -> None:
        """Prove, restore the best, test once, save the model; the summary is the last file.

        The checkpoint comes first: from here on no session trains this run again.
        """
        driver = self.prepared.parts.driver
        certificate = driver.finish()
        if not self._trained:
            if ends_its_phase(driver.policy, self.prepared.groups, driver.plan):
                _log.warning("the run ended before its policy did: %s", driver.plan.reason)
            self._trained, self._saved = True, (-1, -1)
            self._checkpoint()
        sha256 = write_certificate(self.folder.certificate, certificate)
        self.recorder.certificate(certificate, sha256=sha256)
        tested = self._test()
        results = self._results(tested, certificate)
        self._save_model(results)
        costs = self._costs()
        if (cache := self.prepared.parts.cache) is not None:
            costs["cache"] = cache.costs()
            _log.info("%s", cache.frontier.report.sentence())
        costs["backward_share"] = self.loop.state.backward_share_sum / max(1, self.loop.state.step)
        self.recorder.end(results, costs=costs)
        summary = results | costs
        _io.atomic_write_json(self.folder.summary, summary)
        if self.tracking is not None:
            self.tracking.summary(self.loop.state.step, summary)
        _log.info("finished: %s", self.folder.path)
        self.on_event({"kind": "end", "path": str(self.folder.path), "summary": summary})

    def _test(self) -> dict[str, float]:
        """Metrics of the best weights on the test split; what they say of each sample is kept."""
        if best := self.loop.state.best:
            model, place = self.prepared.parts.model, self.folder.best
            if load_checkpoint(place, model=model, step=best.step, streams=()) is None:
                raise StorageError(
                    f"restore the best weights (update {best.step})",
                    found=f"none in {place}",
                    fix="bring the folder back, or start over: fresh=True (--fresh)",
                )
        lines = ["index,label,predicted,probability"]

        def see(scores: Tensor, labels: Tensor) -> None:
            sure, best = scores.float().softmax(dim=1).max(dim=1)
            for label, found, p in zip(labels.tolist(), best.tolist(), sure.tolist(), strict=True):
                lines.append(f"{len(lines) - 1},{label},{found},{p:.6g}")

        measured = self.loop.evaluate(self.prepared.task.test, see=see)
        _io.atomic_write_text(self.folder.predictions, "\n".join(lines) + "\n")
        return {f"test_{name}": value for name, value in measured.items()}

    def _save_model(self, results: Mapping[str, Any]) -> None:
        """The model as people load it, with a card of its figures."""
        shown = ("test_accuracy", "test_loss", "val_accuracy", "val_loss")
        metrics = {name: results[name] for name in shown if results.get(name) is not None}
        task, model = self.prepared.task, self.prepared.parts.model
        if os.path.lexists(self.folder.model):  # a session was killed between here and the end
            _io.discard(self.folder.model)
        with _io.atomic_folder(self.folder.model, kind="frostline model 1") as draft:
            _io.disk.produce(draft, lambda place: task.save_model(place, model, metrics=metrics))

    def _results(self, tested: Mapping[str, float], certificate: Certificate) -> dict[str, Any]:
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
            "policy_done": state.policy_done,
            "budget_spent": state.budget_spent,
            "decisions": len(self.prepared.parts.driver.decisions),
            "certificate_ok": certificate.covers(
                self.prepared.parts.driver.decisions, self.prepared.groups, end=state.step
            ),
        }


def _csv(epochs: list[Mapping[str, Any]]) -> str:
    names = list(epochs[0]["metrics"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["epoch", "step", *names, "wall_s"])
    for line in epochs:
        values = [line["metrics"][name] for name in names]
        writer.writerow([line["epoch"], line["step"], *values, round(line["costs"]["wall_s"], 3)])
    return out.getvalue()
