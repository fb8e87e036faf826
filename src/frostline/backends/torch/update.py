"""What an optimizer would add to each parameter now, found out without updating anything.

The optimizer is copied with its state; the copy holds copies of the parameters and gradients and
makes one real update of those. Model, optimizer, schedulers and hooks never notice.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from frostline.backends.torch.random_state import read_random_state, write_random_state
from frostline.errors import BackendError

__all__ = ["planned_update", "readable"]


def planned_update(optimizer: Optimizer, rates: Sequence[Any]) -> dict[int, Tensor]:
    """The change of each parameter that has a gradient, by its `id`, in single precision or more.

    Args:
        optimizer: any optimizer whose `step` needs no closure.
        rates: the learning rate of each of its parameter groups.

    Raises:
        BackendError: it needs a closure, or cannot be copied or run apart from the model.
    """
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]  # without anybody's hooks
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise _unplanned(optimizer, "an optimizer that needs a closure", None)
    moving = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    random = read_random_state()
    try:
        copies = dict[int, Any]()
        twin = _twin(optimizer, moving, copies)
        for group, rate in zip(twin.param_groups, rates, strict=True):
            group["lr"] = copy.deepcopy(rate)
        with torch.no_grad():
            step(twin)
            return {id(p): readable(copies[id(p)]) - readable(p) for p in moving}
    except Exception as error:
        raise _unplanned(optimizer, f"{type(error).__name__}: {error}", error) from error
    finally:
        write_random_state(random)


def _twin(optimizer: Optimizer, moving: Sequence[Tensor], copies: dict[int, Any]) -> Optimizer:
    """A copy of the optimizer over copies of the moving parameters; `copies` is a deepcopy memo."""
    for p in moving:
        copies[id(p)] = twin = copy.deepcopy(p, {})
        # Copied, too: some optimizers add weight decay to the gradient itself.
        twin.grad = None if p.grad is None else p.grad.detach().clone()
    still = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in copies]
    copies |= {id(p): p for p in still}  # no gradient: no optimizer touches them
    ids = {id(p) for p in still}
    attributes = {
        # `step` is put on the instance by schedulers and counts calls.
        name: value
        for name, value in vars(optimizer).items()
        if name not in ("state", "step") and not name.endswith("_hooks")
    }
    attributes["state"] = {p: s for p, s in optimizer.state.items() if id(p) not in ids}
    made = object.__new__(type(optimizer))
    vars(made).update(copy.deepcopy(attributes, copies))
    made.state = defaultdict(dict, made.state)
    vars(made).update({n: OrderedDict() for n in vars(optimizer) if n.endswith("_hooks")})
    return made


def readable(tensor: Tensor) -> Tensor:
    """The tensor detached, in at least single precision: half overflows in sums of squares."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _unplanned(optimizer: Optimizer, found: str, cause: Exception | None) -> BackendError:
    error = BackendError(
        f"find out the next update of a {type(optimizer).__name__}",
        found=found,
        fix="train with an optimizer such as SGD or AdamW, or use a policy that reads no updates",
    )
    error.__cause__ = cause
    return error
