"""Frostline: layer freezing for transfer learning.

Importing this package imports no framework; names that need one load it when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from frostline._version import __version__
from frostline.clock import Duration, Progress
from frostline.driver import Certificate, Driver
from frostline.errors import FrostlineError
from frostline.groups import GroupCost, LayerGroup, LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Decision, Event, Policy
from frostline.registry import available_policies, make_policy
from frostline.select import Selector, select

if TYPE_CHECKING:
    from frostline.backends.torch.checkpoint import load_checkpoint, save_checkpoint
    from frostline.backends.torch.freeze import freeze, frozen, torch_driver, unfreeze
    from frostline.backends.torch.grouping import layer_groups
    from frostline.backends.torch.measure import measure_costs
    from frostline.backends.torch.optimizer import parameter_groups
    from frostline.frontier.cache import FrontierCache
    from frostline.integrations.recording import record
    from frostline.integrations.tracking import track
    from frostline.study.choose import Choice, choose
    from frostline.study.compare import Study, compare
    from frostline.study.diagnosis import Diagnosis, diagnose
    from frostline.study.learning_curve import LearningCurve, learning_curve
    from frostline.study.search import Sweep, sweep
    from frostline.tasks.run import Run, fit, load

_LAZY = {
    "FrontierCache": "frostline.frontier.cache",
    "Choice": "frostline.study.choose",
    "Diagnosis": "frostline.study.diagnosis",
    "LearningCurve": "frostline.study.learning_curve",
    "Run": "frostline.tasks.run",
    "Study": "frostline.study.compare",
    "Sweep": "frostline.study.search",
    "choose": "frostline.study.choose",
    "compare": "frostline.study.compare",
    "diagnose": "frostline.study.diagnosis",
    "fit": "frostline.tasks.run",
    "freeze": "frostline.backends.torch.freeze",
    "frozen": "frostline.backends.torch.freeze",
    "learning_curve": "frostline.study.learning_curve",
    "layer_groups": "frostline.backends.torch.grouping",
    "load": "frostline.tasks.run",
    "load_checkpoint": "frostline.backends.torch.checkpoint",
    "measure_costs": "frostline.backends.torch.measure",
    "parameter_groups": "frostline.backends.torch.optimizer",
    "record": "frostline.integrations.recording",
    "save_checkpoint": "frostline.backends.torch.checkpoint",
    "sweep": "frostline.study.search",
    "torch_driver": "frostline.backends.torch.freeze",
    "track": "frostline.integrations.tracking",
    "unfreeze": "frostline.backends.torch.freeze",
}

__all__ = [
    "Certificate",
    "Choice",
    "Decision",
    "Diagnosis",
    "Driver",
    "Duration",
    "Event",
    "FreezePlan",
    "FrontierCache",
    "FrostlineError",
    "GroupCost",
    "LayerGroup",
    "LayerGroups",
    "LearningCurve",
    "Policy",
    "Progress",
    "Run",
    "Selector",
    "Study",
    "Sweep",
    "__version__",
    "available_policies",
    "choose",
    "compare",
    "diagnose",
    "fit",
    "freeze",
    "frozen",
    "layer_groups",
    "learning_curve",
    "load",
    "load_checkpoint",
    "make_policy",
    "measure_costs",
    "parameter_groups",
    "record",
    "save_checkpoint",
    "select",
    "sweep",
    "torch_driver",
    "track",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'frostline' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
