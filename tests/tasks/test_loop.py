"""The loop: exact positions, exact sums, and a stop that says why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.backends.torch.freeze import torch_driver
from frostline.clock import Duration
from frostline.driver import Driver
from frostline.errors import NonFiniteLoss
from frostline.groups import GroupCost, LayerGroup, LayerGroups, TensorInfo
from frostline.plan import FreezePlan
from frostline.policy import Event, EventKind, Policy, State
from frostline.signals import Need
from frostline.tasks.config import RunConfig
from frostline.tasks.loop import Best, Listener, LoopState, Parts, TrainingLoop
from frostline.tasks.order import Batching, derive_seed, epoch_order
from frostline.tasks.resources import Interrupt
from frostline.tasks.setup import build_optimizer, build_policy, build_schedule, mixed_precision
from frostline.tasks.task import Split, Task

CPU = torch.device("cpu")


class Collate:
    def collate(self, samples: list[Tensor]) -> tuple[Tensor]:
        return (torch.stack(samples),)


class Seen:
    """Samples as the loop asks for them: every (index, view) in order."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, int | None]] = []

    def __call__(self, raw: Tensor, index: int, view: int | None) -> Tensor:
        self.keys.append((index, view))
        return raw


def config(**settings: Any) -> RunConfig:
    given = {"model": "m", "data": "d", "lr": 0.05, "warmup": "0st", "policy": "full"}
    return RunConfig.model_validate({**given, "batch_size": 4, "epochs": 3, **settings})


def split(count: int, prepare: Any, seed: int, classes: int = 2) -> Split:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator)
    return Split(list(inputs), [i % classes for i in range(count)], prepare)


class Setting:
    """A loop over a two-layer network, with everything it tells its listener."""

    def __init__(self, model: nn.Module | None = None, count: int = 10, **settings: Any) -> None:
        torch.manual_seed(0)
        made = model or nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
        self.seen = Seen()
        chosen = config(**settings)
        splits = [split(count, self.seen, 1), split(6, self.seen, 2), split(6, self.seen, 3)]
        self.task = Task(
            "image", chosen, made, ("a", "b"), *splits, preparation=Collate(), spec={}
        )  # fmt: skip
        groups = groups_of(made)
        optimizer = build_optimizer(chosen, made, groups)
        batching = Batching(count, chosen.batch_size, chosen.accumulate)
        self.driver: Driver = torch_driver(
            made, optimizer, build_policy(chosen), groups=groups,
            total_epochs=chosen.epochs, steps_per_epoch=batching.steps_per_epoch,
        )  # fmt: skip
        schedule = build_schedule(chosen, optimizer, self.driver.progress)
        forward, scaler = mixed_precision(chosen, CPU)
        parts = Parts(made, optimizer, schedule, self.driver, CPU, forward, scaler)
        self.losses: list[float] = []
        self.epochs: list[Mapping[str, float]] = []
        self.better: list[bool] = []
        self.saved: list[int] = []
        self.interrupt = Interrupt()
        listener = Listener(self.losses.append, self._best, self._evaluated, self._checkpoint)
        self.loop = TrainingLoop(self.task, parts, batching, listener, self.interrupt)

    def _best(self) -> None:
        self.best = {n: w.clone() for n, w in self.loop.parts.model.state_dict().items()}

    def _evaluated(self, metrics: dict[str, float], better: bool) -> None:
        self.epochs.append(metrics)
        self.better.append(better)

    def _checkpoint(self) -> None:
        self.saved.append(self.loop.state.step)


def groups_of(model: nn.Module) -> LayerGroups:
    items = []
    for name, module in model.named_children():
        own = tuple(TensorInfo(f"{name}.{n}", tuple(p.shape)) for n, p in module.named_parameters())
        if own:
            items.append(LayerGroup(name, len(items), own, cost=GroupCost(1, 1, 1)))
    return LayerGroups(tuple(items))


