"""Augmentation behind the frontier: small random changes of stored values, new in each step.

Stored views cost disk and repeat themselves. These changes cost neither: they work on the values
that come out of the store. They are no replacement for changes of the picture; which does more
good is to be measured, and both may be combined.

====================  =========  =================================================================
short form            works on   what it does
====================  =========  =================================================================
``noise=0.1``         any        adds normal noise of that share of each channel's deviation
``drop=0.1``          any        zeroes that share of each sample's channels, scales up the rest
``flip`` (``=0.5``)   maps       mirrors that share of the samples left to right
``shift=0.1``         maps       moves each sample by up to that share of height and width
``tokens=0.1``        tokens     zeroes that share of each sample's tokens, never the first one
====================  =========  =================================================================

Several are separated by commas and applied in that order. All slots of a sample are mirrored and
moved together, and slots with equally many tokens lose the same ones, so skips stay in place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from frostline.backends.torch.random_state import mix
from frostline.errors import ConfigError, FrontierError

__all__ = ["STEPS", "FeatureAugment", "Kind", "Step", "kind_of", "read_feature_augment"]

Kind = Literal["vector", "tokens", "map", "map-last", "other"]
_MAX_LENGTH = 1_000
_NUMBER = re.compile(r"(\d*\.?\d+|\d+\.)(e-\d{1,3})?")


@dataclass(frozen=True, slots=True)
class Step:
    """One change.

    Attributes:
        name: one of `STEPS`.
        amount: a share; 0 changes nothing.

    Raises:
        ConfigError: an unknown name, an amount out of range.
    """

    name: str
    amount: float

    def __post_init__(self) -> None:
        if self.name not in STEPS:
            near = difflib.get_close_matches(self.name, STEPS, n=1)
            raise ConfigError(
                f"augment features by {self.name!r}",
                found="no change of that name",
                fix=f"write {near[0]!r}" if near else f"choose from {', '.join(STEPS)}",
            )
        most = STEPS[self.name]
        if not 0 <= self.amount <= most:
            raise ConfigError(
                f"augment features by {self}",
                found="an amount out of range",
                fix=f"give a number from 0 to {most:g}",
            )

    def __str__(self) -> str:
        tiny = 0 < self.amount < 1e-12  # written out, it would take hundreds of zeros
        amount = repr(self.amount) if tiny else np.format_float_positional(self.amount, trim="-")
        return f"{self.name}={amount}"


#: The changes, and the largest amount of each.
STEPS: Mapping[str, float] = MappingProxyType(
    {"noise": 10.0, "drop": 0.9, "flip": 1.0, "shift": 0.5, "tokens": 0.9}
)


@dataclass(frozen=True, slots=True)
class FeatureAugment:
    """Changes of slot values, drawn from a seed and from nothing else.

    Attributes:
        steps: applied in this order; none: values pass untouched.
        kinds: what slots hold, where their shape does not tell (see `kind_of`); "other" is left
            alone.

    Example:
        >>> augment = FeatureAugment((Step("flip", 1.0),))
        >>> rows = {"map": torch.arange(8.0).reshape(1, 2, 2, 2)}
        >>> augment(rows, seed=0)["map"].tolist()
        [[[[1.0, 0.0], [3.0, 2.0]], [[5.0, 4.0], [7.0, 6.0]]]]
    """

    steps: tuple[Step, ...] = ()
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    def __call__(self, rows: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The rows with all changes applied; the given tensors are not written to.

        Args:
            rows: slot name -> (N, ...), samples first; integers and booleans are left alone.
            seed: of this training step, any whole number.

        Raises:
            FrontierError: a map is to be mirrored or moved whose axes the shape does not tell.
        """
        changed = dict(rows)
        for place, step in enumerate(self.steps):
            if step.amount > 0:
                changed |= _CHANGES[step.name](
                    self._worked_on(changed, step), step.amount, mix(seed, place)
                )
        return changed

    def __str__(self) -> str:
        return ",".join(map(str, self.steps)) or "off"

    def _worked_on(self, rows: Mapping[str, Tensor], step: Step) -> dict[str, _Slot]:
        found = {}
        for name, values in rows.items():
            if not values.is_floating_point() or not values.shape[0]:
                continue
            shape = tuple(values.shape[1:])
            kind = self.kinds.get(name) or kind_of(shape)
            if kind is None and step.name != "noise":
                raise FrontierError(
                    f"augment the slot {name!r} by {step}",
                    found=f"the shape {shape}, which does not tell its channels from its places",
                    fix=f"say what it is: kinds={{{name!r}: 'map'}} for (channels, height, width), "
                    "'map-last' for (height, width, channels), 'other' to leave it alone",
                )
            if kind is not None and kind not in _AXES:
                raise ConfigError(
                    f"take the slot {name!r} for {kind!r}",
                    found="no kind of that name",
                    fix=f"choose from {', '.join(_AXES)}",
                )
            if kind != "other" and (kind is None or kind in _WORKS_ON[step.name]):
                found[name] = _Slot(values, kind or "map")
        return found


