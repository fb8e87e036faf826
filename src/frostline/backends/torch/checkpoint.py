"""Checkpoints of any training loop: whole or absent, checked on the way in, and never unpickled.

A checkpoint is a folder ``step-00000123`` that appears by one rename: model and optimizer tensors
and random states as safetensors, everything else as JSON, sizes and SHA-256 of all in a manifest.
Optimizer state is kept by parameter *name*, so it can neither be lost nor given to another
parameter. The newest folder that verifies is loaded; a damaged one is warned about and passed
over.

Example:
    A loop that goes on where it was, whatever happened to it::

        done = load_checkpoint("ckpt", model=model, optimizer=optimizer, driver=driver)
        for epoch in range(done["epoch"] if done else 0, 10):
            ...
            save_checkpoint("ckpt", model=model, optimizer=optimizer, driver=driver,
                            extra={"epoch": epoch + 1})
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from frostline import _io
from frostline._version import __version__
from frostline.backends.checkpoints import (
    Held,
    check_keep,
    checkpoint_folders,
    checkpoint_step,
    free_name,
    library_errors,
    newest_step,
    prune,
    read_checkpoint,
    whole,
    write_checkpoint,
)
from frostline.backends.torch.random_state import (
    RANDOM_STREAMS,
    read_random_state,
    write_random_state,
)
from frostline.backends.torch.trees import pack, unpack
from frostline.driver import Driver
from frostline.errors import StorageError

__all__ = [
    "Held",
    "checkpoint_folders",
    "checkpoint_step",
    "load_checkpoint",
    "save_checkpoint",
]

_log = logging.getLogger("frostline")
KIND = "frostline checkpoint 1"


class Stateful(Protocol):
    """Anything with the usual pair of methods: schedulers, gradient scalers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    driver: Driver | None = None,
    extra: Mapping[str, Any] | None = None,
    step: int | None = None,
    keep: int = 2,
    held: Held | None = None,
) -> Path:
    """Write a checkpoint and, once it is read back and verified, remove the oldest beyond `keep`.

    What the driver holds frozen is written once: as long as it is the same, further checkpoints
    hold a hard link to the file of the one before. Each is whole by itself.

    Call it between optimizer updates. The states of Python's, NumPy's and torch's random number
    generators (all CUDA devices included) are saved with it. One process may write in a folder.

    Args:
        folder: where the checkpoints of this run live; created when absent.
        model: all its parameters and buffers are saved, each tied tensor once.
        optimizer: over parameters of `model`.
        scheduler: learning-rate scheduler whose state is data (functions are not saved).
        scaler: gradient scaler of mixed precision.
        driver: the `Driver` of this loop.
        extra: plain JSON of your own, returned by `load_checkpoint`.
        step: updates completed, for the name; by default the driver's count, else one more than
            the newest checkpoint's.
        keep: how many of the newest to keep, >= 2 (one to fall back on) or 0 for all.
        held: what is held frozen; by default what the driver holds.

    Returns:
        The new folder.

    Raises:
        StorageError: it cannot be written, or a part holds what cannot be saved. Earlier
            checkpoints are untouched.
    """
    folder = Path(folder)
    check_keep(keep)
    _io.make_folder(folder)
    _io.sweep(folder)
    parts = _collect(model, optimizer, scheduler, scaler, driver)
    number = _next_step(folder, driver) if step is None else step
    target = free_name(folder, number)
    held = held or Held({} if driver is None else driver.held)
    write_checkpoint(
        target, parts.trees, parts.tensors, step=number, kind=KIND, held=held.sha256,
        beside=[folder, *held.beside], write=_write_tensors,
        about={"extra": dict(extra or {}), "versions": _versions()},
    )  # fmt: skip
    if keep:
        prune(folder, keep)
    return target


def load_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    driver: Driver | None = None,
    streams: Collection[str] | None = None,
    step: int | None = None,
    allow_inexact: bool = False,
) -> dict[str, Any] | None:
    """Put the newest checkpoint that verifies into these objects; its `extra`, or None if none.

    Everything is checked before anything is changed. What the checkpoint holds must be asked for
    and what is asked for must be there, or the resumed run would differ without a word.

    Args:
        folder: as given to `save_checkpoint`.
        model: of the same architecture; its tensors are overwritten in place.
        optimizer: with the same parameters in the same groups.
        scheduler: of the same class.
        scaler: gradient scaler of mixed precision.
        driver: with the same policy; it applies the saved plan and checks frozen tensors.
        streams: random number generators to restore, of `RANDOM_STREAMS`. By default all, or none
            with `allow_inexact`: only streams asked for are moved.
        step: load the checkpoint of this step instead of the newest.
        allow_inexact: accept a checkpoint with other parts than asked for (to fine-tune on, to
            look at the weights); parts that are in both are restored.

    Raises:
        StorageError: checkpoints are there and none fits or verifies; nothing was changed.
    """
    found = _find(Path(folder), step)
    if found is None:
        return None
    path, parts, extra = found
    wanted = streams if streams is not None else (() if allow_inexact else RANDOM_STREAMS)
    objects = {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler,
        "driver": driver,
    }  # fmt: skip
    given = {name for name, thing in objects.items() if thing is not None}
    if not allow_inexact:
        _same_parts(path, set(parts.trees) - {"random"}, given)
    changes = _plan_changes(path, parts, objects, wanted)
    for change in changes:
        change()
    _log.info("restored %s", path)
    return extra


