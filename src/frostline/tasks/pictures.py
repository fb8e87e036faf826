"""Reading pictures with suspicion: six formats, no bombs, nothing half-decoded.

Every picture becomes 8-bit RGB, turned upright as its EXIF says. A damaged file raises an error
that names it; it never becomes a black image.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frostline.errors import DataError
from frostline.tasks.imports import need

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "SUFFIXES", "check_pictures", "open_picture"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MB as RGB
_FIX = "replace or remove the file, or set skip_bad to leave such files out"


def open_picture(raw: Any) -> Image:
    """A picture as upright 8-bit RGB.

    Args:
        raw: a path, encoded bytes, {"bytes": ..., "path": ...}, a PIL image, or a uint8 array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    Raises:
        DataError: not such a picture; names the file.
    """
    with warnings.catch_warnings():
        _bombs_are_errors()
        return _decode(raw)


def check_pictures(raws: Sequence[Any]) -> list[bytes | DataError]:
    """Decode each picture once: the digest of its content, or the error it would raise later.

    Costs about 1 ms per picture of 224 px and core.
    """
    need("PIL", extra="image")
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        _bombs_are_errors()  # here, once: warning filters belong to the process, not the thread
        return list(pool.map(_check, raws))


def _check(raw: Any) -> bytes | DataError:
    try:
        picture = _decode(raw)
    except DataError as error:
        return error
    head = f"{picture.size}".encode()
    return hashlib.blake2b(head + picture.tobytes(), digest_size=16).digest()


def _bombs_are_errors() -> None:
    image = need("PIL.Image", extra="image")
    warnings.simplefilter("error", image.DecompressionBombWarning)
    # Odd metadata is no reason to print a line per file; damaged pixels raise errors instead.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")


def _decode(raw: Any) -> Image:
    try:
        return _upright_rgb(_open(raw))
    except DataError:
        raise
    # Decoders raise whatever a damaged file leads them to: OSError, SyntaxError, struct.error...
    except Exception as error:
        raise _bad(raw, f"{type(error).__name__}: {error}") from error


def _open(raw: Any) -> Image:
    image = need("PIL.Image", extra="image")
    if isinstance(raw, image.Image):
        return raw
    if isinstance(raw, np.ndarray):
        return _from_array(raw)
    if isinstance(raw, Mapping):
        raw = raw["path"] if raw.get("bytes") is None else raw["bytes"]
    stream = io.BytesIO(raw if isinstance(raw, bytes) else Path(raw).read_bytes())
    picture = image.open(stream, formats=FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise _bad(raw, f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
    return picture


def _from_array(array: np.ndarray[Any, Any]) -> Image:
    image = need("PIL.Image", extra="image")
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise DataError(
            "use an array as a picture",
            found=f"shape {array.shape}, type {array.dtype}",
            fix="uint8 (0 to 255) of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)",
        )
    return image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _upright_rgb(picture: Image) -> Image:
    ops = need("PIL.ImageOps", extra="image")
    picture = ops.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips to white
        array = np.asarray(picture).astype(np.int64)
        picture = _from_array((array.clip(0, 65_535) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise _bad(picture, "floating-point pixels, whose range is unknown")
    return picture.convert("RGB")


def _bad(raw: Any, found: str) -> DataError:
    name = raw.get("path") if isinstance(raw, Mapping) else raw
    shown = str(name) if isinstance(name, str | Path) else f"a picture ({type(raw).__name__})"
    return DataError(f"read the picture {shown}", found=found, fix=_FIX)
