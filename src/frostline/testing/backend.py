"""The contract of backends: apply is idempotent, frozen means frozen, probes touch nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from frostline.backend import Backend
from frostline.clock import Duration
from frostline.driver import Driver
from frostline.errors import FrozenTensorChanged, PlanError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State
from frostline.signals import SIGNALS, Need, compute_signal
from frostline.testing.contract import broken, require

__all__ = ["BackendCase", "check_backend"]


class BackendCase(Protocol):
    """One small model in training, as a backend's author presents it to `check_backend`.

    The model needs at least three layer groups whose parameters all receive gradients, an
    optimizer with momentum (or other state) and weight decay, and, if the framework has them,
    normalisation statistics and dropout. Two cases made alike must train alike, bit for bit.
    """

    @property
    def backend(self) -> Backend:
        """The backend under test."""
        ...

    def backward(self) -> None:
        """Forward and backward on the next batch; gradients stay, nothing is updated."""
        ...

    def update(self) -> None:
        """One optimizer update from the gradients present; clears them."""
        ...

    def has_gradient(self, parameter: str) -> bool:
        """Whether the parameter has a gradient now."""
        ...

    def evidence(self) -> Mapping[str, str]:
        """Digests, by any names, of everything that a probe must not move.

        Weights, buffers, gradients, optimizer state, random streams.
        """
        ...

    def tamper(self, tensor: str) -> None:
        """Change one element of a parameter or buffer, past the framework if possible."""
        ...


Make = Callable[[], BackendCase]


def check_backend(make: Make) -> None:
    """Check a backend against the contract.

    Args:
        make: builds a fresh case; called many times.

    Raises:
        ContractBroken: a rule does not hold; the message names it.
    """
    groups = make().backend.groups
    require(len(groups) >= 3, "the case has at least three groups", groups.names)
    for check in (
        _check_fingerprint,
        _check_refusal,
        _check_idempotent,
        _check_no_gradient,
        _check_unfreeze,
        _check_rates,
        _check_norm,
        _check_probe,
        _check_widened,
        _check_batch,
        _check_sampling,
        _check_sums,
        _check_weights,
        _check_released,
        _check_proof,
        _check_resume,
    ):
        check(make)
    for plan in _plans(groups):
        _check_frozen(make, plan)


def _plans(groups: LayerGroups) -> Iterable[FreezePlan]:
    names, last = groups.names, groups[-1]
    yield FreezePlan()
    for depth in range(1, len(names)):
        yield FreezePlan(frozen=frozenset(names[:depth]))
    yield FreezePlan(frozen=frozenset({names[1]}))
    yield FreezePlan(frozen=frozenset({last.name}))
    some = min(groups[0].parameter_names)
    yield FreezePlan(frozen=frozenset(names[:2]), exempt={names[0]: frozenset({some})})


def _train(case: BackendCase, updates: int = 3) -> None:
    for _ in range(updates):
        case.backend.hold()
        case.backward()
        case.update()


def _tensors(groups: LayerGroups) -> list[str]:
    return [t.name for g in groups for t in (*g.parameters, *g.buffers)]


def _digests(case: BackendCase) -> dict[str, str]:
    return dict(case.backend.fingerprint(_tensors(case.backend.groups)))


def _moved(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def _check_fingerprint(make: Make) -> None:
    case = make()
    before = _digests(case)
    require(before == _digests(make()), "two cases made alike are alike")
    for name in _tensors(case.backend.groups):
        case.tamper(name)
        now = _digests(case)
        require(_moved(before, now) == {name}, "a fingerprint sees every single change", name)
        before = now


def _check_refusal(make: Make) -> None:
    case = make()
    before = case.evidence()
    everything = FreezePlan(frozen=frozenset(case.backend.groups.names))
    for plan in (everything, FreezePlan(frozen=frozenset({"no such group"}))):
        try:
            case.backend.apply(plan)
        except PlanError:
            continue
        broken("a plan that does not fit is refused", plan)
    require(case.evidence() == before, "a refused plan changes nothing")
    _train(case)
    untouched = make()
    _train(untouched)
    require(_digests(case) == _digests(untouched), "a refused plan changes no training")


def _check_idempotent(make: Make) -> None:
    plans = list(_plans(make().backend.groups))
    for plan in plans:
        once, often = make(), make()
        once.backend.apply(plan)
        for other in plans:
            often.backend.apply(other)
        often.backend.apply(plan)
        often.backend.apply(plan)
        require(often.backend.hold() == (), "nothing is amiss right after apply", plan)
        _train(once)
        _train(often)
        require(
            _digests(once) == _digests(often), "apply is idempotent, whatever came before", plan
        )


def _check_frozen(make: Make, plan: FreezePlan) -> None:
    case = make()
    _train(case)  # momentum exists before the freeze
    case.backend.apply(plan)
    before = _digests(case)
    _train(case, 5)
    moved = _moved(before, _digests(case))
    held = plan.held_tensors(case.backend.groups)
    require(not moved & held, "frozen tensors keep their bits", sorted(moved & held))
    trained = {p.name for g in case.backend.groups for p in g.parameters} - held
    require(trained <= moved, "all the others train", sorted(trained - moved))


def _check_no_gradient(make: Make) -> None:
    case = make()
    group = case.backend.groups[0]
    case.backward()
    case.backend.apply(FreezePlan(frozen=frozenset({group.name})))
    left = [n for n in group.parameter_names if case.has_gradient(n)]
    require(not left, "freezing drops gradients at once", left)
    before = _digests(case)
    case.update()
    moved = _moved(before, _digests(case)) & group.parameter_names
    require(not moved, "a gradient from before the freeze moves nothing", moved)
    case.backward()
    left = [n for n in group.parameter_names if case.has_gradient(n)]
    require(not left, "frozen parameters get no gradient", left)


def _check_unfreeze(make: Make) -> None:
    case = make()
    names = case.backend.groups.names
    case.backend.apply(FreezePlan(frozen=frozenset(names[:-1])))
    _train(case)
    before = _digests(case)
    case.backend.apply(FreezePlan())
    _train(case, 1)
    parameters = {p.name for g in case.backend.groups for p in g.parameters}
    still = parameters - _moved(before, _digests(case))
    require(not still, "unfreezing resumes training within one update", sorted(still))


def _check_rates(make: Make) -> None:
    case = make()
    group = case.backend.groups[1]
    case.backend.apply(FreezePlan(lr_scale={group.name: 0.0}))
    before = _digests(case)
    _train(case, 2)
    moved = _moved(before, _digests(case))
    require(not moved & group.parameter_names, "a rate of zero moves nothing", moved)
    case.backend.apply(FreezePlan())
    _train(case, 1)
    moved = _moved(before, _digests(case))
    require(group.parameter_names <= moved, "the rate comes back with the next plan", group.name)


def _check_norm(make: Make) -> None:
    case = make()
    groups = case.backend.groups
    with_norm = [g for g in groups[:-1] if any(b.kind == "norm" for b in g.buffers)]
    frozen = frozenset(g.name for g in groups[:-1])
    statistics = {b.name for g in with_norm for b in g.buffers if b.kind == "norm"}
    for live in (frozenset(), frozen):
        case.backend.apply(FreezePlan(frozen=frozen, live_norm=live))
        before = _digests(case)
        _train(case)
        moved = _moved(before, _digests(case)) & statistics
        expected = statistics if live else set()
        require(moved == expected, "statistics follow the data only under live_norm", sorted(moved))


def _check_probe(make: Make) -> None:
    case = make()
    case.backend.keep_batch()
    case.backend.apply(FreezePlan(frozen=frozenset({case.backend.groups.names[0]})))
    _train(case)
    case.backward()
    before = case.evidence()
    values = {
        n: compute_signal(n, case.backend.probe(loss=1.0), case.backend.groups) for n in SIGNALS
    }
    require(case.evidence() == before, "a probe moves nothing")
    frozen, *trained = case.backend.groups.names
    for name in ("gradient_l1", "gradient_norm"):
        require(frozen not in values[name], "frozen groups have no gradient to report", values)
        found = [values[name].get(g, 0.0) for g in trained]
        require(all(v > 0 for v in found), "trained groups report their gradient", values[name])


def _check_sampling(make: Make) -> None:
    """A run that reads every signal of every group trains like one that reads none."""
    frozen = frozenset(make().backend.groups.names[:1])
    watched, plain = make(), make()
    watching = Driver(_Watching(frozen), watched.backend)
    for case, driver in ((watched, watching), (plain, Driver(_Fixed(frozen), plain.backend))):
        for _ in range(5):
            with driver.step():
                case.backward()
                driver.sample(loss=1.0)
                case.update()
        driver.finish()
    moved = _moved(plain.evidence(), {**plain.evidence(), **watched.evidence()})
    require(
        watched.evidence() == plain.evidence(), "reading signals changes no training", sorted(moved)
    )
    (group,) = frozen
    value = watching.decisions[-1].signals.get("gradient_norm", {}).get(group, 0.0)
    require(value > 0, "widened steps give frozen groups a gradient to report", value)


def _check_sums(make: Make) -> None:
    case, other = make(), make()
    groups = case.backend.groups
    driver = Driver(_Summing(), case.backend)
    sums: dict[str, list[Any]] = {}
    for _ in range(2):
        with driver.step():
            case.backward()
            driver.sample()
            case.update()
        other.backward()
        for g in groups:
            now = [a * 1 for a in other.backend.probe().gradients(g) if a is not None]
            before = sums.get(g.name, [0] * len(now))
            sums[g.name] = [a + b for a, b in zip(now, before, strict=True)]
        other.update()
    driver.begin_step()
    values = driver.decisions[-1].signals["summed_gradient_norm"]
    for g in groups:
        squares = math.fsum(float((a * a).sum()) for a in sums[g.name])
        same = math.isclose(values[g.name], math.sqrt(squares), rel_tol=1e-5)
        require(same, "gradients are summed over the interval", (g.name, values[g.name]))


def _check_widened(make: Make) -> None:
    groups = make().backend.groups
    plan = FreezePlan(frozen=frozenset(groups.names[:2]))
    names = [n for g in groups[:2] for n in g.parameter_names]
    for ending in ("narrow", "hold", "apply"):
        case, other = make(), make()
        for each in (case, other):
            _train(each)  # momentum exists
            each.backend.apply(plan)
            _train(each, 1)
        case.backend.widen()
        case.backward()
        other.backward()
        missing = [n for n in names if not case.has_gradient(n)]
        require(not missing, "a widened step gives frozen groups gradients", missing)
        probe = case.backend.probe()
        _check_update(case)
        require(not any(probe.trains(g) for g in groups[:2]), "a widened step trains no more")
        answer = case.backend.apply(plan) if ending == "apply" else getattr(case.backend, ending)()
        require(not answer, f"{ending} ends a widened step silently", answer)
        left = [n for n in names if case.has_gradient(n)]
        require(not left, f"{ending} drops the gradients of frozen groups", left)
        case.update()
        other.update()
        for each in (case, other):
            _train(each)
        moved = _moved(other.evidence(), {**other.evidence(), **case.evidence()})
        same = case.evidence() == other.evidence()
        require(same, "a widened step leaves no trace in training", sorted(moved))


def _check_update(case: BackendCase) -> None:
    """Finding out the next update moves nothing, not even the optimizer's memory."""
    probe, before = case.backend.probe(), case.evidence()
    found = [u for g in case.backend.groups for u in probe.update(g)]
    require(any(u is not None for u in found), "a probe tells the next update")
    require(case.evidence() == before, "a probe moves nothing")