@dataclass(frozen=True, slots=True)
class _Slot:
    """Values of a slot (N, ...), and which axes they have."""

    values: Tensor
    kind: Kind

    @property
    def channel(self) -> int:
        return _AXES[self.kind][0]

    @property
    def height(self) -> int:
        return _AXES[self.kind][1]

    @property
    def width(self) -> int:
        return _AXES[self.kind][2]


# Axes of (N, ...): channels, then height or tokens, then width. 0: none.
_AXES: Mapping[Kind, tuple[int, int, int]] = {
    "vector": (1, 0, 0),
    "tokens": (2, 1, 0),
    "map": (1, 2, 3),
    "map-last": (3, 1, 2),
    "other": (0, 0, 0),
}
_ANY = ("vector", "tokens", "map", "map-last")
_WORKS_ON: Mapping[str, tuple[str, ...]] = {
    "noise": _ANY,
    "drop": _ANY,
    "flip": ("map", "map-last"),
    "shift": ("map", "map-last"),
    "tokens": ("tokens",),
}


def kind_of(shape: tuple[int, ...]) -> Kind | None:
    """What a slot of this shape (of one sample) holds; None where the shape does not tell.

    Maps are taken to be square. One channel of L by L is taken for an attention mask, not a map.

    Example:
        >>> kind_of((512,)), kind_of((128, 384)), kind_of((512, 7, 7)), kind_of((7, 7, 96))
        ('vector', 'tokens', 'map', 'map-last')
        >>> kind_of((1, 64, 64)), kind_of((512, 7, 9)) is None, kind_of(())
        ('other', True, 'other')
    """
    if len(shape) == 1:
        return "vector"
    if len(shape) == 2:
        return "tokens"
    if len(shape) != 3 or shape[0] == 1:
        return "other"
    if shape[1] == shape[2]:
        return "map"
    return "map-last" if shape[0] == shape[1] else None


def read_feature_augment(text: str, kinds: Mapping[str, Kind] | None = None) -> FeatureAugment:
    """Changes from their short form; "off" and "" are none.

    Args:
        text: names with amounts, separated by commas.
        kinds: passed on to `FeatureAugment`.

    Raises:
        ConfigError: what cannot be read, an unknown or repeated name, an amount out of range.

    Example:
        >>> print(read_feature_augment("noise=0.1, flip"))
        noise=0.1,flip=0.5
        >>> read_feature_augment("nosie=0.1")
        Traceback (most recent call last):
        frostline.errors.ConfigError: cannot augment features by 'nosie'
          found: no change of that name
          try:   write 'noise'
    """
    if len(text) > _MAX_LENGTH:
        raise _unreadable(text[:40] + "…", f"{len(text):,} characters")
    parts = [part.strip() for part in text.split(",")]
    steps = [] if text.strip() in ("", "off") else [_read_step(part, text) for part in parts]
    names = [step.name for step in steps]
    if twice := [name for name in STEPS if names.count(name) > 1]:
        raise _unreadable(text, f"{twice[0]} more than once")
    return FeatureAugment(tuple(steps), dict(kinds or {}))


def _read_step(part: str, text: str) -> Step:
    name, equals, amount = (piece.strip() for piece in part.partition("="))
    if not name:
        raise _unreadable(text, "nothing between two commas")
    if not equals and name == "flip":
        return Step(name, 0.5)
    if name in STEPS and not _NUMBER.fullmatch(amount):
        raise _unreadable(text, f"no amount: {part}" if not equals else f"no number: {amount!r}")
    return Step(name, float(amount) if name in STEPS else 0.0)


