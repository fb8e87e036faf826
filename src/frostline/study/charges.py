"""What runs of a study found stored by others, at the price that storing it had.

Arms share one store of what frozen layers put out, so whoever comes first pays for all. A strategy
is to be judged by what it costs alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frostline.records import read_run
from frostline.study.folder import StudyFolder, TrialKey, run_order
from frostline.study.spec import StudySpec

__all__ = ["charges", "read_charges"]

#: What the summary of a run says of its cache; None for a run without one.
CacheCosts = Mapping[str, Any] | None


def charges(caches: Mapping[TrialKey, CacheCosts]) -> dict[TrialKey, float]:
    """Seconds to charge each run for the samples that it found stored.

    The price of a sample is what storing one took in the arm's own runs, else the highest in the
    study: stores of several arms may be of different depths.

    Args:
        caches: of each finished run: ``found_rows``, ``filled_rows`` and ``fill_s``.

    Example:
        >>> first = {"found_rows": 0, "filled_rows": 100, "fill_s": 5.0}
        >>> second = {"found_rows": 100, "filled_rows": 0, "fill_s": 0.0}
        >>> list(charges({TrialKey("a", 0): first, TrialKey("b", 0): second}).values())
        [0.0, 5.0]
    """
    prices: dict[str, float] = {}
    for key, cache in caches.items():
        prices[key.arm] = max(prices.get(key.arm, 0.0), _price(cache))
    highest = max(prices.values(), default=0.0)
    return {
        key: (cache or {}).get("found_rows", 0) * (prices[key.arm] or highest)
        for key, cache in caches.items()
    }


def read_charges(folder: StudyFolder, spec: StudySpec) -> dict[TrialKey, float]:
    """The same of the runs that a study has so far, from their records.

    Args:
        folder: of the study.
        spec: which runs it has.
    """
    return charges(
        {
            key: read_run(folder.run(key)).summary.get("cache")
            for key in run_order(spec)
            if folder.done(key)
        }
    )


def _price(cache: CacheCosts) -> float:
    """Seconds to store one sample, where a run stored any."""
    rows = (cache or {}).get("filled_rows", 0)
    return float((cache or {})["fill_s"]) / rows if rows else 0.0