# -- parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parts:
    """A checkpoint in memory: JSON trees by part, and the tensors they point to, by file."""

    trees: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def _collect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Stateful | None,
    scaler: Stateful | None,
    driver: Driver | None,
) -> _Parts:
    parts = _Parts({}, {})
    named = _named_tensors(model)
    parts.tensors["model"] = {name: tensor for name, (tensor, _) in named.items()}
    parts.trees["model"] = {name: list(aliases) for name, (_, aliases) in named.items()}

    def put(part: str, value: Any) -> None:
        tensors: dict[str, Tensor] = {}
        parts.trees[part] = pack(value, part, tensors)
        if tensors:
            parts.tensors[part] = tensors

    if optimizer is not None:
        put("optimizer", _optimizer_state(model, optimizer))
    for part, thing in (("scheduler", scheduler), ("scaler", scaler)):
        if thing is not None:
            put(part, {"class": type(thing).__qualname__, "state": thing.state_dict()})
    if driver is not None:
        put("driver", driver.state())
    put("random", read_random_state())
    return parts


def _plan_changes(
    path: Path, parts: _Parts, objects: Mapping[str, Any], streams: Collection[str]
) -> list[Callable[[], object]]:
    """Check every part and return what to do, so that nothing is changed unless all fits."""
    trees = {
        name: unpack(tree, parts.tensors.get(name, {}))
        for name, tree in parts.trees.items()
        if name != "model" and objects.get(name, name == "random") is not None
    }
    model, optimizer = objects["model"], objects["optimizer"]
    changes = [_model_change(path, model, parts)]
    if "optimizer" in trees:
        changes.append(_optimizer_change(path, model, optimizer, trees["optimizer"]))
    changes += [
        _stateful_change(path, name, objects[name], trees[name])
        for name in ("scheduler", "scaler")
        if name in trees
    ]
    if "driver" in trees:
        changes.append(lambda: objects["driver"].restore(trees["driver"]))
    changes.append(_random_change(path, trees["random"], streams))
    return changes


def _same_parts(path: Path, saved: set[str], given: set[str]) -> None:
    if lost := sorted(saved - given):
        raise _misfit(path, f"{', '.join(lost)} in it, not asked for", f"pass {lost[0]}=")
    if missing := sorted(given - saved):
        raise _misfit(path, f"no {', '.join(missing)} in it", f"leave {missing[0]}= out")


def _misfit(path: Path, found: str, fix: str) -> StorageError:
    return StorageError(
        f"resume exactly from {path}", found=found, fix=f"{fix}; or allow_inexact=True"
    )


# -- finding, naming, pruning --------------------------------------------------------------------


def _find(folder: Path, step: int | None) -> tuple[Path, _Parts, dict[str, Any]] | None:
    found = whole(folder, step, kind=KIND)
    if found is None:
        return None
    path, note = found
    trees, tensors, state = read_checkpoint(path, note, _read_tensors)
    if state["versions"] != _versions():
        _log.warning("%s was written with %s: bits may differ", path, state["versions"])
    parts = _Parts(trees, tensors)
    return path, parts, state["extra"]


def _next_step(folder: Path, driver: Driver | None) -> int:
    if driver is not None:
        return driver.progress.step
    return newest_step(folder) + 1


def _versions() -> dict[str, str]:
    return {
        "frostline": __version__,
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }


# -- tensors -------------------------------------------------------------------------------------


