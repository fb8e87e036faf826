"""The Hugging Face hub, with its many errors translated into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frostline.errors import ModelError
from frostline.tasks.imports import need

__all__ = ["download", "translated"]

_OFFLINE = (
    "connect to the internet once, give a local folder or --weights FILE.safetensors, or "
    "start from random weights (weights: random)"
)


def download(repository: str, file: str) -> Path:
    """One file of a hub repository, from the local cache where it is there.

    Raises:
        ModelError: no connection, no such repository or file.
    """
    library = need("huggingface_hub", extra="image")
    with translated(f"get the weights {repository}/{file}"):
        return Path(library.hf_hub_download(repository, file))


@contextmanager
def translated(asked: str) -> Iterator[None]:
    """Turn the errors of the hub and of files into `ModelError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        lines = str(error).splitlines() or [""]
        found = f"{type(error).__name__}: {lines[0]}"[:400]
        raise ModelError(asked, found=found, fix=_OFFLINE) from error