def test_every_epoch_visits_every_sample_once_in_its_own_order_and_view():
    setting = Setting(epochs=3, patience=None)
    setting.loop.run()
    trained = [key for key in setting.seen.keys if key[1] is not None]
    for epoch in range(3):
        keys = trained[epoch * 10 : epoch * 10 + 10]
        assert [index for index, _ in keys] == epoch_order(0, epoch, 10)
        assert {view for _, view in keys} == {derive_seed(0, "view", epoch)}
    assert len(setting.losses) == setting.loop.state.step == 9
    assert setting.driver.progress.step == 9
    evaluated = [index for index, view in setting.seen.keys if view is None]
    assert evaluated == list(range(6)) * 3


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_loop_stopped_after_any_update_goes_on_with_the_same_bits(stop: int):
    straight = Setting(policy="gradual:every=4st", accumulate=2, count=18)
    straight.loop.run()

    first = Setting(policy="gradual:every=4st", accumulate=2, count=18)
    counted = first.loop.listener

    def updated(loss: float) -> None:
        counted.updated(loss)
        first.interrupt.asked = first.loop.state.step >= stop

    first.loop.listener = dataclasses.replace(counted, updated=updated)
    with pytest.raises(KeyboardInterrupt):
        first.loop.run()

    second = Setting(policy="gradual:every=4st", accumulate=2, count=18)
    torch.manual_seed(99)  # whatever the streams are, they do not matter
    second.task.model.load_state_dict(first.task.model.state_dict())
    second.loop.parts.optimizer.load_state_dict(first.loop.parts.optimizer.state_dict())
    second.loop.parts.scheduler.load_state_dict(first.loop.parts.scheduler.state_dict())
    second.driver.restore(first.driver.state())
    second.loop.state = LoopState.from_json(first.loop.state.to_json())
    second.loop.run()
    assert first.losses + second.losses == straight.losses
    assert first.epochs + second.epochs == straight.epochs
    assert second.loop.state == straight.loop.state
    for a, b in zip(straight.task.model.parameters(), second.task.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_batches_make_the_same_update_as_one():
    """Unequal batches and class weights included: the loss is one mean over the update."""
    losses, weights = [], []
    for batch_size, accumulate in ((9, 1), (3, 3), (2, 5)):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        setting = Setting(
            model, count=9, batch_size=batch_size, accumulate=accumulate, epochs=2,
            class_weights="balanced", optimizer="sgd",
        )  # fmt: skip
        torch.manual_seed(5)
        for p in model.parameters():
            nn.init.normal_(p)
        setting.loop.run()
        assert setting.loop.state.step == 2
        losses.append(setting.losses)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(weights[other], weights[0], rtol=1e-4, atol=1e-6)


def test_class_weights_balance_the_loss():
    model = nn.Sequential(nn.Linear(3, 2))
    setting = Setting(model, count=9, batch_size=9, class_weights="balanced", epochs=1)
    for p in model.parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    setting.loop.run()
    # 5 samples of class 0 and 4 of class 1 weigh the same in sum.
    each = [-math.log(math.exp(b) / (math.e + 1)) for b in (1.0, 0.0)]
    assert setting.losses[0] == pytest.approx(sum(each) / 2, rel=1e-6)
    assert setting.epochs[0]["train_loss"] == setting.losses[0]


def test_evaluation_is_exact_and_leaves_no_trace():
    setting = Setting()
    model, val = setting.task.model, setting.task.val
    metrics = setting.loop.evaluate(val)
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack(val.inputs))
    labels = torch.tensor(val.labels)
    assert metrics["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert all(p.grad is None for p in model.parameters())


def test_the_best_epoch_is_by_accuracy_then_loss():
    first = Best(1, 3, 0.5, 1.0)
    assert first.beats(None)
    assert Best(2, 6, 0.6, 9.0).beats(first)
    assert Best(2, 6, 0.5, 0.9).beats(first)
    assert not Best(2, 6, 0.5, 1.0).beats(first)
    assert not Best(2, 6, 0.4, 0.1).beats(first)
    assert not Best(2, 6, 0.5, math.nan).beats(first)
    assert Best(1, 3, 0.5, math.nan).beats(None)


def stub_metrics(setting: Setting, accuracies: list[float]) -> None:
    """Make the evaluations come out as given."""
    values = iter(accuracies)

    class Stubbed(TrainingLoop):
        __slots__ = ()

        def evaluate(self, split: Split) -> dict[str, float]:
            return {"loss": 1.0, "accuracy": next(values)}

    setting.loop.__class__ = Stubbed


def test_patience_counts_epochs_without_improvement():
    setting = Setting(epochs=9, patience=2)
    stub_metrics(setting, [0.1, 0.3, 0.2, 0.4, 0.4, 0.1, 0.9])
    setting.loop.run()
    state = setting.loop.state
    assert state.stopped_early
    assert state.evaluated == 6
    assert state.best == Best(4, 12, 0.4, 1.0)
    assert setting.better == [True, True, False, True, False, False]


def test_a_run_that_ends_as_patience_does_is_not_stopped_early():
    setting = Setting(epochs=3, patience=2)
    stub_metrics(setting, [0.3, 0.2, 0.1])
    setting.loop.run()
    assert not setting.loop.state.stopped_early
    assert setting.loop.done


def test_patience_waits_while_the_policy_is_to_end_the_phase():
    """LP-FT whose probe stalls goes on to fine-tuning; then patience counts afresh."""
    setting = Setting(epochs=12, patience=2, policy="lp-ft:probe=50%,restore_best=false")
    stub_metrics(setting, [0.9, *[0.1] * 11])
    setting.loop.run()
    state = setting.loop.state
    assert [d.step for d in setting.driver.decisions] == [0, 18]  # after six epochs
    assert state.evaluated == 8  # two more without improvement
    assert state.stopped_early
    assert not state.policy_done
    assert state.best == Best(1, 3, 0.9, 1.0)


def test_patience_counts_afresh_after_a_change_of_phase_between_evaluations():
    setting = Setting(epochs=9, patience=2, policy="lp-ft:probe=4st,restore_best=false")
    stub_metrics(setting, [0.9, *[0.1] * 8])
    setting.loop.run()
    # The second evaluation is the first of the second phase; the third and fourth count.
    assert setting.loop.state.evaluated == 4


def test_a_policy_that_is_done_ends_the_run_and_it_is_not_called_early_stopping():
    setting = Setting(epochs=99, patience=2, policy="chain-thaw:patience=1")
    stub_metrics(setting, [0.5] * 99)
    setting.loop.run()
    state = setting.loop.state
    assert state.policy_done
    assert not state.stopped_early
    assert state.evaluated == 6  # three phases: head, first layer, all; two evaluations each
    assert setting.driver.plan.done
    assert LoopState.from_json(state.to_json()) == state


def test_a_policy_that_is_done_with_the_last_epoch_did_not_end_the_run():
    setting = Setting(epochs=6, policy="chain-thaw:patience=1")
    stub_metrics(setting, [0.5] * 6)
    setting.loop.run()
    assert setting.driver.plan.done
    assert not setting.loop.state.policy_done


def test_done_and_out_of_patience_at_once_is_not_early_stopping(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "build_policy", lambda config: DoneAt(6))
    setting = Setting(epochs=9, patience=1)
    stub_metrics(setting, [0.5, 0.1])
    setting.loop.run()
    assert setting.loop.state.policy_done
    assert not setting.loop.state.stopped_early


@dataclasses.dataclass(frozen=True, slots=True)
class DoneAt(Policy):
    """Has nothing more to do from a step on."""

    step: int

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(done=event.progress.step >= self.step), state


def test_a_checkpoint_of_before_phases_is_read():
    data = LoopState(step=3).to_json()
    del data["phase"], data["policy_done"]
    assert LoopState.from_json(data) == LoopState(step=3)


@dataclasses.dataclass(frozen=True, slots=True)
class Reads(Policy):
    """Reads a signal; tests of what the loop samples."""

    signal: str

    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, Duration.parse("1st")),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(), state | {"seen": [*state.get("seen", []), *_newest(event)]}


