"""The contract of backends: apply is idempotent, frozen means frozen, probes touch nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from frostline.backend import Backend
from frostline.driver import Driver
from frostline.errors import FrozenTensorChanged, PlanError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State
from frostline.signals import SIGNALS, compute_signal
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
