"""The frozen region of Keras models: cut off, run once per sample, stored, replayed.

`fit` stands in for `model.fit`; `cached` is for loops of your own; the other names are the pieces
that both are made of.
"""

from frostline.frontier.keras.data import CachedData
from frostline.frontier.keras.fitting import CachedFit, cached, fit
from frostline.frontier.keras.region import KerasRegion, find_region, frozen_model, rest_model

__all__ = [
    "CachedData",
    "CachedFit",
    "KerasRegion",
    "cached",
    "find_region",
    "fit",
    "frozen_model",
    "rest_model",
]