def _newest(event: Event) -> list[float]:
    values = event.signals.get("loss", {})
    return [next(iter(values.values()))] if values and event.kind is EventKind.STEP else []


def test_policies_may_read_the_training_loss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "build_policy", lambda config: Reads("loss"))
    setting = Setting(epochs=1)
    setting.loop.run()
    seen = setting.driver.state()["policy_state"]["seen"]
    assert seen == setting.losses[:-1]  # each at the step after it
    assert setting.driver.costs.signal_s["loss"] > 0


@pytest.mark.parametrize(
    ("every", "steps"),
    [("1ep", [3, 6]), ("2st", [2, 4, 6, 8]), ("4st", [4, 8]), ("50%", [5]), (None, [])],
)
def test_checkpoints_fall_due_by_steps_and_not_at_the_end(every: str | None, steps: list[int]):
    setting = Setting(checkpoint_every=every)
    setting.loop.run()
    assert setting.saved == steps


def test_an_epochs_checkpoint_comes_after_its_evaluation():
    setting = Setting(checkpoint_every="3st")
    order: list[str] = []
    setting.loop.listener = Listener(
        lambda loss: None,
        lambda: None,
        lambda m, b: order.append("evaluated"),
        lambda: order.append("saved"),
    )
    setting.loop.run()
    assert order == ["evaluated", "saved", "evaluated", "saved", "evaluated"]


