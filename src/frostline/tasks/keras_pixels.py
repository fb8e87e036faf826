"""What values a Keras model's pictures have.

Every family of `keras.applications` was trained on pixels of its own: in -1 to 1, with ImageNet's
mean taken off, blue first, or as they are. Given others a model still runs, and scores badly.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.errors import ModelError

__all__ = ["Pixels", "applications", "pixels_of_application", "pixels_of_file"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pixels:
    """Values of the pictures: channel c is (p - mean[c]) / std[c], p in [0, 1], red first.

    Attributes:
        mean: by channel.
        std: by channel.
        channels: the order in which the model wants them, "rgb" or "bgr".
        words: for people.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str
    words: str


def applications(keras: Any) -> list[str]:
    """Names of the models in `keras.applications`."""
    found = keras.applications
    return [n for n in dir(found) if n[0].isupper() and callable(getattr(found, n))]


_RAW = Pixels((0.0,) * 3, (1 / 255,) * 3, "rgb", "pixels of 0 to 255, which its layers scale")
_UNIT = Pixels((0.0,) * 3, (1.0,) * 3, "rgb", "pixels of 0 to 1")
#: Steps of arithmetic in front of a model, besides layers, that prepare pixels.
_ARITHMETIC = frozenset({"Add", "Divide", "Multiply", "Subtract", "TrueDivide", "GetItem", "Flip"})


def pixels_of_file(keras: Any, body: Any, *, source: str) -> Pixels:
    """What a model of a file wants, as far as it tells: by its first layers, else by its name."""
    if _prepares(body):
        return _RAW
    by_name = {name.lower().replace("_", ""): name for name in applications(keras)}
    for model in (body, *(layer for layer in body.layers if isinstance(layer, keras.Model))):
        start = model.name.lower().split("_")
        for length in range(len(start), 0, -1):  # "mobilenet_0.25_128", "inception_v3"
            if name := by_name.get("".join(start[:length]).replace("-", "")):
                return pixels_of_application(keras, name)
    _log.warning(
        "%s does not say what pixels it wants: %s are given; set image_mean and image_std if it "
        "was trained on others",
        source,
        _UNIT.words,
    )
    return _UNIT


def _prepares(body: Any) -> bool:
    """Whether something scales the pixels before the first layer with weights."""
    for step in body.operations:
        if type(step).__name__ in ("Rescaling", "Normalization", *_ARITHMETIC):
            return True
        if getattr(step, "weights", None):
            return False
    return False


def pixels_of_application(keras: Any, application: str) -> Pixels:
    """What the weights of one of `keras.applications` were trained on.

    Read off what `preprocess_input` of its module does to black and to plain colours.

    Raises:
        ModelError: it does more than to scale, shift and swap channels.
    """
    function, home = _preprocess_input(keras, application)
    colours = np.concatenate([np.zeros((1, 3)), 255 * np.eye(3)]).astype("float32")
    given = np.array(function(colours.reshape(4, 1, 1, 3).copy(), data_format="channels_last"))
    black, moved = given[0].reshape(3), given[1:].reshape(3, 3) - given[0].reshape(3)
    order = tuple(int(np.flatnonzero(row)[0]) for row in moved)  # where each colour goes
    span = np.array([moved[colour, place] for colour, place in enumerate(order)])
    offset = black[list(order)]
    if order not in ((0, 1, 2), (2, 1, 0)):
        raise ModelError(
            f"prepare pictures for keras:{application}",
            found=f"channels in the order {order}",
            fix="another version of Keras",
        )
    return Pixels(
        tuple(float(v) for v in -offset / span),
        tuple(float(v) for v in 1 / span),
        "rgb" if order == (0, 1, 2) else "bgr",
        f"pixels as {home}.preprocess_input makes them",
    )


def _preprocess_input(keras: Any, application: str) -> tuple[Any, str]:
    """The function beside a builder, and the name of their module."""
    home = getattr(keras.applications, application).__module__.rpartition(".")[2]
    found = getattr(getattr(keras.applications, home, None), "preprocess_input", None)
    if found is None:
        raise ModelError(
            f"prepare pictures for keras:{application}",
            found=f"no preprocess_input in keras.applications.{home}",
            fix="another version of Keras",
        )
    return found, f"keras.applications.{home}"
