"""What a Python value is, as plain JSON: equal in another process, different after any change.

A module's result depends on more than its tensors: its settings, the code of its methods, the
functions those call, a transform kept as an attribute. Values are described by content, functions
by their byte code, defaults, closures and, for code that carries no version, the globals they use.
Code of installed packages counts by the package's version. Addresses never enter.

What cannot be described (an open file, a generator, state inside an extension) is `unknown`, which
equals nothing.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frostline import _io
from frostline.backends.torch.digest import sha256_of_tensors
from frostline.backends.torch.modes import OWN_ATTRIBUTES, is_held
from frostline.errors import BackendError
from frostline.frontier.key import unknown

__all__ = [
    "Describer",
    "fingerprint",
    "is_versioned",
    "package_version",
    "reached_from",
    "read_by",
]

_MAX_DEPTH = 100
_MAX_NODES = 200_000
#: What every module has; its tensors, children and modes are told elsewhere.
_MODULE_OWN = frozenset(vars(nn.Module()))
_CLASS_OWN = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__",
    "_abc_impl", "__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__",
    "__annotations_cache__", "__orig_bases__", "__parameters__", "__type_params__", "__qualname__",
    "__slotnames__",
})  # fmt: skip
_TORCH_WORDS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_DESCRIPTORS = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)
_Lock, _RLock = type(threading.Lock()), type(threading.RLock())


def fingerprint(value: Any) -> dict[str, Any]:
    """The digest of any value's description, to put into a key: a transform, a collate function.

    Returns:
        ``{"is": class, "digest": SHA-256}``, or an `unknown` part that equals no other one.

    Example:
        >>> fingerprint(len) == fingerprint(len)
        True
        >>> fingerprint(x for x in ())["unknown"]
        'a generator'
    """
    describer = Describer()
    digest = describer.digest(value)
    found = digest if isinstance(digest, dict) else {"digest": digest}
    packages = {name: package_version(name) for name in sorted(describer.packages)}
    return {"is": _name(type(value)), **({"packages": packages} if packages else {}), **found}


class Describer:
    """Describes values, each module and class at most once.

    Args:
        modules: the model's modules by name; where another value refers to one of them, its name
            stands for it, since it is described in its own place.

    Attributes:
        packages: installed packages met so far whose version stands for their code.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        self.packages: set[str] = set()
        self._modules = {id(m): name for name, m in (modules or {}).items()}
        self._open: list[int] = []
        self._done: dict[int, tuple[Any, Any]] = {}  # the value is kept alive with its description
        self._nodes = 0
        self._reasons: list[str] = []

    def digest(self, value: Any) -> str | dict[str, str]:
        """SHA-256 of the description, or an `unknown` part with the first reason."""
        return self._digested(lambda: self._describe(value))

    def module_digest(self, module: nn.Module) -> str | dict[str, str]:
        """The digest of what a module is by itself: class, settings, hooks, names of children."""
        return self._digested(lambda: self._module(module))

    def _digested(self, describe: Callable[[], Any]) -> str | dict[str, str]:
        self._reasons.clear()
        self._nodes = 0
        text = _io.canonical_json(describe())
        if self._reasons:
            return unknown(self._reasons[0])
        return hashlib.sha256(text).hexdigest()

    def _unknown(self, what: str) -> dict[str, str]:
        self._reasons.append(what)
        return unknown(what)

    def _describe(self, value: Any) -> Any:
        """Plain JSON; what holds others once, and by its distance where it holds itself."""
        self._nodes += 1
        simple = _simple(value)
        if simple is not _NOT_SIMPLE:
            return simple
        if (name := self._modules.get(id(value))) is not None:
            return {"module of the model": name}
        if id(value) in self._done:
            return self._done[id(value)][1]
        if id(value) in self._open:
            return {"itself": len(self._open) - self._open.index(id(value))}
        if len(self._open) > _MAX_DEPTH or self._nodes > _MAX_NODES:
            return self._unknown(f"a value too large to describe, in a {_name(type(value))}")
        before = len(self._reasons)
        self._open.append(id(value))
        try:
            told = self._compound(value)
        finally:
            self._open.pop()
        if len(self._reasons) == before:
            # Its digest instead of itself: what is shared by many is written once.
            told = {"sha256": hashlib.sha256(_io.canonical_json(told)).hexdigest()}
            self._done[id(value)] = (value, told)
        return told

    def _compound(self, value: Any) -> Any:
        match value:
            case nn.Module():
                return self._loose_module(value)
            case Tensor():
                return self._tensor(value)
            case np.ndarray():
                return self._array(value)
            case logging.Logger() | _Lock() | _RLock():
                return ["named", _name(type(value))]  # its state shapes no result
            case types.GeneratorType() | types.CoroutineType() | torch.Generator():
                return self._unknown(_plain_name(type(value)))
            case enum.Enum():
                return ["enum", _name(type(value)), value.name, self._describe(value.value)]
            case weakref.ref():
                return ["weak reference", self._describe(value())]
            case _:
                return self._code(value)

    def _code(self, value: Any) -> Any:
        match value:
            case type():
                return self._class(value)
            case types.FunctionType():
                return self._function(value)
            case types.MethodType():
                return ["method", *self._all((value.__func__, value.__self__))]
            case types.BuiltinFunctionType() | types.MethodWrapperType():
                return self._builtin(value)
            case types.ModuleType():
                return self._used_of(value, dir(value))
            case staticmethod() | classmethod():
                return [_name(type(value)), self._describe(value.__func__)]
            case property():
                return ["property", *self._all((value.fget, value.fset, value.fdel))]
            case functools.partial():
                return ["partial", *self._all((value.func, value.args, value.keywords))]
            case _ if isinstance(value, _DESCRIPTORS):
                return ["descriptor", _name(value.__objclass__), value.__name__]
            case _:
                return self._container(value)

    def _container(self, value: Any) -> Any:
        match value:
            case list() | tuple():
                return [_name(type(value)), self._all(value), self._extras(value)]
            case dict() | types.MappingProxyType():
                # In its own order: code that goes through it sees that order.
                pairs = [self._all(pair) for pair in value.items()]
                return [_name(type(value)), pairs, self._extras(value)]
            case set() | frozenset():
                return [_name(type(value)), sorted(self._all(value), key=_io.canonical_json)]
            case _:
                return self._object(value)

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [self._describe(v) for v in values]

    def _extras(self, value: Any) -> Any:
        """Attributes on a container of somebody's own class."""
        own = getattr(value, "__dict__", None)
        return [self._describe(type(value)), self._attributes(own)] if own is not None else None

    def _attributes(self, own: Mapping[str, Any], skip: Iterable[str] = ()) -> Any:
        found = {}
        for name in sorted(set(own).difference(skip), key=str):
            before = len(self._reasons)
            found[ascii(name)] = self._describe(own[name])
            if before < len(self._reasons) and " as " not in self._reasons[-1]:
                self._reasons[-1] += f" as {name}"
        return found

    # -- tensors ---------------------------------------------------------------------------------

    def _tensor(self, value: Tensor) -> Any:
        facts = [str(value.dtype), list(value.shape), str(value.device)]
        if value.requires_grad and value.is_leaf:
            return ["trainable tensor", *facts]  # nothing frozen depends on its values
        try:
            digest = sha256_of_tensors({"attribute": value})["attribute"]
            return ["tensor", *facts, list(value.stride()), digest]
        except (BackendError, RuntimeError):
            return self._unknown("a tensor whose values cannot be read")

    def _array(self, value: np.ndarray) -> Any:
        if value.dtype.hasobject:
            return ["array", list(value.shape), self._all(value.ravel().tolist())]
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return ["array", str(value.dtype), list(value.shape), digest]

    # -- code ------------------------------------------------------------------------------------

    def _function(self, value: types.FunctionType) -> Any:
        told = [
            "function",
            f"{value.__module__}.{value.__qualname__}",
            _code_digest(value.__code__),
            self._describe(value.__defaults__),
            self._describe(value.__kwdefaults__),
            self._all(_cells(value)),
        ]
        # Not `__module__`, which wrappers take over from what they wrap.
        if not self._versioned(value.__globals__.get("__name__")):
            told.append(self._globals(value))
        return told

    def _globals(self, function: types.FunctionType) -> dict[str, Any]:
        loaded, names = _loaded_names(function.__code__)
        found = {}
        for name in loaded:
            if name in function.__globals__:
                value = function.__globals__[name]
                found[name] = (
                    self._used_of(value, names)
                    if isinstance(value, types.ModuleType)
                    else self._describe(value)
                )
        return found

    def _used_of(self, module: types.ModuleType, names: Iterable[str]) -> Any:
        """A module that code uses: by its version, else what of it the code may name."""
        if self._versioned(module.__name__):
            return ["package", module.__name__]
        own = vars(module)
        return ["module", module.__name__, self._attributes({n: own[n] for n in names if n in own})]

    def _builtin(self, value: types.BuiltinFunctionType | types.MethodWrapperType) -> Any:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            return ["builtin", value.__module__, value.__qualname__]
        return ["builtin of", value.__qualname__, self._describe(owner)]

    def _class(self, value: type) -> Any:
        """A class by what its bases hold; of a versioned class, the code that it has just now."""
        bases = [base for base in value.__mro__ if base is not object]
        return ["class", *([_name(base), self._members(base)] for base in bases)]

    def _members(self, base: type) -> Any:
        versioned = self._versioned(base.__module__)
        if versioned and not issubclass(base, nn.Module):
            return None
        own = {k: v for k, v in vars(base).items() if k not in _CLASS_OWN}
        if not versioned:
            return self._attributes(own)
        # Somebody may have put a function of their own on a class of a package.
        return self._attributes({k: v for k, v in own.items() if _is_code(v)})

    def _versioned(self, module: str | None) -> bool:
        """Whether a version says all about this module's code; its package is then noted."""
        if not is_versioned(module):
            return False
        package = (module or "").partition(".")[0]
        if not _is_standard(package):
            self.packages.add(package)
        return True

    # -- objects ---------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> Any:
        skip = _MODULE_OWN | (set(OWN_ATTRIBUTES) if is_held(module) else set())
        own = vars(module)
        return {
            "class": self._describe(type(module)),
            "settings": self._attributes(own, skip),
            "hooks": self._all(_hooks(module)),
            "children": [name for name, _ in module.named_children()],
        }

    def _loose_module(self, module: nn.Module) -> Any:
        """A module that is no part of the model: with its tensors and all that is in it."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        inner = {name: self._module(m) for name, m in module.named_modules()}
        return ["module", inner, {n: self._describe(t) for n, t in tensors}, module.training]

    def _object(self, value: Any) -> Any:
        cls = type(value)
        if cls.__module__.startswith("frostline.") and hasattr(cls, "stands_for"):
            # An adapter of ours to a library whose objects cannot be described from outside.
            return ["stands for", self._describe(cls), self._describe(value.stands_for())]
        if cls.__module__ == "contextlib" and hasattr(value, "gen"):
            # What `contextmanager` makes; as a decorator it makes itself anew at every call.
            return ["context", *self._all((value.func, value.args, value.kwds))]
        try:
            state = value.__reduce_ex__(4)
        except Exception:  # noqa: BLE001  code of others; whatever it raises, its state is not known
            return self._unknown(_plain_name(cls))
        if isinstance(state, str) and self._versioned(getattr(value, "__module__", None)):
            return ["global", value.__module__, state]  # a compiled function, a sentinel
        told: list[Any] = ["object", _name(cls), self._describe(cls)]
        own = getattr(value, "__dict__", None)
        if own is not None:
            told.append(self._attributes(own))
        told.append(self._attributes(dict(_slots(value))))
        if _pickles_plainly(cls):  # it has no state but attributes and slots: `state` repeats them
            return told
        if isinstance(state, str):
            return [*told, state]
        function, arguments, *rest = state
        parts = [list(p) if isinstance(p, Iterator) else p for p in rest]
        return [*told, self._describe(function), self._all(arguments), self._all(parts)]


_NOT_SIMPLE = object()


def _simple(value: Any) -> Any:
    """Values that hold no others; every type in its own spelling."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if value.isascii() else {"text": ascii(value)}
    if kind is int:
        return value if abs(value) < 1 << 63 else {"integer": hex(value)}
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind in (bytes, bytearray):
        return {_name(kind): hashlib.sha256(value).hexdigest()}
    if isinstance(value, _TORCH_WORDS):
        return {"torch": str(value)}
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return {"numpy": [str(value.dtype), value.tobytes().hex()]}
    if isinstance(value, PurePath):
        return {"path": ascii(str(value))}
    if isinstance(value, re.Pattern):
        return {"pattern": [ascii(value.pattern), value.flags]}
    if value is Ellipsis or value is NotImplemented:
        return {"constant": repr(value)}
    if kind.__module__ == "torch._ops":
        return {"operator": str(value)}
    return _NOT_SIMPLE


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain_name(cls: type) -> str:
    name = _name(cls).removeprefix("builtins.")
    return f"an {name}" if name.lstrip("_")[0] in "aeiou" else f"a {name}"


