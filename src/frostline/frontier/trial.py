"""Trial steps: real training steps on a model that is afterwards what it was, to the bit.

What a step costs is asked of the step itself: the user's own forward pass, a backward pass, an
update by a real optimizer, frozen by the backend that training would use. Weights, buffers,
modes, hooks, gradients and random streams are put back at the end; for that time a copy of all
weights is held.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from frostline.backends.torch.backend import TorchBackend, applied_plan, as_found, record_plan
from frostline.backends.torch.example import Example
from frostline.backends.torch.optimizer import parameter_groups
from frostline.backends.torch.tracing import (
    leave_untouched,
    private_batch,
    tensors_in,
    uncompiled,
)
from frostline.errors import FrontierError
from frostline.frontier.arrays import wait_for
from frostline.groups import LayerGroups
from frostline.memory import give_back_freed
from frostline.plan import FreezePlan

__all__ = ["BRIEFLY_S", "LEAST_S", "Recipe", "Rehearsal", "any_loss", "memory_in_use", "rehearsal"]

Work = Callable[[], Any]
#: Seconds that work is timed for at least, however soon it is done; and where time is short.
LEAST_S, BRIEFLY_S = 0.2, 0.04
_AT_MOST = 50
#: What warming up adds is little beside work that takes so long.
_SLOW_S = 1.0


def any_loss(output: Any) -> Tensor:
    """A scalar that depends on all that a model predicts: cross-entropy on scores, else a mean.

    Raises:
        FrontierError: nothing in the output carries a gradient.

    Example:
        >>> any_loss(torch.zeros(2, 4, requires_grad=True)).item()
        1.3862943649291992
    """
    scores = getattr(output, "logits", None)
    found = [t for t in tensors_in(output if scores is None else scores) if t.requires_grad]
    if not found:
        raise FrontierError(
            "run a trial step",
            found="an output that carries no gradient",
            fix="pass Recipe(loss=...), a function from the model's output to its loss",
        )
    if len(found) == 1 and found[0].ndim == 2 and found[0].is_floating_point():
        first = found[0].float()
        return functional.cross_entropy(first, first.new_zeros(len(first), dtype=torch.long))
    return torch.stack([t.float().mean() for t in found]).sum()


def adamw(model: nn.Module, groups: LayerGroups) -> Optimizer:
    """AdamW over every parameter: what `Recipe` takes when it is told nothing else."""
    return AdamW(parameter_groups(model, groups, lr=1e-4, weight_decay=0.01))


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training step is made of, besides the model.

    Attributes:
        loss: from the model's output to a scalar.
        optimizer: over every parameter of the model, frozen or not.
        forward: context of a forward pass (mixed precision).
        clip_norm: largest gradient norm, or None.
        fixed: names of parameters that never train; None takes those that do not require grad on
            a model that Frostline has not frozen.
    """

    loss: Callable[[Any], Tensor] = any_loss
    optimizer: Callable[[nn.Module, LayerGroups], Optimizer] = adamw
    forward: Callable[[], AbstractContextManager[object]] = nullcontext
    clip_norm: float | None = None
    fixed: Collection[str] | None = None


@contextlib.contextmanager
def rehearsal(
    model: nn.Module,
    groups: LayerGroups,
    example: Example,
    recipe: Recipe,
    *,
    least_s: float = LEAST_S,
) -> Iterator[Rehearsal]:
    """Trial steps while the block runs; the model is afterwards what it was.

    Args:
        model: the model.
        groups: its layer groups.
        example: the batch of every step.
        recipe: the rest of a step.
        least_s: seconds that each piece of work is timed for at least.
    """
    applied = applied_plan(model)
    fixed = recipe.fixed
    if fixed is None:
        fixed = as_found(model) if applied is None else ()
    with leave_untouched(model) as keep, uncompiled():
        for parameter in model.parameters():
            keep(parameter)
        try:
            yield Rehearsal(model, groups, example, recipe, fixed, least_s)
        finally:
            record_plan(model, applied)


