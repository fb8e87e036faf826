"""What modules and objects remember: compared before and after a call, and between steps."""

from __future__ import annotations

import argparse
import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from frostline.frontier.describe import is_versioned, reached_from, read_by
from frostline.frontier.standin import StandIn, version_of

__all__ = [
    "Settings",
    "foreign_hooks",
    "hook_tables",
    "ignoring_known_hooks",
    "is_foreign",
    "state_of",
]

#: How deep changes are looked for; a cache of keys and values is five levels down.
_DEPTH = 7
_DEPTH_OF_MODULES = 4
_PLAIN = (int, float, complex, bool, str, bytes, type(None), type, slice, range)
_FLAT = frozenset({int, float, complex, bool, str, bytes, type(None)})
#: What most modules hold many of, mostly empty: tables of hooks.
_EMPTY = frozenset({dict, OrderedDict, list, set})
#: Our own override, the switch of hooks, and autograd's own bookkeeping.
_OURS = frozenset({"forward", "_is_hf_initialized"})
#: Hooks that do nothing to values: our own probes, transformers' collectors of outputs and its
#: wish for gradients of embeddings.
_OWN = ("frostline.",)
_HARMLESS = (*_OWN, "transformers.utils.output_capturing", "transformers.modeling_utils")
_known_are_ignored: ContextVar[bool] = ContextVar("_known_are_ignored", default=True)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def state_of(value: Any, *, depth: int = _DEPTH) -> Any:
    """A fingerprint of what a value holds; equal before and after if nothing was changed.

    Tensors count by identity and version, so that a write shows; of modules, what they hold
    themselves, without submodules.

    Example:
        >>> box = [1]
        >>> before = state_of(box)
        >>> box.append(2)
        >>> state_of(box) == before
        False
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        if type(value) is StandIn:
            return id(value)
        return id(value), version_of(value)
    if depth == 0:
        return id(value)
    if isinstance(value, nn.Module):
        return _of_module(value, min(depth, _DEPTH_OF_MODULES))
    if isinstance(value, Mapping):
        return tuple((str(k), state_of(v, depth=depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple, deque)):
        return tuple(state_of(v, depth=depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(str(v) for v in value)
    if callable(value) or not hasattr(value, "__dict__"):
        return id(value)
    return id(value), state_of(vars(value), depth=depth - 1)


def _of_module(module: nn.Module, depth: int) -> Any:
    held: list[Any] = []
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _FLAT:
            if name not in _OURS:
                held.append((name, value))
        elif (kind in _EMPTY and not value) or name in _OURS or name == "_modules":
            continue
        elif isinstance(value, nn.Module):
            held.append((name, id(value)))
        else:
            held.append((name, state_of(value, depth=depth - 1)))
    return tuple(held)


def foreign_hooks(model: nn.Module) -> dict[str, str]:
    """By name, of modules with forward hooks of the user's on them or inside them, the first hook.

    Hooks may change values or read them, so a module that has one is run, not skipped.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> foreign_hooks(model)
        {}
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for hook in (h for table in hook_tables(module) for h in table.values() if is_foreign(h)):
            title = getattr(hook, "__qualname__", type(hook).__name__)
            parts = name.split(".") if name else []
            for depth in range(len(parts) + 1):
                found.setdefault(".".join(parts[:depth]), title)
    return found


def is_foreign(hook: Any) -> bool:
    """Whether a hook is the user's, which may read values, change them or keep them."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return not str(home).startswith(_HARMLESS if _known_are_ignored.get() else _OWN)


@contextmanager
def ignoring_known_hooks(ignore: bool) -> Iterator[None]:
    """Whether collectors of other libraries, mostly idle, count as harmless inside the block."""
    token = _known_are_ignored.set(ignore)
    try:
        yield
    finally:
        _known_are_ignored.reset(token)


def hook_tables(module: nn.Module) -> Iterator[dict[int, Any]]:
    """The forward hooks of one module: dictionaries that its `__call__` walks through."""
    # PyTorch offers no way to list hooks.
    for table in _HOOKS:
        found = vars(module).get(table)
        if isinstance(found, dict):
            yield found


class Settings:
    """What modules compute with besides tensors, to notice when something is changed.

    These are their plain attributes (flags, numbers, names) and, where their code carries no
    version, what is in the objects and in the globals that `forward` reads, or a method that it
    calls. Objects and globals of installed packages are not looked into: nobody should change
    those.

    Args:
        modules: by name.

    Example:
        >>> layer = nn.Dropout(0.1)
        >>> settings = Settings({"drop": layer})
        >>> layer.p = 0.2
        >>> settings.changed()
        'drop.p'
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._seen = [
            (vars(module), key, value, f"{name}.{key}" if name else key)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if not key.startswith("_") and isinstance(value, (*_PLAIN, Tensor))
        ]
        self._seen += [
            (table, key, value, f"{name}.{key}" if name else key)
            for name, module in modules.items()
            if not isinstance(module, torch.jit.ScriptModule)  # its tables are no mappings
            for table in _tables(module)
            for key, value in table.items()
        ]
        self._around = list(_around(modules))
        self._group()

    @property
    def looked_around(self) -> tuple[str, ...]:
        """Names of the objects and globals that count, besides plain attributes."""
        return tuple(name for *_, name in self._around)

    def keep_lasting(self) -> list[str]:
        """Forget the attributes that are no longer what they were: what passes leave behind.

        Returns:
            their names.
        """
        moved = [seen for seen in self._seen if _differs(*seen[:3])]
        self._seen = [seen for seen in self._seen if not _differs(*seen[:3])]
        self._around = [seen for seen in self._around if not _looks_other(*seen[:3])]
        self._group()
        return [name for *_, name in moved]

    def _group(self) -> None:
        by_table: dict[int, list[tuple[Mapping[str, Any], str, Any]]] = {}
        for table, key, value, _ in self._seen:
            by_table.setdefault(id(table), []).append((table, key, value))
        self._quick = [
            # Twice the first key: of a single one the getter would give no tuple.
            (
                itemgetter(items[0][1], *(key for _, key, _ in items)),
                items[0][0],
                (items[0][2], *(value for _, _, value in items)),
            )
            for items in by_table.values()
        ]

    def changed(self) -> str | None:
        """The name of an attribute that is no longer what it was, or None."""
        for get, table, values in self._quick:
            with suppress(KeyError):  # one is gone
                if all(map(is_, get(table), values)):
                    continue
            if (name := self._look()) is not None:
                return name
        for table, key, glance, name in self._around:
            if _looks_other(table, key, glance):
                return name
        return None

    def _look(self) -> str | None:
        for table, key, value, name in self._seen:
            if _differs(table, key, value):
                return name
        return None