def _check_batch(make: Make) -> None:
    case, other = make(), make()
    case.backend.keep_batch()
    _train(case, 1)
    first = case.backend.kept()
    require(first is not None, "the inputs of a forward pass in training are kept")
    before = _activations(case)
    case.backend.keep_batch()
    _train(case, 2)
    require(_activations(case) != before, "activations are those of the present weights")
    _train(other, 3)
    other.backend.restore_kept(first)
    require(_activations(other) == _activations(case), "a batch once kept stays, and is restored")


def _activations(case: BackendCase) -> list[list[float]]:
    probe = case.backend.probe()
    found = [probe.activations(g, int8=int8) for g in case.backend.groups for int8 in (False, True)]
    rows = {len(a) for a in found}
    require(len(rows) == 1, "activations have one row per sample", rows)
    return [a.reshape(-1).tolist() for a in found]


def _check_weights(make: Make) -> None:
    case, other = make(), make()
    _train(case)
    kept, digests = case.backend.weights(), _digests(case)
    group = case.backend.groups[0].name
    other.backend.apply(FreezePlan(lr_scale={group: 0.5}))  # another history
    _train(other, 5)
    other.backend.apply(FreezePlan())
    _train(case, 2)
    for each in (case, other):
        each.backend.load_weights(kept)
        moved = _moved(digests, _digests(each))
        require(not moved, "weights are written back, bit for bit", sorted(moved))
        _train(each, 2)
    require(_digests(case) == _digests(other), "the optimizer forgets when weights are written")


