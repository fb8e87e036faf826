"""Freezing policies inside one `model.fit` of Keras.

`FreezeCallback` translates between Keras's callbacks and a `frostline.Driver`; freezing itself is
`frostline.backends.keras.KerasBackend`. Plans change in the midst of `fit`, on every Keras backend,
without compiling the model again.

Example:
    ::

        from frostline.integrations.keras import FreezeCallback

        freezing = FreezeCallback("gradual:every=1ep")
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(x, y, epochs=5, validation_data=(vx, vy), callbacks=[freezing])
        freezing.certificate  # the proof of what stayed frozen
"""

from __future__ import annotations

import logging
import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from frostline.backends.keras.arrays import to_number
from frostline.backends.keras.backend import KerasBackend, OptimizerState, as_found
from frostline.backends.keras.checkpoint import save_checkpoint
from frostline.backends.keras.grouping import layer_groups
from frostline.backends.keras.optimizer import innermost
from frostline.cost import plan_line
from frostline.driver import Certificate, Driver
from frostline.errors import BackendError, PolicyError
from frostline.frontier.report import CacheReport
from frostline.groups import LayerGroups
from frostline.integrations.recording import About, Recording
from frostline.plan import FreezePlan
from frostline.policy import Decision, Policy
from frostline.registry import make_policy

__all__ = ["CheckpointCallback", "FreezeCallback", "RecordCallback", "SwitchCosts"]

_log = logging.getLogger("frostline")
#: So many changes of plan are seen before their price is judged.
_JUDGED_SWITCHES = 4
#: Steps whose middle value is the time of a step.
_TIMED_STEPS = 50


@dataclass(slots=True)
class SwitchCosts:
    """What changes of plan cost in a run: a step right after one traces and compiles.

    Attributes:
        switches: changes of plan that needed another train function than the one before.
        switch_s: seconds that the steps after them took beyond a usual step.
        step_s: seconds of a usual step (median of the newest); 0 until one was timed.
        steps: steps timed.
    """

    switches: int = 0
    switch_s: float = 0.0
    steps: int = 0
    _usual: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED_STEPS))

    @property
    def step_s(self) -> float:
        """Seconds of a usual step: the median of the newest."""
        return statistics.median(self._usual) if self._usual else 0.0

    @property
    def dwell_steps(self) -> int:
        """Steps that a plan must last, so that switching takes at most half of the time."""
        if not self.switches or not self.step_s:
            return 0
        return max(1, round(self.switch_s / self.switches / self.step_s))

    def note(self, seconds: float, *, switched: bool) -> None:
        """One step and how long it took."""
        self.steps += 1
        if switched:
            self.switches += 1
            self.switch_s += max(0.0, seconds - self.step_s)
        else:
            self._usual.append(seconds)


