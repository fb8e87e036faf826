"""Labelled rows as they come from a source, before splits are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from frostline.errors import DataError

__all__ = ["Rows", "split_name"]

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Rows:
    """Labelled raw inputs.

    Attributes:
        inputs: paths or arrays of pictures, or texts.
        labels: class name of each.
        digests: digest of each input's content, to find repeats.
        skipped: where bad rows were left out, with the reason.
    """

    inputs: Sequence[Any]
    labels: Sequence[str]
    digests: Sequence[bytes]
    skipped: Sequence[str] = field(default_factory=tuple)

    def take(self, indices: Sequence[int]) -> Rows:
        """These rows, in this order."""
        return Rows(
            [self.inputs[i] for i in indices],
            [self.labels[i] for i in indices],
            [self.digests[i] for i in indices],
        )


def split_name(name: str) -> str | None:
    """The split a folder or file name stands for: "train", "val", "test" or None.

    Example:
        >>> split_name("Validation"), split_name("daisy")
        ('val', None)
    """
    lowered = name.lower()
    return next((split for split, names in _SPLITS.items() if lowered in names), None)


def keep_good(
    inputs: Sequence[Any],
    labels: Sequence[str],
    checked: Sequence[bytes | DataError],
    *,
    skip: bool,
) -> Rows:
    """Rows whose check passed.

    Args:
        inputs: raw inputs.
        labels: class names.
        checked: digest or error per input.
        skip: leave bad rows out and list them; otherwise the first one is raised.

    Raises:
        DataError: a bad row, when they are not skipped.
    """
    bad = [c for c in checked if isinstance(c, DataError)]
    if bad and not skip:
        raise DataError(
            bad[0].asked,
            found=bad[0].found + (f" (and {len(bad) - 1} more like it)" if bad[1:] else ""),
            fix=bad[0].fix,
        ) from bad[0]
    good = [i for i, c in enumerate(checked) if isinstance(c, bytes)]
    return Rows(
        [inputs[i] for i in good],
        [labels[i] for i in good],
        [c for c in checked if isinstance(c, bytes)],
        [f"{b.asked}: {b.found}" for b in bad],
    )
