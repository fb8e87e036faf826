"""Contract suites: what every policy and every backend must hold, ours and other people's.

Call them from any test runner; a broken contract raises `ContractBroken`, which names the rule.

Example:
    >>> from frostline.policies.static import LinearProbe
    >>> check_policy(LinearProbe())
"""

from __future__ import annotations

from frostline.testing.backend import BackendCase, check_backend
from frostline.testing.contract import ContractBroken
from frostline.testing.policy import check_policy, event_stream, example_groups

__all__ = [
    "BackendCase",
    "ContractBroken",
    "check_backend",
    "check_policy",
    "event_stream",
    "example_groups",
]