def _is_code(value: Any) -> bool:
    return isinstance(value, types.FunctionType | staticmethod | classmethod | property)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield "empty cell"


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for base in type(value).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.MemberDescriptorType) and name != "__dict__":
                try:
                    yield name, member.__get__(value)
                except AttributeError:
                    yield name, "empty slot"


def _pickles_plainly(cls: type) -> bool:
    """Whether `object` itself says what a value's state is: attributes and slots, nothing else."""
    return (
        cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and getattr(cls, "__getstate__", None) is getattr(object, "__getstate__", None)
        and not hasattr(cls, "__getnewargs__")
        and not hasattr(cls, "__getnewargs_ex__")
    )


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Functions that may change what a module gets or gives; ours only look on.

    Private upstream: torch has no public way to list hooks, only to add them.
    """
    own, everywhere = vars(module), torch.nn.modules.module
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        for table in (own[name], getattr(everywhere, f"_global{name}")):
            for hook in table.values():
                if not (getattr(hook, "__module__", None) or "").startswith("frostline."):
                    yield hook


# -- byte code -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=20_000)
def _code_digest(code: types.CodeType) -> str:
    """SHA-256 of what a code object does; not of where it was written."""
    facts = (
        code.co_code, code.co_exceptiontable, code.co_names, code.co_varnames, code.co_freevars,
        code.co_cellvars, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount,
        code.co_flags, [_constant(c) for c in code.co_consts],
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return "code", _code_digest(value)
    if isinstance(value, frozenset):
        return "frozenset", sorted(repr(_constant(item)) for item in value)
    if isinstance(value, tuple):
        return "tuple", [_constant(item) for item in value]
    return type(value).__name__, value


@functools.lru_cache(maxsize=20_000)
def _loaded_names(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Globals that a code object and those inside it load, and all names they mention."""
    loaded: set[str] = set()
    named = set(code.co_names)
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            loaded.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more_loaded, more_named = _loaded_names(inner)
            loaded.update(more_loaded)
            named.update(more_named)
    return tuple(sorted(loaded)), tuple(sorted(named))


