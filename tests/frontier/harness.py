"""Cached against uncached training of one case at one depth, compared in everything there is.

Two twins are built from the same seed and trained for some steps on the same batches: one by its
plain forward pass, one by a frozen region that is filled in fixed blocks and replayed. Outputs,
loss, gradients, buffers, attributes, random states, and the caller's batch must agree after every
step. The reference runs first and alone, so that the twins cannot meddle with each other through
what they share. Where the bits differ within the tolerance, the reference's parameters and buffers
are copied over before the next step: each step is judged alone, and errors do not add up. A small
difference beyond the tolerance is looked at again in float64: rounding shrinks there, and what was
computed wrongly does not.
"""

from __future__ import annotations

import itertools
import math
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from frontier.zoo_cases import SAMPLES, Case, Made
from frostline.backends.torch.backend import TorchBackend, as_found
from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.modes import OWN_ATTRIBUTES
from frostline.backends.torch.random_state import read_random_state
from frostline.errors import FrontierError
from frostline.frontier.cache import moved
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan

EXAMPLE = 4
BLOCK = 8
SIZES = (6, 5, 6, 7)
"""Samples per step: each sample once, batches of other sizes than the example and the blocks."""
FLOAT32, FLOAT64 = 1e-5, 1e-9
"""Tolerances: relative errors."""
ROUNDING = 1e-2
"""Normalisation over few values can make this of float32 rounding; more is no rounding."""
MEMOS = ("_output_capturing_hooks_installed",)
"""Flags of libraries that say only that a first use has been."""
SMALL = 1e-3
"""A gradient is measured against the largest one of the model times this, if it is smaller."""


class RegionLike(Protocol):
    """What the harness needs of a region."""

    slots: Any
    skipped: Any
    ends: Any

    @property
    def empty(self) -> bool: ...

    def fill(self, example: Example) -> dict[str, Tensor]: ...
    def run(self, example: Example, rows: Mapping[str, Tensor]) -> Any: ...


Engine = Callable[[nn.Module, Example], RegionLike]


def real(model: nn.Module, example: Example) -> RegionLike:
    """The engine of the library."""
    from frostline.frontier.region import find_region

    return find_region(model, example)


class Uncached:
    """A region that skips nothing: what the harness says of it, it says of itself."""

    slots: tuple[Any, ...] = ()
    skipped: tuple[str, ...] = ()
    ends: tuple[Any, ...] = ()
    empty = False

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.model = model

    def fill(self, example: Example) -> dict[str, Tensor]:
        return {}

    def run(self, example: Example, rows: Mapping[str, Tensor]) -> Any:
        return self.model(*example.args, **example.kwargs)


@dataclass(frozen=True)
class Outcome:
    """How a case went.

    Attributes:
        case: its name.
        depth: the name of the frozen set.
        kind: "equal" to the bit; "close" within the tolerance; "refused" in a FrontierError or
            with an empty region; "diverged" where at least one step was run in full, and all
            values are right; "DIFFERENT"; "crashed".
        reason: why, for all but the first two.
        error: largest relative error seen.
        slots: tensors stored per sample.
        sample_bytes: bytes stored per sample.
        covered: share of the frozen layers that are skipped, [0, 1]; None without a region.
        full_steps: steps that were run in full.
        ends: where the region ends and why.
        needs: as the case says.
    """

    case: str
    depth: str
    kind: str
    reason: str = ""
    error: float = 0.0
    slots: int = 0
    sample_bytes: int = 0
    covered: float | None = None
    full_steps: int = 0
    ends: tuple[str, ...] = ()
    needs: str = ""


class Unequal(Exception):
    """A difference that must not be."""


@dataclass
class Twin:
    """A model ready to train, with its data."""

    model: nn.Module
    data: Example
    optimizer: torch.optim.Optimizer


