"""Measure what each layer group costs in one training step.

Time is charged to groups along a timeline of marks. Forward, every module call marks the group
that owns the module. Backward, every node of the autograd graph marks its group; a node belongs
to the group whose module made the tensor, or to the one that consumes it. Two backward passes
part the two kinds of gradient: one with everything trainable, and one in which only the groups
nearest the input train, so that all others only carry the gradient through.

Marks cost time themselves, so the sums are scaled to passes that run without them. The least of
several repeats counts: whatever else the machine does can only add.

What two numbers per group cannot say: the shallowest group that trains still carries gradients
between its own layers, which count as carrying here, so a plan's predicted step leaves out that
part of one group.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from frostline.backends.torch.example import Example, example_batch
from frostline.backends.torch.tracing import (
    check_runnable,
    leave_untouched,
    private_batch,
    tensors_in,
    uncompiled,
)
from frostline.errors import ModelError
from frostline.groups import GroupCost, LayerGroups

__all__ = ["measure_costs"]

BATCH_SIZE = 8

Seconds = dict[str, float]


def measure_costs(
    model: nn.Module,
    groups: LayerGroups,
    example: Example | Tensor | Mapping[str, Any] | None = None,
    *,
    repeats: int = 3,
) -> LayerGroups:
    """The same groups with the measured cost of one training step in each.

    The model runs in training mode (in evaluation mode where that fails), in its own precision,
    on its own device. The optimizer measured is AdamW. Everything is put back afterwards.

    Args:
        model: the module that `groups` were found in.
        groups: its layer groups.
        example: the batch to run; costs hold for its shape. None makes one up with 8 samples.
        repeats: how often each pass is timed, >= 1; the least time counts.

    Raises:
        ModelError: the model cannot run on the batch, or its output carries no gradient.

    Example:
        >>> from frostline.backends.torch.grouping import layer_groups
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> measure_costs(model, layer_groups(model)).measured
        True
    """
    check_runnable(model)
    if example is None:
        example = example_batch(model, batch_size=BATCH_SIZE)
    with leave_untouched(model) as keep, uncompiled():
        for parameter in model.parameters():
            keep(parameter)
        bench = _Bench(model, groups, Example.of(example), _clock_of(model))
        bench.settle_mode()
        sizes = bench.activation_bytes()
        forward, full, through = bench.training_times(max(1, repeats))
        frozen = bench.frozen_forward_times(max(1, repeats))
        update = bench.update_times(max(1, repeats))
    costs = {
        g.name: GroupCost(
            forward_s=forward.get(g.name, 0.0),
            input_grad_s=through.get(g.name, 0.0),
            weight_grad_s=max(0.0, full.get(g.name, 0.0) - through.get(g.name, 0.0)),
            optimizer_s=update[g.name],
            activation_bytes=sizes.get(g.name, 0),
            frozen_forward_s=frozen.get(g.name, 0.0),
        )
        for g in groups
    }
    return groups.with_costs(costs)


class _Clock(Protocol):
    def now(self) -> Any:
        """A point in time."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two points."""
        ...


class _HostClock:
    """For devices whose operations are done when they return, or are waited for."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self._wait = wait

    def now(self) -> float:
        self._wait()
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    """Events in the stream: no waiting between operations, so they overlap as in training.

    Args:
        device: whose stream; it need not be the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


def _clock_of(model: nn.Module) -> _Clock:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return _CudaClock(device)
    return _HostClock(torch.mps.synchronize) if device.type == "mps" else _HostClock()


class _Timeline:
    """Marks "from here on, time is this group's"."""

    def __init__(self, clock: _Clock, first: str) -> None:
        self._clock = clock
        self._marks: list[tuple[str, Any]] = [(first, clock.now())]

    def mark(self, group: str) -> None:
        """Charge the time from now on to `group`."""
        if self._marks[-1][0] != group:
            self._marks.append((group, self._clock.now()))

    def close(self) -> Seconds:
        """End the timeline; seconds by group."""
        self._marks.append(("", self._clock.now()))
        total: Seconds = {}
        for (group, start), (_, end) in itertools.pairwise(self._marks):
            total[group] = total.get(group, 0.0) + self._clock.seconds(start, end)
        return total


