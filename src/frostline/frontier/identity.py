"""What a value is, as a digest: of one sample's content, or of a data set with its transforms.

A digest covers everything that can be read from the value: tensors and arrays byte by byte; what
an object would hand to a copy of itself (`__reduce_ex__`); the bytecode, defaults, closure and
global names of functions and of classes that are no installed library; name and version of those
that are; size and time of change of every file and folder that a string or path names. The first
thing that cannot be read makes the whole unknown, and says where it was.

Nothing here executes what it reads, and no digest depends on where an object lies in memory.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import itertools
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["UNKNOWN", "Fingerprint", "content_digest", "fingerprint"]

#: The content digest of a sample that cannot be read.
UNKNOWN = 0
_PLAIN = (int, float, str, bool, type(None), bytes, complex)
_MAX_DEPTH = 200
#: Files whose size and time of change are asked for; of more paths, an even share.
_MAX_FILES = 100_000
_MAX_TABLE_BYTES = 4 << 30
_LIBRARIES = ("site-packages", "dist-packages")
Value = Any


class _Hasher(Protocol):
    def update(self, data: Any, /) -> None: ...


class _Unreadable(Exception):
    """Something without a digest; the text says what."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The digest of a value, or why it has none.

    Attributes:
        digest: SHA-256, hexadecimal; None where something could not be read.
        unknown: what could not be read, "" where all was.
    """

    digest: str | None
    unknown: str = ""


def fingerprint(value: Value) -> Fingerprint:
    """What a data set, a transform or a function is, with its code and all that it holds.

    Example:
        >>> fingerprint([1, "a"]) == fingerprint([1, "a"]) != fingerprint([1, "b"])
        True
        >>> fingerprint(open).digest is None, fingerprint(sys.stderr).digest is None
        (False, True)
    """
    hasher = sha256()
    try:
        _Walk(hasher, files=True).value(value)
    except _Unreadable as error:
        return Fingerprint(None, str(error))
    except Exception as error:  # noqa: BLE001  code of others answers, and may fail as it likes
        return Fingerprint(None, f"something that fails when it is read ({error!r})")
    return Fingerprint(hasher.hexdigest())


def content_digest(sample: Value) -> int:
    """64 bits (xxh3) of what a sample holds, never 0; `UNKNOWN` where it cannot be read.

    Example:
        >>> import torch
        >>> content_digest((torch.ones(3), 1)) == content_digest((torch.ones(3), 1))
        True
        >>> content_digest((torch.ones(3), 1)) == content_digest((torch.ones(3), 2))
        False
    """
    hasher = xxhash.xxh3_64()
    try:
        _Walk(hasher, files=False).value(sample)
    except Exception:  # noqa: BLE001  code of others answers, and may fail as it likes
        return UNKNOWN
    return hasher.intdigest() or 1


class _Walk:
    """One walk through a value; what was met before is named by its number."""

    def __init__(self, hasher: _Hasher, *, files: bool) -> None:
        self._hasher = hasher
        self._files = files
        self._met: dict[int, int] = {}
        self._kept: list[object] = []  # what is kept alive keeps its id
        self._depth = 0

    def value(self, value: Value) -> None:
        if type(value) in _PLAIN:
            self.text(f"{type(value).__name__} {value!r}")
            if self._files and type(value) is str:
                self._file(value)
            return
        torch = _torch()
        if torch is not None and isinstance(value, torch.Tensor):
            self.tensor(value)
            return
        if isinstance(value, type):
            self.kind(value)
            return
        if isinstance(value, np.generic):
            self.array(np.asarray(value))
            return
        if (number := self._met.get(id(value))) is not None:
            self.text(f"met {number}")
            return
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _Unreadable("something nested too deeply")
        self._compound(value)
        self._depth -= 1

    def _compound(self, value: Value) -> None:
        if type(value) in (dict, OrderedDict):  # others may hold more than their items
            self.mapping(value)
            return
        describe = _description(type(value))
        if describe is not None:
            describe(self, value)
        elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):
            self.data(f"picture {value.mode} {value.size}", value.tobytes())
        elif _is_hugging_face(value):
            self._hugging_face(value)
        else:
            self._object(value)

    # -- plain data ------------------------------------------------------------------------------

    def text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._hasher.update(b"%d:%s" % (len(data), data))

    def data(self, what: str, data: Any) -> None:
        self.text(f"{what} {len(data)}")
        self._hasher.update(data)

    def array(self, array: np.ndarray[Any, Any]) -> None:
        if isinstance(array, np.memmap) and array.filename is not None:
            self.text(f"map {array.dtype} {array.shape} {array.offset}")
            self._file(str(array.filename))
            return
        self.text(f"array {array.dtype.str} {array.shape}")
        if array.dtype.hasobject:
            self._items(array.reshape(-1).tolist())
            return
        self._hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def tensor(self, tensor: Tensor) -> None:
        torch = _torch()
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise _Unreadable(f"a tensor of layout {tensor.layout} on {tensor.device}")
        plain = tensor.detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        plain = plain.cpu().contiguous().reshape(-1).view(torch.uint8)
        self.text(f"tensor {tensor.dtype} {[*tensor.shape]} {type(tensor).__qualname__}")
        self._hasher.update(plain.numpy().data)

    def mapping(self, value: Mapping[Value, Value]) -> None:
        self.kind(type(value))
        self.text(f"mapping {len(value)}")
        for key, item in list(value.items()):
            self.value(key)
            self.value(item)

    def sequence(self, value: list[Value] | tuple[Value, ...]) -> None:
        if type(value) not in (list, tuple):
            self.kind(type(value))
            self.value(getattr(value, "__dict__", None))
        self.text(f"{type(value).__name__} {len(value)}")
        self._items(value)

    def _items(self, items: Iterable[Value]) -> None:
        items = list(items)
        flat = items
        if items and set(map(type, items)) == {tuple}:
            flat = list(itertools.chain.from_iterable(items))
        if len(flat) > 16 and set(map(type, flat)) <= set(_PLAIN):
            self.text(repr(items))
            if self._files:
                self._many_files([text for text in flat if type(text) is str and os.sep in text])
            return
        for item in items:
            self.value(item)

    def members(self, value: AbstractSet[Value]) -> None:
        digests = []
        for item in value:
            hasher = sha256()
            _Walk(hasher, files=self._files).value(item)
            digests.append(hasher.hexdigest())
        self.text(f"set {sorted(digests)}")

    def member(self, value: enum.Enum) -> None:
        self.kind(type(value))
        self.text(value.name)

    # -- files -----------------------------------------------------------------------------------

    def path(self, path: PurePath) -> None:
        self.text(f"path {path}")
        if self._files:
            self._file(str(path))

    def _many_files(self, paths: list[str]) -> None:
        step = -(-len(paths) // _MAX_FILES) or 1
        for path in paths[::step]:
            self._file(path)

    def _file(self, path: str) -> None:
        """Size and time of change of what this text names, if it names anything."""
        if not path or len(path) > 4096 or "\0" in path or "\n" in path:
            return
        try:
            stat = os.stat(path)
        except (OSError, ValueError):
            return
        if os.path.isdir(path):
            self._folder(path)
        else:
            self.text(f"file {stat.st_size} {stat.st_mtime_ns}")

    def _folder(self, folder: str) -> None:
        """The same of all files in a folder and the folders in it."""
        waiting, lines = [folder], []
        while waiting:
            try:
                entries = list(os.scandir(waiting.pop()))
            except OSError as error:
                raise _Unreadable(f"the folder {folder} ({error.strerror})") from error
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file():
                    stat = entry.stat()
                    name = os.path.relpath(entry.path, folder)
                    lines.append(f"{name!r} {stat.st_size} {stat.st_mtime_ns}")
            if len(lines) + len(waiting) > _MAX_FILES:
                raise _Unreadable(f"the folder {folder}, which holds over {_MAX_FILES:,} files")
        self.text(f"folder {sorted(lines)}")

    # -- code ------------------------------------------------------------------------------------

    def function(self, function: types.FunctionType) -> None:
        self.text(f"function {function.__module__}.{function.__qualname__}")
        if _is_library(function.__module__):
            self._version(function.__module__)
            return
        self._code(function.__code__)
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents)
            except ValueError:  # not assigned yet
                self.text("empty")
        self._globals(function)

    def _globals(self, function: types.FunctionType) -> None:
        """What the names in the code stand for, also within modules that are no library."""
        names = sorted(_names(function.__code__))
        for name in names:
            if name not in function.__globals__ or name.startswith("__"):
                continue
            found = function.__globals__[name]
            self.text(f"global {name}")
            self.value(found)
            if isinstance(found, types.ModuleType) and not _is_library(found.__name__):
                for inner in names:
                    if inner in vars(found):
                        self.text(f"in {found.__name__}: {inner}")
                        self.value(vars(found)[inner])

    def _code(self, code: types.CodeType) -> None:
        self.text(f"code {code.co_name} {code.co_names} {code.co_varnames} {code.co_argcount}")
        self.data("bytecode", code.co_code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._constant(constant)

    def _constant(self, constant: Value) -> None:
        # Texts in code, docstrings among them, are no paths of the data.
        files, self._files = self._files, False
        self.value(constant)
        self._files = files

    def method(self, method: types.MethodType) -> None:
        self.text("method")
        self.value(method.__func__)
        self.value(method.__self__)

    def partial(self, value: functools.partial[Value]) -> None:
        self.text("partial")
        for part in (value.func, value.args, value.keywords):
            self.value(part)

    def wrapped(self, value: Value) -> None:
        self.text("wrapped")
        self.value(value.__wrapped__ if hasattr(value, "__wrapped__") else value.__func__)

    def said(self, value: Value) -> None:
        self.text(f"{type(value).__name__} {value}")

    def accessors(self, value: property) -> None:
        for part in (value.fget, value.fset, value.fdel):
            self.value(part)

    def builtin(self, value: types.BuiltinFunctionType) -> None:
        self.text(f"builtin {value.__module__}.{value.__qualname__}")
        if value.__module__ is None and not isinstance(value.__self__, types.ModuleType | type):
            self.value(value.__self__)

    def module(self, module: types.ModuleType) -> None:
        self.text(f"module {module.__name__}")
        self._version(module.__name__)

    def kind(self, kind: type) -> None:
        if id(kind) in self._met:
            self.text(f"met {self._met[id(kind)]}")
            return
        self._met[id(kind)] = len(self._met)
        self._kept.append(kind)
        self.text(f"class {kind.__module__}.{kind.__qualname__}")
        if _is_library(kind.__module__):
            self._version(kind.__module__)
            return
        for base in kind.__bases__:
            self.kind(base)
        for name, item in sorted(vars(kind).items()):
            if name in _CLASS_NOISE:
                continue
            self.text(name)
            self._constant(item)

    def _version(self, module: str) -> None:
        top = sys.modules.get(module.partition(".")[0])
        self.text(f"version {getattr(top, '__version__', '')}")

    # -- objects ---------------------------------------------------------------------------------

    def _object(self, value: Value) -> None:
        """What the object would hand to a copy of itself."""
        self.kind(type(value))
        reducer = copyreg.dispatch_table.get(type(value))
        try:
            reduced = reducer(value) if reducer else value.__reduce_ex__(2)
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise _Unreadable(f"an object of class {_path_of(type(value))} ({text})") from error
        if isinstance(reduced, str):
            self.text(f"global {reduced}")
            return
        make, arguments, *rest = reduced
        self.value(make)
        self.value(arguments)
        for part in rest:
            self.value(list(part) if isinstance(part, Iterator) else part)

    def random(self, value: Value) -> None:
        self.text(type(value).__name__)
        if isinstance(value, np.random.Generator):
            self.value(value.bit_generator.state)
        else:
            self.tensor(value.get_state())

    def _hugging_face(self, data: Value) -> None:
        """Rows of a Hugging Face data set as Arrow has them, then its columns and its format."""
        import pyarrow as pa  # noqa: PLC0415  comes with `datasets`, which is there

        if data.data.nbytes > _MAX_TABLE_BYTES:
            raise _Unreadable(f"a table of {data.data.nbytes / 2**30:.0f} GiB, too much to read")
        self.text(f"table {data.num_rows} {data.features!r} {data.split}")
        arrow = data.with_format("arrow")
        for table in arrow.iter(batch_size=1000) if data.num_rows else ():
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
                stream.write_table(table.replace_schema_metadata(None).combine_chunks())
            self._hasher.update(memoryview(sink.getvalue()))
            for column in table.columns:
                self._many_files(_outside_files(column))
        self.value({key: item for key, item in data.format.items() if item is not None})


def _outside_files(column: Any) -> list[str]:
    """Paths in a column of pictures or sounds whose bytes are not in the table."""
    names = {column.type.field(i).name for i in range(column.type.num_fields)}
    if not {"path", "bytes"} <= names:
        return []
    rows = column.to_pylist()
    return [row["path"] for row in rows if row and row["bytes"] is None and row["path"]]


def _is_hugging_face(value: Value) -> bool:
    return (
        type(value).__module__.partition(".")[0] == "datasets"
        and hasattr(value, "with_format")
        and hasattr(value, "data")
    )


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether code of this module is named by its version: installed, or part of Python."""
    top = (module or "builtins").partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    paths = getattr(sys.modules.get(top), "__path__", [])
    return any(part in PurePath(p).parts for p in (file, *paths) for part in _LIBRARIES)