@dataclass(frozen=True, slots=True)
class BackToTheBest(Policy):
    """Test policy: its first phase ends at the second evaluation, with the best of the phase."""

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        later = event.progress.epoch >= 2
        return FreezePlan(phase=int(later), keep_best="min val_loss"), state


def test_the_best_weights_are_kept_before_a_new_phase_sets_them_back(
    monkeypatch: pytest.MonkeyPatch,
):
    """The best epoch of the run need not be that of the phase, by another metric."""
    setting = Setting(epochs=2, patience=None)
    setting.driver.policy = BackToTheBest()
    measured: list[dict[str, Tensor]] = []
    scores = iter([{"accuracy": 0.5, "loss": 0.1}, {"accuracy": 0.9, "loss": 0.5}])

    def evaluate(self: TrainingLoop, split: object) -> dict[str, float]:
        weights = self.parts.model.state_dict()
        measured.append({name: w.clone() for name, w in weights.items()})
        return next(scores)

    monkeypatch.setattr(TrainingLoop, "evaluate", evaluate)
    setting.loop.run()
    after = setting.loop.parts.model.state_dict()
    assert all(torch.equal(measured[0][n], after[n]) for n in after)
    assert all(torch.equal(measured[1][n], setting.best[n]) for n in after)
    assert any(not torch.equal(measured[0][n], measured[1][n]) for n in after)


def test_gradients_are_clipped_to_the_norm_asked_for():
    norms = []
    for clip in (None, 1e-3):
        model = nn.Sequential(nn.Linear(3, 2))
        setting = Setting(model, optimizer="sgd", clip_norm=clip, epochs=1, weight_decay=0)
        before = model[0].weight.data.clone()
        setting.loop.run()
        norms.append(float((model[0].weight.data - before).norm()))
    assert norms[1] < 1e-3 < norms[0]


def test_bf16_trains():
    setting = Setting(precision="bf16")
    setting.loop.run()
    assert all(math.isfinite(loss) for loss in setting.losses)
    assert all(p.dtype == torch.float32 for p in setting.task.model.parameters())


class Poisoned(nn.Sequential):
    """Returns NaN from the given call on."""

    def __init__(self, after: int, *, gradient: bool) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))
        self.calls, self.after, self.gradient = 0, after, gradient

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = super().forward(x)
        if self.calls <= self.after or not self.training:
            return out
        if self.gradient:
            out.register_hook(lambda g: g * math.nan)
            return out
        return out * math.nan


@pytest.mark.parametrize(
    ("gradient", "found"),
    [(False, "a loss of nan"), (True, r"a gradient of norm nan.*gradient.*in group '0'")],
)
def test_a_loss_that_is_no_number_stops_with_step_rate_and_group(gradient: bool, found: str):
    setting = Setting(Poisoned(2, gradient=gradient))
    with pytest.raises(NonFiniteLoss, match=found) as caught:
        setting.loop.run()
    assert "after update 2" in str(caught.value)
    assert "learning rates" in caught.value.found
    assert setting.loop.state.step == 2  # the bad update was not made
    assert all(torch.isfinite(p).all() for p in setting.task.model.parameters())


def test_a_weight_that_is_no_number_is_traced_to_its_group():
    setting = Setting()
    with torch.no_grad():
        setting.task.model[2].weight[0, 0] = math.inf
    with pytest.raises(NonFiniteLoss, match="first weight that is not finite is in group '2'"):
        setting.loop.run()


def test_shares_are_summed_over_updates():
    setting = Setting(policy="linear-probe", epochs=2)
    setting.loop.run()
    state = setting.loop.state
    assert state.trained_share_sum / state.step == pytest.approx(10 / 26)
    assert state.backward_share_sum / state.step == pytest.approx(1 / 3)


def test_workers_change_nothing():
    losses = []
    for workers in (0, 2):
        setting = Setting(workers=workers, epochs=1)
        setting.loop.run()
        losses.append(setting.losses)
    assert losses[0] == losses[1]


def test_the_state_is_plain_json():
    state = LoopState(step=3, best=Best(1, 3, 0.5, math.nan), loss_sum=0.1)
    data = state.to_json()
    assert data["best"]["val_loss"] == "NaN"
    again = LoopState.from_json(data)
    assert again.best is not None
    assert math.isnan(again.best.val_loss)
    assert LoopState.from_json(LoopState().to_json()) == LoopState()