@functools.lru_cache(maxsize=1000)
def reached_from(cls: type, start: str = "forward") -> tuple[frozenset[str], tuple[Any, ...]]:
    """What a method of a class may run and read, by the names that it and those mention.

    Args:
        cls: the class.
        start: name of the method.

    Returns:
        All names mentioned, and the functions of the class whose code carries no version.

    Example:
        >>> class Scaled(nn.Module):
        ...     def forward(self, x):
        ...         return self.grown(x)
        ...     def grown(self, x):
        ...         return x * self.by
        ...     def log(self):
        ...         return self.history
        >>> names, functions = reached_from(Scaled)
        >>> sorted(names), sorted(f.__name__ for f in functions)
        (['by', 'grown'], ['forward', 'grown'])
    """
    mentioned: set[str] = set()
    own: list[types.FunctionType] = []
    waiting, met = [start], {start}
    while waiting:
        for function in _functions_of(_found_on(cls, waiting.pop())):
            if not is_versioned(function.__globals__.get("__name__")):
                own.append(function)
            _, named = _loaded_names(function.__code__)
            mentioned.update(named)
            waiting += [name for name in named if name not in met]
            met.update(named)
    return frozenset(mentioned), tuple(own)


def _found_on(cls: type, name: str) -> Any:
    """What a class or its bases hold under a name, as it is: no method is bound."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _functions_of(member: Any) -> Iterator[types.FunctionType]:
    match member:
        case types.FunctionType():
            yield member
        case staticmethod() | classmethod():
            yield from _functions_of(member.__func__)
        case property():
            for part in (member.fget, member.fset, member.fdel):
                yield from _functions_of(part)


def read_by(function: types.FunctionType) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """What a function reads besides its arguments: (name, mapping, key in it) of each global.

    Of a module whose code carries no version, what the function may name of it.

    Example:
        >>> def scaled(x):
        ...     return x * SCALE
        >>> [name for name, _, _ in read_by(scaled)]
        []
        >>> scaled.__globals__["SCALE"] = 2
        >>> [name for name, _, _ in read_by(scaled)]
        ['SCALE']
    """
    loaded, named = _loaded_names(function.__code__)
    for name in loaded:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, function.__globals__, name
        if isinstance(value, types.ModuleType) and not is_versioned(value.__name__):
            own = vars(value)
            yield from ((f"{name}.{inner}", own, inner) for inner in named if inner in own)


# -- packages ------------------------------------------------------------------------------------


def is_versioned(module: str | None) -> bool:
    """Whether a version says all about the code of a module: Python's own, or an installed one.

    Example:
        >>> is_versioned("torch.nn"), is_versioned("__main__")
        (True, False)
    """
    package = (module or "").partition(".")[0]
    return _is_standard(package) or (
        _is_installed(package) and package_version(package) is not None
    )


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Which installed distributions hold a package: tens of milliseconds to find out."""
    return importlib.metadata.packages_distributions()


@functools.lru_cache
def package_version(package: str) -> str | None:
    """The version of an installed package; None when it says none.

    Read from what the installer wrote, so that it is the same before and after the import.

    Args:
        package: its import name.

    Example:
        >>> package_version("no_such_package") is None
        True
    """
    if package == "torch":  # says which build it is, as the installer does not
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package not in sys.modules:
        return None
    names = _distributions().get(package, ())
    versions = sorted(f"{name} {importlib.metadata.version(name)}" for name in set(names))
    return ", ".join(versions) or None


@functools.lru_cache
def _is_standard(package: str) -> bool:
    """Whether a package is part of Python itself, and not a file of the same name beside."""
    if package not in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(package), "__file__", None)
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    return file is None or any(Path(file).is_relative_to(p) for p in places if p)


@functools.lru_cache
def _is_installed(package: str) -> bool:
    """Whether a package lies where installers put packages, where nobody edits."""
    module = sys.modules.get(package)
    files = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    parts = {part for file in files if file for part in os.path.normpath(file).split(os.sep)}
    return bool(parts & {"site-packages", "dist-packages"})