_GONE = object()


def _differs(table: Mapping[str, Any], key: str, value: Any) -> bool:
    now = table.get(key, _GONE)
    return now is not value and (
        isinstance(value, Tensor) or type(now) is not type(value) or now != value
    )


#: Classes of Python's own that people keep their settings in.
_SETTINGS = (types.SimpleNamespace, argparse.Namespace)
_CONTAINERS = (Mapping, list, tuple, deque)
#: What of a user's own object or container is looked at: so many levels, of so many entries.
_GLANCE_DEPTH, _GLANCE_ENTRIES = 3, 32
Seen = tuple[Mapping[str, Any], str, Any, str]


def _around(modules: Mapping[str, nn.Module]) -> Iterator[Seen]:
    """(mapping, key, glance, name) of what modules of the user's own code read."""
    done: set[tuple[int, str]] = set()

    def once(table: Mapping[str, Any], key: str, name: str) -> Iterator[Seen]:
        if (id(table), key) not in done:
            done.add((id(table), key))
            yield table, key, _glance(table[key]), name

    for place, module in modules.items():
        own = not is_versioned(type(module).__module__)
        mentioned, _ = reached_from(type(module))
        for key, value in vars(module).items():
            if key in mentioned and _may_hold(value, containers=own):
                yield from once(vars(module), key, f"{place}.{key}" if place else key)
    waiting = [f for cls in {type(m) for m in modules.values()} for f in reached_from(cls)[1]]
    met = set(map(id, waiting))
    while waiting:
        for name, table, key in read_by(waiting.pop()):
            yield from once(table, key, f"the global {name}")
            value = table[key]
            if isinstance(value, types.FunctionType) and id(value) not in met:
                met.add(id(value))
                if not is_versioned(value.__globals__.get("__name__")):
                    waiting.append(value)


def _may_hold(value: Any, *, containers: bool) -> bool:
    """Whether an attribute is an object of the user's own, or a container of such code."""
    if isinstance(value, (*_PLAIN, Tensor, nn.Module)) or callable(value):
        return False
    if isinstance(value, _CONTAINERS):
        return containers
    return _is_open(value)


def _is_open(value: Any) -> bool:
    """Whether the attributes of an object are looked at."""
    if isinstance(value, _SETTINGS):
        return True
    return hasattr(value, "__dict__") and not is_versioned(type(value).__module__)


def _glance(value: Any, depth: int = _GLANCE_DEPTH) -> Any:
    """As `state_of`, but for values that may be large and are looked at in every step."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return state_of(value)
    if depth == 0:
        return id(value)
    if isinstance(value, _CONTAINERS):
        if len(value) > _GLANCE_ENTRIES:
            return id(value)
        inner = value.items() if isinstance(value, Mapping) else enumerate(value)
    elif callable(value) or isinstance(value, types.ModuleType) or not _is_open(value):
        return id(value)
    else:
        inner = vars(value).items()
    return id(value), tuple((str(k), _glance(v, depth - 1)) for k, v in inner)


def _looks_other(table: Mapping[str, Any], key: str, glance: Any) -> bool:
    return key not in table or _glance(table[key]) != glance


def _tables(module: nn.Module) -> Iterator[Mapping[str, Any]]:
    # Parameters, buffers and submodules live in these; a replaced one changes the model.
    for table in ("_parameters", "_buffers", "_modules"):
        yield vars(module).get(table, {})
