"""The frozen region of Keras models: cut off, run once per sample, stored, replayed.

`fit` stands in for `model.fit`; the other names are the pieces that it is made of.
"""

from frostline.frontier.keras.fitting import CachedFit, fit
from frostline.frontier.keras.region import KerasRegion, find_region, frozen_model, rest_model

__all__ = ["CachedFit", "KerasRegion", "find_region", "fit", "frozen_model", "rest_model"]
