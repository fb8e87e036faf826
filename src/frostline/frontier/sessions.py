"""The three ways of running a model on stand-ins: record it, fill from it, replay it.

All of them see the same events in the same order, because the model's own code sees the same
things: stand-ins wherever a value of the frozen region goes.

- `Recorder` computes everything and writes down what happened.
- `Filler` computes the frozen part for a block of samples, module by module at full speed.
- `Replayer` computes nothing of it, and gives stored values to whatever is live.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from frostline.backends.torch.tracing import COMPILED_CALL, is_compiled
from frostline.frontier.script import (
    Call,
    Entry,
    Out,
    ReplayDiverged,
    Script,
    Spec,
    Verdict,
    call_name,
    same_constants,
)
from frostline.frontier.standin import (
    Node,
    StandIn,
    stand_in,
    stand_ins_in,
    version_of,
    with_values,
)
from frostline.frontier.state import foreign_hooks, hook_tables, is_foreign, state_of
from frostline.frontier.structure import Leaves, leaves_of, map_leaves, tensors_of
from frostline.frontier.taint import Inside, Taint

__all__ = [
    "NO_SAMPLE",
    "TRAINS",
    "AllFilled",
    "Filler",
    "HookOperation",
    "Recorder",
    "Refiller",
    "Replayer",
    "hooks_on_values",
    "overridden",
    "real_leaves",
]

Forward = Callable[..., Any]
#: Why most modules are not skipped: nothing to say about it.
TRAINS = "uses what trains"
NO_SAMPLE = "returns a tensor that depends on no sample"
_BLANK = torch.empty(0)
SET_GRAD = getattr(Tensor, "requires_grad").__set__  # noqa: B009  a property on the class
WANTS_GRAD = frozenset({Tensor.requires_grad_, SET_GRAD})


class AllFilled(BaseException):
    """Everything that is stored has been computed: the rest of the forward pass is not needed.

    No `Exception`, so that no handler in a model catches it.
    """


@contextmanager
def overridden(
    modules: Mapping[str, nn.Module], call: Callable[[str, Forward, Any, Any], Any]
) -> Iterator[None]:
    """Send the `forward` of these modules through `call(name, original, args, kwargs)`.

    Hooks of a module run around it as ever. Of a module that was compiled in place, hooks included,
    it is the compiled call that is sent: compiled code knows no stand-ins.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, module in modules.items():
            own = vars(module)
            compiled = own.get(COMPILED_CALL)
            door = "forward" if compiled is None else COMPILED_CALL
            kept.append((own, door, own.get(door, _BLANK)))
            own[door] = _sent(call, name, module.forward if compiled is None else compiled)
        yield
    finally:
        for own, door, before in kept:
            if before is _BLANK:
                own.pop(door, None)
            else:
                own[door] = before