@dataclass
class Step:
    """All that can be seen after one step."""

    output: list[tuple[str, Any]]
    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]
    random: dict[str, Any]
    batch: list[tuple[str, Any]]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Reference:
    """What the uncached twin left behind.

    Attributes:
        steps: one by one.
        settled: the picture of the model after its first forward pass. Finding or filling may
            move flags and tables to what that pass moves them to, as any first use would.
    """

    steps: list[Step]
    settled: dict[str, Any]


def compare(case: Case, depth: str, engine: Engine = real) -> Outcome:
    """Train both twins and say how they compare; see the module.

    Raises:
        Exception: the case itself cannot be built or trained, or has no gradient.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _Cached(case, depth, engine, _reference(case, depth)).outcome()
        if found.kind != "DIFFERENT" or found.error > ROUNDING or case.tolerance > FLOAT32:
            return found
        exact = replace(case, make=_doubled(case.make), tolerance=FLOAT64)
        again = _Cached(exact, depth, engine, _reference(exact, depth)).outcome()
        if again.kind in ("equal", "close"):
            why = f"rounding of float32: off by {found.error:.0e}, in float64 by {again.error:.0e}"
            return replace(found, kind="close", reason=why)
        return found


def _doubled(make: Callable[[], Made]) -> Callable[[], Made]:
    """The same case in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: wide(item) for key, item in value.items()}
        return type(value)(map(wide, value)) if isinstance(value, (list, tuple)) else value

    def made() -> Made:
        model, make_batch = make()

        def make_wide(n: int, seed: int) -> Example:
            batch = make_batch(n, seed)
            return Example(wide(batch.args), wide(dict(batch.kwargs)))

        return model.double(), make_wide

    return made


def placed(case: Case, device: str) -> Case:
    """The same case on another device: the model and its data are made on the CPU and moved."""

    def made() -> Made:
        model, make_batch = case.make()
        return model.to(device), lambda n, seed: moved(make_batch(n, seed), torch.device(device))

    return case if device == "cpu" else replace(case, make=made)


def order() -> list[list[int]]:
    """The samples of each step."""
    shuffled = random.Random(11).sample(range(SAMPLES), SAMPLES)
    places = np.cumsum((0, *SIZES))
    return [shuffled[a:b] for a, b in itertools.pairwise(places)]


# -- one twin ----------------------------------------------------------------------------------


def seed(value: int) -> None:
    """Seed every global generator."""
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.manual_seed(value)


def prepare(case: Case, depth: str) -> Twin:
    """Build a twin and freeze it."""
    seed(1)
    model, make_batch = case.make()
    fill_silent(model)
    data = make_batch(SAMPLES, 3)
    first = case.take(data, list(range(EXAMPLE)))
    with case.around():
        groups = layer_groups(model, first)
    parameters = list(model.parameters())
    optimizer = (
        torch.optim.AdamW(parameters, lr=1e-3)
        if case.optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    )
    plan = case.depths[depth](groups)
    if not case.by_hand:
        TorchBackend(model, optimizer, groups=groups, fixed=as_found(model)).apply(plan)
    model.train()
    if case.by_hand:
        _freeze_by_hand(model, groups, plan)
    seed(2)
    return Twin(model, data, optimizer)


def _freeze_by_hand(model: nn.Module, groups: LayerGroups, plan: FreezePlan) -> None:
    names = plan.frozen_parameters(groups)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)
    for group in groups:
        if group.name in plan.frozen:
            for info in group.modules:
                model.get_submodule(info.name).eval()