@dataclass
class _Walk:
    """Which group is running, followed by module hooks during one forward pass.

    Groups without modules (weights used by functions) are followed by the use of their weights.
    """

    owners: Mapping[int, str]
    loose: Mapping[int, str]
    current: str
    on_change: Callable[[str], None]
    on_output: Callable[[Tensor, str], None]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow all module calls until left. The hooks are global: the model's are untouched."""
        running: list[str] = []

        def enter(module: nn.Module, inputs: Any) -> None:
            if (owner := self.owners.get(id(module))) is not None:
                for tensor in tensors_in(inputs):
                    self.on_output(tensor, self.current)
                running.append(owner)
                self._switch(owner)

        def leave(module: nn.Module, _inputs: Any, output: Any) -> None:
            if (owner := self.owners.get(id(module))) is not None:
                for tensor in tensors_in(output):
                    self.on_output(tensor, owner)
                running.pop()
                # What runs between two groups belongs to the earlier one.
                self._switch(running[-1] if running else owner)

        hooks = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        )
        try:
            with _WatchedWeights(self) if self.loose else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def run_function(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a function of PyTorch, in the group of the loose weight it uses, if any."""
        read = list(tensors_in((args, kwargs)))
        owner = next((self.loose[id(t)] for t in read if id(t) in self.loose), None)
        if owner is None:
            return func(*args, **kwargs)
        for tensor in read:
            self.on_output(tensor, self.current)
        self._switch(owner)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self.on_output(tensor, owner)
        return result

    def _switch(self, group: str) -> None:
        self.current = group
        self.on_change(group)


class _WatchedWeights(TorchFunctionMode):
    def __init__(self, walk: _Walk) -> None:
        super().__init__()
        self._walk = walk

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass the call on through the walk."""
        return self._walk.run_function(func, args, kwargs or {})


class _Bench:
    """Runs the timed passes of one model on one batch."""

    def __init__(
        self, model: nn.Module, groups: LayerGroups, example: Example, clock: _Clock
    ) -> None:
        self._model = model
        self._groups = groups
        self._example = example
        self._clock = clock
        self._first = next((g.name for g in groups if g.calls), groups.names[0])
        modules = dict(model.named_modules())
        # A block that uses a layer of another group is in no group's modules, but names its own.
        blocks = {id(modules[g.name]): g.name for g in groups if g.name in modules}
        self._owners = blocks | {id(modules[m.name]): g.name for g in groups for m in g.modules}
        parameters = dict(model.named_parameters())
        self._parameters = {
            g.name: [q for p in g.parameters if (q := parameters[p.name]).is_floating_point()]
            for g in groups
        }
        followed = set(self._owners.values())
        self._loose = {
            id(p): name
            for name, own in self._parameters.items()
            if name not in followed
            for p in own
        }

    def settle_mode(self) -> None:
        """Training mode, or evaluation mode where the model cannot train on this batch."""
        self._train(self._groups.names)
        for training in (True, False):
            self._set_mode(training=training)
            try:
                return self._gradients(self._forward())
            except ModelError:
                if not training:
                    raise
        return None

    def _set_mode(self, *, training: bool) -> None:
        # One by one: `train()` is overridden in models that merge weights in it.
        for module in self._model.modules():
            module.training = training

    def training_times(self, repeats: int) -> tuple[Seconds, Seconds, Seconds]:
        """Seconds by group: forward, full backward, and carrying the gradient through only."""
        sources = self._sources()
        forward, full = self._passes(self._groups.names, repeats)
        _, through = self._passes(sources, repeats)
        return forward, full, {g: s for g, s in through.items() if g not in sources}

    def activation_bytes(self) -> dict[str, int]:
        """Bytes that the forward pass keeps for the backward pass, each storage counted once."""
        self._train(self._groups.names)
        known = {_address(t) for t in (*self._model.parameters(), *self._model.buffers())}
        args, kwargs = self._batch()
        known |= {_address(t) for t in tensors_in((args, kwargs))}
        sizes: dict[str, int] = {}
        kept: list[Tensor] = []  # held, so that no address is used twice
        walk = self._walk(lambda _: None, lambda *_: None)

        def pack(tensor: Tensor) -> int:
            kept.append(tensor.detach())
            if _address(tensor) not in known:
                known.add(_address(tensor))
                size = tensor.untyped_storage().nbytes()
                sizes[walk.current] = sizes.get(walk.current, 0) + size
            return len(kept) - 1

        with walk.following(), saved_tensors_hooks(pack, kept.__getitem__):
            output = self._call(args, kwargs)
        del output
        return sizes

    def frozen_forward_times(self, repeats: int) -> Seconds:
        """Seconds by group of a forward pass in evaluation mode that records nothing.

        Leaves the model in evaluation mode.
        """
        self._set_mode(training=False)
        marked, plain = [], []
        for _ in range(repeats):
            args, kwargs = self._batch()
            start = self._clock.now()
            self._call(args, kwargs, record=False)
            plain.append(self._clock.seconds(start, self._clock.now()))
            args, kwargs = self._batch()
            timeline = _Timeline(self._clock, self._first)
            walk = self._walk(timeline.mark, lambda *_: None)
            with walk.following():
                self._call(args, kwargs, record=False)
            marked.append(timeline.close())
        return _scaled(_least(marked), min(plain))

    def update_times(self, repeats: int) -> Seconds:
        """Seconds by group for one AdamW update, on copies of the parameters."""
        return {
            name: min(_timed(self._clock, _adamw_update(parameters)) for _ in range(repeats))
            for name, parameters in self._parameters.items()
        }

    def _passes(self, trained: Iterable[str], repeats: int) -> tuple[Seconds, Seconds]:
        """Forward and backward seconds by group, scaled to passes without marks."""
        self._train(trained)
        marked, plain = [], []
        for _ in range(repeats):
            plain.append(self._plain_pass())
            marked.append(self._marked_pass())
        forward = _least([f for f, _ in marked])
        backward = _least([b for _, b in marked])
        return (
            _scaled(forward, min(f for f, _ in plain)),
            _scaled(backward, min(b for _, b in plain)),
        )

    def _plain_pass(self) -> tuple[float, float]:
        args, kwargs = self._batch()
        start = self._clock.now()
        loss = _loss(self._call(args, kwargs), self._model)
        middle = self._clock.now()
        self._gradients(loss)
        end = self._clock.now()
        return self._clock.seconds(start, middle), self._clock.seconds(middle, end)

    def _marked_pass(self) -> tuple[Seconds, Seconds]:
        args, kwargs = self._batch()
        made_by: dict[Node, str] = {}
        timeline = _Timeline(self._clock, self._first)
        walk = self._walk(timeline.mark, _note_maker(made_by))
        with walk.following():
            loss = _loss(self._call(args, kwargs), self._model)
        forward = timeline.close()
        nodes = self._nodes(loss, made_by, walk.current)
        backward_line = _Timeline(self._clock, walk.current)
        hooks = [n.register_prehook(_marker(backward_line, group)) for n, group in nodes.items()]
        self._gradients(loss)
        backward = backward_line.close()
        for hook in hooks:
            hook.remove()
        return forward, backward

    def _walk(
        self, on_change: Callable[[str], None], on_output: Callable[[Tensor, str], None]
    ) -> _Walk:
        return _Walk(self._owners, self._loose, self._first, on_change, on_output)

    def _forward(self) -> Tensor:
        args, kwargs = self._batch()
        return _loss(self._call(args, kwargs), self._model)

    def _call(self, args: Any, kwargs: Any, *, record: bool = True) -> Any:
        try:
            with torch.set_grad_enabled(record):
                return self._model(*args, **kwargs)
        except Exception as error:
            raise ModelError(
                f"run a training step of {type(self._model).__name__}",
                found=f"{type(error).__name__}: {error}",
                fix="pass a batch the model can train on: Example(args=(...,))",
            ) from error

    def _gradients(self, loss: Tensor) -> None:
        # Not `backward()`: nothing is accumulated, and hooks that step an optimizer stay quiet.
        wanted = [p for p in self._model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, wanted, allow_unused=True)

    def _batch(self) -> tuple[Any, Any]:
        return private_batch(self._model, self._example.args, self._example.kwargs)

    def _train(self, names: Iterable[str]) -> None:
        trained = {id(p) for name in names for p in self._parameters[name]}
        for parameter in self._model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _nodes(self, loss: Tensor, made_by: dict[Node, str], last: str) -> dict[Node, str]:
        """The group of every node that the backward pass runs."""
        depth = {g.name: g.depth for g in self._groups}
        found: dict[Node, str] = {}
        for node, consumers in _consumers(loss).items():
            after = (found[c] for c in consumers)
            found[node] = made_by.get(node) or min(after, key=depth.__getitem__, default=last)
        return found

    def _sources(self) -> frozenset[str]:
        """Groups that get nothing from other groups: the first one of each branch."""
        self._train(self._groups.names)
        owner = {id(p): name for name, ps in self._parameters.items() for p in ps}
        made_by: dict[Node, str] = {}
        walk = self._walk(lambda _: None, _note_maker(made_by))
        with walk.following():
            loss = self._forward()
        nodes = self._nodes(loss, made_by, walk.current)
        reached: dict[Node, frozenset[str]] = {}
        fed_by: dict[str, frozenset[str]] = {}
        for node in reversed(nodes):
            variable = getattr(node, "variable", None)
            own = _own(owner, variable)
            below = (reached[n] for n, _ in node.next_functions if n is not None)
            reached[node] = own.union(*below)
            fed_by[nodes[node]] = fed_by.get(nodes[node], frozenset()) | reached[node]
        # Where a tied weight closes a circle, the shallowest group is still the first one.
        shallowest = next(g.name for g in self._groups if g.name in reached[next(iter(nodes))])
        return frozenset({shallowest, *(n for n, feeding in fed_by.items() if feeding <= {n})})


def _own(owner: Mapping[int, str], variable: Tensor | None) -> frozenset[str]:
    return frozenset({owner[id(variable)]}) if id(variable) in owner else frozenset()


def _consumers(loss: Tensor) -> dict[Node, list[Node]]:
    """Every node behind the loss with the nodes that use it; consumers come first."""
    order: list[Node] = []
    state: dict[Node, bool] = {}
    stack: list[tuple[Node, bool]] = [(loss.grad_fn, False)] if loss.grad_fn is not None else []
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in state:
            state[node] = True
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    consumers: dict[Node, list[Node]] = {node: [] for node in reversed(order)}
    for node in consumers:
        for following, _ in node.next_functions:
            if following is not None:
                consumers[following].append(node)
    return consumers


def _note_maker(made_by: dict[Node, str]) -> Callable[[Tensor, str], None]:
    def note(tensor: Tensor, group: str) -> None:
        if tensor.grad_fn is not None:
            made_by.setdefault(tensor.grad_fn, group)

    return note


def _marker(timeline: _Timeline, group: str) -> Callable[..., None]:
    def mark(*_: Any) -> None:
        timeline.mark(group)

    return mark


def _loss(output: Any, model: nn.Module) -> Tensor:
    """One number that depends on all that the model predicts."""
    logits = getattr(output, "logits", None)
    outputs: Sequence[Tensor] = [
        t for t in tensors_in(output if logits is None else logits) if t.requires_grad
    ]
    if not outputs:
        raise ModelError(
            f"run a training step of {type(model).__name__}",
            found="an output that carries no gradient",
            fix="measure a model whose output depends on its parameters",
        )
    return torch.stack([t.float().mean() for t in outputs]).sum()


def _least(runs: Sequence[Seconds]) -> Seconds:
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: min(run.get(name, math.inf) for run in runs) for name in names}


def _scaled(parts: Seconds, total: float) -> Seconds:
    whole = sum(parts.values())
    return {name: part * total / whole for name, part in parts.items()} if whole else parts


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _timed(clock: _Clock, work: Callable[[], None]) -> float:
    work()  # warm
    start = clock.now()
    work()
    return clock.seconds(start, clock.now())


def _adamw_update(parameters: Sequence[Tensor]) -> Callable[[], None]:
    """AdamW's arithmetic on copies. Building an optimizer would import the compiler: seconds."""
    copies = [
        (p.detach().clone(), *(torch.full_like(p, 1e-3, requires_grad=False) for _ in range(3)))
        for p in parameters
    ]

    def update() -> None:
        with torch.no_grad():
            for value, gradient, mean, square in copies:
                value.mul_(0.99)
                mean.lerp_(gradient, 0.1)
                square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                value.addcdiv_(mean, square.sqrt().add_(1e-8), value=-1e-3)

    return update
