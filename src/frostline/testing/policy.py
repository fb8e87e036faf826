"""The contract of policies: pure, JSON state, valid plans, interrupted equals uninterrupted."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frostline.clock import Progress
from frostline.gauges import Gauges, window
from frostline.groups import GroupCost, LayerGroup, LayerGroups, ModuleInfo, TensorInfo
from frostline.plan import FreezePlan
from frostline.policy import Event, EventKind, Policy, State
from frostline.signals import SIGNALS, Need, units_of
from frostline.testing.contract import broken, require

__all__ = ["check_policy", "event_stream", "example_groups"]


def example_groups(count: int = 6) -> LayerGroups:
    """Groups of a pretend network with measured costs: weights, biases, a norm, and a head.

    Args:
        count: number of groups, >= 2.
    """

    def group(depth: int) -> LayerGroup:
        name = "head" if depth == count - 1 else f"block{depth}"
        norm = (TensorInfo(f"{name}.norm.weight", (8,), kind="norm"),) if depth < count - 1 else ()
        return LayerGroup(
            name=name,
            depth=depth,
            parameters=(
                TensorInfo(f"{name}.weight", (8, 8)),
                TensorInfo(f"{name}.bias", (8,), kind="bias"),
                *norm,
            ),
            buffers=(TensorInfo(f"{name}.norm.running_mean", (8,), kind="norm"),) if norm else (),
            modules=(ModuleInfo(name, "Block"), ModuleInfo(f"{name}.norm", "BatchNorm1d")),
            cost=GroupCost(0.01, 0.01, 0.01, 0.001, 1024),
        )

    return LayerGroups(tuple(group(depth) for depth in range(count)))


def event_stream(
    policy: Policy,
    groups: LayerGroups,
    *,
    epochs: int = 6,
    steps_per_epoch: int = 7,
    seed: int = 0,
) -> Iterator[Event]:
    """The events a driver would send during a run, with made-up signals and metrics.

    Metrics are "loss" (falling, then rising) and "accuracy", and the same as "train_loss",
    "val_loss" and "val_accuracy"; signals are what the policy needs, sampled as often as it asks
    and in no other window. Now and then a group has no value, as when it did not train.
    """
    source = random.Random(seed)  # noqa: S311 - test data
    total = epochs * steps_per_epoch
    signals: dict[str, Mapping[str, float]] = {}
    sampled: dict[str, int] = {}
    for need in policy.needs():
        if need.every is None:
            signals[need.signal] = _made_up(need, groups, source)
            sampled[need.signal] = 0
    for step in range(total):
        progress = Progress(step, total, steps_per_epoch)
        kind = EventKind.STEP if step else EventKind.START
        yield Event(kind, progress, dict(signals), sampled=dict(sampled))
        done = Progress(step + 1, total, steps_per_epoch)
        for need in policy.needs():
            if _reads(need, done):
                signals[need.signal] = _made_up(need, groups, source)
                sampled[need.signal] = done.step
        if done.step % steps_per_epoch == 0:
            loss = abs(done.step / total - 0.6) + source.uniform(0, 0.1)
            metrics = {"loss": loss, "accuracy": 1 - loss}
            metrics |= {f"val_{name}": value for name, value in metrics.items()}
            metrics["train_loss"] = 1 - step / total
            yield Event(EventKind.EVALUATED, done, dict(signals), metrics, dict(sampled))


def _reads(need: Need, done: Progress) -> bool:
    """Whether a reading has just been taken."""
    if need.every is None:
        return False
    start, clock = window(need.after, done)
    since = done.step - start
    over = need.until is not None and done.step > window(need.until, done)[0]
    return since > 0 and not over and since % max(1, need.every.steps(clock)) == 0


def _made_up(need: Need, groups: LayerGroups, source: random.Random) -> dict[str, float]:
    rare = SIGNALS[need.signal].trained_only and not need.frozen_too
    return {
        unit.name: source.uniform(0, 10)
        for unit in units_of(groups, need.per)
        if not (rare and source.random() < 0.1)
    }


def check_policy(policy: Policy, groups: LayerGroups | None = None, *, seed: int = 0) -> None:
    """Check one policy against the contract over a whole pretend run.

    Args:
        policy: the policy, configured.
        groups: the groups to decide on; `example_groups()` by default.
        seed: of the made-up signals and metrics.

    Raises:
        ContractBroken: a rule does not hold; the message names it.
    """
    groups = example_groups() if groups is None else groups
    _check_shape(policy)
    events = list(event_stream(policy, groups, seed=seed))
    plans = _check_decisions(policy, groups, events)
    _check_resume(policy, groups, events, plans)


def _check_shape(policy: Policy) -> None:
    kind = type(policy)
    require(dataclasses.is_dataclass(policy), "a policy is a dataclass", kind.__name__)
    frozen = getattr(kind, "__dataclass_params__").frozen  # noqa: B009 - public only by name
    require(frozen, "a policy is frozen (immutable configuration)", kind.__name__)
    require(bool(kind.__doc__ and kind.__doc__.strip()), "a policy has a docstring", kind.__name__)
    require(copy.deepcopy(policy) == policy, "equal configurations are equal", policy)
    Gauges(policy.needs(), Progress(0, 100, 10))  # raises where no driver could serve them all
    unknown = [n.signal for n in policy.needs() if n.signal not in SIGNALS]
    require(not unknown, "needed signals exist", unknown)


def _check_decisions(
    policy: Policy, groups: LayerGroups, events: Sequence[Event]
) -> list[FreezePlan]:
    before, randomness = copy.deepcopy(policy), random.getstate()
    state, plans = policy.init(groups), []
    require(state == policy.init(groups), "init is pure: the same state twice", state)
    for event in events:
        kept = copy.deepcopy(state)
        plan, following = policy.decide(groups, state, event)
        require(state == kept, "decide does not change the state it is given", event)
        _check_json(following)
        again = policy.decide(groups, kept, event)
        require(again == (plan, following), "decide is pure: the same answer twice", event)
        require(isinstance(plan, FreezePlan), "decide answers with a plan", plan)
        plan.check(groups)
        require(FreezePlan.from_json(plan.to_json()) == plan, "plans survive JSON", plan)
        plans.append(plan)
        state = following
    require(policy == before, "deciding leaves the configuration as it was", policy)
    require(random.getstate() == randomness, "deciding leaves global randomness alone")
    return plans


def _check_resume(
    policy: Policy, groups: LayerGroups, events: Sequence[Event], plans: Sequence[FreezePlan]
) -> None:
    # Interrupted after every event: new object, state through JSON text.
    state: State = policy.init(groups)
    for event, plan in zip(events, plans, strict=True):
        fresh = copy.deepcopy(policy)
        resumed, state = fresh.decide(groups, json.loads(json.dumps(state)), event)
        require(resumed == plan, "interrupted equals uninterrupted", (event, resumed, plan))


def _check_json(state: Any) -> None:
    try:
        same = json.loads(json.dumps(state, allow_nan=False)) == state
    except (TypeError, ValueError) as error:
        broken("state is plain JSON", error)
    require(same, "state is plain JSON (no tuples, no keys but strings)", state)