@dataclass(slots=True)
class Rehearsal:
    """Runs trial steps at one depth after the other; made by `rehearsal`.

    Args:
        model: the model; it changes while the rehearsal lasts.
        groups: its layer groups.
        example: the batch of every step.
        recipe: the rest of a step.
        fixed: names of parameters that never train.
        least_s: seconds that each piece of work is timed for at least.
    """

    model: nn.Module
    groups: LayerGroups
    example: Example
    recipe: Recipe
    fixed: Collection[str]
    least_s: float = LEAST_S
    memory: PeakGrowth = field(init=False)
    _backend: TorchBackend = field(init=False)
    _optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.memory = PeakGrowth(next(self.model.parameters()).device)

    def freeze(self, depth: int) -> None:
        """Freeze this many groups from the input; the optimizer starts afresh."""
        self.model.zero_grad(set_to_none=True)
        self._optimizer = self.recipe.optimizer(self.model, self.groups)
        self._backend = TorchBackend(
            self.model, self._optimizer, groups=self.groups, fixed=self.fixed
        )
        self._backend.apply(FreezePlan(frozen=frozenset(self.groups.names[:depth])))
        self.model.train()

    def load_libraries(self) -> None:
        """Run a step of a network of a few numbers, after which all that a step imports is here."""
        device = self.memory.device
        small = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(8, 1)).to(device)
        small(torch.zeros(2, 1, 4, device=device)).sum().backward()
        AdamW(small.parameters()).step()

    def forward(self) -> Any:
        """The model's output on a private copy of the batch."""
        args, kwargs = private_batch(self.model, self.example.args, self.example.kwargs)
        return self.model(*args, **kwargs)

    def step(self, forward: Work | None = None) -> None:
        """One whole training step under what `freeze` froze last.

        Args:
            forward: instead of the model's own forward pass, e.g. from a store.
        """
        recipe = self.recipe
        self._backend.hold()
        self._optimizer.zero_grad(set_to_none=True)
        with recipe.forward():
            output = (forward or self.forward)()
        loss = recipe.loss(output)
        loss.backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self._optimizer.step()
        float(loss.detach())
        self._backend.written()

    def evaluate(self) -> None:
        """One forward pass as validation runs it."""
        self.model.eval()
        with torch.no_grad(), self.recipe.forward():
            self.forward()
        self.model.train()

    def state_share(self) -> float:
        """Bytes that the optimizer remembers per byte of a parameter that trains."""
        sizes = [
            (p.nbytes, sum(v.nbytes for v in state.values() if isinstance(v, Tensor)))
            for p, state in self._optimizer.state.items()
        ]
        return sum(s for _, s in sizes) / sum(p for p, _ in sizes) if sizes else 0.0

    def seconds(self, work: Work, *, times: int) -> float:
        """The least of several runs, after one to warm up: what else runs can only add.

        Args:
            work: what to time.
            times: how often at least; work that is soon done is run for `least_s`. Where one run
                is enough and takes long, the first one counts.
        """
        first = self._once(work)
        if times <= 1 and first > _SLOW_S:
            return first
        took = [self._once(work)]
        while len(took) < times or (sum(took) < self.least_s and len(took) < _AT_MOST):
            took.append(self._once(work))
        return min(took)

    def _once(self, work: Work) -> float:
        wait_for(self.memory.device)
        start = time.perf_counter()
        work()
        wait_for(self.memory.device)
        return time.perf_counter() - start


@dataclass(slots=True)
class PeakGrowth:
    """How much the peak of memory lies above what was in use at `start`.

    On CUDA what torch allocated. On Linux the resident set of this process, with everything that
    is in it: tensors, workspaces of the kernels, and what the allocator loses between them.
    Elsewhere, and where the kernel does not let its mark be reset, it is not known.

    Args:
        device: of the model.
    """

    device: torch.device
    _start: int | None = field(init=False, default=None)

    @property
    def zero_bytes(self) -> int | None:
        """What was in use at `start`; None where it is not known."""
        return self._start

    def start(self) -> None:
        """Take the present use as the zero."""
        self._start = None
        with contextlib.suppress(OSError):
            self.forget()
            self._start = memory_in_use(self.device)

    def forget(self) -> None:
        """Forget the peak so far; the zero stays.

        Raises:
            OSError: the kernel does not let its mark be reset.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        give_back_freed()
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int | None:
        """Bytes since `start`, None where they cannot be known."""
        if self._start is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._start
        return max(0, _own_status()["VmHWM"] - self._start)


def memory_in_use(device: torch.device) -> int | None:
    """Bytes in use now: what torch allocated on CUDA, else what of this process is resident.

    Args:
        device: of the model.

    Returns:
        None where it cannot be known.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    give_back_freed()
    with contextlib.suppress(OSError, KeyError):
        return _own_status()["VmRSS"]
    return None


def _own_status() -> Mapping[str, int]:
    """The lines of the kernel's account of this process that are sizes, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {w[0].rstrip(":"): 1024 * int(w[1]) for w in lines if w[-1:] == ["kB"]}