class FreezeCallback(keras.callbacks.Callback):
    """Runs a freezing policy in `model.fit`.

    One step of the policy is one optimizer update: of a model that accumulates gradients over N
    batches, N batches. With `steps_per_execution=k` the policy is asked every k updates.

    Metrics reach policies under the names that Keras logs ("loss", "val_loss", "val_accuracy");
    those of training also as "train_loss" and so on.

    `model.set_weights` by another callback (early stopping that writes the best weights back) ends
    the spans of what is held and begins new ones; any other write to a frozen variable fails.

    A second `fit` goes on where the first one ended. Afterwards the model stays as the last plan
    has it; `release` takes everything off it.

    Args:
        policy: a policy, or its short form, e.g. "gradual:every=1ep".
        groups: the layer groups, if you have them (policies by cost need measured ones).
        example: a batch to run the model on, to find its layer groups; made up if not given.
        total_steps: updates of the whole run; by default epochs times batches, as `fit` was told.
        steps_per_epoch: updates per epoch; by default as `fit` knows them.
        optimizer_state: "keep" or "release" what the optimizer remembers of frozen variables.
        fixed: names of variables that never train, whatever the policy.
        validation_freq: as given to `fit`: on other epochs the policy is not asked.
        on_decision: called with each change of plan after it was applied.
        verbose: 1 prints a line for each of them.

    Attributes:
        driver: the driver of the run; None before `fit`.
        switch_costs: what changes of plan cost so far.

    Raises:
        PolicyError: unknown policy or option; in `fit`, a policy that reads signals with
            `steps_per_execution` above 1 or accumulated gradients.
        BackendError: in `fit`, the optimizer lacks variables, or the callback served another model.
        FrozenTensorChanged: in `fit`, something wrote to a frozen variable.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="body"),
        ...                           keras.layers.Dense(2, name="head")])
        >>> model.compile("sgd", "mse")
        >>> freezing = FreezeCallback("gradual:every=1ep")
        >>> data = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
        >>> _ = model.fit(*data, batch_size=4, epochs=2, verbose=0, callbacks=[freezing])
        >>> [(d.step, sorted(d.plan.frozen)) for d in freezing.decisions]
        [(0, ['body']), (2, [])]
        >>> [(hold.tensor, hold.from_step, hold.to_step) for hold in freezing.certificate.holds]
        [('body/bias', 0, 2), ('body/kernel', 0, 2)]
    """

    def __init__(
        self,
        policy: str | Policy,
        *,
        groups: LayerGroups | None = None,
        example: Any = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        optimizer_state: OptimizerState = "keep",
        fixed: Collection[str] = (),
        validation_freq: int = 1,
        on_decision: Callable[[Decision], None] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        self.policy = make_policy(policy)
        self.groups = groups
        self.example = example
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.optimizer_state: OptimizerState = optimizer_state
        self.fixed = fixed
        self.validation_freq = validation_freq
        self.on_decision = on_decision
        self.verbose = verbose
        self.driver: Driver | None = None
        self.switch_costs = SwitchCosts()
        self._backend: KerasBackend | None = None
        self._served: weakref.ref[keras.Model] | None = None
        self._optimizer: Any = None
        self._resumed: _Resumed | None = None
        self._begun = False  # whether the run of the present `fit` has begun
        self._batches = 0  # of the update under way, complete
        self._counted = 0  # of all, as the optimizer counted last
        self._switched = False
        self._since = 0.0
        self._warned = False

    # -- what a run tells ----------------------------------------------------------------------

    @property
    def decisions(self) -> list[Decision]:
        """Every change of plan so far."""
        return [] if self.driver is None else self.driver.decisions

    @property
    def certificate(self) -> Certificate:
        """The spans in which tensors were held frozen; complete once `fit` has ended."""
        return Certificate() if self.driver is None else self.driver.certificate

    @property
    def plan(self) -> FreezePlan:
        """The plan in force."""
        return FreezePlan() if self.driver is None else self.driver.plan

    @property
    def retraces(self) -> int:
        """How many compiled functions were made for this run's plans so far."""
        return 0 if self._backend is None else self._backend.steps.built

    def backend_of(self, model: keras.Model) -> KerasBackend:
        """The backend for this model; made, and the optimizer built, at the first call.

        `fit` calls it by itself.

        Raises:
            BackendError: the model is not built or compiled, or another one than before.
        """
        optimizer = getattr(model, "optimizer", None)
        served = self._served() if self._served is not None else None
        if served is not None and served is not model:
            raise BackendError(
                f"train {model.name!r} with this callback",
                found=f"a callback that trained {served.name!r} before",
                fix="a FreezeCallback for each model",
            )
        if self._backend is None or optimizer is not self._optimizer:
            groups = self.groups if self._backend is None else self._backend.groups
            if groups is None and self.example is not None:
                groups = layer_groups(model, self.example)
            optimizer = _complete_optimizer(model, self.fixed)
            self._backend = KerasBackend(
                model, groups=groups, optimizer_state=self.optimizer_state, fixed=self.fixed
            )
            self._backend.on_switch = self._note_switch
            self._served, self._optimizer = weakref.ref(model), optimizer
        return self._backend

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """Updates per epoch and of the whole run, as the policy counts them; None if unknown."""
        if self.driver is None:
            return self.steps_per_epoch, self.total_steps
        return self.driver.steps_per_epoch, self.driver.total_steps

    def resume(
        self,
        state: Mapping[str, Any],
        lengths: tuple[int | None, int | None],
        metrics: Sequence[Any] = (),
    ) -> None:
        """Go on from this state at the next `fit`; `load_checkpoint` calls it.

        Args:
            state: of the driver.
            lengths: updates per epoch and of the whole run, as then.
            metrics: values of the model's metrics, for a run that was interrupted in an epoch.
        """
        self._resumed = _Resumed(dict(state), lengths, tuple(metrics))

    def release(self) -> None:
        """Take everything off the model but its `trainable` flags; it is Keras's alone again."""
        if self._backend is not None:
            self._backend.remove()
        self._backend = self._optimizer = None

    # -- Keras's side --------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Build the optimizer over all variables, before anything is frozen."""
        del logs
        self._check_form()
        self.backend_of(self._trained)
        self._begun = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin the run at the first epoch of a `fit`, when it is known which one that is."""
        del logs
        if not self._begun:
            self._begin(epoch)
            self._begun = True
            # Past `__setattr__`, which looks for layers and variables.
            self._trained.__dict__["set_weights"] = self._set_weights
        if self._resumed is not None:
            self._resumed.restore_metrics(self._trained)
            self._resumed = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Before the first batch of an update: ask the policy, apply its plan."""
        del batch, logs
        if self._batches == 0:
            self._running.begin_step()
        self._since = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """After the last batch of an update: count it, and look for writes to frozen tensors."""
        del logs
        self._time()
        self._batches += self._batches_run(batch)
        while self._batches >= self._per_update:
            self._batches -= self._per_update
            self._running.end_step()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Let the policy see the metrics."""
        if (epoch + 1) % self.validation_freq == 0:
            self._running.evaluated(_metrics(logs or {}))
        if self._running.plan.done:
            self._trained.stop_training = True

    def on_train_end(self, logs: Any = None) -> None:
        """Check everything that is frozen, and complete the proof."""
        del logs
        if not self._begun:  # a run taken up after its last epoch
            self._begin(self._known.get("epochs", 0))
            self._begun, self._resumed = True, None
        self._trained.__dict__.pop("set_weights", None)
        self._running.finish()

    # -- inside --------------------------------------------------------------------------------

    @property
    def _trained(self) -> keras.Model:
        """The model of the present `fit`."""
        if self.model is None:
            raise self._outside()
        return self.model

    @property
    def _known(self) -> Mapping[str, Any]:
        """What `fit` tells its callbacks: "epochs", and "steps" per epoch or None."""
        return self.params or {}

    @property
    def _running(self) -> Driver:
        if self.driver is None:
            raise self._outside()
        return self.driver

    def _outside(self) -> BackendError:
        return BackendError(
            "take a training step",
            found="a callback whose on_train_begin and on_epoch_begin were not called",
            fix="pass it in model.fit(callbacks=[...])",
        )

    @property
    def _per_update(self) -> int:
        """Batches of one optimizer update."""
        return innermost(self._trained.optimizer).gradient_accumulation_steps or 1

    def _check_form(self) -> None:
        """Refuse what would make a policy read nothing, or something else than it says."""
        if not self.policy.needs():
            return
        several = self._trained.steps_per_execution
        if several > 1:
            raise PolicyError(
                f"read the signals of {self.policy!r}",
                found=f"steps_per_execution={several}: updates that nothing can look into",
                fix="compile with steps_per_execution=1, or use a policy that reads no signals",
            )
        if self._per_update > 1:
            raise PolicyError(
                f"read the signals of {self.policy!r}",
                found="an optimizer that accumulates gradients: what it applies is never whole",
                fix="leave gradient_accumulation_steps out (a larger batch does the same), or use "
                "a policy that reads no signals",
            )

    def _begin(self, epoch: int) -> None:
        """A driver for this `fit`: a new one, or one that goes on."""
        state = self._state_to_go_on()
        lengths = self._lengths(epoch, 0 if state is None else state["step"])
        self._new_driver(lengths, state).start()
        self._counted = self._count()
        self._batches = self._counted % self._per_update

    def _state_to_go_on(self) -> dict[str, Any] | None:
        if self._resumed is not None:
            state = self._resumed.driver
        elif self.driver is not None:
            state = self.driver.state()
        else:
            return None
        if state["stage"] == "finished":
            # What is frozen now is held anew: between two fits weights are the user's.
            backend = self.backend_of(self._trained)
            held = FreezePlan.from_json(state["plan"]).held_tensors(backend.groups)
            digests = backend.fingerprint(held)
            state["held"] = {name: [digests[name], state["step"]] for name in sorted(held)}
            state["stage"] = "running"
        return state

    def _new_driver(
        self, lengths: tuple[int | None, int | None], state: dict[str, Any] | None
    ) -> Driver:
        backend = self.backend_of(self._trained)
        per_epoch, total = lengths
        self.driver = driver = Driver(
            self.policy,
            backend,
            total_steps=total,
            steps_per_epoch=per_epoch,
            on_decision=self._decided,
        )
        driver.automatic = bool(self.policy.needs())
        backend.sample_by(_sampler(driver) if driver.automatic else None)
        if state is not None:
            driver.restore(state)
        return driver

    def _set_weights(self, weights: Any) -> None:
        """What `model.set_weights` does in `fit`: the proof ends before it and goes on after it."""
        model = self._trained
        self.backend_of(model).steps.sync()
        self._running.finish()
        type(model).set_weights(model, weights)
        self._new_driver(self.lengths, self._state_to_go_on())

    def _lengths(self, epoch: int, done: int) -> tuple[int | None, int | None]:
        """Updates per epoch and in all; None where `fit` does not know."""
        if self._resumed is not None and self._resumed.lengths is not None:
            kept_per_epoch, kept_total = self._resumed.lengths
            return self.steps_per_epoch or kept_per_epoch, self.total_steps or kept_total
        batches, several = self._known.get("steps"), self._per_update
        per_epoch = self.steps_per_epoch
        if per_epoch is None and batches and batches % several == 0:
            per_epoch = batches // several
        total = self.total_steps
        if total is None and batches:
            total = done + (self._known["epochs"] - epoch) * batches // several
        return per_epoch, total

    def _batches_run(self, last: int) -> int:
        """Batches of the call of the train function that just ended."""
        several = self._trained.steps_per_execution
        known = self._known.get("steps")
        if several == 1:
            return 1
        if known:
            return min(several, known - (last + 1 - several))
        self.backend_of(self._trained).steps.sync()
        before, self._counted = self._counted, self._count()
        return self._counted - before

    def _count(self) -> int:
        """Batches that the optimizer has seen."""
        return int(to_number(innermost(self._trained.optimizer).variables[0]))

    def _decided(self, decision: Decision) -> None:
        if self.verbose:
            groups = self._running.backend.groups
            print(f"\nstep {decision.step}: {plan_line(groups, decision.plan)}", flush=True)
        if self.on_decision is not None:
            self.on_decision(decision)

    def _note_switch(self) -> None:
        self._switched = True

    def _time(self) -> None:
        seconds, switched = time.perf_counter() - self._since, self._switched
        self._switched = False
        costs = self.switch_costs
        if costs.steps == 0:  # the first step is traced with or without freezing
            costs.steps = 1
            return
        costs.note(seconds, switched=switched)
        often = costs.switches >= _JUDGED_SWITCHES and costs.dwell_steps > costs.steps / (
            costs.switches
        )
        if often and not self._warned:
            self._warned = True
            _log.warning(
                "%r changed what trains %d times in %d steps, and each change took as long as "
                "about %d steps: more time goes into switching than into training. Let plans last "
                "longer (every=...), or train with run_eagerly=True",
                self.policy,
                costs.switches,
                costs.steps,
                costs.dwell_steps,
            )


class CheckpointCallback(keras.callbacks.Callback):
    """Saves a checkpoint after every epoch of a `fit` under a `FreezeCallback`.

    Put it last in the list of callbacks, so that what the others do at the end of an epoch is
    saved. `load_checkpoint` puts the newest one back; its `extra` has the number of epochs done
    under "epoch".

    Args:
        folder: where the checkpoints of this run live.
        freezing: the callback of the run.
        every: save after each so many epochs, >= 1.
        keep: how many of the newest to keep, >= 2, or 0 for all.

    Raises:
        StorageError: in `fit`, when a checkpoint cannot be written.
    """

    def __init__(
        self, folder: str | Path, freezing: FreezeCallback, *, every: int = 1, keep: int = 2
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.freezing = freezing
        self.every = every
        self.keep = keep

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save."""
        del logs
        if self.model is not None and (epoch + 1) % self.every == 0:
            extra = {"epoch": epoch + 1}
            save_checkpoint(self.folder, self.model, self.freezing, extra=extra, keep=self.keep)


class RecordCallback(keras.callbacks.Callback):
    """Records a `fit` under a `FreezeCallback` in a folder, as `frostline fit` records its runs.

    `frostline show`, `report`, `runs` and `watch` read the folder, also while the run goes on:
    settings, layer groups, decisions with reasons and signals, metrics and costs of each epoch,
    the proof. A killed run leaves it readable. With `load_checkpoint` before `fit`, and this
    callback before `CheckpointCallback` in the list, a resumed run goes on in it.

    Metrics are those that Keras logs. Reports draw "val_accuracy"; a single metric of another
    name that ends in "_accuracy" is recorded under that name, too.

    Args:
        folder: of the run; made if need be.
        freezing: the callback of the run.
        data: name of the data, for people.
        settings: plain JSON, e.g. ``{"seed": 0, "lr": 1e-3}``; reports tell runs apart by it, and
            a run is gone on with only under the same.
        fresh: move an earlier run in the folder aside.

    Raises:
        ConfigError: settings that cannot be recorded; in `fit`, another run is in the folder.
        StorageError: in `fit`, another process records there, or a file cannot be written.
        BackendError: in `fit`, the `FreezeCallback` is not among its callbacks.

    Example:
        >>> import tempfile
        >>> from frostline.records import read_run
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="body"),
        ...                           keras.layers.Dense(2, name="head")])
        >>> model.compile("sgd", "mse")
        >>> freezing, folder = FreezeCallback("gradual:every=1ep"), tempfile.mkdtemp()
        >>> callbacks = [freezing, RecordCallback(folder, freezing)]
        >>> data = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
        >>> _ = model.fit(*data, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
        >>> run = read_run(folder)
        >>> run.finished, len(run.epochs), [d.step for d in run.decisions]
        (True, 2, [0, 2])
    """

    def __init__(
        self,
        folder: str | Path,
        freezing: FreezeCallback,
        *,
        data: str = "own data",
        settings: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.freezing = freezing
        self._about = About(data=data, settings=dict(settings or {}), loop="model.fit of Keras")
        self._fresh = fresh
        self._recording: Recording | None = None
        self._epoch = 0  # complete, as `fit` counts them
        self._attached = False  # in the present `fit`

    def tested(self, metrics: Mapping[str, float]) -> None:
        """Add what the model reached on test data, e.g. `model.evaluate(..., return_dict=True)`.

        Raises:
            BackendError: there was no `fit` yet.
        """
        self._made.tested(_with_accuracy({f"test_{n}": v for n, v in metrics.items()}))

    def cached(self, report: CacheReport) -> None:
        """Add what the cache did: the `report` that `frostline.frontier.keras.fit` gives back.

        Raises:
            BackendError: there was no `fit` yet.
        """
        self._made.cached(report)

    def on_train_begin(self, logs: Any = None) -> None:
        """What is charged to the run begins here."""
        del logs
        self._attached = False
        if self._recording is None:
            model = "" if self.model is None else self.model.name
            about = replace(self._about, model=model)
            self._recording = Recording(self.folder, about, fresh=self._fresh)
        self._recording.start_clock()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Know which epoch it is."""
        del logs
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Open the record at the first batch, when the run has begun; write what was decided."""
        del batch, logs
        self._followed()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write its metrics and costs."""
        found = _with_accuracy(
            {n: v for n, v in _metrics(logs or {}).items() if n.startswith(("train_", "val_"))}
        )
        recording = self._followed()
        recording.epoch(found, number=max(epoch, recording.epochs) + 1)

    def on_train_end(self, logs: Any = None) -> None:
        """Write the proof and the summary."""
        del logs
        self._followed().finish()

    @property
    def _made(self) -> Recording:
        if self._recording is None:
            raise self._outside("no fit that it recorded")
        return self._recording

    def _followed(self) -> Recording:
        """The record, up to what the driver did."""
        recording, driver = self._recording, self.freezing.driver
        if recording is None or driver is None or self.freezing.model is not self.model:
            raise self._outside("its FreezeCallback not among the callbacks of this fit")
        if self._attached:
            recording.follow(driver)
        else:
            # A fit that counts from 0 says nothing of epochs before it.
            recording.attach(driver, epochs=self._epoch or None, config=self._config())
            self._attached = True
        return recording

    def _config(self) -> dict[str, Any]:
        """What `fit` and `compile` were told, as far as Keras knows it."""
        known, optimizer = self.params or {}, getattr(self.model, "optimizer", None)
        return {
            "epochs": known.get("epochs"),
            "steps_per_epoch": known.get("steps"),
            "optimizer": type(optimizer).__name__,
            "learning_rate": None if optimizer is None else to_number(optimizer.learning_rate),
            "keras_backend": keras.backend.backend(),
        }

    def _outside(self, found: str) -> BackendError:
        return BackendError(
            f"record in {self.folder}",
            found=found,
            fix="model.fit(callbacks=[freezing, RecordCallback(folder, freezing)])",
        )


@dataclass(frozen=True, slots=True)
class _Resumed:
    """What a checkpoint gives a callback for the next `fit`.

    Attributes:
        driver: state of the driver.
        lengths: updates per epoch and in all, of the interrupted run.
        metrics: values of the model's metrics in the midst of an epoch, in order.
    """

    driver: dict[str, Any]
    lengths: tuple[int | None, int | None] | None = None
    metrics: tuple[Any, ...] = ()

    def restore_metrics(self, model: keras.Model) -> None:
        """After `fit` has reset them at the beginning of its first epoch, if that is under way."""
        per_epoch = None if self.lengths is None else self.lengths[0]
        variables = model.metrics_variables
        if not per_epoch or self.driver["step"] % per_epoch == 0:
            return
        if len(variables) != len(self.metrics):
            # TensorFlow makes metrics at the first batch; the other backends before it.
            _log.warning(
                "training metrics of the interrupted epoch are of its rest alone: the model had no "
                "metrics yet. Call model.test_on_batch(x, y) once before fit to keep them"
            )
            return
        for variable, value in zip(variables, self.metrics, strict=True):
            variable.assign(value)


def _complete_optimizer(model: keras.Model, fixed: Collection[str]) -> Any:
    """The model's optimizer; an unused one that lacks what was frozen by hand is made again.

    On JAX and torch `fit` builds it over what trains before any callback is asked.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built or not (as_found(model) - set(fixed)):
        return optimizer
    if to_number(innermost(optimizer).variables[0]) > 0:
        return optimizer  # in use: the backend says what it lacks, if anything
    model.optimizer = type(optimizer).from_config(optimizer.get_config())
    _log.info("the optimizer was built anew, over what is frozen, too: it had made no update")
    return model.optimizer


def _sampler(driver: Driver) -> Callable[..., None]:
    """Samples what the driver has due; keeps it no longer alive than others do."""
    known = weakref.ref(driver)

    def sample(loss: Any, *, overflow: bool) -> None:
        driver = known()
        if driver is not None:
            driver.sample(loss, overflow=overflow)

    return sample


def _metrics(logs: Mapping[str, Any]) -> dict[str, float]:
    """What Keras logged, and metrics of training under the names of the tasks, too."""
    found = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
    train = {f"train_{n}": v for n, v in found.items() if not n.startswith("val_")}
    return train | found


def _with_accuracy(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics, with the one accuracy of each side under its plain name, too.

    Example:
        >>> _with_accuracy({"val_loss": 1.0, "val_binary_accuracy": 0.5})["val_accuracy"]
        0.5
    """
    found = dict(metrics)
    for side in ("train_", "val_", "test_"):
        plain = f"{side}accuracy"
        others = [n for n in metrics if n.startswith(side) and n.endswith("_accuracy")]
        others = [n for n in others if "top_k" not in n]
        if plain not in found and len(others) == 1:
            found[plain] = float(metrics[others[0]])
    return found