def fill_silent(model: nn.Module) -> None:
    """Give parameters that are all zero, or nearly, noise: their gradients are zero otherwise."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and float(p.abs().max()) < SMALL:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)


def loss_of(output: Any) -> Tensor:
    """A function of every floating tensor of the output, with a gradient in each element."""
    parts: list[Tensor] = []
    for k, (_, t) in enumerate(leaves(output)):
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            continue
        values = (torch.view_as_real(t) if t.is_complex() else t).float().reshape(-1)
        values = values[torch.isfinite(values)] if values.numel() else values
        weights = torch.cos(torch.arange(values.numel(), device=values.device) * 0.7 + k)
        parts.append((values * weights).mean() + 0.5 * values.square().mean())
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _finish(case: Case, twin: Twin, output: Any, batch: Example) -> Step:
    """Backward and update; all that is left afterwards."""
    seen = [(path, _frozen_copy(v)) for path, v in leaves(output)]
    loss = loss_of(output)
    loss.backward()
    model = twin.model
    step = Step(
        output=seen,
        loss=loss.detach(),
        gradients={n: _copy(p.grad) for n, p in model.named_parameters()},
        buffers={n: b.detach().clone() for n, b in model.named_buffers()},
        attributes=attributes(model),
        random=random_state(),
        batch=[
            *((path, _frozen_copy(v)) for path, v in leaves((batch.args, batch.kwargs))),
            *((f"{p}.grad", _copy(v.grad)) for p, v in leaves((batch.args, batch.kwargs))
              if isinstance(v, Tensor)),
        ],
        parameters={n: p.detach().clone() for n, p in model.named_parameters()},
    )  # fmt: skip
    twin.optimizer.step()
    twin.optimizer.zero_grad()
    step.after = {n: p.detach().clone() for n, p in model.named_parameters()}
    return step


def _reference(case: Case, depth: str) -> Reference:
    twin = prepare(case, depth)
    steps: list[Step] = []
    settled: dict[str, Any] = {}
    for number, indices in enumerate(order()):
        batch = case.take(twin.data, indices)
        with case.around():
            output = twin.model(*batch.args, **batch.kwargs)
        settled = settled or picture(twin.model)
        steps.append(_finish(case, twin, output, batch))
        if case.between is not None:
            case.between(twin.model, number)
    total = sum(float(g.abs().sum()) for s in steps for g in s.gradients.values() if g is not None)
    if not math.isfinite(total) or total == 0:
        raise ValueError(f"the case {case.name!r} at {depth!r} has gradients that sum to {total}")
    return Reference(steps, settled)


class _Cached:
    """The cached twin and its comparison with the recorded steps."""

    def __init__(self, case: Case, depth: str, engine: Engine, reference: Reference) -> None:
        self.case, self.depth, self.engine, self.reference = case, depth, engine, reference
        self.twin = prepare(case, depth)
        self.region: RegionLike | None = None
        self.full: list[str] = []
        self.worst = 0.0
        self.equal = True

    def outcome(self) -> Outcome:
        """Train and compare."""
        try:
            if (refused := self._find()) is not None:
                return self._say("refused", refused)
            self._train()
        except Unequal as error:
            return self._say("DIFFERENT", str(error))
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            return self._say("crashed", f"{_line(error)} ({place})")
        if self.full:
            return self._say("diverged", self.full[0])
        return self._say("equal" if self.equal else "close")

    def _say(self, kind: str, reason: str = "") -> Outcome:
        region = self.region
        slots = list(region.slots) if region is not None else []
        return Outcome(
            case=self.case.name,
            depth=self.depth,
            kind=kind,
            reason=reason,
            error=self.worst,
            slots=len(slots),
            sample_bytes=sum(s.bytes for s in slots),
            covered=self._covered() if region is not None else None,
            full_steps=len(self.full),
            ends=tuple(str(e) for e in region.ends) if region is not None else (),
            needs=self.case.needs,
        )

    def _covered(self) -> float | None:
        assert self.region is not None
        skipped = {str(name).partition("#")[0] for name in self.region.skipped}
        frozen = [
            name
            for name, m in self.twin.model.named_modules()
            if (own := list(m.parameters(recurse=False))) and not any(p.requires_grad for p in own)
        ]
        if not frozen:
            return None
        done = [n for n in frozen if any(n == s or n.startswith(f"{s}.") for s in skipped)]
        return len(done) / len(frozen)

    def _find(self) -> str | None:
        """Find and fill; the reason if there is nothing to replay."""
        try:
            return self._filled()
        except FrontierError as error:
            return _line(error)

    def _filled(self) -> str | None:
        case, model = self.case, self.twin.model
        first = case.take(self.twin.data, list(range(EXAMPLE)))
        before = picture(model)
        with case.around():
            self.region = self.engine(model, first)
        self._unmoved(before, "finding the region")
        if self.region.empty:
            return "empty: " + "; ".join(str(e) for e in self.region.ends)
        blocks = []
        for start in range(0, SAMPLES, BLOCK):
            block = case.take(self.twin.data, list(range(start, start + BLOCK)))
            with case.around():
                rows = self.region.fill(block)
            for name, value in rows.items():
                if value.shape[:1] != (BLOCK,):  # what a cache sees, too, before it stores them
                    return f"{len(value)} rows of slot {name} for {BLOCK} samples"
                _check(type(value) is Tensor, f"slot {name} is a {type(value).__name__}")
                _check(not value.requires_grad, f"slot {name} requires grad")
            blocks.append({name: value.clone() for name, value in rows.items()})
        self._unmoved(before, "filling the region")
        self.rows = Rows(blocks)
        return None

    def _train(self) -> None:
        twin, case = self.twin, self.case
        for number, (indices, wanted) in enumerate(zip(order(), self.reference.steps, strict=True)):
            batch = case.take(twin.data, indices)
            output, batch = self._forward(batch, indices)
            got = _finish(case, twin, output, batch)
            self._judge(wanted, got, f"step {number}")
            if not self.equal:
                self._align(wanted)
            if case.between is not None:
                case.between(twin.model, number)

    def _forward(self, batch: Example, indices: list[int]) -> tuple[Any, Example]:
        assert self.region is not None
        case, model = self.case, self.twin.model
        rows = self.rows.take(indices, batch)
        before = picture(model)
        try:
            with case.around():
                output = self.region.run(batch, rows)
        except FrontierError as error:
            self._unmoved(before, "leaving the replay")
            self.full.append(_line(error))
            untouched = leaves((case.take(self.twin.data, indices).args, {}))
            _check(
                all(
                    same_bits(a, b)
                    for (_, a), (_, b) in zip(untouched, leaves((batch.args, {})), strict=True)
                    if isinstance(a, Tensor)
                ),
                "leaving the replay moved the caller's batch",
            )
            with case.around():
                output = model(*batch.args, **batch.kwargs)
        return output, batch

    def _unmoved(self, before: dict[str, Any], when: str) -> None:
        after = picture(self.twin.model)
        names = [n for n in {**before, **after} if not _same(before, after, n)]
        settled = self.reference.settled
        left = [n for n in names if not (n.startswith(SETTLES) and _same(settled, after, n))]
        _check(not left, f"{when} moved {', '.join(left)}")

    def _judge(self, wanted: Step, got: Step, when: str) -> None:
        self._trees(wanted.output, got.output, f"{when}: output")
        self._near(wanted.loss, got.loss, f"{when}: loss")
        self._trees(wanted.batch, got.batch, f"{when}: the caller's batch")
        largest = max(
            (
                float(g.abs().max())
                for g in wanted.gradients.values()
                if g is not None and g.numel()
            ),
            default=0.0,
        )
        for name, gradient in wanted.gradients.items():
            other = got.gradients.get(name)
            _check((gradient is None) == (other is None),
                   f"{when}: gradient of {name} is {_kind(other)}")  # fmt: skip
            if gradient is not None and other is not None:
                self._near(gradient, other, f"{when}: gradient of {name}", floor=SMALL * largest)
        _check(wanted.gradients.keys() == got.gradients.keys(), f"{when}: other parameters")
        _check(wanted.buffers.keys() == got.buffers.keys(), f"{when}: other buffers")
        for name, buffer in wanted.buffers.items():
            self._near(buffer, got.buffers[name], f"{when}: buffer {name}")
        memos = (*self.case.memos, *MEMOS)
        names = wanted.attributes.keys() ^ got.attributes.keys()
        other = [n for n in sorted(names) if not any(memo in n for memo in memos)]
        _check(not other, f"{when}: attributes {other}")
        for name in wanted.attributes.keys() & got.attributes.keys():
            self._leaf(wanted.attributes[name], got.attributes[name], f"{when}: attribute {name}")
        for stream, value in wanted.random.items():
            _check(value == got.random[stream], f"{when}: random state of {stream}")

    def _trees(self, wanted: Sequence[Any], got: Sequence[Any], what: str) -> None:
        paths = [p for p, _ in wanted], [p for p, _ in got]
        _check(paths[0] == paths[1], f"{what}: fields {paths[1]} instead of {paths[0]}")
        for (path, a), (_, b) in zip(wanted, got, strict=True):
            self._leaf(a, b, f"{what} {path}")

    def _leaf(self, wanted: Any, got: Any, what: str) -> None:
        _check(type(wanted) is type(got), f"{what} is {_kind(got)}, not {_kind(wanted)}")
        if isinstance(wanted, Tensor):
            self._near(wanted, got, what)
        elif isinstance(wanted, float):
            self._near(torch.tensor(wanted), torch.tensor(got), what)
        else:
            _check(wanted == got, f"{what} is {got!r:.80}, not {wanted!r:.80}")

    def _near(self, wanted: Tensor, got: Tensor, what: str, *, floor: float = 1e-6) -> None:
        shape, other = tuple(wanted.shape), tuple(got.shape)
        _check(shape == other, f"{what} is {other}, not {shape}")
        _check(wanted.dtype == got.dtype, f"{what} is {got.dtype}, not {wanted.dtype}")
        _check(wanted.requires_grad == got.requires_grad,
               f"{what}: requires_grad is {got.requires_grad}")  # fmt: skip
        if same_bits(wanted, got):
            return
        self.equal = False
        error = relative_error(wanted, got, floor)
        self.worst = max(self.worst, error)
        _check(error <= self.case.tolerance, f"{what} is off by {error:.1e} (relative)")

    def _align(self, wanted: Step) -> None:
        with torch.no_grad():
            for name, p in self.twin.model.named_parameters():
                p.copy_(wanted.after[name])
            for name, b in self.twin.model.named_buffers():
                b.copy_(wanted.buffers[name])


class Rows:
    """The stored rows of all samples; rows of unequal sizes are padded to those of a batch."""

    def __init__(self, blocks: list[dict[str, Tensor]]) -> None:
        self._blocks = blocks

    def take(self, indices: list[int], batch: Example) -> dict[str, Tensor]:
        """Private copies of the rows of these samples."""
        return {name: self._gather(name, indices, batch) for name in self._blocks[0]}

    def _gather(self, name: str, indices: list[int], batch: Example) -> Tensor:
        rows = [self._blocks[i // BLOCK][name][i % BLOCK] for i in indices]
        if len({b[name].shape[1:] for b in self._blocks}) == 1:
            return torch.stack(rows)
        # The caller's batches are padded to their longest sample, dimension 1 of the inputs.
        wanted = next(v.shape[1] for v in batch.kwargs.values() if isinstance(v, Tensor))
        first, *others = [b[name].shape[1:] for b in self._blocks]
        ragged = [d for d in range(len(first)) if any(o[d] != first[d] for o in others)]
        for d in ragged:
            rows = [_sized(row, d, wanted) for row in rows]
        return torch.stack(rows)


def _sized(row: Tensor, dim: int, size: int) -> Tensor:
    row = row.narrow(dim, 0, min(size, row.shape[dim]))
    if row.shape[dim] == size:
        return row
    more = list(row.shape)
    more[dim] = size - row.shape[dim]
    return torch.cat([row, row.new_zeros(more)], dim)


# -- looking -----------------------------------------------------------------------------------


def leaves(
    value: Any, path: str = "", depth: int = 0, *, objects: bool = True
) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value in a tree of mappings, sequences and objects, with its place."""
    if isinstance(value, (Tensor, int, float, str, bytes, type(None))):
        yield path, value
    elif depth > 6:
        return
    elif isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], f"{path}.{key}", depth + 1, objects=objects)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]", depth + 1, objects=objects)
    elif isinstance(value, (set, frozenset)):
        yield path, sorted(map(repr, value))
    elif objects and hasattr(value, "__dict__") and not callable(value):
        for key, item in vars(value).items():
            yield from leaves(item, f"{path}.{key}", depth + 1)