def _unreadable(text: str, found: str) -> ConfigError:
    return ConfigError(
        f"read the feature augmentation {text!r}",
        found=found,
        fix="write names with amounts, like 'noise=0.1,flip', or 'off'",
    )


# -- the changes -----------------------------------------------------------------------------------


def _noise(slots: Mapping[str, _Slot], amount: float, seed: int) -> dict[str, Tensor]:
    changed = {}
    for number, (name, slot) in enumerate(slots.items()):
        values = slot.values.float()
        others = [axis for axis in range(values.dim()) if axis != slot.channel]
        deviation = values.std(dim=others, correction=0, keepdim=True)
        generator = torch.Generator(values.device).manual_seed(mix(seed, number))
        drawn = torch.randn(values.shape, generator=generator, device=values.device)
        changed[name] = (values + amount * deviation * drawn).to(slot.values.dtype)
    return changed


def _drop(slots: Mapping[str, _Slot], amount: float, seed: int) -> dict[str, Tensor]:
    changed = {}
    for number, (name, slot) in enumerate(slots.items()):
        shape = [1] * slot.values.dim()
        shape[0], shape[slot.channel] = slot.values.shape[0], slot.values.shape[slot.channel]
        kept = _uniform(shape, mix(seed, number)) >= amount
        scale = kept.to(slot.values.device, slot.values.dtype) / (1 - amount)
        # Not a product alone: what is infinite or no number goes to zero as well.
        changed[name] = torch.where(scale > 0, slot.values * scale, torch.zeros_like(scale))
    return changed


def _flip(slots: Mapping[str, _Slot], amount: float, seed: int) -> dict[str, Tensor]:
    changed = {}
    for name, slot in slots.items():
        values = slot.values
        mirrored = _uniform([values.shape[0]], seed) < amount
        which = mirrored.to(values.device).reshape(-1, *[1] * (values.dim() - 1))
        changed[name] = torch.where(which, values.flip(slot.width), values)
    return changed


def _shift(slots: Mapping[str, _Slot], amount: float, seed: int) -> dict[str, Tensor]:
    """Whole cells of the coarsest map, so that finer maps move by whole cells too."""
    changed = {}
    coarse = [
        min((slot.values.shape[axis(slot)] for slot in slots.values()), default=1)
        for axis in (_height, _width)
    ]
    most = [max(1, round(amount * size)) if size > 1 else 0 for size in coarse]
    for name, slot in slots.items():
        values = slot.values
        for number, axis in enumerate((slot.height, slot.width)):
            drawn = _uniform([values.shape[0]], mix(seed, number))
            cells = (drawn * (2 * most[number] + 1)).long() - most[number]
            size = values.shape[axis]
            values = _moved(values, axis, (cells * size / coarse[number]).round().long())
        changed[name] = values
    return changed


def _height(slot: _Slot) -> int:
    return slot.height


def _width(slot: _Slot) -> int:
    return slot.width


def _moved(values: Tensor, axis: int, cells: Tensor) -> Tensor:
    """Each sample moved along an axis; what comes in from outside repeats the border."""
    size = values.shape[axis]
    source = (torch.arange(size) - cells[:, None]).clamp(0, size - 1)
    shape = [1] * values.dim()
    shape[0], shape[axis] = source.shape
    index = source.to(values.device).reshape(shape).expand_as(values)
    return values.gather(axis, index)


def _tokens(slots: Mapping[str, _Slot], amount: float, seed: int) -> dict[str, Tensor]:
    changed = {}
    for name, slot in slots.items():
        values = slot.values
        # The first token is often the one that the head reads.
        lost = _uniform(list(values.shape[:2]), mix(seed, values.shape[1])) < amount
        lost[:, 0] = False
        changed[name] = values.masked_fill(lost[:, :, None].to(values.device), 0)
    return changed


def _uniform(shape: list[int], seed: int) -> Tensor:
    """Numbers in [0, 1), drawn on the CPU: the same for all slots and on all devices."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


_Change = Callable[[Mapping[str, _Slot], float, int], dict[str, Tensor]]
_CHANGES: Mapping[str, _Change] = {
    "noise": _noise,
    "drop": _drop,
    "flip": _flip,
    "shift": _shift,
    "tokens": _tokens,
}