def _named_tensors(model: nn.Module) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Every parameter and buffer once, by its first name, with its further names."""
    first: dict[int, str] = {}
    names: dict[str, tuple[Tensor, list[str]]] = {}
    for name, tensor in _all_tensors(model):
        if id(tensor) in first:
            names[first[id(tensor)]][1].append(name)
        else:
            first[id(tensor)] = name
            names[name] = (tensor.detach(), [])
    _no_other_state(model, {name for name, _ in _all_tensors(model)})
    return {name: (tensor, tuple(aliases)) for name, (tensor, aliases) in names.items()}


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _no_other_state(model: nn.Module, known: set[str]) -> None:
    if other := [name for name in model.state_dict() if name not in known]:
        raise StorageError(
            f"save {type(model).__name__}",
            found=f"state that is no parameter or buffer: {other[0]}",
            fix="register it as a buffer of its module",
        )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and read them back: safetensors has no checksum, and disks can lie."""
    plain = _unshared(tensors)
    with library_errors(f"write {path}"):
        _io.disk.produce(path, lambda place: save_file(plain, str(place)))
        written = _read_tensors(path)
    if written.keys() != plain.keys() or not all(
        _same_bits(plain[name], tensor) for name, tensor in written.items()
    ):
        raise StorageError(
            f"write {path}",
            found="what was written reads back differently",
            fix="check the disk, or write to another one",
        )


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(storage.data_ptr())
        result[name] = plain
    return result


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with library_errors(f"read {path}"), safetensors.safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _model_change(path: Path, model: nn.Module, parts: _Parts) -> Callable[[], object]:
    named = _named_tensors(model)
    saved, ties = parts.tensors.get("model", {}), parts.trees["model"]
    if lost := sorted(saved.keys() ^ named.keys()):
        place = "checkpoint" if lost[0] in saved else "model"
        raise _other_model(path, f"{lost[0]!r} only in the {place} ({len(lost)} such names)")
    for name, (tensor, aliases) in named.items():
        mine, theirs = (tensor.shape, tensor.dtype), (saved[name].shape, saved[name].dtype)
        if mine != theirs:
            raise _other_model(path, f"{name!r} is {_spell(*theirs)} there, {_spell(*mine)} here")
        if list(aliases) != ties[name]:
            raise _other_model(
                path, f"{name!r} is tied to {ties[name]} there, {list(aliases)} here"
            )

    def change() -> None:
        with torch.no_grad():
            for name, (tensor, _) in named.items():
                tensor.copy_(saved[name])

    return change


def _spell(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _other_model(path: Path, found: str) -> StorageError:
    return StorageError(
        f"load the model from {path}", found=found, fix="build the model as when it was saved"
    )


# -- optimizer -----------------------------------------------------------------------------------


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = _parameter_names(model)
    return {
        "class": type(optimizer).__qualname__,
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": _names_in(group, names)}
            for group in optimizer.param_groups
        ],
        "state": {names[p]: dict(optimizer.state[p]) for p in _held(optimizer)},
    }


def _held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters that have state, in group order."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    return [p for p in every if optimizer.state.get(p)]


def _parameter_names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _names_in(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> list[str]:
    if any(p not in names for p in group["params"]):
        raise StorageError(
            "save the optimizer by parameter names",
            found="a parameter in it that the model does not have",
            fix="pass the model whose parameters the optimizer updates",
        )
    return [names[p] for p in group["params"]]


def _optimizer_change(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> Callable[[], object]:
    names = _parameter_names(model)
    if saved["class"] != type(optimizer).__qualname__:
        raise _other_optimizer(path, f"{saved['class']} there, {type(optimizer).__qualname__} here")
    if len(saved["groups"]) != len(optimizer.param_groups):
        found = f"{len(saved['groups'])} groups there, {len(optimizer.param_groups)} here"
        raise _other_optimizer(path, found)
    for place, (theirs, mine) in enumerate(
        zip(saved["groups"], optimizer.param_groups, strict=True)
    ):
        if theirs["params"] != _names_in(mine, names):
            raise _other_optimizer(path, f"other parameters in group {place}")
        if odd := sorted(theirs.keys() ^ mine.keys()):
            raise _other_optimizer(path, f"the option {odd[0]!r} of group {place} in one only")

    def change() -> None:
        optimizer.state.clear()
        for theirs, mine in zip(saved["groups"], optimizer.param_groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})
            for parameter, name in zip(mine["params"], theirs["params"], strict=True):
                if name in saved["state"]:
                    optimizer.state[parameter] = {
                        key: _placed(key, value, parameter, mine)
                        for key, value in saved["state"][name].items()
                    }

    return change


def _placed(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    """State lives beside its parameter; torch keeps plain step counters on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value
    return value.to(parameter.device)


def _other_optimizer(path: Path, found: str) -> StorageError:
    return StorageError(
        f"load the optimizer from {path}", found=found, fix="build it as when it was saved"
    )


def _stateful_change(
    path: Path, part: str, thing: Stateful, saved: Mapping[str, Any]
) -> Callable[[], object]:
    if saved["class"] != type(thing).__qualname__:
        raise StorageError(
            f"load the {part} from {path}",
            found=f"{saved['class']} there, {type(thing).__qualname__} here",
            fix="build it as when it was saved",
        )
    return lambda: thing.load_state_dict(saved["state"])


# -- random number generators --------------------------------------------------------------------


def _random_change(
    path: Path, saved: Mapping[str, Any], streams: Collection[str]
) -> Callable[[], object]:
    if unknown := sorted(set(streams) - set(RANDOM_STREAMS)):
        raise StorageError(
            f"restore the random stream {unknown[0]!r}",
            found="no stream of that name",
            fix=f"some of {', '.join(RANDOM_STREAMS)}",
        )
    if "cuda" in saved and "cuda" in streams:
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if here != len(saved["cuda"]):
            found = f"random states of {len(saved['cuda'])} CUDA devices; {here} here"
            raise _misfit(path, found, "resume on as many devices")
    return lambda: write_random_state({name: saved[name] for name in streams if name in saved})
