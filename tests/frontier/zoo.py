"""The zoo: every case by name, the friendly ones first."""

from __future__ import annotations

from frontier import zoo_small, zoo_text, zoo_vision  # noqa: F401  they fill the zoo
from frontier.zoo_cases import CASES, Case

from frontier import zoo_hostile, zoo_traps  # noqa: F401  isort: skip

__all__ = ["CASES", "Case"]