def _check_released(make: Make) -> None:
    group = make().backend.groups[0]
    found: list[dict[str, str]] = []
    for released in (True, False):
        case = make()
        _train(case)
        names = frozenset({group.name})
        case.backend.apply(FreezePlan(frozen=names, released=names if released else frozenset()))
        _train(case, 2)
        case.backend.apply(FreezePlan())
        if not released:
            case.backend.load_weights(case.backend.weights())  # forgets everything
        _train(case, 1)
        found.append(dict(case.backend.fingerprint(sorted(group.parameter_names))))
    require(found[0] == found[1], "a released group starts again as with a fresh optimizer")


def _check_proof(make: Make) -> None:
    case = make()
    group = case.backend.groups[0]
    for tensor in (t.name for t in (*group.parameters, *group.buffers)):
        case = make()
        driver = Driver(_Fixed(frozenset({group.name})), case.backend)
        with driver.step():
            case.backward()
            case.update()
        case.tamper(tensor)
        try:
            driver.finish()
        except FrozenTensorChanged as error:
            require(tensor in str(error), "the proof names the tensor", error)
            continue
        broken("a write to a frozen tensor fails the run", tensor)


def _check_resume(make: Make) -> None:
    """A driver restored into the same moment applies the same plan."""
    case, other = make(), make()
    policy = _Fixed(frozenset(case.backend.groups.names[:2]))
    driver, resumed = Driver(policy, case.backend), Driver(policy, other.backend)
    driver.start()
    resumed.restore(driver.state())
    _train(case)
    _train(other)
    require(_digests(case) == _digests(other), "a restored plan trains as the saved one")
    proofs = [d.finish().to_json() for d in (driver, resumed)]
    require(proofs[0] == proofs[1] and proofs[0] != [], "a restored driver goes on proving", proofs)
    require(resumed.plan == driver.plan, "a restored driver has the saved plan", resumed.plan)


class _Fixed(Policy):
    """Freezes the named groups."""

    __slots__ = ("frozen",)

    def __init__(self, frozen: frozenset[str]) -> None:
        self.frozen = frozen

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(frozen=self.frozen), state

    def __repr__(self) -> str:
        return f"_Fixed({sorted(self.frozen)})"


class _Watching(_Fixed):
    """Freezes the named groups and reads every signal of all groups at every second step."""

    __slots__ = ()

    def needs(self) -> tuple[Need, ...]:
        every, once = Duration.parse("2st"), (s.name for s in SIGNALS.values() if s.static)
        asked = (
            Need(s.name, every, None, frozen_too=True) for s in SIGNALS.values() if not s.static
        )
        return (*asked, *(Need(name, None) for name in once))

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        # A new phase at each reading makes it a decision, and so a record of what was read.
        return FreezePlan(frozen=self.frozen, phase=sum(event.sampled.values())), state


class _Summing(Policy):
    """Freezes nothing and reads summed gradients over two steps."""

    __slots__ = ()

    def needs(self) -> tuple[Need, ...]:
        return (Need("summed_gradient_norm", Duration.parse("2st"), None),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        del groups
        return FreezePlan(phase=len(event.signals)), state