@contextmanager
def hooks_on_values(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let the user's hooks see real values: each becomes an operation that is always run."""
    kept: list[tuple[dict[int, Any], int, Any]] = []
    try:
        for name, module in modules.items():
            for table in hook_tables(module):
                for key, hook in table.items():
                    if is_foreign(hook) and not isinstance(hook, HookOperation):
                        kept.append((table, key, hook))
                        table[key] = HookOperation(name, hook)
        yield
    finally:
        for table, key, hook in kept:
            if key in table:  # else it has removed itself
                table[key] = hook


class HookOperation:
    """A hook of the user's as an operation on whatever values it is given.

    Args:
        name: of the module it is on.
        hook: the user's.
    """

    def __init__(self, name: str, hook: Callable[..., Any]) -> None:
        self.__name__ = f"hook {getattr(hook, '__qualname__', type(hook).__name__)} on {name}"
        self._hook = hook

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Run the hook through the session of the values, if they have one."""
        leaves = leaves_of(given).items
        found = [x for x in leaves if type(x) is StandIn and not x.node.live]
        for each in found:
            session: Any = each.node.session
            if session.open and hasattr(session, "hook"):
                return session.hook(self, module, given, found)
        return self._hook(module, *map_leaves(given, _real, objects=True))

    def on_values(self, module: nn.Module, given: Any) -> Any:
        """Run the hook on real tensors."""
        return self._hook(module, *given)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookOperation) and other._hook is self._hook

    def __hash__(self) -> int:
        return id(self._hook)


def _sent(call: Callable[[str, Forward, Any, Any], Any], name: str, original: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(name, original, args, kwargs)

    return forward


def real_leaves(value: Any) -> Any:
    """A model's output with real tensors in place of stand-ins."""
    if type(value) is Tensor:
        return value
    return map_leaves(value, _real, objects=True)


def _real(leaf: Any) -> Any:
    return leaf.node.real() if type(leaf) is StandIn else leaf


def _rebuilt(result: Any, parts: Leaves) -> Callable[[Any], Any]:
    """`parts.build`, holding on to no tensor of the recording."""
    if isinstance(result, Tensor):
        return _only
    blank = parts.build([_BLANK if isinstance(leaf, Tensor) else leaf for leaf in parts.items])
    return leaves_of(blank).build


def _only(leaves: Sequence[Any]) -> Any:
    return leaves[0]


def _constants(args: Any, kwargs: Any) -> tuple[Any, ...]:
    return tuple(_parted(args, kwargs)[1])


def _changed(found: Sequence[StandIn], versions: Sequence[int]) -> list[int]:
    """Places of the stand-ins whose value was written to."""
    return [
        i
        for i, (s, v) in enumerate(zip(found, versions, strict=True))
        if version_of(s.node.real()) != v
    ]


class Recorder:
    """Runs the model on stand-ins that hold their values, and writes down what happens.

    Modules that are known to be frozen may be run as a whole (`whole`): what is inside them is
    watched below autograd and not written down, which takes a fraction of the time. If that shows
    that such a module cannot be skipped, it is named in `opened`, and the recording is void.

    Args:
        model: the model; left alone by the caller's care.
        taint: entered while the model runs.
        whole: names of modules to run as a whole where all that they read is frozen.

    Attributes:
        entries: all operations on values of the frozen region, those inside modules included.
        calls: all module calls, by number.
        specs: what each value looks like.
        values: copies of the values, as they were when they were made.
        places: name of the module in whose code each value was made.
        grads: values of which the model's own code wants a gradient.
        kept: (module, attribute) where the model left values of the frozen region.
        opened: names of the modules that cannot be taken as a whole.
        opaque: names of the modules that count as one operation: TorchScript, and compiled ones
            that train.
        insides: what happened inside of each call that ran as a whole, by its number in `calls`.
    """

    def __init__(
        self, model: nn.Module, taint: Taint, whole: Collection[str] = frozenset()
    ) -> None:
        self.open = True
        self.opened: set[str] = set()
        self.opaque: set[str] = set()
        self.insides: dict[int, Inside] = {}
        self._whole = frozenset(whole)
        self.entries: list[Entry] = []
        self.calls: list[Call] = []
        self.specs: dict[int, Spec] = {}
        self.values: dict[int, Tensor] = {}
        self.places: dict[int, str] = {}
        self.grads: set[int] = set()
        self.kept: list[tuple[str, str]] = []
        self._modules = {n: m for n, m in model.named_modules() if n}
        self._taint = taint
        self._counts: dict[str, int] = {}
        self._stack: list[int] = []
        self._hooked = foreign_hooks(model)
        self._spoiled: dict[int, str] = {}

    @property
    def frozen_share(self) -> float:
        """Share of the forward pass's work that is frozen, in [0, 1]; 0 where none was counted."""
        total = self._taint.work_frozen + self._taint.work_live
        return self._taint.work_frozen / total if total else 0.0

    @property
    def written(self) -> frozenset[str]:
        """Names of the parameters and buffers that the pass wrote to."""
        return frozenset(self._taint.written)

    @property
    def frozen_work(self) -> int:
        """Floating-point operations that are frozen."""
        return self._taint.work_frozen

    def input(self, tensor: Tensor) -> Tensor:
        """A stand-in for one tensor of the batch; live ones stay as they are."""
        number = len(self.specs)
        made = self._new(tensor, number)
        self._taint.sample(tensor)
        return tensor if self._taint.is_live(tensor) else made

    def _new(self, tensor: Tensor, number: int | None = None) -> StandIn:
        number = len(self.specs) if number is None else number
        node = Node(number, self, tensor)
        self.specs[number] = Spec.of(tensor)
        self.values[number] = tensor.detach().clone()
        self.places[number] = self._where
        return stand_in(node, self.specs[number].meta(), tensor.device)

    @property
    def _where(self) -> str:
        return self.calls[self._stack[-1]].name if self._stack else ""

    def hook(self, hook: HookOperation, module: nn.Module, given: Any, found: Any) -> Any:
        """Run a hook on real values, and write down that it must always be run."""
        run = partial(hook.on_values, module)
        return self.operation(_Named(hook, run), (given,), {}, found, always=True)

    def operation(
        self, func: Any, args: Any, kwargs: Any, found: list[StandIn], *, always: bool = False
    ) -> Any:
        """Run an operation on the values, and write down what it is."""
        taint = self._taint
        if func in WANTS_GRAD and type(args[0]) is StandIn:
            return self._want_grad(func, args, kwargs)
        taint.dynamic, taint.why = False, None
        found = [s for s in found if not s.node.live]
        entry = Entry(
            what=func,
            verdict=Verdict.GLUE,
            parents=tuple(s.node.id for s in found),
            constants=_constants(args, kwargs),
            where=self._where,
            calls=tuple(self._stack),
            stale=any(version_of(s.node.real()) != s.node.version for s in found),
            weighted=any(isinstance(t, nn.Parameter) for t in tensors_of((args, kwargs))),
        )
        self.entries.append(entry)
        real_args, real_kwargs = _all_real(args), _all_real(kwargs)
        versions = [version_of(s.node.real()) for s in found]
        plain = [t for t in tensors_of((args, kwargs)) if type(t) is not StandIn]
        plain_versions = [version_of(t) for t in plain]
        live = taint.is_live((real_args, real_kwargs))
        result = func(*real_args, **real_kwargs)
        changed = _changed(found, versions)
        into = [t for t, v in zip(plain, plain_versions, strict=True) if version_of(t) != v]
        tensors = list(tensors_of(result))
        live = live or bool(into) or taint.is_live(tensors)
        if live or any(t.requires_grad for t in tensors):
            entry.verdict = Verdict.LIVE
            entry.why = taint.take_why() or ("writes to another tensor" if into else None)
            taint.mark([*tensors, *into, *(found[i].node.real() for i in changed)])
            for i in changed:
                found[i].node = Node(-1, self, found[i].node.real())
            for s in found:  # requires_grad_() writes nothing
                if s.node.value is not None and s.node.value.requires_grad:
                    s.node = Node(-1, self, s.node.value)
            return result
        if taint.dynamic or always:
            entry.verdict = Verdict.EAGER if tensors or changed else Verdict.LOOK
        elif not tensors and not changed:
            entry.verdict = Verdict.LOOK
        return self._wrap(entry, result, found, changed)

    def _wrap(self, entry: Entry, result: Any, found: Sequence[StandIn], changed: list[int]) -> Any:
        """Stand-ins in place of the result's tensors."""
        entry.rebinds = tuple(self._rebind(found, i) for i in changed)
        own = {id(s.node.value): i for i, s in reversed(list(enumerate(found)))}
        parts = leaves_of(result)
        outs, leaves = [], []
        for leaf in parts.items:
            if not isinstance(leaf, Tensor):
                outs.append(Out(constant=leaf))
                leaves.append(leaf)
            elif (place := own.get(id(leaf))) is not None:
                outs.append(Out(argument=place))
                leaves.append(found[place])
            else:
                made = self._new(leaf)
                made.node.grad = self._passes_grad(made, found)
                outs.append(Out(node=made.node.id))
                leaves.append(made)
        entry.outs, entry.build = tuple(outs), _rebuilt(result, parts)
        return parts.build(leaves) if parts.items else result

    def _passes_grad(self, made: StandIn, found: Sequence[StandIn]) -> bool:
        asked = any(s.node.grad for s in found) and torch.is_grad_enabled()
        if asked and made.dtype.is_floating_point:
            self.grads.add(made.node.id)
            return True
        return False

    def _want_grad(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The model asks for a gradient of a frozen value; nothing that trains depends on it."""
        node = args[0].node
        wanted = (*args[1:], *kwargs.values(), True)[0]
        self.entries.append(
            Entry(func, Verdict.GRAD, (node.id,), (wanted,), where=self._where,
                  calls=tuple(self._stack))
        )  # fmt: skip
        node.grad = bool(wanted)
        return None if func == SET_GRAD else args[0]

    def _rebind(self, found: Sequence[StandIn], place: int) -> tuple[int, int]:
        fresh = self._new(found[place].node.real()).node
        old = found[place].node
        for s in found:
            if s.node is old:
                s.node = fresh
        return place, fresh.id

    # -- module calls ------------------------------------------------------------------------

    def call(self, name: str, original: Forward, args: Any, kwargs: Any) -> Any:
        """Run a module's forward, and note all that decides whether it may be skipped."""
        if not self.open:
            return original(*args, **kwargs)
        module, taint = self._modules[name], self._taint
        if self._is_opaque(module):
            self.opaque.add(name)
            return _through(self, Scripted(name, original), args, kwargs)
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        if taint.inside is not None:
            return original(*args, **kwargs)
        record = Call(name, number, tuple(self._stack), len(self.entries))
        ins = _inputs(args, kwargs)
        entering = [s.node for s in ins]
        opaque = taint.is_live([t for t in tensors_of((args, kwargs)) if type(t) is not StandIn])
        if ins and not opaque and name in self._whole and _is_simple((args, kwargs)):
            return self._call_whole(record, original, args, kwargs, ins)
        before = None if opaque else (
            state_of(module), state_of((args, kwargs)), len(taint.written)
        )  # fmt: skip
        stale = any(version_of(n.real()) != n.version for n in entering)
        taint.streams.look()
        moved, taint.streams.moved_here = taint.streams.moved_here, False
        taint.why = None
        self.calls.append(record)
        index = len(self.calls) - 1
        self._stack.append(index)
        first = len(self.specs)
        try:
            result = original(*args, **kwargs)
        finally:
            self._stack.pop()
        record.end = len(self.entries)
        draws = taint.streams.look() or taint.streams.moved_here
        taint.streams.moved_here = moved or draws
        record.unfit = self._unfit(record, module, draws=draws, before=before,
                                   args=(args, kwargs))  # fmt: skip
        record.unfit = record.unfit or self._spoiled.get(index)
        if record.unfit is not None:
            self._spoiled.update(dict.fromkeys(record.around, record.unfit))
        record.entry = self._call_entry(record, args, kwargs, ins, entering, result, first)
        if record.entry is not None:
            record.entry.stale = stale
        return result

    def _is_opaque(self, module: nn.Module) -> bool:
        """Whether a module's code cannot see stand-ins, and cannot be skipped either."""
        if isinstance(module, torch.jit.ScriptModule):
            return True
        return is_compiled(module) and self._taint.is_live(list(module.parameters()))

    def _call_whole(
        self, record: Call, original: Forward, args: Any, kwargs: Any, ins: list[StandIn]
    ) -> Any:
        """Run a frozen module on real values, and note what tells whether it may be skipped."""
        taint, module = self._taint, self._modules[record.name]
        self.calls.append(record)
        index = len(self.calls) - 1
        entering = [s.node for s in ins]
        real = _all_real(args), _all_real(kwargs)
        versions = [version_of(n.real()) for n in entering]
        stale = any(version_of(n.real()) != n.version for n in entering)
        before = _states(module), state_of(real), len(taint.written)
        taint.streams.look()
        moved, taint.streams.moved_here = taint.streams.moved_here, False
        taint.why, taint.dynamic = None, False
        inside = self.insides[index] = taint.enter()
        results: Sequence[Tensor] = ()
        try:
            result = original(*real[0], **real[1])
            results = [t for t in leaves_of(result).items if isinstance(t, Tensor)]
        finally:
            taint.leave(record.name, results)
        draws = taint.streams.look() or taint.streams.moved_here
        taint.streams.moved_here = moved or draws
        same = before == (_states(module), state_of(real), len(taint.written))
        plain = all(
            type(leaf) is Tensor and taint.is_sampled(leaf) and not leaf.requires_grad
            if isinstance(leaf, Tensor)
            else _is_plain(leaf)
            for leaf in leaves_of(result).items
        )
        if (
            inside.lived or inside.looked or draws or taint.dynamic or taint.why is not None
            or not same or not plain or not results or record.name in self._hooked
        ):  # fmt: skip
            self.opened.add(record.name)
            if inside.lived or draws or not plain:
                return result
        changed = _changed(ins, versions)
        made = Entry(
            what=(record.name, record.number),
            verdict=Verdict.CALL,
            parents=tuple(node.id for node in entering),
            constants=tuple(c for c in _constants(args, kwargs) if _is_plain(c)),
            where=record.name,
            calls=(*record.around, index),
            stale=stale,
        )
        wrapped = self._wrap(made, result, ins, changed)
        self.entries.append(made)  # in place of all that happened inside
        record.end = len(self.entries)
        record.entry = replace(made, calls=record.around)
        return wrapped

    def _unfit(
        self, record: Call, module: nn.Module, *, draws: bool, before: Any, args: Any
    ) -> str | None:
        if before is None:
            return TRAINS
        state, passed, written = before
        inner = self.entries[record.begin : record.end]
        lives = [entry for entry in inner if entry.verdict is Verdict.LIVE]
        if why := next((e.why for e in lives if e.why), None):
            return why
        if lives:
            return TRAINS
        if draws:
            return "draws random numbers from Python or NumPy"
        if len(self._taint.written) != written:
            return "writes to its own parameters or buffers"
        if state_of(module) != state:
            return "changes its own state"
        if state_of(args) != passed:
            return "changes an object it was given"
        if (hook := self._hooked.get(record.name)) is not None:
            return f"has a hook ({hook})"
        for entry in inner:
            if entry.verdict in (Verdict.LOOK, Verdict.EAGER):
                return "looks at values (control flow that depends on data)"
        if self._taint.why is not None:  # live work that touched no value of the frozen region
            return self._taint.take_why()
        return None

    def _call_entry(
        self,
        record: Call,
        args: Any,
        kwargs: Any,
        ins: list[StandIn],
        entering: list[Node],
        result: Any,
        first: int,
    ) -> Entry | None:
        """The call as one entry, or None (and why) where its result cannot be put together."""
        outs: list[Out] = []
        places = {id(s): i for i, s in reversed(list(enumerate(ins)))}
        parts = leaves_of(result)
        for leaf in parts.items:
            if type(leaf) is StandIn:
                if (place := places.get(id(leaf))) is not None:
                    outs.append(Out(argument=place))
                elif leaf.node.live or leaf.node.id < first:
                    record.unfit = record.unfit or "returns a value that it was not given"
                    return None
                else:
                    outs.append(Out(node=leaf.node.id))
            elif isinstance(leaf, Tensor):
                # Cheap to compute again: it depends on no sample.
                record.unfit = record.unfit or NO_SAMPLE
                return None
            elif _is_plain(leaf):
                outs.append(Out(constant=leaf))
            else:
                record.unfit = record.unfit or f"returns a {type(leaf).__name__}"
                return None
        rebinds = tuple(
            (i, s.node.id)
            for i, (s, node) in enumerate(zip(ins, entering, strict=True))
            if s.node is not node
        )
        return Entry(
            what=(record.name, record.number),
            verdict=Verdict.CALL,
            parents=tuple(node.id for node in entering),
            constants=tuple(c for c in _constants(args, kwargs) if _is_plain(c)),
            outs=tuple(outs),
            build=_rebuilt(result, parts),
            rebinds=rebinds,
            where=record.name,
            calls=record.around,
        )


class _Named:
    """A call that counts as the same operation as its name."""

    def __init__(self, name: Any, run: Callable[..., Any]) -> None:
        self.name, self.__name__ = name, name.__name__
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self._run(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Scripted:
    """The forward of a TorchScript or compiled module, which knows no stand-ins, as an operation.

    Args:
        name: of the module.
        forward: its own forward.
    """

    def __init__(self, name: str, forward: Forward) -> None:
        self.__name__ = name
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self._forward(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scripted) and other.__name__ == self.__name__

    def __hash__(self) -> int:
        return hash(self.__name__)


def _through(session: Any, scripted: Scripted, args: Any, kwargs: Any) -> Any:
    found = list(stand_ins_in((args, kwargs)))
    if any(not s.node.live for s in found):
        return session.operation(scripted, args, kwargs, found)
    return scripted(*with_values(args), **with_values(kwargs))


def _inputs(args: Any, kwargs: Any) -> list[StandIn]:
    return _parted(args, kwargs)[0]


#: Arguments that are no containers, by their exact type.
_FLAT = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, Tensor,
                   nn.Parameter})  # fmt: skip


def _parted(args: Any, kwargs: Any) -> tuple[list[StandIn], list[Any]]:
    """The frozen stand-ins among the arguments, and what is no tensor; fast where all is flat."""
    found: list[StandIn] = []
    others: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is StandIn:
            if value.node.id >= 0:
                found.append(value)
        elif kind not in _FLAT:
            break
        elif not isinstance(value, Tensor):
            others.append(value)
    else:
        return found, others
    leaves = leaves_of((args, kwargs)).items
    found = [leaf for leaf in leaves if type(leaf) is StandIn and not leaf.node.live]
    return found, [leaf for leaf in leaves if not isinstance(leaf, Tensor)]


def _is_simple(value: Any) -> bool:
    """Whether arguments hold nothing but tensors and plain values, in plain containers."""
    kind = type(value)
    if kind is tuple or kind is list:
        return all(map(_is_simple, value))
    if kind is dict:
        return all(map(_is_simple, value.values()))
    return isinstance(value, Tensor) or _is_plain(value)


def _states(module: nn.Module) -> list[Any]:
    """What a module and all modules inside it hold."""
    return [state_of(inner) for inner in module.modules()]


def _is_plain(value: Any) -> bool:
    kinds = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
    return isinstance(value, kinds)


class _Follower:
    """Follows a script entry by entry."""

    def __init__(self, script: Script) -> None:
        self.open = True
        self._script = script
        self._at = 0
        self._counts: dict[str, int] = {}

    def hook(self, hook: HookOperation, module: nn.Module, given: Any, found: Any) -> Any:
        """Run a hook on real values."""
        return self.operation(_Named(hook, partial(hook.on_values, module)), (given,), {}, found)

    def operation(self, func: Any, args: Any, kwargs: Any, found: list[StandIn]) -> Any:
        """Run or skip an operation, as the script says."""
        found = [s for s in found if not s.node.live]
        entry = self._next(func, found)
        if entry.verdict is Verdict.GRAD:
            found[0].node.grad = bool((*args[1:], *kwargs.values(), True)[0])
            return None if func == SET_GRAD else args[0]
        free = entry.varying or entry.verdict is Verdict.LIVE  # run as it is in any case
        if not free and not same_constants(entry.constants, _constants(args, kwargs)):
            raise self._diverged(entry, "with other settings than recorded")
        return self._operate(entry, func, args, kwargs, found)

    def call(self, name: str, original: Forward, args: Any, kwargs: Any) -> Any:
        """Run or skip a module call."""
        if not self.open:
            return original(*args, **kwargs)
        if name in self._script.scripted:
            return _through(self, Scripted(name, original), args, kwargs)
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        if number not in self._script.skipped.get(name, ()):
            return original(*args, **kwargs)
        ins, others = _parted(args, kwargs)
        entry = self._next((name, number), ins)
        constants = tuple(c for c in others if _is_plain(c))
        if not entry.varying and not same_constants(entry.constants, constants):
            raise self._diverged(entry, "with other arguments than recorded")
        return self._skip(entry, original, args, kwargs, ins)

    def _next(self, what: Any, found: Sequence[StandIn]) -> Entry:
        if self._at >= len(self._script.entries):
            raise self._diverged(None, f"does more than recorded ({_title(what)})")
        entry = self._script.entries[self._at]
        self._at += 1
        if entry.what != what:
            raise self._diverged(entry, f"comes where {_title(what)} runs now")
        if entry.parents != tuple(s.node.id for s in found):
            raise self._diverged(entry, "reads other values than recorded")
        return entry

    def _diverged(self, entry: Entry | None, found: str) -> ReplayDiverged:
        title = "the model" if entry is None else entry.title
        return ReplayDiverged(
            "replay the frozen region",
            found=f"{title} {found}",
            fix="nothing to do: this batch takes the full forward pass",
        )

    def _operate(
        self, entry: Entry, func: Any, args: Any, kwargs: Any, found: list[StandIn]
    ) -> Any:
        raise NotImplementedError

    def _skip(
        self, entry: Entry, original: Forward, args: Any, kwargs: Any, ins: list[StandIn]
    ) -> Any:
        raise NotImplementedError

    def _live(self, func: Any, args: Any, kwargs: Any, found: Sequence[StandIn]) -> Any:
        """Run on real values; stand-ins that it writes into leave the frozen region."""
        for s in found:
            if s.node.grad and not s.node.real().requires_grad:
                s.node.real().requires_grad_()
        real_args, real_kwargs = with_values(args), with_values(kwargs)
        versions = [version_of(s.node.real()) for s in found]
        result = func(*real_args, **real_kwargs)
        for s, version in zip(found, versions, strict=True):
            value = s.node.real()
            if version_of(value) != version or (value.requires_grad and not s.node.grad):
                s.node = Node(-1, s.node.session, value)
        return result


def _title(what: Any) -> str:
    return call_name(*what) if type(what) is tuple else getattr(what, "__name__", str(what))


class Filler(_Follower):
    """Computes the frozen part for real, and keeps what is to be stored.

    Args:
        script: what to follow.
        wanted: numbers of the values to keep.
        stop: whether to end the forward pass when all of them are there.

    Attributes:
        kept: the values, by number.
        specs: what every value looked like.
    """

    def __init__(self, script: Script, wanted: frozenset[int], *, stop: bool) -> None:
        super().__init__(script)
        self._wanted = wanted
        self._stop = stop
        self.kept: dict[int, Tensor] = {}
        self.specs: dict[int, Spec] = {}

    def input(self, number: int, tensor: Tensor) -> Tensor:
        """A stand-in for one tensor of the batch."""
        return self._new(number, tensor)

    def _new(self, number: int, tensor: Tensor) -> StandIn:
        spec = self.specs[number] = Spec.of(tensor)
        if number in self._wanted:
            self.kept[number] = tensor.detach().clone()
        node = Node(number, self, tensor)
        node.grad = number in self._script.grads
        return stand_in(node, spec.meta(), tensor.device)

    def _operate(
        self, entry: Entry, func: Any, args: Any, kwargs: Any, found: list[StandIn]
    ) -> Any:
        if entry.verdict is Verdict.LIVE:
            return self._live(func, args, kwargs, found)
        return self._compute(entry, func, args, kwargs, found)

    def _skip(
        self, entry: Entry, original: Forward, args: Any, kwargs: Any, ins: list[StandIn]
    ) -> Any:
        return self._compute(entry, original, args, kwargs, ins, objects=True)

    def _compute(
        self,
        entry: Entry,
        func: Any,
        args: Any,
        kwargs: Any,
        found: list[StandIn],
        *,
        objects: bool = False,
    ) -> Any:
        real = _all_real if objects else with_values
        result = func(*real(args), **real(kwargs))
        for place, number in entry.rebinds:
            found[place].node = self._new(number, found[place].node.real()).node
        leaves = leaves_of(result).items
        if len(leaves) != len(entry.outs):
            raise self._diverged(entry, "returns something else than recorded")
        made = [self._leaf(out, leaf, found) for out, leaf in zip(entry.outs, leaves, strict=True)]
        if self._stop and self._wanted <= self.kept.keys():
            raise AllFilled
        return entry.build(made) if entry.outs else result

    def _leaf(self, out: Out, leaf: Any, found: Sequence[StandIn]) -> Any:
        if out.node >= 0:
            return self._new(out.node, leaf)
        return found[out.argument] if out.argument >= 0 else leaf


def _all_real(value: Any) -> Any:
    return map_leaves(value, _real, objects=True)


class Replayer(_Follower):
    """Skips the frozen part, and gives stored values to what is live.

    Args:
        script: what to follow.
        get: gives a stored value by number; None for a value that is not stored.
        look: what a value looks like, by number: meta tensor and device.
        needed: numbers of values that may have to be computed from others.
    """

    def __init__(
        self,
        script: Script,
        get: Callable[[int], Callable[[], Tensor] | None],
        look: Callable[[int], tuple[Tensor, torch.device]],
        needed: frozenset[int],
    ) -> None:
        super().__init__(script)
        self._get = get
        self._look = look
        self._needed = needed

    def input(self, number: int, tensor: Tensor | None) -> Tensor:
        """A stand-in for one tensor of the batch, whose value may be at hand."""
        if tensor is None:
            return self._new(number, self._get(number))
        return self._new(number, lambda: tensor)

    def _new(self, number: int, get: Callable[[], Tensor] | None) -> StandIn:
        meta, place = self._look(number)
        return stand_in(self._graded(Node(number, self, get=get)), meta, place)

    def _operate(
        self, entry: Entry, func: Any, args: Any, kwargs: Any, found: list[StandIn]
    ) -> Any:
        if entry.verdict is Verdict.LIVE:
            return self._live(func, args, kwargs, found)
        if entry.verdict is Verdict.LOOK:
            return func(*_all_real(args), **_all_real(kwargs))
        if entry.verdict is Verdict.EAGER:
            return self._eager(entry, func, args, kwargs, found)
        recipe = None
        if not self._needed.isdisjoint(entry.made):
            recipe = _Recipe(func, args, kwargs, found, [p for p, _ in entry.rebinds])
        return self._results(entry, found, recipe)

    def _eager(self, entry: Entry, func: Any, args: Any, kwargs: Any, found: list[StandIn]) -> Any:
        result = func(*_all_real(args), **_all_real(kwargs))
        for place, number in entry.rebinds:
            found[place].node = self._graded(Node(number, self, found[place].node.real()))
        leaves: list[Any] = []
        for out, leaf in zip(entry.outs, leaves_of(result).items, strict=True):
            if out.node >= 0:
                node = self._graded(Node(out.node, self, leaf))
                leaves.append(stand_in(node, Spec.of(leaf).meta(), leaf.device))
            else:
                leaves.append(found[out.argument] if out.argument >= 0 else leaf)
        return entry.build(leaves) if entry.outs else result

    def _graded(self, node: Node) -> Node:
        node.grad = node.id in self._script.grads
        return node

    def _skip(
        self, entry: Entry, original: Forward, args: Any, kwargs: Any, ins: list[StandIn]
    ) -> Any:
        return self._results(entry, ins, None)

    def _results(self, entry: Entry, found: Sequence[StandIn], recipe: _Recipe | None) -> Any:
        for place, number in entry.rebinds:
            get = self._get(number) or (recipe and recipe.written(place))
            found[place].node = self._graded(Node(number, self, get=get or None))
        leaves: list[Any] = []
        for i, out in enumerate(entry.outs):
            if out.node >= 0:
                get = self._get(out.node) or (recipe and recipe.leaf(i))
                leaves.append(self._new(out.node, get or None))
            else:
                leaves.append(found[out.argument] if out.argument >= 0 else out.constant)
        return entry.build(leaves) if leaves else None


class Refiller(Replayer):
    """Computes what is to be stored from values stored at a shallower frontier.

    Attributes:
        kept: nodes of the wanted values, by number; to be asked for their values at the end.
    """

    def __init__(
        self,
        script: Script,
        get: Callable[[int], Callable[[], Tensor] | None],
        look: Callable[[int], tuple[Tensor, torch.device]],
        wanted: frozenset[int],
    ) -> None:
        super().__init__(script, get, look, frozenset(n for e in script.entries for n in e.made))
        self._wanted = wanted
        self.kept: dict[int, Node] = {}

    def _new(self, number: int, get: Callable[[], Tensor] | None) -> StandIn:
        made = super()._new(number, get)
        if number in self._wanted:
            self.kept[number] = made.node
        return made

    def _skip(
        self, entry: Entry, original: Forward, args: Any, kwargs: Any, ins: list[StandIn]
    ) -> Any:
        recipe = _Recipe(original, args, kwargs, ins, [p for p, _ in entry.rebinds])
        return self._results(entry, ins, recipe)

    def _results(self, entry: Entry, found: Sequence[StandIn], recipe: _Recipe | None) -> Any:
        result = super()._results(entry, found, recipe)
        for place, number in entry.rebinds:
            if number in self._wanted:
                self.kept[number] = found[place].node
        if self._wanted <= self.kept.keys():
            raise AllFilled
        return result


class _Recipe:
    """Computes the results of one operation of the frozen region when somebody needs them."""

    def __init__(
        self, func: Any, args: Any, kwargs: Any, found: Sequence[StandIn], written: Sequence[int]
    ) -> None:
        # Nodes, not stand-ins: those may hold other values by the time this runs.
        self._nodes = {id(s): s.node for s in _inputs_at_all(args, kwargs)}
        self._keep = found
        self._call = func, args, kwargs
        self._own = {id(found[place]): place for place in written}
        self._done: tuple[Any, dict[int, Tensor]] | None = None

    def leaf(self, place: int) -> Callable[[], Tensor]:
        """The tensor at a place of the result."""
        return lambda: leaves_of(self._run()[0]).items[place]

    def written(self, place: int) -> Callable[[], Tensor]:
        """The value of an argument after the operation has written into it."""
        return lambda: self._run()[1][place]

    def _run(self) -> tuple[Any, dict[int, Tensor]]:
        if self._done is None:
            func, args, kwargs = self._call
            copies: dict[int, Tensor] = {}

            def real(leaf: Any) -> Any:
                if type(leaf) is not StandIn:
                    return leaf
                value = self._nodes[id(leaf)].real()
                if (place := self._own.get(id(leaf))) is None:
                    return value
                return copies.setdefault(place, value.clone())

            self._done = func(*_mapped(args, real), **_mapped(kwargs, real)), copies
        return self._done


def _inputs_at_all(args: Any, kwargs: Any) -> list[StandIn]:
    leaves = leaves_of((args, kwargs)).items
    inside = [leaf for leaf in leaves if type(leaf) is StandIn]
    return [*inside, *stand_ins_in((args, kwargs))]  # the latter looks into slices


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, slice):
        return slice(*(_mapped(v, change) for v in (value.start, value.stop, value.step)))
    if type(value) in (tuple, list):
        return type(value)([_mapped(v, change) for v in value])
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    return map_leaves(value, change, objects=True)