# Differ from run to run, or say nothing about what the class does.
_CLASS_NOISE = frozenset(
    {"__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__firstlineno__",
     "__abstractmethods__", "_abc_impl", "__annotations__", "__parameters__", "__orig_bases__",
     "__static_attributes__", "__slotnames__", "__dataclass_fields__", "__dataclass_params__",
     "__match_args__", "__annotate_func__", "__annotations_cache__"}
)  # fmt: skip
_KINDS: tuple[tuple[Any, Callable[[_Walk, Any], None]], ...] = (
    (np.ndarray, _Walk.array),
    (enum.Enum, _Walk.member),
    ((list, tuple), _Walk.sequence),
    ((bytearray, memoryview), lambda walk, value: walk.data("bytes", bytes(value))),
    (AbstractSet, _Walk.members),
    (types.FunctionType, _Walk.function),
    (types.MethodType, _Walk.method),
    (types.BuiltinFunctionType, _Walk.builtin),
    ((types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType,
      types.GetSetDescriptorType, types.MemberDescriptorType, types.EllipsisType,
      types.NotImplementedType, np.dtype, slice, range), _Walk.said),
    (types.ModuleType, _Walk.module),
    (functools.partial, _Walk.partial),
    ((staticmethod, classmethod), _Walk.wrapped),
    (type(functools.lru_cache(len)), _Walk.wrapped),
    (property, _Walk.accessors),
    (PurePath, _Walk.path),
    (np.random.Generator, _Walk.random),
    (types.MappingProxyType, _Walk.mapping),
)  # fmt: skip


@functools.lru_cache(maxsize=1000)
def _description(kind: type) -> Callable[[_Walk, Any], None] | None:
    """How objects of this class are read; None: not by their class."""
    table = (*_KINDS, *_torch_kinds())
    return next((describe for kinds, describe in table if issubclass(kind, kinds)), None)


def _torch() -> Any:
    """PyTorch if this process has it loaded; without it there are no values of its types."""
    return sys.modules.get("torch")


def _torch_kinds() -> tuple[tuple[Any, Callable[[_Walk, Any], None]], ...]:
    torch = _torch()
    if torch is None:
        return ()
    plain = (torch.dtype, torch.device, torch.layout, torch.Size)
    return ((plain, _Walk.said), (torch.Generator, _Walk.random))