_MODULE = frozenset(vars(nn.Module())) | {*OWN_ATTRIBUTES}


def attributes(model: nn.Module) -> dict[str, Any]:
    """Plain values and tensors that modules keep as attributes, and what their hooks share."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}.training"] = module.training
        for key, value in vars(module).items():
            if (
                key in _MODULE
                or key.startswith("_torchdynamo")
                or not isinstance(value, (Tensor, int, float, str, list, tuple, dict, type(None)))
            ):
                continue
            for path, leaf in leaves(value, f"{name}.{key}", objects=False):
                if not isinstance(leaf, nn.Parameter):
                    found[path] = _frozen_copy(leaf)
    return found


def random_state() -> dict[str, Any]:
    """The global random states, comparable."""
    state = read_random_state()
    numpy_state = state["numpy"]["state"]
    return {
        "python": state["python"],
        "numpy": (numpy_state["key"].tolist(), numpy_state["pos"]),
        "torch": state["torch"].tolist(),
        "cuda": [of.tolist() for of in state.get("cuda", ())],
    }


def picture(model: nn.Module) -> dict[str, Any]:
    """All that finding, filling and leaving must not move."""
    return {
        **{f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()},
        **{f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()},
        **{f"identity of {n}": id(t) for n, t in _tensors(model)},
        **{f"requires_grad of {n}": p.requires_grad for n, p in model.named_parameters()},
        **{f"gradient of {n}": _copy(p.grad) for n, p in model.named_parameters()},
        **{f"attribute {n}": v for n, v in attributes(model).items()},
        **{f"random state of {n}": v for n, v in random_state().items()},
        **{f"class of {n}": type(m) for n, m in model.named_modules()},
        **{f"hooks of {n}": _hooks(m) for n, m in model.named_modules()},
        **{f"own forward of {n}": "forward" in vars(m) for n, m in model.named_modules()},
    }


def _hooks(module: nn.Module) -> tuple[int, ...]:
    return tuple(
        len(vars(module)[kind])
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                     "_backward_pre_hooks")
    )  # fmt: skip


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    a, b = one.get(name, _ABSENT), other.get(name, _ABSENT)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and same_bits(a, b)
    return type(a) is type(b) and a == b


_ABSENT = object()
#: What may settle at the first use of a model.
SETTLES = ("attribute", "class", "hooks", "own forward")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits (NaN equals NaN)."""
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def relative_error(wanted: Tensor, got: Tensor, floor: float) -> float:
    """Largest difference over the largest value; infinite where only one is finite."""
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return math.inf
    kind = torch.cdouble if wanted.is_complex() else torch.double
    a, b = (t.detach().to_dense().to(kind) for t in (wanted, got))
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(torch.nan_to_num(a[~both]), torch.nan_to_num(b[~both])):
        return math.inf
    if not both.any():
        return 0.0
    scale = max(float(a[both].abs().max()), floor)
    return float((a[both] - b[both]).abs().max()) / scale


def _copy(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.detach().to_dense() if tensor.is_sparse else tensor.detach().clone()


def _frozen_copy(value: Any) -> Any:
    """A tensor's values with its `requires_grad`, and its class if that is foreign."""
    if not isinstance(value, Tensor):
        return value
    if type(value) is not Tensor and not isinstance(value, nn.Parameter):
        return f"a tensor of class {type(value).__name__}"
    copy = value.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_() if value.requires_grad else copy


def _check(true: bool, problem: str) -> None:
    if not true:
        raise Unequal(problem)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, str) else value


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + "; ".join(
        " ".join(part.split()) for part in str(error).splitlines()[:4]
    )
